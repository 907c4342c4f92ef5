"""learn2learn's algorithms on all tasks at once."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from gradagree_opt.adapters.learn2learn import meta_step  # noqa: E402

from .learn2learn_cases import ALGORITHMS, CASES, adapted, loop  # noqa: E402
from .learners import (  # noqa: E402
    RATE,
    STEPS,
    TOLERANCES,
    assert_near,
    detached,
    draw,
    each,
    functional,
    grads,
    mse,
    network,
    vector,
)

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
AGGREGATORS = {
    "paper": ga.GradientAgreement(),
    "mean": ga.Mean(),
    "leaf": ga.GradientAgreement(scope="leaf"),
    "matched": ga.GradientAgreement(match_norm="mean"),
    "drop": ga.GradientAgreement(nonfinite="drop"),
}


def refuses(message, *args, error=ValueError, **options):
    with pytest.raises(error, match=message) as caught:
        meta_step(*args, **options)
    assert "\n" not in str(caught.value)


class Anil(nn.Module):
    """A trained body that does not adapt under a head that does."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))

    def clone(self):
        return Anil(self.body, self.head.clone())

    def adapt(self, loss):
        self.head.adapt(loss)


def anil():
    return Anil(network()[:2], l2l.algorithms.MAML(network()[2], lr=RATE))


@pytest.mark.parametrize(("name", "first_order"), CASES)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_step_equals_the_loop(name, first_order, aggregator):
    looped, stepped = (ALGORITHMS[name](network(), first_order) for _ in range(2))
    expected = loop(looped, draw(), AGGREGATORS[aggregator])
    result = meta_step(stepped, mse, draw(), AGGREGATORS[aggregator], steps=STEPS)
    assert_near(grads(stepped), grads(looped), 1e-12)
    assert_near(vector(result.update.values()), vector(expected.update.values()), 1e-12)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=1e-14)


@each_dtype
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_maml_equals_the_pure_function(dtype, first_order):
    net, tasks = network(dtype), draw(dtype=dtype)
    pure = ga.MAML(functional(net), ga.InnerSGD(RATE, STEPS), first_order=first_order)
    expected = pure.step(detached(net), tasks, ga.GradientAgreement())
    maml = l2l.algorithms.MAML(net, lr=RATE, first_order=first_order)
    result = meta_step(maml, mse, tasks, ga.GradientAgreement(), steps=STEPS)
    assert_near(grads(maml), vector(expected.update.values()), TOLERANCES[dtype])
    torch.testing.assert_close(result.losses, expected.losses)


def test_losses_are_those_after_adaptation():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    result = meta_step(maml, mse, draw(), ga.GradientAgreement(), steps=2)
    expected = [mse(adapted(maml, task, 2), task["query"]).detach() for task in each(draw())]
    torch.testing.assert_close(result.losses, torch.stack(expected))
    assert not result.losses.requires_grad


def test_a_step_adds_to_grad_and_keeps_the_modules_own_parameters():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    before = [*maml.parameters()]
    meta_step(maml, mse, draw(), ga.Mean())
    once = grads(maml)
    meta_step(maml, mse, draw(), ga.Mean())
    assert_near(grads(maml), 2 * once, 1e-12)
    assert all(p is q for p, q in zip(before, maml.parameters(), strict=True))


def test_chunks_of_tasks_change_nothing():
    whole, chunked = (l2l.algorithms.MAML(network(), lr=RATE) for _ in range(2))
    meta_step(whole, mse, draw(), ga.GradientAgreement())
    meta_step(chunked, mse, draw(), ga.GradientAgreement(), chunk_size=3)
    assert_near(grads(chunked), grads(whole), 1e-12)


def test_any_module_with_clone_and_adapt_is_an_algorithm():
    looped, stepped = anil(), anil()
    loop(looped, draw(), ga.GradientAgreement())
    meta_step(stepped, mse, draw(), ga.GradientAgreement(), steps=STEPS)
    assert grads(looped.body).norm() > 0
    assert_near(grads(stepped), grads(looped), 1e-12)


def test_every_task_draws_its_own_dropout_mask():
    dropout = nn.Sequential(nn.Dropout(0.5), network())
    same = {part: tuple(t[:1].expand(4, *t.shape[1:]) for t in b) for part, b in draw().items()}
    result = meta_step(l2l.algorithms.MAML(dropout, lr=RATE), mse, same, ga.Mean())
    assert result.losses.unique().numel() == 4


def images(n=3, classes=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, n, 2 * classes, 1, 28, 28, generator=generator, dtype=torch.float64)
    y = torch.arange(classes).repeat(n, 2)
    return {"support": (x[0], y), "query": (x[1], y)}


def cross_entropy(learner, batch):
    return nn.functional.cross_entropy(learner(batch[0]), batch[1])


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_end_as_after_the_loop(momentum):
    """learn2learn's own network, whose BatchNorm layers have two names each."""
    torch.manual_seed(0)
    net = l2l.vision.models.OmniglotCNN(5, hidden_size=2).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    looped, stepped = (l2l.algorithms.MAML(copy.deepcopy(net), lr=RATE) for _ in range(2))
    for _ in range(2):
        batch = ga.TaskBatch(looped, ga.GradientAgreement())
        for task in each(images()):
            learner = looped.clone()
            learner.adapt(cross_entropy(learner, task["support"]))
            batch.add(cross_entropy(learner, task["query"]), adapted=learner)
        batch.backward()
        meta_step(stepped, cross_entropy, images(), ga.GradientAgreement())
    assert_near(grads(stepped), grads(looped), 1e-12)
    buffers = dict(looped.named_buffers())
    assert buffers["module.base.0.normalize.num_batches_tracked"] == 12
    for name, buffer in stepped.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-14)


def test_batch_norm_in_evaluation_mode_changes_no_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
    before = copy.deepcopy([*net.buffers()])
    meta_step(l2l.algorithms.MAML(net, lr=RATE), mse, draw(), ga.Mean())
    torch.testing.assert_close([*net.buffers()], before, rtol=0, atol=0)


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


def test_frozen_and_unused_parameters_that_are_allowed_change_nothing():
    plain, spare = network(), network()
    spare.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    results = []
    for net in (plain, spare):
        net[0].requires_grad_(False)
        maml = l2l.algorithms.MAML(net, lr=RATE, allow_nograd=True)  # allows unused ones too
        results.append(meta_step(maml, mse, draw(), ga.GradientAgreement()))
    torch.testing.assert_close(results[0].weights, results[1].weights, rtol=1e-12, atol=0)
    for name, leaf in results[0].update.items():
        torch.testing.assert_close(results[1].update[name], leaf, rtol=1e-12, atol=0)
    assert not results[1].update["module.spare"].any()
    assert spare[0].weight.grad is None


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
