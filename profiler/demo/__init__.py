"""The embedded demo: two small trained models and a prompt set whose answer is known."""

from pathlib import Path
from typing import Literal

_FOLDER = Path(__file__).resolve().parent


def model_path(name: Literal["stacked", "control"] = "stacked") -> Path:
    """Returns the folder of a demo model.

    Args:
        name: ``stacked``, whose layers i, i + 4 and i + 8 share an origin, or ``control``, whose layers do not.

    Returns:
        A checkpoint folder as transformers saves it.

    Raises:
        ValueError: There is no model of that name.
    """
    if name not in ("stacked", "control"):
        raise ValueError(f"No demo model '{name}': choose 'stacked' or 'control'.")
    return _FOLDER / name


def prompts_path() -> Path:
    """Returns the demo's prompt set.

    Returns:
        A file of JSON lines with ``id``, ``domain`` and ``prompt``.
    """
    return _FOLDER / "prompts.jsonl"
