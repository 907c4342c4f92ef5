"""Losses and parameters that are refused, where a step would be zero or end in a foreign error."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
AGREE = ga.GradientAgreement()
MODULE = nn.Linear(2, 1)
W = torch.tensor([1.0, -1.0])


def own_parameters(w, x):
    return MODULE(x).square().sum()


def detached(w, x):
    return (w * x).sum().detach()


def constant(w, x):
    return torch.tensor(1.0)


def without_grad(w, x):
    with torch.no_grad():
        return (w * x).sum()


def of_the_data(w, x):
    return x.sum()


def aggregated(**options):
    return lambda loss: ga.aggregate_gradients(loss, W, X, AGREE, **options)


def stepped(make, **options):
    def step(loss):
        return make(loss, ga.InnerSGD(0.1, 1), **options).step(W, {"support": X, "query": X}, AGREE)

    return step


STEPS = {
    **{name: aggregated(engine=name) for name in ("auto", "stacked", "matrix_free", "streamed")},
    "chunks": aggregated(chunk_size=2),
    "one by one": aggregated(chunk_size=1),
    "matrix-free, one by one": aggregated(engine="matrix_free", chunk_size=1),
    "task_gradients": lambda loss: ga.task_gradients(loss, W, X),
    "task_gradients, one by one": lambda loss: ga.task_gradients(loss, W, X, chunk_size=1),
    "MAML": stepped(ga.MAML),
    "FOMAML": stepped(ga.MAML, first_order=True),
    "MAML of gradients": stepped(ga.MAML, signal="gradient"),
    "Reptile": stepped(ga.Reptile),
    **{
        f"{make.__name__}, one by one": stepped(make, chunk_size=1)
        for make in (ga.MAML, ga.Reptile)
    },
    "MAML, streamed": stepped(ga.MAML, engine="streamed"),
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@each_step
@pytest.mark.parametrize("loss", [own_parameters, detached, constant, without_grad, of_the_data])
def test_a_loss_of_no_parameter_is_refused(step, loss):
    with pytest.raises(
        ValueError, match=r"to depend on params, .* take torch.func.functional_call"
    ):
        step(loss)
    step(lambda w, x: loss(w, x) + (w * x).square().sum())


class OwnSquares(nn.MSELoss):
    """Of the parameters and the batch, though its parent is not."""

    def forward(self, params, batch):
        return super().forward(params["w"] * batch["x"], torch.zeros_like(batch["x"]))


OF_TENSORS = [nn.MSELoss(), nn.CrossEntropyLoss(), nn.Bilinear(2, 2, 1), nn.functional.mse_loss]


@pytest.mark.parametrize("loss", OF_TENSORS, ids=["MSE", "CrossEntropy", "Bilinear", "mse_loss"])
def test_a_loss_of_torch_is_refused_where_a_model_has_to_come_first(loss):
    params, x = {"w": W}, {"x": X}
    sgd, tasks = ga.InnerSGD(0.1, 1), {"support": x, "query": x}
    rates = {"params": params, "lr": {"w": torch.ones(2)}}
    for step in (
        lambda: ga.aggregate_gradients(loss, params, x, AGREE),
        lambda: ga.aggregate_gradients(loss, params, x, AGREE, engine="streamed"),
        lambda: ga.aggregate_gradients(loss, W, x, AGREE, engine="matrix_free"),
        lambda: ga.task_gradients(loss, params, X, chunk_size=1),
        lambda: ga.MAML(loss, sgd).step(params, tasks, AGREE),
        lambda: ga.Reptile(loss, sgd).adapt(params, {"x": X[0]}),
        lambda: ga.Reptile(loss, sgd).step(params, tasks, AGREE),
        lambda: ga.MetaSGD(loss, 1).step(rates, tasks, AGREE),
    ):
        with pytest.raises(TypeError, match=r"of \(params, batch\), found torch.nn.s, .*; give"):
            step()


def test_a_loss_of_torch_is_taken_where_parameters_and_batch_are_its_tensors():
    found = ga.aggregate_gradients(nn.MSELoss(), W, X, ga.Mean()).update
    torch.testing.assert_close(found, (W - X).mean(0))


def test_a_loss_made_of_one_of_torch_is_taken():
    expected = ga.aggregate_gradients(lambda w, x: (w * x).square().mean(), W, X, AGREE)
    found = ga.aggregate_gradients(OwnSquares(), {"w": W}, {"x": X}, AGREE)
    torch.testing.assert_close(found.update["w"], expected.update, rtol=0, atol=0)


@each_step
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_loss_that_is_no_real_number_is_refused(step, dtype):
    with pytest.raises(ValueError, match=f"a real floating-point loss, found {dtype}; give what"):
        step(lambda w, x: (w * x).sum().to(dtype))


@pytest.mark.compiles
@pytest.mark.parametrize("loss", [own_parameters, detached, constant, without_grad, of_the_data])
@pytest.mark.parametrize(
    "step",
    [
        aggregated(compile=True),
        stepped(ga.MAML, compile=True),
        stepped(ga.MAML, compile=True, chunk_size=1),
        stepped(ga.Reptile, compile=True),
        stepped(ga.Reptile, compile=True, chunk_size=1),
    ],
    ids=["aggregate_gradients", "MAML", "MAML, one by one", "Reptile", "Reptile, one by one"],
)
def test_a_loss_of_no_parameter_is_refused_before_it_is_compiled(step, loss):
    with pytest.raises(
        ValueError, match=r"to depend on params, .* take torch.func.functional_call"
    ):
        step(loss)


@pytest.mark.parametrize(
    "options",
    [{"engine": "streamed"}, {"chunk_size": 1}, {"engine": "matrix_free", "chunk_size": 1}],
    ids=str,
)
def test_a_single_task_may_have_a_loss_of_no_parameter(options):
    def loss(w, x):
        return (w * x).square().sum() if x[0] > 0.7 else x.sum()

    found = ga.aggregate_gradients(loss, W, X, ga.Mean(), **options).update
    torch.testing.assert_close(found, 2 * (W * X.square())[:2].sum(0) / 3)


def test_a_loss_looked_at_without_a_gradient_is_taken():
    seen = []

    def inner(loss, params, support, *, first_order=False, steps=None):
        with torch.no_grad():
            seen.append(loss(params, support))
        return params - 0.1 * torch.func.grad(loss)(params, support)

    def loss(w, x):
        return ((w - x) ** 2).sum()

    tasks = {"support": X, "query": X}
    found = ga.MAML(loss, inner).step(W, tasks, ga.Mean()).update
    expected = ga.MAML(loss, ga.InnerSGD(0.1, 1)).step(W, tasks, ga.Mean()).update
    torch.testing.assert_close(found, expected)
    assert seen


@dataclass
class Scaled:
    """Not to be hashed, as a dataclass that can be compared."""

    factor: float

    def __call__(self, w, x):
        return self.factor * ((w - x) ** 2).sum()


@pytest.mark.parametrize(
    "loss", [Scaled(2.0), type("Own", (Scaled,), {"__hash__": None})(2.0)], ids=["dataclass", "own"]
)
def test_a_compiled_loss_that_cannot_be_known_again_is_refused(loss):
    params, tasks = torch.zeros(2), torch.rand(3, 2)
    with pytest.raises(TypeError, match=r"cannot be hashed; give it to dataclass"):
        ga.aggregate_gradients(loss, params, tasks, ga.Mean(), compile=True)
    found = ga.aggregate_gradients(loss, params, tasks, ga.Mean()).update
    torch.testing.assert_close(found, -4 * tasks.mean(0))


@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_sparse_parameters_are_refused(engine):
    params = {"w": W, "table": torch.eye(2).to_sparse()}
    with pytest.raises(
        TypeError, match=r"dense parameters, found torch.sparse_coo in 'table'; give"
    ):
        ga.aggregate_gradients(lambda p, x: (p["w"] * x).sum(), params, X, AGREE, engine=engine)
