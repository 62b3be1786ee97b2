"""Cores, limits, heat and energy as fake trees of files tell them; and that threads and loading follow."""

import os
from pathlib import Path

import pytest

from fake_machine import CPU, cores, tree
from smolrun.errors import OutOfMemory
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model import machine
from smolrun.model.llama import Llama
from smolrun.model.machine import Machine, Room, perflevels, vm_stat
from tiny import make_tiny

MEMINFO = "MemTotal:        3884032 kB\nMemFree:          120000 kB\nMemAvailable:    3400000 kB\n"

# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_a_pi(tmp_path: Path) -> None:
    assert tree(tmp_path, {"proc/meminfo": MEMINFO}).available() == Room(3_481_600_000, "MemAvailable in /proc/meminfo")


def test_a_limit_of_version_2_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/app.service"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/system.slice/app.service",
        f"{group}/memory.max": "max",
        f"{group}/memory.current": "300000000",
        "sys/fs/cgroup/system.slice/memory.max": "1000000000",
        "sys/fs/cgroup/system.slice/memory.current": "700000000",
        "sys/fs/cgroup/system.slice/memory.stat": "anon 1\ninactive_file 200000000\nactive_file 50000000\n",
    }
    found = tree(tmp_path, files).available()
    assert found is not None and found.bytes == 550_000_000 and "/sys/fs/cgroup/system.slice/memory.max" in found.source
    assert tree(tmp_path, {f"{group}/memory.max": "290000000"}).available() == Room(
        0, f"the limit of 290,000,000 bytes in /{group}/memory.max"
    )


@pytest.mark.parametrize("container", [False, True])
def test_a_limit_of_version_1(container: bool, tmp_path: Path) -> None:
    """A container sees its own group as the top, under the path that its host knows."""
    group = "sys/fs/cgroup/memory" + ("" if container else "/docker/abc")
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/",
        f"{group}/memory.limit_in_bytes": "536870912",
        f"{group}/memory.usage_in_bytes": "100000000",
        f"{group}/memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 30000000\ntotal_active_file 6870912\n",
    }
    found = tree(tmp_path, files).available()
    assert found is not None and found.bytes == 536_870_912 - 100_000_000 + 36_870_912


def test_memory_that_nobody_tells(tmp_path: Path) -> None:
    assert Machine(tmp_path).available() is None


def test_memory_of_macos() -> None:
    said = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            500000.
Pages inactive:                           20000.
Pages speculative:                         1000.
"Translation faults":                 123456789.
"""
    assert vm_stat(said) == Room(31_000 * 16384, "vm_stat")
    assert vm_stat("") is None


HOSTILE = (
    "",
    "\0",
    "x",
    "-",
    "0-",
    "-5",
    "0-99999999999",
    "9" * 5000,
    "\u00b2",
    "0-\u00b2",
    "a",
    "::",
    "9:x",
    "-1 0",
    "max",
    "nan",
)
FILES = {  # everything that is read, and the beginning of a line where lines have names
    **{f"proc/{name}": "" for name in ("self/cgroup", "device-tree/model")},
    "proc/cpuinfo": "CPU part\t: ", "proc/meminfo": "MemAvailable: ", "proc/self/status": "Cpus_allowed_list:\t",
    **{f"sys/fs/cgroup/{name}": "" for name in ("cpu.max", "memory.max", "memory.current")},
    "sys/fs/cgroup/memory.stat": "active_file ", f"{CPU}/online": "", "sys/devices/cpu_core/cpus": "",
    f"{CPU}/cpu0/cpu_capacity": "", f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "",
    f"{CPU}/cpu0/topology/thread_siblings_list": "",
    "sys/class/thermal/thermal_zone0/temp": "", "sys/class/powercap/intel-rapl:0/energy_uj": "",
    "sys/class/power_supply/BAT0/power_now": "",
}  # fmt: skip
SOUND = {
    "proc/self/cgroup": "0::/",
    "sys/class/thermal/thermal_zone0/type": "cpu",
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/power_supply/BAT0/status": "Discharging",
}


@pytest.mark.parametrize("name", FILES)
def test_files_with_anything_in_them(name: str, tmp_path: Path) -> None:
    """What is no number is not known: no error, no guess, and never less than a thread."""
    for text in HOSTILE:
        for head in {"", FILES[name]}:
            here = tree(tmp_path, SOUND | {name: head + text})
            here.describe(), here.available(), here.temperature(), here.frequency(), here.joules(), here.watts()
            assert here.cpus() and here.threads().count >= 1, (head, text)


# ---- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "count", "cpus"),
    [
        ({"cpu_capacity": (1024,) * 4}, 4, set()),  # Pi 5
        ({"max_freq": (1_800_000,) * 4}, 4, set()),  # Pi 4
        ({"cpu_capacity": (324, 324, 324, 801, 801, 801, 801, 1024)}, 5, {3, 4, 5, 6, 7}),  # Snapdragon 8 Gen 2
        ({"cpu_capacity": (286,) * 4 + (1024,) * 2}, 2, {4, 5}),
        ({"max_freq": (1_800_000,) * 6 + (2_400_000,) * 2}, 2, {6, 7}),
        ({"max_freq": (5_700_000, 5_500_000, 5_500_000)}, 3, set()),  # favoured cores are no cluster
        ({"cpu_capacity": (1024,)}, 1, set()),
    ],
)
def test_the_fast_cores(lists: dict[str, tuple[int, ...]], count: int, cpus: set[int], tmp_path: Path) -> None:
    found = tree(tmp_path, cores(**lists)).threads()
    assert (found.count, found.cpus) == (count, frozenset(cpus))
    assert ("fast" in found.why) == bool(cpus)


def test_intel_names_its_fast_cores(tmp_path: Path) -> None:
    """Two P-cores with hyper-threads, four E-cores."""
    files = cores(max_freq=(5_000_000,) * 4 + (4_200_000,) * 4) | {"sys/devices/cpu_core/cpus": "0-3"}
    files |= {f"{CPU}/cpu{n}/topology/thread_siblings_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(4)}
    found = tree(tmp_path, files).threads()
    assert (found.count, found.cpus) == (2, frozenset({0, 1, 2, 3})) and found.why.startswith(
        "the 2 fast of 6 physical"
    )


def test_affinity_and_cores_that_sleep(tmp_path: Path) -> None:
    files = cores(cpu_capacity=(300, 300, 1024, 1024))
    files["proc/self/status"] = "Cpus_allowed_list:\t0-1,3"
    assert tree(tmp_path, files).threads().cpus == {3}
    files[f"{CPU}/online"] = "0-2"
    assert tree(tmp_path, files).threads() == machine.Threads(2, frozenset(), "2 physical cores")


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_the_quota_of_a_container(files: dict[str, str], count: int, tmp_path: Path) -> None:
    found = tree(tmp_path, cores(max_freq=(2_400_000,) * 4) | files).threads()
    assert found.count == count and ("quota" in found.why) == (count < 4)


def test_threads_where_nothing_is_told(tmp_path: Path) -> None:
    assert Machine(tmp_path).threads().count == os.cpu_count()


def test_cores_of_macos() -> None:
    said = "hw.physicalcpu: 8\nhw.perflevel0.physicalcpu: 4\n"
    assert perflevels(said) == machine.Threads(4, frozenset(), "the 4 fast of 8 physical cores")
    assert perflevels("hw.physicalcpu: 4\n").count == 4 and perflevels("").count == os.cpu_count()


def test_workers_stay_on_the_fast_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers alone, and not where the caller asks for more threads than there are fast cores."""
    asked: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda who, cpus: asked.append((who, set(cpus))), raising=False)
    files = cores(cpu_capacity=(300, 1024, 1024, 1024)) | {"proc/meminfo": MEMINFO}
    monkeypatch.setattr(machine, "HERE", tree(tmp_path / "root", files))
    with open_checkpoint(make_tiny(tmp_path, fmt="Q4_0").gguf) as checkpoint:
        for threads in (None, 2, 4):
            asked.clear()
            model = Llama(checkpoint, context=64, threads=threads)
            slot = model.open([1, 2])
            model.hidden(slot, [1, 2])
            model.close()
            assert model.threads == (threads or 3)
            assert asked == [(0, {1, 2, 3})] * (0 if threads == 4 else model.threads - 1)


# ---- heat and energy -------------------------------------------------------------------------------------------------


def test_heat(tmp_path: Path) -> None:
    found = tree(tmp_path, cores(max_freq=(1, 1)))
    assert (found.temperature(), found.frequency(), found.joules(), found.watts()) == (None, None, {}, None)
    tree(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": "61234",
            "sys/class/thermal/thermal_zone1/type": "battery",
            "sys/class/thermal/thermal_zone1/temp": "80000",
            "sys/class/thermal/thermal_zone2/type": "soc-thermal",
            "sys/class/thermal/thermal_zone2/temp": "-274000",  # a sensor that is off
            "sys/class/hwmon/hwmon0/name": "k10temp",
            "sys/class/hwmon/hwmon0/temp1_input": "72500",
            f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1500000",
            f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "1800000",
        },
    )
    assert (found.temperature(), found.frequency()) == (72.5, 1.8e9)


def test_energy(tmp_path: Path) -> None:
    battery = "sys/class/power_supply/battery"
    files = {
        "sys/class/powercap/intel-rapl:0/name": "package-0",
        "sys/class/powercap/intel-rapl:0/energy_uj": "1500000",
        "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
        "sys/class/powercap/intel-rapl:0:0/name": "core",
        "sys/class/powercap/intel-rapl:0:0/energy_uj": "900000",
        f"{battery}/type": "Battery",
        f"{battery}/status": "Discharging",
        f"{battery}/current_now": "-500000",
        f"{battery}/voltage_now": "4000000",
    }
    found = tree(tmp_path, files)
    assert found.joules() == {"intel-rapl:0": (1.5, 262143.32885)}
    assert found.watts() == pytest.approx(2.0)
    assert tree(tmp_path, {f"{battery}/power_now": "3000000"}).watts() == 3.0
    assert tree(tmp_path, {f"{battery}/status": "Charging"}).watts() is None
    assert Machine(tmp_path / "nothing").joules() == {}


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "HERE", tree(tmp_path / "root", {"proc/meminfo": "MemAvailable: 500 kB"}))
    monkeypatch.setattr("smolrun.model.llama.Weights", None)
    with open_checkpoint(make_tiny(tmp_path, fmt="Q4_0").gguf) as checkpoint:
        with pytest.raises(OutOfMemory, match=r"needs .* 0.00 GB are available \(MemAvailable in /proc/meminfo\)"):
            Llama(checkpoint, context=1024)
        with pytest.raises(TypeError):  # the weights would be next
            Llama(checkpoint, context=1024, force=True)
