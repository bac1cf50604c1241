"""The two really trained models of the tests: where they are, and each opened once."""

from __future__ import annotations

from functools import cache

import pellucid as pl
from scripts.demo_model import minilm as minilm_path
from scripts.demo_model import smollm2 as smollm2_path

__all__ = ["minilm", "minilm_path", "smollm2", "smollm2_path"]


@cache
def smollm2() -> pl.Model:
    """SmolLM2-135M-Instruct: a decoder of 30 layers with grouped queries."""
    return pl.load(smollm2_path())


@cache
def minilm() -> pl.Model:
    """all-MiniLM-L6-v2: an encoder of 6 layers."""
    return pl.load(minilm_path())
