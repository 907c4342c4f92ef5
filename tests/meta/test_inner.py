"""InnerSGD against a loop written by hand, and adapt() of every meta-algorithm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import gradagree_opt as ga

from .loops import ALGORITHMS, descend, gradient
from .problems import assert_same, loss_fn, problem
from .rules import flat, length

CASE = problem(n=2, shots=6)
SUPPORT = CASE.task(0)["support"]


def by_hand(params, batches, rates):
    """One step θ ← θ − α ∘ ∇L(θ) for each batch."""
    for batch in batches:
        params = descend(lambda at, batch=batch: gradient(loss_fn, at, batch), params, rates, 1)[-1]
    return params


def sub_batch(start, stop):
    return tree_map(lambda leaf: leaf[start:stop], SUPPORT)


@settings(max_examples=20)
@given(steps=st.integers(0, 4), lr=st.floats(0, 0.3), seed=st.integers(0, 1000))
def test_takes_steps_of_gradient_descent_on_the_whole_support_set(steps, lr, seed):
    case = problem(n=1, seed=seed)
    support = case.task(0)["support"]
    adapted = ga.InnerSGD(lr, steps)(loss_fn, case.params, support)
    rates = dict.fromkeys(case.params, lr)
    assert_same(adapted, by_hand(case.params, [support] * steps, rates), tolerance=1e-13)


def test_a_pytree_of_rates_gives_each_entry_its_own():
    adapted = ga.InnerSGD(CASE.rates, 3)(loss_fn, CASE.params, SUPPORT)
    assert_same(adapted, by_hand(CASE.params, [SUPPORT] * 3, CASE.rates), tolerance=1e-13)


@pytest.mark.parametrize(
    ("batch_size", "starts"), [(2, [0, 2, 4, 0, 2]), (3, [0, 3, 0, 3, 0]), (6, [0] * 5)]
)
def test_steps_take_consecutive_sub_batches_and_start_over(batch_size, starts):
    adapted = ga.InnerSGD(0.1, 5, batch_size=batch_size)(loss_fn, CASE.params, SUPPORT)
    batches = [sub_batch(start, start + batch_size) for start in starts]
    rates = dict.fromkeys(CASE.params, 0.1)
    assert_same(adapted, by_hand(CASE.params, batches, rates), tolerance=1e-13)


def test_meta_algorithms_hand_sub_batches_to_the_inner_loop():
    inner = ga.InnerSGD(0.1, 4, batch_size=3)
    result = ga.Reptile(loss_fn, inner).step(CASE.params, CASE.tasks, ga.Mean())
    rates = dict.fromkeys(CASE.params, 0.1)
    ends = []
    for task in CASE.each():
        halves = [tree_map(lambda leaf, s=s: leaf[s : s + 3], task["support"]) for s in (0, 3)]
        ends.append(by_hand(CASE.params, halves * 2, rates))
    expected = {
        name: sum(before - end[name] for end in ends) / 2 for name, before in CASE.params.items()
    }
    assert_same(result.update, expected, tolerance=1e-12)


@pytest.mark.parametrize("batch_size", [4, 5, 12])
def test_a_batch_size_that_does_not_divide_the_support_set_is_refused(batch_size):
    inner = ga.InnerSGD(0.1, 1, batch_size=batch_size)
    expected = rf"expected a support set .* multiple of batch_size {batch_size}, found \[6, 6\]"
    with pytest.raises(ValueError, match=expected):
        inner(loss_fn, CASE.params, SUPPORT)


@pytest.mark.parametrize(
    ("other", "found"), [((3,), r"\[6, 3\]"), ((12,), r"\[6, 12\]"), ((), r"\[6, None\]")]
)
def test_sub_batches_of_tensors_of_unlike_numbers_of_examples_are_refused(other, found):
    def loss(w, batch):  # of an empty sub-batch it would be 0
        return ((w - batch["x"]) ** 2).sum() + (w * batch["other"]).sum()

    support = {"x": torch.zeros(6), "other": torch.ones(other)}
    inner = ga.InnerSGD(0.1, 4, batch_size=3)
    with pytest.raises(
        ValueError, match=f"whose every tensor has as many .* found {found}; expand"
    ):
        inner(loss, torch.tensor(1.0), support)
    shared = {"x": torch.zeros(6), "other": torch.ones(()).expand(6)}
    batches = [{name: leaf[:3] for name, leaf in shared.items()}] * 4
    expected = descend(
        lambda at: gradient(lambda p, b: loss(p["w"], b), at, batches[0]),
        {"w": torch.tensor(1.0)},
        {"w": 0.1},
        4,
    )[-1]
    torch.testing.assert_close(inner(loss, torch.tensor(1.0), shared), expected["w"].detach())


def test_steps_at_the_call_replace_those_of_the_loop():
    inner = ga.InnerSGD(0.1, 2)
    expected = ga.InnerSGD(0.1, 5)(loss_fn, CASE.params, SUPPORT)
    assert_same(inner(loss_fn, CASE.params, SUPPORT, steps=5), expected, tolerance=0)
    assert_same(inner(loss_fn, CASE.params, SUPPORT, steps=0), CASE.params, tolerance=0)


def test_first_order_moves_to_the_same_place():
    first, second = (
        ga.InnerSGD(0.1, 3)(loss_fn, CASE.params, SUPPORT, first_order=first_order)
        for first_order in (True, False)
    )
    assert_same(first, second, tolerance=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_makes_the_identity_of_the_derivative(steps):
    inner = ga.InnerSGD(0.1, steps)
    cotangents = tree_map(torch.randn_like, CASE.params)

    def derivative(**options):
        _, backward = torch.func.vjp(
            lambda params: inner(loss_fn, params, SUPPORT, **options), CASE.params
        )
        return backward(cotangents)[0]

    assert_same(derivative(first_order=True), cotangents, tolerance=0)
    change = {name: d - cotangents[name] for name, d in derivative().items()}
    assert length(change) > 1e-2 * length(cotangents)
    assert_same(derivative(first_order=False), derivative(), tolerance=0)


def test_first_order_keeps_the_derivative_of_the_rates():
    """∂θ_k/∂α = −Σ_t g_t with the g_t constant."""
    at, total = CASE.params, tree_map(torch.zeros_like, CASE.params)
    for _ in range(2):
        step = gradient(loss_fn, at, SUPPORT)
        total = {name: total[name] - g for name, g in step.items()}
        at = {name: p - CASE.rates[name] * step[name] for name, p in at.items()}
    _, backward = torch.func.vjp(
        lambda rates: ga.InnerSGD(rates, 2)(loss_fn, CASE.params, SUPPORT, first_order=True),
        CASE.rates,
    )
    assert_same(backward(tree_map(torch.ones_like, at))[0], total, tolerance=1e-12)


def test_an_empty_support_set_is_refused_where_it_is_to_be_divided():
    empty = tuple(part[:0] for part in SUPPORT)
    with pytest.raises(ValueError, match=r"multiple of batch_size 2, found \[0, 0\]"):
        ga.InnerSGD(0.1, 1, batch_size=2)(loss_fn, CASE.params, empty)


def test_rates_of_another_structure_are_refused():
    rates = {name: rate for name, rate in CASE.rates.items() if name != "bias1"}
    with pytest.raises(ValueError, match="expected lr to be a float or a pytree like"):
        ga.InnerSGD(rates, 1)(loss_fn, CASE.params, SUPPORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "expected steps to be an integer of 0 or more, found -1"),
        ({"steps": 2.0}, r"expected steps to be an integer of 0 or more, found 2\.0"),
        (
            {"steps": 1, "batch_size": 0},
            "expected batch_size to be an integer of 1 or more, found 0",
        ),
        (
            {"steps": 1, "batch_size": 2.0},
            r"expected batch_size to be an integer of 1 or more, found 2\.0",
        ),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ga.InnerSGD(0.1, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_adapt_is_the_inner_loop_of_the_step(name):
    algorithm = ALGORITHMS[name]
    meta = algorithm.build(loss_fn, 0.1, 2)
    params = CASE.meta(algorithm.learns_rates)
    rates = CASE.rates if algorithm.learns_rates else dict.fromkeys(CASE.params, 0.1)
    for steps in (2, 5):
        adapted = meta.adapt(params, SUPPORT, steps=None if steps == 2 else steps)
        expected = by_hand(CASE.params, [SUPPORT] * steps, rates)
        assert_same(adapted, expected, tolerance=1e-13)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_adapt_under_vmap_adapts_every_task(name):
    algorithm = ALGORITHMS[name]
    meta = algorithm.build(loss_fn, 0.1, 2)
    params = CASE.meta(algorithm.learns_rates)
    together = torch.func.vmap(meta.adapt, (None, 0))(params, CASE.tasks["support"])
    for index, task in enumerate(CASE.each()):
        one = flat(meta.adapt(params, task["support"]))
        assert_same(tree_map(lambda leaf, i=index: leaf[i], together), one, tolerance=1e-13)
