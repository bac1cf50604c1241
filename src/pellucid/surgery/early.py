"""Stopping early while generating: the policy decides at every token, and the cache stays right.

A token that exits after block c leaves no keys and values in the blocks after it, which later tokens attend to. Two ways:

    recompute   they are made up for as soon as a later token goes deeper: all tokens since the last whole one are passed again,
                together, so every key and value is the full model's (as LayerSkip and FREE do, exact)
    propagate   every skipped block is given the exit's state and keeps its keys and values of that, and no more (CALM): cheap,
                and not the model's

The model's own forward does the work; blocks are passed by while it runs. What was paid is counted in blocks a token: blocks that
ran, checks, what was made up for, projections of propagated states. Whether time was gained is measured beside it, not inferred:
for one row on a CPU or a card a block is a matter of its weights, and passing many tokens at once costs little more than one.

`draft_and_verify` writes tokens with the first blocks only and has the whole model judge several at once: the text is the
greedy one, token for token (Elhoushi et al. 2024; Leviathan et al. 2023).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pellucid.anatomy.modes import accepted_by
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Block
from pellucid.anatomy.trace import put, take
from pellucid.engine.pausing import progress
from pellucid.engine.rungs import weights
from pellucid.engine.sampling import sampling
from pellucid.engine.stubbed import stubs
from pellucid.errors import InputError, Refused, at_least, nearest
from pellucid.lenses.lens import logits
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.exit_policy import Exit, confidence
from pellucid.surgery.exits import costs, lens_cost
from pellucid.technique import technique

States = Literal["recompute", "propagate"]


class _Kept(BaseException):
    """A block's keys and values are in the cache: the rest of it is not run."""


class _Deeper(BaseException):
    """This token goes where others before it have not been."""


@dataclass
class _Walk:
    """One generation: which tokens are in the cache, how deep, and what was paid."""

    model: Model
    policy: Exit
    states: States
    ids: list[int]
    cache: Any
    whole: int = 0  # tokens with keys and values in every block
    depth: int = 0  # blocks in which the tokens behind them have theirs
    blocks: float = 0.0
    checks: int = 0
    exited: int | None = None  # the block after which the last pass ended
    _told: list[Tensor] = field(default_factory=list)
    _before: Tensor | None = None
    _may: bool = True  # whether the policy is asked in this pass
    _stop: int | None = None  # the block before which a pass must give up

    def __post_init__(self) -> None:
        self.checked = self.policy.checked(self.model)
        self.found = self.model.anatomy.stacks[-1].blocks
        self.sites = {i: str(self.model.sites(f"layers.{i}.resid_post")[0]) for i in self.checked}
        self.unembedding, self.n = costs(self.model)
        self.lens = lens_cost(self.model, self.policy.lens)
        self.projections = _projections(self.model)

    # ---- passes

    def run(self, start: int, may: bool, every: bool = False) -> Tensor:
        """Logits [position, token] of the tokens from `start` on (of the last one, unless `every`), after which the cache has them."""
        ids = torch.tensor([self.ids[start:]], device=next(self.model.module.parameters()).device)
        accepted = accepted_by(self.model.module)
        given: dict[str, Any] = {"input_ids": ids, _cache_name(self.model): self.cache, "use_cache": True}
        mask = torch.ones(1, len(self.ids), dtype=torch.long, device=ids.device)
        given |= {
            k: v for k, v in {"attention_mask": mask, "logits_to_keep": 0 if every else 1}.items() if k in accepted
        }
        self.exited, self._told, self._before, self._may = None, [], None, may
        with torch.no_grad(), self._passing(ids.shape[1]):
            made = main_output(self.model.module(**given))[0]
        return made if every else made[-1:]

    def step(self) -> Tensor:
        """Logits [1, token] for what follows the newest token."""
        if self.states == "propagate" or self.whole == len(self.ids) - 1:
            said = self.run(len(self.ids) - 1, True)
        else:
            self._stop = self.depth
            try:
                said = self.run(len(self.ids) - 1, True)
            except _Deeper:
                self.blocks += self.depth  # for nothing: they are passed again with the others
                self._stop = None
                said = self.catch_up()
            self._stop = None
        if self.exited is None or self.states == "propagate":
            self.whole, self.depth = len(self.ids), self.n
        else:
            self.depth = min(self.depth, self.exited + 1)
        return said

    def catch_up(self, may: bool = True, every: bool = False) -> Tensor:
        """All tokens since the last whole one are passed again together."""
        self.take_back()
        self.depth = self.n
        return self.run(self.whole, may, every)

    def begin(self) -> Tensor:
        """Logits [1, token] after the prompt, which every block reads. Refused where the cache is no list of keys and values."""
        said = self.run(0, False)
        self.whole, self.depth, self.blocks = len(self.ids), self.n, 0.0
        kept = [getattr(layer, "keys", None) for layer in self.cache.layers]
        if len(kept) != self.n or any(k is None or k.shape[-2] != self.whole for k in kept):
            raise Refused(f"{self.model.name} does not keep keys and values of every token in every layer, so what was passed by cannot be made up for")  # fmt: skip
        return said

    def take_back(self) -> None:
        """The cache as it was when `whole` tokens were in it."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., : self.whole, :], layer.values[..., : self.whole, :]

    @contextmanager
    def _passing(self, rows: int) -> Iterator[None]:
        owner, modules = threading.get_ident(), [self.model.module.get_submodule(b.module) for b in self.found]
        last: list[Any] = [None]
        update = self.cache.update

        def stub(i: int, native: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != owner:
                    return native(*args, **kwargs)
                if self.exited is not None:
                    if self.states == "propagate":
                        self._propagate(i, native, update, args, kwargs)
                    return last[0]
                if self._stop is not None and i >= self._stop:
                    raise _Deeper
                self.blocks += rows
                last[0] = native(*args, **kwargs)
                if self._may and i in self.sites:
                    last[0] = self._asked(i, last[0])
                return last[0]

            return forward

        with stubs({module: partial(stub, i) for i, module in enumerate(modules)}):
            yield

    def _asked(self, i: int, output: Any) -> Any:
        """The block's output; translated where the policy ends the pass here."""
        tap = self.found[i].taps["resid_post"]
        hidden = take(output, tap.key)
        x = tap.layout.read(hidden, 1)[0, -1:]
        self.checks += 1
        z = None
        if self.policy.reads:
            self.blocks += self.unembedding + self.lens
            z = logits(self.model, x, self.sites[i], self.policy.lens)
            self._told.append(z.argmax(-1).cpu())
        sure = confidence(self.policy.by, z, x, self._before, self._told, i, self.policy.head)
        self._before = x
        if float(sure) < self.policy.threshold:
            return output
        self.exited = i
        if self.policy.lens is None:
            return output
        moved = self.policy.lens.translate(self.sites[i], tap.layout.read(hidden, 1).float()).to(hidden.dtype)
        return put(output, tap.key, tap.layout.write(moved))

    def _propagate(
        self, i: int, native: Callable[..., Any], update: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        def kept(*given: Any, **more: Any) -> Any:
            update(*given, **more)
            raise _Kept

        self.blocks += self.projections[i]
        self.cache.update = kept  # of this object alone
        try:
            native(*args, **kwargs)
        except _Kept:
            pass
        finally:
            del self.cache.update


def _projections(model: Model) -> list[float]:
    """Queries, keys and values of each block as a share of it, by weights."""
    stack = model.anatomy.stacks[-1]

    def wide(block: Block) -> int:
        found = [a for a in block.attentions.values() if a.part.startswith("attn")]
        return sum((a.heads + a.kv_heads) * a.d_head + a.kv_heads * a.d_value for a in found)

    sizes = weights(model.anatomy)[1]
    return [min(1.0, wide(b) * stack.d_model / max(1, size)) for b, size in zip(stack.blocks, sizes, strict=True)]


def _begun(model: Model, prompt: Any, policy: Exit, states: States) -> _Walk:
    policy.check(model)
    if states not in ("recompute", "propagate"):
        raise InputError(f"states={states!r}: expected 'recompute' or 'propagate'")
    inputs = model.inputs(prompt)
    if len(inputs) != 1:
        raise InputError(f"{len(inputs)} prompts: rows exit at different layers, so they are generated one at a time")
    stack = model.anatomy.stacks[-1]
    if not _cache_name(model) or any(b.nth or not b.whole for b in stack.blocks):
        raise Refused(
            f"{model.name} cannot pass blocks by while generating: it keeps no cache, or its layers share modules"
        )
    # a plain cache keeps every token, so that some can be taken back; where attention slides, the mask does
    return _Walk(model, policy, states, [int(i) for i in inputs.stream("").ids[0]], DynamicCache())


def _cache_name(model: Model) -> str:
    return next((name for name in ("cache", "past_key_values") if name in accepted_by(model.module)), "")


@technique
def generate_early(
    model: Model,
    prompt: Any,
    policy: Exit,
    *,
    states: States = "recompute",
    max_new_tokens: int = 40,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Continue one prompt, each token by as many blocks as its policy wants. The prompt itself is read by all of them.

    Greedily, or drawn as transformers does with `options` by its names: `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty` (those of the model's own config are not taken); the draws are those of `seed`.

    Gives over `position` (the tokens written, `token`) `layer`, the blocks after which each was chosen, `agrees`, whether the full
    model says the same after the same text (one pass over it, afterwards; of drawn tokens, with the same draw), and `blocks` paid, with checks and what was made up for; `share_agreeing`,
    `blocks_full`, what the whole model pays a token, and `time`, seconds over those of the whole model's greedy generation of as
    many tokens, cached too. `attrs["text"]` is the text. Refused for encoders, encoder-decoders, shared layers; InputError for several prompts and other options.

    >>> generate_early(model, "The capital of France is", Exit("margin", 0.9), max_new_tokens=8)  # doctest: +SKIP
    """
    at_least(1, max_new_tokens=max_new_tokens)
    choose = _Choice.of(options, seed)
    walk, end = _begun(model, prompt, policy, states), _ends(model)
    begin, paid, layers = len(walk.ids), [], []
    started = time.perf_counter()
    said = walk.begin()
    for _ in progress(range(max_new_tokens), "tokens"):
        token = choose(walk.ids, said)
        if len(walk.ids) > begin:
            paid.append(walk.blocks + (walk.unembedding if walk.exited is None or not policy.reads else 0.0))
            layers.append(walk.n if walk.exited is None else walk.exited + 1)
        else:
            paid.append(walk.n + walk.unembedding)
            layers.append(walk.n)
        walk.ids.append(token)
        walk.blocks = 0.0
        if token in end or len(walk.ids) == begin + max_new_tokens:
            break
        said = walk.step()
    seconds, new = time.perf_counter() - started, walk.ids[begin:]
    full = _greedy(model, walk.ids[:begin], len(new), set())
    with torch.no_grad():
        truth = choose.again(walk.ids[:begin], new, model.run([walk.ids[:-1]]).logits[0, begin - 1 :])
    agrees = np.array([a == b for a, b in zip(new, truth, strict=True)])
    words = [model.tokenizer.decode([i]) for i in new] if model.tokenizer is not None else [f"#{i}" for i in new]
    data = xr.Dataset({"layer": ("position", layers), "agrees": ("position", agrees), "blocks": ("position", paid), "share_agreeing": agrees.mean(),
                       "blocks_full": walk.n + walk.unembedding, "time": seconds / full[1]},
                      {"position": range(len(new)), "token": ("position", words), "id": ("position", new)},
                      {"text": model.tokenizer.decode(new) if model.tokenizer is not None else "", "states": states})  # fmt: skip
    dearer = np.mean(paid) >= float(data.blocks_full)
    note = f"{np.mean(layers):.1f} of {walk.n} blocks a token, {np.mean(paid):.1f} paid where the whole model pays {float(data.blocks_full):.1f}"
    return Result(data, kind="early exit", title=f"{note}{': dearer than the whole model' if dearer else ''}")


@technique
def draft_and_verify(
    model: Model, prompt: Any, *, layers: int, ahead: int = 4, lens: Any = None, max_new_tokens: int = 40
) -> Result:
    """Greedy text, drafted `ahead` tokens at a time by the first `layers` blocks and judged by all of them at once.

    The tokens are those of greedy generation. Gives over `position` `drafted` (whether the token was a draft that was accepted);
    `accepted`, the share of drafts that were right, `passes`, of the whole model, and `time`, seconds over those of plain
    greedy generation, cached too: above 1 nothing was gained. Raises as `generate_early` does.

    >>> draft_and_verify(model, "The capital of France is", layers=20, ahead=4)  # doctest: +SKIP
    """
    at_least(1, ahead=ahead, max_new_tokens=max_new_tokens, layers=layers)
    n = len(model.anatomy.stacks[-1].blocks)
    if layers >= n:
        raise InputError(f"layers={layers}: a draft by all {n} blocks is the model: expected fewer")
    always = Exit("probability", 0.0, layers=(layers - 1,), lens=lens)
    walk, end = _begun(model, prompt, always, "recompute"), _ends(model)
    begin = len(walk.ids)
    started = time.perf_counter()
    walk.ids.append(int(walk.begin().argmax()))
    accepted, tried, passes = [False], 0, 0
    while len(walk.ids) < begin + max_new_tokens and walk.ids[-1] not in end:
        sure = len(walk.ids)  # what stands is greedy
        walk.depth = walk.n
        for _ in range(min(ahead, begin + max_new_tokens - sure - 1)):
            walk.ids.append(int(walk.run(len(walk.ids) - 1, True).argmax()))
            if walk.ids[-1] in end:
                break
        drafts = walk.ids[sure:]
        said = walk.catch_up(False, every=True).argmax(-1).tolist()  # of the tokens from `whole` on
        passes += 1
        right = next((k for k, draft in enumerate(drafts) if draft != said[sure - 1 - walk.whole + k]), len(drafts))
        tried += len(drafts)
        walk.ids = [*walk.ids[: sure + right], said[sure - 1 - walk.whole + right]]
        accepted += [True] * right + [False]
        if end & set(walk.ids[sure : sure + right]):
            walk.ids, accepted = walk.ids[: sure + right], accepted[:-1]
        walk.whole = sure + right
        walk.take_back()
    seconds, new = time.perf_counter() - started, walk.ids[begin : begin + max_new_tokens]
    words = [model.tokenizer.decode([i]) for i in new] if model.tokenizer is not None else [f"#{i}" for i in new]
    share = sum(accepted[: len(new)]) / max(1, tried)
    data = xr.Dataset({"drafted": ("position", np.array(accepted[: len(new)], dtype=float)), "accepted": share, "passes": passes,
                       "time": seconds / _greedy(model, walk.ids[:begin], len(new), set())[1]},
                      {"position": range(len(new)), "token": ("position", words), "id": ("position", new)},
                      {"text": model.tokenizer.decode(new) if model.tokenizer is not None else ""})  # fmt: skip
    gain = (
        f"{1 / float(data.time):.2f} times as fast" if float(data.time) < 1 else f"{float(data.time):.2f} times as slow"
    )
    return Result(
        data,
        kind="draft and verify",
        title=f"Greedy text, {share:.0%} of {tried} drafts accepted, {gain} as greedy generation",
    )


@dataclass
class _Choice:
    """The next token from logits [1, token]: the most probable, or drawn from what transformers' processors leave."""

    processors: LogitsProcessorList
    generator: torch.Generator | None
    states: list[Tensor] = field(default_factory=list)  # of the generator, before each draw

    @classmethod
    def of(cls, options: dict[str, Any], seed: int) -> _Choice:
        known = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        if unknown := sorted({*options} - known):
            raise InputError(
                f"generate_early() takes no {unknown[0]}={nearest(unknown[0], known)}: a token is chosen greedily or drawn, one prompt at a time"
            )
        asked = sampling(**options)
        made: dict[str, Any] = {"repetition_penalty": RepetitionPenaltyLogitsProcessor}
        made |= {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}  # fmt: skip
        off = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        chosen = [make(asked[k]) for k, make in made.items() if asked.get(k) is not None and asked[k] != off[k]]
        return cls(LogitsProcessorList(chosen), torch.Generator().manual_seed(seed) if asked["do_sample"] else None)

    def __call__(self, ids: list[int], said: Tensor) -> int:
        if self.generator is not None:
            self.states.append(self.generator.get_state())
        return self._chosen(ids, said)

    def again(self, ids: list[int], new: list[int], said: Tensor) -> list[int]:
        """What logits [step, token] say at every step after the same text, with the same draws."""
        found = []
        for step, row in enumerate(said):
            if self.generator is not None:
                self.generator.set_state(self.states[step])
            found.append(self._chosen([*ids, *new[:step]], row[None]))
        return found

    def _chosen(self, ids: list[int], said: Tensor) -> int:
        left = self.processors(torch.tensor([ids]), said.float().cpu())
        return int(left.argmax() if self.generator is None else torch.multinomial(left.softmax(-1), 1, generator=self.generator))  # fmt: skip


def _ends(model: Model) -> set[int]:
    found = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return set() if found is None else set(found) if isinstance(found, list | tuple) else {int(found)}


def _greedy(model: Model, ids: list[int], n: int, end: set[int]) -> tuple[list[int], float]:
    """The whole model's own greedy tokens, cached, by the same loop, and the seconds it took."""
    walk = _Walk(
        model, Exit("margin", float("inf"), layers=()), "recompute", list(ids), DynamicCache(config=model.module.config)
    )
    started, begin = time.perf_counter(), len(ids)
    said = walk.run(0, False)
    while True:
        walk.ids.append(int(said.argmax()))
        if len(walk.ids) >= begin + n or walk.ids[-1] in end:
            return walk.ids[begin:], time.perf_counter() - started
        said = walk.run(len(walk.ids) - 1, False)
