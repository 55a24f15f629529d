"""Prompt sets on disk, and what they are refused with."""

from pathlib import Path
from typing import Any

import pytest

from moescope.profiler.errors import PromptError
from moescope.profiler.prompts import read_prompts


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(*sources: str, **options: Any) -> str:
    """The one-line message with which sources are refused."""
    with pytest.raises(PromptError) as caught:
        list(read_prompts(sources, **options))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
