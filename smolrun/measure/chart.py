"""Small pictures as SVG text: groups of bars, curves over time. Nothing is drawn that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 720, 170, 60  # pixels: the picture, its margins
CURVES, BAR, GAP = 170, 16, 12  # heights: a panel of curves, a bar, the space between two groups
HEAD, FOOT = 46, 40  # of a panel: its title and legend; its axis
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#be123c", "#0e7490", "#a16207", "#4b5563")


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, in groups: [(name of the group, name of the bar -> value)]."""

    title: str
    groups: Sequence[tuple[str, Mapping[str, float]]]

    @property
    def names(self) -> list[str]:
        """What the legend explains."""
        return list(dict.fromkeys(name for _, bars in self.groups for name in bars))

    def draw(self, colours: Mapping[str, str], top: float) -> tuple[list[str], float]:
        """Elements, and the height they take."""
        most = max(value for _, bars in self.groups for value in bars.values())
        parts, y = [], top
        for group, bars in self.groups:
            parts.append(_text(LEFT - 8, y + BAR * len(bars) / 2 + 4, group, anchor="end"))
            for name, value in bars.items():
                length = value * (WIDTH - LEFT - RIGHT) / most
                shape = f'x="{LEFT}" y="{y:.0f}" width="{length:.1f}" height="{BAR - 2}"'
                parts.append(f'<rect {shape} fill="{colours[name]}"/>')
                parts.append(_text(LEFT + length + 5, y + 11, f"{value:,.{1 if value < 1000 else 0}f}", size=11))
                y += BAR
            y += GAP
        return parts, y - top


@dataclass(frozen=True)
class Curves:
    """Values over seconds: name of the curve -> [(seconds, value)]."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def names(self) -> list[str]:
        """What the legend explains."""
        return [*self.curves]

    def draw(self, colours: Mapping[str, str], top: float) -> tuple[list[str], float]:
        """Elements, and the height they take. The axis of values begins at 0."""
        points = [point for curve in self.curves.values() for point in curve]
        end, high = max(at for at, _ in points), 1.05 * max(value for _, value in points)
        across, up, bottom = (WIDTH - LEFT - RIGHT) / max(end, 1e-9), CURVES / max(high, 1e-9), top + CURVES
        parts = []
        for share in (0, 0.25, 0.5, 0.75, 1):
            y, value, at = bottom - CURVES * share, high * share, end * share
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{value:,.{0 if high >= 20 else 2}f}", size=11, anchor="end"))
            parts.append(_text(LEFT + at * across, bottom + 16, f"{at:,.0f} s", size=11, anchor="middle"))
        for name, curve in self.curves.items():
            path = " ".join(f"{LEFT + at * across:.1f},{bottom - value * up:.1f}" for at, value in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
        return parts, CURVES


Panel = Bars | Curves


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The panels one below the other; a name has one colour in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.names))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    top, parts = 34.0, [_text(WIDTH / 2, 22, title, size=15, anchor="middle", bold=True)]
    for panel in panels:
        parts.append(_text(LEFT, top + 16, panel.title, bold=True))
        x = LEFT
        for name in panel.names:
            parts.append(f'<rect x="{x}" y="{top + 25:.0f}" width="10" height="10" fill="{colours[name]}"/>')
            parts.append(_text(x + 15, top + 34, name))
            x += 35 + 7 * len(name)
        drawn, height = panel.draw(colours, top + HEAD)
        parts += drawn
        top += HEAD + height + FOOT
    size = f'viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}" height="{top:.0f}"'
    font = 'font-family="system-ui, sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{_ground(top)}{"".join(parts)}</svg>'


def _ground(height: float) -> str:
    return f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>'


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
