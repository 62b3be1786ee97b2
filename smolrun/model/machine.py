"""What the system says of this machine: memory, cores, heat, energy. Read anew at every call, and never guessed.

Linux and Android say it in files; `root` is where their tree begins, so a test can have a machine of its own. macOS and
Windows answer for memory by `vm_stat` and GlobalMemoryStatusEx, for cores by their number.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A core belongs to the fast ones from this share of the fastest's speed on. Capacities know the kind of the core (a
# Cortex-A510 beside an X3: 0.3; the A715 between them 0.8), clocks do not (an A55 of 1.8 GHz, an A76 of 2.4: 0.75)
FAST_CAPACITY, FAST_CLOCK = 0.5, 0.8
PARTS = {  # ARM's "CPU part" in /proc/cpuinfo
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520",
    0xD81: "Cortex-A720", 0xD82: "Cortex-X4",
}  # fmt: skip
HOT = re.compile(r"cpu|soc|pkg|core|k10temp|zenpower|acpitz", re.IGNORECASE)  # sensors that stand for the CPU


@dataclass(frozen=True)
class Room:
    """Memory that a process may take without swapping, in bytes, and who says so."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Cpu:
    """A logical CPU this process may use: its number, the physical core (equal for hyper-threads), its speed in units
    of its own machine (0: not known), and whether that is a capacity or a clock."""

    number: int
    core: str
    speed: int
    is_capacity: bool


@dataclass(frozen=True)
class Threads:
    """How many threads to compute with, the CPUs they are to stay on (empty: any), and why, for people."""

    count: int
    cpus: frozenset[int]
    why: str


@dataclass(frozen=True)
class Machine:
    """A machine as its files describe it."""

    root: Path = field(default=Path("/"))

    def read(self, path: str) -> str:
        """A file's text without the last line end; "" where there is none, or none for us."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except (OSError, ValueError):  # a path with a zero byte in it
            return ""

    def _number(self, path: str) -> int | None:
        return _whole(self.read(path))

    def _field(self, path: str, name: str) -> str:
        """The value of a line `name: value` or `name value`; "" without one."""
        found = re.search(rf"^{re.escape(name)}:?\s+(.*)$", self.read(path), re.MULTILINE)
        return found[1].strip() if found else ""

    def _groups(self, controller: str) -> Iterator[str]:
        """Folders of the control groups this process is in, innermost first, those of their parents after them.

        Version 2 has one tree, version 1 one for each controller. A container sees its own group as the top, whatever
        path /proc names.
        """
        for names, path in re.findall(r"^[0-9]+:([^:\n]*):(.*)$", self.read("proc/self/cgroup"), re.MULTILINE):
            if names and controller not in names.split(","):
                continue
            top = "sys/fs/cgroup" + (
                f"/{names if (self.root / 'sys/fs/cgroup' / names).is_dir() else controller}" * bool(names)
            )
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for end in range(len(parts), -1, -1):
                yield "/".join([top, *parts[:end]])

    def name(self) -> str:
        """The device, as its firmware calls it; "" where it does not."""
        return self.read("proc/device-tree/model").strip("\0") or self.read("sys/class/dmi/id/product_name")

    def processor(self) -> str:
        """The kinds of core; "" where the system does not say."""
        text = self.read("proc/cpuinfo")
        names = list(dict.fromkeys(re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)))
        if not names:
            parts = dict.fromkeys(
                int(part, 16) for part in re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]{1,8})$", text, re.MULTILINE)
            )
            names = [PARTS.get(part, f"ARM part {part:#x}") for part in parts]
        return " + ".join(names)

    def describe(self) -> dict[str, str]:
        """What a result of a measurement says of where it was taken."""
        system = f"{platform.system()} {platform.release()}, {platform.machine()}"
        return {"name": self.name(), "cpu": self.processor() or platform.processor(), "system": system}

    # ---- memory ------------------------------------------------------------------------------------------------------

    def available(self) -> Room | None:
        """What can still be taken, the limits of containers included; None where the system does not say."""
        return min(self._rooms(), key=lambda room: room.bytes, default=None)

    def _rooms(self) -> Iterator[Room]:
        free = _whole(self._field("proc/meminfo", "MemAvailable").split(" ")[0])
        if free is not None:
            yield Room(1024 * free, "MemAvailable in /proc/meminfo")
        elif self.root == Path("/") and (other := _elsewhere()):
            yield other
        for folder in self._groups("memory"):
            for limit, used, file in (
                ("memory.max", "memory.current", ""),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            ):
                most, now = self._number(f"{folder}/{limit}"), self._number(f"{folder}/{used}")
                if most is not None and now is not None:  # "max" is no number
                    kept = [
                        _whole(self._field(f"{folder}/memory.stat", f"{file}{kind}_file"))
                        for kind in ("active", "inactive")
                    ]
                    cache = sum(filter(None, kept))  # the first that is taken back
                    yield Room(max(most - max(now - cache, 0), 0), f"the limit of {most:,} bytes in /{folder}/{limit}")

    # ---- cores -------------------------------------------------------------------------------------------------------

    def cpus(self) -> list[Cpu]:
        """The logical CPUs this process may use."""
        allowed = _numbers(self._field("proc/self/status", "Cpus_allowed_list"))
        online = _numbers(self.read("sys/devices/system/cpu/online"))
        numbers = allowed & online if online else allowed
        if not numbers:  # not Linux
            numbers = set(range(os.cpu_count() or 1))
        found = []
        for n in sorted(numbers):
            folder = f"sys/devices/system/cpu/cpu{n}"
            capacity = self._number(f"{folder}/cpu_capacity")
            speed = self._number(f"{folder}/cpufreq/cpuinfo_max_freq") if capacity is None else capacity
            core = self.read(f"{folder}/topology/thread_siblings_list")
            found.append(Cpu(n, core if n in _numbers(core) else str(n), max(speed or 0, 0), capacity is not None))
        return found

    def threads(self) -> Threads:
        """One for each fast physical core, within affinity and the quota of a container.

        Slow cores (LITTLE ones, Intel's E-cores) are left out: all threads of a phase wait for its last item, and what
        a slow core has begun takes it several times as long.
        """
        if self.root == Path("/") and sys.platform == "darwin":
            return perflevels(_said("sysctl", "hw.physicalcpu", "hw.perflevel0.physicalcpu"))
        cpus = self.cpus()
        fast = self._fast(cpus)
        count, cores = len({cpu.core for cpu in fast}), len({cpu.core for cpu in cpus})
        why = f"{count} physical core{'s' * (count > 1)}"
        if len(fast) < len(cpus):
            why = f"the {count} fast of {cores} physical cores"
        if len(cpus) > cores:
            why += f" ({len(cpus)} hyper-threads)"
        quota = self.quota()
        if quota is not None and quota < count:
            count = max(-int(-quota // 1), 1)
            why += f", a quota of {quota:g} CPUs"
        return Threads(count, frozenset(c.number for c in fast) if len(fast) < len(cpus) else frozenset(), why)

    def _fast(self, cpus: list[Cpu]) -> list[Cpu]:
        if big := _numbers(self.read("sys/devices/cpu_core/cpus")):  # Intel names them
            named = [cpu for cpu in cpus if cpu.number in big]
            return named or cpus
        best = max(cpu.speed for cpu in cpus)
        return [cpu for cpu in cpus if cpu.speed >= best * (FAST_CAPACITY if cpu.is_capacity else FAST_CLOCK)]

    def quota(self) -> float | None:
        """CPUs that the groups of this process may use together; None without a limit."""
        found = []
        for folder in self._groups("cpu"):
            quota, _, period = self.read(f"{folder}/cpu.max").partition(" ")
            if not quota:
                quota, period = self.read(f"{folder}/cpu.cfs_quota_us"), self.read(f"{folder}/cpu.cfs_period_us")
            most, each = _whole(quota), _whole(period)
            if most is not None and most >= 0 and each:  # else "max" or -1
                found.append(most / each)
        return min(found, default=None)

    # ---- heat and energy ---------------------------------------------------------------------------------------------

    def temperature(self) -> float | None:
        """Degrees Celsius of the hottest sensor of the CPU; None where there is none."""
        found = []
        for folder in self._folders("sys/class/thermal", "thermal_zone*"):
            if HOT.search(self.read(f"{folder}/type")):
                found.append(self._number(f"{folder}/temp"))
        for folder in self._folders("sys/class/hwmon", "hwmon*"):
            if HOT.search(self.read(f"{folder}/name")):
                found += [self._number(path) for path in self._folders(folder, "temp*_input")]
        return max((value / 1000 for value in found if value is not None and 0 < value < 150_000), default=None)

    def frequency(self) -> float | None:
        """Hertz of the fastest CPU now; None where the system does not say."""
        now = (self._number(f"sys/devices/system/cpu/cpu{cpu.number}/cpufreq/scaling_cur_freq") for cpu in self.cpus())
        return max((1e3 * value for value in now if value), default=None)

    def joules(self) -> dict[str, tuple[float, float]]:
        """Energy counters of the processor packages (RAPL): name -> joules so far, joules at which it begins anew."""
        found = {}
        for folder in self._folders("sys/class/powercap", "*-rapl:*"):
            now, most = self._number(f"{folder}/energy_uj"), self._number(f"{folder}/max_energy_range_uj")
            if self.read(f"{folder}/name").startswith("package") and now is not None:
                found[folder.rpartition("/")[2]] = now / 1e6, (most or 0) / 1e6
        return found

    def watts(self) -> float | None:
        """What the batteries give now, the screen and all else included; None on mains or without a gauge."""
        total = None
        for folder in self._folders("sys/class/power_supply", "*"):
            if self.read(f"{folder}/type") == "Battery" and self.read(f"{folder}/status") == "Discharging":
                power = self._number(f"{folder}/power_now")
                current, voltage = self._number(f"{folder}/current_now"), self._number(f"{folder}/voltage_now")
                if power is not None:
                    total = (total or 0.0) + abs(power) / 1e6
                elif current is not None and voltage is not None:
                    total = (total or 0.0) + abs(current) * voltage / 1e12
        return total

    def _folders(self, folder: str, pattern: str) -> list[str]:
        try:
            return sorted(path.relative_to(self.root).as_posix() for path in (self.root / folder).glob(pattern))
        except OSError:  # Android shows some folders to nobody
            return []


HERE = Machine()


def available_cores() -> int:
    """Threads to compute with on this machine, see `Machine.threads`."""
    return HERE.threads().count


def _whole(text: str) -> int | None:
    """A whole number below 10^19, as kernels write it; None for any other text."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else None


def _numbers(text: str) -> set[int]:
    """The set that Linux writes as "0-3,6"; no CPU has a number of more than five digits."""
    parts = (re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part) for part in text.split(","))
    return {n for part in parts if part for n in range(int(part[1]), int(part[2] or part[1]) + 1)}


def _elsewhere() -> Room | None:
    """Memory where there is no /proc/meminfo."""
    if sys.platform == "darwin":
        return vm_stat(_said("vm_stat"))
    if sys.platform == "win32":

        class Status(ctypes.Structure):
            _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
                (name, ctypes.c_uint64)
                for name in ("total", "free", "pages", "free_pages", "space", "free_space", "more")
            ]

        status = Status(ctypes.sizeof(Status))
        if ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
            return Room(min(status.free, status.free_pages), "GlobalMemoryStatusEx")
    return None


def _said(*command: str) -> str:
    """What a command of the system says; "" where there is none, or it does not answer."""
    import subprocess  # 3 ms that most starts need not wait for

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def perflevels(said: str) -> Threads:
    """macOS's cores: as many threads as there are performance cores; threads cannot be bound to them there."""
    found = dict(re.findall(r"^(hw\S+): (\d+)$", said, re.MULTILINE))
    count = int(found.get("hw.physicalcpu", os.cpu_count() or 1))
    fast = int(found.get("hw.perflevel0.physicalcpu", count))
    return Threads(
        fast, frozenset(), f"the {fast} fast of {count} physical cores" if fast < count else f"{count} cores"
    )


def vm_stat(said: str) -> Room | None:
    """macOS's answer: pages that are free or that may be taken back without writing them anywhere."""
    page = re.search(r"page size of (\d+) bytes", said)
    counts = [
        re.search(rf"^Pages {kind}:\s+(\d+)\.", said, re.MULTILINE) for kind in ("free", "inactive", "speculative")
    ]
    if page is None or None in counts:
        return None
    return Room(int(page[1]) * sum(int(count[1]) for count in counts if count), "vm_stat")
