"""Sets of whole numbers that are given as ranges, however long these are."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Whole numbers from 0 up, as R ranges that are in order and do not overlap.

    Attributes:
        starts: int64 (R,), first number of each range.
        stops: int64 (R,), number after the last of each.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def of(cls, items: Iterable[int | range]) -> Self:
        """All numbers of some numbers and ranges of step 1."""
        runs = [(item, item + 1) if not isinstance(item, range) else (item.start, item.stop) for item in items]
        pairs = np.array(sorted(runs), np.int64).reshape(-1, 2)
        furthest = np.maximum.accumulate(pairs[:, 1])
        first = np.flatnonzero(np.concatenate(([True], pairs[1:, 0] > furthest[:-1])))[: len(pairs)]
        return cls(pairs[first, 0], furthest[np.append(first[1:], len(pairs)) - 1] if len(pairs) else furthest)

    @property
    def count(self) -> int:
        """How many numbers these are."""
        return int((self.stops - self.starts).sum())

    def hold(self, values: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Which of the values (n,) are among the numbers, (n,)."""
        place = np.searchsorted(self.starts, values, side="right") - 1
        found: NDArray[np.bool_] = (place >= 0) & (values < self.stops[place]) if len(self.starts) else place >= 0
        return found

    def meet(self, first: int, last: int) -> bool:
        """Whether a number from `first` to `last`, both included, is among them."""
        return bool(((self.starts <= last) & (self.stops > first)).any())
