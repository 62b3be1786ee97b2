"""What a model is, read from its checkpoint and never guessed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-architecture model.

    Letters used in every shape comment of the project: dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size.
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
