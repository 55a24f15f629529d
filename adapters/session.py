"""From a model's name and some prompts to a profile, in one call."""

import contextlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.profiler.demo import model_path
from moescope.profiler.engine import Engine, Generation
from moescope.profiler.errors import EngineError, OptionError
from moescope.profiler.files import OutputFolder
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.prompts import Prompt, as_prompts
from moescope.profiler.run import CHUNK, Progress, run_profile
from moescope.profiler.sidecars import SAMPLE_TOKENS, TokenSample, choose_layers, forget, save_sample
from moescope.profiler.tokens import PromptLimits, TokenizedPrompts, tokenize_prompts
from moescope.profiler.trace_writer import TraceOptions

#: Prefix of the embedded demo models, as a model's name: "demo:stacked", "demo:control".
DEMO: Final = "demo:"


def _transformers(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> Engine:
    from moescope.adapters.transformers import TransformersEngine, load_engine

    if isinstance(model, str) and model.startswith(DEMO):
        return load_engine(str(model_path(model.removeprefix(DEMO))), name=model, **options)
    if isinstance(model, (str, Path)):
        return load_engine(str(model), **options)
    kept = {name: options[name] for name in ("batch_size", "probabilities", "coactivation") if name in options}
    return TransformersEngine(model, tokenizer, **kept)


def _vllm(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> Engine:
    from moescope.adapters.vllm import VllmEngine

    if not isinstance(model, (str, Path)):
        raise OptionError("--engine vllm takes the name of a model, not a loaded one")
    device = options.get("device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {device}: vLLM takes the device it was built for; CUDA_VISIBLE_DEVICES chooses")
    if options.get("attention"):
        raise OptionError("--attention is for transformers; for vLLM write --engine-arg attention_backend=NAME")
    kept = {name: value for name, value in options.items() if name not in ("device", "attention")}
    if isinstance(model, str) and model.startswith(DEMO):
        return VllmEngine(str(model_path(model.removeprefix(DEMO))), name=model, **kept)
    return VllmEngine(str(model), **kept)


#: Engines by name; each opens a model given as a name, or as a loaded object where the engine takes one.
ENGINES: Final[dict[str, Callable[[Any, Any, Mapping[str, Any]], Engine]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}
#: Options that only vLLM takes.
_VLLM_OPTIONS: Final = ("engine_args", "verify", "ignore_eos")


def choose_engine(model: Any, options: Mapping[str, Any]) -> str:
    """What "auto" means: vLLM where it and a GPU for it are there, and the model is given by its name."""
    if any(options.get(name) for name in _VLLM_OPTIONS):
        return "vllm"
    if not isinstance(model, (str, Path)) or str(model).startswith(DEMO) or options.get("attention"):
        return "transformers"
    if options.get("device", "auto") not in ("auto", "cuda"):
        return "transformers"
    from moescope.adapters.vllm_plugin import loads_plugin, supported, vllm_version

    version = vllm_version()
    if version is None or not supported(version) or not loads_plugin():
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def open_engine(model: Any, *, engine: str = "auto", tokenizer: Any = None, **options: Any) -> Engine:
    """Open a model in an engine.

    Args:
        model: Folder of a checkpoint, hub id, "demo:stacked", "demo:control", or a loaded transformers model.
        engine: "auto" or a name in `ENGINES`.
        tokenizer: Tokenizer of a loaded model.
        options: Options of the engine; see `moescope.adapters.transformers.load_engine`.

    Raises:
        OptionError: An unknown engine.
        ModelError: The model cannot be loaded, or its routing cannot be recorded exactly.
    """
    name = choose_engine(model, options) if engine == "auto" else engine
    flash = options.pop("flash_attention", False)
    if name not in ENGINES:
        raise OptionError(f"--engine {name!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
    if importlib.util.find_spec(name) is None:
        raise OptionError(
            f"--engine {name} needs the package {name!r}, which is not installed: pip install 'moescope[{name}]'"
        )
    if name == "transformers":
        given = [option for option in _VLLM_OPTIONS if options.get(option)]
        if given:
            raise OptionError(f"--engine transformers does not take {', '.join(given)}; those are for vLLM")
        if options.get("probabilities") == "sample":
            raise OptionError("--probabilities sample is for vLLM; transformers records all or off")
        options = {key: value for key, value in options.items() if key not in _VLLM_OPTIONS}
        if flash:
            options["attention"] = "flash_attention_2"
        options["probabilities"] = options.get("probabilities") not in (False, "off")
    else:
        if flash:
            options["engine_args"] = {"attention_backend": "FLASH_ATTN", **(options.get("engine_args") or {})}
        wanted = options.get("probabilities")
        options["probabilities"] = {True: "all", False: "off", None: "sample"}.get(wanted, wanted)
    return ENGINES[name](model, tokenizer, options)


def check_cacheable(model: Any, engine: str, options: Mapping[str, Any]) -> None:
    """Refuse a cache of converted weights where the engine reads FP8 by itself.

    Args:
        model: As in `open_engine`.
        engine: "auto" or a name in `ENGINES`.
        options: The options that `open_engine` will get.

    Raises:
        OptionError: The model would run in vLLM or on another device than a CPU.
    """
    name = choose_engine(model, options) if engine == "auto" else engine
    if name != "transformers":
        raise OptionError(
            f"--cache-dir is for transformers on a CPU, and {name} runs FP8 checkpoints as they are; "
            f"leave it out, or give --engine transformers --device cpu"
        )
    import torch

    device = options.get("device", "auto")
    if (device == "auto" and torch.cuda.is_available()) or device not in ("auto", "cpu"):
        raise OptionError("--cache-dir is for transformers on a CPU; leave it out, or give --device cpu")


def parse_engine_args(items: Sequence[str]) -> dict[str, Any]:
    """Arguments of vLLM from `name=value`; values are JSON where they can be, else text.

    Raises:
        OptionError: An item is not `name=value`.
    """
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise OptionError(f"--engine-arg {item!r}: write name=value, e.g. max_model_len=8192")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return parsed


def profile_prompts(
    engine: Engine,
    prompts: Iterable[Prompt],
    generation: Generation,
    *,
    max_prompt_tokens: int | None = None,
    truncate: bool = False,
    skip_long: bool = False,
    folder: OutputFolder | None = None,
    resume: bool = False,
    token_sample: bool = True,
    trace: TraceOptions | None = None,
    left_out: Sequence[str] = (),
    on_tokenized: Callable[[int, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RoutingProfile:
    """Tokenise a prompt set, run it, and return the profile.

    Args:
        engine: An open engine.
        prompts: The set, read once.
        generation: How prompts are continued; its seed also splits the prompts.
        max_prompt_tokens: Longest prompt; by default what the model's context leaves beside the generated tokens.
        truncate: Cut longer prompts rather than refuse the set.
        skip_long: Leave longer prompts out rather than refuse the set; how many is in the run's settings.
        folder: Where to keep results, or None.
        resume: Go on with what an interrupted run left in `folder`.
        token_sample: Keep the distributions of one prompt's first tokens, and their text, beside the profile.
        trace: Trace the tokens too, as said here.
        left_out: What reading the prompts left out, known when all are read; how many is in the run's settings.
        on_tokenized: Told prompts and tokens so far while tokenising.
        on_progress: Told after each batch.

    Raises:
        MoescopeError: The prompts, the run or the folder are at fault; see `tokenize_prompts` and `run_profile`.
        Interrupted: Ctrl-C.
    """
    before = folder.load_partial() if folder is not None and resume else None
    room = None if engine.context is None else engine.context - generation.max_tokens
    if room is not None and room < 1:
        raise OptionError(
            f"--max-tokens {generation.max_tokens} leaves no room for a prompt "
            f"in the model's context of {engine.context}"
        )
    if max_prompt_tokens is not None and room is not None and max_prompt_tokens > room:
        raise OptionError(
            f"--max-prompt-tokens {max_prompt_tokens} and --max-tokens {generation.max_tokens} together exceed the "
            f"model's context of {engine.context}"
        )
    limits = PromptLimits(max_prompt_tokens or room, truncate, skip_long)
    with (
        _spool_folder(folder) as spool,
        tokenize_prompts(
            prompts,
            lambda batch: list(engine.encode(batch)),
            folder=spool,
            limits=limits,
            vocabulary=engine.vocabulary,
            seed=generation.seed,
            progress=on_tokenized,
        ) as tokens,
    ):
        done = run_profile(
            engine,
            tokens,
            generation,
            settings={
                "max_prompt_tokens": limits.max_tokens,
                "truncate": truncate,
                **({"skipped_long_prompts": tokens.skipped} if skip_long else {}),
                **({"skipped_conversations": len(left_out)} if left_out else {}),
            },
            folder=folder,
            resume=before,
            trace=trace,
            on_progress=on_progress,
        )
        if folder is not None:
            forget(folder.path)
            if token_sample:
                _keep_sample(engine, tokens, folder.path)
        return done


def _keep_sample(engine: Engine, prompts: TokenizedPrompts, folder: Path) -> None:
    """Keep a look at the tokens of one prompt beside the profile: the first that is long enough, or the longest."""
    lengths = prompts.lengths[:CHUNK]
    enough = np.flatnonzero(lengths >= SAMPLE_TOKENS)
    ids = prompts.ids(int(enough[0] if len(enough) else lengths.argmax()))[:SAMPLE_TOKENS]
    try:
        seen = engine.distributions(ids)
    except EngineError:  # everything that was counted is saved; the report says that there is no sample
        return
    if seen is None:
        return
    model, ids = engine.model, ids[: seen.shape[1]]
    chosen = choose_layers(len(model.layers))
    experts = [model.experts[slot] for slot in chosen]
    sample = TokenSample(
        layers=tuple(model.layer_indices[slot] for slot in chosen),
        experts=tuple(experts),
        token_ids=ids.astype(np.int32),
        texts=tuple(engine.texts(ids)),
        probabilities=seen[chosen, :, : max(experts)],
        fingerprint=model.fingerprint,
    )
    save_sample(sample, folder)


@contextlib.contextmanager
def _spool_folder(folder: OutputFolder | None) -> Iterator[Path]:
    if folder is not None:
        yield folder.path
        return
    with tempfile.TemporaryDirectory(prefix="moescope-") as name:
        yield Path(name)


def profile(
    model: Any,
    prompts: Iterable[str | Mapping[str, Any] | Prompt],
    *,
    engine: str = "auto",
    tokenizer: Any = None,
    max_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    truncate: bool = False,
    skip_long: bool = False,
    probabilities: bool | str | None = None,
    coactivation: bool = False,
    output_dir: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    token_sample: bool = True,
    trace: TraceOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> RoutingProfile:
    """Record which experts a model chooses over a set of prompts.

    Example:
        >>> profile = moescope.profile("Qwen/Qwen3-30B-A3B", ["Once upon a time"], max_tokens=64)
        >>> profile.selection_counts.shape  # domains, phases, layers, experts
        (1, 2, 48, 128)

    Args:
        model: Folder of a checkpoint, hub id, or a loaded transformers model.
        prompts: Texts, mappings with the fields of a JSONL line (`prompt`, `messages` or `prompt_token_ids`, and
            `domain`), or `Prompt` objects.
        engine: "auto", "vllm" or "transformers"; auto takes vLLM where it and a GPU for it are there.
        tokenizer: Tokenizer of a loaded model; not needed for token ids.
        max_tokens: Tokens to generate for each prompt at most; 0 records the prompts alone.
        temperature: 0 is greedy.
        seed: Of the sampling and of the splits.
        max_prompt_tokens: Longest prompt; by default what fits the model's context.
        truncate: Cut longer prompts rather than refuse the set.
        skip_long: Leave longer prompts out rather than refuse the set; how many is in the run's settings.
        probabilities: Whose full distributions are summed: "off", "sample" or "all" (or False and True). By default
            all in transformers, and a sample of the tokens, 1 in 64, in vLLM.
        coactivation: Count which experts are chosen together.
        output_dir: Folder for `profile.safetensors`, saved as it grows; None keeps nothing on disk.
        force: Write into a folder that already holds results.
        resume: Go on with what an interrupted run left in `output_dir`.
        token_sample: With `output_dir`, keep the distributions of one prompt's first tokens, and their text, there.
        trace: Trace the tokens too: `moescope.TraceOptions(folder, …)`.
        on_progress: Called after each batch.
        options: Options of the engine; see `moescope.adapters.transformers.load_engine` and
            `moescope.adapters.vllm.VllmEngine`, e.g. `engine_args={"max_model_len": 8192}`.

    Returns:
        The profile; its counts have been held against the requests' own lengths.

    Raises:
        MoescopeError: With a sentence that names what is wrong and what would be right.
        Interrupted: Ctrl-C; its `profile` holds what had been counted.
    """
    if max_tokens < 0:
        raise OptionError(f"max_tokens must be at least 0, not {max_tokens}")
    if not 0 <= temperature < math.inf:
        raise OptionError(f"temperature must be a number from 0 up, not {temperature}")
    items = as_prompts(prompts)
    generation = Generation(max_tokens, temperature, seed)
    with contextlib.ExitStack() as stack:
        folder = None
        if output_dir is not None:
            folder = stack.enter_context(OutputFolder(Path(output_dir), force=force, resume=resume))
        opened = open_engine(
            model,
            engine=engine,
            tokenizer=tokenizer,
            probabilities=probabilities,
            coactivation=coactivation,
            **options,
        )
        stack.callback(opened.close)
        return profile_prompts(
            opened,
            items,
            generation,
            max_prompt_tokens=max_prompt_tokens,
            truncate=truncate,
            skip_long=skip_long,
            folder=folder,
            resume=resume,
            token_sample=token_sample,
            trace=trace,
            on_progress=on_progress,
        )
