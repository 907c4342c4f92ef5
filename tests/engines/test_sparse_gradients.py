"""Sparse gradients of embeddings: as those of a dense one, or refused with what makes them so."""

import pytest
import torch
from torch.nn.functional import embedding, embedding_bag

import gradagree_opt as ga

WORDS = {"w": torch.randn(6, 3, generator=torch.Generator().manual_seed(0))}
TASKS = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(1))
AGREE = ga.GradientAgreement()
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because")


def look_up(params, batch, *, sparse=True):
    return embedding(batch, params["w"], sparse=sparse).square().mean()


def bag(params, batch, *, sparse=True):
    return embedding_bag(batch[None], params["w"], sparse=sparse, mode="sum").square().mean()


def tied(params, batch, *, sparse=True):
    return look_up(params, batch, sparse=sparse) + 0.1 * look_up(params, batch[:2], sparse=sparse)


def expected(loss_fn):
    rows = []
    for task in TASKS:
        w = WORDS["w"].clone().requires_grad_()
        rows.append(torch.autograd.grad(loss_fn({"w": w}, task, sparse=False), w)[0])
    return torch.stack(rows)


LOSSES = (look_up, bag, tied)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_one_task_after_the_other_they_are_right_and_dense(loss_fn):
    rows = expected(loss_fn)
    gradients = ga.task_gradients(loss_fn, WORDS, TASKS, chunk_size=1).gradients["w"]
    torch.testing.assert_close(gradients, rows)
    for options in ({"engine": "stacked", "chunk_size": 1}, {"engine": "streamed"}, {}):
        result = ga.aggregate_gradients(loss_fn, WORDS, TASKS, AGREE, **options)
        torch.testing.assert_close(result.update["w"], AGREE(rows))
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1), chunk_size=1)
    result = reptile.step(WORDS, {"support": TASKS}, AGREE)
    torch.testing.assert_close(result.update["w"], AGREE(0.1 * rows))


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_all_at_once_they_are_right_or_the_advice_is(loss_fn):
    rows = expected(loss_fn)
    try:
        found = ga.task_gradients(loss_fn, WORDS, TASKS).gradients["w"]
    except RuntimeError as error:
        assert str(error).endswith("; take chunk_size=1, which does without vmap")  # noqa: PT017 - or right
    else:
        torch.testing.assert_close(found, rows)
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1))
    try:
        update = reptile.step(WORDS, {"support": TASKS}, AGREE).update["w"]
    except RuntimeError as error:
        assert str(error).endswith("; take chunk_size=1, which does without vmap")  # noqa: PT017 - or right
    else:
        torch.testing.assert_close(update, AGREE(0.1 * rows))
