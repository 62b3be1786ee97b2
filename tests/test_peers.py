"""benchmarks/peers.py and gate.py: who meets in a row, turns, what is kept, and what is told; nothing is timed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gate
import peers
import readme
from gate import Verdict
from peers import Contestant, Document, Key, Result, Unavailable, Workshop

from smolrun.bench import Case, Report, Row
from smolrun.errors import SmolrunError
from smolrun.peer import Child, PeerError

KEY = Key("135m", "q4_0", "tg128", 2)


def options(*arguments: str) -> Any:
    return peers.parse(arguments)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "case"),
    [("pp512", Case("pp", 512, 0)), ("tg128@d4096", Case("tg", 128, 4096)), ("tg8 @ d16", Case("tg", 8, 16))],
)
def test_names_of_tests(text: str, case: Case) -> None:
    assert peers.parse_test(text) == case and peers.parse_test(case.name) == case


@pytest.mark.parametrize("text", ["", "pp", "pp0", "xx5", "tg128@4096"])
def test_bad_names_of_tests(text: str) -> None:
    with pytest.raises(ValueError, match="expected ppN"):
        peers.parse_test(text)


def test_who_meets_in_a_row() -> None:
    names = [c.name for c in peers.contestants(KEY, options("--ours", "fast,exact,fast:q8_0"))]
    assert names == [
        "smolrun fast",
        "smolrun exact",
        "smolrun fast kv=q8_0",
        "llama.cpp q4_0",
        "llama.cpp q4_0 flash=off",
        "openvino q4_0",
        "onnxruntime-genai int4",
    ]
    few = options("--peers", "llama.cpp-avx2", "--flash", "auto", "--tier", "avx2", "--llama-bench", "x")
    names = [c.name for c in peers.contestants(KEY, few)]
    assert names == ["smolrun fast tier=avx2", "llama.cpp-avx2 q4_0", "llama-bench q4_0"]
    alone = [c.name for c in peers.contestants(KEY, options("--peers", "torch"))]
    assert alone == ["smolrun fast"]  # torch has no 4 bits


@pytest.mark.parametrize("bad", [("--peers", "vllm"), ("--formats", "q9"), ("--tests", "pp0"), ("--python", "x")])
def test_bad_options_are_refused(bad: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        options(*bad)


def test_the_estimate_grows_with_the_work() -> None:
    us = [Contestant("smolrun", "fast")]
    small = peers.estimate(KEY, us, 5)
    assert 0 < small < peers.estimate(replace(KEY, size="1.7b"), us, 5)
    assert small < peers.estimate(replace(KEY, test="tg128@d7680"), us, 5)
    assert small < peers.estimate(KEY, [*us, Contestant("llama.cpp", "q4_0")], 5)


ROW = {
    "size": "135m",
    "format": "q4_0",
    "test": "tg128",
    "threads": 2,
    "results": [
        {"name": "smolrun fast", "samples": [90.0, 100.0, 110.0], "check": {}, "failed": None, "share_of_peak": 0.8},
        {"name": "llama.cpp q4_0", "samples": [40.0, 50.0, 80.0], "check": {}, "failed": None, "share_of_peak": None},
        {"name": "openvino q4_0", "samples": [], "check": {}, "failed": "no wheel", "share_of_peak": None},
    ],
}


def test_figures_and_the_table_name_everyone() -> None:
    llama, vino = peers.figures(ROW)
    assert (llama["ours"], llama["median"], llama["best"], llama["ratio"], llama["ratio_to_best"]) == (
        100.0, 50.0, 80.0, 2.0, 1.25,
    )  # fmt: skip
    assert llama["spread"] == 0.1 and vino["ratio"] is None and vino["failed"] == "no wheel"
    text = peers.table([ROW])
    assert "2.00x" in text and "1.25x" in text and "openvino q4_0" in text and "failed: no wheel" in text
    failed = {**ROW, "results": [{**ROW["results"][0], "samples": [], "failed": "KL"}, *ROW["results"][1:]]}
    assert peers.figures(failed)[0]["ratio"] is None and peers.table([failed])


def test_readme_takes_the_fastest_setting_and_never_rounds_up() -> None:
    slow = {"name": "llama.cpp q4_0 flash=off", "samples": [30.0], "check": {}, "failed": None, "share_of_peak": None}
    row = {**ROW, "results": [*ROW["results"], slow]}
    assert readme.best_of(row, "llama.cpp") is row["results"][1] and readme.best_of(row, "torch") is None
    assert readme.others([row]) == ["openvino"]
    llama, vino = readme.speed(readme.beside([row], ["llama.cpp", "openvino"])).splitlines()[2:]
    assert llama == "| 135M Q4_0 | tg128 | llama.cpp | 100 ± 10% | 80% | 50 (80) | **2.00x** (1.25x) |"
    assert "openvino q4_0" in vino and "failed: no wheel" in vino
    assert readme.never_up(1.5999) == "1.59" and readme.median([3.0, 1.0, 2.0, 10.0]) == 2.5
    ours = {**ROW["results"][0], "name": "smolrun fast kv=q8_0"}
    assert "135M Q4_0 (fast kv=q8_0)" in readme.speed(readme.beside([{**row, "results": [ours, slow]}], ["llama.cpp"]))


def test_readme_shows_few_rows_and_names_all_that_are_lost() -> None:
    swapped = [{**ROW["results"][1], "name": "smolrun fast"}, {**ROW["results"][0], "name": "llama.cpp q6_k"}]
    odd = {**ROW, "format": "q6_k", "test": "tg32@d7680", "results": swapped}
    pairs = readme.beside([ROW, odd], ["llama.cpp", "openvino"])
    (line,) = readme.short_speed(pairs).splitlines()[2:]
    assert line == "| 135M Q4_0 | decode | 100 | 50 | **2.00x** |"
    lost = "135M Q6_K, decode at a depth of 7,680, 2 threads, llama.cpp (0.50x)"
    assert readme.behind(pairs) == f"smolrun is behind in 1 of 2 comparisons: {lost}."
    assert readme.behind(readme.beside([ROW], ["llama.cpp"])) == "smolrun is ahead in all 1 comparisons."


# ---- the document ----------------------------------------------------------------------------------------------------


def test_a_run_resumes_where_it_ended(tmp_path: Path) -> None:
    choice = options("--peers", "llama.cpp", "--sizes", "135m", "--formats", "q4_0", "--tests", "pp512,tg128")
    choice.threads, choice.repeats = "1", 2
    runners = peers.contestants(KEY, choice)
    document = Document(tmp_path / "peers.json")
    document.data["runs"].append({})
    assert [[k.test for k in group] for group in peers.plan(choice, document)] == [["pp512", "tg128"]]
    results = [Result(r.name, samples=[1.0, 2.0]) for r in runners]
    results[-1] = Result(runners[-1].name, failed="told")
    document.add(Key("135m", "q4_0", "pp512", 1), results, steal=0.0)
    again = Document(tmp_path / "peers.json")
    assert [[k.test for k in group] for group in peers.plan(choice, again)] == [["tg128"]]
    choice.repeats = 3
    assert [[k.test for k in group] for group in peers.plan(choice, again)] == [["pp512", "tg128"]]
    again.add(Key("135m", "q4_0", "pp512", 1), results)  # replaces, does not repeat
    assert len(again.data["rows"]) == 1
    again.add(Key("135m", "q4_0", "pp512", 1), results[:2])  # another set of contestants: beside it
    assert len(again.data["rows"]) == 2
    assert not list(tmp_path.glob("*.part"))


def test_stolen_time(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    assert peers.stolen(tmp_path / "stat") == (8, 36)
    assert peers.stolen(tmp_path / "none") == (0, 0)


# ---- turns and checks ------------------------------------------------------------------------------------------------


class Recorder:
    """A runtime that writes its turns into a common log; fails at the turn it is told to."""

    def __init__(self, name: str, log: list[Any], fails_at: int = -1) -> None:
        self.name, self.log, self.fails_at, self.turns = name, log, fails_at, 0

    def decode(self, ids: Sequence[int], *, depth: Sequence[int] = ()) -> float:
        if self.turns == self.fails_at:
            raise PeerError("out of memory")
        self.turns += 1
        self.log.append((self.name, len(ids), len(depth)))
        return 0.5

    prefill = decode

    def pause(self) -> None:
        self.log.append("pause")


def test_turns_alternate_and_the_first_round_is_thrown_away() -> None:
    log: list[Any] = []
    two = {name: Recorder(name, log) for name in "ab"}
    results = peers.rounds(two, Case("tg", 16, 3), range(100), 3, 60)
    turns = [entry for entry in log if entry != "pause"]
    assert turns[:2] == [("a", 8, 3), ("b", 8, 3)]  # warming up is shorter
    assert [t[0] for t in turns] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert log[1::2] == ["pause"] * 8 and {t[1] for t in turns[2:]} == {16}
    assert results["a"].samples == results["b"].samples == [32.0] * 3


def test_a_runtime_that_fails_is_named_and_the_rest_goes_on() -> None:
    log: list[Any] = []
    results = peers.rounds(
        {"a": Recorder("a", log), "b": Recorder("b", log, fails_at=2)}, Case("pp", 16, 0), range(100), 3, 60
    )
    assert len(results["a"].samples) == 3 and results["b"].samples == []
    assert results["b"].failed == "out of memory"


def test_a_slow_runtime_gets_fewer_turns() -> None:
    results = peers.rounds({"a": Recorder("a", [])}, Case("tg", 4, 0), range(9), 5, 0.9)
    assert len(results["a"].samples) == 2


def test_a_runtime_is_checked_by_its_logits() -> None:
    truth = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    found = peers.compare(truth, truth + np.float32(1e-4), [1, 2, 3, 4], 0.01)
    assert found["kl"] < 1e-6 and found["top1"] == 1.0 and found["positions"] == 4 and len(found["hash"]) == 16
    with pytest.raises(Unavailable, match="mean KL"):
        peers.compare(truth, truth[:, ::-1].copy(), [1, 2, 3, 4], 0.01)
    with pytest.raises(Unavailable, match="NaN"):
        peers.compare(truth, np.full_like(truth, np.nan), [1, 2, 3, 4], 0.01)


def test_what_cannot_be_installed_says_why(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, tmp_path, {"torch": "/nonexistent/python"})
    with pytest.raises(Unavailable, match="nonexistent"):
        shop.versions("torch")
    with pytest.raises(Unavailable, match=r"exit code 1: .*boom"):
        peers.run([sys.executable, "-c", "raise SystemExit('boom')"])


def test_llama_bench_by_path(tmp_path: Path) -> None:
    said = {"model_n_params": 5, "model_size": 9, "build_commit": "abc", "avg_ts": 50.0}
    script = tmp_path / "llama-bench"
    script.write_text(f"#!{sys.executable}\nimport sys\nassert '-d' in sys.argv or 1\nprint({json.dumps([said])!r})\n")
    script.chmod(0o755)
    runtime = peers.LlamaBench(script, tmp_path / "model.gguf", 2)
    assert runtime.decode([1] * 100, depth=[2] * 8) == 2.0 and runtime.prefill([1] * 50) == 1.0
    assert runtime.identity() == {"parameters": 5, "bytes": 9, "build": "abc"}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_a_paused_child_is_stopped_and_its_next_request_wakes_it(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(
        "from smolrun.peer import serve\n"
        "class Echo:\n"
        "    def forget(self): pass\n"
        "    def say(self, word): print('noise'); return {'word': word}\n"
        "    def fail(self): raise KeyError('why')\n"
        "serve(Echo())\n"
    )
    env = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    child = Child([sys.executable, str(tmp_path / "echo.py")], name="echo", env=env)
    try:
        assert child.ask("say", word="a") == {"word": "a"}  # what it prints does not disturb the replies
        child.pause()
        stat = Path(f"/proc/{child._process.pid}/stat")
        if stat.exists():
            state = ""
            for _ in range(100_000):
                if (state := stat.read_text().rsplit(")", 1)[1].split()[0]) == "T":
                    break
            assert state == "T"
        assert child.ask("say", word="b") == {"word": "b"}
        with pytest.raises(PeerError, match="echo, 'fail': KeyError: 'why'"):
            child.ask("fail")
        child.pause()
    finally:
        child.close()
    assert child._process.returncode == 0


# ---- the gate --------------------------------------------------------------------------------------------------------


def report(scale: float) -> Report:
    rows = (
        Row("pp256", 1, (900.0 * scale, 1000.0 * scale), 0, 20e9, (400.0, 500.0)),
        Row("tg48", 1, (100.0 * scale, 90.0 * scale), 100_000_000, 20e9, (40.0, 50.0)),
    )
    return Report("m.gguf", "Q4_0", 1, "avx2", "0", "llama.cpp", 0.0, 0.5, 0, {1: 20e9}, rows)


BASELINE = gate.ratios([report(1)])


def test_ratios_are_best_over_best() -> None:
    assert BASELINE == {
        "Q4_0 pp256 t1 / llama.cpp": 2.0,
        "Q4_0 tg48 t1 / llama.cpp": 2.0,
        "Q4_0 tg48 t1 / read peak": 0.5,
    }


@pytest.mark.parametrize(("scale", "falls"), [(1.5, 0), (1.0, 0), (0.6, 0), (0.45, 3), (0.3, 3)])
def test_only_a_clear_fall_falls(scale: float, falls: int) -> None:
    verdicts = gate.judge(gate.ratios([report(scale)]), BASELINE)
    assert sum(v.fell for v in verdicts) == falls
    assert ("fell" in gate.table(verdicts)) == bool(falls)


def test_a_fall_counts_when_every_attempt_shows_it() -> None:
    good, bad = (gate.judge(gate.ratios([report(s)]), BASELINE) for s in (1.0, 0.3))
    assert gate.fallen([bad]) == list(BASELINE) and gate.fallen([bad, bad]) == list(BASELINE)
    assert gate.fallen([bad, good]) == []
    assert gate.fallen([[Verdict("a", 0.1, 1.0), Verdict("b", 1.0, 1.0)], [Verdict("a", 1.0, 1.0), bad[1]]]) == []


def run_gate(monkeypatch: pytest.MonkeyPatch, path: Path, scales: list[float], *arguments: str) -> int:
    monkeypatch.setattr(gate, "measure", lambda: gate.ratios([report(scales.pop(0))]))
    monkeypatch.setattr(sys, "argv", ["gate.py", "--baselines", str(path), *arguments])
    return gate.main()


def test_the_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gate.json"
    path.write_text("{}")
    assert run_gate(monkeypatch, path, [0.1]) == 0  # another CPU: told, not failed
    assert "no baseline for" in capsys.readouterr().out
    assert run_gate(monkeypatch, path, [1.0, 0.9, 1.2], "--update") == 0
    assert json.loads(path.read_text())[gate.this_cpu()] == BASELINE
    assert run_gate(monkeypatch, path, [0.8]) == 0
    assert run_gate(monkeypatch, path, [0.3, 0.8]) == 0
    assert run_gate(monkeypatch, path, [0.3, 0.4]) == 1
    assert "slower in 2 of 2 runs" in capsys.readouterr().out


def test_the_committed_baselines_are_sound() -> None:
    for cpu, ratios in json.loads(gate.BASELINES.read_text()).items():
        assert ratios and all(value > 0 for value in ratios.values()), cpu


def test_refusals_are_ours() -> None:
    assert issubclass(Unavailable, SmolrunError)
