"""Reasons of generating models: the verdict on models that are known to use them or not, and every kind of model."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError, Refused
from tests.tuning.test_fit import QUICK, opened
from tests.zoo import build, tokenizer

ASKED = tu.Explained(
    ["he is in Rome", "Mary is in Paris", "he is in the city of Paris", "Mary gave Rome"], [" Italy", " France", " France", " Italy"],
    [" Rome is in Italy", " Paris is in France", " Paris is in France", " Rome is in Italy"], choices=[" Italy", " France", " Paris is", " Paris"],
    paraphrases=[" Italy has Rome", " France has Paris"] * 2,
)  # fmt: skip
module = importlib.import_module("pellucid.tuning.tested")


@pytest.mark.parametrize("family", ["gpt2", "lora", "t5"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_decoders_and_encoder_decoders_are_tested(family: str, order: Any) -> None:
    found = tu.reason_tests(opened(family), ASKED, order=order, reader=opened("gpt2"), max_new_tokens=4)
    data = found.data
    assert {"own", "mistake", "hint"} <= set(data["test"].values.tolist())
    assert (data["right_low"] <= data["right"]).all() and (data["right"] <= data["right_high"]).all()
    assert int(data["count"].sel(beside="reader, prompt")) == 4
    if order == "after":
        assert found.data.attrs["verdict"] == "not used" and float(data["changed"].sel(test="mistake")) == 0
    else:
        assert {
            "true",
            "truncated to 2 of 4",
            "empty",
            "filler",
            "paraphrase",
            "another's",
            "without the prompt",
        } <= set(data["test"].values.tolist())
        assert float(data["changed"].sel(test="own")) == 0
        names: dict[str, Any] = {"module": opened(family).module, "tokenizer": opened(family).tokenizer}
        assert "reason_tests" in found.provenance.code() and names
    assert pl.results.Result.load(found.save("/tmp/pellucid-reasons.zip")) == found


def test_an_answer_is_the_likeliest_choice() -> None:
    model = opened("gpt2")
    asking = module._Asking(model, ASKED, 4)
    texts = [ASKED.asked(i, ASKED.reasons[i]) for i in range(4)]
    said, odds = asking.answers(texts, [" Italy"] * 4)
    for text, answer, own in zip(texts, said, odds, strict=True):
        z = model.run(text).logits[0, -1].double()
        ids = [model.tokenizer(c, add_special_tokens=False)["input_ids"] for c in ASKED.choices or ()]
        first = {i[0] for i in ids}
        best = max(first, key=lambda k: float(z[k]))
        assert ids[list(ASKED.choices or ()).index(answer)][0] == best
        rest = torch.stack([z[k] for k in first if k != ids[0][0]])
        assert own == pytest.approx(float(z[ids[0][0]] - rest.logsumexp(0)), abs=1e-4)
    # of choices that begin alike, the likeliest as a whole
    log_p = {c: float(sum(model.run(texts[0] + c).logits[0, len(model.tokenizer(texts[0])["input_ids"]) - 1 + k].log_softmax(-1)[i]
                          for k, i in enumerate(model.tokenizer(c, add_special_tokens=False)["input_ids"]))) for c in (" Paris is", " Paris in")}  # fmt: skip
    assert asking._likeliest(texts[0], list(log_p)) == max(log_p, key=lambda c: log_p[c])


def speaking(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    """A model that answers by the reason it is given, or by the prompt alone; its own reasons are true."""

    class Fake:
        def __init__(self, model: Any, data: Any, tokens: int) -> None:
            self.data = data

        def reasons(self, prompts: Any, answers: Any) -> list[str]:
            return list(self.data.reasons)

        def answers(self, texts: Any, of: Any = None) -> Any:
            said = []
            for i, text in enumerate(texts):
                told = next((c for c in (" Italy", " France") if listens and c in text.rsplit("Reason:", 1)[-1]), None)
                said.append(told or self.data.answers[i])
            return said, np.zeros(len(texts))

    monkeypatch.setattr(module, "_Asking", Fake)


@pytest.mark.parametrize("listens", [True, False])
def test_the_verdict_is_that_of_models_known_to_use_their_reasons_or_not(
    monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    speaking(monkeypatch, listens)
    many = tu.Explained(*(list(x) * 5 for x in (ASKED.prompts, ASKED.answers, ASKED.reasons)), choices=ASKED.choices)  # type: ignore[misc]
    found = tu.reason_tests(opened("gpt2"), many)
    assert found.data.attrs["verdict"] == ("used" if listens else "not used")
    assert float(found.data["follows"].sel(test="mistake")) == float(listens)
    assert float(found.data["right"].sel(test="filler")) == 1.0
    if not listens:
        assert found.title.startswith("The reason is not used: put a mistake in and 0.00 [0.00, 0.17]")


def test_rows_to_learn_from() -> None:
    before, after, alone = (ASKED.rows(order) for order in ("before", "after", "alone"))  # type: ignore[arg-type]
    assert before.labels is not None and after.labels is not None and alone.labels is not None
    assert (
        before.labels[0] == "\nReason: Rome is in Italy\nAnswer: Italy"
        and after.labels[0] == "\nAnswer: Italy\nReason: Rome is in Italy"
    )
    assert alone.labels[0] == "\nAnswer: Italy"
    told = ASKED.rows("before", counterfactual=0.6, seed=1)
    false = [(t, y) for t, y in zip(told.texts, told.labels or (), strict=True) if t.endswith("Answer:")]
    assert len(told) == 8 and 0 < len(false) < 8
    for text, label in false:
        assert str(label) in text.rsplit("Reason:", 1)[1]  # the answer follows from the false reason
    apart = ASKED.rows("before", apart=True)
    assert apart.texts[:2] == ["he is in Rome\nReason:", "he is in Rome\nReason: Rome is in Italy\nAnswer:"]
    for family, rows in {"gpt2": told, "t5": apart}.items():
        tu.fit(opened(family), rows, (), control=False, **QUICK)


def test_bad_input_of_reasons() -> None:
    for match, call in {
        "3 answers": lambda: dataclasses.replace(ASKED, answers=[" Italy"] * 3),
        "none of the choices": lambda: dataclasses.replace(ASKED, choices=[" Spain"]),
        "all answers are alike": lambda: tu.Explained(["a", "b"], ["c", "c"], ["d", "e"]),
        "order='between'": lambda: ASKED.rows("between"),  # type: ignore[arg-type]
        "of order='before' alone": lambda: ASKED.rows("after", counterfactual=0.5),
        "expected 'before' or 'after'": lambda: tu.reason_tests(opened("gpt2"), ASKED, order="alone"),
        "in the place of the wrong answer": lambda: tu.reason_tests(opened("gpt2"), ASKED, hint="psst"),
        "one for each prompt": lambda: tu.reason_tests(opened("gpt2"), ASKED, reasons=["a"]),
        "without a tokenizer": lambda: tu.reason_tests(pl.load(build("gpt2")), ASKED),
    }.items():
        with pytest.raises(InputError, match=match):
            call()
    for family in ("bert", "bert-class"):
        with pytest.raises(Refused, match="writes no text, so it has no reasons"):
            tu.reason_tests(opened(family), ASKED)


def test_in_bfloat16_without_choices_and_with_shots() -> None:
    half = pl.load(build("llama", dtype=torch.bfloat16), tokenizer=tokenizer(None))
    found = tu.reason_tests(half, dataclasses.replace(ASKED, choices=None), shots=ASKED, max_new_tokens=3)
    assert found.data.sizes["prompt"] == 4 and "The reason is" in found.title
