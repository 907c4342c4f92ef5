"""One MAML step with Gradient Agreement, as each library's users write it.

Every contestant is given the same parameters and tasks and returns the same update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import higher
import learn2learn
import torch
import torchopt
from gradagree_opt.adapters import torchjd as adapter
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_map
from torchjd.autojac import backward as jacobian_backward
from torchjd.autojac import jac_to_grad

import gradagree_opt as ga

from .timing import Contestant, Step

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A network, its loss, and tasks ``{"support": (x, y), "query": (x, y)}``, task axis first."""

    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    tasks: dict[str, Batch]
    lr: float
    signal: Literal["gradient", "displacement"]

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def loss_fn(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.criterion(functional_call(self.module, params, (batch[0],)), batch[1])

    def each(self) -> list[dict[str, Batch]]:
        n = len(self.tasks["support"][0])
        return [tree_map(lambda leaf, i=i: leaf[i], self.tasks) for i in range(n)]


def contestants(problem: Problem) -> list[Contestant]:
    """All but jax, which has networks of its own."""
    made = [
        Contestant("gradagree, compiled", partial(gradagree, problem, compile=True)),
        Contestant("gradagree, eager", partial(gradagree, problem, compile=False)),
        Contestant("learn2learn", partial(learn2learn_loop, problem)),
        Contestant("higher", partial(higher_loop, problem)),
        Contestant("torchopt", partial(torchopt_loop, problem)),
        Contestant("torch.func by hand", partial(by_hand, problem)),
    ]
    if problem.signal == "gradient":
        made.append(Contestant("TorchJD autojac", partial(torchjd_loop, problem)))
    return made


def gradagree(
    problem: Problem, *, compile: bool, aggregator: Any = None, chunk_size: int | None = None
) -> Step:
    """An own ``aggregator`` is given its default signal, Gradient Agreement the problem's."""
    signal = None if aggregator else problem.signal
    aggregator = aggregator or ga.GradientAgreement(nonfinite="propagate")
    maml = ga.MAML(
        problem.loss_fn,
        ga.InnerSGD(problem.lr, 1),
        signal=signal,
        chunk_size=chunk_size,
        compile=compile,
    )
    params = problem.params
    return lambda: maml.step(params, problem.tasks, aggregator).update


def by_hand(problem: Problem) -> Step:
    """vmap(grad) without this library."""
    params = problem.params

    def query_loss(params: dict[str, Tensor], task: dict[str, Batch]) -> Any:
        gradient = grad(problem.loss_fn)(params, task["support"])
        adapted = {name: p - problem.lr * gradient[name] for name, p in params.items()}
        moved = {name: p - adapted[name] for name, p in params.items()}
        return problem.loss_fn(adapted, task["query"]), moved

    def step() -> dict[str, Tensor]:
        gradients, moved = vmap(grad(query_loss, has_aux=True), in_dims=(None, 0))(
            params, problem.tasks
        )
        signal = gradients if problem.signal == "gradient" else moved
        weights = agreement(torch.cat([leaf.flatten(1) for leaf in signal.values()], 1))
        return {name: torch.tensordot(weights, leaf, 1) for name, leaf in gradients.items()}

    return step


def learn2learn_loop(problem: Problem) -> Step:
    maml = learn2learn.algorithms.MAML(problem.module, lr=problem.lr)

    def adapted(task: dict[str, Batch]) -> tuple[Tensor, list[Tensor]]:
        learner = maml.clone()
        x, y = task["support"]
        learner.adapt(problem.criterion(learner(x), y))
        x, y = task["query"]
        return problem.criterion(learner(x), y), list(learner.parameters())

    return loop(problem, list(problem.module.parameters()), adapted)


def higher_loop(problem: Problem) -> Step:
    inner = torch.optim.SGD(problem.module.parameters(), lr=problem.lr)

    def adapted(task: dict[str, Batch]) -> tuple[Tensor, list[Tensor]]:
        with higher.innerloop_ctx(problem.module, inner, copy_initial_weights=False) as (net, sgd):
            x, y = task["support"]
            sgd.step(problem.criterion(net(x), y))
            x, y = task["query"]
            return problem.criterion(net(x), y), list(net.parameters())

    return loop(problem, list(problem.module.parameters()), adapted)


def torchopt_loop(problem: Problem) -> Step:
    inner = torchopt.MetaSGD(problem.module, lr=problem.lr)
    # Between the steps the module holds other tensors than nn.Parameters.
    initial = list(problem.module.parameters())
    net_state = torchopt.extract_state_dict(problem.module)
    inner_state = torchopt.extract_state_dict(inner)

    def adapted(task: dict[str, Batch]) -> tuple[Tensor, list[Tensor]]:
        x, y = task["support"]
        inner.step(problem.criterion(problem.module(x), y))
        x, y = task["query"]
        loss = problem.criterion(problem.module(x), y)
        moved = list(problem.module.parameters())
        torchopt.recover_state_dict(problem.module, net_state)
        torchopt.recover_state_dict(inner, inner_state)
        return loss, moved

    return loop(problem, initial, adapted)


def loop(
    problem: Problem,
    initial: list[Tensor],
    adapted: Callable[[dict[str, Batch]], tuple[Tensor, list[Tensor]]],
) -> Step:
    """One task after the other, and what is left to do by hand: the weights and the update."""
    tasks = problem.each()
    names = [name for name, _ in problem.module.named_parameters()]
    start = parameters_to_vector(initial).detach()

    def on_gradients() -> dict[str, Tensor]:
        rows = []
        for task in tasks:
            loss, _ = adapted(task)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, initial)]))
        stack = torch.stack(rows)
        return named(agreement(stack) @ stack)

    def on_displacements() -> dict[str, Tensor]:
        losses, moved = [], []
        for task in tasks:
            loss, params = adapted(task)
            losses.append(loss)
            moved.append(start - torch.cat([p.detach().flatten() for p in params]))
        total = agreement(torch.stack(moved)) @ torch.stack(losses)
        return dict(zip(names, torch.autograd.grad(total, initial), strict=True))

    def named(vector: Tensor) -> dict[str, Tensor]:
        into = [torch.empty_like(p) for p in initial]
        vector_to_parameters(vector, into)
        return dict(zip(names, into, strict=True))

    return on_gradients if problem.signal == "gradient" else on_displacements


def torchjd_loop(problem: Problem) -> Step:
    """One Jacobian of all query losses."""
    params = list(problem.module.parameters())
    names = [name for name, _ in problem.module.named_parameters()]
    tasks = problem.each()
    aggregator = adapter.GradientAgreement()

    def step() -> dict[str, Tensor]:
        losses = []
        for task in tasks:
            x, y = task["support"]
            loss = problem.criterion(problem.module(x), y)
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            moved = {n: p - problem.lr * g for n, p, g in zip(names, params, gradient, strict=True)}
            losses.append(problem.loss_fn(moved, task["query"]))
        problem.module.zero_grad()
        jacobian_backward(losses, inputs=params)
        jac_to_grad(params, aggregator)
        return {n: p.grad for n, p in zip(names, params, strict=True) if p.grad is not None}

    return step


def agreement(stack: Tensor) -> Tensor:
    """The paper's weights of the rows."""
    scores = stack @ stack.sum(0)
    return scores / scores.abs().sum()
