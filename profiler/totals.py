"""Integer totals of a run: group sums go in, a `RoutingProfile` comes out, bit for bit whatever the order."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope import __version__
from moescope.profiler.engine import Sums
from moescope.profiler.profile import BUFFERS, FIXED_POINT_BITS, ModelInfo, RoutingProfile, RunInfo, axis_sizes

_UNIT = 2.0**-FIXED_POINT_BITS


class Totals:
    """Running sums of a profile, int64 throughout (fixed point for weights and probabilities).

    Args:
        model: The model.
        domains: Domain names, sorted.
        probabilities: Keep sums of full distributions.
        coactivation: Keep pairs of experts.
    """

    def __init__(
        self, model: ModelInfo, domains: Sequence[str], *, probabilities: bool = True, coactivation: bool = False
    ) -> None:
        self.model = model
        self.domains = tuple(domains)
        wanted = {"coactivation": coactivation, "probability_sums": probabilities, "probability_tokens": probabilities}
        sizes = axis_sizes(model, domains)
        self._arrays: dict[str, NDArray[np.int64]] = {
            buffer.name: np.zeros(buffer.shape(sizes), np.int64) for buffer in BUFFERS if wanted.get(buffer.name, True)
        }

    @classmethod
    def from_profile(cls, profile: RoutingProfile) -> Self:
        """The totals that `profile` was made from."""
        totals = cls(
            profile.model,
            profile.domains,
            probabilities=profile.probability_sums is not None,
            coactivation=profile.coactivation is not None,
        )
        for buffer in BUFFERS:
            array = getattr(profile, buffer.name)
            if array is not None:
                scaled = np.rint(array / _UNIT) if buffer.fixed_point else array
                totals._arrays[buffer.name][...] = scaled.astype(np.int64)
        return totals

    def add(self, sums: Sums, tokens: Sequence[int]) -> None:
        """Add drained sums; `tokens` are those that an engine gave with them."""
        sums.add_to(self._arrays, tokens)

    def profile(self, run: RunInfo) -> RoutingProfile:
        """A profile of what has been added so far, as `run`."""
        fixed = {buffer.name for buffer in BUFFERS if buffer.fixed_point}
        arrays: dict[str, NDArray[Any]] = {
            name: array * _UNIT if name in fixed else array.copy() for name, array in self._arrays.items()
        }
        return RoutingProfile(
            model=self.model,
            domains=self.domains,
            runs=(run,),
            created=run.created,
            version=__version__,
            **arrays,
        )
