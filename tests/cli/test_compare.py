"""`moescope compare`: what it prints and writes, and what it says when something is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import MODEL, random_profile
from command import Cli

from moescope.profiler.files import load_profile, save_profile

DOCUMENTED = {
    "comparison.html",
    "comparison.json",
    "comparison_all.html",
    "comparison_difference.html",
    "comparison_distance.html",
    "comparison_experts.html",
    "comparison_report.txt",
    "plotly.min.js",
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three profiles, two of them under the usual name in folders of their own."""
    paths = [Path("base/profile.safetensors"), Path("tuned/profile.safetensors"), Path("other.safetensors")]
    for seed, path in enumerate(paths):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        save_profile(random_profile(seed), tmp_path / path)
    return paths


def test_two_profiles_are_compared_in_six_lines(cli: Cli, files: list[Path]) -> None:
    done = cli("compare", *files[:2], "-o", "out")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == ("tuned (60 tokens) against base (60 tokens), selection frequency, mean over 3 layers:")
    told = ["  distance", "  noise", "  beyond the draw of prompts", "  furthest apart", "  moved most"]
    assert [line.split(":")[0] for line in lines[1:6]] == told
    assert lines[-1] == "Wrote the comparison in out"
    assert {file.name for file in Path("out").iterdir()} == DOCUMENTED
    data = json.loads(Path("out/comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    one, two = (load_profile(path).selection_counts.sum(axis=(0, 1)) for path in files[:2])
    expected = two[0] / two[0].sum() - one[0] / one[0].sum()
    np.testing.assert_allclose(data["comparisons"][0]["difference_matrix"][0], expected, atol=1e-15)
    assert data["metadata"]["names"] == ["base", "tuned"]


def test_several_profiles_with_labels_into_a_new_folder(cli: Cli, files: list[Path], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    done = cli("compare", *files, "--labels", "a, b,c", "--measure", "weight", "--top", 3)
    assert done.code == 0, done.err
    (folder,) = set(tmp_path.iterdir()) - before
    assert folder.name.startswith("moescope_compare_20")
    assert done.out.splitlines()[-1] == f"Wrote the comparison in {folder.name}"
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert [(c["reference"]["name"], c["other"]["name"]) for c in data["comparisons"]] == [("a", "b"), ("a", "c")]
    assert data["metadata"]["measure"] == "weight"
    assert [len(c["experts_moved"]) for c in data["comparisons"]] == [3, 3]


def test_domains(cli: Cli, files: list[Path]) -> None:
    done = cli("compare", files[0], "--by-domain", "-o", "each")
    assert done.code == 0, done.err
    assert "code" in done.out.splitlines()[0]
    data = json.loads(Path("each/comparison.json").read_text(encoding="utf-8"))
    assert [c["other"]["name"] for c in data["comparisons"]] == ["code", "prose"]
    done = cli("compare", *files[:2], "--domain", "prose", "-o", "one")
    assert done.code == 0, done.err
    data = json.loads(Path("one/comparison.json").read_text(encoding="utf-8"))
    assert data["metadata"]["domain"] == "prose"
    assert data["comparisons"][0]["other"]["num_tokens"] == load_profile(files[1]).token_counts[1].sum()


def test_results_are_not_overwritten_unless_told_to(cli: Cli, files: list[Path]) -> None:
    assert cli("compare", *files[:2], "-o", "out").code == 0
    done = cli("compare", *files[:2], "-o", "out")
    assert done.code == 2
    assert "out exists and is not empty" in done.error
    assert cli("compare", *files[:2], "-o", "out", "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base/profile.safetensors"], "name two profiles, or --by-domain"),
        (["base/profile.safetensors", "none.safetensors"], "No such file: none.safetensors"),
        (["base/profile.safetensors", "tuned"], "tuned is a folder; name the file"),
        (["base/profile.safetensors", "text"], "text is not a safetensors file"),
        (["base/profile.safetensors", "narrow.safetensors"], "narrow (3 layers × 6-8 experts): layer 1 has 8 experts"),
        (["base/profile.safetensors", "bare.safetensors", "--measure", "probability"], "bare: measure 'probability'"),
        (["base/profile.safetensors", "other.safetensors", "--measure", "taste"], "taste"),
        (["base/profile.safetensors", "other.safetensors", "--domain", "law"], "domain 'law' is not in the profile"),
        (["base/profile.safetensors", "other.safetensors", "--by-domain"], "moescope merge"),
        (["base/profile.safetensors", "--by-domain", "--domain", "code"], "exclude each other"),
        (["lone.safetensors", "--by-domain"], "lone: it has one domain only (code)"),
        (["base/profile.safetensors", "other.safetensors", "--labels", "a"], "must be 2 distinct names"),
        (["base/profile.safetensors", "other.safetensors", "--labels", "a,a"], "must be 2 distinct names"),
        (["base/profile.safetensors", "other.safetensors", "--labels", "a,"], "must be 2 distinct names"),
        (["base/profile.safetensors", "other.safetensors", "--top", "0"], "--top"),
        (["base/profile.safetensors", "other.safetensors", "-o", "text"], "text is a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    cli: Cli, files: list[Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("no profile", encoding="utf-8")
    narrow = replace(MODEL, layers=(replace(MODEL.layers[0], experts=7), *MODEL.layers[1:]))
    save_profile(random_profile(3, model=narrow), tmp_path / "narrow.safetensors")
    save_profile(random_profile(4, probability_sums=None, probability_tokens=None), tmp_path / "bare.safetensors")
    save_profile(random_profile(5, domains=("code",)), tmp_path / "lone.safetensors")
    before = set(tmp_path.iterdir())
    done = cli("compare", *arguments)
    assert done.code == 2
    assert message in done.error
    assert set(tmp_path.iterdir()) == before


def test_help_shows_examples(cli: Cli) -> None:
    done = cli("compare", "--help")
    assert done.code == 0
    assert "moescope compare results/profile.safetensors --by-domain" in done.out
