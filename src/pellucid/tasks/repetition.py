"""Does the model go on with what it has read before? Random tokens said twice: only the repetition tells what comes next.

The probe of induction heads (Olsson et al. 2022): an ordinary text can be continued from what words mean, this one cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def repeated_tokens(
    tokenizer: Any, n: int = 8, seed: int = 0, *, length: int = 20, vocabulary: int | None = None
) -> Tensor:
    """Token ids [n, 2 x length], after a BOS where there is one: `length` different ordinary tokens, and the same again.

    `vocabulary` is how many tokens the model embeds, by default as many as the tokenizer has (which may be None if it is
    given). InputError for a vocabulary of fewer ordinary tokens than `length`.

    >>> repeated_tokens(None, 1, length=2, vocabulary=9).shape
    torch.Size([1, 4])
    """
    import torch  # slow, and tasks need it nowhere else

    if tokenizer is None and vocabulary is None:
        raise InputError("without a tokenizer the size of the vocabulary must be said: give vocabulary=")
    size = len(tokenizer) if vocabulary is None else vocabulary
    usable = torch.tensor(ordinary_ids(tokenizer, size))
    if len(usable) < length:
        raise InputError(
            f"{length} different tokens are to be repeated, this vocabulary has {len(usable)}: give length="
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [] if bos is None or bos >= size else [torch.full((n, 1), bos)]
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:length]] for _ in range(n)])
    return torch.cat([*start, once, once], 1)
