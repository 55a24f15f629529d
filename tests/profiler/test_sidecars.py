"""The files beside a profile: what is written comes back, and what is damaged is refused in one line."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import MODEL
from safetensors.numpy import save_file

from moescope.profiler.errors import OutputError, ProfileError
from moescope.profiler.profile import LayerInfo
from moescope.profiler.sidecars import (
    ROUTERS_NAME,
    SAMPLE_NAME,
    RouterTables,
    TokenSample,
    choose_layers,
    forget,
    load_routers,
    load_sample,
    save_routers,
    save_sample,
)

NAMES = (SAMPLE_NAME, ROUTERS_NAME)
TEXTS = ("a", " b", "", "é\n", "</script>")


def sample() -> TokenSample:
    """Five tokens in two of the model's three layers, one of them with fewer experts."""
    rng = np.random.default_rng(3)
    values = np.zeros((2, 5, 8), np.float32)
    for slot, experts in enumerate((6, 8)):
        values[slot, :, :experts] = rng.dirichlet(np.ones(experts), 5)
    return TokenSample((3, 4), (6, 8), np.arange(5, dtype=np.int32), TEXTS, values, "abc")


def tables() -> RouterTables:
    rng = np.random.default_rng(4)
    norms = rng.random((3, 8))
    norms[1, 6:] = np.nan
    cosine, rows = rng.random((3, 3)), rng.random((3, 3))
    cosine[0, 1] = cosine[1, 0] = rows[0, 1] = np.nan
    return RouterTables((1, 3, 4), (8, 6, 8), cosine, norms, rows, "abc")


def load(name: str, folder: Path, model: Any = MODEL) -> Any:
    return (load_sample if name == SAMPLE_NAME else load_routers)(folder, model)


def save(name: str, folder: Path) -> Path:
    return save_sample(sample(), folder) if name == SAMPLE_NAME else save_routers(tables(), folder)


def refused(name: str, folder: Path, model: Any = MODEL) -> str:
    with pytest.raises(ProfileError) as caught:
        load(name, folder, model)
    message = str(caught.value)
    assert str(folder / name) in message
    assert "\n" not in message
    return message


def rewrite(name: str, folder: Path, about: dict[str, Any] | str | None = None, **arrays: Any) -> None:
    """Write a file of the same kind with other header fields (a text: the whole header) or other arrays."""
    kept: dict[str, Any]
    if name == SAMPLE_NAME:
        one = sample()
        header = {"kind": "token sample", "fingerprint": "abc", "layers": one.layers, "experts": one.experts}
        header["texts"] = one.texts
        kept = {"token_ids": one.token_ids, "probabilities": one.probabilities}
    else:
        two = tables()
        header = {"kind": "router similarity", "fingerprint": "abc", "layers": two.layers, "experts": two.experts}
        kept = {"cosine": two.cosine, "row_norms": two.row_norms, "row_cosine": two.row_cosine}
    text = about if isinstance(about, str) else json.dumps(header | (about or {}))
    kept |= arrays
    kept = {key: array for key, array in kept.items() if array is not None}
    save_file(kept, folder / name, metadata={"moescope_beside": text})


def test_a_sample_comes_back_bit_for_bit(tmp_path: Path) -> None:
    one = sample()
    assert save_sample(one, tmp_path) == tmp_path / SAMPLE_NAME
    found = load_sample(tmp_path, MODEL)
    assert found is not None
    assert (found.layers, found.experts, found.texts, found.fingerprint) == ((3, 4), (6, 8), TEXTS, "abc")
    assert (found.token_ids.dtype, found.probabilities.dtype) == (np.int32, np.float32)
    assert found.token_ids.tobytes() == one.token_ids.tobytes()
    assert found.probabilities.tobytes() == one.probabilities.tobytes()
    assert os.listdir(tmp_path) == [SAMPLE_NAME]


def test_tables_come_back_bit_for_bit(tmp_path: Path) -> None:
    one = tables()
    assert save_routers(one, tmp_path) == tmp_path / ROUTERS_NAME
    found = load_routers(tmp_path, MODEL)
    assert found is not None
    assert (found.layers, found.experts, found.fingerprint) == ((1, 3, 4), (8, 6, 8), "abc")
    for name in ("cosine", "row_norms", "row_cosine"):
        assert getattr(found, name).dtype == np.float64
        assert getattr(found, name).tobytes() == getattr(one, name).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_rewriting_writes_what_saving_does(name: str, tmp_path: Path) -> None:
    """What the damaged files below differ from is whole."""
    rewrite(name, tmp_path)
    assert load(name, tmp_path) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_there_is_none(name: str, tmp_path: Path) -> None:
    assert load(name, tmp_path) is None
    assert load(name, tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "is damaged" in refused(name, tmp_path)
    path.write_bytes(b"\xff" * 64)
    assert "is damaged" in refused(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_under_the_others_name(name: str, tmp_path: Path) -> None:
    (other,) = set(NAMES) - {name}
    save(other, tmp_path).rename(tmp_path / name)
    assert "; remove it, or record again" in refused(name, tmp_path)
    assert load(other, tmp_path) is None


@pytest.mark.parametrize("name", NAMES)
def test_any_other_safetensors_file(name: str, tmp_path: Path) -> None:
    save_file({"weight": np.ones(3)}, tmp_path / name)
    assert "holds no " in refused(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_another_model(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    assert "belongs to another model" in refused(name, tmp_path, replace(MODEL, fingerprint="other"))
    layers = (LayerInfo(1, 8, 2), LayerInfo(3, 6, 2), LayerInfo(5, 8, 3))
    assert "its layers are not the profile's" in refused(name, tmp_path, replace(MODEL, layers=layers))
    layers = (LayerInfo(1, 8, 2), LayerInfo(3, 7, 2), LayerInfo(4, 8, 3))
    assert "its layers are not the profile's" in refused(name, tmp_path, replace(MODEL, layers=layers))
    assert load(name, tmp_path, replace(MODEL, fingerprint=None)) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        json.dumps({"kind": "token sample", "x": "x" * (1 << 20)}),
        json.dumps({"kind": "router similarity", "x": "x" * (1 << 20)}),
        json.dumps({"kind": ["token sample"]}),
    ],
    ids=["empty", "no json", "no object", "deep", "huge sample", "huge tables", "kind is a list"],
)
def test_headers(name: str, header: str, tmp_path: Path) -> None:
    rewrite(name, tmp_path, header)
    refused(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [None, [], 3, "34", [[3], [4]], [3, {}], [3.0, 4.0], [True, 3, 4], [4, 5]], ids=repr)
def test_layers_that_are_none(name: str, layers: Any, tmp_path: Path) -> None:
    rewrite(name, tmp_path, {"layers": layers})
    assert "its layers are not the profile's" in refused(name, tmp_path)


def with_cell(array: Any, value: float) -> Any:
    array = array.copy()
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("about", "arrays"),
    [
        ({}, {"probabilities": with_cell(sample().probabilities, np.nan)}),
        ({}, {"probabilities": with_cell(sample().probabilities, np.inf)}),
        ({}, {"probabilities": sample().probabilities[:, :4]}),
        ({}, {"probabilities": sample().probabilities[..., :7]}),
        ({}, {"probabilities": sample().probabilities.astype(np.float64)}),
        ({}, {"probabilities": None}),
        ({}, {"token_ids": None}),
        ({}, {"token_ids": np.full(5, np.nan)}),
        ({}, {"token_ids": np.zeros((5, 1), np.int32)}),
        ({"texts": TEXTS[:4]}, {}),
        ({"texts": None}, {}),
        ({"texts": "abcde"}, {}),
        ({"texts": [1, 2, 3, 4, 5]}, {}),
        ({"texts": ["a"] * 51}, {"token_ids": np.zeros(51, np.int32), "probabilities": np.zeros((2, 51, 8), "f4")}),
        ({"layers": [4], "experts": [8]}, {}),
    ],
)
def test_parts_of_a_sample_that_do_not_fit(about: dict[str, Any], arrays: dict[str, Any], tmp_path: Path) -> None:
    whole = {name: None if array is None else np.ascontiguousarray(array) for name, array in arrays.items()}
    rewrite(SAMPLE_NAME, tmp_path, about, **whole)
    assert "is damaged" in refused(SAMPLE_NAME, tmp_path)


@pytest.mark.parametrize(
    ("about", "arrays"),
    [
        ({}, {"cosine": np.zeros((3, 2))}),
        ({}, {"row_norms": np.zeros((3, 7))}),
        ({}, {"row_cosine": np.zeros((3, 3), np.float32)}),
        ({}, {"row_cosine": None}),
        ({"layers": [1, 3], "experts": [8, 6]}, {}),
        ({"layers": [4, 3, 1], "experts": [8, 6, 8]}, {}),
    ],
)
def test_parts_of_tables_that_do_not_fit(about: dict[str, Any], arrays: dict[str, Any], tmp_path: Path) -> None:
    rewrite(ROUTERS_NAME, tmp_path, about, **arrays)
    assert "is damaged" in refused(ROUTERS_NAME, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
    ],
    ids=["folder", "dangling link", "loop", "device", "pipe"],
)
def test_what_is_no_file(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    assert "is not a file" in refused(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_a_file_is_read(name: str, tmp_path: Path) -> None:
    save(name, tmp_path).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to("elsewhere")
    assert load(name, tmp_path) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_its_place_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=f"cannot write .*{name}: Is a directory"):
        save(name, tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_what_an_earlier_run_left_is_forgotten(tmp_path: Path) -> None:
    for name in NAMES:
        save(name, tmp_path)
    (tmp_path / "mine").touch()
    (tmp_path / "trace_view.html").touch()
    forget(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]
    forget(tmp_path)


def test_layers_are_spread_over_the_model() -> None:
    for depth in range(1, 101):
        chosen = choose_layers(depth)
        assert len(chosen) == min(depth, 10)
        assert (chosen[0], chosen[-1]) == (0, depth - 1)
        gaps = {later - one for one, later in pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert 0 not in gaps
    assert choose_layers(0) == []
    assert choose_layers(48) == [0, 5, 10, 16, 21, 26, 31, 37, 42, 47]
