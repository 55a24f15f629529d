"""What the weights of a checkpoint say about its routers and experts: the results that pages and files show."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.stats.expert_matching import LayerPair, Verdict
from moescope.stats.expert_similarity import (
    DistanceSimilarity,
    ExpertSimilarity,
    UnusableExpert,
    similarity_by_distance,
)
from moescope.stats.similarity import RouterSimilarity


@dataclass(frozen=True, slots=True)
class WeightCoverage:
    """How much of a checkpoint's experts a pass has read.

    Attributes:
        coordinates: weights read of each expert.
        coordinates_total: weights that an expert has.
        bytes_read: bytes of experts read, of all layers taken.
        bytes_total: bytes that the experts of these layers have on disk.
    """

    coordinates: int
    coordinates_total: int
    bytes_read: int
    bytes_total: int

    @property
    def sketched(self) -> bool:
        """Whether the numbers rest on a sample of the weights."""
        return self.coordinates < self.coordinates_total


@dataclass(frozen=True, slots=True, eq=False)
class WeightSimilarity:
    """Routers and experts of one checkpoint, layer against layer.

    Attributes:
        model_id: name or path of the checkpoint.
        architecture: the model's class, as its configuration names it.
        layers: (L,) true model indices of the layers taken.
        experts: E, routed experts of each of them.
        hidden: H, width of the model.
        width: F, width of an expert.
        dtypes: element types of the experts on disk.
        deltas: distances that are shown by themselves, in model layers.
        routers: the routers, compared.
        same_index: the same expert of every two layers; NaN for pairs that were not asked for.
        within: (L,) float64, mean cosine of two different experts of one layer, not centred; NaN where not measured.
        matches: pairs of layers whose experts were matched all against all; empty where that was left out.
        verdict: what the matches say together; None without any.
        coverage: how much was read.
        engine: device and threads of the pass, in words.
        seconds: what the pass took.
        versions: version of each package that took part.
        created: when, ISO 8601.
    """

    model_id: str
    architecture: str
    layers: tuple[int, ...]
    experts: int
    hidden: int
    width: int
    dtypes: tuple[str, ...]
    deltas: tuple[int, ...]
    routers: RouterSimilarity
    same_index: ExpertSimilarity
    within: NDArray[np.float64]
    matches: tuple[LayerPair, ...]
    verdict: Verdict | None
    coverage: WeightCoverage
    engine: str
    seconds: float
    versions: dict[str, str]
    created: str

    @property
    def by_distance(self) -> tuple[DistanceSimilarity, ...]:
        """The raw cosines of the same index at each of `deltas`: the documented output."""
        return similarity_by_distance(self.same_index.cosine, self.layers, self.deltas)

    @property
    def centred_by_distance(self) -> tuple[DistanceSimilarity, ...]:
        """The same of experts less the mean expert of their layer."""
        return similarity_by_distance(self.same_index.centred, self.layers, self.deltas)

    @property
    def unusable(self) -> tuple[UnusableExpert, ...]:
        """Experts without a cosine: zero, or not finite."""
        return self.same_index.unusable


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """The same layers of two checkpoints of one shape: what training has changed.

    Attributes:
        model_id: the checkpoint that is looked at.
        against_id: the one that it is held against.
        architecture: the class of both.
        layers: (L,) true model indices of the layers taken.
        experts: E, routed experts of each.
        cosine: (L, E) float64, cosine of an expert's weights in the two; NaN for unusable experts.
        part_cosine: (3, L, E) float64, of gate, up and down alone.
        relative_change: (L, E) float64, ‖A − B‖ / ‖B‖ of an expert's weights, B being what is held against.
        part_relative_change: (3, L, E) float64, of gate, up and down alone.
        router_cosine: (L, E) float64, cosine of an expert's router row in the two.
        router_relative_change: (L, E) float64, ‖a − b‖ / ‖b‖ of that row.
        unusable: experts that are zero or not finite in either; by layer.
        matches: experts of a layer in the one against those of the same layer in the other; empty where left out.
        verdict: what the matches say together; None without any.
        coverage: how much was read, of both.
        engine: device and threads of the pass, in words.
        seconds: what the pass took.
        versions: version of each package that took part.
        created: when, ISO 8601.
    """

    model_id: str
    against_id: str
    architecture: str
    layers: tuple[int, ...]
    experts: int
    cosine: NDArray[np.float64]
    part_cosine: NDArray[np.float64]
    relative_change: NDArray[np.float64]
    part_relative_change: NDArray[np.float64]
    router_cosine: NDArray[np.float64]
    router_relative_change: NDArray[np.float64]
    unusable: tuple[UnusableExpert, ...]
    matches: tuple[LayerPair, ...]
    verdict: Verdict | None
    coverage: WeightCoverage
    engine: str
    seconds: float
    versions: dict[str, str]
    created: str
