"""Charts as inline SVG: lines, bars, a stacked bar. Colours are classes (``c0`` to ``c7``) that the
page's style sheet defines, so that one drawing works in light and dark mode. Every mark has a
``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """A series. ``colour``: its number; ``dashed``: held-out data; ``errors``: one standard error
    per point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    errors: Sequence[float | None] = ()


def number(value: float) -> str:
    """Format a number briefly, for an axis or a hover text."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scaled = value / (1e3 if name == "k" else unit)
            return f"{scaled:.3g}{name}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 0.001 else f"{value:.1e}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    low: float | None = None,
    high: float | None = None,
    diagonal: bool = False,
) -> str:
    """Draw ``series`` with a legend; a sentence if there are no points. ``low``, ``high``: ends of
    the y axis.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return '<p class="none">no data yet</p>'
    xs = [p[0] for s in drawn for p in s.points]
    ys = [p[1] for s in drawn for p in s.points]
    left, right = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
    bottom = min(ys) if low is None else low
    top = max(ys) if high is None else high
    if not top > bottom:
        top = bottom + (abs(bottom) or 1.0)
    if low is None and bottom != 0:
        bottom -= 0.05 * (top - bottom)
    if high is None:
        top += 0.05 * (top - bottom)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point[1] - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
        )

    out = [_frame(bottom, top, x, y)]
    for value in ticks(left, right):
        place = at((value, bottom))[0]
        out.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{number(value)}</text>'
        )
    if diagonal:
        (x1, y1), (x2, y2) = at((left, left)), at((right, right))
        out.append(f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for s in drawn:
        out.append(_line(s, [at(p) for p in s.points]))
        out += [
            _error(at((px, py - e)), at((px, py + e)), s.colour)
            for (px, py), e in zip(s.points, s.errors, strict=False)
            if e is not None
        ]
    return _svg(out, f"{y} over {x}") + legend(drawn)


def _line(series: Line, places: Sequence[tuple[float, float]]) -> str:
    colour = f"c{series.colour % COLOURS}"
    dash = " dashed" if series.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    out = f'<polyline class="line {colour}{dash}" points="{path}"/>'
    radius = 2.5 if len(places) <= 40 else 1.2
    for (x, y), (px, py) in zip(places, series.points, strict=True):
        text = html.escape(f"{series.name}: {number(py)} at {number(px)}")
        out += (
            f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{radius}"><title>{text}</title></circle>'
        )
    return out


def _error(low: tuple[float, float], high: tuple[float, float], colour: int) -> str:
    return (
        f'<line class="error c{colour % COLOURS}" x1="{low[0]:.1f}" y1="{low[1]:.1f}" '
        f'x2="{high[0]:.1f}" y2="{high[1]:.1f}"/>'
    )


def _frame(bottom: float, top: float, x: str, y: str) -> str:
    """Draw the grid, ticks of the y axis and both labels."""
    out = ""
    for value in ticks(bottom, top):
        place = HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)
        out += (
            f'<line class="grid" x1="{LEFT}" y1="{place:.1f}" x2="{WIDTH - RIGHT}" '
            f'y2="{place:.1f}"/>'
        )
        out += (
            f'<text class="tick" x="{LEFT - 5}" y="{place + 4:.1f}" '
            f'text-anchor="end">{number(value)}</text>'
        )
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    out += (
        f'<text class="label" x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">{html.escape(x)}</text>'
    )
    out += (
        f'<text class="label" transform="translate(12,{middle}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y)}</text>'
    )
    return out


def bars(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x: str, y: str
) -> str:
    """Draw bars side by side: ``series`` (name, one value per group of ``groups``)."""
    top = max((v for _, values in series for v in values), default=0)
    if not groups or top <= 0:
        return '<p class="none">no data yet</p>'
    top *= 1.05
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    wide = 0.8 * room / len(series)
    out = [_frame(0, top, x, y)]
    every = max(1, math.ceil(len(groups) / 8))
    for i, group in enumerate(groups):
        if i % every == 0:
            out.append(
                f'<text class="tick" x="{LEFT + (i + 0.5) * room:.1f}" '
                f'y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{html.escape(group)}</text>'
            )
        for j, (name, values) in enumerate(series):
            tall = values[i] / top * (HEIGHT - TOP - BOTTOM)
            text = html.escape(f"{name}, {group}: {number(values[i])}")
            out.append(
                f'<rect class="bar c{j % COLOURS}" '
                f'x="{LEFT + i * room + 0.1 * room + j * wide:.1f}" '
                f'y="{HEIGHT - BOTTOM - tall:.1f}" width="{wide:.1f}" '
                f'height="{tall:.1f}"><title>{text}</title></rect>'
            )
    return _svg(out, f"{y} by {x}") + legend(
        [Line(name, [], j) for j, (name, _) in enumerate(series)]
    )


def stacked(rows: Sequence[tuple[str, dict[str, int]]], kinds: Sequence[str]) -> str:
    """Draw a bar for each of ``rows``, in bytes by kind, all on one scale."""
    most = max((sum(parts.values()) for _, parts in rows), default=0)
    if not most:
        return '<p class="none">no data yet</p>'
    tall, gap = 24, 22
    out = []
    for i, (name, parts) in enumerate(rows):
        y = i * (tall + gap) + 16
        out.append(
            f'<text class="label" x="0" y="{y - 4}">{html.escape(name)}: '
            f"{size(sum(parts.values()))}</text>"
        )
        at = 0.0
        for j, kind in enumerate(kinds):
            wide = parts.get(kind, 0) / most * WIDTH
            if wide:
                text = html.escape(f"{name}, {kind}: {size(parts[kind])}")
                out.append(
                    f'<rect class="bar c{j}" x="{at:.1f}" y="{y}" width="{wide:.1f}" '
                    f'height="{tall}"><title>{text}</title></rect>'
                )
            at += wide
    height = len(rows) * (tall + gap) + 4
    return _svg(out, "bytes by kind", height) + legend(
        [Line(kind, [], j) for j, kind in enumerate(kinds)]
    )


def size(value: float) -> str:
    """Format bytes in a readable unit."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def legend(series: Sequence[Line]) -> str:
    """Draw names with their colours; nothing for a single unnamed line."""
    named = [s for s in series if s.name]
    if not named:
        return ""
    items = "".join(
        '<li><span class="key '
        f'c{s.colour % COLOURS}{" dashed" if s.dashed else ""}"></span>{html.escape(s.name)}</li>'
        for s in named
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(parts: Sequence[str], title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
