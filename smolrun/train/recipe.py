"""A run as its TOML file says it: dataclasses whose fields are the file's keys, read without a guess.

    task = "pretrain"                   sft and dpo are tasks beside it, each a subclass of Recipe
    [run] [model] [batch] [optimiser] [schedule]              what every task has
    [tokenizer] [sources.NAME] [[stages]] [reweight]          pretrain's own

A key that no field has is refused, with the one that was probably meant. Paths are as the shell would take them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from smolrun.config import HEAD_DIM, ModelConfig
from smolrun.errors import OptionError, SmolrunError
from smolrun.train.optimiser import Schedule as Rate
from smolrun.train.optimiser import constant, cosine, wsd

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """[run]

    Attributes:
        out: folder of the run: checkpoints/, log.jsonl, plot.svg and, at the end, model/.
        save_every, evaluate_every: steps. A stage's end evaluates too, the run's end does both.
        keep_last: checkpoints that stay.
        seed: of the first weights, the order of documents, dropout.
        threads: as the machine has fast cores if not given.
    """

    out: Path
    save_every: int = 200
    evaluate_every: int = 200
    keep_last: int = 2
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        positive(self, "run", "save_every", "evaluate_every", "keep_last", "threads")
        if self.seed < 0:
            raise OptionError(f"run.seed = {self.seed}: from 0 expected")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """[model]: `base`, a model to go on from, which has all else; or the shape of a new one.

    Attributes:
        base: anything that smolrun loads: a path, an alias, owner/repo.
        init_std: of the first weights; not given: 1 / sqrt(dim).
        context: positions that the model is to have; not given: the longest of the stages.
    """

    base: str | None = None
    dim: int | None = None
    hidden_dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    context: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    init_std: float | None = None

    def __post_init__(self) -> None:
        sizes = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")
        given = [f.name for f in dataclasses.fields(self) if f.name != "base" and getattr(self, f.name) != f.default]
        if self.base is not None and given:
            raise OptionError(f"model: base and {', '.join(given)}: either a model to go on from or a shape, not both")
        missing = ", ".join(name for name in sizes if name not in given)
        if self.base is None and missing:
            raise OptionError(f"model: {missing} missing: give the shape of a new model, or `base` to go on from one")
        positive(self, "model", *sizes, "context", "init_std")

    def config(self, vocab_size: int, context: int) -> ModelConfig:
        """The new model."""
        assert self.dim and self.hidden_dim and self.n_layers and self.n_heads and self.n_kv_heads
        return ModelConfig.from_hf(
            {
                "model_type": "llama", "hidden_size": self.dim, "intermediate_size": self.hidden_dim,
                "num_hidden_layers": self.n_layers, "num_attention_heads": self.n_heads, "head_dim": HEAD_DIM,
                "num_key_value_heads": self.n_kv_heads, "vocab_size": vocab_size,
                "max_position_embeddings": self.context or context, "rope_theta": self.rope_theta,
                "rms_norm_eps": self.norm_eps, "tie_word_embeddings": self.tied,
            },
            source="model",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batching:
    """[batch]

    Attributes:
        tokens: of one optimiser step.
        pass_tokens: so many are computed at a time, their gradients add up; not given: all at once.
        length: of a document's longest part; a stage may say another.
        precision: of the products: f32, or bf16 on CPUs with AVX512-BF16; weights, gradients and moments are f32.
        recompute: keep little of the forward pass and compute it again: less memory, a third more time.
    """

    tokens: int = 8192
    pass_tokens: int | None = None
    length: int = 512
    precision: Literal["f32", "bf16"] = "f32"
    recompute: bool = False

    def __post_init__(self) -> None:
        positive(self, "batch", "tokens", "length", "pass_tokens")

    @property
    def at_a_time(self) -> int:
        """Tokens of a pass at most."""
        return min(self.pass_tokens or self.tokens, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """[optimiser]: AdamW. `clip` 0: gradients are not clipped."""

    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise OptionError(f"optimiser: betas = {list(self.betas)}: two expected")
        if self.clip < 0:
            raise OptionError(f"optimiser.clip = {self.clip}: from 0 expected")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """[schedule]: the learning rate. warmup and decay: steps, or below 1 a share of all steps.

    Attributes:
        decay: of wsd; not given: 0.2.
        floor: of a cosine, as a share of the peak.
    """

    peak: float
    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: float = 0.02
    decay: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.warmup < 0 or (self.decay or 0) < 0 or not 0 <= self.floor <= 1:
            raise OptionError("schedule: peak above 0, warmup and decay from 0, floor from 0 to 1 expected")
        for name, kind in (("decay", "wsd"), ("floor", "cosine")):
            if getattr(self, name) and self.kind != kind:
                raise OptionError(f"schedule.{name}: kind = {self.kind!r} has none, {kind!r} has")

    def of(self, steps: int) -> Rate:
        """The function of the step."""

        def count(value: float) -> int:
            return round(value * steps) if value < 1 else round(value)

        if self.kind == "wsd":
            decay = 0.2 if self.decay is None else self.decay
            return wsd(self.peak, steps, warmup=count(self.warmup), decay=count(decay))
        if self.kind == "cosine":
            return cosine(self.peak, steps, warmup=count(self.warmup), floor=self.floor)
        return constant(self.peak, warmup=count(self.warmup))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task has."""

    task: str
    run: Run
    model: Shape
    batch: Batching = field(default_factory=Batching)
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """[tokenizer]: one that is there (`path`: a folder or file with a tokenizer), or a new one, trained on the sources.

    Not given at all: that of the model to go on from.
    """

    path: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.vocab_size is None):
            raise OptionError("tokenizer: either `path` of one that is there, or `vocab_size` of a new one")


@dataclass(frozen=True, kw_only=True)
class Source:
    """[sources.NAME]: documents.

    Attributes:
        path: a file (.txt .jsonl .json .parquet .arrow, .gz of these), a folder of such, a data set as `datasets`
            keeps it on disk, or a pattern (data/*.jsonl).
        field: of a row, the text; dots lead inwards.
        separator: what stands between the documents of a text file.
        held_out: share of the documents that is never learnt, only evaluated on; chosen by their content.
        least_tokens: shorter documents are left out (a stage of long context).
        bad_rows: the largest share of rows that may be unreadable; each is reported.
    """

    path: str
    field: str = "text"
    separator: str = "<|endoftext|>"
    held_out: float = 0.01
    least_tokens: int = 0
    bad_rows: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1 or not 0 <= self.bad_rows <= 1:
            raise OptionError("source: held_out and bad_rows are shares, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """[[stages]]

    Attributes:
        tokens: exactly so many, end markers included.
        name: for the log.
        mixture: source -> weight, in tokens; not given: all sources alike.
        length, rope_theta: from here on, if other than before: a context extension.
    """

    tokens: int
    name: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    length: int | None = None
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        positive(self, "stages", "tokens", "length")
        if self.rope_theta is not None and not 1 < self.rope_theta < 1e12:
            raise OptionError(f"stages.rope_theta = {self.rope_theta:g}: a number from 1 to 1e12 expected")
        if any(weight < 0 for weight in self.mixture.values()) or (self.mixture and not sum(self.mixture.values())):
            raise OptionError(f"stages: mixture = {self.mixture}: weights from 0 expected, not all 0")


@dataclass(frozen=True, kw_only=True)
class Reweight:
    """[reweight]: after a stage, weight of each source in the next one *= exp(strength (bits per byte - target)).

    Attributes:
        targets: bits per byte to reach; not given: the mean of all sources, so what is learnt worst gets more.
        most: a weight changes by this factor at most.
    """

    strength: float = 1.0
    targets: dict[str, float] = field(default_factory=dict)
    most: float = 2.0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise OptionError(f"reweight.most = {self.most:g}: a factor from 1 expected")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Recipe):
    """task = "pretrain"."""

    task: Literal["pretrain"]
    sources: dict[str, Source]
    stages: tuple[Stage, ...]
    tokenizer: Vocabulary | None = None
    reweight: Reweight | None = None
    evaluate_tokens: int = 20_000  # of each source

    def __post_init__(self) -> None:
        if not self.stages or not self.sources:
            raise OptionError("at least one [[stages]] and one [sources.NAME] expected")
        positive(self, "pretrain", "evaluate_tokens")
        for i, stage in enumerate(self.stages):
            known(f"stages[{i}].mixture", stage.mixture, self.sources)
        if self.reweight is not None:
            known("reweight.targets", self.reweight.targets, self.sources)
        if self.model.base is None and self.tokenizer is None:
            raise OptionError("tokenizer: missing: a new model needs `path` of one, or `vocab_size` to train one")
        if self.longest > self.batch.at_a_time:
            raise OptionError(
                f"a length of {self.longest:,} does not fit a pass of {self.batch.at_a_time:,} tokens: "
                "lower batch.length, or raise batch.pass_tokens"
            )

    @property
    def longest(self) -> int:
        """Of all stages' lengths."""
        return max(stage.length or self.batch.length for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """[data]: what to fine-tune on; train/examples.py says what a row may be.

    Attributes:
        path: files as in a source.
        valid: files that are held out; not given: a share of `path`, `held_out`, chosen by content.
        prompt, completion, field: names of a row's fields.
        after: of a plain text, what is learnt begins after the first of these; not given: all of it is learnt.
        prompt_length: of what stands before the first token to be learnt, the last so many are read; not given: all.
        chat: whether prompt and completion become turns of a dialogue; not given: if the model has a chat template.
        bad_rows: the largest share of rows that may be unusable; each is reported.
    """

    path: str
    valid: str | None = None
    held_out: float = 0.05
    prompt: str = "prompt"
    completion: str = "completion"
    field: str = "text"
    after: str | None = None
    prompt_length: int | None = None
    chat: bool | None = None
    bad_rows: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1 or not 0 <= self.bad_rows <= 1:
            raise OptionError("data: held_out and bad_rows are shares, from 0 to 1")
        positive(self, "data", "prompt_length")


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """[lora]: train adapters and leave the base as it is; a quantised base makes it QLoRA.

    Attributes:
        targets: of q k v o gate up down.
        quantize: format of a float base while it is frozen: q8_0, q4_0, ... as smolrun.load.
        start: an adapter folder to go on from; its rank, alpha and targets then hold.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    quantize: str | None = None
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tune(Recipe):
    """What sft and dpo have in common. A document is an example, or one answer of a pair.

    Attributes:
        rows: examples, or pairs, of one step; batch.tokens of them at most are computed at a time.
        patience: stop after so many evaluations without a lower held-out loss, and take the weights of the lowest.
        dtype: of the result's weights if all are trained: f32, f16, bf16.
    """

    data: Examples
    epochs: int = 2
    rows: int = 16
    lora: Adapters | None = None
    patience: int | None = None
    dtype: Literal["f32", "f16", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        positive(self, self.task, "epochs", "rows", "patience")
        if self.model.base is None:
            raise OptionError("model.base is missing: the model to fine-tune")
        if self.batch.length > self.batch.at_a_time:
            raise OptionError(
                f"a length of {self.batch.length:,} does not fit a pass of {self.batch.at_a_time:,} tokens: "
                "lower batch.length, or raise batch.tokens"
            )


@dataclass(frozen=True, kw_only=True)
class Sft(Tune):
    """task = "sft"."""

    task: Literal["sft"]


@dataclass(frozen=True, kw_only=True)
class Dpo(Tune):
    """task = "dpo": direct preference optimisation; the reference is the model as it begins."""

    task: Literal["dpo"]
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise OptionError(
                f"beta = {self.beta}, label_smoothing = {self.label_smoothing}: above 0, and from 0 to 0.5 expected"
            )
        if 2 * self.batch.length > self.batch.at_a_time:
            raise OptionError(
                f"two answers of {self.batch.length:,} tokens do not fit a pass of {self.batch.at_a_time:,}: "
                "lower batch.length, or raise batch.tokens"
            )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_recipe(path: Path, tasks: Mapping[str, type[Recipe]], changes: Sequence[str] = ()) -> Recipe:
    """A recipe from its file.

    Args:
        tasks: what `task` may name.
        changes: "run.out=elsewhere": put in place of, or beside, what the file says; values as in TOML, or plain text.

    Raises:
        OptionError: no TOML, unknown keys, wrong types, values out of range; names the key.
    """
    try:
        table = _toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are such
        raise OptionError(f"{path}: no TOML: {error}") from None
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise OptionError(f"{change!r}: KEY=VALUE expected, as in run.out=elsewhere")
        _change(table, key.strip(), text.strip())
    task = str(table.get("task"))
    if task not in tasks:
        raise OptionError(f"{path}: task = {task!r}: {' or '.join(map(repr, tasks))} expected")
    try:
        return build(tasks[task], table)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    """Raises ValueError for what is no TOML, SmolrunError (Python 3.10 alone) where nothing is installed to read it."""
    try:
        library = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise SmolrunError("recipes need tomli on Python 3.10: pip install 'smolrun[train]'") from None
    return typing.cast(dict[str, Any], library.loads(text))


def _change(table: dict[str, Any], key: str, text: str) -> None:
    try:
        value = _toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *outer, last = key.split(".")
    place: Any = table
    for part in outer:
        place = _item(place, part, key) if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise OptionError(f"{key}: {part} is no table")
    if isinstance(place, list):
        raise OptionError(f"{key}: a number and a name are missing, as in stages.0.tokens")
    place[last] = value


def _item(items: list[Any], number: str, key: str) -> Any:
    if not (number.isdigit() and int(number) < len(items)):
        raise OptionError(f"{key}: {number!r}: one of 0 to {len(items) - 1} expected")
    return items[int(number)]


def build(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a table.

    Raises:
        OptionError: names the key.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known(where, table, fields)
    hints = typing.get_type_hints(kind)
    values = {}
    for name, f in fields.items():
        place = f"{where}.{name}" if where else name
        if name in table:
            values[name] = _value(hints[name], table[name], place)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise OptionError(f"{place} is missing")
    return kind(**values)


def known(where: str, given: typing.Iterable[str], names: typing.Iterable[str]) -> None:
    """Raises OptionError for a key that is none of the names, with the nearest one."""
    names = list(names)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise OptionError(f"{f'{where}: ' if where else ''}unknown key {key!r}: {meant}")


def positive(part: Any, where: str, *names: str) -> None:
    """Raises OptionError for a number that is given and not above 0."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value <= 0:
            raise OptionError(f"{where}.{name} = {value}: more than 0 expected")


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _value(next(kind for kind in inner if kind is not type(None)), value, where)
    if origin is Literal:
        if value not in inner:
            raise OptionError(f"{where} = {value!r}: {' or '.join(map(repr, inner))} expected")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and abs(value) <= sys.float_info.max  # neither inf nor nan
    if hint is int and number and value == int(value):
        return int(value)  # 2e12 is a float to TOML
    if hint is float and number:
        return float(value)
    if hint is Path and value and isinstance(value, str):
        return Path(_expanded(value, where))
    if hint in (str, bool) and isinstance(value, hint):
        return _expanded(value, where) if hint is str else value
    name = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a list"}.get(origin or hint)
    name = name or ("text" if hint in (str, Path) else "a table")
    raise OptionError(f"{where} = {value!r}: {name} expected")


def _expanded(text: str, where: str) -> str:
    """With ${NAME} replaced by environment variables."""

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise OptionError(f"{where} = {text!r}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", lookup, text)
