"""The graph that the losses of n tasks hang on: sums of their gradients, by passes over it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.results import Combine
from gradagree_opt.core.stacks import PyTree, accumulation_dtype, is_coarse, tree_norm
from gradagree_opt.engines.recomputed import cuts_refused, refuse_reentrant
from gradagree_opt.loops.graphs import Survey, stale_graphs, survey


class LossGraph:
    """Losses of n tasks, from whose graph sums of their gradients are taken.

    Args:
        losses: n scalars.
        parameters: the leaves, by name, that gradients are taken of.
        copies: detached copies of parameters, whose gradients count for these (FOMAML).
        used: of every task, a set to be filled with the names of the parameters that a pass has
            found a gradient of; after a pass over all tasks together, those that any of them uses.
        kept: whether the graphs are to outlive the last pass.

    Attributes:
        n: number of tasks.
        params: the parameters.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        copies: Sequence[Mapping[str, Tensor]] = (),
        *,
        used: Sequence[set[str]] = (),
        kept: bool = False,
    ) -> None:
        self.n = len(losses)
        self.params = dict(parameters)
        self._losses = list(losses)
        self._used = used
        self._kept = kept
        places = chain(parameters.items(), *(copy.items() for copy in copies))
        # Tasks may share a copy, whose one gradient is the sum over them.
        self._places = list(
            {(name, id(tensor)): (name, tensor) for name, tensor in places}.values()
        )
        self._tensors = [tensor for _, tensor in self._places]

    @cached_property
    def survey(self) -> Survey:
        """What the losses share, and whose code takes part in their backward pass."""
        return survey(self._losses)

    @property
    def ones(self) -> Tensor:
        """Ones ``[n]``, of the dtype and on the device of an aggregation."""
        dtype = accumulation_dtype([*self._losses, *self._tensors])
        return torch.ones(self.n, dtype=dtype, device=self._tensors[0].device)

    @property
    def is_coarse(self) -> bool:
        """Whether a sum over tasks would be rounded to less than float32."""
        return is_coarse([*self._losses, *self._tensors])

    @property
    def eps(self) -> float:
        """To which the gradients are rounded."""
        return max(torch.finfo(t.dtype).eps for t in (*self._losses, *self._tensors))

    @property
    def is_hooked(self) -> bool:
        """Whether a hook looks at the gradient of a parameter before it is accumulated."""
        return any(getattr(tensor, "_backward_hooks", None) for tensor in self.params.values())

    def gradient(self, task: int, *, retain_graph: bool) -> dict[str, Tensor]:
        """∇L_i by name, zeros where the loss does not depend on a parameter."""
        loss = self._losses[task]
        with stale_graphs():
            found = torch.autograd.grad(
                loss, self._tensors, retain_graph=retain_graph, allow_unused=True
            )
        return self._by_name(found, self._used[task : task + 1])

    def gradients(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Loss and gradient of every task in turn, in float32 or better."""
        dtype, device = accumulation_dtype(self._tensors), self._tensors[0].device
        for task, loss in enumerate(self._losses):  # held by no name, so that one exists at a time
            yield (
                loss.detach().to(device),
                [grad.to(dtype) for grad in self.gradient(task, retain_graph=True).values()],
            )

    def weighted(self, weights: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        """Σ_i w_i ∇L_i by name, zeros where no loss depends on a parameter."""
        with stale_graphs():
            found = torch.autograd.grad(
                self._losses,
                self._tensors,
                self._cotangents(weights),
                retain_graph=retain_graph or self._kept,
                allow_unused=True,
            )
        return self._by_name(found, self._used)

    def combined_for(self, aggregator: Aggregator, /) -> Combine:
        """:meth:`weighted` as aggregators call it; the last call frees the graph, as backward()."""
        passes = 1 if aggregator.reference is None else 2

        def weighted(weights: Tensor, _: list[int] | None) -> PyTree:
            nonlocal passes
            passes -= 1
            return self.weighted(weights, retain_graph=passes > 0)

        return weighted

    def row_sums(self, *, waits: bool) -> tuple[Tensor, Tensor, Tensor]:
        """g_i · Σ_j g_j ``[n]`` in units of scale², the scale, and ‖Σ_j g_j‖.

        One backward pass gives Σ_j g_j = Jᵀ 1, one through it the rest: v ↦ Jᵀ v is linear, so that
        its own vjp is the Jacobian.

        Args:
            waits: whether the host may wait for the device to save a copy of Σ_j g_j.

        Raises:
            ValueError: the graph of a loss is stale.
            RuntimeError: the graph cannot be differentiated twice.
        """
        with torch.enable_grad():
            weights = self.ones.requires_grad_()
            cotangents = self._cotangents(weights)
        with cuts_refused(self.survey.foreign), stale_graphs():
            found = torch.autograd.grad(
                self._losses, self._tensors, cotangents, create_graph=True, allow_unused=True
            )
        sums = [each for each in found if each is not None and each.requires_grad]
        if not sums or any(each.layout != torch.strided for each in sums):
            raise RuntimeError("gradients that are constant or sparse")
        del found
        directions = [each.detach() for each in sums]
        norm = tree_norm(directions, scaled=not waits)
        scale = torch.ones_like(norm)
        if not waits or not torch.isfinite(norm):
            norm = tree_norm(directions)
            scale = or_one(norm)
            for index, each in enumerate(directions):
                directions[index] = each / scale.to(each)
        (rows,) = torch.autograd.grad(sums, weights, directions)
        return rows.to(norm) / scale, scale, norm

    def _cotangents(self, weights: Tensor) -> list[Tensor]:
        pairs = zip(weights.unbind(), self._losses, strict=True)
        return [weight.to(loss.device, loss.dtype) for weight, loss in pairs]

    def _by_name(
        self, found: Sequence[Tensor | None], used: Sequence[set[str]]
    ) -> dict[str, Tensor]:
        """Dense gradients by parameter; the gradient of a copy counts for its parameter.

        ``used``: the sets of the tasks they are of, to which the names are added.
        """
        if any(grad is None for grad in found):
            refuse_reentrant(self.survey.foreign)
        total: dict[str, Tensor] = {}
        for (name, _), grad in zip(self._places, found, strict=True):
            if grad is not None:
                for names in used:
                    names.add(name)
                dense = grad if grad.layout == torch.strided else grad.to_dense()
                total[name] = total[name] + dense if name in total else dense
        return {n: total[n] if n in total else torch.zeros_like(p) for n, p in self.params.items()}
