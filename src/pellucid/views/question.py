"""What is asked of the model, and what does it answer?

A `Question` holds the prompt, where the answer is read, the answer, another answer to compare it with, and a second
prompt on which that other answer is right (the counterfactual). Every section of a report asks about the same one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid import metrics
from pellucid.causal.patching import check_aligned
from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import InputError, PellucidError
from pellucid.model import Model

Kind = Literal["next token", "masked token", "first token", "class", "embedding"]


WRITTEN = 12  # tokens a decoder writes to be looked at
WORK = 10_000  # tokens that one set of runs may read in all before a report takes less


@dataclass(frozen=True)
class Option:
    """One possible answer: a token (or a class, or nothing of the kind) and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt and what is measured on it; `position` is where the answer is read, counted on real tokens."""

    model: Model
    prompt: str
    kind: Kind
    inputs: Inputs
    position: int
    output: Tensor  # of the intact model: logits, or vectors
    options: list[Option]  # the likeliest first
    target: Option | None
    against: Option | None = None
    counterfactual: str | None = None
    other_options: list[Option] = field(default_factory=list)  # on the counterfactual
    scores: tuple[float, ...] = ()  # the metric on the prompt and, if there is one, on the counterfactual
    made: str = ""  # how the counterfactual was made, if pellucid made it
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> Stream:
        """The tokens of the prompt (in an encoder-decoder: what the encoder reads)."""
        return self.inputs.streams.get("encoder", self.inputs.stream(""))

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.source.labels[0]

    @property
    def changed(self) -> list[int]:
        """Positions at which the counterfactual has another token."""
        if self.counterfactual is None:
            return []
        other = self.model.inputs(self.counterfactual)
        theirs = other.streams.get("encoder", other.stream("")).ids[0]
        return (self.source.ids[0] != theirs).nonzero().flatten().tolist()

    @property
    def answered(self) -> tuple[str, ...]:
        """The tokens of the stack that answers: in an encoder-decoder its start token, else the prompt."""
        return self.inputs.stream("").labels[0]

    @cached_property
    def written(self) -> str | None:
        """What the decoder of an encoder-decoder writes, so that it and its attention to the source have tokens to show."""
        if self.kind != "first token":
            return None
        with suppress(PellucidError, RuntimeError, NotImplementedError):
            return self.model.generate(self.prompt, max_new_tokens=WRITTEN).text.strip() or None
        return None

    @property
    def prefix(self) -> str:
        """Of the sites that read the prompt."""
        return self.model.anatomy.stacks[0].prefix

    @cached_property
    def last_first(self) -> int:
        """The position of the answer counted from the end, as most people write it."""
        return self.position - len(self.answered)

    @cached_property
    def at(self) -> str:
        """Where parts are switched off: everywhere, or in a long prompt at the answer's position only, which is cheaper."""
        stack = self.model.anatomy.stacks[-1]
        heads = sum(a.heads for block in stack.blocks for a in block.attentions.values())
        long = max(heads, len(stack.blocks)) * len(self.tokens) > WORK
        return f"@{self.last_first}" if long and len(self.inputs.streams) == 1 else ""

    def position_in(self, logits: Tensor) -> int:
        """The column of the answer in `logits` of this prompt or of one of equal length."""
        return logits.shape[1] + self.last_first

    @property
    def metric(self) -> Any:
        """What the answer is measured by; see `metric_code`."""
        if self.target is None:
            return _similarity(self.output)
        if self.kind == "class":
            return metrics.class_logit(self.target.id)
        return metrics.logit_difference(self.word(self.target), self.word(self.against), position=self.last_first)

    @property
    def metric_code(self) -> str:
        if self.target is None:
            return SIMILARITY_CODE
        if self.kind == "class":
            return f"metric = pl.metrics.class_logit({self.target.id})"
        where = "" if self.last_first == -1 else f", position={self.last_first}"
        return f"metric = pl.metrics.logit_difference({self.word(self.target)!r}, {self.word(self.against)!r}{where})"

    @property
    def metric_name(self) -> str:
        if self.target is None:
            return "similarity to the intact output"
        return "logit" if self.kind == "class" else "logit difference"

    def word(self, option: Option | None) -> str | int:
        """The text of an answer where the metric finds its token by it, else its id."""
        assert option is not None
        try:
            found = metrics.logit(option.text).bind(self.model.tokenizer, 1).tokens
        except InputError:
            return option.id
        return option.text if found is not None and found.tolist() == [[option.id]] else option.id

    def lacks(self, section: str) -> str:
        """Why a section cannot be asked for with this kind of answer; empty where it can."""
        if section in ("layers", "direct") and self.kind in ("embedding", "class"):
            what = (
                "gives vectors, not words" if self.kind == "embedding" else "chooses a class from one place, not words"
            )
            return f"the method reads states as words, and this model {what}"
        return ""

    # ---- as code

    @property
    def in_memory(self) -> bool:
        """The model was given as a module, and cannot be opened by name."""
        return self.model.name == type(self.model.module).__name__

    @cached_property
    def task(self) -> str | None:
        """The `task` that has to be named to get this head again; None where it is the checkpoint's own."""
        name = type(self.model.module).__name__
        if self.in_memory or name in (getattr(self.model.module.config, "architectures", None) or [name]):
            return None
        return _task(name)

    def code(self, *lines: str, both: bool = False) -> str:
        """A Python program of its own that opens the model and runs `lines`."""
        named = "module, tokenizer=tokenizer" if self.in_memory else repr(self.model.name)
        task = f", task={self.task!r}" if self.task else ""
        start = ["import pellucid as pl", "", f"model = pl.load({named}{task})", f"prompt = {self.prompt!r}"]
        if both:
            start.append(f"other = {self.counterfactual!r}")
        return "\n".join([*start, *lines])

    @property
    def shell(self) -> str | None:
        """The command that makes this report again."""
        if self.in_memory:
            return None
        words = ["pellucid", "report", self.model.name, self.prompt]
        if self.task:
            words += ["--task", self.task]
        if self.counterfactual is not None:
            words += ["--counterfactual", self.counterfactual]
        if self.target is not None and self.kind != "class":
            words += ["--target", self.target.text]
        return " ".join(_shell_word(w) for w in words)


SIMILARITY_CODE = """intact = model.run(prompt).logits[0].mean(0)  # the output, averaged over tokens

def metric(output):
    return output.mean(1) @ intact / (output.mean(1).norm(dim=1) * intact.norm())"""


def _similarity(output: Tensor) -> Any:
    intact = output[0].mean(0)

    def similarity(output: Tensor) -> Tensor:
        mean = output.mean(1)
        return mean @ intact / (mean.norm(dim=1) * intact.norm())

    return similarity


def _shell_word(word: str) -> str:
    return word if word.startswith("--") else shlex.quote(word)


def _task(class_name: str) -> str | None:
    from pellucid.anatomy.loading import _HEADS

    return next((task for task, (_, table) in _HEADS.items() if class_name in table.values()), None)


# ---- asking


def ask(model: Model, prompt: str, target: str | None, counterfactual: str | None, top: int) -> Question:
    """Run the prompt (and the counterfactual) and settle what is measured. InputError where they do not fit."""
    prompt, notes = with_mask(model, prompt)
    inputs = model.inputs(prompt)
    with torch.no_grad():
        run = model.run(inputs)
    kind = kind_of(model, run, inputs)
    position = answer_position(model, inputs, kind)
    options = read(model, run.logits, kind, position, max(top, 2))
    question = Question(
        model, prompt, kind, inputs, position, run.logits, options, options[0] if options else None, notes=notes
    )
    if target is not None:
        chosen, note = _chosen(question, run.logits, target)
        question = replace(question, target=chosen, notes=(*notes, *note))
    question = against(question, counterfactual, top)
    return question


def against(question: Question, counterfactual: str | None, top: int, made: str = "") -> Question:
    """The question with a counterfactual, whose own answer (else the runner-up) is what the answer is compared with."""
    other = []
    if counterfactual is not None:
        model = question.model
        counterfactual, _ = with_mask(model, counterfactual)
        inputs = model.inputs(counterfactual)
        check_aligned(question.inputs, inputs)
        if counterfactual == question.prompt:
            raise InputError("the counterfactual is the prompt itself: give one on which another answer is right")
        with torch.no_grad():
            logits = model.run(inputs).logits
        other = read(model, logits, question.kind, answer_position(model, inputs, question.kind), max(top, 2))
    else:
        logits = None
    rival = next((o for o in [*other[:1], *question.options] if question.target and o.id != question.target.id), None)
    question = replace(question, against=rival, counterfactual=counterfactual, other_options=other, made=made)
    if question.target is not None and rival is None:  # a vocabulary of one
        raise InputError("this model has a single answer, so there is nothing to compare it with")
    metric, mask = question.model.bind(question.metric), question.inputs.stream("").mask
    both = [question.output, *([] if logits is None else [logits])]
    return replace(question, scores=tuple(float(metric.score(each, mask)[0]) for each in both))


def kind_of(model: Model, run: Any, inputs: Inputs) -> Kind:
    if not hasattr(run.output, "logits") or run.output.logits is None:
        return "embedding"
    if run.logits.ndim == 2:
        return "class"
    if "decoder" in inputs.streams:
        return "first token"
    return "masked token" if _mask_at(model, inputs.stream("").ids[0].tolist()) is not None else "next token"


def _mask_at(model: Model, ids: Sequence[int]) -> int | None:
    mask = getattr(model.tokenizer, "mask_token_id", None)
    return (
        list(ids).index(mask)
        if mask is not None and mask in ids and model.anatomy.stacks[-1].causal is not True
        else None
    )


def with_mask(model: Model, prompt: str) -> tuple[str, tuple[str, ...]]:
    """A masked model answers at its mask: a prompt without one gets it at the end."""
    mask = getattr(model.tokenizer, "mask_token", None)
    masked = _task(type(model.module).__name__) == "masked-lm" and model.anatomy.stacks[-1].causal is False
    if not masked or not mask or mask in prompt or not prompt.strip():
        return prompt, ()
    return f"{prompt.rstrip()} {mask}.", (f"This model fills in {mask}, so “ {mask}.” was added to the prompt.",)


def answer_position(model: Model, inputs: Inputs, kind: Kind) -> int:
    """Where the answer is read: the mask, or the last token that a text of this tokenizer does not end with anyway."""
    ids = inputs.stream("").ids[0].tolist()
    if kind == "masked token":
        found = _mask_at(model, ids)
        if found is None:
            raise InputError(f"the counterfactual has no {model.tokenizer.mask_token}: put it where the answer stands")
        return found
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    last = len(ids) - 1
    while kind == "next token" and last > 0 and ids[last] in special:
        last -= 1
    return last


def read(model: Model, logits: Tensor, kind: Kind, position: int, top: int) -> list[Option]:
    """The likeliest answers from the logits of a run."""
    if kind == "embedding":
        return []
    p = (logits[0] if kind == "class" else logits[0, position]).float().softmax(-1)
    best = p.topk(min(top, len(p)))
    return [
        Option(int(i), _text(model, kind, int(i)), float(v)) for v, i in zip(best.values, best.indices, strict=True)
    ]


def _text(model: Model, kind: Kind, i: int) -> str:
    if kind == "class":
        return str(getattr(model.module.config, "id2label", {}).get(i, i))
    return str(model.tokenizer.decode([i], clean_up_tokenization_spaces=False))


def _chosen(question: Question, logits: Tensor, target: str) -> tuple[Option, tuple[str, ...]]:
    """The target as an option: the text given, or with a space before it where that is what the model would say."""
    model, kind = question.model, question.kind
    if kind == "embedding":
        raise InputError("this model has no answers to choose a target from: it gives embeddings; leave --target out")
    p = (logits[0] if kind == "class" else logits[0, question.position]).float().softmax(-1)
    if kind == "class":
        names = {str(v): int(k) for k, v in getattr(model.module.config, "id2label", {}).items()}
        if target not in names:
            raise InputError(f"{target!r} is no class of this model: it has {', '.join(names)}")
        return Option(names[target], target, float(p[names[target]])), ()
    found = {}
    for text in dict.fromkeys((target, " " + target.lstrip(" "))):
        try:
            tokens = metrics.logit(text).bind(model.tokenizer, 1).tokens
        except InputError:
            if text == target and text.startswith(" "):
                raise
            continue
        assert tokens is not None
        found[text] = int(tokens[0, 0])
    if not found:
        metrics.logit(target).bind(model.tokenizer, 1)  # says why
    text = max(found, key=lambda t: float(p[found[t]]))
    note = () if text == target else (f"The target {target!r} was read as {text!r}, as it stands in running text.",)
    return Option(found[text], _text(model, kind, found[text]), float(p[found[text]])), note


def described(model: Model) -> str:
    """The model in one line: name, layers, heads, width, parameters."""
    stacks = model.anatomy.stacks
    layers = " + ".join(f"{len(s.blocks)} {s.name} layers".replace("  ", " ") for s in stacks)
    heads = next((a.heads for b in stacks[-1].blocks for a in b.attentions.values()), None)
    size = sum(p.numel() for p in model.module.parameters())
    parts = [
        layers,
        f"{heads} heads" if heads else "",
        f"width {stacks[-1].d_model}",
        f"{size / 1e6:,.0f} M parameters",
    ]
    return " · ".join(filter(None, parts))


def short_name(model: Model) -> str:
    """The model's name without the directories above it."""
    path = Path(model.name)
    return path.name if path.is_absolute() or path.suffix == ".gguf" else model.name
