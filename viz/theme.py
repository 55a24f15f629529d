"""The one look of all figures: colours, type, margins, axes, and what a figure without data says."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

SEQUENTIAL = [(0.0, "#19448e"), (0.25, "#4a6fa5"), (0.5, "#7d8db8"), (0.75, "#c49fbb"), (1.0, "#f4b3c2")]
"""From little to much."""

DIVERGING = [
    (0.0, "#12356f"),
    (0.25, "#6f95cb"),
    (0.5, "#f7f6f3"),
    (0.75, "#e39a4f"),
    (1.0, "#8a3f06"),
]
"""From -1 over 0 to 1: blue and orange stay apart in every common form of colour blindness."""

STRONG_COLOUR = "#19448e"
MODERATE_COLOUR = "#7d8db8"
WEAK_COLOUR = "#c49fbb"
NEUTRAL_COLOUR = "#9aa3b2"
LINE_COLOURS = (STRONG_COLOUR, "#b85c12", "#8f4f86", "#3f7f78", MODERATE_COLOUR, "#5a6375")
"""Lines side by side in one plot."""
INK = "#1f2633"
FAINT_INK = "#5a6375"
NO_DATA_COLOUR = "#c6c4c0"
"""Behind a missing cell: a warm grey that neither colour map passes through."""
EMPTY_COLOUR = "#f3f2f0"
"""Behind the sentence of a figure without data."""

DARK_DIVERGING = [(0.0, "#86aeea"), (0.25, "#3f639b"), (0.5, "#1d2129"), (0.75, "#a4662b"), (1.0, "#f2a661")]
"""The same on a dark page: 0 recedes into the background."""

DARK_COLOURS = {
    "white": "#14171d",
    INK: "#e7eaf0",
    FAINT_INK: "#a3acbd",
    NEUTRAL_COLOUR: "#626b7c",
    NO_DATA_COLOUR: "#3b3d43",
    EMPTY_COLOUR: "#1b1f27",
    STRONG_COLOUR: "#6f9be6",
}
"""What each colour outside a colour map becomes on a dark page."""

FONT_SIZE = 13
TITLE_SIZE = 20
MARGIN = {"l": 80, "r": 40, "t": 96, "b": 70}
BUTTON_ROW = 40
"""Height in pixels of a row of view buttons between title and plot."""
MOST_BUTTONS = 6
"""More views than this are chosen from a list that opens."""

LONGEST_SUBJECT = 110

_AXIS = {
    "showgrid": False,
    "zeroline": False,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": NEUTRAL_COLOUR,
    "linecolor": NEUTRAL_COLOUR,
    "showline": True,
    "automargin": True,
    "exponentformat": "power",
    "title": {"font": {"size": 14}, "standoff": 14},
}

TEMPLATE = go.layout.Template(
    data={"heatmap": [{"colorbar": {"thickness": 18, "outlinewidth": 0, "title": {"font": {"size": FONT_SIZE}}}}]},
    layout={
        "font": {"family": "Inter, 'Helvetica Neue', Arial, sans-serif", "size": FONT_SIZE, "color": INK},
        "title": {
            "x": 0.0,
            "xref": "container",
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "top",
            "pad": {"l": 24, "t": 30},
            "font": {"size": TITLE_SIZE},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": MARGIN,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"bgcolor": "white", "bordercolor": NEUTRAL_COLOUR, "font": {"color": INK, "size": FONT_SIZE}},
        "colorway": [STRONG_COLOUR, WEAK_COLOUR, MODERATE_COLOUR, "#8a3f06", NEUTRAL_COLOUR],
    },
)


def new_figure(title: str, subject: str, x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the common look.

    Args:
        title: what the figure shows; markup allowed.
        subject: what it was measured on (model, tokens …); any text, shown as it is, shortened if very long.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
    """
    shown = clip(subject, LONGEST_SUBJECT)
    line = f'<br><span style="font-size:{FONT_SIZE}px;color:{FAINT_INK}">{plain(shown)}</span>' if shown else ""
    figure = go.Figure()
    figure.update_layout(template=TEMPLATE, title_text=f"{title}{line}")
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return figure


def plain(text: str) -> str:
    """User text for a place where plotly would read markup."""
    return escape(printable(text), quote=False)


def printable(text: str) -> str:
    """User text without what steers instead of being seen: control characters, marks of direction, line separators."""
    return "".join(character if character.isprintable() else " " for character in text)


def clip(text: str, width: int) -> str:
    """The text, cut with an ellipsis if it is wider."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def bar_title(name: str) -> str:
    """Title of a colour bar: words one under the other unless it is short, and a line of air above the numbers."""
    return (name if len(name) <= 10 else name.replace(" ", "<br>")) + "<br>&nbsp;"


def layer_labels(layers: Sequence[int]) -> list[str]:
    """Category labels of layers: true indices stay true where layers are missing in between."""
    return [str(layer) for layer in layers]


def layers_downwards(figure: go.Figure) -> None:
    """Make the vertical axis one category a layer, the first layer on top."""
    figure.update_yaxes(type="category", autorange="reversed")


def say_no_data(figure: go.Figure, reason: str) -> go.Figure:
    """Put the reason why there is nothing to see where the data would be."""
    figure.update_xaxes(showticklabels=False, ticks="")
    figure.update_yaxes(showticklabels=False, ticks="")
    figure.update_layout(plot_bgcolor=EMPTY_COLOUR)
    figure.add_annotation(
        text=plain(reason),
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 16, "color": FAINT_INK},
    )
    return figure


def add_view_buttons(
    figure: go.Figure, labels: Sequence[str], *, traces_each: int = 1, y_titles: Sequence[str] | None = None
) -> None:
    """Let the reader switch between views of the figure; does nothing for a single view.

    Many or long labels become a list that opens, so that they do not run out of the page.

    Args:
        figure: its traces, view after view.
        labels: one a view; markup allowed.
        traces_each: traces of each view.
        y_titles: title of the vertical axis in each view, if it changes; markup allowed.
    """
    for index, trace in enumerate(figure.data):
        trace.visible = index < traces_each
    if len(labels) < 2:
        return
    buttons = [
        {
            "label": label,
            "method": "restyle" if y_titles is None else "update",
            "args": [
                {"visible": [other == index for other in range(len(labels)) for _ in range(traces_each)]},
                *([] if y_titles is None else [{"yaxis.title.text": y_titles[index]}]),
            ],
        }
        for index, label in enumerate(labels)
    ]
    in_a_row = len(labels) <= MOST_BUTTONS and sum(map(len, labels)) <= LONGEST_SUBJECT
    figure.update_layout(
        margin_t=MARGIN["t"] + BUTTON_ROW,
        updatemenus=[
            {
                "type": "buttons" if in_a_row else "dropdown",
                "direction": "right" if in_a_row else "down",
                "buttons": buttons,
                "x": 0.0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": 10, "l": 0},
                "bgcolor": "white",
                "bordercolor": NEUTRAL_COLOUR,
                "showactive": True,
            }
        ],
    )
