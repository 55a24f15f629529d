"""Families whose routing the generic transformers hook records, and those it must refuse."""

from dataclasses import dataclass
from typing import Final

from moescope.profiler.profile import Scoring


@dataclass(frozen=True, slots=True)
class Family:
    """How a family scores its experts.

    Attributes:
        scoring: Scoring function over all experts.
        scale: Attribute of the router that multiplies the routing weights after normalisation, if any.
        proportional: True if routing weights are proportional to the scores of the chosen experts; the adapter asserts
            it on the first forward. False for families that compute them another way: their counts and weights are
            exact all the same.
        scoring_field: Field of the config that names the scoring function, where the checkpoint chooses.
    """

    scoring: Scoring
    scale: str | None = None
    proportional: bool = True
    scoring_field: str | None = None


_SOFTMAX: Final = Family("softmax")
_SOFTMAX_SCALED: Final = Family("softmax", "routed_scaling_factor")
_SIGMOID: Final = Family("sigmoid")
_SIGMOID_SCALED: Final = Family("sigmoid", "routed_scaling_factor")

#: By `model_type` of the text config. Each is run as a tiny checkpoint in tests/adapters/test_transformers.py.
FAMILIES: Final[dict[str, Family]] = {
    "afmoe": Family("sigmoid", "route_scale"),
    "axk1": _SIGMOID_SCALED,
    "axk2": _SIGMOID_SCALED,
    "cohere2_moe": Family("softmax", scoring_field="expert_selection_fn"),
    "deepseek_v2": _SOFTMAX_SCALED,
    "deepseek_v3": _SIGMOID_SCALED,
    "deepseek_v32": _SIGMOID_SCALED,
    "dots1": _SIGMOID_SCALED,
    "ernie4_5_moe": _SOFTMAX,
    "exaone_moe": _SIGMOID_SCALED,
    "flex_olmo": _SOFTMAX,
    "glm4_moe": _SIGMOID_SCALED,
    "glm4_moe_lite": _SIGMOID_SCALED,
    "glm_moe_dsa": _SIGMOID_SCALED,
    "gpt_oss": _SOFTMAX,
    "granitemoe": _SOFTMAX,
    "granitemoe_swa": _SOFTMAX,
    "granitemoehybrid": _SOFTMAX,
    "granitemoeshared": _SOFTMAX,
    "hunyuan_v1_moe": _SOFTMAX,
    "hy_v3": Family("sigmoid", "router_scaling_factor"),
    "hy_v4": _SIGMOID_SCALED,
    "kimi_linear": _SIGMOID_SCALED,
    "laguna": _SIGMOID,
    "lfm2_moe": _SIGMOID_SCALED,
    "mellum": _SOFTMAX,
    "mimo_v2_flash": _SIGMOID_SCALED,
    "minimax": _SOFTMAX,
    "minimax_m2": _SIGMOID,
    "mixtral": _SOFTMAX,
    "nemotron_h": _SIGMOID_SCALED,
    "olmoe": _SOFTMAX,
    "phimoe": Family("softmax", proportional=False),
    "qwen2_moe": _SOFTMAX,
    "qwen3_5_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "solar_open": _SIGMOID_SCALED,
}

#: Families that route, but not in a way that the hook can record exactly, and why.
REFUSED: Final[dict[str, str]] = {
    "dbrx": "its router hands over scores only",
    "deepseek_v4": "its first layers route by a hash of the token id",
    "doge": "its experts are retrieved by product keys",
    "inkling": "its router mixes shared and routed experts in one top-k",
    "jamba": "its router is a plain linear layer",
    "jetmoe": "its attention is routed too",
    "llama4": "its experts see every token, weighted",
    "longcat_flash": "it has zero-computation experts",
    "nllb_moe": "it drops tokens over capacity",
    "switch_transformers": "it drops tokens over capacity",
    "zaya": "its router may skip the experts",
}
