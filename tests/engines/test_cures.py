"""What an error advises has been tried: following it runs the model, equal to a loop by hand."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import ctc_loss, embedding_bag, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import gradagree_opt as ga

SIZE = 8


class Square(torch.autograd.Function):
    """Of the classic kind, which torch.func does not run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def classic(params, x):
    return Square.apply(x @ params["w"]).mean()


def checkpointed(params, x):
    return checkpoint(lambda x: (x @ params["w"]).tanh(), x, use_reentrant=False).square().mean()


def packed(params, x, module=nn.RNN(SIZE, SIZE, batch_first=True)):  # noqa: B008 - its code alone
    sequences = nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2], batch_first=True)
    weights = {name: params["w"] if p.ndim == 2 else p for name, p in module.named_parameters()}
    weights = {n: w if n[0] == "w" else torch.zeros(SIZE) for n, w in weights.items()}
    return functional_call(module, weights, (sequences,))[0].data.square().mean()


def gru(params, x, module=nn.GRU(SIZE, SIZE, batch_first=True)):  # noqa: B008 - likewise
    weights = {n: params["w"].repeat(3, 1) if p.ndim == 2 else torch.zeros(3 * SIZE)
               for n, p in module.named_parameters()}  # fmt: skip
    return functional_call(module, weights, (x,))[0].square().mean()


def branch(params, x):
    return (x @ params["w"]).square().mean() * (2 if x.sum().item() > 0 else 1)


def attention(params, x):
    return scaled_dot_product_attention(x[None] @ params["w"], x[None], x[None]).square().mean()


def ctc(params, x):
    lengths = torch.full((5,), 3), torch.full((5,), 1)
    log_probabilities = (x @ params["w"]).log_softmax(-1)
    return ctc_loss(log_probabilities, torch.ones(5, 1, dtype=torch.long), *lengths)


def bag(params, x):
    return embedding_bag(x.long().abs()[..., 0] % SIZE, params["w"], mode="max").square().mean()


PARAMS = {"w": torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))}
TASKS = torch.randn(4, 3, 5, SIZE, generator=torch.Generator().manual_seed(1))
BOTH = {"support": TASKS, "query": TASKS}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because")

NO_VMAP, STREAMED = "chunk_size=1, which does without vmap", "engine='streamed'"
AGREE = ga.GradientAgreement()


def gradient(loss_fn, task):
    w = PARAMS["w"].clone().requires_grad_()
    return torch.autograd.grad(loss_fn({"w": w}, task), w)[0]


def update(loss_fn):
    """By hand."""
    return AGREE(torch.stack([gradient(loss_fn, task) for task in TASKS]))


def advice_of(call, expected):
    with pytest.raises(RuntimeError, match=r"expected a model that .* can run, found: ") as caught:
        call()
    message = str(caught.value)
    assert message.endswith(f"; take {expected}")
    assert "\n" not in message


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("loss_fn", [classic, checkpointed, packed])
def test_chunk_size_is_not_advised_where_it_does_not_help(loss_fn, chunk_size):
    run = partial(ga.aggregate_gradients, loss_fn, PARAMS, TASKS, AGREE, chunk_size=chunk_size)
    advice_of(partial(run, engine="stacked"), STREAMED)
    torch.testing.assert_close(run(engine="streamed").update["w"], update(loss_fn))
    advice_of(
        partial(ga.task_gradients, loss_fn, PARAMS, TASKS, chunk_size=chunk_size),
        "ga.aggregate_gradients(…, engine='streamed')",
    )


@pytest.mark.parametrize("loss_fn", [gru, branch])
def test_chunk_size_is_advised_whatever_the_words_of_the_error(loss_fn):
    advice_of(partial(ga.task_gradients, loss_fn, PARAMS, TASKS), NO_VMAP)
    result = ga.task_gradients(loss_fn, PARAMS, TASKS, chunk_size=1)
    expected = torch.stack([gradient(loss_fn, task) for task in TASKS])
    torch.testing.assert_close(result.gradients["w"], expected)
    advice_of(lambda: ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1)).step(PARAMS, BOTH, AGREE), NO_VMAP)
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1), chunk_size=1)
    torch.testing.assert_close(reptile.step(PARAMS, BOTH, AGREE).update["w"], AGREE(0.1 * expected))


@pytest.mark.parametrize("loss_fn", [ctc, bag])
@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_without_a_second_derivative_the_first_order_is_advised(loss_fn, engine):
    make = partial(ga.MAML, loss_fn, ga.InnerSGD(0.1, 1), engine=engine, signal="gradient")
    advice_of(
        lambda: make().step(PARAMS, BOTH, AGREE),
        "first_order=True, which takes no second derivative",
    )
    tasks = [PARAMS["w"] - 0.1 * gradient(loss_fn, task) for task in TASKS]
    gradients = []
    for w, task in zip(tasks, TASKS, strict=True):
        adapted = w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss_fn({"w": adapted}, task), adapted)[0])
    result = make(first_order=True).step(PARAMS, BOTH, AGREE)
    torch.testing.assert_close(result.update["w"], AGREE(torch.stack(gradients)))


def test_attention_is_differentiated_twice_by_the_math_kernel():
    maml = ga.MAML(attention, ga.InnerSGD(0.1, 1), signal="gradient")
    with pytest.raises(RuntimeError, match=re.escape("sdpa_kernel(SDPBackend.MATH)")):
        maml.step(PARAMS, BOTH, AGREE)

    def meta_gradient(task):
        w = PARAMS["w"].clone().requires_grad_()
        inner = torch.autograd.grad(attention({"w": w}, task), w, create_graph=True)[0]
        return torch.autograd.grad(attention({"w": w - 0.1 * inner}, task), w)[0]

    with sdpa_kernel(SDPBackend.MATH):
        result = maml.step(PARAMS, BOTH, AGREE)
        expected = AGREE(torch.stack([meta_gradient(task) for task in TASKS]))
    torch.testing.assert_close(result.update["w"], expected)


@pytest.mark.parametrize("loss_fn", [classic, checkpointed, packed])
def test_what_torch_func_does_not_run_is_advised_a_loop(loss_fn):
    maml = ga.MAML(loss_fn, ga.InnerSGD(0.1, 1))
    advice_of(lambda: maml.step(PARAMS, BOTH, AGREE), "a loop of TaskBatch.add(loss, adapted=…)")
    advice_of(
        lambda: ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1)).step(PARAMS, BOTH, AGREE),
        "a loop of TaskBatch.add(adapted=…)",
    )


@pytest.mark.parametrize("engine", ["auto", "stacked", "streamed"])
def test_an_error_of_ones_own_is_raised_as_it_is(engine):
    def loss_fn(params, x):
        return (x @ params["w"][:2]).mean()

    with pytest.raises(
        RuntimeError, match=r"shapes cannot be multiplied|Expected size for"
    ) as caught:
        ga.aggregate_gradients(loss_fn, PARAMS, TASKS[:, 0], AGREE, engine=engine)
    assert "take" not in str(caught.value)


@pytest.mark.parametrize("loss_fn", [classic, gru])
def test_trials_leave_generators_as_they_were(loss_fn):
    generator = torch.Generator().manual_seed(3)
    drawn = []

    def with_noise(params, x):
        drawn.append(torch.rand((), generator=generator))
        return loss_fn(params, x)

    before = generator.get_state()
    with pytest.raises(RuntimeError, match="expected a model that"):
        ga.task_gradients(with_noise, PARAMS, TASKS)
    assert drawn  # by a trial; vmap refuses to draw
    assert torch.equal(generator.get_state(), before)


@pytest.mark.compiled
@pytest.mark.parametrize("loss_fn", [branch, attention])
def test_of_a_compiled_step_both_that_have_been_tried_are_advised(loss_fn, without_code_generation):
    first = loss_fn is branch
    signal = "displacement" if first else "gradient"
    maml = partial(ga.MAML, loss_fn, ga.InnerSGD(0.1, 1), signal=signal, engine="stacked")
    with pytest.raises(RuntimeError) as caught:
        maml(compile=True).step(PARAMS, BOTH, AGREE)
    other = NO_VMAP if first else "the math kernel of attention, with torch.nn.attention."
    assert f"; take compile=False and {other}" in str(caught.value)
    with pytest.raises(RuntimeError, match="expected a model that"):
        maml().step(PARAMS, BOTH, AGREE)  # one of the two does not do
    if first:
        maml(chunk_size=1).step(PARAMS, BOTH, AGREE)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            maml().step(PARAMS, BOTH, AGREE)


@pytest.mark.compiled
def test_of_a_compiled_reptile_both_are_advised(without_code_generation):
    reptile = partial(ga.Reptile, branch, ga.InnerSGD(0.1, 1))
    advice_of(
        lambda: reptile(compile=True).step(PARAMS, BOTH, AGREE), f"compile=False and {NO_VMAP}"
    )
    reptile(chunk_size=1).step(PARAMS, BOTH, AGREE)
