"""How much does a token's set of experts in one layer tell of its set in another?"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, gammaln, stdtrit

from moescope.stats.layout import check_ascending
from moescope.stats.pairwise import by_distance, finite_mean
from moescope.stats.reliability import jackknife
from moescope.stats.token_sets import LEVEL, LN2, entropy_bits

SINGULAR = 1e-9
"""A direction of an expert set's covariance below this fraction of the largest has no spread."""

TOKENS_AT_A_TIME = 256
"""Tokens whose experts are written out as a matrix."""

LARGE = 64.0
"""Mean of a Poisson number beyond which a series is enough."""

PAIR_FIELDS = (
    "explained",
    "explained_chance",
    "explained_noise",
    "information",
    "bias",
    "ceiling",
    "overlap",
    "overlap_chance",
)

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
        explained_noise: (L, L) what no pair of layers reaches by chance, 19 times out of 20, if tokens are independent.
        information: (L, L) mutual information in bits of an expert drawn from the token in layer i and one drawn in
            layer j, less its bias; symmetric.
        bias: (L, L) the bias, already taken off.
        ceiling: (L, L) bits that it cannot exceed.
        overlap: (L, L) share of a token's experts, of the smaller k, whose index it has in both layers; NaN for layers
            of different width.
        overlap_chance: (L, L) the same for two different tokens, one in each layer.
        overlap_without: (S, L, L) the one less the other without the requests of one split, for each split that has
            tokens: what intervals rest on, as tokens of a request hang together.
    """

    layers: tuple[int, ...]
    tokens: int
    explained: NDArray[np.float64]
    explained_chance: NDArray[np.float64]
    explained_noise: NDArray[np.float64]
    information: NDArray[np.float64]
    bias: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    overlap: NDArray[np.float64]
    overlap_chance: NDArray[np.float64]
    overlap_without: NDArray[np.float64]

    @property
    def informed(self) -> NDArray[np.float64]:
        """(L, L) information between chance, 0, and its ceiling, 1; NaN where the ceiling is no higher than chance.

        Both lose the bias, as in the adjusted mutual information of N. Vinh, J. Epps, J. Bailey (JMLR 11, 2010).
        """
        most = self.ceiling - self.bias
        share: NDArray[np.float64] = self.information / np.where(most > SINGULAR, most, np.nan)
        return share


def layer_agreement(
    chosen: Ids,
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
    n_jobs: int = 1,
    splits: NDArray[np.uint8] | None = None,
) -> LayerAgreement:
    """Agreement of all pairs of layers, from the tokens that chose both of two experts.

    Explained: with x and y the indicators of a token's experts in the two layers, tr(Syx Sxx⁺ Sxy) / tr(Syy), the mean
    of R² over the experts of layer j, each with the weight of its variance (the redundancy index of D. Stewart and
    W. Love, Psych. Bulletin 70, 1968). If tokens are paired at random its mean is exactly r / (T - 1), r the rank of
    Sxx; it is corrected as R² is, 1 - (1 - R²) (T - 1) / (T - 1 - r) (M. Ezekiel, 1930).

    Information: Σ p log₂ p/(q q') of the two drawn experts. Paired at random, λ = T π π' tokens have both of two
    experts on average, with (1 - π) (1 - π') T / (T - 1) times the variance of a Poisson number; so the bias is the sum
    over pairs of experts of (1 - π) (1 - π') φ(λ) / (k k' (T - 1)) with φ(λ) = E[J log₂(J/λ)] of a Poisson J. Where λ
    is large φ is 1 / (2 ln 2), and for k = 1 that is the bias of Miller and Madow (1955). A drawn expert has at most
    H - log₂ k bits in common with the set that it came from, hence the ceiling, the smaller of the two (data
    processing; Cover and Thomas, "Elements of Information Theory", 2.8).

    Tokens are taken as exchangeable: what they have in common because their ids, requests or domains are the same is
    agreement, too.

    Args:
        chosen: unsigned (T, L, K), expert ids by token and layer; what is past a layer's own k is ignored.
        top_k: (L,) experts that a token selects.
        experts: (L,) routed experts.
        layers: (L,) true model indices, ascending.
        n_jobs: threads.
        splits: (T,) split of the request of each token; without it, all are of one.

    Returns:
        NaN where a layer has nothing that varies, or there are too few tokens.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if chosen.ndim != 3 or not chosen.shape[1] == len(top_k) == len(experts) == len(layers):
        raise ValueError(f"got ids of shape {chosen.shape} for {len(layers)} layers")
    check_ascending(layers)
    tokens, depth = len(chosen), len(layers)
    found = {name: np.full((depth, depth), np.nan) for name in PAIR_FIELDS}
    own = [_layer(chosen[:, slot], k, width) for slot, (k, width) in enumerate(zip(top_k, experts, strict=True))]
    pairs = list(combinations(range(depth), 2)) if tokens > 1 else []
    with ThreadPoolExecutor(n_jobs) as pool:
        for (i, j), values in zip(
            pairs, pool.map(lambda pair: _pair(own[pair[0]], own[pair[1]], 2 * len(pairs)), pairs), strict=True
        ):
            for name, (there, back) in values.items():
                found[name][i, j], found[name][j, i] = there, back
    return LayerAgreement(
        layers=tuple(int(layer) for layer in layers),
        tokens=tokens,
        overlap_without=_overlap_without(
            chosen, top_k, experts, np.zeros(tokens, np.uint8) if splits is None else splits
        ),
        **found,
    )


def excess_by_distance(found: LayerAgreement, deltas: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Overlap beyond chance, mean over pairs of layers Δ apart, and how far a 95% interval reaches to either side.

    By jackknife over splits of the requests, with the 5% shared among the distances (Bonferroni).

    Args:
        found: the agreement of layers.
        deltas: (D,) distances in model layers.

    Returns:
        (D,) and (D,) float64; NaN where no layers are so far apart, the second below three splits too.
    """
    splits = len(found.overlap_without)

    def mean(without: int | None) -> NDArray[np.float64]:
        beyond = found.overlap - found.overlap_chance if without is None else found.overlap_without[without]
        return finite_mean(by_distance(beyond, found.layers, deltas), 0)

    beyond, error = jackknife(mean, splits)
    looks = max(int(np.isfinite(beyond).sum()), 1)
    return beyond, stdtrit(max(splits - 1, 1), 1 - LEVEL / (2 * looks)) * error


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One layer of T tokens.

    Attributes:
        ids: (k, T) expert ids.
        width: routed experts, E.
        share: (E,) share of tokens that chose each.
        whitening: (E, r) W with W Wᵀ the pseudo-inverse of the covariance of the indicators.
        spread: variance of all indicators together.
        entropy: of a drawn expert, less log₂ k.
    """

    ids: Ids
    width: int
    share: NDArray[np.float64]
    whitening: NDArray[np.float64]
    spread: float
    entropy: float


def _layer(chosen: Ids, k: int, width: int) -> _Layer:
    ids = np.ascontiguousarray(chosen[:, :k].T)
    tokens = max(len(chosen), 1)
    share = np.bincount(ids.reshape(-1), minlength=width) / tokens
    return _Layer(
        ids=ids,
        width=width,
        share=share,
        whitening=_whitening(_together(ids, ids, width, width) / tokens - np.outer(share, share)),
        spread=float((share * (1 - share)).sum()),
        entropy=max(float(entropy_bits(share / k)) - float(np.log2(k)), 0.0),
    )


def _pair(one: _Layer, two: _Layer, looks: int) -> dict[str, tuple[float, float]]:
    """What the one tells of the two, and the two of the one, by the fields of `LayerAgreement`."""
    (k, tokens), other_k = one.ids.shape, len(two.ids)
    both = _together(one.ids, two.ids, one.width, two.width) / tokens
    beyond = both - np.outer(one.share, two.share)
    there, back = _explained(one, two, beyond, tokens, looks), _explained(two, one, beyond.T, tokens, looks)
    missing = np.outer(1 - one.share, 1 - two.share) * _poisson_information(tokens * np.outer(one.share, two.share))
    bias = float(missing.sum()) / (k * other_k * (tokens - 1))
    information = _information(both / (k * other_k), one.share / k, two.share / other_k) - bias
    same = (np.nan, np.nan)
    if one.width == two.width:
        same = (float(np.trace(both)) / min(k, other_k), float(one.share @ two.share) / min(k, other_k))
    return {
        "explained": (there[0], back[0]),
        "explained_chance": (there[1], back[1]),
        "explained_noise": (there[2], back[2]),
        "information": (information,) * 2,
        "bias": (bias,) * 2,
        "ceiling": (min(one.entropy, two.entropy),) * 2,
        "overlap": (same[0],) * 2,
        "overlap_chance": (same[1],) * 2,
    }


def _overlap_without(
    chosen: Ids, top_k: Sequence[int], experts: Sequence[int], splits: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """(S, L, L) overlap beyond chance without each split; NaN for a layer with itself, or of another width."""
    depth, width = len(top_k), max(experts)
    number = np.bincount(splits)
    used = np.flatnonzero(number)
    same, counts = np.zeros((len(used), depth, depth)), np.zeros((len(used), depth, width))
    for place, split in enumerate(used.tolist()):
        own = chosen[splits == split]
        for start in range(0, len(own), TOKENS_AT_A_TIME):
            part = own[start : start + TOKENS_AT_A_TIME]
            has = np.zeros((depth, len(part), width), np.float32)
            for slot, k in enumerate(top_k):
                np.put_along_axis(has[slot], part[:, slot, :k].astype(np.intp), 1.0, axis=1)
            same[place] += has.reshape(depth, -1) @ has.reshape(depth, -1).T
            counts[place] += has.sum(axis=1)
    left = np.maximum(len(chosen) - number[used], 1)[:, None, None]
    share = (counts.sum(axis=0) - counts) / left
    least = np.minimum.outer(top_k, top_k)
    comparable = np.equal.outer(experts, experts) & ~np.eye(depth, dtype=bool) & (left < len(chosen))
    beyond = ((same.sum(axis=0) - same) / left - share @ share.swapaxes(1, 2)) / least
    return np.where(comparable & (len(used) > 1), beyond, np.nan)


def _explained(
    one: _Layer, two: _Layer, beyond: NDArray[np.float64], tokens: int, looks: int
) -> tuple[float, float, float]:
    """Variance of the two that the one explains, less chance; chance; and what the largest of all looks may be."""
    rank = one.whitening.shape[1]
    if not rank or two.spread <= SINGULAR or tokens - 1 <= rank:
        return np.nan, np.nan, np.nan
    chance = rank / (tokens - 1)
    raw = float(np.square(one.whitening.T @ beyond).sum()) / two.spread
    # R² of one response, which is as if all experts of the layer went together: the widest that it can be
    most = float(betaincinv(rank / 2, (tokens - 1 - rank) / 2, 1 - LEVEL / looks))
    return 1 - (1 - raw) / (1 - chance), chance, 1 - (1 - most) / (1 - chance)


def _together(one: Ids, two: Ids, width: int, other: int) -> NDArray[np.int64]:
    """(E, E') tokens that chose both, from ids (k, T) and (k', T)."""
    count = np.zeros(width * other, np.int64)
    for ids in one:
        count += np.bincount((ids.astype(np.int32) * other + two).reshape(-1), minlength=width * other)
    return count.reshape(width, other)


def _whitening(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E, r) W with W Wᵀ the pseudo-inverse."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > SINGULAR * max(float(values[-1]), SINGULAR)
    whitening: NDArray[np.float64] = vectors[:, kept] / np.sqrt(values[kept])
    return whitening


def _information(both: NDArray[np.float64], one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Σ p log₂ p / (q q') of a joint distribution and its margins."""
    where = both > 0
    return float((both[where] * np.log2(both[where] / np.outer(one, two)[where])).sum())


@cache
def _poisson_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of means λ, and E[J log₂(J/λ)] of Poisson numbers with that mean."""
    means = np.geomspace(1e-9, LARGE, 600)
    counts = np.arange(1, int(LARGE + 12 * np.sqrt(LARGE)))
    chance = np.exp(counts * np.log(means)[:, None] - means[:, None] - gammaln(counts + 1))
    return np.log(means), (chance * counts * np.log2(counts / means[:, None])).sum(axis=1)


def _poisson_information(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[J log₂(J/λ)] of Poisson numbers J with means λ, any shape; 0 for 0."""
    known, values = _poisson_table()
    bits = np.interp(np.log(np.where(means > 0, means, 1.0)), known, values)
    # beyond the table by its series, 1/2 + 1/12λ nats
    beyond = (0.5 + 1 / (12 * np.maximum(means, LARGE))) / LN2
    found: NDArray[np.float64] = np.where(means > LARGE, beyond, np.where(means > 0, bits, 0.0))
    return found
