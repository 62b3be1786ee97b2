"""One direction of imports: a file imports only what stands lower. Read from the source, nothing is run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. Parts of one rank do not know each other; files of one part (a folder) may.
RANKS = [
    ["smolrun.errors", "smolrun.kernels"],
    ["smolrun.config"],
    ["smolrun.files", "smolrun.text"],
    ["smolrun.model"],
    ["smolrun.generate"],
    ["smolrun.answer", "smolrun.session"],
    ["smolrun.api"],
    ["smolrun"],  # the door alone: smolrun/__init__.py
    ["smolrun.export", "smolrun.peer"],
    ["smolrun.verify"],
    ["smolrun.bench", "smolrun.compile", "smolrun.doctor", "smolrun.quantize", "smolrun.train"],
    ["smolrun.measure"],
    ["smolrun.cli"],
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}

# What `kernels` may import at all
KERNELS_MAY = {"numpy", "numba", "llvmlite", *sys.stdlib_module_names}

# Below api.py nothing prints, reads a clock or the environment, but these
MAY = {
    "smolrun.kernels.build": {"time", "environ"},  # a child process of its own: tells how long each kernel took
    "smolrun.kernels.jit": {"environ"},  # the tier, from the parent process
    "smolrun.kernels.load": {"environ"},  # where the cache is
    "smolrun.kernels.target": {"environ"},  # SMOLRUN_TIER
    "smolrun.model.packed": {"environ"},  # how large the cache may be
    "smolrun.text.sandbox": {"time"},  # a hostile template's time is bounded
}


def module_name(path):
    """smolrun.kernels.jit for kernels/jit.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("smolrun", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module):
    """The entry of RANKS that a module belongs to: the longest that fits."""
    fitting = [part for part in RANK if module == part or (part != "smolrun" and module.startswith(part + "."))]
    return max(fitting, key=len, default=None)


SOURCES = sorted([*ROOT.glob("smolrun/**/*.py"), *ROOT.glob("kernels/**/*.py")])
MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def for_types(tree):
    """Nodes under `if TYPE_CHECKING`: they import nothing when the program runs."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for branch in node.body
        for inner in ast.walk(branch)
    }


def imports(module, tree):
    """(line, name) of every module that is imported, inside functions too."""
    skipped = for_types(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module
            if node.level:  # from .block import B; only kernels/ does, whose files may be read under another name
                assert (node.level, part_of(module)) == (1, "smolrun.kernels"), (
                    f"{module}:{node.lineno}: relative import"
                )
                source = ".".join(["smolrun.kernels", *filter(None, [node.module])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in MODULES or full in RANK else source


def upward(module, tree):
    own = part_of(module)
    for line, name in imports(module, tree):
        if name.split(".")[0] == "smolrun":
            part = part_of(name)
            same = part == own
            if not same and not (part in RANK and RANK[part] < RANK[own]):
                yield f"{module}:{line} imports {name}"


def test_every_file_has_its_place():
    assert [module for module in MODULES if part_of(module) is None] == []
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES)
def test_no_upward_import(module):
    assert list(upward(module, MODULES[module])) == []


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) == "smolrun.kernels"])
def test_kernels_stand_alone(module):
    found = {name for _, name in imports(module, MODULES[module]) if part_of(name) != "smolrun.kernels"}
    assert {name for name in found if name.split(".")[0] not in KERNELS_MAY} == set()


def habits(tree):
    """Which of print, time and environ a module uses."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                yield "print", node.lineno
            case ast.Import(names=names) if any(alias.name in ("time", "datetime", "logging") for alias in names):
                yield "time" if names[0].name != "logging" else "print", node.lineno
            case ast.ImportFrom(module="time" | "datetime" | "logging"):
                yield "time" if node.module != "logging" else "print", node.lineno
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv"):
                yield "environ", node.lineno
            case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"):
                yield "print", node.lineno


@pytest.mark.parametrize("module", [module for module in MODULES if RANK[part_of(module)] < RANK["smolrun.answer"]])
def test_below_the_api_no_print_no_clock_no_environment(module):
    allowed = set().union(*(may for name, may in MAY.items() if module == name or module.startswith(name + ".")))
    assert [(what, line) for what, line in habits(MODULES[module]) if what not in allowed] == []


@pytest.mark.parametrize(
    "module", [module for module in MODULES if part_of(module) in ("smolrun.answer", "smolrun.api", "smolrun")]
)
def test_the_api_prints_nothing(module):
    assert [(what, line) for what, line in habits(MODULES[module]) if what != "time"] == []


def test_this_test_can_fail():
    def found(module, source):
        return list(upward(module, ast.parse(source)))

    assert found("smolrun.text.stops", "from smolrun.api import LLM")
    assert found("smolrun.kernels.jit", "def f():\n    import smolrun.errors")
    assert found("smolrun.generate.engine", "from smolrun import api")
    assert found("smolrun.model.llama", "import smolrun")
    assert not found("smolrun.text.stops", "if TYPE_CHECKING:\n    from smolrun.api import LLM")
    assert not found("smolrun.cli.chat", "import smolrun\nfrom smolrun.files import sources")
    source = "import os, time\nprint(os.environ)\nfrom time import sleep"
    assert sorted(what for what, _ in habits(ast.parse(source))) == ["environ", "print", "time", "time"]
