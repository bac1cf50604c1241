"""Does an attribution name what people name?

Against a rationale, the players people (or an edit that turned the label) say are responsible (ERASER, DeYoung et al.
2020):

    token F1   of the top k players as the predicted rationale
    IOU F1     of spans: a predicted stretch of players counts as found if it shares at least half of the union with a
               stretch of the rationale
    AUPRC      area under precision over recall as the threshold falls, trapezoids as in ERASER's code
    average precision   the same area by steps: constant scores have the share of the rationale, where trapezoids between
               two points flatter them (0.6 for a share of 0.2)
    mass       share of the scores' absolute sum that lies on the rationale

k is the number of players in the rationale, unless given. A plausible attribution need not be faithful: a model can be
right for the wrong reasons, and an attribution that shows them is implausible and true.
"""

from __future__ import annotations

import numpy as np

from pellucid.errors import InputError
from pellucid.statistics import area

PLAUSIBILITY = ("token F1", "IOU F1", "AUPRC", "average precision", "mass")


def plausibility(scores: np.ndarray, rationale: np.ndarray, k: int | None = None) -> dict[str, float]:
    """These measures of scores [player] against a rationale, booleans [player]. InputError if no player is in it.

    >>> found = plausibility(np.array([0.0, 3.0, 1.0]), np.array([False, True, False]))
    >>> found["token F1"], found["AUPRC"], found["mass"]
    (1.0, 1.0, 0.75)
    """
    rationale = np.asarray(rationale, dtype=bool)
    if rationale.shape != scores.shape or not rationale.any():
        raise InputError(f"the rationale names {int(rationale.sum())} of {len(scores)} players: expected one at least")
    k = int(rationale.sum()) if k is None else k
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[:k]] = True
    size = float(np.abs(scores).sum())
    return {
        "token F1": token_f1(chosen, rationale),
        "IOU F1": iou_f1(chosen, rationale),
        "AUPRC": auprc(scores, rationale),
        "average precision": average_precision(scores, rationale),
        "mass": float(np.abs(scores[rationale]).sum()) / size if size > 0 else float("nan"),
    }


def token_f1(chosen: np.ndarray, rationale: np.ndarray) -> float:
    return 2 * float((chosen & rationale).sum()) / float(chosen.sum() + rationale.sum())


def iou_f1(chosen: np.ndarray, rationale: np.ndarray, threshold: float = 0.5) -> float:
    """F1 over stretches; each predicted one counts by the stretch of the rationale it meets best."""
    predicted, gold = _stretches(chosen), _stretches(rationale)
    found = sum(max(len(p & g) / len(p | g) for g in gold) >= threshold for p in predicted)
    return 2 * min(found, len(gold)) / (len(predicted) + len(gold))


def _stretches(mask: np.ndarray) -> list[set[int]]:
    where = np.flatnonzero(mask)
    return [set(part.tolist()) for part in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(part)]


def auprc(scores: np.ndarray, rationale: np.ndarray) -> float:
    precision, recall = _precision_recall(scores, rationale)
    reached = int(np.argmax(recall == 1)) + 1
    return area(np.append(1.0, precision[:reached]), np.append(0.0, recall[:reached]))


def average_precision(scores: np.ndarray, rationale: np.ndarray) -> float:
    precision, recall = _precision_recall(scores, rationale)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _precision_recall(scores: np.ndarray, rationale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At every threshold from the highest score down; equal scores pass it together."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(rationale[order])[last]
    return found / (last + 1), found / rationale.sum()
