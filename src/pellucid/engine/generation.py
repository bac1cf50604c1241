"""Generation with edits: transformers' own `generate`, watched.

An edit without positions acts on every token, those generated included; one with positions acts on the prompt (where
-1 is the prompt's last token). A condition (`when=`) is asked once per step and holds for the tokens computed in it,
so that generating with a cache and without one gives the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running
from pellucid.anatomy.wiretap import Wiretap
from pellucid.engine.edits import Edit, Step
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import Spot
from pellucid.engine.pausing import pause
from pellucid.engine.run import Session
from pellucid.engine.writing import Window
from pellucid.errors import InputError


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

    def __init__(self, anatomy: Anatomy, inputs: Inputs, edits: Sequence[Edit]) -> None:
        super().__init__(anatomy, inputs, (), edits)
        self.conditional = [edit for edit in edits if edit.when is not None]
        self.stream = inputs.stream("")
        self.history: dict[int, list[Tensor]] = {}
        self.ids_name = "decoder_input_ids" if "decoder" in inputs.streams else "input_ids"
        self.steps = 0
        self.tokens: list[Tensor] = []

    def step(self, kwargs: dict[str, Any]) -> None:
        """What the model is called with tells which columns it computes and which token came last."""
        ids = kwargs.get(self.ids_name)
        width = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        prompt = self.stream.ids
        if self.conditional:
            if self.steps and ids is not None:
                self.tokens.append(ids[:, -1])
            tokens = torch.stack(self.tokens, 1) if self.tokens else prompt.new_zeros(len(prompt), 0)
            for edit in self.conditional:
                said = torch.as_tensor(edit.when(Step(self.steps, tokens)), device=prompt.device).bool()  # type: ignore[misc]
                self.history.setdefault(id(edit), []).append(said.expand(len(prompt)))
        for window in self.windows.values():
            if window.stream is self.stream:
                window.width, window.offset = width, prompt.shape[1] + self.steps - width
        self.steps += 1

    def window(self, spot: Spot) -> Window:
        window = super().window(spot)
        window.generating, window.history = window.stream is self.stream, self.history
        return window


class _Dice(LogitsProcessor):
    """Sampling as the largest of randomly moved logits: it needs no global random state, so threads do not meet there."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chance = torch.empty(scores.shape).exponential_(generator=self.generator).clamp_min(1e-20)
        return scores / self.temperature - chance.log().to(scores.device)


class _Pause(StoppingCriteria):
    """Never stops by itself; after each token it asks whether anybody wants the generation to end."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        pause(busy=True)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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
    module = anatomy.module
    if not (hasattr(module, "generate") and module.can_generate()):
        raise InputError(f"a {type(module).__name__} does not generate text: open a causal or encoder-decoder model")
    follower = _Follower(anatomy, inputs, edits)
    handlers = follower.handlers()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "use_cache": use_cache, "num_beams": 1, "do_sample": False,
        "temperature": None, "top_p": None, "top_k": None, "return_dict_in_generate": False,
        "stopping_criteria": StoppingCriteriaList([_Pause()]),
    }  # fmt: skip
    if temperature > 0:
        options["logits_processor"] = LogitsProcessorList([_Dice(temperature, seed)])
    if tokenizer is not None and module.generation_config.pad_token_id is None:
        eos = module.generation_config.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        options["pad_token_id"] = pad[0] if isinstance(pad, list) else pad
    tensors = {k: v for k, v in inputs.tensors.items() if k != "position_ids"}  # generate counts positions itself
    with running(module):
        if handlers:
            with Wiretap(module, handlers, len(inputs), follower.step) as wire:
                out = module.generate(**tensors, **options)
            follower.check(wire.met)
        else:
            out = module.generate(**tensors, **options)
    new = out[:, inputs.stream("").ids.shape[1] :]
    texts = tuple(tokenizer.batch_decode(new, skip_special_tokens=True)) if tokenizer is not None else ("",) * len(new)
    return Generated(texts, new, inputs.texts)


def left_padded(inputs: Inputs) -> Inputs:
    """The same prompts with the padding moved to the left, where generation needs it (encoders stay as they are)."""
    stream = inputs.stream("")
    if not stream.padded:
        return inputs
    if "decoder" in inputs.streams:
        raise InputError(
            "the texts for the decoder differ in length, and generation needs them alike: give one at a time"
        )
    order = torch.argsort(stream.mask.long(), dim=1, stable=True)  # padding first, real tokens in their order
    ids, mask = stream.ids.gather(1, order), stream.mask.gather(1, order)
    moved = type(stream)(ids, mask, stream.labels, stream.spans)
    tensors = {**inputs.tensors, "input_ids": ids, "attention_mask": mask}
    return Inputs(tensors, {"": moved}, inputs.texts)
