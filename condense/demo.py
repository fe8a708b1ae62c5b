"""A complete example on embedded data: expert trajectories, two distillations, cross-architecture evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense import api
from condense.files import expanded
from condense.show import print_results

NETWORK = "convnet:depth=2,width=64"
NETWORKS = (NETWORK, "mlp", "convnet:depth=2,norm=batch")
NUM_SEEDS = 3


def main(words: Sequence[str]) -> None:
    """Run the example in one folder. A second call continues where the first one stopped.

    Raises:
        ValueError: an argument other than ``--out FOLDER``.
    """
    if words and (len(words) != 2 or words[0] != "--out"):
        raise ValueError(f"demo takes --out FOLDER and nothing else, got {' '.join(words)!r}; e.g. --out demo")
    out = expanded(words[1] if words else "demo")
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {line}", flush=True)

    say("1/3 expert trajectories: 5 ConvNets on 1,442 handwritten digits (8x8)")
    buffer = api.make_buffer(
        "digits", NETWORK, num_experts=5, num_epochs=10, batch_size=64, lr=0.02, out=out / "artifacts"
    )
    say("2/3 distil 10 images per class: trajectory matching, then distribution matching")
    common: dict[str, Any] = {"dataset": "digits", "network": NETWORK, "ipc": 10, "resume": True}
    api.distill("mtt", **common, buffers=buffer, out=out / "mtt")
    api.distill("dm", **common, num_steps=100, batch_real=64, out=out / "dm")
    say(f"3/3 train {NUM_SEEDS} new networks of each of {', '.join(NETWORKS)} on every set")
    rows: list[dict[str, Any]] = []
    plan: tuple[tuple[Path, tuple[str, ...]], ...] = (
        (out / "mtt", ()),
        (out / "dm", ("random", "herding", "full")),
    )
    for run, baselines in plan:
        result = api.evaluate(run, networks=NETWORKS, num_seeds=NUM_SEEDS, baselines=baselines)
        rows += [each.row() for each in result.results]
    print_results(rows)
    page = api.report([out / "mtt", out / "dm"], out / "report.html")
    say("done; the results are in:")
    print(f"  {page}: comparison of the two runs (open in a browser)")
    for name in ("mtt", "dm"):
        print(f"  {out / name}: synthetic.png, synthetic.safetensors, evaluation.json, recipe.yaml, log.jsonl")
    print(f"  {buffer}: the expert trajectories")
    print(f"Next: condense show {out / 'mtt'}; condense distill --help", file=sys.stdout)
