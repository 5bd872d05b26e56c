"""Which rows of a batch select what they read: readers' rows, from what the scheduler said and vLLM's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_plugins.decode.base import Reader
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.schedule import Prepare, Read, Watch
from kvcache.compressor import Compressor
from kvcache.evidence import LayerEvidence
from kvcache.observers.window import QueryWindow
from kvcache.tables import PageTables, to_device

_FIELDS = ("slots", "modes", "tokens", "starts", "places", "pooling", "thresholds")


@dataclass(frozen=True)
class Selection:
    """What a CUDA graph with a selector in it fixes: whose kernels run, and what `Reader.whole` said."""

    selector: str
    whole: int

    def __str__(self) -> str:
        return f"{self.selector} {self.whole}"


@dataclass(frozen=True)
class SelectedRows:
    """Rows of a batch that one selector's reader attends.

    Attributes:
        whole: see `Reader.whole`.
        tokens: int64 [n], their query tokens' places in the batch; None where these are its first n, in order.
    """

    reader: Reader
    rows: DecodeRows
    whole: int
    tokens: torch.Tensor | None


class Selecting:
    """A worker's selectors: their readers, and the rows of each step.

    Attributes:
        readers: of the selectors that the server has enabled, by name.
        reads: what the step's requests read, those that read everything left out.
        windows: of prompts that run, the last queries, until a reader has selected by them.
        fixed: rows that CUDA graphs read, int32 [fields, rows], written before each replay.
    """

    def __init__(self, compressor: Compressor, readers: Mapping[str, Reader], caches: Sequence[LayerCache]) -> None:
        self.compressor, self.readers, self.caches = compressor, dict(readers), list(caches)
        self.reads: dict[str, Read] = {}
        self.windows: dict[str, QueryWindow] = {}
        rows = max((reader.place.rows for reader in readers.values()), default=0)
        self.fixed = torch.zeros(len(_FIELDS), rows, dtype=torch.int32, device=compressor.pages.device)

    @property
    def tables(self) -> PageTables:
        return self.compressor.tables

    def watch(self, order: Watch) -> None:
        """A prompt begins whose last queries are wanted."""
        layers = self.tables.geometry.num_layers
        self.windows[order.request_id] = QueryWindow(layers, order.end - order.first, order.end)

    def windows_of(self, request_id: str) -> tuple[QueryWindow, ...]:
        """What watches the request's prompt; empty where its queries aren't needed (any more)."""
        window = self.windows.get(request_id)
        return (window,) if window else ()

    def finish(self, request_id: str) -> None:
        """Forget a request; an unknown one is no error."""
        self.windows.pop(request_id, None)

    def prepare(self, order: Prepare) -> None:
        """Show a reader a request's cache, and the window on its prompt where there is one.

        Raises:
            RuntimeError: queries of the window were not seen: a bug, never a request's fault.
        """
        tables, slot = self.tables, self.compressor.slot(order.request_id)
        blocks = to_device(torch.tensor(order.blocks), self.compressor.pages.device)
        g = tables.geometry
        if slot is None:
            pages = tables.prompt_pages(blocks)
            lengths = torch.full((g.num_layers, g.num_kv_heads), order.tokens)
        else:
            counts = self.compressor.page_counts(order.request_id)
            pages = tables.answer_pages(slot, counts, blocks)
            lengths = counts * g.page_size + order.tokens - order.first_block * g.page_size
        reader = self.readers[order.selector]
        reader.prepare(pages, lengths, self.caches, order.place)
        if (window := self.windows.pop(order.request_id, None)) is None:
            return
        if window.missing or window.end > order.tokens:
            raise RuntimeError(f"{window.missing} of the last queries of request {order.request_id} were not seen")
        # Behind the prompt there may be a part of the answer: replayed after a preemption, or read whole.
        pages = pages[..., : -(-window.end // g.page_size)]

        def evidence(layer: int) -> LayerEvidence:
            observed = {window.name: window.found(layer)}
            return self.compressor.evidence(layer, pages[layer], window.end, observed)

        reader.open(self.reads[order.request_id], pages, evidence)

    def graphs(self) -> list[tuple[Selection, int]]:
        """Every kind of graph that a step may want, and the largest batch."""
        found = []
        for name, reader in self.readers.items():
            answers = {reader.whole(Mode(bits)) for bits in range(1, 2 * max(Mode))}
            found += [(Selection(name, whole), reader.place.rows) for whole in sorted(answers)]
        return found

    def graph(self, scheduled: Mapping[str, int]) -> Selection | None:
        """The graph that could run a step with these requests (and tokens of each): one selector, one token each."""
        names = {read.selector for read in self.reads.values()}
        if len(names) != 1 or set(scheduled.values()) != {1} or len(scheduled) > self.fixed.shape[1]:
            return None
        (name,) = names
        return Selection(name, self.readers[name].whole(self._modes(len(scheduled) > len(self.reads))))

    def _modes(self, others: bool) -> Mode:
        """Of all rows of a graph; requests that select nothing are read whole there."""
        modes = Mode.DENSE if others else Mode(0)
        for read in self.reads.values():
            modes |= read.mode
        return modes

    @torch.inference_mode()
    def warm_up(self, max_blocks: int) -> None:
        """Let every reader do all it can over rows that hold no request, so that no request waits for a compiler.

        Args:
            max_blocks: of the longest request, width of vLLM's block table.
        """
        for name, reader in self.readers.items():
            place, device = reader.place, reader.place.device
            shape = 1, place.geometry.num_kv_heads, place.group, place.geometry.head_dim
            fields = torch.zeros(len(_FIELDS), 1, dtype=torch.int32, device=device)
            fields[0] = fields[_FIELDS.index("places")] = -1
            lengths = torch.zeros(1, dtype=torch.int32, device=device)
            table = torch.zeros(1, max_blocks, dtype=torch.int32, device=device)
            rows, out = self._rows(fields, lengths, table), torch.empty(shape, dtype=place.dtype, device=device)
            for selection, _ in self.graphs():
                if selection.selector == name:
                    for cache in self.caches:
                        reader.read(out, out.clone(), rows, cache, selection.whole)

    def mask(self, names: Sequence[str]) -> np.ndarray:
        """Which rows of a batch select: bool [rows]."""
        return np.fromiter((name in self.reads for name in names), dtype=bool, count=len(names))

    def apart(self, common: CommonAttentionMetadata, names: Sequence[str], slots: np.ndarray) -> list[SelectedRows]:
        """The batch's selecting rows, selector by selector.

        Args:
            slots: int32 [rows], page tables; -1 for rows that aren't compacted.
        """
        found = []
        starts = common.query_start_loc_cpu.numpy()
        device = common.seq_lens.device
        for selector in dict.fromkeys(self.reads[name].selector for name in names if name in self.reads):
            chosen = [
                index
                for index, name in enumerate(names)
                if name in self.reads and self.reads[name].selector == selector
            ]
            fields = self._fields([names[index] for index in chosen], slots[chosen])
            at = to_device(torch.tensor(chosen), device)
            rows = self._rows(
                to_device(torch.from_numpy(fields), device), common.seq_lens[at], common.block_table_tensor[at]
            )
            modes = Mode(0)
            for index in chosen:
                modes |= self.reads[names[index]].mode
            reader = self.readers[selector]
            tokens = to_device(torch.from_numpy(starts[chosen].astype(np.int64)), device)
            found.append(SelectedRows(reader, rows, reader.whole(modes), tokens))
        return found

    def fill(
        self,
        selection: Selection,
        common: CommonAttentionMetadata,
        names: Sequence[str],
        slots: np.ndarray,
        send: Callable[[np.ndarray, torch.Tensor], None],
    ) -> SelectedRows:
        """Fill what a FULL graph reads: all rows of the batch; without `names`, at a capture, there are none.

        Args:
            send: copies an array of the host into a tensor without waiting.
        """
        size = self.fixed.shape[1]
        fields = np.zeros((len(_FIELDS), size), dtype=np.int32)
        fields[0], fields[4] = -1, -1
        fields[:, : len(names)] = self._fields(names, slots)
        send(fields, self.fixed)
        n = common.num_reqs
        rows = self._rows(self.fixed[:, :n], common.seq_lens[:n], common.block_table_tensor[:n])
        return SelectedRows(self.readers[selection.selector], rows, selection.whole, None)

    def _fields(self, names: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """What rows are to kernels beside vLLM's metadata: int32 [fields, rows]."""
        fields = np.zeros((len(_FIELDS), len(names)), dtype=np.int32)
        size, start = self.tables.geometry.page_size, 0
        for index, (name, slot) in enumerate(zip(names, slots, strict=True)):
            at = self.tables.identity if slot < 0 else slot
            read = self.reads.get(name)
            if read is None:
                fields[:6, index] = at, Mode.DENSE, 0, 0, -1, 0
                continue
            fields[:6, index] = at, read.mode, read.tokens, start, read.place, read.pooling
            fields[6, index] = np.float32(read.threshold).view(np.int32)
            start += -(-read.context // size) * size
        return fields

    def _rows(self, fields: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor) -> DecodeRows:
        slots, modes, tokens, starts, places, pooling, thresholds = fields
        return DecodeRows(
            self.tables,
            slots,
            seq_lens,
            block_table,
            modes,
            tokens,
            starts,
            places,
            pooling,
            thresholds.view(torch.float32),
        )
