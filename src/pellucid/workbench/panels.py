"""Panels on demand: what a view shows of a prompt, made when somebody opens it.

Each is the document that the same method gives in a notebook, with the Python that makes it. Panels but the attention are
drawn of the model without the reader's edits, which their note then says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from pellucid.attention import patterns
from pellucid.attribution import METHODS
from pellucid.causal import patching
from pellucid.errors import InputError, nearest
from pellucid.lenses import direct_logit_attribution
from pellucid.model import Model
from pellucid.results import Result
from pellucid.views import compare
from pellucid.views import schema as s
from pellucid.views.documents import document
from pellucid.views.forms import tokens
from pellucid.views.looking import attention as attention_view
from pellucid.views.markup import quoted
from pellucid.views.question import Question, ask
from pellucid.views.schema import Code, Document, Numbers
from pellucid.workbench import edits as acting
from pellucid.workbench import finder
from pellucid.workbench.answers import Memory
from pellucid.workbench.messages import ViewReply, ViewRequest
from pellucid.workbench.recipes import edit_lines

OVERS = {"resid": "layers.*.resid_pre@*", "heads": "layers.*.attn.heads.*", "attention": "layers.*.attn.out@*", "mlp": "layers.*.mlp.out@*"}  # fmt: skip


def draw(model: Model, memory: Memory, asked: ViewRequest) -> ViewReply:
    """One panel. PellucidError where it cannot be had for this prompt or model."""
    if asked.view == "anatomy":
        return ViewReply(document=document(model, code=f"import pellucid as pl\n\npl.load({model.name!r}).anatomy"))
    question, note = _last(model, memory, asked)
    makers: dict[str, Callable[[Question, ViewRequest], ViewReply]] = {
        "tokens": _tokens, "contributions": _contributions, "heads": _heads, "patching": _patching,
        "neurons": _neurons, "neuron": _neuron, "attention": lambda q, a: _attention(q, a, memory),
    }  # fmt: skip
    made = makers[asked.view](question, asked)
    edited = any(edit.on for edit in asked.edits) and asked.view != "attention"
    notes = [note, made.note, "Drawn of the model without your edits." if edited else ""]
    return msgspec.structs.replace(made, note=" ".join(filter(None, notes)))


def _last(model: Model, memory: Memory, asked: ViewRequest) -> tuple[Question, str]:
    """What is asked, with its runs, which all panels of a prompt share."""
    key = (asked.prompt, asked.other, asked.view == "patching")
    if memory.question[0] != key:
        memory.question = key, posed(model, *key)
    found: tuple[Question, str] = memory.question[1]
    return found


def posed(model: Model, prompt: str, other: str | None, needs_other: bool = False) -> tuple[Question, str]:
    """What is asked of the model, and a remark. A second prompt that does not align is left out, unless it is needed."""
    if needs_other and not other:
        raise InputError("patching needs a second prompt of as many tokens with another answer; give one")
    try:
        question = ask(model, prompt, None, other or None, 10)
    except InputError as error:
        if not other or needs_other:
            raise
        question = ask(model, prompt, None, None, 10)
        return question, f"The second prompt is left out here: {error}."
    return question, " ".join(question.notes)


def _tokens(question: Question, asked: ViewRequest) -> ViewReply:
    named = asked.options.get("method", "gradient_x_input")
    names = [str(name) for name in (named if isinstance(named, list) and named else [named])]
    for name in names:
        if name not in METHODS:
            raise InputError(f"there is no attribution method {name!r}{nearest(name, METHODS)}")
    found = {name: METHODS[name](question.model, question.inputs, question.metric) for name in names}
    lines = [f"shares = pl.attribution.{METHODS[n].__name__}(model, prompt, metric)\nshares.show()" for n in names]
    title = "Which tokens the answer rests on"
    shown = compare(found, title) if len(found) > 1 else Document(title=title, data=tokens(found, unit="attribution"))
    return _reply(shown, question, question.metric_code, *lines)


def _attention(question: Question, asked: ViewRequest, memory: Memory) -> ViewReply:
    found = acting.asked(question.model, asked.edits)

    engine = acting.ready(found, memory, asked.prompt, asked.other)
    result = patterns(question.model, question.inputs, edits=engine)
    shown = document(result)
    if (first := _head(asked.options.get("component"))) is not None:
        shown = msgspec.structs.replace(shown, data=attention_view(result, first=first))
    lines = edit_lines(asked.edits, asked.other, question.model, question.last_first) if found else []
    call = "pl.attention.patterns(model, prompt" + (", edits=edits" if found else "") + ").show()"
    return _reply(shown, question, *lines, call, both=bool(asked.other and found))


def _head(component: Any) -> tuple[int, int] | None:
    """(layer, head) of a head's address."""
    words = str(component or "").split(".")
    ends = words[-4:] if len(words) >= 5 and words[-5] == "layers" else []
    return (int(ends[0]), int(ends[3])) if len(ends) == 4 and ends[0].isdigit() and ends[3].isdigit() else None


def _shares(question: Question, by: Any) -> tuple[Result, str]:
    """Direct logit attribution of the answer, and its call."""
    lacking = question.lacks("direct")
    if lacking or question.target is None:
        raise InputError(f"there are no contributions to split here: {lacking or 'this model has no answer'}")
    rival = question.against if question.counterfactual is not None else None
    against = None if rival is None else rival.id
    found = direct_logit_attribution(
        question.model, question.inputs, question.target.id, against=against, by=by, positions=question.last_first
    )
    more = "" if against is None else f", against={against}"
    where = "" if question.last_first == -1 else f", positions={question.last_first}"
    call = f"pl.lenses.direct_logit_attribution(model, prompt, {question.target.id}{more}, by={by!r}{where})"
    return found, call


def _contributions(question: Question, asked: ViewRequest) -> ViewReply:
    found, call = _shares(question, asked.options.get("by", "head"))
    assert question.target is not None
    title = f"What wrote {quoted(question.target.text)}"
    return _reply(document(found, title=title), question, f"{call}.show()")


def _heads(question: Question, asked: ViewRequest) -> ViewReply:
    """The direct effects of all heads, layer by head."""
    found, call = _shares(question, "head")
    data, prefix = found.data, question.model.anatomy.stacks[-1].prefix
    part = data["part"].values.astype(str)
    heads = np.char.endswith(part, ".heads") & np.char.startswith(part, "attn")
    if not heads.any():
        raise InputError("this model has no heads whose contributions can be told apart")
    layer, unit = (data[name].values[heads] for name in ("layer", "unit"))
    values = np.full((layer.max() + 1, unit.max() + 1), np.nan)
    values[layer, unit] = data["contribution"].values[heads]
    rows, columns = (s.Axis(name=n, labels=tuple(map(str, range(k)))) for n, k in zip(("layer", "head"), values.shape, strict=True))  # fmt: skip
    plane = s.Plane(name="direct effect", values=Numbers.of(values), component=f"{prefix}layers.{{row}}.attn.heads.{{column}}")  # fmt: skip
    grid = s.Grid(rows=rows, columns=columns, planes=(plane,), unit="contribution to the logit")
    return _reply(Document(title="What each head writes towards the answer", data=grid), question, f"{call}.show()")


def _patching(question: Question, asked: ViewRequest) -> ViewReply:
    return _reply(patched(question, asked.options), question, question.metric_code, patching_line(question, asked.options), both=True)  # fmt: skip


def patched(question: Question, options: dict[str, Any]) -> Document:
    over = over_of(question, options)
    found = patching(
        question.model, question.prompt, question.counterfactual, over=over, metric=question.metric
    )
    return document(found, title="Where the difference between the prompts is carried")


def patching_line(question: Question, options: dict[str, Any]) -> str:
    return f"pl.causal.patching(model, prompt, other, over={over_of(question, options)!r}, metric=metric).show()"


def over_of(question: Question, options: dict[str, Any]) -> str:
    over = str(options.get("over", "resid"))
    if over not in OVERS:
        raise InputError(f"there is nothing to patch over called {over!r}{nearest(over, OVERS)}")
    return question.prefix + OVERS[over]


def _neurons(question: Question, asked: ViewRequest) -> ViewReply:
    wanted = _options(asked.options, finder.Wanted)
    rows, shown, note = finder.neurons(question, wanted)
    made = _reply(shown, question, 'run = model.run(prompt, keep="layers.*.mlp.neurons")')
    return msgspec.structs.replace(made, rows=rows, note=note)


def _neuron(question: Question, asked: ViewRequest) -> ViewReply:
    component = str(asked.options.get("component", ""))
    shown, note = finder.page(question, component)
    line = f"model.run(prompt, keep={component!r})[{component!r}]"
    return msgspec.structs.replace(_reply(shown, question, line), note=note)


def _options(given: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"these options cannot be used: {error}") from None


def _reply(shown: Document, question: Question, *lines: str, both: bool = False) -> ViewReply:
    both = both and question.counterfactual is not None
    return ViewReply(document=msgspec.structs.replace(shown, code=Code(python=question.code(*lines, both=both))))
