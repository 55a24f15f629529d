"""Whether a model's name is a folder that holds a checkpoint."""

from pathlib import Path

from moescope.profiler.errors import ModelError


def check_folder(model: str, *, weights: bool = True) -> None:
    """Refuse what looks like a folder and is no checkpoint; anything else may be a hub id.

    Args:
        model: Folder of a checkpoint, or a hub id.
        weights: Weights must be there.

    Raises:
        ModelError: No such folder, a file, or a folder without a config or without weights.
    """
    folder = Path(model)
    if not folder.exists():
        if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
            raise ModelError(f"No such folder: {model}")
        return
    if not folder.is_dir():
        raise ModelError(f"{model} is a file; --model needs the folder of a checkpoint, or a hub id")
    if not (folder / "config.json").exists():
        raise ModelError(f"{model} has no config.json; --model needs the folder of a checkpoint")
    if weights and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(f"{model} has a config.json but no weights (*.safetensors)")
