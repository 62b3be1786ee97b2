"""The training of benchmarks/tune.py once more, by torch and peft: runs in their own environment.

python peft_peer.py TASK.json      reads the model, the first adapter, every batch and learning rate from it;
                                   writes losses and the last adapter beside it
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # of this folder: transformers looks for a package named kernels

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def batch_loss(model: torch.nn.Module, documents: list[list[list[int]]]) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropy of all targets, and their number. A document is [ids, targets], -1 for none."""
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    targets = torch.full((len(documents), longest), -100)
    mask = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, (its, wanted) in enumerate(documents):
        ids[row, : len(its)] = torch.tensor(its)
        mask[row, : len(its)] = 1
        targets[row, : len(its)] = torch.tensor([t if t >= 0 else -100 for t in wanted])
    hidden = model.base_model.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    learnt = targets != -100  # logits of no other position are made
    logits = model.base_model.model.lm_head(hidden[learnt])
    return torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="sum"), int(learnt.sum())


def mean(model: torch.nn.Module, batches: list[list[list[list[int]]]]) -> float:
    """Mean loss of all targets, without gradients."""
    model.eval()
    with torch.no_grad():
        parts = [batch_loss(model, documents) for documents in batches]
    model.train()
    return float(sum(float(total) for total, _ in parts) / sum(count for _, count in parts))


def main(path: Path) -> None:
    task = json.loads(path.read_text())
    torch.set_num_threads(task["threads"])
    base = AutoModelForCausalLM.from_pretrained(task["base"], torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(base, task["adapter"], is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    o = task["optimiser"]
    adamw = torch.optim.AdamW(trained, lr=0.0, betas=tuple(o["betas"]), eps=o["eps"], weight_decay=o["decay"])
    model.train()
    losses, before, began = [], mean(model, task["held"]), time.perf_counter()
    for step, documents in enumerate(task["steps"]):
        total, count = batch_loss(model, documents)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, o["clip"])
        for group in adamw.param_groups:
            group["lr"] = task["rates"][step]
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss))
        print(f"{step + 1}/{len(task['steps'])} {losses[-1]:.4f} {time.perf_counter() - began:.0f} s", file=sys.stderr)
    seconds = time.perf_counter() - began
    facts = {"losses": losses, "held": [before, mean(model, task["held"])], "seconds": seconds}
    model.save_pretrained(path.with_name("peft-adapter"))
    path.with_name("peft.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
