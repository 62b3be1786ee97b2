"""Compiled kernels for the run-time: from the cache, or from a compiling child, mapped without Numba or LLVM.

    names -> cached images (image.py checks them) -> missing ones: child process `build.py` -> cache -> addresses
    names -> shared object of the bundle that this code is part of (bundle.py), and nowhere else -> addresses

The cache has a folder for each module of kernels and tier, whose name is a hash of all that shaped the images: the
sources that the module imports, the versions of LLVM's and Numba's packages. Nothing is ever invalidated, only not
found. One process compiles at a time; the others see its images appear.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from . import bundle
from .image import Code, ImageError
from .target import Tier

Progress = Callable[[int, int, str], None]
_LOCK = threading.Lock()


def _renew_lock() -> None:
    """A child forked while another thread compiled would wait for that thread for ever."""
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from smolrun.kernels.build import main
main(sys.argv[2], sys.argv[3], map(str.strip, sys.stdin), sys.argv[4])
"""
COMPILERS = 2  # 200 MB each; the forward pass is half of the work, so a third would wait for it
POLL_SECONDS = 0.1  # between two looks at what another process compiles


class BuildError(RuntimeError):
    """The compiling child failed, or what it made cannot be executed here."""


MODULES = {  # first word of an entry point -> the module that makes it; every other one is made by pointwise
    "forward": "forward",
    "classify": "forward",
    "matmul": "matmul",
    "row": "matmul",
    "peak": "matmul",
    "op": "backward",
    "smolrun": "capi",
    "pairs": "bf16",
    "team": "team",
    "worker": "team",
}


def module_of(name: str) -> str:
    """The module of kernels that makes an entry point."""
    return MODULES.get(name.partition("_")[0], "pointwise")


@functools.cache
def _compilers() -> bytes:
    """The version files of LLVM's and Numba's packages, which are found, not imported."""
    specs = map(importlib.util.find_spec, ("llvmlite", "numba"))
    return b"".join((Path(s.origin).parent / "_version.py").read_bytes() for s in specs if s and s.origin)


@functools.cache
def _source(module: str) -> tuple[bytes, list[str]]:
    """A module of kernels and the names of those it imports."""
    text = (Path(__file__).parent / f"{module}.py").read_bytes()
    return text, [name.decode() for name in re.findall(rb"^from \.(\w+) import", text, re.MULTILINE)]


@functools.cache
def fingerprint(module: str) -> str:
    """Hash of the sources that shape a module's kernels, and of their compiler."""
    sources, waiting = dict[str, bytes](), [module, "build"]
    while waiting:
        if (name := waiting.pop()) not in sources:
            sources[name], imports = _source(name)
            waiting += imports
    parts = [_compilers(), *(name.encode() + source for name, source in sorted(sources.items()))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# ---- the cache -------------------------------------------------------------------------------------------------------


def user_cache() -> Path:
    """Where this system keeps a user's caches; SMOLRUN_CACHE_DIR overrides."""
    if chosen := os.environ.get("SMOLRUN_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "smolrun" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smolrun"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smolrun"


def _private_temporary() -> Path:
    """A folder in the temporary directory that only this user can write: it holds code that will run."""
    import tempfile

    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"smolrun-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise OSError(f"{folder} is not a directory")
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o077):
        raise OSError(f"{folder} belongs to or is open to others")
    return folder


def image_key(tier: Tier, name: str) -> str:
    """All that decides what an entry point compiles to."""
    return f"{fingerprint(module_of(name))}-{tier.name}"


def cache_folders() -> Iterator[Path]:
    """Folders of images to read from and, the first that can be written, to write to."""
    for base in (user_cache, _private_temporary):
        try:
            yield base() / "kernels"
        except (OSError, RuntimeError):  # no home, or a temporary folder that is not ours alone
            continue


def image_path(folder: Path, tier: Tier, name: str, suffix: str = ".img") -> Path:
    """Where one of the cache's folders keeps an image (or, under another suffix, what link.py takes)."""
    file = name if len(name) < 100 else hashlib.sha256(name.encode()).hexdigest()  # of a table of many names
    return folder / image_key(tier, name) / f"{file}{suffix}"


def keep(tier: Tier, name: str, content: bytes, suffix: str = ".img") -> Path | None:
    """The image's file in the first folder that can be written; None: it lives in memory alone."""
    import tempfile

    for folder in cache_folders():
        path = image_path(folder, tier, name, suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent)
        except OSError:
            continue  # read-only
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            return path
        except OSError:  # a full disk
            os.unlink(part)
    return None


@contextlib.contextmanager
def _alone(tier: Tier, waiting: Callable[[], bool]) -> Iterator[None]:
    """Holds the lock of a tier; where no lock can be had, two processes may compile the same.

    waiting: called while another process holds it; False: enough, go on without. A lock ends with its process.
    """
    with contextlib.ExitStack() as stack:
        for folder in cache_folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / f"{tier.name}.lock", "ab"))
                while not _locked(file) and waiting():
                    threading.Event().wait(POLL_SECONDS)
                break
            except OSError:  # read-only, or a file system without locks
                continue
        yield


def _locked(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False while another process does."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_images(tier: Tier, names: list[str], done: Callable[[str, bytes], None]) -> None:
    """Compile entry points for this machine: `compile_code` of images."""
    compile_code("image", tier, names, done)


def compile_code(kind: str, tier: Tier, names: list[str], done: Callable[[str, bytes], None], triple: str = "") -> None:
    """Compile entry points in child processes, COMPILERS at a time; a child that is done with one is given the next.

    Args:
        kind: "image", "object" or "assembly", see build.py.
        done: called with (name, code), by several threads.
        triple: what to compile for; "": this system.

    Raises:
        BuildError: a child could not be started or failed; its last words are in the message.
    """
    if not sys.executable:
        raise BuildError("kernels must be compiled and sys.executable names no Python to do it with")
    waiting, errors = list(names), list[Exception]()

    def serve() -> None:
        try:
            _compile(kind, tier, waiting, done, triple)
        except (BuildError, MemoryError) as error:
            waiting.clear()
            errors.append(error)

    helpers = [threading.Thread(target=serve) for _ in range(min(COMPILERS, os.cpu_count() or 1, len(names)) - 1)]
    for helper in helpers:
        helper.start()
    serve()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def _compile(kind: str, tier: Tier, waiting: list[str], done: Callable[[str, bytes], None], triple: str) -> None:
    """One child; takes names from the front of `waiting` until none is left."""
    import subprocess

    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    command = [sys.executable, "-c", _CHILD, json.dumps([p for p in sys.path if p]), kind, tier.name, triple]
    with _scratch() as errors:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        except OSError as error:
            raise BuildError(f"kernels must be compiled and {sys.executable} did not start: {error}") from error
        name = ""
        with child:
            assert child.stdin is not None and child.stdout is not None
            while True:
                try:
                    name = waiting.pop(0)  # one step: the other child's thread may take the last one
                except IndexError:
                    break
                with contextlib.suppress(BrokenPipeError):  # it died: its answer, an empty line, says so too
                    child.stdin.write(name.encode() + b"\n")
                    child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    break
                code = child.stdout.read(json.loads(line)["bytes"])
                done(name, code)
                name = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        if name or child.returncode:
            errors.seek(0)
            tail = errors.read().decode(errors="replace").strip().splitlines()[-3:]
            raise BuildError(f"compiling {name} for {tier.name} failed ({child.returncode}): {' | '.join(tail)}")


def _scratch() -> IO[bytes]:
    """A file for the child's last words; where nothing can be written they are lost, the images are not."""
    import tempfile

    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "r+b")


# ---- addresses -------------------------------------------------------------------------------------------------------


class _Loaded:
    """Images of one tier in this process."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.addresses: dict[str, int] = {}
        self._code: list[Code] = []

    def add(self, name: str, source: Path | bytes) -> None:
        code = Code(source, image_key(self.tier, name))
        self._code.append(code)
        self.addresses.update(code.addresses)

    def find(self, names: Iterable[str]) -> list[str]:
        """Take what the cache holds; the names that it does not. A damaged file is as good as none."""
        missing = [n for n in names if n not in self.addresses]
        for folder in cache_folders() if missing else ():
            used = set()
            for name in missing:
                with contextlib.suppress(OSError, ImageError):
                    self.add(name, path := image_path(folder, self.tier, name))
                    used.add(path.parent)
            for parent in used:
                with contextlib.suppress(OSError):
                    os.utime(parent)  # the last use
            if not (missing := [n for n in missing if n not in self.addresses]):
                break
        return missing

    def compile(self, names: list[str], progress: Progress | None) -> None:
        """Have the names compiled, here or by the process that is at it."""
        mutex, total = threading.Lock(), len(names)

        def report(name: str, left: int) -> None:
            if progress:
                progress(total - left, total, name)

        def waiting() -> bool:
            missing = self.find(names)
            report("", len(missing))
            return bool(missing)

        def done(name: str, content: bytes) -> None:
            path = keep(self.tier, name, content)
            with mutex:
                self.add(name, path or content)
                report(name, sum(n not in self.addresses for n in names))

        with _alone(self.tier, waiting):
            if missing := self.find(names):
                compile_images(self.tier, missing, done)


@functools.cache
def _loaded(tier: Tier) -> _Loaded:
    return _Loaded(tier)


def addresses(tier: Tier, names: Iterable[str], progress: Progress | None = None) -> dict[str, int]:
    """Addresses of entry points of a tier, compiled now if need be.

    Args:
        tier: must be one that this CPU runs.
        names: entry points, see build.NAMES.
        progress: called with (done, to compile, name) for each one that is compiled, and again and again with the name
            "" while another process compiles.

    Raises:
        BuildError: compilation failed, or the system executes neither files nor memory of ours; a bundle that lacks
        one, or is damaged.
    """
    wanted = list(dict.fromkeys(names))
    if place := bundle.folder():
        try:
            return bundle.addresses(place, tier.name, wanted)
        except bundle.BundleError as error:
            raise BuildError(str(error)) from None
    if getattr(sys, "frozen", False):
        raise BuildError(
            "a frozen program cannot compile kernels: its sys.executable is no Python but itself. "
            "Freeze a bundle made by `smolrun compile`, which has its kernels (packaging/pyinstaller.spec)"
        )
    with _LOCK:
        loaded = _loaded(tier)
        try:
            if missing := loaded.find(wanted):
                loaded.compile(missing, progress)
        except MemoryError as error:
            raise BuildError(str(error)) from error
        return {n: loaded.addresses[n] for n in wanted}


def c_function(address: int, arguments: int, result: Any = None) -> Callable[..., Any]:
    """A Python callable of int64 arguments; the GIL is released while it runs."""
    return ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * arguments)(address)
