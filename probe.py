"""Probe a frozen encoder: train a small head on its features, and on nothing else, to see what they hold.

    tokens = E(x), no gradient                      (B,3,T,H,W) -> (B,N,D); the tokens of a video's S temporal clips are one sequence (B,S*N,D)
    attentive   q + Attn(q, LN(tokens)), then z + MLP(LN(z)), then Linear      q: one learned query (V-JEPA, appendix B.1)
    attentive4  three self-attention blocks over all tokens, then the same     a grid of rates and decays, trained at once (V-JEPA 2, SALT)
    linear      Linear on the standardised mean over tokens
    knn         the 20 nearest training clips by cosine of that mean vote with weight exp(cos / 0.07); nothing is trained

    python probe.py classify --encoder out/laptop/encoder.safetensors --data world --head attentive
    python probe.py classify --encoder random:out/laptop/encoder.safetensors --data world --head attentive      before any learning
    python probe.py classify --encoder pixels:diff --data world --head linear                                   without any encoder
    python probe.py reconstruct --encoder out/laptop_mae4d --data world                             a folder of train_mae4d.py: error and a picture
    python probe.py compare out/*                                               a table of finished runs, with differences to the first
    python probe.py plot --runs out/laptop out/laptop_salt out/laptop_salt/stage1                   accuracy against loss and FLOPs
    python probe.py classify --encoder vitl.pt --train k400_train.csv --val k400_val.csv --head attentive4 --segments 8 --views 3 --train_passes 20

Accuracy is a mean over all rows of the val list, where a video that cannot be read counts as wrong. The best head of a grid is chosen on videos
held out of the train list; val is looked at once, by that head. The last line on stdout is one JSON object; out_dir/probe.jsonl adds the
accuracy of each class and the confusion matrix. Compare encoders with the same head only: attentive learns a good deal from random weights (the
world: 69 % against 15 % for linear). attentive4 trains 20 heads as big as a small encoder: without a GPU give it one --grid_lr and one --grid_wd.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """Defaults are V-JEPA's (appendix B.1, Table 6) unless the comment names another source."""
    task: tyro.conf.Positional[Literal["classify", "reconstruct", "plot", "compare"]]   # a row of TASKS
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
    head: Literal["attentive", "attentive4", "linear", "knn"] = "attentive"
    grid_lr: tuple[float, ...] = ()    # learning rates; empty: those of HEADS
    grid_wd: tuple[float, ...] = ()    # weight decays; each pair is one head, all are trained at once
    holdout: float = 0.1               # share of the train videos that chooses among them; nothing is held out where there is no choice
    group: str = ""                    # regular expression: videos whose paths match with the same text are held out together (a person: "user\\d+")
    epochs: int = 20
    batch_size: int = 0                # videos; 0: the paper's 256, less (a multiple of 16) for lists that would give fewer than 32 steps an epoch
    seed: int = 0                      # random weights, held-out videos, order, initial heads
    # the run
    out_dir: str = "out/probe"         # probe.jsonl grows by a line a run; confusion.png is the last run's (row: class, column: called)
    cache_dir: str = ""                # features, found again by content; empty: out_dir/features. Delete its files at any time
    cache_gb: float = 50.0             # features beyond this size, or 90 % of the free disk, are not stored but computed again in each epoch
    micro_batch: int = 16              # clips per forward pass of the encoder, videos per pass of the heads; their gradients are accumulated
    workers: int = 4                   # loader processes
    dtype: Literal["auto", "bf16", "fp32"] = "auto"   # auto: bf16 on a GPU, fp32 on a CPU
    device: str = ""                   # empty: cuda where there is one


def parse_args():
    words = sys.argv[1:]
    if words[:1] in (["plot"], ["compare"]) and words[1:] and not words[1].startswith("-"):
        words.insert(1, "--runs")
    return tyro.cli(Args, args=words, description=__doc__)


ARGS = parse_args() if __name__ == "__main__" else None     # before torch is imported, so that --help is instant

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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
    Turn t is the t-th random pass over the list; where nothing is random there is one turn."""

    def __init__(self, args, encoder, config, source, layer, clip, device):
        self.args, self.encoder, self.config, self.source, self.layer, self.clip, self.device = args, encoder, config, source, layer, clip, device
        self.bf16 = args.dtype == "bf16" or args.dtype == "auto" and device.type == "cuda"
        self.pooled = HEADS[args.head]["pooled"]
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

    @torch.no_grad()
    def encode(self, batch, videos):
        """A batch of videos*S*V clips -> (videos, V, S*N, D), or (videos, V, 1, D) pooled, float32 on the device."""
        parts = []
        for some in torch.arange(len(batch["video"])).split(self.args.micro_batch):
            x = D.prepare({k: batch[k][some] for k in ("video", "flip")}, self.device, self.config["mean"], self.config["std"])
            with self.autocast():
                z = self.encoder(x, blocks=self.layer or None).float()         # (b, N, D)
            if self.pooled:
                cls = int(self.config.get("cls", False)) * (x.shape[2] if self.config.get("images") else 1)     # of an image encoder: one a frame
                z = (z[:, :cls] if self.args.pool == "cls" else z[:, cls:]).mean(1, keepdim=True)
            parts.append(z)
        z = torch.cat(parts).unflatten(0, (videos, self.clip.segments, self.clip.views)).transpose(1, 2).flatten(2, 3)
        return z.mean(2, keepdim=True) if self.pooled else z

    def stream(self, rows, size, turn):
        """Read and encode these rows in order -> (features (b, V, S*N, D), ok (b,)), `size` videos at a time. A bad video is told once."""
        for batch in D.eval_batches(self.source, self.clip, rows=rows, batch_size=size, workers=self.args.workers, seed=self.seed(turn)):
            for path, reason in batch["bad"]:
                self.bad[path] = reason
                if len(self.bad) == len(set(self.source.paths)):
                    raise D.DataError(f"{self.source.name}: no video can be read; the last one: {reason}")
            yield self.encode(batch, len(batch["label"])), batch["ok"].numpy()

    def name(self, turn):
        """A hash of all that the features depend on: weights, config, list and files, clip settings, and the pixels that these give for one video."""
        a, clip = self.args, dataclasses.asdict(self.clip)
        facts = [self.config, self.layer, self.pooled and a.pool, self.bf16, clip, self.clip.train and self.seed(turn), D.fingerprint([self.source])]
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


def lists(args):
    """The train and the val source."""
    if (args.data, bool(args.train), bool(args.val)) not in (("world", False, False), ("", True, True)):
        raise D.DataError("give --train LIST and --val LIST, or --data world")
    if args.data:
        pair = (("probe", args.train_clips), ("val", args.val_clips))       # "probe" shares no clip with what encoders are trained on
        return [dataclasses.replace(source, labels=source.labels[:clips]) for source, clips in ((D.parse_list("world", s), n) for s, n in pair)]
    return D.parse_list(args.train, labelled=True), D.parse_list(args.val, labelled=True)


def frozen(args, train, val, device):
    """The features of both sources, stored if they fit -> (train, val, blocks run)."""
    encoder, config = load(args)
    encoder.to(device).eval().requires_grad_(False)
    depth, pooled = config.get("depth", 0), HEADS[args.head]["pooled"]
    if args.layer > depth:
        raise D.DataError(f"--layer {args.layer}: the encoder has {depth} blocks")
    layer = args.layer or config.get(f"layer_{args.task}") or config.get("layer") or depth
    if not pooled and not depth:
        raise D.DataError(f"--encoder {args.encoder} gives one vector a clip: use --head linear or knn")
    if pooled and args.pool == "cls" and not config.get("cls", False):
        raise D.DataError("--pool cls: this encoder has no CLS token")
    fps = args.fps or (not args.stride and config.get("fps")) or None
    clip = D.Clip(args.frames or config.get("frames", 16), args.stride or config.get("stride", 4), fps, args.size or config.get("size", 224),
                  args.crop_scale, args.crop_ratio, args.flip, segments=args.segments)
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
    train, val = lists(args)
    known = np.unique(train.labels)
    for source, flag in ((train, "--train"), (val, "--val")):
        for i in np.flatnonzero((source.labels < 0) | ~np.isin(source.labels, known)):
            label = source.labels[i]
            raise D.DataError(f"{flag}: {source.paths[i]}: " + ("no label" if label < 0 else f"label {label} is not in --train (0 to {known[-1]})"))
    overlap = len({os.path.realpath(p) for p in train.paths} & {os.path.realpath(p) for p in val.paths})
    if overlap:
        print(f"warning: {overlap} of the {len(val)} val videos are also in --train: this is not accuracy on held-out videos", file=sys.stderr)
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


def reconstruct(args, device):
    """Mean squared error of a train_mae4d.py run's decoded clips (--encoder: its folder) beside predicting the clip's mean colour, and a picture."""
    import train_mae4d as T
    folder = Path(args.encoder)
    if not (folder / "latest").exists() or not (folder / "config.json").exists():
        raise D.DataError(f"--encoder {folder}: reconstruct needs the folder of a train_mae4d.py run; decoders are not in encoder files")
    said = json.loads((folder / "config.json").read_text())["config"]
    known = {f.name: tuple(said[f.name]) if isinstance(said.get(f.name), list) else said.get(f.name) for f in dataclasses.fields(T.Args)}
    if "dec_blocks" not in said:
        raise D.DataError(f"--encoder {folder}: not a run of train_mae4d.py")
    objective, found = T.MAE4D(dataclasses.replace(T.Args(**known), init="")), M.newest(folder)
    state = {"model": objective.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # torch's word that this is a single process
        torch.distributed.checkpoint.load(state, checkpoint_id=found)
    objective.load_state_dict(state["model"])
    objective.to(device).eval()
    _, val = lists(args)
    config, grid = objective.args, objective.encoder.grid
    clip = D.Clip(args.frames or config.frames, args.stride or config.stride, args.fps or config.fps or None, args.size or config.size, train=False)
    errors, means, shown = [], [], None
    for i, batch in enumerate(D.eval_batches(val, clip, batch_size=args.micro_batch, workers=args.workers)):
        x = D.prepare(batch, device, **T.RGB)
        keep = D.sample_masks([config.mask], args.seed, i, len(x), grid)[0][0].to(device)
        with torch.no_grad():
            y = objective(x, keep, reconstruct=True)
        errors += (y - x).square().mean((1, 2, 3, 4)).tolist()
        means += (x - x.mean((2, 3, 4), keepdim=True)).square().mean((1, 2, 3, 4)).tolist()
        if shown is None:
            shown = T.picture(Path(args.out_dir) / "reconstruct.png", x[:3], keep[:3], y[:3], grid)
    return {"metric": "mse", "value": float(np.mean(errors)), "mean_colour": float(np.mean(means)), "n_val": len(val)}, {"checkpoint": found.name}


def plot(args, device):
    """Online-probe accuracy against training loss and against FLOPs, a curve a run of --runs; R^2 is that of a line through all points of the left panel."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise D.DataError("plot needs: pip install matplotlib") from None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    points = []
    for run in args.runs:
        if not (log := Path(run) / "log.jsonl").exists():
            raise D.DataError(f"--runs {run}: no log.jsonl in this folder")
        rows, last = {}, {}
        for line in map(json.loads, log.read_text().splitlines()):          # of a step that was run twice, the later line counts
            last = line if "loss" in line else last
            if line.get("probe_acc") is not None and last:
                rows[line["step"]] = (last["loss"], last["flops"], line["probe_acc"])
        if not rows:
            raise D.DataError(f"--runs {run}: no probe_acc in its log (train with --probe_data and --probe_every)")
        loss, flops, accuracy = zip(*(rows[s] for s in sorted(rows)))
        points += zip(loss, accuracy)
        axes[0].plot(loss, accuracy, "o-", label=run)
        axes[1].semilogx(flops, accuracy, "o-", label=run)
    for axis, name in zip(axes, ("training loss", "training FLOPs")):
        axis.set(xlabel=name, ylabel="online probe, top-1")
        axis.legend(fontsize=7)
    figure.savefig(Path(args.out_dir) / "plot.png", dpi=120)
    plt.close(figure)
    r2 = float(np.corrcoef(np.array(points).T)[0, 1] ** 2) if len(points) > 2 else None
    return {"metric": "r2", "value": r2, "points": len(points), "picture": str(Path(args.out_dir) / "plot.png")}, {}


def compare(args, device):
    """A Markdown table, a row a run: the last accuracy of its online probe and the last of each probe whose --out_dir was the run's folder, in per cent, each
    beside its difference to the baseline in points (FWM-HW-LD, Table 4). Folders without log.jsonl are passed over."""
    names = [run for run in args.runs if (Path(run) / "log.jsonl").exists()]
    baseline = args.baseline or (names or [""])[0]
    if baseline not in names:
        raise D.DataError(f"--baseline {baseline}: not among the runs with a log.jsonl: {' '.join(names) or 'none'}")
    table = {}                                                  # run -> column -> accuracy; of what was done twice, the later line counts
    for run in names:
        lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        table[run] = {"online probe": line["probe_acc"] for line in lines if line.get("probe_acc") is not None}
        if (probes := Path(run) / "probe.jsonl").exists():
            for line in map(json.loads, probes.read_text().splitlines()):
                if line["task"] == "classify":
                    table[run][f"{Path(line['args']['val'] or line['args']['data']).stem}, {line['head']}"] = line["value"]
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print("| run |" + "".join(f" {column} | Δ |" for column in columns) + "\n|---|" + "---|---|" * len(columns))
    deltas = {}
    for run, row in table.items():
        deltas[run] = {c: row[c] - table[baseline][c] for c in columns if c in row and c in table[baseline]}
        said = lambda c: f" {100 * row[c]:.2f} |" if c in row else " - |"
        change = lambda c: " |" if run == baseline else f" {100 * deltas[run][c]:+.2f} |" if c in deltas[run] else " - |"
        print(f"| {Path(run).name} |" + "".join(said(c) + change(c) for c in columns))
    return {"metric": "delta", "value": deltas, "baseline": baseline}, {}


TASKS = {"classify": classify, "reconstruct": reconstruct, "plot": plot, "compare": compare}      # (args, device) -> what is printed, what else is logged


def main(args):
    begin = time.time()
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
    except (D.DataError, OSError) as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except RuntimeError as e:
        if not (why := D.dead_worker(e)):
            raise
        sys.exit(print(f"error: {why}", file=sys.stderr) or 1)
    result = {"task": args.task, **result, "seed": args.seed, "encoder": args.encoder, "seconds": round(time.time() - begin, 1)}
    with open(Path(args.out_dir) / "probe.jsonl", "a") as f:
        f.write(json.dumps(result | details | {"args": dataclasses.asdict(args)}, allow_nan=False) + "\n")
    print(json.dumps(result, allow_nan=False), flush=True)


if __name__ == "__main__":
    main(ARGS)
