"""A page as its reader sees it: opened in a browser, waited for, and searched for text that cannot be read.

Nothing here knows the pages: any page with HTML text, controls and plotly figures can be opened and searched. What
plotly draws inside a WebGL scene (labels of 3-D axes) is pixels, and stays unsearched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Page, Request

LOCAL = ("file:", "data:", "blob:")
HEIGHTS = {1280: 800, 1920: 1000}
"""Height of the window that goes with a width."""

FLAG = "window.hostile = 1"

HOSTILE = {
    "script": f"</script><script>{FLAG};alert(1)</script>",
    "image": f'<img src=x onerror="{FLAG};alert(1)">',
    "link": f'<a href="javascript:{FLAG}">here</a>',
    "title end": f"</title></svg><svg onload='{FLAG}'>",
    "comment": "<!--<script>",
    "quotes": "\"double\" 'single' `back` \\ \\n",
    "entities": "a & b &lt;b&gt; &amp;amp; &#60;",
    "template": "${window.hostile = 1} {{7*7}} $figure %{y} %s",
    "formula": "$x^2$ and $\\frac{1}{2}$",
    "reversed": "safe\u202egnp.exe",
    "bidi": "\u200fa\u2066b\u2069c\u061cd\u200be",
    "line separators": "one\u2028two\u2029three\nfour\rfive\tsix",
    "control": "nul\x00bell\x07escape\x1b[31m\x7f\x85end",
    "long word": "w" * 400,
    "wide word": "漢字" * 200,
    "emoji": "model 🧪🚀 👩‍🔬 🇫🇷",
    "right to left": "نموذج/تجربة שלום",
    "stacked marks": "Z" + "\u0300\u0301\u0302" * 8 + "algo",
}
"""Text that someone may put into a model's name, a domain or a remark; FLAG is set where any of it runs."""


@dataclass
class Opened:
    """A page and what went wrong on it so far, a sentence each."""

    page: Page
    faults: list[str] = field(default_factory=list)


def open_page(context: BrowserContext, path: Path, width: int, height: int | None = None) -> Opened:
    """Open a file in a new page of a context, and listen from before its first byte.

    Args:
        context: where; offline, if nothing is to leave the machine.
        path: the HTML file.
        width: of the window, in pixels.
        height: of the window; None takes the one of HEIGHTS.

    Returns:
        The page; its faults grow while it is used: errors on the console, uncaught errors, dialogs, requests that
        failed, and requests for anything but local files.
    """
    page = context.new_page()
    opened = Opened(page)

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            opened.faults.append(f"console: {message.text}")

    def request(request: Request) -> None:
        if not request.url.startswith(LOCAL):
            opened.faults.append(f"request outside: {request.url[:200]}")

    def dialog(dialog: Dialog) -> None:
        opened.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", console)
    page.on("pageerror", lambda error: opened.faults.append(f"uncaught: {error}"))
    page.on("request", request)
    page.on("requestfailed", lambda request: opened.faults.append(f"request failed: {request.url[:200]}"))
    page.on("websocket", lambda socket: opened.faults.append(f"request outside: {socket.url[:200]}"))
    page.on("dialog", dialog)
    page.on("crash", lambda _: opened.faults.append("the page crashed"))
    return reopen(opened, path, width, height)


def reopen(opened: Opened, path: Path, width: int, height: int | None = None) -> Opened:
    """Open another file in the same page, forgetting earlier faults; faster, where pages share a library."""
    resize(opened.page, width, height)
    opened.faults.clear()
    opened.page.goto(path.as_uri())
    return opened


def resize(page: Page, width: int, height: int | None = None) -> None:
    """Change the size of the window; None takes the height of HEIGHTS."""
    page.set_viewport_size({"width": width, "height": height or HEIGHTS.get(width, 800)})


def wait_drawn(page: Page, timeout: float = 20.0) -> int:
    """Wait until every visible plotly figure is drawn and no text moves any more.

    Args:
        page: where to look.
        timeout: seconds until it is a failure.

    Returns:
        How many figures are drawn.

    Raises:
        playwright.sync_api.TimeoutError: if a figure stays empty.
    """
    page.wait_for_function(DRAWN, timeout=timeout * 1000)
    return page.evaluate("document.querySelectorAll('.js-plotly-plot').length")


def show_all(page: Page, timeout: float = 60.0) -> int:
    """Scroll a page that draws figures as they come near to each of its figures, wait until all are drawn, and go up.

    Returns:
        How many figures there are.
    """
    figures = page.locator(".figure").all()
    for figure in figures:
        figure.scroll_into_view_if_needed()
        name = figure.get_attribute("id")
        page.wait_for_function(f"document.getElementById('{name}').dataset.drawn === '1'", timeout=timeout * 1000)
        wait_drawn(page, timeout)
    page.evaluate("window.scrollTo(0, 0)")
    return len(figures)


def problems(page: Page) -> list[str]:
    """What a reader could not read: text that is cut or lies over other text, and a page wider than its window.

    Looks at every visible text of the page as it stands, also below the fold: lines of HTML text, buttons, selects and
    other controls, and the text of plotly figures (titles, tick labels, legends, colour bars, annotations, buttons).
    Text that can be scrolled to, or that its style shortens with an ellipsis, is not cut. Hover labels are left out.

    Args:
        page: a page that is drawn.

    Returns:
        A sentence for each problem.
    """
    return page.evaluate(PROBLEMS)


def visible_text(page: Page) -> str:
    """All text that is displayed, in the order of the document, line breaks of figures as spaces."""
    return page.evaluate(VISIBLE_TEXT)


def hostile_ran(page: Page) -> bool:
    """Whether any of the HOSTILE text was run as a script."""
    return page.evaluate("'hostile' in window")


SEEN = """
  const seen = element => element.checkVisibility(
      {opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true});
"""

DRAWN = (
    """
() => {"""
    + SEEN
    + """
  if (document.readyState !== 'complete' || document.fonts.status !== 'loaded') return false;
  const figures = [...document.querySelectorAll('.plotly-graph-div, .js-plotly-plot')].filter(seen);

  const painted = canvas => {
    if (!canvas.width || !canvas.height) return false;
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [64, 64];
    const pen = copy.getContext('2d', {willReadFrequently: true});
    pen.drawImage(canvas, 0, 0, 64, 64);
    return pen.getImageData(0, 0, 64, 64).data.some((value, index) => index % 4 === 3 && value > 0);
  };
  const drawn = figure => {
    const layout = figure._fullLayout;
    if (!figure._fullData || !layout || figure._transitioning) return false;
    const follows = figure._context.responsive && layout.autosize;
    if (follows && Math.abs(layout.width - figure.clientWidth) > 1) return false;  // the window has just been resized
    const scenes = (layout._subplots?.gl3d ?? []).map(name => layout[name]._scene);
    for (const scene of scenes) {
      if (!scene?.glplot) return false;
      scene.glplot.redraw();  // a WebGL canvas can only be read within the frame that drew it
      if (!painted(scene.glplot.canvas)) return false;
    }
    const regl = [...figure.querySelectorAll('.gl-canvas-context')].filter(seen);
    if (regl.length && layout._has('regl') && !regl.some(painted)) return false;
    return scenes.length > 0 || [...figure.querySelectorAll('.main-svg')].some(
        svg => [...svg.querySelectorAll('path, text, image, rect')].some(part => part.getBoundingClientRect().width));
  };
  if (!figures.every(drawn)) return false;

  const boxes = [...document.querySelectorAll('svg text, h1, h2, h3, p, button, select, table')].map(element => {
    const box = element.getBoundingClientRect();
    return [box.x, box.y, box.width, box.height].map(Math.round).join();
  }).join(';') + `;${innerWidth}`;
  const still = window.__boxes === boxes ? (window.__still ?? 0) + 1 : 0;
  [window.__boxes, window.__still] = [boxes, still];
  return still >= 3;
}"""
)

VISIBLE_TEXT = (
    """
() => {"""
    + SEEN
    + """
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let [text, block] = ['', null];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (parent.closest('script, style, noscript, template') || !seen(parent)) continue;
    const own = parent.closest('tspan.line, text, p, li, td, th, pre, h1, h2, h3, h4, button, option, div');
    text += (own === block ? '' : ' ') + node.data;
    block = own;
  }
  return text;
}"""
)

PROBLEMS = (
    """
() => {"""
    + SEEN
    + """
  const SLACK = 1, OVERLAP = 2;
  const found = [];
  const pixels = value => `${Math.round(value)} px`;
  const short = text => {
    const line = text.replace(/\\s+/g, ' ').trim();
    return line.length > 60 ? `${line.slice(0, 59)}…` : line;
  };
  const hull = corners => {
    const [xs, ys] = [corners.map(c => c.x), corners.map(c => c.y)];
    return {left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys)};
  };
  const corners = box => [
    {x: box.left, y: box.top}, {x: box.right, y: box.top},
    {x: box.right, y: box.bottom}, {x: box.left, y: box.bottom},
  ];

  // A visible thing: where it is (corners, in case it is turned), and whom it belongs to.
  const things = [];
  const add = (kind, text, quad, element, block) => {
    const box = hull(quad);
    if (box.right - box.left < 0.5 || box.bottom - box.top < 0.5) return;
    things.push({
      kind, quad, box, element, block, name: text ? `${kind} "${short(text)}"` : kind,
      figure: element.closest('.js-plotly-plot'),
    });
  };

  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth + SLACK)
    found.push(`The page is ${pixels(root.scrollWidth - root.clientWidth)} wider than its window.`);

  // Text of figures, line by line.
  const turned = element => {
    const [box, matrix] = [element.getBBox(), element.getScreenCTM()];
    return corners({left: box.x, right: box.x + box.width, top: box.y, bottom: box.y + box.height})
        .map(corner => new DOMPoint(corner.x, corner.y).matrixTransform(matrix));
  };
  const menuOf = text =>  // the arrow of a closed list lies on its button
      text.matches('.updatemenu-header-arrow') && text.parentElement.querySelector('.updatemenu-header');
  for (const text of document.querySelectorAll('svg text')) {
    if (text.closest('.hoverlayer, .modebar') || !text.textContent.trim() || !seen(text)) continue;
    const lines = [...text.querySelectorAll('tspan.line')];
    for (const line of lines.length ? lines : [text])
      if (line.textContent.trim()) add('text', line.textContent, turned(line), line, menuOf(text) || text);
  }
  for (const button of document.querySelectorAll('.updatemenu-button, .updatemenu-header'))
    if (seen(button)) add('button', button.textContent, corners(button.getBoundingClientRect()), button, button);
  for (const bar of document.querySelectorAll('.colorbar .cbfills'))
    if (seen(bar)) add('colour bar', '', corners(bar.getBoundingClientRect()), bar, bar);

  // HTML text, line by line, and controls.
  const blockOf = element => {
    while (element.parentElement && /^(inline|contents)$/.test(getComputedStyle(element).display))
      element = element.parentElement;
    return element;
  };
  // What a container hides cuts; what it scrolls is out of sight, and no problem.
  const clipped = (box, element) => {
    const shown = {left: box.left, right: box.right, top: box.top, bottom: box.bottom};
    for (let outer = element; outer && outer !== document.body && outer !== root; outer = outer.parentElement) {
      if (outer instanceof SVGElement) continue;
      const style = getComputedStyle(outer);
      if (style.overflowX === 'visible' && style.overflowY === 'visible') continue;
      const rim = outer.getBoundingClientRect();
      for (const [axis, low, high] of [['overflowX', 'left', 'right'], ['overflowY', 'top', 'bottom']]) {
        const over = Math.max(rim[low] - shown[low], shown[high] - rim[high]);
        const ellipsis = axis === 'overflowX' && style.textOverflow === 'ellipsis';
        if (/hidden|clip/.test(style[axis]) && !ellipsis && over > SLACK) return {cut: over, shown};
        if (style[axis] !== 'visible') {
          shown[low] = Math.max(shown[low], rim[low]);
          shown[high] = Math.min(shown[high], rim[high]);
        }
      }
      if (shown.left >= shown.right || shown.top >= shown.bottom) return {cut: 0, shown: null};
    }
    return {cut: 0, shown};
  };
  const place = (kind, text, box, element, block) => {
    const {cut, shown} = clipped(box, element);
    if (cut) found.push(`The ${kind} "${short(text)}" is cut by what holds it, by ${pixels(cut)}.`);
    else if (shown) add(kind, text, corners(shown), element, block);
  };
  const pen = document.createElement('canvas').getContext('2d');
  for (const control of document.querySelectorAll('button, select, input, textarea, [role=button]')) {
    if (control.closest('svg, .modebar') || !seen(control)) continue;
    const box = control.getBoundingClientRect();
    const text = control instanceof HTMLSelectElement ? control.selectedOptions[0]?.text ?? ''
        : control.innerText || control.value || control.getAttribute('aria-label') || '';
    place(control.tagName.toLowerCase(), text, box, control, control);
    if (control instanceof HTMLSelectElement && !control.multiple && control.size < 2) {
      const style = getComputedStyle(control);
      pen.font = style.font;
      const room = control.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
      const over = pen.measureText(text).width - room;
      if (over > OVERLAP && style.textOverflow !== 'ellipsis')
        found.push(`The chosen option "${short(text)}" is cut by its select, by ${pixels(over)}.`);
    }
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest('svg, script, style, noscript, template, select, textarea, .modebar')
        || !seen(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const line of range.getClientRects()) place('text', node.data, line, parent, blockOf(parent));
  }

  // Cut by the window, by the page's top, or by the figure.
  for (const thing of things) {
    const {box} = thing;
    const rims = [['window', {left: 0, right: root.clientWidth, top: -scrollY, bottom: Infinity}]];
    if (thing.figure) rims.unshift(['figure', thing.figure.getBoundingClientRect()]);
    for (const [rim, edge] of rims) {
      const over = {
        left: edge.left - box.left, right: box.right - edge.right,
        top: edge.top - box.top, bottom: box.bottom - edge.bottom,
      };
      const side = Object.keys(over).reduce((worst, next) => over[next] > over[worst] ? next : worst);
      if (over[side] <= SLACK) continue;
      found.push(`The ${thing.name} is cut at the ${side} edge of its ${rim}, by ${pixels(over[side])}.`);
      break;
    }
  }

  // Two things over each other: their corners overlap along every direction of their sides.
  const overlap = (one, other) => {
    let least = Infinity;
    for (const quad of [one, other]) {
      for (const [from, to] of [[quad[0], quad[1]], [quad[1], quad[2]]]) {
        const length = Math.hypot(to.x - from.x, to.y - from.y);
        const project = corner => (corner.x * (to.x - from.x) + corner.y * (to.y - from.y)) / length;
        const [a, b] = [one.map(project), other.map(project)];
        least = Math.min(least, Math.max(...a) - Math.min(...b), Math.max(...b) - Math.min(...a));
      }
    }
    return least;
  };
  things.sort((one, other) => one.box.top - other.box.top);
  things.forEach((one, index) => {
    for (let next = index + 1; next < things.length && things[next].box.top < one.box.bottom - OVERLAP; next++) {
      const other = things[next];
      if (other.box.left > one.box.right - OVERLAP || one.box.left > other.box.right - OVERLAP) continue;
      if (one.block === other.block || one.element.contains(other.element) || other.element.contains(one.element))
        continue;
      const depth = overlap(one.quad, other.quad);
      if (depth > OVERLAP) found.push(`The ${one.name} and the ${other.name} overlap by ${pixels(depth)}.`);
    }
  });
  return [...new Set(found)];
}"""
)
