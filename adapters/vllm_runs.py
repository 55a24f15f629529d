"""Runs of recording servers in one folder: each rank of a run writes a file of its own; all are joined to one profile.

A file's name holds the run and the rank. A process never writes into a file of another one: a rank that is started
again within a run takes the next free name, and its counts add up.
"""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.adapters.vllm_parts import FIELDS, REMARKS, Part, add, engine_info, join, load_part
from moescope.profiler.errors import InvariantError, OutputError, ProfileError
from moescope.profiler.files import load_profile
from moescope.profiler.profile import ModelInfo, RoutingProfile, RunInfo, merge
from moescope.profiler.staged import StagedSums
from moescope.profiler.totals import Totals

_PART: Final = "part-*.safetensors"
#: Seconds after which a save that has not ended is that of a dead process.
_STALE: Final = 600.0


def rank_name(rank: Mapping[str, Any]) -> str:
    """Name of a rank, e.g. `dp0-pp1-tp0`."""
    return f"dp{rank['dp']}-pp{rank['pp']}-tp{rank['tp']}"


def claim(folder: Path, run: str, rank: Mapping[str, Any]) -> Path:
    """Make the folder and, in it, the empty file that this process alone writes.

    Raises:
        OutputError: The folder cannot be made or written.
    """
    start = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".part-*.tmp"):  # of a process that was killed while it saved
            if time.time() - rest.stat().st_mtime > _STALE:
                rest.unlink(missing_ok=True)
        while True:
            again = f"-{start}" if start > 1 else ""
            path = folder / f"part-{run}-{rank_name(rank)}{again}.safetensors"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                return path
            start += 1
    except OSError as error:
        raise OutputError(f"cannot record into {folder}: {error.strerror or error}") from error


def error_path(part: Path) -> Path:
    """File that says why the last save of a part failed."""
    return part.with_name(f"error-{part.stem.removeprefix('part-')}.txt")


def part_paths(folder: Path, run: str) -> list[Path]:
    """Files of a run's ranks."""
    return sorted(folder.glob(f"part-{run}-dp*.safetensors"))


def load_runs(folder: Path) -> RoutingProfile:
    """The profile of all runs that servers recorded into a folder.

    Raises:
        ProfileError: There is nothing, a file is damaged, or the runs differ in what must be equal to add them up.
        InvariantError: A rank is missing, said that its counts do not add up, or they do not.
    """
    paths = sorted(folder.glob(_PART))
    if not paths:
        return load_profile(folder)  # which says what to name instead
    for path in paths:
        error = error_path(path)
        if error.exists():
            raise InvariantError(
                f"{error}: {error.read_text(encoding='utf-8', errors='replace').strip()}. The last save failed; "
                "remove this file to take what was saved before"
            )
    runs: dict[str, list[Part]] = {}
    for path in paths:
        if path.stat().st_size:  # else its process was killed before it wrote for the first time
            part = load_part(path)
            runs.setdefault(part.run, []).append(part)
    if not runs:
        raise ProfileError(f"the servers that recorded into {folder} have written nothing yet")
    first = next(iter(runs.values()))[0]
    for parts in runs.values():
        _require_equal(first, parts[0])
    counted = [parts for parts in runs.values() if any(part.sums.tokens.any() for part in parts)]
    if not counted:
        raise ProfileError(f"the servers that recorded into {folder} have routed no tokens yet")
    return merge(to_profile(parts) for parts in counted)


def to_profile(parts: Sequence[Part]) -> RoutingProfile:
    """The profile of one run, from the parts of its ranks.

    Raises:
        InvariantError: A rank is missing, or the counts do not add up.
        ProfileError: The parts do not belong to one run.
    """
    first = parts[0]
    for part in parts[1:]:
        _require_equal(first, part)
    _require_ranks(parts)
    names = sorted(
        {name for part in parts for name, count in zip(part.domains, part.sums.tokens, strict=True) if count.any()}
    )
    layers, sums = join(_of_ranks([_with_domains(part, names) for part in parts]))
    about = first.description
    prompts = sum(part.requests for part in parts if part.rank["pp"] == 0)
    remarks = {name: sum(part.remarks.get(name, 0) for part in parts if part.rank["pp"] == 0) for name in REMARKS}
    ended = next((part.ended for part in parts if part.ended), None)
    run = RunInfo(
        uuid=first.run,
        created=min(part.created for part in parts),
        engine=engine_info(about),
        prompts=prompts,
        prompts_total=prompts,
        prompts_sha256="",
        settings={"recorded": "a server, from start to stop", **first.settings, **remarks}
        | ({"ended": ended} if ended else {}),
        complete=ended is None,
    )
    model = ModelInfo(
        id=about["model"],
        architecture=about["architecture"],
        scoring=first.scoring,  # type: ignore[arg-type]
        layers=layers,
        fingerprint=first.fingerprint,
        groups=first.groups,
    )
    totals = Totals(
        model, names, probabilities=sums.probability is not None, coactivation=sums.coactivation is not None
    )
    totals.add(sums, ())
    return totals.profile(run)


def _require_equal(one: Part, two: Part) -> None:
    """Refuse to add up what was counted of different models or with different settings."""
    differences = {
        **{name: (one.description.get(name), two.description.get(name)) for name in ("model", "architecture", "dtype")},
        "quantization": (one.description.get("quantization"), two.description.get("quantization")),
        "scoring": (one.scoring, two.scoring),
        "router groups": (one.groups, two.groups),
        "router weights (fingerprint)": (one.fingerprint, two.fingerprint),
        **{name: (one.settings.get(name), two.settings.get(name)) for name in {*one.settings, *two.settings}},
    }
    for name, (left, right) in differences.items():
        if left != right:
            where = f"two ranks of run {one.run}" if one.run == two.run else f"runs {one.run} and {two.run}"
            raise ProfileError(f"{where} cannot be added up: {name} differs ({left!r} and {right!r})")


def _require_ranks(parts: Sequence[Part]) -> None:
    sizes = {(part.rank["dp_size"], part.rank["pp_size"]) for part in parts}
    if len(sizes) > 1:
        raise ProfileError(f"the parts of run {parts[0].run} belong to engines of different numbers of ranks")
    (replicas, stages), there = sizes.pop(), {(part.rank["dp"], part.rank["pp"]) for part in parts}
    missing = [f"dp{dp}-pp{pp}" for dp in range(replicas) for pp in range(stages) if (dp, pp) not in there]
    if missing:
        raise InvariantError(f"run {parts[0].run}: nothing was written by rank {', '.join(missing)}")


def _of_ranks(parts: Sequence[Part]) -> list[Part]:
    """One part for each rank; those of a rank that was started again are added up."""
    by_rank: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        by_rank.setdefault((part.rank["dp"], part.rank["pp"]), []).append(part)
    return [replace(same[0], sums=add([part.sums for part in same])) for same in by_rank.values()]


def _with_domains(part: Part, names: Sequence[str]) -> Part:
    """A part whose domain axis is `names`; ranks meet domains in their own order."""
    place = [names.index(name) for name in part.domains if name in names]
    own = [index for index, name in enumerate(part.domains) if name in names]
    spread = {}
    for name in FIELDS:
        array = getattr(part.sums, name)
        if array is not None and name != "coactivation":
            wide = np.zeros((len(names), *array.shape[1:]), array.dtype)
            wide[place] = array[own]
            array = wide
        spread[name] = array
    return replace(part, sums=StagedSums(**spread))
