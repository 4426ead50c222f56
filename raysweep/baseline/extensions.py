"""What DeepSpeed compiles for itself on machines without a GPU, built so that a killed process leaves no trap.

torch marks a build in progress by a file and waits until it is gone: for ever, where the process that made it was
killed. So raysweep builds in a folder of its own, under a lock that ends with its process; whoever holds it knows that
such a file is a leftover.
"""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"
MARK = "lock"  # torch's file, in the folder of every extension
SHARED_MEMORY = "ShareMemCommBuilder"  # between the ranks of a node


def load_extensions() -> None:
    """Loads what DeepSpeed would compile when it starts, compiled first where it is not there yet. Raises RuntimeError
    when it cannot be compiled."""
    folder = own_folder()
    os.environ[FOLDER_VARIABLE] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__ as compatible

    builder: Any = get_accelerator().create_op_builder(SHARED_MEMORY)
    if builder is None or not compatible.get(builder.NAME, False):
        return
    with open(folder / ".building", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for left in folder.glob(f"*/{MARK}"):
            left.unlink(missing_ok=True)
        builder.load()


def own_folder() -> Path:
    """Where extensions of this Python and torch are built: below the folder that the user names, or torch's own."""
    chosen = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "torch_extensions"
    name = f"raysweep-py{platform.python_version()}-torch{torch.__version__}"
    root = Path(chosen)
    return root if root.name == name else root / name
