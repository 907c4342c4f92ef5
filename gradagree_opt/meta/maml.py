"""MAML, FOMAML and Meta-SGD: the direction is the meta-gradient, the signal the displacement."""

from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.batchnorm import statistics_refused
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.few_passes import measures_directions
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.candidates import EngineName
from gradagree_opt.engines.choice import Runner
from gradagree_opt.engines.losses import LossFn, Randomness, ScalarLoss, TaskLoss, TaskMap
from gradagree_opt.engines.meant import naming_what_was_meant
from gradagree_opt.meta.adapting import adapt_to
from gradagree_opt.meta.inner import InnerLoop, InnerSGD, check_inner, watched
from gradagree_opt.meta.steps import MetaStep, check_tasks
from gradagree_opt.options import check_choice

Signal = Literal["displacement", "gradient"]


class MAML:
    """Model-Agnostic Meta-Learning: θ ← θ − α_out Σ_i w_i ∇L_i(θ_i).

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        inner: the inner loop, as :class:`gradagree_opt.InnerSGD`.
        first_order: take ∂θ_i/∂θ for the identity (FOMAML); False differentiates through the
            inner loop. The paper does not say which.
        signal: what the tasks are weighted by: "displacement" θ − θ_i (paper), which needs only one
            backward pass of the weighted loss; "gradient", the meta-gradient of each task; None,
            the gradient for Equal Agreement, negative powers of the Gram matrix, clipped norms and
            the geometric median, whose weights would say nothing of an update of other vectors,
            and the displacement for the rest.
        engine: "auto", or which engine gives the meta-gradients: "one_backward" (one backward pass
            of the weighted loss, for the displacement), "stacked", "streamed" or "matrix_free" (for
            the gradient), as in :func:`gradagree_opt.aggregate_gradients`.
        chunk_size: tasks per vmap, which bounds the memory of "stacked"; None for all at once, 1
            for no vmap.
        randomness: of dropout and the like under vmap, as in ``torch.func.vmap``.
        compile: torch.compile the whole step as one graph (a minute the first time).

    Source: Eshratifar et al. 2018, algorithm 1, the MAML form; Finn et al. 2017.

    >>> import torch
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
        signal: Signal | None = None,
        engine: EngineName = "auto",
        chunk_size: int | None = None,
        randomness: Randomness = "error",
        compile: bool = False,
    ) -> None:
        check_choice("signal", signal, (None, "displacement", "gradient"))
        check_choice("first_order", first_order, (True, False))
        self.loss_fn = ScalarLoss(loss_fn)
        check_inner(inner)
        self.inner = inner
        self.first_order = first_order
        self.signal = signal
        self._map = TaskMap(chunk_size, randomness, (loss_fn, inner))
        self._engine: EngineName = engine
        self._compile = compile
        self._runners = self._make_runners()

    def _make_runners(self) -> dict[Signal, Runner]:
        signals: tuple[Signal, ...] = ("displacement", "gradient")
        return {
            each: Runner(
                self._task_loss(each),
                self._engine,
                self._compile,
                signal_like=self._initial if each == "displacement" else lambda _: (),
            )
            for each in signals
            if self.signal in (None, each)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_runners"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._runners = self._make_runners()

    def step(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> MetaStep:
        """One outer step, without changing the parameters.

        Args:
            params: pytree of floating-point tensors; of MetaSGD, ``{"params": θ, "lr": α}``.
            tasks: ``{"support": batch, "query": batch}`` with leaves ``[n, *shape]``.
            aggregator: what weights the tasks.

        Raises:
            ValueError, TypeError: the tasks are not task-stacked, the loss is no real scalar or
                depends on no parameter, the model changes its buffers, the aggregator refuses the
                signals, or several ranks train.
        """
        check_aggregator(aggregator)
        form = TaskForm.LOSSES
        if self.signal != "gradient":
            form |= TaskForm.DISPLACEMENTS
        with aggregator.step_of_ranks(form=form), statistics_refused():
            self._check(params, aggregator)
            n = check_tasks(params, tasks, "support", "query", least=aggregator.fewest)
            source = (self.loss_fn, self.inner)
            with naming_what_was_meant(self._plain_loss, params, tasks["support"], source):
                return self._runner(aggregator)(params, tasks, n, aggregator)

    def aggregate_unchecked(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /
    ) -> Aggregation:
        """:meth:`step` without its checks and its losses: runs under vmap and torch.compile.

        Args:
            params, tasks, aggregator: as for :meth:`step`.
        """
        return self._runner(aggregator).unchecked(params, tasks, aggregator)

    def adapt(self, params: PyTree, support: PyTree, /, *, steps: int | None = None) -> PyTree:
        """Parameters adapted to the support set of one task, in ``steps`` inner steps.

        Raises:
            TypeError, ValueError, RuntimeError: these are no parameters, or no support set of one
                task; the model changes its buffers, or torch.func cannot run it.
        """
        adapt = partial(self._adapt, self.first_order, params, steps=steps)
        source = (self.loss_fn, self.inner)
        return adapt_to(support, adapt, params, self._plain_loss, source)

    def _runner(self, aggregator: Aggregator) -> Runner:
        return self._runners[self._signal_for(aggregator)]

    def _signal_for(self, aggregator: Aggregator) -> Signal:
        own: Signal = "gradient" if measures_directions(aggregator) else "displacement"
        return own if self.signal is None else self.signal

    def _task_loss(self, signal: Signal) -> TaskLoss:
        function = partial(self._query_loss, signal)
        return TaskLoss(
            partial(function, self.first_order),
            signal == "gradient",
            self._map,
            adapts=True,
            first_order=None if self.first_order else partial(function, True),
            plain_loss=lambda params, task: self._plain_loss(params, task["support"]),
        )

    def _adapt(
        self, first_order: bool, params: PyTree, support: PyTree, *, steps: int | None = None
    ) -> PyTree:
        with watched(self.inner):
            return self.inner(self.loss_fn, params, support, first_order=first_order, steps=steps)

    def _plain_loss(self, params: PyTree, batch: PyTree) -> Tensor:
        """Of the parameters before adaptation."""
        return self.loss_fn(self._initial(params), batch)

    def _check(self, params: PyTree, aggregator: Aggregator) -> None:
        """For a subclass: checks its meta-parameters, and the aggregator with them."""

    def _initial(self, params: PyTree) -> PyTree:
        """The part of the meta-parameters that the inner loop starts from."""
        return params

    def _query_loss(
        self, signal: Signal, first_order: bool, params: PyTree, task: PyTree
    ) -> tuple[Tensor, tuple[PyTree, Tensor]]:
        """Query loss after adaptation; as constants the signal, if it is another, and the loss."""
        adapted = self._adapt(first_order, params, task["support"])
        loss = self.loss_fn(adapted, task["query"])
        displacement = tree_map(lambda a, b: (a - b).detach(), self._initial(params), adapted)
        return loss, (displacement if signal == "displacement" else (), loss.detach())


class MetaSGD(MAML):
    """MAML that learns one inner rate for every parameter entry (Li et al. 2017).

    The meta-parameters are ``{"params": θ, "lr": α}``, α a pytree like θ, and the inner loop is
    θ_i = θ − α ∘ ∇L_i(θ). The displacement is that of θ, the meta-gradient that of both.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        steps: inner steps.
        first_order: hold the inner gradients constant; α still gets its gradient.
        signal, engine, chunk_size, randomness, compile: as in :class:`MAML`.

    Raises:
        ValueError: the meta-parameters lack "params" or "lr", or the aggregator's scope is not
            "global" where the signal is the displacement, which has no leaf for α.

    Source: Li et al. 2017 (arXiv:1707.09835), algorithm 1.

    >>> import torch
    >>> import gradagree_opt as ga
    >>> meta_sgd = ga.MetaSGD(lambda w, x: ((w - x) ** 2).mean(), steps=1)
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> meta = {"params": torch.tensor(0.0), "lr": torch.tensor(0.25)}
    >>> meta_sgd.step(meta, {"support": x, "query": x}, ga.Mean()).update
    {'params': tensor(-1.), 'lr': tensor(-10.)}
    """

    def __init__(
        self,
        loss_fn: LossFn,
        steps: int,
        *,
        first_order: bool = False,
        signal: Signal | None = None,
        engine: EngineName = "auto",
        chunk_size: int | None = None,
        randomness: Randomness = "error",
        compile: bool = False,
    ) -> None:
        self._steps = steps
        super().__init__(
            loss_fn,
            InnerSGD(lr=0.0, steps=steps),  # its rate is a meta-parameter: see _adapt
            first_order=first_order,
            signal=signal,
            engine=engine,
            chunk_size=chunk_size,
            randomness=randomness,
            compile=compile,
        )

    def _check(self, params: PyTree, aggregator: Aggregator) -> None:
        _check_meta_parameters(params)
        if aggregator.scope != "global" and self._signal_for(aggregator) == "displacement":
            raise ValueError(
                "expected an aggregator of scope 'global' for the displacements of Meta-SGD, found "
                f"{aggregator.scope!r}: they have no leaf for the inner rates; take "
                "signal='gradient'"
            )

    def _adapt(
        self, first_order: bool, params: PyTree, support: PyTree, *, steps: int | None = None
    ) -> PyTree:
        _check_meta_parameters(params)
        inner = InnerSGD(params["lr"], self._steps)
        return inner(self.loss_fn, params["params"], support, first_order=first_order, steps=steps)

    def _initial(self, params: PyTree) -> PyTree:
        return params["params"]


def _check_meta_parameters(params: PyTree) -> None:
    if not isinstance(params, dict) or set(params) != {"params", "lr"}:
        found = sorted(map(str, params)) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            f"expected meta-parameters {{'params': …, 'lr': …}}, found {found}; give the inner "
            "rates beside the parameters, as in {'params': params, 'lr': tree_map(…, params)}"
        )
