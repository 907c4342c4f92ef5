"""Leaves that are read block by block against the same leaves in float64, at every scale."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.core.blocks import blocks_of_all, column_blocks, unit_parts
from gradagree_testing import reference
from gradagree_testing.configurations import CONFIGURATIONS
from gradagree_testing.looping import every

SCALES = (1e-30, 1e-20, 1e-3, 1.0, 1e10, 1e30)
WEIGHTED = [c for c in CONFIGURATIONS if c.weights is not None]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Seven columns of five tasks: a leaf is read in several parts, the last one shorter."""
    monkeypatch.setattr("gradagree_opt.core.blocks.BLOCK_ENTRIES", 35)


def stack(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 5), "vector": (23,), "scalar": (), "empty": (0,), "short": (7,)}
    return {
        name: ((torch.randn(5, *shape, generator=generator) + 0.3) * scale).to(dtype)
        for name, shape in shapes.items()
    }


def expected(configuration, signals):
    """Weights and update in float64, of what the entries are after rounding to their dtype."""
    columns = [leaf.double().reshape(5, leaf[0].numel()) for leaf in signals.values()]
    matrix = torch.cat(columns, 1)
    units = matrix / matrix.abs().max()
    weights = configuration.weights(reference.gram(units.numpy())).astype(float)
    return torch.from_numpy(weights), torch.from_numpy(weights) @ matrix


@every(configuration=WEIGHTED, scale=SCALES)
def test_every_scale_of_float32(configuration, scale):
    signals = stack(scale)
    result = configuration.make().aggregate(signals)
    weights, update = expected(configuration, signals)
    tolerance = 1e-4 if configuration.amplifies else 2e-5
    torch.testing.assert_close(result.weights.double(), weights, rtol=tolerance, atol=tolerance)
    found = torch.cat([leaf.double().flatten() for leaf in result.update.values()])
    assert (found - update).norm() <= tolerance * update.norm()


@every(configuration=WEIGHTED, dtype=[torch.bfloat16, torch.float16])
def test_small_dtypes_have_weights_of_float32(configuration, dtype):
    signals = stack(dtype=dtype)
    result = configuration.make().aggregate(signals)
    weights, _ = expected(configuration, signals)
    assert result.weights.dtype == torch.float32
    # The length of an update is that of one rounded to its dtype.
    tolerance = 2e-3 if configuration.amplifies else 1e-4
    torch.testing.assert_close(result.weights.double(), weights, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("name", ["matrix", "vector"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_entry_of_the_last_block_is_found(name, bad):
    signals = stack()
    signals[name][3].flatten()[-1] = bad
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[3\]"):
        ga.GradientAgreement()(signals)
    dropped = ga.GradientAgreement(nonfinite="drop")(signals)
    rest = {key: leaf[[0, 1, 2, 4]] for key, leaf in signals.items()}
    torch.testing.assert_close(dropped, ga.GradientAgreement()(rest))


def test_blocks_are_of_one_leaf_and_cover_it():
    leaf = stack()["matrix"]
    blocks = list(column_blocks(leaf, torch.float64))
    assert [block.shape for block in blocks] == [(5, 7)] * 4 + [(5, 2)]
    assert torch.equal(torch.cat(blocks, 1), leaf.flatten(1).double())


def test_parts_fit_a_cache_and_cover_the_leaves_in_units_of_their_largest_entry():
    leaves = list(stack(1e10).values())
    parts = [
        (scale, list(blocks)) for scale, blocks in unit_parts(leaves, torch.float64, scaled=True)
    ]
    assert len(parts) < sum(len(blocks) for _, blocks in parts)
    for _, blocks in parts:
        assert sum(block.numel() for block in blocks) <= 35
        assert 1 <= max(block.abs().max() for block in blocks) < 2
    found = torch.cat([block * scale for scale, blocks in parts for block in blocks], 1)
    assert_same_columns(found, leaves)


def assert_same_columns(matrix, leaves):
    """In any order."""
    expected = torch.cat([leaf.reshape(5, -1).double() for leaf in leaves], 1)
    assert torch.equal(matrix[:, matrix[0].argsort()], expected[:, expected[0].argsort()])


def test_small_leaves_lie_side_by_side_and_others_as_they_are(monkeypatch):
    monkeypatch.setattr("gradagree_opt.core.blocks.BLOCK_ENTRIES", 32 * 40)
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 8, 9, 100, 2, 200, 8, 300]  # of five tasks; up to 40 entries are joined
    leaves = [torch.randn(5, size, generator=generator) for size in sizes]
    leaves[4] = leaves[4].bfloat16()
    blocks = list(blocks_of_all(leaves))
    # A part is full after the fifth, 256 columns of the last leaf are one of their own.
    assert [block.shape[1] for block in blocks] == [13, 9, 100, 256, 200, 8, 44]
    assert_same_columns(torch.cat([block.double() for block in blocks], 1), leaves)
