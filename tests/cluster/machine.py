"""A machine of its own on this one, reached over ssh on loopback, in which `ray stop` meets nobody else's processes."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync", "unshare", "nsenter", "ip", "bash")
TOOLS_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NAMESPACES = ("-m", "-n", "-p")  # mounts, network, processes


@dataclass(frozen=True)
class Machine:
    """A machine of its own on this one: its own processes, network (loopback only), /tmp/ray and /dev/shm; an sshd.

    home: of who logs in over ssh;  client: home of who calls `ray up`;  init: its first process, as seen from here
    """

    folder: Path
    init: int

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def client(self) -> Path:
        return self.folder / "client"

    @property
    def cluster_name(self) -> str:
        """Unlike any other's: Ray keeps its ssh connections in a folder of /tmp that is named after it."""
        return f"{self.folder.parent.name}-{self.folder.name}"

    def run(self, *command: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Runs a command there, as the client, in the root of the checkout."""
        enter = ["nsenter", f"--target={self.init}", *NAMESPACES, f"--wd={ROOT}"]
        return subprocess.run(
            [*enter, *map(str, command)],
            env={"HOME": str(self.client), "TMPDIR": str(self.client), "PATH": _search_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def processes(self) -> dict[int, str]:
        """Command lines by process id, as the machine itself numbers them."""
        found = {}
        for file in Path(f"/proc/{self.init}/root/proc").glob("[0-9]*/cmdline"):
            try:
                found[int(file.parent.name)] = file.read_bytes().replace(b"\0", b" ").decode().strip()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
        return found

    def ray_processes(self) -> dict[int, str]:
        return {
            number: line
            for number, line in self.processes().items()
            if re.search(r"\bray\b|raylet|gcs_server", line)
        }

    def core(self) -> set[int]:
        """Its GCS and raylet: equal before and after, the same cluster ran all the time."""
        return {
            number for number, line in self.processes().items() if re.match(r"\S+/(raylet|gcs_server) ", line)
        }


def _search_path() -> str:
    return f"{Path(sys.executable).parent}:{TOOLS_PATH}"


def _boot(folder: Path) -> str:
    """What runs as the machine's first process; all mounts are its own."""
    return f"""
        set -e
        ip link set lo up
        mount -t tmpfs tmpfs /dev/shm
        mount --bind {shlex.quote(str(folder / "ray"))} /tmp/ray
        mount -t tmpfs tmpfs /run
        mkdir /run/sshd
        exec {shutil.which("sshd", path=TOOLS_PATH)} -D -e -f {shlex.quote(str(folder / "sshd_config"))}
    """


def _sshd_config(folder: Path) -> str:
    settings = {
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "key.pub",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
        "SetEnv": f"HOME={folder / 'home'}",
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def _unshare(*command: str) -> list[str]:
    return ["unshare", *NAMESPACES, "-f", "--mount-proc", "--kill-child", *command]


def _skip_without_namespaces() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=TOOLS_PATH) is None]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    tried = subprocess.run(_unshare("true"), capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here (root is needed): {tried.stderr.strip()}")


def _child_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """The first process in the namespaces, once its sshd listens."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(100):
        if "listening" in log.read_text():
            return int(children.read_text())
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"sshd did not start: {log.read_text()}")


@contextmanager
def started(folder: Path) -> Iterator[Machine]:
    """A machine for the length of the context, with its files in `folder`; skips the test where none can be made."""
    _skip_without_namespaces()
    for name in ("home", "client/.ray", "ray"):
        (folder / name).mkdir(parents=True)
    Path("/tmp/ray").mkdir(exist_ok=True)  # something must be there to mount over
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    # The environment of this test instead of a new one, with the code that `ray up` sends.
    (folder / "home/.bashrc").write_text(
        f"export RAYSWEEP_VENV={shlex.quote(sys.prefix)}\nexport PYTHONPATH=~/raysweep HF_HUB_OFFLINE=1\n"
    )
    (folder / "sshd_config").write_text(_sshd_config(folder))
    log = folder / "sshd.log"
    with log.open("w") as out:
        process = subprocess.Popen(_unshare("bash", "-c", _boot(folder)), stdout=out, stderr=out)
    try:
        machine = Machine(folder, _child_of(process, log))
        yield machine
        connections = hashlib.sha256(machine.cluster_name.encode()).hexdigest()[:10]
        for left in Path("/tmp").glob(f"ray_ssh_*/{connections}"):
            shutil.rmtree(left)
    finally:
        process.kill()  # and with it, by --kill-child, all that ran in the namespaces
        process.wait()
