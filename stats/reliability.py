"""How far a layer's profile would come out the same from other prompts, and correlations freed from that noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from moescope.stats.layout import check_ascending, padding_mask
from moescope.stats.pairwise import CONSTANT_TOLERANCE, finite_mean

CONFIDENCE = 0.95
TARGET = 0.9
"""Reliability at which a correlation of two such layers is weakened by a tenth."""


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """What a run can say about its layers' profiles; the unit of inference is the split of the prompts.

    Attributes:
        layers: (L,) true model indices.
        reliability: (L,) float64, correlation over experts that the profile of another run of the same size, on other
            prompts of the same kind, is expected to have with this one. Not clipped: an estimate can lie below 0 or
            above 1. NaN in a layer without selections, with equal ones, or with fewer than two splits.
        reliability_error: (L,) float64, standard error by jackknife over splits; NaN below three splits.
        defined: (L,) bool, whether the reliability lies above 0 with 95% confidence (one-sided).
        across: (L, L) float64, correlation over experts of layer i from one set of prompts with layer j from another;
            the diagonal is `reliability`. It is free of what layers share only because they saw the same tokens.
        corrected: (L, L) float64, `across` divided by √(reliability_i · reliability_j): the correlation that endless
            prompts would show. NaN where either reliability is not defined, the diagonal 1. Never clipped.
        corrected_error: (L, L) float64, standard error by jackknife over splits.
        splits: splits that hold selections, S.
        tokens: tokens routed.
        target: the reliability that is asked for.
        tokens_enough: (L,) float64, tokens after which the layer is expected to reach `target`; NaN where its
            reliability is not defined.
    """

    layers: tuple[int, ...]
    reliability: NDArray[np.float64]
    reliability_error: NDArray[np.float64]
    defined: NDArray[np.bool_]
    across: NDArray[np.float64]
    corrected: NDArray[np.float64]
    corrected_error: NDArray[np.float64]
    splits: int
    tokens: int
    target: float
    tokens_enough: NDArray[np.float64]

    @property
    def split_half(self) -> NDArray[np.float64]:
        """(L,) correlation between two halves of the run: r with 2r / (1 + r) = reliability (Spearman-Brown)."""
        half: NDArray[np.float64] = self.reliability / (2 - self.reliability)
        return half

    @property
    def tokens_enough_for_most(self) -> float:
        """Tokens after which half of the layers reach the target; infinite if that cannot be told, NaN without layers.

        A layer of which the reliability is not defined counts as one that never does.
        """
        return float(np.median(np.nan_to_num(self.tokens_enough, nan=np.inf))) if self.layers else float("nan")

    def corrected_at(self, delta: int) -> float:
        """Mean of `corrected` over the pairs of layers `delta` model layers apart; NaN if no pair has one."""
        position = np.asarray(self.layers, dtype=np.int64)
        return float(finite_mean(self.corrected[position[None, :] - position[:, None] == delta], axis=0))

    @property
    def too_short(self) -> bool:
        """Whether fewer than half of the layers reach the target, so that noise weakens most correlations."""
        return not self.tokens_enough_for_most <= self.tokens


def layer_reliability(
    split_counts: NDArray[np.int64], experts: Sequence[int], layers: Sequence[int], tokens: int, target: float = TARGET
) -> Reliability:
    """Reliability of each layer's selection frequencies, and layer correlations freed from sampling noise.

    With x_s the counts of split s less their mean over experts and n_s its selections, ⟨x_is, x_jt⟩ over all s ≠ t
    estimates the covariance of the true profiles without bias, since different splits share no prompt. Divided by the
    variances of the whole run it gives `across`. With splits of one size that is the Spearman-Brown formula
    (C. Spearman; W. Brown, Br. J. Psychol. 3, 1910) on the split-half correlation, pooled over all ways of halving the
    splits. Divided by the estimated true variances it is the correction for attenuation (C. Spearman, Am. J. Psychol.
    15, 1904). Signal over noise grows with the tokens, so reliability ρ at T tokens reaches ρ' at
    T · ρ'(1 - ρ) / (ρ(1 - ρ')).

    Args:
        split_counts: (S, L, E) int64, selections by split of the prompts, of one domain or summed over several; splits
            without any are left out.
        experts: (L,) routed experts; columns beyond a layer's number are ignored. Layers that differ in it have no
            correlation.
        layers: (L,) true model indices, ascending.
        tokens: tokens routed.
        target: reliability to reach, within (0, 1).

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `target` is not within (0, 1).
    """
    check_splits(split_counts, experts, layers)
    if not 0 < target < 1:
        raise ValueError(f"target must lie between 0 and 1, got {target}")
    used = split_counts[split_counts.any(axis=(1, 2))]
    moments = _Moments.of(used, experts)
    across, across_error = jackknife(moments.across, len(used))
    reliability, error = across.diagonal().copy(), across_error.diagonal().copy()
    with np.errstate(invalid="ignore"):
        defined = reliability > stdtrit(max(len(used) - 1, 1), CONFIDENCE) * error
    both = defined[:, None] & defined[None, :]
    corrected, corrected_error = jackknife(moments.corrected, len(used))
    with np.errstate(invalid="ignore", divide="ignore"):
        enough = np.maximum(tokens * target * (1 - reliability) / (reliability * (1 - target)), 0.0)
    return Reliability(
        layers=tuple(int(layer) for layer in layers),
        reliability=reliability,
        reliability_error=error,
        defined=defined,
        across=across,
        corrected=np.where(both, corrected, np.nan),
        corrected_error=np.where(both, corrected_error, np.nan),
        splits=len(used),
        tokens=int(tokens),
        target=target,
        tokens_enough=np.where(defined, enough, np.nan),
    )


def jackknife(
    estimate: Callable[[int | None], NDArray[np.float64]], splits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An estimate, and its standard error by leaving out one split at a time.

    √((S - 1)/S · Σ (θ_s - θ̄)²) (J. W. Tukey, Ann. Math. Stat. 29, 1958; B. Efron and C. Stein, Ann. Stat. 9, 1981).

    Args:
        estimate: the estimate without the split of this position, or of all splits (None).
        splits: splits there are, S.

    Returns:
        Both of the estimate's shape; the error is NaN below three splits, or where an estimate is.
    """
    whole = estimate(None)
    if splits < 3:
        return whole, np.full_like(whole, np.nan)
    without = np.stack([estimate(split) for split in range(splits)])
    spread = without - without.mean(axis=0)
    return whole, np.sqrt((splits - 1) / splits * np.square(spread).sum(axis=0))


def check_splits(split_counts: NDArray[np.int64], experts: Sequence[int], layers: Sequence[int]) -> None:
    """Refuse splits that cannot belong to these layers.

    Args:
        split_counts: (S, L, E) selections by split.
        experts: (L,) routed experts.
        layers: (L,) true model indices.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if split_counts.ndim != 3 or not split_counts.shape[1] == len(experts) == len(layers):
        raise ValueError(
            f"expected (splits, {len(layers)} layers, experts), got shape {split_counts.shape} "
            f"and {len(experts)} expert numbers"
        )
    check_ascending(layers)


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Sums over splits from which an estimate without any one split follows.

    Attributes:
        centred: (S, L, E) counts less their mean over the layer's experts.
        products: (S, L, L) inner products over experts within each split.
        selections: (S, L) selections.
        same_width: (L, L) whether two layers have as many experts.
    """

    centred: NDArray[np.float64]
    products: NDArray[np.float64]
    selections: NDArray[np.float64]
    same_width: NDArray[np.bool_]

    @classmethod
    def of(cls, split_counts: NDArray[np.int64], experts: Sequence[int]) -> "_Moments":
        """Moments of the splits (S, L, E)."""
        width = np.asarray(experts, dtype=np.int64)
        inside = ~padding_mask(experts, split_counts.shape[2])
        counts = np.where(inside, split_counts, 0).astype(np.float64)
        selections = counts.sum(axis=2)
        mean = selections / np.maximum(width, 1)
        centred = np.where(inside, counts - mean[:, :, None], 0.0)
        return cls(centred, centred @ centred.swapaxes(1, 2), selections, width[:, None] == width[None, :])

    def covariances(self, without: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """True covariance (L, L) as estimated, and the run's own variances (L,), both of shares; NaN if unknown."""
        kept = np.arange(len(self.centred)) != (-1 if without is None else without)
        total, n = self.centred[kept].sum(axis=0), self.selections[kept]
        within = self.products[kept].sum(axis=0)
        pairs = np.outer(n.sum(axis=0), n.sum(axis=0)) - n.T @ n
        pairs = np.where(self.same_width & (pairs > 0), pairs, np.nan)
        size = n.sum(axis=0)
        variance = np.square(total).sum(axis=1) / np.where(size > 0, size, np.nan) ** 2
        variance[~(variance > CONSTANT_TOLERANCE**2)] = np.nan
        return (total @ total.T - within) / pairs, variance

    def across(self, without: int | None) -> NDArray[np.float64]:
        """(L, L) correlation between layers of different prompts."""
        true, own = self.covariances(without)
        correlation: NDArray[np.float64] = true / np.sqrt(np.outer(own, own))
        return correlation

    def corrected(self, without: int | None) -> NDArray[np.float64]:
        """(L, L) correlation of the true profiles; NaN where a true variance comes out at 0 or below."""
        true, own = self.covariances(without)
        signal = np.where(true.diagonal() > 0, true.diagonal(), np.nan)
        signal[np.isnan(own)] = np.nan
        correlation: NDArray[np.float64] = true / np.sqrt(np.outer(signal, signal))
        return correlation
