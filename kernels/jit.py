"""The one decorator of the kernels, and the way from a function to an object.

Imported by the compiling child process only (build.py): the run-time maps the images it makes and never imports Numba.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from .target import ALL_TIERS

if os.environ.get("SMOLRUN_BUILD_TIER") not in ALL_TIERS:
    raise ImportError("kernels compile for one tier a process: use smolrun.kernels.build, or set SMOLRUN_BUILD_TIER")
TIER = ALL_TIERS[os.environ["SMOLRUN_BUILD_TIER"]]  # what this process compiles for

if platform.machine() not in TIER.machines:  # Numba lowers each function for "this process" too, though nobody calls it
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: f"{TIER.machines[0]}-unknown-linux"

if not TIER.reorder:
    llvm.set_option("smolrun", "-enable-misched=false")

# No exceptions, no bounds checks, no fast-math: what is left is arithmetic on addresses, and an object without Python
# symbols.
FLAGS = {"error_model": "numpy", "boundscheck": False, "fastmath": False}
kernel = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **FLAGS)


def _triple(system: str = sys.platform) -> str:
    """What to compile for: always ELF, which image.py reads, with the system's calling convention.

    Kernels take integers, addresses and floats in registers and call nothing, so all systems but Windows on x86 agree.
    """
    machine = TIER.machines[0]
    return f"{machine}-pc-windows-msvc-elf" if (system, machine) == ("win32", "x86_64") else f"{machine}-unknown-linux"


def compile_c(name: str, function: Callable[..., Any], signature: Any, emit: str = "object", triple: str = "") -> bytes:
    """Code of a function under the C symbol `name`; emit: "object" or "assembly"; triple: "": this system's.

    Numba's own C wrapper reports exceptions through the Python API; ours is five lines of IR and needs nothing.
    Position independent code of the small model: image.py makes the same bytes run anywhere.
    """
    dispatcher = kernel(function)
    dispatcher.compile(signature.args)
    compiled = dispatcher.overloads[signature.args]
    native = compiled.fndesc.llvm_func_name
    value = "void" if signature.return_type == types.void else "i64"
    kinds = {types.int64: "i64", types.float32: "float"}
    params = ", ".join(f"{kinds[a]} %a{i}" for i, a in enumerate(signature.args))
    wrapper = f"""
define {value} @{name}({params}) {{
  %result = alloca i64
  %error = alloca ptr
  %status = call i32 @{native}({", ".join(["ptr %result", "ptr %error", params])})
  %value = load i64, ptr %result
  ret {value} {"" if value == "void" else "%value"}
}}
"""
    text = str(compiled.library._final_module) + wrapper
    if TIER.x86:  # the system aligns stacks to 16 bytes, so vectors kept on one would lie across two cache lines
        text = re.sub(r"^(define .*) \{$", r"\1 alignstack(64) {", text, flags=re.MULTILINE)
    module = llvm.parse_assembly(text)
    for f in module.functions:
        if not f.is_declaration and f.name != name:
            f.linkage = "internal"
    for g in module.global_variables:
        if not g.is_declaration:
            g.linkage = "internal"
    module.triple = triple or _triple()
    # macOS and Windows keep AArch64's register 18 to themselves
    features = TIER.features + ("" if TIER.x86 else ",+reserve-x18")
    machine = llvm.Target.from_triple(module.triple).create_target_machine(
        cpu=TIER.cpu, features=features, opt=3, reloc="pic", codemodel="small"
    )
    module.data_layout = str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(3)
    builder = llvm.create_pass_builder(machine, tuning)
    passes = builder.getModulePassManager()
    passes.run(module, builder)
    return machine.emit_object(module) if emit == "object" else machine.emit_assembly(module).encode()
