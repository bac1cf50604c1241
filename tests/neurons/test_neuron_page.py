"""Neuron pages: contexts, histogram, words and neighbours are those of plain runs and of the weights themselves."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import pellucid
from pellucid.errors import InputError, Refused
from pellucid.lenses import direct_logit_attribution
from pellucid.neurons import (
    Harvest,
    Units,
    harvest,
    input_weights,
    logit_effects,
    neuron_page,
    output_weights,
)  # fmt: skip
from pellucid.neurons.contexts import activations
from pellucid.neurons.dictionaries import Dictionary, ReLU
from pellucid.neurons.directions import effects
from pellucid.views import document
from pellucid.views.schema import Document
from tests.neurons.test_harvest import TEXTS
from tests.zoo import build, tokenizer

PROMPT = "the cat sat on the mat"


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def gathered(family):
    model = opened(family)
    stack = model.anatomy.stacks[-1].prefix
    texts = [(t, t) for t in TEXTS] if stack else TEXTS
    return harvest(model, texts, [f"{stack}layers.*.mlp.neurons"], top=16, sample=64)


# ---- weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "minicpm3", "granite", "cohere", "t5"])
def test_logit_effects_are_the_shares_of_direct_logit_attribution_but_for_one_factor(family):
    model = opened(family)
    site = f"{model.anatomy.stacks[-1].prefix}layers.0.mlp.neurons"
    dla = direct_logit_attribution(model, PROMPT, 17, by="neuron").data
    share = dla.contribution.values[(dla.layer.values == 0) & (dla.part.values == "mlp.neurons")]
    active = model.run(PROMPT, keep=[site]).tensor(f"{site}@-1")[0, 0].detach().numpy()
    mine = effects(model, output_weights(model, site))[:, 17].numpy() * active
    factor = (share @ mine) / (mine @ mine)
    assert factor > 0
    np.testing.assert_allclose(share, factor * mine, atol=2e-5 * np.abs(share).max())


def test_the_words_are_the_ends_of_the_whole_vocabulary_sorted():
    model = opened("gpt2")
    found = logit_effects(model, "layers.1.mlp.neurons.*", top=4)
    logits = effects(model, output_weights(model, "layers.1.mlp.neurons"))
    order = logits.sort(dim=1, descending=True)
    np.testing.assert_allclose(found.raised.values, order.values[:, :4].numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.lowered.values, order.values.flip(1)[:, :4].numpy(), rtol=1e-5)
    assert found.raised_token.values[5, 0] == model.tokenizer.decode([int(order.indices[5, 0])])
    one = logit_effects(model, {"mine": output_weights(model, "layers.1.mlp.neurons")[5]}, top=4)
    np.testing.assert_allclose(one.raised.values[0], found.raised.values[5], rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "granite", "t5"])
def test_what_a_neuron_writes_is_what_one_more_unit_of_it_adds(family):
    model = opened(family)
    block = f"{model.anatomy.stacks[-1].prefix}layers.1.mlp"
    keep, one_more = [f"{block}.out"], pellucid.Replace(f"{block}.neurons.7", lambda x: x + 1.0)
    plain, moved = (model.run(PROMPT, keep=keep, edits=e).tensor(keep[0])[0, -1] for e in ([], [one_more]))
    torch.testing.assert_close(moved - plain, output_weights(model, f"{block}.neurons")[7], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "readers"),
    [("gpt2", ["mlp.c_fc"]), ("bert", ["intermediate.dense"]), ("llama", ["mlp.gate_proj", "mlp.up_proj"])],
)
def test_what_a_neuron_reads_is_found_without_names_the_gate_first(family, readers):
    model = opened(family)
    block = model.module.get_submodule(model.anatomy.stacks[0].blocks[1].module)
    wanted = [block.get_submodule(name).weight for name in readers]
    wanted = [w.T if family == "gpt2" else w for w in wanted]
    assert torch.equal(input_weights(model, "layers.1.mlp.neurons"), torch.stack(wanted))


def test_a_fused_projection_is_split_into_gate_and_up():
    model = opened("phi3")
    weight = model.module.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(input_weights(model, "layers.1.mlp.neurons"), torch.stack(weight.chunk(2)))


def test_units_whose_words_are_not_fixed_are_refused():
    with pytest.raises(Refused, match="norm the residual"):
        logit_effects(opened("bert"), "layers.0.mlp.neurons.1")
    with pytest.raises(Refused, match="head does not read"):
        logit_effects(opened("t5"), "encoder.layers.0.mlp.neurons.1")
    with pytest.raises(InputError, match="no single unit"):
        logit_effects(opened("llama"), "layers.0.mlp.neurons")
    with pytest.raises(InputError, match="holds no neurons"):
        input_weights(opened("llama"), "layers.0.resid_post")


# ---- pages


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_contexts_show_what_a_plain_run_gives(family):
    model, found = opened(family), gathered(family)
    unit = f"{found.names[1]}.5"
    page = neuron_page(model, found, unit, window=(3, 2), contexts=4).data
    for i in range(page.sizes["context"]):
        text, position = TEXTS[int(page.prompt[i])], int(page.position[i])
        run = model.run(text, decoder=text if family == "t5" else None, keep=[found.names[1]])
        row = run.tensor(found.names[1])[0, :, 5].detach().numpy()
        labels = run.stream(model.sites(found.names[1])[0]).labels[0]
        for offset in range(-3, 3):
            cell, inside = page.sel(offset=offset).isel(context=i), 0 <= position + offset < len(row)
            assert str(cell.token.values) == (labels[position + offset] if inside else "")
            if inside:
                assert float(cell.activation) == pytest.approx(row[position + offset], abs=1e-5)
        assert float(page.activation[i].sel(offset=0)) == pytest.approx(float(page.peak[i]), abs=1e-5)
    top = page.peak.values[page.group.values == "top"]
    assert len(top) == 4 and (np.diff(top) <= 0).all()
    assert len(set(page.prompt.values[:4].tolist())) == 4
    assert float(page["count"].sum()) == pytest.approx(found.count, rel=1e-6)


def test_neighbours_are_the_nearest_by_a_slow_comparison():
    model, found = opened("llama"), gathered("llama")
    unit = "layers.1.mlp.neurons.5"
    page = neuron_page(model, found, unit, neighbours=3).data
    rows = torch.cat([output_weights(model, name) for name in found.names])
    names = [f"{name}.{i}" for name in found.names for i in range(48)]
    cosine = torch.cosine_similarity(rows, rows[names.index(unit)][None])
    order = [names[i] for i in cosine.argsort(descending=True).tolist() if names[i] != unit][:3]
    assert page.neighbour.sel(relation="output weights").values.tolist() == order
    sample = torch.cat([found.sample(name)[1] for name in found.names], 1).numpy()
    correlation = np.corrcoef(sample.T)[names.index(unit)]
    order = [names[i] for i in np.argsort(-correlation) if names[i] != unit][:3]
    assert page.neighbour.sel(relation="activation").values.tolist() == order
    assert page.relation.values.tolist() == ["input weights", "output weights", "activation"]


def test_many_units_and_texts_are_run_together_and_padding_counts_nothing():
    model, found = opened("bert"), gathered("bert")
    units = ["layers.1.mlp.neurons.3", "layers.0.mlp.neurons.9", "layers.1.mlp.neurons.0"]
    rows = activations(model, found, units, [5, 2, 40])
    assert sorted(rows) == [2, 5, 40]
    for prompt, values in rows.items():
        run = model.run(TEXTS[prompt], keep=found.names)
        for i, unit in enumerate(units):
            torch.testing.assert_close(values[:, i], run.tensor(unit)[0].detach(), atol=1e-5, rtol=1e-4)


DIRECTIONS = torch.eye(32)[:4] - 0.1
READS = {
    "directions": DIRECTIONS,
    "a dictionary": Dictionary(
        DIRECTIONS.T.contiguous(), torch.zeros(4), DIRECTIONS, torch.zeros(32), ReLU(), "layers.0.resid_post"
    ),
    "a function": lambda x: x @ DIRECTIONS.T,
}


@pytest.mark.parametrize("kind", READS)
def test_units_of_ones_own_have_pages_and_come_back_from_disk_but_for_functions(kind, tmp_path):
    model = opened("llama")
    features = Units("layers.0.resid_post", READS[kind], "mine")
    found = harvest(model, TEXTS, features, top=4, sample=32, path=tmp_path / "one")
    page = neuron_page(model, found, "mine.2")
    assert "raised" not in page.data and page.data.relation.values.tolist() == ["activation"]
    assert neuron_page(model, Harvest.load(tmp_path / "one", [features]), "mine.2").allclose(page)
    for folder in (tmp_path / "one", found.save(tmp_path / "two")):
        back = Harvest.load(folder)
        back.check(model)
        assert repr(back) == repr(found) and back.plan == found.plan
        if kind == "a function":
            with pytest.raises(InputError, match="units of its own"):
                neuron_page(model, back, "mine.2")
        else:
            assert neuron_page(model, back, "mine.2").allclose(page)
    with pytest.raises(InputError, match="another function"):
        Harvest.load(tmp_path / "one", [Units("layers.0.resid_post", DIRECTIONS + 1, "mine")])


@pytest.mark.parametrize(
    ("family", "site", "relations"),
    [
        ("mixtral", "layers.0.mlp.experts.1.neurons", ["activation"]),
        ("llama", "layers.0.attn.z", ["activation"]),
        ("llama", "layers.1.resid_post", ["output weights", "activation"]),
    ],
)
def test_units_without_weights_of_their_own_have_pages_too(family, site, relations):
    model = opened(family)
    found = harvest(model, TEXTS, site, top=4, sample=32)
    page = neuron_page(model, found, f"{site}.30").data
    assert page.relation.values.tolist() == relations
    assert ("raised" in page) == ("output weights" in relations)


def test_a_page_has_a_view_and_is_saved(tmp_path):
    model, found = opened("llama"), gathered("llama")
    page = neuron_page(model, found, "layers.1.mlp.neurons.5")
    view = Document.read(document(page).json()).data
    assert view.component == "layers.1.mlp.neurons.5"
    assert len(view.contexts) == page.data.sizes["context"] and len(view.raises) == 10
    assert view.contexts[0].values.array().max() == pytest.approx(float(page.peak[0]), rel=1e-5)
    assert int(view.counts.array().sum()) == pytest.approx(found.count, abs=20)
    assert [f.name for f in view.facts][-3:] == [
        "nearest by input weights",
        "nearest by output weights",
        "nearest by activation",
    ]
    page.save(tmp_path / "page.zip")
    assert pellucid.results.Result.load(tmp_path / "page.zip") == page
    assert "neuron" in page.save_html(tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="other weights"):
        neuron_page(opened("gpt2"), found, "layers.1.mlp.neurons.5")
