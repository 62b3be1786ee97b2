"""The dialogue of `smolrun chat`: lines and commands in, answers out; what was said is a list of messages, no more."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolrun.cli.lines import Lines
from smolrun.cli.options import AnswerOptions, parse_setting, sampling_names
from smolrun.cli.running import end_line, print_text, run
from smolrun.cli.status import status_line
from smolrun.errors import ContextOverflow, OptionError, SmolrunError

if TYPE_CHECKING:
    from smolrun import LLM, Chunk

Message = dict[str, str]

HELP = """\
/help            this list
/reset           forget the dialogue, keep the system message
/system [TEXT]   set the system message; without TEXT: show it
/undo            take back the last message and its answer
/regen           answer the last message again
/save FILE       write the dialogue as JSON
/load FILE       continue a saved dialogue
/set [NAME [X]]  change a setting (temperature, max_tokens, stop, ...) or give it its default; without NAME: show all
/exit            leave (also Ctrl-D)
A line that ends with \\ goes on in the next one; text between two \"\"\" may have many lines.
A message that starts with / is written with //. Ctrl-C stops an answer and keeps the chat."""


class Repl:
    """One dialogue with one model. `messages` holds system, user and assistant messages in the order of the chat."""

    def __init__(
        self, llm: LLM, answer: AnswerOptions, messages: Sequence[Message] = (), *, verbose: bool = False
    ) -> None:
        self.llm = llm
        self.answer = answer
        self.verbose = verbose
        self.messages: list[Message] = [*messages]
        self.lines = Lines()

    def run(self) -> None:
        """Read and answer until /exit or Ctrl-D."""
        note("smolrun chat: /help lists the commands, Ctrl-D leaves")
        try:
            while self.turn():
                pass
        finally:
            self.lines.save_history()

    def turn(self) -> bool:
        """One message or command. Returns False when the chat is over."""
        try:
            text = self.lines.read()
        except EOFError:
            note("")
            return False
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit leaves)")
            return True
        if not text.startswith("/") or text.startswith("//"):
            if text.strip():
                self.say(text.removeprefix("/") if text.startswith("//") else text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        command = getattr(self, f"do_{name}", None)
        if command is None:
            note(f"no command /{name}: /help lists them; a message that starts with / is written with //")
            return True
        try:
            command(rest.strip())
        except (SmolrunError, OSError) as error:
            note(f"error: {error}")
        return True

    # ---- answers -----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Add a user message and answer it."""
        self.answer_or_restore([*self.messages, {"role": "user", "content": text}])

    def answer_or_restore(self, messages: list[Message]) -> None:
        """Answer the last of `messages`; if there is no answer, the dialogue stays what it was."""
        before, self.messages = self.messages, messages
        answer = None
        try:
            answer = self.reply()
        except SmolrunError as error:
            note(f"error: {error}")
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages = before

    def reply(self) -> str:
        """The answer to the messages, printed as it comes; the oldest turns make room if the user agrees."""
        while True:
            try:
                text, reason = self.stream()
            except ContextOverflow as error:
                note(f"(the context is full: {error.needed:,} tokens, {error.context:,} fit)")
                if not self.drop_oldest():
                    raise
                continue
            if reason != "context":
                return text
            note("(the context is full: the answer ends here)")
            if not self.drop_oldest():
                return text
            note("(the same message again)")

    def stream(self) -> tuple[str, str | None]:
        """Print one answer. Returns it and why it ended; Ctrl-C ends it, and what was printed counts."""
        arguments = self.answer.arguments()
        chunks: list[Chunk] = []
        with contextlib.closing(
            run(lambda cancel: self.llm.chat(self.messages, stream=True, cancel=cancel, **arguments))
        ) as stream:
            for chunk in stream:
                chunks.append(chunk)
                print_text(chunk.text)
        text, reason = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        end_line(text)
        if reason == "cancelled":
            note("(stopped)")
        elif reason == "length":
            note("(cut: /set max_tokens N allows longer answers)")
        if self.verbose:
            note(status_line(chunks[-1]))
        return text, reason

    def drop_oldest(self) -> bool:
        """Offer to forget the oldest turns, down to half of the tokens. Returns False if nothing was dropped."""
        starts = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if len(starts) < 2 or not self.lines.ask("forget the oldest turns and go on?"):
            return False
        # (messages,) tokens each; the template's own few do not matter for "half"
        sizes = [len(self.llm.tokenize(message["content"])) for message in self.messages]
        budget = sum(sizes) // 2
        dropped = 1
        while dropped < len(starts) - 1 and sum(sizes[starts[dropped] :]) > budget:
            dropped += 1
        self.messages = self.messages[: starts[0]] + self.messages[starts[dropped] :]
        note(f"(forgot the {dropped} oldest of {len(starts)} turns)")
        return True

    # ---- commands: do_NAME answers /NAME -----------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        """The list of commands."""
        note(HELP)

    def do_reset(self, _: str) -> None:
        """Forget the dialogue."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        note("(a new dialogue)")

    def do_system(self, text: str) -> None:
        """Show or set the system message."""
        has = bool(self.messages) and self.messages[0]["role"] == "system"
        if text:
            self.messages = [{"role": "system", "content": text}, *self.messages[has:]]
        note(f"system: {self.messages[0]['content'] if text or has else '(that of the model)'}")

    def do_undo(self, _: str) -> None:
        """Take back the last exchange."""
        asked = self.last_question()
        note(f"(took back: {self.messages[asked]['content'].splitlines()[0][:60]})")
        del self.messages[asked:]

    def do_regen(self, _: str) -> None:
        """Answer the last message again."""
        self.answer_or_restore(self.messages[: self.last_question() + 1])

    def do_save(self, name: str) -> None:
        """Write the dialogue."""
        path = file_name("save", name)
        path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        note(f"({len(self.messages)} messages in {path})")

    def do_load(self, name: str) -> None:
        """Continue a saved dialogue."""
        path = file_name("load", name)
        try:
            self.messages = as_messages(json.loads(path.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{path}: a list of messages with role and content expected: {error}") from error
        note(f"({len(self.messages)} messages from {path})")

    def do_set(self, text: str) -> None:
        """Show or change settings."""
        name, _, value = text.partition(" ")
        if not name:
            shown = {**vars(self.answer.arguments()["sampling"]), **self.answer.answer}
            note("\n".join(f"{key} {value}" for key, value in shown.items()))
            return
        changed = AnswerOptions(dict(self.answer.sampling), dict(self.answer.answer))
        name, parsed = parse_setting(name, value.strip())
        group = changed.sampling if name in sampling_names() else changed.answer
        if parsed is None:
            group.pop(name, None)
        else:
            group[name] = parsed
        changed.arguments()  # refuses what is out of range
        self.answer = changed
        note(f"({name} {'its default' if parsed is None else parsed})")

    def last_question(self) -> int:
        """Index of the last user message."""
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise OptionError("nothing was said yet")


def note(text: str) -> None:
    """Say something that is not part of an answer."""
    click.echo(text, err=True)


def file_name(command: str, name: str) -> Path:
    """The argument of /save and /load."""
    if not name:
        raise OptionError(f"/{command} FILE: the file is missing")
    return Path(name).expanduser()


def as_messages(value: Any) -> list[Message]:
    """Check what a file holds. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"{type(value).__name__} found")
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"{message!r} found")
        if message["role"] not in ("system", "user", "assistant") or not isinstance(message["content"], str):
            raise ValueError(f"{message!r} found")
    return value
