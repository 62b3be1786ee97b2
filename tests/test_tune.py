"""Fine-tuning: which ids are learnt, runs of sft and dpo from their recipes, and what comes out of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolrun
from smolrun import Sampling
from smolrun.errors import OptionError
from smolrun.export import merge, write_folder
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.peft import Factors, LowRank, read_adapter, write_adapter
from smolrun.quantize import quantize_file
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer
from smolrun.train.data import tokenizer_digest
from smolrun.train.examples import Encoder, examine
from smolrun.train.recipe import Examples
from smolrun.train.rows import Row, read_rows
from smolrun.train.tasks import Plan, prepare
from smolrun.train.tune import packed
from tiny import Tiny, make_tiny

SAID = {"role": "assistant", "content": "In the east. <|im_end|>"}
DIALOGUE = [{"role": "user", "content": "Where is it?"}, SAID]
MORE = [*DIALOGUE, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "It sets."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples that no other test, and no other version, has encoded."""
    monkeypatch.setattr("smolrun.train.data.user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tune"), n_layers=1, dim=64, hidden_dim=96, max_positions=512)


def encoder(tiny: Tiny, length: int = 500, **data: Any) -> tuple[Encoder, Tokenizer]:
    with open_checkpoint(tiny.folder) as checkpoint:
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
        template = ChatTemplate(checkpoint.chat_template, tokenizer)
    return Encoder(
        Examples(path="", **data), tokenizer, template, length, tokenizer_digest(checkpoint.tokenizer)
    ), tokenizer


def learnt(tokenizer: Tokenizer, example: Any) -> str:
    return tokenizer.decode(example.ids[example.mask].tolist())


# ---- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["messages", "conversations"])
def test_every_turn_of_the_assistant_is_learnt(tiny: Tiny, spelling: str) -> None:
    encode, tokenizer = encoder(tiny)
    names = {"user": "human", "assistant": "gpt"}
    there = MORE if spelling == "messages" else [{"from": names[m["role"]], "value": m["content"]} for m in MORE]
    (example,) = encode.example(Row("", {spelling: there}))
    assert learnt(tokenizer, example) == "In the east. <|im_end|><|im_end|>It sets.<|im_end|>"
    ends = np.flatnonzero(example.ids == 2)
    assert example.mask[ends].tolist() == [False, False, True, False, True]  # system, user, answer, user, answer
    text = tokenizer.decode(example.ids.tolist())
    assert text.startswith("<|im_start|>system\n") and text.endswith("It sets.<|im_end|>\n")


def test_prompt_and_completion(tiny: Tiny) -> None:
    row = Row("", {"prompt": "Q: <|im_end|>\nA: ", "completion": "SELECT 1"})
    encode, tokenizer = encoder(tiny, chat=False)
    (plain,) = encode.example(row)
    prompt = tokenizer.encode("Q: <|im_end|>\nA: ")
    assert plain.ids.tolist() == [*prompt, *tokenizer.encode("SELECT 1"), 2]
    assert plain.mask.tolist() == [False] * len(prompt) + [True] * (len(plain.ids) - len(prompt))
    (chat,) = encoder(tiny)[0].example(row)
    assert learnt(tokenizer, chat) == "SELECT 1<|im_end|>" and len(chat.ids) > len(plain.ids) + 10
    (after,) = encoder(tiny, after="\nA: ")[0].example(Row("", {"text": "Q: <|im_end|>\nA: SELECT 1"}))
    assert after.ids.tolist() == plain.ids.tolist() and after.mask.tolist() == plain.mask.tolist()
    inner = Row("", {"ask": "Q: <|im_end|>\nA: ", "answers": [{"text": "SELECT 1"}]})
    (named,) = encoder(tiny, chat=False, prompt="ask", completion="answers.0.text")[0].example(inner)
    assert named.ids.tolist() == plain.ids.tolist()
    (all_,) = encoder(tiny)[0].example(Row("", {"text": "The sea"}))
    assert learnt(tokenizer, all_) == "The sea<|im_end|>"


def test_of_a_pair_the_last_answer_is_learnt(tiny: Tiny) -> None:
    encode, tokenizer = encoder(tiny)
    wrong = {"role": "assistant", "content": "No."}
    spellings = [
        {"prompt": MORE[:-1], "chosen": MORE[-1], "rejected": wrong},
        {"messages": MORE[:-1], "chosen": "It sets.", "rejected": "No."},
        {"conversations": MORE[:-1], "chosen": {"from": "gpt", "value": "It sets."}, "rejected": [wrong]},
        {"chosen": MORE, "rejected": [*MORE[:-1], wrong]},
        {"prompt": MORE[:-1], "chosen": MORE, "rejected": [*MORE[:-1], wrong]},
    ]
    first = encode.pair(Row("", spellings[0]))
    assert [learnt(tokenizer, example) for example in first] == ["It sets.<|im_end|>", "No.<|im_end|>"]
    for spelling in spellings[1:]:
        for one, other in zip(first, encode.pair(Row("", spelling)), strict=True):
            assert np.array_equal(one.ids, other.ids) and np.array_equal(one.mask, other.mask)
    plain = encoder(tiny, chat=False)[0].pair(Row("", {"prompt": "Q: ", "chosen": "a", "rejected": "b"}))
    assert [learnt(tokenizer, example) for example in plain] == ["a<|im_end|>", "b<|im_end|>"]


def test_long_examples_are_cut_and_told(tiny: Tiny) -> None:
    row = Row("", {"prompt": "x" * 40, "completion": "y" * 40})
    (cut,) = encoder(tiny, 60, chat=False)[0].example(row)
    assert cut.cut and len(cut.ids) == 61
    (short,) = encoder(tiny, 60, chat=False, prompt_length=10)[0].example(row)
    assert not short.cut and int(short.mask.sum()) == 41 and len(short.ids) == 51
    with pytest.raises(OptionError, match="nothing to learn in its first 30 tokens"):
        encoder(tiny, 30, chat=False)[0].example(row)


BAD = [
    ({"messages": MORE[:-1]}, "the last message is the user's"),
    ({"messages": []}, "list of messages"),
    ({"messages": [{"role": "user"}]}, "role and content"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "role and content"),
    ({"prompt": "a"}, "no field 'text'"),
    ({"prompt": 3, "completion": "b"}, "text expected"),
]


@pytest.mark.parametrize(("value", "problem"), BAD)
def test_bad_rows(tiny: Tiny, value: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        encoder(tiny)[0].example(Row("", value))


def test_bad_pairs(tiny: Tiny) -> None:
    for value, problem in (
        ({"prompt": "a", "chosen": "b"}, "chosen and rejected expected"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same: nothing to prefer"),
        ({"messages": MORE[:-1], "chosen": "b", "rejected": "b"}, "the same: nothing to prefer"),
        ({"prompt": "a", "chosen": "z" * 600 + "b", "rejected": "z" * 600}, "the same in their first 500 tokens"),
    ):
        with pytest.raises(OptionError, match=problem):
            encoder(tiny)[0].pair(Row("", value))


def test_bad_rows_are_counted_and_named(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)) + "{\n")
    data = {"path": str(file), "held_out": 0.3}
    with pytest.raises(OptionError, match=r"1 of 10 rows cannot be used \(.*rows\.jsonl:10: not JSON"):
        examine(Examples(**data), encoder(tiny)[0], False)
    found = examine(Examples(**data, bad_rows=0.2), encoder(tiny)[0], False)
    assert len(found.bad) == 1 and len(found.learnt) + len(found.held) == 9 and 0 < len(found.held) < 9


@pytest.mark.parametrize("pairs", [False, True])
def test_examples_are_encoded_once(tiny: Tiny, tmp_path: Path, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows(tmp_path, pairs)
    data, encode = Examples(path=str(file), held_out=0.3), encoder(tiny, 92)[0]
    groups = [(encode.pair if pairs else encode.example)(row) for row in read_rows(file)]

    def content(example: Any) -> tuple[bytes, bytes, bool]:
        return example.ids.tobytes(), example.mask.tobytes(), example.cut

    found = examine(data, encode, pairs)
    assert 0 < len(found.held) < 20 and found.cut == sum(e.cut for group in groups for e in group) > 0
    whole = [group for part in (found.learnt, found.held) for group in part]
    assert sorted(map(content, chain(*whole))) == sorted(map(content, chain(*groups)))
    assert sorted(e.number for group in whole for e in group) == list(range(len(groups) * (1 + pairs)))
    assert found.learnt.sizes.tolist() == [sum(len(e.ids) - 1 for e in group) for group in found.learnt]
    other = tmp_path / "valid.jsonl"
    other.write_text(file.read_text().replace("Say", "Tell"))
    told = [(encode.pair if pairs else encode.example)(row) for row in read_rows(other)]
    valid = examine(Examples(path=str(file), valid=str(other)), encode, pairs)
    for part, expected in ((valid.learnt, groups), (valid.held, told)):
        assert [[content(e) for e in group] for group in part] == [[content(e) for e in group] for group in expected]

    def fails(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Tokenizer, "encode", fails)
    file = file.rename(tmp_path / "moved.jsonl")
    data = replace(data, path=str(file))
    again = examine(data, encode, pairs)
    assert again.digest == found.digest and [e.number for (e, *_) in again.held] == [e.number for (e, *_) in found.held]
    for other in (encoder(tiny, 93)[0], encoder(tiny, 92, chat=False)[0], encoder(tiny, 92, prompt_length=9)[0]):
        with pytest.raises(AssertionError, match="encoded again"):
            examine(data, other, pairs)


def test_what_is_held_out_is_not_learnt_though_it_lies_in_both(tiny: Tiny, tmp_path: Path) -> None:
    """A folder with its own validation file in it."""
    for name, numbers in (("train", range(12)), ("valid", range(8, 16))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in numbers))
    found = examine(Examples(path=str(tmp_path), valid=str(tmp_path / "valid.jsonl")), encoder(tiny)[0], False)
    assert (len(found.learnt), len(found.held), found.again) == (8, 8, 12)
    kept = {part[0].ids.tobytes() for part in found.learnt}
    assert not kept & {part[0].ids.tobytes() for part in found.held}


def test_packing_keeps_order_and_groups(tiny: Tiny) -> None:
    encode, _ = encoder(tiny, chat=False)
    groups = [encode.example(Row("", {"prompt": "x" * n, "completion": "y"})) for n in (10, 20, 5, 30, 1)]
    sizes = [[len(e.ids) - 1 for (e,) in part] for part in packed(groups, 36)]
    assert [n for part in sizes for n in part] == [len(e.ids) - 1 for (e,) in groups]
    assert all(sum(part) <= 36 for part in sizes)
    assert len(sizes) == 3
    with pytest.raises(OptionError, match="belong together"):
        list(packed(groups, 20))


# ---- runs ------------------------------------------------------------------------------------------------------------

COMMON = """
task = "{task}"
epochs = {epochs}
rows = 4
[run]
out = "{out}"
threads = 1
save_every = 5
[model]
base = "{base}"
[data]
path = "{data}"
held_out = 0.2
[batch]
tokens = 256
length = 100
[schedule]
peak = {peak}
kind = "constant"
warmup = 0
"""
LORA = """
[lora]
rank = 4
alpha = 8
targets = ["q", "v", "down"]
"""


def rows(path: Path, pairs: bool) -> Path:
    """A small thing to learn: the answer says the question's letter, or not."""
    file = path / "rows.jsonl"
    with open(file, "w") as out:
        for i in range(40):
            letter = "abcdefgh"[i % 8]
            prompt, answer, wrong = f"Say {letter}, number {i}", letter * 6, "abcdefgh"[(i + 3) % 8] * 6
            row = {"chosen": answer, "rejected": wrong} if pairs else {"completion": answer}
            out.write(json.dumps({"prompt": prompt, **row}) + "\n")
    return file


def recipe(tiny: Tiny, folder: Path, task: str, extra: str = "", **values: Any) -> Path:
    given = {"base": tiny.folder, "epochs": 3, "peak": 1e-2} | values
    text = COMMON.format(task=task, out=folder / "out", data=rows(folder, task == "dpo"), **given)
    path = folder / "recipe.toml"
    path.write_text(text + extra)
    return path


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run(path: Path, *changes: str, stop_after: int = 0) -> Plan:
    steps = []
    with prepare(path, changes) as plan:
        plan.run(listen=steps.append, stop=lambda: bool(stop_after) and len(steps) >= stop_after)
    return plan


@pytest.mark.parametrize("base", ["", 'quantize = "q8_0"\n'], ids=["lora", "qlora"])
def test_sft_with_adapters_writes_a_folder_that_chat_takes(tiny: Tiny, tmp_path: Path, base: str) -> None:
    run(recipe(tiny, tmp_path, "sft", LORA + base))
    held = [line["loss"] for line in logged(tmp_path, "evaluation")]
    assert len(held) == 3 and held[-1] < logged(tmp_path, "step")[0]["loss"] - 0.5
    adapter = read_adapter(tmp_path / "out" / "adapter", tiny.config)
    assert adapter.rank == 4 and adapter.base == str(tiny.folder)
    with smolrun.load(tiny.folder, context=256, threads=1) as llm:
        messages = [{"role": "user", "content": "Say c, number 3"}]
        sampling = Sampling(temperature=0)
        before = llm.chat(messages, max_tokens=8, sampling=sampling).text
        llm.set_adapter(tmp_path / "out" / "adapter")
        assert llm.chat(messages, max_tokens=8, sampling=sampling).text != before


def test_a_stopped_run_goes_on_with_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    path = recipe(tiny, tmp_path / "whole", "sft", LORA, epochs=1)
    run(path)
    path = recipe(tiny, tmp_path / "parts", "sft", LORA, epochs=1)
    run(path, stop_after=3)
    assert not (tmp_path / "parts" / "out" / "adapter").exists()
    run(path)
    curves = [[line["loss"] for line in logged(tmp_path / name, "step")] for name in ("whole", "parts")]
    assert len(curves[0]) >= 6 and curves[0] == curves[1]


def test_sft_of_all_weights_stops_early_at_its_best(tiny: Tiny, tmp_path: Path) -> None:
    path = recipe(tiny, tmp_path, "sft", epochs=30, peak=3e-2)
    text = path.read_text().replace("rows = 4", "rows = 4\npatience = 2\ndtype = 'f32'")
    path.write_text(text.replace("save_every = 5", "save_every = 500\nevaluate_every = 3"))
    plan = run(path)
    losses = [line["loss"] for line in logged(tmp_path, "evaluation")]
    assert "without a lower loss" in logged(tmp_path, "evaluation")[-1]["stop"]
    assert min(losses) == losses[-3] and len(logged(tmp_path, "step")) < plan.feed.steps
    log = (tmp_path / "out" / "log.jsonl").read_bytes()
    run(path)  # what has ended stays ended
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
    with prepare(path, [f'model.base="{tmp_path}/out/model"', f'run.out="{tmp_path}/again"']) as again:
        assert again.feed.evaluate()["loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("lora", [LORA, ""], ids=["lora", "full"])
def test_dpo_prefers_what_was_chosen(tiny: Tiny, tmp_path: Path, lora: str) -> None:
    path = recipe(tiny, tmp_path, "dpo", lora, peak=1e-2 if lora else 1e-3, epochs=4)
    run(path, stop_after=4)
    run(path)  # goes on against the same reference
    steps, held = logged(tmp_path, "step"), logged(tmp_path, "evaluation")[-1]
    assert steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    last = steps[-8:]
    assert np.mean([s["margin"] for s in last]) > 0.1 and np.mean([s["accuracy"] for s in last]) > 0.7
    assert held["margin_low"] < held["margin"] < held["margin_high"]
    assert 0 <= held["accuracy_low"] <= held["accuracy"] <= held["accuracy_high"] <= 1


def test_dpo_after_sft_is_measured_against_the_tuned_model(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
    run(recipe(tiny, tmp_path / "sft", "sft", LORA, epochs=1))
    start = LORA + f'start = "{tmp_path}/sft/out/adapter"\n'
    run(recipe(tiny, tmp_path / "dpo", "dpo", start, epochs=1))
    assert logged(tmp_path / "dpo", "step")[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)


def test_an_adapter_of_some_layers_is_not_gone_on_with(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base", n_layers=2, dim=64, hidden_dim=96)
    factors = {"blk.0.attn_q": Factors(np.ones((4, 64), np.float32), np.ones((64, 4), np.float32), 2.0)}
    write_adapter(tmp_path / "start", LowRank(factors, 4, 8.0))
    path = recipe(tiny, tmp_path, "sft", LORA + f'start = "{tmp_path}/start"\n')
    with pytest.raises(OptionError, match="for some of the layers only"), prepare(path):
        pass
    write_adapter(tmp_path / "out" / "adapter", LowRank(factors, 4, 8.0))
    there = pytest.raises(OptionError, match="the result would be written there")
    with there, prepare(path, [f"lora.start={tmp_path}/out/adapter"]):
        pass


def test_what_a_recipe_may_not_say(tiny: Tiny, tmp_path: Path) -> None:
    for change, problem in (
        ("batch.length=300", "does not fit a pass"),
        ("rows=0", "rows = 0"),
        ('lora.targets=["w"]', "targets"),
        ('data.path="nowhere.jsonl"', "no data files"),
        ("beta=0.1", "unknown key 'beta'"),
    ):
        path = recipe(tiny, tmp_path, "sft", LORA)
        with pytest.raises(OptionError, match=problem), prepare(path, [change]):
            pass


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_the_merged_model_says_what_the_adapter_says(tiny: Tiny, tmp_path: Path) -> None:
    run(recipe(tiny, tmp_path, "sft", LORA))
    adapter, sampling = tmp_path / "out" / "adapter", Sampling(temperature=0)
    quantize_file(tiny.folder, tmp_path / "merged.gguf", "f32", adapter=adapter)
    with open_checkpoint(tiny.folder) as checkpoint:
        write_folder(merge(checkpoint, read_adapter(adapter, tiny.config)), tmp_path / "merged", "f32")
    prompts = ["Say a", "Say b", "The sea is"]
    said = []
    for path, how in ((tiny.folder, {"adapter": adapter}), (tmp_path / "merged.gguf", {}), (tmp_path / "merged", {})):
        with smolrun.load(path, context=256, threads=1, **how) as llm:  # type: ignore[arg-type]
            said.append([llm.generate(p, max_tokens=20, sampling=sampling).ids for p in prompts])
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_a_folder_has_all_of_a_gguf_file(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    """From the GGUF, whose vocabulary is lists, to a folder, whose tokenizer is a JSON: the same model."""
    with open_checkpoint(tiny.gguf) as checkpoint:
        write_folder(checkpoint, tmp_path / "folder", dtype)
        config = checkpoint.config
    with open_checkpoint(tmp_path / "folder") as found:
        assert replace(found.config, name="", licence="") == replace(config, name="", licence="")
        assert {t.format for t in found.tensors.values()} == {dtype.upper()}
    texts = ["Hello <|im_end|> 123  ü\n", " the there"]
    with smolrun.load(tiny.gguf, context=256) as a, smolrun.load(tmp_path / "folder", context=256) as b:
        assert [a.tokenize(t) for t in texts] == [b.tokenize(t) for t in texts]
        assert a.template.render(MORE) == b.template.render(MORE)
        assert a.tokenizer.eos_ids == b.tokenizer.eos_ids and a.tokenizer.specials == b.tokenizer.specials
        tolerance = {"f32": 0, "bf16": 0.2, "f16": 0.02}[dtype]
        np.testing.assert_allclose(a.logits([20, 30, 40]), b.logits([20, 30, 40]), atol=tolerance)
    with pytest.raises(OptionError, match="source itself"), open_checkpoint(tmp_path / "folder") as checkpoint:
        write_folder(checkpoint, tmp_path / "folder", dtype)
