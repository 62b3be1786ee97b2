"""Kernels as images: relocated right, cached, shared by processes, and never run when they are not whole."""

import ctypes
import hashlib
import mmap
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from calling import emitted
from smolrun.kernels import image, load, target
from smolrun.kernels.image import Code, ImageError, link, seal, unseal
from smolrun.kernels.target import choose

NAME = "interleave"  # the quickest to compile
LOCK = f"{choose().name}.lock"

SCRIPT = f"""
import os, sys
from smolrun.kernels import load
from smolrun.kernels.target import choose

def poison(*_):
    raise AssertionError("something was compiled")

def get(progress=None):
    return load.addresses(choose(), ["{NAME}"], progress)
"""


def run(body: str, **environment: str) -> str:
    """SCRIPT and body in a process of their own; its output."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT + body]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def sound() -> Path:
    """The image of NAME in the cache of the tests."""
    load.addresses(choose(), [NAME])
    return next(p for folder in load.cache_folders() if (p := load.image_path(folder, choose(), NAME)).is_file())


# ---- images ----------------------------------------------------------------------------------------------------------

TABLE = tuple(float(i * i) for i in range(64))
IR = f"""
@table = internal constant [64 x float] [{", ".join(f"float {x}" for x in TABLE)}], align 64

define internal float @pick(i64 %i) noinline {{
  %p = getelementptr [64 x float], ptr @table, i64 0, i64 %i
  %x = load float, ptr %p
  ret float %x
}}

define float @scaled(i64 %i) {{
  %x = call float @pick(i64 %i)
  %y = fmul float %x, 0x400921FB60000000
  ret float %y
}}
"""


def object_of(ir: str, machine: str, reloc: str = "pic") -> bytes:
    """What LLVM makes of an IR text for a machine, this one or another."""
    llvm = pytest.importorskip("llvmlite.binding")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = f"{machine}-unknown-linux"
    made = llvm.Target.from_triple(triple).create_target_machine(opt=2, reloc=reloc, codemodel="small")
    module = llvm.parse_assembly(f'target triple = "{triple}"\ntarget datalayout = "{made.target_data}"\n' + ir)
    return made.emit_object(module)


@pytest.mark.skipif(not target.choose().cpu.startswith("x86"), reason="runs x86-64 code")
@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_linked_object_runs(way: str, tmp_path: Path) -> None:
    """A call, a constant and a table: relocations between and within sections."""
    code, symbols = link(object_of(IR, "x86_64"))
    assert list(symbols) == ["scaled"]
    path = tmp_path / "code.img"
    path.write_bytes(seal(code, symbols, "k"))
    held = Code(path if way == "file" else path.read_bytes(), "k")
    scaled = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)(held.addresses["scaled"])
    assert [scaled(i) for i in range(64)] == [float(np.float32(x) * np.float32(np.pi)) for x in TABLE]
    assert (str(path) in Path("/proc/self/maps").read_text()) == (way == "file") or sys.platform != "linux"


def bits(word: int, first: int, count: int, *, signed: bool = True) -> int:
    """A field of an instruction."""
    value = word >> first & (1 << count) - 1
    return value - (1 << count) if signed and value >> count - 1 else value


def test_aarch64_relocations_reach_what_they_name() -> None:
    """Read, not run: every ADRP with its ADD or load, and every call, is decoded and followed."""
    elf = object_of(IR, "aarch64")
    code, symbols = link(elf)
    words = struct.unpack_from(f"<{len(code) // 4}I", code)
    pages: dict[int, int] = {}
    reached, called = [], []
    for at, word in enumerate(words):
        if word & 0x9F000000 == 0x90000000:  # adrp
            pages[word & 31] = (4 * at // 4096 + (bits(word, 5, 19) << 2 | word >> 29 & 3)) * 4096
        elif word & 0xFFC00000 == 0x91000000 and word >> 5 & 31 in pages:  # add x, x, #imm12
            reached.append(pages.pop(word >> 5 & 31) + bits(word, 10, 12, signed=False))
        elif word & 0xFFC00000 == 0xBD400000 and word >> 5 & 31 in pages:  # ldr s, [x, #imm12 * 4]
            reached.append(pages.pop(word >> 5 & 31) + 4 * bits(word, 10, 12, signed=False))
        elif word & 0x7C000000 == 0x14000000 and bits(word, 0, 26):  # b, bl
            called.append(4 * (at + bits(word, 0, 26)))
    table = code.index(np.array(TABLE, np.float32).tobytes())
    assert table in reached and table % 64 == 0
    others = [struct.unpack_from("<f", code, at)[0] for at in reached if at != table]
    assert others in ([], [np.float32(np.pi)])  # LLVM may build the constant from immediates
    assert called and all(0 <= at < table and at != symbols["scaled"] for at in called)


@pytest.mark.parametrize(
    ("ir", "reloc", "said"),
    [
        ("declare i64 @abs(i64)\ndefine i64 @f(i64 %x) {\n%y = call i64 @abs(i64 %x)\nret i64 %y\n}", "pic", "abs"),
        ("@v = global i64 7\ndefine ptr @f() {\nret ptr @v\n}", "pic", "data"),
        ("@v = internal global i64 0\ndefine void @f() {\nstore i64 1, ptr @v\nret void\n}", "pic", "bss"),
        ("@t = constant [1 x ptr] [ptr @f]\ndefine ptr @f() {\nret ptr @t\n}", "pic", "data.rel.ro"),
        ("@t = internal constant [2 x i64] [i64 1, i64 2]\n"
         "define i64 @f(i64 %i) {\n%p = getelementptr i64, ptr @t, i64 %i\n%x = load i64, ptr %p\nret i64 %x\n}",
         "static", "not a distance"),
    ],
)  # fmt: skip
def test_what_is_no_position_independent_whole_is_refused(ir: str, reloc: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        link(object_of(ir, "x86_64", reloc))


def test_a_distance_that_does_not_fit_is_an_error() -> None:
    _, call = image.PATCHES[image.AARCH64][283]
    assert call(0x94000000, 8, 4) == 0x94000001 and call(0x94000000, 0, 4) == 0x97FFFFFF
    for distance in (2, 1 << 27):
        with pytest.raises(ImageError, match=f"{distance:,}"):
            call(0, distance, 0)


def test_all_kernels_of_a_model_are_self_contained() -> None:
    """Linking refuses what is not; here that it does link, in the tier that had to call libm once."""
    for name, code in emitted("image", "generic", ["quantise", NAME]).items():
        assert list(unseal(memoryview(code), load.image_key(target.TIERS["generic"], name))) == [name]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "key"])
def test_a_damaged_image_is_never_run(damage: str, sound: Path, tmp_path: Path) -> None:
    content = sound.read_bytes()
    spoilt = {
        "flip": content[:9] + bytes([content[9] ^ 1]) + content[10:],
        "cut": content[:-1],
        "empty": b"",
        "key": seal(content[:64], {NAME: 0}, "another-tier"),
    }[damage]
    path = tmp_path / sound.name
    path.write_bytes(spoilt)
    for source in (path, spoilt):
        with pytest.raises(ImageError):
            Code(source, load.image_key(choose(), NAME))


def test_a_folder_that_executes_nothing(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """noexec mounts and SELinux: a copy is run; where that is refused too, the error says so."""
    real = mmap.mmap

    def refuse(handle: int, *rest: int) -> mmap.mmap:
        if handle != -1:
            raise PermissionError(1, "Operation not permitted")
        return real(handle, *rest)

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert Code(sound, load.image_key(choose(), NAME)).addresses[NAME]

    class Libc:
        def mprotect(self, *_: object) -> int:
            ctypes.set_errno(13)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    with pytest.raises(MemoryError, match=r"Permission denied.*SMOLRUN_CACHE_DIR"):
        Code(sound, load.image_key(choose(), NAME))
    monkeypatch.setattr(load, "_loaded", load._Loaded)
    with pytest.raises(load.BuildError, match="executable memory"):
        load.addresses(choose(), [NAME])


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_name_of_many_makes_a_file_name_of_its_own() -> None:
    """File systems take 255 bytes; a table of symbols lists every kernel of a bundle in its name."""
    names = [f"smolrun_symbol,{','.join(f'matmul_{i}' for i in range(n))}" for n in (3, 40, 41)]
    files = [load.image_path(Path(), choose(), name, ".aarch64-linux-android.o").name for name in names]
    assert len(set(files)) == 3 and max(map(len, files)) < 200


def test_two_processes_compile_once(tmp_path: Path) -> None:
    """The one that waits sees progress, then finds the image."""
    body = """
compile_images = load.compile_images
def counted(tier, names, done):
    print("compiling", flush=True)
    compile_images(tier, names, done)
load.compile_images = counted
get(lambda done, total, name: print("progress", done, total, name))
"""
    environment = os.environ | {"SMOLRUN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT + body]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("compiling") for text in said) == [0, 1], said
    waiter = min(said, key=lambda text: text.count("compiling"))
    assert "progress 0 1" in waiter or not waiter, said  # silent only if it came when all was done
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {f"{NAME}.img", LOCK}
    run("load.compile_images = poison\nget()", SMOLRUN_CACHE_DIR=str(tmp_path))


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """Held until its process ends; meanwhile a second one reports progress and compiles nothing."""
    folder = tmp_path / "kernels"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from smolrun.kernels.load import _locked\nf = open({str(folder / LOCK)!r}, 'ab')\n"
         "assert _locked(f)\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    body = """
def stop(*report):
    assert report == (0, 1, ""), report
    os.kill(int(os.environ["HOLDER"]), 9)
def compiled(tier, names, done):
    print(names)
    sys.exit()
load.compile_images = compiled
get(stop)
"""
    assert NAME in run(body, SMOLRUN_CACHE_DIR=str(tmp_path), HOLDER=str(holder.pid))
    holder.communicate()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_image_is_compiled_again(damage: str, sound: Path, tmp_path: Path) -> None:
    content = sound.read_bytes()
    file = tmp_path / "kernels" / sound.parent.name / sound.name
    file.parent.mkdir(parents=True)
    other = seal(b"\xcc" * 64, {"row_Q8_0": 0}, sound.parent.name)  # sound, but of another function
    spoilt = {
        "flip": content[:9] + bytes([content[9] ^ 1]) + content[10:],
        "cut": content[:-1],
        "empty": b"",
        "other": other,
    }
    file.write_bytes(spoilt[damage])
    noticed = (
        "load.compile_images = poison\ntry:\n    get()\nexcept AssertionError:\n    sys.exit()\nsys.exit('it was run')"
    )
    run(noticed, SMOLRUN_CACHE_DIR=str(tmp_path))
    run("get()", SMOLRUN_CACHE_DIR=str(tmp_path))
    mended = file.read_bytes()
    assert hashlib.sha256(mended[:-32]).digest() == mended[-32:] and mended == content


def test_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Neither cache nor temporary directory: the images live in memory alone."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    blocked = f"import tempfile\ntempfile.tempdir = {str(nowhere / 'tmp')!r}\n"
    run(blocked + "get()", SMOLRUN_CACHE_DIR=str(nowhere / "cache"))
    assert nowhere.read_text() == "" and list(tmp_path.iterdir()) == [nowhere]


def test_a_full_disk_leaves_no_fragments(tmp_path: Path) -> None:
    body = """
def full(_):
    raise OSError(28, "No space left on device")
os.fsync = full
get()
"""
    run(body, SMOLRUN_CACHE_DIR=str(tmp_path), TMPDIR=str(tmp_path))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {LOCK}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_temporary_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SMOLRUN_CACHE_DIR", str(tmp_path / "cache"))
    private = tmp_path / f"smolrun-{os.getuid()}"
    assert len(list(load.cache_folders())) == 2 and private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)  # anybody could put code there
    assert [f.parts[: len(tmp_path.parts) + 1][-1] for f in load.cache_folders()] == ["cache"]
    private.rmdir()
    private.symlink_to(tmp_path)
    assert len(list(load.cache_folders())) == 1


# ---- the CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux" or not choose().cpu.startswith("x86"), reason="x86-64 on Linux")
def test_linux_and_llvm_see_the_same_cpu() -> None:
    """A tier chosen from Linux's flags is one that LLVM would choose from CPUID."""
    llvm = pytest.importorskip("llvmlite.binding")
    needed = {name for tier in target.ALL_TIERS.values() if tier.x86 for name in tier.needs}
    assert target.host_features() == needed & {n for n, there in llvm.get_host_cpu_features().items() if there}


def test_another_cpu_gets_another_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing about the CPU is remembered between processes: a home that moved is safe."""
    flags = "fpu sse sse2 pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 cx16 f16c fma abm movbe popcnt lahf_lm xsave"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: sse\n")
    seen = target._cpuinfo_flags(str(tmp_path / "cpuinfo"))
    assert seen == frozenset(flags.split())
    assert target._cpuinfo_flags(str(tmp_path / "none")) == frozenset()
    target.host_features.cache_clear()
    monkeypatch.setattr(target, "_cpuinfo_flags", lambda: seen)
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    assert [t.name for t in target.runnable()] == ["avx2", "sse42", "generic"]
    target.host_features.cache_clear()


# AT_HWCAP and AT_HWCAP2 as these CPUs have them (those of qemu and of a Neoverse N2), and AT_PAGESZ
@pytest.mark.parametrize(
    ("cpu", "hwcap", "hwcap2", "tiers"),
    [
        ("cortex-a53", 0x8FB, 0, ["neon"]),
        ("cortex-a76", 0x119FFB, 0, ["dotprod", "neon"]),
        ("neoverse-n2", 0xEFFFFFFB, 0x3F3FF, ["i8mm", "dotprod", "neon"]),
        ("odd", 0x8FB, 1 << 13, ["neon"]),  # i8mm without what its tier needs besides
    ],
)
def test_arm_tiers_are_what_the_auxiliary_vector_says(
    cpu: str, hwcap: int, hwcap2: int, tiers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auxv = tmp_path / cpu
    auxv.write_bytes(struct.pack("@8L", 16, hwcap, 6, 4096, 26, hwcap2, 0, 0))
    seen = target._auxiliary_vector(str(auxv))
    assert target._auxiliary_vector(str(tmp_path / "none")) == {}
    target.host_features.cache_clear()
    monkeypatch.setattr(target, "_auxiliary_vector", lambda: seen)
    monkeypatch.setattr(target.platform, "machine", lambda: "aarch64")
    assert [t.name for t in target.runnable()] == tiers
    assert choose().name == tiers[0]
    monkeypatch.setenv("SMOLRUN_TIER", "smve")
    with pytest.raises(RuntimeError, match="does not exist"):
        choose()
    for name in {"i8mm", "dotprod"} - set(tiers):
        monkeypatch.setenv("SMOLRUN_TIER", name)
        with pytest.raises(RuntimeError, match=f"{name}.*lacks; this CPU runs: {', '.join(tiers)}"):
            choose()
    target.host_features.cache_clear()


def test_a_frozen_program_says_that_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyInstaller's programs: sys.executable is no Python, and the sources that name the cache are not there."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(load.BuildError, match=r"frozen program cannot compile.*smolrun compile"):
        load.addresses(choose(), [NAME])
