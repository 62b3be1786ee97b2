"""Training: gradients against float64 and finite differences, the forward pass against inference, bits, steps."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import naive
from calling import Kernels
from smolrun.config import ModelConfig
from smolrun.errors import ContextOverflow, OptionError, SmolrunError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.kernels.target import BF16, host_features, runnable
from smolrun.model.llama import Llama
from smolrun.train import DPO, AdamW, Batch, LoRA, Model, Pairs, Trainer, constant, cosine, evaluate, next_token, wsd
from tiny import Tiny, make_tiny

LENGTHS = (71, 2, 130, 34, 65)  # ids of documents: one position, part of a page, a page and more, two pages


def documents(config: ModelConfig, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(17, config.vocab_size, n).tolist() for n in lengths]


def batch_of(config: ModelConfig, seed: int = 0, masked: bool = True) -> Batch:
    """Some targets masked."""
    docs = documents(config, seed=seed)
    random = np.random.default_rng(seed + 1)
    return Batch.of(docs, [random.random(len(d)) < (0.7 if masked else 2) for d in docs])


def some_weights(batch: Batch) -> np.ndarray:
    """A weight of its own for each position."""
    return np.random.default_rng(9).uniform(-1, 1, len(batch.ids)).astype(np.float32)


def true_log_probs(config: ModelConfig, weights: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """log p of each target in float64, 0 where there is none."""
    parts, first = [], 0
    for n in batch.lengths:
        logits = naive.forward(config, weights, batch.ids[first : first + n].tolist(), ("f64", "f64"))
        top = logits.max(axis=1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        targets = batch.targets[first : first + n]
        parts.append(np.where(targets >= 0, log_p[np.arange(n), targets], 0))
        first += n
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("training"), n_layers=2, rope_theta=10_000.0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("untied"), n_layers=1, gqa=False, tied=False, vocab_size=320)


Make = Callable[..., Model]


@pytest.fixture
def make() -> Iterator[Make]:
    """Models that are closed after the test."""
    made: list[Model] = []

    def model(source: Tiny | Path | ModelConfig, **options: object) -> Model:
        options = {"tokens": 320, "threads": 1} | options
        if isinstance(source, ModelConfig):
            made.append(Model(source, **options))  # type: ignore[arg-type]
        else:
            with open_checkpoint(source.folder if isinstance(source, Tiny) else source) as checkpoint:
                made.append(Model(checkpoint, **options))  # type: ignore[arg-type]
        return made[-1]

    yield model
    for model_ in made:
        model_.close()


def gradients(model: Model, batch: Batch) -> dict[str, np.ndarray]:
    model.parameters.gradients[:] = 0
    model.forward(batch)
    model.backward(some_weights(batch))
    return {name: model.parameters.get(name, gradient=True) for name in model.parameters.shapes}


# ---- the forward pass is inference's ---------------------------------------------------------------------------------


def test_hidden_states_have_the_bits_of_inference(tiny: Tiny, make: Make) -> None:
    batch = batch_of(tiny.config)
    model = make(tiny)
    with open_checkpoint(tiny.folder) as checkpoint:
        llama = Llama(checkpoint, kv="f32", precision="f32", threads=1)
    x, first = model.forward(batch), 0
    norm, rmsnorm = model.parameters.get("output_norm.weight"), Kernels(llama.tier).rmsnorm
    for n in batch.lengths:
        ids = batch.ids[first : first + n].tolist()
        slot = llama.open(ids)
        expected = np.concatenate([llama.hidden(slot, ids[i : i + 100]) for i in range(0, n, 100)])
        # the final norm is the one op that training's buffer does not hold: inference's kernel
        found = np.stack([rmsnorm(row, norm, tiny.config.norm_eps) for row in x[first : first + n]])
        assert found.tobytes() == expected.tobytes()
        first += n
    llama.close()


FORWARD = {"rmsnorm", "swiglu", "interleave", "make_attention", "merge_spans", "make_tile", "make_unpack"}


def test_no_forward_op_has_a_second_implementation() -> None:
    """backward.py imports every op of the forward pass from where inference has it, and defines none of that name."""
    tree = ast.parse((Path(__file__).parents[1] / "kernels" / "backward.py").read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert imported.keys() >= FORWARD | {"call_matmul", "call_row"}
    assert {imported[name] for name in FORWARD} == {"pointwise", "attention", "matmul", "unpack"}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not defined & (FORWARD | {"rope"})  # which make_attention's store_kv rotates with


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "untied"])
def test_log_probs_and_gradients_are_those_of_float64(which: str, make: Make, request: pytest.FixtureRequest) -> None:
    """Along a random direction of each tensor, against central differences of the float64 model."""
    tiny: Tiny = request.getfixturevalue(which)
    batch, model = batch_of(tiny.config), make(tiny)
    weights = some_weights(batch).astype(np.float64)
    found = gradients(model, batch)
    model.forward(batch)
    np.testing.assert_allclose(model.log_probs(), true_log_probs(tiny.config, tiny.weights, batch), atol=2e-5)

    def loss(values: dict[str, np.ndarray]) -> float:
        return float(-(true_log_probs(tiny.config, values, batch) * weights).sum())

    exact = {name: w.astype(np.float64) for name, w in tiny.weights.items()}
    for name, gradient in found.items():
        # a direction that has much of the gradient in it, and noise of the same size
        noise = np.random.default_rng(3).standard_normal(gradient.shape)
        direction = gradient / np.linalg.norm(gradient) + noise / np.linalg.norm(noise)
        step = 1e-6 * np.linalg.norm(exact[name])
        up, down = (loss(exact | {name: exact[name] + sign * step * direction}) for sign in (1, -1))
        expected = (up - down) / (2 * step)
        assert abs((gradient * direction).sum() - expected) <= 2e-5 * np.linalg.norm(gradient), name


def bits(model: Model, batch: Batch) -> np.ndarray:
    gradients(model, batch)
    return model.parameters.gradients.view(np.uint32).copy()


def test_gradients_have_the_same_bits_for_all_threads_tiers_and_with_recomputation(
    tiny: Tiny, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(tiny.config)
    expected = bits(make(tiny), batch)
    assert expected.any()
    for options in ({"threads": 2}, {"threads": 5}, {"recompute": True}):
        assert np.array_equal(bits(make(tiny, **options), batch), expected), options
    for tier in runnable():
        monkeypatch.setenv("SMOLRUN_TIER", tier.name)
        assert np.array_equal(bits(make(tiny), batch), expected), tier.name


def test_documents_of_a_batch_do_not_see_each_other(tiny: Tiny, make: Make) -> None:
    """Each has the bits it has alone; gradients of batches add up."""
    batch, model = batch_of(tiny.config, masked=False), make(tiny)
    model.forward(batch)
    together, first, total = model.log_probs(), 0, None
    whole = gradients(model, batch)
    weights = some_weights(batch)
    model.parameters.gradients[:] = 0
    for n in batch.lengths:
        alone = Batch(batch.ids[first : first + n], batch.targets[first : first + n], (n,))
        model.forward(alone)
        log_probs = model.backward(weights[first : first + n])
        assert np.array_equal(log_probs, together[first : first + n])
        first += n
    for name, total in whole.items():
        np.testing.assert_allclose(model.parameters.get(name, gradient=True), total, atol=2e-5 * np.abs(total).max())


def test_a_second_pass_is_as_the_first(tiny: Tiny, make: Make) -> None:
    """Nothing of a batch, however large, is left for the next."""
    model, batch = make(tiny), Batch.of(documents(tiny.config, (40, 3)))
    first = bits(model, batch)
    bits(model, batch_of(tiny.config, seed=5))
    assert np.array_equal(bits(model, batch), first)


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["F32", "Q8_0", "Q4_K"])
def test_adapters_have_the_gradients_of_the_merged_matrix(fmt: str, tmp_path: Path, make: Make) -> None:
    """dW of the merged model, multiplied with the other factor, is the gradient of each factor: s B^T dW, s dW A^T."""
    tiny = make_tiny(tmp_path, fmt=fmt, dim=256, hidden_dim=512, n_layers=2)
    lora = LoRA(rank=8, alpha=16, targets=("q", "k", "v", "o", "gate", "up", "down"))
    adapted, batch = make(tiny.gguf, lora=lora), batch_of(tiny.config)
    random = np.random.default_rng(2)
    factors, merged = {}, make(tiny.gguf)
    for name in adapted.parameters.shapes:
        values = adapted.parameters.get(name)
        if name.endswith("lora_b"):
            assert not values.any()
            values[:, :8] = random.standard_normal((len(values), 8)) / 30
            adapted.parameters.set(name, values)
        factors[name] = values
    stems = [name.removesuffix(".lora_a") for name in factors if name.endswith("lora_a")]
    for stem in stems:
        delta = lora.scale * factors[f"{stem}.lora_b"] @ factors[f"{stem}.lora_a"]
        merged.parameters.set(f"{stem}.weight", merged.parameters.get(f"{stem}.weight") + delta)
    found, full = gradients(adapted, batch), gradients(merged, batch)
    adapted.forward(batch)
    merged.forward(batch)
    np.testing.assert_allclose(adapted.log_probs(), merged.log_probs(), atol=3e-5)
    for stem in stems:
        dw, a, b = full[f"{stem}.weight"], factors[f"{stem}.lora_a"], factors[f"{stem}.lora_b"]
        for name, expected in ((f"{stem}.lora_a", lora.scale * b.T @ dw), (f"{stem}.lora_b", lora.scale * dw @ a.T)):
            np.testing.assert_allclose(found[name], expected, atol=1e-4 * np.abs(expected).max())
            padding = found[name][8:] if name.endswith("a") else found[name][:, 8:]
            assert not padding.any()


def test_adapters_can_be_left_out(tiny: Tiny, make: Make) -> None:
    batch, adapted = batch_of(tiny.config), make(tiny, lora=LoRA(targets=("o", "down")))
    plain = adapted.forward(batch).copy()
    adapted.parameters.values[:] = 0.1
    assert not np.array_equal(adapted.forward(batch), plain)
    adapted.use_adapters = False
    assert np.array_equal(adapted.forward(batch), plain)


def test_dropout_is_the_same_in_both_directions(tiny: Tiny, make: Make) -> None:
    """The gradient is the slope of the very function that was computed; another seed is another function."""
    model = make(tiny, lora=LoRA(dropout=0.3, targets=("q", "up", "down")))
    batch = batch_of(tiny.config)
    weights = some_weights(batch).astype(np.float64)
    random = np.random.default_rng(0)
    model.parameters.values[:] = random.standard_normal(model.parameters.size) / 10
    gradients(model, batch)
    gradient = model.parameters.gradients.copy()

    def loss() -> float:
        model.forward(batch)
        return float(-(model.log_probs() * weights).sum())

    start, direction = model.parameters.values.copy(), gradient / np.linalg.norm(gradient)
    step, values = 3e-3, []
    for sign in (1, -1):
        model.parameters.values[:] = start + sign * step * direction
        values.append(loss())
    assert abs((values[0] - values[1]) / (2 * step) / np.linalg.norm(gradient) - 1) < 5e-3
    model.parameters.values[:] = start
    one = loss()
    model.dropout_seed = 1
    assert loss() != one


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_what_a_model_may_not_be_given(tiny: Tiny, make: Make) -> None:
    for options, problem in (
        ({"threads": 0}, "threads=0"),
        ({"context": 0}, "context=0"),
        ({"quantize": "q8_0"}, "with `lora` they are frozen"),
    ):
        with pytest.raises(OptionError, match=problem):
            make(tiny, **options)
    docs = documents(tiny.config, (5, 6))
    for some, masks in (([], None), (docs, [[True] * 5]), (docs, [[True] * 5, [True]])):
        with pytest.raises(OptionError):
            Batch.of(some, masks)
    nothing = Batch.of(docs, [[False] * 5, [False] * 6])
    for batches in ([], [nothing]):
        for objective in (next_token, evaluate, DPO()):
            with pytest.raises(OptionError):
                objective(make(tiny), batches)  # type: ignore[operator]
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="alpha"):
            LoRA(alpha=alpha)


def test_adamw_is_the_formula(tiny: Tiny, make: Make) -> None:
    model = make(tiny)
    optimiser = AdamW(model.parameters, model.ops, decay=0.1)
    p, random = model.parameters, np.random.default_rng(0)
    truth, m, v = p.values.astype(np.float64), np.zeros(p.size), np.zeros(p.size)
    decay = np.where(np.arange(p.size) < p.decayed, 0.1, 0)
    for step in range(1, 4):
        p.gradients[:] = random.standard_normal(p.size)
        g = p.gradients * 0.5
        assert optimiser.gradient_norm() == pytest.approx(np.linalg.norm(p.gradients.astype(np.float64)), rel=1e-6)
        optimiser.step(1e-2, clip=0.5)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        truth -= 1e-2 * (decay * truth + m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8))
        np.testing.assert_allclose(p.values, truth, atol=2e-6)
        assert not p.gradients.any()


def test_schedules() -> None:
    rate = wsd(1.0, 100, warmup=10, decay=20)
    assert [rate(s) for s in (0, 9, 10, 80, 90, 99, 100)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05, 0])
    rate = cosine(2.0, 110, warmup=10, floor=0.1)
    assert [rate(s) for s in (4, 10, 60, 110, 500)] == pytest.approx([1, 2, 1.1, 0.2, 0.2])
    assert [constant(3.0, warmup=2)(s) for s in (0, 1, 7)] == [1.5, 3, 3]
    with pytest.raises(OptionError):
        wsd(1.0, 10, warmup=6, decay=6)


def learn(model: Model, batches: list[list[Batch]], **options: object) -> tuple[Trainer, list[float]]:
    trainer = Trainer(model, AdamW(model.parameters, model.ops), constant(3e-3), **options)  # type: ignore[arg-type]
    return trainer, [trainer.step(some).loss for some in batches]


def test_it_learns_and_accumulates(tiny: Tiny, make: Make) -> None:
    """Two halves in one step are one batch; what is repeated is learnt; the mean is over targets, not batches."""
    docs = documents(tiny.config, (40, 25, 90, 12))
    whole, halves = [Batch.of(docs)], [Batch.of(docs[:1]), Batch.of(docs[1:])]
    _, one = learn(make(tiny), [whole] * 12)
    _, two = learn(make(tiny), [halves] * 12)
    np.testing.assert_allclose(one, two, rtol=1e-4)
    assert one[-1] < one[0] / 3
    model = make(tiny)
    assert evaluate(model, halves) == pytest.approx(one[0], rel=1e-5)


def test_a_restored_trainer_goes_on_with_the_same_bits(tiny: Tiny, make: Make) -> None:
    batches = [[batch_of(tiny.config, seed)] for seed in range(6)]
    trainer, _ = learn(make(tiny, lora=LoRA(dropout=0.1)), batches[:3])
    kept = {name: values.copy() for name, values in trainer.state().items()}
    rest = [trainer.step(some).loss for some in batches[3:]]
    again, _ = learn(make(tiny, lora=LoRA(dropout=0.1)), batches[:1])
    again.restore(kept)
    assert [again.step(some).loss for some in batches[3:]] == rest
    with pytest.raises(OptionError, match="another model"):
        again.restore(kept | {"m": kept["m"][:-1]})


def test_from_scratch(make: Make) -> None:
    config = ModelConfig(64, 96, 1, 1, 1, 64, 100, 128, 1e4, 1e-5, True)
    model, batch = make(config, seed=3), [Batch.of(documents(config, (30, 30)))]
    _, losses = learn(model, [batch] * 15)
    assert 3.5 < losses[0] < 6 and losses[-1] < losses[0] / 2
    assert len(model.parameters) == 100 * 64 + 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64


def test_dpo(tiny: Tiny, make: Make) -> None:
    """At first the margin is 0 and the loss log 2; the gradient is its slope; a few steps prefer the chosen."""
    docs = documents(tiny.config, (20, 24, 31, 18))
    masks = [np.arange(len(d)) >= 9 for d in docs]
    model = make(tiny, lora=LoRA(targets=("q", "v", "down")))
    pairs = Pairs.score(model, Batch.of(docs, masks))
    trainer, losses = learn(model, [[pairs]], objective=DPO(beta=0.5))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    steps = [trainer.step([pairs]) for _ in range(8)]
    assert steps[-1].loss < 0.3 and steps[-1].figures["accuracy"] == 1 and steps[-1].figures["margin"] > 1
    assert steps[-1].figures["chosen"] - steps[-1].figures["rejected"] == pytest.approx(steps[-1].figures["margin"])

    objective = DPO(beta=0.5, label_smoothing=0.2)
    model.parameters.gradients[:] = 0
    objective(model, [pairs])
    gradient, start = model.parameters.gradients.copy(), model.parameters.values.copy()
    direction = gradient / np.linalg.norm(gradient)
    step, values = 2e-3, []
    for sign in (1, -1):
        model.parameters.values[:] = start + sign * step * direction
        values.append(objective(model, [pairs])["loss"])
    assert abs((values[0] - values[1]) / (2 * step) / np.linalg.norm(gradient) - 1) < 1e-2
    with pytest.raises(OptionError, match="Pairs"):
        objective(model, [Batch.of(docs)])


def test_what_is_refused(tiny: Tiny, make: Make) -> None:
    model = make(tiny, tokens=64, context=40)
    with pytest.raises(ContextOverflow):
        model.forward(Batch.of(documents(tiny.config, (45,))))
    with pytest.raises(OptionError, match=r"expected 1\.\.64"):
        model.forward(Batch.of(documents(tiny.config, (40, 40))))
    with pytest.raises(OptionError, match="ids from"):
        model.forward(Batch(np.array([3, 333]), np.array([3, 4]), (2,)))
    with pytest.raises(OptionError, match="next one"):
        Batch.of([[1]])
    with pytest.raises(OptionError, match="nothing to learn"):
        next_token(model, [Batch.of([[1, 2]], [[True, False]])])
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"targets": ("w",)}):
        with pytest.raises(OptionError):
            LoRA(**bad)
    trainer, _ = learn(model, [])
    before = model.parameters.values.copy()
    model.parameters.gradients[3] = np.nan
    with pytest.raises(SmolrunError, match="diverged"):
        trainer.step([Batch.of(documents(tiny.config, (20,)))])
    assert np.array_equal(model.parameters.values, before)


# ---- bf16 ------------------------------------------------------------------------------------------------------------

HAS_BF16 = runnable()[0].dot == BF16.dot and set(BF16.needs) <= host_features()


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bf16."""
    return naive.stored(x, "bf16").astype(np.float32)


@pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16")
def test_bf16_rounds_operands_and_nothing_else(tiny: Tiny, make: Make) -> None:
    """Log p of one product alone, the head's, is that of rounded operands; gradients are near f32's."""
    batch = batch_of(tiny.config)
    f32, bf16 = make(tiny), make(tiny, precision="bf16")
    for model in (f32, bf16):
        for name in model.parameters.shapes:
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                model.parameters.set(name, np.zeros(model.parameters.shapes[name], np.float32))  # layers add nothing
    x = bf16.forward(batch)
    assert np.array_equal(x, f32.forward(batch))
    h = naive.rmsnorm(x, bf16.parameters.get("output_norm.weight"), tiny.config.norm_eps).astype(np.float32)
    logits = naive.matmul(rounded(bf16.parameters.get("token_embd.weight")), rounded(h))
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.where(batch.learnt, expected[np.arange(len(x)), batch.targets], 0)
    found = bf16.log_probs()
    assert np.abs(found - expected).max() < 2e-3 < np.abs(f32.log_probs() - expected).max()

    one, two = make(tiny, precision="bf16"), make(tiny, precision="bf16", threads=3, recompute=True)
    assert np.array_equal(bits(one, batch), bits(two, batch))
    exact = gradients(make(tiny), batch)
    for name, gradient in gradients(one, batch).items():
        assert 1e-3 < np.linalg.norm(gradient - exact[name]) / np.linalg.norm(exact[name]) < 0.1, name


@pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16")
def test_bf16_learns_beside_f32_also_with_adapters_on_packed_weights(tmp_path: Path, make: Make) -> None:
    tiny = make_tiny(tmp_path, fmt="Q8_0", dim=256, hidden_dim=512, n_layers=1)
    batches = [[Batch.of(documents(tiny.config, (40, 50)))]] * 8
    for options in ({}, {"lora": LoRA(targets=("q", "o", "up", "down"))}):
        _, f32 = learn(make(tiny.gguf, **options), batches)
        _, bf16 = learn(make(tiny.gguf, precision="bf16", **options), batches)
        np.testing.assert_allclose(f32, bf16, atol=0.05)
        assert bf16[-1] < bf16[0] - 0.2


def test_bf16_is_refused_where_it_cannot_be(tiny: Tiny, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLRUN_TIER", "generic" if runnable()[0].x86 else "neon")
    with pytest.raises(OptionError, match="AVX512-BF16"):
        make(tiny, precision="bf16")
    with pytest.raises(OptionError, match="f32 or bf16"):
        make(tiny, precision="fp8")
