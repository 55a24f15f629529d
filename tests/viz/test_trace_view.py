"""The token view: what it holds is what was traced, and its text is the tokens'."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from traces import LAYERS, about, write_batches

from moescope.profiler.trace import Trace, TraceRows
from moescope.viz.token_text import text_pieces, visible
from moescope.viz.trace_view import TraceView, view_trace
from moescope.viz.trace_view_page import trace_view_text, write_trace_view

TYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32}


class Words:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i % len(self.words)] for i in ids)


@pytest.fixture(scope="module", params=[True, False], ids=["weights", "no weights"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TraceRows]:
    folder = tmp_path_factory.mktemp("traces") / "t"
    return folder, TraceRows.concatenate(write_batches(folder, about(weights=request.param), [[2, 0], [5]]))


def page_data(view: TraceView) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the page's script reads, and its columns as arrays."""
    found = re.search(r'<script type="application/json" id="view-data">(.*?)</script>', trace_view_text(view))
    assert found
    data = json.loads(found[1])
    columns = {
        name: np.frombuffer(base64.b64decode(packed["bdata"]), TYPES[packed["dtype"]])
        for name, packed in data["columns"].items()
    }
    return data, columns


def test_tokens_are_those_of_the_requests(made: tuple[Path, TraceRows]) -> None:
    folder, given = made
    view = view_trace(folder, [5, 2])
    assert [(one.number, one.domain, one.first, one.tokens, one.length) for one in view.requests] == [
        (2, "code", 0, 6, 6),
        (5, "prose", 6, 6, 6),
    ]
    rows = TraceRows.concatenate([given.take(given.request == number) for number in (2, 5)])
    np.testing.assert_array_equal(view.token, rows.token)
    np.testing.assert_array_equal(view.position, [*range(6)] * 2)
    np.testing.assert_array_equal(view.generated, [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3)
    assert (view.counted, view.held, view.texts) == (18, 18, None)
    for slot, layer in enumerate(LAYERS):
        ids = rows.experts[:, slot, : layer.top_k]
        if rows.weights is None:
            np.testing.assert_array_equal(view.ids[slot, :, : layer.top_k], ids)
            continue
        assert view.shares is not None
        weights = rows.weights[:, slot, : layer.top_k].astype(np.float64)
        for token in range(12):
            order = np.argsort(-weights[token])
            np.testing.assert_array_equal(view.ids[slot, token, : layer.top_k], ids[token][order])
            own = view.shares[slot, token, : layer.top_k]
            np.testing.assert_allclose(own, weights[token][order] / weights[token].sum(), rtol=1e-5)
        assert (view.shares[slot, :, layer.top_k :] == 0).all()


def test_use_is_a_share_of_the_layers_selections(made: tuple[Path, TraceRows]) -> None:
    view = view_trace(Trace(made[0]))
    np.testing.assert_allclose(view.use.sum(axis=1), 1)
    first = LAYERS[0]
    expected = np.bincount(made[1].experts[:, 0, : first.top_k].reshape(-1), minlength=8) / (18 * first.top_k)
    np.testing.assert_allclose(view.use[0], expected)


def test_the_page_holds_it_in_typed_arrays(made: tuple[Path, TraceRows]) -> None:
    view = view_trace(made[0], tokens=12)
    data, columns = page_data(view)
    shape = (len(LAYERS), len(view.token), 3)
    assert (len(data["layers"]), data["tokens"], data["k"]) == shape
    np.testing.assert_array_equal(columns["ids"].reshape(shape), view.ids)
    np.testing.assert_array_equal(columns["token"], view.token)
    names = [mode["id"] for mode in data["modes"]]
    if view.shares is None:
        assert names == ["expert", "surprisal"]
        assert not {"shares", "entropy"} & columns.keys()
    else:
        assert names == ["expert", "entropy", "surprisal"]
        np.testing.assert_allclose(columns["shares"].reshape(shape) / 255, view.shares, atol=0.002)
        scale = data["modes"][1]["scale"]
        np.testing.assert_allclose(columns["entropy"].reshape(shape[:2]) * scale, view.entropy, atol=1e-4)
    assert "The page holds 12 of the 18 tokens of the trace." in trace_view_text(view)


def test_a_request_that_is_cut_is_told(made: tuple[Path, TraceRows]) -> None:
    assert "Of request 2 the first 4 of 6 tokens are shown." in trace_view_text(view_trace(made[0], [2], tokens=4))


def test_the_page_is_one_file_without_a_link(made: tuple[Path, TraceRows], tmp_path: Path) -> None:
    file = write_trace_view(view_trace(made[0]), tmp_path / "new" / "view.html")
    assert [path.name for path in file.parent.iterdir()] == ["view.html"]
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert file.stat().st_size < 2_500_000


def test_hostile_text_cannot_leave_its_place(made: tuple[Path, TraceRows]) -> None:
    tokens = (*HOSTILE.values(), "<script>", "</script>", "&", "\n", "<!--")
    view = view_trace(made[0], tokenizer=Words(*tokens))
    text = trace_view_text(view)
    assert text.count("<script") == text.count("</script>") == 4 - 1
    data, _ = page_data(view)
    assert data["texts"] == [visible(tokens[token % len(tokens)]) for token in view.token.tolist()]
    assert data["colours"] == sorted(set(data["colours"]), key=data["colours"].index), "no colour twice"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("a\nb", "a⏎\nb"),
        ("\t\x00\x1b\x7f", "␉␀␛␡"),
        ("a\u202eb\u2066", "a⟨U+202E⟩b⟨U+2066⟩"),
        ("\u2028", "⟨U+2028⟩"),
        ("<b>&", "<b>&"),
        ("漢\ufffd", "漢\ufffd"),
    ],
)
def test_everything_in_a_token_can_be_seen(text: str, shown: str) -> None:
    assert visible(text) == shown


def bytes_tokenizer() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_the_token_that_completes_a_character_has_it() -> None:
    tokenizer = bytes_tokenizer()
    text = "aé漢🧪 b"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert text_pieces(tokenizer, ids) == ["a", "", "é", "", "", "漢", "", "", "", "🧪", " ", "b"]
    assert text_pieces(tokenizer, []) == []


def test_bytes_that_make_no_character_are_marked_and_hold_nothing_up() -> None:
    tokenizer = bytes_tokenizer()
    lone = tokenizer.encode("é").ids[0]
    after = tokenizer.encode("abcdef").ids
    pieces = text_pieces(tokenizer, [lone, *after])
    assert "".join(pieces) == "\ufffdabcdef"
    assert pieces[2:] == ["b", "c", "d", "e", "f"]
    assert text_pieces(tokenizer, [*after, lone])[-1] == "\ufffd"
    assert "".join(text_pieces(tokenizer, [lone] * 9)) == "\ufffd" * 9


def test_a_space_that_decoding_drops_is_kept() -> None:
    words = {word: i for i, word in enumerate(("▁Once", "▁upon", "▁a", "▁time", "s"))}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "upon", "alone, its space is lost"
    assert text_pieces(tokenizer, [0, 1, 2, 3, 4]) == ["Once", " upon", " a", " time", "s"]
