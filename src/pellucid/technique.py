"""How is a thing made again? The record of a call: its arguments as code, the model, its weights and the seed.

`@technique` stands on every public function or method that gives a result or a fitted thing. It binds the signature,
writes each argument as the expression that makes it, and stamps what comes back:

    a Result          gets its `Provenance`; `result.provenance.code()` is a program that gives the same numbers
    anything else     remembers the call (`made`), so that a result computed from it can print it

How values are written: plain ones as Python has them; sites, edits, metrics and every dataclass as the call that makes
them; prompts as texts; a fitted thing, a result or a run as the call that made it. Arrays and long lists are kept beside
the result (`given`), and the program looks them up there. What has no text (a lambda, a generator, a module in memory) is
a free name of the program, said in a comment.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.modes import running
from pellucid.anatomy.sites import Site
from pellucid.engine.generation import Generated
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import fitted
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks import Prompts

P = ParamSpec("P")
R = TypeVar("R")
INLINE, LONG, KEPT = 8, 2_000, 1 << 26  # numbers written out; characters of a list written out; bytes kept at most
_settled: ContextVar[dict[str, Any] | None] = ContextVar("settled", default=None)


@dataclass
class Program:
    """An expression, the model it calls `model`, the values it looks up in `given`, and the names it leaves open."""

    call: str = ""
    model: Model | None = None
    given: dict[str, Any] = field(default_factory=dict)
    free: dict[str, str] = field(default_factory=dict)

    def write(self, value: Any, name: str) -> str:
        """The expression that makes `value`; `name` is what it is called where there is none."""
        known = made(value)
        return self._write(value, name) if known is None else self._nested(known, value, name)

    @functools.singledispatchmethod
    def _write(self, value: Any, name: str) -> str:
        if isinstance(value, type) or inspect.isroutine(value):
            return address(value) or self._leave(value, name)
        if (text := repr(value)).startswith("pl."):  # a value that prints as the code that makes it
            return text
        if dataclasses.is_dataclass(value) and not getattr(value, "state_", None):  # what it learnt is in no call
            return self.built(value, name)
        return self._leave(value, name)

    def _leave(self, value: Any, name: str) -> str:
        self.free[name] = "a function of yours" if callable(value) else f"the {type(value).__name__} you gave"
        return name

    def _keep(self, value: Any, name: str, content: bytes) -> str:
        key = f"{name}-{hashlib.sha256(content).hexdigest()[:6]}"  # programs within programs do not collide
        self.given[key] = value
        return f"given[{key!r}]"

    # ---- one form for each kind of value

    @_write.register(bool | int | str | bytes | range | None)
    def _literal(self, value: Any, name: str) -> str:
        return repr(value)

    @_write.register
    def _float(self, value: float, name: str) -> str:
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"

    @_write.register
    def _number(self, value: np.generic, name: str) -> str:
        return self.write(value.item(), name)

    @_write.register(Path | Site | torch.device)
    def _named(self, value: Any, name: str) -> str:
        return repr(str(value))

    @_write.register
    def _dtype(self, value: torch.dtype, name: str) -> str:
        return str(value)

    @_write.register
    def _slice(self, value: slice, name: str) -> str:
        return f"slice({value.start!r}, {value.stop!r}, {value.step!r})"

    @_write.register
    def _tensor(self, value: Tensor, name: str) -> str:
        narrow = value.detach().cpu()
        if narrow.numel() < INLINE:
            return f"torch.tensor({narrow.tolist()!r}, dtype={value.dtype})"
        wide = narrow.float() if narrow.dtype == torch.bfloat16 else narrow
        text = self._array(wide.numpy(), name)
        return f"torch.as_tensor({text}, dtype={value.dtype})" if text.startswith("given[") else text

    @_write.register
    def _array(self, value: np.ndarray, name: str) -> str:
        if value.dtype.kind == "U":
            return self.write(value.tolist(), name)
        if value.dtype == object or value.nbytes > KEPT:
            return self._leave(value, name)
        return self._keep(value, name, np.ascontiguousarray(value).tobytes())

    @_write.register(list | tuple | set | frozenset)
    def _several(self, value: Any, name: str) -> str:
        words = [self.write(item, name) for item in value]
        text = ", ".join(words)
        if isinstance(value, list) and len(text) > LONG and _plain(value):
            return self._keep(value, name, text.encode())
        if isinstance(value, tuple):
            return f"({text},)" if len(words) == 1 else f"({text})"
        return f"[{text}]" if isinstance(value, list) else f"{type(value).__name__}([{', '.join(sorted(words))}])"

    @_write.register
    def _mapping(self, value: Mapping, name: str) -> str:
        each = (f"{self.write(k, name)}: {self.write(v, k if _identifier(k) else name)}" for k, v in value.items())
        return f"{{{', '.join(each)}}}"

    @_write.register
    def _partial(self, value: functools.partial, name: str) -> str:
        words = [self.write(each, name) for each in (value.func, *value.args)]
        return (
            f"functools.partial({', '.join([*words, *(f'{k}={self.write(v, k)}' for k, v in value.keywords.items())])})"
        )

    @_write.register
    def _opened(self, value: Model, name: str) -> str:
        self.model = self.model or value
        if value is self.model:
            return "model"
        before, after = self.model.loaded.changes, value.loaded.changes
        both = [{p.data_ptr() for p in m.module.parameters()} for m in (self.model, value)]
        if after[: len(before)] == before and both[0] & both[1]:  # made of that one
            return f"model.changed({self.write(list(after[len(before) :]), 'changes')})"
        return self.opening(value) if value.named else self._leave(value, name)

    def opening(self, model: Model) -> str:
        """What opens a model, and changes it."""
        changes = list(model.loaded.changes)
        return f"{model.opened}.changed({self.write(changes, 'changes')})" if changes else model.opened

    @_write.register
    def _inputs(self, value: Inputs, name: str) -> str:
        """By its texts where this model's tokenizer gives these very tensors for them, else by its tensors."""
        first = value.streams.get("encoder", value.stream(""))
        spans = f", spans={self.write(dict(first.spans), 'spans')}" if first.spans else ""
        if self.model is not None and self.model.tokenizer is not None:
            with suppress(Exception):  # a prompt that was given as ids need not be one as text
                again = self.model.inputs(list(value.texts)).tensors
                if again.keys() == value.tensors.keys() and all(_same(again[k], v) for k, v in value.tensors.items()):
                    return f"model.inputs({self.write(list(value.texts), name)}{spans})"
        tensors = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in value.tensors.items()}
        return f"model.inputs({self.write(tensors, name)}{spans})"

    @_write.register
    def _run(self, value: Run, name: str) -> str:
        if self.model is not None and value.anatomy is not self.model.anatomy:
            return self._leave(value, name)  # of another model
        edits = f", edits={self.write(list(value.edits), name)}" if value.edits else ""
        return f"model.run({self.write(value.inputs, name)}, keep={self.write(list(value.sites), name)}{edits})"

    @_write.register
    def _generated(self, value: Generated, name: str) -> str:
        if value.model is None or (self.model is not None and value.model is not self.model):
            return self._leave(value, name)
        self.model = value.model
        defaults = {k: p.default for k, p in inspect.signature(Model.generate).parameters.items()}
        given = {
            k: v
            for k, v in value.call.items()
            if k == "prompt" or (not _same(v, defaults.get(k)) and v not in ([], ()))
        }
        words = [self.write(given.pop("prompt"), "prompt"), *(f"{k}={self.write(v, k)}" for k, v in given.items())]
        return f"model.generate({', '.join(words)})"

    def built(self, value: Any, name: str) -> str:
        """A dataclass as the call of its class, with what differs from the defaults."""
        home = address(type(value))
        if home is None:
            return self._leave(value, name)
        words = []
        for each in dataclasses.fields(value):
            default = each.default
            if each.default_factory is not dataclasses.MISSING:
                default = each.default_factory()
            if each.init and not _same(getattr(value, each.name), default):
                words.append(f"{each.name}={self.write(getattr(value, each.name), each.name)}")
        return f"{home}({', '.join(words)})"

    def _nested(self, known: Program, value: Any, name: str) -> str:
        if self.model is not None and known.model is not None and known.model is not self.model:
            return self._leave(value, name)  # two models cannot both be `model`
        self.model = self.model or known.model
        self.given |= known.given
        self.free |= known.free
        return known.call


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    with suppress(Exception):  # arrays and frames have no single answer
        return type(a) is type(b) and bool(a == b)
    return False


def _identifier(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _plain(value: Any) -> bool:
    """Whether JSON has it as it is."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def address(thing: Any) -> str | None:
    """`pl.causal.patching`, or by the module's own path: the name that leads back to `thing`; None where none does."""
    names, packages = thing.__qualname__.split("."), thing.__module__.split(".")
    if not all(map(str.isidentifier, names)) or packages == ["__main__"]:
        return None
    if packages == ["builtins"]:
        return str(thing.__qualname__)

    def leads(module: str) -> bool:
        found: Any = sys.modules.get(module)
        for name in names:
            found = getattr(found, name, None)
        return (
            inspect.unwrap(getattr(found, "__func__", found)) is inspect.unwrap(thing) if found is not None else False
        )

    module = ".".join(packages)
    if packages[0] == "pellucid":
        for i in range(1, len(packages) + 1):  # as short as it goes: a method's folder gives its public name
            home = ".".join(packages[:i])
            if leads(home) and _reached(packages[:i]) is sys.modules[home]:
                return ".".join(["pl", *packages[1:i], *names])
    return f"importlib.import_module({module!r}).{'.'.join(names)}" if leads(module) else None


def _reached(packages: list[str]) -> Any:
    """The module by attributes from `pellucid`: a function may hide the module of its name."""
    found: Any = sys.modules["pellucid"]
    for name in packages[1:]:
        found = getattr(found, name, None)
    return found


# ---- recording calls


def made(thing: Any) -> Program | None:
    """The call that made a thing: a fitted one, a circuit, a metric, a result."""
    known = getattr(thing, "__dict__", {}).get("_made")
    return known if isinstance(known, Program) else None


def settle(**found: Any) -> None:
    """Say what an argument that was left open turned out to be: the predicted answer, the layer that was chosen."""
    settled = _settled.get()
    if settled is not None:
        for name, value in found.items():
            settled.setdefault(name, value)


@contextmanager
def settling(found: dict[str, Any]) -> Iterator[None]:
    """What is settled inside is told to `found` alone: one of several questions asked in a call."""
    token = _settled.set(found)
    try:
        yield
    finally:
        _settled.reset(token)


def technique(function: Callable[P, R]) -> Callable[P, R]:
    """Record every call of a public function or method on what it returns (Results in tuples, lists and mappings too).

    Calls inside a recorded call are part of it, and are not recorded on their own. A call computes in evaluation mode and
    without a graph, whatever the user's modes are (`anatomy.modes.running`): what needs gradients enables them inside.
    Options of plain kinds are checked first (`pellucid.errors.fitted`): a technique need only say which numbers make sense.

    >>> import xarray as xr
    >>> from pellucid.results import Result
    >>> @technique
    ... def half(x: float, of: str = "all") -> Result:
    ...     return Result(xr.DataArray(x / 2), kind="half")
    >>> half(3.0).provenance.arguments
    {'x': 3.0, 'of': 'all'}
    """
    signature = inspect.signature(function)
    annotations = {name: each.annotation for name, each in signature.parameters.items()}

    @functools.wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
        if _settled.get() is not None:
            return function(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        bound.arguments.update(fitted(function, annotations, bound.arguments))
        call = _Call.of(recorded, bound)  # before anything is consumed or changed
        token = _settled.set({})
        models = [v for v in bound.arguments.values() if isinstance(v, Model)]
        try:
            with running(*(model.module for model in models)):
                result = function(*bound.args, **bound.kwargs)
            call.arguments.update({k: v for k, v in (_settled.get() or {}).items() if call.arguments.get(k) is None})
        finally:
            _settled.reset(token)
        call.stamp(result)
        return result

    return recorded


@dataclass
class _Call:
    """A call as text: its program, all arguments by name (plain ones as they are, others as code), and what was asked."""

    method: str
    program: Program
    arguments: dict[str, Any]
    inputs: Any

    @classmethod
    def of(cls, function: Any, bound: inspect.BoundArguments) -> _Call:
        program, explicit = Program(), set(bound.arguments)
        bound.apply_defaults()
        given = dict(bound.arguments)
        program.model = next((v for v in given.values() if isinstance(v, Model)), None)
        owner = next((given.pop(k) for k in ("self", "cls") if k in given), None)
        arguments: dict[str, Any] = {}
        words: list[str] = []
        positional = True
        for key, value in given.items():
            kind = bound.signature.parameters[key].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                words += [program.write(each, key) for each in value]
            elif kind is inspect.Parameter.VAR_KEYWORD:
                words += [f"{k}={program.write(v, k)}" for k, v in value.items()]
            elif key in explicit:
                positional = positional and kind is not inspect.Parameter.KEYWORD_ONLY
                text = program.write(value, key)
                words.append(text if positional else f"{key}={text}")
                arguments[key] = value if _plain(value) else text
            else:
                positional = False
                arguments[key] = value if _plain(value) else Program(model=program.model).write(value, key)
        name = function.__name__
        if owner is None:
            home = address(function) or name
        elif isinstance(owner, type):
            home = f"{address(owner)}.{name}"
        else:  # fitting again starts from the settings
            made_by = program.built if name == "fit" and dataclasses.is_dataclass(owner) else program.write
            home = f"{made_by(owner, type(owner).__name__.lower())}.{name}"
        program.call = f"{home}({', '.join(words)})"
        asked = {k: texts for k, v in given.items() if (texts := _texts(k, v)) is not None}
        arguments = {k: v for k, v in arguments.items() if k != "model"}
        inputs = next(iter(asked.values())) if len(asked) == 1 else asked or None
        return cls(function.__qualname__, program, arguments, inputs)

    def stamp(self, result: Any) -> None:
        if isinstance(result, list | tuple | Mapping):
            parts = result.items() if isinstance(result, Mapping) else enumerate(result)
            for key, part in parts:
                program = dataclasses.replace(self.program, call=f"{self.program.call}[{key!r}]")
                dataclasses.replace(self, program=program).stamp(part)
            return
        if isinstance(getattr(result, "provenance", None), Provenance):  # a result, a circuit
            made = self._provenance()
            object.__setattr__(result, "provenance", made)
            if isinstance(getattr(result, "title", None), str):
                result.title = result.title.replace(made.model, called(made.model))
        with suppress(AttributeError, TypeError):  # numbers, text and objects with slots remember nothing
            object.__setattr__(result, "_made", self.program)
        if dataclasses.is_dataclass(result):  # what a fitted thing has found: `fit(...).result_`
            for name, part in vars(result).items():
                if isinstance(getattr(part, "provenance", None), Provenance) and not part.provenance.call:
                    program = dataclasses.replace(self.program, call=f"{self.program.call}.{name}")
                    dataclasses.replace(self, program=program).stamp(part)

    def _provenance(self) -> Provenance:
        model, program = self.program.model, self.program
        return Provenance(
            self.method,
            model="" if model is None else model.name,
            revision=None if model is None else model.loaded.revision,
            digest=None if model is None else model.digest,
            inputs=self.inputs,
            arguments={k: v for k, v in self.arguments.items() if k != "seed"},
            seed=self.arguments.get("seed"),
            call=program.call,
            opened="" if model is None else program.opening(model),
            given=program.given,
            free=program.free,
        )


def generation(made: Generated) -> Result:
    """What was generated as a result, dims (row, step): the log-probability of each token, what fired, was recorded and kept."""
    frame: dict[str, Any] = {"log_probability": (("row", "step"), made.log_probabilities.float().cpu().numpy())}
    frame["id"] = ("row", "step"), made.tokens.cpu().numpy()
    for name, values in {**{f"{n} fired": x for n, x in made.fired.items()}, **made.records}.items():
        inner = tuple(f"{name}_{i}" for i in range(values.ndim - 2))
        name = f"{name} recorded" if name in ("token", "text", "prompt", "ended", "because") else name
        frame[name] = (
            ("row", "step", *inner),
            values.cpu().float().numpy() if values.dtype != torch.bool else values.cpu().numpy(),
        )
    sites = [*(made.steps.sites if made.steps else ()), *(made.prompt.sites if made.prompt else ())]
    for site in sites:
        data = made[site].drop_vars("token", errors="ignore")
        of = {d: f"{site} {d}" for d in data.dims if d not in ("batch", "step")}  # two sites may differ in size
        frame[str(site)] = data.rename({"batch": "row"} | of if "batch" in data.dims else of).variable
    texts = [[*row, *[""] * (made.tokens.shape[1] - len(row))] for row in made.labels]
    about = {"text": made.texts, "prompt": made.prompts, "ended": made.ended, "because": made.because}
    coords: dict[str, Any] = {"token": (("row", "step"), np.array(texts, dtype=str).reshape(made.tokens.shape))}
    coords |= {k: ("row", np.array(v, dtype=str)) for k, v in about.items()}
    return Result(
        xr.Dataset(frame, coords=coords),
        kind="generation",
        title=f"What {called(made.model.name)} wrote",
        provenance=of_generation(made, "result"),
    )


def called(model: str) -> str:
    """A model's name as titles say it: a local file's own, without all directories above it.

    >>> called("/home/me/models/small.gguf"), called("gpt2")
    ('small.gguf', 'gpt2')
    """
    return Path(model).name if model.startswith("/") else model


def of_generation(made: Generated, name: str) -> Provenance:
    """Where what a generation gives by a `name` comes from."""
    program = Program(model=made.model)
    program.call = f"{program.write(made, 'generated')}.{name}"
    arguments = {k: v if _plain(v) else program.write(v, k) for k, v in made.call.items() if k != "prompt"}
    return _Call("generate", program, arguments, list(made.prompts))._provenance()


def _texts(key: str, value: Any) -> Any:
    """The prompts an argument brings, as they were given."""
    if isinstance(value, Inputs):
        return list(value.texts)
    if isinstance(value, Prompts):
        return {"clean": value.clean, "corrupted": value.corrupted}
    if key in ("prompt", "prompts", "clean", "corrupted", "text", "texts"):
        return value if isinstance(value, list) and _plain(value) else [value] if isinstance(value, str) else None
    return None
