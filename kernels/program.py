"""The program of a model: what the C interface (capi.py) must know of it, in one file that is mapped. No Numba here.

    head       P.size words                     numbers, and offsets in this file
    symbols    n_symbols words                  names of what the tables use of the library, as `symbol_id`
    kinds      n_kinds rows of K words          kinds of KV cache, the default first
    buffers    n_buffers rows of 4 words        word of BLOCK, then bytes, more a thread, more a span of SPAN positions
    tables     n_tables words                   BLOCK, the layers, two matrices: copied, addresses filled in
    ends       n_ends words                     ids that end an answer
    rope       f32 (positions, 2, 32)
    text       u32 (vocab_size + 1), bytes      where the bytes of each token begin, and all of them
    weights    bytes, 0                         name of the file of panels, in the same folder

A word of the tables is a number below 2^56, or what becomes an address: its base in the top byte, an offset below.
"""

from __future__ import annotations

import hashlib

from .block import B, constants, words

MAGIC = int.from_bytes(b"smolprog", "little")
ABI = 1  # of this layout and of smolrun.h
PROGRAM = "program.bin"  # its name in a bundle's folder
# The functions of smolrun.h, and what they take from the system's C library
_API = "open free prefill decode truncate cancel get ends text abi_version strerror"
API = [f"smolrun_{name}" for name in _API.split()]
LIBC = ["open", "openat", "close", "lseek", "mmap", "munmap", "getauxval", "sched_yield"]
LIBC += ["pthread_create", "pthread_join", "sem_init", "sem_post", "sem_wait"]
ERRORS = {  # -1, -2 ... in this order
    "ARGUMENT": "an argument is null or out of range",
    "FILE": "a file of the model cannot be opened or mapped",
    "FORMAT": "program.bin is damaged or no program",
    "VERSION": "program.bin is of another ABI than this library",
    "WEIGHTS": "the weights are damaged, or not those that program.bin belongs to",
    "LIBRARY": "this library was compiled for another model: it lacks a kernel",
    "CPU": "this CPU lacks instructions of this library: load the one of another tier",
    "MEMORY": "the system gives not enough memory: choose a smaller context",
    "THREADS": "the system starts no more threads",
    "CONTEXT": "the ids are more than the context holds",
    "ID": "an id is not in the vocabulary",
    "LOGITS": "the logits are not finite: the weights are damaged",
    "CANCELLED": "cancelled",
}
E = constants(**{name: -1 - i for i, name in enumerate(ERRORS)})

P = words(
    "magic abi bytes sum weights_bytes weights_sum vocab_size positions chunk "
    "n_symbols symbols n_kinds kinds n_buffers buffers n_tables tables n_ends ends rope text weights"
)
# One kind: its name (as smolrun.load has it, zeros behind), the index of forward's symbol, bytes of a page, words of B.
NAME_BYTES = 16
K = words("name more_name forward page_bytes head_bytes layer_bytes value_offset")
BLOCK = words(" ".join([*B._fields[:-1], "table", "counters_bytes"]))  # B, then the table of pages, ...

BASE_BITS = 56
BASE = constants(number=0, weights=1, program=2, tables=3, symbol=4)  # symbol: the offset is an index in `symbols`


def based(base: int, offset: int) -> int:
    """A word of the tables that becomes an address."""
    return base << BASE_BITS | offset


def symbol_id(name: str) -> int:
    """A name as one int64."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
