"""The token by which the processes of a Ray cluster know one another: a file that only its owner may read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

TOKEN_FILE = Path(".ray") / "auth_token"  # of the home folder, where Ray looks for it
ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # variables that name another one
OWNER_ONLY = 0o600


def keep_token_private() -> None:
    """Makes the token where there is none yet, and takes it from others where they may read it: the file that Ray
    itself makes is readable for everybody. Nothing where the user has a token elsewhere, or wants none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(map(os.environ.get, ELSEWHERE)):
        return
    file = Path.home() / TOKEN_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _make(file)
    status = file.stat()
    if status.st_mode & 0o077 and status.st_uid == os.getuid():
        file.chmod(OWNER_ONLY)


def _make(file: Path) -> None:
    """As a whole, and not over one that another process has made meanwhile."""
    whole = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY), "w") as stream:
        stream.write(secrets.token_hex(32))
    with suppress(FileExistsError):
        os.link(whole, file)
    whole.unlink()
