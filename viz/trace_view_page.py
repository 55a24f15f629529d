"""A routing trace token by token, as one page that needs neither network nor other files."""

import base64
import gzip
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from moescope import __version__
from moescope.viz import theme
from moescope.viz.activation import COLOUR_PERCENTILE
from moescope.viz.page import asset, escaped, packed, page_script, script_json, sentences, whole_page
from moescope.viz.pages import CONFIG, write_text
from moescope.viz.surface import CAMERA, MOST_EXPERTS
from moescope.viz.token_text import visible
from moescope.viz.trace_view import TraceView, ViewedRequest
from moescope.viz.wording import by_layer, counted, index_ranges, short_name

EXPERT_COLOURS: Final = (
    "#77aadd",
    "#ee8866",
    "#eedd88",
    "#ffaabb",
    "#44bb99",
    "#99ddff",
    "#bbcc33",
    "#aaaa00",
)
"""Behind dark text, told apart in every common form of colour blindness: the light scheme of P. Tol, Colour Schemes
(SRON/EPS/TN/09-002). More experts than these would not be; they stay without colour."""
TEXT_ON_COLOUR: Final = "#1f2633"
STEPS: Final = 12
"""Steps of the colours from little to much behind tokens."""
STACKED_TOKENS, STACKED_LAYERS = 50, 10
SURFACE_TOKENS, SURFACE_LAYERS = 200, 64
"""Most tokens and layers of a surface for each layer, and of one surface for all."""
OUTER: Final = (1.0, 99.0)
"""Percentiles of all tokens and layers at which the colours of surprisal end."""


_SCRIPTS: Final = Template("""\
<script type="application/json" id="view-data">$data</script>
<script type="text/plain" id="library">$library</script>
<script>
$script
</script>""")


def write_trace_view(view: TraceView, path: Path | str) -> Path:
    """Write the page: about 2 MB, and less than 2 bytes or, with weights, 4 for each expert of a token (E up to 256).

    Args:
        view: What to show.
        path: The HTML file; replaced if it is there, whole or not at all.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, trace_view_text(view))
    return file


def trace_view_text(view: TraceView) -> str:
    """The page as HTML."""
    return whole_page(
        f"Token routing of {short_name(view.model_id)}",
        _subject(view),
        css="\n".join([asset("report.css"), asset("trace_view.css"), _colour_rules()]),
        body=_body(view),
        footer=f"moescope {__version__}",
        scripts=_SCRIPTS.substitute(
            data=script_json(_data(view)), library=_library(), script=page_script("trace_view.js")
        ),
    )


def _body(view: TraceView) -> str:
    return Template(asset("trace_view.html")).substitute(
        title=escaped(f"Token routing of {short_name(view.model_id)}"),
        subject=escaped(_subject(view)),
        remarks=sentences([*view.remarks, *_left_out(view)]),
        share="share of weight" if view.shares is not None else "",
    )


def _subject(view: TraceView) -> str:
    return (
        f"{counted(len(view.requests), 'request')}, {counted(len(view.token), 'token')} · "
        f"{counted(len(view.layers), 'MoE layer')} ({index_ranges(view.layers)}) · "
        f"{by_layer(view.experts, view.layers)} experts, top-{by_layer(view.top_k, view.layers)}"
    )


def _left_out(view: TraceView) -> list[str]:
    """What of the trace is not on the page."""
    remarks = [
        f"Of request {request.number} the first {request.tokens:,} of {request.length:,} tokens are shown."
        for request in view.requests
        if request.tokens < request.length
    ]
    if len(view.token) < view.held:
        remarks.append(f"The page holds {len(view.token):,} of the {view.held:,} tokens of the trace.")
    return remarks


def _data(view: TraceView) -> dict[str, Any]:
    """Everything that the page's script reads."""
    use = packed(view.use)
    columns = {
        "ids": _packed(view.ids),
        "token": _packed(view.token.astype("<i4")),
        "position": _packed(view.position.astype("<u4")),
        "generated": _packed(view.generated.astype("u1")),
        "use": use,
    }
    if view.shares is not None:
        columns["shares"] = _packed(np.rint(view.shares * 255).astype("u1"))
    modes: list[dict[str, Any]] = [{"id": "expert", "name": "expert", "how": _how_experts(view)}]
    if view.entropy is not None:
        columns["entropy"] = packed(view.entropy)
        modes.append(
            {
                "id": "entropy",
                "name": "entropy of weights",
                "how": "Colour is the entropy of the token's routing weights in the layer, divided by their sum: 0 "
                "bits where one expert has all of the weight, log2 k where all k have the same.",
                "scale": columns["entropy"]["scale"],
                "low": 0.0,
                "high": float(np.log2(max(view.top_k))),
            }
        )
    columns["surprisal"] = packed(view.surprisal)
    low, high = np.percentile(view.surprisal, OUTER).tolist()
    modes.append(
        {
            "id": "surprisal",
            "name": "surprisal of experts",
            "how": "Colour is how unusual the token's experts are: the mean over them of -log2 of the share of the "
            f"layer's selections that an expert gets, over {_counted(view)}. An even use would give log2 E.",
            "scale": columns["surprisal"]["scale"],
            "low": low,
            "high": high,
        }
    )
    return {
        "layers": view.layers,
        "experts": view.experts,
        "top_k": view.top_k,
        "tokens": len(view.token),
        "k": view.ids.shape[2],
        "requests": [_request(request) for request in view.requests],
        "texts": None if view.texts is None else [visible(text) for text in view.texts],
        "columns": columns,
        "use_scale": use["scale"],
        "modes": modes,
        "colours": EXPERT_COLOURS,
        "steps": _steps(),
        "scale": theme.SEQUENTIAL,
        "space": {
            "stacked_tokens": STACKED_TOKENS,
            "stacked_layers": STACKED_LAYERS,
            "tokens": SURFACE_TOKENS,
            "layers": SURFACE_LAYERS,
            "experts": MOST_EXPERTS,
            "percentile": COLOUR_PERCENTILE,
            "camera": CAMERA,
        },
        "config": CONFIG,
    }


def _request(request: ViewedRequest) -> dict[str, Any]:
    domain = theme.clip(theme.printable(request.domain), 24)
    return {name: getattr(request, name) for name in ("number", "first", "tokens", "length")} | {"domain": domain}


def _how_experts(view: TraceView) -> str:
    first = "with the largest weight" if view.shares is not None else "that the router named first (no weights traced)"
    return (
        f"Colour is the expert of the token {first} in the layer. The {len(EXPERT_COLOURS)} experts that are it most "
        "often, over all tokens of the page, have colours; choose one to see all tokens that have it among their k. "
        f"“In the trace” is the share of tokens that have it, of {_counted(view)}."
    )


def _counted(view: TraceView) -> str:
    if view.counted == view.held:
        return f"all {view.held:,} tokens of the trace"
    return f"{view.counted:,} evenly drawn tokens of the {view.held:,} of the trace"


def _packed(array: NDArray[Any]) -> dict[str, str]:
    """Whole numbers as base64, in the order of the array."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "dtype": f"{array.dtype.kind}{array.dtype.itemsize}",
        "bdata": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _steps() -> list[str]:
    """Colours from little to much."""
    places, colours = zip(*theme.SEQUENTIAL, strict=True)
    parts = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours])
    where = np.linspace(0, 1, STEPS)
    mixed = np.stack([np.interp(where, places, part) for part in parts.T], axis=1).round().astype(int)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in mixed.tolist()]


def _colour_rules() -> str:
    """Style of tokens in each colour, with text that can be read on it."""
    rules = [(f"c{place}", colour, TEXT_ON_COLOUR) for place, colour in enumerate(EXPERT_COLOURS)]
    rules += [
        (f"s{place}", colour, "#ffffff" if _luminance(colour) < 0.2 else TEXT_ON_COLOUR)
        for place, colour in enumerate(_steps())
    ]
    rule = Template("#text .$name { background: $colour; color: $ink; }")
    return "\n".join(rule.substitute(name=name, colour=colour, ink=ink) for name, colour, ink in rules)


def _luminance(colour: str) -> float:
    """Relative luminance, 0 to 1, of a colour (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@cache
def _library() -> str:
    """plotly.js, gzipped, as base64: the page unpacks it when it first draws in three dimensions."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode("ascii")
