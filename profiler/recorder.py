"""The recorder: layers stage what they routed, one commit a forward counts the rows that count.

Staging copies ids and weights into a persistent buffer and sums the layer's distributions; counting happens at the
commit, once for all layers. Nothing here reads a value back from the device before `drain`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.profiler.choices import FAULTS, SCALE, check_faults
from moescope.profiler.errors import InvariantError
from moescope.profiler.profile import LayerInfo, Scoring, check_layer

#: Choices counted at a time in a commit; bounds its temporary memory to about 100 MB.
_BLOCK: Final = 1 << 20
_EMPTY: Final = -1


class Group(NamedTuple):
    """Where a row's counts go: index of the domain, of the phase, and of the split."""

    domain: int
    phase: int
    split: int


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Sums of some committed forwards, by group; integers throughout (weights in units of 2**-24).

    Attributes:
        groups: G groups.
        selection: int64 [G,L,E].
        weight: int64 [G,L,E], fixed point.
        probability: int64 [G,L,E], fixed point, or None.
        probability_tokens: int64 [G], or None.
        coactivation: int64 [L,E,E], or None.
    """

    groups: tuple[Group, ...]
    selection: NDArray[np.int64]
    weight: NDArray[np.int64]
    probability: NDArray[np.int64] | None = None
    probability_tokens: NDArray[np.int64] | None = None
    coactivation: NDArray[np.int64] | None = None

    def add_to(self, arrays: dict[str, NDArray[np.int64]], tokens: Sequence[int]) -> None:
        """Add to a profile's integer totals; `tokens`: T of each group, from the requests' own lengths."""
        for g, (domain, phase, split) in enumerate(self.groups):
            arrays["selection_counts"][domain, phase] += self.selection[g]
            arrays["split_counts"][split, domain] += self.selection[g]
            arrays["weight_sums"][domain, phase] += self.weight[g]
            arrays["token_counts"][domain, phase] += tokens[g]
            if self.probability is not None and self.probability_tokens is not None:
                arrays["probability_sums"][domain, phase] += self.probability[g]
                arrays["probability_tokens"][domain, phase] += self.probability_tokens[g]
        if self.coactivation is not None:
            arrays["coactivation"] += self.coactivation


def router_distribution(logits: Tensor, scoring: Scoring) -> Tensor:
    """The router's full distribution over experts, without correction bias and group mask.

    Args:
        logits: (T, E) float, raw router logits.
        scoring: "softmax" over all experts, or "sigmoid" scores divided by their sum.

    Returns:
        (T, E) float32, each row sums to 1.
    """
    logits = logits.float()
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


def count_choices(
    ids: Tensor, weights: Tensor, group: Tensor, experts: Tensor, groups: int, width: int
) -> tuple[Tensor, Tensor]:
    """Histogram of chosen experts by group and layer; the reference that other kernels are held against.

    Args:
        ids: (L, T, K) integer, logical expert ids; negative or >= E: not counted.
        weights: (L, T, K) float, routing weights.
        group: (T,) int64, group of each row.
        experts: (L,) int64, number of experts E of each layer.
        groups: Number of groups G.
        width: E of the result (the largest of all layers).

    Returns:
        int64 (G, L, E) counts, and int64 (G, L, E) weight sums in units of 2**-24; NaN and infinite weights add 0.
    """
    layers, rows, k = ids.shape
    ids = ids.long()
    valid = (ids >= 0) & (ids < experts[:, None, None])
    slot = torch.arange(layers, device=ids.device)
    bins = (group[None, :, None] * layers + slot[:, None, None]) * width + ids
    # what is not counted goes to one bin past the end
    bins = torch.where(valid, bins, groups * layers * width).reshape(-1)
    size = groups * layers * width + 1
    ones = torch.ones((), dtype=torch.int64, device=ids.device).expand(layers * rows * k)
    counts = torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(0, bins, ones)
    counts = counts[:-1].view(groups, layers, width)
    units = torch.nan_to_num(weights.double() * SCALE, nan=0.0, posinf=0.0, neginf=0.0).round().long().reshape(-1)
    sums = torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(0, bins, units)
    return counts, sums[:-1].view(groups, layers, width)


def sum_distributions(distribution: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum distributions by group in fixed point, so that the order of the rows does not matter.

    Args:
        distribution: (T, E) float32, entries in [0, 1].
        group: (T,) int64, group of each row.
        groups: Number of groups G.

    Returns:
        int64 (G, E), in units of 2**-24. NaN counts as 0.
    """
    units = torch.nan_to_num(distribution * SCALE, nan=0.0).round()
    # float64 adds integers below 2**53 exactly in any order, and a matrix product is the fastest sum by group there is
    if groups == 1:
        return units.double().sum(dim=0, keepdim=True).long()
    one_hot = torch.zeros(groups, len(group), dtype=torch.float64, device=units.device)
    one_hot.scatter_(0, group[None, :], 1.0)
    return (one_hot @ units.double()).long()


class Recorder:
    """Stages what each layer routed and, at each commit, counts the rows that count.

    A batch is `start`, forwards, `drain`; a forward is `begin`, `stage` once for every layer, `commit`. Sums wait in
    pending buffers until `drain`, which asserts the invariant against token counts that come from elsewhere and hands
    the sums over. A row that does not count (padding, a finished request) is not among the rows given to `begin`.

    Args:
        layers: MoE layers in model order.
        scoring: Scoring function of the routers.
        scales: Per layer, the factor that the model multiplies its routing weights by; divided out.
        probabilities: Sum the full distributions too.
        coactivation: Count pairs of experts too.
        device: Device of the buffers.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        *,
        scoring: Scoring,
        scales: Sequence[float] | None = None,
        probabilities: bool = True,
        coactivation: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = tuple(layers)
        self.scoring: Scoring = scoring
        self.probabilities = probabilities
        self.coactivation = coactivation
        self.device = torch.device(device)
        self._width = max(layer.experts for layer in self.layers)
        self._k = max(layer.top_k for layer in self.layers)
        self._experts = torch.tensor([layer.experts for layer in self.layers], device=self.device)
        self._scales = torch.tensor(scales or [1.0] * len(self.layers), dtype=torch.float32, device=self.device)
        choice = torch.arange(self._k, device=self.device)
        tops = torch.tensor([layer.top_k for layer in self.layers], device=self.device)
        self._used = (choice[None, :] < tops[:, None])[:, None, :]  # (L, 1, K): choices that this layer makes
        self._ids = torch.empty(len(self.layers), 0, self._k, dtype=torch.int32, device=self.device)
        self._weights = torch.empty(len(self.layers), 0, self._k, dtype=torch.float32, device=self.device)
        self._groups: tuple[Group, ...] = ()
        self._open = False
        self.start(())

    def start(self, groups: Sequence[Group]) -> None:
        """Begin a batch of requests whose rows belong to `groups`; sums still pending are dropped."""
        size = (len(groups), len(self.layers), self._width)
        self._groups = tuple(groups)
        self._counts = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._weight_sums = torch.zeros_like(self._counts)
        self._distribution_sums = torch.zeros_like(self._counts) if self.probabilities else None
        self._distribution_rows = torch.zeros(len(groups), dtype=torch.int64, device=self.device)
        self._pairs = (
            torch.zeros(size[1], size[2], size[2], dtype=torch.int64, device=self.device) if self.coactivation else None
        )
        self._faults = torch.zeros(len(FAULTS), len(self.layers), dtype=torch.int64, device=self.device)
        self._open = False

    def begin(self, tokens: int, rows: Tensor | None, group: Tensor) -> None:
        """Open a forward of `tokens` rows.

        Args:
            tokens: Rows T in the forward, padding included.
            rows: (n,) int64, rows that count, or None if all do.
            group: (n,) int64, for each counted row the index of its group.
        """
        self._tokens, self._rows, self._group = tokens, rows, group
        counted = len(group)
        if self._ids.shape[1] < counted:
            shape = (len(self.layers), counted, self._k)
            with torch.inference_mode(False):  # the buffers outlive the forward and whatever mode it runs in
                self._ids = torch.empty(shape, dtype=torch.int32, device=self.device)
                self._weights = torch.empty(shape, dtype=torch.float32, device=self.device)
        # the buffer is poisoned between forwards: a row that no layer wrote is found, never counted again
        self._ids[:, :counted].fill_(_EMPTY)
        self._seen = [False] * len(self.layers)
        self._step_distributions = torch.zeros_like(self._counts) if self.probabilities else None
        self._step_bad_scores = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        self._open = True

    @property
    def recording(self) -> bool:
        """Whether a forward is open."""
        return self._open

    def stage(self, slot: int, ids: Tensor, weights: Tensor, logits: Tensor | None = None) -> None:
        """Keep what one layer routed in the open forward.

        Args:
            slot: Position of the layer in `layers`.
            ids: (T, k) integer, logical expert ids.
            weights: (T, k) float, routing weights as the model applies them.
            logits: (T, E) float, raw router logits; needed where distributions are recorded.

        Raises:
            InvariantError: The layer was staged before in this forward, or the rows or columns do not fit.
        """
        layer = self.layers[slot]
        if self._seen[slot]:
            raise InvariantError(f"layer {layer.index} routed twice in one forward")
        if ids.shape != (self._tokens, layer.top_k) or weights.shape != ids.shape:
            raise InvariantError(
                f"layer {layer.index} routed {list(ids.shape)} choices with {list(weights.shape)} weights; "
                f"expected [{self._tokens}, {layer.top_k}]"
            )
        if self._rows is not None:
            rows = self._rows.to(ids.device)
            ids, weights = ids.index_select(0, rows), weights.index_select(0, rows)
            logits = logits.index_select(0, rows) if logits is not None else None
        counted = len(self._group)
        self._ids[slot, :counted, : layer.top_k].copy_(ids, non_blocking=True)
        self._weights[slot, :counted, : layer.top_k].copy_(weights, non_blocking=True)
        if self._step_distributions is not None:
            if logits is None or logits.shape[-1] != layer.experts:
                shape = None if logits is None else list(logits.shape)
                raise InvariantError(f"layer {layer.index} gave router logits {shape}; expected E = {layer.experts}")
            distribution = router_distribution(logits.to(self.device), self.scoring)
            self._step_bad_scores[slot] = (~torch.isfinite(logits).all(dim=-1)).sum()
            sums = sum_distributions(distribution, self._group, len(self._groups))
            self._step_distributions[:, slot, : layer.experts] = sums
        self._seen[slot] = True

    def commit(self) -> None:
        """Count the open forward and close it.

        Raises:
            InvariantError: A layer was not staged.
        """
        missing = [layer.index for layer, seen in zip(self.layers, self._seen, strict=True) if not seen]
        self._open = False
        if missing:
            raise InvariantError(f"layers {missing} routed nothing in a forward that the other layers saw")
        counted, groups = len(self._group), len(self._groups)
        block = max(1, _BLOCK // max(1, counted * self._k))
        for start in range(0, len(self.layers), block):
            part = slice(start, start + block)
            ids, weights = self._ids[part, :counted], self._weights[part, :counted] / self._scales[part, None, None]
            used = self._used[part]
            counts, sums = count_choices(ids, weights, self._group, self._experts[part], groups, self._width)
            self._counts[:, part] += counts
            self._weight_sums[:, part] += sums
            outside = ((ids < 0) | (ids >= self._experts[part, None, None])) & used
            ordered = ids.masked_fill(~used | outside, _EMPTY).sort(dim=-1).values
            twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
            bad_weight = ~(torch.isfinite(weights) & (weights >= 0)) & used
            self._faults[0, part] += outside.sum(dim=(1, 2))
            self._faults[1, part] += twice.sum(dim=(1, 2))
            self._faults[2, part] += bad_weight.sum(dim=(1, 2))
        self._faults[3] += self._step_bad_scores
        if self._distribution_sums is not None and self._step_distributions is not None:
            self._distribution_sums += self._step_distributions
            self._distribution_rows.index_add_(0, self._group, torch.ones_like(self._group))
        if self._pairs is not None:
            for slot in range(len(self.layers)):
                self._pairs[slot] += self._count_pairs(slot, counted)

    def staged(self) -> tuple[Tensor, Tensor]:
        """What the last forward routed, of the rows that counted; valid until the next `begin`.

        Returns:
            (L, n, K) int32 expert ids, -1 past a layer's own k, and (L, n, K) float32 routing weights, the model's
            scaling divided out, undefined past a layer's own k.
        """
        counted = len(self._group)
        return self._ids[:, :counted], self._weights[:, :counted] / self._scales[:, None, None]

    def _count_pairs(self, slot: int, counted: int) -> Tensor:
        k = self.layers[slot].top_k
        ids = self._ids[slot, :counted, :k].long()
        chosen = torch.zeros(counted, self._width + 1, dtype=torch.float32, device=self.device)
        inside = (ids >= 0) & (ids < self._width)
        chosen.scatter_(1, torch.where(inside, ids, self._width), 1.0)
        chosen = chosen[:, :-1]
        pairs = torch.zeros(self._width, self._width, dtype=torch.float64, device=self.device)
        for part in torch.split(chosen, 1 << 20):  # float32 counts to 2**24 exactly
            pairs += part.T @ part
        return pairs.long()

    def drain(self, expected: Sequence[int], what: str = "") -> GroupSums:
        """Assert that the pending sums add up, hand them over and start empty.

        Args:
            expected: For each group the tokens T that were routed, from the requests' own lengths, never from here.
            what: Words put before an error message, e.g. "batch 3: ".

        Raises:
            InvariantError: In some layer the selections are not k·T, an expert exceeds T, or a fault was counted.
        """
        check_faults(self._faults, self.layers, what)
        tokens = np.asarray(expected, dtype=np.int64)
        sums = GroupSums(
            groups=self._groups,
            selection=self._counts.cpu().numpy(),
            weight=self._weight_sums.cpu().numpy(),
            probability=None if self._distribution_sums is None else self._distribution_sums.cpu().numpy(),
            probability_tokens=None if self._distribution_sums is None else self._distribution_rows.cpu().numpy(),
            coactivation=None if self._pairs is None else self._pairs.cpu().numpy(),
        )
        self.start(())
        for slot, layer in enumerate(self.layers):
            check_layer(layer, sums.selection[:, slot], tokens, what)
        if sums.probability_tokens is not None and not np.array_equal(sums.probability_tokens, tokens):
            raise InvariantError(f"{what}distributions were recorded of other tokens than were routed")
        return sums
