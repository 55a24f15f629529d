"""Sums over the weights of a checkpoint: what each needs of a block of rows, and what it keeps."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from moescope.profiler.weight_features import Probes
from moescope.profiler.weight_slabs import PARTS, Part, PartForm, Slab

Task = Callable[[], None]
#: Weights worked on at a time: on a CPU few enough for the shared cache, and enough that threads seldom wait for one
#: another between operations; measured on two cores.
_CHUNK: Final = {"cpu": 1 << 20, "cuda": 1 << 25}
#: And of each expert at most: products may be added up one after another, and of 2^17 squares so added float32 keeps no
#: more than 1e-5.
_LONGEST: Final = {"cpu": 1 << 14, "cuda": 1 << 13}
#: Layers of a panel of a Gram matrix; only panels on and above the diagonal are computed.
_PANEL: Final = 16
#: Gram matrices are worth their while from this many single products a layer squared on, and where they are small, a
#: layer; measured at 48 and 12 layers.
_DOTS: Final = 0.15
_DOTS_A_LAYER: Final = 2.5
_memory = threading.local()
#: Sums of squares of weights above this do not fit into float32.
_LARGEST: Final = 1e15


class Sums(Protocol):
    """Something that is summed over blocks."""

    def tasks(self, slabs: Sequence[Mapping[Part, Slab]]) -> Iterator[Task]:
        """What there is to do for a block, in pieces that do not meet."""

    def state(self) -> dict[str, Tensor]:
        """The sums by name, in place: writing to them restores an earlier state."""


class Faults:
    """Experts that are zero in a whole part, and those that were not finite so far.

    Attributes:
        zero: (S, 3, L, E) bool, by checkpoint and part; they have no part in their layer's mean.
        non_finite: (S, 3, L, E) bool; their weights count as zero from the block on after that they were found in.
    """

    def __init__(self, sources: int, layers: int, experts: int, device: torch.device) -> None:
        shape = (sources, len(PARTS), layers, experts)
        self.zero = torch.zeros(shape, dtype=torch.bool, device=device)
        self.non_finite = torch.zeros(shape, dtype=torch.bool, device=device)

    def state(self) -> dict[str, Tensor]:
        """The masks by name."""
        return {"zero": self.zero, "non_finite": self.non_finite}


class SameIndexSums:
    """Inner products of the same expert in two layers, as they are and without each layer's mean expert.

    Without the mean they are wanted for all pairs of layers, as a rule; as they are, for some distances. What all
    experts together come to as they are in any pair follows from the mean experts' own products; two products of every
    expert would cost twice as much.

    A piece of a block is made float32 once, for all layers and experts: what it gives is added up before it leaves the
    cache. Pieces are dealt to lanes, a thread each, whose sums are added in their order, so that the same number of
    lanes always gives the same bits.

    Args:
        layers: True model indices.
        experts: E.
        deltas: Distances at which products are wanted as they are.
        all_pairs: Whether those without the mean are wanted of all pairs of layers, not just `deltas` apart.
        faults: Where experts that are not finite are noted.
        lanes: Number of lanes.
    """

    def __init__(
        self, layers: Sequence[int], experts: int, deltas: Sequence[int], all_pairs: bool, faults: Faults, lanes: int
    ) -> None:
        depth = len(layers)
        device = faults.zero.device
        self.raw = torch.zeros(len(PARTS), experts, depth, depth, dtype=torch.float64, device=device)
        self.centred = torch.zeros_like(self.raw)
        self.means = torch.zeros(len(PARTS), depth, depth, dtype=torch.float64, device=device)
        self._faults = faults
        self._lanes = lanes
        self._turn = threading.Condition()
        self._next = 0
        self._runs = _runs_apart(layers, deltas)
        self._centred_runs = None if all_pairs else self._runs

    def state(self) -> dict[str, Tensor]:
        """Sums above the diagonal and on it."""
        return {"raw": self.raw, "centred": self.centred, "means": self.means}

    def tasks(self, slabs: Sequence[Mapping[Part, Slab]]) -> Iterator[Task]:
        """One task a part and lane."""
        (parts,) = slabs
        self._next = 0
        known = self._faults.non_finite[0].clone()  # what lanes find in this block must not depend on which is first
        for number, slab in enumerate(parts.values()):
            cells = slab.data.shape[0] * slab.data.shape[1]
            pieces = slab.pieces(_at_a_time(slab, cells))
            for lane in range(self._lanes):
                turn = number * self._lanes + lane
                yield lambda s=slab, p=pieces[lane :: self._lanes], t=turn: self._add(s, p, t, known)  # type: ignore[misc]

    def _add(self, slab: Slab, pieces: Sequence[tuple[int, int, slice]], turn: int, known: Tensor) -> None:
        """Sum over some pieces of a slab; experts `known` (3, L, E) not to be finite count as zero."""
        place = PARTS.index(slab.form.part)
        depth, experts = slab.data.shape[:2]
        device = slab.data.device
        zero, bad = self._faults.zero[0, place], known[place]
        found = torch.zeros_like(bad)
        raw = _Products(depth, experts, self._runs, device)
        centred = _Products(depth, experts, self._centred_runs, device)
        means = _Products(depth, 1, self._centred_runs, device)
        most = max(((last - first) * (columns.stop - columns.start) for first, last, columns in pieces), default=0)
        buffer = _kept("piece", depth * experts * most, device)
        any_bad, shares = bool(bad.any()), _shares(~(zero | bad))
        for first, last, columns in pieces:
            weights = slab.fill(buffer, slice(None), slice(None), first, last, columns).flatten(2)
            if any_bad:
                weights[bad] = 0
            mean = shares @ weights
            if not _small(mean):
                here = ~(weights.abs().amax(2) < _LARGEST)
                found |= here
                weights[here] = 0
                mean = _shares(~(zero | bad | here)) @ weights
            raw.add(weights)
            weights -= mean
            centred.add(weights)
            means.add(mean)
        overflown = ~torch.isfinite(raw.squares())
        found |= overflown.T
        with self._turn:
            self._turn.wait_for(lambda: self._next == turn)
            for total, own in ((self.raw, raw), (self.centred, centred)):
                own.add_to(total[place], overflown)
            means.add_to(self.means[place][None], overflown.any(0, keepdim=True))
            self._faults.non_finite[0, place] |= found
            self._next += 1
            self._turn.notify_all()


class _Products:
    """Inner products of the same expert in two layers, summed in float32 over the pieces of one block.

    Args:
        depth: L.
        experts: E.
        runs: Distance, first position and position after the last of the pairs that are wanted; None for all pairs.
        device: Where.
    """

    def __init__(
        self, depth: int, experts: int, runs: Sequence[tuple[int, int, int]] | None, device: torch.device
    ) -> None:
        self._runs = runs
        panel = _PANEL if device.type == "cpu" else depth
        self._starts = range(0, depth, panel) if runs is None else range(1)
        self._sums = [
            torch.zeros(experts, min(panel, depth - start) if runs is None else depth, depth - start, device=device)
            for start in self._starts
        ]

    def add(self, weights: Tensor) -> None:
        """Add those of (L, E, n) float32."""
        if self._runs is None:
            by_expert = weights.transpose(0, 1)
            for start, total in zip(self._starts, self._sums, strict=True):
                own = by_expert[:, start : start + total.shape[1]]
                total.baddbmm_(own, by_expert[:, start:].transpose(1, 2))
            return
        for offset, start, stop in self._runs:
            own = weights[start:stop]
            products = dot(own, weights[start + offset : stop + offset] if offset else own)
            self._sums[0].diagonal(offset, 1, 2)[:, start:stop] += products.T

    def squares(self) -> Tensor:
        """(E, L) squared lengths."""
        return torch.cat([total.diagonal(0, 1, 2) for total in self._sums], dim=1)

    def add_to(self, total: Tensor, without: Tensor) -> None:
        """Add to (E, L, L) float64, leaving rows and columns of `without` (E, L) bool out."""
        if without.any():
            for start, own in zip(self._starts, self._sums, strict=True):
                own[without[:, start : start + own.shape[1]]] = 0
                own.transpose(1, 2)[without[:, start:]] = 0
        for start, own in zip(self._starts, self._sums, strict=True):
            total[:, start : start + own.shape[1], start:] += own


def _shares(used: Tensor) -> Tensor:
    """(L, 1, E) float32 weights of a mean over `used` (L, E) experts of each layer; zero without any."""
    return (used / used.sum(1, keepdim=True).clamp(min=1)).to(torch.float32)[:, None]


class ChangeSums:
    """An expert of one checkpoint against the same of another: ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ and ‖a − b‖².

    The last is summed by itself: from the others it would be lost to rounding where little has changed.
    """

    def __init__(self, layers: int, experts: int, faults: Faults) -> None:
        device = faults.zero.device
        self.products = torch.zeros(4, len(PARTS), layers, experts, dtype=torch.float64, device=device)
        self._faults = faults

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {"products": self.products}

    def tasks(self, slabs: Sequence[Mapping[Part, Slab]]) -> Iterator[Task]:
        """One task an expert and part."""
        own, other = slabs
        for part, slab in own.items():
            for expert in range(slab.data.shape[1]):
                yield lambda a=slab, b=other[part], e=expert: self._add(a, b, e)  # type: ignore[misc]

    def _add(self, own: Slab, other: Slab, expert: int) -> None:
        depth = len(own.data)
        target = self.products[:, PARTS.index(own.form.part), :, expert]
        first_buffer, second_buffer = scratch(own, depth), scratch(own, depth, 1)
        for first, last in chunks(own, depth):
            a = own.fill(first_buffer, slice(None), expert, first, last).flatten(1)
            b = other.fill(second_buffer, slice(None), expert, first, last).flatten(1)
            for row, (left, right) in enumerate(((a, a), (a, b), (b, b))):
                target[row] += dot(left, right)
            a -= b
            target[3] += dot(a, a)
        place = PARTS.index(own.form.part)
        for source, row in ((0, 0), (1, 2)):
            self._faults.non_finite[source, place, :, expert] |= ~torch.isfinite(target[row])


class MatchSums:
    """All experts of a layer against all of another, and against each other.

    Args:
        sides: Layers that take part: checkpoint and position.
        pairs: Positions in `sides` of the layers to be matched.
        experts: E.
        device: Where the sums are.
    """

    def __init__(
        self, sides: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]], experts: int, device: torch.device
    ) -> None:
        self._sides, self._pairs = tuple(sides), tuple(pairs)
        shape = (len(PARTS), experts, experts)
        self.within = torch.zeros(len(self._sides), *shape, dtype=torch.float64, device=device)
        self.between = torch.zeros(len(self._pairs), *shape, dtype=torch.float64, device=device)

    def state(self) -> dict[str, Tensor]:
        """The sums; `within` above the diagonal and on it."""
        return {"within": self.within, "between": self.between}

    def tasks(self, slabs: Sequence[Mapping[Part, Slab]]) -> Iterator[Task]:
        """One task a layer and part, and one a pair and part."""
        for parts in zip(*(found.values() for found in slabs), strict=True):
            place = PARTS.index(parts[0].form.part)
            for row, (source, layer) in enumerate(self._sides):
                yield lambda t=self.within[row, place], s=parts[source], i=layer: _add_within(t, s, i)  # type: ignore[misc]
            for row, (left, right) in enumerate(self._pairs):
                (a, i), (b, j) = self._sides[left], self._sides[right]
                yield lambda t=self.between[row, place], s=(parts[a], parts[b]), at=(i, j): _add_between(t, s, at)  # type: ignore[misc]


class FeatureSums:
    """What stays of experts when their neurons are put in another order; see `Probes`.

    Args:
        sides: Layers that take part: checkpoint and position.
        experts: E.
        width: F.
        probes: The probes.
        device: Where the sums are.
    """

    def __init__(
        self, sides: Sequence[tuple[int, int]], experts: int, width: int, probes: Probes, device: torch.device
    ) -> None:
        self._sides = tuple(sides)
        self._probes = probes.to(device)
        self._width = width
        # gate·gate, up·up, gate·up, down·down
        self.sums = torch.zeros(len(sides), 4, experts, probes.count, dtype=torch.float64, device=device)
        self._open: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """The sums, and projections of a segment that has not come to its end."""
        return {"features": self.sums, **self._open}

    def open(self, forms: Sequence[PartForm]) -> None:
        """Make room for projections of the parts of a block, if its rows are no neurons; drop those of other parts."""
        shape = (len(self._sides), self.sums.shape[2], self._width, self._probes.each)
        names = [f"projected {form.part}" for form in forms if not form.neurons_in_rows]
        self._open = {
            name: self._open[name] if name in self._open else torch.zeros(shape, device=self.sums.device)
            for name in names
        }

    def tasks(self, slabs: Sequence[Mapping[Part, Slab]]) -> Iterator[Task]:
        """One task a layer."""
        for row, (source, layer) in enumerate(self._sides):
            parts = slabs[source]
            add = self._add_rows if next(iter(parts.values())).form.neurons_in_rows else self._add_columns
            yield lambda add=add, row=row, parts=parts, layer=layer: add(row, parts, layer)  # type: ignore[misc]

    def _add_rows(self, row: int, parts: Mapping[Part, Slab], layer: int) -> None:
        """Every row is a neuron's: project it and be done with it."""
        slab = next(iter(parts.values()))
        experts = slab.data.shape[1]
        buffers = {part: scratch(slab, experts, slot) for slot, part in enumerate(parts)}
        for first, last in chunks(slab, experts):
            projected = {
                part: self._probes.project_rows(part, own.fill(buffers[part], layer, slice(None), first, last))
                for part, own in parts.items()
            }
            for family, total in self._products(projected):
                self.sums[row, family] += total

    def _add_columns(self, row: int, parts: Mapping[Part, Slab], layer: int) -> None:
        """Every row is one coordinate of all neurons: collect, segment by segment."""
        slab = next(iter(parts.values()))
        experts = slab.data.shape[1]
        buffer = scratch(slab, experts)
        first = 0
        while first < slab.rows:
            segment, end = self._probes.segment_of(slab.start + first)
            last = min(first + chunk_rows(slab, experts), slab.rows, end - slab.start)
            for part, own in parts.items():
                weights = own.fill(buffer, layer, slice(None), first, last)
                probes = self._probes.rows_of(part, slab.start + first, slab.start + last)
                self._open[f"projected {part}"][row] += weights.transpose(1, 2) @ probes
            if slab.start + last == end:
                projected = {part: self._open[f"projected {part}"][row] for part in parts}
                columns = slice(segment * self._probes.each, (segment + 1) * self._probes.each)
                for family, total in self._products(projected):
                    self.sums[row, family, :, columns] += total
                for collected in projected.values():
                    collected.zero_()
            first = last

    @staticmethod
    def _products(projected: Mapping[Part, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Sums over neurons, (E, J), of the products of projections (E, n, J), by family."""
        if "down" in projected:
            yield 3, projected["down"].square().sum(1)
            return
        gate, up = projected["gate"], projected["up"]
        yield 0, gate.square().sum(1)
        yield 1, up.square().sum(1)
        yield 2, (gate * up).sum(1)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add X Xᵀ of X (m, n) float32 to `total` (m, m) float64, above the diagonal and on it."""
    panel = _PANEL if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), panel):
        total[start : start + panel, start:] += rows[start : start + panel] @ rows[start:].T


def dot(left: Tensor, right: Tensor) -> Tensor:
    """(…) inner products along the last axis of two float32 tensors."""
    if left is right:
        return torch.linalg.vector_norm(left, dim=-1).square()  # type: ignore[no-any-return]
    if left.device.type == "cpu":  # faster than torch's
        return torch.from_numpy(np.einsum("...k,...k->...", left.numpy(), right.numpy()))
    return torch.linalg.vecdot(left, right)  # type: ignore[no-any-return]


def mirrored(gram: Tensor) -> Tensor:
    """(…, m, m) with what is above the diagonal also below it."""
    return gram.triu() + gram.triu(1).mT


def _at_a_time(slab: Slab, cells: int) -> int:
    """Weights of each of `cells` experts to work on at a time."""
    device = slab.data.device.type
    return min(_CHUNK[device] // cells, _LONGEST[device])


def chunk_rows(slab: Slab, cells: int) -> int:
    """Rows of `cells` experts to work on at a time."""
    return max(1, _at_a_time(slab, cells) // slab.form.columns)


def chunks(slab: Slab, cells: int) -> Iterator[tuple[int, int]]:
    """First row, and row after the last, of pieces of a slab to work on, for `cells` experts."""
    step = chunk_rows(slab, cells)
    return ((first, min(first + step, slab.rows)) for first in range(0, slab.rows, step))


def scratch(slab: Slab, cells: int, slot: int = 0) -> Tensor:
    """float32 memory for a piece of a slab; a thread is given the same for a `slot` again and again.

    Memory that is taken anew for every piece costs more time than the arithmetic on it.
    """
    rows = min(chunk_rows(slab, cells), slab.rows)
    return _kept(f"slot {slot}", cells * rows * slab.form.columns, slab.data.device)


def _kept(name: str, size: int, device: torch.device) -> Tensor:
    """(size,) float32 that this thread keeps under a name; on a GPU torch itself keeps memory."""
    if device.type != "cpu":
        return torch.empty(size, device=device)
    kept: dict[str, Tensor] = _memory.__dict__
    if name not in kept or len(kept[name]) < size:
        kept[name] = torch.empty(size)
    return kept[name][:size]


def _small(weights: Tensor) -> bool:
    """Whether all weights are numbers whose squares can be summed."""
    low, high = torch.stack(torch.aminmax(weights)).tolist()
    return bool(-_LARGEST < low <= high < _LARGEST)


def _add_within(total: Tensor, slab: Slab, layer: int) -> None:
    experts = slab.data.shape[1]
    buffer = scratch(slab, experts)
    for first, last in chunks(slab, experts):
        add_gram(total, slab.fill(buffer, layer, slice(None), first, last).flatten(1))


def _add_between(total: Tensor, slabs: tuple[Slab, Slab], layers: tuple[int, int]) -> None:
    left = slabs[0]
    experts = left.data.shape[1]
    buffers = scratch(left, experts), scratch(left, experts, 1)
    for first, last in chunks(left, experts):
        a, b = (
            slab.fill(buffer, layer, slice(None), first, last).flatten(1)
            for slab, buffer, layer in zip(slabs, buffers, layers, strict=True)
        )
        total += a @ b.T


def _runs_apart(layers: Sequence[int], deltas: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Pairs of layers `deltas` apart, and each with itself, for `_Products`; None where all pairs cost less."""
    offsets: dict[int, list[int]] = {0: list(range(len(layers)))}
    for i, first in enumerate(layers):
        for j in range(i + 1, len(layers)):
            if layers[j] - first in deltas:
                offsets.setdefault(j - i, []).append(i)
    runs = [(offset, *run) for offset, starts in offsets.items() for run in _runs(starts)]
    products = sum(stop - start for _, start, stop in runs)
    return runs if products < max(_DOTS * len(layers) ** 2, _DOTS_A_LAYER * len(layers)) else None


def _runs(starts: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending whole numbers as runs: first, and one after the last."""
    runs: list[list[int]] = []
    for start in starts:
        if runs and runs[-1][1] == start:
            runs[-1][1] += 1
        else:
            runs.append([start, start + 1])
    return [(first, last) for first, last in runs]
