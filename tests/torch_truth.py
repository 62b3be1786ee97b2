"""torch's answers to what test_torch.py asks; a program of its own, since torch may live in another environment.

    python torch_truth.py FOLDER GIVEN.npz OUT.npz

GIVEN: ids, targets (-1: none), lengths of documents one after the other; with `weights`, the gradients of
-sum(weights log p) by transformers' names; with `rates`, that many steps of AdamW, `per_step` documents each.
"""

import sys

import numpy as np
import torch
from transformers import LlamaForCausalLM


def negative_log_p(model, ids, targets):
    """-log p of each target of one document, 0 where there is none."""
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    labels = torch.from_numpy(np.where(targets >= 0, targets, -100))
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def main(folder, given, out):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    data, answers = np.load(given), {}
    ends = np.cumsum(data["lengths"])
    documents = [
        (data["ids"][e - n : e], data["targets"][e - n : e], e - n) for e, n in zip(ends, data["lengths"], strict=True)
    ]
    if "weights" in data:
        for ids, targets, first in documents:
            weights = torch.from_numpy(data["weights"][first : first + len(ids)])
            (negative_log_p(model, ids, targets) * weights).sum().backward()
        answers |= {name: p.grad.numpy() for name, p in model.named_parameters()}
    if "rates" in data:
        decay, plain = ([p for p in model.parameters() if (p.ndim == 2) is many] for many in (True, False))
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
        losses, per_step = [], int(data["per_step"])
        for step, rate in enumerate(data["rates"]):
            some = documents[step * per_step : (step + 1) * per_step]
            count = sum(int((targets >= 0).sum()) for _, targets, _ in some)
            loss = sum(negative_log_p(model, ids, targets).sum() for ids, targets, _ in some) / count
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = float(rate)
            optimiser.step()
            losses.append(float(loss))
        answers["losses"] = np.array(losses)
    np.savez(out, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
