"""Open a model: probe it once, find its map, prove it, and take off the map what could not be proven."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import discovery
from pellucid.anatomy.proofs import Prover, refused_parts
from pellucid.anatomy.structure import Anatomy, Proof, Stack
from pellucid.anatomy.unembedding import find_head
from pellucid.errors import LoadError

BATCH, LENGTH, TARGET_LENGTH = 2, 11, 7


def open_module(module: nn.Module, inputs: Mapping[str, Any] | None = None) -> Anatomy:
    """The proven anatomy of a loaded transformers model.

    `inputs` are keyword arguments of its forward for the probe (batch first, at least two rows); by default random
    token ids. The module is left exactly as it was, its training mode included.
    """
    training = module.training
    module.eval()
    try:
        return _open(module, dict(inputs) if inputs is not None else probe(module))
    finally:
        module.train(training)


def _open(module: nn.Module, inputs: dict[str, Any]) -> Anatomy:
    batch = next(v for v in inputs.values() if isinstance(v, Tensor)).shape[0]
    t, output = discovery.trace(module, inputs)
    calls = discovery.block_calls(t)
    if not calls:
        raise LoadError(
            f"no stack of blocks was found in {type(module).__name__}: expected modules in a ModuleList that each take "
            "and return a residual of the same shape"
        )
    stacks = discovery.find_stacks(t, batch)
    head = find_head(t, calls[-1][-1], main_output(output), batch) if _has_head(output) else None
    prover = Prover(module, lambda: module(**inputs), main_output, stacks, head, batch)
    proofs = prover.prove()
    stacks = tuple(
        Stack(s.name, tuple(refused_parts(b, prover.failed.get((s.name, b.index), {})) for b in s.blocks), s.d_model)
        for s in stacks
    )
    routes = {a.route for s in stacks for b in s.blocks for a in b.attentions.values()}
    return Anatomy(
        module, stacks, head, proofs, refusals(stacks, proofs), inputs, " + ".join(sorted(routes)) or "no attention"
    )


def probe(module: nn.Module) -> dict[str, Any]:
    """Random token ids (the same every time) in the form the model's forward takes them."""
    config = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))

    def ids(length: int) -> Tensor:
        low = min(10, text.vocab_size // 4)
        return torch.randint(low, text.vocab_size - low, (BATCH, length), generator=generator).to(device)

    inputs: dict[str, Any] = {"input_ids": ids(LENGTH)}
    accepted = inspect.signature(module.forward).parameters
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(TARGET_LENGTH)
    return inputs


LOGITS = ("logits", "prediction_logits", "lm_logits", "seq_logits")


def _has_head(output: Any) -> bool:
    return any(getattr(output, k, None) is not None for k in LOGITS)


def main_output(output: Any) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    for key in (*LOGITS, "last_hidden_state"):
        value = getattr(output, key, None)
        if value is not None:
            return value
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def refusals(stacks: tuple[Stack, ...], proofs: list[Proof]) -> dict[str, str]:
    """Site pattern -> reason, blocks with the same reason gathered: `layers.0,2,4.mlp.neurons`."""
    gathered: dict[tuple[str, str, str], list[int]] = {}
    for stack in stacks:
        for block in stack.blocks:
            for part, why in block.refused.items():
                gathered.setdefault((stack.prefix, part, why), []).append(block.index)
    sizes = {s.prefix: len(s.blocks) for s in stacks}
    found = {}
    for (prefix, part, why), blocks in gathered.items():
        which = "*" if len(blocks) == sizes[prefix] else ",".join(map(str, blocks))
        found[f"{prefix}layers.{which}.{part}"] = why
    if any(p.name == "unembedding" and not p.holds for p in proofs):
        found["head"] = next(p.detail or "the head's proof failed" for p in proofs if p.name == "unembedding")
    return found
