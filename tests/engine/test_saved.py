"""Edits come back from a file as what they were: the same logits to the bit; what is code is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pellucid as pl
from pellucid.causal.alignment import RotatedSwap
from pellucid.engine import checkpoint
from pellucid.engine.edits import Swap
from pellucid.errors import InputError
from tests.engine.hand import PROMPTS, opened

V = torch.randn(32, generator=torch.Generator().manual_seed(0))
SITE = "layers.1.resid_pre"


def edits(model: pl.Model) -> dict[str, list[Any]]:
    run = model.run(PROMPTS[0], keep=[SITE, "layers.0.attn.z_out"])
    several = model.run([PROMPTS[0], "One two"], keep=["layers.0.attn.z_out"])
    return {
        "zero": [pl.Ablate("layers.*.attn.heads.1")],
        "mean": [pl.Ablate("layers.0.attn.heads.1", "mean", reference=several)],
        "prompts": [pl.Ablate("layers.0.attn.heads.1", "resample", reference=("One two", PROMPTS[1]), seed=3)],
        "patch": [pl.Patch(f"{SITE}@-1", run, source_at=2)],
        "tensor": [pl.Patch(f"{SITE}@0", V)],
        "several": [pl.Steer(f"{SITE}@1", V, 2.0), pl.Scale("layers.0.mlp.neurons.3", 0.5), pl.ProjectOut(SITE, V)],
        "swap": [Swap("layers.0.attn.z_out", torch.zeros(1, 3, 2, 8), (0, 2))],
        "rotated": [RotatedSwap(SITE, source=torch.zeros(1, 9, 32), rotation=V[:, None] / V.norm())],
    }


@pytest.mark.parametrize("name", edits(opened("llama")))
def test_saved_edits_do_what_they_did(name: str, tmp_path: Path) -> None:
    model = opened("llama")
    made = edits(model)[name]
    back = pl.load_edits(pl.save_edits(made, tmp_path / "edits.safetensors", model=model), model=model)
    assert [type(e) for e in back] == [type(e) for e in made]
    assert [str(e.site) for e in back] == [str(e.site) for e in made]
    prompt = PROMPTS[0]
    assert torch.equal(model.run(prompt, edits=back).logits, model.run(prompt, edits=made).logits)
    assert not torch.equal(model.run(prompt, edits=back).logits, model.run(prompt).logits)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model, file = opened("llama"), tmp_path / "edits.safetensors"
    steered = model.run(PROMPTS[0], keep=[SITE], edits=[pl.Steer(SITE, V)])
    for edit, what in [
        (pl.Replace(SITE, lambda x: x), "function"),
        (pl.Steer(SITE, V, when=lambda step: True), "when"),
        (pl.Patch(SITE, steered), "Run"),
        ("layers.0.mlp.out", "no edit"),
    ]:
        with pytest.raises(InputError, match=what):
            pl.save_edits([edit], file)  # type: ignore[list-item]
        assert not file.exists()


def test_a_file_of_something_else_or_of_other_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "edits.safetensors"
    for kind in ("engine.edits:Place", "engine.edits:torch", "nowhere:Edit", "../x:y", "engine.edits:Edit.nothing"):
        save_file(
            {},
            str(file),
            {"pellucid_edits": f'{{"edits": [{{"kind": "{kind}", "site": "embed", "values": {{}}}}], "digest": ""}}'},
        )
        with pytest.raises(InputError, match="holds no edits"):
            pl.load_edits(file)
    for bad in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="holds no edits"):
            pl.load_edits(bad)
    pl.save_edits(pl.Steer(SITE, V), file, model=opened("llama"))
    with pytest.raises(InputError, match="weights"):
        pl.load_edits(file, model=opened("gpt2"))
    with pytest.raises(InputError, match="weights"):
        opened("gpt2").run(PROMPTS[0], edits=pl.load_edits(file))
    pl.save_edits(pl.Steer(SITE, V), file)
    opened("gpt2").run(PROMPTS[0], edits=pl.load_edits(file))  # tied to none


def test_a_file_stays_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint.write_tensors(tmp_path / "kept.safetensors", "key", {"n": 1}, {"v": V})

    def full(tensors: Any, path: str, about: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="full"):
        checkpoint.write_tensors(file, "key", {"n": 2}, {"v": V})
    with checkpoint.reading_tensors(file, "key", "is none") as (about, tensors):
        assert about == {"n": 1} and torch.equal(tensors["v"], V)
