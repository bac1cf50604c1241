"""The sheet of all techniques names each of them, and nothing that is not there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.test_vocabulary import FOLDERS

DOCS = Path(__file__).parents[1] / "docs"
SHEET = (DOCS / "choose.md").read_text(encoding="utf-8")
HELPERS = {  # what techniques are given or give, and small functions beside them: in the reference, not on the sheet
    "attribution.evaluation.distribution_shift", "safety.vector", "safety.conversation_scores",
}  # fmt: skip


def techniques() -> list[str]:
    """Every public function that is recorded as a technique, by folder and name."""
    found = []
    for folder in FOLDERS:
        module = importlib.import_module(f"pellucid.{folder}")
        for name in dir(module):
            thing = getattr(module, name, None)
            if not name.startswith("_") and inspect.isfunction(thing) and hasattr(thing, "__wrapped__"):
                found.append(f"{folder}.{name}")
    return sorted(set(found))


def named() -> set[str]:
    """The names in the sheet's second column; a bare one belongs to the folder of the one before it."""
    found = set()
    for line in SHEET.splitlines():
        cells = line.split("|")
        if len(cells) < 7 or "`" not in cells[2]:
            continue
        folder = ""
        for name in re.findall(r"`([\w.]+)`", cells[2]):
            before, _, last = name.rpartition(".")
            folder = {"evaluation": "attribution.evaluation"}.get(before, before) or folder
            found.add(f"{folder}.{last}")
    return found


def test_every_technique_is_on_the_sheet():
    beside = {name.rsplit(".", 1)[-1] for name in named()}
    assert [t for t in techniques() if t not in HELPERS and t.rsplit(".", 1)[-1] not in beside] == []


@pytest.mark.parametrize("name", sorted(named()))
def test_what_the_sheet_names_is_there(name):
    folder, _, last = name.rpartition(".")
    module = importlib.import_module(f"pellucid.{folder}")
    evaluation = importlib.import_module("pellucid.attribution.evaluation")
    assert hasattr(module, last) or (folder == "attribution" and hasattr(evaluation, last))


def test_every_page_is_in_a_table_of_contents():
    pages = {p.stem for p in DOCS.glob("*.md")} - {"index"}
    listed = set(re.findall(r"^([\w/-]+)$", "\n".join(p.read_text() for p in DOCS.glob("*.md")), re.MULTILINE))
    assert pages <= listed, pages - listed
