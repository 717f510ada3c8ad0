"""What the README promises under "What happens when", one test a promise, each by injecting the fault into a run of
the real script."""

import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data as D
import model as M
import probe as P
import train_vjepa as V

ROOT = Path(D.__file__).parent
TINY = (
    "--preset", "laptop", "--steps", "6", "--batch_size", "8", "--log_every", "1", "--sample_every", "0",
    "--probe_data", "--warmup", "2",
)
SCRIPTS = ("train_vjepa", "train_salt", "train_tdv", "train_mae4d")
DRIVER = (
    "import os, signal, sys, time\nimport torch\nimport data as D, model as M, {} as V\n"
    "{}\n"
    "V.launch(V.main, V.parse_args())\n"
)
AT_STEP = (
    "old, place = V.VJEPA.forward, V.VJEPA.place\n"
    "def note(self, keep, pred, x, step, row):\n"
    "    self.step = step\n"
    "    return place(self, keep, pred, x, step, row)\n"
    "V.VJEPA.place = note\n"
    "def forward(self, x, keep=None, pred=None):\n"
    "    out = old(self, x, keep, pred)\n"
    "    if keep is None: return out\n"
    "    step = getattr(self, 'step', -1)\n"  # the plan's pass
    "    rank = os.environ.get('RANK', '0')\n"
    "{}\n"
    "    return out\n"
    "V.VJEPA.forward = forward\n"
)


@pytest.fixture
def start(tmp_path):
    """start(*flags, code=, ranks=) -> a running process: train_vjepa.py, with `code` run before it starts. None of
    them outlives the test. before: words of the command line before python."""
    begun = []

    def begin(*flags, code="", ranks=1, out=tmp_path / "out", env=(), script="train_vjepa", before=()):
        (driver := tmp_path / f"driver{len(begun)}.py").write_text(DRIVER.format(script, code))
        launcher = (
            ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
        )
        if ranks > 1:  # as assets/faults.md says
            launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP", "--shutdown-timeout", "600"]
        command = [*before, sys.executable, *launcher, str(driver), *map(str, (*TINY, "--out_dir", out, *flags))]
        begun.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # pytest may run under nohup
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **dict(env)},
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        for pid in [process.pid, *children(process.pid)]:  # ranks have groups of their own
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.communicate()


@pytest.fixture
def train(start, forked, tmp_path):
    """The same, waited for -> (exit status, stderr). Its ranks are copies of a process that waits for them."""

    def call(*flags, timeout=120, code="", ranks=1, out=tmp_path / "out", script="train_vjepa", **keywords):
        if not keywords:
            (driver := tmp_path / "driver.py").write_text(DRIVER.format(script, code))
            status, _, err = forked([driver, *TINY, "--out_dir", out, *flags], ranks, timeout)
            return status, "".join(err)
        process = start(*flags, code=code, ranks=ranks, out=out, script=script, **keywords)
        err = process.communicate(timeout=timeout)[1]
        return process.returncode, err

    return call


def lines(out, key="loss"):
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if key in line]


def losses(out):
    """By step; of a step that was run twice, the later one."""
    return {line["step"]: line["loss"] for line in lines(out)}


def checkpoint(out, step=6):
    """All of a checkpoint: weights, EMA, optimizer, and what stands beside them."""
    dcp_to_torch_save(Path(out) / f"step_{step:08d}", temp := Path(out) / "all.pt")
    found = {}
    flat = lambda value, name: (
        [flat(v, f"{name}.{k}") for k, v in (value.items() if isinstance(value, dict) else enumerate(value))]
        if isinstance(value, (dict, list, tuple))
        else found.update({name: value})
    )
    flat(torch.load(temp, weights_only=True), "")
    return found | {"extra": (Path(out) / f"step_{step:08d}" / "extra.json").read_text()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])] == []


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def one_line(err, *words):
    assert "Traceback" not in err and all(w in err for w in words), err[-3000:]
    assert sum(line.startswith("error: ") for line in err.splitlines()) >= 1, err[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of 6 steps, a checkpoint each."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, "train_vjepa.py", *TINY, "--out_dir", str(out), "--save_every", "1", "--keep", "9"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return out


def copy_of(whole, tmp_path, steps=5):
    """The same run, killed after so many steps."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for path in out.glob("step_*"):
        if int(path.name[5:]) > steps:
            shutil.rmtree(path)
    (out / "latest").write_text(f"step_{steps:08d}")
    return out


# --- checkpoints ----------------------------------------------------------------------------------


def test_killed_at_any_moment_of_saving_a_run_goes_on_from_a_whole_checkpoint(whole, tmp_path):
    """Promise: SIGKILL at any moment leaves the last good checkpoint. 50 kills in one run; in the end it equals the
    undisturbed one bit for bit."""
    out = tmp_path / "out"
    driver = tmp_path / "kills.py"
    driver.write_text(f"""
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import data as D, model as M, train_vjepa as V
out, random = Path({str(out)!r}), random.Random(0)
flags = {[*TINY]!r} + ["--out_dir", str(out), "--save_every", "1", "--resume", "--workers"]
span, seen = 0.3, {{}}
for kill in range(51):
    stop = kill % 6 + 1 if kill < 50 else 6
    # from some checkpoint on, so that there is always one to be written
    if kill < 50 and out.exists():
        names = sorted(p.name for p in out.glob("step_*"))
        if names:
            again = kill % 5 == 0 or names[-1] == "step_00000006"
            (out / "latest").write_text(names[0] if again else names[-1])
    before = M.newest(out) if out.exists() else None
    pid = os.fork()
    if not pid:
        sys.stderr = open(os.devnull, "w")
        # loader processes of the run before are still there, and must not hold the folder
        V.launch(V.main, V.parse_args(flags + [str(kill % 3)]))
        os._exit(0)
    if kill == 50:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        break
    while not (out / "saving").exists() and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(0.0005)
    time.sleep(random.random() * span)
    at = "saving" if (out / "saving").exists() else "pointer" if list(out.glob("*.tmp")) else "after"
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    seen[at] = seen.get(at, 0) + 1
    found = M.newest(out)
    assert found is None or isinstance(found, Path) and not M.broken(found), found
    assert found is None or before is None or found.name >= before.name or kill % 5 == 0, (found, before)
print(seen)
""")
    done = subprocess.run(
        [sys.executable, str(driver)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert_same(checkpoint(out), checkpoint(whole))
    assert not (out / "saving").exists()


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint_resumes(train, whole, tmp_path):
    """Promise: disk full leaves the last good checkpoint. Injected: the third save may not write more than 100 kB."""
    full = (
        "old = V.Run.save\n"
        "def save(self, *rest):\n"
        "    if self.done == 3:\n"
        "        import resource\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    old(self, *rest)\n"
        "V.Run.save = save\n"
    )
    status, err = train("--save_every", 1, code=full)
    assert status == 1 and M.newest(tmp_path / "out").name == "step_00000002"
    one_line(err, "File too large", "what was saved before", "stays valid")
    status, err = train("--save_every", 1, "--resume")
    assert status == 0, err
    assert_same(checkpoint(tmp_path / "out"), checkpoint(whole))


def test_a_disk_that_is_really_full(train, tmp_path):
    """The same on a file system of 60 MB."""
    (small := tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and its rights")
    try:
        status, err = train("--save_every", 1, "--keep", 9, out=small / "out")
        assert status == 1 and isinstance(M.newest(small / "out"), Path)
        one_line(err, "No space left on device")
        for path in sorted((small / "out").glob("step_*"))[:-1]:
            shutil.rmtree(path)
        assert train("--save_every", 1, "--keep", 1, "--resume", out=small / "out")[0] == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, os.remove])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys, damage, name):
    """Promise: a truncated file or one flipped bit is refused by its hash, and the newest whole checkpoint is used."""
    out = copy_of(whole, tmp_path)
    damage(out / "step_00000005" / name)
    assert M.newest(out) == out / "step_00000004"
    assert name in capsys.readouterr().err


def test_a_run_with_a_damaged_checkpoint_and_a_stray_directory_ends_like_the_undisturbed_one(train, whole, tmp_path):
    """Promise: nothing half-written is picked, and nothing is left behind."""
    out = copy_of(whole, tmp_path)
    flip(out / "step_00000005" / "__0_0.distcp")
    (out / "saving").mkdir()
    (out / "saving" / "__0_0.distcp").write_text("half")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    status, err = train("--save_every", 1, "--resume")
    assert status == 0 and "step_00000005/__0_0.distcp is damaged" in err, err
    assert not (out / "saving").exists() and losses(out) == losses(whole)
    assert_same(checkpoint(out), checkpoint(whole))


def test_when_no_checkpoint_is_whole_nothing_is_started(train, whole, tmp_path):
    out = copy_of(whole, tmp_path, 1)
    flip(out / "step_00000001" / "extra.json")
    status, err = train("--resume")
    assert status == 2
    one_line(err, "none of its checkpoints is whole")


def test_a_run_that_has_a_checkpoint_has_exported(train, tmp_path):
    status, _ = train(code="M.Run.save = lambda *_: os._exit(9)\n")
    assert status == 9 and (tmp_path / "out" / "encoder.safetensors").exists()
    assert train("--resume")[0] == 0


# --- exact resume ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["accumulated", "epochs"])
def test_stopped_and_resumed_is_bit_for_bit_the_undisturbed_run(train, pictures, tmp_path, kind):
    """Promise: n steps equal k + resume + n - k: weights, EMA, optimizer, losses, log; within an epoch (step 2) and
    at its end (step 3); with gradient accumulation; with other --workers and --log_every that does not divide."""
    flags = {"accumulated": ("--micro_batch", 2), "epochs": ("--data", pictures)}[kind]
    for name, stops in (("whole", (0,)), ("parts", (2, 3, 0))):
        for i, stop in enumerate(stops):
            status, err = train(
                *flags, "--log_every", 4, "--resume", "--stop_at", stop, "--workers", i % 3, out=tmp_path / name
            )
            assert status == 0, err
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(train, whole, tmp_path, ranks):
    """Promise: 2 -> 1 and 1 -> 2 ranks see the same samples; losses within 1e-6."""
    for n, stop in zip(ranks, (3, 0)):
        status, err = train("--resume", "--stop_at", stop, ranks=n)
        assert status == 0, err
    got, want = losses(tmp_path / "out"), losses(whole)
    assert max(abs(got[s] - want[s]) for s in want) < 1e-6, (got, want)


def test_the_newest_checkpoints_stay(call, tmp_path):
    """Promise: keep the newest K."""
    call(V, *TINY, "--save_every", 1, "--keep", 2, "--workers", 0, "--out_dir", tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out").glob("step_*"))
    assert kept == ["step_00000005", "step_00000006"]
    assert (tmp_path / "out" / "latest").read_text() == kept[-1]


# --- signals and processes ------------------------------------------------------------------------


def children(pid):
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


SLOW = (
    "old = M.Meter.after_step\n"
    "def after_step(self):\n"
    "    old(self)\n"
    "    time.sleep(0.3)\n"
    "M.Meter.after_step = after_step\n"
)


def has_lines(out, n=2):
    return lambda: (out / "log.jsonl").exists() and len(lines(out)) >= n


def test_a_signal_to_one_rank_of_two_saves_once_and_ends_all(start, tmp_path):
    """Promise: a signal on one rank: all ranks save the same step, once, and exit with status 0."""
    process, out = start("--steps", 60, code=SLOW, ranks=2), tmp_path / "out"
    wait_for(has_lines(out))
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    said, err = process.communicate(timeout=60)
    saved = [p.name for p in out.glob("step_*")]
    assert process.returncode == 0 and len(saved) == 1 and (out / "latest").read_text() == saved[0], err[-3000:]
    assert json.loads(said.strip().splitlines()[-1])["steps"] == int(saved[0][5:])


def test_the_first_interrupt_saves_and_the_second_leaves_at_once(start, tmp_path):
    """Promise: Ctrl-C finishes the step and saves; a second one waits for nothing."""
    for slow, interrupts, status in ((0.3, 1, 0), (600, 2, 130)):
        out = tmp_path / f"out{interrupts}"
        process = start("--steps", 60, code=SLOW.replace("0.3", str(slow)), out=out)
        wait_for(has_lines(out, 2) if slow < 1 else (out / "log.jsonl").exists)
        time.sleep(1)
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        process.communicate(timeout=20)
        assert process.returncode == status and (out / "latest").exists() == (interrupts == 1)


def test_a_killed_rank_ends_the_job_within_a_minute(start, tmp_path):
    """Promise: a rank that dies ends the job with a message, never a hang."""
    process = start("--steps", 600, code=SLOW, ranks=2)
    wait_for(has_lines(tmp_path / "out"))
    begin = time.time()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and time.time() - begin < 60 and "SIGKILL" in err, err[-3000:]


def test_a_killed_loader_process_ends_the_run_with_one_line(start, tmp_path):
    """Promise: a loader process that dies ends the run with a message, never a hang."""
    process = start("--steps", 600, "--workers", 2, code=SLOW)
    wait_for(has_lines(tmp_path / "out"))
    os.kill(children(process.pid)[0], signal.SIGKILL)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    one_line(err, "a loader process died or hangs", "--resume")


def test_what_a_loader_process_raises_is_told_as_what_it_is(train):
    wrong = "def batch(self, numbers):\n    return {}['colour']\nD.Clips.batch = batch\n"
    status, err = train("--workers", 1, code=wrong)
    assert status == 1 and "KeyError: 'colour'" in err and "dies or hangs" not in err


def test_out_of_memory_is_one_line_that_says_what_would_help(train, tmp_path):
    """Promise: and --micro_batch 0 fits. Injected: a limit on the process's memory, as `ulimit -v` sets it."""
    limit = (
        "import resource\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        # between what 128 and what 256 clips need, with room for what malloc keeps
        "most = pages * 4096 + 900 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
    )
    flags = ("--batch_size", 512, "--workers", 0, "--steps", 1)
    status, err = train(*flags, "--micro_batch", 512, code=limit)
    assert status == 1
    words = ("--micro_batch 256 saves", "--checkpoint saves", "ranks saves", "GiB planned")
    one_line(err, "error: out of memory", "warning: more than is free", *words)
    status, err = train(*flags, "--resume", code=limit)
    assert status == 0, err[-2000:]
    chosen = json.loads((tmp_path / "out" / "config.json").read_text())["config"]["micro_batch"]
    assert 16 <= chosen <= 256


def test_an_error_that_all_ranks_meet_is_told_once_and_last(start):
    """Promise: under torchrun one line from one rank, and again below torchrun's own traceback."""
    process = start("--lr", "nan", ranks=2)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: --lr nan: a positive finite number is needed"]
    assert "error: --lr nan" in err.partition("ChildFailedError")[2]


def test_a_hanging_loader_process_ends_the_run_after_timeout(start, tmp_path):
    """Promise: a loader process that is silent for --timeout seconds ends the run, also one that was told to stop
    meanwhile. Injected: it sleeps at clip 24."""
    hang = (
        "old = D.Clips.batch\n"
        "def batch(self, numbers):\n"
        "    if 24 in numbers: time.sleep(600)\n"
        "    return old(self, numbers)\n"
        "D.Clips.batch = batch\n"
    )
    process = start("--workers", 2, "--timeout", 8, "--save_every", 1, code=hang)
    wait_for(has_lines(tmp_path / "out", 3))
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=90)[1]
    assert process.returncode == 1 and M.newest(tmp_path / "out").name == "step_00000003", err[-3000:]
    one_line(err, "timed out after 8 seconds")


@pytest.mark.parametrize("script, number", [
    ("train_vjepa", signal.SIGTERM),
    ("train_salt", signal.SIGUSR1),
    ("train_tdv", signal.SIGHUP),
    ("train_mae4d", signal.SIGINT),
])
def test_a_signal_to_all_processes_saves_and_ends_the_run(start, tmp_path, script, number):
    """Promise: also with loader processes. A terminal, timeout and kill -TERM -- -PGID reach them all."""
    process = start("--steps", 600, "--workers", 2, code=SLOW, script=script)
    out = tmp_path / "out" / "stage1" if script == "train_salt" else tmp_path / "out"
    wait_for(has_lines(out))
    os.killpg(process.pid, number)
    said, err = process.communicate(timeout=90)
    saved = [path.name for path in out.glob("step_*")]
    assert process.returncode == 0 and len(saved) == 1 and "Traceback" not in err, err[-3000:]
    assert M.newest(out).name == saved[0] and (out / "encoder.safetensors").exists()
    assert json.loads(said.strip().splitlines()[-1])["steps"] == int(saved[0][5:])


def test_nohup_is_obeyed(start, tmp_path):
    process = start("--steps", 8, "--workers", 1, code=SLOW, before=("nohup",))
    wait_for(has_lines(tmp_path / "out"))
    os.killpg(process.pid, signal.SIGHUP)
    said, err = process.communicate(timeout=90)
    assert process.returncode == 0 and json.loads(said.strip().splitlines()[-1])["steps"] == 8, err[-3000:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_torchrun_saves_once_and_ends_all(start, tmp_path, number):
    """Promise: torchrun hands it to all processes of all ranks; killed itself, it hands on nothing, and the ranks
    notice. (Its own status is then not 0: it tells of the signal.)"""
    process, out = start("--steps", 600, "--workers", 2, code=SLOW, ranks=2), tmp_path / "out"
    wait_for(has_lines(out))
    below = children(process.pid)
    below += [pid for rank in below for pid in children(rank)]
    process.send_signal(number)
    err = process.communicate(timeout=90)[1]
    wait_for(lambda: not any(alive(pid) for pid in below))
    saved = [path.name for path in out.glob("step_*")]
    assert process.returncode != 0 and len(saved) == 1 and (out / "latest").read_text() == saved[0], err[-3000:]


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("when, ranks", [("start", 2), ("middle", 1)])
def test_a_signal_in_a_probe_is_obeyed_at_once(start, tmp_path, when, ranks):
    """Promise: within 10 s. Injected: a probe of which every batch takes 2 s, 64 s in all."""
    slow = (
        "old, calls = D.labelled_features, []\n"
        "def labelled_features(read, *rest, **named):\n"
        "    calls.append(1)\n"
        f"    if {when == 'middle'} and len(calls) < 3:\n"
        "        return torch.eye(2), torch.arange(2), torch.ones(2, dtype=torch.bool)\n"
        "    print('in a probe', file=sys.stderr, flush=True)\n"
        "    def slowly(x):\n"
        "        time.sleep(2)\n"
        "        return read(x)\n"
        "    return old(slowly, *rest, **named)\n"
        "D.labelled_features = labelled_features\n"
    )
    process = start("--probe_data", "world", "world", "--probe_every", 2, "--steps", 60, code=slow, ranks=ranks)
    for line in process.stderr:
        if "in a probe" in line:
            break
    time.sleep(3)
    os.kill(children(process.pid)[-1] if ranks > 1 else process.pid, signal.SIGTERM)
    begin = time.time()
    said = process.communicate(timeout=60)[0]
    steps = 0 if when == "start" else 3
    assert process.returncode == 0 and time.time() - begin < 30
    assert json.loads(said.strip().splitlines()[-1])["steps"] == steps
    assert [path.name for path in (tmp_path / "out").glob("step_*")] == [f"step_{steps:08d}"] * (steps > 0)


def test_a_console_that_is_gone_is_no_reason_to_stop(start, tmp_path):
    """Promise: Ctrl-C also ends the tee of `2>&1 | tee log`; the run saves and leaves with status 0 all the same."""
    process, out = start("--steps", 600, "--workers", 1, code=SLOW), tmp_path / "out"
    wait_for(has_lines(out))
    process.stdout.close()
    process.stderr.close()
    wait_for(has_lines(out, len(lines(out)) + 2))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and isinstance(M.newest(out), Path)
    process.stdout = process.stderr = None


@pytest.mark.parametrize("script", [*SCRIPTS, "probe"])
def test_an_interrupt_before_the_run_has_begun_leaves_without_a_traceback(tmp_path, script):
    command = [sys.executable, "-X", "importtime", f"{script}.py", *TINY, "--out_dir", tmp_path / "out"]
    if script == "probe":
        command[4:] = ["classify", "--data", "world", "--out_dir", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = ""
    while "numpy" not in said:  # on the way to torch
        said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert all(line.startswith("import time:") for line in said.splitlines()), said[-2000:]


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "    if step == 2 and rank == '1': out = (out[0] * float('nan'), out[1])",
        "    if step == 2 and rank == '1': out[0].register_hook(lambda g: g * float('inf'))",
    ],
    ids=["loss", "gradient"],
)
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(train, tmp_path, fault):
    """Promise: every rank skips alike, weights and EMA stay, the run goes on, the log names the files."""
    status, err = train("--save_every", 1, "--keep", 9, "--stop_at", 5, code=AT_STEP.format(fault), ranks=2)
    out = tmp_path / "out"
    assert status == 0, err[-3000:]
    # none of step 3, which was skipped
    assert sorted(path.name[-1] for path in out.glob("step_*")) == ["1", "2", "4", "5"]
    skipped, before, later = lines(out, "skipped"), checkpoint(out, 2), checkpoint(out, 5)
    assert [s["step"] for s in skipped] == [2]
    assert len(skipped[0]["files"]) in (4, 8)
    assert all(f.startswith("world/train/") for f in skipped[0]["files"])
    tensors = [k for k in before if torch.is_tensor(before[k])]
    assert not all(torch.equal(before[k], later[k]) for k in tensors)
    assert sorted(losses(out)) == [1, 2, 4, 5]


def test_a_signal_before_a_skipped_step_saves_after_the_next_one(train, tmp_path):
    """Injected: a signal in step 2, a loss that is not finite in step 3."""
    fault = "    if step == 2: V.Run.signalled = True\n    if step == 3: out = (out[0] / 0, out[1])"
    status, err = train("--steps", 9, "--log_every", 9, code=AT_STEP.format(fault))
    assert status == 0 and M.newest(tmp_path / "out").name in ("step_00000005", "step_00000006"), err[-3000:]


def test_many_skips_in_a_row_end_the_run(train, tmp_path):
    """Promise: --max_skips skipped steps in a row stop the run, naming step and files."""
    status, err = train(
        "--max_skips", 3, "--save_every", 1, code=AT_STEP.format("    if step >= 2: out = (out[0] / 0, out[1])")
    )
    assert status == 1 and len(lines(tmp_path / "out", "skipped")) == 3
    one_line(err, "step 4: 3 steps in a row", "world/train/", "the last good checkpoint: ", "step_00000002")
    assert M.newest(tmp_path / "out").name == "step_00000002"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_last_good_checkpoint_is_good(call, tmp_path, script):
    """Promise: what a step has ruined is neither saved nor exported, and drives no good checkpoint out."""
    out = tmp_path / "out"
    with pytest.raises(M.Stop, match="the last good checkpoint"):
        call(importlib.import_module(script), *TINY, "--steps", 30, "--workers", 0, "--lr", 1e30, "--max_skips", 4,
             "--save_every", 1, "--keep", 2, "--out_dir", out)
    out = out / "stage1" if script == "train_salt" else out
    first = min(line["step"] for line in lines(out, "skipped"))
    good = M.newest(out)
    assert good is None or int(good.name[5:]) < first
    if good:
        encoder, config = M.load_encoder(out)
        shape = (1, 3, config["frames"], config["size"], config["size"])
        assert int(good.name[5:]) == config["step"] and encoder(torch.randn(shape)).isfinite().all()


def test_a_run_that_ends_while_steps_are_skipped_says_so(start, tmp_path):
    process = start("--save_every", 1, code=AT_STEP.format("    if step >= 4: out = (out[0] / 0, out[1])"))
    said, err = process.communicate(timeout=90)
    assert process.returncode == 0 and M.newest(tmp_path / "out").name == "step_00000004", err[-3000:]
    assert json.loads(said.strip().splitlines()[-1])["skipped"] == 2


def test_weights_that_are_not_finite_are_named_and_no_clip_is_blamed(call, tmp_path):
    encoder, config = M.load_encoder("random:vit_n", frames=8, size=32, patch=8, pos="rope")
    encoder.blocks[0].mlp.fc1.bias.data[0] = float("nan")
    M.save_encoder(tmp_path / "nan.safetensors", encoder, config)
    with pytest.raises(M.UserError, match=r"nan.safetensors: not finite blocks.0.mlp.fc1.bias"):
        call(V, *TINY, "--init", tmp_path / "nan.safetensors", "--out_dir", tmp_path / "out")


@pytest.mark.parametrize("script", ["train_vjepa", "train_tdv"])
def test_no_list_and_no_features_break_the_online_probe(call, pictures, tmp_path, script, monkeypatch):
    """Promise: one sample, a label of a million, features that are not finite: an accuracy, and the run goes on.
    Injected: NaN in the second probe."""
    (pictures.parent / "one.txt").write_text("0.png 1000000\n")
    old, probes = D.labelled_features, []

    def labelled_features(read, *rest, **named):
        probes.append(1)
        nan = len(probes) in (3, 4)
        return old((lambda x: read(x) * float("nan")) if nan else read, *rest, **named)

    monkeypatch.setattr(D, "labelled_features", labelled_features)
    one = pictures.parent / "one.txt"
    flags = (*TINY, "--steps", 4, "--probe_every", 2, "--workers", 0, "--probe_data", one, one)
    last = call(importlib.import_module(script), *flags, "--out_dir", tmp_path / "out")
    assert last["steps"] == 4 and last["probe_acc"] == 1.0
    assert [line["probe_acc"] for line in lines(tmp_path / "out", "probe_acc")] == [0.0, 1.0]


def test_clips_in_both_lists_of_the_online_probe_are_told(pictures, capsys):
    args = V.parse_args([*TINY, "--probe_data", str(pictures), str(pictures)])
    assert len(M.probe_lists(args)) == 2
    assert "warning: 12 of the 12 val videos are also in" in capsys.readouterr().err


def test_an_error_of_another_file_is_not_blamed_on_the_out_directory(train):
    status, err = train(code="def gone(*_, **__): open('/nowhere/else.bin')\nD.make_loader = gone\n")
    assert status == 1
    one_line(err, "error: [Errno 2] No such file or directory: '/nowhere/else.bin'")


# --- data -----------------------------------------------------------------------------------------


def test_a_video_that_cannot_be_read_is_replaced_counted_and_named_once(train, pictures, tmp_path):
    """Promise: replaced deterministically: other workers, other ranks, the same losses."""
    folder = pictures.parent
    (folder / "broken, one.png").write_bytes(b"not a picture")
    (folder / "with_bad.txt").write_text(pictures.read_text() + "broken, one.png 0\n")
    found = []
    for name, flags, ranks in (("a", (), 1), ("b", ("--workers", 2), 1), ("c", (), 2)):
        status, err = train("--data", folder / "with_bad.txt", *flags, ranks=ranks, out=tmp_path / name)
        assert status == 0 and 1 <= err.count("bad video: ") <= ranks and "broken, one.png" in err, err[-3000:]
        found.append((lines(tmp_path / name)[-1]["bad"], np.array(list(losses(tmp_path / name).values()))))
    assert found[0][0] == found[1][0] == found[2][0] > 0
    assert (found[0][1] == found[1][1]).all() and np.abs(found[0][1] - found[2][1]).max() < 1e-6


def test_bad_videos_are_counted_over_all_micro_batches(call, pictures, tmp_path):
    """Promise: counted. After each step the log has all that the loader has met until then."""
    folder = pictures.parent
    for i in range(3):
        (folder / f"torn{i}.png").write_bytes(b"not a picture")
    rows = "".join(f"torn{i}.png 0\n" for i in range(3))
    (folder / "with_torn.txt").write_text(pictures.read_text() + rows)
    last = call(
        V, *TINY, "--data", folder / "with_torn.txt", "--micro_batch", 2, "--workers", 0, "--max_bad_fraction", 0.5,
        "--out_dir", tmp_path / "out",
    )
    loader = D.make_loader(
        [D.parse_list(folder / "with_torn.txt")],
        D.Clip(frames=8, size=32),
        seed=0,
        batch_size=8,
        micro_batch=8,
        steps=6,
    )
    met = np.cumsum([len(batch["bad"]) for batch in loader])
    assert met[-1] > met[0] and last["bad"] == met[-1]
    assert [line["bad"] for line in lines(tmp_path / "out")] == met.tolist()


def test_a_list_of_bad_videos_only_ends_before_long(train, tmp_path):
    """Promise: all bad never loops; over --max_bad_fraction the run stops."""
    for i in range(30):
        (tmp_path / f"{i}.mp4").write_text("text named mp4")
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4\n" for i in range(30)))
    status, err = train("--data", tmp_path / "list.txt")
    assert status == 2
    one_line(err, "20 videos in a row cannot be read")


def test_more_bad_videos_than_allowed_stop_the_run(train, pictures, tmp_path):
    folder = pictures.parent
    for i in range(6):
        (folder / f"bad{i}.png").write_bytes(b"not a picture")
    (folder / "many_bad.txt").write_text(pictures.read_text() + "".join(f"bad{i}.png 0\n" for i in range(6)))
    status, err = train("--data", folder / "many_bad.txt", "--steps", 60)
    assert status == 1
    one_line(err, "--max_bad_fraction 0.1", "python data.py check")


def test_every_awkward_file_has_an_outcome_in_training_and_in_evaluation(video_data, train, tmp_path):
    """Promise: a list of the awkward files trains (bad ones replaced) and evaluates (bad ones count as wrong, never
    swapped)."""
    files = sorted(p for p in (video_data / "odd").iterdir() if p.suffix != ".md")
    (tmp_path / "odd.txt").write_text("".join(f"{p} {i % 2}\n" for i, p in enumerate(files)))
    status, err = train("--data", tmp_path / "odd.txt", "--max_bad_fraction", 0.5, "--stride", 1, "--steps", 12)
    bad = lines(tmp_path / "out")[-1]["bad"]
    assert status == 0 and bad > 0 and np.isfinite(list(losses(tmp_path / "out").values())).all(), err[-3000:]
    batches = list(
        D.eval_batches(
            D.parse_list(tmp_path / "odd.txt"), D.Clip(frames=8, stride=1, size=32, train=False), batch_size=4
        )
    )
    ok, index = torch.cat([b["ok"] for b in batches]), torch.cat([b["index"] for b in batches])
    assert index.tolist() == list(range(len(files))) and 3 <= (~ok).sum() <= 8
    for b in batches:
        assert all(not b["video"][i].any() for i in range(len(b["ok"])) if not b["ok"][i])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "there is no video in it"),
        ("a.png 1\nmissing.mp4 2\n", "list.txt:2: no file"),
        ("http://x.org/a.mp4 1\n", "list.txt:1: 'http://x.org/a.mp4' is a URL"),
        ("sub 1\n", "a directory without numbered images"),
        ("a.png -1\n", "label '-1' is neither an integer from 0 on nor a name"),
        ("a.png 99999999999\n", "label 99999999999 is out of range"),
        ("../a.png 1\n", "leads out of the list's folder"),
        ("path,label\na.png,1.5\n", "list.txt:2: label '1.5' is neither an integer from 0 on nor a name"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, text, message):
    """Promise: empty list, malformed row, unknown label, missing file, URL, directory: one line each, before the
    model is built."""
    D.save_png(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "sub").mkdir()
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(D.DataError) as e:
        D.parse_list(tmp_path / "list.txt")
    assert message in str(e.value) and "\n" not in str(e.value)


def test_names_with_blanks_commas_umlauts_and_windows_line_ends_are_fine(tmp_path):
    names = ["a b.png", "a, b.png", "ü 日本.png", "3 4.png"]
    for name in names:
        D.save_png(tmp_path / name, np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "list.txt").write_bytes(
        "\ufeff".encode() + "".join(f"{n} {i}\r\n" for i, n in enumerate(names)).encode()
    )
    source = D.parse_list(tmp_path / "list.txt")
    assert [Path(p).name for p in source.paths] == names and source.labels.tolist() == [0, 1, 2, 3]


def test_a_video_shorter_than_the_clip_repeats_its_last_frame(tmp_path):
    D.save_png(tmp_path / "a.png", np.full((40, 40, 3), 7, np.uint8))
    clip = D.Clip(frames=8, size=32, train=False)
    assert (D.read_clips(str(tmp_path / "a.png"), clip) == 7).all()
    with pytest.raises(ValueError, match="shorter than the clip"):
        D.frame_positions(5, D.Clip(frames=8, stride=1, short="error"))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--resume", "--model", "vit_t"), ("model (vit_n -> vit_t)",)),
        (("--resume", "--data", "PICTURES"), ("was started with other data", "--new_data goes on")),
        (("--resume", "--preset", "vjepa2", "--data", "world"), ("preset (laptop -> vjepa2)", "frames (8 -> 16)")),
        ((), ("holds a run", "--resume")),
    ],
)
def test_a_resumed_run_keeps_its_settings(train, whole, pictures, tmp_path, flags, words):
    """Promise: a resume with another model, list or preset is refused, naming the fields; a run is not overwritten."""
    copy_of(whole, tmp_path)
    status, err = train(*(str(pictures) if f == "PICTURES" else f for f in flags))
    assert status == 2 and not lines(tmp_path / "out", "nothing")
    one_line(err, *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch_size", 0), ("--batch_size 0",)),
        (("--lr", "nan"), ("--lr nan",)),
        (("--micro_batch", 3), ("--batch_size 8 is not divisible",)),
        (("--ema", 1.5), ("--ema 1.5",)),
        (("--frames", 7), ("frames 7 is not divisible by tubelet 2",)),
        (("--patch", 7), ("size 32 is not divisible by patch 7",)),
        (("--mask_tokens", 3), ("--mask_tokens 3",)),
        (("--init", "nowhere.pt"), ("nowhere.pt",)),
        (("--masks", "causal:0.5", "2x1.5"), ("2x1.5",)),
        (("--out_dir", "/proc/nowhere"), ("--out_dir /proc/nowhere",)),
        (("--out_dir", __file__), (f"--out_dir {__file__}",)),
    ],
)
def test_what_cannot_work_is_refused_before_the_out_directory_is_touched(train, tmp_path, flags, words):
    status, err = train(*flags)
    assert status == 2 and not (tmp_path / "out").exists()
    one_line(err, *words)


def test_a_read_only_out_directory_fails_before_the_first_step(train, tmp_path):
    if not os.geteuid():
        pytest.skip("root may write everywhere; /proc stands for it in the test above")
    (tmp_path / "out").mkdir(mode=0o500)
    status, err = train()
    assert status == 2
    one_line(err, "--out_dir")


def test_the_second_run_on_an_out_directory_is_refused(start, train, tmp_path):
    """Promise: two runs on one out directory: the second refuses, the first goes on."""
    first = start("--steps", 60, code=SLOW)
    wait_for(has_lines(tmp_path / "out"))
    status, err = train("--resume")
    assert status == 2 and first.poll() is None
    one_line(err, "in use by another run")


def test_a_weight_file_with_code_in_it_is_refused_and_not_run(train, tmp_path):
    """Promise: weights_only always: a pickle bomb is refused, its payload not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "payload"),)

    torch.save({"target_encoder": Bomb()}, tmp_path / "bomb.pt")
    status, err = train("--init", tmp_path / "bomb.pt")
    assert status == 2 and not (tmp_path / "payload").exists() and not (tmp_path / "out").exists()
    one_line(err, "bomb.pt: not a readable weight file")


class Payload:
    """Makes a folder where a pickle runs."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poisoned(out, kind, payload):
    """The run folder out, sealed again after code was put into its newest checkpoint."""
    folder = M.newest(out)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if kind == "metadata":
        metadata.planner_data = Payload(payload)
    else:  # a number beside the tensors, which is a file of torch.save
        torch.save(Payload(payload), box := io.BytesIO())
        file = folder / "__0_0.distcp"
        start = file.stat().st_size
        with open(file, "ab") as f:
            f.write(box.getvalue())
        for index, info in metadata.storage_data.items():
            if "param_groups" in index.fqn:
                info.offset, info.length = start, len(box.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "sha256.json").unlink()
    sums = {path.name: M.sha256(path) for path in folder.iterdir()}
    (folder / "sha256.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("kind", ["metadata", "numbers"])
def test_code_in_the_run_folder_of_somebody_else_is_refused_and_not_run(call, whole, tmp_path, kind):
    """Promise: --resume, --init RUN and probe.py --encoder RUN run nothing that lies in the folder."""
    out, payload = copy_of(whole, tmp_path), tmp_path / "payload"
    poisoned(out, kind, payload)
    words = "posix.mkdir"
    with pytest.raises(M.UserError, match=words):
        call(V, *TINY, "--resume", "--out_dir", out)
    with pytest.raises(M.UserError, match=words):
        call(V, *TINY, "--init", out, "--init_optimizer", "--workers", 0, "--out_dir", tmp_path / "next")
    if kind == "metadata":  # a probe reads tensors only
        with pytest.raises(D.DataError, match=words):
            P.restore(P.Args("physics", encoder=str(out)), torch.device("cpu"))
    assert not payload.exists()


def test_a_run_folder_may_not_name_any_module_as_its_script(whole, tmp_path):
    out = copy_of(whole, tmp_path)
    head = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(head | {"script": "antigravity"}))
    with pytest.raises(D.DataError, match="antigravity.py, which does not lie beside probe.py"):
        P.restore(P.Args("physics", encoder=str(out)), torch.device("cpu"))


def test_a_cut_config_is_named(call, whole, tmp_path):
    out = copy_of(whole, tmp_path)
    (out / "config.json").write_text((out / "config.json").read_text()[:100])
    with pytest.raises(M.UserError, match="config.json: its config is no JSON"):
        call(V, *TINY, "--resume", "--out_dir", out)


def test_a_console_that_was_never_there_is_no_reason_to_stop(tmp_path):
    command = [sys.executable, "train_vjepa.py", *TINY, "--workers", "0", "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT, timeout=120)
    assert done.returncode == 0 and M.newest(tmp_path / "out").name == "step_00000006"


def test_without_ffmpeg_video_names_the_cure_and_the_world_still_trains(train, pictures, tmp_path):
    """Injected: a torchcodec that fails to load as it does without FFmpeg's libraries."""
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec')")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    status, err = train("--data", pictures, env=env)
    assert status == 2
    one_line(err, "apt-get install -y ffmpeg")
    assert train("--steps", 2, env=env, out=tmp_path / "world")[0] == 0
