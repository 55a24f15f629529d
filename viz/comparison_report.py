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
from moescope.stats.comparison import Distances, ExpertMove, WithinRun
from moescope.viz.activation import NAMES
from moescope.viz.comparison import difference_heatmap, distance_lines, moved_bars
from moescope.viz.comparison_data import ComparedPair, ComparisonData, Side, ratio_in_words
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
    """One item a comparison: all of a few, one line each of many."""
    if len(data.pairs) > MOST_IN_FULL:
        return [_in_one_line(pair) for pair in data.pairs]
    return ["; ".join(line.strip() for line in pair_findings(pair)).replace(":; ", ": ") for pair in data.pairs]


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
                "prompts alone does to this distance: only what lies well above it is a difference.",
                figures["comparison_distance.html"],
                520,
                page="comparison_distance.html",
            ),
            Section(
                "moved",
                "Experts that moved most",
                "The largest differences of single experts, in either direction.",
                figures["comparison_experts.html"],
                620,
                page="comparison_experts.html",
            ),
        ],
        footer=f"moescope {__version__}",
    )


def findings(data: ComparisonData) -> list[str]:
    """Five lines for each of a few comparisons, one line for each of many; then the remarks."""
    if len(data.pairs) <= MOST_IN_FULL:
        lines = [line for pair in data.pairs for line in pair_findings(pair)]
    else:
        lines = [_in_one_line(pair) for pair in data.pairs]
    return [printable(line) for line in (*lines, *data.remarks)]


def pair_findings(pair: ComparedPair) -> list[str]:
    """A comparison in five lines: who, distance, noise, the layer furthest off, the experts that moved most."""
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
    ]
    sections = [section("About", about), *(_pair_section(pair) for pair in data.pairs)]
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
            "moescope_version": __version__,
        },
        "comparisons": [_pair_data(pair) for pair in data.pairs],
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
    return (
        f"{_short(pair.other)} against {_short(pair.reference)}: Jensen-Shannon {_mean(divergence)} bits, "
        f"{_times(_mean_ratio(divergence, noise))} the noise; furthest apart in layer "
        f"{result.layers[int(np.nanargmax(divergence))]}; "
        + (f"layer {move.layer} expert {move.expert} {move.before:.2%} → {move.after:.2%}" if move else "nothing moved")
    )


def _pair_section(pair: ComparedPair) -> str:
    """Findings, a line each layer, a line each expert that moved."""
    result = pair.result
    lines = [part for line in pair_findings(pair) for part in _wrapped(line)]
    lines += [
        "",
        f"{'layer':>7}{'JS bits':>10}{'noise':>10}{'ratio':>8}{'TV':>10}{'noise':>10}{'ratio':>8}{'Pearson r':>11}",
    ]
    columns = (
        (result.between.jensen_shannon, 10, ".5f"),
        (result.noise.jensen_shannon, 10, ".5f"),
        (result.ratio.jensen_shannon, 8, ".1f"),
        (result.between.total_variation, 10, ".5f"),
        (result.noise.total_variation, 10, ".5f"),
        (result.ratio.total_variation, 8, ".1f"),
        (result.correlation, 11, ".4f"),
    )
    for row, layer in enumerate(result.layers):
        cells = (_number(float(column[row]), form).rjust(width) for column, width, form in columns)
        lines.append(f"{layer:>7}{''.join(cells)}")
    if result.moved:
        lines += ["", f"{'layer':>7}{'expert':>8}{'before':>11}{'after':>11}{'difference':>12}  ratio"]
        lines += [_move_line(move) for move in result.moved]
    return section(clip(f"{_short(pair.other)} against {_short(pair.reference)}", WIDTH), lines)


def _move_line(move: ExpertMove) -> str:
    """One row of the table of experts."""
    return (
        f"{move.layer:>7}{move.expert:>8}{move.before:>11.4%}{move.after:>11.4%}{move.difference:>+12.4%}  "
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
        "difference_matrix": result.difference,
        "experts_moved": [
            {
                "layer": move.layer,
                "expert": move.expert,
                "from": move.before,
                "to": move.after,
                "difference": move.difference,
                "ratio": move.ratio,
            }
            for move in result.moved
        ],
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
