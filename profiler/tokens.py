"""The tokenised prompt set: on disk, checked as a whole before an engine starts."""

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.errors import OptionError, OutputError, PromptError
from moescope.profiler.prompts import Prompt

SPLITS = 16
MAX_DOMAINS = 64

_BATCH_PROMPTS = 256
_BATCH_SIZE = 2**20
_COUNTED_DOMAINS = 1000


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """How long a prompt may be.

    Attributes:
        max_tokens: Most tokens of one prompt; None for any number.
        truncate: Keep the first `max_tokens` tokens of a longer prompt, rather than refuse it.
        skip: Leave longer prompts out, rather than refuse the set.

    Raises:
        OptionError: `max_tokens` is below 1, or `truncate` is asked for without it.
    """

    max_tokens: int | None = None
    truncate: bool = False
    skip: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"--max-prompt-tokens must be at least 1, not {self.max_tokens}")
        if self.truncate and self.max_tokens is None:
            raise OptionError("--truncate needs --max-prompt-tokens, the number of tokens to keep")
        if self.truncate and self.skip:
            raise OptionError("--truncate and --skip-long exclude one another: cut longer prompts, or leave them out")


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompts:
    """N tokenised prompts in order: token ids in one temporary file, the rest in memory.

    The file goes when this is closed. One thread reads at a time.

    Attributes:
        domains: The D domains' names, sorted.
        lengths: (N,) int64, tokens of each prompt; at least 1.
        domain_index: (N,) int16, each prompt's place in `domains`.
        splits: (N,) int8, `split_of` each prompt; below `SPLITS`.
        sha256: Hex digest over each prompt's length as a little-endian int64 and then its ids as int32, in order.
        total_tokens: Sum of `lengths`.
        skipped: Prompts that were left out because they are too long.
    """

    domains: tuple[str, ...]
    lengths: NDArray[np.int64]
    domain_index: NDArray[np.int16]
    splits: NDArray[np.int8]
    sha256: str
    total_tokens: int
    _ends: NDArray[np.int64]
    _spool: BinaryIO
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> NDArray[np.int32]:
        """Token ids of one prompt.

        Returns:
            (T,) int32, the caller's own.

        Raises:
            IndexError: There is no such prompt.
            ValueError: The set has been closed.
            PromptError: The temporary file has been cut short.
        """
        length = int(self.lengths[index])
        self._spool.seek(4 * (int(self._ends[index]) - length))
        data = bytearray(self._spool.read(4 * length))
        if len(data) != 4 * length:
            raise PromptError(f"the temporary file of token ids ends before prompt {index + 1} of {len(self):,}")
        return np.frombuffer(data, "<i4").astype(np.int32, copy=False)

    def close(self) -> None:
        """Remove the token ids from disk."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def split_of(token_ids: Sequence[int] | NDArray[np.integer[Any]], seed: int) -> int:
    """The split a prompt belongs to: the same for the same seed and tokens, on any machine.

    BLAKE2b with an 8-byte digest over the seed as 8 bytes and the ids as int32, all little-endian; the digest, read as
    a little-endian number, modulo `SPLITS`.

    Args:
        token_ids: (T,) ids, each at least 0 and below 2**31.
        seed: At least 0 and below 2**64.

    Raises:
        OptionError: The seed is out of range.
    """
    data = _seed_bytes(seed) + np.asarray(token_ids, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % SPLITS


def _seed_bytes(seed: int) -> bytes:
    if not 0 <= seed < 2**64:
        raise OptionError(f"--seed must be a whole number from 0 to 2**64 - 1, not {seed}")
    return seed.to_bytes(8, "little")


def tokenize_prompts(
    prompts: Iterable[Prompt],
    encode: Callable[[Sequence[Prompt]], list[Sequence[int]]],
    *,
    folder: Path,
    limits: PromptLimits,
    vocabulary: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedPrompts:
    """Tokenise a prompt set onto disk, and check all of it.

    Args:
        prompts: The set, read once.
        encode: Token ids of a batch of prompts with text or messages, in order. Prompts with token ids bypass it.
        folder: Holds the temporary file, four bytes a token; must exist.
        limits: How long a prompt may be.
        vocabulary: Token ids of the model end before this number.
        seed: Of the splits.
        progress: Told the prompts and the tokens so far, after each batch.

    Returns:
        The tokenised set; to be closed.

    Raises:
        PromptError: There are no prompts, too many domains, prompts that are too long, or one without tokens or with
            a token id outside the vocabulary.
        OptionError: The seed is out of range.
        OutputError: The folder cannot hold the temporary file.
    """
    _seed_bytes(seed)  # refused before the work, not after
    with _writing(folder):
        # Unbuffered, so that closing after a failed write has nothing left to write.
        spool = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, prefix="moescope-", buffering=0))  # noqa: SIM115
    try:
        return _tokenized(prompts, encode, spool, folder, limits, vocabulary, seed, progress)
    except BaseException:
        spool.close()
        raise


def _tokenized(
    prompts: Iterable[Prompt],
    encode: Callable[[Sequence[Prompt]], list[Sequence[int]]],
    spool: BinaryIO,
    folder: Path,
    limits: PromptLimits,
    vocabulary: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> TokenizedPrompts:
    names: dict[str, int] = {}  # domains in order of appearance
    lengths, domain_index, splits = array("q"), array("h"), array("b")
    digest = hashlib.sha256()
    too_long = _TooLong(limits)
    tokens = 0
    kept: set[str] = set()  # domains that have a prompt
    for batch in _batches(_few_domains(prompts, names)):
        rows = []
        for prompt, encoded in zip(batch, _encoded(batch, encode), strict=True):
            ids = too_long.check(_checked_ids(encoded, vocabulary, prompt.source), prompt.source)
            if ids is None:
                continue
            kept.add(prompt.domain)
            rows.append(ids)
            lengths.append(len(ids))
            domain_index.append(names[prompt.domain])
            splits.append(split_of(ids, seed))
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
            tokens += len(ids)
        if rows:
            with _writing(folder):
                _write(spool, np.concatenate(rows).tobytes())
        if progress is not None:
            progress(len(lengths), tokens)
    if not lengths and not too_long.count:
        raise PromptError("the prompt set holds no prompts; give at least one")
    too_long.refuse(len(lengths))
    domains = tuple(sorted(kept))
    place = np.array([domains.index(name) if name in kept else -1 for name in names], np.int16)
    all_lengths = np.array(lengths, np.int64)
    return TokenizedPrompts(
        domains=domains,
        lengths=all_lengths,
        domain_index=place[np.array(domain_index, np.int16)],
        splits=np.array(splits, np.int8),
        sha256=digest.hexdigest(),
        total_tokens=tokens,
        skipped=too_long.count if limits.skip else 0,
        _ends=np.cumsum(all_lengths),
        _spool=spool,
    )


def _few_domains(prompts: Iterable[Prompt], names: dict[str, int]) -> Iterator[Prompt]:
    """The prompts, while their domains are few; `names` gets each domain's number at its first prompt."""
    prompts = iter(prompts)
    for prompt in prompts:
        if len(names) == MAX_DOMAINS and prompt.domain not in names:
            found = {*names, prompt.domain}
            for other in prompts:  # read on, without tokenising, to say how many there are
                found.add(other.domain)
                if len(found) > _COUNTED_DOMAINS:
                    break
            count = f"more than {_COUNTED_DOMAINS:,}" if len(found) > _COUNTED_DOMAINS else f"{len(found):,}"
            raise PromptError(
                f"the prompt set has {count} domains, at most {MAX_DOMAINS} are allowed (one more at {prompt.source}); "
                "group them, or name another field with --domain-field"
            )
        names.setdefault(prompt.domain, len(names))
        yield prompt


def _batches(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Batches of prompts, as many or as large as is good for tokenisers."""
    batch: list[Prompt] = []
    size = 0
    for prompt in prompts:
        batch.append(prompt)
        size += prompt.size
        if len(batch) == _BATCH_PROMPTS or size >= _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[Prompt], encode: Callable[[Sequence[Prompt]], list[Sequence[int]]]
) -> Iterator[Sequence[int]]:
    texts = [prompt for prompt in batch if prompt.token_ids is None]
    encoded = encode(texts) if texts else []
    if len(encoded) != len(texts):
        raise ValueError(f"encode returned {len(encoded)} lists of token ids for {len(texts)} prompts")
    rest = iter(encoded)
    return (next(rest) if prompt.token_ids is None else prompt.token_ids for prompt in batch)


def _checked_ids(token_ids: Sequence[int], vocabulary: int, where: str) -> NDArray[np.int32]:
    """Token ids as (T,) little-endian int32, T at least 1, each in the vocabulary."""
    ids = np.asarray(token_ids, np.int64)
    if not ids.size:
        raise PromptError(f"{where}: the prompt has no tokens after tokenisation; remove it")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise PromptError(
            f"{where}: token id {wrong[0]} is outside the model's vocabulary, which ends at {vocabulary - 1}; "
            "are the ids of another model's tokenizer?"
        )
    return ids.astype("<i4")


class _TooLong:
    """Cuts prompts that are too long, or counts them, so that one message tells of all."""

    def __init__(self, limits: PromptLimits) -> None:
        self._limits = limits
        self.count = 0
        self._longest = 0
        self._source = ""

    def check(self, ids: NDArray[np.int32], source: str) -> NDArray[np.int32] | None:
        """The ids to keep, (T,) int32; None to leave the prompt out."""
        most = self._limits.max_tokens
        if most is None or len(ids) <= most:
            return ids
        if self._limits.truncate:
            return ids[:most]
        self.count += 1
        if len(ids) > self._longest:
            self._longest, self._source = len(ids), source
        return None if self._limits.skip else ids

    def refuse(self, prompts: int) -> None:
        """Raise PromptError where there were any, or none is left."""
        if not self.count or (self._limits.skip and prompts):
            return
        total = prompts + self.count if self._limits.skip else prompts
        raise PromptError(
            f"{self.count:,} of {total:,} prompts {'is' if self.count == 1 else 'are'} longer than "
            f"--max-prompt-tokens {self._limits.max_tokens} (longest: {self._longest:,} tokens, {self._source}); "
            "raise it, leave them out with --skip-long, or cut them with --truncate"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot hold the temporary file of token ids: {error.strerror or error}; "
            "free space there or choose another folder"
        ) from error


def _write(spool: BinaryIO, data: bytes) -> None:
    """Write all of it; an unbuffered file may take it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[spool.write(rest) :]
