"""Every edit at every kind of site equals a plain torch hook, a hand-written attention, or changed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import Ablate, Patch, ProjectOut, Replace, Scale, Steer
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, Refused, SiteError
from tests.engine.hand import PLACES, PROMPTS, SITES, call, ids, opened, run_by_hand, with_attention


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def named(family: str, part: str, layer: int = 1) -> str:
    return f"{'decoder.' if family == 't5' else ''}layers.{layer}.{part}"


def turned_over(x: Tensor) -> Tensor:
    return x.flip(-1) * 1.5


# ---- where an edit is written


@pytest.mark.parametrize(("family", "part"), SITES)
def test_an_edit_at_some_positions_equals_a_torch_hook(family: str, part: str) -> None:
    model, tensors = opened(family), call(family)

    def by_hand(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [1, 3]] = turned_over(x[:, [1, 3]])
        return x

    def function(x: Tensor) -> Tensor:  # heads are a dimension of their own here, but not for the hook
        return turned_over(x.flatten(2)).view_as(x)

    edited = model.run(tensors, edits=[Replace(named(family, part) + "@1,3", function=function)])
    assert close(edited.logits, run_by_hand(family, 1, part, by_hand, tensors))
    assert not close(edited.logits, model.run(tensors).logits, 1e-3)


@pytest.mark.parametrize(("family", "part"), [s for s in SITES if s[1] != "resid_pre"])
def test_the_value_kept_at_an_edited_site_is_the_edited_one(family: str, part: str) -> None:
    model, tensors, site = opened(family), call(family), named(family, part)
    clean = model.run(tensors, keep=[site]).tensor(site)
    edited = model.run(tensors, keep=[site], edits=[Scale(site, 0.5)]).tensor(site)
    assert close(edited, clean * 0.5)


ATTENTIONS = {
    "llama": "model.layers.1.self_attn", "gpt2": "transformer.h.1.attn", "bert": "bert.encoder.layer.1.attention.self",
    "gemma2": "model.layers.1.self_attn", "mixtral": "model.layers.1.self_attn", "t5": "decoder.block.1.layer.0.SelfAttention",
}  # fmt: skip


@pytest.mark.parametrize("port", ["q", "k", "v", "scores", "pattern", "z"])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_an_edit_inside_attention_equals_attention_written_out(
    family: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors = opened(family), call(family)

    def change(x: Tensor) -> Tensor:  # the third head (of keys, that which the third query head reads) at position 2
        axis = 1 if port in ("scores", "pattern") else 2
        head = x.select(axis, 2 * x.shape[axis] // 4).select(1, 2)
        head.copy_(torch.where(head < -1e4, head, head * -0.5))  # masked scores stay masked
        return x

    edited = model.run(tensors, edits=[Scale(named(family, f"attn.heads.2.{port}@2"), -0.5)])
    truth = with_attention(monkeypatch, family, ATTENTIONS[family], port, lambda x: change(x.clone()), tensors)
    assert close(edited.logits, truth)
    assert not close(edited.logits, model.run(tensors).logits, 1e-4)


@pytest.mark.parametrize("port", ["q", "k", "v", "pattern"])
def test_an_edit_inside_cross_attention_equals_attention_written_out(
    port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors = opened("t5"), call("t5")

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.select(1 if port == "pattern" else 2, 1).mul_(-0.5)
        return x

    edited = model.run(tensors, edits=[Scale(f"decoder.layers.1.cross.heads.1.{port}", -0.5)])
    truth = with_attention(monkeypatch, "t5", "decoder.block.1.layer.1.EncDecAttention", port, change, tensors)
    assert close(edited.logits, truth)


def test_query_heads_that_share_keys_are_edited_together_through_their_keys() -> None:
    model, tensors = opened("llama"), call("llama")  # four query heads, two key heads
    made = [model.run(tensors, edits=[Scale(f"layers.1.attn.heads.{h}.k", 0.3)]).logits for h in range(4)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not close(made[1], made[2], 1e-4)


# ---- changed weights


def changed(family: str, name: str, index: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Logits with a slice of a weight set to zero for this call."""
    weight = opened(family).module.get_parameter(name)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[index] = 0
            return opened(family).module(**tensors).logits
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("family", PLACES)
def test_switching_a_head_off_equals_zeroing_its_rows_of_the_output_projection(family: str) -> None:
    (blocks, places), tensors = PLACES[family], call(family)
    columns = (slice(None), slice(16, 24))
    index = columns[::-1] if family == "gpt2" else columns
    truth = changed(family, f"{blocks}.1.{places['attn.z_out'][0]}.weight", index, tensors)
    assert close(opened(family).run(tensors, edits=[Ablate(named(family, "attn.heads.2"))]).logits, truth)


@pytest.mark.parametrize("family", [f for f, (_, places) in PLACES.items() if "mlp.neurons" in places])
def test_switching_a_neuron_off_equals_zeroing_its_row_of_the_down_projection(family: str) -> None:
    (blocks, places), tensors = PLACES[family], call(family)
    index = 7 if family == "gpt2" else (slice(None), 7)
    truth = changed(family, f"{blocks}.1.{places['mlp.neurons'][0]}.weight", index, tensors)
    assert close(opened(family).run(tensors, edits=[Ablate(named(family, "mlp.neurons.7"))]).logits, truth)


def test_switching_an_expert_off_equals_zeroing_its_down_projection() -> None:
    tensors = call("mixtral")
    truth = changed("mixtral", "model.layers.1.mlp.experts.down_proj", 2, tensors)
    for port in ("out", "neurons"):
        edited = opened("mixtral").run(tensors, edits=[Ablate(f"layers.1.mlp.experts.2.{port}")])
        assert close(edited.logits, truth)


def test_values_of_a_head_of_gptj_and_queries_of_deberta_follow_their_weights() -> None:
    """Attention outside the interface, met operation by operation."""
    for family, name, site in (
        ("gptj", "transformer.h.1.attn.v_proj.weight", "attn.heads.1.v"),
        ("deberta-v2", "deberta.encoder.layer.1.attention.self.value_proj.weight", "attn.heads.1.v"),
    ):
        module, tensors = opened(family).module, call(family)
        bias = module.get_submodule(name.removesuffix(".weight")).bias
        kept = None if bias is None else bias.detach().clone()
        try:
            if bias is not None:
                bias.data[8:16] = 0
            truth = changed(family, name, slice(8, 16), tensors)
        finally:
            if bias is not None:
                bias.data.copy_(kept)
        assert close(opened(family).run(tensors, edits=[Ablate(f"layers.1.{site}")]).logits, truth)


def test_embed_and_final_norm_are_what_enters_the_first_block_and_the_unembedding() -> None:
    model, tensors = opened("llama"), call("llama")
    embedded = run_by_hand("llama", 0, "resid_pre", turned_over, tensors)
    assert close(model.run(tensors, edits=[Replace("embed", turned_over)]).logits, embedded)
    normed = model.run(tensors, keep=["final_norm"]).tensor("final_norm")
    edited = model.run(tensors, edits=[Scale("final_norm@-1", 2.0)]).logits
    assert close(edited[:, -1], model.module.lm_head(normed[:, -1] * 2))
    assert torch.equal(edited[:, :-1], model.run(tensors).logits[:, :-1])


# ---- what an edit writes, spelled out in loops over prompts and positions

SITE = "layers.1.resid_pre"
LENGTHS = [7, 4, 5]


def batch(side: str) -> dict[str, Tensor]:
    """Three prompts of unequal length, padded."""
    tokens, mask = ids(3, 7), torch.zeros(3, 7, dtype=torch.long)
    for b, n in enumerate(LENGTHS):
        mask[b, slice(0, n) if side == "right" else slice(7 - n, 7)] = 1
    return {"input_ids": tokens * mask, "attention_mask": mask}


def rows(values: Tensor, side: str) -> list[Tensor]:
    """The real tokens of each prompt, [length, d]."""
    return [x[:n] if side == "right" else x[7 - n :] for x, n in zip(values, LENGTHS, strict=True)]


VECTOR, DIRECTIONS = torch.linspace(-1, 1, 32), torch.randn(2, 32, generator=torch.Generator().manual_seed(4))


def spelled_out(how: str, own: list[Tensor], other: list[Tensor], b: int, p: int) -> Tensor:
    """What stands at position p of prompt b, given all prompts' values and those of a reference."""
    x = own[b][p]
    match how:
        case "zero":
            return torch.zeros_like(x)
        case "mean":
            return torch.cat(own).mean(0)
        case "mean of other":
            return torch.cat(other).mean(0)
        case "position_mean":
            return torch.stack([row[p] for row in own if p < len(row)]).mean(0)
        case "position_mean of other":
            return torch.stack([row[p] for row in other if p < len(row)]).mean(0)
        case "patch":
            return other[b][p]
        case "patch last":
            return other[b][-1]
        case "steer":
            return x + 3 * VECTOR
        case "scale":
            return x * -2
        case "project":
            basis = torch.linalg.qr(DIRECTIONS.T)[0]
            return x - basis @ (basis.T @ x)
    raise AssertionError(how)


def edit_of(how: str, site: str, other: Any) -> Edit:
    name, _, of = how.partition(" of ")
    match name:
        case "patch":
            return Patch(site, other)
        case "patch last":
            return Patch(site, other, source_at=-1)
        case "steer":
            return Steer(site, VECTOR, 3.0)
        case "scale":
            return Scale(site, -2)
        case "project":
            return ProjectOut(site, DIRECTIONS)
    return Ablate(site, name, other if of else None)  # type: ignore[arg-type]


HOWS = [
    "zero", "mean", "mean of other", "position_mean", "position_mean of other", "patch", "patch last", "steer", "scale",
    "project",
]  # fmt: skip


@pytest.mark.parametrize("at", ["", "@-1", "@1:4", "@0,2"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", HOWS)
def test_what_an_edit_writes_is_its_definition_spelled_out(how: str, side: str, at: str) -> None:
    model, given = opened("llama"), batch(side)
    run = model.run(given, keep=[SITE])
    other = model.run({**given, "input_ids": given["input_ids"].roll(2, 0)}, keep=[SITE])
    own, theirs = rows(run.tensor(SITE), side), rows(other.tensor(SITE), side)
    edited = model.run(given, keep=[SITE], edits=[edit_of(how, SITE + at, other)])
    for b, row in enumerate(rows(edited.tensor(SITE), side)):
        chosen = {"": range(len(row)), "@-1": [len(row) - 1], "@1:4": range(1, 4), "@0,2": [0, 2]}[at]
        for p, value in enumerate(row):
            wanted = spelled_out(how, own, theirs, b, p) if p in chosen else own[b][p]
            assert close(value, wanted), (b, p)


def test_resampling_takes_another_prompt_at_the_same_position_and_the_seed_decides_which() -> None:
    model = opened("llama")
    values = model.run(ids(5, 6), keep=[SITE]).tensor(SITE)

    def drawn(**options: Any) -> list[int]:
        edited = model.run(ids(5, 6), keep=[SITE], edits=[Ablate(SITE, "resample", **options)]).tensor(SITE)
        found = [[r for r in range(5) if torch.equal(values[r], x)] for x in edited]
        return [r for (r,) in found]

    one, again, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert one == again != other
    assert all(r != b for draw in (one, other) for b, r in enumerate(draw))
    reference = model.run(ids(2, 6, seed=8), keep=[SITE])
    edited = model.run(ids(1, 6), keep=[SITE], edits=[Ablate(SITE, "resample", reference)]).tensor(SITE)[0]
    assert any(torch.equal(edited, x) for x in reference.tensor(SITE))
    with pytest.raises(InputError, match="needs reference="):
        drawn_alone = [Ablate(SITE, "resample")]
        model.run(ids(1, 6), edits=drawn_alone)


def test_projecting_out_knows_dependent_and_zero_directions() -> None:
    model, v = opened("llama"), DIRECTIONS[0]
    once = model.run(ids(), edits=[ProjectOut(SITE, v)]).logits
    for same in (torch.stack([v, 2 * v]), torch.stack([v, 0 * v])):
        assert close(model.run(ids(), edits=[ProjectOut(SITE, same)]).logits, once)
    assert close(model.run(ids(), edits=[ProjectOut(SITE, 0 * v)]).logits, model.run(ids()).logits)


def test_a_pattern_is_patched_key_by_key_whichever_side_the_padding_is_on() -> None:
    model, site = opened("llama"), "layers.1.attn.pattern"
    right, left = batch("right"), batch("left")
    for b in range(3):  # the same prompts on both sides
        left["input_ids"][b, 7 - LENGTHS[b] :] = right["input_ids"][b, : LENGTHS[b]]
    source = {**right, "input_ids": right["input_ids"].roll(1, 1) * right["attention_mask"]}
    from_run = model.run(source, keep=[site])
    on_right = model.run(right, edits=[Patch(site + "@1:4", from_run)]).logits
    on_left = model.run(left, edits=[Patch(site + "@1:4", from_run)]).logits
    for a, b in zip(rows(on_right, "right"), rows(on_left, "left"), strict=True):
        assert close(a, b)
    assert not close(on_right, model.run(right).logits, 1e-4)


def test_masked_scores_stay_masked() -> None:
    model, site = opened("llama"), "layers.1.attn.scores"
    run = model.run(ids(), keep=["layers.1.attn.pattern"], edits=[Ablate(site)])
    pattern = run.tensor("layers.1.attn.pattern")  # every key seen counts the same, none that is not
    assert close(pattern, torch.ones(7, 7).tril().div(torch.arange(1, 8)[:, None]).expand_as(pattern))


def test_edits_of_one_site_are_made_in_the_order_given() -> None:
    model = opened("llama")
    both = [Steer(SITE, VECTOR), Scale(SITE, 2.0)]
    value = model.run(ids(), keep=[SITE]).tensor(SITE)
    assert close(model.run(ids(), keep=[SITE], edits=both).tensor(SITE), (value + VECTOR) * 2)
    assert close(model.run(ids(), keep=[SITE], edits=both[::-1]).tensor(SITE), value * 2 + VECTOR)


def test_a_patch_from_prompts_runs_them_and_selectors_edit_many_sites() -> None:
    model = opened("llama")
    source = model.run(PROMPTS[0].replace("France", "Italy"), keep=["layers.*.attn.z_out"])
    for given in (source, PROMPTS[0].replace("France", "Italy")):
        run = model.run(PROMPTS[0], edits=[Patch("layers.*.attn.heads.0:2@'France'", given)])
        one_by_one = [Patch(f"layers.{i}.attn.heads.{h}@3", source) for i in range(2) for h in range(2)]
        assert torch.equal(run.logits, model.run(PROMPTS[0], edits=one_by_one).logits)


# ---- what is refused


def test_patching_unequal_prompts_says_where_they_part() -> None:
    with pytest.raises(
        InputError, match=r"of 9 tokens into one of 5.*part at position 3, .* 't' 'l' 'y' there and 'France' 'is' here"
    ):
        opened("llama").run(PROMPTS[0], edits=[Patch(SITE, "The capital of Itly is")])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: Steer(SITE, torch.ones(31)), r"the vector for 'layers.1.resid_pre' is \[31\]: it does not broadcast"),
        (lambda: Scale(SITE, torch.ones(4, 32)), r"the factor .* does not broadcast to \[1, 5, 32\]"),
        (lambda: Patch(SITE, torch.ones(9, 32)), "does not broadcast"),
        (lambda: Scale(SITE, 2, when=lambda step: True), "has a condition, which is asked while generating"),
        (lambda: Patch(SITE, 3), "taken from a run, prompts or token ids, not from int"),
        (lambda: ProjectOut(SITE, torch.ones(31)), r"are \[31\]: expected \[k, 32\]"),
        (lambda: Replace(SITE, lambda x: x[..., :3]), r"must return a tensor of shape \(1, 5, 32\), not \(1, 5, 3\)"),
        (lambda: Replace(SITE, lambda x: None), "not None"),
        (lambda: Ablate(SITE, "median"), "cannot ablate by 'median': expected one of zero, mean"),
        (lambda: Ablate("layers.0.attn.scores", "mean"), "cannot be ablated by 'mean'"),
        (lambda: Scale("layers.0.attn.heads.1.out", 2), "edit the head itself, 'layers.0.attn.heads.1'"),
        (lambda: Scale("logits", 2), "read from a run"),
        (lambda: Scale("layers.0.resid_mdi", 2), "did you mean 'resid_mid'"),
        (lambda: Scale("layers.7.resid_mid", 2), r"there is no layer 7; this model has 2 \(0 to 1\)"),
        (lambda: Scale("layers.0.attn.heads.9", 2), "there is no head 9; this model has 4"),
        (lambda: Scale("layers.0.mlp.neurons.999", 2), "there is no neuron 999"),
        (lambda: Scale("decoder.layers.0.resid_mid", 2), "has one stack"),
    ],
)
def test_a_bad_edit_is_one_clear_error(edit: Any, message: str) -> None:
    with pytest.raises((InputError, SiteError), match=message):
        opened("llama").run(PROMPTS[0], edits=[edit()])


def test_a_reference_that_did_not_keep_the_site_is_named() -> None:
    model = opened("llama")
    source = model.run(PROMPTS[0], keep=["layers.0.resid_pre"])
    with pytest.raises(SiteError, match=r"'layers.1.resid_pre' was not kept .*did you mean 'layers.0.resid_pre'"):
        model.run(PROMPTS[0], edits=[Patch(SITE, source)])


def test_an_edit_that_never_fires_is_an_error() -> None:
    model = opened("llama")
    block = model.module.model.layers[1]
    native, block.self_attn.forward = block.self_attn.forward, lambda hidden_states, **_: (hidden_states, None)
    try:
        with pytest.raises(SiteError, match="the edit on 'layers.1.attn.q' never fired"):
            model.run(PROMPTS[0], edits=[Scale("layers.1.attn.q", 2.0)])
    finally:
        del block.self_attn.forward
    assert native == block.self_attn.forward


def test_a_refused_site_says_why() -> None:
    with pytest.raises(Refused, match=r"'layers.0.resid_mid' is refused on this model: .*parallel"):
        opened("gptj").run(ids(), edits=[Scale("layers.0.resid_mid", 2.0)])
