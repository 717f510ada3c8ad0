"""Shared by the tests: import the project from its root, find real video, run scripts as a user would."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture
def video_data():
    """The folder of real videos named by VIDEO_DATA."""
    folder = os.environ.get("VIDEO_DATA", "")
    if not os.path.isdir(folder):
        pytest.skip("real video: set VIDEO_DATA to a folder with signs/, dense/ and odd/")
    return Path(folder)


@pytest.fixture
def run():
    """run("train_vjepa.py", "--preset", ..., ranks=2) -> (exit status, last JSON line or None, stderr)."""
    def call(*command, ranks=1, threads=1, timeout=300, env=()):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0", "--standalone"] if ranks > 1 else []
        done = subprocess.run([sys.executable, *launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads), **dict(env)})
        last = (done.stdout.strip().splitlines() or [""])[-1]
        return done.returncode, json.loads(last) if last.startswith("{") else None, done.stderr
    return call
