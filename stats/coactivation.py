"""Which experts are chosen together beyond what their popularity alone would give, and the groups that they form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage

from moescope.stats.layout import check_ascending

ITERATIONS = 500
EXACT, CLOSE = 1e-12, 1e-9
"""Error of the experts' shares at which weights are found, and that which is taken when iterations are used up."""


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """Two experts of a layer.

    Attributes:
        layer: true model index.
        first: expert id, the lower.
        second: expert id.
        together: tokens that chose both.
        expected: tokens that would have by chance.
        excess: correlation of the two choices beyond chance; see `Coactivation`.
    """

    layer: int
    first: int
    second: int
    together: int
    expected: float
    excess: float

    @property
    def lift(self) -> float:
        """Together over expected; NaN where nothing is expected."""
        return self.together / self.expected if self.expected > 0 else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Coactivation:
    """Pairs of experts against their chance level.

    A profile keeps pairs for all prompts together, without splits, so there is no test here: topics that prompts keep
    to make experts go together as much as anything in the router does.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        observed: (L, E, E) int64, tokens that chose both, as given.
        expected: (L, E, E) float64, tokens that would choose both if nothing but each expert's popularity and k
            mattered; the diagonal is the expert's own count. Padding is 0, a layer without a known chance level NaN.
        excess: (L, E, E) float64, (observed - expected) / (T √(π(1-π) π'(1-π'))): the correlation of the two choices
            minus the correlation that chance gives. NaN on the diagonal, in the padding, and for experts that no token
            or every token chose.
        clusters: (L, E) int64, cluster of each expert, numbered by size from 0; -1 in the padding and for experts in no
            cluster.
        modularity: (L,) float64, share of a layer's pairs inside clusters beyond chance; 0 without clusters.
        chance_modularity: (L,) float64, the same where there is nothing to cluster: of counts drawn once by Poisson
            around `expected`, clustered likewise. The draw does not keep each expert's total, which puts it a little
            too high; over many pairs, or layers, one draw is much like another. As tokens of a prompt are not
            independent, to lie above it is no test.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    observed: NDArray[np.int64]
    expected: NDArray[np.float64]
    excess: NDArray[np.float64]
    clusters: NDArray[np.int64]
    modularity: NDArray[np.float64]
    chance_modularity: NDArray[np.float64]

    def strongest(self, top: int = 20, least: float = 5.0) -> tuple[ExpertPair, ...]:
        """The pairs of the largest excess.

        Args:
            top: at most so many.
            least: pairs expected fewer times are left out: their excess rests on next to nothing.
        """
        upper = np.triu(np.ones(self.excess.shape[1:], dtype=bool), k=1)
        size = np.where(upper & (self.expected >= least), self.excess, np.nan)
        above = np.flatnonzero(size > 0)
        order = above[np.argsort(-size.ravel()[above], kind="stable")[:top]]
        cells = np.stack(np.unravel_index(order, size.shape), axis=1).tolist()
        return tuple(
            ExpertPair(
                layer=self.layers[row],
                first=first,
                second=second,
                together=int(self.observed[row, first, second]),
                expected=float(self.expected[row, first, second]),
                excess=float(self.excess[row, first, second]),
            )
            for row, first, second in cells
        )


def coactivation(
    pairs: NDArray[np.int64],
    top_k: Sequence[int],
    tokens: int,
    experts: Sequence[int],
    layers: Sequence[int],
    seed: int = 0,
) -> Coactivation:
    """Hold pairs against the chance level, and cluster the experts of each layer.

    Clusters: average linkage on the excess, cut where the modularity of M. Newman (PNAS 103, 2006), with this chance
    level in the place of his, is largest. Noise too has a cut: `chance_modularity` says how large one.

    Args:
        pairs: (L, E, E) int64, tokens that chose both; the diagonal is the selection counts.
        top_k: (L,) experts a token selects.
        tokens: tokens routed, T.
        experts: (L,) routed experts; rows and columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.
        seed: seed of the draw behind `chance_modularity`.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if (
        pairs.ndim != 3
        or pairs.shape[1] != pairs.shape[2]
        or not len(pairs) == len(top_k) == len(experts) == len(layers)
    ):
        raise ValueError(f"got pairs of shape {pairs.shape} for {len(layers)} layers, {len(experts)} expert numbers")
    check_ascending(layers)
    expected, excess = np.zeros(pairs.shape), np.full(pairs.shape, np.nan)
    clusters = np.full(pairs.shape[:2], -1, np.int64)
    modularity, chance_modularity = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    rng = np.random.default_rng(seed)
    shares = np.diagonal(pairs, axis1=1, axis2=2) / np.where(tokens > 0, float(tokens), np.nan)
    for row, (width, k) in enumerate(zip(experts, top_k, strict=True)):
        own = slice(width)
        share = shares[row, own]
        chance = pair_probabilities(share, k)
        expected[row, own, own] = tokens * chance
        spread = np.sqrt(np.where((share > 0) & (share < 1), share * (1 - share), np.nan))
        beyond = pairs[row, own, own] / np.where(tokens > 0, tokens, np.nan) - chance
        excess[row, own, own] = beyond / np.outer(spread, spread)
        np.fill_diagonal(excess[row], np.nan)
        if k > 1 and np.isfinite(chance).all():
            np.fill_diagonal(beyond, 0.0)
            clusters[row, own], modularity[row] = _clusters(beyond, excess[row, own, own], k)
            noise = _drawn_by_chance(rng, tokens * chance) / tokens
            _, chance_modularity[row] = _clusters(noise, noise / np.outer(spread, spread), k)
    return Coactivation(
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(int(width) for width in experts),
        observed=pairs,
        expected=expected,
        excess=excess,
        clusters=clusters,
        modularity=modularity,
        chance_modularity=chance_modularity,
    )


def pair_probabilities(share: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Probability that a token chooses both of two experts if its k experts are as random as popularity allows.

    Of all distributions over sets of k experts that give each its share π, the one of largest entropy: sets with
    probability in proportion to the product of their experts' weights w, conditional Bernoulli sampling (S. Chen,
    A. Dempster, J. Liu, "Weighted finite population sampling to maximize entropy", Biometrika 81, 1994). Shares follow
    from weights by their π(m) = m w (1 - π(m - 1)) / Σ w (1 - π(m - 1)); weights from shares by scaling each one's odds
    to those wanted. Pairs follow in steps of two, from π(m; both) ∝ w w' (1 - π - π' + π(both))(m - 2), as the
    probability of neither; they sum to m (m - 1). Nothing is approximated.

    Args:
        share: (E,) float64, share of tokens that choose each expert; they sum to k.
        k: experts that a token selects.

    Returns:
        (E, E) float64, the diagonal is `share`. NaN if the shares do not sum to k, lie outside 0 and 1, or have no
        such distribution that is found.
    """
    unknown = np.full((len(share), len(share)), np.nan)
    if not (np.isfinite(share).all() and (share >= 0).all() and (share <= 1).all() and abs(share.sum() - k) < 1e-9 * k):
        return unknown
    # experts that every token or no token chooses leave nothing to chance
    free = np.flatnonzero((share > 0) & (share < 1))
    always = share == 1
    left = k - int(always.sum())
    pairs = share[:, None] * share[None, :]
    if left:
        # sets of more than half are told by what they leave out: with few in a set, rounding stays small
        inverted = 2 * left > len(free)
        chosen = 1 - share[free] if inverted else share[free]
        weights = _weights(chosen, len(free) - left if inverted else left)
        if weights is None:
            return unknown
        both = _pairs(weights, len(free) - left if inverted else left)
        pairs[np.ix_(free, free)] = both + (1 - chosen[:, None] - chosen[None, :] if inverted else 0.0)
    np.fill_diagonal(pairs, share)
    return pairs


def _inclusion(weights: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(E,) probability that each is in a set of `size`."""
    share = np.zeros(len(weights))
    for step in range(1, size + 1):
        share = weights * (1 - share)
        share *= step / share.sum()
    return share


def _weights(share: NDArray[np.float64], k: int) -> NDArray[np.float64] | None:
    """(E,) weights whose sets of k hold each expert with its share."""
    odds = share / (1 - share)
    weights: NDArray[np.float64] = share if k == 1 else odds
    before = np.inf
    for _ in range(ITERATIONS):
        found = _inclusion(weights, k)
        error = float(np.abs(found - share).max())
        if error < EXACT:
            break
        # where a few experts share what is left, each one's own step would be taken twice
        power = 1.0 if error < before / 4 else 0.5
        weights = weights * (odds * (1 - found) / found) ** power
        weights /= weights.max()
        before = error
    return weights if error < CLOSE else None


def _pairs(weights: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """(E, E) probability that both are in a set of k; the diagonal is 0."""
    product = np.outer(weights, weights)
    np.fill_diagonal(product, 0.0)
    both = np.zeros(product.shape)
    for size in range(2 + k % 2, k + 1, 2):
        share = _inclusion(weights, size - 2)
        both = product * (1 - share[:, None] - share[None, :] + both)
        both *= size * (size - 1) / both.sum()
    return both


def _drawn_by_chance(rng: np.random.Generator, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E, E) symmetric, what counts drawn around those expected have beyond them; the diagonal is 0."""
    above = np.triu_indices(len(expected), k=1)
    level = np.maximum(expected[above], 0.0)  # rounding may leave a pair that cannot be just below
    noise = np.zeros(expected.shape)
    noise[above] = rng.poisson(level) - level
    return noise + noise.T


def _clusters(beyond: NDArray[np.float64], excess: NDArray[np.float64], k: int) -> tuple[NDArray[np.int64], float]:
    """Cluster of each expert and the modularity: merge along average linkage, keep the best moment."""
    width = len(beyond)
    labels = np.full(width, -1, np.int64)
    if width < 2:
        return labels, 0.0
    distance = 1 - np.nan_to_num(excess)
    tree = linkage(distance[np.triu_indices(width, k=1)], "average")
    gains = np.zeros(width)
    sums, place = beyond.copy(), list(range(width))
    for step, (one, two) in enumerate(tree[:, :2].astype(np.intp).tolist()):
        into, gone = place[one], place[two]
        gains[step + 1] = gains[step] + 2 * sums[into, gone]
        sums[into] += sums[gone]
        sums[:, into] += sums[:, gone]
        place.append(into)
    best = int(np.argmax(gains))
    members: list[list[int]] = [[expert] for expert in range(width)]
    for one, two in tree[:best, :2].astype(np.intp).tolist():
        members.append(members[one] + members[two])
        members[one] = members[two] = []
    groups = sorted((group for group in members if len(group) > 1), key=lambda group: (-len(group), min(group)))
    for number, group in enumerate(groups):
        labels[group] = number
    return labels, float(gains[best] / (k * (k - 1)))
