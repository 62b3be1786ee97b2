"""Guesses, heat, several devices: arithmetic, refusals and pictures; what is measured is not asserted."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from smolrun import bench
from smolrun.cli import main
from smolrun.errors import OptionError
from smolrun.measure import chart, results, speculation, sustained
from smolrun.measure.sustained import Sample
from smolrun.model.machine import Machine
from test_bench import REPORT, Recorder
from tiny import make_tiny

DEVICE = {"name": "Raspberry Pi 5", "cpu": "Cortex-A76", "system": "Linux"}
SAMPLES = (
    Sample(1.0, 100, 100.0, 50.0, 2.4e9, 5.0),
    *(Sample(float(at), 100, 100.0 - at, 50.0 + at, 2.4e9, 5.0) for at in range(2, 20)),
    Sample(20.0, 100, 80.0, 85.0, 1.8e9, 4.0),
)
RUN = sustained.Report("m.gguf", "Q4_0", "dotprod", 4, "RAPL packages", SAMPLES, DEVICE)


# ---- a device as it heats --------------------------------------------------------------------------------------------


def test_figures_of_a_run() -> None:
    found = RUN.figures()
    assert found["first"] == 99.0 and found["last"] == 80.5 and found["kept"] == round(80.5 / 99.0, 3)
    assert found["tokens"] == 2000 and found["celsius"] == 85.0 and found["joules_per_token"] == round(99 / 2000, 4)
    bare = replace(RUN, samples=tuple(Sample(s.at, s.tokens, s.tokens_per_s) for s in SAMPLES)).figures()
    assert (bare["celsius"], bare["joules_per_token"], bare["watts"]) == (None, None, None)


def test_reports_of_a_run() -> None:
    table = RUN.table()
    assert "81% kept" in table and "85 degrees" in table and "0.050 J a token" in table and "RAPL packages" in table
    bare = replace(RUN, samples=tuple(Sample(s.at, s.tokens, s.tokens_per_s) for s in SAMPLES))
    assert "no RAPL counter" in bare.table()
    assert len(list(csv.DictReader(io.StringIO(RUN.to_csv())))) == 20
    long = replace(RUN, samples=SAMPLES * 30)
    assert len(long.table().splitlines()) < 26


def test_a_counter_that_begins_anew() -> None:
    assert sustained.used((5.0, 100.0), (7.5, 100.0)) == 2.5
    assert sustained.used((99.0, 100.0), (1.0, 100.0)) == 2.0
    assert sustained.used((99.0, 0.0), (1.0, 0.0)) is None  # nobody says where it does


@dataclass(frozen=True)
class Metered(Machine):
    """A machine whose RAPL counter, or battery, says something new at every look."""

    rapl: Iterator[float] = field(default_factory=lambda: iter(()))
    battery: float | None = None

    def joules(self) -> dict[str, tuple[float, float]]:
        return {"intel-rapl:0": (now, 1000.0)} if (now := next(self.rapl, None)) is not None else {}

    def watts(self) -> float | None:
        return self.battery


@pytest.mark.parametrize(
    ("machine", "energy", "joules"),
    [
        ({"rapl": (990.0, 999.0, 4.0, 8.0, 12.0)}, "RAPL packages", [9.0, 5.0, 4.0]),
        ({"battery": 3.0}, "battery, the whole device", [3.0, 3.0, 3.0]),
        ({"rapl": (990.0, 999.0), "battery": 3.0}, "RAPL packages", [9.0, None, None]),  # one kind in a run
        ({}, "", [None, None, None]),
    ],
)
def test_samples(
    machine: dict[str, Any], energy: str, joules: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole stretches of at least a second, until the time is over; energy from what there is."""
    machine |= {"rapl": iter(machine["rapl"])} if "rapl" in machine else {}
    monkeypatch.setattr(sustained, "seconds", lambda *_, **__: 0.4)
    ticks = count()  # begin, then a start and two ends of each sample: a clock that is 1 s on at every look
    lines: list[str] = []
    found, source = sustained.measure(
        Recorder(), [*range(20)], 6.0, Metered(tmp_path, **machine), lambda: float(next(ticks)), lines.append
    )  # type: ignore[arg-type]
    assert source == energy and [s.joules for s in found][:2] == joules[:2]
    assert all(s.tokens == 30 and s.tokens_per_s == pytest.approx(25.0) for s in found) and found[-1].at >= 6.0
    assert len(lines) == len(found)


def test_a_whole_run(tmp_path: Path) -> None:
    report = sustained.run(make_tiny(tmp_path, fmt="Q4_0").gguf, duration=0.05, threads=1)
    assert report.samples and report.table() and json.loads(report.to_json())["kind"] == "sustained"
    with pytest.raises(OptionError, match="more than 0"):
        sustained.run(tmp_path, duration=0)


# ---- guesses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [False, True])
def test_guesses_on_real_prompts(draft: bool, tmp_path: Path) -> None:
    """A draft that is the model itself guesses right; lookup guesses; both give the same ids, or it raises."""
    path = make_tiny(tmp_path, fmt="Q8_0").gguf
    how: dict[str, Any] = {"draft": path} if draft else {"speculate": "lookup"}
    report = speculation.run(path, **how, tokens=24, repeats=1, threads=1)
    assert {row.test for row in report.rows} <= speculation.prompts().keys() and len(report.rows) > 3
    assert all(len(row.plain) == len(row.guessed) == 1 and 0 <= row.right <= row.guesses for row in report.rows)
    assert report.how == ("draft tiny.gguf" if draft else "lookup") and report.ratio > 0
    assert "same ids" in report.table() and len(report.to_csv().splitlines()) == 1 + len(report.rows)
    assert json.loads(report.to_json())["kind"] == "speculation"


def test_guessing_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing guesses"):
        speculation.run(tmp_path)
    with pytest.raises(OptionError, match="0 repeats"):
        speculation.run(tmp_path, speculate="lookup", repeats=0)


def test_figures_of_guesses() -> None:
    """The machine was half as fast in the second turn: the ratio is that of the pairs."""
    row = speculation.Row("why", 100, (50.0, 25.0, 60.0), (75.0, 40.0, 96.0), 40, 30)
    figures = row.figures()
    assert (figures["ratio"], figures["accepted"], figures["plain_moved"]) == (1.6, 0.75, 1.4)
    none = replace(row, guesses=0, right=0)
    assert none.figures()["accepted"] is None
    both = speculation.Report("m", "Q4_0", "avx2", 1, "lookup", (row, replace(none, guessed=row.plain)))
    assert both.ratio == pytest.approx(4 / (2 / 1.6 + 2))
    assert "140%" in both.table()


# ---- several devices -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The same model on two devices, and one of them for minutes."""
    speed = json.loads(replace(REPORT, device=DEVICE).to_json())
    slower = json.loads(json.dumps(speed))
    slower["rows"][1]["tokens_per_s"] /= 4
    documents = {"pi": speed, "phone": slower, "long": json.loads(RUN.to_json())}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return [tmp_path / f"{name}.json" for name in documents]


def test_devices_side_by_side(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", *map(str, files[:2])]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "tg128" in line)
    assert line.split() == ["tg128", "2", "100.0", "1.00x", "25.0", "0.25x"]
    assert "pi: tiny.gguf on Raspberry Pi 5, Cortex-A76" in out and "the same bits" in out
    document = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(document | {"logits_hash": "f" * 16}))
    assert main(["bench", "compare", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "DIFFERENT BITS" not in out  # another model is among them
    assert "long: 81% of the speed kept after 20 s, 0.050 J a token (RAPL packages)" in out
    assert main(["bench", "compare", *map(str, files[:2])]) == 0
    assert "DIFFERENT BITS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, "{}", '{"kind": "speed", "rows": []}', '{"kind": "x", "rows": [{}]}']
)
def test_what_is_no_result_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert main(["bench", "compare", str(tmp_path / "a.json")]) == 2
    assert "no result of `smolrun bench --format json`" in capsys.readouterr().err


HOSTILE = (None, True, -1, 10**400, float("nan"), float("inf"), "x", [], {}, [1])


def test_results_with_anything_in_them(files: list[Path], tmp_path: Path) -> None:
    """Each value of each file is something else, or is not there: refused by name, or drawn."""

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            if isinstance(inside, dict | list):
                yield from places(inside)

    bent, refused = tmp_path / "bent.json", 0
    for path in (files[0], files[2]):
        document = json.loads(path.read_text())
        document["samples"] = document.get("samples", [])[:2]
        for holder, key in places(document):
            was = holder[key]
            for value in HOSTILE:
                holder[key] = value
                bent.write_text(json.dumps(document))
                try:
                    found = results.read([bent, files[1]])
                except OptionError as error:
                    refused += "no result" in str(error)
                    continue
                results.table(found), ElementTree.fromstring(results.svg(found)), results.html(found)
            holder[key] = was
    assert refused > 100


def test_names_that_cannot_be_printed(files: list[Path]) -> None:
    document = json.loads(files[0].read_text()) | {"model": "\x1b[31m\0\ud800<b>"}
    found = [results.parse("\x07", json.dumps(document))]
    assert ElementTree.fromstring(results.svg(found)) is not None
    assert "\x1b" not in results.table(found) and "<b>" not in results.html(found)


def test_files_of_one_name_stay_apart(files: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text(files[0].read_text())
    found = results.read([tmp_path / "a" / "r.json", tmp_path / "b" / "r.json"])
    assert [result.label for result in found] == [str(tmp_path / "a" / "r"), str(tmp_path / "b" / "r")]


def test_pictures(files: list[Path], tmp_path: Path) -> None:
    found = results.read(files)
    picture = ElementTree.fromstring(results.svg(found))
    texts = [element.text or "" for element in picture.iter() if element.tag.endswith("text")]
    assert texts[0] == "tiny.gguf, m.gguf"
    assert {"tokens per second", "degrees Celsius", "GHz", "pi", "phone", "long", "tg128, 2 threads"} <= set(texts)
    bars = [e for e in picture.iter() if e.tag.endswith("rect") and e.get("height") == str(chart.BAR - 2)]
    assert len(bars) == 8 and float(bars[4].get("width", 0)) / float(bars[6].get("width", 1)) == pytest.approx(4)
    assert len([e for e in picture.iter() if e.tag.endswith("polyline")]) == 3
    target = tmp_path / "report.html"
    assert main(["bench", "compare", *map(str, files), "--format", "html", "-o", str(target)]) == 0
    page = target.read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")


def test_names_in_a_picture_are_no_markup() -> None:
    text = chart.svg("<b>", [chart.Bars("&", [("<x>", {"a&b": 1.0})])])
    assert ElementTree.fromstring(text) is not None and "<b>" not in text and "<x>" not in text


def test_a_report_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run", lambda *_, **__: REPORT)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for shape in ("html", "svg"):
        target = tmp_path / f"r.{shape}"
        assert main(["bench", str(tmp_path / "m.gguf"), "--format", shape, "-o", str(target)]) == 0
        assert "<svg" in target.read_text() and "llama.cpp" in target.read_text()
