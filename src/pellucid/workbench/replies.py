"""Answers of the server: messages as JSON, files as attachments, problems in one sentence."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from pellucid.workbench.messages import Problem


def reply(message: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def problem(status: int, sentence: str, superseded: bool = False) -> Response:
    return reply(Problem(error=" ".join(sentence.split()), superseded=superseded), status)


def attachment(content: bytes, name: str, media_type: str) -> Response:
    """A file that is saved, never shown in the server's own origin. `name` is ours: letters, digits, - and ."""
    return Response(content, media_type=media_type, headers={"content-disposition": f'attachment; filename="{name}"'})
