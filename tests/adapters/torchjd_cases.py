"""TorchJD's aggregators by what they are given, and how they are compared with ours."""

import pytest
import torch
from gradagree_opt.adapters.torchjd import EqualAgreement, GradientAgreement
from torch.utils._pytree import tree_leaves
from torchjd import aggregation as jd

# From the Gramian, whatever the unit of the signals.
SCALE_FREE = {
    "AlignedMTL": lambda n: jd.AlignedMTL(),
    "CAGrad": lambda n: jd.CAGrad(c=0.5),
    "DualProj": lambda n: jd.DualProj(),
    "GradVac": lambda n: jd.GradVac(),
    "IMTLG": lambda n: jd.IMTLG(),
    "Krum": lambda n: jd.Krum(n_byzantine=1),
    "Mean": lambda n: jd.Mean(),
    "MGDA": lambda n: jd.MGDA(),
    "PCGrad": lambda n: jd.PCGrad(),
    "Random": lambda n: jd.Random(),
    "Sum": lambda n: jd.Sum(),
    "UPGrad": lambda n: jd.UPGrad(),
    "smoothed UPGrad": lambda n: jd.GramianWeightedAggregator(
        jd.CRMOGMWeighting(jd.UPGradWeighting())
    ),
    "ours": lambda n: GradientAgreement(),
    "ours, equal": lambda n: EqualAgreement(),
}
# From the Gramian in the signals' own unit.
OF_UNITS = {
    "FairGrad": lambda n: jd.FairGrad(alpha=1.0),
    "NashMTL": lambda n: jd.NashMTL(n_tasks=n),
    "PCD": lambda n: jd.PCD(),
    "smoothed FairGrad": lambda n: jd.GramianWeightedAggregator(
        jd.CRMOGMWeighting(jd.FairGradWeighting(alpha=1.0))
    ),
}
OF_MATRIX = {
    "ConFIG": lambda n: jd.ConFIG(),
    "ExcessMTL": lambda n: jd.ExcessMTL(),
    "GradDrop": lambda n: jd.GradDrop(),
    "TrimmedMean": lambda n: jd.TrimmedMean(trim_number=1),
}
OF_GRAMIAN = SCALE_FREE | OF_UNITS
ALL = OF_GRAMIAN | OF_MATRIX


def make(name, n=4):
    try:
        return ALL[name](n)
    except ImportError as error:
        pytest.skip(str(error))


def matrix(seed=0, n=4, d=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def flat(tree):
    return torch.cat([leaf.detach().flatten() for leaf in tree_leaves(tree)])


def assert_same(actual, expected, tolerance):
    actual, expected = flat(actual).double(), flat(expected).double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


def seeded(aggregator, *arguments):
    torch.manual_seed(0)  # PCGrad, GradVac, GradDrop and Random draw from the global generator
    return aggregator(*arguments)
