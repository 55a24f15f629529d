"""The use of experts in sentences, figures, tables and structured data."""

from dataclasses import replace

import numpy as np
import pytest
from builders import ENGINE

from moescope.profiler.profile import LayerInfo, ModelInfo, RoutingProfile, RunInfo
from moescope.stats.use import expert_coverage
from moescope.viz.analysis import analyze
from moescope.viz.report_data import ExpertsUsed, ReportData
from moescope.viz.report_page import report_page
from moescope.viz.structured import analysis_data
from moescope.viz.summary import summary_text
from moescope.viz.use import effective_by_layer, phases_by_layer, placement_by_layer, specialised_experts
from moescope.viz.use_findings import specialised_table, together_table, use_findings
from moescope.viz.use_trees import use_trees

LAYERS, EXPERTS, TOKENS = 3, 8, 400
DOMAINS = ("code", "prose")


def routed(specialised: bool = True) -> RoutingProfile:
    """Tokens that choose two experts; in code, expert 5 of layer 1 takes most of them, always with expert 2."""
    rng = np.random.default_rng(4)
    splits = np.zeros((16, 2, LAYERS, EXPERTS), np.int64)
    selections = np.zeros((2, 2, LAYERS, EXPERTS), np.int64)
    pairs = np.zeros((LAYERS, EXPERTS, EXPERTS), np.int64)
    tokens = np.zeros((2, 2), np.int64)
    for domain in range(2):
        for number in range(TOKENS):
            phase = number % 2
            tokens[domain, phase] += 1
            for layer in range(LAYERS):
                drawn = rng.permutation(EXPERTS)[:2]
                if specialised and domain == 0 and layer == 1 and rng.random() < 0.8:
                    drawn = np.array([2, 5])
                splits[number % 16, domain, layer, drawn] += 1
                selections[domain, phase, layer, drawn] += 1
                pairs[layer][np.ix_(drawn, drawn)] += 1
    return RoutingProfile(
        model=ModelInfo("m", "M", "softmax", tuple(LayerInfo(i, EXPERTS, 2) for i in range(LAYERS)), "f"),
        domains=DOMAINS,
        runs=(RunInfo("u", "2026-01-01", ENGINE, 1, 1, "00", {}),),
        created="2026-01-01",
        selection_counts=selections,
        weight_sums=selections / 2,
        token_counts=tokens,
        split_counts=splits,
        coactivation=pairs,
        version="0",
    )


@pytest.fixture(scope="module")
def report() -> ReportData:
    profile = routed()
    profile.check()
    return analyze(profile, permutations=0)


@pytest.fixture(scope="module")
def used(report: ReportData) -> ExpertsUsed:
    assert report.used is not None
    return report.used


def test_what_a_domain_prefers_is_named_with_its_interval(used: ExpertsUsed) -> None:
    _, preferred, *_ = use_findings(used)
    assert "a domain prefers an expert, at 5% for any false alarm among all looks" in preferred
    assert "most clearly code uses expert " in preferred
    assert "of layer 1 at " in preferred
    assert "times the rate of the others (95% interval " in preferred
    title, columns, rows = specialised_table(used.specialisation, used.domains) or ("", (), ())  # type: ignore[arg-type]
    assert title == "Experts that a domain prefers most clearly"
    assert {tuple(row[:3]) for row in rows[:2]} == {(1, 5, "code"), (1, 2, "code")}
    assert len(columns) == len(rows[0])


def test_a_profile_without_preference_says_so() -> None:
    found = analyze(routed(specialised=False), permutations=0).used
    assert found is not None
    assert use_findings(found)[1].startswith("No domain is shown to prefer an expert: p = ")
    assert specialised_table(found.specialisation, found.domains) is None  # type: ignore[arg-type]


def test_evenness_phases_pairs_and_placement_are_told(used: ExpertsUsed) -> None:
    even, _, phases, together, placed, covered = use_findings(used)
    assert f"as over {np.median(used.use.effective):.1f} equally used experts of 8" in even
    assert "That is no test: tokens of a prompt" in phases
    observed = int(used.coactivation.observed[1, 2, 5])  # type: ignore[union-attr]
    assert f"experts 2 and 5 of layer 1, by {observed:,} tokens" in together
    assert used.placement is not None
    assert used.placement.gpus == 8
    assert f"carries {np.median(used.placement.contiguous):.2f} times the mean" in placed
    clusters = used.coactivation
    assert clusters is not None
    held, chance = np.median(clusters.modularity), np.median(clusters.chance_modularity)
    assert f"hold {held:.1%} of a layer's pairs beyond chance in the median layer" in together
    assert f"clusters found in the same way would hold {chance:.1%}." in together
    short = int((used.coverage.seen < 128).sum())
    assert covered.startswith(f"Fewer than 128 tokens reached {short} of 24 experts. About ")
    rows = together_table(used.coactivation)[2]  # type: ignore[arg-type, index]
    assert rows[0][:4] == (1, 2, 5, observed)


def test_experts_that_few_tokens_reached_are_told_with_what_would_do(used: ExpertsUsed) -> None:
    counts = np.full((LAYERS, EXPERTS), 200)
    counts[0, 3], counts[2, 1] = 50, 0
    few = expert_coverage(counts, 800, 128, (EXPERTS,) * LAYERS, range(LAYERS))
    told = use_findings(replace(used, coverage=few))[-1]
    assert told == (
        "Fewer than 128 tokens reached 2 of 24 experts. About 2,048 tokens of this kind would be enough for all but "
        "the 1 never chosen."
    )
    counts[0, 3] = 200
    never = expert_coverage(counts, 800, 128, (EXPERTS,) * LAYERS, range(LAYERS))
    assert "How many would be enough cannot be told" in use_findings(replace(used, coverage=never))[-1]
    enough = expert_coverage(counts, 800, 0, (EXPERTS,) * LAYERS, range(LAYERS))
    assert use_findings(replace(used, coverage=enough))[-1] == "Every expert was reached by 0 tokens or more."
    data = use_trees(replace(used, coverage=few))["coverage"]["layers"]
    assert [layer["tokens_enough"] for layer in data] == [2048, 800, None]


def test_the_figures_show_these_numbers(used: ExpertsUsed) -> None:
    np.testing.assert_array_equal(effective_by_layer(used.use).data[0].y, used.use.effective)
    assert used.specialisation is not None
    heatmap = specialised_experts(used.specialisation, used.domains).data[0]
    assert tuple(heatmap.y) == DOMAINS
    expected = (used.specialisation.p_corrected <= 0.05) & (used.specialisation.ratio > 1)
    np.testing.assert_array_equal(heatmap.z, expected.sum(axis=2))
    assert heatmap.z[0][1] >= 2
    measured, floor = phases_by_layer(used.phases).data
    np.testing.assert_array_equal(measured.y, used.phases.between.jensen_shannon)
    np.testing.assert_array_equal(floor.y, used.phases.floor)
    assert used.placement is not None
    lines = placement_by_layer(used.placement).data
    np.testing.assert_array_equal(lines[2].y, used.placement.replicated)


def test_summary_page_and_structured_data_hold_them(report: ReportData, used: ExpertsUsed) -> None:
    text = " ".join(summary_text(report).split())
    assert all(sentence in text for sentence in use_findings(used))
    data = analysis_data(report)
    assert data["specialisation"]["preferred"][0]["domain"] == "code"
    assert data["expert_use"]["layers"][1]["effective_experts"] == used.use.effective[1]
    assert data["coactivation"]["strongest"][0]["expert_j"] == 5
    assert data["placement"]["num_gpus"] == 8
    assert data["coverage"]["least_tokens"] == 128
    assert [layer["experts_under"] for layer in data["coverage"]["layers"]] == used.coverage.under.tolist()
    chance = used.coactivation.chance_modularity.tolist()  # type: ignore[union-attr]
    assert [layer["chance_modularity"] for layer in data["coactivation"]["layers"]] == chance
    assert data["phases"]["num_domains"] == 2


def test_what_is_missing_has_a_reason() -> None:
    profile = routed()
    one = replace(
        profile,
        domains=("code",),
        selection_counts=profile.selection_counts[:1],
        weight_sums=profile.weight_sums[:1],
        token_counts=profile.token_counts[:1],
        split_counts=profile.split_counts[:, :1],
        coactivation=None,
        model=replace(profile.model, layers=(*profile.model.layers[:2], LayerInfo(2, 7, 2))),
    )
    report = analyze(one, permutations=0)
    data = analysis_data(report)
    assert data["specialisation"] == {"layers": None, "reason": "the profile has one domain"}
    assert data["coactivation"]["reason"] == "pairs of experts were not recorded"
    assert data["placement"]["reason"].startswith("experts cannot be placed")
    assert analysis_data(replace(report, used=None))["expert_use"]["layers"] is None
    nothing = replace(profile, **{name: np.zeros_like(array) for name, array in profile.arrays().items()})
    empty = analyze(nothing, permutations=0)
    assert empty.used is not None
    assert use_findings(empty.used) == []


def test_the_page_has_a_section_for_each(report: ReportData) -> None:
    from plotly.graph_objects import Figure

    names = (
        "expert_activation_heatmap",
        "layer_correlation_matrix",
        "periodic_pattern_analysis",
        "periodic_pattern_analysis_detailed",
        "router_similarity_matrix",
        "router_norm_correlation",
        "expert_activation_3d",
    )
    page = report_page(report, {f"{name}.html": Figure() for name in names})
    ids = [section.id for section in page.sections]
    assert [name for name in ids if name in ("effective", "specialisation", "phases", "placement")] == [
        "effective",
        "specialisation",
        "phases",
        "placement",
    ]
    assert [title for title, _, _ in page.tables] == [
        "Experts that a domain prefers most clearly",
        "Experts chosen together beyond chance",
        "Tokens by domain",
    ]
