"""The command line: parse, call, print."""

import inspect
import io
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moescope import __version__
from moescope.profiler.errors import ModelError, MoescopeError, OptionError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moescope.profiler.profile import ModelInfo, RoutingProfile
    from moescope.profiler.run import Progress as RunProgress
    from moescope.profiler.sidecars import RouterTables, TokenSample
    from moescope.profiler.trace_sums import TraceSums
    from moescope.profiler.weight_files import WeightRecord
    from moescope.profiler.weight_pass import PassProgress
    from moescope.stats.similarity import RouterSimilarity
    from moescope.stats.weight_similarity import WeightChange, WeightSimilarity
    from moescope.viz.report_data import ReportData

app = typer.Typer(
    help="Which experts does a Mixture-of-Experts model use, where, and is there a pattern to it?",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
traces = typer.Typer(
    help="Look into, check and export traces: the experts of every token, as `profile --trace` records them.",
    rich_markup_mode=None,
)
app.add_typer(traces, name="trace")
_console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
_MOST = 2**31 - 1
Found = TypeVar("Found")
#: Base of what the parser raises; typer brings its own copy of click or uses the package, by version.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class EngineName(StrEnum):
    """Engines."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


class ModelType(StrEnum):
    """Families that a checkpoint can be required to be of."""

    auto = "auto"
    minimax = "minimax"
    deepseek_v3 = "deepseek_v3"
    qwen3 = "qwen3"


#: How the names of a family's model classes begin.
_CLASSES = {ModelType.minimax: "MiniMax", ModelType.deepseek_v3: "DeepseekV3", ModelType.qwen3: "Qwen3"}


class Dtype(StrEnum):
    """Types that a model is loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class CacheDtype(StrEnum):
    """Types that an FP8 checkpoint is converted to."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class MeasureName(StrEnum):
    """What statistics rest on."""

    frequency = "frequency"
    probability = "probability"
    weight = "weight"


class Probabilities(StrEnum):
    """Whether full distributions are recorded."""

    off = "off"
    sample = "sample"
    all = "all"


class OutputFormat(StrEnum):
    """Formats of the structured data."""

    json = "json"
    jsonl = "jsonl"
    pickle = "pickle"


class ExportFormat(StrEnum):
    """Formats of `export`."""

    json = "json"
    jsonl = "jsonl"
    pickle = "pickle"
    csv = "csv"
    xlsx = "xlsx"
    parquet = "parquet"
    parity = "parity"
    tensorboard = "tensorboard"
    eplb = "eplb"
    sglang = "sglang"
    pruning = "pruning"
    calibration = "calibration"


class TraceFormat(StrEnum):
    """Formats of `trace export`."""

    parquet = "parquet"
    csv = "csv"


class WhenSlow(StrEnum):
    """What a trace does when the disk is too slow."""

    wait = "wait"
    sample = "sample"


Intervals = Annotated[
    str | None,
    typer.Option(
        "--periodic-intervals",
        help="Layer distances Δ to report, e.g. 12,24,36. By default 12,24,36 where the model is deep enough, "
        "otherwise every distance.",
    ),
]
DeltaMax = Annotated[int, typer.Option(min=1, max=10_000, help="Largest layer distance Δ of the correlation matrix.")]
Permutations = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1_000_000,
        help="Random orders of the experts, and simulations, that correlation and periods are held against; 0 leaves "
        "that out. [default: 1,000 to 10,000, fewer for larger models]",
    ),
]
Measure = Annotated[MeasureName, typer.Option(help="What correlation and periodic patterns rest on.")]


def _folder(text: str) -> Path:
    """A folder's name; an empty one, of a variable that is not set perhaps, would be the current folder."""
    if not text:
        raise OptionError("--output-dir is empty; name a folder, or leave the option out")
    return Path(text)


OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output-dir",
        "-o",
        help="Folder for the results; by default a new one named by the time.",
        parser=_folder,
        metavar="DIRECTORY",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that exists and is not empty.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads of a pass over weights; by default all cores.")
]
TokenizerCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the tokenizer that --tokenizer names.")
]
NoStructured = Annotated[
    bool, typer.Option("--disable-structured-output", help="Leave out analysis_data and analysis_summary.")
]
StructuredFormat = Annotated[
    OutputFormat, typer.Option("--output-format", help="Format of analysis_data; analysis_summary is always JSON.")
]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"moescope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def profile(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text, .txt (one document), .jsonl, .json (a list, ShareGPT's too), .csv, .parquet, "
            "hf:NAME[:[CONFIG:]SPLIT] (a dataset of the hub or of a folder), or - for standard input. "
            "Without: the embedded prompt set."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            "--model-path",
            help="Folder of a checkpoint, hub id, demo:stacked or demo:control. Without: demo:stacked.",
        ),
    ] = None,
    model_type: Annotated[
        ModelType, typer.Option(help="Family that the checkpoint must be of; auto takes any that is supported.")
    ] = ModelType.auto,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt as text, or a file; in addition to PROMPTS.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the model.")] = EngineName.auto,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max-length",
            min=0,
            max=_MOST,
            help="Tokens to generate for each prompt at most; 0 records the prompts alone. "
            "[default: 512, or half of a shorter context; 16 for the embedded prompt set]",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=_MOST, help="Seed of the sampling and of the splits.")] = 0,
    output_dir: OutputDir = None,
    force: Force = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --output-dir; nothing is counted twice.")
    ] = False,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            "--torch-dtype",
            help="Type to load the model in; auto: the checkpoint's, or float32 on a CPU if it fits.",
        ),
    ] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Prompts in a batch at most; auto fits memory.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, max=_MOST, help="Use the first LIMIT prompts.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Field or column that holds the prompt.")] = None,
    domain_field: Annotated[str | None, typer.Option(help="Field or column that holds the domain.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Longest prompt; by default what the model's context leaves.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut longer prompts instead of refusing them.")] = False,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave longer prompts out instead of refusing them.")
    ] = False,
    probabilities: Annotated[
        Probabilities | None,
        typer.Option(
            help="Whose full router distributions to record; sample is 1 token in 64. "
            "[default: all with transformers, sample with vllm]",
        ),
    ] = None,
    coactivation: Annotated[
        bool, typer.Option("--coactivation", help="Also count which experts are chosen together.")
    ] = False,
    token_sample: Annotated[
        bool,
        typer.Option(
            help="Keep the text and distributions of one prompt's first 50 tokens for the 3-D view, and a page on the "
            "trace's first tokens, or keep none."
        ),
    ] = True,
    measure: Measure = MeasureName.frequency,
    periodic_intervals: Intervals = None,
    delta_max: DeltaMax = 30,
    permutations: Permutations = None,
    disable_structured_output: NoStructured = False,
    output_format: StructuredFormat = OutputFormat.json,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option(help="Attention implementation of transformers, e.g. flash_attention_2.")
    ] = None,
    use_flash_attention: Annotated[
        bool, typer.Option("--use-flash-attention", help="FlashAttention, in transformers or in vLLM.")
    ] = False,
    analyze_correlation: Annotated[
        bool, typer.Option(help="Correlation between layers and periodic patterns, or leave them out.")
    ] = True,
    analyze_weights: Annotated[
        bool, typer.Option(help="Router similarity, or leave the router weights unread.")
    ] = True,
    enable_expert_similarity: Annotated[
        bool,
        typer.Option(
            "--enable-expert-similarity",
            help="Compare the experts' weights, too, when the prompts are done: one pass over the checkpoint's files.",
        ),
    ] = False,
    n_jobs: Jobs = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option("--engine-arg", help="NAME=VALUE, any argument of vllm.LLM; may be given several times."),
    ] = None,
    verify: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the requests whose routing is compared with vLLM's own capture, id by id."
        ),
    ] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate --max-tokens for every prompt, past its end (vllm).")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Also record the experts of every token, into this folder; auto: trace in --output-dir."
        ),
    ] = None,
    trace_sample: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the requests to trace; whole ones, drawn by the seed.")
    ] = 1.0,
    trace_weights: Annotated[bool, typer.Option("--trace-weights", help="Trace routing weights too.")] = False,
    trace_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest trace, e.g. 10GB; further requests are left out.")
    ] = None,
    trace_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Host memory that tokens on their way to the disk may take.")
    ] = "512MB",
    trace_when_slow: Annotated[
        WhenSlow, typer.Option(help="If the disk is too slow: wait for it, or sample, which leaves out whole requests.")
    ] = WhenSlow.wait,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of caches: load an FP8 checkpoint as `moescope cache` converted it (CPU)."),
    ] = None,
    dump_cache: Annotated[
        bool, typer.Option("--dump-cache", help="Convert the checkpoint into --cache-dir first, if it is not there.")
    ] = False,
    dump_only: Annotated[
        bool, typer.Option("--dump-only", help="Convert the checkpoint into --cache-dir, and stop.")
    ] = False,
) -> None:
    r"""Record which experts a model chooses over a set of prompts, and report on it.

    \b
    Examples:
      moescope profile                                            the embedded demo
      moescope profile --model demo:control                       its control
      moescope profile prompts.jsonl --model Qwen/Qwen3-30B-A3B
      moescope profile hf:openai/gsm8k:main:test --prompt-field question -m Qwen/Qwen3-30B-A3B --limit 100
      moescope profile "Once upon a time" -m ./checkpoint --max-tokens 128
      moescope profile prompts.jsonl -m ./checkpoint --enable-expert-similarity
      cat prompts.jsonl | moescope profile - -m ./checkpoint --max-tokens 0 -o results
      moescope profile prompts.jsonl -m Qwen/Qwen3-30B-A3B --engine vllm --verify 0.01 --engine-arg max_model_len=8192
      moescope profile prompts.jsonl -m ./checkpoint --trace auto --trace-sample 0.01 --trace-limit 10GB
      moescope profile prompts.jsonl -m MiniMaxAI/MiniMax-M2 --device cpu --cache-dir caches --dump-cache
    """
    intervals = _intervals(periodic_intervals)
    size = _batch_size(batch_size)
    prompts = [*(prompts or ()), *(prompt or ())]
    if use_flash_attention and attention:
        raise OptionError("--use-flash-attention and --attention both choose the attention; give one of them")
    if measure is MeasureName.probability and probabilities is Probabilities.off:
        raise OptionError("--measure probability needs the distributions that --probabilities off leaves out")
    if resume and output_dir is None:
        raise OptionError("--resume needs --output-dir, the folder of the interrupted run")
    if model == "":
        raise OptionError("--model is empty; name the folder of a checkpoint or a hub id, or leave the option out")
    if (dump_cache or dump_only) and cache_dir is None:
        raise OptionError(f"--dump-{'only' if dump_only else 'cache'} needs --cache-dir, the folder of caches")
    if dump_only and model is None:
        raise OptionError("--dump-only needs --model, the checkpoint to convert")
    if n_jobs is not None and not enable_expert_similarity:
        raise OptionError("--n-jobs is for --enable-expert-similarity; recording takes the threads of its engine")
    if enable_expert_similarity:
        _one_thread_a_product()
    for option, given in (
        ("--trace-sample", trace_sample != 1.0),
        ("--trace-weights", trace_weights),
        ("--trace-limit", trace_limit),
    ):
        if given and trace is None:
            raise OptionError(f"{option} needs --trace, the folder to write to")
    _prepare_engine()

    from moescope.adapters.session import check_cacheable, open_engine, parse_engine_args, profile_prompts
    from moescope.profiler.demo import prompts_path
    from moescope.profiler.engine import Generation
    from moescope.profiler.files import PARTIAL_NAME, PROFILE_NAME, OutputFolder
    from moescope.profiler.prompts import read_prompts
    from moescope.profiler.run import Interrupted
    from moescope.profiler.sidecars import load_sample, save_routers
    from moescope.profiler.trace_writer import TraceOptions
    from moescope.viz.wording import counted

    if dump_only and model is not None and cache_dir is not None:
        _build_cache(model, cache_dir, _cache_dtypes(dtype)[0], force=False)
        return
    name = model or "demo:stacked"
    opening: dict[str, Any] = {
        "device": device,
        "attention": attention,
        "engine_args": parse_engine_args(engine_arg or []),
        "verify": verify,
        "ignore_eos": ignore_eos,
    }
    if cache_dir is not None:
        check_cacheable(name, engine.value, opening)
    if model is None:
        _console.print("No --model: profiling the embedded demo model.")
    if not prompts:
        _console.print("No prompts: using the embedded prompt set.")
    sources = prompts or [str(prompts_path())]
    left_out: list[str] = []
    items = read_prompts(
        sources, prompt_field=prompt_field, domain_field=domain_field, limit=limit, left_out=left_out.append
    )
    path = output_dir or _new_folder()
    tracing = None
    if trace is not None:
        tracing = TraceOptions(
            path / "trace" if trace == "auto" else Path(trace),
            sample=trace_sample,
            weights=trace_weights,
            limit=None if trace_limit is None else _size("--trace-limit", trace_limit),
            memory=_size("--trace-memory", trace_memory),
            when_slow=trace_when_slow.value,
            force=force,
        )
    with OutputFolder(path, force=force, resume=resume) as folder:
        converted = None if cache_dir is None else _cached(name, cache_dir, dtype, dump=dump_cache)
        if converted is not None:
            opening["name"] = name
        with _console.status("Loading the model …"):
            opened = open_engine(
                converted or name,
                engine="transformers" if converted else engine.value,
                dtype=dtype.value,
                trust_remote_code=trust_remote_code,
                flash_attention=use_flash_attention,
                batch_size=size,
                probabilities=None if probabilities is None else probabilities.value,
                coactivation=coactivation,
                **opening,
            )
        _check_type(opened.model.architecture, model_type)
        tokens = max_tokens
        if tokens is None:
            tokens = 16 if not prompts else 512 if opened.context is None else min(512, opened.context // 2)
        layers = opened.model.layers
        _console.print(
            f"{opened.model.architecture}: {counted(len(layers), 'MoE layer')}, "
            f"{counted(max(opened.model.experts), 'expert')}, "
            f"top-{max(opened.model.top_k)}; {opened.info.name} {opened.info.version} on {opened.info.device}, "
            f"{opened.info.dtype}"
        )
        if opened.note:
            _console.print(opened.note)
        comparable = enable_expert_similarity and _comparable(name)
        try:
            with _progress() as (on_tokenized, on_progress):
                done = profile_prompts(
                    opened,
                    items,
                    Generation(tokens, temperature, seed),
                    max_prompt_tokens=max_prompt_tokens,
                    truncate=truncate,
                    skip_long=skip_long,
                    folder=folder,
                    resume=resume,
                    token_sample=token_sample,
                    trace=tracing,
                    left_out=left_out,
                    on_tokenized=on_tokenized,
                    on_progress=on_progress,
                )
        except Interrupted as stop:
            run = stop.profile.runs[0]
            if run.prompts:
                _console.print(
                    f"Interrupted after {run.prompts:,} of {run.prompts_total:,} prompts. "
                    f"Kept in {path / PARTIAL_NAME}; go on with the same command and --resume --output-dir {path}"
                )
            else:
                _console.print("Interrupted before the first batch was done; nothing was kept.")
            raise typer.Exit(130) from stop
        if left_out:
            _console.print(
                f"Left out {len(left_out):,} conversation{'s' * (len(left_out) > 1)} without a turn of the user "
                f"(first: {left_out[0]})."
            )
        router_weights = opened.router_weights() if analyze_weights else None
        opened.close()
        del opened  # a pass over weights wants its memory
        structured = None if disable_structured_output else output_format
        if tracing is not None and token_sample:
            _view_beside(tracing.folder, path, name, trust_remote_code)
        sample = load_sample(path, done.model)
        data = _report(
            done,
            path,
            measure,
            intervals,
            delta_max,
            structured,
            router_weights=router_weights,
            sample=sample,
            correlate=analyze_correlation,
            permutations=permutations,
        )
        if data.router_similarity is not None:
            save_routers(_tables(data.router_similarity, done.model.fingerprint), path)
        if tracing is not None:
            typer.echo(f"Wrote the trace {tracing.folder}: {_traced(done.runs[0].settings['trace'])}")
        typer.echo(f"Wrote {path / PROFILE_NAME} and the report beside it")
        if comparable:
            _add_weights(data, name, path, done.model.fingerprint, device, n_jobs, structured)


@app.command()
def cache(
    model: Annotated[str, typer.Argument(help="Folder of an FP8 checkpoint, or hub id of one that is downloaded.")],
    cache_dir: Annotated[Path, typer.Option(help="Folder of caches; the model gets a folder of its own in it.")],
    dtype: Annotated[
        CacheDtype, typer.Option(help="Type to convert to: half the size, or without rounding.")
    ] = CacheDtype.bfloat16,
    force: Annotated[bool, typer.Option("--force", help="Convert again what is there.")] = False,
) -> None:
    r"""Convert an FP8 checkpoint once, scales applied, to files that run on any CPU.

    An interrupted conversion goes on with the same command.

    \b
    Example:
      moescope cache MiniMaxAI/MiniMax-M2 --cache-dir caches
    """
    _prepare_engine()
    _build_cache(model, cache_dir, dtype.value, force=force)


@app.command()
def report(
    profiles: Annotated[
        list[Path],
        typer.Argument(help="Profile files of one model, several are added up; or one weights.safetensors."),
    ],
    output_dir: OutputDir = None,
    force: Force = False,
    measure: Measure = MeasureName.frequency,
    periodic_intervals: Intervals = None,
    delta_max: DeltaMax = 30,
    permutations: Permutations = None,
    disable_structured_output: NoStructured = False,
    output_format: StructuredFormat = OutputFormat.json,
) -> None:
    r"""Draw the figures and write summary and structured data of profiles, or of a pass over weights.

    \b
    Examples:
      moescope report results/profile.safetensors --measure probability -o report
      moescope report weights/weights.safetensors -o pages
    """
    _one_thread_a_product()

    from moescope.profiler.files import OutputFolder, load_profile
    from moescope.profiler.profile import merge as merge_profiles
    from moescope.profiler.sidecars import load_routers, load_sample
    from moescope.profiler.weight_files import holds_weights, load_weights

    intervals = _intervals(periodic_intervals)
    weighed = next((path for path in profiles if holds_weights(path)), None)
    if weighed is not None:
        if len(profiles) > 1:
            raise OptionError(f"{weighed} holds weights and no profile; report on it by itself")
        record = load_weights(weighed)
        path = output_dir or _new_folder("moescope_weights")
        with OutputFolder(path, force=force):
            _report_weights(record, path, None, structured=not disable_structured_output)
        typer.echo(f"Wrote the pages in {path}")
        return
    loaded = merge_profiles(load_profile(path) for path in profiles)
    routers, sample = _beside(load_routers, profiles, loaded), _beside(load_sample, profiles, loaded)
    weights = _weights_beside(profiles, loaded)
    path = output_dir or _new_folder()
    with OutputFolder(path, force=force):
        structured = None if disable_structured_output else output_format
        _report(
            loaded,
            path,
            measure,
            intervals,
            delta_max,
            structured,
            routers=routers,
            sample=sample,
            weights=weights,
            permutations=permutations,
        )
    typer.echo(f"Wrote the report in {path}")


@app.command()
def merge(
    profiles: Annotated[
        list[Path],
        typer.Argument(help="Profile files of one model, or the folder that the ranks of a recording server wrote."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    r"""Add up profiles of one model; in any order the sums are the same.

    \b
    Example:
      moescope merge monday/profile.safetensors tuesday/profile.safetensors -o both.safetensors
    """
    from moescope.adapters.vllm_runs import load_runs
    from moescope.profiler.files import load_profile, save_profile
    from moescope.profiler.profile import merge as merge_profiles

    if output.exists() and not output.is_file():
        raise OutputError(f"{output} is not a file that can be replaced; choose another name")
    if output.exists() and not force:
        raise OutputError(f"{output} exists; choose another name, or --force to overwrite")
    merged = merge_profiles(load_runs(path) if path.is_dir() else load_profile(path) for path in profiles)
    save_profile(merged, output)
    typer.echo(f"Wrote {output}: {len(merged.runs)} runs, {merged.tokens:,} tokens")


@app.command()
def export(
    profiles: Annotated[list[Path], typer.Argument(help="Profile files of one model; several are added up.")],
    export_format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="json, jsonl, pickle: structured data. csv, parquet: a folder of tables; xlsx: a sheet each. "
            "parity: analysis_data.json by the earlier tool's definitions. tensorboard: a folder of events. "
            "eplb, sglang: expert load for load balancers. pruning: experts by use, calibration: experts that saw few "
            "tokens, both as csv.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, or folder for csv, parquet and tensorboard.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file, or the files of an earlier export in the folder.")
    ] = False,
    measure: Annotated[
        MeasureName | None,
        typer.Option(help="What correlation and periodic patterns rest on; not for parity. [default: frequency]"),
    ] = None,
    periodic_intervals: Intervals = None,
    delta_max: DeltaMax = 30,
    permutations: Permutations = None,
    routed_scaling_factor: Annotated[
        float | None,
        typer.Option(
            help="For parity with a sigmoid router: what the model multiplies its routing weights with, "
            "e.g. 2.5 for DeepSeek-V3. [default: 1.0]"
        ),
    ] = None,
    least_tokens: Annotated[
        int | None,
        typer.Option(help="For calibration: list experts that saw fewer tokens than this. [default: 128]"),
    ] = None,
) -> None:
    r"""Write profiles in formats that other tools read.

    \b
    Examples:
      moescope export results/profile.safetensors --format xlsx -o experts.xlsx
      moescope export results/profile.safetensors --format parquet -o tables
      moescope export monday/profile.safetensors tuesday/profile.safetensors --format csv -o tables
      moescope export results/profile.safetensors --format parity --routed-scaling-factor 2.5 -o analysis_data.json
      moescope export results/profile.safetensors --format tensorboard -o runs/profile
      moescope export results/profile.safetensors --format sglang -o expert_load.json
      moescope export results/profile.safetensors --format calibration --least-tokens 512 -o uncovered.csv
    """
    _one_thread_a_product()

    from moescope.profiler.files import load_profile
    from moescope.profiler.profile import merge as merge_profiles
    from moescope.profiler.sidecars import load_routers
    from moescope.viz.errors import ExportError
    from moescope.viz.export import check_target
    from moescope.viz.export import export as write_export
    from moescope.viz.structured import SUFFIXES

    intervals = _intervals(periodic_intervals)
    if export_format is ExportFormat.xlsx and output.suffix.lower() != ".xlsx":
        raise OptionError(f"--output {output}: Excel opens files whose name ends in .xlsx; write -o {output}.xlsx")
    if export_format is ExportFormat.sglang and output.suffix != ".json":
        raise OptionError(f"--output {output}: SGLang reads a file whose name ends in .json; write -o {output}.json")
    try:
        check_target(output, export_format.value, force=force)
        loaded = merge_profiles(load_profile(path) for path in profiles)
        with _console.status(f"Writing {export_format.value} …"):
            written = write_export(
                loaded,
                output,
                export_format.value,
                force=force,
                measure=None if measure is None else measure.value,
                intervals=intervals,
                delta_max=delta_max,
                permutations=permutations,
                routed_scaling_factor=routed_scaling_factor,
                routers=_beside(load_routers, profiles, loaded),
                weights=_weights_beside(profiles, loaded) if export_format.value in SUFFIXES else None,
                least_tokens=least_tokens,
            )
    except ExportError as error:
        raise OutputError(str(error)) from error
    for name, reason in written.left_out:
        typer.echo(f"left out {name}: {reason}")
    typer.echo(f"Wrote {written.path}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A profile file, or a weights.safetensors.")],
) -> None:
    r"""Say what a profile holds, and check that its counts add up; or what a pass over weights has left.

    \b
    Examples:
      moescope info results/profile.safetensors
      moescope info weights/weights.safetensors
    """
    from moescope.profiler.files import load_profile
    from moescope.profiler.weight_files import holds_weights, load_weights

    if holds_weights(file):
        from moescope.viz.weight_analysis import about

        _print_rows(about(load_weights(file).run))
        return
    found = load_profile(file)
    model = found.model
    layers = model.layer_indices
    rows = {
        "model": f"{model.id} ({model.architecture}, {model.scoring})",
        "MoE layers": f"{len(layers)} ({layers[0]}–{layers[-1]})",
        "experts": f"{max(model.experts)}, top-{max(model.top_k)}",
        "tokens": f"{found.tokens:,} ("
        + ", ".join(f"{p} {n:,}" for p, n in zip(found.phases, found.token_counts.sum(axis=0).tolist(), strict=True))
        + ")",
        "domains": f"{len(found.domains)} ({', '.join(found.domains)})",
        "runs": f"{len(found.runs)}, {sum(run.prompts for run in found.runs):,} prompts"
        + ("" if found.complete else "; interrupted"),
        "holds": ", ".join(found.arrays()),
        "counts": "add up: selections are k·T in every layer, domain and phase",
    }
    _print_rows(rows)


@app.command()
def compare(
    profiles: Annotated[
        list[Path], typer.Argument(help="Two profile files or more; the first is the reference of all others.")
    ],
    measure: Annotated[MeasureName, typer.Option(help="What is compared.")] = MeasureName.frequency,
    domain: Annotated[str | None, typer.Option(help="Compare this domain of each profile only.")] = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Compare each domain of one profile with the rest of it.")
    ] = False,
    top: Annotated[
        int, typer.Option(min=1, max=100_000, help="Experts that moved most to list; the figure shows 20 at most.")
    ] = 20,
    labels: Annotated[
        str | None, typer.Option(help="What to call the profiles, e.g. base,tuned. By default their folders or files.")
    ] = None,
    output_dir: OutputDir = None,
    force: Force = False,
) -> None:
    r"""Say where profiles differ, layer by layer and expert by expert, and whether by more than a run's own noise.

    \b
    Examples:
      moescope compare base/profile.safetensors tuned/profile.safetensors --labels base,tuned
      moescope compare monday.safetensors tuesday.safetensors friday.safetensors -o drift
      moescope compare base/profile.safetensors tuned/profile.safetensors --domain code
      moescope compare results/profile.safetensors --by-domain
    """
    from moescope.profiler.files import PROFILE_NAME, OutputFolder, load_profile
    from moescope.viz.comparison_data import compare_profiles, distinct_names
    from moescope.viz.comparison_report import findings, write_comparison

    if by_domain and domain is not None:
        raise OptionError("--domain and --by-domain exclude each other; choose one domain, or each in turn")
    if by_domain and len(profiles) > 1:
        raise OptionError("--by-domain compares the domains of one profile; merge several with `moescope merge` first")
    if not by_domain and len(profiles) < 2:
        raise OptionError(
            f"nothing to compare {profiles[0]} with; name two profiles, or --by-domain to compare its domains"
        )
    names = _labels(labels, len(profiles)) or distinct_names(profiles, PROFILE_NAME)
    loaded = [load_profile(path) for path in profiles]
    path = output_dir or _new_folder("moescope_compare")
    with OutputFolder(path, force=force):
        try:
            data = compare_profiles(loaded, names, measure=measure.value, domain=domain, by_domain=by_domain, top=top)
        except ValueError as error:
            raise OptionError(str(error)) from error
        try:
            write_comparison(data, path)
        except OSError as error:
            raise OutputError(f"cannot write the comparison into {path}: {error.strerror or error}") from error
    for line in findings(data):
        typer.echo(line)
    typer.echo(f"Wrote the comparison in {path}")


@app.command()
def weights(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, demo:stacked or demo:control.")],
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint of the same shape: what has changed since, expert by expert.")
    ] = None,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="Read a sample of the weights: a quick answer that says where to look.")
    ] = False,
    n_jobs: Jobs = None,
    layers: Annotated[str | None, typer.Option(help="Layers to take, e.g. 3-10,20; by default all that route.")] = None,
    delta: Annotated[
        str | None,
        typer.Option(
            help="Layer distances Δ to compare at, and no others, e.g. 12,24. By default all pairs of layers."
        ),
    ] = None,
    match_pairs: Annotated[
        int, typer.Option(min=0, max=10_000, help="Pairs of layers whose experts are matched all against all.")
    ] = 12,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output_dir: OutputDir = None,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted pass in --output-dir.")] = False,
    disable_structured_output: Annotated[
        bool, typer.Option("--disable-structured-output", help="Leave out weights.json.")
    ] = False,
) -> None:
    r"""Say how alike routers and experts of different layers are, from the files alone, without loading the model.

    \b
    Examples:
      moescope weights demo:stacked
      moescope weights Qwen/Qwen3-30B-A3B -o weights
      moescope weights ./checkpoint --sketch
      moescope weights ./checkpoint --delta 12,24 --match-pairs 0
      moescope weights ./tuned --against ./base
    """
    _one_thread_a_product()

    from moescope.adapters.weighing import weigh
    from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, WEIGHTS_NAME, OutputFolder

    asked, chosen = _intervals(delta, "--delta"), _numbers("--layers", layers, 99_999)
    if resume and output_dir is None:
        raise OptionError("--resume needs --output-dir, the folder of the interrupted pass")
    path = output_dir or _new_folder("moescope_weights")
    with OutputFolder(path, force=force, resume=resume):
        try:
            with _weight_progress() as on_progress:
                record = weigh(
                    model,
                    against=against,
                    layers=None if chosen is None else sorted({layer for run in chosen for layer in run}),
                    deltas=asked,
                    match_pairs=match_pairs,
                    sketch=sketch,
                    device=device,
                    n_jobs=n_jobs,
                    folder=path,
                    resume=resume,
                    on_progress=on_progress,
                )
            _report_weights(record, path, n_jobs, structured=not disable_structured_output)
        except KeyboardInterrupt as stop:
            if (path / PARTIAL_WEIGHTS_NAME).exists():
                kept = f"What was read is kept in {path / PARTIAL_WEIGHTS_NAME}"
                _console.print(f"Interrupted. {kept}; go on with the same command and --resume --output-dir {path}")
            elif (path / WEIGHTS_NAME).exists():
                _console.print(f"Interrupted. {_GO_ON_FROM_SUMS}")
            raise typer.Exit(130) from stop
    typer.echo(f"Wrote {path / WEIGHTS_NAME} and weights.html beside it")
    spoilt = record.spoilt()
    if spoilt:
        more = f" and {len(spoilt) - 10} more" if len(spoilt) > 10 else ""
        raise ModelError(f"weights that are not finite were left out of the results: {', '.join(spoilt[:10])}{more}")


def _report_weights(
    record: "WeightRecord", folder: Path, n_jobs: int | None, *, structured: bool
) -> "WeightSimilarity | WeightChange":
    """Compute what the sums say, write it and print it."""
    from moescope.viz.weights_report import write_weights

    result = _matched(record, n_jobs)
    try:
        write_weights(result, folder, structured)
    except OSError as error:
        raise OutputError(f"cannot write the pages into {folder}: {error.strerror or error}") from error
    _print_weights(result)
    return result


_GO_ON_FROM_SUMS = "weights.safetensors is complete; `moescope report` goes on from it."


def _matched(record: "WeightRecord", n_jobs: int | None) -> "WeightSimilarity | WeightChange":
    from moescope.profiler.weight_pass import cores
    from moescope.viz.weight_analysis import analyze_weights

    try:
        with _console.status("Matching experts …"):
            return analyze_weights(record, n_jobs or cores())
    except KeyboardInterrupt as stop:
        _console.print(f"Interrupted. {_GO_ON_FROM_SUMS}")
        raise typer.Exit(130) from stop


def _comparable(model: str) -> bool:
    """Whether the experts' weights can be read; says why not, before anything is recorded."""
    from moescope.adapters.weighing import open_weights

    try:
        with open_weights(model):
            return True
    except ModelError as error:
        _console.print(f"Going on without --enable-expert-similarity: {error}")
        return False


def _add_weights(
    data: "ReportData",
    model: str,
    folder: Path,
    fingerprint: str | None,
    device: str,
    n_jobs: int | None,
    structured: OutputFormat | None,
) -> None:
    """Weigh the model of a report that is written, and write it again with what the experts' weights say."""
    from moescope.adapters.weighing import weigh
    from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, PROFILE_NAME, WEIGHTS_NAME
    from moescope.profiler.weight_files import save_weights
    from moescope.stats.weight_similarity import WeightSimilarity

    try:
        with _weight_progress() as on_progress:
            record = weigh(model, device=device, n_jobs=n_jobs, folder=folder, on_progress=on_progress)
    except KeyboardInterrupt as stop:
        kept = "resume" if (folder / PARTIAL_WEIGHTS_NAME).exists() else "force"
        _console.print(
            f"Interrupted. Profile and report are complete but for the experts' weights; to add them: "
            f"moescope weights {model} --{kept} -o {folder}, "
            f"then moescope report {folder / PROFILE_NAME} --force -o {folder}"
        )
        raise typer.Exit(130) from stop
    if fingerprint is not None:  # of the routers as they were loaded: float16 rounds them otherwise than the files do
        record = replace(record, run=replace(record.run, fingerprint=fingerprint))
        save_weights(record, folder / WEIGHTS_NAME)
    result = _matched(record, n_jobs)
    if isinstance(result, WeightSimilarity):
        _write_report(replace(data, weights=result), folder, structured)
    _print_weights(result)
    typer.echo(f"Wrote {folder / WEIGHTS_NAME}; the report has it")


def _weights_beside(profiles: Sequence[Path], of: "RoutingProfile") -> "WeightSimilarity | None":
    """What the experts' weights say that lie beside one of the profiles."""
    from moescope.profiler.weight_files import load_weights_beside
    from moescope.stats.weight_similarity import WeightSimilarity

    record = _beside(load_weights_beside, profiles, of)
    result = None if record is None else _matched(record, None)
    return result if isinstance(result, WeightSimilarity) else None


@traces.command("info")
def trace_info(folder: Annotated[Path, typer.Argument(help="Folder of a trace.")]) -> None:
    r"""Say what a trace holds, without reading its tokens.

    \b
    Example:
      moescope trace info results/trace
    """
    from moescope.profiler.trace import Trace
    from moescope.viz.wording import in_bytes

    found = Trace(folder)
    about, index = found.about, found.index
    size = sum(shard.bytes for shard in index.shards)
    model, layers = about.model, about.model.layer_indices
    ended = {True: "complete", False: "stopped before its end", None: "cut off, or still going on"}[index.complete]
    rows = {
        "model": f"{model.id} ({model.architecture})",
        "MoE layers": f"{len(layers)} ({layers[0]}–{layers[-1]})",
        "experts": f"{max(model.experts)}, top-{max(model.top_k)}",
        "run": f"{about.run.created}, {about.run.engine.name} {about.run.engine.version}; {ended}",
        "requests": _traced({field: getattr(index.last, field) for field in index.last.__slots__}),
        "tokens": f"{found.tokens:,}"
        + (f"; {found.unfinished:,} more of a batch that was not finished" if found.unfinished else ""),
        "domains": f"{len(about.domains)} ({', '.join(about.domains)})",
        "holds": ", ".join(about.columns),
        "shards": f"{len(index.shards):,}, {in_bytes(size)}, {size / max(index.rows, 1):,.1f} bytes a token",
    }
    for name, value in rows.items():
        typer.echo(f"{name:<11}{value}")


@traces.command("head")
def trace_head(
    folder: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100_000, help="Tokens to show.")] = 10,
    request: Annotated[int | None, typer.Option(min=0, max=_MOST, help="Show this request's tokens.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, max=_MOST, help="Show this layer alone.")] = None,
) -> None:
    r"""Show the first tokens of a trace, or of a request in it.

    \b
    Example:
      moescope trace head results/trace --request 3 --layer 12
    """
    from moescope.profiler.profile import PHASES
    from moescope.profiler.trace import Trace

    found = Trace(folder)
    layers = found.about.model.layers
    slots = [slot for slot, info in enumerate(layers) if layer in (None, info.index)]
    if not slots:
        raise OptionError(f"--layer {layer}: the MoE layers are {', '.join(str(info.index) for info in layers)}")
    parts = found.rows(0, count) if request is None else [found.request(request)]
    typer.echo("request position    token phase   domain      experts by layer")
    for rows in parts:
        for i in range(min(len(rows), count)):
            chosen = "  ".join(
                f"{layers[s].index}: {' '.join(map(str, rows.experts[i, s, : layers[s].top_k]))}" for s in slots
            )
            typer.echo(
                f"{rows.request[i]:>7} {rows.position[i]:>8} {rows.token[i]:>8} {PHASES[rows.phase[i]]:<7} "
                f"{found.about.domains[rows.domain[i]]:<11} {chosen}"
            )


@traces.command("verify")
def trace_verify(folder: Annotated[Path, typer.Argument(help="Folder of a trace.")]) -> None:
    r"""Read all of a trace and check it: checksums, ids, and that each token of a request is there once.

    \b
    Example:
      moescope trace verify results/trace
    """
    from moescope.profiler.errors import TraceError
    from moescope.profiler.trace import Trace
    from moescope.viz.wording import counted

    found = Trace(folder)
    result = found.verify()
    for name in result.unlisted:
        typer.echo(f"{name} is not in the index: the run was cut off before it was finished")
    if result.damaged:
        for _, fault in result.damaged[1:]:
            typer.echo(fault)
        raise TraceError(
            f"{result.damaged[0][1]}; damaged: {len(result.damaged):,} of {counted(len(found.index.shards), 'shard')}; "
            f"{counted(result.rows_lost, 'token')} lost, {result.rows:,} verified"
        )
    unfinished = f", {result.unfinished:,} of a batch that was not finished" if result.unfinished else ""
    typer.echo(f"Verified {counted(result.rows, 'token')} in {counted(len(found.index.shards), 'shard')}{unfinished}")


@traces.command("export")
def trace_export(
    folder: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    export_format: Annotated[TraceFormat, typer.Option("--format", help="A table with a row for each token.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    r"""Write a trace as a table that other tools read.

    \b
    Example:
      moescope trace export results/trace --format parquet -o trace.parquet
    """
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_export import export_trace
    from moescope.viz.wording import counted

    rows = export_trace(Trace(folder), output, export_format.value, force=force)
    typer.echo(f"Wrote {output}: {counted(rows, 'token')}")


@traces.command("view")
def trace_view(
    folder: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    request: Annotated[
        list[int] | None,
        typer.Option(min=0, max=_MOST, help="Show this request; may be given several times. By default the first."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Tokens to show at most.")] = 5_000,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of a checkpoint, or hub id, whose tokenizer gives tokens their text; by default that of the "
            "model that was traced, if it is in your own folder or in the local hub cache.",
        ),
    ] = None,
    trust_remote_code: TokenizerCode = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; by default DIR_view.html beside the trace.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    r"""Write a page that shows the routing of single tokens: text in the colours of its experts, paths, surfaces.

    \b
    Examples:
      moescope trace view results/trace
      moescope trace view results/trace --request 3 --request 14 --tokenizer Qwen/Qwen3-30B-A3B -o view.html
    """
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_excerpt import excerpt
    from moescope.viz.trace_view import excerpt_view
    from moescope.viz.trace_view_page import write_trace_view
    from moescope.viz.wording import counted

    _check_trust(trust_remote_code, tokenizer)
    file = output or folder.absolute().with_name(f"{folder.absolute().name}_view.html")
    if file.exists() and (not force or not file.is_file()):
        raise OutputError(f"{file} exists; choose another name, or --force to overwrite")
    found = excerpt(Trace(folder), request, tokens)
    opened, remarks = _tokenizer(found.about.model.id, found.rows.token, tokenizer, trust_remote_code)
    for remark in remarks:
        _console.print(remark)
    view = excerpt_view(found, opened, remarks)
    try:
        write_trace_view(view, file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
    typer.echo(f"Wrote {file}: {counted(len(view.token), 'token')} of {counted(len(view.requests), 'request')}")


@traces.command("analyze")
def trace_analyze(
    folder: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    output_dir: OutputDir = None,
    requests: Annotated[str | None, typer.Option(help="Requests to analyse, e.g. 0-99,200; by default all.")] = None,
    vocabulary: Annotated[
        int, typer.Option(min=2, max=2048, help="Most frequent token ids whose experts are looked at.")
    ] = 256,
    pair_tokens: Annotated[
        int, typer.Option(min=2, max=_MOST, help="Tokens, spread evenly, that pairs of layers are compared on.")
    ] = 50_000,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of a checkpoint, or hub id, whose tokenizer gives token ids their text; by default that of "
            "the model that was traced, if it is in your own folder or in the local hub cache.",
        ),
    ] = None,
    trust_remote_code: TokenizerCode = False,
    n_jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads; by default all cores, 4 at most: each takes memory.")
    ] = None,
    force: Force = False,
    disable_structured_output: Annotated[
        bool, typer.Option("--disable-structured-output", help="Leave out trace.json.")
    ] = False,
) -> None:
    r"""Say what the tokens of a trace tell: repetition, layers that agree, token ids, positions, beside chance.

    \b
    Example:
      moescope trace analyze results/trace -o results/tokens
    """
    _one_thread_a_product()

    from moescope.profiler.files import OutputFolder
    from moescope.profiler.ranges import Ranges
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_sums import sum_trace
    from moescope.profiler.weight_pass import cores
    from moescope.viz.trace_analysis import analyze_trace
    from moescope.viz.trace_findings import trace_findings, trace_notes
    from moescope.viz.trace_report import write_trace_analysis
    from moescope.viz.wording import counted

    _check_trust(trust_remote_code, tokenizer)
    found, chosen, jobs = Trace(folder), _numbers("--requests", requests, 2**32 - 1), n_jobs or min(cores(), 4)
    path = output_dir or _new_folder("moescope_trace")
    if path.exists() and path.samefile(folder):
        raise OptionError(f"--output-dir {path} is the trace itself; choose another folder")
    with OutputFolder(path, force=force):
        with _bar("Reading tokens") as show:
            sums = sum_trace(
                found,
                requests=chosen,
                vocabulary=vocabulary,
                pair_tokens=pair_tokens,
                n_jobs=jobs,
                on_progress=lambda done, total: show(
                    "Reading tokens", f"{done:,}/{total:,} tokens", completed=done, total=total
                ),
            )
        with _console.status("Comparing layers …"):
            analysis = analyze_trace(sums, _texts(sums, tokenizer, trust_remote_code), jobs)
        try:
            written = write_trace_analysis(analysis, path, structured=not disable_structured_output)
        except OSError as error:
            raise OutputError(f"cannot write the page into {path}: {error.strerror or error}") from error
    typer.echo(
        f"{counted(analysis.tokens, 'token')} of {counted(analysis.requests, 'request')}, "
        f"{counted(len(analysis.layers), 'MoE layer')}"
    )
    asked = analysis.requests if chosen is None else Ranges.of(chosen).count
    if asked > analysis.requests:
        typer.echo(f"Not in the trace: {asked - analysis.requests:,} of the {asked:,} requests asked for")
    for sentence in (*trace_findings(analysis), *trace_notes(analysis)):
        typer.echo(sentence)
    typer.echo(f"Wrote {' and '.join(map(str, written))}")


def _check_trust(trusted: bool, named: str | None) -> None:
    if trusted and named is None:
        raise OptionError("--trust-remote-code needs --tokenizer: no code runs that a trace names")


def _view_beside(folder: Path, path: Path, model: str, trusted: bool) -> None:
    """Write the token view of a run's trace beside its report, which links to it; an empty trace has none."""
    from moescope.adapters.tokenizers import open_tokenizer
    from moescope.profiler.sidecars import TRACE_VIEW_NAME
    from moescope.profiler.trace import Trace
    from moescope.profiler.trace_excerpt import excerpt
    from moescope.viz.trace_view import TOKENS, excerpt_view
    from moescope.viz.trace_view_page import write_trace_view

    trace = Trace(folder)
    if trace.tokens:
        found = excerpt(trace, None, TOKENS)
        opened, remarks = _text_or_ids(
            model, found.rows.token, lambda model: open_tokenizer(model, local=True, trust_remote_code=trusted)
        )
        write_trace_view(excerpt_view(found, opened, remarks), path / TRACE_VIEW_NAME)


def _texts(sums: "TraceSums", named: str | None, trusted: bool) -> dict[int, str]:
    """Text of the frequent token ids, by the tokenizer that is named or that of the traced model; none without one."""
    from moescope.adapters.encoding import token_texts

    opened, _ = _tokenizer(sums.about.model.id, sums.frequent, named, trusted)
    ids = sums.frequent.tolist()
    return {} if opened is None else dict(zip(ids, token_texts(opened, ids), strict=True))


def _tokenizer(
    traced: str, token_ids: "NDArray[np.integer[Any]]", named: str | None, trusted: bool
) -> tuple[Any, list[str]]:
    """The tokenizer of the model that is named or was traced; without a name, None and the reason where it fails."""
    _prepare_engine()

    from moescope.adapters.tokenizers import check_vocabulary, open_tokenizer, stored_tokenizer

    if named is None:
        return _text_or_ids(traced, token_ids, stored_tokenizer)
    try:
        opened = open_tokenizer(named, trust_remote_code=trusted)
        check_vocabulary(opened, token_ids, named)
    except ModelError as error:
        raise ModelError(f"--tokenizer {error}") from error
    return opened, []


def _text_or_ids(
    model: str, token_ids: "NDArray[np.integer[Any]]", open_: Callable[[str], Any]
) -> tuple[Any, list[str]]:
    """A model's tokenizer, or None and why there is none for these ids."""
    from moescope.adapters.tokenizers import check_vocabulary

    try:
        opened = open_(model)
        check_vocabulary(opened, token_ids, model)
    except ModelError as error:
        return None, [f"Tokens are shown by their ids: {error}. --tokenizer MODEL names another."]
    return opened, []


def _traced(counts: Mapping[str, Any]) -> str:
    """How many requests a trace holds, and why it leaves out the others."""
    from moescope.viz.wording import counted

    reasons = {"sampled_out": "by the sample", "slow": "as the disk was too slow", "limited": "by the limit"}
    left_out = [f"{counts[name]:,} left out {why}" for name, why in reasons.items() if counts[name]]
    share = counts["traced"] / max(counts["requests"], 1)
    return ", ".join([f"{counts['traced']:,} of {counted(counts['requests'], 'request')} ({share:.1%})", *left_out])


def _cache_dtypes(dtype: Dtype) -> tuple[str, ...]:
    """Types of the caches that serve a model loaded in `dtype`, the one to build first."""
    both = (CacheDtype.bfloat16.value, CacheDtype.float32.value)
    return {Dtype.auto: both, Dtype.bfloat16: both}.get(dtype, both[1:])


def _cached(model: str, cache_dir: Path, dtype: Dtype, *, dump: bool) -> str | None:
    """The folder of the model's cache, built if asked for; None if the model is to be loaded as it is."""
    from moescope.adapters.model_cache import find_cache
    from moescope.adapters.session import DEMO

    dtypes = _cache_dtypes(dtype)
    if model.startswith(DEMO):
        _console.print(f"Nothing to convert: {model} is not FP8.")
        return None
    found = next((path for kind in dtypes if (path := find_cache(model, cache_dir, kind)) is not None), None)
    if found is None and dump:
        return _build_cache(model, cache_dir, dtypes[0], force=False)
    if found is None:
        _console.print(f"No cache of {model} in {cache_dir}: loading it as it is; --dump-cache would build one.")
        return None
    _console.print(f"Loading {model} from its cache {found}")
    return str(found)


def _build_cache(model: str, cache_dir: Path, dtype: str, *, force: bool) -> str | None:
    """Convert a checkpoint and say so; None if there is nothing to convert."""
    from moescope.adapters.model_cache import build_cache, find_cache

    if not force and (found := find_cache(model, cache_dir, dtype)) is not None:
        typer.echo(f"{found} is there and complete; --force converts it again")
        return str(found)
    try:
        with _converting() as on_progress:
            path = build_cache(model, cache_dir, dtype, force=force, on_progress=on_progress)
    except KeyboardInterrupt as stop:
        _console.print("Interrupted. Finished files are kept; the same command goes on with them.")
        raise typer.Exit(130) from stop
    if path is None:
        typer.echo(f"Nothing to convert: {model} is not FP8; it can be profiled as it is")
        return None
    typer.echo(f"Wrote {path}")
    return str(path)


def _report(
    done: "RoutingProfile",
    folder: Path,
    measure: MeasureName,
    intervals: tuple[int, ...] | None,
    delta_max: int,
    structured: OutputFormat | None,
    *,
    router_weights: Sequence[Any] | None = None,
    routers: "RouterTables | None" = None,
    sample: "TokenSample | None" = None,
    weights: "WeightSimilarity | None" = None,
    correlate: bool = True,
    permutations: int | None = None,
) -> "ReportData":
    from moescope.viz.analysis import analyze

    try:
        data = analyze(
            done,
            measure=measure.value,
            intervals=intervals,
            delta_max=delta_max,
            correlate=correlate,
            router_weights=router_weights,
            routers=routers,
            sample=sample,
            weights=weights,
            permutations=permutations,
        )
    except ValueError as error:
        raise OptionError(f"--measure {measure.value}: {error}") from error
    _write_report(data, folder, structured)
    _print_findings(data)
    return data


def _write_report(data: "ReportData", folder: Path, structured: OutputFormat | None) -> None:
    from moescope.viz.report import write_report

    try:
        chosen = OutputFormat.json if structured is None else structured
        write_report(data, folder, structured=structured is not None, structured_format=chosen.value)
    except OSError as error:
        raise OutputError(f"cannot write the report into {folder}: {error.strerror or error}") from error


def _beside(
    load: Callable[[Path, "ModelInfo"], Found | None], profiles: Sequence[Path], of: "RoutingProfile"
) -> Found | None:
    """What lies beside the first of the profiles that has it."""
    folders = dict.fromkeys(profile.parent for profile in profiles)
    return next((found for folder in folders if (found := load(folder, of.model)) is not None), None)


def _tables(similarity: "RouterSimilarity", fingerprint: str | None) -> "RouterTables":
    from moescope.profiler.sidecars import RouterTables

    return RouterTables(
        layers=similarity.layers,
        experts=similarity.experts,
        cosine=similarity.cosine,
        row_norms=similarity.row_norms,
        row_cosine=similarity.row_cosine_pairs,
        fingerprint=fingerprint,
    )


def _print_findings(data: "ReportData") -> None:
    from moescope.viz.certainty import period_finding, standing
    from moescope.viz.findings import caution

    spread = ", ".join(f"{name} {count:,}" for name, count in data.tokens_by_phase.items())
    typer.echo(f"{data.tokens:,} tokens ({spread}); selections are k·T in every one of {len(data.layers)} layers")
    for remark in data.remarks:
        typer.echo(remark)
    for pattern in data.periodic.patterns:
        if pattern.num_pairs:
            pairs = "pair" if pattern.num_pairs == 1 else "pairs"
            called = standing(pattern, data.nulls)
            found = f"mean r = {pattern.mean:+.2f} over {pattern.num_pairs} {pairs} of layers ({called})"
        else:
            found = "not measurable: no two layers that can be compared lie so far apart"
        typer.echo(f"  Δ = {pattern.delta:<3} {found}")
    if data.period is not None:
        typer.echo(period_finding(data.period))
    if data.tokens and caution(data):
        typer.echo(caution(data))
    if data.weights is not None:
        _print_weights(data.weights)


def _print_weights(result: "WeightSimilarity | WeightChange") -> None:
    from moescope.stats.weight_similarity import WeightSimilarity
    from moescope.viz.weight_findings import verdict_in_words, weight_findings
    from moescope.viz.wording import counted, in_bytes, signed

    read = in_bytes(result.coverage.bytes_read)
    layers, experts = counted(len(result.layers), "MoE layer"), counted(result.experts, "expert")
    typer.echo(f"{layers}, {experts}, {read} of weights read")
    if isinstance(result, WeightSimilarity):
        for raw, centred in zip(result.by_distance, result.centred_by_distance, strict=True):
            found = "no two layers so far apart have experts that can be compared"
            if raw.num_pairs:
                second = f"{signed(centred.mean)} centred" if centred.num_pairs else "not centred"
                pairs = counted(raw.num_pairs, "pair")
                found = f"cosine of the same expert {signed(raw.mean)}, {second}, over {pairs} of layers"
            typer.echo(f"  Δ = {raw.delta:<3} {found}")
    typer.echo(verdict_in_words(result))
    for sentence in weight_findings(result, by_distance=False):
        typer.echo(sentence)


def _print_rows(rows: Mapping[str, str]) -> None:
    for name, value in rows.items():
        typer.echo(f"{name:<11}{value}")


def _check_type(architecture: str, wanted: ModelType) -> None:
    if wanted is not ModelType.auto and not architecture.startswith(_CLASSES[wanted]):
        raise OptionError(f"--model-type {wanted.value}: the checkpoint is a {architecture}; leave the option out")


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of long options in dashes: `--max_tokens=5` is `--max-tokens=5`."""
    names = [argument.partition("=") for argument in arguments]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") and place < end else arguments[place]
        for place, (name, equals, value) in enumerate(names)
    ]


def _intervals(text: str | None, option: str = "--periodic-intervals") -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or any(not 1 <= value <= 10_000 for value in values):
        raise OptionError(f"{option} {text!r} must be layer distances from 1 up, e.g. 12,24,36")
    return tuple(dict.fromkeys(values))


def _numbers(option: str, text: str | None, most: int) -> list[range] | None:
    """Ranges of numbers up to `most` out of `3-10,20`."""
    if text is None:
        return None
    runs = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII) for part in text.split(",")]
    numbers = [number for run in runs if run is not None for number in run.groups() if number is not None]
    if large := [number for number in numbers if len(number.lstrip("0")) > 18 or int(number) > most]:
        raise OptionError(f"{option}: {large[0]:.20} is too large; {option[2:]} are whole numbers from 0 to {most:,}")
    found = [range(int(run[1]), int(run[2] or run[1]) + 1) for run in runs if run is not None]
    if len(found) < len(runs) or not all(found):
        raise OptionError(f"{option} {text!r} must be {option[2:]} and ranges of them, e.g. 3-10,20")
    return found


def _labels(text: str | None, count: int) -> list[str] | None:
    if text is None:
        return None
    names = [part.strip() for part in text.split(",")]
    if len(names) != count or len(set(names)) != count or not all(names):
        raise OptionError(
            f"--labels {text!r} must be {count} distinct {'name' if count == 1 else 'names, separated by commas'}"
        )
    return names


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise OptionError(f"--batch-size {text!r} must be auto or a whole number from 1 to 1,000,000")
    return int(text)


def _size(option: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if not size:
        raise OptionError(f"{option} {text!r} must be a size, e.g. 512MB or 10GB")
    return size


def _new_folder(kind: str = "moescope") -> Path:
    return Path(f"{kind}_{datetime.now():%Y%m%d_%H%M%S}")


def _one_thread_a_product() -> None:
    """Before numpy is loaded: its library multiplies with one thread.

    Nulls multiply many small matrices, for which threads that wait for each other take several times longer than one;
    a pass over weights has threads and processes of its own.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _prepare_engine() -> None:
    """Before torch is loaded: keep the engine's own progress bars and hints out of the output, and its threads polite.

    OpenMP threads that spin while they wait make small models many times slower where another program wants the cores.
    """
    if platform.machine() in ("x86_64", "AMD64"):  # elsewhere torch multiplies with that library too
        _one_thread_a_product()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[["RunProgress"], None]]]:
    """Callbacks of a run, for prompts that are read and prompts that are run."""
    with _bar("Reading prompts") as show:

        def on_tokenized(count: int, tokens: int) -> None:
            show("Reading prompts", f"{count:,} prompts, {tokens:,} tokens")

        def on_progress(state: "RunProgress") -> None:
            left = "" if state.seconds_left is None else f", {_duration(state.seconds_left)} left"
            show(
                "Profiling",
                f"{state.prompts:,}/{state.prompts_total:,} prompts, {state.tokens_per_second:,.0f} tokens/s{left}",
                completed=state.prompts,
                total=state.prompts_total,
            )

        yield on_tokenized, on_progress


@contextmanager
def _converting() -> Iterator[Callable[[int, int], None]]:
    """Callback of a conversion, told bytes that are there and bytes in all."""
    with _bar("Converting") as show:
        begun: tuple[float, int] | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal begun
            begun = begun or (time.monotonic(), done)
            seconds, new = time.monotonic() - begun[0], done - begun[1]
            left = f", {new / seconds / 1e9:.2f} GB/s, {_duration((total - done) * seconds / new)} left" if new else ""
            show("Converting", f"{done / 1e9:,.1f}/{total / 1e9:,.1f} GB{left}", completed=done, total=total)

        yield on_progress


@contextmanager
def _bar(description: str) -> Iterator[Callable[..., None]]:
    """A callback that draws progress on a terminal, and a line every ten seconds elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        console=_console,
        disable=not _console.is_terminal,
    )
    task = bar.add_task(description, total=None, counts="")
    last = time.monotonic()

    def show(description: str, counts: str, **fields: Any) -> None:
        nonlocal last
        bar.update(task, description=description, counts=counts, **fields)
        if bar.disable and time.monotonic() - last > 10:
            last = time.monotonic()
            _console.print(f"{description}: {counts}")

    with bar:
        yield show


@contextmanager
def _weight_progress() -> Iterator[Callable[["PassProgress"], None]]:
    """Callback of a pass over weights."""
    with _bar("Reading weights") as show:

        def on_progress(state: "PassProgress") -> None:
            counts = (
                f"{state.bytes_read / 1e9:.2f}/{state.bytes_total / 1e9:.2f} GB, "
                f"{state.bytes_per_second / 1e9:.2f} GB/s, {_duration(state.seconds_left)} left"
            )
            show("Reading weights", counts, completed=state.bytes_read, total=state.bytes_total)

        yield on_progress


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _fail(message: str) -> NoReturn:
    text = " ".join(message.split())
    typer.echo(f"moescope: {text}", err=True)
    sys.exit(2)


def main() -> None:
    """Entry point: errors are one line on standard error and exit code 2; Ctrl-C is exit code 130."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Δ gets an escape, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for command in (
        *app.registered_commands,
        *traces.registered_commands,
    ):  # raw docstrings spell out the mark that keeps the lines of the examples
        command.help = (inspect.getdoc(command.callback) or "").replace("\\b\n", "\b\n")
    sys.argv[1:] = _with_dashes(sys.argv[1:])
    debug = "--debug" in sys.argv[1:]
    if debug:  # accepted before or after the command
        sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except MoescopeError as error:
        if debug:
            raise
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("moescope: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except MemoryError as error:
        if debug:
            raise
        _fail(f"out of memory: {error or 'try a smaller --batch-size'}")
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
