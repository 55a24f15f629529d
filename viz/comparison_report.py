"""A comparison's figures, text and structured data, under their documented names."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope import __version__
from moescope.stats.comparison import LEVEL, Change, Distances, ExpertMove, WithinRun
from moescope.stats.pairwise import finite_mean
from moescope.viz.activation import NAMES
from moescope.viz.comparison import difference_heatmap, distance_lines, distance_matrix, moved_bars
from moescope.viz.comparison_data import (
    ComparedPair,
    ComparisonData,
    EveryDistance,
    Side,
    layer_p_values,
    moved_p_values,
    ratio_in_words,
)
from moescope.viz.page import Page, Section, write_page
from moescope.viz.pages import write_figures, write_text
from moescope.viz.structured import to_strict_json
from moescope.viz.summary import WIDTH, field, section
from moescope.viz.theme import clip, printable

FIGURES = {
    "comparison_difference.html": difference_heatmap,
    "comparison_distance.html": distance_lines,
    "comparison_experts.html": moved_bars,
}
EVERY_FIGURE = "comparison_all.html"
PAGE_NAME = "comparison.html"
LONGEST_NAME = 30
MOST_IN_FULL = 3
"""Comparisons that the command line prints in full; of more, a line each."""
NOISE_NOTE = (
    "`within` is the distance between two random halves of one run's prompts, averaged over halvings. Halves have half "
    "the prompts, so it is an upper estimate of what the draw of prompts alone does to the distance of two runs; "
    "`noise` is that estimate brought to the size of the whole runs, `ratio` the distance over it: near 1 where "
    "nothing but the draw of prompts differs. It is not a test."
)
TEST_NOTE = (
    "Tests go over the splits of the prompts. A layer's distance is held against randomly signed sums of its splits' "
    "residuals (wild cluster bootstrap), corrected for all layers by the largest; an expert's share is tested by t, "
    "corrected for all experts of all layers (Holm). Over the same prompts, split by split, what prompts share cancels."
)


def write_comparison(data: ComparisonData, folder: Path | str) -> list[Path]:
    """Write the comparison into a folder, replacing files of the same names; each file appears whole or not at all.

    Args:
        data: the results.
        folder: where to write; made if it does not exist.

    Returns:
        The files written, but for `plotly.min.js`, which lies beside them.

    Raises:
        OSError: if the folder cannot be made or written to.
    """
    folder = Path(folder)
    figures = {name: draw(data.pairs, data.subject) for name, draw in FIGURES.items()}
    figures[EVERY_FIGURE] = distance_matrix(data.every, data.measure, data.subject)
    texts = {
        "comparison_report.txt": comparison_text(data),
        "comparison.json": json.dumps(comparison_data(data), ensure_ascii=False, allow_nan=False) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(figures, folder, ", ".join(data.names))
    for name, text in texts.items():
        write_text(folder / name, text)
    write_page(_page(data, figures), folder / PAGE_NAME)
    return [folder / name for name in (PAGE_NAME, *figures, *texts)]


def _page_findings(data: ComparisonData) -> list[str]:
    """One item a comparison, all of a few, one line each of many; and who is closest."""
    every = every_finding(data.every)
    if len(data.pairs) > MOST_IN_FULL:
        return [*(_in_one_line(pair) for pair in data.pairs), *every]
    pairs = ("; ".join(line.strip() for line in pair_findings(pair)).replace(":; ", ": ") for pair in data.pairs)
    return [*pairs, *every]


def _page(data: ComparisonData, figures: Mapping[str, go.Figure]) -> Page:
    """The comparison as one page."""
    tall = max((len(pair.result.layers) for pair in data.pairs), default=0)
    facts = [("Profiles", ", ".join(data.names)), ("Measure", NAMES[data.measure])]
    facts += [] if data.domain is None else [("Domain", data.domain)]
    return Page(
        title=f"Comparison of {' and '.join(data.names)}" if len(data.names) < 3 else "Comparison of profiles",
        subject=data.subject,
        verdict=None,
        facts=facts,
        notes=data.remarks,
        findings=_page_findings(data),
        sections=[
            Section(
                "difference",
                "Difference by layer and expert",
                "Orange experts are used more than in the reference, blue ones less; hover for both values.",
                figures["comparison_difference.html"],
                int(np.clip(11 * tall + 220, 420, 1140)),
                page="comparison_difference.html",
            ),
            Section(
                "distance",
                "Distance by layer",
                "How far apart the two distributions over experts are, layer by layer. The noise is what the draw of "
                "prompts alone does to this distance; a full mark is a layer that differs by more, at the 5% level for "
                "all layers together. Halves of one run (hover) lie further apart than the noise: they have half the "
                "prompts.",
                figures["comparison_distance.html"],
                520,
                page="comparison_distance.html",
            ),
            Section(
                "moved",
                "Experts that moved most",
                "The largest differences of single experts, in either direction. Pale bars are not shown to be more "
                "than the draw of prompts, at the 5% level for all experts of all layers.",
                figures["comparison_experts.html"],
                620,
                page="comparison_experts.html",
            ),
            *_every_section(data, figures[EVERY_FIGURE]),
        ],
        footer=f"moescope {__version__}",
    )


def _every_section(data: ComparisonData, figure: go.Figure) -> list[Section]:
    """All against all, where there are more than two."""
    if len(data.every.names) < 3:
        return []
    return [
        Section(
            "every",
            "Each against each",
            "Mean distance over the layers. On the diagonal: the distance between two halves of one, an upper estimate "
            "of what the draw of prompts does.",
            figure,
            int(np.clip(36 * len(data.every.names) + 320, 460, 900)),
            page=EVERY_FIGURE,
        )
    ]


def findings(data: ComparisonData) -> list[str]:
    """Six lines for each of a few comparisons, one line for each of many; of more than two profiles who is closest."""
    if len(data.pairs) <= MOST_IN_FULL:
        lines = [line for pair in data.pairs for line in pair_findings(pair)]
    else:
        lines = [_in_one_line(pair) for pair in data.pairs]
    return [printable(line) for line in (*lines, *every_finding(data.every), *data.remarks)]


def every_finding(every: EveryDistance) -> list[str]:
    """Which two of more than two lie closest together, and which furthest apart; nothing where that is not known."""
    mean = finite_mean(every.between.jensen_shannon, -1)
    first, second = np.triu_indices(len(every.names), 1)
    known = np.isfinite(mean[first, second])
    if len(every.names) < 3 or known.sum() < 2:
        return []
    first, second = first[known], second[known]
    order = np.argsort(mean[first, second], kind="stable")
    closest, furthest = (
        f"{clip(printable(every.names[first[at]]), LONGEST_NAME)} and "
        f"{clip(printable(every.names[second[at]]), LONGEST_NAME)} ({mean[first[at], second[at]]:.4f} bits)"
        for at in (order[0], order[-1])
    )
    return [f"of all {len(every.names)}, closest together: {closest}; furthest apart: {furthest}"]


def pair_findings(pair: ComparedPair) -> list[str]:
    """A comparison in six lines: who, distance, noise, tests, the layer furthest off, the experts that moved most."""
    result, name, reference = pair.result, _short(pair.other), _short(pair.reference)
    divergence = result.between.jensen_shannon
    if not np.isfinite(divergence).any():
        return [f"{name} against {reference}: no layer has tokens on both sides"]
    noise, ratio = result.noise.jensen_shannon, result.ratio.jensen_shannon
    furthest = int(np.nanargmax(divergence))
    lines = [
        f"{name} ({pair.other.tokens:,} tokens) against {reference} ({pair.reference.tokens:,} tokens), "
        f"{NAMES[result.kind]}, mean over {int(np.isfinite(divergence).sum())} layers:",
        f"  distance: Jensen-Shannon {_mean(divergence)} bits, "
        f"total variation {_mean(result.between.total_variation)}; Pearson r {_mean(result.correlation)}",
    ]
    if np.isfinite(noise).any():
        lines.append(
            f"  noise: {_mean(noise)} bits, so the distance is {_times(_mean_ratio(divergence, noise))} the noise "
            f"(within {reference} {_mean(_level(result.within_reference))}, "
            f"within {name} {_mean(_level(result.within_other))})"
        )
    else:
        lines.append("  noise: not known")
    if pair.change is not None:
        lines.append(f"  beyond the draw of prompts: {_changed(pair.change)}")
    lines.append(
        f"  furthest apart: layer {result.layers[furthest]}, {divergence[furthest]:.4f} bits"
        + (f", {_times(ratio[furthest])} its noise" if math.isfinite(ratio[furthest]) else "")
    )
    moved = ", ".join(
        f"layer {move.layer} expert {move.expert} {move.before:.2%} → {move.after:.2%}" for move in result.moved[:3]
    )
    lines.append(f"  moved most: {moved or 'no expert moved'}")
    return lines


def comparison_text(data: ComparisonData) -> str:
    """The comparison as text, 100 columns at most: what was compared; of each pair, findings, layers and experts."""
    title = "moescope comparison"
    remarks = [line for remark in data.remarks for line in field("remark", remark)]
    about = [
        *field("compared", data.subject),
        *field("profiles", ", ".join(data.names)),
        *field("measure", NAMES[data.measure]),
        *(field("domain", data.domain) if data.domain is not None else []),
        *remarks,
        *field("noise", NOISE_NOTE),
        *field("tests", TEST_NOTE),
    ]
    sections = [section("About", about), *(_pair_section(pair) for pair in data.pairs)]
    if every := every_finding(data.every):
        sections.append(section("Each against each", [part for line in every for part in _wrapped(line)]))
    return "\n".join([title, "=" * len(title), "", "\n\n".join(sections), ""])


def comparison_data(data: ComparisonData) -> dict[str, Any]:
    """All results, for `comparison.json`.

    Args:
        data: the results.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None; a value that is not defined is None.
    """
    tree = {
        "metadata": {
            "names": data.names,
            "subject": data.subject,
            "measure": data.measure,
            "domain": data.domain,
            "by_domain": data.by_domain,
            "remarks": data.remarks,
            "noise": NOISE_NOTE,
            "tests": TEST_NOTE,
            "moescope_version": __version__,
        },
        "comparisons": [_pair_data(pair) for pair in data.pairs],
        "all_distances": _every_data(data.every),
    }
    strict: dict[str, Any] = to_strict_json(tree)
    return strict


def _in_one_line(pair: ComparedPair) -> str:
    """Distance, noise and the expert that moved most."""
    result = pair.result
    divergence, noise = result.between.jensen_shannon, result.noise.jensen_shannon
    if not np.isfinite(divergence).any():
        return pair_findings(pair)[0]
    move = result.moved[0] if result.moved else None
    changed = f"; {_changed(pair.change)}" if pair.change is not None else ""
    return (
        f"{_short(pair.other)} against {_short(pair.reference)}: Jensen-Shannon {_mean(divergence)} bits, "
        f"{_times(_mean_ratio(divergence, noise))} the noise{changed}; furthest apart in layer "
        f"{result.layers[int(np.nanargmax(divergence))]}; "
        + (f"layer {move.layer} expert {move.expert} {move.before:.2%} → {move.after:.2%}" if move else "nothing moved")
    )


def _changed(change: Change) -> str:
    """How many layers and experts differ by more than the draw of prompts."""
    layers, experts = np.isfinite(change.layer_p_corrected).sum(), np.isfinite(change.p_corrected).sum()
    if not layers:
        return "cannot be tested, since all prompts of a run lie in one split"
    how = "tested over the same prompts" if change.paired else "tested over different prompts"
    return (
        f"{change.layers_changed.sum():,} of {layers:,} layers and {change.experts_changed.sum():,} of {experts:,} "
        f"experts (p ≤ {LEVEL} for all of them together, {how})"
    )


def _pair_section(pair: ComparedPair) -> str:
    """Findings, a line each layer, a line each expert that moved."""
    result = pair.result
    lines = [part for line in pair_findings(pair) for part in _wrapped(line)]
    lines += [
        "",
        f"{'layer':>7}{'JS bits':>10}{'noise':>10}{'ratio':>8}{'p':>9}"
        f"{'TV':>10}{'noise':>10}{'ratio':>8}{'Pearson r':>11}",
    ]
    columns = (
        (result.between.jensen_shannon, 10, ".5f"),
        (result.noise.jensen_shannon, 10, ".5f"),
        (result.ratio.jensen_shannon, 8, ".1f"),
        (layer_p_values(pair), 9, ".2g"),
        (result.between.total_variation, 10, ".5f"),
        (result.noise.total_variation, 10, ".5f"),
        (result.ratio.total_variation, 8, ".1f"),
        (result.correlation, 11, ".4f"),
    )
    for row, layer in enumerate(result.layers):
        cells = (_number(float(column[row]), form).rjust(width) for column, width, form in columns)
        lines.append(f"{layer:>7}{''.join(cells)}")
    if result.moved:
        lines += ["", f"{'layer':>7}{'expert':>8}{'before':>11}{'after':>11}{'difference':>12}{'p':>10}  ratio"]
        lines += [_move_line(move, p) for move, p in zip(result.moved, moved_p_values(pair), strict=True)]
    lines += [
        "",
        "p: of the layer for all layers together, of an expert for all experts of all layers; - if not tested",
    ]
    return section(clip(f"{_short(pair.other)} against {_short(pair.reference)}", WIDTH), lines)


def _move_line(move: ExpertMove, p: float) -> str:
    """One row of the table of experts."""
    return (
        f"{move.layer:>7}{move.expert:>8}{move.before:>11.4%}{move.after:>11.4%}{move.difference:>+12.4%}"
        f"{_number(p, '.2g'):>10}  "
        f"{ratio_in_words(move.ratio)}"
    )


def _pair_data(pair: ComparedPair) -> dict[str, Any]:
    """One comparison as plain data."""
    result = pair.result
    return {
        "reference": _side_data(pair.reference),
        "other": _side_data(pair.other),
        "layer_indices": result.layers,
        "experts_per_layer": result.experts,
        "jensen_shannon_bits": _levels(pair, "jensen_shannon"),
        "total_variation": _levels(pair, "total_variation"),
        "pearson_r": result.correlation,
        "within_run": {"reference": _within_data(result.within_reference), "other": _within_data(result.within_other)},
        "tests": _tests_data(pair.change),
        "difference_matrix": result.difference,
        "experts_moved": [
            {
                "layer": move.layer,
                "expert": move.expert,
                "from": move.before,
                "to": move.after,
                "difference": move.difference,
                "ratio": move.ratio,
                "p_value_all_experts": p,
            }
            for move, p in zip(result.moved, moved_p_values(pair), strict=True)
        ],
    }


def _tests_data(change: Change | None) -> dict[str, Any] | None:
    """Tests by layer and by expert; None where the measure has no splits."""
    if change is None:
        return None
    return {
        "same_prompts": change.paired,
        "replicates": change.replicates,
        "seed": change.seed,
        "level": LEVEL,
        "layer_p_value": change.layer_p_value,
        "layer_p_value_all_layers": change.layer_p_corrected,
        "num_layers_changed": change.layers_changed.sum(),
        "expert_p_value": change.p_value,
        "expert_p_value_all_experts": change.p_corrected,
        "num_experts_changed": change.experts_changed.sum(),
    }


def _every_data(every: EveryDistance) -> dict[str, Any]:
    """All against all: means over layers, each layer, and the level within each."""
    return {
        "names": every.names,
        **{
            key: {
                "mean": finite_mean(getattr(every.between, name), -1),
                "by_layer": getattr(every.between, name),
                "between_halves": getattr(every.within, name),
            }
            for key, name in (("jensen_shannon_bits", "jensen_shannon"), ("total_variation", "total_variation"))
        },
    }


def _side_data(side: Side) -> dict[str, Any]:
    return {"name": side.name, "model_id": side.model_id, "num_tokens": side.tokens, "runs": side.runs}


def _levels(pair: ComparedPair, name: str) -> dict[str, Any]:
    """One distance by layer, with all that it is to be held against, and its means."""
    result = pair.result
    between, noise = getattr(result.between, name), getattr(result.noise, name)
    within = [
        None if level is None else getattr(level.distances, name)
        for level in (result.within_reference, result.within_other)
    ]
    return {
        "between": between,
        "within_reference": within[0],
        "within_other": within[1],
        "noise": noise,
        "ratio": getattr(result.ratio, name),
        "mean_between": _nanmean(between),
        "mean_noise": _nanmean(noise),
        "ratio_of_means": _mean_ratio(between, noise),
    }


def _within_data(level: WithinRun | None) -> dict[str, Any] | None:
    if level is None:
        return None
    return {"splits": level.splits, "partitions": level.partitions, "seed": level.seed}


def _level(within: WithinRun | None) -> NDArray[np.float64]:
    distances: Distances | None = None if within is None else within.distances
    return np.empty(0) if distances is None else distances.jensen_shannon


def _nanmean(values: NDArray[np.float64]) -> float:
    """Mean of the defined values; NaN if there is none."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _mean_ratio(between: NDArray[np.float64], noise: NDArray[np.float64]) -> float:
    """Mean distance over mean noise, over the layers that have both; NaN without a noise."""
    both = np.isfinite(between) & np.isfinite(noise)
    level = _nanmean(noise[both])
    return _nanmean(between[both]) / level if level > 0 else float("nan")


def _mean(values: NDArray[np.float64]) -> str:
    return _number(_nanmean(values), ".4f")


def _number(value: float, form: str) -> str:
    """The number, or `-` where it is not defined."""
    return format(value, form) if math.isfinite(value) else "-"


def _times(ratio: float) -> str:
    return f"{_number(ratio, '.1f')} ×"


def _short(side: Side) -> str:
    """The name of a side on one line, not too long."""
    return clip(printable(side.name), LONGEST_NAME)


def _wrapped(line: str) -> Sequence[str]:
    """The line in as many as the width asks for, continued under itself."""
    indent = " " * (len(line) - len(line.lstrip()))
    return wrap(line, WIDTH, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]
