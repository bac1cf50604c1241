"""Controls know nothing: the same numbers in another order, no direction before another, and the user's model untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.changed import slots
from pellucid.controls import Redrawn, Shuffled, random_directions, redrawn, shuffled, shuffled_labels
from pellucid.errors import InputError
from tests.engine.hand import PROMPTS, opened


def tensors(model):
    return {name: getattr(*slot).detach() for name, slot in slots(model.module).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_shuffled_model_has_the_same_numbers_in_another_order_and_the_same_ties(family):
    model = opened(family)
    digest, before = model.digest, {n: t.clone() for n, t in tensors(model).items()}
    new = shuffled(model, 3)
    assert model.digest == digest and all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    matrices = {n for n, p in model.module.named_parameters(remove_duplicate=False) if p.ndim > 1}
    for name, tensor in tensors(new).items():
        if name in matrices:
            assert not torch.equal(tensor, before[name])
            assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values)
        else:
            assert tensor.data_ptr() == tensors(model)[name].data_ptr()
    tied = {
        n for n, t in tensors(model).items() if t.data_ptr() == model.module.get_input_embeddings().weight.data_ptr()
    }
    assert len({tensors(new)[n].data_ptr() for n in tied}) == 1
    assert new.anatomy.complete
    assert shuffled(model, 3).digest == new.digest != shuffled(model, 4).digest
    assert "Shuffled" in new.name and new.loaded.changes == (Shuffled(3),)


def test_what_is_kept_stays_also_under_its_other_name():
    model = opened("gpt2")
    new = shuffled(model, 0, keep=["lm_head.weight"])  # tied: the embedding is this tensor
    assert torch.equal(tensors(new)["transformer.wte.weight"], tensors(model)["transformer.wte.weight"])
    assert not torch.equal(tensors(new)["transformer.wpe.weight"], tensors(model)["transformer.wpe.weight"])


def test_redrawn_weights_have_the_mean_and_deviation_of_the_old_ones():
    model = opened("llama")
    name = "model.embed_tokens.weight"
    new = redrawn(model, [name], 1)
    ours, theirs = tensors(new), tensors(model)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == [name]
    n = theirs[name].numel()
    assert abs(float(ours[name].mean() - theirs[name].mean())) < 4 * float(theirs[name].std()) / n**0.5
    assert abs(float(ours[name].std() / theirs[name].std()) - 1) < 4 / (2 * n) ** 0.5
    assert new.digest == model.changed(Redrawn((name,), 1)).digest != redrawn(model, [name], 2).digest
    everything = redrawn(model, seed=1)
    assert all(not torch.equal(t, theirs[n]) for n, t in tensors(everything).items() if "inv_freq" not in n)
    with torch.no_grad():
        apart = [m.run(PROMPTS[0]).logits for m in (model, everything)]
    assert not torch.allclose(*apart)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.floats(0.1, 50), st.integers(0, 5))
def test_directions_have_the_norm_asked_for_and_only_the_seed_decides_them(n, width, norm, seed):
    found = random_directions(n, width, norm=norm, seed=seed)
    assert found.shape == (n, width)
    torch.testing.assert_close(found.norm(dim=1), torch.full((n,), norm))
    assert torch.equal(found, random_directions(n, torch.zeros(3, width), norm=norm, seed=seed))
    each = torch.arange(1.0, n + 1)
    torch.testing.assert_close(random_directions(n, width, norm=each, seed=seed).norm(dim=1), each)


def test_directions_prefer_none():
    drawn = random_directions(4000, 6, norm=2.0)
    torch.testing.assert_close(drawn.T @ drawn / 4000, torch.eye(6) * 4 / 6, atol=0.05, rtol=0)
    assert drawn.mean(0).abs().max() < 0.05
    assert random_directions(2, torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=20), st.integers(0, 3))
def test_labels_keep_their_counts_within_each_group(rows, seed):
    labels, groups = [r[0] for r in rows], [r[1] for r in rows]
    found = shuffled_labels(labels, seed, within=groups)
    for group in set(groups):
        own = [i for i, g in enumerate(groups) if g == group]
        assert sorted(found[own]) == sorted(np.array(labels)[own])
    assert sorted(shuffled_labels(labels, seed)) == sorted(labels)
    assert list(found) == list(shuffled_labels(labels, seed, within=groups))
    with pytest.raises(InputError, match="one group for each label"):
        shuffled_labels(labels, within=[*groups, 0])
