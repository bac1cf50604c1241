"""Which weights are these? A digest of all of them, taken again only where they changed.

A tensor's numbers, read as integers x [rows, 1024], give one sum a row, x w mod 2^64, with w fixed and odd; SHA-256 of
these sums is the tensor's hash. Integer sums are the same in every order, so on every device, and only one number in
1,024 leaves it. Two tensors that differ give the same sum with a chance of about 2^-31 a row at most.

A hash is kept with what it was taken of: the storage, place, shape and version of the tensor. In-place operations raise
the version. Writing through `tensor.data`, a NumPy view or a kernel of one's own does not; a sample of the numbers that
meets every row and every column (up to 2,048 of each) is compared as well, so that a change of whole rows, columns,
heads or matrices is noticed however it was made. What changes only a few single numbers behind torch's back goes
unseen until `Fingerprint.forget`.

Which of several adapters is on is no weight, but decides what the module computes: the settings of modules that hold
parts by name (`switches`) count as well.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
WIDTH, CHUNK, SAMPLE = 1024, 1 << 18, 2048
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """The digest of a module's weights; `known` is one whose tensors this module may share."""

    def __init__(self, module: nn.Module, known: Fingerprint | None = None) -> None:
        self.module = unwrapped(module)
        self._hashes: dict[Hashable, tuple[int, str]] = {} if known is None else dict(known._hashes)
        self._behind = 0  # how often weights were changed behind torch's back

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint, (self.module,)  # a copy has storages of its own

    @property
    def digest(self) -> str:
        """Sixteen hex digits over names, shapes, dtypes and numbers of the module's state dict, and its `switches`.

        Equal for equal weights in every process and on every device. Weights on the meta device (accelerate's) count by
        name and shape only; buffers that are not saved (rotary tables, masks) do not count.
        """
        found = list(self._tensors())
        keys = [_key(t) for _, t in found]
        for key, (_, t), sample in zip(keys, found, _samples([t for _, t in found]), strict=True):
            if key in self._hashes and self._hashes[key][0] != sample:
                self._behind += 1
                del self._hashes[key]
            if key not in self._hashes:
                self._hashes[key] = sample, tensor_hash(t)
        self._hashes = {key: self._hashes[key] for key in keys}
        lines = [
            f"{name} {tuple(t.shape)} {t.dtype} {self._hashes[k][1]}" for k, (name, t) in zip(keys, found, strict=True)
        ]
        lines += [f"{name} {settings!r}" for name, settings in switches(self.module)]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

    def stamp(self) -> tuple[Hashable, ...]:
        """What stays equal while no weight is exchanged or changed in place; a millisecond for 300 tensors."""
        return self._behind, *(_key(t) for _, t in self._tensors()), repr(switches(self.module))

    def forget(self) -> None:
        """Hash everything anew when next asked: after writes that torch cannot see."""
        self._hashes.clear()
        self._behind += 1

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, owner in self.module.named_modules(remove_duplicate=False):
            start = f"{prefix}." if prefix else ""
            for name, value in _own(owner).items():
                yield from _plain(f"{start}{name}", value)


class Memo:
    """What was worked out about a module, by key; forgotten as soon as a weight changes. A copy starts empty."""

    def __init__(self, weights: Fingerprint | nn.Module) -> None:
        self.weights = weights if isinstance(weights, Fingerprint) else Fingerprint(weights)
        self._stamp: Hashable = None
        self._known: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, (self.weights,)

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key; `key` says which question about the module it answers.

        >>> memo = Memo(nn.Linear(2, 1))
        >>> memo("an answer", lambda: 42), memo("an answer", lambda: 43)
        (42, 42)
        """
        stamp = self.weights.stamp()
        if stamp != self._stamp:
            self._stamp, self._known = stamp, {}
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


def weight_digest(module: nn.Module) -> str:
    """Sixteen hex digits that identify a module's weights: every number of every entry of its state dict.

    >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> weight_digest(a) == weight_digest(a), weight_digest(a) == weight_digest(b)
    (True, False)
    """
    return Fingerprint(module).digest


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that add nothing to what it computes: torch.compile's, data-parallel ones, and peft's around a model whose
    adapters are in its layers (prompts and prefixes are put in by the wrapper, which then stays).
    """
    inner: Any = getattr(module, "_orig_mod", module)
    while isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = getattr(inner.module, "_orig_mod", inner.module)
    config = getattr(inner, "active_peft_config", None)
    if config is None or config.is_prompt_learning:
        return inner
    made: nn.Module = inner.get_base_model()
    return made


def switches(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """The settings of modules that hold parts by name and so may choose among them: which adapters are on, merged, how
    strong. Numbers, words and lists or dictionaries of them; empty for most models.

    >>> module = nn.Sequential(nn.ModuleDict({"a": nn.Identity()}))
    >>> module.active = ["a"]
    >>> switches(module)
    [('', {'active': ['a']})]
    """
    found = []
    for name, owner in module.named_modules():
        if any(isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and len(part) for part in owner._modules.values()):
            own = {k: v for k, v in vars(owner).items() if k != "training" and _is_setting(v)}
            found.append((name, own))
    return found


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(k, str) and _is_setting(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return isinstance(value, (bool, int, float, str))


def state(module: nn.Module) -> Hashable:
    """What stays equal while a module's own tensors and switches do."""
    keys = [_key(part) for t in (*module.parameters(), *module.buffers()) for _, part in _plain("", t)]
    return *keys, repr(switches(module))


def parts(module: nn.Module) -> list[nn.Module]:
    """The modules a module is built of, in order: quicker than `modules()`. What is built in twice comes twice."""
    found: list[nn.Module] = []
    queue = [module]
    while queue:
        found.append(queue.pop())
        queue.extend(child for child in found[-1]._modules.values() if child is not None)
    return found


def _own(owner: nn.Module) -> dict[str, Any]:
    """What a module itself saves. Not asked of the module where it has tensors of its own: bitsandbytes unpacks its
    4-bit weights to save them, and mixes up their scales.
    """
    kept: dict[str, Tensor] = {k: t for k, t in owner._parameters.items() if t is not None}
    kept |= {k: t for k, t in owner._buffers.items() if t is not None and k not in owner._non_persistent_buffers_set}
    if kept or type(owner)._save_to_state_dict is nn.Module._save_to_state_dict:
        return {k: part for name, t in kept.items() for k, part in ((name, t), *_beside(name, t))}
    made: dict[str, Any] = {}
    owner._save_to_state_dict(made, "", False)
    return made


def _beside(name: str, holder: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a quantised parameter carries along: its scales and codes."""
    if type(holder) in (Tensor, nn.Parameter):
        return
    for key, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
            yield from _beside(f"{name}.{key}", value)


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors an entry consists of: quantised ones are several, with settings beside them."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        parts, settings = value.__tensor_flatten__()
        yield from _plain(f"{name}.settings", settings)
        for part in parts:
            yield from _plain(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor) and value.is_quantized:
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scale = (value.q_per_channel_scales(), value.q_per_channel_zero_points()) if per_channel else value.q_scale()
        yield from _plain(f"{name}.scale", (scale, value.qscheme(), None if per_channel else value.q_zero_point()))
        yield name, value.int_repr()
    elif isinstance(value, Tensor):
        yield name, value.to_dense() if value.layout is not torch.strided else value
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _plain(f"{name}.{i}", part)
    else:
        yield f"{name} {value!r}", torch.empty(0)


def _key(t: Tensor) -> Hashable:
    """The same for the same tensor, unchanged. Storages are held weakly: their addresses are not given away meanwhile."""
    version = -1 if t.is_inference() else t._version
    where = StorageWeakRef(t.untyped_storage()) if t.numel() else None
    place = 0 if where is None or t.is_meta else t.data_ptr()
    return where, place, version, tuple(t.shape), t.stride(), t.dtype


def _numbers(t: Tensor) -> Tensor:
    """As integers of the same width."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().view(INTEGERS[t.element_size()])


def tensor_hash(t: Tensor) -> str:
    """Of a tensor's numbers; "" where there are none to read."""
    if t.is_meta or not t.numel():
        return ""
    x, found = _numbers(t).flatten(), hashlib.sha256()
    sums = []
    for part in x.split(CHUNK):
        rest = -len(part) % WIDTH
        part = part.to(torch.int64)
        part = torch.cat([part, part.new_zeros(rest)]) if rest else part
        sums.append((part.view(-1, WIDTH) * _factors(t.device)).sum(1))
    found.update(torch.cat(sums).cpu().numpy().astype("<i8").tobytes())
    return found.hexdigest()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd, so that no single change is lost, and drawn once: [1024]."""
    drawn = torch.randint(-(2**62), 2**62, (WIDTH,), generator=torch.Generator().manual_seed(0))
    return (2 * drawn + 1).to(device)


def _samples(tensors: list[Tensor]) -> list[int]:
    """One number for each tensor, of a sample of its numbers; one transfer for each device and dtype."""
    found: list[int] = [0] * len(tensors)
    waiting: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, t in enumerate(tensors):
        if t.numel() and not t.is_meta:
            places = _places(t.shape, t.device)
            if t.is_contiguous() and not t.is_complex():
                x = _numbers(t).take(places)
            else:
                x = _numbers(t[torch.unravel_index(places, t.shape)]).flatten()
            waiting.setdefault((t.device, x.dtype), []).append((i, x))
    for rows in waiting.values():
        numbers = torch.cat([x for _, x in rows]).cpu().numpy().astype("i8")
        lengths = [len(x) for _, x in rows]
        starts = np.cumsum([0, *lengths[:-1]])
        numbers *= 2 * (np.arange(len(numbers)) - np.repeat(starts, lengths)) + 1  # odd: no single change is lost
        for (i, _), value in zip(rows, np.add.reduceat(numbers, starts).tolist(), strict=True):
            found[i] = value
    return found


@functools.lru_cache(1024)
def _places(shape: torch.Size, device: torch.device) -> Tensor:
    """Flat indices that meet every row and every column of [..., row, column], up to 2,048 of each, spread evenly."""
    columns = shape[-1] if shape else 1
    rows = math.prod(shape) // columns
    n = min(max(rows, columns), SAMPLE)
    i = torch.arange(n, device=device)
    row, column = (i * many // n if many > n else i % many for many in (rows, columns))
    return row * columns + column
