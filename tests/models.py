"""Where are the two really trained models of the tests?"""

from __future__ import annotations

from scripts.demo_model import minilm as minilm_path
from scripts.demo_model import smollm2 as smollm2_path

__all__ = ["minilm_path", "smollm2_path"]
