"""The pass over weights against plain float64 numpy: every layout, any block size, interrupted, against another."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import QWEN, Reference, fuse, modules_reference, per_expert, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor

from moescope.adapters.checkpoints import open_checkpoint
from moescope.adapters.weight_reader import WeightReader
from moescope.profiler import weight_slabs
from moescope.profiler.errors import ModelError, OptionError, OutputError, ProfileError
from moescope.profiler.weight_features import draw_probes
from moescope.profiler.weight_files import PartialWeights, WeightRecord, load_weights, save_weights
from moescope.profiler.weight_pass import PassSettings, run_pass
from moescope.profiler.weights import choose_pairs, weigh
from moescope.stats.expert_similarity import UnusableExpert
from moescope.viz import weight_analysis
from moescope.viz.weight_analysis import weight_change, weight_similarity

CONFIG = {**QWEN, "num_hidden_layers": 4, "num_experts": 5, "hidden_size": 132, "moe_intermediate_size": 12}
LAYERS = (0, 1, 2, 3)
SMALL = 60_000  # bytes of memory: a few rows a block
LAYOUTS = ("per expert", "fp8", "fused", "fused transposed", "mixed")


def checkpoint(kind: str, folder: Path, config: dict[str, Any] = CONFIG) -> tuple[Path, Reference]:
    """A checkpoint in one of `LAYOUTS`, and what it stands for."""
    tensors, reference = per_expert(config, layers=LAYERS, block=(8, 16) if kind in ("fp8", "mixed") else None)
    config = dict(config)
    if kind in ("fp8", "mixed"):
        config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}}
    if kind == "mixed":  # one expert was left out of quantisation
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        del tensors[f"{name}_scale_inv"]
        gate, up, down = reference[1][1][2]
        tensors[name] = torch.from_numpy(up).bfloat16()
        reference[1][1][2] = (gate, tensors[name].double().numpy(), down)
    if kind.startswith("fused"):
        config["model_type"] = "qwen3_vl_moe_text"
        tensors = fuse(reference, "model.", kind == "fused transposed")
    return write(folder, config, tensors, shards=3), reference


def flat(reference: Reference) -> np.ndarray:
    """(L, E, D) float64: all weights of each expert."""
    return np.stack(
        [[np.concatenate([part.ravel() for part in parts]) for parts in reference[i][1]] for i in reference]
    )


def cosines(weights: np.ndarray) -> np.ndarray:
    """(E, L, L) of (L, E, D)."""
    unit = weights / np.linalg.norm(weights, axis=2, keepdims=True)
    return np.einsum("aed,bed->eab", unit, unit)


def together(weights: np.ndarray) -> np.ndarray:
    """(L, L) of (L, E, D): all experts of a layer as one vector."""
    return cosines(weights.reshape(len(weights), 1, -1))[0]


def check_similarity(record: WeightRecord, reference: Reference) -> None:
    """Everything about the same index and routers against plain numpy."""
    found = weight_similarity(record)
    weights = flat(reference)
    centred = weights - weights.mean(axis=1, keepdims=True)
    layers = record.run.layers
    shown = np.isin(np.abs(np.subtract.outer(layers, layers)), (0, *record.run.deltas))
    np.testing.assert_allclose(found.same_index.cosine, np.where(shown, cosines(weights), np.nan), atol=1e-5)
    np.testing.assert_allclose(found.same_index.centred, cosines(centred), atol=1e-5)
    np.testing.assert_allclose(found.same_index.together, together(weights), atol=1e-5)
    np.testing.assert_allclose(found.same_index.norms, np.linalg.norm(weights, axis=2).T, rtol=1e-5)
    ends = np.cumsum([part.size for part in reference[record.run.layers[0]][1][0]])
    for row, own in enumerate(np.split(np.arange(ends[-1]), ends[:-1])):
        part = np.where(shown, cosines(weights[:, :, own]), np.nan)
        np.testing.assert_allclose(found.same_index.part_cosine[row], part, atol=1e-5)
        np.testing.assert_allclose(found.same_index.part_together[row], together(weights[:, :, own]), atol=1e-5)
        np.testing.assert_allclose(found.same_index.part_centred[row], cosines(centred[:, :, own]), atol=1e-5)
    routers = np.stack([reference[i][0] for i in reference])
    np.testing.assert_allclose(found.routers.cosine, together(routers), atol=1e-5)
    np.testing.assert_allclose(found.routers.row_cosine_pairs, cosines(routers).mean(axis=0), atol=1e-5)
    assert found.unusable == ()
    assert not found.coverage.sketched
    assert found.coverage.coordinates == found.coverage.coordinates_total == weights.shape[2]
    assert found.coverage.bytes_read == found.coverage.bytes_total


def plain_features(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """(4, J) of one expert: sums over neurons of products of projections."""
    probes = draw_probes(parts[0].shape[1])
    gate, up, down = (side.astype(float) for side in parts)
    sides = []
    for weights, drawn in ((gate, probes.inward), (up, probes.inward), (down.T, probes.outward)):
        pieces = [weights[:, i * drawn.shape[1] : (i + 1) * drawn.shape[1]] for i in range(len(drawn))]
        sides.append(
            np.concatenate([piece @ drawn[i, : piece.shape[1]].numpy() for i, piece in enumerate(pieces)], axis=1)
        )
    a, b, c = sides
    return np.stack([(left * right).sum(axis=0) for left, right in ((a, a), (b, b), (a, b), (c, c))])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("memory", [1, SMALL, 1 << 30])
def test_every_layout_equals_plain_numpy(kind: str, memory: int, tmp_path: Path) -> None:
    folder, reference = checkpoint(kind, tmp_path)
    settings = PassSettings(pairs=((0, 2), (1, 2)), memory=memory)
    with WeightReader(open_checkpoint(folder)) as source:
        state = {name: tensor.numpy() for name, tensor in run_pass([source], settings, n_jobs=2).state.items()}
        record = weigh(source, (1, 2))
    check_similarity(record, reference)
    weights = flat(reference)
    for row, (first, second) in enumerate(settings.pairs):
        np.testing.assert_allclose(
            state["between"][row].sum(axis=0), weights[first] @ weights[second].T, rtol=1e-4, atol=1e-2
        )
    assert state["features"].shape[0] == 3
    for side, layer in enumerate((0, 1, 2)):
        expected = np.stack([plain_features(parts) for parts in reference[layer][1]])
        np.testing.assert_allclose(state["features"][side].swapaxes(0, 1), expected, rtol=1e-4, atol=1e-2)
        within = np.triu(weights[layer] @ weights[layer].T)
        np.testing.assert_allclose(np.triu(state["within"][side].sum(axis=0)), within, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_what_transformers_saves(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    odd = family == "gpt_oss"
    reference, _ = modules_reference(model, transposed=odd, interleaved=odd)
    model.save_pretrained(tmp_path)
    with WeightReader(open_checkpoint(tmp_path)) as source:
        record = weigh(source, (1,))
    check_similarity(record, reference)


@pytest.mark.parametrize("delta", [1, 2])
def test_one_distance_gives_the_same_there_and_nothing_elsewhere(delta: int, tmp_path: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": 30, "num_experts": 2, "hidden_size": 20}
    layers = tuple(i for i in range(30) if i != 11)
    tensors, _ = per_expert(config, layers=layers)
    with WeightReader(open_checkpoint(write(tmp_path, config, tensors))) as source:
        every, few = (weight_similarity(weigh(source, (delta,), only_deltas=only)) for only in (False, True))
    apart = np.abs(np.subtract.outer(layers, layers))
    asked = (apart == 0) | (apart == delta)
    for name in ("cosine", "centred", "part_cosine", "part_centred", "together", "part_together"):
        whole, some = (getattr(found.same_index, name) for found in (every, few))
        assert np.isfinite(whole[..., asked] if name.endswith("cosine") else whole).all()
        np.testing.assert_allclose(some[..., asked], whole[..., asked], atol=1e-5)
        assert np.isnan(some[..., ~asked]).all()
    assert few.by_distance[0].num_pairs == sum(layer + delta in layers for layer in layers)
    assert few.unusable == ()


def test_layers_are_chosen_and_must_be_of_one_shape(tmp_path: Path) -> None:
    folder, reference = checkpoint("per expert", tmp_path)
    opened = open_checkpoint(folder)
    with WeightReader(opened, [0, 3]) as source:
        record = weigh(source, (3,))
    check_similarity(record, {layer: reference[layer] for layer in (0, 3)})
    assert record.run.bytes_total == opened.expert_bytes // 2
    assert record.run.pairs == ((0, 3),)
    with pytest.raises(ModelError, match=r"layer 9 of .* does not route"):
        WeightReader(opened, [1, 9])
    wider = replace(opened, layers=(*opened.layers[:3], replace(opened.layers[3], width=13)))
    shapes = "layers 0, 1, 2 have 5 experts of 132 by 12; layers 3 have 5 experts of 132 by 13; choose with --layers"
    with pytest.raises(ModelError, match=shapes):
        WeightReader(wider)
    with WeightReader(opened, [2]) as single, pytest.raises(ModelError, match="layer 2 is the only one that routes"):
        weigh(single, (1,))
    with WeightReader(opened) as source, pytest.raises(OptionError, match="--delta 4: no two of the layers"):
        weigh(source, (1, 4))


def planted(history: str, cosine: float, folder: Path) -> Path:
    """Two layers of 16 experts, the second made from the first."""
    rng = np.random.default_rng(3)
    config = {**QWEN, "num_hidden_layers": 2, "num_experts": 16, "hidden_size": 32, "moe_intermediate_size": 24}
    shapes = {"gate_proj": (16, 24, 32), "up_proj": (16, 24, 32), "down_proj": (16, 32, 24)}
    first = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    noise = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    second = {name: cosine * first[name] + np.sqrt(1 - cosine**2) * noise[name] for name in shapes}
    if history in ("neurons permuted", "both"):
        for expert in range(16):
            order = rng.permutation(24)
            for name in ("gate_proj", "up_proj"):
                second[name][expert] = second[name][expert][order]
            second["down_proj"][expert] = second["down_proj"][expert][:, order]
    if history in ("experts permuted", "both"):
        order = rng.permutation(16)
        second = {name: part[order] for name, part in second.items()}
    tensors: dict[str, Tensor] = {}
    for layer, parts in enumerate((first, second)):
        prefix = f"model.layers.{layer}.mlp."
        tensors[f"{prefix}gate.weight"] = torch.from_numpy(rng.normal(size=(16, 32))).bfloat16()
        for name, part in parts.items():
            for expert in range(16):
                tensors[f"{prefix}experts.{expert}.{name}.weight"] = torch.from_numpy(part[expert].copy()).bfloat16()
    return write(folder, config, tensors)


@pytest.mark.parametrize(
    ("history", "cosine"),
    [
        ("same index", 1.0),
        ("same index", 0.9),
        ("same index", 0.5),
        ("same index", 0.1),
        ("experts permuted", 1.0),
        ("experts permuted", 0.9),
        ("experts permuted", 0.5),
        ("experts permuted", 0.1),
        ("neurons permuted", 1.0),
        ("neurons permuted", 0.9),
        ("neurons permuted", 0.5),
        ("both", 1.0),
        ("both", 0.9),
        ("none", 0.0),
    ],
)
def test_histories_are_told_apart_from_files(history: str, cosine: float, tmp_path: Path) -> None:
    with WeightReader(open_checkpoint(planted(history, cosine, tmp_path))) as source:
        found = weight_similarity(weigh(source, (1,)))
    assert found.verdict is not None
    assert found.verdict.kind == history


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((kind, value) for kind in ("per expert", "fused transposed") for value in (torch.nan, torch.inf, 1e30, 0.0)),
        ("fp8", torch.nan),
        ("fp8", 0.0),
    ],
)
def test_an_unusable_expert_spoils_nothing_else(kind: str, value: float, tmp_path: Path) -> None:
    folder, _ = checkpoint(kind, tmp_path / "a")
    opened = open_checkpoint(folder)
    with WeightReader(opened) as source:
        plain = weight_similarity(weigh(source, (1,)))
    config = {**CONFIG, "num_experts": 5}
    tensors, reference = per_expert(config, layers=LAYERS, block=(8, 16) if kind == "fp8" else None)
    name = "model.layers.2.mlp.experts.3.{}_proj.weight"
    if kind.startswith("fused"):
        config["model_type"] = "qwen3_vl_moe_text"
        for part in reference[2][1][3]:
            if value == 0:
                part[:] = 0
        if value != 0:
            reference[2][1][3][1][5, 7] = value
        tensors = fuse(reference, "model.", True)
    else:
        for part in ("gate", "up", "down"):
            if value == 0:
                tensors[name.format(part)].view(torch.uint8).zero_()
        if value != 0:
            tensors[name.format("up")][5, 7] = value
    if kind == "fp8":
        config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}}
    with WeightReader(open_checkpoint(write(tmp_path / "b", config, tensors))) as source:
        found = weight_similarity(weigh(source, (1,)))
    assert found.unusable == (UnusableExpert(2, 3, "non-finite" if value else "zero"),)
    own = np.zeros(found.same_index.cosine.shape, bool)
    own[3, 2, :] = own[3, :, 2] = True
    shown = np.abs(np.subtract.outer(LAYERS, LAYERS)) <= 1
    np.testing.assert_array_equal(np.isnan(found.same_index.cosine), own | ~shown)
    np.testing.assert_array_equal(np.isnan(found.same_index.centred), own)
    layer = np.zeros(found.same_index.together.shape, bool)
    layer[2, :] = layer[:, 2] = value != 0
    np.testing.assert_array_equal(np.isnan(found.same_index.together), layer)
    if value == 0:
        weights = flat(reference)
        weights[2, 3] = 0
        np.testing.assert_allclose(found.same_index.together, together(weights), atol=1e-5)
    np.testing.assert_allclose(found.same_index.cosine[~own & shown], plain.same_index.cosine[~own & shown], atol=1e-5)
    for pair in found.matches:
        for match in (pair.weights, pair.features):
            assert match is not None
            assert match.measured == (4 if 2 in (pair.first, pair.second) else 5)


def test_the_same_threads_give_the_same_bits_where_experts_are_not_finite(tmp_path: Path) -> None:
    config = {**CONFIG, "num_experts": 40, "moe_intermediate_size": 100}
    tensors, _ = per_expert(config, layers=LAYERS)
    tensors["model.layers.2.mlp.experts.3.gate_proj.weight"][0, 7] = torch.nan
    with WeightReader(open_checkpoint(write(tmp_path, config, tensors))) as source:
        first, *others = (run_pass([source], PassSettings(), n_jobs=3).state for _ in range(8))
    for state in others:
        for name, sums in first.items():
            assert torch.equal(state[name], sums), name


def test_products_are_whole_float32_whatever_the_caller_allows(tmp_path: Path) -> None:
    folder, _ = checkpoint("per expert", tmp_path)
    during = set()
    torch.set_float32_matmul_precision("medium")
    try:
        with WeightReader(open_checkpoint(folder)) as source:
            run_pass([source], PassSettings(), on_progress=lambda _: during.add(torch.get_float32_matmul_precision()))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert during == {"highest"}


def test_what_sets_experts_apart_is_not_lost_beside_what_they_share(tmp_path: Path) -> None:
    tensors, reference = per_expert(CONFIG, layers=LAYERS)
    generator = torch.Generator().manual_seed(3)
    shared = {part: torch.randn(132, 132, generator=generator) for part in ("gate", "up", "down")}
    for layer, (_, experts) in reference.items():
        for expert, parts in enumerate(experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{{}}_proj.weight"
            rounded = []
            for part, weights in zip(shared, parts, strict=True):
                rows, columns = weights.shape
                own = shared[part][:rows, :columns] + 0.003 * torch.from_numpy(weights).float()
                tensors[name.format(part)] = own
                rounded.append(own.double().numpy())
            experts[expert] = tuple(rounded)
    with WeightReader(open_checkpoint(write(tmp_path, CONFIG, tensors))) as source:
        check_similarity(weigh(source, (1,)), reference)


def test_an_expert_with_rows_of_zeros_is_part_of_its_layer(tmp_path: Path) -> None:
    tensors, reference = per_expert(CONFIG, layers=LAYERS)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][:6] = 0
    reference[1][1][2][1][:6] = 0
    with WeightReader(open_checkpoint(write(tmp_path, CONFIG, tensors))) as source:
        check_similarity(weigh(source, (1,)), reference)
        state = run_pass([source], PassSettings(memory=1)).state
        np.testing.assert_allclose(
            state["centred"], run_pass([source], PassSettings()).state["centred"], rtol=1e-4, atol=1e-3
        )


def test_two_checkpoints_expert_against_expert(tmp_path: Path) -> None:
    folder, reference = checkpoint("per expert", tmp_path / "a")
    other, base = checkpoint("fused transposed", tmp_path / "b")
    quantised, rounded = checkpoint("fp8", tmp_path / "c")
    assert np.abs(flat(reference) - flat(base)).max() == 0
    with WeightReader(open_checkpoint(folder)) as source, WeightReader(open_checkpoint(other)) as same:
        found = weight_change(weigh(source, (), against=same))
    np.testing.assert_allclose(found.cosine, 1.0, atol=1e-6)
    assert np.abs(found.relative_change).max() == 0
    assert [(pair.first, pair.second) for pair in found.matches] == [(i, i) for i in LAYERS]
    with WeightReader(open_checkpoint(folder)) as source, WeightReader(open_checkpoint(quantised)) as other_source:
        record = weigh(source, (), against=other_source)
    found = weight_change(record)
    a, b = flat(reference), flat(rounded)
    cosine = (a * b).sum(axis=2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    change = np.linalg.norm(a - b, axis=2) / np.linalg.norm(b, axis=2)
    assert change.min() > 0.01
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-5)
    np.testing.assert_allclose(found.relative_change, change, rtol=1e-5)
    sizes = [part.size for part in reference[0][1][0]]
    for row, start in enumerate(np.cumsum([0, *sizes[:-1]])):
        own = slice(start, start + sizes[row])
        change = np.linalg.norm((a - b)[:, :, own], axis=2) / np.linalg.norm(b[:, :, own], axis=2)
        np.testing.assert_allclose(found.part_relative_change[row], change, rtol=1e-5)
    np.testing.assert_allclose(found.router_cosine, 1.0, atol=1e-6)
    assert found.unusable == ()
    save_weights(record, tmp_path / "weights.safetensors")
    assert_same(load_weights(tmp_path / "weights.safetensors"), record)


def test_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint("per expert", tmp_path / "a")
    smaller, _ = checkpoint("per expert", tmp_path / "b", {**CONFIG, "moe_intermediate_size": 10})
    with (
        WeightReader(open_checkpoint(folder)) as source,
        WeightReader(open_checkpoint(smaller)) as other,
        pytest.raises(ModelError, match=r"expert width 10 there, 12 here; two checkpoints of one shape are needed"),
    ):
        weigh(source, (), against=other)
    with (
        WeightReader(open_checkpoint(folder)) as source,
        WeightReader(open_checkpoint(folder), [0, 1, 2]) as other,
        pytest.raises(ModelError, match=r"MoE layers 3 \(0–2\) there, 4 \(0–3\) here"),
    ):
        weigh(source, (), against=other)


def assert_same(found: WeightRecord, expected: WeightRecord) -> None:
    assert found.run == expected.run
    for name in WeightRecord.__slots__:
        if name != "run":
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["per expert", "fused transposed"])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_pass_goes_on_to_the_same_bits(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = checkpoint(kind, tmp_path / "checkpoint")
    path = tmp_path / "weights.partial.safetensors"
    settings = PassSettings(pairs=((0, 1), (1, 3)), memory=SMALL)
    opened = open_checkpoint(folder)
    with WeightReader(opened) as source:
        whole = run_pass([source], settings).state
    seen = 0

    def stop(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise KeyboardInterrupt

    with WeightReader(opened) as source, pytest.raises(KeyboardInterrupt):
        run_pass([source], settings, keeper=PartialWeights(path), on_progress=stop)
    reads: list[tuple[Any, ...]] = []
    with WeightReader(opened) as source:
        read_into = source.read_into
        monkeypatch.setattr(source, "read_into", lambda *args: (reads.append(args[:5]), read_into(*args)))
        with pytest.raises(OutputError, match="is of other files or other settings than these"):
            run_pass([source], PassSettings(memory=SMALL), keeper=PartialWeights(path, resume=True))
        assert reads == []
        again = run_pass([source], settings, keeper=PartialWeights(path, resume=True)).state
        assert (0, 0, "gate", 0) not in [read[:4] for read in reads]
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


def test_each_row_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint("per expert", tmp_path)
    with WeightReader(open_checkpoint(folder)) as source:
        counts: dict[tuple[Any, ...], int] = {}
        read_into = source.read_into

        def counted(layer: int, expert: int, part: Any, start: int, stop: int, out: memoryview) -> None:
            for row in range(start, stop):
                counts[layer, expert, part, row] = counts.get((layer, expert, part, row), 0) + 1
            read_into(layer, expert, part, start, stop, out)

        monkeypatch.setattr(source, "read_into", counted)
        run_pass([source], PassSettings(pairs=((0, 1),), memory=SMALL))
    assert set(counts.values()) == {1}
    assert len(counts) == 4 * 5 * (12 + 12 + 132)


def test_a_sketch_reads_the_same_rows_of_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_slabs, "SKETCH", 600)
    folder, reference = checkpoint("per expert", tmp_path)
    with WeightReader(open_checkpoint(folder)) as source:
        record = weigh(source, (1,), sketch=True)
    found = weight_similarity(record)
    assert found.coverage.sketched
    assert 600 <= found.coverage.coordinates < 1200
    assert found.coverage.bytes_read == pytest.approx(
        found.coverage.bytes_total * found.coverage.coordinates / found.coverage.coordinates_total, abs=100
    )
    assert record.features is None
    shown = np.abs(np.subtract.outer(LAYERS, LAYERS)) <= 1
    assert np.abs(found.same_index.cosine - cosines(flat(reference)))[:, shown].max() < 6 / np.sqrt(600)
    assert all(pair.features is None and pair.weights is not None for pair in found.matches)


def test_pairs_are_spread_over_distances_and_depth() -> None:
    assert choose_pairs(range(4), (1, 3), 12) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    chosen = choose_pairs(range(48), (1, 12, 24, 36), 12)
    assert len(chosen) == 12
    assert sorted(second - first for first, second in chosen) == [1] * 3 + [12] * 3 + [24] * 3 + [36] * 3
    assert [first for first, second in chosen if second - first == 12] == [0, 18, 35]
    assert choose_pairs(range(48), (12,), 0) == []


def test_processes_draw_the_same_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_analysis, "_WORTH_A_PROCESS", 1)
    with (
        WeightReader(open_checkpoint(planted("none", 0.0, tmp_path))) as source,
        WeightReader(open_checkpoint(tmp_path)) as other,
    ):
        record = weigh(source, (), against=other)
    one, two = (weight_change(record, jobs) for jobs in (1, 2))
    assert one.verdict == two.verdict
    assert len(one.matches) == 2
    for first, second in zip(one.matches, two.matches, strict=True):
        assert first.weights is not None
        assert second.weights is not None
        np.testing.assert_array_equal(first.weights.table, second.weights.table)


# What is written.


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> WeightRecord:
    folder, _ = checkpoint("per expert", tmp_path_factory.mktemp("record"))
    with WeightReader(open_checkpoint(folder)) as source:
        return weigh(source, (1, 2))


def test_a_record_is_read_back(record: WeightRecord, tmp_path: Path) -> None:
    save_weights(record, tmp_path / "weights.safetensors")
    assert_same(load_weights(tmp_path / "weights.safetensors"), record)


def test_what_is_no_record_is_refused(record: WeightRecord, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ProfileError, match="No such file"):
        load_weights(path)
    path.write_bytes(b"something else")
    with pytest.raises(ProfileError, match="is damaged or no safetensors file"):
        load_weights(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ProfileError, match="holds no weights that"):
        load_weights(path)
    for changes, pattern in (
        ({"format": 99}, "was written by another version"),
        ({"experts": 6}, "its parts do not fit together"),
        ({"experts": -1}, "its header does not make sense"),
        ({"layers": [3, 2, 1, 0]}, "its header does not make sense"),
        ({"pairs": [[0, 9]]}, "its header does not make sense"),
        ({"pairs": 3}, "its header lacks something"),
        ({"unknown": 3}, "its header lacks something"),
    ):
        save_weights(record, path)
        arrays = load_file(path)
        with safe_open(path, "pt") as reader:
            about = json.loads(reader.metadata()["moescope_weights"])
        save_file(arrays, path, {"moescope_weights": json.dumps(about | changes)})
        with pytest.raises(ProfileError, match=pattern):
            load_weights(path)
    partial = PartialWeights(tmp_path / "other" / "weights.partial.safetensors", resume=True)
    with pytest.raises(OutputError, match="so there is nothing to resume"):
        partial.load("")
    with pytest.raises(ProfileError, match="is no part of a pass"):
        PartialWeights(path, resume=True).load("")
