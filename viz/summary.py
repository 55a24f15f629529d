"""The summary as text."""

import math
from collections.abc import Iterable
from statistics import median
from textwrap import wrap

from moescope.stats.activation import LayerLoad
from moescope.stats.nulls import LayerNulls
from moescope.stats.weight_similarity import WeightSimilarity
from moescope.viz.activation import NAMES
from moescope.viz.certainty import distance_finding, period_finding, reliability_finding
from moescope.viz.findings import caution
from moescope.viz.report_data import ExpertsUsed, ReportData
from moescope.viz.theme import clip, printable
from moescope.viz.use_findings import use_findings
from moescope.viz.weight_findings import verdict_in_words, weight_findings
from moescope.viz.wording import by_layer, experts_in_words, in_bytes, index_ranges

WIDTH = 100
LABEL = 16


def summary_text(report: ReportData) -> str:
    """The summary report: model, run, tokens, the count invariant, periodic patterns and load; 100 columns at most."""
    sections = [
        section("Model", _model(report)),
        section("Run", _run(report)),
        section("Tokens", _tokens(report)),
        section("Check", _check(report)),
        section("How sure", _certainty(report)),
        section(f"Periodic patterns in {NAMES[report.measure]}", _patterns(report)),
        section("Expert load", _load(report)),
        *([section("Use of experts", _used(report.used))] if report.used is not None else ()),
        *([section("Experts' weights", _weights(report.weights))] if report.weights is not None else ()),
    ]
    return "\n".join(["moescope summary", "=" * len("moescope summary"), "", "\n\n".join(sections), ""])


def section(title: str, lines: Iterable[str]) -> str:
    """A titled block."""
    return "\n".join([title, "-" * len(title), *lines])


def field(label: str, value: str) -> list[str]:
    """A label and its value, wrapped under itself."""
    lines = wrap(printable(value), WIDTH - LABEL, break_on_hyphens=False) or ["-"]
    return [f"{label:<{LABEL}}{lines[0]}", *(f"{'':<{LABEL}}{line}" for line in lines[1:])]


def _model(report: ReportData) -> list[str]:
    """What was measured."""
    return [
        *field("id", report.model_id),
        *field("architecture", report.architecture),
        *field("scoring", report.scoring),
        *field("MoE layers", f"{len(report.layers)} (model layers {index_ranges(report.layers)})"),
        *field("experts", experts_in_words(report)),
        *field("top-k", by_layer([load.top_k for load in report.loads], report.layers)),
    ]


def _run(report: ReportData) -> list[str]:
    """How it was measured."""
    return [
        *field("engine", report.engine),
        *field("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        *field("recorded", report.created),
        *field("prompts", f"{report.prompts:,}"),
        *(line for remark in report.remarks for line in field("remark", remark)),
    ]


def _tokens(report: ReportData) -> list[str]:
    """Routed tokens in all, by phase and by domain."""
    parts = [
        ("total", report.tokens),
        *((f"  {phase}", tokens) for phase, tokens in report.tokens_by_phase.items()),
        *((f"  domain {printable(domain)}", tokens) for domain, tokens in report.tokens_by_domain.items()),
    ]
    return [
        f"{clip(name, 48):<48}{tokens:>16,}" + (f"{tokens / report.tokens:>9.1%}" if report.tokens else "")
        for name, tokens in parts
    ]


def _check(report: ReportData) -> list[str]:
    """Whether the counts add up to what the requests' lengths say."""
    if not report.violations:
        return ["selection counts sum to k·T in every layer: yes"]
    lines = ["selection counts sum to k·T in every layer: NO - do not trust the numbers below"]
    return lines + field("layers at fault", index_ranges(report.violations))


def _used(used: ExpertsUsed) -> list[str]:
    """Evenness, domains, phases, pairs and placement in sentences."""
    lines = [line for sentence in use_findings(used) for line in wrap(printable(sentence), WIDTH)]
    return lines or ["no expert was selected: not measurable"]


def _certainty(report: ReportData) -> list[str]:
    """Periods and distances against chance, and how reliable the profiles are."""
    told = {
        "period": period_finding(report.period) if report.period is not None else "",
        "distances": distance_finding(report.nulls) if report.nulls is not None else "",
        "reliability": reliability_finding(report.reliability) if report.reliability is not None else caution(report),
    }
    lines = [line for label, sentence in told.items() if sentence for line in field(label, sentence)]
    return lines or ["not held against chance"]


def _patterns(report: ReportData) -> list[str]:
    """One line an interval."""
    if not report.correlated:
        return ["left out"]
    if not report.periodic.patterns:
        return ["the model has no two MoE layers: not measurable"]
    against = f"{'chance':>18}{'p':>9}" if report.nulls is not None else ""
    lines = [f"{'Δ':>5}{'mean r':>10}{'std':>10}{'pairs':>8}{against}  strength"]
    for pattern in report.periodic.patterns:
        measured = pattern.num_pairs > 0
        mean, std = (f"{pattern.mean:.4f}", f"{pattern.std:.4f}") if measured else ("-", "-")
        chance = _chance(report.nulls, pattern.delta) if report.nulls is not None else ""
        lines.append(f"{pattern.delta:>5}{mean:>10}{std:>10}{pattern.num_pairs:>8}{chance}  {pattern.strength}")
    lines.append("Δ in model layers; r is Pearson over experts; strong > 0.7, moderate > 0.4")
    if report.nulls is not None:
        lines.append("chance: 95% of the means with experts in random order; p: for all distances looked at together")
    return lines


def _chance(nulls: LayerNulls, delta: int) -> str:
    """What chance gives at a distance, and the p-value there."""
    null = nulls.free
    if delta not in null.deltas:
        return f"{'-':>18}{'-':>9}"
    place = null.deltas.index(delta)
    low, _, high = null.null_quantiles[:, place]
    p = null.p_family[place]
    return f"{f'{low:+.3f}':>8} to{f'{high:+.3f}':>7}{f'{p:.2g}' if math.isfinite(p) else '-':>9}"


def _load(report: ReportData) -> list[str]:
    """Dead experts and imbalance, in all and layer by layer."""
    loaded = [load for load in report.loads if load.selections]
    if not loaded:
        return ["no expert was selected: not measurable"]
    dead = sum(len(load.dead_experts) for load in loaded)
    uneven = max(loaded, key=lambda load: load.max_over_mean)
    return [
        *field("dead experts", f"{dead:,} of {sum(load.experts for load in loaded):,} were never selected"),
        *field(
            "load max/mean",
            f"median {median(load.max_over_mean for load in loaded):.2f}, "
            f"highest {uneven.max_over_mean:.2f} in layer {uneven.layer}",
        ),
        "",
        f"{'layer':>7}{'experts':>9}{'max/mean':>10}{'dead':>6}  dead expert ids",
        *(_load_line(load) for load in report.loads),
    ]


def _weights(result: WeightSimilarity) -> list[str]:
    """What the experts' weights say, without a model being run."""
    found = [verdict_in_words(result), *weight_findings(result)]
    return [
        *field("read", f"{in_bytes(result.coverage.bytes_read)} of {in_bytes(result.coverage.bytes_total)}"),
        *(line for sentence in found for line in field("finding", sentence)),
    ]


def _load_line(load: LayerLoad) -> str:
    """One row of the load table."""
    ratio = f"{load.max_over_mean:.2f}" if load.selections else "-"
    row = f"{load.layer:>7}{load.experts:>9}{ratio:>10}{len(load.dead_experts):>6}"
    return clip(f"{row}  {index_ranges(load.dead_experts)}", WIDTH).rstrip()
