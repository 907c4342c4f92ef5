"""Threads that share an aggregator, a loss function and an algorithm get the numbers of one."""

from functools import partial
from threading import Thread

import pytest
import torch

import gradagree_opt as ga

DRAWS = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, 3, generator=DRAWS, dtype=torch.float64)
PARAMS = {"w": torch.randn(3, 2, generator=DRAWS, dtype=torch.float64)}
TASKS = {"support": X[:, :3], "query": X[:, 3:]}
AGREE = ga.GradientAgreement()


def loss_fn(params, x):
    return (x @ params["w"]).tanh().square().mean()


def aggregated(engine, chunk_size):
    options = {"engine": engine, "chunk_size": chunk_size}
    return partial(ga.aggregate_gradients, loss_fn, PARAMS, X, AGREE, **options)


STEPS = {
    **{
        f"{engine}, chunks of {size}": aggregated(engine, size)
        for engine in ("stacked", "streamed", "matrix_free")
        for size in (None, 1, 2)
    },
    "MAML": partial(ga.MAML(loss_fn, ga.InnerSGD(0.1, 2)).step, PARAMS, TASKS, AGREE),
    "Reptile": partial(ga.Reptile(loss_fn, ga.InnerSGD(0.1, 2)).step, PARAMS, TASKS, AGREE),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_thread_has_the_update_of_one(step):
    expected, found = step().update["w"], []

    def run():
        found.extend(step().update["w"] for _ in range(20))

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for update in found:
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-14)
