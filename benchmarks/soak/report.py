"""A soak's result in one line and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def problems(result: dict[str, Any], *, memory: bool, canaries: bool) -> list[str]:
    """What is not as it should be.

    Args:
        memory: whether it ran long enough for memory's growth to count.
        canaries: whether all canaries have to answer the same here; else only where no tie explains it.
    """
    found = list(result["failures"])
    for name, told in result["memory"].items():
        if memory and not told["flat"]:
            found.append(f"{name} grew by {told['grown_mib']} MiB in the second half, {told['bound_mib']} are allowed")
    for name, told in result["canaries"].items():
        different = [one for one in told["different"] if canaries or max(one["margin"], one["noise"]) > TIE]
        if different:
            found.append(f"canary {name}: {len(different)} of {told['asked']} answers differ: {different[:3]}")
    return found


TIE = 0.15
"""Difference of log-probabilities up to which another batch may choose another token: a step of bfloat16 logits between
16 and 32 is 0.125, and the denominator moves too."""


def summary(result: dict[str, Any], bad: list[str]) -> str:
    """One line."""
    canaries = result["canaries"].values()
    same, asked = sum(told["same"] for told in canaries), sum(told["asked"] for told in canaries)
    server = result["server"]
    memory = ", ".join(f"{name} {told['mib_per_hour']:+} MiB/h" for name, told in result["memory"].items())
    told = [
        f"{result['seconds'] / 60:.1f} min",
        f"{sum(result['asked'].values())} requests",
        f"{server.get('preemptions', '?')} preemptions",
        f"{sum(server.get('compactions', {}).values())} compactions",
        f"{server.get('audits', '?')} audits",
        f"canaries {same} of {asked} the same",
        f"pool at most {result['pool']['peak']:.0%}, {'not ' if result['pool']['leaked'] else ''}empty at the end",
        f"memory in the second half: {memory or 'too short to say'}",
        f"{len(bad)} problems",
    ]
    return f"{'FAILED' if bad else 'ok'}: {', '.join(told)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Pool and memory over time. Needs matplotlib (`pip install 'longreach[explain]'`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = result["series"]
    minutes = [seconds / 60 for seconds in series["seconds"]]
    figure, (pool, memory) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5.5), layout="constrained")
    pool.fill_between(minutes, [100 * used for used in series["pool"]], step="mid", alpha=0.35, color="#4477aa")
    pool.set(ylabel="KV cache in use, %", ylim=(0, 102), title=f"{result['model']}, {result['device']}")
    requests = pool.twinx()
    requests.plot(minutes, series["running"], color="#cc6677", linewidth=1, label="running")
    requests.plot(minutes, series["waiting"], color="#999933", linewidth=1, label="waiting")
    requests.set(ylabel="requests", ylim=(0, None))
    requests.legend(loc="upper right")
    for name, values in series["memory_mib"].items():
        memory.plot(minutes, values, label=f"{name} ({result['memory'][name]['mib_per_hour']:+} MiB/h)")
    memory.axvline(minutes[-1] / 2, color="grey", linewidth=0.8, linestyle=":")
    memory.set(ylabel="resident memory, MiB", xlabel="minutes", ylim=(0, None))
    memory.legend(loc="center right")
    figure.savefig(path)
    pyplot.close(figure)
