"""What the doctor finds on machines made of files, and how the command says it."""

import json
from pathlib import Path

import pytest

from fake_machine import CPU, cores, tree
from smolrun import doctor
from smolrun.cli import main
from smolrun.kernels import target
from smolrun.model.machine import Machine
from tiny import make_tiny

PI_4 = {
    **cores(max_freq=(1_800_000,) * 4),
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nFeatures\t: fp asimd crc32 sve\nCPU part\t: 0xd08\n\n" for n in range(4)
    ),
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/meminfo": "MemAvailable:    3400000 kB",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "ondemand",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "61000",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny(tmp_path, fmt="Q4_0").gguf


def problems(here: Machine, model: Path) -> dict[str, str]:
    """Problem -> command, without those of the machine that the tests run on."""
    found = {f.problem: f.mend for f in doctor.examine(here, model).findings}
    return {problem: mend for problem, mend in found.items() if mend != "smolrun warmup"}


def test_a_sound_pi(tmp_path: Path, model: Path) -> None:
    here = tree(tmp_path / "pi", PI_4)
    report = doctor.examine(here, model)
    facts = report.facts
    assert report.ok and problems(here, model) == {}
    assert facts["system"]["device"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts["cpu"] == {
        "name": "Cortex-A72", "usable": 4, "physical_cores": 4, "not_used": {"sve": doctor.UNUSED["sve"]},
        "temperature": 61.0, "governor": "ondemand",
    }  # fmt: skip
    assert facts["threads"] == {"count": 4, "why": "4 physical cores"}
    assert facts["memory"] == {
        "available": 3_481_600_000, "says": "MemAvailable in /proc/meminfo", "huge_pages": "madvise",
    }  # fmt: skip
    assert facts["kernels"]["tier"] in target.TIERS and facts["kernels"]["runs"] == [t.name for t in target.runnable()]
    assert facts["packages"]["numpy"] and json.dumps(facts)


@pytest.mark.parametrize(
    ("file", "text", "problem", "mend"),
    [
        ("proc/meminfo", "MemAvailable: 2000 kB", "are available", "smaller model"),
        ("sys/class/thermal/thermal_zone0/temp", "86000", "86 degrees", "heat sink"),
        (f"{CPU}/cpu0/cpufreq/scaling_governor", "powersave", "powersave", "echo ondemand"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "huge pages", "echo madvise"),
    ],
)
def test_what_is_amiss_has_its_mend(file: str, text: str, problem: str, mend: str, tmp_path: Path, model: Path) -> None:
    ((found, command),) = problems(tree(tmp_path / "pi", PI_4 | {file: text}), model).items()
    assert problem in found and mend in command


def test_intels_powersave_is_no_brake(tmp_path: Path, model: Path) -> None:
    files = {f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave", f"{CPU}/cpu0/cpufreq/scaling_driver": "intel_pstate"}
    assert problems(tree(tmp_path / "pc", PI_4 | files), model) == {}


def test_tiers(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tree(tmp_path / "pi", PI_4)
    worst = target.runnable()[-1].name
    monkeypatch.setenv("SMOLRUN_TIER", worst)
    if worst != target.runnable()[0].name:
        assert "unset SMOLRUN_TIER" in problems(here, model).values()
        assert doctor.examine(here, model).facts["kernels"]["why"] == f"SMOLRUN_TIER={worst}"
    monkeypatch.setenv("SMOLRUN_TIER", "mmx")
    report = doctor.examine(here, model)
    assert not report.ok and report.findings[0].mend == "unset SMOLRUN_TIER"
    monkeypatch.delenv("SMOLRUN_TIER")
    monkeypatch.setattr(target, "host_features", frozenset)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    assert "avx512vnni" in doctor.examine(here, model).facts["kernels"]["lacks"]["avx512vnni"]


def test_packages_that_are_not_there(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numba", "tokenizers") else real(name))
    report = doctor.examine(tree(tmp_path / "pi", PI_4), model)
    assert not report.ok and report.findings[0].mend == "pip install tokenizers"
    assert "pip install numba" in [finding.mend for finding in report.findings]


def test_settings_and_models_that_cannot_be(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tree(tmp_path / "pi", PI_4)
    monkeypatch.setenv("SMOLRUN_CACHE_SIZE", "much")
    report = doctor.examine(here, model)
    assert (
        not report.ok and report.findings[0].mend == "unset SMOLRUN_CACHE_SIZE" and "weights" in report.facts["cache"]
    )
    monkeypatch.delenv("SMOLRUN_CACHE_SIZE")
    model.write_bytes(model.read_bytes()[:100])
    report = doctor.examine(here, model)
    assert not report.ok and report.findings[0].mend == "" and model.name in report.findings[0].problem


def test_a_damaged_kernel_is_told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{doctor.load.fingerprint('team')}-{target.choose().name}"
    monkeypatch.setattr(doctor.load, "cache_folders", lambda: iter([tmp_path]))
    (tmp_path / name).mkdir()
    (tmp_path / name / "team_run.img").write_bytes(b"no image")
    assert "smolrun cache clear --kernels" in problems(tree(tmp_path / "pi", PI_4), model).values()


def test_a_damaged_bundle_is_named_and_nothing_of_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle.json").write_text("{")
    monkeypatch.setattr(doctor.bundle, "folder", lambda: tmp_path)
    report = doctor.examine(tree(tmp_path / "pi", PI_4))
    assert not report.ok and report.facts == {} and "bundle.json cannot be read" in report.findings[0].problem


def test_the_command(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        return main(["doctor", str(model), *arguments]), capsys.readouterr().out

    code, out = run()
    assert code == 0 and "kernels\n  tier" in out and str(model) in out
    monkeypatch.setenv("SMOLRUN_TIER", "mmx")
    code, out = run("--json")
    document = json.loads(out)
    assert code == 1 and document["facts"]["kernels"]["tier"] is None and document["findings"][0]["error"]
    code, out = run()
    assert code == 1 and "x SMOLRUN_TIER=mmx" in out and "-> unset SMOLRUN_TIER" in out
    monkeypatch.setenv("COLUMNS", "60")
    assert max(len(line) for line in run()[1].splitlines() if "/" not in line) <= 60
