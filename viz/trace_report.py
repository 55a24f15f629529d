"""What the tokens of a trace say, written: `trace.html` and `trace.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from moescope.stats.token_groups import TokenGroups
from moescope.viz.page import write_page
from moescope.viz.pages import write_bytes
from moescope.viz.structured import encode, to_strict_json
from moescope.viz.trace_analysis import TraceAnalysis
from moescope.viz.trace_figures import (
    agreement_by_distance,
    agreement_heatmap,
    groups_heatmap,
    groups_lines,
    held_by_length,
    position_names,
    repetition_by_lag,
    repetition_by_layer,
    settling_lines,
    vocabulary_by_layer,
    vocabulary_heatmap,
    window_names,
)
from moescope.viz.trace_findings import trace_findings, trace_notes
from moescope.viz.trace_page import trace_page, trace_subject

PAGE_NAME = "trace.html"
DATA_NAME = "trace.json"
POSITION = ("Routing by position", "Position in the request")
TIME = ("Routing along the longest request", "Position of the window")


def write_trace_analysis(analysis: TraceAnalysis, folder: Path | str, structured: bool = True) -> list[Path]:
    """Write the results into a folder, replacing those of an earlier time; each file appears whole or not at all.

    Args:
        analysis: the results.
        folder: where to write; made if it does not exist. Not that of a trace, whose `trace.json` is another.
        structured: whether to write `trace.json` too.

    Returns:
        The files written, but for `plotly.min.js`, which lies beside them.

    Raises:
        OSError: if the folder cannot be made or written to.
        ValueError: if the folder is that of a trace.
    """
    folder = Path(folder)
    if (folder / "index.jsonl").exists():
        raise ValueError(f"{folder} holds a trace, whose {DATA_NAME} would be replaced: write into another folder")
    page = trace_page(analysis, trace_figures(analysis))
    folder.mkdir(parents=True, exist_ok=True)
    write_page(page, folder / PAGE_NAME)
    if not structured:
        (folder / DATA_NAME).unlink(missing_ok=True)  # an earlier one's, which this one leaves out
        return [folder / PAGE_NAME]
    write_bytes(folder / DATA_NAME, encode(trace_data(analysis), "json"))
    return [folder / PAGE_NAME, folder / DATA_NAME]


def trace_figures(analysis: TraceAnalysis) -> dict[str, go.Figure]:
    """All figures, by the ids of their sections.

    Args:
        analysis: the results.
    """
    subject = trace_subject(analysis)
    positions, windows = position_names(analysis.position), window_names(analysis.time)
    return {
        "repetition": repetition_by_layer(analysis.repetition, subject),
        "lags": repetition_by_lag(analysis.repetition, subject),
        "held": held_by_length(analysis.repetition, subject),
        "agreement": agreement_heatmap(analysis.agreement, subject),
        "agreement-distance": agreement_by_distance(analysis.agreement, subject),
        "vocabulary": vocabulary_by_layer(analysis, subject),
        "vocabulary-tokens": vocabulary_heatmap(analysis, subject),
        "settling": settling_lines(analysis.settling, subject),
        "position": groups_heatmap(analysis.position, positions, *POSITION, subject),
        "position-lines": groups_lines(analysis.position, positions, *POSITION, subject),
        "time": groups_heatmap(analysis.time, windows, *TIME, subject),
        "time-lines": groups_lines(analysis.time, windows, *TIME, subject),
    }


def trace_data(analysis: TraceAnalysis) -> dict[str, Any]:
    """All results, for `trace.json`; what is not defined is null.

    Args:
        analysis: the results.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None.
    """
    repeated, agreed, vocabulary, settled = (
        analysis.repetition,
        analysis.agreement,
        analysis.vocabulary,
        analysis.settling,
    )
    data: Mapping[str, Any] = {
        "metadata": {
            "model_id": analysis.model_id,
            "architecture": analysis.architecture,
            "engine": analysis.engine,
            "layer_indices": analysis.layers,
            "num_experts_per_layer": analysis.experts,
            "top_k_per_layer": analysis.top_k,
            "tokens": analysis.tokens,
            "requests": analysis.requests,
            "requests_chosen": analysis.chosen,
            "created": analysis.created,
            "seconds": analysis.seconds,
            "findings": trace_findings(analysis),
            "notes": trace_notes(analysis),
        },
        "repetition": {
            "num_pairs": repeated.pairs,
            "share_kept": repeated.kept,
            "share_kept_interval": repeated.kept_interval,
            "order_interval": repeated.order_interval,
            "request_interval": repeated.request_interval,
            "chance": repeated.chance,
            "share_with_random_token_of_request": repeated.within,
            "mean_run_length": repeated.run,
            "mean_run_length_chance": repeated.run_chance,
            "top_expert_share_kept": repeated.top_kept,
            "top_expert_chance": repeated.top_chance,
            "lags": repeated.lags,
            "share_at_lag": repeated.at_lag,
            "num_pairs_at_lag": repeated.lag_pairs,
            "share_held": repeated.held,
            "share_held_chance": repeated.held_chance,
            "num_tokens_held": repeated.held_windows,
        },
        "layer_agreement": {
            "num_tokens": agreed.tokens,
            "variance_explained": agreed.explained,
            "variance_explained_chance": agreed.explained_chance,
            "variance_explained_noise": agreed.explained_noise,
            "mutual_information": agreed.information,
            "mutual_information_bias": agreed.bias,
            "mutual_information_ceiling": agreed.ceiling,
            "mutual_information_share": agreed.informed,
            "same_index_share": agreed.overlap,
            "same_index_chance": agreed.overlap_chance,
        },
        "vocabulary": {
            "token_ids": vocabulary.tokens,
            "texts": [analysis.texts.get(int(token)) for token in vocabulary.tokens],
            "occurrences": vocabulary.occurrences,
            "share_of_tokens": vocabulary.covered,
            "mutual_information": vocabulary.information,
            "mutual_information_bias": vocabulary.bias,
            "mutual_information_ceiling": vocabulary.ceiling,
            "share_decided": vocabulary.decided,
            "specificity": vocabulary.specificity,
            "specificity_chance": vocabulary.specificity_floor,
            "effective_experts": vocabulary.effective,
            "effective_experts_all": vocabulary.effective_all,
            "specific_experts": [
                {
                    "layer": one.layer,
                    "expert": one.expert,
                    "selections": one.selections,
                    "selections_by_frequent": one.from_frequent,
                    "bits": one.bits,
                    "bits_chance": one.bias,
                    "beyond_chance": one.clear,
                    "tokens": [
                        {"token_id": token, "share": share, "chance": expected}
                        for (token, share), expected in zip(one.tokens, one.expected, strict=True)
                    ],
                }
                for one in vocabulary.specific
            ],
        },
        "settling": {
            "tokens": settled.tokens,
            "requests": settled.requests,
            "jensen_shannon": settled.distance,
            "jensen_shannon_chance": settled.floor,
            "correlation_difference": settled.correlation,
            "unused_experts": settled.dead,
        },
        "position": _groups(analysis.position),
        "time_series": {"request": analysis.longest, "window": analysis.window, **_groups(analysis.time)},
    }
    strict: dict[str, Any] = to_strict_json(data)
    return strict


def _groups(found: TokenGroups) -> dict[str, Any]:
    return {
        "starts": found.starts,
        "tokens": found.tokens,
        "entropy": found.entropy,
        "jensen_shannon_from_rest": found.from_rest,
        "jensen_shannon_from_rest_chance": found.rest_floor,
        "jensen_shannon_from_before": found.from_before,
        "jensen_shannon_from_before_chance": found.before_floor,
        "clear_ratio": found.clear,
    }
