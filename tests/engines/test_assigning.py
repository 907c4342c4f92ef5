"""Tensors that a forward pass assigns: the module is left as it was, or the model is refused."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import gradagree_opt as ga

from .models import Model


class Outputs(nn.Module):
    """An attention map, an auxiliary loss and a list of features, as attributes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.map = None
        self.features = []

    def forward(self, x):
        y = self.linear(x)
        self.map, self.penalty = y.softmax(-1), y.square().mean()
        self.features.append(y)
        return y * self.map


class WithHook(nn.Module):
    """What a forward hook keeps, in a dict of its closure and in an object of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kept = kept = {}
        self.linear.register_forward_hook(lambda module, args, output: kept.update(y=output))
        self.keeper = Keeper()
        self.linear.register_forward_hook(self.keeper.hook)

    def forward(self, x):
        return self.linear(x).tanh()


class Keeper:
    def hook(self, module, args, output):
        self.output = {"deep": [output]}


class Moving(nn.Module):
    """A running mean; ``change`` says how it moves."""

    def __init__(self, change):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.change = change

    def forward(self, x):
        y = self.linear(x)
        new = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        if self.change == "assign":
            self.mean = new
        elif self.change == "data":
            self.mean.data = new
        else:
            self.mean.copy_(new)
        return y - 0.5 * self.mean


def spectral():
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4), n_power_iterations=1)
    with torch.no_grad():  # not yet converged
        linear.parametrizations.weight[0]._u.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    return nn.Sequential(linear, nn.Linear(4, 2))


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x):
        return self.norm(self.linear(x).T.unsqueeze(0)).squeeze(0).T


OUTPUTS = {"attributes": Outputs, "hooks": WithHook}
BUFFERS = {
    "assigned": partial(Moving, "assign"),
    "data": partial(Moving, "data"),
    "in place": partial(Moving, "copy"),
    "spectral norm": spectral,
    "instance norm": Instance,
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
}


def model(make):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Model(make(), mse_loss, (torch.randn(5, 6, 3), torch.randn(5, 6, 2)))


CALLS = {
    **{
        engine: lambda case, engine=engine: ga.aggregate_gradients(
            case.loss_fn, case.params, case.tasks, ga.GradientAgreement(), engine=engine
        )
        for engine in ("auto", "stacked", "matrix_free")
    },
    "task_gradients": lambda case: ga.task_gradients(case.loss_fn, case.params, case.tasks),
    "MAML": lambda case: maml(case).step(case.params, both(case), ga.Mean()),
    "MAML.adapt": lambda case: maml(case).adapt(case.params, first(case)),
    "Reptile": lambda case: reptile(case).step(case.params, both(case), ga.Mean()),
    "Reptile.adapt": lambda case: reptile(case).adapt(case.params, first(case)),
}
each_call = pytest.mark.parametrize("call", CALLS)


def maml(case):
    return ga.MAML(case.loss_fn, ga.InnerSGD(0.1, 2))


def reptile(case):
    return ga.Reptile(case.loss_fn, ga.InnerSGD(0.1, 2))


def both(case):
    return {"support": case.tasks, "query": case.tasks}


def first(case):
    return case.tasks[0][0], case.tasks[1][0]


def assert_usable(module):
    """It runs, saves and loads."""
    copy.deepcopy(module)(torch.randn(6, 3)).sum().backward()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True))


@each_call
@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_forward_assigns_is_taken_away_again(kind, call):
    case = model(OUTPUTS[kind])
    CALLS[call](case)
    module = case.module
    if kind == "attributes":
        assert module.map is None and not hasattr(module, "penalty") and module.features == []
    else:
        assert module.kept == {} and not hasattr(module.keeper, "output")
    assert_usable(module)


def test_values_that_were_there_are_there_again():
    case = model(Outputs)
    case.module(case.tasks[0][0])
    before = dict(vars(case.module))
    CALLS["MAML"](case)
    assert case.module.map is before["map"] and case.module.penalty is before["penalty"]
    assert len(case.module.features) == 1


def test_an_auxiliary_loss_that_forward_assigns_counts():
    case = model(Outputs)

    def loss_fn(params, batch):
        y = functional_call(case.module, params, (batch[0],))
        return mse_loss(y, batch[1]) + case.module.penalty

    found = ga.task_gradients(loss_fn, case.params, case.tasks)
    for i in range(5):
        loss = mse_loss(case.module(case.tasks[0][i]), case.tasks[1][i]) + case.module.penalty
        expected = torch.autograd.grad(loss, case.module.linear.weight)[0]
        torch.testing.assert_close(found.gradients["linear.weight"][i], expected)


HOOKED = {}


def keep(module, args, output):
    """As of a script that has its features in a global."""
    HOOKED["features"] = output


def test_what_a_hook_keeps_in_a_global_is_left_too():
    module = nn.Linear(3, 2)
    module.register_forward_hook(keep)
    case = Model(module, mse_loss, (torch.randn(5, 6, 3), torch.randn(5, 6, 2)))
    ga.task_gradients(case.loss_fn, case.params, case.tasks)
    assert HOOKED == {}


class Output:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("assigned", [True, False])
def test_what_a_hook_keeps_in_a_variable_around_it_is_left_too(assigned):
    if assigned:
        kept = None

    def keep_output(module, args, output):
        nonlocal kept
        kept = Output(output)

    module = nn.Linear(3, 2)
    module.register_forward_hook(keep_output)
    case = Model(module, mse_loss, (torch.randn(5, 6, 3), torch.randn(5, 6, 2)))
    ga.task_gradients(case.loss_fn, case.params, case.tasks)
    if assigned:
        assert kept is None
    else:
        with pytest.raises(NameError):
            assert kept


class Takes(nn.Linear):
    """Takes an entry and an attribute away, as of something that is asked for once."""

    def forward(self, x):
        self.__dict__.pop("first", None)
        self.once.pop("first", None)
        return super().forward(x)


def test_what_forward_takes_away_is_there_again():
    module = Takes(3, 2)
    module.first, module.once = 1, {"first": 1}
    case = Model(module, mse_loss, (torch.randn(5, 6, 3), torch.randn(5, 6, 2)))
    ga.task_gradients(case.loss_fn, case.params, case.tasks)
    assert module.first == 1 and module.once == {"first": 1}


@each_call
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_change_are_refused_and_as_they_were(kind, call):
    case = model(BUFFERS[kind])
    before = copy.deepcopy(case.module.state_dict())
    if call == "auto":
        assert CALLS[call](case).engine == "streamed"
        return
    with pytest.raises((RuntimeError, ValueError), match=r"^expected a model that ") as caught:
        CALLS[call](case)
    if call not in ("stacked", "matrix_free", "Reptile"):  # which name another way
        assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(case.module.state_dict(), before, rtol=0, atol=0)
    assert_usable(case.module)


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_streamed_changes_buffers_as_one_pass_over_the_tasks(kind, engine):
    case = model(BUFFERS[kind])
    twin = Model(copy.deepcopy(case.module), mse_loss, case.tasks)
    gradients, losses = twin.loop()
    result = ga.aggregate_gradients(
        case.loss_fn, case.params, case.tasks, ga.GradientAgreement(), engine=engine
    )
    expected = ga.GradientAgreement().aggregate(gradients)
    torch.testing.assert_close(result.losses, losses)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(case.module.state_dict(), twin.module.state_dict())


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["assigned", "spectral norm", "instance norm"])
def test_compiled_too_it_is_refused(kind, without_code_generation):
    case = model(BUFFERS[kind])
    before = copy.deepcopy(case.module.state_dict())
    compiled = ga.MAML(case.loss_fn, ga.InnerSGD(0.1, 1), compile=True)
    with pytest.raises((RuntimeError, ValueError), match="expected a model that"):
        compiled.step(case.params, both(case), ga.Mean())
    torch.testing.assert_close(case.module.state_dict(), before, rtol=0, atol=0)
