"""Recipe files: their tables, and those that other packages bring along."""

import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from condense import catalog, recipe

MINE = """\
source: |
  Somebody (2030): a method.
  A remark.
method: {name: rtp, num_steps: 5, optim: {kind: adam, lr: 0.5}}
decode: {name: bases, num_bases: 3}

table:
- dataset: [ours, theirs]
  ipc: [1, 10]
  source: "Somebody (2030): two data sets."
  method: {optim: {lr: 0.1}}
- dataset: ours
  ipc: 50
  decode: {name: factor, factor: 2}
"""


def test_a_row_differs_from_the_shared_fields_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    entries = {entry.name: entry for entry in catalog.read(tmp_path / "mine.yaml")}
    rows = ["mine-ours-ipc1", "mine-ours-ipc10", "mine-theirs-ipc1", "mine-theirs-ipc10", "mine-ours-ipc50"]
    assert list(entries) == ["mine", *rows]
    assert entries["mine"].source == "Somebody (2030): a method.\nA remark."
    assert entries["mine-ours-ipc50"].description == "Somebody (2030): a method."
    one = entries["mine-theirs-ipc10"]
    assert (one.dataset, one.ipc, one.description) == ("theirs", 10, "Somebody (2030): two data sets.")
    assert one.fields["method"] == {"name": "rtp", "num_steps": 5, "optim": {"kind": "adam", "lr": 0.1}}
    assert (one.fields["dataset"], one.fields["ipc"]) == ("theirs", 10)
    assert entries["mine-ours-ipc50"].fields["decode"] == {"name": "factor", "factor": 2}, "of another name"


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("{ours: 1}", "table is not a list of rows"),
        ("[3]", "row 1 of the table is not a mapping"),
        ("[{ipc: 1}]", "row 1 of the table does not name its data sets"),
        ("[{dataset: [], ipc: 1}]", "does not name its data sets"),
        ("[{dataset: [3], ipc: 1}]", "does not name its data sets"),
        ("[{dataset: ours}]", "does not give its images per class"),
        ("[{dataset: ours, ipc: 0}]", "does not give its images per class"),
        ("[{dataset: ours, ipc: true}]", "does not give its images per class"),
        (
            "[{dataset: ours, ipc: 1}, {dataset: [theirs, ours], ipc: [10, 1]}]",
            "row 2 of the table is the second row for",
        ),
        ("[{dataset: ours, ipc: 1, source: 3}]", "source is 3 where a text is expected"),
        (f"[{{dataset: {[f'd{i}' for i in range(40)]}, ipc: {list(range(1, 40))}}}]", "more than 1000 pairs"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(table: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"method: dm\ntable: {table}\n")
    with pytest.raises(ValueError, match=complaint) as caught:
        recipe.from_yaml(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_with_an_unknown_field_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: dm\ntable: [{dataset: digits, ipc: 10, stepz: 3}]\n")
    with pytest.raises(ValueError, match="mine-digits-ipc10: unknown field 'stepz'"):
        recipe.from_yaml(tmp_path / "mine.yaml")


def test_other_packages_add_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "theirs"
    (package / "more").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mine.yaml").write_text(MINE)
    (package / "more" / "dm.yaml").write_text("method: dm\ntable: [{dataset: [ours, cifar10], ipc: 10, seed: 9}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = ["theirs:mine.yaml", "theirs:more", "theirs:nothing", "nowhere"]
    entries = [EntryPoint(f"e{number}", value, catalog.GROUP) for number, value in enumerate(values)]
    monkeypatch.setattr(catalog, "entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match="are left out.*reinstall their package"):
        names = catalog.recipes().keys()
    assert {"mine", "mine-ours-ipc50", "dm-ours-ipc10"} <= names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert recipe.find("mine", "ours", 60).recipe.decode.name == "factor"
        assert recipe.find("dm", "ours", 10).recipe.seed == 9
        assert recipe.find("dm", "cifar10", 10).recipe.seed == 0, "a name of ours cannot be taken"


def test_words_choose_recipes() -> None:
    def names(*words: str) -> list[str]:
        return [entry.name for entry in catalog.search(words)]

    budgets = ("ipc1", "ipc10", "ipc50")
    assert names("mtt", "cifar10") == [f"{stem}-cifar10-{ipc}" for stem in ("mtt-siren", "mtt") for ipc in budgets]
    assert names("IPC1", "digits", "Our", "dsa") == ["dsa-digits-ipc1"]
    assert len(names()) == len(catalog.recipes())
    with pytest.raises(ValueError, match="no recipe has the words"):
        names("mtt", "cifr10")
