"""Profile through transformers: load a checkpoint, pad and batch prompts, record the routing of every real token."""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.adapters.checkpoints import quantisation
from moescope.adapters.encoding import encode_prompts, first_line, token_texts
from moescope.adapters.folders import check_folder
from moescope.adapters.transformers_hooks import (
    DECODE,
    PREFILL,
    Binding,
    MoeLayer,
    Rows,
    Watch,
    bind,
    family_of,
    overridden,
    router_logits,
)
from moescope.adapters.transformers_trace import BatchTrace
from moescope.profiler.engine import Completed, Generation, Request
from moescope.profiler.errors import ModelError, OptionError
from moescope.profiler.profile import EngineInfo
from moescope.profiler.prompts import Prompt
from moescope.profiler.recorder import Group, Recorder, router_distribution
from moescope.profiler.trace_writer import TraceWriter

#: The newest version of transformers that the tests of this adapter have passed with, without its patch number.
NEWEST_TESTED: Final = (5, 24)
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
_MAX_PADDED_TOKENS: Final = {"cpu": 4096, "cuda": 32768}
_MAX_BATCH: Final = {"cpu": 64, "cuda": 256}
_ACTIVATION_COPIES: Final = 24  # hidden-sized tensors alive at once in a layer, generously


class TransformersEngine:
    """Runs requests through a transformers model on one device.

    Args:
        model: A loaded causal language model.
        tokenizer: Its tokenizer; needed only for prompts given as text or messages.
        name: Hub id or path, for the record.
        batch_size: Requests in a batch at most; None fits memory.
        probabilities: Sum full distributions.
        coactivation: Count pairs of experts.
        padding_side: Side that shorter prompts are padded on. Generation always pads on the left.

    Raises:
        ModelError: The model cannot be recorded exactly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        batch_size: int | None = None,
        probabilities: bool = True,
        coactivation: bool = False,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        import transformers

        _warn_if_newer(transformers.__version__)
        self.binding: Binding = bind(model, name or str(model.config._name_or_path) or type(model).__name__)
        self.model = self.binding.model
        self._model = model
        self._tokenizer = tokenizer
        self._device = next(model.parameters()).device
        self._padding_side = padding_side
        self._tracing: TraceWriter | None = None
        self.probabilities = probabilities
        self.coactivation = coactivation
        config = model.config.get_text_config(decoder=True)
        self._config = config
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.context = getattr(config, "max_position_embeddings", None)
        kind = self._device.type if self._device.type in _MAX_BATCH else "cpu"
        if batch_size is None:
            self.batching = {"batch_size": _MAX_BATCH[kind], "batch_tokens": self._tokens_that_fit(kind)}
        else:
            self.batching = {"batch_size": batch_size, "batch_tokens": 0}
        self.info = EngineInfo(
            name="transformers",
            version=transformers.__version__,
            device=str(self._device),
            dtype=str(model.dtype).removeprefix("torch."),
            options={"torch": torch.__version__, "attention": str(config._attn_implementation)},
        )
        self.recorder = Recorder(
            self.model.layers,
            scoring=self.model.scoring,
            scales=[layer.scale for layer in self.binding.layers],
            probabilities=probabilities,
            coactivation=coactivation,
            device=self._device,
        )

    @property
    def note(self) -> str:
        """Nothing to say."""
        return ""

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts given as text or as messages; see `encode_prompts`."""
        return encode_prompts(self._tokenizer, prompts, self.model.id)

    def plan(self, lengths: NDArray[np.int64], generation: Generation) -> list[list[int]]:
        """Batches of prompts of like length, longest first; the same every time for the same lengths.

        Args:
            lengths: int64 [n], tokens of each prompt.
            generation: How they will be continued.

        Returns:
            Lists of indices into `lengths`; each index once.
        """
        size, budget = self.batching["batch_size"], self.batching["batch_tokens"]
        batches: list[list[int]] = []
        longest = 0
        for index in np.argsort(-lengths, kind="stable").tolist():
            full = batches and len(batches[-1]) >= size
            if not batches or full or (budget and longest * (len(batches[-1]) + 1) > budget):
                batches.append([])
                longest = int(lengths[index]) + generation.max_tokens
            batches[-1].append(index)
        return batches

    def run(self, requests: Sequence[Request], generation: Generation, batch: int) -> Completed:
        """Run one batch and hold what was recorded against the requests' own lengths.

        Raises:
            InvariantError: What was recorded does not add up; the message names the layer.
        """
        columns = max(len(request.token_ids) for request in requests)
        left = generation.max_tokens > 0 or self._padding_side == "left"
        pad = self._pad_id()
        ids = torch.full((len(requests), columns), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            length = len(request.token_ids)
            part = slice(columns - length, columns) if left else slice(0, length)
            ids[row, part] = torch.from_numpy(request.token_ids.astype(np.int64))
            mask[row, part] = 1
        owners = tuple((request.domain, request.split) for request in requests)
        rows = Rows(owners, columns, mask.bool(), decodes=generation.max_tokens > 1)
        hooks: dict[str, Any] = {}
        if self._tracing is not None:
            traced = BatchTrace(self._tracing, self.recorder, requests, mask.bool(), generation.max_tokens)
            hooks = {"selected": traced.select, "after": traced.append}
        ids, mask = ids.to(self._device), mask.to(self._device)
        watching = Watch(self._model, self.binding, self.recorder, **hooks)
        with _evaluating(self._model), torch.inference_mode(), watching as watch:
            watch.expect(rows)
            if generation.max_tokens:
                generated = self._generate(ids, mask, generation, batch)
            else:
                position = (mask.cumsum(-1) - 1).clamp(min=0)
                extra = {"position_ids": position} if left else {}
                self.binding.body(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
                generated = (0,) * len(requests)
        groups = rows.groups()
        tokens = dict.fromkeys(groups, 0)
        for request, new in zip(requests, generated, strict=True):
            tokens[Group(request.domain, PREFILL, request.split)] += len(request.token_ids)
            if new > 1:  # the last generated token is never fed back
                tokens[Group(request.domain, DECODE, request.split)] += new - 1
        sums = self.recorder.drain(list(tokens.values()), f"batch {batch}: ")
        if self._device.type == "cpu":
            _return_freed_memory()
        return Completed(sums, tuple(tokens.values()))

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, generation: Generation, batch: int) -> tuple[int, ...]:
        from transformers import GenerationConfig

        stops = self._stop_ids()
        sampling: dict[str, Any] = {"do_sample": False}
        if generation.temperature > 0:
            sampling = {"do_sample": True, "temperature": generation.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=generation.max_tokens, eos_token_id=stops or None, pad_token_id=self._pad_id(), **sampling
        )
        devices = [] if self._device.type == "cpu" else [self._device]
        with (
            # what the checkpoint's own config would add (penalties, beams, samples) is left out: runs say what they did
            overridden(self._model, "generation_config", config),
            torch.random.fork_rng(devices=devices, device_type=self._device.type),
        ):
            torch.manual_seed((generation.seed * 1_000_003 + batch) % 2**63)
            output = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        lengths = []
        for row in output[:, ids.shape[1] :].tolist():
            stop = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
            lengths.append(stop + 1)
        return tuple(lengths)

    def _stop_ids(self) -> list[int]:
        config = getattr(self._model, "generation_config", None)
        stops = getattr(config, "eos_token_id", None)
        if stops is None:
            stops = self._config.eos_token_id
        if stops is None:
            return []
        return [int(stop) for stop in (stops if isinstance(stops, (list, tuple)) else [stops])]

    def _pad_id(self) -> int:
        for source in (self._tokenizer, getattr(self._model, "generation_config", None), self._config):
            pad = getattr(source, "pad_token_id", None)
            if isinstance(pad, int) and 0 <= pad < self.vocabulary:
                return pad
        usable = [stop for stop in self._stop_ids() if stop < self.vocabulary]
        return min(usable, default=0)

    def _tokens_that_fit(self, kind: str) -> int:
        """Padded tokens of a batch that a quarter of the free memory holds, with activations and caches."""
        config = self._config
        size = self._model.dtype.itemsize
        hidden = int(config.hidden_size)
        heads = int(getattr(config, "num_attention_heads", 1))
        head = int(getattr(config, "head_dim", None) or hidden // heads)
        cache = 2 * int(config.num_hidden_layers) * heads * head * size
        experts = max(layer.top_k * 4 for layer in self.model.layers) * hidden * 4
        distribution = max(layer.experts for layer in self.model.layers) * 16
        each = cache + _ACTIVATION_COPIES * hidden * 4 + experts + distribution
        fitting = free_memory(self._device) // 4 // each
        return max(1, min(_MAX_PADDED_TOKENS[kind], int(fitting)))

    def trace(self, writer: TraceWriter | None) -> None:
        """Trace the tokens of the batches to come, or no longer."""
        self._tracing = writer

    def findings(self) -> dict[str, Any]:
        """Nothing beside the settings."""
        return {}

    def router_weights(self) -> list[NDArray[np.float32]]:
        """Router weights of each MoE layer, float32 (E, H)."""
        return self.binding.router_weights()

    def distributions(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """The router's full distributions for a short prompt, float32 (L, T, E), zero-padded; counts nothing."""
        if not self.probabilities:
            return None
        layers = self.binding.layers
        out = np.zeros((len(layers), len(token_ids), max(self.model.experts)), np.float32)

        def hook(slot: int, layer: MoeLayer) -> Callable[..., None]:
            def keep(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
                found = router_distribution(router_logits(layer, output), self.model.scoring)
                out[slot, :, : layer.info.experts] = found.cpu().numpy()

            return keep

        with contextlib.ExitStack() as stack:
            for slot, layer in enumerate(layers):
                stack.callback(layer.router.register_forward_hook(hook(slot, layer)).remove)
            stack.enter_context(_evaluating(self._model))
            stack.enter_context(torch.inference_mode())
            ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)
            self.binding.body(input_ids=ids, use_cache=False)
        return out

    def texts(self, token_ids: NDArray[np.int32]) -> list[str]:
        """Each token as text; empty where there is no tokenizer."""
        return token_texts(self._tokenizer, token_ids.tolist())

    def close(self) -> None:
        """Nothing is held beyond the model."""


def _warn_if_newer(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"transformers {version} is newer than {tested}, the newest that moescope was tested with; counts are held "
            "against the requests' own lengths all the same",
            stacklevel=3,
        )


def _return_freed_memory() -> None:
    """Let glibc give freed activations back, which batches of ever new shapes would pile up; elsewhere do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; in training some routers add noise."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can still be taken on a device: what the system has left, or the container's limit if that is less."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, KeyError, ValueError):
        pass
    return max(free, 0)


def load_engine(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    batch_size: int | None = None,
    probabilities: bool = True,
    coactivation: bool = False,
    name: str | None = None,
) -> TransformersEngine:
    """Load a checkpoint and bind to its routing; what can be refused is refused before weights are read.

    Args:
        model: Folder of a checkpoint, or a hub id.
        dtype: "auto" is the checkpoint's own type, but float32 on a CPU where that fits into memory.
        device: "auto", "cpu", "cuda", "cuda:1", …
        trust_remote_code: Run model code that comes with the checkpoint.
        attention: Attention implementation of transformers, e.g. "sdpa", "flash_attention_2".
        batch_size: Requests in a batch at most; None fits memory.
        probabilities: Sum full distributions.
        coactivation: Count pairs of experts.
        name: What the profile calls the model; by default `model`.

    Raises:
        ModelError: No such model, no weights, a dense model, an unknown family, or it does not fit.
        OptionError: An unknown dtype or device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    target = _device(device)
    check_folder(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # hub, JSON and remote-code errors of many kinds
        raise ModelError(f"cannot read the config of {model}: {first_line(error)}") from error
    family_of(config, model)
    try:
        with torch.device("meta"):
            bind(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), model)
        chosen = _dtype(dtype, config, model, target)
        extra = {"attn_implementation": attention} if attention else {}
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            dtype=chosen,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
        missing = sorted(loading["missing_keys"])
        if missing:  # transformers would go on with random ones
            raise ModelError(f"cannot load {model}: {len(missing)} weights are missing, e.g. {missing[0]}")
        loaded = loaded.to(target)
    except ModelError:
        raise
    except Exception as error:  # loading fails in many ways, all of them the model's
        fp8 = quantisation(config.to_dict()).get("quant_method") == "fp8" and target.type == "cpu"
        hint = "; `moescope cache` converts FP8 checkpoints for the CPU" if fp8 else ""
        raise ModelError(f"cannot load {model}: {first_line(error)}{hint}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception:  # a model without tokenizer still takes token ids; `encode` says what is missing
        tokenizer = None
    return TransformersEngine(
        loaded,
        tokenizer,
        name=name or model,
        batch_size=batch_size,
        probabilities=probabilities,
        coactivation=coactivation,
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"--device {device!r} is unknown; choose auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {device}: there are {torch.cuda.device_count()} CUDA devices here; try --device cpu"
        )
    return target


def _dtype(dtype: str, config: Any, model: str, device: torch.device) -> torch.dtype | str:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type != "cpu" or getattr(config, "quantization_config", None) is not None:
        return "auto"
    folder = Path(model)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    small = stored and 2 * stored < free_memory() // 2
    return torch.float32 if small else "auto"
