"""What the views are about: an answer named as the kind of head names it. Each number is that of the same question asked without the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from starlette.testclient import TestClient

import pellucid as pl
from pellucid.workbench.app import create
from pellucid.workbench.guard import Door
from pellucid.workbench.hub import Hub
from tests.zoo import build, tokenizer

from .conftest import TOKEN, view

PROMPT = "The city of Paris is in France"
LABELS = {0: "O", 1: "B-LOC", 2: "I-LOC"}


@cache
def model(kind: str) -> pl.Model:
    if kind in ("llama", "MaskedLM"):
        module: Any = build("llama" if kind == "llama" else "bert")
    else:
        torch.manual_seed(0)
        names = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}} if "Classification" in kind else {}
        config = transformers.BertConfig(**build("bert").config.to_dict() | names)
        module = getattr(transformers, f"Bert{kind}")(config).eval()
    return pl.load(module, tokenizer=tokenizer(build("llama" if kind == "llama" else "bert")))


def opened(kind: str, tmp_path: Path) -> tuple[TestClient, Hub]:
    hub = Hub([model(kind)])
    headers = {"X-Pellucid-Token": TOKEN, "Origin": "http://localhost:8000"}
    app = create(hub, Door(TOKEN, 8000), tmp_path / "workspaces")
    return TestClient(app, base_url="http://localhost:8000", headers=headers, raise_server_exceptions=False), hub


A = pl.attribution
ASKED: dict[str, tuple[dict[str, Any], tuple[str, int], Callable[[], Any]]] = {  # what is typed, (kind, names), the same in Python
    "llama": ({"answer": " John"}, ("word", 0), lambda: " John"),
    "ForSequenceClassification": ({"answer": "O"}, ("class", 3), lambda: "O"),
    "ForTokenClassification": ({"answer": "B-LOC", "word": "Paris"}, ("label", 3), lambda: A.label("B-LOC", word="Paris")),
    "ForQuestionAnswering": ({"answer": "Paris is"}, ("span", 0), lambda: "Paris is"),
    "Model": ({"answer": "Rome is in Italy"}, ("text", 0), lambda: A.similarity("Rome is in Italy")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASKED)
def test_the_views_are_about_the_answer_that_was_named(kind: str, tmp_path: Path) -> None:
    typed, (named, names), target = ASKED[kind]
    page, hub = opened(kind, tmp_path)
    try:
        card = page.get("/api/models").json()["models"][0]["answers"]
        assert (card["kind"], len(card["names"])) == (named, names)
        asked = view("tokens", prompt=PROMPT, options={"method": "gradient_x_input"}, **typed)
        shown = page.post("/api/view", json=asked).json()
        assert "document" in shown, shown
        found = shown["document"]["data"]
        plain = page.post("/api/view", json=asked | {"answer": ""}).json()["document"]["data"]
        assert found != plain  # the model's own answer is another one
        state = {"version": 1, "panes": [{"pane": "a", "model": card and page.get("/api/models").json()["models"][0]["name"], "prompt": PROMPT, "views": ["tokens", "contributions"], **typed}]}  # fmt: skip
        cells = page.post("/api/export/notebook", json={"state": state, "documents": []}).json()["cells"]
    finally:
        hub.close()
    (packed,) = [
        each["values"]
        for each in next(v for v in found.values() if isinstance(v, list) and v and isinstance(v[0], dict))
    ]
    exact = A.gradient_x_input(model(kind), PROMPT, target())
    # a rival is spoken of where there is one, and the answer is named where it is asked about alone
    lead = shown["document"].get("lead", "")
    assert ("rather than" in lead) == (kind in ("llama", "ForTokenClassification"))
    assert kind == "Model" or typed["answer"].strip() in lead
    if kind not in ("llama", "ForTokenClassification"):  # there against the runner-up
        drawn = np.frombuffer(base64.b64decode(packed["base64"]), np.float32)
        np.testing.assert_allclose(drawn, exact.values, rtol=1e-4, atol=1e-6)
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "metric = " in code and ("contributions" in code or "direct_logit" in code) == (
        kind in ("llama", "ForTokenClassification")
    )


def test_a_word_is_asked_for_where_every_word_is_labelled(tmp_path: Path) -> None:
    page, hub = opened("ForTokenClassification", tmp_path)
    try:
        said = [page.post("/api/view", json=view("tokens", prompt=PROMPT, **typed)) for typed in ({}, {"word": "Berlin"}, {"word": "Paris", "answer": "LOC"})]  # fmt: skip
    finally:
        hub.close()
    for each, words in zip(said, ("name the word whose label", "Berlin", "LOC"), strict=True):
        assert each.status_code == 422 and words in each.text, each.text
