"""Sums over a trace, against plain loops over its rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import about, random_rows, write_batches

from moescope.profiler import trace_sums as sums_module
from moescope.profiler import trace_writer
from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.profile import LayerInfo
from moescope.profiler.trace import Trace, TraceRows
from moescope.profiler.trace_sums import HELD, LAGS, STEPS, TraceSums, sum_trace

BATCHES = [[4, 0, 7], [1, 2], [9, 3, 5, 6], [8]]
TOKENS = 23


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, TraceRows]:
    """Requests that lie across shards of 17 rows, counted 5 rows at a time."""
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 17 * about(weights=True).row_bytes)
    monkeypatch.setattr(sums_module, "_BLOCK", 5)
    given = write_batches(tmp_path / "t", about(weights=True), BATCHES, tokens=TOKENS)
    return tmp_path / "t", TraceRows.concatenate(given)


def by_request(rows: TraceRows) -> dict[int, TraceRows]:
    found = {int(number): rows.take(rows.request == number) for number in np.unique(rows.request)}
    for own in found.values():
        np.testing.assert_array_equal(own.position, np.arange(len(own)))
    return found


def check(sums: TraceSums, rows: TraceRows) -> None:
    """Every sum, counted again token by token."""
    layers = sums.about.model.layers
    requests = by_request(rows)
    total = len(rows)
    assert (sums.tokens, sums.requests, sums.anchors) == (total, len(requests), total)

    counts = np.zeros_like(sums.counts)
    cells = np.zeros_like(sums.cell_tokens)
    steps, step_requests = np.zeros(len(STEPS), int), np.zeros(len(STEPS), int)
    occurrences = Counter(rows.token.tolist())
    vocabulary: dict[int, Any] = {token: np.zeros(sums.counts.shape[2:], int) for token in occurrences}
    lag_pairs, lag_kept = np.zeros(len(LAGS), int), np.zeros((len(LAGS), len(layers)), int)
    windows, held = np.zeros(HELD, int), np.zeros((HELD, len(layers)), int)
    split_kept, split_pairs = np.zeros((16, len(layers)), int), np.zeros(16, int)
    top_kept, top_counts = np.zeros(len(layers), int), np.zeros(sums.counts.shape[2:], int)
    done = 0
    for own in requests.values():
        done += len(own)
        step = next(i for i, share in enumerate(STEPS) if done <= np.ceil(share * total))
        steps[step] += len(own)
        step_requests[step] += 1
        for t in range(len(own)):
            bucket = max(b for b, first in enumerate(sums.position_starts) if first <= t)
            cells[step, bucket] += 1
            lag_pairs += [t >= lag for lag in LAGS]
            split_pairs[own.split[0]] += t > 0
            windows += [t >= m for m in range(HELD)]
            for slot, layer in enumerate(layers):
                sets = [set(own.experts[i, slot, : layer.top_k].tolist()) for i in range(t + 1)]
                for expert in sets[t]:
                    counts[step, bucket, slot, expert] += 1
                    vocabulary[int(own.token[t])][slot, expert] += 1
                split_kept[own.split[0], slot] += len(sets[t] & sets[t - 1]) if t else 0
                for number, lag in enumerate(LAGS):
                    if t >= lag:
                        lag_kept[number, slot] += len(sets[t] & sets[t - lag])
                for m in range(min(HELD, t + 1)):
                    held[m, slot] += len(set.intersection(*sets[t - m :]))
                assert own.weights is not None
                top = own.experts[:, slot][np.arange(len(own)), own.weights[:, slot, : layer.top_k].argmax(1)]
                top_counts[slot, top[t]] += 1
                top_kept[slot] += t > 0 and top[t] == top[t - 1]
    for name, expected in {
        "counts": counts,
        "cell_tokens": cells,
        "step_tokens": steps,
        "step_requests": step_requests,
        "lag_pairs": lag_pairs,
        "lag_kept": lag_kept,
        "held_windows": windows,
        "held": held,
        "top_kept": top_kept,
        "top_counts": top_counts,
        "kept": lag_kept[0],
        "pairs": lag_pairs[0],
        "split_kept": split_kept,
        "split_pairs": split_pairs,
        "split_random_pairs": split_pairs,
    }.items():
        np.testing.assert_array_equal(getattr(sums, name), expected, err_msg=name)
    common = [count for _, count in occurrences.most_common(len(sums.frequent))]
    assert sums.occurrences.tolist() == common
    for place, token in enumerate(sums.frequent.tolist()):
        assert sums.occurrences[place] == occurrences[token]
        np.testing.assert_array_equal(sums.vocabulary[place], vocabulary[token])

    longest = requests[sums.longest]
    assert len(longest) == max(map(len, requests.values()))
    for w, start in enumerate(range(0, len(longest), sums.window)):
        part = longest.take(slice(start, start + sums.window))
        assert sums.window_tokens[w] == len(part)
        for slot, layer in enumerate(layers):
            found = np.bincount(part.experts[:, slot, : layer.top_k].ravel(), minlength=counts.shape[-1])
            np.testing.assert_array_equal(sums.windows[w, slot], found)
    assert sums.window_tokens.sum() == len(longest)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_every_sum_is_that_of_a_loop_over_tokens(written: tuple[Path, TraceRows], n_jobs: int) -> None:
    folder, rows = written
    sums = sum_trace(Trace(folder), vocabulary=40, n_jobs=n_jobs)
    check(sums, rows)
    np.testing.assert_array_equal(sums.sample, rows.experts)
    np.testing.assert_array_equal(sums.sample_split, rows.split)
    assert not sums.chosen
    np.testing.assert_array_equal(sums.counts.sum(axis=(0, 1)), Trace(folder).profile().selection_counts.sum((0, 1)))


def test_chosen_requests_are_all_that_is_counted(written: tuple[Path, TraceRows]) -> None:
    folder, rows = written
    for shard in Trace(folder).index.shards:
        if not shard.first_request <= 3 <= shard.last_request and not shard.first_request <= 9 <= shard.last_request:
            (folder / shard.name).unlink()  # reading it would fail
    sums = sum_trace(Trace(folder), requests=[9, 3])
    check(sums, rows.take(np.isin(rows.request, [3, 9])))
    assert sums.chosen
    assert sum_trace(Trace(folder), requests=[3, 9, 11]).requests == 2
    with pytest.raises(OptionError, match="none of the requests asked for is in the trace"):
        sum_trace(Trace(folder), requests=[11])


def test_a_random_token_is_one_of_the_same_request(tmp_path: Path) -> None:
    of = about((LayerInfo(0, 256, 2),))
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "t")) as writer:
        for batch, requests in enumerate(([0, 1, 2], [3])):
            writer.admit(requests, [40] * len(requests))
            owners = np.array(requests * 20 if batch == 0 else requests, np.uint32)
            places = np.arange(len(owners)) // len(requests)
            byte = np.zeros(len(owners), np.uint8)
            experts = np.stack([owners * 2, owners * 2 + 1], axis=1).astype(np.uint8)[:, None]
            writer.append(
                TraceRows(owners, places.astype(np.uint32), places.astype(np.int32), byte, byte, byte, experts)
            )
            writer.commit(batch)
        writer.finish()
    sums = sum_trace(Trace(tmp_path / "t"))
    # as many as neighbours, 19 of each request: the request of one token has neither
    assert sums.split_random_pairs.sum() == sums.pairs == 57
    assert sums.split_random_kept.sum(axis=0).tolist() == sums.kept.tolist() == [114]


def test_requests_weigh_as_much_among_random_tokens_as_among_neighbours(tmp_path: Path) -> None:
    """Short requests that keep their experts beside a long one that does not: order brings nothing in either."""
    of, lengths = about((LayerInfo(0, 64, 1),)), [2] * 300 + [900]
    owners = np.repeat(np.arange(301), lengths)
    rows = random_rows(of, owners.tolist(), [place for length in lengths for place in range(length)])
    rows.experts[:600, 0, 0] = owners[:600] % 64
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "t")) as writer:
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    sums = sum_trace(Trace(tmp_path / "t"))
    assert abs(sums.kept[0] - sums.split_random_kept.sum()) < 0.02 * sums.pairs


def test_a_random_token_is_not_the_token_itself(tmp_path: Path) -> None:
    of = about((LayerInfo(0, 3, 1),))
    rows = random_rows(of, [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3, [0, 1, 2] * 4)
    rows.experts[:, 0, 0] = rows.position
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "t")) as writer:
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    assert sum_trace(Trace(tmp_path / "t")).split_random_kept.sum() == 0


def test_a_weight_that_rounding_made_negative_is_not_the_largest(tmp_path: Path) -> None:
    of = about((LayerInfo(0, 8, 3),), weights=True)
    rows = random_rows(of, [0], [0])
    assert rows.weights is not None
    rows.experts[0, 0], rows.weights[0, 0] = [5, 3, 1], [-0.0, 0.75, -1e-4]
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "t", weights=True)) as writer:
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    counts = sum_trace(Trace(tmp_path / "t")).top_counts
    assert counts is not None
    assert counts.argmax() == 3


def test_samples_are_spread_and_the_same_for_one_seed(
    written: tuple[Path, TraceRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = written
    monkeypatch.setattr(sums_module, "ANCHORS", 60)
    one, same, other = (sum_trace(Trace(folder), pair_tokens=23, seed=seed) for seed in (0, 0, 1))
    assert one.sample.shape == (23, 3, 3)
    for place, token in enumerate(one.sample):
        assert (rows.experts[10 * place : 10 * place + 10] == token).all(axis=(1, 2)).any()
    np.testing.assert_array_equal(one.sample, same.sample)
    assert (one.sample != other.sample).any()
    assert 30 < one.anchors < 90
    np.testing.assert_array_equal(one.held[0], one.anchors * np.array([2, 3, 1]))
    assert one.pairs == 220


def test_rows_of_many_requests_are_not_all_kept(
    written: tuple[Path, TraceRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "_MOST_HISTORY", 4)
    whole = sum_trace(Trace(written[0]))
    assert whole.pairs == 220
    assert whole.lag_pairs[3] < 10 * (TOKENS - 4)
    monkeypatch.undo()
    exact = sum_trace(Trace(written[0]))
    for name in ("kept", "top_kept", "counts", "vocabulary", "windows"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(exact, name))


def test_an_unfinished_trace_is_read_to_its_last_batch(written: tuple[Path, TraceRows]) -> None:
    folder, rows = written
    index = folder / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-2]))
    trace = Trace(folder)
    assert trace.tokens == 207
    check(sum_trace(trace), rows.take(slice(0, 207)))


def test_what_cannot_be_is_refused(written: tuple[Path, TraceRows], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must be at least 1"):
        sum_trace(Trace(written[0]), vocabulary=0)
    shard = written[0] / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TraceError, match="shard-000001"):
        sum_trace(Trace(written[0]))
    of = about((LayerInfo(0, 8, 2), LayerInfo(1, 6, 2)))
    rows = random_rows(of, [0, 0], [0, 1])
    rows.experts[1, 1, 1] = 6
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "wide")) as writer:
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    with pytest.raises(TraceError, match="layer 1: an expert id is at or beyond E = 6"):
        sum_trace(Trace(tmp_path / "wide"))
