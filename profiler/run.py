"""The run loop: prompts through an engine, drained batch by batch, kept on the way, resumed where it stopped."""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from moescope import __version__
from moescope.profiler.engine import Engine, Generation, Request
from moescope.profiler.errors import EngineError, ProfileError
from moescope.profiler.files import PARTIAL_NAME, OutputFolder
from moescope.profiler.interrupts import interruptible
from moescope.profiler.profile import RoutingProfile, RunInfo
from moescope.profiler.tokens import TokenizedPrompts
from moescope.profiler.totals import Totals
from moescope.profiler.trace import TraceAbout
from moescope.profiler.trace_writer import TraceOptions, TraceWriter

#: Prompts that are sorted by length together; small enough that what has been drained is a fair sample of the set.
CHUNK: Final = 1024
#: Seconds between two saves of what has been drained.
SAVE_EVERY: Final = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has got.

    Attributes:
        prompts: Prompts drained, those of the interrupted run included.
        prompts_total: Prompts of the set.
        tokens: Tokens counted by this process.
        tokens_per_second: Since this process began to run batches.
        seconds_left: Estimate, or None before the first batch.
    """

    prompts: int
    prompts_total: int
    tokens: int
    tokens_per_second: float
    seconds_left: float | None


class Interrupted(Exception):
    """Ctrl-C was pressed; what had been drained is in `profile`."""

    def __init__(self, profile: RoutingProfile) -> None:
        super().__init__("interrupted")
        self.profile = profile


def timestamp() -> str:
    """The time, ISO 8601, UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def plan_batches(engine: Engine, prompts: TokenizedPrompts, generation: Generation) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, chunk by chunk; the same every time, so that a run can be resumed."""
    for start in range(0, len(prompts), CHUNK):
        for batch in engine.plan(prompts.lengths[start : start + CHUNK], generation):
            yield [start + index for index in batch]


def run_profile(
    engine: Engine,
    prompts: TokenizedPrompts,
    generation: Generation,
    *,
    settings: Mapping[str, Any],
    folder: OutputFolder | None = None,
    resume: RoutingProfile | None = None,
    trace: TraceOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RoutingProfile:
    """Run every prompt once and return the profile; with a folder, keep what is drained as it grows.

    Args:
        engine: Where the prompts run.
        prompts: The tokenised set.
        generation: How they are continued.
        settings: What the run was asked for, JSON types; a resumed run must have been asked for the same.
        folder: Where to keep what is drained: after the first batch, then every 30 seconds, and at the end; or None.
        resume: What an interrupted run of the same prompts, model and settings left, or None.
        trace: Trace the tokens too; a resumed run goes on with its trace.
        on_progress: Called after each batch.

    Raises:
        InvariantError: Counts do not add up; nothing of the batch in question is kept.
        ProfileError: `resume` belongs to another run.
        TraceError: The trace cannot be written; what had been saved before can be resumed.
        EngineError: The engine failed; what had been drained is in the folder.
        Interrupted: Ctrl-C; its `profile` holds what had been drained, which is also in the folder.
    """
    domain_bytes = "\0".join(prompts.domains).encode() + prompts.domain_index.astype("<i2").tobytes()
    settings = {
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed,
        "probabilities": engine.probabilities,
        "coactivation": engine.coactivation,
        **settings,
        "chunk": CHUNK,
        "domains_sha256": hashlib.sha256(domain_bytes).hexdigest(),
        **({} if trace is None else {"trace": {"sample": trace.sample, "weights": trace.weights}}),
    }
    if resume is not None and len(resume.runs) == 1:
        # batches must be those of the interrupted run, however much memory is free today
        engine.batching = {name: resume.runs[0].settings.get(name, size) for name, size in engine.batching.items()}
    settings |= engine.batching
    if resume is None:
        totals = Totals(
            engine.model, prompts.domains, probabilities=engine.probabilities, coactivation=engine.coactivation
        )
        run = RunInfo(
            uuid=str(uuid.uuid4()),
            created=timestamp(),
            engine=engine.info,
            prompts=0,
            prompts_total=len(prompts),
            prompts_sha256=prompts.sha256,
            settings=settings,
            complete=False,
        )
    else:
        run = _resumed(resume, engine, prompts, settings)
        totals = Totals.from_profile(resume)
    meter = _Meter(prompts, run.prompts)
    saved = -SAVE_EVERY  # the first batch is kept at once
    with _tracing(engine, trace, run, prompts.domains, resume is not None) as writer, interruptible() as interrupts:

        def keep(folder: OutputFolder) -> None:
            if writer is not None:
                writer.flush()  # the trace never lags behind what a resumed run builds on
            folder.save_partial(totals.profile(run))

        try:
            for number, batch in enumerate(plan_batches(engine, prompts, generation)):
                if number < run.batches:
                    meter.skip(batch)
                    continue
                requests = [
                    Request(prompts.ids(i), int(prompts.domain_index[i]), int(prompts.splits[i]), i) for i in batch
                ]
                done = engine.run(requests, generation, number)
                with interrupts.held():
                    if writer is not None:
                        writer.commit(number)
                    totals.add(done.sums, done.tokens)
                    run = replace(run, prompts=run.prompts + len(batch), batches=number + 1)
                    if folder is not None and time.monotonic() - saved >= SAVE_EVERY:
                        keep(folder)
                        saved = time.monotonic()
                progress = meter.count(batch, sum(done.tokens))
                if on_progress is not None:
                    on_progress(progress)
            interrupts.hold()
        except KeyboardInterrupt as error:
            interrupts.hold()
            if folder is not None and run.batches:
                keep(folder)
            raise Interrupted(totals.profile(run)) from error
        except EngineError as error:
            interrupts.hold()
            if folder is None or not run.batches:
                raise
            keep(folder)
            raise EngineError(
                f"{error}. Kept what {run.prompts:,} of {run.prompts_total:,} prompts gave in "
                f"{folder.path / PARTIAL_NAME}; go on with --resume"
            ) from error
        found = engine.findings()
        if found:
            run = replace(run, settings={**run.settings, **found})
        if writer is not None:
            found = {"trace": run.settings["trace"] | writer.summary()}
            run = replace(run, settings={**run.settings, **found})
        profile = totals.profile(replace(run, complete=True))
        profile.check()
        if writer is not None:
            writer.finish()
        if folder is not None:
            folder.save_final(profile)
    return profile


@contextlib.contextmanager
def _tracing(
    engine: Engine, options: TraceOptions | None, run: RunInfo, domains: tuple[str, ...], resumed: bool
) -> Iterator[TraceWriter | None]:
    """A writer that the engine feeds, if there are options."""
    if options is None:
        yield None
        return
    about = TraceAbout(engine.model, domains, run, __version__, options.weights, options.sample)
    seed = int(run.settings["seed"])
    with TraceWriter(about, options, seed=seed, resume=run.batches if resumed else None) as writer:
        engine.trace(writer)
        try:
            yield writer
        finally:
            engine.trace(None)


def _resumed(
    profile: RoutingProfile, engine: Engine, prompts: TokenizedPrompts, settings: Mapping[str, Any]
) -> RunInfo:
    if len(profile.runs) != 1 or profile.complete:
        raise ProfileError(f"{PARTIAL_NAME} is not what an interrupted run left; it cannot be resumed")
    run = profile.runs[0]
    model, other = profile.model, engine.model
    if (model.layers, model.scoring, model.fingerprint) != (other.layers, other.scoring, other.fingerprint):
        raise ProfileError(f"--resume: the interrupted run profiled {model.id}, this one profiles {other.id}")
    if run.prompts_sha256 != prompts.sha256 or profile.domains != prompts.domains:
        raise ProfileError("--resume: the prompts are not those of the interrupted run")
    for name in ("name", "version", "device", "dtype"):
        was, now = getattr(run.engine, name), getattr(engine.info, name)
        if was != now:
            raise ProfileError(f"--resume: the engine's {name} was {was} in the interrupted run and is {now} now")
    for name in dict.fromkeys((*settings, *run.settings)):
        before, after = run.settings.get(name), settings.get(name)
        if before != after:
            raise ProfileError(f"--resume: {name} was {before!r} in the interrupted run and is {after!r} now")
    return run


class _Meter:
    """Speed and time left, from prompt tokens done: the only part of the work that is known beforehand."""

    def __init__(self, prompts: TokenizedPrompts, done: int) -> None:
        self._prompts = prompts
        self._done = done
        self._left = prompts.total_tokens
        self._tokens = 0
        self._worked = 0
        self._start = time.monotonic()

    def skip(self, batch: list[int]) -> None:
        self._left -= int(self._prompts.lengths[batch].sum())

    def count(self, batch: list[int], tokens: int) -> Progress:
        prompt_tokens = int(self._prompts.lengths[batch].sum())
        self._left -= prompt_tokens
        self._worked += prompt_tokens
        self._tokens += tokens
        self._done += len(batch)
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = seconds / self._worked * self._left if self._worked else None
        return Progress(self._done, len(self._prompts), self._tokens, self._tokens / seconds, left)
