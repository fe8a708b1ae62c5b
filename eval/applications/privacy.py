"""What a set reveals about single training images: membership inference, and distances to the nearest training image.

An attacker sees the losses of a network and predicts that the images with small losses were trained on (Yeom et al.,
"Privacy risk in machine learning", CSF 2018). The AUC of the attack is the probability that a member has a smaller loss
than a non-member; 0.5 is chance. Members are images that the set was made from. For comparison, a network is trained on
the members themselves.

A synthetic image that is closer to a training image than almost all other real images may be a copy. Graphs have no
such distance: their rows list nodes and edges in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from condense.eval.applications.application import Application, Findings, Samples, Setting, protocol_of_classes
from condense.eval.protocol import PROTOCOLS
from condense.eval.subject import Subject
from condense.networks import Weights, parse, resolve
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled
from condense.tracking import counted
from condense.train import Scorer


@dataclass(frozen=True, kw_only=True)
class Privacy(Application):
    """Privacy: membership inference by loss, and distances to the nearest training image."""

    num_members: int = 2000
    """Number of members attacked, and of non-members; fewer if the data set has fewer."""
    num_seeds: int = 3
    """Number of networks attacked, each with its own initialisation."""
    network: str = "auto"
    """Architecture of the networks; auto is the ConvNet for the kind of data."""
    protocol: str = "canonical"
    """Protocol under which networks are trained on a set."""
    num_epochs: int = 50
    """Number of epochs of the networks that are trained on the members themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_members, self.num_seeds, self.num_epochs) < 1:
            raise ValueError("num_members, num_seeds and num_epochs must be at least 1; leave them at their defaults")
        parse(self.network)
        protocol_of_classes(self.protocol)

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        resolve(self.network, syn.origin.input_shape)

    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        subject = setting.subject
        others, where = (subject.held_out, "held-out") if len(subject.held_out) else (subject.test, "test")
        rng = setting.rng("privacy")
        num = min(self.num_members, len(subject.train), len(others))
        members = Labelled(*subject.train.sample(num, rng("members")))
        non_members = Labelled(*others.sample(num, rng("non_members")))
        network, plan = subject.network(self.network), protocol_of_classes(self.protocol)
        real_plan = replace(PROTOCOLS["full-data"], num_epochs=self.num_epochs)
        attacked = Scorer(network, setting.compute)
        jobs = {name: (plan, samples) for name, samples in setting.to_train_on(baselines).items()}
        nearest, usual, compared = dict[str, Tensor](), torch.empty(0), ""
        if setting.kind != "graphs":
            nearest = {name: _nearest(subject, samples.images) for name, (_, samples) in jobs.items()}
            usual = _nearest(subject, non_members.images[:])
            compared = (
                f"; distance of the {where} {setting.kind} to the nearest training example: median "
                f"{usual.median().item():.2f}, 1st percentile {usual.quantile(0.01).item():.2f}"
            )
        jobs["the members themselves"] = real_plan, Samples(members.images[:], members.labels)
        rows: list[tuple[str, ...]] = []
        record: dict[str, dict[str, list[float]]] = {}
        for name, (training, samples) in jobs.items():
            scorer, aucs = setting.scorer(network, training, len(samples.images)), []
            for seed in counted(name, range(self.num_seeds)):
                rng = setting.rng("privacy", seed)
                trained = scorer.train(samples.images, samples.classes, rng, weights=samples.weights)
                aucs.append(
                    membership_auc(_losses(attacked, trained, members), _losses(attacked, trained, non_members))
                )
            auc = torch.tensor(aucs)
            spread = f" ± {auc.std().item():.3f}" if len(aucs) > 1 else ""
            interval = auc_interval(auc.mean().item(), num)
            record[name] = {"auc": aucs, "interval": list(interval)}
            distances = ("-", "-")
            if name in nearest:
                record[name]["nearest"] = nearest[name].tolist()
                closer = (nearest[name] < usual.quantile(0.01)).float().mean().item()
                distances = (f"{nearest[name].median().item():.2f}", f"{100 * closer:.0f}")
            bounds = " to ".join(f"{bound:.3f}" for bound in interval)
            rows.append((name, f"{auc.mean().item():.3f}{spread}", bounds, *distances))
        return Findings(
            (
                "trained on",
                "attack AUC",
                "95 % interval",
                "median distance to the nearest training example",
                "below the 1st percentile, %",
            ),
            rows,
            f"{num} members against {num} {where} {setting.kind}, n = {self.num_seeds}{compared}",
            {"num_members": num, "non_members": where, "usual_nearest": usual.tolist(), "found": record},
        )


def membership_auc(members: Tensor, non_members: Tensor) -> float:
    """Return the area under the ROC curve of the attack that ranks images by their loss; losses (N,) and (M,)."""
    truth = torch.cat([torch.ones_like(members), torch.zeros_like(non_members)])
    return float(roc_auc_score(truth.numpy(), -torch.cat([members, non_members]).numpy()))


def auc_interval(auc: float, num: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of an AUC, for the choice of ``num`` members and as many non-members.

    The standard error is that of Hanley and McNeil, "The meaning and use of the area under a receiver operating
    characteristic (ROC) curve", Radiology 1982. The spread over networks is not part of it.
    """
    two_members, two_others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (num - 1) * (two_members + two_others - 2 * auc**2)
    half = 1.96 * variance**0.5 / num
    return max(auc - half, 0.0), min(auc + half, 1.0)


def _losses(scorer: Scorer, weights: Weights, real: Labelled) -> Tensor:
    logits = scorer.logits(weights, real.images)
    return F.cross_entropy(logits, real.labels, reduction="none").cpu()


def _nearest(subject: Subject, images: Tensor) -> Tensor:
    """Return the distance (N,) of each image to the nearest training image, in pixel space."""
    pixels = subject.transform.to_data(images).flatten(1)
    best = torch.full((len(pixels),), torch.inf, device=pixels.device)
    for batch in subject.train.images.split(1000):
        real = subject.transform.to_data(batch).flatten(1)
        best = best.minimum(torch.cdist(pixels, real).min(1).values)
    return best.cpu()
