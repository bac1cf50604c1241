"""Generation with edits: transformers' own `generate`, watched.

An edit without positions acts on every token, those generated included; one with positions acts on the prompt (where
-1 is the prompt's last token). A condition (`when=`) is asked once per step and holds for the tokens computed in it,
so that generating with a cache and without one gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Anatomy
from pellucid.anatomy.wiretap import Wiretap
from pellucid.engine.edits import Edit, Step
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Session


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated: `texts` and `tokens` [batch, n] without the prompt. Prints as the (first) text."""

    texts: tuple[str, ...]
    tokens: Tensor
    prompts: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.texts[0]

    def __str__(self) -> str:
        return self.text


class _Follower(Session):
    """A session over many forward passes: it keeps the windows and the edits' decisions up to date."""

    def __init__(self, anatomy: Anatomy, inputs: Inputs, keep: Iterable[Site | str], edits: Sequence[Edit]) -> None:
        super().__init__(anatomy, inputs, keep, edits)
        self.edits = edits
        self.stack = anatomy.stacks[-1].name
        self.steps = 0
        self.tokens: list[Tensor] = []
        window = self.window(Site("resid_pre", 0, self.stack))
        window.generating = True

    def step(self, kwargs: dict[str, Any]) -> None:
        window = self.windows[self.stack]
        ids = kwargs.get("decoder_input_ids" if self.stack == "decoder" else "input_ids")
        width = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        prompt = window.stream.ids.shape[1]
        if self.steps and ids is not None:
            self.tokens.append(ids[:, -1])
        batch = len(window.stream.ids)
        tokens = torch.stack(self.tokens, 1) if self.tokens else window.stream.ids.new_zeros(batch, 0)
        for edit in self.edits:
            if edit.when is not None:
                said = torch.as_tensor(edit.when(Step(self.steps, tokens)), device=window.stream.ids.device).bool()
                window.history.setdefault(id(edit), []).append(said.expand(batch))
        window.width = width
        window.offset = prompt + self.steps - width
        self.steps += 1


def generate(
    anatomy: Anatomy,
    tokenizer: Any,
    inputs: Inputs,
    edits: Sequence[Edit] = (),
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Generated:
    """Greedy (or, with a temperature, sampled) continuation of each prompt under edits."""
    inputs = left_padded(inputs)
    follower = _Follower(anatomy, inputs, (), edits)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "use_cache": use_cache, "num_beams": 1}
    if temperature > 0:
        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if tokenizer is not None and anatomy.module.generation_config.pad_token_id is None:
        eos = anatomy.module.generation_config.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        options["pad_token_id"] = pad[0] if isinstance(pad, list) else pad
    tensors = {k: v for k, v in inputs.tensors.items() if k != "position_ids"}
    with torch.no_grad():
        handlers = follower.handlers()
        if handlers:
            with Wiretap(anatomy.module, handlers, len(inputs), follower.step) as wire:
                out = anatomy.module.generate(**tensors, **options)
            follower.check(wire)
        else:
            out = anatomy.module.generate(**tensors, **options)
    new = out[:, inputs.stream("").ids.shape[1] :]
    texts = tuple(tokenizer.batch_decode(new, skip_special_tokens=True)) if tokenizer is not None else ("",) * len(new)
    return Generated(texts, new, inputs.texts)


def left_padded(inputs: Inputs) -> Inputs:
    """The same prompts with the padding moved to the left, where generation needs it (encoders stay as they are)."""
    stream = inputs.stream("")
    if "decoder" in inputs.streams or not stream.padded:
        return inputs
    order = torch.argsort(stream.mask.long(), dim=1, stable=True)  # padding first, real tokens in their order
    ids, mask = stream.ids.gather(1, order), stream.mask.gather(1, order)
    moved = type(stream)(ids, mask, stream.labels, stream.spans)
    tensors = {**inputs.tensors, "input_ids": ids, "attention_mask": mask}
    return Inputs(tensors, {"": moved}, inputs.texts)
