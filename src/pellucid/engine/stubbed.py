"""Many edited runs as rows of one batch through the model's own forward, with the blocks before the first edit skipped.

Slower than packing but bound to nothing: it serves families whose blocks mix positions in other ways than attention,
or whose attention does not go through the interface. A skipped block returns what it returned in the clean run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Wiretap
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import Variant
from pellucid.engine.recording import Recording
from pellucid.engine.writing import Window, Written
from pellucid.errors import Refused, SiteError

_lock = threading.Lock()  # this changes a module's forward for a moment: one sweep, or one generation, at a time


def grow(tree: Any, n: int, rows: int) -> Any:
    """Tensors of batch size `rows` repeated n times, inside tuples, lists and mappings too."""
    if isinstance(tree, Tensor):
        return tree.repeat(n, *[1] * (tree.ndim - 1)) if tree.ndim and len(tree) == rows and n > 1 else tree
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(grow(t, n, rows) for t in tree)
    return tree


def picked(tree: Any, chosen: Any, rows: int) -> Any:
    """These rows of tensors of batch size `rows`, inside tuples, lists and mappings too."""
    if isinstance(tree, Tensor):
        return tree[chosen] if tree.ndim and len(tree) == rows else tree
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(picked(t, chosen, rows) for t in tree)
    if type(tree) is dict:
        return {k: picked(v, chosen, rows) for k, v in tree.items()}
    return tree


@contextmanager
def skipping(anatomy: Anatomy, recording: Recording | None, before: int, n: int, rows: int) -> Iterator[None]:
    """Blocks before `before` return their recorded output, in this thread only."""
    if recording is None or before == 0:
        yield
        return
    owner, count = threading.get_ident(), [0]
    modules = {anatomy.module.get_submodule(b.module) for b in recording.stack.blocks}

    def stub(native: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return native(*args, **kwargs)
            i = count[0]
            count[0] += 1
            return grow(recording.calls[i].output, n, rows) if i < before else native(*args, **kwargs)

        return forward

    with stubs(dict.fromkeys(modules, stub)):
        yield


@contextmanager
def stubs(made: Mapping[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Modules with the forwards that are made of their own, which they have again afterwards."""
    with _lock:
        own = {m: m.__dict__.get("forward") for m in made}
        try:
            for module, stub in made.items():
                module.forward = stub(module.forward)
            yield
        finally:
            for module, old in own.items():
                if old is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = old


def run_rows(
    anatomy: Anatomy, inputs: Inputs, variants: Sequence[Variant], recording: Recording | None, **forward: Any
) -> Tensor:
    """Logits [variant, batch, ...] of variants run together; all enter at the same block when one is recorded."""
    rows, n = len(inputs), len(variants)
    tensors = {k: grow(v, n, rows) for k, v in inputs.tensors.items()}
    writers: dict[Tap, list[tuple[int, Written]]] = {}
    for i, v in enumerate(variants):
        for w in v.writers:
            for tap in w.taps:
                writers.setdefault(tap, []).append((i, w))

    def handler(tap: Tap) -> Callable[[Tensor], Tensor | None]:
        def handle(x: Tensor) -> Tensor | None:
            x = x.clone()
            for i, w in writers[tap]:
                part = slice(i * rows, (i + 1) * rows)
                x[part] = w.meet(tap, x[part], Window.on(inputs, w.spot))
            return x

        return handle

    before = min((v.layer for v in variants), default=0)
    with (
        skipping(anatomy, recording, before, n, rows),
        Wiretap(anatomy.module, {t: handler(t) for t in writers}, n * rows) as wire,
    ):
        logits = main_output(anatomy.module(**{**tensors, **forward}))
    missed = next((placed[0][1] for tap, placed in writers.items() if tap not in wire.met), None)
    if missed is not None:
        raise SiteError(f"the edit on {str(missed.spot.site)!r} never fired: the run did not pass through it")
    if len(logits) != n * rows:  # music decoders: one row per codebook
        raise Refused(f"this model gives {len(logits)} rows of logits for {n * rows} prompts, so it cannot be swept")
    return logits.unflatten(0, (n, rows))
