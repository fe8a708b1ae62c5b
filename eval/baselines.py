"""Baselines of a set: the sets of other recipes, and all training data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from condense import tracking
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.layout import kind
from condense.distributed import Ranks
from condense.eval.evaluate import Progress, evaluate, measure, resolved
from condense.eval.journal import CachedCells, CellStore
from condense.eval.protocol import PROTOCOLS, Protocol, own
from condense.eval.results import Result, Scored
from condense.eval.subject import Subject, load_test
from condense.networks import Factory, Functional
from condense.synthetic.set import SyntheticSet
from condense.task import Split, make_task

FULL = "full"
"""Name of the baseline that trains on all training data."""


def compare(
    subject: Subject,
    names: Sequence[str],
    makers: Mapping[str, Callable[[], SyntheticSet]],
    *,
    networks: Sequence[str | Factory],
    num_seeds: int,
    protocols: Sequence[Protocol],
    seed: int,
    compute: Compute,
    on_result: Callable[[Result], None],
    ranks: Ranks = Ranks(),
    split: Scored = "test",
) -> None:
    """Evaluate baselines in the same way as a set. Results of networks that have a name are cached.

    Args:
        subject: the set and its data.
        names: names of the baselines, in order; ``full`` is all training data.
        makers: for every other name, a function that makes its set.
        networks: network strings or callables.
        num_seeds: networks of each architecture.
        protocols: protocols of the set; see ``baseline_protocol``.
        seed: root of every random draw.
        compute: compute policy.
        on_result: called with each result, whose method is the name of the baseline.
        ranks: processes that share the networks.
        split: the images on which networks are scored; ``full`` is always scored on the test images.

    Raises:
        ValueError: see ``evaluate`` and ``full_data``.
    """
    arrays, cache = subject.arrays, subject.cache
    named = all(isinstance(network, str) for network in networks)  # the name of a callable does not identify its code
    journal = CachedCells(cache) if named else None
    for name in names:
        if name == FULL:
            whole = PROTOCOLS["full-graphs" if kind(arrays.input_shape) == "graphs" else "full-data"]
            for network in networks:
                result = full_data(
                    arrays,
                    network=network,
                    num_seeds=num_seeds,
                    protocol=whole,
                    transform=subject.syn.origin.transform_name,
                    seed=seed,
                    compute=compute,
                    device=subject.device,
                    cache=cache,
                    ranks=ranks,
                    journal=journal,
                )
                on_result(result)
            continue
        made = makers[name]()
        ranks.broadcast(list(made.state_dict().values()))
        for protocol in protocols:
            evaluate(
                dataclasses.replace(subject, syn=made),
                networks=networks,
                num_seeds=num_seeds,
                protocol=baseline_protocol(protocol, subject.syn, made),
                seed=seed,
                compute=compute,
                ranks=ranks,
                journal=journal,
                split=split,
                on_result=functools.partial(_named, name, on_result),
            )


def _named(name: str, on_result: Callable[[Result], None], result: Result) -> None:
    on_result(dataclasses.replace(result, method=name))


def baseline_protocol(protocol: Protocol, syn: SyntheticSet, baseline: SyntheticSet) -> Protocol:
    """Return the protocol for a baseline of ``syn``, where ``syn`` is evaluated under ``protocol``.

    If that is ``own``, the baseline is trained under its own training, with the fields that the caller changed.
    A baseline whose labels are probabilities is always trained on these.
    """
    if protocol.name == "own":
        unchanged = own(syn)
        changed = {f.name: getattr(protocol, f.name) for f in dataclasses.fields(protocol)}
        changed = {name: value for name, value in changed.items() if value != getattr(unchanged, name)}
        protocol = dataclasses.replace(own(baseline), **changed)
    if baseline.label_kind.space == "probabilities":
        protocol = dataclasses.replace(protocol, labels="own")
    return protocol


def full_data(
    arrays: Arrays,
    *,
    network: str | Factory,
    num_seeds: int,
    transform: str = "channel",
    protocol: Protocol = PROTOCOLS["full-data"],
    seed: int = 0,
    compute: Compute,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = tracking.progress,
    ranks: Ranks = Ranks(),
    journal: CellStore | None = None,
) -> Result:
    """Train and score networks on all training images under ``protocol``. Networks that ``journal`` holds are not
    trained again.

    Raises:
        ValueError: there are no test images; see also ``make_task`` and ``Functional``.
    """
    task = make_task(
        arrays,
        transform=transform,
        split=Split(val_fraction=0.0),
        network=Functional(network, arrays.input_shape, arrays.num_classes, device),
        augment=Augment(),
        device=device,
        cache=cache,
    )
    (result,) = measure(
        task.train.images,
        task.train.labels,
        load_test(arrays, task.transform, device),
        arrays=arrays,
        transform=task.transform,
        syn=None,
        networks=[task.network],
        protocol=protocol,
        num_seeds=num_seeds,
        seed=seed,
        compute=resolved(compute, task.network, protocol, len(task.train)),
        progress=progress,
        ranks=ranks,
        journal=journal,
    )
    return result
