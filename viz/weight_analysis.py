"""From the sums over weights to what pages and files show."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moescope.stats.expert_features import feature_grams, normalise_features
from moescope.stats.expert_grams import PairGrams, pair_grams, within_cosine, without_faults
from moescope.stats.expert_matching import ExpertMatch, LayerPair, match_experts, verdict
from moescope.stats.expert_similarity import UnusableExpert, similarity_from_sums
from moescope.stats.similarity import similarity_at_distances
from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity
from moescope.viz.wording import in_bytes, index_ranges, minute

if TYPE_CHECKING:
    from moescope.profiler.weight_files import WeightRecord, WeightRun

_WORTH_A_PROCESS = 64
"""Experts of a layer from which on drawing a pair's nulls takes longer than starting a process."""

_NO_TABLE = np.empty((0, 0))


def analyze_weights(record: "WeightRecord", n_jobs: int = 1) -> WeightSimilarity | WeightChange:
    """Compute what the sums of `moescope.weigh` say.

    Args:
        record: Sums of a pass over one checkpoint, or over one against another.
        n_jobs: Pairs of layers that are matched at a time. More than one are matched in processes of their own, which
            start as those of `multiprocessing` do: a script then needs its `if __name__ == "__main__":`.
    """
    return (weight_similarity if record.run.against is None else weight_change)(record, n_jobs)


def about(run: "WeightRun") -> dict[str, str]:
    """What a pass has read and kept, in words."""
    sketch = f", a sketch: {run.coordinates:,} of {run.coordinates_total:,} weights of each expert"
    compared = "all pairs" if run.all_pairs else f"those Δ = {', '.join(map(str, run.deltas))} apart"
    return {
        "model": f"{run.model} ({run.architecture})",
        **({} if run.against is None else {"against": run.against}),
        "MoE layers": f"{len(run.layers)} ({index_ranges(run.layers)})",
        "experts": f"{run.experts}, each {run.hidden:,} × {run.width:,}, stored as {', '.join(run.dtypes)}",
        "read": f"{in_bytes(run.bytes_read)} of {in_bytes(run.bytes_total)}"
        + sketch * (run.coordinates < run.coordinates_total),
        "pairs": f"{compared} compared, {len(run.pairs)} matched"
        if run.against is None
        else f"{len(run.pairs)} matched",
        "measured": f"{minute(run.created)}, {run.engine}",
    }


def weight_similarity(record: "WeightRecord", n_jobs: int = 1) -> WeightSimilarity:
    """What the sums over one checkpoint say.

    Args:
        record: Sums of a pass over one checkpoint.
        n_jobs: Pairs of layers that are matched at a time.

    Raises:
        ValueError: The sums are of two checkpoints.
    """
    run = record.run
    tables = (
        record.raw,
        record.centred,
        record.means,
        record.router_cosine,
        record.router_norms,
        record.router_row_cosine,
    )
    if any(table is None for table in tables):
        raise ValueError("sums of two checkpoints say how one has changed, not how its layers are alike")
    raw, centred, means, cosine, norms, row_cosine = (_NO_TABLE if table is None else table for table in tables)
    layers = run.layers
    apart = np.abs(np.subtract.outer(layers, layers))
    shown = np.isin(apart, (0, *run.deltas))
    by_expert = record.non_finite[0].swapaxes(1, 2)
    matches = _matches(record, n_jobs)
    within = np.full(len(layers), np.nan)
    for (_, layer), gram in zip(run.sides[0], _within(record), strict=True):
        within[layer] = within_cosine(gram)
    return WeightSimilarity(
        model_id=run.model,
        architecture=run.architecture,
        layers=layers,
        experts=run.experts,
        hidden=run.hidden,
        width=run.width,
        dtypes=run.dtypes,
        deltas=run.deltas,
        routers=similarity_at_distances(
            cosine, norms, row_cosine, layers, [run.experts] * len(layers), layers[-1] - layers[0]
        ),
        same_index=similarity_from_sums(
            raw, centred, means, by_expert, layers, one_by_one=shown, asked=None if run.all_pairs else shown
        ),
        within=within,
        matches=matches,
        verdict=verdict(matches) if matches else None,
        coverage=_coverage(run),
        engine=run.engine,
        seconds=run.seconds,
        versions=run.versions,
        created=run.created,
    )


def weight_change(record: "WeightRecord", n_jobs: int = 1) -> WeightChange:
    """What the sums over two checkpoints say.

    Args:
        record: Sums of a pass over two checkpoints.
        n_jobs: Layers that are matched at a time.

    Raises:
        ValueError: The sums are of one checkpoint.
    """
    run = record.run
    if record.products is None or record.router_products is None or run.against is None:
        raise ValueError("sums of one checkpoint say how its layers are alike, not how it has changed")
    bad: NDArray[np.bool_] = np.logical_or.reduce(record.non_finite)
    whole = np.where(np.logical_or.reduce(bad), np.nan, record.products.sum(axis=1))
    parts = np.where(bad, np.nan, record.products)
    routers = np.where(np.isfinite(record.router_products).all(axis=0), record.router_products, np.nan)
    unusable = tuple(
        UnusableExpert(run.layers[row], int(expert), "non-finite" if bad[:, row, expert].any() else "zero")
        for row, expert in np.argwhere(~((whole[0] > 0) & (whole[2] > 0)))
    )
    matches = _matches(record, n_jobs)
    return WeightChange(
        model_id=run.model,
        against_id=run.against,
        architecture=run.architecture,
        layers=run.layers,
        experts=run.experts,
        cosine=_cosine(whole),
        part_cosine=_cosine(parts),
        relative_change=_relative(whole),
        part_relative_change=_relative(parts),
        router_cosine=_cosine(routers),
        router_relative_change=_relative(routers),
        unusable=unusable,
        matches=matches,
        verdict=verdict(matches) if matches else None,
        coverage=_coverage(run),
        engine=run.engine,
        seconds=run.seconds,
        versions=run.versions,
        created=run.created,
    )


def _matches(record: "WeightRecord", n_jobs: int) -> tuple[LayerPair, ...]:
    """All pairs of layers of the record, their nulls drawn; the seed of each is its place."""
    run = record.run
    if record.between is None:
        return ()
    within = _within(record)
    features = None if record.features is None else normalise_features(record.features.swapaxes(1, 2))
    if features is not None:
        bad = np.stack([np.logical_or.reduce(record.non_finite[source, :, layer]) for source, layer in run.sides[0]])
        features = np.where(bad[:, :, None, None], np.nan, features)

    work = [
        (
            pair_grams(within[left], between, within[right]),
            None if features is None else feature_grams(features[left], features[right]),
            number,
        )
        for number, (between, (left, right)) in enumerate(zip(record.between, run.sides[1], strict=True))
    ]
    jobs = min(n_jobs, len(work))
    if jobs > 1 and run.experts >= _WORTH_A_PROCESS:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            found = list(pool.map(_match, work))
    else:
        found = [_match(each) for each in work]
    return tuple(LayerPair(*pair, *matches) for pair, matches in zip(run.pairs, found, strict=True))


def _match(work: tuple[PairGrams, PairGrams | None, int]) -> tuple[ExpertMatch, ExpertMatch | None]:
    """The matches of a pair by weights and by features; the seed is the pair's place."""
    weights, features, number = work
    return (
        match_experts(weights, seed=(number, 0)),
        None if features is None else match_experts(features, seed=(number, 1)),
    )


def _within(record: "WeightRecord") -> Sequence[NDArray[np.float64]]:
    """(3, E, E) of each layer that is matched, NaN for experts that are not finite."""
    if record.within is None:
        return ()
    sides = zip(record.within, record.run.sides[0], strict=True)
    return [
        without_faults(total, np.logical_or.reduce(record.non_finite[source, :, layer]))
        for total, (source, layer) in sides
    ]


def _coverage(run: "WeightRun") -> WeightCoverage:
    return WeightCoverage(run.coordinates, run.coordinates_total, run.bytes_read, run.bytes_total)


def _cosine(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…) cosines from (4, …) products; NaN where either is zero."""
    size = products[0] * products[2]
    cosine: NDArray[np.float64] = np.clip(products[1] / np.sqrt(np.where(size > 0, size, np.nan)), -1.0, 1.0)
    return cosine


def _relative(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…) ‖a − b‖ / ‖b‖ from (4, …) products; NaN where b is zero."""
    change: NDArray[np.float64] = np.sqrt(products[3] / np.where(products[2] > 0, products[2], np.nan))
    return change
