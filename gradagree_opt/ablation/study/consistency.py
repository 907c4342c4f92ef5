"""What the sections of a study have to agree on; each mistake names the keys that it is in."""

import json
from functools import reduce
from typing import TYPE_CHECKING

from gradagree_opt.ablation.section import LocatedError
from gradagree_opt.ablation.study.sections import DRAWING
from gradagree_opt.tasks.digits import QUESTIONS

if TYPE_CHECKING:
    from gradagree_opt.ablation.study.study import Study


def check_study(study: "Study") -> None:
    """Raises a LocatedError for the first thing that contradicts another."""
    for check in (
        check_form,
        check_multi_task,
        check_protocol,
        check_tuning,
        check_corruption,
        check_batch_norm,
        check_inner_adam,
        check_meta_sgd,
        check_methods,
    ):
        check(study)


def check_form(study: "Study") -> None:
    """The form goes with the tasks, and has the keys that it needs."""
    if (study.form.kind == "multi-task") != study.tasks.multi_task:
        message = (
            "expected the form multi-task for digits tasks, and for no others, "
            f"found the form {study.form.kind} for {study.tasks.kind} tasks"
        )
        raise LocatedError(message, "form", "kind")
    if not study.adapts:
        return
    if study.inner is None:
        raise LocatedError("the key 'inner' is missing")
    if "support_shots" not in study.test.model_fields_set:
        raise LocatedError("the key 'support_shots' is missing", "test")


def check_multi_task(study: "Study") -> None:
    if study.adapts:
        return
    n = len(QUESTIONS)
    for expected, *place in (
        (None, "inner"),
        (None, "corruption"),
        (n, "meta_batch"),
        (n, "tuning", "tasks"),
        (n, "test", "tasks"),
        ([0], "test", "steps"),
        (1, "test", "support_shots"),
        (True, "test", "transductive"),
    ):
        found: object = reduce(getattr, place, study)
        if found != expected:
            shown = [json.dumps(value, default=str) for value in (expected, found)]
            raise LocatedError(
                f"expected {shown[0]}, found {shown[1]}: multi-task training has the same {n} "
                "tasks at every step and at the test, and adapts to none",
                *place,
            )


def check_protocol(study: "Study") -> None:
    if study.baseline not in [method.name for method in study.methods]:
        raise LocatedError(f"the baseline {study.baseline!r} is not one of the methods", "baseline")
    if study.test.steps != sorted(set(study.test.steps)):
        raise LocatedError(f"the steps {study.test.steps} do not rise", "test", "steps")
    if study.tuning.steps not in study.test.steps:
        raise LocatedError("tuning.steps is not among the test's steps", "tuning", "steps")
    shots = study.tasks.support_shots * (study.way or 1)
    batch_size = (study.inner and study.inner.batch_size) or 1
    if shots % batch_size:
        message = f"{batch_size} does not divide the {shots} support examples"
        raise LocatedError(message, "inner", "batch_size")
    if study.classes is None and study.model.kind == "conv4":
        message = f"a conv4 model needs drawings; {study.tasks.kind} tasks have numbers"
        raise LocatedError(message, "model")
    if study.model.kind == "conv4" and getattr(study.tasks, "inputs", DRAWING) != DRAWING:
        raise LocatedError(f"a conv4 model needs drawings of {DRAWING} numbers", "model")


def check_tuning(study: "Study") -> None:
    seeds = study.tuning.seeds
    if isinstance(seeds, int) and seeds > len(study.seeds):
        raise LocatedError(f"more than the study's {len(study.seeds)} seeds", "tuning", "seeds")
    if isinstance(seeds, list) and (shared := set(seeds) & set(study.seeds)):
        message = f"expected none of the study's seeds, found {min(shared)}; give others"
        raise LocatedError(message, "tuning", "seeds")
    expected = len(study.outer.rates)
    if study.outer.extend and expected == 1:
        message = "expected two rates or more to extend, found one; give more, or leave it out"
        raise LocatedError(message, "outer", "extend")
    for index, method in enumerate(study.methods):
        if (found := len(study.rates(method))) != expected:
            message = f"expected as many rates as outer.rates has, {expected}, found {found}; "
            message += "give every method as many"
            raise LocatedError(message, "methods", index, "rates")


def check_corruption(study: "Study") -> None:
    if study.corruption is None:
        return
    kind, foreign = study.corruption.kind, study.corruption.foreign
    if study.way is not None and foreign:
        raise LocatedError("there are no foreign tasks for drawings", "corruption", "foreign")
    if study.way is not None and kind == "label_noise":
        message = "classes take no noise; take shuffled_labels"
        raise LocatedError(message, "corruption", "kind")
    if kind == "flipped" and study.form.kind != "reptile":
        message = "only Reptile's tasks report their displacements; take the form reptile"
        raise LocatedError(message, "corruption", "kind")
    if foreign == getattr(study.tasks, "dataset", ""):
        message = f"the tasks of {foreign} are the study's own, not foreign"
        raise LocatedError(message, "corruption", "foreign")
    normalized = study.model.kind == "conv4" or getattr(study.model, "batch_norm", False)
    if kind == "outlier_scale" and study.way is not None and normalized:
        message = "BatchNorm divides the scale of drawings out again; take shuffled_labels"
        raise LocatedError(message, "corruption", "kind")
    alone = study.form.kind == "reptile" and study.tasks.support_shots == 1
    if kind == "shuffled_labels" and alone:
        of_class = " of each class" if study.way else ""
        message = f"labels of one example{of_class} are as good when shuffled; take more shots"
        raise LocatedError(message, "corruption", "kind")


def check_batch_norm(study: "Study") -> None:
    if study.model.kind != "mlp" or not study.model.batch_norm:
        return
    places = [("inner", "batch_size")]
    if study.way is None:  # classes are two at least, and so are their examples
        places += [("tasks", "support_shots")]
        places += [("test", "support_shots")] * study.adapts
        places += [("tasks", "query_shots")] * (study.adapts and study.form.kind != "reptile")
        places += [("test", "query_shots")] * study.test.transductive
    for section, key in places:
        if getattr(getattr(study, section), key, None) == 1:
            raise LocatedError("batch_norm needs batches of two or more", section, key)


def check_inner_adam(study: "Study") -> None:
    if study.inner is None or study.inner.optimizer == "sgd":
        return
    if study.form.kind == "meta-sgd":
        message = "Meta-SGD has rates of its own for gradient descent; leave it out"
        raise LocatedError(message, "inner", "optimizer")
    # The root of a square has no derivative at an entry without gradient, as of a unit that is off.
    if not getattr(study.form, "first_order", True):
        message = "Adam has no second order at a gradient of zero; take first_order: true, or sgd"
        raise LocatedError(message, "inner", "optimizer")


def check_meta_sgd(study: "Study") -> None:
    if study.form.kind != "meta-sgd":
        return
    if study.inner and study.inner.batch_size is not None:
        message = "Meta-SGD takes each step on the whole support set; leave it out"
        raise LocatedError(message, "inner", "batch_size")
    for index, method in enumerate(study.methods):
        scopes = {part.options.get("scope", "global") for part in (method, *method.nested)}
        if scopes != {"global"}:
            message = "Meta-SGD's displacement has no leaf for the rates; leave scope out"
            raise LocatedError(message, "methods", index, "options", "scope")


def check_methods(study: "Study") -> None:
    for index, method in enumerate(study.methods):
        if method.references:
            continue
        try:
            method.try_on(study.meta_batch)
        except ImportError:
            continue  # as in Method.accepted
        except (TypeError, ValueError) as error:
            message = f"a batch of {study.meta_batch} tasks: {error}"
            raise LocatedError(message, "methods", index, "options") from None
