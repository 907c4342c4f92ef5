"""Agreement as the first transformation of a TorchOpt chain."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing.configurations import EQUAL, PAPER

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

from gradagree_opt.adapters.torchopt import aggregate  # noqa: E402

from .torchopt_cases import OPTIMIZERS, assert_same  # noqa: E402

WITH_WEIGHT_DECAY = {"momentum", "adamw"}  # these cannot do without the parameters
CHAINS = [
    (name, with_params, PAPER)
    for name in OPTIMIZERS
    for with_params in (False, True)
    if with_params or name not in WITH_WEIGHT_DECAY
]
CHAINS += [("momentum", True, EQUAL), ("adam", False, EQUAL)]


def stacked(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "body": {"weight": torch.randn(n, 3, 2, generator=generator)},
        "head": [torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)],
    }


def zeros_like_one(stack):
    return tree_map(lambda leaf: torch.zeros(leaf.shape[1:]), stack)


def run_chain(transformation, gradients_of, *, inplace, with_params, steps=3):
    params = zeros_like_one(stacked())
    state = transformation.init(params)
    for seed in range(steps):
        updates, state = transformation.update(
            gradients_of(stacked(seed=seed)),
            state,
            params=params if with_params else None,
            inplace=inplace,
        )
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


@pytest.mark.parametrize(("name", "with_params", "method"), CHAINS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_aggregate_first_in_a_chain_equals_the_formulas_before_it(
    name, with_params, method, inplace
):
    chain = torchopt.chain(aggregate(method.make()), OPTIMIZERS[name]())
    options = {"inplace": inplace, "with_params": with_params}
    found = run_chain(chain, lambda stack: stack, **options)
    expected = run_chain(OPTIMIZERS[name](), method.combine, **options)
    assert_same(found, expected, method.tolerance(torch.float32))


@pytest.mark.parametrize("inplace", [False, True])
def test_aggregate_leaves_the_stack_as_it_was(inplace):
    chain = torchopt.chain(aggregate(ga.Mean()), torchopt.sgd(lr=0.1, momentum=0.9))
    stack = stacked()
    chain.update(stack, chain.init(zeros_like_one(stack)), inplace=inplace)
    assert all(map(torch.equal, tree_leaves(stack), tree_leaves(stacked())))


def test_state_of_aggregate_tells_the_weights_and_diagnostics():
    transformation, stack = aggregate(ga.GradientAgreement()), stacked()
    state = transformation.init(zeros_like_one(stack))
    assert state.weights is None
    _, state = transformation.update(stack, state)
    expected = ga.GradientAgreement().aggregate(stack)
    torch.testing.assert_close(state.weights, expected.weights)
    assert state.diagnostics.log() == pytest.approx(expected.diagnostics.log(), rel=1e-5)


def test_aggregate_gives_scopes_the_paths_of_the_leaves():
    seen = []
    scope = lambda path: seen.append(path) or path.split(".")[0]  # noqa: E731
    transformation, stack = aggregate(ga.GradientAgreement(scope=scope)), stacked()
    updates, _ = transformation.update(stack, transformation.init(zeros_like_one(stack)))
    assert seen == ["body.weight", "head.0", "head.1"]
    by_name = ga.GradientAgreement(scope=lambda path: path.split(".")[0])
    assert_same(updates, by_name(stack), 1e-6)


def test_leaf_without_gradients_stays_without():
    transformation = torchopt.chain(aggregate(ga.Mean()), torchopt.adam(lr=0.1))
    stack = {"used": torch.ones(3, 2), "unused": None}
    params = {"used": torch.zeros(2), "unused": torch.zeros(4)}
    updates, _ = transformation.update(stack, transformation.init(params), params=params)
    assert updates["unused"] is None
    assert updates["used"].shape == (2,)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("flat", [False, True])
def test_aggregate_behind_another_transformation_is_refused(name, flat):
    last = aggregate(ga.Mean())
    chain = torchopt.chain(OPTIMIZERS[name](), torchopt.chain.flat(last) if flat else last)
    with pytest.raises(ValueError, match=r"first in its chain, found it in place \d"):
        chain.init(zeros_like_one(stacked()))


def test_aggregate_behind_another_aggregate_is_refused():
    chain = torchopt.chain(aggregate(ga.Mean()), aggregate(ga.Mean()), torchopt.sgd(lr=0.1))
    with pytest.raises(ValueError, match="first in its chain, found it in place 2"):
        chain.init(zeros_like_one(stacked()))


@pytest.mark.parametrize("in_a_chain", [False, True])
def test_aggregate_that_a_mask_keeps_from_some_parameters_is_refused(in_a_chain):
    one = aggregate(ga.Mean())
    one = torchopt.chain(one, torchopt.sgd(lr=0.1)) if in_a_chain else one
    params = zeros_like_one(stacked())
    mask = tree_map(lambda leaf: leaf.ndim > 1, params)
    chain = torchopt.chain(torchopt.transform.masked(one, mask), torchopt.sgd(lr=0.1))
    with pytest.raises(ValueError, match="of all parameters, found it in a mask"):
        chain.init(params)


def test_what_follows_aggregate_may_be_masked():
    decay = torchopt.transform.masked(
        torchopt.transform.add_decayed_weights(0.5), lambda t: tree_map(lambda x: x.ndim > 1, t)
    )
    stack = stacked()
    params = tree_map(lambda leaf: torch.ones_like(leaf[0]), stack)
    chain = torchopt.chain(aggregate(ga.Mean()), decay)
    updates, _ = chain.update(stack, chain.init(params), params=params)
    expected = tree_map(lambda leaf: leaf.mean(0) + 0.5 * (leaf.ndim > 2), stack)
    assert_same(updates, expected, 1e-6)


@pytest.mark.parametrize("chain", [torchopt.chain, torchopt.chain.flat])
def test_aggregate_is_first_where_its_own_chain_is_first(chain):
    whole = torchopt.chain(chain(aggregate(ga.Mean()), torchopt.sgd(lr=0.5)), torchopt.sgd(lr=0.2))
    stack = stacked()
    updates, _ = whole.update(stack, whole.init(zeros_like_one(stack)), inplace=False)
    assert_same(updates, tree_map(lambda g: 0.1 * g.mean(0), stack), 1e-6)


def test_what_is_no_aggregator_is_refused(without_type_checks):
    with pytest.raises(TypeError, match="found the class Mean; call it"):
        aggregate(ga.Mean)


def test_gradient_of_one_loss_is_refused():
    w = torch.zeros(3, requires_grad=True)
    chain = torchopt.chain(aggregate(ga.Mean()), torchopt.sgd(lr=0.1))
    optimizer = torchopt.FuncOptimizer(chain)
    with pytest.raises(ValueError, match=r"one gradient a task, as ga\.task_gradients does"):
        optimizer.step((w - 1).square().sum(), (w,))


def test_updates_of_another_pytree_than_the_parameters_are_refused():
    transformation = aggregate(ga.Mean())
    state = transformation.init({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"updates for the 1 parameters .* found 2"):
        transformation.update({"w": torch.ones(3, 2), "v": torch.ones(3, 2)}, state)
