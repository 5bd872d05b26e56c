"""What each request's step reads, decided where steps are scheduled. Knows no vLLM and no tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from attention_plugins.decode.base import Selector
from attention_plugins.decode.rows import Mode

CROWDED = "crowded"
"""Steps that read everything because the step's other requests had taken what there is room for."""


@dataclass(frozen=True)
class Read:
    """One request's part of a step, for workers."""

    request_id: str
    selector: str
    mode: Mode
    context: int
    tokens: int
    threshold: float
    place: int


@dataclass
class _Request:
    selector: Selector
    place: int | None
    since: int | None = None
    steps: Counter[str] = field(default_factory=Counter)


class ReadSchedule:
    """Modes and per-request states of all requests that have a selector.

    `start` -> `plan` for each step with one new token -> (`forget` when what was selected is gone) -> `finish`.

    Args:
        states: most requests that workers keep state of.
        capacity: most tokens, in whole pages, of all rows of a step that select.
        page_size: tokens per page.
    """

    def __init__(self, *, states: int, capacity: int, page_size: int) -> None:
        self.capacity, self.page_size = capacity, page_size
        self._free = list(range(states - 1, -1, -1))
        self._requests: dict[str, _Request] = {}
        self._left = 0

    def start(self, request_id: str, selector: Selector) -> None:
        """A request starts, or starts again after preemption: nothing is selected yet."""
        if request := self._requests.get(request_id):
            request.since = None
            return
        self._requests[request_id] = _Request(selector, None)

    def selector(self, request_id: str) -> Selector | None:
        request = self._requests.get(request_id)
        return request.selector if request else None

    def forget(self, request_id: str) -> None:
        """What was selected isn't where it was."""
        if request := self._requests.get(request_id):
            request.since = None

    def finish(self, request_id: str) -> None:
        """An unknown request is no error."""
        request = self._requests.pop(request_id, None)
        if request and request.place is not None:
            self._free.append(request.place)

    def begin_step(self) -> None:
        self._left = self.capacity

    def plan(self, request_id: str, context: int) -> Read | None:
        """What this request's step reads; None where it reads everything.

        Args:
            context: its tokens, the step's own included.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        mode = request.selector.mode(context, request.since)
        if mode is not Mode.DENSE and not self._has_room(request, context):
            mode, name = Mode.DENSE, CROWDED
        else:
            assert mode.name
            name = mode.name.lower()
        request.steps[name] += 1
        if mode is Mode.SELECT:
            request.since = 1
        elif mode is Mode.DENSE:
            request.since = None  # tokens came that no list knows
            return None
        elif request.since is not None:
            request.since += 1
        place = -1 if request.place is None else request.place
        selector = request.selector
        return Read(request_id, selector.name, mode, context, selector.args.tokens, selector.threshold, place)

    def _has_room(self, request: _Request, context: int) -> bool:
        """Take this row's part of what workers have for a step, and for a request."""
        needed = -(-context // self.page_size) * self.page_size
        if needed > self._left:
            return False
        if request.selector.keeps_state and request.place is None:
            if not self._free:
                return False
            request.place = self._free.pop()
        self._left -= needed
        return True

    def usage(self, request_id: str) -> dict[str, int]:
        """How many steps did what, by the names of `Mode` in lower case and `CROWDED`."""
        request = self._requests.get(request_id)
        return dict(request.steps) if request else {}
