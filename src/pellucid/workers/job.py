"""Work as a file that travels: how to open the model, the prompts, the edits, and which logits are read.

Values only. An edit that holds a function, and a model that only this process has, cannot be sent: the error says what to use
instead. The metric stays at home, where it is given what was read; so it may be any function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import metrics
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs, Stream, labelled
from pellucid.engine.reading import Reads
from pellucid.engine.saved import packed, unpacked
from pellucid.engine.sweep import Plan, plan_sweep
from pellucid.engine.text_map import TextMap
from pellucid.errors import InputError, Refused
from pellucid.metrics import BoundMetric, TokenSets, apply_formula
from pellucid.model import Model, load
from pellucid.workers.errand import Errand, Tensors, Work

KEY, FILE = "pellucid_errand", "errand.safetensors"


@dataclass(frozen=True, eq=False)
class Read:
    """What a metric reads, and itself the metric of a worker's plan."""

    positions: tuple[int, ...] | None
    tokens: Tensor | None
    classes: bool
    name: str = "read"
    outputs: int | None = None

    size: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        return logits

    def score(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return BoundMetric.read(self, logits, attention_mask)  # type: ignore[arg-type]


# ---- the model


def recipe(model: Model, folder: Path) -> dict[str, Any]:
    """How to open a model elsewhere, as JSON; what was changed since is written into the folder."""
    base = model.base or model
    said = {name: value for name, value in base.source.items() if value is not None}
    source = said.get("source")
    if not isinstance(source, str | Path):
        raise Refused(
            f"{model.name} is in the memory of this process, and workers cannot open it: save it (module.save_pretrained, "
            "tokenizer.save_pretrained) and open the folder with pl.load"
        )
    said = {n: str(v) if isinstance(v, Path | torch.device) else v for n, v in said.items() if n != "dtype"}
    said["dtype"] = str(base.loaded.dtype).removeprefix("torch.")
    odd = next((name for name, value in said.items() if not isinstance(value, str | int | bool)), None)
    if odd is not None:
        raise Refused(f"workers cannot open {model.name} as it was opened here: {odd}= is no plain value")
    if Path(source).exists():
        said["source"] = str(Path(source).resolve())
    if base.loaded.revision:
        said["revision"] = base.loaded.revision
    if model is not base:
        model.save_changes(folder / "changes.safetensors")
    return {"load": said, "digest": model.digest, "changed": model is not base}


def opened(recipe: Mapping[str, Any], folder: Path, device: str | None) -> Model:
    """The model of a recipe; InputError where it has other weights here."""
    base = load(**{**recipe["load"], **({"device": device} if device else {})})
    model = base.changed(folder / "changes.safetensors") if recipe["changed"] else base
    if model.digest != recipe["digest"]:
        raise InputError(
            f"{model.name} has other weights where the worker is ({model.digest[:12]}) than here ({recipe['digest'][:12]}): "
            "give all places the same files"
        )
    return model


# ---- what is done with it


def write(errand: Errand, path: Path) -> None:
    about, tensors = errand.values()
    write_tensors(path, KEY, {"work": errand.work, "about": dict(about)}, tensors)


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The name of an errand's work, and what it is begun from."""
    with reading_tensors(path, KEY, "holds no errand: expected a file of a worker's") as (said, tensors):
        return said["work"], said["about"], tensors


# ---- a sweep


def sweep(plan: Plan) -> Errand:
    """The batches of a plan. Refused for an edit that holds a function."""
    tensors: dict[str, Tensor] = {}
    counts = []
    edits: list[Edit] = []
    for v in plan.variants:
        counts.append(len(v.writers))
        edits += [w.edit for w in v.writers]
    try:
        said = packed(edits, tensors)
    except InputError as error:
        raise Refused(f"this sweep cannot be run by workers: {error}") from error
    about = {
        "edits": said,
        "counts": counts,
        "rung": plan.rung.name,
        "inputs": put_inputs(plan.job.inputs, tensors),
        "reads": put_reads(plan.metric, tensors),
    }
    expected = {"clean": plan.read.detach().cpu()}
    return Errand(plan.model, "workers.job:Variants", lambda: (about, tensors), expected=expected)


class Variants(Work):
    """The variants of a sweep on one rung of the ladder; a piece is the numbers of a batch."""

    errand = "sweep"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        edits = iter(model.resolved(unpacked(about["edits"], dict(tensors))))
        variants = [[next(edits) for _ in range(n)] for n in about["counts"]]
        inputs, reads = get_inputs(about["inputs"], tensors, model), get_reads(about["reads"], tensors)
        self.plan = plan_sweep(model.anatomy, inputs, variants, reads, rung=about["rung"])

    def first(self) -> Tensors:
        return {"clean": self.plan.rung.clean(self.plan.job)}

    def __call__(self, piece: Sequence[int]) -> Tensors:
        found: dict[int, Tensor] = {}
        for chunk, logits in self.plan.here([self.plan.variants[i] for i in piece]):
            found |= {v.index: read for v, read in zip(chunk, logits, strict=True)}
        return {"read": torch.stack([found[i] for i in piece]).cpu()}


# ---- values


def put_reads(metric: Reads, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Which logits a metric reads; the metric itself stays at home."""
    tokens = None if metric.tokens is None else _put(metric.tokens, tensors)
    return {"positions": metric.positions, "tokens": tokens, "classes": metric.classes}


def get_reads(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Read:
    tokens = None if about["tokens"] is None else tensors[about["tokens"]]
    positions = None if about["positions"] is None else tuple(about["positions"])
    return Read(positions, tokens, about["classes"])


def put_metric(metric: BoundMetric, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A metric of `pl.metrics`, which workers differentiate. Refused for a function of yours."""
    if metric.sets is None:
        raise Refused(
            f"the metric {metric.name!r} is a function of this process, and workers that take its gradient need it as a value: "
            "use one of pl.metrics, such as pl.metrics.logit_difference"
        )
    formula, held = metric.sets
    sets = [[_put(each.ids, tensors), _put(each.real, tensors)] for each in held]
    return put_reads(metric, tensors) | {
        "name": metric.name,
        "formula": formula.__name__,
        "sets": sets,
        "size": metric.size,
    }


def get_metric(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BoundMetric:
    reads, formula = get_reads(about, tensors), getattr(metrics, about["formula"])
    sets = [TokenSets(tensors[ids], tensors[real]) for ids, real in about["sets"]]
    function = partial(apply_formula, formula, sets)
    return BoundMetric(about["name"], reads.positions, reads.tokens, function, reads.classes, size=about["size"])


def _put(value: Tensor, tensors: dict[str, Tensor]) -> str:
    key = str(len(tensors))
    tensors[key] = value.detach().cpu().contiguous().clone()
    return key


def put_inputs(inputs: Inputs, tensors: dict[str, Tensor]) -> dict[str, Any]:
    def said(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": _put(value, tensors)}
        if not (value is None or isinstance(value, str | int | float)):
            raise Refused(f"a {type(value).__name__} among the prompts' tensors cannot be sent to a worker")
        return value

    def stream(x: Stream) -> dict[str, Any]:
        maps = [{"given": m.given, "turns": m.turns, "known": m.known} for m in x.maps]
        spans = {name: [list(map(int, span)) for span in rows] for name, rows in x.spans.items()}
        return {"ids": said(x.ids), "mask": said(x.mask), "spans": spans, "maps": maps}

    streams: dict[str, Any] = {}
    for name, x in sorted(
        inputs.streams.items(), reverse=True
    ):  # "" last: it is one of the others, where there are others
        twin = next((k for k in streams if inputs.streams[k] is x), None)
        streams[name] = stream(x) if twin is None else twin
    return {
        "tensors": {k: said(v) for k, v in inputs.tensors.items()},
        "streams": streams,
        "texts": list(inputs.texts),
    }


def get_inputs(about: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Model) -> Inputs:
    device = next(model.module.parameters()).device

    def value(x: Any) -> Any:
        return tensors[x["tensor"]].to(device) if isinstance(x, dict) else x

    streams: dict[str, Stream] = {}
    for name, x in about["streams"].items():
        if isinstance(x, str):
            streams[name] = streams[x]
            continue
        found = labelled(model.tokenizer, value(x["ids"]), value(x["mask"]))
        maps = tuple(
            TextMap(m.tokenizer, m.ids, each["given"], tuple(map(tuple, each["turns"])), each["known"] and [tuple(o) for o in each["known"]])
            for m, each in zip(found.maps, x["maps"], strict=False)
        )  # fmt: skip
        spans = {name: [(a, b) for a, b in rows] for name, rows in x["spans"].items()}
        streams[name] = replace(found, spans=spans, maps=maps)
    return Inputs({k: value(v) for k, v in about["tensors"].items()}, streams, tuple(about["texts"]))
