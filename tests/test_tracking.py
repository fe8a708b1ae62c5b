import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from condense import api, tracking
from condense.data.datasets import Arrays
from condense.tracking import Volume, cut_back, detail, progress, volume


def distill(tiny: Arrays, out: Path, track: str) -> list[dict[str, float]]:
    method = {"num_steps": 3, "batch_real": 4}
    api.distill("dm", dataset=tiny, network="mlp", ipc=1, out=out, track=(track,), device="cpu", **method)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def leveldb_records(content: bytes, header: int = 7, block: int = 2**15) -> Iterator[bytes]:
    """The records of a LevelDB log, the format of offline wandb files, after a file header of 7 bytes."""
    position, record = header, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.filterwarnings("default")
def test_an_offline_wandb_run_holds_what_the_log_holds(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    steps = distill(tiny, tmp_path / "run", "wandb")
    (file,) = (tmp_path / "run").rglob("*.wandb")
    losses = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if "loss" in items:
            losses.append(json.loads(items["loss"]))
    assert losses == pytest.approx([step["loss"] for step in steps])


@pytest.mark.filterwarnings("default")
def test_tensorboard_holds_what_the_log_holds(tiny: Arrays, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = distill(tiny, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([step["loss"] for step in steps])


def test_a_log_is_cut_back_to_whole_lines_of_the_steps_done(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"event": "resume", "step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_back(log, 2)
    assert log.read_text() == '{"step": 1}\n{"event": "resume", "step": 1}\n{"step": 2}\n'


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only entry, which tests set."""
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_every_half_minute(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with progress("work", 1000) as bar:
        for second in range(0, 61):
            clock[0] = float(second)
            bar(second, "loss 2")
    assert capfd.readouterr() == (
        "",
        "work: 30 of 1000, loss 2, about 16 min left on this machine\n"
        "work: 60 of 1000, loss 2, about 16 min left on this machine\n",
    )


@pytest.mark.parametrize(("level", "lines"), [("quiet", 0), ("normal", 1), ("verbose", 40)])
def test_the_volume_decides_how_often_progress_is_told(
    level: Volume, lines: int, clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with volume(level), progress("work", 100) as bar:
        for second in range(41):
            clock[0] = float(second)
            bar(second)
    assert capfd.readouterr().err.count("\n") == lines


def test_other_processes_show_no_progress(
    clock: list[float], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with volume("verbose"), progress("work", 2) as bar:
        clock[0] = 100.0
        bar(1)
        detail("details")
    assert capfd.readouterr().err == ""


def test_a_terminal_has_a_bar_with_the_time_left(
    clock: list[float], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for colours, expected in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", colours)
        with progress("work", 1000) as bar:
            bar(1)
            clock[0] += 60
            bar(2, "half")
        shown = capfd.readouterr().err
        assert "2/1000" in shown and "half, about 17 h left on this machine" in shown
        assert ("\x1b[3" in shown) is expected


def test_a_notebook_has_a_bar_without_widgets(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    class Handle:
        def update(self, content: dict[str, str], raw: bool) -> None:
            pages.append(content["text/html"])

    def display(content: dict[str, str], raw: bool, display_id: bool) -> Handle:
        pages.append(content["text/html"])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with progress("a <b>", 2) as bar:
        bar(1, "too soon to be drawn")
        bar(2, "loss < 1")
    assert pages == [
        '<progress value="0" max="2"></progress> a &lt;b&gt;: 0 of 2',
        '<progress value="2" max="2"></progress> a &lt;b&gt;: 2 of 2, loss &lt; 1',
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89, "89 s"), (90, "1.5 min"), (3600, "60 min"), (7200, "2 h"), (54000, "15 h"), (4e5, "4.6 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert tracking.duration(seconds) == f"about {words}"


def test_a_resumed_run_is_timed_from_where_it_continues(clock: list[float]) -> None:
    pace = tracking.Pace(100)
    assert pace.left(50) is None
    clock[0] = 2.0
    assert pace.left(51) is None, "too early to tell"
    clock[0] = 10.0
    assert pace.left(60) == 40.0
