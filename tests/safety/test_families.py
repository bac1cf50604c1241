"""Every technique on every kind of model: docs/safety.md's table is what `scripts/safety_families.py` finds, here for some of its cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pellucid as pl
from scripts.safety_families import COLUMNS, TECHNIQUES, cell

TABLE = [
    [part.strip(" `") for part in line.split("|")[1:-1]]
    for line in (Path(__file__).parents[2] / "docs/safety.md").read_text().partition("<!-- families -->")[2].partition("<!-- /families -->")[0].splitlines()
    if line.startswith("|")
]  # fmt: skip
DEAR = (
    "ConceptReader('logistic')",
    "ConceptReader('ccs')",
    "ConceptReader('attention')",
    "audit('transformer')",
    "trace_failure",
    "abstain",
)
SOME = [
    *((name, "bitsandbytes 8 bit") for name in TECHNIQUES if name not in DEAR),
    *((name, "torchao int8") for name in ("fit_monitor", "monitor while generating", "Vector.edit", "in_weights")),
    *((name, "bfloat16") for name in ("condition", "in_weights", "confidence by layers")),
    *((name, "BERT") for name in ("honesty", "LearntEdit", "monitor of an answer", "export_gguf, import_vectors", "confidence")),
    *((name, "T5") for name in ("doubt", "strengths")),
]  # fmt: skip


def test_the_table_has_every_technique_and_every_model_and_nothing_wrong() -> None:
    assert TABLE[0][1:] == list(COLUMNS) and [row[0] for row in TABLE[2:]] == list(TECHNIQUES)
    assert all(re.fullmatch(r"right|no \(\d+\)", said) for row in TABLE[2:] for said in row[1:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "column"), SOME)
def test_a_cell_is_right_or_refused_as_the_table_says(name: str, column: str) -> None:
    if column.startswith("bits"):
        pytest.importorskip("bitsandbytes")
    elif column.startswith("torchao"):
        pytest.importorskip("torchao.quantization")
    with pl.quiet():
        said = cell(name, column)
    written = next(row for row in TABLE if row[0] == name)[1 + COLUMNS.index(column)]
    assert (said == "right") == (written == "right") and "WRONG" not in said, said
