"""What stays of an expert when its hidden neurons are put in another order."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.expert_grams import PairGrams

Family = Literal["gate·gate", "up·up", "gate·up", "down·down"]

FAMILIES: tuple[Family, ...] = ("gate·gate", "up·up", "gate·up", "down·down")
"""The features of one probe, in the order they are stored."""


def normalise_features(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take the norms of the experts away: left in, they make every feature of a large expert large.

    With neuron f's rows g_f, u_f of gate and up and column d_f of down, and random directions p_j, q_j: a = g_f·p_j,
    b = u_f·p_j, c = d_f·q_j. The features are Σ_f a², Σ_f b², Σ_f ab, Σ_f c² (the first is ‖G p_j‖²), blind to the
    order of the neurons; the mixed one sees which rows belong together. Each is divided by its parts' root mean square
    over the directions.

    Args:
        sums: (…, 4, J) float64, the sums over neurons, in the order of `FAMILIES`.

    Returns:
        (…, 4, J) float64; all NaN for an expert of which a part is zero or not finite.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt(sums[..., [0, 1, 3], :].mean(axis=-1))
        gate, up, down = (size[..., part] for part in range(3))
        features: NDArray[np.float64] = (
            sums / np.stack([gate * gate, up * up, gate * up, down * down], axis=-1)[..., None]
        )
    usable = np.isfinite(features).all(axis=(-2, -1), keepdims=True)
    return np.where(usable, features, np.nan)


def feature_grams(left: NDArray[np.float64], right: NDArray[np.float64]) -> PairGrams:
    """Inner products of the experts of two layers by their features.

    Every feature is standardised over the experts of its layer, which is the centring; then each expert's own mean over
    the features is taken away, so that cosines are correlations.

    Args:
        left: (E, 4, J) float64, features of each expert of one layer; NaN for unusable ones.
        right: (E, 4, J) float64, of the other layer, along the same probes.

    Raises:
        ValueError: if the layers differ in experts or probes.
    """
    if left.shape != right.shape or left.ndim != 3:
        raise ValueError(f"layers of different widths cannot be compared: {left.shape} and {right.shape}")
    first, second = _standardise(left), _standardise(right)
    return PairGrams(left=(first @ first.T)[None], between=(first @ second.T)[None], right=(second @ second.T)[None])


def _standardise(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E, 4·J): each column of mean 0 and spread 1 over the usable experts, then each row of mean 0."""
    flat = features.reshape(len(features), -1)
    usable = np.isfinite(flat).all(axis=1)
    table = np.full(flat.shape, np.nan)
    if usable.any():
        kept = flat[usable]
        spread = kept.std(axis=0)
        constant = spread <= 1e-6 * np.abs(kept).max(axis=0)
        scaled = np.where(constant, 0.0, kept - kept.mean(axis=0)) / np.where(constant, 1.0, spread)
        table[usable] = scaled - scaled.mean(axis=1, keepdims=True)
    return table
