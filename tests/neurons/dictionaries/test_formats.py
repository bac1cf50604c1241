"""Dictionaries of other tools are read as those tools use them: activations and reconstructions by their own formulas.

Files are written here as the tools write them; `python benchmarks/dictionary_formats.py` lets the tools themselves do it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pellucid.errors import InputError, Refused
from pellucid.neurons.dictionaries import Dictionary, formats

G = torch.Generator().manual_seed(0)
E, D, T = torch.randn(6, 10, generator=G), torch.randn(10, 6, generator=G), torch.rand(10, generator=G)
B, C, R, M = (torch.randn(n, generator=G) for n in (10, 6, 10, 10))
X = torch.randn(7, 6, generator=G)


def top(u: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(u)
    for row, values in zip(kept, u.relu(), strict=True):
        for i in values.argsort(descending=True)[:k]:
            row[i] = values[i]
    return kept


def same(d: Dictionary, f: Tensor, decoder: Tensor = D) -> None:
    """Features may be counted in other units (rows of length 1): what they write must agree, and which are on."""
    torch.testing.assert_close(d.decode(d.encode(X)), f @ decoder + C, rtol=1e-4, atol=1e-4)
    assert torch.equal(d.encode(X) > 0, f > 0)
    each = f[:, :, None] * decoder
    torch.testing.assert_close(d.encode(X)[:, :, None] * d.decoder, each, rtol=1e-4, atol=1e-4)


def learning(folder: Path, kind: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "gpt2", "submodule_name": "resid_post_layer_3", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


LINEAR = {"encoder.weight": E.T.contiguous(), "encoder.bias": B, "decoder.weight": D.T.contiguous()}
PLAIN = {"W_enc": E, "b_enc": B, "W_dec": D, "b_dec": C}
U = (X - C) @ E + B


@pytest.mark.parametrize(
    ("kind", "tensors", "features"),
    [
        ("AutoEncoder", {**LINEAR, "bias": C}, U.relu()),
        ("AutoEncoderNew", {**LINEAR, "decoder.bias": C}, (X @ E + B).relu()),
        ("AutoEncoderTopK", {**LINEAR, "b_dec": C, "k": torch.tensor(3), "threshold": torch.tensor(0.1)}, top(U, 3)),
        ("BatchTopKSAE", {**LINEAR, "b_dec": C, "k": torch.tensor(3), "threshold": torch.tensor(0.7)}, U * (U > 0.7)),
        ("MatryoshkaBatchTopKSAE", {**PLAIN, "k": torch.tensor(3), "threshold": torch.tensor(0.7),
                                    "group_sizes": torch.tensor([4, 6])}, U * (U > 0.7)),
        ("JumpReluAutoEncoder", {**PLAIN, "threshold": T}, (X @ E + B) * (X @ E + B > T)),
        ("GatedAutoEncoder", {"encoder.weight": E.T.contiguous(), "decoder.weight": D.T.contiguous(), "decoder_bias": C,
                              "r_mag": R, "gate_bias": B, "mag_bias": M},
         (((X - C) @ E + B) > 0) * (R.exp() * ((X - C) @ E) + M).relu()),
    ],
)  # fmt: skip
def test_dictionary_learning(tmp_path: Path, kind: str, tensors: dict[str, Tensor], features: Tensor) -> None:
    d = Dictionary.load(learning(tmp_path, kind, tensors))
    same(d, features)
    assert (d.site, d.writes, d.model) == ("layers.3.resid_post", "layers.3.resid_post", "gpt2")
    back = Dictionary.load(d.save(tmp_path / "again"))  # in our form
    torch.testing.assert_close(back.encode(X), d.encode(X), rtol=1e-4, atol=1e-4)
    (tmp_path / "config.json").unlink()
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(InputError, match="look alike"):
            Dictionary.load(tmp_path, site="layers.1.mlp.out")
    else:
        same(Dictionary.load(tmp_path, site="layers.1.mlp.out"), features)


@pytest.mark.parametrize(("folder", "site"), [("layers.3", "layers.3.resid_post"), ("h.3", "layers.3.resid_post"),
                                              ("layers.3.mlp", "layers.3.mlp.out"), ("model.layers.3.self_attn", "layers.3.attn.out")])  # fmt: skip
def test_sparsify(tmp_path: Path, folder: str, site: str) -> None:
    path = tmp_path / folder
    path.mkdir()
    save_file(
        {"encoder.weight": E.T.contiguous(), "encoder.bias": B, "W_dec": D, "b_dec": C}, str(path / "sae.safetensors")
    )
    config = {
        "activation": "topk",
        "k": 3,
        "d_in": 6,
        "normalize_decoder": True,
        "transcode": False,
        "skip_connection": False,
    }
    (path / "cfg.json").write_text(json.dumps(config))
    d = Dictionary.load(path)
    same(d, top(U, 3))
    assert d.site == d.writes == site
    (path / "cfg.json").write_text(json.dumps(config | {"transcode": True}))
    with pytest.raises(InputError, match="does not say where it belongs"):
        Dictionary.load(path)
    same(Dictionary.load(path, site="layers.3.resid_mid", writes="layers.3.mlp.out"), top(X @ E + B, 3))
    for wrong in ({"skip_connection": True}, {"activation": "groupmax"}, {"signed": True}):
        (path / "cfg.json").write_text(json.dumps(config | wrong))
        with pytest.raises(Refused):
            Dictionary.load(path)


def test_gemma_scope(tmp_path: Path) -> None:
    expected = (X @ E + B) * (X @ E + B > T)
    for release, site in (("res", "resid_post"), ("mlp", "mlp.out")):
        path = tmp_path / f"gemma-scope-2b-pt-{release}" / "layer_12/width_16k/average_l0_71"
        path.mkdir(parents=True)
        np.savez(path / "params.npz", **{k: v.numpy() for k, v in PLAIN.items()}, threshold=T.numpy())
        d = Dictionary.load(path)
        same(d, expected)
        assert d.site == f"layers.12.{site}"
    path = tmp_path / "gemma-scope-2b-pt-att/layer_12"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **{k: v.numpy() for k, v in PLAIN.items()}, threshold=T.numpy())
    with pytest.raises(
        InputError, match="does not say where it belongs"
    ):  # z of all heads in one: no vectors at a site
        Dictionary.load(path)
    np.savez(path / "params.npz", **{k: v.numpy() for k, v in PLAIN.items()}, threshold=T.numpy(), scaling_factor=2.0)
    with pytest.raises(Refused, match="scaling_factor"):
        Dictionary.load(path, site="embed")
    second = tmp_path / "resid_post/layer_7_width_16k"
    second.mkdir(parents=True)
    save_file({k.lower(): v for k, v in PLAIN.items()} | {"threshold": T}, str(second / "params.safetensors"))
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-3-1b-pt",
        "hf_hook_point_in": "a",
        "hf_hook_point_out": "a",
    }
    (second / "config.json").write_text(json.dumps(config))
    d = Dictionary.load(second)
    same(d, expected)
    assert (d.site, d.model) == ("layers.7.resid_post", "gemma-3-1b-pt")


def test_a_repository_on_the_hub_is_fetched_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learning(tmp_path / "a/b", "AutoEncoder", {**LINEAR, "bias": C})
    asked: list[Any] = []

    def fetch(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    same(Dictionary.load("someone/dictionaries", folder="a/b", revision="v1"), U.relu())
    assert asked == [("someone/dictionaries", {"revision": "v1", "allow_patterns": "a/b/*"})]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="expected a folder with one of"):
        Dictionary.load(empty)
    never = {**LINEAR, "b_dec": C, "k": torch.tensor(3), "threshold": torch.tensor(-1.0)}
    with pytest.raises(Refused, match="never learnt"):
        Dictionary.load(learning(tmp_path / "never", "BatchTopKSAE", never))
    with pytest.raises(Refused, match="CrossCoder"):
        Dictionary.load(learning(tmp_path / "crossed", "CrossCoder", {**LINEAR, "b_dec": C}))
    with pytest.raises(InputError, match="is missing"):
        Dictionary.load(learning(tmp_path / "part", "AutoEncoder", {"encoder.weight": E.T.contiguous()}))
    for name in formats.FORMATS:
        for content in (b"", b"nothing", pickle.dumps(print)):
            path = tmp_path / f"bad-{name}-{len(content)}"
            path.mkdir()
            (path / name).write_bytes(content)
            for config in ("cfg.json", "config.json"):
                (path / config).write_text('{"architecture": "jump_relu", "k": 1}')
            with pytest.raises(InputError):
                Dictionary.load(path, site="embed")
