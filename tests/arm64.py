"""AArch64 on another machine: Python environments in a Debian root, run by qemu-user. `make test-arm64` calls main().

    cache/arm64-root-V/                  Debian bookworm of arm64, unpacked: python3 and what it links
    cache/arm64-env-HASH/bin/python      a script that starts qemu; subprocesses find it as sys.executable
    cache/arm64-env-HASH/lib/...         wheels for aarch64, chosen by pip

Both are made once, beside, and renamed when they are whole. QEMU_CPU in the environment chooses the CPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from smolrun.kernels.load import user_cache

SUITE, PYTHON = "bookworm", "3.11"
QEMU = "qemu-aarch64-static"
TOOLS = {QEMU: "qemu-user-static", "debootstrap": "debootstrap", "dpkg-deb": "dpkg"}  # command -> Debian's package
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


if __name__ == "__main__":
    print(environment(*sys.argv[1:]))
