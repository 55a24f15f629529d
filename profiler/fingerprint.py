"""A model's fingerprint: the same whichever engine loaded it."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def router_fingerprint(weights: Iterable[Tensor]) -> str:
    """sha256 over router weights cast to bfloat16, in layer order.

    Args:
        weights: (E, H) of each MoE layer.
    """
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
