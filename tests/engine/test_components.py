"""Components run alone do what they do inside the model, and their weights are what the model multiplies
with.

References are run without gradients, as torch picks other attention kernels with them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn import functional as F

import pellucid
from pellucid.engine.components import Layers
from pellucid.errors import InputError, Refused, SiteError
from tests.zoo import build, tokenizer

FAMILIES = (  # noqa: SIM905
    "gpt2 llama bert falcon phi3 gemma2 mixtral gpt_neox albert gptj bloom opt olmo2 deberta-v2 "
    "xlnet granite deepseek_v3 mamba"
).split()
TWO_STACKS = ["t5", "bart"]
PROMPT = "The capital of France is"


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def stacks(families):
    return [(f, i) for f in families for i in range(2 if f in TWO_STACKS else 1)]


def layers_of(model, stack=0):
    found = model.anatomy.stacks[stack]
    return Layers(model.anatomy, found, model.inputs), found.prefix


@pytest.mark.parametrize(("family", "stack"), stacks(FAMILIES + TWO_STACKS))
@torch.no_grad()
def test_a_span_alone_gives_exactly_the_residual_of_the_run(family, stack):
    model = opened(family)
    layers, prefix = layers_of(model, stack)
    n = len(layers)
    run = model.run(PROMPT, keep=[f"{prefix}layers.*.resid_pre", f"{prefix}layers.*.resid_post"])
    for start in range(n):
        made = layers[start:n](run.tensor(f"{prefix}layers.{start}.resid_pre"), PROMPT)
        assert torch.equal(made, run.tensor(f"{prefix}layers.{n - 1}.resid_post"))


@pytest.mark.parametrize(
    ("family", "stack"), stacks(["gpt2", "llama", "bert", "gemma2", "falcon", "bart", "t5", "albert"])
)
@torch.no_grad()
def test_an_attention_or_mlp_alone_gives_exactly_its_contribution(family, stack):
    model = opened(family)
    layers, prefix = layers_of(model, stack)
    for layer in layers:
        at = f"{prefix}layers.{layer.block.index}"
        middle = f"{at}.resid_mid" if "resid_mid" in layer.block.taps else f"{at}.resid_pre"
        run = model.run(PROMPT, keep=[f"{at}.resid_pre", middle, f"{at}.attn.out", f"{at}.mlp.out"])
        assert torch.equal(layer.attn(run.tensor(f"{at}.resid_pre"), PROMPT), run.tensor(layer.attn.site))
        assert torch.equal(layer.mlp(run.tensor(middle), PROMPT), run.tensor(layer.mlp.site))


@torch.no_grad()
def test_cross_attention_alone_reads_the_state_behind_self_attention():
    model = opened("t5")
    layers, _ = layers_of(model, 1)
    run = model.run(
        PROMPT, keep=["decoder.layers.1.resid_pre", "decoder.layers.1.attn.out", "decoder.layers.1.cross.out"]
    )
    state = run.tensor("decoder.layers.1.resid_pre") + run.tensor("decoder.layers.1.attn.out")
    assert torch.equal(layers[1].cross(state, PROMPT), run.tensor("decoder.layers.1.cross.out"))


def test_without_a_prompt_dummy_tokens_of_the_same_size_stand_in():
    model = opened("llama")
    layers, _ = layers_of(model)
    resid = torch.randn(3, 7, 32)
    whole = layers[:](resid)
    assert torch.equal(layers[1](layers[0](resid)), whole)
    assert whole.shape == resid.shape
    tokens = torch.randint(5, 97, (3, 7))
    assert torch.equal(layers[:](resid, tokens), whole)


@torch.no_grad()
def test_padding_counts_where_the_prompts_are_named():
    model = opened("bert")
    layers, _ = layers_of(model)
    prompts = ["The capital of France is Paris", "Mary"]
    run = model.run(prompts, keep=["embed", "layers.1.resid_post"])
    assert torch.equal(layers[:](run.tensor("embed"), prompts), run.tensor("layers.1.resid_post"))


def test_gradients_flow_through_a_span():
    layers, _ = layers_of(opened("gpt2"))
    resid = torch.randn(1, 4, 32, requires_grad=True)
    layers[:](resid).sum().backward()
    assert resid.grad is not None
    assert bool((resid.grad != 0).any())


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "phi3", "bert"])
def test_the_heads_of_an_attention_add_up_to_it(family):
    layers, _ = layers_of(opened(family))
    resid = torch.randn(2, 5, 32)
    attn = layers[1].attn
    with torch.no_grad():
        total = sum(head(resid) for head in attn.heads) + attn.weights.b_O
        torch.testing.assert_close(total, attn(resid))


def normed(model, layer, resid):
    """What the attention of these families reads."""
    module = model.module.get_submodule(layer.block.module)
    name = {
        "gpt2": "ln_1",
        "llama": "input_layernorm",
        "phi3": "input_layernorm",
        "falcon": "input_layernorm",
    }
    name |= {"bert": None, "gpt_neox": "input_layernorm", "opt": "self_attn_layer_norm", "gptj": "ln_1"}
    inner = name[model.module.config.model_type]
    return resid if inner is None else getattr(module, inner)(resid)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "falcon", "bert", "gpt_neox", "opt", "gptj"])
def test_QK_gives_the_scores_of_every_token_with_itself(family):
    """At distance 0 rotations cancel, so this holds at every position, fused and grouped or not."""
    model = opened(family)
    layers, _ = layers_of(model)
    layer = layers[1]
    run = model.run(PROMPT, keep=["layers.1.resid_pre", "layers.1.attn.q", "layers.1.attn.k"])
    w = layer.attn.weights
    with torch.no_grad():
        x = normed(model, layer, run.tensor("layers.1.resid_pre"))[0]
        q, k = run.tensor("layers.1.attn.q")[0], run.tensor("layers.1.attn.k")[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for h, head in enumerate(layer.attn.heads):
        w = head.weights
        by_weights = ((x @ w.W_Q + w.b_Q) * (x @ w.W_K + w.b_K)).sum(-1)
        torch.testing.assert_close(by_weights, (q[:, h] * k[:, h]).sum(-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(w.QK, w.W_Q @ w.W_K.T)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "falcon", "bert"])
def test_OV_behind_the_pattern_gives_what_a_head_writes(family):
    model = opened(family)
    layers, _ = layers_of(model)
    run = model.run(PROMPT, keep=["layers.1.resid_pre", "layers.1.attn.pattern"])
    resid = run.tensor("layers.1.resid_pre")
    with torch.no_grad():
        x = normed(model, layers[1], resid)[0]
        for h, head in enumerate(layers[1].attn.heads):
            w, pattern = head.weights, run.tensor("layers.1.attn.pattern")[0, h]
            expected = pattern @ (x @ w.OV + w.b_V @ w.W_O)
            torch.testing.assert_close(head(resid)[0], expected, rtol=1e-4, atol=1e-5)


def test_rotary_positions_are_named_and_others_are_not():
    assert layers_of(opened("llama"))[0][0].attn.weights.position_dependent
    assert not layers_of(opened("gpt2"))[0][0].attn.weights.position_dependent


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folding_puts_the_norm_into_the_weights(family):
    model = opened(family)
    layers, _ = layers_of(model)
    head, resid = layers[1].attn.heads[2], torch.randn(4, 32)
    centred = resid - resid.mean(-1, keepdim=True) if family == "gpt2" else resid
    bare = centred / centred.square().mean(-1, keepdim=True).sqrt()
    plain, folded = head.weights, head.weights.folded()
    with torch.no_grad():
        x = normed(model, layers[1], resid)
    torch.testing.assert_close(bare @ folded.W_Q + folded.b_Q, x @ plain.W_Q + plain.b_Q, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(folded.W_O, plain.W_O)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_neuron_is_made_from_its_input_weights_and_writes_its_output_vector(family):
    model = opened(family)
    layers, _ = layers_of(model)
    module, neuron, resid = (
        model.module.get_submodule(layers[1].block.module),
        layers[1].mlp.neurons[7],
        torch.randn(2, 3, 32),
    )
    with torch.no_grad():
        activation, written = neuron(resid)
        x = (module.ln_2 if family == "gpt2" else module.post_attention_layernorm)(resid)
        pre = [x @ w + b for w, b in zip(neuron.weights.w_in.values(), neuron.weights.b_in.values(), strict=True)]
        by_weights = F.gelu(pre[0], approximate="tanh") if family == "gpt2" else F.silu(pre[0]) * pre[1]
        total = sum(each.run(resid)[1] for each in layers[1].mlp.neurons)
        bias = module.mlp.c_proj.bias if family == "gpt2" else 0.0
        torch.testing.assert_close(activation, by_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(written, activation[..., None] * neuron.weights.w_out)
        torch.testing.assert_close(total + bias, layers[1].mlp(resid), rtol=1e-4, atol=1e-5)
    assert len(neuron.weights.w_in) == (1 if family == "gpt2" else 2)


def test_queries_behind_a_norm_of_their_own_are_refused_but_OV_is_given():
    weights = layers_of(opened("qwen3"))[0][0].attn.heads[0].weights
    with pytest.raises(Refused, match=r"W_Q is refused.*a norm or another nonlinear step"):
        _ = weights.QK
    assert weights.OV.shape == (32, 32)


def test_latent_attention_is_refused_with_the_reason():
    with pytest.raises(Refused, match="another projection or step before"):
        _ = layers_of(opened("deepseek_v3"))[0][0].attn.weights.W_K


def test_a_decoder_block_asks_for_the_prompt_its_encoder_reads():
    layers, _ = layers_of(opened("t5"), 1)
    with pytest.raises(Refused, match=r"depends on the tokens: say which"):
        layers[0](torch.randn(1, 4, 32))


def test_residuals_that_do_not_fit_the_prompt_are_an_error():
    layers, _ = layers_of(opened("gpt2"))
    with pytest.raises(InputError, match=r"residuals are \[1, 3, d_model\], but the prompt gives \[1, 5\]"):
        layers[0](torch.randn(1, 3, 32), PROMPT)


def test_missing_layers_heads_and_parts_are_named():
    layers, _ = layers_of(opened("gpt2"))
    with pytest.raises(SiteError, match="no layer 9"):
        layers[9]
    with pytest.raises(SiteError, match="no head 4"):
        layers[0].attn.heads[4]
    with pytest.raises(SiteError, match="layer 0 of this model has no cross"):
        _ = layers[0].cross
    with pytest.raises(Refused, match="has no attn: nothing in this block attends"):
        _ = layers_of(opened("mamba"))[0][0].attn


def test_components_print_their_sites():
    layers, _ = layers_of(opened("gpt2"))
    names = [layers[1], layers[0:2], layers[1].attn.heads[-1], layers[0].mlp.neurons[3], layers[1].attn]
    assert [each.site for each in names] == [
        "layers.1.resid_post",
        "layers.0:2.resid_post",
        "layers.1.attn.heads.3",
        "layers.0.mlp.neurons.3",
        "layers.1.attn.out",
    ]
    assert repr(layers[1].attn.heads[2]) == "<Head layers.1.attn.heads.2>"
