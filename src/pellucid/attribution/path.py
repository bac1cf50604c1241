"""The model as a function of its token embeddings: what gradient methods differentiate and integrate.

The embedding module's output is replaced where it is made, so that nothing else about the forward pass changes:
this serves families that take no `inputs_embeds`, and encoder-decoders whose stacks share an embedding. Positions
and segments stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.modes import accepted_by, evaluating, uncached
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.sites import TOKENS as SITE_DIMS
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.attribution.case import Case
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import Spot, locate
from pellucid.engine.lockstep import asked
from pellucid.engine.run import Run, Session
from pellucid.errors import InputError, Refused

ROWS_OF_TOKENS = 512  # tokens in one batch: more are no faster on a CPU (an accelerator takes FASTER times as many)
FASTER = 16


class Embedded:
    """A case as a function of its token embeddings [row, position, d], many versions of them in one batch.

    Within `in_step` the versions of several cases share batches (see `Pack`).
    """

    inside = False  # the values are met behind the embedding: edits there are part of them

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.lengths = case, case.model, case.lengths
        sites = (Site("embed.tokens", stack=name) for name in case.streams)
        self.taps = [locate(self.model.anatomy, site).tap for site in sites]
        self.modules: list[Any] = [self.model.module.get_submodule(tap.module) for tap in self.taps]
        parts = [self._look_up(m, s.ids) for m, s in zip(self.modules, case.streams.values(), strict=True)]
        if len({part.shape[-1] for part in parts}) > 1:
            raise Refused(
                f"{self.model.name} embeds source and target tokens in widths that differ: attribute one token"
            )
        self.values = torch.cat(parts, 1)  # [1, position, d] of the prompt itself

    def _look_up(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = module(ids)
        return made

    def embed(self, ids: Tensor) -> Tensor:
        """[1, position, d] of token ids [position], one for each credited position."""
        parts = ids.split(self.case.lengths)
        return torch.cat([self._look_up(m, part[None]) for m, part in zip(self.modules, parts, strict=True)], 1)

    @cached_property
    def mean(self) -> Tensor:
        """[1, position, d], the mean over the vocabulary, as the embedding hands tokens out (some families scale them)."""
        means = []
        for module, length in zip(self.modules, self.case.lengths, strict=True):
            ids = torch.arange(len(module.weight), device=module.weight.device)
            total = torch.stack([self._look_up(module, part[None]).double().sum(1)[0] for part in ids.split(8192)])
            means.append((total.sum(0) / len(ids)).to(self.values.dtype).expand(length, -1))
        return torch.cat(means)[None]

    # ---- running

    def met(self, taps: list[Tap], embeddings: Tensor) -> dict[Tap, Tensor]:
        """What is met at taps when the model runs on these embeddings."""
        kept: dict[Tap, Tensor] = {}
        with torch.no_grad():
            pack = Pack([(self, embeddings)])
            pack.run(pack.joined(), handlers={tap: partial(kept.__setitem__, tap) for tap in taps})
        return kept

    def scores(self, embeddings: Tensor) -> Tensor:
        """[row, output] of the target, differentiable; where the last positions are read, only those are unembedded."""
        found: Tensor = asked(_scores, (self, embeddings))
        return found

    def gradients(
        self, embeddings: Tensor, reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient
    ) -> tuple[Tensor, Tensor]:
        """The targets [row, output] and their gradients [row, output, position, d], all from one forward pass; `reduce`
        is applied to that of each output, [row, position, d]. Refused without a gradient."""
        found: tuple[Tensor, Tensor] = asked(_gradients, (self, embeddings, reduce))
        return found

    def batches(self, rows: int) -> int:
        """How many rows to ask for at once."""
        return max(1, min(rows, self.room // self.values.shape[1]))

    @property
    def room(self) -> int:
        """Tokens in one batch."""
        return ROWS_OF_TOKENS * (1 if self.values.device.type == "cpu" else FASTER)

    @cached_property
    def spared(self) -> tuple[dict[str, Any], int]:
        return spared(self.case)

    @cached_property
    def kind(self) -> Hashable:
        return _kind(self)


class Inside(Embedded):
    """The same from further up: the model as a function of what is met at one site, such as layers.3.resid_pre.

    Only the stream of that site moves; `place` is where its positions are among the credited ones."""

    inside = True

    def __init__(self, embedded: Embedded, site: Site | str) -> None:
        self.case, self.model = embedded.case, embedded.model
        sites = self.model.sites(site)
        if len(sites) != 1 or sites[0].dims != SITE_DIMS or sites[0].at is not None or sites[0] != sites[0].whole:
            raise InputError(
                f"site={str(site)!r} must name one place where every position has a vector of the residual stream's width, "
                "such as 'layers.3.resid_pre'"
            )
        spot, streams = locate(self.model.anatomy, sites[0]), list(self.case.streams)
        if spot.stream not in streams:
            raise InputError(
                f"site={str(site)!r} is in the {spot.stream}, but credit goes to the {' and '.join(streams)}"
            )
        before = self.case.lengths[: streams.index(spot.stream)]
        self.lengths = [self.case.lengths[len(before)]]
        self.place = slice(sum(before), sum(before) + self.lengths[0])
        self.taps = [spot.tap]
        self.values = self.of(embedded, embedded.values)

    def of(self, embedded: Embedded, embeddings: Tensor) -> Tensor:
        """[1, position, d] what is met here when the model runs on these embeddings."""
        return embedded.met(self.taps, embeddings)[self.taps[0]]


# ---- batches of one or several cases


class Pack:
    """Rows of cases on one model, as one batch: each `part` is a case's with embeddings [row, position, d].

    Shorter prompts are padded on the right, where the model's own padding keeps them from being seen; every case reads its
    own rows and columns, as if it were alone.
    """

    def __init__(self, parts: Sequence[tuple[Embedded, Tensor]]) -> None:
        self.parts = parts
        self.first = parts[0][0]
        self.model, self.case = self.first.model, self.first.case
        ends = list(accumulate((len(x) for _, x in parts), initial=0))
        self.rows = [slice(a, b) for a, b in pairwise(ends)]
        self.widths = [max(sizes) for sizes in zip(*(e.lengths for e, _ in parts), strict=True)]

    @cached_property
    def inputs(self) -> Inputs:
        """The cases' prompts, each as often as it has rows."""
        if len(self.parts) == 1:
            return self.case.inputs.rows([0] * len(self.parts[0][1]))
        return self.model.beside([e.case.inputs for e, _ in self.parts], [len(x) for _, x in self.parts])

    def joined(self) -> list[Tensor]:
        """[row, position, d] of each stream that moves."""
        rows = [x.split(e.lengths, dim=1) for e, x in self.parts]
        return [
            torch.cat([_widened(x, w) for x in xs]) for xs, w in zip(zip(*rows, strict=True), self.widths, strict=True)
        ]

    def cut(self, joined: Sequence[Tensor], k: int) -> Tensor:
        """A part's own [row, position, ...] of what lies as `joined` does."""
        lengths = self.parts[k][0].lengths
        return torch.cat([x[self.rows[k], :n] for x, n in zip(joined, lengths, strict=True)], 1)

    def run(
        self, joined: Sequence[Tensor], keep: Sequence[Site] = (), handlers: dict[Tap, Handler] | None = None,
        **forward: Any,
    ) -> tuple[Any, dict[Tap, Tensor]]:  # fmt: skip
        """The model's output for embeddings as `joined` has them, under the cases' edits, and what is kept."""
        session = Session(self.model.anatomy, self.inputs, keep, self.case.edits)
        if self.first.inside:
            for tap in self.first.taps:
                session.writing.pop(tap, None)
        each = session.handlers()
        for tap, look in (handlers or {}).items():
            each[tap] = partial(_both, each.get(tap), look)
        for tap, new in zip(self.first.taps, joined, strict=True):
            each[tap] = partial(_instead, new, each.get(tap))
        with evaluating(self.model.module), Wiretap(self.model.module, each, self.rows[-1].stop) as wire:
            output = self.model.module(**{**self.inputs.tensors, **uncached(self.model.module), **forward})
        session.check(wire)
        return output, session.kept

    def scores(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """[row, output] of every part."""
        site = self.case.question.site
        if site is not None:
            spot = locate(self.model.anatomy, site.whole)
            kept = self.run(joined, [site.whole])[1][spot.tap]
            return [self._read_at(site, spot, kept, k) for k in range(len(self.parts))]
        reads = [e.spared[1] for e, _ in self.parts]
        sizes = [e.case.inputs.stream("").ids.shape[1] for e, _ in self.parts]
        width, first, forward = self.inputs.stream("").ids.shape[1], 0, dict(self.first.spared[0])
        forward.pop("logits_to_keep", None)
        if all(reads):  # only the last columns are unembedded, down to the first that is read
            first = min(n - read for n, read in zip(sizes, reads, strict=True))
            forward["logits_to_keep"] = width - first
        else:
            reads = sizes
        found, made = main_output(self.run(joined, **forward)[0]), []
        by_column = found.ndim > 2 and found.shape[1] == width - first
        for (e, x), rows, n, read in zip(self.parts, self.rows, sizes, reads, strict=True):
            mask = e.case.inputs.stream("").mask.expand(len(x), -1)[:, n - read :]
            made.append(
                e.case.question.read(found[rows, n - read - first : n - first] if by_column else found[rows], mask)
            )
        return made

    def _read_at(self, site: Site, spot: Spot, kept: Tensor, k: int) -> Tensor:
        case = self.parts[k][0].case
        own = kept[self.rows[k]].narrow(spot.position_axis, 0, case.inputs.stream(spot.stream).ids.shape[1])
        return case.read(Run(self.model.anatomy, case.inputs, None, {spot.tap: own}, [site.whole]).tensor(site))


def _scores(items: Sequence[tuple[Embedded, Tensor]]) -> list[Tensor]:
    found: list[list[Tensor]] = [[] for _ in items]
    for chosen in packed(items):
        pack = Pack([(items[i][0], items[i][1][rows]) for i, rows in chosen])
        for (i, _), scores in zip(chosen, pack.scores(pack.joined()), strict=True):
            found[i].append(scores)
    return [torch.cat(each) for each in found]


def _gradients(items: Sequence[tuple[Embedded, Tensor, Callable[[Tensor], Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in items]
    model = items[0][0].model
    model.anatomy.check_gradients()
    blind: list[str] = model.memo("what stops gradients", list)  # the first such module; "" for none
    for chosen in packed(items):
        pack = Pack([(items[i][0], items[i][1][rows]) for i, rows in chosen])
        with torch.enable_grad(), ExitStack() as hooks:
            leaves = [x.detach().requires_grad_() for x in pack.joined()]
            if not blind:
                _watch(model.module, hooks, blind)
            scores = pack.scores(leaves)
            blind.append("")
            if blind[0] or not all(s.requires_grad for s in scores):
                where = f" (it ends at {blind[0]!r})" if blind[0] else ""
                raise Refused(
                    f"no gradient reaches the embeddings of {model.name}{where}: its weights are quantised, or the "
                    "target counts; use a method that only runs the model: occlusion, shapley, kernel_shap or lime"
                )
            made: list[list[Tensor]] = [[] for _ in chosen]
            most = max(s.shape[1] for s in scores)
            for o in range(most):  # prompts do not meet, so the sum over them serves each
                asking = [k for k, s in enumerate(scores) if o < s.shape[1]]
                total = torch.stack([scores[k][:, o].sum() for k in asking]).sum()
                gradient = torch.autograd.grad(total, leaves, retain_graph=o + 1 < most, allow_unused=True)
                full = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradient, strict=True)]
                for k in asking:
                    made[k].append(items[chosen[k][0]][2](pack.cut(full, k)))
        for (i, _), s, each in zip(chosen, scores, made, strict=True):
            found[i].append((s.detach(), torch.stack(each, 1)))
    return [(torch.cat([s for s, _ in each]), torch.cat([g for _, g in each])) for each in found]


def packed(items: Sequence[tuple[Any, ...]]) -> list[list[tuple[int, slice]]]:
    """Which rows of which (embedded, embeddings, ...) share a batch: those of like cases, shorter prompts first."""
    groups: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item[0].kind, []).append(i)
    made: list[list[tuple[int, slice]]] = []
    for members in groups.values():
        members.sort(key=lambda i: sum(items[i][0].lengths))
        chosen: list[tuple[int, slice]] = []
        size = 0
        for i in members:
            rows, width, start = len(items[i][1]), sum(items[i][0].lengths), 0
            while start < rows:
                room = items[i][0].room // width - size
                if room < 1 and chosen:
                    made.append(chosen)
                    chosen, size = [], 0
                    continue
                stop = min(rows, start + max(1, room))
                chosen.append((i, slice(start, stop)))
                size, start = size + stop - start, stop
        made.append(chosen)
    return made


def _kind(embedded: Embedded) -> Hashable:
    """What the cases of one batch must share."""
    case, question = embedded.case, embedded.case.question
    inputs = case.inputs
    own = (id(case.model), tuple(embedded.taps), tuple(map(id, case.edits)), embedded.inside, str(question.site or ""))
    first = inputs.streams.get("encoder", inputs.stream(""))
    plain = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids"}
    shapes = {k: tuple(v.shape) for k, v in inputs.tensors.items() if isinstance(v, Tensor)}
    rows = {k: s for k, s in shapes.items() if k != "decoder_input_ids"}
    like = inputs.tensors.keys() <= plain and all(s == tuple(first.ids.shape) for s in rows.values())
    if not like or first.padded or (question.site is not None and "key" in question.site.dims):
        return (*own, id(case))
    length = 0 if case.model.paddable else first.ids.shape[1]
    return (*own, tuple(sorted(inputs.tensors)), shapes.get("decoder_input_ids"), length, embedded.spared[1] > 0)


def _watch(root: nn.Module, hooks: ExitStack, blind: list[str]) -> None:
    """Quantised layers let no gradient through while residual connections around them do: look for such layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        if _cuts(module, args[0] if args else None, made):
            blind.append(name)

    for name, module in root.named_modules():
        hooks.callback(module.register_forward_hook(partial(hook, name)).remove)


def _widened(x: Tensor, width: int) -> Tensor:
    """Up to a width; what nobody sees is the last vector again, which is a value as the model knows them."""
    missing = width - x.shape[1]
    return x if not missing else torch.cat([x, x[:, -1:].detach().expand(-1, missing, -1)], 1)


def spared(case: Case) -> tuple[dict[str, Any], int]:
    """Arguments that spare the model work nobody reads, and how many positions are unembedded (0: all)."""
    accepted = accepted_by(case.model.module)
    forward: dict[str, Any] = uncached(case.model.module)
    bound = case.question.metric
    last = "logits_to_keep" in accepted and bound is not None and bound.positions and max(bound.positions) < 0
    if bound is None or not last or case.inputs.stream("").padded:
        return forward, 0
    read = -min(bound.positions or (-1,))
    return {**forward, "logits_to_keep": read}, read


def _cuts(module: nn.Module, x: Any, made: Any) -> bool:
    """Whether a module's output, unlike its input, has lost the gradient: weights that are whole numbers, or packed."""
    if not (isinstance(x, Tensor) and isinstance(made, Tensor) and x.requires_grad and made.is_floating_point()):
        return False
    if made.shape[:-1] != x.shape[:-1] or not torch.is_grad_enabled():
        return False
    if made.grad_fn is not None:
        return "NotImplemented" in made.grad_fn.name()
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(t.ndim > 1 and not t.is_floating_point() for t in held)


def _both(first: Handler | None, then: Handler, x: Tensor) -> Tensor | None:
    edited = None if first is None else first(x)
    seen = then(x if edited is None else edited)
    return edited if seen is None else seen


def _instead(new: Tensor, then: Handler | None, old: Tensor) -> Tensor:
    made = new.clone()  # the model may work on it in place
    edited = None if then is None else then(made)
    return made if edited is None else edited
