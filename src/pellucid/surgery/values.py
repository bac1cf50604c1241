"""Which value must a layer give a subject so that the model says the new answer?

For each fact the change delta of what the memory makes at the subject's last token that minimises

    mean over contexts of -log p(new) / tokens + kl KL(p || p0 at "{} is a") + decay |delta| / |h|,      |delta| <= clamp |h|

with h the residual there (Meng et al. 2022, 2023). All facts are optimised at once and do not meet: prompts are rows, and Adam works
on each number alone. Only the blocks above the layer and the positions from the subject on are run, on the packed rung of the
sweep planner, and one row a token of the answer is unembedded.

Papers and code part. The KL is taken at the last token of "{} is a", as the paper says; the released code takes it at the subject's
last token. In front of it stands "It is said that" here, since the first token of a text may be an attention sink that has no key of
its own. It is KL(edited || unedited) as in both. The decay is in the code only, over |v0|^2, and the step (.5) and the bound (4
|v0| in ROME, .75 |h| in MEMIT) are absolute there or relative to v0; here all three are relative to h, so that they mean the same in every
model. The released loop stops when the whole loss is below .05, which its decay often forbids; here a fact rests when it
has p(new) >= `enough`. Delta is added to what W makes, so a norm or a factor behind it counts, and is worth as much in
the residual where neither stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pellucid.anatomy.modes import running
from pellucid.engine.edits import Edit, Place
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import Variant
from pellucid.engine.pausing import progress
from pellucid.engine.rungs import LADDER, Job
from pellucid.engine.sweep import Plan, default_memory
from pellucid.engine.trial import certified
from pellucid.engine.writing import Written
from pellucid.errors import InputError, Refused
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.surgery.keys import Memory, Row, averaged, batched, keys


@dataclass(frozen=True)
class Search:
    """How values are searched: `steps` of Adam with `learning_rate` times the root mean square of the residual; weights of the
    `kl` at what else is said of the subject and of the `decay`; the `clamp` on |delta| / |h|; p(new) that is `enough`.

    >>> Search(steps=15).clamp
    0.75
    """

    steps: int = 25
    learning_rate: float = 0.1
    kl: float = 0.0625
    decay: float = 0.05
    clamp: float = 0.75
    enough: float = 0.95

    def __post_init__(self) -> None:
        positive = self.learning_rate > 0 and self.clamp > 0 and 0 < self.enough <= 1
        if self.steps < 1 or not positive or not (self.kl >= 0 and self.decay >= 0):
            raise InputError(
                f"{self}: expected at least one step, a positive learning_rate and clamp, kl and decay of 0 or more, enough up to 1"
            )


@dataclass(eq=False)
class Values:
    """What was found for each fact: `delta` [fact, d] at `memory`, the mean `keys` [fact, n], `h` [fact] the length of the residual
    there, and `history` [step, fact] of -log p(new)."""

    memory: list[Memory]
    rows: list[Row]
    keys: Tensor
    delta: Tensor
    h: Tensor
    history: Tensor
    routed: Tensor = field(repr=False)  # [row]

    def one(self, fact: int) -> Values:
        """Those of one fact."""
        which = slice(fact, fact + 1)
        return Values(
            self.memory[which], [], self.keys[which], self.delta[which], self.h[which], self.history[:, which], self.routed[:0]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Moved(Edit):
    """Adds [row, d] at the one position of each row."""

    by: Callable[[], Tensor] = torch.zeros

    def new(self, x: Tensor, place: Place) -> Tensor:
        return x + self.by()[:, None].to(x)


class Batch:
    """Rows that are run together from the memory on, with delta added at the subject."""

    def __init__(
        self, model: Model, memory: Sequence[Memory], given: Sequence[Row], routed: Tensor, inputs: Inputs
    ) -> None:
        self.rows, self.delta = given, torch.zeros(())
        self.facts = torch.tensor([row.fact for row in given])
        answers = [list(row.answer) for row in given]
        self.new = torch.tensor([bool(a) for a in answers])
        self.tokens = torch.tensor([a or [0] * len(given[0].read) for a in answers])
        anatomy = model.anatomy
        where = {m.expert: m for m in memory}
        writers, layer = [], memory[0].layer
        for expert, m in where.items():
            mine = torch.tensor([memory[row.fact].expert == expert for row in given]) & (routed != 0)
            edit = Moved(m.made(model).site, by=partial(self._moves, mine))
            writers.append(Written(edit, m.made(model)))
        stack = anatomy.stacks[0]
        inside = len(anatomy.stacks) == 1
        stream = inputs.stream(stack.name)
        start = int((stream.starts + torch.tensor([row.at for row in given])).min()) if inside else 0
        metric = BoundMetric("values", given[0].read, None, lambda z: z.sum((1, 2)))
        job = Job(anatomy, inputs, metric, lambda: certified(anatomy).shapes)
        variant = Variant(0, writers, layer if inside else -1, start)
        self.plan = Plan(job, [variant], LADDER, default_memory(anatomy))
        self.model = model

    def _moves(self, mine: Tensor) -> Tensor:
        return self.delta[self.facts] * mine[:, None]

    def begin(self, d: int) -> None:
        """Choose the rung, and read what is said without a change."""
        self.delta = torch.zeros(int(self.facts.max()) + 1, d)
        with torch.no_grad():
            self.plan.settle()
            self.plain = self.plan.rung.clean(self.plan.job).float().log_softmax(-1)

    def losses(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(new) a token of the rows that ask for it, and KL(p || p0) of the others, [row] each."""
        self.delta = delta
        (chunk,) = self.plan.chunks(self.plan.variants)
        log_p = self.plan.logits(chunk)[0].float().log_softmax(-1)
        said = -log_p.gather(2, self.tokens.to(log_p.device)[..., None])[..., 0].mean(1)
        kl = (
            (log_p.exp() * (log_p - self.plain.to(log_p.device))).sum(-1).mean(1)
            if not bool(self.new.all())
            else 0 * said
        )
        return said, kl


def find_values(
    model: Model, memory: list[Memory], given: list[Row], others: Sequence[Row] = (), search: Search | None = None
) -> Values:
    """The values of several facts at their memories; `given` are the prompts that should be answered with the new answer,
    `others` what else is said of the subjects. Refused where the model gives no gradients, or where no context takes the expert."""
    search = search or Search()
    if not isinstance(search, Search):
        raise InputError(f"search={search!r:.80}: expected pl.surgery.Search(steps=..., ...)")
    anatomy = model.anatomy
    anatomy.check_gradients()
    every = [*given, *others]
    k, routed = keys(model, memory, every)
    n, facts = len(given), len(memory)
    for f in range(facts):
        if not any(routed[i] for i in range(n) if given[i].fact == f):
            raise Refused(
                f"no prompt of fact {f} takes expert {memory[f].expert} of layer {memory[f].layer}: choose another layer"
            )
    h = residuals(model, memory[0].layer, given)
    size = averaged(h.norm(dim=1), given)
    scale = averaged(h.square().mean(1).sqrt(), given).float()
    batches = [
        Batch(model, memory, [every[i] for i in numbers], routed[numbers], inputs)
        for numbers, inputs in batched(model, every)
    ]
    d = h.shape[1]
    count = torch.zeros(facts).index_add(0, torch.tensor([r.fact for r in given]), torch.ones(n))
    about = torch.zeros(facts).index_add(
        0, torch.tensor([r.fact for r in others], dtype=torch.long), torch.ones(len(others))
    )
    theta = torch.zeros(facts, d, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=search.learning_rate)
    history, resting, last = list[Tensor](), torch.zeros(facts, dtype=torch.bool), torch.zeros(facts)
    with running(anatomy.module), progress[None](what="values", total=search.steps) as bar:
        for batch in batches:
            batch.begin(d)
        for step in range(search.steps + 1):
            with torch.enable_grad():
                said = torch.zeros(facts)
                theta.grad = torch.zeros_like(theta)
                for batch in batches:
                    if bool(resting[batch.facts].all()):
                        said = said.index_add(
                            0, batch.facts[batch.new], last[batch.facts[batch.new]] / count[batch.facts[batch.new]]
                        )
                        continue
                    nll, kl = (x.cpu() for x in batch.losses(theta * scale[:, None]))
                    w = torch.where(batch.new, 1 / count[batch.facts], search.kl / about[batch.facts].clamp_min(1))
                    loss = (w * torch.where(batch.new, nll, kl)).sum()
                    said = said.index_add(0, batch.facts[batch.new], (w * nll.detach())[batch.new])
                    if step < search.steps:
                        theta.grad += torch.autograd.grad(loss, theta)[0]
                if step == 0 and bool((gone := ~theta.grad.any(1) & ~resting).any()):
                    raise InputError(
                        f"nothing that layer {memory[0].layer} does at the subject of fact {int(gone.nonzero()[0])} reaches its answer: "
                        "choose an earlier layer"
                    )
                decay = search.decay * ((theta * scale[:, None]).norm(dim=1) / size.float()).sum()
                theta.grad += torch.autograd.grad(decay, theta)[0]
            last = said.detach()
            history.append(last)
            resting = resting | (last <= -torch.tensor(search.enough).log())
            bar.step(1, loss=float(last.mean()))
            if step == search.steps or bool(resting.all()):
                break
            before = theta.detach().clone()
            adam.step()
            with torch.no_grad():
                length = (theta * scale[:, None]).norm(dim=1)
                theta *= (search.clamp * size.float() / length.clamp_min(1e-12)).clamp(max=1)[:, None]
                theta[resting] = before[resting]
    for batch in batches:
        batch.plan.job.forget()
    delta = (theta.detach() * scale[:, None]).double()
    return Values(memory, every, averaged(k[:n], given, routed[:n]), delta, size, torch.stack(history), routed)


def residuals(model: Model, layer: int, given: Sequence[Row]) -> Tensor:
    """[row, d] the residual after a layer at each subject's last token, in float64 on the CPU."""
    stack = model.anatomy.stacks[0]
    site = f"{stack.prefix}layers.{layer}.resid_post@edited"
    made = torch.zeros(len(given), stack.d_model, dtype=torch.float64)
    for numbers, inputs in batched(model, given):
        made[numbers] = model.run(inputs, keep=[site], logits=False).tensor(site)[:, 0].double().cpu()
    return made
