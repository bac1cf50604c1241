from __future__ import annotations

import importlib

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost is measured by one turn."""
    monkeypatch.setattr(importlib.import_module("pellucid.tuning.fit"), "TURNS", 1)
