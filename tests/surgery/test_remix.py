"""A remix is a module whose layers were loaded by hand from the other checkpoint; recipes are mergekit's slices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.surgery import Recipe, remix, reorder, swap, take
from tests.surgery.test_arranging import ids, opened
from tests.zoo import build, tokenizer

FAMILIES = ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "bert"]


def snapshot(model: pl.Model, seed: int = 1) -> pl.Model:
    """A model of the same shape with all numbers moved, and its ties kept."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return pl.load(module, tokenizer=model.tokenizer)


def logits(model: pl.Model) -> Tensor:
    with torch.no_grad():
        return model.module(**ids(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_remix_is_the_layers_of_both_loaded_by_hand(family: str) -> None:
    a = opened(family)
    b = snapshot(a)
    recipe = Recipe((("a", 0, 2), ("b", 1, 2), ("a", 3, 4)))
    made = remix({"a": a, "b": b}, recipe)
    truth = reorder(a, [0, 1, 1, 3])
    block = a.anatomy.stacks[0].blocks[1].module
    module = copy.deepcopy(truth.module)
    place = f"{block.rpartition('.')[0]}.2"
    module.get_submodule(place).load_state_dict(copy.deepcopy(b.module.get_submodule(block).state_dict()))
    shared = made.module.get_submodule(block), module.get_submodule(block)
    assert all(torch.equal(x, y) for x, y in zip(*(m.parameters() for m in shared), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(logits(made), module(**ids(a)).logits, rtol=1e-5, atol=1e-5)
    if family != "bert":
        said = [made.generate(ids(a), max_new_tokens=4, scores=True, use_cache=c).scores for c in (True, False)]
        torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_remix_with_itself_and_a_swap_done_twice_are_the_model_to_the_bit(family: str) -> None:
    a = opened(family)
    b = snapshot(a)
    same = remix({"one": a, "other": a}, [("one", 0, 1), ("other", 1, 3), ("one", 3, 4)])
    assert torch.equal(logits(same), logits(a)) and same.loaded.changes == ()
    back = take(take(a, b, slice(1, 3)), a, slice(1, 3))
    assert torch.equal(logits(back), logits(a)) and back.digest == a.digest
    assert not torch.equal(logits(take(a, b, slice(1, 3))), logits(a))
    assert torch.equal(logits(swap(swap(a, 0, 2), 0, 2)), logits(a))


def test_the_ends_are_those_of_the_first_and_the_last_slice_and_a_tied_head_stays() -> None:
    for family in ("llama", "gpt2"):
        a = opened(family)
        b = snapshot(a)
        whole = remix({"a": a, "b": b}, [("b", 0, 4)])
        assert whole.digest == b.digest
        ends = remix({"a": a, "b": b}, [("a", 0, 2), ("b", 2, 4)])
        own, of_a, of_b = (m.module.state_dict() for m in (ends, a, b))
        embed, norm = {"llama": ("model.embed_tokens.weight", "model.norm.weight"), "gpt2": ("transformer.wte.weight", "transformer.ln_f.weight")}[family]  # fmt: skip
        assert torch.equal(own[embed], of_a[embed]) and torch.equal(own[norm], of_b[norm])
        assert torch.equal(own["lm_head.weight"], (of_b if family == "llama" else of_a)["lm_head.weight"])


def test_remixes_are_saved_both_ways(tmp_path: Path) -> None:
    a = opened("gemma3_text")
    b = snapshot(a)
    made = remix({"a": a, "b": b}, [("b", 0, 1), ("a", 3, 4), ("b", 1, 2)])
    assert made.base is b, "the first slice's model"
    assert torch.equal(logits(b.changed(made.save_changes(tmp_path / "mix.safetensors"))), logits(made))
    made.module.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(type(a.module).from_pretrained(tmp_path / "whole")(**ids(a)).logits, logits(made))
    assert made.module.config.layer_types == [a.module.config.layer_types[i] for i in (0, 3, 1)]
    assert made.undo() is b


def test_recipes_are_mergekits_slices(tmp_path: Path) -> None:
    recipe = Recipe.of([("org/a-1b", 0), ("org/a-1b", 1), ("b: x", 5), ("org/a-1b", 2), ("org/a-1b", 2)])
    assert recipe.slices == (("org/a-1b", 0, 2), ("b: x", 5, 6), ("org/a-1b", 2, 3), ("org/a-1b", 2, 3))
    plain = yaml.safe_load(recipe.yaml())
    assert plain["merge_method"] == "passthrough" and plain["slices"][1] == {
        "sources": [{"model": "b: x", "layer_range": [5, 6]}]
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.yaml() + "dtype: bfloat16\n")
    assert Recipe.read(file) == Recipe.read(str(file)) == recipe
    a = opened("llama")
    text = "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 4]\nmerge_method: passthrough\n"
    assert torch.equal(logits(remix({"a": a}, text)), logits(a))
    for broken, error, what in [
        ("models:\n  - model: a\n", InputError, "no recipe"),
        (str(tmp_path / "missing.yaml"), InputError, "no recipe"),
        (text.replace("passthrough", "slerp"), Refused, "slerp"),
        (text.replace("[0, 4]", "[0, 4]\n      - model: b\n        layer_range: [0, 4]"), Refused, "several models"),
        (text + "parameters:\n  scale: 0.5\n", Refused, "parameters"),
        (text + "tokenizer_source: union\n", Refused, "tokenizer_source"),
        (text.replace("[0, 4]", "[3, 3]"), InputError, "holds no layer"),
        (text.replace("[0, 4]", "[0, 4, 5]"), InputError, "no slices"),
    ]:
        with pytest.raises(error, match=what):
            Recipe.read(broken)


def test_what_does_not_fit_is_refused_by_name() -> None:
    a = opened("llama")
    words = tokenizer(a.module)
    words.add_tokens(["<new>"])
    module = copy.deepcopy(a.module)
    bent = copy.deepcopy(a.module)
    bent.config.rope_parameters = {**bent.config.rope_parameters, "rope_theta": 500.0}
    for b, what in [
        (opened("gpt2"), "one is a GPT2LMHeadModel"),
        (pl.load(build("llama", layers=2), tokenizer=a.tokenizer), "num_hidden_layers is 2 there and 4 here"),
        (pl.load(bent, tokenizer=a.tokenizer), "rope_parameters"),
        (pl.load(copy.deepcopy(a.module).to(torch.bfloat16), tokenizer=a.tokenizer), "torch.bfloat16"),
        (pl.load(module, tokenizer=words), "their tokenizers differ"),
        (pl.load(module), "opened without a tokenizer"),
    ]:
        for call in (lambda: remix({"a": a, "b": b}, [("a", 0, 2), ("b", 2, 4)]), lambda: take(a, b, 1)):
            with pytest.raises(Refused, match=what):
                call()
    cases: list[tuple[Any, str]] = [
        ([("a", 0, 2), ("c", 2, 4)], "speaks of 'c'"),
        ([("a", 0, 9)], "there is no layer 4"),
        ([], "without slices"),
        ([("a", 2, 1)], "holds no layer"),
        ([("a", 2)], "no slices"),
    ]
    for recipe, what in cases:
        with pytest.raises(InputError, match=what):
            remix({"a": a, "b": a}, recipe)
    with pytest.raises(InputError, match="by the names of the recipe"):
        remix([a], [("a", 0, 2)])  # type: ignore[arg-type]
    with pytest.raises(Refused, match="does not run with its layers as"):
        remix({"j": opened("jamba")}, [("j", 0, 1), ("j", 2, 4)])


def test_packed_weights_are_not_taken_from_another_model() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    packed = []
    for seed in (0, 1):
        module = build("llama", layers=2, seed=seed)
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
        packed.append(pl.load(module, tokenizer=tokenizer(module)))
    for into in (packed[0], pl.load(build("llama", layers=2), tokenizer=packed[0].tokenizer)):
        with pytest.raises(Refused, match="q_proj.weight cannot be taken from another model: it is quantised"):
            take(into, packed[1], 1)


def test_both_sides_of_an_encoder_decoder_are_mixed_by_themselves() -> None:
    a = opened("t5")
    b = snapshot(a)
    for stack in ("encoder", "decoder"):
        made = take(a, b, slice(1, 4), stack=stack)
        own = {n for n, t in made.module.state_dict().items() if not torch.equal(t, a.module.state_dict()[n])}
        assert own and all(n.startswith(f"{stack}.block.") and not n.startswith(f"{stack}.block.0.") for n in own)
        assert torch.equal(
            remix({"a": a}, [("a", 0, 4)], stack=stack).run("he is", decoder="he").logits,
            a.run("he is", decoder="he").logits,
        )
