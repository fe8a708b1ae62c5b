import dataclasses
import io
import json
from pathlib import Path

import pytest

from condense import catalog, recipe, registry
from condense.commands import Buffer, Cache, Distill
from condense.inner import Exact, Truncated
from condense.names import flags
from condense.networks import default_for
from condense.recipe import Recipe
from condense.schedule import Schedule
from condense.synthetic import Factor, Hard, Logits, Pixels

NAMES = sorted(registry.METHODS)


HASHES = json.loads((Path(__file__).parent / "golden" / "recipes.json").read_text())
"""The first digits of the hash of every recipe of version 0.1.0, which had a file for each and took images alone;
DataDAM, IDC, IDC-I and KIP on the digits have other settings since."""


@pytest.mark.parametrize("name", HASHES)
def test_every_recipe_is_what_it_was_says_its_source_and_round_trips(name: str, tmp_path: Path) -> None:
    entry = catalog.named(name)
    assert entry is not None and len(entry.description) > 20
    plan = recipe.named(name)
    on_images = dataclasses.replace(plan, network=plan.network.replace("auto", default_for((3, 32, 32))))
    assert on_images.hash("f").startswith(HASHES[name])
    assert registry.name_of(plan.method) == {"ftd": "mtt", "random-soft": "random"}.get(entry.stem, entry.stem)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(plan))
    assert recipe.from_yaml(tmp_path / "again.yaml") == plan


def test_no_recipe_was_lost() -> None:
    assert catalog.recipes().keys() >= HASHES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_recipe_for_any_data_set(name: str) -> None:
    for dataset in (None, "nobody's data"):
        assert recipe.find(name, dataset, 7).name == name


def test_the_nearest_published_budget_serves() -> None:
    assert recipe.find("dm", "cifar10", 10).name == "dm-cifar10-ipc10"
    assert recipe.find("dm", "cifar10", 8).name == "dm-cifar10-ipc10"
    assert recipe.find("dm", "cifar10", 3).name == "dm-cifar10-ipc1"
    assert recipe.find("ftd", "cifar100", 10).recipe.transform == "zca", "files of recipes are asked as methods are"
    assert recipe.find("dm-cifar10-ipc1", "mnist", 50).recipe.ipc == 1, "a recipe's own name is meant as it stands"


def test_a_file_of_ones_own_may_have_a_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "source: Ours.\nmethod: {name: dm, num_steps: 7, optim: {lr: 2.0}}\nipc: 3\ntable:\n"
        "- {dataset: [digits, mnist], ipc: [1, 10], source: Ours at many., method: {optim: {lr: 5.0}}}\n"
    )
    for dataset, ipc, lr in [(None, None, 5.0), ("mnist", 50, 5.0), ("cifar10", 10, 2.0)]:
        resolved = recipe.find(str(path), dataset, ipc)
        method = resolved.recipe.method
        assert method.optim.lr == lr and method.num_steps == 7  # type: ignore[attr-defined]
        assert resolved.source == ("Ours." if lr == 2.0 else "Ours at many.")
    assert recipe.from_yaml(path).ipc == 1, "of 1 and 10 the first is nearer to 3"


def parse(*words: str, method: str = "mtt") -> Recipe:
    base = Recipe(method=registry.load(method)())
    return recipe.parse(Distill, list(words), Distill(recipe=base)).recipe


def test_flags_are_the_fields() -> None:
    plan = parse("--ipc", "3", "--method.num-steps", "5", "--method.optim.lr", "1e3", "--split.val-fraction", "0.2")
    assert (plan.ipc, plan.method.num_steps, plan.split.val_fraction) == (3, 5, 0.2)
    assert plan.method.optim.lr == 1000.0  # type: ignore[attr-defined]


def test_one_budget_takes_the_place_of_the_other(tmp_path: Path) -> None:
    share, number = parse("--fraction", "0.3"), parse()
    assert (share.ipc, share.fraction, share.budget_in_words) == (None, 0.3, "fraction 0.3")
    assert (number.ipc, number.fraction, number.budget_in_words) == (10, None, "ipc 10")
    assert recipe.parse(Distill, ["--ipc=3"], Distill(recipe=share)).recipe == dataclasses.replace(number, ipc=3)
    assert "ipc" not in recipe.to_mapping(share) and "fraction" not in recipe.to_mapping(number)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(share))
    assert recipe.from_yaml(tmp_path / "mine.yaml") == share
    assert share.hash("f") != dataclasses.replace(share, fraction=0.2).hash("f") != number.hash("f")


def test_choices_are_swapped_first_and_then_have_their_own_flags() -> None:
    plan = parse("--decode.factor", "3", "--decode", "factor", "--labels=logits", "--method.adjoint", "truncated")
    assert plan.decode == Factor(factor=3) and plan.labels == Logits()
    assert isinstance(plan.method.adjoint, Truncated)  # type: ignore[attr-defined]
    assert parse().decode == Pixels() and parse().labels == Hard()
    assert parse().method.adjoint == Exact()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ipcs", "3"], r"--ipcs.*did you mean --ipc"),
        (["--method.syn-step", "3"], r"did you mean --method\.syn-steps"),
        (["--ipc", "many"], "--ipc takes None or a whole number, not 'many'"),
        (["--ipc", "0"], "ipc must be at least 1"),
        (["--fraction", "1.5"], "fraction must be above 0 and at most 1, got 1.5; give fraction=0.3"),
        (["--fraction", "0.3", "--ipc", "3"], "ipc=3 and fraction=0.3 are two budgets; give one of them"),
        (["--decode", "facto"], "unknown decode 'facto': did you mean 'factor'"),
        (["--decode.factor", "3"], r"unknown flag --decode\.factor: did you mean --"),
        (["--method.lr", "-1"], "lr must be positive"),
    ],
)
def test_bad_flags_get_one_line(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["last"], "unexpected 'last'; --help lists the flags"),
        (["--days", "last"], "--days takes a number, not 'last'; --help lists the flags"),
        (["--days"], "--days needs a value; --help lists the flags"),
        (["--day", "3"], "unknown flag --day: did you mean --days? --help lists the flags"),
        (["--days", "-3"], "--days must be at least 0, got -3.0; give --days 30"),
    ],
)
def test_errors_in_flags_are_written_like_all_others(words: list[str], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipe.parse(Cache, words, Cache())
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--schedule.cosine-to", "x"], "--schedule.cosine-to takes None or a number, not 'x'"),
        (["--schedule.drop-after", "1", "x"], "--schedule.drop-after takes whole numbers, not '1 x'"),
        (["--num-epochs", "it's"], '--num-epochs takes a whole number, not "it\'s"'),
        (["--schedule.drop-at", "2"], "a schedule's drop_at are fractions .*; try 0.5$"),
        (["--keep", "lst"], "--keep does not take 'lst': did you mean 'last'[?] there are all, last"),
        (["--schedule", "3"], "unknown flag --schedule: did you mean( or)?( --schedule.[a-z-]+( or)?){3}[?]"),
    ],
)
def test_errors_in_flags_say_what_a_flag_takes(words: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}(;? --help lists the flags)?$"):
        recipe.parse(Buffer, words, Buffer())


def test_a_terminal_without_box_characters_gets_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with flags(), pytest.raises(ValueError, match="did you mean --ipc") as unknown:
            parse("--ipcs", "3")
        with flags(), pytest.raises(ValueError, match=r"--method\.optim\.lr 0\.1") as bad:
            parse("--method.optim.lr", "1e39", method="dm")
        lines.append((str(unknown.value), str(bad.value)))
    assert lines[0] == lines[1]


def test_advice_does_not_repeat_the_flag_in_the_complaint() -> None:
    for words in (["--method.num-steps", "3.5"], ["--method.optim.lr", "abc"]):
        with pytest.raises(ValueError, match=f"^{words[0]} takes a .*, not '{words[1]}'; --help lists the flags$"):
            recipe.parse(Distill, words, Distill(recipe=Recipe(method=registry.load("dm")())))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: {name: dm, stepz: 3}", r"unknown field 'method\.stepz': there are num_steps"),
        ("method: {name: herdin}", "did you mean 'herding'"),
        ("method: {name: dm}\nipcs: 3", "unknown field 'ipcs': did you mean 'ipc'"),
        ("method: {name: dm}\nipc: ten", "ipc takes None or a whole number, not 'ten'"),
        ("ipc: 3", "names no method"),
        ("[1, 2]", "not a mapping"),
        ("method: {name: dm", "cannot be read"),
    ],
)
def test_bad_recipe_files_get_one_line_with_their_name(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        recipe.from_yaml(path)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: {name: dm, optim: {lr: 1e3}, clip: null}\ndecode: {name: factor, factor: 3}\n")
    plan = recipe.from_yaml(path)
    assert plan.method.optim.lr == 1000.0 and plan.method.clip is None  # type: ignore[attr-defined]
    assert plan.decode == Factor(factor=3)


def test_the_hash_is_of_the_content_wherever_the_data_lie() -> None:
    one = Recipe(method=registry.load("dm")(), dataset="here.npz")
    other = Recipe(method=registry.load("dm")(), dataset="elsewhere/same.npz")
    assert one.hash("f") == other.hash("f") != one.hash("g")
    assert one.hash("f") != Recipe(method=registry.load("dm")(num_steps=3), dataset="here.npz").hash("f")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: dm\nhelp: true", "unknown field 'help'"),
        ("method: {name: dm, help: 1}", "unknown field 'method.help'"),
        ("method: {name: dm, h: 1}", "unknown field 'method.h'"),
        ("method: dm\nversion: 1", "unknown field 'version'"),
        ("method: dm\n1: 2", "unknown field '1'"),
        ("method: {name: dm, optim: {name: adam}}", "unknown field 'method.optim.name'"),
        ("method: {name: dm, optim: adam}", "method.optim is a mapping of fields, not 'adam'"),
        ("method: {name: {a: 1}}", "names no method"),
        ("method: [dm]", "names no method"),
        ("method: dm\nnetwork: --help", "network is '--help', which looks like a flag"),
        ("method: {name: idc, matched: [-h]}", r"method\.matched is '-h', which looks like a flag"),
        ("method: {name: idc, matched: [color, [crop]]}", "method.matched is a list where"),
        ("method: dm\nipc: {a: 1}", "ipc is a dict where"),
        ("method: dm\nseed: null", "seed is empty"),
        ("method: dm\nipc: [1, 2]", "ipc is a list where one value is expected"),
        ("method: dm\ndataset: 2024-01-01", "dataset is a date where"),
        ("method: dm\ndecode: {name: 3}", "decode is 3 where the name of a choice is expected"),
        ("method: dm\nlabels: [hard]", "where the name of a choice is expected"),
        ("method: {name: dm, optim: {halve_at: [true]}}", "drop_at.*True"),
        ("method: {name: dm, optim: {lr: .nan}}", "lr=nan is not a number"),
    ],
)
def test_what_yaml_can_say_and_a_recipe_cannot_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        recipe.from_yaml(path)
    assert "\n" not in str(caught.value) and "--help" not in str(caught.value).replace("'--help'", "")


def test_fields_are_spelt_either_way_and_lists_are_lists(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: {name: dm, num-steps: 3, optim: {lr: 1e0, halve_at: [0.5, .75]}}\nsplit: {val-fraction: 0}\n"
    )
    plan = recipe.from_yaml(path)
    assert plan.method.num_steps == 3 and plan.split.val_fraction == 0.0
    assert plan.method.optim.schedule == Schedule(drop_at=(0.5, 0.75), drop_factor=0.5)  # type: ignore[attr-defined]


def test_a_class_that_nobody_listed_is_found_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours.py").write_text(
        "from dataclasses import dataclass\n"
        "from condense.methods.dm import DM\n"
        "class Outer:\n"
        "    @dataclass(frozen=True, kw_only=True)\n"
        "    class Inner(DM):\n"
        "        extra: int = 1\n"
        "def make():\n"
        "    class Hidden(DM):\n"
        "        pass\n"
        "    return Hidden()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import ours  # type: ignore[import-not-found]

    plan = Recipe(method=ours.Outer.Inner(extra=3))
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(plan))
    assert "ours:Outer.Inner" in (tmp_path / "mine.yaml").read_text()
    assert recipe.from_yaml(tmp_path / "mine.yaml") == plan
    hidden = recipe.to_yaml(Recipe(method=ours.make()))
    for text, complaint in {
        hidden: "class inside a function",
        hidden.replace("ours:make.<locals>.Hidden", "__main__:Mine"): "run that script again",
        hidden.replace("ours:make.<locals>.Hidden", "nowhere:Mine"): "add its folder to PYTHONPATH",
        hidden.replace("ours:make.<locals>.Hidden", "os:system"): "not a subclass of condense.method.Method",
        hidden.replace("ours:make.<locals>.Hidden", ".ours:Mine"): "cannot be loaded",
    }.items():
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=complaint):
            recipe.from_yaml(tmp_path / "mine.yaml")


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_the_beta2_of_an_optimiser_is_stored_where_the_method_has_another(beta2: float, tmp_path: Path) -> None:
    method = registry.load("sre2l")()
    plan = Recipe(method=dataclasses.replace(method, optim=dataclasses.replace(method.optim, beta2=beta2)))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(plan))
    assert recipe.from_yaml(file) == plan
