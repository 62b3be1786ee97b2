"""What a model is, read from its checkpoint and never guessed.

A wrong theta or epsilon gives fluent nonsense, so a value that is absent is an error unless the format's own
specification defines what absence means (GGUF: no head_count_kv is no GQA; LlamaConfig: no biases, silu, untied head).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolrun.errors import ModelFileError, UnsupportedModel

HEAD_DIM = 64  # of every SmolLM2; the attention kernels are built for it
ROW_MULTIPLE = 32  # the kernels' block of columns
MOST = 1 << 24  # no dimension, vocabulary or context is larger: a damaged number stops here, not in an allocation
MOST_LAYERS = 1 << 10


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-architecture model.

    Letters used in every shape comment of the project: dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim,
    vocab_size.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    name: str = ""
    licence: str = ""

    @property
    def q_dim(self) -> int:
        """Rows of the query projection."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Rows of the key and of the value projection."""
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, source: str = "config.json", name: str = "", licence: str = ""
    ) -> "ModelConfig":
        """From the dict of a Hugging Face config.json.

        Raises:
            ModelFileError: a value that is missing, of the wrong type or out of range.
            UnsupportedModel: a sound config of something else than a plain Llama with 64-wide heads; names the feature.
        """
        keys = _Keys(config, source)
        keys.only("model_type", "llama", must=True)
        if config.get("architectures") is not None:
            keys.only("architectures", ["LlamaForCausalLM"])
        for feature, plain in HF_PLAIN.items():
            keys.only(feature, *plain)
        n_heads = keys.count("num_attention_heads")
        dim = keys.count("hidden_size")
        return cls(
            dim=dim,
            hidden_dim=keys.count("intermediate_size"),
            n_layers=keys.count("num_hidden_layers", most=MOST_LAYERS),
            n_heads=n_heads,
            n_kv_heads=keys.count("num_key_value_heads", default=n_heads),
            head_dim=keys.count("head_dim", default=dim // n_heads),
            vocab_size=keys.count("vocab_size"),
            max_positions=keys.count("max_position_embeddings"),
            rope_theta=_hf_theta(config, source),
            norm_eps=keys.number("rms_norm_eps"),
            tied=keys.flag("tie_word_embeddings", default=False),
            name=name,
            licence=licence,
        )._checked(source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tied: bool, source: str = "GGUF") -> "ModelConfig":
        """From GGUF metadata. `tied`: the file holds no output.weight (GGUF has no key for it).

        Raises: as from_hf.
        """
        keys = _Keys(metadata, source)
        keys.only("general.architecture", "llama", must=True)
        for feature, plain in GGUF_PLAIN.items():
            keys.only(f"llama.{feature}", *plain)
        n_heads = keys.count("llama.attention.head_count")
        dim = keys.count("llama.embedding_length")
        head_dim = keys.count("llama.attention.key_length", default=dim // n_heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            keys.only(key, head_dim)
        tokens = metadata.get("tokenizer.ggml.tokens")
        n_tokens = len(tokens) if isinstance(tokens, list) else None
        vocab_size = keys.count("llama.vocab_size", default=n_tokens)
        if n_tokens is not None and n_tokens != vocab_size:
            raise ModelFileError(f"{source}: llama.vocab_size is {vocab_size:,}, but there are {n_tokens:,} tokens")
        return cls(
            dim=dim,
            hidden_dim=keys.count("llama.feed_forward_length"),
            n_layers=keys.count("llama.block_count", most=MOST_LAYERS),
            n_heads=n_heads,
            n_kv_heads=keys.count("llama.attention.head_count_kv", default=n_heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_positions=keys.count("llama.context_length"),
            rope_theta=keys.number("llama.rope.freq_base"),
            norm_eps=_shortest(keys.number("llama.attention.layer_norm_rms_epsilon")),
            tied=tied,
            name=_text(metadata.get("general.name")),
            licence=_text(metadata.get("general.license")),
        )._checked(source)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], *, source: str) -> "ModelConfig":
        """From the fields that a packed model holds.

        Raises:
            ModelFileError: others than this version's, or values that contradict each other.
        """
        try:
            return cls(**facts)._checked(source)
        except TypeError:
            raise ModelFileError(
                f"{source}: config has {', '.join(facts)}; not this version's (compile it again)"
            ) from None

    def _checked(self, source: str) -> "ModelConfig":
        """Relations between values."""
        if self.head_dim != HEAD_DIM:
            raise UnsupportedModel(f"{source}: heads of {self.head_dim} dimensions; only {HEAD_DIM} is supported")
        for what, size in (("hidden size", self.dim), ("feed-forward size", self.hidden_dim)):
            if size % ROW_MULTIPLE:
                raise UnsupportedModel(f"{source}: a {what} of {size:,}; only multiples of {ROW_MULTIPLE} run")
        if self.n_heads % self.n_kv_heads:
            raise ModelFileError(f"{source}: {self.n_heads} heads do not divide by {self.n_kv_heads} key-value heads")
        if not 1 < self.rope_theta < 1e12:
            raise ModelFileError(f"{source}: rope theta is {self.rope_theta}, a number from 1 to 1e12 expected")
        if not 0 < self.norm_eps < 0.1:
            raise ModelFileError(f"{source}: the norm's epsilon is {self.norm_eps}, a number from 0 to 0.1 expected")
        return self


# feature -> the values with which a model is still a plain Llama; absence always is. Anything else is refused by name.
HF_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": ("silu",),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
}
GGUF_PLAIN: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0, 1 / math.sqrt(HEAD_DIM)),
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}
# inside rope_scaling / rope_parameters
ROPE_PLAIN: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "factor": (None, 1),
    "partial_rotary_factor": (None, 1),
}


def _hf_theta(config: Mapping[str, Any], source: str) -> float:
    """Theta from rope_theta, or from rope_parameters (transformers 5) or its old name rope_scaling; they must agree."""
    found: dict[str, float] = {}
    if config.get("rope_theta") is not None:
        found["rope_theta"] = _Keys(config, source).number("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ModelFileError(f"{source}: {key} is {_short(rope)}, an object expected")
        keys = _Keys(rope, f"{source}: {key}")
        for feature, plain in ROPE_PLAIN.items():
            keys.only(feature, *plain)
        for feature in rope.keys() - ROPE_PLAIN.keys() - {"rope_theta"}:
            raise UnsupportedModel(
                f"{source}: {key} has {feature} = {_short(rope[feature])}; only plain RoPE is supported"
            )
        if "rope_theta" in rope:
            found[f"{key}.rope_theta"] = keys.number("rope_theta")
    if not found:
        raise ModelFileError(
            f"{source}: neither rope_theta nor rope_parameters.rope_theta; a guess would give nonsense"
        )
    if len(set(found.values())) > 1:
        raise ModelFileError(f"{source}: " + " but ".join(f"{key} = {value}" for key, value in found.items()))
    return next(iter(found.values()))


class _Keys:
    """Typed look-ups in a checkpoint's dict, with errors that name file, key, found and expected."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ModelFileError(
                f"{self.source}: {key} is missing (a damaged or foreign checkpoint; download it again)"
            )
        return self.values[key]

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        if default is not None and self.values.get(key) is None:
            return default
        value = self.need(key)
        if isinstance(value, list):
            raise UnsupportedModel(
                f"{self.source}: {key} differs from layer to layer; only one value for all is supported"
            )
        if type(value) is not int or not 0 < value <= most:
            raise ModelFileError(f"{self.source}: {key} is {_short(value)}, a whole number from 1 to {most:,} expected")
        return value

    def number(self, key: str) -> float:
        value = self.need(key)
        if type(value) not in (int, float) or not abs(value) < 1e30:  # false for NaN
            raise ModelFileError(f"{self.source}: {key} is {_short(value)}, a finite number expected")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise ModelFileError(f"{self.source}: {key} is {_short(value)}, true or false expected")
        return default if value is None else value

    def only(self, key: str, *plain: Any, must: bool = False) -> None:
        """Refuse by name a feature that is present with another value than the plain ones."""
        if must:
            self.need(key)
        if key in self.values and not any(_same(self.values[key], value) for value in plain):
            expected = " or ".join(_short(value) for value in plain if value is not None) or "nothing"
            raise UnsupportedModel(f"{self.source}: {key} is {_short(self.values[key])}; only {expected} is supported")


def _same(value: Any, plain: Any) -> bool:
    if isinstance(plain, (int, float)) and isinstance(value, float):
        return abs(value - plain) < 1e-6  # a float32 in GGUF
    return bool(value == plain)


def _shortest(value: float) -> float:
    """The decimal that a float32 was written as: 9.999999747378752e-06 -> 1e-05, as config.json has it."""
    return float(f"{value:.7g}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
