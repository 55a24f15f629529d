"""The documents: command lines and options exist, links lead somewhere, keys are the schema's, the script runs."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from moescope.cli import _UsageError, app
from moescope.viz.structured import schema

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `moescope` of each command in a fenced bash block; one may go on after a backslash."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
            lexer.whitespace_split = True
            words = list(lexer)
            starts = [i for i, word in enumerate(words) if word == "moescope"]
            for start in starts:
                rest = words[start + 1 :]
                yield rest[: next((i for i, word in enumerate(rest) if set(word) <= set("|;&<>")), len(rest))]


def with_dashes(word: str) -> str:
    """An option's name with dashes for underscores, as the command line takes both; other words as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def problem(words: list[str]) -> str | None:
    """What the parser has against a command line, which is not run; None if nothing."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context("", [with_dashes(word) for word in words])
    except _UsageError as error:
        return str(error.format_message())
    return None


def long_options(command: Any) -> set[str]:
    """Options of a command and of the commands in it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(long_options(inner) for inner in getattr(command, "commands", {}).values()))


COMMANDS = [(file.name, words) for file in DOCUMENTS for words in command_lines(file.read_text(encoding="utf-8"))]


def test_a_wrong_command_is_noticed() -> None:
    lines = (
        "cat a | moescope profile - --max_tokens 0 -o b | tail",
        "moescope export c \\",
        "  -o d --format odf  # odd",
    )
    first, second = command_lines("\n".join(("```bash", *lines, "```", "")))
    assert first == ["profile", "-", "--max_tokens", "0", "-o", "b"]
    assert second == ["export", "c", "-o", "d", "--format", "odf"]
    assert problem(first) is None
    assert "'odf' is not one of" in str(problem(second))
    assert "No such option: --no" in str(problem(["info", "a", "--no"]))
    assert problem(["draw"]) == "no command draw"
    assert problem(["trace", "draw"]) == "no command draw"
    assert "No such option: --no" in str(problem(["trace", "head", "a", "--no"]))


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS]
)
def test_every_documented_command_exists(document: str, words: list[str]) -> None:
    assert problem(words) is None, f"{document}: moescope {' '.join(words)}"


def test_commands_were_found_in_every_document_that_has_some() -> None:
    assert {"README.md", "coming-from-the-old-tool.md"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_option_that_is_named_exists(document: Path) -> None:
    """Options in the text, in tables too: those of moescope, of the earlier tool's table, or of another program."""
    known = long_options(typer.main.get_command(app))
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", prose)
    named = {name.replace("_", "-") for span in spans for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    elsewhere = {"--top-p", "--no-sample"} if document.name == "coming-from-the-old-tool.md" else set()
    assert named - known - elsewhere == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, link


def keys(part: Any) -> Iterator[str]:
    """Names of properties anywhere in a schema."""
    if isinstance(part, dict):
        yield from part.get("properties", {})
        for inner in part.values():
            yield from keys(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from keys(inner)


@pytest.mark.parametrize("name", ["analysis_data", "analysis_summary", "weights"])
def test_every_key_of_the_structured_data_is_described(name: str) -> None:
    text = (ROOT / "docs" / "structured-data.md").read_text(encoding="utf-8")
    described = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(keys(schema(name))) - described == set()


def test_the_script_runs(tmp_path: Path) -> None:
    script, out = ROOT / "docs" / "python_api.py", tmp_path / "out"

    def run(*arguments: object) -> str:
        command = [sys.executable, str(script), "--quick", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = run(out)
    assert "Δ = 4   mean r = +0.8" in told
    assert "bits, noise" in told
    for name in (
        "report/report.html",
        "by_domain/comparison.json",
        "tables/experts.csv",
        "weights/weights.html",
        "profile.safetensors",
    ):
        assert (out / name).stat().st_size > 0
    figures = {file.stem for file in (out / "figures").glob("*.html")}
    assert {
        "activation",
        "correlation",
        "routers",
        "tokens",
        "activation_of_a_domain",
        "difference_by_domain",
        "expert_layers",
    } <= figures
    assert "Same index: in 8 of 8 matched pairs of layers" in told
    assert "My own title" in (out / "figures" / "correlation.html").read_text(encoding="utf-8")
    data = json.loads((out / "report" / "analysis_data.json").read_text(encoding="utf-8"))
    assert data["router_similarity"]["row_cosine"][0][3] > 0.9
    assert data["metadata"]["prompts"] == 24

    again = run("--profile", out / "profile.safetensors", tmp_path / "again")
    assert again.splitlines()[:2] == told.splitlines()[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
