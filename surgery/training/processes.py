"""The processes of one run on several devices: starting them, and knowing of each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import SurgeryError

Result = TypeVar("Result")

MARK = "TORCHELASTIC_RUN_ID"
"""What torchrun leaves in the environment of its processes; lightning looks for it, too."""
PARENT = "SURGERY_PARENT"
GRACE = 10.0
"""Seconds that the other processes have to end by themselves, and to say why, once one has failed."""
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: one of them may be tokenising, or merging."""


@dataclass(frozen=True)
class Team:
    """This process among those of a run.

    rank: of `world` processes. devices: how many of them are on this host.
    """

    rank: int = 0
    world: int = 1
    devices: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def hosts(self) -> int:
        return self.world // self.devices

    def wait(self) -> None:
        """For all others to get here."""
        if self.world > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Once all others have got here, too."""
        if self.world > 1:
            distributed.barrier()
            distributed.destroy_process_group()

    def led(self, act: Callable[[], Result]) -> Result:
        """What `act` returns, which runs in the first process alone; its SurgeryError is raised in all of them."""
        if self.world == 1:
            return act()
        shared: list[Any] = [None, None]
        if self.leads:
            try:
                shared = [act(), None]
            except SurgeryError as error:
                shared = [None, error]
        distributed.broadcast_object_list(shared)
        if shared[1] is not None:
            raise shared[1]
        return shared[0]

    def in_turn(self, act: Callable[[], Result]) -> Result:
        """What `act` returns, which runs in the first process of every host before it does in the others: these find
        what it left on the disk."""
        if self.world == 1:
            return act()
        first = self.rank % self.devices == 0
        result = act() if first else None
        self.wait()
        return act() if result is None else result


def joined() -> bool:
    """Whether torchrun, or `start`, made this process."""
    return MARK in os.environ


def join(devices: int | None, nodes: int, cpu: bool) -> Team:
    """The team that torchrun, or `start`, put this process into; alone if neither did.

    Raises:
        SurgeryError: there are more, or fewer, processes than were asked for.
    """
    env = os.environ
    if not joined():
        if (devices or 1) * nodes > 1:
            raise SurgeryError(
                f"one process cannot train on {(devices or 1) * nodes} devices: start as many, by `surgery convert "
                "--devices N` or by torchrun"
            )
        return Team()
    team = Team(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))
    if (devices or team.devices) != team.devices or (nodes > 1 and nodes != team.hosts):
        raise SurgeryError(
            f"there are {team.devices} processes on each of {team.hosts} hosts, and {devices or 'any'} devices of "
            f"{nodes} were asked for: leave --devices and --nodes to torchrun"
        )
    _end_with_parent()
    if team.world > 1 and not distributed.is_initialized():
        if not cpu:
            torch.cuda.set_device(int(env["LOCAL_RANK"]))
        distributed.init_process_group("gloo" if cpu else "nccl", timeout=PATIENCE)
    return team


def start(command: Sequence[str], devices: int, nodes: int = 1) -> int:
    """Run a command once for each device of this host, as torchrun would, and let the first of them speak; returns its
    exit code. When one fails the others are ended, and so are all when this process is.

    nodes: hosts, each of which runs this; they find each other by MASTER_ADDR, MASTER_PORT and NODE_RANK.

    Raises:
        SurgeryError: a process was killed, or failed while the first did not, or hosts do not know of each other.
    """
    env = environment(devices, nodes)
    first = int(env.get("NODE_RANK", 0)) * devices if nodes > 1 else 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name) / str(index) for index in range(devices)]
        processes: list[subprocess.Popen] = []
        try:
            for index, log in enumerate(logs):
                own = env | {"RANK": str(first + index), "LOCAL_RANK": str(index)}
                heard = None if index == 0 else subprocess.DEVNULL
                with log.open("w") as errors:
                    processes.append(subprocess.Popen(command, env=own, stdout=heard, stderr=errors))
            failed, held = _watch(processes, logs[0])
        finally:
            for process in processes:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)
        if failed is None or (failed == 0 and processes[0].returncode > 0):
            sys.stderr.write(held)
            return 0 if failed is None else processes[0].returncode
        code, said = processes[failed].returncode, logs[failed].read_text().strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed: {said[-1] if said else code}"
        raise SurgeryError(
            f"process {first + failed} of {devices * nodes} {how}, so all were stopped: repeat the command to go on "
            "from the last checkpoint"
        )


def _watch(processes: list[subprocess.Popen], log: Path) -> tuple[int | None, str]:
    """Wait for all to end, or for one to fail and the others to follow, and pass on what the log says until then;
    returns which is to blame, and what the log says afterwards, as others complain of the one that died."""
    failed, until = None, float("inf")
    with log.open() as errors:
        while True:
            said = errors.read()  # before looking who died, so that no complaint is passed on
            codes = [process.poll() for process in processes]
            if failed is None:
                failed = next((index for index, code in enumerate(codes) if code), None)
            if failed is not None or None not in codes:
                break
            sys.stderr.write(said)
            time.sleep(0.05)
        until = time.monotonic() + GRACE
        while None in codes and time.monotonic() < until:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        killed = [index for index, code in enumerate(codes) if code is not None and code < 0]
        if codes[0] == 2:  # it has said what is wrong, as all would
            failed = 0
        elif killed:
            failed = killed[0]
        return failed, said + errors.read()


def environment(devices: int, nodes: int = 1) -> dict[str, str]:
    """What the processes of a host are given, except for RANK and LOCAL_RANK. See `start`."""
    env = dict(os.environ)
    if nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in env]
        if missing:
            raise SurgeryError(
                f"{nodes} hosts find each other by MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of each, "
                f"and {', '.join(missing)} is missing: set it, or use torchrun"
            )
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(devices * nodes), "LOCAL_WORLD_SIZE": str(devices), PARENT: str(os.getpid())}
    return env | world | {MARK: "surgery", "GROUP_RANK": env.get("NODE_RANK", "0")}


def _end_with_parent() -> None:
    """What goes on alone would write into the folder of the run that takes this one's place."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
