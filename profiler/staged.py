"""The recorder of a serving engine: layers stage inside the engine's graphs, one commit a step counts outside them.

Every buffer has a fixed address, so it can be written from a captured CUDA graph. Nothing synchronises before `drain`.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.profiler import choices
from moescope.profiler.choices import FAULTS, POISON
from moescope.profiler.profile import LayerInfo, Scoring, check_layer
from moescope.profiler.tokens import SPLITS

#: Phases of a token, in the order of a profile's second axis.
PREFILL, DECODE = 0, 1
PHASES: Final = 2
#: Rows, at most, of a forward that is counted by replaying a CUDA graph: a short step wants a short launch.
_GRAPHED: Final = 512
#: Share of the rows whose distributions are recorded where they are sampled.
SAMPLE_SHARE: Final = 1 / 64


def cell_of(domain: int, phase: int, split: int) -> int:
    """Index of a cell: where a row's counts go."""
    return (domain * PHASES + phase) * SPLITS + split


@dataclass(frozen=True, slots=True)
class StagedSums:
    """What a recorder counted between two drains, in a profile's axes; integers throughout.

    Attributes:
        tokens: int64 [D,P,S], tokens routed, from the scheduler's lengths.
        cells: int64 [D,P,S,L,E], selections.
        weight: int64 [D,P,L,E], fixed point.
        probability: int64 [D,P,L,E], fixed point, or None.
        probability_tokens: int64 [D,P], or None.
        coactivation: int64 [L,E,E], or None.
        places: Index of each counted domain among the run's domains; None: they are the run's domains.
    """

    tokens: NDArray[np.int64]
    cells: NDArray[np.int64]
    weight: NDArray[np.int64]
    probability: NDArray[np.int64] | None = None
    probability_tokens: NDArray[np.int64] | None = None
    coactivation: NDArray[np.int64] | None = None
    places: tuple[int, ...] | None = None

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """By the names of a profile's buffers."""
        named: dict[str, NDArray[np.int64] | None] = {
            "selection_counts": self.cells.sum(axis=2),
            "split_counts": self.cells.sum(axis=1).transpose(1, 0, 2, 3),
            "weight_sums": self.weight,
            "token_counts": self.tokens.sum(axis=2),
            "probability_sums": self.probability,
            "probability_tokens": self.probability_tokens,
            "coactivation": self.coactivation,
        }
        return {name: array for name, array in named.items() if array is not None}

    def add_to(self, arrays: dict[str, NDArray[np.int64]], tokens: Sequence[int] = ()) -> None:
        """Add to a profile's integer totals; `tokens` were held against these sums already."""
        for name, array in self.arrays().items():
            if self.places is None or name == "coactivation":
                arrays[name] += array
                continue
            axis = 1 if name == "split_counts" else 0
            for place, domain in enumerate(self.places):
                into = arrays[name][:, domain] if axis else arrays[name][domain]
                into += array[:, place] if axis else array[place]


class StagedRecorder:
    """Buffers that an engine's layers stage into, and the sums that commits add to.

    A step is: `choose_sample` (if distributions are recorded), the engine's forward, in which every layer writes the
    views that `views` gave it, and `commit`. A row that does not count has a negative cell.

    Args:
        layers: MoE layers in model order; all choose the same number of experts.
        scoring: Scoring function of the routers.
        scales: Per layer, the factor that the staged weights carry; divided out.
        capacity: Rows that a forward has at most, padding included.
        domains: Number of domains D.
        share: Share of the rows whose distributions are recorded: 0 none, 1 all.
        coactivation: Count pairs of experts too.
        seed: Of the sample.
        device: Device of the buffers.
        kernels: Count with Triton; None: where the device is a GPU.

    Raises:
        ValueError: Layers choose different numbers of experts.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        *,
        scoring: Scoring,
        scales: Sequence[float],
        capacity: int,
        domains: int,
        share: float = 0.0,
        coactivation: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        kernels: bool | None = None,
    ) -> None:
        if len({layer.top_k for layer in layers}) != 1:
            raise ValueError("layers choose different numbers of experts")
        self.layers = tuple(layers)
        self.scoring: Scoring = scoring
        self.capacity = capacity
        self.domains = domains
        self.share = share
        self.device = torch.device(device)
        self.experts = max(layer.experts for layer in layers)
        self.k = layers[0].top_k
        depth = len(self.layers)
        if kernels is None:
            kernels = self.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        self._kernels: Any = None
        if kernels:
            from moescope.profiler import kernels as triton_kernels

            self._kernels = triton_kernels
        like: dict[str, Any] = {"device": self.device}
        self.ids = torch.full((depth, capacity, self.k), POISON, dtype=torch.int32, **like)
        self.weights = torch.zeros((depth, capacity, self.k), dtype=torch.float32, **like)
        self._scales = torch.tensor(list(scales), dtype=torch.float32, **like)
        self._counts = torch.zeros((domains * PHASES * SPLITS, depth, self.experts), dtype=torch.int64, **like)
        self._weight_sums = torch.zeros((domains * PHASES, depth, self.experts), dtype=torch.int64, **like)
        self._faults = torch.zeros((len(FAULTS), depth), dtype=torch.int64, **like)
        self._pairs = (
            torch.zeros((depth, self.experts, self.experts), dtype=torch.int64, **like) if coactivation else None
        )
        self.sample: Tensor | None = None
        self.distributions: Tensor | None = None
        self._distribution_sums: Tensor | None = None
        if share:
            rows = capacity if share >= 1 else min(capacity, _most(capacity, share))
            self.sample = torch.full((rows,), POISON, dtype=torch.int32, **like)
            self.distributions = torch.zeros((depth, rows, self.experts), dtype=torch.float32, **like)
            self._distribution_sums = torch.zeros_like(self._weight_sums)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_cells = torch.full((min(_GRAPHED, capacity),), POISON, dtype=torch.int32, **like)
        self._rng = np.random.default_rng(seed)
        #: Stream of the last commit, on a GPU.
        self.stream: torch.cuda.Stream | None = None
        self._tokens = np.zeros(domains * PHASES * SPLITS, dtype=np.int64)
        self._sampled = np.zeros(domains * PHASES * SPLITS, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers on the device."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def views(self, slot: int, rows: int) -> tuple[Tensor, Tensor]:
        """Where the layer in `slot` stages `rows` rows: ids (rows, K) int32 and weights (rows, K) float32."""
        return self.ids[slot, :rows], self.weights[slot, :rows]

    def stage_distributions(self, slot: int, logits: Tensor) -> None:
        """Keep the distributions of the sampled rows of one layer; to be called inside the forward.

        Args:
            slot: Position of the layer in `layers`.
            logits: (T, E) float, raw router logits.
        """
        if self.sample is None or self.distributions is None:
            return
        out = self.distributions[slot]
        if self._kernels is not None:
            self._kernels.stage_distributions(logits, self.sample, out, sigmoid=self.scoring == "sigmoid")
        else:
            stage_distributions(logits, self.sample, out, self.scoring == "sigmoid")

    def choose_sample(self, rows: int) -> NDArray[np.int64]:
        """Draw the rows of the next forward whose distributions are recorded; each is in with the same chance.

        Returns:
            int64 [n], ascending.
        """
        if self.sample is None:
            return np.zeros(0, np.int64)
        if self.share >= 1:
            chosen = np.arange(rows)
        else:
            count = min(int(self._rng.binomial(rows, self.share)), len(self.sample))
            chosen = np.sort(self._rng.choice(rows, count, replace=False)) if count else np.zeros(0, np.int64)
        return self._set_sample(chosen)

    def choose_first(self, rows: int) -> NDArray[np.int64]:
        """Take the first rows of the next forward rather than a sample: for a look at single tokens.

        Returns:
            int64 [n], ascending; as many as the buffer holds.
        """
        return self._set_sample(np.arange(min(rows, 0 if self.sample is None else len(self.sample))))

    def _set_sample(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.sample is not None:
            padded = np.full(len(self.sample), POISON, np.int32)
            padded[: len(chosen)] = chosen
            self.sample.copy_(_pinned(padded, self.device), non_blocking=True)
        return chosen

    def upload(self, cells: NDArray[np.int32]) -> Tensor:
        """Cells of rows on the device, copied without waiting."""
        return _pinned(cells, self.device).to(self.device, non_blocking=True)

    def place(self, cells: NDArray[np.int32]) -> "Tensor | Placed":
        """Cells of rows for `commit`, on the device; valid until the next call, and for as many commits as it takes."""
        rows = len(cells)
        size = 1 << (rows - 1).bit_length() if rows else 0
        if size not in self._graphs:
            return self.upload(cells)
        padded = np.full(size, POISON, np.int32)
        padded[:rows] = cells
        self._graph_cells[:size].copy_(_pinned(padded, self.device), non_blocking=True)
        return Placed(self._graph_cells[:rows], self._graphs[size])

    def commit(
        self,
        cells: "Tensor | Placed",
        tokens: NDArray[np.int64],
        *,
        sampled: NDArray[np.int32] | None = None,
        source: "Copied | None" = None,
    ) -> None:
        """Count a forward and poison what it staged.

        Args:
            cells: (T,) int32 on the device, the cell of each row; negative: the row does not count. What `place` or
                `upload` returned.
            tokens: int64 [C], rows of each cell, from the requests' lengths.
            sampled: int32 [n], cells of the sampled rows, in the order of `choose_sample`; None: nothing was sampled.
            source: A copy of what was staged, if the engine has run on since; by default the staging buffers.
        """
        if self.device.type == "cuda":
            self.stream = torch.cuda.current_stream(self.device)
        if isinstance(cells, Placed):
            if source is None:
                cells.graph.replay()
            else:
                self._add(source, cells.cells)
        else:
            rows = len(cells)
            self._add(source or Copied(self.ids[:, :rows], self.weights[:, :rows], None), cells)
        distributions = self.distributions if source is None else source.distributions
        if sampled is not None and len(sampled) and distributions is not None and self._distribution_sums is not None:
            add = choices.add_distributions if self._kernels is None else self._kernels.add_distributions
            with torch.inference_mode():
                add(distributions[:, : len(sampled)], self.upload(sampled), self._distribution_sums, self._faults)
            np.add.at(self._sampled, sampled[sampled >= 0], 1)
        self._tokens += tokens

    def _add(self, staged: "Copied", cells: Tensor) -> None:
        """Add what was staged to the sums, and poison it."""
        with torch.inference_mode():
            if self._kernels is not None:
                self._kernels.add_choices(
                    staged.ids, staged.weights, cells, self._scales, self._counts, self._weight_sums, self._faults,
                    self._pairs,
                )  # fmt: skip
                return
            if self._pairs is not None:
                choices.add_pairs(staged.ids, cells, self._pairs)
            choices.add_choices(
                staged.ids, staged.weights, cells, self._scales, self._counts, self._weight_sums, self._faults
            )

    def staged(self, rows: int, source: "Copied | None" = None) -> tuple[Tensor, Tensor]:
        """What a forward staged that has not been committed.

        Args:
            rows: Its rows T.
            source: A copy of what it staged, if the engine has run on since.

        Returns:
            (L, T, K) int32 expert ids, and (L, T, K) float32 routing weights with the model's scaling; see `unscaled`.
        """
        ids, weights = (self.ids, self.weights) if source is None else (source.ids, source.weights)
        return ids[:, :rows], weights[:, :rows]

    def unscaled(self, weights: Tensor) -> Tensor:
        """Staged weights (L, T, K) with the model's scaling divided out."""
        return weights / self._scales[:, None, None]

    def copy(self, rows: int, sampled: int = 0) -> "Copied":
        """A copy of what was staged, poisoning the original: for an engine that runs on before a commit."""
        with torch.inference_mode():
            distributions = None if self.distributions is None else self.distributions[:, :sampled].clone()
            copied = Copied(self.ids[:, :rows].clone(), self.weights[:, :rows].clone(), distributions)
            self.poison(rows)
        return copied

    def poison(self, rows: int) -> None:
        """Forget what was staged of a forward that does not count."""
        self.ids[:, :rows].fill_(POISON)

    def warm_up(self) -> None:
        """Compile every kernel and capture what short forwards replay, counting nothing."""
        none = np.zeros(len(self._tokens), np.int64)
        for rows in (1, self.capacity):
            self.commit(torch.full((rows,), POISON, dtype=torch.int32, device=self.device), none)
        if self.sample is not None:
            cells = np.full(len(self.sample), POISON, np.int32)
            self.commit(self.upload(cells[:1]), none, sampled=cells)
        if self._kernels is not None and self.device.type == "cuda":
            for size in (1 << power for power in range(len(self._graph_cells).bit_length())):
                graph = torch.cuda.CUDAGraph()
                # other threads, such as NCCL's watchdog, go on meanwhile
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    staged = Copied(self.ids[:, :size], self.weights[:, :size], None)
                    self._add(staged, self._graph_cells[:size])
                self._graphs[size] = graph

    def buffers(self) -> dict[str, Tensor]:
        """The sums on the device by name, as `sums_of` takes them."""
        named = {
            "counts": self._counts,
            "weights": self._weight_sums,
            "faults": self._faults,
            "pairs": self._pairs,
            "distributions": self._distribution_sums,
        }
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Copies of the rows of each cell [C], and of those of them whose distributions were summed [C]."""
        return self._tokens.copy(), self._sampled.copy()

    def sums_of(
        self,
        arrays: Mapping[str, NDArray[np.int64]],
        lengths: tuple[NDArray[np.int64], NDArray[np.int64]],
        domains: int | None = None,
    ) -> StagedSums:
        """Sums in a profile's axes, held against the lengths.

        Args:
            arrays: The buffers of one moment, on the host; see `buffers`.
            lengths: Those of the same moment; see `lengths`.
            domains: How many of the first domains to take; None: all.

        Raises:
            InvariantError: In some layer the selections are not k·T, an expert exceeds T, or a fault was counted.
        """
        domains = self.domains if domains is None else domains
        choices.check_faults(arrays["faults"], self.layers)
        shape = (domains, PHASES, SPLITS)
        rest = (len(self.layers), self.experts)
        tokens, sampled = (array[: domains * PHASES * SPLITS] for array in lengths)
        cells = arrays["counts"][: len(tokens)]
        for slot, layer in enumerate(self.layers):
            check_layer(layer, cells[:, slot], tokens, "")
        probability = arrays.get("distributions")
        if probability is not None:
            probability = probability[: domains * PHASES].reshape(*shape[:2], *rest)
        return StagedSums(
            tokens=tokens.reshape(shape),
            cells=cells.reshape(*shape, *rest),
            weight=arrays["weights"][: domains * PHASES].reshape(*shape[:2], *rest),
            probability=probability,
            probability_tokens=None if probability is None else sampled.reshape(shape).sum(axis=2),
            coactivation=arrays.get("pairs"),
        )

    def peek(self) -> StagedSums:
        """The sums so far; synchronises, and nothing may be committed meanwhile. See `moescope.profiler.snapshots`.

        Raises:
            InvariantError: They do not add up; see `sums_of`.
        """
        return self.sums_of({name: _fetched(buffer) for name, buffer in self.buffers().items()}, self.lengths())

    def drain(self) -> StagedSums:
        """The sums so far, and start empty; see `peek`."""
        sums = self.peek()
        self.reset()
        return sums

    def reset(self) -> None:
        """Drop the sums."""
        for buffer in self.buffers().values():
            buffer.zero_()
        self._tokens[:] = 0
        self._sampled[:] = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """Cells (T,) int32 where a captured commit reads them, padded with rows that do not count, and that commit."""

    cells: Tensor
    graph: torch.cuda.CUDAGraph


@dataclass(frozen=True, slots=True)
class Copied:
    """What one forward staged: ids (L, T, K) int32, weights (L, T, K) float32, distributions (L, R, E) or None."""

    ids: Tensor
    weights: Tensor
    distributions: Tensor | None


def stage_distributions(logits: Tensor, sample: Tensor, out: Tensor, sigmoid: bool) -> None:
    """The torch reference of `moescope.profiler.kernels.stage_distributions`."""
    from moescope.profiler.recorder import router_distribution

    slots = ((sample >= 0) & (sample < len(logits))).nonzero().squeeze(1)
    rows = sample[slots].long()
    out[slots] = router_distribution(logits[rows], "sigmoid" if sigmoid else "softmax")


def _most(capacity: int, share: float) -> int:
    """Rows that a sample has at most: the mean and eight standard deviations, so that the cap is never met."""
    mean = capacity * share
    return math.ceil(mean + 8 * math.sqrt(mean) + 8)


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _fetched(buffer: Tensor) -> NDArray[np.int64]:
    """A copy on the host, also where the device is the host."""
    return buffer.to("cpu", copy=True).numpy()
