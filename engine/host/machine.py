"""What this process is given of the machine: free memory and processor cores, under the limits of cgroups and ulimit.

A container or a batch system limits a process by cgroups (version 1 or 2, nested), by processor affinity and by
resource limits. /proc/meminfo and os.cpu_count() describe the whole machine and know none of these. All functions take
the root of the file system, so that tests can describe a machine in files.
"""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path("/")
UNLIMITED_V1 = 1 << 60
"""Limits from this number of bytes on mean "no limit" in version 1, which has no word for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlGroup:
    """The files of one cgroup that limits this process by some controller."""

    version: Literal[1, 2]
    directory: Path

    def read(self, name: str) -> str | None:
        """Return the content of a file without white space at its ends; None where there is no such file."""
        try:
            return (self.directory / name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def read_number(self, name: str) -> int | None:
        """Return the integer in a file; None where there is none, as in "max"."""
        return _integer(self.read(name))

    def read_statistic(self, name: str) -> int:
        """Return a value of memory.stat; 0 where it is not listed."""
        for line in (self.read("memory.stat") or "").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return _integer(value) or 0
        return 0


_own_limit: list[int] = []


def limit_own_memory(limit: int) -> None:
    """Let this process take at most so many bytes of memory, as one of several that divide the machine's."""
    _own_limit[:] = [limit]


def available_memory(root: Path = ROOT, *, promised: int = 0) -> int:
    """Return how many bytes of memory this process can still take.

    promised: bytes that are allocated and not written yet, which only ulimit counts as used. The smallest of:
    MemAvailable of the kernel; for its cgroup and every ancestor, the limit minus the use, where page cache that is not
    in active use counts as free; the address space and data segment that ulimit leaves; what `limit_own_memory` leaves,
    where the pages of files that are read, which processes share, do not count.
    """
    free = [_machine_memory(root)]
    free += [limit - _kilobytes(root / "proc/self/status").get("RssAnon", 0) for limit in _own_limit]
    for group in control_groups("memory", root):
        if (bytes_free := _memory_of_group(group)) is not None:
            free.append(bytes_free)
    return max(0, min(min(free) - promised, *_memory_by_ulimit(root)))


def available_cores(root: Path = ROOT) -> int:
    """Return how many cores can run this process at a time, at least 1.

    The smallest of the processor affinity and the processor time (rounded up to whole cores) that its cgroup and every
    ancestor may use.
    """
    cores = [float(_affinity())]
    for group in control_groups("cpu", root):
        if group.version == 2:
            quota, _, period = (group.read("cpu.max") or "max").partition(" ")
        else:
            quota, period = group.read("cpu.cfs_quota_us") or "", group.read("cpu.cfs_period_us") or ""
        microseconds, per = _integer(quota), _integer(period or "100000")
        if microseconds is not None and per and microseconds > 0:
            cores.append(microseconds / per)
    return max(1, math.ceil(min(cores)))


def read_cpu_name(root: Path = ROOT) -> str:
    """Return the processor's name for people, as the kernel tells it; "unknown" where it does not."""
    return _read_cpu_field("model name", root) or "unknown"


def read_cpu_features(root: Path = ROOT) -> frozenset[str]:
    """Return the names of the processor's features, as in /proc/cpuinfo; none where it cannot be read."""
    # the field's name on x86, and on ARM
    return frozenset((_read_cpu_field("flags", root) or _read_cpu_field("Features", root) or "").split())


def _read_cpu_field(name: str, root: Path) -> str | None:
    """Return the value of a field of the first processor in /proc/cpuinfo; None where it has none."""
    for line in _lines(root / "proc/cpuinfo"):
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def control_groups(controller: str, root: Path = ROOT) -> Iterator[ControlGroup]:
    """Yield the cgroups that limit this process by a controller: its own first, then every ancestor in sight."""
    own_paths = list(_own_paths(controller, root))
    for version, mount_root, mount_point in _mounts(controller, root):
        for version_here, path in own_paths:
            if version_here != version:
                continue
            top = root / mount_point.lstrip("/")
            # a container sees its own cgroup as the root of the mount; a path outside of the mount is that root
            inside = ".." if path.startswith("/..") else os.path.relpath(path, mount_root)
            directory = top if inside.startswith("..") else top / inside
            while True:
                yield ControlGroup(version=version, directory=directory)
                if directory == top:
                    break
                directory = directory.parent


def _own_paths(controller: str, root: Path) -> Iterator[tuple[Literal[1, 2], str]]:
    """Yield version and path of this process's cgroups that may have the controller, from /proc/self/cgroup."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(controller: str, root: Path) -> Iterator[tuple[Literal[1, 2], str, str]]:
    """Yield version, root inside the file system and mount point of the cgroup file systems with the controller."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, separator, after = line.partition(" - ")
        fields, options = before.split(" "), after.split(" ")
        if not separator or len(fields) < 5 or len(options) < 3:
            continue
        place, point = _unescape(fields[3]), _unescape(fields[4])
        if options[0] == "cgroup2":
            yield 2, place, point
        elif options[0] == "cgroup" and controller in options[2].split(","):
            yield 1, place, point


def _memory_of_group(group: ControlGroup) -> int | None:
    """Return the limit of a cgroup minus its use; None where it has no limit."""
    if group.version == 2:
        # above memory.high the kernel slows the process down until it stands still
        limits = [group.read_number("memory.max"), group.read_number("memory.high")]
        used, reclaimable = group.read_number("memory.current"), group.read_statistic("inactive_file")
    else:
        limits = [group.read_number("memory.limit_in_bytes")]
        used, reclaimable = group.read_number("memory.usage_in_bytes"), group.read_statistic("total_inactive_file")
    known = [limit for limit in limits if limit is not None and limit < UNLIMITED_V1]
    return min(known) - (used or 0) + reclaimable if known else None


def _memory_by_ulimit(root: Path) -> tuple[int, int]:
    """Return what the limits of address space (ulimit -v) and data segment (ulimit -d) leave to this process."""
    used = _kilobytes(root / "proc/self/status")

    def left(limit: int, name: str) -> int:
        soft, _ = resource.getrlimit(limit)
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft - used.get(name, 0)

    return left(resource.RLIMIT_AS, "VmSize"), left(resource.RLIMIT_DATA, "VmData")


def _machine_memory(root: Path) -> int:
    """Return the kernel's estimate of the memory that can be taken without swapping; half of all where it has none."""
    estimate = _kilobytes(root / "proc/meminfo").get("MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if estimate is None else estimate


def _affinity() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kilobytes(path: Path) -> dict[str, int]:
    """Return the sizes of a file of lines "Name:   123 kB", in bytes."""
    pattern = re.compile(r"(\w+):\s+(\d+) kB")
    return {match[1]: int(match[2]) * 1024 for line in _lines(path) if (match := pattern.fullmatch(line))}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _unescape(text: str) -> str:
    """Return a path of mountinfo with its octal escapes, such as \\040 for a blank, replaced."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
