"""What do this model's logits mean? Told from its class and its config, never from how many there are.

tokens     one logit for each token of the vocabulary, at every position
class      one for each class of the whole text; softmax, or sigmoid where `problem_type` says that several may hold
           (then `independent`), or where there is only one
value      a number: `problem_type` "regression", or the score of a choice (`heads`)
label      one for each class, at every word
span       how likely each token is the first, and the last, of an answer in the text: [batch, position, 2]
vectors    none: the model has no head
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pellucid.errors import InputError

LOGITS = ("logits", "prediction_logits", "lm_logits", "seq_logits")
Meaning = Literal["tokens", "class", "value", "label", "span", "vectors"]
CLASSES: dict[str, Meaning] = {
    r"For(Sequence|Text)Classification$|ForNextSentencePrediction$": "class",
    r"ForMultipleChoice$": "value",
    r"ForTokenClassification$": "label",
    r"ForQuestionAnswering": "span",
}


@dataclass(frozen=True)
class Answering:
    """What logits mean: `size` of them for each text or position, with the `names` of classes by their numbers."""

    meaning: Meaning
    size: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    independent: bool = False  # each class holds or does not, whatever the others do: sigmoid
    masked: bool = False  # tokens are filled in at a mask, if the model looks ahead, and not said one after the other

    def check(self, model: str, metric: str, classes: bool, places: bool, size: int) -> None:
        """InputError where a metric reads other logits than these: of `classes`, at `places`, or the first `size`."""
        if not classes and not places and not size:
            return  # a function of the user's own
        if self.meaning == "vectors":
            raise InputError(
                f"{model} gives vectors, and {metric} reads answers: open it with its head, or give a function of the "
                "vectors or reading(site)"
            )
        whole = self.meaning in ("class", "value")
        if classes != whole:
            own = "classes of the whole text (use class_logit)" if whole else "no classes of the whole text"
            raise InputError(f"{model} gives {own}, and {metric} reads {'those' if classes else 'tokens'}")
        if size > self.size:
            raise InputError(f"{metric}: {size - 1} is unknown to this model, whose answers are 0 to {self.size - 1}")

    def numbers(self, target: Any) -> Any:
        """Classes by number or name, in whatever lists they stand, as numbers. InputError for one that is none."""
        if not isinstance(target, str) and isinstance(target, Sequence):
            return tuple(self.numbers(each) for each in target)
        known = {name: number for number, name in self.names.items()}
        number = known.get(target) if isinstance(target, str) else target
        if not isinstance(number, int) or not 0 <= number < self.size:
            names = ", ".join(f"{i} ({name})" for i, name in self.names.items()) or f"0 to {self.size - 1}"
            raise InputError(f"{target!r} is no class of this classifier: expected one of {names}")
        return number


def detects(output: Any) -> bool:
    """Whether the logits [batch, position] are one number for each token: whether it was replaced (discriminators)."""
    made = getattr(output, "logits", None)
    return isinstance(made, Tensor) and made.ndim == 2 and type(output).__name__.endswith("ForPreTrainingOutput")


def answering(module: Any, output: Any) -> Answering:
    """From the model and what it gave for a probe."""
    made = next((v for key in LOGITS if (v := getattr(output, key, None)) is not None), None)
    config = module.config
    kinds = (m for c in type(module).__mro__ for pattern, m in CLASSES.items() if re.search(pattern, c.__name__))
    meaning = next(kinds, None)
    if made is None or meaning == "span":
        spans = isinstance(getattr(output, "start_logits", None), Tensor) and hasattr(output, "end_logits")
        return Answering("span", 2, {0: "start", 1: "end"}) if spans else Answering("vectors")
    if meaning is None:  # a class of another name: a text has classes, a position tokens
        meaning = "class" if made.ndim == 2 else "tokens"
        if detects(output):
            return Answering("label", 1, {0: "replaced"}, independent=True)
    if meaning == "value":
        return Answering("value", 1, {0: "score"})
    size = made.shape[-1]
    if meaning == "tokens":
        return Answering(
            "tokens", size, masked=not re.search(r"CausalLM|LMHeadModel|DoubleHeads", type(module).__name__)
        )
    names = {int(k): str(v) for k, v in (getattr(config, "id2label", None) or {}).items() if int(k) < size}
    if names == {0: "LABEL_0", 1: "LABEL_1"} and type(module).__name__.endswith("ForNextSentencePrediction"):
        names = {0: "is next", 1: "is not next"}  # the order every such head is trained in
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return Answering("value", size, names)
    return Answering(meaning, size, names, problem == "multi_label_classification" or size == 1)
