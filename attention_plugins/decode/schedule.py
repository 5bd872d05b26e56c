"""What each request's step reads, decided where steps are scheduled. Knows no vLLM and no tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from attention_plugins.decode.base import Selector
from attention_plugins.decode.rows import Mode

CROWDED = "crowded"
"""Steps that read everything because the step's other requests had taken what there is room for."""


def _name(mode: Mode) -> str:
    """Of what a step does, for usage."""
    return "select" if mode & Mode.SELECT else str(mode.name).lower()


@dataclass(frozen=True)
class Read:
    """One request's part of a step, for workers.

    Attributes:
        context: logical length, the step's token included.
        tokens: K.
        pooling, threshold: see `DecodeRows`.
        place: of its state; -1 for selectors that keep none.
        pinned: see `Selector.pinned`.
        prepare: whether the reader has to see its cache first. Not for workers.
    """

    request_id: str
    selector: str
    mode: Mode
    context: int
    tokens: int
    threshold: float
    place: int
    pooling: int = 0
    pinned: int = 0
    prepare: bool = False


@dataclass(frozen=True)
class Prepare:
    """A reader is to see a request's cache: its prompt is done, or it was compacted, or it starts again.

    Attributes:
        blocks: vLLM's block ids from `first_block` on.
        first_block: logical number of the first of them; before it there is what the request's page table has.
        tokens: logical length.
    """

    request_id: str
    selector: str
    place: int
    blocks: list[int]
    first_block: int
    tokens: int


@dataclass(frozen=True)
class Watch:
    """A prompt begins whose last queries a reader is to select by: those of positions `first ... end - 1`."""

    request_id: str
    first: int
    end: int


@dataclass
class _Request:
    selector: Selector
    place: int | None
    since: int | None = None
    prepared: bool = False
    watched: int | None = None
    steps: Counter[str] = field(default_factory=Counter)


class ReadSchedule:
    """Modes and per-request states of all requests that have a selector.

    `start` -> `begin_step` and `plan` for each step with one new token -> (`forget` when what was selected is gone) ->
    `finish`.

    Attributes:
        totals: steps since the start, by selector and by the names of `usage`; they only grow.
    """

    def __init__(self, *, states: int, capacity: int, page_size: int) -> None:
        """
        Args:
            states: most requests that workers keep state of, and most rows of a step that select.
            capacity: most tokens, in whole pages, of these rows.
            page_size: tokens per page.
        """
        self.rows, self.capacity, self.page_size = states, capacity, page_size
        self.totals: dict[str, Counter[str]] = {}
        self._free = list(range(states - 1, -1, -1))
        self._requests: dict[str, _Request] = {}
        self._rows_left = self._left = 0

    def start(self, request_id: str, selector: Selector) -> None:
        """A request with a selector is there."""
        self._requests[request_id] = _Request(selector, None)

    def selector(self, request_id: str) -> Selector | None:
        request = self._requests.get(request_id)
        return request.selector if request else None

    def watch(self, request_id: str, prompt_len: int) -> Watch | None:
        """Which queries of a prompt that isn't compacted workers have to keep; to be asked each time it begins."""
        request = self._requests.get(request_id)
        first = self.first_query(request_id, prompt_len)
        if request is None or first is None:
            return None
        request.watched = prompt_len
        return Watch(request_id, first, prompt_len)

    def first_query(self, request_id: str, prompt_len: int) -> int | None:
        """The first position of a prompt whose query is wanted; None where none is."""
        selector = self.selector(request_id)
        if selector is None or not selector.window or selector.mode(prompt_len + 1, 0) is Mode.DENSE:
            return None
        return prompt_len - selector.window

    def forget(self, request_id: str) -> None:
        """What was selected, or prepared, isn't where it was: after a compaction, or a preemption."""
        if request := self._requests.get(request_id):
            request.since, request.prepared = None, False

    def finish(self, request_id: str) -> None:
        """An unknown request is no error."""
        request = self._requests.pop(request_id, None)
        if request and request.place is not None:
            self._free.append(request.place)

    def begin_step(self) -> None:
        self._rows_left, self._left = self.rows, self.capacity

    def plan(self, request_id: str, context: int, held: int) -> Read | None:
        """What this request's step reads; None where it reads everything.

        Args:
            context: its tokens, the step's own included.
            held: how many of them a KV head has on average: less where the request is compacted.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        selector = request.selector
        since = 0 if request.watched == context - 1 else request.since
        mode = selector.mode(held, since)
        if mode is not Mode.DENSE and not self._has_room(request, context):
            mode, name = Mode.DENSE, CROWDED
        else:
            name = _name(mode)
        request.steps[name] += 1
        self.totals.setdefault(selector.name, Counter())[name] += 1
        if mode is Mode.DENSE:
            request.since, request.prepared = None, False  # tokens came that nobody took note of
            return None
        request.since = 1 if mode & Mode.SELECT or request.since is None else request.since + 1
        prepare, request.prepared = since == 0 or (selector.prepares and not request.prepared), True
        place = -1 if request.place is None else request.place
        own = selector.args.tokens, selector.threshold, place, selector.pooling, selector.pinned
        return Read(request_id, selector.name, mode, context, *own, prepare)

    def _has_room(self, request: _Request, context: int) -> bool:
        """Take this row's part of what workers have for a step, and for a request."""
        needed = -(-context // self.page_size) * self.page_size
        if needed > self._left or not self._rows_left:
            return False
        if request.selector.wants_state and request.place is None:
            if not self._free:
                return False
            request.place = self._free.pop()
        self._left -= needed
        self._rows_left -= 1
        return True

    def usage(self, request_id: str) -> dict[str, int]:
        """How many steps did what, by the names of `Mode` in lower case and `CROWDED`."""
        request = self._requests.get(request_id)
        return dict(request.steps) if request else {}
