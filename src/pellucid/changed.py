"""A changed model as a value: what is changed, and the module tree that has it changed and shares everything else.

A change is a frozen value: it names a parameter (or a module) and says what becomes of it. `applied` gives a new tree of
modules, out of place as equinox's `tree_at` (Kidger and Garcia 2021): untouched tensors are the old ones (the same
memory), touched ones are new, the old module keeps every bit. So undo is the old model, changes stack in the order in
which they are given, and taking one out of the middle is to apply the others again to the first model.

    edited = model.changed(pl.changed.Added("transformer.h.3.mlp.c_proj.weight", left, right))
    edited.save_changes("edit.safetensors"); model.changed("edit.safetensors"); edited.undo()

Parameters are named, and their rows and columns laid out, as the module has them (`nn.Linear` [out, in], GPT-2's Conv1D
[in, out]). Values are computed in float64 and rounded once to the parameter's own dtype: a small change of a bfloat16
weight may be lost in that, so measure a change on the changed model.

What a tree shares it shares: training it, or any change in place, moves the other model too, unless the parameters are
`Copied`. Hooks are copied with the tree; a hook that holds on to a module of its own still holds the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pellucid.anatomy.fingerprint import tensor_hash
from pellucid.anatomy.weights import plain
from pellucid.errors import InputError, Refused, nearest

Ties = Literal["refuse", "together", "apart"]
Slot = tuple[nn.Module, str]


@dataclass(frozen=True, eq=False, repr=False)
class Change:
    """One change of a tree of modules; `apply` makes it on a tree of its own."""

    def apply(self, tree: nn.Module) -> None:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What makes it again: names, numbers and tensors, without what is left at its default."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        defaults = {f.name: f.default for f in fields(self)}
        return {name: v for name, v in given.items() if isinstance(v, Tensor) or v != defaults[name]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_short(v)}' for name, v in self.settings().items())})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Change):
            return NotImplemented
        mine, yours = self.settings(), other.settings()
        return mine.keys() == yours.keys() and all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(mine.values(), yours.values(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True, eq=False, repr=False)
class ParameterChange(Change):
    """A parameter (or buffer) whose value becomes another one of the same shape, dtype and device; frozen stays frozen.

    `ties` decides about a parameter that is used in several places, such as an embedding that is the unembedding too:
    "refuse" (Refused, which names the places), "together" (changed in all of them and still tied) or "apart" (changed
    here only; the tie is opened). Quantised and offloaded parameters are refused.
    """

    parameter: str
    ties: Ties = field(default="refuse", kw_only=True)

    def value(self, old: Tensor) -> Tensor:
        """The new value from the old one, which must not be written to."""
        raise NotImplementedError

    def apply(self, tree: nn.Module) -> None:
        change_parameter(tree, self.parameter, self.value, self.ties)


@dataclass(frozen=True, eq=False, repr=False)
class Replaced(ParameterChange):
    """A parameter with other numbers."""

    tensor: Tensor

    def value(self, old: Tensor) -> Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False, repr=False)
class Added(ParameterChange):
    """W + left @ right: a change of low rank. `part` picks one matrix of several: (3,) is expert 3 of fused experts."""

    left: Tensor  # [..., rows, rank]
    right: Tensor  # [..., rank, columns]
    part: tuple[int, ...] = field(default=(), kw_only=True)

    def value(self, old: Tensor) -> Tensor:
        if self.left.ndim < 2 or self.right.ndim < 2 or self.left.shape[-1] != self.right.shape[-2]:
            raise InputError(
                f"left {list(self.left.shape)} and right {list(self.right.shape)} do not multiply: expected "
                "[rows, rank] and [rank, columns]"
            )
        new = old.double()
        product = (self.left.double() @ self.right.double()).to(new)
        if product.shape != new[self.part].shape:
            raise InputError(
                f"left @ right is {list(product.shape)}, and {self.parameter} is {list(new[self.part].shape)}"
            )
        new[self.part] += product
        return new


@dataclass(frozen=True, eq=False, repr=False)
class Copied(Change):
    """Parameters with the same numbers in memory of their own (all of them by default): what will be trained."""

    parameters: tuple[str, ...] | None = None

    def apply(self, tree: nn.Module) -> None:
        for name in weights(tree) if self.parameters is None else self.parameters:
            change_parameter(tree, name, lambda old: old, "together")


@dataclass(frozen=True, eq=False, repr=False)
class Exchanged(Change):
    """A module in whose place another one stands (wherever it stood); the tree gets a twin of it."""

    module: str
    by: nn.Module

    def apply(self, tree: nn.Module) -> None:
        known = dict(tree.named_modules(remove_duplicate=False))
        if self.module not in known or not self.module:
            raise InputError(f"there is no module {self.module!r}{nearest(self.module, filter(None, known))}")
        new = twin(self.by)
        for parent in list(tree.modules()):
            for name, child in parent._modules.items():
                if child is known[self.module]:
                    parent._modules[name] = new


@dataclass(frozen=True, eq=False, repr=False)
class AdaptersOff(Change):
    """All adapters (peft's, in the layers) switched off: the base model they were put into.

    Refused without adapters, and where one is merged into the weights, which would have to be written to.
    """

    def apply(self, tree: nn.Module) -> None:
        layers = [m for m in tree.modules() if hasattr(m, "base_layer") or hasattr(m, "original_module")]
        if not layers:
            raise Refused("this model has no adapters that could be switched off: give the other model by base=")
        for layer in layers:
            if getattr(layer, "merged", False):
                raise Refused("an adapter is merged into the weights: call unmerge_adapter() first, or give base=")
            layer.enable_adapters(False)  # type: ignore[operator]


def applied(module: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """A new tree with the changes made, one after the other; the module is left as it is, bit for bit."""
    tree = twin(module)
    for change in changes:
        if not isinstance(change, Change):
            raise InputError(f"expected changes such as pl.changed.Replaced(...), got a {type(change).__name__}")
        change.apply(tree)
    return tree


def twin(module: nn.Module) -> nn.Module:
    """A new tree of the same modules on the same tensors. Parameters have their own gradient and `requires_grad`."""
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values(), *vars(owner).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _again(tensor)
    made: nn.Module = copy.deepcopy(module, memo)
    return made


def _again(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter) or (type(tensor) is not nn.Parameter and not plain(tensor)):
        return tensor
    made = nn.Parameter(tensor.detach(), tensor.requires_grad)  # the same memory, and the same count of changes
    vars(made).update(vars(tensor))
    return made


def change_parameter(tree: nn.Module, name: str, value: Callable[[Tensor], Tensor], ties: Ties) -> None:
    """Put what `value` makes of a parameter (or buffer) in its place, as a tensor of its own. See `ParameterChange`."""
    known = slots(tree)
    if name not in known:
        raise InputError(f"there is no parameter {name!r}{nearest(name, known)}")
    place = known[name]
    old = getattr(*place)
    if why := unchangeable(old):
        raise Refused(f"{name} cannot be changed: {why}")
    tied = {slot: other for other, slot in known.items() if slot != place and same(old, getattr(*slot))}
    if tied and ties == "refuse":
        raise Refused(
            f"{name} is also {' and '.join(sorted(tied.values()))}: pass ties='together' to change it in all of these "
            "places, or ties='apart' to change it in this one only"
        )
    with torch.no_grad():
        found = value(old.detach())
        if found.shape != old.shape:
            raise InputError(f"{name} is {list(old.shape)}, and its new value is {list(found.shape)}")
        new = torch.empty_like(old).copy_(found)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    for owner, key in [place, *(tied if ties == "together" else ())]:
        if getattr(owner, key).shape != new.shape:
            raise Refused(f"{name} and {tied[owner, key]} are one tensor in two shapes: change them apart")
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = new
    if tied and ties == "apart":
        _untied(tree)


def _untied(tree: Any) -> None:
    """Say so in the config where the embedding is no longer the head: what is saved opens with both."""
    ends: list[Any] = [getattr(tree, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    config: Any = getattr(tree, "config", None)
    if None in ends or not hasattr(config, "get_text_config") or not all(hasattr(end, "weight") for end in ends):
        return
    if not same(ends[0].weight, ends[1].weight):
        for each in (config, config.get_text_config()):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False


def weights(tree: nn.Module) -> list[str]:
    """The names of all parameters, each once however many places it has."""
    return [name for name, _ in tree.named_parameters()]


def slots(tree: nn.Module) -> dict[str, Slot]:
    """Where each parameter and buffer hangs, by every name it goes by."""
    return {
        f"{prefix}.{name}" if prefix else name: (owner, name)
        for prefix, owner in tree.named_modules(remove_duplicate=False)
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    }


def unsavable(tree: nn.Module, why: str) -> None:
    """Let `save_pretrained` of a tree say why it cannot, where what it writes would be opened as another model."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise Refused(f"{why}: an ordinary checkpoint would be opened as another model; use save_changes(path)")

    vars(tree)["save_pretrained"] = save_pretrained


def differences(old: nn.Module, new: nn.Module) -> dict[str, tuple[float, float]]:
    """Where a tree has other numbers than another one: by the name of the parameter |new - old| / |old| and the largest
    difference of a single number (NaN where the old tree has no such parameter, or one of another shape). A tensor that only
    stands in another place is none.
    """
    before, found = slots(old), {}
    known = {(t.data_ptr(), t.shape) for t in (getattr(*slot) for slot in before.values())}
    for name, tensor in new.named_parameters():
        if (tensor.data_ptr(), tensor.shape) in known or tensor.is_meta:
            continue
        other = getattr(*before[name]) if name in before else None
        if other is None or other.shape != tensor.shape:
            found[name] = (float("nan"), float("nan"))
        elif not torch.equal(tensor, other):
            a, b = (t.detach().double() for t in (tensor, other))
            found[name] = (float((a - b).norm() / b.norm()), float((a - b).abs().max()))
    return found


def unchangeable(tensor: Tensor) -> str:
    """Why a parameter cannot be changed; "" where it can."""
    if tensor.is_meta:
        return "it is offloaded; load the model without device_map"
    if plain(tensor):
        return ""
    kind = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
    return f"it is quantised, or no weight ({kind}); load the model unquantised, or expanded as .gguf files are"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one piece of memory."""
    return a is b or (a.numel() > 0 and not a.is_meta and a.device == b.device and 0 != a.data_ptr() == b.data_ptr())


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {tensor_hash(value)[:8]}>"
    return f"<{type(value).__name__}>" if isinstance(value, nn.Module) else repr(value)


class Weighted(Protocol):
    """A model: its name, and the digest of its weights."""

    name: str

    @property
    def digest(self) -> str: ...


def check_weights(model: Weighted, digest: str | None, what: str) -> None:
    """InputError where something fitted (a dictionary, a lens, probes ...) belongs to other weights than the model's.

    `digest` is that of the weights it was fitted on; "" or None where it does not say.
    """
    if digest and digest != (own := model.digest):
        raise InputError(
            f"{what} belongs to other weights ({digest[:12]}) than {model.name} ({own[:12]}): fit it on this model"
        )


def told(changes: Sequence[Change], most: int = 2) -> str:
    """A few words about changes: what is done to what."""
    short = [
        f"{type(c).__name__}({next((v for v in c.settings().values() if isinstance(v, str)), '')})" for c in changes
    ]
    return ", ".join(short) if len(short) <= most else f"{', '.join(short[:most])} and {len(short) - most} more"
