"""Dictionaries that others trained, in the folders their tools write: each brought to the one form of `Dictionary`.

    sae_weights.safetensors, cfg.json    SAELens (see saelens.py; the form `Dictionary.save` writes)
    sae.safetensors, cfg.json            sparsify (EleutherAI)
    ae.pt, config.json                   dictionary_learning: standard, gated, jump, top-k, batch-top-k, Matryoshka
    params.npz                           Gemma Scope
    params.safetensors, config.json      Gemma Scope 2

The folder's name, or its config, says where a dictionary belongs; where neither does, `site=` must. Batch-top-k (Bussmann et
al. 2024) and Matryoshka dictionaries are read as they are used: with the threshold learnt in training, features one by one.
What the form cannot express (skip connections, one feature per group, scaled inputs) is refused. `ae.pt` is read without
running what a pickle may hold.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pellucid.errors import InputError, Refused
from pellucid.neurons.dictionaries import saelens
from pellucid.neurons.dictionaries.functions import Activation, Gated, JumpReLU, ReLU, TopK

Fields = dict[str, Any]


def read(source: str | Path, site: str = "", writes: str = "", folder: str = "", revision: str | None = None) -> Fields:
    """The fields of the dictionary in a folder, or in a `folder` of a repository on the hub. InputError says what is wrong."""
    path = Path(source) / folder
    if not path.is_dir():
        path = _fetched(str(source), folder, revision)
    reader = next((reader for name, reader in FORMATS.items() if (path / name).is_file()), None)
    if reader is None:
        raise InputError(f"{str(path)!r} is no dictionary: expected a folder with one of {', '.join(FORMATS)}")
    try:
        return reader(path, site, writes)
    except KeyError as error:
        raise InputError(f"{str(path)!r} is no dictionary that can be read: {error} is missing") from error
    except (InputError, Refused):
        raise
    except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{str(path)!r} is no readable dictionary: {error or type(error).__name__}") from error


def _fetched(repository: str, folder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = f"{folder}/*" if folder else None
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{repository!r} is neither a folder nor a repository that can be fetched ({str(error).splitlines()[0]})"
        ) from error


# ---- one reader for each tool


def _sparsify(path: Path, site: str, writes: str) -> Fields:
    config, t = _json(path / "cfg.json"), load_file(str(path / "sae.safetensors"))
    transcoder = bool(config.get("transcode"))
    if config.get("skip_connection") or "W_skip" in t:
        raise Refused(f"{str(path)!r} has a skip connection, which no dictionary here has")
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise Refused(
            f"{str(path)!r} takes {config.get('activation', 'signed values')!r} of its features: expected 'topk'"
        )
    found = "" if transcoder else _place(path.name)  # what a transcoder reads has no name here
    return _fields(
        path, t["encoder.weight"].T, t["encoder.bias"], t["W_dec"], t["b_dec"], TopK(int(config["k"])), site or found,
        writes or ("" if transcoder else site or found), centred=not transcoder,
    )  # fmt: skip


def _dictionary_learning(path: Path, site: str, writes: str) -> Fields:
    try:
        t = torch.load(path / "ae.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files torch raises anything
        raise ValueError(f"ae.pt holds more or less than tensors ({type(error).__name__})") from error
    config = _json(path / "config.json").get("trainer", {}) if (path / "config.json").is_file() else {}
    kind = config.get("dict_class") or _kind(t)
    named = config.get("submodule_name") or path.as_posix()
    found = _place(str(named), config.get("layer"))
    encoder = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    decoder = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    bias = t.get("b_dec", t.get("bias", t.get("decoder_bias", t.get("decoder.bias"))))
    if bias is None:
        raise KeyError("a decoder's bias")
    rule: Activation = ReLU()
    own = t.get("b_enc", t.get("encoder.bias", t.get("gate_bias")))
    if kind == "GatedAutoEncoder":
        rule = Gated(t["r_mag"].float(), (t["mag_bias"] - t["gate_bias"] * t["r_mag"].exp()).float())
    elif kind == "AutoEncoderTopK":
        rule = TopK(int(t["k"] if "k" in t else config["k"]))
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        rule = JumpReLU(t["threshold"].float().expand(len(own)).clone())
        if kind != "JumpReluAutoEncoder" and float(t["threshold"].max()) < 0:
            raise Refused(f"{str(path)!r} is a {kind} whose threshold was never learnt: it depends on the batch")
    elif kind not in ("AutoEncoder", "AutoEncoderNew"):
        raise Refused(f"{str(path)!r} is a {kind}, which is not understood")
    centred = kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    return _fields(path, encoder, own, decoder, bias, rule, site or found, writes or site or found,
                   centred=centred, model=config.get("lm_name", ""))  # fmt: skip


def _kind(t: dict[str, Tensor]) -> str:
    """The class of a dictionary_learning file without its config, by the tensors it has."""
    if "r_mag" in t:
        return "GatedAutoEncoder"
    if "group_sizes" in t:
        return "MatryoshkaBatchTopKSAE"
    if "k" in t:
        raise InputError("top-k and batch-top-k dictionaries look alike: keep config.json beside ae.pt")
    return "JumpReluAutoEncoder" if "threshold" in t else "AutoEncoder" if "bias" in t else "AutoEncoderNew"


def _gemma_scope(path: Path, site: str, writes: str) -> Fields:
    with np.load(path / "params.npz", allow_pickle=False) as file:
        t = {name: torch.from_numpy(file[name]) for name in file.files}
    if float(t.pop("scaling_factor", torch.ones(())).sub(1).abs().max()):
        raise Refused(f"{str(path)!r} scales its output: fold scaling_factor into the weights first")
    where = path.as_posix()
    release = re.search(r"gemma-scope-[^/]*-(res|mlp|att|transcoders)\b", where)
    part = {"res": "resid_post", "mlp": "mlp_out"}.get(release[1] if release else "", "")
    found = _place(f"{part}_{path.relative_to(path.anchor).as_posix()}") if part else ""
    return _fields(path, t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], JumpReLU(t["threshold"].float()), site or found,
                   writes or site or found)  # fmt: skip


def _gemma_scope_2(path: Path, site: str, writes: str) -> Fields:
    config, t = _json(path / "config.json"), load_file(str(path / "params.safetensors"))
    if config.get("architecture") != "jump_relu":
        raise Refused(f"{str(path)!r} says it is {config.get('architecture')!r}: expected 'jump_relu'")
    if config.get("affine_connection") or "affine_skip_connection" in t:
        raise Refused(f"{str(path)!r} has a skip connection, which no dictionary here has")
    transcoder = config.get("hf_hook_point_in") != config.get("hf_hook_point_out")
    found = "" if transcoder else _place(path.as_posix())
    return _fields(path, t["w_enc"], t["b_enc"], t["w_dec"], t["b_dec"], JumpReLU(t["threshold"].float()), site or found,
                   writes or ("" if transcoder else site or found), model=config.get("model_name", ""))  # fmt: skip


FORMATS: dict[str, Callable[[Path, str, str], Fields]] = {
    saelens.WEIGHTS: saelens.read,
    "sae.safetensors": _sparsify,
    "ae.pt": _dictionary_learning,
    "params.npz": _gemma_scope,
    "params.safetensors": _gemma_scope_2,
}


# ---- what they share


def _fields(
    path: Path, encoder: Tensor, bias: Tensor, decoder: Tensor, decoder_bias: Tensor, activation: Activation, site: str,
    writes: str, *, centred: bool = False, model: str = "",
) -> Fields:  # fmt: skip
    """encoder [d_in, features], decoder [features, d_out] with rows brought to length 1 where the rule allows it.

    `centred`: the decoder's bias is taken off the input first.
    """
    if not (site and writes):
        raise InputError(f"{str(path)!r} does not say where it belongs: give site= (and writes= for a transcoder)")
    w, b, d, c = (x.detach().float() for x in (encoder, bias, decoder, decoder_bias))
    if centred:
        b = b - c @ w
    norms = d.norm(dim=1).clamp_min(1e-12)
    match activation:  # top-k compares features as they are
        case ReLU():
            w, b, d = w * norms, b * norms, d / norms[:, None]
        case JumpReLU(threshold):
            w, b, d, activation = w * norms, b * norms, d / norms[:, None], JumpReLU(threshold * norms)
        case Gated(rescale, shift):
            d, activation = d / norms[:, None], Gated(rescale + norms.log(), shift * norms)
    return {
        "encoder": w.contiguous(), "encoder_bias": b, "decoder": d.contiguous(), "decoder_bias": c, "activation": activation,
        "site": saelens.named(site, path), "writes": saelens.named(writes, path), "model": str(model),
    }  # fmt: skip


_PARTS = {"resid_post": "resid_post", "resid_pre": "resid_pre", "resid_mid": "resid_mid", "mlp_out": "mlp.out",
          "attn_out": "attn.out", "attention_out": "attn.out"}  # fmt: skip


def _place(name: str, layer: Any = None) -> str:
    """The site that a name tells: "resid_post_layer_12", "mlp_out_layer0", "layers.5" (what the block gives), "layers.5.mlp"."""
    module = re.fullmatch(r"(?:.*[./])?(?:layers|h|blocks)[._](\d+)(?:\.(mlp|attn|self_attn|attention))?", name)
    if module:
        part = {None: "resid_post", "mlp": "mlp.out"}.get(module[2], "attn.out")
        return f"layers.{module[1]}.{part}"
    part = next((site for word, site in _PARTS.items() if word in name), "")
    number = re.search(r"layer_?(\d+)", name)
    index = number[1] if number else layer
    return f"layers.{index}.{part}" if part and index is not None else ""


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no mapping")
    return found
