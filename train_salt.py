"""SALT: a pixel teacher, frozen, then a student that predicts the teacher's features.
Li et al. 2025, "Rethinking JEPA: Compute-Efficient Video SSL with Frozen Teachers".

    z    = E(x[keep])                      (B,3,T,H,W) -> (B,K,D)   the context, ~10 % of the tokens
    zhat = P(z, mask tokens at pred)       -> (B,M,C)   a narrow predictor; C values of a
                                                       patch, or the teacher's width

    stage 1   h = pixels, normalised per patch and channel          L = mean (zhat - h[pred])^2
    stage 2   h = LN(teacher(x)), the encoder of stage 1, frozen    L = mean |zhat - h[pred]|
    stage 3   optional: the student is the next student's teacher

    python train_salt.py --preset laptop --flops 8.5e12    both stages, two cores, no download: a
                                                           linear probe near 60 %, random weights 18
    torchrun --nproc-per-node 8 train_salt.py --teacher_model vit_l --model vit_G --data ...
                                                           a ViT-L teaches a ViT-G
    python train_salt.py --teacher vitl.pt --data ...      only a student, of any encoder at hand

No EMA and no stop-gradient trick: the targets are fixed, so nothing collapses. Within a run a lower
loss is a better student (section 4, Figure 3), but not between teachers (assets/salt.md, which has
every flag at work, results, deviations).
"""
import signal

if __name__ == "__main__":  # Ctrl-C before the run listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """Defaults: the paper's recipe (Table 5), 40,000 steps of a teacher, 200,000 of its student."""
    # --- data
    data: tuple[str, ...] = ()          # lists of `path label` rows, LIST[:WEIGHT]; empty: world
    teacher_data: tuple[str, ...] = ()  # of the stages before the last one; empty: --data
    probe_data: tuple[str, ...] = ()    # online probe: a train and a val list with labels, or none
    frames: int = 16                    # of a clip
    stride: int = 4                     # video frames from one frame of a clip to the next
    fps: float = 0.0                    # > 0: sample by time stamp at this rate instead
    size: int = 224                     # pixels, after the crop
    crop_scale: tuple[float, float] = (0.3, 1.0)    # area of the crop, one box for all frames
    crop_ratio: tuple[float, float] = (0.75, 1.35)  # its aspect ratio
    flip: bool = True                   # half of the clips
    clips_per_video: int = 1            # cut from each decoded video; 4 where decoding is slow
    short: Literal["repeat", "loop", "spread", "error"] = "repeat"  # what a short video becomes
    workers: int = -1                   # loader processes of a rank; -1: what the machine has
    timeout: int = 600                  # so many seconds without a batch end the run
    max_bad_fraction: float = 0.1       # share of unreadable videos; more end the run
    # --- architecture
    model: str = "vit_l"                # of the last student: vit_n, t, s, b, l, h, g, G, e, j
    teacher_model: str = ""             # of the stages before it; empty: --model
    teacher: str = ""                   # an encoder file that teaches instead of those stages
    patch: int = 16                     # pixels
    tubelet: int = 2                    # frames
    pos: Literal["sincos", "rope"] = "rope"         # positions: sincos or rope
    pred_depth: int = 12                # blocks of the predictor
    pred_width: int = 384
    pred_heads: int = 16                # 0: as many as the encoder
    mask_tokens: int = 0                # 0: one for each mask
    init_std: float = 0.02              # of the random weights; narrow models want more
    highpass: float = 0.0               # > 0: hide what is static, scale the rest (not the paper's)
    # --- masks
    masks: tuple[str, ...] = ("8x0.15", "2x0.7")    # BLOCKSxSCALE[xTIME], random:R tube:R causal:R
    teacher_masks: tuple[str, ...] = () # of stage 1, empty: --masks; the paper's others: R = 0.9
    aspect: tuple[float, float] = (0.75, 1.5)       # of a block
    trim: Literal["random", "prefix"] = "random"    # ids cut to the batch minimum; prefix: official
    # --- optimization
    steps: int = 240_000                # of all stages together
    flops: float = 0.0                  # > 0: as many steps as this many FLOPs pay for
    split: tuple[float, ...] = (1 / 6, 5 / 6)       # share of each stage; two students: three
    stage: int = 0                      # run this one only, counted from 1; 0: all
    batch_size: int = 3072              # clips of a step, over all ranks
    micro_batch: int = 0                # clips of a forward pass on a rank; 0: what fits
    lr: float = 6.25e-4
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup: int = 10_000                # steps, in each stage
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4     # cosine
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.02             # global norm, 0: off
    max_skips: int = 10                 # so many non-finite steps in a row end the run
    # --- the run
    preset: str = ""                    # values that become the defaults; a wrong name lists all
    out_dir: str = "out/salt"           # the last stage's; stage1, stage2 in it those before
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"         # bf16 or fp32
    compile: bool = False
    fsdp: bool = False                  # shard weights, gradients and optimizer over the ranks
    shard_ranks: int = 0                # --fsdp in groups of so many, copies between; 0: all
    checkpoint: bool = False            # recompute activations in the backward pass
    resume: bool = False                # go on from the newest checkpoint in out_dir
    new_data: bool = False              # --resume though --data holds other files
    stop_at: int = 0                    # > 0: save and leave at this step of a stage
    save_every: int = 1000              # steps; also at the end and on SIGTERM, SIGUSR1, Ctrl-C
    keep: int = 2                       # newest checkpoints that stay
    log_every: int = 10
    probe_every: int = 0                # 0: only at the start and at the end
    sample_every: int = 5000            # pictures of masks and features; 0: none
    wandb: str = ""                     # project name: log there as well
    dry_run: bool = False               # parameters, FLOPs, memory and days; no data is touched


LAPTOP = dict(
    data=("world",), probe_data=("world", "world"), frames=8, size=32, patch=8, flip=False,
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), masks=("4x0.3x0.5", "2x0.7x0.5"),
    model="vit_n", init_std=0.06, pred_depth=2, pred_width=64, pred_heads=4,
    steps=3000, batch_size=16, lr=2e-3, start_lr=2e-4, warmup=60,
    final_weight_decay=0.04, clip_grad=10.0,
    dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop_salt",
)
# A still camera: what never moves is hidden, or it is all that is learned (assets/vjepa.md).
LAPTOP_VIDEO = LAPTOP | dict(
    data=(), probe_data=(), frames=16, stride=3, size=48, highpass=4.0,
    crop_scale=(0.3, 0.5), crop_ratio=(0.75, 1.35), out_dir="out/laptop_video_salt",
)
PRESETS = {"laptop": LAPTOP, "laptop_video": LAPTOP_VIDEO}


def parse_args(argv=None):
    """The paper's recipe, then --preset, then the flags."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--preset", default="")
    preset = peek.parse_known_args(argv)[0].preset
    if preset and preset not in PRESETS:
        peek.exit(2, f"error: --preset {preset}: choose from {', '.join(PRESETS)}\n")
    defaults = Args(preset=preset, **PRESETS.get(preset, {}))
    return tyro.cli(Args, args=argv, default=defaults, description=__doc__, use_underscores=True,
                    console_outputs=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    ARGS = parse_args()  # before torch: --help is instant

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (
    IMAGENET, SIZES, Meter, Run, UserError, ViT, adamw, budgeted, clip_gradients, construct, cosine,
    count, drawn, dry_run, gather, launch, latent_surprise, load_encoder, make_predictor,
    masked_flops, numbered, patches, run_in, set_rates, some_rows, to_rgb, warmup_decay,
)


# --- SALT -----------------------------------------------------------------------------------------

class MaskedPrediction(nn.Module):
    """What the stages share: an encoder of the context and a predictor of the rest (V-JEPA 2's),
    masks, schedules, costs. What is predicted, targets(), and how an error counts are each
    stage's own."""

    def __init__(self, args, out_width, teacher=None):
        super().__init__()
        self.args = args
        self.teacher = teacher
        shape = SIZES[args.model]
        self.encoder = ViT(
            **shape, patch=args.patch, tubelet=args.tubelet, frames=args.frames, size=args.size,
            pos=args.pos, highpass=args.highpass, init_std=args.init_std,
            checkpoint=args.checkpoint)
        self.predictor = make_predictor(
            args, self.encoder, in_width=shape["width"], out_width=out_width)
        # masks(step, B, rows=) -> keep, pred: an entry a mask, ids (b,K) and (b,M), of these rows
        # of the batch; a function of the seed and the step
        self.masks = partial(
            data.sample_masks, args.masks, args.seed, grid=self.encoder.grid, aspect=args.aspect,
            trim=args.trim)

    @property
    def product(self):
        """What is exported and probed, and teaches the next stage."""
        return self.encoder

    def forward(self, x, keep=None, pred=None):
        """x (B,3,T,H,W); keep, pred: an entry a mask, ids (B,K) and (B,M) -> loss, metrics.

        Without masks: the product's tokens (B,N,D), which probes and pictures read.
        """
        if keep is None:
            return self.product(x)
        h = self.targets(x)
        z = self.encoder(x, keep)  # [(B,K,D)]
        zhat = self.predictor(z, keep, pred)  # [(B,M,C)]
        losses = []
        metrics = {"tokens": some_rows(torch.cat(z, 1)), "targets": some_rows(h)}
        for name, guess, ids in zip(numbered(self.args.masks), zhat, pred):
            loss = self.error(guess - gather(h, ids)).mean()
            metrics[f"loss_{name}"] = loss.detach()
            losses.append(loss)
        return sum(losses) / len(losses), metrics

    def schedules(self, step):
        """Functions of the step alone; nothing is stretched."""
        a = self.args
        return {
            "lr": warmup_decay(step, a.warmup, a.steps, a.start_lr, a.lr, a.final_lr),
            "weight_decay": cosine(step, a.steps, a.weight_decay, a.final_weight_decay),
        }

    # Two counts of the same work, both logged. `flops` is what is computed: every matrix product,
    # once for the teacher, and three times for what is trained, as a backward pass costs two
    # forward passes. `ledger` is what the paper compares (Appendix F): 6 x parameters x tokens of
    # what is trained, 2 x of the teacher, which sees all tokens; attention does not count.

    def flops(self, keep, pred):
        """Of one clip."""
        trained = masked_flops(self.encoder, self.predictor, keep, pred)
        return self.teacher_flops() + 3 * trained

    def teacher_flops(self):
        """It sees every token of a clip, of images a frame at a time."""
        if self.teacher is None:
            return 0
        t, h, w = self.encoder.grid
        return self.teacher.flops(*([h * w] * t if self.teacher.images else [t * h * w]))

    def ledger(self, keep, pred):
        """Of one clip, by Appendix F; the predictor's tokens are context and targets."""
        encoder = 6 * count(self.encoder) * tokens_of(keep)
        predictor = 6 * count(self.predictor) * (tokens_of(keep) + tokens_of(pred))
        return encoder + predictor + 2 * count(self.teacher) * math.prod(self.encoder.grid)

    def surprise(self, x, context):
        """(B,): error in foretelling what follows the first `context` frames of x."""
        return latent_surprise(self.encoder, self.predictor, self.targets, x, context)


class VPixel(MaskedPrediction):
    """Stage 1: pixels of hidden patches from visible ones, under V-JEPA's masks (section 2.2)."""
    title = "a teacher from pixels"

    def __init__(self, args):
        super().__init__(args, out_width=3 * args.tubelet * args.patch**2)

    def error(self, difference):
        return difference.square()

    @torch.no_grad()
    def targets(self, x):
        """(B,N,C): each patch with mean 0 and unbiased deviation 1 in each channel (VideoMAE's)."""
        rgb = patches(x, self.args.tubelet, self.args.patch)  # (B,t,h,w,3,a,p,p)
        rgb = rgb.flatten(5).flatten(1, 3)  # (B,N,3,a*p*p)
        rgb = (rgb - rgb.mean(-1, keepdim=True)) / (rgb.std(-1, keepdim=True) + 1e-6)
        return rgb.flatten(2)


class Student(MaskedPrediction):
    """Stages 2 and on: the features of a frozen teacher, of any width, on the student's grid."""
    title = "a student of the frozen teacher"

    def __init__(self, args, teacher, config):
        """config: load_encoder's, which says what pixels the teacher was trained on, and of 4DS
        after which block it is read: never the last, where its context had no gradient."""
        super().__init__(args, out_width=teacher.width, teacher=teacher)
        self.teacher.blocks = self.teacher.blocks[: config.get("layer")]
        self.teacher.eval().requires_grad_(False)
        self.teacher_pixels = (config["mean"], config["std"])
        grid = grid_of(teacher, args)
        if grid != self.encoder.grid:
            raise ValueError(f"the teacher's tokens lie on a grid of {grid}, the student's on "
                             f"{self.encoder.grid}")

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def error(self, difference):
        return difference.abs()

    @torch.no_grad()
    def targets(self, x):
        """(B,N,C), layer-normed as V-JEPA's."""
        h = self.teacher(renormalise(x, *self.teacher_pixels))
        # CLS tokens come first, of images one a frame; they are no targets
        h = h[:, -math.prod(self.encoder.grid):]  # (B,N,C)
        return F.layer_norm(h.float(), h.shape[-1:])


def grid_of(teacher, args):
    """(t,h,w) of the teacher's tokens of a clip. Learned and one-dimensional positions are a table
    of one size; others are made for any clip."""
    if teacher.pos in ("learned", "sinusoid1d") and not teacher.images:
        return teacher.grid
    side = args.size // teacher.patch
    return args.frames // teacher.tubelet, side, side


def renormalise(x, mean, std):
    """Pixels (B,3,T,H,W) by ImageNet's statistics -> by these."""
    if IMAGENET == {"mean": mean, "std": std}:
        return x
    mean, std = x.new_tensor([mean, std]).view(2, 3, 1, 1, 1)
    return (to_rgb(x, **IMAGENET) - mean) / std


def tokens_of(masks):
    """How many tokens of a clip these masks have, all together."""
    return sum(ids.shape[1] for ids in masks)


def published(encoder, predictor, teacher, tokens, clips):
    """The ledger of a stage as Tables 10 and 11 have it: parameters, tokens of a full clip, clips.
    Each of two masks keeps a tenth of the tokens, and the predictor sees all of them for each; the
    log's ledger counts the masks as they are drawn."""
    # 6 x parameters x tokens of what is trained
    return clips * tokens * (6 * 0.2 * encoder + 6 * 2 * predictor + 2 * teacher)


# --- stages ---------------------------------------------------------------------------------------

def stages(args):
    """[(number, its arguments)] of what is to be trained. Every stage before the last has its own
    folder and the teacher's size and data, the first its masks too."""
    last = len(args.split)
    if abs(sum(args.split) - 1) > 0.01 or last < 2 or min(args.split) <= 0:
        raise UserError(f"--split {args.split}: two or more shares of the steps, which sum to 1")
    if args.teacher_model and args.teacher_model not in SIZES:
        raise UserError(f"--teacher_model {args.teacher_model}: choose from {', '.join(SIZES)}")
    rows = []
    for number, share in enumerate(args.split, 1):
        a = dataclasses.replace(args, steps=max(1, round(args.steps * share)))
        if number < last:
            a.out_dir = f"{args.out_dir}/stage{number}"
            a.model = args.teacher_model or args.model
            a.data = args.teacher_data or args.data
        if number == 1:
            a.masks = args.teacher_masks or args.masks
        taught = args.teacher and number < last  # somebody else has done this stage's work
        if args.stage in (0, number) and not taught:
            rows.append((number, a))
    if not rows:
        raise UserError(f"--stage {args.stage}: there are stages 1 to {last}; with --teacher, "
                        "the last")
    return rows


def build(args, stage=None, teacher=None):
    """The objective of a stage, from that stage's arguments.

    stage: its number, if not the one that lies in args.out_dir. teacher: (encoder, config), if not
    --teacher or what the stage before has exported.
    """
    stage = stage or stage_in(args)
    if stage == 1:
        return VPixel(args)
    if teacher is None:
        with torch.device("cpu"):  # also where the student is only a sketch
            teacher = load_encoder(teacher_file(args, stage), seed=args.seed)
    return Student(args, *teacher)


def stage_in(args):
    """Folders stage1, stage2 hold these stages, any other the last one."""
    last = len(args.split)
    folders = {f"stage{number}": number for number in range(1, last)}
    return folders.get(Path(args.out_dir).name, last)


def teacher_file(args, stage):
    """--teacher, or what the stage before has exported: its folder lies in the last stage's, and
    beside that of any other."""
    if args.teacher:
        return args.teacher
    out = Path(args.out_dir)
    home = out if stage == len(args.split) else out.parent
    return home / f"stage{stage - 1}" / "encoder.safetensors"


def sketch(args):
    """[(number, its arguments, objective on the meta device)] of every stage: what a user can get
    wrong in any of them is told before the first one trains."""
    rows = []
    teacher = None
    for number, a in stages(args):
        make = partial(build, stage=number, teacher=teacher)
        objective = construct(make, dataclasses.replace(a, dry_run=True))
        drawn(objective, 0)  # also a mask that cannot be drawn
        rows.append((number, a, objective))
        teacher = (objective.product, IMAGENET)
    return rows


def plan(run, rows):
    """--dry_run: a line of Appendix F's ledger for each stage, then the last one's sizes with the
    FLOPs of all, one JSON line."""
    counted = 0.0
    ledger = 0.0
    for number, args, objective in rows:
        run.fit(objective)
        clips = args.steps * args.batch_size
        tokens = math.prod(objective.encoder.grid)
        nets = [count(net) for net in (objective.encoder, objective.predictor, objective.teacher)]
        said = published(*nets, tokens, clips)
        flops = run.plan.flops * args.steps
        counted += flops
        ledger += said
        if run.rank == 0:
            sizes = ", ".join(f"{size / 1e6:.4g}M" for size in nets)
            print(f"stage {number}: {args.model}, {args.steps} steps, {clips / 1e6:.4g}M clips of "
                  f"{tokens} tokens; encoder, predictor, teacher of {sizes} parameters: "
                  f"{said:.3g} FLOPs by Appendix F, {flops:.3g} counted")
    dry_run(run, objective, total=counted, flops_total=counted, ledger_total=ledger)


# --- the run --------------------------------------------------------------------------------------

def main(args):
    sketches = sketch(args)
    if args.flops:
        parts = [(args.split[number - 1], objective) for number, _, objective in sketches]
        args = budgeted(args, *parts)
        sketches = sketch(args)
    run = Run(args)
    if args.dry_run:
        return plan(run, sketches)
    del sketches  # with --teacher's weights
    rows = stages(args)
    # what only a later stage would meet is told before the first one trains: another run in the
    # last one's folder, a wrong list
    run.once(run_in, rows[-1][1].out_dir, args.resume, "train_salt")
    for spec in set().union(*(a.data for _, a in rows)).difference(rows[0][1].data):
        data.parse_list(spec, look=run.rank == 0)
    line = {"flops": 0.0, "ledger": 0.0, "probe_acc": None}
    for number, a in rows:
        line = train(a, number, line)
        if line["steps"] < a.steps:  # stopped by a signal or --stop_at: --resume goes on here
            break
    run.finish(line)


def train(args, number, before):
    """One stage -> its last line. before: that of the stage before."""
    run = Run(args)
    objective = construct(partial(build, stage=number), args)
    run.fit(objective)
    sources = run.sources()
    run.open(__file__, sources, f"stage {number} of {len(args.split)}, {objective.title}: ")

    net = run.wrap(objective)  # what is called, trained and saved
    optimizer = adamw(objective, args)
    costs = {"flops": before["flops"], "ledger": before["ledger"]}  # go on over the stages
    meter = Meter(run, costs | run.load(net, optimizer))
    if run.done == 0:  # before learning: what it has to beat
        meter.state["random_acc"] = run.accuracy(net)
    loader = run.loader(sources, objective.masks)

    for step in run.steps():
        # 1. the rates of this step
        rates = objective.schedules(step)
        set_rates(optimizer, rates)

        # 2. forward and backward, a micro-batch at a time
        for _ in run.passes(net):
            batch = meter.next(loader)
            x = data.prepare(batch, run.device)  # (b,3,T,H,W)
            keep, pred = batch["masks"]  # [(b,K)], [(b,M)]
            with run.autocast():
                loss, metrics = net(x, keep, pred)
            (loss * (run.micro / run.per_rank)).backward()
            tokens = metrics.pop("tokens")
            targets = metrics.pop("targets")
            meter.add(loss, metrics, batch, flops=objective.flops(keep, pred),
                      ledger=objective.ledger(keep, pred))

        # 3. the step; where a loss or gradient is not finite, all ranks skip it alike
        grad_norm = clip_gradients(objective, args.clip_grad)
        skip = meter.skip(step, grad_norm)  # 1.0 or 0.0, on the device
        optimizer.found_inf = skip
        optimizer.step()
        optimizer.zero_grad()
        meter.after_step()

        # 4. log, pictures, checkpoint, probe
        if meter.logs():
            # feature_std, rankme; rankme_targets
            run.log(meter.line(rates, run.health(tokens, targets=targets)))
        if run.due(args.sample_every):
            run.mask_picture(net, x, keep, objective.encoder.grid)
        if meter.saves(net, x, keep, pred):
            run.export(objective)
            run.save(net, optimizer, meter.state)
        if run.stop:
            break
        if run.probes():
            run.accuracy(net)

    probe_acc = run.accuracy(net) if run.done == args.steps else None
    costs = {name: meter.state[name] for name in costs}
    stage = {"stage": number, "teacher_acc": before["probe_acc"]}
    return meter.summary(probe_acc) | stage | costs


if __name__ == "__main__":
    launch(main, ARGS)
