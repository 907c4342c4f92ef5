"""Every study that ships, run by the command from its file to its last artefact, only smaller."""

from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gradagree_opt.ablation.study.loading import load, shipped
from gradagree_opt.ablation.study.study import Study
from gradagree_testing.command import gradagree
from gradagree_testing.photographs import write_photographs

SMALL = {
    "inner": {"steps": 1, "batch_size": None},
    "iterations": 2,
    "compile": False,
    "seeds": [0, 1],
    "tuning": {"seeds": 1, "tasks": 2, "steps": 1},
    "test": {"tasks": 2, "support_shots": 1, "query_shots": 1, "steps": [0, 1]},
}
NAMED = {  # how each text names a method
    "table.md": "| {} |",
    "table.tex": "{} & ",
    "table.csv": "{},",
    "results.csv": "{},",
    "report.html": ">{}</th>",
    "methods.md": '"{}"',
}
FIGURES = ("learning-curves", "seconds", "tuned-rates", "agreement", "agreement-matrix")
PICTURED = {  # a study of each kind: to draw takes as long as to train
    "equal-sine",
    "equal-sine-corrupted",
    "grouped",
    "mini-imagenet-5way-1shot",
    "multi-task-digits",
    "omniglot-5way-1shot",
}
FILED = "equal-sine-corrupted"  # every figure there is, also as files: those of others are alike
UNADAPTED = {
    "inner": None,
    "tuning": {"seeds": 1, "tasks": 6, "steps": 0},
    "test": {"tasks": 6, "query_shots": 2, "steps": [0]},
}


def shrunk(name: str, study: Study) -> dict[str, object]:
    """A study that extends the shipped one, with its methods and as little else as it takes."""
    document = SMALL | {"extends": name, "name": f"small-{name}", "title": study.title}
    document |= {} if study.adapts else UNADAPTED
    document["outer"] = {"extend": 0}
    if not any(method.rates for method in study.methods):
        document["outer"] = {"extend": 0, "rates": study.outer.rates[:2]}
    elif name not in PICTURED:  # no tuning, which is as long as the rest
        document["outer"] = {"extend": 0, "rates": study.outer.rates[:1]}
        methods = [method.model_dump(exclude_unset=True) for method in study.methods]
        document["methods"] = [method | {"rates": None} for method in methods]
    document["tasks"] = {"support_shots": 1, "way": 2} if study.way else {"support_shots": 2}
    if study.model.kind == "conv4":
        document["model"] = {"filters": 2}
    if study.corruption:
        document["corruption"] = {"fraction": [0, 0.5]}
    return document


def write_data(study: Study, folder: Path) -> list[object]:
    """What the command is told of the data, which are made up in the form that the study takes."""
    if study.tasks.kind == "mini-imagenet":
        return ["--data", write_photographs(folder / "photographs")]
    if study.tasks.kind == "omniglot":
        images = np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28), dtype=np.uint8)
        np.savez(folder / "drawings.npz", images=images, vinyals_split=np.arange(6) % 3)
        return ["--data", folder / "drawings.npz"]
    return []


def test_the_groups_of_each_have_as_many_rows_as_it_asks_for() -> None:
    grouped = [study for study in map(load, shipped()) if study.tasks.kind == "grouped"]
    assert len(grouped) >= 7
    for study in grouped:
        for tasks in study.tasks.build_folds(study.test, None):
            for part in tasks:
                assert part.sample(2, generator=torch.Generator())


def test_the_studies_whose_pictures_are_looked_at_are_shipped() -> None:
    assert set(shipped()) >= PICTURED


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", shipped())
def test_it_leaves_every_artefact_and_each_names_every_method(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name not in PICTURED:
        request.getfixturevalue("without_figures")
    elif name != FILED:
        request.getfixturevalue("without_pictures")
    study = load(name)
    if any(method.of_torchjd for method in study.methods):
        pytest.importorskip("torchjd", reason="torchjd is not installed")
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(shrunk(name, study)))
    done = gradagree("ablate", path, "--out", out, "--jobs", 1, *write_data(study, tmp_path))
    assert done.exit_code == 0, done.output
    for text, named in NAMED.items():
        content = unescape((out / text).read_text(encoding="utf-8"))
        content = content.replace(r"$\lambda$", "λ").replace("= $-$", "= -")  # as LaTeX has them
        names = [named.format(method.name) for method in study.methods]
        assert [name for name in names if name not in content] == [], text
    assert (out / "references.bib").read_text(encoding="utf-8").count("@") > 3
    ran = load(str(out / "config.json")).methods
    if name not in PICTURED:
        ran = [
            a.model_copy(update={"rates": b.rates}) for a, b in zip(ran, study.methods, strict=True)
        ]
    assert ran == study.methods
    if name in PICTURED:
        assert_pictured(study, out)


def assert_pictured(study: Study, out: Path) -> None:
    extra = {"corruption"} if study.corruption else set()
    extra |= {"adaptation"} if study.tasks.kind == "sine" else set()
    page = (out / "report.html").read_text(encoding="utf-8")
    for figure in {*FIGURES, *extra}:
        png, pdf = ((out / f"{figure}.{kind}").read_bytes() for kind in ("png", "pdf"))
        if study.name == FILED:
            assert png.startswith(b"\x89PNG")
            assert pdf.startswith(b"%PDF-")
        assert f'id="figure-{figure}"' in page
