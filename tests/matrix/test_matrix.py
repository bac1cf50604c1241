"""Twenty families, nine conditions, seven techniques: equal to plain torch hooks, or refused by name."""

from __future__ import annotations

import re

import pytest

from tests.test_fuzz import ugly

from .cells import CONDITIONS, TECHNIQUES, cells
from .hand import FAMILIES
from .known import refusal

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_technique_gives_the_numbers_of_hooks_or_is_refused_by_name(family: str, condition: str) -> None:
    wrong = {}
    for technique, found in cells(family, condition).items():
        expected = refusal(family, condition, technique)
        wanted = "equal" if expected is None else expected
        if found.startswith("refused: ") and (fault := ugly(found.removeprefix("refused: "))):
            wrong[technique] = f"{fault}: {found}"
        elif not re.match(wanted, found):
            wrong[technique] = f"{found} (expected: {wanted})"
    assert not wrong, wrong


def test_the_matrix_is_as_large_as_it_says() -> None:
    assert (len(FAMILIES), len(CONDITIONS), len(TECHNIQUES)) == (20, 9, 7)
