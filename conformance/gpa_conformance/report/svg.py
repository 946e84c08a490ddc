"""Small charts as inline SVG: axes, lines, bars and points, coloured by the page's style sheet.

The charts carry class names and no colours, so that the page's light and dark themes, and a printer, each get theirs.
They are drawn in a box of 480 units and scale with their container; the text is large enough at the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 480
RIGHT, TOP, BOTTOM = 14, 16, 46


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart. low, high: the values at its ends, low < high; for log both are above 0.

    bare: without ticks, for rows that have a name each.
    """

    label: str
    low: float
    high: float
    log: bool = False
    bare: bool = False

    @classmethod
    def decades(cls, label: str, values: Sequence[float], least: float, most: float) -> Axis:
        """A logarithmic axis from whole decade to whole decade around `values` within [least, most]."""
        inside = [min(max(value, least), most) for value in values if math.isfinite(value)] or [least, least * 10]
        low, high = math.floor(math.log10(min(inside)) + 1e-9), math.ceil(math.log10(max(inside)) - 1e-9)
        return cls(label, 10.0**low, 10.0 ** max(high, low + 1), log=True)

    def fraction(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high end, clamped to both."""
        if self.log:
            part = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """At most seven round values and their labels."""
        if self.bare:
            return []
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, math.ceil((last - first) / 6))
            return [(10.0**power, _power(power)) for power in range(first, last + 1, step)]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        values = [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(value, f"{value:g}") for value in values]


@dataclass(slots=True)
class Chart:
    """A chart that is being drawn. title, description: for a screen reader; the marks may carry hover text.

    left: units left of the y axis, for its labels.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    height: int = 270
    left: int = 62
    marks: list[str] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], style: str, hover: str = "") -> None:
        """A line through the finite points; a point that is not finite leaves a gap."""
        run: list[str] = []
        pieces: list[list[str]] = [run]
        for x, y in points:
            if math.isfinite(y):
                run.append(f"{self._x(x):.1f},{self._y(y):.1f}")
            elif run:
                run = []
                pieces.append(run)
        for piece in filter(None, pieces):
            if len(piece) == 1:
                x, y = piece[0].split(",")
                self.marks.append(f'<circle class="dot {style}" cx="{x}" cy="{y}" r="2.5">{_hover(hover)}</circle>')
            else:
                self.marks.append(
                    f'<polyline class="line {style}" points="{" ".join(piece)}">{_hover(hover)}</polyline>'
                )

    def point(self, x: float, y: float, style: str, hover: str = "", radius: float = 3) -> None:
        """One dot."""
        place = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="{radius:g}"'
        self.marks.append(f'<circle class="dot {style}" {place}>{_hover(hover)}</circle>')

    def rug(self, values: Sequence[float], style: str, hover: str) -> None:
        """A short stroke on the x axis for every value."""
        floor = self.height - BOTTOM
        strokes = "".join(f"M{self._x(value):.1f} {floor}v-9" for value in values)
        if strokes:
            self.marks.append(f'<path class="rug {style}" d="{strokes}">{_hover(hover)}</path>')

    def bar(self, start: float, end: float, value: float, style: str, hover: str = "", base: float = 0.0) -> None:
        """A bar over [start, end) of the x axis, from `base` to `value`."""
        left, right, top, floor = self._x(start), self._x(end), self._y(value), self._y(base)
        box = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" height="{floor - top:.1f}"'
        self.marks.append(f'<rect class="bar {style}" {box}>{_hover(hover)}</rect>')

    def level(self, y: float, label: str) -> None:
        """A horizontal line across the chart, such as a limit."""
        height, end = self._y(y), WIDTH - RIGHT
        text = height - 5 if height > TOP + 16 else height + 14
        self.marks.append(f'<line class="limit" x1="{self.left}" x2="{end}" y1="{height:.1f}" y2="{height:.1f}"/>')
        self.marks.append(f'<text class="limit" x="{end - 4}" y="{text:.1f}" text-anchor="end">{escape(label)}</text>')

    def upright(self, x: float, label: str) -> None:
        """A vertical line across the chart, such as a limit."""
        place, floor = self._x(x), self.height - BOTTOM
        anchor, text = ("end", place - 5) if place > WIDTH / 2 else ("start", place + 5)
        self.marks.append(f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{floor}"/>')
        self.marks.append(
            f'<text class="limit" x="{text:.1f}" y="{TOP + 12}" text-anchor="{anchor}">{escape(label)}</text>'
        )

    def row_name(self, y: float, text: str) -> None:
        """A name left of the y axis."""
        place = f'x="{self.left - 7}" y="{self._y(y) + 4.5:.1f}" text-anchor="end"'
        self.marks.append(f"<text {place}>{escape(text)}</text>")

    def render(self, name: str) -> str:
        """The SVG element; `name` makes its ids unique in the page."""
        head = f'<svg class="chart" viewBox="0 0 {WIDTH} {self.height}" role="img" aria-labelledby="{name}-t {name}-d">'
        words = (
            f'<title id="{name}-t">{escape(self.title)}</title><desc id="{name}-d">{escape(self.description)}</desc>'
        )
        return head + words + self._axes() + "".join(self.marks) + "</svg>"

    def _axes(self) -> str:
        floor, end = self.height - BOTTOM, WIDTH - RIGHT
        parts = []
        for value, label in self.y.ticks():
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 7}" y="{y + 4.5:.1f}" text-anchor="end">{label}</text>')
        for value, label in self.x.ticks():
            x = self._x(value)
            parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            anchor = "end" if x > end - 12 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="{anchor}">{label}</text>')
        middle = (TOP + floor) / 2
        parts.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{floor}" y2="{floor}"/>')
        x_place = f'x="{(self.left + end) / 2}" y="{self.height - 8}"'
        parts.append(f'<text class="label" {x_place} text-anchor="middle">{escape(self.x.label)}</text>')
        turned = f'transform="translate(13 {middle:.0f}) rotate(-90)"'
        parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(self.y.label)}</text>')
        return "".join(parts)

    def _x(self, value: float) -> float:
        return self.left + self.x.fraction(value) * (WIDTH - self.left - RIGHT)

    def _y(self, value: float) -> float:
        return self.height - BOTTOM - self.y.fraction(value) * (self.height - TOP - BOTTOM)


def _hover(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _power(power: int) -> str:
    if -2 <= power <= 3:
        return f"{10.0**power:g}"
    digits = str(power).replace("-", "−")
    return f'10<tspan class="power" dy="-5">{digits}</tspan>'


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
