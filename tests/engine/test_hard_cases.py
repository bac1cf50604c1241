"""Models that are compiled, offloaded, in half precision, or built in ways of their own: right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pellucid
from pellucid import Ablate, Patch, Replace, Scale, Steer, metrics
from pellucid.anatomy.wiretap import Wiretap
from pellucid.engine.edits import Edit
from pellucid.engine.run import Session
from pellucid.errors import PellucidError, Refused, SiteError
from pellucid.model import Model
from tests.engine.hand import PROMPTS, call, ids, opened
from tests.zoo import build, inputs, tokenizer

EDITS: list[Edit] = [
    Scale("layers.0.attn.heads.1", 2.0),
    Steer("layers.1.resid_mid@-1", torch.ones(32)),
    Scale("layers.1.attn.pattern", 0.5),
]
HEADS: list[Edit] = [Ablate(f"layers.{layer}.attn.heads.{h}") for layer in range(2) for h in range(4)]


def close(a: Tensor, b: Tensor, tolerance: float = 3e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def twin(family: str = "llama", **options: Any) -> Model:
    module = build(family, **options)
    return pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))


# ---- how a module is held


def test_a_compiled_module_is_edited_like_any_other() -> None:
    wanted = opened("llama").run(PROMPTS, edits=EDITS).logits
    module = build("llama")
    wrapped = pellucid.load(torch.compile(module, backend="eager"), tokenizer=tokenizer(module))
    assert close(wrapped.run(PROMPTS, edits=EDITS).logits, wanted)
    module.compile(backend="eager")
    module(ids())  # compiled now
    for model in (wrapped, pellucid.load(module, tokenizer=tokenizer(module))):
        assert close(model.run(PROMPTS, edits=EDITS).logits, wanted)
    kept = wrapped.run(PROMPTS, keep=["layers.0.attn.q"]).tensor("layers.0.attn.q")
    assert close(kept, opened("llama").run(PROMPTS, keep=["layers.0.attn.q"]).tensor("layers.0.attn.q"))


def test_an_offloaded_module_is_run_edited_and_swept() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = build("llama")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"), offload_buffers=False)
    assert any(p.is_meta for p in module.parameters())
    model = pellucid.load(module, tokenizer=tokenizer(module))
    plain = opened("llama")
    assert close(model.run(PROMPTS, edits=EDITS).logits, plain.run(PROMPTS, edits=EDITS).logits)
    swept, wanted = (m.sweep(PROMPTS, HEADS, metrics.logit_difference(7, 9)) for m in (model, plain))
    assert close(swept.values, wanted.values)
    assert torch.equal(
        model.generate(PROMPTS, edits=EDITS[:2], max_new_tokens=4).tokens,
        plain.generate(PROMPTS, edits=EDITS[:2], max_new_tokens=4).tokens,
    )


@pytest.mark.parametrize("family", ["llama", "bert", "gptj", "gemma2"])
def test_half_precision_is_right_within_its_own_noise(family: str) -> None:
    model, exact = twin(family, dtype=torch.bfloat16), twin(family)
    for name, weight in exact.module.named_parameters():
        weight.data.copy_(model.module.get_parameter(name).float())
    edits = [e for e in EDITS if family != "gptj" or e.site.part != "resid_mid"]  # type: ignore[union-attr]
    given = call(family)
    assert close(model.run(given, edits=edits).logits.float(), exact.run(given, edits=edits).logits, 6e-2)
    made = model.sweep(given, HEADS, metrics.logit_difference(7, 9))
    wanted = exact.sweep(given, HEADS, metrics.logit_difference(7, 9))
    assert made.plan.rung.name == wanted.plan.rung.name
    assert float((made.values - wanted.values).abs().max()) < 6e-2 * float(exact.run(given).logits.abs().max())


def test_double_precision_keeps_its_precision_through_a_sweep() -> None:
    model = twin(dtype=torch.float64)
    made = model.sweep(ids(), HEADS, metrics.logit(7))
    assert made.values.dtype == torch.float64
    for edit, value in zip(HEADS, made.values, strict=True):
        assert float((model.score(model.run(ids(), edits=[edit]), metrics.logit(7)) - value).abs().max()) < 1e-6


# ---- how a family is built

CONSISTENT = [
    "llama",
    "gemma2",
    "bert",
    "t5",
    "bloom",
    "doge",
    "zaya",
    "deepseek_v4",
    "minimax",
    "olmo2",
    "cohere",
    "granite",
    "xmod",
    "jamba",
]


@pytest.mark.parametrize("family", CONSISTENT)
def test_what_is_written_to_the_residual_is_what_the_rest_of_the_block_goes_on_with(family: str) -> None:
    """After an edit the block's own equation still holds: each state is the sum of the (edited) terms that make it."""
    model = opened(family)
    given, stack = model.inputs(inputs(model.module)), model.anatomy.stacks[-1]
    edited = 0
    for block in stack.blocks:
        for part in ("resid_pre", "resid_mid", "attn.out", "cross.out", "mixer.out", "mlp.out"):
            if part not in block.taps:
                continue
            site = f"{stack.prefix}layers.{block.index}.{part}"
            values = met(model, given, Replace(site, lambda x: x * 0.7 + torch.linspace(-1, 1, x.shape[-1])), block)
            states: dict[str, Tensor] = {}
            for i, state in enumerate(block.states):
                total = torch.zeros(()) if state.constant is None else state.constant
                for term in state.terms:
                    tap = term.carried or block.taps.get("resid_pre" if term.source == "in" else term.source)
                    total = total + (values[tap] if tap is not None else states[term.source]) * term.coefficient
                if state.norm_in is not None:
                    assert close(values[state.norm_in], total, 1e-4), (site, i)
                states[f"state {i}"] = total if state.norm_out is None else values[state.norm_out]
            assert close(values[block.taps["resid_post"]], states[f"state {len(block.states) - 1}"], 1e-4), site
            edited += 1
    assert edited >= 3 * len(stack.blocks)


def met(model: Model, given: Any, edit: Edit, block: Any) -> dict[Any, Tensor]:
    """Everything the block's equation is about, under an edit."""
    session = Session(model.anatomy, given, (), [edit])
    taps = {t for p, t in block.taps.items() if p.startswith("resid") or p.endswith(".out")}
    taps |= {t for s in block.states for t in (s.norm_in, s.norm_out, *(term.carried for term in s.terms))}
    session.keeping |= taps - {None}
    with torch.no_grad(), Wiretap(model.module, session.handlers(), len(given)) as wire:
        model.module(**given.tensors)
    session.check(wire)
    return session.kept


@pytest.mark.parametrize("family", ["xlm", "flaubert", "squeezebert"])
def test_residuals_of_layers_that_are_no_modules_are_read_but_not_written(family: str) -> None:
    model = opened(family)
    assert model.run(ids(), keep=["layers.1.resid_pre"]).tensor("layers.1.resid_pre").shape == (2, 7, 32)
    for site in ("layers.0.resid_post", "layers.1.resid_pre", "embed"):
        with pytest.raises(Refused, match="can be kept, but not edited: this layer is no module of its own"):
            model.run(ids(), edits=[Scale(site, 2.0)])
        with pytest.raises(Refused, match="can be kept, but not edited"):
            model.run(ids(), keep=[site], grad_of=metrics.logit(7))


def test_layers_that_share_their_weights_are_edited_apart() -> None:
    model = opened("albert")
    made = [model.run(ids(), edits=[Scale(f"layers.{layer}.attn.heads.1", 3.0)]).logits for layer in range(2)]
    assert not close(made[0], made[1], 1e-3)
    block = model.anatomy.stacks[0].blocks[0]
    module, calls = model.module.get_submodule(block.attentions["attn"].o_proj or ""), [0]

    def second(_: nn.Module, args: Any) -> Any:
        calls[0] += 1
        x = args[0].clone()
        x[..., 8:16] *= 3 if calls[0] == 2 else 1
        return (x,)

    hook = module.register_forward_pre_hook(second)
    assert close(model.module(ids()).logits, made[1])
    hook.remove()


def test_tensors_whose_positions_are_not_the_prompts_are_not_addressed_by_position() -> None:
    model = opened("longformer")  # pads to a multiple of its window
    assert model.run(ids(), edits=[Scale("layers.0.mlp.out", 0.5)]).logits.shape == (2, 7, 97)
    with pytest.raises(Refused, match="positions for a prompt of 7 tokens: they cannot be told apart"):
        model.run(ids(), edits=[Scale("layers.0.mlp.out@-1", 0.5)])
    run = model.run(ids(), keep=["layers.0.mlp.out"])
    with pytest.raises(Refused, match="keep it without '@'"):
        run.tensor("layers.0.mlp.out@-1")
    with pytest.raises(Refused, match="cannot be told apart"):
        model.run(ids(), edits=[Patch("layers.0.mlp.out", run)])


def test_keys_of_a_sliding_window_can_be_edited_beyond_it_while_generating() -> None:
    model = opened("mistral")  # looks back five tokens
    edits = [Scale("layers.0.attn.k@0", -4.0), Scale("layers.1.attn.v", -1.0, when=lambda step: step.index % 2 == 0)]
    cached, plain = (
        model.generate(PROMPTS[1], edits=edits, use_cache=c, max_new_tokens=12).tokens for c in (True, False)
    )
    assert torch.equal(cached, plain)


def test_transformer_lens_names_mean_the_same_sites() -> None:
    model = opened("gpt2")
    for theirs, ours in (
        ("blocks.1.hook_resid_pre", "layers.1.resid_pre"), ("blocks.0.attn.hook_pattern", "layers.0.attn.pattern"),
        ("blocks.1.mlp.hook_post@-1", "layers.1.mlp.neurons@-1"), ("blocks.1.hook_attn_out", "layers.1.attn.out"),
    ):  # fmt: skip
        assert torch.equal(
            model.run(ids(), edits=[Scale(theirs, 0.3)]).logits, model.run(ids(), edits=[Scale(ours, 0.3)]).logits
        )


def test_an_encoder_decoder_site_without_its_stack_names_both() -> None:
    with pytest.raises(SiteError, match=r"write 'encoder.layers.0.resid_pre' or 'decoder.layers.0.resid_pre'"):
        opened("t5").run(PROMPTS, edits=[Scale("layers.0.resid_pre", 2.0)])


def test_a_model_without_a_head_gives_its_last_hidden_states() -> None:
    from transformers import GPT2Model

    torch.manual_seed(0)
    module = GPT2Model(build("gpt2").config).eval()
    model = pellucid.load(module, tokenizer=tokenizer(module))
    run = model.run(ids(), edits=[Scale("layers.1.resid_post", 2.0)], keep=["layers.1.resid_post"])
    assert run.logits.shape == (2, 7, 32)
    made = model.sweep(ids(), HEADS, lambda hidden: hidden[:, -1].norm(dim=-1))
    assert made.plan.rung.name == "stubbed"
    truth = [model.run(ids(), edits=[e]).logits[:, -1].norm(dim=-1) for e in HEADS]
    assert torch.allclose(made.values, torch.stack(truth), atol=1e-5)


def test_errors_are_all_of_one_kind() -> None:
    assert (
        issubclass(SiteError, PellucidError)
        and issubclass(Refused, PellucidError)
        and issubclass(PellucidError, ValueError)
    )
