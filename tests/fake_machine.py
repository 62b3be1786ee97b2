"""A machine made of files, as Linux shows one under /proc and /sys."""

from collections.abc import Mapping
from pathlib import Path

from smolrun.model.machine import Machine

CPU = "sys/devices/system/cpu"


def tree(root: Path, files: Mapping[str, str]) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return Machine(root)


def cores(**lists: tuple[int, ...]) -> dict[str, str]:
    """Files of CPUs by what is known of them: cores(cpu_capacity=(1024, 300)) or cores(max_freq=...)."""
    found: dict[str, str] = {}
    for name, values in lists.items():
        file = "cpufreq/cpuinfo_max_freq" if name == "max_freq" else name
        found |= {f"{CPU}/cpu{n}/{file}": str(value) for n, value in enumerate(values)}
        found["proc/self/status"] = f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t0-{len(values) - 1}\n"
        found[f"{CPU}/online"] = f"0-{len(values) - 1}"
    return found
