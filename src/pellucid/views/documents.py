"""How does a finding look? From what a method returns to the document of the view that fits it.

A logit lens becomes a lens grid, attributions become coloured tokens, attention patterns heads one can look through,
effects over two dimensions a grid, numbers along something a curve, circuits a graph, an anatomy a map (`kinds`). What has
no view of its own is a table, so every result has a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import msgspec
import numpy as np
import xarray as xr

from pellucid.anatomy.map import Anatomy
from pellucid.circuits import Circuit, EdgeScores
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.views import forms, kinds, looking, maps, watching
from pellucid.views import schema as s
from pellucid.views.schema import Code, Document
from pellucid.views.source import code, origin

EDGES = 400  # of a graph of scores


def document(thing: Any, **about: Any) -> Document:
    """The document of a result, a circuit, an anatomy, or an object that holds one (a model, a fitted estimator).

    `about` replaces fields of it: `title`, `lead`, `care`, `code`. InputError for anything else.

    >>> effect = xr.DataArray([[0.5, -2.0]], dims=("layer", "head"), name="effect")
    >>> document(Result(effect, kind="ablation")).data.unit
    'effect'
    """
    made = _document(thing)
    if isinstance(about.get("code"), str):
        about["code"] = Code(python=about["code"])
    return msgspec.structs.replace(made, **about) if about else made


@singledispatch
def _document(thing: Any) -> Document:
    """Of what was fitted: its result, or how it was trained."""
    if isinstance(held := getattr(thing, "result_", None), Result):
        return _document(held)
    if (losses := getattr(thing, "losses_", None)) is not None and len(losses):
        return Document(
            title=f"Training of {type(thing).__name__}", data=forms.curves(_training(thing, np.asarray(losses)))
        )
    raise InputError(f"a {type(thing).__name__} has no view: give a result, a circuit, an anatomy or a document")


@_document.register
def _itself(thing: Document) -> Document:
    return thing


@_document.register
def _result(thing: Result) -> Document:
    return _made(thing.title, kinds.view(thing), thing)


@_document.register
def _array(thing: xr.DataArray | xr.Dataset) -> Document:
    return _document(Result(thing, kind="tensor", title=str(getattr(thing, "name", None) or "tensor")))


@_document.register
def _map(thing: Anatomy) -> Document:
    return Document(title=f"What {type(thing.module).__name__} is made of", data=maps.anatomy(thing))


@_document.register
def _model(thing: Model) -> Document:
    return _document(thing.anatomy)


@_document.register
def _circuit(thing: Circuit) -> Document:
    made, program = thing.provenance, code(thing.provenance, show="pl.views.document(result)")
    return Document(
        title=f"A circuit of {len(thing)} edges", data=maps.circuit(thing), code=program, provenance=origin(made)
    )


@_document.register
def _scores(thing: EdgeScores) -> Document:
    return msgspec.structs.replace(_circuit(thing.circuit(min(EDGES, len(thing.graph)))), title=thing.result.title)


def _made(title: str, data: s.View, result: Result) -> Document:
    lead, made = _prompts(result, data), result.provenance
    return Document(title=title, data=data, lead=lead, code=code(made), provenance=origin(made))


def _training(fitted: Any, losses: np.ndarray) -> Result:
    """What a fit leaves behind: a loss [step], or several [step, site], as the tuned lens has one for each site."""
    dims, sites = ("step", "site")[: losses.ndim], list(getattr(fitted, "biases_", ()))
    names = {"site": sites} if losses.ndim == 2 and len(sites) == losses.shape[1] else {}
    return Result(xr.DataArray(losses, {"step": np.arange(len(losses)), **names}, dims, "loss"), kind="training curve")


def _prompts(result: Result, data: s.View) -> str:
    """Which prompt is shown, where the result has several."""
    if "prompt" not in result.main.dims or isinstance(data, s.Table) or watching.is_firings(result):
        return ""
    n = result.main.sizes["prompt"]
    which = "the mean over" if isinstance(data, s.Contributions) else "the first of"
    return f"Shown is {which} {n} prompts; result.sel(prompt=i) shows one." if n > 1 else ""


# ---- several things in one view


def compare(methods: Mapping[str, Result], title: str = "") -> Document:
    """Several results of one kind in one view, by name.

    Numbers of tokens stand beneath one another, with the rank correlations of their orders; lenses (logit and tuned) share
    a grid, curves a chart, effects over the same rows and columns a grid, attention of one prompt in several models a view
    of heads, each shown by choice. One method on several models, before and after, has one scale. InputError where they
    are of different kinds, or not about the same tokens, layers or heads.

    >>> compare({"gradients": shares, "occlusion": drops}).save_html("words.html")
    PosixPath('words.html')
    >>> compare({"logit": logits, "tuned": tuned}).title
    'logit and tuned'
    """
    if not methods:
        raise InputError("there is nothing to compare: give results by name, {'one': result, 'other': result}")
    made = [result.provenance for result in methods.values()]
    sources = [origin(each) for each in made]
    facts = tuple(s.Fact(name=name, value=source.line) for name, source in zip(methods, sources, strict=True))
    origins = s.Origin(line=sources[0].line, facts=facts)
    return Document(
        title=title or " and ".join(methods), data=kinds.together(methods), code=code(*made), provenance=origins
    )


def attention(patterns: Result, *more: Result, title: str = "") -> Document:
    """Attention patterns with what else is known of them on the same prompt.

    `more` are results of `rollout` and `flow`, shown beside the heads, and of `head_summaries` or `circuits.head_roles`,
    which name heads by what they do. InputError for results that are not about the same tokens.

    >>> attention(pl.attention.patterns(model, prompt), pl.attention.rollout(model, prompt)).title
    'Where each head looks'
    """
    return _made(title or patterns.title, looking.attention(patterns, *more), patterns)


def circuit(found: Any, *more: Result, title: str = "") -> Document:
    """A circuit whose heads are grouped by what they do: `more` are results of `head_roles` or `head_summaries`.

    Heads of one role stand as one box, their edges added up; in the view names are given and taken off by hand, too.

    >>> circuit(found, pl.circuits.head_roles(model, prompts)).save_html("circuit.html")
    PosixPath('circuit.html')
    """
    roles = {at: role for result in more for at, role in looking.roles_of(result).items()}
    groups = {f"layers.{layer}.attn.heads.{head}": role for (layer, head), role in roles.items()}
    plain = _document(found)
    return msgspec.structs.replace(plain, title=title or plain.title, data=maps.circuit(found, groups))
