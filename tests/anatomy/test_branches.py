"""A writer's contribution is what reaches the stream: heads and neurons held against hooks on the modules themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.anatomy import writers
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from pellucid.anatomy.writers import Writer
from pellucid.causal import edge_ablation
from pellucid.circuits import exact_patching
from pellucid.circuits.execution import wire
from pellucid.errors import Refused
from pellucid.metrics import logit
from tests.zoo import build, inputs
from tests.zoo.tokenizer import tokenizer

PROMPT = "The capital of Peru is"
# a factor on the branch; a factor per channel or a norm behind the projections; parallel; plain
FAMILIES = ["granite", "gemma2", "gemma3_text", "olmo2", "cohere", "gpt2", "llama"]


def loaded(kind: str) -> pl.Model:
    module = build(kind)
    return pl.load(module, tokenizer=tokenizer(module))


def added(model: pl.Model, layer: int) -> tuple[Tensor, Tensor]:
    """What attention and MLP of one block add to the stream, as differences of residuals met by plain hooks."""
    block = model.module.get_submodule(model.anatomy.stacks[-1].blocks[layer].module)
    met: dict[str, Tensor] = {}
    second = getattr(block, "post_attention_layernorm", None)
    hooks = [
        block.register_forward_pre_hook(lambda m, a, k: met.update(pre=(a or (k["hidden_states"],))[0]), with_kwargs=True),
        block.register_forward_hook(lambda m, a, out: met.update(post=out[0] if isinstance(out, tuple) else out)),
        second.register_forward_pre_hook(lambda m, a: met.update(mid=a[0])),
    ]  # fmt: skip
    with torch.no_grad():
        model.module(**model.inputs(PROMPT).tensors)
    for hook in hooks:
        hook.remove()
    return met["mid"] - met["pre"], met["post"] - met["mid"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_heads_and_neurons_add_up_to_the_contribution(kind: str) -> None:
    model = loaded(kind)
    assert next(p for p in model.anatomy.proofs if p.name == "writers").holds
    run = model.run(PROMPT, keep=["layers.*.attn.heads.*.out", "layers.*.attn.out", "layers.*.mlp.*"])
    for block in model.anatomy.stacks[0].blocks:
        heads = range(block.attentions["attn"].heads)
        here = f"layers.{block.index}"
        together = sum(run.tensor(f"{here}.attn.heads.{h}.out") for h in heads)
        whole = run.tensor(f"{here}.attn.out")
        rest = (whole - together)[0]  # the bias of the projection, the same everywhere; no bias in most
        torch.testing.assert_close(rest, rest[:1].expand_as(rest), atol=1e-5, rtol=1e-4)
        writer = Writer.of(model.module, block, "mlp")
        made = writer.total(run.tensor(f"{here}.mlp.neurons"))
        torch.testing.assert_close(made, run.tensor(f"{here}.mlp.out"), atol=1e-5, rtol=1e-4)


def test_with_a_factor_on_the_branch_they_are_the_difference_of_residuals() -> None:
    model = loaded("granite")
    assert model.module.config.residual_multiplier != 1.0
    run = model.run(PROMPT, keep=["layers.*.attn.heads.*.out", "layers.*.mlp.out"])
    for layer in range(len(model.anatomy.stacks[0].blocks)):
        attention, mlp = added(model, layer)
        heads = sum(run.tensor(str(site) + ".out") for site in model.sites(f"layers.{layer}.attn.heads.*"))
        torch.testing.assert_close(heads, attention, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(run.tensor(f"layers.{layer}.mlp.out"), mlp, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_a_head_alone_and_a_neuron_alone_write_what_they_write_in_the_model(kind: str) -> None:
    model = loaded(kind)
    run = model.run(
        PROMPT, keep=["layers.1.resid_pre", "layers.1.resid_mid", "layers.1.attn.heads.0.out", "layers.1.mlp.*"]
    )
    part = model.layers[1]
    torch.testing.assert_close(
        part.attn.heads[0].run(run.tensor("layers.1.resid_pre"), PROMPT),
        run.tensor("layers.1.attn.heads.0.out"),
        atol=1e-5,
        rtol=1e-4,
    )
    _, wrote = zip(
        *(part.mlp.neurons[n].run(run.tensor("layers.1.resid_mid"), PROMPT) for n in range(len(part.mlp.neurons))),
        strict=True,
    )
    torch.testing.assert_close(sum(wrote), run.tensor("layers.1.mlp.out"), atol=1e-5, rtol=1e-4)


def test_exact_patching_and_edge_ablation_agree_with_each_other_and_with_hooks_on_a_scaled_branch() -> None:
    model = loaded("granite")
    metric = logit(5)
    exact = exact_patching(model, [PROMPT], metric, how="zero", edges=["layers.0.mlp->layers.1.mlp"])
    edge = edge_ablation(
        model, PROMPT, over="layers.0.mlp.out", receivers="layers.1.mlp.out", how="zero", metric=metric
    )
    scored = float(exact.result["effect"].sel(source="layers.0.mlp", reader="layers.1.mlp").mean())
    assert scored == pytest.approx(float(edge.effect.mean()), abs=1e-6)
    tensors = model.inputs(PROMPT).tensors
    wrote: list[Tensor] = []
    blocks = model.module.model.layers
    scale = model.module.config.residual_multiplier
    with torch.no_grad():
        clean = model.module(**tensors).logits[0, -1, 5]
        hooks = [
            blocks[0].mlp.register_forward_hook(lambda m, a, out: wrote.append(out * scale)),
            blocks[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: (a[0] - wrote[-1],)),
        ]
        without = model.module(**tensors).logits[0, -1, 5]
        for hook in hooks:
            hook.remove()
    assert scored == pytest.approx(float(without - clean), abs=1e-6)


def failing(anatomy: Anatomy) -> set[str]:
    return {p.name for p in anatomy.proofs if p.holds is False}


def test_a_writer_at_a_wrong_scale_fails_its_proof_alone_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Writer.of.__func__  # type: ignore[attr-defined]

    def louder(cls: Any, *args: Any) -> Writer:
        made = of(cls, *args)
        return replace(made, scale=made.scale * 1.01)

    monkeypatch.setattr(writers.Writer, "of", classmethod(louder))
    module = build("granite")
    anatomy = open_module(module, inputs(module))
    assert failing(anatomy) == {"writers"}
    assert "attn.heads.out" in anatomy.stacks[0].blocks[0].refused


def test_circuits_refuse_a_writer_at_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    written = Writer.written
    monkeypatch.setattr(Writer, "written", lambda self, *args: 1.05 * written(self, *args))
    with pytest.raises(Refused, match="circuits are refused"):
        wire(model)


def test_circuits_refuse_a_reader_that_is_not_on_their_map() -> None:
    model = loaded("qwen3_next")  # the gate of its attention reads the stream
    with pytest.raises(
        Refused, match=r"something that circuits do not know reads the stream \(the gates of the attention"
    ):
        wire(model)


def test_a_whole_head_that_receives_hears_with_its_gate_too() -> None:
    model = loaded("qwen3_5_text")
    layer = next(b.index for b in model.anatomy.stacks[0].blocks if "attn" in b.attentions)
    metric = logit(5)
    heads = [str(s) for s in model.sites(f"layers.{layer}.attn.heads.*")]
    over = f"layers.{layer - 1}.mlp.out"
    found = edge_ablation(model, PROMPT, over={"sender": [over]}, receivers=heads[0], how="zero", metric=metric)
    # by hand: this block's attention reads the stream without the sender; one head's z_out of that goes into the model
    keep = model.run(PROMPT, keep=[over, f"layers.{layer}.resid_pre", f"layers.{layer}.attn.z_out"])
    without = keep.tensor(f"layers.{layer}.resid_pre") - keep.tensor(over)
    z = model.layers[layer].attn.met("attn.z_out", without, PROMPT)
    edited = model.run(PROMPT, edits=[pl.Replace(heads[0], function=lambda x: z[:, :, 0].to(x))])
    effect = float((edited.logits - keep.logits)[0, -1, 5])
    assert float(found.effect.mean()) == pytest.approx(effect, abs=1e-6)
    assert abs(effect) > 1e-5


def passing_on(module: Any) -> Any:
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return module


def one_block_compiled(module: Any) -> Any:
    module.model.layers[0] = torch.compile(module.model.layers[0])
    return module


@pytest.mark.parametrize("wrap", [passing_on, torch.nn.DataParallel, torch.compile, one_block_compiled])
def test_a_wrapped_module_is_the_module(wrap: Any) -> None:
    module = build("llama")
    with torch.no_grad():
        expected = module(input_ids=torch.tensor([[5, 6, 7]])).logits
    model = pl.load(wrap(module), tokenizer=tokenizer(module))
    assert model.anatomy.complete
    torch.testing.assert_close(model.run({"input_ids": torch.tensor([[5, 6, 7]])}).logits, expected)


def test_a_module_without_a_config_is_refused_by_name() -> None:
    class Holder(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

    with pytest.raises(pl.errors.LoadError, match="a Holder has no `config`"):
        pl.load(Holder(build("llama")), tokenizer=None)
