"""What the machine at hand has to offer."""

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes that this process can still take without swapping or meeting its container's limit."""
    free = _meminfo().get("MemAvailable")
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return max(free, 0)


def peak_memory() -> int:
    """Most bytes that this process ever had resident at once."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows, which has no /proc either: there this says so

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _meminfo() -> dict[str, int]:
    fields = (line.split() for line in _lines(Path("/proc/meminfo")))
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in fields}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
