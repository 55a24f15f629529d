"""Numbers and lists in words."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from moescope.viz.report_data import ReportData

LONGEST_NAME = 50
"""Longer model names lose their beginning, which in a path says least."""


def index_ranges(indices: Sequence[int]) -> str:
    """Ascending indices, runs shortened: (0, 1, 2, 5) is `0-2, 5`; evenly spaced ones as `1-23 in steps of 2`."""
    steps = {later - earlier for earlier, later in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}-{indices[-1]} in steps of {steps.pop()}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def by_layer(values: Sequence[int], layers: Sequence[int]) -> str:
    """One number for all layers, or the layers of each number: `64 (layers 1-5), 32 (layers 6-9)`."""
    if len(set(values)) <= 1:
        return str(values[0]) if values else "-"
    groups = {value: [layer for layer, own in zip(layers, values, strict=True) if own == value] for value in values}
    return ", ".join(f"{value} (layers {index_ranges(members)})" for value, members in groups.items())


def experts_in_words(report: ReportData) -> str:
    """Experts of a layer, and the groups of a router that has any: `256, in 8 router groups`."""
    experts = by_layer([load.experts for load in report.loads], report.layers)
    return experts if report.groups == 1 else f"{experts}, in {report.groups} router groups"


def short_name(model_id: str) -> str:
    """A model's name without the beginning of a long one."""
    return model_id if len(model_id) <= LONGEST_NAME else f"…{model_id[1 - LONGEST_NAME :]}"


def minute(created: str) -> str:
    """A time to the minute; what is no time as it is."""
    try:
        return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return created


def signed(value: float) -> str:
    """Three decimals with a sign, without a negative zero."""
    return f"{round(value, 3) + 0.0:+.3f}"


def counted(count: int, noun: str) -> str:
    """A number of things: `1 request`, `2,000 requests`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_bytes(count: int) -> str:
    """A number of bytes in the largest unit that it fills: `6.0 GB`; powers of 1000."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min((len(str(count)) - 1) // 3, len(units) - 1)
    return f"{count:,} bytes" if not power else f"{count / 1000**power:.1f} {units[power]}"


def subject(report: ReportData) -> str:
    """The line that says what a figure was measured on."""
    experts = by_layer([load.experts for load in report.loads], report.layers)
    top_k = by_layer([load.top_k for load in report.loads], report.layers)
    name, depth = short_name(report.model_id), len(report.layers)
    return f"{name} · {depth} MoE layers · {experts} experts, top-{top_k} · {report.tokens:,} tokens"


def p_value(p: float) -> str:
    """A p-value in words, with two digits; "p unknown" where it is NaN."""
    return "p unknown" if p != p else "p < 0.0001" if p < 9.5e-5 else f"p = {p:.2g}"
