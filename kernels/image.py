"""Images: code that runs wherever it is mapped. The compiling child turns an object into one; a start maps the file.

    object   .text  .rodata  .rodata.cst4 ...  symbols  relocations         ELF, from LLVM
    image    [.text][.rodata][.rodata.cst4]
    file     image | JSON {"key": what it was made from, "symbols": {name: offset}} | its length, u32 | SHA-256 of all

An image begins on a page and every distance in it is fixed, so every relocation is applied when it is made. One that is
no distance (an absolute address, a table of addresses, a symbol from elsewhere) is an error: the kernels have none.
Sources: System V ABI, chapter 4, and its supplements for x86-64 and AArch64.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096  # what AArch64's ADRP counts in; pages of any system are multiples
X86_64, AARCH64 = 62, 183  # e_machine
PROGBITS, SYMTAB, RELA = 1, 2, 4  # sh_type
WRITE, ALLOC = 1, 2  # sh_flags
UNWIND = ".eh_frame"  # for exceptions; no kernel raises one
LENGTH = struct.Struct("<I")
HASH = 32


class ImageError(ValueError):
    """An object that is no position-independent whole, or a file that is no sound image."""


# ---- relocations -----------------------------------------------------------------------------------------------------

Patch = Callable[[int, int, int], int]  # (word, target, place) -> word; target and place are offsets in the image


def _distance(bits: int, shift: int = 0, at: int = 0) -> Patch:
    """target - place in steps of 2^shift, as a field of `bits` bits from bit `at` of the word."""
    mask = (1 << bits) - 1

    def patch(word: int, target: int, place: int) -> int:
        steps, rest = divmod(target - place, 1 << shift)
        if rest or not -(mask + 1) // 2 <= steps <= mask // 2:
            raise ImageError(f"a distance of {target - place:,} does not fit {bits} bits")
        return word & ~(mask << at) | (steps & mask) << at

    return patch


def _page_distance(word: int, target: int, place: int) -> int:
    """ADRP: pages from one to the other; two low bits at 29, 19 high ones at 5."""
    pages = target // PAGE - place // PAGE
    return word & 0x9F00001F | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5


def _in_page(shift: int) -> Patch:
    """ADD, loads and stores: where the target stands in its page, in units of 2^shift bytes; 12 bits at 10."""

    def patch(word: int, target: int, _: int) -> int:
        if target % (1 << shift):
            raise ImageError(f"a load of {1 << shift} bytes at offset {target:,}")
        return word & ~(0xFFF << 10) | (target % PAGE >> shift) << 10

    return patch


PATCHES: dict[int, dict[int, tuple[str, Patch]]] = {  # machine -> relocation type -> (kind of word, patch)
    X86_64: {
        2: ("<I", _distance(32)),  # R_X86_64_PC32
        4: ("<I", _distance(32)),  # R_X86_64_PLT32, a call
        24: ("<Q", _distance(64)),  # R_X86_64_PC64
    },
    AARCH64: {
        260: ("<Q", _distance(64)),  # R_AARCH64_PREL64
        261: ("<I", _distance(32)),  # R_AARCH64_PREL32
        275: ("<I", _page_distance),  # R_AARCH64_ADR_PREL_PG_HI21
        277: ("<I", _in_page(0)),  # R_AARCH64_ADD_ABS_LO12_NC
        278: ("<I", _in_page(0)),  # R_AARCH64_LDST8_ABS_LO12_NC
        279: ("<I", _distance(14, 2, 5)),  # R_AARCH64_TSTBR14
        280: ("<I", _distance(19, 2, 5)),  # R_AARCH64_CONDBR19
        282: ("<I", _distance(26, 2)),  # R_AARCH64_JUMP26
        283: ("<I", _distance(26, 2)),  # R_AARCH64_CALL26
        284: ("<I", _in_page(1)),  # R_AARCH64_LDST16_ABS_LO12_NC
        285: ("<I", _in_page(2)),  # R_AARCH64_LDST32_ABS_LO12_NC
        286: ("<I", _in_page(3)),  # R_AARCH64_LDST64_ABS_LO12_NC
        299: ("<I", _in_page(4)),  # R_AARCH64_LDST128_ABS_LO12_NC
    },
}


# ---- making ----------------------------------------------------------------------------------------------------------


def link(elf: bytes) -> tuple[bytes, dict[str, int]]:
    """A relocatable object -> its image, and the offsets of its global symbols.

    Raises:
        ImageError: data that could be written to, a symbol from elsewhere, or a relocation that is no distance.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ImageError("expected a 64-bit little-endian ELF object")
    (machine,), (table,) = struct.unpack_from("<H", elf, 18), struct.unpack_from("<Q", elf, 40)
    entry, count, names = struct.unpack_from("<HHH", elf, 58)
    # of each: name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + entry * i) for i in range(count)]

    def text(section: int, at: int) -> str:
        first = sections[section][4] + at
        return elf[first : elf.index(b"\0", first)].decode()

    def rows(layout: str, section: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [*struct.iter_unpack(layout, elf[section[4] : section[4] + section[5]])]

    image, placed = bytearray(), dict[int, int]()
    for i, (name, kind, flags, _, offset, size, _, _, alignment, _) in enumerate(sections):
        if not flags & ALLOC or not size or text(names, name) == UNWIND:
            continue
        if flags & WRITE or kind != PROGBITS:
            raise ImageError(f"section {text(names, name)}: kernels have no data of their own")
        image += bytes(-len(image) % max(alignment, 1))
        placed[i] = len(image)
        image += elf[offset : offset + size]

    known: list[tuple[str, int, int]] = []  # name, binding, offset; -1: not in the image
    for section in (s for s in sections if s[1] == SYMTAB):
        for name, info, _, home, value, _ in rows("<IBBHQQ", section):
            known.append((text(section[6], name), info >> 4, placed[home] + value if home in placed else -1))

    for _, kind, _, _, offset, size, _, patched, _, _ in sections:
        if patched not in placed or kind not in (RELA, 9):
            continue
        if kind != RELA:
            raise ImageError("expected relocations with addends")
        for where, info, addend in struct.iter_unpack("<QQq", elf[offset : offset + size]):
            name, _, target = known[info >> 32]
            if target < 0:
                raise ImageError(f"{name or 'a relocation'} is not in the object")
            if (relocation := info & 0xFFFFFFFF) not in PATCHES.get(machine, {}):
                raise ImageError(f"relocation {relocation} of machine {machine} for {name}: not a distance")
            layout, patch = PATCHES[machine][relocation]
            place = placed[patched] + where
            (word,) = struct.unpack_from(layout, image, place)
            struct.pack_into(layout, image, place, patch(word, target + addend, place))
    return bytes(image), {name: at for name, binding, at in known if binding and at >= 0}


def seal(image: bytes, symbols: dict[str, int], key: str) -> bytes:
    """The file of an image. key: what must be equal for it to run: sources, compiler, tier."""
    facts = json.dumps({"key": key, "symbols": symbols}).encode()
    content = image + facts + LENGTH.pack(len(facts))
    return content + hashlib.sha256(content).digest()


# ---- running ---------------------------------------------------------------------------------------------------------


def unseal(content: memoryview, key: str) -> dict[str, int]:
    """Symbols of an image's file, whose every byte is checked first.

    Raises:
        ImageError: damaged, or made for another key.
    """
    body = content[:-HASH]
    if len(content) <= HASH + LENGTH.size or hashlib.sha256(body).digest() != content[-HASH:]:
        raise ImageError("damaged or cut short")
    end = len(body) - LENGTH.size
    (length,) = LENGTH.unpack(body[end:])
    facts = json.loads(bytes(body[end - length : end]))
    if facts["key"] != key:
        raise ImageError(f"made for {facts['key']}, not {key}")
    symbols: dict[str, int] = facts["symbols"]
    return symbols


class Code:
    """An image in executable memory, for the life of this object.

    The file is mapped, read and execute: its pages are shared by all processes, and no page is ever writable and
    executable. Where the system executes no files (a noexec mount, SELinux, Windows) a copy is made, then protected.
    """

    def __init__(self, source: Path | bytes, key: str) -> None:
        """source: the path of a file made by `seal`, or its content.

        Raises:
            ImageError: damaged, or made for another key.
            OSError: the file cannot be read.
            MemoryError: the system allows no executable memory.
        """
        mapped = None if isinstance(source, bytes) else _map(source)
        content = mapped or (source if isinstance(source, bytes) else source.read_bytes())
        symbols = unseal(memoryview(content), key)
        base, self._memory = _protected(bytes(content)) if mapped is None else (_address(mapped), mapped)
        self.addresses = {name: base + offset for name, offset in symbols.items()}


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _map(path: Path) -> mmap.mmap | None:
    """The file, read and execute; None where that is not allowed."""
    if not hasattr(mmap, "PROT_EXEC"):
        return None
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        except (PermissionError, ValueError):  # ValueError: an empty file
            return None


def _protected(code: bytes) -> tuple[int, Any]:
    """A copy of code in memory that was writable and then is executable: (address, what keeps it)."""
    if sys.platform == "win32":
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.VirtualAlloc.restype = ctypes.c_void_p
        address = kernel32.VirtualAlloc(None, ctypes.c_size_t(len(code)), 0x3000, 0x04)  # reserve, commit; read-write
        if address:
            ctypes.memmove(address, code, len(code))
            area = ctypes.c_void_p(address), ctypes.c_size_t(len(code))
            done = kernel32.VirtualProtect(*area, 0x20, ctypes.byref(ctypes.c_ulong()))  # read, execute
            kernel32.FlushInstructionCache(ctypes.c_void_p(-1), *area)
            if done:
                return address, None  # lives as long as the process
        raise MemoryError(f"Windows allows no executable memory (error {ctypes.get_last_error()}): smolrun needs it")
    memory = mmap.mmap(-1, len(code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    memory[:] = code
    address = _address(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(code)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise MemoryError(
            f"the system allows no executable memory ({os.strerror(ctypes.get_errno())}), neither a mapped file nor "
            "a copy: set SMOLRUN_CACHE_DIR to a folder that is not mounted noexec, or let SELinux allow execmem"
        )
    if hasattr(libc, "sys_icache_invalidate"):  # macOS on ARM; Linux does it in mprotect
        libc.sys_icache_invalidate(ctypes.c_void_p(address), ctypes.c_size_t(len(code)))
    return address, memory
