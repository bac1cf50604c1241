"""Edits that name prompts as their source get runs of those prompts instead; each set of prompts is run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.run import Run


def resolved(edits: Sequence[Edit], run: Callable[[Any, list[Site]], Run]) -> list[Edit]:
    """`edits` with every prompt (a string or several) among their sources replaced by a run that kept the sites."""
    wanted: dict[Any, list[Site]] = {}
    for edit in edits:
        for name in edit.sources:
            source = getattr(edit, name)
            if isinstance(source, (str, list, tuple)):
                wanted.setdefault(_key(source), []).append(edit.site.whole)  # type: ignore[union-attr]
    if not wanted:
        return list(edits)
    runs = {key: run(key if isinstance(key, str) else list(key), list(dict.fromkeys(s))) for key, s in wanted.items()}

    def with_runs(edit: Edit) -> Edit:
        changed: dict[str, Any] = {
            name: runs[_key(getattr(edit, name))]
            for name in edit.sources
            if isinstance(getattr(edit, name), (str, list, tuple))
        }
        return replace(edit, **changed) if changed else edit

    return [with_runs(e) for e in edits]


def _key(source: Any) -> Any:
    return source if isinstance(source, str) else tuple(source)
