"""The bundle of the real 135M for AArch64, under qemu, in a root that holds Python and NumPy alone.

Each CPU must choose its own tier; the text of a chat turn and greedy ids must be those of the engine on this machine.
`make test-arm64-bundle` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import smolrun
from arm64 import environment
from smolrun.compile import compile_model
from smolrun.files.sources import resolve

QUESTION, PROMPT, TOKENS = "What is gravity?", "The sea is", 16
CPUS = {"max": "i8mm", "cortex-a76": "dotprod", "cortex-a53": "neon"}  # as qemu calls them -> what they choose
TIER = "from smolrun.kernels.target import choose; print(choose().name)"
LIBRARIES = "numba llvmlite tokenizers click jinja2 huggingface_hub safetensors"


def main() -> None:
    """SystemExit with what went wrong."""
    began, model = time.monotonic(), resolve(None)

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    greedy = smolrun.Sampling(temperature=0)
    with smolrun.load(model, context=256) as llm:
        chat = [{"role": "user", "content": QUESTION}]
        expected = llm.chat(chat, max_tokens=TOKENS, sampling=greedy).text
        ids = list(llm.generate(PROMPT, max_tokens=TOKENS, sampling=greedy).ids)
    with tempfile.TemporaryDirectory() as name:
        app = Path(name) / "app"
        made = compile_model(model, app, target="aarch64-linux-gnu", kv=["f16"])
        say(f"bundle for aarch64-linux-gnu: {', '.join(made.tiers)}, {made.bytes / 1e6:.0f} MB")
        python = environment("numpy")

        def run(cpu: str, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
            variables = {"PATH": os.environ["PATH"], "QEMU_CPU": cpu, "HOME": "/nowhere"}
            return subprocess.run(
                [python, *command],
                cwd=name,
                env=variables,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
            )

        for library in LIBRARIES.split():
            if not run("max", "-c", f"import {library}").returncode:
                raise SystemExit(f"{library} is in the root: it shall hold Python and NumPy alone")
        for cpu, tier in CPUS.items():
            found = run(cpu, "-c", f"import sys; sys.path[:0] = ['app', 'app/vendor']; {TIER}")
            if found.stdout.strip() != tier:
                raise SystemExit(f"{cpu} chose {found.stdout}{found.stderr}")
            options = ("--temperature", "0", "--max-tokens", str(TOKENS), "--context", "256", "--threads", "2")
            done = run(cpu, "-m", "app", "chat", *options, text=QUESTION)
            if done.returncode or done.stdout.strip() != expected.strip():
                raise SystemExit(f"{cpu}: {done.stdout}\n{done.stderr}\nexpected: {expected}")
            done = run(cpu, "-m", "app", "generate", PROMPT, "--json", *options)
            if done.returncode or (found_ids := [token["id"] for token in json.loads(done.stdout)["tokens"]]) != ids:
                raise SystemExit(f"{cpu}: {done.stderr or found_ids}\nexpected: {ids}")
            say(f"{cpu}: chose {tier}; its chat turn and {len(ids)} greedy ids are those of this machine")
    print(f"{len(CPUS)} passed, 0 failed")


if __name__ == "__main__":
    main()
