"""Path patching equals a slow version of itself made of plain torch hooks on the family's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid import Model, load
from pellucid.causal.path_patching import path_patching
from pellucid.errors import InputError, Refused
from pellucid.metrics import logit, logit_difference
from tests.zoo import build, tokenizer

METRIC = logit_difference(7, 9)
FAMILIES = ["gpt2", "llama", "gptj"]
HEADS, WIDTH, LENGTH = 4, 8, 7


class Slow:
    """One model's modules by hand: what a head writes from (`z`), projections and MLPs of each layer."""

    def __init__(self, family: str) -> None:
        self.module = build(family, layers=3)
        self.model: Model = load(self.module, tokenizer=tokenizer(self.module))
        blocks = self.module.model.layers if family == "llama" else self.module.transformer.h
        self.fused = family == "gpt2"
        name = {"gpt2": "c_proj", "llama": "o_proj", "gptj": "out_proj"}[family]
        attention = [b.self_attn if family == "llama" else b.attn for b in blocks]
        self.out = [getattr(a, name) for a in attention]
        self.attention, self.mlp = attention, [b.mlp for b in blocks]
        self.kv_heads = 2 if family == "llama" else HEADS
        generator = torch.Generator().manual_seed(1)
        self.clean = torch.randint(5, 97, (2, LENGTH), generator=generator)
        self.corrupted = torch.randint(5, 97, (2, LENGTH), generator=generator)

    def score(self, logits: Tensor) -> Tensor:
        return logits[:, -1, 7] - logits[:, -1, 9]

    def read(self, ids: Tensor) -> dict[tuple[str, int], Tensor]:
        """What enters every output projection ("z") and leaves every MLP ("mlp")."""
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(kind: str, layer: int) -> Callable[..., None]:
            def before(module: nn.Module, args: Any) -> None:
                seen[kind, layer] = args[0].detach().clone()

            def after(module: nn.Module, args: Any, output: Any) -> None:
                seen[kind, layer] = output.detach().clone()

            return before if kind == "z" else after

        handles = [m.register_forward_pre_hook(keep("z", i)) for i, m in enumerate(self.out)]
        handles += [m.register_forward_hook(keep("mlp", i)) for i, m in enumerate(self.mlp)]
        self.module(ids)
        for handle in handles:
            handle.remove()
        return seen

    @contextmanager
    def fixed(self, values: dict[tuple[str, int], Tensor]) -> Iterator[None]:
        """Put values in at these places (NaN: leave as it is)."""

        def put(new: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: torch.where(torch.isnan(new), x, new)

        handles = []
        for (kind, layer), new in values.items():
            change = put(new)
            if kind == "z":
                before = lambda m, a, c=change: (c(a[0]), *a[1:])  # noqa: E731
                handles.append(self.out[layer].register_forward_pre_hook(before))
            elif kind == "mlp":
                handles.append(self.mlp[layer].register_forward_hook(lambda m, a, o, c=change: c(o)))
            else:
                handles.append(self.projection(kind, layer).register_forward_hook(lambda m, a, o, c=change: c(o)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def projection(self, port: str, layer: int) -> nn.Module:
        attention = self.attention[layer]
        return attention.c_attn if self.fused else getattr(attention, f"{port}_proj")

    def columns(self, port: str, head: int) -> slice:
        """Where a head's q, k or v stands in its projection's output."""
        if port in ("k", "v"):
            head //= HEADS // self.kv_heads
        start = head * WIDTH + ("qkv".index(port) * HEADS * WIDTH if self.fused else 0)
        return slice(start, start + WIDTH)

    def path(
        self, sender: tuple[str, int, int], receiver: tuple[str, int, int], direct: bool, ports: str = "qkv"
    ) -> Tensor:
        """The metric's change by hand, for one sender and one receiver ("z" with ports, or "mlp")."""
        with torch.no_grad():
            clean, corrupted = self.read(self.clean), self.read(self.corrupted)
            held = {k: v.clone() for k, v in clean.items() if direct or k[0] == "z"}
            kind, layer, head = sender
            where = slice(head * WIDTH, (head + 1) * WIDTH) if kind == "z" else slice(None)
            held[kind, layer] = clean[kind, layer].clone()
            held[kind, layer][..., where] = corrupted[kind, layer][..., where]
            kind, layer, head = receiver
            new = torch.full_like(clean[kind, layer], float("nan"))
            if kind == "mlp":
                held.pop(receiver[:2], None)
                with self.fixed(held):
                    new = self.read(self.clean)[receiver[:2]]
            else:
                arrived: dict[str, Tensor] = {}
                with self.fixed(held):
                    for port in ports:
                        hook = lambda m, a, o, p=port: arrived.update({p: o.clone()})  # noqa: E731
                        handle = self.projection(port, layer).register_forward_hook(hook)
                        self.module(self.clean)
                        handle.remove()
                put = {}
                for port, x in arrived.items():
                    only = torch.full_like(x, float("nan"))
                    only[..., self.columns(port, head)] = x[..., self.columns(port, head)]
                    old = put.get((port if not self.fused else "qkv", layer))
                    only = only if old is None else torch.where(torch.isnan(only), old, only)
                    put[port if not self.fused else "qkv", layer] = only
                with self.fixed(put):
                    z = self.read(self.clean)["z", layer]
                where = slice(head * WIDTH, (head + 1) * WIDTH)
                new[..., where] = z[..., where]
            with self.fixed({receiver[:2]: new}):
                edited = self.score(self.module(self.clean).logits)
            return edited - self.score(self.module(self.clean).logits)


@pytest.fixture(scope="module", params=FAMILIES)
def slow(request: pytest.FixtureRequest) -> Slow:
    return Slow(request.param)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("ports", ["q", "k", "v", "qkv"])
def test_a_heads_effect_on_one_input_of_a_later_head_equals_plain_hooks(slow: Slow, ports: str, direct: bool) -> None:
    port = f".{ports}" if len(ports) == 1 else ""
    result = path_patching(
        slow.model, slow.clean, slow.corrupted, over="layers.0:2.attn.heads.*",
        receivers=f"layers.2.attn.heads.1{port}", metric=METRIC, direct=direct, denoise=False,
    )  # fmt: skip
    assert result.effect.dims == ("layer", "head")
    for layer, head in [(0, 0), (0, 3), (1, 2)]:
        expected = slow.path(("z", layer, head), ("z", 2, 1), direct, ports).mean()
        assert result.effect.sel(layer=layer, head=head).item() == pytest.approx(expected.item(), abs=2e-6)
    assert abs(result.effect.values).max() > 1e-4


@pytest.mark.parametrize("direct", [True, False])
def test_mlps_send_and_receive_like_plain_hooks(slow: Slow, direct: bool) -> None:
    result = path_patching(
        slow.model, slow.clean, slow.corrupted, over=["layers.0.mlp.out", "layers.1.attn.heads.2"],
        receivers="layers.2.mlp.out", metric=METRIC, direct=direct, denoise=False,
    )  # fmt: skip
    for site, sender in [("layers.0.mlp.out", ("mlp", 0, 0)), ("layers.1.attn.heads.2", ("z", 1, 2))]:
        expected = slow.path(sender, ("mlp", 2, 0), direct).mean()
        assert result.effect.sel(site=site).item() == pytest.approx(expected.item(), abs=2e-6)


def test_several_receivers_act_together_and_positions_narrow_senders_and_receivers() -> None:
    slow = Slow("gpt2")
    both = path_patching(
        slow.model, slow.clean, slow.corrupted, over="layers.0.attn.heads.1@*",
        receivers=["layers.2.attn.heads.0.v", "layers.2.attn.heads.3.v"], metric=METRIC,
    )  # fmt: skip
    assert both.effect.dims == ("position",)
    assert both.effect.sizes["position"] == LENGTH
    at_last = path_patching(
        slow.model, slow.clean, slow.corrupted, over="layers.0.attn.heads.1@-1",
        receivers="layers.2.attn.heads.0.q@2", metric=METRIC,
    )  # fmt: skip
    assert at_last.effect.item() == pytest.approx(
        0.0, abs=1e-6
    )  # what the last position says cannot reach an earlier query


def test_direct_paths_to_the_last_residual_are_the_heads_direct_effect_when_there_is_no_final_norm() -> None:
    slow = Slow("gpt2")
    slow.module.transformer.ln_f = nn.Identity()
    model = load(slow.module, tokenizer=tokenizer(slow.module))
    result = path_patching(
        model, slow.clean, slow.corrupted, over="layers.*.attn.heads.*", receivers="layers.2.resid_post",
        metric=METRIC, denoise=False,
    )  # fmt: skip
    clean, corrupted = slow.read(slow.clean), slow.read(slow.corrupted)
    reader = (slow.module.lm_head.weight[7] - slow.module.lm_head.weight[9]).detach()
    for layer in range(3):
        change = (corrupted["z", layer] - clean["z", layer])[:, -1].unflatten(-1, (HEADS, WIDTH))
        weight = slow.out[layer].weight.unflatten(0, (HEADS, WIDTH)).detach()
        expected = torch.einsum("bhe,hed,d->bh", change, weight, reader).mean(0)
        torch.testing.assert_close(torch.from_numpy(result.effect.values[layer]), expected.double(), atol=2e-6, rtol=0)


def test_noising_and_denoising_name_their_clean_and_corrupted_metric_and_total_effect() -> None:
    slow = Slow("gpt2")
    options: dict[str, Any] = {
        "over": "embed",
        "receivers": "layers.2.resid_post",
        "metric": METRIC,
        "direct": False,
    }
    noising = path_patching(slow.model, slow.clean, slow.corrupted, denoise=False, **options)
    denoising = path_patching(slow.model, slow.clean, slow.corrupted, **options)
    clean, corrupted = (slow.score(slow.module(ids).logits).mean().item() for ids in (slow.clean, slow.corrupted))
    for result, sign in ((noising, 1), (denoising, -1)):
        assert result["clean"].mean().item() == pytest.approx(clean, abs=1e-5)
        assert result["total_effect"].item() == pytest.approx(sign * (corrupted - clean), abs=1e-5)
        assert result["share"].item() == pytest.approx(result["effect"].item() / result["total_effect"].item())
        assert result["total_low"].item() <= result["total_effect"].item() <= result["total_high"].item()
    assert noising.effect.item() != pytest.approx(denoising.effect.item())


def test_prompts_of_unequal_length_and_receivers_without_an_input_are_refused() -> None:
    slow = Slow("gpt2")
    with pytest.raises(InputError, match="pair 0 does not align: clean has 2 tokens and corrupted 3"):
        path_patching(
            slow.model, "The city", "The drink store", over="embed", receivers="layers.1.mlp.out", metric=METRIC
        )
    with pytest.raises(InputError, match="cannot receive: name heads"):
        path_patching(
            slow.model, slow.clean, slow.corrupted, over="embed", receivers="layers.1.attn.out", metric=METRIC
        )


def test_a_gated_head_at_some_positions_is_refused_and_whole_it_is_not() -> None:
    """The gate of gated attention reads the stream beside q, k and v, and is followed for whole prompts only."""
    module = build("qwen3_next", layers=4)
    model = load(module, tokenizer=tokenizer(module))
    layer = next(
        b.index for b in model.anatomy.stacks[0].blocks if "attn" in b.attentions and b.attentions["attn"].gated
    )
    options = {"over": ["embed"], "metric": logit(7)}
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    path_patching(model, clean, corrupted, receivers=[f"layers.{layer}.attn.heads.1"], **options)
    with pytest.raises(Refused, match="a gate that reads the stream too"):
        path_patching(model, clean, corrupted, receivers=[f"layers.{layer}.attn.heads.1@-1"], **options)
