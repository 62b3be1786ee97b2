"""What fine-tuning reaches, beside torch and peft on the same weights, batches and learning rates.

    python benchmarks/tune.py sql      LoRA on wikisql_lora: held-out loss beside peft's, exact match of 100 queries
                                       before and after, the merged model's text in llama.cpp
    python benchmarks/tune.py sql --alone --rows 640 --peak 1e-3 --targets q k v o gate up down
                                       the same without peft: longer in the same time
    python benchmarks/tune.py dpo      DPO on dpo_demo: reward margin and accuracy on pairs held back, with intervals

Each part keeps what it has made in --work and is not repeated; a training that was stopped goes on. The result is added
to results/tune.json. The environment of torch and peft is created when it is first needed (peers.Workshop).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import Workshop, machine, write_json

import smolrun
from smolrun import Sampling
from smolrun.export import write_folder
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.peft import write_adapter
from smolrun.files.sources import resolve
from smolrun.quantize import quantize_file
from smolrun.train import Batch
from smolrun.train.tasks import prepare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tune.json"
SQL = """
task = "sft"
epochs = 1
rows = 8
[run]
out = "{work}/sql"
save_every = 10
evaluate_every = 1000
threads = {threads}
[model]
base = "{work}/base"
[data]
path = "{work}/train.jsonl"
valid = "{data}/wikisql_lora/valid.jsonl"
after = "\\nA: "
[batch]
tokens = 1024
length = 256
[optimiser]
betas = [0.9, 0.999]
"""
DPO = """
task = "dpo"
epochs = 1
rows = 8
beta = {beta}
[run]
out = "{work}/dpo"
save_every = 5
evaluate_every = 1000
threads = {threads}
[model]
base = "{base}"
[data]
path = "{work}/pairs-train.json"
valid = "{work}/pairs-held.json"
prompt_length = {prompt_length}
[batch]
tokens = 1024
length = {length}
"""
LORA = """
[schedule]
kind = "cosine"
peak = {peak}
warmup = 0.1
[lora]
rank = 16
alpha = 32
targets = {targets}
"""


def documents(batches: Sequence[Batch]) -> list[list[list[int]]]:
    """Each document's ids and targets."""
    out = []
    for batch in batches:
        first = 0
        for n in batch.lengths:
            part = slice(first, first + n)
            out.append([batch.ids[part].tolist(), batch.targets[part].tolist()])
            first += n
    return out


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """JSON that is made once."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def train(recipe: Path) -> None:
    """To its end, or on from where it stopped."""
    with prepare(recipe) as plan:
        plan.run(listen=lambda facts: print({k: v for k, v in facts.items() if k != "seconds"}, flush=True))


def sql(options: argparse.Namespace) -> dict[str, Any]:
    work: Path = options.work
    data = options.data / "wikisql_lora"
    source = resolve(options.model)
    if not (work / "base" / "model.safetensors").exists():
        with open_checkpoint(source) as checkpoint:
            write_folder(checkpoint, work / "base", "f32")
    rows = (data / "train.jsonl").read_text().splitlines(keepends=True)[: options.rows]
    (work / "train.jsonl").write_text("".join(rows))
    recipe = work / "sql.toml"
    how = {"threads": options.threads, "peak": options.peak or 5e-4, "targets": json.dumps(options.targets)}
    recipe.write_text((SQL + LORA).format(work=work, data=options.data, **how))
    task = work / "task.json"
    if not task.exists():
        with prepare(recipe) as plan:
            model, trainer = plan.trainer.model, plan.trainer
            lora = next(iter(model.layers[0].adapters.values())).lora
            write_adapter(work / "first", lora.low_rank(model.parameters, str(work / "base")))
            steps = [documents(plan.feed.next()) for _ in range(plan.feed.steps)]
            o = trainer.optimiser
            facts = {
                "base": str(work / "base"), "adapter": str(work / "first"), "threads": options.threads,
                "optimiser": {"betas": o.betas, "eps": o.eps, "decay": o.decay, "clip": trainer.clip},
                "rates": [trainer.schedule(i) for i in range(plan.feed.steps)], "steps": steps,
                "held": [documents([batch]) for batch in plan.feed.held],
            }  # fmt: skip
        write_json(task, facts)
    if not (work / "sql" / "adapter" / "adapter_model.safetensors").exists():
        train(recipe)
    if not options.alone and not (work / "peft.json").exists():
        shop = Workshop(work / "envs", work / "models", {"peft": options.python} if options.python else {})
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([shop.python("peft"), str(HERE / "peft_peer.py"), str(task)], check=True, env=environment)
    lines = [json.loads(line) for line in (work / "sql" / "log.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if line["kind"] == "step"]
    held = [line["loss"] for line in lines if line["kind"] == "evaluation"][-1]
    tokens = sum(len(ids) for documents in json.loads(task.read_text())["steps"] for ids, _ in documents)
    found: dict[str, Any] = {
        "rows": options.rows, "steps": len(ours), "tokens": tokens, **how, "losses": ours, "held-out loss": held,
    }  # fmt: skip
    if not options.alone:
        peft = json.loads((work / "peft.json").read_text())
        apart = max(abs(a - b) / b for a, b in zip(ours, peft["losses"], strict=True))
        found |= {"before": peft["held"][0], "peft": peft["held"][1], "ratio": held / peft["held"][1]}
        found["largest relative difference of a step"] = apart
    tests = [json.loads(line)["text"].partition("\nA: ") for line in (data / "test.jsonl").read_text().splitlines()]
    prompts, answers = [p + m for p, m, _ in tests], [a.strip() for _, _, a in tests]
    adapter = work / "sql" / "adapter"

    def said(**how: Any) -> list[str]:
        with smolrun.load(work / "base", context=2048, threads=options.threads, **how) as llm:
            sampling = Sampling(temperature=0)
            return [c.text.strip() for c in llm.batch(prompts, sampling=sampling, stop="\n", max_tokens=80)]

    texts = {
        "before": kept(work / "before.json", said),
        "after": kept(work / "after.json", lambda: said(adapter=adapter)),
    }
    found["exact match of 100"] = {
        name: sum(a == b for a, b in zip(out, answers, strict=True)) for name, out in texts.items()
    }
    merged = work / "merged.gguf"
    if not merged.exists():
        quantize_file(work / "base", merged, "f32", adapter=adapter)
    found["merged, in llama.cpp"] = kept(
        work / "merged.json", lambda: merged_text(merged, prompts, texts["after"], options)
    )
    return found


def merged_text(merged: Path, prompts: list[str], expected: list[str], options: argparse.Namespace) -> dict[str, int]:
    """Rows whose greedy text llama.cpp, on the merged file, gives letter for letter as smolrun with the adapter."""
    from llama_cpp import Llama

    count = options.merged_rows
    llama = Llama(str(merged), n_ctx=1024, n_threads=options.threads, verbose=False, logits_all=False)
    same = 0
    for prompt, text in zip(prompts[:count], expected, strict=False):
        out = llama.create_completion(prompt, max_tokens=80, temperature=0.0, stop=["\n"])
        same += out["choices"][0]["text"].strip() == text
    return {"rows": count, "same text": same}


def dpo(options: argparse.Namespace) -> dict[str, Any]:
    work: Path = options.work
    pairs = json.loads((options.data / "dpo_demo" / "dpo_en_demo.json").read_text())
    order = np.random.default_rng(0).permutation(len(pairs))
    for name, chosen in (("train", order[:200]), ("held", order[200:])):
        (work / f"pairs-{name}.json").write_text(json.dumps([pairs[i] for i in chosen]))
    recipe = work / "dpo.toml"
    how = {name: getattr(options, name) for name in ("beta", "threads", "length", "prompt_length")}
    how |= {"peak": options.peak or 2e-4, "targets": json.dumps(options.targets), "base": resolve(options.model)}
    recipe.write_text((DPO + LORA).format(work=work, **how))
    if not (work / "dpo" / "adapter" / "adapter_model.safetensors").exists():
        train(recipe)

    lines = [json.loads(line) for line in (work / "dpo" / "log.jsonl").read_text().splitlines()]
    held = [line for line in lines if line["kind"] == "evaluation"][-1]
    return {
        "pairs": 200, "held back": 100, **{k: v for k, v in how.items() if k != "base"},
        "training": [{k: line[k] for k in ("loss", "margin", "accuracy")} for line in lines if line["kind"] == "step"],
        **{k: v for k, v in held.items() if k not in ("kind", "step")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sql", "dpo"])
    parser.add_argument("--model", help="default: the installed 135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikisql_lora and dpo_demo")
    parser.add_argument("--work", type=Path, default=Path("tune-work"))
    parser.add_argument("--rows", type=int, default=400, help="of wikisql_lora's train.jsonl")
    parser.add_argument("--merged-rows", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--peak", type=float, help="learning rate [5e-4, of DPO 2e-4]")
    parser.add_argument("--targets", nargs="+", default=["q", "v"], help="matrices that get adapters")
    parser.add_argument("--alone", action="store_true", help="without peft")
    parser.add_argument("--length", type=int, default=160, help="tokens of an answer with its prompt, at most")
    parser.add_argument("--prompt-length", type=int, default=96, help="of a prompt, the last so many")
    parser.add_argument("--python", help="interpreter of an environment with torch, transformers and peft")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = {"sql": sql, "dpo": dpo}[options.what](options)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = f"{options.what} alone" if options.alone else options.what
    write_json(RESULTS, document | {name: found, "machine": machine()})
    print(json.dumps({k: v for k, v in found.items() if k not in ("training", "losses")}, indent=1))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
