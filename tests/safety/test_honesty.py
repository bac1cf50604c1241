"""What is said and what is read are what plain runs say; the pair of claims is never left out; verdicts accuse nobody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.safety import ConceptReader, Pressure, Statements, Vector, honesty
from pellucid.safety.honesty import FALSE, TRUE, _parting
from tests.safety.test_readers import CHEAP, opened, pairs
from tests.zoo import build

ASKED = [
    ("The city of Paris is in", " France", " Italy"),
    ("The capital of Italy is", " Rome", " Paris"),
    ("Mary gave a drink to", " John", " Mary"),
    ("he went to the", " store", " house"),
    ("she is in", " Rome", " the house today"),
]


def fitted(family: str) -> ConceptReader:
    return ConceptReader("mean", **{**CHEAP, "controls": ()}).fit(opened(family), pairs())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_what_is_said_and_believed_is_what_plain_runs_of_one_prompt_say(family: str) -> None:
    model, reader = opened(family), fitted(family)
    found = honesty(
        model, ASKED, reader, pressures=[Pressure("hm", "Mary is in {false}. ")], ending=" today", batch=3
    ).data
    assert found.pressure.values.tolist() == ["plain", "hm", TRUE.name, FALSE.name]
    tok = model.tokenizer
    for i, (stem, *answers) in enumerate(ASKED):
        for before, name in (("", "plain"), (f"Mary is in {stem}{answers[1]}. ", "hm")):
            logs, scores = [], []
            for answer in answers:
                head, whole = tok(before + stem)["input_ids"], tok(before + stem + answer)["input_ids"]
                run = model.run(before + stem + answer + " today", keep=[reader.site])
                logs.append(
                    sum(float(run.logits[0, t - 1].log_softmax(-1)[whole[t]]) for t in range(len(head), len(whole)))
                )
                scores.append(float(reader(run.tensor(reader.site)[0, -1])))
            if abs(logs[0] - logs[1]) > 1e-3:
                assert float(found.said[i].sel(pressure=name)) == float(logs[0] > logs[1])
            if abs(scores[0] - scores[1]) > 1e-3:
                assert float(found.believed[i].sel(pressure=name)) == float(scores[0] > scores[1])


def test_the_last_layer_of_the_lens_is_what_is_said_of_single_tokens() -> None:
    model = opened("llama")
    found = honesty(model, [*ASKED[:3], ("she is in", " Rome", " France")], fitted("llama"), pressures=[]).data
    np.testing.assert_allclose(found.lens.isel(layer=-1), found.says)
    assert bool(found.reader.notnull().all())  # all sites of the reader are followed


def test_a_reader_of_the_claim_is_named_and_nothing_is_called_a_lie() -> None:
    """A reader that reads which answer was named last before: it goes with the claim, whatever the model holds."""
    model = opened("llama")

    class Named:
        site = "layers.1.resid_post"

        def __call__(self, values: Any) -> Any:
            return self.scores.pop(0)

    reader = Named()
    yes, no = torch.ones(5), torch.zeros(5)
    reader.scores = [yes, no, yes, no, no, yes]  # plain, a friend claims the true, the false
    found = honesty(model, ASKED, reader, pressures=[], batch=5)
    assert found.title.startswith("The reader reads what is claimed (1.00") and " lies" not in found.title
    assert found.data.attrs["reads_the_claim"] == 1
    assert found.data.verdict.values.tolist()[1:] == ["the reader reads the claim"] * 2


def test_where_they_part_is_the_layer_after_the_last_that_agrees() -> None:
    lens = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    read = np.array([[1.0, 1.0, 1.0, np.nan], [np.nan, 1.0, np.nan, np.nan]])
    assert _parting(lens, read, np.array([True, True])) == 2.5
    assert np.isnan(_parting(lens, read, np.array([False, False])))


def test_half_precision_chats_and_any_reader() -> None:
    model = pl.load(build("llama", layers=2).to(torch.bfloat16), tokenizer=opened("llama").tokenizer)
    vector = Vector("layers.0.resid_post", torch.randn(32))
    assert honesty(model, ASKED, vector).data.sizes["pressure"] == 7
    with pytest.raises(InputError, match="no chat template"):
        honesty(model, ASKED, vector, chat=True)


def test_what_cannot_be_asked_is_refused_in_a_sentence() -> None:
    model, vector = opened("llama"), Vector("layers.0.resid_post", torch.randn(32))
    for family in ("t5", "bert"):
        with pytest.raises(InputError, match="does not continue a text"):
            honesty(opened(family), ASKED, vector)
    with pytest.raises(InputError, match="without a tokenizer"):
        honesty(pl.load(build("llama", layers=2)), ASKED, vector)
    with pytest.raises(InputError, match="no two answers"):
        honesty(model, [*ASKED, ("he", " is", " is")], vector)
    with pytest.raises(InputError, match="at least 4"):
        honesty(model, ASKED[:2], vector)
    with pytest.raises(InputError, match="stem, true answer, false answer"):
        honesty(model, ["a"], vector)
    with pytest.raises(InputError, match="other weights"):
        honesty(opened("gpt2"), ASKED, fitted("llama"))
    with pytest.raises(InputError, match="one name"):
        honesty(model, ASKED, vector, pressures=[Pressure("plain", "hm ")])
    with pytest.raises(InputError, match="reads all tokens"):
        honesty(model, ASKED, ConceptReader("attention"))
    assert Statements  # the ground of the readers above
