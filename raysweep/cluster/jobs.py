"""Commands that run on a cluster as jobs of Ray, submitted from a machine outside of it."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from raysweep.cluster.connect import TokenRefusedError
from raysweep.errors import RaysweepError, UsageError, first_line

UNSURE = 1  # exit status of a job that has failed without one
NOT_YET = "No available agent"  # what a cluster says that is not ready for jobs yet
START_S = 60.0  # after which it should be
BEFORE_THE_COMMAND = "Running entrypoint for job "  # how Ray's last line before it begins


class JobServer:
    """The dashboard of a cluster, which runs commands on its head."""

    def __init__(self, address: str) -> None:
        """Raises UsageError where none answers, or refuses this process."""
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise TokenRefusedError(
                f"the cluster at {address} refuses this process: {first_line(error)}",
                remedy="Set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token.",
            ) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no cluster takes jobs at {address}: {first_line(error)}",
                allowed="the address of a Ray dashboard, such as http://127.0.0.1:8265",
                remedy="`ray dashboard cluster.yaml` brings that of a cluster to this machine.",
            ) from error

    def submit(self, command: Sequence[str], folder: Path | None = None, needs: str | None = None) -> str:
        """Starts a command in a copy of the folder; returns what the job is called.

        needs: a variable without which it is refused there, with exit status 2
        """
        environment = {"working_dir": str(folder)} if folder is not None else None
        entrypoint = shlex.join(command)
        if needs is not None:
            refusal = shlex.quote(f"raysweep: {needs} is not set on the cluster's head")
            entrypoint = f'if test -z "${needs}"; then echo {refusal} >&2; exit 2; fi; {entrypoint}'
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self._client.submit_job(entrypoint=entrypoint, runtime_env=environment)
            except (RuntimeError, OSError, ValueError) as error:
                if NOT_YET in str(error) and time.monotonic() < deadline:
                    time.sleep(1.0)
                    continue
                raise RaysweepError(
                    f"the cluster at {self.address} takes no job: {first_line(error)}"
                ) from error

    def follow(self, job: str, show: Callable[[str], None]) -> int:
        """Shows what the command says until it has ended; returns its exit status.

        Raises RaysweepError where the cluster is no longer within reach; the command goes on.
        """
        import aiohttp

        try:
            return self._follow(job, _Words(show))
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise RaysweepError(
                f"the cluster at {self.address} no longer answers: {first_line(error)}\n"
                f"  {job} goes on there; `raysweep status --address {self.address}` shows sweeps."
            ) from error

    def end(self, job: str) -> None:
        """Ends a command that cannot be asked to end. Raises RaysweepError."""
        try:
            self._client.stop_job(job)
        except (RuntimeError, OSError) as error:
            raise RaysweepError(f"{job} at {self.address} cannot be ended: {first_line(error)}") from error

    def _follow(self, job: str, words: _Words) -> int:
        async def tell_all() -> None:
            async for text in self._client.tail_job_logs(job):
                words.add(text)

        asyncio.run(tell_all())
        details = self._client.get_job_info(job)
        everything = self._client.get_job_logs(job)  # what came after the last look
        words.add(everything[words.length :])
        if str(details.status) == "SUCCEEDED":
            return 0
        if not words.found:
            words.show(f"{everything}{details.message or ''}\n")  # it did not come to the command
        return details.driver_exit_code or UNSURE


class _Words:
    """What a job says, without what Ray says before its command. length: characters so far, of both"""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.length, self.found = show, 0, False
        self._before = ""

    def add(self, text: str) -> None:
        self.length += len(text)
        if self.found:
            self.show(text)
            return
        self._before += text
        _, begins, rest = self._before.partition(BEFORE_THE_COMMAND)
        if begins and "\n" in rest:
            self.found = True
            self.show(rest.partition("\n")[2])
