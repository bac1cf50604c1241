"""Heads that take their inputs in a form of their own, shown as rows of tokens like all others.

multiple choice     forward takes [question, choice, token]; shown as [row, token], a row for each choice with its question,
                    whose answer is one number, the choice's score (softmax over a question's choices is how likely each is)
last real token     a classifier that reads the last token that is not padding, of a config that names no padding token,
                    takes one row at a time; shown with a padding token that no text holds, so that the last token is read
text to the decoder an encoder-decoder that reads the whole text gives it to both ends: moved by one to its decoder

The user's module is never changed: what is shown is a second outermost module around the same parts.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.modes import accepted_by
from pellucid.errors import InputError

NO_TOKEN = -1  # a padding token that no text holds
CHOICES = "ForMultipleChoice"


def as_rows(module: nn.Module) -> nn.Module:
    """The module with [row, token] inputs of any number of rows; itself where it takes them."""
    if _is(module, rf"{CHOICES}$"):
        kind: Any = type(module)
        return _twin(module, _choice_rows(kind))
    if _is(module, "ForSequenceClassification$") and pad_token(module) is None and not reads_both_ends(module):
        made = _twin(module, type(module))
        made.config = copy.deepcopy(module.config)
        made.config.get_text_config().pad_token_id = NO_TOKEN
        return made
    return module


def reads_both_ends(module: nn.Module) -> bool:
    """Whether it is an encoder-decoder whose decoder is given the text itself: all of them whose answer is not a text."""
    accepted = accepted_by(module)
    config = getattr(module, "config", None)
    whole = _is(module, "For(Sequence|Token)Classification$|ForQuestionAnswering")
    return whole and bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in accepted


def check_ends(module: nn.Module, ids: Tensor) -> None:
    """InputError where a classifier that reads a text at its end mark is given [row, token] without one, or with several."""
    eos = getattr(getattr(module, "config", None), "eos_token_id", None)
    if _is(module, "ForSequenceClassification$") and isinstance(eos, int):
        found = set((ids == eos).sum(1).tolist())
        if len(found) > 1 or not min(found):
            raise InputError(
                f"{type(module).__name__} reads a text at its end mark (token {eos}), of which every prompt has to have as "
                f"many, and at least one: these have {', '.join(map(str, sorted(found)))}"
            )


def pad_token(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "pad_token_id", None)


class _Given(Exception):
    """What the decoder is given, on its way out of the forward pass."""


def given_decoder(module: nn.Module, ids: Tensor) -> Tensor:
    """The ids [row, token] that the model itself gives its decoder beside a text `ids`: as many, mostly moved by one."""
    decoder: nn.Module = module.get_decoder()  # type: ignore[operator]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Given(kwargs.get("input_ids", args[0] if args else None))

    config: Any = module.config
    width = int(getattr(config, "d_model", 0) or getattr(config, "hidden_size", 1))
    read = torch.zeros(*ids.shape, width)  # in the place of what the encoder makes, which is not looked at
    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            module(input_ids=ids, encoder_outputs=(read.to(ids.device),), use_cache=False)
    except _Given as found:
        if isinstance(found.args[0], Tensor) and found.args[0].shape == ids.shape:
            return found.args[0]
    finally:
        hook.remove()
    raise ValueError(f"{type(module).__name__} gives its decoder no tokens of the text")


def _is(module: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, c.__name__) for c in type(module).__mro__)


def _twin(module: nn.Module, kind: type) -> Any:
    """A second outermost module around the same parts: what is put into one of them later is in the other."""
    made = copy.copy(module)
    made.__class__ = kind
    return made


@functools.cache
def _choice_rows(kind: Any) -> Any:
    if vars(kind).get("takes_rows"):
        return kind

    @functools.wraps(kind.forward)
    def forward(self: Any, input_ids: Any = None, **given: Any) -> Any:
        given = {"input_ids": input_ids, **given}
        rows = {
            k: v[:, None] if isinstance(v, Tensor) and v.ndim == (3 if k == "inputs_embeds" else 2) else v
            for k, v in given.items()
        }
        return kind.forward(self, **rows)

    return type(kind.__name__, (kind,), {"forward": forward, "takes_rows": True, "__module__": kind.__module__})
