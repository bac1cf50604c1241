"""The models that are open, each with its worker and what is remembered of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.engine.limits import claimed
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.views.question import short_name
from pellucid.workbench.answers import answers, generates
from pellucid.workbench.chat import Chat, Files
from pellucid.workbench.live import Live
from pellucid.workbench.messages import ModelCard
from pellucid.workbench.worker import Worker


class Opened:
    """One model: everything that runs it goes through `worker`."""

    def __init__(self, id: str, model: Model, chat: Chat) -> None:
        self.id, self.model, self.chat = id, model, chat
        self.live = Live(model)
        self.worker = Worker(id)
        self.card = card(id, model, chat)


class Hub:
    """All models of a workbench."""

    def __init__(self, models: Sequence[Model], files: Files | None = None) -> None:
        if not models:
            raise InputError("a workbench needs at least one model")
        chats = (files or Files()).sorted(models)
        self.models = {str(i): Opened(str(i), model, chats[i]) for i, model in enumerate(models)}

    def of(self, id: str) -> Opened:
        if id not in self.models:
            raise InputError(f"there is no model {id!r} here; there are {', '.join(self.models)}")
        return self.models[id]

    def close(self) -> None:
        for opened in self.models.values():
            opened.worker.close()


def card(id: str, model: Model, chat: Chat) -> ModelCard:
    stacks = model.anatomy.stacks
    module: Any = model.module
    blocks = [block for stack in stacks for block in stack.blocks]
    return ModelCard(
        id=id, name=short_name(model), kind="encoder-decoder" if len(stacks) > 1 else "encoder" if stacks[0].causal is False else "decoder",
        layers=len(blocks), heads=max((a.heads for b in blocks for a in b.attentions.values()), default=0),
        neurons=max((m.linear.width for b in blocks for m in b.mlps.values() if m.linear is not None), default=0),
        parameters=sum(p.numel() for p in module.parameters()), limit=claimed(module, "encoder" if len(stacks) > 1 else ""),
        generates=generates(model), chat=chat.card, answers=answers(model),
    )  # fmt: skip
