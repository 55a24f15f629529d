"""The load of experts as load balancers take it: DeepSeek's EPLB and SGLang."""

import json
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moescope.viz.errors import ExportError

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile


def eplb(profile: "RoutingProfile") -> bytes:
    """A safetensors file whose tensors are the `weight` of EPLB's `rebalance_experts`.

    `weight` int64 [layers, experts] holds the selections of each logical expert, `weight_prefill` and `weight_decode`
    those of each phase, `layers` int64 [layers] the true index of each row. Rows are MoE layers alone. Format:
    https://github.com/deepseek-ai/EPLB.

    Args:
        profile: A checked profile.

    Raises:
        ExportError: layers differ in their number of experts.
    """
    from safetensors.numpy import save

    counts = _even(profile, "eplb").sum(axis=0)
    prefill, decode = (np.ascontiguousarray(phase) for phase in counts)
    file: bytes = save(
        {
            "weight": prefill + decode,
            "weight_prefill": prefill,
            "weight_decode": decode,
            "layers": np.asarray(profile.model.layer_indices, dtype=np.int64),
        },
        metadata={"model": profile.model.id, "tokens": str(profile.tokens)},
    )
    return file


def sglang(profile: "RoutingProfile") -> bytes:
    """JSON for SGLang's `--init-expert-location`, which places experts by `logical_count` when it starts.

    One row of selections for every layer of the model up to its last MoE layer, as SGLang counts them: dense layers
    hold zeros. A model whose very last layers are dense needs rows of zeros added. Format:
    `python/sglang/srt/eplb/expert_location.py` of https://github.com/sgl-project/sglang.

    Args:
        profile: A checked profile.

    Raises:
        ExportError: layers differ in their number of experts.
    """
    counts = _even(profile, "sglang").sum(axis=(0, 1))
    rows = np.zeros((profile.model.layer_indices[-1] + 1, counts.shape[1]), np.int64)
    rows[list(profile.model.layer_indices)] = counts
    return json.dumps({"logical_count": rows.tolist()}).encode()


def _even(profile: "RoutingProfile", export_format: str) -> NDArray[np.int64]:
    """(D, P, L, E) selection counts of a model whose layers all have E experts."""
    if len(set(profile.model.experts)) > 1:
        raise ExportError(
            f"--format {export_format} holds layers of one number of experts, but they have "
            f"{min(profile.model.experts)} to {max(profile.model.experts)} here; take --format csv"
        )
    return profile.selection_counts
