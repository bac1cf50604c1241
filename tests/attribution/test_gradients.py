"""Gradient methods equal Captum's, and plain autograd written out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)

from pellucid.attribution import (
    continuation,
    expected_gradients,
    gradient_x_input,
    integrated_gradients,
    saliency,
    smoothgrad,
)
from pellucid.attribution.case import Case
from pellucid.attribution.expected_gradients import draw
from pellucid.attribution.path import Embedded
from pellucid.errors import InputError, Refused
from pellucid.metrics import logit, rank
from tests.attribution.hand import PROMPT, classifier, opened, token

FAMILIES = ["gpt2", "bert", "llama"]


def embeddings(model, prompt=PROMPT):
    """The prompt's embeddings, which of its tokens are special, and the score as a function of embeddings."""
    ids = model.inputs(prompt).stream("").ids
    special = torch.isin(ids[0], torch.tensor(model.tokenizer.all_special_ids))
    answer = token(model, "Paris")

    def score(x):
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        return model.module(inputs_embeds=x, attention_mask=mask).logits[:, -1, answer]

    return model.module.get_input_embeddings()(ids).detach(), special, score


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("norm", "reduce"),
    [("l2", lambda g: g.norm(dim=-1)), ("l1", lambda g: g.abs().sum(-1)), ("max", lambda g: g.abs().amax(-1)),
     ("signed", lambda g: g.sum(-1))],
)  # fmt: skip
def test_saliency_is_captums_gradient_in_one_number(family, norm, reduce):
    model = opened(family)
    x, special, score = embeddings(model)
    gradient = Saliency(score).attribute(x.requires_grad_(), abs=False)[0]
    expected = torch.where(special, 0.0, reduce(gradient.detach()))
    np.testing.assert_allclose(
        saliency(model, PROMPT, logit(" Paris"), norm=norm).values, expected, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_x_input_is_captums(family):
    model = opened(family)
    x, special, score = embeddings(model)
    expected = InputXGradient(score).attribute(x.requires_grad_())[0].sum(-1).detach()
    expected = torch.where(special, 0.0, expected)
    np.testing.assert_allclose(gradient_x_input(model, PROMPT, logit(" Paris")).values, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothgrad_and_captums_agree_within_their_errors(family):
    """Both draw their own noise."""
    model = opened(family)
    x, special, score = embeddings(model)
    torch.manual_seed(1)
    spread = 0.1 * float(x.max() - x.min())
    free = ~special
    there = x[:, free]

    def alone(y):
        whole = x.expand(len(y), -1, -1).clone()
        whole[:, free] = y
        return score(whole)

    theirs = NoiseTunnel(Saliency(alone)).attribute(
        there.requires_grad_(),
        nt_type="smoothgrad",
        nt_samples=400,
        nt_samples_batch_size=100,
        stdevs=spread,
        abs=False,
    )
    ours = smoothgrad(model, PROMPT, logit(" Paris"), draws=400, norm="signed")
    off = np.abs(ours.values[free.numpy()] - theirs[0].sum(-1).detach().numpy())
    assert (off < 5 * np.sqrt(2) * ours.error.values[free.numpy()] + 1e-6).all()
    assert (ours.error.values[free.numpy()] > 0).all()


def test_smoothgrads_error_is_that_of_a_mean_where_the_mean_is_what_is_given():
    from pellucid.attribution.saliency import _gradients

    model = opened("llama")
    embedded = Embedded(Case.of(model, PROMPT, " Paris"))
    drawn = _gradients(embedded, 12, 0.1, 5)[:, 0].double().sum(-1)
    found = smoothgrad(model, PROMPT, " Paris", draws=12, norm="signed", seed=5)
    np.testing.assert_allclose(found.values, drawn.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.error, drawn.std(0) / 12**0.5, atol=1e-6)


def test_expected_gradients_are_the_loop_over_their_draws():
    model = opened("llama")
    texts = ["Rome is the capital of Italy and the city of", "he gave a drink"]
    found = expected_gradients(model, PROMPT, " Paris", references=texts, draws=7, seed=4, keep_first=False)
    case = Case.of(model, PROMPT, " Paris")
    generator = torch.Generator().manual_seed(4)
    ids, at = draw(case, texts, 7, generator), torch.rand(7, generator=generator)
    x, _, score = embeddings(model)
    terms, ends = [], []
    for row, a in zip(ids, at, strict=True):
        b = model.module.get_input_embeddings()(row[None]).detach()
        middle = (b + a * (x - b)).requires_grad_()
        (gradient,) = torch.autograd.grad(score(middle).sum(), middle)
        terms.append(((x - b) * gradient)[0].sum(-1))
        ends.append(score(b).detach())
    np.testing.assert_allclose(found.values, torch.stack(terms).mean(0), atol=1e-6)
    np.testing.assert_allclose(found.error, torch.stack(terms).std(0) / 7**0.5, atol=1e-6)
    assert float(found.baseline_score) == pytest.approx(float(torch.cat(ends).mean()), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_gradients_captums_gradient_shap_and_integrated_gradients_agree_on_one_baseline(family):
    """With one reference as long as the prompt, all draws start there: the mean is the integral."""
    model = opened(family)
    x, special, score = embeddings(model)
    reference = model.inputs("Mary gave John a drink").stream("").ids
    start = torch.where(special[:, None], x, model.module.get_input_embeddings()(reference).detach())
    torch.manual_seed(0)
    theirs = GradientShap(score).attribute(x, start, n_samples=400, stdevs=0.0)[0].sum(-1).detach()
    ours = expected_gradients(
        model, PROMPT, logit(" Paris"), references=[reference[0].tolist()], draws=400, keep_first=False
    )
    exact = integrated_gradients(model, PROMPT, logit(" Paris"), baseline=reference, tolerance=1e-3)
    assert (np.abs(ours.values - exact.values) < 5 * ours.error.values + 1e-4).all()
    assert (np.abs(ours.values - theirs.numpy()) < 5 * 1.5 * ours.error.values + 1e-4).all()
    assert abs(float(ours.gap)) < 5 * float(ours.gap_error) + 1e-4


def test_references_are_drawn_from_the_stated_set_and_from_the_vocabulary_without_one():
    model = opened("bert")
    case = Case.of(model, PROMPT, logit(" Paris"))
    generator = torch.Generator().manual_seed(0)
    words = set(model.tokenizer("Mary gave John a drink", add_special_tokens=False)["input_ids"])
    assert set(draw(case, ["Mary gave John a drink"], 20, generator).flatten().tolist()) <= words
    anything = draw(case, None, 200, generator)
    assert not set(anything.flatten().tolist()) & set(model.tokenizer.all_special_ids)
    assert len(anything.unique()) > 60


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_the_model_integrated_gradients_equal_captums_at_that_layer(family):
    model = opened(family)
    block = model.module.get_submodule(model.anatomy.stacks[-1].blocks[0].module)
    ids = model.inputs(PROMPT).stream("").ids
    there = model.inputs("Mary gave John a drink").stream("").ids
    answer = token(model, "Paris")
    layer = LayerIntegratedGradients(lambda i: model.module(input_ids=i).logits[:, -1, answer], block)
    theirs = layer.attribute(ids, there, n_steps=20, method="gausslegendre")
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs)[0].sum(-1).detach()
    ours = integrated_gradients(
        model, PROMPT, logit(" Paris"), baseline=there, site="layers.1.resid_pre", steps=20, tolerance=1e9
    )
    np.testing.assert_allclose(ours.values, theirs, atol=1e-5)
    assert float(ours.gap) == pytest.approx(0, abs=1e-2 * float(np.abs(ours.values).sum()))


def test_inside_an_encoder_decoder_credit_goes_to_the_stream_of_the_site():
    model = opened("t5")
    found = integrated_gradients(model, PROMPT, continuation(" Paris and"), site="decoder.layers.1.resid_pre")
    assert (found.sel(output=1).values[found.stream.values == "source"] == 0).all()
    assert found.sel(output=1).values[found.stream.values == "target"].any()
    with pytest.raises(InputError, match="is in the decoder, but credit goes to the encoder"):
        integrated_gradients(model, PROMPT, " Paris", site="decoder.layers.1.resid_pre")
    with pytest.raises(InputError, match="must name one place"):
        integrated_gradients(opened("gpt2"), PROMPT, " Paris", site="layers.*.resid_pre")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("method", [saliency, gradient_x_input, integrated_gradients])
def test_a_continuation_is_attributed_token_by_token_as_one_by_one(family, method):
    """Each output's row is the attribution of that token alone after those before it; later tokens get nothing."""
    model = opened(family)
    if method is integrated_gradients:
        method = partial(method, steps=24, tolerance=1e9)
    whole = method(model, PROMPT, continuation(" Paris and Rome"))
    for n, said in enumerate([" Paris", " Paris and", " Paris and Rome"]):
        one = method(model, PROMPT, continuation(said))
        own = one.values[-1]
        np.testing.assert_allclose(whole.values[n, : len(own)], own, atol=1e-5)
        assert (whole.values[n, len(own) :] == 0).all()


def test_on_gpt2_sequence_attribution_is_inseqs_definition_of_integrated_gradients():
    """Per generated token the IG of its probability over the embeddings of all before it, from the unknown token,
    summed over the width: what Inseq gives before it aggregates (measured beside Inseq 0.7: apart by 3e-10)."""
    model = opened("gpt2")
    embedding, unknown = model.module.get_input_embeddings(), model.tokenizer.unk_token_id
    target = continuation(" Paris and Rome", of="probability")
    ours = integrated_gradients(model, PROMPT, target, baseline="unk", steps=30, tolerance=1e9, keep_first=False)
    ids = Case.of(model, PROMPT, target).ids
    said = [token(model, t) for t in ("Paris", "and", "Rome")]
    prompt = len(ids) - 2
    for n, answer in enumerate(said):
        before = ids[None, : prompt + n]
        x, start = embedding(before).detach(), embedding(torch.full_like(before, unknown)).detach()

        def probability(e, answer=answer):
            return model.module(inputs_embeds=e).logits[:, -1].softmax(-1)[:, answer]

        found = IntegratedGradients(probability).attribute(x, start, n_steps=30)[0].sum(-1)
        np.testing.assert_allclose(ours.values[n, : prompt + n], found.detach(), atol=1e-7)


def test_words_get_the_sum_of_their_tokens_and_the_norm_of_all_their_gradients():
    model = opened("gpt2")
    prompt = "Tokenizers of Paris"
    for method in (gradient_x_input, integrated_gradients):
        tokens, words = method(model, prompt, 9), method(model, prompt, 9, players="word")
        assert words.text.values.tolist() == ["Tokenizers", "of", "Paris"]
        np.testing.assert_allclose(words.values, [tokens.values[:-2].sum(), *tokens.values[-2:]], atol=1e-6)
    tokens, words = saliency(model, prompt, 9), saliency(model, prompt, 9, players="word")
    assert words.values[0] == pytest.approx(np.sqrt((tokens.values[:-2] ** 2).sum()))


def test_comparing_baselines_says_how_much_the_order_depends_on_them():
    model = opened("llama")
    found = integrated_gradients(model, PROMPT, " Paris", baseline="pad", compare=["pad", "mean", " to"])
    assert found.rank_agreement.dims == ("baseline",)
    assert float(found.rank_agreement[0]) == pytest.approx(1)
    assert (np.abs(found.rank_agreement) <= 1 + 1e-9).all()


@pytest.mark.parametrize("method", [saliency, gradient_x_input, smoothgrad, expected_gradients, integrated_gradients])
def test_a_target_that_counts_and_quantised_weights_have_no_gradient_and_say_so(method):
    with pytest.raises(Refused, match="no gradient reaches the embeddings"):
        method(opened("gpt2"), PROMPT, rank(" Paris"))
    with pytest.raises(Refused, match="its weights are quantised"):
        method(quantised(), PROMPT, "good")


def quantised():
    """int8 weights: residual connections let a part of the gradient through, the layers none."""
    import copy
    import warnings

    import pellucid

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(classifier().module), {torch.nn.Linear}, dtype=torch.qint8
        )
        return pellucid.load(module, tokenizer=classifier().tokenizer)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (saliency, {"norm": "l3"}, "unknown norm 'l3'"),
        (smoothgrad, {"draws": 1}, "at least 2 draws"),
        (smoothgrad, {"noise": 0}, "noise above 0"),
        (expected_gradients, {"draws": 1}, "at least 2"),
        (expected_gradients, {"references": []}, "references must be texts"),
    ],
)
def test_bad_options_are_one_clear_error(method, options, message):
    with pytest.raises(InputError, match=message):
        method(opened("gpt2"), PROMPT, " Paris", **options)


def test_seeds_repeat_and_differ():
    model = opened("gpt2")
    for method in (smoothgrad, expected_gradients):
        a, b, c = (method(model, PROMPT, " Paris", draws=5, seed=s) for s in (1, 1, 2))
        assert a.allclose(b, atol=0) and not a.allclose(c, atol=1e-9)
        assert a.provenance.seed == 1
