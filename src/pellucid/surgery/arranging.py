"""What does each layer do, if layers are taken out, repeated, swapped, put side by side or in another order?

A transformer's blocks all read and write one residual stream, so any sequence of them runs (Lad et al. 2024, Sun et al. 2024).
An arrangement is a list of layer numbers, `[0, 1, 1, 3]`: what stands in each place. A list in it, `[0, [1, 2], 3]`, is layers
side by side: all are given the same, and the mean of what they make goes on ("Layers as Painters", Sun et al. 2024). The result
is a model of its own that shares every weight with the old one, which keeps every bit and is the undo.

What belongs to a block goes with it and what belongs to its place stays: every use of a block is a module of its own with the
number of its place (caches are kept by it), and lists of the config that have an entry for each layer (kinds of attention, of
MLPs) are put in the same order. Of layers side by side the first has the number of the place; the others have numbers behind all
places, so that each keeps its own keys and values. No config can say that, so such a model is kept by `save_changes` alone, and
what stands side by side has a residual stream before and behind it and no sites inside. That this is all there is to it is tried on the probe: each block must be given, beside its
residual, what it was given before, must then make of the residual what it made before, and generating with a cache must be
generating without. Where it is not so (a first block that makes the position bias of all others, keys and values that layers
share) the arrangement is refused, and the reason names what differs.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.anatomy.structure import Stack
from pellucid.changed import Change, twin, unsavable
from pellucid.engine.alone import Alone, differs
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused, at_least, checked
from pellucid.model import Model

COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
Layers = int | slice | Sequence[int]
Place = int | tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Arranged(Change):
    """The blocks of a list in another order; `order` says which stands in each place.

    >>> Arranged("model.layers", (0, 2))
    Arranged(blocks='model.layers', order=(0, 2))
    """

    blocks: str
    order: tuple[Place, ...]

    def apply(self, tree: nn.Module) -> None:
        parent, _, name = self.blocks.rpartition(".")
        old = tree.get_submodule(self.blocks)
        assert isinstance(old, nn.ModuleList)
        numbers, used = _numbered(old), set[int]()

        def placed(source: int, number: int) -> nn.Module:
            block = twin(old[source]) if source in used else old[source]
            used.add(source)
            for path, attribute in numbers:
                setattr(block.get_submodule(path), attribute, number)
            return block

        several = [each if isinstance(each, tuple) else (each,) for each in self.order]
        behind = itertools.count(len(several))
        made: list[nn.Module] = []
        for place, sources in enumerate(several):
            each = [placed(source, next(behind) if i else place) for i, source in enumerate(sources)]
            made.append(each[0] if len(each) == 1 else Beside(each))
        tree.get_submodule(parent)._modules[name] = nn.ModuleList(made)
        if any(len(sources) > 1 for sources in several):
            unsavable(tree, "layers side by side cannot be told by a config")
        elif len(used) < len(made) and "save_pretrained" not in vars(tree) and hasattr(tree, "save_pretrained"):
            vars(tree)["save_pretrained"] = types.MethodType(_saved, tree)
        numbered = [sources[0] for sources in several] + [s for sources in several for s in sources[1:]]
        for config in _configs(tree, self.blocks):
            shared = config is getattr(tree, "config", None) and getattr(config, "is_encoder_decoder", False)
            side = next((side for side in ("decoder", "encoder") if shared and side in self.blocks), "")
            _rearrange(config, numbered, len(old), side)


def _saved(tree: Any, save_directory: Any, **options: Any) -> None:
    """`save_pretrained` of a model whose repeated blocks share their weights: a checkpoint holds each by itself."""
    seen: set[int] = set()
    blocks = {name for name, module in tree.named_modules() if isinstance(module, nn.ModuleList)}
    kept: dict[str, Tensor] = {}
    for name, tensor in tree.state_dict().items():
        inside = any(name.startswith(f"{each}.") for each in blocks)
        kept[name] = tensor.clone() if inside and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    type(tree).save_pretrained(tree, save_directory, **{"state_dict": kept, **options})


class Beside(nn.Module):
    """Blocks side by side: all are given the same, and what they make is averaged."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what models ask of a block, such as its kind, is the same for all of them
            return getattr(self.blocks[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _mean([block(*args, **kwargs) for block in self.blocks])


def _mean(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor) and first.is_floating_point():
        return torch.stack(list(outputs)).mean(0)
    return tuple(map(_mean, zip(*outputs, strict=True))) if isinstance(first, tuple) else first


def _numbered(blocks: nn.ModuleList) -> list[tuple[str, str]]:
    """Where a block keeps its own number: attributes that are i in block i, for every i."""
    found = []
    for path, module in blocks[0].named_modules():
        for attribute, value in vars(module).items():
            if type(value) is int and value == 0 and len(blocks) > 1:
                said = (vars(b.get_submodule(path)).get(attribute) if _has(b, path) else None for b in blocks)
                if all(number == i for i, number in enumerate(said)):
                    found.append((path, attribute))
    return found


def _has(block: nn.Module, path: str) -> bool:
    return path in dict(block.named_modules())


def _configs(tree: nn.Module, blocks: str) -> Iterator[Any]:
    """The config that the list's owners go by, innermost first, each once."""
    seen: set[int] = set()
    path = blocks
    while True:
        path = path.rpartition(".")[0]
        config = getattr(tree.get_submodule(path), "config", None)
        if isinstance(config, PretrainedConfig):
            for each in (config, config.get_text_config()):
                if id(each) not in seen:
                    seen.add(id(each))
                    yield each
        if not path:
            return


def _rearrange(config: PretrainedConfig, order: Sequence[int], n: int, side: str) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == n:
            setattr(config, name, type(value)(value[i] for i in order))
    for name in COUNTS:  # where both sides are told by one config, the plain name is the encoder's
        if getattr(config, name, None) == n and (not side or side in name or (side, name) == ("encoder", "num_layers")):
            setattr(config, name, len(order))


# ---- what is asked for


@checked
def reorder(model: Model, order: Sequence[int | Sequence[int]], *, stack: str = "") -> Model:
    """The model with its blocks in this order; a block may be left out, or stand in several places; a list stands for blocks side
    by side, whose outputs are averaged.

    `stack` is "encoder" or "decoder" of an encoder-decoder. InputError for numbers that are no layers; Refused where a block
    in its new place is given or makes something else than before (see the module).

    >>> reorder(model, [0, 2, 1, 3])
    <Model LlamaForCausalLM + Arranged(model.layers): LlamaForCausalLM, 4 layers, d_model 32; proven>
    """
    found = stack_named(model, stack)
    n = len(found.blocks)
    try:
        wanted = tuple(
            tuple(map(operator.index, each)) if isinstance(each, Sequence) else operator.index(each) for each in order
        )
    except TypeError:
        raise InputError(f"order={order!r}: expected the numbers of layers, such as [0, 2, 1, 3]") from None
    flat = [i for each in wanted for i in _each(each)]
    outside = next((i for i in flat if not -n <= i < n), None)
    if outside is not None or not all(map(_each, wanted)) or not wanted:
        what = "no layer is left" if outside is None else f"there is no layer {outside}"
        raise InputError(f"{what}: this stack has {n} (0 to {n - 1})")
    wanted = tuple(
        tuple(i % n for i in each) if isinstance(each, tuple) and len(each) > 1 else _each(each)[0] % n
        for each in wanted
    )
    arranged = Arranged(block_list(found), wanted)
    try:
        made = model.changed(arranged)
        _check(model, made, found, wanted)
    except (InputError, Refused):
        raise
    except Exception as error:  # the family's own code, which knows the places of its layers in a way of its own
        said = " ".join(str(error).split())[:120]
        raise Refused(
            f"this model does not run with its layers as {list(wanted)}, since they know their places in a way of their own "
            f"({type(error).__name__}: {said})"
        ) from error
    return made


@checked
def remove(model: Model, layers: Layers, *, stack: str = "") -> Model:
    """The model without some layers: a number, a slice or a list. Raises as `reorder` does."""
    gone = layer_set(stack_named(model, stack), layers)
    return reorder(model, [i for i in range(len(stack_named(model, stack).blocks)) if i not in gone], stack=stack)


@checked
def repeat(model: Model, layers: Layers, *, times: int = 2, stack: str = "") -> Model:
    """The model in which a span of layers is passed `times` over, one after the other. Raises as `reorder` does."""
    at_least(1, times=times)
    span = _span(stack_named(model, stack), layers)
    n = len(stack_named(model, stack).blocks)
    return reorder(model, [*range(span[0]), *(span * times), *range(span[-1] + 1, n)], stack=stack)


@checked
def parallel(model: Model, layers: Layers, *, stack: str = "") -> Model:
    """The model in which a span of layers is side by side: each is given what the first was given, the mean of what they make goes
    on. Raises as `reorder` does; Refused where layers of the span are given different things (kinds of attention).

    >>> parallel(model, slice(2, 5))
    <Model LlamaForCausalLM + Arranged(model.layers): LlamaForCausalLM, 6 layers, ...>
    """
    span = _span(stack_named(model, stack), layers)
    n = len(stack_named(model, stack).blocks)
    return reorder(model, [*range(span[0]), span, *range(span[-1] + 1, n)], stack=stack)


@checked
def swap(model: Model, one: int, other: int, *, stack: str = "") -> Model:
    """The model with two layers in each other's place. Raises as `reorder` does."""
    n = len(stack_named(model, stack).blocks)
    (a,), (b,) = (layer_set(stack_named(model, stack), i) for i in (one, other))
    return reorder(model, [b if i == a else a if i == b else i for i in range(n)], stack=stack)


def stack_named(model: Model, name: str) -> Stack:
    found = [s for s in model.anatomy.stacks if s.name == name] or (model.anatomy.stacks if not name else [])
    if len(found) != 1:
        names = ", ".join(repr(s.name) for s in model.anatomy.stacks)
        raise InputError(f"stack={name!r}: this model has {names if len(model.anatomy.stacks) > 1 else 'one stack'}")
    return found[0]


def layer_set(stack: Stack, layers: Layers) -> list[int]:
    n = len(stack.blocks)
    every = list(range(n))
    if isinstance(layers, slice):
        found = every[layers]
    else:
        try:
            given = [operator.index(i) for i in (layers if isinstance(layers, Sequence) else [layers])]
        except TypeError:
            raise InputError(f"layers={layers!r}: expected a number, a slice or a list of numbers") from None
        outside = next((i for i in given if not -n <= i < n), None)
        if outside is not None:
            raise InputError(f"there is no layer {outside}: this stack has {n} (0 to {n - 1})")
        found = sorted({i % n for i in given})
    if not found:
        raise InputError(f"layers={layers!r} names no layer of {n}")
    return found


def _span(stack: Stack, layers: Layers) -> list[int]:
    span = layer_set(stack, layers)
    if span != list(range(span[0], span[-1] + 1)):
        raise InputError(f"layers {span} are no span: name neighbours, or write the whole order, reorder(model, [...])")
    return span


def _each(place: Place) -> tuple[int, ...]:
    return place if isinstance(place, tuple) else (place,)


def block_list(stack: Stack) -> str:
    """The module list that holds the blocks; Refused where they are not one list in order."""
    names = [block.module for block in stack.blocks]
    owner = names[0].rpartition(".")[0]
    if names != [f"{owner}.{i}" for i in range(len(names))]:
        raise Refused(f"the blocks of this model are not one list in their order ({', '.join(names[:3])} ...): they cannot be rearranged")  # fmt: skip
    return owner


# ---- is it what it says?


@torch.no_grad()
def _check(model: Model, made: Model, stack: Stack, order: Sequence[Place]) -> None:
    after = next((s for s in made.anatomy.stacks if s.name == stack.name and len(s.blocks) == len(order)), None)
    if after is None:
        raise Refused(f"with layers {list(order)} this model is no longer a stack of {len(order)} blocks")
    old, new = (Alone(m.anatomy, s, m.inputs) for m, s in ((model, stack), (made, after)))
    probe = Inputs(dict(model.anatomy.inputs), {}, ())
    before, now = old.recorded(probe), new.recorded(probe)
    rows = len(next(iter(probe.tensors.values())))
    for place, sources in enumerate(map(_each, order)):
        call, leave = now[place], after.blocks[place].taps["resid_post"]
        made_before = []
        for source in sources:
            block = stack.blocks[source]
            name = differs(old.others(block, before[source]), new.others(after.blocks[place], call))
            if name is not None:
                what = f"argument {name}" if name.isdigit() else repr(name)
                raise Refused(f"layer {source} in place {place} is given another {what} than before: it belongs to the place, or to another layer")  # fmt: skip
            hidden = block.taps["resid_pre"].layout.read(call.hidden, rows)
            made_before.append(old.call(block, hidden, before[source]))
        gap = error(new.output(after.blocks[place], call, rows), torch.stack(made_before).mean(0))
        if gap > TOLERANCE.get(made_before[0].dtype, 4e-2):
            raise Refused(f"layer {', '.join(map(str, sources))} in place {place} makes something else of the residual than before ({gap:.0e}; {leave.module})")  # fmt: skip
    _check_cache(made)


def _check_cache(made: Model) -> None:
    """Generating with a cache is generating without."""
    can_generate: Any = getattr(made.module, "can_generate", None)
    if can_generate is None or not can_generate():
        return
    ids = made.anatomy.inputs["input_ids"][:1]
    said = [made.generate(ids, max_new_tokens=3, scores=True, use_cache=cache).scores for cache in (True, False)]
    if said[0].shape != said[1].shape or error(said[0], said[1]) > TOLERANCE.get(said[0].dtype, 4e-2):
        raise Refused("generating with a cache is not generating without: layers share what the cache keeps")
