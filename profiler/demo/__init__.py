"""The embedded demo: two small trained models and a prompt set whose answer is known."""

from pathlib import Path
from typing import Final

from moescope.profiler.errors import ModelError

#: `stacked`, whose layers i, i + 4 and i + 8 share an origin, and `control`, whose layers do not.
MODELS: Final = ("stacked", "control")

_FOLDER: Final = Path(__file__).resolve().parent


def model_path(name: str = "stacked") -> Path:
    """Folder of a demo model, a checkpoint as transformers saves it.

    Raises:
        ModelError: There is no demo model of that name.
    """
    if name not in MODELS:
        raise ModelError(f"there is no demo model {name!r}; choose demo:{' or demo:'.join(MODELS)}")
    return _FOLDER / name


def prompts_path() -> Path:
    """The demo's prompt set: JSON lines with `id`, `domain` and `prompt`."""
    return _FOLDER / "prompts.jsonl"
