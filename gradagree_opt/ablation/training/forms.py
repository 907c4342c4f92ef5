"""The forms of a study: which learner trains, and how a new task is adapted to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_opt.ablation.study.sections import Inner, MetaSGDForm, MultiTaskForm, ReptileForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.multi_task import MultiTask
from gradagree_opt.ablation.training.networks import head
from gradagree_opt.ablation.training.optimizers import DECAYS, adam, adam_state
from gradagree_opt.meta.inner import InnerLoop, sub_batch

Learner: TypeAlias = ga.Reptile | ga.MAML | MultiTask
LossFn: TypeAlias = Callable[[Any, Any], Tensor]


def learner(study: Study, loss: LossFn, module: nn.Module) -> Learner:
    """What trains the network."""
    if isinstance(study.form, MultiTaskForm):
        return MultiTask(loss)
    assert study.inner is not None
    form, inner = study.form, inner_loop(study.inner)
    if isinstance(form, ReptileForm):
        if study.flip is not None:
            return ga.Reptile(lambda params, batch: loss(params, batch[:2]), Flipped(inner))
        return ga.Reptile(loss, inner)
    if isinstance(form, MetaSGDForm):
        return ga.MetaSGD(
            loss, study.inner.steps, first_order=form.first_order, signal="displacement"
        )
    loop = HeadOnly(inner, head(module)) if form.kind == "anil" else inner
    return ga.MAML(loss, loop, first_order=form.first_order, signal=form.signal)


def inner_loop(section: Inner) -> InnerLoop:
    """How the network adapts to one task."""
    if section.optimizer == "adam":
        betas = section.betas or DECAYS
        return InnerAdam(section.lr, section.steps, betas, batch_size=section.batch_size)
    return ga.InnerSGD(section.lr, section.steps, batch_size=section.batch_size)


def evaluator(study: Study, loss: LossFn, module: nn.Module) -> Learner:
    """What adapts to the tasks of the test protocol: each step on the whole support set."""
    whole = study.inner and study.inner.model_copy(update={"batch_size": None})
    clean = study.model_copy(update={"inner": whole, "corruption": None})
    return learner(clean, loss, module)


@dataclass(frozen=True)
class InnerAdam:
    """An inner loop of Adam, whose moments are new for every task.

    Source: Kingma and Ba 2015; with β₁ = 0 as in Nichol et al. 2018, whose moments go on from one
    task to the next.

    >>> import torch
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> InnerAdam(0.25, 2, (0.0, 0.999))(loss_fn, torch.tensor(0.0), torch.tensor([4.0]))
    tensor(0.4918)
    """

    lr: float
    steps: int
    betas: Sequence[float] = DECAYS
    batch_size: int | None = None

    def __call__(
        self,
        loss_fn: LossFn,
        params: Any,
        support: Any,
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> Any:
        """θ_i, differentiable in θ; with first_order, as if ∂θ_i/∂θ were the identity."""
        gradient, state = torch.func.grad(loss_fn), adam_state(params)
        for step in range(self.steps if steps is None else steps):
            at = tree_map(Tensor.detach, params) if first_order else params
            found = gradient(at, sub_batch(support, self.batch_size, step))
            params, state = adam(params, found, state, self.lr, self.betas)
        return params


@dataclass(frozen=True)
class HeadOnly:
    """An inner loop in which the head alone adapts: no gradient of the body is taken in it.

    Source: Raghu et al. 2020 (arXiv:1909.09157), ANIL ("almost no inner loop").

    >>> import torch
    >>> loss_fn = lambda params, x: ((params["head"] * params["body"] * x - 1) ** 2).mean()
    >>> params = {"body": torch.tensor(1.0), "head": torch.tensor(0.0)}
    >>> loop = HeadOnly(ga.InnerSGD(lr=0.25, steps=1), frozenset({"head"}))
    >>> loop(loss_fn, params, torch.tensor([1.0]))
    {'body': tensor(1.), 'head': tensor(0.5000)}
    """

    inner: InnerLoop
    head: frozenset[str]

    def __call__(
        self,
        loss_fn: LossFn,
        params: Any,
        support: Any,
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> Any:
        """The parameters of one task, differentiable in all of them: the head depends on the body.

        With first_order, as if ∂θ_i/∂θ were the identity.
        """
        body = {name: leaf.detach() if first_order else leaf for name, leaf in params.items()}
        adapting = {name: leaf for name, leaf in params.items() if name in self.head}

        def head_loss(head: Any, batch: Any) -> Tensor:
            return loss_fn({**body, **head}, batch)

        adapted = self.inner(head_loss, adapting, support, first_order=first_order, steps=steps)
        return {**params, **adapted}


@dataclass(frozen=True)
class Flipped:
    """An inner loop of tasks that report a multiple of their displacements, as Byzantine ones do.

    A support set carries the factor of its task, 1 for an honest one, after inputs and targets.

    >>> import torch
    >>> loss_fn = lambda w, batch: ((w * batch[0] - batch[1]) ** 2).mean()
    >>> loop, (x, y) = Flipped(ga.InnerSGD(lr=0.5, steps=1)), torch.ones(2, 3)
    >>> [loop(loss_fn, torch.tensor(0.0), (x, y, torch.tensor(f))) for f in (1.0, -2.0)]
    [tensor(1.), tensor(-2.)]
    """

    inner: InnerLoop

    def __call__(
        self,
        loss_fn: LossFn,
        params: Any,
        support: tuple[Tensor, Tensor, Tensor],
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> Any:
        """θ + f (θ_i − θ): parameters whose displacement is f times that of the inner loop."""
        x, y, factor = support
        adapted = self.inner(loss_fn, params, (x, y), first_order=first_order, steps=steps)
        return tree_map(lambda p, a: p + factor * (a - p), params, adapted)
