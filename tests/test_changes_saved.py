"""A change file makes the same model again, bit for bit, on its base and on no other; undo is bit for bit in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import pellucid as pl
from pellucid.changed import Added, Change, Copied, Exchanged, Replaced, slots
from pellucid.controls import Redrawn, Shuffled
from pellucid.errors import InputError
from pellucid.surgery import Arranged
from tests.engine.hand import PROMPTS, opened
from tests.zoo import build, tokenizer

DOWN = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_proj.weight",
    "mixtral": "model.layers.1.mlp.experts.down_proj",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wo.weight",
    "bert": "bert.encoder.layer.0.output.dense.weight",
}


def tensors(model: pl.Model) -> dict[str, Tensor]:
    return {name: getattr(*slot) for name, slot in slots(model.module).items()}


def equal(one: pl.Model, other: pl.Model) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def low_rank(model: pl.Model, name: str, seed: int = 1) -> Added:
    *many, rows, columns = tensors(model)[name].shape
    part = (1,) if many else ()
    drawn = [
        torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for s in ((rows, 1), (1, columns))
    ]
    return Added(name, *drawn, part=part)


def again(model: pl.Model, path: Path) -> pl.Model:
    """Saved, and made again on the base opened anew."""
    assert model.base is not None
    module = model.base.module
    fresh = pl.load(type(module)(module.config).to(module.dtype), tokenizer=model.tokenizer, probe=model.anatomy.inputs)
    fresh.module.load_state_dict(module.state_dict())
    return pl.load(fresh.module, tokenizer=model.tokenizer, probe=model.anatomy.inputs).changed(
        model.save_changes(path)
    )


@pytest.mark.parametrize("family", DOWN)
def test_every_kind_of_change_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    base, name = opened(family), DOWN[family]
    old = tensors(base)[name]
    factors = [low_rank(base, name), low_rank(base, name, 2)]
    numbers = [Replaced(name, old.flip(-1)), Copied((name,)), Copied()]
    made = base.changed([*factors, *numbers, Shuffled(3), Redrawn((name,), 1), *factors])
    back = again(made, tmp_path / "change.safetensors")
    assert equal(back, made) and back.digest == made.digest and back.loaded.changes == made.loaded.changes
    assert torch.equal(back.run(PROMPTS[0]).logits, made.run(PROMPTS[0]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_in_any_order_also_after_a_file_is_as_if_it_had_never_been(dtype: torch.dtype, tmp_path: Path) -> None:
    module = build("llama").to(dtype)
    base = pl.load(module, tokenizer=tokenizer(module))
    kept = {n: t.clone() for n, t in tensors(base).items()}
    name = DOWN["llama"]
    changes = [low_rank(base, name, seed) for seed in range(3)]
    edited = base
    for change in changes:
        edited = edited.changed(change)
    loaded = base.changed(edited.save_changes(tmp_path / "edits.safetensors"))
    assert equal(loaded, edited)
    for of in (edited, loaded):
        for gone in ((0,), (1,), (0, 2), (-1, 1)) if of is edited else ((1,),):
            left = [c for i, c in enumerate(changes) if i not in {g % 3 for g in gone}]
            undone = of.undo(*gone)
            assert equal(undone, base.changed(left)) and undone.loaded.changes == tuple(left)
        assert of.undo(0).undo(0).undo(0) is base and of.undo(0, 1, 2) is base
    assert loaded.undo() is base  # one file, one step
    assert equal(edited.undo(), base.changed(changes[:2])) and edited.undo().undo().undo() is base
    assert equal(edited.undo(0).undo(), base.changed(changes[1])), "steps are kept when one in the middle goes"
    assert all(torch.equal(t, kept[n]) for n, t in tensors(base).items())
    with pytest.raises(InputError, match="nothing to undo"):
        base.undo()
    with pytest.raises(InputError, match="no change 3 to undo"):
        edited.undo(3)


def test_a_change_that_raises_half_way_leaves_everything_and_what_differs_is_said() -> None:
    base = opened("llama")
    kept, name = {n: t.clone() for n, t in tensors(base).items()}, DOWN["llama"]
    with pytest.raises(InputError, match="no parameter"):
        base.changed([low_rank(base, name), Replaced("model.nowhere", torch.ones(1))])
    assert all(torch.equal(t, kept[n]) for n, t in tensors(base).items())
    change = low_rank(base, name)
    edited = base.changed(change)
    table = edited.diff()
    assert list(table.index) == [name] and len(base.diff()) == 0 and len(base.changed([]).diff()) == 0
    old = tensors(base)[name].detach().double()
    gap = tensors(edited)[name].detach().double() - old
    assert table.relative.iloc[0] == pytest.approx(float(gap.norm() / old.norm()))
    assert table.largest.iloc[0] == pytest.approx(float(gap.abs().max()))
    assert len(pl.surgery.swap(base, 0, 1).diff()) == 0, "what only stands elsewhere is the same"


def test_training_after_the_change_is_kept_with_it(tmp_path: Path) -> None:
    base = opened("gpt2")
    made = base.changed([low_rank(base, DOWN["gpt2"]), Copied()])
    with torch.no_grad():
        made.module.transformer.h[0].ln_1.weight.mul_(1.5)
        made.module.transformer.wte.weight.add_(0.1)  # tied
    back = again(made, tmp_path / "trained.safetensors")
    assert equal(back, made) and back.module.lm_head.weight.data_ptr() == back.module.transformer.wte.weight.data_ptr()
    assert set(back.diff().index) == {DOWN["gpt2"], "transformer.h.0.ln_1.weight", "transformer.wte.weight"}


def test_rearranged_and_edited_models_come_back(tmp_path: Path) -> None:
    for family in ("llama", "gemma3_text"):
        base = opened(family)
        made = pl.surgery.repeat(pl.surgery.swap(base, 0, 1), 1)
        made = made.changed(low_rank(base, next(n for n in tensors(base) if n.endswith("0.self_attn.o_proj.weight"))))  # fmt: skip
        back = again(made, tmp_path / "arranged.safetensors")
        assert [type(c) for c in back.loaded.changes] == [Arranged, Arranged, Added] and equal(back, made)
        assert torch.equal(back.run(PROMPTS[0]).logits, made.run(PROMPTS[0]).logits)
        assert back.generate(PROMPTS[:2], max_new_tokens=4).texts == made.generate(PROMPTS[:2], max_new_tokens=4).texts


def test_factors_are_small_and_nothing_foreign_is_written(tmp_path: Path) -> None:
    class Mine(Change):
        def apply(self, tree: Any) -> None: ...

    base = opened("llama")
    name = DOWN["llama"]
    size = (
        base.changed([low_rank(base, name, i) for i in range(20)])
        .save_changes(tmp_path / "a.safetensors")
        .stat()
        .st_size
    )
    factors = 20 * 8 * sum(tensors(base)[name].shape)
    assert size < factors + 20 * 2 * 150 + 20 * 300, "factors and their names, and nothing else"
    foreign: list[tuple[pl.Model, str]] = [
        (base.changed(Exchanged("model.norm", nn.Identity())), "by= holds a Identity, and a file holds no code"),
        (base.changed(Mine()), "its class is no part of pellucid"),
        (base, "carries no changes"),
    ]
    for model, what in foreign:
        with pytest.raises(InputError, match=what):
            model.save_changes(tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_file_of_another_base_or_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    base = opened("llama")
    file = base.changed(low_rank(base, DOWN["llama"])).save_changes(tmp_path / "a.safetensors")
    for other in (opened("gpt2"), opened("llama").changed(Shuffled(1)), pl.load(build("llama").to(torch.bfloat16))):
        with pytest.raises(InputError, match=r"was made on LlamaForCausalLM \(.*open that model, in the dtype it had"):
            other.changed(file)
    with pytest.raises(InputError, match="holds no changes"):
        base.changed(tmp_path / "missing.safetensors")
    edits = pl.save_edits(pl.Ablate("layers.0.mlp.out"), tmp_path / "edits.safetensors")
    with pytest.raises(InputError, match="holds no changes"):
        base.changed(edits)
    with pytest.raises(InputError, match="holds no edits"):
        pl.load_edits(file)


def test_what_is_drawn_otherwise_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened("llama")
    file = base.changed(Shuffled(3)).save_changes(tmp_path / "a.safetensors")
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: randperm(n, **options).flip(0))
    with pytest.raises(InputError, match="make other weights here"):
        base.changed(file)


def test_an_opened_tie_and_a_gguf_file_are_saved_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from tests.anatomy.test_gguf import logits, written

    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    base = pl.load(written(tmp_path / "tiny.gguf"))
    head = tensors(base)["lm_head.weight"]
    edited = base.changed([low_rank(base, DOWN["llama"]), Replaced("lm_head.weight", head.detach() * 2, ties="apart")])
    pruned = pl.surgery.remove(edited, 0)
    mixed = pl.surgery.remix(
        {"a": base, "b": base.changed(low_rank(base, DOWN["llama"]))}, [("b", 1, 2), ("a", 0, 1), ("b", 0, 2)]
    )
    for made in (edited, pruned, mixed):
        made.module.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(again), logits(made.module), rtol=0, atol=1e-6)
    tied = opened("gpt2")
    bent = tied.changed(Replaced("lm_head.weight", tensors(tied)["lm_head.weight"].detach() * 2, ties="apart"))
    assert tied.module.config.tie_word_embeddings and not bent.module.config.tie_word_embeddings
    bent.module.save_pretrained(tmp_path / "bent")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bent")
    ids = tied.inputs(PROMPTS[0]).tensors
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, bent.module(**ids).logits)
