"""Slow references of the objectives without labels, entry by entry; lists of pairs of outputs are arguments."""

from __future__ import annotations

from torch import Tensor


def barlow_twins(first: Tensor, second: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    """Return the loss for outputs (B, D) of both views, divided by D."""
    num, width = first.shape
    columns = []
    for outputs in (first, second):
        of_view = []
        for i in range(width):
            column = outputs[:, i] - sum(outputs[:, i]) / num
            of_view.append(column / (sum(column * column) / num + eps).sqrt())
        columns.append(of_view)
    total = first.new_zeros(())
    for i in range(width):
        for j in range(width):
            entry = sum(columns[0][i] * columns[1][j]) / num
            total = total + ((1 - entry) ** 2 if i == j else weight * entry**2)
    return total / width


def simclr(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the mean loss of the 2 B ordered pairs of views of one image."""
    num = len(first)
    views = [*first, *second]

    def similarity(i: int, j: int) -> Tensor:
        return views[i] @ views[j] / (views[i].norm() * views[j].norm()) / temperature

    total = first.new_zeros(())
    for i in range(2 * num):
        partner = (i + num) % (2 * num)
        others = sum(similarity(i, k).exp() for k in range(2 * num) if k != i)
        total = total - (similarity(i, partner).exp() / others).log()
    return total / (2 * num)
