"""TDV: a frame's tokens and the encoded change of its pixels make the next frame's tokens.
Daithankar et al. 2026, "You Don't Need Strong Assumptions: Visual Representation Learning via
Temporal Differences".

    z    = E(x_t)                     (F,3,H,W) -> (F,1+n,D)  an image encoder: CLS and n patches
    zhat = z + M(x_{t+1} - x_t | z)   -> (F,1+n,D)  a motion encoder that attends to z; starts at 0
    h    = Ebar(x_{t+1})              -> (F,1+n,D)  the teacher, an EMA of E, no gradient
    L    = w_mse mean (zhat - h)^2 + w_cls CE(CLS) + w_patch CE(patches)
    CE   = -sum p(h) log p(zhat),  p = softmax(head(.) / temperature) over prototypes; the teacher's
           head is an EMA too, and subtracts a centre: centre <- 0.9 centre + 0.1 batch mean

    python train_tdv.py --preset laptop --steps 200        two cores, minutes, no download: a linear
                                                           probe near 21 %, without motion 14
    torchrun --nproc-per-node 8 train_tdv.py --data ssv2.csv                  the paper's ViT-B/14
    torchrun --nproc-per-node 8 train_tdv.py --preset dino --data ssv2.csv    a baseline; or ibot

F counts pairs of frames. No crops, flips, jitter or masks. After TDV come its baselines, DINO and
iBOT on the same frames. assets/tdv.md: Table 4's rows, what the log says, results, deviations.
"""
import signal

if __name__ == "__main__":  # Ctrl-C before the run listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import dataclasses
import math
import os
from typing import Literal

import tyro

Condition = Literal["xattn", "film", "adaln", "adaln_zero", "gated_adaln"]


@dataclasses.dataclass
class Args:
    """Defaults: the paper's ViT-B/14 recipe (Tables C.2 and C.3). A clip's frames are images."""
    # --- data
    data: tuple[str, ...] = ()          # lists of `path label` rows, LIST[:WEIGHT]; empty: world
    probe_data: tuple[str, ...] = ()    # online probes: a train and a val list with labels, or none
    frames: int = 16                    # of a clip: each is paired with the next one
    stride: int = 4                     # video frames from one to the next, where --fps is 0
    fps: float = 4.0                    # frames a second, by time stamp
    size: int = 224                     # pixels, after the crop
    crop_scale: tuple[float, float] = (1.0, 1.0)    # the centre square; below 1: a random box
    crop_ratio: tuple[float, float] = (1.0, 1.0)    # its aspect ratio
    flip: bool = False                  # half of the clips
    clips_per_video: int = 1            # cut from each decoded video; 4 where decoding is slow
    short: Literal["spread", "repeat", "loop", "error"] = "spread"  # what a short video becomes
    workers: int = -1                   # loader processes of a rank; -1: what the machine has
    timeout: int = 600                  # so many seconds without a batch end the run
    max_bad_fraction: float = 0.1       # share of unreadable videos; more end the run
    # --- architecture
    objective: Literal["tdv", "views"] = "tdv"      # tdv; views: DINO, with --w_patch iBOT
    model: str = "vit_b"                # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 14                     # pixels
    pos: Literal["learned", "rope"] = "learned"     # positions: learned or rope
    init_std: float = 0.02              # of the random weights; narrow models want more
    init: str = ""                      # start from a run's folder, or an image encoder's weights
    freeze: bool = False                # hold the encoder of --init; the head still learns
    motion: bool = True                 # --no-motion: zhat = z
    motion_depth: int = 0               # its blocks; 0: as many as the encoder
    motion_init: Literal["zero", "small", "default"] = "zero"       # of its last layer
    motion_input: Literal["difference", "frame"] = "difference"     # or frame: the next frame whole
    motion_threshold: float = 0.0       # mean |change| of normalised pixels that a pair must exceed
    condition: Condition = "xattn"      # on z: xattn, film, adaln, adaln_zero or gated_adaln
    cls_condition: bool = True          # the motion encoder attends to CLS too
    prototypes: int = 32_768            # of the projection head
    head_hidden: int = 2048             # its width
    head_bottleneck: int = 256          # of its unit vectors
    # --- loss
    w_mse: float = 1.5
    w_cls: float = 1.5                  # of CE on CLS (the official script: 0.75)
    w_patch: float = 1.5                # of CE on patches (the official script: 0.75)
    temp: tuple[float, float] = (0.1, 0.1)          # of student and teacher
    centre: bool = True
    ce_rows: int = 2048                 # tokens whose logits exist at one time
    # --- views: DINO's and iBOT's augmentations, which Table 1 removes one by one
    colour: bool = True                 # jitter, blur, solarisation
    local_crops: int = 8
    random_crops: int = 2               # of the two global views; the others are the whole image
    global_scale: tuple[float, float] = (0.4, 1.0)  # area of the boxes
    local_scale: tuple[float, float] = (0.05, 0.4)
    local_size: int = 96                # pixels
    mask_ratio: tuple[float, float] = (0.3, 0.2)    # iBOT: share of hidden patches, +-
    # --- optimization
    steps: int = 200_000
    flops: float = 0.0                  # > 0: as many steps as this many FLOPs pay for
    batch_size: int = 16                # clips of a step, over all ranks
    micro_batch: int = 0                # clips of a forward pass on a rank; 0: what fits
    lr: float = 1e-4
    final_lr: float = 1e-9              # cosine
    horizon: int = 0                    # of rate and EMA; 0: --steps (the official one: 3,000,000)
    motion_lr: float = 1.0              # factor for the motion encoder (the official script: 0.03)
    warmup: int = 5_000                 # steps, linear from 0: half an epoch of SSv2
    weight_decay: float = 0.01
    ema: float = 0.99
    final_ema: float = 0.99             # cosine
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0              # global norm, 0: off
    max_skips: int = 10                 # so many non-finite steps in a row end the run
    # --- the run
    preset: str = ""                    # values that become the defaults; a wrong name lists all
    out_dir: str = "out/tdv"
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
    sample_every: int = 5000            # pictures of features, attention and motion; 0: none
    wandb: str = ""                     # project name: log there as well
    dry_run: bool = False               # parameters, FLOPs, memory and days; no data is touched


LAPTOP = dict(
    model="vit_n", size=32, patch=8, frames=8, fps=0.0, stride=1, init_std=0.04,
    prototypes=1024, head_hidden=256, head_bottleneck=64, local_size=16,
    steps=1000, batch_size=16, lr=1e-3, warmup=100,
    dtype="fp32", workers=1, log_every=100, sample_every=1000,
)
# Table C.2, with the temperatures the right way round
DINO = dict(
    objective="views", patch=16, prototypes=1024, w_mse=0.0, w_cls=1.0, w_patch=0.0,
    temp=(0.1, 0.04), lr=5e-4, final_lr=1e-6, warmup=100_000, weight_decay=0.04,
    ema=0.996, final_ema=1.0, clip_grad=3.0, out_dir="out/dino",
)
IBOT = DINO | dict(w_patch=1.0, prototypes=8192, out_dir="out/ibot")
WORLD = dict(data=("world",), probe_data=("world", "world"))
VIDEO = LAPTOP | dict(size=48, fps=4.0)
# at 0.996 a thousand steps' teacher would hold little of what its student learned
SHORT_RUN = dict(ema=0.98, final_ema=1.0, warmup=100)
PRESETS = {
    "dino": DINO,
    "ibot": IBOT,
    "laptop": LAPTOP | WORLD | dict(out_dir="out/laptop_tdv"),
    "laptop_video": VIDEO | dict(out_dir="out/laptop_video_tdv"),
    "laptop_video_dino": DINO | VIDEO | SHORT_RUN | dict(out_dir="out/laptop_video_dino"),
    "laptop_video_ibot": IBOT | VIDEO | SHORT_RUN | dict(out_dir="out/laptop_video_ibot"),
}


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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (
    IMAGENET, SIZES, Meter, MotionEncoder, Row, Run, UserError, adamw, budgeted, clip_gradients,
    colour_frames, colours, construct, cosine, dry_run, each_frame, ema_update, enlarge, exact,
    init_weights, launch, linear_probe, make_encoder, matrices, rotate, set_rates, to_unit,
    warmup_decay,
)

# rows of the centres
CLS = 0
PATCHES = 1
KINDS = ("cls", "patch")
# what the motion encoder has of the encoder
MOTION_SHAPE = "width depth heads mlp patch pos act eps frames size init_std".split()


# --- TDV ------------------------------------------------------------------------------------------

class TDV(nn.Module):
    """The whole method: encoder, motion encoder, teacher, head, loss, schedules (section 3)."""
    train_scale = True  # prototypes learn their length; those of DINO and iBOT keep length 1
    masks = None  # forward() takes sample numbers

    def __init__(self, args):
        super().__init__()
        self.args = args
        shape = SIZES[args.model] | dict(
            patch=args.patch, tubelet=1, pos=args.pos, images=True, cls=True)
        self.encoder, _ = make_encoder(args, shape)
        self.head = ProjectionHead(
            shape["width"], args.prototypes, args.head_hidden, args.head_bottleneck,
            self.train_scale)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centres", torch.zeros(2, args.prototypes))  # of CLS and of patches
        self.logit_sums = ([], [])  # of the micro-batches of a step: what moves the centres
        if args.freeze:
            self.encoder.requires_grad_(False)
        if not args.w_cls and not args.w_patch:  # nothing reads it
            self.head.requires_grad_(False)
        self.motion = None
        if args.motion:
            shape = {name: self.encoder.config[name] for name in MOTION_SHAPE}
            shape["depth"] = args.motion_depth or shape["depth"]
            self.motion = MotionEncoder(
                **shape, condition=args.condition, cls_condition=args.cls_condition,
                checkpoint=args.checkpoint)
            if args.motion_init != "zero":
                std = {"small": 1e-3, "default": args.init_std}
                nn.init.normal_(self.motion.proj.weight, std=std[args.motion_init])

    @property
    def product(self):
        """What is exported and what probe.py reads (physics reads the whole run): the teacher. Of
        the run's own probes teacher_acc reads this; probe_acc adds the motion encoder's tokens."""
        return self.target

    def forward(self, x, index=None, read=None):
        """loss(x, index), or what the part or method called `read` makes of x: "target", "encoder",
        "attention", "compose", "motion_tokens". FSDP gathers the root's parameters only inside this
        forward, so everything enters through here."""
        if read:
            return getattr(self, read)(x)
        return self.loss(x, index)

    def loss(self, x, index=None):
        """Clips x (B,3,T,H,W) -> loss, metrics."""
        a = self.args
        now, then = pairs(x)  # (F,3,1,H,W), F = B*(T-1)
        z = self.encoder(now)  # (F,1+n,D)
        # stop-gradient: else h could move to a constant that is easy to predict (section 3.2)
        with torch.no_grad():
            h = self.target(then)
        zhat = self.predict(z, now, then)

        # divided by all pairs, also those that --motion_threshold leaves out: their number differs
        # between micro-batches and ranks, and the loss must not depend on how a batch is split
        weight = self.counts(now, then) / len(z)  # (F,)
        mse = mean_square(zhat - h, weight)
        metrics = {
            "mse": mse.detach(),
            "still": mean_square((z - h).detach(), weight),  # error of predicting no motion
            "moved": mean_square((zhat - z).detach(), weight),
            "tokens": h[:, 0],
        }
        loss = a.w_mse * mse
        if a.w_cls:
            ce, said = self.ce(CLS, zhat[:, :1], h[:, :1], weight[:, None])
            loss = loss + a.w_cls * ce
            metrics |= said
        if a.w_patch:
            n = z.shape[1] - 1
            each = weight[:, None].expand(-1, n) / n
            ce, said = self.ce(PATCHES, zhat[:, 1:], h[:, 1:], each)
            loss = loss + a.w_patch * ce
            metrics |= said
        return loss, metrics

    def predict(self, z, now, then):
        """z of `now` -> zhat of `then`. E learns through both z: the addend and the condition."""
        if self.motion is None:
            return z
        return z + self.motion(self.change(now, then), z)

    def change(self, now, then):
        """What the motion encoder is given."""
        return then if self.args.motion_input == "frame" else then - now

    def counts(self, now, then):
        """(F,): 1 for each pair, 0 where --motion_threshold leaves it out."""
        if not self.args.motion_threshold:
            return torch.ones(len(now), device=now.device)
        change = (then - now).abs().mean((1, 2, 3, 4))
        return (change > self.args.motion_threshold).float()

    def ce(self, kind, zhat, h, weight=None):
        """Cross-entropy from teacher tokens h to student tokens zhat, (...,D), and what the log
        shows: it, and the teacher's entropy. kind: CLS or PATCHES; weight (...,) of each token:
        none, the mean."""
        s, student_prototypes = self.head(zhat)
        with torch.no_grad():
            t, teacher_prototypes = self.target_head(h)
        if weight is None:
            count = math.prod(s.shape[:-1])
            weight = torch.full(s.shape[:-1], 1 / count, device=s.device)
        loss, entropy, mean = ChunkedCE.apply(
            s.flatten(0, -2), student_prototypes, t.flatten(0, -2), teacher_prototypes,
            self.centres[kind], weight.flatten(), self.args.temp, self.args.ce_rows)
        rows = weight.numel()
        sums = torch.cat([mean * rows, mean.new_tensor([rows])])  # (K+1,)
        if self.training and torch.is_grad_enabled():  # a step
            self.logit_sums[kind].append(sums)
        name = KINDS[kind]
        return loss, {f"ce_{name}": loss.detach(), f"entropy_{name}": entropy}

    @torch.no_grad()
    def after_step(self, step, skip=0.0):
        """Teacher and centres follow; after a step that was skipped they stay."""
        ema = self.schedules(step)["ema"]
        ema_update(self.target.parameters(), self.encoder.parameters(), ema, skip)
        ema_update(self.target_head.parameters(), self.head.parameters(), ema, skip)
        if self.args.centre:
            self.move_centres(skip)
        for sums in self.logit_sums:
            sums.clear()

    def move_centres(self, skip):
        """By a tenth, towards the mean logits over all micro-batches and ranks."""
        for centre, sums in zip(self.centres, self.logit_sums):
            if not sums:
                continue
            total = sum(sums)  # (K+1,): logits, and how many tokens' they are
            if dist.is_initialized():
                dist.all_reduce(total)
            stays = (total[-1] == 0) | (skip > 0)
            centre.lerp_(torch.where(stays, centre, total[:-1] / total[-1]), 0.1)

    def schedules(self, step):
        """Functions of the step alone."""
        a = self.args
        end = a.horizon or a.steps
        return {
            "lr": warmup_decay(step, a.warmup, end, 0.0, a.lr, a.final_lr),
            "weight_decay": a.weight_decay,
            "ema": cosine(step, end, a.ema, a.final_ema),
        }

    # what pictures, probes and physics read

    def attention(self, x):
        """What the teacher's CLS attends to in its last block: (B*T,heads,n)."""
        seen = []

        def record(attention, inputs, output):
            z, rope, _ = inputs
            qk = attention.qkv(z).unflatten(2, (3, attention.heads, -1))[:, :, :2]
            seen.append(qk if rope is None else rotate(qk, *rope))

        # a hook, as FSDP gathers a block's weights in its own forward only
        with self.target.blocks[-1].attn.register_forward_hook(record):
            self.target(each_frame(x))
        q, k = seen[0].unbind(2)  # (B*T,1+n,heads,head_dim)
        scores = torch.einsum("fhd,fnhd->fhn", q[:, 0].float(), k.float())
        return (scores * q.shape[-1] ** -0.5).softmax(-1)[:, :, 1:]

    def compose(self, x):
        """Video encoding by composition (section 5): the first frame's tokens, then each frame's
        tokens plus its motion -> (B,T,1+n,D)."""
        frames = x.transpose(1, 2)[:, :, :, None].unbind(1)  # T of (B,3,1,H,W)
        z = [self.encoder(frames[0])]
        for now, then in zip(frames, frames[1:]):
            z.append(self.predict(z[-1], now, then))
        return torch.stack(z, 1)

    def motion_tokens(self, x):
        """What the motion encoder knows before its last layer: (B,(T-1)*(1+n),D)."""
        now, then = pairs(x)
        tokens = self.motion(self.change(now, then), self.encoder(now), features=True)
        return tokens.unflatten(0, (len(x), -1)).flatten(1, 2)

    def surprise(self, x, context):
        """(B,): error in foretelling each frame from the one before and their difference. It sees
        pairs only: `context`, which probe.py gives every objective, is not used."""
        if self.motion is None:
            raise UserError("this run has no predictor, so it foretells nothing")
        now, then = pairs(x)
        zhat = self.predict(self.encoder(now), now, then)
        error = (zhat - self.target(then)).abs().mean((1, 2))  # (F,)
        return error.view(len(x), -1).mean(1)

    # sizes

    def flops(self):
        """Of one clip, forward and backward; a backward pass costs two forward passes."""
        a = self.args
        n = math.prod(self.encoder.grid[1:])
        tokens = 0
        if a.w_cls:
            tokens += 1
        if a.w_patch:
            tokens += n
        encoder = self.encoder.flops(n)
        head = self.head_flops(tokens)
        motion = self.motion.flops(n) if self.motion is not None else 0
        trained = encoder * (1 / 3 if a.freeze else 1) + motion + head
        return (a.frames - 1) * (3 * trained + self.target.flops(n) + head)

    def head_flops(self, tokens):
        """Forward, of the head and its prototypes."""
        return 2 * tokens * (matrices(self.head) - self.head.scale.numel())


def pairs(x):
    """(B,3,T,H,W) -> each frame, and the next one: (F,3,1,H,W), F = B*(T-1)."""
    return each_frame(x[:, :, :-1]), each_frame(x[:, :, 1:])


def mean_square(error, weight):
    """error (F,1+n,D), weight (F,) -> a number."""
    return (error.float().square().mean((1, 2)) * weight).sum()


class ProjectionHead(nn.Module):
    """DINO's: an MLP of three layers, a unit vector, and its cosines with unit prototypes, times a
    scale each that starts at 1."""

    def __init__(self, width, prototypes, hidden, bottleneck, train_scale):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.scale = nn.Parameter(torch.ones(prototypes, 1), requires_grad=train_scale)
        init_weights(self, [], 0.02)
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))

    def forward(self, x):
        """x (...,D) -> unit vectors (...,d), prototypes (K,d). Their product is the logits, which
        are too many to exist at once: ChunkedCE."""
        unit = F.normalize(self.mlp(x).float(), dim=-1)
        return unit, self.scale * F.normalize(self.prototypes, dim=1)


class ChunkedCE(torch.autograd.Function):
    """sum over rows of weight * CE(p, q): of the teacher p = softmax((t Wt' - centre) / its
    temperature), of the student q = softmax(s Ws' / its temperature); s, t (R,d) unit vectors,
    Ws, Wt (K,d) prototypes, centre (K,), weight (R,), temp: both temperatures, student first.

    The (R,K) logits, 8 GB for 16 clips in the paper's setting, exist `rows` rows at a time: the
    gradients to s and Ws are found on the way forward, so nothing is kept or computed again. Also
    returns, without gradient, the teacher's mean entropy and mean logits (K,).
    """

    @staticmethod
    def forward(ctx, s, Ws, t, Wt, centre, weight, temp, rows):
        student_temp, teacher_temp = temp
        ds = torch.empty_like(s)
        dWs = torch.zeros_like(Ws)
        loss = s.new_zeros(())
        entropy = s.new_zeros(())
        mean = torch.zeros_like(centre)
        for start in range(0, len(s), rows):
            part = slice(start, start + rows)
            w = weight[part, None]
            # autocast multiplies in bf16; softmax and sums are float32
            raw = (t[part] @ Wt.T).to(s.dtype)  # (rows,K)
            p = ((raw - centre) / teacher_temp).softmax(-1)
            logits = (s[part] @ Ws.T).to(s.dtype) / student_temp
            total = logits.logsumexp(-1, keepdim=True)
            loss += (w * (total - (p * logits).sum(-1, keepdim=True))).sum()
            entropy += torch.special.entr(p).sum()
            mean += raw.sum(0)
            # dL / d(s Ws') = w (q - p) / temperature
            slope = (logits - total).exp_().sub_(p).mul_(w / student_temp)
            ds[part] = (slope @ Ws).to(s.dtype)
            dWs += (slope.T @ s[part]).to(Ws.dtype)
        ctx.save_for_backward(ds, dWs)
        entropy = entropy / max(1, len(s))
        mean = mean / max(1, len(s))
        ctx.mark_non_differentiable(entropy, mean)
        return loss, entropy, mean

    @staticmethod
    def backward(ctx, grad, *_):
        ds, dWs = ctx.saved_tensors
        return grad * ds, grad * dWs, None, None, None, None, None, None


# --- baselines: DINO and iBOT ---------------------------------------------------------------------
# The paper's, on the same frames: views of one frame take the place of two frames.

class Views(TDV):
    """DINO and, with --w_patch, iBOT. The teacher sees two global views of a frame, the student
    those, with iBOT's masks, and local crops. Teacher, head and centres are TDV's."""
    train_scale = False

    def __init__(self, args):
        super().__init__(dataclasses.replace(args, motion=False))
        self.mask_token = None  # takes the place of hidden patches
        if args.w_patch:
            self.mask_token = nn.Parameter(torch.zeros(self.encoder.width))

    def loss(self, x, index=None):
        """Clips x (B,3,T,H,W), and index (B,): their sample numbers, which decide the views."""
        a = self.args
        frames = x.shape[2]
        wide, local = self.views(x, index)  # [(F,3,1,size,size)], F = B*T
        with torch.no_grad():
            h = [self.target(view) for view in wide]  # [(F,1+n,D)]
        fill = (None, None)
        if a.w_patch:
            hidden = [self.hide(index, frames, view).to(x.device) for view in (0, 1)]  # [(F,n)]
            fill = [(mask, self.mask_token) for mask in hidden]
        z = [self.encoder(view, fill=mask) for view, mask in zip(wide, fill)]

        # CLS: from each view of the teacher to every other view of the student
        seen = [z[0][:, 0], z[1][:, 0]]
        if local:
            seen += self.encoder(torch.cat(local))[:, 0].chunk(len(local))
        students = []
        teachers = []
        for view, teacher in enumerate(h):
            others = seen[:view] + seen[view + 1:]
            students += others
            teachers += [teacher[:, 0]] * len(others)
        ce, said = self.ce(CLS, torch.cat(students), torch.cat(teachers))
        loss = a.w_cls * ce
        metrics = said | {"tokens": h[0][:, 0]}

        # patches: from each hidden one to itself; a view counts once, however many it hides
        if a.w_patch:
            hidden = torch.cat(hidden)  # (2F,n)
            weight = hidden / hidden.sum(1, keepdim=True).clamp(min=1)
            student = torch.cat(z)[:, 1:][hidden]  # (hidden patches,D)
            teacher = torch.cat(h)[:, 1:][hidden]
            ce, said = self.ce(PATCHES, student, teacher, weight[hidden] / len(hidden))
            loss = loss + a.w_patch * ce
            metrics |= said
        return loss, metrics

    @torch.no_grad()
    def views(self, x, index):
        """Two global views of each frame and the local ones, [(F,3,1,size,size)]."""
        a = self.args
        mean, std = x.new_tensor([IMAGENET["mean"], IMAGENET["std"]]).view(2, 3, 1, 1)
        image = each_frame(x)[:, :, 0] * std + mean  # (F,3,H,W) in [0,1]
        u = view_numbers(a.seed, index, x.shape[2], 2 + a.local_crops)
        u = u.flatten(0, 1).unbind(1)  # a view: (F,16)
        # of the two global views: shares that are blurred and solarised (DINO)
        special = (dict(blur=1.0), dict(blur=0.1, solarise=0.2))
        views = []
        with exact(x):  # bf16 would place pixels wrongly
            for view in (0, 1):
                views.append(augment(
                    image, u[view], a.size, a.global_scale, crop=view < a.random_crops,
                    colour=a.colour, **special[view]))
            for numbers in u[2:]:
                views.append(augment(image, numbers, a.local_size, a.local_scale, colour=a.colour))
        normalised = [((view - mean) / std)[:, :, None] for view in views]
        return normalised[:2], normalised[2:]

    def hide(self, index, frames, view):
        """iBOT hides patches of half of the frames: bool (F,n)."""
        a = self.args
        numbers = [2 * int(number) + view for number in index]
        return block_masks(a.seed, numbers, frames, self.encoder.grid[1:], *a.mask_ratio, 0.5)

    def flops(self):
        a = self.args
        n = math.prod(self.encoder.grid[1:])
        small = (a.local_size // a.patch) ** 2
        tokens = 2
        if a.w_patch:
            tokens += n * a.mask_ratio[0]  # of two views, half are masked
        student = self.encoder.flops(n, n, *[small] * a.local_crops)
        student += self.head_flops(tokens + a.local_crops)
        return a.frames * (3 * student + self.target.flops(n, n) + self.head_flops(tokens))


# random streams, with data.py's 0 to 3: default_rng([seed, stream, ...]) never meets another's
VIEWS = 4
BLOCKS = 5
# the uniform numbers that decide a view; there is room for two more
NUMBERS = (
    "area", "aspect", "left", "top", "flip", "jitter", "brightness", "contrast", "saturation",
    "hue", "grey", "blur", "radius", "solarise")


def view_numbers(seed, index, frames, views):
    """(B,frames,views,16) uniform, for the clips whose sample numbers are `index`: a function of
    the seed and a clip's number."""
    drawn = []
    for number in index:
        rng = np.random.default_rng([seed, VIEWS, int(number)])
        drawn.append(rng.random((frames, views, 16), dtype=np.float32))
    return torch.from_numpy(np.stack(drawn))


def augment(x, u, size, scale, crop=True, colour=True, blur=0.5, solarise=0.0):
    """DINO's view of each image: x (F,3,H,W) RGB in [0,1], u (F,16) uniform -> (F,3,size,size).

    crop: a random box of area `scale`, half of them flipped, else the whole image. colour: jitter
    for 80 %, grey for 20 %, blur and solarisation for these shares.
    """
    u = dict(zip(NUMBERS, u.to(x).unbind(1)))  # (F,) each
    box = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)  # the whole image
    if crop:
        box = random_box(u, scale)
    x = cut(x, box, size)
    if not colour:
        return x
    x = choose(u["jitter"] < 0.8, jitter(x, u), x)
    x = choose(u["grey"] < 0.2, grey(x), x)
    x = choose(u["blur"] < blur, gaussian_blur(x, u), x)
    return choose(u["solarise"] < solarise, torch.where(x < 0.5, x, 1 - x), x)


def choose(chosen, new, x):
    """new for the images that are chosen (F,), x (F,3,H,W) for the others."""
    return torch.where(chosen.view(-1, 1, 1, 1), new, x)


def random_box(u, scale):
    """Affine (F,2,3): a box of area `scale` and aspect 3/4 to 4/3, half of them flipped."""
    smallest, largest = scale
    area = smallest + (largest - smallest) * u["area"]
    aspect = (4 / 3) ** (2 * u["aspect"] - 1)
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area * (1 / aspect)).sqrt().clamp(max=1)
    left = (1 - width) * u["left"]
    top = (1 - height) * u["top"]
    turn = torch.where(u["flip"] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    across = torch.stack([width * turn, zero, 2 * left + width - 1], 1)
    down = torch.stack([zero, height, 2 * top + height - 1], 1)
    return torch.stack([across, down], 1)


def cut(x, box, size):
    """The boxes of x (F,3,H,W), resized bicubically -> (F,3,size,size)."""
    places = F.affine_grid(box, (len(x), 3, size, size), align_corners=False)
    x = F.grid_sample(x, places, mode="bicubic", padding_mode="border", align_corners=False)
    return x.clamp(0, 1)


def jitter(x, u):
    """Brightness and contrast by up to 0.4, saturation by 0.2, and hue."""
    x = stretch(x, 0.0, u["brightness"], 0.4)
    x = stretch(x, grey(x).mean((2, 3), keepdim=True), u["contrast"], 0.4)
    x = stretch(x, grey(x), u["saturation"], 0.2)
    return turn_hue(x, u)


def stretch(x, origin, u, strength):
    """x moved away from the origin, or to it, by up to this strength."""
    factor = (1 + strength * (2 * u - 1)).view(-1, 1, 1, 1)
    return ((x - origin) * factor + origin).clamp(0, 1)


def grey(x):
    """(F,3,H,W) -> (F,1,H,W), luma."""
    weights = x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def turn_hue(x, u):
    """About the grey axis of YIQ, by up to 0.1 of a turn."""
    angle = 0.2 * math.pi * (2 * u["hue"] - 1)
    yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    spin = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    spin[:, 1, 1] = angle.cos()
    spin[:, 1, 2] = -angle.sin()
    spin[:, 2, 1] = angle.sin()
    spin[:, 2, 2] = angle.cos()
    return torch.einsum("fij,fjhw->fihw", yiq.inverse() @ spin @ yiq, x).clamp(0, 1)


def gaussian_blur(x, u):
    """Of 0.1 to 2 pixels, cut at 6."""
    radius = 0.1 + 1.9 * u["radius"]
    offsets = torch.arange(-6, 7, device=x.device)
    taps = torch.exp(-0.5 * (offsets / radius[:, None]) ** 2)  # (F,13)
    taps = taps / taps.sum(1, keepdim=True)
    taps = taps.repeat_interleave(3, 0)  # (F*3,13)
    soft = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1)[None]  # (1,F*3,H+12,W+12)
    soft = F.conv2d(soft, taps[:, None, None], groups=len(taps))
    soft = F.conv2d(soft, taps[:, None, :, None], groups=len(taps))
    return soft.view_as(x)


def block_masks(seed, index, frames, grid, ratio, spread, share):
    """iBOT's masks: bool (B*frames,h*w), for the clips whose sample numbers are `index`. A share of
    the frames hides about ratio +- spread of its patches, in rectangles."""
    patches = math.prod(grid)
    hidden = np.zeros((len(index), frames, *grid), dtype=bool)
    for clip, number in zip(hidden, index):
        rng = np.random.default_rng([seed, BLOCKS, int(number)])
        for t in np.flatnonzero(rng.random(frames) < share):
            count = int(patches * rng.uniform(ratio - spread, ratio + spread))
            hide_blocks(rng, clip[t], min(max(1, count), patches))
    return torch.from_numpy(hidden).flatten(0, 1).flatten(1)


def hide_blocks(rng, frame, count):
    """Rectangles of aspect 0.3 to 3.3 in frame (h,w), until `count` patches or more are hidden."""
    h, w = frame.shape
    left = count
    while left > 0:
        area = rng.uniform(min(4, left), left)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height = min(max(round(math.sqrt(area * aspect)), 1), h)
        width = min(max(round(math.sqrt(area * (1 / aspect))), 1), w)
        top = rng.integers(h - height + 1)
        side = rng.integers(w - width + 1)
        frame[top: top + height, side: side + width] = True
        left = count - frame.sum()


# --- pictures and probes --------------------------------------------------------------------------

@torch.no_grad()
def show(run, net, objective, x):
    """A picture of the first clip of x (B,3,T,H,W); in the log, how far composition drifts from the
    teacher, frame by frame, beside the first frame's tokens held still."""
    frames = x.shape[2]
    moved = None
    with run.autocast():
        teacher = net(x, read="target")[:, frames:].unflatten(1, (frames, -1))  # (B,T,n,D)
        attention = net(x[:1], read="attention")  # (T,heads,n)
        if objective.motion is not None:
            z = net(x, read="compose")  # (B,T,1+n,D)
            moved = (z[0, 1:] - z[0, :-1]).norm(dim=-1)[:, 1:]  # (T-1,n)
            composed = drift(z, teacher)
            still = drift(z[:, :1].expand_as(z), teacher)
            run.log({"step": run.done, "drift": composed, "drift_still": still})
    if run.rank == 0:
        picture(run, x[0], teacher[0], attention, moved)


def drift(z, teacher):
    """z (B,T,1+n,D), teacher (B,T,n,D) -> a number a frame."""
    error = (z[:, :, 1:] - teacher).float().square().mean((0, 2, 3))
    return [round(value, 5) for value in error.tolist()]


def picture(run, x, teacher, attention, moved):
    """One clip, a column a frame: the frames x (3,T,H,W), the first three principal components of
    the teacher's patches (T,n,D), what its CLS attends to (T,heads,n), and how far the motion
    encoder moves each patch in the pair that begins there, (T-1,n) or None."""
    frames, size = x.shape[1:3]
    side = math.isqrt(teacher.shape[1])
    tokens = {
        "patches": colours(teacher.flatten(0, 1)),
        "CLS": shades(attention.float().mean(1)),
    }
    if moved is not None:
        tokens["motion"] = torch.cat([shades(moved.float()), torch.zeros(side * side, 3)])
    rows = [Row("clip", colour_frames(x))]
    for name, values in tokens.items():
        rows.append(Row(name, enlarge(values, (frames, side, side), size)))
    run.sample([f"frame {i}" for i in range(frames)], rows)


def shades(values):
    """Any shape -> grey (n,3) from 0 to 1."""
    return to_unit(values.cpu().reshape(-1, 1)).expand(-1, 3)


def accuracies(run, net, objective):
    """{name: accuracy} of five probes on means over a clip's tokens; {} without lists.

    teacher_acc: linear, on what the exported encoder has, the teacher's patches. student_acc: on
    the student's, of which a short run's teacher has only a share. probe_acc: on the teacher's and
    what the motion encoder knows. knn_acc, knn_student: the paper's monitor, on CLS.
    """
    def features(x):
        """(b,4D), with a motion encoder (b,5D)."""
        frames = x.shape[2]  # tokens: CLS of each frame, then patches
        with run.autocast():
            teacher = net(x, read="target")
            student = net(x, read="encoder")
            parts = [teacher[:, :frames], student[:, :frames]]
            parts += [student[:, frames:], teacher[:, frames:]]
            if objective.motion is not None:
                parts.append(net(x, read="motion_tokens"))
            return torch.cat([part.float().mean(1) for part in parts], 1)

    def head(probe, first, last):
        """The probe of these parts."""
        columns = slice(first * width, last * width)
        return lambda x, y, x_val: probe(x[:, columns], y, x_val[:, columns])

    width = objective.encoder.width
    heads = {
        "student_acc": head(linear_probe, 2, 3),
        "teacher_acc": head(linear_probe, 3, 4),
        "probe_acc": head(linear_probe, 3, 5),
        "knn_acc": head(knn_probe, 0, 1),
        "knn_student": head(knn_probe, 1, 2),
    }
    return run.probe(features, run.lists, run.clip, heads)


@torch.no_grad()
def knn_probe(x, y, xv, k=20, T=0.07):
    """Class predictions (nv,) for xv (nv,D) by a vote of the k nearest of x (n,D) in cosine
    similarity s, weighted exp(s/T)."""
    x = F.normalize(x.float(), dim=1)
    xv = F.normalize(xv.float(), dim=1)
    classes = int(y.max()) + 1
    out = []
    for part in xv.split(4096):
        s, nearest = (part @ x.T).topk(min(k, len(x)), 1)
        votes = torch.zeros(len(part), classes, device=x.device)
        votes.scatter_add_(1, y[nearest], (s / T).exp())
        out.append(votes.argmax(1))
    return torch.cat(out)


# --- the run --------------------------------------------------------------------------------------

OBJECTIVES = {"tdv": TDV, "views": Views}


def build(args):
    """The objective that these flags ask for."""
    return OBJECTIVES[args.objective](args)


def check(args):
    """Refuse flags that no objective can be made of."""
    if args.objective == "tdv" and args.frames < 2:
        raise UserError(f"--frames {args.frames}: a pair needs two")
    if args.objective == "views":
        smallest = args.size
        if args.local_crops:
            smallest = min(args.size, args.local_size)
            if args.local_size % args.patch or not args.local_size:
                raise UserError(f"--local_size {args.local_size} is not divisible by --patch "
                                f"{args.patch}")
        if args.colour and smallest < 8:
            raise UserError("--colour blurs by up to 6 pixels: views must have 8 or more")
    ratio, spread = args.mask_ratio
    if ratio < spread or ratio + spread > 1:
        raise UserError(f"--mask_ratio {ratio} {spread}: ratio minus and plus spread must lie in "
                        "[0, 1]")
    if args.freeze and not (args.init and args.objective == "tdv" and args.motion):
        raise UserError("--freeze trains the motion encoder of TDV alone, on an encoder that "
                        "--init gives")


def main(args):
    check(args)
    sketch = construct(build, dataclasses.replace(args, dry_run=True))
    args = budgeted(args, (1.0, sketch))
    run = Run(args)
    # bytes: four float32 arrays of logits in ChunkedCE
    run.fit(sketch, extra=16 * args.ce_rows * args.prototypes)
    if args.dry_run:
        return dry_run(run, sketch)
    objective = construct(build, args)
    sources = run.sources()
    run.continue_from(objective)
    run.open(__file__, sources)

    net = run.wrap(objective)  # what is called, trained and saved
    optimizer = adamw(objective, args, {"motion.": args.motion_lr})
    state = run.load(net, optimizer)
    meter = Meter(run, {"random_knn": None} | state)
    if run.done == 0 and not args.init:  # before learning: what it has to beat
        found = accuracies(run, net, objective)
        meter.state["random_acc"] = found.get("probe_acc")
        meter.state["random_knn"] = found.get("knn_acc")
    loader = run.loader(sources)

    for step in run.steps():
        # 1. the rates of this step
        rates = objective.schedules(step)
        set_rates(optimizer, rates)

        # 2. forward and backward, a micro-batch at a time
        for _ in run.passes(net):
            batch = meter.next(loader)
            x = data.prepare(batch, run.device)  # (b,3,T,H,W)
            with run.autocast():
                loss, metrics = net(x, batch["index"])
            (loss * (run.micro / run.per_rank)).backward()
            tokens = metrics.pop("tokens")
            meter.add(loss, metrics, batch, flops=objective.flops())

        # 3. the step; where a loss or gradient is not finite, all ranks skip it alike
        grad_norm = clip_gradients(objective, args.clip_grad)
        skip = meter.skip(step, grad_norm)  # 1.0 or 0.0, on the device
        optimizer.found_inf = skip
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step, skip)
        meter.after_step()

        # 4. log, pictures, checkpoint, probes
        if meter.logs():
            line = meter.line(rates, run.health(tokens, correction=0))
            if line.get("still"):  # the share of the change that motion explains
                line["recovered"] = 1 - line["mse"] / line["still"]
            run.log(line)
        if run.due(args.sample_every):
            show(run, net, objective, x)
        if meter.saves(net, x, batch["index"]):
            run.export(objective)
            run.save(net, optimizer, meter.state)
        if run.stop:
            break
        if run.probes():
            accuracies(run, net, objective)

    found = accuracies(run, net, objective) if run.done == args.steps else {}
    knn = {"knn_acc": found.get("knn_acc"), "random_knn": meter.state["random_knn"]}
    run.finish(meter.summary(found.get("probe_acc")) | knn)


if __name__ == "__main__":
    launch(main, ARGS)
