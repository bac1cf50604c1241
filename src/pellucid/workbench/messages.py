"""What do the page of the workbench and its server say to each other?

One class for each message, all JSON. Unknown fields are passed over, so that either side may learn new ones before the
other; `scripts/view_types.py` writes the same classes as TypeScript. Numbers of a view travel in its `Document`, whose
schema is that of every other host.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from pellucid.errors import InputError
from pellucid.views import schema
from pellucid.views.schema import Document

Name = Annotated[str, Meta(min_length=1, max_length=80)]
Text = Annotated[str, Meta(max_length=200_000)]
Line = Annotated[str, Meta(max_length=2_000)]
Kind = Literal["zero", "mean", "scale", "steer", "patch"]
Panel = Literal["tokens", "attention", "contributions", "patching", "anatomy", "neurons", "neuron", "heads"]
JobKind = Literal["head_ablation", "patching", "circuit", "neuron_ablation"]
JobState = Literal["queued", "running", "done", "cancelled", "failed"]
T = TypeVar("T")


class Message(msgspec.Struct, kw_only=True):
    """A message of either side."""


class Price(Message):
    """A strength of a vector that a sweep has tried: its effect on the judge, the furthest of the random vectors either way, and the
    perplexity of what was written, beside that of the model as it is."""

    strength: float
    effect: float
    random_low: float
    random_high: float
    perplexity: float
    base_perplexity: float


class VectorCard(Message):
    """A vector that may steer; `prices` of a sweep that was saved with it, `judge` what its effect was measured by."""

    name: str
    site: str
    judge: str
    prices: list[Price]


class MonitorCard(Message):
    """A monitor that may watch: its threshold and what that promises, which tokens count, and what it does."""

    name: str
    threshold: float | None
    promise: str
    reads: str
    rule: str
    does: str
    sites: list[str]


class ChatCard(Message):
    """Who may watch and steer an answer of a model; `refused`: why it writes none."""

    refused: str
    template: bool
    monitors: list[MonitorCard]
    vectors: list[VectorCard]


class AnswerCard(Message):
    """What can be asked about: an answer of this kind ("" where there is only one), with the `names` it is chosen from."""

    kind: Literal["word", "class", "label", "span", "text", ""]
    names: list[str] = []


class ModelCard(Message):
    """What the page knows of a model before it runs anything."""

    id: str
    name: str
    kind: Literal["decoder", "encoder", "encoder-decoder"]
    layers: int
    heads: int
    neurons: int
    parameters: int
    limit: int | None  # tokens of its context, where it says so
    generates: bool
    chat: ChatCard
    answers: AnswerCard


class Models(Message):
    """Which models are open here."""

    models: list[ModelCard]
    version: str


class Edit(Message):
    """What is done to a part of the model. `strength` is the factor of "scale", and of "steer" how many times the
    direction is added; `position` None is every position."""

    component: Name
    kind: Kind
    strength: float = 1.0
    direction: Literal["contrast", "random"] = "contrast"
    position: int | None = None
    seed: int = 0
    on: bool = True


Edits = Annotated[list[Edit], Meta(max_length=64)]


class LiveRequest(Message):
    """A prompt as it is being typed; a newer one of the same tab and pane takes its place. Probabilities are those at a `temperature`; the
    text that goes on is the likeliest or, with a `seed`, drawn at it."""

    tab: Name
    pane: Name
    model: Name
    prompt: Text
    other: Text | None = None
    edits: Edits = []
    lens: bool = True
    generate: Annotated[int, Meta(ge=0, le=64)] = 0
    temperature: Annotated[float, Meta(ge=0.1, le=4)] = 1.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    serial: int = 0


class EditRequest(Message):
    """An edit that is about to be made: can it be, on this model and these prompts?"""

    tab: Name
    pane: Name
    model: Name
    edit: Edit
    prompt: Text = ""
    other: Text | None = None


class Choice(Message):
    """One possible answer."""

    token: str
    probability: float
    logit: float
    id: int


class Answer(Message):
    """What the model answers: its likeliest tokens (or classes), how sure it is (entropy in nats), how it goes on."""

    top: list[Choice]
    entropy: float
    generated: str
    difference: float | None  # logit of the prompt's answer minus that of the other prompt's


class Milliseconds(Message):
    """Where the time went: waiting for the model, in its passes, and in all."""

    queue: float
    forward: float
    total: float


class LiveReply(Message):
    """The answer without and with the edits; `pair` are the two answers that `difference` compares, if there is a second prompt. With `more`,
    columns of the lens are left to compute: ask again for them."""

    serial: int
    tokens: list[str]
    clean: Answer
    edited: Answer | None
    lens: Document | None
    milliseconds: Milliseconds
    pair: list[str] = []
    more: bool = False
    note: str = ""


class ViewRequest(Message):
    """A panel to be drawn. `answer` is what it is about: a word, a class or label by its name, words of the prompt, or for sentence
    embeddings a text to be similar to; empty, what the model says. `word` is the one whose label is asked for."""

    tab: Name
    pane: Name
    model: Name
    view: Panel
    prompt: Text
    other: Text | None = None
    edits: Edits = []
    options: dict[str, Any] = {}
    answer: Line = ""
    word: Line = ""


class NeuronRow(Message):
    """One neuron on one token: its activation, and its direct effect on the answer."""

    component: str
    layer: int
    neuron: int
    position: int
    activation: float
    effect: float | None  # None where it cannot be told


class ViewReply(Message):
    """A panel; `note` is what a reader should know of it. `rows` come with "neurons" only."""

    document: Document
    note: str = ""
    rows: list[NeuronRow] | None = None


class Turn(Message):
    """What somebody said."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(Message):
    """An answer to be written; a newer one of the same tab and pane takes its place. `chat`: in the turns of the tokenizer's template,
    else as a continuation of the text. `monitors` and `vector` by name; temperature 0 takes the likeliest token."""

    tab: Name
    pane: Name
    model: Name
    turns: Annotated[list[Turn], Meta(max_length=256)]
    chat: bool = True
    monitors: Annotated[list[str], Meta(max_length=32)] = []
    vector: str | None = None
    strength: Annotated[float, Meta(ge=-4, le=4)] = 0.0
    temperature: Annotated[float, Meta(ge=0, le=4)] = 0.0
    max_new_tokens: Annotated[int, Meta(ge=1, le=1024)] = 160
    seed: Annotated[int, Meta(ge=0)] = 0


class ChatStep(Message):
    """A token of the answer and the `text` so far, with what a monitor says `instead` of it; for each monitor its `statistic` before that
    token was written, and whether it fired."""

    step: int
    token: str
    text: str
    instead: str
    statistic: list[float | None]
    fired: list[bool]


class Acted(Message):
    """A monitor that fired before `token` (counted from 0): its statistic there, the threshold, and what it did."""

    monitor: str
    token: int
    statistic: float
    threshold: float
    does: str


class ChatEnd(Message):
    """The end of an answer: why, what was written and what a reader is `shown` (where it was `replaced` another text), the monitors that
    fired, the view of the firings, and the text's perplexity and repetition under the model without steering."""

    text: str
    shown: str
    replaced: bool
    ended: str
    acted: list[Acted]
    tokens: int
    document: Document | None
    perplexity: float | None
    repetition: float | None


class JobRequest(Message):
    """Work that takes longer."""

    tab: Name
    model: Name
    kind: JobKind
    prompt: Text
    other: Text | None = None
    options: dict[str, Any] = {}
    answer: Line = ""
    word: Line = ""


class Started(Message):
    """The job that was started."""

    id: str


class Job(Message):
    """How far a job is; `document` once it is done."""

    id: str
    kind: JobKind
    title: str
    model: str
    prompt: str
    state: JobState
    done: int
    total: int | None
    error: str
    seconds: float
    document: Document | None = None


class Jobs(Message):
    """All jobs of this server, the newest first."""

    jobs: list[Job]


class Pane(Message):
    """One prompt and what is looked at; `model` is a name."""

    pane: Name
    model: str
    prompt: Text
    other: Text | None = None
    edits: Edits = []
    views: list[str] = []
    generate: Annotated[int, Meta(ge=0, le=64)] = 0
    temperature: Annotated[float, Meta(ge=0.1, le=4)] = 1.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    answer: Line = ""
    word: Line = ""


class Selection(Message):
    """What is selected in every view."""

    component: str | None = None
    position: int | None = None


class State(Message):
    """All that a workspace, a link or a notebook needs to come back to the same place."""

    panes: list[Pane]
    version: Literal[1] = 1
    selection: Selection = msgspec.field(default_factory=Selection)
    neurons: dict[str, Any] = {}


class Workspace(Message):
    """What a workspace file holds."""

    state: State
    documents: list[Document] = []


class WorkspaceEntry(Message):
    """A saved workspace; `modified` in seconds since 1970."""

    name: str
    modified: float


class Workspaces(Message):
    """The saved workspaces."""

    folder: str
    workspaces: list[WorkspaceEntry]


class PageRequest(Message):
    """Views to be written into one HTML file."""

    title: Annotated[str, Meta(max_length=200)] = ""
    documents: list[Document] = []


class Problem(Message):
    """What went wrong, in one sentence."""

    error: str
    superseded: bool = False


def read(body: bytes, kind: type[T]) -> T:
    """A message of the page. InputError for anything else.

    >>> read(b'{"component": "embed", "kind": "zero"}', Edit).strength
    1.0
    """
    try:
        return schema.read(body, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"this is no {kind.__name__} the workbench understands: {error}") from None
