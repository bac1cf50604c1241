"""Each way of taking tokens away equals running the altered prompt itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.filling import Filler
from pellucid.errors import InputError, Refused
from pellucid.metrics import class_logit, log_odds, logit
from pellucid.question import continuation, reading
from tests.attribution.evaluation.models import PROMPT, TEXTS, case_of, opened

HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


def score(model, ids, metric=None, **more):
    with torch.no_grad():
        return float(model.score(model.run({"input_ids": torch.tensor([ids]), **more}), metric or logit(" Paris")))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_removing_tokens_is_running_the_shorter_prompt(family):
    case, model = case_of(family), opened(family)
    own = case.ids.tolist()
    words = [i for i, fixed in enumerate(case.fixed) if not fixed]
    answers = absence(case, how="remove")(HOLES)[:, 0]
    for row, answer in zip(HOLES, answers, strict=True):
        kept = [i for i in range(len(own)) if i not in words or row[words.index(i)]]
        more = {k: v for k, v in case.inputs.tensors.items() if k.startswith("decoder_")}
        ids = [own[i] for i in kept] or [model.tokenizer.bos_token_id]
        assert float(answer) == pytest.approx(score(model, ids, **more), abs=1e-4)


def test_a_masked_answer_is_read_where_the_mask_has_moved_to():
    model = opened("bert")
    prompt = "The capital of<mask> is Paris"
    case = Case.of(model, prompt, " Paris")
    here = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 1]]).bool()
    answers = absence(case, how="remove")(here)[:, 0]
    ids = case.ids.tolist()  # <s> The capital of <mask> is Paris </s>
    assert float(answers[0]) == pytest.approx(score(model, ids[:1] + ids[2:], logit(" Paris", position=3)), abs=1e-4)
    left = [ids[i] for i in (0, 3, 4, 6, 7)]
    assert float(answers[1]) == pytest.approx(score(model, left, logit(" Paris", position=2)), abs=1e-4)


@pytest.mark.parametrize("how", ["pad", "mean", " the"])
def test_replacing_is_the_game_with_that_baseline(how):
    from pellucid.attribution.baseline import Baseline
    from pellucid.attribution.game import Game
    from pellucid.attribution.path import Embedded
    from pellucid.attribution.players import Players

    case = case_of("gpt2")
    embedded = Embedded(case)
    game = Game(case, Players.of(case), how, Baseline.of(embedded, how), embedded)
    world = absence(case, how=how)
    torch.testing.assert_close(world(HOLES), game(HOLES))
    assert world.name == how
    assert world.evaluations == game.evaluations == len(HOLES)


def test_resampling_from_prompts_puts_their_tokens_in_the_gaps():
    """One reference prompt of one token: the draws have no choice."""
    case, model = case_of("gpt2"), opened("gpt2")
    answers = absence(case, how="resample", reference=["Mary"], draws=3)(HOLES)[:, 0]
    mary = model.tokenizer("Mary")["input_ids"]
    for row, answer in zip(HOLES, answers, strict=True):
        ids = [own if here else mary[0] for own, here in zip(case.ids.tolist(), row, strict=True)]
        assert float(answer) == pytest.approx(score(model, ids), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_fills_leave_what_is_present_and_draw_no_special_tokens(family):
    case, model = case_of(family), opened(family)
    gone = torch.rand(40, len(case.ids), generator=torch.Generator().manual_seed(1)) < 0.5
    gone &= ~torch.tensor(case.fixed)
    ids = Filler(case, model).fill(case.ids.expand(40, -1), gone, range(40))
    assert torch.equal(ids[~gone], case.ids.expand(40, -1)[~gone])
    assert not np.isin(ids[gone], model.tokenizer.all_special_ids).any()
    again = Filler(case, model).fill(case.ids.expand(10, -1), gone[30:], range(30, 40))
    assert torch.equal(ids[30:], again)


def test_left_to_right_fills_are_draws_of_the_model():
    """Two gaps in a row: the pairs drawn are as likely as the model says, the second given the first."""
    model = opened("gpt2")
    case = Case.of(model, "The capital", " Paris")
    n = 4000
    ids = Filler(case, model).fill(case.ids.expand(n, -1), torch.ones(n, 2, dtype=torch.bool), range(n))
    start, special = model.tokenizer.bos_token_id, model.tokenizer.all_special_ids

    def chances(prefix):
        with torch.no_grad():
            logits = model.run({"input_ids": torch.tensor([prefix])}).logits[0, -1].clone()
        logits[special] = -torch.inf
        return logits.softmax(-1)

    first = chances([start])
    drawn = torch.bincount(ids[:, 0], minlength=len(first)) / n
    assert float((drawn - first).abs().sum()) < 0.25  # of 97 tokens: sampling noise is about 0.12
    common = int(first.argmax())
    followers = ids[ids[:, 0] == common, 1]
    second = chances([start, common])
    expected = 0.8 * (2 * len(second) / (np.pi * len(followers))) ** 0.5  # mean total deviation of so many draws
    seen = torch.bincount(followers, minlength=len(second)) / len(followers)
    assert float((seen - second).abs().sum()) < 2 * expected


def test_a_masked_model_fills_one_gap_with_what_it_predicts_there():
    model = opened("bert")
    case = case_of("bert")
    gone = torch.zeros(3000, len(case.ids), dtype=torch.bool)
    gone[:, 2] = True
    drawn = Filler(case, model).fill(case.ids.expand(3000, -1), gone, range(3000))[:, 2]
    ids = case.ids.clone()
    ids[2] = model.tokenizer.mask_token_id
    with torch.no_grad():
        logits = model.run({"input_ids": ids[None]}).logits[0, 2].clone()
    logits[model.tokenizer.all_special_ids] = -torch.inf
    seen = torch.bincount(drawn, minlength=len(logits)) / 3000
    assert float((seen - logits.softmax(-1)).abs().sum()) < 0.28


def test_words_and_continuations_are_served_by_every_way_that_keeps_positions():
    model = opened("gpt2")
    case = Case.of(model, PROMPT, continuation(" Paris in"))
    for how, reference in (("pad", None), ("resample", None), ("resample", TEXTS)):
        world = absence(case, "word", how, reference=reference, draws=2)
        assert world.all.shape == (2,)
        assert torch.isfinite(world.none).all()
    with pytest.raises(Refused, match="positions would move"):
        absence(case, "word", "remove")
    with pytest.raises(Refused, match="positions would move"):
        absence(Case.of(model, PROMPT, reading("layers.0.mlp.neurons.3@-1")), how="remove")


@pytest.mark.parametrize("target", [" Paris", log_odds(" Paris")])
def test_a_coalition_is_run_once(target):
    world = absence(Case.of(opened("gpt2"), PROMPT, target), how="remove")
    world(HOLES)
    world(HOLES.flip(0))
    assert world.evaluations == len(HOLES)


def test_what_cannot_fill_is_named_with_what_to_give_instead():
    with pytest.raises(InputError, match="cannot fill gaps: give reference="):
        absence(case_of("t5"), how="resample")
    with pytest.raises(InputError, match="different vocabularies"):
        other = opened("bert", vocab_size=97)
        other.tokenizer.add_tokens(["▁Berlin"])
        absence(case_of("gpt2"), how="resample", reference=other)
    with pytest.raises(InputError, match="no reference prompts"):
        absence(case_of("gpt2"), how="resample", reference=[])


def test_classifiers_are_served_too():
    from transformers import BertForSequenceClassification

    import pellucid
    from tests.zoo import build, tokenizer

    torch.manual_seed(0)
    bert = build("bert")
    module = BertForSequenceClassification(bert.config).eval()
    model = pellucid.load(module, tokenizer=tokenizer(bert))
    case = Case.of(model, PROMPT, 1)
    answers = absence(case, how="remove")(HOLES)[:, 0]
    ids = case.ids.tolist()
    kept = [i for i, here in zip(ids, [True, *HOLES[0].tolist(), True], strict=True) if here]
    assert float(answers[0]) == pytest.approx(score(model, kept, class_logit(1)), abs=1e-5)
    with pytest.raises(InputError, match="cannot fill gaps"):
        absence(case, how="resample")
