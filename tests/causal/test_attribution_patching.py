"""Attribution patching equals gradients by hand; its fixes mend what they are there to mend; its check is honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pellucid import Model, load
from pellucid.causal.attribution_patching import attribution_patching
from pellucid.engine.edits import Patch
from pellucid.metrics import logit_difference
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
    result = attribution_patching(model, clean, corrupted, metric=METRIC, grad_drop=True, check=0)
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


def test_the_check_patches_for_real_and_counts_random_nodes_too() -> None:
    model = opened("gpt2", layers=3)
    clean, corrupted = ids(0), ids(1)
    result = attribution_patching(model, clean, corrupted, metric=METRIC, check=4)
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


def test_a_prompt_alone_and_in_a_padded_batch_gets_the_same_estimate() -> None:
    model = opened("llama")
    clean, corrupted = (
        ["The city of Paris", "The capital of France is in the"],
        ["The store of Rome", "The city of Italy is in the"],
    )
    over = ["layers.*.attn.heads.*.q", "layers.*.attn.heads.*.k@-1", "layers.*.attn.heads.*.k", "layers.*.mlp.out"]
    both = attribution_patching(model, clean, corrupted, over=over, metric=METRIC, check=0)
    alone = [
        attribution_patching(model, c, d, over=over, metric=METRIC, check=0)
        for c, d in zip(clean, corrupted, strict=True)
    ]
    np.testing.assert_allclose(both.estimate, np.mean([a.estimate for a in alone], 0), atol=1e-6)
