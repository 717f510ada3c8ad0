"""TDV: this frame's representation plus the encoded change of its pixels is the next frame's representation.
Daithankar et al. 2026, "You Don't Need Strong Assumptions: Visual Representation Learning via Temporal Differences".

    z    = E(x_t)                     (F,3,H,W) -> (F,1+n,D)     an image encoder: CLS and patches of each frame
    d    = M(x_{t+1} - x_t | z)       -> (F,1+n,D)               a motion encoder that attends to z; it starts at 0
    zhat = z + d;  h = Ebar(x_{t+1})                             the teacher: an EMA of E and of its head, no gradient
    L    = w_mse mean (zhat - h)^2 + w_cls CE(CLS) + w_patch CE(patches);    CE(p_teacher, p_student) over prototypes,
           p = softmax((head(.) - [teacher only] centre) / temperature);     centre <- 0.9 centre + 0.1 batch mean, after use

    Laptop, two cores, minutes, no download:           python train_tdv.py --preset laptop
    Eight GPUs, the paper's ViT-B/14 recipe:           torchrun --nproc-per-node 8 train_tdv.py --data ssv2.csv
    Its baselines on the same frames:                  torchrun --nproc-per-node 8 train_tdv.py --preset dino --data ssv2.csv      (or ibot)

No crops, no flips, no jitter, no masks. Table 4's rows: --no_motion, --w_mse 0, --no_centre, --temp 1 1, --no_cls_condition, --w_cls 0, --pos rope.
The alarms are in the log: `still` is |z - h|^2, the error of a motion encoder that does nothing; `entropy` of the teacher, log(prototypes) if uniform.
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
    """The defaults are the paper's recipe (Tables C.2 and C.3), whatever their field says otherwise. A clip's frames are its images: 16 x 16 = 256 a step."""
    # data
    data: tuple[str, ...] = ()             # lists of `path label` lines, each `file[:weight]`; `world` is the built-in world
    probe_data: tuple[str, ...] = ()       # online probes: a train list and a val list with labels (`world world`: the world's); empty: none
    frames: int = 16                       # frames per clip: each but the last is paired with the next one
    stride: int = 4                        # video frames between two frames of a clip, where --fps is 0
    fps: float = 4.0                       # frames a second, by time stamp: 0.25 s between the frames of a pair
    size: int = 224                        # pixels, after the crop
    crop_scale: tuple[float, float] = (1.0, 1.0)     # the centre square; a share below 1 makes it a random box (the paper: centre crop only)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    clips_per_video: int = 1               # clips taken from each opened video: > 1 when decoding is the bottleneck
    short: Literal["repeat", "loop", "error"] = "repeat"   # of a video shorter than the clip; repeated frames are pairs without motion
    workers: int = 8                       # loader processes per rank
    timeout: int = 600                     # seconds without a batch from a loader process that end the run
    max_bad_fraction: float = 0.1          # stop when more than this share of the opened videos (of 100 at least) cannot be read
    # architecture
    objective: Literal["tdv", "views"] = "tdv"       # views: DINO, and iBOT where --w_patch is not 0
    model: str = "vit_b"                   # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 14                        # pixels
    pos: Literal["learned", "rope"] = "learned"
    init_std: float = 0.02                 # of the random weights; 0.02 suits widths near 1000, narrow models want more
    init: str = ""                         # start from a run's folder (all its weights), or encoder and teacher from any image encoder (DINOv2, timm)
    freeze: bool = False                   # of the encoder (--init): the motion encoder alone learns
    motion: bool = True                    # False: no motion encoder, zhat = z
    motion_depth: int = 0                  # blocks of it; 0: as many as the encoder
    motion_input: Literal["difference", "frame"] = "difference"      # frame: the next one whole
    motion_threshold: float = 0.0          # pairs whose mean |difference| is not above it do not count; in units of the normalised pixels
    condition: Literal["xattn", "film", "adaln", "adaln_zero", "gated_adaln"] = "xattn"
    cls_condition: bool = True             # CLS is among what the motion encoder attends to
    prototypes: int = 32_768
    head_hidden: int = 2048                # width of the projection head
    head_bottleneck: int = 256
    # loss
    w_mse: float = 1.5
    w_cls: float = 1.5                     # of the cross-entropy on CLS (the official script: 0.75 here and in the next)
    w_patch: float = 1.5                   # of the cross-entropy on patches
    temp: tuple[float, float] = (0.1, 0.1)           # of student and teacher
    centre: bool = True
    ce_rows: int = 2048                    # tokens whose logits exist at one time
    # views only: DINO's and iBOT's augmentations; Table 1 removes them one by one
    colour: bool = True                    # jitter, blur, solarisation
    local_crops: int = 8
    random_crops: int = 2                  # of the two global views; the others are the whole image
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    local_size: int = 96                   # pixels
    mask_ratio: tuple[float, float] = (0.3, 0.2)     # iBOT: share of hidden patches, plus or minus, in half of the global views
    # optimization
    steps: int = 200_000
    batch_size: int = 16                   # clips per step over all ranks, whatever their number
    micro_batch: int = 0                   # clips per forward pass on a rank; 0: all at once, else gradients are accumulated
    lr: float = 1e-4
    final_lr: float = 1e-9                 # cosine
    motion_lr: float = 1.0                 # factor for the motion encoder (the official script: 0.03)
    warmup: int = 5_000                    # steps, linear from 0: half an epoch of SSv2
    weight_decay: float = 0.01
    ema: float = 0.99
    final_ema: float = 0.99                # cosine
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0                 # global norm; 0: off
    max_skips: int = 10                    # stop after so many steps in a row with a loss or gradient that is not finite
    # the run
    preset: str = ""                       # dino, ibot, laptop, laptop_video, laptop_video_dino or _ibot: values that become the defaults of all flags
    out_dir: str = "out/tdv"
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
    sample_every: int = 5000               # steps between pictures of features, attention and motion; 0: none
    wandb: str = ""                        # project name: log there as well
    dry_run: bool = False                  # print parameters, FLOPs, memory and days, touch no data


DINO = dict(objective="views", patch=16, lr=5e-4, final_lr=1e-6, warmup=100_000, weight_decay=0.04, ema=0.996, final_ema=1.0, temp=(0.1, 0.04),
            prototypes=1024, w_mse=0.0, w_cls=1.0, w_patch=0.0, clip_grad=3.0, out_dir="out/dino")       # Table C.2, temperatures the right way round
IBOT = dict(w_patch=1.0, prototypes=8192, out_dir="out/ibot")
LAPTOP = dict(model="vit_n", size=32, patch=8, frames=8, fps=0.0, stride=1, init_std=0.04, prototypes=1024, head_hidden=256, head_bottleneck=64,
              steps=1000, batch_size=16, lr=1e-3, warmup=100, local_size=16, dtype="fp32", workers=1, log_every=100, sample_every=1000)
VIDEO = dict(data=(), probe_data=(), size=48, fps=4.0)
PRESETS = {
    "dino": DINO,
    "ibot": DINO | IBOT,
    "laptop": LAPTOP | dict(data=("world",), probe_data=("world", "world"), out_dir="out/laptop_tdv"),
    "laptop_video": LAPTOP | VIDEO | dict(out_dir="out/laptop_video_tdv"),
    "laptop_video_dino": DINO | LAPTOP | VIDEO | dict(out_dir="out/laptop_video_dino"),
    "laptop_video_ibot": DINO | IBOT | LAPTOP | VIDEO | dict(out_dir="out/laptop_video_ibot"),
}


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


class ChunkedCE(torch.autograd.Function):
    """sum over rows of weight * CE(softmax((t Wt' - centre) / T_teacher), softmax(s Ws' / T_student)), for s, t (R,d), Ws, Wt (K,d), weight (R,).

    The (R,K) logits, 8 GB for 16 clips in the paper's setting, exist `rows` rows at a time. Gradients to s and Ws are found on the way forward, so
    nothing is kept or computed again. Also returns, without gradient, the teacher's mean entropy and mean logits (K,)."""

    @staticmethod
    def forward(ctx, s, Ws, t, Wt, centre, weight, temp, rows):
        ds, dWs = torch.empty_like(s), torch.zeros_like(Ws)
        loss, entropy, mean = s.new_zeros(()), s.new_zeros(()), torch.zeros_like(centre)
        for part in (slice(i, i + rows) for i in range(0, len(s), rows)):
            raw, logits = (t[part] @ Wt.T).to(s.dtype), (s[part] @ Ws.T).to(s.dtype) / temp[0]
            p, w = ((raw - centre) / temp[1]).softmax(-1), weight[part, None]
            mean += raw.sum(0)
            entropy += torch.special.entr(p).sum()
            lse = logits.logsumexp(-1, keepdim=True)
            loss += (w * (lse - (p * logits).sum(-1, keepdim=True))).sum()
            g = (logits - lse).exp_().sub_(p).mul_(w / temp[0])
            ds[part] = (g @ Ws).to(s.dtype)
            dWs += (g.T @ s[part]).to(Ws.dtype)
        ctx.save_for_backward(ds, dWs)
        entropy, mean = entropy / max(1, len(s)), mean / max(1, len(s))
        ctx.mark_non_differentiable(entropy, mean)
        return loss, entropy, mean

    @staticmethod
    def backward(ctx, grad, *_):
        ds, dWs = ctx.saved_tensors
        return grad * ds, grad * dWs, *[None] * 6


class Distillation(nn.Module):
    """What TDV, DINO and iBOT share: an image encoder with a head, their EMA as the teacher, and the centred cross-entropy between them."""

    def __init__(self, args):
        super().__init__()
        self.args, shape = args, M.SIZES[args.model] | dict(patch=args.patch, tubelet=1, pos=args.pos, images=True, cls=True)
        if args.init:
            given, shape = M.load_start(args.init, shape)
        self.encoder = M.ViT(**shape, frames=args.frames, size=args.size, init_std=args.init_std, checkpoint=args.checkpoint)
        if args.init:
            self.encoder.load_state_dict(given.state_dict() | ({"pos_embed": given.positions(self.encoder.grid, "cpu")[None]} if args.pos == "learned" else {}))
        self.head = M.ProjectionHead(shape["width"], args.prototypes, args.head_hidden, args.head_bottleneck, train_scale=args.objective == "tdv")
        self.target, self.target_head = (copy.deepcopy(m).requires_grad_(False) for m in (self.encoder, self.head))
        self.register_buffer("centres", torch.zeros(2, args.prototypes))             # of CLS and of patches
        self.means = ([], [])
        if args.freeze:
            self.encoder.requires_grad_(False)

    def ce(self, kind, zhat, h, weight=None):
        """Cross-entropy from teacher tokens h to student tokens zhat, (..., D) each; kind 0: CLS, 1: patches; weight (...,), else a mean."""
        s, Ws = self.head(zhat)
        with torch.no_grad():
            t, Wt = self.target_head(h)
        if weight is None:
            weight = torch.full(s.shape[:-1], 1 / math.prod(s.shape[:-1]), device=s.device)
        loss, entropy, mean = ChunkedCE.apply(s.flatten(0, -2), Ws, t.flatten(0, -2), Wt, self.centres[kind], weight.flatten(), self.args.temp, self.args.ce_rows)
        rows = s[..., 0].numel()
        self.means[kind].append(torch.cat([mean * rows, mean.new_tensor([rows])]))     # of this micro-batch, until the step is taken
        return loss, entropy

    def read(self, x, which):
        """For probes and pictures: tokens of clips x (B,3,T,H,W) -> (B, T*(1+n), D), CLS tokens first, of the teacher or the student; attention: what
        the teacher's CLS attends to in the last block (B*T, heads, n)."""
        if which == "attention":
            return self.target.cls_attention(x.transpose(1, 2).flatten(0, 1)[:, :, None])
        return (self.target if which == "teacher" else self.encoder)(x)

    @torch.no_grad()
    def after_step(self, step, taken):
        """The teacher and the centres follow, once per optimizer step that was taken."""
        if taken:
            for target, source in ((self.target, self.encoder), (self.target_head, self.head)):
                M.ema_update(list(target.parameters()), list(source.parameters()), self.schedules(step)["ema"])
            for centre, means in zip(self.centres, self.means):
                if means and self.args.centre:
                    total = sum(means)                          # logits summed over all tokens, and how many
                    if dist.is_initialized():
                        dist.all_reduce(total)
                    if total[-1] > 0:
                        centre.lerp_(total[:-1] / total[-1], 0.1)
        for means in self.means:
            means.clear()

    def schedules(self, step):
        """Functions of the step alone."""
        a = self.args
        lr = a.lr * step / a.warmup if step < a.warmup else cosine(step - a.warmup, a.steps - a.warmup, a.lr, a.final_lr)
        return {"lr": lr, "weight_decay": a.weight_decay, "ema": cosine(step, a.steps, a.ema, a.final_ema)}

    def head_flops(self, tokens):
        """Forward FLOPs of the head and its prototypes."""
        return 2 * tokens * sum(p.numel() for p in self.head.parameters() if p.ndim == 2 and p.shape[1] > 1)


class TDV(Distillation):
    """The method (section 3)."""

    def __init__(self, args):
        super().__init__(args)
        shape = {k: self.encoder.config[k] for k in ("width", "depth", "heads", "mlp", "patch", "pos", "act", "eps", "frames", "size", "init_std")}
        shape["depth"] = args.motion_depth or shape["depth"]
        if not args.w_cls and not args.w_patch:
            self.head.requires_grad_(False)                     # nothing reads it
        self.motion = M.MotionEncoder(**shape, condition=args.condition, cls_condition=args.cls_condition, checkpoint=args.checkpoint) if args.motion else None

    def forward(self, x, index=None, which=""):
        """x (B,3,T,H,W) -> loss, metrics. which: as in read, and besides motion: what the motion encoder makes of all pairs before its last layer
        (B, (T-1)*(1+n), D); compose: see there. Everything enters through here, as FSDP gathers the root's parameters only inside this forward."""
        if which == "compose":
            return self.compose(x)
        now, then = (x[:, :, a:b].transpose(1, 2).flatten(0, 1)[:, :, None] for a, b in ((0, -1), (1, None)))     # (F,3,1,H,W), F = B*(T-1)
        change = then if self.args.motion_input == "frame" else then - now
        if which == "motion":
            return self.motion(change, self.encoder(now), features=True).unflatten(0, (len(x), -1)).flatten(1, 2)
        if which:
            return self.read(x, which)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.args.freeze):
            z = self.encoder(now)                                                                               # (F,1+n,D)
        with torch.no_grad():
            h = self.target(then)
        zhat = z + self.motion(change, z) if self.motion is not None else z
        moves = ((then - now).abs().mean((1, 2, 3, 4)) > self.args.motion_threshold) if self.args.motion_threshold else torch.ones(len(z), device=x.device)
        weight = moves.float() / len(moves)                     # (F,): of all pairs, so that micro-batches and ranks do not matter
        square = lambda e: ((e.float() ** 2).mean((1, 2)) * weight).sum()
        loss, still, n = square(zhat - h), square((z - h).detach()), z.shape[1] - 1
        metrics = {"mse": loss.detach(), "still": still, "moved": square((zhat - z).detach())}
        loss = self.args.w_mse * loss
        for kind, (name, w, tokens) in enumerate((("cls", self.args.w_cls, slice(0, 1)), ("patch", self.args.w_patch, slice(1, None)))):
            if w:
                ce, entropy = self.ce(kind, zhat[:, tokens], h[:, tokens], weight[:, None].expand(-1, 1 if kind == 0 else n) / (1 if kind == 0 else n))
                loss, metrics = loss + w * ce, metrics | {f"ce_{name}": ce.detach(), f"entropy_{name}": entropy}
        return loss, metrics | {"tokens": h[:, 0].detach()}

    def compose(self, x):
        """Video encoding by composition (section 5): the first frame through E, each later one as the frame before plus its motion -> (B,T,1+n,D)."""
        frames = x.transpose(1, 2)[:, :, :, None]                                                               # (B,T,3,1,H,W)
        z = [self.encoder(frames[:, 0])]
        for now, then in zip(frames.unbind(1), frames[:, 1:].unbind(1)):
            z.append(z[-1] + self.motion(then if self.args.motion_input == "frame" else then - now, z[-1]))
        return torch.stack(z, 1)

    def flops(self):
        """Forward and backward FLOPs of one clip."""
        pairs, n = self.args.frames - 1, math.prod(self.encoder.grid[1:])
        tokens = (self.args.w_cls > 0) + n * (self.args.w_patch > 0)
        once = self.encoder.flops(n) * (1 / 3 if self.args.freeze else 1) + (self.motion.flops(n) if self.motion is not None else 0) + self.head_flops(tokens)
        return pairs * (3 * once + self.target.flops(n) + self.head_flops(tokens))


class Views(Distillation):
    """DINO, the paper's baseline, and iBOT: views of one frame instead of two frames. Teacher: two global views; student: those and local crops."""

    def __init__(self, args):
        super().__init__(args)
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.width)) if args.w_patch else None       # takes the place of hidden patches

    def forward(self, x, index=None, which=""):
        """x (B,3,T,H,W), index (B,) the clips' sample numbers, which decide their views -> loss, metrics. which: tokens of teacher or student."""
        if which:
            return self.read(x, which)
        a, (B, _, T, _, _) = self.args, x.shape
        mean, std = (x.new_tensor(M.IMAGENET[k]).view(3, 1, 1) for k in ("mean", "std"))
        image = x.transpose(1, 2).flatten(0, 1) * std + mean                                                    # (F,3,H,W) in [0,1], F = B*T
        u = D.view_numbers(a.seed, index, T, 2 + a.local_crops).flatten(0, 1)                                   # (F, views, 16)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):     # bf16 would place pixels wrongly
            view = lambda v, size, scale, **how: ((D.augment(image, u[:, v], size, scale, colour=a.colour, **how) - mean) / std)[:, :, None]
            wide = [view(v, a.size, a.global_scale, crop=v < a.random_crops, blur=(1.0, 0.1)[v], solarise=(0.0, 0.2)[v]) for v in (0, 1)]
            local = [view(v, a.local_size, a.local_scale, blur=0.5) for v in range(2, 2 + a.local_crops)]
        with torch.no_grad():
            h = [self.target(v) for v in wide]                                                                  # [(F,1+n,D)] * 2
        fill = [None, None]
        if self.mask_token is not None:
            fill = [(D.block_masks(a.seed, [2 * int(g) + v for g in index], T, self.encoder.grid[1:], *a.mask_ratio, 0.5).to(x.device), self.mask_token) for v in (0, 1)]
        z = [self.encoder(v, fill=f) for v, f in zip(wide, fill)]
        some = self.encoder(torch.cat(local))[:, 0].chunk(len(local)) if local else ()
        pairs = [(s, t) for t in (0, 1) for s in range(2 + len(some)) if s != t]
        student = [z[0][:, 0], z[1][:, 0], *some]
        ce, entropy = self.ce(0, torch.cat([student[s] for s, _ in pairs]), torch.cat([h[t][:, 0] for _, t in pairs]))
        loss, metrics = a.w_cls * ce, {"ce_cls": ce.detach(), "entropy_cls": entropy}
        if a.w_patch:
            hidden = torch.cat([f[0] for f in fill])                                                            # (2F,n)
            weight = (hidden / hidden.sum(1, keepdim=True).clamp(min=1))[hidden]
            ce, entropy = self.ce(1, torch.cat(z)[:, 1:][hidden], torch.cat(h)[:, 1:][hidden], weight / len(hidden))
            loss, metrics = loss + a.w_patch * ce, metrics | {"ce_patch": ce.detach(), "entropy_patch": entropy}
        return loss, metrics | {"tokens": h[0][:, 0]}

    def flops(self):
        """Forward and backward FLOPs of one clip."""
        a, n, m = self.args, math.prod(self.encoder.grid[1:]), (self.args.local_size // self.args.patch) ** 2
        tokens = 2 + a.local_crops + 2 * n * a.mask_ratio[0] / 2 * (a.w_patch > 0)
        student = self.encoder.flops(*[n] * 2, *[m] * a.local_crops) + self.head_flops(tokens)
        return a.frames * (3 * student + self.target.flops(n, n) + self.head_flops(2 + tokens - 2 - a.local_crops))


OBJECTIVES = {"tdv": TDV, "views": Views}


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


def picture(path, x, teacher, attention, moved):
    """One clip, a column a frame: the frames, the first three principal components of the teacher's patches, what its CLS attends to, and how far the
    motion encoder moves each patch (of the pair that begins there). x (3,T,H,W), teacher (T,n,D), attention (T,heads,n), moved (T-1,n) or None."""
    T, H, h = x.shape[1], x.shape[2], math.isqrt(teacher.shape[1])
    frames = x.permute(1, 2, 3, 0).float().cpu() * torch.tensor(M.IMAGENET["std"]) + torch.tensor(M.IMAGENET["mean"])               # (T,H,W,3)
    grow = lambda v: v.float().cpu().reshape(len(v), h, h, -1).expand(-1, -1, -1, 3).repeat_interleave(H // h, 1).repeat_interleave(H // h, 2)
    tokens = teacher.flatten(0, 1).float().cpu()
    tokens = tokens - tokens.mean(0)
    pca = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    unit = lambda v: (v - v.amin(0)) / (v.amax(0) - v.amin(0)).clamp_min(1e-6)
    rows = [frames, grow(unit(pca).view(T, -1, 3)), grow(unit(attention.float().mean(1).flatten()).view(T, -1, 1))]
    if moved is not None:
        rows.append(F.pad(grow(unit(moved.float().flatten()).view(T - 1, -1, 1)), (0, 0, 0, 0, 0, 0, 0, 1)))
    image, zoom = torch.cat([torch.cat(list(r), 1) for r in rows]), max(1, 112 // H)
    D.save_png(path, image.clamp(0, 1).mul(255).byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())


def dry_run(args, run, objective):
    """Sizes from the meta device -> two lines, the last one JSON. Memory is a bound for one GPU: fp32 weights, gradients and Adam, the teacher, activations
    of about 18 values a token, block and channel (two bytes each in bf16; --checkpoint keeps one), and the logits of --ce_rows tokens."""
    count = lambda *modules: sum(p.numel() for m in modules if m is not None for p in m.parameters())
    flops, total, taught = objective.flops() * args.batch_size, count(objective), count(objective.target, objective.target_head)
    e, n = objective.encoder, 1 + math.prod(objective.encoder.grid[1:])
    tokens = args.frames * n * 2 if args.objective == "views" else (args.frames - 1) * n * (2 + (args.motion_depth or len(e.blocks)) / len(e.blocks) if args.motion else 1)
    values = tokens * e.width * len(e.blocks) * (1 if args.checkpoint else 18) * (args.micro_batch or args.batch_size // run.ranks)
    memory = ((total - taught) * 16 + taught * 4) // (run.ranks if args.fsdp else 1) + round(values * (2 if args.dtype == "bf16" else 4)) + 16 * args.ce_rows * args.prototypes
    days = flops * args.steps / (run.ranks * 0.5 * 989e12) / 86400
    if run.rank == 0:
        print(f"{args.model}: {flops / args.batch_size / 1e12:.3g} TFLOP a clip; {days:.3g} days on {run.ranks} GPU(s) at 50 % of an H100's or H200's 989 bf16 TFLOP/s")
        print(json.dumps({"params": total - taught, "params_encoder": count(e), "flops_per_step": flops, "flops_per_clip": flops / args.batch_size,
                          "bytes_per_gpu": memory, "gpus": run.ranks, "days": days}))


def main(args):
    run = Run(args)
    if args.model not in M.SIZES:                               # everything a user can get wrong is looked at before work starts
        fail(f"--model {args.model}: choose from {', '.join(M.SIZES)}")
    torch.manual_seed(args.seed)
    try:
        with torch.device("meta" if args.dry_run else "cpu"):
            objective = OBJECTIVES[args.objective](dataclasses.replace(args, init="") if args.dry_run else args)
    except ValueError as e:
        fail(e)
    if args.objective == "tdv" and args.frames < 2:
        fail(f"--frames {args.frames}: a pair needs two")
    if args.objective == "views" and args.local_crops and (args.local_size % args.patch or not args.local_size):
        fail(f"--local_size {args.local_size} is not divisible by --patch {args.patch}")
    if args.objective == "views" and args.colour and min(args.size, args.local_size if args.local_crops else args.size) < 8:
        fail("--colour blurs by up to 6 pixels: views must have 8 or more")
    if not 0 <= args.mask_ratio[0] - args.mask_ratio[1] <= sum(args.mask_ratio) <= 1:
        fail(f"--mask_ratio {args.mask_ratio[0]} {args.mask_ratio[1]}: ratio minus and plus spread must lie in [0, 1]")
    if args.freeze and (not args.init or args.objective != "tdv" or not args.motion):
        fail("--freeze trains the motion encoder of TDV alone, on an encoder that --init gives")
    if args.dry_run:
        return dry_run(args, run, objective)
    if not args.data:
        raise D.DataError("no data: give --data LIST (see README, Data) or --preset laptop")
    if len(args.probe_data) not in (0, 2):
        raise D.DataError(f"--probe_data {' '.join(args.probe_data)}: two lists are needed, one to fit the probe and one to test it")
    clip = D.Clip(frames=args.frames, stride=args.stride, fps=args.fps or None, size=args.size, scale=args.crop_scale, ratio=args.crop_ratio,
                  flip=args.flip, clips=args.clips_per_video, short=args.short)
    sources = [D.parse_list(spec) for spec in args.data]
    probe = [D.parse_list(spec, split, labelled=True) for spec, split in zip(args.probe_data, ("probe", "val"))]
    if args.init and Path(args.init).is_dir():
        run.check_start(objective, args.init)
    run.open(D.fingerprint(sources))

    model = run.wrap(objective.to(run.device))
    optimizer = torch.optim.AdamW(M.param_groups(objective, args.weight_decay, {"motion.": args.motion_lr}), lr=args.lr, betas=args.betas, fused=True)
    if args.init and Path(args.init).is_dir():
        run.load(model, folder=args.init)
    extra = {"step": 0, "random_acc": None, "random_knn": None, "bad": 0, "loss": None, "window": [], "flops": 0.0} | (run.load(model, optimizer) if args.resume else {})
    first, window = extra.pop("step"), extra["window"]

    width, moving = objective.encoder.width, getattr(objective, "motion", None) is not None

    def features(x):
        """Means over the tokens of a clip: CLS of the teacher, of the student, the teacher's patches, what the motion encoder knows."""
        with run.autocast():
            teacher, student, T = model(x, which="teacher"), model(x, which="student"), x.shape[2]
            means = [teacher[:, :T], student[:, :T], teacher[:, T:]] + ([model(x, which="motion")] if moving else [])
            return torch.cat([v.float().mean(1) for v in means], 1)

    heads = {"teacher_acc": lambda x, y, xv: M.linear_probe(x[:, 2 * width : 3 * width], y, xv[:, 2 * width : 3 * width]),   # what the exported encoder has
             "probe_acc": lambda x, y, xv: M.linear_probe(x[:, 2 * width :], y, xv[:, 2 * width :]),
             "knn_acc": lambda x, y, xv: M.knn_probe(x[:, :width], y, xv[:, :width]),                               # the paper's monitor
             "knn_student": lambda x, y, xv: M.knn_probe(x[:, width : 2 * width], y, xv[:, width : 2 * width])}

    def accuracies():
        return run.probe(features, *probe, dataclasses.replace(clip, train=False, clips=1), heads) if probe else {}

    if first == 0 and not args.init:
        start = accuracies()                                    # the encoders as they were initialised: what learning has to beat
        extra |= {"random_acc": start.get("probe_acc"), "random_knn": start.get("knn_acc")}
    per_rank, last = args.batch_size // run.ranks, min(args.steps, args.stop_at or args.steps)
    micro = args.micro_batch or per_rank
    loader = iter(D.make_loader(sources, clip, seed=args.seed, batch_size=args.batch_size, micro_batch=micro, rank=run.rank, ranks=run.ranks,
                                workers=args.workers, start_step=first, steps=last, timeout=args.timeout))
    peak = {"H200": 989e12, "H100": 989e12, "A100": 312e12}     # dense bf16 FLOP/s
    peak = next((v for k, v in peak.items() if run.device.type == "cuda" and k in torch.cuda.get_device_name()), None)
    done, skips, clips, wait, mark, since = first, 0, 0, 0.0, extra["flops"], time.perf_counter()

    for step in tqdm(range(first, last), initial=first, total=args.steps, disable=run.rank > 0 or not sys.stderr.isatty()):
        torch.manual_seed(args.seed * 1_000_003 + step)         # no random state outlives a step, so none needs saving
        now = objective.schedules(step)
        for g in optimizer.param_groups:
            g["lr"], g["weight_decay"] = now["lr"] * g["factor"], now["weight_decay"] if g["decay"] else 0.0
        seen, bad = [], 0
        for i in range(0, per_rank, micro):
            begin = time.perf_counter()
            batch = next(loader)
            wait += time.perf_counter() - begin
            x = D.prepare(batch, run.device)
            run.sync(model, i + micro >= per_rank)
            with run.autocast():
                loss, metrics = model(x, batch["index"])
            (loss * (micro / per_rank)).backward()
            tokens = metrics.pop("tokens")
            seen.append(({"loss": loss.detach(), **metrics}, batch["path"]))
            extra["flops"] += objective.flops() * micro * run.ranks
            bad += len(batch["bad"])
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), args.clip_grad or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        terms = {name: sum(float(metrics[name]) for metrics, _ in seen) / len(seen) for name in seen[0][0]}
        *means, bad, stop = run.mean(*terms.values(), bad, run.stop)                # a signal on one rank stops them all after the same step
        extra["bad"] += round(bad * run.ranks)
        taken = math.isfinite(norm + sum(means))                # all ranks have the same numbers, so all decide alike
        if taken:
            optimizer.step()
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
        objective.after_step(step, taken)
        optimizer.zero_grad()
        done, clips = step + 1, clips + args.batch_size
        if extra["bad"] > args.max_bad_fraction * max(100, done * args.batch_size / args.clips_per_video):
            fail(f"{extra['bad']} of the videos opened so far cannot be read, more than --max_bad_fraction {args.max_bad_fraction}; "
                 f"all of them: python data.py check {' '.join(args.data)}", 1)
        if window and (done % args.log_every == 0 or done == args.steps):
            means, span = {name: sum(w[name] for w in window) / len(window) for name in window[0]}, time.perf_counter() - since
            recovered = {"recovered": 1 - means["mse"] / means["still"]} if means.get("still") else {}     # the share of the change that motion explains
            run.log({"step": done, **means, **recovered, **now, "grad_norm": norm if math.isfinite(norm) else None, "feature_std": tokens.float().std(0, correction=0).mean().item(),
                     "rankme": M.rankme(tokens), "flops": extra["flops"],
                     "clips_per_s": clips / span, "tflops": (extra["flops"] - mark) / span / 1e12,
                     "mfu": (extra["flops"] - mark) / span / (peak * run.ranks) if peak else None, "wait_pct": 100 * wait / span, "peak_gb": M.peak_gb(run.device), "bad": extra["bad"]})
            extra["loss"], clips, wait, mark, since = means["loss"], 0, 0.0, extra["flops"], time.perf_counter()
            window.clear()
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            with torch.no_grad(), run.autocast():
                T, n = x.shape[2], math.prod(objective.encoder.grid[1:])
                teacher, attention, moved = model(x, which="teacher")[:, T:].unflatten(1, (T, n)), model(x[:1], which="attention"), None
                if moving:
                    zs = model(x, which="compose")                      # (B,T,1+n,D)
                    moved = (zs[0, 1:] - zs[0, :-1]).norm(dim=-1)[:, 1:]
                    far = lambda z: [round(v, 5) for v in (z[:, :, 1:] - teacher).float().square().mean((0, 2, 3)).tolist()]      # from the teacher, by frame
                    run.log({"step": done, "drift": far(zs), "drift_still": far(zs[:, :1].expand_as(zs))})
            if run.rank == 0:
                picture(run.out / "samples" / f"step_{done:08d}.png", x[0], teacher[0], attention, moved)
        if args.probe_every and done % args.probe_every == 0 and done < args.steps:
            run.log({"step": done, **accuracies()})
        if done % args.save_every == 0 or done == last or stop:
            run.save(done, model, optimizer, extra)
            run.export(objective.target, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
        if stop:
            break

    if first == last:                                           # resumed at its end: a kill may have come before the export
        run.export(objective.target, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
    found = accuracies() if done == args.steps else {}
    if found:
        run.log({"step": done, **found})
    if run.rank == 0:
        print(json.dumps({"steps": done, "loss": extra["loss"], "probe_acc": found.get("probe_acc"), "random_acc": extra["random_acc"], "knn_acc": found.get("knn_acc"),
                          "random_knn": extra["random_knn"], "bad": extra["bad"],
                          "seconds": round(time.time() - run.start, 1), "out_dir": args.out_dir}), flush=True)
    model = None                                                # before its process group: the other way round a rank may wait for ever as it leaves
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, ARGS)
