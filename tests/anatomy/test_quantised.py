"""Quantised models: opened, proven and edited by what their layers do, against the same model with dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pellucid as pl
from pellucid.anatomy.weights import grain, linear_map, packed
from pellucid.errors import Refused
from tests.zoo import build, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, OTHER, TARGET = "The capital of France is", "The capital of Italy is", " Paris"
METRIC = pl.metrics.logit_difference(TARGET, " Rome")
EDITS = [pl.Ablate("layers.0.attn.heads.1"), pl.Ablate("layers.1.mlp.neurons.0:8")]
KINDS = ["4 bit", "8 bit", "int8 weights", "int8 activations"]


def configuration(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind.endswith("bit"):
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(load_in_4bit=kind == "4 bit", load_in_8bit=kind == "8 bit")
    ao = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(
        ao.Int8WeightOnlyConfig() if kind == "int8 weights" else ao.Int8DynamicActivationInt8WeightConfig()
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    build("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[pl.Model, pl.Model]:
    """A quantised model, and one of plain layers with the weights it computes with."""
    model = pl.load(checkpoint, quantization_config=configuration(request.param))
    plain = pl.load(checkpoint).module
    for name, layer in model.module.named_modules():
        if packed(layer):
            width = plain.get_submodule(name).weight.shape[1]
            plain.get_submodule(name).weight.data = linear_map(layer, width)[0].T.float().clone()
    return model, pl.load(plain, tokenizer=tokenizer())


def close(a: Any, b: Any, model: pl.Model) -> None:
    """Equal up to what the kernels of the quantised layers round."""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    coarse = max(grain(m, m.in_features) for m in model.module.modules() if packed(m))
    assert float(b.abs().max()) > 0
    assert float((a - b).abs().max()) <= max(1e-4, 6 * coarse) * float(b.abs().max())


def test_it_is_completely_proven(both: tuple[pl.Model, pl.Model]) -> None:
    model = both[0]
    assert model.anatomy.complete, [p for p in model.anatomy.proofs if p.holds is False]
    assert {"attn.z_out", "mlp.neurons"} <= set(model.anatomy.stacks[0].blocks[0].taps)


def test_edits_act_as_on_the_dequantised_weights(both: tuple[pl.Model, pl.Model]) -> None:
    ours, theirs = both
    close(ours.run(PROMPT).logits, theirs.run(PROMPT).logits, ours)
    close(ours.run(PROMPT, edits=EDITS).logits, theirs.run(PROMPT, edits=EDITS).logits, ours)
    for site in ("layers.1.attn.heads.2.out", "layers.1.mlp.neurons", "layers.0.attn.z_out"):
        close(ours.run(PROMPT, keep=site).tensor(site), theirs.run(PROMPT, keep=site).tensor(site), ours)


def test_edits_are_what_raw_hooks_do(both: tuple[pl.Model, pl.Model]) -> None:
    model = both[0]
    layers, ids = model.module.model.layers, model.inputs(PROMPT).tensors["input_ids"]

    def off(columns: slice) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., columns] = 0
            return (x,)

        return hook

    hooks = [
        layers[0].self_attn.o_proj.register_forward_pre_hook(off(slice(16, 32))),
        layers[1].mlp.down_proj.register_forward_pre_hook(off(slice(0, 8))),
    ]
    with torch.no_grad():
        expected = model.module(input_ids=ids).logits
        continued = model.module.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(model.run(PROMPT, edits=EDITS).logits.detach(), expected)
    generated = model.generate(PROMPT, edits=EDITS, max_new_tokens=4).tokens
    assert torch.equal(generated, continued[:, ids.shape[1] :])


def test_weights_are_what_the_layers_do(both: tuple[pl.Model, pl.Model]) -> None:
    ours, theirs = both
    close(
        pl.neurons.input_weights(ours, "layers.1.mlp.neurons"),
        pl.neurons.input_weights(theirs, "layers.1.mlp.neurons"),
        ours,
    )
    close(
        pl.neurons.output_weights(ours, "layers.1.mlp.neurons"),
        pl.neurons.output_weights(theirs, "layers.1.mlp.neurons"),
        ours,
    )
    close(ours.layers[0].attn.heads[1].weights.OV, theirs.layers[0].attn.heads[1].weights.OV, ours)


def test_sweeps_are_the_single_runs(both: tuple[pl.Model, pl.Model]) -> None:
    model = both[0]
    heads = [pl.Ablate(f"layers.{i}.attn.heads.{h}") for i in range(2) for h in range(4)]
    swept = model.sweep(PROMPT, heads, METRIC).values
    single = torch.stack([model.score(model.run(PROMPT, edits=[e]), METRIC) for e in heads])
    torch.testing.assert_close(torch.as_tensor(swept), single.detach(), atol=2e-3, rtol=1e-2)
    assert (
        pl.causal.patching(model, PROMPT, OTHER, over="layers.*.attn.heads.*", metric=METRIC).data["effect"].size == 8
    )
    assert pl.lenses.logit_lens(model, PROMPT).data["probability"].size


def test_gradients_are_those_of_the_dequantised_weights_or_refused_by_the_layers_name(
    both: tuple[pl.Model, pl.Model],
) -> None:
    ours, theirs = both
    asked: dict[str, Any] = {"keep": "layers.0.resid_pre", "grad_of": METRIC}
    try:
        found = ours.run(PROMPT, **asked).grad("layers.0.resid_pre")
    except Refused as refused:
        assert "no gradient passes 'model.layers.0" in str(refused)
        with pytest.raises(Refused, match="no gradient"):
            pl.attribution.saliency(ours, PROMPT, TARGET)
        with pytest.raises(Refused, match="no gradient"):
            pl.causal.attribution_patching(ours, PROMPT, OTHER, metric=METRIC)
        return
    close(found, theirs.run(PROMPT, **asked).grad("layers.0.resid_pre"), ours)


def test_circuits_are_those_of_the_dequantised_weights_or_refused_for_their_rounding(
    both: tuple[pl.Model, pl.Model],
) -> None:
    ours, theirs = both
    edges = ["layers.0.mlp->layers.1.mlp", "layers.0.mlp->logits"]
    R = pl.circuits
    calls = [
        lambda m: R.exact_patching(m, PROMPT, METRIC, how="zero", edges=edges).result.data["effect"],
        lambda m: R.edge_attribution(m, PROMPT, METRIC, how="zero").result.data["effect"],
        lambda m: R.head_roles(m, draws=1, length=6).data["induction"],
        lambda m: R.acdc(m, PROMPT, METRIC, threshold=0.02, how="zero"),
    ]
    try:
        calls[0](ours)
    except Refused:
        for call in calls:
            with pytest.raises(Refused, match="quantised layers round what they are given.*load it unquantised"):
                call(ours)
        assert calls[0](theirs).size  # without the rounding of their kernels nothing is refused
        return
    for call in calls[:3]:
        a, b = (np.asarray(call(m).values) for m in both)
        assert (np.isnan(a) == np.isnan(b)).all()
        close(np.nan_to_num(a), np.nan_to_num(b), ours)


def test_an_edge_of_packed_layers_is_what_raw_hooks_do(both: tuple[pl.Model, pl.Model]) -> None:
    """The second MLP reads the stream without what the first one wrote; nothing rests on sums over parts."""
    model = both[0]
    blocks, ids = model.module.model.layers, model.inputs(PROMPT).tensors["input_ids"]
    said: list[Tensor] = []
    with torch.no_grad():
        hooks = [
            blocks[0].mlp.register_forward_hook(lambda m, a, out: said.append(out)),
            blocks[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: (a[0] - said[-1],)),
        ]
        edited = model.module(input_ids=ids).logits[0, -1]
        for hook in hooks:
            hook.remove()
        clean = model.module(input_ids=ids).logits[0, -1]
    by_hand = float((edited[7] - edited[9]) - (clean[7] - clean[9]))
    found = pl.causal.edge_ablation(
        model, PROMPT, over=["layers.0.mlp.out"], receivers=["layers.1.mlp.out"], how="zero",
        metric=pl.metrics.logit_difference(7, 9),
    ).data["effect"]  # fmt: skip
    assert float(found.values.ravel()[0]) == pytest.approx(by_hand, abs=2e-5)


def test_quantised_weights_are_never_changed(both: tuple[pl.Model, pl.Model]) -> None:
    model = both[0]
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(Refused, match="cannot be changed: it is quantised"):
        model.changed(pl.changed.Added(name, torch.ones(64, 1), torch.ones(1, 64)))
    before = copy.deepcopy(model.digest)
    model.run(PROMPT, edits=EDITS)
    assert model.digest == before


def test_an_adapter_on_quantised_layers_answers_as_a_hook_on_what_it_reads(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module = pl.load(checkpoint, quantization_config=configuration("8 bit")).module
    module = peft.get_peft_model(
        module, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False, r=2)
    ).eval()
    model = pl.load(module, tokenizer=tokenizer())
    assert model.anatomy.complete
    ids = model.inputs(PROMPT).tensors["input_ids"]

    def off(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., 16:32] = 0
        return (x,)

    hook = model.module.model.layers[0].self_attn.o_proj.register_forward_pre_hook(off)
    with torch.no_grad():
        expected = model.module(input_ids=ids).logits
    hook.remove()
    torch.testing.assert_close(model.run(PROMPT, edits=EDITS[:1]).logits.detach(), expected)


class Packed(nn.Module):
    """As GPTQ and AWQ pack: eight 4-bit numbers in an integer of 32 bits, with a scale for each group of inputs."""

    def __init__(self, linear: nn.Linear, group: int = 8) -> None:
        super().__init__()
        w = linear.weight.detach().T  # [in, out]
        self.group, self.shape = group, w.shape
        scales = w.unflatten(0, (-1, group)).abs().amax(1) / 7
        whole = (w / scales.repeat_interleave(group, 0)).round().clamp(-8, 7).to(torch.int32) + 8
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        self.register_buffer("qweight", (whole.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1).to(torch.int32))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        whole = ((self.qweight[:, None] >> shifts[:, None]) & 15).flatten(0, 1) - 8
        return x @ (whole.to(x.dtype) * self.scales.repeat_interleave(self.group, 0))


def test_layers_that_pack_four_bits_in_integers_are_known_by_what_they_do() -> None:
    module = build("llama")
    for layer in module.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Packed(linear))
    model = pl.load(module, tokenizer=tokenizer())
    assert model.anatomy.complete
    weight, bias = linear_map(module.model.layers[0].mlp.down_proj, 48)
    assert weight.shape[1] == 32 or bias is not None
    model.run(PROMPT, keep="layers.0.resid_pre", grad_of=METRIC)


def test_float_models_are_not_proven_more_loosely() -> None:
    module = build("llama")
    module.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, out: out * 1.001)
    anatomy = pl.load(module, tokenizer=tokenizer()).anatomy
    assert {p.name for p in anatomy.proofs if p.holds is False} == {"projection"}


def test_methods_with_rules_name_the_packed_layers_they_have_no_rule_for(checkpoint: Path) -> None:
    model = pl.load(checkpoint, quantization_config=configuration("8 bit"))
    for method in (pl.attribution.relevance_propagation, pl.attribution.deeplift):
        with pytest.raises(Refused, match="MatMul8bitLt"):
            method(model, PROMPT, TARGET)


def test_a_tensor_is_asked_whether_it_keeps_its_numbers():
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from pellucid.anatomy.weights import plain
    from tests.elsewhere import Away

    packed = nn.Sequential(nn.Linear(32, 32))
    quantize_(packed, Int8WeightOnlyConfig())
    refused = [packed[0].weight, bitsandbytes.nn.Params4bit(torch.randn(4, 4)), torch.ones(3, dtype=torch.int8)]
    kept = [nn.Parameter(Away(torch.ones(2))), torch.ones(2, dtype=torch.bfloat16), nn.Parameter(torch.ones(2))]
    assert [plain(t) for t in [*refused, *kept]] == [False] * 3 + [True] * 3
