"""Any eval of Inspect (`inspect_ai`, the extra `inspect`) with monitors, steering, gates and kept sites on, sample by sample.

    from inspect_ai import eval
    eval(task, model=inspect_model(model, monitors=[alarm], edits=[vector.edit(.15)]))     the model under test
    Task(dataset, solver=inspect_solver(model, monitors=lambda state: ...), scorer=...)    or one step, told of each sample

The sample's store holds `pellucid`: a list with an entry for each answer, of the token ids, how it ended and why, and for each
monitor and condition the statistic and whether it fired, token by token. With `folder=` everything that was kept (activations too)
is written there, one zip for each answer, and the store says where. Answers are greedy unless the eval asks for a temperature; without
monitors and edits they are the tokens of transformers' `generate`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pellucid.engine.generation import Generated
from pellucid.errors import InputError, Refused
from pellucid.model import Model

MAX_TOKENS = 256  # where the eval says none
LIMITS = {"eos": "stop", "stop": "stop", "length": "max_tokens", "watcher": "content_filter"}
KEY = "pellucid"


def inspect_model(
    model: Model,
    *,
    monitors: Any = (),
    edits: Any = (),
    keep: Any = (),
    when: Any = (),
    folder: str | Path | None = None,
) -> Any:
    """An `inspect_ai.model.Model` for `eval(task, model=...)`; options as those of `model.generate`.

    InputError where inspect_ai is not installed, for an eval that asks for tools or several choices, and for a chat of more than text.
    Samples that run at once are answered one after the other.
    """
    api = _installed()
    answering = _Answering(model, {"monitors": monitors, "edits": edits, "keep": keep, "when": when}, folder)

    class Pellucid(api.ModelAPI):  # type: ignore[name-defined]
        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            if tools:
                raise Refused(
                    f"{model.name} is asked to call tools, which is not read here: run this eval without tools"
                )
            return await answering.say(input, config)

        def max_connections(self) -> int:
            return 1

    config = api.GenerateConfig()
    made = api.modelapi(name="pellucid")(Pellucid)(model_name=model.name.rpartition("/")[2] or "model", config=config)
    return api.Model(made, config)


def inspect_solver(
    model: Model,
    *,
    monitors: Any = (),
    edits: Any = (),
    keep: Any = (),
    when: Any = (),
    folder: str | Path | None = None,
) -> Any:
    """A solver that answers the sample's messages with `model`, whatever the eval's own model is. `monitors`, `edits`, `keep` and
    `when` may be functions of the sample's `TaskState` (its metadata, say), which give what is on for this sample."""
    _installed()
    from inspect_ai.solver import solver

    given = {"monitors": monitors, "edits": edits, "keep": keep, "when": when}

    @solver(name="pellucid")
    def answer() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            from inspect_ai.model import GenerateConfig

            mine = {k: v(state) if _of_sample(v) else v for k, v in given.items()}
            state.output = await _Answering(model, mine, folder).say(state.messages, GenerateConfig())
            state.messages.append(state.output.message)
            return state

        return solve

    return answer()


def _of_sample(value: Any) -> bool:
    """A function of the sample, and no watcher (which is one of the step)."""
    return callable(value) and not hasattr(value, "watched") and not hasattr(value, "threshold")


def _installed() -> Any:
    try:
        import inspect_ai.model as api
    except ImportError as error:
        raise InputError("inspect_ai is not installed: pip install 'pellucid[inspect]'") from error
    return api


class _Answering:
    """Answers chats, one at a time, and puts what happened into the store of the sample at hand."""

    lock = threading.Lock()  # one model, one generation at a time

    def __init__(self, model: Model, options: dict[str, Any], folder: str | Path | None) -> None:
        self.model, self.options = model, options
        self.folder = None if folder is None else Path(folder)

    async def say(self, messages: Sequence[Any], config: Any) -> Any:
        import anyio
        from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage
        from inspect_ai.util import store

        if (config.num_choices or 1) > 1:
            raise Refused(f"num_choices={config.num_choices}: one answer is written for each sample; use epochs")
        prompt = self.prompt(messages)
        asked: dict[str, Any] = {
            "max_new_tokens": config.max_tokens or MAX_TOKENS,
            "seed": config.seed or 0,
            "stop": config.stop_seqs or (),
        }
        if config.temperature:
            asked |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}

        def run() -> Generated:
            with self.lock:
                return self.model.generate(prompt, **asked, **self.options)

        made = await anyio.to_thread.run_sync(run)
        record = told(made)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            record["file"] = str(made.save(self.folder / f"{uuid.uuid4().hex}.zip"))
        store().set(KEY, [*(store().get(KEY) or []), record])
        n = int(made.inputs.stream("").lengths[0]) if made.inputs is not None else 0
        message = ChatMessageAssistant(content=made.text, model=self.model.name, source="generate")
        usage = ModelUsage(input_tokens=n, output_tokens=len(record["tokens"]), total_tokens=n + len(record["tokens"]))
        choice = ChatCompletionChoice(message=message, stop_reason=LIMITS.get(made.ended[0], "unknown"))
        return ModelOutput(model=self.model.name, choices=[choice], usage=usage, metadata={KEY: record})

    def prompt(self, messages: Sequence[Any]) -> Any:
        """The chat as the model's template has it; without a template its texts, line by line."""
        chat = []
        for each in messages:
            if not isinstance(each.content, str) and any(part.type != "text" for part in each.content):
                raise Refused("a message holds more than text (a picture, a file), which this model is not given")
            chat.append({"role": each.role, "content": each.text})
        if getattr(self.model.tokenizer, "chat_template", None):
            return chat
        return "\n".join(message["content"] for message in chat)


def told(made: Generated) -> dict[str, Any]:
    """What happened in an answer, as JSON has it: tokens, ended, because; by monitor or condition `fired` and `scores` at every token."""

    def numbers(x: Any) -> list[Any]:
        return [None if v != v else v for v in x[0].double().flatten().tolist()]

    scores: dict[str, Callable[..., Any] | list[Any]] = {name: numbers(x) for name, x in made.records.items()}
    fired = {name: [bool(v) for v in x[0].tolist()] for name, x in made.fired.items()}
    return {"tokens": made.ids(), "ended": made.ended[0], "because": made.because[0], "fired": fired, "scores": scores}
