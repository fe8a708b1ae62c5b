"""Architecture search with a synthetic set as the proxy for real training data.

Zhao, Mopuri and Bilen (DC, ICLR 2021), section 4.2, with a grid of ConvNets. Each architecture is trained on the set,
on the baselines of the same budget and, as the reference, on real training images. The rank correlations compare
accuracies on held-out real images. If the set held out none, they use the test images, and the accuracy of a chosen
architecture must then not be reported as a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import scipy.stats
import torch

from condense.data.layout import Kind
from condense.eval.applications.application import Application, Findings, Samples, Setting, protocol_of_classes
from condense.eval.protocol import PROTOCOLS
from condense.names import spelt
from condense.networks import default_for, parse, resolve
from condense.synthetic.set import SyntheticSet
from condense.tracking import counted


@dataclass(frozen=True, kw_only=True)
class NAS(Application):
    """Architecture search: rank a grid of ConvNets on the set and compare with their ranking on real images."""

    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")

    widths: tuple[int, ...] = (16, 32, 64)
    """Widths of the ConvNets in the grid."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Depths of the ConvNets in the grid."""
    norms: tuple[str, ...] = ("instance", "none")
    """Normalisation layers of the ConvNets in the grid."""
    poolings: tuple[str, ...] = ("avg", "max")
    """Pooling layers of the ConvNets in the grid."""
    activations: tuple[str, ...] = ("relu",)
    """Activations of the ConvNets in the grid."""
    protocol: str = "canonical"
    """Protocol under which networks are trained on the sets."""
    num_epochs: int = 5
    """Number of training epochs on the real images."""
    max_real: int = 10000
    """Largest number of real training images; the same random sample for all networks."""
    num_seeds: int = 1
    """Networks per architecture, whose accuracies are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.architectures("convnet")) < 3:
            raise ValueError(f"a ranking needs three architectures or more; give e.g. {spelt('widths', (16, 32, 64))}")
        for architecture in self.architectures("convnet"):
            parse(architecture)
        protocol_of_classes(self.protocol)
        if self.num_epochs < 1 or self.max_real < 1 or self.num_seeds < 1:
            raise ValueError("num_epochs, max_real and num_seeds must be at least 1; leave them at their defaults")

    def architectures(self, network: str) -> list[str]:
        """Return every combination of the grid, as options of ``network``: convnet, convnet1d or convnet3d."""
        grid = product(self.widths, self.depths, self.norms, self.poolings, self.activations)
        return [f"{network}:width={w},depth={d},norm={n},pooling={p},activation={a}" for w, d, n, p, a in grid]

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        super().check(syn, baselines)
        for architecture in self.architectures(default_for(syn.origin.input_shape)):
            resolve(architecture, syn.origin.input_shape)

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        scored, where = (subject.held_out, "held-out") if len(subject.held_out) else (subject.test, "test")
        real_images, real_labels = subject.train.sample(self.max_real, setting.rng("nas")("real"))
        real_plan = replace(PROTOCOLS["full-data"], num_epochs=self.num_epochs)
        plan = protocol_of_classes(self.protocol)
        proxies = setting.to_train_on(baselines)
        names = self.architectures(default_for(subject.arrays.input_shape))
        accuracies: dict[str, list[float]] = {name: [] for name in (*proxies, "real")}
        for architecture in counted("architectures", names):
            network = subject.network(architecture)
            rngs = [setting.rng(f"nas/{network.name}", seed) for seed in range(self.num_seeds)]
            for name, (images, labels, weights) in {**proxies, "real": Samples(real_images, real_labels)}.items():
                scorer = setting.scorer(network, real_plan if name == "real" else plan, len(images))
                test = scored.images, scored.labels
                scores = [scorer.score(images, labels, *test, [rng], weights=weights)[0] for rng in rngs]
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
            ("proxy", "Spearman", "Kendall", "accuracy of its choice on real data, %", "best accuracy, %"),
            rows,
            f"{len(names)} networks ranked by {where} accuracy; reference: {len(real_images)} real {setting.kind}, "
            f"{self.num_epochs} epochs",
            whole,
        )


def rank_correlations(proxy: Sequence[float], truth: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's and Kendall's rank correlations; 0 if all values of one ranking are equal."""
    if len(set(proxy)) == 1 or len(set(truth)) == 1:
        return 0.0, 0.0
    return float(scipy.stats.spearmanr(proxy, truth).statistic), float(scipy.stats.kendalltau(proxy, truth).statistic)
