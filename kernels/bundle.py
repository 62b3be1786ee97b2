"""A bundle: smolrun with one model in a folder, for a device that has Python and NumPy and nothing else.

    app/  __main__.py              python app chat, or beside it python -m app chat
          bundle.json              version, target, model, sizes and SHA-256 of all other files
          libsmolrun-TIER.so       the kernels, compiled ahead, once for each tier (link.py)
          model.pack               the weights, mapped where they lie, and the tokenizer (smolrun/files/packed.py)
          smolrun/                 these sources: there is no other run-time
          vendor/                  Jinja2, MarkupSafe and click, pure Python, with their licences

A smolrun that finds bundle.json beside itself runs from there: its default model is the bundle's, its kernels are the
shared objects', and nothing is ever compiled or cached. The folder may be read-only and may be moved.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST = "bundle.json"
MODEL = "model.pack"
AGAIN = "compile the bundle again, or copy it again"


class BundleError(RuntimeError):
    """A bundle that is damaged, or that was not made for what is asked of it."""


@functools.cache
def folder() -> Path | None:
    """The bundle that this code is part of; None: an ordinary installation."""
    beside = Path(__file__).parents[2]
    return beside if (beside / MANIFEST).is_file() else None


@functools.cache
def manifest(place: Path) -> dict[str, Any]:
    """What a bundle says of itself, its files checked by their sizes.

    Raises:
        BundleError: damaged, or of another version.
    """
    try:
        facts: dict[str, Any] = json.loads((place / MANIFEST).read_bytes())
        if (version := facts["smolrun_bundle"]) != VERSION:
            raise BundleError(f"{place} is a bundle of version {version}, this code runs {VERSION}: {AGAIN}")
        sizes, hashes = ({name: entry[i] for name, entry in facts["files"].items()} for i in range(2))
        libraries = facts["tiers"].values()
        texts = [facts["smolrun"], facts["target"], facts["model"], *facts["kv"], *libraries, *hashes.values()]
        if not all(isinstance(text, str) for text in texts) or not sizes.keys() >= {*libraries}:
            raise ValueError("not as `smolrun compile` writes it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{place / MANIFEST} cannot be read ({error!r}): {AGAIN}") from None
    for name, size in sizes.items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes, {size} expected"
            raise BundleError(f"{place / name} {state}: {AGAIN}")
    return facts


@functools.cache
def library(place: Path, tier: str) -> ctypes.CDLL:
    """The shared object of a tier, every byte of it checked.

    Raises:
        BundleError: damaged, or not part of the bundle.
    """
    facts = manifest(place)
    if tier not in facts["tiers"]:
        raise BundleError(f"{place} has no kernels for tier {tier}, only for {', '.join(facts['tiers'])}")
    name = facts["tiers"][tier]
    path = place / name
    if hashlib.sha256(path.read_bytes()).hexdigest() != facts["files"][name][1]:
        raise BundleError(f"{path} is damaged: {AGAIN}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BundleError(f"{path} was compiled for {facts['target']} and does not load here: {error}") from None


def addresses(place: Path, tier: str, names: list[str]) -> dict[str, int]:
    """Addresses of entry points.

    Raises:
        BundleError: as `library`, or entry points that the bundle was compiled without.
    """
    code = library(place, tier)
    if missing := [name for name in names if not hasattr(code, name)]:
        facts = manifest(place)
        raise BundleError(
            f"{place} was compiled without {', '.join(missing)}, with kv={' or '.join(facts['kv'])} and the formats of "
            f"{facts['model']}: `smolrun compile` it with other options"
        )
    return {name: ctypes.cast(getattr(code, name), ctypes.c_void_p).value or 0 for name in names}
