"""What one rank of a vLLM engine counted: a file for each, joined to one profile.

Layers of pipeline ranks lie side by side; data-parallel ranks add up.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moescope import __version__
from moescope.profiler.errors import InvariantError, ProfileError
from moescope.profiler.files import PART_KEY, write_tensors
from moescope.profiler.profile import EngineInfo, LayerInfo
from moescope.profiler.staged import StagedSums

FIELDS: Final = ("tokens", "cells", "weight", "probability", "probability_tokens", "coactivation")
#: Prompt tokens that the prefix cache had and nobody routed; requests that a client or a stop string ended, counted as
#: far as they were routed; requests with streaming input, and their tokens, which are not counted.
REMARKS: Final = ("skipped_by_prefix_cache", "aborted_requests", "left_out_requests", "left_out_tokens")
_ABOUT: Final = (
    "scoring", "domains", "rank", "requests", "description", "run", "created", "settings", "remarks", "ended",
    "fingerprint", "groups",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank counted.

    Attributes:
        layers: MoE layers of this rank.
        scoring: Scoring function of the routers.
        domains: Names of the domains (a server), or empty: the caller knows them.
        rank: Data-parallel, pipeline and tensor rank, and how many of the first two there are.
        requests: Requests that are counted.
        description: Engine and model, for the record.
        sums: What was counted.
        run: Identity of the run.
        created: Start of the run, ISO 8601, UTC.
        settings: What was asked for.
        remarks: What the counts leave out or hold beside: numbers, which add up over ranks; see `REMARKS`.
        ended: Why the recording ended before the server did, or None.
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
    remarks: Mapping[str, int] = field(default_factory=dict)
    ended: str | None = None
    fingerprint: str | None = None
    groups: int = 1


def save_part(part: Part, path: Path) -> None:
    """Write a part in one step.

    Raises:
        OutputError: It cannot be written.
    """
    about = {
        "layers": [(layer.index, layer.experts, layer.top_k) for layer in part.layers],
        **{name: getattr(part, name) for name in _ABOUT},
        "version": __version__,
    }
    arrays = {name: getattr(part.sums, name) for name in FIELDS}
    kept = {name: array for name, array in arrays.items() if array is not None}
    write_tensors(kept, path, {PART_KEY: json.dumps(about)})


def load_part(path: Path) -> Part:
    """Read a part.

    Raises:
        ProfileError: It is missing, damaged or not a part.
    """
    try:
        with safe_open(path, framework="numpy") as reader:
            about = json.loads((reader.metadata() or {})[PART_KEY])
            names = set(reader.keys())
            arrays = {name: reader.get_tensor(name) for name in FIELDS if name in names}
        fields = {name: about[name] for name in _ABOUT if name in about}
        fields["domains"] = tuple(about["domains"])
        return Part(layers=tuple(LayerInfo(*layer) for layer in about["layers"]), sums=StagedSums(**arrays), **fields)
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
    return replicas[0][0], add([sums for _, sums in replicas])


def add(sums: Sequence[StagedSums]) -> StagedSums:
    """Sums of the same layers and domains, added up."""
    total = sums[0]
    for one in sums[1:]:
        added: dict[str, Any] = {
            name: None if getattr(total, name) is None else getattr(total, name) + getattr(one, name) for name in FIELDS
        }
        total = replace(total, **added)
    return total


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
    for name in FIELDS:
        arrays = [getattr(stage.sums, name) for stage in stages]
        joined[name] = arrays[0] if name not in axis or arrays[0] is None else np.concatenate(arrays, axis=axis[name])
    return layers, StagedSums(**joined)  # type: ignore[arg-type]


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
