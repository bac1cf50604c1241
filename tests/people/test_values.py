"""Numbers that were quietly others than their names: A3, A10, A12, A15 to A18, A20, A25 to A27, B14."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, PellucidError, Refused
from tests.zoo import build, tokenizer

from .cases import CLEAN, DIFFERENCE, LONG, OTHER, close, opened


def test_a_wildcard_that_names_nothing() -> None:
    """A3: refused with the block's own reason wherever an address is taken."""
    model, site = opened("mixtral"), "layers.*.mlp.neurons.*"
    for call in (
        lambda: model.run(CLEAN, edits=[pl.Ablate(site)]),
        lambda: model.run(CLEAN, keep=[site]),
        lambda: model.sites(site),
        lambda: pl.causal.ablation(model, CLEAN, over=site, metric=DIFFERENCE),
        lambda: model.sweep(CLEAN, [pl.Ablate(site)], DIFFERENCE),
    ):
        with pytest.raises(PellucidError, match="experts"):
            call()


def test_a_baseline_is_what_its_name_says() -> None:
    """A10: "remove" leaves the token out, as the shorter prompt by itself; it is not a word."""
    model = opened("gpt2")
    ids = model.tokenizer(CLEAN)["input_ids"]
    try:
        data = pl.attribution.occlusion(model, CLEAN, 7, baseline="remove").data
    except PellucidError as error:
        assert "remove" in str(error)
        return
    with torch.no_grad():
        score = model.module(torch.tensor([ids])).logits[0, -1, 7]
        wanted = [
            float(score - model.module(torch.tensor([ids[:i] + ids[i + 1 :]])).logits[0, -1, 7])
            for i in range(len(ids) - 1)
        ]
    assert close(data["attribution"].values[:-1], wanted)


def dictionary(site: str = "layers.0.resid_post", width: int = 32, digest: str | None = None):
    from pellucid.neurons.dictionaries import Dictionary, TopK

    decoder = torch.nn.functional.normalize(torch.randn(12, width, generator=torch.Generator().manual_seed(0)), dim=1)
    made = Dictionary(decoder.T.contiguous(), torch.zeros(12), decoder, torch.zeros(width), TopK(3), site)
    if digest is not None:
        object.__setattr__(made, "digest", digest)
    return made


def test_a_dictionary_of_other_weights_is_refused() -> None:
    """A12: for reading and for editing, also after the model was changed in place; and of another width."""
    module = build("llama")
    model = pl.load(module, tokenizer=tokenizer())
    before = model.digest
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.add_(0.1)
    assert model.digest != before
    for made in (dictionary(digest=before), dictionary(width=16)):
        with pytest.raises(PellucidError):
            made.features(model, CLEAN)
        with pytest.raises(PellucidError):
            model.run(
                CLEAN,
                edits=made.edits(model, {0: 1.0}) if hasattr(made, "edits") else [pl.Steer(made.site, made.decoder[0])],
            )


def test_the_strongest_are_those_that_change_most() -> None:
    """A15: with `denoise=False` heads that do nothing do not come first."""
    model = opened("llama")
    result = pl.causal.patching(model, CLEAN, OTHER, metric=DIFFERENCE, denoise=False)
    effect = result.data["effect"]
    largest = float(np.abs(effect.values).max())
    shown = result.top(3)
    numbers = [
        abs(float(v))
        for v in (shown["effect"] if "effect" in getattr(shown, "columns", ()) else [row[-1] for row in shown])
    ]
    assert max(numbers) == pytest.approx(largest, abs=1e-6)


def test_an_edge_has_one_sign() -> None:
    """A15: exact patching and edge ablation of one edge."""
    model = opened("llama")
    each = pl.circuits.exact_patching(model, CLEAN, DIFFERENCE, how="zero", edges=["layers.0.mlp->layers.1.mlp"])
    first = float(each.result.data["effect"].sel(source="layers.0.mlp", reader="layers.1.mlp"))
    second = pl.causal.edge_ablation(
        model, CLEAN, over=["layers.0.mlp.out"], receivers=["layers.1.mlp.out"], how="zero", metric=DIFFERENCE
    ).data["effect"]
    # by hand: the second MLP's norm reads the stream without what the first MLP wrote
    block, norm = model.module.model.layers[0], model.module.model.layers[1].post_attention_layernorm
    said: list[torch.Tensor] = []
    ids = torch.tensor([model.tokenizer(CLEAN)["input_ids"]])
    with torch.no_grad():
        handle = block.mlp.register_forward_hook(lambda m, a, out: said.append(out))
        clean = model.module(ids).logits[0, -1]
        less = norm.register_forward_pre_hook(lambda m, a: (a[0] - said[0],))
        edited = model.module(ids).logits[0, -1]
        handle.remove()
        less.remove()
    wanted = float((edited[7] - edited[9]) - (clean[7] - clean[9]))
    assert first == pytest.approx(wanted, abs=1e-5) and float(second.values.ravel()[0]) == pytest.approx(
        wanted, abs=1e-5
    )


def test_missing_labels_are_named() -> None:
    """A16: the first bad row, not a number and not a class "None"."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="3"):
        pl.probing.RidgeProbe().fit(x, [0.1, 0.2, 0.3, math.nan, *[0.5] * 8])
    with pytest.raises(InputError, match="2"):
        pl.probing.LogisticProbe().fit(x, ["a", "b", None, *["a", "b", "a"] * 3])


def test_a_record_holds_the_text_as_given() -> None:
    """A17: not token texts glued together, and what was asked."""
    for family in ("gpt2", "bert"):
        text = CLEAN if family == "gpt2" else "The city <mask> Paris is"
        provenance = pl.attribution.saliency(opened(family), text).provenance
        assert text in str(provenance.inputs)
        assert provenance.arguments.get("target") is not None
        assert "0x" not in provenance.code()


def test_integrated_gradients_sum_to_the_change() -> None:
    """A18: what is attributed is the score less that of the baseline, by transformers alone; the gap says how well."""
    model = opened("gpt2")
    data = pl.attribution.integrated_gradients(model, CLEAN, 7, baseline=" the", steps=60).data
    ids = model.tokenizer(CLEAN)["input_ids"]
    the = model.tokenizer(" the")["input_ids"][0]
    for fixed in (0, 1):  # the first token may keep its embedding
        base = [*ids[:fixed], *[the] * (len(ids) - fixed)]
        with torch.no_grad():
            change = float(
                model.module(torch.tensor([ids])).logits[0, -1, 7] - model.module(torch.tensor([base])).logits[0, -1, 7]
            )
        if abs(float(np.nansum(data["attribution"].values)) - change) < 2e-2 * max(1.0, abs(change)):
            return
    raise AssertionError("the attributions sum to no change of the score")


def test_a_frame_gives_each_prompt_its_own_number() -> None:
    """A20: no mean beside one prompt's text."""
    result = pl.causal.ablation(opened("llama"), [CLEAN, LONG], over=["layers.0.mlp.out"], metric=DIFFERENCE)
    frame = result.to_frame()
    text = next((c for c in frame.columns if c == "text"), None)
    if text is not None:
        assert frame.groupby(text).first()["effect"].nunique() == len(frame[text].unique())


def test_a_word_without_its_space_warns() -> None:
    """A20: " Paris" and "Paris" are two tokens."""
    with pytest.warns(UserWarning, match="different tokens"):
        opened("gpt2").bind(pl.metrics.logit_difference("a", "I"))


def test_a_checkpoint_knows_what_shaped_it(tmp_path: Path) -> None:
    """A25: of another corpus or learning rate it is refused, not returned."""
    texts, others = [CLEAN, LONG] * 4, [OTHER, "When John went to the store he gave a drink"] * 4
    lens = pl.lenses.TunedLens(tokens=60, context=8)
    lens.fit(opened("gpt2"), texts, checkpoint=tmp_path / "lens")
    for again, corpus in (
        (pl.lenses.TunedLens(tokens=60, context=8), others),
        (pl.lenses.TunedLens(tokens=60, context=8, learning_rate=0.3), texts),
    ):
        try:
            again.fit(opened("gpt2"), corpus, checkpoint=tmp_path / "lens")
        except PellucidError:
            continue
        fresh = type(again)(**{f: getattr(again, f) for f in ("tokens", "context", "learning_rate")}).fit(
            opened("gpt2"), corpus
        )
        assert close(next(iter(again.biases_.values())), next(iter(fresh.biases_.values())))


def test_an_alias_means_what_it_means_there() -> None:
    """A26: `hook_q` is before the rotation; refused with the name that is met."""
    with pytest.raises(PellucidError, match="rotat"):
        opened("llama").run(CLEAN, keep=["blocks.0.attn.hook_q"])


def test_whole_numbers_are_numbers() -> None:
    """A27: integer labels are a value unless classes are asked for."""
    spans = pl.probing.Spans.whole([f"{CLEAN} {n}" for n in range(6)])
    made = pl.probing.Examples(spans, [1, 2, 3, 4, 5, 6])
    assert "numbers" in repr(made) and "numbers" not in repr(pl.probing.Examples(spans, [1, 2] * 3, kind="classes"))


def test_a_spread_beside_a_huge_mean() -> None:
    """A27: the standard deviation of a unit whose mean is huge."""
    module = build("gpt2")
    with torch.no_grad():  # the first neuron stands at 4,000 and moves by a few thousandths
        module.transformer.h[0].mlp.c_fc.bias[0] = 4000.0
        module.transformer.h[0].mlp.c_fc.weight[:, 0] *= 0.01
    model = pl.load(module, tokenizer=tokenizer())
    found = pl.neurons.harvest(model, [CLEAN, LONG] * 4, ["layers.0.mlp.neurons"], top=2, sample=4)
    values: list[torch.Tensor] = []
    handle = module.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda m, a: values.append(a[0][0]))
    with torch.no_grad():
        for text in (CLEAN, LONG):
            module(torch.tensor([model.tokenizer(text)["input_ids"]]))
    handle.remove()
    wanted = torch.cat(values).double().std(0, unbiased=False)
    assert close(torch.as_tensor(np.asarray(found.std("layers.0.mlp.neurons"))) / wanted, torch.ones(len(wanted)), 0.05)


def test_results_are_read_in_order() -> None:
    """B14: layers are integers and stay in order when printed."""
    data = pl.lenses.logit_lens(opened("llama"), CLEAN).data
    assert data["layer"].dtype.kind == "i" and data["layer"].values.tolist() == sorted(data["layer"].values.tolist())
    assert Refused
