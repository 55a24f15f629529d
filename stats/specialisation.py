"""Which experts prefer which domains, by how much, and whether prompts vary too much to say so."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit, xlogy

from moescope.stats.layout import check_ascending, padding_mask
from moescope.stats.multiplicity import holm
from moescope.stats.split_shares import contrasts_with_the_rest, positive, split_shares

ALPHA = 0.05
"""Chance of a single false alarm among all tests of a profile."""


@dataclass(frozen=True, slots=True)
class SpecialisedExpert:
    """One expert that one domain uses more, or less, than the others do.

    Attributes:
        layer: true model index.
        expert: expert id.
        domain: index of the domain.
        share: share of the domain's selections in the layer.
        ratio: that share over the share in all other domains together; infinite where those never use it.
        low: lower end of the interval of the ratio; NaN where the ratio is 0 or infinite.
        high: its upper end.
        p_corrected: p-value, corrected for all tests of the profile.
    """

    layer: int
    expert: int
    domain: int
    share: float
    ratio: float
    low: float
    high: float
    p_corrected: float


@dataclass(frozen=True, slots=True, eq=False)
class MutualInformation:
    """What knowing the domain tells about the expert, and the reverse, layer by layer.

    Attributes:
        observed: (L,) float64, bits a selection, of the counts as they are; never below 0.
        chance: (L,) float64, what of it the draw of the prompts makes, estimated by leaving out one split at a time.
        corrected: (L,) float64, `observed` - `chance`; around 0 without specialisation, so also below.
        low: (L,) float64, lower end of the interval of `corrected`; for layers that do have specialisation: whether
            they have is for the tests to say.
        high: (L,) float64, its upper end.
    """

    observed: NDArray[np.float64]
    chance: NDArray[np.float64]
    corrected: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Specialisation:
    """Every domain against all others together, expert by expert.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        share: (D, L, E) float64, share of the domain's selections; NaN in the padding and without selections.
        ratio: (D, L, E) float64, share in the domain over share in the others; see `SpecialisedExpert`.
        low: (D, L, E) float64, lower end of its interval.
        high: (D, L, E) float64, its upper end.
        p_value: (D, L, E) float64, of equal shares, one test at a time.
        p_corrected: (D, L, E) float64, corrected by Holm for all tests of the profile.
        layer_p_corrected: (L,) float64, of no specialisation in the layer at all, corrected for the layers.
        information: mutual information of domain and expert.
        level: of the intervals.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    share: NDArray[np.float64]
    ratio: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_value: NDArray[np.float64]
    p_corrected: NDArray[np.float64]
    layer_p_corrected: NDArray[np.float64]
    information: MutualInformation
    level: float

    def most_specialised(self, top: int = 20, alpha: float = ALPHA) -> tuple[SpecialisedExpert, ...]:
        """Experts that a domain certainly prefers, in order of the ratio that is certain.

        Args:
            top: at most so many.
            alpha: experts whose corrected p-value lies above are left out.

        Returns:
            Those that no other domain uses first, by share; then by the lower end of the interval, largest first.
        """
        found = np.nan_to_num(self.p_corrected, nan=1.0) <= alpha
        preferred = np.argwhere(found & (self.ratio > 1)).tolist()
        certain = np.where(np.isinf(self.ratio), np.inf, self.low)
        preferred.sort(key=lambda cell: (-certain[tuple(cell)], -self.share[tuple(cell)]))
        return tuple(
            SpecialisedExpert(
                layer=self.layers[row],
                expert=expert,
                domain=domain,
                share=float(self.share[domain, row, expert]),
                ratio=float(self.ratio[domain, row, expert]),
                low=float(self.low[domain, row, expert]),
                high=float(self.high[domain, row, expert]),
                p_corrected=float(self.p_corrected[domain, row, expert]),
            )
            for domain, row, expert in preferred[:top]
        )


def specialisation(
    split_counts: NDArray[np.int64], experts: Sequence[int], layers: Sequence[int], level: float = 0.95
) -> Specialisation:
    """Compare each domain with all others, over splits of the prompts.

    Each test is a t test between ratio estimators, with the degrees of freedom of the side with fewer splits and the
    larger of two variances: that between the side's own splits, and that of the expert's dispersion pooled over all
    domains. The others are mixed as the run has them. See `moescope.stats.split_shares` for sources.

    Args:
        split_counts: (S, D, L, E) int64, selections by split and domain.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.
        level: of the intervals.

    Returns:
        NaN for what cannot be tested: one domain alone, a domain whose prompts lie in one split, an expert nobody uses.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `level` lies outside 0 and 1.
    """
    if len(layers) != len(experts):
        raise ValueError(f"got {len(layers)} layers and {len(experts)} expert numbers")
    check_ascending(layers)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    shares = split_shares(split_counts, experts)
    shape = shares.counts.shape
    ratio, low, high, p_value = (np.empty(shape) for _ in range(4))
    for domain, contrast in enumerate(contrasts_with_the_rest(shares, level)):
        ratio[domain], low[domain], high[domain] = contrast.ratio, contrast.low, contrast.high
        p_value[domain] = contrast.p_value
    tests = np.isfinite(p_value).sum(axis=(0, 2))
    smallest = np.where(np.isfinite(p_value), p_value, np.inf).min(axis=(0, 2), initial=np.inf)
    return Specialisation(
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(int(width) for width in experts),
        share=np.where(padding_mask(experts, shape[2]), np.nan, shares.share()),
        ratio=ratio,
        low=low,
        high=high,
        p_value=p_value,
        p_corrected=holm(p_value),
        # Bonferroni inside the layer, as its tests depend on each other
        layer_p_corrected=holm(np.where(tests > 0, np.minimum(smallest * np.maximum(tests, 1), 1.0), np.nan)),
        information=mutual_information(split_counts, experts, level),
        level=level,
    )


def mutual_information(
    split_counts: NDArray[np.int64], experts: Sequence[int], level: float = 0.95
) -> MutualInformation:
    """Mutual information of domain and expert over a layer's selections, freed from what few prompts add to it.

    I = Σ p(d, e) log₂(p(d, e) / (p(d) p(e))). Counts of few prompts overestimate it, by far more than tokens would if
    they were independent; as the excess falls with the number of prompts, leaving out one of S splits at a time tells
    it: (S - 1) (mean of I without one - I), the jackknife of M. Quenouille (Biometrika 43, 1956), whose variance
    J. Tukey gave (Ann. Math. Statist. 29, 1958).

    Args:
        split_counts: (S, D, L, E) int64, selections by split and domain; splits without any are left out.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.
        level: of the interval, by Student's t.

    Returns:
        `observed` is NaN for a layer without selections, the rest also with fewer than two splits.
    """
    outside = padding_mask(experts, split_counts.shape[3])
    used = split_counts[split_counts.any(axis=(1, 2, 3))]
    total = np.where(outside, 0, used.sum(axis=0))
    observed = _information(total)
    count = len(used)
    if count < 2:
        nothing = np.full(observed.shape, np.nan)
        return MutualInformation(observed, nothing, nothing, nothing, nothing)
    without = np.stack([_information(total - np.where(outside, 0, split)) for split in used])
    chance = (count - 1) * (without.mean(axis=0) - observed)
    error = np.sqrt((count - 1) / count * np.square(without - without.mean(axis=0)).sum(axis=0))
    reach = stdtrit(count - 1, (1 + level) / 2) * error
    corrected = observed - chance
    return MutualInformation(observed, chance, corrected, corrected - reach, corrected + reach)


def _information(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(L,) mutual information in bits of counts (D, L, E)."""

    def spread(values: NDArray[np.int64]) -> NDArray[np.float64]:
        logs: NDArray[np.float64] = xlogy(values, values)
        return logs

    total = counts.sum(axis=(0, 2))
    nats: NDArray[np.float64] = (
        spread(counts).sum(axis=(0, 2))
        - spread(counts.sum(axis=2)).sum(axis=0)
        - spread(counts.sum(axis=0)).sum(axis=1)
        + spread(total)
    ) / positive(total)
    bits: NDArray[np.float64] = np.maximum(nats, 0.0) / np.log(2)  # rounding alone takes it below 0; NaN stays NaN
    return bits
