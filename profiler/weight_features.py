"""Random directions along which experts are looked at, blind to the order of their hidden neurons."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

#: J, probes of an expert.
PROBES: Final = 256
#: Width of the model that a segment covers, at least, and the most segments there are.
_SEGMENT: Final = 64
_MOST_SEGMENTS: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Each probe is zero outside one segment of the model's width, which makes it cheap and as telling as any other.

    With neuron f's rows g_f, u_f of gate and up and column d_f of down, a = g_f·p_j, b = u_f·p_j, c = d_f·q_j, the
    features are Σ_f a², Σ_f b², Σ_f ab, Σ_f c². A sum over f is blind to the order of the neurons. Over independent
    weights each fluctuates by √(2/F) of its size from expert to expert, however many coordinates the probe has.

    Attributes:
        inward: (S, w, J / S) float32, standard normal; p_j, for gate and up, by segment.
        outward: (S, w, J / S) float32; q_j, for down.
        hidden: H, of which S segments of w = ⌈H / S⌉ are made, the last being shorter.
    """

    inward: Tensor
    outward: Tensor
    hidden: int

    @property
    def count(self) -> int:
        """J."""
        return self.inward.shape[0] * self.each

    @property
    def each(self) -> int:
        """J / S, probes of a segment."""
        return self.inward.shape[2]

    def to(self, device: torch.device) -> "Probes":
        """The same on another device."""
        return Probes(self.inward.to(device), self.outward.to(device), self.hidden)

    def segment_of(self, coordinate: int) -> tuple[int, int]:
        """The segment that a coordinate is in, and the coordinate after its last."""
        size = self.inward.shape[1]
        segment = coordinate // size
        return segment, min((segment + 1) * size, self.hidden)

    def rows_of(self, part: str, first: int, last: int) -> Tensor:
        """(last - first, J / S): the probes of coordinates within one segment."""
        segment, _ = self.segment_of(first)
        start = segment * self.inward.shape[1]
        return (self.outward if part == "down" else self.inward)[segment, first - start : last - start]

    def project_rows(self, part: str, rows: Tensor) -> Tensor:
        """Inner products of rows (E, n, H) with all probes, (E, n, J)."""
        probes = self.outward if part == "down" else self.inward
        segments, size, _ = probes.shape
        missing = segments * size - self.hidden
        padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
        pieces = padded.reshape(-1, segments, size).transpose(0, 1)
        return torch.bmm(pieces, probes).permute(1, 0, 2).reshape(*rows.shape[:2], -1)


def draw_probes(hidden: int, count: int = PROBES, seed: int = 0) -> Probes:
    """Draw the probes of a model; the same arguments give the same probes.

    Args:
        hidden: H, width of the model.
        count: J, number of probes, a multiple of 64.
        seed: Of the generator.

    Raises:
        ValueError: `hidden` is below 1, or `count` no multiple of 64.
    """
    if hidden < 1 or count < 1 or count % _MOST_SEGMENTS:
        raise ValueError(f"needs a width and probes, a multiple of {_MOST_SEGMENTS}; got {hidden} and {count}")
    segments = 1 << min(_MOST_SEGMENTS, max(1, hidden // _SEGMENT)).bit_length() - 1
    size = -(-hidden // segments)
    shape = (2, segments, size, count // segments)
    inward, outward = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    return Probes(inward, outward, hidden)
