"""What the answers of earlier turns were sampled as.

Sampled ids are not always the canonical encoding of their text ("ans" + "wer" where one token says "answer"). A
dialogue rendered anew would then give other ids than the KV cache holds, and everything after the difference would be
computed again. So the ids of the latest answers are kept; `ChatTemplate.encode` puts them in place of a text that is
unchanged.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_KEPT = 256  # answers: some 1 MB, if each has 512 ids


class AnswerMemory:
    """Dialogue up to and including an answer -> the answer's ids. The oldest answers are forgotten.

    >>> memory = AnswerMemory()
    >>> memory.remember([{"role": "user", "content": "Hi"}], "Hello", [7, 8])
    >>> memory.with_ids([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])[1]["ids"]
    [7, 8]
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()

    def with_ids(self, messages: Sequence[Message]) -> list[Message]:
        """The messages; those of the assistant that are known get "ids", unless they carry their own."""
        out: list[Message] = []
        digest = hashlib.sha256()
        for message in messages:
            digest.update(_bytes(message))
            known = self._ids.get(digest.digest()) if is_answer(message) else None
            out.append({"ids": known.tolist(), **message} if known is not None else message)
        return out

    def remember(self, messages: Sequence[Message], text: str, ids: Sequence[int]) -> None:
        """Keeps what an answer to the messages was sampled as. After a prefill, text and ids are those of the whole."""
        digest = hashlib.sha256()
        for message in (*messages, {"role": "assistant", "content": text}):
            digest.update(_bytes(message))
        self._ids[digest.digest()] = array("q", ids)
        while len(self._ids) > _KEPT:
            self._ids.popitem(last=False)


def is_answer(message: Message) -> bool:
    """The assistant said it; False also for what is no message, which the template refuses by name."""
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _bytes(message: Message) -> bytes:
    turn = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else message
    return json.dumps(turn, default=str).encode()
