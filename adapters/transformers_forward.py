"""What one forward was given, and which columns its cache holds before and after.

A cache is found among arguments and outputs by what it is, never by a name: transformers renames them. Its length and
the attention mask are two sources for where a forward's tokens stand; where they disagree, nothing is counted.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from moescope.profiler.errors import ModelError


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a catch-all among them."""
    given = signature.bind_partial(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = {**given.pop(parameter.name, {}), **given}
    return given


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward of the body was given.

    Attributes:
        ids: int64 (B, S) token ids, or None if it was given embeddings.
        batch: Rows B.
        width: Columns S.
        past: Columns that its cache already holds.
        mask: bool (B, at least past + S) on the CPU, True where there is a token; None if no such mask was given.
        opaque_mask: Whether a mask was given in another form.
        cache: Its cache, or None.
    """

    ids: Tensor | None
    batch: int
    width: int
    past: int
    mask: Tensor | None
    opaque_mask: bool
    cache: Any

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Read the arguments of a forward, by name.

        Raises:
            ModelError: There are no token ids, the cache cannot be read, or cache and mask disagree.
        """
        ids = given.get("input_ids")
        shaped = ids if ids is not None else given.get("inputs_embeds")
        if shaped is None:
            raise ModelError("the model's forward was called without input_ids")
        mask, cache = given.get("attention_mask"), find_cache(given.values())
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past, width = 0 if cache is None else cached_columns(cache), int(shaped.shape[1])
        # a mask may also span the whole buffer of a static cache
        if plain is not None and plain.shape[1] not in (past + width, _buffer_columns(cache)):
            raise ModelError(
                f"attention_mask has {plain.shape[1]} columns, but the cache holds {past} and the forward brings "
                f"{width}, {past + width} in all; pass the mask of all of them, and the cache that holds the earlier"
            )
        return cls(
            ids=ids,
            batch=int(shaped.shape[0]),
            width=width,
            past=past,
            mask=None if plain is None else plain.cpu() != 0,
            opaque_mask=mask is not None and plain is None,
            cache=cache,
        )

    def kept_in(self, output: Any) -> Any:
        """The cache that holds the forward's columns now, or None where none was kept.

        Args:
            output: What the forward returned.

        Raises:
            ModelError: The cache did not grow by the forward's columns.
        """
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        cache = find_cache(parts)
        if cache is None and not isinstance(self.cache, (tuple, list)):  # those do not grow in place
            cache = self.cache
        if cache is not None and (after := cached_columns(cache)) != self.past + self.width:
            raise ModelError(
                f"a forward brought {self.width} columns to a cache of {self.past}, which then held {after}, not "
                f"{self.past + self.width}; where its tokens stand is not known. Does the model take a cache so named?"
            )
        return cache


def find_cache(values: Iterable[Any]) -> Any:
    """The one cache among the arguments or the outputs of a forward, or None.

    Raises:
        ModelError: There are two, or one of a kind that does not tell its length.
    """
    found = {id(value): value for value in values if _is_cache(value)}
    if len(found) > 1:
        raise ModelError(f"a forward has {len(found)} caches; moescope cannot tell which one holds its columns")
    return next(iter(found.values()), None)


def cached_columns(cache: Any) -> int:
    """Columns that a cache holds, those that a sliding window has dropped included.

    Raises:
        ModelError: It does not tell.
    """
    from transformers.cache_utils import CacheLayerMixin

    if isinstance(cache, (tuple, list)):
        lengths = {int(layer[0].shape[-2]) for layer in cache}
    else:
        layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, CacheLayerMixin)]
        try:  # layers of linear attention do not know; a static cache answers with a tensor that it changes later
            lengths = {int(part.get_seq_length()) for part in layers or (cache,)}
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                f"a cache of type {type(cache).__name__} does not tell how many columns it holds"
            ) from error
    if len(lengths - {0}) > 1:  # layers that share another layer's keys stay empty
        raise ModelError(f"the layers of a cache hold different numbers of columns: {sorted(lengths)}")
    return max(lengths)


def cache_anchor(cache: Any) -> Any:
    """What stands for a cache as long as it lives: itself, or the first keys of a tuple of keys and values."""
    return cache[0][0] if isinstance(cache, (tuple, list)) else cache


def _is_cache(value: Any) -> bool:
    """Whether a value is a cache: an object that tells its length or takes updates, or keys and values by layer."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_keys_and_values(layer) for layer in value)
    if isinstance(value, (Tensor, Mapping)):
        return False
    kind = type(value)
    return hasattr(kind, "get_seq_length") or any(name.startswith("update") for name in dir(kind))


def _is_keys_and_values(layer: Any) -> bool:
    if not isinstance(layer, (tuple, list)) or len(layer) < 2:
        return False
    return all(isinstance(part, Tensor) and part.ndim == 4 for part in layer[:2])


def _buffer_columns(cache: Any) -> int:
    """Columns that a static cache has room for, or -1."""
    from transformers.cache_utils import StaticLayer

    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StaticLayer)]
    return max((int(layer.max_cache_len) for layer in layers), default=-1)
