"""What lies beside a profile in a run's folder for the report alone: a look at some tokens, and routers compared."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moescope.profiler.errors import ProfileError
from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, WEIGHTS_NAME, write_tensors
from moescope.profiler.profile import ModelInfo

SAMPLE_NAME: Final = "token_sample.safetensors"
ROUTERS_NAME: Final = "router_similarity.safetensors"
#: A page on the tokens of the run's trace.
TRACE_VIEW_NAME: Final = "trace_view.html"
#: Tokens and layers that a sample holds at most.
SAMPLE_TOKENS: Final = 50
SAMPLE_LAYERS: Final = 10

_KEY: Final = "moescope_beside"
_LARGEST_HEADER: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenSample:
    """The router's full distribution for the first tokens of one prompt; not counted, for looking at.

    Attributes:
        layers: (S,) true model indices, evenly spaced, the last MoE layer included.
        experts: (S,) routed experts of each.
        token_ids: int32 (T,), T at most 50.
        texts: (T,) each token as text; empty where there is no tokenizer.
        probabilities: float32 (S, T, E), zero-padded; each row sums to 1 over a layer's experts.
        fingerprint: Of the model's routers; see `ModelInfo`.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    token_ids: NDArray[np.int32]
    texts: tuple[str, ...]
    probabilities: NDArray[np.float32]
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RouterTables:
    """Router weights of all layers compared with one another.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts of each.
        cosine: float64 (L, L), cosine of the flattened weights; NaN where they cannot be compared.
        row_norms: float64 (L, E), length of each expert's row; padding is NaN.
        row_cosine: float64 (L, L), mean over experts of the cosine between the same expert's rows.
        fingerprint: Of the model's routers; see `ModelInfo`.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    cosine: NDArray[np.float64]
    row_norms: NDArray[np.float64]
    row_cosine: NDArray[np.float64]
    fingerprint: str | None = None


def choose_layers(layers: int, most: int = SAMPLE_LAYERS) -> list[int]:
    """Positions of at most `most` of `layers` layers, evenly spaced, first and last included."""
    count = min(layers, most)
    return sorted({round(i) for i in np.linspace(0, layers - 1, count).tolist()}) if count else []


def save_sample(sample: TokenSample, folder: Path) -> Path:
    """Write `token_sample.safetensors`.

    Raises:
        OutputError: The file cannot be written.
    """
    about = {"layers": sample.layers, "experts": sample.experts, "texts": sample.texts}
    arrays = {"token_ids": sample.token_ids, "probabilities": sample.probabilities}
    return _save(folder / SAMPLE_NAME, "token sample", sample.fingerprint, about, arrays)


def save_routers(tables: RouterTables, folder: Path) -> Path:
    """Write `router_similarity.safetensors`.

    Raises:
        OutputError: The file cannot be written.
    """
    about = {"layers": tables.layers, "experts": tables.experts}
    arrays = {name: getattr(tables, name) for name in ("cosine", "row_norms", "row_cosine")}
    return _save(folder / ROUTERS_NAME, "router similarity", tables.fingerprint, about, arrays)


def load_sample(folder: Path, model: ModelInfo) -> TokenSample | None:
    """The token sample beside a profile of `model`, or None if there is none.

    Raises:
        ProfileError: It is damaged, or belongs to another model.
    """
    found = _load(folder / SAMPLE_NAME, "token sample", model)
    if found is None:
        return None
    about, arrays = found
    layers, experts = _layers(about, folder / SAMPLE_NAME, model)
    ids, values = arrays["token_ids"], arrays["probabilities"]
    texts = about.get("texts")
    fits = (
        ids.dtype == np.int32
        and values.dtype == np.float32
        and ids.ndim == 1
        and values.shape == (len(layers), len(ids), max(experts, default=0))
        and isinstance(texts, list)
        and len(texts) == len(ids) <= SAMPLE_TOKENS
        and all(isinstance(text, str) for text in texts)
        and bool(np.isfinite(values).all())
    )
    if not fits:
        raise ProfileError(f"{folder / SAMPLE_NAME} is damaged: its parts do not fit together")
    kept = tuple(str(text) for text in texts or ())
    return TokenSample(layers, experts, ids, kept, values, model.fingerprint)


def load_routers(folder: Path, model: ModelInfo) -> RouterTables | None:
    """The router tables beside a profile of `model`, or None if there are none.

    Raises:
        ProfileError: They are damaged, or belong to another model.
    """
    found = _load(folder / ROUTERS_NAME, "router similarity", model)
    if found is None:
        return None
    about, arrays = found
    layers, experts = _layers(about, folder / ROUTERS_NAME, model)
    depth = len(layers)
    shapes = {"cosine": (depth, depth), "row_norms": (depth, max(experts, default=0)), "row_cosine": (depth, depth)}
    alike = all(arrays[name].shape == shape and arrays[name].dtype == np.float64 for name, shape in shapes.items())
    if layers != model.layer_indices or not alike:
        raise ProfileError(f"{folder / ROUTERS_NAME} is damaged: its parts do not fit together")
    return RouterTables(layers, experts, **{name: arrays[name] for name in shapes}, fingerprint=model.fingerprint)


def forget(folder: Path) -> None:
    """Remove what an earlier run left beside the profile that another has replaced."""
    for name in (SAMPLE_NAME, ROUTERS_NAME, TRACE_VIEW_NAME, WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _save(
    path: Path, kind: str, fingerprint: str | None, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> Path:
    write_tensors(arrays, path, {_KEY: json.dumps({"kind": kind, "fingerprint": fingerprint, **about})})
    return path


_ARRAYS: Final = {
    "token sample": ("token_ids", "probabilities"),
    "router similarity": ("cosine", "row_norms", "row_cosine"),
}


def _load(path: Path, kind: str, model: ModelInfo) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ProfileError(f"{path} is not a file; remove it, or record again")
    try:
        with safe_open(path, framework="numpy") as reader:
            text = (reader.metadata() or {}).get(_KEY, "")
            about = json.loads(text) if 0 < len(text) <= _LARGEST_HEADER else None
            if not isinstance(about, dict) or about.get("kind") != kind:
                raise ProfileError(f"{path} holds no {kind}; remove it, or record again")
            arrays = {name: reader.get_tensor(name) for name in _ARRAYS[kind]}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise ProfileError(f"{path} is damaged ({error}); remove it, or record again") from error
    if None not in (about.get("fingerprint"), model.fingerprint) and about["fingerprint"] != model.fingerprint:
        raise ProfileError(f"{path} belongs to another model than the profile; remove it, or record again")
    return about, arrays


def _layers(about: Mapping[str, Any], path: Path, model: ModelInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers and experts of a file, which must be layers of the model."""
    own = dict(zip(model.layer_indices, model.experts, strict=True))
    layers, experts = about.get("layers"), about.get("experts")
    own_layers = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if not own_layers or not layers or [own.get(layer) for layer in layers] != experts:
        raise ProfileError(f"{path} is damaged, or belongs to another model: its layers are not the profile's")
    return tuple(layers), tuple(experts)
