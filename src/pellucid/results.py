"""What did a method find, and how was it found?

A `Result` is an xarray Dataset with named dimensions (layer, head, token ...) plus the `Provenance` that made
it. It selects, compares, turns into a data frame, shows itself in a terminal or notebook, and is saved to one
zip file that any language reads:

    result.json        kind, title, provenance; name, role, dims, dtype, shape and attrs of every variable;
    text arrays/<n>.npy     numbers, never pickled
"""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pellucid.errors import InputError, nearest

FORMAT = {"format": "pellucid-result", "version": 1}
SHOWN = 8  # rows of a printed table
Data = xr.Dataset | xr.DataArray


@cache
def _versions() -> dict[str, str]:
    """Those installed, read without importing anything heavy."""
    found = {}
    for package in ("pellucid", "torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def plain(value: Any) -> Any:
    """`value` as JSON has it: tuples become lists, arrays become their shape, anything else its text.

    >>> plain({"layers": (1, 2), "edit": np.zeros((2, 3)), "nan": float("nan")})
    {'layers': [1, 2], 'edit': 'float64[2, 3]', 'nan': 'nan'}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        items = [plain(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # numpy or torch, whole or too large to keep
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value)


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from: enough to run the method again and to see what differed.

    `inputs` (prompts as given) and `arguments` are plain JSON values (see `plain`); `created` is UTC in ISO 8601. `call` is
    the call as Python, `opened` what opens its model, `given` the arrays and long lists it was called with, and `free` the
    names that only the caller can fill; `pellucid.technique` writes them, and `code()` makes a program of them.

    >>> Provenance("logit_lens", model="gpt2", arguments={"layers": (0, 1)}).arguments
    {'layers': [0, 1]}
    """

    method: str
    model: str = ""
    revision: str | None = None
    digest: str | None = None
    inputs: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    call: str = ""
    opened: str = ""
    free: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # `call` names them by content

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "given":
                object.__setattr__(self, each.name, plain(getattr(self, each.name)))

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the arrays in `given`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "given"}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), allow_nan=False)

    def code(self, file: str = "result.zip") -> str:
        """A Python program that makes the result again; `file` is where it was saved. Empty where no call was recorded.

        >>> print(Provenance("ablation", opened="pl.load('gpt2')", call="pl.causal.ablation(model, 'Hi')").code())
        import pellucid as pl
        <BLANKLINE>
        model = pl.load('gpt2')
        result = pl.causal.ablation(model, 'Hi')
        """
        if not self.call:
            return ""
        needed = [
            n for n in ("functools", "importlib", "torch") if re.search(rf"(?<!\.)\b{n}\.", self.call + self.opened)
        ]
        lines = [*(f"import {name}" for name in needed), "import pellucid as pl", ""]
        lines += [f"# {name}: {what}" for name, what in self.free.items()]
        if self.given:
            lines.append(f"given = pl.results.Result.load({file!r}).provenance.given  # arrays that were passed")
        if self.opened:
            lines.append(f"model = {self.opened}")
        return "\n".join([*lines, f"result = {self.call}"])

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        return cls(**json.loads(text))

    def line(self) -> str:
        """One line: method, model, seed, version, time."""
        model = self.model + (f"@{self.revision}" if self.revision else "")
        digest = f"weights {self.digest[:12]}" if self.digest else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        version = f"pellucid {self.versions.get('pellucid', '')}".rstrip()
        return " · ".join(filter(None, (self.method, model, digest, seed, version, self.created)))


class Result:
    """Labelled arrays and their provenance. The first variable of `data` is the main one.

    `result.name` and `result["name"]` give a variable or coordinate as an xarray DataArray.

    >>> effect = xr.DataArray([0.1, -2.0], {"layer": [0, 1]}, name="effect")
    >>> Result(effect, kind="ablation", title="Layers").sel(layer=1).values.item()
    -2.0
    """

    def __init__(self, data: Data, *, kind: str, title: str = "", provenance: Provenance | None = None) -> None:
        if isinstance(data, xr.DataArray):
            data = data.to_dataset(name=str(data.name or "value"), promote_attrs=True)
        if not data.data_vars:
            raise InputError("a result needs at least one variable, got a dataset without any")
        self.data = data.copy(deep=False)
        self.data.attrs = plain(self.data.attrs)
        for variable in self.data.variables.values():
            variable.attrs = plain(variable.attrs)
        self.kind, self.title = kind, title or kind
        self.provenance = provenance or Provenance(kind)

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def main(self) -> xr.DataArray:
        """The first variable: what the method was asked for."""
        return next(iter(self.data.data_vars.values()))

    @property
    def values(self) -> np.ndarray:
        """The main variable as a numpy array, its axes in the order of `main.dims`."""
        return self.main.values

    @overload
    def __getitem__(self, name: str) -> xr.DataArray: ...
    @overload
    def __getitem__(self, name: int) -> Result: ...
    def __getitem__(self, name: str | int) -> xr.DataArray | Result:
        """A variable or coordinate by name, or what was found for one of several prompts by number."""
        if isinstance(name, int | np.integer):
            return self._of_prompt(int(name))
        if name not in self.data:
            raise InputError(f"this result has no {name!r}{nearest(name, map(str, self.data.variables))}")
        return self.data[name]

    @property
    def prompts(self) -> list[Result]:
        """One result for each prompt; of a single prompt the result itself."""
        return [self[i] for i in range(self.data.sizes["prompt"])] if "prompt" in self.data.dims else [self]

    def _of_prompt(self, i: int) -> Result:
        """As the method gives it for that prompt alone: without what longer prompts have more."""
        if "prompt" not in self.data.dims:
            raise InputError("this result is about one prompt: name a variable, such as result['score']")
        if "prompt" not in self.main.dims:  # it would stand beside one prompt's text as if it were that prompt's
            own = [str(name) for name, v in self.data.data_vars.items() if "prompt" in v.dims]
            raise InputError(
                f"{self.main.name!r} is of all {self.data.sizes['prompt']} prompts together: take {', '.join(own)} at prompt={i}, "
                "or ask about one prompt"
            )
        i = range(self.data.sizes["prompt"])[i]
        data = self.data.isel(prompt=i)
        sizes = {dim: int(data[f"n_{dim}"]) for dim in data.dims if f"n_{dim}" in data.coords}
        facts = {name: data[name].item() for name in data.attrs.get("of_each_prompt", ()) if data[name].item() != ""}
        drop = [n for n in ("prompt", "text_of_prompt", *data.attrs.get("of_each_prompt", ())) if n in data.coords]
        data = data.isel({dim: slice(n) for dim, n in sizes.items()}).drop_vars([*drop, *(f"n_{dim}" for dim in sizes)])
        title = facts.pop("title", self.title)
        data.attrs = {**{k: v for k, v in data.attrs.items() if k != "of_each_prompt"}, **facts}
        made = replace(self.provenance, call=self.provenance.call and f"{self.provenance.call}[{i}]")
        return Result(data, kind=self.kind, title=title, provenance=made)

    def __getattr__(self, name: str) -> xr.DataArray:
        if name.startswith("_") or name == "data":  # copy and pickle ask before `data` is there
            raise AttributeError(name)
        try:
            return self[name]
        except InputError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(str, self.data.variables)]

    def sel(self, **labels: Any) -> Result:
        """The same result at some labels: `sel(layer=3, head=[1, 2])`. InputError for an unknown one."""
        for dim in labels.keys() - set(self.data.dims):
            raise InputError(f"no dimension {dim!r} in this result{nearest(dim, map(str, self.data.dims))}")
        try:
            chosen = self.data.sel(labels)
        except (KeyError, IndexError):
            known = {dim: self.data[dim].values[:8].tolist() for dim in labels}
            raise InputError(f"no {labels} in this result, whose labels begin {known}") from None
        return Result(chosen, kind=self.kind, title=self.title, provenance=self.provenance)

    def to_frame(self, *variables: str) -> pd.DataFrame:
        """A tidy frame: one row per cell, one column per dimension, per coordinate along them, and per variable.

        By default the table of the main variable, with what else lies along its dimensions; name others (the values of
        single prompts, say) to see them instead. Named variables with fewer dimensions are repeated along the others;
        InputError if no variable spans all.
        """
        data = self.data[[self[name].name for name in variables] or self._beside()]
        if not any(set(data.dims) == set(variable.dims) for variable in data.data_vars.values()):
            shapes = ", ".join(f"{name} {variable.dims}" for name, variable in data.data_vars.items())
            raise InputError(f"these share no table, so name those you want in to_frame(...): {shapes}")
        if not data.dims:
            return pd.DataFrame([{name: value.values.item() for name, value in data.variables.items()}])
        return data.to_dataframe().reset_index()

    def _beside(self) -> list[str]:
        """The variables of the main one's table: those that lie along its dimensions."""
        return [str(name) for name, v in self.data.data_vars.items() if set(v.dims) <= set(self.main.dims)]

    def top(self, n: int = 8) -> pd.DataFrame:
        """The `n` cells of the main variable largest in size (or its first ones, where it is no number), as `to_frame`."""
        flat = self.values.ravel()
        order = np.arange(flat.size)[:n]
        if flat.dtype.kind in "iufc" and n > 0:
            size = np.nan_to_num(np.abs(flat).astype(float), nan=-1.0)
            order = np.argpartition(-size, n)[:n] if n < size.size else np.arange(size.size)
            order = order[np.argsort(-size[order], kind="stable")]
        return self._rows(order)

    def _rows(self, order: np.ndarray) -> pd.DataFrame:
        """Cells of the main variable by their place in it, in this order."""
        index = np.unravel_index(order, self.main.shape) if self.main.ndim else ()
        cells = {dim: xr.DataArray(i, dims="_cell") for dim, i in zip(self.main.dims, index, strict=True)}
        along = self._beside()
        picked = Result(self.data[along].isel(cells), kind=self.kind).to_frame()
        for dim, i in cells.items():
            if dim not in picked:
                picked.insert(0, dim, i)
        labels = [str(name) for name, c in self.data[along].coords.items() if name not in self.main.dims and c.ndim]
        return picked[[*self.main.dims, *labels, *along]]

    # -- comparing -------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Same data (NaN equals NaN), labels, kind, title, and provenance except its time."""
        if not isinstance(other, Result):
            return NotImplemented
        return (
            (self.kind, self.title) == (other.kind, other.title)
            and replace(self.provenance, created="") == replace(other.provenance, created="")
            and self.data.identical(other.data)
        )

    def equals(self, other: Result) -> bool:
        return self == other

    def allclose(self, other: Result, atol: float = 1e-6) -> bool:
        """Same variables and labels, and no number further apart than `atol`; provenance is not compared."""
        try:
            xr.testing.assert_allclose(self.data, other.data, rtol=0.0, atol=atol)
        except AssertionError:
            return False
        return True

    # -- showing ---------------------------------------------------------------------------------------

    def _heading(self) -> str:
        sizes = ", ".join(f"{dim} {size}" for dim, size in self.data.sizes.items()) or "a single value"
        shown = f"; the {SHOWN} largest of {self.main.size}" if self.main.size > SHOWN else ""
        return f"{self.kind}: {', '.join(map(str, self.data.data_vars))} over {sizes}{shown}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """A small table in its own order, of a large one what is largest; what is the same for all cells is left out."""
        frame = self.top(SHOWN) if self.main.size > SHOWN else self._rows(np.arange(self.main.size))
        if self.main.ndim:
            frame = frame[[n for n in frame if n in self.main.dims or self.data[n].ndim]]
            names_of_layers = [
                n for n in frame if n != "layer" and n in self.data.coords and self.data[n].dims == ("layer",)
            ]
            frame = frame.drop(columns=names_of_layers)
        rows = [[_show(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
        return [str(column) for column in frame.columns], rows

    def _constants(self) -> str:
        """What has one value for the whole table."""
        single = {k: v.values.item() for k, v in self.data.variables.items() if not v.ndim} if self.main.ndim else {}
        return ", ".join(f"{name} {_show(value)}" for name, value in single.items())

    def __rich__(self) -> Group:
        columns, rows = self._cells()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            table.add_column(Text(name), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        heading, source = (Text(text, style="dim") for text in (self._heading(), self.provenance.line()))
        constants = [Text(text)] if (text := self._constants()) else []
        return Group(Text(self.title, style="bold"), heading, table, *constants, source)

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        return str(_views().output(self))

    def show(self) -> None:
        """Print to the terminal, or show the interactive view in the notebook this runs in."""
        notebook = _notebook()
        if notebook is not None:
            notebook.display(self)
            return
        from rich import print

        print(self)

    def save_html(self, path: str | Path, *more: Any, title: str = "") -> Path:
        """Write one file that shows this result (and `more`) anywhere, without a network; returns its path.

        Views in one file follow one another: what is selected in one is selected in all.
        """
        return Path(_views().save_html(path, self, *more, title=title))

    def plot(self, ax: Any = None, *, choice: str | None = None) -> Any:
        """Draw the view of this result on matplotlib axes (`ax`, or new ones) and return them; see `pellucid.views.plot`."""
        return _views().plot(self, ax, choice=choice)

    # -- keeping ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one zip file (format above) and return its path. InputError for arrays of Python objects."""
        arrays: dict[str, bytes] = {}
        data = self.data.to_dict(data=False)
        for name, entry in [*data["coords"].items(), *data["data_vars"].items()]:
            entry["data"] = _pack(name, self.data[name].values, arrays)
        given = {name: _pack_given(value, arrays) for name, value in self.provenance.given.items()}
        made = {**self.provenance.as_dict(), "given": given}
        about = {**FORMAT, "kind": self.kind, "title": self.title, "provenance": made}
        text = json.dumps({**about, "data": data}, allow_nan=False, indent=1)
        try:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in {"result.json": text.encode(), **arrays}.items():
                    # ZipInfo has a fixed date, so that the same result gives the same bytes
                    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise InputError(f"cannot save a result to {str(path)!r}: {error.strerror or error}") from None
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote. InputError if the file is missing, damaged, or made by something else."""
        try:
            with zipfile.ZipFile(path) as archive:
                about = json.loads(archive.read("result.json"))
                if {key: about.get(key) for key in FORMAT} != FORMAT:
                    raise ValueError(f"its format is not {FORMAT}")
                for entry in [*about["data"]["coords"].values(), *about["data"]["data_vars"].values()]:
                    entry["data"] = _unpack(archive, entry)
                given = about["provenance"].get("given", {})
                given = {name: _unpack_given(archive, value) for name, value in given.items()}
            data = xr.Dataset.from_dict(about["data"])
            provenance = Provenance(**{**about["provenance"], "given": given})
            return cls(data, kind=about["kind"], title=about["title"], provenance=provenance)
        except OSError as error:
            raise InputError(f"cannot read a result from {str(path)!r}: {error.strerror or error}") from None
        except Exception as error:  # a damaged or foreign archive, JSON text or array fails in many ways
            raise InputError(f"{str(path)!r} is no readable pellucid result ({error}); save it anew") from None


def _views() -> Any:
    """The view library: it stands above results, which therefore only know it by name."""
    return importlib.import_module("pellucid.views")


def _notebook() -> Any:
    """IPython's display module where this runs in a notebook, else None."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return importlib.import_module("IPython.display") if running is not None and hasattr(running, "kernel") else None


def _pack(name: str, values: np.ndarray, arrays: dict[str, bytes]) -> list[Any] | str:
    """Text as a flat list; anything else as the name of a .npy file that is added to `arrays`."""
    if values.dtype.kind in "OU":
        text = [None if item != item else item for item in values.ravel().tolist()]  # NaN marks missing text
        if not all(item is None or isinstance(item, str | bool | int) for item in text):
            raise InputError(f"cannot save {name!r}: it holds Python objects; make them numbers or text")
        return text
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    file = f"arrays/{len(arrays)}.npy"
    arrays[file] = buffer.getvalue()
    return file


def _pack_given(value: Any, arrays: dict[str, bytes]) -> Any:
    """An array that was passed as the name of its file, a list as itself."""
    return (
        {"array": _pack("given", value, arrays)} if isinstance(value, np.ndarray) and value.dtype.kind != "U" else value
    )


def _unpack_given(archive: zipfile.ZipFile, value: Any) -> Any:
    return _unpack(archive, {"data": value["array"]}) if isinstance(value, dict) else value


def _unpack(archive: zipfile.ZipFile, entry: Mapping[str, Any]) -> np.ndarray:
    if isinstance(entry["data"], list):
        return np.array(entry["data"], dtype=entry["dtype"]).reshape(entry["shape"])
    # read() has checked the archive's checksum before numpy sees a byte
    return np.load(io.BytesIO(archive.read(entry["data"])), allow_pickle=False)


def _show(cell: Any) -> str:
    """One table cell; text with outer spaces or control characters is quoted: ' Paris' is not 'Paris'."""
    if isinstance(cell, float | np.floating):
        return f"{cell:.4g}"
    text = str(cell)
    return text if text.isprintable() and text == text.strip() and text else repr(text)
