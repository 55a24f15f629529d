"""A profile and its statistics as tidy tables: one row a fact, one column a variable."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import padding_mask
from moescope.stats.nulls import LayerNulls
from moescope.stats.use import expert_coverage
from moescope.viz.report_data import ReportData

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile

_CHANCE: Final = "how often experts in random order correlate as much"

Kind = Literal["integer", "number", "text", "any"]

#: Every table that an export may write, in order; `columns` describes the others.
NAMES: Final = (
    "metadata",
    "columns",
    "experts",
    "experts_by_domain",
    "layers",
    "tokens",
    "correlation",
    "periodic_patterns",
    "coactivation",
)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One variable of a table.

    Attributes:
        name: heading.
        kind: `integer` and `number` hold numbers, `text` strings, `any` both.
        values: (N,) int64, float64 or object by kind; NaN marks an empty cell.
        description: what it is, with its unit.
    """

    name: str
    kind: Kind
    values: NDArray[Any]
    description: str

    def cells(self) -> list[Any]:
        """(N,) Python int, float or str; None where the cell is empty."""
        values: list[Any] = self.values.tolist()
        if self.kind in ("integer", "text"):
            return values
        return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table whose columns have one length.

    Attributes:
        name: one of `NAMES`, or `pruning` or `calibration`.
        columns: its variables.
    """

    name: str
    columns: tuple[Column, ...]

    @property
    def rows(self) -> int:
        """Number of rows, without the heading."""
        return len(self.columns[0].values)

    def records(self) -> Iterator[tuple[Any, ...]]:
        """The rows as tuples of Python values, None where a cell is empty."""
        return zip(*(column.cells() for column in self.columns), strict=True)


def tables(profile: "RoutingProfile", report: ReportData) -> tuple[Table, ...]:
    """Every table, without those of what was not recorded.

    Args:
        profile: A checked profile.
        report: What `analyze` made of it.

    Returns:
        Tables in the order of `NAMES`. `experts_by_domain` leaves out each domain and phase that routed no tokens;
        `tokens` shows them with 0.
    """
    found = [
        _experts(profile, report),
        _experts_by_domain(profile),
        _layers(report),
        _tokens(profile),
        _correlation(report),
        _periodic(report),
    ]
    if profile.coactivation is not None:
        found.append(_coactivation(profile, profile.coactivation))
    return (metadata(report), _descriptions(found), *found)


def metadata(report: ReportData, left_out: tuple[tuple[str, str], ...] = ()) -> Table:
    """Where the numbers come from, by key.

    Args:
        report: the results.
        left_out: name of each table that was not written, and why.
    """
    entries: list[tuple[str, int | str]] = [
        ("model_id", report.model_id),
        ("architecture", report.architecture),
        ("scoring", report.scoring),
        ("engine", report.engine),
        *((f"version.{name}", version) for name, version in report.versions.items()),
        ("created", report.created),
        ("prompts", report.prompts),
        ("tokens", report.tokens),
        *((f"tokens.{phase}", count) for phase, count in report.tokens_by_phase.items()),
        ("domains", len(report.tokens_by_domain)),
        ("num_moe_layers", len(report.layers)),
        ("measure", report.measure),
        ("invariant_holds", "no" if report.violations else "yes"),
        *((f"remark.{number}", remark) for number, remark in enumerate(report.remarks, 1)),
        *((f"left_out.{name}", reason) for name, reason in left_out),
    ]
    return Table(
        "metadata",
        (
            _text("key", [key for key, _ in entries], "what is told"),
            Column("value", "any", _objects([value for _, value in entries]), "what it is"),
        ),
    )


def _experts(profile: "RoutingProfile", report: ReportData) -> Table:
    """One row an expert of a layer, over all domains and phases."""
    inside = _inside(profile)
    slots, experts = np.nonzero(inside)
    counts = profile.selection_counts.sum(axis=(0, 1))
    shares = {}
    for kind in ("frequency", "probability", "weight"):
        activation = report.activation(kind)
        shares[kind] = np.full(len(slots), np.nan) if activation is None else activation.matrix[inside]
    widths = np.asarray(profile.model.experts)[slots]
    return Table(
        "experts",
        (
            _integer("layer", np.asarray(profile.model.layer_indices)[slots], "true index of the layer in the model"),
            _integer("expert", experts, "logical id of the expert"),
            _integer("selections", counts[inside], "times the expert was among a token's top-k"),
            _number("selection_frequency", shares["frequency"], "c/(k·T), share of the layer's selections"),
            _number("mean_probability", shares["probability"], "router probability, mean over tokens; empty: not kept"),
            _number("weight_share", shares["weight"], "share of the layer's summed routing weight"),
            _number("ratio_to_uniform", shares["frequency"] * widths, "selection frequency times experts; 1 is even"),
        ),
    )


def _experts_by_domain(profile: "RoutingProfile") -> Table:
    """One row an expert of a layer in a domain and phase that routed tokens."""
    domain, phase = np.nonzero(profile.token_counts)
    slots, experts = np.nonzero(_inside(profile))
    parts, cells = len(domain), len(slots)
    return Table(
        "experts_by_domain",
        (
            _text("domain", np.repeat(_objects(profile.domains)[domain], cells), "domain of the prompt"),
            _text("phase", np.repeat(_objects(profile.phases)[phase], cells), "prefill or decode"),
            _integer(
                "layer",
                np.tile(np.asarray(profile.model.layer_indices)[slots], parts),
                "true index of the layer in the model",
            ),
            _integer("expert", np.tile(experts, parts), "logical id of the expert"),
            _integer(
                "selections",
                profile.selection_counts[domain, phase][:, slots, experts].ravel(),
                "times the expert was among a token's top-k",
            ),
        ),
    )


def _layers(report: ReportData) -> Table:
    """One row a MoE layer."""
    loads = report.loads
    return Table(
        "layers",
        (
            _integer("layer", [load.layer for load in loads], "true index of the layer in the model"),
            _integer("experts", [load.experts for load in loads], "routed experts"),
            _integer("top_k", [load.top_k for load in loads], "experts a token selects"),
            _integer("tokens", [load.tokens for load in loads], "tokens routed"),
            _integer("selections", [load.selections for load in loads], "times any expert was selected"),
            _integer("busiest", [load.busiest for load in loads], "selections of the busiest expert"),
            _number("max_over_mean", [load.max_over_mean for load in loads], "busiest over mean load; 1 is even"),
            _integer("dead", [len(load.dead_experts) for load in loads], "experts never selected"),
        ),
    )


def _tokens(profile: "RoutingProfile") -> Table:
    """One row a domain and phase."""
    phases = len(profile.phases)
    return Table(
        "tokens",
        (
            _text("domain", np.repeat(_objects(profile.domains), phases), "domain of the prompt"),
            _text("phase", np.tile(_objects(profile.phases), len(profile.domains)), "prefill or decode"),
            _integer("tokens", profile.token_counts.ravel(), "tokens routed"),
        ),
    )


def _correlation(report: ReportData) -> Table:
    """One row a pair of layers no further apart than the matrix goes."""
    pairs = list(report.correlation.pairs())
    row = {layer: place for place, layer in enumerate(report.layers)}
    cells = ([row[pair[0]] for pair in pairs], [row[pair[1]] for pair in pairs])
    nulls = report.nulls
    p, within = (
        np.full(len(pairs), np.nan) if null is None else null.cell_p[cells]
        for null in ((None, None) if nulls is None else (nulls.free, nulls.within_groups))
    )
    return Table(
        "correlation",
        (
            _integer("layer_i", [pair[0] for pair in pairs], "true index of the earlier layer"),
            _integer("layer_j", [pair[1] for pair in pairs], "true index of the later layer"),
            _integer("delta", [pair[2] for pair in pairs], "distance in model layers"),
            _number("r", [pair[3] for pair in pairs], "Pearson over experts of the measure; empty: not defined"),
            _number("p_value", p, f"{_CHANCE}, for this pair as if nobody had looked at another; empty: not tested"),
            _number("within_groups_p_value", within, "the same, with experts kept in the router's groups; empty: none"),
        ),
    )


def _periodic(report: ReportData) -> Table:
    """One row an interval."""
    patterns = report.periodic.patterns
    deltas = [pattern.delta for pattern in patterns]
    low = _at(report.nulls, deltas, lambda nulls: nulls.intervals[0])
    high = _at(report.nulls, deltas, lambda nulls: nulls.intervals[1])
    return Table(
        "periodic_patterns",
        (
            _integer("delta", [pattern.delta for pattern in patterns], "interval in model layers"),
            _number("mean_correlation", [pattern.mean for pattern in patterns], "mean r of the measurable pairs"),
            _number("std_correlation", [pattern.std for pattern in patterns], "standard deviation of r, ddof 0"),
            _integer("num_pairs", [pattern.num_pairs for pattern in patterns], "measurable pairs of layers"),
            _text("strength", [pattern.strength for pattern in patterns], "strong > 0.7, moderate > 0.4, else weak"),
            _text("measure", [report.measure] * len(patterns), "activation measure behind r"),
            _number("interval_low", low, "95% interval of the mean over splits of the prompts; empty: not known"),
            _number("interval_high", high, "its upper end"),
            _number("p_value", _at(report.nulls, deltas, lambda nulls: nulls.free.p), f"{_CHANCE}, for this Δ alone"),
            _number(
                "p_value_all_looks",
                _at(report.nulls, deltas, lambda nulls: nulls.free.p_family),
                "the same, given that all Δ were looked at",
            ),
            _number(
                "within_groups_p_value_all_looks",
                _at(
                    report.nulls, deltas, lambda nulls: None if (null := nulls.within_groups) is None else null.p_family
                ),
                "the same, with experts kept in the router's groups; empty: none",
            ),
        ),
    )


def _at(
    nulls: LayerNulls | None, deltas: Sequence[int], values: Callable[[LayerNulls], NDArray[np.float64] | None]
) -> NDArray[np.float64]:
    """What the nulls have for each distance; NaN for those that were not looked at."""
    found = None if nulls is None else values(nulls)
    known = {} if nulls is None or found is None else dict(zip(nulls.free.deltas, found.tolist(), strict=True))
    return np.array([known.get(delta, np.nan) for delta in deltas], dtype=np.float64)


def _coactivation(profile: "RoutingProfile", pairs: NDArray[np.int64]) -> Table:
    """One row a pair of experts that a token chose together."""
    slots, first, second = np.nonzero(np.triu(pairs, k=1))
    return Table(
        "coactivation",
        (
            _integer("layer", np.asarray(profile.model.layer_indices)[slots], "true index of the layer in the model"),
            _integer("expert_i", first, "logical id of the expert with the lower id"),
            _integer("expert_j", second, "logical id of the other expert"),
            _integer("count", pairs[slots, first, second], "tokens that chose both; pairs with 0 are left out"),
        ),
    )


def pruning(profile: "RoutingProfile") -> Table:
    """One row an expert of a layer, in order of the routing weight that it carries, least first.

    How often and how heavily an expert is used says what pruning costs at least; what it computes is not in a profile.

    Args:
        profile: A checked profile.
    """
    slots, experts = np.nonzero(_inside(profile))
    layers = np.asarray(profile.model.layer_indices)[slots]
    counts = profile.selection_counts.sum(axis=(0, 1))
    weights = profile.weight_sums.sum(axis=(0, 1))
    frequency, weight = _shares(counts), _shares(weights)
    by_domain = _shares(profile.selection_counts.sum(axis=1))
    best = np.argmax(np.nan_to_num(by_domain, nan=-1.0), axis=0)
    order = np.lexsort((experts, counts[slots, experts], weights[slots, experts], slots))
    slots, experts, layers = slots[order], experts[order], layers[order]
    before = np.searchsorted(slots, slots)
    running = np.cumsum(np.nan_to_num(weight[slots, experts]))
    lost = running - (running - np.nan_to_num(weight[slots, experts]))[before]
    domain = best[slots, experts]
    return Table(
        "pruning",
        (
            _integer("layer", layers, "true index of the layer in the model"),
            _integer("rank", np.arange(len(slots)) - before + 1, "place in the layer; 1 carries the least weight"),
            _integer("expert", experts, "logical id of the expert"),
            _integer("selections", counts[slots, experts], "times the expert was among a token's top-k"),
            _number("selection_frequency", frequency[slots, experts], "c/(k·T), share of the layer's selections"),
            _number("weight_share", weight[slots, experts], "share of the layer's summed routing weight"),
            _number(
                "weight_share_up_to_here",
                np.where(np.isfinite(weight[slots, experts]), lost, np.nan),
                "share of the layer's weight that this and all experts before it carry",
            ),
            _number(
                "mean_weight",
                weights[slots, experts] / np.where(counts > 0, counts, np.nan)[slots, experts],
                "routing weight of a selection, on average; empty: never selected",
            ),
            _text("top_domain", _objects(profile.domains)[domain], "domain that uses the expert most"),
            _number("top_domain_frequency", by_domain[domain, slots, experts], "share of that domain's selections"),
        ),
    )


def calibration(profile: "RoutingProfile", minimum: int) -> Table:
    """One row an expert that fewer than `minimum` tokens reached, fewest first.

    Args:
        profile: A checked profile.
        minimum: Tokens that each expert should see.
    """
    model = profile.model
    found = expert_coverage(
        profile.selection_counts.sum(axis=(0, 1)), profile.tokens, minimum, model.experts, model.layer_indices
    )
    slots, experts = np.nonzero(found.short)
    order = np.argsort(found.seen[slots, experts], kind="stable")
    slots, experts = slots[order], experts[order]
    return Table(
        "calibration",
        (
            _integer("layer", np.asarray(model.layer_indices)[slots], "true index of the layer in the model"),
            _integer("expert", experts, "logical id of the expert"),
            _integer("tokens", found.seen[slots, experts], "tokens that reached the expert"),
            _integer("short", found.short[slots, experts], "tokens that it lacks"),
            _number(
                "more_tokens",
                found.more_tokens[slots, experts],
                "further tokens of the same prompts' kind to run until it has enough; empty: none has reached it",
            ),
        ),
    )


def _shares(sums: NDArray[Any]) -> NDArray[np.float64]:
    """(…, L, E) each over its row's sum; NaN where that is 0."""
    totals = sums.sum(axis=-1, keepdims=True, dtype=np.float64)
    shares: NDArray[np.float64] = sums / np.where(totals > 0, totals, np.nan)
    return shares


def _descriptions(found: list[Table]) -> Table:
    """What each column of the other tables is."""
    rows = [(table.name, column.name, column.description) for table in found for column in table.columns]
    return Table(
        "columns",
        (
            _text("table", [row[0] for row in rows], "name of the table"),
            _text("column", [row[1] for row in rows], "heading of the column"),
            _text("description", [row[2] for row in rows], "what the column holds"),
        ),
    )


def _inside(profile: "RoutingProfile") -> NDArray[np.bool_]:
    """(L, E), true where an expert exists, false in the padding."""
    return ~padding_mask(profile.model.experts, profile.selection_counts.shape[-1])


def _objects(values: Any) -> NDArray[Any]:
    """(N,) array of the values themselves: no copy of a string for each row, no fixed width."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _integer(name: str, values: Any, description: str) -> Column:
    return Column(name, "integer", np.asarray(values, dtype=np.int64), description)


def _number(name: str, values: Any, description: str) -> Column:
    return Column(name, "number", np.asarray(values, dtype=np.float64), description)


def _text(name: str, values: Any, description: str) -> Column:
    return Column(name, "text", values if isinstance(values, np.ndarray) else _objects(values), description)
