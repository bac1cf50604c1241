"""Examples are read with what is known of their reasons, and every line that cannot be used is named."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.data import Example, edited, read_examples
from pellucid.attribution.players import Players
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.evaluation.models import PROMPT, opened


def test_edited_words_are_those_the_counterfactual_does_not_share():
    text = "I saw this. It is a bad film, truly bad!"
    other = "I saw this. It is a good film, truly wonderful!"
    assert [text[a:b] for a, b in edited(text, other)] == ["bad", "bad"]
    assert edited(text, text) == ()
    assert [text[a:b] for a, b in edited(text, "I saw this. It is a film, truly!")] == ["bad", "bad"]


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("players", ["token", "word"])
def test_a_rationale_lands_on_the_players_whose_characters_it_names(family, players):
    case = Case.of(opened(family), PROMPT, logit(" Paris"))
    parts = Players.of(case, players)
    for given in ({"rationale": ["France"]}, {"rationale": [[15, 21]]}, {"counterfactual": "The capital of Italy is"}):
        found = Example.of({"text": PROMPT, **given}).players(case, parts)
        assert [label.strip() for label, here in zip(parts.labels, found, strict=True) if here] == ["France"]
    assert Example.of(PROMPT).players(case, parts) is None
    assert Example.of({"text": PROMPT, "rationale": [PROMPT]}).players(case, parts) is None  # all of it says nothing


def test_lines_of_json_are_read_in_order_and_up_to_a_limit(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"text": "one"}, {"text": "two", "label": 1}, {"text": "three", "target": " x", "against": " y"}]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_examples(file)
    assert [(e.text, e.target, e.against) for e in found] == [
        ("one", None, None),
        ("two", 1, None),
        ("three", " x", " y"),
    ]
    assert len(read_examples(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        ('{"text": "a"}\n{text}', "data.jsonl, line 2 is no JSON"),
        ("[1]", "line 1 is no object"),
        ('{"txt": "a"}', "line 1 has no text but 'txt'; did you mean 'text'"),
        ('{"text": " "}', "line 1 has no text"),
        ('{"text": "a b", "rationale": ["c"]}', "line 1: the rationale 'c' is not in the text"),
        ('{"text": "a b", "rationale": [[2, 9]]}', "is no rationale: give texts, or"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line(tmp_path, content, message):
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_examples(file)


def test_a_directory_needs_the_library_that_saved_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="install `datasets`"):
        read_examples(tmp_path)
    with pytest.raises(InputError, match="there is no data"):
        read_examples(tmp_path / "absent.jsonl")


def test_a_saved_data_set_is_read_by_its_rows_and_its_splits_are_named(tmp_path, monkeypatch):
    class Splits(dict):
        pass

    rows = [{"text": "a b", "label": 0}, {"text": "c d", "label": 1}]
    found = {str(tmp_path / "set"): rows, str(tmp_path / "splits"): Splits(train=rows, test=rows)}
    library = ModuleType("datasets")
    library.DatasetDict, library.load_from_disk = Splits, found.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "set").mkdir()
    (tmp_path / "splits").mkdir()
    assert [e.target for e in read_examples(tmp_path / "set")] == [0, 1]
    with pytest.raises(InputError, match="has several splits: give one of .*train, .*test"):
        read_examples(tmp_path / "splits")


def test_an_example_of_ids_has_no_characters():
    case = Case.of(opened("gpt2"), [10, 11, 12], " Paris")
    assert Example.of([10, 11, 12]).players(case, Players.of(case)) is None
    assert np.array_equal(Example.of([10, 11, 12]).text, [10, 11, 12])
