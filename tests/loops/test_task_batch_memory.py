"""How many backward passes a batch takes, and whose graphs are alive."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_testing.memory import saved_bytes

TASKS = 5
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])


class CountsBackward(torch.autograd.Function):
    """The identity between the parameters and all tasks: a backward pass goes through it once."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CountsBackward.passes += 1
        return grad


@pytest.fixture
def passes():
    CountsBackward.passes = 0
    return lambda: CountsBackward.passes


@pytest.fixture
def saved():
    """Bytes that graphs made during the test hold on to."""
    with saved_bytes() as peak:
        yield peak


def weights():
    return torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()


def task_loss(w, task):
    x = torch.linspace(0, 1 + task, 3)
    return (torch.sin(w @ x) - task).square().mean()


def adapt(w, task):
    (grad,) = torch.autograd.grad(task_loss(w, task), w, create_graph=True)
    return w - 0.1 * grad


def add(batch, w, task, maml):
    if maml:
        adapted = adapt(w, task)
        batch.add(task_loss(adapted, task), adapted=[adapted])
    else:
        batch.add(task_loss(w, task))


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        (ga.GradientAgreement(), 1),
        (ga.Mean(), 1),
        (ga.GradientAgreement(nonfinite="propagate"), 1),
        (ga.GradientAgreement(match_norm="mean"), 2),
    ],
    ids=["agreement", "mean", "propagate", "and one for the norm"],
)
def test_maml_form_takes_one_backward_pass_whatever_the_number_of_tasks(
    passes, aggregator, expected
):
    parameter = weights()
    batch = ga.TaskBatch([parameter], aggregator)
    w = CountsBackward.apply(parameter)
    for task in range(TASKS):
        inner = w - 0.1 * torch.ones_like(w) * task
        batch.add(task_loss(inner, task), adapted=[inner])
    assert passes() == 0
    batch.backward()
    assert passes() == expected


@pytest.mark.parametrize("maml", [True, False])
def test_stream_takes_one_backward_pass_at_every_add(passes, maml):
    parameter = weights()
    batch = ga.TaskBatch([parameter], ga.GradientAgreement(), memory="stream")
    for task in range(TASKS):
        add(batch, CountsBackward.apply(parameter), task, maml)
        assert passes() == task + 1
    before = passes()
    batch.backward()
    assert passes() == before


@each_memory
@pytest.mark.parametrize("maml", [True, False])
def test_stream_keeps_no_graph_and_graph_keeps_all(saved, memory, maml):
    w = weights()
    batch = ga.TaskBatch([w], ga.GradientAgreement(), memory=memory)
    alive = []
    for task in range(TASKS):
        add(batch, w, task, maml)
        alive.append(saved.now)
    if memory == "stream":
        assert alive == [0] * TASKS
    else:
        assert alive[0] > 0
        assert alive == [alive[0] * (task + 1) for task in range(TASKS)]
    batch.backward()
    assert saved.now == 0


@pytest.mark.parametrize("maml", [True, False])
def test_peak_of_stream_does_not_grow_with_the_tasks(maml):
    peaks = {}
    for memory in ("graph", "stream"):
        for n in (1, 10):
            w = weights()
            batch = ga.TaskBatch([w], ga.GradientAgreement(), memory=memory)
            with saved_bytes() as peak:
                for task in range(n):
                    add(batch, w, task, maml)
                batch.backward()
            peaks[memory, n] = peak.most
    assert peaks["stream", 10] == peaks["stream", 1] > 0
    assert peaks["graph", 10] == 10 * peaks["graph", 1]


@pytest.mark.parametrize("match_norm", [None, "mean"])
@pytest.mark.parametrize(("memory", "maml"), [("graph", True), ("stream", True), ("stream", False)])
def test_a_loss_that_the_caller_holds_keeps_no_graph_after_backward(
    saved, memory, maml, match_norm
):
    """As with loss.backward(), which frees what it has walked through."""
    w = weights()
    batch = ga.TaskBatch([w], ga.GradientAgreement(match_norm=match_norm), memory=memory)
    held = []
    for task in range(TASKS):
        adapted = w - 0.1 * task * torch.ones_like(w)
        held.append(task_loss(adapted if maml else w, task))
        batch.add(held[-1], adapted=[adapted]) if maml else batch.add(held[-1])
    batch.backward()
    assert saved.now == 0


@pytest.mark.parametrize("maml", [True, False])
@each_memory
def test_result_and_grad_hold_no_graph(memory, maml):
    w = weights()
    batch = ga.TaskBatch([w], ga.GradientAgreement(match_norm="mean"), memory=memory)
    for task in range(TASKS):
        add(batch, w, task, maml)
    update, *others, diagnostics, losses = batch.backward()
    tensors = [*update.values(), *others, *diagnostics, w.grad]
    tensors += [] if losses is None else [losses]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_losses_that_share_a_graph_need_memory_graph():
    """A shared encoder run once: stream frees it at the first add, and says so at the second."""
    w = weights()

    def losses():
        return (w @ torch.linspace(0, 1, 3 * TASKS).reshape(3, TASKS)).square().mean(0).unbind()

    graph = ga.TaskBatch([w], ga.Mean())
    for loss in losses():
        graph.add(loss)
    (expected,) = torch.autograd.grad(torch.stack(losses()).mean(), w)
    graph.backward()
    torch.testing.assert_close(w.grad, expected)

    stream = ga.TaskBatch([w], ga.Mean(), memory="stream")
    first, second, *_ = losses()
    stream.add(first)
    with pytest.raises(ValueError, match="one that a backward pass has freed"):
        stream.add(second)
    assert len(stream) == 1
