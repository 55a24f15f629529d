"""Profile inside vLLM: its own batching, scheduling and graphs, with the counts kept on the device."""

import contextlib
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.adapters.encoding import encode_prompts, first_line, token_texts
from moescope.adapters.folders import check_folder
from moescope.adapters.vllm_parts import engine_info, join, load_part
from moescope.adapters.vllm_plugin import SUPPORTED, install, loads_plugin, supported, vllm_version
from moescope.adapters.vllm_settings import (
    CHOICES,
    DOMAIN_KEY,
    SPLIT_KEY,
    TRACE_KEY,
    VARIABLE,
    VERIFY_KEY,
    Probabilities,
    Settings,
    refusal_path,
)
from moescope.adapters.vllm_trace import TraceReceiver
from moescope.profiler.engine import Completed, Generation, Request
from moescope.profiler.errors import EngineError, InvariantError, ModelError, OptionError
from moescope.profiler.fingerprint import router_fingerprint
from moescope.profiler.profile import LayerInfo, ModelInfo
from moescope.profiler.prompts import Prompt
from moescope.profiler.staged import StagedSums
from moescope.profiler.trace_writer import TraceWriter

#: Prompts that are handed to the engine together; it batches them by itself.
BATCH: Final = 1024
#: Domains that the device counts at a time; prompts of more domains run one group of domains after the other.
DOMAINS: Final = 16
#: Seconds to wait for the scheduler's last word on the requests of a batch.
_PATIENCE: Final = 60.0
#: Module of vLLM that came with a capture of routed experts that works with the prefix cache and model runner V2 alone.
_CAPTURE_BESIDE_CACHE: Final = "vllm.config.aux_output"
#: What vLLM says of its capture where it refuses to start with it.
_CAPTURE_WORDS: Final = ("AuxOutput", "routed-experts", "routed experts", "routed_experts")
_EXPERT_COUNTS: Final = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


class VllmEngine:
    """Runs requests through a vLLM engine and counts their routing inside it.

    Args:
        model: Folder of a checkpoint, or a hub id.
        dtype: "auto" or a type that vLLM knows.
        batch_size: Prompts that are handed over together.
        probabilities: Which rows' full distributions are summed: "off", "sample" (1 in 64) or "all".
        coactivation: Count pairs of experts.
        verify: Share of the requests whose routing is compared, id by id, with vLLM's own capture.
        ignore_eos: Generate on past the end-of-sequence token.
        seed: Of the sample of rows.
        trust_remote_code: Run model code that comes with the checkpoint.
        engine_args: Arguments of `vllm.LLM`, as they are.
        name: What the profile calls the model; by default `model`.

    Raises:
        OptionError: vLLM or the plug-in is missing, of an unsupported version, or an option does not fit.
        ModelError: The engine does not start, or its routing cannot be recorded exactly.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        batch_size: int | None = None,
        probabilities: Probabilities = "sample",
        coactivation: bool = False,
        verify: float = 0.0,
        ignore_eos: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        arguments = dict(engine_args or {})
        if probabilities not in CHOICES:
            raise OptionError(f"--probabilities {probabilities!r} is unknown; choose one of {', '.join(CHOICES)}")
        if not 0 <= verify <= 1:
            raise OptionError(f"--verify {verify} must be a share from 0 to 1")
        _check_environment()
        trusted = trust_remote_code or bool(arguments.get("trust_remote_code"))
        config = _check_model(model, trusted, weights=arguments.get("load_format") in (None, "auto", "safetensors"))
        if int(arguments.get("data_parallel_size", 1)) > 1:
            raise OptionError(
                "data_parallel_size: one process cannot drive data-parallel engines; record `vllm serve "
                "--data-parallel-size …` with MOESCOPE_RECORD=FOLDER, then `moescope merge FOLDER`"
            )
        defaults: dict[str, Any] = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        # a cache that is on for the capture alone is not read from
        self._reads_cache = bool(arguments.get("enable_prefix_caching"))
        if verify:
            defaults |= _capture_arguments(arguments)
        if arguments.get("speculative_config"):
            defaults["async_scheduling"] = False  # tells in time which drafts were kept
        arguments = defaults | arguments
        self._tokenizer = _tokenizer(arguments.get("tokenizer") or model, bool(arguments["trust_remote_code"]))
        self._stops = () if ignore_eos else _stop_ids(config, model)
        self._ignore_eos = ignore_eos
        self._verify = verify
        self._checked = [0, 0]
        self._salts = itertools.count()
        self._receiver: TraceReceiver | None = None
        self._traced = 0
        self._skipped = 0
        self.probabilities = probabilities != "off"
        self.coactivation = coactivation
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="moescope-vllm-")))
        settings = Settings(str(self._folder), probabilities, coactivation=coactivation, domains=DOMAINS, seed=seed)
        try:
            self.llm = _start(model, arguments, settings)
            self._stack.callback(_stop, self.llm)
            ranks = self._call("describe", str(self._folder))
            self._about = _check_ranks(ranks, settings)
            layers = sorted(
                {LayerInfo(*layer) for rank in ranks for layer in rank["layers"]}, key=lambda one: one.index
            )
            self._routers = self._read_routers(layers)
        except BaseException:
            self._stack.close()
            raise
        self.model = ModelInfo(
            id=name or model,
            architecture=self._about["architecture"],
            scoring=self._about["scoring"],
            layers=tuple(layers),
            fingerprint=None if self._routers is None else router_fingerprint(self._routers),
            groups=self._about["groups"],
        )
        self.info = engine_info(self._about)
        self.vocabulary = int(self._about["vocabulary"])
        self.context: int | None = int(self._about["max_model_len"]) - 1
        self.batching = {"batch_size": batch_size or BATCH}
        self._writers = sum(rank["rank"]["writes"] and bool(rank["layers"]) for rank in ranks)
        self.reserved = sum(rank["bytes"] for rank in ranks if rank["rank"]["writes"])

    @property
    def note(self) -> str:
        """One line about the recorder, for the user."""
        how = "Triton kernels" if self._about["kernels"] else "torch"
        share = {"off": "none", "sample": "1 row in 64", "all": "all rows"}[self._about["probabilities"]]
        return (
            f"Recorder: {self.reserved / 2**20:.1f} MiB reserved on the device, counted with {how}; full distributions "
            f"of {share}"
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts given as text or as messages; see `encode_prompts`."""
        return encode_prompts(self._tokenizer, prompts, self.model.id)

    def plan(self, lengths: NDArray[np.int64], generation: Generation) -> list[list[int]]:
        """Prompts in the order given: the engine batches them by itself."""
        size = self.batching["batch_size"]
        return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]

    def run(self, requests: Sequence[Request], generation: Generation, batch: int) -> Completed:
        """Run requests and hold what was recorded against their own lengths.

        Raises:
            InvariantError: What was recorded does not add up.
            EngineError: The engine died.
        """
        domains = sorted({request.domain for request in requests})
        sums = []
        for start in range(0, len(domains), DOMAINS):
            places = domains[start : start + DOMAINS]
            chosen = [(i, request) for i, request in enumerate(requests) if request.domain in set(places)]
            sums.append(self._run_domains(chosen, places, generation, batch))
        return Completed(_Together(tuple(sums)), tuple(int(part.tokens.sum()) for part in sums))

    def _run_domains(
        self, requests: list[tuple[int, Request]], places: list[int], generation: Generation, batch: int
    ) -> StagedSums:
        from vllm import SamplingParams

        self._call("reset")
        self._call("switch", True)
        rng = np.random.default_rng((generation.seed, batch))
        verified = rng.random(len(requests)) < self._verify if self._verify else np.zeros(len(requests), bool)
        # vLLM's CPU build cannot seed a request
        seeded = generation.temperature > 0 and self._about["device"] != "cpu"
        traced = self._admit([request for _, request in requests], places, generation)
        prompts: list[Any] = []
        params = []
        for (index, request), check, trace in zip(requests, verified, traced, strict=True):
            tags: dict[str, Any] = {DOMAIN_KEY: places.index(request.domain), SPLIT_KEY: request.split}
            if trace:
                tags[TRACE_KEY] = request.number
            if check:
                tags[VERIFY_KEY] = 1
            prompts.append({"prompt_token_ids": request.token_ids.tolist(), **self._cache_salt()})
            params.append(
                SamplingParams(
                    max_tokens=max(1, generation.max_tokens),
                    temperature=generation.temperature,
                    seed=_seed(generation.seed, batch, index) if seeded else None,
                    stop_token_ids=list(self._stops),
                    ignore_eos=self._ignore_eos or generation.max_tokens == 0,
                    detokenize=False,
                    skip_reading_prefix_cache=not self._reads_cache,
                    extra_args=tags,
                )
            )
        try:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"batch {batch}: the vLLM engine failed: {first_line(error)}") from error
        self._wait_until_settled()
        checked = self._call("verified", str(self._folder)) if verified.any() else []
        sums = self._collect(f"batch {batch}: ")
        self._hold_against_lengths(sums, requests, outputs, places, f"batch {batch}: ")
        self._wait_for_trace([output for output, trace in zip(outputs, traced, strict=True) if trace])
        if verified.any():
            self._compare(checked, outputs, verified, f"batch {batch}: ")
        return replace(sums, places=tuple(places))

    def _cache_salt(self) -> dict[str, str]:
        """What keeps the blocks of a request apart where the prefix cache is on, but not read.

        vLLM's capture keeps one answer for a block of tokens: without this, two requests of the same tokens would get
        that of one of them, and near-ties can fall differently.
        """
        on = self._about["prefix_caching"] and not self._reads_cache
        return {"cache_salt": str(next(self._salts))} if on else {}

    def _admit(self, requests: Sequence[Request], places: Sequence[int], generation: Generation) -> NDArray[np.bool_]:
        """Which of the requests are traced."""
        if self._receiver is None:
            return np.zeros(len(requests), np.bool_)
        self._receiver.expect(places)
        most = [len(request.token_ids) + max(generation.max_tokens - 1, 0) for request in requests]
        return self._receiver.writer.admit([request.number for request in requests], most)

    def _wait_for_trace(self, outputs: Sequence[Any]) -> None:
        """Hold the rows of the trace against the traced requests' own lengths."""
        if self._receiver is None:
            return
        for output in outputs:
            self._traced += len(output.prompt_token_ids) - int(output.num_cached_tokens or 0)
            self._traced += sum(len(completion.token_ids) - 1 for completion in output.outputs)
        sent = sum(self._call("traced"))
        if sent != self._traced:
            raise InvariantError(f"{sent:,} rows were traced, but prompts and outputs have {self._traced:,}")
        self._receiver.wait_for(sent)

    def _hold_against_lengths(
        self,
        sums: StagedSums,
        requests: list[tuple[int, Request]],
        outputs: Sequence[Any],
        places: list[int],
        what: str,
    ) -> None:
        """T of every domain, phase and split, from the lengths of prompts and outputs."""
        expected = np.zeros_like(sums.tokens)
        for (_, request), output in zip(requests, outputs, strict=True):
            place = places.index(request.domain)
            cached = int(output.num_cached_tokens or 0)
            self._skipped += cached
            expected[place, 0, request.split] += len(request.token_ids) - cached
            for completion in output.outputs:
                expected[place, 1, request.split] += len(completion.token_ids) - 1
        if not np.array_equal(expected, sums.tokens):
            raise InvariantError(
                f"{what}{int(sums.tokens.sum()):,} tokens were counted, but prompts and outputs have "
                f"{int(expected.sum()):,}"
            )

    def _collect(self, what: str) -> StagedSums:
        written = self._call("dump", str(self._folder))
        for rank in written:
            if "error" in rank:
                raise InvariantError(f"{what}{rank['error']}")
        paths = [rank["path"] for rank in written if "path" in rank]
        if len(paths) != self._writers:
            raise InvariantError(f"{len(paths)} of {self._writers} ranks wrote what they counted")
        parts = [load_part(Path(path)) for path in paths]
        for path in paths:
            os.unlink(path)
        layers, sums = join(parts)
        if layers != self.model.layers:
            raise InvariantError("the ranks wrote other layers than the engine has")
        return sums

    def _compare(self, checked: list[Any], outputs: Sequence[Any], verified: NDArray[np.bool_], what: str) -> None:
        """Compare recorded ids with vLLM's own capture, token by token."""
        recorded: dict[str, list[tuple[list[int], NDArray[np.int64], NDArray[np.int32]]]] = {}
        for rank in checked:
            if rank is not None:
                for name, positions, ids in _read_verified(Path(rank["path"])):
                    recorded.setdefault(name, []).append((rank["layers"], positions, ids))
        for output, check in zip(outputs, verified, strict=True):
            if not check:
                continue
            theirs = output.outputs[0].routed_experts
            if theirs is None:
                raise EngineError(f"{what}vLLM returned no routed experts for request {output.request_id}")
            mine = [entry for name, entries in recorded.items() if _same(name, output.request_id) for entry in entries]
            if not mine:
                raise InvariantError(f"{what}request {output.request_id} was to be verified, but was not recorded")
            for layers, positions, ids in mine:
                if positions.max(initial=-1) >= len(theirs):
                    raise InvariantError(
                        f"{what}request {output.request_id} was recorded up to token {int(positions.max()) + 1}, but "
                        f"vLLM captured {len(theirs)}"
                    )
                for column, layer in enumerate(layers):
                    ours = np.sort(ids[:, column], axis=-1)
                    captured = np.sort(np.asarray(theirs)[positions, layer].astype(np.int64), axis=-1)
                    if not np.array_equal(ours, captured):
                        wrong = int((ours != captured).any(axis=-1).sum())
                        raise InvariantError(
                            f"{what}layer {layer}: {wrong} of {len(positions)} tokens of request {output.request_id} "
                            "were recorded with other experts than vLLM captured"
                        )
                self._checked[1] += int(ids.shape[0] * ids.shape[1])
            self._checked[0] += 1

    def trace(self, writer: TraceWriter | None) -> None:
        """Trace the tokens of the batches to come, or no longer.

        Raises:
            OptionError: The engine's layers are spread over ranks, none of which sees a whole row.
        """
        if self._receiver is not None:
            with contextlib.suppress(EngineError):  # an engine that died has hung up by itself
                self._call("trace_to", None)
            self._receiver.close()
            self._receiver = None
        if writer is None:
            return
        if self._writers > 1:
            raise OptionError(
                "--trace: a row's layers are spread over pipeline ranks; leave out pipeline_parallel_size"
            )
        self._traced = 0
        path = self._folder / "trace.socket"
        try:
            self._receiver = TraceReceiver(writer, path)
        except OSError as error:
            raise OptionError(
                f"--trace: vLLM's workers cannot be reached through {path} ({error}); set TMPDIR"
            ) from error
        self._call("trace_to", str(self._receiver.path), writer.about.weights)

    def findings(self) -> dict[str, Any]:
        """What the run's record says beside its settings."""
        found: dict[str, Any] = {}
        if self._verify:
            found["verified"] = {
                "against": "vLLM's own capture of routed experts",
                "requests": self._checked[0],
                "token_layers": self._checked[1],
                "differences": 0,
            }
        if self._skipped or self._about["prefix_caching"]:
            found["skipped_by_prefix_cache"] = self._skipped
        return found

    def _wait_until_settled(self) -> None:
        """Wait until every worker has heard how far each request got."""
        deadline = time.monotonic() + _PATIENCE
        while any(self._call("unsettled")):
            if time.monotonic() > deadline:
                raise InvariantError("the scheduler did not say how the requests of a batch ended")
            core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
            if core is not None:  # in this process: nobody else makes it step
                core.step_fn()
            else:
                time.sleep(0.002)

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        try:
            results = self.llm.collective_rpc("moescope", args=(name, *arguments))
        except Exception as error:
            raise EngineError(f"the vLLM engine does not answer: {first_line(error)}") from error
        if any(result is None for result in results) and name == "describe":
            raise ModelError("the moescope plug-in did not bind in a worker of vLLM; nothing would be recorded")
        return list(results)

    def _read_routers(self, layers: Sequence[LayerInfo]) -> list[Any] | None:
        from safetensors.torch import load_file

        found: dict[str, Any] = {}
        for path in sorted(self._folder.glob("routers-*.safetensors")):
            found |= load_file(path)
            path.unlink()
        weights = [found.get(str(layer.index)) for layer in layers]
        return None if any(weight is None for weight in weights) else weights

    def router_weights(self) -> list[NDArray[np.float32]]:
        """Router weights of each MoE layer, float32 (E, H)."""
        return [] if self._routers is None else [weight.float().numpy() for weight in self._routers]

    def distributions(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """The router's full distributions for a short prompt, float32 (L, T, E), zero-padded; counts nothing."""
        from safetensors.numpy import load_file
        from vllm import SamplingParams

        if not self.probabilities:
            return None
        prompt: Any = {"prompt_token_ids": token_ids.tolist()}
        self._call("show")
        try:
            params = SamplingParams(max_tokens=1, detokenize=False, skip_reading_prefix_cache=not self._reads_cache)
            self.llm.generate([prompt], [params], use_tqdm=False)
        except Exception as error:
            raise EngineError(f"the vLLM engine failed: {first_line(error)}") from error
        self._wait_until_settled()
        places = {index: slot for slot, index in enumerate(self.model.layer_indices)}
        out = np.zeros((len(places), len(token_ids), max(self.model.experts)), np.float32)
        seen = np.zeros((len(places), len(token_ids)), bool)
        for rank in self._call("shown", str(self._folder)):
            if rank is None:
                continue
            found = load_file(rank["path"])
            os.unlink(rank["path"])
            for row, index in enumerate(rank["layers"]):
                values = found["distributions"][row]
                inside = found["positions"] < len(token_ids)
                out[places[index], found["positions"][inside], : values.shape[1]] = values[inside]
                seen[places[index], found["positions"][inside]] = True
        missing = np.flatnonzero(~np.all(seen, axis=0))
        tokens = int(missing[0]) if len(missing) else len(token_ids)
        return out[:, :tokens] if tokens else None

    def texts(self, token_ids: NDArray[np.int32]) -> list[str]:
        """Each token as text; empty where there is no tokenizer."""
        return token_texts(self._tokenizer, token_ids.tolist())

    def close(self) -> None:
        """Shut the engine down and remove its folder."""
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _Together:
    """Sums of several groups of domains."""

    parts: tuple[StagedSums, ...]

    def add_to(self, arrays: dict[str, NDArray[np.int64]], tokens: Sequence[int]) -> None:
        """Add all of them."""
        for part in self.parts:
            part.add_to(arrays, tokens)


def _check_environment() -> None:
    """Refuse what can be refused before an engine starts."""
    version = vllm_version()
    if version is None:
        raise OptionError("--engine vllm needs vLLM, which is not installed: pip install 'moescope[vllm]'")
    if not supported(version):
        raise OptionError(f"vLLM {version} is not supported; moescope records inside {SUPPORTED}")
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise OptionError("the routing would be simulated: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
    if not loads_plugin():
        if os.environ.get("VLLM_PLUGINS") is not None:
            raise OptionError("VLLM_PLUGINS leaves the moescope plug-in out; add moescope to it, or unset it")
        raise OptionError(
            "vLLM does not find the moescope plug-in: install moescope as a package in vLLM's environment (pip install)"
        )
    if os.environ.get(VARIABLE):
        raise OptionError("another recording engine is open in this process; close it first")


def captures_beside_cache() -> bool:
    """Whether vLLM's own capture of routed experts needs its prefix cache and model runner V2: from 0.31 on."""
    return importlib.util.find_spec(_CAPTURE_BESIDE_CACHE) is not None


def _capture_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments that turn vLLM's own capture of routed experts on.

    Raises:
        OptionError: It cannot be had beside the arguments given.
    """
    wanted = {"enable_return_routed_experts": True}
    if captures_beside_cache():
        if given.get("enable_prefix_caching") is False:
            raise OptionError(
                f"--verify: vLLM {vllm_version()} captures routing with its prefix cache on alone; leave out "
                "enable_prefix_caching (it is then on, but not read from), or --verify"
            )
        wanted["enable_prefix_caching"] = True
    return wanted


def _check_model(model: str, trust_remote_code: bool, *, weights: bool) -> Any:
    """The config of a model that has experts.

    Raises:
        ModelError: No such model, or a dense one.
    """
    from transformers import AutoConfig

    check_folder(model, weights=weights)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # hub, JSON and remote-code errors of many kinds
        raise ModelError(f"cannot read the config of {model}: {first_line(error)}") from error
    text = config.get_text_config(decoder=True)
    counts = [getattr(text, name, None) or 0 for name in _EXPERT_COUNTS]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        raise ModelError(f"{model} is a dense model ({config.model_type}): it has no experts to profile")
    if getattr(text, "zero_expert_num", 0):
        raise ModelError(f"{model} has zero experts, which are chosen but do nothing; moescope does not count them")
    return config


def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception:  # as many kinds as there are tokenizers; prompts may be given as token ids
        return None


def _stop_ids(config: Any, model: str) -> tuple[int, ...]:
    """End-of-sequence tokens: of the generation config, else of the config."""
    from transformers import GenerationConfig

    stops = None
    with contextlib.suppress(Exception):  # it has none, or one that cannot be read
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    if stops is None:
        stops = config.get_text_config(decoder=True).eos_token_id
    if stops is None:
        return ()
    return tuple(int(stop) for stop in (stops if isinstance(stops, (list, tuple)) else [stops]))


def _start(model: str, arguments: Mapping[str, Any], settings: Settings) -> Any:
    with _environment(VARIABLE, settings.to_json()):
        install()  # this process may have loaded vLLM's plug-ins before recording was asked for
        from vllm import LLM

        try:
            return LLM(model=model, **arguments)
        except (Exception, SystemExit) as error:
            refusal = refusal_path(settings)
            if refusal.exists():
                raise ModelError(refusal.read_text(encoding="utf-8").strip()) from error
            reason = _reason(error)
            if arguments.get("enable_return_routed_experts") and any(word in reason for word in _CAPTURE_WORDS):
                raise OptionError(
                    f"--verify: vLLM's own capture does not start ({reason.rstrip('.')}); leave out --verify"
                ) from error
            raise ModelError(f"vLLM does not start with {model}: {reason}") from error


def _reason(error: BaseException) -> str:
    """What an engine that did not start says, in one line; checks of its config say it in their second."""
    for line in str(error).splitlines():
        before, found, after = line.partition("Value error, ")
        if found and not before.strip():
            return after.partition(" [type=")[0]
    text = first_line(error)
    return text if "root cause above" not in text else "its own error is printed above"


def _stop(llm: Any) -> None:
    """Shut an engine down before its process ends."""
    engine = llm.llm_engine.engine_core
    with contextlib.suppress(Exception):
        engine.shutdown()
    context = getattr(engine, "ctx", None)
    if context is not None:  # vLLM leaves it to the garbage collector
        context.destroy(linger=0)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_ranks(ranks: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    with_layers = [rank for rank in ranks if rank["layers"]]
    if not with_layers:
        raise ModelError("vLLM's model has no MoE layers that moescope knows; nothing would be recorded")
    scorings = {rank["scoring"] for rank in with_layers}
    if len(scorings) > 1:
        raise ModelError("MoE layers differ in their scoring function; this cannot be recorded yet")
    return with_layers[0] | {"probabilities": settings.probabilities}


def _read_verified(path: Path) -> list[tuple[str, NDArray[np.int64], NDArray[np.int32]]]:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    path.unlink()
    names = sorted(name.removesuffix(":ids") for name in arrays if name.endswith(":ids"))
    return [(name, arrays[f"{name}:positions"], arrays[f"{name}:ids"]) for name in names]


def _seed(seed: int, batch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, batch, index)).generate_state(1)[0])


def _same(internal: str, request_id: str) -> bool:
    """Whether a worker's request id is that of a request; the front end appends a random part to its own."""
    return internal == request_id or internal.startswith(f"{request_id}-")
