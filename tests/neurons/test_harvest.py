"""The harvest: what is kept is what running every text alone and sorting everything gives, interrupted or not."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid
from pellucid.errors import InputError
from pellucid.neurons import Harvest, Units, harvest
from pellucid.neurons.shelf import where as where_of
from pellucid.neurons.tally import Sampler, Tally
from tests.zoo import build, tokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "in",
    "mat",
    "house",
    "red",
    "is",
    "was",
    "and",
    "of",
    "it",
    "he",
]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 14))) for _ in range(60)]
SITES = ["layers.*.mlp.neurons", "layers.0.resid_post", "layers.1.attn.z"]


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def everything(family, site, skip=0):
    """Activations [token, unit] at every counted token of every text, each run alone, and (prompt, position)."""
    model = opened(family)
    special = set(model.tokenizer.all_special_ids)
    rows, places = [], []
    for i, text in enumerate(TEXTS):
        run = model.run(text, keep=[site])
        ids = run.stream(model.sites(site)[0]).ids[0].tolist()
        values = run.tensor(site)[0].flatten(1)
        for p, token in enumerate(ids):
            if p >= skip and token not in special:
                rows.append(values[p])
                places.append((i, p))
    return torch.stack(rows).detach(), places


def gathered(model, **options):
    options = {"top": 5, "sample": 50, "batch_tokens": 64} | options
    sites = options.pop("sites", SITES)
    return harvest(model, options.pop("texts", TEXTS), sites, **options)


def same(a, b):
    assert a.names == b.names and a.count == b.count
    for name in a.names:
        for key, value in a.tallies[name].state.items():
            assert torch.equal(value.nan_to_num(-7), b.tallies[name].state[key].nan_to_num(-7)), (name, key)
    assert torch.equal(a.sampler.places, b.sampler.places) and torch.equal(a.sampler.keys, b.sampler.keys)
    assert [a.tokens(i) for i in range(len(a.shelf))] == [b.tokens(i) for i in range(len(b.shelf))]


@pytest.mark.parametrize(("family", "skip"), [("llama", 0), ("gpt2", 1), ("bert", 0)])
def test_what_is_kept_is_what_running_every_text_alone_and_sorting_gives(family, skip):
    found = gathered(opened(family), skip=skip)
    for name in found.names:
        values, places = everything(family, name, skip)
        assert found.count == len(values)
        best = values.sort(dim=0, descending=True).values[:5].T
        torch.testing.assert_close(found.tallies[name].top, best, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.mean(name).float(), values.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.std(name).float(), values.std(0, unbiased=False), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found.positive(name).float(), (values > 1e-6).float().mean(0), atol=2e-2, rtol=0)
        where, sample = found.sample(name)
        index = {place: i for i, place in enumerate(places)}
        rows = [index[tuple(x.item() for x in where_of(w))] for w in where]
        assert len(set(rows)) == 50
        torch.testing.assert_close(sample, values[rows], atol=1e-5, rtol=1e-4)
        for moment in found.top(f"{name}.3"):
            assert values[index[moment.prompt, moment.position], 3].item() == pytest.approx(moment.value, abs=1e-4)


def test_tokens_can_be_cut_again_from_their_places():
    model = opened("llama")
    found = gathered(model)
    for i in (0, 7, 59):
        assert found.tokens(i) == model.inputs(TEXTS[i]).stream("").ids[0].tolist()


def test_an_interrupted_harvest_continues_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["pellucid.neurons.harvest"], "SEGMENT", 60)
    model = opened("llama")
    whole = gathered(model, path=tmp_path / "whole")
    assert len(whole.shelf.firsts) > 3

    def stopping(after):
        for i, text in enumerate(TEXTS):
            if i == after:
                raise KeyboardInterrupt
            yield text

    for after in (3, 20, 41):
        with pytest.raises(KeyboardInterrupt):
            gathered(model, texts=stopping(after), path=tmp_path / "parts")
    same(whole, gathered(model, path=tmp_path / "parts"))
    same(whole, Harvest.load(tmp_path / "parts"))
    same(whole, gathered(model))
    assert len(list((tmp_path / "parts").glob("state-*"))) == 1


def test_the_batches_make_no_difference_but_of_rounding():
    model = opened("bert")
    one, other = gathered(model, batch_tokens=1), gathered(model, batch_tokens=400)
    assert torch.equal(one.sample("layers.0.mlp.neurons")[0], other.sample("layers.0.mlp.neurons")[0])
    for name in one.names:
        torch.testing.assert_close(one.tallies[name].top, other.tallies[name].top, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.mean(name), other.mean(name), atol=1e-5, rtol=1e-4)


def test_a_long_text_is_read_in_windows_and_generators_rows_and_files_are_read(tmp_path):
    """B9: nothing is cut off silently, and what a data set gives is a corpus."""
    model = opened("llama")
    long = " ".join(TEXTS[:6])
    ids = model.tokenizer(long)["input_ids"]
    found = gathered(model, texts=["a cat", long, "a dog"], context=20)
    rows = [found.tokens(i) for i in range(len(found.shelf))]
    assert len(rows) == 2 + -(-len(ids) // 20) and [i for row in rows[1:-1] for i in row] == ids
    assert found.count == sum(map(len, rows)) and found.read.texts == 3
    with pytest.raises(InputError, match="text 1 of the corpus has"):
        gathered(model, texts=pellucid.Corpus(["a cat", long], long="refuse"), context=20)
    (tmp_path / "lines").write_text("\n".join(TEXTS))
    plain = gathered(model)
    for texts in ((t for t in TEXTS), [{"text": t} for t in TEXTS], tmp_path / "lines"):
        same(plain, gathered(model, texts=texts))


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["pellucid.neurons.harvest"], "SEGMENT", 60)

    def size(texts):
        found = gathered(opened("llama"), texts=texts, path=tmp_path / str(len(texts)))
        assert not found.shelf._parts
        return sum(x.numel() for tally in found.tallies.values() for x in tally.state.values())

    assert size(TEXTS[:20]) == size(TEXTS * 3)


def test_directions_and_functions_of_a_site_are_units_too(tmp_path):
    model = opened("llama")
    site = "layers.0.resid_post"
    directions = torch.randn(3, everything("llama", site)[0].shape[1], generator=torch.Generator().manual_seed(1))
    units = [
        Units(site, directions, "directions"),
        Units("layers.*.resid_post", lambda x: x.relu() @ directions.T, "features"),
        Units("layers.1.attn.z", lambda z: z.norm(dim=-1), "sizes of heads"),
        site,
    ]
    found = gathered(model, sites=units, path=tmp_path)
    assert found.names[:3] == ["directions", "features.layers.0.resid_post", "features.layers.1.resid_post"]
    values = everything("llama", site)[0]
    best = lambda x: x.sort(dim=0, descending=True).values[:5].T  # noqa: E731
    torch.testing.assert_close(found.tally("directions").top, best(values @ directions.T), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.tally("features.layers.0.resid_post").top, best(values.relu() @ directions.T), atol=1e-4, rtol=1e-4
    )
    assert len(found.tally("sizes of heads").top) == model.anatomy.stacks[0].blocks[1].attentions["attn"].heads
    with pytest.raises(InputError, match="other readers"):
        gathered(model, sites=[Units(site, directions + 1, "directions"), *units[1:]], path=tmp_path)


@pytest.mark.parametrize(
    ("site", "texts"), [("encoder.layers.*.mlp.neurons", TEXTS), ("decoder.layers.*.mlp.neurons", None)]
)
def test_both_stacks_of_an_encoder_decoder_can_be_harvested(site, texts, tmp_path):
    model = opened("t5")
    found = gathered(model, sites=site, texts=texts or list(zip(TEXTS, reversed(TEXTS), strict=True)), path=tmp_path)
    name = found.names[0]
    moment = found.top(f"{name}.2")[0]
    source, target = TEXTS[moment.prompt], None if texts else TEXTS[-1 - moment.prompt]
    run = model.run(source, decoder=target, keep=[name])
    assert run.tensor(name)[0, moment.position, 2].item() == pytest.approx(moment.value, abs=1e-5)
    assert found.tokens(moment.prompt) == run.stream(model.sites(name)[0]).ids[0].tolist()
    same(found, Harvest.load(tmp_path))


def test_experts_have_neurons_of_their_own():
    model = opened("mixtral")
    found = gathered(model, sites="layers.0.mlp.experts.1.neurons")
    values = torch.cat([model.run(t, keep=found.names).tensor(found.names[0])[0].detach() for t in TEXTS])
    torch.testing.assert_close(found.mean(found.names[0]).float(), values.mean(0), atol=1e-4, rtol=1e-3)


def test_the_histogram_counts_every_token_and_its_tail_exactly():
    found = gathered(opened("llama"))
    unit = "layers.0.mlp.neurons.3"
    edges, counts = found.histogram(unit, 20)
    assert float(counts.sum()) == pytest.approx(found.count)
    values = everything("llama", "layers.0.mlp.neurons")[0][:, 3]
    kth = values.sort(descending=True).values[4]
    exact = torch.tensor(
        [((values >= a) & (values < b)).sum() for a, b in zip(edges[:-1], [*edges[1:-1], torch.inf], strict=True)]
    )
    tail = edges[:-1] > kth
    assert torch.equal(counts[tail], exact[tail].float())


def test_quantile_bins_hold_what_belongs_there_and_the_sample_is_uniform():
    found = gathered(opened("llama"), sample=100_000)
    name = "layers.0.mlp.neurons"
    values = everything("llama", name)[0]
    assert len(found.sample(name)[0]) == found.count
    torch.testing.assert_close(
        found.quantiles(name, [0.1, 0.5]), values.quantile(torch.tensor([0.1, 0.5]), dim=0), atol=1e-5, rtol=1e-4
    )
    low, high = values[:, 3].quantile(torch.tensor([0.5, 0.9])).tolist()
    bins = found.binned(f"{name}.3", (0, 0.5, 0.9, 1), each=1000)
    assert sum(map(len, bins)) == found.count
    assert all(low - 1e-5 <= m.value <= high + 1e-5 for m in bins[1])
    wanted = np.corrcoef(values.T)
    np.testing.assert_allclose(found.coactivation(f"{name}.3").numpy(), wanted[3], atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, -1e3, 1e6])
@pytest.mark.parametrize("sizes", [(700,), (1, 2, 300, 397), (130,) * 5])
def test_moments_hold_for_units_whose_mean_is_large(mean, sizes):
    x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3, 0.5, 0]) + mean
    x[: sizes[0], 1] += 100 * sizes[0]  # a block that is unlike the others
    tally, at, none = Tally.empty(4, 2, 2), 0, torch.arange(0)
    for size in sizes:
        tally.add(x[at : at + size], torch.arange(at, at + size), (none, none))
        at += size
        if size > 1:  # a segment ends here
            tally.close()
    torch.testing.assert_close(tally.mean, x.double().mean(0), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(tally.std, x.double().std(0, unbiased=False), rtol=1e-5, atol=1e-6)
    assert int(tally.count) == len(x) and float(tally.std[3]) == 0


def test_what_is_kept_prints_short():
    found = gathered(opened("llama"))
    units = Units("layers.0.resid_post", torch.eye(32), "axes")
    assert repr(units) == "Units('layers.0.resid_post', directions [32, 32], name='axes')"
    assert "4 sites, 60 texts" in repr(found) and len(repr(found)) < 200
    assert len(repr(found.shelf)) < 100


def test_every_token_is_as_likely_to_be_sampled():
    hits = np.zeros(40)
    for seed in range(400):
        sampler = Sampler.empty(8, seed)
        for prompt in range(4):
            sampler.offer(sampler.draws(prompt, 10), torch.arange(10) + 10 * prompt)
        hits[sampler.places] += 1
    assert hits.sum() == 3200 and abs(hits / 400 - 0.2).max() < 0.08


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 1000), st.booleans())
def test_the_largest_are_kept_whatever_the_blocks_and_of_equals_the_first(sizes, k, seed, rounded):
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    x = x.round() if rounded else x
    tally, at = Tally.empty(3, k, 2), 0
    for size in sizes:
        tally.add(x[at : at + size], torch.arange(at, at + size), (torch.arange(0), torch.arange(0)))
        at += size
    values, order = x.T.sort(dim=1, descending=True, stable=True)
    n = min(k, len(x))
    assert torch.equal(tally.top[:, :n], values[:, :n]) and torch.equal(tally.places[:, :n], order[:, :n])
    assert bool((tally.places[:, n:] == -1).all())


def test_what_cannot_be_harvested_says_why(tmp_path):
    model = opened("llama")
    for sites, message in (
        ("layers.0.attn.pattern", "no value at every token"),
        ("layers.0.resid_post@-1", "no value at every token"),
        ([Units("layers.0.resid_post", name="x"), Units("layers.1.resid_post", name="x")], "named twice"),
    ):
        with pytest.raises(InputError, match=message):
            gathered(model, sites=sites)
    with pytest.raises(InputError, match="several stacks"):
        gathered(opened("t5"), sites=["encoder.layers.0.mlp.neurons", "decoder.layers.0.mlp.neurons"])
    with pytest.raises(InputError, match="put the one text into a list"):
        harvest(model, "one text")
    for texts, message in (
        ([1, 2], "text 0 of the corpus is no text"),
        (["a", None], "text 1 of the corpus is no text"),
    ):
        with pytest.raises(InputError, match=message):
            gathered(model, texts=texts)
    for bad, message in (
        ({"top": 0}, "top=0: expected at least 1"),
        ({"skip": -1}, "skip=-1"),
        ({"sites": []}, "no sites to harvest"),
        ({"sites": Units("layers.0.resid_post", torch.ones(2, 5))}, "directions of 5 numbers"),
        ({"sites": Units("layers.0.resid_post", torch.sum, "sum")}, r"'sum' must give activations \[token, unit\]"),
        ({"path": __file__}, "is a file"),
    ):
        with pytest.raises(InputError, match=message):
            gathered(model, **bad)
    with pytest.raises(InputError, match="no token was counted"):
        gathered(model, texts=["a"], skip=3)
    gathered(model, texts=TEXTS[:5], path=tmp_path)
    with pytest.raises(InputError, match="other top"):
        gathered(model, texts=TEXTS[:5], path=tmp_path, top=6)
    with pytest.raises(InputError, match="other digest"):
        gathered(opened("gpt2"), texts=TEXTS[:5], path=tmp_path)
    with pytest.raises(InputError, match="the first 5 texts are others than those"):
        gathered(model, texts=TEXTS[1:6], path=tmp_path)
    with pytest.raises(InputError, match="ends after 4 texts; 5 of it were read before"):
        gathered(model, texts=TEXTS[:4], path=tmp_path)
    with pytest.raises(InputError, match="other weights"):
        Harvest.load(tmp_path).check(opened("gpt2"))
    with pytest.raises(InputError, match="is no harvest"):
        Harvest.load(tmp_path / "nowhere")
    found = Harvest.load(tmp_path)
    with pytest.raises(InputError, match="N from 0"):
        found.top("layers.0.mlp.neurons.100000")
    with pytest.raises(InputError, match="was not harvested"):
        found.top("layers.9.mlp.neurons.1")


def test_a_harvest_in_memory_can_be_saved(tmp_path):
    found = gathered(opened("llama"))
    found.save(tmp_path / "kept")
    same(found, Harvest.load(tmp_path / "kept"))
    with pytest.raises(InputError, match="not empty"):
        found.save(tmp_path / "kept")
