"""What one rank of a vLLM engine counted: a file for each, joined to one profile.

Layers of pipeline ranks lie side by side; data-parallel ranks add up.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moescope import __version__
from moescope.profiler.errors import InvariantError, OutputError, ProfileError
from moescope.profiler.files import PROFILE_NAME, load_profile, save_profile, write_tensors
from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RoutingProfile, RunInfo
from moescope.profiler.staged import StagedSums
from moescope.profiler.totals import Totals

_KEY: Final = "moescope_part"
_FIELDS: Final = ("tokens", "cells", "weight", "probability", "probability_tokens", "coactivation")
#: Names of part files in a server's folder.
PATTERN: Final = "part-*.safetensors"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank counted.

    Attributes:
        layers: MoE layers of this rank.
        scoring: Scoring function of the routers.
        domains: Names of the domains (a server), or empty: the caller knows them.
        rank: Data-parallel, pipeline and tensor rank, and how many of the first two there are.
        requests: Requests seen.
        description: Engine and model, for the record.
        sums: What was counted.
        run: Identity of the run.
        created: Start of the run, ISO 8601, UTC.
        settings: What was asked for.
        fingerprint: Of the model, where this rank holds all its layers.
        groups: Groups of experts that its routers first choose among.
    """

    layers: tuple[LayerInfo, ...]
    scoring: str
    domains: tuple[str, ...]
    rank: Mapping[str, Any]
    requests: int
    description: Mapping[str, Any]
    sums: StagedSums
    run: str
    created: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    groups: int = 1


def save_part(part: Part, path: Path) -> None:
    """Write a part in one step.

    Raises:
        OutputError: It cannot be written.
    """
    about = {
        "layers": [(layer.index, layer.experts, layer.top_k) for layer in part.layers],
        **{
            name: getattr(part, name)
            for name in ("scoring", "domains", "rank", "requests", "description", "run", "created", "settings")
        },
        "fingerprint": part.fingerprint,
        "groups": part.groups,
        "version": __version__,
    }
    arrays = {name: getattr(part.sums, name) for name in _FIELDS}
    kept = {name: array for name, array in arrays.items() if array is not None}
    write_tensors(kept, path, {_KEY: json.dumps(about)})


def load_part(path: Path) -> Part:
    """Read a part.

    Raises:
        ProfileError: It is missing, damaged or not a part.
    """
    try:
        with safe_open(path, framework="numpy") as reader:
            about = json.loads((reader.metadata() or {})[_KEY])
            names = set(reader.keys())
            arrays = {name: reader.get_tensor(name) for name in _FIELDS if name in names}
        return Part(
            layers=tuple(LayerInfo(*layer) for layer in about["layers"]),
            domains=tuple(about["domains"]),
            sums=StagedSums(**arrays),
            **{
                name: about[name]
                for name in ("scoring", "rank", "requests", "description", "run", "created", "settings", "fingerprint")
            },
            groups=about.get("groups", 1),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path} is not what a recording vLLM worker writes ({error})") from error


def join(parts: Sequence[Part]) -> tuple[tuple[LayerInfo, ...], StagedSums]:
    """Join the parts of all ranks of one engine.

    Returns:
        All layers in model order, and the sums over data-parallel ranks.

    Raises:
        InvariantError: A rank is missing or twice there, or pipeline ranks disagree about the tokens.
    """
    if not parts:
        raise InvariantError("no worker of the engine wrote what it counted")
    by_replica: dict[int, dict[int, Part]] = {}
    for part in parts:
        stages = by_replica.setdefault(part.rank["dp"], {})
        if part.rank["pp"] in stages:
            raise InvariantError(f"rank dp{part.rank['dp']}-pp{part.rank['pp']} wrote twice what it counted")
        stages[part.rank["pp"]] = part
    replicas = [_side_by_side([stages[pp] for pp in sorted(stages)]) for _, stages in sorted(by_replica.items())]
    if any(layers != replicas[0][0] for layers, _ in replicas):
        raise InvariantError("data-parallel ranks have different MoE layers")
    total = replicas[0][1]
    for _, sums in replicas[1:]:
        added: dict[str, Any] = {
            name: None if getattr(total, name) is None else getattr(total, name) + getattr(sums, name)
            for name in _FIELDS
        }
        total = replace(total, **added)
    return replicas[0][0], total


def _side_by_side(stages: list[Part]) -> tuple[tuple[LayerInfo, ...], StagedSums]:
    """The layers of pipeline ranks one after the other."""
    first = stages[0]
    for stage in stages[1:]:
        if not np.array_equal(stage.sums.tokens, first.sums.tokens):
            raise InvariantError("pipeline ranks disagree about the tokens that were routed")
    layers = tuple(layer for stage in stages for layer in stage.layers)
    if list(layers) != sorted(set(layers), key=lambda layer: layer.index):
        raise InvariantError("pipeline ranks hold the same MoE layer, or hold them out of order")
    axis = {"cells": 3, "weight": 2, "probability": 2, "coactivation": 0}
    if len({stage.sums.cells.shape[-1] for stage in stages}) > 1:
        raise InvariantError("pipeline ranks hold layers with different numbers of experts")
    joined: dict[str, NDArray[np.int64] | None] = {}
    for name in _FIELDS:
        arrays = [getattr(stage.sums, name) for stage in stages]
        joined[name] = arrays[0] if name not in axis or arrays[0] is None else np.concatenate(arrays, axis=axis[name])
    return layers, StagedSums(**joined)  # type: ignore[arg-type]


def to_profile(parts: Sequence[Part]) -> RoutingProfile:
    """The profile of a server, from the parts of its ranks.

    Raises:
        InvariantError: A rank is missing, or the counts do not add up.
        ProfileError: The parts belong to different runs.
    """
    first = parts[0]
    size = first.rank["dp_size"] * first.rank["pp_size"]
    if len(parts) != size:
        raise InvariantError(f"{len(parts)} of the {size} ranks of the server have written what they counted")
    if any(part.description["model"] != first.description["model"] for part in parts):
        raise ProfileError("the parts belong to servers of different models")
    names = sorted({name for part in parts for name in part.domains})
    layers, sums = join([_with_domains(part, names) for part in parts])
    about = first.description
    run = RunInfo(
        uuid=first.run,
        created=first.created,
        engine=engine_info(about),
        prompts=sum(part.requests for part in parts if part.rank["pp"] == 0),
        prompts_total=sum(part.requests for part in parts if part.rank["pp"] == 0),
        prompts_sha256="",
        settings={"recorded": "a server, from start to stop", **first.settings},
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


def engine_info(about: Mapping[str, Any]) -> EngineInfo:
    """The engine, for the record."""
    options = ("async_scheduling", "enforce_eager", "prefix_caching", "quantization", "routers")
    return EngineInfo(
        name="vllm",
        version=about["vllm"],
        device=about["device"],
        dtype=about["dtype"],
        options={name: about[name] for name in options if about.get(name) is not None},
    )


def _with_domains(part: Part, names: Sequence[str]) -> Part:
    """A part whose domain axis is `names`; ranks meet domains in their own order."""
    place = [names.index(name) for name in part.domains]
    spread = {}
    for name in _FIELDS:
        array = getattr(part.sums, name)
        if array is not None and name != "coactivation":
            wide = np.zeros((len(names), *array.shape[1:]), array.dtype)
            wide[place] = array[: len(place)]
            array = wide
        spread[name] = array
    fields = {name: getattr(part, name) for name in Part.__slots__}
    return Part(**{**fields, "sums": StagedSums(**spread)})


def refuse_results(folder: Path, name: str) -> None:
    """Refuse a server's folder that holds what another server recorded.

    Raises:
        OutputError: It does.
    """
    for taken in (PROFILE_NAME, f"part-{name}.safetensors", f"error-{name}.txt"):
        if (folder / taken).exists():
            raise OutputError(f"{folder} holds {taken} of an earlier server; name another folder, or remove it")


def save_serving(part: Part, folder: Path, name: str) -> None:
    """Replace a rank's part in a server's folder; where it is the only rank, the profile too.

    Raises:
        MoescopeError: It does not add up, or cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    if part.rank["dp_size"] * part.rank["pp_size"] == 1:
        save_profile(to_profile([part]), folder / PROFILE_NAME)
    else:
        save_part(part, folder / f"part-{name}.safetensors")


def load_serving(folder: Path) -> RoutingProfile:
    """The profile of a server, from the folder that its ranks wrote.

    Raises:
        ProfileError: There is nothing, or it is damaged.
        InvariantError: A rank has not written, said that its counts do not add up, or they do not.
    """
    for path in sorted(folder.glob("error-*.txt")):
        raise InvariantError(f"{path}: {path.read_text(encoding='utf-8').strip()}")
    paths = sorted(folder.glob(PATTERN))
    if paths:
        return to_profile([load_part(path) for path in paths])
    return load_profile(folder)  # which says what to name instead
