"""Which releases of PyTorch can compile the steps."""

from types import SimpleNamespace

import pytest
import torch
from torch.torch_version import TorchVersion

import gradagree_opt as ga
from gradagree_opt.engines import compilation


@pytest.mark.parametrize("version", ["2.5.0", "2.9.1+cu126"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ga.MAML(torch.sum, ga.InnerSGD(0.1, 1), compile=True),
        lambda: ga.Reptile(torch.sum, ga.InnerSGD(0.1, 1), compile=True),
        lambda: ga.aggregate_gradients(
            lambda w, x: (w * x).sum(), torch.ones(1), torch.ones(2, 1), ga.Mean(), compile=True
        ),
    ],
    ids=["MAML", "Reptile", "aggregate_gradients"],
)
def test_an_older_one_is_refused_in_one_sentence(
    make: object, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = SimpleNamespace(__version__=TorchVersion(version), compile=pytest.fail)
    monkeypatch.setattr(compilation, "torch", old)
    assert callable(make)
    with pytest.raises(
        ValueError, match=rf"PyTorch 2.10 .* found {version[:5]}.*; .*compile=False"
    ):
        make()
