"""nonfinite="drop" in every engine, against the step without those tasks."""

import pytest
import torch
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing.looping import every

DRAWS = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, 3, generator=DRAWS, dtype=torch.float64)
PARAMS = {
    "w": torch.randn(3, 2, generator=DRAWS, dtype=torch.float64),
    "b": torch.randn(2, generator=DRAWS, dtype=torch.float64),
}
BAD, KEPT = [1, 4], [0, 2, 3, 5]
ENGINES = [
    {"engine": engine, "chunk_size": size}
    for engine in ("auto", "stacked", "streamed")
    for size in (None, 1, 2)
]
OPTIONS = [
    {"similarity": similarity, "include_self": include_self, "normalization": normalization}
    for similarity in ("inner", "cosine")
    for include_self in (True, False)
    for normalization in ("l1", "softmax")
]


def loss_fn(params, batch):
    x, shift = batch
    return (x @ params["w"] + params["b"]).tanh().square().mean() + shift


def tasks(spoilt):
    """Of which some are not finite: in the data, and so in the gradient; or in the loss alone."""
    x, shift = X.clone(), torch.zeros(6, dtype=torch.float64)
    if spoilt == "data":
        x[BAD] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64).reshape(2, 1, 1)
    else:
        shift[BAD] = torch.inf
    return x, shift


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
@every(engine=ENGINES, spoilt=["data", "loss"], scope=["global", "leaf"])
def test_the_step_is_that_of_the_other_tasks(options, engine, spoilt, scope):
    aggregator = ga.GradientAgreement(**options, scope=scope, nonfinite="drop")
    rest = ga.GradientAgreement(**options, scope=scope)
    others = X[KEPT], torch.zeros(4, dtype=torch.float64)
    expected = ga.aggregate_gradients(loss_fn, PARAMS, others, rest)
    found = ga.aggregate_gradients(loss_fn, PARAMS, tasks(spoilt), aggregator, **engine)
    assert_close(found.update, expected.update, rtol=1e-9, atol=1e-12)
    assert_close(found.weights[..., KEPT], expected.weights, rtol=1e-9, atol=1e-12)
    assert not found.weights[..., BAD].any()
    assert found.diagnostics.nonfinite.nonzero().flatten().tolist() == BAD
