"""How much does a token's set of experts in one layer tell of its set in another?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import check_ascending
from moescope.stats.token_sets import LN2

SINGULAR = 1e-9
"""A direction of an expert set's covariance below this fraction of the largest has no spread."""

Ids = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class LayerAgreement:
    """Every layer against every other, token by token.

    Row i, column j: what layer i tells of layer j. Diagonals are NaN.

    Attributes:
        layers: (L,) true model indices.
        tokens: tokens behind the numbers.
        explained: (L, L) share of the variance of the choices of layer j that a linear function of those of layer i
            explains, less what chance explains: 0 by chance, 1 where layer i determines layer j, whatever the experts
            are called.
        explained_chance: (L, L) what chance explains, already taken off.
        information: (L, L) mutual information in bits of an expert drawn from the token in layer i and one drawn in
            layer j, less its bias; symmetric.
        bias: (L, L) the bias, already taken off.
        ceiling: (L, L) bits that it cannot exceed.
        overlap: (L, L) share of a token's experts, of the smaller k, whose index it has in both layers; NaN for layers
            of different width.
        overlap_chance: (L, L) the same for two different tokens, one in each layer.
    """

    layers: tuple[int, ...]
    tokens: int
    explained: NDArray[np.float64]
    explained_chance: NDArray[np.float64]
    information: NDArray[np.float64]
    bias: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    overlap: NDArray[np.float64]
    overlap_chance: NDArray[np.float64]

    @property
    def informed(self) -> NDArray[np.float64]:
        """(L, L) information between chance, 0, and its ceiling, 1; NaN where the ceiling is no higher than chance.

        Both lose the bias, as in the adjusted mutual information of N. Vinh, J. Epps, J. Bailey (JMLR 11, 2010).
        """
        most = self.ceiling - self.bias
        share: NDArray[np.float64] = self.information / np.where(most > SINGULAR, most, np.nan)
        return share


def layer_agreement(chosen: Ids, top_k: Sequence[int], experts: Sequence[int], layers: Sequence[int]) -> LayerAgreement:
    """Agreement of all pairs of layers, from the tokens that chose both of two experts.

    Explained: with x and y the indicators of a token's experts in the two layers, tr(Syx Sxx⁺ Sxy) / tr(Syy), the mean
    of R² over the experts of layer j, each with the weight of its variance (the redundancy index of D. Stewart and
    W. Love, Psych. Bulletin 70, 1968). If tokens are paired at random its mean is exactly r / (T - 1), r the rank of
    Sxx; it is corrected as R² is, 1 - (1 - R²) (T - 1) / (T - 1 - r) (M. Ezekiel, 1930).

    Information: Σ p log₂ p/(q q') of the two drawn experts. Paired at random, Pearson's χ² of sets has the mean
    T / (T - 1) (U - k) (U' - k'), as Var of a count is T² / (T - 1) π (1 - π) π' (1 - π'); so the bias is
    (U - k) (U' - k') / (2 k k' (T - 1) ln 2) bits, which for k = 1 is that of Miller and Madow (1955). A drawn expert
    has at most H - log₂ k bits in common with the set that it came from, hence the ceiling, the smaller of the two
    (data processing; Cover and Thomas, "Elements of Information Theory", 2.8).

    Tokens are taken as exchangeable: what they have in common because their ids, requests or domains are the same is
    agreement, too.

    Args:
        chosen: unsigned (T, L, K), expert ids by token and layer; what is past a layer's own k is ignored.
        top_k: (L,) experts that a token selects.
        experts: (L,) routed experts.
        layers: (L,) true model indices, ascending.

    Returns:
        NaN where a layer has nothing that varies, or there are too few tokens.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if chosen.ndim != 3 or not chosen.shape[1] == len(top_k) == len(experts) == len(layers):
        raise ValueError(f"got ids of shape {chosen.shape} for {len(layers)} layers")
    check_ascending(layers)
    tokens, depth = len(chosen), len(layers)
    own = [np.ascontiguousarray(chosen[:, slot, :k].T).astype(np.int32) for slot, k in enumerate(top_k)]
    counts = [np.bincount(ids.reshape(-1), minlength=width) for ids, width in zip(own, experts, strict=True)]
    names = ("explained", "explained_chance", "information", "bias", "ceiling", "overlap", "overlap_chance")
    found = {name: np.full((depth, depth), np.nan) for name in names}
    if tokens > 1:
        share = [count / tokens for count in counts]
        spread = [float((p * (1 - p)).sum()) for p in share]
        whitening = [
            _whitening(_together(ids, ids, width, width) / tokens, p)
            for ids, width, p in zip(own, experts, share, strict=True)
        ]
        used = [int((count > 0).sum()) for count in counts]
        entropy = [_drawn_entropy(p, k) for p, k in zip(share, top_k, strict=True)]
        for i in range(depth):
            for j in range(i + 1, depth):
                both = _together(own[i], own[j], experts[i], experts[j]) / tokens
                beyond = both - np.outer(share[i], share[j])
                for a, b, table in ((i, j, beyond), (j, i, beyond.T)):
                    rank = whitening[a].shape[1]
                    if rank and spread[b] > SINGULAR and tokens - 1 > rank:
                        chance = rank / (tokens - 1)
                        raw = float(np.square(whitening[a].T @ table).sum()) / spread[b]
                        found["explained"][a, b] = 1 - (1 - raw) / (1 - chance)
                        found["explained_chance"][a, b] = chance
                product = top_k[i] * top_k[j]
                bias = (used[i] - top_k[i]) * (used[j] - top_k[j]) / (2 * product * (tokens - 1) * LN2)
                values = {
                    "information": _information(both / product, share[i] / top_k[i], share[j] / top_k[j]) - bias,
                    "bias": bias,
                    "ceiling": min(entropy[i], entropy[j]),
                }
                if experts[i] == experts[j]:
                    smaller = min(top_k[i], top_k[j])
                    values["overlap"] = float(np.trace(both)) / smaller
                    values["overlap_chance"] = float(share[i] @ share[j]) / smaller
                for name, value in values.items():
                    found[name][i, j] = found[name][j, i] = value
    return LayerAgreement(layers=tuple(int(layer) for layer in layers), tokens=tokens, **found)


def _together(one: NDArray[np.int32], two: NDArray[np.int32], width: int, other: int) -> NDArray[np.int64]:
    """(E, E') tokens that chose both, from ids (k, T) and (k', T)."""
    count = np.zeros(width * other, np.int64)
    for ids in one * np.int32(other):
        count += np.bincount((ids + two).reshape(-1), minlength=width * other)
    return count.reshape(width, other)


def _whitening(both: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E, r) W with W Wᵀ the pseudo-inverse of the covariance of the indicators."""
    values, vectors = np.linalg.eigh(both - np.outer(share, share))
    kept = values > SINGULAR * max(float(values[-1]), SINGULAR)
    whitening: NDArray[np.float64] = vectors[:, kept] / np.sqrt(values[kept])
    return whitening


def _information(both: NDArray[np.float64], one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Σ p log₂ p / (q q') of a joint distribution and its margins."""
    where = both > 0
    return float((both[where] * np.log2(both[where] / np.outer(one, two)[where])).sum())


def _drawn_entropy(share: NDArray[np.float64], k: int) -> float:
    """Entropy of a drawn expert less log₂ k, in bits."""
    p = share[share > 0] / k
    return max(float(-(p * np.log2(p)).sum()) - float(np.log2(k)), 0.0)
