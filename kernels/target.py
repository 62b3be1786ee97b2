"""Which instructions the kernels may use: a tier is a named LLVM target, chosen from the features of the CPU at hand.

    avx512vnni   x86-64-v4 + AVX512-VNNI   vpdpbusd zmm        Ice Lake, Zen 4 and later
    avx512       x86-64-v4                 vpmaddubsw zmm      Skylake-X
    avxvnni      x86-64-v3 + AVX-VNNI      {vex} vpdpbusd ymm  Alder Lake and later, without AVX-512
    avx2         x86-64-v3                 vpmaddubsw ymm      Haswell, Zen 1 and later
    generic      the architecture's base   LLVM vectors only   everything else

A tier fixes CPU name and feature string, never "the host": an object compiled on one machine is the same on another,
and LLVM aborts the process on an intrinsic the target lacks, so the two must not be guessed apart. All tiers compute
the same bits.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

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
        dot: how four int8 products are summed: "vnni512", "vnni256", "maddubs" or "plain" (matmul.DOTS).
        half: f16 <-> f32 in hardware (F16C).
        token_tile: tokens per prefill tile; so many accumulators fit the registers.
        row_lanes: f32 lanes of one register; only a hint for tile shapes, every tier computes with 16 logical lanes.
    """

    name: str
    machines: tuple[str, ...]
    cpu: str
    needs: tuple[str, ...]
    dot: str
    half: bool
    token_tile: int
    row_lanes: int

    @property
    def fma(self) -> bool:
        """Fused multiply-add and rounding in hardware; where not, simd.py has its own and libm is not called."""
        return "fma" in self.needs or not self.cpu.startswith("x86")

    @property
    def features(self) -> str:
        """The feature string for LLVM."""
        return ",".join("+" + f for f in self.needs)


_X86 = ("x86_64", "AMD64", "amd64")


def _x86(name: str, cpu: str, needs: str, dot: str, half: bool, token_tile: int, row_lanes: int) -> Tier:
    return Tier(name, _X86, cpu, tuple(filter(None, needs.split(","))), dot, half, token_tile, row_lanes)


TIERS: dict[str, Tier] = {  # best first
    t.name: t
    for t in (
        _x86("avx512vnni", "x86-64-v4", _V4 + ",avx512vnni", "vnni512", True, 14, 16),
        _x86("avx512", "x86-64-v4", _V4, "maddubs", True, 12, 16),
        _x86("avxvnni", "x86-64-v3", _V3 + ",avxvnni", "vnni256", True, 3, 8),
        _x86("avx2", "x86-64-v3", _V3, "maddubs", True, 3, 8),
        _x86("generic", "x86-64", "", "plain", False, 2, 4),
        Tier("generic-aarch64", ("aarch64", "arm64", "ARM64"), "generic", ("neon",), "plain", False, 3, 4),
    )
}


# Linux's names of LLVM's x86 features, where they differ. It lists a feature only if it also saves its registers.
_LINUX = {
    "avx512vnni": "avx512_vnni",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features of this CPU, as far as tiers need them."""
    if platform.machine() in _X86 and (flags := _cpuinfo_flags()):
        needed = {name for tier in TIERS.values() for name in tier.needs}
        return frozenset(name for name in needed if _LINUX.get(name, name) in flags)
    import llvmlite.binding as llvm  # another system: 20 ms and 40 MB

    try:
        return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    except RuntimeError:  # LLVM does not know this host: only what the architecture guarantees
        return frozenset()


def _cpuinfo_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """The first CPU's flags as Linux reports them; empty where it does not."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def runnable() -> list[Tier]:
    """The tiers that this CPU can run, best first."""
    here = platform.machine()
    base = {"neon"}  # part of aarch64 itself; LLVM does not always list it
    return [t for t in TIERS.values() if here in t.machines and set(t.needs) <= host_features() | base]


def choose() -> Tier:
    """The tier to use: the best one, or the one named by SMOLRUN_TIER.

    Raises:
        RuntimeError: SMOLRUN_TIER names a tier that does not exist or that this CPU cannot run, or nothing fits this
        CPU.
    """
    can = runnable()
    names = ", ".join(t.name for t in can)
    if not can:
        raise RuntimeError(f"no kernels for machine type {platform.machine()!r}: known are x86_64 and aarch64")
    wanted = os.environ.get("SMOLRUN_TIER", "")
    if not wanted:
        return can[0]
    for tier in can:
        if tier.name == wanted:
            return tier
    state = "exists but needs features this CPU lacks" if wanted in TIERS else "does not exist"
    raise RuntimeError(f"SMOLRUN_TIER={wanted}: that tier {state}; this CPU runs: {names}")


def record_bytes(terms: int) -> int:
    """Bytes of an activation record of `terms` int8 terms, drawn in matmul.py."""
    return 32 * terms + 32


def token_tile(tier: Tier, terms: int) -> int:
    """Tokens of a prefill tile: two sums each must fit the registers, with two terms beside a block's quads.

    terms: int8 terms of an activation; 0 for f32 activations.
    """
    if tier.row_lanes == 16:
        return {0: 14, 1: tier.token_tile, 2: min(tier.token_tile, 11)}[terms]
    return tier.token_tile
