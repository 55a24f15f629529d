"""What `profile` leaves beside a profile, and what `report` makes of it later."""

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io as pio
import pytest
from command import Cli

from moescope.profiler.files import PROFILE_NAME, load_profile
from moescope.profiler.sidecars import ROUTERS_NAME, SAMPLE_NAME, load_routers, load_sample

NAMES = (SAMPLE_NAME, ROUTERS_NAME)
DRAWN = ("expert_activation_3d.html", "router_similarity_matrix.html", "router_norm_correlation.html")
NO_SAMPLE = "No tokens were kept beside this profile"
NO_WEIGHTS = "Router weights were not read for this profile."


class _Data(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = False
        self.found = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = ("id", "report-data") in attrs

    def handle_data(self, data: str) -> None:
        self.found += data if self.inside else ""


def figures(folder: str | Path) -> dict[str, Any]:
    """The figures of a report's page by name, as plotly reads them."""
    found = json.loads(_Data(Path(folder, "report.html").read_text(encoding="utf-8")).found)["figures"]
    made = {}
    for spec in found:
        text = json.dumps({"data": spec["data"], "layout": spec["layout"]})
        made[spec["id"].removeprefix("figure-")] = pio.from_json(text)
    return made


def array(value: Any) -> np.ndarray:
    if isinstance(value, dict):
        shape = tuple(int(part) for part in str(value.get("shape", "-1")).split(","))
        return np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"])).reshape(shape)
    return np.asarray(value, dtype=float)


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over three prompts, of which the second is the first of 50 tokens."""
    import moescope.cli as command

    folder = tmp_path_factory.mktemp("recorded") / "out"
    prompts = folder.parent / "p.jsonl"
    texts = ["Once upon a time", "<b>é $x</b> " * 7, "z" * 90]
    prompts.write_text("\n".join(json.dumps({"prompt": text, "domain": text[0]}) for text in texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["profile", str(prompts), "-m", str(checkpoint), "--max-tokens", "3", "-o", str(folder)]
        patch.setattr("sys.argv", ["moescope", *arguments])
        with pytest.raises(SystemExit) as caught:
            command.main()
    assert not caught.value.code
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """The profile and what lies beside it, without the report."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in (PROFILE_NAME, *NAMES):
        shutil.copy(recorded / name, folder)
    return folder


def test_profile_writes_both(recorded: Path, checkpoint: Path) -> None:
    from safetensors.numpy import load_file

    profile = load_profile(recorded / PROFILE_NAME)
    sample, routers = load_sample(recorded, profile.model), load_routers(recorded, profile.model)
    assert sample is not None
    assert routers is not None
    whole = "<b>é $x</b> " * 7
    assert len(sample.token_ids) == len(sample.texts) == 50
    readable = "".join(text for text in sample.texts if "\ufffd" not in text)  # é is two tokens, of half a letter each
    assert readable == whole.replace("é", "")[: 50 - 2 * 4]
    assert sample.layers == routers.layers == (0, 2, 3)
    assert sample.fingerprint == routers.fingerprint == profile.model.fingerprint
    tensors = load_file(checkpoint / "model.safetensors")
    weights = [tensors[f"model.layers.{layer}.mlp.gate.weight"].astype(float) for layer in (0, 2, 3)]
    np.testing.assert_allclose(routers.row_norms, [np.linalg.norm(one, axis=1) for one in weights], rtol=1e-6)
    flat = [one.ravel() / np.linalg.norm(one) for one in weights]
    np.testing.assert_allclose(routers.cosine, [[a @ b for b in flat] for a in flat], atol=1e-6)


def test_report_draws_them_again(cli: Cli, recorded: Path, copy: Path) -> None:
    done = cli("report", copy / PROFILE_NAME, "-o", "again")
    assert done.code == 0, done.err
    first, again = figures(recorded), figures("again")
    assert list(again) == list(first)
    profile = load_profile(copy / PROFILE_NAME)
    sample = load_sample(copy, profile.model)
    assert sample is not None
    assert len(again["tokens"].data) == 3
    for slot, trace in enumerate(again["tokens"].data):
        np.testing.assert_array_equal(array(trace.surfacecolor), sample.probabilities[slot])
    for name in ("routers", "norms", "tokens"):
        assert again[name].to_json() == first[name].to_json()
    for name in DRAWN:
        assert NO_SAMPLE not in Path("again", name).read_text(encoding="utf-8")
        assert NO_WEIGHTS not in Path("again", name).read_text(encoding="utf-8")
    data = [json.loads(Path(folder, "analysis_data.json").read_bytes()) for folder in (recorded, "again")]
    assert data[1]["router_similarity"] == data[0]["router_similarity"]
    assert not {file.name for file in Path("again").iterdir()} & {PROFILE_NAME, *NAMES}, "a report leaves these alone"


def test_report_of_a_profile_that_lies_in_the_working_folder(
    cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert cli("report", PROFILE_NAME, "-o", "again").code == 0
    assert len(figures("again")["tokens"].data) == 3


def test_of_several_profiles_any_may_have_them(cli: Cli, checkpoint: Path, copy: Path) -> None:
    assert cli("profile", "hello", "-m", checkpoint, "--max-tokens", 0, "-o", "b").code == 0
    for name in NAMES:
        Path("b", name).unlink()
    assert cli("report", "b/profile.safetensors", copy / PROFILE_NAME, "-o", "both").code == 0
    assert len(figures("both")["tokens"].data) == 3


def test_without_them_the_figures_say_why(cli: Cli, copy: Path) -> None:
    for name in NAMES:
        (copy / name).unlink()
    assert cli("report", copy / PROFILE_NAME, "-o", "again").code == 0
    for name, reason in zip(DRAWN, (NO_SAMPLE, NO_WEIGHTS, NO_WEIGHTS), strict=True):
        assert reason in Path("again", name).read_text(encoding="utf-8")
    again = figures("again")
    assert NO_SAMPLE in again["tokens"].layout.annotations[0].text
    assert NO_WEIGHTS in again["routers"].layout.annotations[0].text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["cut", "text", "folder", "link", "other kind"])
def test_a_damaged_file_is_one_line(cli: Cli, copy: Path, name: str, damage: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "text":
        file.write_text("hello\nworld")
    elif damage == "folder":
        file.mkdir()
    elif damage == "link":
        file.symlink_to("nowhere")
    else:
        (other,) = set(NAMES) - {name}
        shutil.copy(copy / other, file)
    done = cli("report", copy / PROFILE_NAME, "-o", "again")
    assert done.code == 2
    assert str(file) in done.error
    assert "remove it" in done.error
    assert not Path("again").exists()


def test_those_of_another_model_are_refused(cli: Cli, checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    from tiny_models import tiny_model

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tiny_model("qwen3_moe", seed=5, vocab_size=258, max_position_embeddings=128).save_pretrained(other)
    assert cli("profile", "hello", "-m", other, "--max-tokens", 0, "-o", "b").code == 0
    for name in NAMES:
        whole = (copy / name).read_bytes()
        shutil.copy(Path("b", name), copy / name)
        done = cli("report", copy / PROFILE_NAME, "-o", "again")
        assert done.code == 2
        assert f"{copy / name} belongs to another model than the profile" in done.error
        (copy / name).write_bytes(whole)
    # the same folder, another model: what the earlier run left is replaced or gone
    arguments = ["profile", "hello", "-m", other, "--max-tokens", 0, "-o", copy, "--force"]
    done = cli(*arguments, "--probabilities", "off")
    assert done.code == 0, done.err
    assert not (copy / SAMPLE_NAME).exists()
    assert cli("report", copy / PROFILE_NAME, "-o", "again").code == 0


def test_without_distributions_the_figure_says_why(cli: Cli, checkpoint: Path) -> None:
    done = cli("profile", "x" * 60, "-m", checkpoint, "--max-tokens", 0, "--probabilities", "off", "-o", "out")
    assert done.code == 0, done.err
    assert not Path("out", SAMPLE_NAME).exists()
    assert Path("out", ROUTERS_NAME).exists()
    assert NO_SAMPLE in Path("out", DRAWN[0]).read_text(encoding="utf-8")
    (note,) = figures("out")["tokens"].layout.annotations
    assert "needs a run that records distributions" in note.text
    assert figures("out")["routers"].data
