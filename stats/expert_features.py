"""What stays of an expert when its hidden neurons are put in another order."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.expert_grams import PairGrams
from moescope.stats.expert_similarity import Part

Family = Literal["gate·gate", "up·up", "down·down", "gate·up", "gate·down", "up·down"]

FAMILIES: tuple[Family, ...] = ("gate·gate", "up·up", "down·down", "gate·up", "gate·down", "up·down")
"""The features of one probe, in the order they are stored."""

PROBES = 128


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Random directions all experts are looked at along.

    Attributes:
        inward: (H, J) float32, standard normal; p_j, for the rows of gate and up.
        outward: (H, J) float32, standard normal; q_j, for the columns of down.
    """

    inward: NDArray[np.float32]
    outward: NDArray[np.float32]


def draw_probes(hidden: int, count: int = PROBES, seed: int = 0) -> Probes:
    """Draw the probes of a model; the same arguments give the same probes.

    Args:
        hidden: H, width of the residual stream.
        count: J, number of probes.
        seed: of the generator.

    Raises:
        ValueError: if `hidden` or `count` is below 1.
    """
    if hidden < 1 or count < 1:
        raise ValueError(f"needs a width and probes, got {hidden} and {count}")
    rng = np.random.default_rng(seed)
    return Probes(*rng.standard_normal((2, hidden, count), dtype=np.float32))


class NeuronFeatures:
    """Projects one expert on the probes, block by block, and sums over its neurons.

    With neuron f's rows g_f, u_f of gate and up and column d_f of down, a = g_f·p_j, b = u_f·p_j, c = d_f·q_j, the
    features are Σ_f a², Σ_f b², Σ_f c² (that is ‖G p_j‖², ‖U p_j‖², ‖Dᵀ q_j‖²) and Σ_f ab, Σ_f ac, Σ_f bc. A sum over f
    is blind to the order of the neurons; the mixed ones see which rows belong together. Each is divided by its parts'
    root mean square over the probes, which takes the norms of the expert away: left in, they make every feature of a
    large expert large.

    Holds 3·F·J float64 for one expert at a time.
    """

    def __init__(self, neurons: int, probes: Probes) -> None:
        """Start an expert of `neurons` (F) hidden neurons."""
        self._probes = probes
        self._neurons = neurons
        count = probes.inward.shape[1]
        self._projected: dict[Part, NDArray[np.float64]] = {
            part: np.zeros((neurons, count)) for part in ("gate", "up", "down")
        }
        hidden = len(probes.inward)
        self._seen = {
            part: np.zeros(rows, np.bool_)
            for part, rows in zip(("gate", "up", "down"), (neurons, neurons, hidden), strict=True)
        }

    def add(self, part: Part, start: int, rows: NDArray[np.float32]) -> None:
        """Add rows `start`, `start` + 1, … of a matrix.

        Args:
            part: gate and up are (F, H), down is (H, F), as `torch.nn.Linear` stores them.
            start: index of the first row.
            rows: (n, H), or (n, F) for down, float32.

        Raises:
            ValueError: if the rows do not fit the matrix or were given before.
        """
        hidden = len(self._probes.inward)
        total, width = (hidden, self._neurons) if part == "down" else (self._neurons, hidden)
        stop = start + len(rows)
        if rows.ndim != 2 or rows.shape[1] != width or start < 0 or stop > total:
            raise ValueError(f"{part} is ({total}, {width}); rows {start} to {stop} are {rows.shape}")
        if self._seen[part][start:stop].any():
            raise ValueError(f"rows {start} to {stop} of {part} overlap rows given before")
        self._seen[part][start:stop] = True
        # A non-finite weight spoils the expert; overflow and its like show in `finish`.
        with np.errstate(over="ignore", invalid="ignore"):
            if part == "down":
                self._projected[part] += rows.T @ self._probes.outward[start:stop]
            else:
                self._projected[part][start:stop] = rows @ self._probes.inward

    def finish(self) -> NDArray[np.float64]:
        """(6, J) float64 features in the order of `FAMILIES`; all NaN if a part is zero or not finite.

        Raises:
            ValueError: if rows are missing.
        """
        missing = [part for part, seen in self._seen.items() if not seen.all()]
        if missing:
            raise ValueError(f"rows are missing of {', '.join(missing)}")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            gate, up, down = (
                projected / np.sqrt((projected**2).sum(axis=0).mean()) for projected in self._projected.values()
            )
            pairs = ((gate, gate), (up, up), (down, down), (gate, up), (gate, down), (up, down))
            features = np.stack([(first * second).sum(axis=0) for first, second in pairs])
        return features if np.isfinite(features).all() else np.full(features.shape, np.nan)


def feature_grams(left: NDArray[np.float64], right: NDArray[np.float64]) -> PairGrams:
    """Inner products of the experts of two layers by their features.

    Every feature is standardised over the experts of its layer, which is the centring; then each expert's own mean over
    the features is taken away, so that cosines are correlations.

    Args:
        left: (E, 6, J) float64, features of each expert of one layer; NaN for unusable ones.
        right: (E, 6, J) float64, of the other layer, along the same probes.

    Raises:
        ValueError: if the layers differ in experts or probes.
    """
    if left.shape != right.shape or left.ndim != 3:
        raise ValueError(f"layers of different widths cannot be compared: {left.shape} and {right.shape}")
    first, second = _standardise(left), _standardise(right)
    return PairGrams(left=(first @ first.T)[None], between=(first @ second.T)[None], right=(second @ second.T)[None])


def _standardise(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E, 6·J): each column of mean 0 and spread 1 over the usable experts, then each row of mean 0."""
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
