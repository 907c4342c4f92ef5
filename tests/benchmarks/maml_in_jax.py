"""The MAML step of maml.py in jax.jit(vmap(grad)), with the same networks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torch import Tensor
from torch.utils._pytree import tree_map

from .maml import Problem
from .timing import Contestant, Step

jax.config.update("jax_default_matmul_precision", "highest")  # as torch, on a GPU too

Params = dict[str, Any]
Network = Callable[[Params, Any], Any]


def contestant(problem: Problem, network: Network, loss: Callable[[Any, Any], Any]) -> Contestant:
    return Contestant("jax.jit", partial(jitted, problem, network, loss), of_torch=False)


def jitted(problem: Problem, network: Network, loss: Callable[[Any, Any], Any]) -> Step:
    params = tree_map(as_jax, problem.params)
    tasks = tree_map(as_jax, problem.tasks)

    def loss_fn(params: Params, batch: Any) -> Any:
        return loss(network(params, batch[0]), batch[1])

    def query_loss(params: Params, task: Any) -> Any:
        gradient = jax.grad(loss_fn)(params, task["support"])
        moved = jax.tree.map(lambda g: problem.lr * g, gradient)
        adapted = jax.tree.map(jnp.subtract, params, moved)
        return loss_fn(adapted, task["query"]), moved

    @jax.jit
    def update(params: Params, tasks: Any) -> Params:
        if problem.signal == "gradient":
            gradients, _ = jax.vmap(jax.grad(query_loss, has_aux=True), (None, 0))(params, tasks)
            weights = agreement(gradients)
            return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), gradients)

        def losses_of(params: Params) -> Any:
            return jax.vmap(query_loss, (None, 0))(params, tasks)

        _, backward, moved = jax.vjp(losses_of, params, has_aux=True)
        result: Params = backward(agreement(moved))[0]
        return result

    return lambda: jax.block_until_ready(update(params, tasks))


def agreement(stack: Params) -> Any:
    """The paper's weights of a task-stacked pytree."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(stack)]
    scores = sum(leaf @ leaf.sum(0) for leaf in leaves)
    return scores / jnp.abs(scores).sum()


def as_jax(tensor: Tensor) -> Any:
    return jnp.asarray(np.asarray(tensor.cpu()))


def mlp(params: Params, x: Any) -> Any:
    """nn.Sequential(Flatten, Linear, ReLU, …, Linear)."""
    *hidden, last = [name.removesuffix(".weight") for name in params if name.endswith("weight")]
    for layer in hidden:
        x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return x @ params[f"{last}.weight"].T + params[f"{last}.bias"]


def conv4(params: Params, x: Any) -> Any:
    """Convolution, BatchNorm by the batch and ReLU, four times, then a linear layer."""
    x = x.transpose(0, 2, 3, 1)  # channels last, which is faster here
    for block in range(4):
        kernel = params[f"{3 * block}.weight"].transpose(2, 3, 1, 0)
        x = lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + params[f"{3 * block}.bias"]
        centred = x - x.mean((0, 1, 2))
        scale = params[f"{3 * block + 1}.weight"] * lax.rsqrt((centred**2).mean((0, 1, 2)) + 1e-5)
        x = jax.nn.relu(centred * scale + params[f"{3 * block + 1}.bias"])
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    return x @ params["13.weight"].T + params["13.bias"]


def squared_error(prediction: Any, y: Any) -> Any:
    return ((prediction - y) ** 2).mean()


def cross_entropy(logits: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
