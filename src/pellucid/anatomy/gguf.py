"""A GGUF file as a checkpoint that transformers wrote: parsed and expanded once, kept, and opened like any other from then on.

Copies lie in `PELLUCID_CACHE`, or in `pellucid` in huggingface's cache folder (`HF_HOME`), under a name that follows from the
file's path, size, time and content. A copy is written beside its place and renamed, with the digests of its files in it: one
that is not whole is made again. `PELLUCID_CACHE=` (empty) keeps none; nor does a disk that is full or cannot be written to.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from transformers import modeling_gguf_pytorch_utils as reading

PARTS, PART = 16, 1 << 18  # pieces of a file that identify it, and their bytes
ROOM = 10  # a copy takes up to this many times the file: four bytes for each weight of four bits, and scales
ABOUT = "pellucid.json"
_lock = threading.RLock()


def place(path: Path) -> Path | None:
    """Where the copy of a file is kept, if copies are kept."""
    folder = os.environ.get("PELLUCID_CACHE")
    if folder == "":
        return None
    root = Path(folder).expanduser() if folder is not None else Path(constants.HF_HOME) / "pellucid"
    return root / "gguf" / f"{path.stem}-{_identity(path)}"


def _identity(path: Path) -> str:
    stat = path.stat()
    found = hashlib.sha256(f"1 {path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for i in range(PARTS):
            file.seek(i * max(0, stat.st_size - PART) // (PARTS - 1))
            found.update(file.read(PART))
    return found.hexdigest()[:16]


def kept(folder: Path) -> dict[str, Any] | None:
    """What a whole copy says about itself; None where there is none. What is left of a damaged one is removed."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        if all(_digest(folder / name) == digest for name, digest in about["files"].items()):
            return about
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(folder: Path, module: Any, tokenizer: Any, about: dict[str, Any]) -> bool:
    """Write a copy of an expanded model, whole or not at all; whether there is one now."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except OSError:
        return False
    try:
        module.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        files = {f.name: _digest(f) for f in part.iterdir() if f.is_file()}
        (part / ABOUT).write_text(json.dumps({**about, "files": files}))
        part.replace(folder)
    except OSError:  # a full disk; or another process was faster
        return kept(folder) is not None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def roomy(path: Path, folder: Path) -> bool:
    """Whether the disk has room for a copy."""
    there = next(p for p in folder.parents if p.exists())
    return shutil.disk_usage(there).free > ROOM * path.stat().st_size


def plain(module: Any) -> Any:
    """The expanded module without what marks it as packed, so that it can be saved: its weights are ordinary numbers."""
    for owner, name in ((module, "hf_quantizer"), (module.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    module.is_quantized, module.quantization_method = False, None
    return module


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """In here transformers, which reads a file for the config, the tokenizer and the weights in turn, parses it once."""
    import gguf

    class Reader(gguf.GGUFReader):
        """On a plain array: slices of a memory map cost five times as much, and there are a million of them."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, value: Any) -> None:
            self._bytes = np.asarray(value)

    parse: Callable[..., dict[str, Any]] = reading.load_gguf_checkpoint
    about = cache(lambda path: parse(path, return_tensors=False))

    def checkpoint(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
        return parse(path, return_tensors, **options) if return_tensors else copy.deepcopy(about(str(path)))

    new = {
        (gguf, "GGUFReader"): cache(Reader),
        (gguf, "get_tensor_name_map"): cache(gguf.get_tensor_name_map),
        (reading, "load_gguf_checkpoint"): checkpoint,
    }
    with _lock:
        old = {(owner, name): getattr(owner, name) for owner, name in new}
        try:
            for (owner, name), value in new.items():
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name), value in old.items():
                setattr(owner, name, value)
