"""`pellucid doctor`: what is here to work with? Versions, devices, memory, extras; what a bug report needs."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import typer

from pellucid.cli import files


def doctor(as_json: files.Json = False) -> None:
    """Say which versions, devices, memory and extras there are, and what is lacking for what."""
    found = examined()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        typer.echo(f"{name}:")
        for key, each in value.items():
            typer.echo(f"  {key:<14} {each}")


def examined() -> dict[str, dict[str, Any]]:
    """By topic; everything as plain values."""
    return {"versions": _versions(), "machine": _machine(), "extras": _extras()}


def _versions() -> dict[str, str]:
    """What pellucid rests on, with a word where it is older than it may be."""
    from packaging.requirements import Requirement

    made = {"python": platform.python_version(), "pellucid": metadata.version("pellucid")}
    for text in metadata.requires("pellucid") or ():
        need = Requirement(text)
        if need.marker is not None:
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            made[need.name] = f"not installed: needs {need.specifier}"
            continue
        made[need.name] = have if need.specifier.contains(have, prereleases=True) else f"{have}: needs {need.specifier}"
    return made


def _machine() -> dict[str, Any]:
    import torch

    made: dict[str, Any] = {
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
    if (memory := _memory()) is not None:
        made["memory"] = f"{memory / 2**30:.1f} GiB"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        made[f"cuda:{i}"] = f"{about.name}, {about.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        made["mps"] = "available"
    if not {"cuda:0", "mps"} & made.keys():
        made["accelerator"] = "none: models run on the processor"
    made["disk"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    return made


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def _extras() -> dict[str, str]:
    """Each optional set of packages: there, or how to have it."""
    made = {}
    lacking: dict[str, list[str]] = {}
    for text in metadata.requires("pellucid") or ():
        if (extra := re.search(r"extra == ['\"]([\w-]+)['\"]", text)) is None or extra[1] in ("dev", "test", "docs"):
            continue
        name = re.split(r"[\s\[<>=!~;]", text)[0]
        lacking.setdefault(extra[1], [])
        if not _installed(name):
            lacking[extra[1]].append(name)
    for extra_name, missing in sorted(lacking.items()):
        how = f"pip install 'pellucid[{extra_name}]'"
        made[extra_name] = f"lacks {', '.join(missing)}: {how}" if missing else "ready"
    return made


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return find_spec(package.replace("-", "_")) is not None
    return True
