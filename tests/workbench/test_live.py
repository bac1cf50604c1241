"""What follows the typing is what the library says, however little of it is computed anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid as pl
from pellucid.errors import PellucidError
from pellucid.lenses import logit_lens
from pellucid.workbench import lens as lens_module
from pellucid.workbench.answers import TOP, Memory
from pellucid.workbench.lens import LiveLens
from pellucid.workbench.live import Live
from pellucid.workbench.messages import Edit, LiveReply, LiveRequest
from tests.workbench.conftest import OTHER, PROMPT, tiny


def ask(live: Live, prompt: str = PROMPT, *edits: Edit, **more: object) -> LiveReply:
    return live.reply(LiveRequest(tab="t", pane="a", model="0", prompt=prompt, edits=list(edits), **more))  # type: ignore[arg-type]


@pytest.fixture
def live(llama: pl.Model) -> Live:
    return Live(llama, seconds=math.inf)


def test_the_answer_is_that_of_a_plain_run(live: Live) -> None:
    found = ask(live, generate=6, serial=7)
    logits = live.model.run(PROMPT).logits[0, -1].detach()
    p = logits.softmax(-1)
    assert found.serial == 7 and found.edited is None and found.clean.difference is None
    assert [c.id for c in found.clean.top] == p.topk(TOP).indices.tolist()
    np.testing.assert_allclose([c.probability for c in found.clean.top], p.topk(TOP).values, rtol=1e-5)
    np.testing.assert_allclose([c.logit for c in found.clean.top], logits.topk(TOP).values.detach(), rtol=1e-5)
    assert found.clean.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert found.clean.generated == live.model.generate(PROMPT, max_new_tokens=6).text
    assert "".join(found.tokens) == "".join(live.model.inputs(PROMPT).stream("").labels[0])


def test_the_lens_grid_is_that_of_the_logit_lens(live: Live) -> None:
    found = ask(live).lens
    assert found is not None and not ask(live).more
    view, truth = found.data, logit_lens(live.model, PROMPT, top=5)
    assert view.layers == ("embed", "0", "1") and view.components == tuple(truth.site.values)
    assert view.tokens == tuple(truth.token.values) and view.prediction == tuple(truth.prediction.values)
    reading = view.readings[0]
    words = np.array(view.words, dtype=object)[reading.top.array()]
    assert (words == truth.top_token.values).all()
    for name in ("probability", "rank", "kl", "entropy"):
        np.testing.assert_allclose(getattr(reading, name).array(), truth[name].values, atol=2e-5)


def test_the_answer_is_followed_through_all_layers(live: Live) -> None:
    found = ask(live).lens
    assert found is not None
    (followed,) = found.data.readings[0].followed
    truth = logit_lens(live.model, PROMPT, positions=-1)
    assert followed.word == found.data.prediction[-1]
    np.testing.assert_allclose(followed.rank.array()[:, -1], truth["rank"].values[:, 0])
    np.testing.assert_allclose(
        followed.log_probability.array()[:, -1], truth["log_probability"].values[:, 0], atol=2e-5
    )
    others = [p != followed.word for p in found.data.prediction]
    assert np.isnan(followed.rank.array()[:, others]).all()


class Counting(LiveLens):
    """Counts the columns that are computed."""

    read = 0

    def _read(self, passed, positions, start):
        self.read += len(positions)
        return super()._read(passed, positions, start)


def test_typing_reads_only_the_columns_that_are_new(llama: pl.Model) -> None:
    live = Live(llama, seconds=math.inf)
    live.lens = counting = Counting(llama)
    counts = []
    for prompt in (
        "The capital",
        "The capital of",
        "The capital of France is",
        "The capital of Italy is",
        "The capital of",
    ):
        before = counting.read
        ask(live, prompt)
        counts.append(counting.read - before)
    assert counts == [2, 1, 2, 2, 0]
    fresh = ask(Live(llama, seconds=math.inf), "The capital of").lens
    assert fresh is not None and fresh.data.words == ask(live, "The capital of").lens.data.words  # type: ignore[union-attr]


def test_an_encoder_looks_ahead_so_every_column_is_read_again(bert: pl.Model) -> None:
    live = Live(bert, seconds=math.inf)
    live.lens = counting = Counting(bert)
    ask(live, "The capital of <mask>")
    first = counting.read
    ask(live, "The capital of <mask> is")
    assert counting.read == 2 * first + 1


USED: dict[str, Live] = {}  # one for all examples, so that each finds what the ones before it left
EDITS = [
    (),
    (Edit(component="layers.0.attn.heads.1", kind="zero"),),
    (Edit(component="layers.0", kind="mean"),),
    (Edit(component="layers.1.mlp.out", kind="steer", strength=3.0),),
    (Edit(component="embed", kind="scale", strength=2.0, position=0),),
]


@settings(max_examples=20, deadline=None)
@given(
    words=st.lists(st.sampled_from(["The", "capital", "of", "Paris", "in", "went"]), min_size=1, max_size=6),
    edits=st.sampled_from(EDITS),
)
def test_the_grid_never_depends_on_what_was_typed_before(
    llama: pl.Model, words: list[str], edits: tuple[Edit, ...]
) -> None:
    prompt, other = " ".join(words), " ".join(["Rome"] * len(words))
    live = USED.setdefault("live", Live(llama, seconds=math.inf))
    used = ask(live, prompt, *edits, other=other).lens
    fresh = ask(Live(llama, seconds=math.inf), prompt, *edits, other=other).lens
    assert used is not None and fresh is not None
    for name in ("probability", "kl", "rank", "entropy"):
        a, b = (getattr(each.data.readings[0], name).array() for each in (used, fresh))
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_without_time_the_grid_fills_from_its_end_one_request_after_another(
    llama: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens_module, "ROWS", 6)  # two columns of three layers at once
    live = Live(llama, seconds=0.0)
    shown = []
    for _ in range(4):
        found = ask(live)
        shown.append((found.lens.data.positions, found.more))  # type: ignore[union-attr]
    assert shown == [((3, 4), True), ((1, 2, 3, 4), True), ((0, 1, 2, 3, 4), False), ((0, 1, 2, 3, 4), False)]


def test_a_long_prompt_shows_its_last_tokens_and_says_so(llama: pl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens_module, "WIDEST", 3)
    found = ask(Live(llama, seconds=math.inf))
    assert len(found.tokens) == 5 and found.lens is not None and not found.more
    assert found.lens.data.positions == (2, 3, 4) and found.lens.lead == "The last 3 of 5 tokens."


def test_the_edited_grid_is_that_of_the_edited_run(live: Live) -> None:
    edit = Edit(component="layers.0.mlp.out", kind="scale", strength=5.0)
    found = ask(live, PROMPT, edit).lens
    run = live.model.run(PROMPT, edits=[pl.Scale("layers.0.mlp.out", 5.0)])
    top = run.logits[0].softmax(-1).topk(5)
    reading = found.data.readings[0]  # type: ignore[union-attr]
    np.testing.assert_allclose(reading.probability.array()[-1], top.values.detach(), rtol=1e-4)
    assert (reading.rank.array()[-1] == 0).all()


# ---- edits


def test_a_temperature_divides_the_logits_and_a_seed_draws_the_text(live: Live) -> None:
    found, plain = ask(live, generate=6, temperature=0.5, seed=3), ask(live, generate=6)
    p = (live.model.run(PROMPT).logits[0, -1].detach() / 0.5).softmax(-1)
    assert [c.id for c in found.clean.top] == [c.id for c in plain.clean.top]
    np.testing.assert_allclose([c.probability for c in found.clean.top], p.topk(TOP).values, rtol=1e-5)
    assert found.clean.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    drawn = live.model.generate(PROMPT, max_new_tokens=6, temperature=0.5, seed=3)
    assert found.clean.generated == drawn.text and found.pair == []
    assert (
        ask(live, generate=6, temperature=0.5).clean.generated == plain.clean.generated
    )  # without a seed the likeliest


def edited(live: Live, edit: Edit, *engine: pl.engine.edits.Edit) -> None:
    """The answer under an edit of the page is that of the engine's edits."""
    found = ask(live, PROMPT, edit, other=OTHER, generate=4)
    logits = live.model.run(PROMPT, edits=engine).logits[0, -1]
    assert found.edited is not None
    np.testing.assert_allclose(
        [c.logit for c in found.edited.top], logits.topk(TOP).values.detach(), rtol=1e-4, atol=1e-5
    )
    own, theirs = (int(live.model.run(p).logits[0, -1].argmax()) for p in (PROMPT, OTHER))
    assert found.edited.difference == pytest.approx(float((logits[own] - logits[theirs]).detach()), abs=1e-4)
    assert live.model.tokenizer is not None and found.pair == [live.model.tokenizer.decode([i]) for i in (own, theirs)]
    assert found.edited.generated == live.model.generate(PROMPT, edits=engine, max_new_tokens=4).text


HEAD, LAYER, NEURON = "layers.1.attn.heads.2", "layers.1", "layers.0.mlp.neurons.5"


def test_zero_mean_and_scale_are_the_engines(live: Live) -> None:
    edited(live, Edit(component=HEAD, kind="zero"), pl.Ablate(HEAD))
    edited(live, Edit(component=f"{HEAD}.out", kind="zero", position=-1), pl.Ablate(f"{HEAD}@-1"))
    edited(live, Edit(component=NEURON, kind="mean"), pl.Ablate(NEURON, "mean", reference=PROMPT))
    edited(live, Edit(component="embed", kind="scale", strength=-0.5), pl.Scale("embed", -0.5))


def test_a_whole_layer_is_what_it_adds(live: Live) -> None:
    edited(live, Edit(component=LAYER, kind="zero"), pl.Ablate("layers.1.attn.out"), pl.Ablate("layers.1.mlp.out"))
    before = live.model.run(PROMPT, keep="layers.1.resid_pre").tensor("layers.1.resid_pre@-1")
    edited(live, Edit(component=LAYER, kind="zero", position=-1), pl.Patch("layers.1.resid_post@-1", before))


def test_steering_by_1_where_the_answer_is_read_makes_the_part_what_it_is_on_the_other_prompt(live: Live) -> None:
    for site in (HEAD, "layers.0.resid_post", NEURON):
        theirs = live.model.run(OTHER, keep=str(pl.Site.parse(site).whole)).tensor(f"{site}@-1")[0]
        edited(live, Edit(component=site, kind="steer", position=-1), pl.Patch(f"{site}@-1", theirs))
        edited(live, Edit(component=site, kind="patch", position=-1), pl.Patch(f"{site}@-1", theirs))
    edited(live, Edit(component=LAYER, kind="patch"), pl.Patch("layers.1.resid_post", OTHER))


def test_the_random_direction_has_the_norm_of_the_contrast_and_another_seed_is_another_direction(live: Live) -> None:
    from pellucid.workbench.edits import asked, direction

    site = "layers.0.resid_post"
    clean, other = live.memory.of(PROMPT, [site]), live.memory.of(OTHER, [site])
    found = {}
    for name, seed in (("contrast", 0), ("random", 0), ("random", 1)):
        (each,) = asked(live.model, [Edit(component=site, kind="steer", direction=name, seed=seed)])  # type: ignore[arg-type]
        found[name, seed] = direction(each.edit, each.sites[0], clean, lambda: other)
    norms = [float(v.norm()) for v in found.values()]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert not torch.allclose(found["random", 0], found["random", 1])
    alone = ask(live, PROMPT, Edit(component=site, kind="steer", direction="random"))  # needs no second prompt
    assert alone.edited is not None


def test_an_edit_that_is_off_does_nothing(live: Live) -> None:
    assert ask(live, PROMPT, Edit(component="nonsense", kind="zero", on=False)).edited is None


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Edit(component="layers.9", kind="zero"), "no layer 9"),
        (Edit(component="layers.0.attn.nose", kind="zero"), "unknown part"),
        (Edit(component=HEAD, kind="patch"), "need a second prompt"),
        (Edit(component=HEAD, kind="steer"), "need a second prompt"),
        (Edit(component=f"{HEAD}@3", kind="zero"), "apart from the component"),
        (Edit(component=HEAD, kind="zero", position=99), "outside the prompt"),
        (Edit(component="layers.0.attn.pattern", kind="mean"), "cannot be ablated by 'mean'"),
        (Edit(component="layers.0.attn.pattern", kind="steer", direction="random"), "no direction to steer in"),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_sentence(live: Live, edit: Edit, says: str) -> None:
    with pytest.raises(PellucidError, match=says):
        ask(live, PROMPT, edit)


# ---- other models, and what is remembered


def test_a_masked_model_answers_at_its_mask_and_an_embedder_says_that_it_has_no_answer(bert: pl.Model) -> None:
    found = ask(Live(bert, seconds=math.inf), "The capital of France is")
    assert "<mask>" in found.tokens and "mask" in found.note and found.clean.generated == ""
    assert found.lens is not None
    from tests.zoo import build, tokenizer

    module = build("bert").base_model
    vectors = ask(
        Live(pl.load(module, tokenizer=tokenizer(build("bert")))),
        PROMPT,
        Edit(component="layers.0", kind="zero"),
        other=OTHER,
    )
    assert vectors.clean.top == [] and vectors.lens is None and "No lens" in vectors.note
    assert vectors.edited is not None and vectors.edited.top == []


def test_an_encoder_decoder_shows_its_source_and_answers_in_its_decoder() -> None:
    live = Live(tiny("t5"), seconds=math.inf)
    found = ask(live, PROMPT, Edit(component="decoder.layers.0.cross.heads.1", kind="zero"), generate=3)
    assert found.tokens[0] == live.model.inputs(PROMPT).streams["encoder"].labels[0][0]
    assert found.clean.top and found.edited is not None and found.clean.top != found.edited.top
    assert len(found.lens.data.positions) == 1  # type: ignore[union-attr]


def test_a_prompt_that_is_edited_further_is_not_run_again(llama: pl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    live, runs = Live(llama), []
    real = type(llama).run
    monkeypatch.setattr(type(llama), "run", lambda self, *a, **k: runs.append(a) or real(self, *a, **k))
    edit = Edit(component="layers.0.resid_post", kind="steer", strength=1.0)
    ask(live, PROMPT, edit, other=OTHER)
    counts = [len(runs)]
    for strength in (2.0, 3.0):
        edit.strength = strength
        ask(live, PROMPT, edit, other=OTHER)
        counts.append(len(runs))
    ask(live, PROMPT, edit, other=OTHER)  # the same again, as for columns that are left
    assert np.diff([*counts, len(runs)]).tolist() == [1, 1, 0]


def test_two_prompts_with_one_answer_compare_it_with_the_runner_up(live: Live) -> None:
    found = ask(live, PROMPT, other=PROMPT).clean
    assert found.difference == pytest.approx(found.top[0].logit - found.top[1].logit, abs=1e-5)


def test_memory_forgets_the_oldest_prompts(llama: pl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.workbench import answers

    monkeypatch.setattr(answers, "KEPT", 12)
    memory = Memory(llama)
    first = memory.of(PROMPT)
    assert memory.of(PROMPT) is first
    memory.of(OTHER), memory.of("The city is in France")
    assert memory.of(PROMPT) is not first
