"""The adapter under ``pytorch_lightning``, and learn2learn's LightningMAML, which is made of it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradagree_opt as ga

pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
other = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

from gradagree_opt.adapters.lightning import AgreementCallback, ManualTaskBatch  # noqa: E402

from .lightning_cases import FILTERS, RATE, by_hand, clip, data, one_task_a_batch  # noqa: E402
from .lightning_cases import Automatic as Reference  # noqa: E402

pytestmark = [*FILTERS, pytest.mark.usefixtures("without_type_checks")]


def trainer(**options: Any) -> Any:
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    options = {"accumulate_grad_batches": 4, **options}
    return other.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False), **options)


class Module(other.LightningModule):
    """The module of the other tests, of the other distribution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Manual(Module):
    """All tasks in one training batch, as the paper weights them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        tasks = ManualTaskBatch(self, ga.GradientAgreement())
        for x, y in zip(*batch, strict=True):
            tasks.add(super().training_step([x, y], batch_idx))
        self.optimizers().zero_grad()
        tasks.backward()
        self.optimizers().step()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    net = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, net[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()])
@pytest.mark.parametrize("clipped", [False, True])
def test_the_callback_serves_the_other_distribution(aggregator: Any, clipped: bool) -> None:
    module = Module()
    options = {"gradient_clip_val": 0.05} if clipped else {}
    callback = AgreementCallback(aggregator)
    trainer(callbacks=[callback], **options).fit(module, one_task_a_batch(data(8)))
    tasks = [list(task) for task in data(8)]
    change = (clip,) if clipped else ()
    assert_same(module, by_hand(Reference(), aggregator, [tasks[:4], tasks[4:]], *change))


def test_a_manual_batch_serves_the_other_distribution() -> None:
    module, tasks = Manual(), data(4)
    loader = torch.utils.data.DataLoader(tasks, batch_size=4)
    trainer(accumulate_grad_batches=1).fit(module, loader)
    expected = by_hand(Reference(), ga.GradientAgreement(), [[list(task) for task in tasks]])
    assert_same(module, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulate_grad_batches": 1}, "pass Trainer"),
        ({"strategy": "ddp", "devices": 1}, "expected one device, found DDPStrategy"),
    ],
    ids=["one task", "ddp"],
)
def test_the_other_distribution_is_refused_where_the_first_is(options: Any, match: str) -> None:
    callback = AgreementCallback(ga.Mean())
    with pytest.raises(ValueError, match=match):
        callback.setup(trainer(callbacks=[callback], **options), Module(), "fit")


class Episodes(torch.utils.data.Dataset):
    """Two-way tasks as learn2learn has them: per class one support and two query examples."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(index)
        labels = torch.arange(2).repeat_interleave(3)
        centres = torch.randn(2, 5, generator=draws)
        return centres[labels] + torch.randn(6, 5, generator=draws), labels


def lightning_maml() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("learn2learn", reason="learn2learn is not installed")
        from learn2learn.algorithms import LightningMAML
    shape = {"train_ways": 2, "test_ways": 2, "train_shots": 1, "train_queries": 2}
    torch.manual_seed(0)
    module = LightningMAML(nn.Linear(5, 2), adaptation_lr=0.1, **shape)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=RATE)
    return module


def meta_gradient(weight: Tensor, bias: Tensor, index: int) -> list[Tensor]:
    """∇ of the query loss after one inner step, written out."""
    x, y = Episodes()[index]
    support = torch.tensor([True, False, False] * 2)
    theta = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
    inner = cross_entropy(x[support] @ theta[0].T + theta[1], y[support])
    steps = torch.autograd.grad(inner, theta, create_graph=True)
    w, b = (p - 0.1 * g for p, g in zip(theta, steps, strict=True))
    return list(torch.autograd.grad(cross_entropy(x[~support] @ w.T + b, y[~support]), theta))


@pytest.mark.filterwarnings("ignore:You called `self.log")
@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()])
def test_lightning_maml_weights_its_meta_gradients(aggregator: ga.Aggregator) -> None:
    module = lightning_maml()
    weight, bias = (p.detach().clone() for p in module.model.module.parameters())
    each = [meta_gradient(weight, bias, index) for index in range(4)]
    update = aggregator([torch.stack(leaves) for leaves in zip(*each, strict=True)])
    loader = torch.utils.data.DataLoader(Episodes(), batch_size=None)
    options = {"callbacks": [AgreementCallback(aggregator)], "limit_val_batches": 0}
    trainer(**options).fit(module, loader, loader)
    expected = [weight - RATE * update[0], bias - RATE * update[1]]
    found = [p.detach() for p in module.model.module.parameters()]
    torch.testing.assert_close(found, expected)
