"""Processor time and memory of a process and of all below it, as Linux tells them in /proc."""

import os
from pathlib import Path

_PROC = Path("/proc")


def below(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    found: list[int] = []
    for child in _children(pid):
        found += [child, *below(child)]
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of processes that live, in a clock tick's precision; of those that ended since, nothing."""
    ticks = 0
    for pid in pids:
        fields = _read(pid, "stat").rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(pids: list[int]) -> float:
    """Memory of processes; what several share counts once in all (PSS), or where that cannot be read, each time."""
    return sum(_pss_kib(pid) or _rss_kib(pid) for pid in pids) / 1024


def _children(pid: int) -> list[int]:
    tasks = _PROC / str(pid) / "task"
    try:
        return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []


def _pss_kib(pid: int) -> int:
    return _kib(_read(pid, "smaps_rollup"), "Pss:")


def _rss_kib(pid: int) -> int:
    return _kib(_read(pid, "status"), "VmRSS:")


def _kib(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def _read(pid: int, name: str) -> str:
    try:
        return (_PROC / str(pid) / name).read_text()
    except OSError:  # it has ended, or may not be read
        return ""
