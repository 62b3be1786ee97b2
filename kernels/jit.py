"""The one decorator of the kernels and the registry of what they export.

Imported by the compiling child process only (build.py): the run-time links the objects it makes and never imports Numba.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba

from .target import TIERS

# The tier this process compiles for; build.py starts a process per tier because LLVM's target is fixed at Numba's first compile.
TIER = TIERS[os.environ["SMOLRUN_BUILD_TIER"]]

# No exceptions, no bounds checks, no fast-math: what is left is arithmetic on addresses, and an object without Python symbols.
kernel = numba.njit(error_model="numpy", boundscheck=False, fastmath=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)

_EXPORTS: dict[str, tuple[Any, Callable[..., Any]]] = {}


def export(signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as one C entry point of its module's object, under its own name."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__smolrun_signature__ = signature  # type: ignore[attr-defined]
        return function

    return mark


def object_code(function: Callable[..., Any]) -> tuple[str, bytes]:
    """(symbol, relocatable object) of a function marked with `export`.

    The C wrapper that Numba makes has a mangled name: it is returned, not changed, because the object is linked by that name.
    """
    compiled = numba.cfunc(
        function.__smolrun_signature__, error_model="numpy", boundscheck=False, fastmath=False  # type: ignore[attr-defined]
    )(function)
    return compiled.native_name, compiled._library.emit_native_object()


def assembly(function: Callable[..., Any]) -> str:
    """Assembly of a function marked with `export`, for tests that look for instructions."""
    compiled = numba.cfunc(
        function.__smolrun_signature__, error_model="numpy", boundscheck=False, fastmath=False  # type: ignore[attr-defined]
    )(function)
    return str(compiled._library.get_asm_str())
