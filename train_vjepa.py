"""V-JEPA: predict hidden regions of a video in the latent space of a slow copy of the encoder.
Bardes et al. 2024, "Revisiting Feature Prediction for Learning Visual Representations from Video".

    z    = E(x[keep])                          (B,3,T,H,W) -> (B,K,D)     the context: ~10 % of the tokens, once per mask
    zhat = P(z, mask tokens at pred)           -> (B,M,D)                 a narrow predictor that knows where, not what
    h    = LN(Ebar(x))[pred]                   -> (B,M,D)                 targets: the full clip, once for all masks, no gradient
    L    = mean over masks of mean |zhat - h|;    Ebar <- m Ebar + (1 - m) E   after every optimizer step
    L   += sum of weight * term(LN(E(x)), LN(Ebar(x)), x)     auxiliary objectives, all off by default (Adhikari 2026, FWM-HW-LD): --ld 1.0, see TERMS

    Laptop, two cores, five minutes, no download:      python train_vjepa.py --preset laptop
    Eight GPUs, the paper's ViT-L/16 recipe:           torchrun --nproc-per-node 8 train_vjepa.py --data k710.csv:0.335 ssv2.csv:0.1 howto.csv:0.565
    V-JEPA 2's recipe (rope, 256 px, constant rates):  torchrun --nproc-per-node 8 train_vjepa.py --preset vjepa2 --data ...
    A row of FWM-HW-LD's tables, four GPUs:            torchrun --nproc-per-node 4 train_vjepa.py --preset fwm_hw_ld

The laptop run ends with a linear probe on eight camera motions; README.md states what to expect and what to watch.
"""
import copy
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """The defaults are the paper's ViT-L/16 recipe (Table 5 and Appendix A), whatever their field says otherwise."""
    # data
    data: tuple[str, ...] = ()             # lists of `path label` lines, each `file[:weight]`; `world` is the built-in world
    probe_data: tuple[str, ...] = ()       # online probe: a train list and a val list with labels (`world world`: the world's); empty: none
    frames: int = 16                       # frames per clip
    stride: int = 4                        # video frames between two frames of a clip
    fps: float = 0.0                       # > 0: sample by time stamp at this rate instead of --stride
    size: int = 224                        # pixels, after the crop
    crop_scale: tuple[float, float] = (0.3, 1.0)     # area of the random resized crop (one box for all frames of a clip)
    crop_ratio: tuple[float, float] = (0.75, 1.35)   # its aspect ratio (the paper's table rounds to 1.33)
    flip: bool = True                      # horizontal flip of half of the clips
    clips_per_video: int = 1               # clips taken from each opened video: > 1 when decoding is the bottleneck
    workers: int = 8                       # loader processes per rank
    timeout: int = 600                     # seconds without a batch from a loader process that end the run
    max_bad_fraction: float = 0.1          # stop when more than this share of the opened videos (of 100 at least) cannot be read
    # architecture
    model: str = "vit_l"                   # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 16                        # pixels
    tubelet: int = 2                       # frames
    pos: Literal["sincos", "rope"] = "sincos"
    pred_depth: int = 12                   # blocks of the predictor
    pred_width: int = 384
    pred_heads: int = 0                    # 0: as many as the encoder
    mask_tokens: int = 0                   # learned mask tokens; 0: one for each entry of --masks
    init_std: float = 0.02                 # of the random weights; 0.02 suits widths near 1000, narrow models want more
    highpass: float = 0.0                  # > 0: each patch loses its mean over the tubelet and is multiplied by this: nothing static is seen (not in the paper)
    init: str = ""                         # start from a run's folder (all its weights), or encoder and target from any file model.load_encoder reads
    masks: tuple[str, ...] = ("8x0.15", "2x0.7")     # BLOCKSxSCALE[xTIME]: a union of blocks over TIME of the clip (1: all of it); random:R tube:R causal:R hide the share R
    aspect: tuple[float, float] = (0.75, 1.5)        # of a block
    trim: Literal["random", "prefix"] = "random"     # how ids are cut to the batch minimum; prefix is the official code's way
    bucket: int = 1                        # > 1: token counts are multiples of it, so that fewer shapes reach the kernels
    # auxiliary objectives: weights of the terms, 0 is off (Adhikari 2026 = FWM-HW-LD, which ROWS quotes; formulas: TERMS)
    hw: float = 0.0                        # the base loss once more, hard tokens weighted up; while it is on, ld's error is weighted alike
    tau: float = 1.0                       # temperature of these weights: softmax(error / tau)
    static: float = 0.0                    # the first half of the channels (appearance) stays as it is from slice to slice
    orth: float = 0.0                      # its covariance with the second half (dynamics)
    ld: float = 0.0                        # a head predicts the target's change; with static or orth on, from the dynamics half alone, as ac
    kin_l1: float = 0.0                    # the change from slice to slice is small
    kin_huber: float = 0.0                 # the same by Huber's loss
    kin_accel: float = 0.0                 # the change of the change is small
    kin_split: float = 0.0                 # the same on the first half of the channels
    anneal: bool = False                   # weights of the kin_ terms fall to 0 by a cosine over the run
    velgate: float = 0.0                   # kin_l1 on the half of a clip's tokens whose target changes least
    sigreg: float = 0.0                    # tokens are normal along random directions (LeJEPA)
    hamiltonian: float = 0.0               # the halves of the channels move as Hamilton's equations say, by a learned energy
    delta: float = 0.0                     # the change equals the target's
    spectral: float = 0.0                  # so does the spectrum over time, high frequencies weighted up
    ltc: float = 0.0                       # closer to the target of the same slice than to the next slice's, by a margin of 0.5
    ac: float = 0.0                        # a head predicts the change of each patch's mean colour
    distance: bool = False                 # weight of a predicted token in the base loss: 1/sqrt of its distance to the context, in tokens
    motion: float = 0.0                    # > 0: blocks of the masks lie around centres drawn by exp(this * motion), motion in [0,1]
    motion_uniform: float = 0.1            # share of the centres that are drawn without looking at motion
    temporal_keep: float = 1.0             # < 1: the context lies in this first share of the slices, all else is predicted
    # optimization
    steps: int = 90_000
    batch_size: int = 3072                 # clips per step over all ranks, whatever their number
    micro_batch: int = 0                   # clips per forward pass on a rank; 0: all at once, else gradients are accumulated
    lr: float = 6.25e-4
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup: int = 12_000                   # steps
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4        # linear (the official code: cosine)
    ema: float = 0.998
    final_ema: float = 1.0                 # linear
    stretch: float = 1.25                  # schedules are computed for stretch * steps and cut at steps
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 10.0                # global norm; 0: off (the paper is silent, 10 is the official config's)
    max_skips: int = 10                    # stop after so many steps in a row with a loss or gradient that is not finite
    # the run
    preset: str = ""                       # vjepa2, vjepa2_cooldown, laptop, laptop_video, fwm_paper, fwm_ucf or a row of ROWS: values that become the defaults of all flags
    out_dir: str = "out/vjepa"
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    fsdp: bool = False                     # shard parameters, gradients and optimizer state over the ranks (FSDP2)
    checkpoint: bool = False               # recompute activations in the backward pass
    resume: bool = False                   # continue the run in out_dir from its newest checkpoint, or start it
    stop_at: int = 0                       # > 0: save and leave at this step; schedules still run to --steps
    save_every: int = 1000                 # steps; also at the end and on SIGTERM, SIGUSR1 and the first SIGINT
    keep: int = 2                          # newest checkpoints that stay
    log_every: int = 10
    probe_every: int = 0                   # steps; 0: only at the start and at the end
    sample_every: int = 5000               # steps between pictures of the masks and of the features; 0: none
    wandb: str = ""                        # project name: log there as well
    dry_run: bool = False                  # print parameters, FLOPs, memory and days, touch no data


PRESETS = {
    "vjepa2": dict(pos="rope", size=256, fps=4.0, pred_heads=12, mask_tokens=1, lr=5.25e-4, start_lr=1e-4, final_lr=5.25e-4,
                   final_weight_decay=0.04, ema=0.99925, final_ema=0.99925, clip_grad=0.0, out_dir="out/vjepa2"),
    "vjepa2_cooldown": dict(pos="rope", size=256, fps=4.0, frames=64, pred_heads=12, mask_tokens=1, steps=12_000, lr=5.25e-4, start_lr=5.25e-4,
                            warmup=0, stretch=1.0, final_weight_decay=0.04, ema=0.99925, final_ema=0.99925, clip_grad=0.0, out_dir="out/vjepa2_cooldown"),
    "laptop": dict(data=("world",), probe_data=("world", "world"), model="vit_n", frames=8, size=32, patch=8, pos="rope", init_std=0.04, pred_depth=2,
                   pred_width=64, pred_heads=4, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, masks=("4x0.3x0.5", "2x0.7x0.5"),
                   steps=2000, batch_size=16, lr=1e-3, start_lr=1e-4, warmup=60, final_weight_decay=0.04, ema=0.99, final_ema=0.99, stretch=1.0,
                   dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop"),
}
PRESETS["laptop_video"] = PRESETS["laptop"] | dict(     # real video of a still camera: what never moves is hidden, or it is all that is learned (README)
    data=(), probe_data=(), frames=16, stride=3, size=48, highpass=4.0, crop_scale=(0.3, 0.5), crop_ratio=(0.75, 1.35), steps=3000, out_dir="out/laptop_video")
PRESETS["fwm_paper"] = dict(                            # FWM-HW-LD, Table 1: the baseline of Table 4, and of Table 3 with other data
    data=("ucf101.csv:0.2", "ssv2.csv:0.6", "imagenet100.csv:0.2"), model="vit_b", stride=2, pos="rope", pred_depth=8, pred_width=256, pred_heads=8,
    distance=True, steps=30_000, batch_size=32, lr=6e-4, start_lr=1e-4, warmup=300, final_weight_decay=0.04, ema=0.99925, final_ema=0.99925, stretch=1.0,
    out_dir="out/fwm_paper")
PRESETS["fwm_ucf"] = PRESETS["fwm_paper"] | dict(data=("ucf101.csv",), out_dir="out/fwm_ucf")

NO_EMA = dict(ema=0.0, final_ema=0.0)                   # the target is the encoder itself, without gradient
FWM, AMG = dict(static=0.05, orth=0.01), dict(motion=5.0, motion_uniform=0.0)
ROWS = {                                                # what a row adds to its baseline: the rows of Table 3 to fwm_ucf, those of Table 4 to fwm_paper
    "fwm_ucf": {
        "motion_guided": dict(motion=2.0), "kin_l1": dict(kin_l1=1.0) | NO_EMA, "kin_l1_weak": dict(kin_l1=0.1) | NO_EMA,
        "kin_accel": dict(kin_accel=0.1) | NO_EMA, "kin_huber": dict(kin_huber=0.1) | NO_EMA, "kin_split": dict(kin_split=0.1) | NO_EMA,
        "kin_anneal": dict(kin_l1=0.1, anneal=True) | NO_EMA, "velgate": dict(velgate=0.1), "hamiltonian": dict(hamiltonian=0.1),
        "sigreg": dict(sigreg=1.0), "sigreg_no_ema": dict(sigreg=1.0) | NO_EMA, "future_predictive": dict(temporal_keep=0.5),
        "motion_future": dict(temporal_keep=0.5, motion=2.0)},
    "fwm_paper": {
        "fwm_hw_ld": FWM | dict(hw=1.0, ld=1.0), "ld": dict(ld=1.0), "fwm": FWM, "ac_hw": dict(ac=1.0, hw=0.3), "amg": AMG, "hw": dict(hw=0.3),
        "hw_ld": dict(hw=1.0, ld=1.0), "fwm_ld": FWM | dict(ld=1.0), "combo": AMG | dict(delta=0.5, hw=0.3), "delta": dict(delta=0.5), "ac": dict(ac=1.0),
        "fac": FWM | dict(ac=1.0), "ltc": dict(ltc=0.5), "spectral": dict(spectral=1.0)},
}
PRESETS |= {name: PRESETS[base] | row | {"out_dir": f"out/{name}"} for base, rows in ROWS.items() for name, row in rows.items()}


def parse_args(argv=None):
    """Flags over the preset over the paper. One line and status 2 for anything that cannot be run."""
    argv = sys.argv[1:] if argv is None else argv
    names = [b if a == "--preset" else a[9:] for a, b in zip(argv, argv[1:] + [""]) if a == "--preset" or a.startswith("--preset=")]
    if names and names[-1] not in PRESETS:
        sys.exit(print(f"error: --preset {names[-1]}: choose from {', '.join(PRESETS)}", file=sys.stderr) or 2)
    preset = Args(preset=names[-1], **PRESETS[names[-1]]) if names else Args()
    return tyro.cli(Args, args=argv, default=preset, description=__doc__, console_outputs=os.environ.get("RANK", "0") == "0")


ARGS = parse_args() if __name__ == "__main__" else None     # before torch is imported, so that --help is instant

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as dcs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
import model as M


# --- terms --------------------------------------------------------------------------------------------------------------------------------
# A term is a function of z (B,t,hw,D), what the encoder makes of the full clip, h (B,t,hw,D), what the target makes of it (both layer-normed, h without
# gradient), x (B,3,T,H,W) the clip, errors [(B,M)] the base loss's error at each predicted token (before --distance), an entry a mask, and o, the
# objective: its flags and heads. It gives a number, which is added to the loss times the flag of the same name. Slice s of a clip is z[:, s]; app and
# dyn are the halves of the channels.

def hard(e, tau):
    """e (B,n) errors of n tokens -> their mean, weighted within each clip by softmax(e / tau) * n, which passes no gradient (Eqs. 9 to 11)."""
    return ((e.detach() / tau).clamp(-20, 20).softmax(1) * e.shape[1] * e).mean()                      # clamped as in the paper's appendix D


def hw(z, h, x, errors, o):
    return sum(hard(e, o.args.tau) for e in errors) / len(errors)


def static(z, h, x, errors, o):
    app, _ = z.chunk(2, -1)
    return app.diff(dim=1).abs().mean()


def orth(z, h, x, errors, o):
    app, dyn = (c - c.mean(0) for c in z.flatten(0, 2).chunk(2, -1))                    # (n, D/2), of all tokens of the batch
    with torch.autocast(z.device.type, enabled=False):                                  # a sum of many small products of either sign
        return (app.T @ dyn).square().sum() / len(app)


def ld(z, h, x, errors, o):
    e = (o.heads["ld"](o.dynamics(z[:, :-1])) - h.diff(dim=1)).abs().mean(-1).flatten(1)
    return hard(e, o.args.tau) if o.args.hw else e.mean()


def kin_l1(z, h, x, errors, o):
    return z.diff(dim=1).abs().mean()


def kin_huber(z, h, x, errors, o):
    return F.huber_loss(z[:, 1:], z[:, :-1])                                            # quadratic up to 1


def kin_accel(z, h, x, errors, o):
    return z.diff(n=2, dim=1).abs().mean()


def kin_split(z, h, x, errors, o):
    return kin_accel(z.chunk(2, -1)[0], h, x, errors, o)


def velgate(z, h, x, errors, o):
    speed = h.diff(dim=1).abs().mean(-1).flatten(1)                                     # (B, (t-1)*hw)
    slow = speed <= speed.median(1, keepdim=True).values
    return z.diff(dim=1).abs().mean(-1).flatten(1)[slow].mean()


def sigreg(z, h, x, errors, o, directions=64):
    """Epps and Pulley's statistic (LeJEPA): the squared distance between the characteristic function of the tokens along a direction and that of
    N(0,1), exp(-s^2/2), integrated over |s| <= 3 with exp(-s^2/2) as weight, a mean over directions. Not times the number of tokens."""
    seed = torch.Generator().manual_seed(o.args.seed * 1_000_003 + o.step)              # the same directions on all ranks, others at every step
    axes = F.normalize(torch.randn(z.shape[-1], directions, generator=seed), dim=0).to(z.device)
    with torch.autocast(z.device.type, enabled=False):
        along, knots = z.flatten(0, 2) @ axes, torch.linspace(-3, 3, 17, device=z.device)                                           # (n, directions)
        far = [((along * s).cos().mean(0) - (-s * s / 2).exp()).square() + (along * s).sin().mean(0).square() for s in knots]
        return torch.trapezoid(torch.stack(far) * (-knots * knots / 2).exp()[:, None], knots, dim=0).mean()


def hamiltonian(z, h, x, errors, o):
    now = z[:, :-1]                                                                     # its halves are positions q and momenta p
    dq, dp = torch.autograd.grad(o.heads["hamiltonian"](now).sum(), now, create_graph=True)[0].chunk(2, -1)
    return (z.diff(dim=1) - torch.cat([dp, -dq], -1)).abs().mean()


def delta(z, h, x, errors, o):
    return (z.diff(dim=1) - h.diff(dim=1)).abs().mean()


def spectral(z, h, x, errors, o):
    apart = torch.view_as_real(torch.fft.rfft(z - h, dim=1, norm="ortho")).abs()        # (B, t//2+1, hw, D, 2)
    weight = torch.arange(1, apart.shape[1] + 1, device=z.device)
    return (apart * (weight / weight.float().mean()).view(1, -1, 1, 1, 1)).mean()


def ltc(z, h, x, errors, o, margin=0.5):
    near, far = F.cosine_similarity(z[:, :-1], h[:, :-1], dim=-1), F.cosine_similarity(z[:, :-1], h[:, 1:], dim=-1)
    return (margin - near + far).clamp_min(0).mean()


def ac(z, h, x, errors, o):
    colour = F.avg_pool3d(x, (o.args.tubelet, o.args.patch, o.args.patch)).flatten(3).permute(0, 2, 3, 1)                               # (B,t,hw,3)
    return (o.heads["ac"](o.dynamics(z[:, :-1])) - colour.diff(dim=1)).abs().mean()


TERMS = {f.__name__: f for f in (hw, static, orth, ld, kin_l1, kin_huber, kin_accel, kin_split, velgate, sigreg, hamiltonian, delta, spectral, ltc, ac)}
# --- end of the terms ---------------------------------------------------------------------------------------------------------------------


class VJEPA(nn.Module):
    """The whole method: encoder, predictor, target encoder, loss and EMA (section 3)."""

    def __init__(self, args):
        super().__init__()
        self.args, shape = args, M.SIZES[args.model] | dict(patch=args.patch, tubelet=args.tubelet, pos=args.pos, highpass=args.highpass)
        if args.init:
            given, shape = M.load_start(args.init, shape)
        self.encoder = M.ViT(**shape, frames=args.frames, size=args.size, init_std=args.init_std, checkpoint=args.checkpoint)
        self.predictor = M.Predictor(in_width=shape["width"], out_width=shape["width"], width=args.pred_width, depth=args.pred_depth,
                                     heads=args.pred_heads or shape["heads"], grid=self.encoder.grid, pos=args.pos, rope_quirk=self.encoder.rope_quirk,
                                     mask_tokens=args.mask_tokens or len(args.masks), init_std=args.init_std, checkpoint=args.checkpoint)
        if args.init:
            self.encoder.load_state_dict(given.state_dict())
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.terms, self.step = [name for name in TERMS if getattr(args, name)], 0      # the step is set by the loop: weights may depend on it
        self.full_pass = self.terms not in ([], ["hw"])         # all but hw read what the encoder makes of the full clip
        self.factorised = bool(args.static or args.orth)
        width, seen = shape["width"], shape["width"] // 2 if self.factorised else shape["width"]
        sizes = {"ld": (seen, width), "ac": (seen, 3), "hamiltonian": (width, 1)}
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(i, 256), nn.GELU(), nn.Linear(256, o, bias=o > 1))      # an energy has no zero
                                    for name, (i, o) in sizes.items() if name in self.terms})       # last: nothing else is drawn differently

    def forward(self, x, keep=None, pred=None):
        """x (B,3,T,H,W); keep, pred: lists, one entry a mask, of ids (B,K) and (B,M) -> loss, metrics.
        Without masks: the target encoder's tokens (B,N,D), what probes and pictures use (FSDP gathers the
        root's parameters only inside this forward, so everything enters through here)."""
        if keep is None:
            return self.target(x)
        with torch.no_grad():                                   # stop-gradient: the argument of Appendix D rests on it
            h = self.target(x)
            h = F.layer_norm(h.float(), h.shape[-1:])           # (B,N,D)
        zhat = self.predictor(self.encoder(x, keep), keep, pred)                         # [(B,M,D)]
        apart = [(p - h.gather(1, ids[..., None].expand(-1, -1, h.shape[-1]))).abs() for p, ids in zip(zhat, pred)]     # [(B,M,D)]
        losses = [(e * self.nearness(k, m)[..., None] if self.args.distance else e).mean() for e, k, m in zip(apart, keep, pred)]
        loss, metrics = sum(losses) / len(losses), {f"loss_{spec}": part.detach() for spec, part in zip(self.args.masks, losses)}
        if self.terms:
            slices = lambda v: v.unflatten(1, (self.encoder.grid[0], -1))               # (B,N,D) -> (B,t,hw,D)
            z = slices(F.layer_norm(self.encoder(x).float(), h.shape[-1:])) if self.full_pass else None
            inputs = z, slices(h), x, [e.mean(-1) for e in apart], self
            for name, weight in self.weights(self.step).items():
                term = TERMS[name](*inputs)
                loss, metrics = loss + weight * term, metrics | {name: term.detach(), f"{name}_weighted": weight * term.detach()}
        tokens = h.flatten(0, 1)
        return loss, metrics | {"tokens": tokens[:: max(1, len(tokens) // 2048)]}

    def nearness(self, keep, pred):
        """1/sqrt of the distance, in tokens, from each predicted token to the nearest of the context (B,M)."""
        t, h, w = self.encoder.grid
        place = lambda ids: torch.stack([ids // (h * w), ids // w % h, ids % w], -1).float()                            # (B,n,3)
        return torch.cdist(place(pred), place(keep), compute_mode="donot_use_mm_for_euclid_dist").amin(-1).rsqrt()

    def dynamics(self, z):
        """The channels that the heads of ld and ac see: with static or orth on, the second half."""
        return z.chunk(2, -1)[1] if self.factorised else z

    def weights(self, step):
        """Of the terms that are on."""
        fall = cosine(step, self.args.steps, 1.0, 0.0) if self.args.anneal else 1.0
        return {name: getattr(self.args, name) * (fall if name.startswith("kin_") else 1.0) for name in self.terms}

    @torch.no_grad()
    def after_step(self, step):
        """The target follows the encoder, once per optimizer step that was taken."""
        M.ema_update(list(self.target.parameters()), list(self.encoder.parameters()), self.schedules(step)["ema"])

    def schedules(self, step):
        """Functions of the step alone; all of them are stretched (Appendix A), but not the weights of the terms."""
        a, end = self.args, self.args.stretch * self.args.steps
        lr = a.start_lr + (a.lr - a.start_lr) * step / a.warmup if step < a.warmup else cosine(step - a.warmup, end - a.warmup, a.lr, a.final_lr)
        linear = lambda first, last: first + (last - first) * min(1.0, step / end)
        return {"lr": lr, "weight_decay": linear(a.weight_decay, a.final_weight_decay), "ema": linear(a.ema, a.final_ema)}

    def flops(self, keep, pred):
        """Forward and backward FLOPs of one clip (the backward pass costs two forwards; the target has none; the heads, under a hundredth, do not count)."""
        k, m = [i.shape[1] for i in keep], [i.shape[1] for i in pred]
        full = self.target.flops(math.prod(self.target.grid))
        return full + 3 * (self.encoder.flops(*k) + self.predictor.flops(*zip(k, m)) + self.full_pass * full)


# --- runtime (identical in every script; python tests/test_runtime.py --fix re-copies it) ---
def fail(message, status=2):
    """One clear line. Status 2: what the user must mend; 1: what broke on the way."""
    sys.exit(print(f"error: {message}", file=sys.stderr, flush=True) or status)


def launch(main, args):
    """Run main; what can be foreseen ends in one line, all else in a traceback."""
    try:
        main(args)
    except D.DataError as e:
        fail(e)
    except (RuntimeError, ConnectionError) as e:
        if not (why := D.dead_worker(e)):
            raise
        fail(why, 1)
    except (OSError, dcp.api.CheckpointException) as e:         # a full disk, say
        why = next(iter(e.failures.values()))[0] if hasattr(e, "failures") else e
        while why.__context__:                                  # the first cause says it best
            why = why.__context__
        fail(f"{args.out_dir}: {' '.join(str(why).split())[:300]}; what was saved before stays valid", 1)


def cosine(step, total, first, last):
    """first at step 0, last from step `total` on."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


class Run:
    """What every script needs and no paper claims: ranks, out directory, log, signals, checkpoints, online probe."""
    FREE = {"out_dir", "resume", "stop_at", "workers", "timeout", "micro_batch", "save_every", "keep", "log_every", "probe_every", "sample_every", "compile",
            "fsdp", "checkpoint", "wandb", "max_bad_fraction", "max_skips", "dry_run", "stage", "ce_rows"}     # flags that a resumed run may change
    POSITIVE = {"steps", "batch_size", "lr", "frames", "stride", "size", "patch", "tubelet", "log_every", "save_every", "keep", "timeout", "prototypes", "ce_rows", "temp"}
    SHARES = {"ema", "final_ema", "max_bad_fraction", "betas"}
    stop = False                                                # of the process: a signal between two stages counts for the next one

    def __init__(self, args):
        self.args, self.out, self.start = args, Path(args.out_dir), time.time()
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for name, value in vars(args).items():
            for v in (value if isinstance(value, tuple) else (value,)):
                if isinstance(v, (int, float)) and not (0 <= v < math.inf and (v > 0 or name not in self.POSITIVE) and (v <= 1 - 1e-9 * (name == "betas") or name not in self.SHARES)):
                    fail(f"--{name} {v}: {'a share from 0 to 1' if name in self.SHARES else 'a positive finite number'} is needed")
        if args.batch_size % (self.ranks * max(1, args.micro_batch)):
            fail(f"--batch_size {args.batch_size} is not a multiple of {self.ranks} rank(s) x --micro_batch {args.micro_batch or 1}")
        if (args.micro_batch or args.batch_size // self.ranks) % args.clips_per_video:
            fail(f"--clips_per_video {args.clips_per_video} does not divide the {args.micro_batch or args.batch_size // self.ranks} clips of a forward pass")
        if args.wandb and not importlib.util.find_spec("wandb"):
            fail("--wandb needs: pip install wandb")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            M.tune_cpu()
        if "RANK" in os.environ and not args.dry_run and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=max(1800, args.timeout)))
        warnings.filterwarnings("ignore", "torch.distributed is disabled")          # what checkpointing says to a single process
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def open(self, data_hash):
        """Take the out directory: lock it, refuse to overwrite or to mix runs, write the first log line."""
        config, error = json.loads(json.dumps(vars(self.args) | {"data_hash": data_hash})), None
        sources = b"".join(Path(f).read_bytes() for f in (__file__, D.__file__, M.__file__))
        head = {"config": config, "argv": sys.argv, "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
                "source": hashlib.sha256(sources).hexdigest()[:16], "ranks": self.ranks, "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"}
        if self.rank == 0:
            try:
                (self.out / "samples").mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / "lock", "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (self.out / "config.json").exists():
                    old = json.loads((self.out / "config.json").read_text())["config"]
                    differ = [f"{k} ({old.get(k)} -> {v})" for k, v in config.items() if k not in self.FREE and old.get(k) != v]
                    error = (f"{self.out} was started with other settings: {', '.join(differ)}" if self.args.resume and differ else
                             None if self.args.resume else f"{self.out} holds a run: --resume continues it, another --out_dir starts afresh")
                if not error:
                    M.write(self.out / "config.json", json.dumps(head, indent=1))
                    if (log := self.out / "log.jsonl").exists() and not (text := log.read_bytes()).endswith(b"\n"):
                        M.write(log, text[: text.rfind(b"\n") + 1].decode())         # half a line: the run was killed as it wrote
            except BlockingIOError:
                error = f"{self.out} is in use by another run"
            except OSError as e:
                error = f"--out_dir {self.out}: {e.strerror}"
        if error := self.broadcast(error):
            fail(error)
        if self.rank == 0 and self.args.wandb:
            import wandb
            wandb.init(project=self.args.wandb, config=config)
        self.log(head, show=False)
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self.on_signal)

    def on_signal(self, number, frame):
        if number == signal.SIGINT and self.stop:
            os._exit(130)                                       # a second Ctrl-C waits for nothing
        Run.stop = True

    def broadcast(self, value):
        """Rank 0's value on all ranks; also a barrier."""
        box = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value):
        """The values of all ranks in a list, on all ranks."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def mean(self, *values):
        """The mean over ranks of each value, the same on all of them."""
        t = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(t)
        return (t / self.ranks).tolist()

    def log(self, line, show=True):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line, allow_nan=False) + "\n")
            if show:
                tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), file=sys.stderr)
            if show and self.args.wandb:
                sys.modules["wandb"].log(line)

    def wrap(self, module):
        """Compile, then shard or replicate. The returned module is called, the given one is saved."""
        if self.args.compile:
            M.compile_blocks(module)
        if self.args.fsdp and self.ranks > 1:
            return M.shard(module, param_dtype=torch.bfloat16 if self.args.dtype == "bf16" else None)
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if self.ranks > 1 else module

    def sync(self, module, on):
        """Gradients travel between the ranks in the last of a step's micro-batches only."""
        if self.ranks > 1:
            module.set_requires_gradient_sync(on) if self.args.fsdp else setattr(module, "require_backward_grad_sync", on)

    def save(self, step, module, optimizer, extra):
        """All into a temporary directory, hashed and flushed, renamed, then the pointer: a kill at any moment leaves the last good one."""
        final, temp = self.out / f"step_{step:08d}", self.out / "saving"
        if self.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
        self.broadcast(None)
        dcp.save({"model": dcs.get_model_state_dict(module), "optimizer": dcs.get_optimizer_state_dict(module, optimizer)}, checkpoint_id=temp)
        if self.rank == 0:
            (temp / "extra.json").write_text(json.dumps({"step": step, **extra}))
            M.seal(temp, final, self.args.keep)
        self.broadcast(None)

    def shapes(self, checkpoint):
        """{name: shape} of the tensors in a checkpoint."""
        return {name: getattr(v, "size", None) for name, v in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()}

    def check_start(self, objective, folder):
        """--init RUN, before anything is written: has its checkpoint all of the objective, in these shapes? Heads that are new stay as they are."""
        error, found = None, M.newest(folder) if self.rank == 0 else None
        if isinstance(found, Path):
            there = self.shapes(found)
            differ = [f"{name} {tuple(v.shape)} (there {tuple(there[f'model.{name}']) if f'model.{name}' in there else 'none'})" for name, v in objective.state_dict().items()
                      if there.get(f"model.{name}") != v.shape and (f"model.{name}" in there or not name.startswith("heads."))]
            error = f"--init {folder}: that run had other flags: {', '.join(differ[:3])}" if differ else None
        if error := self.broadcast(error):
            fail(error)

    def load(self, module, optimizer=None, folder=None):
        """The checkpoint that `latest` names, or the newest before it whose hashes agree -> its extras; {} where there is none.
        Without an optimizer only the weights: the start from another run's folder."""
        found = self.broadcast(M.newest(folder or self.out) if self.rank == 0 else None)
        if isinstance(found, str):
            fail(found)
        if not found:
            return {}
        state = {"model": dcs.get_model_state_dict(module)} | ({"optimizer": dcs.get_optimizer_state_dict(module, optimizer)} if optimizer else {})
        if folder:
            there = self.shapes(found)
            state["model"] = {name: v for name, v in state["model"].items() if f"model.{name}" in there}
        dcp.load(state, checkpoint_id=found)
        dcs.set_model_state_dict(module, state["model"], options=dcs.StateDictOptions(strict=not folder))
        if optimizer:
            dcs.set_optimizer_state_dict(module, optimizer, state["optimizer"])
        return json.loads((found / "extra.json").read_text())

    def export(self, encoder, **config):
        """encoder.safetensors, for probes and for sharing; all ranks take part."""
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in encoder.state_dict().items()}
        if self.rank == 0:
            M.save_encoder(self.out / "encoder.safetensors", state, encoder.config | config)
        self.broadcast(None)                                    # whoever reads it next, on any rank, finds it

    @torch.no_grad()
    def probe(self, features, train, val, clip, heads=None, **pixels):
        """{name: accuracy on the source `val`} of probes of features(x) -> (B,D), fitted on the source `train`; all ranks take part. heads: {name: function
        of x, y, xv -> classes of xv}; a linear one if it is not said. pixels: mean and std of what the encoder was trained on, else ImageNet's."""
        (x, y, ok), (xv, yv, okv) = (D.labelled_features(features, source, clip, self.device, workers=self.args.workers, rank=self.rank, ranks=self.ranks,
                                                         gather=self.gather, timeout=self.args.timeout, **pixels) for source in (train, val))
        heads = heads or {"probe_acc": M.linear_probe}
        return {name: ((head(x[ok], y[ok], xv) == yv) & okv).double().mean().item() for name, head in heads.items()}     # an unreadable video counts as wrong
# --- end runtime ---


def picture(path, x, keep, tokens, grid, mean, std):
    """One clip, a frame per token slice: the clip, what each mask leaves of it, and the first three principal components of the target's features."""
    frames = x.permute(1, 2, 3, 0).float().cpu() * torch.tensor(std) + torch.tensor(mean)                       # (T,H,W,3)
    frames = frames[:: len(frames) // grid[0]]                                                                  # (t,H,W,3)
    grow = lambda v: v.view(*grid, -1).repeat_interleave(frames.shape[1] // grid[1], 1).repeat_interleave(frames.shape[2] // grid[2], 2)
    shown = [grow(torch.zeros(math.prod(grid)).index_fill(0, ids.cpu(), 1.0)) for ids in keep]
    tokens = tokens.float().cpu() - tokens.float().cpu().mean(0)
    pca = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    pca = (pca - pca.amin(0)) / (pca.amax(0) - pca.amin(0)).clamp_min(1e-6)
    rows = [frames, *(frames * s + 0.5 * (1 - s) for s in shown), grow(pca)]
    image, zoom = torch.cat([torch.cat(list(r), 1) for r in rows]), max(1, 112 // frames.shape[1])
    D.save_png(path, image.clamp(0, 1).mul(255).byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())


def dry_run(args, run, objective, samples):
    """Sizes from the meta device -> two lines, the last one JSON. Memory is a bound for one GPU: fp32 weights, gradients and Adam, the target, and activations
    of about 16 values a token, block and channel (two bytes each in bf16; --checkpoint keeps one)."""
    per_rank = args.micro_batch or args.batch_size // run.ranks
    flops = sum(objective.flops(*s) for s in samples) / len(samples) * args.batch_size
    k, m = ([sum(i.shape[1] for i in s[j]) for s in samples] for j in (0, 1))
    count = lambda module: sum(p.numel() for p in module.parameters())
    size, trained = M.SIZES[args.model], count(objective) - count(objective.target)
    encoded = max(k) + objective.full_pass * math.prod(objective.encoder.grid)
    token_values = (encoded * size["width"] * size["depth"] + (max(k) + max(m)) * args.pred_width * args.pred_depth) * (1 if args.checkpoint else 16)
    shards = run.ranks if args.fsdp else 1
    memory = (trained * 16 + count(objective.target) * 4) // shards + per_rank * token_values * (2 if args.dtype == "bf16" else 4)
    days = flops * args.steps / (run.ranks * 0.5 * 989e12) / 86400
    if run.rank == 0:
        print(f"{args.model}: {flops / args.batch_size / 1e12:.3g} TFLOP a clip; {days:.3g} days on {run.ranks} GPU(s) at 50 % of an H100's or H200's 989 bf16 TFLOP/s")
        print(json.dumps({"params": trained, "params_encoder": count(objective.encoder), "flops_per_step": flops, "flops_per_clip": flops / args.batch_size,
                          "bytes_per_gpu": memory, "gpus": run.ranks, "days": days}))


def main(args):
    run = Run(args)
    if args.model not in M.SIZES:                               # everything a user can get wrong is looked at before work starts
        fail(f"--model {args.model}: choose from {', '.join(M.SIZES)}")
    if args.mask_tokens > len(args.masks):
        fail(f"--mask_tokens {args.mask_tokens}: at most one for each of the {len(args.masks)} --masks")
    torch.manual_seed(args.seed)
    try:
        with torch.device("meta" if args.dry_run else "cpu"):
            objective = VJEPA(dataclasses.replace(args, init="") if args.dry_run else args)
    except ValueError as e:
        fail(e)
    grid = objective.encoder.grid
    if args.motion and any(":" in spec for spec in args.masks):
        fail("--motion places blocks: --masks must all be BLOCKSxSCALE[xTIME]")
    if not 0 < args.temporal_keep <= 1 or args.motion_uniform > 1 or not args.tau:
        fail("--temporal_keep must lie in (0, 1], --motion_uniform in [0, 1], and --tau be positive")
    if args.anneal and not any(name.startswith("kin_") for name in objective.terms) or args.motion and args.trim == "prefix":
        fail("--anneal is for the weights of --kin_ terms; --motion trims at random, not by --trim prefix")
    if objective.full_pass and grid[0] < 3:
        fail(f"terms compare three slices of a clip: --frames {args.frames} makes {grid[0]}")
    how = dict(aspect=args.aspect, temporal_keep=args.temporal_keep)
    samples = [D.sample_masks(args.masks, args.seed, step, min(args.batch_size, 64), grid, trim=args.trim, bucket=args.bucket, **how) for step in range(8)]
    if args.dry_run:
        return dry_run(args, run, objective, samples)
    if args.preset == "vjepa2_cooldown" and not args.init:
        fail("--preset vjepa2_cooldown goes on from a trained model: give --init RUN")
    if not args.data:
        raise D.DataError("no data: give --data LIST (see README, Data) or --preset laptop")
    if len(args.probe_data) not in (0, 2):
        raise D.DataError(f"--probe_data {' '.join(args.probe_data)}: two lists are needed, one to fit the probe and one to test it")
    clip = D.Clip(frames=args.frames, stride=args.stride, fps=args.fps or None, size=args.size, scale=args.crop_scale, ratio=args.crop_ratio,
                  flip=args.flip, clips=args.clips_per_video)
    sources = [D.parse_list(spec) for spec in args.data]
    probe = [D.parse_list(spec, split, labelled=True) for spec, split in zip(args.probe_data, ("probe", "val"))]
    if args.init and Path(args.init).is_dir():
        run.check_start(objective, args.init)
    run.open(D.fingerprint(sources))

    model = run.wrap(objective.to(run.device))
    optimizer = torch.optim.AdamW(M.param_groups(objective, args.weight_decay), lr=args.lr, betas=args.betas, fused=True)
    if args.init and Path(args.init).is_dir():
        run.load(model, folder=args.init)
    extra = {"step": 0, "random_acc": None, "bad": 0, "loss": None, "window": [], "flops": 0.0} | (run.load(model, optimizer) if args.resume else {})
    first, window = extra.pop("step"), extra["window"]

    def features(x):                                            # what the online probe reads: the target's tokens, averaged
        with run.autocast():
            return model(x).mean(1)

    def accuracy():
        return run.probe(features, *probe, dataclasses.replace(clip, train=False, clips=1))["probe_acc"] if probe else None

    if first == 0 and not args.init:
        extra["random_acc"] = accuracy()                        # the encoder as it was initialised: what learning has to beat
    per_rank, last = args.batch_size // run.ranks, min(args.steps, args.stop_at or args.steps)
    micro, rows = args.micro_batch or per_rank, slice(run.rank * per_rank, (run.rank + 1) * per_rank)
    loader = iter(D.make_loader(sources, clip, seed=args.seed, batch_size=args.batch_size, micro_batch=micro, rank=run.rank, ranks=run.ranks,
                                workers=args.workers, start_step=first, steps=last, timeout=args.timeout))
    peak = {"H200": 989e12, "H100": 989e12, "A100": 312e12}     # dense bf16 FLOP/s
    peak = next((v for k, v in peak.items() if run.device.type == "cuda" and k in torch.cuda.get_device_name()), None)
    done, skips, clips, wait, mark, since = first, 0, 0, 0.0, extra["flops"], time.perf_counter()

    for step in tqdm(range(first, last), initial=first, total=args.steps, disable=run.rank > 0 or not sys.stderr.isatty()):
        torch.manual_seed(args.seed * 1_000_003 + step)         # no random state outlives a step, so none needs saving
        now, objective.step = objective.schedules(step), step
        for g in optimizer.param_groups:
            g["lr"], g["weight_decay"] = now["lr"], now["weight_decay"] if g["decay"] else 0.0
        keep, pred = D.sample_masks(args.masks, args.seed, step, args.batch_size, grid, trim=args.trim, bucket=args.bucket, rows=rows, **how)
        seen, bad = [], 0
        for i in range(0, per_rank, micro):
            begin = time.perf_counter()
            batch = next(loader)
            wait += time.perf_counter() - begin
            x, k, m = D.prepare(batch, run.device), [ids[i : i + micro].to(run.device) for ids in keep], [ids[i : i + micro].to(run.device) for ids in pred]
            if args.motion:
                k, m = D.guide_masks(k, m, D.motion_map(x, args.tubelet, args.patch), args.masks, args.seed, step, rows.start + i,
                                     args.motion, args.motion_uniform, **how)
            run.sync(model, i + micro >= per_rank)
            with run.autocast():
                loss, metrics = model(x, k, m)
            (loss * (micro / per_rank)).backward()
            tokens = metrics.pop("tokens")
            seen.append(({"loss": loss.detach(), **metrics}, batch["path"]))
            extra["flops"] += objective.flops(k, m) * micro * run.ranks
            bad += len(batch["bad"])
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), args.clip_grad or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        terms = {name: sum(float(metrics[name]) for metrics, _ in seen) / len(seen) for name in seen[0][0]}
        *means, bad, stop = run.mean(*terms.values(), bad, run.stop)                # a signal on one rank stops them all after the same step
        extra["bad"] += round(bad * run.ranks)
        if math.isfinite(norm + sum(means)):                    # all ranks have the same numbers, so all decide alike
            optimizer.step()
            objective.after_step(step)
            window.append(dict(zip(terms, means)))
            skips = 0
        else:
            skips += 1
            paths = [p for metrics, paths in seen if not math.isfinite(metrics["loss"]) for p in paths] or [p for _, paths in seen for p in paths]
            paths = sorted({p for part in run.gather(paths) for p in part})
            run.log({"step": step, "skipped": "loss or gradient is not finite", "files": paths[:100]})
            if skips >= args.max_skips:
                fail(f"step {step}: {skips} steps in a row without a finite loss and gradient, the last one with {', '.join(paths[:3])} ...; "
                     f"the last good checkpoint is in {args.out_dir}", 1)
        optimizer.zero_grad()
        done, clips = step + 1, clips + args.batch_size
        if extra["bad"] > args.max_bad_fraction * max(100, done * args.batch_size / args.clips_per_video):
            fail(f"{extra['bad']} of the videos opened so far cannot be read, more than --max_bad_fraction {args.max_bad_fraction}; "
                 f"all of them: python data.py check {' '.join(args.data)}", 1)
        if window and (done % args.log_every == 0 or done == args.steps):
            means, span = {name: sum(w[name] for w in window) / len(window) for name in window[0]}, time.perf_counter() - since
            run.log({"step": done, **means, **now, "grad_norm": norm if math.isfinite(norm) else None, "feature_std": tokens.float().std(0).mean().item(),
                     "rankme": M.rankme(tokens), "flops": extra["flops"],
                     "clips_per_s": clips / span, "tflops": (extra["flops"] - mark) / span / 1e12,
                     "mfu": (extra["flops"] - mark) / span / (peak * run.ranks) if peak else None, "wait_pct": 100 * wait / span, "peak_gb": M.peak_gb(run.device), "bad": extra["bad"]})
            extra["loss"], clips, wait, mark, since = means["loss"], 0, 0.0, extra["flops"], time.perf_counter()
            window.clear()
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            with torch.no_grad(), run.autocast():
                tokens = model(x[:1])[0]
            if run.rank == 0:
                picture(run.out / "samples" / f"step_{done:08d}.png", x[0], [ids[0] for ids in k], tokens, grid, M.IMAGENET['mean'], M.IMAGENET['std'])
        if args.probe_every and done % args.probe_every == 0 and done < args.steps:
            run.log({"step": done, "probe_acc": accuracy()})
        if done % args.save_every == 0 or done == last or stop:
            run.save(done, model, optimizer, extra)
            run.export(objective.target, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
        if stop:
            break

    if first == last:                                           # resumed at its end: a kill may have come before the export
        run.export(objective.target, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
    probe_acc = accuracy() if done == args.steps else None
    if probe_acc is not None:
        run.log({"step": done, "probe_acc": probe_acc})
    if run.rank == 0:
        print(json.dumps({"steps": done, "loss": extra["loss"], "probe_acc": probe_acc, "random_acc": extra["random_acc"], "bad": extra["bad"],
                          "seconds": round(time.time() - run.start, 1), "out_dir": args.out_dir}), flush=True)
    model = None                                                # before its process group: the other way round a rank may wait for ever as it leaves
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, ARGS)
