"""How many tokens does a model hold?

A table of positions ends somewhere, and not always where the config says: one that begins past a padding index holds less
than it has rows. So the table is measured: a short run shows which embedding is asked for consecutive rows, and from which
row on. Where no table is found, the config's number is where training ended; beyond it the model's own forward pass says,
at the length that is asked for, whether it runs there (rotary positions do, biases built to a size do not).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.anatomy.modes import accepted_by, evaluating
from pellucid.errors import InputError

CLAIMS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
)
ENDS = {"encoder": ("max_source_positions",), "decoder": ("max_target_positions",)}
SHORT = 6  # tokens of the run that measures
BEFORE = 256  # prompts shorter than half of what is claimed, or than this where nothing is, are not worth measuring


@dataclass
class _Known:
    """What is known of one module: rows of its tables per stack, and lengths that it was seen to hold."""

    tables: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def claimed(module: nn.Module, stack: str = "") -> int | None:
    """The length the config speaks of."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = (getattr(config, name, None) for name in (*ENDS.get(stack, ()), *CLAIMS))
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 1), None)


def limit(module: nn.Module, stack: str = "") -> int | None:
    """How many positions the table of a stack holds; None where it has none (rotary, relative, ...)."""
    if module not in _known:
        _known[module] = _Known(_tables(module))
    tables = _known[module].tables
    return tables.get(stack, tables.get("decoder", tables.get("")))


def exceeded(module: nn.Module, length: int, stack: str = "") -> int | None:
    """How many tokens a stack holds, if that is fewer than `length`; None where so many fit."""
    claim = claimed(module, stack)
    if length <= (claim or BEFORE) // 2:
        return None
    holds = limit(module, stack)
    if holds is None and claim is not None and length > claim:
        seen = _known[module].seen
        if length > seen.get(stack, 0):
            if not _runs(module, length, stack):
                return claim
            seen[stack] = length
    return holds if holds is not None and length > holds else None


def check_length(module: nn.Module, length: int, stack: str = "", what: str = "the prompt has") -> None:
    """InputError if a stack cannot hold that many tokens, before anything runs."""
    if (holds := exceeded(module, length, stack)) is not None:
        raise InputError(
            f"{what} {length} tokens but the model's context holds {holds}: shorten the prompt, or give "
            "model.inputs(..., truncate='left') or 'right'"
        )


class _Rows(TorchFunctionMode):
    """Which tables are asked for consecutive rows: (the table, the first row asked for)."""

    def __init__(self, claim: int | None) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, int, int]] = []  # the table, its rows, the first that is used
        self.claim = claim

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.embedding:
            index, table = (*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs))[:2]
            self.look(table, table.shape[0], index)
        elif function in (torch.gather, Tensor.gather) and len(args) == 3 and args[2].ndim == 3:
            self.look(args[0], args[0].shape[args[1]], args[2][..., 0], told=True)
        elif function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.long:
            self.look(args[0], args[0].shape[0], args[1], told=True)
        return function(*args, **kwargs)

    def look(self, table: Tensor, rows: int, index: Tensor, told: bool = False) -> None:
        """`told`: what is not an embedding is a table of positions only if it has as many rows as the config speaks of."""
        row = index.reshape(-1, index.shape[-1])[0, :SHORT] if index.ndim and index.numel() else index.reshape(-1)
        if row.numel() == SHORT and (not told or rows == self.claim) and bool((row.diff() == 1).all()):
            self.asked.append((table, rows, int(row[0])))


def _tables(module: nn.Module) -> dict[str, int]:
    """Rows that are left of each stack's table of positions, from the first row used."""
    rows = _Rows(claimed(module))
    try:
        with torch.no_grad(), evaluating(module), rows:
            module(**_call(module, SHORT))
    except Exception:  # a model that needs more than token ids; what it holds shows when it runs
        if not rows.asked:
            return {}
    found: dict[str, int] = {}
    sides = {name: getattr(module, f"get_{name}", None) for name in ("encoder", "decoder")}
    tied = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    for table, size, first in rows.asked:
        stack = ""
        if tied:
            stack = next((n for n, get in sides.items() if get is not None and _owns(get(), table)), "")
        found[stack] = min(found.get(stack, size), size - first)
    return found


def _owns(part: nn.Module | None, table: Tensor) -> bool:
    return part is not None and any(t is table for t in (*part.parameters(), *part.buffers()))


def _runs(module: nn.Module, length: int, stack: str) -> bool:
    """Whether the model's own forward pass runs at this length."""
    try:
        with torch.no_grad(), evaluating(module):
            module(**_call(module, length, stack))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _call(module: nn.Module, length: int, stack: str = "") -> dict[str, Any]:
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    # not consecutive, no padding, and below any vocabulary's size
    row = torch.tensor([[5, 3]], device=device).repeat(1, length // 2 + 1)
    call: dict[str, Any] = {"input_ids": row[:, :length]}
    accepted = accepted_by(module)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        short = row[:, :SHORT]
        call = {"input_ids": short if stack == "decoder" else call["input_ids"],
                "decoder_input_ids": short if stack == "encoder" else call["input_ids"]}  # fmt: skip
    if "attention_mask" in accepted:
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    return call
