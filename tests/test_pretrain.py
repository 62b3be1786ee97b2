"""Pretraining: recipes, rows, the cache of documents, exact mixtures, runs that are killed, tokenizers, filters."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Peer

import smolrun
from smolrun.errors import ModelFileError, OptionError, OutOfMemory
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels.target import BF16, host_features, runnable
from smolrun.model import machine, memory
from smolrun.model.llama import Llama
from smolrun.text.tokenizer import Tokenizer
from smolrun.train import Batch, tasks
from smolrun.train.data import Corpus, Vocabulary, read_tokenizer, tokens_of
from smolrun.train.data import texts as every_text
from smolrun.train.filter import Head, Reader, keep_best
from smolrun.train.plot import Drawing, draw
from smolrun.train.pretrain import Feed, reweight
from smolrun.train.recipe import Pretrain, Reweight, Source, read_recipe
from smolrun.train.rows import BadRow, Row, files, read_rows
from smolrun.train.run import checkpoints, locked, read_log
from smolrun.train.vocabulary import LEAST, SPECIALS, train_vocabulary
from tiny import make_tiny

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "train").glob("*.toml"))
WORDS = ("the sea is blue and a small cat saw one big red boat on 25 waves of it").split()  # noqa: SIM905

RECIPE = """
task = "pretrain"
evaluate_tokens = 400
[run]
out = "OUT/run"
threads = 1
save_every = 3
evaluate_every = 5
[model]
dim = 64
hidden_dim = 128
n_layers = 1
n_heads = 1
n_kv_heads = 1
[tokenizer]
vocab_size = 300
[sources.prose]
path = "OUT/prose.jsonl"
held_out = 0.1
[sources.sums]
path = "OUT/sums.txt"
held_out = 0.1
[batch]
tokens = 256
pass_tokens = 128
length = 64
[schedule]
peak = 1e-2
[reweight]
strength = 2.0
[[stages]]
tokens = 1500
mixture = { prose = 3, sums = 1 }
[[stages]]
name = "long"
tokens = 1100
length = 100
rope_theta = 50_000
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of 11 steps of a tiny model, with its data."""
    draw = random.Random(3)
    prose = [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(120)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    sums = [f"{a} + {b} = {a + b}" for a, b in (draw.choices(range(100), k=2) for _ in range(90))]
    (tmp_path / "sums.txt").write_text("\n<|endoftext|>\n".join(sums))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path)))
    return path


def read(path: Path, *changes: str) -> Pretrain:
    found = read_recipe(path, {"pretrain": Pretrain}, changes)
    assert isinstance(found, Pretrain)
    return found


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_sound(path: Path) -> None:
    found = read_recipe(path, {name: kind for name, (kind, _) in tasks.TASKS.items()})
    if isinstance(found, Pretrain):
        tokens = sum(stage.tokens for stage in found.stages)
        found.schedule.of(-(-tokens // found.batch.tokens))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("run.evaluate_evry=3", "run: unknown key 'evaluate_evry': did you mean 'evaluate_every'?"),
        ("batch.tokens=many", "batch.tokens = 'many': a whole number expected"),
        ("batch.tokens=1.5", "batch.tokens = 1.5: a whole number expected"),
        ("batch.recompute=1", "batch.recompute = 1: true or false expected"),
        ("batch.length=500", "a length of 500 does not fit a pass of 128 tokens"),
        ("model.base=135m", "either a model to go on from or a shape, not both"),
        ("schedule.kind=linear", "schedule.kind = 'linear': 'wsd' or 'cosine' or 'constant' expected"),
        ("stages.0.mixture.prosa=1", "stages[0].mixture: unknown key 'prosa': did you mean 'prose'?"),
        ("stages.0.tokens=0", "stages.tokens = 0: more than 0 expected"),
        ("sources.prose.held_out=2", "held_out and bad_rows are shares"),
        ("sources.prose.path=${NO_SUCH_NAME}", "the environment variable NO_SUCH_NAME is not set"),
        ("tokenizer.path=x", "either `path` of one that is there, or `vocab_size`"),
        ("task=pretain", "task = 'pretain': 'pretrain' expected"),
        ("nonsense", "KEY=VALUE expected"),
        ("stages.5.tokens=3", "stages.5.tokens: '5': one of 0 to 1 expected"),
        ("stages.x.tokens=3", "'x': one of 0 to 1 expected"),
        ("batch.tokens=inf", "batch.tokens = inf: a whole number expected"),
        ("schedule.peak=nan", "schedule.peak = nan: a number expected"),
        ("schedule.floor=0.1", "schedule.floor: kind = 'wsd' has none"),
        ("schedule.floor=2", "floor from 0 to 1 expected"),
        ("optimiser.clip=-1", "optimiser.clip = -1.0: from 0 expected"),
        ("run.seed=-1", "run.seed = -1: from 0 expected"),
        ("run.threads=0", "run.threads = 0: more than 0 expected"),
        ("run.out=", "run.out = '': text expected"),
        ("model.init_std=0", "model.init_std = 0.0: more than 0 expected"),
        ("stages.0.length=-4", "stages.length = -4: more than 0 expected"),
        ("stages.0.rope_theta=0", "stages.rope_theta = 0: a number from 1 to 1e12 expected"),
        ("stages.0.mixture.prose=inf", "stages[0].mixture.prose = inf: a number expected"),
        ("reweight.most=0.5", "reweight.most = 0.5: a factor from 1 expected"),
        ("evaluate_tokens=0", "evaluate_tokens = 0: more than 0 expected"),
    ],
)
def test_recipes_are_refused_by_name(recipe: Path, change: str, problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        read(recipe, change)


def test_what_a_base_has_is_not_said_again(recipe: Path) -> None:
    """A key that would not be read is refused, as a shape is."""
    table = "\n[model]\nbase = '135m'\nrope_theta = 50_000\n[tokenizer]"
    recipe.write_text(re.sub(r"\n\[model\].*?\n\[tokenizer\]", table, recipe.read_text(), flags=re.S))
    with pytest.raises(OptionError, match="base and rope_theta: either a model to go on from or a shape"):
        read(recipe)


def test_a_recipe_is_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    found = read(recipe, "stages.0.tokens=2e12", "sources.prose.path=${DATA}/x.jsonl")
    assert found.stages[0].tokens == 2_000_000_000_000 and found.sources["prose"].path == "/data/x.jsonl"
    assert found.optimiser.betas == (0.9, 0.95) and found.longest == 100
    recipe.write_text("task = ")
    with pytest.raises(OptionError, match="no TOML"):
        read(recipe)


# ---- rows ------------------------------------------------------------------------------------------------------------


def places(path: Path, *separator: str) -> list[tuple[str, Any]]:
    return [
        (row.where.removeprefix(f"{path}"), row.value if isinstance(row, Row) else row.problem.split(":")[0])
        for row in read_rows(path, *separator)
    ]


def test_text_between_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n<|endoftext|>\nthree<|endoftext|>four\n<|endoftext|>\nfi\xffve\n<|endoftext|>\n\n")
    texts = [(where, value["text"] if isinstance(value, dict) else value) for where, value in places(path)]
    assert texts == [(":1", "one\ntwo"), (":4", "three"), (":4", "four"), (":6", "not UTF-8")]


@pytest.mark.parametrize("mark", ["\n\n", "\n---\n", "\n", "="])
def test_separators_with_line_ends_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    path, texts = tmp_path / "a.txt", ["one", "two b", "three"]
    path.write_text(mark.join(texts))
    for size in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr("smolrun.train.rows.PIECE", size)
        assert [value["text"] for _, value in places(path, mark)] == texts
    assert places(path, mark)[-1][0] == f":{1 + mark.count(chr(10)) * 2}"


def test_a_torn_archive_is_a_bad_row(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(5000))
    for name, data in (("a.jsonl.gz", gzip.compress(lines)[:-9000]), ("b.txt.gz", b"no archive")):
        (tmp_path / name).write_bytes(data)
        rows = list(read_rows(tmp_path / name))
        assert isinstance(rows[-1], BadRow) and "unreadable from a point on" in rows[-1].problem


def test_json_lines_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n\n{"text": \n[1]\n{"a": 1}\n'))
    assert places(path) == [
        (":1", {"text": "x"}),
        (":3", "not JSON"),
        (":4", "list, object expected"),
        (":5", {"a": 1}),
    ]
    path = tmp_path / "b.json"
    path.write_text('[{"a": 1}, 2]')
    assert places(path) == [("[0]", {"a": 1}), ("[1]", "int, object expected")]


def test_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["x", "y", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = [(":0", {"text": "x"}), (":1", {"text": "y"}), (":2", {"text": None})]
    assert places(tmp_path / "a.parquet") == rows
    folder = tmp_path / "set" / "train"  # as `datasets` keeps it
    folder.mkdir(parents=True)
    with pyarrow.OSFile(str(folder / "data-0.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    (file_,) = files(str(folder))
    assert places(file_) == rows
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(OptionError, match="splits train: name one"):
        files(str(tmp_path / "set"))
    for name in ("state.json", "../dataset_dict.json"):
        (folder / name).write_text('{"splits": []}')
        with pytest.raises(OptionError, match=r"save the data set again"):
            files(str((folder / name).parent))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    assert [type(row) for row in read_rows(tmp_path / "b.parquet")] == [BadRow]


def test_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "in/a.jsonl", "c.csv", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in files(str(tmp_path))] == ["b.txt", "a.jsonl"]
    assert [path.name for path in files(str(tmp_path / "**/*.jsonl"))] == ["a.jsonl"]
    for path in ("c.csv", "*.parquet"):
        with pytest.raises(OptionError, match=r"\.parquet"):
            files(str(tmp_path / path))


# ---- documents as ids ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary([" ".join(WORDS)] * 3, LEAST + 20, folder)
    return Vocabulary.of(read_tokenizer(folder))


def test_documents_are_encoded_once(
    recipe: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOLRUN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "prose.jsonl"
    path.write_text(path.read_text() + 'broken\n{"text": ""}\n{"other": 1}\n{"text": "a \\ud800 b"}\n')
    source = Source(path=str(path), held_out=0.2, bad_rows=0.1)
    first = Corpus("prose", source, vocabulary)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:120]]
    for i, text in enumerate(texts):
        assert first.document(i).tolist() == [0, *vocabulary.tokenizer.encode(text), 0]
        assert first.bytes[i] == len(text.encode()) and first.lengths[i] == len(first.document(i)) - 1
    bad = [(row.where.removeprefix(str(path)), row.problem.split(":")[0]) for row in first.bad]
    assert sorted(bad) == [
        (":121", "not JSON"), (":122", "text is empty"), (":123", "no field 'text'"), (":124", "text"),
    ]  # fmt: skip
    assert sorted([*first.learnt, *first.held]) == list(range(120)) and 5 < len(first.held) < 50

    def fails(*_: object) -> None:
        raise AssertionError("encoded again")

    learnt = [texts[i] for i in first.learnt]
    assert list(every_text(source, [])) == learnt  # what a new tokenizer is made of
    monkeypatch.setattr(Tokenizer, "encode", fails)
    path.rename(tmp_path / "moved.jsonl")
    again = Corpus("prose", Source(path=str(tmp_path / "moved.jsonl"), held_out=0.2, bad_rows=0.1), vocabulary)
    assert again.held.tolist() == first.held.tolist() and again.bad[0].where.endswith("moved.jsonl:121")
    with pytest.raises(OptionError, match=r"4 of 124 rows cannot be used .*moved.jsonl:121: not JSON"):
        Corpus("prose", Source(path=str(tmp_path / "moved.jsonl")), vocabulary)
    (tmp_path / "moved.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(AssertionError, match="encoded again"):
        Corpus("prose", Source(path=str(tmp_path / "moved.jsonl")), vocabulary)
    monkeypatch.undo()
    monkeypatch.setenv("SMOLRUN_CACHE_DIR", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))  # nothing half-made stays
    file, source = tmp_path / "prose.txt", Source(path="")
    file.write_text("some words")
    known = set((tmp_path / "cache" / "tokens").iterdir())
    tokens_of(file, source, vocabulary)
    (made,) = set((tmp_path / "cache" / "tokens").iterdir()) - known
    for name in ("ids.bin", "documents.npy", "about.json"):
        (made / name).write_bytes(b"")
        with pytest.raises(OptionError, match="delete it"):
            tokens_of(file, source, vocabulary)


# ---- the order of documents ------------------------------------------------------------------------------------------


class FakeModel:
    """What a feed asks of a model that only has to be fed."""

    def __init__(self) -> None:
        self.config = smolrun.config.ModelConfig(64, 128, 1, 1, 1, 64, 300, 100, 1e4, 1e-5, True)
        self.thetas: list[float] = []

    def rope(self, theta: float) -> None:
        self.thetas.append(theta)


def feed_of(recipe: Pretrain, vocabulary: Vocabulary) -> tuple[Feed, FakeModel]:
    corpora = {name: Corpus(name, source, vocabulary) for name, source in recipe.sources.items()}
    model = FakeModel()
    return Feed(recipe, corpora, model), model  # type: ignore[arg-type]


def flat(batches: list[Batch]) -> list[list[int] | tuple[int, ...]]:
    return [part for b in batches for part in (b.ids.tolist(), b.targets.tolist(), b.lengths)]


def test_budgets_are_exact_and_mixtures_kept(recipe: Path, vocabulary: Vocabulary) -> None:
    found = read(recipe)
    feed, model = feed_of(found, vocabulary)
    longest = max(int(s.corpus.lengths.max()) for s in feed._streams.values())
    steps = [feed.next() for _ in range(6)]
    assert [sum(len(b.ids) for b in step) for step in steps] == [256] * 5 + [1500 - 5 * 256]
    assert all(len(b.ids) <= 128 and max(b.lengths) <= 64 and sum(b.lengths) == len(b.ids) for s in steps for b in s)
    assert feed.used.keys() == {"prose", "sums"} and sum(feed.used.values()) == 1500 == feed.tokens
    assert abs(feed.used["prose"] - 1125) <= longest  # 3 : 1, to a document
    assert [feed.due(step) for step in (5, 6, 7, 11)] == [False, True, False, True]
    assert model.thetas == []
    assert "name" not in feed.facts()
    steps = [feed.next() for _ in range(5)]
    assert feed.facts() == {"stage": 1, "name": "long", "tokens": 2600, "epoch": pytest.approx(feed.epoch, abs=1e-3)}
    assert model.thetas == [50_000.0] and feed.length == 100 and feed.steps == 11
    assert sum(len(b.ids) for s in steps for b in s) == 1100 and feed.tokens == 2600


def test_every_token_is_learnt_once_an_epoch(recipe: Path, vocabulary: Vocabulary) -> None:
    """Parts of documents, put together again, are the documents, each ending in the mark that follows it."""
    found = read(recipe, "stages.0.mixture.sums=0")
    feed, _ = feed_of(found, vocabulary)
    corpus = feed._streams["prose"].corpus
    whole = int(corpus.lengths[corpus.learnt].sum())
    found = read(recipe, "stages.0.mixture.sums=0", f"stages.0.tokens={2 * whole}")
    feed, _ = feed_of(found, vocabulary)
    ids, targets = [], []
    while len(ids) < 2 * whole:
        for batch in feed.next():
            ids += batch.ids.tolist()
            targets += batch.targets.tolist()
    expected = sorted(corpus.document(int(i)).tolist() for i in corpus.learnt)
    for epoch in (slice(0, whole), slice(whole, 2 * whole)):
        documents, document = [], list[int]()
        for i, target in zip(ids[epoch], targets[epoch], strict=True):
            document.append(i)
            if target == 0:
                documents.append([*document, 0])
                document = []
        assert sorted(documents) == expected
    assert ids[:whole] != ids[whole:]  # another order
    assert feed.state()["places"]["prose"]["epoch"] == 2


def test_a_feed_goes_on_where_it_stood(recipe: Path, vocabulary: Vocabulary) -> None:
    found = read(recipe)
    feed, _ = feed_of(found, vocabulary)
    states, steps = [], []
    for _ in range(11):
        states.append(json.loads(json.dumps(feed.state())))
        steps.append(flat(feed.next()))
    for at in range(11):
        feed, model = feed_of(found, vocabulary)
        feed.restore(states[at])
        assert flat(feed.next()) == steps[at]
        assert bool(model.thetas) == (at >= 6)


def test_other_seed_other_order(recipe: Path, vocabulary: Vocabulary) -> None:
    one, _ = feed_of(read(recipe), vocabulary)
    other, _ = feed_of(read(recipe, "run.seed=1"), vocabulary)
    assert flat(one.next()) != flat(other.next())


def test_short_documents_can_be_left_out(recipe: Path, vocabulary: Vocabulary) -> None:
    source = read(recipe).sources["prose"]
    corpus = Corpus("prose", Source(path=source.path, least_tokens=40), vocabulary)
    assert 0 < corpus.left_out < 100 and corpus.lengths[corpus.learnt].min() >= 40
    with pytest.raises(OptionError, match="no documents to learn"):
        Corpus("prose", Source(path=source.path, least_tokens=10_000), vocabulary)


def test_a_mixture_follows_what_is_learnt_worst() -> None:
    bits = {"a": 1.0, "b": 2.0}
    found = reweight({"a": 1.0, "b": 1.0, "c": 2.0}, bits, Reweight(strength=0.5))
    ratio = math.exp(0.5 * 1.0)
    assert found["b"] / found["a"] == pytest.approx(ratio) and sum(found.values()) == pytest.approx(1)
    found = reweight({"a": 1.0, "b": 0.0}, bits, Reweight(strength=9.0, targets={"a": 0.0}))
    assert found == {"a": 1.0, "b": 0.0}
    found = reweight({"a": 1.0, "b": 1.0}, bits, Reweight(strength=9.0, most=3.0))
    assert found["b"] / found["a"] == pytest.approx(9)  # one times 3, the other a third


# ---- runs ------------------------------------------------------------------------------------------------------------


def curve(out: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(out / "log.jsonl")]


@pytest.fixture
def done(recipe: Path, tmp_path: Path) -> Path:
    """A run that nothing disturbed."""
    with tasks.prepare(recipe) as plan:
        assert plan.run()
    return tmp_path / "run"


# A process that kills itself at the n-th thing that touches the disk or ends a step
KILLED = """
import os, signal, sys
from pathlib import Path
from smolrun.train import run, tasks
left = int(sys.argv[2])
def soon(function):
    def wrapper(*arguments, **named):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return wrapper
for name in ("fsync", "rename", "replace"): setattr(os, name, soon(getattr(os, name)))
run.Log.write = soon(run.Log.write)
run.Trainer.step = soon(run.Trainer.step)
with tasks.prepare(Path(sys.argv[1])) as plan:
    assert plan.run()
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_anywhere_the_curve_is_the_same(recipe: Path, done: Path, tmp_path: Path) -> None:
    whole_curve, weights = curve(done), (done / "model" / "model.safetensors").read_bytes()
    assert [line["step"] for line in whole_curve if line["kind"] == "step"] == [*range(1, 12)]
    assert [line["step"] for line in whole_curve if line["kind"] == "evaluation"] == [5, 6, 10, 11]
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/killed"))
    draw, killed = random.Random(5), list[int]()
    while True:
        at = draw.randint(2, 25) if len(killed) < 8 else 10**6
        child = subprocess.run([sys.executable, "-c", KILLED, str(recipe), str(at)], capture_output=True, text=True)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
        killed.append(at)
    assert len(killed) >= 5
    assert curve(tmp_path / "killed") == whole_curve
    assert (tmp_path / "killed" / "model" / "model.safetensors").read_bytes() == weights
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
    assert len(checkpoints(tmp_path / "killed")) == 2


def test_what_a_run_leaves(done: Path) -> None:
    lines = curve(done)
    assert lines[-2]["tokens"] == 2600 and lines[-2]["stage"] == 1
    assert lines[-1]["loss"] < 4 and lines[-1]["prose.bits_per_byte"] > 0
    mixture = next(line["mixture"] for line in lines if "mixture" in line)  # after the first stage, by the rule
    bits = {name: lines[7][f"{name}.bits_per_byte"] for name in ("prose", "sums")}
    assert lines[7]["mixture"] == mixture == reweight({"prose": 1.0, "sums": 1.0}, bits, Reweight(strength=2.0))
    with open_checkpoint(done / "model") as checkpoint:
        assert checkpoint.config.rope_theta == 50_000 and checkpoint.config.max_positions == 100
    with smolrun.load(done / "model", threads=1) as llm:
        assert llm.generate("the sea", max_tokens=8).ids


def test_stopped_and_gone_on_from(recipe: Path, done: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "stopped", list[int]()
    for last in (4, 4, 7, 99):
        with tasks.prepare(recipe, [f"run.out={out}"]) as plan:

            def listen(facts: dict[str, Any]) -> None:
                if facts["kind"] == "step":
                    steps.append(facts["step"])

            assert plan.run(listen=listen, stop=lambda last=last: steps[-1] >= last) == (last == 99)
    assert steps == [1, 2, 3, 4, 5, 6, 7, *range(8, 12)]
    assert curve(out) == curve(done)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named_and_gone_on_from(
    recipe: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"run.out={tmp_path}/full"]

    def fails(file: object, values: np.ndarray) -> None:
        with open("/dev/full", "wb", 0) as full:
            values.tofile(full)

    with tasks.prepare(recipe, changes) as plan:
        monkeypatch.setattr(np, "save", fails)
        with pytest.raises(OSError, match=r"step-00000003 cannot be written .*make room"):
            plan.run()
    monkeypatch.undo()
    assert not list((tmp_path / "full" / "checkpoints").iterdir())
    with tasks.prepare(recipe, changes) as plan:
        assert plan.run()
    assert curve(tmp_path / "full") == curve(done)


HAS_BF16 = runnable()[0].dot == BF16.dot and set(BF16.needs) <= host_features()


@pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16")
def test_products_in_bf16(recipe: Path, done: Path, tmp_path: Path) -> None:
    changes = [f"run.out={tmp_path}/bf16", "batch.precision=bf16"]
    with tasks.prepare(recipe, changes) as plan:
        assert plan.run()
    exact, rounded = (
        [line["loss"] for line in curve(out) if line["kind"] == "step"] for out in (done, tmp_path / "bf16")
    )
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


def test_another_recipe_does_not_go_on(recipe: Path, done: Path, tmp_path: Path) -> None:
    with tasks.prepare(recipe, ["schedule.peak=2e-2"]) as plan:
        with pytest.raises(OptionError, match=r"holds a run with schedule.peak = 0.01, here it is 0.02.*--fresh"):
            plan.run()
        assert plan.run(fresh=True)
    with tasks.prepare(recipe, ["run.save_every=100", "schedule.peak=2e-2"]) as plan:
        with locked(done), pytest.raises(OptionError, match="another process trains there"):
            plan.run()
        (checkpoints(done)[-1] / "values.npy").write_bytes(b"")
        with pytest.raises(OptionError, match="a damaged checkpoint"):
            plan.run()
    with open(tmp_path / "sums.txt", "a") as file:
        file.write("\n<|endoftext|>\n1 + 1 = 2")
    changed = pytest.raises(OptionError, match=r"holds a run with data.sums = ")
    with changed, tasks.prepare(recipe, ["run.out=" + str(done), "schedule.peak=2e-2"]) as plan:
        plan.run()


def test_a_tokenizer_is_made_anew_for_another_size_or_other_texts(recipe: Path, tmp_path: Path) -> None:
    made = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    for changes, size in (([], 300), (["tokenizer.vocab_size=290"], 290), ([], 300)):
        with tasks.prepare(recipe, changes) as plan:
            assert plan.trainer.model.config.vocab_size == size
    before = made.read_bytes()
    (tmp_path / "prose.jsonl").write_text('{"text": "xyzzy xyzzy plugh plugh"}\n' * 200)
    with tasks.prepare(recipe, ["sources.prose.held_out=0"]):
        assert made.read_bytes() != before


def test_a_lost_log_begins_anew(recipe: Path, tmp_path: Path) -> None:
    with tasks.prepare(recipe) as plan:
        plan.run(stop=lambda: plan.trainer.optimiser.steps >= 4)
    (tmp_path / "run" / "log.jsonl").unlink()
    with tasks.prepare(recipe) as plan:
        assert plan.run()
    assert [line["step"] for line in curve(tmp_path / "run") if line["kind"] == "step"] == [*range(5, 12)]


def test_a_base_is_not_where_the_result_goes_and_stays_the_same(recipe: Path, tmp_path: Path) -> None:
    tiny, text = make_tiny(tmp_path / "base", n_layers=1), recipe.read_text()
    table = f'[model]\nbase = "{tiny.gguf}"\n[sources.prose]'
    recipe.write_text(re.sub(r"\[model\].*?\[sources.prose\]", table, text, flags=re.S))
    with tasks.prepare(recipe) as plan:
        plan.run(stop=lambda: True)
    make_tiny(tmp_path / "base", n_layers=1, seed=1)
    with tasks.prepare(recipe) as plan, pytest.raises(OptionError, match=r"holds a run with data.model.base = "):
        plan.run()
    tiny.folder.rename(tmp_path / "run" / "model")
    there = pytest.raises(OptionError, match="the result would be written there")
    with there, tasks.prepare(recipe, [f"model.base={tmp_path}/run/model"]):
        pass


def test_too_little_memory_is_said_before(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Machine, "available", lambda self: machine.Room(10_000_000, "a test"))
    less = "What takes less: a smaller batch.pass_tokens, batch.recompute"
    with pytest.raises(OutOfMemory, match=less), tasks.prepare(recipe):
        pass
    with tasks.prepare(recipe, force=True) as plan:
        assert plan.memory > memory.PROCESS and plan.rate() > 0


def test_going_on_with_a_model(recipe: Path, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base", n_layers=1, rope_theta=10_000.0)
    text = recipe.read_text()
    text = re.sub(
        r"\[model\].*?\[sources.prose\]", f'[model]\nbase = "{tiny.folder}"\n[sources.prose]', text, flags=re.S
    )
    recipe.write_text(text)
    with tasks.prepare(recipe, ["schedule.peak=1e-3", "schedule.kind=constant"]) as plan:
        model = plan.trainer.model
        before = model.parameters.get("token_embd.weight")
        np.testing.assert_array_equal(before, tiny.weights["token_embd.weight"])
        assert plan.run()
        assert (model.parameters.get("token_embd.weight") != before).any()


def test_the_curve_is_drawn(done: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (done / "plot.svg").unlink()
    with open(done / "log.jsonl", "a") as log:
        log.write('{"kind": "step", "torn')
    draw(done)
    svg = (done / "plot.svg").read_text()
    assert svg.startswith("<?xml") and svg.count("<path") > 10
    draw(tmp_path)  # no steps yet, no drawing
    assert not (tmp_path / "plot.svg").exists()


def test_without_matplotlib_it_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    drawing = Drawing(tmp_path)
    assert [bool(drawing.told({"kind": "step"})) for _ in range(3)] == [True, False, False]


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "smolrun.cli", "train", *arguments]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a child")
def test_ctrl_c_saves_and_stops(recipe: Path, tmp_path: Path) -> None:
    long = ["--set", "stages.1.tokens=100_000", "--set", "run.save_every=100_000"]
    child = command("pretrain", str(recipe), *long)
    assert child.stderr is not None
    said = ""
    while not said.startswith("step"):
        said = child.stderr.readline()
        assert said, "ended"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "the same command goes on: smolrun train pretrain" in errors
    (saved,) = checkpoints(tmp_path / "run")
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["step"] == int(saved.name.removeprefix("step-"))


def test_check_finds_what_is_amiss(recipe: Path, tmp_path: Path) -> None:
    with open(tmp_path / "prose.jsonl", "a") as file:
        file.write("broken\n")
    out, errors = command("check", str(recipe)).communicate(timeout=60)
    assert out == "nothing amiss\n"
    for part in ("2,600 tokens in 11 steps", "memory", "time", f"! {tmp_path}/prose.jsonl:121: not JSON"):
        assert part in errors
    assert not (tmp_path / "run" / "log.jsonl").exists()
    child = command("check", str(recipe), "--set", "run.sed=1")
    assert "unknown key 'sed': did you mean 'seed'?" in child.communicate(timeout=60)[1] and child.returncode == 2


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    texts = [" ".join(random.Random(i).choices(WORDS, k=30)) + f" {i * 37} naïve" for i in range(50)]
    assert train_vocabulary(texts, 320, tmp_path) == 320
    mine = Tokenizer.from_source(read_tokenizer(tmp_path))
    peer = Peer.from_file(str(tmp_path / "tokenizer.json"))
    assert [mine.specials[special] for special in SPECIALS] == [*range(17)]
    for text in (*texts, "zoë 12345 \n\t <|endoftext|>", bytes(range(256)).decode("latin-1")):
        assert mine.decode(mine.encode(text)) == text
        if "<|" not in text:
            assert mine.encode(text) == peer.encode(text).ids
    assert mine.encode("12") == [*mine.encode("1"), *mine.encode("2")]
    assert len(mine.encode(texts[0])) < len(texts[0]) / 2
    with pytest.raises(OptionError, match="273"):
        train_vocabulary(texts, 100, tmp_path)
    with pytest.raises(smolrun.SmolrunError, match="no such file"):
        read_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError):
        read_tokenizer(tmp_path)


def test_no_text_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": " "}\n')
    child = command("tokenizer", str(tmp_path), "--out", str(tmp_path / "out"))
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and "no text there" in errors and "bad.jsonl:1: text is empty" in errors
    assert not (tmp_path / "out").exists()


# ---- filters ---------------------------------------------------------------------------------------------------------


def test_a_head_is_the_ridge_regression_that_unseen_labels_choose() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 12))
    y = x[:, 0] * 3 - x[:, 3] + draw.normal(size=60) * 0.3 + 5
    head = Head.fit(x, y)
    z = (x - x.mean(axis=0)) / x.std(axis=0)

    def fitted(rows: np.ndarray) -> np.ndarray:
        a = np.column_stack([z[rows], np.ones(len(rows))])
        penalty = np.diag([head.penalty] * 12 + [0])
        return np.linalg.solve(a.T @ a + penalty, a.T @ y[rows])

    everything = np.arange(60)
    solution = fitted(everything)
    np.testing.assert_allclose(head.score(x), z @ solution[:12] + solution[12])
    unseen = []
    for i in everything:
        w = fitted(np.delete(everything, i))
        unseen.append(z[i] @ w[:12] + w[12])
    assert head.correlation == pytest.approx(np.corrcoef(unseen, y)[0, 1], abs=1e-6) and head.correlation > 0.9
    with pytest.raises(OptionError, match="8 or more"):
        Head.fit(x[:5], y[:5])


def test_the_best_documents_are_kept(tmp_path: Path) -> None:
    """Sums among prose, by the hidden states of random weights."""
    tiny, draw = make_tiny(tmp_path / "base", n_layers=1), random.Random(1)

    def row(i: int) -> dict[str, Any]:
        if i % 3 == 0:
            return {"id": i, "text": " + ".join(str(draw.randint(0, 999)) for _ in range(12)), "label": 1}
        return {"id": i, "text": " ".join(draw.choices(WORDS[:-4], k=20)), "label": 0}

    rows = [row(i) for i in range(90)]
    for name, part in (("known", rows[:45]), ("other", rows[45:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in part) + "broken\n" * (name == "other")
        )
    with open_checkpoint(tiny.folder) as checkpoint:
        model = Llama(checkpoint, threads=1, context=256)
        reader = Reader(model, Tokenizer.from_source(checkpoint.tokenizer), 128)
    paths = str(tmp_path / "other.jsonl"), str(tmp_path / "known.jsonl"), tmp_path / "kept.jsonl"
    try:
        kept = keep_best(reader, *paths, share=1 / 3)
        np.testing.assert_array_equal(reader.features("the sea"), reader.features("the sea"))
    finally:
        model.close()
    found = [json.loads(line) for line in paths[2].read_text().splitlines()]
    assert (kept.documents, kept.kept) == (45, 15) and [row["label"] for row in found] == [1] * 15
    assert kept.head.correlation > 0.9 and min(row["score"] for row in found) == pytest.approx(kept.threshold, abs=1e-4)
    assert [bad.where for bad in kept.bad] == [f"{paths[0]}:46"]


@pytest.mark.parametrize("label", [None, math.nan, math.inf, True, "1"])
def test_a_label_is_a_number(label: object, tmp_path: Path) -> None:
    class Constant:
        def features(self, text: str) -> np.ndarray:
            return np.zeros(4)

    path = tmp_path / "known.jsonl"
    for rows, problem in ((0, "0 labelled"), (9, "9 labelled documents with 1 different"), (10, "a number expected")):
        labels = [1] * min(rows, 9) + [label] * (rows > 9)
        path.write_text("".join(json.dumps({"text": "a", "label": x}) + "\n" for x in labels))
        with pytest.raises(OptionError, match=problem):
            keep_best(Constant(), str(path), str(path), tmp_path / "kept.jsonl", share=0.5)  # type: ignore[arg-type]
