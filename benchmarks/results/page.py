"""The page of results, its figures and the table of the README, made from the table of rows and their records."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import choices, decoupled, inputs, labels, methods, pruning, studies
from benchmarks.harness import mean_and_std, table_head, table_line
from benchmarks.results.published import Published, published
from benchmarks.results.record import Record
from benchmarks.results.table import Row, Section, Table
from condense.eval.report.figures import Point, accuracy_against_bytes, standalone
from condense.files import write_text

START, END = "<!-- results: made by `make results` -->", "<!-- end of results -->"

HEAD = """# Results

Test accuracy in percent after the last epoch, as mean ± standard deviation over all networks of all distillations. In
the column n, the first number counts distillations and the second the networks trained on each. The test split was
used for these numbers only, with three exceptions in [every method on digits](#every-method-on-digits): earlier
versions chose some settings of `rtp`, `cafe` and `idc` (which `idc-i` shares) on test images, as their pages say. Where
several configurations were tried, their number is in the column *tried*; the one in the table was chosen on images
held out from the training split, for `fm-10-sre2l` on training images that its teacher had seen.

Rows named `pool` are [frepo](methods/frepo.md) with the decoder `factor`, the objective `platt` and Adam; the published
numbers beside them are those of FRePo.

The protocol `canonical` trains on one class per image, whatever labels a set has; `own` is the training of the
method, with its labels. A set with *soft* labels stores a vector of values per image. The minutes are the mean time
of a distillation: on a CPU half the time of the processors, as if two cores were busy all the time, on a GPU wall
time. Not every row was measured on the same processor, and a faster one does more steps in these minutes; the commands
below name it where it was noted. Published numbers are those of the papers, at other budgets than ours and with the
decoders and labels of the papers; we did not measure them. Some were read in later papers that reprint them.
*Unverified* ones have not been compared with their source.

`make results` makes this page from `results/table.yaml` and the JSON files in `results`, which hold every accuracy,
command, commit and device.
"""


OTHERS: dict[str, Any] = {
    """## Every method on digits

Short recipes for the embedded digits of 8x8 pixels, which show that a method works, not how good it is. Networks are
trained under the training of the method (`own`), on its set and on as many random images per class. Each recipe makes
one set, on which all networks are trained, so its ± leaves out how sets of other seeds would differ; random images
have several draws with as many networks each. The seconds are wall time, without experts, on cores that other work
shared.
""": methods,
    """## Settings chosen on held-out images

Values of fields of recipes for the digits, and of rows of the first tables, chosen on a fifth of the training images of
each class. Every combination was distilled from the other four fifths with two seeds, and two networks were trained on
each set under `own`, so n = 4. The sets of rows were distilled with the number of steps in the combination, which is
smaller than that in their tables. Fields that begin with `protocol` belong to the training under `own`. The two best
combinations stand here, all of them in `results/choices`. The minutes are wall time on cores that other work shared.
""": choices,
    """## Series and clips

Each method makes one set, on which all n networks are trained, so its ± leaves out how sets of other seeds would
differ; the row `random` has n draws of samples with one network each. The columns on the right are the training that a
set brings along, and random samples under it. The settings were chosen on held-out samples; [another
page](inputs.md#measured) says how.
""": inputs,
    """## Decoupled methods

Each set is scored three times: under `canonical` with its classes (*hard*), under `relabelled` with one vector of a
teacher's logits per image (*fixed*), and under `relabelled` with the teacher's logits for every view of 300 epochs
(*views*). The columns in kB are the sizes of the images and of these three kinds of labels. The teacher has the
architecture of the scored networks and was trained for 15 epochs. n = 3 networks on one set, for `random` three
sets with one network each. Methods that recover images had 500 steps; nothing was chosen by accuracy. Real images are
stored in 8-bit pixels, which hold their values exactly. The minutes are wall time on cores that other work shared,
without the time for which a process was stopped.
""": decoupled,
    """## Labels of views

One set of random real images with several kinds of labels, n = 3 networks under `relabelled`.
""": labels,
    """## Pruning

Networks trained on a share of the real images, under `pruned`: with the loss of a teacher, which is trained on all
images, and with the cross-entropy alone.
""": pruning,
    """## Studies

Sets beside each other and in downstream tasks, mean and standard deviation of n networks or classifiers on one set. The
commands of a study are run one after the other in one folder. In studies of downstream tasks, rows of random images are
three draws; in comparisons, each set stands beside random images of its own budget, which under `own` have the
training of `random`, that is `canonical`.
""": studies,
}
"""What the page says above the tables of other benchmarks, and their modules. Their records lie in the folder of
``results`` that has the name of the module."""


BEST = """The best rows of [docs/results.md](docs/results.md), which `make results` measures within stated budgets:

| data set | images per class | best row | `own` | `canonical` | minutes | random | published |
|---|---|---|---|---|---|---|---|"""


def page(table: Table, records: Mapping[str, Record], root: Path) -> str:
    """The Markdown text of the page; ``root`` is the folder of the repository."""
    parts = [HEAD, *(section(part, records) for part in table.sections)]
    for title, bench in OTHERS.items():
        made = bench.tables(root / "results" / bench.__name__.rpartition(".")[2])
        parts += [title, *(made or [f"Not measured yet: `python -m {bench.__name__}`.", ""])]
    return "\n".join([*parts, commands(table, records)])


def section(part: Section, records: Mapping[str, Record]) -> str:
    rows = [records[row.name] for row in part.rows if row.name in records]
    open_rows = [row.name for row in part.rows if row.name not in records]
    lines = [f"## {part.title}", ""]
    if part.text:
        lines += [part.text.strip(), ""]
    if rows:
        lines += [*tables(rows, part.auc), "", *full_data(rows)]
        lines += [f"![Accuracy of the rows of this table]({figure_path(part)})", ""]
    if open_rows:
        lines += [f"Not measured yet: {', '.join(f'`{name}`' for name in open_rows)}.", ""]
    return "\n".join(lines)


def tables(rows: Sequence[Record], auc: bool) -> list[str]:
    """The table of a section. Where only some sets were scored on several architectures, these have a second one."""
    alike = len({tuple(row.columns) for row in rows}) == 1
    first = [(protocol, row.columns[0][1]) for row in rows for protocol in row.protocols]
    lines = markdown(rows, rows[0].columns if alike else [*dict.fromkeys(first)], auc)
    several = [row for row in rows if len({network for _, network in row.columns}) > 1]
    if several and not alike:
        every = [column for row in several for column in row.columns]
        lines += ["", "Across architectures:", "", *markdown(several, [*dict.fromkeys(every)], auc)]
    return lines


def markdown(rows: Sequence[Record], columns: Sequence[tuple[str, str]], auc: bool = False) -> list[str]:
    """A table with a column for each protocol and architecture, the best row of the first one first; the best entry of
    each column is bold."""
    columns = sorted(columns, key=lambda column: (column[0] != "own", column[0]))
    several = len({network for _, network in columns}) > 1
    best = {column: max(_mean(row, *column) for row in rows) for column in columns}
    titles = ["row", "labels", "steps", "minutes", "bytes"]
    titles += [f"`{protocol}`{f', {network}' if several else ''}" for protocol, network in columns]
    titles += ["n", "tried", "published"]
    lines = table_head(titles)
    for row in sorted(rows, key=lambda row: -max(_mean(row, *column) for column in columns)):
        cells = [
            f"`{row.row.name}`{_decoder(row)}",
            "hard" if row.labels == "hard" else f"soft ({row.labels})",
            "—" if row.num_steps is None else f"{row.num_steps:,}",
            in_minutes(row),
            f"{row.bytes:,}",
            *(_cell(row, column, best[column], auc) for column in columns),
            f"{len(row.distillations)} x {len(row.distillations[0].scores[0].accuracies)}",
            str(row.row.tried),
            str(_published(row) or "—"),
        ]
        lines.append(table_line(cells))
    return lines


def full_data(rows: Sequence[Record]) -> list[str]:
    """Lines on the networks that were trained on all training data."""
    scores = {(score.protocol, score.network): score for row in rows for score in row.full}
    lines = [
        f"All training data under `{protocol}` on {network}: {mean_and_std(score.accuracies)} "
        f"(n = {len(score.accuracies)})."
        for (protocol, network), score in scores.items()
    ]
    return [*lines, ""] if lines else []


def commands(table: Table, records: Mapping[str, Record]) -> str:
    """What was run for each row, with its provenance."""
    lines = [
        "## Commands",
        "",
        "`RUN` stands for the folder of the run. A data set that `condense list datasets` does not show stands for its "
        "file or folder. A `+` after a commit means that the code had changes that were not committed.",
        "",
    ]
    for row in table.rows:
        if row.name not in records:
            continue
        record = records[row.name]
        lines += [f"`{row.name}`. {record.provenance}{f', {record.machine}' if record.machine else ''},"]
        lines += [f"seeds 0 to {len(record.distillations) - 1}{_choice(record.row)}", ""]
        if record.buffer:
            lines.append(f"    {record.buffer}  # {record.buffer_minutes:.1f} minutes of wall time")
        lines += [f"    {record.distillations[0].command}", f"    {record.evaluation}", ""]
    return "\n".join(lines)


def figures(table: Table, records: Mapping[str, Record]) -> dict[str, str]:
    """The text of each figure by its path relative to ``docs``."""
    found = {}
    for part in table.sections:
        rows = [records[row.name] for row in part.rows if row.name in records]
        if not rows:
            continue
        points = [point for row in rows for point in _points(row)]
        full = [statistics.fmean(score.accuracies) for row in rows for score in row.full]
        ceiling = ("all training data", full[0]) if full else None
        path = figure_path(part)
        found[path] = standalone(accuracy_against_bytes(path, points, ceiling))
    return found


def figure_path(part: Section) -> str:
    return f"images/results-{re.sub('[^a-z0-9]+', '-', part.title.lower()).strip('-')}.svg"


def best_rows(table: Table, records: Mapping[str, Record]) -> str:
    """The text of the README: the best row of every data set and budget beside random images and published numbers;
    empty if no learning row is measured."""
    lines = []
    budgets = dict.fromkeys((row.dataset, row.ipc) for row in table.rows)
    for dataset, ipc in budgets:
        rows = [r for r in records.values() if (r.row.dataset, r.row.ipc) == (dataset, ipc)]
        learned = [row for row in rows if row.row.method != "random" and {"own", "canonical"} & {*row.protocols}]
        classes = [row for row in rows if row.row.method == "random" and row.labels == "hard"]
        random = [a for row in classes for a in row.accuracies("canonical") or row.accuracies("own")]
        if not learned:
            continue
        best = max(learned, key=lambda row: max(_mean(row, name) for name in row.protocols))
        lines.append(
            f"| {dataset} | {ipc} | `{best.row.method}`{_decoder(best)} "
            f"| {_plain(best, 'own')} | {_plain(best, 'canonical')} "
            f"| {in_minutes(best)} | {mean_and_std(random)} "
            f"| {_published(best) or '—'} |"
        )
    return "\n".join([BEST, *lines]) if lines else ""


def with_table(readme: str, table: str) -> str:
    """The README with ``table`` between its two marks. Raises ValueError if a mark is missing."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the lines {START} and {END}")
    return "\n".join([before + START, *([table] if table else []), END + after])


def write(table: Table, records: Mapping[str, Record], root: Path) -> None:
    """Write page, figures and the table of the README below the root of the repository."""
    for path, text in figures(table, records).items():
        write_text(root / "docs" / path, text)
    write_text(root / "docs" / "results.md", page(table, records, root))
    readme = root / "README.md"
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), best_rows(table, records)))


def minutes(row: Record) -> float:
    return statistics.fmean(d.minutes if row.row.device == "cuda" else d.cpu_minutes for d in row.distillations)


def in_minutes(row: Record) -> str:
    """The mean time of a distillation as text."""
    value = minutes(row)
    return f"{value:.1f}" if value >= 0.05 else "< 0.1"


def _points(row: Record) -> list[Point]:
    protocol = row.protocols[0]
    found = row.accuracies(protocol)
    budget, method = f"ipc {row.row.ipc}", row.row.method
    shared = {"method": method, "budget": budget, "num_bytes": row.bytes}
    std = statistics.stdev(found) if len(found) > 1 else None
    points = [Point(label=row.row.name, accuracy=statistics.fmean(found), std=std, **shared)]
    theirs = _published(row)
    if theirs is not None:
        spread = None if theirs.std is None else theirs.std / 100
        points.append(Point(label=method, accuracy=theirs.mean / 100, std=spread, published=True, **shared))
    return points


def _published(row: Record) -> Published | None:
    """The published accuracy of the method of a row; that of random images depends on the labels."""
    soft = row.row.method == "random" and row.labels != "hard"
    return published("random-soft" if soft else row.row.method, row.row.dataset, row.row.ipc)


def _decoder(row: Record) -> str:
    """Words on the decoder of a set; empty where its pixels or graphs are stored."""
    return "" if row.decode in ("pixels", "graphs") else f", decoder `{row.decode}`"


def _mean(row: Record, protocol: str, network: str = "") -> float:
    found = row.accuracies(protocol, network=network)
    return statistics.fmean(found) if found else 0.0


def _plain(row: Record, protocol: str, network: str = "") -> str:
    found = row.accuracies(protocol, network=network)
    return mean_and_std(found)


def _cell(row: Record, column: tuple[str, str], best: float, auc: bool) -> str:
    protocol, network = column
    text = _plain(row, protocol, network)
    areas = [area for score in row.scores(protocol, network=network) for area in score.auc]
    if text == "—":
        return text
    bold = f"**{text}**" if _mean(row, *column) == best else text
    return f"{bold} (AUC {100 * statistics.fmean(areas):.1f})" if auc and areas else bold


def _choice(row: Row) -> str:
    return f"; {row.tried} configurations were tried to choose {row.chosen}" if row.tried > 1 else ""
