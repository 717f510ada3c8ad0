"""V-JEPA: predict hidden regions of a video in the latent space of a slow copy of the encoder.
Bardes et al. 2024, "Revisiting Feature Prediction for Learning Visual Representations from Video".

    z    = E(x[keep])                      (B,3,T,H,W) -> (B,K,D)   the context, ~10 % of the tokens
    zhat = P(z, mask tokens at pred)       -> (B,M,D)               a narrow predictor
    h    = LN(Ebar(x))[pred]               -> (B,M,D)               targets, no gradient
    L    = mean over masks of mean |zhat - h|
    Ebar <- m Ebar + (1 - m) E             after every optimizer step

Ebar is what is exported and probed (encoder.safetensors); one class, VJEPA, has all of this.

    python train_vjepa.py --preset laptop                  two cores, five minutes, no download: a
                                                           linear probe near 60 %, random weights 15
    torchrun --nproc-per-node 8 train_vjepa.py --data k710.csv ssv2.csv      the paper's ViT-L/16
    torchrun --nproc-per-node 8 train_vjepa.py --preset vjepa2 --data ...    V-JEPA 2's recipe
    torchrun --nproc-per-node 8 train_vjepa.py --preset vjepa21 --data ...   V-JEPA 2.1's: four
        levels of E are predicted, and at the context: + lambda mean |zseen - h[keep]| / sqrt(d)
    torchrun --nproc-per-node 4 train_vjepa.py --preset fwm_hw_ld            a row of FWM-HW-LD

The second half of the file is FWM-HW-LD (Adhikari 2026): terms that are added to this loss, off by
default. assets/vjepa.md: every flag at work, what the log says, results, deviations.
"""
import signal

if __name__ == "__main__":  # Ctrl-C before the run listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import dataclasses
import math
import os
from functools import partial
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """Defaults: the paper's ViT-L/16 recipe (Table 5 and appendix A)."""
    # --- data
    data: tuple[str, ...] = ()          # lists of `path label` rows, LIST[:WEIGHT]; empty: world
    probe_data: tuple[str, ...] = ()    # online probe: a train and a val list with labels, or none
    frames: int = 16                    # of a clip
    stride: int = 4                     # video frames from one frame of a clip to the next
    fps: float = 0.0                    # > 0: sample by time stamp at this rate instead
    size: int = 224                     # pixels, after the crop
    crop_scale: tuple[float, float] = (0.3, 1.0)    # area of the crop, one box for all frames
    crop_ratio: tuple[float, float] = (0.75, 1.35)  # its aspect ratio (the table rounds to 1.33)
    flip: bool = True                   # half of the clips
    clips_per_video: int = 1            # cut from each decoded video; 4 where decoding is slow
    short: Literal["repeat", "loop", "spread", "error"] = "repeat"  # what a short video becomes
    workers: int = -1                   # loader processes of a rank; -1: what the machine has
    timeout: int = 600                  # so many seconds without a batch end the run
    max_bad_fraction: float = 0.1       # share of unreadable videos; more end the run
    # --- architecture
    model: str = "vit_l"                # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 16                     # pixels
    tubelet: int = 2                    # frames
    pos: Literal["sincos", "rope"] = "sincos"       # positions: sincos or rope
    rope_quirk: bool = False            # tiled frequencies, as V-JEPA 2's files and transformers
    pred_depth: int = 12                # blocks of the predictor
    pred_width: int = 384
    pred_heads: int = 0                 # 0: as many as the encoder
    mask_tokens: int = 0                # 0: one for each mask
    init_std: float = 0.02              # of the random weights; narrow models want more
    highpass: float = 0.0               # > 0: hide what is static, scale the rest (not the paper's)
    init: str = ""                      # start from a run's folder, or a weight file's encoder
    init_optimizer: bool = False        # with that run's optimizer state, too
    # --- masks
    masks: tuple[str, ...] = ("8x0.15", "2x0.7")    # BLOCKSxSCALE[xTIME], random:R tube:R causal:R
    aspect: tuple[float, float] = (0.75, 1.5)       # of a block
    trim: Literal["random", "prefix"] = "random"    # ids cut to the batch minimum; prefix: official
    # --- V-JEPA 2.1
    levels: int = 1                     # outputs that are predicted, spread over the depth; 2.1: 4
    context_loss: float = 0.0           # weight of the loss on the context's own tokens
    context_ramp: tuple[int, int] = (0, 0)          # steps between which that weight rises from 0
    rope_scaled: int = 0                # > 0: places in space end at this - 1 on any grid (rope)
    stills: bool = False                # images: one frame with patches of their own, no still clip
    # --- optimization
    steps: int = 90_000
    flops: float = 0.0                  # > 0: as many steps as this many FLOPs pay for
    batch_size: int = 3072              # clips of a step, over all ranks
    micro_batch: int = 0                # clips of a forward pass on a rank; 0: what fits
    lr: float = 6.25e-4
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    decay: Literal["cosine", "linear"] = "cosine"   # of the rate: cosine or linear
    warmup: int = 12_000                # steps
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4     # linear (the official code: cosine)
    ema: float = 0.998
    final_ema: float = 1.0              # linear
    stretch: float = 1.25               # schedules are made for stretch * steps, and cut
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 10.0             # global norm, 0: off (the official config's)
    max_skips: int = 10                 # so many non-finite steps in a row end the run
    # --- the run
    preset: str = ""                    # values that become the defaults; a wrong name lists all
    out_dir: str = "out/vjepa"
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"         # bf16 or fp32
    compile: bool = False
    fsdp: bool = False                  # shard weights, gradients and optimizer over the ranks
    shard_ranks: int = 0                # --fsdp in groups of so many, copies between; 0: all
    checkpoint: bool = False            # recompute activations in the backward pass
    resume: bool = False                # go on from the newest checkpoint in out_dir
    new_data: bool = False              # --resume though --data holds other files
    stop_at: int = 0                    # > 0: save and leave at this step
    save_every: int = 1000              # steps; also at the end and on SIGTERM, SIGUSR1, Ctrl-C
    keep: int = 2                       # newest checkpoints that stay
    log_every: int = 10
    probe_every: int = 0                # 0: only at the start and at the end
    sample_every: int = 5000            # pictures of masks and features; 0: none
    wandb: str = ""                     # project name: log there as well
    dry_run: bool = False               # parameters, FLOPs, memory and days; no data is touched
    # --- FWM-HW-LD
    terms: tuple[str, ...] = ()         # NAME:WEIGHT of the terms that are added: ld:1.0 hw:0.3
    tau: float = 1.0                    # temperature of hw: softmax(error / tau)
    hw_standardise: bool = False        # errors of a clip to mean 0 and deviation 1 before that
    anneal: bool = False                # weights of kin_ terms fall to 0 over the run
    distance: bool = False              # base loss / sqrt(tokens to the nearest of the context)
    motion: float = 0.0                 # > 0: blocks lie where it moves: exp(this * motion)
    motion_uniform: float = 0.1         # share of the blocks placed without looking at motion
    temporal_keep: float = 1.0          # < 1: context in this first share of slices, rest predicted


LAPTOP = dict(
    data=("world",), probe_data=("world", "world"), frames=8, size=32, patch=8, flip=False,
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), masks=("4x0.3x0.5", "2x0.7x0.5"),
    model="vit_n", pos="rope", init_std=0.04, pred_depth=2, pred_width=64, pred_heads=4,
    steps=2000, batch_size=16, lr=1e-3, start_lr=1e-4, warmup=60, final_weight_decay=0.04,
    ema=0.99, final_ema=0.99,
    stretch=1.0, dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop",
)
# A still camera: what never moves is hidden, or it is all that is learned (assets/vjepa.md).
LAPTOP_VIDEO = LAPTOP | dict(
    data=(), probe_data=(), frames=16, stride=3, size=48, highpass=4.0,
    crop_scale=(0.3, 0.5), crop_ratio=(0.75, 1.35), steps=3000, out_dir="out/laptop_video",
)
VJEPA2 = dict(
    pos="rope", size=256, fps=4.0, pred_heads=12, mask_tokens=1,
    lr=5.25e-4, start_lr=1e-4, final_lr=5.25e-4, final_weight_decay=0.04,
    ema=0.99925, final_ema=0.99925,
    clip_grad=0.0, out_dir="out/vjepa2",
)
COOLDOWN = VJEPA2 | dict(
    frames=64, steps=12_000, start_lr=5.25e-4, final_lr=1e-6, decay="linear", warmup=0,
    init_optimizer=True, out_dir="out/vjepa2_cooldown",
)
V21 = dict(levels=4, context_loss=0.5, rope_scaled=16, stills=True)
PRESETS = {
    "laptop": LAPTOP,
    "laptop_video": LAPTOP_VIDEO,
    "vjepa2": VJEPA2,
    "vjepa2_cooldown": COOLDOWN,
    "vjepa21": VJEPA2 | V21 | dict(context_ramp=(15_000, 30_000), out_dir="out/vjepa21"),
    "vjepa21_cooldown": COOLDOWN | V21 | dict(out_dir="out/vjepa21_cooldown"),
    # for python model.py export: as HF's VJEPA2Model and V-JEPA 2's own code rotate
    "vjepa2_hf": VJEPA2 | dict(rope_quirk=True, out_dir="out/vjepa2_hf"),
}

# FWM-HW-LD's rows: what each adds to its baseline. The baselines are V-JEPA by the recipe of Table
# 1: FWM_UCF on UCF-101 alone (Table 3), FWM_PAPER on a mixture (Table 4). "fwm_hw_ld" is a row.
FWM_PAPER = dict(
    data=("ucf101.csv:0.2", "ssv2.csv:0.6", "imagenet100.csv:0.2"), model="vit_b", stride=2,
    pos="rope", pred_depth=8, pred_width=256, pred_heads=8, distance=True,
    steps=30_000, batch_size=32, micro_batch=8, lr=6e-4, start_lr=1e-4, warmup=300,
    final_weight_decay=0.04,
    ema=0.99925, final_ema=0.99925, stretch=1.0, out_dir="out/fwm_paper",
)
FWM_UCF = FWM_PAPER | dict(data=("ucf101.csv",), out_dir="out/fwm_ucf")
# row: its terms; its masks, annealing and EMA, where they differ, are set below the tables
ROWS_UCF = {
    "motion_guided": "",
    "kin_l1": "kin_l1:1.0",
    "kin_l1_weak": "kin_l1:0.1",
    "kin_accel": "kin_accel:0.1",
    "kin_huber": "kin_huber:0.1",
    "kin_split": "kin_split:0.1",
    "kin_anneal": "kin_l1:0.1",
    "velgate": "velgate:0.1",
    "hamiltonian": "hamiltonian:0.1",
    "sigreg": "sigreg:1.0",
    "sigreg_no_ema": "sigreg:1.0",
    "future_predictive": "",
    "motion_future": "",
}
ROWS_PAPER = {
    "fwm_hw_ld": "static:0.05 orth:0.01 hw:1.0 ld:1.0",
    "ld": "ld:1.0",
    "fwm": "static:0.05 orth:0.01",
    "ac_hw": "ac:1.0 hw:0.3",
    "amg": "",
    "hw": "hw:0.3",
    "hw_ld": "hw:1.0 ld:1.0",
    "fwm_ld": "static:0.05 orth:0.01 ld:1.0",
    "combo": "delta:0.5 hw:0.3",
    "delta": "delta:0.5",
    "ac": "ac:1.0",
    "fac": "static:0.05 orth:0.01 ac:1.0",
    "ltc": "ltc:0.5",
    "spectral": "spectral:1.0",
}
PRESETS |= {"fwm_paper": FWM_PAPER, "fwm_ucf": FWM_UCF}
for base, rows in ((FWM_UCF, ROWS_UCF), (FWM_PAPER, ROWS_PAPER)):
    for name, terms in rows.items():
        PRESETS[name] = base | dict(terms=tuple(terms.split()), out_dir=f"out/{name}")
        if "kin_" in name or "no_ema" in name:
            # the target is the encoder itself, without gradient
            PRESETS[name] |= dict(ema=0.0, final_ema=0.0)
PRESETS["kin_anneal"] |= dict(anneal=True)
# the paper's weight of static, 0.05, empties the appearance half at this size
PRESETS["laptop_fwm"] = LAPTOP | dict(
    terms=("static:0.01", "orth:0.01", "hw:1.0", "ld:1.0"), distance=True, micro_batch=16,
    out_dir="out/laptop_fwm")
for name in ("future_predictive", "motion_future"):
    PRESETS[name] |= dict(temporal_keep=0.5)
for name in ("motion_guided", "motion_future"):
    PRESETS[name] |= dict(motion=2.0)
for name in ("amg", "combo"):
    PRESETS[name] |= dict(motion=5.0, motion_uniform=0.0)


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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (
    SIZES, Meter, Run, UserError, adamw, budgeted, clip_gradients, construct, cosine, dry_run,
    ema_update, exact, gather, latent_surprise, launch, linear, make_encoder, make_predictor,
    masked_flops, numbered, set_rates, some_rows, warmup_decay,
)


# --- V-JEPA ---------------------------------------------------------------------------------------

class VJEPA(nn.Module):
    """The whole method: encoder, predictor, target encoder, loss, schedules (section 3)."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        shape = SIZES[args.model] | dict(
            patch=args.patch, tubelet=args.tubelet, pos=args.pos, highpass=args.highpass,
            levels=args.levels, stills=args.stills, rope_scaled=args.rope_scaled)
        if args.rope_quirk:
            shape["rope_quirk"] = True
        self.encoder, _ = make_encoder(args, shape)
        width = args.levels * shape["width"]
        self.predictor = make_predictor(
            args, self.encoder,
            in_width=width, out_width=width,
            hidden=shape["width"] if args.levels > 1 else 0, context=args.context_loss > 0)
        # of the forward pass that comes next: place() sets both
        self.step = 0
        self.grid = self.encoder.grid
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        # masks(step, B, rows=) -> keep, pred: an entry a mask, ids (b,K) and (b,M), of these rows
        # of the batch; a function of the seed and the step
        self.masks = partial(
            data.sample_masks, args.masks, args.seed, grid=self.encoder.grid, aspect=args.aspect,
            trim=args.trim)
        if args.stills:  # masks that an image cannot have are told before the first comes
            self.image_masks(0, 1)
        # flags that would do nothing, or the opposite, end it here
        if args.pos != "rope" and (args.rope_scaled or args.rope_quirk):
            raise ValueError("--rope_scaled and --rope_quirk are for --pos rope")
        if args.context_ramp[0] > args.context_ramp[1]:
            raise ValueError(f"--context_ramp {args.context_ramp}: first step, last step")

    @property
    def image_masks(self):
        """As masks, of clips of one frame."""
        return partial(self.masks, grid=(1, *self.encoder.grid[1:]))

    @property
    def product(self):
        """What is exported and probed."""
        return self.target

    def forward(self, x, keep=None, pred=None):
        """x (B,3,T,H,W); keep, pred: an entry a mask, ids (B,K) and (B,M) -> loss, metrics.

        Without masks: the product's tokens (B,N,D), which probes and pictures read. (FSDP gathers
        the root's parameters only inside this forward, so everything enters through here.)
        """
        if keep is None:
            return self.product(x)
        h = self.targets(x)
        errors, context = self.errors(x, h, keep, pred)
        return self.total([error.mean() for error in errors], context, h)

    @torch.no_grad()
    def targets(self, x):
        """h (B,N,D), a constant: E must tell more of the clip, not make h easy (appendix D)."""
        h = self.target(x, levels=True).float().unflatten(2, (self.args.levels, -1))
        return F.layer_norm(h, h.shape[-1:]).flatten(2)

    def errors(self, x, h, keep, pred):
        """|zhat - h|: an entry a mask, (B,M,D) at the hidden tokens; with --context_loss the mean
        at the context's, each weighted by its nearness to what is hidden (V-JEPA 2.1)."""
        z = self.encoder(x, keep, levels=True)  # [(B,K,D)]
        zhat, seen = self.predictor(z, keep, pred, self.grid, context=True)  # [(B,M,D)], [(B,K,D)]
        hidden = [(guess - gather(h, ids)).abs() for guess, ids in zip(zhat, pred)]
        context = []
        for guess, ids, others in zip(seen, keep, pred):
            error = (guess - gather(h, ids)).abs()
            context.append((error * nearness(ids, others, self.grid)[..., None]).mean())
        return hidden, context

    def total(self, losses, context, h):
        """The mean over the masks, and what the log shows."""
        named = zip(numbered(self.args.masks), losses)
        metrics = {f"loss_{name}": loss.detach() for name, loss in named}
        loss = sum(losses) / len(losses)
        if context:
            dense = sum(context) / len(context)
            loss = loss + self.schedules(self.step)["context_weight"] * dense
            metrics["loss_context"] = dense.detach()
        return loss, metrics | {"tokens": some_rows(h)}

    def place(self, keep, pred, x, step, row):
        """The masks of the clips x, whose first is `row` of the batch. Notes step and grid:
        forward() has no other way to know."""
        self.step = step
        self.grid = (max(1, x.shape[2] // self.args.tubelet), *self.encoder.grid[1:])
        return keep, pred

    def after_step(self, step, skip=0.0):
        """The target follows the encoder, but not after a step that was skipped."""
        ema = self.schedules(step)["ema"]
        ema_update(self.target.parameters(), self.encoder.parameters(), ema, skip)

    def schedules(self, step):
        """Functions of the step alone, all of them stretched (appendix A)."""
        a = self.args
        end = a.stretch * a.steps
        rates = {
            "lr": warmup_decay(step, a.warmup, end, a.start_lr, a.lr, a.final_lr, a.decay),
            "weight_decay": linear(step, end, a.weight_decay, a.final_weight_decay),
            "ema": linear(step, end, a.ema, a.final_ema),
        }
        if a.context_loss:
            first, last = a.context_ramp
            ramp = linear(max(0, step - first), last - first, 0.0, a.context_loss)
            rates["context_weight"] = ramp if step < last else a.context_loss
        return rates

    def flops(self, keep, pred):
        """Of one clip, forward and backward; a backward pass costs two forward passes."""
        trained = masked_flops(self.encoder, self.predictor, keep, pred)
        return self.target.flops(math.prod(self.grid)) + 3 * trained

    def of_images(self):
        """The same where every clip is one frame: what its steps cost."""
        images = copy.copy(self)
        images.grid = (1, *self.encoder.grid[1:])
        images.masks = self.image_masks
        return images

    def surprise(self, x, context):
        """(B,): error in foretelling what follows the first `context` frames of x."""
        return latent_surprise(self.encoder, self.predictor, self.targets, x, context)


def nearness(ids, others, grid):
    """(B,n): 1/sqrt of the distance, in tokens, from each of ids (B,n) to the nearest of others
    (B,m)."""
    t, h, w = grid

    def places(ids):
        return torch.stack([ids // (h * w), ids // w % h, ids % w], -1).float()  # (B,n,3)

    # by differences: for more than 25 points torch's default is a matrix product, which rounds
    distance = torch.cdist(
        places(ids), places(others), compute_mode="donot_use_mm_for_euclid_dist")  # (B,n,m)
    return distance.amin(-1).rsqrt()


# --- FWM-HW-LD: terms that are added to the loss --------------------------------------------------
# A term is a function of one Step -> a number, which is added to the loss times its weight. Slice s
# of a clip is z[:, s]; the halves of the channels are appearance and dynamics. "Eq." and "Table"
# are the paper's (Adhikari 2026).

@dataclasses.dataclass
class Step:
    """What terms look at. z, h: the full clip by the encoder and by the target, layer-normed."""
    z: torch.Tensor  # (B,t,h*w,D); None where no term reads it
    h: torch.Tensor  # (B,t,h*w,D), without gradient
    x: torch.Tensor  # (B,3,T,H,W)
    errors: list  # [(B,M)] of the base loss before --distance, an entry a mask
    fwm: nn.Module  # its args, weights, heads, dynamics() and step


def hardness(errors, args):
    """errors (B,n) -> weights (B,n) of mean 1 in each clip, without gradient: softmax(error / tau)
    * n (Eqs. 9 and 10)."""
    n = errors.shape[1]
    errors = errors.detach()
    if args.hw_standardise:
        errors = F.layer_norm(errors, (n,))
    # clamped as in Adhikari's appendix D: without effect where errors / tau < 20
    return n * (errors / args.tau).clamp(-20, 20).softmax(1)


def hard(errors, args):
    """(B,n) -> their mean, weighted (Eq. 11)."""
    return (hardness(errors, args) * errors).mean()


def hw(s):
    """The base loss once more, hard tokens weighted up."""
    return sum(hard(errors, s.fwm.args) for errors in s.errors) / len(s.errors)


def static(s):
    """Appearance stays as it is from slice to slice."""
    return s.z.chunk(2, -1)[0].diff(dim=1).abs().mean()


def orth(s):
    """No covariance of appearance and dynamics over all n tokens of the forward pass: the mean
    square of its entries. (Eq. 8 as printed, their sum times n, starts at 40,000 times the base
    loss's gradient and more, against the paper's appendix B.)"""
    appearance, dynamics = s.z.flatten(0, 2).chunk(2, -1)  # (n,D/2)
    appearance = appearance - appearance.mean(0)
    dynamics = dynamics - dynamics.mean(0)
    # a sum of many small products of either sign: not in bf16
    with exact(s.z):
        return (appearance.T @ dynamics / len(appearance)).square().mean()


def ld(s):
    """A head predicts the target's change; weighted like hw where hw is on (LD-HW)."""
    change = s.fwm.heads["ld"](s.fwm.dynamics(s.z[:, :-1]))
    errors = (change - s.h.diff(dim=1)).abs().mean(-1).flatten(1)  # (B,(t-1)*h*w)
    return hard(errors, s.fwm.args) if "hw" in s.fwm.weights else errors.mean()


def kin_l1(s):
    """The change from slice to slice is small."""
    return s.z.diff(dim=1).abs().mean()


def kin_huber(s):
    """kin_l1 by Huber's loss, quadratic up to 1."""
    return F.huber_loss(s.z[:, 1:], s.z[:, :-1])


def kin_accel(s):
    """The change of the change, z[s+2] - 2 z[s+1] + z[s], is small."""
    return s.z.diff(n=2, dim=1).abs().mean()


def kin_split(s):
    """kin_accel on the first half of the channels."""
    return s.z.chunk(2, -1)[0].diff(n=2, dim=1).abs().mean()


def velgate(s):
    """kin_l1 on the half of a clip's tokens whose target changes least."""
    speed = s.h.diff(dim=1).abs().mean(-1).flatten(1)  # (B,(t-1)*h*w)
    slow = speed <= speed.median(1, keepdim=True).values
    return s.z.diff(dim=1).abs().mean(-1).flatten(1)[slow].mean()


def sigreg(s, directions=64):
    """Tokens are normal along random directions (LeJEPA): Epps and Pulley's statistic, the squared
    distance between their characteristic function and that of N(0,1), exp(-k^2/2), integrated over
    |k| <= 3 with the same weight; a mean over directions, not times the number of tokens."""
    # the same directions on all ranks, others at every step
    seed = torch.Generator().manual_seed(s.fwm.args.seed * 1_000_003 + s.fwm.step)
    axes = torch.randn(s.z.shape[-1], directions, generator=seed)
    axes = F.normalize(axes, dim=0).to(s.z.device)
    with exact(s.z):
        along = s.z.flatten(0, 2) @ axes  # (n,directions)
        knots = torch.linspace(-3, 3, 17, device=s.z.device)
        distances = []
        for k in knots:
            real = (along * k).cos().mean(0) - (-k * k / 2).exp()
            imaginary = (along * k).sin().mean(0)
            distances.append(real.square() + imaginary.square())
        weight = (-knots * knots / 2).exp()[:, None]
        return torch.trapezoid(torch.stack(distances) * weight, knots, dim=0).mean()


def hamiltonian(s):
    """The halves of the channels, positions q and momenta p, move as Hamilton's equations say:
    dq = dH/dp, dp = -dH/dq, of a learned energy H."""
    with torch.enable_grad():  # its derivatives are asked for even where nothing is trained
        now = s.z[:, :-1]
        if not now.requires_grad:
            now = now.detach().requires_grad_()
        energy = s.fwm.heads["hamiltonian"](now).sum()
        dh_dq, dh_dp = torch.autograd.grad(energy, now, create_graph=True)[0].chunk(2, -1)
    return (s.z.diff(dim=1) - torch.cat([dh_dp, -dh_dq], -1)).abs().mean()


def delta(s):
    """The change from slice to slice equals the target's."""
    return (s.z.diff(dim=1) - s.h.diff(dim=1)).abs().mean()


def spectral(s):
    """The spectrum over time equals the target's: L1 of real and imaginary parts, frequency k
    weighted by k + 1 (mean weight 1)."""
    apart = torch.fft.rfft(s.z - s.h, dim=1, norm="ortho")  # (B,t//2+1,h*w,D)
    apart = torch.view_as_real(apart).abs()
    weight = torch.arange(1, apart.shape[1] + 1, device=s.z.device)
    weight = weight / weight.float().mean()
    return (apart * weight.view(1, -1, 1, 1, 1)).mean()


def ltc(s, margin=0.5):
    """Closer to the target of the same slice than to the next slice's, by a margin."""
    near = F.cosine_similarity(s.z[:, :-1], s.h[:, :-1], dim=-1)
    far = F.cosine_similarity(s.z[:, :-1], s.h[:, 1:], dim=-1)
    return (margin - near + far).clamp_min(0).mean()


def ac(s):
    """A head predicts the change of each patch's mean colour."""
    a = s.fwm.args
    colour = F.avg_pool3d(s.x, (a.tubelet, a.patch, a.patch)).flatten(3)  # (B,3,t,h*w)
    change = s.fwm.heads["ac"](s.fwm.dynamics(s.z[:, :-1]))
    return (change - colour.permute(0, 2, 3, 1).diff(dim=1)).abs().mean()


TERMS = {term.__name__: term for term in (
    hw, static, orth, ld, kin_l1, kin_huber, kin_accel, kin_split, velgate, sigreg, hamiltonian,
    delta, spectral, ltc, ac)}


def parse_terms(specs):
    """('ld:1.0', 'hw:0.3') -> {name: weight} in the order of TERMS; a weight of 0 is off."""
    said = {}
    for spec in specs:
        name, _, weight = spec.partition(":")
        try:
            said[name] = float(weight)
        except ValueError:
            said[name] = -1
        if name not in TERMS or not 0 <= said[name] < math.inf:
            raise ValueError(f"--terms {spec}: write NAME:WEIGHT, a weight of 0 or more, and a "
                             f"name of {', '.join(TERMS)}")
    return {name: said[name] for name in TERMS if said.get(name)}


def asks_for_fwm(args):
    """Is any flag of the second paper on? --tau and --motion_uniform do nothing alone."""
    flags = ("terms", "anneal", "distance", "motion", "temporal_keep")
    return any(getattr(args, name) != getattr(Args, name) for name in flags)


class FWM(VJEPA):
    """V-JEPA and the terms of --terms, its distance weighting and its masks."""

    def __init__(self, args):
        super().__init__(args)
        self.weights = parse_terms(args.terms)
        # V-JEPA's, or Future-Predictive: the context lies in the first share of the slices, and
        # all that is not context is predicted
        self.masks = partial(self.masks, temporal_keep=args.temporal_keep)
        # terms whose value depends on the clips of a forward pass: --micro_batch must be given
        self.by_pass = sorted({"orth", "sigreg"} & set(self.weights))
        # all but hw read what the encoder makes of the full clip
        self.full_pass = bool(set(self.weights) - {"hw"})
        if args.motion and any(":" in mask for mask in args.masks):
            raise ValueError("--motion places blocks: --masks must all be BLOCKSxSCALE[xTIME]")
        if args.anneal and not any(name.startswith("kin_") for name in self.weights):
            raise ValueError("--anneal is for the weights of kin_ terms")
        if args.motion and args.trim == "prefix":
            raise ValueError("--motion trims at random, not by --trim prefix")
        slices = self.encoder.grid[0]
        if self.full_pass and slices < 3:
            raise ValueError(f"terms compare three slices of a clip: --frames {args.frames} makes "
                             f"{slices}")
        self.factorised = bool({"static", "orth"} & set(self.weights))
        width = self.encoder.width
        seen = width // 2 if self.factorised else width
        # made last, so that all other weights start as they do without heads
        self.heads = nn.ModuleDict()
        sizes = {"ld": (seen, width), "ac": (seen, 3), "hamiltonian": (width, 1)}
        for name, (inputs, outputs) in sizes.items():
            if name in self.weights:
                # no bias of an energy: its gradient is always 0, and DDP waits for every parameter
                self.heads[name] = nn.Sequential(
                    nn.Linear(inputs, 256), nn.GELU(),
                    nn.Linear(256, outputs, bias=outputs > 1))

    def forward(self, x, keep=None, pred=None):
        """As V-JEPA's; metrics have each term, and what it adds to the loss."""
        if keep is None:
            return self.product(x)
        h = self.targets(x)
        errors, context = self.errors(x, h, keep, pred)  # [(B,M,D)]
        losses = []
        for error, seen, hidden in zip(errors, keep, pred):
            if self.args.distance:
                error = error * nearness(hidden, seen, self.grid)[..., None]
            losses.append(error.mean())
        loss, metrics = self.total(losses, context, h)
        if not self.weights:
            return loss, metrics

        grid = (self.grid[0], -1)  # t, h*w
        h = h[..., -self.encoder.width :]  # of the last level
        z = None
        if self.full_pass:  # one more pass, shared by all terms
            z = self.encoder(x).float()
            z = F.layer_norm(z, z.shape[-1:]).unflatten(1, grid)
        # an image has no time to compare, but other ranks wait for its blocks and heads
        still = self.grid[0] == 1
        idle = 0 * sum(p.sum() for p in self.heads.parameters())
        idle = idle + 0 * (loss if z is None else z.sum())
        errors = [error.mean(-1) for error in errors]  # [(B,M)]
        s = Step(z, h.unflatten(1, grid), x, errors, self)
        for name, weight in self.weights.items():
            if self.args.anneal and name.startswith("kin_"):
                weight = weight * cosine(self.step, self.args.steps, 1.0, 0.0)
            term = idle if still and name != "hw" else TERMS[name](s)
            loss = loss + weight * term
            metrics |= {name: term.detach(), f"{name}_weighted": weight * term.detach()}
        if "hw" in self.weights:
            # of a clip's tokens, in effect: at 1 hw only multiplies the base loss
            metrics["hw_share"] = 1 / hardness(errors[0], self.args).square().mean()
        return loss, metrics

    def dynamics(self, z):
        """What the heads of ld and ac see: with static or orth on, the second half."""
        return z.chunk(2, -1)[1] if self.factorised else z

    def place(self, keep, pred, x, step, row):
        """Motion-guided: blocks lie where the clips move."""
        keep, pred = super().place(keep, pred, x, step, row)
        if not self.args.motion or self.grid[0] == 1:
            return keep, pred
        motion = motion_map(x, self.args.tubelet, self.args.patch)
        return guide_masks(keep, pred, motion, self.args, step, row)

    def flops(self, keep, pred):
        """V-JEPA's, and the encoder's full pass; the heads, under a hundredth, do not count."""
        full = self.target.flops(math.prod(self.grid))
        return super().flops(keep, pred) + (3 * full if self.full_pass else 0)


def motion_map(x, tubelet, patch):
    """x (B,3,T,H,W) -> (B,t,h,w) in [0,1]: each token's mean |frame(t+1) - frame(t)|, as a share of
    the clip's largest; 0 in a still clip."""
    change = x.diff(dim=2).abs().mean(1, keepdim=True)
    change = torch.cat([change, change[:, :, -1:]], 2)  # the last frame has no next one
    change = F.avg_pool3d(change, (tubelet, patch, patch))[:, 0]
    return change / change.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)


def motion_centres(rng, motion, count, strength, uniform):
    """`count` token ids of a clip with this motion (t,h,w): P(id) ~ exp(strength * motion), or,
    with probability `uniform`, the same for all."""
    p = np.exp(strength * (motion.ravel() - motion.max()))
    p = (1 - uniform) * p / p.sum() + uniform / p.size
    return rng.choice(p.size, count, p=p)


def guide_masks(keep, pred, motion, args, step, first):
    """Masks as VJEPA.masks draws them, moved to where these clips move: as many tokens of each kind
    and blocks of the same shape, but around motion_centres.

    motion (b,t,h,w). `first` is the global number of the first row: a clip's masks depend on it and
    on the clip, not on rank or micro-batch. keep and pred are disjoint; where the blocks hide too
    little, visible tokens are predicted too.
    """
    clips = motion.double().cpu().numpy()
    guided = ([], [])
    for i, mask in enumerate(args.masks):
        _, arguments = data.parse_mask(mask)
        blocks = arguments.pop("blocks")
        # sample_masks' own stream, whose first draw this is: the shape that its masks have too
        rng = np.random.default_rng([args.seed, step, i])
        shape = data.block_shape(rng, clips.shape[1:], **arguments, aspect=args.aspect)
        K = keep[i].shape[1]
        orders = []
        for row, clip in enumerate(clips, first):
            # 2: a stream beside that of sample_masks' trimming, 1
            rng = np.random.default_rng([args.seed, step, i, 2, row])
            orders.append(hiding_order(rng, clip, blocks, shape, K, args))
        order = np.stack(orders)  # (b,N): context first, hidden last
        for side, ids in zip(guided, (order[:, :K], order[:, -pred[i].shape[1] :])):
            side.append(torch.from_numpy(np.sort(ids, axis=1)).to(motion.device))
    return guided


def hiding_order(rng, motion, blocks, shape, least, args):
    """The token ids (N,) of one clip (t,h,w): group 0 visible, 1 in a block, 2 in a slice that
    --temporal_keep bars from the context; at random within each. Blocks that leave fewer than
    `least` visible are drawn again; after 50 draws, hidden tokens fill up the context."""
    grid = motion.shape
    for _ in range(50):
        group = np.zeros(grid)
        ids = motion_centres(rng, motion, blocks, args.motion, args.motion_uniform)
        for centre in zip(*np.unravel_index(ids, grid)):
            block = []
            for middle, side, length in zip(centre, shape, grid):  # slides in at the frame's edge
                start = min(max(middle - side // 2, 0), length - side)
                block.append(slice(start, start + side))
            group[tuple(block)] = 1
        group = group.ravel()
        group[data.early_tokens(grid, args.temporal_keep):] = 2
        if np.count_nonzero(group == 0) >= least:
            break
    return np.argsort(group + rng.random(group.size))


# --- the run --------------------------------------------------------------------------------------

def build(args):
    """The objective that these flags ask for."""
    return FWM(args) if asks_for_fwm(args) else VJEPA(args)


def main(args):
    sketch = construct(build, dataclasses.replace(args, dry_run=True))
    parts = [(1.0, sketch)]
    if args.stills and (args.flops or not args.dry_run):
        lists = [data.parse_list(spec, look=False) for spec in args.data]
        images = data.kinds_of(lists)[1]
        if not (images or args.init or args.resume):
            raise UserError("--stills: no list of --data is of images alone")
        parts = [(1 - images, sketch), (images, sketch.of_images())]
    args = budgeted(args, *parts)
    run = Run(args)
    if args.init_optimizer and not (os.path.isdir(args.init) or args.dry_run):
        raise UserError("--init_optimizer goes on from a run: give its folder as --init, or say "
                        "--no-init_optimizer")
    run.fit(sketch, *parts)
    if args.dry_run:
        return dry_run(run, sketch)
    objective = construct(build, args)
    sources = run.sources()
    run.continue_from(objective)
    run.open(__file__, sources)

    net = run.wrap(objective)  # what is called, trained and saved
    optimizer = adamw(objective, args)
    meter = Meter(run, run.load(net, optimizer))
    if run.done == 0 and args.init_optimizer:
        run.carry_optimizer(net, optimizer)
    if run.done == 0 and not args.init:  # before learning: what it has to beat
        meter.state["random_acc"] = run.accuracy(net)
    loader = run.loader(sources, objective.masks, objective.image_masks)

    for step in run.steps():
        # 1. the rates of this step
        rates = objective.schedules(step)
        set_rates(optimizer, rates)

        # 2. forward and backward, a micro-batch at a time
        for row in run.passes(net):
            batch = meter.next(loader)
            x = data.prepare(batch, run.device)  # (b,3,T,H,W)
            keep, pred = objective.place(*batch["masks"], x, step, row)
            with run.autocast():
                loss, metrics = net(x, keep, pred)  # [(b,K)], [(b,M)]
            (loss * (run.micro / run.per_rank)).backward()
            tokens = metrics.pop("tokens")  # (n,D) of the targets, for run.health()
            meter.add(loss, metrics, batch, flops=objective.flops(keep, pred))

        # 3. the step; where a loss or gradient is not finite, all ranks skip it alike
        grad_norm = clip_gradients(objective, args.clip_grad)
        skip = meter.skip(step, grad_norm)  # 1.0 or 0.0, on the device
        optimizer.found_inf = skip
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step, skip)
        meter.after_step()

        # 4. log, pictures, checkpoint, probe
        if meter.logs():
            run.log(meter.line(rates, run.health(tokens)))
        if run.due(args.sample_every):
            run.mask_picture(net, x, keep, objective.grid)
        if meter.saves(net, x, keep, pred):
            run.export(objective)
            run.save(net, optimizer, meter.state)
        if run.stop:
            break
        if run.probes():
            run.accuracy(net)

    probe_acc = run.accuracy(net) if run.done == args.steps else None
    run.finish(meter.summary(probe_acc))


if __name__ == "__main__":
    launch(main, ARGS)
