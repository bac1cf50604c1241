"""A coalition's value is that of the prompt with the others' tokens replaced, however the planner gets it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attribution import continuation, reading, shapley
from pellucid.attribution.baseline import Baseline
from pellucid.attribution.case import Case
from pellucid.attribution.game import Game
from pellucid.attribution.path import Embedded
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.hand import PROMPT, classifier, opened, run_ids, token

FAMILIES = ["gpt2", "llama", "bert", "gemma2", "gpt_neox", "opt", "mixtral", "deberta-v2", "distilbert", "xlnet"]


def changed(case, players, present, replacement):
    """Token ids [row, position] with the absent players' replaced."""
    rows = case.ids.repeat(len(present), 1)
    for row, here in zip(rows, present, strict=True):
        for group, there in zip(players.members, here, strict=True):
            if not there:
                row[list(group)] = replacement
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_token_is_a_replaced_token(family):
    model = opened(family)
    case = Case.of(model, PROMPT, logit(" Paris"))
    game = Game.of(case, "token", "mask")
    present = torch.rand(6, len(game.players), generator=torch.Generator().manual_seed(1)) > 0.5
    logits = run_ids(model, changed(case, game.players, present, model.tokenizer.mask_token_id))
    found = game(present)[:, 0].float()
    torch.testing.assert_close(found, logits[:, -1, token(model, "Paris")], atol=2e-4, rtol=1e-4)


def test_in_roberta_positions_stay_though_it_counts_them_by_the_padding_token():
    """Padding ids in place of words would move the positions of all later words; an absent word does not."""
    model = opened("roberta")
    case = Case.of(model, PROMPT, logit(" Paris"))
    game = Game.of(case, "token", "pad")
    present = torch.tensor([[True, False, True, True, True]])
    positions = torch.arange(len(case.ids))[None] + model.module.config.pad_token_id + 1
    with torch.no_grad():
        ids = changed(case, game.players, present, model.tokenizer.pad_token_id)
        z = model.module(input_ids=ids, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(game(present)[0].float(), z[[token(model, "Paris")]], atol=1e-5, rtol=1e-5)


def test_classes_encoder_decoders_and_readings_play_too():
    model = classifier()
    case = Case.of(model, PROMPT, "good")
    game = Game.of(case, "word", "mask")
    present = torch.eye(5)
    logits = run_ids(model, changed(case, game.players, present, model.tokenizer.mask_token_id))
    torch.testing.assert_close(game(present)[:, 0].float(), logits[:, 2], atol=1e-5, rtol=1e-5)

    model = opened("t5")
    case = Case.of(model, PROMPT, " Paris", decoder=" The")
    game = Game.of(case, "token", "mask")
    decoder = case.inputs.stream("").ids
    logits = run_ids(model, changed(case, game.players, present, model.tokenizer.mask_token_id), decoder)
    torch.testing.assert_close(game(present)[:, 0].float(), logits[:, -1, token(model, "Paris")], atol=1e-5, rtol=1e-5)

    model = opened("llama")
    case = Case.of(model, PROMPT, reading("layers.0.mlp.neurons.3@-1"))
    game = Game.of(case, "token", "mask")
    for row, ids in zip(present, changed(case, game.players, present, model.tokenizer.mask_token_id), strict=True):
        kept = model.run(ids[None], keep=["layers.0.mlp.neurons"]).tensor("layers.0.mlp.neurons")[0, -1, 3]
        assert float(game(row[None])[0, 0]) == pytest.approx(float(kept.detach()), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_continuation_plays_with_all_its_outputs_at_once(family):
    model = opened(family)
    case = Case.of(model, PROMPT, continuation(" Paris and Rome"))
    game = Game.of(case, "token", "mask")
    present = torch.rand(4, len(game.players), generator=torch.Generator().manual_seed(2)) > 0.4
    rows = changed(case, game.players, present, model.tokenizer.mask_token_id)
    said = torch.tensor([token(model, t) for t in ("Paris", "and", "Rome")])
    for row, found in zip(rows, game(present), strict=True):
        parts = row.split(case.lengths)
        z = run_ids(model, parts[0][None], parts[1][None] if len(parts) > 1 else None)[0]
        expected = z.log_softmax(-1)[-3:].gather(1, said[:, None])[:, 0]
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    late = game.players.members.index((len(case.tokens) - 1,))
    assert game.seen[:, late].tolist() == [False, False, True]


@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_a_coalition_is_run_once_and_keeps_its_value(rows):
    game = Game.of(Case.of(opened("gpt2"), PROMPT, " Paris"), "token", "mean")
    present = torch.tensor(rows)
    first, again = game(present), game(present)
    assert torch.equal(first, again)
    assert game.evaluations == len(present.unique(dim=0))


def test_all_is_the_prompt_and_none_the_baseline():
    model = opened("gpt2")
    case = Case.of(model, PROMPT, " Paris")
    game = Game.of(case, "word", "The capital of Italy is")
    z = [float(model.run(p).logits[0, -1, token(model, "Paris")].detach()) for p in (PROMPT, "The capital of Italy is")]
    assert [float(game.all), float(game.none)] == pytest.approx(z, abs=1e-5)


def test_an_interrupted_game_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    model, file = opened("gpt2"), tmp_path / "shapley"
    whole = shapley(model, PROMPT, " Paris", draws=4, seed=3)
    from pellucid.engine.sweep import Plan

    original, ran = Plan._execute, []

    def stops(self, chunk):
        if ran:
            raise KeyboardInterrupt
        ran.append(len(chunk))
        return original(self, chunk)

    monkeypatch.setattr(Plan, "_execute", stops)
    monkeypatch.setattr(Plan, "chunks", lambda self, variants: iter([variants[:4], variants[4:]]))
    with pytest.raises(KeyboardInterrupt):
        # the trial of a replacement is no part of the game
        monkeypatch.setattr(Game, "_replaceable", True)
        shapley(model, PROMPT, " Paris", draws=4, seed=3, checkpoint=file)
    assert file.exists()
    seen = []

    def counts(self, chunk):
        seen.extend(v.index for v in chunk)
        return original(self, chunk)

    monkeypatch.setattr(Plan, "_execute", counts)
    resumed = shapley(model, PROMPT, " Paris", draws=4, seed=3, checkpoint=file)
    assert resumed.allclose(whole, atol=1e-6)
    assert len(seen) == int(whole.evaluations) - 4


@pytest.mark.parametrize("name", ["pad", "mask", "unk", "mean", " the", "The capital of Italy is", [5, 6, 7, 8, 9]])
def test_a_baseline_keeps_special_tokens_and_replaces_all_others(name):
    model = opened("bert")
    ids = name if isinstance(name, str) else [1, *name, 2]
    case = Case.of(model, PROMPT, logit(" Paris"))
    embedded = Embedded(case)
    made = Baseline.of(embedded, ids)
    assert torch.equal(made.values[0, case.fixed], embedded.values[0, case.fixed])
    if name != "mean":
        assert torch.equal(made.values, embedded.embed(made.ids))
    else:
        torch.testing.assert_close(made.values[0, 1], model.module.get_input_embeddings().weight.mean(0))


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("The of", "the baseline has 2 tokens and the prompt 5"),
        ([1, 2], "2 tokens and the prompt 5"),
        (3, "3 is no baseline"),
    ],
)
def test_a_baseline_that_does_not_fit_is_one_clear_error(baseline, message):
    with pytest.raises(InputError, match=message):
        Baseline.of(Embedded(Case.of(opened("gpt2"), PROMPT, " Paris")), baseline)


def test_when_source_and_target_are_the_same_text_each_keeps_its_own_embedding():
    model = opened("bart")
    ids = model.inputs(PROMPT).streams["encoder"].ids
    case = Case.of(model, {"input_ids": ids, "decoder_input_ids": ids}, 9)
    embedded = Embedded(case)
    torch.testing.assert_close(
        embedded.scores(embedded.values)[0, 0], model.run(case.inputs).logits[0, -1, 9], atol=1e-5, rtol=1e-5
    )
    moved = embedded.scores(torch.zeros_like(embedded.values))
    assert np.isfinite(float(moved.detach()))
