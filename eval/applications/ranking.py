"""DD-Ranking: scores that separate the quality of a set's images from the effect of labels, augmentation and tuning.

Li et al., "DD-Ranking: rethinking the evaluation of dataset distillation", 2024. The scores are those of
``condense.eval.ranking``. They are computed from these accuracies:

    real, hard      all training images with hard labels, under ``full-data``
    hard            the set with hard labels, under ``protocol``
    own             the set under its own training; the same as hard for sets with hard labels
    random, own     random images under the same training as own
    augmented       the set and random images under ``protocol`` with DSA
    plain           the same without augmentation

Deviations: all accuracies are those after the last epoch, and learning rates are chosen on held-out real images; the
published package takes the best test accuracy in both cases. For a set with soft labels, random, own uses the baseline
``random-soft`` (random images labelled once by a trained network) if it is given, else ``random``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from condense.eval import ranking
from condense.eval.applications.application import Application, Findings, Setting
from condense.eval.baselines import full_data
from condense.eval.evaluate import check, evaluate
from condense.eval.journal import CachedCells
from condense.eval.protocol import Protocol, fixed, own
from condense.files import checksum
from condense.names import spelt
from condense.networks import parse
from condense.synthetic.set import SyntheticSet


@dataclass(frozen=True, kw_only=True)
class Ranking(Application):
    """DD-Ranking: hard-label recovery, improvement over random, label-robust and augmentation-robust scores."""

    network: str = "auto"
    """Architecture of the networks; auto is the ConvNet for the kind of data."""
    num_seeds: int = 3
    """Number of networks averaged for each accuracy."""
    protocol: str = "dd-ranking"
    """Protocol of the training on hard labels. dd-ranking chooses its learning rate on held-out real images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}")
        parse(self.network)
        fixed(self.protocol)

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        if "random" not in baselines:
            raise ValueError(f"the scores need the baseline random; give {spelt('baselines', ('random',))}")
        check(syn, [self.network], fixed(self.protocol), self.num_seeds)
        if syn.label_kind.of_views:
            raise ValueError(
                f"the set has {syn.label_kind.name} labels of its views, and random images would need labels by its "
                "teacher; give the set before `condense relabel`, or measure it with `condense evaluate`"
            )
        if syn.label_kind.space != "classes":
            own(syn, "measure its images with `condense evaluate`")

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        random, protocol, accuracy = baselines["random"], fixed(self.protocol), _Accuracies(self, setting)
        augmented, plain = (dataclasses.replace(protocol, augment=augment) for augment in ("dsa", "none"))
        random_soft = baselines.get("random-soft", random)
        other_baselines = {name: made for name, made in baselines.items() if name not in ("random", "random-soft")}
        subject = setting.subject
        real = full_data(
            subject.arrays,
            network=self.network,
            transform=subject.syn.origin.transform_name,
            device=subject.device,
            cache=subject.cache,
            **accuracy.common,
        ).mean
        rows, record = [], {}
        for name, syn in setting.contenders(other_baselines).items():
            hard, random_hard = accuracy(syn, protocol), accuracy(random, protocol)
            own_accuracy, random_own = hard, random_hard
            if syn.label_kind.space != "classes":
                own_accuracy, random_own = (accuracy(each, own(syn)) for each in (syn, random_soft))
            with_it, without = ([accuracy(each, plan) for each in (syn, random)] for plan in (augmented, plain))
            accuracies = {
                "real hard": real,
                "hard": hard,
                "own": own_accuracy,
                "random own": random_own,
                "augmented": with_it[0],
                "random augmented": with_it[1],
                "plain": without[0],
                "random plain": without[1],
            }
            scores = {
                "HLR": ranking.hard_label_recovery(real, hard),
                "IOR": ranking.improvement_over_random(own_accuracy, random_own),
                "LRS": ranking.label_robust_score(real, hard, own_accuracy, random_own),
                "ARS": ranking.augmentation_robust_score(*with_it, *without),
            }
            record[name] = {"accuracies": accuracies, "scores": scores}
            shown = ("real hard", "hard", "own", "random own")
            rows.append(
                (
                    name,
                    *(f"{100 * accuracies[each]:.1f}" for each in shown),
                    *(f"{value:.3f}" for value in scores.values()),
                )
            )
        return Findings(
            ("set", "real, hard", "hard", "own", "random, own", "HLR", "IOR", "LRS", "ARS"),
            rows,
            f"DD-Ranking, {subject.network(self.network).name} under {self.protocol}, "
            f"n = {self.num_seeds} networks per accuracy",
            {"rankings": record},
        )


class _Accuracies:
    """Mean accuracies over networks; an accuracy that several rows need is computed once."""

    def __init__(self, plan: Ranking, setting: Setting) -> None:
        self._subject, self._network, self._known = setting.subject, plan.network, dict[tuple[str, str], float]()
        self.common: dict[str, Any] = {
            "num_seeds": plan.num_seeds,
            "seed": setting.seed,
            "compute": setting.compute,
            "journal": CachedCells(setting.subject.cache),
        }

    def __call__(self, syn: SyntheticSet, protocol: Protocol) -> float:
        key = (checksum(syn.state_dict()), protocol.hash)
        if key not in self._known:
            subject = dataclasses.replace(self._subject, syn=syn)
            evaluation = evaluate(subject, networks=[self._network], protocol=protocol, **self.common)
            self._known[key] = evaluation.results[0].mean
        return self._known[key]
