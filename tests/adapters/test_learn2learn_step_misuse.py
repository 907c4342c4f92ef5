"""What learn2learn's step on all tasks at once refuses, in one sentence each."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import gradagree_opt as ga

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from gradagree_opt.adapters.learn2learn import meta_step  # noqa: E402

from .learn2learn_cases import ALGORITHMS  # noqa: E402
from .learners import RATE, draw, mse, network  # noqa: E402


def refuses(message, *args, error=ValueError, **options):
    with pytest.raises(error, match=message) as caught:
        meta_step(*args, **options)
    assert "\n" not in str(caught.value)


def test_a_refused_step_changes_neither_grad_nor_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    before = copy.deepcopy(net.state_dict())
    tasks = draw()
    tasks["query"][1][2] = float("nan")
    maml = l2l.algorithms.MAML(net, lr=RATE)
    refuses(r"NaN or inf in tasks \[2\]", maml, mse, tasks, ga.GradientAgreement())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["MAML", "MetaSGD", "GBML"])
def test_a_frozen_parameter_is_named_with_the_option(name):
    net = network()
    net[2].requires_grad_(False)
    algorithm = ALGORITHMS[name](net, False)
    refuses("found '2.weight' frozen; give allow_nograd=True", algorithm, mse, draw(), ga.Mean())


@pytest.mark.parametrize("name", ["MAML", "MetaSGD", "GBML"])
def test_an_unused_parameter_is_named_with_the_option(name, capfd):
    net = network()
    net.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    algorithm = ALGORITHMS[name](net, False)
    message = "found 'spare' not used by the loss; give allow_unused=True"
    refuses(message, algorithm, mse, draw(), ga.Mean())
    assert capfd.readouterr() == ("", "")


def test_a_loss_with_parameters_outside_the_algorithm():
    body, maml = network()[:2], l2l.algorithms.MAML(network()[2], lr=RATE)
    outside = lambda learner, batch: mse(nn.Sequential(body, learner), batch)  # noqa: E731
    refuses("found one with others, which would get no gradient", maml, outside, draw(), ga.Mean())
    body.requires_grad_(False)
    assert meta_step(maml, outside, draw(), ga.Mean()).losses.shape == (4,)


def test_a_query_loss_that_does_not_depend_on_the_learner():
    def loss_fn(learner, batch):
        return mse(learner, batch["pair"]) if "pair" in batch else batch["x"].square().mean()

    tasks = draw()
    tasks = {"support": {"pair": tasks["support"]}, "query": {"x": tasks["query"][0]}}
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    refuses(
        "found one that depends on none of them; compute it by", maml, loss_fn, tasks, ga.Mean()
    )
    assert all(p.grad is None for p in maml.parameters())


def test_a_clone_in_place_of_the_algorithm():
    clone = l2l.algorithms.MAML(network(), lr=RATE).clone()
    message = "found 'module.0.weight' computed from other tensors; give the model itself"
    refuses(message, clone, mse, draw(), ga.Mean())


def test_what_is_no_algorithm():
    message = r"an algorithm with clone\(\) and adapt\(\), found Sequential; wrap the model"
    refuses(message, network(), mse, draw(), ga.Mean(), error=TypeError)


def test_what_is_no_aggregator(without_type_checks):
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    refuses("found the class Mean; call it", maml, mse, draw(), ga.Mean, error=TypeError)


def test_no_inner_step():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    refuses(
        "expected steps to be an integer of 1 or more, found 0",
        maml,
        mse,
        draw(),
        ga.Mean(),
        steps=0,
    )


def test_tasks_without_a_query_set():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    refuses("with a 'query' set", maml, mse, {"support": draw()["support"]}, ga.Mean())


def test_a_loss_that_is_no_scalar():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    vectors = lambda learner, batch: (learner(batch[0]) - batch[1]).square()  # noqa: E731
    refuses("to return a scalar tensor", maml, vectors, draw(), ga.Mean())


def test_first_order_with_an_adapted_transform():
    algorithm = ALGORITHMS["GBML adapting"](network(), True)
    refuses("to be of second order, found first_order=True", algorithm, mse, draw(), ga.Mean())


def test_a_recurrent_module():
    maml = l2l.algorithms.MAML(nn.ModuleDict({"memory": nn.LSTM(3, 4)}), lr=RATE)
    refuses("found LSTM in 'module.memory'; loop over clone", maml, mse, draw(), ga.Mean())


def test_a_buffer_that_the_forward_pass_changes():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(3, 1, dtype=torch.float64)
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    maml = l2l.algorithms.MAML(Counts(), lr=RATE)
    refuses("expected a model that changes no buffer", maml, mse, draw(), ga.Mean())


def test_batch_norm_with_a_cumulative_average():
    maml = l2l.algorithms.MAML(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), lr=RATE)
    refuses("found a cumulative average in 'module.0'", maml, mse, draw(), ga.Mean())


class Square(torch.autograd.Function):
    """Of the classic kind, which torch.func does not run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("kind", ["function", "branch", "checkpoint"])
def test_what_vmap_does_not_run_is_advised_the_loop_that_does(kind):
    def loss_fn(learner, batch):
        x, y = batch
        if kind == "checkpoint":
            out = torch.utils.checkpoint.checkpoint(learner, x, use_reentrant=False)
        else:
            out = learner(x)
        if kind == "branch" and out.sum().item() > 1e9:
            return out.sum()
        return Square.apply(out - y).mean() if kind == "function" else (out - y).square().mean()

    maml = l2l.algorithms.MAML(nn.Linear(1, 1), lr=0.1)
    x = torch.rand(4, 5, 1)
    tasks = {"support": (x, 2 * x), "query": (x, 3 * x)}
    with pytest.raises(RuntimeError, match=r"; take a loop over clone\(\) and adapt\(\)") as caught:
        meta_step(maml, loss_fn, tasks, ga.Mean())
    assert "learn2learn.meta_step" in str(caught.value)
    assert maml.module.weight.grad is None
    batch = ga.TaskBatch(maml, ga.Mean())
    for i in range(4):
        learner = maml.clone()
        learner.adapt(loss_fn(learner, tree_map(lambda leaf, i=i: leaf[i], tasks["support"])))
        loss = loss_fn(learner, tree_map(lambda leaf, i=i: leaf[i], tasks["query"]))
        batch.add(loss, adapted=learner)
    batch.backward()
    assert maml.module.weight.grad.abs() > 0


class Mixed(nn.Module):
    """Examples mixed by a sparse buffer, whose derivative vmap does not know."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.register_buffer("mix", torch.eye(7).double().to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.mix, self.linear(x))


class Attends(nn.Module):
    """Fused attention, whose derivative a second inner step would differentiate."""

    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x):
        h = self.linear(x)[None]
        return self.out(nn.functional.scaled_dot_product_attention(h, h, h)[0])


class Cubed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(context, inputs, output):
        pass

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no derivative here")


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()

    def forward(self, x):
        return Cubed.apply(self.linear(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of sparse products
@pytest.mark.parametrize("name", ["MAML", "MetaSGD", "GBML"])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Mixed, r"Sparse( tensors)?; take a loop"),
        pytest.param(
            Attends,
            "is not implemented; take the math kernel",
            marks=pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 can"),
        ),
        (Custom, "no derivative here"),
    ],
)
def test_what_adapt_cannot_differentiate_is_raised_and_not_printed(name, make, found, capfd):
    algorithm = ALGORITHMS[name](make(), False)
    message = f".*{found}"
    refuses(message, algorithm, mse, draw(), ga.Mean(), steps=2, error=RuntimeError)
    assert capfd.readouterr() == ("", "")
