"""A tree of coloured lines with a legend and counts, and the same as HTML and SVG."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable

Part = tuple[str, str]  # what a piece of text says, a key of LIGHT; and the text

# OpenDelta's colour scheme on white, and on black. Every colour has a contrast of at least 4.5 to its background.
LIGHT = {
    "name": "#1f2328",
    "type": "#1a7f37",
    "shape": "#0b7285",
    "trainable": "#0550ff",
    "frozen": "#6e7178",
    "collapsed": "#cf222e",
    "delta": "#af00ff",
}
DARK = {
    "name": "#f0f0f0",
    "type": "#4cc35f",
    "shape": "#3fc1d0",
    "trainable": "#79a8ff",
    "frozen": "#8f959d",
    "collapsed": "#ff7b72",
    "delta": "#d070ff",
}
BACKGROUNDS = ("#ffffff", "#1b1d21")
GUIDE = "#a8adb5"


def plain(text: str) -> str:
    """The text with what has no picture of its own as Python writes it: control characters, halves of surrogate pairs.

    It can then be encoded, and be in an XML file.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a tree, and the lines below it."""

    parts: tuple[Part, ...]
    below: tuple[Line, ...] = ()


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A tree, a line that explains its colours, and lines of counts."""

    tree: Line
    legend: tuple[Part, ...]
    counts: tuple[str, ...]


def to_html(drawing: Drawing) -> str:
    """A part of a page, whose branches collapse without a script. It has its own style and loads nothing."""
    counts = "\n".join(map(html.escape, drawing.counts))
    return (
        f'<div class="jdelta"><style>{_css()}</style>\n<ul class="tree">{_item(drawing.tree)}</ul>\n'
        f'<p class="legend">{_spans(drawing.legend)}</p>\n<pre class="counts">{counts}</pre></div>\n'
    )


def to_page(drawing: Drawing, title: str) -> str:
    """`to_html` as a page of its own."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>body {{ margin: 0; {_colours(BACKGROUNDS[0], LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ body {{ {_colours(BACKGROUNDS[1], DARK)} }} }}</style></head>\n"
        f"<body>\n{to_html(drawing)}</body></html>\n"
    )


def to_svg(drawing: Drawing, font_size: float = 13) -> str:
    """A picture on white, of text and lines."""
    plan = laid_out(drawing)
    across, down = 0.602 * font_size, 1.4 * font_size  # of a character, as in most fonts of fixed width
    width, height = (plan.width + 4) * across, (plan.height + 1) * down
    rows = "\n".join(
        f'<text x="{(x + 2) * across:.1f}" y="{(y + 1) * down + font_size / 3:.1f}">'
        + "".join(f'<tspan fill="{LIGHT[kind]}">{html.escape(text)}</tspan>' for kind, text in parts)
        + "</text>"
        for x, y, parts in plan.texts
    )
    guides = "".join(
        f"M{(x1 + 2) * across:.1f} {(y1 + 1) * down:.1f}L{(x2 + 2) * across:.1f} {(y2 + 1) * down:.1f}"
        for x1, y1, x2, y2 in plan.strokes
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">\n<rect width="100%" height="100%" fill="{BACKGROUNDS[0]}"/>\n'
        f'<path d="{guides}" stroke="{GUIDE}" fill="none"/>\n'
        f'<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{font_size:g}" '
        f'xml:space="preserve">\n{rows}\n</g></svg>\n'
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where everything is, in characters from the left and in lines from the top; a line's `y` is its middle.

    Attributes:
      texts: `(x, y, parts)` of each line.
      strokes: `(x1, y1, x2, y2)` of each guide.
      width, height: of it all.
    """

    texts: list[tuple[float, float, tuple[Part, ...]]]
    strokes: list[tuple[float, float, float, float]]
    width: float
    height: float


def laid_out(drawing: Drawing) -> Plan:
    """The place of every line of a drawing: the tree, a gap, the legend, the counts."""
    texts: list[tuple[float, float, tuple[Part, ...]]] = []
    strokes: list[tuple[float, float, float, float]] = []

    def place(line: Line, x: float) -> int:
        y = len(texts)
        texts.append((x, y, line.parts))
        bottom = y
        for child in line.below:
            bottom = place(child, x + 4)
            strokes.append((x + 0.5, bottom, x + 3.5, bottom))
        if line.below:
            strokes.append((x + 0.5, y + 0.5, x + 0.5, bottom))
        return y

    place(drawing.tree, 0)
    rest = [drawing.legend, *((("name", line),) for line in drawing.counts)]
    texts += [(0, y, parts) for y, parts in enumerate(rest, len(texts) + 1)]
    width = max(x + sum(len(text) for _, text in parts) for x, _, parts in texts)
    return Plan(texts, strokes, width, texts[-1][1] + 1)


def _item(line: Line) -> str:
    if not line.below:
        return f"<li>{_spans(line.parts)}</li>"
    inside = "\n".join(map(_item, line.below))
    return f"<li><details open><summary>{_spans(line.parts)}</summary>\n<ul>{inside}</ul></details></li>"


def _spans(parts: Iterable[Part]) -> str:
    return "".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in parts)


def _colours(background: str, palette: dict[str, str]) -> str:
    variables = " ".join(f"--{kind}: {colour};" for kind, colour in palette.items())
    return f"background: {background}; color: {palette['name']}; --background: {background}; {variables}"


def _css() -> str:
    """All rules are of `.jdelta`, so that a notebook keeps its own look."""
    return f"""
.jdelta {{ {_colours(BACKGROUNDS[0], LIGHT)} padding: 1em; overflow-x: auto;
  font: 13px/1.5 "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
@media (prefers-color-scheme: dark) {{ .jdelta {{ {_colours(BACKGROUNDS[1], DARK)} }} }}
.jdelta ul {{ list-style: none; margin: 0; padding: 0; }}
.jdelta ul ul {{ padding-left: 2em; }}
.jdelta li {{ position: relative; margin: 0; }}
.jdelta span {{ white-space: pre; }}
.jdelta ul ul > li::before {{ content: ""; position: absolute; left: -1.6em; top: 0; width: 1.3em; height: 0.75em;
  border: solid {GUIDE}; border-width: 0 0 1px 1px; }}
.jdelta ul ul > li:not(:last-child)::after {{ content: ""; position: absolute; left: -1.6em; top: 0; bottom: 0;
  border-left: 1px solid {GUIDE}; }}
.jdelta summary {{ cursor: pointer; list-style: none; }}
.jdelta summary::-webkit-details-marker {{ display: none; }}
.jdelta ul ul summary::before {{ content: "▾"; position: absolute; left: -0.85em; color: {GUIDE};
  background: var(--background); }}
.jdelta details:not([open]) > summary::before {{ content: "▸"; color: inherit; }}
.jdelta details:not([open]) > summary::after {{ content: " …"; }}
.jdelta summary:hover {{ text-decoration: underline; }}
.jdelta p, .jdelta pre {{ margin: 1em 0 0; padding: 0; font: inherit; color: inherit; background: none; }}
{"".join(f".jdelta .{kind} {{ color: var(--{kind}); }} " for kind in LIGHT)}
"""
