"""aggregate_gradients against a loop of backward() and the aggregator alone."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing.looping import every

from .models import models

MODELS = models(torch.float64)
ENGINES = ("stacked", "streamed", "matrix_free")
AGGREGATORS = {
    "agreement": ga.GradientAgreement,
    "clip": lambda: ga.GradientAgreement(negative="clip"),
    "softmax": lambda: ga.GradientAgreement(normalization="softmax"),
    "shorter": lambda: ga.GradientAgreement(match_norm="mean"),
    "others": lambda: ga.GradientAgreement(include_self=False),
    "mean": ga.Mean,
    "sum": ga.Sum,
    "norm share": ga.NormShare,
    "mean, longer": lambda: ga.Mean(match_norm="agreement"),
    "leaf": lambda: ga.GradientAgreement(scope="leaf"),
    "cosine": lambda: ga.GradientAgreement(similarity="cosine", match_norm="mean"),
    "random": lambda: ga.RandomWeights(torch.Generator().manual_seed(3)),
}
MATRIX_FREE = ("agreement", "clip", "mean", "sum", "shorter", "softmax", "random")
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_engine = pytest.mark.parametrize("engine", ENGINES)


def aggregate(model, aggregator, **options):
    return ga.aggregate_gradients(model.loss_fn, model.params, model.tasks, aggregator, **options)


def assert_equals_loop(result, model, aggregator):
    """The aggregator alone, on the gradients of a loop of backward()."""
    gradients, losses = model.loop()
    expected = aggregator.aggregate(gradients)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)
    logged = expected.diagnostics.log()
    found = {name: x for name, x in result.diagnostics.log().items() if x == x}
    assert found == pytest.approx({name: logged[name] for name in found}, rel=1e-5)
    return logged.keys() - found.keys()


@each_model
@every(aggregator=AGGREGATORS, engine=["auto", "stacked", "streamed"])
def test_equals_the_aggregator_on_the_gradients_of_a_loop(model, aggregator, engine):
    result = aggregate(model, aggregator(), engine=engine)
    assert not assert_equals_loop(result, model, aggregator())


@each_model
@every(name=MATRIX_FREE)
def test_matrix_free_equals_it_too_but_knows_no_norms(model, name):
    aggregator = AGGREGATORS[name]
    result = aggregate(model, aggregator(), engine="matrix_free")
    unknown = assert_equals_loop(result, model, aggregator())
    assert {"cancellation"} <= unknown <= {"cancellation", "norm_correlation"}


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in MATRIX_FREE])
def test_matrix_free_refuses_what_row_sums_do_not_tell(name):
    with pytest.raises(ValueError, match=r"engine='matrix_free' can serve, found that .*; take"):
        aggregate(MODELS["mlp"], AGGREGATORS[name](), engine="matrix_free")


@each_model
@each_engine
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_do_not_change_the_result(model, engine, chunk_size):
    result = aggregate(model, ga.GradientAgreement(), engine=engine, chunk_size=chunk_size)
    assert_equals_loop(result, model, ga.GradientAgreement())


@each_engine
def test_says_which_engine_ran(engine):
    assert aggregate(MODELS["mlp"], ga.Mean(), engine=engine).engine == engine


def test_an_unknown_engine_is_refused(without_type_checks):
    model = MODELS["mlp"]
    with pytest.raises(ValueError, match=r"expected engine to be one of .* found 'stack'"):
        ga.aggregate_gradients(model.loss_fn, model.params, model.tasks, ga.Mean(), engine="stack")


def test_a_nonfinite_task_is_named_or_dropped():
    model = MODELS["mlp"]
    x, y = (leaf.clone() for leaf in model.tasks)
    y[2] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[2\]"):
        ga.aggregate_gradients(model.loss_fn, model.params, (x, y), ga.GradientAgreement())
    dropped = ga.aggregate_gradients(
        model.loss_fn, model.params, (x, y), ga.GradientAgreement(nonfinite="drop")
    )
    rest = [0, 1, 3, 4]
    expected = ga.aggregate_gradients(
        model.loss_fn, model.params, (x[rest], y[rest]), ga.GradientAgreement()
    )
    torch.testing.assert_close(dropped.update, expected.update, rtol=1e-12, atol=1e-14)
    assert dropped.losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("engine", "chunk_size"), [("stacked", None), ("stacked", 2), ("matrix_free", None)]
)
def test_captured_equals_eager(engine, chunk_size, without_code_generation):
    eager, first, again = (
        aggregate(
            MODELS["mlp"],
            ga.GradientAgreement(),
            engine=engine,
            chunk_size=chunk_size,
            compile=compiled,
        )
        for compiled in (False, True, True)
    )
    for result in (first, again):
        torch.testing.assert_close(result.update, eager.update, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.weights, eager.weights, rtol=1e-11, atol=0)
        torch.testing.assert_close(result.losses, eager.losses, rtol=1e-12, atol=0)


def test_a_loop_over_the_tasks_is_not_compiled():
    with pytest.raises(ValueError, match=r"torch.compile takes whole, found 'streamed'"):
        aggregate(MODELS["mlp"], ga.Mean(), engine="streamed", compile=True)


@pytest.mark.compiled
def test_captured_still_raises_for_a_nonfinite_task(without_code_generation):
    model = MODELS["mlp"]
    x, y = (leaf.clone() for leaf in model.tasks)
    y[2] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[2\]"):
        ga.aggregate_gradients(
            model.loss_fn, model.params, (x, y), ga.GradientAgreement(), compile=True
        )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("degenerate", ["uniform", "zero"])
def test_matrix_free_sees_that_gradients_cancel_by_rounding(chunk_size, degenerate):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tasks = torch.cat([x, -x]) / 3
    result = ga.aggregate_gradients(
        lambda w, x: (torch.sin(w) * x).sum(),
        torch.linspace(-1, 1, 50),
        tasks,
        ga.GradientAgreement(degenerate=degenerate),
        engine="matrix_free",
        chunk_size=chunk_size,
    )
    assert result.diagnostics.degenerate
    assert torch.equal(result.weights, torch.full((6,), 1 / 6 if degenerate == "uniform" else 0.0))
    assert torch.equal(result.update, torch.zeros(50))


@pytest.mark.parametrize("match_norm", [None, "mean"])
def test_matrix_free_raises_where_gradients_cancel_if_asked_to(match_norm):
    tasks = torch.randn(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks = (tasks - tasks.mean(0)).float()
    aggregator = ga.GradientAgreement(degenerate="raise", match_norm=match_norm)
    with pytest.raises(ValueError, match="found scores that cancel to zero"):
        ga.aggregate_gradients(
            lambda w, x: (w * x).sum(), torch.ones(50), tasks, aggregator, engine="matrix_free"
        )


@pytest.mark.parametrize("engine", ["stacked", "streamed"])
@pytest.mark.parametrize("times", [1e4, 1e6])
def test_without_themselves_one_large_task_does_not_round_the_others_away(engine, times):
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    x[3] *= times
    gramian = x.double() @ x.double().T
    scores = (gramian - gramian.diagonal().diag()).sum(1)
    result = ga.aggregate_gradients(
        lambda w, x: (w * x).sum(),
        torch.ones(50),
        x,
        ga.GradientAgreement(include_self=False),
        engine=engine,
    )
    assert result.weights.dtype == result.update.dtype == torch.float32
    weights = (scores / scores.abs().sum()).float()
    torch.testing.assert_close(result.weights, weights, rtol=0, atol=1e-6)


@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(engine, dtype):
    n = 400  # to add one after the other in bfloat16 ends at 256
    tasks = torch.linspace(0.5, 1.5, n).unsqueeze(1).expand(n, 3).to(dtype)
    params = torch.ones(3, dtype=dtype)
    options = {"engine": engine}
    if engine == "matrix_free":
        with pytest.raises(RuntimeError, match="parameters or losses of less than float32"):
            ga.aggregate_gradients(_product, params, tasks, ga.GradientAgreement(), **options)
        return
    result = ga.aggregate_gradients(_product, params, tasks, ga.GradientAgreement(), **options)
    assert result.update.dtype == dtype
    expected = ga.GradientAgreement().aggregate(tasks.double())
    torch.testing.assert_close(result.weights, expected.weights.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.update, expected.update.to(dtype))


def _product(w, x):
    return (w * x).sum()


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("coarse", ["parameters", "losses"])
def test_maml_of_many_tasks_in_half_precision_does_not_stall(coarse, chunk_size):
    n, dtype = 1000, torch.bfloat16 if coarse == "parameters" else torch.float32
    maml = ga.MAML(
        lambda w, x: ((0.9 * w).sum() + 0 * x.sum()).bfloat16(),
        ga.InnerSGD(0.1, 1),
        chunk_size=chunk_size,
    )
    x = torch.zeros(n, 1, dtype=dtype)
    arguments = torch.ones(1, dtype=dtype), {"support": x, "query": x}, ga.Mean()
    result = maml.step(*arguments)
    assert result.engine == "stacked"
    torch.testing.assert_close(result.update, torch.tensor([0.9], dtype=dtype), rtol=4e-3, atol=0)
    if coarse == "parameters":
        unchecked = maml.aggregate_unchecked(*arguments)
        assert torch.equal(unchecked.update, result.update)


@pytest.mark.parametrize("coarse", ["parameters", "losses"])
def test_auto_takes_no_row_sums_of_half_precision(coarse, monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", 0)
    dtype = torch.bfloat16 if coarse == "parameters" else torch.float32
    tasks = torch.linspace(0.5, 1.5, 24).reshape(8, 3).to(dtype)
    result = ga.aggregate_gradients(
        lambda w, x: (w * x).sum().bfloat16(),
        torch.ones(3, dtype=dtype),
        tasks,
        ga.GradientAgreement(),
    )
    assert result.engine == "stacked"
    expected = ga.GradientAgreement().aggregate(tasks.double())
    torch.testing.assert_close(result.update, expected.update.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streamed_loss_of_no_parameter_has_a_gradient_of_zeros(dtype):
    # The sum of these parameters is infinite in float16.
    params, tasks = torch.full((4,), 6e4, dtype=dtype), torch.tensor([[0.0], [1.0]]).to(dtype)
    result = ga.aggregate_gradients(
        lambda w, x: x.sum() if x[0] else (w * x).sum(),
        params,
        tasks,
        ga.Mean(),
        engine="streamed",
    )
    assert torch.equal(result.update, torch.zeros_like(params))
    assert result.losses.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("live", ["parameters", "a captured tensor", "tasks"])
def test_the_answer_has_no_graph(engine, live):
    params, captured, tasks = torch.ones(3), torch.ones(3), torch.rand(4, 3)
    {"parameters": params, "a captured tensor": captured, "tasks": tasks}[live].requires_grad_()
    result = ga.aggregate_gradients(
        lambda w, x: (w * captured * x).square().sum(),
        params,
        tasks,
        ga.GradientAgreement(),
        engine=engine,
    )
    tensors = [result.update, result.weights, result.scores, result.losses, *result.diagnostics]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.isfinite(result.update).all()
