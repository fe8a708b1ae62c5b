"""Architecture search by proxy: do networks rank on the synthetic set as they do on all training data?

Zhao, Mopuri and Bilen (DC, ICLR 2021), section 4.2, with a grid of ConvNets. Each architecture is trained on the set,
on the baselines of the same budget and, as the truth, on real training images. The rank correlations compare accuracies
on held-out real images; where nothing was held out, on the test images, and then nothing chosen may be called a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import scipy.stats
import torch

from condense.eval.applications.application import Application, Findings, Setting
from condense.eval.protocol import PROTOCOLS, fixed
from condense.names import spelt
from condense.networks import default_for, parse
from condense.synthetic.set import SyntheticSet


@dataclass(frozen=True, kw_only=True)
class NAS(Application):
    """Ranks a grid of ConvNets on the set as a proxy for all training data."""

    widths: tuple[int, ...] = (16, 32, 64)
    """Of the ConvNets."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Of the ConvNets."""
    norms: tuple[str, ...] = ("instance", "none")
    """Of the ConvNets."""
    poolings: tuple[str, ...] = ("avg", "max")
    """Of the ConvNets."""
    activations: tuple[str, ...] = ("relu",)
    """Of the ConvNets."""
    protocol: str = "canonical"
    """How networks are trained on the sets."""
    num_epochs: int = 5
    """Epochs on the real images."""
    max_real: int = 10000
    """Real images to train on, at most; drawn once."""
    num_seeds: int = 1
    """Networks of each architecture, whose accuracies are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.architectures("convnet")) < 3:
            raise ValueError(f"a ranking needs three architectures or more; give e.g. {spelt('widths', (16, 32, 64))}")
        for architecture in self.architectures("convnet"):
            parse(architecture)
        fixed(self.protocol)
        if self.num_epochs < 1 or self.max_real < 1 or self.num_seeds < 1:
            raise ValueError("num_epochs, max_real and num_seeds must be at least 1; leave them at their defaults")

    def architectures(self, network: str) -> list[str]:
        """Every combination, as options of ``network``: convnet, convnet1d or convnet3d."""
        grid = product(self.widths, self.depths, self.norms, self.poolings, self.activations)
        return [f"{network}:width={w},depth={d},norm={n},pooling={p},activation={a}" for w, d, n, p, a in grid]

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        for architecture in self.architectures(default_for(syn.origin.input_shape)):
            parse(architecture)

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        scored, where = (subject.held_out, "held-out") if len(subject.held_out) else (subject.test, "test")
        real_images, real_labels = subject.train.sample(self.max_real, setting.rng("nas")("real"))
        real_plan = replace(PROTOCOLS["full-data"], num_epochs=self.num_epochs)
        plan = fixed(self.protocol)
        proxies = setting.to_train_on(baselines)
        names = self.architectures(default_for(subject.arrays.input_shape))
        accuracies: dict[str, list[float]] = {name: [] for name in (*proxies, "real")}
        for architecture in names:
            network = subject.network(architecture)
            rngs = [setting.rng(f"nas/{network.name}", seed) for seed in range(self.num_seeds)]
            for name, (images, labels) in {**proxies, "real": (real_images, real_labels)}.items():
                scorer = setting.scorer(network, real_plan if name == "real" else plan, len(images))
                scores = [scorer.score(images, labels, scored.images, scored.labels, [rng])[0] for rng in rngs]
                accuracies[name].append(float(torch.tensor([s.accuracy for s in scores]).mean()))
        truth, rows, record = accuracies["real"], [], {}
        best = max(truth)
        for name in proxies:
            spearman, kendall = rank_correlations(accuracies[name], truth)
            chosen = accuracies[name].index(max(accuracies[name]))
            record[name] = {"spearman": spearman, "kendall": kendall, "chosen": names[chosen]}
            rows.append((name, f"{spearman:.2f}", f"{kendall:.2f}", f"{100 * truth[chosen]:.1f}", f"{100 * best:.1f}"))
        whole: dict[str, Any] = {"architectures": names, "accuracies": accuracies, "rankings": record}
        return Findings(
            ("proxy", "Spearman", "Kendall", "chosen, on real data", "best"),
            rows,
            f"{len(names)} ConvNets ranked by {where} accuracy; truth: {len(real_images)} real images, "
            f"{self.num_epochs} epochs",
            whole,
        )


def rank_correlations(proxy: Sequence[float], truth: Sequence[float]) -> tuple[float, float]:
    """Spearman's and Kendall's; 0 where one of the two tells nothing apart."""
    if len(set(proxy)) == 1 or len(set(truth)) == 1:
        return 0.0, 0.0
    return float(scipy.stats.spearmanr(proxy, truth).statistic), float(scipy.stats.kendalltau(proxy, truth).statistic)
