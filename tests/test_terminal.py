"""`smolrun chat` on a real pseudo-terminal: editing, many lines, commands, Ctrl-C, a full context."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import smolrun
from fake_hub import FakeHub

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

TESTS = Path(__file__).parent
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PATIENCE = 30.0  # seconds for what should take milliseconds
ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\x1b[=>]|\r")

# Ctrl-C reaches a process only from its controlling terminal, and one that does not ignore it: what a shell starts in
# the background does, and so do its children.
START = """
import fcntl, os, runpy, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path[:0] = [{tests!r}, {root!r}]
sys.argv = ["smolrun", *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, arguments: list[str], environment: dict[str, str], *, stdout: int | None = None) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        root = str(Path(smolrun.__file__).parents[1])
        script = str(TESTS / "fake_llm.py")
        code = START.format(tests=str(TESTS), root=root, arguments=arguments, script=script)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.seen = ""  # all output
        self.read_to = 0  # what expect() has consumed

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def line(self, text: str) -> None:
        self.send(text + "\r")

    def press(self, key: str, text: str) -> None:
        """Press a key at the prompt until it is heard: CPython's readline misses a signal just before its select()."""
        for _ in range(int(PATIENCE)):
            self.send(key)
            with contextlib.suppress(AssertionError):
                self.expect(text, 1.0)
                return
        raise AssertionError(f"{text!r} expected after {key!r}")

    def expect(self, text: str, patience: float = PATIENCE) -> str:
        """Wait until `text` was printed after what was last expected; returns what came before it."""
        deadline = time.monotonic() + patience
        while True:
            clean = ESCAPES.sub("", self.seen)
            found = clean.find(text, self.read_to)
            if found >= 0:
                before, self.read_to = clean[self.read_to : found], found + len(text)
                return before
            if not self._read(deadline):
                raise AssertionError(f"{text!r} expected, found {clean[self.read_to :]!r}")

    def answer(self, message: str) -> None:
        """Send a message and wait for its answer and the next prompt."""
        self.line(message)
        self.expect(f"echo: {message}\n")
        self.expect("> ")

    def note(self, command: str, text: str) -> None:
        """Send a command and wait for what it says and the next prompt."""
        self.line(command)
        self.expect("\n")
        self.expect(text)
        self.expect("> ")

    def end(self) -> int:
        """Wait for the process; returns its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)

    def _read(self, deadline: float) -> bool:
        if not select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            return False
        self.seen += self.decode(data)
        return bool(data)


Start = Callable[..., Terminal]


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[Any]]:
    """The messages of the calls so far: (role, content)."""

    def read() -> list[Any]:
        lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
        return [[message["content"] for message in json.loads(line)] for line in lines]

    return read


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")
    other = ("HF_", "HUGGINGFACE_", "PYTHONWARNINGS", "COLUMNS", "LINES", "TQDM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return kept | {
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
        "INPUTRC": str(tmp_path / "inputrc"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "FAKE_LOG": str(tmp_path / "log"),
        "HF_HOME": str(tmp_path / "hf"),
    }


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    terminals: list[Terminal] = []
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    def start(*arguments: str, **options: Any) -> Terminal:
        terminals.append(Terminal(["chat", str(tmp_path / "m.gguf"), *arguments], environment, **options))
        terminals[-1].expect("Ctrl-D leaves")
        terminals[-1].expect("> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_dialogue(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start("--system", "be brief")
    chat.answer("hello")
    chat.line("")  # nothing is no message
    chat.expect("> ")
    chat.answer("and äöü 你好")
    chat.send(CTRL_D)
    assert chat.end() == 0
    assert log() == [["be brief", "hello"], ["be brief", "hello", "echo: hello", "and äöü 你好"]]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start()
    chat.line("count")
    chat.expect("0 1 2 3 ")
    chat.send(CTRL_C)
    chat.expect("(stopped)")
    chat.expect("> ")
    chat.answer("go on")
    chat.line("/exit")
    assert chat.end() == 0
    user, partial, again = log()[1]
    assert (user, again) == ("count", "go on") and partial.startswith("0 1 2 3 ")
    assert partial.strip() in ESCAPES.sub("", chat.seen)  # what was kept is what was shown


def test_ctrl_c_in_a_prefill_takes_the_message_back(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start()
    chat.answer("hello")
    chat.line("think")
    while len(log()) < 2:
        time.sleep(0.01)
    chat.send(CTRL_C)
    chat.expect("(stopped)")
    chat.expect("> ")
    chat.answer("next")
    assert log()[2] == ["hello", "echo: hello", "next"]


def test_ctrl_c_at_the_prompt_drops_the_line(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start()
    chat.send("half a li")
    chat.expect("half a li")
    chat.press(CTRL_C, "/exit leaves")
    chat.expect("> ")
    chat.answer("whole")
    assert log() == [["whole"]]


def test_many_lines(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start()
    for text in ("one\\", "two\\", "three"):
        chat.line(text)
    chat.expect("echo: one two three")
    chat.expect("> ")
    for text in ('"""four', "", "  five \\", '/help"""'):
        chat.line(text)
    chat.expect("echo: four five \\ /help")
    chat.expect("> ")
    chat.line('"""six')
    chat.expect(". ")
    chat.press(CTRL_C, "/exit leaves")
    chat.expect("> ")
    chat.line("seven\\")
    chat.expect(". ")
    chat.press(CTRL_D, "/exit leaves")
    assert [messages[-1] for messages in log()] == ["one\ntwo\nthree", "four\n\n  five \\\n/help"]


def test_editing_and_history(start: Start, log: Callable[[], list[Any]], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    chat = start()
    chat.send("helo")
    chat.send("\x1b[Dl\r")  # left arrow: between l and o
    chat.expect("echo: hello\n")
    chat.expect("> ")
    chat.send(UP + "\r")
    chat.expect("echo: hello\n")
    chat.line("/exit")
    assert chat.end() == 0
    again = start()
    again.send(UP + UP + "\r")
    again.expect("echo: hello\n")
    assert [messages[-1] for messages in log()] == ["hello"] * 3
    history = tmp_path / "state" / "smolrun" / "history"
    assert history.stat().st_mode & 0o077 == 0


def test_history_that_cannot_be_written_is_no_error(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment["XDG_STATE_HOME"] = str(tmp_path / "file")
    chat = start()
    chat.answer("hello")
    chat.send(CTRL_D)
    assert chat.end() == 0 and "Error" not in chat.seen


def test_commands(start: Start, log: Callable[[], list[Any]], tmp_path: Path) -> None:
    chat = start()
    chat.note("/help", "/regen")
    chat.note("/undo", "error: nothing was said yet")
    chat.note("/system", "system: (that of the model)")
    chat.note("/system be kind", "system: be kind")
    chat.answer("one")
    chat.answer("two")
    chat.note("/undo", "(took back: two)")
    chat.answer("three")
    chat.line("/regen")
    chat.expect("echo: three\n")
    chat.expect("> ")
    chat.note(f"/save {tmp_path / 'saved.json'}", "(5 messages in ")
    chat.note("/reset", "(a new dialogue)")
    chat.answer("four")
    chat.note("/system be brief", "system: be brief")
    chat.note(f"/load {tmp_path / 'saved.json'}", "(5 messages from ")
    chat.answer("five")
    kind = ["be kind", "one", "echo: one"]
    assert log() == [
        kind[:2],
        [*kind, "two"],
        [*kind, "three"],
        [*kind, "three"],
        ["be kind", "four"],
        [*kind, "three", "echo: three", "five"],
    ]
    assert [message["role"] for message in json.loads((tmp_path / "saved.json").read_text())] == [
        "system",
        *["user", "assistant"] * 2,
    ]
    chat.note("/nonsense", "no command /nonsense")
    chat.note("/run", "no command /run")
    chat.line("//etc is a folder")
    chat.expect("echo: /etc is a folder\n")
    chat.expect("> ")
    for damaged in ("{", "{}", '[{"role": "user"}]', '[{"role": "x", "content": "y"}]', '["text"]'):
        (tmp_path / "damaged.json").write_text(damaged)
        chat.note(f"/load {tmp_path / 'damaged.json'}", "a list of messages with role and content expected")
    chat.note("/load /nowhere/at/all", "error: ")
    chat.note("/save", "error: /save FILE")
    chat.line("/quit")
    assert chat.end() == 0


def test_settings(start: Start) -> None:
    chat = start("--seed", "5")
    chat.note("/set", "temperature 0.2")
    chat.note("/set temperature 0.75", "(temperature 0.75)")
    chat.note("/set max-tokens 12", "(max_tokens 12)")
    chat.note("/set ignore_eos yes", "(ignore_eos True)")
    chat.note("/set stop END STOP", "(stop ('END', 'STOP'))")
    chat.line("/set")
    shown = chat.expect("stop ('END', 'STOP')")
    assert all(line in shown for line in ("temperature 0.75\n", "seed 5\n", "max_tokens 12\n", "ignore_eos True\n"))
    chat.note("/set temperature -1", "error: ")
    chat.note("/set top_k many", "error: top_k: 'many' is not a valid integer")
    chat.note("/set colour red", "error: no setting 'colour'")
    chat.note("/set temperature", "(temperature its default)")
    chat.note("/set", "temperature 0.2")


def test_an_error_keeps_the_chat(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start()
    chat.answer("hello")
    chat.note("refuse", "error: the template refuses")
    chat.line("silent")
    chat.expect("> ")
    chat.answer("next")
    assert log()[-1] == ["hello", "echo: hello", "next"]


def test_full_context_offers_to_forget(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start("--context", "16", "--system", "s")
    chat.answer("a b")  # 6 of 16 words with its answer
    chat.answer("c d")
    chat.line("e f g h i")
    chat.expect("(the context is full: ")
    chat.expect("[Y/n] ")
    chat.line("n")
    chat.expect("error: ")
    chat.expect("> ")
    chat.line("e f g h i")
    chat.expect("[Y/n] ")
    chat.line("")
    chat.expect("(forgot the 2 oldest of 3 turns)")
    chat.expect("echo: e f g h i\n")
    chat.expect("> ")
    assert log()[-1] == ["s", "e f g h i"]
    chat.answer("j")
    chat.line("k " + "l " * 30)  # longer than the context: forgetting does not help, and nothing is lost
    chat.expect("[Y/n] ")
    chat.line("y")
    chat.expect("error: ")
    chat.expect("> ")
    chat.line("/undo")
    chat.expect("(took back: j)")


def test_answer_that_fills_the_context(start: Start, log: Callable[[], list[Any]]) -> None:
    chat = start("--context", "9")
    chat.answer("a b")
    chat.line("c d")
    chat.expect("echo: c\n")
    chat.expect("(the context is full: the answer ends here)")
    chat.expect("[Y/n] ")
    chat.line("y")
    chat.expect("(forgot the 1 oldest of 2 turns)")
    chat.expect("echo: c d\n")
    chat.expect("> ")
    assert log()[-1] == ["c d"]


def test_speeds_only_with_v(start: Start) -> None:
    quiet = start()
    quiet.answer("hi")
    assert "tok/s" not in quiet.seen
    chat = start("-v")
    chat.line("hi")
    chat.expect("[prompt 9 tokens, 4 cached, 10 tok/s, first token 0.25 s; answer 12 tok/s; stop; seed 7]")


def test_answers_alone_go_to_a_redirected_stdout(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        chat = start(stdout=out.fileno())
    chat.line("hello")
    chat.expect("> ")
    chat.note("/reset", "(a new dialogue)")
    chat.send(CTRL_D)
    assert chat.end() == 0
    assert (tmp_path / "out").read_text() == "echo: hello\n"


def test_rm_asks_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").write_bytes(b"GGUF")
    for reply, code in (("n", 130), ("y", 0)):
        terminal = Terminal(["rm", "a/b"], environment | {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub")})
        terminal.expect("delete a/b from the Hub cache?")
        terminal.line(reply)
        assert terminal.end() == code
        terminal.close()
        assert snapshot.exists() == (reply == "n")


def test_pull_shows_a_bar_for_large_files_only(environment: dict[str, str]) -> None:
    files = dict.fromkeys(("config.json", "tokenizer.json", "tokenizer_config.json"), b"{}")
    with FakeHub({"a/b": files | {"model.safetensors": bytes(12_000_000)}}) as hub:
        terminal = Terminal(["pull", "a/b"], environment | {"HF_ENDPOINT": hub.url, "NO_PROXY": "*"})
        assert terminal.end() == 0
        terminal.close()
    assert "model.safetensors: 100%" in terminal.seen and "config.json" not in terminal.seen
