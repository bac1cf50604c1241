"""When could the model have stopped? Policies of early exit as values, judged offline from one pass over some texts.

After some layers the residual is read through a lens and the model's own head; the first check that is sure enough is the exit,
and its first choice the answer.

    probability    max p                    margin    p1 - p2 (CALM, Schuster et al. 2022)
    entropy        -H(p), nats              cosine    cos(h_l, h_l-1), CALM's saturation: no head is needed to check
    stable         for how many checks in a row the first choice has stayed           head      a fitted probe of the state: will this answer stay?

Each is confident at `threshold` or above. What that costs counts the checks: one unembedding is `unembedding` blocks (8 in a
135 M model), and a check after each of ten layers costs more than the whole model. In blocks a token

    blocks = blocks run + checks * (unembedding + lens),     the whole model: blocks + unembedding

without what missing keys and values cost later, which `generate_early` counts.

`calibrate` finds the threshold at which the exits agree with the full model in at least 1 - delta of the cases, with
confidence 1 - epsilon (Learn then Test, Angelopoulos et al. 2021): thresholds are tested from the strictest on, each with its exact
binomial p, until one is not rejected. The guarantee is about texts drawn as these were; tokens of one text are no independent
cases, so one token is drawn from each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.corpus import Row, inputs
from pellucid.engine.pausing import progress
from pellucid.engine.rungs import weights
from pellucid.errors import InputError, Refused, at_least, nearest
from pellucid.lenses.lens import Lens, layer_numbers, logits
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import binomial_p, fixed_sequence, interval
from pellucid.technique import technique

By = Literal["probability", "margin", "entropy", "cosine", "stable", "head"]
GRID = 40  # thresholds that are tried


@dataclass(frozen=True)
class Exit:
    """A policy: what confidence is, from which threshold on, after which layers it is looked at, and through which lens.

    `layers` are by default every third from the middle on, without the last. `lens` is the logit lens unless given (a
    `TunedLens`, any `Affine`); `head` an `ExitHead`. A threshold of infinity never exits.

    >>> Exit("margin", 0.9, layers=(12, 15, 18))
    Exit(by='margin', threshold=0.9, layers=(12, 15, 18), lens=None, head=None)
    """

    by: By = "margin"
    threshold: float = 0.9
    layers: tuple[int, ...] | None = None
    lens: Lens | None = None
    head: ExitHead | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise InputError(f"by={self.by!r}{nearest(str(self.by), get_args(By))}")
        if (self.by == "head") != (self.head is not None):
            raise InputError("by='head' and head=ExitHead(...) go together")

    def checked(self, model: Model) -> list[int]:
        """The layers that are looked at, in order."""
        n = len(model.anatomy.stacks[-1].blocks)
        found = (
            sorted(set(layer_numbers(model, list(self.layers))))
            if self.layers is not None
            else list(range(n // 2, n - 1, 3))
        )
        return [i for i in found if i < n - 1]

    def check(self, model: Model) -> None:
        """Refused where the model does not say the next token; InputError where lens or head belong to other weights."""
        stack = model.anatomy.stacks[-1]
        if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
            raise Refused(
                f"{model.name} does not say the next token of a text in one stack, so it has no early exit of this kind"
            )
        if model.anatomy.head is None or "head" in model.anatomy.refusals:
            raise Refused(
                f"{model.name} cannot exit early: its head cannot be read ({model.anatomy.refusals.get('head', 'it has none')})"
            )
        if self.lens is not None:
            self.lens.check(model)
        if self.head is not None:
            self.head.check(model)

    @property
    def reads(self) -> bool:
        """Whether a check needs the head's logits."""
        return self.by in ("probability", "margin", "entropy", "stable")


def confidence(
    by: str, z: Tensor | None, now: Tensor, before: Tensor | None, told: list[Tensor], layer: int, head: ExitHead | None
) -> Tensor:
    """[row] from logits [row, token], the state [row, d] and the one at the check before; `told` are first choices so far."""
    if by == "cosine":
        return (
            torch.full((len(now),), -1.0)
            if before is None
            else torch.cosine_similarity(now.float(), before.float(), dim=-1).cpu()
        )
    if by == "head":
        assert head is not None
        return head.confidence(layer, now)
    assert z is not None
    if by == "stable":
        run = torch.ones(len(z), dtype=torch.long)
        alive = torch.ones(len(z), dtype=torch.bool)
        for earlier in reversed(told[:-1]):
            alive &= earlier == told[-1]
            run += alive.long()
        return run.float()
    p = z.softmax(-1)
    if by == "entropy":
        return torch.special.entr(p).sum(-1).neg().cpu()
    top = p.topk(2).values
    return (top[:, 0] - (top[:, 1] if by == "margin" else 0)).cpu()


# ---- a trained head


@dataclass(eq=False)
class ExitHead:
    """For each layer a logistic probe of the residual: will the first choice read here be the model's? d + 1 weights a layer.

    >>> head = ExitHead(layers=(18, 21, 24)).fit(model, texts)  # doctest: +SKIP
    """

    layers: tuple[int, ...] | None = None
    tokens: int = 10_000
    context: int | None = None
    penalty: float = 1.0
    lens: Any = None
    weights_: dict[int, Tensor] = field(init=False, repr=False)
    biases_: dict[int, float] = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, texts: Any) -> ExitHead:
        """Learn the probes. InputError where a layer always agrees, or never."""
        from sklearn.linear_model import LogisticRegression

        policy = Exit(layers=self.layers, lens=self.lens)
        made = [
            _passed(model, row, [policy], states=True)
            for row in progress(corpus_rows(model, texts, self.tokens, self.context), "exit head")
        ]
        self.weights_, self.biases_ = {}, {}
        for number, layer in enumerate(policy.checked(model)):
            x = torch.cat([m.states[layer] for m in made]).double().numpy()
            y = np.concatenate([(m.read[0].said[number] == m.final).numpy() for m in made])
            if y.all() or not y.any():
                raise InputError(
                    f"after layer {layer} the answer is {'always' if y.all() else 'never'} the model's: leave it out, or give more text"
                )
            mean, size = x.mean(0), x.std(0) + 1e-6
            solved = LogisticRegression(C=1 / (self.penalty * len(x) ** 0.5), max_iter=500).fit((x - mean) / size, y)
            w = solved.coef_[0] / size
            self.weights_[layer], self.biases_[layer] = (
                torch.tensor(w, dtype=torch.float32),
                float(solved.intercept_[0] - w @ mean),
            )
        self.digest_ = model.digest
        return self

    def confidence(self, layer: int, state: Tensor) -> Tensor:
        """[row] the probability that the answer stays."""
        if layer not in self.weights_:
            raise InputError(f"this head was not fitted after layer {layer}: it knows {sorted(self.weights_)}")
        return (state.float().cpu() @ self.weights_[layer] + self.biases_[layer]).sigmoid()

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights."""
        if not hasattr(self, "digest_"):
            raise InputError("this head is not fitted: call fit(model, texts)")
        check_weights(model, self.digest_, "this exit head")


# ---- one pass


@dataclass
class _Read:
    """What one policy met in one row: [check, position]."""

    said: Tensor
    nll: Tensor
    sure: Tensor


@dataclass
class _Pass:
    """What one row of text gave: of every position that has a next token."""

    final: Tensor  # [position] the model's first choice
    plain: Tensor  # [position] nll
    read: list[_Read]
    states: dict[int, Tensor]


@torch.no_grad()
def _passed(model: Model, row: Row, policies: Sequence[Exit], states: bool = False) -> _Pass:
    """One run of a row; each lens reads each layer once, whatever the number of policies."""
    given = inputs(model, [row])
    checked = [p.checked(model) for p in policies]
    names = {i: str(model.sites(f"layers.{i}.resid_post")[0]) for i in sorted({i for each in checked for i in each})}
    run = model.run(given, keep=[*names.values()])
    after = given.stream("").ids[0, 1:, None].to(run.logits.device)
    last = run.logits[0, :-1].float()
    found = _Pass(last.argmax(-1).cpu(), -last.log_softmax(-1).gather(1, after)[:, 0].cpu(), [], {})
    made: list[list[list[Tensor]]] = [[[], [], []] for _ in policies]
    before: list[Tensor | None] = [None] * len(policies)
    for i, name in names.items():
        x = run.tensor(name)[0, :-1]
        if states:
            found.states[i] = x.float().cpu()
        seen: dict[int, Tensor] = {}
        for number, policy in enumerate(policies):
            if i not in checked[number]:
                continue
            if id(policy.lens) not in seen:
                seen[id(policy.lens)] = logits(model, x, name, policy.lens)
            z = seen[id(policy.lens)]
            said, nll, sure = made[number]
            said.append(z.argmax(-1).cpu())
            nll.append(-z.log_softmax(-1).gather(1, after)[:, 0].cpu())
            sure.append(confidence(policy.by, z, x, before[number], said, i, policy.head))
            before[number] = x
    empty = torch.zeros(0, len(found.final))
    found.read = [_Read(*(torch.stack(each) if each else empty for each in parts)) for parts in made]
    return found


def costs(model: Model) -> tuple[float, int]:
    """One unembedding in blocks, by weights; and how many blocks there are."""
    head, blocks = weights(model.anatomy)
    return head / max(1, sum(blocks) / len(blocks)), len(blocks)


def lens_cost(model: Model, lens: Lens | None) -> float:
    """One translation in blocks, by weights."""
    sizes = [w.numel() for w in getattr(lens, "weights_", {}).values()]
    return max(sizes, default=0) / max(1, weights(model.anatomy)[1][0])


@dataclass
class _Judged:
    """[token] of one policy, with the number of the row each comes from."""

    layer: np.ndarray  # blocks run
    agrees: np.ndarray
    added: np.ndarray
    exited: np.ndarray
    checks: np.ndarray
    row: np.ndarray


def _judge(passes: Sequence[_Pass], number: int, layers: Sequence[int], n: int, threshold: float) -> _Judged:
    columns = []
    for row, each in enumerate(passes):
        read = each.read[number]
        hit = read.sure >= threshold
        any_ = hit.any(0) if len(layers) else torch.zeros(len(each.final), dtype=torch.bool)
        first = (
            torch.where(any_, hit.float().argmax(0), len(layers))
            if len(layers)
            else torch.zeros(len(each.final), dtype=torch.long)
        )
        said, nll = torch.cat([read.said.long(), each.final[None]]), torch.cat([read.nll, each.plain[None]])
        depth, pick = torch.tensor([*(i + 1 for i in layers), n]), (first, torch.arange(len(first)))
        columns.append([depth[first], said[pick] == each.final, nll[pick] - each.plain, any_, torch.where(any_, first + 1, len(layers)), torch.full((len(first),), row)])  # fmt: skip
    return _Judged(*(torch.cat([c[k].double() for c in columns]).numpy() for k in range(6)))


@technique
def exits(
    model: Model,
    texts: Any,
    policies: Mapping[str, Exit] | Sequence[Exit] | Exit,
    *,
    tokens: int = 2048,
    context: int | None = 64,
    seed: int = 0,
) -> Result:
    """What each policy of early exit would have done on some texts, from one pass over them.

    Gives over `policy` `agreement` (share of tokens with the full model's first choice; `low`, `high` over rows of text), the
    mean `layer` (blocks run), `exited`, `added` (nats a token), `checks`, and `blocks` with the checks paid; `oracle`, the
    mean number of blocks after which the answer stays, read through its lens at its checks; and `full`, the whole model's blocks.
    The title names the policies that are cheaper than the model, or says that none is. Refused for models that do not say the next token in one stack.

    >>> exits(model, texts, [Exit("margin", 0.9), Exit("cosine", 0.99)])  # doctest: +SKIP
    """
    at_least(1, tokens=tokens)
    named = _named(policies)
    for policy in named.values():
        policy.check(model)
    every = sorted({i for p in named.values() for i in p.checked(model)})
    rows = corpus_rows(model, texts, tokens, context)
    unembedding, n = costs(model)
    passes = [_passed(model, row, [*named.values()]) for row in progress(rows, "exits")]
    found: dict[str, list[float]] = {}
    for number, policy in enumerate(named.values()):
        layers = policy.checked(model)
        judged = _judge(passes, number, layers, n, policy.threshold)
        check = unembedding + lens_cost(model, policy.lens) if policy.reads else 0.0
        end = (
            (1 - judged.exited) * unembedding if policy.reads else unembedding
        )  # the check's own logits are the answer
        columns = {"agreement": judged.agrees, "layer": judged.layer, "exited": judged.exited, "added": judged.added, "checks": judged.checks,
                   "blocks": judged.layer + judged.checks * check + end}  # fmt: skip
        low, high = interval(judged.agrees, seed, groups=judged.row, within=(0, 1))
        stays = _oracle(passes, number, layers, n)
        for name, value in {
            **{k: v.mean() for k, v in columns.items()},
            "low": low,
            "high": high,
            "oracle": stays,
        }.items():
            found.setdefault(name, []).append(float(value))
    data = xr.Dataset({k: ("policy", v) for k, v in found.items()}, {"policy": list(named)})
    data = data.assign(full=n + unembedding, unembedding=unembedding)
    cheaper = [f"{p} (agrees in {float(g):.0%})" for p, g, b in zip(named, data.agreement.values, data.blocks.values, strict=True) if b < n + unembedding]  # fmt: skip
    note = f"cheaper than the full model, checks counted: {', '.join(cheaper) or 'none of these policies'}"
    return Result(
        data.assign_attrs(tokens=int(sum(len(r.ids) for r in rows)), layers=every),
        kind="exits",
        title=f"Early exits: {note}",
    )


def _named(policies: Any) -> dict[str, Exit]:
    if isinstance(policies, Exit):
        policies = [policies]
    named = (
        dict(policies)
        if isinstance(policies, Mapping)
        else {f"{p.by} >= {p.threshold:g}" + (" through a lens" if p.lens is not None else ""): p for p in policies}
    )
    if not named or not all(isinstance(p, Exit) for p in named.values()):
        raise InputError("policies= are Exit(...), one or several, or a mapping of names to them")
    return named


def _oracle(passes: Sequence[_Pass], number: int, layers: Sequence[int], n: int) -> float:
    """Mean number of blocks after which every later check says what the model says."""
    found = []
    for each in passes:
        right = torch.cat([each.read[number].said == each.final, torch.ones_like(each.final, dtype=torch.bool)[None]])
        stays = right.flip(0).long().cumprod(0).flip(0)
        found.append(torch.tensor([*(i + 1 for i in layers), n])[(stays == 0).sum(0)].double())
    return float(torch.cat(found).mean())


# ---- thresholds with a guarantee


@technique
def calibrate(
    model: Model,
    texts: Any,
    policy: Exit,
    *,
    delta: float = 0.1,
    epsilon: float = 0.05,
    per_text: int | None = 1,
    tokens: int = 20_000,
    context: int | None = 64,
    seed: int = 0,
) -> Result:
    """The lowest threshold at which exits agree with the full model in at least 1 - delta of cases, with confidence 1 - epsilon.

    A case is a token drawn at random from a row of text (`per_text` of each; None: all of them, as if they were independent,
    which tokens of one text are not: then the guarantee does not hold, and the title says so). Give one row for each text.
    Gives over `threshold`, from the strictest on, `agreement` on these cases, `p` of "disagrees more often than delta",
    `layer`, `kept` (whether it was reached and rejected); `chosen`, infinity where none is: then `chosen_policy(result, policy)` never exits.

    >>> safe = chosen_policy(calibrate(model, texts, Exit("margin"), delta=0.1), Exit("margin"))  # doctest: +SKIP
    """
    if not (0 < delta < 1 and 0 < epsilon < 1):
        raise InputError(f"delta={delta!r}, epsilon={epsilon!r}: expected numbers between 0 and 1")
    policy.check(model)
    layers, n = policy.checked(model), costs(model)[1]
    rows = corpus_rows(model, texts, tokens, context)
    passes = [_passed(model, row, [policy]) for row in progress(rows, "calibration")]
    rng = np.random.default_rng(seed)
    if per_text is not None:
        at_least(1, per_text=per_text)
        passes = [_at(each, rng.permutation(len(each.final))[:per_text]) for each in passes if len(each.final)]
    grid = thresholds(policy.by, len(layers), _vocabulary(model))
    judged = [_judge(passes, 0, layers, n, float(t)) for t in grid]
    wrong = np.array([(1 - j.agrees).sum() for j in judged])
    cases = len(judged[0].agrees)
    p = binomial_p(wrong, cases, delta)
    kept = fixed_sequence(p, epsilon)
    data = xr.Dataset({"agreement": ("threshold", 1 - wrong / cases), "p": ("threshold", p), "layer": ("threshold", [j.layer.mean() for j in judged]),
                       "kept": ("threshold", np.arange(len(grid)) < kept), "chosen": float(grid[kept - 1]) if kept else float("inf"), "cases": cases},
                      {"threshold": grid}, {"delta": delta, "epsilon": epsilon})  # fmt: skip
    independent = per_text == 1 or all(len(each.final) == 1 for each in passes)
    note = "" if independent else " (tokens of one text taken for independent: no guarantee)"
    said = (
        f"exits at {data.chosen.item():.3g} agree in at least {1 - delta:g} of cases"
        if kept
        else f"no threshold is shown to agree in {1 - delta:g} of cases"
    )
    return Result(data, kind="exit calibration curve", title=f"{said}, with confidence {1 - epsilon:g}{note}")


def chosen_policy(result: Result, policy: Exit) -> Exit:
    """The policy with the threshold that `calibrate` found."""
    return replace(policy, threshold=float(result.data.chosen))


def _vocabulary(model: Model) -> int:
    config: Any = model.module.config
    return int(getattr(config.get_text_config(), "vocab_size", 2))


def thresholds(by: str, checks: int, tokens: int) -> np.ndarray:
    """Strictest first, and chosen without the texts: what a fixed sequence of tests needs.

    >>> thresholds("stable", 3, 100)
    array([3., 2., 1.])
    """
    if by == "stable":
        return np.arange(checks, 0, -1.0)
    return -np.geomspace(1e-3, np.log(tokens), GRID) if by == "entropy" else 1 - np.geomspace(1e-4, 1, GRID)


def _at(each: _Pass, chosen: np.ndarray) -> _Pass:
    at = torch.as_tensor(np.sort(chosen))
    read = [_Read(r.said[:, at], r.nll[:, at], r.sure[:, at]) for r in each.read]
    return _Pass(each.final[at], each.plain[at], read, {})
