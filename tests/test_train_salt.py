"""train_salt.py: targets against float64 numpy, a teacher that never changes, stages and their resume, the
published FLOPs."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import data as D
import model as M
import train_salt as S
from test_train_vjepa import counted, losses

TINY = (
    "--preset", "laptop", "--steps", 8, "--split", 0.5, 0.5, "--batch_size", 8, "--log_every", 1, "--sample_every",
    0, "--probe_data", "--warmup", 2,
)


def setting(cls=S.VPixel, *rest, seed=0, B=3, **changes):
    args = dataclasses.replace(S.Args(**S.PRESETS["laptop"]), **changes)
    torch.manual_seed(seed)
    objective, rng = cls(args, *rest), np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((B, 3, args.frames, args.size, args.size), dtype=np.float32))
    return args, objective, x, *D.sample_masks(args.masks, seed, 0, B, objective.encoder.grid, args.aspect)


def teacher(**changes):
    torch.manual_seed(9)
    encoder = M.ViT(
        **{**M.SIZES["vit_n"], "width": 96, "depth": 2, **changes.pop("size_of", {})},
        patch=8,
        frames=8,
        size=32,
        **changes,
    )
    return encoder, encoder.config | M.IMAGENET


def test_pixel_targets_are_normalised_per_patch_and_channel():
    """Against float64 numpy, patch by patch, with the unbiased deviation; the loss is the mean over masks of the
    squared error on hidden patches only."""
    args, objective, x, keep, pred = setting()
    got, v = objective.targets(x).double().numpy(), x.double().numpy()
    ti, hi, wi = 2, 1, 3
    patch = v[1, :, 4:6, 8:16, 24:32].reshape(3, -1)
    want = (patch - patch.mean(1, keepdims=True)) / (patch.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.abs(got[1, (ti * 4 + hi) * 4 + wi] - want.ravel()).max() < 1e-5
    zhat = objective.predictor([objective.encoder(x, k) for k in keep], keep, pred)
    terms = [
        ((p.detach().double().numpy() - np.take_along_axis(got, i.numpy()[..., None], 1)) ** 2).mean()
        for p, i in zip(zhat, pred)
    ]
    assert abs(objective(x, keep, pred)[0].item() - np.mean(terms)) < 1e-6


def test_the_student_predicts_layer_normed_features_of_any_width():
    args, objective, x, keep, pred = setting(S.Student, *teacher())
    h = objective.teacher(x).detach().double().numpy()
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    zhat = objective.predictor([objective.encoder(x, k) for k in keep], keep, pred)
    terms = [
        np.abs(p.detach().double().numpy() - np.take_along_axis(h, i.numpy()[..., None], 1)).mean()
        for p, i in zip(zhat, pred)
    ]
    assert zhat[0].shape[-1] == 96 and abs(objective(x, keep, pred)[0].item() - np.mean(terms)) < 1e-6


def test_the_teacher_gets_no_gradient_stays_in_eval_mode_and_its_pixels():
    """Also a teacher with a CLS token and with other pixel statistics: it sees what it was trained on."""
    encoder, config = teacher(cls=True)
    _, objective, x, keep, pred = setting(S.Student, encoder, config | {"mean": [0.0] * 3, "std": [1.0] * 3})
    objective.train()
    objective(x, keep, pred)[0].backward()
    assert not objective.teacher.training and all(p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in [*objective.encoder.parameters(), *objective.predictor.parameters()])
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (M.IMAGENET["mean"], M.IMAGENET["std"]))
    want = torch.nn.functional.layer_norm(encoder(x * std + mean)[:, 1:], (96,))
    assert (objective.targets(x) - want).abs().max() < 1e-5


def test_a_teacher_of_4ds_is_read_where_its_file_says():
    """In its last block the context never had a gradient."""
    encoder, config = teacher(final_norm=False, pos="learned", size_of=dict(depth=3))
    _, _, x, _, _ = setting(S.VPixel)
    want = torch.nn.functional.layer_norm(encoder(x, blocks=2), (96,))
    objective = setting(S.Student, encoder, config | {"layer": 2})[1]
    assert torch.equal(objective.targets(x), want.detach())
    assert objective.teacher_flops() == encoder.flops(64) and len(encoder.blocks) == 2


def test_a_teacher_on_another_grid_is_refused():
    encoder = M.ViT(width=96, depth=1, heads=2, mlp=96, patch=16, frames=8, size=32)
    with pytest.raises(ValueError, match="grid of \\(4, 2, 2\\), the student's on \\(4, 4, 4\\)"):
        setting(S.Student, encoder, encoder.config | M.IMAGENET)


def test_an_image_encoder_teaches_frame_by_frame():
    """DINOv2 and its like: a token a frame and patch, so the student's tubelets are single frames; CLS tokens are
    no targets."""
    encoder, config = teacher(images=True, tubelet=1, cls=True, pos="learned")
    args, objective, x, keep, pred = setting(S.Student, encoder, config, tubelet=1)
    want = torch.cat([torch.nn.functional.layer_norm(encoder(x[:, :, t : t + 1])[:, 1:], (96,)) for t in range(8)], 1)
    assert (objective.targets(x) - want).abs().max() < 1e-6 and objective(x, keep, pred)[0].isfinite()
    with pytest.raises(ValueError, match="grid of"):
        setting(S.Student, encoder, config)


def test_context_never_sees_a_hidden_pixel_in_either_stage():
    for cls, rest in ((S.VPixel, ()), (S.Student, teacher())):
        args, objective, x, keep, pred = setting(cls, *rest)
        t, h, w = objective.encoder.grid
        seen = torch.zeros(len(x), t * h * w).scatter(1, keep[0], 1.0).view(-1, 1, t, h, w)
        seen = (
            seen.repeat_interleave(args.tubelet, 2).repeat_interleave(args.patch, 3).repeat_interleave(args.patch, 4)
        )
        noisy = torch.where(seen > 0, x, torch.randn_like(x))
        assert torch.equal(objective.encoder(x, keep[0]), objective.encoder(noisy, keep[0]))


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_are_those_that_torch_counts(stage):
    """All but the gradient of the pixels, which nobody needs. The teacher only runs forward."""
    objective_of = (S.VPixel,) if stage == 1 else (S.Student, *teacher())
    args, objective, x, keep, pred = setting(*objective_of, B=1)
    pixels = 2 * (3 * 2 * 8 * 8) * 128 * sum(ids.shape[1] for ids in keep)
    assert objective.flops(keep, pred) == counted(objective, x, keep, pred) + pixels


@pytest.mark.parametrize(
    "step, lr, weight_decay",
    [(0, 2e-4, 0.04), (10_000, 6.25e-4, 0.05370168), (45_000, 3.13e-4, 0.25511626), (79_999, 1e-6, 0.4)],
)
def test_schedules_of_a_stage_of_80_000_steps(step, lr, weight_decay):
    """Table 5: linear warm-up, then cosines; half-way between, the rate is half-way down."""
    rates = dict(lr=6.25e-4, start_lr=2e-4, warmup=10_000, final_weight_decay=0.4)
    objective = setting(steps=80_000, **rates)[1]
    want = {"lr": lr, "weight_decay": weight_decay}
    assert objective.schedules(step) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    "name, student, teach, side, steps, total",
    [
        ("V-JEPA 2 L", 0.303, 0.303, 256, (0, 240), 1.9),
        ("V-JEPA 2 H", 0.632, 0.632, 256, (0, 240), 3.5),
        ("V-JEPA 2 g", 1.012, 1.012, 256, (0, 240), 5.3),
        ("SALT L", 0.303, 0.303, 224, (80, 160), 1.2),
        ("SALT H", 0.632, 0.303, 224, (80, 160), 1.5),
        ("SALT g", 1.012, 0.303, 224, (80, 160), 1.8),
        ("SALT G", 1.8, 0.303, 224, (80, 160), 2.6),
        ("SALT stage 1", 0.303, 0, 224, (80, 0), 0.24),
    ],
)
def test_published_flops_are_reproduced(name, student, teach, side, steps, total):
    """Tables 10 and 11, in 1e21, to 5 %: parameters in billions, thousands of steps of 3072 clips for the teacher
    and the student."""
    tokens = 8 * (side // 16) ** 2
    first = S.published(teach or student, 0.022, 0, tokens, steps[0] * 3072e3) if "SALT" in name else 0
    got = (first + S.published(student, 0.022, teach, tokens, steps[1] * 3072e3)) * 1e9 / 1e21
    assert got == pytest.approx(total, rel=0.05), got


def test_two_ranks_log_the_losses_of_one_process_in_both_stages(run, tmp_path):
    want = None
    for name, ranks, extra in (("one", 1, ()), ("ddp", 2, ("--micro_batch", 2)), ("fsdp", 2, ("--fsdp",))):
        status, last, err = run("train_salt.py", *TINY, "--out_dir", tmp_path / name, *extra, ranks=ranks)
        assert status == 0 and last["stage"] == 2, err[-2000:]
        got = losses(tmp_path / name / "stage1") + losses(tmp_path / name)
        want = want or got
        assert len(got) == 8 and np.abs(np.array(got) - want).max() < 1e-5, (name, got, want)


def test_stopped_anywhere_a_run_goes_on_where_it_was(run, tmp_path):
    """In stage 1, at its end, in stage 2: bit for bit, with both ledgers; the teacher in the last checkpoint is
    stage 1's encoder, unchanged."""
    assert run("train_salt.py", *TINY, "--out_dir", tmp_path / "whole")[0] == 0
    said = [
        run("train_salt.py", *TINY, "--out_dir", tmp_path / "parts", "--resume", "--stop_at", stop)[1]
        for stop in (2, 3, 0)
    ]
    assert [s["stage"] for s in said] == [1, 1, 2]
    read = lambda name: [
        json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines() if '"ledger"' in line
    ]
    # RankMe stands in a line each hundred steps and in the last one
    pick = lambda rows: [{k: r.get(k) for k in ("step", "loss", "flops", "ledger", "rankme_targets")} for r in rows]
    assert "rankme_targets" in read("parts")[-1]
    assert pick(read("whole")) == pick(read("parts")) and pick(read("whole/stage1")) == pick(read("parts/stage1"))
    state = {
        "model": {
            f"teacher.{k}": torch.zeros_like(v)
            for k, v in M.load_encoder(tmp_path / "parts" / "stage1" / "encoder.safetensors")[0].state_dict().items()
        }
    }
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "parts" / "step_00000004")
    taught = M.load_encoder(tmp_path / "parts" / "stage1" / "encoder.safetensors")[0].state_dict()
    assert all(torch.equal(state["model"][f"teacher.{k}"], v) for k, v in taught.items())


@pytest.mark.parametrize("preset", ["", *S.PRESETS])
def test_a_sixth_of_the_steps_is_the_teachers(preset):
    """Section 5.4: 40,000 of 240,000 are best; also of a preset's."""
    args = S.Args(**S.PRESETS.get(preset, {}))
    assert [a.steps * 6 for _, a in S.stages(args)] == [args.steps, 5 * args.steps]


def test_a_given_teacher_a_second_student_and_what_cannot_be(run, tmp_path):
    encoder, config = teacher()
    M.save_encoder(tmp_path / "teacher.safetensors", encoder, config)
    status, last, err = run(
        "train_salt.py", *TINY, "--out_dir", tmp_path / "given", "--teacher", tmp_path / "teacher.safetensors"
    )
    assert status == 0 and last["stage"] == 2 and not (tmp_path / "given" / "stage1").exists(), err[-2000:]
    status, last, err = run(
        "train_salt.py", *TINY, "--out_dir", tmp_path / "random", "--teacher",
        f"random:{tmp_path / 'teacher.safetensors'}",
    )
    assert status == 0 and last["stage"] == 2, err[-2000:]  # how much is a teacher worth?
    status, last, err = run("train_salt.py", *TINY, "--out_dir", tmp_path / "three", "--split", 0.25, 0.25, 0.5)
    assert status == 0 and last["stage"] == 3, err[-2000:]
    assert (tmp_path / "three" / "stage2" / "encoder.safetensors").exists()
    for flags, message in (
        (("--stage", 2), "stage1/encoder.safetensors"),
        (("--split", 0.5, 0.6), "--split"),
        (("--stage", 4), "there are stages 1 to 2"),
    ):
        status, _, err = run("train_salt.py", *TINY, "--out_dir", tmp_path / "no", *flags)
        assert status == 2 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model", "vit_x"), "--model vit_x"),
        (("--masks", "2x1.5"), "2x1.5"),
        (("--patch", 16, "--teacher_model", "vit_y"), "vit_y"),
        (("--data", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_a_later_stages_mistake_is_told_before_the_first_one_trains(run, tmp_path, flags, message):
    flags = ("--teacher_model", "vit_n", "--teacher_masks", "4x0.3x0.5", "--teacher_data", "world", *flags)
    status, _, err = run("train_salt.py", *TINY, "--out_dir", tmp_path / "no", *flags)
    assert status == 2 and message in err and "Traceback" not in err and not (tmp_path / "no").exists(), err
    if "--data" not in flags:
        status, _, err = run("train_salt.py", *TINY, "--dry_run", *flags)
        assert status == 2 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize("resume, message", [((), "holds a run: --resume"), (("--resume",), "run of train_vjepa.py")])
def test_a_folder_of_another_run_is_refused_before_the_teacher_trains(run, tmp_path, resume, message):
    """Its own stage would find out when the teacher has been trained."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"script": "train_vjepa", "config": {}}))
    for script in ("train_salt.py", "train_mae4d.py"):
        flags = [flag for flag in TINY if flag not in ("--split", 0.5)]
        status, _, err = run(script, *flags, "--out_dir", out, *resume)
        assert status == 2 and message in err and "Traceback" not in err and not (out / "stage1").exists(), err
