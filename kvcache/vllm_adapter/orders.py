"""What travels between scheduler and workers, beside vLLM's own messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attention_plugins.decode.schedule import Prepare, Read, Watch
from attention_plugins.prefill.orders import PatternReport, StartPattern
from kvcache.audit import Owned
from kvcache.orders import Compact, CompactionReport, Start

# vLLM's SchedulerOutput and ModelRunnerOutput are plain dataclasses that are passed on whole (or pickled whole), so
# an attribute of ours travels with them.
_ORDERS = "longreach_orders"
_REPORTS = "longreach_reports"


@dataclass
class StepOrders:
    """Orders of one step, carried out before its forward pass, in this order; `reads` is for the forward pass.

    `owned`: of the step's requests, where the step is checked (`--kv-audit`).
    """

    start: list[Start] = field(default_factory=list)
    compact: list[Compact] = field(default_factory=list)
    watch: list[Watch] = field(default_factory=list)
    prepare: list[Prepare] = field(default_factory=list)
    patterns: list[StartPattern] = field(default_factory=list)
    reads: dict[str, Read] = field(default_factory=dict)
    owned: dict[str, Owned] = field(default_factory=dict)

    def __bool__(self) -> bool:
        orders = self.start, self.compact, self.watch, self.prepare, self.patterns, self.reads, self.owned
        return any(map(bool, orders))


Report = CompactionReport | PatternReport


def attach_orders(scheduler_output: Any, orders: StepOrders) -> None:
    setattr(scheduler_output, _ORDERS, orders)


def orders_of(scheduler_output: Any) -> StepOrders | None:
    return getattr(scheduler_output, _ORDERS, None)


def attach_reports(model_runner_output: Any, reports: list[Report]) -> None:
    setattr(model_runner_output, _REPORTS, reports)


def reports_of(model_runner_output: Any) -> list[Report]:
    return getattr(model_runner_output, _REPORTS, [])
