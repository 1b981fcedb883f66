"""Losses: missing labels, priors, and the published formula."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from common.schema import Task
from common.tasks import stage_loss

TASKS = {"covid": Task(), "source": Task(kind="multiclass", classes=["a", "b", "c"], weight=0.5)}
NAN = float("nan")


def batch(seed: int, n: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    outputs = {"covid": torch.randn(n, 1, generator=g), "source": torch.randn(n, 3, generator=g)}
    targets = {"covid": torch.randint(0, 2, (n,), generator=g).double(), "source": torch.randint(0, 3, (n,), generator=g).double()}
    return outputs, targets


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(0, 8))
def test_missing_labels_change_nothing(seed: int, n: int, extra: int) -> None:
    outputs, targets = batch(seed, n)
    more = {t: torch.cat([z, torch.full((extra, z.shape[1]), float("inf"))]) for t, z in outputs.items()}
    none = {t: torch.cat([y, torch.full((extra,), NAN, dtype=torch.float64)]) for t, y in targets.items()}
    alone, padded = stage_loss(TASKS, outputs, targets, {}), stage_loss(TASKS, more, none, {})
    assert torch.equal(alone.total, padded.total)
    assert alone.sums == padded.sums


def test_infinite_output_of_an_unlabelled_row_has_no_gradient() -> None:
    z = torch.tensor([[0.3], [float("inf")]], requires_grad=True)
    loss = stage_loss({"covid": Task()}, {"covid": z}, {"covid": torch.tensor([1.0, NAN])}, {})
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad[1].item() == 0.0
    assert torch.isfinite(z.grad).all()


def test_formula_with_priors() -> None:
    """BCE + gamma CE(z + tau log pi): arXiv 2604.03320, eq. of the total loss; the binary prior is the difference of its two classes'."""
    outputs, targets = batch(3, 6)
    targets["source"][2] = NAN
    pi = torch.tensor([0.7, 0.2, 0.1]).log()
    pb = torch.tensor([0.8, 0.2]).log()
    loss = stage_loss(TASKS, outputs, targets, {"source": pi, "covid": pb})
    rows = [0, 1, 3, 4, 5]
    expected = F.binary_cross_entropy_with_logits(outputs["covid"][:, 0] + pb[1] - pb[0], targets["covid"].float())
    expected = expected + 0.5 * F.cross_entropy(outputs["source"][rows] + pi, targets["source"][rows].long())
    torch.testing.assert_close(loss.total, expected)


def test_binary_equals_two_class_softmax() -> None:
    """A sigmoid on z with the priors' difference is a softmax on (0, z) with the priors themselves."""
    z, y, prior = torch.tensor([[0.4], [-1.2]]), torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.1]).log()
    one = stage_loss({"t": Task()}, {"t": z}, {"t": y}, {"t": prior}).total
    two = F.cross_entropy(torch.cat([torch.zeros(2, 1), z], 1) + prior, y.long())
    torch.testing.assert_close(one, two)


@given(st.integers(0, 100), st.integers(2, 9), st.integers(2, 4))
def test_parts_of_a_batch_add_up(seed: int, n: int, parts: int) -> None:
    outputs, targets = batch(seed, n)
    targets["source"][0] = NAN
    labelled = {t: int(torch.isfinite(y).sum()) for t, y in targets.items()}
    whole = stage_loss(TASKS, outputs, targets, {}).total
    pieces = [torch.arange(n)[i::parts] for i in range(parts)]
    split = [
        stage_loss(TASKS, {t: z[i] for t, z in outputs.items()}, {t: y[i] for t, y in targets.items()}, {}, labelled).total for i in pieces
    ]
    np.testing.assert_allclose(sum(float(s) for s in split), float(whole), rtol=1e-5)


def test_a_batch_without_labels_has_no_loss() -> None:
    outputs, _ = batch(1, 2)
    nothing = {t: torch.tensor([NAN, NAN]) for t in outputs}
    assert float(stage_loss(TASKS, outputs, nothing, {}).total) == 0.0
