"""Speed on ARM by model: what the inner loops of the kernels cost, ours and llama.cpp's, without an ARM machine.

python benchmarks/edge.py       # results/edge.json; benchmarks/readme.py makes README's table of it

Both are compiled for the same CPUs: ours by the kernels' own compiler, llama.cpp's from the sdist of llama-cpp-python
by aarch64-linux-gnu-gcc, in the user's cache. The innermost loop is cut from the object by llvm-objdump, its
instructions are counted, and llvm-mca runs it on LLVM's model of a core. The model knows pipes, latencies and what may
run out of order; it knows no caches: this is the speed of weights that are near, a bound for those from memory.

Needs (Debian): apt-get install llvm-19 gcc-aarch64-linux-gnu g++-aarch64-linux-gnu
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolrun.kernels.load import compile_code, user_cache
from smolrun.kernels.target import TIERS, token_tile

RESULTS = Path(__file__).parent / "results" / "edge.json"
PEER = "llama-cpp-python==0.3.36"
MACS = {"sdot": 16, "smmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8}  # of 8-bit factors, an instruction
BLOCK = 16 * 32  # weights of one round of our loops: 16 rows, 32 k
BYTES = {"q4_0": 18 / 32, "q8_0": 34 / 32}  # of a weight

# (tier, LLVM's name of the core, whose model that is in LLVM 19, cores meant, gcc's -march, kernels of llama.cpp by
# format: one token, several). Its plain NEON has no kernel for several tokens.
CORES: list[tuple[str, str, str, str, str, dict[str, tuple[str, str]]]] = [
    *(
        ("neon", core, model, meant, "armv8-a", {f: (f"vec_dot_{f}_q8_0",) * 2 for f in BYTES})
        for core, model, meant in (
            ("cortex-a53", "CortexA53", "A53: Pi 3, Pi Zero 2"),
            ("cortex-a72", "CortexA57", "A72: Pi 4"),
        )
    ),
    (
        "dotprod", "neoverse-n1", "NeoverseN1", "A76: Pi 5, phones", "armv8.2-a+dotprod+fp16",
        {f: (f"gemv_{f}_4x4_q8_0", f"gemm_{f}_4x4_q8_0") for f in BYTES},
    ),
    (
        "i8mm", "neoverse-n2", "NeoverseN2", "A710, X2: phones", "armv8.6-a+dotprod+i8mm+fp16",
        {f: (f"gemv_{f}_4x8_q8_0", f"gemm_{f}_4x8_q8_0") for f in BYTES},
    ),
]  # fmt: skip


def tool(name: str) -> str:
    """A program of LLVM, the newest there is."""
    found = [p for n in ("", *(f"-{v}" for v in range(15, 30))) if (p := shutil.which(name + n))]
    if not found:
        raise SystemExit(f"no {name}: apt-get install llvm-19")
    return found[-1]


def run(*command: str | Path, text: str = "") -> str:
    """What a program writes; SystemExit with what it complains about."""
    done = subprocess.run([str(c) for c in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]}: {done.stderr[-500:]}")
    return done.stdout


def loops(objects: Path) -> Iterator[tuple[str, list[str]]]:
    """(function, instructions) of each loop that holds no other, in an object file."""
    listing = run(tool("llvm-objdump"), "-d", "--no-show-raw-insn", "--mattr=+dotprod,+i8mm,+fullfp16", objects)
    for function in re.split(r"\n\n(?=[0-9a-f]{16} <)", listing):
        name = re.search(r"<(\w+)>:", function)
        code = {int(a, 16): i for a, i in re.findall(r"^ *([0-9a-f]+): +\t?(.*?)(?: *//.*)?$", function, re.MULTILINE)}
        places, spans = [*code], list[tuple[int, int]]()
        for place, instruction in code.items():
            jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?0x([0-9a-f]+) <", instruction)
            if jump and (first := int(jump[1], 16)) <= place and first in code:
                spans.append((first, place))
        for first, last in spans:
            if name and not any((a, z) != (first, last) and first <= a and z <= last for a, z in spans):
                yield name[1], [code[p] for p in places if first <= p <= last]


def macs(loop: list[str]) -> int:
    """Products of 8-bit weights and activations in one round."""
    count = Counter(i.split()[0] for i in loop if not re.match(r"(smull|smlal)2?\s+v\d+\.[42][sd]", i))
    return sum(MACS.get(name, 0) * n for name, n in count.items())


def cycles(loop: list[str], core: str) -> float:
    """Cycles of one round in a long run of them on LLVM's model of a core."""
    text = "first:\n" + "\n".join(re.sub(r"(?:#)?0x[0-9a-f]+ <.*", "first", i) for i in loop) + "\n"
    rounds = 200
    flags = [f"-mcpu={core}", "-mattr=+dotprod,+i8mm,+fullfp16", f"-iterations={rounds}", "-mtriple=aarch64-linux"]
    report = run(tool("llvm-mca"), *flags, "-instruction-info=0", "-resource-pressure=0", text=text)
    found = re.search(r"^Total Cycles:\s+(\d+)", report, re.MULTILINE)
    assert found is not None
    return int(found[1]) / rounds


def ours(tier: str, fmt: str, folder: Path) -> dict[int, list[str]]:
    """Loops of our kernel of one int8 term by tokens of a tile."""
    path = folder / f"{tier}-{fmt}.o"
    triple = "aarch64-unknown-linux"
    compile_code("object", TIERS[tier], [f"matmul_{fmt.upper()}_int8"], lambda _, code: path.write_bytes(code), triple)
    return {macs(loop) // BLOCK: loop for _, loop in loops(path) if macs(loop) >= BLOCK}


def peer_sources() -> Path:
    """llama.cpp's ggml, unpacked in the cache."""
    folder = user_cache() / "edge" / PEER
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", f"--dest={name}", PEER)
            run(*pip)
            with tarfile.open(next(Path(name).glob("*.tar.gz"))) as archive:
                archive.extractall(f"{name}/all", [m for m in archive if "/vendor/llama.cpp/ggml/" in m.name])
            next(Path(name).glob("all/*/vendor/llama.cpp/ggml")).rename(folder)
    return folder


def theirs(march: str, folder: Path) -> dict[str, list[str]]:
    """The largest loop of each of llama.cpp's kernels, for a CPU."""
    ggml, found = peer_sources(), dict[str, list[str]]()
    flags = ["-O3", f"-march={march}", "-D_GNU_SOURCE", *(f"-I{ggml / d}" for d in ("include", "src", "src/ggml-cpu"))]
    for source, compiler in (("quants.c", "gcc"), ("repack.cpp", "g++")):
        path = folder / f"{source}-{march}.o"
        program = f"aarch64-linux-gnu-{compiler}"
        if not shutil.which(program):
            raise SystemExit(f"no {program}: apt-get install {compiler}-aarch64-linux-gnu")
        run(program, *flags, "-c", ggml / "src/ggml-cpu/arch/arm" / source, "-o", path)
        for name, loop in loops(path):
            name = name.removeprefix("ggml_")
            if macs(loop) > macs(found.get(name, [])):
                found[name] = loop
    return found


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    version = re.search(r"LLVM version ([\d.]+)", run(tool("llvm-mca"), "--version"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tier, core, model, meant, march, kernels in CORES:
            peer = theirs(march, folder)
            for fmt, (one, several) in kernels.items():
                mine, full = ours(tier, fmt, folder), token_tile(TIERS[tier], 1)
                row: dict[str, Any] = {"tier": tier, "core": core, "model": model, "meant": meant, "format": fmt}
                for who, decode, prefill in (("ours", mine[1], mine[full]), ("peer", peer[one], peer[several])):
                    if not all(any(i.startswith("scvtf") for i in loop) for loop in (decode, prefill)):
                        raise SystemExit(
                            f"{who}, {tier}, {fmt}: the innermost loop does not scale its sums: not all of a block"
                        )
                    weights = macs(decode) * BYTES[fmt]
                    row[who] = {
                        "instructions_per_byte": len(decode) / weights,
                        "cycles_per_byte": cycles(decode, core) / weights,
                        "prefill_instructions_per_mac": len(prefill) / macs(prefill),
                        "prefill_macs_per_cycle": macs(prefill) / cycles(prefill, core),
                    }
                    print(tier, core, fmt, who, *(f"{k} {v:.3f}" for k, v in row[who].items()), flush=True)
                rows.append(row)
    document = {"llvm": version[1] if version else "", "peer": PEER, "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
