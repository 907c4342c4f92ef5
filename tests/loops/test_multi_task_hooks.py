"""Hooks on parameters, where losses of one graph are aggregated by few passes over it."""

import pytest
import torch

import gradagree_opt as ga

from .one_graph import N, Net, backward


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize(
    "aggregator", [ga.Mean(), ga.GradientAgreement(match_norm="mean"), ga.EqualAgreement()]
)
def test_accumulation_hooks_run_once_as_after_backward(aggregator, n):
    module, seen = Net(n), {}
    module.zero_grad()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    for name, p in module.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone())
        )
    result = backward(module, aggregator)
    for name, p in module.named_parameters():
        [grad] = seen[name]
        torch.testing.assert_close(grad, 1 + result.update[name])
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement()])
def test_an_optimizer_in_the_backward_pass_steps_on_the_update(aggregator):
    module, plain = Net(), Net()
    for p in module.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    result = backward(module, aggregator)
    for (name, p), before in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, before - 0.1 * result.update[name])
        assert p.grad is None


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement()])
def test_what_is_refused_runs_no_accumulation_hook(aggregator):
    w = torch.zeros(3, requires_grad=True)
    w.register_post_accumulate_grad_hook(lambda p: pytest.fail("the hook ran"))
    batch = ga.TaskBatch([w], aggregator)
    for loss in (2 * w.sqrt()).unbind():  # of infinite gradient
        batch.add(loss)
    with pytest.raises(ValueError, match="NaN or inf"):
        batch.backward()
    assert w.grad is None


def test_a_hook_on_a_parameter_sees_the_gradient_of_every_task_where_they_are_weighed():
    module, seen = Net(), []
    module.inside.weight.register_hook(lambda grad: seen.append(grad) or grad.clamp(-0.01, 0.01))
    backward(module, ga.GradientAgreement())
    assert len(seen) == N
    seen.clear()
    module.zero_grad()
    backward(module, ga.Mean())
    assert len(seen) == 1
    assert module.inside.weight.grad.abs().max() == 0.01
