"""Select, then predict: the predictor sees what was selected and nothing else, and the masks are what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.tuning.data import Encoded
from pellucid.tuning.masks import budget, counts, f1, gates, largest, present
from tests.tuning.test_fit import KINDS, QUICK, data, equal, opened, weights
from tests.zoo import build, tokenizer

MASKS = {"bert-class": "top_k", "deberta-class": "hard_kuma", "gpt2": "sparsemax", "lora": "entmax15", "t5": "top_k"}


def texts(family: str) -> tu.Rationales:
    return data("text" if family == "gpt2" else KINDS[family])


@pytest.mark.parametrize("family", KINDS)
def test_other_words_in_the_places_left_out_change_no_bit(family: str, tmp_path: Path) -> None:
    model, given = opened(family), texts(family)
    before = weights(model)
    asked = tu.Select(mask=MASKS[family], warm=1, share=0.4, teach="rationale")  # type: ignore[arg-type]
    made = tu.fit(model, given, asked, control=family == "bert-class", **QUICK)
    assert equal(before, weights(model)) and not made.changed
    learnt: Any = made.objectives["objective"][0]
    assert not torch.equal(
        learnt.parameters["head.score"], asked.begun(model, Encoded(model, given), 0).parameters["head.score"]
    )
    encoded = Encoded(made.model, given)
    batch = encoded.batch(range(8))
    own, free = learnt.shown_tokens(made.model, batch, encoded), learnt.candidates(made.model, batch, encoded)
    assert torch.equal(own.sum(1), counts(free, 0.4)) and not (own & ~free).any()
    swapped = batch.with_ids(torch.where(free & ~own, 7, batch.ids))
    for hide in (False, True):
        a, b = (
            made.model.run(x.inputs, edits=x.edits).logits
            for x in (learnt.with_only(made.model, g, encoded, own, hide) for g in (batch, swapped))
        )
        real = batch.read(a), batch.read(b)
        assert torch.equal(*real) and torch.isfinite(real[0]).all()
    shown, hidden, whole = (batch.read(made.model.run(x.inputs, edits=x.edits).logits) for x in
                            (learnt.with_only(made.model, batch, encoded, own), learnt.with_only(made.model, batch, encoded, own, True), batch))  # fmt: skip
    assert not torch.allclose(shown, whole) and not torch.allclose(shown, hidden)
    loaded = tu.Select.load(learnt.save(tmp_path / "selector.safetensors"))
    loaded.check(made.model)
    assert torch.equal(loaded.shown_tokens(made.model, batch, encoded), own)
    with pytest.raises(InputError, match="belongs to other weights"):
        loaded.check(model)
    run, words = learnt.run(made.model, given.texts)
    assert [len(w) for w in words] == own.sum(1).tolist() and len(run.logits) == 8
    if family in ("bert-class", "deberta-class"):
        assert torch.allclose(batch.read(run.logits), shown, atol=1e-5)
    found = made.result.data["measured"].sel(arm="objective")
    wanted = {
        "accuracy",
        "hidden",
        "full_text",
        "complement",
        "random_tokens",
        "rationale_tokens",
        "share",
        "token_f1",
        "positions_only",
    }
    assert wanted <= set(found["measure"].values.tolist()) and 0.2 <= float(found.sel(measure="share")) <= 0.5


def test_budget_is_the_nearest_point_and_its_gradient_is_right() -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for n, k in ((5, 2), (7, 1), (4, 4)):
        s = rng.normal(size=n) * 2
        m = budget(torch.from_numpy(s)[None], torch.tensor([k]))[0]
        slow = minimize(lambda x, s=s: ((x - s) ** 2).sum(), np.full(n, k / n), bounds=[(0, 1)] * n,
                        constraints={"type": "eq", "fun": lambda x, k=k: x.sum() - k}, options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
        assert np.allclose(m.numpy(), slow.x, atol=1e-5) and abs(float(m.sum()) - k) < 1e-12
    s = torch.tensor(rng.normal(size=(3, 6)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: budget(x, torch.tensor([2, 3, 1])), s)
    assert torch.allclose(budget(s, torch.tensor([1, 1, 1])), tu.sparsemax(s), atol=1e-12)


def test_a_kumaraswamy_gate_is_off_as_often_as_it_says() -> None:
    scores = torch.tensor([[[0.5, -1.0], [-1.0, 0.3], [0.0, 0.0]]])
    a, b = gates(scores)
    u = torch.rand(200_000, 1, 3, generator=torch.Generator().manual_seed(0))
    x = (1 - (1 - u) ** (1 / b)) ** (1 / a)
    seen = ((-0.1 + 1.2 * x) > 0).float().mean(0)
    assert torch.allclose(seen, present(scores), atol=5e-3)
    assert torch.allclose(torch.stack(gates(torch.zeros(1, 2))), torch.ones(2, 1), atol=1e-4)


def test_counting_tokens() -> None:
    free = torch.tensor([[True, True, True, True, False], [True, False, False, False, False], [False] * 5])
    assert counts(free, 0.5).tolist() == [2, 1, 0]
    picked = largest(torch.tensor([[1.0, 2, 2, 2, 9]] * 3), free, 0.5)
    assert picked.tolist() == [[False, True, True, False, False], [True, False, False, False, False], [False] * 5]
    assert f1(picked, free).tolist() == pytest.approx([2 * 2 / 6, 1.0, 0.0])


def test_the_places_tell_what_was_written_into_them() -> None:
    """A selector that shows the first words of one class and the last of the other writes the label."""

    class Code(tu.Select):
        def shown_tokens(self, model: Any, batch: Any, data: Any) -> Any:
            free = self.candidates(model, batch, data)
            order = torch.arange(free.shape[1]).float().expand(free.shape)
            sign = torch.tensor([1.0 if data.labels[i] else -1.0 for i in batch.rows])[:, None]
            return largest(order * sign, free, self.share)

    model = opened("bert-class")
    encoded = Encoded(model, data())
    found = Code(warm=0).begun(model, encoded, 0).numbers(model, encoded, encoded, 0)
    assert found["positions_only"] == 1.0 and found["chance"] == 0.5
    import xarray as xr

    frame = xr.Dataset(
        {"measured": (("arm", "measure"), [list({**found, "full_text": 0.9}.values())])},
        {"arm": ["objective"], "measure": list(found)},
    )
    assert any("may be a code" in s for s in tu.Select().said(frame, 400))


def test_bad_input_of_selectors() -> None:
    model = opened("bert-class")
    for wrong in ({"mask": "soft"}, {"share": 1.0}, {"blocks": 0}, {"warm": -1}):
        with pytest.raises(InputError):
            tu.Select(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 2"):
        tu.fit(model, data(), tu.Select(blocks=9), **QUICK)
    with pytest.raises(InputError, match="none of that name"):
        tu.fit(model, data(), tu.Select(teach="people"), **QUICK)
    with pytest.raises(InputError, match="two tokens to select from"):
        tu.fit(model, tu.Rationales(["he", "Mary"], [0, 1]), tu.Select(), **QUICK)
    with pytest.raises(InputError, match="was not fitted"):
        tu.Select().check(model)


def test_bfloat16_and_plain_training_at_weight_zero() -> None:
    half = pl.load(build("gpt2", dtype=torch.bfloat16), tokenizer=tokenizer(None))
    made = tu.fit(half, texts("gpt2"), tu.Select(warm=1), control=False, **QUICK)
    assert np.isfinite(made.result.data["measured"].sel(arm="objective", measure="accuracy"))
    made = tu.fit(opened("bert-class"), data(), 0.0 * tu.Select(warm=1), control=False, **QUICK)
    assert equal(weights(made.arms["plain"]), weights(made.arms["objective"]))
