"""Text <-> ids: byte-level BPE on the `tokenizers` library, or (a bundle's model) on tables without it (bpe.py).

One way in for both kinds of checkpoint: tokenizer.json and the GGUF lists are brought to the same vocabulary, merges
and pre-tokenizer name, so that the same model gives the same ids by either road. Which checkpoint it is decides how it
is encoded, never what happens to be installed. What `encode` reads is always plain
text: no text can become a special token; only chat templates write those (see template.py).

    text --UTF-8--> bytes --split by the pre-tokenizer--> words --merges--> ids
    b"\\x00 a"  is spelled  "ĀĠa"  in the vocabulary: GPT-2 gives every byte a printable letter
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import ModelFileError, TokenizerError, UnsupportedModel
from smolrun.text.bpe import TABLES, TableBpe

if TYPE_CHECKING:
    from smolrun.files.checkpoint import TokenizerSource

MAX_ID = 1 << 20
"""Ids at or beyond this are refused: 20 times SmolLM2's vocabulary, so no hostile id asks for gigabytes."""

# llama.cpp's token types; user-defined: an added token that is found in plain text too
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


_PRE_TOKENIZERS = ("smollm", "gpt-2")
"""`tokenizer.ggml.pre`: what splits text into words; SmolLM2 sets every digit apart, then follows GPT-2's regex."""


def _byte_letters() -> dict[int, int]:
    """Code point of a letter -> byte, GPT-2's spelling: printable Latin-1 stands for itself, the rest follow 0xFF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: byte for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {0x100 + n: byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()

_POINTS = 0x40000  # code points of planes 0 to 3
_PART = 2048  # that the library is asked about at a time: of longer texts each takes more


class Bpe(Protocol):
    """Encodes plain text: ids are 0 <= id < size, and `unknown` stands for a byte without a token."""

    size: int
    unknown: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, i: int) -> bytes: ...


class LibraryBpe:
    """Byte-level BPE by the `tokenizers` library.

    Attributes: as `Bpe`.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        specials: Mapping[str, int],
        user_defined: Iterable[str] = (),
        pre: str = "smollm",
        ignore_merges: bool = False,
    ) -> None:
        """Builds it; 0.06 s for SmolLM2's 49,152 tokens and 48,900 merges.

        Args:
            vocab: token -> id, spelled in byte letters; specials and user-defined tokens as plain text.
            merges: pairs of tokens, best first; both and their join are in the vocabulary.
            specials: text -> id of tokens that plain text never becomes.
            user_defined: added tokens that plain text does become, before any splitting (as in llama.cpp).
            pre: name of the pre-tokenizer, as `tokenizer.ggml.pre`.
            ignore_merges: a word that is itself a token is taken whole.

        Raises:
            UnsupportedModel: unknown `pre`.
            ModelFileError: vocabulary and merges contradict each other.
        """
        if pre not in _PRE_TOKENIZERS:
            raise UnsupportedModel(
                f"tokenizer: pre-tokenizer {pre!r} is not supported (supported: {', '.join(_PRE_TOKENIZERS)}); "
                "SmolLM2 files carry 'smollm'"
            )
        from tokenizers import AddedToken, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        user_defined = tuple(user_defined)
        vocab = {**vocab, **specials}
        if not vocab:
            raise ModelFileError("tokenizer: the vocabulary is empty: download the model again")
        low, high = min(vocab.values()), max(vocab.values())
        if low < 0 or high >= MAX_ID:
            raise ModelFileError(f"tokenizer: ids from {low:,} to {high:,} found, 0 to {MAX_ID - 1:,} expected")
        self.size = high + 1
        self._plain = frozenset(specials) | frozenset(user_defined)  # spelled as text, not in byte letters
        self._token: list[str | None] = [None] * self.size
        for token, i in vocab.items():
            self._token[i] = token

        # SmolLM2 has no token for 21 bytes (13 of them never occur in UTF-8). Without an unknown token the library
        # forgets such a byte and merges its neighbours across the gap; llama.cpp does not. Hence an id, dropped later.
        self.unknown = high + 1
        unknown = "\0"
        while unknown in vocab:
            unknown += "\0"
        try:
            model = models.BPE(
                {**vocab, unknown: self.unknown}, list(merges), unk_token=unknown, ignore_merges=ignore_merges
            )
        except Exception as error:  # the library raises a bare Exception
            raise ModelFileError(
                f"tokenizer: merges do not fit the vocabulary ({error}): download the model again"
            ) from error
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        self._library = Library(model)
        self._library.pre_tokenizer = words if pre == "gpt-2" else pre_tokenizers.Sequence([digits, words])
        self._library.add_tokens([AddedToken(token, normalized=False) for token in user_defined])

    def encode(self, text: str) -> list[int]:
        """Ids; `unknown` for a byte without a token."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, i: int) -> bytes:
        """The bytes of an id in range."""
        token = self._token[i] or ""
        if token not in self._plain:
            with contextlib.suppress(UnicodeEncodeError):  # a character that is no letter of a byte
                return codecs.charmap_encode(token, "strict", _BYTE_OF_LETTER)[0]
        return token.encode()


class Tokenizer:
    """The vocabulary of one checkpoint.

    Attributes:
        vocab_size: ids are 0 <= id < vocab_size; an id no token has (a hole, padding of the model) is empty text.
        specials: text -> id of the special tokens (`<|im_end|>` ...); `encode` never returns one of these ids.
        bos_id: id of the begin-of-sequence token, if the checkpoint names one. It is not prepended to anything.
        eos_ids: ids that end an answer.
    """

    def __init__(self, bpe: Bpe, source: TokenizerSource, vocab_size: int = 0) -> None:
        """vocab_size: at least this many ids (models may be padded beyond their vocabulary)."""
        self._bpe = bpe
        self.specials = dict(source.specials)
        self.special_ids = frozenset(self.specials.values())
        self.bos_id, self.eos_ids = source.bos_id, source.eos_ids
        self.vocab_size = max(bpe.size, vocab_size)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_source(cls, source: TokenizerSource, *, vocab_size: int = 0) -> Tokenizer:
        """The tokenizer of a checkpoint; `vocab_size` is the model's, where it is padded beyond the tokenizer's.

        Raises:
            ModelFileError: a damaged vocabulary.
            UnsupportedModel: a sound tokenizer of another kind than byte-level BPE.
        """
        bpe = LibraryBpe(**_arguments(source)) if source.tables is None else TableBpe(source.tables)
        return cls(bpe, source, vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing is added, and a special token's text stays text.

        Equal to llama.cpp's ids (parse_special=False). Time is linear: 1 MB takes about 1 s, whatever it repeats.

        Raises:
            TokenizerError: the text holds a lone surrogate, which no UTF-8 can carry; names its position.
        """
        return [i for i in self._encode(text) if i != self._bpe.unknown]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`, and for each id where its token ends, in UTF-8 bytes of the text."""
        ids, ends, end = [], [], 0
        for i in self._encode(text):
            end += 1 if i == self._bpe.unknown else len(self.token_bytes(i))
            if i != self._bpe.unknown:
                ids.append(i)
                ends.append(end)
        return ids, ends

    def _encode(self, text: str) -> list[int]:
        require_unicode(text, "text")
        return self._bpe.encode(text)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id; not always whole UTF-8. A special token gives its text.

        Raises:
            TokenizerError: no such id.
        """
        if (known := self._bytes.get(i)) is not None:
            return known
        if not 0 <= i < self.vocab_size:
            raise TokenizerError(f"id {i:,} found, 0 to {self.vocab_size - 1:,} expected: is it from another model?")
        self._bytes[i] = self._bpe.token_bytes(i) if i < self._bpe.size else b""
        return self._bytes[i]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids; special tokens as their text unless skipped, broken UTF-8 as U+FFFD.

        Raises:
            TokenizerError: no such id.
        """
        return b"".join(self._visible(ids, skip_special)).decode("utf-8", "replace")

    def _visible(self, ids: Iterable[int], skip_special: bool) -> Iterable[bytes]:
        return (self.token_bytes(i) for i in ids if not (skip_special and i in self.special_ids))

    def stream_decoder(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Ids in, whole characters out: all pushes and the flush joined are `Tokenizer.decode` of the same ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that this id made certain: "" inside a character, U+FFFD for bytes that are none."""
        return self._utf8.decode(b"" if i in self._hidden else self._tokenizer.token_bytes(i))

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, else "". The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def require_unicode(text: str, name: str) -> None:
    """Raises TokenizerError if the text holds a lone surrogate, which no UTF-8 can carry; names text and position."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start:,}, Unicode expected: "
            "decode the input as UTF-8 with errors='replace'"
        ) from None


def tables(source: TokenizerSource) -> dict[str, NDArray[np.uint8]]:
    """The tables of bpe.py: a checkpoint's tokenizer for devices that have no library, and for quick starts.

    Raises:
        ModelFileError: a damaged vocabulary.
        UnsupportedModel: a sound tokenizer of another kind, or one that takes whole words (model.ignore_merges).
    """
    facts = _arguments(source)
    _expect("model.ignore_merges", facts.get("ignore_merges", False), False)
    library = LibraryBpe(**facts)
    vocab: dict[str, int] = facts["vocab"] | facts["specials"]
    spelled = [library.token_bytes(i) for i in range(library.size)]
    joins = {vocab[a] << 32 | vocab[b]: rank << 32 | vocab[a + b] for rank, (a, b) in enumerate(facts["merges"])}
    pairs = np.array([*joins], np.int64)
    order = np.argsort(pairs)
    numbers, letters, spaces, digits = _code_points()
    digits = digits & (facts.get("pre", "smollm") == "smollm")
    values: dict[str, Any] = {
        "tokens": np.frombuffer(b"".join(spelled), np.uint8),
        "ends": [0, *accumulate(map(len, spelled))],
        "bytes": [vocab.get(chr(letter), -1) for letter in sorted(_BYTE_OF_LETTER, key=_BYTE_OF_LETTER.__getitem__)],
        "pairs": pairs[order],
        "joins": np.array([*joins.values()], np.int64)[order],
        "added": [vocab[token] for token in facts["user_defined"]],
        "digits": _ranges(digits),
        "numbers": _ranges(numbers & ~digits),
        "letters": _ranges(letters & ~digits),
        "spaces": _ranges(spaces & ~digits),
    }
    return {name: np.array(values[name], kind).reshape(-1).view(np.uint8) for name, kind in TABLES.items()}


@cache
def _code_points() -> tuple[NDArray[np.bool_], ...]:
    """Which code points are numbers, letters and spaces of the library's regex, and which are its own digits: they are
    of two versions of Unicode. Planes 0 to 3, which the library is asked about in 0.1 s; the others have none.
    """
    from tokenizers import Regex, pre_tokenizers

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "removed", invert=True)

    def pieces(splitter: Any) -> list[range]:
        parts = [range(c, c + _PART) for c in range(0, _POINTS, _PART) if not 0xD800 <= c < 0xE000]
        texts = ("".join(map(chr, part)) for part in parts)
        return [
            part[a:b] for part, text in zip(parts, texts, strict=True) for _, (a, b) in splitter.pre_tokenize_str(text)
        ]

    classes = (r"\p{N}", r"\p{L}", r"\s")
    runs = pieces(split("|".join(f"{one}+" for one in classes)))
    heads = "".join(chr(run[0]) for run in runs)
    found = [[runs[k] for _, (k, _) in split(one).pre_tokenize_str(heads)] for one in classes]
    digits = pre_tokenizers.Digits(individual_digits=True)
    alone = [run for run in pieces(digits) if len(run) == 1]  # a digit, or what is between two of them
    apart = "a".join(["", *(chr(run[0]) for run in alone), ""])
    found.append([alone[k // 2] for _, (k, end) in digits.pre_tokenize_str(apart) if k % 2 and end == k + 1])
    masks = tuple(np.zeros(_POINTS, bool) for _ in found)
    for mask, its in zip(masks, found, strict=True):
        for run in its:
            mask[run.start : run.stop] = True
    return masks


def _ranges(points: NDArray[np.bool_]) -> NDArray[np.intp]:
    """First, last, first, last ... of the runs of neighbours."""
    borders = np.flatnonzero(np.diff(points, prepend=False, append=False))
    return borders - np.arange(len(borders)) % 2


def gguf_vocabulary(source: TokenizerSource, vocab_size: int) -> dict[str, Any]:
    """The lists of a GGUF file that hold this tokenizer; ids without a token up to vocab_size become unused ones.

    Raises:
        ModelFileError: a damaged vocabulary.
        UnsupportedModel: a sound tokenizer of another kind, or one that GGUF has no words for.
    """
    _refuse_tables(source)
    if source.json is None:
        tokens, kinds, merges = list(source.vocab), list(source.token_types), list(source.merges)
    else:
        facts = _read_json(source.json)
        _expect("pre_tokenizer", facts["pre"], "smollm")
        _expect("model.ignore_merges", facts["ignore_merges"], False)
        tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
        known = dict.fromkeys(facts["user_defined"], _USER_DEFINED) | dict.fromkeys(facts["specials"], _CONTROL)
        for token, i in facts["vocab"].items():
            if not 0 <= i < vocab_size:
                raise ModelFileError(f"tokenizer.json: token {token!r} has id {i:,}, the model {vocab_size:,} ids")
            tokens[i], kinds[i] = token, known.get(token, _NORMAL)
        merges = [" ".join(pair) for pair in facts["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def _refuse_tables(source: TokenizerSource) -> None:
    if source.tables is not None:
        raise UnsupportedModel("a packed model holds tables and panels alone: use the checkpoint it was made from")


def tokenizer_json(source: TokenizerSource) -> str:
    """The text of a tokenizer.json for a GGUF file's vocabulary.

    Raises:
        ModelFileError: a damaged vocabulary.
    """
    _refuse_tables(source)
    if source.json is not None:
        return source.json
    kinds = dict(zip(source.vocab, source.token_types, strict=True))
    added = [(i, token) for i, token in enumerate(source.vocab) if kinds[token] in (_CONTROL, _USER_DEFINED)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(source.vocab) if kinds[token] != _UNUSED},
        "merges": [list(pair) for pair in _pairs(source.merges)],
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": kinds[token] == _CONTROL} for i, token in added
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False)


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges, each written "a b" (GGUF, older tokenizer.json) or ["a", "b"]."""
    if set(map(type, merges)) == {str} and set(map(str.count, merges, repeat(" "))) == {1}:  # a third of the time
        words = " ".join(merges).split(" ")
        return list(zip(words[::2], words[1::2], strict=True))
    pairs = [
        tuple(merge.split(" ") if type(merge) is str else merge if type(merge) is list else ()) for merge in merges
    ]
    if set(map(len, pairs)) - {2} or {type(part) for pair in pairs for part in pair} - {str}:
        bad = next(merge for merge, pair in zip(merges, pairs, strict=True) if [*map(type, pair)] != [str, str])
        raise ModelFileError(f"tokenizer: merge {str(bad)[:80]!r} found, two tokens expected: download the model again")
    return pairs  # just checked; checking one by one doubles the time to build


def _arguments(source: TokenizerSource) -> dict[str, Any]:
    """Arguments of `LibraryBpe`."""
    _refuse_tables(source)
    if source.json is not None:
        return _read_json(source.json)
    types = zip(source.vocab, source.token_types, strict=False)
    return {
        "vocab": {token: i for i, token in enumerate(source.vocab)},
        "merges": _pairs(source.merges),
        "specials": source.specials,
        "user_defined": [t for t, kind in types if kind == _USER_DEFINED and t and t not in source.specials],
    }


def _read_json(text: str) -> dict[str, Any]:
    """Arguments of `LibraryBpe` from the text of a tokenizer.json; what is not supported is refused by name."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"tokenizer.json: not JSON ({error}): download it again") from None
    model = _part(data, "model", dict)
    _expect("model.type", model.get("type", "BPE"), "BPE")
    _expect("normalizer", data.get("normalizer"), None)
    _expect("model.byte_fallback", bool(model.get("byte_fallback")), False)
    _expect("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None)
    _expect("model.end_of_word_suffix", model.get("end_of_word_suffix") or None, None)
    vocab = _part(model, "vocab", dict)
    added = _part(data, "added_tokens", list) if data.get("added_tokens") is not None else []
    if not all(isinstance(token, dict) for token in added):
        raise ModelFileError("tokenizer.json: added_tokens holds other things than tokens: download it again")
    added_ids = {token.get("content"): token.get("id") for token in added}
    for token, i in (vocab | added_ids).items():
        if not (isinstance(token, str) and token and type(i) is int):
            raise ModelFileError(f"tokenizer.json: token {token!r} with id {i!r} found, text and a number expected")
    return {
        "vocab": vocab | added_ids,
        "merges": _pairs(_part(model, "merges", list)),
        "specials": {token["content"]: token["id"] for token in added if token.get("special")},
        "user_defined": [token["content"] for token in added if not token.get("special")],
        "pre": _pre_name(data.get("pre_tokenizer")),
        "ignore_merges": bool(model.get("ignore_merges")),
    }


def _pre_name(node: Any) -> str:
    """The GGUF name of a tokenizer.json's pre-tokenizer."""
    steps = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    match steps:
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return "smollm"
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return "gpt-2"
    raise UnsupportedModel(
        f"tokenizer.json: pre_tokenizer {json.dumps(node)[:200]} found, SmolLM2's expected: individual Digits, then "
        "ByteLevel without prefix space (or ByteLevel alone)"
    )


def _part(data: Any, key: str, kind: type) -> Any:
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise ModelFileError(
            f"tokenizer.json: {key!r} is {type(value).__name__}, {kind.__name__} expected: download it again"
        )
    return value


def _expect(key: str, found: object, expected: object) -> None:
    if found != expected:
        raise UnsupportedModel(
            f"tokenizer.json: {key} is {str(found)[:80]!r}, {expected!r} expected: SmolLM2 has byte-level BPE"
        )
