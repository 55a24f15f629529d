"""From the name of a checkpoint, or of two, to the sums that similarity is computed from, in one call."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moescope.adapters.checkpoints import open_checkpoint
from moescope.adapters.session import DEMO
from moescope.adapters.weight_reader import WeightReader
from moescope.profiler.demo import model_path
from moescope.profiler.errors import OptionError
from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, WEIGHTS_NAME
from moescope.profiler.weight_files import PartialWeights, WeightRecord, save_weights
from moescope.profiler.weight_pass import PassProgress
from moescope.profiler.weights import MATCH_PAIRS, default_deltas
from moescope.profiler.weights import weigh as sum_weights


def weigh(
    model: str | Path,
    *,
    against: str | Path | None = None,
    layers: Sequence[int] | None = None,
    deltas: Sequence[int] | None = None,
    match_pairs: int = MATCH_PAIRS,
    sketch: bool = False,
    device: str = "auto",
    n_jobs: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[PassProgress], None] | None = None,
) -> WeightRecord:
    """Sum over the routers and experts of a checkpoint, from its files alone; no model is loaded.

    Example:
        >>> record = moescope.weigh("Qwen/Qwen3-30B-A3B", folder="weights")
        >>> result = moescope.analyze_weights(record)
        >>> moescope.write_weights(result, "weights")

    Args:
        model: Folder of a checkpoint, hub id of one that is downloaded, "demo:stacked" or "demo:control".
        against: Another checkpoint of the same layers and shape: what has changed since, expert by expert.
        layers: Model indices of the layers to take; all that route by default.
        deltas: Layer distances to compare at, and no others; by default all pairs of layers.
        match_pairs: Pairs of layers whose experts are matched all against all, at most; 0 for none.
        sketch: Read a sample of the weights: a quick answer that says where to look.
        device: "auto", "cpu", "cuda" or "cuda:N".
        n_jobs: Threads; all cores by default.
        folder: Where to keep the sums, as they grow and then whole in `weights.safetensors`; None keeps none.
        resume: Go on with what an interrupted pass left in `folder`.
        on_progress: Called after each block.

    Returns:
        The sums; `moescope.analyze_weights` says what they mean.

    Raises:
        MoescopeError: With a sentence that names what is wrong and what would be right.
        KeyboardInterrupt: The pass was interrupted; with `folder`, what was read has been kept there.
    """
    if resume and folder is None:
        raise OptionError("resume needs the folder of the interrupted pass")
    if against is not None and deltas is not None:
        raise OptionError("--against compares each layer with the same one there; leave --delta out")
    for what, name in (("MODEL", model), ("--against", against)):
        if name == "":
            raise OptionError(f"{what} is empty; name the folder of a checkpoint or a hub id")
    chosen, keeper = choose_device(device), None
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_weights(model, layers))
        other = None if against is None else stack.enter_context(open_weights(against, layers))
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            keeper = PartialWeights(Path(folder) / PARTIAL_WEIGHTS_NAME, resume=resume)
        record = sum_weights(
            source,
            default_deltas(source.layers) if deltas is None else deltas,
            against=other,
            only_deltas=deltas is not None,
            match_pairs=match_pairs,
            sketch=sketch,
            device=chosen,
            n_jobs=n_jobs,
            keeper=keeper,
            on_progress=on_progress,
        )
    if keeper is not None and folder is not None:
        save_weights(record, Path(folder) / WEIGHTS_NAME)
        keeper.drop()
    return record


def open_weights(model: str | Path, layers: Sequence[int] | None = None) -> WeightReader:
    """Find the weights of a checkpoint without reading them; it keeps the name it was given.

    Args:
        model: As in `weigh`.
        layers: Model indices of the layers to read; all that route by default.

    Raises:
        ModelError: There is no such checkpoint, it cannot be read, or its layers differ in shape.
    """
    name = str(model)
    if not name.startswith(DEMO):
        return WeightReader(open_checkpoint(model), layers)
    return WeightReader(replace(open_checkpoint(model_path(name.removeprefix(DEMO))), model=name), layers)


def choose_device(name: str) -> str:
    """The device of a pass: "cpu", or a GPU that is there.

    Raises:
        OptionError: There is no such device.
    """
    import torch

    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise OptionError(f"--device {name!r} must be auto, cpu, cuda or cuda:N")
    if name != "cpu" and (not cuda or int(name.partition(":")[2] or 0) >= torch.cuda.device_count()):
        raise OptionError(f"--device {name}: there is no such GPU here; use --device cpu")
    return name
