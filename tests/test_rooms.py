"""Each room imports only what DESIGN allows, and the core imports no engine before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = {"transformers", "vllm"}
FORBIDDEN = {
    "profiler": {
        "transformers",
        "vllm",
        "plotly",
        "typer",
        "rich",
        "moescope.adapters",
        "moescope.stats",
        "moescope.viz",
    },
    "adapters": {"plotly", "typer", "rich", "moescope.stats", "moescope.viz", *ENGINES},
    "stats": {
        "torch",
        "plotly",
        "typer",
        "rich",
        "safetensors",
        "moescope.profiler",
        "moescope.adapters",
        "moescope.viz",
    },
    "viz": {"torch", "typer", "rich", "safetensors", "moescope.profiler", "moescope.adapters"},
}


def imports(file: Path) -> set[str]:
    """Modules imported when the file is, outside functions and type checking."""
    found = set()
    nodes = list(ast.parse(file.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for module in imports(file):
            for forbidden in FORBIDDEN[room]:
                assert module != forbidden, f"{file} imports {module}"
                assert not module.startswith(f"{forbidden}."), f"{file} imports {module}"


def test_the_root_holds_no_stray_python_file() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_importing_moescope_imports_nothing_heavy() -> None:
    code = "import sys, moescope; print(sorted({'torch', 'transformers', 'plotly', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import moescope

    for name in moescope.__all__:
        assert getattr(moescope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moescope.nothing
