"""Shared by the tests: import the project from its root, find real video, run scripts as a user would."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """forked(command, ranks, timeout, env) -> (exit status, [output of each rank], [its errors]): see forks.py."""
    out = str(tmp_path_factory.mktemp("forks") / "job")
    command = [sys.executable, str(ROOT / "tests" / "forks.py")]
    starter = []

    def call(command_line, ranks=1, timeout=300, env=()):
        if not starter:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            starter.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes))
        job = {"command": [*map(str, command_line)], "ranks": ranks, "timeout": timeout, "env": dict(env), "out": out}
        print(json.dumps(job), file=starter[0].stdin, flush=True)
        status = int(starter[0].stdout.readline())
        said = []
        for name in ("out", "err"):
            said.append([Path(f"{out}.{rank}.{name}").read_text(errors="replace") for rank in range(ranks)])
        return status, *said

    yield call
    for process in starter:
        process.stdin.close()
        process.stdout.close()
        process.terminate()  # a loader process of this one may still hold the other end of its input
        process.wait()


@pytest.fixture
def run(forked):
    """run("train_vjepa.py", "--preset", ..., ranks=2) -> (exit status, last JSON line or None, stderr)."""

    def call(*command, ranks=1, timeout=300, env=()):
        status, out, err = forked(command, ranks, timeout, env)
        last = (out[0].strip().splitlines() or [""])[-1]
        return status, json.loads(last) if last.startswith("{") else None, "".join(err)

    return call


@pytest.fixture
def call(capsys):
    """call(train_vjepa, "--preset", ...) -> the last JSON line of the script, run in this process.

    A process of its own takes three seconds to start."""

    def run_here(script, *flags):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            script.main(script.parse_args([str(flag) for flag in flags]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    return run_here


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A list of twelve pictures, each a clip that stands still, of three classes."""
    import data

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        squares = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        data.save_png(folder / f"{i}.png", np.kron(squares, np.ones((8, 8, 1), np.uint8)))
    (folder / "list.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in range(12)))
    return folder / "list.txt"


@pytest.fixture
def probed(monkeypatch):
    """probed(x) -> a list that grows with each pass of the online probe over a list of clips:
    (are the clips random?, how many of a video, what the probe reads of x)."""
    import data

    def watch(x):
        seen = []
        real = data.labelled_features

        def spy(read, source, clip, *args, **kwargs):
            seen.append((clip.train, clip.clips, read(x)))
            return real(read, source, clip, *args, **kwargs)

        monkeypatch.setattr(data, "labelled_features", spy)
        return seen

    return watch


@pytest.fixture
def no_pictures(request, monkeypatch):
    """Of probe.py: each costs a second; `with_pictures` draws them."""
    import model
    import probe

    if "with_pictures" not in request.fixturenames:
        for module, name in ((probe, "draw"), (probe, "radar"), (model, "figure")):
            monkeypatch.setattr(module, name, lambda *args: None)


@pytest.fixture
def with_pictures():
    pytest.importorskip("matplotlib")
