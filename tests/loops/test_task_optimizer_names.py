"""TaskOptimizer knows parameters by name where a scope reads names, or says that it does not."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Network()


def by_module(path):
    return path.split(".")[0]


SCOPED = [ga.GradientAgreement(scope=by_module), ga.EqualAgreement(scope=by_module)]
each_aggregator = pytest.mark.parametrize("aggregator", SCOPED)


def losses(module):
    return [module(x).square().sum() + factor for factor, x in enumerate(X)]


def expected_of(module, aggregator):
    tasks = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses(module)]
    names = [name for name, _ in module.named_parameters()]
    stacked = [torch.stack(leaves) for leaves in zip(*tasks, strict=True)]
    return aggregator.aggregate(dict(zip(names, stacked, strict=True)))


def named_sgd(module):
    if torch.__version__ < "2.6":
        pytest.skip("optimizers keep names from torch 2.6 on")
    return torch.optim.SGD(module.named_parameters(), lr=0.1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def two_groups(module):
    """The head first, so that positions are not those of the module."""
    groups = [{"params": module.head.parameters()}, {"params": module.body.parameters()}]
    return torch.optim.SGD(groups, lr=0.1)


CASES = [(named_sgd, False), (named_sgd, True), (sgd, True), (two_groups, True)]


@each_aggregator
@pytest.mark.parametrize(("make", "given"), CASES)
def test_a_function_sees_the_names(module, aggregator, make, given):
    expected = expected_of(module, aggregator)
    optimizer = ga.TaskOptimizer(make(module), aggregator, module=module if given else None)
    result = optimizer.step(losses(module))
    assert result.update.keys() == expected.update.keys()
    for name, update in expected.update.items():
        torch.testing.assert_close(result.update[name], update)
    torch.testing.assert_close(result.weights.sort(0)[0], expected.weights.sort(0)[0])


@each_aggregator
@pytest.mark.parametrize("make", [sgd, two_groups])
def test_without_names_it_is_refused_before_anything_is_done(module, aggregator, make):
    message = r"found none for parameter number 0; give TaskOptimizer\(optimizer, aggregator, mod"
    with pytest.raises(ValueError, match=message) as caught:
        ga.TaskOptimizer(make(module), aggregator)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_added_without_a_name_is_refused_at_the_step(module):
    optimizer = ga.TaskOptimizer(sgd(module), SCOPED[0], module=module)
    optimizer.step(losses(module))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="found none for parameter number 4"):
        optimizer.step(losses(module))
    assert all(map(torch.equal, module.parameters(), before))


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_scopes_that_read_no_names_need_none(module, scope):
    aggregator = ga.GradientAgreement(scope=scope)
    expected = expected_of(module, aggregator)
    result = ga.TaskOptimizer(sgd(module), aggregator=aggregator).step(losses(module))
    assert [*result.update] == ["0", "1", "2", "3"]
    torch.testing.assert_close([*result.update.values()], [*expected.update.values()])
