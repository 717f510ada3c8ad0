"""Probe a frozen encoder: train a small head on its features, and on nothing else, to see what they hold.

    tokens = E(x), no gradient                      (B,3,T,H,W) -> (B,N,D); the tokens of a video's S temporal clips are one sequence (B,S*N,D)
    attentive   q + Attn(q, LN(tokens)), then z + MLP(LN(z)), then Linear      q: one learned query (V-JEPA, appendix B.1)
    attentive4  three self-attention blocks over all tokens, then the same     a grid of rates and decays, trained at once (V-JEPA 2, SALT)
    linear      Linear on the standardised mean over tokens
    knn         the 20 nearest training clips by cosine of that mean vote with weight exp(cos / 0.07); nothing is trained
    pose, points, boxes, depth, segment, flow, stereo, detect: table DENSE, by 4DS's protocol (A.2): head(tokens, what is asked) -> loss against dense labels
    physics     nothing is trained: mean |P(E(first frames), ids of the later ones) - h|, higher on the impossible video of a pair?

    python probe.py classify --encoder out/laptop/encoder.safetensors --data world --head attentive
    python probe.py classify --encoder random:out/laptop/encoder.safetensors --data world --head attentive      before any learning
    python probe.py classify --encoder pixels:diff --data world --head linear                                   without any encoder
    python probe.py all --encoder out/laptop --data world --seeds 0 1 2             every task, one table: all.md, all.json, radar.png, a picture a task
    python probe.py depth --encoder vitl.pt --train scannet_train.txt --val scannet_val.txt            or --finetune 4ds
    python probe.py compare out/*                                               a table of finished runs, with differences to the first
    python probe.py plot --runs out/laptop out/laptop_salt out/laptop_salt/stage1                   accuracy against loss and FLOPs
    python probe.py classify --encoder vitl.pt --train k400_train.csv --val k400_val.csv --head attentive4 --segments 8 --views 3 --train_passes 20

Accuracy is a mean over all rows of the val list, where a video that cannot be read counts as wrong. The best head of a grid is chosen on videos
held out of the train list; val is looked at once, by that head. The last line on stdout is one JSON object; out_dir/probe.jsonl adds the
accuracy of each class and the confusion matrix. Compare encoders with the same head only: attentive learns a good deal from random weights (the
world: 69 % against 15 % for linear). attentive4 trains 20 heads as big as a small encoder: without a GPU give it one --grid_lr and one --grid_wd.
"""
import signal

if __name__ == "__main__":                                      # Ctrl-C leaves without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """Defaults are V-JEPA's (appendix B.1, Table 6) unless the comment names another source."""
    task: tyro.conf.Positional[Literal["classify", "pose", "points", "boxes", "depth", "segment", "flow", "stereo", "detect", "physics", "all",
                                       "plot", "compare"]]       # a row of TASKS
    # encoder
    encoder: str = ""                  # a weight file or the folder of a run or HF model; random:vit_s or random:PATH for random weights; pixels:frame or pixels:diff for none
    layer: int = 0                     # blocks to run before reading out; 0: what the encoder's file says, else all of them and the final norm
    heads: int = 0                     # attention heads of an encoder whose file and size do not tell them
    pool: Literal["mean", "cls"] = "mean"   # for linear and knn: the mean over patch tokens, or the CLS token of an encoder that has one
    runs: tuple[str, ...] = ()         # plot, compare: folders of training runs; the word --runs may be left out
    baseline: str = ""                 # compare: the run that the others are compared with; empty: the first
    # data
    data: str = ""                     # world: both splits of the built-in world, instead of --train and --val
    train: str = ""                    # list of `path label` lines
    val: str = ""                      # list of `path label` lines with no other labels than those of --train
    train_clips: int = 2000            # of the built-in world, which has 2048
    val_clips: int = 1000              # 1024
    frames: int = 0                    # frames per clip; 0, here and in the next three: what the encoder's file says, else 16, 4, -, 224
    stride: int = 0                    # video frames between two frames of a clip
    fps: float = 0.0                   # sample by time stamp at this rate instead
    size: int = 0                      # pixels
    segments: int = 1                  # temporal clips per video, their tokens joined in one sequence (8 on K400; V-JEPA 2: 2 on SSv2)
    views: int = 1                     # spatial crops per clip in evaluation, softmax averaged over them (3)
    train_passes: int = 0              # n: n passes of random crops, flips and starts, epoch e reads pass e mod n (20: the paper's)
    crop_scale: tuple[float, float] = (0.08, 1.0)    # area of the random resized crop of --train_passes
    crop_ratio: tuple[float, float] = (0.75, 1.33)   # its aspect ratio
    flip: bool = True                  # horizontal flip of half of the clips of --train_passes
    # head
    head: Literal["attentive", "attentive4", "linear", "knn", "readout"] = "attentive"     # of classify; readout: 4DS's, with the flags of space and time
    grid_lr: tuple[float, ...] = ()    # learning rates; empty: those of HEADS; of space and time 4DS's 1e-4, 3e-4 and 1e-3 (world: 2e-3)
    grid_wd: tuple[float, ...] = ()    # weight decays; each pair is one head, all are trained at once. Space and time have one: 1e-4
    holdout: float = 0.1               # share of the train videos that chooses among them; nothing is held out where there is no choice
    group: str = ""                    # regular expression: videos whose paths match with the same text are held out together (a person: "user\\d+")
    epochs: int = 20
    batch_size: int = 0                # videos; 0: 32 for space and time, else the paper's 256, less (a multiple of 16) for lists that would give fewer than 32 steps an epoch
    seed: int = 0                      # random weights, held-out videos, order, initial heads
    # tasks of space and time (4DS, appendix A), and all
    steps: int = 0                     # 0: 40,000, fine-tuning 20,000, on the world 600; the first tenth, at most 1000, warms up. Batches are of 32
    width: int = 0                     # of the readout; 0: the paper's (768 to 1024), on the world 128 and for convolutions 64
    resample: int = 0                  # moments to which tokens are interpolated in time (16: 4DS's); 0: as many as there are
    classes: int = 0                   # of segment; 0: up to the highest in the labels of 512 train clips
    finetune: Literal["", "4ds", "vjepa"] = ""     # train the encoder, too: at 0.003 of the head's rate, or 0.8 of it for every layer in between
    context: tuple[int, ...] = ()      # physics: frames that are seen, of each window as long as a training clip; the rest is foretold. Empty: half
    tasks: tuple[str, ...] = ()        # all: only these
    seeds: tuple[int, ...] = ()        # all: run each task for each of these; empty: --seed
    # the run
    out_dir: str = "out/probe"         # probe.jsonl grows by a line a run; confusion.png is the last run's (row: class, column: called)
    cache_dir: str = ""                # features, found again by content; empty: out_dir/features. Delete its files at any time
    cache_gb: float = 50.0             # features, and labels in memory (40 % of it at most), beyond this, or 90 % of the free disk, are made anew in each epoch
    micro_batch: int = 16              # clips per forward pass of the encoder, videos per pass of the heads; their gradients are accumulated
    workers: int = -1                  # loader processes; -1: what the machine has
    dtype: Literal["auto", "bf16", "fp32"] = "auto"   # auto: bf16 on a GPU, fp32 on a CPU
    device: str = ""                   # empty: cuda where there is one


def parse_args():
    words = sys.argv[1:]
    if words[:1] in (["plot"], ["compare"]) and words[1:] and not words[1].startswith("-"):
        words.insert(1, "--runs")
    return tyro.cli(Args, args=words, description=__doc__)


if __name__ == "__main__":
    ARGS = parse_args()                                         # before torch is imported, so that --help is instant

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

import data as D
import model as M

# --- heads: tokens (B,N,D) -> logits (B,classes) ---


class Attentive(nn.Module):
    """The cross-attention block of V-JEPA's classifier, after `depth` self-attention blocks. The query is projected and has a residual; the
    attention has no output projection. With one query, Wk is applied to the query and Wv to the pooled tokens instead of both to all N tokens:
    the same function in 2*heads*N*D multiply-adds instead of 2*N*D*D. A bias on the keys would shift all scores alike: there is none."""

    def __init__(self, width, classes, heads, depth):
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(M.Block(width, heads, 4 * width) for _ in range(depth))
        self.query = nn.Parameter(torch.empty(width))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Parameter(torch.empty(width, width))
        self.mlp = M.Mlp(width, 4 * width, "gelu")
        self.linear = nn.Linear(width, classes)
        M.init_weights(self, self.blocks)
        for p in (self.query, self.k):
            nn.init.trunc_normal_(p, std=0.02)
        with torch.no_grad():
            self.mlp.fc2.weight.div_(math.sqrt(2 * (depth + 1)))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.norm1(x)
        per_head = lambda w: w.view(self.heads, -1, x.shape[-1])                                        # (D,D) -> (heads, D/heads, D)
        q = torch.einsum("hd,hdc->hc", self.q(self.query).view(self.heads, -1), per_head(self.k))       # (heads, D)
        scores = torch.einsum("bnc,hc->bhn", x, q) / math.sqrt(x.shape[-1] / self.heads)
        z = torch.einsum("bhn,bnc->bhc", scores.softmax(-1).to(x.dtype), x)                             # (B, heads, D)
        z = torch.einsum("bhc,hdc->bhd", z, per_head(self.v.weight)).flatten(1) + self.v.bias           # (B, D)
        z = self.query + z
        return self.linear(z + self.mlp(self.norm2(z)))


class Standardised(nn.Module):
    """Linear on (x - mean) / std, the statistics being those of the training features."""

    def __init__(self, x, classes):
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0) + 1e-6)
        self.linear = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear((x.mean(1) - self.mean) / self.std)


class Neighbours(nn.Module):
    """Log votes of the k nearest training features by cosine s, each with weight exp(s / T); softmax gives their shares. Nothing to train."""

    def __init__(self, x, y, classes, k=20, T=0.07):
        super().__init__()
        self.x, self.votes, self.k, self.T = F.normalize(x.double(), dim=1), F.one_hot(y, classes).double(), min(k, len(x)), T

    def forward(self, x):
        s, i = (F.normalize(x.mean(1).double(), dim=1) @ self.x.T).topk(self.k, 1)
        return torch.einsum("bk,bkc->bc", (s / self.T).softmax(1), self.votes[i]).log()


# pooled: features are one vector a clip. build: a head from its width, classes, the encoder's heads, the pooled training features and their labels
HEADS = {
    "attentive": dict(pooled=False, build=lambda width, classes, heads, x, y: Attentive(width, classes, heads, 0), lr=(1e-3,), wd=(0.01,)),
    "attentive4": dict(pooled=False, build=lambda width, classes, heads, x, y: Attentive(width, classes, 16, 3),
                       lr=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4), wd=(0.8, 0.4, 0.1, 0.01)),
    "linear": dict(pooled=True, build=lambda width, classes, heads, x, y: Standardised(x, classes), lr=(1e-2, 3e-3, 1e-3, 3e-4), wd=(0.1, 0.01)),
    "knn": dict(pooled=True, build=lambda width, classes, heads, x, y: Neighbours(x, y, classes), lr=(), wd=()),
}

# --- features ---


class Pixels(nn.Module):
    """What needs no encoder: 24x16 grey pixels of the first frame, or their absolute differences between frames, as a single token."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, blocks=None):
        grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1)                         # (B,T,H,W)
        small = F.adaptive_avg_pool2d(grey, (16, 24))
        return (small[:, :1] if self.kind == "frame" else small.diff(dim=1).abs()).flatten(1)[:, None]   # (B,1,D)


def load(args):
    """--encoder -> (module, its config)."""
    if not args.encoder:
        raise D.DataError("give --encoder FILE (or random:vit_s, pixels:diff)")
    if args.encoder in ("pixels:frame", "pixels:diff"):
        return Pixels(args.encoder[7:]), dict(model=args.encoder, mean=[0.0] * 3, std=[1.0] * 3, **(dict(frames=8, size=32) if args.data else {}))
    override = ({"seed": args.seed} if args.encoder.startswith("random:") else {}) | ({"heads": args.heads} if args.heads else {})
    try:
        return M.load_encoder(args.encoder, **override)
    except ValueError as e:
        raise D.DataError(f"--encoder {e}") from e


class Features:
    """The frozen features of a list's videos, (V, S*N, D) each, by row: read from disk after store(), else computed at every use.
    Turn t is the t-th random pass over the list; where nothing is random there is one turn. key: what of a dense batch is encoded ("video" or
    "right"), for tasks of space and time: tokens without CLS, layer may be a tuple. grad: for fine-tuning."""

    def __init__(self, args, encoder, config, source, layer, clip, device, key=None):
        self.args, self.encoder, self.config, self.source, self.layer, self.clip, self.device = args, encoder, config, source, layer, clip, device
        self.key, self.grad = key, False
        self.bf16 = args.dtype == "bf16" or args.dtype == "auto" and device.type == "cuda"
        self.pooled = key is None and HEADS[args.head]["pooled"]
        self.turns = max(1, args.train_passes) if clip.train else 1
        self.stored, self.bad = None, {}
        clips, pixels = clip.segments * clip.views, (clip.frames, clip.size, clip.size, 3)
        blank = {"video": torch.zeros(1, *pixels, dtype=torch.uint8).expand(clips, *pixels), "flip": torch.zeros(clips, dtype=torch.bool)}
        self.shape = tuple(self.encode(blank, 1).shape[1:])
        self.type = np.float32 if self.pooled else np.float16                       # pooled vectors are small
        self.bytes = self.turns * len(source) * math.prod(self.shape) * self.type().itemsize

    def seed(self, turn):
        return self.args.seed * 1000 + turn

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, batch, videos):
        """A batch of videos*S*V clips -> (videos, V, S*N, D), or (videos, V, 1, D) pooled, float32 on the device."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.encoded(batch, videos)

    def encoded(self, batch, videos):
        parts = []
        for some in torch.arange(len(batch["video"])).split(self.args.micro_batch):
            x = D.prepare({k: batch[k][some] for k in ("video", "flip")}, self.device, self.config["mean"], self.config["std"])
            with self.autocast():
                z = self.encoder(x, blocks=self.layer or None).float()         # (b, N, D)
            cls = int(self.config.get("cls", False)) * (x.shape[2] if self.config.get("images") else 1)         # of an image encoder: one a frame
            if self.key:
                z = z[:, cls:]
            elif self.pooled:
                z = (z[:, :cls] if self.args.pool == "cls" else z[:, cls:]).mean(1, keepdim=True)
            parts.append(z)
        z = torch.cat(parts).unflatten(0, (videos, self.clip.segments, self.clip.views)).transpose(1, 2).flatten(2, 3)
        return z.mean(2, keepdim=True) if self.pooled else z

    def stream(self, rows, size, turn):
        """Read and encode these rows in order -> (features (b, V, S*N, D), ok (b,)), `size` videos at a time. A bad video is told once."""
        how = dict(rows=rows, batch_size=size, workers=self.args.workers, seed=self.seed(turn))
        others = [self.key] if self.key == "right" else []
        for batch in dense_batches(self.source, self.clip, others, **how) if self.key else D.eval_batches(self.source, self.clip, **how):
            batch["video"] = batch[self.key or "video"]
            for path, reason in batch["bad"]:
                self.bad[path] = reason
                if len(self.bad) == len(set(self.source.paths)):
                    raise D.DataError(f"{self.source.name}: no video can be read; the last one: {reason}")
            yield self.encode(batch, len(batch["label"])), batch["ok"].numpy()

    def name(self, turn):
        """A hash of all that the features depend on: weights, config, list and files, clip settings, and the pixels that these give for one video."""
        a, clip = self.args, dataclasses.asdict(self.clip)
        facts = [self.config, self.layer, self.key, self.pooled and a.pool, self.bf16, clip, self.clip.train and self.seed(turn), D.fingerprint([self.source])]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for key, value in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        one = next(iter(D.eval_batches(self.source, self.clip, rows=[0], batch_size=1, seed=self.seed(turn))))
        digest.update(one["video"].numpy().tobytes() + one["flip"].numpy().tobytes())
        return digest.hexdigest()[:32]

    def store(self, folder):
        """Open the turns' features in this folder, computing what is not there. NAME.npy is renamed into place; NAME.json comes last and says so."""
        self.stored, self.ok = [], []
        for turn in range(self.turns):
            file = folder / f"{self.name(turn)}.npy"
            note, temp = file.with_suffix(".json"), file.with_suffix(f".{os.getpid()}")
            if not note.exists():
                try:
                    with open(temp, "wb") as f:             # not a memory map: on a full disk write() raises, a map kills the process
                        shape, ok = (len(self.source), *self.shape), []
                        np.lib.format.write_array_header_1_0(f, {"descr": np.dtype(self.type).str, "fortran_order": False, "shape": shape})
                        for z, good in self.stream(np.arange(len(self.source)), self.args.micro_batch, turn):
                            z = z.cpu().numpy().astype(self.type)
                            if not np.isfinite(z[good]).all():
                                raise D.DataError(f"features are not finite in {self.type.__name__}; --cache_gb 0 keeps them in float32")
                            f.write(z.tobytes())
                            ok += good.tolist()
                        f.flush()
                        os.fsync(f.fileno())
                    os.replace(temp, file)
                    temp.write_text(json.dumps({"ok": ok, "bad": self.bad}))
                    os.replace(temp, note)
                finally:
                    temp.unlink(missing_ok=True)
            note = json.loads(note.read_text())
            self.bad |= note["bad"]
            self.ok.append(np.array(note["ok"]))
            self.stored.append(np.load(file, mmap_mode="r"))

    def batches(self, rows, size, turn=0):
        """For every `size` of these rows, yield (features (b, V, S*N, D) float32 on the device, rows (b,)) of those that can be read."""
        turn, parts = turn % self.turns, [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.stored is None:
            for part, (z, ok) in zip(parts, self.stream(rows, size, turn)):
                yield z[torch.from_numpy(ok).to(z.device)], part[ok]
        else:
            for part in parts:
                part = part[self.ok[turn][part]]
                yield torch.from_numpy(self.stored[turn][part]).to(self.device).float(), part


# --- training and scoring ---


def train_heads(heads, grid, features, rows, labels, args, batch_size):
    """Train one head for each (lr, wd) of the grid on the same batches: AdamW, cosine to 0 without warm-up. labels: of the whole list."""
    groups = [dict(g, lr=lr, peak=lr) for head, (lr, wd) in zip(heads, grid) for g in M.param_groups(head, wd)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    shuffle, step, steps = np.random.default_rng(args.seed), 0, args.epochs * math.ceil(len(rows) / batch_size)
    micro = batch_size if batch_size <= args.micro_batch else math.gcd(batch_size, args.micro_batch)
    for epoch in range(args.epochs):
        parts = math.ceil(len(rows) / micro)
        for i, (x, part) in enumerate(features.batches(shuffle.permutation(rows), micro, epoch), 1):
            y = torch.from_numpy(labels[part]).to(x.device)
            for head in heads:                                  # one backward pass each: the activations of one head at a time
                with features.autocast():
                    loss = F.cross_entropy(head(x[:, 0]).float(), y, reduction="sum") / batch_size
                loss.backward()
            if i * micro % batch_size == 0 or i == parts:
                for group in groups:
                    group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.step()
                optimizer.zero_grad()
                step += 1


@torch.inference_mode()
def predict(heads, features, rows, classes):
    """Class probabilities (heads, len(rows), classes), averaged over spatial views, and which of these sorted rows could be read."""
    p, seen = torch.zeros(len(heads), len(rows), classes), np.zeros(len(rows), bool)
    for x, part in features.batches(rows, features.args.micro_batch):
        at = np.searchsorted(rows, part)
        seen[at] = True
        for g, head in enumerate(heads):
            with features.autocast():
                p[g, at] = head(x.flatten(0, 1)).float().softmax(-1).view(*x.shape[:2], classes).mean(1).cpu()
    return p.nan_to_num().numpy(), seen                         # a head that diverged calls everything the same


def score(p, seen, labels):
    """p (n, classes), seen (n,), labels (n,) -> top-1, top-5, accuracy of each class (None: has no clips), confusion (classes, classes + 1): rows
    are classes, columns what they were called, the last column what could not be read. Of equal probabilities the lower class is called."""
    order = np.argsort(-p, axis=1, kind="stable")
    called = np.where(seen, order[:, 0], p.shape[1])
    confusion = np.zeros((p.shape[1], p.shape[1] + 1), int)
    np.add.at(confusion, (labels, called), 1)
    per_class = [float(confusion[c, c] / n) if n else None for c, n in enumerate(confusion.sum(1))]
    top5 = (order[:, :5] == labels[:, None]).any(1) & seen
    return float((called == labels).mean()), float(top5.mean()), per_class, confusion


def hold_out(paths, group, share, seed):
    """Rows of a list -> (rows to train on, rows held out): whole videos, or whole groups of them, chosen by seed."""
    matches = [re.search(group, path) if group else None for path in paths]
    videos, video = np.unique([m.group() if m else path for m, path in zip(matches, paths)], return_inverse=True)
    held = np.isin(video, np.random.default_rng(seed).permutation(len(videos))[: max(1, round(share * len(videos)))])
    if held.all():
        raise D.DataError(f"nothing is left to train on: all {len(paths)} videos are held out (--holdout {share}, --group {group!r})")
    return np.flatnonzero(~held), np.flatnonzero(held)


def fit(args, features, labels, classes):
    """Train --head -> (head, what was chosen {"lr", "wd", "held_out"}, all that was tried). Of a grid, the pair with the best accuracy on the
    held-out videos is chosen, the likelihood there deciding between equals. A single pair needs no choice and is trained on all videos."""
    kind, (rows, held) = HEADS[args.head], (np.arange(len(labels)), np.arange(0))
    grid = [(lr, wd) for lr in args.grid_lr or kind["lr"] for wd in args.grid_wd or kind["wd"]] if kind["lr"] else [(None, None)]
    if len(grid) > 1:
        rows, held = hold_out(features.source.paths or [str(i) for i in range(len(labels))], args.group, args.holdout, args.seed)
    x = y = None
    if kind["pooled"]:
        pairs = [(z[:, 0, 0], torch.from_numpy(labels[part]).to(z.device)) for z, part in features.batches(rows, args.micro_batch)]
        x, y = map(torch.cat, zip(*pairs))
    heads = []
    for _ in grid:                                              # all start alike: they differ in their rates only
        torch.manual_seed(args.seed)
        heads.append(kind["build"](features.shape[-1], classes, features.config.get("heads"), x, y).to(features.device))
    if kind["lr"]:
        train_heads(heads, grid, features, rows, labels, args, args.batch_size or max(16, min(256, len(rows) // 512 * 16)))
    tried, best = [{"lr": lr, "wd": wd, "held_out": None} for lr, wd in grid], 0
    if len(grid) > 1:
        p, seen = predict(heads, features, held, classes)
        likelihood = np.log(p[:, np.arange(len(held)), labels[held]] + 1e-9).mean(1)
        for g, pair in enumerate(tried):
            pair["held_out"] = score(p[g], seen, labels[held])[0]
        best = max(range(len(grid)), key=lambda g: (tried[g]["held_out"], likelihood[g]))
    return heads[best], tried[best], tried


# --- tasks ---


def lists(args, labelled=True, rooms=False):
    """The train and the val source. rooms: of the built-in world, the splits for tasks of space."""
    if (args.data, bool(args.train), bool(args.val)) not in (("world", False, False), ("", True, True)):
        raise D.DataError("give --train LIST and --val LIST, or --data world")
    if args.data:
        splits = ("rooms", "rooms_val") if rooms else ("probe", "val")          # none shares a clip with what encoders are trained on
        pair = zip(splits, (args.train_clips, args.val_clips))
        return [dataclasses.replace(source, labels=source.labels[:clips]) for source, clips in ((D.parse_list("world", s), n) for s, n in pair)]
    train, val = (D.parse_list(spec, labelled=labelled) for spec in (args.train, args.val))
    return D.match_classes(train, val) if labelled else (train, val)


def check_classes(train, val):
    """The classes of train, in order; val may have no others."""
    known = np.unique(train.labels)
    for source, flag in ((train, "--train"), (val, "--val")):
        for i in np.flatnonzero((source.labels < 0) | ~np.isin(source.labels, known)):
            name, label = source.paths[i] if source.paths else f"{source.name} {i}", source.labels[i]
            told = source.classes[label] if source.classes and label >= 0 else label
            raise D.DataError(f"{flag}: {name}: " + ("no label" if label < 0 else f"label {told} is not in --train, which has {len(known)} classes"))
    return known


def clip_of(args, config):
    """How clips are taken: as the flags say, else as the encoder's file does."""
    fps = args.fps or (not args.stride and config.get("fps")) or None
    return D.Clip(args.frames or config.get("frames", 16), args.stride or config.get("stride", 4), fps, args.size or config.get("size", 224),
                  args.crop_scale, args.crop_ratio, args.flip, segments=args.segments)


def blocks_read(args, config):
    """How many blocks run before a head reads: --layer, else what the file says, else all. 4DS's says 75 % for frozen classification alone."""
    frozen_only = None if args.finetune else config.get(f"layer_{args.task}")
    return args.layer or frozen_only or config.get("layer") or config.get("depth", 0)


def frozen(args, train, val, device):
    """The features of both sources, stored if they fit -> (train, val, blocks run)."""
    encoder, config = load(args)
    encoder.to(device).eval().requires_grad_(False)
    depth, pooled = config.get("depth", 0), HEADS[args.head]["pooled"]
    if args.layer > depth:
        raise D.DataError(f"--layer {args.layer}: the encoder has {depth} blocks")
    layer = blocks_read(args, config)
    if not pooled and not depth:
        raise D.DataError(f"--encoder {args.encoder} gives one vector a clip: use --head linear or knn")
    if pooled and args.pool == "cls" and not config.get("cls", False):
        raise D.DataError("--pool cls: this encoder has no CLS token")
    clip = clip_of(args, config)
    try:
        both = (Features(args, encoder, config, train, layer, dataclasses.replace(clip, train=args.train_passes > 0), device),
                Features(args, encoder, config, val, layer, dataclasses.replace(clip, train=False, views=args.views), device))
    except ValueError as e:
        raise D.DataError(f"--encoder {args.encoder} cannot take these clips: {e}") from e
    folder = Path(args.cache_dir or Path(args.out_dir) / "features")
    folder.mkdir(parents=True, exist_ok=True)
    if sum(x.bytes for x in both) <= min(args.cache_gb * 1e9, 0.9 * shutil.disk_usage(folder).free):
        for x in both:
            x.store(folder)
    return *both, layer


def classify(args, device):
    """Top-1 and top-5 accuracy on labelled clips."""
    if args.head == "readout":
        return space_time(args, device)
    if args.finetune:
        raise D.DataError(f"--finetune with --head {args.head}: give --head readout")
    train, val = lists(args)
    known, overlap = check_classes(train, val), M.check_overlap(train, val, "--train")
    train_x, val_x, layer = frozen(args, train, val, device)
    classes = int(known[-1]) + 1
    head, chosen, tried = fit(args, train_x, train.labels, classes)
    p, seen = predict([head], val_x, np.arange(len(val)), classes)
    top1, top5, per_class, confusion = score(p[0], seen, val.labels)
    shade, zoom = (255 * confusion / confusion.sum(1, keepdims=True).clip(1)).astype(np.uint8), max(1, 640 // classes)
    D.save_png(Path(args.out_dir) / "confusion.png", np.kron(shade, np.ones((zoom, zoom), np.uint8))[..., None].repeat(3, 2))
    majority = float((val.labels == np.bincount(train.labels).argmax()).mean())
    bad = train_x.bad | val_x.bad
    result = {"metric": "top1", "value": top1, "top5": top5, "chance": 1 / len(known), "majority": majority, "head": args.head, **chosen,
              "params": sum(p.numel() for p in head.parameters()), "layer": layer, "n_train": len(train), "n_val": len(val), "overlap": overlap, "bad": len(bad)}
    return result, {"per_class": per_class, "confusion": confusion.tolist(), "tried": tried, "bad_videos": bad}


def restore(args, device):
    """The run folder --encoder -> the objective of the script that made it, with the newest checkpoint's weights."""
    folder = Path(args.encoder.removeprefix("random:"))
    if not (folder / "latest").exists() or not (folder / "config.json").exists():
        raise D.DataError(f"--encoder {folder}: {args.task} needs the folder of a training run; predictors and decoders are not in encoder files")
    head = json.loads((folder / "config.json").read_text())
    said = head["config"]
    name = head["script"]
    if not name.isidentifier() or not (Path(__file__).parent / f"{name}.py").exists():
        raise D.DataError(f"--encoder {folder}: made by {name}.py, which does not lie beside probe.py")
    script = importlib.import_module(name)
    found = M.newest(folder)
    if isinstance(found, str):
        raise D.DataError(found)
    known = dict(getattr(script, "LATER", {}))
    for field in dataclasses.fields(script.Args):               # a flag that the run did not have yet: what runs did then
        if field.name in said:
            value = said[field.name]
            known[field.name] = tuple(value) if isinstance(value, list) else value
    known["out_dir"] = str(folder.resolve())                    # SALT's stage, and where its teacher lies
    if known.get("init"):                                       # its shape, of whatever family
        known["init"] = "" if args.encoder.startswith("random:") else str(folder / "encoder.safetensors")
    torch.manual_seed(args.seed)
    try:
        objective = script.build(script.Args(**known))
    except ValueError as e:
        raise D.DataError(f"--encoder {folder}: {e}") from e
    if not args.encoder.startswith("random:"):
        M.read_checkpoint({"model": objective.state_dict()}, found)
    return objective.to(device).eval().requires_grad_(False)


def pyplot(task):
    try:
        import matplotlib
    except ImportError:
        raise D.DataError(f"the picture of {task} needs: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def read_log(file):
    """The lines of a .jsonl; the last one may be half written."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def plot(args, device):
    """Online-probe accuracy against training loss and against FLOPs, a curve a run of --runs. R^2 is that of a line through the points of the left panel:
    of each run (does its loss choose among its checkpoints?) and of all runs together (does it choose among runs?)."""
    plt = pyplot(args.task)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    points, each = [], {}
    fit = lambda pairs: float(np.corrcoef(np.array(pairs).T)[0, 1] ** 2) if len(pairs) > 2 else None
    for run in args.runs:
        if not (log := Path(run) / "log.jsonl").exists():
            raise D.DataError(f"--runs {run}: no log.jsonl in this folder")
        rows, last = {}, {}
        for line in read_log(log):                              # of a step that was run twice, the later line counts
            last = line if "loss" in line else last
            if line.get("probe_acc") is not None and last:
                rows[line["step"]] = (last["loss"], last["flops"], line["probe_acc"])
        if not rows:
            raise D.DataError(f"--runs {run}: no probe_acc in its log (train with --probe_data and --probe_every)")
        loss, flops, accuracy = zip(*(rows[s] for s in sorted(rows)))
        points += zip(loss, accuracy)
        each[run] = fit([*zip(loss, accuracy)])
        axes[0].plot(loss, accuracy, "o-", label=run)
        axes[1].semilogx(flops, accuracy, "o-", label=run)
    for axis, name in zip(axes, ("training loss", "training FLOPs")):
        axis.set(xlabel=name, ylabel="online probe, top-1")
        axis.legend(fontsize=7)
    figure.savefig(Path(args.out_dir) / "plot.png", dpi=120)
    plt.close(figure)
    return {"metric": "r2", "value": fit(points), "each": each, "points": len(points), "picture": str(Path(args.out_dir) / "plot.png")}, {}


def compare(args, device):
    """A Markdown table, a row a run: the last accuracy of its online probe and the last of each probe whose --out_dir was the run's folder, in per cent, each
    beside its difference to the baseline in points (FWM-HW-LD, Table 4). Folders without log.jsonl are passed over. Given clips, also halves.png."""
    names = [run for run in args.runs if (Path(run) / "log.jsonl").exists()]
    baseline = args.baseline or (names or [""])[0]
    if baseline not in names:
        raise D.DataError(f"--baseline {baseline}: not among the runs with a log.jsonl: {' '.join(names) or 'none'}")
    table = {}                                                  # run -> column -> accuracy; of what was done twice, the later line counts
    for run in names:
        lines = read_log(Path(run) / "log.jsonl")
        table[run] = {"online probe": line["probe_acc"] for line in lines if line.get("probe_acc") is not None}
        if (probes := Path(run) / "probe.jsonl").exists():
            for line in map(json.loads, probes.read_text().splitlines()):
                if line["task"] == "classify":
                    table[run][f"{line['args']['val'] or line['args']['data']}, {line['head']}"] = line["value"]
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    short = {column: re.sub(r"^.*/|\.\w+(?=, \w+$)", "", column) for column in columns}       # ssv2, linear for lists/ssv2.csv, linear, if no other is called so
    title = lambda column: short[column] if [*short.values()].count(short[column]) == 1 else column
    print("| run |" + "".join(f" {title(column)} | Δ |" for column in columns) + "\n|---|" + "---|---|" * len(columns))
    deltas = {}
    for run, row in table.items():
        deltas[run] = {c: row[c] - table[baseline][c] for c in columns if c in row and c in table[baseline]}
        said = lambda c: f" {100 * row[c]:.2f} |" if c in row else " - |"
        change = lambda c: " |" if run == baseline else f" {100 * deltas[run][c]:+.2f} |" if c in deltas[run] else " - |"
        print(f"| {Path(run).name} |" + "".join(said(c) + change(c) for c in columns))
    return {"metric": "delta", "value": deltas, "baseline": baseline} | (halves(args, names, device) if args.data or args.val else {}), {}


@torch.no_grad()
def halves(args, runs, device):
    """halves.png, a panel a run: the cosine similarity of a place's tokens d slices apart, in the first half of the channels (appearance, where FWM is on) and
    in the second (dynamics). Tokens are layer-normed, as in training, less their mean over the first 256 val clips, without which all of them look alike."""
    plt, found = pyplot(args.task), {}
    val = D.parse_list(*(("world", "val") if args.data else (args.val,)))
    val = dataclasses.replace(val, labels=val.labels[: args.val_clips]) if args.data else val
    for run in runs:
        encoder, config = load(dataclasses.replace(args, encoder=run))
        clip, z = dataclasses.replace(clip_of(args, config), train=False), []
        t, hw = clip.frames // (1 if config["images"] else config["tubelet"]), (clip.size // config["patch"]) ** 2
        if t < 2:
            raise D.DataError(f"--frames {clip.frames}: {run} makes no two slices of them")
        try:
            for batch in D.eval_batches(val, clip, batch_size=args.micro_batch, workers=args.workers, rows=range(min(256, len(val)))):
                x = D.prepare(batch, device, config["mean"], config["std"])[batch["ok"].to(device)]
                z.append(F.layer_norm(encoder.to(device)(x, blocks=args.layer or None).float(), (config["width"],))[:, -t * hw :].cpu())      # without CLS
        except ValueError as e:
            raise D.DataError(f"{run} cannot take these clips: {e}") from e
        if not len(z := torch.cat(z)):
            raise D.DataError(f"{val.name}: none of its first videos can be read")
        z = (z - z.mean((0, 1))).unflatten(1, (t, hw))                                                      # (B,t,hw,D)
        found[run] = {name: [F.cosine_similarity(half[:, :-d], half[:, d:], dim=-1).mean().item() for d in range(1, t)]
                      for name, half in zip(("appearance", "dynamics"), z.chunk(2, -1))}
    low = min(0, *(v for curves in found.values() for values in curves.values() for v in values))
    figure, axes = plt.subplots(1, len(runs), figsize=(2.6 * len(runs), 2.8), sharey=True, squeeze=False, constrained_layout=True)
    for axis, (run, curves) in zip(axes[0], found.items()):
        for name, values in curves.items():
            axis.plot([*range(1, len(values) + 1)], values, "o-", label=name)
        axis.set(title=Path(run).name, xlabel="slices apart", xticks=range(1, len(values) + 1), ylim=(low - 0.05, 1.05))
    axes[0, 0].set_ylabel("cosine similarity")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(Path(args.out_dir) / "halves.png", dpi=120)
    plt.close(figure)
    return {"halves": found, "picture": str(Path(args.out_dir) / "halves.png")}


# --- space and time: the heads; features z (B,t,n,D) of t moments and n = h*w places each -> what a task asks ---


class Readout(nn.Module):
    """4DS's readout, one for every task (section 3.2, appendix A.2): LN(z) + positions -> cross-attention -> q + Linear -> + MLP(LN) -> Linear.

    grid: (t,h,w) of z. queries: a grid of learned queries, which are not projected; None: they are given. steps: resample z to so many moments first.
    Positions and queries are learned and start as sines and cosines: tokens of a rope encoder do not say where they are, and the paper has the queries
    of depth learned in one place and Fourier features in another.
    """

    def __init__(self, in_width, grid, out, *, width, heads, queries=None, steps=0):
        super().__init__()
        self.steps = steps or grid[0]
        self.norm = M.LayerNorm(in_width, eps=1e-6)
        self.positions = nn.Parameter(M.sincos_table(in_width, (self.steps, *grid[1:]))[None].clone())
        self.queries = nn.Parameter(M.sincos_table(width, tuple(queries))[None].clone()) if queries else None
        self.attn = M.CrossAttention(width, heads, in_width, project=not queries)
        self.norm2, self.mlp, self.linear = M.LayerNorm(width, eps=1e-6), M.Mlp(width, 4 * width, "gelu"), nn.Linear(width, out)

    def forward(self, z, q=None):
        """z (B,t,n,D), q (B,Q,width) unless the queries are learned -> (B,Q,out)."""
        if z.shape[1] != self.steps:
            z = F.interpolate(z.flatten(2).transpose(1, 2), self.steps, mode="linear").transpose(1, 2).unflatten(2, z.shape[2:])
        z = self.norm(z).flatten(1, 2) + self.positions
        q = self.queries.expand(len(z), -1, -1) if q is None else q
        x = q + self.attn(q, z)
        return self.linear(x + self.mlp(self.norm2(x)))


def fourier(x, bases=16):
    """x (..., C) from 0 to 1 -> (..., C*2*bases): sin and cos of 1 to `bases` half turns."""
    angle = x[..., None] * torch.arange(1, bases + 1, device=x.device) * math.pi
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class Tracker(nn.Module):
    """A Readout whose queries are what is given of things in the first frame: Fourier features of C coordinates through an MLP, in `copies` with a
    learned embedding each, every copy answering for its part of the clip (4DS A.2.3: 8 for points; A.2.4: 1 for boxes)."""

    def __init__(self, in_width, grid, coordinates, frames, out, *, width, heads, copies=1, steps=0):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32 * coordinates, 512), nn.GELU(), nn.Linear(512, width))
        self.time = nn.Parameter(M.sincos_table(width, (copies, 1, 1)).clone())
        self.out, self.readout = out, Readout(in_width, grid, frames // copies * out, width=width, heads=heads, steps=steps)

    def forward(self, z, first):
        """z (B,t,n,D), first (B,O,C) as shares of the picture -> (B,O,T,out)."""
        q = self.embed(fourier(first))[:, :, None] + self.time                                              # (B,O,copies,width)
        return self.readout(z, q.flatten(1, 2)).view(*first.shape[:2], -1, self.out)


def conv(a, b, kernel=3):
    return nn.Sequential(nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(8, b), nn.ReLU())


def resize(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def pyramid(z, grid, convs):
    """z (B,n,4*D) of four layers, shallow to deep -> four maps of 4, 2, 1 and 1/2 times the grid (h,w), each through its convolution."""
    maps = [v.transpose(1, 2).unflatten(2, grid) for v in z.chunk(4, -1)]
    sizes = [[max(1, int(side * scale)) for side in grid] for scale in (4, 2, 1, 0.5)]
    return [f(resize(v, size)) for f, v, size in zip(convs, maps, sizes)]


class UPerNet(nn.Module):
    """Segmentation from four layers: pooling at several scales on the coarsest map, a feature pyramid over all of them, one classifier on their
    concatenation (Xiao et al., 2018). Maps of a plain ViT are resized to 4, 2, 1 and 1/2 times its grid; group norm for batch norm."""

    def __init__(self, in_width, grid, out, width, pools=(1, 2, 3, 6)):
        super().__init__()
        self.grid, self.pools = grid, pools
        self.lateral = nn.ModuleList(conv(in_width, width, 1) for _ in range(4))
        self.pooled = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU()) for _ in pools)
        self.bottom, self.fuse = conv(width * (1 + len(pools)), width), conv(4 * width, width)
        self.smooth = nn.ModuleList(conv(width, width) for _ in range(3))
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, z, size):
        """z (B,n,4*D) -> (B,out,*size)."""
        x = pyramid(z, self.grid, self.lateral)
        x[3] = self.bottom(torch.cat([x[3], *(resize(f(F.adaptive_avg_pool2d(x[3], p)), x[3].shape[2:]) for f, p in zip(self.pooled, self.pools))], 1))
        for i in (2, 1, 0):
            x[i] = x[i] + resize(x[i + 1], x[i].shape[2:])
        x = [f(v) for f, v in zip(self.smooth, x)] + [x[3]]
        return resize(self.out(self.fuse(torch.cat([resize(v, x[0].shape[2:]) for v in x], 1))), size)


class TwoFrameDPT(nn.Module):
    """A picture of values for each place of one frame, told another (flow, stereo; TDV D.3, CroCo v2). Four blocks, each of self-attention, cross-attention
    to the other frame and MLP, take up one of four layers each; DPT's convolutions join their outputs from coarse to fine."""

    def __init__(self, in_width, grid, out, width, heads):
        super().__init__()
        self.grid, D = grid, width
        self.embed = nn.ModuleList(nn.Sequential(M.LayerNorm(in_width, eps=1e-6), nn.Linear(in_width, D)) for _ in range(4))
        self.positions = nn.Parameter(M.sincos_table(D, (1, *grid))[None].clone())
        self.blocks = nn.ModuleList(M.MotionBlock(D, heads, 4 * D, "xattn") for _ in range(4))
        self.lateral, self.refine = (nn.ModuleList(conv(D, D) for _ in range(4)) for _ in range(2))
        self.out = nn.Sequential(conv(D, D), nn.Conv2d(D, out, 1))

    def forward(self, z, other, size):
        """z, other (B,n,4*D) -> (B,out,*size)."""
        x, hooks = self.positions, []
        for embed, block, a, b in zip(self.embed, self.blocks, z.chunk(4, -1), other.chunk(4, -1)):
            x = block(x + embed(a), None, embed(b) + self.positions)
            hooks.append(x)
        maps, x = pyramid(torch.cat(hooks, -1), self.grid, self.lateral), 0
        for f, v in list(zip(self.refine, maps))[::-1]:
            x = v + (resize(x, v.shape[2:]) if torch.is_tensor(x) else 0)
            x = x + f(x)
        return resize(self.out(x), size)


# --- dense labels -----------------------------------------------------------------------------------------------------------------------

PER_CLIP = ("K", "actions", "kind", "change")  # all other labels have a row for each frame
PICTURES = ("depth", "masks", "flow", "flow_visible", "disparity", "disparity_visible")
SEEN = {"visible": "tracks", "flow_visible": "flow", "disparity_visible": "disparity"}  # in a file that lacks it: wherever the other is known


def read_labels(path, names, at, box, size, shape):
    """The arrays `names` of the .safetensors file beside the video `path` of `shape` (T,H,W), of its frames `at`, cut and resized as crop_resize does with
    `box`. A picture of labels may have another size than the frames; values in pixels are always pixels of the frames. One row may stand for all frames."""
    beside, out = Path(path).with_suffix(".safetensors"), {}
    corner, scale = torch.tensor([box[1], box[0]]), size / torch.tensor([box[3], box[2]])
    centres = torch.stack(torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="xy"), -1)
    if not beside.is_file():
        raise D.DataError(f"{path}: no dense labels (no file {beside}); `python data.py index LAYOUT ROOT` makes them")
    with safe_open(beside, "pt") as file:
        has = set(file.keys())
        for name in dict.fromkeys([*names, *(SEEN[n] for n in names if n in SEEN)]):
            if name not in has:
                if name in SEEN:
                    continue
                raise D.DataError(f"{beside}: no label {name!r}; it has {', '.join(sorted(has))}")
            if name in PER_CLIP:
                value = file.get_tensor(name)
            else:
                value, between = file.get_slice(name), name.startswith("flow")
                rows = value.get_shape()[0]
                if rows not in (1, shape[0] - between):
                    raise ValueError(f"{name} has {rows} rows, and the video {shape[0]} frames")
                ids = torch.from_numpy(at[:-1] if between else at).clamp_max(rows - 1)
                value = value[int(ids.min()) : int(ids.max()) + 1][ids - ids.min()] if len(ids) else value[:0]
            if name in PICTURES:
                column, row = (((c + (torch.arange(size) + 0.5) / s) * value.shape[d] / shape[d]).long() for c, s, d in zip(corner, scale, (2, 1)))
                value = value[:, row][:, :, column]
            if name in ("right", "impossible"):
                value = D.crop_resize(value, box, size)
            elif name == "flow":
                value = torch.where(torch.from_numpy(np.diff(at) == 1)[:, None, None, None], value * scale, math.nan)  # the last frame may be repeated
            elif name == "disparity":
                value = value * scale[0]
            elif name == "tracks":
                value = (value - corner) * scale
            elif name == "boxes":
                value = ((value.unflatten(-1, (2, 2)) - corner) * scale).clamp(0, size)
                value = value.masked_fill((value[..., 1, :] <= value[..., 0, :]).any(-1)[..., None, None], math.nan).flatten(-2)
            elif name == "K":
                value = torch.cat([(value[:2] - corner[:, None] * value[2:]) * scale[:, None], value[2:]])
            out[name] = value
    for name in set(SEEN) & set(names):
        end = out[SEEN[name]]
        end = end if name == "visible" else centres + (end if name == "flow_visible" else torch.stack([-end, 0 * end], -1))
        out[name] = out.get(name, torch.tensor(True)) & ((end >= 0) & (end < size)).all(-1)
    return {name: out[name] for name in names}


def stack(values):
    """Tensors (or None) whose sizes differ -> one, filled up with "unknown": NaN, for masks 255, else 0."""
    some = next((v for v in values if v is not None), torch.zeros(0))
    shape = [max(n) for n in zip(*(v.shape for v in values if v is not None))] or [0] * some.ndim
    out = some.new_full((len(values), *shape), math.nan if some.is_floating_point() else 255 if some.dtype == torch.uint8 and some.ndim == 3 else 0)
    for row, v in zip(out, values):
        if v is not None:
            row[tuple(slice(n) for n in v.shape)] = v
    return out


def dense_batches(source, clip, names, *, batch_size, workers=0, rank=0, ranks=1, rows=None, seed=0, timeout=600):
    """eval_batches with dense labels: each batch also holds the arrays `names`, b = clips as in "video" (one per video unless segments or views ask for
    more). The list's videos have them beside, clip.mp4 + clip.safetensors (`python data.py index`); the built-in world renders them.

        depth       (b,T,H,W)     float32  along the optical axis: metres; world: units, the wall is at about 1
        pose        (b,T,4,4)     float32  camera to world, axes x right, y down, z ahead; lengths as depth
        K           (b,3,3)       float32  pixels: u = (K @ (x,y,z))[0] / z
        masks       (b,T,H,W)     uint8    object or class; 255 not labelled. world: 0 wall, 1 floor, 2, 3 spheres, 4, 5 boxes
        boxes       (b,T,O,4)     float32  x0, y0, x1, y1 in pixels of object o, NaN in all four where it is not seen. world: of objects 2 to 5
        tracks      (b,T,P,2)     float32  x, y in pixels of point p; visible (b,T,P) bool. world: all are visible in frame 0
        flow        (b,T-1,H,W,2) float32  pixels to the right and down until the next frame; flow_visible (b,T-1,H,W) bool: is seen there, too
        right       (b,T,H,W,3)   uint8    what a second camera on the right sees of the same moment
        disparity   (b,T,H,W)     float32  pixels to the left at which `right` shows it; disparity_visible (b,T,H,W) bool: is seen there
        impossible  (b,T,H,W,3)   uint8    the same scene with something impossible in it; "video" is the possible one
        kind        (b,)          int64    what is impossible (world: index into IMPOSSIBLE); change (b,) int64: the first frame that differs
        actions     (b,O,C)       uint8    1 for each of C actions that object o performs

    Column j of a picture covers x from j to j + 1, row i likewise: a pixel's centre is at (j + 0.5, i + 0.5). Floats are NaN where nothing is known, and
    O and P are filled up with NaN (actions 0, visible False) to the most in the batch; visible is False where the point is unknown or outside.
    Labels are cut and resized with the frames: nearest for pictures of labels, and values in pixels are moved and scaled. Nothing is flipped. clip.train
    gives random starts and boxes as in eval_batches. Raises DataError for a label that a clip does not have, and for what would break the labels' time:
    fps (use stride), flow with a stride.
    """
    if clip.fps or (clip.stride > 1 and any(name.startswith("flow") for name in names)):
        raise D.DataError("dense labels are those of frames: give stride, not fps, and with flow stride 1")
    how = dict(batch_size=batch_size, workers=workers, rank=rank, ranks=ranks, rows=rows, seed=seed, timeout=timeout)
    if source.split:                                            # the world renders its own
        return D.eval_batches(source, dataclasses.replace(clip, flip=False), names=names, **how)
    return D.eval_batches(source, dataclasses.replace(clip, flip=False), after=partial(with_labels, names=names, size=clip.size), **how)


def with_labels(batch, names, size):
    """A batch of files with the labels beside them, which its cuts say how to cut. One whose labels are damaged is unread."""
    many = len(batch["cut"]) // len(batch["path"])              # clips of a video
    labels = [{}] * len(batch["cut"])
    for i, path in enumerate(batch["path"]):
        clips = range(i * many, (i + 1) * many)
        if not batch["ok"][i]:
            continue
        try:
            for k in clips:
                cut = batch["cut"][k]
                labels[k] = read_labels(path, names, cut.ids, cut.box, size, cut.shape)
        except D.DataError:
            raise
        except D.DAMAGE as error:
            batch["ok"][i] = False
            batch["bad"].append((path, D.reason(error)))
            batch["video"][clips.start : clips.stop] = 0
            labels[clips.start : clips.stop] = [{}] * many
    return batch | {name: stack([row.get(name) for row in labels]) for name in names}


# --- space and time: what a task asks of a clip, its loss, its metric ---


class Dense:
    """What tasks of space and time see of a source: tokens of the frames (and of the right camera's) by moment and layer, and labels. Stored: tokens on
    disk as Features keeps them, labels in memory; both are made once and shared by all tasks and seeds."""

    def __init__(self, args, encoder, config, source, layers, clip, device, names):
        if clip.frames % (a := 1 if config["images"] else config["tubelet"]):
            raise D.DataError(f"--frames {clip.frames} does not divide into tubelets of {a}")
        self.args, self.source, self.clip, self.device, self.width, self.layers, self.want = args, source, clip, device, config["width"], layers, layers
        self.encoder = encoder                                  # as it came: fine-tuning trains copies of it
        self.grid, self.names, self.labels = (clip.frames // a, *[clip.size // config["patch"]] * 2), [n for n in names if n != "right"], None
        self.features = {key: Features(args, encoder, config, source, layers, clip, device, key) for key in ("video", *{"right"} & {*names})}

    def seed(self, turn):
        return self.features["video"].seed(turn)

    def read(self, rows, size, turn, names):
        yield from dense_batches(self.source, self.clip, names, rows=rows, batch_size=size, workers=self.args.workers, seed=self.seed(turn))

    def store(self, folder):
        for f in self.features.values():
            f.store(folder)
        self.labels = []
        for turn in range((video := self.features["video"]).turns):
            made, ok = [], []
            for batch in self.read(range(len(self.source)), self.args.micro_batch, turn, self.names):
                made += [{n: batch[n][i] for n in self.names} for i in range(len(batch["ok"]))]
                ok += batch["ok"].tolist()
                video.bad.update(batch["bad"])
            video.ok[turn] = video.ok[turn] & np.array(ok)      # a clip with a damaged label file is left out, too
            self.labels.append(made)

    def room(self):
        """Bytes that store() takes on disk, for tokens, and in memory, for labels, as many as the first clip's for each."""
        one = next(self.read([0], 1, 0, self.names))
        return np.array([sum(f.bytes for f in self.features.values()),
                         sum(one[n].nbytes for n in self.names) * len(self.source) * self.features["video"].turns])

    def of(self, layers):
        """The same, whose batches have the tokens of these of the layers only."""
        view = copy.copy(self)
        view.want = layers
        return view

    def tokens(self, z):
        """(b,1,t*n,D of all layers) -> (b,t,n,D of the wanted layers)."""
        if self.want != self.layers:
            z = torch.cat([z[..., self.layers.index(i) * self.width :][..., : self.width] for i in self.want], -1)
        return z[:, 0].unflatten(1, (self.grid[0], -1))

    def tune(self, encoder):
        """From now on tokens come from this encoder, with gradients."""
        for f in self.features.values():
            f.encoder, f.grad = encoder, True

    def batches(self, rows, size, turn=0, encode=True):
        """For every `size` of these rows, those that can be read: ({key: tokens (b,t,n,D)}, labels as dense_batches has them and "class", rows)."""
        turn = turn % self.features["video"].turns
        if self.labels is not None:
            for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                part = part[self.features["video"].ok[turn][part]]
                if len(part):
                    z = {k: self.tokens(torch.from_numpy(f.stored[turn][part]).to(self.device).float()) for k, f in self.features.items()} if encode else {}
                    yield z, self.move({n: stack([self.labels[turn][r][n] for r in part]) for n in self.names}, part), part
            return
        for i, batch in enumerate(self.read(rows, size, turn, [*self.names, *{"right"} & {*self.features}])):
            ok, part = batch["ok"], rows[i * size : i * size + size]
            self.features["video"].bad.update(batch["bad"])
            if n := int(ok.sum()):
                still, part = torch.zeros(n, dtype=torch.bool), part[ok.numpy()]
                z = {k: self.tokens(f.encode({"video": batch[k][ok], "flip": still}, n)) for k, f in self.features.items()} if encode else {}
                yield z, self.move({name: batch[name][ok] for name in self.names}, part), part

    def move(self, labels, rows):
        return {n: v.to(self.device) for n, v in labels.items()} | {"class": torch.from_numpy(self.source.labels[rows]).to(self.device)}

    def endless(self, rows, size, seed):
        """Batches of shuffled passes over these rows, without end."""
        for turn in itertools.count():
            seen = 0
            for batch in self.batches(np.random.default_rng((seed, turn)).permutation(rows), size, turn):
                seen += 1
                yield batch
            if not seen:
                raise D.DataError(f"{self.source.name}: no video can be read")


@dataclasses.dataclass
class Setting:
    """What heads and labels depend on. mean, std (channels,): of the train labels, the units of what a head puts out."""
    args: Args
    width: int                         # of a token
    grid: tuple                        # (t,h,w)
    frames: int
    size: int
    classes: int = 0                   # 0: not known yet
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    def wide(self, paper, heads, world=128):
        """Width and heads of a readout: the paper's, and small ones for the built-in world."""
        width = self.args.width or (world if self.args.data else paper)
        return dict(width=width, heads=math.gcd(heads, width))


class Asking(nn.Module):
    """A head of model.py, and how it is asked: call(self, z, y) -> its answer and the labels that this is about."""

    def __init__(self, row, s):
        super().__init__()
        self.head, self.call, self.s = row["head"](s), row["call"], s

    def forward(self, z, y):
        out, y = self.call(self, z, y)
        if self.s.mean is not None:
            out = torch.cat([(part := out[..., : len(self.s.mean)]) * self.s.std + self.s.mean, out[..., part.shape[-1] :]], -1)
        return out, y


def mean_of(errors):
    return errors.sum() / max(1, errors.numel())


def known(y):
    return y["y"].isfinite()


def typical(channels):
    """Constant answers: mean and median of what is known in the train labels, for each channel."""
    def candidates(ys, s):
        v = torch.cat([y["y"].reshape(-1, channels) for y in ys])
        v = v[v.isfinite().all(1)]
        return [lambda y, c=c.squeeze(): c.expand_as(y["y"]) for c in (v.mean(0), v.median(0).values)]
    return candidates


def ask_plain(m, z, y):
    return m.head(z["video"])[:, 0], y


def ask_ends(m, z, y):
    return m.head(z["video"][:, [0, -1]])[:, 0], y


def ask_depth(m, z, y):
    return M.unpatch(m.head(z["video"]), (m.s.frames // 2, m.s.size // 8, m.s.size // 8), 2, 8).movedim(1, -1), y


def ask_tracks(m, z, y):
    """In training a random 64 things of each clip (world: 16)."""
    if m.training and y["first"].shape[1] > (most := 16 if m.s.args.data else 64):
        pick = torch.randperm(y["first"].shape[1])[:most].to(y["first"].device)
        y = {k: v[:, pick] for k, v in y.items()}
    return m.head(z["video"], y["first"].nan_to_num()), y


def ask_moments(*frames):
    """A head that answers for single moments, from the tokens that `frames` pick; in training for one random moment of each clip that has labels.
    y (B,t,a,H,W,...) -> answer (B,t,a,H,W,channels), in training (B,1,...)."""
    def call(m, z, y):
        z, v = [f(z) for f in frames], y["y"]
        if m.training:
            some = (v.isfinite() & (v != 255)).flatten(2).any(2).float().cpu() + 1e-6
            at = torch.arange(len(v))[:, None], torch.multinomial(some, 1)
            *z, v = (x[at] for x in (*z, v))
        out = m.head(*(x.flatten(0, 1) for x in z), size=v.shape[3:5]).unflatten(1, (v.shape[2], -1)).movedim(2, -1)
        return out.unflatten(0, v.shape[:2]), y | {"y": v}
    return call


def now(z):
    return z["video"]


def following(z):
    return torch.cat([z["video"][:, 1:], z["video"][:, -1:]], 1)


def ask_boxes(m, z, y):
    """The tokens of all layers under each box, weighted by how much of a patch it covers, averaged over the clip -> Linear."""
    (t, h, w), boxes = m.s.grid, y["boxes"].nan_to_num().unflatten(1, (m.s.grid[0], -1)).flatten(2, 3) / m.s.size       # (B,t,a*O,4) shares
    edges = [torch.arange(n + 1, device=boxes.device) / n for n in (w, h)]
    cover = [(torch.minimum(boxes[..., i + 2, None], e[1:]) - torch.maximum(boxes[..., i, None], e[:-1])).clamp(min=0) for i, e in enumerate(edges)]
    area = (cover[1][..., :, None] * cover[0][..., None, :]).flatten(3).unflatten(2, (-1, y["boxes"].shape[2])).sum(2)  # (B,t,O,n)
    area = area / area.sum((1, 3), keepdim=True).clamp(min=1e-9)
    return m.head(torch.einsum("bton,btnd->bod", area, z["video"])), y


def relative_pose(labels, s):
    """(B,12): the last camera in the first one's coordinates, three rows of rotation and translation."""
    R, p = labels["pose"][..., :3, :3], labels["pose"][..., :3, 3:]
    back = R[:, 0].transpose(1, 2)
    return {"y": torch.cat([back @ R[:, -1], back @ (p[:, -1] - p[:, 0])], 2).flatten(1)}


def rigid(m):
    """(B,12) -> the same with the nearest rotation (Procrustes)."""
    m = m.view(-1, 3, 4)
    u, _, v = torch.linalg.svd(m[..., :3].double())
    flip = torch.ones_like(m[:, 0, :3], dtype=torch.double)
    flip[:, 2] = torch.linalg.det(u @ v)
    return torch.cat([((u * flip[:, None]) @ v).to(m), m[..., 3:]], 2).flatten(1)


CUBE = torch.tensor(list(itertools.product((-0.5, 0.5), (-0.5, 0.5), (0.5, 1.5))))       # corners, in front of the camera whose pose it is


def pose_error(p, y):
    """Mean distance of the cube's corners moved by either pose, for each clip whose poses are known."""
    ok = known(y).all(1)
    p, y = rigid(p[ok]).view(-1, 3, 4), y["y"][ok].view(-1, 3, 4)
    moved = [CUBE.to(v) @ v[..., :3].transpose(1, 2) + v[:, None, :, 3] for v in (p, y)]
    return (moved[0] - moved[1]).norm(dim=-1).mean(1, keepdim=True)


def points(labels, s):
    """Points that are seen in the first frame, (B,P,T,2) as shares of the picture."""
    xy = labels["tracks"].transpose(1, 2) / s.size
    seen = labels["visible"].transpose(1, 2) & xy.isfinite().all(-1)
    return {"y": xy, "first": xy[:, :, 0].masked_fill(~seen[:, :, :1], math.nan), "seen": seen, "asked": seen[:, :, 0]}


def points_loss(out, y):
    """Huber on places (its corner at 4 pixels of 256), cross-entropy on "is seen" and on "is off by more than 6 pixels of 256" (TAPIR's two numbers)."""
    asked, seen = y["asked"][:, :, None].expand(y["seen"].shape), y["seen"] & y["asked"][:, :, None]
    xy, bce = out[..., :2].sigmoid(), lambda logit, truth: mean_of(F.binary_cross_entropy_with_logits(logit, truth.float(), reduction="none"))
    off = (xy.detach() - y["y"]).norm(dim=-1) > 6 / 256
    place = mean_of(F.huber_loss(xy[seen], y["y"][seen], delta=4 / 256, reduction="none"))
    return 100 * place + 0.1 * bce(out[..., 2][asked], y["seen"][asked]) + 0.1 * bce(out[..., 3][seen], off[seen])


def points_answer(out):
    """-> (B,P,T,3): place, and 1 where the point is called visible. TAPIR also hides points whose place is uncertain, which is right for good trackers only:
    where most places are off by more than 6 pixels it would hide nearly all of them."""
    return torch.cat([out[..., :2].sigmoid(), (out[..., 2:3] > 0).float()], -1)


def jaccards(p, y):
    """Jaccard of each clip at 1, 2, 4, 8 and 16 pixels of 256 over the points seen in the first frame and all later frames (TAP-Vid) -> (clips, 5)."""
    out = []
    for p, gt, seen, asked in zip(p, y["y"], y["seen"], y["asked"]):
        p, gt, seen = p[asked, 1:], gt[asked, 1:], seen[asked, 1:]
        called = p[..., 2] > 0.5
        near = [seen & ((p[..., :2] - gt).norm(dim=-1) * 256 < r) for r in (1, 2, 4, 8, 16)]
        if (seen | called).any():                               # true positives / (visible + false positives)
            out.append(torch.stack([(n & called).sum() / (seen.sum() + (called & ~n).sum()) for n in near]))
    return torch.stack(out) if out else torch.zeros(0, 5)


def boxes(labels, s):
    """Boxes that cover at least 0.5 % of the first frame, (B,O,T,4) as shares of the picture."""
    y = labels["boxes"].transpose(1, 2) / s.size
    area = (y[:, :, 0, 2:] - y[:, :, 0, :2]).prod(-1)
    y = y.masked_fill(~(area >= 0.005)[:, :, None, None], math.nan)
    return {"y": y, "first": y[:, :, 0]}


def ious(p, y):
    """Intersection over union of every known box but the first frame's -> (boxes, 1)."""
    ok = known(y).all(-1)
    ok[:, :, 0] = False
    p, y = p[ok], y["y"][ok]
    area = lambda b: (b[:, 2:] - b[:, :2]).clamp(min=0).prod(1)
    both = area(torch.cat([torch.maximum(p[:, :2], y[:, :2]), torch.minimum(p[:, 2:], y[:, 2:])], 1))
    return (both / (area(p) + area(y) - both).clamp(min=1e-9))[:, None]


def actions(labels, s):
    """What each box does: AVA's actions; in the world, where its picture moves: right, down, nearer, left, up, away, by a fifth of its size or more over the
    frames that show it. Of the world's boxes the middle frame's alone are pooled, as of AVA's key frames: how a box moves would tell what it does."""
    box = labels["boxes"]                                       # (B,T,O,4)
    seen = box.isfinite().all(-1)
    if "actions" in labels:
        return {"y": labels["actions"].float().masked_fill(~seen.any(1)[..., None], math.nan), "boxes": box}
    first, last = seen.int().argmax(1), box.shape[1] - 1 - seen.flip(1).int().argmax(1)                # (B,O) frames
    a, b = (box.gather(1, i[:, None, :, None].expand(-1, 1, -1, 4))[:, 0] for i in (first, last))
    side, moved = (a[..., 2:] - a[..., :2]).clamp(min=1), ((b - a)[..., :2] + (b - a)[..., 2:]) / 2
    moved, grown = moved / side, ((b[..., 2:] - b[..., :2]).clamp(min=1) / side).log().mean(-1, keepdim=True)
    y, key = (torch.cat([moved, grown, -moved, -grown], -1) > 0.2).float(), torch.arange(box.shape[1], device=box.device) == box.shape[1] // 2
    return {"y": y.masked_fill(~(seen[:, key].all(1) & (last > first))[..., None], math.nan), "boxes": box.masked_fill(~key[:, None, None], math.nan)}


def average_precision(score, y):
    """Area under the steps of precision over recall; what has equal scores is called together. score, y (n,)."""
    if not len(y):
        return None
    value, group = torch.unique(-score, return_inverse=True)
    hits, n = (torch.zeros(len(value), dtype=torch.double).index_add(0, group, v.double()).cumsum(0) for v in (y, torch.ones_like(y)))
    return ((hits.diff(prepend=hits.new_zeros(1)) / hits[-1]) * hits / n).sum() if hits[-1] else None


def mean_ap(rows):
    """rows (boxes, 2*C): scores, then truth -> mean over the classes that occur."""
    found = [average_precision(s, y) for s, y in zip(*(v.T for v in rows.chunk(2, 1)))]
    found = [f for f in found if f is not None]
    return {"map": float(np.mean(found)) if found else math.nan}


def kinds(labels, s):
    """Classes (B,t,a,H,W), 255 unknown; of the world wall, floor, spheres, boxes: its objects are classes only in pairs."""
    mask = labels["masks"].long()
    if s.args.data:
        mask = torch.tensor([0, 1] + [2] * D.SPHERES + [3] * D.BOXES + [255] * 256, device=mask.device)[mask]
    top = int(mask[mask < 255].max()) if (mask < 255).any() else 0
    if s.classes and top >= s.classes:
        raise D.DataError(f"segment: a mask has the label {top}, but there are {s.classes} classes (of the first clips of --train): give --classes {top + 1}")
    return {"y": mask.unflatten(1, (s.grid[0], -1))}


def confusion(p, y):
    """(1, C*C): row by row, what pixels of each class were called. p (..., C)."""
    C, y = p.shape[-1], y["y"]
    ok = y < C
    return torch.bincount(y[ok] * C + p.argmax(-1)[ok], minlength=C * C)[None]


def mean_iou(counts):
    """From the confusion of the whole data set: mean over classes that occur or are called, and accuracy over classes that occur."""
    counts = counts.sum(0).view(math.isqrt(counts.shape[1]), -1)
    hit, truth, called = counts.diag(), counts.sum(1), counts.sum(0)
    return {"miou": (hit / (truth + called - hit)).nanmean().item(), "macc": (hit / truth).nanmean().item()}


def flow(labels, s):
    y = F.pad(labels["flow"], (0, 0, 0, 0, 0, 0, 0, 1), value=math.nan)                  # the last frame's leads out of the clip
    return {"y": y.unflatten(1, (s.grid[0], -1))}


def flow_sums(p, y):
    error = (p - y["y"]).norm(dim=-1)
    error = error[error.isfinite()]
    return torch.stack([error.sum(), torch.tensor(float(error.numel())).to(error)])[None]


def laplace_loss(out, y):
    """Negative log-likelihood of Laplace's distribution: |d - dhat| / b + log b, out = (dhat, log b)."""
    ok = known(y)
    d, b = out[..., 0][ok], out[..., 1][ok].clamp(-5, 5)
    return mean_of((d - y["y"][ok]).abs() * (-b).exp() + b)


def squares(out, y):
    return mean_of((out - y["y"])[known(y)].square())


def first(out):
    return out[..., 0]


def same(out):
    return out


def stereo_sums(p, y):
    error = (p - y["y"])[known(y)].abs()
    return torch.stack([error.sum(), (error > 0.5).sum().float(), (error > 1).sum().float(), torch.tensor(float(error.numel())).to(error)])[None]


def ratio(*names):
    """Sums with their count in the last column -> pooled means."""
    return lambda sums: dict(zip(names, (sums.sum(0)[:-1] / sums.sum(0)[-1]).tolist()))


def depth_sums(p, y):
    ok = known(y)
    return torch.stack([((p - y["y"]).abs() / y["y"])[ok].sum(), ok.sum().float()])[None]


def class_scores(p, y):
    """Right at first, and among the first five, for each clip -> (B, 2)."""
    return (p.topk(min(5, p.shape[1]), 1).indices == y["y"][:, None]).cumsum(1)[:, [0, -1]].bool()


def commonest(ys, s):
    """The constant answer of a classifier."""
    v = torch.cat([y["y"].flatten() for y in ys])
    best = v[v < s.classes].bincount().argmax()
    return [lambda y: torch.eye(s.classes, device=y["y"].device)[best].expand(*y["y"].shape, -1)]


def still(extra=0):
    """What stands for no video in tracking: everything stays where it was."""
    return lambda ys, s: [lambda y: F.pad(y["first"][:, :, None].expand(y["y"].shape), (0, extra), value=1.0)]


# labels: of dense_batches. y(labels, setting): the task's labels in a form of its own, NaN where unknown. layers: 4 of them, or the last. head, call: see
# Asking; channels: its answer is in units of the labels' mean and deviation. loss(out, y). answer(out): what the metric takes. tally(answer, y): rows that
# final(rows) turns into the metric and its companions; wrong: the row of a clip that cannot be read. up: higher is better. constants(ys): answers that look at
# no video; the best on train is the baseline
DENSE = {
    "classify": dict(labels=(), y=lambda l, s: {"y": l["class"]}, layers=1, up=True, final=lambda c: dict(zip(("top1", "top5"), c.mean(0).tolist())),
                     head=lambda s: Readout(s.width, s.grid, s.classes, queries=(1, 1, 1), steps=s.args.resample, **s.wide(768, 12)), call=ask_plain,
                     loss=lambda out, y: F.cross_entropy(out, y["y"]), answer=same, tally=class_scores, wrong=torch.zeros(1, 2).double(), constants=commonest),
    "pose": dict(labels=("pose",), y=relative_pose, layers=1, up=False, final=lambda e: {"epe": e.mean().item()}, channels=12,
                 head=lambda s: Readout(s.width, (2, *s.grid[1:]), 12, queries=(1, 1, 1), **s.wide(s.width, 8)), call=ask_ends,
                 loss=squares, answer=same, tally=pose_error, constants=typical(12)),
    "points": dict(labels=("tracks", "visible"), y=points, layers=1, up=True, final=lambda j: {"aj": j.mean().item(), "jaccard": j.mean(0).tolist()},
                   head=lambda s: Tracker(s.width, s.grid, 2, s.frames, 4, copies=s.frames // 2, steps=s.args.resample, **s.wide(1024, 8)),
                   call=ask_tracks, loss=points_loss, answer=points_answer, tally=jaccards, constants=still(1)),
    "boxes": dict(labels=("boxes",), y=boxes, layers=1, up=True, final=lambda i: {"miou": i.mean().item()},
                  head=lambda s: Tracker(s.width, s.grid, 4, s.frames, 4, steps=s.args.resample, **s.wide(1024, 4)),
                  call=ask_tracks, loss=squares, answer=same, tally=ious, constants=still()),
    "depth": dict(labels=("depth",), layers=1, up=False, final=ratio("absrel"), channels=1,
                  y=lambda l, s: {"y": l["depth"].masked_fill(~((l["depth"] > 0.001) & (l["depth"] < 10)), math.nan)},
                  head=lambda s: Readout(s.width, s.grid, 128, queries=(s.frames // 2, s.size // 8, s.size // 8), steps=s.args.resample, **s.wide(1024, 16)),
                  call=ask_depth, loss=lambda out, y: squares(first(out), y), answer=first, tally=depth_sums, constants=typical(1)),
    "segment": dict(labels=("masks",), y=kinds, layers=4, up=True, final=mean_iou, call=ask_moments(now),
                    head=lambda s: UPerNet(s.width, s.grid[1:], s.frames // s.grid[0] * s.classes, s.wide(512, 1, 32)["width"]),
                    loss=lambda out, y: mean_of(F.cross_entropy(out[y["y"] < 255], y["y"][y["y"] < 255], reduction="none")),
                    answer=same, tally=confusion, constants=commonest),
    "flow": dict(labels=("flow",), y=flow, layers=4, up=False, final=ratio("epe"), channels=2, call=ask_moments(now, following),
                 head=lambda s: TwoFrameDPT(s.width, s.grid[1:], 2 * s.frames // s.grid[0], **s.wide(768, 12, 64)),
                 loss=lambda out, y: mean_of((out - y["y"])[known(y)].abs()), answer=same, tally=flow_sums, constants=typical(2)),
    "stereo": dict(labels=("right", "disparity"), layers=4, up=False, final=ratio("average", "bad0.5", "bad1"), channels=1,
                   y=lambda l, s: {"y": l["disparity"].unflatten(1, (s.grid[0], -1))}, call=ask_moments(now, lambda z: z["right"]),
                   head=lambda s: TwoFrameDPT(s.width, s.grid[1:], 2 * s.frames // s.grid[0], **s.wide(768, 12, 64)),
                   loss=laplace_loss, answer=first, tally=stereo_sums, constants=typical(1)),
    "detect": dict(labels=("boxes", "actions"), y=actions, layers=4, up=True, final=mean_ap, call=ask_boxes,
                   head=lambda s: nn.Sequential(M.LayerNorm(4 * s.width), nn.Linear(4 * s.width, s.classes)),
                   loss=lambda out, y: mean_of(F.binary_cross_entropy_with_logits(out[known(y)], y["y"][known(y)], reduction="none")),
                   answer=same, tally=lambda p, y: torch.cat([p, y["y"]], 2)[known(y).all(2)],
                   constants=lambda ys, s: [lambda y: torch.zeros_like(y["y"])]),                   # all boxes alike
}


def open_clips(args, names, layers, labelled, device):
    """-> the train and val Dense of --encoder with these labels, its config, and the layer that readouts read."""
    train, val = lists(args, labelled, rooms=True)
    if args.fps or len(args.grid_wd) > 1 or args.width % 8:
        raise D.DataError(f"--fps {args.fps} --grid_wd {args.grid_wd} --width {args.width}: tasks of space and time sample by --stride, have one weight decay "
                          "and a width that 8 divides")
    encoder, config = load(args)
    if not (depth := config.get("depth", 0)):
        raise D.DataError(f"--encoder {args.encoder}: {args.task} needs the tokens of an encoder")
    encoder.to(device).eval().requires_grad_(False)
    if args.layer > depth:
        raise D.DataError(f"--layer {args.layer}: the encoder has {depth} blocks")
    top = blocks_read(args, config)
    quarters = tuple(max(1, round(top * q / 4)) for q in (1, 2, 3, 4))
    stride = 1 if "flow" in names or args.data else args.stride or config.get("stride", 4)
    clip = D.Clip(args.frames or config.get("frames", 16), stride, None, args.size or config.get("size", 224), args.crop_scale, args.crop_ratio, flip=False)
    if clip.frames % 2 or clip.size % 8 or clip.size % config["patch"]:
        raise D.DataError(f"--frames {clip.frames} must be even, --size {clip.size} divisible by 8 and by the encoder's patch of {config['patch']}")
    names, wanted = [n for n in names if not (args.data and n == "actions")], {top, *(quarters if layers > 1 else ())}
    if args.task == "all" and not args.layer:
        wanted.add(config.get("layer_classify") or top)
    both = []
    for source, random in ((train, args.train_passes > 0), (val, False)):
        try:
            both.append(Dense(args, encoder, config, source, tuple(sorted(wanted)), dataclasses.replace(clip, train=random), device, names))
        except ValueError as e:
            raise D.DataError(f"--encoder {args.encoder} cannot take these clips: {e}") from e
    folder = Path(args.cache_dir or Path(args.out_dir) / "features")
    folder.mkdir(parents=True, exist_ok=True)
    if not args.finetune:
        disk, memory = sum(x.room() for x in both)
        most = 0.4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if disk + memory <= args.cache_gb * 1e9 and disk <= 0.9 * shutil.disk_usage(folder).free and memory <= most:
            for x in both:
                x.store(folder)
    return *both, config, top, quarters


def learn(row, s, rates, data, rows, config):
    """One head for each learning rate, all on the same batches, by 4DS's recipe (A.2): AdamW, warm-up, cosine. Fine-tuning takes one rate: a copy of the
    encoder is trained with the head, at 0.003 of its rate (4DS, C) or 0.8 of it for each layer that lies between (V-JEPA, Table 8)."""
    a, models, groups = s.args, [], []
    for lr in rates:
        torch.manual_seed(a.seed)
        models.append(Asking(row, s).to(data.device).train())
        groups += [dict(g, peak=lr) for g in M.param_groups(models[-1], (a.grid_wd or (1e-4,))[0])]
    if a.finetune:
        encoder, depth = copy.deepcopy(data.encoder).requires_grad_(True), max(data.want)
        layers = {"norm.": 1.0} | {f"blocks.{i}.": 0.8 ** max(0, depth - i) for i in range(config["depth"])} | {"": 0.8 ** (depth + 1)}
        wd, factors = (1e-4, {"": 0.003}) if a.finetune == "4ds" else (0.05, layers)
        groups += [dict(g, peak=rates[0] * g["factor"]) for g in M.param_groups(encoder, a.grid_wd[0] if a.grid_wd else wd, factors)]
        models[0].encoder = encoder
        data.tune(encoder)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    steps, batch, warmup = a.steps, a.batch_size or 32, min(3000 if a.finetune else 1000, a.steps // 10)
    micro = math.gcd(batch, a.micro_batch) if a.finetune else batch
    batches = data.endless(rows, micro, a.seed)
    for step in tqdm(range(steps), desc=a.task, disable=not sys.stderr.isatty()):
        share = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for g in groups:
            g["lr"] = max(1e-7, g["peak"] * share)
        for i in range(batch // micro):
            z, labels, _ = next(batches)
            y = row["y"](labels, s)
            for m in models:
                torch.manual_seed(a.seed * 1_000_003 + step + i * 1_000_000_007)        # what a head picks at random does not depend on the other heads
                with data.features["video"].autocast():
                    out, asked = m(z, y)
                (row["loss"](out.float(), asked) * (micro / batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return models


def best_of(found, up):
    """Index of the best among metrics, of which the first entry counts; one that is not finite loses."""
    value = [next(iter(f.values())) * (1 if up else -1) for f in found]
    return max(range(len(found)), key=lambda i: value[i] if math.isfinite(value[i]) else -math.inf)


@torch.no_grad()
def measure(row, s, answers, data, rows, size, keep=0):
    """The metric of each of these functions (z, y) -> answer over these rows, and answers and labels of the first `keep` batches."""
    tallies, kept, seen = [[] for _ in answers], [], 0
    for z, labels, part in data.batches(rows, size, encode=any(isinstance(f, Asking) for f in answers)):
        y = row["y"](labels, s)
        for tally, f in zip(tallies, answers):
            with data.features["video"].autocast():
                p = row["answer"](f.eval()(z, y)[0].float()) if isinstance(f, Asking) else f(y)
            tally.append(row["tally"](p, y).double().cpu())
        seen += len(part)
        if len(kept) < keep:
            kept.append((p, y, part))
    if not tallies[0]:
        raise D.DataError(f"{data.source.name}: no video can be read")
    if (unread := len(rows) - seen) and row.get("wrong") is not None:
        tallies = [[*t, row["wrong"].expand(unread, -1)] for t in tallies]
    return [row["final"](torch.cat(t)) for t in tallies], kept


def space_time(args, device, opened=None):
    """A task of DENSE: a head on frozen tokens (or --finetune), its metric on val, and that of the best constant answer."""
    row, args = DENSE[args.task], dataclasses.replace(args, steps=args.steps or (600 if args.data else 20_000 if args.finetune else 40_000))
    train, val, config, top, quarters = opened or open_clips(args, row["labels"], row["layers"], args.task == "classify", device)
    want = quarters if row["layers"] > 1 else (blocks_read(args, config),)
    train, val, rows = train.of(want), val.of(want), np.arange(len(train.source))
    s = Setting(args, config["width"], train.grid, train.clip.frames, train.clip.size)
    some = rows[np.linspace(0, len(rows) - 1, min(512, len(rows))).astype(int)]                         # what constants and units are taken from
    labels = [part for _, part, _ in train.batches(some, args.micro_batch, encode=False)]
    if not labels:
        raise D.DataError(f"{train.source.name}: no video can be read")
    M.check_overlap(train.source, val.source, "--train")
    if args.task == "classify":
        s.classes = int(check_classes(train.source, val.source)[-1]) + 1
    if args.task == "segment":
        s.classes = args.classes or 1 + max(int(m[m < 255].max()) for m in (row["y"](part, s)["y"] for part in labels) if (m < 255).any())
    ys = [row["y"](part, s) for part in labels]
    if args.task == "detect":
        s.classes = ys[0]["y"].shape[2]
    if channels := row.get("channels"):
        v = torch.cat([y["y"].reshape(-1, channels) for y in ys])
        v = v[v.isfinite().all(1)]
        if len(v) < 2:
            raise D.DataError(f"{train.source.name}: {len(some)} clips of it have no labels for {args.task}")
        s.mean, s.std = v.mean(0), v.std(0) + 1e-6

    constants = row["constants"](ys, s)
    scores = [row["final"](torch.cat([row["tally"](c(y), y).double().cpu() for y in ys])) for c in constants]
    constant, name = constants[best_of(scores, row["up"])], next(iter(scores[0]))
    del labels, ys
    (base,), _ = measure(row, s, [constant], val, np.arange(len(val.source)), args.micro_batch)
    for source, found in ((train.source, scores[0]), (val.source, base)):
        if not math.isfinite(found[name]):
            raise D.DataError(f"{source.name}: its clips have no labels for {args.task}")
    usual = ((1e-3,) if args.data else (1e-4, 3e-4)) if args.finetune else (2e-3,) if args.data else (1e-4, 3e-4, 1e-3)
    rates, fit, held = args.grid_lr or usual, rows, rows[:0]
    if len(rates) > 1:
        fit, held = hold_out(train.source.paths or [str(i) for i in rows], args.group, args.holdout, args.seed)
    models = [m for some in ([[lr] for lr in rates] if args.finetune else [rates]) for m in learn(row, s, some, train, fit, config)]
    found = []
    for m in models if len(rates) > 1 else ():
        if args.finetune:
            train.tune(m.encoder)
        found += measure(row, s, [m], train, held, args.micro_batch)[0]
    best = models[best_of(found, row["up"]) if found else 0]
    if args.finetune:
        val.tune(best.encoder)
    (result,), kept = measure(row, s, [best], val, np.arange(len(val.source)), args.micro_batch, keep=1)
    picture = draw(args, s, val, *kept[0])
    bad = {k: v for x in (train, val) for f in x.features.values() for k, v in f.bad.items()}
    result = {"metric": name, "value": result[name], "constant": base[name], "better": "higher" if row["up"] else "lower",
              **{k: v for k, v in result.items() if k != name}, "lr": rates[models.index(best)], "steps": args.steps, "finetune": args.finetune,
              "params": sum(p.numel() for p in best.head.parameters()), "layer": list(want),
              "n_train": len(train.source), "n_val": len(val.source), "bad": len(bad), "picture": picture}
    return result, {"constants": base, "tried": [{"lr": lr, **f} for lr, f in zip(rates, found)], "bad_videos": bad}


# --- pictures of tasks ---


def heat(v, truth):
    """Numbers (...) -> colours (...,3) from blue to red over the range of the truth."""
    low, high = np.nanquantile(truth.numpy(), (0.02, 0.98)) if truth.isfinite().any() else (0, 1)
    v = ((v - low) / max(high - low, 1e-9)).clamp(0, 1)
    return torch.stack([(1.5 - (4 * v - centre).abs()).clamp(0, 1) for centre in (3, 2, 1)], -1).nan_to_num()


def wheel(v, truth):
    """Flow (...,2) -> its direction as a hue, its length (of the longest true one) as saturation: nothing moves where it is white."""
    top = np.nanquantile(truth.norm(dim=-1).numpy(), 0.98) if truth.isfinite().any() else 1
    angle, far = torch.atan2(v[..., 1], v[..., 0])[..., None], (v.norm(dim=-1) / max(top, 1e-9)).clamp(max=1)[..., None]
    return (1 - far * (0.5 - 0.5 * torch.cos(angle - torch.tensor([0, 2, 4]) * math.pi / 3))).nan_to_num()


def hue(i):
    """The colour of thing i."""
    return wheel(torch.tensor([math.cos(2.4 * i), math.sin(2.4 * i)])[None], torch.tensor([[1.0, 0]]))[0]


def palette(v, truth):
    return torch.stack([hue(i) for i in range(255)] + [torch.zeros(3)])[v.long()]


def enlarge(image, zoom):
    """(...,H,W,3) with every pixel `zoom` times."""
    return image.repeat_interleave(zoom, -3).repeat_interleave(zoom, -2)


def outline(image, box, colour):
    """Draw a box, given as shares, into (H,W,3)."""
    if box.isfinite().all():
        (x0, y0), (x1, y1) = [(v * (len(image) - 1)).round().int().clamp(0, len(image) - 1).tolist() for v in (box[:2], box[2:])]
        image[[y0, y1], x0 : x1 + 1] = image[y0 : y1 + 1, [x0, x1]] = colour


MAPS = {"depth": heat, "stereo": heat, "flow": wheel, "segment": palette}


def draw(args, s, data, p, y, rows):
    """TASK.png: four val clips with what is true and what was answered, or truth against answer -> its path."""
    file, n = Path(args.out_dir) / f"{args.task}.png", min(4, len(rows))
    p, y = p.cpu(), {k: v.cpu() for k, v in y.items()}
    if args.task == "classify":                                 # a row for each clip: probabilities, the true class in red
        image = p.softmax(1)[..., None].repeat(1, 1, 3)
        image[torch.arange(len(p)), y["y"], 0] = 1
        return save(file, enlarge(image, 16))
    if args.task == "pose":                                     # twelve panels: truth to the right, answer up
        image = torch.ones(3, 4, 96, 96, 3)
        for i, (a, b) in enumerate(zip(y["y"].T, p.T)):
            low, high = a.nan_to_num().min(), a.nan_to_num().max() + 1e-9
            at = [((v - low) / (high - low) * 90 + 2).nan_to_num(-1).clamp(-1, 93).int() for v in (a, b)]
            panel = image[i // 4, i % 4]
            panel[:, -1] = panel[-1] = 0.5
            for u, v in zip(*at):
                panel[95 - v - 2 : 95 - v, u : u + 2] = torch.tensor([0.8, 0.1, 0.1])
        return save(file, image.transpose(1, 2).flatten(2, 3).flatten(0, 1))
    video = next(data.read(rows[:n], n, 0, []))["video"].float() / 255                                  # (n,T,H,W,3)
    at, zoom = np.linspace(0, s.frames - 1, 4).astype(int), max(1, 128 // s.size)
    at[2] = s.frames // 2                                       # the frame whose boxes detect is given
    shown = enlarge(video[:, at], zoom)
    strips = [shown]
    if args.task in MAPS:
        values = [y["y"][:n], p[:n].argmax(-1) if args.task == "segment" else p[:n]]
        values = [v if args.task == "depth" else v.flatten(1, 2) for v in values]                       # (n,T,H,W,...)
        strips += [enlarge(MAPS[args.task](v[:, at], values[0]), zoom) for v in values]
        if args.task == "flow":                                 # the key to the colours
            r = torch.linspace(-1, 1, 32)
            strips[0][0, 0, :32, :32] = wheel(torch.stack(torch.meshgrid(r, r, indexing="xy"), -1), torch.ones(1, 2) / 2**0.5)
    else:
        shown = strips[0] = 0.4 * shown.mean(-1, keepdim=True).expand(shown.shape)                     # grey and dark, for the marks to stand out
        strips.append(shown.clone())
        for i, (k, frame) in itertools.product(range(n), enumerate(at)):
            for o in range(min(16, y["y"].shape[1])):
                if args.task == "points":                       # both strips: squares where points are, dots where they are said to be, if visible
                    spots = [(0, y["y"][i, o, frame], 3, y["seen"][i, o, frame]), (1, p[i, o, frame, :2], 1, p[i, o, frame, 2] > 0.5)]
                    for strip, xy, r, seen in spots:
                        if seen and y["asked"][i, o]:
                            outline(strips[strip][i, k], torch.cat([xy - r / 128, xy + r / 128]), hue(o))
                elif args.task == "boxes":
                    outline(strips[0][i, k], y["y"][i, o, frame], hue(o))
                    if y["first"][i, o].isfinite().all():
                        outline(strips[1][i, k], p[i, o, frame], hue(o))
                else:                                           # above the true class, below the one with the highest score
                    for strip, kind in zip(strips, (y["y"][i, o].nan_to_num(), p[i, o])):
                        outline(strip[i, k], y["boxes"][i, frame, o] / s.size, hue(int(kind.argmax())))
    return save(file, torch.stack(strips, 1).transpose(2, 3).flatten(3, 4).flatten(0, 2))


def components(args, data):
    """pca.png: four val clips, and the first three principal components of their tokens as colours."""
    data, n = data.of(data.layers[-1:]), min(4, len(data.source))
    z, _, rows = next(data.batches(np.arange(n), n), (None, None, ()))
    if not (n := len(rows)):
        return None
    video = next(data.read(rows, n, 0, []))["video"].float() / 255
    z, (t, h, w) = z["video"].cpu().flatten(0, 2), data.grid
    u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    u, zoom = (u[:, :3] - u[:, :3].amin(0)) / (u[:, :3].amax(0) - u[:, :3].amin(0)), max(1, 128 // data.clip.size)
    colours = enlarge(u.view(n, t, h, w, 3), data.clip.size // h * zoom)
    strips = torch.stack([enlarge(video[:, :: data.clip.frames // t], zoom), colours], 1)
    return save(Path(args.out_dir) / "pca.png", strips.transpose(2, 3).flatten(3, 4).flatten(0, 2))


def save(file, image):
    D.save_png(file, image.clamp(0, 1).mul(255).byte().numpy())
    return str(file)


# --- intuitive physics, and the whole suite ---


def forecaster(args, device):
    """--encoder -> its surprise(x, C) -> (B,): how wrong it foretells windows x (B,3,F,H,W) of which C frames are seen, and its {frames, stride, size,
    mean, std}. A run's objective says it itself; of published weights it is mean |P(E(x[:C]), later ids) - LN(target's tokens)|."""
    name = args.encoder.removeprefix("random:")
    if not (Path(name) / "latest").exists():                    # published weights
        try:
            if name != args.encoder:
                raise ValueError(f"{args.encoder}: random weights need the folder of a run")
            predictor, config = M.load_predictor(name)
            encoder, target = (M.load_encoder(name, key=key)[0].to(device) for key in ("encoder", "target_encoder"))
        except ValueError as e:
            raise D.DataError(f"--encoder {e}; physics needs an encoder and its predictor: a run's folder, or a file with both") from e
        predictor.to(device)

        def targets(x):
            h = target(x).float()
            return F.layer_norm(h, h.shape[-1:])

        def surprise(x, context):
            return M.latent_surprise(encoder, predictor, targets, x, context)

        return surprise, dict(frames=16, stride=4, size=config["size"], **M.IMAGENET)
    o = restore(args, device)
    if not hasattr(o, "surprise") or getattr(o, "motion", o) is None:
        raise D.DataError(f"--encoder {args.encoder}: has no predictor, so it foretells nothing")
    return o.surprise, dict(frames=o.args.frames, stride=o.args.stride, size=o.args.size, **getattr(o, "pixels", M.IMAGENET))


@torch.no_grad()
def physics(args, device):
    """Is the impossible version of a scene more surprising than the possible one? Nothing is trained (SALT, appendix D; Garrido et al., 2025)."""
    surprise, about = forecaster(args, device)
    _, val = lists(args, labelled=False, rooms=True)
    window, frames = about["frames"], args.frames or about["frames"]
    contexts = args.context or (window // 2,)
    if not all(0 < C < window and C % 2 == 0 for C in contexts) or frames < window:
        raise D.DataError(f"--context {contexts} --frames {frames}: of windows of {window} frames an even part is seen, the rest foretold")
    clip = D.Clip(frames, 1 if args.data else args.stride or about["stride"], None, args.size or about["size"], train=False)
    rows, early, shown = [], 0, None
    for batch in dense_batches(val, clip, ("impossible", "kind", "change"), batch_size=args.micro_batch, workers=args.workers):
        pair = []
        for key in ("video", "impossible"):
            x = D.prepare({"video": batch[key], "flip": batch["flip"]}, device, about["mean"], about["std"])
            starts = range(0, frames - window + 1, 2)           # the paper's stride of 2
            pair.append(torch.stack([surprise(x[:, :, t : t + window], C) for t in starts for C in contexts]).mean(0))
        ok = batch["ok"]
        rows.append(torch.stack([*(v.cpu() for v in pair), batch["kind"].float()], 1)[ok])
        differ = (batch["video"] != batch["impossible"]).flatten(2).any(2)
        early += int((differ & (torch.arange(frames) < batch["change"][:, None])).any(1)[ok].sum())     # of the world, whose clips are whole videos
        if shown is None:
            at = np.linspace(0, frames - 1, 8).astype(int)
            a, b = (batch[k][:6, at].float() / 255 for k in ("video", "impossible"))
            shown = enlarge(torch.stack([a, b, (a - b).abs()], 1), max(1, 96 // clip.size))             # the possible, the impossible, where they differ
            save(Path(args.out_dir) / "physics.png", shown.transpose(2, 3).flatten(3, 4).flatten(0, 2))
    possible, impossible, kind = torch.cat(rows).double().T
    right = (impossible > possible).double() + 0.5 * (impossible == possible)
    by_kind = {D.IMPOSSIBLE[int(k)] if args.data else str(int(k)): right[kind == k].mean().item() for k in kind.unique()}
    return {"metric": "relative_accuracy", "value": right.mean().item(), "constant": 0.5, "better": "higher",
            "error": (right.std() / len(right) ** 0.5).item(), "kinds": by_kind, "surprise": [possible.mean().item(), impossible.mean().item()],
            "context": contexts, "windows": len(starts), "n_val": len(right)} | ({"differ_early": early} if args.data else {}), {"pairs": torch.stack([possible, impossible], 1).tolist()}


def everything(args, device):
    """All tasks that the data has labels for, tokens computed once: all.json and all.md, a row for each task, and radar.png."""
    tasks = [*DENSE, "physics"]
    if not args.data:
        train, _ = lists(args, labelled=False)
        beside = Path(train.paths[0]).with_suffix(".safetensors")
        has = set(D.safe_open(beside, "pt").keys()) if beside.exists() else set()
        needs = {t: {*row["labels"]} - {*SEEN} for t, row in DENSE.items()} | {"physics": {"impossible"}}
        tasks = [t for t in tasks if has >= needs[t] and (t != "classify" or (train.labels >= 0).all())]
    if unknown := {*args.tasks} - {*tasks}:
        raise D.DataError(f"--tasks {min(unknown)}: not a task with labels in this data; there are {', '.join(tasks)}")
    tasks, found, opened, picture, begin = args.tasks or tasks, {}, {}, None, time.time()
    for seed in args.seeds or (args.seed,):
        if args.encoder.startswith("random:"):
            opened.clear()                                      # another seed is another encoder
        for task in tasks:
            a = dataclasses.replace(args, seed=seed, task=task)
            if task == "physics":
                try:
                    result, _ = physics(a, device)
                except D.DataError as e:
                    print(f"physics is left out: {e}", file=sys.stderr)
                    continue
            else:
                near = lambda t: t == "flow" and not args.data  # real flow wants neighbouring frames, and so its own tokens
                group, same = near(task), [t for t in tasks if t in DENSE and near(t) == near(task)]
                if group not in opened and not args.finetune:
                    names = dict.fromkeys(n for t in same for n in DENSE[t]["labels"])
                    layers = max(DENSE[t]["layers"] for t in same)
                    opened[group] = open_clips(dataclasses.replace(a, task="all"), [*names], layers, "classify" in same, device)
                    picture = picture or components(args, opened[group][1])
                result, _ = space_time(a, device, opened.get(group))
            found.setdefault(task, []).append(result)
            said = f"{result['metric']} {result['value']:.4f}  constant {result['constant']:.4f}"
            print(f"{time.time() - begin:.0f} s  seed {seed}  {task}  {said}", file=sys.stderr, flush=True)
    if not found:
        raise D.DataError("no task could be run")
    table, seeds = [], list(args.seeds or (args.seed,))
    for task, results in found.items():
        first, values, constants = results[0], [r["value"] for r in results], [r["constant"] for r in results]
        best = float(first["better"] == "higher")               # where a constant is perfect there is nothing to measure
        skill = [(v - c) / (best - c) for v, c in zip(values, constants) if c != best]
        table.append({"task": task, "metric": first["metric"], "better": first["better"], "constant": float(np.mean(constants)),
                      "value": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "values": values,
                      "skill": float(np.mean(skill)) if skill else None, "params": first.get("params"), "layer": first.get("layer")})
    lines = [f"`{args.encoder}`, seeds {' '.join(map(str, seeds))}; skill: 0 is the constant answer, 1 is perfect", "",
             "| task | metric | constant | value | skill |", "|---|---|---|---|---|"]
    for r in table:
        spread = f" +- {r['std']:.4f}" if r["std"] is not None else ""
        lines.append(f"| {r['task']} | {r['metric']} ({r['better']} is better) | {r['constant']:.4f} | {r['value']:.4f}{spread} | {'-' if r['skill'] is None else format(r['skill'], '.3f')} |")
    M.write(Path(args.out_dir) / "all.md", "\n".join(lines) + "\n")
    M.write(Path(args.out_dir) / "all.json", json.dumps({"encoder": args.encoder, "seeds": seeds, "table": table, "results": found}, indent=1))
    try:
        radar(table, Path(args.out_dir) / "radar.png")
    except D.DataError as e:                                    # the numbers are there without it
        print(f"no radar.png: {e}", file=sys.stderr)
    short = {r["task"]: {k: r[k] for k in ("metric", "value", "std", "constant")} for r in table}
    skills = [r["skill"] for r in table if r["skill"] is not None]
    return {"metric": "skill", "value": float(np.mean(skills)) if skills else None, "tasks": short, "seeds": seeds,
            "table": str(Path(args.out_dir) / "all.md"), "pca": picture}, {"table": table}


def radar(table, file):
    """The skill of each task on its own axis."""
    plt = pyplot("all")
    angle = np.linspace(0, 2 * np.pi, len(table), endpoint=False)
    figure, axis = plt.subplots(figsize=(5, 5), subplot_kw={"projection": "polar"}, constrained_layout=True)
    value = [max(0, r["skill"] or 0) for r in table]
    axis.fill(angle, value, alpha=0.3)
    axis.plot([*angle, angle[0]], [*value, value[0]], "o-")
    axis.set_xticks(angle, [f"{r['task']}\n{r['metric']} {r['value']:.3g}" for r in table], fontsize=8)
    axis.set_ylim(0, 1)
    figure.savefig(file, dpi=120)
    plt.close(figure)


TASKS = {**{name: space_time for name in DENSE}, "classify": classify, "physics": physics, "all": everything, "plot": plot,
         "compare": compare}
# each: (args, device) -> what is printed, what else is logged


def main(args):
    begin = time.time()
    if args.workers == -1:
        args = dataclasses.replace(args, workers=D.idle_cores())
    try:
        for f in dataclasses.fields(args):
            for v in np.ravel(getattr(args, f.name)).tolist():
                needed = f.name in ("segments", "views", "epochs", "micro_batch", "train_clips", "val_clips", "holdout", "grid_lr")
                if not isinstance(v, str) and not (0 <= v < math.inf and (v or not needed)):
                    raise D.DataError(f"--{f.name} {v}: a {'positive' if needed else 'non-negative'} finite number is needed")
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        try:
            re.compile(args.group)
            device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (re.error, RuntimeError) as e:
            raise D.DataError(f"--group {args.group!r} or --device {args.device!r}: {e}") from None
        if device.type == "cpu":
            M.tune_cpu()
        result, details = TASKS[args.task](args, device)
    except (RuntimeError, ConnectionError) as e:
        if not (why := D.dead_worker(e)):
            raise
        M.leave(why, 1)
    except (D.DataError, OSError) as e:
        M.leave(e, 2)
    finally:
        D.end_workers()
    result = {"task": args.task, **result, "seed": args.seed, "encoder": args.encoder, "seconds": round(time.time() - begin, 1)}
    with open(Path(args.out_dir) / "probe.jsonl", "a") as f:
        f.write(json.dumps(result | details | {"args": dataclasses.asdict(args)}, allow_nan=False) + "\n")
    print(json.dumps(result, allow_nan=False), flush=True)


if __name__ == "__main__":
    M.keep_console()
    main(ARGS)
