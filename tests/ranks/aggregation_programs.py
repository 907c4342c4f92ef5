"""Programs of aggregations of stacks, beside those of one process."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from common import (
    AGGREGATORS,
    RANK,
    WORLD,
    check_close,
    check_close_together,
    check_same_bits,
    join,
    leave,
    own,
    refused,
)
from torch import Tensor

import gradagree_opt as ga


def aggregations() -> None:
    """Every aggregator, of stacks of 1, 2 and 7 tasks, at three scales and in two dtypes."""
    join()
    for dtype in (torch.float32, torch.float64):
        for n in (1, 2, 7):
            torch.manual_seed(n)
            stack = {"a": torch.randn(n, 3, 4), "b": torch.randn(n, 5), "c": torch.randn(n)}
            stack["a"][0] = 0
            for scale in (1.0, 1e-30, 1e30) if dtype == torch.float32 else (1.0,):
                grads = {name: leaf.to(dtype) * scale for name, leaf in stack.items()}
                for one in AGGREGATORS:
                    wanted = one.aggregate(grads)
                    found = ga.distributed(one).aggregate(ga.own_share(grads))
                    tolerance = (1e-6 if dtype == torch.float32 else 1e-14) * condition(one, grads)
                    check_close_together(found.update, wanted.update, tolerance)
                    check_close(found.weights, own(wanted.weights), 1e-4)
                    check_same_bits([found.update, list(found.diagnostics)])
                    for a, b in zip(found.diagnostics, wanted.diagnostics, strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def condition(aggregator: Any, grads: dict[str, Tensor]) -> float:
    """Σ‖g_i‖ ‖S‖ / Σ|g_i · S|, the largest of the groups of leaves."""
    groups = [[leaf] for leaf in grads.values()]
    if aggregator.scope == "global":
        groups = [[*grads.values()]]
    found = 1.0
    for leaves in groups:
        matrix = torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in leaves], 1)
        total = matrix.sum(0)
        scores = (matrix @ total).abs().sum()
        if scores > 0:
            found = max(found, float((matrix.norm(dim=1) * total.norm()).sum() / scores))
    return found


def gramian_in_blocks() -> None:
    """A Gram matrix that takes several messages, of leaves that end in none of them."""
    join()
    from gradagree_opt.core import ranks

    ranks.GATHERED_ENTRIES = 20
    stack = [torch.randn(5, *shape) for shape in ((3, 4), (7,), (), (9,))]
    for tensor in stack:
        dist.broadcast(tensor, 0)
    one = ga.EqualAgreement()
    check_close(ga.distributed(one)(ga.own_share(stack)), one(stack))


def draws() -> None:
    """Random weights are those of the first rank's generator."""
    stack = torch.randn(5, 3)
    wanted = ga.RandomWeights(torch.Generator().manual_seed(3)).aggregate(stack).weights
    join()
    one = ga.RandomWeights(torch.Generator().manual_seed(3 + RANK))
    found = ga.distributed(one).aggregate(ga.own_share(stack))
    check_close(found.weights, own(wanted))


def own_draws() -> None:
    """A weighting that says that it draws by itself: the first rank's draws are those of all."""
    join()
    torch.manual_seed(RANK)

    def drawn(statistics: ga.Statistics) -> Tensor:
        weights = torch.rand_like(statistics.row_sums)
        return weights / weights.sum()

    drawn.draws_itself = True  # type: ignore[attr-defined] # as a weighting's class would say
    result = ga.distributed(ga.Aggregator(drawn)).aggregate(torch.eye(2 * WORLD)[2 * RANK :][:2])
    check_close(result.weights, result.update[2 * RANK :][:2])
    torch.testing.assert_close(result.update.sum(), torch.tensor(1.0))


def cancelling() -> None:
    """Signals whose sum is exactly zero, and scales far apart, without a task's own share."""
    join()
    one = ga.GradientAgreement(include_self=False)
    for seed in range(12):
        torch.manual_seed(seed)
        stack = torch.randn(4, 9) * 10.0 ** torch.randint(-3, 4, (4, 1))
        stacks = [
            stack,
            torch.cat([stack, -stack]),
            torch.cat([stack, -stack.sum(0, keepdim=True)]),
        ]
        stacks.append(torch.tensor([[1e30, 0.0], [-1e30, 0.0], [0.0, 1e-30], [0.0, 1e-30]]))
        for each in stacks:
            wanted = one.aggregate(each)
            found = ga.distributed(one).aggregate(ga.own_share(each))
            torch.testing.assert_close(found.weights, own(wanted.weights), rtol=1e-5, atol=1e-6)
            assert found.diagnostics.degenerate == wanted.diagnostics.degenerate


def graphs() -> None:
    """The update depends on the own tasks as in one process, where the weights are constants."""
    join()
    stack = torch.randn(2 * WORLD, 3, generator=torch.Generator().manual_seed(0))
    for one in (ga.Mean(), ga.Mean(match_norm=ga.Sum()), ga.GradientAgreement()):
        mine = ga.own_share(stack).requires_grad_()
        result = ga.distributed(one).aggregate(mine)
        result.update.sum().backward()
        check_close(mine.grad, result.weights.unsqueeze(1).expand(-1, 3))
        with torch.inference_mode():
            check_close(ga.distributed(one)(ga.own_share(stack)), result.update.detach())


def half_precision() -> None:
    """Sums of one rank that float16 cannot hold, though it can hold that of all."""
    join()
    for dtype in (torch.float16, torch.bfloat16):
        stack = torch.tensor([[6e4, 1.0], [5e4, 2.0], [-6e4, 3.0], [-4e4, 5.0]]).to(dtype)
        for one in (ga.Sum(), ga.Mean(match_norm=ga.Sum()), ga.GradientAgreement()):
            wanted = one.aggregate(stack)
            found = ga.distributed(one).aggregate(ga.own_share(stack))
            assert wanted.update.isfinite().all()
            check_close(found.update, wanted.update, torch.finfo(dtype).eps)
        # An update of more than float16 holds before it has its length, and one that is rounded.
        one = ga.Aggregator(
            lambda statistics: torch.ones_like(statistics.row_sums), match_norm="mean"
        )
        for each in (torch.full((4, 1), 6e4), stack.float() / 7):
            wanted, given = one.aggregate(each.to(dtype)), ga.own_share(each.to(dtype))
            found = ga.distributed(one).aggregate(given)
            check_close(found.update, wanted.update, torch.finfo(dtype).eps)
            check_close(found.weights, own(wanted.weights))
    with refused("rank"):
        ga.distributed(ga.Sum())(stack.half() if RANK else stack)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
