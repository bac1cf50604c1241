"""Rollout equals its slow version, mixes to rows of 1, and comes with the null model of its mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attention import rollout
from pellucid.attention.adversarial import Kind
from pellucid.attention.rollout import Step
from pellucid.errors import InputError
from tests.attention.opening import PROMPT, TARGET, native, opened


def slow(layers, share):
    """After Abnar and Zuidema: add the identity, normalise, multiply; after every layer."""
    found, made = None, []
    for a in layers:
        mean = a.double().mean(0).numpy()
        mixed = np.zeros_like(mean)
        for q in range(len(mean)):
            for k in range(len(mean)):
                mixed[q, k] = share * (q == k) + (1 - share) * mean[q, k] / mean[q].sum()
        found = mixed if found is None else mixed @ found
        made.append(found)
    return np.stack(made)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "gpt_oss"])
def test_rollout_equals_the_slow_version(family):
    model = opened(family)
    layers = native(model, PROMPT)[0]["pattern"] if family != "gpt_oss" else None
    if layers is None:  # transformers drops the sink from what it returns in some versions: read ours
        from pellucid.attention import patterns

        layers = [torch.from_numpy(a) for a in patterns(model, PROMPT).values]
    for share in (0.5, 0.0, 0.8):
        found = rollout(model, PROMPT, residual=share)
        np.testing.assert_allclose(found.rollout.values, slow(layers, share), atol=1e-6)


def test_half_is_what_the_released_code_does():
    """It adds I to the mean pattern and divides by the row sums."""
    layers = native(opened("bert"), PROMPT)[0]["pattern"]
    joint = None
    for a in layers:
        mixed = a.mean(0).numpy() + np.eye(a.shape[-1])
        mixed /= mixed.sum(-1, keepdims=True)
        joint = mixed if joint is None else mixed @ joint
    np.testing.assert_allclose(rollout(opened("bert"), PROMPT).values[-1], joint, atol=1e-6)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoders_rollout_equals_the_slow_version(family):
    found = rollout(opened(family), PROMPT, decoder=TARGET)
    from pellucid.attention import patterns

    seen = patterns(opened(family), PROMPT, decoder=TARGET)
    encoder = slow(torch.from_numpy(seen.encoder.values), 0.5)
    np.testing.assert_allclose(found.encoder.values, encoder, atol=1e-6)
    n, m = len(found["query"]), len(found.source_key)
    own, source = np.eye(n), np.zeros((n, m))
    for layer in range(len(found.layer)):
        a = (np.eye(n) + seen.decoder.values[layer].mean(0)) / 2
        own, source = a @ own, a @ source
        own, source = own / 2, source / 2 + seen.cross.values[layer].mean(0) @ encoder[-1] / 2
        np.testing.assert_allclose(found.rollout.values[layer], own, atol=1e-6)
        np.testing.assert_allclose(found.source.values[layer], source, atol=1e-6)
    np.testing.assert_allclose(found.rollout.sum("key") + found.source.sum("source_key"), 1, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(family=st.sampled_from(["gpt2", "bert", "bart"]), share=st.one_of(st.just("norms"), st.floats(0, 0.99)))
def test_rows_are_mixtures_of_the_input(family, share):
    found = rollout(opened(family), PROMPT, residual=share, decoder=TARGET if family == "bart" else None)
    total = found.rollout.sum("key") + (found.source.sum("source_key") if family == "bart" else 0)
    np.testing.assert_allclose(total, 1, atol=1e-9)
    assert all(float(v.min()) >= 0 for v in found.data.data_vars.values())


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_measured_shares_are_those_of_the_norms(family):
    model = opened(family)
    found = rollout(model, PROMPT, residual="norms").rollout.values
    run = model.run(PROMPT, keep=["layers.*.resid_pre", "layers.*.attn.out", "layers.*.attn.pattern"])
    joint = np.eye(found.shape[-1])
    for layer in range(len(found)):
        before, added = (run.tensor(f"layers.{layer}.{p}")[0].norm(dim=-1) for p in ("resid_pre", "attn.out"))
        share = (before / (before + added))[:, None].detach().numpy()
        mean = run.tensor(f"layers.{layer}.attn.pattern")[0].mean(0).detach().numpy()
        joint = (share * np.eye(len(joint)) + (1 - share) * mean) @ joint
        np.testing.assert_allclose(found[layer], joint, atol=1e-5)


def test_the_null_of_twelve_causal_layers_is_mostly_at_the_first_token():
    model = opened("gpt2", layers=12)
    ids = torch.randint(5, 60, (1, 32), generator=torch.Generator().manual_seed(0))
    found = rollout(model, ids)
    assert float(found.null[-1, -1, 0]) == pytest.approx(0.714, abs=1e-3)
    alike = np.tril(np.ones((32, 32))) / np.arange(1, 33)[:, None]
    expected = np.linalg.matrix_power((np.eye(32) + alike) / 2, 12)
    np.testing.assert_allclose(found.null[-1], expected, atol=1e-9)


def test_a_step_that_looks_everywhere_alike_is_its_own_null():
    seen = torch.ones(3, 3, dtype=torch.bool)
    step = Step(Kind("", "attn", (0,)), 0, torch.full((3,), 0.5), torch.full((3, 3), 1 / 3).double(), seen)
    torch.testing.assert_close(step.alike().mixing, step.mixing)


@pytest.mark.parametrize("share", [1.0, -0.1, "half"])
def test_other_shares_are_errors(share):
    with pytest.raises(InputError, match="residual share"):
        rollout(opened("gpt2"), PROMPT, residual=share)
