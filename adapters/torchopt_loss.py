"""The loss of TorchOpt's optimizers that step on one: Σ_i w_i L_i, the weights by agreement."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.loops.adapted import Parameters, named
from gradagree_opt.loops.graphs import check_depends
from gradagree_opt.loops.loss_graph import LossGraph
from gradagree_opt.loops.loss_vector import Losses, loss_vector
from gradagree_opt.loops.multi_task import aggregate_losses
from gradagree_opt.one_process import check_one_process


class WeightedLoss(NamedTuple):
    """A loss whose gradient is the aggregation of the task gradients, and that aggregation.

    Attributes:
        loss: Σ_i w_i L_i, with its graph; the weights are constants.
        aggregation: of the gradients, its update by name of the parameter, or by position.
    """

    loss: Float[Tensor, ""]
    aggregation: CollectedTasks


def weighted_loss(
    losses: Losses, parameters: Parameters, aggregator: Aggregator, /
) -> WeightedLoss:
    """Σ_i w_i L_i: what ``torchopt.MetaOptimizer`` and ``torchopt.FuncOptimizer`` step on.

    Both differentiate one loss in their own ``step``, so that the step is differentiable; through
    it the weights are constants. The losses keep their graphs. Tasks that the aggregator drops are
    left out.

    Args:
        losses: ``[n]`` tensor or sequence of n scalars, one loss a task. Where the aggregator is to
            drop a task that is not finite, a sequence: in the gradient of one tensor its NaN
            reaches the others.
        parameters: what the optimizer steps: the module of a Meta-optimizer, the tuple that a
            ``FuncOptimizer`` is given.
        aggregator: what weights the tasks; signal and direction are both the loss gradient.

    Raises:
        TypeError: ``losses`` is a closure, these are no parameters, or it is no aggregator.
        ValueError: the aggregator has a scope, gives no weights or is one of several ranks; a
            parameter is frozen; ``losses`` is not a vector, is empty, or has one that does not
            depend on the parameters; or the aggregator refuses the gradients or drops all of them.

    >>> import torchopt
    >>> import gradagree_opt as ga
    >>> optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=0.1))
    >>> w = torch.tensor([0.0], requires_grad=True)
    >>> losses = (w - torch.tensor([1.0, 2.0, 3.0])) ** 2
    >>> loss, aggregation = weighted_loss(losses, (w,), ga.GradientAgreement())
    >>> optimizer.step(loss, (w,))
    (tensor([0.4667], grad_fn=<AddBackward0>),)
    """
    check_aggregator(aggregator)
    _check_one_loss(aggregator)
    each = loss_vector(losses)
    names = named(parameters)
    check_one_process([*names.values()])
    _check_trained(names)
    for task, loss in enumerate(each):
        check_depends(loss, names.values(), task, advice="compute it from those of the optimizer")
    values = torch.stack([loss.detach() for loss in each])
    nonfinite = ~torch.isfinite(values)
    graph = LossGraph(each, names, kept=True)
    result = aggregate_losses(graph, nonfinite, aggregator)
    if result is None:
        gradients = [graph.gradient(task, retain_graph=True) for task in range(len(each))]
        stack = {name: torch.stack([of[name] for of in gradients]) for name in names}
        result = aggregator.aggregate_unchecked(stack, nonfinite=nonfinite)
    aggregator.verify(result)
    check_some_task(result.diagnostics, aggregator.nonfinite)
    terms = [weight * loss for weight, loss in zip(result.weights, each, strict=True)]
    if aggregator.nonfinite == "drop":
        # A dropped task must not reach the shared backward pass: 0 · NaN is NaN there.
        dropped = result.diagnostics.nonfinite.tolist()
        terms = [term for term, out in zip(terms, dropped, strict=True) if not out]
    return WeightedLoss(torch.stack(terms).sum(), CollectedTasks(*result, values))


def _check_one_loss(aggregator: Aggregator) -> None:
    if aggregator.scope != "global":
        raise ValueError(
            f"expected an aggregator of scope 'global', found {aggregator.scope!r}: one loss has "
            "one weight a task; take an optimizer that steps on .grad, as torchopt.Adam, in "
            "ga.TaskOptimizer"
        )
    if "directions" in aggregator.needs:
        raise ValueError(
            "expected an aggregator that gives one weight a task, found one whose update is no "
            "weighted sum; take an optimizer that steps on .grad, as torchopt.Adam, in "
            "ga.TaskOptimizer"
        )
    if aggregator.ranks is not None:
        raise ValueError(
            "expected an aggregator of one process, found one of several ranks, whose weighted "
            "loss no rank has; take an optimizer that steps on .grad, as torchopt.Adam, in "
            "ga.TaskOptimizer"
        )


def _check_trained(parameters: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ValueError(
                f"expected parameters that require a gradient, found {name!r}, of shape "
                f"{list(parameter.shape)}, frozen, by which TorchOpt would differentiate; leave it "
                "out of what the optimizer is given"
            )
