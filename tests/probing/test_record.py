"""Every probing result, saved and read back, prints the program that gives it again."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pellucid.probing import (
    Examples,
    ProbeTraces,
    Protocol,
    Spans,
    Training,
    Treebank,
    amnesic,
    beside_random,
    edge_probing,
    online_code,
    probe,
    questions,
    read,
    roc,
    selectivity,
    statements,
    structural,
    variational_code,
)  # fmt: skip
from tests.probing.trees import tiny
from tests.test_technique import again

WORDS = ["the", "city", "of", "Paris", "is", "in", "France", "he", "went", "to", "a", "drink"]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, 6)) for _ in range(16)]
SPANS = Spans.words(TEXTS)
LABELS = Examples(SPANS, ["name" if SPANS.surface(i)[0].isupper() else "word" for i in range(len(SPANS))], name="case")
LENGTHS = Examples(SPANS, [len(SPANS.surface(i)) for i in range(len(SPANS))], name="length")
FAST = Protocol(seeds=1, l2=1.0)
TRUTH = statements(TEXTS[:12], [True, False] * 6, ["a", "a", "b", "b", "c", "c"] * 2)


def bank() -> Treebank:
    line = "{0}\t{1}\t{1}\tNOUN\t_\t_\t{2}\tdep\t_\t_"
    sentences = [[line.format(i + 1, w, i) for i, w in enumerate(text.split())] for text in TEXTS]
    return Treebank.parse("\n\n".join("\n".join(s) for s in sentences))


CALLS = {
    "probe": lambda m: probe(m, LABELS, protocol=FAST),
    "numbers": lambda m: probe(read(m, SPANS), LENGTHS, protocol=FAST),
    "selectivity": lambda m: selectivity(m, LABELS, protocol=FAST),
    "beside random": lambda m: beside_random(m, LABELS, protocol=FAST),
    "questions": lambda m: questions(m, TRUTH, draws=1, kind="mean"),
    "edges": lambda m: edge_probing(m, LABELS, training=Training(hidden=4, epochs=1), seeds=1),
    "online": lambda m: online_code(m, LABELS, fractions=(0.5,), seeds=1),
    "variational": lambda m: variational_code(m, LABELS, steps=20),
    "amnesic": lambda m: amnesic(m, LABELS, "layers.0.resid_post", draws=1),
    "structural": lambda m: structural(m, bank(), rank=4, epochs=1),
    "traces": lambda m: ProbeTraces(draws=1).fit(m, LABELS).trace(m, "the city of Paris"),
    "judged traces": lambda m: ProbeTraces(draws=1).fit(m, LABELS).result_,
    "roc": lambda m: roc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]),
}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("name", CALLS)
def test_the_program_of_a_result_gives_it_again(name, model, tmp_path, monkeypatch):
    found = CALLS[name](model)
    made = again(found, tmp_path, monkeypatch, module=model.module, tokenizer=model.tokenizer)
    xr.testing.assert_allclose(made.data, found.data, rtol=1e-6)
