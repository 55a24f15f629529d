"""The profile: invariant, merging, file."""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import MODEL, random_profile
from safetensors.numpy import load_file, save_file

from moescope.profiler.errors import InvariantError, OutputError, ProfileError
from moescope.profiler.files import METADATA_KEY, load_profile, save_profile
from moescope.profiler.profile import BUFFERS, RoutingProfile, header, merge, parse_header
from moescope.profiler.totals import Totals


def assert_same(one: RoutingProfile, two: RoutingProfile) -> None:
    assert header(one) == header(two)
    assert list(one.arrays()) == list(two.arrays())
    for name, array in one.arrays().items():
        assert array.dtype == two.arrays()[name].dtype
        np.testing.assert_array_equal(array, two.arrays()[name])


def test_file_holds_the_documented_names_types_and_header(tmp_path: Path) -> None:
    profile = random_profile(1)
    path = tmp_path / "profile.safetensors"
    profile.save(str(path))
    tensors = load_file(path)
    assert {name: str(array.dtype) for name, array in tensors.items()} == {
        "selection_counts": "int64",
        "weight_sums": "float64",
        "probability_sums": "float64",
        "probability_tokens": "int64",
        "token_counts": "int64",
        "coactivation": "int64",
        "split_counts": "int64",
    }
    assert tensors["selection_counts"].shape == (2, 2, 3, 8)
    assert tensors["split_counts"].shape == (16, 2, 3, 8)
    assert tensors["coactivation"].shape == (3, 8, 8)
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        data = json.loads(file.metadata()["moescope"])
    assert set(data) == {"format_version", "model", "domains", "phases", "created", "moescope_version", "runs"}
    assert data["phases"] == ["prefill", "decode"]
    assert data["model"]["layers"][1] == {"index": 3, "experts": 6, "top_k": 2}
    assert data["runs"][0]["uuid"] == "run-1"
    assert_same(RoutingProfile.load(str(path)), profile)


def test_optional_tensors_may_be_absent(tmp_path: Path) -> None:
    profile = replace(random_profile(1), probability_sums=None, probability_tokens=None, coactivation=None)
    save_profile(profile, tmp_path / "p.safetensors")
    assert_same(load_profile(tmp_path / "p.safetensors"), profile)


def test_merging_gives_the_same_bits_in_any_order_and_grouping() -> None:
    parts = [
        random_profile(1),
        random_profile(2, ("prose", "verse")),
        random_profile(3, ("code",)),
        replace(random_profile(4), probability_sums=None, probability_tokens=None),
    ]
    whole = merge(parts)
    assert whole.domains == ("code", "prose", "verse")
    assert whole.tokens == sum(part.tokens for part in parts)
    expected = np.zeros_like(whole.selection_counts)
    for part in parts:
        for d, domain in enumerate(part.domains):
            expected[whole.domains.index(domain)] += part.selection_counts[d]
    np.testing.assert_array_equal(whole.selection_counts, expected)
    for order in itertools.permutations(parts):
        assert_same(merge(order), whole)
    assert_same(merge([merge(parts[:2]), merge(parts[2:])]), whole)
    assert_same(parts[3].merge(*parts[:3]), whole)


def test_coactivation_is_kept_only_if_all_have_it() -> None:
    assert merge([random_profile(1), random_profile(2)]).coactivation is not None
    assert merge([random_profile(1), random_profile(2, coactivation=None)]).coactivation is None


def test_totals_go_into_a_profile_and_back_bit_for_bit() -> None:
    profile = random_profile(5)
    assert_same(replace(Totals.from_profile(profile).profile(profile.runs[0]), version="0"), profile)


def test_the_same_run_twice_is_refused() -> None:
    one, two = random_profile(1), random_profile(2)
    with pytest.raises(ProfileError, match="run run-1 is in more than one"):
        merge([one, two, one])
    with pytest.raises(ProfileError, match="run run-1 is in more than one"):
        merge([merge([one, two]), one])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "Other"}, "architecture differ"),
        ({"layers": MODEL.layers[:2]}, "MoE layers differ"),
        ({"scoring": "sigmoid"}, "scoring differ"),
        ({"groups": 2}, "router groups differ"),
        ({"fingerprint": "other"}, "router weights differ"),
        ({"fingerprint": None, "id": "elsewhere"}, "id differ"),
    ],
)
def test_different_models_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError, match=f"different models cannot be merged: tiny and .*{message}"):
        merge([random_profile(1), random_profile(2, model=replace(MODEL, **change))])  # type: ignore[arg-type]


def test_router_groups_travel_in_the_header_and_older_files_have_none(tmp_path: Path) -> None:
    grouped = random_profile(3, model=replace(MODEL, groups=2))
    grouped.save(str(tmp_path / "p.safetensors"))
    assert RoutingProfile.load(str(tmp_path / "p.safetensors")).model.groups == 2
    old = json.loads(header(grouped))
    del old["model"]["groups"]
    assert parse_header(json.dumps(old))["model"].groups == 1


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_must_divide_the_experts_of_every_layer(groups: int) -> None:
    with pytest.raises(ProfileError, match=f"divide the experts of every layer; {groups} do not"):
        random_profile(3, model=replace(MODEL, groups=groups)).check()


def test_a_profile_without_fingerprint_bridges_no_different_models() -> None:
    models = [replace(MODEL, fingerprint=fingerprint) for fingerprint in (None, "x", "y")]
    parts = [random_profile(i, model=model) for i, model in enumerate(models)]
    for order in itertools.permutations(parts):
        with pytest.raises(ProfileError, match="router weights differ"):
            merge(order)


def test_one_model_under_two_names_merges() -> None:
    assert merge([random_profile(1), random_profile(2, model=replace(MODEL, id="a/b"))]).model.id == "a/b"


def test_too_many_domains_and_nothing_to_merge() -> None:
    parts = [random_profile(i, tuple(f"{i:02}-{j:02}" for j in range(33))) for i in (1, 2)]
    with pytest.raises(ProfileError, match="66 domains; at most 64"):
        merge(parts)
    with pytest.raises(ProfileError, match="nothing to merge"):
        merge([])


def _add_selection(p: RoutingProfile) -> None:
    p.selection_counts[0, 0, 1, 2] += 1


def _move_between_phases(p: RoutingProfile) -> None:
    p.selection_counts[0, 0, 1, 2] += 1
    p.selection_counts[0, 1, 1, 2] -= 1


def _count_padding(p: RoutingProfile) -> None:
    p.selection_counts[0, 0, 1, 7] += 1
    expert = int(p.selection_counts[0, 0, 1].argmax())
    p.selection_counts[0, 0, 1, expert] -= 1


def _overfill(p: RoutingProfile) -> None:
    row = p.selection_counts[0, 0, 0]
    row[0] = row.sum()
    row[1:] = 0


def _token(p: RoutingProfile) -> None:
    p.token_counts[0, 0] += 1


def _split(p: RoutingProfile) -> None:
    p.split_counts[3, 0, 2, 0] += 1


def _nan(p: RoutingProfile) -> None:
    p.weight_sums[0, 0, 0, 0] = np.nan


def _negative(p: RoutingProfile) -> None:
    p.split_counts[0, 0, 0, 0] = -1


def _weight_without_selection(p: RoutingProfile) -> None:
    p.weight_sums[0, 0, 1, 7] = 0.5


def _wrapping(p: RoutingProfile) -> None:
    for array in p.arrays().values():
        array[...] = 0
    p.token_counts[...] = 2**62  # k·T wraps to 0 in int64 where k is a multiple of 4


def _off_grid(p: RoutingProfile) -> None:
    p.weight_sums[p.weight_sums > 0] += 1e-9


def _too_large(p: RoutingProfile) -> None:
    p.weight_sums[p.weight_sums > 0] += 2.0**30


def _probability_of_padding(p: RoutingProfile) -> None:
    assert p.probability_sums is not None
    p.probability_sums[0, 0, 1, 7] = p.probability_sums[0, 0, 1, 0]
    p.probability_sums[0, 0, 1, 0] = 0


def _split_of_another_domain(p: RoutingProfile) -> None:
    p.split_counts[:, [0, 1]] = p.split_counts[:, [1, 0]]


def _pairs_moved(p: RoutingProfile) -> None:
    assert p.coactivation is not None
    for i, j in ((0, 1), (1, 0)):
        p.coactivation[0, i, j] += 1


def _probability(p: RoutingProfile) -> None:
    assert p.probability_sums is not None
    p.probability_sums[1, 0, 2, 0] += 1.0


def _probability_tokens(p: RoutingProfile) -> None:
    assert p.probability_tokens is not None
    p.probability_tokens[0, 0] += 1


def _pairs(p: RoutingProfile) -> None:
    assert p.coactivation is not None
    p.coactivation[0, 0, 1] += 1


def _diagonal(p: RoutingProfile) -> None:
    assert p.coactivation is not None
    p.coactivation[0, 0, 0] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_add_selection, "layer 3: selections sum to"),
        (_move_between_phases, r"layer 3: .*its parts by domain and phase do not"),
        (_count_padding, "layer 3: an expert id at or beyond E = 6"),
        (_overfill, "layer 1: an expert was counted more often"),
        (_token, "layer 1: selections sum to"),
        (_split, "layer 4: split_counts do not sum"),
        (_nan, "weight_sums.*not finite"),
        (_negative, "split_counts.*negative"),
        (_weight_without_selection, "layer 3: an expert has weight but was never selected"),
        (_wrapping, "token_counts.*beyond 2"),
        (_off_grid, "weight_sums.*not sums in units of 2"),
        (_too_large, "weight_sums.*not sums in units of 2"),
        (_probability_of_padding, "layer 3: an expert at or beyond E = 6 has probability"),
        (_split_of_another_domain, "layer 1: split_counts do not sum"),
        (_pairs_moved, "layer 1: coactivation rows"),
        (_probability, "layer 4: router probabilities do not sum to 1"),
        (_probability_tokens, "probability_tokens exceed"),
        (_pairs, "layer 1: coactivation is not symmetric"),
        (_diagonal, "layer 1: coactivation"),
    ],
)
def test_counts_that_do_not_add_up_are_neither_saved_nor_loaded(
    damage: Callable[[RoutingProfile], None], message: str, tmp_path: Path
) -> None:
    profile = random_profile(1)
    save_profile(profile, tmp_path / "good.safetensors")
    damage(profile)
    with pytest.raises(InvariantError, match=message):
        save_profile(profile, tmp_path / "bad.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["good.safetensors"]
    save_file(profile.arrays(), tmp_path / "forged.safetensors", metadata={METADATA_KEY: header(profile)})
    with pytest.raises(InvariantError, match=f"forged.safetensors: .*{message}"):
        load_profile(tmp_path / "forged.safetensors")


def forge(path: Path, edit: Callable[[dict[str, object]], None]) -> Path:
    profile = random_profile(1)
    data = json.loads(header(profile))
    edit(data)
    save_file(profile.arrays(), path, metadata={METADATA_KEY: json.dumps(data)})
    return path


def test_files_that_are_not_profiles_are_refused_each_in_its_own_words(tmp_path: Path) -> None:
    save_profile(random_profile(1), tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    for cut in (0, 4, 8, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        with pytest.raises(ProfileError, match="not a safetensors file, or is cut short"):
            load_profile(tmp_path / "cut.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ProfileError, match="a safetensors file, but not a moescope profile"):
        load_profile(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is not a profile at all")
    with pytest.raises(ProfileError, match="not a safetensors file"):
        load_profile(tmp_path / "text.safetensors")
    newer = forge(tmp_path / "newer.safetensors", lambda d: d.update(format_version=2))
    with pytest.raises(ProfileError, match=r"format 2; this moescope reads up to 1: upgrade"):
        load_profile(newer)
    with pytest.raises(ProfileError, match="No such file"):
        load_profile(tmp_path / "missing.safetensors")
    with pytest.raises(ProfileError, match="is a folder; name the file"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("model"),
        lambda d: d.pop("format_version"),
        lambda d: d.update(runs=3),
        lambda d: d.update(format_version=True),
        lambda d: d.update(format_version=0),
        lambda d: d.update(phases=["x"]),
        lambda d: d["model"].update(layers=[]),
        lambda d: d["model"].update(layers=[{"index": 1, "experts": 8, "top_k": 9}]),
        lambda d: d["model"].update(scoring="guess"),
        lambda d: d.update(domains=["b", "a"]),
        lambda d: d.update(domains=["a"]),
        lambda d: d["model"]["layers"][0].update(experts=10**12),
    ],
)
def test_damaged_headers_are_refused(edit: Callable[[dict[str, object]], None], tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"bad\.safetensors: "):
        load_profile(forge(tmp_path / "bad.safetensors", edit))


def test_a_header_that_is_not_json_and_a_missing_tensor(tmp_path: Path) -> None:
    profile = random_profile(1)
    save_file(profile.arrays(), tmp_path / "a.safetensors", metadata={METADATA_KEY: "{"})
    with pytest.raises(ProfileError, match="not a moescope header"):
        load_profile(tmp_path / "a.safetensors")
    for buffer in BUFFERS:
        arrays = {name: array for name, array in profile.arrays().items() if name != buffer.name}
        save_file(arrays, tmp_path / "b.safetensors", metadata={METADATA_KEY: header(profile)})
        if buffer.name == "coactivation":
            assert load_profile(tmp_path / "b.safetensors").coactivation is None
        else:
            with pytest.raises(ProfileError, match="missing"):
                load_profile(tmp_path / "b.safetensors")


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    save_profile(random_profile(1), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from builders import random_profile
from moescope.profiler.files import save_profile
from moescope.profiler.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_profile(random_profile(2), {str(path)!r})
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_FSIZE)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_profile(random_profile(1), tmp_path / "no" / "p.safetensors")


def test_tensors_of_every_kind_come_back_from_their_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    from moescope.profiler.files import write_tensors

    kinds = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    kinds += ["float16", "float32", "float64"]
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"transposed": np.arange(6).reshape(2, 3).T, "empty": np.zeros((0, 4)), "scalar": np.array(7)}
    write_tensors(arrays, tmp_path / "x.safetensors", {"a": 'é "quoted"'})
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as reader:
        assert reader.metadata() == {"a": 'é "quoted"'}
        assert set(reader.keys()) == set(arrays)
        for name, array in arrays.items():
            found = reader.get_tensor(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
