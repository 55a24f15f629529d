"""What load balancers, pruning and quantisation take, read back as those tools read it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from builders import MODEL, random_profile
from safetensors.torch import load_file

from moescope.profiler.profile import LayerInfo, ModelInfo
from moescope.stats.use import expert_coverage
from moescope.viz.errors import ExportError
from moescope.viz.export import export
from moescope.viz.tables import pruning

EVEN = ModelInfo(
    "tiny", "Qwen3MoeForCausalLM", "softmax", (LayerInfo(1, 8, 2), LayerInfo(3, 8, 2), LayerInfo(4, 8, 3)), "abc"
)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_eplb_is_the_weight_of_rebalance_experts(tmp_path: Path) -> None:
    profile = random_profile(3, model=EVEN)
    export(profile, tmp_path / "load.safetensors", "eplb")
    found = load_file(tmp_path / "load.safetensors")
    assert found["weight"].dtype == torch.int64
    np.testing.assert_array_equal(found["weight"].numpy(), profile.selection_counts.sum(axis=(0, 1)))
    for phase, name in enumerate(("weight_prefill", "weight_decode")):
        np.testing.assert_array_equal(found[name].numpy(), profile.selection_counts[:, phase].sum(axis=0))
    assert found["layers"].tolist() == [1, 3, 4]
    with safetensors.safe_open(tmp_path / "load.safetensors", "np") as file:
        assert file.metadata() == {"model": "tiny", "tokens": "60"}


def test_sglang_has_a_row_for_every_layer_of_the_model(tmp_path: Path) -> None:
    profile = random_profile(4, model=EVEN)
    export(profile, tmp_path / "load.json", "sglang")
    data = json.loads((tmp_path / "load.json").read_text())
    assert list(data) == ["logical_count"]
    count = torch.tensor(data["logical_count"])
    assert count.shape == (5, 8)
    assert not count[[0, 2]].any()
    np.testing.assert_array_equal(count[[1, 3, 4]].numpy(), profile.selection_counts.sum(axis=(0, 1)))


@pytest.mark.parametrize("export_format", ["eplb", "sglang"])
def test_layers_that_differ_are_refused(export_format: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"--format {export_format} .* 6 to 8 here"):
        export(random_profile(1, model=MODEL), tmp_path / "load", export_format)
    assert not list(tmp_path.iterdir())


def test_pruning_ranks_experts_by_the_weight_they_carry(tmp_path: Path) -> None:
    profile = random_profile(5)
    export(profile, tmp_path / "pruning.csv", "pruning")
    table = rows(tmp_path / "pruning.csv")
    counts, weights = profile.selection_counts.sum(axis=(0, 1)), profile.weight_sums.sum(axis=(0, 1))
    domains = profile.selection_counts.sum(axis=1)
    assert len(table) == 8 + 6 + 8
    for slot, layer in enumerate(profile.model.layers):
        own = [row for row in table if row["layer"] == str(layer.index)]
        order = np.argsort(weights[slot, : layer.experts])
        assert [int(row["expert"]) for row in own] == order.tolist()
        assert [int(row["rank"]) for row in own] == list(range(1, layer.experts + 1))
        carried = 0.0
        for row, expert in zip(own, order, strict=True):
            carried += weights[slot, expert] / weights[slot].sum()
            assert int(row["selections"]) == counts[slot, expert]
            assert float(row["selection_frequency"]) == pytest.approx(counts[slot, expert] / counts[slot].sum())
            assert float(row["weight_share"]) == pytest.approx(weights[slot, expert] / weights[slot].sum())
            assert float(row["weight_share_up_to_here"]) == pytest.approx(carried)
            assert float(row["mean_weight"]) == pytest.approx(weights[slot, expert] / counts[slot, expert])
            frequency = domains[:, slot, expert] / domains[:, slot].sum(axis=1)
            assert row["top_domain"] == profile.domains[int(np.argmax(frequency))]
            assert float(row["top_domain_frequency"]) == pytest.approx(frequency.max())
        assert carried == pytest.approx(1)


def test_experts_never_selected_come_first_and_have_no_mean() -> None:
    profile = random_profile(5)
    for array in (profile.selection_counts, profile.weight_sums):
        array[:, :, 0, 3] = 0
    columns = {column.name: column.cells() for column in pruning(profile).columns}
    assert (columns["expert"][0], columns["weight_share"][0], columns["mean_weight"][0]) == (3, 0.0, None)


def test_calibration_lists_who_saw_too_few(tmp_path: Path) -> None:
    profile = random_profile(6)
    export(profile, tmp_path / "few.csv", "calibration", least_tokens=15)
    table = rows(tmp_path / "few.csv")
    model = profile.model
    found = expert_coverage(
        profile.selection_counts.sum(axis=(0, 1)), profile.tokens, 15, model.experts, model.layer_indices
    )
    assert 0 < len(table) == found.under.sum() < 22
    for row in table:
        cell = (model.layer_indices.index(int(row["layer"])), int(row["expert"]))
        assert int(row["tokens"]) == found.seen[cell] == 15 - int(row["short"])
        assert float(row["more_tokens"]) == found.more_tokens[cell]
    assert [int(row["tokens"]) for row in table] == sorted(int(row["tokens"]) for row in table)
    export(profile, tmp_path / "all.csv", "calibration")
    assert len(rows(tmp_path / "all.csv")) == 22


@pytest.mark.parametrize("export_format", ["eplb", "sglang", "pruning", "calibration"])
def test_a_profile_without_tokens(export_format: Any, tmp_path: Path) -> None:
    profile = random_profile(7, model=EVEN)
    for array in profile.arrays().values():
        array[:] = 0
    export(profile, tmp_path / "out", export_format)
    assert (tmp_path / "out").stat().st_size
    if export_format in ("pruning", "calibration"):
        table = rows(tmp_path / "out")
        assert len(table) == 24
        assert {row["weight_share" if export_format == "pruning" else "more_tokens"] for row in table} == {""}


def test_a_domain_that_looks_like_a_formula_is_harmless(tmp_path: Path) -> None:
    export(random_profile(8, domains=("=1+1", "@x")), tmp_path / "p.csv", "pruning")
    assert {row["top_domain"] for row in rows(tmp_path / "p.csv")} == {"'=1+1", "'@x"}


@pytest.mark.parametrize(
    ("export_format", "arguments", "message"),
    [
        ("eplb", {"measure": "weight"}, "--measure does not apply"),
        ("json", {"least_tokens": 5}, "belongs to --format calibration"),
        ("calibration", {"least_tokens": 0}, "must be 1 or more"),
    ],
)
def test_options_that_do_not_apply(export_format: Any, arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(random_profile(1, model=EVEN), tmp_path / "out", export_format, **arguments)
    assert not list(tmp_path.iterdir())
