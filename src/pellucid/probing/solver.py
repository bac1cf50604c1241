"""Many multinomial logistic regressions on the same features, at once and to convergence.

A problem is a set of targets y, example weights w (folds, prefixes and bootstraps are weights) and a strength l2:

    minimise  sum_i w_i * -log softmax(W x_i + b)[y_i]  +  l2 / 2 * |W|^2

scikit-learn's LogisticRegression with C = 1 / l2, for two classes too (its single row is the difference of ours, so the
strength is doubled). All problems share the two matrix products of an iteration, X W and X^T residual, and

* the features are centred and turned into their principal axes once, where the Hessian of the first guess is nearly
  diagonal: for axis j and class c about m_c e_j + l2, e_j the variance along the axis, and m_c half the mean of
  |p_c - y_c|, which is the mean of p_c (1 - p_c) where the fit is calibrated and does not vanish where it is wrong. Its
  inverse, scaled by the last step, is where every L-BFGS direction starts (Nocedal and Wright 2006, algorithm 7.4), so
  the count of iterations does not grow with the spread of variances, which in hidden states is huge;
* logits are linear in the step, so a line search costs no matrix product.

It stops when the decrease still to be had, estimated by g^T H^-1 g / 2, is below `tol` nats per example. The estimate is
a factor of ten or so too small where hardly anything is penalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError

MEMORY = 10  # pairs of steps and gradient changes L-BFGS remembers
TRIES = 12  # of a line search
TEMPER = 0.75  # power of the variances: the hard examples, which the late Hessian is made of, are spread more evenly


@dataclass(frozen=True, eq=False)
class Fitted:
    """The solutions: `weight` [problem, d, class], `bias` [problem, class], `loss` [problem] (mean training loss, nats),
    `objective` [problem] (with the penalty, per example), `iterations` [problem] and whether each `converged`."""

    weight: Tensor
    bias: Tensor
    loss: Tensor
    objective: Tensor
    iterations: Tensor
    converged: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[problem, n, class] for features [n, d]."""
        problems, d, k = self.weight.shape
        flat = x.to(self.weight) @ self.weight.transpose(0, 1).reshape(d, -1)
        return flat.view(len(x), problems, k).transpose(0, 1) + self.bias[:, None]


def logistic(
    x: Tensor,
    y: Any,
    *,
    l2: Any = 1.0,
    weights: Any = None,
    classes: int | None = None,
    penalise_bias: bool = False,
    tol: float = 1e-6,
    limit: int = 500,
) -> Fitted:
    """Fit every problem to features [n, d]. `y` is [n] or [problem, n], of whole numbers below `classes`; `l2` a number
    or [problem]; `weights` None, [n] or [problem, n], not negative. The intercepts are free unless `penalise_bias`.
    Computed in the precision of `x` (float32 or float64). InputError where shapes disagree.

    >>> fit = logistic(torch.tensor([[-1.0], [0.0], [1.0]]), [0, 0, 1], l2=[0.1, 10.0])
    >>> fit.weight.shape, bool(fit.converged.all())
    (torch.Size([2, 1, 2]), True)
    """
    n, d = x.shape
    y = torch.atleast_2d(torch.as_tensor(y, device=x.device).long())
    k = int(y.max()) + 1 if classes is None else classes
    strength = torch.as_tensor(l2, dtype=x.dtype, device=x.device).reshape(-1)
    w = torch.ones(1, n) if weights is None else torch.atleast_2d(torch.as_tensor(weights))
    w = w.to(x.device, x.dtype)
    problems = max(len(y), len(w), len(strength))
    _check(x, y, w, strength, k, problems)
    y, w, strength = y.expand(problems, n), w.expand(problems, n), strength.expand(problems)
    mean = x.mean(0)
    centred = x - mean
    variance, axes = torch.linalg.eigh((centred.T @ centred).double() / n)
    axes = axes.to(x.dtype)
    turned = torch.cat([centred @ axes, torch.ones_like(x[:, :1])], 1)  # the intercept is one more axis
    total = w.sum(1)
    penalty = (strength * (2 if k == 2 else 1) / total)[None, :, None].repeat(d + 1, 1, 1)
    if not penalise_bias:
        penalty[-1] = 0
    spectrum = torch.cat([variance.clamp_min(0).to(x.dtype), torch.ones_like(mean[:1])])
    state = _Descent(turned, y, w / total[:, None], penalty, spectrum**TEMPER, k, tol)
    state.run(limit)
    weight = torch.einsum("dj,jpk->pdk", axes, state.best[:-1])
    bias = state.best[-1] - torch.einsum("d,pdk->pk", mean, weight)
    objective = state.values
    loss = objective - 0.5 * (penalty * state.best.square()).sum((0, 2)).double()
    return Fitted(weight, bias, loss, objective, state.iterations, state.gaps <= tol)


def _check(x: Tensor, y: Tensor, w: Tensor, l2: Tensor, k: int, problems: int) -> None:
    n = len(x)
    for what, given in (("targets", y), ("weights", w)):
        if given.shape[1] != n or len(given) not in (1, problems):
            raise InputError(f"the {what} are {list(given.shape)}: expected [{n}] or [{problems}, {n}]")
    if len(l2) not in (1, problems) or bool((l2 < 0).any()):
        raise InputError(f"l2 must be one number or {problems}, none negative, got {l2.tolist()}")
    if not 0 <= int(y.min()) <= int(y.max()) < k or k < 2:
        raise InputError(f"targets must be whole numbers from 0 to {k - 1}, of at least two classes")
    if bool((w < 0).any()) or bool((w.sum(1) <= 0).any()):
        raise InputError("every problem needs examples: its weights must not be negative, and not all zero")
    if not x.is_floating_point() or not bool(x.sum().isfinite()):
        raise InputError("the features must be finite floating-point numbers")


class _Descent:
    """The problems still descending. Inside: i example, j axis, p problem, c class; logits [i, p, c]."""

    def __init__(self, x: Tensor, y: Tensor, w: Tensor, penalty: Tensor, spectrum: Tensor, k: int, tol: float) -> None:
        self.x, self.spectrum, self.tol = x, spectrum, tol
        problems = len(y)
        self.y, self.w, self.penalty = y.T.unsqueeze(-1), w.T.unsqueeze(-1), penalty
        self.best = x.new_zeros(x.shape[1], problems, k)
        hot = torch.zeros(len(x), problems, k, dtype=x.dtype, device=x.device).scatter_(2, self.y, 1.0)
        share = (hot * self.w).sum(0)
        self.best[-1] = (share + 0.5 / len(x)).log()  # the intercepts of no features; finite for an absent class
        self.values = torch.zeros(problems, dtype=torch.float64, device=x.device)
        self.gaps = torch.full_like(self.values, float("inf"))
        self.iterations = torch.zeros(problems, dtype=torch.long, device=x.device)
        self.active = torch.arange(problems, device=x.device)

    def run(self, limit: int) -> None:
        at = self.best.clone()
        z = self._times(at)
        value, rest, mass = self._evaluate(z, at)
        gradient = self._back(rest, at)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # step, change of the gradient, 1 / their product
        for iteration in range(limit + 1):
            inverse = 1 / (self.spectrum[:, None, None] * mass + self.penalty).clamp_min(1e-12)
            gap = (gradient.square() * inverse).sum((0, 2)).double() / 2
            self._note(at, value, gap, iteration)
            going = gap > self.tol
            if iteration == limit or not bool(going.any()):
                return
            if int(going.sum()) <= len(going) * 3 // 4:  # the others have arrived: carry on without them
                keep = going.nonzero()[:, 0]
                self._narrow(keep)
                at, z, gradient, inverse = (v[:, keep] for v in (at, z, gradient, inverse))
                value = value[keep]
                steps = [(s[:, keep], c[:, keep], r[keep]) for s, c, r in steps]
            direction = -_two_loops(gradient, steps, inverse)
            slope = (gradient * direction).sum((0, 2))
            uphill = slope >= 0
            if bool(uphill.any()):  # rounding, at the very end: fall back on the scaled gradient
                direction = torch.where(uphill[None, :, None], -gradient * inverse, direction)
                slope = (gradient * direction).sum((0, 2))
            along = self._times(direction)
            t, new_value, z, rest, mass = self._search(z, along, at, direction, value, slope)
            moved = t[None, :, None] * direction
            at = at + moved
            new = self._back(rest, at)
            change = new - gradient
            product = (moved * change).sum((0, 2))
            steps.append((moved, change, torch.where(product > 1e-20, 1 / product, torch.zeros_like(product))))
            del steps[:-MEMORY]
            gradient, value = new, new_value

    def _note(self, at: Tensor, value: Tensor, gap: Tensor, iteration: int) -> None:
        open_ = self.gaps[self.active] > self.tol  # those done keep their first answer
        rows = self.active[open_]
        self.best[:, rows], self.values[rows], self.gaps[rows] = at[:, open_], value[open_], gap[open_]
        self.iterations[rows] = iteration

    def _narrow(self, keep: Tensor) -> None:
        self.active = self.active[keep]
        self.y, self.w, self.penalty = self.y[:, keep], self.w[:, keep], self.penalty[:, keep]

    def _times(self, parameters: Tensor) -> Tensor:
        """[i, p, c] = x [i, j] parameters [j, p, c]"""
        return (self.x @ parameters.flatten(1)).view(len(self.x), *parameters.shape[1:])

    def _back(self, rest: Tensor, at: Tensor) -> Tensor:
        """The gradient [j, p, c] from the weighted residuals [i, p, c]."""
        return (rest.flatten(1).T @ self.x).T.reshape(at.shape) + self.penalty * at

    def _evaluate(self, z: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The objective [p], the weighted residuals [i, p, c] and half their size [p, c], given logits."""
        top = z.amax(2, keepdim=True)
        e = (z - top).exp_()
        norm = e.sum(2, keepdim=True)
        own = z.gather(2, self.y)
        loss = ((norm.log() + top - own) * self.w).sum((0, 2), dtype=torch.float64)
        value = loss + 0.5 * (self.penalty * at.square()).sum((0, 2)).double()
        p = e.div_(norm)
        rest = p.mul_(self.w).scatter_add_(2, self.y, -self.w)
        return value, rest, rest.abs().sum(0) / 2

    def _search(
        self, z: Tensor, along: Tensor, at: Tensor, direction: Tensor, value: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A step [p] for which the objective falls and its slope flattens (Wolfe); logits move along a line."""
        t = torch.ones_like(slope)
        low, high = torch.zeros_like(t), torch.full_like(t, float("inf"))
        low_slope = slope
        noise = 4 * torch.finfo(z.dtype).eps * value.abs().clamp_min(1e-3)
        for _ in range(TRIES):
            here = z + t[None, :, None] * along
            point = at + t[None, :, None] * direction
            new, rest, mass = self._evaluate(here, point)
            now = (rest * along).sum((0, 2)) + (self.penalty * point * direction).sum((0, 2))
            long = (new > value + 1e-4 * t * slope + noise) | (now > -0.9 * slope)
            short = ~long & (now < 0.9 * slope)
            if not bool((long | short).any()):
                break
            # the slope rises along the line (convexity): a secant finds its zero between the ends
            high = torch.where(long, t, high)
            secant = low - low_slope * (t - low) / (now - low_slope)
            low_slope, low = torch.where(short, now, low_slope), torch.where(short, t, low)
            middle = torch.where(high.isinf(), 4 * t, (low + high) / 2)
            inside = (secant > low + 0.05 * (high - low).clamp_max(1e6)) & (secant < high) & secant.isfinite()
            inside &= secant < 10 * t
            t = torch.where(long | short, torch.where(inside, secant, middle), t)
        else:  # none found: do not move where the objective would rise
            here = z + t[None, :, None] * along
            new, rest, mass = self._evaluate(here, at + t[None, :, None] * direction)
            risen = new > value + noise
            if bool(risen.any()):
                t = torch.where(risen, torch.zeros_like(t), t)
                here = z + t[None, :, None] * along
                new, rest, mass = self._evaluate(here, at + t[None, :, None] * direction)
        return t, new, here, rest, mass


def _two_loops(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """H^-1 gradient, from the diagonal `inverse` and the steps of the past."""
    q, alphas = gradient, []
    for step, change, rho in reversed(steps):
        alpha = rho * (step * q).sum((0, 2))
        alphas.append(alpha)
        q = q - alpha[None, :, None] * change
    q = q * inverse
    if steps:
        step, change, rho = steps[-1]
        gamma = (step * change).sum((0, 2)) / (change.square() * inverse).sum((0, 2)).clamp_min(1e-30)
        q = q * torch.where(rho > 0, gamma, torch.ones_like(gamma))[None, :, None]
    for (step, change, rho), alpha in zip(steps, reversed(alphas), strict=True):
        beta = rho * (change * q).sum((0, 2))
        q = q + (alpha - beta)[None, :, None] * step
    return q


# ---- closed form


@dataclass(frozen=True, eq=False)
class Line:
    """Ridge solutions: `weight` [problem, d, target], `bias` [problem, target]."""

    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """[problem, n, target]"""
        return torch.einsum("nd,pdt->pnt", x.to(self.weight), self.weight) + self.bias[:, None]


def ridge(x: Tensor, y: Tensor, l2: Any, weights: Tensor | None = None) -> Line:
    """minimise sum_i w_i |y_i - W x_i - b|^2 + l2 |W|^2 (scikit-learn's Ridge, alpha = l2), for every strength `l2`
    [problem] from one eigendecomposition, in float64. `y` is [n] or [n, target]; `weights` [n]."""
    x, y = x.double(), torch.as_tensor(y).double().reshape(len(x), -1)
    if not bool((x.isfinite().all(1) & y.isfinite().all(1)).all()):
        raise InputError("features or targets have numbers that are missing or infinite")
    w = torch.ones(len(x), dtype=x.dtype) if weights is None else torch.as_tensor(weights).double()
    strength = torch.as_tensor(np.atleast_1d(l2), dtype=x.dtype)
    mean, centre = w @ x / w.sum(), w @ y / w.sum()
    scaled = (x - mean) * w.sqrt()[:, None]
    values, axes = torch.linalg.eigh(scaled.T @ scaled)
    moment = axes.T @ (scaled.T @ ((y - centre) * w.sqrt()[:, None]))
    floor = (values.max() * len(values) * torch.finfo(x.dtype).eps).clamp_min(1e-300)
    inverse = torch.where(
        values + strength[:, None] > floor, 1 / (values + strength[:, None]), torch.zeros_like(values)
    )
    weight = axes @ (inverse[:, :, None] * moment)
    return Line(weight, centre - torch.einsum("d,pdt->pt", mean, weight))
