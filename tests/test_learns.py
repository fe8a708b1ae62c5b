"""After its short run on the embedded digits, every method whose sets have classes beats random images of the same
budget, the mean over three draws, under its own protocol."""

from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.methods import measure
from condense import registry
from tests.test_contract import LEARNING


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in LEARNING if registry.load(name).has_classes])
def test_a_short_run_beats_random_images(name: str, tmp_path: Path) -> None:
    row = measure(name, tmp_path, num_seeds=3, draws=3)
    print(row.cells())
    assert fmean(row.learned) > fmean(row.random)
