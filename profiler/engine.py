"""The one protocol that an engine fulfils: encode prompts, plan batches, run them, hand over sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.profile import EngineInfo, ModelInfo
from moescope.profiler.prompts import Prompt
from moescope.profiler.trace_writer import TraceWriter


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way into an engine.

    Attributes:
        token_ids: int32 [n], the prompt.
        domain: Index of its domain.
        split: Its split, 0..15.
        number: Its place in the prompt set.
    """

    token_ids: NDArray[np.int32]
    domain: int
    split: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """How to continue the prompts.

    Attributes:
        max_tokens: Tokens to generate at most; 0 records the prompts alone.
        temperature: 0 is greedy.
        seed: Seed of the sampling; the same for every batch of a run, mixed with the batch's number.
    """

    max_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0


class Sums(Protocol):
    """Sums that were held against the requests' own lengths."""

    def add_to(self, arrays: dict[str, NDArray[np.int64]], tokens: Sequence[int]) -> None:
        """Add to a profile's integer totals, by the names of its buffers."""
        ...


@dataclass(frozen=True, slots=True)
class Completed:
    """What came out of a batch of requests.

    Attributes:
        sums: Sums, already held against the lengths.
        tokens: For each group of the sums, tokens that were routed, from prompt lengths and outputs.
    """

    sums: Sums
    tokens: tuple[int, ...]


class Engine(Protocol):
    """Runs requests through a model and records their routing.

    Attributes:
        model: The model, with its MoE layers.
        info: The engine, for the record.
        vocabulary: Number of token ids.
        context: Longest sequence the model is made for, or None.
        probabilities: Whether full distributions are summed.
        coactivation: Whether pairs of experts are counted.
        batching: What shapes the batches, for the record: a resumed run must use the same.
        note: One line about the recording for the user, or "".
    """

    model: ModelInfo
    info: EngineInfo
    vocabulary: int
    context: int | None
    probabilities: bool
    coactivation: bool
    batching: dict[str, int]

    @property
    def note(self) -> str:
        """One line about the recording for the user, or ""."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts given as text or as messages."""
        ...

    def plan(self, lengths: NDArray[np.int64], generation: Generation) -> list[list[int]]:
        """Group prompts of the given lengths into batches; the same every time for the same lengths."""
        ...

    def run(self, requests: Sequence[Request], generation: Generation, batch: int) -> Completed:
        """Run one batch; raises InvariantError if what was recorded does not add up."""
        ...

    def trace(self, writer: TraceWriter | None) -> None:
        """Trace the tokens of the batches to come, or no longer; raises OptionError where the engine cannot."""
        ...

    def findings(self) -> dict[str, Any]:
        """What the run's record says beside its settings when it is complete; JSON types."""
        ...

    def router_weights(self) -> list[NDArray[np.float32]]:
        """Router weights (E, H) of each MoE layer."""
        ...

    def distributions(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """The router's full distributions for a short prompt, float32 (L, T, E), zero-padded; counts nothing.

        T may be less than the prompt's length; None where the engine does not record distributions.
        """
        ...

    def texts(self, token_ids: NDArray[np.int32]) -> list[str]:
        """Each token as text; empty where there is no tokenizer."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
