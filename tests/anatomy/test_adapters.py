"""Adapted models (peft): everything they answer is what the same model with its adapter merged into the weights answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pellucid as pl
from pellucid.anatomy.fingerprint import switches
from pellucid.errors import LoadError, Refused
from tests.zoo import build, tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"
TARGET = " Paris"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
KINDS = {
    "lora": lambda at: peft.LoraConfig(target_modules=at, init_lora_weights=False, r=2, lora_alpha=4),
    "dora": lambda at: peft.LoraConfig(target_modules=at, init_lora_weights=False, r=2, use_dora=True),
    "ia3": lambda at: peft.IA3Config(
        target_modules=at, feedforward_modules=[m for m in at if m in ("down_proj", "o_proj")], init_ia3_weights=False
    ),
}


def adapted(at: list[str], kind: str = "lora", model_type: str = "llama") -> Any:
    torch.manual_seed(0)
    module = peft.get_peft_model(build(model_type), KINDS[kind](at)).eval()
    for name, p in module.named_parameters():  # as after training: nothing is at the value it was made with
        if "lora" in name or "ia3" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return module


def merged(module: Any) -> nn.Module:
    return copy.deepcopy(module).merge_and_unload().eval()


def opened(module: nn.Module) -> pl.Model:
    return pl.load(module, tokenizer=tokenizer())


def same(a: Any, b: Any, scale: float = 1.0) -> None:
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    assert float(b.abs().max()) > 0
    torch.testing.assert_close(a, b, atol=2e-5 * max(scale, float(b.abs().max())), rtol=1e-4)


def agree(model: pl.Model, plain: nn.Module, ask: Callable[[pl.Model], dict[str, Any]] | None = None) -> None:
    """Whether a model answers as one with plain weights does."""
    ask = ask or answers
    expected = ask(opened(plain))
    for what, got in ask(model).items():
        same(got, expected[what])


def few(model: pl.Model) -> dict[str, Any]:
    """What is quickly asked: edits at heads and neurons, in a run and while generating, and weights."""
    edits = [pl.Ablate("layers.0.attn.heads.1"), pl.Ablate("layers.1.mlp.neurons.0:8")]
    return {
        "edited": model.run(PROMPT, edits=edits).logits,
        "generated": model.generate(PROMPT, edits=edits, max_new_tokens=3).tokens,
        "head writes": model.run(PROMPT, keep="layers.1.attn.heads.2.out").tensor("layers.1.attn.heads.2.out"),
        "written by": pl.neurons.output_weights(model, "layers.1.mlp.neurons"),
    }


def answers(model: pl.Model) -> dict[str, Any]:
    """One number or more of every way to ask."""
    edits = [pl.Ablate("layers.0.attn.heads.1"), pl.Ablate("layers.1.mlp.neurons.0:8")]
    metric = pl.metrics.logit_difference(TARGET, " Rome")
    wave = model.run(PROMPT, keep="layers.1.attn.z_out").tensor("layers.1.attn.z_out")[0, 0].cos()
    edges = ["layers.0.attn.heads.1 -> layers.1.mlp", "layers.0.mlp -> layers.1.attn.heads.2.v"]
    return {
        "logits": model.run(PROMPT).logits,
        "edited": model.run(PROMPT, edits=edits).logits,
        "steered": model.run(PROMPT, edits=[pl.Steer("layers.1.attn.z_out", wave)]).logits,
        "z_out": model.run(PROMPT, keep="layers.0.attn.z_out").tensor("layers.0.attn.z_out"),
        "neurons": model.run(PROMPT, keep="layers.1.mlp.neurons").tensor("layers.1.mlp.neurons"),
        "head writes": model.run(PROMPT, keep="layers.1.attn.heads.2.out").tensor("layers.1.attn.heads.2.out"),
        "generated": model.generate(PROMPT, edits=edits, max_new_tokens=6).tokens,
        "heads off": pl.causal.ablation(model, PROMPT, metric=metric).data["effect"].values,
        "neurons off": pl.causal.ablation(
            model, PROMPT, over=[f"layers.1.mlp.neurons.{i}" for i in range(4)], metric=metric
        )
        .data["effect"]
        .values,
        "patched": pl.causal.patching(model, PROMPT, OTHER, over="layers.*.attn.heads.*", metric=metric)
        .data["effect"]
        .values,
        "saliency": pl.attribution.saliency(model, PROMPT, TARGET).data["attribution"].values,
        "lens": pl.lenses.logit_lens(model, PROMPT).data["probability"].values,
        "written by": pl.neurons.output_weights(model, "layers.1.mlp.neurons"),
        "read by": pl.neurons.input_weights(model, "layers.1.mlp.neurons"),
        "OV": model.layers[0].attn.heads[1].weights.OV,
        "QK": model.layers[0].attn.heads[1].weights.QK,
        "edges": pl.circuits.exact_patching(model, PROMPT, metric, how="zero", edges=edges).each.nan_to_num(),
    }


CASES = [
    *(("lora", [at]) for at in PROJECTIONS),
    ("dora", ["embed_tokens"]),
    ("dora", PROJECTIONS[:-2]),
    ("ia3", ["k_proj", "v_proj", "o_proj", "down_proj"]),
    ("ia3", ["q_proj", "gate_proj", "lm_head"]),
]


@pytest.mark.parametrize(("kind", "at"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x)[:20])
def test_an_adapted_model_answers_as_its_merged_weights_do(kind: str, at: list[str]) -> None:
    module = adapted(at, kind)
    ours = opened(module)
    assert ours.anatomy.complete
    agree(ours, merged(module))


def test_a_fused_projection_of_queries_keys_and_values_is_adapted() -> None:
    module = adapted(["c_attn", "c_proj", "c_fc"], model_type="gpt2")
    ours = opened(module)
    assert ours.anatomy.complete
    agree(ours, merged(module))


def two_adapters() -> Any:
    """`default` on the output and down projections, `second` on others as well."""
    module = adapted(["o_proj", "down_proj"])
    torch.manual_seed(1)
    module.add_adapter("second", KINDS["lora"](["o_proj", "q_proj", "up_proj"]))
    return module.eval()


def test_several_adapters_are_switched_added_up_and_turned_off_under_an_open_model() -> None:
    module = two_adapters()
    model = opened(module)
    module.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="cat")
    digests = []
    for active in ("default", "second", "both"):
        module.set_adapter(active)
        agree(model, merged(module), few)
        digests.append(model.digest)
    with module.disable_adapter():
        agree(model, copy.deepcopy(module).unload(), few)
        digests.append(model.digest)
    module.merge_adapter()
    agree(model, merged(module), few)
    digests.append(model.digest)
    assert len(set(digests)) == len(digests)
    assert model.anatomy.complete


def test_an_adapter_that_is_off_when_the_model_is_opened_is_on_the_map_when_it_is_turned_on() -> None:
    module = adapted(["o_proj", "down_proj"])
    with module.disable_adapter():
        model = opened(module)
    assert model.anatomy.complete
    agree(model, merged(module), few)


def test_an_adapter_put_in_after_opening_is_found_and_a_part_held_from_before_says_that_it_is_outdated() -> None:
    module = build("llama").eval()
    model = opened(module)
    before, held = model.anatomy, model.layers[0]
    resid = model.run(PROMPT, keep="layers.0.resid_pre").tensor("layers.0.resid_pre")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(KINDS["lora"](["o_proj", "down_proj", "q_proj"]), module)
    module.eval()
    with pytest.raises(Refused, match="exchanged since it was opened"):
        held(resid)
    assert model.anatomy is not before
    assert "values" in {p.name for p in model.anatomy.proofs if p.holds}
    agree(model, _merged_in_place(module), few)


def _merged_in_place(module: nn.Module) -> nn.Module:
    """The same module tree with every adapted layer replaced by a plain one of its effective weight."""
    plain = copy.deepcopy(module)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            inner = layer.base_layer
            inner.weight.data += layer.get_delta_weight("default")
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, inner)
    return plain


# ---- files


def saved(path: Path, module: Any, with_tokenizer: bool = True) -> tuple[Path, Path]:
    """A base model and an adapter of it, in directories of their own."""
    base, adapter = path / "base", path / "adapter"
    copy.deepcopy(module).unload().save_pretrained(base)
    tokenizer().save_pretrained(base)
    module.peft_config["default"].base_model_name_or_path = str(base)
    module.save_pretrained(adapter)
    return base, adapter


def test_a_directory_that_holds_an_adapter_alone_opens_with_its_base(tmp_path: Path) -> None:
    module = adapted(["o_proj", "v_proj"])
    base, adapter = saved(tmp_path, module)
    model = pl.load(adapter)
    assert model.anatomy.complete
    assert "adapter" in model.loaded.notes[-1]
    same(model.run(PROMPT).logits, opened(merged(module)).run(PROMPT).logits)
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"is an adapter of .*base.*pass base="):
        pl.load(adapter)
    again = pl.load(adapter, base=moved)
    assert again.opened == f"pl.load({str(adapter)!r}, base={moved!r})"
    same(again.run(PROMPT).logits, model.run(PROMPT).logits)
    assert again.digest == model.digest
    with pytest.raises(LoadError, match="is a whole model"):
        pl.load(moved, base=moved)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_tokens_that_are_in_no_text_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    module = peft.get_peft_model(build("llama"), config).eval()
    with pytest.raises(LoadError, match="puts 3 virtual tokens in front"):
        opened(module)
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    module.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoadError, match="puts 3 virtual tokens in front"):
        pl.load(tmp_path / "adapter", base=base)
    assert opened(module.get_base_model()).anatomy.complete


def test_plain_models_have_no_switches() -> None:
    assert all(switches(build(name)) == [] for name in ("gpt2", "llama", "bert", "t5"))
