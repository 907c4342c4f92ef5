"""MAML, FOMAML and Meta-SGD: the displacement is the signal, the meta-gradient the direction."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.aggregation import Aggregation, Aggregator
from gradagree_opt.annotations import Float
from gradagree_opt.engines.stacked import LossFn, scalar_loss
from gradagree_opt.meta.inner import InnerLoop, InnerSGD
from gradagree_opt.meta.steps import MetaStep, check_tasks, maybe_compiled, meta_step
from gradagree_opt.stacks import PyTree, combine
from gradagree_opt.weightings import check_choice


class MAML:
    """Model-Agnostic Meta-Learning: θ ← θ − α_out Σ_i w_i ∇L_i(θ_i).

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        inner: the inner loop, as :class:`gradagree_opt.InnerSGD`.
        first_order: take ∂θ_i/∂θ for the identity (FOMAML); False differentiates through the
            inner loop. The paper does not say which.
        signal: what agreement is measured on: "displacement" θ − θ_i (paper), which needs only one
            backward pass of the weighted loss; "gradient", the meta-gradient of each task.
        compile: torch.compile the whole step as one graph (a minute the first time).

    Source: Eshratifar et al. 2018, algorithm 1, the MAML form; Finn et al. 2017.

    >>> import gradagree_opt as ga
    >>> maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.25, steps=1))
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> maml.step(torch.tensor(0.0), {"support": x, "query": x}, ga.Mean()).update
    tensor(-1.)
    """

    def __init__(
        self,
        loss_fn: LossFn,
        inner: InnerLoop,
        *,
        first_order: bool = False,
        signal: Literal["displacement", "gradient"] = "displacement",
        compile: bool = False,
    ) -> None:
        check_choice("signal", signal, ("displacement", "gradient"))
        self.loss_fn = scalar_loss(loss_fn)
        self.inner = inner
        self.first_order = first_order
        self.signal = signal
        self._aggregation = maybe_compiled(self._aggregation_of, compile)

    def step(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> MetaStep:
        """One outer step, without changing the parameters.

        Args:
            params: pytree of floating-point tensors.
            tasks: ``{"support": batch, "query": batch}`` with leaves ``[n, *shape]``.
            aggregator: what weights the tasks.

        Raises:
            ValueError, TypeError: the tasks are not task-stacked, the loss is not a scalar, or the
                aggregator refuses the signals.
        """
        n = check_tasks(params, tasks, "support", "query")
        aggregation, losses = self._aggregation(params, tasks, aggregator, aggregator.draw(n))
        aggregator.verify(aggregation)
        return meta_step(aggregation, losses)

    def adapt(self, params: PyTree, support: PyTree, /, *, steps: int | None = None) -> PyTree:
        """Parameters adapted to the support set of one task, in ``steps`` inner steps."""
        return self._adapt(params, support, steps)

    def _adapt(self, params: PyTree, support: PyTree, steps: int | None = None) -> PyTree:
        return self.inner(self.loss_fn, params, support, first_order=self.first_order, steps=steps)

    def _initial(self, params: PyTree) -> PyTree:
        """The part of the meta-parameters that the inner loop starts from."""
        return params

    def _aggregation_of(
        self,
        params: PyTree,
        tasks: PyTree,
        aggregator: Aggregator,
        draws: Float[Tensor, " n"] | None,
    ) -> tuple[Aggregation, Tensor]:
        # A dropped task must not reach a shared backward pass: 0 · NaN is NaN there.
        if self.signal == "gradient" or aggregator.nonfinite == "drop":
            return self._from_stacked_gradients(params, tasks, aggregator, draws)
        return self._from_one_backward(params, tasks, aggregator, draws)

    def _from_stacked_gradients(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, draws: Tensor | None
    ) -> tuple[Aggregation, Tensor]:
        one_task = torch.func.grad(self._query_loss, has_aux=True)
        gradients, (displacement, losses) = torch.func.vmap(one_task, (None, 0))(params, tasks)
        signal = displacement if self.signal == "displacement" else None
        aggregation = aggregator.aggregate_unchecked(
            gradients, signal, nonfinite=~torch.isfinite(losses), draws=draws
        )
        return aggregation, losses

    def _from_one_backward(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, draws: Tensor | None
    ) -> tuple[Aggregation, Tensor]:
        def query_losses(params: PyTree) -> tuple[Tensor, PyTree]:
            losses, (displacement, _) = torch.func.vmap(self._query_loss, (None, 0))(params, tasks)
            return losses, displacement

        losses, backward, displacement = _vjp(query_losses, params)

        def weighted(weights: Tensor, groups: list[int] | None) -> PyTree:
            if groups is None:
                return backward(weights.to(losses.dtype))[0]
            each = [backward(row.to(losses.dtype))[0] for row in weights]
            stack = tree_map(lambda *leaves: torch.stack(leaves), *each)
            return combine(stack, torch.eye(len(each)).to(weights), groups)

        measured = aggregator.measure(displacement, nonfinite=~torch.isfinite(losses), draws=draws)
        return aggregator.apply(measured, weighted, signal_is_direction=False), losses

    def _query_loss(self, params: PyTree, task: PyTree) -> tuple[Tensor, tuple[PyTree, Tensor]]:
        """Query loss after adaptation, and beside it the displacement and the loss as constants."""
        adapted = self._adapt(params, task["support"])
        loss = self.loss_fn(adapted, task["query"])
        displacement = tree_map(lambda a, b: (a - b).detach(), self._initial(params), adapted)
        return loss, (displacement, loss.detach())


def _vjp(
    function: Callable[[PyTree], tuple[Tensor, PyTree]], params: PyTree
) -> tuple[Tensor, Callable[[Tensor], tuple[PyTree]], PyTree]:
    """torch.func.vjp with an auxiliary output, whose type depends on it."""
    return torch.func.vjp(function, params, has_aux=True)  # type: ignore[return-value]


class MetaSGD(MAML):
    """MAML that learns one inner rate for every parameter entry (Li et al. 2017).

    The meta-parameters are ``{"params": θ, "lr": α}``, α a pytree like θ, and the inner loop is
    θ_i = θ − α ∘ ∇L_i(θ). Agreement is measured on the displacement of θ.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        steps: inner steps.
        first_order: hold the inner gradients constant; α still gets its gradient.
        compile: torch.compile the whole step as one graph.

    Raises:
        ValueError: the meta-parameters lack "params" or "lr", or the aggregator's scope is not
            "global": the displacement has no leaf for α.

    Source: Li et al. 2017 (arXiv:1707.09835), algorithm 1.

    >>> import gradagree_opt as ga
    >>> meta_sgd = ga.MetaSGD(lambda w, x: ((w - x) ** 2).mean(), steps=1)
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> meta = {"params": torch.tensor(0.0), "lr": torch.tensor(0.25)}
    >>> meta_sgd.step(meta, {"support": x, "query": x}, ga.Mean()).update
    {'params': tensor(-1.), 'lr': tensor(-10.)}
    """

    def __init__(
        self, loss_fn: LossFn, steps: int, *, first_order: bool = False, compile: bool = False
    ) -> None:
        self._steps = steps
        inner = InnerSGD(lr=0.0, steps=steps)  # its rate is a meta-parameter: see _adapt
        super().__init__(loss_fn, inner, first_order=first_order, compile=compile)

    def step(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> MetaStep:
        """One outer step on ``{"params": θ, "lr": α}``: see :meth:`MAML.step`."""
        if not isinstance(params, dict) or set(params) != {"params", "lr"}:
            raise ValueError(
                "expected meta-parameters {'params': …, 'lr': …}, found "
                f"{sorted(map(str, params)) if isinstance(params, dict) else type(params).__name__}"
            )
        if aggregator.scope != "global":
            raise ValueError(
                "expected an aggregator of scope 'global' for Meta-SGD, found "
                f"{aggregator.scope!r}: the displacement has no leaf for the inner rates"
            )
        return super().step(params, tasks, aggregator)

    def _adapt(self, params: PyTree, support: PyTree, steps: int | None = None) -> PyTree:
        inner = InnerSGD(params["lr"], self._steps)
        return inner(
            self.loss_fn, params["params"], support, first_order=self.first_order, steps=steps
        )

    def _initial(self, params: PyTree) -> PyTree:
        return params["params"]
