"""Many prompts in one call: split, asked side by side, and joined to one result.

Every method of this folder is written for one prompt and stands under `@batched`. Given several (a list of texts or of ids, a
task's `Prompts`, a batch of tensors) it runs them in step (`pellucid.engine.lockstep`): what they ask of the model is
answered in shared batches, prompts of like length together (`path.Pack`). Each prompt gets the numbers it gets alone, but
for rounding.

The result has a dimension `prompt` in front; what shorter prompts lack is NaN ("" of texts, False of flags), and `result[i]`,
or `result.prompts`, is what the method gives for that prompt alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.lockstep import in_step
from pellucid.errors import InputError, PellucidError
from pellucid.metrics import AnswerMetric, ReferenceMetric, SequenceMetric
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.tasks import Prompts
from pellucid.technique import settle, settling

P = ParamSpec("P")
TOKENS = 1024  # in one batch of predictions


def batched(method: Callable[P, Result]) -> Callable[P, Result]:
    """A method of one prompt as one of several; `target`, `against`, `players` and `baseline` are one for all or one for each."""
    signature = inspect.signature(method)

    @wraps(method)
    def several(*args: P.args, **kwargs: P.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        model, prompt = given.pop("model"), given.pop("prompt")
        prompts = apart(model, prompt, given.get("decoder"))
        if prompts is None:
            return method(*args, **kwargs)
        if isinstance(prompts[0], Inputs):
            given.pop("decoder", None)  # they hold it
        if given.get("edits"):
            given["edits"] = model.resolved(given["edits"])
        if given.get("target") is None and isinstance(prompts[0], Inputs):
            given["target"] = predicted(model, prompts, given.get("edits") or ())
        n = len(prompts)
        each = [{name: one(name, value, i, n) for name, value in given.items()} for i in range(n)]
        found: list[dict[str, Any]] = [{} for _ in prompts]
        calls = [
            partial(_call, method, told, model, prompt, **options)
            for told, prompt, options in zip(found, prompts, each, strict=True)
        ]
        results = in_step(calls)
        for name in {name for told in found for name in told}:
            settle(**{name: [told.get(name) for told in found]})
        return joined(results, [_text(p) for p in prompts])

    return cast("Callable[P, Result]", several)


def _call(method: Callable[..., Result], told: dict[str, Any], model: Model, prompt: Any, **options: Any) -> Result:
    with settling(told):
        return method(model, prompt, **options)


def _text(prompt: Inputs | Prompts) -> str:
    return prompt.clean[0] if isinstance(prompt, Prompts) else prompt.texts[0]


# ---- what is each prompt's own


def apart(model: Model, prompt: Any, decoder: Any = None) -> list[Inputs] | list[Prompts] | None:
    """The prompts one by one, without padding; None where it is one that is given as one.

    A list of a single text is a list: its result has the dimension `prompt` too.
    """
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, Prompts):
        return [prompt[i] for i in range(len(prompt))] if len(prompt) != 1 else None
    inputs = read_inputs(model.module, model.tokenizer, prompt, decoder=decoder)
    listed = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list | tuple)
    return [inputs.alone(i) for i in range(len(inputs))] if len(inputs) > 1 or listed else None


def one(name: str, value: Any, i: int, n: int) -> Any:
    """What an option is for prompt i of n."""
    if name == "checkpoint" and value is not None:
        return Path(f"{value}.{i}")
    if name in ("target", "against"):
        return _answer(name, value.tolist() if hasattr(value, "tolist") else value, i, n)
    if name in ("players", "baseline") and isinstance(value, list) and value and all(map(_several, value)):
        if len(value) != n:
            raise InputError(f"{len(value)} {name} for {n} prompts: give one for all, or one for each")
        return value[i]
    return value


def _several(value: Any) -> bool:
    """Whether an entry of a list is a list by itself: spans of one prompt, ids of one baseline."""
    return isinstance(value, list | np.ndarray | Tensor) and not (
        isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value)
    )


def _answer(name: str, value: Any, i: int, n: int) -> Any:
    if isinstance(value, AnswerMetric):
        return replace(value, answers=tuple(_row(a, i, n) for a in value.answers))
    if isinstance(value, SequenceMetric):
        return replace(value, answer=_row(value.answer, i, n))
    if isinstance(value, ReferenceMetric):
        reference = (
            torch.as_tensor(np.asarray(value.reference)) if not isinstance(value.reference, Tensor) else value.reference
        )
        return replace(value, reference=reference[i : i + 1]) if reference.ndim > 1 and len(reference) == n else value
    if not isinstance(value, list | tuple):
        return value
    if len(value) not in (1, n):
        raise InputError(f"{len(value)} entries in {name}= for {n} prompts: give one for all, or one for each")
    own = value[i if len(value) == n else 0]
    return [own] if isinstance(own, list | tuple) and all(isinstance(a, str | int) for a in own) else own


def _row(answers: Any, i: int, n: int) -> Any:
    return answers[i : i + 1] if isinstance(answers, tuple) and len(answers) == n else answers


def predicted(model: Model, prompts: Sequence[Inputs], edits: Sequence[Any]) -> list[int] | None:
    """The model's own answer to each, in batches; None where it is no single number, or each has to be asked by itself."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].stream("").ids.shape[1])
    found: dict[int, int] = {}
    names: dict[int, Any] = {}
    while order:
        size = max(1, TOKENS // max(1, prompts[order[0]].stream("").ids.shape[1]))
        some, order = order[:size], order[size:]
        try:
            told: dict[str, Any] = {}
            with settling(told):
                asked = Question.of(model, model.beside([prompts[i] for i in some], [1] * len(some)), edits=edits)
        except (PellucidError, RuntimeError):
            return None
        if any(len(a.ids) != 1 for a in asked.answers) or len(asked.answers) != len(some):
            return None
        found |= {i: a.id for i, a in zip(some, asked.answers, strict=True)}
        said = told.get("target")
        names |= dict(zip(some, said if isinstance(said, list) else [said] * len(some), strict=True))
    settle(target=[names[i] for i in range(len(prompts))])
    return [found[i] for i in range(len(prompts))]


# ---- one result


def joined(results: Sequence[Result], texts: Sequence[str]) -> Result:
    """Results of single prompts as one, with a dimension `prompt`; `result[i]` takes it apart again."""
    datasets = [result.data for result in results]
    dims = {
        dim: max(d.sizes.get(dim, 0) for d in datasets) for dim in dict.fromkeys(k for d in datasets for k in d.sizes)
    }
    ragged = [str(dim) for dim in dims if len({d.sizes.get(dim, 0) for d in datasets}) > 1]
    widest = {dim: max(datasets, key=lambda d: d.sizes.get(dim, 0)) for dim in dims}
    variables: dict[Any, Any] = {}
    coords: dict[Any, Any] = {
        "prompt": range(len(results)), "text_of_prompt": ("prompt", list(texts)),
        **{f"n_{dim}": ("prompt", [d.sizes.get(dim, 0) for d in datasets]) for dim in ragged},
    }  # fmt: skip
    for name in dict.fromkeys(k for d in datasets for k in d.variables):
        own = [d.variables.get(name) for d in datasets]
        first = next(v for v in own if v is not None)
        into = variables if any(name in d.data_vars for d in datasets) else coords
        if name in dims:  # counts along a dimension
            coords[name] = widest[name][name].variable
        elif into is coords and all(v is not None and v.identical(first) for v in own):
            coords[name] = first
        else:
            into[name] = (("prompt", *first.dims), np.stack([_filled(v, first, dims) for v in own]))
    titles, attrs = [result.title for result in results], [d.attrs for d in datasets]
    about = {"title": titles, **{k: [a.get(k, "") for a in attrs] for k in dict.fromkeys(k for a in attrs for k in a)}}
    shared = {k: v[0] for k, v in about.items() if all(x == v[0] for x in v)}
    coords |= {k: ("prompt", list(map(str, v))) for k, v in about.items() if k not in shared}
    title = shared.pop("title", f"{titles[0].partition(' of ')[0]} of {len(results)} prompts")
    own_facts = [*about.keys() - shared.keys() - {"title"}, *(["title"] if "title" in coords else [])]
    data = xr.Dataset(variables, coords, {**shared, "of_each_prompt": sorted(own_facts)})
    return Result(data, kind=results[0].kind, title=title)


def _filled(variable: Any, like: Any, dims: dict[Any, int]) -> np.ndarray:
    """The values, as long as the longest along every dimension."""
    sizes = [dims[d] for d in like.dims]
    kind = like.dtype.kind
    made = np.full(
        sizes, False if kind == "b" else "" if kind in "OU" else np.nan, dtype=object if kind in "OU" else None
    )
    if variable is not None:
        made[tuple(slice(n) for n in variable.shape)] = variable.values
    return made.astype(like.dtype) if kind in "iu" and not np.isnan(made).any() else made
