"""`RoutingProfile`: what every engine hands over and every statistic reads."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moescope import __version__
from moescope.profiler.errors import InvariantError, ProfileError
from moescope.profiler.tokens import MAX_DOMAINS, SPLITS

FORMAT_VERSION: Final = 1
PHASES: Final = ("prefill", "decode")
#: Fractional bits of the fixed-point sums: half a unit is float32's own rounding of a weight near 1.
FIXED_POINT_BITS: Final = 24

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One array of a profile, declared once: allocation, checks, merging and the file all read this.

    Attributes:
        name: Field of `RoutingProfile` and tensor name in the file.
        axes: One letter an axis: D domains, P phases, L layers, E experts, S splits.
        fixed_point: True if the array holds multiples of 2**-24 (float64), False if it holds counts (int64).
        optional: May be absent; what an absent array means in a merge is said by `absent`.
        absent: "zero" if a profile without it adds nothing, "drop" if the merged profile then has none.
    """

    name: str
    axes: str
    fixed_point: bool = False
    optional: bool = False
    absent: Literal["zero", "drop"] = "zero"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy dtype of the array in the profile and in the file."""
        return np.dtype(np.float64 if self.fixed_point else np.int64)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the array for the given size of each axis letter."""
        return tuple(sizes[axis] for axis in self.axes)


#: Every array of a profile. All of them merge by addition; a domain axis is first aligned by name.
BUFFERS: Final = (
    Buffer("selection_counts", "DPLE"),
    Buffer("weight_sums", "DPLE", fixed_point=True),
    Buffer("token_counts", "DP"),
    Buffer("split_counts", "SDLE"),
    Buffer("probability_sums", "DPLE", fixed_point=True, optional=True),
    Buffer("probability_tokens", "DP", optional=True),
    Buffer("coactivation", "LEE", optional=True, absent="drop"),
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One MoE layer.

    Attributes:
        index: True index of the layer in the model (dense layers keep their numbers).
        experts: Number of routed experts E.
        top_k: Experts a token is sent to, k.
    """

    index: int
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model a profile belongs to.

    Attributes:
        id: Hub id or path, as the user gave it.
        architecture: Class name of the model, e.g. "Qwen3MoeForCausalLM".
        scoring: The router's scoring function over all experts.
        layers: MoE layers in model order.
        fingerprint: sha256 over the router weights cast to bfloat16, in layer order; None if unknown.
        groups: Groups of neighbouring experts, of equal size, that a router first chooses among (`n_group`); 1 where it
            chooses among all experts at once.
    """

    id: str
    architecture: str
    scoring: Scoring
    layers: tuple[LayerInfo, ...]
    fingerprint: str | None = None
    groups: int = 1

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """True layer indices, in model order."""
        return tuple(layer.index for layer in self.layers)

    @property
    def experts(self) -> tuple[int, ...]:
        """Routed experts of each layer."""
        return tuple(layer.experts for layer in self.layers)

    @property
    def top_k(self) -> tuple[int, ...]:
        """Experts a token of each layer."""
        return tuple(layer.top_k for layer in self.layers)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine that routed the tokens, with the options that could change its routing."""

    name: str
    version: str
    device: str
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Provenance of one run.

    Attributes:
        uuid: Identity of the run; merging the same run twice is refused by it.
        created: Start of the run, ISO 8601, UTC.
        engine: The engine that ran.
        prompts: Prompts counted in this profile.
        prompts_total: Prompts of the whole set.
        prompts_sha256: sha256 over the token ids of the whole set.
        settings: What the run was asked for, JSON types only.
        batches: Batches drained so far; a resumed run skips as many.
        complete: False in what an interrupted run leaves behind.
    """

    uuid: str
    created: str
    engine: EngineInfo
    prompts: int
    prompts_total: int
    prompts_sha256: str
    settings: Mapping[str, Any]
    batches: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class RoutingProfile:
    """Which experts were chosen, by domain, phase and layer; the hand-over from engines to statistics.

    D domains, P = 2 phases (prefill, decode), L MoE layers, E experts (padded with zeros where layers differ),
    S = 16 splits of the prompts. Construction does not check the arrays; `check` does, and every load and save calls
    it.

    Attributes:
        model: The model, with its layers.
        domains: Domain names, sorted.
        runs: One entry a run, in order of creation.
        created: When the newest run in it began, ISO 8601, UTC.
        selection_counts: int64 [D,P,L,E], times an expert was among a token's top-k.
        weight_sums: float64 [D,P,L,E], sum of routing weights as applied, before `routed_scaling_factor`.
        token_counts: int64 [D,P], tokens routed, from the requests' own lengths.
        split_counts: int64 [S,D,L,E], `selection_counts` by split of the prompts.
        probability_sums: float64 [D,P,L,E] or None, sum of the router's full distribution.
        probability_tokens: int64 [D,P] or None, tokens behind `probability_sums`.
        coactivation: int64 [L,E,E] or None, tokens that chose both; the diagonal is the selection counts.
        version: Version of moescope that wrote it.
    """

    model: ModelInfo
    domains: tuple[str, ...]
    runs: tuple[RunInfo, ...]
    created: str
    selection_counts: NDArray[np.int64]
    weight_sums: NDArray[np.float64]
    token_counts: NDArray[np.int64]
    split_counts: NDArray[np.int64]
    probability_sums: NDArray[np.float64] | None = None
    probability_tokens: NDArray[np.int64] | None = None
    coactivation: NDArray[np.int64] | None = None
    version: str = ""

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases, in the order of the phase axis."""
        return PHASES

    @property
    def tokens(self) -> int:
        """Tokens routed, over all domains and phases."""
        return int(self.token_counts.sum())

    @property
    def complete(self) -> bool:
        """Whether every run in it went through its whole prompt set."""
        return all(run.complete for run in self.runs)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are present, by name, in the order of `BUFFERS`."""
        found = {buffer.name: getattr(self, buffer.name) for buffer in BUFFERS}
        return {name: array for name, array in found.items() if array is not None}

    def check(self) -> None:
        """Assert that shapes fit, that nothing is negative or not a number, and that the counts add up.

        In each layer, domain and phase the selections sum to k·T and no expert exceeds T.

        Raises:
            ProfileError: A tensor is missing or has the wrong shape or dtype.
            InvariantError: Counts do not add up; the message names the layer.
        """
        check_arrays(self.model, self.domains, self.arrays())

    def merge(self, *others: "RoutingProfile") -> "RoutingProfile":
        """This profile and `others`, added up; see `merge`."""
        return merge([self, *others])

    def require_same_shape(self, other: "RoutingProfile", name: str, other_name: str) -> None:
        """Refuse `other` unless it has the same MoE layers with as many experts each; k and weights may differ.

        Args:
            other: The profile to be compared with this one.
            name: What the message calls this profile.
            other_name: What the message calls `other`.

        Raises:
            ProfileError: Naming both shapes and the first difference.
        """
        one, two = self.model, other.model
        if one.layer_indices == two.layer_indices and one.experts == two.experts:
            return
        if len(one.layers) != len(two.layers):
            why = "the numbers of MoE layers differ"
        elif one.layer_indices != two.layer_indices:
            left, right = next((a, b) for a, b in zip(one.layer_indices, two.layer_indices, strict=True) if a != b)
            why = f"MoE layers have different indices in the model, first {left} and {right}"
        else:
            layer, left, right = next(
                (a.index, a.experts, b.experts)
                for a, b in zip(one.layers, two.layers, strict=True)
                if a.experts != b.experts
            )
            why = f"layer {layer} has {left} experts in one and {right} in the other"
        raise ProfileError(
            f"cannot compare {name} ({_shape_in_words(one)}) with {other_name} ({_shape_in_words(two)}): {why}"
        )

    @classmethod
    def load(cls, path: str) -> "RoutingProfile":
        """Read and check a profile file; see `moescope.profiler.files.load_profile`."""
        from moescope.profiler.files import load_profile

        return load_profile(path)

    @classmethod
    def from_trace(cls, folder: str) -> "RoutingProfile":
        """Count the tokens of a trace; see `moescope.profiler.trace.Trace.profile`."""
        from moescope.profiler.trace import Trace

        return Trace(folder).profile()

    def save(self, path: str) -> None:
        """Check and write a profile file; see `moescope.profiler.files.save_profile`."""
        from moescope.profiler.files import save_profile

        save_profile(self, path)


def _shape_in_words(model: ModelInfo) -> str:
    """Layers and experts, e.g. `48 layers × 128 experts`; `6-8` where layers differ."""
    fewest, most = min(model.experts), max(model.experts)
    return f"{len(model.layers)} layers × {most if fewest == most else f'{fewest}-{most}'} experts"


def axis_sizes(model: ModelInfo, domains: Sequence[str]) -> dict[str, int]:
    """Size of each axis letter of `BUFFERS` for a model and its domains."""
    return {
        "D": len(domains),
        "P": len(PHASES),
        "L": len(model.layers),
        "E": max((layer.experts for layer in model.layers), default=0),
        "S": SPLITS,
    }


def check_arrays(model: ModelInfo, domains: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Assert shapes, dtypes and the counting invariant on the arrays of a profile.

    Raises:
        ProfileError: A tensor is missing or has the wrong shape or dtype, or the description does not fit.
        InvariantError: Counts do not add up; the message names the layer.
    """
    _check_description(model, domains)
    sizes = axis_sizes(model, domains)
    for buffer in BUFFERS:
        array = arrays.get(buffer.name)
        if array is None:
            if not buffer.optional:
                raise ProfileError(f"tensor {buffer.name!r} is missing")
            continue
        if array.dtype != buffer.dtype or array.shape != buffer.shape(sizes):
            raise ProfileError(
                f"tensor {buffer.name!r} is {array.dtype} {list(array.shape)}; "
                f"expected {buffer.dtype} {list(buffer.shape(sizes))}"
            )
        if not np.isfinite(array).all():
            raise InvariantError(f"tensor {buffer.name!r} holds values that are not finite")
        if array.size and array.min() < 0:
            raise InvariantError(f"tensor {buffer.name!r} holds negative values")
        if not buffer.fixed_point and array.max(initial=0) >= 2**53:
            raise InvariantError(f"tensor {buffer.name!r} holds counts beyond 2**53")
        if buffer.fixed_point:
            units = np.ldexp(np.minimum(array, 2.0**53), FIXED_POINT_BITS)
            if (units != np.rint(units)).any() or units.max(initial=0) >= 2**53:
                raise InvariantError(f"tensor {buffer.name!r} holds values that are not sums in units of 2**-24")
    if ("probability_sums" in arrays) != ("probability_tokens" in arrays):
        raise ProfileError("probability_sums and probability_tokens belong together; one of them is missing")

    counts, tokens, split = arrays["selection_counts"], arrays["token_counts"], arrays["split_counts"]
    for slot, layer in enumerate(model.layers):
        check_layer(layer, counts[:, :, slot, :], tokens)
        if not np.array_equal(split[:, :, slot, :].sum(axis=0), counts[:, :, slot, :].sum(axis=1)):
            raise InvariantError(f"layer {layer.index}: split_counts do not sum to selection_counts")
        if (arrays["weight_sums"][:, :, slot, :][counts[:, :, slot, :] == 0] != 0).any():
            raise InvariantError(f"layer {layer.index}: an expert has weight but was never selected")
    if "probability_sums" in arrays:
        _check_probabilities(model, arrays)
    if "coactivation" in arrays:
        _check_coactivation(model, arrays)


def check_layer(layer: LayerInfo, counts: NDArray[np.int64], tokens: NDArray[np.int64], what: str = "") -> None:
    """Assert the invariant in one layer: selections sum to k·T and no expert exceeds T.

    Args:
        layer: The layer, with its experts E and k.
        counts: int64 [..., E'] with E' >= E, selections by expert; the padding past E must be zero.
        tokens: int64 [...], tokens T from the requests' own lengths.
        what: Words put before the message, e.g. the batch.

    Raises:
        InvariantError: Naming the layer and both sides.
    """
    where = f"{what}layer {layer.index}: "
    expected = tokens * layer.top_k
    found = counts.sum(axis=-1)
    if not np.array_equal(found, expected):
        raise InvariantError(
            f"{where}selections sum to {int(found.sum()):,}, but k·T = {layer.top_k}·{int(tokens.sum()):,} = "
            f"{int(expected.sum()):,}"
            + ("" if found.sum() != expected.sum() else " (the total fits, its parts by domain and phase do not)")
        )
    if counts[..., layer.experts :].any():
        raise InvariantError(f"{where}an expert id at or beyond E = {layer.experts} was counted")
    if (counts > tokens[..., None]).any():
        raise InvariantError(f"{where}an expert was counted more often than there are tokens")


def _check_description(model: ModelInfo, domains: Sequence[str]) -> None:
    indices = model.layer_indices
    if not indices:
        raise ProfileError("the profile names no MoE layers")
    if list(indices) != sorted(set(indices)) or indices[0] < 0:
        raise ProfileError("layer indices must be distinct, non-negative and in order")
    if any(not 1 <= layer.top_k <= layer.experts for layer in model.layers):
        raise ProfileError("a layer's top_k must lie between 1 and its number of experts")
    if model.groups < 1 or any(layer.experts % model.groups for layer in model.layers):
        raise ProfileError(f"a router's groups must divide the experts of every layer; {model.groups} do not")
    if not 1 <= len(domains) <= MAX_DOMAINS:
        raise ProfileError(f"a profile has 1 to {MAX_DOMAINS} domains, not {len(domains)}")
    if list(domains) != sorted(set(domains)):
        raise ProfileError("domain names must be distinct and sorted")


def _check_probabilities(model: ModelInfo, arrays: Mapping[str, NDArray[Any]]) -> None:
    sums, tokens = arrays["probability_sums"], arrays["probability_tokens"]
    if (tokens > arrays["token_counts"]).any():
        raise InvariantError("probability_tokens exceed token_counts")
    # each of E entries a token is rounded to 2**-24, and float32 distributions sum to 1 within about 1e-6
    tolerance = 1e-5 + sums.shape[-1] * 2.0**-FIXED_POINT_BITS
    for slot, layer in enumerate(model.layers):
        if sums[:, :, slot, layer.experts :].any():
            raise InvariantError(f"layer {layer.index}: an expert at or beyond E = {layer.experts} has probability")
    off = np.abs(sums.sum(axis=-1) - tokens[..., None]) > tolerance * np.maximum(tokens[..., None], 1)
    if off.any():
        layer = model.layers[int(np.argwhere(off)[0, -1])]
        raise InvariantError(f"layer {layer.index}: router probabilities do not sum to 1 a token")


def _check_coactivation(model: ModelInfo, arrays: Mapping[str, NDArray[Any]]) -> None:
    chosen = arrays["selection_counts"].sum(axis=(0, 1))
    for slot, layer in enumerate(model.layers):
        pairs = arrays["coactivation"][slot]
        if not np.array_equal(pairs, pairs.T) or not np.array_equal(np.diagonal(pairs), chosen[slot]):
            raise InvariantError(
                f"layer {layer.index}: coactivation is not symmetric or its diagonal is not the counts"
            )
        if not np.array_equal(pairs.sum(axis=1), layer.top_k * chosen[slot]):
            raise InvariantError(f"layer {layer.index}: coactivation rows do not sum to k times the counts")


def merge(profiles: Iterable[RoutingProfile]) -> RoutingProfile:
    """Add up profiles of one model; the result is the same, to the bit, in any order.

    Domains are matched by name. A profile without `probability_sums` adds none; `coactivation` is kept only if all
    have it.

    Args:
        profiles: At least one profile.

    Returns:
        One profile whose `runs` are the runs of all, by creation.

    Raises:
        ProfileError: No profile, different models, the same run twice, or more than 64 domains.
    """
    parts = list(profiles)
    if not parts:
        raise ProfileError("nothing to merge")
    first = parts[0].model
    for one, other in itertools.combinations(parts, 2):
        _require_same_model(one.model, other.model)
    runs = sorted((run for part in parts for run in part.runs), key=lambda run: (run.created, run.uuid))
    for before, after in zip(sorted(r.uuid for r in runs), sorted(r.uuid for r in runs)[1:], strict=False):
        if before == after:
            raise ProfileError(f"run {after} is in more than one of the profiles; a run can be counted only once")
    domains = tuple(sorted({domain for part in parts for domain in part.domains}))
    if len(domains) > MAX_DOMAINS:
        raise ProfileError(f"together the profiles have {len(domains)} domains; at most {MAX_DOMAINS} fit into one")

    sizes = axis_sizes(first, domains)
    merged: dict[str, Any] = {}
    for buffer in BUFFERS:
        present = [(part, array) for part in parts if (array := getattr(part, buffer.name)) is not None]
        if not present or (buffer.absent == "drop" and len(present) < len(parts)):
            merged[buffer.name] = None
            continue
        total = np.zeros(buffer.shape(sizes), buffer.dtype)
        for part, array in present:
            if "D" in buffer.axes:
                where = [domains.index(domain) for domain in part.domains]
                total[(slice(None),) * buffer.axes.index("D") + (where,)] += array
            else:
                total += array
        merged[buffer.name] = total
    result = replace(
        parts[0],
        model=replace(first, id=min(part.model.id for part in parts), fingerprint=_common_fingerprint(parts)),
        domains=domains,
        runs=tuple(runs),
        created=max(part.created for part in parts),
        version=__version__,
        **merged,
    )
    result.check()
    return result


def _common_fingerprint(parts: Sequence[RoutingProfile]) -> str | None:
    return next((part.model.fingerprint for part in parts if part.model.fingerprint), None)


def _require_same_model(one: ModelInfo, two: ModelInfo) -> None:
    for name in ("architecture", "scoring", "layers", "groups", "fingerprint"):
        left, right = getattr(one, name), getattr(two, name)
        if name == "fingerprint" and (left is None or right is None):
            name, left, right = "id", one.id, two.id
        if left != right:
            what = {"layers": "MoE layers", "groups": "router groups", "fingerprint": "router weights"}.get(name, name)
            shown = "" if name in ("layers", "fingerprint") else f" ({left!r} and {right!r})"
            raise ProfileError(
                f"profiles of different models cannot be merged: {one.id} and {two.id}: {what} differ{shown}"
            )


def header(profile: RoutingProfile) -> str:
    """The JSON text stored under the metadata key `moescope` of the file; keys are sorted, no NaN."""
    model = profile.model
    return json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "model": {
                "id": model.id,
                "architecture": model.architecture,
                "scoring": model.scoring,
                "fingerprint": model.fingerprint,
                "groups": model.groups,
                "layers": [{"index": i.index, "experts": i.experts, "top_k": i.top_k} for i in model.layers],
            },
            "domains": list(profile.domains),
            "phases": list(PHASES),
            "created": profile.created,
            "moescope_version": profile.version,
            "runs": [
                {
                    "uuid": run.uuid,
                    "created": run.created,
                    "engine": {
                        "name": run.engine.name,
                        "version": run.engine.version,
                        "device": run.engine.device,
                        "dtype": run.engine.dtype,
                        "options": dict(run.engine.options),
                    },
                    "prompts": run.prompts,
                    "prompts_total": run.prompts_total,
                    "prompts_sha256": run.prompts_sha256,
                    "settings": dict(run.settings),
                    "batches": run.batches,
                    "complete": run.complete,
                }
                for run in profile.runs
            ],
        },
        sort_keys=True,
        allow_nan=False,
        ensure_ascii=False,
    )


def parse_header(text: str) -> dict[str, Any]:
    """Fields of `RoutingProfile` from the JSON text of a file's header: all but the arrays.

    Raises:
        ProfileError: Not JSON, written in a newer format, or a field is missing or of the wrong type.
    """
    try:
        data = json.loads(text)
        version = data["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProfileError("its header is not a moescope header") from error
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ProfileError(
            f"it was written in format {version!r}; this moescope reads up to {FORMAT_VERSION}: upgrade moescope"
        )
    try:
        model = data["model"]
        if model["scoring"] not in ("softmax", "sigmoid") or tuple(data["phases"]) != PHASES:
            raise ValueError(f"scoring {model['scoring']!r}, phases {data['phases']!r}")
        return {
            "model": ModelInfo(
                str(model["id"]),
                str(model["architecture"]),
                model["scoring"],
                tuple(LayerInfo(int(i["index"]), int(i["experts"]), int(i["top_k"])) for i in model["layers"]),
                model.get("fingerprint"),
                int(model.get("groups", 1)),  # files of before it was kept have none
            ),
            "domains": tuple(str(domain) for domain in data["domains"]),
            "created": str(data["created"]),
            "version": str(data["moescope_version"]),
            "runs": tuple(_parse_run(run) for run in data["runs"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ProfileError(f"its header is damaged ({error})") from error


def _parse_run(run: Mapping[str, Any]) -> RunInfo:
    engine = run["engine"]
    return RunInfo(
        uuid=str(run["uuid"]),
        created=str(run["created"]),
        engine=EngineInfo(
            str(engine["name"]),
            str(engine["version"]),
            str(engine["device"]),
            str(engine["dtype"]),
            dict(engine["options"]),
        ),
        prompts=int(run["prompts"]),
        prompts_total=int(run["prompts_total"]),
        prompts_sha256=str(run["prompts_sha256"]),
        settings=dict(run["settings"]),
        batches=int(run["batches"]),
        complete=bool(run["complete"]),
    )
