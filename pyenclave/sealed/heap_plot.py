"""
The course of a sealed heap as an SVG that needs nothing to be made and any browser to be seen.

Three panels share the axis of time: bytes that were plaintext under the limit, bytes that were
opened and sealed a second, and faults a second. Colours follow the reader's light or dark setting;
dashes tell the lines apart as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from pyenclave.sealed._size import size_text

if TYPE_CHECKING:
    from pyenclave.sealed.heap_stats import HeapStats

__all__ = ["svg"]

_WIDTH: Final = 900
_LEFT: Final = 110
_RIGHT: Final = 870
_TOP: Final = 70
_PANEL: Final = 130
_GAP: Final = 44
_PAGE: Final = 4096

_STYLE: Final = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.title { font-size: 17px; font-weight: 600; }
.dim { fill: #59636e; font-size: 11.5px; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
.a, .b, .limit { fill: none; stroke-width: 1.8; }
.a { stroke: #0969da; }
.b { stroke: #bc4c00; stroke-dasharray: 5 3; }
.limit { stroke: #59636e; stroke-width: 1.2; stroke-dasharray: 2 3; }
.area { fill: #0969da; fill-opacity: 0.15; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; }
.page { fill: #0d1117; }
.dim { fill: #9198a1; }
.grid { stroke: #30363d; }
.a { stroke: #4493f8; }
.b { stroke: #f0883e; }
.limit { stroke: #9198a1; }
.area { fill: #4493f8; }
}
"""

_Line = tuple[str, str, list[float]]  # class, name, values


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{shown}>{escape(text)}</text>'


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _step(top: float) -> float:
    """Return a round distance of which two to five make *top*."""
    power = 10.0 ** math.floor(math.log10(top / 2))
    return next(k * power for k in (5, 2, 1) if k * power <= top / 2)


def _panel(
    y: float, title: str, times: list[float], lines: list[_Line], *, size: bool, limit: float = 0
) -> list[str]:
    """Draw one panel whose top is at *y*."""
    top = max([1.0, limit, *(value for _, _, values in lines for value in values)]) * 1.08
    end = max(times[-1], 1e-9)

    def at(seconds: float, value: float) -> tuple[float, float]:
        return (
            _LEFT + seconds / end * (_RIGHT - _LEFT),
            y + _PANEL - value / top * _PANEL,
        )

    parts = [_text(_LEFT, y - 8, title)]
    marks = [top / 1.08 * part / 2 for part in range(3)]
    for mark in marks:
        _, height = at(0, mark)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
        label = size_text(mark) if size else _count(mark)
        parts.append(_text(_LEFT - 8, height + 4, label, "dim", "end"))
    if limit:
        _, height = at(0, limit)
        parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{_RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
    x = _RIGHT
    for kind, name, values in reversed(lines):
        points = [at(*pair) for pair in zip(times, values, strict=True)]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        if len(lines) == 1:
            parts.append(
                f'<path class="area" d="{path}L{points[-1][0]:.1f} {y + _PANEL}'
                f'L{points[0][0]:.1f} {y + _PANEL}Z"/>'
            )
        parts.append(f'<path class="{kind}" d="{path}"/>')
        if len(lines) > 1:
            parts.append(_text(x, y - 8, name, "dim", "end"))
            x -= 8 * len(name) + 10
            parts.append(f'<path class="{kind}" d="M{x} {y - 12}h22"/>')
            x -= 16
    return parts


def _rates(times: list[float], counts: Sequence[int]) -> list[float]:
    """Return what was counted a second up to each time."""
    found = [0.0]
    for i in range(1, len(times)):
        found.append((counts[i] - counts[i - 1]) / max(times[i] - times[i - 1], 1e-9))
    if len(found) > 1:
        found[0] = found[1]
    return found


def svg(samples: Sequence[tuple[float, HeapStats]]) -> str:
    """
    Draw the course of a heap.

    Args:
        samples: Seconds since the beginning, and the figures then.

    Returns:
        The SVG document.

    Raises:
        ValueError: There are fewer than two samples.

    """
    if len(samples) < 2:
        raise ValueError(f"samples: expected two at least, found {len(samples)}")
    times = [seconds - samples[0][0] for seconds, _ in samples]
    stats = [found for _, found in samples]
    first, last = stats[0], stats[-1]
    height = _TOP + 3 * (_PANEL + _GAP) + 30
    said = (
        f"{size_text((last.pages_in - first.pages_in) * _PAGE)} opened, "
        f"{size_text((last.pages_out - first.pages_out) * _PAGE)} sealed and "
        f"{last.faults - first.faults:,} faults in {times[-1]:.1f} s; "
        f"at most {size_text(last.resident_peak)} plaintext of {size_text(last.capacity)}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="t d">',
        '<title id="t">The course of a sealed heap</title>',
        f'<desc id="d">{escape(said)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        _text(20, 30, "Sealed heap", "title"),
        _text(120, 30, said, "dim"),
    ]
    y = float(_TOP)
    limit = last.resident_limit
    parts += _panel(
        y,
        f"plaintext, of at most {size_text(limit)}",
        times,
        [("a", "plaintext", [float(s.resident_bytes) for s in stats])],
        size=True,
        limit=limit,
    )
    y += _PANEL + _GAP
    parts += _panel(
        y,
        "bytes a second",
        times,
        [
            ("a", "opened", [r * _PAGE for r in _rates(times, [s.pages_in for s in stats])]),
            ("b", "sealed", [r * _PAGE for r in _rates(times, [s.pages_out for s in stats])]),
        ],
        size=True,
    )
    y += _PANEL + _GAP
    parts += _panel(
        y,
        "faults a second",
        times,
        [("a", "faults", _rates(times, [s.faults for s in stats]))],
        size=False,
    )
    bottom = y + _PANEL + 18
    step = _step(max(times[-1], 1e-3))
    for n in range(int(times[-1] / step) + 1):
        x = _LEFT + n * step / max(times[-1], 1e-9) * (_RIGHT - _LEFT)
        parts.append(_text(x, bottom, f"{n * step:g} s", "dim", "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"
