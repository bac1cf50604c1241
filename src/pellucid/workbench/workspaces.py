"""Where is a workspace kept? In one file, NAME.pellucid.json, in the one folder the workbench was started with.

A name is letters, digits, spaces, `_`, `-` and `.`, and begins with none of the latter, so that it cannot lead out of
the folder; links in the folder are not followed either. What a file holds is checked against the schema before a page
sees it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from pellucid.errors import InputError
from pellucid.workbench.messages import Workspace, WorkspaceEntry, read

NAME = re.compile(r"[A-Za-z0-9 _-][A-Za-z0-9 _.-]{0,79}")
ENDING = ".pellucid.json"
LARGEST = 64 << 20
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Folder:
    """The workspaces of a folder, which is made when the first one is saved."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def listed(self) -> list[WorkspaceEntry]:
        """Those that can be opened, the newest first."""
        found = []
        for file in self.path.glob(f"*{ENDING}") if self.path.is_dir() else ():
            name, about = file.name.removesuffix(ENDING), file.lstat()
            if NAME.fullmatch(name) and stat.S_ISREG(about.st_mode):
                found.append(WorkspaceEntry(name=name, modified=about.st_mtime))
        return sorted(found, key=lambda entry: -entry.modified)

    def open(self, name: str) -> Workspace:
        """InputError for a name or a file that is no workspace."""
        return read(self._content(self._file(name), name), Workspace)

    def save(self, name: str, workspace: Workspace) -> None:
        """Write it whole or not at all: into a new file that then takes the name."""
        file = self._file(name)
        new = self.path / f".{secrets.token_hex(8)}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o600), "wb") as out:
                out.write(msgspec.json.encode(workspace))
            new.replace(file)  # a link of this name is replaced, not followed
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            raise InputError(f"cannot save {name!r}: {error.strerror or error}") from None

    def remove(self, name: str) -> None:
        try:
            self._file(name).unlink()
        except OSError:
            raise InputError(f"there is no workspace {name!r}") from None

    def _file(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise InputError(
                "a workspace's name has 1 to 80 letters, digits, spaces, '_', '-' and '.', and does not begin with a dot"
            )
        return self.path / (name + ENDING)

    def _content(self, file: Path, name: str) -> bytes:
        try:
            if file.is_symlink():  # where the system cannot refuse links itself
                raise OSError
            with os.fdopen(os.open(file, os.O_RDONLY | NO_LINKS | getattr(os, "O_NONBLOCK", 0)), "rb") as content:
                if not stat.S_ISREG(os.fstat(content.fileno()).st_mode):
                    raise OSError
                found = content.read(LARGEST + 1)
        except OSError:
            raise InputError(f"there is no workspace {name!r}") from None
        if len(found) > LARGEST:
            raise InputError(f"the workspace {name!r} is larger than {LARGEST >> 20} MB")
        return found
