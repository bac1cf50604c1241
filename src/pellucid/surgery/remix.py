"""What is a model made of layers of several models, or of snapshots of one?

A recipe says which model's layers stand where, `(("a", 0, 8), ("b", 8, 14), ("a", 14, 30))`: slices of layers, from the first
number up to the second. It is read and written as the `slices` of mergekit's YAML (`merge_method: passthrough`; Goddard et al.
2024). As there, what comes before the blocks (embeddings) is the first slice's and what comes after them (last norm, head) is
the last slice's; a head that is the embedding stays the first's. Other than there, what belongs to a layer's place goes along
(`pellucid.surgery.arranging`), the layers are proven in their new places, and models that do not fit are refused: of other
settings, shapes or dtypes, and of another vocabulary, which would give gibberish without an error.

Snapshots of one ancestor may be mixed freely while they are near to it (evidence: `benchmarks/surgery.py`); models trained from
different starts may not, though their shapes are equal: nothing in the shape tells, so measure (`removal` shows what to beat).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from pellucid.changed import Change, Replaced, same, unchangeable
from pellucid.errors import InputError, Refused, checked, nearest
from pellucid.model import Model
from pellucid.surgery.arranging import Layers, block_list, layer_set, reorder, stack_named

SAYS_NOTHING = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|architectures|.*_token_id|use_cache|id2label|label2id"
)


@dataclass(frozen=True)
class Recipe:
    """Slices (model, first layer, the layer after the last), in the order in which a text passes them.

    >>> recipe = Recipe((("a", 0, 2), ("b", 2, 4)))
    >>> print(recipe.yaml())
    slices:
    - sources:
      - model: a
        layer_range: [0, 2]
    - sources:
      - model: b
        layer_range: [2, 4]
    merge_method: passthrough
    <BLANKLINE>
    >>> Recipe.read(recipe.yaml()) == recipe, recipe.layers[2]
    (True, ('b', 2))
    """

    slices: tuple[tuple[str, int, int], ...]

    def __post_init__(self) -> None:
        try:
            slices = tuple((str(name), int(start), int(stop)) for name, start, stop in self.slices)
        except (TypeError, ValueError):
            raise InputError(f"{self.slices!r} are no slices: expected (model, first layer, layer after the last) of each") from None  # fmt: skip
        object.__setattr__(self, "slices", slices)
        empty = next((each for each in slices if not 0 <= each[1] < each[2]), None)
        if empty is not None or not slices:
            raise InputError(f"{'a recipe without slices' if empty is None else f'slice {empty}'} holds no layer: write ('a', 0, 8) for layers 0 to 7")  # fmt: skip

    @classmethod
    def of(cls, layers: Iterable[tuple[str, int]]) -> Recipe:
        """The recipe of (model, layer) in order; neighbours of one model become one slice."""
        slices: list[tuple[str, int, int]] = []
        for name, layer in layers:
            if slices and (slices[-1][0], slices[-1][2]) == (name, layer):
                slices[-1] = (name, slices[-1][1], layer + 1)
            else:
                slices.append((name, layer, layer + 1))
        return cls(tuple(slices))

    @classmethod
    def read(cls, source: str | Path) -> Recipe:
        """A recipe from mergekit's YAML, text or file. Refused for what is no passthrough of one model a slice, or also scales."""
        try:
            given = yaml.safe_load(
                Path(source).read_text() if isinstance(source, Path) or "\n" not in source else source
            )
            slices = [each["sources"] for each in given["slices"]]
            ranges = [("" + s["model"], *s["layer_range"]) for sources in slices for s in sources]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError("this is no recipe of mergekit: expected `slices:` with `sources:` of `model:` and `layer_range:`") from error  # fmt: skip
        beyond = {*given} - {"slices", "merge_method", "base_model", "dtype", "name"}
        beyond |= {key for sources in slices for s in sources for key in s} - {"model", "layer_range"}
        beyond |= {key for each in given["slices"] for key in each} - {"sources"}
        if given.get("merge_method") != "passthrough" or any(len(sources) != 1 for sources in slices) or beyond:
            found = (
                f"merge_method: {given.get('merge_method')}, {', '.join(sorted(beyond)) or 'several models in a slice'}"
            )
            raise Refused(f"only passthrough is taken, one model a slice and nothing else ({found}): weights are never averaged or scaled here")  # fmt: skip
        return cls(tuple(ranges))

    def yaml(self) -> str:
        """As mergekit reads it; write it to a file with `Path(...).write_text`."""
        lines = ["slices:"]
        for name, start, stop in self.slices:
            model = yaml.safe_dump(name).splitlines()[0]
            lines += ["- sources:", f"  - model: {model}", f"    layer_range: [{start}, {stop}]"]
        return "\n".join([*lines, "merge_method: passthrough", ""])

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(model, layer) of every place."""
        return [(name, i) for name, start, stop in self.slices for i in range(start, stop)]


@checked
def remix(
    models: Mapping[str, Model], recipe: Recipe | str | Path | Sequence[tuple[str, int, int]], *, stack: str = ""
) -> Model:
    """The model that a recipe makes of models of one shape; it is the first slice's model, changed.

    `models` are by the names in the recipe, which is a `Recipe`, its slices, or mergekit's YAML. `stack` is "encoder" or
    "decoder" of an encoder-decoder (the rest of which is the first's). InputError for names that are not there and layers that
    are not; Refused for models of another shape, dtype or vocabulary, and as `reorder` does.

    >>> remix({"a": base, "b": tuned}, [("a", 0, 4), ("b", 4, 8)])
    <Model LlamaForCausalLM + ...: LlamaForCausalLM, 8 layers, d_model 32; proven>
    """
    if not isinstance(models, Mapping):
        raise InputError(f"models={models!r:.80}: expected the models by the names of the recipe")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe) if isinstance(recipe, str | Path) else Recipe(tuple(recipe))  # fmt: skip
    for name, _, _ in recipe.slices:
        if name not in models:
            raise InputError(f"the recipe speaks of {name!r}, which is none of the models{nearest(name, models) or f': {list(models)}'}")  # fmt: skip
    first, last = (models[recipe.slices[i][0]] for i in (0, -1))
    for each in dict.fromkeys(name for name, _, _ in recipe.slices):
        check_alike(first, models[each], each)
    order = [i for _, i in recipe.layers]
    arranged: tuple[Change, ...] = ()
    if order != list(range(len(stack_named(first, stack).blocks))):
        arranged = reorder(first, order, stack=stack).loaded.changes[len(first.loaded.changes) :]
    blocks = block_list(stack_named(first, stack))
    others: list[Change] = []
    for place, (name, i) in enumerate(recipe.layers):
        others += _differing(first, models[name], f"{blocks}.{i}", f"{blocks}.{place}", "apart")
    if not stack or stack == first.anatomy.stacks[-1].name:
        for part in getattr(first.anatomy.head, "names", ()):
            others += _differing(first, last, part, part, "together")
    return first.changed([*arranged, *others])


@checked
def take(model: Model, other: Model, layers: Layers, *, stack: str = "") -> Model:
    """The model with some layers from another one of its shape, each in its own place. Raises as `remix` does.

    >>> take(base, tuned, slice(2, 4))
    <Model LlamaForCausalLM + ...: LlamaForCausalLM, 8 layers, d_model 32; proven>
    """
    found = stack_named(model, stack)
    chosen = layer_set(found, layers)
    n = len(found.blocks)
    check_alike(model, other, "the other")
    blocks = block_list(found)
    return model.changed([c for i in range(n) if i in chosen for c in _differing(model, other, f"{blocks}.{i}", f"{blocks}.{i}", "apart")])  # fmt: skip


def _differing(first: Model, other: Model, module: str, place: str, ties: Any) -> Iterator[Change]:
    """What gives a module of the first model's tree, which now stands at `place`, the other's numbers."""
    known = dict(first.module.named_modules(remove_duplicate=False))
    if other is first or module not in known:  # an operation of the head
        return
    embeds: Any = getattr(first.module, "get_input_embeddings", lambda: None)()
    shared = getattr(embeds, "weight", None)
    ours, theirs = (dict(m.module.get_submodule(module).state_dict(keep_vars=True)) for m in (first, other))
    for name, tensor in theirs.items():
        own = ours[name]
        if why := unchangeable(own) or unchangeable(tensor):
            if same(own, tensor):
                continue
            raise Refused(f"{module}.{name} cannot be taken from another model: {why}")
        if (ties == "together" and shared is not None and same(own, shared)) or torch.equal(own, tensor.to(own.device)):
            continue
        yield Replaced(f"{place}.{name}", tensor.detach(), ties=ties)


def check_alike(first: Model, other: Model, name: str) -> None:
    """Refused where two models are not of one shape or do not speak of the same tokens."""
    if other is first:
        return

    def refuse(what: str) -> None:
        raise Refused(f"{name!r} ({other.name}) cannot be mixed with {first.name}: {what}")

    if type(other.module) is not type(first.module):
        refuse(f"one is a {type(other.module).__name__}, the other a {type(first.module).__name__}")
    a, b = ({k: v for k, v in _settings(m).items() if not SAYS_NOTHING.fullmatch(k)} for m in (first, other))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            refuse(f"{key} is {b.get(key)!r} there and {a.get(key)!r} here")
    shapes = [{n: (tuple(t.shape), t.dtype) for n, t in m.module.state_dict().items()} for m in (first, other)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(key) != shapes[1].get(key):
            refuse(f"{key} is {shapes[1].get(key)} there and {shapes[0].get(key)} here")
    said = [None if m.tokenizer is None else m.tokenizer.get_vocab() for m in (first, other)]
    if (said[0] is None) != (said[1] is None):
        refuse(
            "one of them was opened without a tokenizer, so nothing says that they mean the same tokens: tokenizer=..."
        )
    if said[0] != said[1]:
        refuse(
            f"their tokenizers differ ({len(said[1] or ())} tokens there, {len(said[0] or ())} here, not the same ones)"
        )


def _settings(model: Model) -> dict[str, Any]:
    config: Any = model.module.config
    found: dict[str, Any] = config.to_dict()
    return found
