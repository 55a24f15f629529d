"""What a pass over weights leaves: `weights.safetensors`, and the sums of a pass that was interrupted."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moescope.profiler.errors import OutputError, ProfileError
from moescope.profiler.files import WEIGHTS_KEY, WEIGHTS_NAME, write_tensors
from moescope.profiler.profile import ModelInfo
from moescope.profiler.weight_features import PROBES
from moescope.profiler.weight_pass import match_sides

_PARTIAL_KEY: Final = "moescope_weights_partial"
_FORMAT: Final = 2
_LARGEST_HEADER: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class WeightRun:
    """Which weights were summed, and how.

    Attributes:
        model: Name of the checkpoint.
        against: Name of the checkpoint it is held against; None without one.
        architecture: The model's class.
        layers: (L,) true model indices.
        experts: E, routed experts of each layer.
        hidden: H, width of the model.
        width: F, width of an expert.
        dtypes: Element types of the experts on disk.
        deltas: Distances that are shown by themselves.
        all_pairs: Whether all pairs of layers were summed, not just those `deltas` apart.
        pairs: Layers whose experts were matched all against all; the second is of `against`, if there is one.
        coordinates: Weights read of each expert.
        coordinates_total: Weights that an expert has.
        bytes_read: Bytes of experts read.
        bytes_total: Bytes that the experts of these layers have on disk.
        engine: Device and threads of the pass, in words.
        seconds: What the pass took.
        versions: Version of each package that took part.
        created: When, ISO 8601.
        fingerprint: Of the routers of these layers, see `router_fingerprint`; of two checkpoints, the first.
    """

    model: str
    against: str | None
    architecture: str
    layers: tuple[int, ...]
    experts: int
    hidden: int
    width: int
    dtypes: tuple[str, ...]
    deltas: tuple[int, ...]
    all_pairs: bool
    pairs: tuple[tuple[int, int], ...]
    coordinates: int
    coordinates_total: int
    bytes_read: int
    bytes_total: int
    engine: str
    seconds: float
    versions: dict[str, str]
    created: str
    fingerprint: str

    @property
    def sides(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The layers that are matched, and where the two of each pair stand among them; see `match_sides`."""
        return match_sides(self.pairs, self.layers, against=self.against is not None)


@dataclass(frozen=True, slots=True, eq=False)
class WeightRecord:
    """Sums over the weights of one checkpoint, or of one against another: all that results are computed from.

    Attributes:
        run: Where they come from.
        non_finite: (S, 3, L, E) bool, experts that are not finite in a part; S checkpoints.
        raw: (3, E, L, L) float64, inner products of the same expert in two layers `run.deltas` apart and of each with
            itself, by part; one checkpoint. Other cells may be zero.
        centred: (3, E, L, L) float64, the same of experts less their layer's mean expert; of all pairs if
            `run.all_pairs`.
        means: (3, L, L) float64, inner products of the layers' mean experts, of the pairs of `centred`.
        router_cosine: (L, L) float64, cosine of whole routers; NaN where undefined.
        router_norms: (L, E) float64, length of each expert's row.
        router_row_cosine: (L, L) float64, mean over experts of the cosine of their rows.
        products: (4, 3, L, E) float64, ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ and ‖a − b‖² of an expert in two checkpoints, by part.
        router_products: (4, L, E) float64, the same of router rows.
        within: (N, 3, E, E) float64, inner products within each layer that is matched (`run.sides`), by part.
        between: (P, 3, E, E) float64, and between the two layers of each pair.
        features: (N, 4, E, J) float64, sums of features; None for a sketch.
    """

    run: WeightRun
    non_finite: NDArray[np.bool_]
    raw: NDArray[np.float64] | None = None
    centred: NDArray[np.float64] | None = None
    means: NDArray[np.float64] | None = None
    router_cosine: NDArray[np.float64] | None = None
    router_norms: NDArray[np.float64] | None = None
    router_row_cosine: NDArray[np.float64] | None = None
    products: NDArray[np.float64] | None = None
    router_products: NDArray[np.float64] | None = None
    within: NDArray[np.float64] | None = None
    between: NDArray[np.float64] | None = None
    features: NDArray[np.float64] | None = None

    def spoilt(self) -> list[str]:
        """Experts and router rows with weights that are not finite, in words."""
        run = self.run
        names = [run.model] if run.against is None else [run.model, run.against]
        found = [
            f"layer {run.layers[layer]} expert {expert} of {names[source]}"
            for source, layer, expert in np.argwhere(self.non_finite.any(axis=1))
        ]
        squares = [self.router_norms] if self.router_products is None else [self.router_products[i] for i in (0, 2)]
        for name, square in zip(names, squares, strict=True):
            if square is not None:
                rows = np.argwhere(~np.isfinite(square))
                found += [f"layer {run.layers[layer]} router row {row} of {name}" for layer, row in rows]
        return found


def save_weights(record: WeightRecord, path: Path) -> None:
    """Write a record in one step.

    Raises:
        OutputError: The file cannot be written.
    """
    arrays = {name: getattr(record, name) for name in _expected(record.run)}
    write_tensors(arrays, path, {WEIGHTS_KEY: json.dumps({"format": _FORMAT, **asdict(record.run)})})


def load_weights(path: Path) -> WeightRecord:
    """Read a record and check that its parts fit together.

    Raises:
        ProfileError: No such file, damaged, of another kind, or written by a newer moescope.
    """
    if not path.is_file():
        raise ProfileError(f"No such file: {path}")
    about, arrays = _read(path, WEIGHTS_KEY)
    if about is None:
        raise ProfileError(f"{path} holds no weights that `moescope weights` has summed")
    if about.pop("format", None) != _FORMAT:
        raise ProfileError(f"{path} was written by another version of moescope; run `moescope weights` again")
    run = _run(about, path)
    expected = _expected(run)
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if shapes != {name: (np.dtype(kind), shape) for name, (kind, shape) in expected.items()}:
        raise ProfileError(f"{path} is damaged: its parts do not fit together")
    return WeightRecord(run, **arrays)


def holds_weights(path: Path) -> bool:
    """Whether a file is one that `save_weights` wrote; a file that cannot be read is none."""
    try:
        with safe_open(path, framework="numpy") as reader:
            return WEIGHTS_KEY in (reader.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_weights_beside(folder: Path, model: ModelInfo) -> WeightRecord | None:
    """The sums beside a profile of `model`; None if there are none, or of two checkpoints, which no profile shows.

    Raises:
        ProfileError: They are damaged, or belong to another model.
    """
    path = folder / WEIGHTS_NAME
    if not os.path.lexists(path):
        return None
    try:
        record = load_weights(path)
    except ProfileError as error:
        raise ProfileError(f"{error}; remove it, or record again") from error
    run, experts = record.run, dict(zip(model.layer_indices, model.experts, strict=True))
    others = run.layers == model.layer_indices and model.fingerprint not in (None, run.fingerprint)
    if others or any(experts.get(layer) != run.experts for layer in run.layers):
        raise ProfileError(f"{path} belongs to another model than the profile; remove it, or record again")
    return record if run.against is None else None


class PartialWeights:
    """Keeps the sums of an unfinished pass in a file; a `moescope.profiler.weight_pass.Keeper`.

    Args:
        path: The file.
        resume: Go on from what is there; otherwise it is overwritten.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self._path, self._resume = path, resume

    def load(self, fingerprint: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """What an interrupted pass left here.

        Raises:
            OutputError: There is nothing, or it belongs to other weights or settings.
            ProfileError: It is damaged.
        """
        if not self._resume:
            return None
        if not self._path.is_file():
            raise OutputError(f"{self._path.parent} holds no {self._path.name}, so there is nothing to resume")
        about, arrays = _read(self._path, _PARTIAL_KEY)
        done = None if about is None else about.get("done")
        if about is None or type(done) is not int or done < 1:
            raise ProfileError(f"{self._path} is no part of a pass over weights; start again without --resume")
        if about.get("fingerprint") != _digest(fingerprint):
            raise OutputError(
                f"{self._path} is of other files or other settings than these; give the same, or start without --resume"
            )
        return done, {name: torch.from_numpy(array) for name, array in arrays.items()}

    def keep(self, fingerprint: str, done: int, state: Mapping[str, Tensor]) -> None:
        """Write the sums in one step.

        Raises:
            OutputError: The file cannot be written.
        """
        about = {"fingerprint": _digest(fingerprint), "done": done}
        arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        write_tensors(arrays, self._path, {_PARTIAL_KEY: json.dumps(about)})

    def drop(self) -> None:
        """Remove the file: the pass has come to its end."""
        self._path.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, key: str) -> tuple[dict[str, Any] | None, dict[str, NDArray[Any]]]:
    """The JSON object under `key`, None without one, and all arrays."""
    try:
        with safe_open(path, framework="numpy") as reader:
            text = (reader.metadata() or {}).get(key, "")
            about = json.loads(text) if 0 < len(text) <= _LARGEST_HEADER else None
            if not isinstance(about, dict):
                return None, {}
            return about, {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise ProfileError(f"{path} is damaged or no safetensors file ({error})") from error


def _run(about: Mapping[str, Any], path: Path) -> WeightRun:
    """The run that a header describes."""
    found = dict(about)
    try:
        for name in ("layers", "dtypes", "deltas"):
            found[name] = tuple(found[name])
        found["pairs"] = tuple((int(first), int(second)) for first, second in found["pairs"])
        run = WeightRun(**found)
        sound = (
            all(type(getattr(run, name)) is int and getattr(run, name) > 0 for name in _WHOLE)
            and all(type(layer) is int for layer in run.layers)
            and list(run.layers) == sorted(set(run.layers))
            and all(type(delta) is int and delta > 0 for delta in run.deltas)
            and all(first in run.layers and second in run.layers for first, second in run.pairs)
            and all(isinstance(getattr(run, name), str) for name in _TEXTS)
            and (run.against is None or isinstance(run.against, str))
            and isinstance(run.versions, dict)
            and isinstance(run.seconds, int | float)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path} is damaged: its header lacks something ({error})") from error
    if not sound or {item.name for item in fields(WeightRun)} != set(found):
        raise ProfileError(f"{path} is damaged: its header does not make sense")
    return run


_TEXTS: Final = ("model", "architecture", "engine", "created", "fingerprint")
_WHOLE: Final = ("experts", "hidden", "width", "coordinates", "coordinates_total", "bytes_read", "bytes_total")


def _expected(run: WeightRun) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Element type and shape of each array that a record of this run has."""
    depth, experts = len(run.layers), run.experts
    against = run.against is not None
    found: dict[str, tuple[type, tuple[int, ...]]] = {"non_finite": (np.bool_, (1 + against, 3, depth, experts))}
    if against:
        found["products"] = (np.float64, (4, 3, depth, experts))
        found["router_products"] = (np.float64, (4, depth, experts))
    else:
        found["raw"] = found["centred"] = (np.float64, (3, experts, depth, depth))
        found["means"] = (np.float64, (3, depth, depth))
        found["router_cosine"] = found["router_row_cosine"] = (np.float64, (depth, depth))
        found["router_norms"] = (np.float64, (depth, experts))
    if run.pairs:
        sides, pairs = run.sides
        found["within"] = (np.float64, (len(sides), 3, experts, experts))
        found["between"] = (np.float64, (len(pairs), 3, experts, experts))
        if run.coordinates == run.coordinates_total:
            found["features"] = (np.float64, (len(sides), 4, experts, PROBES))
    return found
