"""`moescope.weigh`: a checkpoint by its name, what is kept of the pass, and whose weights they were."""

from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import QWEN, per_expert, write
from tiny_models import tiny_model

import moescope
from moescope.adapters.weighing import choose_device, open_weights
from moescope.profiler.errors import ModelError, OptionError, OutputError
from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, WEIGHTS_NAME
from moescope.profiler.fingerprint import router_fingerprint
from moescope.profiler.weight_files import load_weights
from moescope.profiler.weights import default_deltas
from moescope.stats.periodicity import default_intervals
from moescope.stats.weight_similarity import WeightChange, WeightSimilarity

CONFIG = {**QWEN, "num_hidden_layers": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny", CONFIG, per_expert(CONFIG, layers=(0, 1, 2))[0])


def test_what_is_kept_is_what_is_returned(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    record = moescope.weigh(folder, folder=out, n_jobs=1)
    assert [file.name for file in out.iterdir()] == [WEIGHTS_NAME]
    kept = load_weights(out / WEIGHTS_NAME)
    assert kept.run == record.run
    assert kept.raw is not None
    assert record.raw is not None
    np.testing.assert_array_equal(kept.raw, record.raw)
    assert isinstance(moescope.analyze_weights(record), WeightSimilarity)
    change = moescope.weigh(folder, against=folder, layers=[0, 2], match_pairs=1)
    assert isinstance(moescope.analyze_weights(change), WeightChange)
    assert change.run.layers == (0, 2)


def test_a_demo_keeps_its_name() -> None:
    with open_weights("demo:control", [3, 7]) as source:
        assert (source.model, source.layers) == ("demo:control", (3, 7))
    with pytest.raises(ModelError, match="there is no demo model 'other'"):
        open_weights("demo:other")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "minimax_m2", "gpt_oss"])
def test_files_and_the_loaded_model_have_one_fingerprint(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    profile = moescope.profile(model, [{"prompt_token_ids": [1, 2, 3]}])
    with open_weights(tmp_path) as source:
        assert source.layers == profile.model.layer_indices
        assert router_fingerprint(map(source.router, source.layers)) == profile.model.fingerprint


@pytest.mark.parametrize("layers", [range(48), range(3, 61), range(12), range(0, 24, 2), (0, 5), (4,), range(26)])
def test_default_distances_are_those_of_the_report_and_the_next_layer(layers: range) -> None:
    apart = {later - earlier for earlier in layers for later in layers}
    assert default_deltas(layers) == tuple(sorted({1, *default_intervals(layers)} & apart))


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="resume needs the folder"):
        moescope.weigh(folder, resume=True)
    with pytest.raises(OutputError, match=rf"holds no {PARTIAL_WEIGHTS_NAME}"):
        moescope.weigh(folder, folder=tmp_path / "out", resume=True)
    with pytest.raises(OptionError, match="leave --delta out"):
        moescope.weigh(folder, against=folder, deltas=[1])
    with pytest.raises(OptionError, match="must be auto, cpu, cuda or cuda:N"):
        choose_device("gpu")
    assert choose_device("cpu") == "cpu"
