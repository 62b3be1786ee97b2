"""What guessing is worth: the same answers with and without speculation, side by side, on prompts as people write them.

The gain depends on the text: an answer that quotes (a rewrite, edited code) is guessed well, an explanation is not, so
prompts of both kinds are measured and each has its row. Timed is what follows the first token, a draft model's reading
of the prompt included. Both ways must give the same ids.

A machine with neighbours changes its speed within seconds. So both answers grow together, an id here, an id there, each
step on its own clock: what slows one slows the other. The ratio is the median over the turns; how far plain decoding
itself moved from turn to turn stands beside it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from smolrun.api import load_draft
from smolrun.bench import as_csv
from smolrun.errors import OptionError, SmolrunError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.generate.engine import Model, generate_ids
from smolrun.generate.sampler import Sampling
from smolrun.generate.speculate import Speculator
from smolrun.model.llama import Llama
from smolrun.model.machine import HERE
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer
from smolrun.verify import sample_text, weight_format

CONTEXT = 2048
_REWRITE = (
    "Rewrite the message below to make it more friendly while keeping its main points. Return only the message.\n\n"
    "Hi Bob, the report you sent yesterday is missing the sales figures for March and the chart on page 4 is wrong. "
    "Send me a corrected version by Friday noon, otherwise the board cannot discuss it on Monday."
)
_CODE = (
    "Rename the variable `config` to `settings` and show the whole function:\n```python\ndef read_config(path):\n"
    "    with open(path) as file:\n        lines = file.readlines()\n    config = {}\n    for line in lines:\n"
    "        if line.startswith('#'):\n            continue\n        key, value = line.split('=')\n"
    "        config[key.strip()] = value.strip()\n    return config\n```"
)


def prompts() -> dict[str, str]:
    """Name -> what a user asks."""
    prose = sample_text().split("\n\n")
    return {
        "why": "Why do leaves change colour in autumn?",
        "tips": "Give me five tips for learning to swim.",
        "explain": "Explain what gravity is and why it matters.",
        "summarise": "Summarise the text below in three sentences.\n\n" + "\n\n".join(prose[:3]),
        "rewrite": _REWRITE,
        "edit code": _CODE,
        "quote": "Repeat the text below word by word.\n\n" + prose[0],
    }


@dataclass(frozen=True)
class Row:
    """One prompt: tokens per second of each turn, plain and guessed; ids guessed and right in the last turn."""

    test: str
    tokens: int
    plain: tuple[float, ...]
    guessed: tuple[float, ...]
    guesses: int
    right: int

    @property
    def ratio(self) -> float:
        """Median over the turns of the speed with guesses by that without."""
        return statistics.median(guessed / plain for plain, guessed in zip(self.plain, self.guessed, strict=True))

    def figures(self) -> dict[str, Any]:
        """One flat line for table, CSV and JSON."""
        return {
            "test": self.test,
            "tokens": self.tokens,
            "plain_tokens_per_s": round(statistics.median(self.plain), 2),
            "plain_moved": round(max(self.plain) / min(self.plain) - 1, 3),
            "tokens_per_s": round(statistics.median(self.guessed), 2),
            "ratio": round(self.ratio, 3),
            "guesses": self.guesses,
            "accepted": round(self.right / self.guesses, 3) if self.guesses else None,
        }


@dataclass(frozen=True)
class Report:
    """All prompts of a model.

    Attributes:
        how: "lookup", "draft NAME" or both.
    """

    model: str
    weight_format: str
    tier: str
    threads: int
    how: str
    rows: tuple[Row, ...]
    device: dict[str, str] = field(default_factory=HERE.describe)

    @property
    def ratio(self) -> float:
        """Seconds of all answers without guessing, by those with: of each prompt the median of its turns."""
        plain = [row.tokens / statistics.median(row.plain) for row in self.rows]
        return sum(plain) / sum(seconds / row.ratio for seconds, row in zip(plain, self.rows, strict=True))

    def to_json(self) -> str:
        """Everything, each sample included."""
        rows = [{**row.figures(), "samples": row.guessed, "plain_samples": row.plain} for row in self.rows]
        return json.dumps(
            {"kind": "speculation", **asdict(self), "rows": rows, "ratio": round(self.ratio, 3)}, indent=2
        )

    def to_csv(self) -> str:
        """A line for each row."""
        common = {"model": self.model, "tier": self.tier, "how": self.how}
        return as_csv([{**common, **row.figures()} for row in self.rows])

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.model}: mostly {self.weight_format}, CPU tier {self.tier}, {self.threads} threads, guesses by "
            f"{self.how}; the same ids with and without",
            f"{'prompt':>10}{'tokens':>8}{'plain/s':>10}{'moved':>7}{'guessing/s':>12}{'ratio':>8}{'guessed':>9}{'right':>7}",
        ]
        for f in (row.figures() for row in self.rows):
            right = "" if f["accepted"] is None else f"{f['accepted']:.0%}"
            line = f"{f['test']:>10}{f['tokens']:>8}{f['plain_tokens_per_s']:>10,.1f}{f['plain_moved']:>7.0%}"
            line += f"{f['tokens_per_s']:>12,.1f}"
            lines.append((line + f"{f['ratio']:>7.2f}x{f['guesses']:>9}{right:>7}").rstrip())
        return "\n".join([*lines, f"{'all':>10}{'':>37}{self.ratio:>7.2f}x"])


def run(
    path: Path,
    *,
    speculate: str | None = None,
    draft: Path | None = None,
    tokens: int = 128,
    repeats: int = 3,
    threads: int | None = None,
    quantize: str | None = None,
    kv: str = "f16",
    precision: str = "fast",
    force: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measures guessing.

    Args:
        path: a GGUF file or a checkpoint folder.
        speculate, draft: as for smolrun.load, one of them at least.
        tokens: of each answer at most.
        repeats: turns of each prompt, after one that is thrown away.
        threads, quantize, kv, precision, force: as for smolrun.load.
        progress: gets a line for every prompt.

    Raises:
        OptionError: nothing to guess with, or a draft of another vocabulary.
        SmolrunError: guessing changed an answer.
    """
    if speculate is None and draft is None:
        raise OptionError("nothing guesses: give speculate='lookup' or a draft model")
    if repeats < 1 or tokens < 2:
        raise OptionError(f"{repeats} repeats of {tokens} tokens: at least 1 of 2 expected")
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path))
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
        template = ChatTemplate(checkpoint.chat_template, tokenizer) if checkpoint.chat_template else None
        context = min(CONTEXT, checkpoint.config.max_positions)
        model = opened.enter_context(
            Llama(
                checkpoint, context=context, threads=threads, quantize=quantize, kv=kv, precision=precision, force=force
            )
        )
        guesser = None if draft is None else load_draft(opened, draft, model, tokenizer, kv, force, None)
        speculator = Speculator(lookup=speculate is not None, draft=guesser, clock=time.perf_counter)
        rows = []
        for name, text in prompts().items():
            ids = template.encode([{"role": "user", "content": text}])[0] if template else tokenizer.encode(text)
            if 2 * (len(ids) + tokens) > context:  # both answers are in the cache
                continue
            progress(name)
            rows.append(measure(model, speculator, name, ids, tokens, repeats, tokenizer.eos_ids))
        if not rows:
            raise OptionError(f"a context of {context:,} has no room for a prompt and {tokens} tokens twice")
        how = [*(["lookup"] if speculate else []), *([f"draft {draft.name}"] if draft else [])]
        form = weight_format(checkpoint)
        return Report(path.name, form, model.tier.name, model.threads, " and ".join(how), tuple(rows))


def measure(
    model: Model, speculator: Speculator, name: str, ids: Sequence[int], tokens: int, repeats: int, ends: Sequence[int]
) -> Row:
    """One prompt, with and without guesses side by side; the first turn is thrown away."""
    sampling = Sampling(seed=1)  # as a user has it; the seed fixes what is drawn
    samples: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        speculation = speculator.begin(sampling, len(ids))
        seconds = dict.fromkeys(samples, 0.0)
        with ExitStack() as opened:
            steps = {
                way: opened.enter_context(closing(generate_ids(
                    model, ids, max_tokens=tokens, sampling=sampling, stop_ids=ends,
                    speculation=speculation if way else None,
                )))
                for way in samples
            }  # fmt: skip
            answers = {way: [step.id for step in islice(steps[way], 1) if step.id is not None] for way in steps}
            while steps:
                way = min(steps, key=lambda way: len(answers[way]))
                begin = time.perf_counter()
                step = next(steps[way], None)
                seconds[way] += time.perf_counter() - begin
                if step is None:
                    del steps[way]
                elif step.id is not None:
                    answers[way].append(step.id)
        for way in samples:
            samples[way].append(max(len(answers[way]) - 1, 1) / seconds[way])
        if answers[False] != answers[True]:
            raise SmolrunError(f"{name}: guessing changed the answer, please report this as a bug")
    count = len(answers[True])
    return Row(
        name, count, tuple(samples[False][1:]), tuple(samples[True][1:]), speculation.guessed, speculation.accepted
    )
