"""The studies' networks, their initial parameters from a seed, and their losses."""

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._pytree import tree_map

from gradagree_opt.ablation import own
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import (
    DRAWING,
    MLP,
    MetaSGDForm,
    MultiTaskForm,
    Network,
    OwnModel,
)
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.tasks import Batch

Params: TypeAlias = dict[str, Any]
"""The network's by name; Meta-SGD's ``{"params": those, "lr": their inner rates}``; or multi-task
``{"trunk": all but the last layer, "heads": the last layer of each task, leaves [n, *shape]}``."""
BatchFunction = Callable[[Params, Batch], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
"""From the outputs and the targets of a batch to a number."""

INPUTS_AT_ONCE = 400 * DRAWING
"""Numbers in the inputs that a network takes at once in validation and test: 400 drawings, or 14
photographs. Convolutional networks are about twice as fast so as with a whole test at once."""
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def build_module(study: Study) -> nn.Module:
    """The network of a study, its input and output sizes given by the tasks."""
    inputs, outputs = study.tasks.input_size, study.outputs
    if isinstance(study.model, OwnModel):
        return own_module(study.model, inputs, outputs)
    if isinstance(study.model, MLP):
        sizes, activation = [inputs, *study.model.hidden, outputs], study.model.activation
        return mlp(sizes, ACTIVATIONS[activation], batch_norm=study.model.batch_norm)
    make = pooled_conv4 if study.tasks.channels == 3 else conv4
    return make(study.model.filters, outputs, study.model.network or study.usual_network)


def own_module(section: OwnModel, inputs: int, outputs: int) -> nn.Module:
    """The network that the study names.

    Raises:
        StudyError: It cannot be made so, is none, or has nothing to train.
    """
    try:
        module = own.call(section.make, inputs=inputs, outputs=outputs, **section.options)
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            raise ValueError(f"expected an nn.Module with parameters, found {module!r}")
    except ValueError as error:
        raise StudyError(f"the model {section.make}: {error}") from None
    return module


def mlp(sizes: list[int], activation: type[nn.Module], *, batch_norm: bool = False) -> nn.Module:
    """Linear layers, activations between them; BatchNorm, as :func:`conv4` has it, before those.

    Source: Finn et al. 2017 (arXiv:1703.03400), for Omniglot: 256, 128, 64, 64, ReLU, BatchNorm.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes[:-1]):
        norms = [nn.BatchNorm1d(after, track_running_stats=False)] if batch_norm else []
        layers += [nn.Linear(before, after), *norms, activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def conv4(filters: int, ways: int, network: Network) -> nn.Module:
    """Four strided convolutions, as for Omniglot in Finn et al. 2017 and Nichol et al. 2018.

    They leave 2×2 places, of which Finn's linear layer sees the mean and Nichol's each. BatchNorm
    keeps no running statistics: it normalises by the batch at hand, at test time too. What that
    batch is, the study says: see :func:`predict_apart`. It has a scale and a shift that adapt as
    all parameters do; in Finn's code there is no scale, and shifts are the same for all tasks.

    Source: their code, ``forward_conv`` of cbfinn/maml and ``OmniglotModel`` of
    openai/supervised-reptile, up to a turn of the drawings by 180°: where a side is even,
    TensorFlow pads after its end, PyTorch before its beginning.
    """
    layers: list[nn.Module] = []
    for channels in (1, *[filters] * 3):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
    if network == "finn":
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, ways)
        )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * 4, ways))


def pooled_conv4(filters: int, ways: int, network: Network) -> nn.Module:
    """Four convolutions with max-pooling, as for mini-ImageNet in both; BatchNorm as in conv4.

    Finn's pooling leaves out the last row and column of an odd side, and 5×5 places in the end;
    Nichol's keeps them, and 6×6.

    Source: as :func:`conv4`, with ``MiniImageNetModel``; that pools before the ReLU, which is the
    same: the largest of ReLUs is the ReLU of the largest.
    """
    layers: list[nn.Module] = []
    for channels in (3, *[filters] * 3):
        layers += [
            nn.Conv2d(channels, filters, 3, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=network == "nichol"),
        ]
    places = {"finn": 5 * 5, "nichol": 6 * 6}[network]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * places, ways))


def initial_params(study: Study, seed: int) -> Params:
    """PyTorch's default initialisation, from the seed; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "init"))
        if isinstance(study.form, MultiTaskForm):
            return with_heads([build_module(study) for _ in range(study.meta_batch)])
        params = own_params(build_module(study))
    if not isinstance(study.form, MetaSGDForm):
        return params
    assert study.inner is not None
    rates = {name: torch.full_like(leaf, study.inner.lr) for name, leaf in params.items()}
    return {"params": params, "lr": rates}


def own_params(module: nn.Module) -> Params:
    """Copies of a network's parameters, by name."""
    return {name: leaf.detach().clone() for name, leaf in module.named_parameters()}


def head(module: nn.Module) -> frozenset[str]:
    """The parameters of the last layer, by name."""
    names = [name for name, _ in module.named_parameters()]
    layer = names[-1].rpartition(".")[0]
    return frozenset(name for name in names if name.rpartition(".")[0] == layer)


def with_heads(modules: list[nn.Module]) -> Params:
    """The trunk of the first of several equal networks, and the last layers of all of them."""
    networks, heads = list(map(own_params, modules)), head(modules[0])
    return {
        "trunk": {name: leaf for name, leaf in networks[0].items() if name not in heads},
        "heads": {
            name: torch.stack([network[name] for network in networks])
            for name in networks[0]
            if name in heads
        },
    }


def before_adaptation(params: Params, n_tasks: int) -> Params:
    """Task-stacked parameters before any step of a task: the same, but for heads of their own."""

    def repeat(leaf: Tensor) -> Tensor:
        return leaf.detach().expand(n_tasks, *leaf.shape)

    if "heads" not in params:
        repeated: Params = tree_map(repeat, params)
        return repeated
    heads = {name: leaf.detach() for name, leaf in params["heads"].items()}
    return {name: repeat(leaf) for name, leaf in params["trunk"].items()} | heads


def network_params(params: Params) -> Params:
    """The network's own parameters, without Meta-SGD's inner rates."""
    own: Params = params["params"] if "lr" in params else params
    return own


def with_network_params(params: Params, own: Params) -> Params:
    """The same with other parameters of the network."""
    return {**params, "params": own} if "lr" in params else own


def derived_seed(seed: int, purpose: str) -> int:
    """One independent seed for each purpose (initialisation, train, validation, test, weights)."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


def predict(module: nn.Module, params: Params, x: Tensor) -> Tensor:
    """The network's output for one batch of inputs, at the given parameters."""
    output: Tensor = functional_call(module, network_params(params), (x,))
    return output


def predict_apart(module: nn.Module, params: Params, support: Tensor, query: Tensor) -> Tensor:
    """The network's output for every query example, which sees the support set alone.

    The batch of each is the support set and itself, so that where BatchNorm normalises by the batch
    nothing passes from one query example to another.

    Source: Nichol et al. 2018 (arXiv:1803.02999), the case without transduction.
    """

    def output(example: Tensor) -> Tensor:
        return predict(module, params, torch.cat([support, example.unsqueeze(0)]))[-1]

    outputs: Tensor = torch.vmap(output, chunk_size=apart_at_once(support))(query)
    return outputs


def apart_at_once(support: Tensor) -> int:
    """How many query examples :func:`predict_apart` takes at once."""
    return max(1, INPUTS_AT_ONCE // (support.numel() + support[0].numel()))


def criterion(study: Study) -> Criterion:
    """What training lowers: mean squared error in regression, cross-entropy for classes."""
    return functional.mse_loss if study.classes is None else functional.cross_entropy


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """The share of a batch that is put in its class; NaN where an output is not finite."""
    right = (outputs.argmax(-1) == y).to(outputs.dtype)
    return torch.where(outputs.isfinite().all(-1), right, torch.nan).mean()


def batch_loss(study: Study, module: nn.Module) -> BatchFunction:
    """The criterion of a batch as a function of the parameters."""
    measure = criterion(study)

    def loss(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return measure(predict(module, params, x), y)

    return loss
