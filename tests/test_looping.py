"""The loop over cases inside a test: none is left out, and the one that fails is named."""

import inspect

import pytest

from gradagree_testing.looping import every


def test_every_combination_is_run_once_with_the_fixtures_of_the_test():
    seen = []

    @every(scale=[1.0, 2.0], rule={"mean": 3, "sum": 4})
    def test(fixture, scale, rule):
        seen.append((fixture, scale, rule))

    assert list(inspect.signature(test).parameters) == ["fixture"]
    test(fixture="f")
    assert seen == [("f", 1.0, 3), ("f", 1.0, 4), ("f", 2.0, 3), ("f", 2.0, 4)]


def test_the_case_that_fails_is_named_with_what_failed():
    @every(scale=[1.0, 2.0], rule={"mean": 3, "sum": 4})
    def test(scale, rule):
        assert (scale, rule) != (2.0, 3), "too large"

    with pytest.raises(AssertionError, match=r"with scale=2\.0, rule=mean: too large"):
        test()


def test_an_axis_without_values_is_refused():
    with pytest.raises(AssertionError, match="found none"):
        every(scale=[])
