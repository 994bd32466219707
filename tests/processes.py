"""Scripts in separate processes, forked from a server that has already imported Lightning.

The import takes some seconds, and a test that starts two ranks would do it twice.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# Imported by the server. None of them may initialize CUDA, which does not survive a fork.
PRELOADED = ["sparse_lightning.callbacks", "tests.callbacks.helpers", "hydra", "matplotlib.pyplot"]
PRELOADED += ["sklearn.datasets", "torch._inductor.compile_fx", "transformers", "wandb"]


def set_preloads() -> None:
    """Tell the server what to import; without effect once it runs.

    A process has one server for all its users, so a strategy of Lightning may start it first.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)


class Script:
    """A script that runs in a forked process.

    Args:
        path: path of the script, run as `__main__`.
        arguments: command-line arguments.
        environment: variables added to this process's.
        cwd: working directory.
        terminal: file descriptor for stdout and stderr; if None, `wait` returns the output.
    """

    def __init__(
        self,
        path: str | Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        terminal: int | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.command = [str(path), *map(str, arguments)]
        self._files = [tempfile.TemporaryFile("w+b") for _ in range(2)]  # noqa: SIM115
        descriptors = [file.fileno() if terminal is None else terminal for file in self._files]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process: BaseProcess = context.Process(
            target=_run, args=(self.command, variables, str(cwd), [*map(DupFd, descriptors)])
        )
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait until the script ends; return its exit status and output."""
        self.process.join(timeout)
        if (status := self.process.exitcode) is None:
            self.process.kill()
            self.process.join()
        printed = []
        for file in self._files:
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
            file.close()
        if status is None:
            raise subprocess.TimeoutExpired(self.command, timeout, *printed)
        return subprocess.CompletedProcess(self.command, status, *printed)


def run(
    path: str | Path,
    *arguments: object,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, like `subprocess.run`; if it fails, fail with its output."""
    done = Script(path, *arguments, environment=environment, cwd=cwd).wait(timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_ranks(
    path: str | Path, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script as two ranks, which end with `end_rank`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        Script(
            path,
            *arguments,
            environment={
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "NODE_RANK": "0",
                **{"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            },
        )
        for rank in (0, 1)
    ]
    # A rank whose peer has failed may wait for it forever.
    multiprocessing.connection.wait([rank.process.sentinel for rank in ranks], timeout=300)
    done = []
    for rank in ranks:
        try:
            done.append(rank.wait(60))
        except subprocess.TimeoutExpired as error:
            done.append(subprocess.CompletedProcess(error.cmd, -9, error.output, error.stderr))
    status = next((rank.returncode for rank in done if rank.returncode), 0)
    printed = [rank.stdout + rank.stderr for rank in done]
    assert not check or status == 0, "".join(printed)
    return subprocess.CompletedProcess(done[0].args, status, "".join(printed), "")


def end_rank() -> None:
    """End this process once all ranks have called this, and so have written their files.

    It skips the interpreter's shutdown, in which gloo may crash or hang if a group exists.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def _run(
    command: Sequence[str], variables: Mapping[str, str], cwd: str, outputs: Sequence[DupFd]
) -> None:
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(output.detach(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = [*command]
    sys.path.insert(0, str(Path(command[0]).parent))
    torch.set_num_threads(1)
    status = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
