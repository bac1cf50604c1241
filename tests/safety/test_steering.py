"""Steering equals its formulas by plain hooks: forms, tokens, several at once, conditions, ablation; on several families."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.errors import InputError
from pellucid.safety import Contrast, Vector, ablate_direction, condition, load_vectors, save_vectors, steer, vector
from pellucid.safety.contrast import direction
from tests.zoo import build, tokenizer

PLUS = [
    "Mary gave a drink to John",
    "The city of Paris is in France",
    "a big dog",
    "she is in the house today",
    "he went home",
]
MINUS = [
    "John gave a drink to Mary",
    "The city of Rome is in Italy",
    "a big cat",
    "she is in the store",
    "he went to Rome now",
]
PROMPTS = ["The city of Paris", "Mary and John went to the"]
FAMILIES = ["llama", "gemma3_text", "mixtral", "gpt2"]


@cache
def opened(family: str, dtype: torch.dtype = torch.float32) -> pl.Model:
    module = build(family, layers=3).to(dtype)
    return pl.load(module, tokenizer=tokenizer(module))


@cache
def fitted(family: str, kind: Any = "mean", pool: Any = "last") -> Contrast:
    return Contrast(kind, sites="layers.*.resid_post", pool=pool, batch=3).fit(opened(family), PLUS, MINUS)


def rows(model: pl.Model, text: str, site: str) -> Tensor:
    return model.run(text, keep=[site]).tensor(site)[0]


# ---- the forms, by hand


def by_hand(form: str, h: Tensor, u: Tensor, n: float, c: float) -> Tensor:
    made = []
    for x in h.double():
        along, u64 = float(x @ u.double()), u.double()
        if form == "add":
            y = x + c * n * u64
        elif form == "norm_kept":
            y = x + c * n * u64
            y = y / y.norm() * x.norm()
        elif form == "project":
            y = x - along * u64
        elif form == "scale":
            y = x + (c - 1) * along * u64
        elif form == "clamp":
            y = x + (c * n - along) * u64
        else:
            rest = x - along * u64
            angle = min(math.atan2(along, float(rest.norm())) + math.atan(c), math.pi / 2)
            y = x.norm() * (math.sin(angle) * u64 + math.cos(angle) * rest / rest.norm())
        made.append(y)
    return torch.stack(made).float()


@pytest.mark.parametrize("form", ["add", "norm_kept", "project", "scale", "clamp", "angular"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_form_is_its_formula_at_its_tokens_and_nowhere_else(family: str, form: Any) -> None:
    model, site = opened(family), "layers.1.resid_post"
    v = fitted(family).at(1)
    clean = model.run(PROMPTS, keep=[site])
    for tokens in (None, "1:", "-2:", "1:3", ":"):
        run = model.run(PROMPTS, keep=[site], edits=[v.edit(0.4, form=form, tokens=tokens)])
        for b, length in enumerate(clean.inputs.stream("").lengths.tolist()):
            old, new = (_real(r, site, b) for r in (clean, run))
            said = tokens or ("1:" if form in ("project", "scale") else "-1:")
            inside = torch.zeros(length, dtype=torch.bool)
            inside[slice(*(int(t) if t else None for t in said.split(":")))] = True
            assert torch.allclose(new[inside], by_hand(form, old, v.direction, v.unit, 0.4)[inside], atol=2e-5 * v.unit)
            assert torch.equal(new[~inside], old[~inside])


def _real(run: Any, site: str, row: int) -> Tensor:
    values, real = run.everywhere(pl.Site.parse(site))
    return values[row][real[row]]


def test_an_edit_at_k_positions_is_made_at_k_positions_of_every_step() -> None:
    """CAA's released code added the vector twice on answer tokens."""
    model, site = opened("gpt2"), "layers.1.resid_post"
    v = fitted("gpt2").at(1)
    for cached in (True, False):
        seen: list[Tensor] = []
        watch = pl.Watch("layers.1.mlp.out", lambda step: None)
        plain = model.generate(PROMPTS, keep=[site], when=watch, max_new_tokens=5, use_cache=cached)
        steered = model.generate(PROMPTS, keep=[site], edits=[v.edit(0.6)], max_new_tokens=5, use_cache=cached)
        first = (steered.tensor(site) - plain.tensor(site))[:, 0]
        assert torch.allclose(first, 0.6 * v.unit * v.direction.expand(2, -1), atol=1e-4)
        for b, prompt in enumerate(
            PROMPTS
        ):  # each later step as one run over prompt and answer, by the slice of tokens
            ids = model.inputs(prompt).tensors["input_ids"][0].tolist()
            whole = ids + steered.ids(b)[:-1]
            again = model.run([whole], keep=[site], edits=[v.edit(0.6, tokens=f"{len(ids) - 1}:")])
            seen.append(again.tensor(site)[0, len(ids) - 1 :])
            assert torch.allclose(seen[-1], steered.tensor(site)[b, : len(seen[-1])], atol=1e-4)


def test_tokens_are_a_slice_and_reach_the_planner() -> None:
    model, v = opened("llama"), fitted("llama").at(1)
    metric = pl.metrics.logit(" Paris")
    edits = [v.edit(c, tokens=t) for c in (0.3, 1.0) for t in ("-1:", "1:", "2:4", ":")]
    sweep = model.sweep(PROMPTS, edits, metric)
    one = torch.stack([model.score(model.run(PROMPTS, edits=[e]), metric) for e in edits])
    assert torch.allclose(sweep.values, one, atol=1e-5)
    assert repr(pl.Scale("embed", 2.0, tokens="1:")) == "pl.Scale('embed', factor=2.0, tokens='1:')"
    for wrong in ("1", "a:", "1:2:3", ""):
        with pytest.raises(InputError, match="slice such as"):
            pl.Scale("embed", 2.0, tokens=wrong)


def test_several_at_one_site_act_together() -> None:
    model, site = opened("llama"), "layers.1.resid_post"
    a, b = (
        Vector(site, torch.randn(model.anatomy.stacks[0].d_model, generator=torch.Generator().manual_seed(i)), 3.0)
        for i in (0, 1)
    )
    old = rows(model, PROMPTS[0], site)

    def new(edits: list[Any]) -> Tensor:
        return model.run(PROMPTS[0], keep=[site], edits=edits).tensor(site)[0]

    added = new(steer([a, b], [0.2, -0.4], tokens=":"))
    assert torch.allclose(added, old + 0.6 * a.direction - 1.2 * b.direction, atol=1e-5)
    gone = new(steer([a, b], form="project", tokens=":"))
    assert float((gone @ torch.stack([a.direction, b.direction]).T).abs().max()) < 1e-4
    held = new(steer([a, b], [0.5, 1.0], form="clamp", tokens=":"))
    assert torch.allclose(held @ torch.stack([a.direction, b.direction]).T, torch.tensor([1.5, 3.0]), atol=1e-4)
    assert len(steer([a, Vector("layers.0.resid_post", a.direction)], 0.1)) == 2
    with pytest.raises(InputError, match="together"):
        steer([a, b], form="angular")
    with pytest.raises(InputError, match="2 strengths for 1"):
        steer([a], [0.1, 0.2])


# ---- directions


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_difference_and_its_unit_are_those_of_single_prompts(family: str) -> None:
    model = opened(family)
    for pool in ("last", "mean"):
        made = fitted(family, "mean", pool)
        for layer in (0, 2):
            site = f"layers.{layer}.resid_post"
            each = [[rows(model, t, site) for t in side] for side in (PLUS, MINUS)]
            taken = [torch.stack([x[-1] if pool == "last" else x[1:].mean(0) for x in side]) for side in each]
            v, expected = made.at(layer), taken[0].mean(0) - taken[1].mean(0)
            assert torch.allclose(v.direction, expected / expected.norm(), atol=1e-4)
            later = torch.cat([x[1:].norm(dim=1) for side in each for x in side])
            every = torch.cat([x.norm(dim=1) for side in each for x in side])
            assert v.unit == pytest.approx(float(later.mean()), rel=1e-4)
            here = made.result_.sel(site=site).data
            assert float(here.unit_with_first) == pytest.approx(float(every.mean()), rel=1e-4)
            firsts = torch.stack([x[0] / x[0].norm() for side in each for x in side]).mean(0)
            assert v.sink == pytest.approx(abs(float(v.direction @ firsts / firsts.norm())), abs=1e-4)
            spared = v.spared()
            assert spared.sink < 1e-4 and float(here["size"]) == pytest.approx(
                float(expected.norm()) / v.unit, rel=1e-3
            )
            assert torch.allclose(v(x := each[0][0][0]), x @ v.direction)


def test_the_other_kinds_are_sklearns_and_repengs() -> None:
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 6, generator=g) + torch.tensor([2.0, 0, 0, 0, 0, 0]), torch.randn(30, 6, generator=g)
    mean = a.mean(0) - b.mean(0)

    def alike(found: Tensor, expected: Any) -> None:
        expected = torch.as_tensor(expected).to(found)
        assert abs(float(found @ expected / expected.norm())) == pytest.approx(1, abs=1e-4)
        assert float(found @ mean) >= 0

    alike(direction("pca_centred", a, b), PCA(n_components=1).fit((a - b).numpy()).components_[0])
    x = (a - b).double()
    alike(direction("pca", a, b), torch.linalg.eigh(x.T @ x).eigenvectors[:, -1])
    both = torch.cat([a, b]).double().numpy()
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(both, [1] * 30 + [0] * 30)
    alike(direction("lda", a, b), lda.coef_[0])
    assert float(direction("logistic", a, b) @ direction("lda", a, b)) > 0.9
    a[:, 1] += 40 * torch.arange(-15, 15) / 15  # single differences are longer than their mean
    assert (
        abs(float(direction("pca_centred", a, b) @ (a.mean(0) - b.mean(0)))) / float((a.mean(0) - b.mean(0)).norm())
        < 0.9
    )


def test_a_direction_of_ones_own_and_what_is_refused() -> None:
    model = opened("llama")
    d = model.anatomy.stacks[0].d_model
    v = vector(model, "layers.1.resid_post", torch.ones(d), PLUS)
    assert (
        v.unit == pytest.approx(fitted("llama").result_["unit_with_first"].values[1], rel=0.5)
        and v.digest == model.digest
    )
    for call, said in (
        (lambda: vector(model, "layers.1.resid_post", torch.ones(d + 1), PLUS), "wide"),
        (lambda: vector(model, "layers.*.resid_post", torch.ones(d), PLUS), "3 sites"),
        (lambda: Vector("layers.1.resid_post@-1", torch.ones(d)), "leave '@' out"),
        (lambda: Vector("layers.1.resid_post", torch.zeros(d)), "not all 0"),
        (lambda: Contrast().fit(model, PLUS[:3], MINUS), "at least 4"),
        (lambda: Contrast().fit(model, PLUS, [*MINUS[:4], PLUS[0]]), "both sides"),
        (lambda: Contrast("pca").fit(model, PLUS, MINUS[:4]), "needs pairs"),
        (lambda: Contrast("median").fit(model, PLUS, MINUS), "kind='median'"),  # type: ignore[arg-type]
        (lambda: v.edit(form="twist"), "form='twist'"),  # type: ignore[arg-type]
        (lambda: fitted("llama").at(7), "there is no vector"),
        (lambda: Contrast(sites="layers.1.attn.pattern").fit(model, PLUS, MINUS), "one vector of equal width"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_vectors_are_kept_and_tied_to_their_weights(tmp_path: Any) -> None:
    model, other = opened("llama"), opened("gpt2")
    made = fitted("llama")
    back = Contrast.load(made.save(tmp_path / "c.safetensors"))
    assert back.kind == "mean" and list(back.vectors_) == list(made.vectors_)
    back.check(model)
    for a, b in zip(back.vectors_.values(), made.vectors_.values(), strict=True):
        assert torch.equal(a.direction, b.direction) and a.unit == b.unit and torch.equal(a.first, b.first)
    path = save_vectors([-made.at(1)], tmp_path / "v.safetensors")
    assert torch.equal(load_vectors(path)[0].direction, -made.at(1).direction)
    for call in (
        lambda: load_vectors(path)[0].check(other),
        lambda: other.run(PROMPTS, edits=[made.at(1).edit()]),
        lambda: back.check(other),
    ):
        with pytest.raises(InputError, match="other weights"):
            call()
    with pytest.raises(InputError, match="holds no vectors"):
        load_vectors(pl.save_edits(pl.Scale("embed", 2.0), tmp_path / "e.safetensors"))


# ---- conditions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_condition_is_decided_once_on_the_prompt_row_by_row(family: str, pool: Any) -> None:
    model, v = opened(family), fitted(family).at(2)
    reader = fitted(family).at(0)
    prompts = [*PROMPTS, "a big dog is in the house"]
    scores = [
        float(reader(x[-1] if pool == "last" else x[1:].mean(0)))
        for x in (rows(model, p, reader.site) for p in prompts)
    ]
    tau = sorted(scores)[1] - 1e-3 * (max(scores) - min(scores))
    when = condition(reader, tau, pool=pool)
    made = model.generate(prompts, edits=[v.edit(2.0, when=when)], max_new_tokens=6)
    assert (
        made.fired["condition"].all(1).tolist() == [s > tau for s in scores] == made.fired["condition"].any(1).tolist()
    )
    plain, steered = (model.generate(prompts, edits=e, max_new_tokens=6) for e in ([], [v.edit(2.0)]))
    for b, s in enumerate(scores):
        assert made.ids(b) == (steered if s > tau else plain).ids(b)


def test_a_condition_read_too_late_is_refused() -> None:
    c = fitted("llama")
    for layer in (1, 2):
        with pytest.raises(InputError, match="read an earlier layer"):
            c.at(1).edit(when=condition(c.at(layer), 0.0))
    with pytest.raises(InputError, match="pool='max'"):
        condition(c.at(0), 0.0, pool="max")  # type: ignore[arg-type]


# ---- directional ablation


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ablated_direction_is_nowhere_but_in_the_first_token(family: str) -> None:
    model, v = opened(family), fitted(family).at(1)
    sites = ["embed", *(f"layers.{i}.resid_post" for i in range(3))]
    run, clean = (model.run(PROMPTS, keep=sites, edits=e) for e in (ablate_direction(model, v), []))
    for site in sites:
        for b in range(2):
            x, y = _real(run, site, b), _real(clean, site, b)
            assert float(v(x)[1:].abs().max()) < 1e-3 * max(1.0, float(x.abs().max()))
            assert torch.allclose(x[0], y[0], atol=1e-5)
    with pytest.warns(UserWarning, match="attention sink"):
        edits = ablate_direction(model, Vector(v.site, v.direction), everywhere=True)
    assert float(v(_real(model.run(PROMPTS, keep=sites, edits=edits), sites[-1], 0)).abs().max()) < 1e-3 * v.unit


def test_an_encoder_decoder_and_half_precision_and_no_tokenizer() -> None:
    t5 = opened("t5")
    c = Contrast(sites="encoder.layers.*.resid_post").fit(t5, PLUS, MINUS)
    v = c.at("encoder.layers.1.resid_post")
    a, b = (t5.run(PROMPTS, decoder=["a", "a"], edits=e).logits for e in ([], [v.edit(1.0, tokens="1:")]))
    assert not torch.allclose(a, b)
    assert t5.generate(PROMPTS, edits=[v.edit(1.0)], max_new_tokens=3).tokens.shape[0] == 2
    with pytest.raises(pl.errors.PellucidError, match="stack"):
        Contrast().fit(t5, PLUS, MINUS)
    half = opened("llama", torch.bfloat16)
    w = Contrast(sites="layers.1.resid_post").fit(half, PLUS, MINUS).at(1)
    assert float(w.direction @ fitted("llama").at(1).direction) > 0.95
    for form in ("add", "norm_kept", "project", "scale", "clamp", "angular"):
        assert bool(half.run(PROMPTS, edits=[w.edit(0.3, form=form)]).logits.isfinite().all())
    bare = pl.load(opened("llama").module)
    ids = [[i, i + 3, i + 1] for i in range(5, 15)]
    assert Contrast(sites="layers.1.resid_post").fit(bare, ids[:5], ids[5:]).at(1).unit > 0
