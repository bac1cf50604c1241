"""The table of families in docs/surgery.md is true: `python -m benchmarks.surgery_families --check` tries it whole, here a part of it."""

from __future__ import annotations

import pytest

from benchmarks.surgery_families import DOCS, FAMILIES, MARKS, read, table, techniques, tried


@pytest.mark.parametrize("family", ["gemma3_text", "t5", "bert"])
def test_what_the_docs_say_of_a_family_is_so(family: str) -> None:
    assert read(DOCS.read_text())[family] == tried(family)


def test_the_table_is_read_as_it_was_written() -> None:
    said = {f: dict.fromkeys(techniques(), "yes") for f in FAMILIES}
    said["t5"]["removal"], said["bert"]["removal"] = "it has two stacks (an encoder too)", "it looks ahead"
    assert read(f"text\n{MARKS[0]}\n{table(said)}\n{MARKS[1]}\nmore") == said
