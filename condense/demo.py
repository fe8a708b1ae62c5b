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

NETWORK = "convnet:depth=2,width=32"
NETWORKS = (NETWORK, "mlp")
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

    say("1/3 expert trajectories: 3 ConvNets on 1,442 handwritten digits (8x8)")
    buffer = api.make_buffer(
        "digits", NETWORK, num_experts=3, num_epochs=8, batch_size=64, lr=0.02, out=out / "artifacts"
    )
    common: dict[str, Any] = {"dataset": "digits", "network": NETWORK, "ipc": 1, "resume": True}
    say("2/3 distil one image per class: trajectory matching, 60 steps")
    api.distill("mtt", **common, num_steps=60, buffers=buffer, out=out / "mtt")
    say("    distribution matching, 150 steps")
    api.distill("dm", **common, num_steps=150, out=out / "dm")
    say(f"3/3 train {NUM_SEEDS} new networks of each kind on every set, on random images and on all images")
    rows: list[dict[str, Any]] = []
    plan: tuple[tuple[Path, tuple[str, ...]], ...] = ((out / "mtt", ()), (out / "dm", ("random", "full")))
    for run, baselines in plan:
        for network in NETWORKS:
            done = api.evaluate(run, networks=(network,), num_seeds=NUM_SEEDS, baselines=baselines)
            for each in done.results:
                say(f"    {each.method}, {network}: {100 * each.mean:.1f} %")
                rows.append(each.row())
    print_results(rows)
    page = api.report([out / "mtt", out / "dm"], out / "report.html")
    say("done; the results are in:")
    print(f"  {page}: comparison of the two runs (open in a browser)")
    for name in ("mtt", "dm"):
        print(f"  {out / name}: synthetic.png, synthetic.safetensors, evaluation.json, recipe.yaml, log.jsonl")
    print(f"  {buffer}: the expert trajectories")
    print(f"Next: condense show {out / 'mtt'}; condense distill --help", file=sys.stdout)
