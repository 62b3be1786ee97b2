"""The precision contract: its arithmetic on small arrays, its checks on mock models, and a whole run on a tiny one."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smolrun import peer, verify
from smolrun.errors import OptionError
from smolrun.verify import EXACT, FAST, FLOAT, Comparison, Report, Summary

VOCAB = 23


def logits(rows: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32) * 3


def test_comparison_equals_the_definitions() -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 50)]
    truth, other = logits(50, 2), logits(50, 3)
    pair = Comparison([("truth", "other")])
    for part in (slice(0, 40), slice(40, 50)):  # two windows: nothing is predicted across their border
        pair.add({"truth": truth[part], "other": other[part], "unused": other[:0]}, ids[part])
    kl, loss, same = [], [], []
    for i in range(50):
        p = [math.exp(v) for v in truth[i]]
        q = [math.exp(v) for v in other[i]]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same.append(p.index(max(p)) == q.index(max(q)))
        if i not in (39, 49):
            loss.append(-math.log(q[ids[i + 1]]))
    found = pair.summary("truth", "other")
    assert found.kl_mean == pytest.approx(sum(kl) / 50, rel=1e-9)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-9)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert found.top1 == sum(same) / 50
    assert found.ppl == pytest.approx(math.exp(sum(loss) / 48), rel=1e-9)


def test_equal_distributions_have_no_divergence_and_every_pair_is_its_own() -> None:
    a, b = logits(5, 4), logits(5, 5)
    pairs = Comparison([("a", "a shifted"), ("a", "b"), ("b", "a")])
    pairs.add({"a": a, "a shifted": a + np.float32(1e4), "b": b}, [1, 2, 3, 4, 5])
    same = pairs.summary("a", "a shifted")
    assert abs(same.kl_mean) < 1e-6 and same.top1 == 1.0
    assert 0 < pairs.summary("a", "b").kl_mean != pairs.summary("b", "a").kl_mean > 0
    assert pairs.summary("b", "a").ppl == pairs.ppl("a") == pytest.approx(pairs.ppl("a shifted"), rel=1e-3)


def test_comparison_refuses_what_does_not_fit() -> None:
    pair = Comparison([("a", "b")])
    with pytest.raises(ValueError, match="7 ids"):
        pair.add({"a": logits(5, 1), "b": logits(5, 1)}, range(7))
    with pytest.raises(ValueError, match="4, 23"):
        pair.add({"a": logits(5, 1), "b": logits(4, 1)}, range(5))
    assert math.isnan(pair.summary("a", "b").kl_mean)


def test_windows_cover_the_text_and_drop_a_lonely_id() -> None:
    assert [list(part) for part in verify.windows(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [len(part) for part in verify.windows(range(1030), 512)] == [512, 512, 6]


def test_match_length() -> None:
    assert verify.match_length([1, 2, 3], [1, 2, 4]) == 2
    assert verify.match_length([1, 2], [1, 2, 4]) == 2
    assert verify.match_length([], [1]) == 0


class Mock:
    """A model whose logits depend on the ids before a position, and on how they were cut where it is told to cheat."""

    chunk = 16

    def __init__(self, cheat: str = "") -> None:
        self.cheat = cheat
        self.cache: list[int] = []

    def open(self, ids: Sequence[int]) -> Any:
        common = 0
        while common < min(len(ids) - 1, len(self.cache)) and ids[common] == self.cache[common]:
            common += 1
        seq = SimpleNamespace(length=common, untouched=True, close=lambda: None)

        def truncate(n: int) -> None:
            seq.length = n

        seq.truncate = truncate
        return seq

    def hidden(self, seq: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        assert 0 < len(ids) <= self.chunk
        del self.cache[seq.length :]
        rows = []
        for token in ids:
            self.cache.append(token)
            seq.length += 1
            rows.append([float(sum(self.cache) % 97), float(len(self.cache))])
        if self.cheat == "decode" and len(ids) == 1:
            rows[0][0] += 1e-6
        if self.cheat == "reuse" and seq.untouched and len(self.cache) > len(ids):
            rows[-1][1] = 0.0
        seq.untouched = False
        return np.array(rows, np.float32)

    def logits(self, hidden: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.sin(hidden @ np.arange(1, 2 * VOCAB + 1, dtype=np.float32).reshape(2, VOCAB)).astype(np.float32)


def test_identity_of_an_honest_model() -> None:
    ways = verify.identity(Mock(), list(range(3, 35)))  # type: ignore[arg-type]
    assert ways == {"one by one": 0, "chunks of 7": 0, "uneven chunks": 0, "reused prefix": 0}


@pytest.mark.parametrize(("cheat", "way"), [("decode", "one by one"), ("reuse", "reused prefix")])
def test_identity_finds_a_model_that_is_not(cheat: str, way: str) -> None:
    ways = verify.identity(Mock(cheat), list(range(3, 35)))  # type: ignore[arg-type]
    assert ways[way] > 0 and ways["chunks of 7"] == 0


def test_identity_looks_at_bits_not_values() -> None:
    zero = np.zeros((2, 3), np.float32)
    assert verify.differing_rows(zero, zero) == 0
    assert verify.differing_rows(zero, np.array([[0, 0, -0.0], [0, 0, 0]], np.float32)) == 1


GOOD = Summary(kl_mean=2e-3, kl_p99=1e-2, kl_max=0.1, top1=0.96, ppl=10.0)
REPORT = Report(
    model="tiny.gguf",
    weight_format="Q4_0",
    precision="fast",
    tokens=1000,
    window=512,
    exact_ppl=10.0,
    ours=GOOD,
    peer=GOOD,
    to_peer=replace(GOOD, kl_mean=5e-5),
    greedy_tokens=64,
    greedy_ours=(64, 12),
    greedy_peer=(3, 64),
    identity={"one by one": 0},
)


def test_the_contract_of_each_format() -> None:
    assert verify.limit_of("Q4_0", "fast") is FAST and verify.limit_of("BF16", "fast") is FAST
    assert verify.limit_of("Q8_0", "exact") is EXACT
    assert verify.limit_of("F16", "fast") is FLOAT and verify.limit_of("F32", "exact") is FLOAT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ours": replace(GOOD, kl_mean=2.2e-3)}, "over llama.cpp's: 1.1, the contract allows 1.05"),
        ({"ours": replace(GOOD, ppl=10.05)}, "perplexity: 0.005"),
        ({"ours": replace(GOOD, ppl=9.95)}, "perplexity: 0.005"),
        ({"ours": replace(GOOD, kl_mean=float("nan"))}, "over llama.cpp's: nan"),
        ({"precision": "exact"}, "mean KL to exact: 0.002, the contract allows 1e-05"),
        ({"weight_format": "F16", "to_peer": GOOD}, "mean KL to llama.cpp: 0.002, the contract allows 0.0001"),
        ({"identity": {"one by one": 3}}, "one by one: 3 rows"),
    ],
)
def test_a_broken_contract_is_told(change: dict[str, Any], words: str) -> None:
    assert REPORT.ok and not REPORT.failures
    report = replace(REPORT, **change)
    assert not report.ok
    assert len(report.failures) == 1 and words in report.failures[0]
    assert report.failures[0] in report.table() and report.failures[0] in json.loads(report.to_json())["failures"]


def test_report_shows_what_was_found() -> None:
    table = REPORT.table()
    assert "64/12" in table and "3/64" in table and "the precision contract holds" in table
    document = json.loads(REPORT.to_json())
    assert document["ok"] is True and document["ours"]["kl_mean"] == 2e-3 and document["greedy_peer"] == [3, 64]


def test_shipped_text_is_plain_and_long_enough() -> None:
    text = verify.sample_text()
    assert text.isascii() and len(text) > 4500


def test_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only GGUF"):
        verify.run(tmp_path)


@pytest.mark.reference
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, precision: str) -> None:
    if not peer.available():
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    from tiny import make_tiny

    path = make_tiny(tmp_path, fmt="Q4_0").gguf
    steps: list[str] = []
    report = verify.run(path, max_tokens=200, window=96, precision=precision, threads=2, progress=steps.append)
    assert report.tokens == 200 and report.weight_format == "Q4_0" and steps
    assert set(report.identity.values()) == {0} and len(report.identity) == 6
    assert len(report.greedy_ours) == 2
    assert report.peer.kl_mean > 1e-6  # llama.cpp is not exact, so the exact model is another one
    assert report.ours.kl_mean < (1e-5 if precision == "exact" else 2 * report.peer.kl_mean)
    assert json.loads(report.to_json())["tokens"] == 200


@pytest.mark.reference
def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    if not peer.available():
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    from tiny import make_tiny

    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(OptionError, match="give at least 64"):
        verify.run(make_tiny(tmp_path).gguf, text_file=text)
