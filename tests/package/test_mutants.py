"""The list of ways to break the package fits the package: `make mutants` shows that the tests notice each."""

from __future__ import annotations

import ast

import pytest

from conftest import ROOT
from mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_into_other_code(mutant: Mutant) -> None:
    text = (ROOT / "src/rankwise" / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert ast.dump(ast.parse(mutant.applied(text))) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_have_to_notice_it_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text()


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_not_there_once_is_refused() -> None:
    mutant = Mutant("none", "factors.py", "a", "b", ())
    for text, count in (("", 0), ("a a", 2)):
        with pytest.raises(ValueError, match=f"is {count} times in factors.py, not once"):
            mutant.applied(text)
