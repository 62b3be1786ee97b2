"""One kernel cache for all tests, pytest's own (`--cache-clear` empties it), and the tiers they cover."""

import os
import platform

import pytest

from calling import compile_all
from smolrun.kernels.target import TIERS, runnable


def compiled_only() -> list[str]:
    """Tiers of this machine type that this CPU cannot run: their code is compiled and read."""
    here = [t.name for t in runnable()]
    return [t.name for t in TIERS.values() if platform.machine() in t.machines and t.name not in here]


def pytest_configure(config: pytest.Config) -> None:
    """The user's own cache is neither used nor filled; children of the tests inherit it."""
    os.environ.setdefault("SMOLRUN_CACHE_DIR", str(config.cache.mkdir("kernels")))
    os.environ.setdefault("SMOLRUN_CACHE_SIZE", "500M")


def pytest_report_header() -> str:
    """Both counts, so that nobody takes a compiled tier for a tested one."""
    run, compiled = [t.name for t in runnable()], compiled_only()
    return f"tiers run: {len(run)} ({', '.join(run)}); compiled only: {len(compiled)} ({', '.join(compiled) or 'none'})"


@pytest.fixture(scope="session")
def compiled() -> None:
    """All kernels of all tiers of this CPU are in the cache: compiled together, once."""
    compile_all()
