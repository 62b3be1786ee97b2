"""What huggingface_hub's cache on this disk holds, read without importing its download code.

    models--owner--name/refs/main                       the commit a branch or tag pointed to when last asked
    models--owner--name/snapshots/<commit>/config.json  symlink (or copy) of blobs/<sha>
    models--owner--name/.no_exist/<commit>/<file>       known to be absent from the repository

Importing that code costs 0.25 s, its `constants` 10 ms: so HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean here what
they mean there, and a model that is complete starts without the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolrun.errors import ModelFileError, ModelNotFound

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model on the Hub: a folder of safetensors, or (with `gguf`: file name or quantisation) one GGUF file."""

    repo: str
    revision: str = "main"
    gguf: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}{f':{self.gguf}' if self.gguf else ''}"


def cached(hub: HubSource) -> Path | str:
    """The path of a complete local copy, or why there is none."""
    folder = snapshot(hub)
    if folder is None:
        return "never downloaded"
    if hub.gguf is None:
        names = missing(folder)
        return f"missing {', '.join(names)}" if names else folder
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.is_file()]
    if hub.gguf.lower().endswith(".gguf"):
        return folder / hub.gguf if hub.gguf in names else f"missing {hub.gguf}"
    matches = matching(hub.gguf, names)
    return folder / matches[0] if len(matches) == 1 else f"{len(matches)} files of {hub.gguf}"


def snapshot(hub: HubSource) -> Path | None:
    """The folder of the commit that the revision pointed to when the Hub was last asked."""
    folder = repo_folder(hub.repo)
    commit = hub.revision if _COMMIT.fullmatch(hub.revision) else read_ref(folder / "refs" / hub.revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return folder / "snapshots" / commit


def missing(folder: Path, *, downloaded: bool = True) -> list[str]:
    """Names of the files without which the folder is not a model.

    A download must also have tokenizer_config.json, or the Hub's word that there is none: a snapshot that another
    program fetched in part would otherwise pass as a model without chat template.
    """
    names = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    name = "tokenizer_config.json"
    known_absent = folder.parent.parent / ".no_exist" / folder.name / name
    if downloaded and not (folder / name).is_file() and not known_absent.is_file():
        names.append(name)
    if (folder / SINGLE).is_file():
        return names
    if not (folder / INDEX).is_file():
        return [*names, SINGLE]
    return [*names, *(shard for shard in shards(folder / INDEX) if not (folder / shard).is_file())]


def shards(index: Path) -> list[str]:
    """File names in a safetensors index."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{index}: not a safetensors index with a weight_map (download again)") from error
    for shard in names:
        if not isinstance(shard, str):
            raise ModelFileError(f"{index}: a file name expected in weight_map, {shard!r} found")
        refuse_climbing(f"{index}: {shard}", shard)
    return names


def matching(quantisation: str, names: list[str]) -> list[str]:
    """GGUF names of one quantisation. `Q4_K` is not `Q4_K_M`: what follows the tag ends the name, or is '.' or '-'."""
    tag = re.compile(rf"(?:^|[-._/]){re.escape(quantisation)}(?=[-.])", re.IGNORECASE)
    return sorted(name for name in names if tag.search(name))


def refuse_climbing(shown: str, *names: str) -> None:
    """Raise ModelNotFound if a name could lead out of its folder, on any system."""
    for name in names:
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/") or "\0" in name:
            raise ModelNotFound(f"{shown}: a name that leaves its folder is refused")


def remove(hub: HubSource, *, revision_named: bool) -> int:
    """Delete one GGUF file, one revision (`revision_named`) or all of a repository. Returns the bytes freed.

    Raises:
        ModelNotFound: nothing of that name is here.
    """
    folder = repo_folder(hub.repo)
    if not folder.is_dir():
        raise ModelNotFound(f"{hub} is not downloaded: nothing to remove (see `smolrun list`)")
    before = _disk_bytes(folder)
    if hub.gguf is not None:
        found = cached(hub)
        if not isinstance(found, Path):
            raise ModelNotFound(f"{hub}: nothing to remove ({found})")
        if sum(1 for _ in files(folder / "snapshots")) > 1:
            _remove_file(folder, found)
            return before - _disk_bytes(folder)
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(cache_folder())
    # only this repository: delete_revisions goes by commit, and copies of a repository share commits
    cache = replace(cache, repos=frozenset(repo for repo in cache.repos if repo.repo_path.name == folder.name))
    revisions = [revision for repo in cache.repos for revision in repo.revisions]
    doomed = {r.commit_hash for r in revisions if not revision_named or hub.revision in {r.commit_hash, *r.refs}}
    if revision_named and not doomed:
        raise ModelNotFound(f"{hub}: no such revision on this disk (see `smolrun list`)")
    if doomed:
        cache.delete_revisions(*doomed).execute()
    else:
        import shutil

        shutil.rmtree(folder)  # blobs of a download that never finished
    return before - _disk_bytes(folder)


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder; nothing if it does not exist."""
    return (path for path in folder.rglob("*") if path.is_file())


def read_ref(ref: Path) -> str | None:
    """The commit in a refs/ file."""
    try:
        commit = ref.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def constants() -> Any:
    """The library's settings, read from the environment by the library itself."""
    from huggingface_hub import constants

    return constants


def cache_folder() -> Path:
    """HF_HUB_CACHE, else HF_HOME/hub."""
    return Path(constants().HF_HUB_CACHE).expanduser().absolute()


def repo_folder(repo: str) -> Path:
    """Where the library keeps a model repository."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _remove_file(folder: Path, pointer: Path) -> int:
    """Delete one file of a snapshot, and its blob unless another snapshot points to it."""
    before = _disk_bytes(folder)
    link = folder / "blobs" / Path(os.readlink(pointer)).name if pointer.is_symlink() else None
    pointer.unlink()
    others = (path for path in files(folder / "snapshots") if path.is_symlink())
    if link is not None and all(Path(os.readlink(path)).name != link.name for path in others):
        link.unlink(missing_ok=True)
    return before - _disk_bytes(folder)
