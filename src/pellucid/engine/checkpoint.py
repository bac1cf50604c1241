"""What is done, kept in a file: tensors with what they are about, and the scores of a sweep; and a fingerprint that tells
whether a file belongs to the sweep at hand.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.errors import InputError


def fingerprint(*values: Any) -> str:
    """A digest of values: tensors by their numbers, functions by their code and what they close over.

    >>> fingerprint(torch.ones(2), "a") == fingerprint(torch.ones(2), "a") != fingerprint(torch.zeros(2), "a")
    True
    """
    digest = hashlib.sha256()
    for piece in _pieces(values, {}):
        digest.update(piece)
        digest.update(b"|")
    return digest.hexdigest()


def _pieces(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    if value is None or isinstance(value, (str, int, float)):
        yield repr(value).encode()
        return
    if id(value) in seen:  # a reference run serves thousands of variants
        yield f"#{seen[id(value)][0]}".encode()
        return
    seen[id(value)] = len(seen), value  # the value too: its id must not be given to another
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        yield from (p for v in value for p in _pieces(v, seen))
    elif isinstance(value, dict):
        yield from (p for item in value.items() for p in _pieces(item, seen))
    elif isinstance(value, partial):
        yield from _pieces((value.func, value.args, value.keywords), seen)
    elif is_dataclass(value):
        yield type(value).__qualname__.encode()
        yield from (p for f in fields(value) for p in _pieces(getattr(value, f.name), seen))
    elif hasattr(value, "kept") and hasattr(value, "inputs"):  # a run: what it kept
        yield from _pieces(list(value.kept.values()), seen)
    elif hasattr(value, "__code__"):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        yield from _pieces((value.__code__, cells, value.__defaults__, value.__kwdefaults__), seen)
    elif hasattr(value, "co_code"):
        yield f"{value.co_name}{value.co_names}".encode() + value.co_code
        yield from _pieces(value.co_consts, seen)
    else:
        yield f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}".encode()


def write_tensors(path: str | Path, key: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """One safetensors file, with `about` as JSON in its metadata; nothing in it is code. A file of the name stays whole until the
    new one is."""
    path = Path(path)
    kept = {name: value.detach().contiguous() for name, value in tensors.items()}
    part = path.with_name(path.name + ".part")
    save_file(kept, str(part), {key: json.dumps(dict(about))})
    return part.replace(path)


@contextmanager
def reading_tensors(path: str | Path, key: str, said: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What `write_tensors` wrote, (about, tensors); InputError, which says `said`, for a file of anything else, also where the
    body of the `with` finds in it what it cannot use.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})[key])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        yield about, tensors
    except (OSError, KeyError, ValueError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} {said}") from error


class Checkpoint:
    """Scores [variant, batch] of a sweep in a file, written after every batch of variants."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def load(self, clean: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scores and which variants are done [variant]; None if there is no file. InputError if it holds another sweep.

        `clean` [batch] are the scores without edits: another model would give others.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as saved:
                key, old = str(saved["key"]), torch.from_numpy(saved["clean"])
                values, done = torch.from_numpy(saved["values"]), torch.from_numpy(saved["done"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} is no checkpoint of a sweep: delete it or name another file") from error
        if key != self.key or not torch.allclose(old, clean.to(old), rtol=1e-3, atol=1e-3, equal_nan=True):
            raise InputError(
                f"{self.path} holds another sweep (other edits, prompts, metric or model): name another file"
            )
        return values, done

    def save(self, values: Tensor, done: Tensor, clean: Tensor) -> None:
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            np.savez(file, key=self.key, values=values.numpy(), done=done.numpy(), clean=clean.cpu().numpy())
        part.replace(self.path)
