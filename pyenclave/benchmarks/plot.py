"""
The picture of a run: an SVG that needs nothing to be made and any browser to be seen.

Each row is a bar from 1 (as fast as its peer) on a logarithmic axis; a diamond is the goal, a thin
line the middle half of the rounds, a hollow circle the ratio of another run. Colours follow the
reader's light or dark setting and are never the only sign: what is below its goal says so. The
protections that were probed for a launch are the title of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final
from xml.sax.saxutils import escape

from pyenclave.benchmarks.goals import judge
from pyenclave.benchmarks.kept import Run
from pyenclave.benchmarks.rows import Row

__all__ = ["amount", "cores_of", "svg"]

_WIDTH: Final = 1000
_LEFT: Final = 330  # where the axis begins
_RIGHT: Final = 720  # and where it ends; figures are beside it
_TOP: Final = 92
_ROW: Final = 36
_BAR: Final = 14
_LABEL: Final = 46  # characters that fit to the left of the axis
_TICKS: Final = (1, 2, 5)
_DECADE: Final = 130  # as wide as all three labels are legible

_STYLE: Final = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.title { font-size: 18px; font-weight: 600; }
.name { font-weight: 600; }
.plain { font-weight: 400; }
.dim { fill: #59636e; font-size: 11.5px; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
.one { stroke: #59636e; stroke-width: 1.5; }
.met { fill: #1a7f37; }
.none { fill: #0969da; }
.below { fill: #bc4c00; }
.goal { fill: #1f2328; stroke: #ffffff; stroke-width: 1.2; }
.range { stroke: #1f2328; stroke-width: 1.5; }
.then { fill: none; stroke: #8250df; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; }
.page { fill: #0d1117; }
.dim { fill: #9198a1; }
.grid { stroke: #30363d; }
.one { stroke: #9198a1; }
.met { fill: #3fb950; }
.none { fill: #4493f8; }
.below { fill: #f0883e; }
.goal { fill: #f0f6fc; stroke: #0d1117; }
.range { stroke: #f0f6fc; }
.then { stroke: #ab7df8; }
}
"""


def _clean(text: str, most: int = 200) -> str:
    """Make *text* safe inside XML; what is long is cut."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return escape(plain if len(plain) <= most else plain[: most - 1] + "…", {'"': "&quot;"})


def amount(value: float) -> str:
    """Return a figure as people read it."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def cores_of(row: Row) -> str:
    """Return where the two sides of a row ran, if it crosses processors."""
    if "cores" not in row:
        return ""
    return " (one core)" if row["cores"] == "same" else f" ({row['cores']} cores)"


def _unit(unit: str) -> str:
    """Return a unit as a picture shows it; tables and JSON have ``us``."""
    return "µs" if unit == "us" else unit


def _protections(bits: Mapping[str, bool | int]) -> str:
    """Say which protections were probed, and whether each held or its level."""
    words = {True: "yes", False: "no"}
    told = (f"{name} {words[bit] if isinstance(bit, bool) else bit}" for name, bit in bits.items())
    return f"probed protections: {', '.join(told) or 'none'}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{shown}>{text}</text>'


def _axis(rows: list[Row], others: list[float], wide: bool) -> tuple[float, float]:
    """Return the powers of ten (of a third each) between which every figure lies."""
    values = [1.0, *others]
    for row in rows:
        if "ratio" in row:
            verdict = judge(row, wide=wide)
            values += [row["ratio"], *row.get("ratio_spread", ())]
            values += [verdict.goal] if verdict else []
    low = math.floor(math.log10(min(values) * 0.95) * 3) / 3
    high = math.ceil(math.log10(max(values) * 1.05) * 3) / 3
    return low, max(high, low + 1 / 3)


def _grid(low: float, high: float, at: Callable[[float], float], bottom: float) -> list[str]:
    parts = []
    labelled = _TICKS if at(10) - at(1) >= _DECADE else (1,)
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in _TICKS:
            value = digit * 10.0**power
            if not low - 1e-9 <= math.log10(value) <= high + 1e-9:
                continue
            x = at(value)
            kind = "one" if value == 1 else "grid"
            parts.append(
                f'<line class="{kind}" x1="{x:.1f}" y1="{_TOP - 6}" '
                f'x2="{x:.1f}" y2="{bottom:.1f}"/>'
            )
            if digit in labelled:
                parts.append(_text(x, _TOP - 12, f"{value:g}×", "dim", "middle"))
    return parts


def _bar(row: Row, y: float, at: Callable[[float], float], wide: bool) -> list[str]:
    """Draw one measured row whose middle is at *y*."""
    ratio = row["ratio"]
    verdict = judge(row, wide=wide)
    met = verdict.met if verdict else None
    kind = {True: "met", False: "below", None: "none"}[met]
    start, end = sorted((at(1), at(ratio)))
    parts = [
        f'<rect class="{kind}" x="{start:.1f}" y="{y - _BAR / 2:.1f}" '
        f'width="{max(end - start, 1.5):.1f}" height="{_BAR}" rx="2"/>'
    ]
    if "ratio_spread" in row:
        first, last = (at(value) for value in row["ratio_spread"])
        parts.append(
            f'<line class="range" x1="{first:.1f}" y1="{y:.1f}" x2="{last:.1f}" y2="{y:.1f}"/>'
        )
    told = f"{_figure(ratio)}×"
    if verdict:
        x = at(verdict.goal)
        parts.append(
            f'<path class="goal" d="M{x:.1f} {y - 7:.1f}l5 7l-5 7l-5 -7z">'
            f"<title>goal {_figure(verdict.goal)}×</title></path>"
        )
        word = {True: "goal met", False: "below its goal", None: "goal of another class"}[met]
        told += f'<tspan class="plain" dx="8">{word}: {_figure(verdict.goal)}×</tspan>'
    parts.append(_text(_RIGHT + 14, y - 2, told, "name"))
    figures = f"{amount(row['value'])} against {amount(row['peer_value'])} {_unit(row['unit'])}"
    parts.append(_text(_RIGHT + 14, y + 13, _clean(figures), "dim"))
    return parts


def _legend(y: float, *, then: str) -> list[str]:
    parts = []
    x = 20.0
    for kind, text in (("met", "goal met"), ("below", "below its goal"), ("none", "no goal here")):
        parts.append(f'<rect class="{kind}" x="{x}" y="{y - 10}" width="14" height="12" rx="2"/>')
        parts.append(_text(x + 20, y, text, "dim"))
        x += 36 + 6 * len(text)
    parts.append(f'<path class="goal" d="M{x + 6} {y - 11}l5 7l-5 7l-5 -7z"/>')
    parts.append(_text(x + 18, y, "goal", "dim"))
    x += 62
    parts.append(f'<line class="range" x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"/>')
    parts.append(_text(x + 28, y, "middle half of the rounds", "dim"))
    x += 196
    if then:
        parts.append(f'<circle class="then" cx="{x + 6}" cy="{y - 4}" r="5"/>')
        parts.append(_text(x + 18, y, _clean(then), "dim"))
    return parts


def svg(run: Run, *, then: Run | None = None) -> str:
    """
    Draw the ratios of a run.

    Args:
        run: The run.
        then: Another, whose ratios are marked.

    Returns:
        The SVG document.
    """
    rows = list(run.results)
    before = {row["name"]: row["ratio"] for row in then.results if "ratio" in row} if then else {}
    shown = [before[row["name"]] for row in rows if row["name"] in before and "ratio" in row]
    low, high = _axis(rows, shown, run.wide)

    def at(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_RIGHT - _LEFT)

    bottom = _TOP + _ROW * len(rows)
    height = bottom + 74
    cpu, cores = run.machine.get("cpu", "unknown CPU"), run.machine.get("cores", "?")
    kernels = run.machine.get("kernels")
    kernel = kernels.get("gcm", "?") if isinstance(kernels, dict) else "?"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="t d">',
        '<title id="t">pyenclave bench: how many times as fast as the usual alternative</title>',
        f'<desc id="d">{_clean("; ".join(_sentence(row) for row in rows), 20_000)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        _text(20, 34, "How many times as fast as the usual alternative", "title"),
        _text(20, 54, "1× is as fast as the peer that is named; further right is better", "dim"),
        *_grid(low, high, at, bottom),
    ]
    for place, row in enumerate(rows):
        y = _TOP + _ROW * place + _ROW / 2
        if "bits" in row:
            parts.append(f"<g><title>{_clean(_protections(row['bits']), 4000)}</title>")
        parts.append(_text(20, y - 2, _clean(row["name"] + cores_of(row), _LABEL), "name"))
        if "ratio" in row:
            parts.append(_text(20, y + 13, _clean("against " + row["peer"], 54), "dim"))
            parts += _bar(row, y, at, run.wide)
            if row["name"] in before:
                parts.append(
                    f'<circle class="then" cx="{at(before[row["name"]]):.1f}" cy="{y:.1f}" r="5">'
                    f"<title>then {_figure(before[row['name']])}×</title></circle>"
                )
        else:
            parts.append(_text(20, y + 13, _clean(_sentence(row, named=False), 54), "dim"))
        if "bits" in row:
            parts.append("</g>")
    marked = f"the run of {then.when[:10] or 'another day'}" if then and before else ""
    parts += _legend(bottom + 28, then=marked)
    caption = f"{cpu}, {cores} cores, {kernel} kernels"
    told = [f"pyenclave {run.version}" if run.version else "", run.when.replace("T", " ")]
    parts.append(_text(20, bottom + 54, _clean("; ".join([caption, *filter(None, told)])), "dim"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sentence(row: Row, *, named: bool = True) -> str:
    """Say a row in words."""
    start = f"{row['name']}: " if named else ""
    if "ratio" in row:
        return f"{start}{_figure(row['ratio'])} times {row['peer']}"
    if "error" in row:
        return f"{start}failed: {row['error']}"
    return f"{start}not measured; absent: {', '.join(row.get('absent', ())) or 'its peer'}"
