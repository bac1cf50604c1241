"""Generation under edits: with a cache and without, together and one by one, it is the same text; nothing global moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from pellucid import Ablate, Patch, ProjectOut, Replace, Scale, Steer
from pellucid.engine.edits import Edit, Step
from pellucid.errors import InputError
from pellucid.model import Model, load
from tests.engine.hand import PROMPTS, opened
from tests.zoo import build, tokenizer

FAMILIES = ["llama", "gpt2", "gptj", "gemma2", "mixtral", "falcon", "bloom", "opt", "mistral", "t5", "bart"]
NOISE = torch.randn(48, generator=torch.Generator().manual_seed(2))


def even(step: Step) -> bool:
    return step.index % 2 == 0


def some(step: Step) -> torch.Tensor:
    """A decision for each prompt, from what it has said so far."""
    return step.tokens.sum(1) % 2 == 0


EDITS: dict[str, Callable[[str], list[Edit]]] = {
    "nothing": lambda s: [],
    "steer": lambda s: [Steer(f"{s}layers.1.resid_post", NOISE[:32], 2.0)],
    "steer, now and then": lambda s: [Steer(f"{s}layers.0.resid_pre", NOISE[:32], 2.0, when=even)],
    "steer, by what is said": lambda s: [Steer(f"{s}layers.0.mlp.out", NOISE[:32], 3.0, when=some)],
    "head": lambda s: [Ablate(f"{s}layers.0.attn.heads.1"), Ablate(f"{s}layers.1.attn.heads.2")],
    "queries": lambda s: [Scale(f"{s}layers.0.attn.heads.1.q", -3.0)],
    "keys": lambda s: [Scale(f"{s}layers.0.attn.k", -2.0)],
    "keys, now and then": lambda s: [Scale(f"{s}layers.0.attn.k", -2.0, when=even)],
    "values": lambda s: [Replace(f"{s}layers.1.attn.heads.3.v", lambda x: x.flip(-1))],
    "values of the prompt": lambda s: [Scale(f"{s}layers.1.attn.v@-1", -2.0)],
    "pattern": lambda s: [Ablate(f"{s}layers.1.attn.heads.0.pattern"), Scale(f"{s}layers.0.attn.scores", 2.0)],
    "pattern, now and then": lambda s: [Scale(f"{s}layers.1.attn.pattern", 0.3, when=even)],
    "prompt positions": lambda s: [Scale(f"{s}layers.0.resid_post@-1", -1.0), ProjectOut(f"{s}layers.1.resid_post@0", NOISE[:32])],
    "mlp": lambda s: [Scale(f"{s}layers.1.mlp.out", 3.0)],
    "final norm": lambda s: [Replace("final_norm", lambda x: x.flip(-1), when=even)],
}  # fmt: skip


def edits_for(family: str, kind: str) -> list[Edit]:
    return EDITS[kind]("decoder." if family in ("t5", "bart") else "")


def supported(family: str, kind: str) -> bool:
    """Four families do everything; the others a little, BART without a final norm."""
    return family in ("llama", "gptj", "mistral", "t5") or kind in (
        "nothing",
        "steer, by what is said",
        "keys, now and then",
        "pattern",
    )


CASES = [(f, k) for f in FAMILIES for k in EDITS if supported(f, k)]


def listened(model: Model, prompts: list[str], edits: list[Edit], **options: Any) -> tuple[Tensor, Tensor]:
    """What is generated, [batch, step], and the logits each token was chosen from, [batch, step, vocabulary]."""
    seen: list[Tensor] = []
    model.generate(prompts, max_new_tokens=1)  # at the first padded batch a model is asked how it counts positions
    hook = model.module.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1]))
    try:
        return model.generate(prompts, edits=edits, max_new_tokens=8, **options).tokens, torch.stack(seen, 1)
    finally:
        hook.remove()


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_generating_with_a_cache_equals_generating_without_and_one_by_one(family: str, kind: str) -> None:
    model, edits = opened(family), edits_for(family, kind)
    cached, logits = listened(model, PROMPTS, edits)
    again, without = listened(model, PROMPTS, edits, use_cache=False)
    assert torch.equal(cached, again)
    assert close(logits, without)
    for b, prompt in enumerate(PROMPTS):
        alone, wanted = listened(model, [prompt], edits)
        n = alone.shape[1]
        assert torch.equal(cached[b, :n], alone[0])
        assert close(logits[b, :n], wanted[0])
        assert set(cached[b, n:].tolist()) <= {0, 2}  # padding behind the end
    if kind != "nothing" and family != "bart":  # whose tiny twin says one token over and over
        plain = listened(model, PROMPTS, [])[1]
        n = min(plain.shape[1], logits.shape[1])
        assert not close(plain[:, :n], logits[:, :n])


@pytest.mark.parametrize("family", ["llama", "gptj", "mistral"])
@pytest.mark.parametrize("kind", ["nothing", "steer", "head", "queries", "keys", "values", "pattern", "mlp"])
def test_every_token_is_the_best_of_a_plain_run_of_what_came_before(family: str, kind: str) -> None:
    model, edits = opened(family), edits_for(family, kind)
    tokens = model.inputs(PROMPTS[0]).tensors["input_ids"]
    said = model.generate(PROMPTS[0], edits=edits, max_new_tokens=6).tokens
    for token in said[0]:
        assert model.run(tokens, edits=edits).logits[0, -1].argmax() == token
        tokens = torch.cat([tokens, token.reshape(1, 1)], 1)


def test_a_reference_serves_the_prompt_and_leaves_new_tokens_alone() -> None:
    model, site = opened("llama"), "layers.0.resid_post"
    source = model.run(PROMPTS[0].replace("France", "Italy"), keep=[site])
    for kind in (Patch(site, source), Patch(site + "@'France'", source), Ablate(site + "@3", "position_mean", source)):
        texts = [model.generate(PROMPTS[0], edits=[kind], use_cache=c, max_new_tokens=8).tokens for c in (True, False)]
        assert torch.equal(*texts)
    italy = model.generate(PROMPTS[0].replace("France", "Italy"), max_new_tokens=1).tokens
    assert torch.equal(model.generate(PROMPTS[0], edits=[Patch(site, source)], max_new_tokens=1).tokens, italy)


def test_a_mean_over_the_batch_is_no_reference_while_generating() -> None:
    with pytest.raises(InputError, match="while generating needs reference="):
        opened("llama").generate(PROMPTS, edits=[Ablate("layers.0.attn.out", "mean")])


def test_edits_of_an_encoder_hold_for_all_that_is_generated() -> None:
    model = opened("t5")
    edits: list[Edit] = [Scale("encoder.layers.1.resid_post", -1.0), Ablate("decoder.layers.0.cross.heads.1.k@0")]
    cached, plain = (model.generate(PROMPTS, edits=edits, use_cache=c, max_new_tokens=8).tokens for c in (True, False))
    assert torch.equal(cached, plain)
    inputs = model.inputs(PROMPTS[0])
    assert model.run(inputs, edits=edits).logits[0, -1].argmax() == cached[0, 0]


def test_a_static_cache_changes_nothing() -> None:
    model = opened("llama")
    config, edits = model.module.generation_config, edits_for("llama", "keys") + edits_for("llama", "pattern")
    wanted = model.generate(PROMPTS, edits=edits, max_new_tokens=8).tokens
    config.cache_implementation = "static"
    try:
        assert torch.equal(model.generate(PROMPTS, edits=edits, max_new_tokens=8).tokens, wanted)
    finally:
        config.cache_implementation = None


def test_sampling_depends_on_its_seed_and_leaves_the_global_generator_alone() -> None:
    model = opened("llama")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (model.generate(PROMPTS, temperature=1.0, seed=s, max_new_tokens=10).tokens for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    cold = model.generate(PROMPTS, temperature=1e-4, seed=3, max_new_tokens=10).tokens
    assert torch.equal(cold, model.generate(PROMPTS, max_new_tokens=10).tokens)


def test_sampling_follows_the_models_distribution() -> None:
    model = opened("llama")
    tokens = model.inputs(PROMPTS[0]).tensors["input_ids"].expand(4000, -1)
    drawn = model.generate(tokens, temperature=0.7, top_k=0, max_new_tokens=1).tokens[:, 0]
    wanted = (model.run(tokens[:1]).logits[0, -1] / 0.7).softmax(-1)
    shares = torch.bincount(drawn, minlength=97) / 4000
    assert float((shares - wanted).abs().max()) < 4 * float((wanted.max() / 4000).sqrt())


def test_a_model_that_cannot_generate_says_so() -> None:
    with pytest.raises(InputError, match="BertForMaskedLM does not generate text"):
        opened("bert").generate(PROMPTS[0])
    torch.manual_seed(0)
    classifier = load(BertForSequenceClassification(build("bert").config).eval(), tokenizer=tokenizer())
    with pytest.raises(InputError, match="BertForSequenceClassification does not generate text"):
        classifier.generate([PROMPTS[0], "Mary"])  # whatever padding on the left would do to it


def test_a_long_generation_under_a_condition_that_never_holds_is_the_plain_one() -> None:
    model = opened("llama")
    never = [Scale("layers.0.resid_pre", 0.0, when=lambda step: False)]
    plain = model.generate(PROMPTS, max_new_tokens=20).tokens
    assert torch.equal(model.generate(PROMPTS, edits=never, max_new_tokens=20).tokens, plain)
