"""The memory of a server's processes over time, from /proc."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20


def tree(root: int) -> dict[str, int]:
    """A process and those that it started, by name: `{"VLLM::EngineCore": pid}`; several of a name are numbered."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found: dict[str, int] = {"API": root}
    for process in sorted(parents):
        above: int | None = process
        while above is not None and above != root:
            above = parents.get(above)
        if above is None or process == root or "resource_tracker" in names[process]:
            continue
        name = names[process].split(" ")[0].rpartition("/")[2].removeprefix("VLLM::") or "process"
        while name in found:
            name += "'"
        found[name] = process
    return found


def resident(process: int) -> float | None:
    """MiB of memory that a process has of its own and shares; None: it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def parts(process: int) -> dict[str, float]:
    """MiB of a process' resident memory by what it is; empty: it is gone.

    `heap` is the C library's; `anonymous` what was mapped for large tensors, threads' heaps and stacks; `mapped` files,
    most of them libraries, and shared memory.
    """
    found = {"heap": 0.0, "anonymous": 0.0, "mapped": 0.0}
    kind = ""
    try:
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            words = line.split()
            if words[0] == "Rss:":
                found[kind] += int(words[1]) / 1024
            elif not words[0].endswith(":"):  # a mapping's addresses, rights, offset, device, inode and, maybe, name
                name = words[5] if len(words) > 5 else ""
                kind = "heap" if name == "[heap]" else "mapped" if name.startswith("/") else "anonymous"
    except OSError:
        return {}
    return {kind: round(size, 1) for kind, size in found.items()}


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the line through these points, by least squares: units of values per unit of time; 0 where there is none."""
    mean_t, mean_v = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_t) ** 2 for time in times)
    return sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread if spread else 0.0
