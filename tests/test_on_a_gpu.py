"""What runs on a CPU runs on a GPU: the same numbers, the same random numbers, no wait for it."""

import warnings

import pytest
import torch
from torch.nn.functional import dropout
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing.looping import every

from .engines.models import models
from .meta.loops import ALGORITHMS
from .meta.problems import loss_fn, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASE = problem(n=5)
MODELS = models(torch.float64)
ENGINES = ("stacked", "streamed", "matrix_free")
# On a host generator, RandomWeights' draws have to be copied, which waits for the GPU.
AGGREGATORS = {
    "agreement": lambda: ga.GradientAgreement(nonfinite="propagate"),
    "cosine": lambda: ga.GradientAgreement(similarity="cosine", nonfinite="propagate"),
    "others": lambda: ga.GradientAgreement(include_self=False, nonfinite="propagate"),
    "softmax": lambda: ga.GradientAgreement(normalization="softmax", nonfinite="propagate"),
    "leaf": lambda: ga.GradientAgreement(scope="leaf", nonfinite="propagate"),
    "matched": lambda: ga.GradientAgreement(match_norm="mean", nonfinite="propagate"),
    "drop": lambda: ga.GradientAgreement(nonfinite="drop"),
    "mean": lambda: ga.Mean(nonfinite="propagate"),
    "norm share": lambda: ga.NormShare(nonfinite="propagate"),
    "equal": lambda: ga.EqualAgreement(nonfinite="propagate"),
}
each_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS)
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])


@pytest.fixture
def unwaited():
    """Fails a test that makes the host wait for the GPU."""

    class Unwaited:
        def __enter__(self):
            torch.cuda.synchronize()
            with warnings.catch_warnings():  # it is a prototype
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Unwaited()
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(tree):
    return tree_map(lambda leaf: leaf.cuda(), tree)


def assert_same(found, expected):
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-12)


def served(engine, aggregator):
    if engine == "streamed":
        return "cosines" not in aggregator.weighting.needs
    return engine == "stacked" or (
        aggregator.weighting.needs <= {"draws"}
        and aggregator.scope == "global"
        and aggregator.nonfinite != "drop"
    )


@pytest.mark.parametrize("name", MODELS)
@every(engine=ENGINES, make=AGGREGATORS)
def test_engines_give_what_they_give_on_a_cpu(name, engine, make):
    if not served(engine, make()):
        return
    model = models(torch.float64)[name]
    gradients, losses = model.loop()
    expected = make().aggregate(gradients)
    model.module.cuda()
    result = ga.aggregate_gradients(
        model.loss_fn, model.params, on_gpu(model.tasks), make(), engine=engine
    )
    assert_same(result.update, expected.update)
    assert_same(result.weights, expected.weights)
    assert_same(result.losses, losses)


@each_algorithm
@every(make=AGGREGATORS, chunk_size=[None, 2])
def test_meta_steps_give_what_they_give_on_a_cpu(algorithm, make, chunk_size):
    if not algorithm.takes_groups and make().scope != "global":
        return
    meta = algorithm.build(loss_fn, 0.1, 2, chunk_size=chunk_size)
    params = CASE.meta(algorithm.learns_rates)
    expected = meta.step(params, CASE.tasks, make())
    result = meta.step(on_gpu(params), on_gpu(CASE.tasks), make())
    assert result.engine == expected.engine
    assert_same(result.update, expected.update)
    assert_same(result.weights, expected.weights)


@each_aggregator
def test_an_aggregation_does_not_wait_for_the_gpu(make, unwaited):
    stack = {"w": torch.randn(5, 40, 3, device="cuda"), "b": torch.randn(5, device="cuda")}
    aggregator = make()
    aggregator.aggregate(stack)
    with unwaited:
        aggregator.aggregate(stack)


def test_random_weights_of_a_generator_on_the_gpu_do_not_wait_for_it(unwaited):
    generator = torch.Generator("cuda").manual_seed(0)
    aggregator = ga.RandomWeights(generator, nonfinite="propagate")
    stack = torch.randn(5, 40, device="cuda")
    aggregator.aggregate(stack)
    with unwaited:
        aggregator.aggregate(stack)


@each_engine
@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention"])
def test_an_engine_does_not_wait_for_the_gpu(engine, name, unwaited):
    model = models(torch.float32)[name]
    model.module.cuda()
    arguments = (model.loss_fn, model.params, on_gpu(model.tasks), AGGREGATORS["agreement"]())
    ga.aggregate_gradients(*arguments, engine=engine)
    with unwaited:
        ga.aggregate_gradients(*arguments, engine=engine)


@each_algorithm
@pytest.mark.parametrize("name", ["agreement", "equal"])
def test_a_meta_step_does_not_wait_for_the_gpu(algorithm, name, unwaited):
    meta = algorithm.build(loss_fn, 0.1, 2)
    arguments = on_gpu(CASE.meta(algorithm.learns_rates)), on_gpu(CASE.tasks)
    meta.step(*arguments, AGGREGATORS[name]())
    with unwaited:
        meta.step(*arguments, AGGREGATORS[name]())


def task_losses(w, x):
    return ((w * x) ** 2).mean(1)


@each_memory
@pytest.mark.parametrize("maml", [False, True], ids=["multi-task", "MAML"])
def test_a_task_batch_does_not_wait_for_the_gpu(memory, maml, unwaited):
    w = torch.randn(6, device="cuda", requires_grad=True)
    x = torch.randn(4, 6, device="cuda")
    batch = ga.TaskBatch([w], AGGREGATORS["agreement"](), memory=memory)

    def step():
        for task in x:
            adapted = w - 0.1 * w * task
            loss = task_losses(adapted if maml else w, task.unsqueeze(0)).sum()
            batch.add(loss, **({"adapted": [adapted]} if maml else {}))
        batch.backward()

    step()
    with unwaited:
        step()
    assert torch.isfinite(w.grad).all()


def test_a_task_optimizer_does_not_wait_for_the_gpu(unwaited):
    w = torch.randn(6, device="cuda", requires_grad=True)
    x = torch.randn(4, 6, device="cuda")
    optimizer = ga.TaskOptimizer(torch.optim.SGD([w], lr=0.1), AGGREGATORS["agreement"]())
    optimizer.step(task_losses(w, x))
    with unwaited:
        optimizer.step(task_losses(w, x))


@each_engine
@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("tasks_on", ["cuda", "cpu"])
def test_every_pass_of_an_engine_draws_the_same_masks(engine, randomness, chunk_size, tasks_on):
    def masked(w, x):
        """Its gradient is 2 x times the mask of the task, its loss the sum of that."""
        return (dropout(w, 0.5) * x.to(w.device)).sum()

    params = torch.ones(200, dtype=torch.float64, device="cuda")
    tasks = torch.arange(1.0, 5.0, dtype=torch.float64, device=tasks_on)
    tasks = tasks.unsqueeze(1).expand(4, 200).contiguous()
    options = {"randomness": randomness, "chunk_size": chunk_size}
    aggregator = ga.GradientAgreement()
    torch.manual_seed(3)
    result = ga.aggregate_gradients(masked, params, tasks, aggregator, engine=engine, **options)
    torch.manual_seed(3)
    if engine == "streamed":
        options["chunk_size"] = 1
    gradients, losses = ga.task_gradients(masked, params, tasks, **options)
    masks = gradients / (2 * tasks.cuda())
    assert ((masks == 0) | (masks == 1)).all()
    assert (masks == masks[0]).all() == (randomness == "same")
    expected = aggregator.aggregate(gradients)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_aggregator
def test_half_precision_is_weighted_as_in_float32(dtype, make):
    half = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = make().aggregate(half.double())
    result = make().aggregate(half.cuda())
    torch.testing.assert_close(
        result.weights.cpu().double(), expected.weights, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(result.update.cpu().double(), expected.update, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_every_scale_is_safe(size):
    stack = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    expected = ga.GradientAgreement().aggregate(stack.double() * size)
    result = ga.GradientAgreement().aggregate(stack.cuda() * size)
    torch.testing.assert_close(
        result.weights.cpu().double(), expected.weights, rtol=1e-4, atol=1e-6
    )


def test_too_many_tasks_for_the_memory_are_told_the_chunk_size():
    params = torch.ones(2**28, device="cuda")
    tasks = torch.ones(10_000, 1, device="cuda")
    with pytest.raises(RuntimeError, match=r"10000 tasks at once to fit .*; give chunk_size=100"):
        ga.aggregate_gradients(
            lambda w, x: (w * x).square().sum(), params, tasks, ga.Mean(), engine="stacked"
        )


def test_auto_goes_on_where_the_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(candidates, "GPU_STACK_BYTES", 2**62)
    params = torch.ones(2**28, device="cuda")
    tasks = torch.ones(600, 1, device="cuda")
    result = ga.aggregate_gradients(lambda w, x: (w * x).sum(), params, tasks, ga.Mean())
    assert result.engine == "streamed"
    torch.testing.assert_close(result.update, params)


@pytest.mark.compiled
@each_algorithm
@pytest.mark.parametrize("name", ["agreement", "equal"])
def test_a_compiled_meta_step_equals_the_eager_one_and_does_not_wait(algorithm, name, unwaited):
    params, tasks = on_gpu(CASE.meta(algorithm.learns_rates)), on_gpu(CASE.tasks)
    aggregator = AGGREGATORS[name]()
    expected = algorithm.build(loss_fn, 0.1, 2).step(params, tasks, aggregator)
    meta = algorithm.build(loss_fn, 0.1, 2, compile=True)
    meta.step(params, tasks, aggregator)
    with unwaited:
        result = meta.step(params, tasks, aggregator)
    for a, b in zip(tree_leaves(result.update), tree_leaves(expected.update), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
