"""Write measurements to docs/performance.json and to the table in docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense.files import write_text

_CONVOLUTIONS = (
    "float32 convolutions near the machine's limit: a student step runs them 3 times, its backward pass 8 times, "
    "104 GFLOP in the two large layers, 0.20 s at 510 GFLOP/s; the rest is bound by memory; see docs/performance.md"
)
BOUNDS: dict[tuple[str, str], str] = {
    (f"trajectory matching, {steps} steps", quantity): _CONVOLUTIONS
    for steps in (10, 20)
    for quantity in ("time", "time, a process each")
}
"""The reason why a target cannot be met, by path and quantity."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity of one path. Ratios are gains of the engine: more than one is better. ``ask`` is the target."""

    path: str
    quantity: str
    unit: str
    textbook: float | None
    textbook_same_allocator: float | None
    engine: float
    ratio: float | None
    ratio_same_allocator: float | None
    ask: str | None
    met: bool | None
    bound: str | None
    n: int


def row(
    path: str,
    quantity: str,
    unit: str,
    engine: float,
    n: int,
    *,
    textbook: float | None = None,
    same: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return a row with its ratios, and whether it meets its target: a ratio of ``at_least`` or a value of
    ``at_most``."""

    def gain(theirs: float | None) -> float | None:
        if theirs is None or 0 in (theirs, engine):
            return None
        return engine / theirs if unit.endswith(("/s", "%")) else theirs / engine

    ratio, ask, met = gain(textbook), None, None
    if at_least is not None:
        ask, met = f">= {at_least:g} x", ratio is not None and ratio >= at_least
    elif at_most is not None:
        ask, met = f"<= {at_most:g} {unit}", engine <= at_most
    return Row(
        path=path,
        quantity=quantity,
        unit=unit,
        textbook=textbook,
        textbook_same_allocator=same,
        engine=engine,
        ratio=ratio,
        ratio_same_allocator=gain(same),
        ask=ask,
        met=met,
        bound=None if met in (True, None) else BOUNDS.get((path, quantity)),
        n=n,
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| path | quantity | textbook | same allocator | engine | ratio | same allocator | ask | met | n |",
        "|---|---|---:|---:|---:|---:|---:|---|---|---:|",
    ]
    for r in rows:
        cells = [
            r.path,
            f"{r.quantity}, {r.unit}",
            *map(_figure, (r.textbook, r.textbook_same_allocator, r.engine, r.ratio, r.ratio_same_allocator)),
            r.ask or "",
            {True: "yes", False: "**no**", None: ""}[r.met],
            str(r.n),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    """Format a number with three significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(folder: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write performance.json, and the table in performance.md if that file exists."""
    fields = {**head, "rows": [dataclasses.asdict(r) for r in rows]}
    write_text(folder / "performance.json", json.dumps(fields, indent=1) + "\n")
    named = ", ".join(f"{name} {_figure(value)}" for name, value in head["limits"].items())
    lines = [
        table(rows),
        "",
        f"{head['machine']}, {head['cores']} cores, {head['threads']} threads, torch {head['torch']}, commit "
        f"{head['commit']}, {head['date']}." + (f" Rates of the machine in GFLOP/s: {named}." if named else ""),
    ]
    replace_part(folder / "performance.md", "table", "\n".join(lines))


def replace_part(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page, if the page exists."""
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
        _, marker, after = rest.partition(f"<!-- /{name} -->")
        assert marker, f"{page} has no markers for {name}"
        write_text(page, f"{before}<!-- {name} -->\n{text}\n{marker}{after}")
