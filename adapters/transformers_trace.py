"""Tracing inside transformers: the tokens that count in each forward, on their way to the trace's writer."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.trace_rows import arrival, on_host
from moescope.adapters.transformers_forward import Forward
from moescope.adapters.transformers_hooks import DECODE, PREFILL
from moescope.profiler.engine import Request
from moescope.profiler.recorder import Recorder
from moescope.profiler.trace import TraceRows
from moescope.profiler.trace_writer import TraceWriter

#: Bytes handed over at a time, so that a long forward does not need all of its rows in memory twice.
_PIECE: Final = 4 << 20


class BatchTrace:
    """Traces one batch: `select` before a forward is counted, `append` after.

    Args:
        writer: Where rows go; says which requests are traced.
        recorder: Holds what the layers routed.
        requests: The rows of the batch.
        mask: bool (B, S) on the CPU, the prompts' tokens among their columns.
        max_tokens: Tokens to generate at most.
    """

    def __init__(
        self, writer: TraceWriter, recorder: Recorder, requests: Sequence[Request], mask: Tensor, max_tokens: int
    ) -> None:
        self._writer = writer
        self._recorder = recorder
        self._prompt_columns = mask.shape[1]
        self._place = mask.cumsum(dim=1) - 1
        self._lengths = mask.sum(dim=1)
        self._numbers = np.array([request.number for request in requests], np.uint32)
        self._domains = np.array([request.domain for request in requests], np.uint8)
        self._splits = np.array([request.split for request in requests], np.uint8)
        most = self._lengths + max(max_tokens - 1, 0)
        self._chosen = torch.from_numpy(writer.admit(self._numbers.tolist(), most.tolist()))
        columns = writer.about.columns
        self._types = {
            name: getattr(torch, columns[name][0].name) for name in ("experts", "weights") if name in columns
        }
        tops = torch.tensor(writer.about.model.top_k, device=recorder.device)
        choice = torch.arange(max(writer.about.model.top_k), device=recorder.device)
        self._unused = choice[None, :] >= tops[:, None]  # (L, K)
        self._kept: Tensor | None = None
        self._columns: dict[str, NDArray[Any]] = {}
        self._tokens = torch.empty(0, dtype=torch.int32)

    def select(self, forward: Forward, counted: Tensor) -> None:
        """Note whose tokens a forward counts; `counted`: bool (B, S) on the CPU."""
        row, column = counted.nonzero(as_tuple=True)
        self._kept = None
        if not bool(self._chosen.all()):
            self._kept = self._chosen[row].nonzero().squeeze(1)
            row, column = row[self._kept], column[self._kept]
        assert forward.ids is not None  # the engine gives token ids
        ids = forward.ids
        self._tokens = ids[row.to(ids.device), column.to(ids.device)].int()
        whole = column + forward.past
        late = whole >= self._prompt_columns
        position = torch.where(
            late,
            self._lengths[row] + whole - self._prompt_columns,
            self._place[row, whole.clamp(max=self._prompt_columns - 1)],
        )
        owner = row.numpy()
        self._columns = {
            "request": self._numbers[owner],
            "position": position.numpy().astype(np.uint32),
            "domain": self._domains[owner],
            "phase": np.where(late.numpy(), DECODE, PREFILL).astype(np.uint8),
            "split": self._splits[owner],
        }

    @torch.no_grad()
    def append(self, cache: Any) -> None:
        """Hand over what the forward routed."""
        ids, weights = self._recorder.staged()
        if self._kept is not None:
            kept = self._kept.to(ids.device)
            ids, weights = ids.index_select(1, kept), weights.index_select(1, kept)
        routed = {"experts": ids, "weights": weights}
        rows = max(1, _PIECE // self._writer.about.row_bytes)
        for start in range(0, len(self._tokens), rows):
            part = slice(start, start + rows)
            tensors = {"token": self._tokens[part]}
            for name, kind in self._types.items():
                used = routed[name][:, part].masked_fill(self._unused[:, None], 0)
                tensors[name] = used.transpose(0, 1).to(kind).contiguous()
            arrays = {name: array[part] for name, array in self._columns.items()}
            moved = {name: on_host(tensor) for name, tensor in tensors.items()}
            self._writer.append(TraceRows(**arrays, **moved), arrival(ids.device))
