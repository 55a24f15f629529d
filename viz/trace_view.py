"""A routing trace token by token: what there is to see of some of its requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.stats.token_routing import expert_surprisal, share_entropy, weight_shares
from moescope.viz.token_text import text_pieces

if TYPE_CHECKING:  # hand-over types
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_excerpt import TraceExcerpt

TOKENS = 5_000
"""Tokens of a view unless more are asked for."""


@dataclass(frozen=True, slots=True)
class ViewedRequest:
    """A request of a view.

    Attributes:
        number: Its number in the run.
        domain: Its domain.
        first: Its first token in the view.
        tokens: Its tokens in the view.
        length: Its tokens in the trace.
    """

    number: int
    domain: str
    first: int
    tokens: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class TraceView:
    """T tokens of R requests, L layers.

    Attributes:
        model_id: The model.
        layers: (L,) true model indices.
        experts: (L,) experts of each layer.
        top_k: (L,) experts of a token in each layer.
        requests: (R,) the requests, by number.
        token: int32 (T,), token ids.
        position: uint32 (T,), place in the request.
        generated: bool (T,), whether the token was generated rather than in the prompt.
        ids: unsigned (L, T, K), expert ids, those with the largest weight first, or as recorded where there are no
            weights; 0 past a layer's own k.
        shares: float32 (L, T, K), share of each in the token's weight, in the order of `ids`; None without weights.
        entropy: float64 (L, T), bits, of the shares; None without weights.
        surprisal: float64 (L, T), bits, of the experts against `use`; see `expert_surprisal`.
        use: float64 (L, E), share of a layer's selections that goes to each expert, over the counted tokens.
        counted: Tokens behind `use`.
        held: Tokens of the trace.
        texts: (T,) each token as text, or None where there is no tokenizer.
        remarks: Sentences on what is not as one may expect.
    """

    model_id: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    requests: tuple[ViewedRequest, ...]
    token: NDArray[np.int32]
    position: NDArray[np.uint32]
    generated: NDArray[np.bool_]
    ids: NDArray[np.unsignedinteger[Any]]
    shares: NDArray[np.float32] | None
    entropy: NDArray[np.float64] | None
    surprisal: NDArray[np.float64]
    use: NDArray[np.float64]
    counted: int
    held: int
    texts: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


def view_trace(
    trace: "Trace | Path | str", requests: Sequence[int] | None = None, *, tokens: int = TOKENS, tokenizer: Any = None
) -> TraceView:
    """What there is to see of some requests of a trace.

    Args:
        trace: The trace, or its folder.
        requests: Numbers of requests; None takes those with which the trace begins.
        tokens: Tokens to take at most.
        tokenizer: Gives tokens their text: anything with `decode(list of ids) -> str`, such as a transformers
            tokenizer; without one, tokens are shown by their ids.

    Raises:
        TraceError: Not a trace, damaged, without tokens, or without one of the requests.
        OptionError: `tokens` is below 1, or leaves nothing for a request that was asked for.
    """
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_excerpt import excerpt

    opened = trace if isinstance(trace, Trace) else Trace(trace)
    return excerpt_view(excerpt(opened, requests, tokens), tokenizer)


def excerpt_view(found: "TraceExcerpt", tokenizer: Any = None, remarks: Sequence[str] = ()) -> TraceView:
    """What there is to see of an excerpt.

    Args:
        found: The excerpt.
        tokenizer: Gives tokens their text; see `view_trace`.
        remarks: Sentences for the reader.
    """
    model, rows = found.about.model, found.rows
    ids, shares, entropy = rows.experts, None, None
    if rows.weights is not None:
        shares = weight_shares(rows.weights, model.top_k)
        order = np.argsort(-shares, axis=2, kind="stable")  # what lies past a layer's k is 0 and stays behind
        ids, shares = np.take_along_axis(ids, order, axis=2), np.take_along_axis(shares, order, axis=2)
        entropy = share_entropy(shares)
    sums = found.counts.sum(axis=1, keepdims=True)
    ends = (*found.starts[1:], len(rows))
    spans = list(zip(found.starts, ends, strict=True))
    texts = None
    if tokenizer is not None:
        texts = tuple(text for start, end in spans for text in text_pieces(tokenizer, rows.token[start:end].tolist()))
    return TraceView(
        model_id=model.id,
        layers=tuple(model.layer_indices),
        experts=tuple(model.experts),
        top_k=tuple(model.top_k),
        requests=tuple(
            ViewedRequest(number, found.about.domains[rows.domain[start]], start, end - start, length)
            for number, (start, end), length in zip(found.requests, spans, found.lengths, strict=True)
        ),
        token=rows.token,
        position=rows.position,
        generated=rows.phase > 0,
        ids=ids.transpose(1, 0, 2),
        shares=None if shares is None else shares.transpose(1, 0, 2),
        entropy=None if entropy is None else entropy.T,
        surprisal=expert_surprisal(rows.experts, model.top_k, found.counts, model.experts).T,
        use=found.counts / np.maximum(sums, 1),
        counted=found.counted,
        held=found.held,
        texts=texts,
        remarks=tuple(remarks),
    )
