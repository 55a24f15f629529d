"""From profiles to what a comparison shows: the statistics, computed once."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import Activation, Measure
from moescope.stats.comparison import (
    Change,
    Comparison,
    Distances,
    WithinRun,
    all_distances,
    change_tests,
    compare_activations,
    within_run,
)
from moescope.viz.activation import NAMES
from moescope.viz.analysis import activations
from moescope.viz.wording import by_layer, short_name

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile

TOP = 20
"""Experts that moved most to name, by default."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: what it is called in figures and texts.
        model_id: name or path of the model.
        tokens: tokens behind the measure.
        runs: identities of the runs in its profile.
    """

    name: str
    model_id: str
    tokens: int
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ComparedPair:
    """One side against its reference, and how they differ.

    Attributes:
        reference: what `other` is compared with.
        other: the other.
        result: distances and differences.
        change: tests of them over splits of the prompts, or None where the measure has no splits.
    """

    reference: Side
    other: Side
    result: Comparison
    change: Change | None


@dataclass(frozen=True, slots=True, eq=False)
class EveryDistance:
    """Every side against every other.

    Attributes:
        names: N sides.
        between: (N, N, L) distances, symmetric; 0 on the diagonal.
        within: (N, L) distances between halves of each side, NaN where they are not known.
    """

    names: tuple[str, ...]
    between: Distances
    within: Distances


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonData:
    """What a comparison is made of.

    Attributes:
        names: what the profiles are called, the reference first; a single one where its domains are compared.
        subject: the line that says what was compared.
        measure: the activation measure behind all of it.
        domain: the domain that was compared alone, or None.
        by_domain: whether each pair is a domain against the rest of one profile.
        pairs: the comparisons, in the order asked for.
        every: all profiles against each other, or all domains.
        remarks: what a reader should know beside the numbers.
    """

    names: tuple[str, ...]
    subject: str
    measure: Measure
    domain: str | None
    by_domain: bool
    pairs: tuple[ComparedPair, ...]
    every: EveryDistance
    remarks: tuple[str, ...]


def compare_profiles(
    profiles: Sequence["RoutingProfile"],
    names: Sequence[str] | None = None,
    *,
    measure: Measure = "frequency",
    domain: str | None = None,
    by_domain: bool = False,
    top: int = TOP,
    seed: int = 0,
) -> ComparisonData:
    """Compare each profile with the first, or each domain of one profile with the rest of it.

    Layers are matched by their true index in the model, experts by id.

    Args:
        profiles: two or more; with `by_domain` exactly one.
        names: what they are called, one each and all different; by default `profile 1`, `profile 2` …
        measure: what is compared. The level within a run is known for `frequency` alone.
        domain: compare this domain of each profile only.
        by_domain: compare each domain of the one profile with all its other domains together.
        top: experts that moved most to name, at most.
        seed: seed of the random halvings behind the level within a run, and of the noise in the tests.

    Raises:
        ProfileError: The profiles differ in layers or experts; the message says in what.
        ValueError: The number of profiles or names is wrong, or a profile lacks the measure or the domain.
    """
    called = tuple(names) if names is not None else tuple(f"profile {i + 1}" for i in range(len(profiles)))
    _check_request(profiles, called, domain, by_domain)
    for profile, name in zip(profiles[1:], called[1:], strict=True):
        profiles[0].require_same_shape(profile, called[0], name)
    if by_domain:
        (whole,) = profiles
        sides = [
            (
                _Part.of(_rest(whole, own), f"all but {own}", measure, seed),
                _Part.of(_only(whole, own), own, measure, seed),
            )
            for own in whole.domains
        ]
    else:
        parts = []
        for profile, name in zip(profiles, called, strict=True):
            if domain is not None and domain not in profile.domains:
                raise ValueError(
                    f"{name}: domain {domain!r} is not in the profile; it has {', '.join(profile.domains)}"
                )
            chosen = profile if domain is None else _only(profile, domain)
            parts.append(_Part.of(chosen, name, measure, seed))
        sides = [(parts[0], part) for part in parts[1:]]
    pairs = tuple(_compared(one, two, top, seed) for one, two in sides)
    return ComparisonData(
        names=called,
        subject=_subject(profiles[0], called[0], domain, by_domain, pairs),
        measure=measure,
        domain=domain,
        by_domain=by_domain,
        pairs=pairs,
        every=_every([two for _, two in sides] if by_domain else parts),
        remarks=(*_model_remarks(profiles, called), *_noise_remarks(pairs, measure)),
    )


compare = compare_profiles


def layer_p_values(pair: ComparedPair) -> NDArray[np.float64]:
    """(L,) p-value of each layer's distance for all layers together; NaN where it was not tested."""
    return np.full(len(pair.result.layers), np.nan) if pair.change is None else pair.change.layer_p_corrected


def moved_p_values(pair: ComparedPair) -> list[float]:
    """p-value of each expert that moved most for all experts of all layers; NaN where it was not tested."""
    if pair.change is None:
        return [float("nan")] * len(pair.result.moved)
    row = {layer: place for place, layer in enumerate(pair.result.layers)}
    return [float(pair.change.p_corrected[row[move.layer], move.expert]) for move in pair.result.moved]


def ratio_in_words(ratio: float) -> str:
    """After over before, such as `× 2.50`; `new` where there was nothing before."""
    return "new" if math.isinf(ratio) else f"× {ratio:.2f}"


def distinct_names(paths: Sequence[Path], usual: str) -> list[str]:
    """Short names of files, all different: the stem, or the folder of a file with the usual name.

    Files that would be called the same take as many folders more as tell them apart; the same file again is numbered.

    Args:
        paths: the files.
        usual: file name that says nothing, as most have it.
    """
    full = []
    for path in (Path(os.path.abspath(path)) for path in paths):
        full.append(path.parent.parts[1:] + (() if path.name == usual else (path.stem,)) or (path.stem,))
    names: list[str] = []
    for own in full:
        others = [other for other in full if other != own]
        depth = next(depth for depth in count(1) if all(other[-depth:] != own[-depth:] for other in others))
        names.append("/".join(own[-depth:]))
    before = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({again + 1})" if again else name for name, again in zip(names, before, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One side with the arrays that are compared."""

    side: Side
    activation: Activation
    within: WithinRun | None
    profile: "RoutingProfile"

    @classmethod
    def of(cls, profile: "RoutingProfile", name: str, measure: Measure, seed: int) -> "_Part":
        """The measure of a profile and, where splits of it were kept, the level within."""
        views = activations(profile)
        if measure not in views:
            raise ValueError(
                f"{name}: measure {measure!r} was not recorded; the profile has {', '.join(sorted(views))}"
            )
        view = views[measure]
        splits = profile.split_counts.sum(axis=1)
        return cls(
            Side(name, profile.model.id, view.tokens, tuple(run.uuid for run in profile.runs)),
            view,
            within_run(splits, profile.model.experts, seed) if measure == "frequency" else None,
            profile,
        )

    @property
    def splits(self) -> NDArray[np.int64]:
        """Selections (S, L, E) by split of the prompts."""
        counts: NDArray[np.int64] = self.profile.split_counts.sum(axis=1)
        return counts


def _compared(reference: _Part, other: _Part, top: int, seed: int) -> ComparedPair:
    """One side against another; tested where splits of the measure were kept."""
    result = compare_activations(reference.activation, other.activation, reference.within, other.within, top)
    change = None
    if reference.within is not None and other.within is not None:
        paired = _same_splits(reference.profile, other.profile)
        change = change_tests(reference.splits, other.splits, result.experts, paired=paired, seed=seed)
    return ComparedPair(reference.side, other.side, result, change)


def _every(parts: Sequence[_Part]) -> EveryDistance:
    """All sides against each other, and the level within each."""
    experts = parts[0].activation.experts
    unknown = np.full(len(experts), np.nan)
    levels = [Distances(unknown, unknown) if part.within is None else part.within.distances for part in parts]
    return EveryDistance(
        names=tuple(part.side.name for part in parts),
        between=all_distances([part.activation.matrix for part in parts], experts),
        within=Distances(
            np.stack([level.jensen_shannon for level in levels]), np.stack([level.total_variation for level in levels])
        ),
    )


def _same_splits(one: "RoutingProfile", two: "RoutingProfile") -> bool:
    """Whether both ran the same prompts, dealt into the same splits: by the same seed."""
    return _same_prompts(one, two) and _seeds(one) == _seeds(two) and one.complete and two.complete


def _seeds(profile: "RoutingProfile") -> list[tuple[str, Any]]:
    return sorted((run.prompts_sha256, run.settings.get("seed")) for run in profile.runs)


def _check_request(
    profiles: Sequence["RoutingProfile"], names: tuple[str, ...], domain: str | None, by_domain: bool
) -> None:
    """Refuse what cannot be compared before anything is computed."""
    if by_domain and domain is not None:
        raise ValueError("a single domain and every domain in turn cannot both be asked for")
    if by_domain and len(profiles) != 1:
        raise ValueError(f"domains are compared within one profile, got {len(profiles)}; merge them first")
    if not by_domain and len(profiles) < 2:
        raise ValueError(f"a comparison needs two profiles or more, got {len(profiles)}")
    if len(names) != len(profiles):
        raise ValueError(f"got {len(names)} names for {len(profiles)} profiles")
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"names must be distinct and not empty, got {', '.join(map(repr, names))}")
    if by_domain and len(profiles[0].domains) < 2:
        raise ValueError(f"{names[0]}: it has one domain only ({profiles[0].domains[0]}); there is no rest to compare")


def _only(profile: "RoutingProfile", domain: str) -> "RoutingProfile":
    """The profile of one domain."""
    return _domain_part(profile, domain, rest=False)


def _rest(profile: "RoutingProfile", domain: str) -> "RoutingProfile":
    """The profile of all domains but one, added up."""
    return _domain_part(profile, domain, rest=True)


def _domain_part(profile: "RoutingProfile", domain: str, *, rest: bool) -> "RoutingProfile":
    """One domain, or the sum of the others under one name; sums of a profile are exact, so differences are too."""
    at = profile.domains.index(domain)

    def part(array: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        own: NDArray[Any] = array.take([at], axis=axis)
        return array.sum(axis=axis, keepdims=True) - own if rest else own

    return replace(
        profile,
        domains=(f"all but {domain}" if rest else domain,),
        selection_counts=part(profile.selection_counts),
        weight_sums=part(profile.weight_sums),
        token_counts=part(profile.token_counts),
        split_counts=part(profile.split_counts, axis=1),
        probability_sums=None if profile.probability_sums is None else part(profile.probability_sums),
        probability_tokens=None if profile.probability_tokens is None else part(profile.probability_tokens),
        coactivation=None,
    )


def _subject(
    profile: "RoutingProfile", name: str, domain: str | None, by_domain: bool, pairs: tuple[ComparedPair, ...]
) -> str:
    """The line that says what was compared."""
    model = profile.model
    experts = by_layer(model.experts, model.layer_indices)
    against = (
        f"each domain against the rest of {name}"
        if by_domain
        else f"reference {name}, {pairs[0].reference.tokens:,} tokens"
    )
    only = f" · domain {domain}" if domain is not None else ""
    return f"{short_name(model.id)} · {len(model.layers)} MoE layers · {experts} experts{only} · {against}"


def _model_remarks(profiles: Sequence["RoutingProfile"], names: tuple[str, ...]) -> list[str]:
    """What differs between the profiles that may still be compared, and what they share that they should not."""
    remarks = [f"{name} holds an interrupted run" for p, name in zip(profiles, names, strict=True) if not p.complete]
    first, one = profiles[0], profiles[0].model
    for profile, name in zip(profiles[1:], names[1:], strict=True):
        two = profile.model
        known = one.fingerprint is not None and two.fingerprint is not None
        same = known and one.fingerprint == two.fingerprint
        if one.id != two.id:
            remarks.append(
                f"different models: {names[0]} is {one.id}, {name} is {two.id}; "
                + (
                    "their router weights are the same"
                    if same
                    else "experts are matched by id, which means something only where one was made from the other"
                )
            )
        elif known and not same:
            remarks.append(f"{names[0]} and {name} have different router weights")
        if one.scoring != two.scoring:
            remarks.append(f"routers score differently: {one.scoring} in {names[0]}, {two.scoring} in {name}")
        if one.top_k != two.top_k:
            left, right = (by_layer(model.top_k, model.layer_indices) for model in (one, two))
            remarks.append(f"top-k differs: {left} in {names[0]}, {right} in {name}; shares of the selections compare")
        shared = {run.uuid for run in first.runs} & {run.uuid for run in profile.runs}
        if shared:
            remarks.append(
                f"{names[0]} and {name} share {len(shared)} {'run' if len(shared) == 1 else 'runs'}: they lie closer "
                "together than separate runs would"
            )
        elif _same_prompts(first, profile):
            tested = "; the tests take this into account" if _same_splits(first, profile) else ""
            remarks.append(
                f"{names[0]} and {name} ran the same prompts: their draw adds nothing to this distance, and the noise "
                f"is overstated{tested}"
            )
    return remarks


def _same_prompts(one: "RoutingProfile", two: "RoutingProfile") -> bool:
    """Whether the runs of two profiles had the same prompts, in any order; of a server's runs nobody knows."""
    prompts = [sorted(run.prompts_sha256 for run in profile.runs) for profile in (one, two)]
    return prompts[0] == prompts[1] and all(prompts[0])


def _noise_remarks(pairs: tuple[ComparedPair, ...], measure: Measure) -> list[str]:
    """Why a level of noise, or everything, is missing."""
    sides = {side.name: side for pair in pairs for side in (pair.reference, pair.other)}
    remarks = [f"{side.name}: no tokens were recorded for this" for side in sides.values() if not side.tokens]
    if measure != "frequency":
        remarks.append(f"the level within a run is not known for {NAMES[measure]}: splits keep selections alone")
    levels = {
        side.name: level
        for pair in pairs
        for side, level in (
            (pair.reference, pair.result.within_reference),
            (pair.other, pair.result.within_other),
        )
        if level is not None
    }
    for name, level in levels.items():
        if sides[name].tokens and level.splits < 2:
            remarks.append(f"{name}: all prompts lie in one split, so the level within it is not known")
    return remarks
