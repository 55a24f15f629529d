"""The tokenised set: what is kept, what is refused, and that nothing is left behind."""

import hashlib
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import full_disk

from moescope.profiler import tokens
from moescope.profiler.errors import OptionError, OutputError, PromptError
from moescope.profiler.prompts import Prompt
from moescope.profiler.tokens import MAX_DOMAINS, SPLITS, PromptLimits, TokenizedPrompts, split_of, tokenize_prompts

MIB = 2**20


def by_bytes(prompts: Sequence[Prompt]) -> list[Sequence[int]]:
    """A tokenizer: text's bytes, and 1 before each message's."""

    def ids(prompt: Prompt) -> list[int]:
        if prompt.text is not None:
            return list(prompt.text.encode())
        return [i for message in prompt.messages or () for i in (1, *message["content"].encode())]

    return [ids(prompt) for prompt in prompts]


def tokenize(prompts: Any, folder: Path, encode: Any = by_bytes, **options: Any) -> TokenizedPrompts:
    settings: dict[str, Any] = {"limits": PromptLimits(), "vocabulary": 256, **options}
    return tokenize_prompts(prompts, encode, folder=folder, **settings)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def refused(prompts: Any, folder: Path, **options: Any) -> str:
    """The one-line message with which a set is refused; nothing stays open or on disk."""
    before = open_files()
    with pytest.raises(PromptError) as caught:
        tokenize(prompts, folder, **options)
    assert open_files() == before
    assert list(folder.iterdir()) == []
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def texts(count: int, **fields: Any) -> Iterator[Prompt]:
    return (Prompt(text=f"prompt {i}", source=f"file.jsonl, line {i + 1}", **fields) for i in range(count))


def split_by_hand(ids: Sequence[int], seed: int) -> int:
    data = struct.pack(f"<Q{len(ids)}i", seed, *ids)
    return hashlib.blake2b(data, digest_size=8).digest()[0] & 15  # little-endian: the first byte is the lowest


def digest_by_hand(rows: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(b"".join(struct.pack(f"<q{len(row)}i", len(row), *row) for row in rows)).hexdigest()


# What is kept


def test_what_is_kept(tmp_path: Path) -> None:
    prompts = [
        Prompt(text="hello", domain="b"),
        Prompt(token_ids=(0, 255, 7), domain="c"),
        Prompt(messages=({"role": "user", "content": "Hi"}, {"role": "user", "content": "!"}), domain="a"),
        Prompt(text="hello", domain="c"),
        Prompt(text="é", domain="b"),
    ]
    rows = [list(b"hello"), [0, 255, 7], [1, *b"Hi", 1, *b"!"], list(b"hello"), list("é".encode())]
    with tokenize(iter(prompts), tmp_path, seed=3) as kept:
        assert len(kept) == 5
        assert kept.domains == ("a", "b", "c")
        assert kept.domain_index.tolist() == [1, 2, 0, 2, 1]
        assert kept.lengths.tolist() == [5, 3, 5, 5, 2]
        assert kept.total_tokens == 20
        assert type(kept.total_tokens) is int
        assert kept.splits.tolist() == [split_by_hand(row, 3) for row in rows]
        assert kept.sha256 == digest_by_hand(rows)
        assert [a.dtype for a in (kept.lengths, kept.domain_index, kept.splits)] == [np.int64, np.int16, np.int8]
        for index in (4, 0, 2, 1, 3, -1):
            ids = kept.ids(index)
            assert ids.dtype == np.int32
            assert ids.tolist() == rows[index]
            ids[:] = 0  # the caller's own
            assert kept.ids(index).tolist() == rows[index]
        with pytest.raises(IndexError):
            kept.ids(5)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_batches_keep_the_order(count: int, tmp_path: Path) -> None:
    batches: list[int] = []

    def encode(prompts: Sequence[Prompt]) -> list[Sequence[int]]:
        batches.append(len(prompts))
        return by_bytes(prompts)

    told: list[tuple[int, int]] = []
    mixed = [Prompt(token_ids=(i % 256, 9)) if i % 3 == 0 else Prompt(text=f"{i}") for i in range(count)]
    rows = [[i % 256, 9] if i % 3 == 0 else list(f"{i}".encode()) for i in range(count)]
    with tokenize(mixed, tmp_path, encode, progress=lambda *n: told.append(n)) as kept:
        assert [kept.ids(i).tolist() for i in range(count)] == rows
        assert kept.sha256 == digest_by_hand(rows)
    ends = [*range(256, count, 256), count]
    assert told == [(end, sum(map(len, rows[:end]))) for end in ends]
    encoded = [sum(i % 3 > 0 for i in range(end - (end % 256 or 256), end)) for end in ends]
    assert batches == [n for n in encoded if n]


def test_batches_of_long_prompts_are_small(tmp_path: Path) -> None:
    sizes: list[int] = []

    def encode(prompts: Sequence[Prompt]) -> list[Sequence[int]]:
        sizes.append(sum(p.size for p in prompts))
        return [[1]] * len(prompts)

    long = Prompt(text="x" * 300_000)
    tokenize([long] * 10, tmp_path, encode).close()
    assert sizes == [1_200_000, 1_200_000, 600_000]


def test_token_ids_bypass_encode(tmp_path: Path) -> None:
    def encode(prompts: Sequence[Prompt]) -> list[Sequence[int]]:
        raise AssertionError("called")

    with tokenize([Prompt(token_ids=(5,))] * 300, tmp_path, encode) as kept:
        assert kept.total_tokens == 300


def test_encode_must_answer_for_each(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^encode returned 1 lists of token ids for 2 prompts$"):
        tokenize(texts(2), tmp_path, lambda prompts: [[1]])


def test_the_set_is_the_same_whatever_holds_the_ids(tmp_path: Path) -> None:
    with (
        tokenize([Prompt(text="ab"), Prompt(text="c")], tmp_path) as first,
        tokenize([Prompt(token_ids=(97, 98)), Prompt(text="c")], tmp_path) as second,
        tokenize([Prompt(text="a"), Prompt(text="bc")], tmp_path) as third,
    ):
        assert first.sha256 == second.sha256 != third.sha256


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    row = np.arange(1000, dtype=np.int32)
    many = (Prompt(text="x") for _ in range(20_000))
    tracemalloc.start()
    try:
        with tokenize(many, tmp_path, lambda prompts: [row] * len(prompts), vocabulary=1000) as kept:
            _, peak = tracemalloc.get_traced_memory()
            assert 4 * kept.total_tokens == 80_000_000
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


# The temporary file


def test_the_file_goes_with_the_set(tmp_path: Path) -> None:
    kept = tokenize(texts(3), tmp_path)
    kept.close()
    kept.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"closed file"):
        kept.ids(0)


def test_the_file_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    make: Callable[..., Any] = tokens.tempfile.TemporaryFile
    monkeypatch.setattr(tokens.tempfile, "TemporaryFile", lambda **kw: asked.append(kw["dir"]) or make(**kw))
    tokenize(texts(3), tmp_path).close()
    assert asked == [tmp_path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> Iterator[Prompt]:
        yield from texts(300)
        raise error

    before = open_files()
    with pytest.raises(error):
        tokenize(interrupted(), tmp_path)
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("prompts", "tokens"), [(20_000, 100), (256, 10_000)])
def test_disk_full(prompts: int, tokens: int, tmp_path: Path) -> None:
    """A limit on file sizes cuts a later write, or the only one, short, as a full disk does."""
    with full_disk(1_000_000), pytest.raises(OutputError) as caught:
        tokenize(texts(prompts), tmp_path, lambda batch: [[7] * tokens] * len(batch))
    assert str(caught.value) == (
        f"{tmp_path} cannot hold the temporary file of token ids: File too large; "
        "free space there or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    with pytest.raises(OutputError, match=f"^{folder} cannot hold the temporary file .*: No such file or directory; "):
        tokenize(texts(3), folder)


def test_an_error_of_the_prompts_is_not_the_folder_s(tmp_path: Path) -> None:
    def broken() -> Iterator[Prompt]:
        yield from texts(3)
        raise OSError("mine")

    with pytest.raises(OSError, match=r"^mine$"):
        tokenize(broken(), tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    with tokenize(texts(3), tmp_path) as kept:
        kept._spool.truncate(30)
        with pytest.raises(PromptError, match=r"^the temporary file of token ids ends before prompt 1 of 3$"):
            kept.ids(0)


# What is refused


def test_no_prompts(tmp_path: Path) -> None:
    assert refused([], tmp_path) == "the prompt set holds no prompts; give at least one"


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    message = refused(texts(3), tmp_path, encode=lambda prompts: [[1], [], [1]])
    assert message == "file.jsonl, line 2: the prompt has no tokens after tokenisation; remove it"


@pytest.mark.parametrize("wrong", [256, -1, 2**31 - 1, 2**40])
def test_token_ids_outside_the_vocabulary(wrong: int, tmp_path: Path) -> None:
    message = refused(texts(2), tmp_path, encode=lambda prompts: [[0, 255], [1, wrong]])
    assert message.startswith(
        f"file.jsonl, line 2: token id {wrong} is outside the model's vocabulary, which ends at 255; "
    )


def test_given_token_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    prompts = [Prompt(token_ids=(255,)), Prompt(token_ids=(3, 256), source="here")]
    assert refused(prompts, tmp_path).startswith("here: token id 256 is outside the model's vocabulary")


def test_most_domains(tmp_path: Path) -> None:
    prompts = [Prompt(text="x", domain=f"{i % MAX_DOMAINS}") for i in range(200)]
    with tokenize(prompts, tmp_path) as kept:
        assert len(kept.domains) == 64
        assert [kept.domains[i] for i in kept.domain_index] == [p.domain for p in prompts]


@pytest.mark.parametrize(
    ("domains", "count"),
    [(65, "65"), (999, "999"), (1000, "1,000"), (1001, "more than 1,000"), (5000, "more than 1,000")],
)
def test_too_many_domains(domains: int, count: str, tmp_path: Path) -> None:
    prompts = (Prompt(text="x", domain=f"{i % domains}", source=f"line {i + 1}") for i in range(2 * domains))
    assert refused(prompts, tmp_path) == (
        f"the prompt set has {count} domains, at most 64 are allowed (one more at line 65); "
        "group them, or name another field with --domain-field"
    )


def test_counting_domains_ends(tmp_path: Path) -> None:
    prompts = (Prompt(text="x", domain=f"{i}") for i in range(5000))
    assert "more than 1,000 domains" in refused(prompts, tmp_path)
    assert next(prompts).domain == "1001"


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_limits_are_positive(max_tokens: int) -> None:
    with pytest.raises(OptionError, match=f"^--max-prompt-tokens must be at least 1, not {max_tokens}$"):
        PromptLimits(max_tokens=max_tokens)


def test_truncate_needs_a_length() -> None:
    with pytest.raises(OptionError, match=r"^--truncate needs --max-prompt-tokens, the number of tokens to keep$"):
        PromptLimits(truncate=True)


def of_lengths(lengths: Sequence[int]) -> list[Prompt]:
    return [Prompt(text="x" * n, source=f"file.jsonl, line {i}") for i, n in enumerate(lengths, 1)]


def test_too_long_prompts_are_all_counted(tmp_path: Path) -> None:
    lengths = [5] * 963 + [6] * 30 + [2310] + [6] * 6
    message = refused(of_lengths(lengths), tmp_path, limits=PromptLimits(max_tokens=5))
    assert message == (
        "37 of 1,000 prompts are longer than --max-prompt-tokens 5 (longest: 2,310 tokens, file.jsonl, line 994); "
        "raise it, leave them out with --skip-long, or cut them with --truncate"
    )


def test_long_prompts_are_left_out_on_request(tmp_path: Path) -> None:
    prompts = [
        Prompt(text="x" * n, domain=domain, source=f"line {i}")
        for i, (n, domain) in enumerate([(5, "a"), (9, "gone"), (3, "b"), (8, "a")])
    ]
    with tokenize(prompts, tmp_path, limits=PromptLimits(max_tokens=6, skip=True)) as kept:
        assert kept.lengths.tolist() == [5, 3]
        assert kept.domains == ("a", "b")
        assert kept.domain_index.tolist() == [0, 1]
        assert kept.skipped == 2
        assert kept.total_tokens == 8
    with tokenize(prompts[:1] + prompts[2:3], tmp_path, limits=PromptLimits(max_tokens=6)) as same:
        assert same.sha256 == kept.sha256
        assert same.skipped == 0
    message = refused(of_lengths([7, 8]), tmp_path, limits=PromptLimits(max_tokens=6, skip=True))
    assert message.startswith("2 of 2 prompts are longer than --max-prompt-tokens 6")
    with pytest.raises(OptionError, match="exclude one another"):
        PromptLimits(max_tokens=3, truncate=True, skip=True)


def test_one_prompt_is_too_long(tmp_path: Path) -> None:
    message = refused(of_lengths([5, 7, 6, 1]), tmp_path, limits=PromptLimits(max_tokens=6))
    assert message.startswith(
        "1 of 4 prompts is longer than --max-prompt-tokens 6 (longest: 7 tokens, file.jsonl, line 2"
    )


def test_the_first_of_the_longest_prompts_is_named(tmp_path: Path) -> None:
    message = refused(of_lengths([5, 6, 7, 7]), tmp_path, limits=PromptLimits(max_tokens=5))
    assert message.startswith(
        "3 of 4 prompts are longer than --max-prompt-tokens 5 (longest: 7 tokens, file.jsonl, line 3)"
    )


def test_truncate(tmp_path: Path) -> None:
    prompts = [Prompt(text="abcdef"), Prompt(token_ids=(1, 2, 3, 4)), Prompt(text="ab"), Prompt(text="abc")]
    rows = [list(b"abc"), [1, 2, 3], list(b"ab"), list(b"abc")]
    with tokenize(prompts, tmp_path, limits=PromptLimits(max_tokens=3, truncate=True), seed=1) as kept:
        assert [kept.ids(i).tolist() for i in range(4)] == rows
        assert kept.lengths.tolist() == [3, 3, 2, 3]
        assert kept.total_tokens == 11
        assert kept.sha256 == digest_by_hand(rows)
        assert kept.splits.tolist() == [split_by_hand(row, 1) for row in rows]


# Splits


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("ids", [[], [0], [1, 2, 3], [2**31 - 1] * 3, list(range(10_000))])
def test_split_of(ids: list[int], seed: int) -> None:
    expected = split_by_hand(ids, seed)
    assert split_of(ids, seed) == expected
    for dtype in (np.int32, np.int64, np.dtype(">i4")):
        assert split_of(np.array(ids, dtype), seed) == expected


def test_splits_are_pinned() -> None:
    """Files rest on these: another rule needs another format version."""
    assert [split_of([i, i + 1], 0) for i in range(12)] == [4, 8, 2, 13, 10, 0, 1, 7, 6, 12, 13, 12]


def test_splits_are_uniform_and_depend_on_the_seed() -> None:
    prompts = 16_000
    first = np.array([split_of([i], 0) for i in range(prompts)])
    second = np.array([split_of([i], 1) for i in range(prompts)])
    joint = np.zeros((SPLITS, SPLITS), int)
    np.add.at(joint, (first, second), 1)
    for counts, classes in ((np.bincount(first, minlength=SPLITS), SPLITS), (joint.ravel(), SPLITS**2)):
        expected = prompts / classes
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - (classes - 1)) < 4 * np.sqrt(2 * (classes - 1))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"^--seed must be a whole number from 0 to 2\*\*64 - 1, not {seed}$"):
        split_of([1], seed)
    with pytest.raises(OptionError, match=r"^--seed must be"):
        tokenize([], tmp_path, seed=seed)  # before the prompts are read
