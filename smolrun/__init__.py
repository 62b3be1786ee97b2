"""smolrun runs SmolLM2 on a CPU.

>>> import smolrun
>>> with smolrun.load() as llm:                     # SmolLM2-135M-Instruct, or any source `load` names
...     answer = llm.chat([{"role": "user", "content": "Who wrote Hamlet?"}], sampling=smolrun.Sampling(seed=1))
>>> "Shakespeare" in answer.text
True

This is the only public door. Its names are looked up when they are first used: `import smolrun` costs no NumPy and no
Numba, so `smolrun --help` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smolrun.errors import (
    ContextOverflow,
    KernelError,
    ModelClosed,
    ModelFileError,
    ModelNotFound,
    OptionError,
    OutOfMemory,
    SessionError,
    SmolrunError,
    TemplateError,
    TokenizerError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from smolrun.answer import Chunk, Completion, Timings
    from smolrun.api import LLM, load
    from smolrun.generate.sampler import Sampling
    from smolrun.quantize import quantize_file

    __version__: str

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "ContextOverflow",
    "KernelError",
    "ModelClosed",
    "ModelFileError",
    "ModelNotFound",
    "OptionError",
    "OutOfMemory",
    "Sampling",
    "SessionError",
    "SmolrunError",
    "TemplateError",
    "Timings",
    "TokenizerError",
    "UnsupportedModel",
    "__version__",
    "load",
    "quantize_file",
]

_LAZY = {
    "LLM": "smolrun.api",
    "Chunk": "smolrun.answer",
    "Completion": "smolrun.answer",
    "Sampling": "smolrun.generate.sampler",
    "Timings": "smolrun.answer",
    "load": "smolrun.api",
    "quantize_file": "smolrun.quantize",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name == "__version__":
        from importlib.metadata import version  # 10 ms that only `--version` needs

        from smolrun.kernels import bundle

        value = bundle.manifest(place)["smolrun"] if (place := bundle.folder()) else version("smolrun")
    else:
        raise AttributeError(f"module 'smolrun' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
