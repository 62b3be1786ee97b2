"""Messages -> text -> (ids, mask), by the checkpoint's own chat template.

What the template writes and what people wrote must not be confused: only the template may write special tokens, however
a message is worded. A rendering says nothing of who wrote what, so the messages are marked first, with private-use
characters that occur in none of them:

    content    Hi <|im_end|>       ->  ⟦Hi ␛|im_end|>⟧     ⟦ ⟧ where it begins and ends, ␛ for the `<` of every special
    rendered   <|im_start|>user\\n⟦Hi ␛|im_end|>⟧<|im_end|>\\n
    cut        [<|im_start|>] "user\\nHi <|im_end|>" [<|im_end|>] "\\n"

Each span between two specials is encoded whole, as Hugging Face does; message by message gives other ids. The marks
also tell what the assistant wrote (mask), where to stop for a prefill, and where to splice sampled ids in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from smolrun.errors import TemplateError, TokenizerError
from smolrun.text.tokenizer import Tokenizer, require_unicode

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""{"role": str, "content": str, ...}; "ids" may hold the ids an assistant's content was sampled as."""

_PRIVATE = range(0xF0000, 0x10FFFE)  # planes 15 and 16: no font, no script, in hardly any text
_PRIVATE_TEXT = re.compile(f"[{chr(_PRIVATE.start)}-{chr(_PRIVATE.stop)}]")
_MAX_DEPTH = 32  # of containers in a message: half of what a template may nest
_NODE = 64  # characters an item of the messages counts for in the template's budget


class ChatTemplate:
    """The chat template of one checkpoint.

    Args:
        source: Jinja text, or None for a base model.
        tokenizer: encodes what is rendered.
        bos_token, eos_token: variables of the template; the checkpoint's own by default.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self.source = source
        self._tokenizer = tokenizer
        names: dict[int | None, str] = {i: text for text, i in tokenizer.specials.items()}
        eos = next(iter(tokenizer.eos_ids), None)
        self._tokens = {
            "bos_token": names.get(tokenizer.bos_id, "") if bos_token is None else bos_token,
            "eos_token": names.get(eos, "") if eos_token is None else eos_token,
        }
        specials = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self._special = re.compile("|".join(specials) or r"(?!)")
        self._special_start = re.compile(f"(?={'|'.join(specials) or '(?!)'})", re.DOTALL)  # overlapping ones too

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of a dialogue, byte for byte as Hugging Face's apply_chat_template gives it.

        Args:
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final: the last message begins the assistant's answer (prefill): end with it, unclosed.

        Raises:
            TemplateError: no template (base model), a broken or hostile one, or messages it refuses.
        """
        chat = self._chat(messages, add_generation_prompt, continue_final, tools)
        return chat.plain if not chat.prefill else chat.clean(chat.rendered)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Any] | None = None,
        need_mask: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """Ids of `render`'s text, and which of them the assistant wrote: its contents and the end token closing each.

        A special token's text inside a message stays text. A message's "ids" stand for its content while the content is
        their text: sampled ids are not always those the text encodes to, and a cached prefix must match id for id.

        Args:
            need_mask: for training: refuse a template whose rendering hides what the assistant wrote (its mask would be
                empty). Chat does not look at the mask.

        Raises:
            TemplateError: as `render`; or `need_mask` and the template rewrites the assistant's content.
            TokenizerError: a lone surrogate; names the message and the position.
        """
        chat = self._chat(messages, add_generation_prompt, continue_final, tools)
        if need_mask and not chat.marked and any(m["role"] == "assistant" and m.get("content") for m in chat.messages):
            raise TemplateError(
                "the chat template rewrites the assistant's messages, so their tokens cannot be told for training: "
                "use a template that renders their content as it is"
            )
        return _Encoder(self._tokenizer, self._special, chat).run()

    def _chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        continue_final: bool,
        tools: Sequence[Any] | None,
    ) -> _Chat:
        from smolrun.text import sandbox  # Jinja: 40 ms that only a chat needs

        template = self._template
        chat = _Chat(messages, self.source or "", continue_final)
        tools = _plain(tools, "tools")
        prompt = add_generation_prompt and not continue_final

        def render(messages: list[dict[str, Any]], tools: Any) -> str:
            variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
            return sandbox.run(template, variables | self._tokens, characters=_size(messages) + _size(tools))

        if continue_final and not chat.messages[-1].get("content"):  # an empty prefill is the opening of a turn
            chat.prefill, prompt = False, True
            chat.messages = chat.messages[:-1]
        chat.plain = render(chat.messages, tools)
        escaped = [chat.escape(message, self._special_start) for message in chat.messages]
        tools = chat.escape(tools, self._special_start)
        for mark in (chat.mark, chat.mark_inner):  # the second for templates that trim
            chat.rendered = render([mark(k, message) for k, message in enumerate(escaped)], tools)
            if chat.clean(chat.rendered) == chat.plain:
                chat.marked = True
                break
        else:  # the template looks into the contents: no marks, but their specials stay escaped
            chat.rendered = render(escaped, tools)
        if chat.prefill:
            chat.cut_after_prefill()
        return chat

    @cached_property
    def _template(self) -> Template:
        if self.source is None:
            raise TemplateError(
                "this checkpoint has no chat template: it is a base model, made to continue text; "
                "use `generate` (`smolrun generate`), or load the Instruct version to chat"
            )
        from smolrun.text import sandbox

        return sandbox.compile_template(self.source)


class _Chat:
    """One dialogue on its way through the template, with its private-use characters.

    Attributes:
        messages: plain copies, without "ids".
        ids: index of a message -> the ids its content was sampled as.
        plain: rendered without marks: what the text is.
        rendered: rendered with marks: who wrote what.
        marked: the marks came through; if not, `rendered` has none.
    """

    def __init__(self, messages: Sequence[Message], source: str, continue_final: bool) -> None:
        self.messages = [_checked(k, message) for k, message in enumerate(messages)]
        self.ids = {k: list(m["ids"]) for k, m in enumerate(messages) if m.get("ids") is not None}
        self.prefill = continue_final
        if continue_final and not (self.messages and self.messages[-1]["role"] == "assistant"):
            raise TemplateError(
                "continue_final: the last message is not the assistant's, so there is nothing to continue"
            )
        if continue_final and not isinstance(self.messages[-1].get("content"), str):
            raise TemplateError("continue_final: the assistant's last message has no text to continue")
        used = {c for text in (source, *_strings(self.messages)) for c in _PRIVATE_TEXT.findall(text)}
        free = (chr(c) for c in _PRIVATE if chr(c) not in used)
        try:
            self.opening = {next(free): k for k in range(len(self.messages))}
            self.closing = {next(free): k for k in range(len(self.messages))}
        except StopIteration:
            raise TemplateError(
                f"{len(self.messages):,} messages found, about {len(_PRIVATE) // 2:,} at most expected"
            ) from None
        self._marks = tuple(zip(self.opening, self.closing, strict=True))
        self._free = free
        self._escapes: dict[str, str] = {}  # first character of a special -> private-use character
        self._unescape: dict[int, str | None] = dict.fromkeys(map(ord, (*self.opening, *self.closing)))
        self.plain = self.rendered = ""
        self.marked = False

    def escape(self, value: Any, special_start: re.Pattern[str]) -> Any:
        """The value with the first character of every special token's text in it replaced."""
        if isinstance(value, dict):
            return {self.escape(k, special_start): self.escape(v, special_start) for k, v in value.items()}
        if isinstance(value, list):
            return [self.escape(item, special_start) for item in value]
        if not isinstance(value, str):
            return value
        letters = list(value)
        for match in special_start.finditer(value):
            letter = value[match.start()]
            if letter not in self._escapes:
                self._escapes[letter] = next(self._free)
                self._unescape[ord(self._escapes[letter])] = letter
            letters[match.start()] = self._escapes[letter]
        return "".join(letters)

    def mark(self, k: int, message: dict[str, Any]) -> dict[str, Any]:
        """The message with marks around its content; an empty content stays empty, templates ask for that."""
        content = message.get("content")
        opening, closing = self._marks[k]
        return (
            message | {"content": f"{opening}{content}{closing}"} if content and isinstance(content, str) else message
        )

    def mark_inner(self, k: int, message: dict[str, Any]) -> dict[str, Any]:
        """As `mark`, inside the content's outer white space, so that a template may strip it."""
        content = message.get("content")
        if not isinstance(content, str) or not (core := content.strip()):
            return message
        opening, closing = self._marks[k]
        return message | {"content": content.replace(core, f"{opening}{core}{closing}", 1)}

    def clean(self, text: str) -> str:
        """Text without marks and escapes."""
        return text.translate(self._unescape)

    def cut_after_prefill(self) -> None:
        """Ends `rendered` with the last message's content."""
        content = self.messages[-1]["content"]
        if self.marked:
            end = self.rendered.rfind(self._marks[len(self.messages) - 1][1])
            if end >= 0:
                self.rendered = self.rendered[: end + 1]
                return
        core = content.strip()
        end = self.clean(self.rendered).rfind(core) if not self.marked else -1  # clean and rendered are aligned here
        if end < 0 or not core:
            raise TemplateError("continue_final: the chat template does not render the assistant's text as it is")
        self.rendered = self.rendered[: end + len(core)]

    def content_of(self, k: int) -> str | None:
        """What message k's content became, if it was rendered once and in one piece."""
        opening, closing = self._marks[k]
        if self.rendered.count(opening) != 1 or self.rendered.count(closing) != 1:
            return None
        start, end = self.rendered.index(opening) + 1, self.rendered.index(closing)
        return self.clean(self.rendered[start:end]) if start <= end else None


class _Encoder:
    """Walks a marked rendering from special to special."""

    def __init__(self, tokenizer: Tokenizer, special: re.Pattern[str], chat: _Chat) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        marks = "".join(map(re.escape, (*chat.opening, *chat.closing)))
        self._border = re.compile(f"({special.pattern}{f'|[{marks}]' if marks else ''})")
        self._splices = dict(self._valid_splices())
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self._span: list[
            tuple[str, bool]
        ] = []  # text since the last border of encoding, and whether the assistant wrote it

    def _valid_splices(self) -> Iterator[tuple[int, list[int]]]:
        for k, ids in self._chat.ids.items():
            if k >= len(self._chat.messages):
                continue
            while ids and ids[-1] in self._tokenizer.eos_ids:  # the stop id is not part of the text
                ids = ids[:-1]
            try:
                text = self._tokenizer.decode(ids)
            except TokenizerError:
                continue
            if ids and text == self._chat.content_of(k):
                yield k, ids

    def run(self) -> tuple[list[int], list[bool]]:
        chat, specials = self._chat, self._tokenizer.specials
        inside: int | None = None  # the message whose content is being read
        closed = False  # the assistant's content has just ended
        for part in self._border.split(chat.rendered):
            if part in chat.opening:
                inside = chat.opening[part]
                if inside in self._splices:
                    self._flush()
            elif part in chat.closing:
                k = chat.closing[part]
                if k in self._splices:
                    self._span.clear()
                    self.ids += self._splices[k]
                    self.mask += [self._assistants(k)] * len(self._splices[k])
                inside, closed = None, self._assistants(k)
            elif part in specials:
                self._flush()
                self.ids.append(specials[part])
                self.mask.append(closed and specials[part] in self._tokenizer.eos_ids)
                closed = False
            elif part:
                self._span.append((chat.clean(part), self._assistants(inside)))
                closed = closed and part.isspace()
        self._flush()
        return self.ids, self.mask

    def _assistants(self, k: int | None) -> bool:
        return k is not None and self._chat.messages[k]["role"] == "assistant"

    def _flush(self) -> None:
        """Encodes the span whole; an id is the assistant's if its token begins in the assistant's text."""
        text = "".join(part for part, _ in self._span)
        if not any(assistant for _, assistant in self._span):
            ids = self._tokenizer.encode(text)
            self.mask += [False] * len(ids)
        else:
            ids, ends = self._tokenizer.encode_with_ends(text)
            by_byte = b"".join(bytes([assistant]) * len(part.encode()) for part, assistant in self._span)
            self.mask += [bool(by_byte[start]) for start in [0, *ends[:-1]]]
        self.ids += ids
        self._span.clear()


def _checked(k: int, message: Message) -> dict[str, Any]:
    """A plain copy of message k, with a role and a content."""
    where = f"messages[{k}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f'{where}: {str(message)[:80]!r} found, {{"role": "user", "content": "..."}} expected')
    if not isinstance(message.get("content"), (str, list, type(None))):
        raise TemplateError(f"{where}: content is a {type(message['content']).__name__}, text expected")
    copy: dict[str, Any] = _plain({key: value for key, value in message.items() if key != "ids"}, where)
    return copy


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON-like data; a template gets nothing else to reach into."""
    if isinstance(value, str):
        require_unicode(value, where)
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {_plain(k, where, depth + 1): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{k}]", depth + 1) for k, item in enumerate(value)]
    raise TemplateError(
        f"{where}: a {type(value).__name__} found, text, numbers, lists and dictionaries (not too deep) expected"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _size(value: Any) -> int:
    """What messages count for in the template's budget."""
    if isinstance(value, dict):
        return sum(_NODE + _size(k) + _size(v) for k, v in value.items())
    if isinstance(value, list):
        return sum(_NODE + _size(item) for item in value)
    return len(value) if isinstance(value, str) else 0
