"""Draw figures as SVG text. Their colours are CSS variables of the page, so that light and dark mode both work."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from condense.names import percent

INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0a0b{k:02x}" for k in range(8))
"""Placeholders that are replaced by colours of the style sheet."""

MARKERS = "osD^vPX*"

Points = tuple[Sequence[float], Sequence[float]]
"""The x and y values of a curve."""


@dataclass
class Canvas:
    """Axes to draw on; ``svg`` is set at the end of the ``with`` block of ``drawing``."""

    axes: Axes
    titles: dict[str, str] = field(default_factory=dict)
    svg: str = ""

    def explain(self, artist: Any, text: str) -> None:
        """Show ``text`` as a tooltip of the artist."""
        name = f"t{len(self.titles)}"
        self.titles[name] = text
        artist.set_gid(name)


@contextmanager
def drawing(name: str, xlabel: str, ylabel: str, size: tuple[float, float] = (4.6, 3.0)) -> Iterator[Canvas]:
    """Create a figure. The same drawing under the same ``name`` always gives the same text."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        canvas = Canvas(figure.add_subplot())
        canvas.axes.set(xlabel=xlabel, ylabel=ylabel)
        canvas.axes.grid(True, axis="y")
        yield canvas
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    canvas.svg = _for_page(file.getvalue(), name, canvas.titles)


def _for_page(svg: str, name: str, titles: Mapping[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    for k, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{k})")
    for group, title in titles.items():
        svg = svg.replace(f'<g id="{group}">', f"<g><title>{html.escape(title)}</title>")
    svg = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", svg)  # ids that all figures share
    svg = re.sub(r'<svg [^>]*?width="([^"]*)pt" [^>]*?viewBox="([^"]*)"[^>]*>', _root, svg, count=1)
    return re.sub(r'font-family: [^;"]*', "font-family: inherit", svg)


def _root(match: re.Match[str]) -> str:
    width, box = match.groups()
    return (
        f'<svg viewBox="{box}" style="max-width: {float(width) / 11:.1f}rem" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true" focusable="false">'
    )


def curves(name: str, lines: Mapping[str, Points], xlabel: str, ylabel: str, *, log: bool = False) -> str:
    """Draw lines, given by label, each with its own colour and marker."""
    with drawing(name, xlabel, ylabel) as canvas:
        for k, (label, (x, y)) in enumerate(lines.items()):
            marker = MARKERS[k % len(MARKERS)] if len(x) <= 20 else ""
            canvas.axes.plot(x, y, label=label, color=SERIES[k % len(SERIES)], marker=marker, markersize=4)
        if log and all(value > 0 for _, y in lines.values() for value in y):
            canvas.axes.set_yscale("log")
            for use in (canvas.axes.yaxis.set_major_formatter, canvas.axes.yaxis.set_minor_formatter):
                use(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(lines) > 1:
            canvas.axes.legend()
    return canvas.svg


def reliability(name: str, bins: Sequence[tuple[float, float, float]]) -> str:
    """Draw accuracy against confidence; the area of a dot grows with the share of the images in its bin."""
    with drawing(name, "confidence", "accuracy", (3.0, 3.0)) as canvas:
        axes = canvas.axes
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
        full = [(share, confidence, accuracy) for share, confidence, accuracy in bins if share > 0]
        axes.plot([c for _, c, _ in full], [a for _, _, a in full], color=SERIES[0], linewidth=1)
        for share, confidence, accuracy in full:
            axes.plot([confidence] * 2, [confidence, accuracy], color=SERIES[1], linewidth=1)
            dot = axes.scatter([confidence], [accuracy], s=12 + 300 * share, color=SERIES[0], alpha=0.75, linewidths=0)
            canvas.explain(dot, f"{share:.1%} of the images: confidence {confidence:.1%}, accuracy {accuracy:.1%}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return canvas.svg


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracies (fractions) of a method at some shares of the data, with and without a teacher."""

    method: str
    taught: bool
    shares: Sequence[float]
    means: Sequence[float]
    stds: Sequence[float | None]


def accuracy_against_share(name: str, curves: Sequence[Curve], ceiling: tuple[str, float] | None) -> str:
    """Draw accuracy against the share of the training images; curves with a teacher are solid, the others dashed."""
    with drawing(name, "share of the training images", "test accuracy, %", (7.2, 4.2)) as canvas:
        axes = canvas.axes
        shares = sorted({share for curve in curves for share in curve.shares})
        axes.set_xscale("log")
        axes.set_xlim(shares[0] / 1.2, shares[-1] * 1.2)
        methods = list(dict.fromkeys(curve.method for curve in curves))
        for curve in curves:
            number = methods.index(curve.method)
            axes.errorbar(
                curve.shares,
                [100 * mean for mean in curve.means],
                [100 * (std or 0.0) for std in curve.stds],
                label=f"{curve.method} + teacher" if curve.taught else curve.method,
                color=SERIES[number % len(SERIES)],
                linestyle="-" if curve.taught else "--",
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                elinewidth=1,
            )
        if ceiling is not None:
            axes.axhline(100 * ceiling[1], color=INK, linewidth=0.8, linestyle=":", label=ceiling[0])
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(ncols=2)
    return canvas.svg


_LIGHT = ("#0b5cad", "#c2410c", "#15803d", "#9333ea", "#a16207", "#be185d", "#0f766e", "#475569")


def standalone(svg: str) -> str:
    """Return a figure as the text of a file of its own, with the colours of the page in light mode."""
    colours = "".join(f"--series-{k}: {colour}; " for k, colour in enumerate(_LIGHT))
    style = (
        f"<style>svg {{ color: #16181c; --faint: #d5d8dc; {colours}font-family: sans-serif; background: #fff }}</style>"
    )
    head, rest = svg.split(">", 1)
    head = head.replace(' aria-hidden="true" focusable="false"', "")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}>{style}{rest}\n'


@dataclass(frozen=True, kw_only=True)
class Point:
    """The accuracy of a set and its number of bytes. Accuracies are fractions."""

    label: str
    method: str
    budget: str
    """The budget in words, such as ``ipc 10``."""
    num_bytes: int
    accuracy: float
    std: float | None
    published: bool = False

    @property
    def says(self) -> str:
        kind = "published" if self.published else "measured"
        return f"{kind}: {self.label}, {self.num_bytes:,} bytes, {percent(self.accuracy, self.std)} %"


RANDOM = "random"
"""The method whose points are drawn as lines, too."""


def accuracy_against_bytes(name: str, points: Sequence[Point], full: tuple[str, float] | None) -> str:
    """Draw accuracy against bytes: measured points filled, published ones hollow, random images and ``full`` as lines.

    A method has one colour and a budget one marker. If all sets of a budget have the same number of bytes, the bytes
    tell nothing more than the budget; then each method has a row of dots.
    """
    sizes: dict[str, set[int]] = {}
    for point in points:
        sizes.setdefault(point.budget, set()).add(point.num_bytes)
    draw = _dots if all(len(of_budget) == 1 for of_budget in sizes.values()) else _scatter
    methods = dict.fromkeys(point.method for point in points if not point.published and point.method != RANDOM)
    colours = {method: SERIES[k % len(SERIES)] for k, method in enumerate(methods)}
    markers = {budget: MARKERS[k % len(MARKERS)] for k, budget in enumerate(sizes)}
    return draw(name, points, full, colours, markers)


def _dots(
    name: str,
    points: Sequence[Point],
    full: tuple[str, float] | None,
    colours: Mapping[str, str],
    markers: Mapping[str, str],
) -> str:
    """Draw one row for each method, with the accuracies from left to right."""
    best: dict[tuple[bool, str], float] = {}
    for point in points:
        row = (point.published, point.method)
        best[row] = max(best.get(row, 0.0), point.accuracy)
    rows = sorted(best, key=lambda row: (not row[0], best[row]))
    with drawing(name, "test accuracy, %", "", (7.2, 1.5 + 0.26 * len(rows))) as canvas:
        axes = canvas.axes
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        for point in points:
            height = rows.index((point.published, point.method))
            if point.std:
                ends = (100 * (point.accuracy - point.std), 100 * (point.accuracy + point.std))
                axes.hlines(height, *ends, color=_colour(point, colours), linewidth=1)
            _mark(canvas, point, (100 * point.accuracy, height), colours, markers)
        for budget in markers:
            drawn = [p.accuracy for p in points if p.method == RANDOM and p.budget == budget and not p.published]
            if drawn:
                axes.axvline(100 * sum(drawn) / len(drawn), color=INK, linewidth=0.8, linestyle="--")
        if full is not None:
            axes.axvline(100 * full[1], color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [method + (", published" if published else "") for published, method in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _legend(axes, points, full, markers)
    return canvas.svg


def _scatter(
    name: str,
    points: Sequence[Point],
    full: tuple[str, float] | None,
    colours: Mapping[str, str],
    markers: Mapping[str, str],
) -> str:
    with drawing(name, "bytes stored", "test accuracy, %", (7.2, 4.6)) as canvas:
        axes = canvas.axes
        axes.set_xscale("log")
        sizes = [point.num_bytes for point in points]
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        ends = [100 * (p.accuracy + side * (p.std or 0)) for p in points for side in (-1, 1)]
        low, high = min(ends), max([*ends, *([100 * full[1]] if full else [])])
        gap = max(high - low, 1.0) / 20
        axes.set_ylim(low - gap, high + gap)
        for point in points:
            if point.std:
                bottom, top = 100 * (point.accuracy - point.std), 100 * (point.accuracy + point.std)
                colour = FAINT if point.published else _colour(point, colours)
                axes.vlines(point.num_bytes, bottom, top, color=colour, linewidth=1)
            _mark(canvas, point, (point.num_bytes, 100 * point.accuracy), colours, markers)
        named = [point for point in points if point.published or point.method != RANDOM]  # the legend names the line
        for published in (False, True):
            for point, height in _spread([point for point in named if point.published == published], gap):
                axes.annotate(
                    point.label,
                    (point.num_bytes, 100 * point.accuracy),
                    (-14 if published else 14, height),
                    textcoords=("offset points", "data"),
                    fontsize=7.5,
                    color=_colour(point, colours),
                    ha="right" if published else "left",
                    va="center",
                    arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
                )
        random = sorted((p.num_bytes, 100 * p.accuracy) for p in points if p.method == RANDOM and not p.published)
        if len({size for size, _ in random}) > 1:
            axes.plot(*zip(*random, strict=True), color=INK, linewidth=0.8, linestyle="--")
        elif random:
            axes.axhline(sum(height for _, height in random) / len(random), color=INK, linewidth=0.8, linestyle="--")
        if full is not None:
            axes.axhline(100 * full[1], color=INK, linewidth=0.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _legend(axes, points, full, markers)
    return canvas.svg


def _colour(point: Point, colours: Mapping[str, str]) -> str:
    return colours.get(point.method, INK)


def _mark(
    canvas: Canvas, point: Point, place: tuple[float, float], colours: Mapping[str, str], markers: Mapping[str, str]
) -> None:
    colour = _colour(point, colours)
    dot = canvas.axes.scatter(
        [place[0]],
        [place[1]],
        marker=markers[point.budget],
        s=24 if point.published else 36,
        facecolors="none" if point.published else colour,
        edgecolors=colour,
        linewidths=0.9 if point.published else 0,
        zorder=2 if point.published else 3,
    )
    canvas.explain(dot, point.says)


def _legend(axes: Axes, points: Sequence[Point], full: tuple[str, float] | None, markers: Mapping[str, str]) -> None:
    """Name budgets and lines below the axes."""
    plain: dict[str, Any] = {"color": INK, "linestyle": "none", "markersize": 5}
    entries = [Line2D([], [], marker=marker, label=budget, **plain) for budget, marker in markers.items()]
    if any(point.published for point in points):
        entries.append(Line2D([], [], marker="o", markerfacecolor="none", label="hollow: published", **plain))
    if any(point.method == RANDOM and not point.published for point in points):
        entries.append(Line2D([], [], color=INK, linewidth=0.8, linestyle="--", label="random images"))
    if full is not None:
        entries.append(Line2D([], [], color=INK, linewidth=0.8, label=full[0]))
    axes.figure.legend(handles=entries, loc="outside lower center", ncols=4)


def _spread(points: Sequence[Point], gap: float) -> list[tuple[Point, float]]:
    """Return heights (in percent) of the labels, so that labels at about the same number of bytes do not overlap."""
    placed: list[tuple[Point, float]] = []
    columns: dict[int, float] = {}
    for point in sorted(points, key=lambda point: point.accuracy):
        column = point.num_bytes.bit_length()
        height = max(100 * point.accuracy, columns.get(column, -1e9) + gap)
        columns[column] = height
        placed.append((point, height))
    return placed


def readable_bytes(value: float) -> str:
    """Format a number of bytes with a decimal prefix: 31.4 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def fingerprint(*parts: str) -> str:
    """Return a short identifier for a figure."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:10]
