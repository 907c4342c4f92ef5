"""Random numbers that are not of torch's global generator, under every engine."""

import random
from functools import partial

import numpy as np
import pytest
import torch

import gradagree_opt as ga

SIZE = 50
TASKS = torch.arange(1.0, 5.0, dtype=torch.float64).unsqueeze(1).expand(4, SIZE)
PARAMS = torch.ones(SIZE, dtype=torch.float64)
AGREE = ga.GradientAgreement()


class Drawer:
    """Masks from one kind of generator, that it keeps where a loss function reaches it."""

    def __init__(self, kind):
        self.kind = kind
        self.own = {
            "torch.Generator": torch.Generator,
            "numpy.random.Generator": np.random.default_rng,
            "numpy.random.RandomState": np.random.RandomState,
            "random.Random": random.Random,
        }.get(kind, lambda: None)()
        self.seed()

    def seed(self):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 - the global one is what is tested
        if self.kind == "torch.Generator":
            self.own.manual_seed(3)
        elif self.kind == "numpy.random.Generator":
            self.own.bit_generator.state = np.random.default_rng(3).bit_generator.state
        elif self.own is not None:
            self.own.seed(3)

    def mask(self):
        if self.kind == "torch.Generator":
            return torch.rand(SIZE, generator=self.own) < 0.5
        draw = {
            "numpy": lambda: np.random.rand(SIZE),  # noqa: NPY002
            "random": lambda: np.array([random.random() for _ in range(SIZE)]),
            "numpy.random.Generator": lambda: self.own.random(SIZE),
            "numpy.random.RandomState": lambda: self.own.rand(SIZE),
            "random.Random": lambda: np.array([self.own.random() for _ in range(SIZE)]),
        }[self.kind]
        return torch.from_numpy(draw() < 0.5)

    def loss(self, params, x):
        """Its gradient is the mask of the task times x, and the loss the sum of that."""
        return (params * self.mask() * x).sum()

    def gradients(self):
        self.seed()
        return torch.stack([self.mask() * x for x in TASKS])


OUTSIDE = ["numpy", "random", "numpy.random.Generator", "numpy.random.RandomState", "random.Random"]
each_kind = pytest.mark.parametrize("kind", [*OUTSIDE, "torch.Generator"])


@each_kind
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_every_pass_over_a_task_draws_the_same(kind, engine):
    drawer = Drawer(kind)
    gradients = drawer.gradients()
    drawer.seed()
    result = ga.aggregate_gradients(drawer.loss, PARAMS, TASKS, AGREE, engine=engine)
    expected = AGREE.aggregate(gradients)
    assert result.engine == "streamed"
    torch.testing.assert_close(result.losses, gradients.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-12, atol=1e-12)


@each_kind
@pytest.mark.parametrize("engine", ["stacked", "matrix_free"])
def test_task_by_task_every_engine_draws_for_each(kind, engine):
    drawer = Drawer(kind)
    gradients = drawer.gradients()
    drawer.seed()
    result = ga.aggregate_gradients(drawer.loss, PARAMS, TASKS, AGREE, engine=engine, chunk_size=1)
    torch.testing.assert_close(result.losses, gradients.sum(1), rtol=1e-12, atol=0)
    expected = AGREE.aggregate(gradients)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-12, atol=1e-12)


@each_kind
def test_the_numbers_after_a_call_are_new_ones(kind):
    drawer = Drawer(kind)
    first, second = (
        ga.aggregate_gradients(drawer.loss, PARAMS, TASKS, AGREE, engine="streamed").losses
        for _ in range(2)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("randomness", ["error", "different"])
def test_one_mask_for_all_tasks_is_refused_and_nothing_is_drawn(kind, randomness):
    drawer = Drawer(kind)
    options = {"randomness": randomness}
    tasks = {"support": TASKS, "query": TASKS}
    inner = ga.InnerSGD(0.1, 1)
    for call in (
        partial(ga.task_gradients, drawer.loss, PARAMS, TASKS, **options),
        partial(ga.Reptile(drawer.loss, inner, **options).step, PARAMS, tasks, AGREE),
        partial(
            ga.aggregate_gradients, drawer.loss, PARAMS, TASKS, AGREE, engine="stacked", **options
        ),
    ):
        drawer.seed()
        with pytest.raises(RuntimeError, match="random numbers of Python or NumPy") as caught:
            call()
        assert str(caught.value).endswith(
            "; take chunk_size=1, where every task draws for itself, or randomness='same'"
        )
        torch.testing.assert_close(
            torch.stack([drawer.mask() * x for x in TASKS]), drawer.gradients()
        )


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("engine", ["stacked", "streamed", "matrix_free"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_the_same_mask_for_all_tasks_is_one_draw(kind, engine, chunk_size):
    drawer = Drawer(kind)
    drawer.seed()
    result = ga.aggregate_gradients(
        drawer.loss,
        PARAMS,
        TASKS,
        ga.Mean(),
        engine=engine,
        chunk_size=chunk_size,
        randomness="same",
    )
    drawer.seed()
    gradients = drawer.mask() * TASKS
    torch.testing.assert_close(result.losses, gradients.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.update, gradients.mean(0), rtol=1e-12, atol=1e-12)


def test_maml_goes_on_to_an_engine_where_every_task_draws():
    drawer = Drawer("numpy")
    maml = ga.MAML(drawer.loss, ga.InnerSGD(0.0, 1))
    result = maml.step(PARAMS, {"support": TASKS, "query": TASKS}, ga.Mean())
    drawer.seed()
    query = []
    for x in TASKS:
        drawer.mask()  # of the support set
        query.append(drawer.mask() * x)
    assert result.engine == "streamed"
    torch.testing.assert_close(result.update, torch.stack(query).mean(0), rtol=1e-12, atol=1e-12)


class Hidden:
    """Behind slots nobody finds it."""

    __slots__ = ("rng",)

    def __init__(self):
        self.rng = np.random.default_rng(3)


@pytest.mark.parametrize("aggregator", [AGREE, ga.GradientAgreement(similarity="cosine")])
def test_draws_that_are_not_found_show_in_the_losses_of_the_passes(aggregator):
    hidden = Hidden()

    def loss(params, x):
        return (params * torch.from_numpy(hidden.rng.random(SIZE)) * x).sum()

    with pytest.raises(
        ValueError, match="expected the same loss of a task at every pass"
    ) as caught:
        ga.aggregate_gradients(loss, PARAMS, TASKS, aggregator, engine="streamed")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected the same loss of a task at every pass"):
        ga.aggregate_gradients(loss, PARAMS, TASKS, AGREE, engine="matrix_free", chunk_size=2)
    once = ga.aggregate_gradients(loss, PARAMS, TASKS, aggregator, engine="stacked", chunk_size=1)
    assert once.losses.isfinite().all()


@pytest.mark.compiled
def test_compiled_it_is_refused_too(without_code_generation):
    drawer = Drawer("random")
    with pytest.raises(
        RuntimeError, match=r"random numbers of Python or NumPy.*take compile=False"
    ):
        ga.aggregate_gradients(drawer.loss, PARAMS, TASKS, AGREE, compile=True)
