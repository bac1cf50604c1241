"""One training loop: batches, a loss, an optimiser, a schedule, and a file from which it goes on as if never interrupted.

    for step, batch:   loss(batch, step) -> gradients -> optimiser at learning rate * schedule(step / steps) -> after(step)

Which batch comes when, and every random number drawn inside a step, follow from the seed and the number of the step alone.
So a fit that was interrupted, at whatever moment, ends with the same bits as one that was not; and a control arm (shuffled
labels, another guide, a placebo model) is a second call with the same seed, alike in all but the one thing.

Plain torch. Gradients are taken of the given parameters only: a model that is looked through, not trained, stays as it was,
frozen or not, and under `torch.no_grad` as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.pausing import progress
from pellucid.errors import InputError

B = TypeVar("B")
HALF = (torch.bfloat16, torch.float16)
Loss = Callable[[B, int], Tensor | list[float]]
Schedule = Callable[[float], float]  # from the share of steps that are done to a factor of the learning rate
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def constant(done: float) -> float:
    """The learning rate as it is."""
    return 1.0


def linear(done: float) -> float:
    """From the learning rate down to 0."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Half a cosine from the learning rate down to 0."""
    return (1.0 + math.cos(math.pi * done)) / 2


def draws(n: int, size: int, epochs: int = 1, seed: int = 0) -> list[Tensor]:
    """Batches of at most `size` of `n` rows: every row once in each epoch, in an order drawn by `seed`.

    >>> [sorted(torch.cat(draws(4, 3, 2)[i : i + 2]).tolist()) for i in (0, 2)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).split(size)]


@dataclass(frozen=True)
class Keeper:
    """The file a fit is kept in, `every` so many steps and when it is interrupted; `of` is all that shaped the fit.

    `of` holds plain values by name: digests of weights and corpus, settings. A file of another fit is refused, with what differs.
    """

    path: Path
    of: Mapping[str, Any]
    every: int = 20

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        write_tensors(self.path, "pellucid_fit", {"of": dict(self.of), **about}, tensors)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes; None where there is no file yet. InputError if it is none, or of another fit."""
        if not self.path.exists():
            return None
        said = "is no checkpoint of a fit: delete it or name another file"
        with reading_tensors(self.path, "pellucid_fit", said) as (about, tensors):
            before = about["of"]
        now = json.loads(json.dumps(dict(self.of)))
        other = [
            f"{k} was {before.get(k)!r:.40}, is {now.get(k)!r:.40}"
            for k in {**before, **now}
            if before.get(k) != now.get(k)
        ]
        if other:
            raise InputError(
                f"{str(self.path)!r} is the checkpoint of another fit ({'; '.join(other)}): name another file"
            )
        return tensors, about


def train(
    parameters: Mapping[str, Tensor],
    batches: Sequence[B] | Callable[[int], Iterable[B]],
    loss: Loss[B],
    optimizer: Optimizer,
    *,
    steps: int | None = None,
    schedule: Schedule = constant,
    after: Callable[[int], None] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    keeper: Keeper | None = None,
    seed: int = 0,
    what: str = "training steps",
) -> list[Any]:
    """Train `parameters` in place, one step for each batch; gives the loss of every step.

    `loss(batch, step)` returns a scalar with a graph, or, where it has put gradients into the parameters itself, numbers to
    note. `batches` are a sequence, or a function from the first step wanted to all from there on, with `steps` of them in all.
    A group of the optimiser may have a schedule of its own besides, as "pace". `after(step)` follows each update (rows renormalised, frozen entries put back). `beside` are tensors that belong to the fit
    and are no parameters; with a `keeper` they are kept and come back, like the optimiser's state.

    Parameters of 16 bits take their steps in float32 and are rounded after each: a step smaller than their rounding adds up
    instead of being lost. InputError where the loss or a parameter is no finite number any more.
    """
    total = steps if steps is not None else len(batches)  # type: ignore[arg-type]
    free = {name: p.requires_grad for name, p in parameters.items()}
    trained = list(parameters.values())
    for p in trained:
        p.requires_grad_(True)
    wide = _Wide(trained)
    rule = optimizer(wide.stepped)
    rates = [group["lr"] for group in rule.param_groups]
    exact = dict(zip(parameters, wide.stepped, strict=True))
    noted: list[Any] = _resumed(keeper, exact, beside or {}, rule, total)
    wide.round()

    def keep() -> None:
        if keeper is not None:
            state = {
                f"o/{i}/{k}": torch.as_tensor(v) for i, s in rule.state_dict()["state"].items() for k, v in s.items()
            }
            kept = {f"p/{k}": v for k, v in exact.items()} | {f"b/{k}": v for k, v in (beside or {}).items()}
            keeper.save(kept | state, {"steps": total, "noted": noted})

    whole = True  # no update is half done
    start, devices = len(noted), {p.device for p in trained if p.device.type == "cuda"}
    noise = [torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in devices)]
    rest = batches(start) if callable(batches) else batches[start:]
    try:
        with (
            torch.random.fork_rng(list(devices)),
            torch.enable_grad(),
            progress[None](what=what, total=total, done=start) as bar,
        ):
            for step, batch in zip(range(start, total), rest, strict=False):
                for generator in noise:
                    generator.manual_seed((seed << 32) + step)
                rule.zero_grad()
                wide.clear()
                found = loss(batch, step)
                if isinstance(found, Tensor):
                    for p, g in zip(trained, torch.autograd.grad(found, trained, allow_unused=True), strict=True):
                        p.grad = g
                for group, rate in zip(rule.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(step / total) * group.get("pace", constant)(step / total)
                noted_now = float(found.detach()) if isinstance(found, Tensor) else found
                if not math.isfinite(_mean(noted_now)):
                    raise InputError(_lost(f"the loss is {_mean(noted_now)} at step {step}", what, trained))
                whole = False
                wide.take()
                rule.step()
                wide.round()
                if after is not None:
                    with torch.no_grad():
                        after(step)
                    wide.follow()
                noted.append(noted_now)
                whole = True
                if keeper is not None and (len(noted) % keeper.every == 0 or len(noted) == total):
                    keep()
                bar.step(loss=_mean(noted[-1]))
    except BaseException as error:
        if whole and len(noted) > start and not isinstance(error, FloatingPointError):  # what diverged is not kept
            keep()
        raise
    finally:
        for name, p in parameters.items():
            p.grad = None
            p.requires_grad_(free[name])
    if len(noted) < total:
        raise InputError(f"there were batches for {len(noted)} of {total} steps: give more data, or fewer steps")
    for name, p in parameters.items():
        if not bool(p.detach().isfinite().all()):
            raise InputError(_lost(f"{name!r} holds no finite numbers after {total} steps", what, trained))
    return noted


class _Wide:
    """Parameters of 16 bits in float32, for the optimiser; others are themselves."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.stepped = [p.detach().float() if p.dtype in HALF else p for p in parameters]
        self.pairs = [(p, w) for p, w in zip(parameters, self.stepped, strict=True) if p is not w]

    def clear(self) -> None:
        for p, _ in self.pairs:
            p.grad = None

    def take(self) -> None:
        """The gradients that the parameters were given."""
        for p, w in self.pairs:
            w.grad = None if p.grad is None else p.grad.float()

    @torch.no_grad()
    def round(self) -> None:
        for p, w in self.pairs:
            p.copy_(w)

    @torch.no_grad()
    def follow(self) -> None:
        """What was put into the parameters by hand."""
        for p, w in self.pairs:
            w.copy_(torch.where(p == w.to(p.dtype), w, p.float()))


def _lost(found: str, what: str, trained: list[Tensor]) -> str:
    narrow = any(p.dtype == torch.float16 for p in trained)
    float32 = ", or open the model in float32 or bfloat16, since float16 ends at 65504" if narrow else ""
    return f"{what}: {found}: give a smaller learning rate{float32}"


def _resumed(
    keeper: Keeper | None,
    parameters: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    rule: torch.optim.Optimizer,
    total: int,
) -> list[Any]:
    """Everything put back as it was; what was noted of the steps that are done."""
    found = keeper.load() if keeper is not None else None
    if found is None:
        return []
    tensors, about = found
    shapes = {f"{kind}/{k}": v.shape for kind, group in (("p", parameters), ("b", beside)) for k, v in group.items()}
    if about["steps"] != total or any(k not in tensors or tensors[k].shape != shape for k, shape in shapes.items()):
        raise InputError(f"{str(keeper.path)!r} is the checkpoint of another fit ({about['steps']} steps, now {total}, or "  # type: ignore[union-attr]
                         "other parameters): name another file")  # fmt: skip
    with torch.no_grad():
        for kind, group in (("p", parameters), ("b", beside)):
            for name, value in group.items():
                value.copy_(tensors[f"{kind}/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("o/"):
            _, i, name = key.split("/", 2)
            state.setdefault(int(i), {})[name] = value
    rule.load_state_dict({"state": state, "param_groups": rule.state_dict()["param_groups"]})
    noted: list[Any] = about["noted"]
    return noted


def _mean(noted: Any) -> float:
    return float(noted) if isinstance(noted, int | float) else sum(noted) / max(1, len(noted))
