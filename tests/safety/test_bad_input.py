"""The bad input of the issue, at every door it can come in by: one error in a sentence each, of pellucid's own kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import safety as sf
from pellucid.errors import InputError, PellucidError
from tests.zoo import build, tokenizer

NAMES = ("Paris", "Rome", "Mary", "John", "the dog", "the cat", "the city", "the store")
TRUE = [f"{a} is in {b}" for a in NAMES for b in ("France", "Italy")]
FALSE = [t.replace(" is in ", " is not in ") for t in TRUE]
TOPICS = [f"t{i // 4}" for i in range(16)]
ALL, HALF = [*TRUE, *FALSE], [True] * 16 + [False] * 16
SITE = "layers.1.resid_post"
CHATS = [[{"role": "user", "content": t}] for t in TRUE]


@cache
def opened(family: str, seed: int = 0) -> pl.Model:
    torch.manual_seed(seed)
    module = build(family, layers=2)
    if seed:  # other weights of the same kind
        with torch.no_grad():
            module.get_input_embeddings().weight.mul_(1.5)
    return pl.load(module, tokenizer=tokenizer(module))


def monitor(model: pl.Model, **how: Any) -> sf.Monitor:
    width = model.anatomy.stacks[-1].d_model
    made = sf.Monitor(sf.Direction(SITE, torch.ones(width)), threshold=0.0, **how)
    return made.tie(model)


def vector(model: pl.Model) -> sf.Vector:
    return sf.Vector(SITE, torch.ones(model.anatomy.stacks[-1].d_model), digest=model.digest)


def saved(tmp_path: Path) -> dict[str, Path]:
    model = opened("llama")
    sf.Contrast(sites=SITE).fit(model, TRUE, FALSE).save(tmp_path / "c.safetensors")
    monitor(model).save(tmp_path / "m.safetensors")
    sf.export_gguf(model, [vector(model)], tmp_path / "v.gguf")
    return {"contrast": tmp_path / "c.safetensors", "monitor": tmp_path / "m.safetensors", "gguf": tmp_path / "v.gguf"}


Asked = Callable[[], Any]


def refused(asked: Asked, said: str) -> None:
    """One error of ours, one paragraph, that says what is wrong."""
    with pl.quiet(), pytest.raises(PellucidError, match=said) as caught:
        asked()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) > 30


def few(k: int) -> tuple[list[str], list[bool]]:
    return [*TRUE[:k], *FALSE[:k]], [True] * k + [False] * k


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: sf.ConceptReader().fit(m, sf.Statements.paired(TRUE[:3], FALSE[:3])), "at least 4 of either kind"),
        (lambda m: sf.Contrast(sites=SITE).fit(m, TRUE[:3], FALSE[:3]), "at least 4 of either kind"),
        (lambda m: sf.fit_monitor(m, *few(3), site=SITE, reads="prompt"), "expected 4 of each"),
        (lambda m: sf.audit(m, *few(3), split=2), "4 of either"),
        (lambda m: sf.ConfidenceProbe(folds=2).fit(m, *few(3)), "expected 4 of each"),
        (lambda m: sf.honesty(m, [("he", " is", " in")], vector(m)), "at least 4"),
        (lambda m: sf.LearntEdit(SITE).fit(m, TRUE[:3], [[9]] * 3), "at least 8"),
        (lambda m: sf.trace_failure(m, TRUE[:3], FALSE[:3], [" a"] * 3, [" in"] * 3), "at least 8 pairs"),
        (lambda m: sf.strengths(m, vector(m), TRUE[:3], len), "at least two on either side"),
    ],
)  # fmt: skip
def test_too_few_examples_of_a_kind(asked: Callable[[pl.Model], Any], said: str) -> None:
    refused(lambda: asked(opened("llama")), said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: sf.Statements(TRUE, [True] * 16), "needs both kinds"),
        (lambda m: sf.fit_monitor(m, TRUE, [True] * 16, site=SITE, reads="prompt"), "expected 4 of each"),
        (lambda m: sf.audit(m, TRUE, [False] * 16), "both kinds"),
        (lambda m: sf.ConfidenceProbe().fit(m, TRUE, [True] * 16), "expected 4 of each"),
        (lambda m: sf.abstain(m, TRUE, m.run(TRUE[:1]).logits[0, -1].argmin().repeat(16).tolist()), "nothing to tell apart"),
    ],
)  # fmt: skip
def test_one_kind_only(asked: Callable[[pl.Model], Any], said: str) -> None:
    refused(lambda: asked(opened("llama")), said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: sf.ConceptReader(folds=3).fit(m, sf.Statements.paired(TRUE, FALSE, TOPICS), test=sf.Statements.paired(TRUE[:4], FALSE[:4])), "training part"),
        (lambda m: sf.Statements.paired([*TRUE, TRUE[0]], [*FALSE, "he is"], [*TOPICS, "other"]), "stands here twice"),
        (lambda m: sf.Contrast(sites=SITE).fit(m, TRUE, [*FALSE[:15], TRUE[0]]), "stand on both sides"),
        (lambda m: sf.fit_monitor(m, [*ALL, TRUE[0]], [*HALF, False], site=SITE, reads="prompt"), "labelled both ways"),
        (lambda m: sf.audit(m, [*ALL, TRUE[0]], [*HALF, False]), "stands here twice"),
        (lambda m: sf.ConfidenceProbe(draws=0, folds=2).fit(m, ALL, HALF).confidence(m, TRUE[:2]), "fitted on"),
    ],
)  # fmt: skip
def test_the_same_statement_on_both_sides(asked: Callable[[pl.Model], Any], said: str) -> None:
    refused(lambda: asked(opened("llama")), said)


def test_what_belongs_to_other_weights(tmp_path: Path) -> None:
    own, files = opened("llama"), saved(tmp_path)
    reader = sf.ConceptReader(sites=SITE, controls=(), folds=3).fit(own, sf.Statements.paired(TRUE, FALSE, TOPICS))
    probe = sf.ConfidenceProbe(draws=0, folds=2).fit(own, ALL, HALF)
    for other in (opened("llama", 1), opened("gpt2")):
        ways: list[Asked] = [
            lambda: other.generate("he", max_new_tokens=1, monitors=monitor(own)),
            lambda: sf.load_monitor(other, files["monitor"]),
            lambda: sf.calibrate(other, monitor(own), TRUE, alarms=0.2),
            lambda: other.run("he", edits=[vector(own).edit(0.3)]),
            lambda: other.generate("he", edits=[vector(own).edit(0.3)], max_new_tokens=1),
            lambda: sf.ablate_direction(other, vector(own)), lambda: sf.in_weights(other, vector(own)),
            lambda: sf.import_vectors(other, files["gguf"]), lambda: sf.import_vectors(other, files["contrast"]),
            lambda: sf.Contrast.load(files["contrast"]).check(other), lambda: sf.export_gguf(other, [vector(own)], tmp_path / "x.gguf"),
            lambda: sf.strengths(other, vector(own), TRUE[:8], len, draws=1),
            lambda: reader.scores(other, TRUE[:2]), lambda: sf.honesty(other, [(t, " a", " in") for t in TRUE[:5]], reader),
            lambda: probe.confidence(other, ["he"]), lambda: sf.confidence(other, ["he"], probe),
        ]  # fmt: skip
        for i, way in enumerate(ways):
            with pl.quiet(), pytest.raises(InputError, match="other weights"):
                way()
                pytest.fail(f"way {i} was taken")
    assert sf.load_monitor(own, files["monitor"]).digest == own.digest


def test_a_rate_that_so_few_conversations_cannot_support() -> None:
    model = opened("llama")
    ready = replace(monitor(model), reads="prompt", threshold=None)
    refused(lambda: sf.calibrate(model, ready, TRUE, alarms=0.01), "takes 99 at least")
    refused(lambda: sf.calibrate(model, ready, TRUE, alarms=0.01, promise="confidence"), "takes 299 at least")
    refused(lambda: sf.threshold(np.arange(98), 0.01), "99")
    refused(lambda: sf.calibrate(model, ready, TRUE, alarms=0.2, groups=["a"] * 16), "takes 4 at least")


@pytest.mark.parametrize(
    "asked",
    [
        lambda m: m.generate(CHATS, max_new_tokens=1, monitors=monitor(m)),
        lambda m: sf.Contrast(sites=SITE).fit(m, CHATS, [[{"role": "user", "content": t}] for t in FALSE]),
        lambda m: sf.fit_monitor(m, CHATS, [True, False] * 8, site=SITE, reads="prompt"),
        lambda m: sf.evaluate(m, monitor(m, reads="prompt"), CHATS, [True, False] * 8, shifts="upper case"),
        lambda m: sf.honesty(m, [(t, " a", " in") for t in TRUE[:5]], vector(m), chat=True),
        lambda m: sf.audit(m, CHATS, [True, False] * 8, split=2),
        lambda m: sf.confidence(m, CHATS),
        lambda m: sf.semantic_entropy(m, CHATS[:1], draws=2),
    ],
)  # fmt: skip
def test_chats_to_a_model_without_a_template(asked: Callable[[pl.Model], Any]) -> None:
    refused(lambda: asked(opened("llama")), "no chat template")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: m.generate("he", max_new_tokens=1, monitors=monitor(m)), "does not generate"),
        (lambda m: sf.conversation_scores(m, monitor(m), TRUE[:2]), "does not generate"),
        (lambda m: sf.conversation_scores(m, monitor(m), TRUE[:2], replies=["a", "he"]), "writes no answer"),
        (lambda m: sf.semantic_entropy(m, TRUE[:2], draws=2), "does not generate"),
        (lambda m: sf.strengths(m, vector(m), TRUE[:8], len, draws=1), "does not generate"),
        (lambda m: sf.audit(m, TRUE, [True, False] * 8), "writes no answer"),
        (lambda m: sf.honesty(m, [(t, " a", " in") for t in TRUE[:5]], vector(m)), "does not continue"),
        (lambda m: sf.LearntEdit(SITE).fit(m, TRUE, [[9]] * 16), "does not continue"),
        (lambda m: sf.trace_failure(m, TRUE, FALSE, [" a"] * 16, [" in"] * 16), "does not predict the next token"),
        (lambda m: sf.export_gguf(m, [vector(m)], "x.gguf"), "no output of a decoder"),
    ],
)  # fmt: skip
def test_an_encoder_where_generation_is_asked(asked: Callable[[pl.Model], Any], said: str) -> None:
    refused(lambda: asked(opened("bert")), said)
