"""Files of servers' runs in one folder: names that no other process takes, ranks joined, runs added up or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_ranks import make_part

from moescope.adapters.vllm_parts import Part, save_part
from moescope.adapters.vllm_runs import claim, error_path, load_runs, part_paths, to_profile
from moescope.profiler.errors import InvariantError, OutputError, ProfileError
from moescope.profiler.files import load_profile
from moescope.viz.analysis import _remarks


def write(folder: Path, part: Part) -> Path:
    path = claim(folder, part.run, part.rank)
    save_part(part, path)
    return path


def test_replicas_meet_domains_in_their_own_order(tmp_path: Path) -> None:
    one = make_part((0,), rank={"dp_size": 2})
    two = replace(make_part((0,), seed=1, rank={"dp": 1, "dp_size": 2}), domains=("c", "b"))
    path = write(tmp_path, one)
    with pytest.raises(InvariantError, match="nothing was written by rank dp1-pp0"):
        load_runs(tmp_path)
    write(tmp_path, two)
    profile = load_runs(tmp_path)
    profile.check()
    assert profile.domains == ("a", "b", "c")
    np.testing.assert_array_equal(profile.token_counts[1], one.sums.tokens[0].sum(-1) + two.sums.tokens[1].sum(-1))
    np.testing.assert_array_equal(profile.token_counts[2], two.sums.tokens[0].sum(-1))
    assert profile.runs[0].prompts == 6
    error_path(path).write_text("layer 3: 2 expert ids outside 0..E-1\n")
    with pytest.raises(InvariantError, match=r"error-u-dp0-pp0-tp0\.txt: layer 3.*remove this file"):
        load_runs(tmp_path)


def test_two_servers_on_one_folder_add_up(tmp_path: Path) -> None:
    one, two = make_part((0, 1)), replace(make_part((0, 1), seed=1), run="v", created="2026-01-02T00:00:00+00:00")
    for part in (one, two):
        write(tmp_path, part)
    profile = load_runs(tmp_path)
    assert profile.tokens == one.sums.tokens.sum() + two.sums.tokens.sum()
    assert [run.uuid for run in profile.runs] == ["u", "v"]
    assert len(part_paths(tmp_path, "u")) == 1


def test_a_folder_of_runs_and_its_files_say_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, make_part((0, 1)))
    with pytest.raises(ProfileError, match="holds what a server recorded; first join it: moescope merge"):
        load_profile(tmp_path)
    with pytest.raises(ProfileError, match="one rank of a server counted"):
        load_profile(path)


def test_a_process_never_writes_into_the_file_of_another(tmp_path: Path) -> None:
    part = make_part((0, 1))
    first, second = write(tmp_path, part), write(tmp_path, make_part((0, 1), seed=1))
    assert [first.name, second.name] == ["part-u-dp0-pp0-tp0.safetensors", "part-u-dp0-pp0-tp0-2.safetensors"]
    profile = load_runs(tmp_path)
    assert profile.tokens == 2 * part.sums.tokens.sum()
    assert len(profile.runs) == 1
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot record into"):
        claim(tmp_path / "file", "u", part.rank)


@pytest.mark.parametrize("same_run", [True, False], ids=["ranks", "runs"])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model", {"description": {"model": "n"}}),
        ("architecture", {"description": {"architecture": "B"}}),
        ("dtype", {"description": {"dtype": "bfloat16"}}),
        ("quantization", {"description": {"quantization": "fp8"}}),
        ("scoring", {"scoring": "sigmoid"}),
        ("router groups", {"groups": 4}),
        (r"router weights \(fingerprint\)", {"fingerprint": "f"}),
        ("seed", {"settings": {"seed": 1}}),
        ("probabilities", {"settings": {"probabilities": "all"}}),
    ],
)
def test_what_differs_is_not_added_up(tmp_path: Path, what: str, change: dict[str, Any], same_run: bool) -> None:
    one = replace(
        make_part((0, 1), rank={"dp_size": 2 if same_run else 1}), settings={"seed": 0, "probabilities": "off"}
    )
    merged = {
        name: {**getattr(one, name), **value} if isinstance(value, dict) else value for name, value in change.items()
    }
    two = replace(one, run="u" if same_run else "v", rank={**one.rank, "dp": int(same_run)}, **merged)
    write(tmp_path, one)
    write(tmp_path, two)
    where = "two ranks of run u" if same_run else "runs u and v"
    with pytest.raises(ProfileError, match=f"{where} cannot be added up: {what} differs"):
        load_runs(tmp_path)


def test_engines_of_different_sizes_are_not_one_run(tmp_path: Path) -> None:
    write(tmp_path, make_part((0,), rank={"dp_size": 2}))
    write(tmp_path, make_part((0,), rank={"dp": 1, "dp_size": 3}))
    with pytest.raises(ProfileError, match="different numbers of ranks"):
        load_runs(tmp_path)


def test_runs_without_tokens_add_nothing(tmp_path: Path) -> None:
    part = make_part((0, 1))
    sums = replace(part.sums, **{name: getattr(part.sums, name) * 0 for name in ("tokens", "cells", "weight")})
    write(tmp_path, replace(part, sums=sums))
    with pytest.raises(ProfileError, match="routed no tokens yet"):
        load_runs(tmp_path)
    claim(tmp_path, "w", part.rank)  # killed before it wrote
    write(tmp_path, replace(part, run="v"))
    assert [run.uuid for run in load_runs(tmp_path).runs] == ["v"]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ProfileError, match="written nothing yet"):
        load_runs(tmp_path)


def test_a_domain_without_tokens_is_not_in_the_profile() -> None:
    part = make_part((0, 1))
    for name in ("tokens", "cells", "weight"):
        getattr(part.sums, name)[0] = 0
    assert part.domains == ("b", "a")
    assert to_profile([part]).domains == ("a",)


def test_what_the_counts_leave_out_is_said() -> None:
    remarks = {"skipped_by_prefix_cache": 7, "aborted_requests": 2, "left_out_requests": 1, "left_out_tokens": 30}
    one = replace(make_part((0, 1), rank={"dp_size": 2}), remarks=remarks)
    two = replace(make_part((0, 1), rank={"dp": 1, "dp_size": 2}), remarks=remarks, ended="a reason")
    profile = to_profile([one, two])
    assert not profile.complete
    said = "\n".join(_remarks([run.settings for run in profile.runs]))
    assert "14 prompt tokens" in said
    assert "4 requests were ended by their clients or by a stop string" in said
    assert "2 requests with streaming input, of 60 tokens" in said
    assert "ended early: a reason" in said
