"""The C interface (smolrun.h): open a model, append ids, take logits, without Python. Linux and Android.

    open      map program and weights, check them, lay out one anonymous mapping, copy the tables into it, start threads
    append    ids -> a segment in the argument block -> `forward` by chunks, `classify` for the last -> logits, best id
    free      end the threads, unmap

These functions are compiled like kernels, but for the plainest CPU of an architecture: `smolrun_open` must be able to
say that the CPU lacks a tier's instructions. They call libc by name, and the tier's kernels by address, which
`smolrun_symbol` knows, a function made for each library. Nothing is global: a handle holds everything, and its memory
is touched as it fills.

    handle    H words | the team's words (block.T) | a record of 64 bytes a thread: handle, tid, pthread_t, -, sem_t
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from .block import LINE, MAX_THREADS, PAGE, SPAN, TEAM_BYTES, B, S, T, words
from .jit import TIER, kernel
from .program import ABI, BASE, BASE_BITS, BLOCK, ERRORS, MAGIC, NAME_BYTES, E, K, P, symbol_id
from .program import PROGRAM as PROGRAM_NAME
from .simd import (
    I8,
    I32,
    I64,
    atomic_get,
    atomic_swap,
    declare,
    f32,
    get_f32,
    get_i64,
    i64,
    load,
    put_f32,
    put_i64,
    void,
    word,
)
from .target import Tier, token_tile
from .team import team_rouse, team_run, worker_loop

H = words(
    "program program_bytes weights weights_bytes memory memory_bytes block forward classify context length threads "
    "started closing id"
)
TEAM = -(-8 * H.size // LINE) * LINE
RECORDS = TEAM + TEAM_BYTES
R = words("handle tid thread unused semaphore")  # a sem_t is 32 bytes (glibc, musl) or 16 (bionic)
RECORD = LINE
HANDLE_BYTES = RECORDS + RECORD * MAX_THREADS

MESSAGES = ["no error", *ERRORS.values(), "no known error"]
UNKNOWN = 1 - len(MESSAGES)
MESSAGE = 80  # bytes of one

# ---- what is called ------------------------------------------------------------------------------------------------


def extern(name: str) -> str:
    """A name for the linker to resolve. Numba links what it compiles, too, and would look for it in this process."""
    llvm.add_symbol(name, 1)
    return name


def libc(name: str, arguments: int, result: ir.Type = I32) -> Any:
    """A function of libc of integers and addresses; an int (I32) is widened."""

    def emit(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        found = b.call(declare(b, extern(name), result, [I64] * arguments), values)
        return b.sext(found, I64) if result is I32 else found

    return word(i64, [i64] * arguments, emit)


def address_of(name: str) -> Any:
    """The address of a C function."""
    return word(i64, [], lambda b: b.ptrtoint(declare(b, extern(name), ir.VoidType(), []), I64))


def text(name: str, content: bytes) -> Any:
    """The address of constant bytes."""

    def emit(b: ir.IRBuilder) -> ir.Value:
        return b.ptrtoint(cgutils.global_constant(b, name, cgutils.make_bytearray(content)), I64)

    return word(i64, [], emit)


c_open, c_openat, c_close = libc("open", 2), libc("openat", 3), libc("close", 1)
c_lseek, c_mmap, c_munmap = libc("lseek", 3, I64), libc("mmap", 6, I64), libc("munmap", 2)
c_start, c_join = libc("pthread_create", 4), libc("pthread_join", 2)
c_sem_init, c_sem_post, c_sem_wait = libc("sem_init", 3), libc("sem_post", 1), libc("sem_wait", 1)
sched_yield, worker = address_of("sched_yield"), address_of("smolrun_worker")
symbol = word(i64, [i64], lambda b, id: b.call(declare(b, extern("smolrun_symbol"), I64, [I64]), [id]))
program_name = text("program_name", PROGRAM_NAME.encode() + b"\0")
messages = text("messages", b"".join(m.encode().ljust(MESSAGE, b"\0") for m in MESSAGES))
get_u8 = word(i64, [i64], lambda b, p: b.zext(load(b, p, I8), I64))
get_u32 = word(i64, [i64], lambda b, p: b.zext(load(b, p, I32), I64))

# Numbers of Linux that are the same on x86-64 and AArch64 (O_DIRECTORY is not)
CLOSE_ON_EXEC = 0o2000000
READ, WRITE, SHARED, PRIVATE, ANONYMOUS, NO_RESERVE = 1, 2, 1, 2, 0x20, 0x4000
END = 2  # of lseek
LARGEST = 3.4028235e38  # f32

rouse, run_team, serve = kernel(team_rouse), kernel(team_run), kernel(worker_loop)


# ---- which CPU -----------------------------------------------------------------------------------------------------

# Where a CPU says that it has an LLVM feature: (word of `cpu_word`, bit). What is part of an architecture is not here.
_X86 = {
    "sse3": (0, 0),
    "ssse3": (0, 9),
    "fma": (0, 12),
    "cx16": (0, 13),
    "sse4.1": (0, 19),
    "sse4.2": (0, 20),
    "movbe": (0, 22),
    "popcnt": (0, 23),
    "xsave": (0, 26),
    "avx": (0, 28),
    "f16c": (0, 29),
    "bmi": (1, 3),
    "avx2": (1, 5),
    "bmi2": (1, 8),
    "avx512f": (1, 16),
    "avx512dq": (1, 17),
    "avx512cd": (1, 28),
    "avx512bw": (1, 30),
    "avx512vl": (1, 31),
    "avx512vnni": (2, 11),
    "avx512vp2intersect": (3, 8),
    "avxvnni": (4, 4),
    "sahf": (5, 0),
    "lzcnt": (5, 5),
}
_ARM = {"neon": (0, 1), "dotprod": (0, 20), "i8mm": (1, 13)}
CPU_WORDS = 7
NEEDS = tuple(symbol_id(f"cpu_{i}") for i in range(CPU_WORDS))
OSXSAVE, XMM_YMM, ZMM = 27, 0b110, 0b11100000  # the system lets programs see, and saves, registers of these kinds


def needs(tier: Tier) -> list[int]:
    """The bits that each word must have for a tier."""
    found = [0] * CPU_WORDS
    for feature in set(tier.needs) - {"sse", "sse2"}:
        word, bit = (_X86 if tier.x86 else _ARM)[feature]
        found[word] |= 1 << bit
    if "avx" in tier.needs:
        found[0] |= 1 << OSXSAVE
        found[6] = XMM_YMM | (ZMM if "avx512f" in tier.needs else 0)
    return found


def _cpuid(leaf: int, sub: int, register: int) -> Any:
    """A word of x86's CPUID: eax, ebx, ecx, edx."""
    kind = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I32, I32])
    code = ir.InlineAsm(kind, "cpuid", "={ax},={bx},={cx},={dx},{ax},{cx}", side_effect=True)
    arguments = [ir.Constant(I32, leaf), ir.Constant(I32, sub)]
    return word(i64, [], lambda b: b.zext(b.extract_value(b.call(code, arguments), register), I64))


def _saved(b: ir.IRBuilder) -> ir.Value:
    """Which registers the system saves: x86's extended control register 0, low half."""
    kind = ir.FunctionType(ir.LiteralStructType([I32] * 2), [I32])
    code = ir.InlineAsm(kind, "xgetbv", "={ax},={dx},{cx}", side_effect=True)
    return b.zext(b.extract_value(b.call(code, [ir.Constant(I32, 0)]), 0), I64)


if TIER.x86:
    llvm.initialize_native_asmparser()
    cpuid_1, cpuid_7b, cpuid_7c, cpuid_7d = _cpuid(1, 0, 2), _cpuid(7, 0, 1), _cpuid(7, 0, 2), _cpuid(7, 0, 3)
    cpuid_71, cpuid_e1, saved = _cpuid(7, 1, 0), _cpuid(0x80000001, 0, 2), word(i64, [], _saved)

    @kernel
    def cpu_word(i):  # type: ignore[no-untyped-def]
        """A word of what this CPU says; the last one may be asked for if it has OSXSAVE."""
        if i < 2:
            return cpuid_1() if i == 0 else cpuid_7b()
        if i < 4:
            return cpuid_7c() if i == 2 else cpuid_7d()
        if i < 6:
            return cpuid_71() if i == 4 else cpuid_e1()
        return saved()
else:
    c_getauxval = libc("getauxval", 1, I64)

    @kernel
    def cpu_word(i):  # type: ignore[no-untyped-def]
        """A word of what the kernel says of it: AT_HWCAP, AT_HWCAP2."""
        return c_getauxval(16 if i == 0 else 26)


@kernel
def lacks_instructions():  # type: ignore[no-untyped-def]
    """1 if this CPU cannot run the library's tier."""
    for i in range(CPU_WORDS):
        bits = symbol(NEEDS[i])
        if bits and (cpu_word(i) & bits) != bits:
            return 1
    return 0


# ---- a library -----------------------------------------------------------------------------------------------------


def make_symbol(names: Sequence[str]) -> Callable[[int], int]:
    """smolrun_symbol(id): the address of an entry point of this library, or a number of its tier; 0 for no other."""
    numbers = {"tile_f32": token_tile(TIER, 0), "tile_1": token_tile(TIER, 1), "tile_2": token_tile(TIER, 2)}
    numbers |= {f"cpu_{i}": bits for i, bits in enumerate(needs(TIER))}

    def emit(b: ir.IRBuilder, id: ir.Value) -> ir.Value:
        found = ir.Constant(I64, 0)
        values = {name: ir.Constant(I64, n) for name, n in numbers.items()}
        values |= {name: b.ptrtoint(declare(b, extern(name), ir.VoidType(), []), I64) for name in names}
        for name, value in values.items():
            found = b.select(b.icmp_signed("==", id, ir.Constant(I64, symbol_id(name))), value, found)
        return found

    look_up = word(i64, [i64], emit)

    def smolrun_symbol(id):  # type: ignore[no-untyped-def]
        return look_up(id)

    return smolrun_symbol


# ---- open and free -------------------------------------------------------------------------------------------------


@kernel
def rounded(size):  # type: ignore[no-untyped-def]
    """Bytes up to the next cache line."""
    return (size + LINE - 1) // LINE * LINE


@kernel
def total(first, size):  # type: ignore[no-untyped-def]
    """Sum of the 64-bit words, modulo 2^64."""
    found = 0
    for i in range(0, size, 8):
        found += get_i64(first + i)
    return found


@kernel
def anonymous(size):  # type: ignore[no-untyped-def]
    """Zeros, a page at a time when they are touched; 0 if there is no room."""
    found = c_mmap(0, size, READ | WRITE, PRIVATE | ANONYMOUS | NO_RESERVE, -1, 0)
    return 0 if found == -1 else found


@kernel
def map_file(folder, name, out):  # type: ignore[no-untyped-def]
    """Map a whole file: its address and its bytes go to `out`."""
    file = c_openat(folder, name, CLOSE_ON_EXEC)
    if file < 0:
        return E.FILE
    size = c_lseek(file, 0, END)
    first = c_mmap(0, size, READ, SHARED, file, 0) if size > 0 else -1
    c_close(file)
    if first == -1:
        return E.FILE
    put_i64(out, first)
    put_i64(out + 8, size)
    return 0


@kernel
def map_model(h, path):  # type: ignore[no-untyped-def]
    """Program and weights, both checked."""
    folder = c_open(path, CLOSE_ON_EXEC)
    if folder < 0:
        return E.FILE
    code = map_file(folder, program_name(), h + H.program)
    p, size = get_i64(h + H.program), get_i64(h + H.program_bytes)
    if code == 0 and (size < 8 * P.size or size % 8 or get_i64(p + P.magic) != MAGIC):
        code = E.FORMAT
    if code == 0 and get_i64(p + P.abi) != ABI:
        code = E.VERSION
    if code == 0 and (get_i64(p + P.bytes) != size or total(p, size)):
        code = E.FORMAT
    if code == 0:
        code = map_file(folder, p + get_i64(p + P.weights), h + H.weights)
    c_close(folder)
    if code:
        return code
    w, size = get_i64(h + H.weights), get_i64(h + H.weights_bytes)
    if get_i64(p + P.weights_bytes) != size or total(w, size // 8 * 8) != get_i64(p + P.weights_sum):
        return E.WEIGHTS
    return 0


@kernel
def symbol_of(p, i):  # type: ignore[no-untyped-def]
    """The i-th name that the program uses of the library."""
    return get_i64(p + get_i64(p + P.symbols) + 8 * i)


@kernel
def address(h, value):  # type: ignore[no-untyped-def]
    """A word of the tables as kernels read it; a symbol that the library lacks is 0."""
    p = get_i64(h + H.program)
    base, offset = value >> BASE_BITS, value & ((1 << BASE_BITS) - 1)
    if base == BASE.weights:
        return get_i64(h + H.weights) + offset
    if base == BASE.program:
        return p + offset
    if base == BASE.tables:
        return get_i64(h + H.block) + offset
    if base == BASE.symbol:
        return symbol(symbol_of(p, offset))
    return value


@kernel
def kind_of(p, name):  # type: ignore[no-untyped-def]
    """The row of a kind of KV cache; 0 if the program has none of this name, the first one for no name."""
    kinds = p + get_i64(p + P.kinds)
    for row in range(kinds, kinds + 8 * K.size * get_i64(p + P.n_kinds), 8 * K.size):
        if name == 0:
            return row
        for i in range(NAME_BYTES):
            if get_u8(name + i) != get_u8(row + i):
                break
            if get_u8(name + i) == 0:
                return row
    return 0


@kernel
def lay_out(h, p, kind, context, threads):  # type: ignore[no-untyped-def]
    """The tables and all buffers, in one mapping."""
    for i in range(get_i64(p + P.n_symbols)):
        if symbol(symbol_of(p, i)) == 0:
            return E.LIBRARY
    n_tables, buffers, n_buffers = get_i64(p + P.n_tables), p + get_i64(p + P.buffers), get_i64(p + P.n_buffers)
    spans = (context + SPAN - 1) // SPAN
    page = get_i64(kind + K.page_bytes)
    size = rounded(8 * n_tables) + spans * (SPAN // PAGE) * page
    for i in range(n_buffers):
        row = buffers + 32 * i
        size += rounded(get_i64(row + 8) + threads * get_i64(row + 16) + spans * get_i64(row + 24))
    block = anonymous(size)
    if block == 0:
        return E.MEMORY
    put_i64(h + H.memory, block)
    put_i64(h + H.memory_bytes, size)
    put_i64(h + H.block, block)
    for i in range(n_tables):
        put_i64(block + 8 * i, address(h, get_i64(p + get_i64(p + P.tables) + 8 * i)))
    first = block + rounded(8 * n_tables)
    for i in range(n_buffers):
        row = buffers + 32 * i
        put_i64(block + get_i64(row), first)
        first += rounded(get_i64(row + 8) + threads * get_i64(row + 16) + spans * get_i64(row + 24))
    table = get_i64(block + BLOCK.table)
    for i in range((context + PAGE - 1) // PAGE):
        put_i64(table + 8 * i, first + i * page)
    put_i64(block + B.head_bytes, get_i64(kind + K.head_bytes))
    put_i64(block + B.layer_bytes, get_i64(kind + K.layer_bytes))
    put_i64(block + B.value_offset, get_i64(kind + K.value_offset))
    put_i64(h + H.forward, symbol(symbol_of(p, get_i64(kind + K.forward))))
    put_i64(h + H.classify, symbol(symbol_of(p, 0)))
    segment = get_i64(block + B.segments)
    put_i64(segment + S.pages, table)
    put_i64(segment + S.parts, get_i64(block + B.parts))
    put_i64(block + B.n_segments, 1)
    put_i64(block + B.threads, threads)
    put_i64(block + B.team, h + TEAM)
    return 0


@kernel
def start(h, threads):  # type: ignore[no-untyped-def]
    """The team: the caller's thread, and threads - 1 workers."""
    put_i64(h + H.threads, threads)
    put_i64(h + TEAM + T.threads, threads)
    put_i64(h + TEAM + T.give_way, sched_yield())
    for tid in range(1, threads):
        record = h + RECORDS + tid * RECORD
        put_i64(record + R.handle, h)
        put_i64(record + R.tid, tid)
        c_sem_init(record + R.semaphore, 0, 0)
        if c_start(record + R.thread, 0, worker(), record):
            return E.THREADS
        put_i64(h + H.started, tid)
    return 0


def smolrun_worker(record):  # type: ignore[no-untyped-def]
    """A worker: runs passes, and sleeps when none has come for a while."""
    h, tid, seen = get_i64(record + R.handle), get_i64(record + R.tid), 0
    while True:
        seen = serve(h + TEAM, tid, seen)
        while c_sem_wait(record + R.semaphore):  # a signal came
            pass
        atomic_swap(h + TEAM + T.asleep + tid * LINE, 0)
        if atomic_get(h + H.closing):
            return 0


@kernel
def wake(h):  # type: ignore[no-untyped-def]
    """Let sleeping workers go on. One that is woken once more than it slept finds nothing, and sleeps again."""
    for tid in range(1, get_i64(h + H.started) + 1):
        if atomic_swap(h + TEAM + T.asleep + tid * LINE, 0):
            c_sem_post(h + RECORDS + tid * RECORD + R.semaphore)


@kernel
def release(h):  # type: ignore[no-untyped-def]
    """End the threads, and give back all memory."""
    atomic_swap(h + H.closing, 1)
    for tid in range(1, get_i64(h + H.started) + 1):
        record = h + RECORDS + tid * RECORD
        c_sem_post(record + R.semaphore)
        c_join(get_i64(record + R.thread), 0)
    for part in (H.program, H.weights, H.memory):
        if get_i64(h + part):
            c_munmap(get_i64(h + part), get_i64(h + part + 8))
    c_munmap(h, HANDLE_BYTES)


def smolrun_open(path, kv, context, threads, out):  # type: ignore[no-untyped-def]
    """A handle for the model in a folder goes to `out`."""
    if out == 0:
        return E.ARGUMENT
    put_i64(out, 0)
    if path == 0 or context < 0 or threads < 1 or threads > MAX_THREADS:
        return E.ARGUMENT
    if lacks_instructions():
        return E.CPU
    h = anonymous(HANDLE_BYTES)
    if h == 0:
        return E.MEMORY
    code = map_model(h, path)
    p = get_i64(h + H.program)
    if code == 0:
        most = get_i64(p + P.positions)
        context = most if context == 0 else context
        put_i64(h + H.context, context)
        kind = kind_of(p, kv)
        code = lay_out(h, p, kind, context, threads) if kind and context <= most else E.ARGUMENT
    if code == 0:
        code = start(h, threads)
    if code:
        release(h)
        return code
    put_i64(out, h)
    return 0


def smolrun_free(h):  # type: ignore[no-untyped-def]
    """End a handle; 0 is none."""
    if h:
        release(h)


# ---- ids in, logits out --------------------------------------------------------------------------------------------


@kernel
def run(h, job):  # type: ignore[no-untyped-def]
    """A pass; nonzero when it was cancelled."""
    team, block = h + TEAM, get_i64(h + H.block)
    counters = get_i64(block + B.counters)
    for i in range(0, get_i64(block + BLOCK.counters_bytes), 8):
        put_i64(counters + i, 0)
    if get_i64(h + H.threads) > 1 and rouse(team, 0, 0):
        wake(h)
    run_team(team, job, block)
    atomic_swap(team + T.awake, 0)
    return atomic_swap(team + T.cancel, 0)


@kernel
def best(h, logits):  # type: ignore[no-untyped-def]
    """The id of the largest logit, the first of equals; copies them all, unless `logits` is 0."""
    block, n = get_i64(h + H.block), get_i64(get_i64(h + H.program) + P.vocab_size)
    row = get_i64(block + B.logits)
    found, top, finite = 0, get_f32(row), 0
    for i in range(n):
        value = get_f32(row + 4 * i)
        finite += abs(value) <= f32(LARGEST)
        if value > top:
            found, top = i, value
        if logits:
            put_f32(logits + 4 * i, value)
    return found if finite == n else E.LOGITS


@kernel
def append(h, ids, n, logits):  # type: ignore[no-untyped-def]
    """Append n ids, int32 each; the best next one, and logits as `best` has them."""
    if h == 0 or ids == 0 or n < 1:
        return E.ARGUMENT
    p, block, length = get_i64(h + H.program), get_i64(h + H.block), get_i64(h + H.length)
    if n > get_i64(h + H.context) - length:
        return E.CONTEXT
    for i in range(n):
        if get_u32(ids + 4 * i) >= get_i64(p + P.vocab_size):
            return E.ID
    chunk, segment, count = get_i64(p + P.chunk), get_i64(block + B.segments), 0
    for first in range(0, n, chunk):
        count = min(chunk, n - first)
        for i in range(count):
            put_i64(get_i64(block + B.ids) + 8 * i, get_u32(ids + 4 * (first + i)))
        put_i64(segment + S.count, count)
        put_i64(segment + S.start, length + first)
        put_i64(block + B.n, count)
        put_i64(block + B.rows, 1 if first + count == n else 0)  # the last row alone
        if run(h, get_i64(h + H.forward)):
            return E.CANCELLED
    put_i64(block + B.n, 1)
    cancelled = run(h, get_i64(h + H.classify))
    found = E.CANCELLED if cancelled else best(h, logits)
    if found >= 0:
        put_i64(h + H.length, length + n)
    return found


def smolrun_prefill(h, ids, n, logits):  # type: ignore[no-untyped-def]
    """The best id after n more ids."""
    return append(h, ids, n, logits)


def smolrun_decode(h, id, logits):  # type: ignore[no-untyped-def]
    """The best id after one more id."""
    if h == 0:
        return E.ARGUMENT
    if id < 0 or id >= get_i64(get_i64(h + H.program) + P.vocab_size):
        return E.ID
    put_i64(h + H.id, id)
    return append(h, h + H.id, 1, logits)


def smolrun_truncate(h, n):  # type: ignore[no-untyped-def]
    """Forget all positions from n on."""
    if h == 0 or n < 0 or n > get_i64(h + H.length):
        return E.ARGUMENT
    put_i64(h + H.length, n)
    return 0


def smolrun_cancel(h):  # type: ignore[no-untyped-def]
    """Make the call that runs, or the next one, end with CANCELLED."""
    if h:
        atomic_swap(h + TEAM + T.cancel, 1)


# ---- facts ---------------------------------------------------------------------------------------------------------


def smolrun_get(h, what):  # type: ignore[no-untyped-def]
    """A number of smolrun.h's enum."""
    if h == 0 or what < 0 or what > 3:
        return E.ARGUMENT
    if what == 0:
        return get_i64(get_i64(h + H.program) + P.vocab_size)
    return get_i64(h + (H.context if what == 1 else H.length if what == 2 else H.threads))


def smolrun_ends(h, id):  # type: ignore[no-untyped-def]
    """1 for an id that ends an answer."""
    if h == 0:
        return E.ARGUMENT
    p = get_i64(h + H.program)
    for i in range(get_i64(p + P.n_ends)):
        if get_i64(p + get_i64(p + P.ends) + 8 * i) == id:
            return 1
    return 0


def smolrun_text(h, id, length):  # type: ignore[no-untyped-def]
    """The address of an id's bytes; how many goes to `length`. 0 for an id that is none."""
    if h == 0 or length == 0 or id < 0 or id >= get_i64(get_i64(h + H.program) + P.vocab_size):
        return 0
    p = get_i64(h + H.program)
    first = p + get_i64(p + P.text)
    put_i64(length, get_u32(first + 4 * (id + 1)) - get_u32(first + 4 * id))
    return first + get_u32(first + 4 * id)


def smolrun_abi_version(_):  # type: ignore[no-untyped-def]
    """ABI of this library. jit.py makes no function without arguments; C passes none, and none is read."""
    return ABI


def smolrun_strerror(code):  # type: ignore[no-untyped-def]
    """The address of a message."""
    return messages() - MESSAGE * (code if code <= 0 and code > UNKNOWN else UNKNOWN)


def function(symbol: str) -> tuple[Callable[..., Any], Any]:
    """(function, signature) of a C symbol of API, or of smolrun_worker."""
    found = globals()[symbol]
    return found, (void if found in (smolrun_free, smolrun_cancel) else i64)(*[i64] * found.__code__.co_argcount)
