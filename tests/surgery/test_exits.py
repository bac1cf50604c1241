"""Exits are a slow loop over tokens and layers; thresholds keep their promise; caches are the full model's; drafts are greedy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.surgery import Exit, ExitHead, calibrate, chosen_policy, draft_and_verify, exits, generate_early
from pellucid.surgery.exit_calibration import thresholds
from pellucid.surgery.exit_reading import Pass as _Pass
from pellucid.surgery.exit_reading import Read as _Read
from pellucid.surgery.exit_reading import judge as _judge
from pellucid.surgery.walk import begun, plainly
from tests.surgery.test_arranging import opened
from tests.surgery.test_stitch import TEXTS

FAMILIES = ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "gptj", "qwen3"]
PROMPT = "The capital of France is in the"


def test_the_offline_table_is_a_loop_over_tokens_and_layers() -> None:
    model = opened("llama")
    policies = {"margin": Exit("margin", 0.02, layers=(1, 2)), "p": Exit("probability", 0.03, layers=(0, 2)), "h": Exit("entropy", -4.2, layers=(1,)),
                "cosine": Exit("cosine", 0.9, layers=(0, 1, 2)), "stable": Exit("stable", 2, layers=(0, 1, 2)), "never": Exit("margin", math.inf)}  # fmt: skip
    found = exits(model, pl.Corpus(TEXTS[:3], packed=False), policies)
    names = [f"layers.{i}.resid_post" for i in range(4)]
    agrees: dict[str, list[bool]] = {name: [] for name in policies}
    depth: dict[str, list[int]] = {name: [] for name in policies}
    added: dict[str, list[float]] = {name: [] for name in policies}
    for text in TEXTS[:3]:
        run = model.run(text, keep=names)
        ids = run.inputs.stream("").ids[0]
        for t in range(len(ids) - 1):
            states = [run.tensor(n)[0, t] for n in names]
            z = [pl.lenses.unembed(model, h[None, None])[0, 0] for h in states]
            best = [int(x.argmax()) for x in z]
            p = [x.softmax(-1).sort(descending=True).values for x in z]
            for name, policy in policies.items():
                at, before, same, last = 3, None, 0, None
                for i in policy.layers or ():
                    same = same + 1 if best[i] == last else 1
                    last = best[i]
                    sure = {"margin": p[i][0] - p[i][1], "probability": p[i][0], "entropy": (p[i] * p[i].log()).sum(),
                            "cosine": -1 if before is None else torch.cosine_similarity(states[i], states[before], dim=0), "stable": same}[policy.by]  # fmt: skip
                    before = i
                    if float(sure) >= policy.threshold:
                        at = i
                        break
                agrees[name].append(best[at] == best[3])
                depth[name].append(at + 1)
                added[name].append(float(z[3].log_softmax(-1)[ids[t + 1]] - z[at].log_softmax(-1)[ids[t + 1]]))
    for name in policies:
        here = found.data.sel(policy=name)
        assert float(here.agreement) == pytest.approx(np.mean(agrees[name]))
        assert float(here.layer) == pytest.approx(np.mean(depth[name]))
        assert float(here.added) == pytest.approx(np.mean(added[name]), abs=1e-5)
    assert "cheaper than the full model" in found.title
    never = found.data.sel(policy="never")
    assert float(never.agreement) == 1 and float(never.exited) == 0
    assert float(never.blocks) == pytest.approx(float(found.data.full + never.checks * found.data.unembedding))
    assert "<" in found._repr_html_()


def test_a_calibrated_threshold_breaks_its_promise_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(0)
    broken, chosen = 0, 0
    grid = thresholds("margin", 1, 10)
    from pellucid.statistics import binomial_p, fixed_sequence

    def drawn(n: int) -> _Pass:  # an early answer is right with a chance of its confidence
        sure = torch.tensor(rng.beta(3, 1, n))
        right = torch.tensor(rng.random(n)) < 0.3 + 0.7 * sure
        final = torch.ones(n, dtype=torch.long)
        zero = torch.zeros(n)
        return _Pass(final, zero, [_Read(right.long()[None], zero[None], sure[None])], {})

    truth = [1 - float(_judge([drawn(10_000)], 0, [0], 2, t).agrees.mean()) for t in grid]
    for _ in range(60):
        wrong = [(1 - _judge([case], 0, [0], 2, t).agrees).sum() for case in [drawn(150)] for t in grid]
        kept = fixed_sequence(binomial_p(wrong, 150, 0.1), 0.1)
        chosen += kept > 0
        broken += kept > 0 and truth[kept - 1] > 0.1
    assert broken / 60 <= 0.1 + 0.08 and chosen > 36


def test_calibration_on_a_model_and_what_its_policy_does() -> None:
    model = opened("gpt2")
    policy = Exit("stable", layers=(0, 1, 2))
    found = calibrate(model, pl.Corpus(TEXTS, packed=False), policy, delta=0.5, epsilon=0.2)
    assert int(found.data.cases) == len(TEXTS) and found.data.kept.dims == ("threshold",)
    never = calibrate(model, pl.Corpus(TEXTS[:3], packed=False), policy, delta=0.01)
    assert math.isinf(chosen_policy(never, policy).threshold) and "No threshold" in never.title
    assert "no guarantee" in calibrate(model, pl.Corpus(TEXTS[:3], packed=False), policy, per_text=None).title


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_keys_and_values_are_the_full_models(family: str) -> None:
    model = opened(family)
    walk, texts = begun(
        model, [PROMPT, "The city", "the capital of Italy is"], Exit("margin", 0.01, layers=(0, 1, 2)), "recompute"
    )
    rows, said = walk.begin(texts)
    seen: list[set[int | None]] = [set() for _ in rows]
    for step in range(10):
        for row, logits in zip(rows, said, strict=True):
            row.ids.append(int(logits.argmax()) if len(row.ids) % 3 else 9)
        walk.follow(
            Exit(
                "probability",
                float(np.median(said.softmax(-1).max(-1).values)) if step % 4 else math.inf,
                layers=(step % 3,),
            )
        )
        said = walk.step(rows)
        for row, logits in zip(rows, said, strict=True):
            seen[row.number].add(row.exited)
            name = "layers.3.resid_post" if row.exited is None else f"layers.{row.exited}.resid_post"
            state = model.run([row.ids], keep=[name]).tensor(name)
            torch.testing.assert_close(logits, pl.lenses.unembed(model, state)[0, -1], atol=1e-4, rtol=1e-4)
    assert any(None in each and len(each) > 2 for each in seen)
    behind = [row for row in rows if row.whole < len(row.ids)]
    if behind:
        walk.catch_up(behind, False)
    for row in rows:
        with torch.no_grad():
            made = model.module(input_ids=torch.tensor([row.ids]), use_cache=True)
        made = made.cache if hasattr(made, "cache") else made.past_key_values
        for mine, theirs in zip(walk.cache.layers, made.layers, strict=True):
            n = theirs.keys.shape[2]  # a sliding layer keeps its window
            for kept, wanted in zip(mine.rows[row.number], (theirs.keys, theirs.values), strict=True):
                torch.testing.assert_close(kept[None, :, -n:], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "states"), [*((f, "recompute") for f in FAMILIES), ("llama", "propagate"), ("gpt2", "propagate")]
)
def test_a_batch_is_its_rows_one_by_one(family: str, states: str) -> None:
    model, prompts = opened(family), [PROMPT, "The city", "the capital of Italy is in the"]
    residual = model.run(PROMPT, keep=["layers.1.resid_post"]).tensor("layers.1.resid_post")
    middle = float(
        pl.lenses.unembed(model, residual)[0].softmax(-1).max(-1).values.median()
    )  # rows part: some exit, some do not
    policy = Exit("probability", middle, layers=(0, 1, 2))
    together = generate_early(model, prompts, policy, states=states, max_new_tokens=8)  # type: ignore[arg-type]
    apart = set()
    for i, prompt in enumerate(prompts):
        alone = generate_early(model, prompt, policy, states=states, max_new_tokens=8)  # type: ignore[arg-type]
        row = together.data.isel(row=i, position=slice(0, alone.data.sizes["position"]))
        assert row.id.values.tolist() == alone.data.id.values.tolist()
        assert (row.layer == alone.data.layer).all() and (row.agrees == alone.data.agrees).all()
        apart |= set(row.layer.values.tolist())
    assert len(apart) > 1 and np.isnan(together.data.layer.values[together.data.id.values < 0]).all()
    assert "<" in together._repr_html_() and len(together.data.attrs["text"]) == 3


@pytest.mark.parametrize("states", ["recompute", "propagate"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_generating_early_says_where_each_token_was_chosen_and_what_it_cost(family: str, states: str) -> None:
    model = opened(family)
    never = generate_early(model, PROMPT, Exit("margin", math.inf), states=states, max_new_tokens=6)  # type: ignore[arg-type]
    assert (
        never.data.id.values.tolist() == model.generate(PROMPT, max_new_tokens=6, min_new_tokens=6).ids()
        or never.data.sizes["position"] < 6
    )
    assert bool(never.data.agrees.all()) and (never.data.layer == 4).all()
    some = generate_early(model, PROMPT, Exit("margin", 0.0, layers=(1,)), states=states, max_new_tokens=6)  # type: ignore[arg-type]
    assert (some.data.layer[1:] == 2).all() and int(some.data.layer[0]) == 4 and float(some.data.time) > 0
    assert (some.data.blocks[1:] > 2).all() and "<" in some._repr_html_()
    if states == "propagate":  # a block's keys and values are those of the exit's state
        walk, texts = begun(model, PROMPT, Exit("margin", 0.0, layers=(1,)), "propagate")
        (row,), _ = walk.begin(texts)
        row.ids.append(7)
        walk.step([row])
        assert walk.cache.tokens(0) == [len(row.ids)] * 4
        state = model.run([row.ids], keep=["layers.1.resid_post"]).tensor("layers.1.resid_post")
        put = model.run([row.ids], edits=[pl.Patch("layers.2.resid_post@-1", state[:, -1:])], keep=["layers.*.attn.v"])
        value, kept = put.tensor("layers.3.attn.v")[0, -1], walk.cache.layers[3].rows[0][1][:, -1]
        if value.shape == kept.shape:  # one row for each kept head; not where the map repeats them
            torch.testing.assert_close(kept, value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_and_verify_is_greedy_token_for_token(family: str) -> None:
    model = opened(family)
    for number, text in enumerate(TEXTS[:3]):
        found = draft_and_verify(model, text, layers=1 + number, ahead=2 + number, max_new_tokens=9)
        ids = [int(i) for i in model.inputs(text).stream("").ids[0]]
        (greedy,) = plainly(model, [ids], 9)
        assert found.data.id.values.tolist() == greedy[: greedy.index(2) + 1 if 2 in greedy else 9]
        assert 0 <= float(found.data.accepted) <= 1


def test_a_trained_head_separates_what_stays_and_is_kept(tmp_path: Path) -> None:
    model = opened("gpt2")
    head = ExitHead(layers=(1, 2), tokens=400).fit(model, TEXTS * 2)
    found = exits(model, TEXTS[:6], [Exit("head", 0.5, layers=(1, 2), head=head), Exit("margin", 0.0, layers=(1,))])
    assert float(found.data.checks[0]) >= 1 and float(found.data.agreement[0]) >= float(found.data.agreement[1]) - 0.05
    with pytest.raises(InputError, match="exit head belongs to other weights"):
        exits(opened("llama"), TEXTS[:3], Exit("head", head=head))
    kept = ExitHead.load(head.save(tmp_path / "head.safetensors"))
    kept.check(model)
    state = torch.randn(3, 32)
    assert all(torch.equal(kept.confidence(i, state), head.confidence(i, state)) for i in (1, 2))
    with pytest.raises(InputError, match="through no lens"):
        ExitHead.load(tmp_path / "head.safetensors", lens=object())
    with pytest.raises(InputError, match="is no ExitHead"):
        ExitHead.load(Path(__file__))
    with pytest.raises(InputError, match="not fitted"):
        ExitHead().save(tmp_path / "none.safetensors")


def test_drawn_tokens_are_transformers_own_and_agreement_is_with_the_same_draw() -> None:
    model = opened("llama")
    how = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    never = generate_early(model, PROMPT, Exit(threshold=math.inf, layers=(1,)), max_new_tokens=8, seed=3, **how)
    given = model.inputs(PROMPT).tensors
    torch.manual_seed(3)
    made = model.module.generate(**given, max_new_tokens=8, **how)[0, given["input_ids"].shape[1] :].tolist()
    assert never.data.id.values.tolist() == made and float(never.data.share_agreeing) == 1
    always = generate_early(model, PROMPT, Exit("probability", 0.0, layers=(0,)), max_new_tokens=8, seed=3, **how)
    assert (always.data.layer.values[1:] == 1).all() and float(always.data.share_agreeing) < 1
    with pytest.raises(InputError, match="takes no num_beams"):
        generate_early(model, PROMPT, Exit(), num_beams=2)
    with pytest.raises(InputError, match="most probable token"):
        generate_early(model, PROMPT, Exit(), do_sample=False, top_k=3)


def test_what_cannot_exit_is_refused_by_name() -> None:
    model = opened("llama")
    for family in ("bert", "t5"):
        with pytest.raises(Refused, match="no early exit"):
            exits(opened(family), [("the", "of")] if family == "t5" else TEXTS[:2], Exit())
        with pytest.raises(Refused, match="no early exit"):
            generate_early(opened(family), "The city", Exit())
    with pytest.raises(InputError, match="2 prompts: expected one"):
        draft_and_verify(model, ["The", "the city"], layers=1)
    with pytest.raises(InputError, match="policies="):
        exits(opened("llama"), ["The capital"], ["margin"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="by='size'"):
        Exit("size")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="go together"):
        Exit("head")
    with pytest.raises(InputError, match="states="):
        generate_early(model, "The", Exit(), states="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected fewer"):
        draft_and_verify(model, "The", layers=4)
