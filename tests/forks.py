"""Runs scripts in copies of one process that has imported everything: torch and its checkpoints alone take four
seconds of a core, a copy a hundredth. For tests whose subject is not how a process starts.

    echo '{"command": ["train_vjepa.py", "--dry_run"], "ranks": 1, "env": {}, "timeout": 60, "out": "/tmp/x"}' \
        | python tests/forks.py         # standard output and errors of rank k: /tmp/x.k.out, /tmp/x.k.err
"""
import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    """A job a line on stdin -> its exit status on stdout. Returns in the copies only: the command that they run."""
    for line in sys.stdin:
        job = json.loads(line)
        pids = {}
        port = free_port()
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                become(rank, port, job)
                return job["command"]
            pids[pid] = rank
        print(wait(pids, job["timeout"]), flush=True)
    return None


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def become(rank, port, job):
    """This process is the one of a rank."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['out']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["env"])
    if job["ranks"] > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                          WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]))
    os.chdir(ROOT)
    # pytest may run under nohup, or in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait(pids, timeout):
    """The first exit status that is not 0, after which the other ranks are killed, as torchrun does; 124 for those
    that took too long. Of ranks that fail, or whose waiter is interrupted, no loader process stays either."""
    end = time.time() + timeout
    status = 0
    left = set(pids)
    try:
        while left:
            pid, told = os.waitpid(-1, os.WNOHANG)
            if pid:
                left.discard(pid)
                status = status or os.waitstatus_to_exitcode(told)
            else:
                time.sleep(0.01)
            if time.time() > end:
                status = status or 124
            if status:
                kill(pids)
    finally:
        if left:
            kill(pids)
    return status


def kill(leaders):
    for pid in leaders:
        with contextlib.suppress(ProcessLookupError):  # it leads no group any more, or not yet: at the next look
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import matplotlib.pyplot  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import tyro  # noqa: F401

    import train_mae4d  # noqa: F401
    import train_salt  # noqa: F401
    import train_tdv  # noqa: F401
    import train_vjepa  # noqa: F401

    command = main()
    if command:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
