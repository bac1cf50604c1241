"""Yes/no questions: truth that generalises over topics is found, what only a topic's words say is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pellucid.errors import InputError
from pellucid.probing import Features, questions, relation_statements, statements


def asked(n: int = 240):
    rng = np.random.default_rng(0)
    truth, topic = rng.random(n) < 0.5, np.arange(n) % 4
    return statements([f"statement {i}" for i in range(n)], truth, [f"t{t}" for t in topic]), truth, topic


@pytest.mark.parametrize("kind", ["logistic", "mean"])
def test_truth_is_found_where_all_topics_share_its_direction_and_not_where_each_has_its_own(kind):
    examples, truth, topic = asked()
    rng = np.random.default_rng(1)
    sign = np.where(truth, 1.0, -1.0)
    shared, own = rng.normal(size=(2, len(truth), 10))
    shared[:, 0] += 2 * sign
    own[np.arange(len(truth)), topic] += 4 * sign  # direction t for topic t
    values = torch.tensor(np.stack([own, shared]), dtype=torch.float32)
    features = Features(values, ("embed", "layers.0.resid_post"), examples.spans, "drawn", None, "last")
    found = questions(features, examples, kind=kind, draws=3)
    assert found.accuracy.values[1] > 0.9 and found.low.values[1] > 0.85
    assert found.accuracy.values[0] < 0.65
    assert (abs(found.shuffled.values - 0.5) < 0.12).all()
    assert found.by_topic.dims == ("layer", "topic") and found.by_topic.shape == (2, 4)
    assert (found.by_topic.values[1] > 0.8).all()


def test_statements_of_relations_are_half_true_and_false_ones_take_what_the_subject_does_not_have(tmp_path):
    samples = [("Rome", "Italy"), ("Paris", "France"), ("Lyon", "France"), ("Lima", "Peru")]
    text = {"prompt_templates": ["{} is in"], "samples": [{"subject": s, "object": o} for s, o in samples]}
    (tmp_path / "city.json").write_text(json.dumps(text))
    made = relation_statements(tmp_path, ["city"])
    assert len(made) == 8
    true = {f"{s} is in {o}." for s, o in samples}
    for text, label in zip(made.spans.texts, made.labels, strict=True):
        assert (text in true) == (label == "true")
    with pytest.raises(InputError, match="cannot read"):
        relation_statements(tmp_path, ["river"])


def test_two_answers_and_three_topics_are_asked_for():
    examples, _, _ = asked()
    with pytest.raises(InputError, match="at least 3 topics"):
        questions(None, examples[np.flatnonzero(np.isin(examples.types, ["t0", "t1"]))])
    with pytest.raises(InputError, match="cannot probe by"):
        questions(None, examples, kind="neural")
