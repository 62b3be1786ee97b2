"""Compiled kernels for the run-time: from the cache, or from a compiling child, linked into this process without Numba.

    names -> cached objects (checked) -> missing ones: child process `build.py` -> cache -> linked by LLVM -> addresses

A cached object is `sha256 of the rest (32 B) | relocatable object`, in a folder whose name is a hash of all that shaped
it: the sources of this package, the versions of LLVM's and Numba's packages, the tier. Nothing is ever invalidated,
only not found.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

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
main(sys.argv[2], map(str.strip, sys.stdin))
"""
COMPILERS = 2  # 200 MB each; the forward pass is half of the work, so a third would wait for it


class BuildError(RuntimeError):
    """The compiling child failed."""


@functools.cache
def fingerprint() -> str:
    """Hash of the kernels' sources and of their compiler."""
    import importlib.util

    import llvmlite

    digest = hashlib.sha256(llvmlite.__version__.encode())
    spec = importlib.util.find_spec("numba")  # found, not imported; its version file stands for it
    if spec is not None and spec.origin is not None:
        digest.update((Path(spec.origin).parent / "_version.py").read_bytes())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _user_cache() -> Path:
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
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"smolrun-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise OSError(f"{folder} is not a directory")
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o077):
        raise OSError(f"{folder} belongs to or is open to others")
    return folder


def cache_folders(tier: Tier) -> list[Path]:
    """Folders to read objects from and, the first that can be written, to write them to."""
    name = f"{fingerprint()}-{tier.name}"
    folders = []
    for base in (_user_cache, _private_temporary):
        try:
            folders.append(base() / "kernels" / name)
        except (OSError, RuntimeError):  # no home, or a temporary folder that is not ours alone
            continue
    return folders


def _read(folders: list[Path], name: str) -> bytes | None:
    for folder in folders:
        try:
            content = (folder / f"{name}.o").read_bytes()
        except OSError:
            continue
        if len(content) > 32 and hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    return None


def _write(folders: list[Path], name: str, code: bytes) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=folder)
        except OSError:
            continue  # read-only: the next folder, or none; the object is in memory anyway
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, folder / f"{name}.o")
            return
        except OSError:  # a full disk
            os.unlink(part)


def compile_objects(tier: Tier, names: list[str], progress: Progress | None = None) -> dict[str, bytes]:
    """Compile entry points in child processes, COMPILERS at a time; a child that is done with one is given the next.

    Raises:
        BuildError: a child could not be started or failed; its last words are in the message.
    """
    if not sys.executable:
        raise BuildError("kernels must be compiled and sys.executable names no Python to do it with")
    waiting, objects, errors = list(names), dict[str, bytes](), list[BuildError]()

    def done(name: str, code: bytes) -> None:
        objects[name] = code
        if progress:
            progress(len(objects), len(names), name)

    def serve() -> None:
        try:
            _compile(tier, waiting, done)
        except BuildError as error:
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
    return objects


def _compile(tier: Tier, waiting: list[str], done: Callable[[str, bytes], None]) -> None:
    """One child; takes names from the front of `waiting` until none is left."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    command = [sys.executable, "-c", _CHILD, json.dumps([p for p in sys.path if p]), tier.name]
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
    """A file for the child's last words; where nothing can be written they are lost, the objects are not."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "r+b")


class _Linked:
    """Objects of one tier in this process."""

    def __init__(self) -> None:
        self.engines: list[Any] = []
        self.addresses: dict[str, int] = {}

    def add(self, objects: dict[str, bytes]) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for code in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self.engines.append(engine)  # it owns the code
        self.addresses.update({name: engine.get_function_address(name) for name in objects})


@functools.cache
def _linked(tier: str) -> _Linked:
    return _Linked()


def addresses(tier: Tier, names: Iterable[str], progress: Progress | None = None) -> dict[str, int]:
    """Addresses of entry points of a tier, compiled now if need be.

    Args:
        tier: must be one that this CPU runs.
        names: entry points, see build.NAMES.
        progress: called with (done, to compile, name) for each one that is compiled.

    Raises:
        BuildError: compilation failed.
    """
    wanted = list(dict.fromkeys(names))
    with _LOCK:
        linked = _linked(tier.name)
        absent = [n for n in wanted if n not in linked.addresses]
        if absent:
            folders = cache_folders(tier)
            objects = {n: code for n in absent if (code := _read(folders, n)) is not None}
            missing = [n for n in absent if n not in objects]
            if missing:
                made = compile_objects(tier, missing, progress)
                for name, code in made.items():
                    _write(folders, name, code)
                objects.update(made)
            linked.add(objects)
        return {n: linked.addresses[n] for n in wanted}


def c_function(address: int, arguments: int, result: Any = None) -> Callable[..., Any]:
    """A Python callable of int64 arguments; the GIL is released while it runs."""
    return ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * arguments)(address)
