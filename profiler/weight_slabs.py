"""Blocks of rows of all experts in all layers: what is read next, and how it becomes float32."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import torch
from torch import Tensor

from moescope.profiler.fp8 import decode

Part = Literal["gate", "up", "down"]

PARTS: Final[tuple[Part, ...]] = ("gate", "up", "down")
#: Parts that are read side by side, since what a neuron's gate and up have in common is measured too.
GROUPS: Final[tuple[tuple[Part, ...], ...]] = (("gate", "up"), ("down",))
#: Bytes of an expert's rows in a block beyond which reading in one piece gains nothing.
_PIECE: Final = 1 << 18
#: And below which it costs more than the bytes do.
_SHORT: Final = 1 << 14
_ALIGNED: Final = 64
#: Least weights of an expert in a row that are worked on at a time.
_UNIT: Final = 128
#: Weights read of each expert by a sketch, at least.
SKETCH: Final = 1 << 14


class WeightScale(Protocol):
    """Factors of a quantised matrix: W[i, j] = q[i, j] · values[(first + i) // block[0], j // block[1]]."""

    @property
    def values(self) -> Tensor:
        """(R, C) float32."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a factor."""

    @property
    def first(self) -> int:
        """Rows of the first block that come before the matrix."""


class WeightSource(Protocol):
    """Experts and routers of some layers of one shape, read piece by piece.

    Attributes:
        model: Name of the checkpoint.
        architecture: Name of the model's class.
        layers: True model indices, ascending.
        experts: E, routed experts of each layer.
        hidden: H, width of the model.
        width: F, width of an expert.
        dtypes: Element types of the experts, as the files name them.
        bytes_total: Bytes of the layers' experts on disk.
    """

    model: str
    architecture: str
    layers: tuple[int, ...]
    experts: int
    hidden: int
    width: int
    dtypes: tuple[str, ...]
    bytes_total: int

    def router(self, layer: int) -> Tensor:
        """(E, H) float32, the router of a layer."""

    def scale(self, layer: int, expert: int, part: Part) -> WeightScale | None:
        """What a part is to be multiplied with; None if it is not quantised."""

    def stored_as(self, layer: int, expert: int, part: Part) -> tuple[torch.dtype, bool]:
        """Element type of a part on disk, and whether it is stored transposed."""

    def rows(self, layer: int, expert: int, part: Part, start: int, stop: int) -> Tensor:
        """Rows of a part as (F, H) or (H, F), dequantised to float32."""

    def read_into(self, layer: int, expert: int, part: Part, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with rows as they are stored: of the transposed matrix, if it is stored so."""

    def fingerprint(self) -> str:
        """A text that changes when the files do."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows to read of some parts, in all layers and experts; rows on disk, which may be columns of the part.

    Attributes:
        parts: What they are of.
        start: First row.
        stop: Row after the last.
        first: Whether these are the first rows of their parts that are read.
    """

    parts: tuple[Part, ...]
    start: int
    stop: int
    first: bool


@dataclass(frozen=True, slots=True, eq=False)
class PartForm:
    """How one part of all experts is held in memory between reading and arithmetic.

    Attributes:
        part: Which.
        rows: Rows on disk.
        columns: Weights of such a row.
        dtype: As stored where all experts agree in that and in orientation, else float32.
        converted: Whether the reader dequantises, since the experts do not agree.
        transposed: Whether rows on disk are columns of the part.
        scales: (L, E, R, C) float32 factors; None if not quantised.
        block: Rows and columns that share a factor.
        first: Rows of the first block of factors that come before the matrix.
    """

    part: Part
    rows: int
    columns: int
    dtype: torch.dtype
    converted: bool
    transposed: bool
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)
    first: int = 0

    @property
    def neurons_in_rows(self) -> bool:
        """Whether a row on disk is what one hidden neuron has of this part."""
        return (self.part == "down") == self.transposed

    def to(self, device: torch.device) -> "PartForm":
        """The same with its scales on another device."""
        return self if self.scales is None else replace(self, scales=self.scales.to(device))


def part_form(source: WeightSource, part: Part, *, as_is: bool = False) -> PartForm:
    """Find out how a part of all experts can be held, and read its scales.

    Args:
        source: The checkpoint.
        part: Which part.
        as_is: Hold it untransposed, whatever it is on disk; the reader then dequantises where it is transposed.

    Raises:
        ModelError: A file cannot be read any more.
    """
    cells = [(layer, expert) for layer in source.layers for expert in range(source.experts)]
    kinds = {source.stored_as(layer, expert, part) for layer, expert in cells}
    dtype, transposed = next(iter(kinds))
    rows, columns = (source.hidden, source.width) if part == "down" else (source.width, source.hidden)
    converted = PartForm(part, rows, columns, torch.float32, converted=True, transposed=False)
    if len(kinds) > 1 or (as_is and transposed):
        return converted
    if transposed:
        return PartForm(part, columns, rows, dtype, converted=False, transposed=True)
    if dtype != torch.float8_e4m3fn:
        return PartForm(part, rows, columns, dtype, converted=False, transposed=False)
    scales = [source.scale(layer, expert, part) for layer, expert in cells]
    found = [scale for scale in scales if scale is not None]
    if len(found) < len(scales) or len({(scale.block, scale.first, scale.values.shape) for scale in found}) > 1:
        return converted
    values = torch.stack([scale.values for scale in found])
    shape = (len(source.layers), source.experts, *values.shape[1:])
    return PartForm(
        part,
        rows,
        columns,
        dtype,
        converted=False,
        transposed=False,
        scales=values.view(shape),
        block=found[0].block,
        first=found[0].first,
    )


@dataclass(slots=True)
class Slab:
    """The rows of a block, of one part, in all layers and experts.

    Attributes:
        form: How they are held.
        data: (L, E, n, columns) in the form's dtype.
        start: The first row.
    """

    form: PartForm
    data: Tensor
    start: int

    @property
    def rows(self) -> int:
        """Rows held."""
        return int(self.data.shape[2])

    def zeros(self) -> list[tuple[int, int]]:
        """Positions of layers and experts whose weights are all zero in this slab."""
        layers, experts = self.data.shape[:2]
        buffer = torch.empty(layers * self.form.columns, device=self.data.device)
        found = []
        for expert in range(experts):
            begins = self.fill(buffer, slice(None), expert, 0, 1).flatten(1)
            for layer in torch.nonzero(~begins.any(1)).flatten().tolist():
                whole = self.data[layer, expert]
                if not (whole.view(torch.int8) << 1 if whole.dtype == torch.float8_e4m3fn else whole).any():
                    found.append((layer, expert))
        return found

    def fill(
        self,
        out: Tensor,
        layers: int | slice,
        experts: int | slice,
        first: int,
        last: int,
        columns: slice = slice(None),
    ) -> Tensor:
        """Write rows `first` to `last` of this slab to `out` as float32.

        Args:
            out: At least as many float32 as there are weights; overwritten from its beginning.
            layers: One layer, or all.
            experts: One expert, or all.
            first: First row, counted from the slab's.
            last: Row after the last.
            columns: Which columns; they begin and end with a block of factors.

        Returns:
            (…, last - first, columns) float32, a view of `out`; an axis less for one layer or one expert.
        """
        picked = self.data[layers, experts, first:last, columns]
        target = out[: picked.numel()].view(picked.shape)
        if self.form.scales is None:
            return target.copy_(picked)
        decode(picked, target)
        high, wide = self.form.block
        at = (self.form.first + self.start + torch.arange(first, last, device=picked.device)) // high
        across = slice((columns.start or 0) // wide, None)
        factors = self.form.scales[layers, experts][..., at, across]
        whole = target.shape[-1] // wide
        scaled = target[..., : whole * wide]
        scaled.view(*scaled.shape[:-1], whole, wide).mul_(factors[..., :whole, None])
        if target.shape[-1] % wide:
            target[..., whole * wide :].mul_(factors[..., whole : whole + 1])
        return target

    def pieces(self, weights: int) -> list[tuple[int, int, slice]]:
        """First row, row after the last, and columns of pieces of about so many weights of each expert."""
        width = self.form.columns
        if weights >= width:
            step = weights // width
            return [(first, min(first + step, self.rows), slice(0, width)) for first in range(0, self.rows, step)]
        unit = self.form.block[1] if self.form.scales is not None else _UNIT
        step = max(1, weights // unit) * unit
        return [
            (row, row + 1, slice(first, min(first + step, width)))
            for row in range(self.rows)
            for first in range(0, width, step)
        ]


def part_forms(sources: Sequence[WeightSource]) -> list[list[PartForm]]:
    """How gate, up and down of each checkpoint are held: rows on disk are the same coordinates wherever they meet.

    Raises:
        ModelError: A file cannot be read any more.
    """
    found = [[part_form(source, part) for part in PARTS] for source in sources]
    for parts in GROUPS:
        places = [PARTS.index(part) for part in parts]
        if len({forms[place].transposed for forms in found for place in places}) > 1:
            for source, forms in zip(sources, found, strict=True):
                for place in places:
                    forms[place] = part_form(source, PARTS[place], as_is=True)
    return found


def plan(forms: Sequence[Sequence[PartForm]], cells: int, most_bytes: int, *, sketch: bool = False) -> list[Block]:
    """Which rows to read one after another.

    Args:
        forms: Of gate, up and down, by checkpoint.
        cells: Experts in all layers, of each checkpoint.
        most_bytes: What the rows of a block may come to, unless one row is more.
        sketch: Single rows at even distances, of each part as many as its share of `SKETCH` weights.
    """
    total = sum(form.rows * form.columns for form in forms[0])
    blocks = []
    for parts in GROUPS:
        group = [form for own in forms for form in own if form.part in parts]
        rows = group[0].rows
        if sketch:
            count = min(rows, -(-SKETCH * rows // total))
            starts, size = [(2 * i + 1) * rows // (2 * count) for i in range(count)], 1
        else:
            row = sum(form.columns * form.dtype.itemsize for form in group)
            # half of the room will do, unless an expert's piece were too short to be read at speed
            room = min(most_bytes, max(most_bytes // 2, cells * len(group) * _SHORT))
            size = max(1, min(rows, room // (row * cells), len(group) * _PIECE // row))
            starts = list(range(0, rows, size))
        blocks += [Block(parts, start, min(start + size, rows), start == starts[0]) for start in starts]
    return blocks


def weights_of(block: Block, forms: Sequence[PartForm]) -> int:
    """Weights of an expert that a block holds."""
    return sum((block.stop - block.start) * form.columns for form in forms if form.part in block.parts)


class ReadAhead:
    """Blocks as slabs, by checkpoint and part, the next one being read while the caller works on the present one.

    The memory of a block is used again after the next block has been asked for.

    Args:
        sources: Where from.
        forms: How the parts of each checkpoint are to be held.
        blocks: What to read.
        device: Where the slabs are to be.
        readers: Threads that read.
    """

    def __init__(
        self,
        sources: Sequence[WeightSource],
        forms: Sequence[Sequence[PartForm]],
        blocks: Sequence[Block],
        device: torch.device,
        readers: int = 1,
    ) -> None:
        self._sources, self._forms, self._blocks, self._device = sources, forms, blocks, device
        self._thread, self._readers = ThreadPoolExecutor(1, "blocks"), ThreadPoolExecutor(readers, "reader")
        self._memory = [self._allocate(torch.device("cpu")) for _ in range(2)]
        cuda = device.type == "cuda"
        self._there = [self._allocate(device) for _ in range(2)] if cuda else self._memory
        self._stream: Any = None
        if cuda:  # memory of the device may come from tensors that earlier kernels still use
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Block, list[dict[Part, Slab]]]]:
        coming = self._thread.submit(self._read, 0) if self._blocks else None
        for number, block in enumerate(self._blocks):
            assert coming is not None
            slabs = coming.result()
            coming = self._thread.submit(self._read, number + 1) if number + 1 < len(self._blocks) else None
            yield block, slabs

    def _allocate(self, device: torch.device) -> Tensor:
        pinned = self._device.type == "cuda" and device.type == "cpu"
        most = max((sum(self._sizes(block).values()) for block in self._blocks), default=0)
        return torch.empty(most, dtype=torch.uint8, device=device, pin_memory=pinned)

    def _sizes(self, block: Block) -> dict[tuple[int, Part], int]:
        """Bytes of a block by checkpoint and part, each rounded up so that the next one is aligned."""
        return {
            (row, form.part): -(-_size(source, form, block) // _ALIGNED) * _ALIGNED
            for row, (source, forms) in enumerate(zip(self._sources, self._forms, strict=True))
            for form in forms
            if form.part in block.parts
        }

    def _read(self, number: int) -> list[dict[Part, Slab]]:
        block = self._blocks[number]
        memory, there = self._memory[number % 2], self._there[number % 2]
        sizes = self._sizes(block)
        slabs: list[dict[Part, Slab]] = [{} for _ in self._sources]
        position = 0
        for (row, part), space in sizes.items():
            source, form = self._sources[row], next(form for form in self._forms[row] if form.part == part)
            piece = slice(position, position + _size(source, form, block))
            by_layer, there_by_layer = (whole[piece].view(len(source.layers), -1) for whole in (memory, there))
            reading = self._readers.map(_read, *map(repeat, (source, form, block)), source.layers, by_layer)
            for layer, _ in enumerate(reading):
                if self._stream is not None:
                    with torch.cuda.stream(self._stream):
                        there_by_layer[layer].copy_(by_layer[layer], non_blocking=True)
            shape = (len(source.layers), source.experts, block.stop - block.start, form.columns)
            slabs[row][part] = Slab(form, there[piece].view(form.dtype).view(shape), block.start)
            position += space
        if self._stream is not None:
            self._stream.synchronize()
        return slabs


def _size(source: WeightSource, form: PartForm, block: Block) -> int:
    """Bytes of a block of one part in all layers and experts."""
    rows = len(source.layers) * source.experts * (block.stop - block.start)
    return rows * form.columns * form.dtype.itemsize


def _read(source: WeightSource, form: PartForm, block: Block, layer: int, memory: Tensor) -> None:
    """Fill `memory` (uint8) with the rows of a block of one part of a layer, expert by expert."""
    size = (block.stop - block.start) * form.columns * form.dtype.itemsize
    whole = memory.numpy().data
    for expert in range(source.experts):
        place = slice(expert * size, (expert + 1) * size)
        if form.converted:
            rows = source.rows(layer, expert, form.part, block.start, block.stop)
            memory[place].copy_(rows.view(torch.uint8).flatten())
        else:
            source.read_into(layer, expert, form.part, block.start, block.stop, whole[place])
