"""Reading traces: slices, other tools, counts, damage, lies."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from traces import about, assert_rows_equal, random_rows, write_batches

from moescope.profiler import trace as trace_module
from moescope.profiler import trace_writer
from moescope.profiler.errors import MoescopeError, ProfileError, TraceError
from moescope.profiler.profile import LayerInfo, RoutingProfile, merge
from moescope.profiler.trace import ABOUT_NAME, INDEX_NAME, Trace, TraceAbout, TraceRows, shard_header

BATCHES = [[4, 0, 7], [1, 2], [9, 3, 5, 6], [8]]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 7 tokens, so that batches and requests lie across them."""
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 7 * about(weights=True).row_bytes)


@pytest.fixture
def written(tmp_path: Path, small_shards: None) -> tuple[Path, TraceRows]:
    given = write_batches(tmp_path / "trace", about(weights=True), BATCHES)
    return tmp_path / "trace", TraceRows.concatenate(given)


def test_what_was_written_is_read(written: tuple[Path, TraceRows]) -> None:
    folder, whole = written
    trace = Trace(folder)
    assert (trace.tokens, trace.unfinished, trace.index.complete) == (60, 0, True)
    assert [shard.rows for shard in trace.index.shards] == [7] * 8 + [4]
    for _ in range(2):  # the second time without their checksums
        assert_rows_equal(TraceRows.concatenate(list(trace.rows())), whole)
    assert trace.about == about(weights=True)
    assert trace.verify() == trace_module.Verification((), 0, 60, 0, ())


def test_memory_is_used_again_only_where_asked(written: tuple[Path, TraceRows]) -> None:
    folder, whole = written
    seen = [replace(rows, token=rows.token.copy()) for rows in Trace(folder).rows(reuse=True)]
    np.testing.assert_array_equal(np.concatenate([rows.token for rows in seen]), whole.token)
    assert np.shares_memory(seen[0].request, seen[1].request)
    first, second, *_ = Trace(folder).rows()
    assert not np.shares_memory(first.request, second.request)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (6, 8), (10, 33), (59, 60), (0, 60), (13, 13), (50, 1000)])
def test_a_range_reads_its_shards_alone(written: tuple[Path, TraceRows], start: int, stop: int) -> None:
    folder, whole = written
    trace = Trace(folder)
    for place, shard in enumerate(trace.index.shards):
        if not (place * 7 < stop and place * 7 + shard.rows > start) or start == stop:
            (folder / shard.name).unlink()  # reading it would fail
    for _ in range(2):
        parts = list(trace.rows(start, stop))
        assert_rows_equal(TraceRows.concatenate([whole.take(slice(0, 0)), *parts]), whole.take(slice(start, stop)))


@pytest.mark.parametrize("skipped", [1, 3, 1024])
def test_requests_are_found_where_they_are(
    written: tuple[Path, TraceRows], skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_SKIPPED_ROWS", skipped)
    folder, whole = written
    trace = Trace(folder)
    for numbers in ([2], [8, 0], [5, 5, 9], [11], [], list(range(10))):
        expected = whole.take(np.isin(whole.request, numbers))
        assert_rows_equal(trace.requests(numbers), expected)
    np.testing.assert_array_equal(trace.requests([3]).position, np.arange(6))
    for shard in trace.index.shards:
        if not shard.first_request <= 8 <= shard.last_request:
            (folder / shard.name).unlink()
    assert len(trace.requests([8])) == 6


def test_any_tool_reads_a_shard(written: tuple[Path, TraceRows]) -> None:
    folder, whole = written
    found = load_file(folder / "shard-000001.safetensors")
    assert set(found) == set(TraceRows.__slots__)
    for name, array in found.items():
        expected = getattr(whole, name)[7:14]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    with safe_open(folder / "shard-000001.safetensors", framework="numpy") as file:
        meaning = json.loads(file.metadata()["moescope_trace"])
    assert meaning == {
        "run": "run",
        "domains": ["code", "prose"],
        "layers": [1, 3, 4],
        "experts": [8, 6, 8],
        "top_k": [2, 3, 1],
    }


@pytest.mark.parametrize(
    ("experts", "kind"), [(8, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_take_the_narrowest_type(tmp_path: Path, experts: int, kind: Any) -> None:
    of = about((LayerInfo(0, experts, 2),))
    assert of.columns["experts"][0] == kind
    (given,) = write_batches(tmp_path / "t", of, [[0, 1]])
    assert given.experts.max() > experts // 2
    (rows,) = Trace(tmp_path / "t").rows()
    assert_rows_equal(rows, given)
    assert load_file(tmp_path / "t" / "shard-000000.safetensors")["experts"].dtype == kind


def test_a_token_takes_few_bytes_beside_its_ids() -> None:
    of = about(tuple(LayerInfo(i, 256, 8) for i in range(48)))
    assert of.row_bytes <= 48 * 8 + 16
    rows = 64 * 10**6 // of.row_bytes
    assert len(shard_header(of, rows)) + rows * of.row_bytes <= rows * (48 * 8 + 16)


def test_a_profile_of_a_trace_is_a_count_of_its_rows(written: tuple[Path, TraceRows]) -> None:
    folder, whole = written
    profile = RoutingProfile.from_trace(str(folder))
    counts, weights = np.zeros((2, 2, 3, 8), np.int64), np.zeros((2, 2, 3, 8))
    splits, tokens = np.zeros((16, 2, 3, 8), np.int64), np.zeros((2, 2), np.int64)
    assert whole.weights is not None
    for row in range(len(whole)):
        domain, phase, split = whole.domain[row], whole.phase[row], whole.split[row]
        tokens[domain, phase] += 1
        for slot, layer in enumerate(profile.model.layers):
            for choice in range(layer.top_k):
                expert = whole.experts[row, slot, choice]
                counts[domain, phase, slot, expert] += 1
                splits[split, domain, slot, expert] += 1
                weights[domain, phase, slot, expert] += float(whole.weights[row, slot, choice])
    np.testing.assert_array_equal(profile.selection_counts, counts)
    np.testing.assert_array_equal(profile.split_counts, splits)
    np.testing.assert_array_equal(profile.token_counts, tokens)
    np.testing.assert_allclose(profile.weight_sums, weights, atol=1e-6)
    assert (profile.runs[0].uuid, profile.runs[0].prompts, profile.complete) == ("run", 10, True)
    with pytest.raises(ProfileError, match="more than one"):
        merge([profile, profile])


def test_a_profile_counts_many_rows_in_parts(written: tuple[Path, TraceRows], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trace(written[0]).profile()
    monkeypatch.setattr(trace_module, "_COUNTED_ROWS", 3)
    for name, array in Trace(written[0]).profile().arrays().items():
        np.testing.assert_array_equal(array, whole.arrays()[name])


# ------------------------------------------------------------------------------------------------------------- damage


def change(file: Path, edit: Callable[[bytes], bytes]) -> None:
    file.write_bytes(edit(file.read_bytes()))


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip, "is damaged: its checksum is not that of the index"),
        (lambda data: data[:-1], "bytes; the index says"),
        (lambda data: data + b"x", "bytes; the index says"),
        (None, "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_are_left(
    written: tuple[Path, TraceRows], edit: Callable[[bytes], bytes] | None, message: str
) -> None:
    folder, whole = written
    file = folder / "shard-000002.safetensors"
    if edit is None:
        file.unlink()
    else:
        change(file, edit)
    trace = Trace(folder)
    result = trace.verify()
    ((name, fault),) = result.damaged
    assert name == file.name
    assert message in fault
    assert (result.rows_lost, result.rows) == (7, 53)
    assert_rows_equal(TraceRows.concatenate(list(trace.rows(21))), whole.take(slice(21, None)))
    with pytest.raises(TraceError, match="shard-000002"):
        list(trace.rows())
    with pytest.raises(TraceError, match="shard-000002"):
        trace.profile()


def rewrite(folder: Path, number: int, edit: Callable[[Any], Any]) -> None:
    """Change a line of the index."""
    lines = (folder / INDEX_NAME).read_text().splitlines()
    lines[number] = json.dumps(edit(json.loads(lines[number])))
    (folder / INDEX_NAME).write_text("".join(f"{line}\n" for line in lines))


def with_shard(**changes: Any) -> Callable[[Any], Any]:
    return lambda line: {"shard": line["shard"] | changes}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_shard(name="../shard-000000.safetensors"), "is not a shard of this folder"),
        (with_shard(name="/etc/passwd"), "is not a shard of this folder"),
        (with_shard(name="shard-000000.safetensors\n"), "is not a shard of this folder"),
        (with_shard(name="sub/shard-000000.safetensors"), "is not a shard of this folder"),
        (with_shard(name="shard-000001.safetensors"), "names a shard twice"),
        (with_shard(name=7), "line 1 is damaged"),
        (with_shard(rows=0), "cannot have 0 tokens"),
        (with_shard(rows=-1), "cannot have -1 tokens"),
        (with_shard(bytes=1 << 60), "cannot have 7 tokens"),
        (with_shard(rows=True), "line 1 is damaged"),
        (with_shard(more=1), "line 1 is damaged"),
        (lambda line: {"thing": 1}, "line 1 is damaged"),
        (lambda line: [1], "line 1 is damaged"),
    ],
)
def test_an_index_that_lies_is_refused(
    written: tuple[Path, TraceRows], edit: Callable[[Any], Any], message: str
) -> None:
    rewrite(written[0], 0, edit)
    with pytest.raises(TraceError, match=message) as caught:
        Trace(written[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 6}, "the index says"),
        ({"bytes": 5000}, "the index says"),
        ({"crc32": 1}, "checksum"),
        ({"first_request": 1}, "its requests are not those of the index"),
    ],
)
def test_an_index_with_other_sizes_is_found_out(
    written: tuple[Path, TraceRows], changes: dict[str, int], message: str
) -> None:
    rewrite(written[0], 0, with_shard(**changes))
    assert message in Trace(written[0]).verify().damaged[0][1]


def test_a_link_is_not_followed(written: tuple[Path, TraceRows], tmp_path: Path) -> None:
    file = written[0] / "shard-000000.safetensors"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TraceError, match="is not a file of its own"):
        list(Trace(written[0]).rows())
    with pytest.raises(TraceError, match="is not a file of its own"):
        Trace(written[0]).requests([0])


def set_version(folder: Path, version: object) -> None:
    data = json.loads((folder / ABOUT_NAME).read_text())
    (folder / ABOUT_NAME).write_text(json.dumps(data | {"format_version": version}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "No such folder"),
        (drop(ABOUT_NAME), "holds no trace.json, so it is not a trace"),
        (drop(INDEX_NAME), "holds no index.jsonl"),
        (put(ABOUT_NAME, "{}"), "not the header of a moescope trace"),
        (put(ABOUT_NAME, "[" * 100_000), "not the header of a moescope trace"),
        (put(ABOUT_NAME, '{"kind": "moescope trace", "format_version": 1}'), "its header is damaged"),
        (lambda folder: set_version(folder, 2), "trace format 2; this moescope reads up to 1: upgrade moescope"),
        (lambda folder: set_version(folder, "1"), "trace format '1'"),
        (put(INDEX_NAME, "nonsense\n"), "line 1 is damaged"),
        (lambda folder: (folder / INDEX_NAME).write_bytes(b"\xff\n") and None, "is not text"),
    ],
)
def test_a_foreign_or_newer_folder_is_refused_in_one_line(
    written: tuple[Path, TraceRows], damage: Callable[[Path], None], message: str
) -> None:
    damage(written[0])
    with pytest.raises(TraceError, match=message) as caught:
        Trace(written[0])
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(TraceError, match="is a file; name the folder"):
        Trace(tmp_path / "a")


def test_a_shard_of_another_trace_is_refused(tmp_path: Path, small_shards: None) -> None:
    for uuid in ("one", "two"):
        write_batches(tmp_path / uuid, about(uuid=uuid), [[0, 1]])
    name = "shard-000000.safetensors"
    shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    shutil.copy(tmp_path / "one" / INDEX_NAME, tmp_path / "two" / INDEX_NAME)
    with pytest.raises(TraceError, match="its header is another's"):
        list(Trace(tmp_path / "two").rows())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts", 9, "an expert id is at or beyond E = 8"),
        ("experts", 3, "a token has the same expert twice"),
        ("phase", 2, "out of range"),
        ("domain", 2, "out of range"),
        ("split", 16, "out of range"),
        ("weights", np.nan, "a weight is not finite"),
        ("weights", np.inf, "a weight is not finite"),
        ("position", 0, "twice or out of order"),
        ("position", 9, "tokens of a request are missing"),
    ],
)
def test_content_that_cannot_be_is_found(tmp_path: Path, name: str, value: float, message: str) -> None:
    weights = name == "weights"
    of = about(weights=weights)
    rows = random_rows(of, [0, 1, 0, 1], [0, 0, 1, 1])
    getattr(rows, name)[3:] = value
    with trace_writer.TraceWriter(of, trace_writer.TraceOptions(tmp_path / "t", weights=weights)) as writer:
        writer.admit([0, 1], [2, 2])
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    trace = Trace(tmp_path / "t")
    assert message in trace.verify().damaged[0][1]
    if name != "position" and "twice" not in message:
        with pytest.raises(MoescopeError, match="not finite" if weights else "out of range"):
            trace.profile()


def test_verify_follows_requests_across_shards(tmp_path: Path, small_shards: None) -> None:
    of = about()
    for kind, places in (("twice", [*range(10), 9]), ("are missing", [*range(9), 10, 11])):
        folder = tmp_path / kind
        with trace_writer.TraceWriter(of, trace_writer.TraceOptions(folder)) as writer:
            writer.admit([0], [20])
            writer.append(random_rows(of, [0] * 10, places[:10]))
            writer.flush()
            writer.append(random_rows(of, [0], places[10:]))
            writer.commit(0)
            writer.finish()
        assert kind in Trace(folder).verify().damaged[-1][1]


def test_a_last_line_that_was_cut_short_does_not_count(written: tuple[Path, TraceRows]) -> None:
    folder, _ = written
    change(folder / INDEX_NAME, lambda data: data[:-2])
    trace = Trace(folder)
    assert trace.index.complete is None
    assert trace.tokens == 60
    lines = (folder / INDEX_NAME).read_bytes().splitlines(keepends=True)
    (folder / INDEX_NAME).write_bytes(b"".join(lines[:2]) + lines[2][:20])
    result = Trace(folder).verify()
    assert (result.rows, result.unfinished, len(result.unlisted)) == (14, 14, 7)
    assert os.path.basename(result.unlisted[-1]) == "shard-000008.safetensors"


def test_about_is_read_as_it_was_written() -> None:
    of = about(weights=True, sample=0.25)
    assert TraceAbout.parse(of.text()) == of
