"""Training on the kernels of the runtime.

    adapters < ops, parameters < model < objective, optimiser < trainer < recipe, rows, data, run < pretrain < tasks

>>> from smolrun.train import AdamW, Batch, Model, Trainer, cosine                      # doctest: +SKIP
>>> with open_checkpoint(path) as checkpoint:                                          # doctest: +SKIP
...     model = Model(checkpoint, tokens=1024)
>>> trainer = Trainer(model, AdamW(model.parameters, model.ops), cosine(1e-4, 100))     # doctest: +SKIP
>>> for documents in data:                                                             # doctest: +SKIP
...     print(trainer.step([Batch.of(documents)]).loss)

A whole run, as `smolrun train` does it, is `smolrun.train.tasks.prepare(recipe)`.
"""

from smolrun.train.adapters import LoRA
from smolrun.train.model import IGNORED, Batch, Model
from smolrun.train.objective import DPO, Objective, Pairs, evaluate, next_token
from smolrun.train.optimiser import AdamW, Schedule, constant, cosine, wsd
from smolrun.train.trainer import Step, Trainer

__all__ = [
    "DPO",
    "IGNORED",
    "AdamW",
    "Batch",
    "LoRA",
    "Model",
    "Objective",
    "Pairs",
    "Schedule",
    "Step",
    "Trainer",
    "constant",
    "cosine",
    "evaluate",
    "next_token",
    "wsd",
]
