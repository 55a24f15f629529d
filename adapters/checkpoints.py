"""Router and expert weights from a checkpoint's files, without a model: each byte is read when asked for, once."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.layouts import CHECKPOINT_FAMILIES, PREFIXES, CheckpointFamily, Layout
from moescope.adapters.shards import DTYPES, Shards, StoredTensor, shown
from moescope.profiler.errors import ModelError
from moescope.profiler.fp8 import decoded

Part = Literal["gate", "up", "down"]

_PARTS: Final[tuple[Part, ...]] = ("gate", "up", "down")
_FP8: Final = "F8_E4M3"
_LAYER: Final = re.compile(rf"({'|'.join(map(re.escape, PREFIXES))})layers\.(0|[1-9]\d{{0,5}})\.(.+)", re.DOTALL)
_EXPERT: Final = re.compile(r"(0|[1-9]\d{0,5})\.(.+)", re.DOTALL)
#: How the names of weights end that are packed in a way that is not unpacked here.
PACKED: Final = ("_blocks", ".qweight", ".qzeros", ".weight_packed", "_packed", ".weight_zero_point", ".absmax")
_TELLING: Final = re.compile(
    r"^(?!.*experts\.[1-9]).*(?:moe|router|expert|\.gate\.)"
)  # of single experts, the first will do
_SHOWN_NAMES: Final = 6


@dataclass(frozen=True, slots=True)
class CheckpointLayer:
    """A layer that routes.

    Attributes:
        index: Its index in the model.
        experts: E, number of routed experts.
        hidden: H, width of the model.
        width: F, width of an expert.
        layout: How its experts are stored.
    """

    index: int
    experts: int
    hidden: int
    width: int
    layout: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Factors of a quantised matrix: W[i, j] = q[i, j] · values[(first + i) // block[0], j // block[1]].

    Attributes:
        values: (R, C) float32.
        block: Rows and columns that share a factor.
        first: Rows of the first block that come before the matrix.
    """

    values: Tensor
    block: tuple[int, int]
    first: int = 0

    def apply(self, weights: Tensor) -> None:
        """Multiply a float32 matrix (rows, columns) in place."""
        rows, columns = weights.shape
        factors = self.values[(self.first + torch.arange(rows)) // self.block[0]]
        block = self.block[1]
        whole = columns // block
        weights[:, : whole * block].view(rows, whole, block).mul_(factors[:, :whole, None])
        if columns % block:
            weights[:, whole * block :].mul_(factors[:, whole : whole + 1])


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of one expert as they are stored; the memory is the caller's own.

    Attributes:
        gate: (F, H), gate projection.
        up: (F, H), up projection.
        down: (H, F), down projection.
        scales: What `gate`, `up` and `down` are to be multiplied with, where they are quantised.
        biases: Biases of gate (F,), up (F,) and down (H,), float32, in families that have them.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    scales: tuple[Scale | None, Scale | None, Scale | None] = (None, None, None)
    biases: tuple[Tensor, Tensor, Tensor] | None = None

    def float32(self) -> "ExpertWeights":
        """The same weights dequantised to float32 (shared with this one where it is float32 already)."""
        gate, up, down = (
            _dequantise(stored, scale)
            for stored, scale in zip((self.gate, self.up, self.down), self.scales, strict=True)
        )
        return ExpertWeights(gate, up, down, biases=self.biases)


def _dequantise(stored: Tensor, scale: Scale | None) -> Tensor:
    weights = decoded(stored) if stored.dtype == torch.float8_e4m3fn else stored.to(torch.float32)
    if scale is not None:
        scale.apply(weights)
    return weights


@dataclass(frozen=True, slots=True)
class _Factors:
    """Where the scale of a matrix lies: `columns` wide rows from element `start` of a tensor on."""

    tensor: StoredTensor
    start: int
    columns: int
    block: tuple[int, int]
    before: int  # rows of the same tensor before the matrix

    def read(self, first: int, last: int) -> Scale:
        """The factors of rows `first` to `last` of the matrix."""
        low = (self.before + first) // self.block[0]
        high = -(-(self.before + last) // self.block[0])
        values = self.tensor.read(self.start + low * self.columns, (high - low) * self.columns)
        return Scale(
            values.to(torch.float32).reshape(high - low, self.columns),
            self.block,
            self.before + first - low * self.block[0],
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix inside a tensor: element (r, c) is at `start + r * row_step + c * column_step`.

    Attributes:
        tensor: The tensor.
        start: Element of it at which the matrix begins.
        rows: Number of rows.
        columns: Number of columns.
        row_step: Elements from one row to the next.
        column_step: Elements from one column to the next; above 1 where it is stored transposed.
        factors: Where its scale lies.
    """

    tensor: StoredTensor
    start: int
    rows: int
    columns: int
    row_step: int
    column_step: int = 1
    factors: _Factors | None = None

    def read(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, (last - first, columns), as stored."""
        rows = last - first
        start = self.start + first * self.row_step
        if not rows:
            return torch.empty((0, self.columns), dtype=DTYPES[self.tensor.dtype])
        if self.column_step == 1:
            return self.tensor.read(start, rows * self.columns).reshape(rows, self.columns)
        span = (rows - 1) * self.row_step + 1
        return self.tensor.read(start, span, self.columns, self.column_step)[:, :: self.row_step].t().contiguous()

    def scale(self, first: int, last: int) -> Scale | None:
        """The scale of rows `first` to `last`."""
        return self.factors.read(first, last) if self.factors is not None and last > first else None


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where everything of one layer lies."""

    router: Matrix
    router_bias: StoredTensor | None
    experts: tuple[dict[Part, Matrix], ...]
    biases: tuple[StoredTensor, StoredTensor] | None
    interleaved: bool


@dataclass(frozen=True)
class Checkpoint:
    """Routers and experts of a checkpoint on disk. It holds names and positions; weights are read when asked for.

    Attributes:
        model: Folder or hub id as it was asked for.
        architecture: Name of the model's class.
        layers: The layers that route, in order.
        expert_dtypes: Element types of the routed experts, as the files name them.
        router_dtypes: Element types of the routers.
        expert_bytes: Bytes of the routed experts on disk with their scales and biases.
        router_bytes: Bytes of the routers on disk with their biases.
    """

    model: str
    architecture: str
    layers: tuple[CheckpointLayer, ...]
    expert_dtypes: tuple[str, ...]
    router_dtypes: tuple[str, ...]
    expert_bytes: int
    router_bytes: int
    _stored: dict[int, _Stored] = field(repr=False, compare=False)

    def router(self, layer: int) -> Tensor:
        """The weights of a router.

        Args:
            layer: Index of the layer in the model.

        Returns:
            (E, H) float32.

        Raises:
            ModelError: No such layer, or its file cannot be read any more.
        """
        router = self._layer(layer).router
        return _dequantise(router.read(0, router.rows), router.scale(0, router.rows))

    def router_bias(self, layer: int) -> Tensor | None:
        """The bias of a router, (E,) float32: of its logits, or one that corrects its choice. None without one.

        Raises:
            ModelError: As `router`.
        """
        bias = self._layer(layer).router_bias
        return None if bias is None else bias.read(0, math.prod(bias.shape)).to(torch.float32).flatten()

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """All weights of one expert, as stored.

        Args:
            layer: Index of the layer in the model.
            expert: Index of the expert.

        Returns:
            gate (F, H), up (F, H) and down (H, F), whatever the layout on disk.

        Raises:
            ModelError: No such layer or expert, or its file cannot be read any more.
        """
        stored = self._layer(layer)
        parts = self._expert(layer, expert)
        gate, up, down = (parts[part] for part in _PARTS)
        if gate.tensor is up.tensor and gate.column_step > 1:
            start = min(gate.start, up.start)
            both = gate.tensor.read(start, gate.columns * gate.column_step).reshape(gate.columns, gate.column_step)
            weights = [
                both[:, part.start - start :: part.row_step][:, : part.rows].t().contiguous() for part in (gate, up)
            ]
        else:
            weights = [part.read(0, part.rows) for part in (gate, up)]
        scales = (gate.scale(0, gate.rows), up.scale(0, up.rows), down.scale(0, down.rows))
        biases = None
        if stored.biases is not None:
            width = 2 * gate.rows
            first = stored.biases[0].read(expert * width, width).to(torch.float32).flatten()
            second = stored.biases[1].read(expert * down.rows, down.rows).to(torch.float32).flatten()
            halves = (first[0::2], first[1::2]) if stored.interleaved else first.chunk(2)
            biases = (halves[0].clone(), halves[1].clone(), second)
        return ExpertWeights(weights[0], weights[1], down.read(0, down.rows), scales, biases)

    def rows(self, layer: int, expert: int, part: Part, start: int, stop: int) -> Tensor:
        """Some rows of one part of an expert; nothing else is read but what lies between them on disk.

        Interleaved gate and up rows cannot be read without each other.

        Args:
            layer: Index of the layer in the model.
            expert: Index of the expert.
            part: "gate" or "up" with rows of (F, H), "down" with rows of (H, F).
            start: First row.
            stop: Row after the last.

        Returns:
            (stop - start, columns) float32.

        Raises:
            ModelError: No such layer, expert, part or rows, or the file cannot be read any more.
        """
        matrix = self._expert(layer, expert).get(part)
        if matrix is None:
            raise ModelError(f"{shown(part)} is no part of an expert; the parts are: {', '.join(_PARTS)}")
        if not 0 <= start <= stop <= matrix.rows:
            raise ModelError(f"{part} of an expert of layer {layer} has rows 0 to {matrix.rows}, not {start} to {stop}")
        return _dequantise(matrix.read(start, stop), matrix.scale(start, stop))

    def matrix(self, layer: int, expert: int, part: Part) -> Matrix:
        """Where one part of an expert lies.

        Raises:
            ModelError: No such layer or expert.
        """
        return self._expert(layer, expert)[part]

    def files(self, layers: Sequence[int]) -> tuple[Path, ...]:
        """The files that hold routers and experts of some layers, by name."""
        found = set()
        for layer in layers:
            stored = self._layer(layer)
            found.add(stored.router.tensor.file)
            found |= {matrix.tensor.file for parts in stored.experts for matrix in parts.values()}
        return tuple(sorted(found))

    def _layer(self, layer: int) -> _Stored:
        if layer not in self._stored:
            raise ModelError(f"layer {layer} of {self.model} does not route; those that do: {_ranges(self._stored)}")
        return self._stored[layer]

    def _expert(self, layer: int, expert: int) -> dict[Part, Matrix]:
        experts = self._layer(layer).experts
        if not 0 <= expert < len(experts):
            raise ModelError(f"layer {layer} of {self.model} has experts 0 to {len(experts) - 1}, not {expert}")
        return experts[expert]


def router_weights(checkpoint: Checkpoint) -> list[NDArray[np.float32]]:
    """The routers of all layers that route, (E, H) each, in the order of `checkpoint.layers`.

    Raises:
        ModelError: A file cannot be read any more.
    """
    return [checkpoint.router(layer.index).numpy() for layer in checkpoint.layers]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Find the routers and experts of a checkpoint and check that all of them are there in the shapes of its config.

    Args:
        model: A folder, or the hub id of a model that is in the local cache; nothing is downloaded.

    Returns:
        The checkpoint; no weights are read yet and no file stays open.

    Raises:
        ModelError: There is no such checkpoint, its files are damaged or contradict each other, its family's layout is
            not known, or its experts are packed in a way that this reader does not unpack.
    """
    return _Reader(Shards(find_folder(model), str(model)), str(model)).checkpoint()


def find_folder(model: str | Path) -> Path:
    """The folder of a checkpoint that is on this machine.

    Args:
        model: A folder, or the hub id of a model that is in the local cache; nothing is downloaded.

    Raises:
        ModelError: There is no such folder, or it has no config.
    """
    folder = _folder(model)
    if not folder.is_dir():
        raise ModelError(f"{model} is a file; the folder of a checkpoint or a hub id is needed")
    if not (folder / "config.json").exists():
        raise ModelError(f"{model} has no config.json; the folder of a checkpoint or a hub id is needed")
    return folder


def _folder(model: str | Path) -> Path:
    folder = Path(model)
    try:
        if folder.exists():
            return folder
    except OSError as error:
        raise ModelError(f"{shown(str(model))} cannot be opened: {error.strerror}") from error
    if not isinstance(model, str) or folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ModelError(f"No such folder: {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"{shown(model)} is neither a folder nor a valid hub id") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model} is neither a folder nor in the local hub cache; download it first") from error


def _ranges(indices: dict[int, _Stored]) -> str:
    """Ascending indices as `3-60, 62`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


class _Reader:
    """Works out where everything lies; used once."""

    def __init__(self, shards: Shards, model: str) -> None:
        self._shards = shards
        self._model = model
        self._label = f"{model}/config.json"
        outer = shards.read_json("config.json")
        nested = outer.get("text_config")
        self._config: dict[str, Any] = nested if isinstance(nested, dict) else outer
        names = outer.get("architectures")
        kinds = (self._config.get("model_type"), outer.get("model_type"))
        self._kind = next((kind for kind in kinds if isinstance(kind, str)), "")
        self._architecture = shown(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else ""
        self._method = quantisation(outer).get("quant_method")
        self._block = _block_size(outer, self._label)
        self._experts: dict[str, int] = {}  # bytes of each tensor
        self._routers: dict[str, int] = {}
        self._weights: set[StoredTensor] = set()

    def checkpoint(self) -> Checkpoint:
        family = CHECKPOINT_FAMILIES.get(self._kind)
        if family is None:
            raise self._unknown("is of a family whose layout on disk this reader does not know")
        count = self._number("num_hidden_layers")
        layers: list[CheckpointLayer] = []
        stored: dict[int, _Stored] = {}
        groups = self._groups(family)
        for index in range(count):
            names = groups.get(index)
            if names is None:
                raise ModelError(f"{self._model} has no tensors of layer {index}, but its config says {count} layers")
            layout = self._layout(family, index, names)
            if layout is not None:
                layer, places = self._read_layer(family, layout, index, names)
                layers.append(layer)
                stored[index] = places
        if not layers:
            raise self._unknown("has no router and experts under the names that its family uses")
        return Checkpoint(
            self._model,
            self._architecture or shown(self._kind),
            tuple(layers),
            tuple(sorted({tensor.dtype for tensor in self._weights if tensor.name in self._experts})),
            tuple(sorted({tensor.dtype for tensor in self._weights if tensor.name in self._routers})),
            sum(self._experts.values()),
            sum(self._routers.values()),
            stored,
        )

    def _unknown(self, what: str) -> ModelError:
        """The error for a layout that is not in the table, with names of the first layer that has experts."""
        layers: dict[int, list[str]] = {}
        for name in self._shards.names:
            match = re.search(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,6})\.", name)
            if match and _TELLING.search(name):
                layers.setdefault(int(match[1]), []).append(name)
        seen = layers[min(layers)] if layers else list(self._shards.names)
        kind = shown(self._kind) or "without model_type"
        dense = "" if layers else "; none is of a router or of experts, as in a dense model"
        return ModelError(f"{self._model} ({kind}) {what}; it has tensors like {_sample(seen)}{dense}")

    def _number(self, *fields: str) -> int:
        """A positive whole number of the config, from the first of `fields` that is there."""
        for name in fields:
            value = self._config.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise ModelError(f"{self._label}: {name} is not a positive whole number")
                return value
        raise ModelError(f"{self._label}: {' or '.join(fields)} is missing")

    def _groups(self, family: CheckpointFamily) -> dict[int, dict[str, str]]:
        """By layer, the tensors of the language model: what stands after `layers.N.` to the full name."""
        found: dict[str, dict[int, dict[str, str]]] = {}
        routers = {layout.router for layout in family.layouts}
        prefixes = set()
        for name in self._shards.names:
            match = _LAYER.fullmatch(name)
            if match:
                found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
                if match[3] in routers:
                    prefixes.add(match[1])
        if not prefixes:
            raise self._unknown("has no router under the names that its family uses")
        if len(prefixes) > 1:
            raise ModelError(f"{self._model} has routers of more than one model: under {', '.join(sorted(prefixes))}")
        return found[prefixes.pop()]

    def _layout(self, family: CheckpointFamily, index: int, names: dict[str, str]) -> Layout | None:
        """The layout of a layer; None if it does not route."""
        for rest, name in names.items():
            if "expert" in rest and rest.endswith(PACKED):
                method = f" ({shown(self._method)})" if isinstance(self._method, str) else ""
                raise ModelError(
                    f"{self._model}: the experts are packed{method}, which this reader does not unpack: tensor"
                    f" {shown(name)}; use a checkpoint in BF16, F16, F32 or FP8"
                )
        matching = [layout for layout in family.layouts if _has_experts(layout, names)]
        if len(matching) > 1:
            raise ModelError(
                f"{self._model}: layer {index} has experts in two layouts: {matching[0].name} and {matching[1].name}"
            )
        if matching:
            return matching[0]
        for layout in family.layouts:
            odd = [name for rest, name in names.items() if rest == layout.router or rest.startswith(layout.experts)]
            if odd:
                raise ModelError(
                    f"{self._model}: layer {index} routes, but its experts have names that this reader does not know:"
                    f" it has tensors like {_sample(odd)}"
                )
        return None

    def _read_layer(
        self, family: CheckpointFamily, layout: Layout, index: int, names: dict[str, str]
    ) -> tuple[CheckpointLayer, _Stored]:
        experts, hidden, width = self._number(*family.experts), self._number("hidden_size"), self._number(family.width)
        router = self._tensor(names, layout.router, index, self._routers, (experts, hidden))
        biases = [rest for rest in layout.router_biases if rest in names]
        if len(biases) > 1:
            raise ModelError(f"{self._model}: layer {index} has two router biases: {' and '.join(biases)}")
        bias = (
            self._tensor(names, biases[0], index, self._routers, (experts,), (1, experts), weight=False)
            if biases
            else None
        )
        expert_biases = None
        if layout.fused:
            parts = self._fused(layout, index, names, experts, hidden, width)
            if layout.expert_biases:
                first, second = layout.expert_biases
                expert_biases = (
                    self._tensor(
                        names, layout.experts + first, index, self._experts, (experts, 2 * width), weight=False
                    ),
                    self._tensor(names, layout.experts + second, index, self._experts, (experts, hidden), weight=False),
                )
        else:
            parts = self._single(layout, index, names, experts, hidden, width)
        return CheckpointLayer(index, experts, hidden, width, layout.name), _Stored(
            Matrix(router, 0, experts, hidden, hidden, factors=self._factors(router, 0, 0, self._routers)),
            bias,
            parts,
            expert_biases,
            layout.interleaved,
        )

    def _single(
        self, layout: Layout, index: int, names: dict[str, str], experts: int, hidden: int, width: int
    ) -> tuple[dict[Part, Matrix], ...]:
        """The parts of experts that lie in tensors of their own."""
        found = _expert_indices(layout, names)
        if max(found) >= experts:
            raise ModelError(
                f"{self._model}: layer {index} has tensors of expert {max(found)} ({shown(names[found[max(found)]])}),"
                f" but the config says {experts} experts"
            )
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        rests = {"gate": layout.gate, "up": layout.up, "down": layout.down}
        parts: list[dict[Part, Matrix]] = []
        for expert in range(experts):
            places: dict[Part, Matrix] = {}
            for part in _PARTS:
                rows, columns = shapes[part]
                rest = f"{layout.experts}{expert}.{rests[part]}"
                tensor = self._tensor(names, rest, index, self._experts, (rows, columns))
                factors = self._factors(tensor, 0, 0, self._experts)
                places[part] = Matrix(tensor, 0, rows, columns, columns, factors=factors)
            parts.append(places)
        return tuple(parts)

    def _fused(
        self, layout: Layout, index: int, names: dict[str, str], experts: int, hidden: int, width: int
    ) -> tuple[dict[Part, Matrix], ...]:
        """The parts of experts that lie in one tensor for gate and up and one for down."""
        straight = ((experts, 2 * width, hidden), (experts, hidden, width))
        across = ((experts, hidden, 2 * width), (experts, width, hidden))
        shapes = {True: (across,), False: (straight,), None: (straight, across)}[layout.transposed]
        both = self._tensor(names, layout.experts + layout.gate, index, self._experts, *(pair[0] for pair in shapes))
        down = self._tensor(names, layout.experts + layout.down, index, self._experts, *(pair[1] for pair in shapes))
        if (both.shape, down.shape) not in shapes:
            raise down.refuse(f"of shape {down.shape} does not go with {shown(both.name)} of shape {both.shape}")
        parts: list[dict[Part, Matrix]] = []
        size, half = 2 * width * hidden, width * hidden
        if (both.shape, down.shape) == straight:
            for expert in range(experts):
                gate_factors = self._factors(both, expert, 0, self._experts)
                up_factors = self._factors(both, expert, width, self._experts)
                down_factors = self._factors(down, expert, 0, self._experts)
                parts.append(
                    {
                        "gate": Matrix(both, expert * size, width, hidden, hidden, factors=gate_factors),
                        "up": Matrix(both, expert * size + half, width, hidden, hidden, factors=up_factors),
                        "down": Matrix(down, expert * half, hidden, width, width, factors=down_factors),
                    }
                )
            return tuple(parts)
        for tensor in (both, down):
            if tensor.dtype == _FP8:
                raise tensor.refuse("is FP8 in a transposed layout, which this reader does not scale")
            self._factors(tensor, 0, 0, self._experts)
        step, second = (2, 1) if layout.interleaved else (1, width)
        for expert in range(experts):
            parts.append(
                {
                    "gate": Matrix(both, expert * size, width, hidden, step, 2 * width),
                    "up": Matrix(both, expert * size + second, width, hidden, step, 2 * width),
                    "down": Matrix(down, expert * half, hidden, width, 1, hidden),
                }
            )
        return tuple(parts)

    def _tensor(
        self,
        names: dict[str, str],
        rest: str,
        index: int,
        sums: dict[str, int],
        *shapes: tuple[int, ...],
        weight: bool = True,
    ) -> StoredTensor:
        """A tensor of a layer in one of `shapes`, counted in `sums`."""
        if rest not in names:
            raise ModelError(f"{self._model} lacks tensor layers.{index}.{rest}")
        tensor = self._shards.find(names[rest])
        if tensor.dtype not in DTYPES or (tensor.dtype == _FP8 and not weight):
            raise tensor.refuse(f"is stored as {shown(tensor.dtype)}; this reader reads {', '.join(DTYPES)}")
        if tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise tensor.refuse(f"has shape {list(tensor.shape)}, but the config asks for {expected}")
        sums[tensor.name] = tensor.size
        if weight:
            self._weights.add(tensor)
        return tensor

    def _factors(self, tensor: StoredTensor, expert: int, before: int, sums: dict[str, int]) -> _Factors | None:
        """The scale of a matrix that begins `before` rows after the start of an expert of `tensor`."""
        scale = _scale_of(self._shards, tensor)
        if scale is None:
            return None
        sums[scale.name] = scale.size
        return _factors(tensor, scale, self._block, expert, before)


class Fp8Tensors:
    """The FP8 tensors of a checkpoint, whatever they belong to, as float32.

    Args:
        shards: The files of the checkpoint.
        model: Its name in errors.

    Raises:
        ModelError: The config cannot be read.
    """

    def __init__(self, shards: Shards, model: str) -> None:
        self._shards = shards
        self._block = _block_size(shards.read_json("config.json"), f"{model}/config.json")

    def scale(self, tensor: StoredTensor) -> StoredTensor | None:
        """The scale of a tensor; None of one that is not FP8.

        Raises:
            ModelError: A tensor that is FP8 has no scale, or none that fits it; or another one has a scale.
        """
        scale = _scale_of(self._shards, tensor)
        if scale is not None:
            if len(tensor.shape) not in (2, 3):
                raise tensor.refuse(f"is FP8 of shape {list(tensor.shape)}, which this reader does not scale")
            _factors(tensor, scale, self._block, 0, 0)
        return scale

    def pieces(self, tensor: StoredTensor, elements: int) -> Iterator[Tensor]:
        """A tensor times its scale, some rows at a time, in order.

        Args:
            tensor: One that has a `scale`.
            elements: Elements of a piece, about; at least a row is read.

        Yields:
            (rows, columns) float32.

        Raises:
            ModelError: As `scale`, or its file cannot be read any more.
        """
        scale = self.scale(tensor)
        assert scale is not None
        rows, columns = tensor.shape[-2:]
        step = max(1, elements // max(1, columns))
        for index in range(math.prod(tensor.shape[:-2])):
            factors = _factors(tensor, scale, self._block, index, 0)
            matrix = Matrix(tensor, index * rows * columns, rows, columns, columns, factors=factors)
            for first in range(0, rows, step):
                last = min(rows, first + step)
                yield _dequantise(matrix.read(first, last), matrix.scale(first, last))


def quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of its quantisation; it can stand in the part for text."""
    nested = config.get("text_config")
    found = config.get("quantization_config", nested.get("quantization_config") if isinstance(nested, dict) else None)
    return found if isinstance(found, dict) else {}


def _block_size(config: dict[str, Any], label: str) -> tuple[int, int] | None:
    block = quantisation(config).get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 30 for n in block):
        raise ModelError(f"{label}: weight_block_size is not two positive whole numbers")
    return block[0], block[1]


def _scale_of(shards: Shards, tensor: StoredTensor) -> StoredTensor | None:
    found = [tensor.name + ending for ending in ("_scale_inv", "_scale") if tensor.name + ending in shards]
    if tensor.dtype != _FP8:
        if found:
            raise tensor.refuse(f"is {tensor.dtype}, but has a scale ({shown(found[0])})")
        return None
    if len(found) != 1:
        raise tensor.refuse(f"is FP8 and {'has two scales' if found else 'lacks its scale'}: _scale_inv or _scale")
    scale = shards.find(found[0])
    if scale.dtype not in DTYPES or scale.dtype == _FP8:
        raise scale.refuse(f"is a scale stored as {shown(scale.dtype)}, which this reader does not read")
    return scale


def _factors(
    tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None, expert: int, before: int
) -> _Factors:
    """Where the scale of a matrix lies that begins `before` rows after the start of an expert of `tensor`."""
    lead, (rows, columns) = tensor.shape[:-2], tensor.shape[-2:]
    if block is not None:
        high, wide = -(-rows // block[0]), -(-columns // block[1])
        if scale.shape == (*lead, high, wide):
            return _Factors(scale, expert * high * wide, wide, block, before)
    if math.prod(scale.shape) == 1:
        return _Factors(scale, 0, 1, (rows, columns), before)
    if scale.shape in (lead, (*lead, 1), (*lead, 1, 1)):
        return _Factors(scale, expert, 1, (rows, columns), before)
    if scale.shape in ((*lead, rows), (*lead, rows, 1)):
        return _Factors(scale, expert * rows, 1, (1, columns), before)
    blocks = f"blocks of {list(block)}" if block else "no weight_block_size in the config"
    raise scale.refuse(f"of shape {list(scale.shape)} is no scale of shape {list(tensor.shape)} with {blocks}")


def _sample(names: list[str]) -> str:
    """Some names, those that tell most."""
    telling = [name for name in names if _TELLING.search(name)] or names
    return ", ".join(map(shown, sorted(telling)[:_SHOWN_NAMES]))


def _expert_indices(layout: Layout, names: dict[str, str]) -> dict[int, str]:
    """Experts that have tensors of their own, and one name of each."""
    found: dict[int, str] = {}
    for rest in names:
        if rest.startswith(layout.experts):
            match = _EXPERT.fullmatch(rest, len(layout.experts))
            if match:
                found[int(match[1])] = rest
    return found


def _has_experts(layout: Layout, names: dict[str, str]) -> bool:
    if layout.fused:
        return layout.experts + layout.gate in names
    parts = (layout.gate, layout.up, layout.down)
    matches = (_EXPERT.fullmatch(rest, len(layout.experts)) for rest in names if rest.startswith(layout.experts))
    return any(match is not None and match[2] in parts for match in matches)
