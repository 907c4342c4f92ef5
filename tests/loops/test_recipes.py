"""What docs/recipes.md says of numbers, beside the same computed by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import gradagree_opt as ga

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 16, 1, generator=torch.Generator().manual_seed(1))
AGREE = ga.GradientAgreement()
named_groups = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 6),
    reason="optimizers take named parameters from torch 2.6 on",
)


class Questions(nn.Module):
    """One trunk, a head for each question."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def losses(self):
        features = self.trunk(X).tanh()
        return [mse_loss(head(features), y) for head, y in zip(self.heads, Y, strict=True)]


@pytest.fixture
def model():
    torch.manual_seed(2)
    return Questions()


def gradient(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True)


def by_agreement(losses, parameters):
    parameters = list(parameters)
    rows = [gradient(loss, parameters) for loss in losses]
    return AGREE([torch.stack(leaves) for leaves in zip(*rows, strict=True)])


@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_agreement_on_the_trunk_leaves_the_heads_the_mean(model, memory):
    losses = model.losses()
    trunk = by_agreement(losses, model.trunk.parameters())
    heads = gradient(torch.stack(losses).mean(), model.heads.parameters())
    torch.stack(losses).mean().backward(inputs=list(model.heads.parameters()), retain_graph=True)
    batch = ga.TaskBatch(model.trunk, AGREE, memory=memory)
    if memory == "stream":
        losses = [model.losses()[i] for i in range(3)]  # each on a graph of its own
    for loss in losses:
        batch.add(loss)
    batch.backward()
    torch.testing.assert_close([p.grad for p in model.trunk.parameters()], trunk)
    torch.testing.assert_close([p.grad for p in model.heads.parameters()], list(heads))


@pytest.mark.parametrize("kind", ["norm", "value", "large norm"])
def test_a_hook_of_the_optimizer_clips_the_aggregation(model, kind):
    limit = {"norm": 0.01, "value": 0.001, "large norm": 100.0}[kind]
    clip = nn.utils.clip_grad_value_ if kind == "value" else nn.utils.clip_grad_norm_
    optimizer = torch.optim.SGD(model.trunk.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: clip(model.trunk.parameters(), limit) and None)
    update = by_agreement(model.losses(), model.trunk.parameters())
    before = [p.detach().clone() for p in model.trunk.parameters()]
    norm = torch.cat([leaf.flatten() for leaf in update]).norm()
    if kind == "value":
        expected = [b - leaf.clamp(-limit, limit) for b, leaf in zip(before, update, strict=True)]
    else:
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        expected = [b - factor * leaf for b, leaf in zip(before, update, strict=True)]
    ga.TaskOptimizer(optimizer, AGREE).step(model.losses())
    torch.testing.assert_close([p.detach() for p in model.trunk.parameters()], expected)


@named_groups
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_group_added_later_is_weighted_with_the_others(model, kind):
    optimizer = kind(model.trunk.named_parameters(), lr=0.1)
    tasks = ga.TaskOptimizer(optimizer, AGREE)
    tasks.step(model.losses())
    tasks.zero_grad()
    optimizer.add_param_group({"params": list(model.heads[0].named_parameters()), "lr": 0.01})
    parameters = [*model.trunk.parameters(), *model.heads[0].parameters()]
    losses = [loss + 0 * sum(p.sum() for p in parameters) for loss in model.losses()]
    expected = by_agreement(losses, parameters)
    head = model.heads[0].weight.detach().clone()
    tasks.step(losses)
    torch.testing.assert_close([p.grad for p in parameters], expected)
    assert not torch.equal(model.heads[0].weight, head)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_sum_is_what_a_loop_that_sums_did(model, scale):
    losses = [scale * loss for loss in model.losses()]
    expected = gradient(sum(losses), model.parameters())
    batch = ga.TaskBatch(model, ga.Sum())
    for loss in losses:
        batch.add(loss)
    batch.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("aggregator", [ga.Sum(), AGREE, ga.EqualAgreement()], ids=repr)
def test_learned_weights_of_losses_train_as_before_beside_an_aggregated_trunk(model, aggregator):
    reference = copy.deepcopy(model).double()
    learned = []
    for net, ours in ((model, True), (reference, False)):
        like = net.trunk.weight
        weights = nn.Parameter(like.new_zeros(3))
        optimizer = torch.optim.SGD([*net.parameters(), weights], lr=0.5)
        trunk, own = list(net.trunk.parameters()), [weights, *net.heads.parameters()]
        for _ in range(3):
            features = net.trunk(X.to(like)).tanh()
            losses = [
                mse_loss(head(features), y.to(like)) for head, y in zip(net.heads, Y, strict=True)
            ]
            weighted = torch.exp(-weights) * torch.stack(losses) + weights
            optimizer.zero_grad()
            if ours:
                weighted.sum().backward(inputs=own, retain_graph=True)
                batch = ga.TaskBatch(net.trunk, aggregator)
                for loss in weighted:
                    batch.add(loss)
                batch.backward()
            else:
                rows = [gradient(loss, trunk) for loss in weighted]
                update = aggregator([torch.stack(leaves) for leaves in zip(*rows, strict=True)])
                for p, grad in zip(trunk, update, strict=True):
                    p.grad = grad
                for p, grad in zip(own, gradient(weighted.sum(), own), strict=True):
                    p.grad = grad
            optimizer.step()
        learned.append([p.double() for p in (weights, *net.parameters())])
    torch.testing.assert_close(*learned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregator", [ga.Sum(), AGREE, ga.EqualAgreement()], ids=repr)
def test_the_update_of_the_features_passes_through_the_trunk(model, aggregator):
    """The weights of the tasks are those of the features, the gradients those of the trunk."""
    trunk = list(model.trunk.parameters())
    features = model.trunk(X).tanh()
    z = features.detach().requires_grad_()
    batch = ga.TaskBatch([z], aggregator)
    for head, y in zip(model.heads, Y, strict=True):
        batch.add(mse_loss(head(z), y))
    batch.backward()
    features.backward(z.grad)
    features = model.trunk(X).tanh()
    losses = [mse_loss(head(features), y) for head, y in zip(model.heads, Y, strict=True)]
    stack = torch.stack([gradient(loss, [features])[0] for loss in losses])
    weights = aggregator.aggregate(stack).weights
    expected = gradient(sum(w * loss for w, loss in zip(weights, losses, strict=True)), trunk)
    torch.testing.assert_close([p.grad for p in trunk], list(expected), rtol=1e-4, atol=1e-6)


def clients_of(server, count=4):
    """States after local training on data of unequal size and scale, and their shares."""
    draws, states = torch.Generator().manual_seed(0), []
    sizes = [8 * (1 + i) for i in range(count)]
    for i, size in enumerate(sizes):
        client = copy.deepcopy(server)
        local = torch.optim.SGD(client.parameters(), lr=0.1)
        x = (1 + i) * torch.randn(size, 4, generator=draws, dtype=torch.float64)
        y = torch.randn(size, 1, generator=draws, dtype=torch.float64)
        for _ in range(5):
            local.zero_grad()
            mse_loss(client(x), y).backward()
            local.step()
        states.append(client.state_dict())
    return states, torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


@pytest.fixture
def server():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)
        ).double()


def moved(server, states, factors):
    old = server.state_dict()
    return {
        name: torch.stack([f * (s[name] - old[name]) for f, s in zip(factors, states, strict=True)])
        for name, _ in server.named_parameters()
    }


def test_the_mean_of_scaled_client_updates_is_the_average_by_their_shares(server):
    states, shares = clients_of(server)
    update = ga.Mean()(moved(server, states, len(states) * shares))
    for name, p in server.named_parameters():
        expected = sum(share * s[name] for share, s in zip(shares, states, strict=True))
        torch.testing.assert_close(p.detach() + update[name], expected)


def test_shares_of_clients_change_the_length_of_equal_agreement_alone(server):
    states, shares = clients_of(server)
    alike = moved(server, states, torch.ones(4))
    scaled = moved(server, states, len(states) * shares)
    for aggregator, parallel in ((ga.EqualAgreement(), True), (AGREE, False)):
        a, b = (
            torch.cat([leaf.flatten() for leaf in aggregator(stack).values()])
            for stack in (alike, scaled)
        )
        cosine = float(a @ b / a.norm() / b.norm())
        assert (cosine > 1 - 1e-9) == parallel
        assert not torch.allclose(a, b)
    rows = torch.cat([leaf.flatten(1) for leaf in alike.values()], 1)
    rows = (len(states) * shares).unsqueeze(1) * rows
    scores = rows @ rows.sum(0)
    torch.testing.assert_close(b, rows.T @ scores / scores.abs().sum())


@pytest.mark.parametrize("aggregator", [ga.Mean(), AGREE, ga.EqualAgreement()], ids=repr)
def test_a_server_that_steps_takes_the_update_of_its_clients(server, aggregator):
    states, _ = clients_of(server)
    update = aggregator(moved(server, states, torch.ones(4)))
    expected = {name: p.detach() + update[name] for name, p in server.named_parameters()}
    buffers = {name: each.clone() for name, each in server.named_buffers()}
    batch = ga.TaskBatch(server, aggregator)
    for state in states:
        client = copy.deepcopy(server)
        client.load_state_dict(state)
        batch.add(adapted=client)
    batch.backward()
    torch.optim.SGD(server.parameters(), lr=1.0).step()
    torch.testing.assert_close({n: p.detach() for n, p in server.named_parameters()}, expected)
    torch.testing.assert_close(dict(server.named_buffers()), buffers)


def test_an_aggregated_running_variance_can_become_negative(server):
    """Why docs/recipes.md averages the buffers."""
    states, _ = clients_of(server)
    old = server.state_dict()
    floats = [name for name, each in old.items() if each.is_floating_point()]
    update = ga.EqualAgreement()({n: torch.stack([s[n] - old[n] for s in states]) for n in floats})
    assert (old["1.running_var"] + update["1.running_var"]).min() < 0


@named_groups
def test_a_name_that_two_groups_have_is_refused_for_a_scope_by_name(model):
    optimizer = torch.optim.SGD(model.trunk.named_parameters(), lr=0.1)
    tasks = ga.TaskOptimizer(optimizer, ga.GradientAgreement(scope=lambda path: str(path)))
    optimizer.add_param_group({"params": list(model.heads[0].named_parameters())})
    before = model.trunk.weight.detach().clone()
    with pytest.raises(ValueError, match=r"found one name twice; give TaskOptimizer\(optimizer"):
        tasks.step(model.losses())
    assert torch.equal(model.trunk.weight, before)


def test_the_loss_of_a_learner_alone_is_agreement_of_the_meta_gradients(model):
    """What docs/adapters/plain.md says of Equal Agreement in MAML, beside ga.MAML."""
    trunk = dict(model.trunk.named_parameters())
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))

    def loss_fn(params, direction):
        return (
            (torch.func.functional_call(model.trunk, params, (X,)).tanh() - direction)
            .square()
            .mean()
        )

    batch = ga.TaskBatch(model.trunk, ga.EqualAgreement())
    for direction in directions:
        grads = torch.autograd.grad(loss_fn(trunk, direction), trunk.values(), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(trunk.items(), grads, strict=True)}
        batch.add(loss_fn(adapted, direction))
    found = batch.backward()
    tasks = {"support": directions, "query": directions}
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=1), signal="gradient")
    expected = maml.step(trunk, tasks, ga.EqualAgreement())
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.update, expected.update, rtol=1e-4, atol=1e-6)
