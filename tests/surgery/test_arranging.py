"""Rearranged models equal a loop over the old model's own blocks by hand, generate with a cache as without, and are saved.

The loop is written here for plain modules: each block is called with what it was called with in the old model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.surgery import parallel, remove, reorder, repeat, swap
from tests.zoo import build, tokenizer

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "falcon", "gptj", "granite", "olmo2", "bert", "opt"]
ORDERS: list[list[Any]] = [[0, 2, 3], [0, 1, 2, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [1]]
AVERAGED = ["llama", "gpt2", "gemma3_text", "mixtral", "gptj", "bert"]
ABREAST: list[Any] = [0, [1, 3], [1, 3], 2]  # side by side, and twice


@cache
def opened(family: str) -> pl.Model:
    module = build(family, layers=4)
    return pl.load(module, tokenizer=tokenizer(module))


def ids(model: pl.Model, rows: int = 2, n: int = 7) -> dict[str, Tensor]:
    made = torch.randint(5, 90, (rows, n), generator=torch.Generator().manual_seed(0))
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


def by_hand(model: pl.Model, order: list[Any], inputs: dict[str, Tensor]) -> Tensor:
    """The residual after the blocks in another order, each given what it was given in the old model."""
    blocks = [model.module.get_submodule(b.module) for b in model.anatomy.stacks[-1].blocks]
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, a, k, i=i: calls.setdefault(i, (a, dict(k))), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    accepts = "use_cache" in transformers.AutoConfig.for_model(model.module.config.model_type).to_dict()
    with torch.no_grad():
        model.module(**inputs, **({"use_cache": False} if accepts else {}))
        for hook in hooks:
            hook.remove()
        x = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
        for place in order:
            made = []
            for i in place if isinstance(place, list) else [place]:
                args, kwargs = calls[i]
                kwargs = {k: None if isinstance(v, transformers.Cache) else v for k, v in kwargs.items()}
                args = tuple(None if isinstance(v, transformers.Cache) else v for v in args)
                out = blocks[i](x, *args[1:], **kwargs) if args else blocks[i](**{**kwargs, "hidden_states": x})
                made.append(out[0] if isinstance(out, tuple) else out)
            x = sum(made) / len(made)
    return x


@pytest.mark.parametrize(
    ("family", "order"),
    [(family, order) for family in FAMILIES for order in [*ORDERS, *([ABREAST] if family in AVERAGED else [])]],
    ids=str,
)
def test_any_order_is_a_loop_over_the_blocks_and_generates_with_a_cache(family: str, order: list[Any]) -> None:
    model = opened(family)
    made = reorder(model, order)
    inputs = ids(model)
    last = f"layers.{len(order) - 1}.resid_post"
    torch.testing.assert_close(
        made.run(inputs, keep=[last]).tensor(last), by_hand(model, order, inputs), rtol=1e-4, atol=1e-5
    )
    if family != "bert":
        said = [made.generate(inputs, max_new_tokens=5, scores=True, use_cache=c).scores for c in (True, False)]
        torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
        native = made.module.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(native[:, 7:], made.generate(inputs, max_new_tokens=5).tokens[:, : native.shape[1] - 7])


def test_weights_are_shared_and_the_old_model_keeps_every_bit() -> None:
    model = opened("llama")
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    config = model.module.config.to_dict()
    made = repeat(model, slice(1, 3), times=3)
    assert len(made.anatomy.stacks[0].blocks) == 8 and len(model.anatomy.stacks[0].blocks) == 4
    assert {p.data_ptr() for p in made.module.parameters()} == {p.data_ptr() for p in model.module.parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert model.module.config.to_dict() == config and made.module.config.num_hidden_layers == 8
    assert made.digest != model.digest and "Arranged" in repr(made.loaded.changes)
    same = reorder(model, range(4))
    assert torch.equal(same.run(ids(model)).logits, model.run(ids(model)).logits)
    twice = swap(swap(model, 1, 2), 1, 2)
    assert torch.equal(twice.run(ids(model)).logits, model.run(ids(model)).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_it_is_saved_and_opened_by_plain_transformers(family: str, tmp_path: Path) -> None:
    model = opened(family)
    made = remove(swap(model, 0, 3), -1)
    made.module.save_pretrained(tmp_path)
    again = type(model.module).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**ids(model)).logits, made.run(ids(model)).logits, rtol=1e-5, atol=1e-5)
    twice = repeat(made, slice(1, 3)).changed(pl.changed.Copied(()))
    twice.module.save_pretrained(tmp_path)
    again = type(model.module).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**ids(model)).logits, twice.run(ids(model)).logits, rtol=1e-5, atol=1e-5)
    if family == "gemma3_text":
        kinds = model.module.config.layer_types
        assert made.module.config.layer_types == [kinds[i] for i in (3, 1, 2)]


def test_layers_side_by_side_are_kept_in_a_change_file_alone(tmp_path: Path) -> None:
    model = opened("llama")
    made = parallel(model, slice(1, 3))
    assert made.loaded.changes[0].settings()["order"] == (0, (1, 2), 3) and len(made.layers) == 3
    with pytest.raises(Refused, match="opened as another model; use save_changes"):
        made.module.save_pretrained(tmp_path)
    back = model.changed(made.save_changes(tmp_path / "parallel.safetensors"))
    assert torch.equal(back.run(ids(model)).logits, made.run(ids(model)).logits)
    assert made.undo() is model and [p.name for p in made.anatomy.proofs if p.holds is False] == [
        "residual",
        "attention",
    ]
    alone = reorder(model, [[0], 1, [2], 3])
    assert torch.equal(alone.run(ids(model)).logits, model.run(ids(model)).logits)
    alone.module.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="given another 'attention_mask'"):
        parallel(opened("gemma3_text"), slice(1, 3))  # sliding and full attention
    assert len(parallel(opened("t5"), [1, 2], stack="decoder").decoder.layers) == 3


def test_both_sides_of_an_encoder_decoder() -> None:
    for family in ("bart", "m2m_100"):
        model = opened(family)
        for stack, n in (("encoder", 3), ("decoder", 3)):
            made = remove(model, 1, stack=stack)
            assert [len(s.blocks) for s in made.anatomy.stacks] == ([n, 4] if stack == "encoder" else [4, n])
            assert made.generate("The capital of France is", max_new_tokens=3).lengths[0] >= 1
    with pytest.raises(InputError, match="'encoder', 'decoder'"):
        remove(opened("bart"), 1)


def test_edits_sweeps_and_gradients_work_on_what_was_made() -> None:
    made = repeat(opened("llama"), 1)
    found = pl.causal.ablation(
        made, "The capital of France is", over="layers.*.mlp.out", how="zero", metric=pl.metrics.logit(7)
    )
    assert found.effect.sizes["layer"] == 5
    clean = made.run("The capital of France is").logits[0, -1, 7]
    for layer in range(5):
        edited = made.run("The capital of France is", edits=[pl.Ablate(f"layers.{layer}.mlp.out")]).logits[0, -1, 7]
        assert float(found.effect.sel(layer=layer)) == pytest.approx(float(edited - clean), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("t5", [1, 0, 2, 3]),  # the first block makes the position bias of all
        ("jamba", [0, 2, 3]),  # kinds of layers follow from their number
        ("zamba2", [0, 2, 3]),
        ("qwen3_next", [0, 2, 3]),
        ("albert", [1, 0]),  # one block, many times
    ],
)
def test_what_belongs_to_the_place_is_refused_by_name(family: str, order: list[int]) -> None:
    model = opened(family)
    stack = "decoder" if len(model.anatomy.stacks) > 1 else ""
    with pytest.raises(Refused) as caught:
        reorder(model, order, stack=stack)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda m: reorder(m, []), "no layer is left"),
        (lambda m: reorder(m, [0, 4]), "there is no layer 4"),
        (lambda m: reorder(m, [0.5]), "expected the numbers of layers"),
        (lambda m: reorder(m, None), "expected the numbers of layers"),
        (lambda m: reorder(m, [0, []]), "no layer is left"),
        (lambda m: reorder(m, [0, [1, 9]]), "there is no layer 9"),
        (lambda m: reorder(m, [0, [1, [2, 3]]]), "expected the numbers of layers"),
        (lambda m: parallel(m, [0, 2]), "no span"),
        (lambda m: remove(m, slice(None)), "no layer is left"),
        (lambda m: remove(m, "1"), "expected a number"),
        (lambda m: remove(m, 9), "there is no layer 9"),
        (lambda m: repeat(m, [0, 2]), "no span"),
        (lambda m: repeat(m, 1, times=0), "at least 1"),
        (lambda m: repeat(m, 1, times=2.5), "a whole number"),
        (lambda m: remove("gpt2", 1), "expected a model"),
        (lambda m: swap(m, 0, 7), "there is no layer 7"),
        (lambda m: remove(m, 1, stack="encoder"), "one stack"),
    ],
)
def test_bad_orders_are_one_clear_error(call: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        call(opened("llama"))
