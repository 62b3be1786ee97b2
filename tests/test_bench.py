"""The benchmark's arithmetic, the order of its turns and its reports; what it measures is not asserted."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smolrun import bench, peer
from smolrun.bench import Case, Report, Row
from smolrun.errors import OptionError, SmolrunError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model.machine import available_cores
from tiny import make_tiny

ROW = Row("tg128", 2, (90.0, 100.0, 120.0), 100_000_000, 20e9, (50.0, 80.0, 60.0))
REPORT = Report(
    model="tiny.gguf",
    weight_format="Q4_0",
    model_bytes=90_000_000,
    tier="avx2",
    logits_hash="0123456789abcdef",
    peer="llama.cpp",
    peer_kl=3e-3,
    first_token=0.75,
    peak_memory=300_000_000,
    bandwidth={2: 20e9},
    rows=(replace(ROW, test="pp512", bytes_per_token=0), ROW),
)


def test_names_are_llama_benchs() -> None:
    assert Case("pp", 512, 0).name == "pp512" and Case("tg", 128, 4096).name == "tg128 @ d4096"
    assert Case("tg", 128, 0, 8).name == "tg128 x8"


def test_figures_of_a_row() -> None:
    assert ROW.figures() == {
        "test": "tg128",
        "threads": 2,
        "tokens_per_s": 100.0,
        "spread": 0.15,
        "gb_per_s": 10.0,
        "share_of_peak": 0.5,
        "peer_tokens_per_s": 60.0,
        "peer_best": 80.0,
        "ratio": 1.667,
        "ratio_to_best": 1.25,
    }
    assert replace(ROW, peer=()).figures()["ratio"] is None
    prefill = replace(ROW, bytes_per_token=0).figures()
    assert prefill["gb_per_s"] is None and prefill["share_of_peak"] is None


def test_reports() -> None:
    table = REPORT.table()
    assert "100.0" in table and "1.67x" in table and "1.25x" in table and "50%" in table and "0123456789abcdef" in table
    assert "ratio" not in replace(REPORT, peer=None, peer_kl=None).table()
    document = json.loads(REPORT.to_json())
    assert document["rows"][1]["samples"] == [90.0, 100.0, 120.0] and document["rows"][1]["ratio"] == 1.667
    lines = list(csv.DictReader(io.StringIO(REPORT.to_csv())))
    assert [line["test"] for line in lines] == ["pp512", "tg128"]
    assert lines[1]["gb_per_s"] == "10.0" and lines[0]["gb_per_s"] == "" and lines[0]["tier"] == "avx2"


class Recorder:
    """A model that writes down its passes, and a peer that writes down its turns."""

    chunk = 8

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.length = 0  # ids in the cache

    def open(self, ids: Sequence[int]) -> Any:
        seq = SimpleNamespace(length=min(self.length, len(ids) - 1), close=lambda: None)

        def truncate(n: int) -> None:
            seq.length = n

        seq.truncate = truncate
        return seq

    def hidden(self, seq: Any, ids: Sequence[int], rows: int | None = None) -> Any:
        self.log.append((seq.length, list(ids)))
        seq.length += len(ids)
        self.length = seq.length
        return np.zeros((len(ids) if rows is None else rows, 4), np.float32)

    def step(self, work: Sequence[tuple[Any, Sequence[int]]]) -> Any:
        return np.concatenate([self.hidden(seq, ids) for seq, ids in work])

    def logits(self, hidden: Any) -> Any:
        self.log.append(("logits", len(hidden)))
        return hidden

    def prefill(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        self.log.append(("peer", "pp", len(ids), len(depth)))
        return 0.5

    def decode(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        self.log.append(("peer", "tg", len(ids), len(depth)))
        return 0.25


def test_prefill_is_chunks_and_the_last_ids_logits() -> None:
    model = Recorder()
    bench.seconds(model, range(20), (), one_by_one=False)  # type: ignore[arg-type]
    assert model.log == [
        (0, list(range(8))),
        (8, list(range(8, 16))),
        (16, list(range(16, 20))),
        ("logits", 1),
    ]


def test_decode_is_one_by_one_behind_a_depth_that_is_kept() -> None:
    model = Recorder()
    for _ in range(2):
        bench.seconds(model, [7, 8], range(10), one_by_one=True)  # type: ignore[arg-type]
    turn = [(10, [7]), ("logits", 1), (11, [8]), ("logits", 1)]
    assert model.log == [(0, list(range(8))), (8, [8, 9]), *turn, *turn]


def test_a_batch_decodes_an_id_of_each_in_every_pass() -> None:
    model = Recorder()
    bench.seconds(model, [7, 8], [5], one_by_one=True, batch=2)  # type: ignore[arg-type]
    assert model.log == [(0, [5]), (1, [7]), (1, [8]), ("logits", 2), (2, [8]), (2, [5]), ("logits", 2)]
    model.length = 0
    ours, others = bench.measure(model, model, Case("tg", 2, 0, 3), range(10), 1)  # type: ignore[arg-type]
    assert len(ours) == 1 and others == ()


def test_turns_alternate_and_the_first_round_is_thrown_away() -> None:
    both = Recorder()
    ours, others = bench.measure(both, both, Case("tg", 2, 3), range(10), 3)  # type: ignore[arg-type]
    turns = [entry for entry in both.log if entry[0] == "peer" or entry == ("logits", 1)]
    assert turns == [("logits", 1), ("logits", 1), ("peer", "tg", 2, 3)] * 4
    assert len(ours) == 3 and others == (8.0, 8.0, 8.0)
    both.log.clear()
    bench.measure(both, both, Case("pp", 5, 0), range(10), 1)  # type: ignore[arg-type]
    assert both.log.count(("peer", "pp", 5, 0)) == 2


def test_prompt_is_the_same_everywhere_and_has_no_specials() -> None:
    ids = bench.prompt(49152, 512)
    assert ids[:3] == [25264, 27579, 2670] and min(ids) >= 17 and max(ids) < 49152 and ids == bench.prompt(49152, 512)


@pytest.mark.skipif(available_cores() < 2, reason="two threads take turns on one core")
def test_a_line_goes_from_core_to_core_and_back() -> None:
    assert 1e-9 < bench.hand_over() < 1e-2  # less than a turn of the scheduler: both cores were there


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_for_a_token(tmp_path: Path, tied: bool) -> None:
    with open_checkpoint(make_tiny(tmp_path, tied=tied, fmt="Q4_0").gguf) as checkpoint:
        read = sum(t.raw.nbytes for name, t in checkpoint.tensors.items() if tied or name != "token_embd.weight")
        cache = (100 + 5 / 2) * 2 * 2 * 64 * 2  # positions, K and V, layers, one head of 64, f16
        assert bench.bytes_per_token(checkpoint, Case("tg", 4, 100), "f16") == read + cache
        assert bench.bytes_per_token(checkpoint, Case("tg", 4, 100, 8), "f16") == round(read / 8 + cache)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_sizes": (), "decode_sizes": ()}, "nothing to measure"),
        ({"decode_sizes": (0,)}, "tg0"),
        ({"depths": (-1,)}, "depths at 0"),
        ({"batches": (33,)}, "tg128 x33: 1 to 32"),
        ({"threads": (1, 0)}, "threads are 1, 0: 1 to 256"),
        ({"repeats": 0}, "repeats is 0"),
        ({"compare": "vllm"}, "'vllm'"),
        ({"compare": "llama.cpp"}, "only GGUF"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        bench.run(tmp_path, **options)


def test_a_fresh_process_without_a_token_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_SCRIPT", "raise SystemExit(3)")
    with pytest.raises(SmolrunError, match="exit code 3"):
        bench.cold_start(tmp_path, {})


def test_a_run_of_one_sequence_without_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "COLD_RUNS", 1)
    path = make_tiny(tmp_path, fmt="Q4_0").gguf
    report = bench.run(path, prompt_sizes=(32,), decode_sizes=(8,), threads=(1,), repeats=1)
    assert [row.test for row in report.rows] == ["pp32", "tg8"] and report.peer_kl is None and report.table()


@pytest.mark.reference
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not peer.available():
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    monkeypatch.setattr(bench, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "COLD_RUNS", 1)
    path = make_tiny(tmp_path, fmt="Q4_0").gguf
    options: dict[str, Any] = {"prompt_sizes": (32,), "decode_sizes": (8,), "depths": (0, 64), "threads": (1, 2)}
    options["batches"] = (1, 3)
    report = bench.run(path, **options, repeats=1, compare="llama.cpp")
    names = ["pp32", "tg8", "tg8 x3", "pp32 @ d64", "tg8 @ d64", "tg8 x3 @ d64"]
    assert [(row.test, row.threads) for row in report.rows] == [(name, n) for n in (1, 2) for name in names]
    assert all(len(row.samples) == 1 and len(row.peer) == ("x3" not in row.test) for row in report.rows)
    assert report.peer_kl is not None and 0 < report.peer_kl < bench.CHECK_KL
    assert len(report.logits_hash) == 16 and report.first_token > 0
    assert report.bandwidth.keys() == {1, 2} and min(report.bandwidth.values()) > 0
    assert report.table() and report.to_csv() and report.to_json()
