"""Record around the user's own forwards and `model.generate(...)` calls."""

import contextlib
import hashlib
import inspect
import uuid
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_forward import Forward, cache_anchor, named_arguments
from moescope.adapters.transformers_hooks import DECODE, PREFILL, Rows, Watch, overridden
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile, RunInfo
from moescope.profiler.recorder import Group
from moescope.profiler.run import timestamp
from moescope.profiler.tokens import split_of
from moescope.profiler.totals import Totals

_DRAFTING: Final = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


class Recording:
    """What `record` yields; after the block, `profile` holds what was routed inside it.

    Every `model.generate(...)` and every forward of the model inside the block is counted when it has come to its end;
    one that fails counts nothing. Padding is told by the attention mask, so pass it. Where a forward is given a filled
    cache, its columns count as decode; inside one `generate`, columns that are computed again count once.
    """

    def __init__(
        self, model: Any, *, domain: str, probabilities: bool, coactivation: bool, seed: int, name: str | None
    ) -> None:
        engine = TransformersEngine(model, name=name, probabilities=probabilities, coactivation=coactivation)
        self._model = model
        self._seed = seed
        self._recorder = engine.recorder
        self._totals = Totals(engine.model, (domain,), probabilities=probabilities, coactivation=coactivation)
        self._watch = Watch(model, engine.binding, engine.recorder, before=self._before, after=self._after)
        self._stack = contextlib.ExitStack()
        self._caches = WeakIdKeyDictionary()  # by a cache's anchor, the rows whose tokens it holds
        self._sequences = 0
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []  # sequences of the call that is running; they count when it has come to its end
        self._generating = False
        self._expected: dict[Group, int] = {}
        self._run = RunInfo(
            uuid=str(uuid.uuid4()),
            created=timestamp(),
            engine=engine.info,
            prompts=0,
            prompts_total=0,
            prompts_sha256="",
            settings={"recorded": "around the user's own calls", "seed": seed},
        )

    @property
    def profile(self) -> RoutingProfile:
        """A checked profile of what has been counted so far.

        Raises:
            ModelError: Nothing was routed yet.
        """
        if not self._sequences:
            raise ModelError("nothing was recorded: call the model or model.generate(...) inside the `with` block")
        digest = self._digest.hexdigest()
        run = replace(self._run, prompts=self._sequences, prompts_total=self._sequences, prompts_sha256=digest)
        profile = self._totals.profile(run)
        profile.check()
        return profile

    def __enter__(self) -> Self:
        if getattr(self._model, "_moescope_recording", False):
            raise ModelError("this model is being recorded already; leave the outer `with` block first")
        with contextlib.ExitStack() as stack:
            stack.enter_context(overridden(self._model, "_moescope_recording", True))
            stack.enter_context(self._watch)
            if hasattr(self._model, "generate"):
                wrapped = self._wrap_generate(self._model.generate)
                stack.enter_context(overridden(self._model, "generate", wrapped))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def generate(*args: Any, **kwargs: Any) -> Any:
            given = named_arguments(signature, args, kwargs)
            ids = given.get("input_ids", given.get("inputs"))
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                raise ModelError("recording model.generate(...) needs input_ids of shape (B, S)")
            self._refuse_thrown_away(given)
            mask = self._prompt_mask(ids, given.get("attention_mask"), self._setting(given, "pad_token_id"))
            rows = Rows(self._owners(ids, mask), int(ids.shape[1]), mask)
            self._watch.expect(rows)
            self._generating = True
            try:
                output = original(*args, **kwargs)
            finally:
                self._generating = False
                self._watch.rows = None
            self._drain(rows, self._expected_of(rows, mask))
            return output

        return generate

    def _setting(self, given: dict[str, Any], name: str) -> Any:
        """What `generate` will use for a setting: its argument, its config's value, or that of the model's config."""
        configs = (given.get("generation_config"), getattr(self._model, "generation_config", None), self._model.config)
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _refuse_thrown_away(self, given: dict[str, Any]) -> None:
        several = [name for name in ("num_beams", "num_beam_groups") if (self._setting(given, name) or 1) > 1]
        drafting = [name for name in _DRAFTING if self._setting(given, name)]
        if several or drafting:
            raise ModelError(
                "recording counts greedy and sampled generation; beam search and assisted generation route tokens that "
                f"are thrown away, so moescope does not count them: leave out {', '.join(several + drafting)}"
            )

    @staticmethod
    def _prompt_mask(ids: Tensor, mask: Any, pad: int | None) -> Tensor:
        if isinstance(mask, Tensor):
            if mask.shape != ids.shape:
                raise ModelError(f"attention_mask is {list(mask.shape)}, but input_ids are {list(ids.shape)}")
            return mask.cpu() != 0
        if pad is not None and bool((ids == pad).any()):
            raise ModelError("input_ids hold the padding token and no attention_mask tells what is padding; pass it")
        return torch.ones(ids.shape, dtype=torch.bool)

    def _owners(self, ids: Tensor, mask: Tensor) -> tuple[tuple[int, int], ...]:
        """Domain and split of each row, by the tokens of its prompt."""
        owners = []
        self._pending.clear()
        for row, real in zip(ids.cpu(), mask, strict=True):
            tokens = row[real].numpy().astype("<i4")
            owners.append((0, split_of(tokens, self._seed)))
            self._pending.append(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        return tuple(owners)

    @staticmethod
    def _expected_of(rows: Rows, mask: Tensor) -> dict[Group, int]:
        """Tokens of each group, from the prompt masks and from how many tokens `generate` appended to each row."""
        expected = dict.fromkeys(rows.groups(), 0)
        samples = 1 if rows.lengths is None else len(rows.lengths) // len(rows.owners)
        routed = mask[:, rows.skipped_columns or 0 :].sum(dim=1).tolist()
        for i, (domain, split) in enumerate(rows.owners):
            expected[Group(domain, PREFILL, split)] += routed[i] * samples
            if rows.lengths is not None:  # the last generated token is never fed back
                new = rows.lengths[i * samples : (i + 1) * samples].tolist()
                expected[Group(domain, DECODE, split)] += sum(length - 1 for length in new)
        return expected

    def _before(self, forward: Forward) -> None:
        """A forward outside `generate`: its rows are new, or go on with a cache that an earlier forward filled."""
        if self._generating:
            return
        if forward.ids is None:
            raise ModelError("recording needs input_ids; inputs_embeds name no tokens")
        self._pending.clear()  # of a call that failed
        past, width = forward.past, forward.width
        if forward.mask is not None:
            real = forward.mask[:, past : past + width]
        elif past or forward.opaque_mask:
            real = torch.ones(forward.batch, width, dtype=torch.bool)
        else:
            real = self._prompt_mask(forward.ids, None, self._setting({}, "pad_token_id"))
        anchor = cache_anchor(forward.cache)
        rows: Rows | None = self._caches[anchor] if past and anchor in self._caches else None
        if rows is None or len(rows.owners) != forward.batch:
            rows = Rows(self._owners(forward.ids, real), prompt_columns=0 if past else width)
        rows.done_columns = past
        self._watch.expect(rows)
        self._expected = dict.fromkeys(rows.groups(), 0)
        phase = DECODE if past else PREFILL
        for (domain, split), tokens in zip(rows.owners, real.sum(dim=1).tolist(), strict=True):
            self._expected[Group(domain, phase, split)] += tokens

    def _after(self, cache: Any) -> None:
        rows = self._watch.rows
        if self._generating or rows is None:
            return
        self._drain(rows, self._expected)
        if cache is not None:
            self._caches[cache_anchor(cache)] = rows

    def _drain(self, rows: Rows, expected: dict[Group, int]) -> None:
        tokens = [expected[group] for group in rows.groups()]
        self._totals.add(self._recorder.drain(tokens), tokens)
        for sequence in self._pending:
            self._digest.update(sequence)
        self._sequences += len(self._pending)
        self._pending.clear()


def record(
    model: Any,
    *,
    domain: str = "default",
    probabilities: bool = True,
    coactivation: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> Recording:
    """Record the routing of a transformers model inside a `with` block.

    Example:
        >>> with moescope.record(model) as recording:
        ...     model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
        >>> recording.profile.save("profile.safetensors")

    Args:
        model: A loaded transformers model.
        domain: Domain that everything in the block belongs to; profiles of several blocks merge.
        probabilities: Sum the router's full distribution of every token.
        coactivation: Count which experts are chosen together.
        seed: Of the splits.
        name: What the profile calls the model; by default where it was loaded from.

    Returns:
        A context manager; its `profile` holds the counts.

    Raises:
        ModelError: The model cannot be recorded exactly.
    """
    return Recording(model, domain=domain, probabilities=probabilities, coactivation=coactivation, seed=seed, name=name)
