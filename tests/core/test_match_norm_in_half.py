"""match_norm of stacks in half precision: the update is rounded once, when it has its length."""

import pytest
import torch

import gradagree_opt as ga

AGGREGATORS = {
    "a long step": ga.EqualAgreement(match_norm="mean"),
    "a short step": ga.Mean(match_norm=ga.Sum()),
    "each leaf": ga.EqualAgreement(match_norm="mean", scope="leaf"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 2e3])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_update_is_that_of_float64_rounded_once(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    draws = torch.Generator().manual_seed(0)
    n = 32 if name == "a short step" else 16
    stack = {"w": torch.randn(n, 400, generator=draws), "b": torch.randn(n, 7, generator=draws)}
    stack = {key: (scale * leaf).clamp(-6e3, 6e3).to(dtype) for key, leaf in stack.items()}
    found = AGGREGATORS[name](stack)
    exact = AGGREGATORS[name]({key: leaf.double() for key, leaf in stack.items()})
    for key, leaf in found.items():
        assert leaf.dtype == dtype
        largest = float(exact[key].abs().max())
        bound = torch.finfo(dtype).eps * largest + torch.finfo(dtype).smallest_normal * 2**-10
        assert float((leaf.double() - exact[key]).abs().max()) <= bound
