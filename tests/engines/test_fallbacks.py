"""Models that not every engine runs: what those say that do not, and what "auto" takes instead."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss, scaled_dot_product_attention

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing.configurations import EQUAL

from .models import Model


class LastHidden(nn.Module):
    """An LSTM over the inputs of every example."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)
        self.output = nn.Linear(4, 2)

    def forward(self, x):
        return self.output(self.lstm(x.unsqueeze(-1))[0][:, -1])


class FusedAttention(nn.Module):
    """Its kernel has a first derivative, and no other."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.output = nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.hidden(x).reshape(1, 1, 6, 4)
        return self.output(scaled_dot_product_attention(hidden, hidden, hidden).reshape(6, 4))


class Branch(nn.Module):
    """Python looks at the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-2 * x)


def model(kind):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tasks = (torch.randn(5, 6, 3), torch.randn(5, 6, 2))
        return Model(kind(), mse_loss, tasks)


def aggregate(case, **options):
    return ga.aggregate_gradients(
        case.loss_fn, case.params, case.tasks, ga.GradientAgreement(), **options
    )


def assert_equals_loop(result, case):
    gradients, losses = case.loop()
    expected = ga.GradientAgreement().aggregate(gradients)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.losses, losses)


class RunningStatistics(nn.Module):
    """BatchNorm in training mode writes to its buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


NO_VMAP, STREAMED = "chunk_size=1, which does without vmap", "engine='streamed'"
REFUSALS = {
    (LastHidden, "matrix_free"): NO_VMAP,
    (FusedAttention, "matrix_free"): STREAMED,
    (Branch, "stacked"): NO_VMAP,
    (Branch, "matrix_free"): NO_VMAP,
    (RunningStatistics, "stacked"): STREAMED,
    (RunningStatistics, "matrix_free"): STREAMED,
}
KINDS = (LastHidden, FusedAttention, Branch, RunningStatistics)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["stacked", "matrix_free", "streamed"])
def test_an_engine_runs_the_model_or_says_which_one_does(kind, engine):
    case = model(kind)
    advice = REFUSALS.get((kind, engine))
    if advice is None:
        assert_equals_loop(aggregate(case, engine=engine), case)
    else:
        with pytest.raises(RuntimeError, match=f"a model that engine='{engine}' can run") as caught:
            aggregate(case, engine=engine)
        message = str(caught.value)
        assert message.endswith(f"; take {advice}")
        assert "\n" not in message and ". " not in message
        options = {"chunk_size": 1} if advice == NO_VMAP else {"engine": "streamed"}
        assert_equals_loop(aggregate(case, **({"engine": engine} | options)), case)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        (LastHidden, "stacked"),
        (FusedAttention, "stacked"),
        (Branch, "streamed"),
        (RunningStatistics, "streamed"),
    ],
)
@pytest.mark.parametrize("stack_bytes", [0, 2**40], ids=["large stack", "small stack"])
def test_auto_goes_on_to_an_engine_that_runs_the_model(kind, engine, stack_bytes, monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", stack_bytes)
    case = model(kind)
    result = aggregate(case)
    assert result.engine == engine
    assert_equals_loop(result, case)


@pytest.mark.parametrize(("stack_bytes", "engine"), [(0, "matrix_free"), (2**40, "stacked")])
def test_auto_holds_no_large_stack(stack_bytes, engine, monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", stack_bytes)
    case = model(lambda: nn.Linear(3, 2))
    result = aggregate(case)
    assert result.engine == engine
    assert_equals_loop(result, case)


@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_where_streamed_refuses_the_aggregator_a_loop_is_advised_and_does_it(engine):
    case = model(RunningStatistics)
    aggregate = partial(ga.aggregate_gradients, case.loss_fn, case.params, case.tasks)
    with pytest.raises(RuntimeError, match=r"; take a loop of TaskBatch.add\(loss, …\)$"):
        aggregate(EQUAL.make(), engine=engine)
    batch = ga.TaskBatch(case.module, EQUAL.make())
    for x, y in zip(*case.tasks, strict=True):
        batch.add(mse_loss(case.module(x), y))
    gradients, _ = case.loop()
    torch.testing.assert_close(batch.backward().update, EQUAL.combine(gradients))


def square(once):
    """x² by kernels that autograd does not look into, one of them for forward mode."""

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        @once
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * ctx.saved_tensors[0] * tangent

    return Square


@pytest.mark.parametrize("once", [once_differentiable, torch.no_grad()])
def test_a_backward_pass_that_is_not_recorded_is_never_differentiated(once, monkeypatch):
    def loss_fn(square, params, x):
        return (square(x - params["before"]) @ params["after"]).square()

    def aggregate(square, **options):
        loss = partial(loss_fn, square)
        return ga.aggregate_gradients(loss, params, x, ga.GradientAgreement(), **options)

    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(3, generator=generator) for name in ("before", "after")}
    x = torch.randn(5, 3, generator=generator)
    kernel = square(once)
    expected = aggregate(torch.square, engine="stacked")
    found = [aggregate(kernel.apply, engine="matrix_free")]
    kernel.jvp = torch.autograd.Function.jvp
    with pytest.raises(RuntimeError, match=r"cannot be differentiated; take engine='streamed'$"):
        aggregate(kernel.apply, engine="matrix_free")
    monkeypatch.setattr(candidates, "STACK_BYTES", 0)
    found += [aggregate(kernel.apply, chunk_size=size) for size in (None, 2, 1)]
    for result in found:
        torch.testing.assert_close(result.update, expected.update)
        torch.testing.assert_close(result.weights, expected.weights)


def test_maml_falls_back_too():
    case = model(Branch)
    tasks = {"support": case.tasks, "query": case.tasks}
    maml = ga.MAML(case.loss_fn, ga.InnerSGD(0.1, 1))
    result = maml.step(case.params, tasks, ga.GradientAgreement())
    assert result.engine == "streamed"
    one_by_one = ga.MAML(case.loss_fn, ga.InnerSGD(0.1, 1), chunk_size=1)
    expected = one_by_one.step(case.params, tasks, ga.GradientAgreement())
    assert expected.engine == "one_backward"
    torch.testing.assert_close(result.update, expected.update)


@pytest.mark.compiled
def test_what_cannot_be_compiled_is_not_compiled_again(without_code_generation):
    traced = []

    def loss(w, x):
        return (w * x).square().mean()

    maml = ga.MAML(loss, ga.InnerSGD(0.1, 1), compile=True)
    w, x = torch.ones(3, dtype=torch.bfloat16), torch.rand(4, 2, 3).bfloat16()
    for _ in range(3):
        result = maml.step(w, {"support": x, "query": x}, ga.GradientAgreement())
        traced.append(torch._dynamo.utils.counters["stats"]["calls_captured"])
    assert result.engine == "stacked"
    assert 0 < traced[0] == traced[1] == traced[2]


@pytest.mark.compiled
def test_compiled_auto_says_that_the_model_cannot_be_compiled():
    case = model(Branch)
    with pytest.raises(RuntimeError, match=r"engine='stacked' can run, .*; take compile=False$"):
        aggregate(case, compile=True)


@pytest.mark.parametrize("engine", ["auto", "streamed", "stacked"])
def test_an_error_of_the_model_itself_is_told(engine):
    case = model(lambda: nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        aggregate(case, engine=engine)


@pytest.mark.parametrize("call", ["task_gradients", "Reptile"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Branch, RuntimeError, r"found: .*; take chunk_size=1, which does without vmap$"),
        (RunningStatistics, ValueError, "expected a model that changes no buffer"),
        (lambda: nn.Linear(4, 2), RuntimeError, "^(mm: )?mat1 and mat2 shapes cannot be"),
    ],
    ids=["branch", "batch norm", "shapes"],
)
def test_without_a_choice_of_engines_it_is_one_sentence_too(call, kind, error, message):
    case = model(kind)
    reptile = ga.Reptile(case.loss_fn, ga.InnerSGD(0.1, 1))
    calls = {
        "Reptile": lambda: reptile.step(case.params, {"support": case.tasks}, ga.Mean()),
        "task_gradients": lambda: ga.task_gradients(case.loss_fn, case.params, case.tasks),
    }
    with pytest.raises(error, match=message) as caught:
        calls[call]()
    assert "\n" not in str(caught.value)
