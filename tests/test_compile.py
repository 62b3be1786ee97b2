"""Compiled ahead: shared objects and bundles for devices without a compiler."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from smolrun.kernels import link
from smolrun.kernels.load import BuildError, addresses, c_function
from smolrun.kernels.target import TIERS, choose

NAMES = ["interleave", "swiglu"]
NATIVE = link.TARGETS["x86_64-linux-gnu"]


@pytest.mark.skipif(choose().machines != TIERS["generic"].machines, reason="an x86-64 machine")
def test_a_shared_object_computes_what_the_image_does(tmp_path: Path) -> None:
    """One source, one code generator: the linked object differs from the image in its container alone."""
    objects = link.compile_objects(choose(), NAMES, NATIVE)
    paths = [tmp_path / folder / "libone.so" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        link.link(objects, ["swiglu"], NATIVE, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    library = ctypes.CDLL(str(paths[0]))
    assert not hasattr(library, "interleave")  # only what is asked for is offered
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    here, there = x.copy(), x.copy()
    for address, data in (
        (addresses(choose(), ["swiglu"])["swiglu"], here),
        (ctypes.cast(library.swiglu, ctypes.c_void_p).value, there),
    ):
        c_function(address, 3)(data[0].ctypes.data, data[1].ctypes.data, 64)
    assert (here == there).all() and (here != x).any()


def test_an_object_that_needs_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"could not link libone\.so"):
        link.link({"empty": b""}, ["swiglu"], NATIVE, tmp_path / "libone.so")
    assert not (tmp_path / "libone.so").exists()


def test_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"no ld\.lld on PATH.*pip install ziglang"):
        link.link({}, [], NATIVE, tmp_path / "libone.so")
