"""One kernel cache for all tests, pytest's own (`--cache-clear` empties it), and the tiers they cover."""

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from calling import compile_all
from smolrun.kernels.target import TIERS, runnable


def compiled_only() -> list[str]:
    """Tiers of this machine type that this CPU cannot run: their code is compiled and read."""
    here = [t.name for t in runnable()]
    return [t.name for t in TIERS.values() if platform.machine() in t.machines and t.name not in here]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--bits FILE: hashes of what kernels compute, written where there is no such file, else compared with."""
    parser.addoption("--bits", type=Path, metavar="FILE", help="hashes of kernels' results from another machine")


EXPECTED: dict[str, str] = {}
FOUND: dict[str, str] = {}
COUNT: Counter[str] = Counter()


def as_elsewhere(result: np.ndarray) -> None:
    """Fails unless the machine that wrote the file of --bits found the same in this test."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    COUNT[test] += 1
    name = f"{test} {COUNT[test]}"
    FOUND[name] = hashlib.sha256(np.ascontiguousarray(result)).hexdigest()[:16]
    assert not EXPECTED or FOUND[name] == EXPECTED[name], "these are not the bits of the other machine"


def trap(config: pytest.Config) -> Path:
    """What a child of the tests takes for the user's own cache if it has lost sight of SMOLRUN_CACHE_DIR."""
    return Path(config.cache.mkdir("user")) / "smolrun"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a test wrote to the user's cache; write the file of --bits, when all is found."""
    if trap(session.config).exists():
        written = [str(path) for path in trap(session.config).rglob("*") if path.is_file()]
        session.config.get_terminal_writer().line(f"\na test wrote to the user's own cache: {written}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    path = session.config.getoption("bits")
    if path and not EXPECTED and not session.testsfailed:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(FOUND, indent=1))
        part.replace(path)


def pytest_configure(config: pytest.Config) -> None:
    """The user's own cache is neither used nor filled, wherever it is; children of the tests inherit that."""
    os.environ["SMOLRUN_CACHE_DIR"] = os.environ.get("SMOLRUN_TEST_CACHE") or str(config.cache.mkdir("kernels"))
    os.environ["SMOLRUN_CACHE_SIZE"] = "500M"
    shutil.rmtree(trap(config), ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(trap(config).parent)
    path = config.getoption("bits")
    if path and path.exists():
        EXPECTED.update(json.loads(path.read_text()))


def pytest_report_header() -> str:
    """Both counts, so that nobody takes a compiled tier for a tested one."""
    run, compiled = [t.name for t in runnable()], compiled_only()
    return f"tiers run: {len(run)} ({', '.join(run)}); compiled only: {len(compiled)} ({', '.join(compiled) or 'none'})"


@pytest.fixture(scope="session")
def compiled() -> None:
    """All kernels of all tiers of this CPU are in the cache: compiled together, once."""
    compile_all()
