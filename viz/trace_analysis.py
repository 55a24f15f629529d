"""From the sums over a trace to what its page and its file show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layer_agreement import LayerAgreement, layer_agreement
from moescope.stats.repetition import Repetition, repetition
from moescope.stats.settling import Settling, settling
from moescope.stats.token_groups import TokenGroups, token_groups
from moescope.stats.vocabulary import VocabularyUse, vocabulary_use

if TYPE_CHECKING:
    from moescope.profiler.trace_sums import TraceSums


@dataclass(frozen=True, slots=True, eq=False)
class TraceAnalysis:
    """What the tokens of a trace say.

    Attributes:
        model_id: the model.
        architecture: its class.
        engine: what ran it, in words.
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        top_k: (L,) experts that a token selects.
        tokens: tokens analysed.
        requests: requests analysed.
        chosen: whether these were asked for by number.
        anchors: tokens compared at all lags.
        repetition: what a token shares with those before it.
        agreement: what layers tell of each other.
        vocabulary: what token ids decide.
        settling: how soon the profile looks like that of all.
        position: buckets of positions in a request.
        time: windows of the longest request.
        longest: its number.
        window: tokens of a window.
        texts: text of token ids, where it is known.
        seconds: how long the reading took.
        created: when the run was made.
        version: of moescope that wrote the trace.
    """

    model_id: str
    architecture: str
    engine: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: int
    requests: int
    chosen: bool
    anchors: int
    repetition: Repetition
    agreement: LayerAgreement
    vocabulary: VocabularyUse
    settling: Settling
    position: TokenGroups
    time: TokenGroups
    longest: int
    window: int
    texts: Mapping[int, str]
    seconds: float
    created: str
    version: str


def analyze_trace(sums: "TraceSums", texts: Mapping[int, str] | None = None, n_jobs: int = 1) -> TraceAnalysis:
    """Compute what the sums of `moescope.sum_trace` say.

    Args:
        sums: sums over a trace.
        texts: text of token ids, for those of `sums.frequent` that should be named.
        n_jobs: threads that compare layers.
    """
    model, run = sums.about.model, sums.about.run
    layers, experts, top_k = model.layer_indices, model.experts, model.top_k
    by_step, by_bucket = sums.counts.sum(axis=1), sums.counts.sum(axis=0)
    totals: NDArray[np.int64] = by_step.sum(axis=0)
    return TraceAnalysis(
        model_id=model.id,
        architecture=model.architecture,
        engine=f"{run.engine.name} {run.engine.version}, {run.engine.device}, {run.engine.dtype}",
        layers=tuple(layers),
        experts=tuple(experts),
        top_k=tuple(top_k),
        tokens=sums.tokens,
        requests=sums.requests,
        chosen=sums.chosen,
        anchors=sums.anchors,
        repetition=repetition(
            totals,
            sums.tokens,
            split_kept=sums.split_kept,
            split_pairs=sums.split_pairs,
            split_random_kept=sums.split_random_kept,
            split_random_pairs=sums.split_random_pairs,
            lags=sums.lags,
            lag_kept=sums.lag_kept,
            lag_pairs=sums.lag_pairs,
            held=sums.held,
            held_windows=sums.held_windows,
            top_k=top_k,
            layers=layers,
            top_kept=sums.top_kept,
            top_counts=sums.top_counts,
        ),
        agreement=layer_agreement(sums.sample, top_k, experts, layers, n_jobs, sums.sample_split),
        vocabulary=vocabulary_use(
            sums.vocabulary, sums.occurrences, sums.frequent, totals, sums.tokens, top_k, experts, layers
        ),
        settling=settling(by_step, sums.step_tokens, sums.step_requests, top_k, experts, layers),
        position=token_groups(by_bucket, sums.cell_tokens.sum(axis=0), sums.position_starts, top_k, experts, layers),
        time=token_groups(
            sums.windows,
            sums.window_tokens,
            np.arange(len(sums.window_tokens)) * sums.window,
            top_k,
            experts,
            layers,
        ),
        longest=sums.longest,
        window=sums.window,
        texts=dict(texts or {}),
        seconds=sums.seconds,
        created=run.created,
        version=sums.about.version,
    )
