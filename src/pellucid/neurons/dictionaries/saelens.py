"""Dictionaries as folders of two files, cfg.json and sae_weights.safetensors, as SAELens keeps them.

    W_enc [d_in, features], W_dec [features, d_out], b_dec [d_out], and by cfg["architecture"]
    standard, transcoder, topk    b_enc
    jumprelu (also _transcoder)   b_enc, threshold
    gated                         b_gate, b_mag, r_mag

Read are also the older form (before version 6: activation_fn_str, hook_point, and b_dec taken off the input unless
said otherwise) and weights whose top-k is taken of u |W_dec|. All is brought to the one form of `Dictionary`; what
that form cannot express (input normalised row by row, unknown tensors) is refused. Top-k and gated transcoders are
written under names of their own ("topk_transcoder"), which SAELens does not read. Here a dictionary is the mapping of
its fields. The limit, the model's digest and
our site names go into the metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError, SiteError
from pellucid.neurons.dictionaries.functions import Activation, Gated, JumpReLU, ReLU, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"  # of the format that is written
HOOKS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
         "attn.out": "hook_attn_out", "mlp.out": "hook_mlp_out", "mlp.neurons": "mlp.hook_post"}  # fmt: skip


def write(d: Mapping[str, Any], folder: Path) -> Path:
    """Write a dictionary; returns the folder."""
    site, writes, bias = d["site"], d["writes"], d["encoder_bias"]
    tensors = {"W_enc": d["encoder"], "W_dec": d["decoder"], "b_dec": d["decoder_bias"], "b_enc": bias}
    extra: dict[str, Any] = {}
    match d["activation"]:
        case ReLU():
            name = "standard"
        case TopK(k):
            name, extra = "topk", {"k": k, "rescale_acts_by_decoder_norm": False}
        case JumpReLU(threshold):
            name, tensors["threshold"] = "jumprelu", threshold
        case Gated(rescale, shift):
            name = "gated"
            tensors |= {"r_mag": rescale, "b_gate": tensors.pop("b_enc"), "b_mag": shift + bias * rescale.exp()}
        case other:
            kind = type(other).__name__
            raise InputError(f"a {kind} dictionary has no SAELens form: expected ReLU, TopK, JumpReLU or Gated")
    own = {key: d[key] for key in ("site", "writes", "digest", "limit")}
    own["limit"] = own["limit"] if math.isfinite(own["limit"]) else None
    metadata = {"sae_lens_version": VERSION, "model_name": d["model"], "hook_name": _hook(site), "pellucid": own}
    if writes != site:
        name = "transcoder" if name == "standard" else f"{name}_transcoder"
        extra["d_out"] = d["decoder"].shape[1]
        metadata["hook_name_out"] = _hook(writes)
    config = {
        "architecture": name, "d_in": len(d["encoder"]), "d_sae": len(d["decoder"]), "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        **extra, "metadata": metadata,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().cpu().clone().contiguous() for k, v in tensors.items()}, str(folder / WEIGHTS))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    return folder


def read(folder: Path, site: str = "", writes: str = "") -> dict[str, Any]:
    """Read a dictionary; `site` and `writes` say where it belongs if the file does not, or in names not known here."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        t = load_file(str(folder / WEIGHTS))
        w_enc, w_dec, b_dec = t.pop("W_enc").float(), t.pop("W_dec").float(), t.pop("b_dec").float()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{str(folder)!r} is no dictionary: expected a readable {CONFIG} and {WEIGHTS} with W_enc, W_dec and b_dec") from error  # fmt: skip
    metadata = {**config, **config.get("metadata", {})}
    own = metadata.get("pellucid", {})
    rule = config.get("architecture", "standard")
    transcoder = rule.endswith("transcoder")
    _check(config, folder)
    try:
        bias, activation = _rule(rule, config, t)
    except KeyError as error:
        raise InputError(f"{str(folder)!r} says it is {rule!r} but has no {error}") from None
    if t:
        raise InputError(f"{str(folder)!r} has tensors that are not understood ({', '.join(sorted(t))}) for {rule!r}")
    if config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)
        w_enc, bias, w_dec = w_enc * norms, bias * norms, w_dec / norms[:, None].clamp_min(1e-12)
    if not transcoder and config.get("apply_b_dec_to_input", True):
        bias = bias - b_dec @ w_enc
    found = site or own.get("site") or metadata.get("hook_name") or metadata.get("hook_point") or ""
    out = writes or own.get("writes") or (metadata.get("hook_name_out") if transcoder else found) or ""
    if not (found and out):
        raise InputError(f"{str(folder)!r} does not say where it belongs: give site= (and writes= for a transcoder)")  # fmt: skip
    limit = own.get("limit")
    return {
        "encoder": w_enc,
        "encoder_bias": bias,
        "decoder": w_dec,
        "decoder_bias": b_dec,
        "activation": activation,
        "site": named(found, folder),
        "writes": named(out, folder),
        "limit": float("inf") if limit is None else limit,
        "model": str(metadata.get("model_name") or ""),
        "digest": own.get("digest", ""),
    }


def _rule(rule: str, config: dict[str, Any], t: dict[str, Tensor]) -> tuple[Tensor, Activation]:
    """The encoder's bias and what follows the encoder; takes the tensors it knows."""
    t.update({k: v.float() for k, v in t.items()})
    kind = rule.removesuffix("_transcoder") if rule != "transcoder" else "standard"
    old = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if kind == "gated":
        bias, rescale = t.pop("b_gate"), t.pop("r_mag")
        return bias, Gated(rescale, t.pop("b_mag") - bias * rescale.exp())
    if kind == "jumprelu":
        return t.pop("b_enc"), JumpReLU(t.pop("threshold"))
    if kind == "topk" or (kind == "standard" and old == "topk"):
        k = config.get("k", config.get("activation_fn_kwargs", {}).get("k"))
        if not isinstance(k, int):
            raise InputError("a top-k dictionary must say how many features are on: 'k' is missing in cfg.json")
        return t.pop("b_enc"), TopK(k)
    if kind == "standard" and old == "relu":
        return t.pop("b_enc"), ReLU()
    raise InputError(f"a dictionary of architecture {rule!r} with activation {old!r} is not understood: expected standard, topk, jumprelu or gated, or a transcoder")  # fmt: skip


def _check(config: dict[str, Any], folder: Path) -> None:
    for key, fine in (
        ("normalize_activations", (None, False, "none")),
        ("reshape_activations", (None, "none")),
        ("finetuning_scaling_factor", (None, False)),
    ):
        if config.get(key) not in fine:
            raise InputError(f"{str(folder)!r} has {key} = {config[key]!r}, which is not understood: fold it into the weights first")  # fmt: skip


def _hook(site: str) -> str:
    """The TransformerLens name of a site, where it has one."""
    s = Site.parse(site)
    return f"blocks.{s.layer}.{HOOKS[s.part]}" if s.part in HOOKS and not s.stack and s.layer is not None else site


def named(name: str, folder: Path) -> str:
    """A site by its name here or in TransformerLens."""
    try:
        return str(Site.parse(name))
    except SiteError as error:
        raise InputError(f"{str(folder)!r} belongs to {name!r}, a name not known here: give site= ({error})") from error  # fmt: skip
