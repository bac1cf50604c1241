"""Explanations and their evaluation on workers: the numbers that are found here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import pellucid as pl
from pellucid.attribution.evaluation.compare import compare
from tests.models import minilm_path
from tests.workers.lanes import pool


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> pl.Model:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pl.load(folder)


TEXTS: list[Any] = ["a fine film", {"text": "dull and far too long", "target": 1}, "the king sings"]


def test_methods_are_compared_on_workers_as_here(classifier: pl.Model, tmp_path: Path) -> None:
    def compared(on: Any, **options: Any) -> Any:
        with pl.on(on):
            return compare(classifier, TEXTS, metrics=["comprehensiveness"], seed=1, **options)

    names = ["gradient_x_input", "occlusion"]
    here, two = compared(None, methods=names), pool()
    there = compared(two, methods=names, checkpoint=tmp_path / "rows.jsonl")
    assert sum(r["do"] == "run" for lane in two.lanes for r in lane.asked) == len(TEXTS)  # type: ignore[attr-defined]
    for name in here.data.data_vars:
        assert np.array_equal(here.data[name].values, there.data[name].values, equal_nan=True), name
    assert compared(two, methods=names, checkpoint=tmp_path / "rows.jsonl").data.identical(there.data)
    assert sum(r["do"] == "run" for lane in two.lanes for r in lane.asked) == len(TEXTS)  # type: ignore[attr-defined]
    own = {
        "own": lambda *given, **options: pl.attribution.occlusion(*given, **options)
    }  # stays here, and its sweeps travel
    there = compared(two, methods=own)
    np.testing.assert_allclose(there.value.sel(technique="own"), here.value.sel(technique="occlusion"), atol=1e-5)


def test_perturbations_are_run_on_workers(classifier: pl.Model) -> None:
    here, two = pl.attribution.occlusion(classifier, "a fine film", 1), pool()
    with pl.on(two):
        there = pl.attribution.occlusion(classifier, "a fine film", 1)
    assert any(r["do"] == "run" for lane in two.lanes for r in lane.asked)  # type: ignore[attr-defined]
    np.testing.assert_allclose(there.attribution, here.attribution, atol=1e-6)


def test_knowledge_is_attributed_on_workers_as_here(model: pl.Model) -> None:
    prompts = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(3)).tolist()
    found = []
    for on in (None, pool()):
        with pl.on(on):
            found.append(pl.neurons.knowledge_attribution(model, prompts, [5, 7], steps=4).data)
    assert found[0].equals(found[1])
    assert float(abs(found[0].attribution).max()) > 0
