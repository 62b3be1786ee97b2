"""Sessions: what is read back has the bits of what was computed; a file that lies changes nothing."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest

import smolrun
from smolrun.errors import ContextOverflow, OptionError, SessionError
from smolrun.generate.sampler import Sampling
from smolrun.session import HEAD, MAGIC, VERSION
from tiny import make_tiny

GREEDY = Sampling(temperature=0)
LONG = "Once upon a time there was a river. " * 5  # several pages, the last one not full
HI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("session"), fmt="Q8_0")


@pytest.fixture
def load(tiny):
    """Loads the model; closes it after the test."""
    opened = []

    def load(source=None, **options):
        opened.append(smolrun.load(source or tiny.gguf, **{"context": 512, "threads": 1} | options))
        return opened[-1]

    yield load
    for llm in opened:
        llm.close()


def saved(load, path, prompt=LONG, **options):
    llm = load(**options)
    llm.save_session(path, prompt)
    return llm


@pytest.mark.parametrize("kv", ["f16", "f32"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 180])
def test_logits_are_those_of_computing(load, tmp_path, kv, length):
    file = tmp_path / "s"
    ids = [*range(20, 20 + length)]
    first = saved(load, file, ids, kv=kv)
    more = [*ids, 7, 30, 31]
    second = load(kv=kv)
    assert second.load_session(file).ids == ids
    assert second.load_session(file).messages is None
    answer = second.generate(more, max_tokens=20, sampling=GREEDY, ignore_eos=True)
    assert answer.timings.cached_tokens == length
    assert answer.ids == first.generate(more, max_tokens=20, sampling=GREEDY, ignore_eos=True).ids
    fresh = load(kv=kv)
    assert np.array_equal(second.logits([*more, *answer.ids]), fresh.logits([*more, *answer.ids]))


def test_the_file_is_the_same_whatever_the_cache_held(load, tmp_path):
    """No byte of another dialogue is in it; nor does the number of threads show."""
    a, b = tmp_path / "a", tmp_path / "b"
    saved(load, a)
    llm = load(threads=2)
    llm.generate("something else " * 30, max_tokens=9, ignore_eos=True)
    llm.generate(LONG + "and more", max_tokens=9, ignore_eos=True)
    llm.save_session(b, LONG)
    assert a.read_bytes() == b.read_bytes()
    assert os.stat(b).st_mode & 0o077 == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # nothing beside


def test_a_dialogue_goes_on(load, tmp_path):
    file = tmp_path / "s"
    first = load()
    answer = first.chat(HI, max_tokens=20, sampling=Sampling(temperature=2.0, seed=1), ignore_eos=True)
    messages = [*HI, {"role": "assistant", "content": answer.text}]
    first.save_session(file, messages)
    second = load()
    session = second.load_session(file)
    assert session.messages == messages
    asked = [*session.messages, {"role": "user", "content": "And?"}]
    again = second.chat(asked, max_tokens=5, sampling=GREEDY, ignore_eos=True)
    assert again.timings.cached_tokens == len(session.ids)  # the sampled ids, not those of the answer's text
    assert again.ids == first.chat(asked, max_tokens=5, sampling=GREEDY, ignore_eos=True).ids


def test_other_prefixes_stay(load, tmp_path):
    llm = saved(load, tmp_path / "s")
    other = llm.tokenize("Another prompt of the same model")
    llm.generate(other, max_tokens=1)
    llm.load_session(tmp_path / "s")
    assert llm.generate([*other, 5], max_tokens=1).timings.cached_tokens == len(other)


# files that lie


def bend(data, at, value):
    """Bytes put in, and a right checksum."""
    body = data[:at] + value + data[at + len(value) : -32]
    return body + hashlib.sha256(body).digest()


def with_dialogue(data, text):
    magic, version, digest, page, n, m = HEAD.unpack(data[: HEAD.size])
    start = HEAD.size + 4 * n
    body = (
        HEAD.pack(magic, version, digest, page, n, len(text)) + data[HEAD.size : start] + text + data[start + m : -32]
    )
    return body + hashlib.sha256(body).digest()


BENT = {
    "empty": (lambda d: b"", "ends inside the header"),
    "text": (lambda d: b"hello " * 100, "not a session"),
    "version": (
        lambda d: bend(d, 6, struct.pack("<H", VERSION + 1)),
        f"version {VERSION + 1}, this smolrun reads {VERSION}",
    ),
    "model": (lambda d: bend(d, 8, b"\1" * 32), "of another model"),
    "page size": (lambda d: bend(d, 40, struct.pack("<Q", 64)), "of another model"),
    "no ids": (lambda d: bend(d, 48, struct.pack("<Q", 0)), "bytes expected for 0 ids"),
    "too many ids": (lambda d: bend(d, 48, struct.pack("<Q", 1 << 60)), "bytes expected for 1,152"),
    "most ids": (lambda d: bend(d, 48, b"\xff" * 8), "bytes expected for 18,446"),
    "long dialogue": (lambda d: bend(d, 56, b"\xff" * 8), "bytes of dialogue"),
    "cut": (lambda d: d[:-1], "damaged or cut short"),
    "half": (lambda d: d[: len(d) // 2], "damaged or cut short"),
    "longer": (lambda d: d + b"x", "damaged or cut short"),
    "bit in ids": (lambda d: d[:70] + bytes([d[70] ^ 1]) + d[71:], "wrong checksum"),
    "bit in pages": (lambda d: d[:-1000] + bytes([d[-1000] ^ 1]) + d[-999:], "wrong checksum"),
    "bit in checksum": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "wrong checksum"),
    "id": (lambda d: bend(d, 64, struct.pack("<I", 333)), "id 333, the vocabulary has ids 0 to 332"),
    "great id": (lambda d: bend(d, 64, b"\xff" * 4), "id 4294967295"),
    "other last id": (lambda d: bend(d, 64 + 4 * (HEAD.unpack(d[:64])[4] - 1), struct.pack("<I", 3)), "other bits"),
    "not a number": (lambda d: bend(d, 64 + 4 * HEAD.unpack(d[:64])[4] + 4, b"\xff" * 512), "other bits"),
    "no JSON": (lambda d: with_dialogue(d, b"nul"), "list of messages"),
    "no UTF-8": (lambda d: with_dialogue(d, b'"\xff"'), "list of messages"),
    "deep": (lambda d: with_dialogue(d, b"[" * 100_000), "list of messages"),
    "no list": (lambda d: with_dialogue(d, b"{}"), "dict found"),
    "no message": (lambda d: with_dialogue(d, b"[7]"), "7 found"),
    "no content": (lambda d: with_dialogue(d, b'[{"role": "user"}]'), "found"),
    "more": (lambda d: with_dialogue(d, b'[{"role": "user", "content": "", "x": 1}]'), "found"),
    "no text": (lambda d: with_dialogue(d, b'[{"role": "user", "content": 1}]'), "found"),
    "wrong ids": (lambda d: with_dialogue(d, b'[{"role": "assistant", "content": "", "ids": [333]}]'), "ids"),
}


def test_hostile_files(load, tmp_path):
    """Each is refused by name, and the cache stays what it was."""
    llm = saved(load, tmp_path / "sound")
    data = (tmp_path / "sound").read_bytes()
    assert HEAD.size == 64 and data[:6] == MAGIC
    assert with_dialogue(data, b"null") == data == bend(data, 8, data[8:40])
    victim = load()
    prompt = "A prompt of its own"
    expected = victim.generate(prompt, max_tokens=3, sampling=GREEDY, ignore_eos=True).ids
    for name, (change, message) in BENT.items():
        file = tmp_path / "bent"
        file.write_bytes(change(data))
        with pytest.raises(SessionError, match=message) as caught:
            victim.load_session(file)
        assert str(file) in str(caught.value), name
        again = victim.generate(prompt, max_tokens=3, sampling=GREEDY, ignore_eos=True)
        assert again.ids == expected, name
        assert again.timings.prefill_tokens == 1, name
    assert victim.generate(LONG, max_tokens=1).timings.cached_tokens <= 1  # nothing of the files was kept
    victim.load_session(tmp_path / "sound")
    assert victim.generate(LONG, max_tokens=1).timings.cached_tokens == len(llm.tokenize(LONG)) - 1


def test_another_model(load, tiny, tmp_path):
    file = tmp_path / "s"
    saved(load, file)
    same = make_tiny(tmp_path / "same", fmt="Q8_0")
    assert load(same.gguf).load_session(file).ids  # its name and place do not count
    for other, options in (
        (make_tiny(tmp_path / "a", fmt="Q8_0", seed=1), {}),
        (make_tiny(tmp_path / "b", fmt="Q8_0", rope_theta=5e4), {}),
        (tiny, {"kv": "f32"}),
        (tiny, {"precision": "exact"}),
    ):
        with pytest.raises(SessionError, match="of another model, or of one loaded with another"):
            load(other.gguf, **options).load_session(file)


def test_files_that_cannot_be(load, tmp_path):
    llm = load()
    with pytest.raises(SessionError, match="cannot be read: No such file"):
        llm.load_session(tmp_path / "none")
    with pytest.raises(SessionError, match="cannot be read: Is a directory"):
        llm.load_session(tmp_path)
    with pytest.raises(SessionError, match="cannot be written: No such file"):
        llm.save_session(tmp_path / "none" / "s", LONG)
    with pytest.raises(OptionError, match="no ids"):
        llm.save_session(tmp_path / "s", "")
    with pytest.raises(ContextOverflow):
        llm.save_session(tmp_path / "s", [20] * 513)
    assert not os.listdir(tmp_path)
    llm.save_session(tmp_path / "s", LONG)
    with pytest.raises(ContextOverflow):
        load(context=64).load_session(tmp_path / "s")


def test_a_disk_that_is_full(load, tmp_path, monkeypatch):
    file = tmp_path / "s"
    llm = saved(load, file)
    before = file.read_bytes()

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SessionError, match="cannot be written: No space left"):
        llm.save_session(file, "Another")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["s"]


def test_the_dialogue_is_json(load, tmp_path):
    saved(load, tmp_path / "s", HI)
    data = (tmp_path / "s").read_bytes()
    n, m = HEAD.unpack(data[:64])[4:]
    assert json.loads(data[64 + 4 * n :][:m]) == HI


def test_a_dialogue_that_fills_the_context_is_kept(load, tmp_path):
    llm = load(context=96)
    answer = llm.chat(HI, max_tokens=None, sampling=GREEDY, ignore_eos=True)
    assert answer.finish_reason == "context"
    said = [*HI, {"role": "assistant", "content": answer.text}]
    llm.save_session(tmp_path / "s", said)
    again = load(context=96)
    session = again.load_session(tmp_path / "s")
    assert session.messages == said and len(session.ids) == 96
    short = again.chat(HI, max_tokens=9, sampling=GREEDY, ignore_eos=True)
    assert short.ids == answer.ids[:9] and short.timings.cached_tokens > short.timings.prompt_tokens - 2
