"""Machines of their own on this one, reached over ssh, in which `ray stop` meets nobody else's processes: one alone on
its loopback, or several on a network."""

from __future__ import annotations

import hashlib
import os
import pwd
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

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync", "unshare", "nsenter", "ip", "bash")
TOOLS_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NAMESPACES = ("-m", "-n", "-p", "-u")  # mounts, network, processes, host name
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ended:
    """A command that has ended; stdout: what it has said on either stream."""

    returncode: int
    stdout: str


@dataclass(frozen=True)
class Machine:
    """A machine of its own on this one: its own processes, network, name, /tmp/ray and /dev/shm; an sshd.

    home: of who logs in over ssh;  client: home of who calls `ray up`;  init: its first process, as seen from here
    power: the process that it ends with
    """

    folder: Path
    address: str
    init: int
    power: subprocess.Popen[bytes]

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

    def start(self, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Starts a command there, as the client, in the root of the checkout."""
        enter = ["nsenter", f"--target={self.init}", *NAMESPACES, f"--wd={ROOT}"]
        home = {"HOME": str(self.client), "TMPDIR": str(self.client), "PATH": _search_path()}
        return subprocess.Popen(
            [*enter, *map(str, command)],
            env=home | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: object, timeout: float = 240, **environment: str) -> Ended:
        """Runs a command there, as `start` does, to its end."""
        process = self.start(*command, **environment)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Ended(process.returncode, said)

    def lose_power(self) -> None:
        self.power.kill()  # and with it, by --kill-child, all that ran in the namespaces
        self.power.wait()

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


def _boot(folder: Path, address: str) -> str:
    """What runs as the machine's first process; all mounts are its own. One on a network is handed its wire."""
    wire = f"""
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
        ip addr add {address}/24 dev eth0
        ip link set eth0 up
        hostname {folder.name}
    """
    return f"""
        set -e
        {_home_of_its_own(folder / "home")}
        ip link set lo up
        {wire if address != LOOPBACK else ""}
        mount -t tmpfs tmpfs /dev/shm
        mount --bind {shlex.quote(str(folder / "ray"))} /tmp/ray
        mount -t tmpfs tmpfs /run
        mkdir /run/sshd
        exec {shutil.which("sshd", path=TOOLS_PATH)} -D -e -f {shlex.quote(str(folder / "sshd_config"))}
    """


def _home_of_its_own(home: Path) -> str:
    """Mounts a folder where ssh looks for whoever logs in, with what this Python needs of the real one."""
    real = Path(pwd.getpwuid(os.getuid()).pw_dir)
    needed = [
        path for path in map(Path, (sys.prefix, sys.base_prefix, ROOT, home)) if path.is_relative_to(real)
    ]
    keep = sorted({real / path.relative_to(real).parts[0] for path in needed})
    back = [f"mkdir -p {home / path.name}; mount --bind {path} {home / path.name}" for path in keep]
    return "\n".join([*back, f"mount --rbind {home} {real}"])


def _sshd_config(folder: Path, key: Path, address: str) -> str:
    settings = {
        "ListenAddress": address,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": f"{key}.pub",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def _unshare(*command: str, within: int | None = None) -> list[str]:
    """within: a process of the network that the machine is on"""
    place = ["nsenter", f"--target={within}", "-n"] if within else []
    return [*place, "unshare", *NAMESPACES, "-f", "--mount-proc", "--kill-child", *command]


def _skip_without_namespaces() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=TOOLS_PATH) is None]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    tried = subprocess.run(_unshare("true"), capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here (root is needed): {tried.stderr.strip()}")


def _child_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """The first process in the namespaces."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(100):
        if process.poll() is None and (found := children.read_text().split()):
            return int(found[0])
        time.sleep(0.1)
    pytest.fail(f"no machine came up: {log.read_text()}")


def _wait_for_sshd(log: Path) -> None:
    for _ in range(100):
        if "listening" in log.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"sshd did not start: {log.read_text()}")


@contextmanager
def started(
    folder: Path, key: Path | None = None, address: str = LOOPBACK, network: int | None = None
) -> Iterator[Machine]:
    """A machine for the length of the context, with its files in `folder`; skips the test where none can be made.

    key: a private one that logs in, else folder/key is made;  network: a process of the one that it is on
    """
    _skip_without_namespaces()
    for name in ("home", "client/.ray", "ray"):
        (folder / name).mkdir(parents=True)
    Path("/tmp/ray").mkdir(exist_ok=True)  # something must be there to mount over
    make_key(folder / "host_key")
    if key is None:
        make_key(folder / "key")
    # The environment of this test instead of a new one, with the code that `ray up` sends.
    (folder / "home/.bashrc").write_text(
        f"export RAYSWEEP_VENV={shlex.quote(sys.prefix)}\nexport PYTHONPATH=~/raysweep HF_HUB_OFFLINE=1\n"
    )
    (folder / "sshd_config").write_text(_sshd_config(folder, key or folder / "key", address))
    log = folder / "sshd.log"
    with log.open("w") as out:
        boot = _unshare("bash", "-c", _boot(folder, address), within=network)
        power = subprocess.Popen(boot, stdout=out, stderr=out)
    try:
        machine = Machine(folder, address, _child_of(power, log), power)
        if network is not None:
            wire = [
                "ip",
                "link",
                "add",
                f"to-{folder.name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(machine.init),
            ]
            _in_network(network, *wire)
            _in_network(network, "ip", "link", "set", f"to-{folder.name}", "master", "bridge", "up")
        _wait_for_sshd(log)
        yield machine
        connections = hashlib.sha256(machine.cluster_name.encode()).hexdigest()[:10]
        for left in Path("/tmp").glob(f"ray_ssh_*/{connections}"):
            shutil.rmtree(left)
    finally:
        power.kill()
        power.wait()


def kill(process: subprocess.Popen[str]) -> None:
    """Ends what `Machine.start` has started: nsenter, and what that runs."""
    for each in psutil.Process(process.pid).children(recursive=True):
        each.kill()
    process.communicate()


def make_key(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)


@contextmanager
def network() -> Iterator[int]:
    """A network on which machines can be started, in a namespace of its own; yields a process that is on it."""
    _skip_without_namespaces()
    holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        for _ in range(100):
            if os.readlink(f"/proc/{holder.pid}/ns/net") != os.readlink("/proc/self/ns/net"):
                break
            time.sleep(0.1)
        try:
            _in_network(holder.pid, "ip", "link", "add", "bridge", "type", "bridge")
        except subprocess.CalledProcessError:
            pytest.skip("no bridge between networks can be made here")
        _in_network(holder.pid, "ip", "link", "set", "bridge", "up")
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def _in_network(process: int, *command: str) -> None:
    subprocess.run(["nsenter", f"--target={process}", "-n", *command], check=True, env={"PATH": TOOLS_PATH})
