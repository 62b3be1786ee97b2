"""Examples to fine-tune on: rows of data files as ids, and which of them are to be learnt.

    {"messages": [{"role", "content"}, ...]}           also "conversations" of {"from", "value"}
    {"prompt": text, "completion": text}               a user's turn and its answer; plain text with chat = false
    {"text": text}                                     plain text, learnt from after `data.after` on
    {"prompt" | "messages" | "conversations", "chosen", "rejected"}              a pair for DPO; or both whole dialogues

Dialogues are rendered by the checkpoint's own chat template; learnt is what the assistant says, with the token that
ends its turn. Of a pair it is the last answer alone. Plain prompt and completion are encoded apart, as they are when
the model is asked, and the completion ends with the model's end token.

They lie in the cache of train/data.py, keyed by all that makes them, template and length too: an id that is to be
learnt as it is, any other one as its complement (~id, below 0); the two of a pair one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import OptionError, SmolrunError
from smolrun.text.template import ChatTemplate
from smolrun.text.tokenizer import Tokenizer
from smolrun.train.data import Document, Documents, Progress, Tokens, cached, digest_of
from smolrun.train.recipe import Examples
from smolrun.train.rows import BadRow, Row, files, look_up, read_rows

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A document.

    Attributes:
        ids: int32 (n,), two or more.
        mask: bool (n,): which ids are to be learnt.
        size: ids that it had before it was cut.
        number: tells it from all others of its data.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    size: int
    number: int = 0

    @classmethod
    def of(cls, ids: Sequence[int], mask: Sequence[bool], length: int) -> Example:
        """The first `length` + 1 ids: that many are read, the last one is a target only."""
        most = length + 1
        return cls(np.array(ids[:most], np.int32), np.array(mask[:most], bool), len(ids))

    @property
    def cut(self) -> bool:
        """Ids were left out at its end: it was too long."""
        return self.size > len(self.ids)


class Encoder:
    """Rows -> examples or pairs, for one model.

    Attributes:
        facts: what an example depends on besides its row, as JSON.
    """

    def __init__(self, data: Examples, tokenizer: Tokenizer, template: ChatTemplate, length: int, digest: str) -> None:
        """
        Args:
            length: ids of an example that are read at most.
            digest: of the tokenizer, see data.tokenizer_digest.
        """
        names = ("prompt", "completion", "field", "after", "prompt_length", "chat")
        self.facts = [digest, template.source, length, {name: getattr(data, name) for name in names}]
        self._data, self._tokenizer, self._template, self._length = data, tokenizer, template, length
        self._chat = template.source is not None if data.chat is None else data.chat
        self._end = tokenizer.eos_ids[0]

    def example(self, row: Row) -> list[Example]:
        """A row as one example.

        Raises:
            OptionError: what is wrong with it.
        """
        value, data = row.value, self._data
        messages = _dialogue(value)
        if messages is not None:
            return [self._whole(messages)]
        if all(name.split(".")[0] in value for name in (data.prompt, data.completion)):
            return [self._answered(_text(row, data.prompt), _text(row, data.completion))]
        text = _text(row, data.field)
        if not data.after:
            ids = [*self._tokenizer.encode(text), self._end]
            return [self._checked(ids, [True] * len(ids))]
        prompt, mark, completion = text.partition(data.after)
        if not mark:
            raise OptionError(f"{data.field} has no {data.after!r}, after which it is learnt")
        return [self._plain(prompt + mark, completion)]

    def pair(self, row: Row) -> list[Example]:
        """A row as two examples, chosen and rejected.

        Raises:
            OptionError: what is wrong with it.
        """
        value = row.value
        if "chosen" not in value or "rejected" not in value:
            raise OptionError(f"chosen and rejected expected, {', '.join(map(str, value))} found"[:200])
        asked = _dialogue(value)
        if asked is None and self._data.prompt in value:
            prompt = value[self._data.prompt]
            asked = _messages(prompt) if isinstance(prompt, list) else None
            if asked is None:
                prompt = _text(row, self._data.prompt)
                return self._apart([self._answered(prompt, _answer(value[side])) for side in ("chosen", "rejected")])
        out = []
        for side in ("chosen", "rejected"):
            its = value[side]
            messages = _messages(its) if isinstance(its, list) else [{"role": "assistant", "content": _answer(its)}]
            if asked is not None and messages[: len(asked)] != asked:
                messages = [*asked, *messages]
            out.append(self._whole(messages, last=True))
        return self._apart(out)

    def _apart(self, pair: list[Example]) -> list[Example]:
        if np.array_equal(pair[0].ids, pair[1].ids):
            where = f" in their first {self._length:,} tokens" if pair[0].cut else ""
            raise OptionError(f"chosen and rejected are the same{where}: nothing to prefer")
        return pair

    def _answered(self, prompt: str, completion: str) -> Example:
        if not self._chat:
            return self._plain(prompt, completion)
        return self._whole([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])

    def _plain(self, prompt: str, completion: str) -> Example:
        """Prompt and completion as they are, encoded apart."""
        before, after = self._tokenizer.encode(prompt), [*self._tokenizer.encode(completion), self._end]
        return self._checked(before + after, [False] * len(before) + [True] * len(after))

    def _whole(self, messages: list[Message], last: bool = False) -> Example:
        """A dialogue; `last`: its last answer alone is to be learnt."""
        if messages[-1]["role"] != "assistant":
            raise OptionError(f"the last message is the {messages[-1]['role']}'s, the assistant's expected")
        ids, mask = self._template.encode(messages, add_generation_prompt=False, need_mask=True)
        if last:
            asked, _ = self._template.encode(messages[:-1])
            if ids[: len(asked)] != asked:
                raise OptionError("the chat template renders the prompt in another way once it is answered")
            mask = [False] * len(asked) + mask[len(asked) :]
        return self._checked(ids, mask)

    def _checked(self, ids: list[int], mask: list[bool]) -> Example:
        most = self._data.prompt_length
        if most is not None and True in mask:
            first = max(0, mask.index(True) - most)
            ids, mask = ids[first:], mask[first:]
        example = Example.of(ids, mask, self._length)
        if not example.mask[1:].any():
            raise OptionError(f"nothing to learn in its first {self._length:,} tokens: {len(ids):,} in all")
        return example


def _text(row: Row, field: str) -> str:
    found = look_up(row, field)
    if isinstance(found, BadRow):
        raise OptionError(found.problem)
    return found


def _dialogue(value: Mapping[str, Any]) -> list[Message] | None:
    for name in ("messages", "conversations"):
        if name in value:
            return _messages(value[name])
    return None


def _messages(value: Any) -> list[Message]:
    """Messages in either spelling."""
    if not isinstance(value, list) or not value:
        raise OptionError(f"{type(value).__name__} found, a list of messages expected")
    return [_message(message) for message in value]


def _message(value: Any) -> Message:
    found = value if isinstance(value, dict) else {}
    role, content = found.get("role", ROLES.get(str(found.get("from")))), found.get("content", found.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise OptionError(f"{value!r:.80} found, a message with role and content expected")
    return {"role": role, "content": content}


def _answer(value: Any) -> str:
    """An answer's text, maybe in a message."""
    text = value if isinstance(value, str) else _message(value)["content"]
    if not text.strip():
        raise OptionError("an empty answer")
    return text


class Groups:
    """Some of the cache's examples, alone or in pairs, read when they are asked for.

    Attributes:
        lengths: int64 (groups, width): tokens of each example that are read.
        sizes: int64 (groups,): of each group.
    """

    def __init__(self, documents: Documents, width: int, numbers: NDArray[np.int64]) -> None:
        """width: examples in a group. numbers: of the groups."""
        self._documents, self._width, self._numbers = documents, width, numbers
        self.lengths: NDArray[np.int64] = (documents.lengths - 1).reshape(-1, width)[numbers]
        self.sizes: NDArray[np.int64] = self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> list[Example]:
        first = self._width * int(self._numbers[i])
        return [self._example(number) for number in range(first, first + self._width)]

    def __iter__(self) -> Iterator[list[Example]]:
        return (self[i] for i in range(len(self)))

    def _example(self, number: int) -> Example:
        found = self._documents.ids(number)
        mask = found >= 0
        return Example(np.where(mask, found, ~found), mask, int(self._documents.records["size"][number]), number)


@dataclass(frozen=True)
class Examined:
    """The examples of a recipe.

    Attributes:
        learnt, held: to learn, and held out.
        bad: rows that are none.
        cut: examples that were too long.
        again: rows of `path` that are in `valid` too: they are not learnt.
        digest: of the files' contents and of how they are read.
    """

    learnt: Groups
    held: Groups
    bad: tuple[BadRow, ...]
    cut: int
    again: int
    digest: str

    @property
    def tokens(self) -> int:
        """Read in an epoch."""
        return int(self.learnt.sizes.sum())


def examine(data: Examples, encoder: Encoder, pairs: bool, progress: Progress | None = None) -> Examined:
    """All rows of the files, encoded; held out is what `valid` holds, else a share chosen by content.

    Raises:
        OptionError: too many bad rows, or nothing to learn.
    """
    encode, width = (encoder.pair, 2) if pairs else (encoder.example, 1)

    def encoded(path: Path) -> Iterator[Document | BadRow]:
        for row in read_rows(path):
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield from [(np.where(e.mask, e.ids, ~e.ids), e.size, digest_of(e.ids.tobytes())) for e in encode(row)]
            except SmolrunError as error:
                yield BadRow(row.where, str(error))

    def read(path: str) -> list[Tokens]:
        facts = ["examples", pairs, *encoder.facts]
        return [cached(file, facts, np.dtype(np.int32), encoded(file), progress) for file in files(path)]

    own, valid = read(data.path), [] if data.valid is None else read(data.valid)
    documents = Documents("data", [*own, *valid], data.bad_rows, width)
    held = documents.chance[::width] < data.held_out
    again = np.zeros(len(held), bool)
    if data.valid is not None:
        held = np.arange(len(held)) >= sum(len(file.documents) for file in own) // width
        digests = documents.records["digest"][::width]
        again = ~held & np.isin(digests, digests[held])
    learnt, rest = (Groups(documents, width, np.flatnonzero(chosen)) for chosen in (~held & ~again, held))
    if not len(learnt):
        but = f" but what is in {data.valid}" if again.any() else ""
        raise OptionError(f"data: nothing to learn in {data.path}{but}")
    cut = int((documents.records["size"] > documents.lengths).sum())
    return Examined(learnt, rest, documents.bad, cut, int(again.sum()), documents.digest)
