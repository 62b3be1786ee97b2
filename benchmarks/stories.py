"""A small Llama from scratch: trained, killed once, gone on with; its bits per byte, its words, its loops.

python benchmarks/stories.py tinystories_sample.txt            # 10 minutes on two free cores
python benchmarks/stories.py TEXT --set stages.0.tokens=100_000 ...

python benchmarks/stories.py TEXT --judge                      # what a run has left

The text has stories that end in <|endoftext|>. The process is killed (SIGKILL) halfway between two checkpoints; every
step that is done twice must have the same loss, gradient norm and learning rate, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from peers import machine, write_json

import smolrun
from smolrun.train.data import Corpus, Vocabulary, read_tokenizer
from smolrun.train.recipe import Pretrain, read_recipe
from smolrun.train.run import read_log

RESULT = Path(__file__).parent / "results" / "stories.json"
RECIPE = Path(__file__).parents[1] / "examples" / "train" / "tinystories-5m.toml"
TOKENS = 2000
WORD = re.compile(r"[a-z']+")
NEAR = 8  # words within which the same four words come again: a refrain; a third time within twice as many: a loop


def curve(log: Path) -> list[dict[str, object]]:
    """Lines of a log without the clock."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(log)]


def train(arguments: list[str], log: Path, kill_at: int | None = None) -> None:
    """A process that trains; killed once its log has so many steps."""
    child = subprocess.Popen([sys.executable, "-m", "smolrun.cli", "train", "pretrain", *arguments])
    while child.poll() is None:
        time.sleep(0.2)
        if kill_at is not None and log.exists() and log.read_bytes().count(b'"kind": "step"') >= kill_at:
            child.send_signal(signal.SIGKILL)
            child.wait()
            return
    if child.returncode or kill_at is not None:
        raise SystemExit(f"training ended with {child.returncode}")


def write_stories(model: Path) -> tuple[str, int]:
    """Stories from nothing, sampled, of so many tokens together."""
    text, count, seed = "", 0, 0
    with smolrun.load(model) as llm:
        while count < TOKENS:
            sampling = smolrun.Sampling(temperature=0.7, top_p=0.9, seed=seed)
            told = llm.generate([0], max_tokens=min(400, TOKENS - count), sampling=sampling)
            text, count, seed = f"{text}{told.text}\n\n", count + len(told.ids), seed + 1
    return text, count


def refrains(text: str) -> tuple[int, int, int]:
    """(words, refrains, loops) of a text."""
    words = WORD.findall(text.lower())
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    twice = sum(gram in grams[i + 1 : i + 1 + NEAR] for i, gram in enumerate(grams))
    thrice = sum(grams[i + 1 : i + 1 + 2 * NEAR].count(gram) > 1 for i, gram in enumerate(grams))
    return len(words), twice, thrice


def killed_once(recipe: Pretrain, changes: list[str]) -> dict[str, object]:
    """Train, with one kill; what came of it.

    Raises:
        SystemExit: something that was done twice is not the same.
    """
    log, every = recipe.run.out / "log.jsonl", recipe.run.save_every
    arguments = [str(RECIPE), *(part for change in changes for part in ("--set", change))]
    steps = sum(-(-stage.tokens // recipe.batch.tokens) for stage in recipe.stages)
    kill_at = (steps // 2) // every * every + every // 2
    began = time.perf_counter()
    train([*arguments, "--fresh"], log, kill_at)
    before = curve(log)
    train(arguments, log)
    minutes = (time.perf_counter() - began) / 60
    if curve(log)[: len(before)] != before:
        raise SystemExit("what was done twice differs: the run did not go on with the same bits")
    twice = sum(line["step"] > kill_at - every // 2 for line in before)  # type: ignore[operator]
    return {"minutes": round(minutes, 1), "killed_at_step": kill_at, "lines_done_twice": twice}


def judged(recipe: Pretrain) -> dict[str, object]:
    """The last evaluation of a run, and what its model writes."""
    out = recipe.run.out
    *_, step, last = curve(out / "log.jsonl")
    vocabulary = Vocabulary.of(read_tokenizer(out / "tokenizer"))
    corpus = Corpus("stories", recipe.sources["stories"], vocabulary)
    decode = vocabulary.tokenizer.decode
    learnt = "\n\n".join(decode(corpus.document(int(i))[1:-1]) for i in corpus.learnt)
    known = set(WORD.findall(learnt.lower()))
    stories, count = write_stories(out / "model")
    (out / "stories.txt").write_text(stories, encoding="utf-8")
    words = WORD.findall(stories.lower())
    _, twice, loops = refrains(stories)
    all_words, all_twice, all_loops = refrains(learnt)
    return {
        "steps": last["step"],
        "tokens": step["tokens"],
        "bits_per_byte": round(float(str(last["stories.bits_per_byte"])), 4),
        "held_out_loss": round(float(str(last["loss"])), 4),
        "generated_tokens": count,
        "words": len(words),
        "known_words": round(sum(word in known for word in words) / len(words), 4),
        "unknown": sorted({word for word in words if word not in known}),
        "refrains": twice,
        "loops": loops,
        "refrains_of_the_text": round(all_twice * len(words) / all_words, 2),  # in as many words
        "loops_of_the_text": round(all_loops * len(words) / all_words, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as smolrun train pretrain")
    parser.add_argument("--judge", action="store_true", help="a run that is there, without training")
    parser.add_argument("--save", action="store_true", help="into results/stories.json")
    given = parser.parse_args()
    changes = [f"sources.stories.path={given.text}", *given.set]
    recipe = read_recipe(RECIPE, {"pretrain": Pretrain}, changes)
    assert isinstance(recipe, Pretrain)
    before = json.loads(RESULT.read_text()) if given.judge and RESULT.exists() else {}
    found = {**before, **(killed_once(recipe, changes) if not given.judge else {}), **judged(recipe)}
    print(json.dumps(found, indent=1))
    if given.save:
        write_json(RESULT, {**found, "machine": machine()})


if __name__ == "__main__":
    main()
