"""The recorder against counts by loops, and the faults that it must find."""

import numpy as np
import pytest
import torch

from moescope.profiler import recorder as recorder_module
from moescope.profiler.errors import InvariantError
from moescope.profiler.profile import LayerInfo
from moescope.profiler.recorder import Group, Recorder, count_choices, router_distribution, sum_distributions

LAYERS = (LayerInfo(2, 8, 3), LayerInfo(3, 5, 2), LayerInfo(7, 8, 3))
GROUPS = (Group(0, 0, 3), Group(1, 0, 5), Group(0, 1, 3))


def choices(tokens: int, layer: LayerInfo, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, layer.experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(layer.top_k)
    return ids, weights, logits


def forward(recorder: Recorder, tokens: int, rows: torch.Tensor | None, group: torch.Tensor, seed: int) -> None:
    recorder.begin(tokens, rows, group)
    for slot, layer in enumerate(recorder.layers):
        recorder.stage(slot, *choices(tokens, layer, seed + slot))
    recorder.commit()


def recorder(**options: bool) -> Recorder:
    made = Recorder(LAYERS, scoring="softmax", **options)
    made.start(GROUPS)
    return made


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 257])
def test_sums_equal_a_loop(tokens: int) -> None:
    made = recorder(coactivation=True)
    rng = np.random.default_rng(tokens)
    counted = np.flatnonzero(rng.random(tokens) < 0.7)
    group = torch.from_numpy(rng.integers(0, 3, size=len(counted)))
    expected = np.zeros((3, 3, 8), np.int64)
    weight, probability = np.zeros((3, 3, 8)), np.zeros((3, 3, 8))
    pairs = np.zeros((3, 8, 8), np.int64)
    for step in range(2):
        forward(made, tokens, torch.from_numpy(counted), group, 10 * step)
        for slot, layer in enumerate(LAYERS):
            ids, weights, logits = choices(tokens, layer, 10 * step + slot)
            for row, g in zip(counted, group.tolist(), strict=True):
                probability[g, slot, : layer.experts] += torch.softmax(logits[row].double(), -1).numpy()
                for i, w in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                    expected[g, slot, i] += 1
                    weight[g, slot, i] += w
                    for j in ids[row].tolist():
                        pairs[slot, i, j] += 1
    tokens_of = 2 * np.bincount(group.numpy(), minlength=3)
    sums = made.drain(tokens_of.tolist())
    np.testing.assert_array_equal(sums.selection, expected)
    np.testing.assert_allclose(sums.weight * 2.0**-24, weight, atol=1e-4)
    assert sums.probability is not None
    np.testing.assert_allclose(sums.probability * 2.0**-24, probability, atol=1e-4)
    np.testing.assert_array_equal(sums.probability_tokens, tokens_of)
    np.testing.assert_array_equal(sums.coactivation, pairs)


def test_the_order_of_rows_and_forwards_does_not_change_a_bit() -> None:
    ids, weights, logits = choices(500, LAYERS[0], 0)
    distributions = router_distribution(logits, "sigmoid")
    group = torch.arange(500) % 3
    results, totals = [], []
    for order in (torch.arange(500), torch.randperm(500, generator=torch.Generator().manual_seed(1))):
        made = Recorder(LAYERS[:1], scoring="sigmoid", probabilities=False)
        made.start(GROUPS)
        total = torch.zeros(3, 8, dtype=torch.int64)
        for part in order.split(123 if results else 500):
            made.begin(len(part), None, group[part])
            made.stage(0, ids[part], weights[part])
            made.commit()
            total += sum_distributions(distributions[part], group[part], 3)
        results.append(made.drain(torch.bincount(group).tolist()))
        totals.append(total)
    np.testing.assert_array_equal(results[0].selection, results[1].selection)
    np.testing.assert_array_equal(results[0].weight, results[1].weight)
    assert torch.equal(totals[0], totals[1])


def test_layers_counted_in_several_blocks_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (1 << 20, 60, 1):
        monkeypatch.setattr(recorder_module, "_BLOCK", block)
        made = recorder()
        forward(made, 10, None, torch.zeros(10, dtype=torch.int64), 0)
        results.append(made.drain([10, 0, 0]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].selection, other.selection)
        np.testing.assert_array_equal(results[0].weight, other.weight)


def test_fixed_point_sums_are_those_of_rounded_values_exactly() -> None:
    made = Recorder(LAYERS[:1], scoring="softmax")
    made.start(GROUPS[:1])
    weights = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1, 2]).repeat(40_000, 1)
    logits = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(1))
    made.begin(40_000, None, torch.zeros(40_000, dtype=torch.int64))
    made.stage(0, ids, weights, logits)
    made.commit()
    sums = made.drain([40_000])
    units = np.rint(weights.numpy().astype(np.float64) * 2**24).astype(np.int64)
    np.testing.assert_array_equal(sums.weight[0, 0, :3], units.sum(axis=0))
    shares = router_distribution(logits, "softmax")
    units = np.rint(shares.numpy().astype(np.float64) * 2**24).astype(np.int64)
    assert sums.probability is not None
    np.testing.assert_array_equal(sums.probability[0, 0], units.sum(axis=0))
    group = torch.arange(40_000) % 3
    by_group = np.stack([units[group.numpy() == g].sum(axis=0) for g in range(3)])
    np.testing.assert_array_equal(sum_distributions(shares, group, 3).numpy(), by_group)


def test_a_forward_that_failed_leaves_nothing_in_the_next() -> None:
    made = recorder()
    group = torch.zeros(5, dtype=torch.int64)
    made.begin(5, None, group)
    made.stage(0, *choices(5, LAYERS[0], 9))
    forward(made, 5, None, group, 0)  # the model raised before the other layers ran
    alone = recorder()
    forward(alone, 5, None, group, 0)
    one, two = made.drain([5, 0, 0]), alone.drain([5, 0, 0])
    np.testing.assert_array_equal(one.probability, two.probability)
    np.testing.assert_array_equal(one.weight, two.weight)
    assert not made.recording


def test_the_scaling_factor_is_divided_out() -> None:
    ids, weights, logits = choices(50, LAYERS[0], 0)
    sums = []
    for scale in (1.0, 2.5):
        made = Recorder(LAYERS[:1], scoring="softmax", scales=[scale])
        made.start(GROUPS[:1])
        made.begin(50, None, torch.zeros(50, dtype=torch.int64))
        made.stage(0, ids, weights * scale, logits)
        made.commit()
        sums.append(made.drain([50]).weight)
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-6, atol=50)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_distributions_sum_to_one(scoring: str) -> None:
    logits = torch.randn(100, 32) * 4
    rows = router_distribution(logits, scoring)  # type: ignore[arg-type]
    torch.testing.assert_close(rows.sum(-1), torch.ones(100))
    total = sum_distributions(rows, torch.zeros(100, dtype=torch.int64), 1)
    np.testing.assert_allclose(total[0].numpy() * 2.0**-24, rows.double().sum(0).numpy(), atol=1e-5)


def test_counting_ignores_what_is_out_of_range() -> None:
    ids = torch.tensor([[[0, -1], [8, 4]]])
    counts, sums = count_choices(
        ids, torch.ones(1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor([5]), groups=1, width=8
    )
    assert counts[0, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert sums.sum() == 2 << 24


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_dropped_layer_fails_the_commit() -> None:
    made = recorder()
    forward(made, 5, None, torch.zeros(5, dtype=torch.int64), 0)
    made.begin(5, None, torch.zeros(5, dtype=torch.int64))
    made.stage(0, *choices(5, LAYERS[0], 0))
    made.stage(2, *choices(5, LAYERS[2], 2))
    with pytest.raises(InvariantError, match=r"layers \[3\] routed nothing"):
        made.commit()


def test_the_staging_buffer_is_poisoned_between_forwards() -> None:
    made = recorder()
    group = torch.zeros(5, dtype=torch.int64)
    forward(made, 5, None, group, 0)
    made.begin(5, None, group)
    for slot, layer in enumerate(LAYERS):
        made.stage(slot, *choices(5, layer, slot))
    made._ids[1, :5] = -1  # as if the layer had not written: what the forward before left must not come back
    made.commit()
    with pytest.raises(InvariantError, match="layer 3: 10 expert ids outside"):
        made.drain([10, 0, 0])


def test_committed_padding_fails_the_drain() -> None:
    made = recorder()
    forward(made, 6, None, torch.zeros(6, dtype=torch.int64), 0)  # all six rows, though two are padding
    with pytest.raises(InvariantError, match=r"batch 4: layer 2: selections sum to 18, but k·T = 3·4 = 12"):
        made.drain([4, 0, 0], "batch 4: ")


def test_rows_counted_in_the_wrong_group_fail_the_drain() -> None:
    made = recorder()
    forward(made, 6, None, torch.tensor([0, 0, 0, 1, 1, 2]), 0)
    with pytest.raises(InvariantError, match="its parts by domain and phase do not"):
        made.drain([3, 1, 2])


def test_a_layer_that_routes_twice_or_in_another_shape_fails() -> None:
    made = recorder()
    made.begin(5, None, torch.zeros(5, dtype=torch.int64))
    made.stage(0, *choices(5, LAYERS[0], 0))
    with pytest.raises(InvariantError, match="layer 2 routed twice"):
        made.stage(0, *choices(5, LAYERS[0], 0))
    with pytest.raises(InvariantError, match=r"layer 3 routed \[4, 2\] choices .* expected \[5, 2\]"):
        made.stage(1, *choices(4, LAYERS[1], 0))
    with pytest.raises(InvariantError, match=r"layer 7 gave router logits None; expected E = 8"):
        made.stage(2, *choices(5, LAYERS[2], 0)[:2])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("ids", 8, "layer 2: 1 expert ids outside"),
        ("ids", -1, "layer 2: 1 expert ids outside"),
        ("ids", "twice", "layer 2: 1 tokens sent to one expert twice"),
        ("weights", float("nan"), "layer 2: 1 routing weights that are NaN"),
        ("weights", float("inf"), "layer 2: 1 routing weights that are NaN"),
        ("weights", -0.5, "layer 2: 1 routing weights that are NaN"),
        ("logits", float("nan"), "layer 2: 1 tokens with NaN or infinite router scores"),
        ("logits", float("inf"), "layer 2: 1 tokens with NaN or infinite router scores"),
    ],
)
def test_faults_are_counted_and_fail_the_drain(part: str, value: float | str, message: str) -> None:
    made = Recorder(LAYERS, scoring="sigmoid")
    made.start(GROUPS)
    made.begin(5, None, torch.zeros(5, dtype=torch.int64))
    for slot, layer in enumerate(LAYERS):
        tensors = dict(zip(("ids", "weights", "logits"), choices(5, layer, slot), strict=True))
        if slot == 0:
            tensors[part][3, 1] = tensors[part][3, 0] if value == "twice" else value
        made.stage(slot, tensors["ids"], tensors["weights"], tensors["logits"])
    made.commit()
    with pytest.raises(InvariantError, match=message):
        made.drain([5, 0, 0])


def test_a_failed_drain_leaves_nothing_behind() -> None:
    made = recorder()
    forward(made, 6, None, torch.zeros(6, dtype=torch.int64), 0)
    with pytest.raises(InvariantError):
        made.drain([5, 0, 0])
    made.start(GROUPS)
    forward(made, 4, None, torch.zeros(4, dtype=torch.int64), 0)
    assert made.drain([4, 0, 0]).selection.sum() == 4 * (3 + 2 + 3)
