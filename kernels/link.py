"""Shared objects for devices without a compiler: the objects of build.py, for any target, joined by LLVM's linker.

    build.py (a child per tier)  ->  objects  ->  lld  ->  libsmolrun-TIER.so | .dll | .dylib

The objects are those of the images, from the same functions: kernels call nothing and hold no addresses, so nothing is
left undefined. The C interface alone (capi.py, Linux and Android) asks for a library, the system's libc, by a name that
glibc and musl both answer to; Android's is another. lld is taken from PATH, or from
the PyPI package `ziglang`, which carries it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .image import HASH
from .load import BuildError, Progress, cache_folders, compile_code, image_path, keep
from .program import API, LIBC
from .target import TIERS, Tier


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        name: what people call it, and `smolrun compile --target` reads.
        machine: `platform.machine()` there, one of Tier.machines.
        triple: what LLVM compiles for. Calling conventions differ on Windows, registers kept by the system on Apple's.
        linker: flavour of lld.
        suffix: of a shared object.
        flags: the linker's.
        libc: name of the system's C library; "": no C interface there.
    """

    name: str
    machine: str
    triple: str
    linker: str
    suffix: str
    flags: tuple[str, ...]
    libc: str = ""

    @property
    def tiers(self) -> list[Tier]:
        """The tiers of its architecture, best first."""
        return [tier for tier in TIERS.values() if self.machine in tier.machines]


# Pages of a device may be as large as 64 KB (16 KB on a Pi 5, on Apple's and on Android 15): segments begin on such.
_ELF = (
    *("-shared", "-Bsymbolic", "--strip-all", "--build-id=none", "--hash-style=both"),
    *("-z", "defs", "-z", "noexecstack", "-z", "max-page-size=65536"),
)
# windows-gnu: MSVC's environment would ask its run-time for `_fltused`
_DLL = ("/dll", "/noentry", "/nodefaultlib", "/machine:x64", "/Brepro")
_DYLIB = ("-dylib", "-arch", "arm64", "-platform_version", "macos", "11.0", "11.0")

TARGETS = {
    target.name: target
    for target in (
        Target("aarch64-linux-android", "aarch64", "aarch64-unknown-linux", "ld.lld", ".so", _ELF, "libc.so"),
        Target("aarch64-linux-gnu", "aarch64", "aarch64-unknown-linux", "ld.lld", ".so", _ELF, "libc.so.6"),
        Target("x86_64-linux-gnu", "x86_64", "x86_64-unknown-linux", "ld.lld", ".so", _ELF, "libc.so.6"),
        Target("x86_64-windows", "AMD64", "x86_64-w64-windows-gnu", "lld-link", ".dll", _DLL),
        Target("arm64-apple-darwin", "arm64", "arm64-apple-macosx11.0.0", "ld64.lld", ".dylib", _DYLIB),
    )
}


def compile_objects(
    tier: Tier, names: Iterable[str], target: Target, progress: Progress | None = None
) -> dict[str, bytes]:
    """Relocatable objects of entry points (see build.NAMES): ELF, COFF or Mach-O as the target has it.

    They are kept beside the images of the same sources, each with its SHA-256.

    Args:
        progress: called with (done, in all, name).

    Raises:
        BuildError: the compiling child failed.
    """
    wanted, objects, suffix = list(dict.fromkeys(names)), dict[str, bytes](), f".{target.triple}.o"
    for folder in cache_folders():
        for name in wanted:
            with contextlib.suppress(OSError):
                content = image_path(folder, tier, name, suffix).read_bytes()
                if hashlib.sha256(content[:-HASH]).digest() == content[-HASH:]:
                    objects[name] = content[:-HASH]

    def done(name: str, content: bytes) -> None:
        objects[name] = content
        keep(tier, name, content + hashlib.sha256(content).digest(), suffix)
        if progress:
            progress(len(objects), len(wanted), name)

    if missing := [name for name in wanted if name not in objects]:
        compile_code("object", tier, missing, done, target.triple)
    return objects


C_IS_FOR = "it is for Linux and Android, and x86-64's is made on x86-64"


def has_c(target: Target) -> bool:
    """Whether the C interface can be compiled here for a target: that of x86-64 only there, since LLVM's Python package
    reads assembly (CPUID) of its own machine alone.
    """
    return bool(target.libc) and (target.machine != "x86_64" or platform.machine() == "x86_64")


def c_interface(tier: Tier, names: Iterable[str], target: Target) -> dict[str, bytes]:
    """Objects of smolrun.h's functions, for a library that also holds the objects of `names`; `link` exports API.

    They are compiled for the plainest tier: they say so when the CPU lacks the other's instructions.

    Raises:
        BuildError: the target has none, see has_c; the compiling child failed.
    """
    if not has_c(target):
        raise BuildError(f"no C interface for {target.name}: {C_IS_FOR}")
    symbols = compile_objects(tier, [f"smolrun_symbol,{','.join(names)}"], target)
    functions = compile_objects(target.tiers[-1], [*API, "smolrun_worker"], target)
    return functions | dict(zip(["smolrun_symbol"], symbols.values(), strict=True))


def link(objects: Mapping[str, bytes], exports: Iterable[str], target: Target, out: Path) -> None:
    """Join objects into the shared object `out`, whose name becomes its own; the same objects give the same bytes.

    Args:
        objects: any name -> relocatable object.
        exports: C symbols that the shared object offers (on macOS all that are global).

    Raises:
        BuildError: no linker, or it refused: a symbol that no object defines is an error.
    """
    command, exports = _linker(target), list(exports)
    with tempfile.TemporaryDirectory() as folder:
        inputs, made = [], os.path.join(folder, out.name)  # lld-link leaves more than its product behind
        for name, content in sorted(objects.items()):
            inputs.append(os.path.join(folder, f"{name}.o"))
            Path(inputs[-1]).write_bytes(content)
        if target.suffix == ".dll":
            command += [f"/out:{made}", *(f"/export:{name}" for name in exports), *inputs]
        elif target.suffix == ".dylib":
            command += ["-o", made, "-install_name", f"@rpath/{out.name}", *inputs]
        else:
            script = os.path.join(folder, "exports")
            Path(script).write_text("{ global: " + " ".join(f"{name};" for name in exports) + " local: *; };")
            command += ["-o", made, "-soname", out.name, f"--version-script={script}", *inputs]
            if "smolrun_open" in objects:
                command.append(_stub(target, inputs[0], folder))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not os.path.exists(made):
            said = (done.stderr or done.stdout).strip()
            raise BuildError(f"{' '.join(command[:3])} ... could not link {out.name}: {said[:1000]}")
        shutil.copyfile(made, out)


def _stub(target: Target, input: str, folder: str) -> str:
    """A shared object that stands for the system's C library: of its name, with LIBC's functions and no others.

    input: an object that asks for nothing, since a linker wants one.
    """
    stub = os.path.join(folder, "libc.stub")
    command = [*_linker(target), "-soname", target.libc, "-o", stub, input]
    subprocess.run([*command, *(f"--defsym={name}=0" for name in LIBC)], check=True)
    return stub


def _linker(target: Target) -> list[str]:
    """The command that runs lld for a target, with its flags."""
    if found := shutil.which(target.linker):
        return [found, *target.flags]
    if found := shutil.which("lld"):
        return [found, "-flavor", target.linker, *target.flags]
    if importlib.util.find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang"]
        if target.suffix == ".dylib":  # Zig links Mach-O by itself, and signs it
            return [*zig, "cc", "-target", "aarch64-macos.11.0", "-shared", "-nostdlib"]
        return [*zig, target.linker, *target.flags]
    raise BuildError(
        f"no {target.linker} on PATH: install lld (apt install lld, brew install lld), or `pip install ziglang`, "
        "which carries it"
    )
