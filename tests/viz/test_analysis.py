"""From a profile to a report's parts: each domain by itself, routers compared before, a sample handed through."""

from dataclasses import replace

import numpy as np
import pytest
from builders import random_profile
from weight_results import weight_similarity

from moescope.profiler.profile import RoutingProfile, merge
from moescope.profiler.sidecars import RouterTables, TokenSample
from moescope.stats.correlation import layer_correlation
from moescope.stats.similarity import router_similarity, similarity_at_distances
from moescope.viz.analysis import activations, analyze

LAYERS = (1, 3, 4)
EXPERTS = (8, 6, 8)


@pytest.fixture
def profile() -> RoutingProfile:
    """Three domains, "b" with the most tokens, then "c"."""
    parts = [random_profile(seed, domains=names) for seed, names in enumerate((("b",), ("b", "c"), ("b", "c"), ("a",)))]
    return merge(parts)


def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.normal(size=(experts, 12)) for experts in EXPERTS]


def test_each_domain_by_itself_the_one_with_most_tokens_first(profile: RoutingProfile) -> None:
    views = analyze(profile, measure="weight", intervals=(1, 40), delta_max=2).domains
    tokens = dict(zip(profile.domains, profile.token_counts.sum(axis=1).tolist(), strict=True))
    assert {view.name: view.tokens for view in views} == tokens
    assert [view.tokens for view in views] == sorted(tokens.values(), reverse=True)
    assert views[0].name == "b"
    for view in views:
        own = profile.weight_sums[profile.domains.index(view.name)].sum(axis=0)
        share = own / own.sum(axis=1, keepdims=True)
        share[1, 6:] = np.nan
        assert view.activation.kind == view.correlation.kind == view.periodic.kind == "weight"
        np.testing.assert_allclose(view.activation.matrix, share)
        np.testing.assert_allclose(view.correlation.matrix[:, :2], layer_correlation(view.activation, 2).matrix)
        assert [pattern.delta for pattern in view.periodic.patterns] == [1, 40]
        assert view.periodic.patterns[0].num_pairs == 0, "layers 3 and 4 have different numbers of experts"


def test_one_domain_is_not_shown_twice_and_empty_ones_are_not_shown(profile: RoutingProfile) -> None:
    assert analyze(random_profile(1, domains=("only",))).domains == ()
    whole = random_profile(2, domains=("a", "b", "c"))
    changes = {}
    for name in ("selection_counts", "weight_sums", "token_counts", "probability_sums", "probability_tokens"):
        changes[name] = getattr(whole, name).copy()
        changes[name][1] = 0
    split_counts = whole.split_counts.copy()
    split_counts[:, 1] = 0
    part = replace(whole, split_counts=split_counts, coactivation=None, **changes)
    assert {view.name for view in analyze(part).domains} == {"a", "c"}
    with pytest.raises(ValueError, match="domain 'x' is not in the profile; it has a, b, c"):
        activations(whole, "x")


def test_domains_add_up_to_the_whole(profile: RoutingProfile) -> None:
    report = analyze(profile)
    whole = report.activation("frequency")
    assert whole is not None
    sums = sum(view.activation.matrix * view.tokens for view in report.domains)
    np.testing.assert_allclose(sums, whole.matrix * profile.tokens)


def test_routers_compared_before_are_viewed_as_if_they_were_at_hand(profile: RoutingProfile) -> None:
    for delta_max in (1, 3, 30):
        one = analyze(profile, router_weights=weights(), delta_max=delta_max).router_similarity
        assert one is not None
        tables = RouterTables(LAYERS, EXPERTS, one.cosine, one.row_norms, one.row_cosine_pairs)
        two = analyze(profile, routers=tables, delta_max=delta_max).router_similarity
        assert two is not None
        for name in ("cosine", "row_norms", "norm_correlation", "row_cosine", "row_cosine_pairs"):
            np.testing.assert_array_equal(getattr(two, name), getattr(one, name))
        assert (two.deltas, two.layers, two.experts) == (tuple(range(1, delta_max + 1)), LAYERS, EXPERTS)
    assert analyze(profile).router_similarity is None


def test_weights_at_hand_go_before_tables(profile: RoutingProfile) -> None:
    none = np.zeros((3, 3))
    report = analyze(
        profile, router_weights=weights(), routers=RouterTables(LAYERS, EXPERTS, none, np.ones((3, 8)), none)
    )
    assert report.router_similarity is not None
    np.testing.assert_array_equal(report.router_similarity.cosine, router_similarity(weights(), LAYERS).cosine)


def test_by_distance_the_cells_are_those_of_the_pairs() -> None:
    rng = np.random.default_rng(6)
    cosine, rows, norms = rng.random((3, 3)), rng.random((3, 3)), rng.random((3, 8))
    norms[1, 6:] = np.nan
    found = similarity_at_distances(cosine, norms, rows, LAYERS, EXPERTS, 3)
    expected = np.full((3, 3), np.nan)
    expected[0, 1], expected[0, 2], expected[1, 0] = rows[0, 1], rows[0, 2], rows[1, 2]
    np.testing.assert_array_equal(found.row_cosine, expected)
    alike = np.full((3, 3), np.nan)
    alike[0, 2] = np.corrcoef(norms[0], norms[2])[0, 1]
    np.testing.assert_allclose(found.norm_correlation, alike)
    with pytest.raises(ValueError, match="delta_max must be at least 1"):
        similarity_at_distances(cosine, norms, rows, LAYERS, EXPERTS, 0)


def test_what_weights_say_is_handed_through(profile: RoutingProfile) -> None:
    weights = weight_similarity()
    assert analyze(profile, weights=weights).weights is weights
    assert analyze(profile).weights is None


def test_a_sample_is_handed_through(profile: RoutingProfile) -> None:
    sample = TokenSample((3,), (6,), np.zeros(1, np.int32), ("a",), np.full((1, 1, 6), 1 / 6, np.float32))
    assert analyze(profile, sample=sample).sample is sample
    assert analyze(profile).sample is None
