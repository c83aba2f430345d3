"""The bugs of `benchmarks.mutations` can still be planted."""

import ast

import pytest

from benchmarks.mutations import MUTATIONS, ROOT


def test_each_bug_is_one_of_its_own():
    assert len(MUTATIONS) >= 25
    for field in ("name", "bug"):
        assert len({getattr(mutation, field) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_can_be_planted(mutation):
    text = (ROOT / mutation.file).read_text()
    ast.parse(mutation.plant(text))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_a_pattern_that_no_longer_fits():
    mutation = MUTATIONS[0]
    with pytest.raises(ValueError, match="holds 0 times, and not once") as error:
        mutation.plant("")
    assert "\n" not in str(error.value)
