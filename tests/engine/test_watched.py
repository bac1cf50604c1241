"""Watching a generation: what is seen is what a run over prompt and answer has, and what is done to a row is done to it alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.engine.edits import Edit
from pellucid.engine.generation import Generated
from pellucid.engine.inputs import left_padded
from pellucid.engine.steps import Step
from pellucid.errors import InputError, LoadError, PellucidError, Refused
from pellucid.model import Model
from tests.engine.hand import PROMPTS, ids, opened
from tests.zoo import build, tokenizer

V = torch.randn(32, generator=torch.Generator().manual_seed(4))
FAMILIES = ["llama", "gpt2", "gptj", "mistral", "mixtral", "falcon", "t5"]


def stack(family: str) -> str:
    return "decoder." if family in ("t5", "bart") else ""


def padded(model: Model, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    """What transformers' own generate is given."""
    return {k: v for k, v in left_padded(model.inputs(prompts)).tensors.items() if k != "position_ids"}


def whole(model: Model, made: Generated, row: int, **options: Any) -> tuple[Any, int]:
    """A run over prompt and answer, and the position from which the first token was chosen."""
    answer = torch.tensor([made.ids(row)[:-1]], dtype=torch.long)
    if "decoder" in model.inputs(PROMPTS[0]).streams:
        start = model.inputs(PROMPTS[row]).tensors["decoder_input_ids"]
        given = {k: v for k, v in model.inputs(PROMPTS[row]).tensors.items() if k != "decoder_input_ids"}
        return model.run({**given, "decoder_input_ids": torch.cat([start, answer], 1)}, **options), start.shape[1] - 1
    prompt = model.inputs(PROMPTS[row]).tensors["input_ids"]
    return model.run(torch.cat([prompt, answer], 1), **options), prompt.shape[1] - 1


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-4 * max(1.0, float(b.detach().abs().max()))


# ---- sampling is transformers'


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.7},
        {"top_k": 5},
        {"min_p": 0.1, "num_return_sequences": 2},
        {"temperature": 1.3, "repetition_penalty": 1.5, "min_new_tokens": 6},
        {"temperature": 0.9, "typical_p": 0.8, "use_cache": False},
        {"repetition_penalty": 2.0},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "temperature": 1.2},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers_with_the_same_seed(family: str, options: dict[str, Any]) -> None:
    model = opened(family)
    sample = bool({"temperature", "top_p", "top_k", "min_p"} & options.keys())
    tensors = padded(model)
    off = 1 if family == "t5" else tensors["input_ids"].shape[1]
    for seed in (0, 7):
        torch.manual_seed(99)
        state = torch.get_rng_state()
        mine = model.generate(PROMPTS, max_new_tokens=8, seed=seed, **options)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(seed)
        pad = model.module.generation_config.pad_token_id
        wanted = model.module.generate(**tensors, max_new_tokens=8, do_sample=sample, pad_token_id=pad, **options)
        assert torch.equal(mine.tokens, wanted[:, off:])


def test_edits_hold_in_every_beam() -> None:
    model, edits = opened("llama"), [pl.Steer("layers.0.resid_post", V, 3.0)]
    together = model.generate(PROMPTS, max_new_tokens=6, num_beams=3, edits=edits)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, max_new_tokens=6, num_beams=3, edits=edits, use_cache=False)
        assert together.ids(row) == alone.ids()
        logits = whole(model, together, row, edits=edits)[0].logits[0, -len(together.ids(row)) :].log_softmax(-1)
        wanted = logits.gather(1, together.tokens[row, : len(together.ids(row)), None])[:, 0]
        assert close(together.log_probabilities[row, : len(wanted)], wanted)
    for asked in ({"keep": "layers.0.mlp.out"}, {"when": lambda step: None}, {"scores": True}):
        with pytest.raises(Refused, match="beams"):
            model.generate(PROMPTS, num_beams=2, **asked)


# ---- what is kept and seen

SITES = [
    "layers.1.resid_post",
    "layers.0.attn.heads.1.z",
    "layers.1.attn.k",
    "layers.0.attn.pattern",
    "layers.1.mlp.out",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [True, False])
def test_what_is_kept_is_what_a_run_over_prompt_and_answer_has(family: str, cache: bool) -> None:
    model, s = opened(family), stack(family)
    sites = [s + site for site in SITES]
    seen: list[tuple[int, Tensor]] = []

    def look(step: Step) -> None:
        step.record(step[sites[0]].norm(dim=-1))
        seen.append((step.index, step.new(sites[0])))

    edits = [pl.Scale(f"{s}layers.0.mlp.out", 3.0)]
    made = model.generate(
        PROMPTS, keep=sites, scores=True, when=pl.Watch(sites[0], look), edits=edits, max_new_tokens=7, use_cache=cache
    )
    assert [i for i, _ in seen] == list(range(made.tokens.shape[1]))
    for row in range(3):
        run, first = whole(model, made, row, keep=sites, edits=edits)
        n = len(made.ids(row))
        assert close(made.scores[row, :n], run.logits[0, first:])
        for site in sites:
            wanted = run.tensor(site)[0].movedim(1, 0)[first:] if "pattern" in site else run.tensor(site)[0, first:]
            got = made.tensor(site)[row].movedim(1, 0)[:n] if "pattern" in site else made.tensor(site)[row, :n]
            assert close(got[..., : wanted.shape[-1]], wanted), site
        assert close(made.records["look"][row, :n], run.tensor(sites[0])[0, first:].norm(dim=-1))
        if not s:  # all of the prompt in step 0, padding in front
            width = seen[0][1].shape[1]
            assert close(seen[0][1][row, width - first - 1 :], run.tensor(sites[0])[0, : first + 1])
        assert close(
            made.log_probabilities[row, :n],
            run.logits[0, first:].log_softmax(-1).gather(1, made.tokens[row, :n, None])[:, 0],
        )


def test_sites_with_positions_are_kept_of_the_prompt() -> None:
    model = opened("llama")
    made = model.generate(
        PROMPTS, keep=["layers.0.resid_post@-1", "layers.1.resid_post@*", "layers.1.resid_post"], max_new_tokens=4
    )
    run = model.run(PROMPTS, keep=["layers.0.resid_post@-1", "layers.1.resid_post@-1"])
    assert close(made.tensor("layers.0.resid_post@-1"), run.tensor("layers.0.resid_post@-1"))
    assert close(made.tensor("layers.1.resid_post@-1"), run.tensor("layers.1.resid_post@-1"))
    data = made["layers.1.resid_post"]
    assert data.dims == ("batch", "step", "d_model")
    assert data.token.shape == (3, 4)
    with pytest.raises(PellucidError, match="not kept"):
        made.tensor("layers.0.mlp.out")


def test_a_cache_of_fixed_size_shows_the_same() -> None:
    model, sites = (
        opened("llama"),
        ["layers.1.attn.k", "layers.1.attn.v", "layers.0.attn.pattern", "layers.1.resid_post"],
    )
    config = model.module.generation_config
    seen: list[list[Tensor]] = [[], []]
    made = []
    for i, kind in enumerate((None, "static")):
        config.cache_implementation = kind
        try:
            look = pl.Watch(sites, lambda step, i=i: seen[i].extend(step[site] for site in sites))
            made.append(model.generate(PROMPTS, keep=sites, when=look, max_new_tokens=6))
        finally:
            config.cache_implementation = None
    for site in sites:
        assert close(made[0].tensor(site), made[1].tensor(site)), site
    for a, b in zip(*seen, strict=True):
        assert close(a, b[..., : a.shape[-1]])


def test_an_encoder_is_seen_once_and_keeps_being_known() -> None:
    model, site = opened("t5"), "encoder.layers.1.resid_post"

    def look(step: Step) -> None:
        values, real = step.new(site), step.real(site)
        step.record((values * real[..., None]).sum((1, 2)))

    made = model.generate(
        PROMPTS, when=pl.Watch([site, "decoder.layers.0.mlp.out"], look), keep=[site], max_new_tokens=4
    )
    run = model.run(PROMPTS, keep=[site])
    real = run.inputs.stream("encoder").mask
    wanted = (run.tensor(site) * real[..., None]).sum((1, 2))
    assert close(made.records["look"], wanted[:, None].expand(3, 4))
    assert close(made.tensor(site)[real.bool()], run.tensor(site)[real.bool()])


def test_a_rows_answer_is_the_one_it_has_alone_and_says_why_it_ended() -> None:
    model = opened("llama")
    plain = model.generate(PROMPTS, max_new_tokens=10)
    third = plain.ids(0)[2]
    made = model.generate(PROMPTS, max_new_tokens=10, stop=[third])
    assert made.ended[0] == "stop"
    assert made.because[0] == f"token {third}"
    assert made.ids(0) == plain.ids(0)[: plain.ids(0).index(third) + 1]
    assert made.ended[1] in ("length", "stop")
    for row, prompt in enumerate(PROMPTS):
        assert model.generate(prompt, max_new_tokens=10, stop=[third]).ids() == made.ids(row)
    text = plain.texts[1]
    for stop in (text[3:5], re.compile(re.escape(text[3:5]))):
        cut = model.generate(PROMPTS[1], max_new_tokens=10, stop=[stop])
        assert cut.ended == ("stop",)
        assert text.startswith(cut.text)
        assert text[3:5] in cut.text
        assert len(cut.ids()) < 10
    config = model.module.generation_config
    before, config.eos_token_id = config.eos_token_id, third
    try:
        assert model.generate(PROMPTS, max_new_tokens=10).ended[0] == "eos"
    finally:
        config.eos_token_id = before


# ---- edits that depend on what is seen


def by_hand(model: Model, prompts: list[str], threshold: float, n: int) -> Tensor:
    """A row in which layer 0 says more than `threshold` in a direction is steered at layer 1 in that step: plain hooks."""
    fired: list[Tensor] = []
    layers = model.module.model.layers

    def look(_: Any, __: Any, output: Any) -> None:
        fired.append((output[0] if isinstance(output, tuple) else output)[:, -1] @ V > threshold)

    def steer(_: Any, __: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        new = x + 4.0 * V * fired[-1][:, None, None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hooks = [layers[0].register_forward_hook(look), layers[1].register_forward_hook(steer)]
    try:
        tensors = padded(model, prompts)
        return model.module.generate(**tensors, max_new_tokens=n, do_sample=False)[:, tensors["input_ids"].shape[1] :]
    finally:
        for hook in hooks:
            hook.remove()


def test_an_edit_acts_where_its_condition_fires_in_the_same_step() -> None:
    model, n = opened("llama"), 12
    watched = model.generate(PROMPTS, keep="layers.0.resid_post", max_new_tokens=n).tensor("layers.0.resid_post") @ V
    threshold = float(watched.mean())
    gate = pl.Watch("layers.0.resid_post", lambda step: step["layers.0.resid_post"] @ V > threshold, name="gate")
    edits = [pl.Steer("layers.1.resid_post", V, 4.0, when=gate)]
    made = model.generate(PROMPTS, edits=edits, max_new_tokens=n)
    assert torch.equal(made.tokens, by_hand(model, PROMPTS, threshold, n))
    assert bool(made.fired["gate"].any())
    assert not bool(made.fired["gate"].all())
    assert torch.equal(made.tokens, model.generate(PROMPTS, edits=edits, max_new_tokens=n, use_cache=False).tokens)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, edits=edits, max_new_tokens=n)
        assert alone.ids() == made.ids(row)
        assert torch.equal(alone.fired["gate"][0], made.fired["gate"][row, : len(alone.ids())])


def test_a_condition_whose_site_comes_after_the_edit_says_what_it_said_before() -> None:
    model = opened("llama")
    late = pl.Watch("layers.1.resid_post", lambda step: torch.tensor([step.index == 1, False, False]), name="late")
    edits = [pl.Scale("layers.0.resid_post", -2.0, when=late)]
    made = model.generate(PROMPTS, edits=edits, keep="layers.0.resid_post", max_new_tokens=5)
    plain = model.generate(PROMPTS, keep="layers.0.resid_post", max_new_tokens=5)
    scaled = made.tensor("layers.0.resid_post"), plain.tensor("layers.0.resid_post")
    assert close(scaled[0][:, :2], scaled[1][:, :2])
    assert close(scaled[0][0, 2], -2.0 * scaled[1][0, 2])
    assert close(scaled[0][1:], scaled[1][1:])
    assert torch.equal(made.tokens, model.generate(PROMPTS, edits=edits, max_new_tokens=5, use_cache=False).tokens)


def test_an_encoders_edit_waits_for_its_condition() -> None:
    model = opened("t5")
    plain = model.generate(PROMPTS, max_new_tokens=4).tokens
    never = pl.Scale("encoder.layers.0.resid_post", -3.0, when=lambda step: False)
    always = pl.Scale("encoder.layers.0.resid_post", -3.0, when=lambda step: True)
    assert torch.equal(model.generate(PROMPTS, edits=[never], max_new_tokens=4).tokens, plain)
    scores = [model.generate(PROMPTS, edits=[e], max_new_tokens=1, scores=True).scores for e in (never, always)]
    assert not close(*scores)


# ---- what is done to single rows


def at(index: int, **actions: Any) -> Any:
    return lambda step: {int(row[1:]): action for row, action in actions.items()} if step.index == index else None


@pytest.mark.parametrize("cache", [True, False])
def test_rows_are_stopped_and_given_texts_and_others_do_not_notice(cache: bool) -> None:
    model = opened("llama")
    plain = model.generate(PROMPTS, max_new_tokens=9)
    say = pl.Say([11, 12, 13], then="go on")
    made = model.generate(PROMPTS, max_new_tokens=9, when=at(2, r0=pl.Stop("enough"), r1=say), use_cache=cache)
    assert made.ids(0) == plain.ids(0)[:2]
    assert made.ended == ("watcher", "length", "length")
    assert made.because[0] == "enough"
    assert made.ids(2) == plain.ids(2)
    given = [*plain.ids(1)[:2], 11, 12, 13]
    assert made.ids(1)[:5] == given
    prompt = model.inputs(PROMPTS[1]).tensors["input_ids"][0].tolist()
    assert made.ids(1)[5:] == model.generate([prompt + given], max_new_tokens=4).ids()
    ended = model.generate(PROMPTS, max_new_tokens=9, when=at(2, r1=pl.Say([11, 12])), use_cache=cache)
    assert ended.ids(1) == given[:4]
    assert ended.ended[1] == "watcher"
    assert [ended.ids(row) for row in (0, 2)] == [plain.ids(row) for row in (0, 2)]
    cut = model.generate(PROMPTS[1], max_new_tokens=4, when=at(2, r0=pl.Say([11, 12, 13])))
    assert cut.ids() == given[:4]
    assert cut.ended == ("length",)
    assert model.generate(PROMPTS, when=lambda step: pl.Stop()).texts == ("", "", "")


def test_a_row_is_redirected_from_the_next_step_on() -> None:
    model, n = opened("llama"), 9
    there = [pl.Steer("layers.0.resid_post", V, 5.0)]
    here = [pl.Scale("layers.1.mlp.out", 2.0), pl.Scale("layers.1.attn.k", -1.5)]
    when = at(2, r1=pl.Redirect(there))
    plain = model.generate(PROMPTS, edits=here, max_new_tokens=n)
    made = model.generate(PROMPTS, edits=here, max_new_tokens=n, when=when, keep="layers.0.resid_post")
    assert [made.ids(row) for row in (0, 2)] == [plain.ids(row) for row in (0, 2)]
    assert made.ids(1)[:3] == plain.ids(1)[:3]
    assert made.ids(1) != plain.ids(1)
    assert torch.equal(
        made.tokens, model.generate(PROMPTS, edits=here, max_new_tokens=n, when=when, use_cache=False).tokens
    )
    alone = model.generate(PROMPTS[1], edits=here, max_new_tokens=n, when=at(2, r0=pl.Redirect(there)))
    assert alone.ids() == made.ids(1)
    # by hand: columns up to step 2 under the old edits, later ones under the new
    prompt = model.inputs(PROMPTS[1]).tensors["input_ids"][0].tolist()
    written: list[int] = []
    for _ in range(n):
        last = len(prompt) + 2
        old, new = f"@:{min(last, len(prompt + written))}", f"@{last}:"
        edits: list[Edit] = [pl.Scale(f"layers.1.mlp.out{old}", 2.0), pl.Scale(f"layers.1.attn.k{old}", -1.5)]
        edits += [pl.Steer(f"layers.0.resid_post{new}", V, 5.0)] if len(prompt + written) > last else []
        written.append(int(model.run(torch.tensor([prompt + written]), edits=edits).logits[0, -1].argmax()))
    assert made.ids(1) == written
    again = model.generate(
        PROMPTS[1], edits=here, max_new_tokens=n, when=lambda s: pl.Redirect(there) if s.index > 1 else None
    )
    assert again.ids() == made.ids(1)
    back = model.generate(
        PROMPTS[1], edits=there, max_new_tokens=n, when=lambda s: pl.Redirect() if s.index == 0 else None
    )
    of_prompt = [pl.Steer("layers.0.resid_post@0:", V, 5.0)]
    assert back.ids() == model.generate(PROMPTS[1], edits=of_prompt, max_new_tokens=n).ids()
    with pytest.raises(InputError, match="leave '@' and when= out"):
        model.generate(PROMPTS, when=at(1, r0=pl.Redirect([pl.Ablate("layers.0.mlp.out@-1")])))


def test_rows_that_have_ended_are_not_asked_and_states_are_new_each_time() -> None:
    model = opened("llama")

    def count(step: Step) -> dict[int, Any]:
        step.state["seen"] = step.state.get("seen", 0) + step.running.long()
        step.record(step.state["seen"])
        return {**pl.Stop().at(step.state["seen"] == torch.tensor([2, 4, 99]))}

    for _ in range(2):
        made = model.generate(PROMPTS, max_new_tokens=6, when=count)
        assert made.lengths.tolist() == [1, 3, 6]
        assert made.records["count"][:, -1].tolist() == [2, 4, 6]
        assert made.fired["count"].sum(1).tolist() == [1, 1, 0]


def test_a_watcher_may_run_the_model_and_see_the_logits() -> None:
    model, edits = opened("llama"), [pl.Steer("layers.0.resid_post", V, 2.0), pl.Scale("layers.1.attn.pattern", 0.5)]
    found = []

    def look(step: Step) -> None:
        assert step.logits is not None
        found.append(step.logits.argmax(-1))
        model.run(PROMPTS[0], keep="layers.1.resid_post", edits=[pl.Ablate("layers.0.mlp.out")])
        model.module(**model.inputs(PROMPTS[0]).tensors)

    gate = pl.Watch("layers.0.mlp.out", lambda step: model.module(torch.tensor([[5, 6]])).logits is not None)
    conditional = [pl.Scale("layers.1.mlp.out", 1.5, when=gate)]
    made = model.generate(
        PROMPTS, edits=edits + conditional, when=pl.Watch("layers.1.resid_post", look), max_new_tokens=5
    )
    plain = model.generate(PROMPTS, edits=[*edits, pl.Scale("layers.1.mlp.out", 1.5)], max_new_tokens=5)
    assert torch.equal(made.tokens, plain.tokens)
    assert torch.equal(torch.stack(found, 1), plain.tokens)


def test_a_bug_in_a_watcher_is_its_own_error_and_leaves_nothing_behind() -> None:
    model = opened("llama")
    before = model.generate(PROMPTS, max_new_tokens=3).tokens

    def broken(step: Step) -> None:
        raise KeyError("mine")

    for asked in ({"when": broken}, {"edits": [pl.Scale("layers.0.mlp.out", 2.0, when=broken)]}):
        with pytest.raises(KeyError, match="mine"):
            model.generate(PROMPTS, temperature=1.0, **asked)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=3).tokens, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


# ---- adapters


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_edits_reach_every_step_of_a_model_inside_an_adapter(kind: str) -> None:
    peft = pytest.importorskip("peft")
    module = build("llama")
    config = (
        peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.IA3Config(
            target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
        )
    )
    adapted = peft.get_peft_model(module, config)
    model = pl.load(adapted, tokenizer=tokenizer(module))
    edits = [
        pl.Steer("layers.1.resid_post", V, 2.0),
        pl.Scale("layers.0.mlp.out", -1.0, when=lambda step: step.index > 1),
    ]
    site = "layers.0.resid_post"
    made = [
        model.generate(PROMPTS, edits=edits, keep=site, max_new_tokens=6, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(made[0].tokens, made[1].tokens)
    merged = pl.load(adapted.merge_and_unload(), tokenizer=tokenizer(module))
    wanted = merged.generate(PROMPTS, edits=edits, keep=site, max_new_tokens=6)
    assert torch.equal(made[0].tokens, wanted.tokens)
    assert close(made[0].tensor(site), wanted.tensor(site))


def test_a_prefix_is_refused_when_the_model_is_opened() -> None:
    peft = pytest.importorskip("peft")
    module = build("llama")
    adapted = peft.get_peft_model(module, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(LoadError, match="3 virtual tokens in front"):
        pl.load(adapted, tokenizer=tokenizer(module))


def test_passes_that_are_not_the_tokens_are_refused() -> None:
    model = opened("llama")
    config = model.module.generation_config
    config.guidance_scale = 2.0  # asks the model a second time for every token
    try:
        with pytest.raises(Refused, match="a second time for one token"):
            model.generate(PROMPTS[0], edits=[pl.Scale("layers.0.mlp.out", 2.0)], max_new_tokens=3)
    finally:
        config.guidance_scale = None


# ---- bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "at least 1"),
    ({"max_new_tokens": 2.5}, "whole number"),
    ({"seed": "a"}, "seed='a'"),
    ({"temperature": -1}, "temperature=-1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": 0, "top_p": 0.5}, "temperature=0"),
    ({"top_p": 2}, "top_p=2"),
    ({"top_k": -1}, "top_k=-1"),
    ({"min_new_tokens": 50}, "min_new_tokens=50"),
    ({"num_return_sequences": 2}, "needs sampling"),
    ({"stop": [""]}, "stop=''"),
    ({"stop": [100_000]}, "token id"),
    ({"stream": 3}, "stream=3"),
    ({"when": 3}, "when=3"),
    ({"when": lambda step: 3}, "a watcher returned int"),
    ({"when": lambda step: {7: pl.Stop()}}, "row 7"),
    ({"when": lambda step: pl.Say([5000])}, "token 5000"),
    ({"when": lambda step: step["layers.0.mlp.out"]}, "not watched"),
    ({"edits": [pl.Scale("layers.0.mlp.out", 2.0, when=lambda step: [True, False])]}, "each of 1 rows"),
    ({"no_repeat_ngram": 3}, "no_repeat_ngram_size"),
    ({"max_length": 3}, "pellucid decides"),
    ({"num_beams": "x"}, "num_beams='x'"),
]


@pytest.mark.parametrize(
    ("options", "said"), BAD, ids=lambda v: str(v).partition(" at 0x")[0][:40]
)  # the same in every process
def test_what_cannot_be_asked_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PellucidError, match=said):
        opened("llama").generate(PROMPTS[0], **options)


def test_a_table_of_positions_is_met_before_work_starts() -> None:
    model = opened("gpt2")
    room = model.module.config.max_position_embeddings
    prompt = ids(1, room - 3)
    assert len(model.generate(prompt, max_new_tokens=4).ids()) <= 4
    with pytest.raises(InputError, match="max_new_tokens=4 at most"):
        model.generate(prompt, max_new_tokens=5)


def test_without_a_tokenizer_ids_go_in_and_come_out() -> None:
    module = build("llama")
    model = pl.load(module, tokenizer=tokenizer(module))
    model.tokenizer = None
    made = model.generate(ids(2, 5), max_new_tokens=3, stream=lambda text, row: None)
    assert made.texts[0] == " ".join(f"#{i}" for i in made.ids(0))
    for asked in ({"stop": "x"}, {"when": lambda step: pl.Say("no")}):
        with pytest.raises(InputError, match="without a tokenizer"):
            model.generate(ids(1, 5), **asked)


def test_a_stream_hears_each_rows_text() -> None:
    model, heard = opened("llama"), ["", "", ""]

    def hear(text: str, row: int) -> None:
        heard[row] += text

    made = model.generate(PROMPTS, max_new_tokens=8, stream=hear)
    assert tuple(heard) == made.texts


def test_what_was_generated_is_a_target_like_any_other() -> None:
    from pellucid.question import Question, continuation

    model = opened("llama")
    made = model.generate(PROMPTS[0], temperature=1.0, max_new_tokens=5, seed=3)
    asked = Question.of(model, PROMPTS[0], continuation(made))
    assert asked.answers[0].ids == tuple(made.ids())
    run = model.run(asked.inputs)
    assert close(asked.read(run.logits, run.inputs.stream("").mask)[0], made.log_probabilities[0])
    shares = pl.attribution.saliency(model, PROMPTS[0], continuation(made))
    assert len(made.ids()) in shares.main.shape
    with pytest.raises(InputError, match="3 answers"):
        continuation(model.generate(PROMPTS, max_new_tokens=2))


def too_long(step: Step) -> dict[int, Any]:
    step.record(step["layers.1.resid_post"].norm(dim=-1))
    return pl.Stop("long").at(torch.full_like(step.running, step.index == 4))  # type: ignore[return-value]


def test_what_was_generated_is_saved_and_its_program_generates_it_again(tmp_path: Any) -> None:
    model = opened("llama")
    gate = pl.Watch("layers.0.mlp.out", torch.is_tensor, name="gate")
    made = model.generate(
        PROMPTS,
        temperature=0.9,
        seed=5,
        keep=["layers.1.resid_post", "layers.0.attn.pattern", "layers.0.resid_post@-1"],
        edits=[pl.Steer("layers.0.resid_post", V, 0.5), pl.Scale("layers.1.mlp.out", 0.5, when=gate)],
        when=pl.Watch("layers.1.resid_post", too_long),
    )
    assert repr(gate).startswith("Watch(['layers.0.mlp.out'], <is_tensor>")
    saved = pl.results.Result.load(made.save(tmp_path / "made.zip"))
    assert saved == made.result
    assert saved["layers.1.resid_post"].shape == (3, 5, 32)
    assert saved["too_long"].values.shape == (3, 5)
    assert saved["too_long fired"].values.sum() == sum(why == "watcher" for why in made.ended)
    code = saved.provenance.code(str(tmp_path / "made.zip")).splitlines()
    space: dict[str, Any] = {"model": model, "pl": pl}
    exec("\n".join(line for line in code if not line.startswith(("model =", "import pellucid"))), space)
    assert space["result"].allclose(saved, atol=0.0)
    assert made.result.data.text.values.tolist() == list(made.texts)
    assert "generation" in repr(made.result)
    assert made.result._repr_html_()
    frame = made.to_frame()
    assert len(frame) == int(made.lengths.sum())
    assert {"row", "step", "token", "id", "log_probability", "too_long", "too_long fired", "gate fired"} <= set(
        frame.columns
    )


def test_messages_that_end_with_the_assistants_are_continued() -> None:
    module = build("llama")
    words = tokenizer(module)
    words.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if not loop.last or m.role == 'user' %} . {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    model = pl.load(module, tokenizer=words)
    asked = [{"role": "user", "content": "The capital of France is"}]
    begun = [*asked, {"role": "assistant", "content": "Paris is"}]
    for messages, flags in ((asked, {"add_generation_prompt": True}), (begun, {"continue_final_message": True})):
        encoded = words.apply_chat_template(messages, return_tensors="pt", return_dict=True, **flags)
        wanted = module.generate(**encoded, max_new_tokens=5, do_sample=False, pad_token_id=0)
        made = model.generate(messages, max_new_tokens=5)
        assert made.tokens[0].tolist() == wanted[0, encoded["input_ids"].shape[1] :].tolist()
