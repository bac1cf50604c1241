"""Causal tracing equals a slow loop of plain hooks, and finds the site of a fact it was built around."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pellucid import Model, load
from pellucid.causal.tracing import tracing, window_curve
from pellucid.errors import InputError
from tests.zoo import build, tokenizer

PROMPT, SUBJECT = "The capital of France is in the city of", "capital of France"


@pytest.fixture(scope="module")
def gpt2() -> Model:
    module = build("gpt2", layers=4)
    return load(module, tokenizer=tokenizer(module))


def slow(model: Model, noise: Tensor, part: str, layers: range, position: int, answer: int) -> Tensor:
    """p(answer) with noise on the embedding module's output and clean outputs put back, by hooks of torch alone."""
    module, ids = model.module, model.inputs(PROMPT).tensors["input_ids"]
    blocks = module.transformer.h
    places = {
        "resid_post": list(blocks),
        "mlp.out": [b.mlp for b in blocks],
        "attn.out": [b.attn.c_proj for b in blocks],
    }[part]
    clean: dict[int, Tensor] = {}

    def first(x: Any) -> Tensor:
        return x[0] if isinstance(x, tuple) else x

    def keep(i: int) -> Any:
        return lambda m, a, o: clean.update({i: first(o).clone()})

    def restore(i: int) -> Any:
        def hook(m: nn.Module, a: Any, o: Any) -> None:
            first(o)[:, position] = clean[i][:, position]

        return hook

    with torch.no_grad():
        handles = [p.register_forward_hook(keep(i)) for i, p in enumerate(places)]
        module(ids)
        for handle in handles:
            handle.remove()
        blur = lambda m, a, o: o + nn.functional.pad(noise, (0, 0, 1, o.shape[1] - 1 - noise.shape[1]))  # noqa: E731
        handles = [module.transformer.wte.register_forward_hook(blur)]
        handles += [places[i].register_forward_hook(restore(i)) for i in layers]
        probability = module(ids.repeat(len(noise), 1)).logits[:, -1].softmax(-1)[:, answer]
        for handle in handles:
            handle.remove()
    return probability


def test_every_restored_state_equals_a_run_with_plain_hooks(gpt2: Model) -> None:
    result = tracing(gpt2, PROMPT, 7, subject=SUBJECT, draws=3, window=3, seed=5)
    assert result.effect.dims == ("part", "layer", "position")
    ids = gpt2.inputs(PROMPT).tensors["input_ids"]
    sigma = gpt2.module.transformer.wte(ids).std()
    noise = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(5)) * 3 * sigma.detach()
    corrupted = slow(gpt2, noise, "mlp.out", range(0), 0, 7)
    assert result["corrupted"].item() == pytest.approx(corrupted.mean().item(), abs=1e-6)
    for part, layer, layers, position in [
        ("resid_post", 2, range(2, 3), 3), ("mlp.out", 2, range(1, 4), 3), ("attn.out", 0, range(2), 5),
        ("mlp.out", 3, range(2, 4), 8),
    ]:  # fmt: skip
        expected = (slow(gpt2, noise, part, layers, position, 7) - corrupted).mean().item()
        assert result.effect.sel(part=part, layer=layer, position=position).item() == pytest.approx(expected, abs=2e-6)


def test_restoring_the_last_residual_brings_the_whole_effect_back_and_what_precedes_the_subject_nothing(
    gpt2: Model,
) -> None:
    result = tracing(gpt2, PROMPT, subject=SUBJECT, parts=("resid_post",), draws=4)
    assert result.share.sel(part="resid_post", layer=3, position=8).item() == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(result.effect.sel(part="resid_post", position=0), 0.0, atol=1e-7)
    total = result["clean"].item() - result["corrupted"].item()
    assert float(result.total_effect) == pytest.approx(total, abs=1e-7)
    assert float(result.total_low) <= total <= float(result.total_high)
    assert [str(t) for t in result.token.values[result.in_subject.values == "subject"]] == ["capital", "of", "France"]


def test_several_facts_are_gathered_by_role_with_an_interval_over_prompts(gpt2: Model) -> None:
    prompts = ["The capital of France is in the city", "The city of Paris is in Italy"]
    result = tracing(gpt2, prompts, [7, 8], subject=["capital of France", "city of Paris"], draws=2, parts=("mlp.out",))
    assert result.effect.dims == ("part", "layer", "role")
    assert result["clean"].shape == (2,)
    one = [tracing(gpt2, p, a, subject=s, draws=2, parts=("mlp.out",), seed=i)
           for i, (p, a, s) in enumerate(zip(prompts, [7, 8], ["capital of France", "city of Paris"], strict=True))]  # fmt: skip
    sigmas = {r.data.attrs["sigma"] for r in (*one, result)}
    assert len(sigmas) == 3  # each call measures its own prompts, unless told otherwise
    shared = [
        tracing(gpt2, p, a, subject=s, draws=2, parts=("mlp.out",), seed=i, reference=prompts)
        for i, (p, a, s) in enumerate(zip(prompts, [7, 8], ["capital of France", "city of Paris"], strict=True))
    ]
    columns = {
        "first subject": ([1], [1]), "middle subject": ([2], [2]), "last subject": ([3], [3]),
        "first further": ([4], [4]), "further": ([5, 6], [5]), "last": ([7], [6]),
    }  # fmt: skip
    for role, where in columns.items():
        each = np.array([r.effect.values[0][:, at].mean(-1) for r, at in zip(shared, where, strict=True)])
        np.testing.assert_allclose(result.effect.sel(part="mlp.out", role=role), each.mean(0), atol=1e-6)
        np.testing.assert_allclose(result["each"].sel(part="mlp.out", role=role), each, atol=1e-6)
    assert (result.low <= result.effect + 1e-9).all()
    assert (result.effect <= result.high + 1e-9).all()


def test_the_window_curve_of_several_facts_is_their_average(gpt2: Model) -> None:
    prompts, subjects = ["The capital of France is in the city", "The city of Paris is in Italy"], ["France", "Paris"]
    options: dict[str, Any] = {"draws": 2, "windows": (1, 3), "reference": prompts}
    both = window_curve(gpt2, prompts, [7, 8], subject=subjects, **options)
    one = [window_curve(gpt2, p, a, subject=s, seed=i, **options)
           for i, (p, a, s) in enumerate(zip(prompts, [7, 8], subjects, strict=True))]  # fmt: skip
    np.testing.assert_allclose(both.effect, np.mean([c.effect for c in one], 0), atol=1e-6)
    assert both.data.attrs["position"] == [3, 3]


def test_the_window_curve_at_the_default_window_is_the_trace_itself(gpt2: Model) -> None:
    trace = tracing(gpt2, PROMPT, 7, subject=SUBJECT, draws=2, window=3, parts=("mlp.out",))
    curve = window_curve(gpt2, PROMPT, 7, subject=SUBJECT, draws=2, windows=(1, 3))
    np.testing.assert_allclose(curve.effect.sel(window=3), trace.effect.sel(part="mlp.out", position=3), atol=1e-6)


def test_encoder_decoders_are_blurred_and_restored_in_the_encoder() -> None:
    module = build("t5")
    model = load(module, tokenizer=tokenizer(module))
    result = tracing(model, "The capital of France", 7, subject="France", draws=2, parts=("resid_post",))
    assert result.effect.shape[1:] == (2, len(result.token))
    assert np.isfinite(result.effect.values).all()


def test_the_same_seed_gives_the_same_trace_and_a_missing_subject_is_an_error(gpt2: Model) -> None:
    options: dict[str, Any] = {"subject": SUBJECT, "draws": 2, "parts": ("mlp.out",)}
    assert tracing(gpt2, PROMPT, 7, seed=1, **options) == tracing(gpt2, PROMPT, 7, seed=1, **options)
    assert not tracing(gpt2, PROMPT, 7, seed=1, **options).allclose(tracing(gpt2, PROMPT, 7, seed=2, **options), 0)
    with pytest.raises(InputError, match="'Eiffel' is not in the prompt"):
        tracing(gpt2, PROMPT, 7, subject="Eiffel")
    with pytest.raises(InputError, match="window=0"):
        tracing(gpt2, PROMPT, 7, subject=SUBJECT, window=0)


def test_a_masked_model_is_asked_at_its_mask() -> None:
    """Prediction, metric and what is restored are those of the mask, not of the mark at the end (A7)."""
    module = build("bert")
    model = load(module, tokenizer=tokenizer(module))
    prompt = f"The capital of {model.tokenizer.mask_token} is in France"
    inputs = model.inputs(prompt)
    at = inputs.stream("").ids[0].tolist().index(model.tokenizer.mask_token_id)
    logits = module(**inputs.tensors).logits[0].detach()
    target = int(logits[at].argmax())
    assert target != int(logits[-1].argmax())
    result = tracing(model, prompt, subject="capital", draws=2, parts=("resid_post",))
    assert result.provenance.arguments["target"] == [target]
    assert result.clean.item() == pytest.approx(float(logits[at].softmax(-1)[target]), abs=1e-6)
    assert float(result.share.sel(part="resid_post", layer=1, position=at)) == pytest.approx(1.0, abs=1e-4)
