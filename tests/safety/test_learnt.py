"""A learnt low-rank edit is LoReFT's formula, learns what only an edit can know, and is judged beside drawn answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.safety import LearntEdit
from pellucid.safety.learnt import LowRank
from tests.safety.test_steering import opened

PROMPTS = [[i, 7 + i, 20 + i % 3, 9] for i in range(10, 26)]
ANSWERS = [[40 + i % 2, 50 + i % 2] for i in range(16)]


def test_the_edit_is_its_formula_and_leaves_its_complement_alone() -> None:
    model, site = opened("gpt2"), "layers.1.resid_post"
    d = model.anatomy.stacks[0].d_model
    r = torch.linalg.qr(torch.randn(d, 2, generator=torch.Generator().manual_seed(0)))[0].T
    w, b = torch.randn(2, d, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, -1.0])
    old, new = (model.run([PROMPTS[0]], keep=[site], edits=e).tensor(site)[0] for e in ([], [LowRank(site, r, w, b)]))
    expected = torch.stack([h + r.T @ (w @ h + b - r @ h) for h in old])
    assert torch.allclose(new, expected, atol=1e-5) and torch.allclose(new @ r.T, old @ w.T + b, atol=1e-4)
    rest = torch.eye(d) - r.T @ r
    assert torch.allclose(new @ rest, old @ rest, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2"])
def test_it_learns_answers_and_says_what_it_did(family: str, tmp_path: Any) -> None:
    model = opened(family)
    before = model.digest
    made = LearntEdit("layers.1.resid_post", rank=2, epochs=20, batch=12, learning_rate=0.1).fit(
        model, PROMPTS, ANSWERS
    )
    loss = made.result_["loss"]
    assert float(loss.sel(arm="learnt")) < float(loss.sel(arm="plain")) - 0.5 and model.digest == before
    r = made.edit_.rotation
    assert torch.allclose(r @ r.T, torch.eye(2), atol=1e-5)
    again = LearntEdit.load(made.save(tmp_path / "e.safetensors"))
    again.check(model)
    with pl.quiet():
        a, b = (model.generate([PROMPTS[0]], edits=[m.edit_], max_new_tokens=2).ids() for m in (made, again))
    assert a == b and a[0] in (40, 41)
    with pytest.raises(InputError, match="other weights"):
        again.check(opened("mixtral"))
    with pytest.raises(InputError, match="other weights"):
        opened("mixtral").run([[1, 2]], edits=[again.edit_])


def test_what_it_cannot_learn_from_is_refused() -> None:
    model = opened("llama")
    for call, said in (
        (lambda: LearntEdit("layers.1.resid_post").fit(model, PROMPTS[:5], ANSWERS[:5]), "at least 8"),
        (lambda: LearntEdit("layers.*.resid_post").fit(model, PROMPTS, ANSWERS), "one site"),
        (lambda: LearntEdit("layers.1.resid_post").fit(model, PROMPTS, [[]] * 16), "is empty"),
        (lambda: LearntEdit("layers.1.resid_post", rank=999).fit(model, PROMPTS, ANSWERS), "rank=999"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(Refused, match="does not continue"):
        LearntEdit("decoder.layers.1.resid_post").fit(opened("t5"), PROMPTS, ANSWERS)
