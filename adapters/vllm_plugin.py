"""The `vllm.general_plugins` entry point: does nothing unless recording is asked for.

vLLM calls `register` in the front end, in the engine core and in every worker. Where the environment asks for it, the
scheduler sends notes with each step, and each worker binds a recorder when its model is loaded.
"""

import contextlib
import functools
import os
import signal
import threading
from pathlib import Path
from typing import Any, Final

from moescope.adapters.vllm_settings import SERVER_VARIABLE, TRIGGER_NAME, VARIABLE, Settings

#: Name of the entry point.
NAME: Final = "moescope"
#: First and first unsupported version of vLLM.
VERSIONS: Final = ((0, 26), (0, 34))
#: Attribute of a worker that holds its recorder.
_RECORDER: Final = "moescope_recorder"
#: File in the settings' folder where a worker says why it refuses.
REFUSAL_NAME: Final = "refused.txt"
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


def register() -> None:
    """The entry point."""
    if not (os.environ.get(VARIABLE) or os.environ.get(SERVER_VARIABLE)):
        return
    install()
    if os.environ.get(SERVER_VARIABLE):
        _touch_on_signal(Path(os.environ[SERVER_VARIABLE], TRIGGER_NAME))


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
    from vllm.v1.worker.gpu_worker import Worker

    from moescope.adapters.vllm_ledger import follow

    follow(Scheduler)
    _wrap_worker(Worker)


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
        """What `collective_rpc` reaches: a method of this worker's recorder."""
        recorder = getattr(self, _RECORDER, None)
        return None if recorder is None else getattr(recorder, call)(*args)

    worker_class.load_model = load_model
    worker_class.moescope = moescope


def _bind(worker: Any, settings: Settings) -> None:
    from vllm.logger import init_logger

    from moescope.adapters.vllm_worker import WorkerRecorder
    from moescope.profiler.errors import MoescopeError

    if getattr(worker, _RECORDER, None) is not None:
        raise RuntimeError("moescope: this worker has a recorder already")
    try:
        recorder = WorkerRecorder(worker, settings)
    except MoescopeError as error:
        Path(settings.folder).mkdir(parents=True, exist_ok=True)
        Path(settings.folder, REFUSAL_NAME).write_text(f"{error}\n", encoding="utf-8")
        raise
    setattr(worker, _RECORDER, recorder)
    _wrap_methods(worker, recorder)
    size = recorder.recorder.nbytes / 2**20 if recorder.recorder is not None else 0.0
    init_logger(f"vllm.{NAME}").info("moescope records %d MoE layers; %.1f MiB reserved", recorder.depth, size)


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
