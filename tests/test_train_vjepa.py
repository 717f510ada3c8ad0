"""train_vjepa.py: the objective against stored numbers of the official modules, what gets gradients, schedules,
ranks, resume, errors, a fork."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data as D
import model as M
import train_mae4d
import train_salt
import train_tdv
import train_vjepa as V

ROOT = Path(V.__file__).parent
TINY = (
    "--preset", "laptop", "--steps", 6, "--batch_size", 8, "--log_every", 1, "--sample_every", 0, "--probe_data",
    "--warmup", 2,
)


def tiny(**changes):
    return dataclasses.replace(V.Args(**V.PRESETS["laptop"]), **changes)


def setting(seed=0, B=3, **changes):
    """Objective, clips and masks whose every number comes from numpy, so that they are the same on any torch."""
    args = tiny(**changes)
    torch.manual_seed(seed)
    objective = V.build(args)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((B, 3, args.frames, args.size, args.size), dtype=np.float32))
    return args, objective, x, *D.sample_masks(args.masks, seed, 0, B, objective.encoder.grid, args.aspect)


def counted(objective, *inputs):
    """FLOPs of a forward and a backward pass, as torch counts its matrix products."""
    with FlopCounterMode(display=False) as counter:
        objective(*inputs)[0].backward()
    return counter.get_total_flops()


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# --- the objective --------------------------------------------------------------------------------


def test_loss_is_the_mean_over_masks_of_the_l1_to_layer_normed_targets():
    """Against the formula in float64 on the module's own encoder and predictor outputs."""
    args, objective, x, keep, pred = setting()
    loss, metrics = objective(x, keep, pred)
    h = objective.target(x).detach().double().numpy()
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    zhat = objective.predictor([objective.encoder(x, k) for k in keep], keep, pred)
    terms = [
        np.abs(p.detach().double().numpy() - np.take_along_axis(h, ids.numpy()[..., None], 1)).mean()
        for p, ids in zip(zhat, pred)
    ]
    assert abs(loss.item() - np.mean(terms)) < 1e-6
    assert [round(metrics[f"loss_{m}"].item(), 5) for m in args.masks] == [round(t, 5) for t in terms]


def test_context_never_sees_a_hidden_pixel():
    """Every hidden pixel of a clip is replaced by noise: the context tokens of that mask do not move by a bit."""
    args, objective, x, keep, _ = setting()
    t, h, w = objective.encoder.grid
    seen = torch.zeros(len(x), t * h * w).scatter(1, keep[0], 1.0).view(-1, 1, t, h, w)
    seen = seen.repeat_interleave(args.tubelet, 2).repeat_interleave(args.patch, 3).repeat_interleave(args.patch, 4)
    noisy = torch.where(seen > 0, x, torch.randn_like(x))
    assert torch.equal(objective.encoder(x, keep[0]), objective.encoder(noisy, keep[0]))
    assert not torch.equal(objective.target(x), objective.target(noisy))


def test_gradients_reach_encoder_and_predictor_and_never_the_target():
    _, objective, x, keep, pred = setting()
    objective(x, keep, pred)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.parameters())
    trained = [*objective.encoder.named_parameters(), *objective.predictor.named_parameters()]
    assert not [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()]
    assert sum(len(g["params"]) for g in M.param_groups(objective, 0.1)) == len(trained)


def test_ema_moves_the_target_by_one_minus_m_of_the_way():
    args, objective, *_ = setting(ema=0.9, final_ema=0.9)
    with torch.no_grad():
        for p in objective.encoder.parameters():
            p.add_(1.0)
    before = copy.deepcopy(objective.target.state_dict())
    objective.after_step(0)
    for k, v in objective.target.state_dict().items():
        torch.testing.assert_close(v - before[k], torch.full_like(v, 0.1), atol=1e-5, rtol=0)
    # whether the step was skipped is a tensor that nothing reads: on the meta device nothing could
    weights = [torch.zeros(2, device="meta")]
    M.ema_update(weights, weights, 0.9, skip=torch.zeros((), device="meta"))


@pytest.mark.parametrize(
    "step, lr, wd, ema",
    [(0, 2e-4, 0.04, 0.998), (12_000, 6.25e-4, 0.0784, 0.9982133333), (90_000, 7.5042224e-5, 0.328, 0.9996)],
)
def test_schedules_at_the_start_after_warmup_and_at_the_end(step, lr, wd, ema):
    """Paper, Appendix A: the schedules of 112,500 steps, cut at 90,000."""
    schedules = V.VJEPA.schedules(type("O", (), {"args": V.Args()})(), step)
    assert schedules == pytest.approx({"lr": lr, "weight_decay": wd, "ema": ema}, rel=1e-6)


@pytest.mark.parametrize("full_pass", [False, True])
def test_flops_are_those_that_torch_counts(full_pass):
    """All but one thing: nobody needs the gradient of the pixels, and every layer counts with its.
    Not in either number: norms, softmax, rotations, the loss. A term adds the full clip's pass."""
    in_one_flag = "terms" in {field.name for field in dataclasses.fields(V.Args)}
    term = {"terms": ("delta:1.0",)} if in_one_flag else {"delta": 1.0}
    args, objective, x, keep, pred = setting(B=1, **(term if full_pass else {}))
    tokens = sum(ids.shape[1] for ids in keep) + 64 * full_pass
    pixels = 2 * (3 * 2 * 8 * 8) * 128 * tokens
    assert objective.flops(keep, pred) == counted(objective, x, keep, pred) + pixels


def test_defaults_are_the_papers_recipe():
    """Table 5, ViT-L/16 at 224 px."""
    a = V.Args()
    assert (a.model, a.size, a.frames, a.stride, a.patch, a.tubelet) == ("vit_l", 224, 16, 4, 16, 2)
    assert (a.pred_depth, a.pred_width) == (12, 384)
    assert (a.masks, a.aspect) == (("8x0.15", "2x0.7"), (0.75, 1.5))
    assert (a.batch_size, a.steps, a.warmup, a.stretch) == (3072, 90_000, 12_000, 1.25)
    assert (a.start_lr, a.lr, a.final_lr) == (2e-4, 6.25e-4, 1e-6)
    assert (a.weight_decay, a.final_weight_decay, a.ema, a.final_ema) == (0.04, 0.4, 0.998, 1.0)


# --- the run --------------------------------------------------------------------------------------


def test_two_ranks_log_the_losses_of_one_process(run, tmp_path):
    """DDP and FSDP2 on gloo, with accumulation: the same samples and masks, so the same losses."""
    want = None
    for name, ranks, extra in (
        ("one", 1, ()),
        ("accumulated", 1, ("--micro_batch", 2)),
        ("ddp", 2, ("--micro_batch", 2)),
        ("fsdp", 2, ("--fsdp",)),
    ):
        status, last, err = run("train_vjepa.py", *TINY, "--out_dir", tmp_path / name, *extra, ranks=ranks)
        assert status == 0 and last["steps"] == 6, err[-2000:]
        got = losses(tmp_path / name)
        want = want or got
        assert len(got) == 6 and np.abs(np.array(got) - want).max() < 1e-5, (name, got, want)


def test_the_online_probe_is_the_same_on_any_number_of_ranks(run, pictures, tmp_path):
    """Three ranks do not divide eleven clips evenly: none waits for another, and no clip counts twice."""
    eleven = pictures.with_name("eleven.txt")
    eleven.write_text("".join(pictures.read_text().splitlines(keepends=True)[:11]))
    flags = [*TINY, eleven, eleven, "--data", pictures, "--steps", 1, "--batch_size", 6, "--workers", 0]
    flags.remove("--warmup"), flags.remove(2)
    one = run("train_vjepa.py", *flags, "--out_dir", tmp_path / "one")[1]
    three = run("train_vjepa.py", *flags, "--fsdp", "--out_dir", tmp_path / "three", ranks=3)[1]
    assert abs(one["random_acc"] - three["random_acc"]) < 3e-3 and one["random_acc"] > 0


def test_the_online_probe_reads_the_target_on_evaluation_clips(call, pictures, probed, tmp_path):
    """What it reads last is what the exported encoder, the target, makes of the same clips."""
    x = torch.randn(2, 3, 8, 32, 32)
    seen = probed(x)
    flags = [flag for flag in TINY if flag != "--probe_data"]
    last = call(
        V, *flags, "--data", pictures, "--probe_data", pictures, pictures, "--workers", 0, "--clips_per_video", 2,
        "--ema", 0.5, "--final_ema", 0.5, "--out_dir", tmp_path,
    )
    assert [(train, clips) for train, clips, _ in seen] == [(False, 1)] * 4
    target, _ = M.load_encoder(tmp_path)
    with torch.no_grad():
        assert torch.allclose(seen[-1][2], target(x).mean(1), atol=1e-6)
        assert not torch.allclose(seen[0][2], target(x).mean(1), atol=1e-3)
    assert last["probe_acc"] is not None


# --- budgets, schedules, what goes on from another run --------------------------------------------


@pytest.mark.parametrize(
    "script, flags",
    [
        (V, ("--terms", "ld:1")),
        (V, ("--masks", "2x0.5", "2x0.5", "2x0.5")),
        (train_salt, ()),
        (train_salt, ("--split", "0.25", "0.25", "0.5")),
        (train_tdv, ()),
        (train_tdv, ("--objective", "views", "--local_crops", "2")),
        (train_mae4d, ()),
    ],
)
def test_flops_pay_for_as_many_steps(call, pictures, tmp_path, script, flags):
    """--flops in place of --steps: fixed at the start, written to config.json, and spent to 1 % over all stages."""
    small = [flag for flag in TINY if flag not in ("--probe_data", "--steps", 6, "--log_every", 1)]
    asked = 1.2e11
    call(script, *small, "--probe_data", "--data", pictures, "--workers", 0, "--flops", asked, *flags,
         "--log_every", 1, "--out_dir", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    spent = [line["flops"] for line in lines if "flops" in line][-1]
    one = spent / lines[-1]["step"]
    assert config["flops"] == asked and config["steps"] == lines[-1]["step"] > 5
    # the rounding to whole steps of each stage, and 1 %
    assert abs(spent / asked - 1) < 0.01 + 2 * one / asked, spent


def test_a_budget_under_one_step_is_refused(run, tmp_path):
    status, _, err = run("train_vjepa.py", *TINY, "--flops", 1e6, "--out_dir", tmp_path / "out")
    assert status == 2 and "--flops 1e+06: one step costs" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_cooldown_goes_on_with_the_optimizer_and_falls_linearly(call, pictures, tmp_path):
    """V-JEPA 2: the rate falls on a line whose end lies at 1.25 times the steps, 1.06e-4, and the first update is no
    larger than the last one of the run before: a fresh Adam's would be 5 times as large."""
    args = V.Args(**V.PRESETS["vjepa2_cooldown"])
    with torch.device("meta"):
        rates = V.VJEPA(dataclasses.replace(args, model="vit_n", size=32)).schedules
    assert [rates(step)["lr"] for step in (0, 6000, 12_000)] == pytest.approx([5.25e-4, 3.154e-4, 1.058e-4], rel=1e-3)

    flags = [flag for flag in TINY if flag != "--probe_data"] + ["--probe_data", "--data", pictures, "--workers", 0]
    flags += ["--warmup", 0, "--start_lr", 1e-3, "--final_lr", 1e-3, "--clip_grad", 0]
    call(V, *flags, "--steps", 30, "--out_dir", tmp_path / "first")

    def weights(out):
        state = {"model": {"encoder.blocks.0.mlp.fc1.weight": torch.zeros(512, 128)}}
        torch.distributed.checkpoint.load(state, checkpoint_id=M.newest(out))
        return state["model"]["encoder.blocks.0.mlp.fc1.weight"]

    moved = {}
    for name, more in (("on", "--init_optimizer"), ("afresh", "--no-init_optimizer")):
        call(V, *flags, "--steps", 1, "--init", tmp_path / "first", more, "--seed", 1, "--out_dir", tmp_path / name)
        step = weights(tmp_path / name) - weights(tmp_path / "first")
        moved[name] = step.square().mean().sqrt().item() / 1e-3
    assert moved["on"] < 0.5 < 0.9 < moved["afresh"] < 1.1, moved


def test_going_on_with_an_optimizer_needs_a_run(run, tmp_path):
    for init in ((), ("--init", "weights.pt")):
        status, _, err = run("train_vjepa.py", *TINY, "--init_optimizer", *init, "--out_dir", tmp_path / "out")
        assert status == 2 and "--init_optimizer goes on from a run" in err and len(err.strip().splitlines()) == 1


def test_equal_masks_have_a_line_each_in_the_log():
    """V-JEPA's Table 15 has three times 2x0.5."""
    _, objective, x, keep, pred = setting(masks=("2x0.5", "2x0.5", "4x0.2", "2x0.5"))
    loss, metrics = objective(x, keep, pred)
    names = ["loss_2x0.5", "loss_2x0.5_2", "loss_4x0.2", "loss_2x0.5_3"]
    assert [name for name in metrics if name.startswith("loss_")] == names
    assert loss.item() == pytest.approx(sum(metrics[name].item() for name in names) / 4, rel=1e-6)
    assert len({metrics[name].item() for name in names}) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--preset", "lapdog"), "--preset lapdog: choose from"),
        (("--preset", "laptop", "--lr", "nan"), "--lr nan: a positive finite number"),
        (("--preset", "laptop", "--batch_size", "0"), "--batch_size 0: a positive finite number"),
        (("--preset", "laptop", "--micro_batch", "5"), "--batch_size 16 is not divisible"),
        (("--preset", "laptop", "--masks", "8by0.1"), "8by0.1"),
        (("--preset", "laptop", "--model", "vit_x"), "--model vit_x: choose from"),
        (("--preset", "laptop", "--data", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, flags, message):
    status, _, err = run("train_vjepa.py", *flags, "--out_dir", tmp_path / "out")
    assert status == 2 and message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err


def test_a_run_is_neither_overwritten_nor_mixed(run, tmp_path):
    assert run("train_vjepa.py", *TINY, "--out_dir", tmp_path)[0] == 0
    status, _, err = run("train_vjepa.py", *TINY, "--out_dir", tmp_path)
    assert status == 2 and "holds a run" in err
    status, _, err = run("train_vjepa.py", *TINY, "--out_dir", tmp_path, "--resume", "--lr", "0.5")
    assert status == 2 and "lr (0.001 -> 0.5)" in err


def test_runs_of_the_first_release_go_on_or_say_what_changed(run, tmp_path):
    """Their config.json has a flag for each term and no script. Without terms they are resumed, with terms the flags
    that are gone are named; probe.py and --init open both."""
    out = tmp_path / "old"
    assert run("train_vjepa.py", *TINY, "--steps", 2, "--stop_at", 1, "--out_dir", out)[0] == 0
    file = out / "config.json"
    head = json.loads(file.read_text())
    del head["script"], head["config"]["terms"]
    head["config"] |= {"hw": 0.0, "ld": 0.0, "bucket": 1}
    file.write_text(json.dumps(head))
    status, last, err = run("train_vjepa.py", *TINY, "--steps", 2, "--out_dir", out, "--resume")
    assert status == 0 and last["steps"] == 2, err

    head["config"]["ld"] = 0.5
    file.write_text(json.dumps(head))
    status, _, err = run("train_vjepa.py", *TINY, "--steps", 2, "--out_dir", out, "--resume", "--terms", "ld:0.5")
    words = err.strip().splitlines()
    assert status == 2 and len(words) == 1, err
    assert "ld (0.5 -> no such flag any more)" in words[0] and "terms" in words[0], err

    head["config"]["ld"] = 0.0
    file.write_text(json.dumps(head))
    more = ("--steps", 1, "--terms", "ld:1", "--init", out, "--out_dir", tmp_path / "new")
    status, _, err = run("train_vjepa.py", *TINY, *more)
    assert status == 0, err


def test_modules_import_where_unix_files_do_not_exist():
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import data, model, train_vjepa, probe"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_of_the_papers_model_touches_no_data(run):
    status, last, err = run("train_vjepa.py", "--dry_run")
    assert status == 0, err
    assert last["params_encoder"] == pytest.approx(303.9e6, rel=0.01)
    assert last["flops_per_clip"] == pytest.approx(2.4e12, rel=0.1)


# --- the fork -------------------------------------------------------------------------------------

SECTIONS = (  # of FWM-HW-LD, from a line to the line before another: its flags, its rows, its terms
    ("    # --- FWM-HW-LD\n", "\n\nLAPTOP"),
    ("# FWM-HW-LD's rows", "def parse_args"),
    ("# --- FWM-HW-LD: terms", "# --- the run ---"),
)


def test_a_new_objective_is_a_diff_of_under_30_lines(tmp_path):
    """A copy of train_vjepa.py beside model.py and data.py, the second paper deleted whole, then
    tests/fork_colour.diff: it trains, its loss falls, and it has no flag that does nothing."""
    diff = (ROOT / "tests" / "fork_colour.diff").read_text()
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) < 30
    for name in ("train_vjepa.py", "model.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    fork = tmp_path / "train_vjepa.py"
    text = fork.read_text()
    for first, last in SECTIONS:
        begin = text.index(first)
        text = text[:begin] + text[text.index(last, begin) :]
    fork.write_text(text)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)

    flags = [str(f) for f in TINY] + ["--steps", "60", "--out_dir", "out", "--lr", "0.002"]
    command = [sys.executable, "train_vjepa.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got = losses(tmp_path / "out")
    assert np.mean(got[-10:]) < 0.8 * np.mean(got[:5])

    page = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    offered = re.findall(r"^[^\w\n]+--(\w+)", page, re.M)
    code = fork.read_text() + (ROOT / "model.py").read_text()
    assert len(offered) > 40 and not {"ema", "final_ema", "terms", "tau"} & set(offered)
    read = {name for name in offered if re.search(rf"\b(args|a)\.{name}\b", code)}
    assert set(offered) - read == {"preset"}  # which parse_args reads
    for gone in ("--ema", "--terms", "--distance"):
        refused = subprocess.run([*command, gone, "1"], cwd=tmp_path, capture_output=True, text=True)
        assert refused.returncode == 2
