"""Adapter folders as the `peft` library writes and reads them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   (rank, cols)
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   (rows, rank)         y = x W^T + scale x A^T B^T

Plain LoRA on a Llama's seven matrices. What would need more (DoRA, biases, other modules, patterns) is refused by name:
an adapter that is applied in part is another model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.config import ModelConfig
from smolrun.errors import ModelFileError, ModelNotFound, UnsupportedModel
from smolrun.files.checkpoint import HF_LAYER, expected_shapes, hf_name
from smolrun.files.folder import Folder
from smolrun.files.mapped import AGAIN
from smolrun.files.whole import whole
from smolrun.kernels.block import MOST_RANK
from smolrun.kernels.formats import FORMATS, dequantize_ref

Floats = NDArray[np.float32]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {part: name for part, name in HF_LAYER.items() if "norm" not in part}  # attn_q -> self_attn.q_proj
KEY = re.compile(r"base_model\.model\.(model\.layers\.\d+\.[a-z_.]+?)\.lora_([AB])(?:\.default)?\.weight")
# what a setting must be for the adapter to be A and B beside a matrix, and nothing else
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# other ways to begin change the base's weights too
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """One matrix's adapter: a float32 (rank, cols), b float32 (rows, rank)."""

    a: Floats
    b: Floats
    scale: float

    def delta(self, scale: float = 1.0) -> Floats:
        """What it adds to its matrix: float32 (rows, cols)."""
        out: Floats = np.float32(self.scale * scale) * (self.b @ self.a)
        return out


@dataclass(frozen=True)
class LowRank:
    """An adapter.

    Attributes:
        factors: by the stem of its matrix's name, "blk.3.attn_q"; half-split rotary rows.
        rank, alpha, dropout: as it was trained.
        base: the model that it was trained on, as its config names it; "" if it does not.
    """

    factors: Mapping[str, Factors]
    rank: int
    alpha: float
    dropout: float = 0.0
    base: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """Of attn_q, attn_k ..., which have adapters."""
        return tuple(part for part in TARGETS if any(stem.endswith(f".{part}") for stem in self.factors))

    @property
    def digest(self) -> bytes:
        """SHA-256 of all numbers."""
        digest = hashlib.sha256()
        for stem, f in sorted(self.factors.items()):
            digest.update(repr((stem, f.scale, f.a.shape, f.b.shape)).encode())
            digest.update(np.ascontiguousarray(f.a).data)
            digest.update(np.ascontiguousarray(f.b).data)
        return digest.digest()


def read_adapter(path: str | os.PathLike[str], config: ModelConfig) -> LowRank:
    """An adapter folder for a model of this shape.

    Raises:
        ModelNotFound: no such folder.
        ModelFileError: damaged, hostile, or for a model of another shape; names the tensor, found and expected.
        UnsupportedModel: sound, but more than LoRA on the matrices of the layers; names the setting.
    """
    if not os.path.isdir(path):
        raise ModelNotFound(f"{path}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    folder = Folder(Path(path))
    settings = folder.json(CONFIG)
    if settings is None:
        raise ModelFileError(f"{path}: {CONFIG} is missing: not an adapter folder as peft writes it")
    for name, plain in PLAIN.items():
        if settings.get(name) not in plain:
            raise UnsupportedModel(f"{CONFIG}: {name} is {settings.get(name)!r:.80}; only {plain[-1]!r} is supported")
    if settings.get("init_lora_weights") not in BEGINNINGS:
        found = settings["init_lora_weights"]
        raise UnsupportedModel(
            f"{CONFIG}: init_lora_weights {found!r:.80} changes the base model too; save it as a plain LoRA "
            "(peft: path_initial_model_for_weight_conversion)"
        )
    rank = _number(settings, "r", 1, MOST_RANK, int)
    alpha = _number(settings, "lora_alpha", -1e6, 1e6, float)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    base = settings.get("base_model_name_or_path")
    base = base if isinstance(base, str) else ""
    shapes = {
        hf_name(name).removesuffix(".weight"): (name.removesuffix(".weight"), shape)
        for name, shape in expected_shapes(config).items()
        if name.split(".")[-2] in TARGETS
    }
    halves: dict[str, dict[str, Floats]] = {}
    for key, shard in folder.shards(WEIGHTS).items():
        found = KEY.fullmatch(key)
        if not found or found[1] not in shapes:
            layers = f"layers 0 to {config.n_layers - 1} of {', '.join(TARGETS.values())}"
            raise UnsupportedModel(f"{WEIGHTS}: tensor {key:.120}: expected LoRA factors of {layers}{_of(base)}")
        stem, (rows, cols) = shapes[found[1]]
        expected = (rank, cols) if found[2] == "A" else (rows, rank)
        if shard.shape != expected:
            raise ModelFileError(f"{WEIGHTS}: tensor {key}: {expected} expected, {shard.shape} found{_of(base)}")
        raw = shard.file.view(shard.offset, shard.nbytes)
        values = dequantize_ref(FORMATS[shard.dtype], raw).reshape(expected)
        if not np.isfinite(values).all():
            raise ModelFileError(f"{WEIGHTS}: tensor {key}: NaN or infinity in it: a failed training")
        halves.setdefault(stem, {})[found[2]] = np.array(values, np.float32)
    for stem, found_halves in halves.items():
        if len(found_halves) < 2:
            raise ModelFileError(f"{WEIGHTS}: {hf_name(stem)}: lora_A and lora_B expected, one found {AGAIN}")
    if not halves:
        raise ModelFileError(f"{WEIGHTS}: no tensors in it {AGAIN}")
    factors = {stem: Factors(h["A"], h["B"], scale) for stem, h in halves.items()}
    return LowRank(factors, rank, alpha, _number(settings, "lora_dropout", 0, 1, float, default=0.0), base)


def _of(base: str) -> str:
    return f" (an adapter of {base!r:.80}: load it with that model)" if base else " (an adapter of another model?)"


def _number(
    settings: Mapping[str, Any], name: str, low: float, high: float, kind: type, default: float | None = None
) -> Any:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ModelFileError(f"{CONFIG}: {name} is {value!r:.80}, a number expected {AGAIN}")
    if not low <= value <= high:
        raise ModelFileError(f"{CONFIG}: {name} is {value}, {low:g} to {high:g} expected {AGAIN}")
    return kind(value)


def write_adapter(path: str | os.PathLike[str], adapter: LowRank) -> None:
    """A folder that `peft` and `read_adapter` open; each file appears whole or not at all, the weights last.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.numpy import save

    tensors = {}
    for stem, f in adapter.factors.items():
        own = f"base_model.model.{hf_name(stem).removesuffix('.weight')}"
        for half, values in (("A", f.a), ("B", f.b)):
            tensors[f"{own}.lora_{half}.weight"] = np.ascontiguousarray(values, np.float32)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(TARGETS[part].split(".")[-1] for part in adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((CONFIG, json.dumps(settings, indent=2).encode()), (WEIGHTS, save(tensors, {"format": "pt"}))):
        with whole(folder / name) as file:
            file.write(data)
