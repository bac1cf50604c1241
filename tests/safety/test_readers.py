"""Readers equal their formulas; splits do not leak; controls know nothing; the trap is named; every family, padding and dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.errors import InputError
from pellucid.safety import ConceptReader, Statements
from pellucid.safety.ccs import search
from pellucid.safety.judging import calibration_error, judged, within
from pellucid.safety.learning import searched, vectors, weight
from pellucid.safety.networks import learn
from pellucid.safety.readers import Kind
from tests.zoo import build, tokenizer

NAMES = ("Paris", "Rome", "Mary", "John", "the dog", "the cat", "the city", "the store")
TRUE = [f"{a} is in {b}" for a in NAMES for b in ("France", "Italy")]
FALSE = [t.replace(" is in ", " is not in ") for t in TRUE]
TOPICS = [f"t{i // 4}" for i in range(16)]
CHEAP: Any = {"controls": ("random", "text"), "draws": 2, "restarts": 2, "steps": 30, "folds": 3}


@cache
def opened(family: str, dtype: torch.dtype = torch.float32) -> pl.Model:
    module = build(family, layers=2).to(dtype)
    return pl.load(module, tokenizer=tokenizer(module))


@cache
def pairs() -> Statements:
    return Statements.paired(TRUE, FALSE, TOPICS)


@cache
def fitted(kind: Any, family: str = "llama") -> ConceptReader:
    sites = "layers.1.resid_post" if kind in ("mlp", "attention") else None
    return ConceptReader(kind, sites=sites, **CHEAP).fit(opened(family), pairs())


def drawn(n: int = 40, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, generator=g, dtype=torch.float64)
    x[:n, 0] += 2
    x[:, 1] *= 5
    return x[:n], x[n:]


# ---- the kinds, by their formulas


def test_the_mass_mean_probe_is_the_mean_difference_through_the_covariance_within() -> None:
    plus, minus = drawn()
    cov = (np.cov(plus.numpy().T, bias=True) + np.cov(minus.numpy().T, bias=True)) / 2
    expected = np.linalg.solve(cov, (plus.mean(0) - minus.mean(0)).numpy())
    np.testing.assert_allclose(weight("mass_mean", plus, minus, np.arange(80), 0), expected, rtol=1e-4)


def test_the_search_is_the_search_of_the_paper_one_by_one() -> None:
    """Each site and restart alone, with autograd through the formula as written."""
    plus, minus = (x.float() for x in drawn(20))
    x = torch.stack([plus, plus * 3 + 1]), torch.stack([minus, minus * 2 - 1])
    holds = torch.tensor([True, False] * 10)
    found = search(*x, holds, restarts=3, steps=40, learning_rate=0.01)
    g = torch.Generator().manual_seed(0)
    start = (torch.rand(7, 3, generator=g) * 2 - 1) / 6**0.5
    for site in range(2):
        a, b = (each[site] - each[site].mean(0) for each in x)
        scale = torch.cat([a, b]).square().mean(0).median().sqrt()
        for r in range(3):
            w, c = start[:6, r].clone().requires_grad_(), start[6, r].clone().requires_grad_()
            rule = torch.optim.AdamW([w, c], 0.01)
            for _ in range(41):
                p, q = (torch.sigmoid(v / scale @ w + c) for v in (a, b))
                loss = ((p - (1 - q)) ** 2 + torch.minimum(p, q) ** 2).mean()
                last = float(loss.detach())
                rule.zero_grad()
                loss.backward()
                rule.step()
            assert abs(last - float(found.losses[site, r])) < 1e-5


def test_the_search_finds_what_pairs_differ_in_and_supervised_what_it_is_told() -> None:
    g = torch.Generator().manual_seed(0)
    holds = torch.arange(60) % 2 == 0
    sign = torch.where(holds, 1.0, -1.0)[:, None]
    plain = torch.where(
        torch.rand(60, 1, generator=g) < 0.5, 1.0, -1.0
    )  # a louder thing that has nothing to do with it
    first, second = torch.randn(2, 1, 60, 4, generator=g) * 0.1
    for x, s in ((first, 1), (second, -1)):
        x[0, :, :1] += s * sign
        x[0, :, 1:2] += s * plain * 4

    def right(supervised: bool) -> float:
        found = search(first, second, holds, supervised=supervised, restarts=4, steps=300, learning_rate=0.01)
        said = (first[0] @ found.weight[0]) > (second[0] @ found.weight[0])
        return float((said == holds).float().mean())

    assert right(False) < 0.75 and right(True) == 1.0


def test_the_restart_is_chosen_that_agrees_most_with_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 30, 60, generator=g)  # more axes than pairs: every restart fits chance
    first[..., :3] += 2 * torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)[:, None]
    found = search(first, second, torch.arange(30) % 2 == 0, restarts=5, steps=60, learning_rate=0.01)
    assert found.agreement.shape == (2, 5) and bool(((found.agreement >= 0) & (found.agreement <= 1)).all())
    best = found.agreement.argmax(1)
    assert torch.equal(found.loss, found.losses[torch.arange(2), best])
    for how in ({"restarts": 2}, {"supervised": True}):
        low = search(first, second, torch.arange(30) % 2 == 0, steps=20, **how)  # type: ignore[arg-type]
        assert torch.equal(low.loss, low.losses.amin(1))


def test_networks_read_what_only_they_can_and_attention_looks_at_all_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, 3, generator=g)
    mask = torch.ones(200, 4, dtype=torch.bool)
    mask[:, 0] = False
    crossed = (x[:, -1, 0] * x[:, -1, 1]) > 0
    mlp = learn("mlp", x[:, -1:], mask[:, -1:], crossed, epochs=60)
    assert ((mlp(x[:, -1:], mask[:, -1:]) > 0) == crossed).float().mean() > 0.9
    somewhere = torch.arange(200) % 2 == 0
    x[somewhere, torch.randint(1, 4, (200,))[somewhere], 2] += 6
    found = learn("attention", x, mask, somewhere)
    assert ((found(x, mask) > 0) == somewhere).float().mean() > 0.9
    spoilt = x.clone()
    spoilt[:, 0] = 99.0  # what is not real is not seen
    torch.testing.assert_close(found(spoilt, mask), found(x, mask))
    assert found.each(x).shape == (200, 4) and found.direction.shape == (3,)


# ---- the estimator


@pytest.mark.parametrize("kind", Kind.__args__)  # type: ignore[attr-defined]
def test_every_kind_fits_scores_and_comes_back(kind: Any, tmp_path: Path) -> None:
    model, reader = opened("llama"), fitted(kind)
    again = ConceptReader.load(reader.save(tmp_path / "reader"))
    values = torch.randn(3, 5, model.anatomy.stacks[0].d_model)
    assert reader(values).shape == (3, 5)
    torch.testing.assert_close(again(values), reader(values))
    torch.testing.assert_close(again.scores(model, TRUE[:3]), reader.scores(model, TRUE[:3]))
    if kind == "mlp":
        with pytest.raises(InputError, match="no direction"):
            reader.direction_  # noqa: B018
    elif kind != "attention":  # a linear reader is its direction
        moved = reader(values + 0.1 * reader.direction_) - reader(values)
        torch.testing.assert_close(
            moved, torch.full((3, 5), 0.1 * float(reader.direction_.square().sum())), rtol=1e-3, atol=1e-4
        )
    with pytest.raises(InputError, match="other weights"):
        again.check(opened("gpt2"))


def test_a_reader_of_one_token_is_its_call_at_the_last_token_of_every_row_however_padded() -> None:
    model, reader = opened("llama"), fitted("mean")
    prompts = ["Paris is in France", "the dog is not in the store today"]
    expected = [float(reader(model.run(p, keep=[reader.site]).tensor(reader.site)[0, -1])) for p in prompts]
    np.testing.assert_allclose(reader.scores(model, prompts), expected, atol=1e-4)


def test_the_order_of_what_is_asked_and_the_batch_do_not_matter_and_a_seed_gives_the_same() -> None:
    one = fitted("mean").result_.data
    other = ConceptReader("mean", **{**CHEAP, "batch": 3}).fit(opened("llama"), pairs()).result_.data
    np.testing.assert_allclose(one.area, other.area, atol=1e-6)


def test_what_is_said_of_a_topic_rests_on_nothing_of_it() -> None:
    """Held-out scores by hand: chosen, fitted and calibrated among the other folds."""
    model, data = opened("llama"), pairs()
    reader = ConceptReader("mean", sites=["layers.0.resid_post"], controls=(), seed=0).fit(model, data)
    x = torch.stack(
        [model.run(p, keep=["layers.0.resid_post"]).tensor("layers.0.resid_post")[0, -1] for p in data.prompts]
    )
    fold = data.folds(4, 0)
    assert all(len(set(fold[data.topics == t])) == 1 for t in set(TOPICS))
    true, false = data.couples
    right = []
    for f in range(4):
        w = (x[data.labels & (fold != f)].mean(0) - x[~data.labels & (fold != f)].mean(0)).double()
        gap = (x[true].double() - x[false].double()) @ w
        right += (gap > 0)[torch.as_tensor(fold[true] == f)].tolist()
    assert float(reader.result_.data.pair_accuracy.sel(row="mean")[0]) == pytest.approx(np.mean(right))


def test_shuffled_labels_are_read_by_chance_and_a_title_names_what_does_as_well() -> None:
    reader = ConceptReader("mean", draws=8, controls=("text", "form", "shuffled", "untrained", "random")).fit(
        opened("llama"), pairs()
    )
    data = reader.result_.data.sel(set="held out").area
    assert data.sel(row="text") == 1.0 and reader.result_.title.startswith("No better than text 1.00")
    assert abs(float(data.sel(row="shuffled")) - 0.5) < 0.2
    assert set(data.row.values) == {"mean", "text", "form", "random", "shuffled", "untrained"}


def test_a_nuisance_that_is_read_instead_is_named_and_can_be_erased() -> None:
    """A speaker before every member: the labels cannot be read, since they are drawn; the speaker can."""
    rng = np.random.default_rng(0)
    swap = rng.integers(0, 2, 16).astype(bool)
    one, two = np.where(swap, TRUE, FALSE).tolist(), np.where(swap, FALSE, TRUE).tolist()
    data = Statements.paired(one, two, TOPICS).planted(1, ("he Mary Mary ", "he John John "))
    plain = ConceptReader(
        "ccs", sites="layers.1.resid_post", pool="mean", controls=(), folds=3, steps=80, learning_rate=0.02
    ).fit(opened("llama"), data)
    read = float(plain.result_.data.instead[0])
    assert read > 0.8 and "it reads 'speaker'" in plain.result_.title
    erased = ConceptReader("mean", sites="layers.1.resid_post", controls=(), folds=3, erase=["speaker"]).fit(
        opened("llama"), data
    )
    x = torch.stack([opened("llama").run(p, keep=[erased.site]).tensor(erased.site)[0, -1] for p in data.prompts])
    said = erased(x)
    speaker = torch.as_tensor(data.nuisances["speaker"])
    assert abs(float(said[speaker].mean() - said[~speaker].mean())) < 1e-2 * float(said.std()) + 1e-3


def test_the_trap_says_what_the_search_reads() -> None:
    reader = ConceptReader("ccs", sites="layers.1.resid_post", controls=("planted",), steps=60, restarts=2).fit(
        opened("llama"), pairs()
    )
    assert reader.trap_ is not None and "planted speaker" in reader.result_.title
    assert dict(reader.trap_.data.sizes) == {"run": 3, "site": 1}
    assert set(reader.trap_.data.data_vars) == {"truth", "speaker", "loss", "repaired_loss"}


def test_negations_and_other_sets_are_asked_of_readers_that_never_saw_them() -> None:
    test = Statements.paired(["he is in Rome", "she is in Italy"], ["he is not in Rome", "she is not in Italy"])
    found = ConceptReader("mean", **CHEAP).fit(opened("llama"), pairs(), test={"people": test}).result_.data
    assert found["set"].values.tolist() == ["held out", "people"] and bool(found.area.notnull().all())
    with pytest.raises(InputError, match="training part and in 'test'"):
        ConceptReader("mean", **CHEAP).fit(
            opened("llama"), pairs(), test=Statements.paired(TRUE[:1], ["something else"])
        )


# ---- families, dtypes, inputs


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "gpt2", "t5", "bert"])
def test_a_family_is_read_as_one_text_at_a_time(family: str) -> None:
    model = opened(family)
    reader = ConceptReader("mean", pool="mean", controls=(), batch=7).fit(model, pairs())
    text = TRUE[3]
    run = model.run(text, keep=[reader.site], logits=False)
    x = run.everywhere(pl.Site.parse(reader.site))[0][0]
    np.testing.assert_allclose(float(reader.scores(model, [text, "a"])[0]), float(reader(x[1:].mean(0))), atol=1e-3)


def test_half_precision_adapters_and_token_ids_are_read_too() -> None:
    from peft import LoraConfig, get_peft_model

    half = ConceptReader("mean", **CHEAP).fit(opened("llama", torch.bfloat16), pairs())
    assert (
        half.direction_.dtype == torch.float32 and half(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )
    module = build("llama", layers=2)
    tok = tokenizer(module)
    lora = pl.load(get_peft_model(module, LoraConfig(target_modules=["q_proj"], r=2)), tokenizer=tok)
    assert ConceptReader("mean", **CHEAP).fit(lora, pairs()).site.startswith("layers.")
    bare = pl.load(build("llama", layers=2))
    data = Statements.paired([tok(t)["input_ids"] for t in TRUE], [tok(t)["input_ids"] for t in FALSE], TOPICS)
    reader = ConceptReader("mean", **CHEAP).fit(bare, data)
    assert reader.result_.data.area.sel(row="text")[0] == 1.0


def test_vectors_end_where_each_prompt_ends() -> None:
    model = opened("gpt2")
    x, mask = vectors(model, ["Paris is in France", "he"], ["layers.0.resid_post"], last=3)
    run = model.run("Paris is in France", keep=["layers.0.resid_post"]).tensor("layers.0.resid_post")[0]
    torch.testing.assert_close(x[0, 0], run[-3:], rtol=1e-4, atol=1e-4)
    assert mask.sum(1).tolist() == [3, 1] and bool(mask[:, -1].all())


# ---- judging


def test_areas_are_taken_within_strata() -> None:
    labels, strata = np.array([False, True] * 4), np.repeat([0, 1], 4)
    scores = np.array([0.0, 1.0, 0.0, 1.0, 10.0, 9.0, 8.0, 9.5])
    assert within(scores, labels, strata)[0] == pytest.approx((1.0 + 0.5) / 2)
    found = judged(scores[None], labels, strata, np.array([[1, 3], [0, 2]]), np.arange(8), log_odds=True)
    assert found["pair_accuracy"] == 1.0 and found["low"] <= found["area"] <= found["high"]
    assert calibration_error(np.array([0.0, 0.0]), np.array([True, False])) == 0.0
    assert calibration_error(np.array([20.0, 20.0]), np.array([True, False])) == pytest.approx(0.5)


# ---- bad input


def test_what_cannot_be_fitted_is_refused_in_a_sentence() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match="all 2 statements are True"):
        Statements(["a", "b"], [True, True])
    with pytest.raises(InputError, match="stands here twice"):
        Statements(["a", "a"], [True, False])
    with pytest.raises(InputError, match="stands here twice"):
        Statements(["a", "a", "b"], [True, True, False], ["one", "two", "one"])
    with pytest.raises(InputError, match="at least 4 of either kind"):
        ConceptReader().fit(model, Statements.paired(TRUE[:4], FALSE[:4]))
    with pytest.raises(InputError, match="needs pairs"):
        ConceptReader("ccs").fit(model, Statements(TRUE + FALSE, [True] * 16 + [False] * 16, TOPICS * 2))
    with pytest.raises(InputError, match="no chat template"):
        chats = [[[{"role": "user", "content": t}] for t in x] for x in (TRUE, FALSE)]
        ConceptReader().fit(model, Statements.paired(*chats, TOPICS))
    with pytest.raises(InputError, match="not fitted"):
        ConceptReader().check(model)
    with pytest.raises(InputError, match="expected Statements"):
        ConceptReader().fit(model, TRUE)  # type: ignore[arg-type]


def test_the_planted_speaker_is_drawn_apart_from_which_member_comes_first() -> None:
    """Were both drawn alike, each set would have one speaker, and the sets' means would take it out: no trap to fall into."""
    reader, data = ConceptReader("ccs", steps=1, restarts=1), pairs().planted(0)
    seen: list[Tensor] = []
    x = torch.as_tensor(data.nuisances["speaker"])[None, :, None, None].float()

    def search(first: Tensor, second: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(first)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.safety.ccs.search", search)
        with pytest.raises(InterruptedError):
            searched(reader, x, data, 0)
    assert 0 < float(seen[0].mean()) < 1
