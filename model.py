"""What every script shares, in three sections. No method, no loss and no labels live here.

1 nets: positions, ViT, MotionEncoder, Predictor, LatentGridDecoder, optimizer groups
2 the run: what surrounds a training loop, and what looks at features on the way
3 weight files: ours are safetensors; those of V-JEPA, I-JEPA, MAE, VideoMAE, DINO, timm, 4DS and
  transformers are read, Meta's and transformers' written: python model.py export RUN --to hf|meta

    encoder = ViT(**SIZES["vit_l"], frames=16, size=224, pos="rope")
    z = encoder(x, keep)          # x (B,3,T,H,W) normalised, keep (B,K) token ids -> (B,K,D)
    za, zb = encoder(x, [keep_a, keep_b])     # two masks of the same clips: one sequence,
                                              # attention inside each group only
    zhat_a, zhat_b = predictor([za, zb], [keep_a, keep_b], [pred_a, pred_b])
    encoder, config = load_encoder("vitl.pt")

Letters used in every file:
    B clips   T frames   H,W pixels   t,h,w token grid
    N = t*h*w tokens, token id = (ti*h + hi)*w + wi
    K kept tokens   M predicted tokens   n tokens in a sequence
    D encoder width   Dp predictor width   P values per patch (3*tubelet*patch*patch)
    x pixels or tokens   z student features   h target features   zhat predictions
"""
import argparse
import ctypes
import datetime
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from itertools import chain, cycle, repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as dcs
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.fx.experimental import _config as fx_config
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import data

# width, depth, heads, mlp. vit_n: laptop presets. vit_g: SALT's table; V-JEPA 2's weights have 22
# heads.
ROWS = {
    "vit_n": (128, 4, 4, 512),
    "vit_t": (192, 12, 3, 768),
    "vit_s": (384, 12, 6, 1536),
    "vit_b": (768, 12, 12, 3072),
    "vit_l": (1024, 24, 16, 4096),
    "vit_h": (1280, 32, 16, 5120),
    "vit_g": (1408, 40, 16, 6144),
    "vit_G": (1664, 48, 16, 8192),
    "vit_e": (1792, 56, 16, 15360),
    "vit_j": (4096, 64, 32, 32768),
}
SIZES = {name: dict(zip(("width", "depth", "heads", "mlp"), row)) for name, row in ROWS.items()}
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


# --- 1. nets: positions, tables over a token grid that are indexed by token id --------------------

def cached(build):
    """One table for each (width, grid, device). One that is first built during inference must
    still be usable in training. Under torch.export and FakeTensorMode tensors are stand-ins of that
    call, so none is kept."""
    build = torch.inference_mode(False)(build)
    kept = lru_cache(maxsize=32)(build)

    def table(*key, **named):
        real = type(torch.empty(0)) is torch.Tensor
        return (kept if real else build)(*key, **named)

    return wraps(build)(table)


def settle(y, like):
    """y, computed in float32, in the precision of `like`: a net may be all bfloat16 or half. Under
    autocast y stays float32."""
    keeps = like.is_meta or torch.is_autocast_enabled(like.device.type)  # meta: Plan
    return y if keeps else y.to(like.dtype)


def axis_angles(channels, grid, scaled=0):
    """(N, axes, channels/2) float64: a token's place on each axis of the grid times the frequencies
    10000^(-2j/channels). scaled: places in space run from 0 to scaled - 1 on any grid (V-JEPA
    2.1)."""
    omega = 10000.0 ** (-torch.arange(channels // 2).double() / (channels / 2))
    axes = [torch.arange(side).double() for side in grid]
    if scaled:
        axes[1:] = [axis * (scaled - 1) / max(1, len(axis) - 1) for axis in axes[1:]]
    return torch.cartesian_prod(*axes).view(-1, len(grid), 1) * omega


@cached
def sincos_table(width, grid, device="cpu"):
    """(N, width) fixed position embedding (V-JEPA 1): each axis gets ceil(width/6)*2 channels,
    sines then cosines, order t,h,w, cut to width."""
    angles = axis_angles(math.ceil(width / 6) * 2, grid)
    table = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
    return table[:, :width].float().to(device)


@cached
def sinusoid_table(width, grid, device="cpu"):
    """(N, width) fixed position embedding of the token id alone (VideoMAE): sines in the even
    channels, cosines in the odd ones."""
    angles = axis_angles(width, (math.prod(grid),))
    return torch.stack([angles.sin(), angles.cos()], 3).flatten(1).float().to(device)


def resize_table(table, old, new):
    """A table (N,D) of the grid `old` for the grid `new`: bicubic over space, linear over time."""
    table = table.T.unflatten(1, old)                                   # (D, t, h, w)
    # neither changes a table of the same size
    table = F.interpolate(table, new[1:], mode="bicubic")
    flat = table.flatten(2)[:, None]                                    # (D, 1, t, h*w)
    flat = F.interpolate(flat, (new[0], flat.shape[3]), mode="bilinear")
    return flat.flatten(1).T


@cached
def rope_table(head_dim, grid, quirk=False, scaled=0, device="cpu"):
    """(2, N, head_dim): cos and signed sin, so that rotated q = q*cos + swap(q)*sin, where swap
    exchanges channels 2i and 2i+1.

    Each axis rotates 2*(head_dim//6) channels in the order t,h,w; the rest has cos 1, sin 0. Both
    channels of a pair share a frequency, which makes attention a function of relative positions.
    V-JEPA 2 was trained with tiled frequencies instead (channel c uses frequency c mod a/2):
    `quirk` reproduces that, and only its published weights want it.
    """
    channels = 2 * (head_dim // 6)
    angles = axis_angles(channels, grid, scaled)
    angles = angles.repeat(1, 1, 2) if quirk else angles.repeat_interleave(2, 2)
    angles = F.pad(angles.flatten(1), (0, head_dim - 3 * channels))     # (N, head_dim)
    sign = torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
    return torch.stack([angles.cos(), angles.sin() * sign]).float().to(device)


def rope_at(ids, head_dim, grid, quirk, like, scaled=0):
    """What `rotate` needs for tokens ids (B, n), or for all N tokens where ids is None; broadcasts
    against (B, n, q|k, heads, head_dim)."""
    tables = rope_table(head_dim, grid, quirk, scaled, like.device)
    tables = tables[:, None] if ids is None else tables[:, ids]         # (2, B, n, head_dim)
    cos, sin = tables[:, :, :, None, None]
    # eager complex products are 2 to 5 times faster on a CPU; compilers cannot fuse them
    if like.device.type == "cpu" and not quirk and not torch.compiler.is_compiling():
        return [torch.complex(cos[..., ::2], sin[..., 1::2])]
    return [cos.to(like.dtype), sin.to(like.dtype)]


def rotate(x, table, sin=None):
    """x (..., head_dim) rotated by the one complex or two real tables of `rope_at`."""
    pairs = x.unflatten(-1, (-1, 2))
    if sin is None:
        turned = torch.view_as_complex(pairs.float()) * table
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    return torch.addcmul(x * table, pairs.flip(-1).flatten(-2), sin)


# --- 1. nets: transformer -------------------------------------------------------------------------

def attend(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v for (B, heads, n, head_dim)."""
    if q.is_meta:  # a plan: nothing but q, k, v and the result is kept
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    B, heads, n, head_dim = q.shape
    score_bytes = B * heads * n * k.shape[2] * q.element_size()
    # with tune_cpu 1.3 to 5x as fast as the fused kernel, while the scores are small
    if q.device.type == "cpu" and (n <= 256 or score_bytes <= 2**26):
        return (q * head_dim**-0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def exact(x):
    """No autocast for what follows."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class Attention(nn.Module):
    """x (B,n,D) -> (B,n,D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # rows in the order q, k, v; inside each, head-major
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope=None, lengths=None):
        qk, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).split([2, 1], 2)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 3).unbind(2)                             # (B, heads, n, head_dim)
        v = v.squeeze(2).transpose(1, 2)
        if lengths is None or len(lengths) == 1:
            x = attend(q, k, v).transpose(1, 2)                         # (B, n, heads, head_dim)
        else:
            groups = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
            x = torch.cat([attend(*group).transpose(1, 2) for group in groups], 1)
        return self.proj(x.flatten(2))


class CrossAttention(nn.Module):
    """Queries from x (B,n,D), keys and values from z (B,m,in_width or D) as it comes -> (B,n,D).
    project=False: x are the queries."""

    def __init__(self, width, heads, in_width=None, project=True):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width) if project else nn.Identity()
        self.kv = nn.Linear(in_width or width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, z):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)    # (B, heads, n, head_dim)
        kv = self.kv(z).unflatten(2, (2, self.heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)                             # (B, heads, m, head_dim)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class LayerNorm(nn.LayerNorm):
    """In float32 on any device, also where weights (FSDP) or inputs are bf16."""

    def forward(self, x):
        weight = self.weight.float()
        y = F.layer_norm(x.float(), self.normalized_shape, weight, self.bias.float(), self.eps)
        return settle(y, x)


class Mlp(nn.Module):
    """x (..., D) -> (..., D)."""

    def __init__(self, width, hidden, act):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.act = ACTIVATIONS[act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on x (B,n,D). rope: what `rope_at` gives; lengths: sizes of the
    groups that attend only within themselves."""

    def __init__(self, width, heads, mlp, act="gelu", eps=1e-6):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp, act)

    def forward(self, x, rope=None, lengths=None):
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp(self.norm2(x))


def block_flops(width, mlp, lengths):
    """Forward FLOPs of one block on groups of these lengths, a multiply-add counting as 2."""
    weights = 4 * width * width + 2 * width * mlp
    return sum(2 * n * weights + 4 * n * n * width for n in lengths)


def matrices(module):
    """Weights of its linear layers: each multiplies once a token."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def init_weights(module, blocks, std=0.02):
    """Normal of this deviation, biases 0; what block i adds to the residual stream is divided by
    sqrt(2(i+1)) (V-JEPA, SALT).

    The papers truncate the normal at 100 standard deviations, which changes nothing and takes ten
    times as long.
    """
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(m.weight, std=std)
            nn.init.zeros_(m.bias)
    with torch.no_grad():
        for i, block in enumerate(blocks, 1):
            block.attn.proj.weight.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.div_(math.sqrt(2 * i))


def run_blocks(x, blocks, rope, told, checkpoint):
    """x (B,n,D) through the blocks. told: the sizes of the groups of x, a list, or z for
    MotionBlocks. checkpoint: recompute each block in the backward pass."""
    for block in blocks:
        if checkpoint and torch.is_grad_enabled() and not x.is_meta:
            x = recompute(block, x, rope, told, use_reentrant=False)
        else:
            x = block(x, rope, told)
    return x


def patches(x, a, p):
    """x (B,C,T,H,W) -> (B,t,h,w,C,a,p,p): patches of a frames and p x p pixels, a view."""
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // a, a, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def unpatch(x, grid, a, p):
    """The inverse for tokens: x (B, t*h*w, C*a*p*p) -> (B,C,T,H,W)."""
    x = x.unflatten(1, grid).unflatten(4, (-1, a, p, p))                # (B, t, h, w, C, a, p, p)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def add_kinds(net, stills):
    """Vectors of images and of clips (V-JEPA 2.1)."""
    for name in ("img_mod_embed", "video_mod_embed"):
        setattr(net, name, learned(1, 1, net.width, std=1e-6) if stills else None)


def tell_kind(net, x, still, *unused):
    """x plus the vector of images or of clips, and gradients of 0 for what this kind does not use:
    DDP waits for every parameter."""
    kinds = [net.video_mod_embed, net.img_mod_embed]
    kind, other = reversed(kinds) if still else kinds
    x = x + kind.to(x.dtype)
    if not torch.is_grad_enabled():
        return x
    return x + 0 * sum(p.sum() for p in (other, *unused)).to(x.dtype)


def learned(*shape, std=0.02):
    return nn.Parameter(std * torch.randn(*shape))


def each_frame(x):
    """(B,3,T,H,W) -> (B*T,3,1,H,W): each frame a clip."""
    return x.transpose(1, 2).flatten(0, 1)[:, :, None]


class PatchEmbed(nn.Module):
    """Tubelet embedding. The weight has Conv3d's shape and name, but only the kept patches are
    multiplied. highpass: see ViT."""

    def __init__(self, width, patch, tubelet, highpass):
        super().__init__()
        self.highpass = highpass
        kernel = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, width, kernel, kernel)

    def forward(self, x, ids=None):
        """x (B,3,T,H,W), ids (B,K) or None for all -> (B,K,D)."""
        x = patches(x, *self.proj.kernel_size[:2])
        B, t, h, w = x.shape[:4]
        if ids is None:
            x = x.flatten(1, 3)                                         # (B, N, C, a, p, p)
        else:
            batch = torch.arange(B, device=x.device)[:, None]
            x = x[batch, ids // (h * w), ids // w % h, ids % w]         # (B, K, C, a, p, p)
        if self.highpass:
            x = self.highpass * (x - x.mean(3, keepdim=True))
        weight = self.proj.weight.flatten(1)
        return F.linear(x.flatten(2).to(weight.dtype), weight, self.proj.bias)


def check_divides(name, value, by, divisor):
    if value % divisor:
        raise data.DataError(f"{name} {value} is not divisible by {by} {divisor}")


def interleave(firsts, seconds):
    """The first of each list, the second of each ..., one sequence."""
    return torch.cat(list(chain(*zip(firsts, seconds))), 1)


def level_ends(depth, levels):
    """How many blocks are run before each of V-JEPA 2.1's outputs: quarters of the depth."""
    ends = [depth * (i + 1) // levels for i in range(levels)]
    return [12, 24, 38, 48] if ends == [12, 24, 36, 48] else ends


# what ViT.config holds: numbers with their ranges, and what has few values
NUMBERS = dict.fromkeys("width heads mlp patch tubelet frames size".split(), (int, 1, 100_000)) | {
    "depth": (int, 1, 1000), "levels": (int, 1, 1000), "rope_scaled": (int, 0, 1000),
    "highpass": (float, 0, math.inf), "eps": (float, 0, 1), "init_std": (float, 0, math.inf),
}
CHOICES = dict.fromkeys("rope_quirk images cls final_norm stills".split(), (False, True)) | {
    "pos": ("rope", "sincos", "sinusoid1d", "learned"), "act": tuple(ACTIVATIONS),
}
VIT_KEYS = (*NUMBERS, *CHOICES)
# what a config may say besides: size name, sampling, blocks to read out, pixel statistics
NOTES = {"stride": (float, 0, 100_000), "fps": (float, 0, 100_000), "layer": (int, 0, 1000),
         "layer_classify": (int, 0, 1000), "mean": (float, -1000, 1000), "std": (float, 1e-6, 1000)}


def check_config(config):
    """ValueError: the first entry of another type or range."""
    for name, value in config.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {CHOICES[name]}, not {value!r}")
        numbers = [value]
        if name in ("mean", "std"):
            numbers = value if isinstance(value, list) and len(value) == 3 else [None]
        kind, least, most = {**NUMBERS, **NOTES}.get(name, (None, 0, 0))
        for number in numbers:
            if kind and not (type(number) in (int, kind) and least <= number <= most):
                raise ValueError(
                    f"{name} must be {kind.__name__}, {least} to {most}, not {value!r}")


class ViT(nn.Module):
    """Video transformer with token dropping.

    pos: "rope" (V-JEPA 2, SALT), "sincos" (V-JEPA 1), "sinusoid1d" (VideoMAE) or "learned" (4DS,
    TDV). frames, size: the configured clip; sincos and rope accept any other grid. images: an image
    encoder (TDV, DINOv2) that sees each frame alone, in clips of any length and size (learned
    positions are interpolated); the tokens of all frames make one sequence, their CLS tokens first.
    highpass: > 0 takes from every pixel its mean over the frames of its tubelet, so that nothing
    static enters (and no token learns of another), and multiplies the rest by this number.
    V-JEPA 2.1: levels, how many blocks' outputs are supervised, each with its own norm; stills, a
    patch embedding of its own for clips of one frame, and a vector that tells both kinds apart;
    rope_scaled, the side of the grid whose places in space other grids are scaled to.
    checkpoint: recompute each block in the backward pass. The other keywords are the entries of
    `config`. ValueError names what does not fit together.
    """

    def __init__(
        self, *, width, depth, heads, mlp, patch=16, tubelet=2, frames=16, size=224, pos="rope",
        rope_quirk=False, rope_scaled=0, highpass=0.0, images=False, stills=False, cls=False,
        levels=1, final_norm=True, act="gelu", eps=1e-6, init_std=0.02, checkpoint=False,
    ):
        given = locals()
        super().__init__()
        self.config = {name: given[name] for name in VIT_KEYS}
        check_config(self.config)
        check_divides("width", width, "heads", heads)
        check_divides("frames", frames, "tubelet", tubelet)
        check_divides("size", size, "patch", patch)
        if levels > depth:
            raise ValueError(f"there are {depth} blocks, and levels {levels}")
        if images and tubelet > 1:
            raise ValueError(f"an image encoder has tubelets of 1 frame, not {tubelet}")
        if stills and highpass:
            raise ValueError("highpass takes all of a single frame: stills without it")
        vars(self).update(self.config)  # self.width ...
        self.checkpoint = checkpoint
        self.grid = (frames // tubelet, size // patch, size // patch)
        # an image encoder's frames share their positions
        self.table_grid = (1, *self.grid[1:]) if images else self.grid

        self.patch_embed = PatchEmbed(width, patch, tubelet, highpass)
        self.blocks = nn.ModuleList([Block(width, heads, mlp, act, eps) for _ in range(depth)])
        self.norm = LayerNorm(width, eps=eps) if final_norm else nn.Identity()
        # of the levels before the last
        self.level_norms = nn.ModuleList([LayerNorm(width, eps=eps) for _ in range(levels - 1)])
        self.patch_embed_img = PatchEmbed(width, patch, 1, highpass) if stills else None
        init_weights(self, self.blocks, init_std)
        add_kinds(self, stills)
        self.cls_token = learned(1, 1, width) if cls else None
        n = math.prod(self.table_grid)
        self.pos_embed = learned(1, n, width) if pos == "learned" else None

    def forward(self, x, keep=None, blocks=None, fill=None, levels=False):
        """x (B,3,T,H,W) float, normalised -> (B,N,D); keep (B,K) -> (B,K,D); a list of (B,K_i) ->
        a list of (B,K_i,D). With cls, token 0 is CLS (images: the first T).

        blocks: run only that many blocks and return their output, without the final norm unless all
        were run; a tuple of rising numbers: all of these outputs, joined along D. levels: the
        outputs of all supervised levels, each normed, joined along D. fill: (bool
        (B,N), values (D,)) puts the values in the place of patches (iBOT's mask token); of an image
        encoder, for clips of one frame. ValueError: a clip, grid or blocks that do not fit.
        """
        if self.images and x.shape[2] > 1:
            if keep is not None or fill is not None:
                raise ValueError("an image encoder sees whole frames: no keep, and fill for clips "
                                 "of one frame only")
            z = self(each_frame(x), blocks=blocks).unflatten(0, (len(x), -1))  # (B, T, 1+h*w, D)
            if not self.cls:
                return z.flatten(1, 2)
            return torch.cat([z[:, :, 0], z[:, :, 1:].flatten(1, 2)], 1)
        grouped = isinstance(keep, (list, tuple))
        keeps = keep if grouped or keep is None else [keep]
        x, rope, lengths = self.embed(x, keeps, fill)

        depth = len(self.blocks)
        norms = {depth: self.norm}
        if levels:
            blocks = tuple(level_ends(depth, self.levels))
            norms |= dict(zip(blocks, self.level_norms))
        if blocks is None:
            blocks = depth
        ends = list(blocks) if isinstance(blocks, tuple) else [blocks]
        bounds = [0, *ends, depth]
        if bounds != sorted(bounds):
            raise ValueError(f"blocks must be 0 to {depth}, rising, not {blocks}")
        outs = []
        for start, end in zip(bounds, ends):
            x = run_blocks(x, self.blocks[start:end], rope, lengths, self.checkpoint)
            outs.append(norms[end](x) if end in norms else x)
        x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        return list(x.split(lengths, 1)) if grouped else x

    def embed(self, x, keeps=None, fill=None):
        """What the first block sees: tokens with their positions (B,n,D), what `rope_at` gives or
        None, and the length of each group."""
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"clips are (B,3,T,H,W), not {tuple(x.shape)}")
        B, _, T, H, W = x.shape
        embed = self.patch_embed
        idle = self.patch_embed_img
        if T == 1 and idle is not None:
            embed, idle = idle, embed
        a, p, _ = embed.proj.kernel_size
        if T % a or H % p or W % p:
            raise ValueError(f"clip of {T} frames, {H}x{W} px does not divide into tubelets of {a} "
                             f"and patches of {p}")
        grid = (T // a, H // p, W // p)
        ids = None if keeps is None else torch.cat(keeps, 1)            # (B, sum of K_i)
        lengths = [math.prod(grid)] if keeps is None else [k.shape[1] for k in keeps]

        x = embed(x, ids)                                               # (B, n, D)
        if idle is not None:
            x = tell_kind(self, x, T == 1, *idle.parameters())
        if fill is not None:
            hidden, values = fill
            x = torch.where(hidden[..., None], values.to(x.dtype), x)
        if self.pos != "rope":
            table = self.positions(grid, x.device)
            # under autocast the residual stream is float32 from here on, as in V-JEPA 1's
            x = x + settle((table if ids is None else table[ids]).float(), x)
        if self.cls:
            cls = self.cls_token.to(x.dtype).expand(B, 1, -1)
            x = interleave(repeat(cls), x.split(lengths, 1))
            if ids is None:
                ids = torch.arange(lengths[0], device=x.device)[None]
            # id 0 has angle 0, so CLS is not rotated
            ids = interleave(repeat(torch.zeros_like(ids[:, :1])), ids.split(lengths, 1))
            lengths = [1 + n for n in lengths]
        if self.pos != "rope":
            return x, None, lengths
        rope = rope_at(
            ids, self.width // self.heads, grid, self.rope_quirk, x, self.rope_scaled)
        return x, rope, lengths

    def positions(self, grid, device):
        """The table (N,D) that is added to the tokens of a grid; of learned ones and VideoMAE's,
        which are for one grid, resized."""
        if self.pos == "sincos":
            return sincos_table(self.width, grid, device)
        if self.pos == "learned":
            table = self.pos_embed[0]
        else:
            table = sinusoid_table(self.width, self.table_grid, device)
        same = grid == self.table_grid
        return table if same else resize_table(table.float(), self.table_grid, grid)

    def save_hf(self, folder, predictor=None, about={}):
        """A folder that transformers loads: see save_hf below."""
        save_hf(folder, self, predictor, about)

    def flops(self, *lengths):
        """Forward FLOPs of one clip whose groups (image encoder: frames) have these token
        counts."""
        embed = 2 * self.patch_embed.proj.weight.numel() * sum(lengths)
        if self.cls:
            lengths = [1 + n for n in lengths]
        return embed + len(self.blocks) * block_flops(self.width, self.mlp, lengths)


# D x D matrices that a condition adds to a block: of cross-attention q, k, v and proj; else one for
# each vector that it gives a token, scales, shifts and gates
CONDITIONS = {"xattn": 4, "film": 2, "adaln": 4, "adaln_zero": 6, "gated_adaln": 6}


class MotionBlock(Block):
    """A block that is told of another frame: by cross-attention to its tokens z (B,m,D), or by
    scales and shifts from the token at the same place (TDV section 3.2).

    film: LN(x) * scale + shift joins the residual stream between attention and MLP. adaln: both
    branches read LN(x) * (1 + scale) + shift; adaln_zero: their outputs are gated too, and
    everything starts at 0; gated_adaln: gated by sigmoids.
    """

    def __init__(self, width, heads, mlp, condition, act="gelu", eps=1e-6):
        super().__init__(width, heads, mlp, act, eps)
        self.condition = condition
        if condition in ("xattn", "film"):
            self.norm_cross = LayerNorm(width, eps=eps)
        if condition == "xattn":
            self.cross = CrossAttention(width, heads)
        else:
            self.modulation = nn.Linear(width, CONDITIONS[condition] * width)

    def forward(self, x, rope, z):
        """x (B,n,D), z (B,m,D), with m = n where it modulates -> (B,n,D)."""
        if self.condition in ("xattn", "film"):
            x = x + self.attn(self.norm1(x), rope)
            told = self.norm_cross(x)
            if self.condition == "xattn":
                told = self.cross(told, z)
            else:
                scale, shift = self.modulation(z).chunk(2, -1)
                told = told * scale + shift
            x = x + told
            return x + self.mlp(self.norm2(x))
        told = self.modulation(z).chunk(CONDITIONS[self.condition], -1)
        scale1, shift1, scale2, shift2, *gates = told
        if self.condition == "gated_adaln":
            gates = [gate.sigmoid() for gate in gates]
        gate1, gate2 = gates or (1, 1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class MotionEncoder(ViT):
    """What a change of pixels does to the tokens of a frame: d = M(x' - x | z), TDV section 3.2.
    Its last layer starts at 0, so that d does.

    cls_condition: the frame's CLS token is among what is told. The other keywords are ViT's.
    """

    def __init__(self, *, condition="xattn", cls_condition=True, **shape):
        super().__init__(**shape, images=True, cls=True, tubelet=1)
        self.cls_condition = cls_condition
        self.condition = condition
        self.blocks = nn.ModuleList([
            MotionBlock(self.width, self.heads, self.mlp, condition, self.act, self.eps)
            for _ in self.blocks
        ])
        self.proj = nn.Linear(self.width, self.width)
        init_weights(self, self.blocks, self.init_std)
        nn.init.zeros_(self.proj.weight)
        if condition == "adaln_zero":
            for block in self.blocks:
                nn.init.zeros_(block.modulation.weight)

    def forward(self, change, z, features=False):
        """change (F,3,1,H,W), the difference of two normalised frames; z (F,1+n,D), the tokens of
        the first -> (F,1+n,D). features: before the last layer."""
        x, rope, _ = self.embed(change)
        if not self.cls_condition:
            z = z[:, 1:]
            # attention does not see CLS; a modulation needs something for each token
            if self.condition != "xattn":
                z = F.pad(z, (0, 0, 1, 0))
        x = self.norm(run_blocks(x, self.blocks, rope, z, self.checkpoint))
        return x if features else self.proj(x)

    def flops(self, *lengths):
        """Forward FLOPs for frames of these token counts, without CLS."""
        tokens = [1 + n for n in lengths]
        depth = len(self.blocks)
        matrices = 1 + depth * CONDITIONS[self.condition]
        flops = super().flops(*lengths) + 2 * matrices * self.width**2 * sum(tokens)
        if self.condition == "xattn":
            flops += depth * sum(4 * n**2 * self.width for n in tokens)
        return flops


class Predictor(nn.Module):
    """Narrow transformer that fills in features at predicted positions from context features at
    kept ones. ValueError: pos or heads that do not fit.

    V-JEPA 2.1: hidden > 0, a layer of this width between in_width, the levels of the encoder side
    by side, and width; context, a second output layer, for the context's tokens; stills, a vector
    that tells images from clips.
    """

    def __init__(
        self, *, in_width, out_width, width=384, depth=12, heads=12, mlp=None, grid=(8, 14, 14),
        pos="rope", rope_quirk=False, rope_scaled=0, mask_tokens=2, hidden=0, context=False,
        stills=False, eps=1e-6, init_std=0.02, checkpoint=False,
    ):
        super().__init__()
        check_config(dict(width=width, depth=depth, heads=heads))
        if pos not in ("rope", "sincos"):
            raise ValueError(f"the predictor's pos must be rope or sincos, not {pos!r}")
        check_divides("predictor width", width, "heads", heads)
        self.width = width
        self.heads = heads
        self.mlp = mlp or 4 * width
        self.grid = tuple(grid)
        self.pos = pos
        self.rope_quirk = rope_quirk
        self.rope_scaled = rope_scaled
        self.checkpoint = checkpoint

        self.predictor_embed = nn.Linear(hidden or in_width, width)
        if hidden:
            first = nn.Linear(in_width, hidden)
            self.predictor_embed = nn.Sequential(first, nn.GELU(), self.predictor_embed)
        tokens = [nn.Parameter(torch.zeros(1, 1, width)) for _ in range(mask_tokens)]
        self.mask_tokens = nn.ParameterList(tokens)
        blocks = [Block(width, heads, self.mlp, eps=eps) for _ in range(depth)]
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = LayerNorm(width, eps=eps)
        self.predictor_proj = nn.Linear(width, out_width)
        self.predictor_proj_context = nn.Linear(width, out_width) if context else None
        init_weights(self, blocks, init_std)
        add_kinds(self, stills)

    def forward(self, z, keep, pred, grid=None, context=False):
        """z list of (B,K_i,in_width), keep list of (B,K_i), pred list of (B,M_i) -> list of
        (B,M_i,out_width). Group i uses mask token i, modulo. grid: of these clips, if not the one
        it was made for. context: also a list of (B,K_i,out_width), of the context's tokens, or []
        where no layer gives them.

        Tensors instead of lists are one group, and give one tensor. Order within a group is free:
        attention only sees positions.
        """
        if torch.is_tensor(z):
            return self([z], [keep], [pred])[0]
        grid = grid or self.grid
        K = [ids.shape[1] for ids in keep]
        M = [ids.shape[1] for ids in pred]
        x = self.predictor_embed(torch.cat(z, 1))
        tokens = [token.to(x.dtype).expand(*ids.shape, -1)              # (B, M_i, Dp)
                  for token, ids in zip(cycle(self.mask_tokens), pred)]
        x = interleave(x.split(K, 1), tokens)                           # (B, n, Dp)
        ids = interleave(keep, pred)                                    # (B, n)
        if self.img_mod_embed is not None:
            x = tell_kind(self, x, grid[0] == 1)
        rope = None
        if self.pos == "sincos":
            x = x + settle(sincos_table(self.width, grid, x.device)[ids], x)
        else:
            rope = rope_at(
                ids, self.width // self.heads, grid, self.rope_quirk, x, self.rope_scaled)
        lengths = [k + m for k, m in zip(K, M)]
        x = run_blocks(x, self.predictor_blocks, rope, lengths, self.checkpoint)
        parts = x.split(list(chain(*zip(K, M))), 1)

        def read(proj, parts):
            x = proj(self.predictor_norm(torch.cat(parts, 1)))
            return list(x.split([part.shape[1] for part in parts], 1))

        zhat = read(self.predictor_proj, parts[1::2])
        if not context:
            return zhat
        if self.predictor_proj_context is None:
            return zhat, []
        return zhat, read(self.predictor_proj_context, parts[::2])

    def flops(self, *groups):
        """Forward FLOPs of one clip for groups of (K, M) context and predicted tokens."""
        flops = len(self.predictor_blocks) * block_flops(self.width, self.mlp, map(sum, groups))
        for K, M in groups:
            flops += 2 * K * matrices(self.predictor_embed)
            flops += 2 * M * matrices(self.predictor_proj)
            if self.predictor_proj_context is not None:
                flops += 2 * K * matrices(self.predictor_proj_context)
        return flops


class LatentGridDecoder(nn.Module):
    """4DS's decoder: a learned grid of latent tokens joins the context for the encoder's last
    blocks, then each latent is mapped to its patch.

    frames, size: the clip; patch: frames and pixels of an output patch, which may be coarser than
    the input's (ValueError where it does not divide the clip). A latent is its content plus its
    position, two tables of the grid (the paper gives totals only, which this fits: section 3.1,
    Table 1).
    """

    def __init__(self, *, width, frames, size, patch=(2, 16), init_std=0.02):
        super().__init__()
        a, p = patch
        check_divides("frames", frames, "output patch", a)
        check_divides("size", size, "output patch", p)
        self.patch = (a, p)
        self.grid = (frames // a, size // p, size // p)
        n = math.prod(self.grid)
        self.latents = learned(1, n, width)
        self.pos_embed = learned(1, n, width)
        self.proj = nn.Linear(width, 3 * a * p**2)
        init_weights(self, [], init_std)

    def forward(self, z, blocks, checkpoint=False):
        """z (B,K,D) and the blocks that both share -> (B,n,P) values of all patches, in the order
        of `patches`."""
        latents = (self.latents + self.pos_embed).to(z.dtype).expand(len(z), -1, -1)
        x = run_blocks(torch.cat([z, latents], 1), blocks, None, None, checkpoint)
        return self.proj(x[:, z.shape[1] :])

    def flops(self):
        """Forward FLOPs of the projection of one clip."""
        return 2 * self.proj.weight.numel() * self.latents.shape[1]


# --- 1. nets: optimizer groups, EMA, sharding, compilation ----------------------------------------

def param_groups(module, weight_decay, factors={}):
    """Optimizer groups over all trainable parameters: with weight decay, and without (biases, 1-D
    tensors, learned positions). factors: {prefix of a name: factor of the learning rate}; a group
    says its own as "factor"."""
    groups = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
        decay = p.ndim >= 2 and not name.endswith(("bias", "pos_embed"))
        rate = weight_decay if decay else 0.0
        group = dict(params=[], weight_decay=rate, decay=decay, factor=factor)
        groups.setdefault((decay, factor), group)["params"].append(p)
    return [groups[key] for key in sorted(groups, reverse=True)]


def adamw(module, args, factors={}):
    """Over param_groups; set_rates says at each step how fast each group learns."""
    groups = param_groups(module, args.weight_decay, factors)
    return torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, fused=True)


@torch.no_grad()
def ema_update(targets, sources, m, skip=0.0):
    """targets <- m*targets + (1-m)*sources, for lists of tensors. skip: 1.0 where they stay; a
    tensor is not waited for."""
    share = (1 - m) * (1 - skip)
    for target, source in zip(targets, sources):  # _foreach_lerp_ takes a number: a wait
        target.lerp_(source, share)


def shard(module, mesh=None, param_dtype=None):
    """FSDP2: every Block is one unit, the rest belongs to the root. Call after compile_blocks and
    before the optimizer is built.

    mesh: of two dimensions, HSDP: whole along the first, in shards along the second. param_dtype:
    in which weights travel and work; the shards, gradients and optimizer stay float32. Autocast
    alone would keep a bf16 copy of every block's weights until the backward pass, on every rank.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for m in list(module.modules()):
        if isinstance(m, Block):
            fully_shard(m, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def compile_blocks(module):
    """Compile every Block in place; lengths stay symbolic, so that changing mask sizes do not
    compile again. Parameter names stay as they are."""
    # Encoder, predictor and target, with and without gradient, groups, one clip or several: more
    # cases than the 8 after which torch gives up, and whatever comes next would not be compiled.
    torch._dynamo.config.recompile_limit = 64
    for m in module.modules():
        if isinstance(m, Block):
            m.compile(dynamic=True)
    return module


# --- 2. the run -----------------------------------------------------------------------------------
# What every script needs and no paper claims. It asks of an objective, an nn.Module:
#
#   forward(x, ...) -> loss, metrics    one micro-batch; without masks: the product's tokens (B,N,D)
#   product                             the encoder that is exported and probed
#   schedules(step) -> {"lr": ...}      the rates, functions of the step alone
#   after_step(step, skip)              after every optimizer step, taken or skipped: EMA
#   masks(step, B, rows=)               what forward() takes after x; or None: sample numbers.
#                                       Called in loader processes, so it holds no weights
#   flops(*masks)                       of one clip, forward and backward
#   surprise(x, context)                for probe.py physics
#
# Only the scripts know more of it.

# dense bf16
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
# of a step's line, which log.jsonl has whole
SHOWN = "step loss lr grad_norm rankme clips_per_s wait_pct eta".split()
# flags that 0 does not switch off
POSITIVE = set(
    "steps batch_size lr frames stride size patch tubelet prototypes log_every save_every keep "
    "timeout ce_rows temp tau temporal_keep levels".split())
SHARES = set("ema final_ema max_bad_fraction betas temporal_keep motion_uniform".split())
# flags that a resumed run may change; the same data under other paths are the same data, by a hash
FREE = set(
    "out_dir resume stop_at workers timeout micro_batch save_every keep log_every probe_every "
    "sample_every compile fsdp shard_ranks checkpoint wandb max_bad_fraction max_skips dry_run "
    "new_data stage ce_rows data data_hash data_times".split())
GONE = {"bucket": 1}  # flags of runs that were begun earlier, and what all runs do now


# what checkpointing says to a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled")
# torchrun's process number. Where it is killed nobody tells the ranks: they are left to another
# parent. (Under a shell that is no reason to stop: nohup.)
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

UserError = data.DataError  # what the user must mend: one line, status 2


class Stop(Exception):
    """What broke on the way: one line, status 1."""


class Told(Exception):
    """A rank was told to stop in the middle of a probe."""


class Console(io.FileIO):
    """Standard output or error. Its reader may be gone: Ctrl-C ends the `tee log` beside the run,
    and a terminal closes. What nobody reads is lost, which is no reason to stop."""

    def write(self, text):
        try:
            return super().write(text)
        except OSError:
            return len(text)


def keep_console():
    """From now on print() cannot fail."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed from the start
            stream = open(os.devnull, "w")
        else:
            stream = io.BufferedWriter(Console(number, "w", closefd=False))
            stream = io.TextIOWrapper(stream, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)


def say(text):
    """A line for people, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


def launch(main, args):
    """Run main(args). What can be foreseen ends in one line, all else in a traceback."""
    keep_console()
    poison = Path(args.out_dir) / "poison.txt"
    try:
        check_ranges(args)
        if poison.exists():
            data.POISON.update(poison.read_text().splitlines())
        if not args.data:
            args = replace(args, data=("world",))
            if not args.dry_run:
                say("no --data: the built-in world")
        main(args)
        if dist.is_initialized():
            # What main held goes first. The other way round a DDP rank could hang as it left (1 of
            # 3 runs), and an FSDP rank abort (1 of 10).
            gc.collect()
            dist.destroy_process_group()
    except UserError as error:
        leave(error, 2)
    except Stop as error:
        leave(error, 1)
    except (RuntimeError, ConnectionError, EOFError, MemoryError) as error:
        if no_memory(error):
            leave(f"out of memory{Plan.advice}. {first_cause(error)}", 1)
        why = data.dead_worker(error)
        if not why:
            raise
        if data.POISON:
            with open(poison, "a") as file:
                file.writelines(f"{path}\n" for path in sorted(data.POISON))
        leave(why, 1)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:  # a full disk, say
        leave(f"{first_cause(error)}; what was saved before in {args.out_dir} stays valid", 1)
    finally:
        data.end_workers()


def leave(error, status):
    """Of what the user must mend one rank tells: torchrun ends the others before they speak."""
    if status == 2 and os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)
    # torchrun repeats it below its own traceback
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": f"error: {error}", "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(told))
    sys.exit(status)


def no_memory(error):
    """CUDA's, numpy's, or what a CPU says."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "t allocate memory" in str(error)


def first_cause(error):
    """One line: what the error began with, which says it best."""
    if hasattr(error, "failures"):  # of all ranks
        error = next(iter(error.failures.values()))[0]
    while error.__context__:
        error = error.__context__
    return " ".join(str(error).split())[-300:]


def check_numbers(args, positive):
    """Numbers no script can use end it here; the flags' types let `--lr nan` through."""
    for name, value in vars(args).items():
        least = -1 if name == "workers" else 0
        most = 1 if name in SHARES else sys.float_info.max
        need = "a share from 0 to 1" if most == 1 else "a positive finite number"
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str):
                continue
            bad = not least <= number <= most or (name == "betas" and number == 1)
            if bad or (name in positive and number == 0):
                raise UserError(f"--{name} {number}: {need} is needed")


def check_ranges(args):
    """The flags of a run."""
    check_numbers(args, POSITIVE)
    if args.model not in SIZES:
        raise UserError(f"--model {args.model}: choose from {', '.join(SIZES)}")
    if len(args.probe_data) not in (0, 2):
        raise UserError(f"--probe_data {' '.join(args.probe_data)}: two lists are needed, one to "
                        "fit the probe and one to test it")


def probe_lists(args):
    """The online probe's two lists, or none."""
    splits = zip(args.probe_data, ("probe", "val"))
    lists = [data.parse_list(spec, split, labelled=True) for spec, split in splits]
    if not lists:
        return lists
    check_overlap(*lists, "the first list of --probe_data")
    return data.match_classes(*lists)


def check_overlap(train, val, name):
    """How many val videos are in train, too; said on stderr."""
    overlap = len(set(map(os.path.realpath, train.paths)) & set(map(os.path.realpath, val.paths)))
    if overlap:
        say(f"warning: {overlap} of the {len(val)} val videos are also in {name}: this is not a "
            "result on held-out videos")
    return overlap


def construct(build, args):
    """build(args) from --seed, or a sketch without memory for --dry_run."""
    torch.manual_seed(args.seed)
    device = "meta" if args.dry_run else "cpu"
    if args.dry_run and getattr(args, "init", ""):
        args = replace(args, init="")
    try:
        with torch.device(device):
            return build(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def run_in(out, resume, script):
    """config.json of the run of this script that goes on in a folder, {} where one begins.
    UserError: neither can be."""
    file = Path(out, "config.json")
    if not os.path.exists(file):  # nor where the folder cannot be looked into
        return {}
    if not resume:
        raise UserError(
            f"{out} holds a run: --resume continues it, another --out_dir starts afresh")
    head = read_config(file)
    other = head.get("script", script)
    if other != script:
        raise UserError(f"{out} holds a run of {other}.py: another --out_dir")
    return head


def drawn(objective, step):
    """The masks of a clip at this step, or ()."""
    if objective.masks is None:
        return ()
    return objective.masks(step, objective.args.batch_size, rows=slice(0, 1))


def mean_cost(parts, steps):
    """FLOPs of a step over all ranks. parts: [(share of the steps, objective)]"""
    mean = 0.0
    for share, objective in parts:
        clips = [objective.flops(*drawn(objective, step)) for step in range(steps)]
        mean += share * (objective.args.batch_size * sum(clips)) / steps
    return mean


def budgeted(args, *parts):
    """args, where --flops is given with the --steps that it pays for, by the mean of 200."""
    if not args.flops:
        return args
    mean = mean_cost(parts, 200)
    steps = round(args.flops / mean)
    if steps < 1:
        raise UserError(f"--flops {args.flops:.3g}: one step costs {mean:.3g}")
    return replace(args, steps=steps)


def linear(step, total, first, last):
    """first at step 0, last from step `total` on."""
    return first + (last - first) * min(1.0, step / max(1, total))


def cosine(step, total, first, last):
    """first at step 0, last from step `total` on."""
    share = min(1.0, step / max(1, total))
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


DECAYS = {"cosine": cosine, "linear": linear}


def warmup_decay(step, warmup, total, start, peak, last, decay="cosine"):
    """Linear from start to peak over `warmup` steps, then by `decay` to last at `total`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return DECAYS[decay](step - warmup, total - warmup, peak, last)


class Run:
    """Ranks, out directory, log, signals, checkpoints, online probe."""
    # Of the process: a signal between two stages counts for the next one. stop: all ranks agreed
    # to, after the same step.
    signalled = False
    stop = False
    paused = 0.0  # seconds of probes since the last log line: they are no training

    def __init__(self, args, later={}):
        """later: {flag: what runs did before it was one}, where that is not its default."""
        self.args = args
        self.later = later
        self.out = Path(args.out_dir)
        self.started = time.time()
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.done = 0  # steps, with the one at work
        self.last = min(args.steps, args.stop_at or args.steps)
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of this machine
        self.stills = getattr(args, "stills", False)
        self.workers = args.workers
        if args.workers < 0:
            self.workers = data.idle_cores(self.neighbours)

        shares = self.ranks * max(1, args.micro_batch)
        check_divides("--batch_size", args.batch_size, "ranks x --micro_batch:", shares)
        self.per_rank = args.batch_size // self.ranks
        self.micro = args.micro_batch or self.per_rank  # until fit() has looked
        self.first = self.rank * self.per_rank  # of this rank's rows in a batch
        several = args.clips_per_video
        check_divides("clips of a forward pass:", self.micro, "--clips_per_video", several)
        check_divides("ranks", self.ranks, "--shard_ranks", args.shard_ranks or 1)
        # how clips are cut from videos
        self.clip = data.Clip(
            frames=args.frames, stride=args.stride, fps=args.fps or None, size=args.size,
            scale=args.crop_scale, ratio=args.crop_ratio, zoom=getattr(args, "zoom", 0.0),
            flip=args.flip, clips=several, short=args.short)
        if args.wandb and not importlib.util.find_spec("wandb"):
            raise UserError("--wandb needs: pip install wandb")

        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            backend = "cpu:gloo,cuda:nccl"
        else:
            self.device = torch.device("cpu")
            tune_cpu()
            backend = "gloo"
        self.half = args.dtype == "bf16"
        if self.half and backend == "gloo" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.half = args.dry_run
        self.room = memory(self.device, self.neighbours)
        if args.dry_run and backend == "gloo":
            self.room = 0.9 * 80e9  # an H100's
        if "RANK" in os.environ and not args.dry_run and not dist.is_initialized():
            patience = datetime.timedelta(seconds=max(1800, args.timeout))
            dist.init_process_group(backend, timeout=patience)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    # memory

    def fit(self, objective, *parts, extra=0):
        """Plan a step, and choose --micro_batch where it is 0: the most clips that fit on every
        rank. A resumed run on as many ranks keeps what it had. parts: Plan's."""
        self.plan = Plan(self, objective, parts, extra)
        sizes = self.plan.sizes
        self.micro = self.args.micro_batch or self.once(self.before)
        if self.micro not in sizes:
            if terms := getattr(objective, "by_pass", ()):
                raise UserError(f"--micro_batch must be given: the value of {' and '.join(terms)} "
                                "depends on the clips of a forward pass")
            self.micro = min(self.gather(next(filter(self.plan.fits, sizes), sizes[-1])))
        need = self.plan.shared(self.micro) * self.neighbours
        if need > shared_memory() and not self.args.dry_run:
            raise UserError(
                f"the loader wants {need / 2**20:.0f} MiB of /dev/shm, which has "
                f"{shared_memory() / 2**20:.0f}: fewer --workers, a smaller --micro_batch, "
                "docker run --shm-size")

    def before(self):
        """The clips of a forward pass of the run that is resumed, or None."""
        file = self.out / "config.json"
        begun = (self.out / "latest").exists() and file.exists()
        head = read_config(file) if self.args.resume and begun else {}
        return head["config"].get("micro_batch") if head.get("ranks") == self.ranks else None

    def wrap(self, objective):
        """The objective on its device -> what is called, trained and saved: compiled, sharded or
        one of several equal ones, as the flags say."""
        args = self.args
        sharded = args.fsdp and self.ranks > 1
        if not sharded:  # else block by block: all of it might not fit
            objective.to(self.device)
            if self.device.type == "cuda" and not args.micro_batch:
                self.try_out(objective)
        if args.compile:
            compile_blocks(objective)
        if not sharded:
            return DDP(objective, gradient_as_bucket_view=True) if self.ranks > 1 else objective
        mesh = None
        if args.shard_ranks:
            shape = (self.ranks // args.shard_ranks, args.shard_ranks)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("copies", "shards"))
        return shard(objective, mesh, torch.bfloat16 if self.half else None)

    def try_out(self, objective):
        """CUDA: one step of what was planned, alone, beside what the optimizer will hold. Where it
        does not fit, the next smaller number of clips."""
        moments = torch.empty(8 * self.plan.trained, dtype=torch.uint8, device=self.device)
        sizes = [n for n in self.plan.sizes if n <= self.micro]
        objective.eval()
        for self.micro in sizes:
            try:
                with self.autocast():
                    loss, _ = objective(*self.plan.example(self.micro, self.device))
                loss.backward()
                break
            except torch.OutOfMemoryError:
                if self.micro == sizes[-1]:
                    raise
            finally:
                loss = None
                objective.zero_grad()
                torch.cuda.empty_cache()
        objective.train()
        del moments
        self.micro = min(self.gather(self.micro))
        self.plan.tell()
        self.write_head()

    # between ranks

    def once(self, find, *given):
        """find(*given) by rank 0 -> what it gives, on all ranks; what it refuses, all refuse."""
        found = None
        if self.rank == 0:
            try:
                found = find(*given)
            except UserError as error:
                found = UserError(str(error))
        found = self.gather(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def gather(self, value):
        """The values of all ranks in a list, on all ranks; also a barrier."""
        values = [value] * self.ranks
        if dist.is_initialized():
            dist.all_gather_object(values, value)
        return values

    @property
    def asked(self):
        """Was this rank told to stop, or left alone by torchrun?"""
        return self.signalled or LAUNCHER not in (None, os.getppid())

    def told(self):
        """Was any rank? The same on all ranks."""
        return any(self.gather(self.asked))

    # the out directory

    def sources(self):
        """The lists of --data. One rank looks for their files."""
        found = [data.parse_list(spec, look=self.rank == 0) for spec in self.args.data]
        data.weights_of(found)  # of all or of none
        return found

    def open(self, script, sources, title=""):
        """Read the online probe's lists, take the out directory, write config.json and the first
        log line, listen to signals."""
        self.lists = probe_lists(self.args)
        files = (script, data.__file__, __file__)
        code = b"".join(Path(file).read_bytes() for file in files)
        cuda = self.device.type == "cuda"
        config = json.loads(json.dumps(vars(self.args)))
        if self.rank == 0:
            config |= data.fingerprint(sources)
        self.head = {
            "script": Path(script).stem,
            "config": config,
            "argv": sys.argv,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__},
            "source": hashlib.sha256(code).hexdigest()[:16],
            "ranks": self.ranks,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }
        self.once(self.claim)
        self.banner(sources, title)
        if self.rank == 0 and self.args.wandb:
            import wandb
            wandb.init(project=self.args.wandb, config=config)
        self.log(self.head)
        for number in data.SIGNALS:
            # nohup ignores this one
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def banner(self, sources, title):
        """What is trained on what, and where it goes."""
        args = self.args
        plan = self.plan
        videos = sum(map(len, sources))
        say(f"{title}{plan.name} {args.model}: {plan.trained / 1e6:.4g}M parameters trained, "
            f"{plan.frozen / 1e6:.4g}M frozen; {videos:,} videos of {' '.join(args.data)}")
        if args.dtype == "bf16" and not self.half:
            say("in fp32: this CPU has no bf16, which would take a hundred times as long")
        plan.tell()
        passes = self.per_rank // self.micro
        say(f"{args.steps:,} steps of {args.batch_size:,} clips: {self.ranks} rank(s) x "
            f"{passes} x --micro_batch {self.micro}; {plan.flops:.3g} FLOPs a step, "
            f"{plan.flops * args.steps:.3g} in all")
        say(f"{self.out}: log.jsonl, samples/, encoder.safetensors; python probe.py plot "
            f"--runs {self.out}")

    def write_head(self):
        self.head["config"]["micro_batch"] = self.micro
        if self.rank == 0:
            write(self.out / "config.json", json.dumps(self.head, indent=1))

    def claim(self):
        """Rank 0: lock the folder and write config.json. UserError: why it cannot be taken."""
        import fcntl  # not on Windows, where no run trains but everything else works

        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            # lockf, as a record lock is this process's alone: flock's would live on in loader
            # processes, which outlive a killed run by seconds. It is lost when any file object of
            # the lock is closed, so nobody else opens it. On NFS both are the same lock.
            self.lock = open(self.out / "lock", "a")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if before := run_in(self.out, self.args.resume, self.head["script"]):
                self.check_same(before["config"])
            if self.args.resume and not (self.out / "latest").exists():
                say(f"--resume: {self.out} has no checkpoint, so this run starts afresh")
            self.write_head()
            log = self.out / "log.jsonl"
            log.touch()
            text = log.read_text()
            write(log, text[: text.rfind("\n") + 1])  # no half line of a run killed as it wrote
        except BlockingIOError as error:
            raise UserError(f"{self.out} is in use by another run") from error
        except OSError as error:
            raise UserError(f"--out_dir {self.out}: {error.strerror}") from error

    def check_same(self, old):
        """UserError: the run in the folder, which had this config, had other settings or data.

        A flag that it did not have yet counts as what runs did then.
        """
        config = self.head["config"]
        if old.get("data_hash") != config["data_hash"] and not self.args.new_data:
            raise UserError(
                f"{self.out} was started with other data than {' '.join(self.args.data)}: files, "
                "sizes or labels differ; --new_data goes on with these")
        if old.get("data_times") not in (None, config["data_times"]):
            say("note: the files of --data have other times than when the run was started")
        defaults = json.loads(json.dumps(vars(type(self.args)()) | self.later))
        differ = []
        for name in {**config, **old}:
            before = old.get(name, defaults.get(name))
            now = config.get(name, GONE.get(name, "no such flag any more"))
            gone = name not in config and not before
            if name not in FREE and before != now and not gone:
                differ.append(f"{name} ({before} -> {now})")
        if differ:
            raise UserError(
                f"{self.out} was started with other settings: {', '.join(differ)}")

    def log(self, line):
        """Add a line to log.jsonl and show it, if it is of a step: SHOWN, or all of a probe's."""
        if self.rank > 0:
            return
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if "step" in line:
            names = SHOWN if "loss" in line else line
            words = []
            for name in names:
                value = line.get(name)
                value = f"{value:.4g}" if isinstance(value, float) else value
                if value is not None:
                    words.append(f"{name} {value}")
            say("  ".join(words))
            if self.args.wandb:
                sys.modules["wandb"].log(line)

    def on_signal(self, number, frame):
        if number == signal.SIGINT and self.signalled:
            os._exit(130)  # a second Ctrl-C waits for nothing
        Run.signalled = True

    def loader(self, sources, *masks):
        """This rank's micro-batches of the steps to come, each with its masks. masks: of clips, and
        of images."""
        args = self.args
        batches = data.make_loader(
            sources, self.clip, seed=args.seed, batch_size=args.batch_size, micro_batch=self.micro,
            rank=self.rank, ranks=self.ranks, workers=self.workers, timeout=args.timeout,
            start_step=self.done, steps=self.last, masks=masks, stills=self.stills)
        if self.device.type == "cuda":
            batches = data.ahead(batches, self.device)
        return batches

    def steps(self):
        """The numbers of the steps to take: none where a signal has come before the first. No
        random state outlives a step."""
        numbers = range(self.done, self.done if self.told() else self.last)
        quiet = self.rank > 0 or not sys.stderr.isatty()
        # what lives now lives on: the collector need not walk through it (0.1 s) ever again
        gc.collect()
        gc.freeze()
        self.bar = tqdm(numbers, initial=self.done, total=self.args.steps, disable=quiet)
        for step in self.bar:
            self.done = step + 1
            torch.manual_seed(self.args.seed * 1_000_003 + step)
            yield step

    def passes(self, net):
        """The number in the batch of the first row of each micro-batch of a step. Gradients travel
        between the ranks in the last one."""
        for start in range(0, self.per_rank, self.micro):
            sync_gradients(net, start + self.micro == self.per_rank)
            yield self.first + start

    def due(self, every):
        """Is it time for what happens every so many steps and at the end?"""
        return every > 0 and (self.done % every == 0 or self.done == self.args.steps)

    def probes(self):
        """Is it time for a probe before the last one?"""
        return self.due(self.args.probe_every) and self.done < self.args.steps

    def health(self, tokens, correction=1, **others):
        """Collapse shows here first: mean deviation of the features tokens (n,D), and their rank;
        also that of others. Each hundred steps or so, on one rank; else {}."""
        every = self.args.log_every * max(1, 100 // self.args.log_every)
        if self.rank > 0 or not self.due(every):
            return {}
        std = tokens.float().std(0, correction=correction).mean().item()
        ranks = {f"rankme_{name}": rankme(features) for name, features in others.items()}
        return {"feature_std": std, "rankme": rankme(tokens)} | ranks

    def finish(self, line):
        """The last line on stdout, one JSON object."""
        line["seconds"] = round(time.time() - self.started, 1)
        line["out_dir"] = self.args.out_dir
        say("a vector of each of your videos: python probe.py features --encoder "
            f"{self.args.out_dir} --data VIDEOS --out features.npz")
        if self.rank == 0:
            print(json.dumps(line), flush=True)

    # checkpoints

    def save(self, net, optimizer, state):
        """Written aside, hashed, flushed, renamed, then the pointer: a kill at any moment leaves
        the last good one. state: what load() gives back, as JSON."""
        temp = self.out / "saving"
        self.once(shutil.rmtree, temp, True)  # what a killed run left
        dcp.save(tensors_of(net, optimizer), checkpoint_id=temp)
        if self.rank == 0:
            (temp / "extra.json").write_text(json.dumps({"step": self.done, **state}))
            seal(temp, self.out / f"step_{self.done:08d}", self.args.keep)
        self.gather(None)  # all wait until it is there

    def load(self, net, optimizer):
        """--resume: the newest whole checkpoint -> what save() was given; {} without one."""
        found = self.once(newest, self.out) if self.args.resume else None
        if found is None:
            return {}
        tensors = tensors_of(net, optimizer)
        read_checkpoint(tensors, found)
        dcs.set_model_state_dict(net, tensors["model"])
        dcs.set_optimizer_state_dict(net, optimizer, tensors["optimizer"])
        state = json.loads((found / "extra.json").read_text())
        self.done = state.pop("step")
        return state

    def continue_from(self, objective):
        """--init RUN, before anything is written or sharded: that run's newest weights, which must
        hold all of the objective's tensors, in these shapes; heads may be new."""
        folder = self.args.init
        found = self.once(newest, folder) if folder and Path(folder).is_dir() else None
        if found is None:
            return
        there = CheckpointReader(found).read_metadata().state_dict_metadata
        state = {}
        for name, value in objective.state_dict().items():
            if f"model.{name}" in there or not name.startswith("heads."):
                state[name] = value
        read_checkpoint({"model": state}, found)  # into the objective's own tensors
        with naming(folder):
            check_finite(state)

    def carry_optimizer(self, net, optimizer):
        """--init_optimizer, after continue_from: the moments of --init's run too. A fresh Adam's
        first updates are about five times as large as those of one that goes on."""
        state = {"optimizer": dcs.get_optimizer_state_dict(net, optimizer)}
        read_checkpoint(state, self.once(newest, self.args.init))
        dcs.set_optimizer_state_dict(net, optimizer, state["optimizer"])

    def export(self, objective, **notes):
        """encoder.safetensors, for probes and for sharing; all ranks take part. It comes before the
        checkpoint: a run that is killed between the two, and resumed, exports again."""
        product = objective.product
        state = {name: whole(value) for name, value in product.state_dict().items()}
        args = self.args
        config = product.config | {"model": args.model, **IMAGENET, **notes}
        config |= {"stride": args.stride, "fps": args.fps, "step": self.done}
        # whoever reads it next, on any rank, finds it
        self.once(save_encoder, self.out / "encoder.safetensors", state, config)

    @torch.no_grad()
    def mask_picture(self, net, x, keep, grid):
        """samples/step_*.png of the first clip of x (b,3,T,H,W): the clip, what each mask keep
        [(b,K)] leaves of it, and the first three principal components of its tokens."""
        with self.autocast():
            tokens = net(x[:1])[0]
        if self.rank == 0:
            clip = colour_frames(x[0])
            clip = clip[:: len(clip) // grid[0]]  # (t,H,W,3), a frame a slice
            rows = [Row("clip", clip)]
            for name, ids in zip(self.args.masks, keep):
                rows.append(Row(name, hide(clip, ids[0], grid)))
            rows.append(Row("features", enlarge(colours(tokens), grid, clip.shape[1])))
            self.sample([f"slice {i}" for i in range(grid[0])], rows)

    def sample(self, columns, rows):
        """samples/step_*.png"""
        file = self.out / "samples" / f"step_{self.done:08d}.png"
        figure(file, f"{self.out.name}, step {self.done:,}", columns, rows)

    # the online probe

    def accuracy(self, net, **pixels):
        """Accuracy of a linear probe on the mean of the product's tokens; None where probe()
        finds none."""
        def features(x):
            with self.autocast():
                return net(x).mean(1)  # (B,D)

        heads = {"probe_acc": linear_probe}
        found = self.probe(features, self.lists, self.clip, heads, **pixels)
        return found.get("probe_acc")

    @torch.no_grad()
    def probe(self, features, lists, clip, heads, **pixels):
        """{name: accuracy} of heads fitted on the first list's clips, on those of the second; of a
        run that has begun they are logged.

        features: x -> (B,D). heads: {name: function of x (n,D), y (n,), xv -> classes of xv}.
        pixels: mean and std of what the encoder was trained on, else ImageNet's. A video that
        cannot be read, or has no finite features, counts as wrong. All ranks take part. {}
        without lists, and where a signal cuts it short.
        """
        if not lists:
            return {}
        say("probing ..." if self.done else "probing the random weights ...")

        def read(x):
            if self.told():
                raise Told
            return features(x)

        begin = time.perf_counter()
        sets = []
        try:
            for source in lists:
                frames = 1 if self.stills and data.all_images(source) else clip.frames
                how = replace(clip, frames=frames, train=False, clips=1)
                sets.append(data.labelled_features(
                    read, source, how, self.device, pixels, workers=self.workers, rank=self.rank,
                    ranks=self.ranks, gather=self.gather, timeout=self.args.timeout))
        except Told:
            return {}
        for x, _, ok in sets:
            ok &= x.isfinite().all(1)
        (x, y, ok), (x_val, y_val, ok_val) = sets
        # numbered as they occur: a label of a million asks for no million columns
        labels, y = y[ok].unique(return_inverse=True)
        found = dict.fromkeys(heads, 0.0)
        for name in heads if len(labels) else ():
            right = labels[heads[name](x[ok], y, x_val)] == y_val
            found[name] = (right & ok_val).double().mean().item()
        if self.done:
            self.log({"step": self.done} | found)
        self.paused += time.perf_counter() - begin
        return found


# Someone else's run folder must not run code as it is read. PyTorch reads a checkpoint's metadata
# as a pickle, which may call anything. These are the names that one by dcp.save holds.
METADATA = {
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
    "torch": "Size float32 float64 float16 bfloat16 int64 int32 uint8 bool",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata":
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
}


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in METADATA.get(module, "").split():
            raise UserError(f"asks for {module}.{name}: not a checkpoint of ours")
        return super().find_class(module, name)


class CheckpointReader(dcp.FileSystemReader):
    def read_metadata(self, *args, **named):
        path = Path(self.path) / ".metadata"
        with naming(path), open(path, "rb") as file:
            return MetadataUnpickler(file).load()


class WeightsOnly(dcp.DefaultLoadPlanner):
    """The numbers beside the tensors are pickles, too."""

    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_checkpoint(state, folder):
    """The checkpoint's tensors and numbers into those of `state`, by their names."""
    try:
        dcp.load(state, storage_reader=CheckpointReader(folder), planner=WeightsOnly())
    except dcp.api.CheckpointException as error:
        raise UserError(f"{folder}: {first_cause(error)}") from error


def tensors_of(net, optimizer):
    """What a checkpoint holds, by names that do not depend on ranks or wrappers."""
    return {
        "model": dcs.get_model_state_dict(net),
        "optimizer": dcs.get_optimizer_state_dict(net, optimizer),
    }


class Meter:
    """What a run counts. `state` is saved with each checkpoint and goes on after --resume:
    FLOPs, unreadable videos, the last loss, and the terms of the steps since the last log line."""

    def __init__(self, run, state):
        self.run = run
        self.state = {"random_acc": None, "bad": 0, "padded": 0, "loss": None, "window": [],
                      "flops": 0.0, "skipped": 0}
        self.state |= state
        self.skips = 0
        self.parts = []  # of this step: numbers and files of each micro-batch
        self.sums = Counter()
        self.pending = None
        self.fresh = True
        self.restart()

    def restart(self):
        """After a log line."""
        self.since = time.perf_counter()
        self.run.paused = 0.0
        self.flops_before = self.state["flops"]
        self.clips = 0
        self.waits = []

    def next(self, loader):
        """The loader's next batch, on the clock: what the device waits for it."""
        if self.fresh:  # probes and processes that start are no training
            self.restart()
        begin = moment(self.run.device)
        batch = next(loader)
        self.waits.append((begin, moment(self.run.device)))
        share = batch["padded"] / len(batch["path"])
        if share > 0.1 and self.fresh:
            say(f"warning: in {share:.0%} of the first clips frames repeat, as their "
                "videos are too short or too slow: --short says what else; python data.py "
                "check")
        return batch

    def add(self, loss, metrics, batch, **per_clip):
        """One micro-batch: its scalars, its files, and what a clip of it cost (flops=...)."""
        numbers = {"loss": loss.detach(), **metrics}
        for name, value in numbers.items():
            numbers[name] = torch.as_tensor(value, device=self.run.device).double()
        # without the batch: its pixels would stay on the device
        self.parts.append((numbers, batch["path"]))
        self.sums.update(bad=len(batch["bad"]), padded=batch["padded"])
        for name, cost in per_clip.items():
            self.sums[name] += cost * self.run.micro
        passes = self.run.per_rank // self.run.micro
        seconds = time.perf_counter() - self.since
        if self.fresh and self.run.device.type == "cpu" and passes * seconds > 60:
            step = datetime.timedelta(seconds=round(passes * seconds))
            say(f"the first of {passes} micro-batches took {seconds:.3g} s: a step {step}")
        self.fresh = False

    def skip(self, step, grad_norm):
        """Is loss or gradient of this step not finite? 1.0 or 0.0, on the device and the same on
        every rank. Nothing waits for it: the log reads it a step later, or when it has to."""
        self.catch_up()
        self.step = step
        device = self.run.device
        means = averages([numbers for numbers, _ in self.parts])
        told = torch.tensor([self.run.asked, *self.sums.values()], dtype=torch.float64)
        if device.type == "cuda":
            told = told.pin_memory().to(device, non_blocking=True)
        found = torch.cat([torch.stack([*means.values()]), told])
        if self.run.ranks > 1:
            dist.all_reduce(found)
        found[: len(means)] /= self.run.ranks
        skip = 1 - torch.isfinite(found.sum() + grad_norm).float()
        found = torch.cat([found, torch.stack([grad_norm, skip]).double()])
        names = [*means, "asked", *self.sums, "grad_norm", "skip"]
        self.pending = (names, found.to("cpu", non_blocking=True), self.parts, set(self.sums))
        self.copied = moment(device)
        self.clips += self.run.args.batch_size
        return skip

    def catch_up(self):
        """What the last step was like: count, and tell of a skip."""
        if self.pending is None:
            return
        if self.run.device.type == "cuda":
            self.copied.synchronize()
        names, found, parts, counted = self.pending
        self.pending = None
        means = dict(zip(names, found.tolist()))
        for name in counted:
            self.state[name] += round(means.pop(name))
        self.grad_norm = means.pop("grad_norm")
        skipped = means.pop("skip")
        # a signal on one rank stops them all after a step that can be saved
        Run.stop = means.pop("asked") > 0 and not skipped
        if skipped:
            self.skips += 1
            self.state["skipped"] += 1
            self.report_skip(parts)
        else:
            self.state["window"].append(means)
            self.skips = 0

    def report_skip(self, parts):
        """Log the files of a step that was skipped; too many in a row end the run."""
        step = self.step
        suspects = [part for part in parts if not math.isfinite(part[0]["loss"])] or parts
        files = set().union(*[paths for _, paths in suspects])
        paths = sorted(set().union(*self.run.gather(files)))
        reason = "loss or gradient is not finite"
        self.run.log({"step": step, "skipped": reason, "files": paths[:100]})
        if self.skips >= self.run.args.max_skips:
            raise Stop(f"step {step}: {self.skips} steps in a row skipped, without a finite loss "
                       f"and gradient, the last one with {', '.join(paths[:3])} ...; "
                       f"the last good checkpoint: {newest(self.run.out)}")

    def after_step(self):
        """Forget the micro-batches; too many unreadable videos end the run."""
        self.parts = []
        self.sums = Counter()
        args = self.run.args
        if self.run.due(args.log_every):
            self.catch_up()
        bad = self.state["bad"]
        opened = max(100, self.run.done * args.batch_size / args.clips_per_video)
        if bad > args.max_bad_fraction * opened:
            raise Stop(f"{bad} of the clips opened so far cannot be read, more than "
                       f"--max_bad_fraction {args.max_bad_fraction}; "
                       f"all of them: python data.py check {' '.join(args.data)}")

    def logs(self):
        """Is it time for a line? Not where every step since the last one was skipped."""
        return self.run.due(self.run.args.log_every) and self.state["window"]

    def saves(self, net, *inputs):
        """Is it time for a checkpoint, and are the weights worth one? Not while steps are skipped,
        nor after one that ruined them: net(*inputs), the last micro-batch once more, must still
        have a finite loss, on all ranks."""
        run = self.run
        due = run.stop or run.due(run.args.save_every) or run.done == run.last
        if due:
            self.catch_up()
        if not due or self.skips:
            return False
        with torch.no_grad(), run.autocast():
            loss, _ = net(*inputs)
        sound = all(run.gather(math.isfinite(loss)))
        if not sound:
            say(f"step {run.done}: not saved, the loss is no longer finite")
        return sound

    def line(self, rates, health):
        """The log line: means of the loss terms since the last one, rates, health, speed."""
        run = self.run
        window = self.state["window"]
        seconds = time.perf_counter() - self.since - run.paused
        speed = (self.state["flops"] - self.flops_before) / seconds  # FLOP/s of all ranks
        line = {"step": run.done} | averages(window) | rates
        line["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None
        line |= health
        kept = ("flops", "ledger", "random_acc", "bad")
        line |= {name: self.state[name] for name in kept if name in self.state}
        left = seconds * (run.args.steps - run.done) * run.args.batch_size / self.clips
        line |= {
            "clips_per_s": self.clips / seconds,
            "tflops": speed / 1e12,
            **mfu(speed / run.ranks, run.device),
            "wait_pct": 100 * sum(between(*times) for times in self.waits) / seconds,
            "peak_gb": peak_gb(run.device),
            "padded_pct": 100 * self.state["padded"] / (run.done * run.args.batch_size),
            "eta": str(datetime.timedelta(seconds=round(left))),
        }
        self.state["loss"] = line["loss"]
        run.bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
        window.clear()
        self.restart()
        return line

    def summary(self, probe_acc):
        """For the last line on stdout."""
        said = {name: self.state[name] for name in ("loss", "random_acc", "bad", "skipped")}
        return {"steps": self.run.done, "probe_acc": probe_acc, **said}


def averages(rows):
    """[{name: number}] -> {name: mean}"""
    means = {}
    for name in rows[0]:
        means[name] = sum(row[name] for row in rows) / len(rows)
    return means


def moment(device):
    """Now: on a GPU an event, which nothing waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin, end):
    """Seconds between two moments. On a GPU: those of the device, which are over."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def set_rates(optimizer, rates):
    """This step's learning rate and weight decay, by param_groups' groups."""
    for group in optimizer.param_groups:
        group["lr"] = rates["lr"] * group["factor"]
        group["weight_decay"] = rates["weight_decay"] if group["decay"] else 0.0


def sync_gradients(net, on):
    """DDP: gradients travel between the ranks in the last micro-batch of a step only. FSDP2 must
    not wait: its gradients would be whole on every rank until then. It shards those of each
    micro-batch; HSDP's copies exchange theirs in the last."""
    if hasattr(net, "set_requires_all_reduce"):  # FSDP2
        net.set_requires_all_reduce(on)
    elif hasattr(net, "require_backward_grad_sync"):  # DDP
        net.require_backward_grad_sync = on


def clip_gradients(module, most):
    """-> the gradient's norm before clipping, on the device. most: 0 clips nothing."""
    return whole(torch.nn.utils.clip_grad_norm_(module.parameters(), most or math.inf))


def whole(tensor):
    """Of all shards (FSDP2)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mfu(flops_per_s, device):
    """{"mfu": share of this GPU's dense bf16 peak}, where that is known."""
    if device.type == "cuda":
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return {"mfu": flops_per_s / peak}
    return {}


def peak_gb(device):
    """The most memory this process has held so far: of the GPU, or on a CPU resident, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def tune_cpu():
    """Two settings of the process that about halve a training step on a CPU, at full precision."""
    # oneDNN's float32 kernels are twice as fast as MKL's on AMD. "medium" has torch take them, as
    # it permits bf16 in a float32 product. Only CPUs with bf16 tiles (AMX) or Arm's bf16 units then
    # use it, so check that this one does not: 1 + 2^-12 is no bf16 number.
    torch.set_float32_matmul_precision("medium")
    exact = torch.full((256, 256), 1 + 2**-12)
    if not torch.equal(exact @ torch.eye(256), exact):
        torch.set_float32_matmul_precision("highest")
    # Keep freed memory. Otherwise every tensor of 32 MB or more is mapped by the kernel afresh,
    # page by page, and given back after use.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def count(module):
    """Parameters of a module; 0 of None."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def days(flops, gpus):
    """Days of a run at half of an H100's or H200's dense bf16 peak."""
    return flops / (gpus * 0.5 * PEAK_FLOPS["H100"]) / 86400


def memory(device, neighbours):
    """Bytes that this process may plan with: of the GPU nine tenths of what is free; on a CPU, of
    what the machine, a container or `ulimit -v` leave, eight, shared by the ranks of the machine.
    """
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # no Linux
        return math.inf
    import resource

    words = Path("/proc/meminfo").read_text().split()
    free = [1024 * int(words[words.index("MemAvailable:") + 1]), *cgroup_memory()]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        free.append((most - pages * resource.getpagesize()) * neighbours)
    return 0.8 * min(free) / neighbours


def cgroup_memory(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Bytes that each group of processes around this one has left: a container's, a SLURM job's.
    (Of cgroups' second version, whose line is 0::/path.)"""
    left = []
    text = Path(own).read_text() if Path(own).exists() else ""
    for path in re.findall("^0::/(.*)$", text, re.MULTILINE):
        folder = Path(root, path)
        for group in (folder, *folder.parents):
            limit = group / "memory.max"
            if group.is_relative_to(root) and limit.exists() and limit.read_text() != "max\n":
                stat = (group / "memory.stat").read_text().split()
                cache = int(stat[stat.index("inactive_file") + 1])  # of files
                used = int((group / "memory.current").read_text())
                left.append(int(limit.read_text()) - used + cache)
    return left


def shared_memory():
    """Free bytes of /dev/shm, where loader processes leave their batches."""
    if not os.path.isdir("/dev/shm"):
        return math.inf
    space = os.statvfs("/dev/shm")
    return space.f_bavail * space.f_frsize


class Plan:
    """What a step of an objective needs: FLOPs of all ranks, and bytes of each, term by term."""
    advice = ""  # of this process, should memory run out

    def __init__(self, run, objective, parts=(), extra=0):
        """parts: (share of the steps, objective) where steps differ. extra: bytes that are at work
        for a moment."""
        args = run.args
        self.run = run
        self.extra = extra
        self.name = type(objective).__name__
        each = args.clips_per_video
        self.sizes = [n for n in range(run.per_rank, 0, -1) if run.per_rank % n == n % each == 0]
        self.clip_bytes = 3 * args.frames * args.size**2
        self.flops = mean_cost(parts or [(1.0, objective)], 8)
        self.trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        self.frozen = count(objective) - self.trained
        blocks = [count(module) for module in objective.modules() if isinstance(module, Block)]
        self.block = max(blocks, default=0)
        self.rest = count(objective) - sum(blocks)
        several = [drawn(objective, step) for step in range(8)]
        self.masks = max(several, key=lambda ids: sum(i.numel() for i in tree_leaves(ids)))
        self.kept_bytes(objective)

    def example(self, clips, device):
        """What forward() takes, for so many clips, with the most tokens of eight steps."""
        args = self.run.args
        x = torch.zeros(clips, 3, args.frames, args.size, args.size, device=device)
        if not self.masks:
            return x, torch.arange(clips)
        repeated = tree_map(lambda ids: ids.repeat(clips, 1).to(device), tuple(self.masks))
        return x, *repeated

    def kept_bytes(self, objective):
        """kept: what autograd keeps of a clip; lean: with --checkpoint, with the block that is
        recomputed. Found on the meta device, where nothing is computed."""
        state = {}
        for name, value in objective.state_dict(keep_vars=True).items():
            state[name] = value.detach().to("meta").requires_grad_(value.requires_grad)
        own = {value.untyped_storage()._cdata for value in state.values()}
        kept = {}
        held = []  # or another storage gets the address of one that is counted
        after = [0]  # each block
        inputs = []  # of those that keep anything

        def size(value):
            # float32 under autocast: norms and residuals are, what products read is bf16
            narrow = value.dtype == torch.float32 and self.run.half
            return value.untyped_storage().nbytes() * (0.6 if narrow else 1)

        def pack(value):
            storage = value.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = size(value)
                held.append(storage)
            return value

        def note(module, given, output):
            if isinstance(module, Block):
                after.append(sum(kept.values()))
                if after[-1] > after[-2]:
                    inputs.append(size(given[0]))

        hook = nn.modules.module.register_module_forward_hook(note)  # of all modules
        objective.eval()
        with (torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
              fx_config.patch(meta_nonzero_assume_all_nonzero=True)):
            torch.func.functional_call(objective, state, self.example(1, "meta"))
        objective.train()
        hook.remove()
        self.kept = sum(kept.values())
        self.lean = self.kept - after[-1] + sum(inputs) + max(np.diff(after), default=0).item()

    def terms(self, clips, shards=None, checkpoint=None):
        """{term: bytes} of a rank with so many clips in a forward pass; by the flags, or others."""
        args = self.run.args
        if shards is None:
            shards = (args.shard_ranks or self.run.ranks) if args.fsdp else 1
        size = 2 if self.run.half else 4
        copies = (4 - size) * self.trained  # autocast's
        if shards > 1:
            # the block at work and the next one, the gradients of one, also as they are reduced,
            # in float32; and the parameters outside blocks
            copies = size * (2 * self.block + self.rest) + (4 + size) * max(self.block, self.rest)
        lean = args.checkpoint if checkpoint is None else checkpoint
        return {
            "weights": 4 * (self.trained + self.frozen) // shards,
            "gradients": 4 * self.trained // shards,
            "optimizer": 8 * self.trained // shards,
            "whole": copies,
            "activations": int(clips * (self.lean if lean else self.kept)) + self.extra,
            "clips": 6 * clips * self.clip_bytes,
        }

    def total(self, clips, **other):
        return sum(self.terms(clips, **other).values())

    def shared(self, clips):
        """Bytes of /dev/shm: two batches of each loader process, and the one that is read."""
        return clips * self.clip_bytes * (2 * self.run.workers + 1) if self.run.workers else 0

    def fits(self, clips):
        """Into memory, and what the loader shares into /dev/shm; on a CPU this is the same."""
        run = self.run
        shared = self.shared(clips)
        used = self.total(clips) + (shared if run.device.type == "cpu" else 0)
        return used <= run.room and shared * run.neighbours <= shared_memory()

    def tell(self):
        """The choice and the plan; what would save how much, should memory run out."""
        run = self.run
        now = self.total(run.micro)
        terms = self.terms(run.micro).items()
        parts = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in terms)
        say(f"--micro_batch {run.micro} of {run.per_rank} clips a rank: {now / 2**30:.3g} GiB "
            f"planned ({parts}), {run.room / 2**30:.3g} free")
        fewer = [n for n in self.sizes if n < run.micro]
        others = {f"--micro_batch {n}": self.total(n) for n in fewer[:1]}
        if not run.args.checkpoint:
            others["--checkpoint"] = self.total(run.micro, checkpoint=True)
        ranks = max(8, 2 * run.ranks)
        others[f"--fsdp on {ranks} ranks"] = self.total(run.micro, shards=ranks)
        saved = [f"{name} saves {(now - size) / 2**30:.2g} GiB" for name, size in others.items()]
        Plan.advice = f", {now / 2**30:.3g} GiB planned: {', '.join(saved)}"
        if now > run.room:
            say(f"warning: more than is free{Plan.advice}")


def dry_run(run, objective, total=None, **more):
    """--dry_run: sizes -> the last line on stdout, one JSON object. total: FLOPs of the run, if not
    those of a step times --steps."""
    args = run.args
    plan = run.plan
    plan.tell()
    total = plan.flops * args.steps if total is None else total
    memory = plan.total(run.micro)
    if run.rank == 0:
        print(f"{args.model}: {plan.flops / args.batch_size / 1e12:.3g} TFLOP a clip; "
              f"{memory / 2**30:.3g} GiB a GPU; {days(total, run.ranks):.3g} days on {run.ranks} "
              f"GPU(s) at 50 % of an H100's or H200's 989 bf16 TFLOP/s")
        print(json.dumps({
            "params": plan.trained,
            "params_encoder": count(objective.encoder),
            "flops_per_step": plan.flops,
            "flops_per_clip": plan.flops / args.batch_size,
            "micro_batch": run.micro,
            "bytes_per_gpu": memory,
            "memory": plan.terms(run.micro),
            "gpus": run.ranks,
            "days": days(total, run.ranks),
            **more,
        }))


# masked prediction: what V-JEPA and SALT share

def make_predictor(args, encoder, **shape):
    """On the encoder's grid, for the masks of these flags. shape: Predictor's other widths and
    layers."""
    if args.mask_tokens > len(args.masks):
        raise ValueError(f"--mask_tokens {args.mask_tokens}: at most one for each of the "
                         f"{len(args.masks)} --masks")
    return Predictor(
        **shape, width=args.pred_width, depth=args.pred_depth,
        heads=args.pred_heads or encoder.heads, grid=encoder.grid, pos=encoder.pos,
        rope_quirk=encoder.rope_quirk, rope_scaled=encoder.rope_scaled, stills=encoder.stills,
        mask_tokens=args.mask_tokens or len(args.masks),  # 0: one for each
        init_std=args.init_std, checkpoint=args.checkpoint)


def masked_flops(encoder, predictor, keep, pred):
    """Forward FLOPs of one clip: the tokens keep [(B,K)] encoded, those at pred [(B,M)] foretold.
    """
    kept = [ids.shape[1] for ids in keep]
    hidden = [ids.shape[1] for ids in pred]
    return encoder.flops(*kept) + predictor.flops(*zip(kept, hidden))


def split_time(encoder, x, context):
    """Ids (B,K) of the tokens of the first `context` frames of x (B,3,T,H,W), and (B,M) of the
    later ones."""
    n = encoder.grid[1] * encoder.grid[2]
    ids = torch.arange(x.shape[2] // encoder.tubelet * n, device=x.device).expand(len(x), -1)
    return ids.tensor_split([context // encoder.tubelet * n], 1)


def latent_surprise(encoder, predictor, targets, x, context):
    """(B,): mean |zhat - h| over the tokens after the first `context` frames (SALT, appendix D).
    targets: x -> h (B,N,D)."""
    keep, pred = split_time(encoder, x, context)
    h = gather(targets(x), pred)
    zhat = predictor(encoder(x, keep, levels=True), keep, pred).float()
    return (zhat - h).abs().mean((1, 2))


def gather(tokens, ids):
    """tokens (B,N,D), ids (B,M) -> (B,M,D)."""
    return tokens.take_along_dim(ids[..., None], 1)


def numbered(names):
    """Names of which none occurs twice, for the log: 2x0.5, 2x0.5_2, 2x0.5_3."""
    unique = []
    for i, name in enumerate(names):
        again = names[:i].count(name)
        unique.append(f"{name}_{1 + again}" if again else name)
    return unique


# pictures

def enlarge(values, grid, pixels):
    """(N,C) of a token grid (t,h,w) -> (t,pixels,pixels,C)."""
    t, h, w = grid
    values = values.view(t, h, w, -1)
    return values.repeat_interleave(pixels // h, 1).repeat_interleave(pixels // w, 2)


def to_unit(values):
    """(n,C) -> each column from 0 to 1."""
    low = values.amin(0)
    return (values - low) / (values.amax(0) - low).clamp_min(1e-6)


def colours(tokens):
    """(n,D) -> (n,3) in [0,1]: the first three principal components."""
    tokens = tokens.float().cpu()
    tokens = tokens - tokens.mean(0)
    directions = torch.linalg.svd(tokens, full_matrices=False).Vh[:3]
    return to_unit(tokens @ directions.T)


@lru_cache
def pyplot():
    """matplotlib, or None where it is missing or broken."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        return None
    return matplotlib.pyplot


@dataclass
class Row:
    """Pictures (k,H,W,3) in [0,1], or numbers (k,H,W) with a colour bar, side by side."""
    label: str
    pictures: torch.Tensor
    unit: str = ""  # of the colour bar
    paint: dict = field(default_factory=dict)  # imshow's cmap, vmin, vmax
    # of each picture [(point (2,) or box (4,) in shares of it, number of a colour, perhaps a word)]
    marks: tuple = ()


def figure(file, title, columns, rows):
    """Rows of pictures of one size, None for a gap -> the path of a PNG. Without matplotlib it has
    no words, and no rows of numbers."""
    plt = pyplot()
    if not plt:
        return save_bare(file, [row.pictures for row in rows if row and not row.unit])
    height, width = rows[0].pictures.shape[1:3]
    tall = height / width  # a picture is 1 wide, and 0.06 lie between two
    shown, axis = plt.subplots(layout="constrained")
    top = 0.0
    labels = {}
    bars = {}
    for row in rows:
        if row is None:
            top += 0.12
            continue
        labels[top + tall / 2] = row.label
        for k, picture in enumerate(row.pictures):
            left = 1.06 * k
            image = axis.imshow(
                picture.numpy(), extent=(left, left + 1, top + tall, top),
                interpolation="nearest", **row.paint)
            frame = plt.Rectangle((left, top), 1, tall, transform=axis.transData)
            for place, *look in row.marks[k] if row.marks else ():
                at = place.view(-1, 2) * torch.tensor([1, tall]) + torch.tensor([left, top])
                mark(axis, frame, at.flatten().tolist(), *look)
        if row.unit:
            bars[row.unit] = image
        top += tall + 0.06
    inch = max(1.4, width / 100)  # of a picture: none of its pixels is left out
    wide = inch * len(columns) + 0.6 + 1.4 * len(bars)
    shown.set_size_inches(max(4, wide), inch * top + 0.6)
    shown.suptitle(title, fontsize=9)
    axis.set(xlim=(0, 1.06 * len(columns)), ylim=(top, 0), frame_on=False)
    axis.set_xticks(1.06 * np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks([*labels], labels.values(), rotation=90, verticalalignment="center")
    axis.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    for unit, image in bars.items():
        bar = shown.colorbar(image, label=unit, shrink=min(1, 3 / top))
        if unit == "class":
            bar.locator = plt.MaxNLocator(12, integer=True)
    return finish(file, shown)


def mark(axis, frame, place, colour, word=""):
    """A point or a box, and what stands above it, as far as they lie in the frame."""
    if not all(map(math.isfinite, place)):
        return
    x, y, *end = place
    colour = f"C{colour}"
    if end:
        box = pyplot().Rectangle((x, y), end[0] - x, end[1] - y, fill=False, edgecolor=colour)
        y = max(y, frame.get_y() + 0.1)  # the word stays in the picture
        look = dict(color="w", fontsize=6, verticalalignment="bottom", clip_on=True)
        drawn = [axis.add_patch(box), axis.text(x, y, word, **look)]
    else:
        look = dict(markersize=3, markeredgecolor="w", markeredgewidth=0.3)
        drawn = axis.plot(x, y, "o", color=colour, **look)
    for artist in drawn:
        artist.set_clip_path(frame)


def finish(file, shown):
    """Save what matplotlib has drawn -> its path."""
    shown.savefig(file, dpi=120)
    pyplot().close(shown)
    return str(file)


def save_bare(file, rows):
    """Rows of pictures (k,H,W,3) without a word, with gaps between them."""
    zoom = max(1, 112 // rows[0].shape[1])
    # a gap below and to the right of each
    pictures = F.pad(torch.stack(rows), (0, 0, 0, 1, 0, 1), value=1)    # (rows, k, H+1, W+1, 3)
    image = pictures.transpose(1, 2).flatten(2, 3).flatten(0, 1).mul(255).byte()
    data.save_png(file, image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())
    return str(file)


def to_rgb(x, mean, std):
    """Pixels (...,3,T,H,W) that were normalised by these -> RGB in [0,1]."""
    mean, std = x.new_tensor([mean, std]).view(2, 3, 1, 1, 1)
    return x * std + mean


def colour_frames(x):
    """A normalised clip (3,T,H,W) -> RGB in [0,1], (T,H,W,3)."""
    return to_rgb(x.float().cpu(), **IMAGENET).permute(1, 2, 3, 0).clamp(0, 1)


def hide(frames, ids, grid):
    """Frames (t,H,W,3), one a slice: what a mask that keeps ids (K,) leaves of them, on grey."""
    seen = torch.zeros(math.prod(grid), 1).index_fill(0, ids.cpu(), 1.0)
    seen = enlarge(seen, grid, frames.shape[1])
    return frames * seen + 0.5 * (1 - seen)


# collapse alarms, online probes

def some_rows(tokens):
    """(B,N,D) or (n,D) -> about 2,048 rows (n,D), enough for the collapse alarms of the log."""
    rows = tokens.detach().flatten(0, -2)
    return rows[:: max(1, len(rows) // 2048)]


@torch.no_grad()
def rankme(features):
    """Effective rank of features (n,D): exp of the entropy of the normalised singular values.
    Falls towards 1 in a collapse (Garrido et al., 2023)."""
    x = features.double()
    # the eigenvalues of the smaller product are the squares, ten times as fast
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    s = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = s / s.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


@torch.no_grad()
def linear_probe(x, y, xv, penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)):
    """Class predictions (nv,) for xv (nv,D) by ridge regression of x (n,D) on one-hot labels:
    deterministic, seconds on a CPU.

    Features are standardised with the statistics of x. The penalty (in units of n) is the one with
    the best leave-one-out accuracy on x, which the singular value decomposition gives in closed
    form for all penalties at once.
    """
    x = x.double()
    mean = x.mean(0)
    # one row has no deviation
    std = x.std(0, correction=min(1, len(x) - 1)) + 1e-6
    x = (x - mean) / std
    xv = (xv.double() - mean) / std
    target = F.one_hot(y).double()
    centre = target.mean(0)
    target = target - centre
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    along = u.T @ target
    best = (-1, None)
    for penalty in penalties:
        shrink = s**2 / (s**2 + penalty * len(x))
        fit = u @ (shrink[:, None] * along)
        leverage = (u**2 @ shrink + 1 / len(x)).clamp(max=1 - 1e-9)
        # each row predicted by a fit without it
        left_out = target - (target - fit) / (1 - leverage)[:, None]
        score = ((left_out + centre).argmax(1) == y).double().mean().item()
        if score > best[0]:
            inverse = shrink / s.clamp(min=1e-12)
            best = (score, v.T @ (inverse[:, None] * along))
    return (xv @ best[1] + centre).argmax(1)


# files that a kill or a full disk leaves whole

def flush(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def put_in_place(temp, path):
    """Flush temp to the disk and rename it to path, readable by all (safetensors writes 0600)."""
    os.chmod(temp, 0o755 if temp.is_dir() else 0o644)
    flush(temp)
    os.replace(temp, path)
    flush(path.parent)


@contextmanager
def replacing(path):
    """A file to write to, which then takes the place of the one at path."""
    temp = Path(f"{path}.tmp")
    yield temp
    put_in_place(temp, Path(path))


def write(path, text):
    """Replace the file's text: a kill or a full disk leaves the old one whole."""
    with replacing(path) as temp:
        temp.write_text(text)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(temp, final, keep):
    """Turn the directory temp into the checkpoint final, point `latest` to it, and delete all but
    the newest `keep`. In this order: hash every file, flush all to the disk, rename, pointer."""
    sums = {path.name: sha256(path) for path in sorted(temp.iterdir())}
    (temp / "sha256.json").write_text(json.dumps(sums))
    for path in temp.iterdir():
        flush(path)
    if final.exists():  # damaged, or left by a return to an older checkpoint: nothing points to it
        discard(final)
    put_in_place(temp, final)
    write(final.with_name("latest"), final.name)
    for path in up_to(final)[keep:]:
        discard(path)


def up_to(last):
    """This checkpoint and those before it, the newest first."""
    before = {path for path in last.parent.glob("step_*") if path < last}
    return sorted(before | {last}, reverse=True)


def discard(folder):
    """Delete it under another name: what is called a checkpoint is never half of one."""
    trash = folder.with_name("discarded")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


def newest(folder):
    """The checkpoint that `latest` names, or the newest before it that is whole; None where there
    is none. UserError: all are damaged."""
    folder = Path(folder)
    if not (folder / "latest").exists():
        return None
    for path in up_to(folder / (folder / "latest").read_text().strip()):
        bad = broken(path)
        if not bad:
            return path
        print(f"not used, {bad} is damaged or missing: {path}", file=sys.stderr)
    raise UserError(f"{folder}: none of its checkpoints is whole")


def broken(folder):
    """The first file of a sealed directory that is missing or differs from its hash, or None."""
    try:
        sums = json.loads((folder / "sha256.json").read_text())
        for name, digest in sums.items():
            file = folder / name
            if not file.exists() or sha256(file) != digest:
                return file
    except (OSError, ValueError, AttributeError):
        return folder / "sha256.json"
    return None


# --- 3. weight files ------------------------------------------------------------------------------
# Ours are safetensors with the config inside. A foreign file is a nest of dicts: the part that
# holds the encoder is taken, its names become ours, and names and shapes tell its family, which
# says the rest of the config (assets/weights.md has the families in a table).

# what weights fit
SHAPE = tuple(name for name in VIT_KEYS if name not in ("frames", "size", "init_std"))
# where a file keeps its encoder, if FILE#PART does not say it; never a student that has a teacher
PARTS = "ema_encoder target_encoder teacher model module state_dict".split()


class Refused(UserError):
    """What a weight file lacks: one line of at most 200 characters, however long its path."""

    def __init__(self, path, what):
        path = str(path)
        path = path if len(path) <= 110 else "..." + path[-107:]
        text = " ".join(f"{path}: {what}".split())
        super().__init__(text if len(text) <= 200 else text[:197] + "...")


@contextmanager
def naming(path, family=""):
    """Errors in this block name the file, and its family where that is known by then."""
    try:
        yield
    except Refused:
        raise
    except (OSError, IndexError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise Refused(f"{path} ({family})" if family else path, error) from error


def save_encoder(path, encoder, config):
    """Write encoder (a ViT, or a state dict) as safetensors with config in its metadata and its
    sha256 beside it. A reader never sees half a file. ValueError: what config lacks."""
    lacking = [name for name in (*VIT_KEYS, "mean", "std") if name not in config]
    if lacking:
        raise ValueError(f"{path}: the config to export lacks {lacking}")
    state = encoder if isinstance(encoder, dict) else encoder.state_dict()
    state = {name: value.detach().cpu().float().contiguous() for name, value in state.items()}
    side = Path(f"{path}.sha256")
    with replacing(path) as temp:
        save_file(state, temp, metadata={"config": json.dumps(config)})
        digest = sha256(temp)
        # before the new weights: a kill in between leaves weights without a sum, never with a wrong
        # one
        side.unlink(missing_ok=True)
    write(side, f"{digest}  {side.stem}\n")


def load_encoder(path, *, seed=0, key="", **override):
    """(encoder in eval mode, float32; config dict) from any weight file of SIZES' families, or
    with random weights.

    path: our .safetensors or the folder of the run that made it (checked against its sha256 where
    that lies beside it); a directory or .safetensors of a model of transformers, of a kind in HF; a
    .pt or .pth.tar of Meta's V-JEPA 1, 2 or 2.1, or I-JEPA; a .pth of VideoMAE, MAE, DINO, DINOv2
    or timm's ViT; an .npz of 4DS; "random:vit_s" or "random:PATH" for random weights (from `seed`)
    in the shape of a size or file. FILE#PART, or key, names the part of a .pt or .pth to read.
    override: entries of the config, such as heads=, frames=, size=. ValueError names the file, the
    family seen, and the first keys that are missing, unexpected or misshaped.
    """
    name = str(path).removeprefix("random:")
    random = name != str(path)
    family = ""
    if random and name in SIZES:
        config = SIZES[name] | dict(model=name, **IMAGENET)
    else:
        family, state, _, config = read_weights(name, key, override)
        config.pop("predictor_heads", None)
    with naming(name, family), torch.random.fork_rng(devices=[]):
        config = apply_override(config, override, "mlp", "mean", "std")
        torch.manual_seed(seed)
        with torch.device("cpu" if random else "meta"):
            encoder = ViT(**{name: config[name] for name in VIT_KEYS if name in config})
        if not random:
            fill(encoder, state)
    return encoder.eval(), encoder.config | config


def make_encoder(args, shape, pixels=IMAGENET):
    """(encoder for the clips of these flags, mean and std of the pixels it reads): of random
    weights in this shape; with --init FILE in the file's, which must be the same but for heads.
    Learned positions of another grid are interpolated."""
    flags = dict(
        frames=args.frames, size=args.size, init_std=args.init_std, checkpoint=args.checkpoint)
    if not args.init:
        return ViT(**shape, **flags), pixels
    start, config = load_encoder(args.init)
    differ = []
    for name, value in shape.items():
        if name != "heads" and config[name] != value:
            differ.append(f"{name} is {config[name]} there and {value} here")
    if differ:
        raise ValueError(f"--init {args.init}: {', '.join(differ)}")
    encoder = ViT(**{name: config[name] for name in SHAPE}, **flags)
    weights = start.state_dict()
    if start.pos == "learned":
        weights["pos_embed"] = start.positions(encoder.table_grid, "cpu")[None]
    encoder.load_state_dict(weights)
    return encoder, {name: config[name] for name in ("mean", "std")}


def load_predictor(path, **override):
    """(Predictor in eval mode, config dict) from a file of Meta's V-JEPA 1, 2 or 2.1, HF's
    VJEPA2Model, or the folder of a run.

    override: frames= and size= of the clip, or entries of Predictor's config. ValueError as of
    load_encoder, and where the file holds no predictor.
    """
    family, _, state, config = read_weights(path, "", override)
    with naming(path, family):
        if not state and (Path(path) / "latest").exists():
            state = run_part(path, "predictor")
            said = read_config(Path(path) / "config.json")["config"]
            config["predictor_heads"] = said.get("pred_heads") or config["heads"]
        if not state:
            raise ValueError("holds no predictor")
        config |= {name: override.pop(name) for name in ("frames", "size") if name in override}
        config = apply_override(predictor_shapes_config(state, config), override)
        with torch.device("meta"):
            predictor = Predictor(**config)
        fill(predictor, state)
    return predictor.eval(), config


def apply_override(config, override, *needed):
    known = {*config, *VIT_KEYS, *NOTES, "model"}
    unknown = [name for name in override if name not in known]
    if unknown:
        raise ValueError(f"unknown config entries {unknown}; known are {sorted(known)}")
    config = {**config, **override}
    lacking = [name for name in ("width", "depth", "heads", *needed) if name not in config]
    if lacking:
        raise ValueError(f"its config lacks {', '.join(lacking)}")
    if config["heads"] is None:
        raise ValueError(f"no known size has width {config['width']} and depth {config['depth']}, "
                         "so heads are unknown: pass heads=")
    check_config(config)
    return config


def check_finite(state):
    """ValueError: the first tensor that is not."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"not finite {name}")


def fill(module, state):
    """Load state into module (on the meta device) strictly, as float32 copies. ValueError: torch's
    list of the names that are missing, unexpected or misshaped."""
    check_finite(state)
    state = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        names = str(error).partition("\n")[2]  # the first line has none
        raise ValueError(names.replace("(s) in state_dict", "s")) from error


def read_weights(name, key, override):
    """Any weight file, FILE or FILE#PART -> (family, encoder state, predictor state, config)."""
    if not str(name):
        raise ValueError("no weight file is given")
    with naming(name):
        path = Path(name)
        if not path.exists() and "#" in str(name):
            name, _, key = str(name).rpartition("#")
            path = Path(name)
        # the folder of a run
        if (path / "encoder.safetensors").exists():
            path = path / "encoder.safetensors"
        if not path.exists():
            raise ValueError(f"no such weight file or folder; random:SIZE knows {', '.join(SIZES)}")
        if path.is_dir():
            return from_hf(path)
        if path.suffix == ".safetensors":
            state, metadata = read_safetensors(path)
            if "config" not in metadata:
                return from_hf(path)
            return "", state, {}, parse_config(metadata["config"])
        if path.suffix not in (".pt", ".pth", ".tar", ".npz"):
            raise ValueError("not a weight file (.safetensors, .pt, .pth, .pth.tar, .npz) or a "
                             "directory of one")
        file = read_foreign(path)
        if path.suffix == ".npz":
            with naming(name, "4DS"):
                return from_4ds(file)
        part = key or next((part for part in PARTS if isinstance(file.get(part), dict)), None)
        inner = file if part is None else file.get(part)
        if not isinstance(inner, dict) or not any(map(torch.is_tensor, inner.values())):
            raise ValueError(f"no weights in {part or 'target_encoder'!r}; the file holds "
                             f"{sorted(map(str, file))}: name a part as FILE#PART")
        return from_torch(path, inner, file.get("predictor"), override)


def parse_config(text):
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its config is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"its config is a {type(config).__name__}")
    return config


def read_config(path):
    with naming(path):
        return parse_config(path.read_text())


def read_foreign(path):
    """The dict in a .pt, .pth or .npz file, read without running any code in it."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as f:
                return {name: torch.from_numpy(f[name]) for name in f}
        # flags and best scores beside the weights; they are data
        scalar = [np.dtype, np._core.multiarray.scalar, np.dtypes.Float64DType]
        with torch.serialization.safe_globals([argparse.Namespace, *scalar]):
            file = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(file, dict):
            raise TypeError(f"it holds a {type(file).__name__}")
        return file
    except Exception as e:
        first_line = str(e).partition("\n")[0]
        raise ValueError(f"not a readable weight file ({type(e).__name__}: {first_line})") from e


def read_safetensors(path):
    """(state, metadata), after checking the sha256 beside the file if there is one."""
    side = Path(f"{path}.sha256")
    with naming(path):
        if side.exists() and side.read_text().split()[:1] != [sha256(path)]:
            raise ValueError(f"differs from its sha256 in {side.name}: the file is damaged")
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


def size_name(width, depth):
    """The size of these, or None."""
    return next((name for name, row in ROWS.items() if row[:2] == (width, depth)), None)


def shapes_config(state):
    """What the shapes of an encoder state in our names tell of its config. Heads come from the
    size table, None where no size fits."""
    embed, fc1 = pick(state, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if embed.ndim != 5:
        raise ValueError(f"wrong shape patch_embed.proj.weight {tuple(embed.shape)}")
    width, _, tubelet, patch, _ = embed.shape
    depth = depth_of(state, "blocks")
    model = size_name(width, depth)
    heads = SIZES[model]["heads"] if model else None
    return dict(
        width=width, depth=depth, heads=heads, mlp=len(fc1), patch=patch, tubelet=tubelet,
        model=model, **IMAGENET,
    )


def pick(state, *names):
    lacking = [name for name in names if name not in state]
    if lacking:
        raise ValueError(f"missing {', '.join(lacking)}")
    return [state[name] for name in names]


# what is neither the encoder's nor the predictor's
OUTSIDE = r"(\w+\.)?(decoder|encoder_to_decoder|fc_norm|head|classifier|pooler)[._]|.*mask_token$"
# names of the files of papers -> ours, replaced in this order
NAMES = {
    r"\b(module|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": "",
    # VideoMAE's pretraining, Lightning
    r"^((encoder|model)\.)+": "",
    # DINOv2's chunked blocks: blocks.0.11
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",
    r"attn\.q_bias$": "attn.query.bias",
    r"attn\.v_bias$": "attn.value.bias",
    # V-JEPA 2.1: four levels, of which the last is what is read
    r"^norms_block\.3\.": "norm.",
    r"^norms_block\.": "level_norms.",
}


def rename(state, patterns):
    """The tensors of a state that belong to encoder or predictor, under our names: every one of
    `patterns` is replaced in turn."""
    out = {}
    for theirs, value in state.items():
        ours = str(theirs)
        for pattern, new in patterns.items():
            ours = re.sub(pattern, new, ours)
        if not torch.is_tensor(value) or re.match(OUTSIDE, ours):
            continue
        if ours in out:
            raise ValueError(f"holds {ours} twice, the second time as {theirs}")
        out[ours] = value
    return out


def fuse_qkv(state):
    """Join attn.{query,key,value} to attn.qkv in place, where none is missing. Keys of which none
    has a bias, as in VideoMAE, get zeros."""
    biased = any(name.endswith(".attn.key.bias") for name in state)
    for query in [name for name in state if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        if query.endswith(".bias") and not biased:
            state.setdefault(names[1], torch.zeros_like(state[query]))
        if all(name in state for name in names):
            parts = [state.pop(name) for name in names]
            state[query.replace("query", "qkv")] = torch.cat(parts)


def fold(state):
    """In place: q, k, v in one, a layer scale into the layer it follows, an image's patch embedding
    as one of tubelets of one frame."""
    fuse_qkv(state)
    for name in [name for name in state if re.search(r"\.ls[12]\.gamma$", name)]:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        gamma = state.pop(name)
        for kind, scale in (("weight", gamma[:, None]), ("bias", gamma)):
            if f"{layer}.{kind}" in state:
                state[f"{layer}.{kind}"] = state[f"{layer}.{kind}"] * scale
    embed = state.get("patch_embed.proj.weight")
    if embed is not None and embed.ndim == 4:
        state["patch_embed.proj.weight"] = embed[:, :, None]


def fold_cls(state):
    """In place: CLS's row of an image encoder's positions into CLS -> the side of their grid."""
    table = pick(state, "pos_embed")[0]
    own = 1 if "cls_token" in state else 0
    n = table.shape[1] if table.ndim == 3 else 0
    side = math.isqrt(max(0, n - own))
    if not side or n != own + side**2:
        raise ValueError(f"wrong shape pos_embed {tuple(table.shape)}: not that of a square")
    if own:
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = table[:, 1:]
    return side


def depth_of(state, name):
    """One more than the largest number that follows this name."""
    found = [re.match(rf"{name}\.(\d+)\.", key) for key in state]
    return 1 + max(int(match[1]) for match in found if match)


def predictor_shapes_config(state, config):
    hidden = len(state.get("predictor_embed.0.weight", ()))
    embed, proj, fc1, norm = pick(
        state, f"predictor_embed.{'0.' if hidden else ''}weight", "predictor_proj.weight",
        "predictor_blocks.0.mlp.fc1.weight", "predictor_norm.weight")
    side = config["size"] // config["patch"]
    shared = ("pos", "rope_quirk", "rope_scaled", "eps")
    return dict(
        in_width=embed.shape[-1], out_width=len(proj), width=len(norm), hidden=hidden,
        context="predictor_proj_context.weight" in state, stills="img_mod_embed" in state,
        depth=depth_of(state, "predictor_blocks"), mlp=len(fc1), heads=config["predictor_heads"],
        grid=[config["frames"] // config["tubelet"], side, side],
        mask_tokens=sum(name.startswith("mask_tokens.") for name in state),
        **{name: config[name] for name in shared if name in config},
    )


def from_torch(path, part, predictor, override):
    """A .pt or .pth: V-JEPA, VideoMAE, I-JEPA, MAE, DINO and timm's image encoders."""
    state = rename(part, NAMES)
    predictor = rename(predictor, NAMES) if isinstance(predictor, dict) else {}
    embed = pick(state, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")[0]
    videomae = "blocks.0.attn.query.bias" in state
    fold(state)
    if embed.ndim == 4:
        cls = "cls_token" in state
        family = "MAE, DINO or timm's ViT" if cls else "I-JEPA"
        with naming(path, family):
            config = shapes_config(state)
            size = fold_cls(state) * config["patch"]
        config.update(pos="learned", images=True, cls=cls, size=size)
    elif videomae:
        family = "VideoMAE"
        # bare after fine-tuning, without norm where an fc_norm follows
        final_norm = not any("fc_norm." in str(name) for name in part)
        config = shapes_config(state)
        config.update(pos="sinusoid1d", final_norm=final_norm)
    else:
        levels = "level_norms.0.weight" in state
        pos = "sincos" if "predictor_pos_embed" in predictor else "rope"
        pos = override.get("pos", pos)
        family = "V-JEPA 2.1" if levels else {"rope": "V-JEPA 2"}.get(pos, "V-JEPA 1")
        with naming(path, family):
            config = vjepa_config(state, predictor, levels, pos, override)
        if family == "V-JEPA 2" and not predictor and "pos" not in override:
            say(f"note: {path} is read as V-JEPA 2's, with tiled rope frequencies (rope_quirk)")
    return family, state, predictor, config


def vjepa_config(state, predictor, levels, pos, override):
    """Meta's V-JEPA 1 (sincos tables stored beside the weights), 2 (rope with its quirk) and 2.1
    (rope, a norm for each of four levels).

    The predictor tells the first two apart: V-JEPA 1's has a predictor_pos_embed, while a V-JEPA 2
    encoder may carry a stale pos_embed it never uses.
    """
    table = state.pop("pos_embed", None)
    predictor_table = predictor.pop("predictor_pos_embed", None)
    config = shapes_config(state)
    if table is not None and not predictor and not levels and "pos" not in override:
        raise ValueError("has a pos_embed but no predictor to tell V-JEPA 1 from 2: pass "
                         "pos='sincos' or pos='rope'")
    if pos == "rope":
        heads = {"vit_g": 22, "vit_G": 26 if levels else 16}.get(config["model"], config["heads"])
        # the clips of their hubs; rope takes any other
        config.update(pos=pos, heads=heads, predictor_heads=12, frames=64, size=256)
        if not levels:
            return config | dict(rope_quirk=True)
        return config | dict(
            rope_scaled=16, levels=4, stills="img_mod_embed" in state, size=384)

    if table is None:
        raise ValueError("missing pos_embed")
    frames = override.get("frames", 16)
    slices = frames // config["tubelet"]
    side = math.isqrt(table.shape[1] // slices)
    grid = (slices, side, side)
    for name, table in (("pos_embed", table), ("predictor_pos_embed", predictor_table)):
        if table is None:
            continue
        ours = sincos_table(table.shape[-1], grid)[None]
        if table.shape != ours.shape or (table - ours).abs().max() > 1e-4:
            raise ValueError(
                f"{name} {tuple(table.shape)} is not the sincos table of the grid {grid}")
    size = side * config["patch"]
    return config | dict(pos=pos, predictor_heads=config["heads"], frames=frames, size=size)


# our names -> those of transformers, each where a name's part begins, replaced in this order
HF_DINOV2 = {
    "blocks.": "encoder.layer.",
    "attn.proj.": "attention.output.dense.",
    "attn.": "attention.attention.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "norm.": "layernorm.",
}
HF_VIT = HF_DINOV2 | {
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
}
# transformers 5 has query.bias and value.bias in its modules, but not in its files
HF_VIDEOMAE = {
    "attn.query.bias": "attention.attention.q_bias",
    "attn.value.bias": "attention.attention.v_bias",
} | HF_VIT
HF_VJEPA2 = {
    "predictor_embed.": "predictor.embeddings.predictor_embeddings.",
    "mask_tokens": "predictor.embeddings.mask_tokens",
    "predictor_blocks.": "predictor.layer.",
    "predictor_norm.": "predictor.layernorm.",
    "predictor_proj.": "predictor.proj.",
    "patch_embed.": "encoder.embeddings.patch_embeddings.",
    "blocks.": "encoder.layer.",
    "attn.": "attention.",
    "norm.": "encoder.layernorm.",
}
# our config -> that of transformers
HF_CONFIG = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "patch": "patch_size", "size": "image_size", "eps": "layer_norm_eps", "act": "hidden_act",
}
HF_VIDEO = HF_CONFIG | {"frames": "num_frames", "tubelet": "tubelet_size"}
IMAGES = dict(pos="learned", images=True, cls=True, tubelet=1)
# model_type: the model's class, names, config, and what that config does not say
HF = {
    "vjepa2": ("VJEPA2Model", HF_VJEPA2,
               HF_VIDEO | {"size": "crop_size", "frames": "frames_per_clip"},
               dict(pos="rope", rope_quirk=True)),
    "videomae": ("VideoMAEModel", HF_VIDEOMAE, HF_VIDEO, dict(pos="sinusoid1d")),
    "dinov2": ("Dinov2Model", HF_DINOV2, HF_CONFIG, IMAGES),
    "vit": ("ViTModel", HF_VIT, HF_CONFIG, IMAGES),
    "vit_mae": ("ViTMAEModel", HF_VIT, HF_CONFIG, IMAGES),
    "ijepa": ("IJepaModel", HF_VIT, HF_CONFIG, IMAGES | dict(cls=False)),
}
HF_ACTS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def from_hf(path):
    """The models of HF, bare or with a head around them, as transformers saves them: safetensors
    with a config.json beside them."""
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not (folder / "config.json").exists():
        raise ValueError(
            "neither our format nor HF's: no .safetensors with a config.json beside it")
    hf = read_config(folder / "config.json")
    kind = str(hf.get("model_type"))
    if kind not in HF:
        raise ValueError(f"config.json says model_type {kind!r}, not one of {', '.join(HF)}")
    family = f"HF's {kind}"
    with naming(folder / "config.json", family):
        config = hf_config(kind, hf)
    state = {}
    for file in files:
        state |= read_safetensors(file)[0]
    patterns = {r"^(vjepa2|videomae|dinov2|vit|ijepa)\.": ""}
    for ours, theirs in HF[kind][1].items():
        patterns[rf"(^|(?<=\.)){re.escape(theirs)}"] = ours
    state = rename(state, patterns)
    fold(state)
    predictor = {}
    for i, token in enumerate(state.pop("mask_tokens", [])):
        predictor[f"mask_tokens.{i}"] = token
    for name in [name for name in state if name.startswith("predictor_")]:
        predictor[name] = state.pop(name)
    if "images" in config:
        with naming(path, family):
            fold_cls(state)
    return family, state, predictor, config


def hf_config(kind, hf):
    """Our config of transformers'."""
    _, _, entries, config = HF[kind]
    config = config | dict(zip(entries, pick(hf, *entries.values()))) | IMAGENET
    config["act"] = HF_ACTS.get(str(config["act"]), config["act"])
    check_config(config)
    ratio = hf.get("mlp_ratio", 4)
    config["mlp"] = hf.get("intermediate_size", 0) or round(config["width"] * ratio)
    config["model"] = size_name(config["width"], config["depth"])
    config["predictor_heads"] = hf.get("pred_num_attention_heads")
    if kind == "videomae":
        config["final_norm"] = not pick(hf, "use_mean_pooling")[0]
    return config


def run_part(folder, part):
    """The state of one module of the objective, from a run's newest whole checkpoint; {} if it has
    none of this name."""
    found = newest(folder)
    state = {}
    for name, value in CheckpointReader(found).read_metadata().state_dict_metadata.items():
        if name.startswith(f"model.{part}."):
            state[name.removeprefix(f"model.{part}.")] = torch.empty(value.size)
    read_checkpoint({"model": {part: state}}, found)
    return state


# what neither transformers nor Meta's code has, unless it says so
PLAIN = dict(images=False, cls=False, stills=False, highpass=0.0, rope_scaled=0)


def check_has(config, wanted, whose):
    """ValueError: the first entry of an encoder's config that is not as wanted."""
    for entry, value in wanted.items():
        if config[entry] != value:
            raise ValueError(
                f"{whose} has {entry} {value}, and this was trained with {config[entry]}")


def hf_kind(config):
    """The row of HF that has an encoder of this config. ValueError: none has."""
    images = "dinov2" if config["cls"] else "ijepa"
    kind = {"rope": "vjepa2", "sinusoid1d": "videomae", "learned": images}.get(config["pos"])
    if kind is None:
        raise ValueError(f"transformers has no model with {config['pos']} positions")
    check_has(config, PLAIN | HF[kind][3], HF[kind][0])
    return kind


def hf_state(kind, encoder, predictor):
    """Their names and tensors: q, k and v apart, CLS's position 0, layer scales of 1."""
    ours = {}
    for name, value in (encoder.state_dict() | predictor).items():
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                ours[name.replace("qkv", part)] = rows
        elif not name.startswith(("level_norms.", "mask_tokens.")):
            ours[name] = value
    if predictor:
        tokens = [value for name, value in predictor.items() if name.startswith("mask_tokens.")]
        ours["mask_tokens"] = torch.stack(tokens)
    if encoder.images:
        ours["patch_embed.proj.weight"] = ours["patch_embed.proj.weight"][:, :, 0]
    if kind == "dinov2":
        ours["pos_embed"] = F.pad(ours["pos_embed"], (0, 0, 1, 0))
        ours["mask_token"] = torch.zeros(1, encoder.width)
    for i in range(encoder.depth):
        if kind == "dinov2":
            for scale in (1, 2):
                ours[f"blocks.{i}.ls{scale}.gamma"] = torch.ones(encoder.width)
        elif kind == "videomae":
            # it adds the same to a token's scores for all others: softmax ignores it
            del ours[f"blocks.{i}.attn.key.bias"]
    state = {}
    for name, value in ours.items():
        for here, there in HF[kind][1].items():
            name = re.sub(rf"(^|(?<=\.)){re.escape(here)}", there, name)
        state[name] = value.cpu().float().contiguous()
    return state


def ratio(mlp, width):
    """A whole number where it is one: Dinov2Config takes no other."""
    return mlp / width if mlp % width else mlp // width


def save_hf(folder, encoder, predictor=None, about={}):
    """Write an encoder (ViT) as a folder that transformers loads: config.json, model.safetensors,
    and README.md, a card with what `about` says of it. predictor: V-JEPA's. ValueError names what
    transformers has no model for."""
    config = encoder.config
    kind = hf_kind(config)
    model_class, _, entries, _ = HF[kind]
    hf = {"model_type": kind, "architectures": [model_class], "dtype": "float32",
          "intermediate_size": config["mlp"], "mlp_ratio": ratio(config["mlp"], config["width"]),
          "use_mean_pooling": not config["final_norm"], "layerscale_value": 1.0}
    hf |= {theirs: config[ours] for ours, theirs in entries.items()}
    if config["act"] == "gelu_tanh":
        hf["hidden_act"] = "gelu_pytorch_tanh"
    state = predictor.state_dict() if predictor is not None and kind == "vjepa2" else {}
    if {"predictor_embed.0.weight", "predictor_proj_context.weight"} & state.keys():
        say(f"note: without a predictor: {model_class}'s has one level, and none for the context")
        state = {}
    if kind == "vjepa2":
        hf["pred_num_hidden_layers"] = 0
        if state:
            hf |= {"pred_hidden_size": predictor.width, "pred_num_attention_heads": predictor.heads,
                   "pred_num_hidden_layers": len(predictor.predictor_blocks),
                   "pred_mlp_ratio": ratio(predictor.mlp, predictor.width),
                   "pred_num_mask_tokens": len(predictor.mask_tokens)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temp:
        save_file(hf_state(kind, encoder, state), temp, metadata={"format": "pt"})
    write(folder / "config.json", json.dumps(hf, indent=1))
    write(folder / "README.md", card(model_class, config | about))


def card(model_class, about):
    """A model card: how to load it, and a table of what is known."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    return f"""---
library_name: transformers
tags: [video, self-supervised]
---
# {about.get("model") or "encoder"}

`transformers.{model_class}.from_pretrained(FOLDER)`; pixels in [0,1], minus `mean`, over `std`.
The `last_hidden_state` of a clip is what the encoder gave where it was trained.

| | |
|---|---|
{rows}
"""


def save_meta(path, encoder, predictor=None):
    """Write V-JEPA 1's, 2's or 2.1's layout, by the encoder's positions and levels: a .pt that
    their code and load_encoder read. ValueError: what would be read as something else."""
    config = encoder.config
    if config["images"] or config["pos"] not in ("rope", "sincos"):
        raise ValueError(f"Meta's V-JEPA has no {config['pos']} positions, nor single frames")
    last = "norm." if config["levels"] == 1 else "norms_block.3."
    file = {"target_encoder": {}, "predictor": {}}
    for state, module in zip(file.values(), (encoder, predictor)):
        if module is None:
            continue
        if config["pos"] == "sincos":
            name = "pos_embed" if module is encoder else "predictor_pos_embed"
            state[name] = sincos_table(module.width, encoder.grid)[None]
        for name, value in module.state_dict().items():
            name = re.sub(r"^norm\.", last, name.replace("level_norms", "norms_block"))
            state[name] = value.cpu()
    copies = [dict(state) for state in file.values()]
    read = vjepa_config(*copies, config["levels"] > 1, config["pos"], config)
    said = PLAIN | dict(rope_quirk=False, levels=1) | read
    names = (*PLAIN, "heads", "levels", "rope_quirk")
    check_has(config, {name: said[name] for name in names}, "Meta's V-JEPA")
    heads = said["predictor_heads"]
    if predictor is not None and predictor.heads != heads:
        say(f"note: without a predictor: it would be read with {heads} heads, not "
            f"{predictor.heads}; load_encoder wants pos={config['pos']!r}")
        file["predictor"] = {}
    file["encoder"] = file["target_encoder"]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temp:
        torch.save(file, temp)


def export_main():
    """python model.py export RUN --to hf|meta: a run, or any weight file, for other programs."""
    parser = argparse.ArgumentParser(prog="model.py", description=export_main.__doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", help="the folder of a run, or a weight file")
    parser.add_argument("--to", choices=["hf", "meta"], required=True)
    parser.add_argument("--out", default="", help="a folder, or a .pt; beside the run")
    args = parser.parse_args()
    run = Path(args.run)
    beside = run if run.is_dir() else run.parent
    out = Path(args.out or beside / {"hf": "hf", "meta": "vjepa.pt"}[args.to])
    try:
        encoder, config = load_encoder(args.run)
        try:
            predictor = load_predictor(args.run)[0]
        except ValueError as error:
            say(f"note: without a predictor: {error}")
            predictor = None
        if args.to == "meta":
            save_meta(out, encoder, predictor)
        else:
            log = run / "log.jsonl"
            for line in log.read_text().splitlines()[1:] if log.exists() else ():
                config |= json.loads(line)
            encoder.save_hf(out, predictor, config)
    except (OSError, ValueError) as error:
        leave(error, 2)
    print(json.dumps({"out": str(out), "params": count(encoder)}))


FOURDS_NAMES = {
    "/": ".",
    r"\.(kernel|scale)$": ".weight",
    r"^(.*\.)?patch_embedding\.Conv_0\.": "patch_embed.proj.",
    r"^(.*\.)?posenc\.embeddings$": "pos_embed",
    r"^(.*\.)?processor\.layers_(\d+)\.": r"blocks.\2.",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.attention\.out\.": ".attn.proj.",
    r"\.attention\.": ".attn.",
    r"\.dense_in\.": ".fc1.",
    r"\.dense_out\.": ".fc2.",
}
# flax kernels are (in, out): their axes, a letter for each size (H heads of d channels), and how
# they become ours
FOURDS_AXES = {
    r"patch_embed\.proj\.weight": ("appcD", lambda kernel: kernel.permute(4, 3, 0, 1, 2)),
    r"pos_embed": ("tssD", lambda table: table.flatten(0, 2)[None]),
    r"attn\.(query|key|value)\.weight": ("DHd", lambda kernel: kernel.flatten(1).T),
    r"attn\.(query|key|value)\.bias": ("Hd", torch.flatten),
    r"attn\.proj\.weight": ("HdD", lambda kernel: kernel.flatten(0, 1).T),
    r"mlp\.fc1\.weight": ("DF", torch.t),
    r"mlp\.fc2\.weight": ("FD", torch.t),
}


def readout_layer(depth, share=0.95):
    """Blocks to run before 4DS's features are read (section 4.1: 95 %, which is 60 of 64; 75 % for
    frozen classification). Never the last one: there the context has no gradient. (The official
    code reads int((depth + 1) * 0.95) - 1: 21 of 24, 59 of 64.)"""
    return max(1, min(int(share * depth), depth - 1))


def from_4ds(file):
    """4DS: flat flax keys. What precedes the encoder's three parts differs between files; what lies
    outside them is a readout or a decoder."""
    inside = re.compile(r"(.*/)?(patch_embedding|posenc|processor)/")
    file = {name: value for name, value in file.items() if inside.match(name)}
    state = rename(file, FOURDS_NAMES)
    pick(state, "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.query.weight",
         "blocks.0.mlp.fc1.weight")
    size = {}
    for pattern, (axes, convert) in FOURDS_AXES.items():
        for name in [name for name in state if re.search(rf"(^|\.){pattern}$", name)]:
            shape = tuple(state[name].shape)
            # the first array with an axis says its size
            want = tuple(size.setdefault(axis, n) for axis, n in zip(axes, shape))
            if shape != want or len(want) != len(axes):
                known = tuple(size.get(axis, axis) for axis in axes)
                raise ValueError(f"wrong shape {name} {shape} instead of {known}")
            state[name] = convert(state[name]).contiguous()
    fuse_qkv(state)
    config = shapes_config(state)
    config.update(
        pos="learned", heads=size["H"], final_norm=False, act="gelu_tanh", mean=[0.0] * 3,
        std=[1.0] * 3, frames=size["t"] * size["a"], size=size["s"] * size["p"],
        layer=readout_layer(config["depth"]), layer_classify=readout_layer(config["depth"], 0.75),
    )
    return "4DS", state, {}, config


if __name__ == "__main__":
    export_main()
