"""Stitches of models whose relation is known: itself, a rotated copy, another tokenizer, a shuffled sender."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.changed import Replaced
from pellucid.errors import InputError, Refused
from pellucid.surgery import Stitch, stitching
from pellucid.surgery.aligned import pairs
from pellucid.surgery.maps import solve as _solve
from tests.surgery.test_arranging import opened

WORDS = [
    "the",
    "of",
    "is",
    "in",
    "and",
    "to",
    "a",
    "The",
    "When",
    "city",
    "capital",
    "France",
    "Italy",
    "Paris",
    "Rome",
    "Mary",
    "John",
    "went",
    "gave",
    "drink",
    "store",
    "he",
]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 14)) for i in range(24)]


def rotated(model: pl.Model, seed: int = 0) -> tuple[pl.Model, Tensor]:
    """The same function in another basis: every norm's gain folded into what reads it, then x -> x Q for the whole stream."""
    llama = model.module
    d = llama.config.hidden_size
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    weight = {n: p.detach().double() for n, p in llama.named_parameters()}
    weight.setdefault("lm_head.weight", llama.lm_head.weight.detach().double())
    made = {"model.embed_tokens.weight": weight["model.embed_tokens.weight"] @ q}
    for i in range(len(llama.model.layers)):
        name = f"model.layers.{i}."
        for part, norm in (("self_attn.q_proj", "input"), ("self_attn.k_proj", "input"), ("self_attn.v_proj", "input"),
                           ("mlp.gate_proj", "post_attention"), ("mlp.up_proj", "post_attention")):  # fmt: skip
            made[f"{name}{part}.weight"] = weight[f"{name}{part}.weight"] * weight[f"{name}{norm}_layernorm.weight"] @ q
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            made[f"{name}{part}.weight"] = q.T @ weight[f"{name}{part}.weight"]
        for norm in ("input", "post_attention"):
            made[f"{name}{norm}_layernorm.weight"] = torch.ones(d)
    made["lm_head.weight"] = weight["lm_head.weight"] * weight["model.norm.weight"] @ q
    made["model.norm.weight"] = torch.ones(d)
    return model.changed([Replaced(n, t.float(), ties="apart") for n, t in made.items()]), q.float()


@cache
def llama() -> pl.Model:
    model = opened("llama")
    gains = [Replaced(n, 1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
             for n, p in model.module.named_parameters() if "norm" in n]  # fmt: skip
    return model.changed(gains)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "gptj"])
def test_a_model_stitched_to_itself_is_itself_bit_for_bit(family: str) -> None:
    model = opened(family)
    text = "The capital of France is"
    stitch = Stitch("identity", after=1, into=1).fit(model, model, TEXTS[:2])
    assert torch.equal(stitch.stitched(model, model, text).logits, model.run(text).logits)
    assert float(stitch.penalty(model, model, TEXTS[:2]).data.penalty) == 0
    other = Stitch("identity", after=2, into=0).fit(model, model, TEXTS[:2])
    value = model.run(text, keep=["layers.2.resid_post"]).tensor("layers.2.resid_post")
    by_hand = model.run(text, edits=[pl.Patch("layers.0.resid_post", value)]).logits
    torch.testing.assert_close(other.stitched(model, model, text).logits, by_hand)


def test_a_rotated_copy_speaks_the_same_language_in_another_basis() -> None:
    model = llama()
    turned, q = rotated(model)
    torch.testing.assert_close(turned.run("The capital").logits, model.run("The capital").logits, atol=1e-4, rtol=1e-4)
    found = stitching(model, turned, TEXTS, after=[1], into=[1], kinds=["identity", "orthogonal", "affine", "ridge", "low_rank"],
                      rank=4, controls=["shuffled", "redrawn", "tokens", "permuted", "redrawn receiver"], held_out=60)  # fmt: skip
    cost = found.data.penalty[:, 0, 0]
    assert abs(float(cost.sel(map="orthogonal"))) < 1e-4 and abs(float(cost.sel(map="affine"))) < 1e-3
    assert float(cost.sel(map="identity")) > 0.01 and float(cost.sel(map="low_rank")) > float(cost.sel(map="affine"))
    assert float(found.data.error.sel(map="orthogonal")[0, 0]) < 1e-8
    worse = found.data.control_penalty.sel(map="orthogonal")[:, 0, 0]
    assert (abs(worse) > 1e-3).all()  # a random model loses nothing it knew, but it becomes another
    assert np.isnan(found.data.control_penalty.sel(control="permuted", map="identity")).all()
    stitch = Stitch("orthogonal", after=1, into=1).fit(model, turned, TEXTS)
    torch.testing.assert_close(stitch.weight_, q, atol=1e-4, rtol=1e-3)
    nll = [
        float(
            -m.run(TEXTS[0])
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, m.inputs(TEXTS[0]).stream("").ids[0, 1:, None])
            .mean()
        )
        for m in (turned,)
    ]
    said = stitch.penalty(model, turned, TEXTS[:1])
    assert float(said.data.receiver) == pytest.approx(nll[0], abs=1e-4)


def test_maps_are_their_closed_forms() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.normal(size=(80, 5))
    X, Y = (torch.tensor(v, dtype=torch.float32) for v in (x, y))
    w, b = _solve("affine", X, Y, 2, 0.1)
    full, *_ = np.linalg.lstsq(np.c_[x, np.ones(80)], y, rcond=None)
    np.testing.assert_allclose(np.r_[w, b[None]], full, atol=1e-5)
    w, b = _solve("ridge", X, Y, 2, 0.1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    slow = np.linalg.solve(xc.T @ xc + 0.1 * np.mean(np.diag(xc.T @ xc)) * np.eye(6), xc.T @ yc)
    np.testing.assert_allclose(w, slow, atol=1e-5)
    w, _ = _solve("low_rank", X, Y, 2, 0.1)
    made = xc @ full[:6]
    u, s, v = np.linalg.svd(made, full_matrices=False)  # the fitted values cut to rank 2: Eckart and Young
    np.testing.assert_allclose(xc @ w.numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)
    from scipy.linalg import orthogonal_procrustes

    z = rng.normal(size=(80, 6))
    np.testing.assert_allclose(
        _solve("orthogonal", X, torch.tensor(z), 2, 0)[0], orthogonal_procrustes(x, z)[0], atol=1e-5
    )
    semi, _ = _solve("orthogonal", X, Y, 2, 0)
    np.testing.assert_allclose(semi.T @ semi, np.eye(5), atol=1e-5)


def test_a_stitch_crosses_widths_and_tokenizers_and_is_kept_with_both_digests(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.zoo import build

    receiver, module = llama(), build("gpt2", layers=3)
    letters = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0} | {c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")},
            unk_token="[UNK]",
        )
    )
    letters.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    sender = pl.load(module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]"))
    (pair,) = pairs(sender, receiver, ["The Rome is"], 100, 50)
    assert pair.columns.tolist() == [2, 6, 8]
    assert pair.exact.all() and pair.inner.tolist() == [False, True, True]
    (back,) = pairs(receiver, sender, ["The Rome is"], 100, 50)
    assert back.columns.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2] and back.exact.tolist() == [
        i in (2, 6, 8) for i in range(9)
    ]
    assert back.seen.tolist() == [i >= 2 for i in range(9)]
    stitch = Stitch("ridge", after=1, into=2).fit(sender, receiver, TEXTS)
    kept = Stitch.load(stitch.save(tmp_path / "stitch.safetensors"))
    kept.check(sender, receiver)
    assert torch.equal(kept.weight_, stitch.weight_) and kept.kind == "ridge" and kept.error_ == stitch.error_
    assert kept.stitched(sender, receiver, "The Rome is").logits.shape[1] == 3
    with pytest.raises(InputError, match="sender belongs to other weights"):
        kept.check(receiver, receiver)
    with pytest.raises(InputError, match="is no Stitch"):
        Stitch.load(Path(__file__))


def test_a_trained_stitch_gains_on_its_texts_and_says_what_it_is() -> None:
    model = llama()
    plain, trained = (
        Stitch(kind, after=0, into=2, steps=20, learning_rate=1e-2, batch=4).fit(model, model, TEXTS[:8] * 2)
        for kind in ("affine", "trained")
    )
    costs = [float(s.penalty(model, model, TEXTS[:8]).data.penalty) for s in (plain, trained)]
    assert costs[1] < costs[0] and len(trained.losses_) == 20
    before = [p.clone() for p in model.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))


def test_what_cannot_be_stitched_is_refused_by_name() -> None:
    model = opened("llama")
    for other, said in (("bert", "looks ahead"), ("t5", "two stacks")):
        with pytest.raises(Refused, match=said):
            Stitch("ridge").fit(opened(other), model, TEXTS)
    with pytest.raises(InputError, match="kind='rotation'"):
        Stitch("rotation")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least"):
        Stitch("affine").fit(model, model, TEXTS[:2])
    with pytest.raises(InputError, match="not fitted"):
        Stitch().stitched(model, model, "The")
    with pytest.raises(InputError, match="a number below 4"):
        Stitch(after=9).fit(model, model, TEXTS)
    with pytest.raises(InputError, match="no control"):
        stitching(model, model, TEXTS, controls=["nothing"])
    with pytest.raises(InputError, match="layers=..: expected a number"):
        stitching(model, model, TEXTS, after=[], into=[0])
