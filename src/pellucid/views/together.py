"""How do several results look in one view: methods beneath one another, two lenses in one grid, curves in one chart?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import looking, maps
from pellucid.views import schema as s
from pellucid.views.documents import document, lens, tokens
from pellucid.views.monitors import CHANCE
from pellucid.views.schema import Document
from pellucid.views.source import code, origin


def compare(methods: Mapping[str, Result], title: str = "") -> Document:
    """Several results of one kind in one view, by name.

    Numbers of tokens stand beneath one another, with the rank correlations of their orders; lenses (logit and tuned) share
    a grid, curves a chart, effects over the same rows and columns a grid, each shown by choice. InputError where they
    are of different kinds, or not about the same tokens, layers or heads.

    >>> compare({"gradients": shares, "occlusion": drops}).save_html("words.html")    # doctest: +SKIP
    >>> compare({"logit": logit_lens(model, prompt), "tuned": logit_lens(model, prompt, through=lens)})  # doctest: +SKIP
    """
    if not methods:
        raise InputError("there is nothing to compare: give results by name, {'one': result, 'other': result}")
    shown = {name: document(result) for name, result in methods.items()}
    title = title or " and ".join(methods)
    kinds = {type(each.data) for each in shown.values()}
    if kinds <= {s.Tokens}:
        data: s.View = tokens(methods)
    elif kinds <= {s.Lens}:
        data = lenses(methods)
    elif kinds <= {s.Curves}:
        data = curves({name: each.data for name, each in shown.items()})  # type: ignore[misc]
    elif kinds <= {s.Grid}:
        data = grids({name: each.data for name, each in shown.items()})  # type: ignore[misc]
    else:
        each = ", ".join(f"{name!r} {type(d.data).__name__.lower()}" for name, d in shown.items())
        raise InputError(f"these cannot stand in one view: {each}; compare tokens, lenses, curves or grids")
    sources = tuple(each.provenance for each in shown.values())
    facts = tuple(s.Fact(name=name, value=source.line) for name, source in zip(methods, sources, strict=True))
    return Document(title=title, data=data, provenance=s.Origin(line=sources[0].line, facts=facts))


def attention(patterns: Result, *more: Result, title: str = "") -> Document:
    """Attention patterns with what else is known of them on the same prompt.

    `more` are results of `rollout` and `flow`, shown beside the heads, and of `head_summaries` or `circuits.head_roles`,
    which name heads by what they do. InputError for results that are not about the same tokens.

    >>> attention(patterns(model, prompt), rollout(model, prompt), head_summaries(model))  # doctest: +SKIP
    """
    data = looking.attention(patterns, *more)
    return Document(title=title or patterns.title, data=data, code=code(patterns.provenance), provenance=origin(patterns.provenance))  # fmt: skip


def circuit(found: Any, *more: Result, title: str = "") -> Document:
    """A circuit whose heads are grouped by what they do: `more` are results of `head_roles` or `head_summaries`.

    Heads of one role stand as one box, their edges added up; in the view names are given and taken off by hand, too.

    >>> circuit(found, head_roles(model, prompts)).save_html("circuit.html")  # doctest: +SKIP
    """
    roles = {at: role for result in more for at, role in looking.roles_of(result).items()}
    groups = {f"layers.{layer}.attn.heads.{head}": role for (layer, head), role in roles.items()}
    plain = document(found)
    return msgspec.structs.replace(plain, title=title or plain.title, data=maps.circuit(found, groups))


def lenses(methods: Mapping[str, Result]) -> s.Lens:
    """Several lenses on one prompt in one grid; InputError where tokens or layers differ."""
    first, *others = methods.items()
    views = {name: lens(result) for name, result in methods.items()}
    _same("tokens", {name: v.tokens for name, v in views.items()})
    _same("layers", {name: v.components for name, v in views.items()})
    return lens(first[1], dict(others), name=first[0])


def curves(methods: Mapping[str, s.Curves]) -> s.Curves:
    """Lines of several results, named by them; InputError where they do not run along the same thing."""
    _same("x axes", {name: (v.x.name, v.x.labels) for name, v in methods.items()})
    _same("y axes", {name: v.y.name for name, v in methods.items()})
    first = next(iter(methods.values()))
    own = {name: [line for line in view.lines if line.name != CHANCE] for name, view in methods.items()}
    lines = [
        msgspec.structs.replace(line, name=name if len(each) == 1 else f"{name}: {line.name}")
        for name, each in own.items()
        for line in each
    ]
    lines += [line for line in first.lines if line.name == CHANCE]  # the same for all
    return msgspec.structs.replace(first, lines=tuple(lines))


def grids(methods: Mapping[str, s.Grid]) -> s.Grid:
    """Planes of several results over the same rows and columns, on one scale."""
    _same("rows", {name: v.rows.labels for name, v in methods.items()})
    _same("columns", {name: v.columns.labels for name, v in methods.items()})
    first = next(iter(methods.values()))
    planes = tuple(
        msgspec.structs.replace(plane, name=name if len(view.planes) == 1 else f"{name}: {plane.name}")
        for name, view in methods.items()
        for plane in view.planes
    )
    signed = any(view.signed for view in methods.values())
    return msgspec.structs.replace(first, planes=planes, signed=signed, facts=())


def _same(what: str, values: Mapping[str, Any]) -> None:
    (name, first), *others = values.items()
    for other, value in others:
        if value != first:
            raise InputError(f"{other!r} has other {what} than {name!r}: they cannot stand in one view")
