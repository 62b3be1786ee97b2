"""A model for a device that has Python and NumPy and nothing else: a folder that runs from wherever it lies.

    model ---- plan, pack ----------------------------> model.pack                 (files/packed.py)
    kernels -- a child per tier -- objects -- lld ----> libsmolrun-TIER.so         (kernels/link.py)
    and for C ----------------------------------------> program.bin, smolrun.h     (model/program.py)
    smolrun -- the files that its verbs import -------> smolrun/, vendor/
    all of it with sizes and SHA-256 -----------------> bundle.json                (kernels/bundle.py draws the folder)

The run-time there is this package: the same files, of which those that import a compiler, a tokenizer library or the
Hub's client stay behind. What differs lies in the files: a packed model brings its tokenizer's tables, a bundle its
kernels.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolrun.errors import KernelError, OptionError, SmolrunError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.kernels import bundle, link
from smolrun.kernels.load import BuildError
from smolrun.kernels.program import API, PROGRAM
from smolrun.kernels.target import TIERS, Tier
from smolrun.model.llama import PRECISION, TEAM_KERNELS, kernel_names
from smolrun.model.packed import write_model
from smolrun.model.program import program
from smolrun.model.weights import Matrix, panels, plan
from smolrun.text.tokenizer import Tokenizer, tables

VERBS = ("chat", "generate", "batch", "info", "bench", "doctor")  # those that exist and that need no library
VENDORED = ("jinja2", "markupsafe", "click")
KV = ("f16", "q8_0")
PROBES = tuple(f"read_{n}" for n in (1, 2, 4, 8))  # `bench` measures the device with them
LEAST_PYTHON = (3, 10)

# What `--cpu` names: the best tier that it runs
CPUS = {
    **dict.fromkeys(("x86-64-v3", "haswell", "skylake", "znver1", "znver2", "znver3"), "avx2"),
    **dict.fromkeys(("alderlake", "raptorlake", "sierraforest", "lunarlake"), "avxvnni"),
    **dict.fromkeys(("x86-64-v4", "skylake-avx512"), "avx512"),
    **dict.fromkeys(("cascadelake", "icelake-client", "icelake-server", "sapphirerapids"), "avx512vnni"),
    **dict.fromkeys(("znver4",), "avx512vnni"),
    **dict.fromkeys(("znver5",), "avx512zen5"),
    **dict.fromkeys(("x86-64-v2", "nehalem", "westmere", "sandybridge", "ivybridge", "bdver2"), "sse42"),
    **dict.fromkeys(("silvermont", "goldmont", "tremont"), "sse42"),
    **dict.fromkeys(("x86-64",), "generic"),
    **dict.fromkeys(("cortex-a53", "cortex-a57", "cortex-a72", "cortex-a73"), "neon"),
    **dict.fromkeys(("cortex-a55", "cortex-a75", "cortex-a76", "cortex-a77", "cortex-a78", "cortex-x1"), "dotprod"),
    **dict.fromkeys(("neoverse-n1", "apple-a13", "apple-m1"), "dotprod"),
    **dict.fromkeys(("cortex-a510", "cortex-a710", "cortex-a715", "cortex-a720", "cortex-x2", "cortex-x3"), "i8mm"),
    **dict.fromkeys(("neoverse-v1", "neoverse-n2", "neoverse-v2", "apple-m2", "apple-m3", "apple-m4"), "i8mm"),
}

# Nothing of the checkpoint may be in it: a model's name is its author's text, and this is code
MAIN = '''\
"""A bundle of smolrun: `python FOLDER chat` runs the model in this folder. bundle.json says which one it is."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.version_info < {least}:
    sys.exit(f"{{HERE.name}} needs Python {least[0]}.{least[1]} or later, this is {{sys.version.split()[0]}}")
if importlib.util.find_spec("numpy") is None:
    sys.exit(f"{{HERE.name}} needs NumPy: {{sys.executable}} -m pip install numpy, or the system's package of it")
sys.path[:0] = [str(HERE), str(HERE / "vendor")]

from smolrun.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
'''

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Bundle:
    """What was made: the folder, its tiers, bytes in all, and whether C can call it, too (link.has_c)."""

    path: Path
    tiers: list[str]
    bytes: int
    c: bool


def choose_tiers(target: link.Target, cpus: Sequence[str] = (), features: Sequence[str] = ()) -> list[Tier]:
    """The tiers to compile, best first: all of the target's, or the best for each CPU with these features besides.

    Args:
        cpus: names in CPUS, or of tiers.
        features: LLVM's names, of what every one of the CPUs has more (`i8mm`).

    Raises:
        OptionError: a CPU or a feature that is not known, or not of this target.
    """
    if unknown := [f for f in features if f not in {need for tier in target.tiers for need in tier.needs}]:
        known = sorted({need for tier in target.tiers for need in tier.needs})
        raise OptionError(f"features {', '.join(unknown)}: expected some of {', '.join(known)}")
    chosen = set()
    for cpu in cpus or ([target.tiers[-1].name] if features else []):
        tier = TIERS.get(CPUS.get(cpu.lower(), cpu.lower()))
        if tier not in target.tiers:
            known = [name for name, its in CPUS.items() if TIERS.get(its) in target.tiers]
            known += [tier.name for tier in target.tiers]
            raise OptionError(f"cpu {cpu!r}: of {target.name} are known {', '.join(known)}")
        chosen.add(next(t for t in target.tiers if set(t.needs) <= {*tier.needs, *features}))
    return [tier for tier in target.tiers if tier in chosen or (not cpus and not features)]


def compile_model(
    source: Path,
    out: Path,
    *,
    target: str,
    cpus: Sequence[str] = (),
    features: Sequence[str] = (),
    quantize: str | None = None,
    kv: Sequence[str] = KV,
    progress: Progress | None = None,
) -> Bundle:
    """Make a bundle: beside `out` first, then renamed. A bundle that is there already is replaced, nothing else is.

    Args:
        source: a checkpoint on this disk.
        target: a key of link.TARGETS.
        cpus, features: see `choose_tiers`.
        quantize: as smolrun.load.
        kv: the kinds of KV cache that it can be run with.
        progress: called with (what is done, done, in all).

    Raises:
        OptionError: an unknown target, CPU or kind; `out` is something else than a bundle.
        KernelError: a kernel did not compile, or no linker is there.
        ModelFileError, UnsupportedModel: see open_checkpoint.
    """
    if target not in link.TARGETS:
        raise OptionError(f"target {target!r}: expected one of {', '.join(link.TARGETS)}")
    out = out.absolute()
    if (out.exists() or out.is_symlink()) and not (out / bundle.MANIFEST).is_file():
        raise OptionError(f"{out} is there and is no bundle (it has no {bundle.MANIFEST}): choose another folder")
    tiers = choose_tiers(link.TARGETS[target], cpus, features)
    part = out.with_name(f".{out.name}.{os.urandom(6).hex()}.part")
    try:
        part.mkdir(parents=True)
        with open_checkpoint(source) as checkpoint:
            matrices = plan(checkpoint, quantize)
            model = checkpoint.config.name or checkpoint.path.stem
            names = {name for p in PRECISION for kind in kv for name in kernel_names(matrices, p, kind)}
            names |= {*TEAM_KERNELS, *PROBES}
            _write_kernels(part, link.TARGETS[target], tiers, sorted(names), progress)
            _report(progress, "packing", 0, 1)
            formats = {name: m.format for name, m in matrices.items()}
            words, arena = tables(checkpoint.tokenizer), panels(checkpoint, matrices, quantize)
            where = write_model(part / bundle.MODEL, checkpoint, arena, words, formats)
            if link.has_c(link.TARGETS[target]):
                _write_for_c(part, checkpoint, matrices, where, kv)
        version = importlib.metadata.version("smolrun")
        _write_runtime(part)
        (part / "__main__.py").write_text(MAIN.format(least=LEAST_PYTHON), encoding="utf-8")
        manifest = {
            "smolrun_bundle": bundle.VERSION,
            "smolrun": version,
            "target": target,
            "tiers": {tier.name: _library_name(link.TARGETS[target], tier) for tier in tiers},
            "model": model,
            "kv": list(kv),
            "files": {path.relative_to(part).as_posix(): _sized(path) for path in _files(part)},
        }
        (part / bundle.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in _files(part):
            _sync(path)
        _replace(part, out)
    except BuildError as error:
        raise KernelError(str(error)) from error
    except OSError as error:
        raise SmolrunError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(path.stat().st_size for path in _files(out))
    return Bundle(out, [tier.name for tier in tiers], size, link.has_c(link.TARGETS[target]))


def _library_name(target: link.Target, tier: Tier) -> str:
    return f"libsmolrun-{tier.name}{target.suffix}"


def _write_kernels(
    part: Path, target: link.Target, tiers: Sequence[Tier], names: Sequence[str], progress: Progress | None
) -> None:
    for i, tier in enumerate(tiers):

        def compiled(done: int, total: int, name: str, first: int = i * len(names)) -> None:
            _report(progress, "compiling", first + done, len(names) * len(tiers))

        objects = link.compile_objects(tier, names, target, compiled)
        exports = list(names)
        if link.has_c(target):
            objects |= link.c_interface(tier, names, target)
            exports += API
        link.link(objects, exports, target, part / _library_name(target, tier))


def _write_for_c(
    part: Path, checkpoint: Checkpoint, matrices: Mapping[str, Matrix], where: Mapping[str, int], kv: Sequence[str]
) -> None:
    """What C callers need besides: the program, the header and an example."""
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
    content = program(
        checkpoint.config,
        matrices,
        where,
        weights=part / bundle.MODEL,
        kv=kv,
        precision="fast",
        tokens=[tokenizer.token_bytes(i) for i in range(checkpoint.config.vocab_size)],
        ends=tokenizer.eos_ids,
    )
    (part / PROGRAM).write_bytes(content)
    for path in (Path(__file__).parent / "capi").iterdir():
        _copy(path, part / path.name)


def _write_runtime(part: Path) -> None:
    """The sources that the verbs import, and the libraries in pure Python that those import."""
    own = ["smolrun.cli", "smolrun.api", *(f"smolrun.cli.{verb}" for verb in VERBS)]
    for name, path in modules([name for name in own if importlib.util.find_spec(name)]).items():
        inside = Path(*name.split("."))
        _copy(path, part / (inside / "__init__.py" if path.name == "__init__.py" else inside.with_suffix(".py")))
    licence = Path(__file__).parents[1] / "LICENSE"  # of a source tree; an installed package keeps it with its metadata
    for path in [licence] if licence.is_file() else list(_licences("smolrun")):
        _copy(path, part / path.name)
    for library in VENDORED:
        for file in importlib.metadata.files(library) or ():
            if file.suffix == ".py" and file.parts[0] == library:
                _copy(Path(str(file.locate())), part / "vendor" / file)
        for path in _licences(library):
            _copy(path, part / "vendor" / f"{library}-{path.name}")


def _licences(distribution: str) -> Iterator[Path]:
    for file in importlib.metadata.files(distribution) or ():
        if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            yield Path(str(file.locate()))


def modules(roots: Iterable[str]) -> dict[str, Path]:
    """Every module of smolrun that these import, inside functions too, with its file; but for those that only compile.

    Imports under TYPE_CHECKING do not run and do not count.
    """
    found: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name == "smolrun.kernels.build":
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        waiting.append(name.rpartition(".")[0])
        tree = ast.parse(found[name].read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        package = name if found[name].name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names if alias.name.startswith("smolrun")]
            elif isinstance(node, ast.ImportFrom):
                source = ".".join(filter(None, [package, node.module])) if node.level else node.module or ""
                if source.startswith("smolrun"):
                    waiting += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        waiting = [name for name in waiting if name and _is_module(name)]
    return found


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package: the name is a function's
        return False


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(source.read_bytes())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sized(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return path.stat().st_size, digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _replace(part: Path, out: Path) -> None:
    """Rename a folder; a bundle in its place goes away after that, and comes back if it fails."""
    if not out.exists():
        part.rename(out)
        return
    old = part.with_suffix(".old")
    out.rename(old)
    try:
        part.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress:
        progress(what, done, total)
