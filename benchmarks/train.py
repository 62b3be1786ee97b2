"""Training speed and memory beside torch, in the same run on the same weights and ids.

    python benchmarks/train.py                        # 135M, 2 x 512 tokens, 2 threads, all settings
    python benchmarks/train.py --only f32,fp32 --steps 5 --save

A step is forward, backward, clipping and AdamW on all weights (or on adapters). Every setting runs alone in a process
of its own, whose peak memory is its high-water mark; torch lives in an environment that peers.py makes. Nobody is timed
unchecked: the losses of the steps must be torch fp32's to 1e-3, those in bf16 torch autocast's to 0.01. Whose peer is
missing, or has none, is compared by its first loss with torch fp32: autocast itself to 0.05, adapters to 0.02.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LENGTH, BATCH, RATE = 512, 2, 1e-5

# setting -> (whose it is ratio to, options of smolrun.train.Model)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "f32": ("fp32", {}),
    "f32 recompute": ("fp32", {"recompute": True}),
    "bf16": ("bf16 autocast", {"precision": "bf16"}),
    "bf16 recompute": ("bf16 autocast", {"precision": "bf16", "recompute": True}),
    "lora r16 on q8_0": ("", {"targets": ("q", "v")}),
    "lora r16 on q8_0 all": ("", {"targets": ("q", "k", "v", "o", "gate", "up", "down")}),
    "lora r16 on q8_0 all bf16 recompute": (
        "",
        {"targets": ("q", "k", "v", "o", "gate", "up", "down"), "precision": "bf16", "recompute": True},
    ),
}
TORCH = ("fp32", "fp32 checkpointing", "bf16 autocast")
BOUNDS = {"f32": 1e-3, "fp32": 1e-3, "bf16": 0.01}
FIRST = {"bf16": 0.05, "lora": 0.02}  # of the first loss, against torch fp32


def documents(steps: int) -> Any:
    """Ids of each step, the same for everyone: int64 (steps, batch, length + 1)."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 49_000, (steps, BATCH, LENGTH + 1))


def peak() -> int:
    """The process's high-water mark in bytes: of its own pages, and of files it maps."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(folder: str, setting: str, steps: int, threads: int) -> dict[str, Any]:
    """Times and losses of our steps."""
    from smolrun.files.checkpoint import open_checkpoint
    from smolrun.train import AdamW, Batch, LoRA, Model, Trainer, constant

    options = dict(OURS[setting][1])
    if targets := options.pop("targets", None):
        options |= {"lora": LoRA(rank=16, targets=targets), "quantize": "q8_0"}
    with open_checkpoint(Path(folder)) as checkpoint:
        model = Model(checkpoint, tokens=BATCH * LENGTH, threads=threads, **options)
    trainer = Trainer(model, AdamW(model.parameters, model.ops), constant(RATE))
    seconds, losses = [], []
    for ids in documents(steps):
        batch, began = Batch.of(ids.tolist()), time.perf_counter()
        losses.append(trainer.step([batch]).loss)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses, "bytes": peak()}


def torch(folder: str, setting: str, steps: int, threads: int) -> dict[str, Any]:
    """Times and losses of torch's steps."""
    import contextlib

    sys.path.pop(0)  # this folder: transformers looks for a package "kernels", and finds ours
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    model.config.use_cache = False
    if "checkpointing" in setting:
        model.gradient_checkpointing_enable()
    decay, plain = ([p for p in model.parameters() if (p.ndim == 2) is many] for many in (True, False))
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    seconds, losses = [], []
    for ids in documents(steps):
        ids, began = torch.from_numpy(ids), time.perf_counter()
        auto = torch.autocast("cpu", dtype=torch.bfloat16) if "bf16" in setting else contextlib.nullcontext()
        with auto:
            logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses, "bytes": peak()}


def checked(name: str, results: dict[str, dict[str, Any]]) -> str:
    """Why a result does not count; "" if it does."""
    kind, peer = name.split()[0], OURS[name][0] if name in OURS else "fp32"
    pairs = list(zip(results[name]["losses"], results.get(peer, results["fp32"])["losses"], strict=True))
    if kind in FIRST and (name not in OURS or peer not in results):
        pairs, bound = pairs[:1], FIRST[kind]
    else:
        bound = BOUNDS[kind]
    error = max(abs(a - b) for a, b in pairs)
    return "" if error <= bound else f"its loss is off by {error:.4f}, at most {bound} expected"


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'':<30}{'tok/s':>8}{'best':>8}{'peak MB':>10}   against"]
    for row in rows:
        line = f"{row['name']:<30}{row['median']:>8.0f}{row['best']:>8.0f}{row['bytes'] / 1e6:>10,.0f}"
        if row["failed"]:
            line = f"{row['name']:<30}failed: {row['failed']}"
        elif row["against"]:
            line += f"   {row['against']}: {row['speed']:.2f}x the speed, {row['memory']:.0%} of the memory"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings, by their names and commas; all")
    parser.add_argument("--steps", type=int, default=4, help="the first warms up and is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch", default="", help="an interpreter that has torch and transformers; one is made")
    parser.add_argument("--folder", type=Path, help="the model; the installed 135M as a folder of f16")
    parser.add_argument(
        "--save", action="store_true", help="into results/train.json, in place of rows of the same names"
    )
    parser.add_argument("--child", nargs=2, metavar=("WHO", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, setting = options.child
        run = {"smolrun": ours, "torch": torch}[who]
        print(json.dumps(run(str(options.folder), setting, options.steps, options.threads)))
        return

    import peers

    workshop = peers.Workshop(peers.CACHE / "envs", peers.CACHE / "models", {})
    folder = options.folder or workshop.folder("135m")
    interpreter = options.torch or workshop.python("torch")
    wanted = [name.strip() for name in options.only.split(",")] if options.only else [*TORCH, *OURS]
    results: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(["fp32", *wanted]):
        who, python = ("torch", interpreter) if name in TORCH else ("smolrun", sys.executable)
        command = [python, __file__, "--child", who, name, "--folder", str(folder)]
        command += ["--steps", str(options.steps), "--threads", str(options.threads)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} if who == "smolrun" else None
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
        results[name] = json.loads(said.splitlines()[-1])
        print(f"{who} {name}: {BATCH * LENGTH / min(results[name]['seconds']):.0f} tok/s", file=sys.stderr)
    rows = []
    for name, result in results.items():
        speeds = [BATCH * LENGTH / seconds for seconds in result["seconds"][1:]]
        row = {"name": ("torch " if name in TORCH else "smolrun ") + name, "samples": speeds, "bytes": result["bytes"]}
        row |= {"median": statistics.median(speeds), "best": max(speeds), "losses": result["losses"]}
        against = OURS[name][0] if name in OURS else ""
        peer = results.get(against)
        row |= {"failed": checked(name, results), "against": against if peer else ""}
        if peer:
            theirs = statistics.median(BATCH * LENGTH / seconds for seconds in peer["seconds"][1:])
            row |= {"speed": row["median"] / theirs, "memory": row["bytes"] / peer["bytes"]}
        rows.append(row)
    print(table(rows))
    if options.save:
        facts = {"batch": BATCH, "length": LENGTH, "threads": options.threads, "machine": peers.machine()}
        path, names = ROOT / "benchmarks" / "results" / "train.json", {row["name"] for row in rows}
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        peers.write_json(path, facts | {"rows": [row for row in before if row["name"] not in names] + rows})


if __name__ == "__main__":
    main()
