"""The wheel: what it holds, and that it works without the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that belong to the package."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(
        ".*", "tests", "benchmarks", "build", "dist", "*.egg-info", "__pycache__", "demo_results*"
    )
    shutil.copytree(ROOT, source / "moescope", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    subprocess.run([*command, str(source / "moescope")], check=True, capture_output=True)
    (file,) = target.glob("moescope-*.whl")
    return file


def test_the_wheel_holds_every_module_and_the_demo(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {
        str(Path("moescope") / file.relative_to(ROOT))
        for room in ("profiler", "adapters", "stats", "viz")
        for file in (ROOT / room).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules | {"moescope/__init__.py", "moescope/cli.py"}
    for model in ("stacked", "control"):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
            assert f"moescope/profiler/demo/{model}/{file}" in names
    assert {
        f"moescope/viz/schema/{name}.schema.json" for name in ("analysis_data", "analysis_summary", "weights")
    } <= names
    assert {"moescope/py.typed", "moescope/profiler/demo/prompts.jsonl", "moescope/profiler/demo/README.md"} <= names


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import moescope, moescope.cli; from moescope.profiler.demo import prompts_path; "
        f"assert moescope.__file__.startswith({str(tmp_path)!r}), moescope.__file__; assert prompts_path().exists(); "
        "from moescope.viz.structured import schema; assert schema('analysis_data')['$defs']"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, check=True)
