"""Attribution patching equals gradients by hand; its fixes mend what they are there to mend; its check is honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pellucid import Model, load
from pellucid.causal import patching
from pellucid.causal.attribution_patching import attribution_patching
from pellucid.engine.edits import Patch
from pellucid.metrics import logit_difference
from pellucid.tasks import Prompts, indirect_objects
from tests.zoo import build, tokenizer

METRIC = logit_difference(7, 9)


def opened(family: str, **options: Any) -> Model:
    module = build(family, **options)
    return load(module, tokenizer=tokenizer(module))


def ids(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randint(5, 97, (n, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("denoise", [False, True])
def test_the_estimate_is_the_difference_times_the_gradient(family: str, denoise: bool) -> None:
    model = opened(family)
    clean, corrupted = ids(0), ids(1)
    over = ["layers.*.attn.heads.*", "layers.*.mlp.out@*", "layers.0.mlp.neurons.3@-1"]
    result = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, denoise=denoise, check=3)
    base, source = (corrupted, clean) if denoise else (clean, corrupted)
    keep = ["layers.*.attn.z_out", "layers.*.mlp.out", "layers.*.mlp.neurons"]
    run, other = model.run(base, keep=keep, grad_of=METRIC), model.run(source, keep=keep)
    for site, part in [
        ("layers.1.attn.heads.2", lambda x: x[:, :, 2]), ("layers.0.mlp.out@4", lambda x: x[:, 4]),
        ("layers.0.mlp.neurons.3@-1", lambda x: x[:, -1, 3]),
    ]:  # fmt: skip
        whole = site.split("@")[0].replace(".heads.2", ".z_out").removesuffix(".3")
        product = (other.tensor(whole) - run.tensor(whole)) * run.grad(whole)
        expected = part(product).flatten(1).sum(1).mean() if part(product).ndim > 1 else part(product).mean()
        assert result.estimate.sel(site=site).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "over",
    ["layers.1.attn.heads.*.q@*", "layers.1.attn.heads.*.k@*", "layers.1.attn.heads.*.k", "layers.1.attn.heads.*.q"],
)
def test_with_the_qk_fix_queries_and_keys_are_exact_where_all_that_follows_is_linear(family: str, over: str) -> None:
    model = opened(family)
    if family == "gpt2":
        model.module.transformer.ln_f = nn.Identity()
        model.module.transformer.h[1].mlp = Zero()
    else:
        model.module.model.norm = nn.Identity()
        model.module.model.layers[1].mlp = Zero()
    model = load(model.module, tokenizer=model.tokenizer)
    clean, corrupted = ids(0), ids(1)
    fixed = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, check=1000)
    plain = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, qk_fix=False, check=1000)
    np.testing.assert_allclose(fixed.estimated, fixed.exact, atol=3e-6)
    assert np.abs(fixed.exact).max() > 1e-4
    assert fixed["spearman"].item() > 0.98
    assert np.abs(plain.estimated - plain.exact).max() > 10 * np.abs(fixed.estimated - fixed.exact).max()


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.0


def test_grad_drop_is_the_mean_size_over_layers_cut_by_hand() -> None:
    model = opened("gpt2", layers=3)
    clean, corrupted = ids(0), ids(1)
    result = attribution_patching(model, clean, corrupted, metric=METRIC, grad_drop=True, check=0, denoise=False)
    module = model.module
    with torch.no_grad():
        other = model.run(corrupted, keep="layers.*.attn.z_out")
    sizes = []
    for cut in (0, 2):
        block = module.transformer.h[cut]
        handles = [m.register_forward_hook(lambda m, a, o: o.detach()) for m in (block.attn.c_proj, block.mlp)]
        kept: list[torch.Tensor] = []

        def keep(m: nn.Module, a: Any, kept: list[torch.Tensor] = kept) -> Any:
            kept.append(a[0].detach().requires_grad_())
            return (kept[0],)

        handles.append(module.transformer.h[1].attn.c_proj.register_forward_pre_hook(keep))
        logits = module(clean).logits[:, -1]
        (gradient,) = torch.autograd.grad((logits[:, 7] - logits[:, 9]).sum(), kept[0])
        for handle in handles:
            handle.remove()
        change = other.tensor("layers.1.attn.z_out") - kept[0].detach().unflatten(-1, (4, 8))
        sizes.append((change * gradient.unflatten(-1, (4, 8))).sum((1, 3)).abs())
    np.testing.assert_allclose(result.estimate.sel(layer=1), torch.stack(sizes).mean(0).mean(0), atol=1e-6)


class Slow:
    """Layer 0 of a tiny GPT-2 by hand: its patterns from patched queries and keys, and the gradient that reaches them."""

    def __init__(self, model: Model, clean: torch.Tensor, corrupted: torch.Tensor) -> None:
        self.module, self.ids = model.module, clean
        attention = self.module.transformer.h[0].attn
        with torch.no_grad():
            x = [self.module.transformer.h[0].ln_1(self.embedded(i)) for i in (clean, corrupted)]
            split = [attention.c_attn(each).split(32, -1) for each in x]
        (self.q, self.k, self.v), (self.other_q, self.other_k, _) = (
            [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts] for parts in split
        )
        self.before = self.pattern(self.q, self.k)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module.transformer.wte(ids) + self.module.transformer.wpe(torch.arange(ids.shape[1]))

    def pattern(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / 8**0.5
        return scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf).softmax(-1)

    def gradient(self, cut: int | None) -> torch.Tensor:
        """[prompt, head, query, key] of the metric by layer 0's pattern, the outputs of layer `cut` held."""
        kept: list[torch.Tensor] = []

        def keep(m: nn.Module, a: Any) -> Any:
            kept.append(a[0].detach().requires_grad_())
            return (kept[0],)

        handles = [self.module.transformer.h[0].attn.c_proj.register_forward_pre_hook(keep)]
        for block in [] if cut is None else [self.module.transformer.h[cut]]:
            handles += [m.register_forward_hook(lambda m, a, o: o.detach()) for m in (block.attn.c_proj, block.mlp)]
        logits = self.module(self.ids).logits[:, -1]
        (z,) = torch.autograd.grad((logits[:, 7] - logits[:, 9]).sum(), kept[0])
        for handle in handles:
            handle.remove()
        return z.unflatten(-1, (4, 8)).transpose(1, 2) @ self.v.transpose(-1, -2)

    def change(self, port: str, position: int) -> torch.Tensor:
        """[prompt, head, query, key] of the pattern when one query or key is patched."""
        q, k = self.q.clone(), self.k.clone()
        mine, other = (q, self.other_q) if port == "q" else (k, self.other_k)
        mine[:, :, position] = other[:, :, position]
        return self.pattern(q, k) - self.before


@pytest.mark.parametrize("port", ["q", "k"])
def test_atp_star_of_queries_and_keys_equals_patterns_recomputed_and_layers_cut_by_hand(port: str) -> None:
    model = opened("gpt2", layers=3)
    clean, corrupted = ids(0), ids(1)
    slow, over = Slow(model, clean, corrupted), f"layers.0.attn.heads.*.{port}@*"
    fixed = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, check=0, denoise=False)
    star = attribution_patching(
        model, clean, corrupted, over=over, metric=METRIC, grad_drop=True, check=0, denoise=False
    )
    gradient, cut = slow.gradient(None), [slow.gradient(layer) for layer in (1, 2)]
    for position in range(6):
        change = slow.change(port, position)
        expected = (change * gradient).sum((-1, -2)).mean(0)
        np.testing.assert_allclose(fixed.estimate.sel(position=position).values.ravel(), expected, atol=1e-6)
        sizes = torch.stack([(change * each).sum((-1, -2)).abs() for each in cut]).mean((0, 1))
        np.testing.assert_allclose(star.estimate.sel(position=position).values.ravel(), sizes, atol=1e-6)


def test_grad_drop_sees_what_cancels() -> None:
    """A head of layer 0 that writes a direction which the MLP of layer 1 takes away again: no effect by the gradient."""
    model = opened("gpt2", layers=3)
    module = model.module
    with torch.no_grad():
        for parameter in module.transformer.h[1:].parameters():
            parameter.zero_()
        reader = torch.nn.functional.normalize(module.lm_head.weight[7] - module.lm_head.weight[9], dim=0)
        block = module.transformer.h[1]
        block.ln_2 = nn.Identity()
        block.mlp.act = nn.Identity()
        block.mlp.c_fc.weight[:, 0] = reader
        block.mlp.c_proj.weight[0] = -reader
        module.transformer.ln_f = nn.Identity()
    model = load(module, tokenizer=model.tokenizer)
    options: dict[str, Any] = {"over": "layers.0.attn.heads.*", "metric": METRIC, "check": 0, "denoise": False}
    plain = attribution_patching(model, ids(0), ids(1), **options)
    dropped = attribution_patching(model, ids(0), ids(1), grad_drop=True, **options)
    assert np.abs(plain.estimate).max() < 1e-5
    assert dropped.estimate.min() > 1e-4


def test_encoders_cross_attention_and_residuals_are_estimated_too() -> None:
    model = opened("t5")
    clean, corrupted = ids(0), ids(1)
    for over in ("encoder.layers.*.attn.heads.*", "decoder.layers.*.cross.heads.*", "encoder.layers.*.resid_pre@*"):
        found = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, check=2)
        assert np.abs(found.estimate).max() > 0
        star = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, grad_drop=True, check=0)
        assert (star.estimate >= 0).all()
        assert float(star.estimate.max()) > 0
    bert = opened("bert")
    found = attribution_patching(bert, clean, corrupted, over="layers.*.attn.heads.*", metric=METRIC, check=4)
    assert found["spearman"].item() > 0


def test_a_task_brings_the_positions_it_names() -> None:
    model = opened("gpt2")
    prompts = Prompts.from_pairs(
        ["The capital of France is", "The city of Italy is"], ["The capital of Italy is", "The city of France is"],
        [" Paris", " Rome"], [" Rome", " Paris"], model.tokenizer,
    )  # fmt: skip
    named = attribution_patching(model, prompts, over="layers.*.mlp.out@changed", check=0)
    placed = attribution_patching(model, prompts, over="layers.*.mlp.out@-2", check=0)
    np.testing.assert_allclose(named.estimate.values.ravel(), placed.estimate.values.ravel(), atol=1e-7)


@pytest.mark.slow
def test_the_estimate_ranks_smollm2s_heads_as_exact_patching_does(smollm2: Model) -> None:
    prompts = indirect_objects(smollm2.tokenizer, 6)
    found = attribution_patching(smollm2, prompts, check=20, denoise=False)
    assert found["spearman"].item() > 0.8
    assert found["sign_agreement"].item() >= 0.8
    assert found["missed"].item() < 0.5


def test_the_check_patches_for_real_and_counts_random_nodes_too() -> None:
    model = opened("gpt2", layers=3)
    clean, corrupted = ids(0), ids(1)
    result = attribution_patching(model, clean, corrupted, metric=METRIC, check=4, denoise=False)
    assert result.exact.shape == (8,)
    assert result.ranked_high.values.sum() == 4
    for name, exact in zip(result.checked.values, result.exact.values, strict=True):
        source = model.run(corrupted, keep="layers.*.attn.z_out")
        with torch.no_grad():
            edited = model.score(model.run(clean, edits=[Patch(str(name), source)]), METRIC)
            plain = model.score(model.run(clean), METRIC)
        assert exact == pytest.approx((edited - plain).mean().item(), abs=1e-6)
    assert -1 <= result["spearman"].item() <= 1
    assert 0 <= result["missed"].item() <= 1
    assert attribution_patching(model, clean, clean, metric=METRIC, check=0).share.isnull().all()  # of no difference


@pytest.mark.parametrize("grad_drop", [False, True])
def test_a_prompt_alone_and_in_a_padded_batch_gets_the_same_estimate(grad_drop: bool) -> None:
    model = opened("llama")
    clean, corrupted = (
        ["The city of Paris", "The capital of France is in the"],
        ["The store of Rome", "The city of Italy is in the"],
    )
    over = ["layers.*.attn.heads.*.q", "layers.*.attn.heads.*.k@-1", "layers.*.attn.heads.*.k", "layers.*.mlp.out"]
    options: dict[str, Any] = {"over": over, "metric": METRIC, "check": 0, "grad_drop": grad_drop}
    both = attribution_patching(model, clean, corrupted, **options)
    alone = [attribution_patching(model, c, d, **options) for c, d in zip(clean, corrupted, strict=True)]
    np.testing.assert_allclose(both.estimate, np.mean([a.estimate for a in alone], 0), atol=1e-6)


@pytest.mark.parametrize("grad_drop", [False, True])
def test_layers_and_sets_are_nodes_too_and_their_estimates_add_up(grad_drop: bool) -> None:
    model = opened("gpt2", layers=3)
    clean, corrupted = ids(0), ids(1)
    options: dict[str, Any] = {"metric": METRIC, "check": 2, "grad_drop": grad_drop}
    layers = attribution_patching(model, clean, corrupted, over="layers.*", **options)
    assert layers.estimate.dims == ("layer",)
    sets = {f"layer {i}": [f"layers.{i}.attn.out", f"layers.{i}.mlp.out"] for i in range(3)}
    named = attribution_patching(model, clean, corrupted, over=sets, **options)
    np.testing.assert_allclose(named.estimate, layers.estimate, atol=1e-6)
    np.testing.assert_allclose(np.sort(named.exact), np.sort(layers.exact), atol=1e-6)
    exact = patching(model, clean, corrupted, over="layers.*", metric=METRIC)
    checked = {str(n): float(v) for n, v in zip(named.checked.values, named.exact.values, strict=True)}
    for name, value in checked.items():
        assert float(exact.effect.sel(layer=int(name.split()[1]))) == pytest.approx(value, abs=1e-5)
    if not grad_drop:
        parts = attribution_patching(
            model, clean, corrupted, over=[s for each in sets.values() for s in each], **options
        )
        np.testing.assert_allclose(parts.estimate.values.reshape(3, 2).sum(1), layers.estimate, atol=1e-6)
        np.testing.assert_allclose(layers.share, layers.estimate / layers.total_effect, atol=1e-6)
