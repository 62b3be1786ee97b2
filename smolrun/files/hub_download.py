"""Fetching a model through huggingface_hub: HF_ENDPOINT, HF_TOKEN, proxies and progress bars are the library's."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.errors import ModelFileError, ModelNotFound
from smolrun.files.hub_cache import INDEX, SINGLE, HubSource, cache_folder, constants, matching, repo_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# Weights stay last: a snapshot that has them has the rest, however the download ended.
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",  # holds the chat template of older repositories
    "chat_template.jinja",
    "README.md",  # its first lines name the licence
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(hub: HubSource, *, progress: bool = False) -> Path:
    """Fetch what is missing and return the local path."""
    with _hub_errors(hub):
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        silent = _silent_bar()
        info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = _wanted(hub, list(siblings))
        _check_space(hub, [siblings[name] for name in names])
        paths: list[Path] = []
        for name in names:
            _fetch_blob(hub.repo, str(info.sha), siblings[name], silent if not progress else None)
            path = hf_hub_download(hub.repo, name, revision=hub.revision, tqdm_class=silent)  # a few kB, or a link
            paths.append(Path(path))
        if hub.gguf is not None:
            return paths[0]
        if "tokenizer_config.json" not in names:
            # asking leaves the library's mark that it does not exist, so that the next load need not ask
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(hub.repo, "tokenizer_config.json", revision=hub.revision)
        return paths[0].parent


def _wanted(hub: HubSource, names: list[str]) -> list[str]:
    """The files to fetch, weights last: no ONNX, no pickles, no other quantisations."""
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if hub.gguf is not None:
        found = [hub.gguf] if hub.gguf in ggufs else matching(hub.gguf, ggufs)
        if len(found) != 1 or _SPLIT_GGUF.search(found[0]):
            what = "split in parts" if found and _SPLIT_GGUF.search(found[0]) else f"{len(found)} files"
            raise ModelNotFound(
                f"{hub}: one whole GGUF file expected, {what} found; {hub.repo} holds {', '.join(ggufs) or 'no GGUF'}"
            )
        return found
    text = [name for name in _TEXT_FILES if name in names]
    if SINGLE in names:
        weights = [SINGLE]
    else:
        weights = [name for name in (INDEX,) if name in names] + sorted(filter(_SHARD.fullmatch, names))
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    if not weights:
        missing.append(SINGLE)
    if missing:
        hint = f"; for one of its GGUF files say {hub.repo}:NAME with NAME of {', '.join(ggufs)}" if ggufs else ""
        raise ModelNotFound(f"{hub}: the repository has no {', '.join(missing)}{hint}")
    return text + weights


def _fetch_blob(repo: str, commit: str, sibling: RepoSibling, bar: Any) -> None:
    """Put a large file into the cache's blobs, continuing an earlier attempt.

    huggingface_hub resumes within one call only: it deletes its partial file when the process is interrupted (its pull
    request 4228), which for 3.4 GB on a slow line means never. The partial file here has a fixed name, a lock, and the
    sha256 that the Hub announced for a check; `hf_hub_download` then finds the blob and only links it.
    """
    sha = sibling.lfs.sha256 if sibling.lfs is not None else ""
    if not _SHA256.fullmatch(sha):
        return
    blobs = repo_folder(repo) / "blobs"
    blob, partial = blobs / sha, blobs / f"{sha}.smolrun.incomplete"
    if blob.exists():
        return
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    blobs.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):
        if blob.exists():  # another process was faster
            return
        with partial.open("ab") as file:
            http_get(
                hf_hub_url(repo, sibling.rfilename, revision=commit),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=sibling.size,
                displayed_filename=sibling.rfilename,
                tqdm_class=bar,
            )
        found = _sha256(partial)
        if found != sha:
            partial.unlink()
            raise ModelFileError(
                f"{repo}: {sibling.rfilename}: sha256 {sha} expected, {found} downloaded; "
                "the damaged file was deleted (try again)"
            )
        partial.replace(blob)
    Path(f"{partial}.lock").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_space(hub: HubSource, siblings: list[RepoSibling]) -> None:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    blobs = repo_folder(hub.repo) / "blobs"
    needed = 0
    for sibling in siblings:
        sha = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        done = (blobs / f"{sha}", blobs / f"{sha}.smolrun.incomplete")
        needed += max(0, (sibling.size or 0) - max((path.stat().st_size for path in done if path.is_file()), default=0))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise ModelNotFound(
            f"{hub}: {needed:,} bytes to download, {free:,} free in {cache} (HF_HOME chooses another disk)"
        )


def _silent_bar() -> Any:
    """The library's progress bar that never shows; its own hides itself only when stderr is no terminal."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


@contextlib.contextmanager
def _hub_errors(hub: HubSource) -> Iterator[None]:
    """Say in one line what the Hub or the network answered, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{hub}: access must be asked for on {constants().ENDPOINT}/{hub.repo}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{hub}: no such repository on {constants().ENDPOINT} (or it is private: set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{hub}: the repository has no revision {hub.revision!r}") from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{hub}: not a Hub name: {error}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"{hub}: not on this disk, and the download from {constants().ENDPOINT} failed: {reason} "
            "(what arrived is kept: try again, or give a local file)"
        ) from error
