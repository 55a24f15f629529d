"""Prompt sets read through the package datasets: folders of data files, and what is said without a network."""

import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_sets import refused, write

from moescope.profiler.errors import PromptError
from moescope.profiler.prompts import Prompt, read_prompts

FORMS = "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"


@pytest.fixture(scope="module")
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    return datasets


@pytest.fixture(autouse=True)
def _offline_and_in_a_folder(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        if hasattr(library.config, name):
            monkeypatch.setattr(library.config, name, str(tmp_path / "cache" / name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def folder(name: str, **files: list[dict[str, Any]]) -> str:
    """A folder with a .jsonl file for each split."""
    Path(name).mkdir(parents=True)
    for split, records in files.items():
        write(Path(name, f"{split}.jsonl"), "".join(json.dumps(record) + "\n" for record in records))
    return name


def test_a_folder_of_json_lines() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hm", "name": "n"}]
    folder(
        "data",
        train=[
            {"prompt": "é", "domain": "a", "messages": None},
            {"prompt": None, "domain": None, "messages": messages},
        ],
        test=[{"prompt": "t", "domain": "b"}],
    )
    train = [
        Prompt(text="é", domain="a", source="hf:./data, row 1"),
        Prompt(messages=tuple(messages), source="hf:./data, row 2"),
    ]
    assert list(read_prompts(["hf:./data"])) == train
    assert [p.text for p in read_prompts(["hf:data:test"])] == ["t"]
    assert [p.text for p in read_prompts(["hf:data:default:test", "text"])] == ["t", "text"]
    assert [p.text for p in read_prompts(["hf:data"], limit=1)] == ["é"]


def test_a_folder_of_parquet_files_with_columns_of_other_names() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("set with spaces").mkdir()
    columns = {"question": [f"q{i}" for i in range(200)], "subject": ["a", "b"] * 100, "image": [b"\xff"] * 200}
    pq.write_table(pa.table(columns), "set with spaces/x.parquet")
    prompts = list(read_prompts(["hf:set with spaces"], prompt_field="question", domain_field="subject"))
    assert [(p.text, p.domain) for p in prompts] == list(zip(columns["question"], columns["subject"], strict=True))
    assert prompts[-1].source == "hf:set with spaces, row 200"


def test_a_folder_of_conversations_whose_only_split_is_not_train() -> None:
    given = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    folder("data", test=[{"conversations": given}, {"conversations": given[1:]}])
    places: list[str] = []
    prompts = read_prompts(["hf:data"], left_out=places.append)
    assert [p.messages for p in prompts] == [({"role": "user", "content": "q"},)]
    assert places == ["hf:data, row 2"]


def test_configurations() -> None:
    folder("data/a", x=[{"prompt": "of a"}])
    folder("data/b", x=[{"prompt": "of b"}])
    write(
        Path("data/README.md"),
        "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n- config_name: b\n"
        "  data_files:\n  - split: test\n    path: b/*.jsonl\n---\n",
    )
    assert [p.text for p in read_prompts(["hf:data:b:test", "hf:data:a:train"])] == ["of b", "of a"]
    what = "names no configuration of the dataset; it has 'a', 'b'; name one: hf:NAME:CONFIG:SPLIT"
    for source in ("hf:data", "hf:data:train", "hf:data:c:train"):
        assert refused(source) == f"{source} {what}"


@pytest.mark.parametrize("source", ["hf:data", "hf:data:train", "hf:data:default:dev"])
def test_splits_are_listed(source: str) -> None:
    folder("data", test=[{"prompt": "a"}], validation=[{"prompt": "b"}])
    assert refused(source) == (
        f"{source} names no split of the dataset; it has 'validation', 'test'; "
        "name one: hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", f"hf: must be {FORMS}"),
        ("hf:data:", f"hf:data: must be {FORMS}"),
        ("hf::train", f"hf::train must be {FORMS}"),
        ("hf:a:b:c:d", f"hf:a:b:c:d must be {FORMS}"),
        ("hf:data:train[10%]", "hf:data:train[10%] names no split of the dataset"),
        ("hf:./none", f"hf:./none names no folder that is there, and no dataset of the hub; it must be {FORMS}"),
        ("hf:/no/where", "hf:/no/where names no folder that is there, and no dataset of the hub; "),
        ("hf:a/b/c", "hf:a/b/c names no folder that is there, and no dataset of the hub; "),
        ("hf:what is this", "hf:what is this names no folder that is there, and no dataset of the hub; "),
        ("hf:data/train.jsonl", "hf:data/train.jsonl names a file; leave hf: out, or name the folder it is in"),
        ("hf:some/set", "hf:some/set cannot be opened: Couldn't reach 'some/set' on the Hub (OfflineModeIsEnabled); "
         "check the name and the network"),
        ("hf:some:b:train", "hf:some:b:train cannot be opened: Couldn't reach 'some' on the Hub (Offline"),
    ],
)  # fmt: skip
def test_wrong_names(source: str, message: str) -> None:
    folder("data", train=[{"prompt": "a"}])
    with pytest.raises(PromptError) as caught:
        read_prompts([source])  # before anything is read
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_text_that_starts_like_a_dataset() -> None:
    assert [p.text for p in read_prompts(["hf: is that hafnium?"])] == ["hf: is that hafnium?"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            '{"question": "a"}',
            {},
            " has no column 'prompt', 'messages', 'prompt_token_ids', 'conversations' or 'text' ",
        ),
        ('{"prompt": "a"}', {"domain_field": "q"}, " has no column 'q' but 'prompt'; name one with --domain-field"),
        ('{"prompt": "a"}\n{"prompt": ""}', {}, ", row 2: the prompt is empty; "),
        (
            '{"prompt": 3}',
            {},
            ", row 1: 'prompt' must be text, a list of messages or a list of token ids, not a num",
        ),
        ('{"prompt": null}', {}, ", row 1: no 'prompt', 'messages' or 'prompt_token_ids' but 'prompt'; "),
        ('{"prompt_token_ids": [1, null]}', {}, ", row 1: token id 2 of 2 is null; "),
        ('{"messages": [null, {"role": "user", "content": "a"}]}', {}, ", row 1: message 1 must be an object with"),
        (
            '{"prompt": "a"}\n{"prompt": ',
            {},
            " cannot be read: JSON parse error: Invalid value. in row 1; check its files",
        ),
        ('{"prompt": "caf\xe9"}', {}, " cannot be read: 'utf-8' codec can't decode byte 0xe9 in position "),
        ("", {}, " holds no rows; it must hold one prompt in each row"),
    ],
)
def test_wrong_rows(content: str, options: dict[str, str], message: str) -> None:
    folder("data")
    write(Path("data/train.jsonl"), content.encode("latin-1"))
    assert refused("hf:data", **options).startswith(f"hf:data{message}")


def test_rows_before_a_damaged_file_are_read() -> None:
    folder("data", **{"train-0": [{"prompt": f"p{i}"} for i in range(100)]})
    write(Path("data/train-1.jsonl"), '{"prompt": "a"}\n{"prompt": \n')
    prompts = read_prompts(["hf:data"])
    assert [next(prompts).text for _ in range(100)] == [f"p{i}" for i in range(100)]
    with pytest.raises(PromptError, match=r"^hf:data cannot be read after row 100: JSON parse error"):
        next(prompts)


def test_folders_that_hold_no_data_or_of_several_forms() -> None:
    folder("data")
    assert refused("hf:data").startswith("hf:data cannot be opened: The directory at ")
    write(Path("data/x.zzz"), "x")
    assert refused("hf:data") == (
        "hf:data cannot be opened: No (supported) data files found in data; check the files in it"
    )
    write(Path("data/a.jsonl"), '{"prompt": "a"}')
    write(Path("data/b.csv"), "prompt\nb")
    assert refused("hf:data") == "hf:data holds files of several forms (.csv, .jsonl); keep one, or name the files"


def test_code_of_a_dataset_is_not_run() -> None:
    folder("data")
    write(Path("data/data.py"), "raise SystemExit('run')")
    assert refused("hf:data").startswith("hf:data cannot be opened: ")


def test_old_datasets_would_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__version__="3.6.0", are_progress_bars_disabled=lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", old)
    assert refused("hf:some/set") == (
        "hf:some/set needs datasets 4 or newer, which runs no code of a dataset: pip install 'moescope[datasets]'"
    )


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("hf:some/set") == (
        "hf:some/set needs the package 'datasets', which is not installed: pip install 'moescope[datasets]'"
    )


def test_nothing_is_printed_and_settings_are_put_back(
    library: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder("data", **{f"train-{i}": [{"prompt": "a"}] for i in range(40)})
    bars, level = library.are_progress_bars_disabled(), logging.getLogger("datasets").level
    assert len(list(read_prompts(["hf:data"]))) == 40
    refused("hf:data:none")
    refused("hf:some/set")
    assert library.are_progress_bars_disabled() == bars
    assert logging.getLogger("datasets").level == level
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
