"""Which instructions the kernels may use: a tier is a named LLVM target, chosen from the features of the CPU at hand.

    avx512zen5   the next, AVX-VNNI and    vpdpbusd zmm        Zen 5, which multiplies two registers a cycle
                 AVX512-VP2INTERSECT
    avx512vnni   x86-64-v4 + AVX512-VNNI   vpdpbusd zmm        Ice Lake, Zen 4 and later
    avx512       x86-64-v4                 vpmaddubsw zmm      Skylake-X
    avxvnni      x86-64-v3 + AVX-VNNI      {vex} vpdpbusd ymm  Alder Lake and later, without AVX-512
    avx2         x86-64-v3                 vpmaddubsw ymm      Haswell, Zen 1 and later
    sse42        x86-64-v2                 pmaddubsw xmm       Nehalem, Goldmont, Bulldozer and later without AVX2
    generic      x86-64                    pmaddwd xmm         everything else
    i8mm         Armv8.6                   smmla, and sdot     Cortex-A510, A710, X2, Neoverse N2, Apple M2 and later
    dotprod      Armv8.4, or 8.2 with it   sdot by element     Cortex-A55, A75, A76 (Pi 5), Apple A13, M1
    neon         Armv8                     smull, sadalp       Cortex-A53 (Pi 3, Pi Zero 2), A72 (Pi 4)

A tier fixes CPU name and feature string, never "the host": an object compiled on one machine is the same on another,
and LLVM aborts the process on an intrinsic the target lacks, so the two must not be guessed apart. All tiers compute
the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
import sys
from dataclasses import dataclass
from typing import Any

# int8 activations of one term: with the 16 values of a crossed weight (unpack.py) they are still 256
LOWEST, HIGHEST = -127, 113

_V2 = "cx16,popcnt,sahf,sse,sse2,sse3,sse4.1,sse4.2,ssse3"
_V3 = "avx,avx2,bmi,bmi2,cx16,f16c,fma,lzcnt,movbe,popcnt,sahf,sse,sse2,sse3,sse4.1,sse4.2,ssse3,xsave"
_V4 = _V3 + ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"


@dataclass(frozen=True)
class Tier:
    """One kind of CPU.

    Attributes:
        name: the name printed, forced by `SMOLRUN_TIER`, and part of every cache key.
        machines: `platform.machine()` values it exists on; empty for all.
        cpu: LLVM CPU name.
        needs: LLVM features that must be there; also the feature string LLVM is given.
        dot: how four int8 products are summed, a key of dots.DOTS.
        half: f16 <-> f32 in hardware (F16C).
        tiles: tokens per prefill tile with activations of f32, one int8 term, two; so many sums fit the registers.
        row_lanes: f32 lanes of one register; only a hint for tile shapes, every tier computes with 16 logical lanes.
        lacks: LLVM features that `cpu` has and a CPU of this tier need not have.
        reorder: LLVM may move instructions before it assigns registers. Where the CPU reorders them itself, it spills
            for nothing: a tile of four tokens on a Neoverse N1 takes 124 cycles instead of 135 (llvm-mca), prefill of
            135M Q4_0 with AVX2 1.25 ms a token instead of 1.51. And it asks for all lines of a record at once: Q6_K in
            two terms, one token, reads 39 GB/s in order and 30 reordered on Zen 5.
        abreast: row groups that a full tile of int8 takes side by side: one load of an activation then serves them all.
            (Zen 5 loads 1.8 times a cycle, not 2: 14 tokens of one row group took 5.8 cycles a block and token, 6 of
            two 5.4; unpacked before (unpack.py) 5.1; its pipes allow 5.)
        crossed: of the four pairs of quads that a block of four-bit weights has, so many are multiplied crosswise
            (unpack.py).
        ahead: (tokens, bytes, level): a pass of so many tokens, up to 8, asks for its weights so many bytes before it
            needs them, into the cache of that level; to fewer tokens the hardware's own prefetch is better. (One token
            of Q4_K from memory, Zen 4: 29 GB/s, asked for 16; Zen 5: 21, asked for into L2 33, into L1 38.)
    """

    name: str
    machines: tuple[str, ...]
    cpu: str
    needs: tuple[str, ...]
    dot: str
    half: bool
    tiles: tuple[int, int, int]
    row_lanes: int
    lacks: tuple[str, ...] = ()
    reorder: bool = True
    abreast: int = 1
    crossed: int = 0
    ahead: tuple[int, int, int] = (3, 16384, 2)

    @property
    def x86(self) -> bool:
        """True for x86-64, False for AArch64."""
        return self.machines == _X86

    @property
    def fma(self) -> bool:
        """Fused multiply-add in hardware; where not, simd.py has its own and libm is not called."""
        return "fma" in self.needs or not self.x86

    @property
    def rounds(self) -> bool:
        """Rounding to integers in hardware."""
        return "sse4.1" in self.needs or not self.x86

    @property
    def pairs(self) -> bool:
        """Two int8 terms of an activation are one i16 (dots.PairDots)."""
        return self.dot in ("maddubs", "plain")

    @property
    def features(self) -> str:
        """The feature string for LLVM."""
        return ",".join(["+" + f for f in self.needs] + ["-" + f for f in self.lacks])


_X86 = ("x86_64", "AMD64", "amd64")
_ARM = ("aarch64", "arm64", "ARM64")


def _x86(
    name: str, cpu: str, needs: str, dot: str, half: bool, tiles: tuple[int, int, int], row_lanes: int, **more: Any
) -> Tier:
    return Tier(name, _X86, cpu, tuple(filter(None, needs.split(","))), dot, half, tiles, row_lanes, **more)


# fmt: off
TIERS: dict[str, Tier] = {  # best first
    t.name: t
    for t in (
        _x86(
            "avx512zen5", "x86-64-v4", _V4 + ",avx512vnni,avx512vp2intersect,avxvnni", "vnni512", True, (14, 6, 6),
            16, reorder=False, abreast=2, crossed=3, ahead=(1, 8192, 1),
        ),
        _x86("avx512vnni", "x86-64-v4", _V4 + ",avx512vnni", "vnni512", True, (14, 14, 11), 16),
        _x86("avx512", "x86-64-v4", _V4, "maddubs", True, (14, 12, 11), 16),
        _x86("avxvnni", "x86-64-v3", _V3 + ",avxvnni", "vnni256", True, (3, 3, 3), 8),
        _x86("avx2", "x86-64-v3", _V3, "maddubs", True, (3, 3, 4), 8, reorder=False),
        _x86("sse42", "x86-64-v2", _V2, "maddubs", False, (2, 4, 2), 4),
        _x86("generic", "x86-64", "", "plain", False, (2, 2, 2), 4),
        Tier("i8mm", _ARM, "generic", ("neon", "dotprod", "i8mm"), "smmla", True, (3, 4, 4), 4, reorder=False),
        Tier("dotprod", _ARM, "generic", ("neon", "dotprod"), "sdot", True, (3, 4, 4), 4, reorder=False),
        # timed for a CPU that runs instructions in order; the other ones of this tier care less
        Tier("neon", _ARM, "cortex-a53", ("neon",), "smull", True, (3, 2, 2), 4, lacks=("aes", "crc", "sha2")),
    )
}
# fmt: on


# Training's products of bf16, if asked for: bits of its own, so it is never chosen for anything else
BF16 = _x86("avx512bf16", "x86-64-v4", _V4 + ",avx512vnni,avx512bf16", "vnni512", True, (14, 14, 11), 16)
ALL_TIERS = TIERS | {BF16.name: BF16}

# Linux's names of LLVM's x86 features, where they differ. It lists a feature only if it also saves its registers.
_LINUX = {
    "avx512bf16": "avx512_bf16",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}


# AArch64's: bits of the auxiliary vector on Linux and Android, names on macOS, where NEON is part of the architecture.
_AUXV, AT_HWCAP, AT_HWCAP2 = "/proc/self/auxv", 16, 26
_HWCAP = {"neon": (AT_HWCAP, 1), "dotprod": (AT_HWCAP, 20), "i8mm": (AT_HWCAP2, 13)}
_SYSCTL = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features of this CPU, as far as tiers need them: what the system says, nothing guessed."""
    machine = platform.machine()
    if machine in _X86 and (flags := _cpuinfo_flags()):
        needed = {name for tier in ALL_TIERS.values() if tier.x86 for name in tier.needs}
        return frozenset(name for name in needed if _LINUX.get(name, name) in flags)
    if machine in _ARM and (auxv := _auxiliary_vector()):
        return frozenset(name for name, (word, bit) in _HWCAP.items() if auxv.get(word, 0) >> bit & 1)
    base = {"neon"} if machine in _ARM else set()
    if machine in _ARM and sys.platform == "darwin":
        return frozenset(base | {name for name, key in _SYSCTL.items() if _sysctl(key)})
    try:
        import llvmlite.binding as llvm  # another system: 20 ms and 40 MB

        return frozenset(base | {name for name, there in llvm.get_host_cpu_features().items() if there})
    except (ImportError, RuntimeError):  # no LLVM, or it does not know this host: what the architecture guarantees
        return frozenset(base)


def _cpuinfo_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """The first CPU's flags as Linux reports them; empty where it does not."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _auxiliary_vector(path: str = _AUXV) -> dict[int, int]:
    """What Linux tells each process about its CPU, by kind of entry; empty where it does not."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError:
        return {}
    return dict(struct.iter_unpack("@LL", raw[: len(raw) // 16 * 16]))


def _sysctl(name: str) -> int:
    """An integer that macOS tells about the machine; 0 where it does not know the name."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    system = ctypes.CDLL(None).sysctlbyname
    return value.value if system(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) == 0 else 0


def runnable() -> list[Tier]:
    """The tiers that this CPU can run, best first; in a bundle those that it has."""
    from . import bundle  # no part of what kernels are compiled from

    here = platform.machine()
    can = [t for t in TIERS.values() if here in t.machines and set(t.needs) <= host_features()]
    return [t for t in can if t.name in bundle.manifest(place)["tiers"]] if (place := bundle.folder()) else can


def choose() -> Tier:
    """The tier to use: the best one, or the one named by SMOLRUN_TIER.

    Raises:
        RuntimeError: SMOLRUN_TIER names a tier that does not exist or that this CPU cannot run, or nothing fits this
        CPU.
    """
    can = runnable()
    names = ", ".join(t.name for t in can)
    if not can:
        raise RuntimeError(
            f"no kernels for this CPU ({platform.machine()}, features {', '.join(sorted(host_features())) or 'none'}): "
            + _what_there_is()
        )
    wanted = os.environ.get("SMOLRUN_TIER", "")
    if not wanted:
        return can[0]
    for tier in can:
        if tier.name == wanted:
            return tier
    state = "exists but needs features this CPU lacks" if wanted in TIERS else "does not exist"
    raise RuntimeError(f"SMOLRUN_TIER={wanted}: that tier {state}; this CPU runs: {names}")


def _what_there_is() -> str:
    from . import bundle

    if not (place := bundle.folder()):
        return "known are x86_64 and aarch64"
    facts = bundle.manifest(place)
    return f"{place} was compiled for {facts['target']}, tiers {', '.join(facts['tiers'])}"


def record_bytes(terms: int) -> int:
    """Bytes of an activation record of `terms` int8 terms, drawn in matmul.py."""
    return 32 * terms + 32


def peak_tokens(tier: Tier, terms: int) -> int:
    """Tokens whose sums the measurement of a core's peak keeps: as many sums as a full tile has."""
    return token_tile(tier, terms) * (tier.abreast if terms else 1)


def one_tile(tier: Tier) -> int:
    """Tokens of an int8 pass from which on its activations lie in more than one tile, if that is more than a tile has:
    up to eight tokens then share the unpacking of a row group.
    """
    return 2 * tier.tiles[1] if tier.abreast > 1 else 0


def token_tile(tier: Tier, terms: int) -> int:
    """Tokens of a prefill tile. terms: int8 terms of an activation; 0 for f32 activations."""
    return tier.tiles[terms]
