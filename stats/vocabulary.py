"""How much does a token's id decide which experts it goes to?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import check_ascending
from moescope.stats.token_sets import LN2, choice_shares, clear_ratio, entropy_bits, freedom, specificity_floor

LEAST_SELECTIONS = 100
"""Selections that an expert must have from frequent token ids to be ranked."""


SIZES = 48
"""Numbers of selections for which chance is computed; between them it is interpolated."""

TINY = 1e-12
"""Bits that count as none where a logarithm is taken."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTokens:
    """The token ids of one expert.

    Attributes:
        layer: true model index.
        expert: expert id.
        selections: by all tokens.
        from_frequent: of them, those by the frequent token ids.
        bits: how far the ids of its tokens lie from those of all (Kullback-Leibler divergence), less its bias.
        bias: the bias, already taken off.
        clear: whether that is beyond what any expert would have by chance; see `clear_ratio`.
        tokens: token ids that select it most beyond their share, and how much of `from_frequent` is theirs, largest
            excess first.
        expected: what would be theirs by how often they occur.
    """

    layer: int
    expert: int
    selections: int
    from_frequent: int
    bits: float
    bias: float
    clear: bool
    tokens: tuple[tuple[int, float], ...]
    expected: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyUse:
    """Experts of the V most frequent token ids.

    Attributes:
        layers: (L,) true model indices.
        tokens: (V,) token ids.
        occurrences: (V,) how often each occurs.
        covered: share of all tokens that these ids are.
        information: (L,) mutual information in bits of the token id and an expert drawn from the token, less its bias.
        bias: (L,) the bias, already taken off.
        ceiling: (L,) bits that it has where the id decides: entropy of the drawn expert, less log₂ k.
        specificity: (V, L) Kullback-Leibler divergence in bits of a token id's experts from those of all frequent ids,
            less its bias; `information` is their mean by occurrences.
        specificity_floor: (V, L) the bias, already taken off.
        effective: (V, L) effective number of experts 2^H of a token id, H with its bias taken off: k is the least.
        effective_all: (L,) the same over all frequent ids.
        specific: experts whose tokens are most particular, first the most.
    """

    layers: tuple[int, ...]
    tokens: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    covered: float
    information: NDArray[np.float64]
    bias: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    specificity: NDArray[np.float64]
    specificity_floor: NDArray[np.float64]
    effective: NDArray[np.float64]
    effective_all: NDArray[np.float64]
    specific: tuple[ExpertTokens, ...]

    @property
    def decided(self) -> NDArray[np.float64]:
        """(L,) information between chance, 0, and its ceiling, 1, where the token id decides; NaN without a ceiling.

        Both lose the bias, as in the adjusted mutual information of N. Vinh, J. Epps, J. Bailey (JMLR 11, 2010).
        """
        most = self.ceiling - self.bias
        share: NDArray[np.float64] = self.information / np.where(most > 1e-9, most, np.nan)
        return share


def vocabulary_use(
    counts: NDArray[np.int64],
    occurrences: NDArray[np.int64],
    tokens: NDArray[np.int64],
    totals: NDArray[np.int64],
    all_tokens: int,
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
    most: int = 60,
    each: int = 5,
) -> VocabularyUse:
    """Entropy, information and the experts that stand out.

    With p_v the experts of id v and p those of all frequent ids, I = Σ w_v KL(p_v ‖ p). What the n_v tokens of an id
    would have if ids were dealt to tokens at random, `specificity_floor`, is taken off each, and their mean off I.
    Entropy misses (U_v - k) / (2 k n_v ln 2) (Miller and Madow, 1955). The ids of an expert are held against those of
    all tokens in the same way, a token having one id.

    Tokens are taken as exchangeable: an id that occurs in few requests owes some of its experts to those.

    Args:
        counts: (V, L, E) int64, selections of the tokens of each id.
        occurrences: (V,) int64, how often each occurs.
        tokens: (V,) the ids.
        totals: (L, E) int64, selections of all tokens.
        all_tokens: tokens behind `totals`.
        top_k: (L,) experts that a token selects.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.
        most: experts listed at most.
        each: token ids listed of each expert.

    Returns:
        NaN where there are too few tokens.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if counts.ndim != 3 or counts.shape[0] != len(occurrences) or counts.shape[1] != len(layers):
        raise ValueError(f"got counts of shape {counts.shape} for {len(occurrences)} token ids, {len(layers)} layers")
    check_ascending(layers)
    k = np.asarray(top_k, np.float64)
    number = int(occurrences.sum())
    together = counts.sum(axis=0)
    shares, mean = choice_shares(counts, experts), choice_shares(together, experts)
    ratio = np.divide(shares, mean, where=(shares > 0) & (mean > 0), out=np.ones_like(shares))
    divergence = (shares * np.log2(ratio)).sum(axis=-1)
    inverse = 1 / np.where(occurrences > 0, occurrences, np.nan)
    own_free = freedom(counts, top_k)
    sizes, place = np.unique(occurrences, return_inverse=True)
    floors = np.array([specificity_floor(together, top_k, size, number, experts) for size in sizes.tolist()])
    floor = floors.reshape(-1, len(layers))[place]
    weights = occurrences / max(number, 1)
    bias = np.einsum("v,vl->l", weights, floor)
    return VocabularyUse(
        layers=tuple(int(layer) for layer in layers),
        tokens=np.asarray(tokens, np.int64),
        occurrences=occurrences,
        covered=number / all_tokens if all_tokens else float("nan"),
        information=np.einsum("v,vl->l", weights, divergence) - bias if len(weights) > 1 else np.full(len(k), np.nan),
        bias=bias,
        ceiling=np.maximum(entropy_bits(mean) - np.log2(k), 0.0),
        specificity=divergence - floor,
        specificity_floor=floor,
        effective=2 ** (entropy_bits(shares) + own_free * inverse[:, None] / (2 * k * LN2)),
        effective_all=2 ** entropy_bits(mean),
        specific=_specific(counts, occurrences, tokens, totals, layers, most, each),
    )


def _specific(
    counts: NDArray[np.int64],
    occurrences: NDArray[np.int64],
    tokens: NDArray[np.int64],
    totals: NDArray[np.int64],
    layers: Sequence[int],
    most: int,
    each: int,
) -> tuple[ExpertTokens, ...]:
    """The experts whose tokens lie furthest from all tokens."""
    number = occurrences.sum()
    if len(occurrences) < 2:
        return ()
    expected = occurrences / number
    selections = counts.sum(axis=0)
    shares = counts / np.maximum(selections, 1)
    ratio = np.divide(shares, expected[:, None, None], where=shares > 0, out=np.ones_like(shares))
    raw, bias = (shares * np.log2(ratio)).sum(axis=0), _id_floor(occurrences, selections)
    ranked = selections >= LEAST_SELECTIONS
    bits = np.where(ranked, raw - bias, -np.inf)
    clear = clear_ratio(len(occurrences) - 1, int(np.count_nonzero(ranked)))
    found = []
    for cell in np.argsort(-bits, axis=None, kind="stable")[:most]:
        slot, expert = np.unravel_index(cell, bits.shape)
        if not np.isfinite(bits[slot, expert]):
            break
        own = shares[:, slot, expert]
        best = np.argsort(expected - own, kind="stable")[:each]
        found.append(
            ExpertTokens(
                layer=int(layers[slot]),
                expert=int(expert),
                selections=int(totals[slot, expert]),
                from_frequent=int(selections[slot, expert]),
                bits=float(bits[slot, expert]),
                bias=float(bias[slot, expert]),
                clear=bool(raw[slot, expert] > clear * bias[slot, expert]),
                tokens=tuple((int(tokens[v]), float(own[v])) for v in best),
                expected=tuple(float(expected[v]) for v in best),
            )
        )
    return tuple(found)


def _id_floor(occurrences: NDArray[np.int64], selections: NDArray[np.int64]) -> NDArray[np.float64]:
    """(L, E) divergence of the ids of so many random tokens (L, E) from those of all, in bits."""
    number = int(occurrences.sum())
    sizes, place = np.unique(np.maximum(selections, 1), return_inverse=True)
    knots = np.unique(np.geomspace(sizes[0], sizes[-1], SIZES).astype(np.int64))
    floors = [specificity_floor(occurrences[None], [1], size, number, [len(occurrences)])[0] for size in knots.tolist()]
    found: NDArray[np.float64] = np.exp(np.interp(np.log(sizes), np.log(knots), np.log(np.maximum(floors, TINY))))
    return found[place].reshape(selections.shape)
