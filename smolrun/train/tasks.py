"""From a recipe to a run that is ready: what every task is put together from, and what it will take.

>>> with prepare(Path("recipe.toml"), task="pretrain") as plan:                       # doctest: +SKIP
...     print(plan.facts, plan.memory, plan.rate())
...     plan.run()
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolrun.config import ModelConfig
from smolrun.errors import OptionError, OutOfMemory
from smolrun.export import write_folder
from smolrun.files.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from smolrun.files.peft import read_adapter, write_adapter
from smolrun.files.sources import resolve
from smolrun.files.whole import whole
from smolrun.kernels.block import HEAD_DIM, PAGE
from smolrun.kernels.panels import ROWS
from smolrun.model import machine, memory, weights
from smolrun.session import model_digest
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer
from smolrun.train import plot
from smolrun.train.adapters import LoRA
from smolrun.train.data import (
    Corpus,
    Progress,
    Vocabulary,
    key_of,
    read_tokenizer,
    texts,
    tokenizer_digest,
)
from smolrun.train.examples import Encoder, examine
from smolrun.train.model import Model, buffer_sizes
from smolrun.train.objective import DPO
from smolrun.train.optimiser import AdamW
from smolrun.train.pretrain import Feed as Documents
from smolrun.train.recipe import Dpo, Pretrain, Recipe, Sft, Tune, read_recipe
from smolrun.train.rows import BadRow, files
from smolrun.train.run import Facts, Feed, Loop, discard, identity_of
from smolrun.train.trainer import Trainer
from smolrun.train.tune import Feed as Tuned
from smolrun.train.tune import PairFeed, held_out_loss
from smolrun.train.vocabulary import train_vocabulary

# what may change between two parts of a run
FREE = ("run.out", "run.save_every", "run.keep_last", "run.threads")


@dataclass
class Plan:
    """A run that is ready to begin.

    Attributes:
        tokens: that the whole run reads.
        facts: (what, how much) for people: the model, the data, ...
        warnings: bad rows and the like.
        memory: bytes that it takes, see `training_bytes`.
        export: writes the result into a folder.
        data: name -> digest: a run goes on only with the same.
    """

    recipe: Recipe
    trainer: Trainer
    feed: Feed
    tokens: int
    memory: int
    export: Callable[[Path], object]
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    result_name: str = "model"

    @property
    def result(self) -> Path:
        """Where the model, or its adapter, is written."""
        return self.recipe.run.out / self.result_name

    def rate(self) -> float:
        """Tokens a second, from a first pass that is then forgotten."""
        before, parameters = json.loads(json.dumps(self.feed.state())), self.trainer.model.parameters
        batch = self.feed.next()[:1]
        for _ in range(2):  # the first one touches the memory
            began = time.perf_counter()
            self.trainer.objective(self.trainer.model, batch)
            seconds = time.perf_counter() - began
            if seconds > 5:
                break
        parameters.gradients[:] = 0
        self.feed.restore(before)
        return sum(len(b.ids) for b in batch) / seconds

    def run(
        self,
        *,
        fresh: bool = False,
        listen: Callable[[Facts], object] = lambda facts: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """All steps, then the result; False if it was stopped before the end.

        Raises:
            OptionError: run.out is in use, or holds a run of another recipe.
        """
        run = self.recipe.run
        if fresh:
            discard(run.out)
        drawing = plot.Drawing(run.out)

        def tell(facts: Facts) -> None:
            listen(facts)
            if problem := drawing.told(facts):
                listen({"kind": "note", "text": problem})

        loop = Loop(
            self.trainer, self.feed, run.out, identity_of(dataclasses.asdict(self.recipe) | {"data": self.data}, *FREE),
            save_every=run.save_every, evaluate_every=run.evaluate_every, keep_last=run.keep_last,
            listen=tell, stop=stop,
        )  # fmt: skip
        finished = loop.run()
        drawing.draw()
        if finished:
            self.export(self.result)
        return finished


@contextmanager
def prepare(
    path: Path,
    changes: Sequence[str] = (),
    *,
    task: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Iterator[Plan]:
    """Everything but the steps: recipe, data, memory, model. Closed in the end.

    Args:
        task: the only one that is welcome.
        changes: as read_recipe.
        force: even if memory seems too small.
        progress: ("tokenize", "compile", ...; done; all).

    Raises:
        OptionError: the recipe or its data are amiss.
        OutOfMemory: it does not fit the memory at hand.
    """
    recipe = read_recipe(path, {name: kind for name, (kind, _) in TASKS.items()}, changes)
    if task is not None and recipe.task != task:
        raise OptionError(f"{path} is for `smolrun train {recipe.task}`, not for {task}")
    with ExitStack() as opened:
        yield TASKS[recipe.task][1](recipe, opened, force, progress)


def training_bytes(
    c: ModelConfig,
    tokens: int,
    context: int,
    *,
    lora: LoRA | None = None,
    recompute: bool = False,
    bf16: bool = False,
    frozen: int = 0,
    document: int = 512,
) -> int:
    """Peak of resident memory of a run: weights, gradients, two moments, buffers, pages, Python.

    Args:
        tokens: of a pass.
        frozen: bytes of weights that are not trained.
        document: tokens of a document, as a rule; pages of keys and values are of whole 64.
    """
    shapes = expected_shapes(c)
    trained = shapes if lora is None else lora.shapes(c, shapes)
    size = sum(-(-shape[0] // ROWS) * ROWS * int(np.prod(shape[1:])) for shape in trained.values())
    buffers = memory.rounded(buffer_sizes(c, tokens, context, lora=lora, recompute=recompute, bf16=bf16))
    pages = -(-tokens // document) * -(-document // PAGE)
    kv = pages * (1 if recompute else c.n_layers) * c.n_kv_heads * 8 * PAGE * HEAD_DIM
    return int(16 * size + buffers + kv + frozen + memory.PROCESS + memory.PROCESS_TOKEN * c.vocab_size)


def check_memory(needed: int, recipe: Recipe) -> None:
    """Raises OutOfMemory if so many bytes are not there."""
    room = machine.HERE.available()
    if room is not None and needed > room.bytes:
        ways = ["a smaller batch.pass_tokens"] + ([] if recipe.batch.recompute else ["batch.recompute = true"])
        raise OutOfMemory(
            f"training needs {needed / 1e9:.2f} GB and {room.bytes / 1e9:.2f} GB are available ({room.source}). What "
            f"takes less: {', '.join(ways)}. To try nevertheless: --force"
        )


def open_base(recipe: Recipe, opened: ExitStack) -> Checkpoint | None:
    """The model to go on from, if the recipe names one."""
    if recipe.model.base is None:
        return None
    path = resolve(recipe.model.base)
    if getattr(recipe, "lora", None) is None:
        _not_the_result(recipe, "model.base", path, "model")
    return opened.enter_context(open_checkpoint(path))


def _not_the_result(recipe: Recipe, key: str, path: Path, name: str) -> None:
    result = recipe.run.out / name
    if path.exists() and result.exists() and path.samefile(result):
        raise OptionError(f"{key} = {path}: the result would be written there: take another run.out")


def _digest(base: Checkpoint) -> str:
    """Of all its weights: adapters, and preferences, are worth nothing beside others."""
    return model_digest(base, quantize=None, kv="f32", precision="f32").hex()[:16]


def _compiling(progress: Progress | None) -> Callable[[int, int], None] | None:
    """A model's progress, by its name for people."""
    if progress is None:
        return None

    def tell(done: int, all_: int) -> None:
        progress("compile", done, all_)

    return tell


def trainer_of(recipe: Recipe, model: Model, steps: int) -> Trainer:
    """With the optimiser and the schedule of a recipe."""
    o = recipe.optimiser
    adamw = AdamW(model.parameters, model.ops, betas=(o.betas[0], o.betas[1]), eps=o.eps, decay=o.decay)
    return Trainer(model, adamw, recipe.schedule.of(steps), clip=o.clip or None)


# ---- pretraining -----------------------------------------------------------------------------------------------------


def _pretrain(recipe: Recipe, opened: ExitStack, force: bool, progress: Progress | None) -> Plan:
    assert isinstance(recipe, Pretrain)
    base = open_base(recipe, opened)
    folder = _tokenizer(recipe, progress)
    source = read_tokenizer(folder) if folder is not None else base.tokenizer  # type: ignore[union-attr]
    vocabulary = Vocabulary.of(source, base.config.vocab_size if base else 0)
    if base is not None and vocabulary.tokenizer.vocab_size > base.config.vocab_size:
        raise OptionError(
            f"tokenizer: {vocabulary.tokenizer.vocab_size:,} tokens, {recipe.model.base} has {base.config.vocab_size:,}"
        )
    corpora = {name: Corpus(name, source, vocabulary, progress) for name, source in recipe.sources.items()}
    at_a_time, longest = recipe.batch.at_a_time, recipe.longest
    config = base.config if base else recipe.model.config(vocabulary.tokenizer.vocab_size, longest)
    config = dataclasses.replace(config, max_positions=max(config.max_positions, longest))
    lengths = np.concatenate([corpus.lengths for corpus in corpora.values()])
    needed = training_bytes(
        config, at_a_time, longest, recompute=recipe.batch.recompute, bf16=recipe.batch.precision == "bf16",
        document=min(longest, int(lengths.mean())),
    )  # fmt: skip
    if not force:
        check_memory(needed, recipe)
    if base is not None:
        base.config = config
    model = Model(
        base or config, tokens=at_a_time, context=longest, recompute=recipe.batch.recompute, seed=recipe.run.seed,
        threads=recipe.run.threads, precision=recipe.batch.precision, progress=_compiling(progress),
    )  # fmt: skip
    opened.callback(model.close)
    if base is None and recipe.model.init_std is not None:
        model.parameters.initialise(recipe.run.seed, recipe.model.init_std)
    feed = Documents(recipe, corpora, model)
    tokens = sum(stage.tokens for stage in recipe.stages)
    facts = [
        ("model", f"{len(model.parameters):,} parameters, {model.ops.threads} threads, kernels {model.ops.tier.name}"),
        ("run", f"{tokens:,} tokens in {feed.steps:,} steps of {recipe.batch.tokens:,}"),
    ]
    warnings = []
    for name, corpus in corpora.items():
        count = int(corpus.lengths[corpus.learnt].sum())
        wanted = sum(
            s.tokens * m.get(name, 0) / sum(m.values()) for s, m in zip(recipe.stages, feed.mixtures, strict=True)
        )
        facts.append(
            (name, f"{count:,} tokens in {len(corpus.learnt):,} documents, {wanted / count:.2f} epochs; "
             f"{len(corpus.held):,} held out, {corpus.left_out:,} too short")
        )  # fmt: skip
        if not len(corpus.held):
            warnings.append(f"sources.{name}: no document is held out: nothing to evaluate on")
        warnings += [f"{bad.where}: {bad.problem}" for bad in corpus.bad[:5]]
        if len(corpus.bad) > 5:
            warnings.append(f"sources.{name}: {len(corpus.bad):,} rows cannot be used in all")

    if folder is None:
        assert base is not None
        described = base
    else:
        ends = dataclasses.replace(source, bos_id=vocabulary.end, eos_ids=(vocabulary.end,))
        described = Checkpoint(folder, config, {}, ends, None, {}, 0)

    def export(target: Path) -> None:
        write_folder(model.checkpoint(described), target, "f32")

    data = {name: corpus.digest for name, corpus in corpora.items()} | ({"model.base": _digest(base)} if base else {})
    return Plan(recipe, trainer_of(recipe, model, feed.steps), feed, tokens, needed, export, facts, warnings, data)


def _tokenizer(recipe: Pretrain, progress: Progress | None) -> Path | None:
    """The folder of the recipe's tokenizer, trained on what is learnt if it is to be new; None: the base model's."""
    if recipe.tokenizer is None:
        return None
    if recipe.tokenizer.path is not None:
        return resolve(recipe.tokenizer.path)
    assert recipe.tokenizer.vocab_size is not None
    folder = recipe.run.out / "tokenizer"
    sources = recipe.sources.values()
    wanted: list[Any] = [key_of(path, s.field, s.separator, s.held_out) for s in sources for path in files(s.path)]
    wanted.append(recipe.tokenizer.vocab_size)
    made_of = folder / "made_of.json"  # another size or other texts: another tokenizer
    if not made_of.exists() or json.loads(made_of.read_bytes()) != wanted:
        if progress:
            progress("vocabulary", 0, 1)
        bad = list[BadRow]()  # the corpora report them
        every = (text for source in sources for text in texts(source, bad))
        train_vocabulary(every, recipe.tokenizer.vocab_size, folder)
        with whole(made_of) as file:
            file.write(json.dumps(wanted).encode())
        if progress:
            progress("vocabulary", 1, 1)
    return folder


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def _tune(recipe: Recipe, opened: ExitStack, force: bool, progress: Progress | None) -> Plan:
    assert isinstance(recipe, Tune)
    base = open_base(recipe, opened)
    assert base is not None
    c, batch = base.config, recipe.batch
    if batch.length > c.max_positions:
        raise OptionError(f"batch.length = {batch.length:,}: the model has {c.max_positions:,} positions")
    tokenizer = Tokenizer.from_source(base.tokenizer, vocab_size=c.vocab_size)
    template, digest = ChatTemplate(base.chat_template, tokenizer), tokenizer_digest(base.tokenizer)
    encoder = Encoder(recipe.data, tokenizer, template, batch.length, digest)
    found = examine(recipe.data, encoder, isinstance(recipe, Dpo), progress)
    start, lora, table = None, None, recipe.lora
    if table is not None:
        lora = LoRA(table.rank, table.alpha, table.dropout, table.targets, recipe.run.seed)
        if table.start is not None:
            _not_the_result(recipe, "lora.start", Path(table.start), "adapter")
            start = read_adapter(table.start, c)
            lora = dataclasses.replace(LoRA.of(start, c.n_layers, recipe.run.seed), dropout=table.dropout)
    quantize = table.quantize if table else None
    frozen = sum(m.bytes for m in weights.plan(base, quantize).values()) if lora else 0
    sizes = found.learnt.sizes
    group = int(max(sizes.max(), found.held.sizes.max(initial=0)))
    largest = int(np.sort(sizes)[-recipe.rows :].sum())
    tokens = max(group, min(batch.at_a_time, largest))  # no larger than the fullest step
    needed = training_bytes(
        c, tokens, min(batch.length, tokens), lora=lora, recompute=batch.recompute,
        bf16=batch.precision == "bf16", frozen=frozen, document=int(found.learnt.lengths.mean()),
    )  # fmt: skip
    if not force:
        check_memory(needed, recipe)
    model = Model(
        base, tokens=tokens, context=min(batch.length, tokens), lora=lora, quantize=quantize,
        recompute=batch.recompute, threads=recipe.run.threads, precision=batch.precision,
        progress=_compiling(progress),
    )  # fmt: skip
    opened.callback(model.close)
    if lora is not None and start is not None:
        lora.read(start, model.parameters)
    if isinstance(recipe, Dpo):
        objective = DPO(recipe.beta, recipe.label_smoothing)
        kept = lora is not None and start is None  # the model as it begins can be asked later
        feed: Tuned = PairFeed(recipe, found.learnt, found.held, model, objective, kept)
        trainer = trainer_of(recipe, model, feed.steps)
        trainer.objective = objective
    else:
        feed = Tuned(recipe, found.learnt, found.held, model, held_out_loss(model))
        trainer = trainer_of(recipe, model, feed.steps)
    what = "pairs" if isinstance(recipe, Dpo) else "examples"
    facts = [
        ("model", f"{len(model.parameters):,} of {_count(c):,} parameters, {model.ops.threads} threads, kernels "
                  f"{model.ops.tier.name}"),
        ("run", f"{recipe.epochs} epochs, {feed.steps:,} steps of {recipe.rows} {what}"),
        ("data", f"{len(found.learnt):,} {what} of {found.tokens:,} tokens; {len(found.held):,} held out; "
                 f"{found.cut:,} cut to {batch.length:,} tokens"),
    ]  # fmt: skip
    warnings = [f"{bad.where}: {bad.problem}" for bad in found.bad[:5]]
    if len(found.bad) > 5:
        warnings.append(f"data: {len(found.bad):,} rows cannot be used in all")
    if found.again:
        warnings.append(f"data: {found.again:,} {what} of data.path are in data.valid too: they are not learnt")
    if not len(found.held):
        warnings.append("data: nothing is held out: nothing to evaluate on")

    def export(target: Path) -> None:
        feed.restore_best()
        if lora is None:
            write_folder(model.checkpoint(base), target, recipe.dtype)
        else:
            write_adapter(target, lora.low_rank(model.parameters, recipe.model.base or ""))

    seen = recipe.epochs * found.tokens
    result = "model" if lora is None else "adapter"
    data = {"data": found.digest, "model.base": _digest(base)} | ({"lora.start": start.digest.hex()} if start else {})
    return Plan(recipe, trainer, feed, seen, needed, export, facts, warnings, data, result)


def _count(c: ModelConfig) -> int:
    return sum(int(np.prod(shape)) for shape in expected_shapes(c).values())


TASKS: dict[str, tuple[type[Recipe], Callable[[Recipe, ExitStack, bool, Progress | None], Plan]]] = {
    "pretrain": (Pretrain, _pretrain),
    "sft": (Sft, _tune),
    "dpo": (Dpo, _tune),
}
