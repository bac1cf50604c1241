"""Which key does a fact's subject have, and in which matrix is its value kept?

The down projection W of a layer's MLP is a key-value memory (Geva et al. 2021, Meng et al. 2022): its input at the subject's
last token is the key k (gated models: act(gate) * up), what it makes of it the value. A fact is a row of prompts (itself behind
several contexts) in which the subject is found by the characters its tokens stand for, never by cutting strings.

In a mixture the memory is the down projection of one expert, the one that the subject's token takes with the largest weight;
its key is the routing weight times the neurons, since that is what its matrix is multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site, choose
from pellucid.anatomy.structure import Block
from pellucid.anatomy.weights import inputs_first, is_packed
from pellucid.anatomy.writers import Writer
from pellucid.changed import Added
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import Spot, locate
from pellucid.engine.marks import trailing_marks
from pellucid.engine.places import answer_position, kind_of
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tasks.tokens import answer_ids, single_id

Text = str | Sequence[int]
Pairs = Sequence[tuple[Text, Text]]
ROWS = 32  # prompts run at a time
AT = "edited"  # the span that names the subject's last token


@dataclass(frozen=True)
class Fact:
    """A fact to be changed: after `prompt`, which speaks of `subject`, comes `new` instead of `true`.

    `prompt` may hold "{}" where the subject stands (else the last place where it stands as a word is meant), and a mask in a masked
    model. The rest is for judging (`scoreboard`): `paraphrases` of the prompt; `neighbours`, `same_subject` and `portability`
    are pairs (prompt, right answer): of other subjects, of this subject's other relations, and of what follows from the new
    fact. Without a tokenizer texts are token ids and `subject` is its tokens (first, last + 1).

    >>> Fact("The capital of {} is", "France", " Rome", " Paris").asked
    'The capital of France is'
    """

    prompt: Text
    subject: str | tuple[int, int]
    new: Text
    true: Text | None = None
    paraphrases: Sequence[Text] = ()
    neighbours: Pairs = ()
    same_subject: Pairs = ()
    portability: Pairs = ()

    def __post_init__(self) -> None:
        if not self.prompt or not self.subject or not self.new:
            raise InputError(f"a fact needs a prompt, its subject and the new answer, got {self!r:.120}")
        for name in ("prompt", "new", "true"):
            if not isinstance(getattr(self, name), str | Sequence | NoneType):
                raise InputError(f"{name}={getattr(self, name)!r:.80}: expected a text, or a list of token ids")
        if isinstance(self.prompt, str) and self.prompt.count("{}") > 1:
            raise InputError(f"the prompt {self.prompt!r:.200} has several places for its subject: expected one {{}}")
        if self.new == self.true:
            raise InputError(f"the new answer {self.new!r} is the true one: nothing would be changed")
        if isinstance(self.paraphrases, str):
            raise InputError(f"paraphrases={self.paraphrases!r:.80}: expected several prompts: put the one into a list")
        for name in ("neighbours", "same_subject", "portability"):
            for pair in getattr(self, name):
                if isinstance(pair, str) or len(pair) != 2:
                    raise InputError(f"{name}={pair!r:.80}: expected pairs (prompt, right answer)")

    @property
    def asked(self) -> Text:
        """The prompt with the subject in its place."""
        return self._cut()[0]

    def _cut(self) -> tuple[Text, tuple[int, int] | None]:
        """The prompt, and the characters of the subject where "{}" told them."""
        if isinstance(self.prompt, str) and "{}" in self.prompt:
            before, _, after = self.prompt.partition("{}")
            return f"{before}{self.subject}{after}", (len(before), len(before) + len(str(self.subject)))
        return self.prompt, None

    def behind(self, context: str) -> tuple[Text, tuple[int, int] | None]:
        """The prompt after a context, and the characters of the subject where they are known."""
        text, span = self._cut()
        if not context or not isinstance(text, str):
            return text, span
        front = f"{context.strip().rstrip('.')}. "
        return front + text, None if span is None else (span[0] + len(front), span[1] + len(front))


def facts_of(facts: Any) -> list[Fact]:
    """One fact or several, as `Fact`s or mappings with its fields."""
    one = isinstance(facts, Fact | Mapping) or not isinstance(facts, Iterable) or isinstance(facts, str)
    found: list[Any] = [facts] if one else list(facts)
    if not found:
        raise InputError("no fact was given: expected pl.surgery.Fact(prompt, subject, new, true)")
    for f in found:
        if not isinstance(f, Fact | Mapping):
            raise InputError(f"{f!r:.80}: expected pl.surgery.Fact(prompt, subject, new, true), or mappings of these")
    try:
        return [f if isinstance(f, Fact) else Fact(**f) for f in found]
    except TypeError as error:
        raise InputError(
            f"{error}: expected pl.surgery.Fact(prompt, subject, new, true), or mappings of these"
        ) from None


# ---- prompts as rows


@dataclass(frozen=True)
class Row:
    """One prompt with (all but the last token of) an answer behind it; `at` is the subject's last token, `read` the places
    from the end of the answering stream at which the answer's tokens are predicted."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    read: tuple[int, ...]
    decoder: tuple[int, ...] | None = None
    at: int | None = None
    fact: int = 0


def several(name: str, texts: Any) -> list[str]:
    """Texts or templates of an option; InputError for one text by itself, whose letters they would be."""
    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise InputError(f"{name}={texts!r:.80}: expected several texts: put the one into a list")
    return list(texts)


def rows(model: Model, prompts: Sequence[Text], answers: Sequence[Text | None]) -> list[Row]:
    """Prompts with their answers; of None nothing is asked but the next token. Refused where no token is answered."""
    found: list[Row] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = model.inputs(prompt if isinstance(prompt, str) else [list(prompt)])
        kind = kind_of(model, inputs)
        if kind not in ("next token", "first token", "masked token"):
            raise Refused(f"{model.name} answers with a {kind}: facts are asked of models that answer with tokens")
        ids = _real(inputs, "encoder" if "encoder" in inputs.streams else "")
        said = () if answer is None else _answer(model, answer, kind)
        n = max(1, len(said))
        if kind == "masked token":
            place = answer_position(model, inputs) or 0
            found.append(Row(tuple(ids), said, ((place - len(ids)) if place >= 0 else place,)))
        elif "encoder" in inputs.streams:
            given = _real(inputs, "")
            found.append(Row(tuple(ids), said, tuple(range(-n, 0)), (*given, *said[:-1])))
        else:
            ids = ids[: len(ids) - trailing_marks(model.tokenizer, ids)]
            found.append(Row((*ids, *said[:-1]), said, tuple(range(-n, 0))))
    return found


def _real(inputs: Inputs, stack: str) -> list[int]:
    stream = inputs.stream(stack)
    return [int(i) for i in stream.ids[0, stream.mask[0].bool()]]


def _answer(model: Model, answer: Text, kind: str) -> tuple[int, ...]:
    if not isinstance(answer, str):
        given = model.inputs([[int(i) for i in answer]])  # refused where a token is unknown
        return tuple(_real(given, "encoder" if "encoder" in given.streams else ""))
    if model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer: give answers as token ids")
    if kind == "masked token":
        return (single_id(model.tokenizer, answer),)
    if kind == "first token":
        return tuple(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
    return tuple(answer_ids(model.tokenizer, answer))


def subject_row(model: Model, fact: Fact, number: int, context: str = "", answer: Text | None = None) -> Row:
    """A fact's prompt, with the place of its subject's last token."""
    text, span = fact.behind(context)
    (row,) = rows(model, [text], [answer])
    return replace(row, at=_subject(model, text, fact.subject, span), fact=number)


def about(model: Model, fact: Fact, number: int, template: str) -> Row:
    """What else is said of the subject: "{} is a"."""
    return subject_row(model, replace(fact, prompt=template), number)


def _subject(model: Model, text: Text, subject: str | tuple[int, int], span: tuple[int, int] | None) -> int:
    inputs = model.inputs(text if isinstance(text, str) else [list(text)])
    stream = inputs.streams.get("encoder", inputs.stream(""))
    if isinstance(subject, tuple):
        if not 0 <= subject[0] < subject[1] <= int(stream.lengths[0]):
            raise InputError(f"subject={subject}: the prompt has {int(stream.lengths[0])} tokens")
        return subject[1] - 1
    text_map = stream.maps[0]
    span = span or text_map.find(subject.strip())
    if model.tokenizer is None or span is None or not subject.strip():
        raise InputError(
            f"the subject {subject!r} is not in the prompt {text!r:.200}: expected its words as they stand there"
        )
    at = stream.tokens(0, *span)[-1]
    stop = text_map.offsets[at][1]
    if text_map.text[span[1] : stop].strip():
        raise InputError(
            f"the token {stream.labels[0][at]!r} ends the subject {subject!r} and goes on with {text_map.text[span[1] : stop]!r}: "
            "the subject has no last token of its own here; give a prompt in which it does"
        )
    return int(at)


def batched(model: Model, given: Sequence[Row], size: int = ROWS) -> Iterator[tuple[list[int], Inputs]]:
    """Rows in batches, each with the numbers of its rows: padded so that the subjects' last tokens, named `@edited`, stand in
    one column where that changes nothing, and unpadded rows of one shape otherwise."""
    causal = bool(model.anatomy.stacks[0].causal)
    wanted: dict[Any, list[int]] = {}
    for i, row in enumerate(given):
        wanted.setdefault((row.read, len(row.decoder or ()), row.at is None), []).append(i)
    for group in wanted.values():
        group = sorted(group, key=lambda i: len(given[i].ids))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            try:
                yield part, _together(model, [given[i] for i in part], causal)
                continue
            except Refused:
                alike: dict[tuple[int, int | None], list[int]] = {}
                for i in part:
                    alike.setdefault((len(given[i].ids), given[i].at), []).append(i)
            for same in alike.values():
                yield same, _together(model, [given[i] for i in same], causal)


def _together(model: Model, given: Sequence[Row], causal: bool) -> Inputs:
    column = max(row.at or 0 for row in given) if causal else 0
    lefts = [column - row.at if causal and row.at is not None else 0 for row in given]
    length = max(left + len(row.ids) for left, row in zip(lefts, given, strict=True))
    ids, mask = torch.zeros(2, len(given), length, dtype=torch.long)
    ids += getattr(model.tokenizer, "pad_token_id", None) or 0
    for i, (left, row) in enumerate(zip(lefts, given, strict=True)):
        ids[i, left : left + len(row.ids)] = torch.tensor(row.ids)
        mask[i, left : left + len(row.ids)] = 1
    tensors: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if given[0].decoder is not None:
        tensors["decoder_input_ids"] = torch.tensor([row.decoder for row in given])
    made = model.inputs(tensors)
    if given[0].at is None:
        return made
    name = "encoder" if "encoder" in made.streams else ""
    spans = {AT: [(row.at, row.at + 1) for row in given if row.at is not None]}
    return replace(made, streams={**made.streams, name: replace(made.streams[name], spans=spans)})


# ---- the memory


@dataclass(frozen=True)
class Memory:
    """The matrix W [d, n] that is edited: of one layer's MLP, or of one expert of it."""

    layer: int
    expert: int | None
    stack: str  # "encoder." or ""
    parameter: str
    rows_in: bool  # kept as [n, d] (GPT-2's Conv1D, some fused experts), not as [d, n]
    width: int
    block: Block = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: Model, layer: int, expert: int | None = None) -> Memory:
        """Refused, with the reason, where the layer's MLP is no matrix that can be written to."""
        stack = model.anatomy.stacks[0]
        (layer,) = choose(layer, len(stack.blocks), "layer", f"{stack.prefix}layers")
        block = stack.blocks[layer]
        what, mlp = f"layer {layer} of {model.name} cannot be edited", block.mlps.get("mlp")
        if block.nth or sum(b.module == block.module for b in stack.blocks) > 1:
            raise Refused(f"{what}: layers share its weights, so an edit of one is an edit of all")
        if mlp is not None and mlp.experts is not None:
            module = model.module.get_submodule(mlp.experts.module)
            if getattr(module, "has_post_expert_norm", False):
                raise Refused(f"{what}: a norm stands behind its experts")
            if type(module.down_proj) is not torch.nn.Parameter or not module.down_proj.is_floating_point():
                raise Refused(f"{what}: its experts are quantised; load the model unquantised")
            name = f"{mlp.experts.module}.down_proj"
            return cls(layer, expert, stack.prefix, name, bool(module.is_transposed), mlp.experts.d_neurons, block)
        if mlp is None or mlp.linear is None or "mlp.neurons" not in block.taps:
            raise Refused(f"{what}: {block.refused.get('mlp.neurons') or 'no down projection was found'}")
        module = model.module.get_submodule(mlp.linear.module)
        if is_packed(module):
            raise Refused(
                f"{what}: its weights are quantised; load the model unquantised, or expanded as .gguf files are"
            )
        kept = getattr(module, "base_layer", module)  # an adapter's addition stays as it is
        name = f"{mlp.linear.module}{'.base_layer' if kept is not module else ''}.weight"
        weight = kept._parameters.get("weight")
        if weight is None or weight.ndim != 2 or weight.is_meta:
            raise Refused(
                f"{what}: its down projection is a {type(kept).__name__}, whose weight is no matrix that can be written to"
            )
        rows_in = inputs_first(kept, mlp.linear.shape)
        return cls(layer, None, stack.prefix, name, rows_in, mlp.linear.width, block)

    @property
    def name(self) -> str:
        return f"{self.layer}" if self.expert is None else f"{self.layer}.{self.expert}"

    @property
    def part(self) -> tuple[int, ...]:
        return () if self.expert is None else (self.expert,)

    def added(self, left: Tensor, right: Tensor) -> Added:
        """W + left @ right, left [d, r], right [r, n], as the parameter is laid out."""
        if self.rows_in:
            left, right = right.T, left.T
        return Added(self.parameter, left.contiguous(), right.contiguous(), part=self.part)

    def weight(self, model: Model) -> Tensor:
        """W [d, n] as it is in a model (without what an adapter adds), in float64."""
        kept: Tensor = model.module.get_parameter(self.parameter).detach()[self.part]
        return (kept.T if self.rows_in else kept).double()

    def site(self, part: str) -> str:
        return f"{self.stack}layers.{self.layer}.{part}@{AT}"

    def made(self, model: Model) -> Spot:
        """Where what W makes at the subject is met."""
        if self.expert is not None:
            return locate(model.anatomy, Site.parse(self.site(f"mlp.experts.{self.expert}.out")))
        spot = locate(model.anatomy, Site.parse(self.site("mlp.neurons")))
        linear = self.block.mlps["mlp"].linear
        assert linear is not None
        return replace(spot, tap=linear.made, unit=None)

    def factor(self, model: Model) -> Tensor | float:
        """What stands between W's output and the residual, elementwise. Refused for a norm, which is no factor."""
        if self.expert is not None:
            return 1.0
        writer = Writer.of(model.module, self.block, "mlp")
        if not writer.onward:
            return writer.scale
        if writer.held:
            raise Refused(
                f"the norm behind the MLP of layer {self.layer} of {model.name} makes what is added depend on its size: spread "
                "an edit over several layers only where none stands there, or edit one layer"
            )
        like = torch.ones(1, 1, model.anatomy.stacks[0].d_model)
        way = writer.way(torch.zeros(1, 1, self.width, 1))
        found: Tensor = (way(like) - way(0 * like))[0, 0].double()
        return found


def memories(model: Model, layer: int, given: Sequence[Row]) -> list[Memory]:
    """The memory of each fact at a layer: one matrix for all, or the expert that its subject's token takes."""
    one, n = Memory.of(model, layer), max(row.fact for row in given) + 1
    if one.block.mlps["mlp"].experts is None:
        return [one] * n
    weights = [torch.zeros(one.block.mlps["mlp"].experts.count) for _ in range(n)]
    for numbers, inputs in batched(model, given):
        found = model.run(inputs, keep=[one.site("mlp.router")], logits=False).tensor(one.site("mlp.router"))
        for i, w in zip(numbers, found[:, 0].float().cpu(), strict=True):
            weights[given[i].fact] += w
    return [replace(one, expert=int(w.argmax())) for w in weights]


def keys(model: Model, memory: Sequence[Memory], given: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The key of every row, [row, n] in float64 on the CPU, at the memory of its fact, and how it is routed there, [row] (1 in
    a layer without experts; 0 where its token does not take the expert)."""
    first = memory[0]
    made = torch.zeros(len(given), first.width, dtype=torch.float64)
    routed = torch.ones(len(given), dtype=torch.float64)
    experts = {m.expert for m in memory} - {None}
    sites = [first.site(f"mlp.experts.{e}.neurons") for e in experts] or [first.site("mlp.neurons")]
    for numbers, inputs in batched(model, given):
        run = model.run(inputs, keep=[*sites, *([first.site("mlp.router")] if experts else [])], logits=False)
        for at, i in enumerate(numbers):
            expert = memory[given[i].fact].expert
            site = sites[0] if expert is None else first.site(f"mlp.experts.{expert}.neurons")
            made[i] = run.tensor(site)[at, 0].double().cpu()
            if expert is not None:
                routed[i] = float(run.tensor(first.site("mlp.router"))[at, 0, expert])
    return made * routed[:, None], routed


def averaged(x: Tensor, given: Sequence[Row], weights: Tensor | None = None) -> Tensor:
    """The mean over each fact's rows, [fact, ...]; of rows with a weight of 0 nothing is said."""
    fact = torch.tensor([row.fact for row in given])
    w = torch.ones(len(fact), dtype=x.dtype) if weights is None else (weights != 0).to(x.dtype)
    n = int(fact.max()) + 1
    total = torch.zeros(n, *x.shape[1:], dtype=x.dtype).index_add(0, fact, x * w.view(-1, *[1] * (x.ndim - 1)))
    count = torch.zeros(n, dtype=x.dtype).index_add(0, fact, w).clamp_min(1)
    return total / count.view(-1, *[1] * (x.ndim - 1))
