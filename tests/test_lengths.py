"""A text that is longer than the model holds, last of a corpus: one error that names it before anything runs, or windows.

Every public callable that goes through texts; those that read a `Corpus` cut or slide (tests/test_corpus.py), the others refuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.engine.limits import limit
from pellucid.errors import InputError
from tests.test_reproduced import DIFFERENCE, classifier, gpt2, monitor, opened

A, T, E, S = pl.attribution, pl.attention, pl.attribution.evaluation, pl.safety
FINE = ["The capital of France is Paris", "Mary and John went to the store", "he gave a drink to Mary"]
OTHER = "The city of Rome is in Italy"
LONG = " ".join(["The city of Paris is in France"] * 12)
TEXTS = [*FINE, LONG]
METHODS = {"methods": ["saliency"]}
VECTOR = S.Vector("layers.1.resid_post", torch.linspace(-1, 1, 32))


def spans() -> Any:
    return pl.probing.Examples(pl.probing.Spans.whole(TEXTS * 4), ["a", "b"] * 8)


def told() -> Any:
    return pl.tuning.Rationales(TEXTS, [0, 1, 0, 1], {"decoy": ["The", "and", "he", "city"]})


def tree() -> Any:
    word = "{n}\t{w}\t_\tX\t_\t_\t{h}\tdep\t_\t_\n"
    rows = ["".join(word.format(n=i + 1, w=w, h=i) for i, w in enumerate(t.split())) for t in TEXTS]
    return pl.probing.Treebank.parse("\n".join(rows), words=(1, 99)).sentences


REFUSED: dict[str, Callable[[], Any]] = {
    "attention.head_summaries": lambda: T.head_summaries(gpt2(), TEXTS),
    "attention.head_clusters": lambda: T.head_clusters(gpt2(), TEXTS),
    "attention.head_relations": lambda: T.head_relations(gpt2(), tree(), least=1),
    "attention.attention_erasure": lambda: T.attention_erasure(gpt2(), TEXTS),
    "attention.attention_correlation": lambda: T.attention_correlation(gpt2(), TEXTS),
    "attention.adversarial_training": lambda: T.adversarial_training(gpt2(), FINE, TEXTS),
    "attention.attention_diagnostic": lambda: T.attention_diagnostic(gpt2(), FINE, [0, 1, 0], TEXTS, [0, 1, 0, 1]),
    "attention.uniform_attention": lambda: T.uniform_attention(classifier(), FINE, [0, 1, 0], TEXTS, [0, 1, 0, 1], batch=1),
    "attribution of several": lambda: A.saliency(gpt2(), TEXTS, 7),
    "evaluation.compare": lambda: E.compare(gpt2(), TEXTS, **METHODS),
    "evaluation.distribution_shift": lambda: E.distribution_shift(gpt2(), TEXTS * 3),
    "evaluation.weight_randomisation": lambda: E.weight_randomisation(gpt2(), TEXTS, **METHODS),
    "evaluation.target_randomisation": lambda: E.target_randomisation(gpt2(), TEXTS, **METHODS),
    "evaluation.label_randomisation": lambda: E.label_randomisation(gpt2(), gpt2(), TEXTS, **METHODS),
    "evaluation.implementation_invariance": lambda: E.implementation_invariance(gpt2(), TEXTS, twin=gpt2(), **METHODS),
    "causal.ablation": lambda: pl.causal.ablation(gpt2(), TEXTS, metric=pl.metrics.logit(7)),
    "causal.tracing": lambda: pl.causal.tracing(gpt2(), [*FINE[:1], LONG], [7, 7], subject="France"),
    "lenses.causal_basis": lambda: pl.lenses.causal_basis(gpt2(), TEXTS, "layers.0.resid_post"),
    "neurons.neuron_selectivity": lambda: pl.neurons.neuron_selectivity(
        gpt2(), TEXTS * 4, [(i, 0, 2) for i in range(16)], ["a", "b"] * 8, "layers.0.mlp.neurons"
    ),
    "probing.read": lambda: pl.probing.read(gpt2(), spans()),
    "probing.amnesic": lambda: pl.probing.amnesic(gpt2(), spans(), "layers.0.resid_post"),
    "safety.confidence": lambda: S.confidence(gpt2(), TEXTS, batch=1),
    "safety.abstain": lambda: S.abstain(gpt2(), TEXTS, [" a"] * 4, score="margin", batch=1),
    "safety.answered_right": lambda: S.answered_right(gpt2(), TEXTS, [" a"] * 4, batch=1),
    "safety.semantic_entropy": lambda: S.semantic_entropy(gpt2(), TEXTS, draws=2, max_new_tokens=2),
    "safety.conversation_scores": lambda: S.conversation_scores(gpt2(), monitor(), TEXTS, max_new_tokens=2, batch=1),
    "safety.conversation_scores of replies": lambda: S.conversation_scores(gpt2(), monitor(), FINE, replies=[*FINE[:2], LONG], batch=1),
    "safety.evaluate": lambda: S.evaluate(gpt2(), monitor(), TEXTS, [True, False] * 2, replies=FINE + FINE[:1], batch=1),
    "safety.fit_monitor": lambda: S.fit_monitor(
        gpt2(), [f"{t} {i}" for i in range(4) for t in TEXTS], [True, False] * 8, site="layers.1.resid_post", replies=["a"] * 16, batch=1
    ),
    "safety.Contrast.fit": lambda: S.Contrast(sites="layers.1.resid_post", batch=1).fit(gpt2(), [f"{t} a" for t in [*FINE, OTHER]], TEXTS),
    "safety.strengths": lambda: S.strengths(gpt2(), VECTOR, TEXTS, DIFFERENCE, draws=1),
    "tuning.importance": lambda: pl.tuning.importance(classifier(), told()),
    "tuning.Encoded": lambda: pl.tuning.fit(classifier(), told(), [pl.tuning.Consistency("decoy")], steps=1, seeds=[0]),
    "surgery.layer_importance": lambda: pl.surgery.layer_importance(gpt2(), FINE, {"seven": (TEXTS, pl.metrics.logit(7))}),
    "surgery.removal": lambda: pl.surgery.removal(gpt2(), FINE, {"seven": (TEXTS, pl.metrics.logit(7))}, most=1, layers=[0, 1], draws=2),
    "surgery.Fact": lambda: pl.surgery.edit(
        gpt2(), pl.surgery.Fact(f"{LONG} {{}} is", "France", " Rome", " Paris"), covariance="off", layers=0, contexts=0
    ),
}  # fmt: skip


ALONE = ("causal.tracing", "surgery.Fact")  # prompts that are given one by one


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_too_long_is_named_before_anything_runs(name: str) -> None:
    ran: list[int] = []
    models = [gpt2(), classifier()]
    for each in models:
        assert limit(each.module) == 64  # the table is measured once a model, by a short run
    hooks = [each.module.register_forward_pre_hook(lambda *_: ran.append(1)) for each in models]
    try:
        with pytest.raises(InputError, match=r"tokens but the model's context holds 64") as error:
            REFUSED[name]()
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran, f"{len(ran)} passes before: {error.value}"
    assert re.search(r"(prompt|text|sentence|conversation|question) \d+", str(error.value)) or name in ALONE, (
        error.value
    )


def test_what_was_cut_before_is_read_as_it_was_cut() -> None:
    """The way out that the error names: prompts that `model.inputs` has cut, one by one or as one batch."""
    cut = [gpt2().inputs(text, truncate="left") for text in TEXTS]
    found = T.head_summaries(gpt2(), cut, probes=0)
    by_hand = [gpt2().run(each, keep="layers.0.attn.pattern").tensor("layers.0.attn.pattern")[0] for each in cut]
    entropies = []
    for a in by_hand:
        a = a[:, 1:].double()  # queries that see two keys
        entropies.append(-(a * a.clamp_min(1e-300).log()).sum(-1).mean(1))
    wanted = torch.stack(entropies).mean(0)
    np.testing.assert_allclose(found.data["entropy"].values[0], wanted.detach().numpy(), atol=1e-5)
    padded = gpt2().inputs([*FINE, FINE[0][:11]])
    alone = T.head_summaries(gpt2(), [*FINE, FINE[0][:11]], probes=0)
    np.testing.assert_allclose(
        T.head_summaries(gpt2(), padded, probes=0).data["entropy"], alone.data["entropy"], atol=1e-5
    )


def test_an_encoder_decoder_is_asked_about_its_source() -> None:
    with pytest.raises(InputError, match="prompt 1.*holds"):
        pl.corpus.read_each(opened("bart"), [FINE[0], " ".join([LONG] * 4)], 3)
