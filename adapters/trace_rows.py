"""Rows of a trace on their way from a device to the host."""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_host(tensor: Tensor) -> NDArray[Any]:
    """The tensor's values; from a GPU they are on their way."""
    if tensor.is_cuda:  # torch keeps pinned memory of tensors that are gone and gives it to the next: a ring
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        tensor = pinned.copy_(tensor, non_blocking=True)
    found: NDArray[Any] = tensor.numpy()
    return found


def arrival(device: torch.device) -> Callable[[], object] | None:
    """Waits until what is on its way from a GPU has arrived."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
