"""Probe a frozen encoder: train a small head on its features, and on nothing else, to see what they
hold.

    tokens = E(x), no gradient         (B,3,T,H,W) -> (B,N,D); a video's S temporal clips are one
                                       sequence (B,S*N,D)
    classify --head attentive    q + Attn(q, LN(tokens)), then z + MLP(LN(z)), then Linear
                                 q: one learned query (V-JEPA, appendix B.1)
             --head attentive4   three self-attention blocks over all tokens, then the same; a grid
                                 of rates and decays, trained at once (V-JEPA 2, SALT)
             --head linear       Linear on the standardised mean over tokens
             --head ridge        the same in closed form: few labels
             --head knn          the 20 nearest training clips by cosine of that mean vote with
                                 weight exp(cos / 0.07); nothing is trained
             --head readout      4DS's readout, as for all tasks of space and time
    pose, points, boxes, depth, segment, flow, stereo, detect
                                 by 4DS's protocol (A.2), a class each: labels, head, loss, metric
    physics                      nothing is trained: is the impossible video of a pair the one whose
                                 later frames are foretold worse?

    python probe.py classify --encoder out/laptop --data world --head attentive
    python probe.py classify --encoder random:out/laptop --data world       before any learning
    python probe.py classify --encoder pixels:diff --data world --head linear    without an encoder
    python probe.py all --encoder out/laptop --data world --seeds 0 1 2     every task, one table
    python probe.py depth --encoder vitl.pt --train scannet_train.txt --val scannet_val.txt
    python probe.py predict --head out/probe/head.safetensors --data my_videos/ --out called.csv
    python probe.py features --encoder out/laptop --data my_videos/ --out features.npz
    python probe.py compare out/*                                           a table of finished runs
    python probe.py plot --runs out/laptop out/laptop_salt                  accuracy against loss

Accuracy is a mean over all rows of the val list, where a video that cannot be read counts as wrong.
The best head of a grid is chosen on videos held out of the train list; val is looked at once, by
that head. The last line on stdout is one JSON object; out_dir/probe.jsonl adds the accuracy of each
class and the confusion matrix. Compare encoders with the same head only: attentive learns a good
deal from random weights (the world: 69 % against 15 % for linear). attentive4 trains 20 heads as
big as a small encoder: without a GPU give it one --grid_lr and one --grid_wd.

A new task is one class, below Task.
"""
import argparse
import contextlib
import copy
import csv
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # Ctrl-C leaves without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import tyro


@dataclass
class Args:
    """Defaults are V-JEPA's (appendix B.1, Table 6) unless the comment names another source."""
    task: tyro.conf.Positional[Literal[
        "classify", "pose", "points", "boxes", "depth", "segment", "flow", "stereo", "detect",
        "physics", "all", "predict", "features", "plot", "compare"]]  # a row of COMMANDS
    # a row of PROTOCOLS: a paper's values for the flags below that are not given
    protocol: str = ""
    # encoder
    # a weight file or the folder of a run or HF model; random:vit_s or random:PATH for random
    # weights; pixels:frame or pixels:diff for none
    encoder: str = ""
    # blocks to run before reading out; 0: what the encoder's file says, else all and the final norm
    layer: int = 0
    heads: int = 0  # attention heads of an encoder whose file and size do not tell them
    # four blocks, for heads on four layers; empty: quarters of --layer
    layers: tuple[int, ...] = ()
    # for linear, ridge and knn: the mean over patch tokens; of an encoder with CLS tokens their
    # mean, or (concat) one beside the other
    pool: Literal["mean", "cls", "concat"] = "mean"
    compile: bool = False  # the encoder's blocks
    runs: tuple[str, ...] = ()  # plot, compare: folders of runs; the word --runs may be left out
    baseline: str = ""  # compare: the run that the others are compared with; empty: the first
    # data
    # world: both splits of the built-in world, instead of --train and --val. predict, features: any
    # list, folder or video, labelled or not
    data: str = ""
    train: str = ""  # list of `path label` lines
    val: str = ""  # list of `path label` lines with no other labels than those of --train
    # of the train videos of each class, drawn by --seed; draws: so many seeds, their mean
    fraction: float = 1.0
    draws: int = 1
    train_clips: int = 2000  # of the built-in world, which has 2048
    val_clips: int = 1000  # 1024
    # frames per clip; 0, here and in the next three: what the encoder's file says, else 16, 4, -,
    # 224
    frames: int = 0
    stride: int = 0  # video frames between two frames of a clip
    fps: float = 0.0  # sample by time stamp at this rate instead
    size: int = 0  # pixels
    # videos that are too short for a clip: repeat their last frame, loop them, spread the frames
    # evenly, or count them as damaged
    short: Literal["repeat", "loop", "spread", "error"] = "repeat"
    # temporal clips per video, joined in one sequence (8 on K400; V-JEPA 2: 2 on SSv2)
    segments: int = 1
    views: int = 1  # spatial crops per clip in evaluation, softmax averaged over them (3)
    # n: n passes of random crops, flips and starts, pass e mod n in turn (20: the paper's)
    train_passes: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop of --train_passes
    crop_ratio: tuple[float, float] = (0.75, 1.33)  # its aspect ratio
    # instead, squares anywhere, as large as the short side / zoom (4DS: 239 of 224 pixels)
    zoom: float = 0.0
    flip: bool = True  # horizontal flip of half of the clips of --train_passes; of classify
    # head
    # of classify: attentive, attentive4, linear, ridge, knn or readout; of predict: a head's file
    head: str = "attentive"
    # learning rates; empty: those of HEADS; of space and time 4DS's 1e-4, 3e-4, 1e-3 (world: 2e-3)
    grid_lr: tuple[float, ...] = ()
    grid_wd: tuple[float, ...] = ()  # weight decays; each pair is one head, all are trained at once
    holdout: float = 0.1  # share of the train videos that chooses among the heads
    # regular expression: videos whose paths match with the same text are held out together (a
    # person: "user\\d+")
    group: str = ""
    epochs: int = 20  # of classify, but for readout
    # videos; 0: 32 for readouts, else the paper's 256, less (a multiple of 16) for lists that would
    # give fewer than 32 steps an epoch
    batch_size: int = 0
    seed: int = 0  # random weights, held-out videos, order, initial heads
    # tasks of space and time (4DS, appendix A), and all
    # 0: 40,000, fine-tuning 20,000, on the world 600; the first tenth, at most 1000, warms up (of
    # fine-tuning 15 %, at most 3000)
    steps: int = 0
    # of the readout; 0: the paper's (768 to 1024), on the world 128 and for convolutions 64
    width: int = 0
    resample: int = 0  # moments to which tokens are interpolated in time (16: 4DS's); 0: none
    readout: Literal["ours", "4ds"] = "ours"  # 4ds: as released, see Readout
    # of depth, segment, flow and stereo: metrics of the centre crop in the encoder's pixels; else
    # of whole frames in their own, of which tiles are read
    crop: bool = False
    tile: int = 0  # side in pixels; 0: as large as the centre crop that the head was trained on
    world_size: int = 0  # pixels of the world's val clips that are read by tiles; 0: as in training
    classes: int = 0  # of segment; 0: up to the highest in the labels of 512 train clips
    # train the encoder, too: at 0.003 of the head's rate, or 0.8 of it for every layer in between
    finetune: Literal["", "4ds", "vjepa"] = ""
    # of --finetune classify (V-JEPA, Table 8). mixup and cutmix, by turns: alpha of their Beta;
    # erasing: share of clips with a box of noise
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    head_drop: float = 0.0  # dropout of what classify's head reads
    smoothing: float = 0.0  # of classify's labels
    # physics: frames that are seen, of each window as long as a training clip; the rest is
    # foretold. Empty: half
    context: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()  # all: only these
    seeds: tuple[int, ...] = ()  # all: run each task for each of these; empty: --seed
    # predict (.csv, .npz), features (.npz, .safetensors, .csv)
    out: str = ""  # the file to write
    tokens: bool = False  # features: all tokens of a video instead of one vector
    windows: float = 0.0  # features: a vector for each part of a video, of about so many seconds
    # the run
    out_dir: str = "out/probe"  # probe.jsonl grows by a line a run; pictures are the last run's
    # features, found again by content; empty: out_dir/features. Delete its files at any time
    cache_dir: str = ""
    # features and labels of as many videos as fit are stored, on 90 % of the free disk at most;
    # those of the rest are made anew in each epoch
    cache_gb: float = 50.0
    # clips per pass of the encoder, videos per pass of the heads; their gradients are accumulated
    micro_batch: int = 16
    workers: int = -1  # loader processes; -1: what the machine has
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    device: str = ""  # empty: cuda where there is one
    dry_run: bool = False  # what training heads would cost; reads lists and no video
    # of --dry_run: what the device computes in a second; a CPU core has about 0.05
    tflops: float = 500.0


K400 = dict(segments=8, views=3, train_passes=20, frames=16, stride=4)
PROTOCOLS = {
    # Table 6, K400; SSv2: --segments 1
    "vjepa": K400 | dict(head="attentive"),
    # Table 7, ViT-L
    "vjepa_detect": dict(
        layers=(18, 20, 22, 24),
        grid_lr=(1e-4,),
        grid_wd=(0.05,),
        batch_size=64,
        frames=16,
    ),
    # Table 8, SSv2; K400: --grid_lr 3e-4 --epochs 35 --frames 16
    "vjepa_finetune": dict(
        head="linear",
        finetune="vjepa",
        grid_lr=(1e-4,),
        grid_wd=(0.05,),
        batch_size=64,
        frames=32,
        stride=4,
        size=384,
        views=3,
        train_passes=20,
        drop_path=0.2,
        head_drop=0.5,
        mixup=0.8,
        cutmix=1.0,
        erasing=0.25,
        smoothing=0.1,
    ),
    # SALT, appendix B; SSv2: --segments 2
    "vjepa2": K400 | dict(head="attentive4", size=256),
    "salt": K400 | dict(head="attentive4", size=224),
    # A.2; A.2.1 for classify
    "4ds": dict(
        head="readout",
        readout="4ds",
        frames=16,
        zoom=239 / 224,
        train_passes=20,
        flip=False,
    ),
    # D.2: 8 frames of the whole video, their CLS tokens side by side
    "tdv": dict(head="linear", pool="concat", frames=8, stride=100_000, short="spread"),
}


def parse_args(words=None):
    words = sys.argv[1:] if words is None else words
    if words[:1] in (["plot"], ["compare"]) and words[1:] and not words[1].startswith("-"):
        words = [words[0], "--runs", *words[1:]]
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--protocol", default="")
    name = peek.parse_known_args(words)[0].protocol
    if name and name not in PROTOCOLS:
        peek.exit(2, f"error: --protocol {name}: choose from {', '.join(PROTOCOLS)}\n")
    row = PROTOCOLS.get(name, {})
    if row:
        print(f"--protocol {name}: {row}", file=sys.stderr)
    return tyro.cli(Args, args=words, description=__doc__, default=Args(tyro.MISSING, **row))


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that --help is instant

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop
from tqdm import tqdm

import data
import model
from data import DataError

# --- heads of classification: tokens (B,N,D) -> logits (B,classes) --------------------------------


def several(many, make, *what):
    return nn.ModuleList(make(*what) for _ in range(many))


class Attentive(nn.Module):
    """The cross-attention block of V-JEPA's classifier, after `depth` self-attention blocks. The
    query is projected and has a residual; the attention has no output projection. With one query,
    Wk is applied to the query and Wv to the pooled tokens instead of both to all N tokens: the same
    function in 2*heads*N*D multiply-adds instead of 2*N*D*D. A bias on the keys would shift all
    scores alike: there is none."""

    def __init__(self, width, classes, heads, depth):
        super().__init__()
        self.heads = heads
        self.blocks = several(depth, model.Block, width, heads, 4 * width)
        self.query = nn.Parameter(torch.empty(width))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.k = nn.Parameter(torch.empty(width, width))
        self.mlp = model.Mlp(width, 4 * width, "gelu")
        self.linear = nn.Linear(width, classes)
        model.init_weights(self, self.blocks)
        for p in (self.query, self.k):
            nn.init.trunc_normal_(p, std=0.02)
        with torch.no_grad():
            self.mlp.fc2.weight.div_(math.sqrt(2 * (depth + 1)))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.norm1(x)
        width = x.shape[-1]
        keys = self.k.view(self.heads, -1, width)                       # (heads, D/heads, D)
        values = self.v.weight.view(self.heads, -1, width)
        q = self.q(self.query).view(self.heads, -1)
        q = torch.einsum("hd,hdc->hc", q, keys)                         # (heads, D)
        scores = torch.einsum("bnc,hc->bhn", x, q) / math.sqrt(width / self.heads)
        z = torch.einsum("bhn,bnc->bhc", scores.softmax(-1).to(x.dtype), x)
        z = torch.einsum("bhc,hdc->bhd", z, values).flatten(1) + self.v.bias    # (B, D)
        z = self.query + z
        return self.linear(z + self.mlp(self.norm2(z)))


class Standardised(nn.Module):
    """Linear on (x - mean) / std of the mean over tokens, by statistics of the train features."""

    def __init__(self, width, classes, heads=0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def start(self, x, y, penalty):
        """x (n,D) pooled train features, y (n,) their classes."""
        self.mean = x.mean(0)
        self.std = x.std(0) + 1e-6

    def forward(self, x):
        return self.linear((x.mean(1) - self.mean) / self.std)


class Ridge(Standardised):
    """The same in closed form: squared error on one-hot classes, penalty in units of n."""

    @torch.no_grad()
    def start(self, x, y, penalty):
        super().start(x, y, penalty)
        x = ((x - self.mean) / self.std).double()
        target = F.one_hot(y, len(self.linear.bias)).double()
        centre = target.mean(0)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        shrunk = s / (s**2 + penalty * len(x))
        weight = (target - centre).T @ u                                # (classes, n)
        self.linear.weight.copy_((weight * shrunk) @ v)
        self.linear.bias.copy_(centre)
        self.requires_grad_(False)


class Neighbours(nn.Module):
    """Log votes of the k nearest training features by cosine s, each with weight exp(s / T);
    softmax gives their shares. Nothing to train."""

    k = 20
    T = 0.07

    def __init__(self, width, classes, heads=0):
        super().__init__()
        self.register_buffer("x", torch.zeros(0, width, dtype=torch.double))
        self.register_buffer("votes", torch.zeros(0, classes, dtype=torch.double))

    def start(self, x, y, penalty):
        self.x = F.normalize(x.double(), dim=1)
        self.votes = F.one_hot(y, self.votes.shape[1]).double()

    def forward(self, x):
        x = F.normalize(x.mean(1).double(), dim=1)
        s, i = (x @ self.x.T).topk(min(self.k, len(self.x)), 1)
        return torch.einsum("bk,bkc->bc", (s / self.T).softmax(1), self.votes[i]).log()



# --- heads of space and time ----------------------------------------------------------------------
# Tokens z (B,N,D) of a grid (t,h,w), N = t*h*w -> what a task asks.


class Readout(nn.Module):
    """4DS's readout, one for every task (section 3.2, appendix A.2): LN(z) + positions ->
    cross-attention -> q + Linear -> + MLP(LN) -> Linear.

    grid: (t,h,w) of z. queries: a grid of learned queries, which are not projected; None: they are
    given. steps: resample z to so many moments first. Positions and queries are learned and start
    as sines and cosines: tokens of a rope encoder do not say where they are, and the paper has the
    queries of depth learned in one place and Fourier features in another.

    released: as in 4DS's code. Positions are one a moment, of 16; learned queries start as noise;
    given ones (B,Q,512) are projected, and it is the projected ones that are added to.
    """

    def __init__(
        self, in_width, grid, out, *, width, heads, queries=None, steps=0, released=False
    ):
        super().__init__()
        self.moments = grid[0]
        self.steps = 16 if released else steps or grid[0]
        self.mode = "bicubic" if released else "bilinear"
        place = (1, 1) if released else grid[1:]
        table = model.sincos_table(in_width, (self.steps, *place))
        self.norm = model.LayerNorm(in_width, eps=1e-6)
        self.positions = nn.Parameter(table[None].clone())
        self.queries = None
        self.project = nn.Identity()
        if queries:
            table = model.sincos_table(width, tuple(queries))[None].clone()
            self.queries = nn.Parameter(0.02 * torch.randn_like(table) if released else table)
        elif released:
            self.project = nn.Linear(512, width)
        self.attn = model.CrossAttention(width, heads, in_width, not (queries or released))
        self.norm2 = model.LayerNorm(width, eps=1e-6)
        self.mlp = model.Mlp(width, 4 * width, "gelu")
        self.linear = nn.Linear(width, out)

    def forward(self, z, q=None):
        """z (B,N,D), q (B,Q,width or 512) unless the queries are learned -> (B,Q,out)."""
        if self.steps != self.moments:
            series = z.unflatten(1, (self.moments, -1)).flatten(2)[:, None]     # (B, 1, t, n*D)
            series = F.interpolate(series, (self.steps, series.shape[3]), mode=self.mode)
            z = series[:, 0].unflatten(2, (-1, z.shape[2])).flatten(1, 2)
        each = z.shape[1] // self.positions.shape[1]
        z = self.norm(z) + self.positions.repeat_interleave(each, 1)
        q = self.queries.expand(len(z), -1, -1) if q is None else self.project(q)
        x = q + self.attn(q, z)
        return self.linear(x + self.mlp(self.norm2(x)))


def fourier(x, bases=16, released=False):
    """x (..., C) from 0 to 1 -> (..., C*2*bases): sin and cos of 1 to `bases` half turns; released:
    of 1, 2, 4 ... half turns of x from -1 to 1."""
    turns = torch.arange(1, bases + 1, device=x.device)
    if released:
        x = 2 * x - 1
        turns = 2.0 ** (turns - 1)
    angle = x[..., None] * turns * math.pi
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class Tracker(nn.Module):
    """A Readout whose queries are what is given of things in the first frame: Fourier features of C
    coordinates through an MLP, in `copies` with a learned embedding each, every copy answering for
    its part of the clip (4DS A.2.3: 8 for points; A.2.4: 1 for boxes)."""

    def __init__(self, in_width, grid, out, *, coordinates, frames, width, copies=1, **how):
        super().__init__()
        self.out = out
        self.released = how["released"]
        inner = 512 if self.released else width
        self.embed = nn.Sequential(
            nn.Linear(32 * coordinates, 512),
            nn.GELU(),
            nn.Linear(512, inner),
        )
        self.time = nn.Parameter(model.sincos_table(inner, (copies, 1, 1)).clone())
        self.readout = Readout(in_width, grid, frames // copies * out, width=width, **how)

    def forward(self, z, first):
        """z (B,N,D), first (B,O,C) as shares of the picture -> (B,O,T,out)."""
        q = self.embed(fourier(first, released=self.released))
        q = q[:, :, None] + self.time                                   # (B, O, copies, width)
        out = self.readout(z, q.flatten(1, 2))
        return out.view(*first.shape[:2], -1, self.out)


def conv(a, b, kernel=3):
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, padding="same", bias=False), nn.GroupNorm(8, b), nn.ReLU())


def resize(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear")


def pyramid(z, grid, convs):
    """z (B,n,4*D) of four layers, shallow to deep -> four maps of 4, 2, 1 and 1/2 times the grid
    (h,w), each through its convolution."""
    maps = []
    for layer, scale, convolve in zip(z.chunk(4, -1), (4, 2, 1, 0.5), convs):
        size = [max(1, int(side * scale)) for side in grid]
        layer = layer.transpose(1, 2).unflatten(2, grid)                # (B, D, h, w)
        maps.append(convolve(resize(layer, size)))
    return maps


class UPerNet(nn.Module):
    """Segmentation from four layers: pooling at several scales on the coarsest map, a feature
    pyramid over all of them, one classifier on their concatenation (Xiao et al., 2018). Maps of a
    plain ViT are resized to 4, 2, 1 and 1/2 times its grid; group norm for batch norm."""

    def __init__(self, in_width, grid, out, width, pools=(1, 2, 3, 6)):
        super().__init__()
        self.grid = grid
        self.pools = pools
        self.lateral = several(4, conv, in_width, width, 1)
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU()) for _ in pools)
        self.bottom = conv(width * (1 + len(pools)), width)
        self.fuse = conv(4 * width, width)
        self.smooth = several(3, conv, width, width)
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, z, size):
        """z (B,n,4*D) -> (B,out,*size)."""
        *x, coarse = pyramid(z, self.grid, self.lateral)
        scales = [coarse]
        for convolve, cells in zip(self.pooled, self.pools):
            pooled = convolve(F.adaptive_avg_pool2d(coarse, cells))
            scales.append(resize(pooled, coarse.shape[2:]))
        x.append(self.bottom(torch.cat(scales, 1)))
        for i in (2, 1, 0):
            x[i] = x[i] + resize(x[i + 1], x[i].shape[2:])
        x = [convolve(layer) for convolve, layer in zip(self.smooth, x)] + [x[3]]
        joined = torch.cat([resize(layer, x[0].shape[2:]) for layer in x], 1)
        return resize(self.out(self.fuse(joined)), size)


class TwoFrameDPT(nn.Module):
    """A picture of values for each place of one frame, told another (flow, stereo; TDV D.3, CroCo
    v2). Four blocks, each of self-attention, cross-attention to the other frame and MLP, take up
    one of four layers each; DPT's convolutions join their outputs from coarse to fine."""

    def __init__(self, in_width, grid, out, width, heads):
        super().__init__()
        self.grid = grid
        self.embed = nn.ModuleList(
            nn.Sequential(model.LayerNorm(in_width, eps=1e-6), nn.Linear(in_width, width))
            for _ in range(4))
        self.positions = nn.Parameter(model.sincos_table(width, (1, *grid))[None].clone())
        self.blocks = several(4, model.MotionBlock, width, heads, 4 * width, "xattn")
        self.lateral = several(4, conv, width, width)
        self.refine = several(4, conv, width, width)
        self.out = nn.Sequential(conv(width, width), nn.Conv2d(width, out, 1))

    def forward(self, z, other, size):
        """z, other (B,n,4*D) -> (B,out,*size)."""
        x = self.positions
        hooks = []
        layers = zip(self.embed, self.blocks, z.chunk(4, -1), other.chunk(4, -1))
        for embed, block, here, there in layers:
            x = block(x + embed(here), None, embed(there) + self.positions)
            hooks.append(x)
        maps = pyramid(torch.cat(hooks, -1), self.grid, self.lateral)
        x = torch.zeros_like(maps[3])
        for refine, finer in zip(self.refine[::-1], maps[::-1]):
            x = finer + resize(x, finer.shape[2:])
            x = x + refine(x)
        return resize(self.out(x), size)


# what classify can train: its rates, its decays (of ridge: penalties), how it is made of a width,
# classes and the encoder's attention heads
HEADS = {
    "attentive": ((1e-3,), (0.01,), partial(Attentive, depth=0)),
    # V-JEPA's of ImageNet (Table 2)
    "attentive2": ((1e-3,), (0.01,), partial(Attentive, depth=1)),
    "attentive4": (
        (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
        (0.8, 0.4, 0.1, 0.01),
        lambda width, classes, heads: Attentive(width, classes, 16, depth=3),
    ),
    "linear": ((1e-2, 3e-3, 1e-3, 3e-4), (0.1, 0.01), Standardised),
    "ridge": ((0.0,), (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), Ridge),
    "knn": ((0.0,), (0.0,), Neighbours),
    "readout": ((), (), None),
}
POOLED = ("linear", "ridge", "knn")  # read one vector a clip

# --- dense labels ---------------------------------------------------------------------------------

PER_CLIP = "K actions kind change".split()  # all other labels have a row for each frame
PICTURES = "depth masks flow flow_visible disparity disparity_visible".split()
# in a file that lacks it: wherever the other is known
SEEN = {"visible": "tracks", "flow_visible": "flow", "disparity_visible": "disparity"}


def read_labels(path, names, cut, size):
    """The arrays `names` of the .safetensors file beside the video `path`, of the frames and the
    box of `cut` (data.Cut), resized as crop_resize does to `size` pixels: (wide, high), or a side.

    A picture of labels may have another size than the frames; values in pixels are always pixels of
    the frames. One row may stand for all frames.
    """
    beside = Path(path).with_suffix(".safetensors")
    size = torch.as_tensor(size).expand(2)
    if not beside.is_file():
        raise DataError(f"{path}: no dense labels (no file {beside}); `python data.py index "
                        "LAYOUT ROOT` makes them")
    with safe_open(beside, "pt") as file:
        has = set(file.keys())

        def label(name):
            value = True
            if name in has:
                value = in_clip(name, label_rows(file, name, cut), cut, size)
            elif name not in SEEN:
                raise DataError(
                    f"{beside}: no label {name!r}; it has {', '.join(sorted(has))}")
            if name in SEEN:
                end = ends(label(SEEN[name]), name, size)
                value = value & ((end >= 0) & (end < size)).all(-1)
            return value

        return {name: label(name) for name in names}


def label_rows(file, name, cut):
    """The rows of one array that belong to the frames of a cut; of flow, to the steps between."""
    if name in PER_CLIP:
        return file.get_tensor(name)
    value = file.get_slice(name)
    rows = value.get_shape()[0]
    ids = torch.from_numpy(cut.ids)
    frames = cut.shape[0]
    if name.startswith("flow"):
        ids = ids[:-1]
        frames -= 1
    if rows not in (1, frames):
        raise ValueError(f"{name} has {rows} rows, and the video {cut.shape[0]} frames")
    if not len(ids):
        return value[:0]
    ids = ids.clamp_max(rows - 1)
    first = int(ids.min())
    return value[first : int(ids.max()) + 1][ids - first]


def in_clip(name, value, cut, size):
    """Labels of whole frames -> labels of the clip that is cut out of them and resized."""
    top, left, height, width = cut.box
    corner = torch.tensor([left, top])
    scale = size / torch.tensor([width, height])
    if name in PICTURES:
        for side, axis in ((0, 2), (1, 1)):
            centres = torch.arange(size[side]) + 0.5
            at = (corner[side] + centres / scale[side]) * value.shape[axis] / cut.shape[axis]
            value = value.index_select(axis, at.long())
    if name in ("right", "impossible"):
        if size.tolist() == [width, height]:
            return value[:, top : top + height, left : left + width]
        return data.crop_resize(value, cut.box, int(size[0]))
    if name == "flow":  # the last frame may be repeated
        steps = torch.from_numpy(np.diff(cut.ids) == 1)[:, None, None, None]
        return torch.where(steps, value * scale, math.nan)
    if name == "disparity":
        return value * scale[0]
    if name == "tracks":
        return (value - corner) * scale
    if name == "boxes":
        value = ((value.unflatten(-1, (2, 2)) - corner) * scale).clamp(torch.zeros(2), size)
        value = value.flatten(-2)
        return value.masked_fill((sides(value) <= 0).any(-1, keepdim=True), math.nan)
    if name == "K":
        moved = value[:2] - corner[:, None] * value[2:]
        return torch.cat([moved * scale[:, None], value[2:]])
    return value


def ends(value, name, size):
    """Where it leads: places of tracks, pixels moved by flow or disparity, (...,2)."""
    if name == "visible":
        return value
    centres = [torch.arange(side) + 0.5 for side in size]
    here = torch.stack(torch.meshgrid(centres, indexing="xy"), -1)
    if name == "flow_visible":
        return here + value
    return here + F.pad(-value[..., None], (0, 1))


def stack(values):
    """Tensors (or None) whose sizes differ -> one, filled up with "unknown": NaN, for masks 255,
    else 0."""
    given = [value for value in values if value is not None]
    if not given:
        return torch.full((len(values), 0), math.nan)
    like = given[0]
    fill = math.nan if like.is_floating_point() else 0
    if like.dtype == torch.uint8 and like.ndim == 3:
        fill = 255
    most = np.max([value.shape for value in given], 0)
    out = like.new_full((len(values), *most), fill)
    for row, value in zip(out, values):
        if value is not None:
            row[tuple(map(slice, value.shape))] = value
    return out


def dense_batches(source, clip, names, **how):
    """eval_batches with dense labels: each batch also holds the arrays `names`, b = clips as in
    "video" (one per video unless segments or views ask for more). The list's videos have them
    beside, clip.mp4 + clip.safetensors (`python data.py index`); the built-in world renders them.

        depth       (b,T,H,W)     float32  along the optical axis: metres; world: units, the wall is
                                           at about 1
        pose        (b,T,4,4)     float32  camera to world, axes x right, y down, z ahead; lengths
                                           as depth
        K           (b,3,3)       float32  pixels: u = (K @ (x,y,z))[0] / z
        masks       (b,T,H,W)     uint8    object or class; 255 not labelled. world: 0 wall, 1
                                           floor, 2, 3 spheres, 4, 5 boxes
        boxes       (b,T,O,4)     float32  x0, y0, x1, y1 in pixels of object o, NaN in all four
                                           where it is not seen. world: of objects 2 to 5
        tracks      (b,T,P,2)     float32  x, y in pixels of point p; visible (b,T,P) bool. world:
                                           all are visible in frame 0
        flow        (b,T-1,H,W,2) float32  pixels to the right and down until the next frame;
                                           flow_visible (b,T-1,H,W) bool: is seen there, too
        right       (b,T,H,W,3)   uint8    what a second camera on the right sees of the same moment
        disparity   (b,T,H,W)     float32  pixels to the left at which `right` shows it;
                                           disparity_visible (b,T,H,W) bool: is seen there
        impossible  (b,T,H,W,3)   uint8    the same scene with something impossible in it; "video"
                                           is the possible one
        kind        (b,)          int64    what is impossible (world: index into IMPOSSIBLE); change
                                           (b,) int64: the first frame that differs
        actions     (b,O,C)       uint8    1 for each of C actions that object o performs

    Column j of a picture covers x from j to j + 1, row i likewise: a pixel's centre is at
    (j + 0.5, i + 0.5). Floats are NaN where nothing is known, and O and P are filled up with NaN
    (actions 0, visible False) to the most in the batch; visible is False where the point is unknown
    or outside. Labels are cut and resized with the frames: nearest for pictures of labels, and
    values in pixels are moved and scaled. Where labels are asked for nothing is flipped. clip.train
    gives random starts and boxes as in eval_batches, which has the other keywords. Raises DataError
    for a label that a clip does not have, and for what would break the labels' time: fps (use
    stride), flow with a stride.
    """
    if names:
        if clip.fps or (clip.stride > 1 and any(name.startswith("flow") for name in names)):
            raise DataError(
                "dense labels are those of frames: give stride, not fps, and with flow stride 1")
        clip = replace(clip, flip=False)
        if source.split:  # the world renders its own
            how["names"] = names
        else:
            how["after"] = partial(with_labels, names=names, size=clip.size)
    return data.eval_batches(source, clip, **how)


def with_labels(batch, names, size):
    """A batch of files with the labels beside them, which its cuts say how to cut. One whose labels
    are damaged is unread."""
    many = len(batch["cut"]) // len(batch["path"])  # clips of a video
    labels = [{}] * len(batch["cut"])
    for i in batch["ok"].nonzero().flatten().tolist():
        path = batch["path"][i]
        clips = slice(i * many, (i + 1) * many)
        try:
            labels[clips] = [read_labels(path, names, cut, size) for cut in batch["cut"][clips]]
        except DataError:
            raise
        except data.DAMAGE as error:
            batch["ok"][i] = False
            batch["bad"].append((path, data.reason(error)))
            batch["video"][clips] = 0
    for name in names:
        batch[name] = stack([row.get(name) for row in labels])
    return batch

# --- features -------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """What needs no encoder: 24x16 grey pixels of the first frame, or their absolute differences
    between frames, as a single token."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, blocks=None):
        """x (B,3,T,H,W) -> (B,1,D)."""
        grey = torch.einsum("bcthw,c->bthw", x, x.new_tensor([0.299, 0.587, 0.114]))
        small = F.adaptive_avg_pool2d(grey, (16, 24))                   # (B, T, 16, 24)
        small = small[:, :1] if self.kind == "frame" else small.diff(dim=1).abs()
        return small.flatten(1)[:, None]


def load(args):
    """--encoder -> (module, its config)."""
    name = args.encoder
    if name in ("pixels:frame", "pixels:diff"):
        config = dict(model=name, mean=[0.0] * 3, std=[1.0] * 3)
        if args.data:
            config |= dict(frames=8, size=32)
        return Pixels(name[7:]), config
    if is_checkpoint(Path(name.removeprefix("random:"))):
        run = restore(args, "cpu")
        config = {**model.IMAGENET, **getattr(run, "pixels", {}), **getattr(run, "layers", {})}
        config |= {"model": run.args.model, "stride": run.args.stride, "fps": run.args.fps}
        return run.product, run.product.config | config
    override = {"heads": args.heads} if args.heads else {}
    try:
        return model.load_encoder(name, seed=args.seed, **override)
    except ValueError as error:
        raise DataError(f"--encoder {error}") from error


# one vector a clip, of tokens (b,n,D)
POOLS = {
    **dict.fromkeys(("mean", "cls"), partial(torch.mean, dim=1, keepdim=True)),
    "concat": lambda z: z.flatten(1)[:, None],
}


@dataclass(eq=False)
class Features:
    """Tokens of a list's videos and their labels, by row. Those of the first `kept` rows are stored
    on disk, those of the others made anew at every use.

    layers: blocks run before tokens are taken, their channels side by side. names: labels, see
    dense_batches; "right" is encoded as well. form: "grid", tokens without CLS; "all", with it; a
    row of POOLS, one vector a video. Turn t is the t-th random pass over the list; where nothing is
    random there is one. apart: pooled vectors of a video's S clips are not averaged. DataError: the
    encoder cannot take these clips, or has no such layer.
    """

    args: Args
    encoder: nn.Module
    config: dict
    source: data.Source
    clip: data.Clip
    device: torch.device
    layers: tuple
    names: tuple = ()
    form: str = "grid"
    apart: bool = False

    tuned = None  # an encoder that is trained, instead of the given one
    kept = 0

    def __post_init__(self):
        args = self.args
        config = self.config
        if not config.get("depth") and self.form not in POOLS:
            raise DataError(
                f"--encoder {args.encoder}: {args.task} needs tokens, and this gives one vector a "
                "clip: classify with --head linear, ridge or knn")
        if self.form in ("cls", "concat") and not config.get("cls"):
            raise DataError(f"--pool {self.form}: this encoder has no CLS token")
        if config.get("stills") and data.all_images(self.source):
            self.clip = replace(self.clip, frames=1)  # as in training
        clip = self.clip
        self.encoder.to(self.device).eval().requires_grad_(False)
        self.want = self.layers  # of these the batches have tokens
        self.keys = ["video", "right"] if "right" in self.names else ["video"]
        self.names = [name for name in self.names if name != "right"]
        self.pooled = self.form in POOLS
        self.apart = self.apart or not self.pooled
        self.type = torch.float32 if self.pooled else torch.float16  # on disk
        self.turns = args.train_passes if clip.train else 1
        self.bad = {}
        self.bf16 = args.dtype == "bf16"
        if args.dtype == "auto":
            self.bf16 = self.device.type == "cuda"
        tubelet = 1 if config.get("images") else config.get("tubelet", 1)
        side = clip.size // config.get("patch", clip.size)
        self.grid = (clip.segments * clip.frames // tubelet, side, side)
        try:
            self.shape = self.blank()[0].shape                          # (V, N, D)
        except ValueError as error:
            raise DataError(f"--encoder {args.encoder}: {error}") from error
        self.width = self.shape[-1] // len(self.layers)

    def blank(self):
        """Tokens of a black video (1,V,N,D)."""
        clip = self.clip
        clips = clip.segments * clip.views
        video = torch.zeros(clips, clip.frames, clip.size, clip.size, 3, dtype=torch.uint8)
        return self.encode(video, torch.zeros(clips, dtype=torch.bool))

    def autocast(self):
        kind = "cpu" if self.device.type == "meta" else self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bf16)

    def of(self, layers):
        """The same, whose batches have the tokens of these of the layers only; of none, labels
        alone, and nothing is encoded."""
        view = copy.copy(self)
        view.want = layers
        view.keys = self.keys if layers else []
        return view

    def encode(self, video, flip):
        """Clips (b*S*V,T,H,W,3) -> (b,V,S*N,D), of pooled forms N = 1: float32 on the device."""
        encoder = self.tuned or self.encoder
        blocks = self.layers if any(self.layers) else None
        first = 0  # patch token
        if self.config.get("cls"):
            first = self.clip.frames if self.config.get("images") else 1
        tokens = slice(first, None)
        if self.form not in ("grid", "mean"):
            tokens = slice(None if self.form == "all" else first)
        parts = []
        many = self.args.micro_batch
        for clips, flips in zip(video.split(many), flip.split(many)):
            x = data.prepare(
                {"video": clips, "flip": flips}, self.device, self.config["mean"],
                self.config["std"])
            with self.autocast():
                z = encoder(x, blocks=blocks).float()[:, tokens]
            parts.append(POOLS[self.form](z) if self.pooled else z)
        z = torch.cat(parts).unflatten(0, (-1, self.clip.segments, self.clip.views))
        z = z.transpose(1, 2)                                           # (b, V, S, N, D)
        return z.flatten(2, 3) if self.apart else z.mean(2)

    def batches(self, rows, size=0, turn=0, some=True):
        """For every `size` (0: --micro_batch) of these rows, those that can be read: {key: tokens
        (b,V,N,D)}, {name: labels (b,...)} and "class" with them, rows (b,). Where none can be: {},
        {}, (). some: of all these rows at least one, or DataError."""
        size = size or self.args.micro_batch
        turn %= self.turns
        seen = 0
        anew = self.fresh(rows[rows >= self.kept], size, turn)
        for start in range(0, len(rows), size):
            clips = {}
            for row in rows[start : start + size]:
                clip = self.stored(row, turn) if row < self.kept else next(anew)
                if clip is not None:
                    clips[row] = clip
            part = np.array([*clips], int)
            x = {}
            y = {"class": torch.from_numpy(self.source.labels[part]).to(self.device)}
            for name in next(iter(clips.values()), {}):
                values = [clip[name] for clip in clips.values()]
                if name in self.keys:
                    x[name] = self.wanted(torch.stack(values).to(self.device).float())
                else:
                    y[name] = stack(values).to(self.device)
            seen += len(part)
            yield x, y, part
        if some and not seen:
            *_, why = self.bad.values()
            raise DataError(f"{self.source.name}: no video can be read; the last one: {why}")

    def wanted(self, z):
        columns = z.unflatten(-1, (len(self.layers), -1))
        return torch.cat([columns[..., self.layers.index(i), :] for i in self.want], -1)

    def fresh(self, rows, size, turn):
        """Read these rows in order, `size` at a time, and yield of each {key: tokens (V,N,D)} with
        {name: label}, or None where it cannot be read."""
        if not (self.keys or self.names):
            yield from ({} for _ in rows)
            return
        args = self.args
        training = self.tuned and self.tuned.training
        batches = dense_batches(
            self.source,
            self.clip,
            self.names + self.keys[1:],
            rows=rows,
            batch_size=size,
            workers=args.workers,
            seed=args.seed * 1000 + turn,
        )
        for batch in batches:
            self.bad.update(batch["bad"])
            if not batch["ok"].any():
                yield from [None] * len(batch["ok"])
                continue
            columns = {name: batch[name] for name in self.names}
            mixes = training and (args.mixup or args.cutmix or args.erasing)
            if mixes:
                rng = np.random.default_rng((args.seed, turn, *batch["index"].tolist()))
                columns["other"], columns["share"] = mix(args, batch, rng)
            for key in self.keys:
                columns[key] = self.encode(batch[key], batch["flip"])
            for i, ok in enumerate(batch["ok"].tolist()):
                yield {name: values[i] for name, values in columns.items()} if ok else None

    # what is stored: files of a few hundred MB at most, each of so many rows

    def row_bytes(self):
        """As many as the first clip takes, in all turns."""
        labels = next(self.of(()).fresh([0], 1, 0)) or {}
        tokens = math.prod(self.shape) * len(self.keys) * self.type.itemsize
        return self.turns * (tokens + sum(value.nbytes for value in labels.values()))

    def store(self, folder, share=1.0):
        """Keep this share of the rows in a folder that is called after all that tokens depend on:
        weights, config, list and files, clips, and the code. What is there already is not computed
        again."""
        self.each = max(1, min(256, 2**28 // self.row_bytes()))
        labels = []
        if self.names or self.keys[1:]:
            labels = [Path(path).with_suffix(".safetensors") for path in self.source.paths]
        facts = [
            self.each,
            self.config,
            self.layers,
            self.names,
            self.keys,
            self.form,
            self.apart,
            self.bf16,
            self.clip.train and self.args.seed,
            asdict(self.clip),
            data.fingerprint([self.source]),
            data.look(labels, range(len(labels))).tolist(),
            weights_hash(self.encoder),
        ]
        code = [Path(file).read_bytes() for file in (data.__file__, model.__file__, __file__)]
        digest = hashlib.sha256(json.dumps(facts).encode() + b"".join(code))
        self.folder = folder / digest.hexdigest()[:32]
        self.folder.mkdir(exist_ok=True)
        self.kept = len(self.source)
        if share < 1:
            self.kept = int(share * self.kept) // self.each * self.each
        rows = np.arange(self.kept)
        parts = [rows[i : i + self.each] for i in range(0, self.kept, self.each)]
        rank, many = ranks()
        for turn in range(self.turns):
            missing = [part for part in parts if not self.file(part[0], turn).exists()]
            gathered([None])  # all have looked before any writes
            missing = missing[rank::many]
            clips = self.fresh([*chain(*missing)], self.args.micro_batch, turn)
            for part in missing:
                self.write(self.file(part[0], turn), list(islice(clips, len(part))))
            gathered([None])  # all have written
            for part in parts:
                told = open_file(self.file(part[0], turn)).metadata()["bad"]
                self.bad.update(json.loads(told))

    def file(self, row, turn):
        return self.folder / f"{turn}_{row // self.each}.safetensors"

    def write(self, file, clips):
        """A file of these clips, in place only when it is whole."""
        ok = torch.tensor([clip is not None for clip in clips])
        columns = {"ok": ok}
        for name in self.names + self.keys:
            values = stack([None if clip is None else clip[name] for clip in clips]).cpu()
            if name in self.keys:
                values = values.to(self.type)
                if not values[ok].isfinite().all():
                    raise DataError(f"{self.source.name}: features are not finite in "
                                    f"{self.type}; --cache_gb 0 keeps them in float32")
            columns[name] = values
        temp = file.with_suffix(f".{os.getpid()}")
        try:
            save_file(columns, temp, {"bad": json.dumps(self.bad)})
            model.put_in_place(temp, file)
        finally:
            temp.unlink(missing_ok=True)

    def stored(self, row, turn):
        """As fresh gives it."""
        file = open_file(self.file(row, turn))
        i = int(row % self.each)
        names = self.names + self.keys
        if names and not file.get_tensor("ok")[i]:
            return None
        return {name: file.get_slice(name)[i] for name in names}


@lru_cache(maxsize=512)
def open_file(path):
    return safe_open(path, "pt")


def weights_hash(encoder):
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def store_what_fits(args, *lists):
    """Of each list the same share of the rows, as --cache_gb and the disk allow."""
    folder = Path(args.cache_dir or f"{args.out_dir}/features")
    folder.mkdir(parents=True, exist_ok=True)
    room = min(args.cache_gb * 1e9, 0.9 * shutil.disk_usage(folder).free)
    needed = sum(features.row_bytes() * len(features.source) for features in lists)
    for features in lists if room else ():
        features.store(folder, room / needed)

# --- tasks ----------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a head is asked, how it is trained, and how its answers are scored.

    A subclass says, of labels y whose "y" is NaN (or 255) where nothing is known:
        labels(batch)         labels of dense_batches -> y, in a form of its own
        net()                 the head
        ask(net, x, y)        tokens {key: (b,V,N,D)} -> its output, and the y that this is about
        loss(out, y)          a mean; of errors to the `power`, if it does not say
        answer(out)           -> p, what is scored and predicted
        score(p, y)           -> rows (n,c); total(rows) -> {metric: value}, of sums their means
        constants(ys)         answers y -> p that look at no video; of them the best on train is the
                              baseline. None: there are no labels
        marks(p, y, clip, frame)   what a picture shows as truth and as answer
    """
    args: Args
    width: int  # of a token
    heads: int  # attention heads of the encoder
    grid: tuple  # (t,h,w) of a video's tokens
    frames: int
    size: int
    classes: int = 0
    mean: torch.Tensor | None = None  # (channels,) of the train labels, the units of the output
    std: torch.Tensor | None = None

    metrics = ()  # names of the means that are reported, first what counts
    names = ()  # labels that it needs, see dense_batches
    given = ()  # those that it is asked with
    channels = 0  # of the output, if it is in units of the train labels' mean and deviation
    deep = False  # reads four layers instead of one
    dense = False  # answers for each pixel
    pixels = False  # that are lengths in pixels
    at_once = True  # are the heads of a grid one computation? vmap cannot do all of convolutions
    power = 2  # of the errors that the loss is a mean of
    up = False  # higher is better
    folds = 1  # of a cross-validation that chooses a head where few videos would be held out

    def classes_of(self, ys, train):
        """How many classes: from labels y of some clips, and the train source."""
        return 0

    def moments(self, z):
        """(B,1,t*n,D) -> (B,t,n,D)."""
        return z[:, 0].unflatten(1, (self.grid[0], -1))

    def wide(self, paper, heads, world=128):
        """Width and heads of a readout: the paper's, and small ones for the built-in world."""
        width = self.args.width or (world if self.args.data else paper)
        return dict(width=width, heads=math.gcd(heads, width))

    def readout(self, paper, heads, out, grid=None, kind=Readout, **more):
        how = dict(steps=self.args.resample, released=self.args.readout == "4ds") | more
        return kind(self.width, grid or self.grid, out, **self.wide(paper, heads), **how)

    def pairs(self, rates=(), decays=()):
        """The grid of (learning rate, weight decay): as the flags say, else these, else 4DS's."""
        args = self.args
        usual = (2e-3,) if args.data else (1e-4, 3e-4, 1e-3)
        if args.finetune:
            usual = (1e-3,) if args.data else (1e-4, 3e-4)
        decay = 0.05 if args.finetune == "vjepa" else 1e-4
        return [*product(args.grid_lr or rates or usual, args.grid_wd or decays or (decay,))]

    def plan(self, videos):
        """Batch size, steps and warm-up: 4DS's (A.2)."""
        args = self.args
        most = 20_000 if args.finetune else 40_000
        steps = args.steps or (600 if args.data else most)
        warmup = min(3000, steps * 3 // 20) if args.finetune else min(1000, steps // 10)
        return args.batch_size or 32, steps, warmup

    def output(self, net, x, y):
        """ask, in the units of the labels."""
        out, y = self.ask(net, x, y)
        if self.mean is not None:
            known = out[..., : len(self.mean)] * self.std + self.mean
            out = torch.cat([known, out[..., len(self.mean) :]], -1)
        return out.float(), y

    def loss(self, out, y):
        return mean_of((self.answer(out) - y["y"])[known(y)].abs() ** self.power)

    def answer(self, out):
        return out[..., 0] if self.channels == 1 else out

    def total(self, rows):
        """Rows of sums."""
        total = rows.sum(0)
        return dict(zip(self.metrics, (total[:-1] / total[-1]).tolist()))

    def planes(self, p):
        """Answers of a dense task -> (n,C,H,W)."""
        p = p[..., None] if self.channels == 1 else p
        return p.flatten(0, -4).movedim(-1, 1)

    def marks(self, p, y, clip, frame):
        return (), ()

    def unread(self, labels):
        """Rows (1,c) of clips of these classes that cannot be read: none, but for classify."""
        return []

    def constants(self, ys):
        """Also sets mean and std, the units of the output. []: too few labels for either."""
        values = torch.cat([y["y"].reshape(-1, self.channels) for y in ys])
        values = values[values.isfinite().all(1)]
        if len(values) < 2:
            return []
        self.mean = values.mean(0)
        self.std = values.std(0) + 1e-6
        both = self.mean, values.median(0).values
        return [partial(everywhere, value.squeeze()) for value in both]


def everywhere(value, y):
    return value.expand_as(y["y"])


def commonest(task, ys):
    """Task.constants of a classifier."""
    values = torch.cat([y["y"].flatten() for y in ys])
    best = values[values < task.classes].bincount().argmax()
    return [partial(always, F.one_hot(best, task.classes).float())]


def always(p, y):
    return p.expand(*y["y"].shape, -1)


def known(y):
    return y["y"].isfinite()


def mean_of(errors):
    return errors.sum() / max(1, errors.numel())


def sums(*errors):
    """Errors of the same things -> their sums, and in the last column how many there are (1,c)."""
    count = errors[0].new_tensor(float(errors[0].numel()))
    return torch.stack([*(error.sum() for error in errors), count])[None]


class Classify(Task):
    """Top-1 accuracy. Probabilities are averaged over spatial views; a video that cannot be read
    counts as wrong."""
    up = True
    folds = 5

    @staticmethod
    def form(args):
        """Of Features; other tasks read the grid."""
        if args.head == "readout":
            return "grid"
        return args.pool if args.head in POOLED else "all"

    def classes_of(self, ys, train):
        return int(train.labels.max()) + 1

    def pairs(self):
        if self.args.finetune:
            return super().pairs()
        rates, decays, _ = HEADS[self.args.head]
        return super().pairs(rates, decays)

    def plan(self, videos):
        args = self.args
        if args.head == "readout" or args.finetune == "4ds":
            return super().plan(videos)
        batch = args.batch_size or max(16, min(256, videos // 512 * 16))
        steps = args.epochs * math.ceil(videos / batch)
        if args.finetune:
            steps = args.steps or steps
        return batch, steps, steps // 7 if args.finetune else 0  # 5 of Table 8's 35 epochs

    def labels(self, batch):
        mixed = {name: batch[name] for name in ("other", "share") if name in batch}
        return {"y": batch["class"], **mixed}

    def net(self):
        if self.args.head == "readout":
            return self.readout(768, 12, self.classes, queries=(1, 1, 1))
        *_, make = HEADS[self.args.head]
        return make(self.width, self.classes, self.heads)

    def ask(self, net, x, y):
        z = F.dropout(x["video"].flatten(0, 1), self.args.head_drop, net.training)
        out = net(z).flatten(1)                                         # (b*V, classes)
        return out.unflatten(0, x["video"].shape[:2]), y

    def loss(self, out, y):
        loss = partial(F.cross_entropy, out[:, 0], label_smoothing=self.args.smoothing)
        if "other" not in y:
            return loss(y["y"])
        mine = y["share"] * loss(y["y"], reduction="none")
        return (mine + (1 - y["share"]) * loss(y["other"], reduction="none")).mean()

    def answer(self, out):
        return out.softmax(-1).mean(1)                                  # (b, classes)

    def score(self, p, y):
        """label, what was called (of equal probabilities the lower class; of NaN none), is the
        label among the first five?, log-likelihood."""
        order = p.argsort(dim=1, descending=True, stable=True)
        order = order.masked_fill(p.isnan().any(1, keepdim=True), self.classes)
        five = (order[:, :5] == y["y"][:, None]).any(1)
        likelihood = (p.nan_to_num()[torch.arange(len(p)), y["y"]] + 1e-9).log()
        return torch.stack([y["y"], order[:, 0], five, likelihood], 1)

    def unread(self, labels):
        wrong = [self.classes, 0, math.log(1e-9)]
        return [torch.tensor([[label, *wrong]]).double() for label in labels]

    def total(self, rows):
        label, called, five, likelihood = rows.T
        top1 = (label == called).double().mean().item()
        return {"top1": top1, "top5": five.mean().item(), "likelihood": likelihood.mean().item()}

    constants = commonest


def confusion_of(rows, classes):
    """Rows of Classify -> (classes, classes + 1): row the class, column what it was called, the
    last one what could not be read."""
    label, called = rows[:, :2].long().T
    shape = (classes, classes + 1)
    return torch.bincount(label * shape[1] + called, minlength=math.prod(shape)).view(shape)


class Pose(Task):
    """The last camera in the first one's coordinates, three rows of rotation and translation (4DS
    A.2.2): the mean distance of a cube's corners moved by either pose."""
    metrics = ("epe",)
    names = ("pose",)
    channels = 12

    def labels(self, batch):
        first, last = batch["pose"][:, [0, -1], :3].unbind(1)           # copies (B, 3, 4)
        last[..., 3] -= first[..., 3]
        return {"y": (first[..., :3].mT @ last).flatten(1)}

    def net(self):
        return self.readout(
            self.width, 8, 12, grid=(2, *self.grid[1:]), queries=(1, 1, 1), steps=0)

    def ask(self, net, x, y):
        ends = self.moments(x["video"])[:, [0, -1]]
        return net(ends.flatten(1, 2))[:, 0], y

    def score(self, p, y):
        ok = known(y).all(1)
        apart = (rigid(p[ok]) - rigid(y["y"][ok])).view(-1, 3, 4)
        corners = [*product((-0.5, 0.5), (-0.5, 0.5), (0.5, 1.5), (1.0,))]
        return sums((apart.new_tensor(corners) @ apart.mT).norm(dim=-1))   # (B, 8)


def rigid(pose):
    """(B,12) -> the same with the nearest rotation (Procrustes)."""
    pose = pose.view(-1, 3, 4)
    u, _, v = torch.linalg.svd(pose[..., :3].double())
    u[..., 2] *= torch.linalg.det(u @ v)[:, None]  # no mirror
    return torch.cat([(u @ v).to(pose), pose[..., 3:]], 2).flatten(1)


class Track(Task):
    """Things given in the first frame, (B,O,T,...) as shares of the picture. In training a random
    64 of each clip (world: 16)."""
    up = True
    hidden = 0  # what an answer says of a thing besides its coordinates

    def ask(self, net, x, y):
        things = y["first"].shape[1]
        most = 16 if self.args.data else 64
        if net.training and things > most:
            pick = torch.randperm(things)[:most].to(y["first"].device)
            y = {name: value[:, pick] for name, value in y.items()}
        return net(x["video"][:, 0], y["first"].nan_to_num()), y

    def constants(self, ys):
        """Everything stays where it was."""
        return [self.still]

    def still(self, y):
        first = y["first"][:, :, None].expand(y["y"].shape)
        return F.pad(first, (0, self.hidden), value=1.0)

    def marks(self, p, y, clip, frame):
        things = y["first"][clip].isfinite().all(1).nonzero().flatten()[:16].tolist()
        return [[*zip(places[clip, things, frame], things)] for places in self.places(p, y)]

    def places(self, p, y):
        """Where things are and where they are said to be; NaN is not drawn."""
        return y["y"], p


class Points(Track):
    """Points that are seen in the first frame (4DS A.2.3): where they are and whether they are
    seen, Average Jaccard (TAP-Vid)."""
    names = given = ("tracks", "visible")
    hidden = 1

    def labels(self, batch):
        xy = batch["tracks"].transpose(1, 2) / self.size                # (B, P, T, 2)
        seen = batch["visible"].transpose(1, 2) & xy.isfinite().all(-1)
        first = xy[:, :, 0].masked_fill(~seen[:, :, :1], math.nan)
        return {"y": xy, "first": first, "seen": seen, "asked": seen[:, :, 0]}

    def net(self):
        return self.readout(
            1024, 8, 4, kind=Tracker, coordinates=2, frames=self.frames, copies=self.frames // 2)

    def loss(self, out, y):
        """Huber on places (its corner at 4 pixels of 256), cross-entropy on "is seen" and on "is
        off by more than 6 pixels of 256" (TAPIR's two numbers)."""
        asked = y["asked"][:, :, None].expand(y["seen"].shape)
        seen = y["seen"] & asked
        place = out[..., :2].sigmoid()
        off = (place.detach() - y["y"]).norm(dim=-1) > 6 / 256
        huber = F.huber_loss(place[seen], y["y"][seen], delta=4 / 256, reduction="none")
        visible = is_true(out[..., 2][asked], y["seen"][asked])
        return 100 * mean_of(huber) + 0.1 * visible + 0.1 * is_true(out[..., 3][seen], off[seen])

    def answer(self, out):
        """(B,P,T,3): place, and 1 where the point is called visible. TAPIR also hides points whose
        place is uncertain, which is right for good trackers only: where most places are off by more
        than 6 pixels it would hide nearly all of them."""
        visible = (out[..., 2:3] > 0).float()
        return torch.cat([out[..., :2].sigmoid(), visible], -1)

    def score(self, p, y):
        """Jaccard of each clip at 1, 2, 4, 8 and 16 pixels of 256 over the points seen in the first
        frame and all later frames -> (clips, 5)."""
        asked = y["asked"][:, :, None]
        seen = (y["seen"] & asked)[:, :, 1:]                            # (B, P, T-1)
        called = ((p[..., 2] > 0.5) & asked)[:, :, 1:]
        distance = (p[..., :2] - y["y"])[:, :, 1:].norm(dim=-1) * 256
        radius = torch.tensor([1, 2, 4, 8, 16], device=p.device)
        near = seen & (distance < radius.view(5, 1, 1, 1))              # (5, B, P, T-1)
        false = (called & ~near).sum((2, 3))
        jaccard = (near & called).sum((2, 3)) / (seen.sum((1, 2)) + false)
        return jaccard.T[(seen | called).flatten(1).any(1)]

    def total(self, rows):
        return {"aj": rows.mean().item(), "jaccard": rows.mean(0).tolist()}

    def places(self, p, y):
        """Points, if visible."""
        truth = y["y"].masked_fill(~y["seen"][..., None], math.nan)
        return truth, p[..., :2].masked_fill(p[..., 2:] <= 0.5, math.nan)


def is_true(logit, truth):
    return mean_of(F.binary_cross_entropy_with_logits(logit, truth.float(), reduction="none"))


class Boxes(Track):
    """Boxes that cover at least 0.5 % of the first frame (4DS A.2.4): mean IoU of every known box
    but the first frame's."""
    metrics = ("miou",)
    names = given = ("boxes",)

    def labels(self, batch):
        y = batch["boxes"].transpose(1, 2) / self.size                  # (B, O, T, 4)
        large = area_of(y[:, :, 0]) >= 0.005
        y = y.masked_fill(~large[:, :, None, None], math.nan)
        return {"y": y, "first": y[:, :, 0]}

    def net(self):
        return self.readout(1024, 4, 4, kind=Tracker, coordinates=4, frames=self.frames)

    def score(self, p, y):
        ok = known(y).all(-1)
        ok[:, :, 0] = False
        p = p[ok]
        y = y["y"][ok]
        low = torch.maximum(p[:, :2], y[:, :2])
        high = torch.minimum(p[:, 2:], y[:, 2:])
        both = area_of(torch.cat([low, high], 1))
        return sums(both / (area_of(p) + area_of(y) - both).clamp(min=1e-9))


def sides(boxes):
    """(...,4) -> (...,2): wide, high."""
    return boxes[..., 2:] - boxes[..., :2]


def area_of(boxes):
    return sides(boxes).clamp(min=0).prod(-1)


class Depth(Task):
    """Depth of each pixel from 0.001 to 10 m, 2x8x8 for each learned query (4DS A.2.5): AbsRel."""
    metrics = ("absrel",)
    names = ("depth",)
    channels = 1
    dense = True

    def queries(self):
        return (self.frames // 2, self.size // 8, self.size // 8)

    def labels(self, batch):
        depth = batch["depth"]
        return {"y": depth.masked_fill(~((depth > 0.001) & (depth < 10)), math.nan)}

    def net(self):
        return self.readout(1024, 16, 128, queries=self.queries())

    def ask(self, net, x, y):
        values = model.unpatch(net(x["video"][:, 0]), self.queries(), 2, 8)
        return values.movedim(1, -1), y                                 # (B, T, H, W, 1)

    def score(self, p, y):
        return sums(((p - y["y"]).abs() / y["y"])[known(y)])


class Moments(Task):
    """A picture of answers for each of a clip's t moments, (B,t,a,H,W,...) with a frames a moment,
    from four layers. In training one random moment of each clip that has labels."""
    deep = True
    dense = True
    at_once = False

    def of_moments(self, labels):
        return {"y": labels.unflatten(1, (self.grid[0], -1))}

    def views(self, x):
        """(B,t,n,4*D) of the tokens that the head is given for each moment."""
        return [x["video"]]

    def net(self):
        """Of two frames, and two numbers a pixel."""
        out = 2 * self.frames // self.grid[0]
        return TwoFrameDPT(self.width, self.grid[1:], out, **self.wide(768, 12, 64))

    def ask(self, net, x, y):
        views = self.views({key: self.moments(z) for key, z in x.items()})
        if net.training:
            truth = y["y"]
            some = (truth.isfinite() & (truth != 255)).flatten(2).any(2)
            some = some.float().cpu() + 1e-6
            at = (torch.arange(len(truth))[:, None], torch.multinomial(some, 1))
            views = [view[at] for view in views]
            y = y | {"y": truth[at]}
        each = self.frames // self.grid[0]
        out = net(*(view.flatten(0, 1) for view in views), size=(self.size, self.size))
        out = out.unflatten(1, (each, -1)).movedim(2, -1)
        return out.unflatten(0, views[0].shape[:2]), y


class Segment(Moments):
    """Classes of pixels, of the world wall, floor, spheres, boxes (its objects are classes only in
    pairs): mIoU and mAcc of the whole list's confusion."""
    names = ("masks",)
    up = True

    def classes_of(self, ys, train):
        return self.args.classes or 1 + max(self.top(y["y"]) for y in ys)

    def top(self, mask):
        return int(mask.masked_fill(mask == 255, 0).max())

    def labels(self, batch):
        mask = batch["masks"].long()
        if self.args.data:
            kinds = [0, 1] + [2] * data.SPHERES + [3] * data.BOXES + [255] * 256
            mask = torch.tensor(kinds, device=mask.device)[mask]
        top = self.top(mask)
        if self.classes and top >= self.classes:
            raise DataError(
                f"segment: a mask has the label {top}, but there are {self.classes} classes (of "
                f"the first clips of --train): give --classes {top + 1}")
        return self.of_moments(mask)

    def net(self):
        out = self.frames // self.grid[0] * self.classes
        return UPerNet(self.width, self.grid[1:], out, self.wide(512, 1, 32)["width"])

    def planes(self, p):
        return super().planes(p.softmax(-1))

    def loss(self, out, y):
        ok = y["y"] < 255
        return mean_of(F.cross_entropy(out[ok], y["y"][ok], reduction="none"))

    def score(self, p, y):
        """(1, C*C): row by row, what pixels of each class were called."""
        ok = y["y"] < self.classes
        pairs = y["y"][ok] * self.classes + p.argmax(-1)[ok]
        return torch.bincount(pairs, minlength=self.classes**2)[None]

    def total(self, rows):
        """Mean over classes that occur or are called, and accuracy over classes that occur."""
        counts = rows.sum(0).view(self.classes, -1)
        hit = counts.diag()
        truth = counts.sum(1)
        union = truth + counts.sum(0) - hit
        return {"miou": (hit / union).nanmean().item(), "macc": (hit / truth).nanmean().item()}

    constants = commonest


class Flow(Moments):
    """Optical flow to the next frame (TDV D.3): end-point error over all known pixels."""
    metrics = ("epe",)
    names = ("flow",)
    channels = 2
    pixels = True
    power = 1

    def labels(self, batch):
        out = torch.full_like(batch["flow"][:, :1], math.nan)  # the last frame's leads out of it
        return self.of_moments(torch.cat([batch["flow"], out], 1))

    def views(self, x):
        here = x["video"]
        return [here, torch.cat([here[:, 1:], here[:, -1:]], 1)]

    def score(self, p, y):
        error = (p - y["y"]).norm(dim=-1)
        return sums(error[known(y).all(-1)])


class Stereo(Moments):
    """Disparity of the left camera's pixels (CroCo v2): mean error, share over 0.5 and 1 pixel."""
    metrics = ("average", "bad0.5", "bad1")
    names = ("right", "disparity")
    given = ("right",)
    channels = 1
    pixels = True

    def labels(self, batch):
        return self.of_moments(batch["disparity"])

    def views(self, x):
        return [x["video"], x["right"]]

    def loss(self, out, y):
        """Negative log-likelihood of Laplace's distribution: |d - dhat| / b + log b, out = (dhat,
        log b)."""
        ok = known(y)
        log_b = out[..., 1][ok].clamp(-5, 5)
        error = (out[..., 0][ok] - y["y"][ok]).abs()
        return mean_of(error * (-log_b).exp() + log_b)

    def score(self, p, y):
        error = (p - y["y"])[known(y)].abs()
        return sums(error, (error > 0.5).float(), (error > 1).float())


class Detect(Task):
    """What each box does: AVA's actions, or how it moves in the world. The tokens of four layers
    under each box, weighted by how much of a patch it covers, averaged over the clip -> Linear;
    mean average precision."""
    names = ("boxes", "actions")
    given = ("boxes",)
    deep = True
    up = True

    def classes_of(self, ys, train):
        return ys[0]["y"].shape[2]

    def labels(self, batch):
        boxes = batch["boxes"]                                          # (B, T, O, 4)
        if self.args.data:
            return moves(boxes)
        y = {"boxes": boxes}
        if "actions" in batch:
            never = ~boxes.isfinite().all(-1).any(1)
            y["y"] = batch["actions"].float().masked_fill(never[..., None], math.nan)
        return y

    def net(self):
        width = 4 * self.width
        return nn.Sequential(model.LayerNorm(width), nn.Linear(width, self.classes))

    def ask(self, net, x, y):
        things = y["boxes"].shape[2]
        boxes = y["boxes"].nan_to_num() / self.size
        boxes = boxes.unflatten(1, (self.grid[0], -1)).flatten(2, 3)    # (B, t, a*O, 4)
        across = overlap(boxes[..., 0::2], self.grid[2])
        down = overlap(boxes[..., 1::2], self.grid[1])
        cover = (down[..., :, None] * across[..., None, :]).flatten(3)
        cover = cover.unflatten(2, (-1, things)).sum(2)                 # (B, t, O, n)
        cover = cover / cover.sum((1, 3), keepdim=True).clamp(min=1e-9)
        return net(torch.einsum("bton,btnd->bod", cover, self.moments(x["video"]))), y

    def loss(self, out, y):
        return is_true(out[known(y)], y["y"][known(y)])

    def score(self, p, y):
        """(boxes, 2*C): scores, then truth."""
        return torch.cat([p, y["y"]], 2)[known(y).all(2)]

    def total(self, rows):
        """Mean over the classes that occur."""
        scores, truth = rows.chunk(2, 1)
        found = [average_precision(s, y) for s, y in zip(scores.T, truth.T)]
        return {"map": torch.tensor(found, dtype=torch.double).nanmean().item()}

    def constants(self, ys):
        """All boxes alike."""
        return [lambda y: torch.zeros_like(y["y"])]

    def marks(self, p, y, clip, frame):
        """With the name and colour of the true class, and of the one with the highest score."""
        boxes = y["boxes"][clip, frame] / self.size
        names = [*(MOVES if self.args.data else range(self.classes)), "none"]
        both = []
        for scores in (y["y"], p):
            highest, called = scores[clip].nan_to_num().max(1)
            called = called.masked_fill(highest <= 0, -1).tolist()
            both.append([(box, k % 8, names[k]) for box, k in zip(boxes, called)])
        return both


def overlap(ends, cells):
    """Intervals (...,2) as shares -> (...,cells): how much of each of so many cells they cover."""
    edges = torch.arange(cells + 1, device=ends.device) / cells
    high = torch.minimum(ends[..., 1:], edges[1:])
    low = torch.maximum(ends[..., :1], edges[:-1])
    return (high - low).clamp(min=0)


MOVES = "right down nearer left up away".split()


def moves(boxes):
    """Which of MOVES the pictures of boxes (B,T,O,4) make, by a fifth of their size or more over
    the frames that show them. The middle frame's boxes alone are pooled, as of AVA's key frames:
    how a box moves would tell what it does."""
    frames = boxes.shape[1]
    seen = boxes.isfinite().all(-1)
    first = seen.int().argmax(1)                                        # (B, O)
    last = frames - 1 - seen.flip(1).int().argmax(1)
    clips = torch.arange(len(boxes))[:, None]
    things = torch.arange(boxes.shape[2])
    start = boxes[clips, first, things]                                 # (B, O, 4)
    end = boxes[clips, last, things]
    side = sides(start).clamp(min=1)
    moved = (end - start).unflatten(-1, (2, 2)).mean(-2) / side
    grown = sides(end).clamp(min=1) / side
    grown = grown.log().mean(-1, keepdim=True)
    y = (torch.cat([moved, grown, -moved, -grown], -1) > 0.2).float()
    key = torch.arange(frames, device=boxes.device) == frames // 2
    asked = seen[:, key].all(1) & (last > first)
    return {
        "y": y.masked_fill(~asked[..., None], math.nan),
        "boxes": boxes.masked_fill(~key[:, None, None], math.nan),
    }


def average_precision(scores, truth, envelope=True):
    """Area under the steps of precision over recall; what has equal scores is called together.
    envelope: precision is the best at this recall or a higher one (AVA, PASCAL VOC). scores, truth
    (n,) -> NaN where nothing is true."""
    if not truth.any():
        return math.nan
    _, group = torch.unique(-scores, return_inverse=True)
    hits = group.bincount(truth.double()).cumsum(0)
    called = group.bincount().cumsum(0)
    steps = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    precision = hits / called
    if envelope:
        precision = precision.flip(0).cummax(0).values.flip(0)
    return (steps * precision).sum()


TASKS = {
    "classify": Classify,
    "pose": Pose,
    "points": Points,
    "boxes": Boxes,
    "depth": Depth,
    "segment": Segment,
    "flow": Flow,
    "stereo": Stereo,
    "detect": Detect,
}

# --- the engine -----------------------------------------------------------------------------------


@dataclass
class Trained:
    """A head, its rates, what it scored on held-out videos, and the encoder if that was trained."""
    head: nn.Module | None
    lr: float
    wd: float
    encoder: nn.Module | None = None
    held_out: float | None = None


def ranks():
    """This process's number, and how many share the work (torchrun)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(values):
    """Lists of all ranks, on all ranks, in turn: of what was shared out as [rank::ranks]."""
    _, many = ranks()
    if many == 1:
        return values
    found = [None] * many
    dist.all_gather_object(found, values)
    order = chain(*itertools.zip_longest(*found, fillvalue=ranks))
    return [value for value in order if value is not ranks]


def fit(task, train, rows, pairs):
    """A head for each (lr, wd), all on the same batches of these rows: AdamW, linear warm-up,
    cosine. With --finetune a copy of the encoder is trained with each."""
    args = task.args
    if args.finetune and len(pairs) > 1:
        return [fit(task, train, rows, [pair])[0] for pair in pairs]
    train.tuned = None  # what the pair before has trained
    start = pooled_features(train, rows) if train.pooled else ()
    tried = []
    groups = []
    for lr, wd in pairs:
        torch.manual_seed(args.seed)  # all start alike
        head = task.net().to(train.device).train()
        if train.pooled:
            head.start(*start, wd)
        tried.append(Trained(head, lr, wd))
        groups += [dict(group, peak=lr) for group in model.param_groups(head, wd)]
    if args.finetune:
        encoder = copy.deepcopy(train.encoder).requires_grad_(True).train()
        drop_paths(encoder, args.drop_path)
        if args.compile:
            model.compile_blocks(encoder)
        tried[0].encoder = encoder
        groups += encoder_groups(tried[0], args.finetune, max(train.want))
        train.tuned = encoder
    if not groups:
        return tried
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    batch, steps, warmup = task.plan(len(rows))
    micro = math.gcd(batch, min(batch, args.micro_batch))
    parts = endless(train, rows, batch, micro, args.seed)
    for step in tqdm(range(steps), desc=args.task, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = max(1e-7, group["peak"] * rate(step, steps, warmup))
        for i, (x, labels, share, last) in enumerate(parts):
            if share:
                y = task.labels(labels)
                for heads in together(task, tried, micro * x["video"][0].numel()):
                    # what a head picks at random does not depend on the other heads
                    torch.manual_seed(args.seed * 1_000_003 + step + 1_000_000_007 * i)
                    backward(heads, partial(loss_of, task, train, x, y, share))
            if last:
                break
        optimizer.step()
        optimizer.zero_grad()
    if args.finetune:
        train.tuned.eval()
    return tried


def drop_paths(encoder, most):
    """Stochastic depth: a clip leaves out each branch of a block by chance, at a rate that rises
    linearly to `most`."""
    for i, block in enumerate(encoder.blocks if most else ()):
        rate = most * i / max(1, len(encoder.blocks) - 1)
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(partial(drop_path, rate))


def drop_path(rate, branch, inputs, out):
    if branch.training:
        kept = torch.rand(len(out), 1, 1, device=out.device) >= rate
        return out * kept / (1 - rate)


def mix(args, batch, rng):
    """Clips (b,T,H,W,3) of classes "class", in place: a box of noise, then mixup or cutmix with
    another clip that could be read -> its class and the share of one's own (b,)."""
    video = batch["video"]
    side = video.shape[2]
    for clip in video:
        if rng.random() < args.erasing:
            top, left, h, w = data.random_box(rng, side, side, (0.02, 1 / 3), (0.3, 3.3))
            noise = rng.integers(256, size=(len(clip), h, w, 3), dtype=np.uint8)
            clip[:, top : top + h, left : left + w] = torch.from_numpy(noise)
    readable = batch["ok"].nonzero().flatten().numpy()
    other = torch.from_numpy(rng.choice(readable, len(video)))
    share = 1.0
    if args.cutmix and not (args.mixup and rng.random() < 0.5):
        half = side * math.sqrt(1 - rng.beta(args.cutmix, args.cutmix)) / 2
        centre = rng.uniform(0, side, 2)
        edges = np.stack([centre - half, centre + half]).clip(0, side).round().astype(int)
        (top, left), (bottom, right) = edges
        share = 1 - (bottom - top) * (right - left) / side**2
        video[:, :, top:bottom, left:right] = video[other, :, top:bottom, left:right]
    elif args.mixup:
        share = rng.beta(args.mixup, args.mixup)
        video[:] = (share * video + (1 - share) * video[other]).round()
    return batch["label"][other], torch.full((len(video),), share)


def loss_of(task, train, x, y, share, net):
    with train.autocast():
        out, asked = task.output(net, x, y)
    return task.loss(out, asked) * share


ACTIVATIONS = 4e9  # bytes of the heads that are computed at once, at about 200 for each token value


def together(task, tried, values):
    """The heads in parts that are computed at once on so many token values."""
    heads = [one.head for one in tried]
    many = max(1, int(ACTIVATIONS / (200 * values))) if task.at_once else 1
    return [heads[i : i + many] for i in range(0, len(heads), many)]


ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def backward(heads, loss):
    """loss(net) of each of these heads, which have one shape; several are one computation, over
    weights (heads,...)."""
    if len(heads) == 1:
        return loss(heads[0]).backward()
    states = [head.state_dict(keep_vars=True) for head in heads]
    weights = {}
    for name in states[0]:
        weights[name] = torch.stack([state[name] for state in states])

    def one(weights):
        def net(*inputs, **named):
            return torch.func.functional_call(heads[0], weights, inputs, named)

        net.training = True
        return loss(net)

    # the CPU's own attention has no form for several heads at once
    with sdpa_kernel(ATTENTION):
        torch.func.vmap(one, randomness="same")(weights).sum().backward()


def encoder_groups(trained, how, depth):
    """Of an encoder that is trained with a head that reads after `depth` blocks: 0.003 of its rate
    (4DS, C), or 0.8 of it for each layer that lies between (V-JEPA, Table 8)."""
    factors = {"": 0.003}
    if how == "vjepa":
        factors = {"norm.": 1.0}
        for i in range(len(trained.encoder.blocks)):
            factors[f"blocks.{i}."] = 0.8 ** max(0, depth - i)
        factors[""] = 0.8 ** (depth + 1)
    groups = model.param_groups(trained.encoder, trained.wd, factors)
    return [dict(group, peak=trained.lr * group["factor"]) for group in groups]


def rate(step, steps, warmup):
    """As a share of the highest."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def endless(train, rows, batch, micro, seed):
    """Shuffled passes over these rows, without end, `micro` at a time: tokens, labels, how much of
    its step's batch they are, are they the last of it? (A pass ends with a smaller batch.)"""
    for turn in itertools.count():
        order = np.random.default_rng((seed, turn)).permutation(rows)
        done = 0
        for x, labels, part in train.batches(order, micro, turn):
            size = min(batch, len(order) - done // batch * batch)
            done = min(done + micro, len(order))
            yield x, labels, len(part) / size, done % batch == 0 or done == len(order)


def pooled_features(train, rows):
    """(n,D) and classes (n,), of the first pass."""
    batches = train.batches(rows)
    read = [(x["video"][:, 0, 0], y["class"]) for x, y, part in batches if len(part)]
    return [torch.cat(parts) for parts in zip(*read)]


@torch.no_grad()
def evaluate(task, features, rows, answers):
    """Each of these functions (x, y) -> p over these rows: the rows of task.score, and the first
    batch's p of the last function, y and rows."""
    scored = [[] for _ in answers]
    first = None
    seen = []
    for x, labels, part in features.batches(rows):
        seen += part.tolist()
        if not len(part):
            continue
        y = task.labels(labels)
        for found, answer in zip(scored, answers):
            p = answer(x, y)
            found.append(task.score(p, y).double().cpu())
        first = first or (p, y, part)
    lost = task.unread(features.source.labels[np.setdiff1d(rows, seen)])
    for found in scored:
        found += lost
    return [torch.cat(found) for found in scored], first


def evaluate_heads(task, features, rows, tried):
    """The same of heads, each with the encoder that was trained with it."""
    scored = []
    for some in [[one] for one in tried] if task.args.finetune else [tried]:
        features.tuned = some[0].encoder
        answers = [reader(task, features, one.head) for one in some]
        found, first = evaluate(task, features, rows, answers)
        scored += found
    return scored, first


def reader(task, features, head):
    """A head as a function (x, y) -> p."""
    head.eval()

    def answer(x, y):
        with features.autocast():
            out, _ = task.output(head, x, y)
        return task.answer(out)

    return answer


def whole_clip(task, features, row):
    """A clip that is not cut, {key: (T,H,W,3)}, its labels, and the height and width of its centre
    crop, all in its own pixels, which may not be square."""
    source = features.source
    clip = features.clip
    names = features.names + features.keys[1:]
    if source.split:
        high = wide = task.args.world_size
        made = data.World(source.split, frames=clip.frames, size=high).render([row], names)
        made = {name: value[0] for name, value in made.items()}
        box = (0, 0, high, wide)  # as in training: the world is not cropped
    else:
        path = source.paths[row]
        video = data.open_frames(path)
        frames = None
        while frames is None:
            with contextlib.suppress(data.Recount):
                ids = data.frame_positions(video.frames, clip)
                frames, _ = video.by_number(ids)
        _, high, wide, _ = frames.shape
        ((box,),) = data.stored_boxes(video, (high, wide), clip, [None])
        cut = data.Cut(ids, (0, 0, high, wide), (video.frames, high, wide), False)
        made = read_labels(path, names, cut, (wide, high)) | {"video": frames}
    return {key: made.pop(key) for key in features.keys}, made, box[2:]


def starts(length, side):
    """Where tiles begin that cover a length and overlap by half or more."""
    many = 1 + math.ceil(2 * (length - side) / side)
    return evenly(length - side + 1, many).tolist()


@torch.no_grad()
def evaluate_whole(task, features, rows, head, constant):
    """Scores of a dense task on whole frames, of a head and of the constant. Tiles are resized to
    what the head was trained on, its answers back, and averaged."""
    size = features.clip.size
    answer = reader(task, features, head)
    still = torch.zeros(1, dtype=torch.bool)
    scored = []
    for row in rows:
        try:
            clips, labels, crop = whole_clip(task, features, row)
        except data.DAMAGE as error:
            features.bad[features.source.paths[row]] = data.reason(error)
            continue
        y = task.labels({name: value[None].to(features.device) for name, value in labels.items()})
        y = {"y": y["y"].flatten(0, -4 if task.channels > 1 else -3)}   # (n, H, W, ...)
        high, wide = clips["video"].shape[1:3]
        share = min((task.args.tile or crop[0]) / crop[0], high / crop[0], wide / crop[1])
        h, w = [round(share * side) for side in crop]
        scale = [w / size, h / size][: task.channels] if task.pixels else [1.0]
        scale = torch.tensor(scale, device=features.device)
        total = 0
        for top, left in product(starts(high, h), starts(wide, w)):
            x = {}
            for key, clip in clips.items():
                cut = data.crop_resize(clip, (top, left, h, w), size)
                x[key] = features.wanted(features.encode(cut[None], still))
            p = resize(task.planes(answer(x, {})), (h, w))              # (n, C, h, w)
            p = torch.cat([scale[:, None, None] * p, torch.ones_like(p[:, :1])], 1)
            total = total + F.pad(p, (left, wide - left - w, top, high - top - h))
        p = task.answer((total[:, :-1] / total[:, -1:]).movedim(1, -1))
        scored.append([task.score(one, y).double().cpu() for one in (p, scale * constant(y))])
    return [torch.cat(found) for found in zip(*scored)]


def hold_outs(paths, group, share, seed, folds=1):
    """Rows of a list -> [(rows to train on, rows held out)]: whole videos, or whole groups of them,
    chosen by seed. Where fewer than 50 would be held out, `folds` parts of the list in turn."""
    names = []
    for path in paths:
        match = group and re.search(group, path)
        names.append(match[0] if match else path)
    videos, video = np.unique(names, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(videos))
    count = max(1, round(share * len(videos)))
    parts = [order[:count]]
    if folds > 1 and count < 50:
        parts = np.array_split(order, min(folds, len(videos)))
    splits = []
    for part in parts:
        held = np.isin(video, part)
        if held.all():
            raise DataError(f"nothing is left to train on: all {len(paths)} videos are held "
                            f"out (--holdout {share}, --group {group!r})")
        splits.append((np.flatnonzero(~held), np.flatnonzero(held)))
    return splits


def choose(task, train):
    """Train --head with each pair of its grid -> the best, and all that were tried. It is chosen on
    held-out videos, for classify the likelihood there deciding between equals. A single pair needs
    no choice and is trained on all videos."""
    args = task.args
    pairs = task.pairs()
    rows = np.arange(len(train.source))
    if len(pairs) == 1:
        tried = fit(task, train, rows, pairs)
        return tried[0], tried
    rank, many = ranks()  # heads are shared among the ranks
    folds = 1 if args.finetune else task.folds
    splits = hold_outs(names_of(train.source), args.group, args.holdout, args.seed, folds)
    scored = [[] for _ in pairs]
    for some, held in splits:
        tried = []
        found = []
        if pairs[rank::many]:
            tried = fit(task, train, some, pairs[rank::many])
            found, _ = evaluate_heads(task, train, held, tried)
        for mine, part in zip(scored, gathered(found)):
            mine.append(part)
    totals = [task.total(torch.cat(mine)) for mine in scored]
    tested = [Trained(None, *pair, held_out=headline(total)) for pair, total in zip(pairs, totals)]
    i = best_of(totals, task.up)
    if len(splits) > 1:  # folds have chosen the rates; the head gets all videos
        (best,) = fit(task, train, rows, pairs[i : i + 1])
    else:
        best = gathered([one if rank + many * k == i else None for k, one in enumerate(tried)])[i]
        best.head.to(train.device)
        if best.encoder:
            best.encoder.to(train.device)
    best.held_out = tested[i].held_out
    return best, tested


def headline(total):
    return next(iter(total.values()))


def best_of(totals, up):
    """Index of the best metric; one that is not finite loses."""
    def order(i):
        value = headline(totals[i])
        if not math.isfinite(value):
            return -math.inf, 0
        return value if up else -value, totals[i].get("likelihood", 0)
    return max(range(len(totals)), key=order)


def lists(args, labelled=True, rooms=False):
    """The train and the val source. rooms: of the built-in world, the splits for tasks of space."""
    given = (args.data, bool(args.train), bool(args.val))
    if given not in (("world", False, False), ("", True, True)):
        raise DataError("give --train LIST and --val LIST, or --data world")
    if args.data:
        # none shares a clip with what encoders are trained on
        splits = ("rooms", "rooms_val") if rooms else ("probe", "val")
        train, val = [data.parse_list("world", split) for split in splits]
        return rows_of(train, slice(args.train_clips)), rows_of(val, slice(args.val_clips))
    train, val = [data.parse_list(spec, labelled=labelled) for spec in (args.train, args.val)]
    if labelled:
        train, val = data.match_classes(train, val)
    if args.fraction < 1:
        train = rows_of(train, few(train.labels, args.fraction, args.seed))
    return train, val


def few(labels, fraction, seed):
    """Rows of this share of each class, at least one, drawn by seed."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = []
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        rows += mine[: max(1, round(fraction * len(mine)))].tolist()
    return sorted(rows)


def rows_of(source, rows):
    """These rows of a list (of the world, which has no paths, or a slice of it)."""
    paths = source.paths
    if len(paths):
        paths = data.Paths.of([paths[row] for row in rows])
    return replace(source, labels=source.labels[rows], paths=paths, facts=None)


def check_classes(train, val):
    """val may have no other classes than train."""
    for row in np.flatnonzero(~np.isin(val.labels, train.labels)):
        label = val.labels[row]
        told = val.classes[label] if val.classes else label
        raise DataError(f"--val: {names_of(val)[row]}: label {told} is not in --train")


def clip_of(args, config, tasks=("classify",)):
    """How clips are taken: as the flags say, else as the encoder's file does. Labels of space and
    time are those of frames, of flow those of neighbours."""
    space = args.task == "all" or {*tasks} != {"classify"}
    stride = args.stride or config.get("stride", 4)
    fps = args.fps
    if not (space or fps or args.stride):
        fps = config.get("fps")
    if space and ("flow" in tasks or args.data):
        stride = 1
    return data.Clip(
        args.frames or config.get("frames", 16),
        stride,
        fps or None,
        args.size or config.get("size", 224),
        args.crop_scale,
        args.crop_ratio,
        short=args.short,
        flip=args.flip and not space,
        segments=1 if space else args.segments,
        zoom=args.zoom,
        train=False,
    )


def layers_of(task, args, config):
    """How many blocks run before a head reads: --layer, else what the file says, else all. 4DS's
    says 75 % for frozen classification alone. Tasks on four layers take quarters of that depth."""
    frozen = None if args.finetune else config.get(f"layer_{task}")
    top = args.layer or frozen or config.get("layer") or config.get("depth", 0)
    if not TASKS[task].deep:
        return (top,)
    return args.layers or tuple(max(1, round(top * quarter / 4)) for quarter in (1, 2, 3, 4))


def open_features(args, tasks, device):
    """The train and the val Features of --encoder that these tasks share, stored if they fit."""
    space = args.task == "all" or {*tasks} != {"classify"}
    classified = "classify" in tasks
    form = "grid" if space else Classify.form(args)
    source, val_source = lists(args, classified, rooms=form == "grid")
    if classified:
        check_classes(source, val_source)
    encoder, config = load(args)
    if args.compile:
        model.compile_blocks(encoder)
    clip = clip_of(args, config, tasks)
    if form == "grid" and args.width % 8:
        raise DataError(f"--width {args.width}: readouts have a width that 8 divides")
    if form == "grid" and (clip.frames % 2 or clip.size % 8):
        raise DataError(f"--frames {clip.frames} must be even, --size {clip.size} divisible by 8")
    layers = sorted({*chain(*(layers_of(task, args, config) for task in tasks))})
    names = dict.fromkeys(chain(*(TASKS[task].names for task in tasks)))
    if args.data:
        names.pop("actions", None)  # the world's are found by how boxes move
    train_clip = replace(clip, train=args.train_passes > 0)
    val_clip = replace(clip, views=1 if space else args.views)
    how = (device, tuple(layers), [*names], form)
    train = Features(args, encoder, config, source, train_clip, *how)
    val = Features(args, encoder, config, val_source, val_clip, *how)
    if not (args.finetune or args.dry_run):
        store_what_fits(args, train, val)
    return train, val


def task_of(args, features):
    """--task for these features, whose classes and units are not known yet."""
    clip = features.clip
    return TASKS[args.task](
        args, features.width, features.config.get("heads"), features.grid, clip.frames, clip.size)


def evenly(length, many):
    """So many of range(length)."""
    return np.linspace(0, length - 1, many).astype(int)


def learn_labels(task, train):
    """Classes, units and the best constant answer from 512 train clips -> that, what it scores
    there."""
    rows = np.arange(len(train.source))
    if task.names and len(rows) > 512:
        rows = evenly(len(rows), 512)
    parts = train.of(()).batches(rows)
    ys = [task.labels(labels) for _, labels, part in parts if len(part)]
    task.classes = task.classes_of(ys, train.source)
    constants = task.constants(ys)
    if not constants:
        raise DataError(
            f"{train.source.name}: {len(rows)} clips of it have no labels for {task.args.task}")
    totals = []
    for constant in constants:
        scored = [task.score(constant(y), y).double().cpu() for y in ys]
        totals.append(task.total(torch.cat(scored)))
    best = best_of(totals, task.up)
    return constants[best], totals[best]


def probe(args, device, opened=None):
    """A head on frozen tokens (or --finetune), its metric on val, and that of the best answer that
    looks at no video. opened: Features of `all` -> what is printed, what else is logged."""
    train, val = opened or open_features(args, [args.task], device)
    layers = layers_of(args.task, args, train.config)
    train = train.of(layers)
    val = val.of(layers)
    task = task_of(args, train)
    overlap = model.check_overlap(train.source, val.source, "--train")
    constant, on_train = learn_labels(task, train)
    rows = np.arange(len(val.source))
    (scored,), _ = evaluate(task, val.of(()), rows, [lambda x, y: constant(y)])
    base = task.total(scored)
    metric = next(iter(base))
    for source, found in ((train.source, on_train), (val.source, base)):
        if not math.isfinite(found[metric]):
            raise DataError(f"{source.name}: its clips have no labels for {args.task}")
    best, tried = choose(task, train)
    file = head_file(args, opened)
    save_head(file, task, val, best)
    tiles = task.dense and not args.crop and (args.world_size or not args.data)
    (scored,), first = evaluate_heads(task, val, rows, [best])  # by tiles: for the picture
    if tiles:
        scored, base = evaluate_whole(task, val, rows, best.head, constant)
        base = task.total(base)
    total = task.total(scored)
    bad = train.bad | val.bad
    result = {
        "metric": metric,
        "value": total.pop(metric),
        "constant": base[metric],
        "better": "higher" if task.up else "lower",
        **total,
        "lr": best.lr or None,
        "wd": best.wd,
        "held_out": best.held_out,
        "steps": task.plan(len(train.source))[1],
        "finetune": args.finetune,
        "params": model.count(best.head),
        "layer": layers[0] if len(layers) == 1 else layers,
        "frames": "whole, by tiles" if tiles else "as the encoder's clips",
        "n_train": len(train.source),
        "n_val": len(val.source),
        "overlap": overlap,
        "bad": len(bad),
        "saved": str(file),
        "picture": draw(task, val, scored, *first),
    }
    rates = [{"lr": one.lr, "wd": one.wd, "held_out": one.held_out} for one in tried]
    details = {"constants": base, "bad_videos": bad, "tried": rates}
    if args.task == "classify":
        confusion = confusion_of(scored, task.classes)
        share = confusion.diagonal() / confusion.sum(1)
        details |= {"confusion": confusion.tolist(), "per_class": share.tolist()}
        chance = 1 / len(np.unique(train.source.labels))
        result |= {"head": args.head, "majority": base[metric], "chance": chance}
    return result, details


def draws(args, device):
    """probe, for each of --draws with the next seed: means, and the deviation of the value. What
    is no mean is of the last draw, whose head is there."""
    runs = [probe(replace(args, seed=args.seed + i), device) for i in range(args.draws)]
    result, details = runs[-1]
    if len(runs) > 1:
        for name in {"top5", "likelihood", "constant", "majority"} & result.keys():
            result[name] = np.mean([found[name] for found, _ in runs])
        values = [found["value"] for found, _ in runs]
        result |= {"values": values} | mean_and_std(values)
    return result, details


def mean_and_std(values):
    std = np.std(values, ddof=1) if len(values) > 1 else None
    return {"value": np.mean(values), "std": std}


def flops_of(work):
    # attention of tensors without memory, which the counter does not know
    flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@torch.no_grad()
def dry_run(args, device):
    """What heads would cost, by shapes alone: encoder and heads run once on tensors without
    memory."""
    tasks = [args.task]
    if args.task == "all":
        args = replace(args, head="readout")
        tasks = [name for name in args.tasks or labelled_tasks(args) if name in TASKS]
    elif args.task not in TASKS:
        raise DataError(f"--dry_run: {args.task} trains no head")
    meta = torch.device("meta")
    train, val = open_features(args, tasks, meta)
    one = flops_of(train.blank) * len(train.keys)
    n = len(train.source)
    token_bytes = math.prod(train.shape) * len(train.keys) * train.type.itemsize
    stored = (train.turns * n + len(val.source)) * token_bytes
    kept = 0.0 if args.finetune else min(1.0, args.cache_gb * 1e9 / max(1, stored))
    passes = train.turns * n * kept
    heads = 0
    seeds = len(args.seeds) or args.draws
    for name in tasks:
        task = task_of(replace(args, task=name), train)
        task.classes = args.classes or 1 + max(0, int(train.source.labels.max()))
        view = train.of(layers_of(name, args, train.config))
        x = {key: view.wanted(train.blank()) for key in train.keys}
        y = {"first": torch.zeros(1, 16, 4 if name == "boxes" else 2, device=meta),
             "boxes": torch.zeros(1, task.frames, 16, 4, device=meta)}
        head = task.net().to(meta).eval().requires_grad_(False)
        pairs = len(task.pairs())
        batch, steps, _ = task.plan(n)
        seen = batch * steps * seeds
        # backward costs twice what forward does
        heads += 3 * seen * pairs * flops_of(partial(task.ask, head, x, y))
        passes += 3 * seen * pairs if args.finetune else seen * (1 - kept)
    encoder = passes * one + len(val.source) * flops_of(val.blank) * len(val.keys)
    return {
        "metric": "hours",
        "value": (encoder + heads) / (3600e12 * args.tflops),
        "passes": passes,
        "tflop_a_video": one / 1e12,
        "tflop_encoder": encoder / 1e12,
        "tflop_heads": heads / 1e12,
        "gb": stored / 1e9,
        "stored": kept,
    }, {}


# --- what was trained, and features, for use ------------------------------------------------------


SHAPE = "width heads grid frames size classes".split()  # of a Task, after its args


def save_head(file, task, features, best):
    """A head with all that predict needs; where the encoder was trained, encoder.safetensors beside
    it, or encoder_1, encoder_2 ...: none takes the place of another."""
    encoder = task.args.encoder
    if best.encoder:
        encoder = str(unused(file.with_name("encoder.safetensors")))
        model.say(f"the trained encoder: {encoder}")
        model.save_encoder(encoder, best.encoder, features.config)
    about = {
        "task": task.args.task,
        "args": asdict(task.args),
        "encoder": encoder,
        "encoder_hash": weights_hash(best.encoder or features.encoder),
        "layers": features.want,
        "form": features.form,
        "clip": asdict(features.clip),
        "names": features.source.classes,
    }
    about |= {name: getattr(task, name) for name in SHAPE}
    state = best.head.state_dict()
    if task.channels:
        state |= {"units.mean": task.mean, "units.std": task.std}
    temp = file.with_suffix(".tmp")
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        temp,
        {"probe": json.dumps(about)},
    )
    model.put_in_place(temp, file)


def head_file(args, opened):
    """Where the head goes. One that is there becomes head_1.safetensors, head_2 ...: what was
    trained is not lost. `all` keeps the last seed's."""
    if opened:
        return Path(args.out_dir) / f"head_{args.task}.safetensors"
    file = Path(args.out_dir) / "head.safetensors"
    older = unused(file)
    if older != file:
        file.rename(older)
        model.say(f"{file}: the head that was there is {older.name} now")
    return file


def unused(file):
    """This name, or where there is such a file its first of NAME_1, NAME_2 ... that is free."""
    found = file
    number = 0
    while found.exists():
        number += 1
        found = file.with_stem(f"{file.stem}_{number}")
    return found


def open_head(path, device):
    """-> Task, head, what save_head wrote about them."""
    try:
        state, metadata = model.read_safetensors(path)
        about = json.loads(metadata["probe"])
    except (ValueError, KeyError, OSError):
        raise DataError(f"--head {path}: not a head that probe.py saved") from None
    task = TASKS[about["task"]](Args(**about["args"]), *(about[name] for name in SHAPE))
    if task.channels:
        task.mean = state.pop("units.mean").to(device)
        task.std = state.pop("units.std").to(device)
    head = task.net()
    for name, _ in [*head.named_buffers(recurse=False)]:
        setattr(head, name, state[name])  # of knn as many rows as there were videos
    head.load_state_dict(state)
    return task, head.to(device), about


def open_out(args, *kinds):
    """--out, before any work."""
    out = Path(args.out)
    if out.suffix not in kinds:
        raise DataError(f"--out {args.out!r}: a file that ends in {', '.join(kinds)}")
    if ranks()[0]:
        return Path(args.out_dir) / out.name
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write_table(out, heading, paths, values, **more):
    """paths (n) and values (n,...) as columns of a .csv, or as arrays of an .npz or .safetensors.
    more: other columns (n)."""
    columns = {"values": np.asarray(values), **more}
    temp = out.with_name(f"{out.stem}.tmp{out.suffix}")
    if out.suffix == ".csv":
        flat = columns["values"].reshape(len(values), -1)
        with open(temp, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", *more, *(heading or range(flat.shape[1]))])
            table.writerows([*row, *numbers] for *row, numbers in zip(paths, *more.values(), flat))
    elif out.suffix == ".npz":
        np.savez(temp, path=np.array(paths), **columns)
    else:
        tensors = {name: torch.as_tensor(column) for name, column in columns.items()}
        save_file(tensors, temp, {"path": json.dumps(paths)})
    model.put_in_place(temp, out)


def names_of(source):
    return list(source.paths) or [f"{source.name}/{row}" for row in range(len(source))]


@torch.no_grad()
def predict(args, device):
    """What a saved head says of --data: --out, a row a video. Videos that cannot be read are named
    and left out. points, boxes and detect need what is asked beside the videos, as in training."""
    out = open_out(args, ".csv", ".npz")
    task, head, about = open_head(args.head, device)
    where = args.encoder or about["encoder"]
    encoder, config = load(replace(task.args, encoder=where))
    if weights_hash(encoder) != about["encoder_hash"]:
        raise DataError(f"--encoder {where}: not the weights that {args.head} was trained on")
    source = data.parse_list(args.data)
    if args.data == "world":
        _, source = lists(args, rooms=about["form"] == "grid")
    args = replace(args, dtype=task.args.dtype)
    features = Features(
        args, encoder, config, source, data.Clip(**about["clip"]), device, tuple(about["layers"]),
        task.given, about["form"])
    answer = reader(task, features, head)
    rows = []
    answers = []
    for x, labels, part in features.batches(np.arange(len(source))):
        if len(part):
            asked = task.labels(labels) if features.names else {}
            answers += answer(x, asked).cpu()
            rows += part.tolist()
    names = names_of(source)
    more = {}
    if about["task"] == "classify":
        called = [int(p.argmax()) for p in answers]
        more["class"] = [about["names"][i] if about["names"] else i for i in called]
    write_table(out, more and about["names"], [names[i] for i in rows], stack(answers), **more)
    return {
        "metric": "videos",
        "value": len(rows),
        "of": about["task"],
        "bad": len(features.bad),
        "out": str(out),
        "encoder": where,
    }, {"bad_videos": features.bad}


def parts_of(source, seconds):
    """{number of windows of about so many seconds: rows of the videos that are so long}. A picture
    is one window; so is what cannot be read, until it is named there."""
    found = {}
    for row, path in enumerate(source.paths):
        length = 0
        with contextlib.suppress(*data.DAMAGE):
            length = getattr(data.open_frames(path), "seconds", 0)
        found.setdefault(max(1, round(length / seconds)), []).append(row)
    return found


@torch.no_grad()
def export_features(args, device):
    """--out: a vector for each video of any list (--pool), all its tokens (--tokens), or a vector
    for each of its parts (--windows); and neighbours.png. What is done is kept in --cache_dir, so
    that a run that was broken off goes on."""
    out = open_out(args, ".npz", ".safetensors", ".csv")
    source = data.parse_list(args.data)
    encoder, config = load(args)
    form = "all" if args.tokens else args.pool
    clip = clip_of(args, config)
    layers = (args.layer or config.get("layer") or config.get("depth", 0),)
    names = names_of(source)
    groups = {clip.segments: [*range(len(source))]}
    if args.windows and source.paths:
        groups = parts_of(source, args.windows)
    paths = []
    vectors = []
    windows = []
    bad = {}
    for segments, rows in groups.items():
        some = rows_of(source, rows)
        features = Features(
            args, encoder, config, some, replace(clip, segments=segments), device, layers, (), form,
            args.windows > 0)
        store_what_fits(args, features)
        # all of a group's may be damaged
        for x, _, part in features.batches(np.arange(len(some)), some=False):
            for row, z in zip(part, x["video"][:, 0].cpu() if len(part) else ()):
                z = z[None] if args.tokens else z  # (windows, D), tokens (1, N, D)
                vectors += z
                windows += range(len(z))
                paths += [names[rows[row]]] * len(z)
        bad |= features.bad
    if not vectors:
        raise DataError(f"{source.name}: no video can be read")
    vectors = torch.stack(vectors)
    write_table(out, None, paths, vectors, window=windows)
    return {
        "metric": "videos",
        "value": len(set(paths)),
        "rows": len(paths),
        "bad": len(bad),
        "shape": list(vectors[0].shape),
        "layer": layers[0],
        "out": str(out),
        "picture": draw_neighbours(args, out, source, names, paths, vectors),
    }, {"bad_videos": bad}


def draw_neighbours(args, out, source, names, paths, vectors):
    """neighbours.png beside out: the middle frames of eight videos of the list, each followed by
    those of its five nearest by cosine, less the mean of all. Of --tokens none."""
    if args.tokens:
        return None
    first = [paths.index(path) for path in dict.fromkeys(paths)]  # a video's first window
    x = F.normalize(vectors[first] - vectors[first].mean(0), dim=1)
    queries = evenly(len(first), min(8, len(first)))
    likeness, nearest = (x[queries] @ x.T).topk(min(6, len(first)), 1)
    rows = [names.index(paths[first[i]]) for i in nearest.flatten()]
    frames = frames_of(source, data.Clip(1, 1, size=112, train=False), rows)[:, 0]
    columns = ["query", *(f"nearest {i}" for i in range(1, nearest.shape[1]))]
    each = zip(rows[:: len(columns)], frames.split(len(columns)))
    lines = [model.Row(Path(names[row]).stem[-16:], some) for row, some in each]
    title = f"nearest by features of {args.encoder}; mean cosine {likeness[:, 1:].mean():.2f}"
    return model.figure(out.with_name("neighbours.png"), title, columns, lines)


# --- pictures -------------------------------------------------------------------------------------


def wheel(flow, longest):
    """Flow (...,2) -> its direction as a hue, its length as saturation: nothing moves where it is
    white, nothing is known where it is grey."""
    angle = torch.atan2(flow[..., 1], flow[..., 0])[..., None]
    far = (flow.norm(dim=-1) / max(longest, 1e-9)).clamp(max=1)[..., None]
    hues = torch.cos(angle - torch.tensor([0, 2, 4]) * math.pi / 3)
    return (1 - far * (0.5 - 0.5 * hues)).nan_to_num(0.8)


def painted(task, p, truth):
    """Truth and answer of dense tasks (n,T,H,W,...) -> both as pictures, unit, imshow's words."""
    name = task.args.task
    if name == "flow":
        longest = quantiles(truth.norm(dim=-1))[1]
        legend = torch.linspace(-longest, longest, truth.shape[2] // 4)
        truth = truth.clone()
        truth[0, 0, : len(legend), : len(legend)] = torch.stack(
            torch.meshgrid(legend, legend, indexing="xy"), -1)
        return wheel(truth, longest), wheel(p, longest), "", {}
    if name == "segment":
        colours = model.pyplot().get_cmap("tab10" if task.classes <= 10 else "tab20", task.classes)
        truth = truth.float().masked_fill(truth == 255, math.nan)
        paint = dict(cmap=colours, vmin=-0.5, vmax=task.classes - 0.5)
        return truth, p.argmax(-1), "class", paint
    low, high = quantiles(truth)
    unit = "disparity, pixels" if name == "stereo" else "depth, units of the labels"
    return truth, p, unit, dict(cmap="turbo", vmin=low, vmax=high)


def frames_of(source, clip, rows):
    """Videos (n,T,H,W,3) in [0,1]."""
    batches = data.eval_batches(source, clip, rows=rows, batch_size=len(rows))
    return next(iter(batches))["video"].float() / 255


def quantiles(values):
    return np.nanquantile(values.numpy(), (0.02, 0.98)) if values.isfinite().any() else (0, 1)


def draw(task, features, scored, p, y, rows):
    """TASK.png -> its path: three val clips with what is true and, below, what was answered; of
    classify the confusion, of pose truth against answer."""
    args = task.args
    if not model.pyplot():
        return None
    metric, value = next(iter(task.total(scored).items()))
    title = f"{args.task} from {args.encoder}: {metric} {value:.3f}"
    if args.task == "classify":
        return draw_confusion(args, title, confusion_of(scored, task.classes), features.source)
    p = p.cpu()
    y = {key: value.cpu() for key, value in y.items()}
    if args.task == "pose":
        return draw_pose(args, title, y["y"].numpy(), p.numpy())
    n = min(3, len(rows))
    video = frames_of(features.source, features.clip, rows[:n])
    # the third one is the frame whose boxes detect is given
    at = [0, task.frames // 3, task.frames // 2, task.frames - 1]
    lines = []
    if task.dense:
        both = [value[:n].flatten(1, 2) if task.deep else value[:n] for value in (p, y["y"])]
        truth, p, unit, paint = painted(task, *both)
    for clip in range(n):
        lines += [None] if clip else []
        shown = video[clip, at]
        if task.dense:
            lines += [model.Row("video", shown), model.Row("truth", truth[clip, at], unit, paint),
                      model.Row("answer", p[clip, at], unit, paint)]
            continue
        places = [task.marks(p, y, clip, frame) for frame in at]
        for label, marks in zip(("truth", "answer"), zip(*places)):
            lines.append(model.Row(label, 0.6 * shown, marks=marks))
    file = f"{args.out_dir}/{args.task}.png"
    return model.figure(file, title, [f"frame {frame}" for frame in at], lines)


def draw_confusion(args, title, confusion, source):
    """Row: class, column: called, the last one: not read."""
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    shown, axis = model.pyplot().subplots(figsize=(6, 5), layout="constrained")
    shown.colorbar(axis.imshow(share.numpy(), vmin=0, vmax=1), label="share of the class")
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="called", ylabel="is")
    names = source.classes
    if len(names) <= 30:
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xticks(range(len(names) + 1), [*names, "unread"], fontsize=7, rotation=90)
    return model.finish(f"{args.out_dir}/confusion.png", shown)


def draw_pose(args, title, truth, p):
    """Truth to the right, answer up: nine numbers of the turn, three of the shift."""
    shown, axes = model.pyplot().subplots(1, 2, figsize=(8, 4), layout="constrained")
    shown.suptitle(title, fontsize=9)
    shift = np.arange(12) % 4 == 3
    words = ("xx xy xz yx yy yz zx zy zz", "right down ahead")
    for axis, name, some, each in zip(axes, ("turn", "shift"), (~shift, shift), words):
        dots = axis.plot(truth[:, some], p[:, some], ".", markersize=4)
        axis.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
        axis.legend(dots, each.split(), fontsize=6)
        axis.set(title=name, xlabel="truth", ylabel="answer")
    return model.finish(f"{args.out_dir}/pose.png", shown)


# --- intuitive physics ----------------------------------------------------------------------------


def restore(args, device):
    """The run --encoder (its folder, or one of its checkpoints) -> the objective of the script that
    made it, with those weights, of a folder the newest ones."""
    found = Path(args.encoder.removeprefix("random:"))
    folder = found.parent if is_checkpoint(found) else found
    if folder == found:
        found = model.newest(folder)
    elif broken := model.broken(found):
        raise DataError(f"{broken}: damaged or missing")
    torch.manual_seed(args.seed)
    random = args.encoder.startswith("random:")
    try:
        objective = build(folder, random)
    except ValueError as error:
        raise DataError(f"--encoder {folder}: {error}") from error
    if not random:
        model.read_checkpoint({"model": objective.state_dict()}, found)
    return objective.to(device).eval().requires_grad_(False)


def is_checkpoint(path):
    """A folder that torch.distributed.checkpoint wrote."""
    return (path / ".metadata").exists()


def build(folder, random):
    """The objective that the flags in the folder's config.json ask for."""
    said = json.loads((folder / "config.json").read_text())
    name = said["script"]
    if not name.isidentifier() or not (Path(__file__).parent / f"{name}.py").exists():
        raise ValueError(f"made by {name}.py, which does not lie beside probe.py")
    script = importlib.import_module(name)
    flags = dict(getattr(script, "LATER", {}))  # what runs did before there was a flag
    for flag, value in said["config"].items():
        if flag in script.Args.__annotations__:
            flags[flag] = tuple(value) if isinstance(value, list) else value
    flags["out_dir"] = str(folder.resolve())  # SALT's stage, and where its teacher lies
    if flags.get("init"):  # its shape, of whatever family
        flags["init"] = "" if random else str(folder / "encoder.safetensors")
    return script.build(script.Args(**flags))


def forecaster(args, device):
    """--encoder -> its surprise(x, C) -> (B,): how wrong it foretells windows x (B,3,F,H,W) of
    which C frames are seen, and its {frames, stride, size, mean, std}. A run's objective says it
    itself; of published weights it is mean |P(E(x[:C]), later ids) - LN(target's tokens)|."""
    name = args.encoder
    if not (Path(name.removeprefix("random:")) / "latest").exists():  # published weights
        try:
            predictor, _ = model.load_predictor(name)
            encoder = model.load_encoder(name, key="encoder")[0].to(device)
            target, config = model.load_encoder(name)
            target.to(device)
            if predictor.predictor_proj.out_features != target.levels * target.width:
                raise ValueError(f"{name}: its predictor answers for another encoder, its teacher")
        except ValueError as error:
            raise DataError(f"--encoder {error}; physics needs an encoder and its predictor: "
                            "a run's folder, or a file with both") from error

        def targets(x):
            h = target(x, levels=True).float().unflatten(2, (target.levels, -1))
            return F.layer_norm(h, h.shape[-1:]).flatten(2)

        surprise = partial(model.latent_surprise, encoder, predictor.to(device), targets)
        return surprise, dict(frames=16, stride=4, size=config["size"], **model.IMAGENET)
    objective = restore(args, device)
    if not hasattr(objective, "surprise") or getattr(objective, "motion", objective) is None:
        raise DataError(f"--encoder {args.encoder}: has no predictor, so it foretells nothing")
    return objective.surprise, vars(objective.args) | getattr(objective, "pixels", model.IMAGENET)


def first_length(source):
    """Frames of the first of its videos that can be opened."""
    for path in source.paths:
        try:
            return data.open_frames(path).frames
        except DataError:
            raise
        except data.DAMAGE:
            continue
    raise DataError(f"{source.name}: no video can be read")


@torch.no_grad()
def physics(args, device):
    """Is the impossible version of a scene more surprising than the possible one? Nothing is
    trained (SALT, appendix D; Garrido et al., 2025)."""
    surprise, about = forecaster(args, device)
    _, val = lists(args, labelled=False, rooms=True)
    window = about["frames"]
    clip = clip_of(replace(args, fps=0.0), about, [args.task])
    frames = clip.frames
    if not (args.frames or args.data):
        frames = max(window, first_length(val) // clip.stride)
    contexts = args.context or (window // 2,)
    if not all(0 < seen < window and seen % 2 == 0 for seen in contexts) or frames < window:
        raise DataError(f"--context {contexts} --frames {frames}: of windows of {window} "
                        "frames an even part is seen, the rest foretold")
    clip = replace(clip, frames=frames)
    starts = range(0, frames - window + 1, 2)  # the paper's stride of 2
    rows = []
    bad = {}
    how = dict(batch_size=args.micro_batch, workers=args.workers)
    for batch in dense_batches(val, clip, ("impossible", "kind"), **how):
        bad |= dict(batch["bad"])
        if not batch["ok"].any():
            continue
        pair = []
        for key in ("video", "impossible"):
            x = data.prepare(
                batch | {"video": batch[key]}, device, about["mean"], about["std"])
            windows = product(starts, contexts)
            wrong = [surprise(x[:, :, t : t + window], seen) for t, seen in windows]
            pair.append(torch.stack(wrong).mean(0).cpu())
        if not rows:
            picture = draw_pairs(args, batch["video"], batch["impossible"])
        rows.append(torch.stack([*pair, batch["kind"].float()], 1)[batch["ok"]])
    if not rows:
        raise DataError(f"{val.name}: no video can be read")
    possible, impossible, kind = torch.cat(rows).double().T
    right = (torch.sign(impossible - possible) + 1) / 2
    names = data.IMPOSSIBLE if args.data else range(256)
    kinds = {str(names[int(k)]): right[kind == k].mean().item() for k in kind.unique()}
    return {
        "metric": "relative_accuracy",
        "value": right.mean().item(),
        "constant": 0.5,
        "better": "higher",
        "error": (right.std() / len(right) ** 0.5).item(),
        "kinds": kinds,
        "surprise": [possible.mean().item(), impossible.mean().item()],
        "context": contexts,
        "windows": len(starts),
        "n_val": len(right),
        "bad": len(bad),
        "picture": picture,
    }, {"pairs": torch.stack([possible, impossible], 1).tolist(), "bad_videos": bad}


def draw_pairs(args, possible, impossible):
    """The possible, the impossible, where they differ."""
    at = evenly(possible.shape[1], 8)
    lines = []
    for a, b in zip(possible[:4, at].float() / 255, impossible[:4, at].float() / 255):
        lines += [model.Row("possible", a), model.Row("impossible", b),
                  model.Row("difference", (a - b).abs()), None]
    file = f"{args.out_dir}/physics.png"
    title = "what physics shows: two videos of a pair"
    return model.figure(file, title, [f"frame {i}" for i in at], lines[:-1])


# --- the whole suite ------------------------------------------------------------------------------


def labelled_tasks(args):
    """The tasks that the data has labels for."""
    tasks = [*TASKS, "physics"]
    if args.data:
        return tasks
    train, _ = lists(args, labelled=False)
    beside = Path(train.paths[0]).with_suffix(".safetensors")
    has = set()
    if beside.exists():
        has = {*open_file(beside).keys()}
    needs = {name: {*task.names} - {*SEEN} for name, task in TASKS.items()}
    needs["physics"] = {"impossible"}
    if train.labels.min() < 0:
        needs["classify"] = {"a class"}
    return [name for name in tasks if has >= needs[name]]


def everything(args, device):
    """All tasks that the data has labels for, tokens computed once: all.json and all.md, a row for
    each task, and radar.png."""
    args = replace(args, head="readout")
    tasks = labelled_tasks(args)
    if unknown := {*args.tasks} - {*tasks}:
        raise DataError(f"--tasks {min(unknown)}: not a task with labels in this data; there "
                        f"are {', '.join(tasks)}")
    tasks = args.tasks or tasks
    seeds = args.seeds or (args.seed,)
    found = {}
    opened = {}
    for seed, task in product(seeds, tasks):
        a = replace(args, seed=seed, task=task)
        if task == "physics":
            try:
                result, _ = physics(a, device)
            except DataError as error:
                model.say(f"physics is left out: {error}")
                continue
        else:
            result, _ = probe(a, device, shared(a, tasks, opened, device))
        found.setdefault(task, []).append(result)
        model.say(f"seed {seed}  {task}  {result['metric']} {result['value']:.4f}  "
                  f"constant {result['constant']:.4f}")
    if not found:
        raise DataError("no task could be run")
    table = [summary(task, results) for task, results in found.items()]
    out = Path(args.out_dir)
    model.write(out / "all.md", markdown(args.encoder, seeds, table))
    saved = {"encoder": args.encoder, "seeds": seeds, "table": table, "results": found}
    model.write(out / "all.json", json.dumps(saved, indent=1))
    skills = [row["skill"] for row in table if row["skill"] is not None]
    return {
        "metric": "skill",
        "value": np.mean(skills) if skills else None,
        "tasks": {row["task"]: row["value"] for row in table},
        "seeds": seeds,
        "table": str(out / "all.md"),
        "radar": radar(args, table),
    }, {"table": table}


def shared(args, tasks, opened, device):
    """The Features that this task shares with others, opened once. Real flow wants neighbouring
    frames, and so its own tokens."""
    if args.finetune:
        return None
    alone = args.task == "flow" and not args.data
    # random weights of another seed are another encoder, other draws other videos and crops
    drawn = args.encoder.startswith("random:") or args.fraction < 1 or args.train_passes
    key = (alone, drawn and args.seed)
    if key not in opened:
        opened.clear()
        same = [name for name in tasks if name in TASKS and (args.data or name != "flow")]
        if alone:
            same = ["flow"]
        # not classify's clips, even if it is alone
        opened[key] = open_features(replace(args, task="all"), same, device)
    return opened[key]


def summary(task, results):
    """The row of one task's results: mean and deviation over seeds, and skill. Where a constant is
    perfect there is nothing to measure."""
    values = [result["value"] for result in results]
    constants = [result["constant"] for result in results]
    first = results[0]
    best = 1.0 if first["better"] == "higher" else 0.0
    skills = [
        (value - base) / (best - base) for value, base in zip(values, constants) if base != best]
    return {
        "task": task,
        "metric": first["metric"],
        "better": first["better"],
        "constant": np.mean(constants),
        **mean_and_std(values),
        "values": values,
        "skill": np.mean(skills) if skills else None,
        "skills": skills,
        "params": first.get("params"),
        "layer": first.get("layer"),
    }


def markdown(encoder, seeds, table):
    lines = [f"`{encoder}`, seeds {' '.join(map(str, seeds))}; skill: 0 is the constant answer, "
             "1 is perfect", "",
             "| task | metric | constant | value | skill |", "|---|---|---|---|---|"]
    for row in table:
        spread = f" +- {row['std']:.4f}" if row["std"] is not None else ""
        skill = "-" if row["skill"] is None else f"{row['skill']:.3f}"
        lines.append(f"| {row['task']} | {row['metric']} ({row['better']} is better) | "
                     f"{row['constant']:.4f} | {row['value']:.4f}{spread} | {skill} |")
    return "\n".join(lines) + "\n"


def radar(args, table):
    """The skill of each task on its own axis, of each seed a dot; below the inner circle it is
    negative: worse than the constant."""
    if not model.pyplot():
        return None
    angle = np.linspace(0, 2 * np.pi, len(table), endpoint=False)
    shown, axis = model.pyplot().subplots(
        figsize=(6, 5.6), subplot_kw={"projection": "polar"}, layout="constrained")
    axis.fill(
        angle, [row["skill"] or 0 for row in table], facecolor=("C0", 0.25), edgecolor="C0")
    for at, row in zip(angle, table):
        axis.plot([at] * len(row["skills"]), row["skills"], "k.", markersize=4)
    axis.plot(np.linspace(0, 2 * np.pi, 99), np.zeros(99), "k--", linewidth=0.8)
    names = [f"{row['task']}\n{row['metric']} {row['value']:.3g}" for row in table]
    axis.set_xticks(angle, names, fontsize=8)
    axis.tick_params(pad=12)
    axis.set_ylim(min([-0.1, *chain(*(row["skills"] for row in table))]), 1)
    axis.set_title(f"skill of {args.encoder}: 1 is perfect, 0 (dashed) the constant", fontsize=9)
    return model.finish(f"{args.out_dir}/radar.png", shown)


# --- runs beside each other -----------------------------------------------------------------------


def read_log(file):
    """The lines of a .jsonl; the last one may be half written."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else ()
    return [json.loads(line) for line in lines if line.endswith("\n")]


def runs_of(args):
    """{folder: its log by step}, of those of --runs that have one: a line of a step holds what was
    last known then. Of a step that was run twice, the later line counts."""
    found = {}
    for run in args.runs:
        steps = {}
        last = {}
        for line in read_log(Path(run) / "log.jsonl"):
            if line.get("step") != last.get("step"):
                last = last | {"probe_acc": None}
            last = last | line
            if "step" in line:
                steps[line["step"]] = last
        if last:
            found[run] = dict(sorted(steps.items()))
    if not found:
        raise DataError(f"--runs {' '.join(args.runs) or '(none)'}: no folder with a log.jsonl")
    return found


PANELS = (
    ("step", "loss"),
    ("step", "lr"),
    ("step", "rankme"),
    ("step", "feature_std"),
    ("step", "probe_acc"),
    ("loss", "probe_acc"),
    ("flops", "probe_acc"),
)


def r2(pairs):
    """Of a line through points [(x, y)]; None for fewer than three."""
    return np.corrcoef(np.array(pairs).T)[0, 1] ** 2 if len(pairs) > 2 else None


def pairs_of(steps, x, y):
    """[(x, y)] of the log's lines that have both."""
    both = [(line.get(x), line.get(y)) for line in steps.values()]
    return [pair for pair in both if None not in pair]


def plot(args, device):
    """plot.png: how --runs went, finished or not, and where there was an online probe its accuracy
    against loss and FLOPs. R^2 is that of a line through accuracy and loss: of each run (does its
    loss choose among its checkpoints?) and of all together (does it choose among runs?)."""
    found = runs_of(args)
    panels = []
    for x, y in PANELS:
        curves = [pairs_of(steps, x, y) for steps in found.values()]
        if any(curves):
            panels.append((x, y, curves))
    if not panels:
        raise DataError(f"--runs {' '.join(found)}: nothing is logged yet")
    high = -(-len(panels) // 4)
    shown, axes = model.pyplot().subplots(
        high, min(4, len(panels)), figsize=(14, 3.2 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (x, y, curves) in zip(axes.flat, panels):
        for run, pairs in zip(found, curves):
            axis.plot(*zip(*pairs or [(math.nan,) * 2]), ".-", label=run)
        axis.set(xlabel=x, ylabel=y, xscale="log" if x == "flops" else "linear")
    shown.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    pairs = {run: pairs_of(steps, "loss", "probe_acc") for run, steps in found.items()}
    points = [*chain(*pairs.values())]
    return {
        "metric": "r2",
        "value": r2(points),
        "points": len(points),
        "each": {run: r2(some) for run, some in pairs.items()},
        "picture": model.finish(f"{args.out_dir}/plot.png", shown),
    }, {}


def accuracies(run, steps):
    """{column: accuracy} of a run: the last of its online probe, and of each probe whose --out_dir
    was the run's folder."""
    found = {}
    for _, accuracy in pairs_of(steps, "step", "probe_acc"):
        found["online probe"] = accuracy
    for line in read_log(Path(run) / "probe.jsonl"):
        other = line["encoder"].startswith(("random:", "pixels:"))
        if line["task"] == "classify" and not other:
            val = line["args"]["val"] or line["args"]["data"]
            found[f"{val}, {line['head']}"] = line["value"]
    return found


# of compare: names in the log, and how they are written
COSTS = {
    "step": "{}",
    "flops": "{:.2e}",
    "loss": "{:.4f}",
    "rankme": "{:.1f}",
    "random_acc": "{:.2%}",
    "hours": "{:.2f}",
}


def compare(args, device):
    """A Markdown table, a row a run: what it cost and how it ended, then accuracies in per cent,
    each beside its difference to the baseline in points (FWM-HW-LD, Table 4)."""
    found = runs_of(args)
    baseline = args.baseline or next(iter(found))
    if baseline not in found:
        raise DataError(f"--baseline {baseline}: not among the runs with a log.jsonl: "
                        f"{' '.join(found)}")
    table = {run: accuracies(run, steps) for run, steps in found.items()}
    columns = list(dict.fromkeys(chain(*table.values())))
    heading = [*COSTS, *(f"{column} | Δ" for column in columns)]
    print(f"| run | {' | '.join(heading)} |\n|{'---|' * (1 + len(COSTS) + 2 * len(columns))}")
    base = table[baseline]
    deltas = {}
    costs = {}
    for run, row in table.items():
        last = next(reversed(found[run].values()), {}) | {"hours": hours(found[run])}
        costs[run] = {name: last.get(name) for name in COSTS}
        cells = [*map(told, costs[run].values(), COSTS.values())]
        deltas[run] = {c: row[c] - base[c] for c in row if c in base}
        for c in columns:
            change = "" if run == baseline else told(deltas[run].get(c), "{:+.2f}", 100)
            cells += [told(row.get(c), "{:.2f}", 100), change]
        print(f"| {Path(run).name} | {' | '.join(cells)} |")
    return {
        "metric": "delta",
        "value": deltas,
        "baseline": baseline,
        "costs": costs,
    }, {}


def hours(steps):
    """Of training, without probes and checkpoints, by the clips per second that were logged."""
    seconds = 0
    done = 0
    for step, speed in pairs_of(steps, "step", "clips_per_s"):
        seconds += (step - done) * steps[step]["config"]["batch_size"] / speed
        done = step
    return seconds / 3600 if done else None


def told(value, unit, factor=1):
    return "-" if value is None else unit.format(factor * value)


# --- main -----------------------------------------------------------------------------------------

# (args, device) -> what is printed, what else is logged
COMMANDS = {
    **dict.fromkeys(TASKS, draws),
    "physics": physics, "all": everything, "predict": predict, "features": export_features,
    "plot": plot, "compare": compare,
}

# flags that 0 does not switch off
POSITIVE = ("segments views epochs micro_batch train_clips val_clips holdout grid_lr fraction "
            "draws tflops").split()


def check_flags(args):
    """What no probe can use ends it here."""
    model.check_numbers(args, POSITIVE)
    mixes = args.mixup or args.cutmix or args.erasing
    tuned = args.finetune and args.task == "classify"
    for wrong, why in (
        (args.head not in HEADS and args.task != "predict",
         f"--head {args.head}: choose from {', '.join(HEADS)}"),
        (tuned and args.head in ("ridge", "knn"),
         f"--finetune: --head {args.head} is not trained by gradients"),
        (len(args.layers) not in (0, 4), "--layers: four blocks are needed"),
        (args.fraction > 1, "--fraction: a share of --train, at most 1"),
        (args.fraction < 1 and args.data, "--fraction: of the world give --train_clips"),
        (mixes and (args.segments > 1 or not tuned),
         "--mixup, --cutmix and --erasing are for classify --finetune with --segments 1"),
    ):
        if wrong:
            raise DataError(why)


def find_device(args):
    """--device, or of several GPUs this rank's."""
    usual = "cpu"
    if torch.cuda.is_available():
        usual = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        re.compile(args.group)
        device = torch.device(args.device or usual)
    except (re.error, RuntimeError) as error:
        raise DataError(
            f"--group {args.group!r} or --device {args.device!r}: {error}") from None
    if device.type == "cpu":
        model.tune_cpu()
    return device


def main(args):
    begin = time.time()
    if args.workers == -1:
        args = replace(args, workers=data.idle_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        check_flags(args)
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        device = find_device(args)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("gloo")
        if ranks()[0]:  # all compute the same, and one writes it
            cache = args.cache_dir or f"{args.out_dir}/features"
            args = replace(args, cache_dir=cache, out_dir=tempfile.mkdtemp())
        if not model.pyplot():
            missing = "without matplotlib few pictures are drawn: pip install matplotlib"
            if args.task == "plot":
                raise DataError(missing)
            model.say(missing)
        command = dry_run if args.dry_run else COMMANDS[args.task]
        result, details = command(args, device)
    except (RuntimeError, ConnectionError, EOFError) as error:
        why = data.dead_worker(error)
        if not why:
            raise
        model.leave(why, 1)
    except (DataError, OSError) as error:
        model.leave(error, 2)
    finally:
        data.end_workers()
    rank, many = ranks()
    if many > 1:
        dist.destroy_process_group()
    if rank:
        shutil.rmtree(args.out_dir)
        return
    result = {
        "task": args.task,
        **result,
        "seed": args.seed,
        "encoder": result.get("encoder", args.encoder),
        "seconds": round(time.time() - begin, 1),
    }
    if not args.dry_run:
        with open(f"{args.out_dir}/probe.jsonl", "a") as file:
            file.write(dumps(result | details | {"args": asdict(args)}) + "\n")
    print(dumps(result), flush=True)


def dumps(value):
    """JSON, which has no NaN: null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


if __name__ == "__main__":
    model.keep_console()
    main(ARGS)
