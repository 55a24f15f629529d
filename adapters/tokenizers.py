"""Tokenizers of models, for token ids that are to be read."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.adapters.checkpoints import find_folder
from moescope.adapters.encoding import first_line
from moescope.adapters.session import DEMO
from moescope.profiler.demo import model_path
from moescope.profiler.errors import ModelError


def open_tokenizer(model: str, *, local: bool = False, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint that the user names.

    Args:
        model: Folder of a checkpoint, hub id, "demo:stacked" or "demo:control".
        local: Take what is on this machine, without asking the hub.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        ModelError: There is none.
    """
    from transformers import AutoTokenizer

    source = str(model_path(model.removeprefix(DEMO))) if model.startswith(DEMO) else model
    local = local or Path(source).is_dir()
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=trust_remote_code)
    except Exception as error:  # hub, JSON and tokenizer errors of many kinds
        raise ModelError(f"{model} has no tokenizer that can be read: {first_line(error)}") from error


def stored_tokenizer(model: str) -> Any:
    """The tokenizer of a checkpoint that a file names, and not the user: none of its code is run, nothing downloaded.

    Args:
        model: As in `open_tokenizer`; a folder must be the user's own, a hub id in the local cache of the hub.

    Raises:
        ModelError: There is none, or the folder belongs to another user.
    """
    if model.startswith(DEMO):
        return open_tokenizer(model)
    folder = find_folder(model).resolve()
    if Path(model).exists() and folder.stat().st_uid != os.geteuid():
        raise ModelError(f"{model} is a folder of another user, which must be named to be read")
    try:
        return open_tokenizer(str(folder), local=True)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), model, 1)) from error


def check_vocabulary(tokenizer: Any, token_ids: NDArray[np.integer[Any]], model: str) -> None:
    """Refuse token ids that the tokenizer cannot have made.

    Raises:
        ModelError: One is negative, or at or beyond the tokenizer's length.
    """
    lowest, highest = int(token_ids.min(initial=0)), int(token_ids.max(initial=0))
    if lowest < 0 or highest >= len(tokenizer):
        raise ModelError(
            f"{model} has token ids 0 to {len(tokenizer) - 1}, and the trace has "
            f"{lowest if lowest < 0 else highest}; it takes the tokenizer of the model that was traced"
        )
