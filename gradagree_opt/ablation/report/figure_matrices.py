"""The figure of the agreement matrices: which tasks of a batch pull the same way."""

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradagree_opt.ablation.runs.sweep import Part

ACROSS = 5
DIVERGING = "RdBu"  # one of ColorBrewer's, told apart with every kind of colour vision


def agreement_matrices(results: Part) -> Figure | None:
    """Cosines between the displacements of the tasks of one training batch, a panel a method.

    By the trained parameters of each method's first seed, whose first batch is the same for all.

    Returns:
        None where no run has a matrix: all of them diverged, or are older than the matrices.
    """
    recorded = {name: results.final(name)[0].agreement for name in results.rates}
    matrices = {name: np.array(matrix) for name, matrix in recorded.items() if matrix}
    if not matrices:
        return None
    columns = min(ACROSS, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(1.6 * columns + 0.9, 1.9 * rows + 0.3))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, matrix) in zip(panels.flat, matrices.items(), strict=False):
        # With edges, or a viewer of vectors shows gaps between cells.
        cells = axes.pcolormesh(matrix, cmap=DIVERGING, vmin=-1, vmax=1, edgecolor="face", lw=0.1)
        axes.set_title(fill(name, 18))
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        numbered = [int(at) for at in MaxNLocator(5, integer=True).tick_values(0, len(matrix) - 1)]
        shown = [number for number in numbered if number < len(matrix)]
        axes.set_xticks([number + 0.5 for number in shown], map(str, shown))
        axes.set_yticks([number + 0.5 for number in shown], map(str, shown))
    for axes in panels.flat[max(0, len(matrices) - columns) : len(matrices)]:
        axes.tick_params(labelbottom=True)
    panels[0, 0].invert_yaxis()
    for axes in panels.flat[len(matrices) :]:
        axes.remove()
    figure.supxlabel("task of the batch", fontsize="medium")
    figure.supylabel("task of the batch", fontsize="medium")
    bar = figure.colorbar(cells, ax=panels.ravel()[: len(matrices)], label="cosine", aspect=30)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")
    return figure
