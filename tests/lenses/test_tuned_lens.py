"""The tuned lens: training is the paper's, the file comes back, and it reads better than the logit lens."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch

import pellucid
from pellucid.errors import InputError, Refused
from pellucid.lenses import FutureLens, TunedLens, lens_quality, logit_lens, prediction_depth, unembed
from pellucid.lenses.tuned_lens import MOMENTUM, _cells
from pellucid.results import Result
from tests.zoo import build, tokenizer
from tests.zoo.tokenizer import WORDS

PROMPT = "The capital of France is"
DRAW = random.Random(0)
TEXTS = [" ".join(DRAW.choice(WORDS)[1:] for _ in range(40)) for _ in range(60)]
HELD_OUT = [" ".join(DRAW.choice(WORDS)[1:] for _ in range(40)) for _ in range(12)]
SMALL = {"context": 16, "batch": 4}


@cache
def opened(family):
    """A tiny model whose blocks do enough for the layers to differ."""
    module = build(family)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def fitted(family="llama", **options):
    return TunedLens(share=0.5, **{**SMALL, **options}).fit(opened(family), TEXTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_it_beats_the_logit_lens_on_held_out_text_at_every_layer(family):
    found = lens_quality(opened(family), HELD_OUT, fitted(family), context=16).data
    assert found.layer.values.tolist() == [-1, 0] and found.site.values.tolist() == ["embed", "layers.0.resid_post"]
    assert (found.tuned < found.logit).all()
    assert (found.low > 0).all()
    assert (found.low <= found.gain).all() and (found.gain <= found.high).all()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_masked_and_encoder_decoder_models_are_fitted_too(family):
    texts = [(a, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)] if family == "t5" else TEXTS
    lens = TunedLens(share=0.5, context=60, batch=4).fit(opened(family), texts)
    held = [(a, a) for a in HELD_OUT] if family == "t5" else HELD_OUT
    found = lens_quality(opened(family), held, lens, context=60).data
    assert float(found.tuned.mean()) < float(found.logit.mean())
    assert all(name.startswith("decoder." if family == "t5" else ("embed", "layers")) for name in lens.biases_)


def test_one_step_is_sgd_with_nesterov_momentum_on_the_mean_kl_of_the_cells():
    """Against torch's own optimiser on the same cells, with all layers in one obvious loss."""
    model, rate = opened("llama"), 0.1
    lens = TunedLens(share=0.5, learning_rate=1.0, tokens=32, context=16, batch=2).fit(model, TEXTS[:8])
    assert len(lens.losses_) == 1
    weights = {s: torch.zeros(32, 32, requires_grad=True) for s in lens.biases_}
    biases = {s: torch.zeros(32, requires_grad=True) for s in lens.biases_}
    ids = [i for text in TEXTS[:8] for i in [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]]
    inputs = model.inputs([ids[:16], ids[16:32]])
    cells = _cells(inputs, 0.5, 0)
    run = model.run(inputs, keep=[*lens.biases_])
    p = run.logits[cells].softmax(-1).detach()
    optimiser = torch.optim.SGD(
        [*weights.values(), *biases.values()], lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=1e-3
    )
    for site in lens.biases_:
        h = run.tensor(site)[cells].detach()
        log_q = unembed(model, (h + h @ weights[site].T + biases[site])[None])[0].log_softmax(-1)
        (p * (p.log() - log_q)).sum(-1).mean().backward()
    for parameter in [*weights.values(), *biases.values()]:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    optimiser.step()
    for site in lens.biases_:
        torch.testing.assert_close(lens.weights_[site], weights[site].detach(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lens.biases_[site], biases[site].detach(), atol=1e-6, rtol=1e-4)


def test_an_untrained_lens_is_the_logit_lens_and_the_last_row_is_always_the_model():
    model = opened("llama")
    start = TunedLens(learning_rate=0.0, share=0.5, **SMALL).fit(model, TEXTS)
    plain, through = logit_lens(model, PROMPT), logit_lens(model, PROMPT, through=start)
    np.testing.assert_allclose(plain.data.kl, through.data.kl, atol=1e-6)
    tuned = logit_lens(model, PROMPT, through=fitted())
    assert tuned.kind == "tuned lens"
    assert float(abs(tuned.data.kl.isel(layer=-1)).max()) < 1e-6
    assert float(tuned.data.kl.isel(layer=0).mean()) < float(plain.data.kl.isel(layer=0).mean())


def test_a_bias_alone_gains_less_than_the_whole_translator():
    model = opened("llama")
    whole, bias = (lens_quality(model, HELD_OUT, lens, context=16).data for lens in (fitted(), fitted(bias_only=True)))
    assert float(bias.gain.mean()) > 0
    assert float(whole.gain.mean()) > float(bias.gain.mean())
    assert fitted(bias_only=True).weights_ == {}


def test_a_saved_lens_comes_back_and_belongs_to_its_weights(tmp_path):
    model = opened("llama")
    path = fitted().save(tmp_path / "lens.safetensors")
    back = TunedLens.load(path)
    a, b = (logit_lens(model, PROMPT, through=lens).data.kl for lens in (fitted(), back))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="belongs to other weights"):
        TunedLens.load(path).check(opened("gpt2"))
    assert back.settings == {**fitted().settings, "sites": list(fitted().sites)} and back.losses_ == fitted().losses_
    assert len(repr(back)) < 200
    with pytest.raises(InputError, match="is no FutureLens"):
        FutureLens.load(path)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError, match="is no TunedLens"):
        TunedLens.load(tmp_path / "text.safetensors")


def test_an_interrupted_fit_continues_and_ends_at_the_same_lens(tmp_path, monkeypatch):
    model, path = opened("llama"), tmp_path / "fit.safetensors"
    monkeypatch.setattr("pellucid.lenses.tuned_lens.EVERY", 5)
    step = TunedLens._step

    def breaks(self, model, inputs, names, number):
        if number == 17:
            raise KeyboardInterrupt
        return step(self, model, inputs, names, number)

    monkeypatch.setattr(TunedLens, "_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        TunedLens(share=0.5, **SMALL).fit(model, TEXTS, checkpoint=path)
    seen = []
    monkeypatch.setattr(TunedLens, "_step", lambda self, m, i, n, k: [seen.append(k), step(self, m, i, n, k)][1])
    lens = TunedLens(share=0.5, **SMALL).fit(model, TEXTS, checkpoint=path)
    assert seen[0] == 17  # what was done is kept when it is interrupted
    assert lens.losses_ == fitted().losses_
    for site, bias in fitted().biases_.items():
        assert torch.equal(lens.biases_[site], bias) and torch.equal(lens.weights_[site], fitted().weights_[site])


def test_the_checkpoint_of_another_fit_is_refused_with_what_differs(tmp_path):
    """A25: another corpus gave the first one's lens, another learning rate was ignored."""
    model, path = opened("llama"), tmp_path / "fit.safetensors"
    own = {"share": 0.5, **SMALL}
    TunedLens(**own).fit(model, TEXTS, checkpoint=path)
    for other, texts, why in (
        ({}, TEXTS[::-1], "corpus was"),
        ({"learning_rate": 0.5}, TEXTS, "learning_rate was 1.0, is 0.5"),
        ({"share": 0.25}, TEXTS, "share was 0.5, is 0.25"),
        ({"batch": 2}, TEXTS, "batch was 4, is 2"),
        ({"bias_only": True}, TEXTS, "bias_only was False, is True"),
    ):
        with pytest.raises(InputError, match=f"checkpoint of another fit .*{why}"):
            TunedLens(**{**own, **other}).fit(model, texts, checkpoint=path)
    module = build("llama")
    other = pellucid.load(module, tokenizer=tokenizer(module))
    with pytest.raises(InputError, match="weights was"):
        TunedLens(**own).fit(other, TEXTS, checkpoint=path)


def test_the_model_is_left_as_it_was():
    module = build("llama")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    TunedLens(**SMALL).fit(model, TEXTS[:4])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.module.named_parameters())


def test_text_is_needed_and_a_lens_must_be_fitted():
    model = opened("llama")
    with pytest.raises(InputError, match="no text to fit"):
        TunedLens(**SMALL).fit(model, ["a b"])
    with pytest.raises(InputError, match="put the one text into a list"):
        TunedLens(**SMALL).fit(model, "a b")
    with pytest.raises(InputError, match="not fitted"):
        logit_lens(model, PROMPT, through=TunedLens())
    with pytest.raises(InputError, match="no residual at every position"):
        TunedLens(sites="layers.*.mlp.neurons").fit(model, TEXTS)
    with pytest.raises((InputError, Refused)):
        TunedLens(**SMALL).fit(opened("t5"), TEXTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_prediction_depth_is_the_first_row_after_the_last_other_choice(family):
    lens = logit_lens(opened(family), PROMPT)
    depth = prediction_depth(lens)
    rank = lens.data["rank"].values
    slow = [next(d for d in range(len(rank)) if (rank[d:, t] == 0).all()) for t in range(rank.shape[1])]
    assert depth.values.tolist() == slow
    if family != "t5":  # whose decoder is given one token here
        assert np.isnan(prediction_depth(logit_lens(opened(family), [PROMPT, "Mary"])).values[1, -1])
    with pytest.raises(InputError, match="read from a lens"):
        prediction_depth(depth)


def test_surprise_is_that_of_the_token_that_comes_next():
    model = opened("gpt2")
    lens = logit_lens(model, PROMPT).data
    ids = model.inputs(PROMPT).stream("").ids[0]
    log_p = model.run(PROMPT).logits[0].log_softmax(-1)
    last = lens.surprise.isel(layer=-1).values
    np.testing.assert_allclose(last[:-1], -log_p[torch.arange(4), ids[1:]].detach(), atol=1e-4)
    assert np.isnan(last[-1])
    assert np.isnan(logit_lens(opened("bert"), PROMPT).data.surprise).all()


def test_a_lens_result_comes_back_from_its_file(tmp_path):
    found = logit_lens(opened("llama"), PROMPT, through=fitted())
    assert Result.load(found.save(tmp_path / "lens.zip")) == found
