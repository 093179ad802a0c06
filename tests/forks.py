"""Processes that need not import anything again, which takes longer than what tests let them do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from surgery.training import processes
from surgery.training.module import HealingModule
from surgery.training.watch import Checkpoints


class Fork:
    """A fork of this process that does `act` and ends; it is used like a `subprocess.Popen`."""

    def __init__(
        self,
        act: Callable[[], Any],
        env: Mapping[str, str] | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(act, env, (stdout, stderr))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _run(act: Callable[[], Any], env: Mapping[str, str] | None, streams: tuple[IO | int | None, ...]) -> None:
    """Never returns: what the tests do at their end is theirs."""
    code = 1
    try:
        for number, stream in enumerate(streams, 1):
            if stream is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY) if isinstance(stream, int) else stream.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ.update(env or {})
        rank_zero_only.rank = int(os.environ.get("RANK", 0))  # lightning looks when it is imported
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(act: Callable[[], Any], devices: int) -> int:
    """`processes.start`, whose processes do `act`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.subprocess, "Popen", Fork)
        patch.setattr(processes, "GRACE", 1.0)  # a block waits in vain for one that died
        return processes.start(act, devices)  # type: ignore[arg-type]


def killed_once(
    reached: Callable[[Checkpoints, HealingModule, int], bool], act: Callable[[], Any]
) -> Callable[[], None]:
    """`act` that is killed after the first step of which, with the stage and its checkpoints, `reached` is true."""

    def run() -> None:
        before = Checkpoints.after_step

        def after_step(self: Checkpoints, trainer: Any, module: HealingModule, step: int) -> None:
            before(self, trainer, module, step)
            if reached(self, module, step):
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.after_step = after_step
        act()

    return run
