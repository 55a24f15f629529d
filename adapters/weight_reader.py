"""Rows of many experts, read one after another into memory of the caller: what a pass over a checkpoint reads with."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moescope.adapters.checkpoints import Checkpoint, Matrix, Part, Scale
from moescope.adapters.shards import DTYPES, OpenFiles
from moescope.profiler.errors import ModelError


class WeightReader:
    """Reads rows of experts the way they lie on disk; a `moescope.profiler.weights.WeightSource`.

    A part that is stored transposed has its columns as rows on disk, and is read by those. Files stay open until the
    `with` block ends.

    Args:
        checkpoint: What to read.
        layers: Model indices of the layers to read; all that route by default.

    Raises:
        ModelError: One of `layers` does not route, or they differ in shape.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[int] | None = None) -> None:
        shapes = {layer.index: (layer.experts, layer.hidden, layer.width) for layer in checkpoint.layers}
        self.layers = tuple(shapes) if layers is None else tuple(sorted(set(layers)))
        for layer in self.layers:
            checkpoint.matrix(layer, 0, "gate")
        found: dict[tuple[int, int, int], list[int]] = {}
        for layer in self.layers:
            found.setdefault(shapes[layer], []).append(layer)
        if len(found) > 1:
            kinds = "; ".join(
                f"layers {', '.join(map(str, group))} have {experts} experts of {hidden} by {width}"
                for (experts, hidden, width), group in found.items()
            )
            raise ModelError(f"{checkpoint.model} has layers of different shapes: {kinds}; choose with --layers")
        ((self.experts, self.hidden, self.width),) = found
        self.model = checkpoint.model
        self.architecture = checkpoint.architecture
        self.dtypes = checkpoint.expert_dtypes
        share = len(self.layers) * self.experts / sum(layer.experts for layer in checkpoint.layers)
        self.bytes_total = round(checkpoint.expert_bytes * share)
        self._checkpoint = checkpoint
        self._files = OpenFiles()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def router(self, layer: int) -> Tensor:
        """(E, H) float32, the router of a layer.

        Raises:
            ModelError: Its file cannot be read any more.
        """
        return self._checkpoint.router(layer)

    def scale(self, layer: int, expert: int, part: Part) -> Scale | None:
        """What a part is to be multiplied with; None if it is not quantised.

        Raises:
            ModelError: Its file cannot be read any more.
        """
        matrix = self._checkpoint.matrix(layer, expert, part)
        return matrix.scale(0, matrix.rows)

    def stored_as(self, layer: int, expert: int, part: Part) -> tuple[torch.dtype, bool]:
        """Element type of a part on disk, and whether it is stored transposed."""
        matrix = self._checkpoint.matrix(layer, expert, part)
        return DTYPES[matrix.tensor.dtype], _transposed(matrix)

    def rows(self, layer: int, expert: int, part: Part, start: int, stop: int) -> Tensor:
        """(stop - start, columns) float32, rows of a part as (F, H) or (H, F), dequantised.

        Raises:
            ModelError: Its file cannot be read any more.
        """
        return self._checkpoint.rows(layer, expert, part, start, stop)

    def read_into(self, layer: int, expert: int, part: Part, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the bytes of rows `start` to `stop` as they are stored.

        Args:
            layer: Index of the layer in the model.
            expert: Index of the expert.
            part: Part of the expert.
            start: First row on disk: a column of the part, if it is stored transposed.
            stop: Row after the last.
            out: Bytes of the rows, one after another.

        Raises:
            ModelError: The file cannot be read, or became shorter since it was opened.
        """
        matrix = self._checkpoint.matrix(layer, expert, part)
        if not _transposed(matrix):
            self._files.read_into(matrix.tensor, matrix.start + start * matrix.row_step, out)
            return
        size = DTYPES[matrix.tensor.dtype].itemsize
        span = (matrix.rows - 1) * matrix.row_step + 1
        row = matrix.rows * size
        if matrix.row_step == 1:
            for place, column in enumerate(range(start, stop)):
                piece = out[place * row : (place + 1) * row]
                self._files.read_into(matrix.tensor, matrix.start + column * matrix.column_step, piece)
            return
        target = torch.frombuffer(out, dtype=DTYPES[matrix.tensor.dtype]).view(stop - start, matrix.rows)
        line = torch.empty(span, dtype=target.dtype)
        view = line.view(torch.uint8).numpy().data
        for place, column in enumerate(range(start, stop)):
            self._files.read_into(matrix.tensor, matrix.start + column * matrix.column_step, view)
            target[place] = line[:: matrix.row_step]

    def fingerprint(self) -> str:
        """Names, sizes and times of the files behind the layers: another text means that something was changed.

        Raises:
            ModelError: A file is gone.
        """
        lines = []
        for file in self._checkpoint.files(self.layers):
            try:
                status = os.stat(file)
            except OSError as error:
                raise ModelError(f"{file}: {error.strerror}") from error
            lines.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
        return "\n".join(lines)


def _transposed(matrix: Matrix) -> bool:
    return matrix.column_step != 1
