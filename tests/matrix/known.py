"""Which cells of the matrix are refused, and with which words? Anything else must equal the hooks.

A cell that begins to be refused fails the test; so does one that works and is still listed.
"""

from __future__ import annotations

from .hand import FAMILIES

MASKED = ("bert", "roberta", "deberta-v2")

# (families, conditions, techniques, how the refusal begins): None stands for all
REFUSED: list[tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None, str]] = [
    (tuple(f for f in FAMILIES if f != "llama"), ("GGUF",), None, "not there: no tiny file is written for it"),
    (MASKED, None, ("generate",), r"refused: a \w+ForMaskedLM does not generate text"),
    (
        ("bart",),
        ("left-padded",),
        ("run", "generate", "sweep", "patching", "lens", "circuit"),
        "refused: padding on the left changes what this model computes",
    ),
    (("gpt2", "falcon"), ("8-bit",), None, "not there: it has no nn.Linear to quantise"),
    # Rounding to 8 bits is not linear: the sum over edges differs from the whole by more than a proof allows, or less.
    (None, ("8-bit",), ("circuit",), "refused: circuits|equal"),
    (MASKED, ("no tokenizer",), ("patching", "gradient", "circuit"), "refused: this model fills in a mask"),
    # The gate of gated attention reads the stream, and circuits have no such reader.
    (
        ("qwen3_next",),
        None,
        ("circuit",),
        "refused: circuits are refused on this model: sources with",
    ),
]


def refusal(family: str, condition: str, technique: str) -> str | None:
    for families, conditions, techniques, words in REFUSED:
        here = (families is None or family in families) and (conditions is None or condition in conditions)
        if here and (techniques is None or technique in techniques):
            return words
    return None
