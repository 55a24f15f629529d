"""The Triton kernels against the torch reference: on a GPU where there is one, else in Triton's interpreter.

`test_kernels.py` runs these in a process of their own: the interpreter must be chosen before anything imports Triton.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton") if "MOESCOPE_NO_SKIPS" not in os.environ else __import__("triton")

from moescope.profiler import choices, kernels, staged  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 7, 8, 16, 2), (2, 1, 4, 5, 1), (2, 37, 3, 11, 3), (1, 300, 8, 128, 2), (2, 0, 2, 4, 1), (2, 67, 1, 2, 1)]


def _draw(layers: int, rows: int, k: int, experts: int, domains: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cells = domains * 32
    scores = torch.rand(layers, rows, experts, generator=generator)
    drawn = {
        "ids": scores.argsort(dim=-1)[..., :k].int(),
        "weights": torch.rand(layers, rows, k, generator=generator),
        "cells": torch.randint(-1, cells, (rows,), generator=generator).int(),
        "scales": torch.rand(layers, generator=generator) + 0.5,
        "counts": torch.zeros(cells, layers, experts, dtype=torch.int64),
        "weight_sums": torch.zeros(cells // 16, layers, experts, dtype=torch.int64),
        "faults": torch.zeros(4, layers, dtype=torch.int64),
    }
    return {name: tensor.contiguous().to(DEVICE) for name, tensor in drawn.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choices_equal_the_reference(shape: tuple[int, ...], seed: int) -> None:
    layers, rows, k, experts, _ = shape
    expected = _draw(*shape, seed=seed)
    if rows > 4:  # every fault there is
        expected["ids"][0, 0, 0] = -1
        expected["ids"][0, 1, 0] = experts
        expected["weights"][0, 2, 0] = float("nan")
        expected["weights"][0, 3, 0] = -1.0
        expected["weights"][0, 4, 0] = float("inf")
        if k > 1:
            expected["ids"][-1, 3, 0] = expected["ids"][-1, 3, 1]
        expected["weights"][0, 5] = 0.0
        expected["cells"][:6] = 0
    found = {name: tensor.clone() for name, tensor in expected.items()}
    pairs = torch.zeros(layers, experts, experts, dtype=torch.int64, device=DEVICE)
    found_pairs = pairs.clone()
    choices.add_pairs(expected["ids"], expected["cells"], pairs)
    choices.add_choices(**expected)
    kernels.add_choices(**found, pairs=found_pairs)
    for name in ("counts", "weight_sums", "faults", "ids"):
        assert torch.equal(expected[name], found[name]), name
    assert torch.equal(pairs, found_pairs)
    assert (expected["ids"] == choices.POISON).all()
    if rows > 4:
        assert expected["faults"][0, 0] == 2
        assert expected["faults"][2, 0] == 3
        assert expected["faults"][1, -1] == (k > 1)
        assert expected["faults"][3, 0] == 1


def test_the_reference_equals_a_plain_count() -> None:
    drawn = _draw(2, 50, 3, 9, 2, seed=5)
    ids, cells, weights, scales = (drawn[name].clone() for name in ("ids", "cells", "weights", "scales"))
    choices.add_choices(**drawn)
    for layer in range(2):
        for cell in range(64):
            chosen = ids[layer][cells == cell].reshape(-1)
            assert torch.equal(drawn["counts"][cell, layer], torch.bincount(chosen, minlength=9))
        units = (weights[layer] / scales[layer]).double()
        for expert in range(9):
            total = units[(ids[layer] == expert) & (cells >= 0)[:, None]].sum()
            assert abs(drawn["weight_sums"][:, layer, expert].sum().item() / 2**24 - total) < 50 * 2**-24


@pytest.mark.parametrize("value", [0.0, 2**-25, 3 * 2**-25, 0.1, 0.5, 1.0, 1.5, 3.3, 1000.7])
def test_rounding_is_the_same(value: float) -> None:
    drawn = _draw(1, 1, 1, 2, 1, seed=0)
    drawn["weights"].fill_(value)
    drawn["scales"].fill_(1.0)
    drawn["cells"].fill_(0)
    found = {name: tensor.clone() for name, tensor in drawn.items()}
    choices.add_choices(**drawn)
    kernels.add_choices(**found)
    assert torch.equal(drawn["weight_sums"], found["weight_sums"])
    assert drawn["weight_sums"].sum().item() == round(torch.tensor(value, dtype=torch.float32).item() * 2**24)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("experts", [4, 11, 128])
def test_distributions_equal_the_reference(experts: int, sigmoid: bool) -> None:
    torch.manual_seed(experts)
    logits = torch.randn(13, experts).mul(3).to(DEVICE)
    sample = torch.tensor([0, -1, 12, 13, 5], dtype=torch.int32, device=DEVICE)
    expected, found = (torch.full((5, experts), 7.0, device=DEVICE) for _ in range(2))
    staged.stage_distributions(logits, sample, expected, sigmoid)
    kernels.stage_distributions(logits, sample, found, sigmoid=sigmoid)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    assert (found[[1, 3]] == 7.0).all()


def test_sums_of_distributions_equal_the_reference() -> None:
    torch.manual_seed(1)
    values = torch.rand(3, 5, 11).to(DEVICE)
    values[1, 2, 3] = float("nan")
    cells = torch.tensor([0, 40, -1, 63, 17], dtype=torch.int32, device=DEVICE)
    cells[2] = 5
    expected = [torch.zeros(4, 3, 11, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)]
    expected = [tensor.to(DEVICE) for tensor in expected]
    found = [tensor.clone() for tensor in expected]
    choices.add_distributions(values, cells, *expected)
    kernels.add_distributions(values, cells, *found)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert expected[1].tolist()[3] == [0, 1, 0]
