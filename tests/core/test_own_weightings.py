"""A weighting of one's own: taken as it is, or refused in one sentence when it is given."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.core.agreement import AgreementWeighting
from gradagree_opt.core.few_passes import measures_directions
from gradagree_testing.configurations import CONFIGURATIONS

STACK = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 2.0]])


def scores(statistics: ga.Statistics) -> torch.Tensor:
    return statistics.row_sums / statistics.row_sums.abs().sum(-1, keepdim=True)


def test_a_function_weights_as_the_class_of_the_same_formula():
    for scope in ("global", "leaf"):
        own = ga.Aggregator(scores, scope=scope).aggregate([STACK, -STACK])
        ours = ga.GradientAgreement(scope=scope).aggregate([STACK, -STACK])
        assert torch.equal(own.weights, ours.weights)
        assert torch.equal(own.update[1], ours.update[1])
        assert not own.diagnostics.degenerate.any()


def test_a_function_serves_every_engine_and_as_the_length_of_another():
    loss_fn = lambda w, x: ((w - x) ** 2).sum()  # noqa: E731 - two of one line
    take = partial(ga.aggregate_gradients, loss_fn, torch.zeros(2), STACK)
    for engine in ("stacked", "matrix_free", "streamed"):
        update = take(ga.Aggregator(scores), engine=engine).update
        torch.testing.assert_close(update, take(ga.GradientAgreement()).update)
    length = ga.Mean(match_norm=ga.Aggregator(scores))(STACK).norm()
    torch.testing.assert_close(length, ga.GradientAgreement()(STACK).norm())


class Remembering:
    """Weights by all scores that it has ever seen."""

    needs = frozenset()
    draws_itself = True

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self, statistics: ga.Statistics) -> torch.Tensor:
        self.seen.append(statistics.row_sums * statistics.scale.square())
        total = torch.stack(self.seen).sum(0)
        return total / total.abs().sum()


def seen_by(step: Callable[[ga.Aggregator], object], **options: Any) -> list[torch.Tensor]:
    weighting = Remembering()
    step(ga.Aggregator(weighting, **options))
    return weighting.seen


def collected(aggregator: ga.Aggregator) -> ga.CollectedTasks:
    """The tasks' losses on one graph, whose gradients are the rows of the stack."""
    w = torch.zeros(2, requires_grad=True)
    shared, batch = 1.0 * w, ga.TaskBatch([w], aggregator)
    for row in STACK:
        batch.add(shared @ row)
    return batch.backward()


def test_a_weighting_that_remembers_is_asked_once_for_a_batch_and_of_its_own_scores():
    scores_of = STACK @ STACK.sum(0)
    steps: dict[str, Callable[[ga.Aggregator], object]] = {
        "stack": lambda aggregator: aggregator(STACK),
        "graph": collected,
        "engines": lambda aggregator: ga.aggregate_gradients(
            torch.dot, torch.zeros(2), STACK, aggregator
        ),
    }
    for name, step in steps.items():
        for nonfinite in ("raise", "propagate"):
            (seen,) = seen_by(step, nonfinite=nonfinite)
            assert torch.allclose(seen, scores_of), (name, nonfinite)
    assert len(seen_by(lambda aggregator: aggregator(1e-17 * STACK))) == 1
    take = partial(ga.aggregate_gradients, torch.dot, torch.zeros(2), STACK)
    with pytest.raises(ValueError, match="asked twice"):
        take(ga.Aggregator(Remembering()), engine="matrix_free")


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_an_aggregator_tells_whether_it_is_made_for_the_vectors_that_it_combines(configuration):
    assert measures_directions(configuration.make()) == configuration.of_directions


def test_a_weighting_of_ones_own_may_be_made_for_the_vectors_that_it_combines():
    def loss_fn(w, x):
        return ((w - x) ** 4).sum()

    def step(aggregator, signal=None):
        inner = ga.InnerSGD(0.01, 1)
        tasks = {"support": STACK, "query": STACK}
        return ga.MAML(loss_fn, inner, signal=signal).step(torch.zeros(2), tasks, aggregator)

    own = ga.Aggregator(OfDirections())
    assert torch.equal(step(own).weights, step(own, "gradient").weights)
    plain = ga.Aggregator(scores)
    assert torch.equal(step(plain).weights, step(plain, "displacement").weights)
    assert not torch.allclose(step(own).weights, step(plain).weights, rtol=1e-2)


class OfDirections:
    needs = frozenset[ga.Need]()
    measures_directions = True

    def __call__(self, statistics: ga.Statistics) -> torch.Tensor:
        return scores(statistics)


class Misspelt:
    needs = frozenset({"squared_norm"})

    def __call__(self, statistics: ga.Statistics) -> torch.Tensor:
        return scores(statistics)


@pytest.mark.parametrize(
    ("weighting", "error", "parts"),
    [
        (AgreementWeighting, TypeError, ("a weighting", "the class AgreementWeighting", "call it")),
        ("agreement", TypeError, ("a weighting", "'agreement'")),
        (None, TypeError, ("a weighting", "None")),
        (ga.EqualAgreement(), TypeError, ("a weighting", "EqualAgreement of", "as it is")),
        (Misspelt(), ValueError, ("squared_norms", "found 'squared_norm'")),
    ],
)
def test_what_is_no_weighting_is_refused_when_it_is_given(
    weighting: Any, error: type[Exception], parts: tuple[str, ...], without_type_checks: None
):
    with pytest.raises(error) as caught:
        ga.Aggregator(weighting)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("answer", "error", "found"),
    [
        (lambda statistics: statistics.row_sums.sum(), ValueError, "[]"),
        (lambda statistics: statistics.row_sums[:2], ValueError, "[2]"),
        (lambda statistics: 1.0, TypeError, "float"),
        (lambda statistics: None, TypeError, "NoneType"),
        (lambda statistics: statistics.row_sums * 1j, TypeError, "torch.complex64"),
        (lambda s: ga.Decision(s.row_sums, None, s.scale == 0), ValueError, "NoneType"),
        (lambda s: ga.Decision(s.row_sums, s.row_sums[:2], s.scale == 0), ValueError, "[2]"),
        (lambda s: ga.Decision(s.row_sums, s.row_sums, False), ValueError, "bool"),
        (lambda s: ga.Decision(s.row_sums, s.row_sums, s.row_sums == 0), ValueError, "[3]"),
    ],
)
def test_what_are_no_weights_is_refused(
    answer: Any, error: type[Exception], found: str, without_type_checks: None
):
    with pytest.raises(error, match="weighting") as caught:
        ga.Aggregator(answer)(STACK)
    assert f"found {found}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_weights_that_choose_tasks_are_those_numbers(dtype: torch.dtype):
    chosen = ga.Aggregator(lambda statistics: (statistics.row_sums > 8).to(dtype))
    result = chosen.aggregate(STACK)  # its row sums are 9, 6 and 3
    assert result.weights.dtype == torch.float32
    assert result.weights.tolist() == [1, 0, 0]
    assert torch.equal(result.update, STACK[0])
    assert result.diagnostics.log()["effective_tasks"] == 1


@pytest.mark.parametrize(
    "aggregator",
    [
        ga.Mean(),
        ga.Mean(match_norm="agreement"),
        ga.Sum(nonfinite="drop"),
        ga.GradientAgreement(similarity="cosine", scope="leaf", degenerate="zero"),
        ga.EqualAgreement(damping=0.1, match_norm=ga.NormShare(), nonfinite="propagate"),
        ga.GramianPower(-0.5, match_norm="mean"),
        ga.GeometricMedian(),
    ],
    ids=repr,
)
def test_an_aggregator_shows_what_makes_it_again(aggregator: ga.Aggregator):
    again = eval(repr(aggregator), {name: getattr(ga, name) for name in ga.__all__})
    assert type(again) is type(aggregator)
    assert again.weighting == aggregator.weighting
    assert (again.scope, again.nonfinite) == (aggregator.scope, aggregator.nonfinite)
    assert again.reference == aggregator.reference
    assert torch.equal(again(STACK), aggregator(STACK))


class Own(ga.Aggregator):
    """Keeps one of its arguments, in its own way."""

    def __init__(
        self,
        gone: int,
        kept: int,
        measure: object = None,
        *,
        name: str,
        biases: torch.Tensor = torch.ones(3),  # noqa: B008 - a default that is a tensor
        **others: int,
    ) -> None:
        super().__init__(scores, nonfinite="drop")
        self.kept, self.name, self.biases = kept, name, biases


def test_an_aggregator_shows_what_it_has_kept_of_its_arguments_and_nothing_else():
    assert repr(Own(1, 2, name="a", more=3)) == "Own(kept=2, name='a')"
    other = Own(1, 2, name="a", biases=torch.zeros(3))
    assert repr(other) == "Own(kept=2, name='a', biases=tensor([0., 0., 0.]))"


class Unmade(ga.Aggregator):
    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate


class Remade(ga.Aggregator):
    def __init__(self) -> None:
        super().__init__(scores)

    @property
    def needs(self) -> frozenset[Any]:
        return self.misspelt


@pytest.mark.parametrize(
    "use",
    [
        lambda own: own(STACK),
        lambda own: own.aggregate([STACK]),
        lambda own: ga.TaskBatch([torch.ones(1, requires_grad=True)], own),
        lambda own: ga.aggregate_gradients(lambda w, x: (w - x).sum(), STACK[0], STACK, own),
        lambda own: ga.distributed(own),
    ],
    ids=["call", "aggregate", "TaskBatch", "aggregate_gradients", "distributed"],
)
def test_an_aggregator_that_was_not_made_is_told_to_call_super(use: Any):
    assert repr(Unmade(0.1)) == "Unmade(rate=0.1)"
    with pytest.raises(TypeError, match=r"expected Unmade.* super\(\).* found no weighting; give"):
        use(Unmade())


def test_an_attribute_that_is_missing_is_named_as_python_does():
    with pytest.raises(AttributeError, match="'Mean' object has no attribute 'weights'"):
        ga.Mean().weights  # noqa: B018 - what is looked up raises
    with pytest.raises(AttributeError, match="'Remade' object has no attribute 'misspelt'"):
        Remade()(STACK)
