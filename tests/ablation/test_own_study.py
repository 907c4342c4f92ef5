"""A study's own aggregators, networks and tasks, each named as module:name."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.conduct import prepare
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.training.problem import build_problem, data_digest
from gradagree_testing.command import contents, gradagree

from .conftest import WriteStudy

DOCS = Path(__file__).parents[2] / "docs"
MODULE = '''
from dataclasses import dataclass

import torch
from torch import nn

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import mlp
from gradagree_opt.tasks import Sine


def sines(support_shots, query_shots):
    """The tasks of tiny.yaml, whose test has 7 query shots, on a grid."""
    return Sine(support_shots=support_shots, query_shots=query_shots,
                query="grid" if query_shots == 7 else "uniform")

def network(inputs, outputs, hidden):
    return mlp([inputs, *hidden, outputs], nn.Tanh)

class Uniform:
    def __call__(self, statistics):
        active = statistics.active.expand_as(statistics.row_sums)
        return active / active.sum(-1, keepdim=True)

def uniform(statistics):
    return Uniform()(statistics)

class MeanOfOurs(ga.Aggregator):
    def __init__(self, *, nonfinite="raise", generator=None):
        super().__init__(Uniform(), nonfinite=nonfinite)

@dataclass
class Power:
    power: float
    needs = frozenset({"squared_norms"})

    def __call__(self, statistics):
        return statistics.squared_norms**self.power

def filed(support_shots, query_shots, root):
    return sines(support_shots, query_shots)

class Blobs:
    """Points around places that the classes of a task have."""
    def __init__(self, support_shots, query_shots, way=3, dtype=torch.float32, classes=None):
        self.shots, self.way = {"support": support_shots, "query": query_shots}, way

    def sample(self, n_tasks, *, split="train", generator):
        places = 5 * torch.randn(n_tasks, self.way, 1, 2, generator=generator)
        def part(shots):
            noise = torch.randn(n_tasks, self.way, shots, 2, generator=generator)
            y = torch.arange(self.way).repeat_interleave(shots).expand(n_tasks, -1)
            return (places + noise).flatten(1, 2), y
        return {name: part(shots) for name, shots in self.shots.items()}

class Wrong:
    """Tasks of which one thing is wrong."""
    def __init__(self, support_shots, query_shots, wrong=""):
        self.wrong, self.sines = wrong, sines(support_shots, query_shots)
    def sample(self, n_tasks, *, split="train", generator):
        tasks = self.sines.sample(n_tasks, split=split, generator=generator)
        (x, y), wrong = tasks["query"], self.wrong
        if wrong == "raise":
            raise LookupError("the server is down\\nfor days")
        if wrong == "part":
            del tasks["query"]
        changed = {"double": (x.double(), y), "flat": (x, y[..., 0]), "two": (x, y.repeat(1, 1, 2)),
                   "few": (x[:, :-1], y[:, :-1]), "none": None}
        return tasks | ({"query": changed[wrong]} if wrong in changed else {})

class Tired:
    calls = 0
    def __call__(self, statistics):
        Tired.calls += 1
        if Tired.calls > 9:
            raise LookupError("no more\\nfor today")
        return uniform(statistics)

def read_item(statistics):
    return statistics.row_sums / statistics.row_sums.sum().item()

def refusing(**_):
    raise RuntimeError("no network today\\nnor tomorrow")

def constant(inputs, outputs):
    return nn.Identity()

class Fixed(nn.Linear):
    def __init__(self, inputs, outputs, width):
        super().__init__(inputs, width)

number = 3
'''
OWN = {
    "tasks": {"kind": "own", "make": "ours:sines", "support_shots": 10},
    "model": {"kind": "own", "make": "ours:network", "options": {"hidden": [8]}},
}


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ours", "own_study", "own_weighting"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def warn(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_the_example_of_the_page_runs_and_says_what_was_used(tmp_path: Path) -> None:
    for name in ("own_study.py", "own_study.yaml", "own_weighting.py"):
        shutil.copy(DOCS / name, tmp_path)
    result = gradagree("ablate", "own_study.yaml", "--quick", "--out", "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    methods = Path("out/methods.md").read_text()
    for named in ("own_study:Decays", "own_study:Residual, width", "own_weighting:LengthShare"):
        assert named in methods
    before = contents(tmp_path / "out")
    runs = set(Path("out/runs").glob("*.json"))

    # a report needs none of the modules
    for name in ("own_study.py", "own_weighting.py"):
        Path(name).rename(f"{name}.away")
        sys.modules.pop(Path(name).stem)
    assert gradagree("report", "out").exit_code == 0
    assert contents(tmp_path / "out") == before
    for name in ("own_study.py", "own_weighting.py"):
        Path(f"{name}.away").rename(name)

    # of a module that has changed, the runs that name it are done anew, and no others
    weighting = Path("own_weighting.py")
    weighting.write_text(weighting.read_text() + "\n# changed\n")
    again = gradagree("ablate", "own_study.yaml", "--quick", "--out", "out", "--jobs", 1)
    assert again.exit_code == 0, again.output
    added = [json.loads(path.read_text()) for path in set(Path("out/runs").glob("*.json")) - runs]
    assert len(added) == len(runs) * 2 / 3
    assert {found["run"]["method"]["name"] for found in added} == {
        "by length",
        "by length at the mean's length",
    }


@pytest.mark.usefixtures("without_figures")
def test_tasks_and_network_of_ones_own_give_what_the_same_built_in_ones_give(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    theirs = ablate(write_study(), out=tmp_path / "theirs", jobs=1).runs
    ours = ablate(write_study(**OWN), out=tmp_path / "ours", jobs=1).runs
    assert ours.equals(theirs)


@pytest.mark.parametrize("name", ["Uniform", "uniform", "MeanOfOurs"])
def test_a_weighting_a_function_and_an_aggregator_of_ones_own_are_methods(name: str) -> None:
    method = Method(name="own", aggregator=f"ours:{name}")
    method.try_own(4)
    tasks = torch.randn(4, 3, generator=Generator().manual_seed(1))
    aggregator = method.build(Generator())
    assert aggregator.nonfinite == "propagate"
    assert torch.allclose(aggregator(tasks), tasks.mean(0))


def test_a_weighting_has_its_own_options_and_those_of_an_aggregator() -> None:
    options = {"power": 2, "scope": "leaf", "match_norm": {"aggregator": "ours:Uniform"}}
    options["match_norm"]["options"] = {"scope": "leaf"}  # type: ignore[index]
    method = Method.model_validate({"name": "own", "aggregator": "ours:Power", "options": options})
    method.try_own(2)
    tasks = [torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [-2.0]])]
    # weights ∝ squared norm², per leaf: 81 to 1 and 1 to 16, then the length of the mean's update
    raw = [81 * 3 + 1, 1 - 16 * 2]
    length = (((3 + 1) / 2) ** 2 + ((1 - 2) / 2) ** 2) ** 0.5
    factor = length / (raw[0] ** 2 + raw[1] ** 2) ** 0.5
    update = method.build(Generator())(tasks)
    assert torch.allclose(torch.cat(update), factor * torch.tensor(raw))


@pytest.mark.usefixtures("without_figures")
def test_classes_are_scored_by_accuracy_and_known_by_their_tasks(write_study: WriteStudy) -> None:
    tasks = {"kind": "own", "make": "ours:Blobs", "inputs": 2, "way": 3, "support_shots": 5}
    inner = {"lr": 0.02, "steps": 2}
    results = ablate(write_study(tasks=tasks, inner=inner), out="out", jobs=1)
    assert ((results.runs["accuracy"] * 12 * 21).round(4) % 1 == 0).all()  # 12 tasks of 21 points
    changed = tasks | {"options": {"way": 3}, "query_shots": 2}
    studies = [load(str(write_study(tasks=each, inner=inner))) for each in (tasks, changed)]
    digests = [data_digest(build_problem(study, None)) for study in studies]
    assert None not in digests and digests[0] != digests[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"make": "absent:sines"}, "module 'absent' in"),
        ({"make": "ours:absent"}, "ours:absent: AttributeError"),
        ({"make": "ours:number"}, "not callable"),
        ({"make": "ours:refusing"}, "RuntimeError: no network today"),
        ({"make": "ours:sines", "options": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"make": "ours:filed"}, "'root'; give --data, the path that root is to be"),
        ({"make": "ours:network", "options": {"inputs": 1, "outputs": 1}}, "unexpected keyword"),
        ({"make": "ours:Wrong", "options": {"wrong": "raise"}}, "LookupError: the server is down"),
        ({"make": "ours:Wrong", "options": {"wrong": "part"}}, "KeyError: 'query'"),
        ({"make": "ours:Wrong", "options": {"wrong": "none"}}, "expected inputs and targets"),
        ({"make": "ours:Wrong", "options": {"wrong": "double"}}, "torch.float64"),
        ({"make": "ours:Wrong", "options": {"wrong": "flat"}}, "targets of shape [1] each, found"),
        ({"make": "ours:Wrong", "options": {"wrong": "two"}}, "shape [1] each, found [2]"),
        ({"make": "ours:Wrong", "options": {"wrong": "few"}}, "query examples of a train task: ex"),
        ({"make": "ours:Wrong", "inputs": 2}, "expected 2 numbers in each, found 1"),
        ({"make": "ours:Wrong", "way": 3, "outputs": 2}, "expected outputs without way"),
        ({"make": "ours.sines"}, "tasks.make"),
    ],
)
def test_tasks_that_are_none_are_refused_in_one_sentence(
    write_study: WriteStudy, changes: dict[str, object], words: str
) -> None:
    refused(write_study(tasks=OWN["tasks"] | changes), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"make": "ours:constant", "options": {}}, "with parameters, found Identity()"),
        ({"make": "ours:sines", "options": {}}, "unexpected keyword argument 'inputs'"),
        ({"make": "ours:refusing"}, "the model ours:refusing: RuntimeError: no network today"),
        ({"make": "ours:Fixed", "options": {"width": 2}}, "expected outputs [7, 1], found [7, 2]"),
    ],
)
def test_networks_that_are_none_are_refused_in_one_sentence(
    write_study: WriteStudy, changes: dict[str, object], words: str
) -> None:
    refused(write_study(model=OWN["model"] | changes), words)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"aggregator": "ours:Absent"}, "the method 'own': "),
        ({"aggregator": "ours:number"}, "expected a class or a function, found 3"),
        ({"aggregator": "ours:Power"}, "the option 'power' is missing"),
        ({"aggregator": "ours:Power", "options": {"pwer": 1}}, "unknown option 'pwer'"),
        ({"aggregator": "ours:Power", "options": {"power": "two"}}, "expected a number"),
        ({"aggregator": "ours:Uniform", "options": {"nonfinite": "raise"}}, "would end the study"),
        ({"aggregator": "ours:read_item"}, "vmap"),
        ({"aggregator": "mean", "options": {"match_norm": {"aggregator": "absent:A"}}}, "'absent'"),
    ],
)
def test_methods_that_are_none_are_refused_in_one_sentence(
    write_study: WriteStudy, keys: dict[str, object], words: str
) -> None:
    refused(write_study(methods=[{"name": "own", **keys}], baseline="own"), words)


@pytest.mark.usefixtures("without_figures")
def test_a_method_that_raises_in_a_later_step_ends_the_study_in_one_sentence(
    write_study: WriteStudy,
) -> None:
    methods = [{"name": "mean", "aggregator": "mean"}, {"name": "own", "aggregator": "ours:Tired"}]
    study = write_study(methods=methods, compile=False)
    result = gradagree("ablate", study, "--out", "out", "--jobs", 1)
    assert result.exit_code == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("gradagree: the method 'own': expected an update in each of the")
    assert "LookupError: no more; see" in sentence
    assert sentence.endswith("the finished runs are in out")


def refused(study: Path, words: str) -> None:
    before = contents(Path.cwd())
    with pytest.raises(StudyError) as caught:
        prepare(load(str(study)), Path("out"), None, ["test"], warn)
    message = str(caught.value)
    assert words in message and "\n" not in message
    after = {
        name: found for name, found in contents(Path.cwd()).items() if "__pycache__" not in name
    }
    assert after == before
