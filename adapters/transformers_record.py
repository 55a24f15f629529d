"""Record around the user's own forwards and `model.generate(...)` calls."""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_hooks import DECODE, PREFILL, Rows, Watch
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile, RunInfo
from moescope.profiler.recorder import Group
from moescope.profiler.run import now
from moescope.profiler.tokens import split_of
from moescope.profiler.totals import Totals


class Recording:
    """What `record` yields; after the block, `profile` holds what was routed inside it.

    Every `model.generate(...)` and every forward of the model inside the block is counted when it has come to its end;
    one that fails counts nothing. Padding is told by the attention mask, so pass it. Where a forward is given a filled
    cache, its columns count as decode; columns that were routed before are not counted again.
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
        self._sequences = 0
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []  # sequences of the call that is running; they count when it has come to its end
        self._generating = False
        self._expected: dict[Group, int] = {}
        self._run = RunInfo(
            uuid=str(uuid.uuid4()),
            created=now(),
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
        self._model._moescope_recording = True
        self._watch.__enter__()
        if hasattr(self._model, "generate"):
            self._model.generate = self._wrap_generate(self._model.generate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)
        self._model.__dict__.pop("generate", None)
        self._model.__dict__.pop("_moescope_recording", None)

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                raise ModelError("recording model.generate(...) needs input_ids of shape (B, S)")
            self._refuse_beams(kwargs)
            mask = self._prompt_mask(ids, kwargs)
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

    def _refuse_beams(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self._model.generation_config
        beams = kwargs.get("num_beams", getattr(config, "num_beams", 1)) or 1
        lookup = kwargs.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
        if beams > 1 or kwargs.get("assistant_model") is not None or lookup:
            raise ModelError(
                "recording counts greedy and sampled generation; beam search and assisted generation route tokens that "
                "are thrown away, so moescope does not count them: use num_beams=1 and no assistant"
            )

    def _prompt_mask(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            if mask.shape != ids.shape:
                raise ModelError(f"attention_mask is {list(mask.shape)}, but input_ids are {list(ids.shape)}")
            return mask.cpu() != 0
        config = kwargs.get("generation_config") or self._model.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if pad is not None and bool((ids == pad).any()):
            raise ModelError(
                "input_ids hold the padding token but no attention_mask tells which of it is padding; pass it"
            )
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

    def _before(self, ids: Tensor | None, mask: Tensor | None, past: int) -> None:
        """A forward outside `generate`: the rows are new, or go on with the cache of the forward before."""
        if self._generating:
            return
        if ids is None:
            raise ModelError("recording needs input_ids; inputs_embeds name no tokens")
        batch, width = ids.shape
        real = torch.ones(batch, width, dtype=torch.bool) if mask is None else mask[:, past : past + width]
        rows = self._watch.rows
        if rows is None or past == 0 or past != rows.done_columns or len(rows.owners) != batch:
            rows = Rows(self._owners(ids, real), prompt_columns=0 if past else int(width))
        self._watch.expect(rows)
        self._expected = dict.fromkeys(rows.groups(), 0)
        phase = DECODE if past else PREFILL
        for (domain, split), tokens in zip(rows.owners, real.sum(dim=1).tolist(), strict=True):
            self._expected[Group(domain, phase, split)] += tokens

    def _after(self) -> None:
        if not self._generating and self._watch.rows is not None:
            self._drain(self._watch.rows, self._expected)

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
