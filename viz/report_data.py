"""What a report is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moescope.stats.activation import Activation, LayerLoad, Measure
from moescope.stats.coactivation import Coactivation
from moescope.stats.correlation import LayerCorrelation
from moescope.stats.nulls import LayerNulls
from moescope.stats.period_finder import PeriodFinding
from moescope.stats.periodicity import PeriodicPatterns
from moescope.stats.placement import HeldOutPlacement
from moescope.stats.reliability import Reliability
from moescope.stats.similarity import RouterSimilarity
from moescope.stats.specialisation import Specialisation
from moescope.stats.use import Coverage, ExpertUse, PhaseContrast
from moescope.stats.weight_similarity import WeightSimilarity

if TYPE_CHECKING:  # a hand-over type
    from moescope.profiler.sidecars import TokenSample


@dataclass(frozen=True, slots=True, eq=False)
class DomainView:
    """One domain's part of a profile, in the report's measure.

    Attributes:
        name: the domain.
        tokens: its routed tokens.
        activation: use of the experts.
        correlation: layer correlation of that.
        periodic: periodic patterns of that correlation.
    """

    name: str
    tokens: int
    activation: Activation
    correlation: LayerCorrelation
    periodic: PeriodicPatterns


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsUsed:
    """How experts are used, by selections.

    Attributes:
        use: evenness of each layer.
        phases: prefill against decode.
        domains: names of the domains, in the order of `specialisation`.
        specialisation: each domain against all others, or None where there is but one.
        coactivation: pairs of experts against chance, or None where they were not recorded.
        placement: experts on GPUs, or None where they cannot be placed evenly.
        coverage: experts that few tokens reached.
    """

    use: ExpertUse
    phases: PhaseContrast
    domains: tuple[str, ...]
    specialisation: Specialisation | None
    coactivation: Coactivation | None
    placement: HeldOutPlacement | None
    coverage: Coverage


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """One profile's results and where they come from.

    Attributes:
        model_id: name or path of the model.
        architecture: the model's class, as its configuration names it.
        scoring: how the router scores experts, such as `softmax` or `sigmoid`.
        engine: what ran the model, in words: name, device, dtype.
        versions: version of each package that took part.
        created: when the profile was recorded, ISO 8601.
        prompts: prompts run.
        tokens_by_phase: routed tokens of each phase; their sum is the total.
        tokens_by_domain: routed tokens of each domain.
        activations: the recorded measures; the one to be shown first comes first.
        correlation: layer correlation; its `kind` is the measure chosen.
        periodic: periodic patterns of that correlation.
        router_similarity: None where router weights were not read.
        loads: one load a MoE layer, in model order.
        remarks: what a reader of the run should know beside its numbers: what was verified, what was left out.
        correlated: False where correlation and periodic patterns were left out; they are then empty.
        domains: each domain by itself; empty where there is but one.
        sample: the router's distributions for some tokens of one prompt, or None.
        weights: what the experts' weights say, or None where they were not read.
        reliability: how far another run would give the same selection frequencies, or None where it was not computed.
        nulls: layer correlation held against chance, or None where that was left out.
        period: what a scan of all periods found, or None where that was left out.
        used: how experts are used, or None where it was not computed.
        groups: groups of experts that a router first chooses among; 1 where it has none.
    """

    model_id: str
    architecture: str
    scoring: str
    engine: str
    versions: Mapping[str, str]
    created: str
    prompts: int
    tokens_by_phase: Mapping[str, int]
    tokens_by_domain: Mapping[str, int]
    activations: tuple[Activation, ...]
    correlation: LayerCorrelation
    periodic: PeriodicPatterns
    router_similarity: RouterSimilarity | None
    loads: tuple[LayerLoad, ...]
    remarks: tuple[str, ...] = ()
    correlated: bool = True
    domains: tuple[DomainView, ...] = ()
    sample: "TokenSample | None" = None
    weights: WeightSimilarity | None = None
    reliability: Reliability | None = None
    nulls: LayerNulls | None = None
    period: PeriodFinding | None = None
    used: ExpertsUsed | None = None
    groups: int = 1

    @property
    def measure(self) -> Measure:
        """The activation measure behind correlation and periodic patterns."""
        return self.correlation.kind

    @property
    def tokens(self) -> int:
        """Routed tokens in all phases."""
        return sum(self.tokens_by_phase.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """True model indices of the MoE layers."""
        return tuple(load.layer for load in self.loads)

    @property
    def violations(self) -> tuple[int, ...]:
        """Layers whose selections do not sum to k·T, or with an expert selected more often than there were tokens."""
        return tuple(load.layer for load in self.loads if load.tokens != self.tokens or not load.invariant_holds)

    def activation(self, kind: Measure) -> Activation | None:
        """The activation of this measure, or None if it was not recorded."""
        return next((view for view in self.activations if view.kind == kind), None)
