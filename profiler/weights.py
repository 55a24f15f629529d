"""From the files of a checkpoint, or of two, to sums from which similarity is computed."""

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope import __version__
from moescope.profiler.errors import ModelError, OptionError
from moescope.profiler.fingerprint import router_fingerprint
from moescope.profiler.run import timestamp
from moescope.profiler.sidecars import choose_layers
from moescope.profiler.weight_files import WeightRecord, WeightRun
from moescope.profiler.weight_pass import Keeper, PassProgress, PassSettings, run_pass
from moescope.profiler.weight_slabs import WeightSource
from moescope.profiler.weight_sums import mirrored

#: Pairs of layers whose experts are matched all against all, at most.
MATCH_PAIRS: Final = 12
_EXPERTS_AT_ONCE: Final = 16


def weigh(
    source: WeightSource,
    deltas: Sequence[int],
    *,
    against: WeightSource | None = None,
    only_deltas: bool = False,
    match_pairs: int = MATCH_PAIRS,
    sketch: bool = False,
    device: str = "cpu",
    n_jobs: int | None = None,
    keeper: Keeper | None = None,
    on_progress: Callable[[PassProgress], None] | None = None,
) -> WeightRecord:
    """Sum over routers and experts in one pass; every byte of an expert is read once.

    Args:
        source: The checkpoint.
        deltas: Distances of layers that are shown by themselves, and at which experts are matched all against all.
        against: Another checkpoint of the same layers and shape: each expert is held against the same one there.
        only_deltas: Compare layers at `deltas` alone instead of all with all.
        match_pairs: Pairs of layers to match at most; 0 for none.
        sketch: Read a sample of the weights.
        device: "cpu" or a CUDA device.
        n_jobs: Threads; all cores by default.
        keeper: Where unfinished sums are kept, and taken up from.
        on_progress: Called after each block.

    Raises:
        ModelError: A file cannot be read, there is nothing to compare, or the two checkpoints differ in shape.
        OptionError: No two layers lie one of `deltas` apart.
        KeyboardInterrupt: The pass was interrupted; what was done has been kept.
    """
    sources = [source] if against is None else [source, against]
    if against is None:
        _check_deltas(source, deltas)
        pairs = choose_pairs(source.layers, deltas, match_pairs)
    else:
        _check_alike(source, against)
        pairs = [(source.layers[i],) * 2 for i in choose_layers(len(source.layers), match_pairs)]
    settings = PassSettings(tuple(deltas), not only_deltas, tuple(pairs), sketch)
    routers: dict[str, Any] = _router_tables(source) if against is None else _router_products(source, against)
    result = run_pass(sources, settings, device=device, n_jobs=n_jobs, keeper=keeper, on_progress=on_progress)
    run = WeightRun(
        model=source.model,
        against=None if against is None else against.model,
        architecture=source.architecture,
        layers=source.layers,
        experts=source.experts,
        hidden=source.hidden,
        width=source.width,
        dtypes=source.dtypes,
        deltas=() if against is not None else tuple(deltas),
        all_pairs=not only_deltas,
        pairs=tuple(pairs),
        coordinates=result.coordinates,
        coordinates_total=3 * source.hidden * source.width,
        bytes_read=result.bytes_read,
        bytes_total=sum(each.bytes_total for each in sources),
        engine=result.engine,
        seconds=result.seconds,
        versions={"moescope": __version__, "torch": version("torch"), "python": platform.python_version()},
        created=timestamp(),
        fingerprint=router_fingerprint(map(source.router, source.layers)),
    )
    whole = ("raw", "centred", "means", "within")
    sums: dict[str, Any] = {
        name: (mirrored(tensor) if name in whole else tensor).numpy()
        for name, tensor in result.state.items()
        if name != "zero" and not name.startswith("projected")
    }
    return WeightRecord(run, **sums, **routers)


def default_deltas(layers: Sequence[int]) -> tuple[int, ...]:
    """Distances worth a look in a model of this depth: 1, and those at which a report looks for periods by default.

    These are 12, 24 and 36 where two pairs of layers span them, and the shortest twelve there are in a shallower model.
    """
    apart = Counter(later - earlier for earlier in layers for later in layers if later > earlier)
    usual = [delta for delta in (12, 24, 36) if apart[delta] >= 2]
    return tuple(sorted({1} & set(apart) | set(usual or sorted(apart)[:12])))


def choose_pairs(layers: Sequence[int], deltas: Sequence[int], most: int) -> list[tuple[int, int]]:
    """At most `most` pairs of layers, spread evenly over `deltas` and, at each, over the depth of the model."""
    present = set(layers)
    candidates = [[(layer, layer + delta) for layer in layers if layer + delta in present] for delta in deltas]
    shares = [0] * len(candidates)
    while sum(shares) < most:
        open_deltas = [i for i, found in enumerate(candidates) if shares[i] < len(found)]
        if not open_deltas:
            break
        shares[min(open_deltas, key=lambda i: shares[i])] += 1
    chosen = (
        found[place]
        for found, share in zip(candidates, shares, strict=True)
        for place in choose_layers(len(found), share)
    )
    return sorted(set(chosen))


def _check_deltas(source: WeightSource, deltas: Sequence[int]) -> None:
    layers = source.layers
    if len(layers) < 2:
        raise ModelError(
            f"{source.model}: layer {layers[0]} is the only one that routes, or was chosen; there is nothing to compare"
            f" it with but another checkpoint (--against)"
        )
    for delta in deltas:
        if not any(layer + delta in layers for layer in layers):
            raise OptionError(
                f"--delta {delta}: no two of the layers of {source.model} lie so far apart;"
                f" they are {layers[0]} to {layers[-1]}"
            )


def _check_alike(source: WeightSource, against: WeightSource) -> None:
    names = {"layers": "MoE layers", "experts": "experts a layer", "hidden": "hidden size", "width": "expert width"}
    for name, what in names.items():
        own, other = getattr(source, name), getattr(against, name)
        if own != other:
            here, there = (
                f"{len(value)} ({value[0]}–{value[-1]})" if isinstance(value, tuple) else value
                for value in (own, other)
            )
            raise ModelError(
                f"{against.model} cannot be held against {source.model}: {what} {there} there, {here} here;"
                f" two checkpoints of one shape are needed"
            )


def _router_tables(source: WeightSource) -> dict[str, NDArray[np.float64]]:
    """Cosine of whole routers (L, L), lengths of rows (L, E), and mean cosine of the same expert's rows (L, L)."""
    stack = np.stack([source.router(layer).numpy() for layer in source.layers])
    depth, experts, _ = stack.shape
    whole, unit = np.zeros((2, depth, depth))
    norms = np.empty((depth, experts))
    for start in range(0, experts, _EXPERTS_AT_ONCE):
        rows = stack[:, start : start + _EXPERTS_AT_ONCE].astype(np.float64)
        length = norms[:, start : start + _EXPERTS_AT_ONCE] = np.sqrt(np.einsum("leh,leh->le", rows, rows))
        rows[~np.isfinite(length)] = 0.0
        flat = rows.reshape(depth, -1)
        whole += flat @ flat.T
        usable = np.isfinite(length) & (length > 0)
        rows /= np.where(usable, length, 1.0)[:, :, None]
        unit += flat @ flat.T
    finite = np.isfinite(norms)
    usable = finite & (norms > 0)
    size = np.sqrt(np.diagonal(whole))
    size = np.where(finite.all(axis=1) & (size > 0), size, np.nan)
    shared = usable.astype(np.float64) @ usable.T
    return {
        "router_cosine": np.clip(whole / np.outer(size, size), -1.0, 1.0),
        "router_norms": norms,
        "router_row_cosine": np.clip(unit / np.where(shared > 0, shared, np.nan), -1.0, 1.0),
    }


def _router_products(source: WeightSource, against: WeightSource) -> dict[str, NDArray[np.float64]]:
    """(4, L, E): ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ and ‖a − b‖² of router rows."""
    found = []
    for layer in source.layers:
        a, b = (each.router(layer).numpy().astype(np.float64) for each in (source, against))
        found.append([(left * right).sum(axis=1) for left, right in ((a, a), (a, b), (b, b), (a - b, a - b))])
    return {"router_products": np.stack(found, axis=1)}
