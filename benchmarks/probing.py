"""What does fitting a probe on every layer cost, beside scikit-learn layer by layer?

    python -m benchmarks.probing [--layers 13] [--examples 10000] [--width 768] [--classes 17] [--data FILE.conllu]

Without --data the features are drawn: classes of unequal size, variances falling from a few huge axes, an
offset, as hidden states have them. With --data they are every tenth residual state of SmolLM2 (width 576) at the words of
a treebank, and the classes their parts of speech. One thread, process CPU time, float32 for both, C = 1; each layer is
fitted by one, then the other. Two comparisons:

* usual: scikit-learn as it comes (tol=1e-4, but as many iterations as that takes), and pellucid stopped at the loosest
  tolerance of 1e-4, 1e-5, ... whose objective is no higher;
* converged: scikit-learn with tol=1e-5, pellucid as it comes; here the mean training loss and the accuracy on held-out
  examples must agree, within 1e-4 and 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pellucid.probing.solver import Fitted, logistic

Layer = tuple[Tensor, np.ndarray]


def drawn(layers: int, n: int, d: int, k: int) -> Iterator[Layer]:
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, k + 1)
    y = rng.choice(k, n, p=share / share.sum())
    for _layer in range(layers):
        axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
        scale = 20 * np.arange(1, d + 1) ** -0.5
        means = rng.normal(size=(k, d)) * 0.12
        x = ((rng.normal(size=(n, d)) + means[y]) * scale) @ axes + 2 * rng.normal(size=d)
        yield torch.tensor(x, dtype=torch.float32), y


def real(path: str, n: int) -> Iterator[Layer]:
    import pellucid as pl
    from pellucid.probing import Treebank, read

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    bank = Treebank.read(path, limit=n // 8)
    examples = bank.tags()
    features = read(pl.load(smollm2()), examples)
    examples = examples[np.arange(min(n, len(examples)))]
    for layer in range(0, len(features.sites), 10):
        yield features.of(examples, layer), examples.targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 13), ("examples", 10_000), ("width", 768), ("classes", 17)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = options.examples
    layers = real(options.data, n + n // 5) if options.data else drawn(
        options.layers, n + n // 5, options.width, options.classes)  # fmt: skip
    spent = np.zeros((2, 2))
    print(
        "             usual, CPU s (iterations)    |  converged, CPU s (iterations)  loss - its  accuracy - its  (accuracy)"
    )
    for i, (x, y) in enumerate(layers):
        train, held = x[: len(x) * 5 // 6], x[len(x) * 5 // 6 :]
        own, other = y[: len(train)], y[len(train) :]
        usual, _, objective = scikit(train, own, 1e-4)
        for tol in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
            quick = pellucid(train, own, tol=tol)
            if float(quick[1].objective) <= objective:
                break
        exact, theirs, _ = scikit(train, own, 1e-5)
        full = pellucid(train, own)
        log_p = theirs.predict_log_proba(train.numpy())
        loss = -log_p[np.arange(len(own)), np.searchsorted(theirs.classes_, own)].mean()
        right = [
            (theirs.predict(held.numpy()) == other).mean(),
            (full[1].logits(held)[0].argmax(1).numpy() == other).mean(),
        ]
        spent += [[usual[0], quick[0]], [exact[0], full[0]]]
        print(
            f"layer {i:2d}   {usual[0]:6.2f} ({usual[1]})   {quick[0]:6.2f} ({int(quick[1].iterations)})   |  "
            f"{exact[0]:6.2f} ({exact[1]})   {full[0]:6.2f} ({int(full[1].iterations)})   "
            f"{float(full[1].loss) - loss:+9.1e}   {right[1] - right[0]:+8.4f}   ({right[1]:.3f})",
            flush=True,
        )
    for name, (theirs_, ours_) in zip(("usual", "converged"), spent, strict=True):
        print(
            f"{name}: scikit-learn {theirs_:.1f} s, pellucid {ours_:.1f} s of CPU time: a ratio of {theirs_ / ours_:.1f}"
        )


def scikit(x: Tensor, y: np.ndarray, tol: float) -> tuple[tuple[float, int], LogisticRegression, float]:
    """(CPU seconds, iterations), the fitted estimator, and the objective per example."""
    given = x.numpy()
    start = time.process_time()
    fitted = LogisticRegression(C=1.0, tol=tol, max_iter=20_000).fit(given, y)
    spent = time.process_time() - start
    log_p = fitted.predict_log_proba(given)
    loss = -log_p[np.arange(len(y)), np.searchsorted(fitted.classes_, y)].mean(dtype=float)
    return (spent, int(fitted.n_iter_[0])), fitted, loss + 0.5 * float((fitted.coef_.astype(float) ** 2).sum()) / len(y)


def pellucid(x: Tensor, y: np.ndarray, **options: float) -> tuple[float, Fitted]:
    start = time.process_time()
    fitted = logistic(x, y, l2=1.0, classes=int(y.max()) + 1, **options)  # type: ignore[arg-type]
    return time.process_time() - start, fitted


if __name__ == "__main__":
    main()
