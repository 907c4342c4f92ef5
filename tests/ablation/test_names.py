"""A method is what it does, not what it is called: studies that differ in names alone."""

from pathlib import Path

import pandas as pd
import pytest

from gradagree_testing.command import gradagree

from .conftest import WriteStudy

METHODS = {
    "mean": {"aggregator": "mean"},
    "agreement": {"aggregator": "gradient_agreement"},
    "clipped": {"aggregator": "gradient_agreement", "options": {"negative": "clip"}},
    "random weights": {"aggregator": "random_weights"},
}
SWAPPED = {
    "mean": "agreement",
    "agreement": "mean",
    "clipped": "random weights",
    "random weights": "ours",
}


def results(study: Path, out: Path) -> pd.DataFrame:
    result = gradagree("ablate", study, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    return pd.read_csv(out / "results.csv")


@pytest.mark.usefixtures("without_pictures")
def test_a_name_is_never_read_as_markup(write_study: WriteStudy, tmp_path: Path) -> None:
    names = [r"$\foo$ mean [/b]", "agreement [bold]", "clipped $1", "[/link] | $2$"]
    methods = [{"name": name, **keys} for name, keys in zip(names, METHODS.values(), strict=True)]
    study = write_study(methods=methods, baseline=names[0], title=r"[red]Tiny $\foo$")
    result = gradagree("ablate", study, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    for name in names:
        assert name in result.stdout
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.usefixtures("without_figures")
def test_results_follow_the_aggregator_whatever_a_method_is_called(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    def study(names: dict[str, str]) -> Path:
        methods = [{"name": names[name], **keys} for name, keys in METHODS.items()]
        return write_study(methods=methods, baseline=names["mean"])

    plain = results(study({name: name for name in METHODS}), tmp_path / "plain")
    swapped = results(study(SWAPPED), tmp_path / "swapped")
    pd.testing.assert_frame_equal(
        swapped, plain.assign(method=plain["method"].map(SWAPPED)), check_exact=True
    )
    of_names = plain.groupby("method")["mse"].apply(list)
    assert of_names["mean"] != of_names["agreement"] != of_names["clipped"]
    rows = [
        {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines()[2:6]}
        for text in ((tmp_path / name / "table.md").read_text() for name in ("plain", "swapped"))
    ]
    assert rows[1] == {SWAPPED[name]: cells for name, cells in rows[0].items()}
    # nor are the runs of another aggregator under the same name taken for its own
    pd.testing.assert_frame_equal(results(study(SWAPPED), tmp_path / "plain"), swapped)
