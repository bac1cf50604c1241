"""How a generation is asked for: transformers' options by its own names, what ends a row, and the draw of a token."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

from pellucid.errors import InputError, nearest

OURS = {
    "max_length", "min_length", "output_scores", "output_logits", "output_attentions", "output_hidden_states", "stop_strings",
    "return_dict_in_generate", "num_return_sequences", "eos_token_id", "pad_token_id", "guidance_scale",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "max_time", "token_healing",
}  # fmt: skip


def number(name: str, value: Any, low: float, high: float = math.inf, whole: bool = False, open_: bool = False) -> None:
    """InputError where an option is no number of the range."""
    kinds = (int,) if whole else (int, float)
    ok = isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)
    if not ok or value < low or value > high or (open_ and value == low):
        least = f"above {low:g}" if open_ else f"at least {low:g}"
        most = "" if high == math.inf else f", at most {high:g}"
        raise InputError(f"{name}={value!r}: expected a {'whole ' * whole}number, {least}{most}")


def sampling(
    max_new_tokens: Any = 40,
    min_new_tokens: Any = None,
    temperature: Any = None,
    top_p: Any = None,
    top_k: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    do_sample: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """What transformers' `generate` is told, from options by its own names. InputError for what it would not understand."""
    number("max_new_tokens", max_new_tokens, 1, whole=True)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if min_new_tokens is not None:
        number("min_new_tokens", min_new_tokens, 0, max_new_tokens, whole=True)
        options["min_new_tokens"] = min_new_tokens
    if repetition_penalty is not None:
        number("repetition_penalty", repetition_penalty, 0, open_=True)
        options["repetition_penalty"] = float(repetition_penalty)
    drawn: dict[str, Any] = {}
    for name, value, low, high, whole in (
        ("temperature", temperature, 0, math.inf, False),
        ("top_p", top_p, 0, 1, False),
        ("top_k", top_k, 0, math.inf, True),
        ("min_p", min_p, 0, 1, False),
    ):
        if value is not None:
            number(name, value, low, high, whole=whole, open_=name == "top_p")
            drawn[name] = value if whole else float(value)
    known = GenerationConfig().to_dict()
    for name in more:
        if name in OURS or name not in known:
            why = "pellucid decides it" if name in OURS else "transformers' generation config has no such option"
            raise InputError(f"generate() takes no {name}=: {why}{nearest(name, set(known) - OURS)}")
    cold = drawn.get("temperature") == 0
    if cold and (len(drawn) > 1 or do_sample):
        raise InputError("temperature=0 takes the most probable token, so nothing else about sampling can be asked")
    if do_sample is False and len(drawn):
        raise InputError(f"do_sample=False takes the most probable token, but {', '.join(drawn)} is about drawing it")
    if do_sample or (drawn and not cold):
        return {**more, **options, **drawn, "do_sample": True}
    return {**more, **options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


@dataclass(frozen=True)
class Stops:
    """Where a row ends: at texts or regular expressions in what it wrote, and at tokens."""

    texts: tuple[str, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, stop: Any, tokenizer: Any, size: int | None) -> Stops:
        given = [stop] if isinstance(stop, str | re.Pattern | int) else list(stop) if stop is not None else []
        texts, patterns, ids = [], [], []
        for each in given:
            if isinstance(each, str) and each:
                texts.append(each)
            elif isinstance(each, re.Pattern) and isinstance(each.pattern, str):
                patterns.append(each)
            elif isinstance(each, int) and not isinstance(each, bool) and 0 <= each < (size or math.inf):
                ids.append(each)
            else:
                raise InputError(
                    f"stop={each!r}: expected a text, a compiled regular expression or a token id of this model"
                )
        if (texts or patterns) and tokenizer is None:
            raise InputError("this model was opened without a tokenizer: stop at token ids, not at texts")
        return cls(tuple(texts), tuple(patterns), tuple(ids))

    def found(self, text: str, new: int) -> str | None:
        """The stop that stands in `text`, of which the last `new` characters were just written."""
        for stop in self.texts:
            if stop in text[max(0, len(text) - new - len(stop)) :]:
                return repr(stop)
        return next((f"/{p.pattern}/" for p in self.patterns if p.search(text)), None)


class Writer:
    """A row's text as it grows: a letter of several tokens comes when it is whole."""

    def __init__(self, tokenizer: Any, skip: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.skip = tokenizer, skip
        self.ids: list[int] = []
        self.start = self.read = 0
        self.text = ""

    def add(self, token: int) -> str:
        """The new piece of text."""
        if token in self.skip:
            return ""
        self.ids.append(token)
        before, after = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self.ids[self.start : self.read], self.ids[self.start :])
        )
        if after.endswith("\ufffd") and len(self.ids) - self.read < 8:
            return ""
        self.start, self.read = self.read, len(self.ids)
        piece = str(after[len(before) :])
        self.text += piece
        return piece


class Draws(TorchFunctionMode):
    """Lets `torch.multinomial` draw from a generator of its own while it is up: transformers draws with it once a step.

    The tokens are those of transformers after `torch.manual_seed(seed)`, and no global state moves: threads do not meet there.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.generators, self.up = seed, {}, False  # type: ignore[var-annotated]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.multinomial:
            device = args[0].device
            if device not in self.generators:
                self.generators[device] = torch.Generator(device).manual_seed(self.seed)
            kwargs["generator"] = self.generators[device]
        return func(*args, **kwargs)

    def rise(self) -> None:
        self.__enter__()
        self.up = True

    def fall(self) -> None:
        if self.up:
            self.up = False
            self.__exit__(None, None, None)
