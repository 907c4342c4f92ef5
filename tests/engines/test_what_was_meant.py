"""Tasks as a list of them, or of integers alone: the sentence says which form the loss takes."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga

PARAMS = {"w": torch.tensor([[1.0], [-1.0], [0.5]])}
MEAN, INNER = ga.Mean(), ga.InnerSGD(0.1, 1)


def loss_fn(params, batch):
    x, y = batch
    return ((x @ params["w"] - y) ** 2).mean()


def by_name(params, batch):
    return loss_fn(params, (batch["x"], batch["y"]))


def of_rows(params, x):
    return (x @ params["w"]).square().mean()


def pairs(n, size=5):
    generator = torch.Generator().manual_seed(n)
    draw = [torch.randn(size, 4, generator=generator) for _ in range(n)]
    return [(each[:, :3], each[:, 3:]) for each in draw]


CALLS = {
    "task_gradients": lambda loss, tasks: ga.task_gradients(loss, PARAMS, tasks),
    "aggregate_gradients": lambda loss, tasks: ga.aggregate_gradients(loss, PARAMS, tasks, MEAN),
    "streamed": lambda loss, tasks: ga.aggregate_gradients(
        loss, PARAMS, tasks, MEAN, engine="streamed"
    ),
    "MAML": lambda loss, tasks: ga.MAML(loss, INNER).step(
        PARAMS, {"support": tasks, "query": tasks}, MEAN
    ),
    "MetaSGD": lambda loss, tasks: ga.MetaSGD(loss, 1).step(
        {"params": PARAMS, "lr": {"w": torch.full((3, 1), 0.1)}},
        {"support": tasks, "query": tasks},
        MEAN,
    ),
    "Reptile": lambda loss, tasks: ga.Reptile(loss, INNER).step(PARAMS, {"support": tasks}, MEAN),
}
each_call = pytest.mark.parametrize("call", CALLS)


def losses_of_a_loop(call, loss, tasks):
    def adapted(task):
        if "gradients" in call or call == "streamed":
            return PARAMS
        return {"w": PARAMS["w"] - 0.1 * torch.func.grad(loss)(PARAMS, task)["w"]}

    return torch.stack([loss(adapted(task), task) for task in tasks])


FORMS = {
    "pairs": (loss_fn, pairs(4)),
    "two pairs": (loss_fn, pairs(2)),
    "a tuple of pairs": (loss_fn, tuple(pairs(3))),
    "dicts": (by_name, [{"x": x, "y": y} for x, y in pairs(4)]),
    "tensors": (of_rows, [x for x, _ in pairs(4)]),
}


@each_call
@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_tasks_is_named_and_what_is_advised_works(call, form):
    loss, tasks = FORMS[form]
    found = rf"task-stacked pytree, found a {type(tasks).__name__} of {len(tasks)} tasks, .*"
    with pytest.raises(
        ValueError, match=found + r"torch\.stack.* or loop with TaskBatch"
    ) as caught:
        CALLS[call](loss, tasks)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    result = CALLS[call](loss, tree_map(lambda *leaves: torch.stack(leaves), *tasks))
    torch.testing.assert_close(result.losses, losses_of_a_loop(call, loss, tasks))


@each_call
def test_a_list_of_two_tensors_is_a_pytree_whose_own_error_is_raised(call):
    def broken(params, batch):
        x, y = batch
        return ((x @ params["w"] - y) ** 2).mean() + params["missing"]

    with pytest.raises(KeyError, match="missing"):
        CALLS[call](broken, [torch.ones(2, 5, 3), torch.ones(2, 5, 3)])


@each_call
def test_an_error_that_a_loop_does_not_have_is_not_laid_on_the_tasks(call):
    calls = []

    def once(params, batch):
        if not calls:
            calls.append(0)
            raise KeyError("once")
        return loss_fn(params, batch)

    with pytest.raises(KeyError, match="once"):
        CALLS[call](once, list(map(torch.stack, zip(*pairs(2), strict=True))))


@each_call
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_integers_that_the_loss_takes_as_floats_are_named(call, dtype):
    tasks = torch.arange(24, dtype=dtype).reshape(4, 2, 3)
    with pytest.raises(ValueError, match=rf"found {dtype} alone .*; give .* tasks\.float\(\)"):
        CALLS[call](of_rows, tasks)
    CALLS[call](of_rows, tasks.float())


@dataclass
class Parts:
    w: torch.Tensor


def stacked(rows):
    return torch.stack(list(rows))


ANYWHERE = {
    "UserDict": (lambda t: UserDict(w=t), dict, r"dict\(UserDict\)"),
    "items": (lambda t: {"w": t}.items(), dict, r"dict\(dict_items\)"),
    "dataclass": (Parts, vars, r"vars\(Parts\)"),
    "array": (lambda t: t.numpy(), torch.as_tensor, r"torch\.as_tensor"),
    "integers": (lambda t: t.long(), lambda t: t.float(), r"float\(\)"),
}
STACKS = ANYWHERE | {
    "generator": (iter, stacked, r"torch\.stack\(list\(\w+\)\)"),
    "values": (lambda t: dict(enumerate(t)).values(), stacked, r"torch\.stack\(list\(dict_values"),
}
PARAMETERS = ANYWHERE | {
    "generator": (iter, list, r"list\(\w+\)"),
    "values": (lambda t: {"w": t}.values(), list, r"list\(dict_values\)"),
    "module": (
        lambda t: torch.nn.Linear(2, 2),
        lambda module: dict(module.named_parameters()),
        r"dict\(module\.named_parameters\(\)\)",
    ),
}
MATRIX = torch.tensor([[1.0, 2.0], [3.0, 5.0]])


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("role", ["gradients", "signal"])
def test_what_a_message_advises_for_a_stack_works(kind, role, without_type_checks):
    make, mend, advice = STACKS[kind]

    def aggregate(given):
        pair = (MATRIX, given) if role == "signal" else (given,)
        return ga.GradientAgreement().aggregate(*pair)

    with pytest.raises(TypeError, match=rf"{role}.* found .*; give .*{advice}"):
        aggregate(make(MATRIX))
    expected = ga.GradientAgreement().aggregate(MATRIX).weights
    torch.testing.assert_close(aggregate(mend(make(MATRIX))).weights, expected)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_what_a_message_advises_for_parameters_works(kind, without_type_checks):
    make, mend, advice = PARAMETERS[kind]

    def gradients(params):
        return ga.task_gradients(
            lambda p, x: sum(leaf.sum() for leaf in tree_leaves(p)) * x, params, torch.ones(3)
        ).gradients

    with pytest.raises(TypeError, match=rf"floating-point parameters, found .*; give .*{advice}"):
        gradients(make(MATRIX))
    assert all(leaf.eq(1).all() for leaf in tree_leaves(gradients(mend(make(MATRIX)))))
