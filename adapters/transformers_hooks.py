"""Recording inside transformers: which modules route, which rows of a forward count, and the hooks that tell.

A MoE layer of transformers 5 hands `(hidden_states, top_k_index, top_k_weights)` to a module named `experts`, whichever
kernels compute them, and its router returns its logits. Hooks on both give the routing. A hook on the model's body
opens a step before a forward and commits it after.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moescope.adapters.families import FAMILIES, REFUSED, Family
from moescope.adapters.transformers_forward import Forward, named_arguments
from moescope.profiler.errors import ModelError
from moescope.profiler.fingerprint import router_fingerprint
from moescope.profiler.profile import LayerInfo, ModelInfo
from moescope.profiler.recorder import Group, Recorder

PREFILL: Final = 0
DECODE: Final = 1
_EXPERTS_PATH: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts$")
_ROUTER_NAMES: Final = ("gate", "router")  # as the checkpoints of all families name it
_EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_CHECKED_ROWS: Final = 64
_COMPILED: Final = (
    "a compiled model cannot be recorded: torch.compile traces or skips what counts. Call the model itself, not a "
    "compiled one; generate with a static cache compiles by itself on a GPU, so pass it disable_compile=True"
)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The two modules of one MoE layer that hooks go on."""

    info: LayerInfo
    experts: nn.Module
    router: nn.Module
    scale: float


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a model routes.

    Attributes:
        model: Description for the profile.
        family: How its family scores experts.
        body: The module whose forward sees token ids and attention mask.
        layers: MoE layers in model order.
        unchecked: Positions of the layers whose scoring has not been checked on real rows yet.
    """

    model: ModelInfo
    family: Family
    body: nn.Module
    layers: tuple[MoeLayer, ...]
    unchecked: set[int]

    def router_weights(self) -> list[NDArray[np.float32]]:
        """Router weights of each layer, float32 (E, H)."""
        return [_router_weight(layer).detach().float().cpu().numpy() for layer in self.layers]


def family_of(config: Any, name: str) -> Family:
    """The family of a model's config.

    Args:
        config: A transformers config.
        name: The model, for messages.

    Raises:
        ModelError: A dense model, a family that the hook cannot record exactly, or one that nobody has checked.
    """
    text = config.get_text_config(decoder=True)
    kind = str(text.model_type)
    family = FAMILIES.get(kind) or FAMILIES.get(kind.removesuffix("_text"))
    if family is not None:
        scoring = getattr(text, family.scoring_field, None) if family.scoring_field else None
        return family if scoring not in ("softmax", "sigmoid") else replace(family, scoring=scoring)
    if kind in REFUSED:
        raise ModelError(
            f"{name}: family {kind!r} cannot be recorded exactly: {REFUSED[kind]}. "
            f"Supported: {', '.join(sorted(FAMILIES))}"
        )
    counts = [value for field in _EXPERT_COUNTS if isinstance(value := getattr(text, field, None), int)]
    if max(counts, default=0) < 2:
        raise ModelError(f"{name} ({kind}) has no MoE layers; moescope needs a Mixture-of-Experts model")
    raise ModelError(
        f"{name}: MoE family {kind!r} is not known, and moescope records no family unchecked. "
        f"Supported: {', '.join(sorted(FAMILIES))}; CONTRIBUTING.md shows how to add one"
    )


def bind(model: Any, name: str) -> Binding:
    """Find the MoE layers of a loaded model.

    Args:
        model: A transformers model; weights may be on the meta device.
        name: Hub id or path, as the user gave it.

    Raises:
        ModelError: A dense model, an unknown or deviating family, or a structure the hook does not fit.
    """
    family = family_of(model.config, name)
    kind = model.config.get_text_config(decoder=True).model_type
    experts = {}
    for path, module in model.named_modules():
        match = _EXPERTS_PATH.search(path)
        if match and not isinstance(module, nn.ModuleList):
            index = int(match[1])
            if index in experts:
                raise ModelError(f"{name}: layer {index} has two expert modules; family {kind!r} does not fit the hook")
            experts[index] = (path, module)
    if not experts:
        raise ModelError(f"{name} ({kind}) has no MoE layers; all of its layers are dense in this configuration")
    layers = []
    for index in sorted(experts):
        path, module = experts[index]
        router = _router(model, path, name)
        count, top_k = _layer_sizes(model, module, router)
        if not 1 <= top_k <= count:
            raise ModelError(f"{name}: layer {index} has {count} experts, but its top-k is {top_k}")
        scale = float(getattr(router, family.scale, 1.0)) if family.scale else 1.0
        layers.append(MoeLayer(LayerInfo(index, count, top_k), module, router, scale))
    info = ModelInfo(
        id=name,
        architecture=type(model).__name__,
        scoring=family.scoring,
        layers=tuple(layer.info for layer in layers),
        fingerprint=_fingerprint(layers),
        groups=_router_groups(layers[0].router),
    )
    unchecked = set(range(len(layers))) if family.proportional else set()
    body = model.base_model
    hooked = {body, *(layer.experts for layer in layers), *(layer.router for layer in layers)}
    if any(_is_compiled(module) and hooked & set(module.modules()) for module in model.modules()):
        raise ModelError(f"{name}: {_COMPILED}")
    return Binding(info, family, body, tuple(layers), unchecked)


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile(module) or module.compile() made."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _router(model: Any, path: str, name: str) -> nn.Module:
    """The router beside the experts at `path`."""
    block = model.get_submodule(path.rpartition(".")[0])
    for child in _ROUTER_NAMES:
        if isinstance(router := getattr(block, child, None), nn.Module):
            return router
    raise ModelError(
        f"{name}: no router was found beside {path}; this version of transformers lays the family out in a way that "
        "moescope does not know"
    )


def _layer_sizes(model: Any, experts: nn.Module, router: nn.Module) -> tuple[int, int]:
    config = model.config.get_text_config(decoder=True)
    count = next((v for field in _EXPERT_COUNTS if isinstance(v := getattr(experts, field, None), int)), None)
    if count is None:
        count = next(v for field in _EXPERT_COUNTS if isinstance(v := getattr(config, field, None), int))
    top_k = getattr(router, "top_k", None)
    if not isinstance(top_k, int):
        top_k = config.num_experts_per_tok
    return int(count), int(top_k)


def _router_groups(router: nn.Module) -> int:
    """Groups of experts that a router first chooses among."""
    if getattr(router, "topk_method", None) == "greedy":  # DeepSeek-V2 says so where its groups have no say
        return 1
    return int(getattr(router, "num_group", None) or 1)


def _router_weight(layer: MoeLayer) -> Tensor:
    for parameter in layer.router.parameters():
        if parameter.ndim == 2 and parameter.shape[0] == layer.info.experts:
            return parameter
    raise ModelError(f"layer {layer.info.index}: its router has no weight of {layer.info.experts} rows")


def _fingerprint(layers: Sequence[MoeLayer]) -> str | None:
    weights = [_router_weight(layer) for layer in layers]
    return None if any(weight.is_meta for weight in weights) else router_fingerprint(weights)


def check_scoring(layer: MoeLayer, family: Family, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Assert on real rows that a layer routes as its family's entry says.

    The weights of the chosen experts must be proportional to their scores, and, with the scaling factor divided out,
    must either sum to 1 or be the scores themselves.

    Args:
        layer: The layer.
        family: What the table says.
        logits: (T, E) raw logits.
        ids: (T, k) chosen experts.
        weights: (T, k) routing weights as applied.

    Raises:
        ModelError: They are not.
    """
    logits, ids, weights = logits[:_CHECKED_ROWS].double(), ids[:_CHECKED_ROWS].long(), weights[:_CHECKED_ROWS].double()
    if not len(ids) or not torch.isfinite(logits).all():  # the recorder counts such rows and fails the run
        return
    scores = logits.softmax(dim=-1) if family.scoring == "softmax" else logits.sigmoid()
    chosen, applied = scores.gather(1, ids), weights / layer.scale
    share = chosen / chosen.sum(dim=-1, keepdim=True)
    found = applied / applied.sum(dim=-1, keepdim=True)
    tolerance = 0.05  # bf16 routers round scores to 8 bits, twice
    if not torch.allclose(found, share, rtol=tolerance, atol=1e-3):
        raise ModelError(
            f"layer {layer.info.index}: its routing weights are not {family.scoring} scores of its logits; "
            "this version of transformers routes the family in a way that moescope does not know"
        )
    normalised = (applied.sum(dim=-1) - 1).abs().max() < tolerance
    if not normalised and not torch.allclose(applied, chosen, rtol=tolerance, atol=1e-3):
        raise ModelError(
            f"layer {layer.info.index}: its routing weights, divided by the scaling factor {layer.scale:g}, neither "
            "sum to 1 nor are the scores; this version of transformers scales them in a way that moescope does not know"
        )


@dataclass(slots=True)
class Rows:
    """The rows of one call: who they are and how far they have got.

    Attributes:
        owners: For each request its domain and split; a request may have several rows (samples), one after the other.
        prompt_columns: Columns of the prompt, padding included; later columns are decode.
        prompt_mask: bool (requests, prompt_columns), True where there is a token; None where each forward's mask tells.
        decodes: Whether any column can be decode.
        done_columns: Columns already routed: a recomputed column is not counted again.
        skipped_columns: Columns that came with a filled cache and were never routed here.
        finished: bool (B,), rows that have met their last token, or None before the first.
        lengths: int64 (B,), tokens generated so far, the last included, or None before the first.
    """

    owners: tuple[tuple[int, int], ...]
    prompt_columns: int
    prompt_mask: Tensor | None = None
    decodes: bool = True
    done_columns: int = 0
    skipped_columns: int | None = None
    finished: Tensor | None = None
    lengths: Tensor | None = None

    def groups(self) -> tuple[Group, ...]:
        """Distinct groups of the rows, prefill before decode."""
        phases = (PREFILL, DECODE) if self.decodes else (PREFILL,)
        return tuple(Group(d, p, s) for p in phases for d, s in sorted(set(self.owners)))

    def finish_tokens(self, done: Tensor) -> None:
        """A token was appended to every row; `done` (B,) bool says for which rows it is the last."""
        if self.finished is None or self.lengths is None:
            self.finished = torch.zeros_like(done)
            self.lengths = torch.zeros_like(done, dtype=torch.int64)
        self.lengths += ~self.finished
        self.finished = self.finished | done

    def select(self, batch: int, past: int, width: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which cells of a forward count, and where.

        Args:
            batch: Rows B of the forward.
            past: Columns that its cache already holds.
            width: Columns S of the forward.
            mask: bool (B, at least past + S) of the forward, on the CPU, or None.

        Returns:
            bool (B, S), cells that count, and int64 (B, S), index of each cell's group in `groups`.

        Raises:
            ModelError: The forward has another number of rows than was announced.
        """
        if batch % len(self.owners):
            raise ModelError(f"a forward of {batch} rows came where {len(self.owners)} requests were announced")
        if self.skipped_columns is None:
            self.skipped_columns = self.done_columns = past
        samples = batch // len(self.owners)
        columns = torch.arange(past, past + width)
        late = columns >= self.prompt_columns
        counted = (columns >= self.done_columns).repeat(batch, 1)
        if self.prompt_mask is not None:
            counted[:, ~late] &= self.prompt_mask.repeat_interleave(samples, dim=0)[:, columns[~late]]
        elif mask is not None:
            counted &= mask[:, columns]
        if self.finished is not None:
            counted[:, late] &= ~self.finished.cpu()[:, None]
        self.done_columns = max(self.done_columns, past + width)

        where = {group: index for index, group in enumerate(self.groups())}
        group = torch.empty(batch, width, dtype=torch.int64)
        for phase, part in ((PREFILL, ~late), (DECODE, late)):
            if part.any():
                index = torch.tensor([where[Group(domain, phase, split)] for domain, split in self.owners])
                group[:, part] = index.repeat_interleave(samples)[:, None]
        return counted, group


@contextlib.contextmanager
def overridden(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give one object another attribute for a while; what it had of its own comes back."""
    own = name in vars(target)
    before = vars(target).get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own:
            setattr(target, name, before)
        else:
            delattr(target, name)


class Watch:
    """Hooks on a bound model that feed a recorder; attached inside a `with` block.

    Args:
        model: The model that was bound.
        binding: Where it routes.
        recorder: Where the routing goes.
        before: Called with the arguments of each forward of the body, before it is counted; may set `rows`.
        after: Called after each forward of the body that was counted, with the cache that holds its columns, or None.
        selected: Called with each forward and bool (B, S), its cells that count, before it is counted.
    """

    def __init__(
        self,
        model: Any,
        binding: Binding,
        recorder: Recorder,
        *,
        before: Callable[[Forward], None] | None = None,
        after: Callable[[Any], None] | None = None,
        selected: Callable[[Forward, Tensor], None] | None = None,
    ) -> None:
        self.rows: Rows | None = None
        self._model = model
        self._binding = binding
        self._recorder = recorder
        self._notify_before = before
        self._notify_after = after
        self._notify_selected = selected
        self._stack = contextlib.ExitStack()
        self._logits: dict[int, Tensor] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            body = self._binding.body
            stack.enter_context(overridden(body, "forward", self._watch_forward(body.forward)))
            for slot, layer in enumerate(self._binding.layers):
                router, experts = self._router_hook(slot, layer), self._experts_hook(slot, layer)
                stack.callback(layer.router.register_forward_hook(router).remove)
                stack.callback(layer.experts.register_forward_pre_hook(experts, with_kwargs=True).remove)
            if hasattr(self._model, "generate"):
                watched = self._watch_criteria(self._model._get_stopping_criteria)
                stack.enter_context(overridden(self._model, "_get_stopping_criteria", watched))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._logits.clear()
        if error is not None and type(error).__module__ == "torch._dynamo.exc" and _COMPILED in str(error):
            raise ModelError(_COMPILED) from None  # torch.compile(fullgraph=True) words a refusal in its own way

    def expect(self, rows: Rows) -> None:
        """Announce the rows of the next call and start their sums."""
        self.rows = rows
        self._recorder.start(rows.groups())

    def _watch_criteria(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Let `generate` tell which rows have met their last token, whatever its stopping criteria are."""
        from transformers import StoppingCriteriaList

        watch = self

        class WatchedCriteria(StoppingCriteriaList):  # type: ignore[misc]
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                done: Tensor = super().__call__(input_ids, scores, **kwargs)
                if watch.rows is not None:
                    watch.rows.finish_tokens(done)
                return done

        def get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
            return WatchedCriteria(original(*args, **kwargs))

        return get_stopping_criteria

    def _watch_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The body's forward between a step's begin and its commit.

        An attribute and no pair of hooks: what torch.compile made before looks at the one and not at the other.
        """
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            _refuse_compiling()
            given = self._begin(Forward.of(named_arguments(signature, args, kwargs)))
            output = original(*args, **kwargs)
            if self._recorder.recording:
                cache = given.kept_in(output)
                self._recorder.commit()
                if self._notify_after is not None:
                    self._notify_after(cache)
            return output

        return forward

    def _begin(self, forward: Forward) -> Forward:
        if self._notify_before is not None:
            self._notify_before(forward)
        if self.rows is None:
            return forward
        if self.rows.prompt_mask is None and forward.opaque_mask:
            raise ModelError("recording a forward needs its attention_mask as (B, S), not a mask made of it")
        counted, group = self.rows.select(forward.batch, forward.past, forward.width, forward.mask)
        if self._notify_selected is not None:
            self._notify_selected(forward, counted)
        rows = None if bool(counted.all()) else counted.reshape(-1).nonzero().squeeze(1)
        group = group.reshape(-1) if rows is None else group.reshape(-1)[rows]
        device = self._recorder.device
        self._recorder.begin(forward.batch * forward.width, None if rows is None else rows.to(device), group.to(device))
        return forward

    def _router_hook(self, slot: int, layer: MoeLayer) -> Callable[..., None]:
        def keep_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._logits[slot] = router_logits(layer, output)

        return keep_logits

    def _experts_hook(self, slot: int, layer: MoeLayer) -> Callable[..., None]:
        @torch.no_grad()  # what is staged must not keep the graph of a user's training step alive
        def stage(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _refuse_compiling()
            logits = self._logits.pop(slot, None)
            if not self._recorder.recording:
                return
            ids, weights = _choices(args, kwargs, layer)
            if slot in self._binding.unchecked and logits is not None:
                check_scoring(layer, self._binding.family, logits, ids, weights)
                self._binding.unchecked.discard(slot)
            self._recorder.stage(slot, ids, weights, logits)

        return stage


@torch.compiler.disable(reason=_COMPILED)  # type: ignore[no-untyped-call, untyped-decorator]
def _refuse_compiled() -> None:
    raise ModelError(_COMPILED)


def _refuse_compiling() -> None:
    """Refuse to be compiled into a forward; the refusal itself runs where the compiled forward is called."""
    if torch.compiler.is_compiling():
        _refuse_compiled()


def router_logits(layer: MoeLayer, output: Any) -> Tensor:
    """Raw logits (T, E) among what a layer's router returned."""
    tensors = [part for part in output if isinstance(part, Tensor) and part.is_floating_point()]
    found = [part for part in tensors if part.shape[-1] == layer.info.experts]
    if len(found) != 1:
        raise ModelError(f"layer {layer.info.index}: its router does not hand over one tensor of logits")
    return found[0].reshape(-1, layer.info.experts)


def _choices(args: tuple[Any, ...], kwargs: dict[str, Any], layer: MoeLayer) -> tuple[Tensor, Tensor]:
    """Expert ids and routing weights among the inputs of an experts module, told apart by dtype and shape."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    ids = [t for t in tensors if not t.is_floating_point() and t.ndim == 2 and t.shape[1] == layer.info.top_k]
    if len(ids) != 1:
        raise ModelError(f"layer {layer.info.index}: its experts were called without k = {layer.info.top_k} expert ids")
    weights = [t for t in tensors if t.is_floating_point() and t.shape == ids[0].shape]
    if len(weights) != 1:
        raise ModelError(f"layer {layer.info.index}: its experts were called without routing weights")
    return ids[0], weights[0]
