"""llama.cpp in its child process: what it answers on a tiny model, and how it fails."""

import os
from pathlib import Path

import numpy as np
import pytest

from smolrun import peer
from smolrun.errors import OptionError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.peer import Peer, PeerError, requantise
from tiny import make_tiny

installed = pytest.mark.skipif(not peer.available(), reason="llama-cpp-python is not installed (extra `reference`)")
pytestmark = pytest.mark.reference

IDS = [int(i) for i in np.random.default_rng(5).integers(17, 270, 40)]


@pytest.fixture(scope="module")
def tiny_q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("peer"), fmt="Q4_0", embd_fmt="Q8_0").gguf


@installed
def test_requantise_to_f32_is_the_exact_model(tiny_q4: Path, tmp_path: Path) -> None:
    target = tmp_path / "exact.gguf"
    requantise(tiny_q4, target, "F32")
    with open_checkpoint(target) as exact, open_checkpoint(tiny_q4) as source:
        assert {tensor.format for tensor in exact.tensors.values()} == {"F32"}
        assert exact.tensors.keys() == source.tensors.keys()


@installed
def test_batches_and_single_tokens_agree_on_the_exact_model(tiny_q4: Path, tmp_path: Path) -> None:
    target = tmp_path / "exact.gguf"
    requantise(tiny_q4, target, "F32")
    with Peer(target, context=256, threads=1, exact=True) as exact:
        batch = exact.logits(IDS)
        assert batch.shape == (len(IDS), exact.vocab_size) and batch.dtype == np.float32
        single = exact.logits(IDS, one_by_one=True)
        assert float(abs(batch - single).max()) < 1e-3 < float(abs(batch).max())
        assert exact.greedy(IDS, 1) == [int(batch[-1].argmax())]
        first, second = exact.greedy(IDS, 2)
        assert second == int(exact.logits([*IDS, first])[-1].argmax())


@installed
def test_timed_work_leaves_the_answers_alone(tiny_q4: Path) -> None:
    with Peer(tiny_q4, context=256, threads=1) as p:
        before = p.logits(IDS)
        assert p.prefill(IDS[:20], depth=IDS[20:]) > 0
        assert p.decode(IDS[:20], depth=IDS[20:]) > 0
        p.threads(2)
        assert p.decode(IDS[:20]) > 0
        assert np.array_equal(p.logits(IDS), before)


@installed
def test_more_than_the_context_is_an_error_and_the_peer_goes_on(tiny_q4: Path) -> None:
    with Peer(tiny_q4, context=256, threads=1) as p:
        with pytest.raises(PeerError, match="tokens"):
            p.decode(IDS * 10)
        assert p.logits(IDS).shape[0] == len(IDS)


@installed
def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF no more")
    with pytest.raises(PeerError, match="cannot open"):
        Peer(bad)
    with pytest.raises(PeerError, match="requantise"):
        requantise(bad, tmp_path / "out.gguf", "F32")
    with pytest.raises(OptionError, match="Q3_XXL"):
        requantise(bad, tmp_path / "out.gguf", "Q3_XXL")


@installed
def test_closing_ends_the_child(tiny_q4: Path) -> None:
    p = Peer(tiny_q4, context=64)
    child = p._child._process
    p.close()
    p.close()
    assert child.returncode == 0
    with pytest.raises(PeerError, match="closed"):
        p.logits(IDS)


@installed
def test_a_killed_child_is_told(tiny_q4: Path) -> None:
    with Peer(tiny_q4, context=64) as p:
        os.kill(p._child._process.pid, 9)
        with pytest.raises(PeerError, match="ended"):
            p.logits(IDS)


def test_without_the_package_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer, "available", lambda: False)
    with pytest.raises(OptionError, match=r"pip install \"smolrun\[reference\]\""):
        Peer(tmp_path / "any.gguf")
