"""Training finds the directions that data were made of, whatever their scale; it can be interrupted and repeated."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import pellucid
from pellucid.errors import InputError
from pellucid.neurons.dictionaries import (
    BatchTopKLoss,
    GatedLoss,
    JumpReLU,
    JumpReLULoss,
    L1Loss,
    SparseAutoencoder,
    Stream,
    TopKLoss,
    training,
)
from pellucid.neurons.dictionaries.rows import batches
from pellucid.store import store_activations
from tests.zoo import build, tokenizer

SITE = "layers.0.resid_post"
TEXTS = ["the cat sat on the mat and looked at the dog", "a bird flew over the house", "one two three four five"] * 8


def planted(rows=20_000, features=48, d=24, share=0.05, seed=0):
    """Sparse sums of known directions, more of them than dimensions; and the directions."""
    g = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(features, d, generator=g), dim=1)
    on = (torch.rand(rows, features, generator=g) < share).float() * (0.5 + torch.rand(rows, features, generator=g))
    return on @ directions, directions, on


def trainer(objective=None, **more):
    given = {"features": 64, "steps": 500, "batch": 256, "learning_rate": 5e-3, "dead_after": 5000, "seed": 1, **more}
    return SparseAutoencoder(SITE, objective=objective or TopKLoss(3), **given)


def found(directions, dictionary):
    """Mean over the true directions of the largest cosine with a learnt one."""
    return float((directions @ dictionary.decoder.T).amax(1).mean())


@pytest.mark.parametrize(
    ("objective", "at_least"),
    [
        (TopKLoss(3), 0.95),
        (L1Loss(0.4, resample=100), 0.95),
        (GatedLoss(0.8, resample=100), 0.93),
        (JumpReLULoss(1.5, start=0.3, bandwidth=0.5, resample=100), 0.95),
        (BatchTopKLoss(3, resample=100), 0.95),
    ],
    ids=lambda o: type(o).__name__,
)
def test_directions_that_data_were_made_of_are_found(objective, at_least):
    x, directions, _ = planted()
    dictionary = trainer(objective, steps=800).fit(x * 7 + 3).dictionary_
    random = normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(5)), dim=1)
    chance = float((directions @ random.T).amax(1).mean())
    assert found(directions, dictionary) > at_least > chance + 0.3
    torch.testing.assert_close(dictionary.decoder.norm(dim=1), torch.ones(64))
    assert (dictionary.encode(x * 7 + 3) > 0).sum(1).float().mean() < 8


def test_batch_top_k_leaves_a_threshold_that_lets_k_through_and_rows_are_read_alone():
    x, _, on = planted()
    d = trainer(BatchTopKLoss(3), steps=500).fit(x).dictionary_
    active = (d.encode(x) > 0).sum(1).float()
    assert 2.2 < active.mean() < 3.8
    assert active[(on > 0).sum(1) >= 5].mean() > active[(on > 0).sum(1) <= 1].mean() + 1.5  # hard rows take more
    torch.testing.assert_close(d.encode(x[:1]), d.encode(x[:50])[:1])
    assert isinstance(d.activation, JumpReLU)


def test_the_first_features_of_a_matryoshka_explain_more_by_themselves():
    x, _, _ = planted()
    left = []
    for prefixes in ((), (16,)):
        d = trainer(BatchTopKLoss(3, prefixes), steps=500).fit(x).dictionary_
        f = d.encode(x)[:, :16]
        left.append(float((x - f @ d.decoder[:16] - d.decoder_bias).pow(2).sum() / (x - x.mean(0)).pow(2).sum()))
    assert left[1] < left[0] - 0.05
    with pytest.raises(InputError, match="prefixes"):
        trainer(BatchTopKLoss(3, (64,))).fit(x)


def test_scaling_and_shifting_the_data_scales_the_activations_and_nothing_else():
    x, _, _ = planted(4000)
    plain = trainer(steps=60).fit(x)
    moved = trainer(steps=60).fit(x * 8 + 2)
    torch.testing.assert_close(plain.transform(x) * 8, moved.transform(x * 8 + 2), rtol=2e-2, atol=2e-2)


def test_a_transcoder_learns_what_one_site_makes_of_another():
    x, _, on = planted()
    g = torch.Generator().manual_seed(9)
    answers = normalize(torch.randn(48, 10, generator=g), dim=1)
    y = on @ answers - 1
    t = trainer(writes="layers.0.mlp.out").fit((x, y)).dictionary_
    left = (y - t.decode(t.encode(x))).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert left < 0.3
    assert (t.site, t.writes, tuple(t.decoder.shape)) == (SITE, "layers.0.mlp.out", (64, 10))


@pytest.mark.parametrize(
    "objective", [TopKLoss(3), JumpReLULoss(resample=20), BatchTopKLoss(3, (16,), resample=20)],
    ids=["topk", "jumprelu", "batchtopk"],
)  # fmt: skip
def test_an_interrupted_fit_ends_with_the_same_weights(tmp_path, monkeypatch, objective):
    x, _, _ = planted(3000)
    whole = trainer(objective, steps=60, dead_after=2000).fit(x)
    stopped = trainer(objective, steps=60, dead_after=2000)
    step = training._Fit.step

    def failing(fit, batch, number):
        if number == 45:
            raise KeyboardInterrupt
        return step(fit, batch, number)

    kept = {"checkpoint": tmp_path / "fit.safetensors", "every": 10}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Fit, "step", failing)
        stopped.fit(x, **kept)
    again = trainer(objective, steps=60, dead_after=2000).fit(x, **kept)
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias"):
        assert torch.equal(getattr(again.dictionary_, name), getattr(whole.dictionary_, name)), name
    assert again.history_ == whole.history_


def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(tmp_path):
    x, _, _ = planted(1000)
    trainer(steps=3).fit(x, checkpoint=tmp_path / "fit.safetensors")
    for changed, data, message in (
        ({"seed": 2}, x, "seed was 1, is 2"),
        ({"learning_rate": 1e-4}, x, "learning_rate was 0.005"),
        ({"objective": TopKLoss(4)}, x, "k was 3, is 4"),
        ({}, x + 1, "data was"),
    ):
        with pytest.raises(InputError, match=rf"another fit \({message}"):
            trainer(**{"steps": 3} | changed).fit(data, checkpoint=tmp_path / "fit.safetensors")
    (tmp_path / "other").write_text("no")
    with pytest.raises(InputError, match="no checkpoint of a fit"):
        trainer(steps=3).fit(x, checkpoint=tmp_path / "other")


@pytest.mark.parametrize(
    ("objective", "without", "how_dead"),
    [
        (TopKLoss(3, aux=16), TopKLoss(3, aux_weight=0.0), -4.0),
        (L1Loss(0.4, resample=100), L1Loss(0.4, resample=0), -90.0),
    ],
    ids=["auxk", "resampling"],
)
def test_dead_features_come_back(monkeypatch, objective, without, how_dead):
    x, directions, _ = planted()
    begin = training._Fit.begin

    def half_dead(*given):
        state = begin(*given)
        state.parameters["encoder_bias"].data[:40] = how_dead  # 24 are left for 48 directions
        return state

    monkeypatch.setattr(training._Fit, "begin", half_dead)
    helped, left = (trainer(o, dead_after=2000).fit(x).dictionary_ for o in (objective, without))
    alive = [int((d.encode(x)[:, :40] > 0).any(0).sum()) for d in (helped, left)]
    assert alive[0] > alive[1] + 10
    assert found(directions, helped) > found(directions, left) + 0.05


def test_rows_far_longer_than_the_others_are_left_out():
    x, _, _ = planted(4000)
    wild = x + 1
    wild[::50] *= 1000
    d = trainer(steps=50).fit(wild).dictionary_
    assert not d.encode(wild[::50]).any()
    kept = list(batches(wild, SITE, SITE, 256, d.limit, torch.Generator().manual_seed(0)))
    assert len(kept) == int((wild.norm(dim=1) <= d.limit).sum()) // 256


def test_a_store_and_a_stream_give_the_rows_the_model_gives(tmp_path):
    module = build("gpt2")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    rows = pellucid.Corpus(TEXTS, context=16, packed=True)
    store = store_activations(model, rows, [SITE], tmp_path, dtype=torch.float32, shard_rows=40)
    stream = Stream(model, TEXTS, [SITE], context=16, batch=4)
    assert {len(r.ids) for r in rows.rows(model)} == {16}
    g = torch.Generator()
    pooled = [
        torch.cat([x for x, _ in batches(data, SITE, SITE, 1, float("inf"), g.manual_seed(3))])
        for data in (store, stream, store[SITE])
    ]
    first, *others = (p[p[:, 0].argsort()] for p in pooled)
    for other in others:
        torch.testing.assert_close(first, other)
    sae = trainer(features=8, batch=32, steps=5)
    assert sae.fit(store).dictionary_.digest == model.digest
    assert sae.fit(stream).dictionary_.model == model.name
    sae.fit(stream, checkpoint=tmp_path / "fit.safetensors")
    for other in (Stream(model, TEXTS[1:], [SITE], context=16, batch=4), store):  # A25
        with pytest.raises(InputError, match="another fit .*data was"):
            sae.fit(other, checkpoint=tmp_path / "fit.safetensors")
    with pytest.raises(InputError, match="read only once"):
        Stream(model, (t for t in TEXTS), [SITE])


def test_texts_of_an_encoder_are_rows_of_their_own():
    module = build("bert")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    pieces = list(Stream(model, TEXTS[:3], [SITE, "layers.0.mlp.out"], context=48, batch=2))
    assert [len(p) for p in pieces] == [2, 2]
    assert pieces[0][0].shape == pieces[0][1].shape


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(4, 3, 2), "expected rows"),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), "expected rows"),
        (3, "not int"),
        (iter([torch.zeros(4, 3)]), "not list_iterator"),
        (torch.randn(20, 3), "fewer rows than one batch"),
        (torch.full((300, 3), float("nan")), "row [0-9]+ is not finite"),
        (torch.zeros(0, 3), "there are no rows"),
    ],
)
def test_data_that_is_no_rows_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        trainer().fit(data)
