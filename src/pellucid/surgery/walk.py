"""Passes of a generation whose rows stop after different blocks, and a cache that stays right.

A row that exits after block c leaves no keys and values in the blocks after it, which its later tokens attend to. Two ways:

    recompute   they are made up for as soon as a later token of the row goes deeper: all tokens since the last whole one are
                passed again, so every key and value is the full model's (as LayerSkip and FREE do, exact)
    propagate   every skipped block is given the exit's state and keeps its keys and values of that, and no more (CALM): cheap,
                and not the model's

The model's own forward does the work. While it runs, a block is called with the rows that are still in it: those that exited, and
those that need blocks their earlier tokens lack, are left out of what it is given, and the latter are passed again together
afterwards, each as many tokens as the one that needs most (so no row has a gap between its columns). That a block makes of some
rows what it makes of them among others is tried on every block before it is relied on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from pellucid.anatomy.modes import accepted_by, running
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.anatomy.structure import Block
from pellucid.anatomy.trace import put, take
from pellucid.engine.alone import Alone
from pellucid.engine.row_cache import Kept, RowCache
from pellucid.engine.rungs import weights
from pellucid.engine.stubbed import picked, stubs
from pellucid.errors import InputError, Refused
from pellucid.lenses.lens import logits
from pellucid.model import Model
from pellucid.surgery.exit_policy import Exit, confidence
from pellucid.surgery.exit_reading import costs, lens_cost

States = Literal["recompute", "propagate"]


class _Deeper(BaseException):
    """No row can go on: all are to be passed again."""


@dataclass(eq=False)
class Row:
    """One text while it is written: which of its tokens are in the cache, how deep, and what was paid for the newest."""

    number: int
    ids: list[int]
    whole: int = 0  # tokens with keys and values in every block
    depth: int = 0  # blocks in which the tokens behind them have theirs
    blocks: float = 0.0
    exited: int | None = None  # the block after which its last pass ended


@dataclass
class _Pass:
    """The rows of one pass of the model: who is still in it, and what was seen at the checks, [row]."""

    rows: Sequence[Row]
    limits: list[int]  # the block before which each row must give up
    may: bool  # whether the policy is asked
    live: list[int] = field(init=False)
    deeper: list[int] = field(default_factory=list)
    told: list[Tensor] = field(default_factory=list)
    before: Tensor | None = None

    def __post_init__(self) -> None:
        self.live = [*range(len(self.rows))]


@dataclass
class Walk:
    """A model that generates by a policy: its rows, and the cache that they share."""

    model: Model
    policy: Exit
    states: States = "recompute"
    plain: bool = False  # no policy: transformers' own cache, the rows are equally far

    def __post_init__(self) -> None:
        self.blocks = self.model.anatomy.stacks[-1].blocks
        self.unembedding, self.n = costs(self.model)
        self.lens, self.projections = lens_cost(self.model, self.policy.lens), _projections(self.model)
        self.cache: Any = DynamicCache(config=self.model.module.config) if self.plain else RowCache(self.n)
        self.follow(self.policy)

    def follow(self, policy: Exit) -> None:
        """From now on by this policy."""
        self.policy, checked = policy, policy.checked(self.model)
        self.sites = {i: str(self.model.sites(f"layers.{i}.resid_post")[0]) for i in checked}

    # ---- passes

    def run(self, rows: Sequence[Row], new: int, may: bool, every: bool = False, limited: bool = False) -> Tensor:
        """Logits [row, token] of what follows the last `new` tokens of each row ([row, position, token] with `every`), which the cache then has.

        `limited`: rows that need blocks which their earlier tokens lack are passed again with those.
        """
        widest = max(len(row.ids) for row in rows)
        if len(rows) > 1 and new == len(rows) and new < widest:
            new += 1  # so that no length is taken for the number of rows
        given, cache = self._given(rows, new, widest, every), self.cache
        if not self.plain:
            cache.past, cache.live = widest - new, [row.number for row in rows]
            for row in rows:
                row.exited = None
                cache.fresh[row.number] = min(new, len(row.ids))
                row.whole = min(row.whole, len(row.ids) - cache.fresh[row.number])
                cache.cut(row.number, len(row.ids) - cache.fresh[row.number])
        each = _Pass(rows, [r.depth if limited and r.whole < len(r.ids) - new else self.n for r in rows], may)
        try:
            with torch.no_grad(), running(self.model.module), self._passing(each):
                made = main_output(self.model.module(**given))
        except _Deeper:
            made = None
        deeper = [rows[i] for i in each.deeper]
        for row in rows:
            if row in deeper:
                continue
            whole = row.exited is None or self.states == "propagate"
            row.whole, row.depth = (len(row.ids), self.n) if whole else (row.whole, min(row.depth, row.exited + 1))  # type: ignore[operator]
        if not deeper:
            assert made is not None
            return made if every else made[:, -1]
        again = self.catch_up(deeper, may)
        said = again.new_empty(len(rows), again.shape[1]) if made is None else made[:, -1].clone()
        said[each.deeper] = again
        return said

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Logits [row, token] for what follows each row's newest token."""
        return self.run(rows, 1, True, limited=self.states == "recompute")

    def catch_up(self, rows: Sequence[Row], may: bool = True, every: bool = False) -> Tensor:
        """All tokens since each row's last whole one are passed again together."""
        for row in rows:
            row.depth = self.n
        return self.run(rows, max(len(row.ids) - row.whole for row in rows), may, every)

    def begin(self, texts: Sequence[Sequence[int]]) -> tuple[list[Row], Tensor]:
        """Rows and logits [row, token] after the prompts, which every block reads. Refused where the cache is no list of keys and values."""
        rows = [Row(i, [*ids]) for i, ids in enumerate(texts)]
        said = self.run(rows, max(len(row.ids) for row in rows), False)
        for row in rows:
            row.blocks = 0.0
            if not self.plain and self.cache.tokens(row.number) != [len(row.ids)] * self.n:
                raise Refused(f"{self.model.name} does not keep keys and values of every token in every layer, so what was passed by cannot be made up for")  # fmt: skip
        return rows, said

    def _given(self, rows: Sequence[Row], new: int, widest: int, every: bool) -> dict[str, Any]:
        padded, accepted = self.model.flush([row.ids for row in rows]).tensors, accepted_by(self.model.module)
        given = {"input_ids": padded["input_ids"][:, -new:], cache_name(self.model): self.cache, "use_cache": True}
        more = {"attention_mask": padded["attention_mask"], "logits_to_keep": 0 if every else 1}
        if "position_ids" in padded:
            more["position_ids"] = padded["position_ids"][..., -new:]
        return given | {k: v for k, v in more.items() if k in accepted or k == "position_ids"}

    @contextmanager
    def _passing(self, each: _Pass) -> Iterator[None]:
        if self.plain:
            yield
            return
        owner, last = threading.get_ident(), list[Any]([None])

        def stub(i: int, native: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != owner:
                    return native(*args, **kwargs)
                if lacking := [k for k in each.live if each.limits[k] <= i]:
                    each.deeper += lacking
                    each.live = [k for k in each.live if k not in lacking]
                    if len(each.deeper) == len(each.rows):
                        raise _Deeper
                if self.states == "propagate":
                    self._propagate(i, native, each, args, kwargs)
                if each.live:
                    last[0] = self._through(i, native, each, args, kwargs)
                return last[0]

            return forward

        modules = [self.model.module.get_submodule(b.module) for b in self.blocks]
        with stubs({module: partial(stub, i) for i, module in enumerate(modules)}):
            yield

    def _of(self, i: int, rows: list[int], each: _Pass, args: Any, kwargs: Any) -> tuple[Any, Any, Tensor]:
        """A block's arguments with these rows alone; and the residual [row, position, d] of all."""
        tap, n = self.blocks[i].taps["resid_pre"], len(each.rows)
        self.cache.live = [each.rows[k].number for k in rows]
        x = tap.layout.read(args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key], n)
        if len(rows) == n:
            return args, kwargs, x
        own = tap.layout.write(x[rows])
        args = tuple(own if k == tap.key else picked(a, rows, n) for k, a in enumerate(args))
        return args, {k: own if k == tap.key else picked(a, rows, n) for k, a in kwargs.items()}, x

    def _through(self, i: int, native: Callable[..., Any], each: _Pass, args: Any, kwargs: Any) -> Any:
        """The block's output: of the live rows, what it makes of them; of the others, what they came with. Rows exit here."""
        args, kwargs, x = self._of(i, each.live, each, args, kwargs)
        output, tap = native(*args, **kwargs), self.blocks[i].taps["resid_post"]
        for k in each.live:
            each.rows[k].blocks += self.cache.fresh[each.rows[k].number]
        made, asked = tap.layout.read(take(output, tap.key), len(each.live)), each.may and i in self.sites
        if len(each.live) == len(each.rows) and not asked:
            return output
        x = x.to(made.device, made.dtype).index_copy(0, torch.tensor(each.live, device=made.device), made)
        if asked:
            x = self._asked(i, x, each)
        return put(output, tap.key, tap.layout.write(x))

    def _asked(self, i: int, x: Tensor, each: _Pass) -> Tensor:
        """The residual, translated in rows that the policy ends here."""
        live, now, z = torch.tensor(each.live), x[:, -1], None
        said = torch.full((len(x),), -1)
        if self.policy.reads:
            z = logits(self.model, now[live], self.sites[i], self.policy.lens)
            said[live] = z.argmax(-1).cpu()
            for k in each.live:
                each.rows[k].blocks += self.unembedding + self.lens
        each.told.append(said)
        before = None if each.before is None else each.before[live]
        sure = confidence(self.policy.by, z, now[live], before, [t[live] for t in each.told], i, self.policy.head)
        each.before = now
        leave = [k for k, s in zip(each.live, sure.tolist(), strict=True) if s >= self.policy.threshold]
        for k in leave:
            each.rows[k].exited = i
        each.live = [k for k in each.live if k not in leave]
        if leave and self.policy.lens is not None:
            x = x.clone()
            x[leave] = self.policy.lens.translate(self.sites[i], x[leave].float()).to(x.dtype)
        return x

    def _propagate(self, i: int, native: Callable[..., Any], each: _Pass, args: Any, kwargs: Any) -> None:
        """The block's keys and values of the rows that have exited, of the state they exited with."""
        gone = [k for k, row in enumerate(each.rows) if row.exited is not None]
        if not gone:
            return
        args, kwargs, _ = self._of(i, gone, each, args, kwargs)
        self.cache.keeping = True
        try:
            native(*args, **kwargs)
        except Kept:
            pass
        finally:
            self.cache.keeping = False
        for k in gone:
            each.rows[k].blocks += self.projections[i]


def begun(model: Model, prompt: Any, policy: Exit, states: States) -> tuple[Walk, list[list[int]]]:
    """A walk, and the token ids of the prompts. Refused or InputError for what cannot exit early."""
    policy.check(model)
    if states not in ("recompute", "propagate"):
        raise InputError(f"states={states!r}: expected 'recompute' or 'propagate'")
    if not cache_name(model) or any(b.nth or not b.whole for b in model.anatomy.stacks[-1].blocks):
        raise Refused(f"{model.name} cannot pass blocks by while generating: it keeps no cache, or its layers share modules")  # fmt: skip
    stream = model.inputs(prompt).stream("")
    rows = [stream.ids[i][stream.mask[i].bool()].tolist() for i in range(len(stream.ids))]
    if len(rows) > 1 and not model.anatomy.memo("rows apart", lambda: _apart(model)):
        raise Refused(f"a block of {model.name} does not make of some rows what it makes of them among others: generate one prompt at a time")  # fmt: skip
    return Walk(model, policy, states), rows


def plainly(model: Model, texts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """n greedy tokens for each text by the whole model, cached, with the same loop."""
    walk = Walk(model, Exit("margin", float("inf"), layers=()), plain=True)
    rows, said = walk.begin(texts)
    while True:
        for row, token in zip(rows, said.argmax(-1).tolist(), strict=True):
            row.ids.append(token)
        if len(rows[0].ids) == len(texts[0]) + n:
            return [row.ids[len(ids) :] for row, ids in zip(rows, texts, strict=True)]
        said = walk.step(rows)


def cache_name(model: Model) -> str:
    """What the forward calls its cache; "" where it takes none."""
    return next((name for name in ("cache", "past_key_values") if name in accepted_by(model.module)), "")


def ends(model: Model) -> set[int]:
    """The tokens that end a text."""
    found = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return set() if found is None else set(found) if isinstance(found, list | tuple) else {int(found)}


def _projections(model: Model) -> list[float]:
    """Queries, keys and values of each block as a share of it, by weights."""
    stack = model.anatomy.stacks[-1]

    def wide(block: Block) -> int:
        found = [a for a in block.attentions.values() if a.part.startswith("attn")]
        return sum((a.heads + a.kv_heads) * a.d_head + a.kv_heads * a.d_value for a in found)

    sizes = weights(model.anatomy)[1]
    return [min(1.0, wide(b) * stack.d_model / max(1, size)) for b, size in zip(stack.blocks, sizes, strict=True)]


def _apart(model: Model) -> bool:
    """Whether every block makes of some rows of a padded batch what it makes of them among the others."""
    stack = model.anatomy.stacks[-1]
    ids = model.anatomy.inputs["input_ids"][0].tolist()
    alone = Alone(model.anatomy, stack, model.inputs)
    inputs, rows = model.flush([(ids * 4)[:n] for n in (2, 4, 3)]), [2, 0]
    with torch.no_grad():
        for block, call in zip(stack.blocks, alone.recorded(inputs), strict=True):
            tap, wanted = block.taps["resid_pre"], alone.output(block, call, 3)[rows]
            own = tap.layout.write(tap.layout.read(call.hidden, 3)[rows])
            args = tuple(own if k == tap.key else picked(a, rows, 3) for k, a in enumerate(call.args))
            kwargs = {k: own if k == tap.key else picked(a, rows, 3) for k, a in call.kwargs.items()}
            try:
                out = alone.module(block)(*args, **kwargs)
            except (RuntimeError, ValueError, IndexError, TypeError):
                return False
            made = block.taps["resid_post"].layout.read(take(out, block.taps["resid_post"].key), 2)
            mask = inputs.stream("").mask[rows].bool()
            if error(made[mask], wanted[mask]) > TOLERANCE.get(made.dtype, 4e-2):
                return False
    return True
