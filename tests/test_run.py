"""The run: what a step needs of memory against what it holds, the choice of --micro_batch, what is said on the way."""
import dataclasses
import json
import math
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data as D
import model as M
import train_mae4d as E
import train_salt as S
import train_tdv as T
import train_vjepa as V

TINY = ("--preset", "laptop", "--steps", 4, "--batch_size", 8, "--log_every", 1, "--sample_every", 0, "--probe_data",
        "--warmup", 2, "--workers", 0)


def lines(out):
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "loss" in line]


# --- the plan -------------------------------------------------------------------------------------

def planned(script, args):
    objective = M.construct(script.build, dataclasses.replace(args, dry_run=True))
    run = M.Run(dataclasses.replace(args, dry_run=True))
    run.fit(objective)
    return run.plan


@pytest.mark.parametrize("script, flags", [
    (V, {}),
    (V, dict(terms=("ld:1", "hw:1", "orth:1", "sigreg:1", "velgate:1", "hamiltonian:1"), micro_batch=2)),
    (S, dict(out_dir="stage1")),
    (T, dict(prototypes=64, head_hidden=32)),
    (T, dict(T.PRESETS["ibot"], local_crops=2, prototypes=64, head_hidden=32)),
    (E, dict(mask="random:0.5")),
], ids=["vjepa", "fwm", "salt", "tdv", "ibot", "mae4d"])
def test_the_plan_counts_what_autograd_keeps(script, flags, monkeypatch):
    """Of a real forward pass, with the kernel that keeps no attention scores; with --checkpoint at least the inputs of
    the blocks, and no more than one block beside them."""
    shape = dict(preset="", model="vit_n", frames=8, size=32, patch=8, dtype="fp32", batch_size=2)
    args = script.Args(**script.PRESETS["laptop"] | flags | shape)
    plan = planned(script, args)
    monkeypatch.setattr(M, "attend", F.scaled_dot_product_attention)
    kept = {}
    for checkpoint in (False, True):
        objective = script.build(dataclasses.replace(args, checkpoint=checkpoint))
        weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
        seen = {}

        def pack(value):
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = (storage.nbytes(), value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = objective(*plan.example(1, "cpu"))[0]
        kept[checkpoint] = sum(size for size, _ in seen.values())
        del loss
    # iBOT's masks hide half of the patches of half of the frames, the plan takes all
    views = getattr(args, "objective", "") == "views"
    assert plan.kept == pytest.approx(kept[False], rel=0.25 if views else 0.03)
    assert kept[True] < plan.lean < plan.kept


MEASURE = """
import gc, json
import torch
import model as M, train_mae4d as T
def main(args):
    run = M.Run(args)
    objective = M.construct(T.build, args)
    run.fit(objective)
    net = run.wrap(objective)
    optimizer = torch.optim.AdamW(M.param_groups(objective, 0.05), fused=True)
    held = []
    for micro in range(4):  # two steps of two micro-batches
        M.sync_gradients(net, micro % 2 == 1)
        net(*run.plan.example(1, run.device))[0].backward()
        seen = {}
        for tensor in [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]:
            for t in (tensor, tensor.grad if tensor.is_leaf else None):
                if t is not None:
                    storage = getattr(t, "_local_tensor", t).untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
        held.append(sum(seen.values()))
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad()
    if run.rank == 0:
        print(json.dumps({"held": held, **run.plan.terms(1)}))
M.launch(main, T.parse_args())
"""


@pytest.mark.parametrize("ranks, flags", [(2, ()), (4, ("--shard_ranks", 2))])
def test_the_plan_is_what_a_sharded_rank_holds_between_two_micro_batches(run, tmp_path, ranks, flags):
    """Gradients are sharded after each one; sharded inside pairs and copied between them is the same plan as two
    ranks."""
    (tmp_path / "measure.py").write_text(MEASURE)
    flags += ("--model", "vit_s", "--frames", 4, "--size", 64, "--dtype", "fp32", "--fsdp", "--batch_size", 2 * ranks,
              "--micro_batch", 1, "--data", "world", "--workers", 0)
    here = {"PYTHONPATH": str(Path(T.__file__).parent)}
    status, got, err = run(tmp_path / "measure.py", *flags, ranks=ranks, env=here)
    assert status == 0, err[-2000:]
    assert got["held"][2] == pytest.approx(got["weights"] + got["gradients"] + got["optimizer"], rel=0.02)
    assert got["held"][0] == pytest.approx(got["weights"] + got["gradients"], rel=0.02)
    assert 8 * 22e6 < 2 * (got["weights"] + got["gradients"]) < 8 * 24e6


def test_what_the_groups_around_a_process_leave(tmp_path):
    """At any level; a cache of files does not count."""
    def write(folder, **files):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{text}\n")

    write("job/step", memory__max="max", memory__current=50, memory__stat="anon 40\ninactive_file 10")
    write("job", memory__max=100, memory__current=70, memory__stat="inactive_file 20")
    own = tmp_path / "own"
    own.write_text("3:cpu:/b\n0::/job/step\n")
    assert M.cgroup_memory(tmp_path, own) == [50]
    assert M.cgroup_memory(tmp_path, tmp_path / "nothing") == []
    assert 0 < M.memory(torch.device("cpu"), 2) < 1e15


# --- the choice -----------------------------------------------------------------------------------

def test_as_many_clips_as_fit_and_a_resumed_run_keeps_them(call, tmp_path, monkeypatch, capsys):
    plan = planned(V, V.parse_args([str(flag) for flag in TINY]))
    sizes = {n: plan.total(n) for n in plan.sizes}
    assert list(sizes) == [8, 4, 2, 1]
    for room, micro in ((sizes[8], 8), (sizes[8] - 1, 4), (sizes[2], 2), (0, 1)):
        monkeypatch.setattr(M, "memory", lambda *_, room=room: room)
        call(V, *TINY, "--stop_at", 2, "--out_dir", tmp_path / str(room))
        head = json.loads((tmp_path / str(room) / "config.json").read_text())
        assert head["config"]["micro_batch"] == micro
    monkeypatch.setattr(M, "memory", lambda *_: 1e12)
    call(V, *TINY, "--resume", "--out_dir", tmp_path / str(sizes[2]))
    head = json.loads((tmp_path / str(sizes[2]) / "config.json").read_text())
    assert head["config"]["micro_batch"] == 2
    call(V, *TINY, "--micro_batch", 2, "--out_dir", tmp_path / "given")
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in (str(sizes[2]), "given")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_several_clips_of_a_video_stay_together(monkeypatch):
    monkeypatch.setattr(M, "memory", lambda *_: 0)
    args = V.parse_args([str(flag) for flag in TINY] + ["--clips_per_video", "2"])
    run = M.Run(args)
    objective = V.build(args)
    run.fit(objective)
    assert run.micro == 2 and run.plan.sizes == [8, 4, 2]


def test_terms_that_depend_on_the_clips_of_a_pass_want_them_given(call, tmp_path):
    flags = (*TINY, "--terms", "orth:0.01", "sigreg:1", "--out_dir", tmp_path)
    with pytest.raises(M.UserError, match="--micro_batch must be given: the value of orth and sigreg"):
        call(V, *flags)
    assert call(V, *flags, "--micro_batch", 4)["steps"] == 4
    assert call(V, *flags, "--resume")["steps"] == 4


def test_a_loader_that_does_not_fit_into_shared_memory_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setattr(M, "shared_memory", lambda: 2**16)
    with pytest.raises(M.UserError, match="MiB of /dev/shm.*fewer --workers.*--shm-size"):
        call(V, *TINY, "--workers", 2, "--out_dir", tmp_path)


def test_the_dry_run_warns_where_the_plan_exceeds_the_device(call, capsys):
    assert call(E, "--preset", "j", "--dry_run", "--micro_batch", 1, "--batch_size", 2)["bytes_per_gpu"] > 80e9
    V.main(V.parse_args(["--dry_run", "--batch_size", "3072"]))
    plan = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < plan["micro_batch"] < 3072 and plan["bytes_per_gpu"] < 80e9


def test_a_step_keeps_no_pixels_of_its_micro_batches():
    """They lie on the device, and the files of a step are told when the next one is over."""
    meter = M.Meter(M.Run(V.parse_args([str(flag) for flag in TINY])), {})
    batch = {"video": torch.zeros(2), "path": ["a"], "bad": [], "padded": 0}
    video = weakref.ref(batch["video"])
    meter.add(torch.tensor(1.0), {}, batch)
    meter.skip(0, torch.tensor(1.0))
    del batch
    assert video() is None


# --- the screen -----------------------------------------------------------------------------------

def test_what_is_said(call, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(M, "say", said.append)
    call(S, *TINY, "--steps", 4, "--split", 0.5, 0.5, "--resume", "--out_dir", tmp_path)
    text = "\n".join(said)
    assert "has no checkpoint, so this run starts afresh" in text
    assert "stage 1 of 2, a teacher from pixels: VPixel vit_n: 0.9761M parameters trained, 0M frozen" in text
    assert "stage 2 of 2, a student of the frozen teacher: Student vit_n" in text
    assert "1 rank(s) x 1 x --micro_batch 8" in text and "mfu" not in text
    steps = [line.split("  ") for line in said if line.startswith("step ")]
    assert len(steps) == 4 and [word.split()[0] for word in steps[1]] == M.SHOWN
    assert {"tflops", "padded_pct", "loss_4x0.3x0.5"} <= lines(tmp_path)[-1].keys()


def test_a_probe_in_mid_run_is_no_training_time(call, pictures, tmp_path, monkeypatch):
    """Nor does it count for the hours to go."""
    real = D.labelled_features

    def slow(*args, **named):
        time.sleep(1.5)
        return real(*args, **named)

    monkeypatch.setattr(D, "labelled_features", slow)
    call(V, *TINY[:-3], 2, "--workers", 0, "--probe_data", pictures, pictures, "--data", pictures, "--probe_every", 2,
         "--out_dir", tmp_path)
    speeds = [line["clips_per_s"] for line in lines(tmp_path)]
    assert len(speeds) == 4 and min(speeds) > 8 / 3, speeds


# --- pictures -------------------------------------------------------------------------------------

def pictured(file, *marks, size=32):
    """A black and a red picture beside each other, marks in the black one -> the file's pixels, (H,W,3) of 255."""
    pictures = torch.zeros(2, size, size, 3)
    pictures[1, ..., 0] = 1
    M.figure(file, "two pictures", ["black", "red"], [M.Row("row", pictures, marks=[marks, []])])
    image = pytest.importorskip("matplotlib.image").imread(file)
    return (255 * image[..., :3]).round()


def test_marks_stay_in_their_picture(tmp_path):
    """Boxes, points and words that lead out of it are cut; what is not known is not drawn."""
    bare = pictured(tmp_path / "bare.png")
    red = (bare == torch.tensor([255, 0, 0]).numpy()).all(-1)
    box = torch.tensor([0.8, 0.2, 1.6, 0.7]), 2, "a long word"
    point = torch.tensor([1.5, 0.5]), 1
    unknown = torch.full((4,), math.nan), 3
    marked = pictured(tmp_path / "marked.png", box, point, unknown)
    changed = (marked != bare).any((0, 2)).nonzero()[0]
    assert 20 < len(changed) and changed.max() < red.any(0).nonzero()[0].min()


def test_a_picture_of_many_pixels_shows_all_of_them(tmp_path):
    red = (pictured(tmp_path / "large.png", size=224) == torch.tensor([255, 0, 0]).numpy()).all(-1)
    assert red.any(0).sum() >= 224 and red.any(1).sum() >= 224


def test_without_matplotlib_pictures_have_no_words(tmp_path, monkeypatch):
    imread = pytest.importorskip("matplotlib.image").imread
    monkeypatch.setattr(M, "pyplot", lambda: None)
    pictures = torch.rand(3, 56, 40, 3)
    rows = [M.Row("clip", pictures), None, M.Row("depth", torch.rand(3, 56, 40), "m"), M.Row("again", pictures)]
    file = M.figure(tmp_path / "bare.png", "title", list("abc"), rows)
    image = torch.from_numpy(imread(file))[::2, ::2, :3]
    assert image.shape == (2 * 57, 3 * 41, 3)
    assert (image[:56, 41:81] - pictures[1]).abs().max() < 1 / 255 and (image[56] == 1).all()


# --- compiled --------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, most", [
    (V, ("--preset", "laptop_fwm", "--context_loss", "0.5", "--levels", 4), 7),
    (S, (), 6),
    (T, (), 3),
    (E, (), 2),
], ids=["vjepa21_and_fwm", "salt", "tdv", "mae4d"])
def test_nothing_is_compiled_again_after_the_first_step(script, flags, most, call, tmp_path, monkeypatch):
    """Of 50 steps with masks that vary. SALT's two stages compile once each; what comes after the last step (the loss
    once more without gradients, as a checkpoint is written) may."""
    torch._dynamo.reset()
    step = [0]
    compiled = []

    def backend(graph, inputs):
        compiled.append(step[0])
        return graph.forward

    def set_rates(*args):
        step[0] += 1
        real_rates(*args)

    real = torch.nn.Module.compile
    real_rates = M.set_rates
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **named: real(self, **named, backend=backend))
    monkeypatch.setattr(script, "set_rates", set_rates)
    small = ("--steps", 50, "--batch_size", 2, "--micro_batch", 2, "--log_every", 25, "--workers", 0, "--compile")
    small = (*small, "--probe_data", "--sample_every", 0, "--out_dir", tmp_path / "run")
    call(script, "--preset", "laptop", *flags, *small)
    last = [50]
    first = [1]
    if script is S:  # 8 steps are the teacher's; its stage ends with a checkpoint, too
        first = [1, 9]
        last = [8, 50]
    late = [at for at in compiled if at not in first + last]
    assert step[0] == 50 and 0 < sum(at in first for at in compiled) <= most and not late, compiled


# --- the copies that tests run in: forks.py --------------------------------------------------------

def test_a_copy_that_fails_leaves_no_process(forked, tmp_path):
    """Its loader processes end with it, as those of torchrun's ranks do."""
    script = tmp_path / "fails.py"
    code = ["import os, subprocess", "print(subprocess.Popen(['sleep', '60']).pid, flush=True)", "os._exit(3)"]
    script.write_text("\n".join(code))
    status, out, _ = forked([script])
    state = Path(f"/proc/{int(out[0])}/stat")
    end = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert status == 3 and time.monotonic() < end
