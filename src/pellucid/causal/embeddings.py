"""Runs that start from given token embeddings, so that these can be corrupted, swapped and differentiated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.modes import accepted_by
from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit, Patch
from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import Refused
from pellucid.model import Model


def embed(model: Model, ids: Tensor) -> Tensor:
    """Token embeddings [..., d] of ids [...], as the model's own embedding module gives them."""
    module: Any = model.module
    with torch.no_grad():
        vectors: Tensor = module.get_input_embeddings()(ids)
    return vectors


def vocabulary(model: Model) -> Tensor:
    """[token, d] the embeddings of all tokens."""
    return embed(model, torch.arange(model.vocabulary, device=next(model.module.parameters()).device))


def first_stream(inputs: Inputs) -> Stream:
    """The tokens that are embedded from `input_ids`: an encoder's, or the only stack's."""
    return inputs.streams.get("encoder") or inputs.stream("")


def from_embeddings(model: Model, inputs: Inputs, vectors: Tensor) -> tuple[Inputs, list[Edit]]:
    """The same prompts, run from these embeddings [batch, position, d] of their first stream: as an input where the model
    takes one (a sweep then starts from it), by an edit otherwise.
    """
    if "inputs_embeds" not in accepted_by(model.module):
        return inputs, [Patch(Site("embed.tokens", stack=model.anatomy.stacks[0].name), vectors)]
    tensors = {k: v for k, v in inputs.tensors.items() if k != "input_ids"} | {"inputs_embeds": vectors}
    return replace(inputs, tensors=tensors), []


def check_embeddings(model: Model, inputs: Inputs) -> None:
    """Refused unless running from the embeddings gives what running from the tokens gives."""
    name = type(model.module).__name__
    with torch.no_grad():
        native = model.run(inputs).logits
        given, edits = from_embeddings(model, inputs, embed(model, first_stream(inputs).ids))
        again = model.run(given, edits=edits).logits
    if not torch.allclose(native, again, atol=1e-3 * max(1.0, float(native.abs().max()))):
        raise Refused(f"{name} reads its tokens in more ways than by their embeddings: those cannot stand in for them")
