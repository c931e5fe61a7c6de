"""Memory and cores that a process is given, from trees of files that describe a machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genssd.engine.host import machine
from genssd.engine.host.machine import available_cores, available_memory, control_groups, limit_own_memory

MIB = 1 << 20


class FakeMachine:
    """A directory with the files of /proc and /sys that describe memory, cores and cgroups."""

    def __init__(self, root: Path, *, free_mib: int = 8000) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       99999999 kB\nMemAvailable:   {free_mib * 1024} kB\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t  102400 kB\nVmData:\t   51200 kB\n")
        self.mounts: list[str] = []

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))

    def mount(self, kind: str, point: str, *, options: str = "rw", inside: str = "/") -> None:
        self.mounts.append(f"31 23 0:28 {inside} {point} rw,relatime shared:4 - {kind} {kind} {options}")
        self.write("proc/self/mountinfo", "\n".join(["1 1 8:1 / / rw - ext4 /dev/sda rw", *self.mounts]) + "\n")

    def limit_v2(self, path: str, *, limit: str | int, used: int = 0, cache: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 1\nactive_file 7777777\ninactive_file {cache}\n")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (-1, -1))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)))
    return FakeMachine(tmp_path)


@pytest.fixture
def version_2(fake: FakeMachine) -> FakeMachine:
    """A machine with cgroups of version 2, on which this process is in /jobs/mine."""
    fake.mount("cgroup2", "/sys/fs/cgroup")
    fake.write("proc/self/cgroup", "0::/jobs/mine\n")
    return fake


@pytest.fixture
def version_1(fake: FakeMachine) -> FakeMachine:
    """A machine with cgroups of version 1, on which this process is in /jobs/mine."""
    fake.mount("cgroup", "/sys/fs/cgroup/memory", options="rw,memory")
    fake.mount("cgroup", "/sys/fs/cgroup/cpu,cpuacct", options="rw,cpu,cpuacct")
    fake.write("proc/self/cgroup", "5:cpu,cpuacct:/jobs/mine\n4:memory:/jobs/mine\n1:name=systemd:/else\n0::/\n")
    return fake


def test_without_cgroups_it_is_what_the_kernel_reports(fake: FakeMachine) -> None:
    assert available_memory(fake.root) == 8000 * MIB
    assert available_cores(fake.root) == 16
    assert list(control_groups("memory", fake.root)) == []


def test_one_of_several_processes_takes_its_part(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_own_limit", [])
    limit_own_memory(3000 * MIB)
    assert available_memory(fake.root) == 3000 * MIB
    fake.write("proc/self/status", f"VmRSS:\t{900 * 1024} kB\nRssAnon:\t{500 * 1024} kB\nRssFile:\t{400 * 1024} kB\n")
    assert available_memory(fake.root) == 2500 * MIB
    assert available_memory(fake.root, promised=100 * MIB) == 2400 * MIB
    fake.write("proc/meminfo", f"MemAvailable:   {2000 * 1024} kB\n")
    assert available_memory(fake.root) == 2000 * MIB, "others have taken more than their part"


def test_memory_of_version_2_counts_every_ancestor(version_2: FakeMachine) -> None:
    version_2.limit_v2("jobs/mine", limit="max", used=300 * MIB)
    assert available_memory(version_2.root) == 8000 * MIB
    version_2.limit_v2("jobs/mine", limit=1600 * MIB, used=700 * MIB, cache=100 * MIB)
    assert available_memory(version_2.root) == 1000 * MIB
    version_2.limit_v2("jobs", limit=2000 * MIB, used=1900 * MIB)
    assert available_memory(version_2.root) == 100 * MIB
    version_2.limit_v2("jobs", limit=2000 * MIB, used=2100 * MIB)
    assert available_memory(version_2.root) == 0
    version_2.limit_v2("jobs", limit="max")
    version_2.write("sys/fs/cgroup/jobs/mine/memory.high", f"{900 * MIB}\n")
    assert available_memory(version_2.root) == 300 * MIB


def test_memory_of_version_1_counts_every_ancestor(version_1: FakeMachine) -> None:
    folder = "sys/fs/cgroup/memory/jobs"
    for path, limit, used, cache in ((folder, 1200, 900, 50), (f"{folder}/mine", 1000, 500, 0)):
        version_1.write(f"{path}/memory.limit_in_bytes", limit * MIB)
        version_1.write(f"{path}/memory.usage_in_bytes", used * MIB)
        version_1.write(f"{path}/memory.stat", f"inactive_file 99\ntotal_inactive_file {cache * MIB}\n")
    assert available_memory(version_1.root) == 350 * MIB
    version_1.write(f"{folder}/memory.limit_in_bytes", 9223372036854771712)  # the word of version 1 for no limit
    assert available_memory(version_1.root) == 500 * MIB


@pytest.mark.parametrize("path", ["/docker/abc/inner", "/inner", "/../other"])
def test_a_container_sees_its_cgroup_as_the_root_of_the_mount(fake: FakeMachine, path: str) -> None:
    inside = "/docker/abc" if path.startswith("/docker") else "/"
    fake.mount("cgroup2", "/sys/fs/cgroup", inside=inside)
    fake.write("proc/self/cgroup", f"0::{path}\n")
    fake.limit_v2("", limit=500 * MIB, used=100 * MIB)
    fake.limit_v2("inner", limit=300 * MIB, used=100 * MIB)
    assert available_memory(fake.root) == (400 if path == "/../other" else 200) * MIB


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 16), ("150000 100000", 2), ("20000 100000", 1)])
def test_cores_of_version_2(version_2: FakeMachine, quota: str, cores: int) -> None:
    version_2.write("sys/fs/cgroup/jobs/mine/cpu.max", f"{quota}\n")
    assert available_cores(version_2.root) == cores
    version_2.write("sys/fs/cgroup/jobs/mine/cpu.max", "max 100000\n")
    version_2.write("sys/fs/cgroup/jobs/cpu.max", f"{quota}\n")
    assert available_cores(version_2.root) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 16), (350_000, 4), (1_000, 1)])
def test_cores_of_version_1(version_1: FakeMachine, quota: int, cores: int) -> None:
    version_1.write("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us", quota)
    version_1.write("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us", 100_000)
    assert available_cores(version_1.root) == cores


def test_affinity_counts(version_2: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5})
    version_2.write("sys/fs/cgroup/jobs/cpu.max", "400000 100000\n")
    assert available_cores(version_2.root) == 2


def test_files_that_say_nothing_are_no_limit(version_2: FakeMachine) -> None:
    version_2.write("sys/fs/cgroup/jobs/mine/memory.max", "a lot\n")
    version_2.write("sys/fs/cgroup/jobs/mine/cpu.max", "\n")
    version_2.write("proc/self/mountinfo", "what - is\n\n" + (version_2.root / "proc/self/mountinfo").read_text())
    assert available_memory(version_2.root) == 8000 * MIB
    assert available_cores(version_2.root) == 16


@pytest.mark.parametrize(("kind", "left"), [("RLIMIT_AS", 400), ("RLIMIT_DATA", 450)])
def test_ulimit_counts(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, kind: str, left: int) -> None:
    limited = getattr(machine.resource, kind)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda k: (500 * MIB if k == limited else -1, -1))
    assert available_memory(fake.root) == left * MIB


def test_ulimit_of_a_real_process() -> None:
    code = (
        "import resource; from genssd.engine.host.machine import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, -1))\n"
        "before = available_memory(); kept = bytearray(512 << 20)\n"
        "print(before, before - available_memory())"
    )
    before, taken = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 0 < before < 3 << 30
    assert abs(taken - (512 << 20)) < 8 << 20


def test_promised_memory_counts_where_it_is_not_counted_as_used(
    version_2: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_2.limit_v2("jobs/mine", limit=1000 * MIB, used=100 * MIB)
    assert available_memory(version_2.root, promised=300 * MIB) == 600 * MIB
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (900 * MIB, -1))  # 100 MiB are allocated
    assert available_memory(version_2.root, promised=50 * MIB) == 800 * MIB


def test_the_processor_is_read_from_its_first_entry(fake: FakeMachine) -> None:
    assert machine.read_cpu_name(fake.root) == "unknown"
    assert machine.read_cpu_features(fake.root) == frozenset()
    entry = "processor\t: {}\nmodel name\t: {}\nflags\t\t: fpu avx2 {}\n\n"
    fake.write("proc/cpuinfo", entry.format(0, "Some CPU @ 2 GHz", "amx_bf16") + entry.format(1, "Other", "x"))
    assert machine.read_cpu_name(fake.root) == "Some CPU @ 2 GHz"
    assert machine.read_cpu_features(fake.root) == {"fpu", "avx2", "amx_bf16"}
