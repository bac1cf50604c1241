"""What does a view show? One JSON document: the same in a notebook, a saved page, a report and the workbench.

    {"pellucid-view": 1, "title": ..., "data": {"kind": "lens", ...}, "code": {...}, "provenance": {...}}

`data.kind` chooses the view. Numbers are typed arrays (`Numbers`: dtype, shape, little-endian bytes in base64), text is
text and is only ever shown as text. The classes below are the schema; `scripts/view_types.py` writes it as JSON Schema and
as the TypeScript types the views are compiled against. A change that older views cannot read raises `VERSION`.
"""

from __future__ import annotations

import base64
import importlib
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec
import numpy as np

from pellucid.errors import InputError

VERSION = 1
T = TypeVar("T")
Dtype = Literal["float32", "int32", "uint16", "uint8"]
WIRE: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4"), "uint16": np.dtype("<u2"), "uint8": np.dtype("u1")}  # fmt: skip


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value of the schema."""


class View:
    """What a document shows: the data of some kind of view. The kinds there are: `pellucid.views.kinds`."""

    __slots__ = ()


class Shown(Struct, View, frozen=True, tag_field="kind", tag=str.lower):
    """The data of one kind of view; `kind` is the name of its class."""


class Numbers(Struct, frozen=True):
    """An array of numbers; NaN where there is none. uint16 are whole numbers, uint8 stands for 0 to 1 in steps of 1/255."""

    dtype: Dtype
    shape: tuple[int, ...]
    base64: str

    @classmethod
    def of(cls, values: Any, dtype: Dtype | None = None) -> Self:
        """Integers as int32, anything else as float32; `dtype="uint8"` rounds amounts between 0 and 1.

        >>> Numbers.of([[1.0, 2.0]]).shape, Numbers.of([3]).dtype, Numbers.of([0.0, 1.0], "uint8").array().tolist()
        ((1, 2), 'int32', [0.0, 1.0])
        """
        array = np.asarray(values)
        kind: Dtype = dtype or ("int32" if array.dtype.kind in "iub" else "float32")
        if kind == "uint8":
            array = np.round(255 * np.clip(np.nan_to_num(array.astype(float)), 0, 1))
        data = np.ascontiguousarray(array, dtype=WIRE[kind])
        return cls(dtype=kind, shape=tuple(data.shape), base64=base64.b64encode(data.tobytes()).decode())

    def __repr__(self) -> str:
        return f"<{self.dtype}{list(self.shape)}>"

    def array(self) -> np.ndarray:
        data = np.frombuffer(base64.b64decode(self.base64), WIRE[self.dtype]).reshape(self.shape)
        return data / 255 if self.dtype == "uint8" else data


class Code(Struct, frozen=True):
    """How to make this again: a Python program and, where there is one, a command."""

    python: str = ""
    shell: str = ""


class Fact(Struct, frozen=True):
    name: str
    value: str


class Origin(Struct, frozen=True):
    """The result's provenance, as text."""

    line: str = ""
    facts: tuple[Fact, ...] = ()


class Axis(Struct, frozen=True):
    """One side of a grid: what it counts, a label for each row (or column), and what selecting one selects."""

    name: str
    labels: tuple[str, ...]
    components: tuple[str, ...] = ()  # sites
    positions: tuple[int, ...] = ()  # of tokens: then labels are tokens
    marked: tuple[int, ...] = ()  # indices that stand out


# ---- one class for each kind of view


class Track(Struct, frozen=True):
    """A number for every token, by one method."""

    name: str
    values: Numbers  # [token]
    signed: bool = True
    note: str = ""


class Tokens(Shown, frozen=True):
    """A text whose tokens carry numbers: attributions by one or several methods, activations, surprise."""

    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    tracks: tuple[Track, ...]
    unit: str = ""
    comparison: tuple[Fact, ...] = ()  # how far the methods agree
    full: float | None = None  # of the scale that all tracks share; None: each has its own


class Head(Struct, frozen=True):
    component: str
    layer: int
    head: int
    role: str = ""


class Flow(Struct, frozen=True):
    """Attention through all layers together: rollout, flow."""

    name: str
    values: Numbers  # [query, key]


class Rows(Struct, frozen=True):
    """Of each row of a pattern the weights from `floor` on (0: all but what rounds to nothing), row after row."""

    counts: Numbers  # [head, query] how many
    keys: Numbers  # [entry] where
    weights: Numbers  # [entry]
    floor: float = 0.0


class Looking(Struct, frozen=True):
    """Where the heads of one stack look: its patterns whole, or in rows."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    heads: tuple[Head, ...]
    pattern: Numbers | None = None  # [head, query, key]
    rows: Rows | None = None
    name: str = ""  # "encoder", "decoder", "decoder to encoder"
    flows: tuple[Flow, ...] = ()
    first: int = 0  # of `heads`: the one shown at first
    left_out: int = 0  # heads of the model that are not here


class Attention(Shown, frozen=True):
    """Where heads look, in one stack or by choice in one of several."""

    stacks: tuple[Looking, ...]


class Followed(Struct, frozen=True):
    """A word known everywhere."""

    word: str
    rank: Numbers  # [layer, position]
    log_probability: Numbers


class Reading(Struct, frozen=True):
    """The residual stream read as words, by one lens."""

    name: str
    top: Numbers  # [layer, position, top], indices into `words`
    probability: Numbers  # [layer, position, top]
    rank: Numbers | None = None  # [layer, position] of the model's own prediction, 0 the first
    kl: Numbers | None = None  # [layer, position] KL(model || layer), nats
    entropy: Numbers | None = None
    followed: tuple[Followed, ...] = ()


class Lens(Shown, frozen=True):
    """What the model would say after each layer."""

    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[str, ...]
    components: tuple[str, ...]
    words: tuple[str, ...]
    readings: tuple[Reading, ...]
    prediction: tuple[str, ...]  # by position


class Contributions(Shown, frozen=True):
    """Numbers that add up: what each part writes towards an answer."""

    names: tuple[str, ...]
    components: tuple[str, ...]
    parts: tuple[str, ...]  # "attention", "MLP", "embedding" ...
    layer: Numbers  # [item]; -1 before the first
    values: Numbers  # [item]
    total: float
    unit: str
    gap: float = 0.0


class Plane(Struct, frozen=True):
    name: str
    values: Numbers  # [row, column]
    low: Numbers | None = None
    high: Numbers | None = None
    component: str = ""  # of a cell, with {row} and {column} for the labels; axes name them otherwise
    unit: str = ""  # where it is not the grid's; planes of one unit share a scale


class Grid(Shown, frozen=True):
    """A number for every row and column: patching by layer and position, ablation by layer and head."""

    rows: Axis
    columns: Axis
    planes: tuple[Plane, ...]
    unit: str
    signed: bool = True
    full: float | None = None  # what has the strongest colour
    prompts: tuple[tuple[str, ...], ...] = ()  # the aligned pair a patch is taken between
    facts: tuple[Fact, ...] = ()


class Node(Struct, frozen=True):
    component: str
    label: str
    type: str  # "embed", "head", "mlp", "logits" ...
    layer: int  # how deep it stands, counted through all stacks
    unit: int = -1
    position: str = ""  # its name, where parts stand once for each position
    group: str = ""  # nodes of one name stand as one


class Circuit(Shown, frozen=True):
    """Who sends what to whom."""

    nodes: tuple[Node, ...]
    sources: Numbers  # [edge] indices of nodes
    targets: Numbers
    ports: tuple[str, ...]  # [edge] "q", "k", "v", or ""
    scores: Numbers  # [edge]
    about: str = ""


class Line(Struct, frozen=True):
    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False


class Ruler(Struct, frozen=True):
    name: str
    log: bool = False
    labels: tuple[str, ...] = ()  # of x = 0, 1, 2 ...


class Level(Struct, frozen=True):
    name: str
    y: float


class Curves(Shown, frozen=True):
    """Numbers along something, with their intervals."""

    x: Ruler
    y: Ruler
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()


class Context(Struct, frozen=True):
    """A text a neuron or feature reads, with its activations."""

    tokens: tuple[str, ...]
    values: Numbers
    note: str = ""


class Effect(Struct, frozen=True):
    word: str
    value: float


class Neuron(Shown, frozen=True):
    """One neuron or feature: what excites it, how often, and what it writes."""

    component: str
    contexts: tuple[Context, ...]
    edges: Numbers | None = None  # of the histogram's bins
    counts: Numbers | None = None
    raises: tuple[Effect, ...] = ()
    lowers: tuple[Effect, ...] = ()
    facts: tuple[Fact, ...] = ()


class Roc(Struct, frozen=True):
    false_positive: Numbers
    true_positive: Numbers
    area: float
    low: float | None = None
    high: float | None = None
    control: float | None = None  # the mean area of the same probe on shuffled labels, and the range of it
    control_low: float | None = None
    control_high: float | None = None


class Traces(Shown, frozen=True):
    """What a probe or monitor says at every token, by layer."""

    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    rows: Axis
    values: Numbers  # [row, token]
    unit: str = ""
    thresholds: Numbers | None = None  # [row]
    rocs: tuple[Roc, ...] = ()  # of each row, or one for all
    signed: bool = True


class Proof(Struct, frozen=True):
    name: str
    claim: str
    holds: bool | None
    error: float | None = None
    detail: str = ""


class Block(Struct, frozen=True):
    """Layers that are alike."""

    layers: tuple[int, ...]
    form: str
    sites: tuple[str, ...]
    heads: int = 0
    kv_heads: int = 0
    neurons: int = 0
    refused: tuple[Fact, ...] = ()


class Stack(Struct, frozen=True):
    name: str
    width: int
    blocks: tuple[Block, ...]


class Anatomy(Shown, frozen=True):
    """The map of a model: its parts, what is proven of them, what is refused and why."""

    model: str
    stacks: tuple[Stack, ...]
    proofs: tuple[Proof, ...]
    refused: tuple[Fact, ...] = ()


class Column(Struct, frozen=True):
    """Numbers or texts, one a row."""

    name: str
    numbers: Numbers | None = None
    texts: tuple[str, ...] | None = None
    bar: float | None = None  # drawn as a bar of which this is the full length
    tokens: bool = False  # the texts are tokens


class Table(Shown, frozen=True):
    """Any result, row by row."""

    columns: tuple[Column, ...]
    rows: int  # of the result; the columns may hold only its first
    components: tuple[str, ...] = ()  # what selecting a row selects


class Document(Struct, frozen=True):
    """One view: its data, how to read it (`lead`), what can mislead (`care`), how to make it again, and its source."""

    title: str
    data: View
    version: Literal[1] = msgspec.field(default=1, name="pellucid-view")
    lead: str = ""
    care: str = ""
    code: Code = Code()
    provenance: Origin = Origin()

    def json(self) -> str:
        """
        >>> about = Document(title="</script>", data=Table(columns=(), rows=0)).json()
        >>> "</script>" in about, Document.read(about).title
        (False, '</script>')
        """
        return embeddable(msgspec.json.encode(self).decode())

    def __repr__(self) -> str:
        return f"<Document {self.title!r}: {type(self.data).__name__.lower()}>"

    def _repr_html_(self) -> str:
        return str(_hosts().output(self))

    def save_html(self, path: str | Path, *more: Any) -> Path:
        """Write one file that shows this view (and `more`) anywhere, without a network."""
        return Path(_hosts().save_html(path, self, *more))

    @classmethod
    def read(cls, text: str | bytes) -> Document:
        """A document checked against the schema. InputError for anything else."""
        try:
            return read(text, cls)
        except msgspec.MsgspecError as error:
            raise InputError(f"this is no view of version {VERSION}: {error}") from None


def read(text: str | bytes, kind: type[T]) -> T:
    """A message that may hold documents. MsgspecError for what is none."""
    return msgspec.json.decode(text, type=kind, dec_hook=_view)


def _view(kind: type, found: Any) -> Any:
    """The data of a document, as the kind that it names."""
    return msgspec.convert(found, reduce(or_, Shown.__subclasses__()))


def _hosts() -> Any:
    """Where documents live: it stands above them, so they only know it by name, as a result does."""
    return importlib.import_module("pellucid.views.hosts")


def embeddable(json: str) -> str:
    """JSON that stays itself inside a script element: `<`, `>`, `&` and the two line ends of JavaScript are escaped."""
    for sign in "<>&\u2028\u2029":
        json = json.replace(sign, f"\\u{ord(sign):04x}")
    return json
