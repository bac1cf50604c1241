"""Decoder lens, patchscopes, future lens, head lens and causal basis equal their obvious slow versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid
from pellucid.engine.edits import Patch
from pellucid.errors import InputError, Refused
from pellucid.lenses import (
    FutureLens,
    TunedLens,
    causal_basis,
    decoder_lens,
    direct_logit_attribution,
    head_lens,
    logit_lens,
    patchscope,
    unembed,
)
from pellucid.lenses.future_lens import Moments
from tests.lenses.test_tuned_lens import HELD_OUT, PROMPT, SMALL, TEXTS, opened
from tests.zoo import build, tokenizer

# ---- decoder lens


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_the_decoder_reads_each_encoder_layer_in_the_last_ones_place(family):
    """The slow version hands the decoder the normed layer as `encoder_outputs`."""
    model = opened(family)
    found = decoder_lens(model, PROMPT, target="Paris is", max_new_tokens=3)
    encoder, ids = model.module.get_encoder(), model.tokenizer("Paris is", add_special_tokens=False)["input_ids"]
    norm = {"t5": getattr(encoder, "final_layer_norm", None)}.get(family) or (lambda x: x)
    inputs = model.inputs(PROMPT)
    forced = torch.cat([inputs.stream("").ids, torch.tensor([ids])], 1)
    run = model.run(PROMPT, keep=[str(s) for s in found.data.site.values])
    for row, site in enumerate(found.data.site.values):
        made = (
            model.module(
                encoder_outputs=(norm(run.tensor(str(site))),),
                attention_mask=inputs.tensors["attention_mask"],
                decoder_input_ids=forced,
            )
            .logits[0]
            .log_softmax(-1)
        )
        slow = float(made[torch.arange(len(ids)), torch.tensor(ids)].sum().detach())
        assert float(found.data.log_probability[row]) == pytest.approx(slow, abs=1e-4)
    assert float(found.data.kl[-1]) == pytest.approx(0, abs=1e-5)
    assert str(found.data.text.values[-1]) == model.generate(PROMPT, max_new_tokens=3).text


def test_other_models_have_no_decoder_lens():
    with pytest.raises(Refused, match="no encoder and decoder"):
        decoder_lens(opened("gpt2"), PROMPT)
    with pytest.raises(InputError, match="expected one text"):
        decoder_lens(opened("t5"), [PROMPT])


# ---- patchscopes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_logit_lens_is_the_patchscope_into_the_same_prompts_last_layer(family):
    model = opened(family)
    last = len(model.anatomy.stacks[-1].blocks) - 1
    scope = patchscope(model, PROMPT, -1, into=PROMPT, into_layer=last, targets=[" Paris"])
    lens = logit_lens(model, PROMPT, targets=[" Paris"], positions=-1, sites="layers.*.resid_post").data
    np.testing.assert_allclose(scope.data.probability[:-1], lens.probability[:, 0], atol=1e-5)
    np.testing.assert_allclose(
        scope.data.target_log_probability[:-1, 0], lens.target_log_probability[:, 0, 0], atol=1e-4
    )


def test_a_state_is_read_as_a_plain_patch_of_the_target_prompt_gives_it():
    model = opened("llama")
    found = patchscope(model, PROMPT, "France", layers=0, into="Paris is in a city", into_positions=2, max_new_tokens=3)
    state = model.run(PROMPT, keep=["layers.0.resid_post"]).tensor("layers.0.resid_post")[:, 3:4]
    edit = Patch("layers.0.resid_post@2", state)
    p = model.run("Paris is in a city", edits=[edit]).logits[0, -1].softmax(-1)
    np.testing.assert_allclose(found.data.probability[0], p.topk(5).values.detach(), atol=1e-6)
    assert str(found.data.text[0].values) == model.generate("Paris is in a city", edits=[edit], max_new_tokens=3).text
    assert found.data.layer.values.tolist() == [0, -2] and found.data.site.values[-1] == "none"
    plain = model.run("Paris is in a city").logits[0, -1].softmax(-1)
    np.testing.assert_allclose(found.data.probability[-1], plain.topk(5).values.detach(), atol=1e-6)


def test_another_model_reads_a_state_through_a_mapping():
    wide = build("gpt2", n_embd=48)
    other = pellucid.load(wide, tokenizer=tokenizer(wide))
    with pytest.raises(InputError, match="48 wide: give mapping="):
        patchscope(opened("gpt2"), PROMPT, into_model=other, into="Paris is", layers=0)
    widen = torch.nn.functional.pad
    found = patchscope(
        opened("gpt2"), PROMPT, into_model=other, into="Paris is", layers=0, mapping=lambda x: widen(x, (0, 16))
    )
    assert np.isfinite(found.data.probability).all()


# ---- future lens


@given(rows=st.integers(30, 60), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_streamed_ridge_regression_equals_the_closed_form_on_all_rows(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, 5, generator=generator), torch.randn(rows, 5, generator=generator)
    moments = Moments(5)
    for part in range(0, rows, 7):
        moments.add(x[part : part + 7], y[part : part + 7])
    weight, constant = moments.solve(1e-6)
    design = torch.cat([x, torch.ones(rows, 1)], 1).double()
    slow = torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(weight.T.double(), slow[:5], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(constant.double(), slow[5], atol=1e-3, rtol=1e-3)


def test_the_last_residual_foresees_the_next_token_exactly_and_later_ones_less():
    model = opened("llama")
    lens = FutureLens(ahead=2, context=16).fit(model, TEXTS)
    found = lens.score(model, HELD_OUT, context=16).data
    assert float(found.precision.sel(layer=1, ahead=0)) > 0.98
    assert (found.precision.sel(ahead=0) >= found.precision.sel(ahead=2)).all()
    assert 0 < float(found.most_frequent) < 1
    read = lens.read(model, PROMPT).data
    own = model.run(PROMPT).logits[0, -1]
    assert str(read.top_token.sel(layer=1, ahead=0)[0].values) == model.tokenizer.decode([int(own.argmax())])


def test_there_is_no_future_where_the_model_looks_ahead():
    with pytest.raises(Refused, match="no future to foresee"):
        FutureLens().fit(opened("bert"), TEXTS)
    with pytest.raises(InputError, match="not fitted"):
        FutureLens().read(opened("llama"), PROMPT)


# ---- head lens


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_head_raises_is_its_direct_logit_attribution_for_every_token(family):
    model = opened(family)
    size = model.module.config.vocab_size
    found = head_lens(model, PROMPT, top=size).data
    for token in (7, 19, 40):
        shares = direct_logit_attribution(model, PROMPT, token, by="head").data
        shares = shares.where(shares.part == "attn.heads", drop=True)
        name = model.tokenizer.decode([token])
        for layer in range(2):
            for head in range(found.sizes["head"]):
                cell = found.sel(layer=layer, head=head)
                at = cell.raised_token.values.tolist().index(name)
                share = shares.contribution[(shares.layer == layer) & (shares.unit == head)]
                assert float(cell.raised[at]) == pytest.approx(share.item(), abs=1e-4)
    np.testing.assert_allclose(found.raised, found.lowered.values[..., ::-1], atol=1e-5)


def test_heads_have_translators_of_their_own():
    model = opened("llama")
    lens = TunedLens(sites="layers.*.attn.heads.*.out", share=0.5, **SMALL).fit(model, TEXTS)
    assert len(lens.biases_) == 2 * 4
    assert np.mean(lens.losses_[-1]) < np.mean(lens.losses_[0])
    found = head_lens(model, PROMPT, through=lens).data
    assert (found.raised >= 0).all() and (found.raised.sum("top") <= 1 + 1e-6).all()
    assert "lowered" not in found


def test_models_whose_heads_do_not_write_by_themselves_are_refused():
    with pytest.raises(Refused):
        head_lens(opened("mamba"), PROMPT)


# ---- causal basis


def test_the_basis_is_orthonormal_in_order_and_stronger_than_chance():
    model = opened("llama")
    with torch.no_grad():  # gradients are managed inside (B1)
        found = causal_basis(model, TEXTS[:3], "layers.0.resid_post", size=4, steps=30).data
    basis = torch.tensor(found.direction.values)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-4, rtol=0)
    assert (found.influence > 3 * found.random).all()
    assert float(found.used[0]) > float(found.used_random)
    assert (np.diff(found.influence) < 0.1 * float(found.influence[0])).all()


def test_an_influence_is_the_mean_divergence_when_the_direction_is_replaced():
    model = opened("llama")
    found = causal_basis(model, TEXTS[:2], "layers.1.resid_post", size=1, steps=10).data
    inputs = model.inputs(TEXTS[:2])
    h = (
        model.run(inputs, keep=["layers.1.resid_post"])
        .tensor("layers.1.resid_post")[inputs.stream("").mask.bool()]
        .detach()
    )
    v = torch.tensor(found.direction.values[0])
    moved = h + ((h.mean(0) - h) @ v)[:, None] * v
    p, q = (unembed(model, x[None])[0].log_softmax(-1) for x in (h, moved))
    assert float(found.influence[0]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert float(found.used[0]) == pytest.approx(
        float(found.influence[0]), rel=1e-3
    )  # the last layer's lens is the model
