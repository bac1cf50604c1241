"""What a comparison has done so far: one line of JSON per example and method, so that it goes on where it stopped, and with more
examples or methods.

The first line says what was asked; a file of another question is refused rather than mixed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pellucid.errors import InputError

Row = dict[str, Any]


class Rows:
    """Rows by (example, method), in memory and, with a path, in a file that is written as they come."""

    def __init__(self, path: str | Path | None, asked: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[tuple[str, str], Row] = {}
        asked = json.loads(json.dumps({"format": "pellucid-benchmark", "version": 1, **asked}))
        if self.path is None:
            return
        if not self.path.exists():
            self._write(asked)
            return
        with self.path.open(encoding="utf-8") as lines:
            kept = [row for line in lines if (row := _read(line)) is not None]
        if not kept or kept[0] != asked:
            parts = [k for k in asked if not kept or kept[0].get(k) != asked[k]]
            raise InputError(
                f"{str(self.path)!r} has rows of another question (other {', '.join(parts)}): name another file or remove it"
            )
        self.found = {(row["example"], row["method"]): row for row in kept[1:]}
        text = "".join(json.dumps(_plain(row)) + "\n" for row in [asked, *self.found.values()])
        self.path.write_text(text, encoding="utf-8")  # without a last line that an interruption cut short

    def add(self, row: Row) -> None:
        self.found[row["example"], row["method"]] = row
        if self.path is not None:
            self._write(row)

    def _write(self, row: Row) -> None:
        assert self.path is not None
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(_plain(row)) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from None


def _read(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return {k: _numbers(v) for k, v in row.items()} if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """NaN has no JSON: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """What stood for NaN, inside of measured values."""
    return {k: float("nan") if v is None else v for k, v in value.items()} if isinstance(value, dict) else value
