"""How the checkpoints of each family name and lay out their routers and experts."""

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Layout:
    """Names under `layers.N.` and the order of the elements.

    Attributes:
        name: Short name of the layout.
        router: Router weight, [E, H].
        experts: What the names of the experts begin with. Layouts that are not fused go on with the expert's index.
        gate: Gate projection, [F, H]; fused with `up` if both have one name: [E, 2F, H], all gate rows first.
        up: Up projection, [F, H].
        down: Down projection, [H, F]; fused: [E, H, F].
        router_biases: Names a router's bias can have, [E]: one that corrects the choice, or one of the logits.
        transposed: Fused as [E, H, 2F] and [E, F, H]. None: published one way and saved the other; the shapes tell.
        interleaved: Gate and up alternate along 2F instead of following each other.
        expert_biases: Bias of gate and up, [E, 2F], and of down, [E, H], of fused layouts.
    """

    name: str
    router: str
    experts: str
    gate: str
    up: str
    down: str
    router_biases: tuple[str, ...] = ()
    transposed: bool | None = False
    interleaved: bool = False
    expert_biases: tuple[str, str] | None = None

    @property
    def fused(self) -> bool:
        """All experts of a layer lie in one tensor."""
        return self.gate == self.up


@dataclass(frozen=True, slots=True)
class CheckpointFamily:
    """A family's layouts and the fields of its config.

    Attributes:
        layouts: As published, then as transformers 5 keeps them in memory and may save them.
        width: Field with the width of a routed expert.
        experts: Fields that can hold the number of routed experts of a layer; the first that is there counts.
    """

    layouts: tuple[Layout, ...]
    width: str = "moe_intermediate_size"
    experts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")


#: What can stand before `layers.N.`.
PREFIXES: Final = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")

_FUSED: Final = Layout(
    "fused",
    "mlp.gate.weight",
    "mlp.experts.",
    "gate_up_proj",
    "gate_up_proj",
    "down_proj",
    ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
)
_PROJECTIONS: Final = replace(
    _FUSED, name="per expert", gate="gate_proj.weight", up="up_proj.weight", down="down_proj.weight"
)
_W: Final = Layout(
    "per expert, w1/w3/w2",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.",
    "w1.weight",
    "w3.weight",
    "w2.weight",
    ("block_sparse_moe.e_score_correction_bias", "block_sparse_moe.gate.e_score_correction_bias"),
)
_TRANSPOSED: Final = replace(_FUSED, name="fused, transposed", transposed=True)

_STANDARD: Final = CheckpointFamily((_PROJECTIONS, _FUSED))
_STANDARD_WIDE: Final = CheckpointFamily((_PROJECTIONS, _FUSED), width="intermediate_size")
_W_WIDE: Final = CheckpointFamily((_W, _FUSED), width="intermediate_size")
_EITHER_WAY: Final = CheckpointFamily((_PROJECTIONS, replace(_FUSED, transposed=None)))
_LLAMA4: Final = CheckpointFamily(
    (replace(_TRANSPOSED, router="feed_forward.router.weight", experts="feed_forward.experts."),),
    width="intermediate_size",
)
_GPT_OSS: Final = CheckpointFamily(
    (
        replace(
            _TRANSPOSED,
            name="fused, transposed, interleaved",
            router="mlp.router.weight",
            router_biases=("mlp.router.bias",),
            interleaved=True,
            expert_biases=("gate_up_proj_bias", "down_proj_bias"),
        ),
    ),
    width="intermediate_size",
)
_AFMOE: Final = CheckpointFamily(
    tuple(
        replace(layout, router="mlp.router.gate.weight", router_biases=("mlp.expert_bias",))
        for layout in (_PROJECTIONS, _FUSED)
    )
)
_ERNIE: Final = CheckpointFamily(
    (
        replace(_PROJECTIONS, router_biases=("mlp.moe_statics.e_score_correction_bias",)),
        replace(_FUSED, router_biases=("mlp.gate.moe_statics.e_score_correction_bias",)),
    ),
    experts=("moe_num_experts",),
)
_EXAONE: Final = CheckpointFamily(
    (replace(_PROJECTIONS, router_biases=("mlp.e_score_correction_bias",)), _FUSED),
)
_GRANITE: Final = CheckpointFamily(
    (
        Layout(
            "fused",
            "block_sparse_moe.router.layer.weight",
            "block_sparse_moe.",
            "input_linear.weight",
            "input_linear.weight",
            "output_linear.weight",
        ),
        replace(_FUSED, router="block_sparse_moe.router.weight", experts="block_sparse_moe.experts."),
    ),
    width="intermediate_size",
    experts=("num_local_experts",),
)
_HY: Final = CheckpointFamily((*_AFMOE.layouts[:1], _FUSED))
_LAGUNA: Final = CheckpointFamily(
    (replace(_PROJECTIONS, router_biases=("mlp.experts.e_score_correction_bias",)), _FUSED)
)
_LFM2: Final = CheckpointFamily(
    tuple(
        replace(
            layout,
            router="feed_forward.gate.weight",
            experts="feed_forward.experts.",
            router_biases=("feed_forward.expert_bias",),
        )
        for layout in (_W, _FUSED)
    )
)
_PHI: Final = CheckpointFamily((_W, replace(_FUSED, router="mlp.router.weight")), width="intermediate_size")

#: By `model_type` of the text config.
CHECKPOINT_FAMILIES: Final[dict[str, CheckpointFamily]] = {
    "afmoe": _AFMOE,
    "axk1": _STANDARD,
    "axk2": _STANDARD,
    "cohere2_moe": _STANDARD_WIDE,
    "deepseek_v2": _STANDARD,
    "deepseek_v3": _STANDARD,
    "deepseek_v32": _STANDARD,
    "dots1": _STANDARD,
    "ernie4_5_moe": _ERNIE,
    "exaone_moe": _EXAONE,
    "flex_olmo": _STANDARD_WIDE,
    "glm4_moe": _STANDARD,
    "glm4_moe_lite": _STANDARD,
    "glm4v_moe_text": _STANDARD,
    "glm_moe_dsa": _STANDARD,
    "gpt_oss": _GPT_OSS,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hy_v3": _HY,
    "kimi_k2": _STANDARD,
    "kimi_linear": CheckpointFamily((_W, _FUSED)),
    "laguna": _LAGUNA,
    "lfm2_moe": _LFM2,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "mellum": _STANDARD,
    "mimo_v2_flash": _STANDARD,
    "minimax": _W_WIDE,
    "minimax_m2": _W_WIDE,
    "mixtral": _W_WIDE,
    "olmoe": _STANDARD_WIDE,
    "phimoe": _PHI,
    "qwen2_moe": _STANDARD,
    "qwen3_5_moe": _STANDARD,
    "qwen3_5_moe_text": _STANDARD,
    "qwen3_moe": _STANDARD,
    "qwen3_next": _STANDARD,
    "qwen3_vl_moe": _EITHER_WAY,
    "qwen3_vl_moe_text": _EITHER_WAY,
    "solar_open": _STANDARD,
}
