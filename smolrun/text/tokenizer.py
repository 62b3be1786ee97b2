"""Text <-> ids: byte-level BPE on the `tokenizers` library.

One way in for both kinds of checkpoint: tokenizer.json and the GGUF lists are brought to the same vocabulary, merges
and pre-tokenizer name, so that the same model gives the same ids by either road. What `encode` reads is always plain
text: no text can become a special token; only chat templates write those (see template.py).

    text --UTF-8--> bytes --split by the pre-tokenizer--> words --merges--> ids
    b"\\x00 a"  is spelled  "ĀĠa"  in the vocabulary: GPT-2 gives every byte a printable letter
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as _Bpe

from smolrun.errors import ModelFileError, TokenizerError, UnsupportedModel

if TYPE_CHECKING:
    from smolrun.files.checkpoint import TokenizerSource

MAX_ID = 1 << 20
"""Ids at or beyond this are refused: 20 times SmolLM2's vocabulary, so no hostile id asks for gigabytes."""

# llama.cpp's token types; user-defined: an added token that is found in plain text too
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "gpt-2": _gpt2,
}
"""`tokenizer.ggml.pre` -> what splits text into words; SmolLM2 sets every digit apart, then follows GPT-2's regex."""


def _byte_letters() -> dict[int, int]:
    """Code point of a letter -> byte, GPT-2's spelling: printable Latin-1 stands for itself, the rest follow 0xFF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: byte for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {0x100 + n: byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()


class Tokenizer:
    """The vocabulary of one checkpoint.

    Attributes:
        vocab_size: ids are 0 <= id < vocab_size; an id no token has (a hole, padding of the model) is empty text.
        specials: text -> id of the special tokens (`<|im_end|>` ...); `encode` never returns one of these ids.
        bos_id: id of the begin-of-sequence token, if the checkpoint names one. It is not prepended to anything.
        eos_ids: ids that end an answer.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        specials: Mapping[str, int],
        user_defined: Iterable[str] = (),
        pre: str = "smollm",
        bos_id: int | None = None,
        eos_ids: tuple[int, ...] = (),
        vocab_size: int = 0,
        ignore_merges: bool = False,
    ) -> None:
        """Builds the tokenizer; 0.06 s for SmolLM2's 49,152 tokens and 48,900 merges.

        Args:
            vocab: token -> id, spelled in byte letters; specials and user-defined tokens as plain text.
            merges: pairs of tokens, best first; both and their join are in the vocabulary.
            specials: text -> id of tokens that plain text never becomes.
            user_defined: added tokens that plain text does become, before any splitting (as in llama.cpp).
            pre: name of the pre-tokenizer, as `tokenizer.ggml.pre`.
            vocab_size: at least this many ids (models may be padded beyond their vocabulary).
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
        specials, user_defined = dict(specials), tuple(user_defined)
        vocab = {**vocab, **specials}
        if not vocab:
            raise ModelFileError("tokenizer: the vocabulary is empty: download the model again")
        low, high = min(vocab.values()), max(vocab.values())
        if low < 0 or high >= MAX_ID:
            raise ModelFileError(f"tokenizer: ids from {low:,} to {high:,} found, 0 to {MAX_ID - 1:,} expected")
        self.specials = specials
        self.special_ids = frozenset(specials.values())
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.vocab_size = max(high + 1, vocab_size)
        self._plain = frozenset(specials) | frozenset(user_defined)  # spelled as text, not in byte letters
        self._token: list[str | None] = [None] * self.vocab_size
        for token, i in vocab.items():
            self._token[i] = token
        self._bytes: dict[int, bytes] = {}

        # SmolLM2 has no token for 21 bytes (13 of them never occur in UTF-8). Without an unknown token the library
        # forgets such a byte and merges its neighbours across the gap; llama.cpp does not. Hence an id, dropped later.
        self._unknown = high + 1
        unknown = "\0"
        while unknown in vocab:
            unknown += "\0"
        try:
            model = models.BPE(
                {**vocab, unknown: self._unknown}, list(merges), unk_token=unknown, ignore_merges=ignore_merges
            )
        except Exception as error:  # the library raises a bare Exception
            raise ModelFileError(
                f"tokenizer: merges do not fit the vocabulary ({error}): download the model again"
            ) from error
        self._bpe = _Bpe(model)
        self._bpe.pre_tokenizer = _PRE_TOKENIZERS[pre]()
        self._bpe.add_tokens([AddedToken(token, normalized=False) for token in user_defined])

    @classmethod
    def from_source(cls, source: TokenizerSource, *, vocab_size: int = 0) -> Tokenizer:
        """The tokenizer of a checkpoint; `vocab_size` is the model's, where it is padded beyond the tokenizer's.

        Raises:
            ModelFileError: a damaged vocabulary.
            UnsupportedModel: a sound tokenizer of another kind than byte-level BPE.
        """
        facts: dict[str, Any] = {"bos_id": source.bos_id, "eos_ids": source.eos_ids, "vocab_size": vocab_size}
        if source.json is not None:
            return cls(**(_read_json(source.json) | facts))
        vocab = {token: i for i, token in enumerate(source.vocab)}
        types = zip(source.vocab, source.token_types, strict=False)
        user_defined = [
            token for token, kind in types if kind == _USER_DEFINED and token and token not in source.specials
        ]
        return cls(
            vocab,
            _pairs(source.merges),
            specials=source.specials,
            user_defined=user_defined,
            **facts,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing is added, and a special token's text stays text.

        Equal to llama.cpp's ids (parse_special=False). Time is linear: 1 MB takes about 1 s, whatever it repeats.

        Raises:
            TokenizerError: the text holds a lone surrogate, which no UTF-8 can carry; names its position.
        """
        return [i for i in self._encode(text) if i != self._unknown]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`, and for each id where its token ends, in UTF-8 bytes of the text."""
        ids, ends, end = [], [], 0
        for i in self._encode(text):
            end += 1 if i == self._unknown else len(self.token_bytes(i))
            if i != self._unknown:
                ids.append(i)
                ends.append(end)
        return ids, ends

    def _encode(self, text: str) -> list[int]:
        require_unicode(text, "text")
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id; not always whole UTF-8. A special token gives its text.

        Raises:
            TokenizerError: no such id.
        """
        if (known := self._bytes.get(i)) is not None:
            return known
        if not 0 <= i < self.vocab_size:
            raise TokenizerError(f"id {i:,} found, 0 to {self.vocab_size - 1:,} expected: is it from another model?")
        token = self._token[i] or ""
        letters = [_BYTE_OF_LETTER.get(ord(letter)) for letter in token]
        plain = token in self._plain or None in letters
        self._bytes[i] = token.encode() if plain else bytes(b for b in letters if b is not None)
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


def gguf_vocabulary(source: TokenizerSource, vocab_size: int) -> dict[str, Any]:
    """The lists of a GGUF file that hold this tokenizer; ids without a token up to vocab_size become unused ones.

    Raises:
        ModelFileError: a damaged vocabulary.
        UnsupportedModel: a sound tokenizer of another kind, or one that GGUF has no words for.
    """
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


def _read_json(text: str) -> dict[str, Any]:
    """Arguments of `Tokenizer` from the text of a tokenizer.json; what this project does not run is refused by name."""
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
