"""Video in, training batches out: lists, decoding, sampling, augmentation, masks, and a built-in world.

    python data.py index kinetics|ssv2|ucf|folders ROOT --out train.txt      # make a list of 'path label' rows from a dataset as downloaded
    python data.py index scannet|davis|sintel|... ROOT --out train.txt       # the same for depth, masks, flow ...: clips with their dense labels
    python data.py check train.txt                                           # read every file, report what is wrong with which
    python data.py pack train.txt packed/ --short_side 256 --fps 7.5         # re-encode for speed (10x and more), originals untouched

Sample g of a run (g counts clips from the first step on) is a pure function of (seed, g): which video, which frames, which crop, flipped or not,
and what replaces a damaged video. Ranks and workers only divide the g among themselves, so a run reads the same clips on any machine.

Letters: B clips, T frames, H,W pixels; t,h,w token grid, N = t*h*w; K kept tokens, M predicted; token id = (ti*h + hi)*w + wi.
"""
import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

VIDEOS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".gif", ".ts", ".flv", ".wmv", ".3gp"}
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # read as a video of one frame, and repeated into a still clip
ATTEMPTS = 20  # so many damaged videos in a row end the run: at 10 % damage that never happens by chance (1e-20)


TOLD = set()  # bad videos that this process has named: each once


class DataError(ValueError):
    """What the user must fix, in one line. Scripts print it and exit with status 2 before any work is done."""


# --- lists ------------------------------------------------------------------------------------------------------------------------------

@dataclass
class Source:
    """One list. `labels` is int64, -1 where a row has none. The built-in world has labels and no paths."""
    name: str
    paths: list
    labels: np.ndarray
    weight: float | None = None  # share of the samples drawn from it; None: in proportion to its length
    split: str = ""  # which clips of the built-in world; "" for files

    def __len__(self):
        return len(self.labels)


def parse_list(spec, split="train", labelled=False, classes=None):
    """Read `spec` = PATH or PATH:WEIGHT and check every row before any model is built.

    PATH is a text file of rows `path label` (the label, an integer from 0, is what follows the last blank; without one the row is unlabelled), or
    a comma-separated file whose header names the columns `path` and, if labelled, `label`, or a folder (each sub-folder a class; if there are
    none, unlabelled), or the word "world" (its clips of this `split`). Relative paths start at the list's folder and stay inside it.
    labelled=True refuses unlabelled rows; classes=C refuses labels outside 0..C-1. Raises DataError, as `file:line: what is wrong`.
    """
    name, colon, tail = str(spec).rpartition(":")
    weight = None
    if colon and not os.path.exists(spec):
        try:
            weight = float(tail)
        except ValueError:
            raise DataError(f"{spec}: no such file or folder (a weight, as in LIST:0.5, must be a number)") from None
        if not 0 < weight < math.inf:
            raise DataError(f"{spec}: the weight must be a positive number, not {tail}")
    else:
        name = str(spec)
    if name == "world":
        return Source("world", [], np.asarray(World(split).labels, dtype=np.int64), weight, split)

    rows = list(folder_rows(name) if os.path.isdir(name) else file_rows(name))
    if not rows:
        raise DataError(f"{name}: the list is empty")
    listings, labels = {}, np.full(len(rows), -1, dtype=np.int64)  # one directory listing each is far cheaper than one stat per file
    for i, (where, path, label) in enumerate(rows):
        folder, base = os.path.split(path)
        if folder not in listings:
            listings[folder] = {e.name for e in os.scandir(folder) if e.is_file()} if os.path.isdir(folder) else set()
        if base not in listings[folder]:
            if os.path.isdir(path):
                raise DataError(f"{where}: {path!r} is a directory, not a video")
            raise DataError(f"{where}: no file {path!r} (a row is 'path label' with an integer label; comma-separated files need a header "
                            "with 'path')")
        if label is None:
            if labelled:
                raise DataError(f"{where}: no label, and this task needs one (a row is 'path label')")
            continue
        if label < 0 or (classes and label >= classes) or label >= 2**31:
            raise DataError(f"{where}: label {label} is out of range (labels run from 0 to {classes - 1 if classes else 'the last class'})")
        labels[i] = label
    return Source(name, [path for _, path, _ in rows], labels, weight)


def file_rows(name):
    """Yield (`file:line`, absolute path, label or None) of a list file."""
    try:
        text = Path(name).read_bytes().decode("utf-8-sig")  # -sig: a byte order mark is not part of the first path
    except UnicodeDecodeError:
        raise DataError(f"{name}: not a text file in UTF-8; a list has rows of 'path label'") from None
    except OSError as error:
        raise DataError(f"{name}: cannot read the list ({error.strerror})") from None
    root = os.path.dirname(os.path.abspath(name))
    lines = text.split("\n")  # not splitlines(), which also splits at characters that may stand in a file name
    header = [column.strip().lower() for column in next(csv.reader(lines[:1]), [])]
    if "youtube_id" in header or text.lstrip()[:1] in ("[", "{"):
        layout = "kinetics" if "youtube_id" in header else "ssv2"
        raise DataError(f"{name}: an annotation file, not a list; make one with: python data.py index {layout} ROOT --annotations {name}")
    if "path" in header:
        reader = csv.DictReader((line.rstrip("\r") for line in lines[1:]), fieldnames=header)
        found = ((reader.line_num + 1, row["path"] or "", row.get("label")) for row in reader)
    else:
        found = ((n, *split_row(line)) for n, line in enumerate(lines, 1) if line.strip())
    for n, path, label in found:
        where = f"{name}:{n}"
        if "://" in path:
            raise DataError(f"{where}: {path!r} is a URL; download it first")
        full = os.path.normpath(os.path.join(root, path.strip()))
        if not path.strip() or "\0" in path:
            raise DataError(f"{where}: no path in this row")
        if not os.path.isabs(path) and not full.startswith(root.rstrip("/") + "/"):
            raise DataError(f"{where}: {path!r} leads out of the list's folder; write it as an absolute path if that is meant")
        try:
            yield where, full, int(label) if label not in (None, "") else None
        except ValueError:
            raise DataError(f"{where}: label {label!r} is not an integer from 0 up") from None


def split_row(line):
    """'a b.mp4 3' -> ('a b.mp4', '3'); 'a b.mp4' -> ('a b.mp4', None): only an integer can be a label, so names may hold blanks and commas."""
    path, *label = line.strip().rsplit(None, 1)
    return (path, label[0]) if label and label[0].lstrip("+-").isdigit() else (line.strip(), None)


def folder_rows(name):
    """The same for a folder of videos: with sub-folders, each is a class, numbered in the order of their names."""
    root = Path(os.path.abspath(name))
    groups = sorted(p for p in root.iterdir() if p.is_dir() and media(p))
    if not groups:
        return [(name, str(path), None) for path in media(root)]
    return [(f"{name}/{group.name}", str(path), label) for label, group in enumerate(groups) for path in media(group)]


def media(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in VIDEOS | IMAGES and p.is_file())


# --- decoding ---------------------------------------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """How clips are cut from videos. Frames are `stride` apart, or 1/`fps` seconds apart when `fps` is given (then by time stamps, so that lists
    of different frame rates, and packed ones, mix)."""
    frames: int = 16
    stride: int = 4
    fps: float | None = None
    size: int = 224  # pixels of the square the model sees
    scale: tuple = (0.3, 1.0)  # area of the random crop, as a share of the frame
    ratio: tuple = (0.75, 1.35)  # its width / height, log-uniform
    zoom: float = 0.0  # > 0: instead, a square anywhere, as large as the short side / zoom (4DS: 1.15)
    flip: bool = True
    train: bool = True  # False: no randomness; clips centred in `segments` equal parts of the video, crops as `views` says
    short: str = "repeat"  # a video shorter than the clip: "repeat" its last frame, "loop" it, "spread" the clip's frames evenly over it, or "error" (treated as damaged)
    clips: int = 1  # training: so many random clips from each opened video, decoded in one pass
    segments: int = 1  # evaluation: clips per video, spread over its length
    views: int = 1  # evaluation: 1 = centre square of 224/256 of the short side; 3 = the whole short side at left, centre, right

    def __post_init__(self):
        for name in ("frames", "stride", "size", "clips", "segments", "views"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise DataError(f"fps must be a positive number, not {self.fps}")
        if not (self.zoom == 0 or 1 <= self.zoom < math.inf):
            raise DataError(f"zoom must be 0 or at least 1, not {self.zoom}")
        if self.short not in ("repeat", "loop", "spread", "error"):
            raise DataError(f"short must be repeat, loop, spread or error, not {self.short!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"crop scale {self.scale} must rise inside (0, 1], ratio {self.ratio} must rise and be positive")


def import_torchcodec():
    """Imported late: the built-in world needs neither torchcodec nor FFmpeg."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError("reading video needs torchcodec and FFmpeg 4 to 8: `pip install -r requirements.txt` and `apt-get install -y ffmpeg` "
                        f"({reason(error)[:80]}); the built-in world needs neither") from None
    return torchcodec.decoders


def open_video(path):
    """A decoder of `path`, frames uint8 (H,W,3). Exact seeking: packets are scanned once (0.5 ms for 10 s), so frame i is frame i also where the
    header lies about the count or the frame rate varies. Opened where it is used: a decoder must not cross a fork or be shared by threads."""
    still = Path(path).suffix.lower() in IMAGES
    source = Path(path).read_bytes() if still else path  # FFmpeg cannot go back to the start of a jpg by name, of its bytes it can
    return import_torchcodec().VideoDecoder(source, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)


def frame_positions(length, clip, u=0.5, segment=0, tick=1, step=None):
    """Where the T frames of one clip lie in a video of `length`, both in frames, or in seconds when `step` and `tick` (the time between two frames
    of the clip, and of the video) are given. `u` in [0, 1) places the clip in its segment; 0.5 centres it. Applies the short-clip policy."""
    whole, step = step is None, step or clip.stride
    span = (clip.frames - 1) * step + tick
    room = length / clip.segments - span
    start = segment * length / clip.segments + ((room + whole) * u if room >= 0 else room / 2)  # + 1: every whole start is equally likely
    start = min(max(start, 0), max(length - span, 0))
    at = (int(start) if whole else start) + np.arange(clip.frames) * step
    if clip.short == "loop":
        return at % length
    if clip.short == "spread" and span > length:
        at = np.linspace(0, length - tick, clip.frames)
        return np.round(at).astype(int) if whole else at
    if clip.short == "error" and span > length * (1 + 1e-6):
        raise ValueError(f"the video is shorter than the clip: {length:.6g} {'frames' if whole else 'seconds'} of {span:.6g}")
    return np.minimum(at, length - tick)


def random_box(rng, height, width, scale, ratio):
    """(top, left, height, width) of a random resized crop: ten tries at an area and a log-uniform aspect, else the largest centred box."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def random_square(rng, height, width, zoom):
    """The same for a square whose side is the short side / zoom."""
    side = max(round(min(height, width) / zoom), 1)
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side


def view_box(height, width, view, views):
    """The square of evaluation view `view`: what resizing the short side to 256 and cropping 224 leaves, but in one interpolation."""
    side = max(round(min(height, width) * 224 / 256), 1) if views == 1 else min(height, width)
    share = 0.5 if views == 1 else view / (views - 1)
    along, across = round((max(height, width) - side) * share), (min(height, width) - side) // 2
    return (across, along, side, side) if width >= height else (along, across, side, side)


def crop_resize(frames, box, size):
    """uint8 (n,H,W,3) -> (n,size,size,3), the same box for all. Bilinear with antialiasing, in uint8, which torch does fast in channels-last."""
    top, left, h, w = box
    x = frames[:, top : top + h, left : left + w].permute(0, 3, 1, 2)
    if (h, w) != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1)


def read_clips(path, clip, rngs=(None,), names=()):
    """Decode clips of one video in one pass -> uint8 (rngs * segments * views, T, size, size, 3). Each rng of `rngs` gives a random start in each
    segment and one box; None gives the evaluation clips. Geometry is as a player shows it: turned by the container's matrix, pixels made square.
    names: also dense labels, which are cut like the frames -> (video, a dict for each clip).
    Raises RuntimeError, ValueError, IndexError or AssertionError (DAMAGE) for a damaged video.

    Whole frames are decoded and then cut and resized: the decoder's own crop and resize are slower, 131 against 120 ms for 16 frames of 640x360.
    The frames of all clips are asked for at once: the decoder sorts them, so what clips share, key frames included, is decoded once.
    """
    starts = [[0.5 if rng is None else rng.random() for _ in range(clip.segments)] for rng in rngs]
    for lost in (0, 1):  # an AVI file with B-frames announces one frame more than it holds: if the last frame fails, do without it
        video = open_video(path)
        meta, length = video.metadata, max(len(video) - lost, 1)
        tick = (meta.end_stream_seconds - meta.begin_stream_seconds) / len(video)
        where = dict(length=length, tick=1)
        if clip.fps and tick > 0:
            where = dict(length=length * tick, tick=tick, step=1 / clip.fps)
        cut = replace(clip, short="repeat") if Path(path).suffix.lower() in IMAGES else clip  # an image is a still clip, not a short one
        at = np.stack([frame_positions(clip=cut, u=u, segment=s, **where) for us in starts for s, u in enumerate(us)])
        try:
            if "step" in where:  # 1 ms late: a time that falls on a frame's start must not slip into the frame before (mkv rounds stamps to 1 ms)
                seconds = np.minimum(meta.begin_stream_seconds + at + 0.001, meta.end_stream_seconds - lost * tick - 1e-4)
                frames = video.get_frames_played_at(seconds.ravel().tolist()).data
            else:
                frames = video.get_frames_at(at.ravel().tolist()).data
            break
        except RuntimeError:
            if lost or at.max() < where["length"] - where["tick"] - 1e-9:
                raise
    height, width = frames.shape[1:3]
    square = float(meta.pixel_aspect_ratio or 1) ** (-1 if meta.rotation and meta.rotation % 180 else 1)
    square = square if 0.25 <= square <= 4 else 1.0  # beyond that the header is nonsense
    shown, out, labels = (height, max(round(width * square), 1)), [], []
    at = at.reshape(len(rngs), clip.segments, clip.frames)
    for rng, segments, ids in zip(rngs, frames.unflatten(0, at.shape), at):
        boxes = [view_box(*shown, v, clip.views) if rng is None else random_square(rng, *shown, clip.zoom) if clip.zoom
                 else random_box(rng, *shown, clip.scale, clip.ratio) for v in range(clip.views)]
        boxes = [(top, min(round(left / square), width - 1), h, max(round(w / square), 1)) for top, left, h, w in boxes]
        out += [crop_resize(segment, box, clip.size) for segment in segments for box in boxes]
        labels += [read_labels(path, names, i, box, clip.size, (len(video), height, width)) for i in ids for box in boxes] if names else []
    video = torch.stack(out) if len(out) > 1 else out[0][None]  # a copy of a clip costs as much as its resize
    return (video, labels) if names else video


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
        raise DataError(f"{path}: no dense labels (no file {beside}); `python data.py index LAYOUT ROOT` makes them")
    with safe_open(beside, "pt") as file:
        has = set(file.keys())
        for name in dict.fromkeys([*names, *(SEEN[n] for n in names if n in SEEN)]):
            if name not in has:
                if name in SEEN:
                    continue
                raise DataError(f"{beside}: no label {name!r}; it has {', '.join(sorted(has))}")
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
                value = crop_resize(value, box, size)
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
        raise DataError("dense labels are those of frames: give stride, not fps, and with flow stride 1")
    return eval_batches(source, replace(clip, flip=False), batch_size=batch_size, workers=workers, rank=rank, ranks=ranks, rows=rows, seed=seed,
                        timeout=timeout, names=names)


# --- the plan and the loader ------------------------------------------------------------------------------------------------------------

DAMAGE = (RuntimeError, ValueError, IndexError, AssertionError, OSError, SafetensorError)  # what torchcodec, FFmpeg and safetensors raise on bad files
ORDER, MIX, REPLACE, AUGMENT = range(4)  # random streams: default_rng([seed, stream, ...]) never meets another's numbers; train_tdv.py has 4 and 5
BLOCK = 1024  # weighted sources are mixed in exact proportion (rounded to 1/1024) in every block of so many draws


@lru_cache(maxsize=32)  # this and the next epoch of up to 15 sources
def shuffled(n, *key):
    return np.random.default_rng(key).permutation(n)


class Plan:
    """Which row is read at draw v: a pure function of (seed, v). Rows are numbered through all sources. Each source, or without weights the
    concatenation of all, is walked in epochs: every row once in a shuffled order, then a new order."""

    def __init__(self, sources, seed):
        self.seed, self.offsets = seed, np.cumsum([0] + [len(s) for s in sources])
        weighted = any(s.weight is not None for s in sources)
        self.groups = list(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist())) if weighted else [(0, int(self.offsets[-1]))]
        quota = np.array([1.0 if s.weight is None else s.weight for s in sources] if weighted else [1.0])
        quota *= BLOCK / quota.sum()
        self.counts = np.floor(quota).astype(int)
        self.counts[np.argsort(self.counts - quota, kind="stable")[: BLOCK - self.counts.sum()]] += 1
        if self.counts.min() == 0:
            raise DataError(f"{sources[self.counts.argmin()].name}: its weight is under 1/{BLOCK} of all weights together")

    def row(self, v, attempt=0):
        """The row of draw v, or of its attempt-th replacement: another row of the same source."""
        block, place = divmod(v, BLOCK)
        mix = np.repeat(np.arange(len(self.groups)), self.counts)[shuffled(BLOCK, self.seed, MIX, block)]
        group = mix[place]
        start, stop = self.groups[group]
        if attempt:
            return start + int(np.random.default_rng([self.seed, REPLACE, v, attempt]).integers(stop - start))
        epoch, i = divmod(block * int(self.counts[group]) + int((mix[:place] == group).sum()), stop - start)
        return start + int(shuffled(stop - start, self.seed, ORDER, group, epoch)[i])


class Clips(torch.utils.data.Dataset):
    """What a worker does: `dataset.__getitems__(numbers)` is one micro-batch. numbers: sample numbers g when there is a plan, else rows."""

    def __init__(self, sources, clip, seed, plan=None, names=()):
        if any(s.paths for s in sources):
            import_torchcodec()  # a machine without FFmpeg is told so before any work
        self.sources, self.clip, self.seed, self.plan, self.names = sources, clip, seed, plan, tuple(names)
        self.offsets = np.cumsum([0] + [len(s) for s in sources])
        self.worlds = [None if s.paths else World(s.split, frames=clip.frames, size=clip.size) for s in sources]

    def __getitems__(self, numbers):
        try:
            return self.batch(numbers)
        except DataError as error:
            return error  # as a value: raised in a worker it would reach the user inside two tracebacks

    def batch(self, numbers):
        clip, numbers = self.clip, list(numbers)
        per = clip.clips if self.plan else 1  # numbers that share a video
        many = per * clip.segments * clip.views  # clips read from it
        video = torch.zeros(len(numbers) // per * many, clip.frames, clip.size, clip.size, 3, dtype=torch.uint8)
        flip, label = torch.zeros(len(video), dtype=torch.bool), torch.full((len(numbers),), -1)
        ok, names, bad, rendered, dense = torch.ones(len(numbers), dtype=torch.bool), [], [], {}, [{}] * len(video)
        for i in range(0, len(numbers), per):
            here = slice(i // per * many, (i // per + 1) * many)
            for attempt in range(ATTEMPTS if self.plan else 1):
                row = self.plan.row(numbers[i] // per, attempt) if self.plan else int(numbers[i])
                s = int(np.searchsorted(self.offsets, row, side="right")) - 1
                source, row = self.sources[s], row - int(self.offsets[s])
                rngs = [np.random.default_rng([self.seed, AUGMENT, n, attempt]) if clip.train else None for n in numbers[i : i + per]]
                label[i : i + per] = int(source.labels[row])
                if not source.paths:  # not cropped and not flipped: left and right are two of its classes
                    rendered.setdefault(s, []).append((here, row))
                    break
                flip[here] = torch.tensor([clip.train and clip.flip and rng.random() < 0.5 for rng in rngs]).repeat_interleave(many // per)
                try:
                    if self.names:
                        video[here], dense[here] = read_clips(source.paths[row], clip, rngs, self.names)
                    else:
                        video[here] = read_clips(source.paths[row], clip, rngs)
                    break
                except DataError:
                    raise
                except DAMAGE as error:
                    bad.append((source.paths[row], reason(error)))
            else:
                ok[i] = False
                if self.plan:
                    raise DataError(f"{ATTEMPTS} videos in a row cannot be read, the last one {bad[-1][0]}: {bad[-1][1]}")
            names += [source.paths[row] if source.paths else f"world/{source.split}/{row}"] * per
        for s, rows in rendered.items():  # the world is rendered a batch at a time, which is many times faster than clip by clip
            made = self.worlds[s].render([row for _, row in rows], self.names)
            for i, (here, _) in enumerate(rows):
                video[here], dense[here] = made["video"][i], [{name: made[name][i] for name in self.names}] * many
        batch = {"video": video, "flip": flip, "label": label, "index": torch.tensor(numbers), "path": names, "ok": ok, "bad": bad}
        return batch | {name: stack([labels.get(name) for labels in dense]) for name in self.names}


def reason(error):
    """One line: the text of a torchcodec error without the place in its source code."""
    text = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", " ".join(str(error).split()) or type(error).__name__)
    return "no video stream" if "best video stream is unknown" in text else text[:200]


def make_loader(sources, clip, *, seed, batch_size, micro_batch, rank=0, ranks=1, workers=0, start_step=0, steps, timeout=600):
    """The micro-batches of `rank` for the steps start_step to steps - 1: batch_size / ranks / micro_batch of them a step, in order.

    Step s holds the samples g = s * batch_size ... (s+1) * batch_size - 1; rank r takes the r-th of `ranks` equal parts. A batch is a dict:
    video uint8 (b,T,H,W,3), flip bool (b,) (done by prepare), label int64 (b,) (of the clip as stored: flipping may turn left into right),
    index int64 (b,) = g, path of each clip, bad = [(path, reason)] of the videos that could not be read and were replaced (named on stderr, once).
    A worker that is silent for `timeout` seconds, or dies, raises RuntimeError (see dead_worker).
    """
    if batch_size < 1 or micro_batch < 1 or batch_size % (ranks * micro_batch):
        raise DataError(f"batch_size {batch_size} must be a positive multiple of ranks {ranks} x micro_batch {micro_batch}")
    if micro_batch % clip.clips:
        raise DataError(f"micro_batch {micro_batch} must be a multiple of the {clip.clips} clips read from each video")
    if clip.clips > 1 and not all(s.paths for s in sources):
        raise DataError("several clips per video need video files; the built-in world renders every clip anew")
    if not clip.train or clip.segments * clip.views > 1:
        raise DataError("training takes random clips: train=True, segments=1, views=1")
    dataset = Clips(sources, clip, seed, Plan(sources, seed))
    first = (s * batch_size + rank * batch_size // ranks for s in range(start_step, steps))
    return stream(dataset, (range(a, a + micro_batch) for f in first for a in range(f, f + batch_size // ranks, micro_batch)), workers, timeout)


def eval_batches(source, clip, *, batch_size, workers=0, rank=0, ranks=1, rows=None, seed=0, timeout=600, names=()):
    """Batches over the rows of one source, each row once and in order (`rows` picks and orders them; rank r takes rows[r::ranks]).

    As make_loader's, but video is (b * segments * views, T,H,W,3), videos outermost, flip likewise; index is the row; ok bool (b,) is False, and the
    video black, where it cannot be read. clip.train=True: random starts (one in each segment), box and flip, a function of (seed, row).
    names: dense labels, for which dense_batches is the door.
    """
    rows = np.arange(len(source)) if rows is None else np.asarray(rows)
    rows = rows[rank::ranks].tolist()
    return stream(Clips([source], clip, seed, names=names), (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)), workers, timeout)


def labelled_features(read, source, clip, device, *, workers=0, rank=0, ranks=1, gather=lambda value: [value], timeout=600, **pixels):
    """read(x) -> (b, D) over all rows of a source, shared among the ranks -> features (n, D), label (n,), ok (n,), in list order and on every rank.
    gather(value): the values of all ranks. pixels: prepare's mean and std."""
    padded = np.resize(np.arange(len(source)), -(-len(source) // ranks) * ranks)  # as many batches on every rank
    batches = eval_batches(source, clip, rows=padded, batch_size=64, workers=workers, rank=rank, ranks=ranks, timeout=timeout)
    rows = [(read(prepare(b, device, **pixels)).float().cpu(), b["label"], b["ok"], b["index"]) for b in batches]
    *values, index = (torch.cat(r) for r in zip(*(row for part in gather(rows) for row in part)))
    order = torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])
    return [v[order] for v in values]


def as_it_is(batch):
    return batch


def stream(dataset, batches, workers, timeout):
    # Its own generator: the loader's base seed must not come from, and so advance, torch's global random state.
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=as_it_is,
                                         timeout=timeout if workers else 0, pin_memory=workers > 0 and torch.cuda.is_available(),
                                         generator=torch.Generator().manual_seed(dataset.seed))
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        for path, why in batch["bad"]:
            if path not in TOLD:
                TOLD.add(path)
                print(f"bad video: {path}: {why}", file=sys.stderr)
        yield batch


def dead_worker(error):
    """One line on a loader process that died or hangs, or None where the error says something else. PyTorch raises it in the main thread wherever that
    happens to be, or else its queue loses the connection; so scripts ask at their outermost level, and then leave."""
    if not (lost := isinstance(error, ConnectionError)) and "DataLoader" not in str(error):
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch's handler raises once more while Python leaves
    text = "its connection was lost" if lost else " ".join(str(error).split())
    return f"a loader process died or hangs ({text}); nothing saved is lost: --resume goes on. Out of memory: fewer --workers"


def prepare(batch, device="cpu", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """uint8 video and flip -> float32 (b,3,T,H,W) on the device, flipped and normalised there: a quarter of the bytes cross the bus."""
    x = batch["video"].to(device, non_blocking=True).permute(0, 4, 1, 2, 3).contiguous()  # permuted while it is bytes: 3x faster than as floats
    which = batch["flip"].nonzero().flatten().to(device, non_blocking=True)  # found on the CPU, so the device is not waited for
    x[which] = x[which].flip(-1)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1, 1) * 255 for v in (mean, std))
    return x.float().sub_(mean).div_(std)


def fingerprint(sources):
    """A hash of what the sources say and of each file's size and time, so that a changed list or a replaced video is noticed."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.weight, source.split, source.paths)).encode() + source.labels.tobytes())
        parts = [source.paths[i : i + 1000] for i in range(0, len(source.paths), 1000)]
        with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many at a time
            for stats in pool.map(lambda part: [(s.st_size, s.st_mtime_ns) for s in map(os.stat, part)], parts):
                digest.update(repr(stats).encode())
    return digest.hexdigest()


def save_png(path, image):
    """Write uint8 (H,W,3)."""
    height, width, _ = image.shape
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = np.pad(np.asarray(image, dtype=np.uint8).reshape(height, -1), ((0, 0), (1, 0)))  # each row starts with its filter: none
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                           + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


# --- masks ----------------------------------------------------------------------------------------
# A mask is `hidden`, bool (B,t,h,w): what the context does not see and the predictor predicts.
# Every clip keeps and hides at least one token.


def clamp(value, low, high):
    return min(max(value, low), high)


def block_shape(rng, grid, scale, time=1.0, aspect=(0.75, 1.5)):
    """(slices, rows, columns) of a block: `scale` of the frame, a share `time` of the slices.

    Its rows / columns are drawn from `aspect`.
    """
    t, h, w = grid
    depth = clamp(int(t * time), 1, t)
    area = int(h * w * scale)
    # a large block of an unlucky shape may cover the frame
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        height = math.sqrt(area * ratio)
        width = math.sqrt(area * (1 / ratio))
        height = clamp(round(height), 1, h)
        width = clamp(round(width), 1, w)
        if (depth, height, width) != (t, h, w):
            return depth, height, width
    raise DataError(f"blocks of {scale} of a {h}x{w} grid leave no context")


def interval(rng, clips, length, part):
    """Bool (clips,length): for each clip `part` neighbours of `length` places, anywhere."""
    start = rng.integers(length - part + 1, size=(clips, 1))
    place = np.arange(length)
    return (start <= place) & (place < start + part)


def multiblock(rng, B, grid, blocks, scale, time=1.0, aspect=(0.75, 1.5)):
    """V-JEPA's masks: the union of `blocks` rectangles, each of the shape block_shape() draws.

    The shape is drawn once for the whole batch (so that lengths vary little), its places for every
    clip; clips without any context are drawn again.
    """
    t, h, w = grid
    depth, height, width = block_shape(rng, grid, scale, time, aspect)
    slices = t
    # through all of time: one slice stands for all of them
    if depth == t:
        slices = depth = 1
    hidden = np.empty((B, slices, h, w), dtype=bool)
    todo = np.arange(B)
    while len(todo):
        n = len(todo)
        new = np.zeros((n, slices, h, w), dtype=bool)
        for _ in range(blocks):
            when = interval(rng, n, slices, depth)                          # (n,slices)
            down = interval(rng, n, h, height)                              # (n,h)
            across = interval(rng, n, w, width)                             # (n,w)
            rectangle = down[:, :, None] & across[:, None]                  # (n,h,w)
            new |= when[:, :, None, None] & rectangle[:, None]
        hidden[todo] = new
        no_context = new.all((1, 2, 3))
        todo = todo[no_context]
    return np.broadcast_to(hidden, (B, t, h, w)).copy()


def random_mask(rng, B, grid, ratio):
    """A share `ratio` of the tokens, chosen at random for each clip."""
    N = math.prod(grid)
    if N < 2:
        raise DataError(f"a mask needs two places to tell apart, and the grid has {N}")
    keys = rng.random((B, N), dtype=np.float32)
    count = clamp(round(N * ratio), 1, N - 1)
    ordered = np.partition(keys, count - 1)
    largest = ordered[:, count - 1, None]                                   # (B,1)
    return (keys <= largest).reshape(B, *grid)


def tube_mask(rng, B, grid, ratio):
    """Random places of the frame, the same in every slice."""
    t, h, w = grid
    hidden = random_mask(rng, B, (1, h, w), ratio)
    return hidden.repeat(t, axis=1)


def causal_mask(rng, B, grid, ratio):
    """The last slices: the context is the beginning of the clip."""
    t = grid[0]
    if t < 2:
        raise DataError("a causal mask needs two slices of time")
    count = clamp(round(t * ratio), 1, t - 1)
    hidden = np.zeros((B, *grid), dtype=bool)
    hidden[:, -count:] = True
    return hidden


MASKS = {"random": random_mask, "tube": tube_mask, "causal": causal_mask}


def fraction(text):
    """A number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def parse_mask(text):
    """A mask's name -> (function, arguments).

    8x0.15      8 blocks of 0.15 of the frame
    2x0.7x0.5   ... through half of the time
    random:0.9, tube:0.9, causal:0.9
    """
    try:
        if ":" in text:
            kind, ratio = text.split(":")
            return MASKS[kind], {"ratio": fraction(ratio)}
        numbers = text.split("x")
        if len(numbers) == 2:
            numbers.append("1")
        blocks, scale, time = numbers
        if int(blocks) < 1:
            raise ValueError
        return multiblock, {
            "blocks": int(blocks),
            "scale": fraction(scale),
            "time": fraction(time),
        }
    except (ValueError, KeyError):
        raise DataError(f"mask {text!r}: write BLOCKSxSCALE, BLOCKSxSCALExTIME, random:RATIO, "
                        "tube:RATIO or causal:RATIO, with numbers in (0, 1]") from None


def sample_masks(specs, seed, step, B, grid, aspect=(0.75, 1.5), trim="random", bucket=1,
                 rows=None, temporal_keep=1.0):
    """The masks of one step: (keep, pred), for each spec an int64 tensor (b,K) and (b,M).

    They hold sorted token ids, for the clips `rows` (a slice) of the global batch of B. K and M are
    the fewest tokens in the whole batch, rounded down to a multiple of `bucket`, so every rank sees
    the same shapes. What is left out to get there is chosen at "random", or, with `trim` "prefix",
    lies last in time (V-JEPA's code).
    temporal_keep < 1: the context lies in this first share of the slices, and all that is not
    context is predicted (FWM-HW-LD's Future-Predictive).
    """
    first, last, _ = (rows or slice(None)).indices(B)
    N = math.prod(grid)
    keep = []
    pred = []
    for i, spec in enumerate(specs):
        function, arguments = parse_mask(spec)
        if function is multiblock:
            arguments["aspect"] = aspect
        rng = np.random.default_rng([seed, step, i])
        hidden = function(rng, B, grid, **arguments).reshape(B, N)
        hidden[:, early_tokens(grid, temporal_keep) :] = True
        unseen = np.count_nonzero(hidden, axis=1)                           # (B,)
        seen = N - unseen
        if not seen.any():
            raise DataError(f"mask {spec!r}: no clip keeps a token in the first {temporal_keep} "
                            "of its slices")
        K = fewest(seen)
        M = fewest(unseen)
        few = (seen < K) | (unseen < M)
        enough = np.flatnonzero(~few)
        hidden[few] = hidden[rng.choice(enough, few.sum())]

        keys = np.broadcast_to(np.arange(N) / N, (last - first, N))
        if trim == "random":
            # a stream of its own, wound on to the first row: a rank draws its own rows' numbers
            bits = np.random.PCG64([seed, step, i, 1])
            bits.advance(first * N)
            keys = np.random.Generator(bits).random(keys.shape)
        hidden = hidden[first:last]
        kept = lowest(~hidden, keys, K, bucket)
        if temporal_keep < 1:
            hidden = np.ones_like(hidden)
            np.put_along_axis(hidden, kept, False, axis=1)
            M = N - kept.shape[1]
        predicted = lowest(hidden, keys, M, bucket)
        keep.append(torch.from_numpy(kept))
        pred.append(torch.from_numpy(predicted))
    return keep, pred


def fewest(counts):
    """The smallest of B counts, as in 24 clips, what V-JEPA has on a GPU.

    Of B clips the B/24 with the fewest tokens do not count (they take the masks of others), or one
    odd clip in thousands would leave all of them next to no context.
    """
    counts = np.sort(counts[counts > 0])
    return int(counts[(len(counts) - 1) // 24])


def lowest(chosen, keys, count, bucket):
    """chosen, keys (b,N) -> sorted ids of the chosen with the lowest keys, `count` of each row."""
    count = count // bucket * bucket or count
    keys = np.where(chosen, keys, 2.0)
    ids = np.argpartition(keys, count - 1)
    return np.sort(ids[:, :count])


def early_tokens(grid, temporal_keep):
    """How many tokens lie in the first share `temporal_keep` of the slices, of one at least."""
    t, h, w = grid
    slices = max(1, int(t * temporal_keep))
    return slices * h * w


# --- dense data sets as downloaded -> clip.mp4 + clip.safetensors ------------------------------------------------------------------------
# One reader for each kind of file: paths of one clip -> array with a row for each.

def png(paths):
    """(n,H,W) or (n,H,W,3), uint8, or uint16 where the files have 16 bits; of palettes the indices. All in one call of FFmpeg, whose decoder is exact."""
    width, height, bits, kind = struct.unpack(">IIBB", Path(paths[0]).read_bytes()[16:26])
    form = "pal8" if kind == 3 else {(True, 8): "gray", (True, 16): "gray16le", (False, 8): "rgb24", (False, 16): "rgb48le"}[kind in (0, 4), max(bits, 8)]
    raw = np.frombuffer(pipe(paths, "-f", "rawvideo", "-pix_fmt", form, "-"), np.uint16 if bits == 16 else np.uint8).reshape(len(paths), -1)
    channels = 3 if form.startswith("rgb") else 1
    return raw[:, : height * width * channels].reshape(len(paths), height, width, *[3] * (channels == 3)).copy()  # after indices stands the palette


def pipe(images, *out):
    """Image files of one kind through FFmpeg."""
    codec = Path(images[0]).suffix.lower()[1:].replace("jpg", "jpeg").replace("jpeg", "mjpeg")
    done = subprocess.run(["ffmpeg", "-v", "error", "-f", "image2pipe", "-framerate", "10", "-c:v", codec, "-i", "-", *out],
                          input=b"".join(Path(p).read_bytes() for p in images), capture_output=True)
    if done.returncode:
        raise ValueError(f"{images[0]}: {done.stderr.decode(errors='replace').strip()[:200]}")
    return done.stdout


def flo(paths):
    """Middlebury's optical flow: the number 202021.25, width, height, then u and v of each pixel."""
    heads = [np.fromfile(p, "<i4", 3) for p in paths]
    return np.stack([np.fromfile(p, "<f4", offset=12).reshape(h, w, 2) for p, (_, w, h) in zip(paths, heads)])


def pfm(paths):
    """Lines 'Pf' (or 'PF': three channels), 'width height', a scale that is negative for little-endian, then rows from the bottom up."""
    out = []
    for p in paths:
        kind, width, height, scale, body = re.match(rb"(P[fF])\s+(\d+)\s+(\d+)\s+(\S+)\s(.*)", Path(p).read_bytes(), re.S).groups()
        out.append(np.frombuffer(body, "<f4" if float(scale) < 0 else ">f4").reshape(int(height), int(width), -1)[::-1].squeeze(-1 if kind == b"Pf" else ()))
    return np.stack(out).astype(np.float32)


def unless(value, unknown):
    """`value` as float32 with NaN where `unknown`, which may have fewer axes."""
    return np.where(unknown.reshape(*unknown.shape, *[1] * (value.ndim - unknown.ndim)), np.nan, value).astype(np.float32)


def known(value):
    return unless(value, value == 0)


def kitti_flow(paths):
    raw = png(paths).astype(np.float32)
    return unless((raw[..., :2] - 2**15) / 64, raw[..., 2] == 0)


def re10k(paths, frames):
    """ID.txt: a URL, then a row for each frame: time stamp, fx, fy, cx, cy (shares of width and height), two zeros, the 3x4 of world to camera."""
    rows = {line.split()[0]: np.array(line.split()[1:], float) for line in Path(paths[0]).read_text().splitlines()[1:] if line.strip()}
    rows = np.stack([rows[p.stem] for p in frames])
    height, width, _ = open_video(frames[0]).get_frame_at(0).data.shape
    (fx, fy, cx, cy), camera = rows[0, :4] * [width, height, width, height], np.tile(np.eye(4), (len(rows), 1, 1))
    camera[:, :3] = rows[:, 6:].reshape(-1, 3, 4)
    return np.linalg.inv(camera), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def by_object(rows, frames, width):
    """rows: (object, number of the frame, values of `width`) -> (frames, objects, width), NaN where there is no row."""
    rows = [(o, int(t), v) for o, t, v in rows if 0 <= int(t) < frames]
    number = {o: i for i, o in enumerate(dict.fromkeys(o for o, _, _ in rows))}
    out = np.full((frames, len(number), width), np.nan, np.float32)
    for o, t, v in rows:
        out[t, number[o]] = v
    return out


@lru_cache(maxsize=2)
def load_json(path):
    return json.loads(Path(path).read_text("utf-8"))


def perception(paths, frames, name):
    """all_train.json: video -> object_tracking and point_tracking, each track of an id, frame_ids and bounding_boxes (x0,y0,x1,y1) or points (y,x), shares."""
    about, video = load_json(str(paths[0]))[frames[0].stem], open_video(str(frames[0]))
    width, height = video.metadata.width, video.metadata.height
    if name == "boxes":
        rows = [(o["id"], t, np.multiply(b, [width, height] * 2)) for o in about["object_tracking"] for t, b in zip(o["frame_ids"], o["bounding_boxes"])]
    else:
        rows = [(o["id"], t, (x * width, y * height)) for o in about["point_tracking"] for t, (y, x) in zip(o["frame_ids"], o["points"])]
    return by_object(rows, len(video), 4 if name == "boxes" else 2)


def waymo(paths, frames):
    """SEGMENT/CAMERA/TIMESTAMP.jpg, and SEGMENT/camera_box.csv: the segment's table camera_box of the v2 release, from parquet to csv."""
    times = {p.stem: t for t, p in enumerate(frames)}
    with open(paths[0], newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["key.camera_name"] == frames[0].parent.name and r["key.frame_timestamp_micros"] in times]
    value = lambda r, sign: [float(r[f"[CameraBoxComponent].box.center.{k}"]) + sign * float(r[f"[CameraBoxComponent].box.size.{k}"]) / 2 for k in "xy"]
    return by_object([(r["key.camera_object_id"], times[r["key.frame_timestamp_micros"]], value(r, -1) + value(r, 1)) for r in rows], len(frames), 4)


def kubric(paths, frames):
    """metadata.json of Kubric's worker: for each instance bbox_frames and bboxes (y0,x0,y1,x1), shares."""
    about = load_json(str(paths[0]))
    height, width = about["metadata"]["resolution"][::-1]
    return by_object([(o, t, np.multiply([x0, y0, x1, y1], [width, height] * 2)) for o, instance in enumerate(about["instances"])
                      for t, (y0, x0, y1, x1) in zip(instance["bbox_frames"], instance["bboxes"])], len(frames), 4)


CITYSCAPES = np.full(256, 255, np.uint8)  # labelId -> one of the 19 classes that are evaluated
CITYSCAPES[[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]] = np.arange(19)

# layout: (frames, as a pattern of paths under the root whose group is the clip, {label: (pattern in the frame's path, its replacement, reader of the paths
# so found, and of the frames)}). A label without any file is left out; where single files are missing, nothing is known. Empty replacement: --annotations
LAYOUTS = {
    "scannet": (r"([^/]+)/color/\d+\.jpg", {  # as exported by SensReader
        "depth": (r"color/(\d+)\.jpg", r"depth/\1.png", lambda p, f: known(png(p) / 1000)),
        "pose": (r"color/(\d+)\.jpg", r"pose/\1.txt", lambda p, f: np.stack([*map(np.loadtxt, p)])),
        "K": (r"color/\d+\.jpg", "intrinsic/intrinsic_color.txt", lambda p, f: np.loadtxt(p[0])[:3, :3])}),
    "re10k": (r"frames/(\w+/[^/]+)/\d+\.\w+", {  # the lists in train/ and test/, frames named by time stamp
        "pose": (r"frames/(\w+/[^/]+)/\d+\.\w+", r"\1.txt", lambda p, f: re10k(p, f)[0]),
        "K": (r"frames/(\w+/[^/]+)/\d+\.\w+", r"\1.txt", lambda p, f: re10k(p, f)[1])}),
    "perception": (r"(?:.*/)?(video_\d+)\.mp4", {  # --annotations all_train.json
        "boxes": ("", "", lambda p, f: perception(p, f, "boxes")), "tracks": ("", "", lambda p, f: perception(p, f, "tracks"))}),
    "movi": (r"(?:(.*)/)?rgba_\d+\.png", {  # what Kubric's worker writes; tracks.npz: TAP-Vid's target_points (P,T,2) and occluded (P,T)
        "masks": ("rgba_", "segmentation_", lambda p, f: png(p)), "boxes": (r"rgba_\d+\.png", "metadata.json", kubric),
        "tracks": (r"rgba_\d+\.png", "tracks.npz", lambda p, f: np.load(p[0])["target_points"].swapaxes(0, 1)),
        "visible": (r"rgba_\d+\.png", "tracks.npz", lambda p, f: ~np.load(p[0])["occluded"].T.astype(bool))}),
    "waymo": (r"(.*/\d)/\d+\.jpg", {"boxes": (r"\d/\d+\.jpg", "camera_box.csv", waymo)}),
    "davis": (r"JPEGImages/(.*)/\d+\.jpg", {"masks": ("JPEGImages(.*)jpg", r"Annotations\1png", lambda p, f: (m := png(p)) - (m == 255) * np.uint8(254))}),
    "ade20k": (r"images/(.*)\.jpg", {"masks": ("images(.*)jpg", r"annotations\1png", lambda p, f: png(p) - np.uint8(1))}),  # ADEChallengeData2016
    "cityscapes": (r"leftImg8bit/(.*)_leftImg8bit\.png", {
        "masks": ("leftImg8bit/(.*)_leftImg8bit", r"gtFine/\1_gtFine_labelIds", lambda p, f: CITYSCAPES[png(p)]),
        "disparity": ("leftImg8bit/(.*)_leftImg8bit", r"disparity/\1_disparity", lambda p, f: known(png(p) / 256) - np.float32(1 / 256)),
        "right": ("leftImg8bit/(.*)_leftImg8bit", r"rightImg8bit/\1_rightImg8bit", lambda p, f: png(p))}),
    "sintel": (r"training/((?:clean|final)/[^/]+)/frame_\d+\.png", {
        "flow": (r"training/\w+(.*)png", r"training/flow\1flo", lambda p, f: flo(p)),
        "flow_visible": (r"training/\w+", "training/occlusions", lambda p, f: png(p) == 0)}),
    "chairs": (r"(.*)_img[12]\.ppm", {"flow": (r"img\d\.ppm", "flow.flo", lambda p, f: flo(p[:1]))}),
    "kitti": (r"training/((?:image_2|colored_0)/\d+)_1[01]\.png", {
        "flow": (r"image_2|colored_0", "flow_occ", lambda p, f: kitti_flow(p)),
        "flow_visible": (r"image_2|colored_0", "flow_noc", lambda p, f: png(p)[..., 2] > 0),
        "disparity": (r"image_2", "disp_occ_0", lambda p, f: known(png(p) / 256)), "right": ("image_2", "image_3", lambda p, f: png(p))}),
    "sceneflow": (r"(frames_\w+/.*)/left/\d+\.png", {
        "disparity": (r"frames_\w+(.*)png", r"disparity\1pfm", lambda p, f: pfm(p)), "right": ("/left/", "/right/", lambda p, f: png(p)),
        "flow": (r"frames_\w+/(.*)/left/(\d+)\.png", r"optical_flow/\1/into_future/left/OpticalFlowIntoFuture_\2_L.pfm", lambda p, f: pfm(p)[..., :2])}),
    "middlebury": (r"(.*)/im0\.png", {"disparity": ("im0.png", "disp0.pfm", lambda p, f: pfm(p)), "right": ("im0", "im1", lambda p, f: png(p))}),
}


def dense_clips(layout, root, annotations):
    """Yield (name, images or one video or (video, first second, seconds), a function that reads the labels) of a data set."""
    natural = lambda path: [int(c) if i % 2 else c for i, c in enumerate(re.split(r"(\d+)", path))]  # 10.jpg after 9.jpg
    files = sorted((p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()), key=natural)
    if layout in SPECIAL:
        yield from SPECIAL[layout](root, files, annotations)
        return
    groups, (pattern, rows) = {}, LAYOUTS[layout]
    for p in files:
        if m := re.fullmatch(pattern, p):
            groups.setdefault(m[1] or "clip", []).append(p)
    for name, frames in groups.items():
        for i in range(0, len(frames), 256):  # long videos in pieces, which fit the memory
            part = frames[i : i + 256]
            yield f"{name}_{i:06d}" if len(frames) > 256 else name, [root / p for p in part], lambda part=part: {
                label: value for label, row in rows.items() if (value := read_row(label, row, root, part, annotations)) is not None}


def read_row(label, row, root, frames, annotations):
    pattern, put, reader = row
    paths = [root / re.sub(pattern, put, p, count=1) if put else Path(annotations) for p in (frames[:-1] if label.startswith("flow") else frames)]
    found = [i for i, p in enumerate(paths) if p.is_file()]
    if not found:
        return None
    value = reader([paths[i] for i in found], [root / p for p in frames])
    if len(found) == len(paths):
        return value
    out = np.full((len(paths), *value.shape[1:]), np.nan if value.dtype.kind == "f" else 255 if label == "masks" else 0, value.dtype)
    out[found] = value
    return out


def intphys(root, files, annotations):
    """BLOCK/SCENE/{1,2,3,4}/scene/scene_001.png ... and status.json, which says whether it is possible: two movies of a scene are, two are not. Each of
    these goes with the possible one that it shares its beginning with."""
    scenes = {}
    for p in files:
        if m := re.fullmatch(r"(.*)/(\d)/scene/scene_\d+\.png", p):
            scenes.setdefault(m[1], {}).setdefault(m[2], []).append(root / p)
    for scene, movies in scenes.items():
        status = {k: json.loads((root / scene / k / "status.json").read_text()) for k in movies}
        possible = {k: bool(s.get("header", s).get("is_possible", s.get("possible"))) for k, s in status.items()}
        for k in (k for k in movies if not possible[k]):
            same = {j: next((t for t, (a, b) in enumerate(zip(movies[j], movies[k])) if a.read_bytes() != b.read_bytes() and (png([a]) != png([b])).any()),
                            len(movies[k])) for j in movies if possible[j]}
            j = max(same, key=same.get)
            yield f"{scene}_{k}", movies[j], lambda a=movies[k], t=same[j], b=scene: {
                "impossible": png(a), "change": np.array(t), "kind": np.array(int((re.search(r"O(\d)", b) or [0, 1])[1]) - 1)}


def ava(root, files, annotations):
    """--annotations ava_train_v2.2.csv: video, second, x0, y0, x1, y1 (shares), action, person. A clip of two seconds around each annotated second, whose
    boxes hold for all of its frames; action a is column a - 1 of 80."""
    videos, rows = {Path(p).stem: root / p for p in files if Path(p).suffix.lower() in VIDEOS}, {}
    with open(annotations, newline="") as file:
        for row in csv.reader(file):
            if len(row) >= 8 and row[0] in videos:
                rows.setdefault((row[0], int(row[1])), {}).setdefault((row[7], *map(float, row[2:6])), []).append(int(row[6]))
    for (name, second), people in rows.items():
        meta = open_video(str(videos[name])).metadata
        actions = np.zeros((len(people), 80), np.uint8)
        for i, ids in enumerate(people.values()):
            actions[i, np.array(ids) - 1] = 1
        boxes = np.array([box for _, *box in people])[None] * ([meta.width, meta.height] * 2)  # one row, which stands for all frames
        yield f"{name}_{second:05d}", (videos[name], max(second - 1, 0), 2), lambda a=actions, b=boxes: {"boxes": b, "actions": a}


SPECIAL = {"intphys": intphys, "ava": ava}  # layouts in which a clip is not simply a folder of frames


def index_dense(layout, root, out, annotations, crf):
    """index for dense labels."""
    if not shutil.which("ffmpeg"):
        raise DataError("dense labels need the ffmpeg program: apt-get install -y ffmpeg")
    if layout in ("perception", "ava") and not os.path.isfile(annotations):
        raise DataError(f"index {layout} needs --annotations FILE" + (f": no file {annotations}" if annotations else ""))
    rows, labels, name = [], Counter(), "1"
    try:
        for name, frames, read in tqdm(dense_clips(layout, root, annotations), disable=None):
            video = out.parent / out.stem / f"{name.replace('/', '-')}.mp4"
            half = video.with_suffix(".tmp.mp4")
            video.parent.mkdir(parents=True, exist_ok=True)
            encode = ["-an", "-c:v", "libx264rgb", "-crf", str(crf), "-preset", "veryfast", "-y", str(half)]
            if isinstance(frames, tuple):
                path, start, seconds = frames
                subprocess.run(["ffmpeg", "-v", "error", "-ss", str(start), "-t", str(seconds), "-i", str(path), *encode], check=True)
            elif frames[0].suffix.lower() in VIDEOS:
                shutil.copyfile(frames[0], half)
            else:
                pipe(frames, *encode)
            arrays = {label: unless(v, ~np.isfinite(v)) if v.dtype.kind == "f" else v for label, v in read().items()}
            save_file({label: torch.from_numpy(v.copy("C")) for label, v in arrays.items()}, video.with_suffix(".safetensors"))
            os.replace(half, video)
            rows.append((video, -1))
            labels.update([*arrays])
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, struct.error, subprocess.SubprocessError) as error:
        raise DataError(f"{root}: clip {name} is not as {layout} should be ({type(error).__name__}: {reason(error)})") from None
    if not rows:
        raise DataError(f"{root}: no clips in the layout of {layout}")
    write_list(out, rows)
    return {"list": str(out), "rows": len(rows), "labels": dict(labels)}, 0


# --- command line -----------------------------------------------------------------------------------------------------------------------

def check(path: str, workers: int = 2):
    """Read every file of a list to its last frame, and report what they are and which are bad. Exit status 0: all sound, 1: some bad, 2: no list.

    Args:
        path: a list, or a folder of videos
        workers: processes; 0 reads in this one
    """
    source = parse_list(path)
    import_torchcodec()
    files = in_processes(inspect_video, [*dict.fromkeys(source.paths)], workers)
    good, bad = [f for f in files if not f["reason"]], [f for f in files if f["reason"]]
    for f in bad:
        print(f"bad: {f['path']}: {f['reason']}")
    for f in good:
        if f["announced"] not in (None, f["frames"]):
            print(f"note: {f['path']}: its header announces {f['announced']} frames, it has {f['frames']}")
    summary = {"rows": len(source), "files": len(files), "bad": len(bad), "labels": len(np.unique(source.labels[source.labels >= 0]))}
    for name in ("codec", "size", "fps"):
        summary[name] = dict(Counter(f[name] for f in good).most_common(8))
    for name in ("frames", "seconds"):
        summary[name] = dict(zip(("min", "median", "max"), np.quantile([f[name] for f in good] or [0], (0, 0.5, 1)).round(3).tolist()))
    for name, value in summary.items():
        print(f"{name:8}{value}")
    return summary, int(bool(bad))


def inspect_video(path):
    """Decode every frame -> {"path", "reason" (None if sound), "codec", "size", "fps", "seconds", "frames", "announced" by the header}."""
    facts = {"path": path, "reason": None}
    try:
        video = open_video(path)
        meta, n = video.metadata, len(video)
        for i in range(0, n, 16):
            try:
                video.get_frames_in_range(i, min(i + 16, n))
            except RuntimeError:
                if i + 16 < n or n == 1:
                    raise
                open_video(path).get_frames_at([*range(i, n - 1)] or [i - 1])  # as in read_clips, the very last frame may be missing
        facts |= {"codec": meta.codec, "size": f"{meta.width}x{meta.height}", "fps": round(meta.average_fps or 0, 2), "frames": n,
                  "seconds": meta.end_stream_seconds - meta.begin_stream_seconds, "announced": meta.num_frames_from_header}
    except DAMAGE as error:
        facts["reason"] = reason(error)
    return facts


def in_processes(function, items, workers):
    """[function(item), ...] with a progress bar, in fresh processes."""
    if workers < 1:
        return [function(item) for item in tqdm(items, disable=None)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [*tqdm(pool.map(function, items, chunksize=4), total=len(items), disable=None)]


def index(layout: Literal["kinetics", "ssv2", "ucf", "folders", "scannet", "re10k", "perception", "movi", "waymo", "davis", "ade20k", "cityscapes", "sintel",
                          "chairs", "kitti", "sceneflow", "middlebury", "intphys", "ava"],
          root: str, out: str = "", annotations: str = "", labels: str = "", crf: int = 0):
    """Make a list of 'path label' rows of a dataset as downloaded, and classes.txt beside it (line k, from 0, names label k).

    Videos that are annotated but not found under the root are counted and left out. kinetics and folders: a classes.txt that is there already is
    obeyed, so that the train and the val list number the classes alike.

    Data sets with dense labels (scannet and all after it) are written anew, as clip.mp4 and clip.safetensors, into a folder named like the list.
    Which files of each are read stands in the table LAYOUTS.

    Args:
        layout: whose layout
        root: the folder that holds the videos, at any depth; of dense data sets the folder as unpacked
        out: the list to write (default: LAYOUT.txt)
        annotations: kinetics: csv with label, youtube_id, time_start, time_end; ssv2: train.json; ucf: trainlist01.txt (classInd.txt beside it);
            perception: all_train.json; ava: ava_train_v2.2.csv
        labels: ssv2: labels.json
        crf: dense: x264's quality of the clips; 0 is lossless, and large
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    out, note = Path(out or f"{layout}.txt"), Path(annotations)
    if layout in LAYOUTS | SPECIAL:
        return index_dense(layout, Path(root), out, annotations, crf)
    known, files = out.parent / "classes.txt", {path.stem: path for path in media(root)}
    if layout != "folders" and not note.is_file():
        raise DataError(f"index {layout} needs --annotations FILE" + (f": no file {annotations}" if annotations else ""))
    if layout == "ssv2" and not os.path.isfile(labels):
        raise DataError(f"index ssv2 needs --labels FILE" + (f": no file {labels}" if labels else ""))
    try:
        lines = [] if layout == "folders" else [line for line in note.read_text("utf-8-sig").splitlines() if line.strip()]
        classes = known.read_text("utf-8").splitlines() if known.is_file() else None
        if layout == "folders":
            rows = [(path, os.path.basename(where)) for where, path, label in folder_rows(root) if label is not None]
        elif layout == "kinetics":  # files are named ID_START_END or ID
            rows = [(files.get("{}_{:06d}_{:06d}".format(r["youtube_id"], *(int(float(r[k])) for k in ("time_start", "time_end"))),
                               files.get(r["youtube_id"])), r.get("label") or None) for r in csv.DictReader(lines)]
        elif layout == "ssv2":
            numbers = json.loads(Path(labels).read_text("utf-8"))
            classes = sorted(numbers, key=lambda name: int(numbers[name]))
            rows = [(files.get(str(r["id"])), re.sub(r"[\[\]]", "", r["template"]) if "template" in r else None)
                    for r in json.loads("\n".join(lines))]
        else:
            classes = [line.split()[1] for line in (note.parent / "classInd.txt").read_text("utf-8").splitlines() if line.strip()]
            rows = [(files.get(Path(line.split()[0]).stem), line.split("/")[0]) for line in lines]
    except (OSError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{annotations}: not {layout} annotations ({type(error).__name__}: {reason(error)})") from None
    classes = classes or sorted({name for _, name in rows if name is not None})
    number = {name: k for k, name in enumerate(classes)} | {None: -1}
    for _, name in rows:
        if name not in number:
            raise DataError(f"class {name!r} is not one of the {len(classes)} of " + (labels or ("classInd.txt" if layout == "ucf" else str(known))))
    found = [(path, number[name]) for path, name in rows if path]
    if not found:
        raise DataError(f"{root}: {len(files)} videos, and none is " + ("in a class folder" if layout == "folders" else f"named in {annotations}"))
    write(known, "".join(f"{name}\n" for name in classes))
    write_list(out, found)
    return {"list": str(out), "rows": len(found), "classes": len(classes), "missing": len(rows) - len(found)}, 0


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text, "utf-8")
    os.replace(f"{path}.tmp", path)


def write_list(out, rows):
    """rows: (path, label). Paths under the list's folder are written relative to it, so that the folder can be moved; others absolute."""
    folder = os.path.abspath(out.parent) + "/"
    rows = [(os.path.abspath(path).removeprefix(folder), label) for path, label in rows]
    write(out, "".join(f"{path} {label}\n" if label >= 0 else f"{path}\n" for path, label in rows))


def pack(path: str, out: str, short_side: int = 256, fps: float = 0, gop: int = 8, crf: int = 23, fast_decode: bool = True, workers: int = 2):
    """Re-encode the videos of a list for fast reading, and write a list of the same name into the folder OUT. The originals are not touched.

    Interrupted, it goes on where it stopped. Files that cannot be read to the end are reported and left out (exit status 1).

    Args:
        path: a list, or a folder of videos
        out: the folder to write
        short_side: pixels; smaller videos keep their size
        fps: frames a second, 0 as they are. Training at stride 4 on 30 fps wants 7.5, and then --fps 7.5 or --stride 1
        gop: frames from one key frame to the next
        crf: x264's quality; lower is better and larger
        fast_decode: without CABAC and deblocking: twice as fast to read, 10 % larger
        workers: processes
    """
    if not (short_side >= 16 and 0 <= fps < 1000 and gop >= 1 and 0 <= crf <= 51):
        raise DataError(f"short_side {short_side} (16 or more), fps {fps} (0 to 1000), gop {gop} (1 or more) or crf {crf} (0 to 51) is out of range")
    source, folder = parse_list(path), Path(out)
    if os.path.isdir(path) and folder.resolve().is_relative_to(Path(path).resolve()):
        raise DataError(f"{out} lies in {path}, whose next reading would find every video twice; choose a folder outside")
    import_torchcodec()
    if not shutil.which("ffmpeg"):
        raise DataError("pack needs the ffmpeg program: apt-get install -y ffmpeg")
    short = f"min({short_side},min(iw*sar,ih))/min(iw*sar,ih)/2"  # never larger than it was; pixels become square; even sides
    resize = (f"fps={fps}," if fps else "") + f"scale='2*round(iw*sar*{short})':'2*round(ih*{short})':flags=area,setsar=1"
    encode = ["-an", "-sn", "-dn", "-vf", resize,
              "-pix_fmt", "yuv420p", "-c:v", "libx264", "-crf", str(crf), "-g", str(gop), "-bf", "0"] + ["-tune", "fastdecode"] * fast_decode
    root = os.path.dirname(os.path.abspath(source.name)) + "/"
    if (folder / "pack.json").exists():
        before = json.loads((folder / "pack.json").read_text("utf-8"))
        if isinstance(before, list):  # of older versions
            before = {"encode": before, "root": root}
        if before["encode"] != encode:
            raise DataError(f"{out} was packed with other settings (see its pack.json); choose another folder")
        if before["root"] != root:  # a file there may have the name of another video, and would be taken for it
            raise DataError(f"{out} holds videos packed from {before['root']}, not {root}; choose another folder")
    write(folder / "pack.json", json.dumps({"encode": encode, "root": root}))
    jobs = {}
    for path in source.paths:
        target = folder / "videos" / path.removeprefix(root).lstrip("/")
        jobs[path] = path, target if path.endswith(".mp4") else target.with_name(target.name + ".mp4"), encode
    failed = {path: why for path, why in zip(jobs, in_processes(pack_video, [*jobs.values()], workers)) if why}
    for path, why in failed.items():
        print(f"bad: {path}: {why}")
    rows = [(str(jobs[path][1]), int(label)) for path, label in zip(source.paths, source.labels) if path not in failed]
    packed = folder / (Path(source.name).name + (".txt" if os.path.isdir(source.name) else ""))  # a folder may have the name of the clips' own
    write_list(packed, rows)
    before, after = (sum(os.path.getsize(job[k]) for path, job in jobs.items() if path not in failed) / 1e6 for k in (0, 1))
    summary = {"list": str(packed), "rows": len(rows), "bad": len(failed), "mb_before": before, "mb_after": after}
    return summary, int(bool(failed))


def pack_video(job):
    """Re-encode one file -> None, or the reason why not. The target is renamed into place when complete; one that is there is not made again."""
    path, target, encode = job
    if target.exists():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{os.getpid()}.mp4")  # file: keeps names with a colon from being read as a protocol; explode: no half-decoded videos
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-err_detect", "explode", "-threads", "1", "-i", f"file:{path}", *encode,
               "-threads", "1", "-movflags", "+faststart", "-y", f"file:{temp}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["FFmpeg failed"])[-1][:200]
        open_video(str(temp)).get_frame_at(0)
        os.replace(temp, target)
    except DAMAGE as error:
        return reason(error)
    finally:
        temp.unlink(missing_ok=True)


def main():
    import tyro  # late: whoever imports data.py needs no flags
    try:
        summary, status = tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in (check, index, pack)}, description=__doc__,
                                                               config=(tyro.conf.PositionalRequiredArgs,))
    except (DataError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    print(json.dumps(summary))
    sys.exit(status)


# --- the built-in world ---------------------------------------------------------------------------
# 1 draw    the random numbers of a clip, a function of (seed, split, clip) alone
# 2 scene   they become poses, sizes and textures
# 3 cast    which object each ray hits, and how far away
# 4 shade   how bright it is there
# 5 labels  all from 2 and 3: flow and tracks carry a hit's object coordinates to another frame,
#           stereo to a second camera; whether it is seen there is told by casting a ray at it
#
# Axes are OpenCV's: x right, y down, z ahead. A pose is (R, p): world point = R @ local point + p.
# A pixel's ray is (x, y, 1) in camera coordinates, so the ray parameter of a hit *is* its depth.
# Lengths are in units, the wall is at about 1. O objects, n clips, T frames, S waves of a texture.

# what the picture does, in pairs of opposites; the camera does the opposite
MOTIONS = (
    "left", "right",
    "up", "down",
    "clockwise", "counterclockwise",
    "grow", "shrink",
)
# clips of each, none is shared
SPLITS = {
    "train": 1 << 20,
    # for online probes
    "probe": 2048,
    "val": 1024,
    "rooms": 2048,
    "rooms_val": 1024,
}
# objects of a scene, in this order along the axis O: wall and floor, then things
PLANES = 2
SPHERES = 2
BOXES = 2
THINGS = SPHERES + BOXES
OBJECTS = PLANES + THINGS
# brightness of the objects in `rooms`: for tasks of space
TONES = (0.0, -0.5, 1.0, 1.0, -1.0, -1.0)
WAVES = 16
TAU = 2 * np.pi
# half the picture's width at depth 1: it spans 62 degrees
FIELD = 0.6
# a ray sees from here to there
NEAR = 0.02
FAR = 50

# What a thing does in the impossible video of a pair: until half-way, as it always does in the
# possible one, and then. In opposite pairs, so that more or less motion tells nothing.
LAWS = {
    "vanish": ("move", "be away"),
    "appear": ("be away", "move"),
    # and a substitute appears
    "change": ("move", "be away"),
    "teleport": ("move", "jump"),
    "stop": ("move", "rest"),
    "start": ("rest", "move"),
}
IMPOSSIBLE = tuple(LAWS)
# objects of a pair, after the planes
BALL, STONE, BOX, PILLAR = range(PLANES, OBJECTS)


@dataclass
class Scene:
    """Poses of camera and objects, sizes and textures; an axis of length 1 is for the times."""
    R: np.ndarray       # (n,T,3,3) camera to world
    p: np.ndarray       # (n,T,3)
    Ro: np.ndarray      # (O,n,T,3,3) object to world; a plane is its z = 0
    po: np.ndarray      # (O,n,T,3)
    size: np.ndarray    # (O,n,1,3) a box's half edges; a sphere's radius, three times
    wave: np.ndarray    # (O,n,1,S,3) wave vectors in object coordinates, rad per unit
    phase: np.ndarray   # (O,n,1,S)

    def cut(self, clips=slice(None), times=slice(None)):
        return Scene(
            self.R[clips, times],
            self.p[clips, times],
            self.Ro[:, clips, times],
            self.po[:, clips, times],
            self.size[:, clips],
            self.wave[:, clips],
            self.phase[:, clips],
        )


def rotation(axis, angle):
    """axis (...,3), angle (...) in rad -> (...,3,3), right-handed (Rodrigues)."""
    axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    identity = np.eye(3)
    outer = axis[..., None] * axis[..., None, :]
    cross = np.cross(identity, axis[..., None, :])
    cos = np.cos(angle)[..., None, None]
    sin = np.sin(angle)[..., None, None]
    return cos * identity + outer * (1 - cos) + cross * sin


def product(a, b):
    """Matrix product (...,i,j) @ (...,j,k) in a fixed order of additions.

    Unlike matmul: one clip's result cannot depend on the batch around it.
    """
    terms = a[..., None] * b[..., None, :, :]
    return terms.sum(-2)


def dot(a, b):
    """(3,...) -> (...), in a fixed order of additions."""
    x, y, z = a * b
    return x + y + z


def at_object(ids, *tables):
    """ids (n,T,h,w), tables (O,n,T,...) -> each (...,n,T,h,w): the row of the object seen there.

    A length of 1 stands for T. Values come first: several times faster.
    """
    n, T = tables[0].shape[1:3]
    rows = []
    for table in tables:
        table = table.expand(-1, n, T, *table.shape[3:])
        rows.append(table.flatten(0, 2).flatten(1))                         # (O*n*T,values)
    clip_and_time = torch.arange(n * T, device=ids.device).view(n, T, 1, 1)
    row = ids * (n * T) + clip_and_time
    values = torch.cat(rows, 1).T.contiguous()
    values = values.index_select(1, row.flatten())
    parts = values.split([table.shape[1] for table in rows])
    seen = []
    for part, table in zip(parts, tables):
        seen.append(part.view(*table.shape[3:], *row.shape))
    return seen


class Draws:
    """The random numbers of n clips, from one generator each, handed out in order."""

    def __init__(self, generators):
        self.uniforms = np.stack([g.random(256) for g in generators])
        self.normals = np.stack([g.standard_normal(512) for g in generators])

    def uniform(self, low, high, *shape):
        """shape (count,...) -> (count,n,1,...): the 1 is for the times."""
        drawn, self.uniforms = hand_out(self.uniforms, *shape)
        return low + (high - low) * drawn

    def normal(self, *shape):
        drawn, self.normals = hand_out(self.normals, *shape)
        return drawn

    def between(self, low, high):
        """Uniform, a number for each clip, (n,1)."""
        return self.uniform(low, high, 1)[0]


def hand_out(numbers, count, *shape):
    """numbers (n,left) -> the first of them, (count,n,1,*shape), and the rest."""
    drawn, rest = np.split(numbers, [math.prod(shape) * count], 1)
    drawn = drawn.reshape(len(drawn), count, 1, *shape)
    return drawn.swapaxes(0, 1), rest


@dataclass
class World:
    """Clips of a textured room with spheres and boxes, filmed by a moving camera.

    There are eight classes of motion (FWM-HW-LD, Table 6). Clip i is a function of (seed, split, i)
    and of nothing else. Its class is i mod 8, and all else is drawn without looking at the class;
    the camera is at its drawn pose half-way through the clip, so that no single frame tells it.

    All textures have the same statistics and no colour. That is deliberate: whatever is constant in
    a clip and differs between clips is what masked prediction learns first, and with clips that
    differ in colour or pattern it learns colour and pattern, and in the minutes of a laptop no
    motion. Nor can a thing be told from what surrounds it, unless it moves: in the splits `rooms`
    and `rooms_val` things are lighter or darker than walls, and there is a third of the noise.
    """
    split: str = "train"
    seed: int = 0
    frames: int = 8
    size: int = 32                  # pixels
    noise: float | None = None      # standard deviation of pixel noise, in [0,1]
    shift: tuple = (0.3, 0.6)       # range of the motion over a clip: picture widths,
    turn: tuple = (50.0, 100.0)     # degrees,
    zoom: tuple = (1.6, 2.5)        # a factor
    wobble: float = 0.02            # camera sway, picture widths
    points: int = 64                # tracks per clip
    baseline: float = 0.06          # from the camera to the one on its right
    contrast: float | None = None   # share of an object's tone in its brightness
    device: str = "cpu"

    def __post_init__(self):
        rooms = self.split.startswith("rooms")
        if self.noise is None:
            self.noise = 0.1 if rooms else 0.3
        if self.contrast is None:
            self.contrast = 0.5 if rooms else 0.0
        # from -1/2 to 1/2 through 0 half-way
        last = self.frames - 1
        from_middle = np.arange(self.frames) - last / 2
        self.times = from_middle / max(1, last)

    def __len__(self):
        return SPLITS[self.split]

    @property
    def labels(self):
        return np.arange(len(self)) % len(MOTIONS)

    # --- 1 draw

    def generators(self, indices, *use):
        """One for each clip.

        `use` is 1 for tracks, 2 for the right camera's noise, 3 for pairs, and left out for plain
        videos: so asking for labels changes no video.
        """
        split = list(SPLITS).index(self.split)
        seeds = [(self.seed, split, int(i), *use) for i in indices]
        return [np.random.default_rng(seed) for seed in seeds]

    def grain(self, generators):
        """Pixel noise (n,T,H,W,3) uint8, or None."""
        if not self.noise:
            return None
        shape = (self.frames, self.size, self.size, 3)
        noise = [g.integers(0, 256, shape, np.uint8) for g in generators]
        return np.stack(noise)

    # --- 2 scene: float64 and elementwise, so that no clip depends on the others of a batch

    def scene(self, draw, indices):
        """-> Scene of the clips `indices` (n,)."""
        # the pace may vary, but equally before and after the middle
        bend = np.sin(TAU * self.times)
        pace = self.times + draw.between(-0.5, 0.5) * bend / TAU            # (n,T)
        wall = draw.between(0.8, 1.25)                                      # (n,1)
        motion = indices % len(MOTIONS)
        R, p = self.camera(draw, motion, pace, wall)
        Ro, po, size = self.objects(draw, wall)
        wave, phase = self.textures(draw, wall)
        return Scene(R, p, Ro, po, size, wave, phase)

    def camera(self, draw, motion, pace, wall):
        """-> R (n,T,3,3), p (n,T,3): one of eight motions, and a sway that is the same for all."""
        width = 2 * FIELD * wall
        shift = draw.between(*self.shift) * width
        turn = np.radians(draw.between(*self.turn))
        zoom = np.log(draw.between(*self.zoom))
        # 1 or -1 in one of four; for the picture to go left the camera goes right
        sign = np.where(motion % 2 == 0, 1.0, -1.0)
        which = np.eye(4)[:, motion // 2]                                   # (4,n)
        right, down, roll, ahead = (which * sign)[..., None]                # each (n,1)
        place = np.empty((*pace.shape, 3))
        place[..., 0] = right * shift * pace
        place[..., 1] = down * shift * pace
        # to the wall, as a share of what it is half-way
        distance = np.exp(-ahead * zoom * pace)
        place[..., 2] = wall * (1 - distance)

        sway = draw.uniform(0, TAU, 1, 3)[0]                                # (n,1,3)
        speed = draw.uniform(0.5, 1, 1, 3)[0]
        sway = sway + TAU * speed * self.times[:, None]                     # (n,T,3)
        middle = sway.mean(1, keepdims=True)
        swing = np.sin(sway) - np.sin(middle)
        place = place + self.wobble * width[..., None] * swing

        # the floor may be anywhere
        start = rotation([0, 0, 1], draw.between(0, TAU))                   # (n,1,3,3)
        turned = rotation([0, 0, -1], roll * turn * pace)
        R = product(start, turned)
        p = product(start, place[..., None])[..., 0]
        return R, p

    def objects(self, draw, wall):
        """-> Ro (O,n,T,3,3), po (O,n,T,3), size (O,n,1,3)."""
        Ro, po, size = self.empty_room(wall)
        # wall and floor (or ceiling, or side wall: the camera's start decides), a little tilted
        axis = draw.normal(PLANES, 3) * [1, 1, 0.01]
        angle = draw.uniform(0, 0.45, PLANES)
        tilt = rotation(axis, angle)                                        # (2,n,1,3,3)
        Ro[:PLANES] = product(tilt, Ro[:PLANES])
        po[1, ..., 1] = draw.between(0.4, 1.0) * wall

        # things between camera and wall, some outside the picture
        depth = draw.uniform(0.45, 0.85, THINGS, 1) * wall[..., None]       # (things,n,1,1)
        across = draw.uniform(-1.4, 1.4, THINGS, 2) * FIELD * depth
        place = np.concatenate([across, depth], -1)                         # (things,n,1,3)
        velocity = draw.normal(THINGS, 3) * 0.06 * wall[..., None]
        po[PLANES:] = place + velocity * self.times[:, None]
        axis = draw.normal(THINGS, 3)
        angle = draw.uniform(0, TAU, THINGS)
        angle = angle + draw.uniform(-1, 1, THINGS) * self.times            # (things,n,T)
        Ro[PLANES:] = rotation(axis, angle)
        size[PLANES:] = draw.uniform(0.12, 0.4, THINGS, 1) * depth * FIELD
        size[-BOXES:] *= draw.uniform(0.5, 1.0, BOXES, 3)
        return Ro, po, size

    def empty_room(self, wall):
        """-> Ro, po, size of the wall in its place and all else at the camera's."""
        n = len(wall)
        shape = (OBJECTS, n, self.frames)
        Ro = np.tile(np.eye(3), (*shape, 1, 1))
        # upright
        Ro[1] = rotation([1, 0, 0], np.pi / 2)
        po = np.zeros((*shape, 3))
        po[0, ..., 2] = wall
        size = np.ones((OBJECTS, n, 1, 3))
        return Ro, po, size

    def textures(self, draw, wall):
        """-> wave (O,n,1,S,3), phase (O,n,1,S): isotropic waves over five octaves.

        They are alike in all clips: only directions and phases are drawn (class World says why).
        Lengths reach beyond the picture and below a pixel, so that a texture looks alike at every
        scale and a frame does not tell that it was zoomed.
        """
        longest = np.repeat([1.6, 1.2], [PLANES, THINGS])
        longest = longest[:, None, None] * (2 * FIELD * wall)               # (O,n,1)
        octave = 5 / WAVES * np.arange(WAVES)
        number = TAU * 2.0 ** octave / longest[..., None]                   # (O,n,1,S)
        direction = draw.normal(OBJECTS, WAVES, 3)
        norm = np.linalg.norm(direction, axis=-1, keepdims=True)
        wave = number[..., None] * direction / norm
        return wave, draw.uniform(0, TAU, OBJECTS, WAVES)

    def pair(self, draw, indices):
        """-> two Scenes, a possible one and one that differs from some frame on.

        A resting camera sees a ball (or a box) roll or fly from side to side, or rest. Half-way it
        breaks the law that IMPOSSIBLE[i mod 6] names: out of sight, behind a pillar, in every other
        six clips (not stop and start), else in view.
        """
        kind = indices % len(LAWS)
        law = np.array(IMPOSSIBLE)[kind, None]                              # (n,1)
        in_view = indices[:, None] // len(LAWS) % 2 == 1
        in_view = in_view | np.isin(law, ["stop", "start"])
        wall = draw.between(0.8, 1.25)
        side = np.sign(draw.between(-1, 1))
        box_moves = draw.between(0, 1)[..., None] < 0.5                     # (n,1,1)
        radius = draw.between(0.07, 0.1) * wall
        floor = draw.between(0.26, 0.34) * wall
        reach = draw.between(0.65, 0.8) * FIELD * 0.6 * wall
        flies = draw.between(0, 1) < 0.7
        height = draw.between(0.1, 0.45) * wall
        # what rests, rests on the floor
        height = np.where(flies & (law != "start"), height, 0)
        scene = self.stage(draw, wall, floor, radius, reach, in_view)

        # what the thing may do
        path = np.empty((len(wall), self.frames, 3))
        path[..., 0] = side * reach * 2 * self.times
        arc = 1 - 4 * self.times * self.times
        path[..., 1] = floor - radius - height * arc
        path[..., 2] = 0.6 * wall
        half = self.frames // 2
        jump = path.copy()
        jump[..., 0] += side * 0.5 * reach
        last = path[:, [max(half - 1, 0)]]
        rest = last.repeat(self.frames, 1)
        behind_camera = np.full_like(path, -9.0)
        courses = {"move": path, "jump": jump, "rest": rest, "be away": behind_camera}

        possible = np.empty_like(path)
        impossible = np.empty_like(path)
        substitute = behind_camera.copy()
        for clip, name in enumerate(law[:, 0]):
            before, after = LAWS[name]
            possible[clip] = courses[before][clip]
            impossible[clip] = courses[after][clip]
            if name == "change":
                substitute[clip, half:] = path[clip, half:]
        impossible[:, :half] = possible[:, :half]

        scenes = []
        for thing, other in ((possible, behind_camera), (impossible, substitute)):
            ball = np.where(box_moves, other, thing)
            box = np.where(box_moves, thing, other)
            scenes.append(self.put(scene, ball, box))
        return scenes

    def stage(self, draw, wall, floor, radius, reach, in_view):
        """-> Scene of a pair before ball and box are put: a stone at rest, and the pillar."""
        Ro, po, size = self.empty_room(wall)
        po[1, ..., 1] = floor
        po[STONE, ..., 0] = draw.between(-0.6, 0.6) * wall
        po[STONE, ..., 1] = floor - 0.1 * wall
        po[STONE, ..., 2] = 0.85 * wall
        po[PILLAR, ..., 0] = np.where(in_view, 9 * wall, 0)
        po[PILLAR, ..., 2] = 0.45 * wall
        size[BALL] = radius[..., None]
        size[STONE] = 0.1 * wall[..., None]
        size[BOX] = 0.6 * radius[..., None]
        # the pillar is as high as floor to ceiling, and hides the thing in two frames
        depth = 0.6 * wall
        step = reach / depth / max(1, self.frames - 1)
        half = radius / depth + step + 0.03
        size[PILLAR, ..., 0] = half * 0.45 * wall
        size[PILLAR, ..., 1] = floor
        size[PILLAR, ..., 2] = 0.02 * wall
        R = Ro[0]
        p = np.zeros_like(po[0])
        wave, phase = self.textures(draw, wall)
        return Scene(R, p, Ro, po, size, wave, phase)

    def put(self, scene, ball, box):
        """A pair's scene with these two at places (n,T,3), rolling."""
        po = scene.po.copy()
        po[BALL] = ball
        po[BOX] = box
        Ro = scene.Ro.copy()
        radius = scene.size[BALL, ..., 0]                                   # (n,1)
        roll = po[[BALL, BOX], ..., 0] / radius                             # (2,n,T)
        Ro[[BALL, BOX]] = rotation([0, 0, 1], roll)
        return replace(scene, Ro=Ro, po=po)

    # --- 3 cast

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    def rays(self):
        """x (W,), y (H,1) of the rays (x,y,1) through the centres of the pixels."""
        centre = (np.arange(self.size) + 0.5) / self.size
        x = self.tensor(centre * 2 - 1) * FIELD
        return x, x[:, None]

    def tables(self, scene):
        """axes (O,n,T,3,3), eye (O,n,T,3): the camera as object o sees it.

        Point c of camera coordinates is eye[o] + axes[o] @ c in the coordinates of object o.
        """
        back = scene.Ro.swapaxes(-1, -2)
        axes = product(back, scene.R)
        place = scene.p - scene.po
        eye = product(back, place[..., None])[..., 0]
        return self.tensor(axes), self.tensor(eye)

    def cast(self, scene, x=None, y=None):
        """Rays (x,y,1), (n,T,h,w), else the pixels' -> depth (n,T,h,w), object ids (n,T,h,w).

        And axes and eye of tables(): the hit on object o is eye[o] + depth * axes[o] @ (x,y,1) in
        the object's own coordinates.
        """
        axes, eye = self.tables(scene)
        size = self.tensor(scene.size)
        if x is None:
            x, y = self.rays()

        def along(rows):
            """(...,n,T,3) -> (...,n,T,h,w): row . (x,y,1)"""
            a, b, c = rows[..., None, None].unbind(-3)
            return a * x + c + b * y

        height = eye[:PLANES, ..., 2, None, None]
        t_plane = -height / along(axes[:PLANES, ..., 2, :])                 # (2,n,T,h,w)

        # at t the distance from the centre is the radius: a t^2 + 2 b t + c = 0
        sphere = slice(PLANES, -BOXES)
        start = eye[sphere]
        radius = size[sphere, ..., 0]
        a = x * x + y * y + 1
        towards = axes[sphere] * start[..., None]
        b = along(towards.sum(-2))
        c = (start * start).sum(-1) - radius * radius
        root = b * b - a * c[..., None, None]
        t_sphere = -(b + root.clamp_min(0).sqrt()) / a
        t_sphere = torch.where(root > 0, t_sphere, math.inf)

        # inside a box is where a ray is between the faces of all three pairs: (3,boxes,n,T,h,w)
        ray = along(axes[-BOXES:].movedim(-2, 0))
        inverse = 1 / ray
        start = eye[-BOXES:].movedim(-1, 0)[..., None, None]
        edge = size[-BOXES:].movedim(-1, 0)[..., None, None]
        middle = -start * inverse
        reach = edge * inverse.abs()
        enter = (middle - reach).amax(0)
        leave = (middle + reach).amin(0)
        t_box = torch.where(enter < leave, enter, math.inf)

        t = torch.cat([t_plane, t_sphere, t_box])                           # (O,n,T,h,w)
        t = torch.where(t > NEAR, t, math.inf)
        depth, ids = t.min(0)
        return depth.clamp_max(FAR), ids, axes, eye

    def hit(self, depth, axes, eye):
        """What pixels see, in the object's coordinates, (3,n,T,H,W).

        depth (n,T,H,W); axes (3,3,n,T,H,W) and eye (3,n,T,H,W) are those of the object seen.
        """
        x, y = self.rays()
        right, down, ahead = axes.unbind(1)
        return eye + right * (depth * x) + down * (depth * y) + ahead * depth

    def follow(self, scene, point, ids):
        """point (3,n,T,h,w), in the coordinates of objects ids (n,T,h,w) -> how `scene` shows it.

        That is its pixel x, y (n,T,h,w,2) and whether it is seen, bool (n,T,h,w): inside the
        picture and nothing in front, which a ray at it tells.
        """
        axes, eye = at_object(ids, *self.tables(scene))
        away = point - eye
        # transposed: to the camera's coordinates
        x, y, depth = dot(axes, away[:, None])
        x = x / depth.clamp_min(NEAR)
        y = y / depth.clamp_min(NEAR)
        inside = (x.abs() < FIELD) & (y.abs() < FIELD) & (depth > NEAR)
        nearest, *_ = self.cast(scene, x, y)
        seen = inside & (nearest > depth.clamp_max(FAR) * 0.998)
        pixel = torch.stack([x, y], -1) / FIELD + 1
        return pixel * (self.size / 2), seen

    # --- 4 shade

    def shade(self, scene, depth, ids, axes, eye):
        """What cast() returned -> brightness (n,T,H,W) in [0,1], before noise."""
        # A wave's phase at a hit is wave . (eye + depth * axes @ (x,y,1)) + phase: linear in
        # depth * (x,y,1), with the same coefficients for all pixels of an object.
        wave = self.tensor(scene.wave)
        offset = (wave * eye[..., None, :]).sum(-1)
        offset = offset + self.tensor(scene.phase)                          # (O,n,T,S)
        slope = product(wave, axes).transpose(-1, -2)                       # (O,n,T,3,S)
        number = np.linalg.norm(scene.wave, axis=-1)                        # (O,n,1,S)
        # from here on of the object that a pixel sees: (...,n,T,H,W)
        offset, slope, number, size, axes, eye = at_object(
            ids, offset, slope, self.tensor(number), self.tensor(scene.size), axes, eye)
        x, y = self.rays()
        phase = slope[0] * (depth * x)                                      # (S,n,T,H,W)
        phase += slope[1] * (depth * y)
        phase += slope[2] * depth
        phase += offset

        # the surface's normal
        place = self.hit(depth, axes, eye) / size
        side = place.abs()
        face = side == side.amax(0)
        normal = torch.where(face, place.sign(), 0.0)
        normal = torch.where(ids < PLANES + SPHERES, place, normal)
        upright = self.tensor([0, 0, 1]).view(3, 1, 1, 1, 1)
        normal = torch.where(ids < PLANES, upright, normal)

        # a wave fades where its period spans four to two pixels
        right, down, ahead = axes.unbind(1)
        ray = right * x + down * y + ahead
        length = dot(ray, ray).sqrt()
        slant = dot(normal, ray).abs() / length
        # what a pixel covers of the surface
        pixel = depth * (2 * FIELD / self.size) / slant.clamp_min(0.02)
        fade = 2 - number * pixel * (2 / math.pi)
        waves = phase.sin_() * fade.clamp_(0, 1)                            # (S,n,T,H,W)

        value = 0.65 * waves.sum(0)
        # soft threshold
        value = value / (1 + value.abs())
        if self.contrast:
            tone = self.tensor(TONES)[ids]
            value = value + self.contrast * (tone - value)
        return 0.5 + 0.45 * value

    def picture(self, scene, hits, grain):
        """-> (n,T,H,W,3) uint8; the noise is uniform: a width of 1 has the deviation 1/sqrt(12)."""
        grey = self.shade(scene, *hits).mul_(255)
        video = grey[..., None].repeat(1, 1, 1, 1, 3)
        if self.noise:
            noise = self.tensor(grain) - 127.5
            video += noise * (self.noise * math.sqrt(12))
        return video.round_().clamp_(0, 255).to(torch.uint8)

    # --- 5 labels

    @torch.no_grad()
    def render(self, indices, labels=()):
        """indices (n,) -> {"video": (n,T,H,W,3) uint8, "label": (n,) int64, and `labels`}.

        The same for a clip whatever else is in the batch. Names, shapes (with n in front) and units
        are those of dense_batches. Of the world's own: lengths in units (the wall is at 0.8 to
        1.25); masks holds 0 wall, 1 floor, 2, 3 spheres, 4, 5 boxes; boxes are of the moving
        objects 2 to 5; tracks start at pixels of frame 0; `right` is `baseline` to the right.
        impossible, kind or change give another scene (pair), whose possible version is "video" and
        has the labels, and no class: before frame `change` the two videos are the same, noise
        included, and kind is an index into IMPOSSIBLE.
        """
        made = {name: [] for name in ("video", *labels)}
        unknown = made.keys() - {"video", *LABELS}
        if unknown:
            raise DataError(f"the built-in world has no label {min(unknown)!r}; "
                            f"it has {', '.join(LABELS)}")
        indices = np.asarray(indices)
        if made.keys() & {"impossible", "kind", "change"}:
            generators = self.generators(indices, 3)
            scenes = self.pair(Draws(generators), indices)
        else:
            generators = self.generators(indices)
            scenes = [self.scene(Draws(generators), indices)]
        # one clip fits the cache of a core, which is ten times faster than a batch
        at_once = 1 if self.device == "cpu" else 64
        for i in range(0, len(indices), at_once):
            part = slice(i, i + at_once)
            grain = self.grain(generators[part])
            cut = [scene.cut(part) for scene in scenes]
            shot = Shot(self, cut, grain, indices[part])
            for name, parts in made.items():
                parts.append(getattr(shot, name).cpu())
        batch = {name: torch.cat(parts) for name, parts in made.items()}
        batch["label"] = torch.from_numpy(indices % len(MOTIONS))
        return batch


LABELS = (
    "depth", "masks", "boxes",
    "pose", "K",
    "flow", "flow_visible",
    "tracks", "visible",
    "right", "disparity", "disparity_visible",
    "impossible", "kind", "change",
)


@dataclass
class Shot:
    """Filmed scenes. An attribute for each label, made when it is asked for."""
    world: World
    scenes: list
    grain: np.ndarray
    indices: np.ndarray

    def __post_init__(self):
        self.scene = self.scenes[0]
        hits = self.world.cast(self.scene)
        self.depth, self.ids, self.axes, self.eye = hits
        self.video = self.world.picture(self.scene, hits, self.grain)
        # pixels
        self.focal = self.world.size / (2 * FIELD)

    @property
    def masks(self):
        return self.ids.to(torch.uint8)

    @property
    def boxes(self):
        size = self.world.size
        things = torch.arange(PLANES, OBJECTS, device=self.ids.device).view(-1, 1, 1)
        shown = self.ids[:, :, None] == things                              # (n,T,things,H,W)
        sides = []
        # columns, then rows, that show the thing
        for axis in (-2, -1):
            line = shown.any(axis).int()                                    # (n,T,things,size)
            first = line.argmax(-1)
            last = size - line.flip(-1).argmax(-1)
            none = torch.where(line.any(-1), 0.0, math.nan)
            ends = torch.stack([first, last], -1)
            sides.append(ends + none[..., None])
        return torch.stack(sides, -1).flatten(-2)

    @property
    def pose(self):
        scene = self.scene
        n, T, _ = scene.p.shape
        pose = np.tile(np.eye(4), (n, T, 1, 1))
        pose[..., :3, :3] = scene.R
        pose[..., :3, 3] = scene.p
        return self.world.tensor(pose)

    @property
    def K(self):
        K = np.diag([self.focal, self.focal, 1])
        K[:2, 2] = self.world.size / 2
        return self.world.tensor(K).expand(len(self.depth), 3, 3)

    @cached_property
    def point(self):
        """What pixels see, in the object's coordinates, (3,n,T,H,W)."""
        axes, eye = at_object(self.ids, self.axes, self.eye)
        return self.world.hit(self.depth, axes, eye)

    @cached_property
    def in_next_frame(self):
        """Where pixels go, (n,T-1,H,W,2), and whether they are seen there."""
        later = self.scene.cut(times=slice(1, None))
        point = self.point[:, :, :-1]
        ids = self.ids[:, :-1]
        return self.world.follow(later, point, ids)

    @property
    def flow(self):
        centre = torch.arange(self.world.size, device=self.ids.device) + 0.5
        pixel = torch.meshgrid(centre, centre, indexing="xy")
        return self.in_next_frame[0] - torch.stack(pixel, -1)

    @property
    def flow_visible(self):
        return self.in_next_frame[1]

    @cached_property
    def tracked(self):
        """Pixels of the first frame in all frames, (n,T,1,P,2), and whether they are seen."""
        pixels = self.world.size ** 2
        count = self.world.points
        generators = self.world.generators(self.indices, 1)
        start = [g.choice(pixels, count, replace=count > pixels) for g in generators]
        start = torch.as_tensor(np.stack(start), device=self.ids.device)
        start = start[:, None, None]                                        # (n,1,1,P)
        clip = torch.arange(len(start), device=start.device)
        clip = clip.view(-1, 1, 1, 1)
        ids = self.ids[:, 0].flatten(1)
        point = self.point[:, :, 0].flatten(2)
        return self.world.follow(self.scene, point[:, clip, start], ids[clip, start])

    @property
    def tracks(self):
        return self.tracked[0][:, :, 0]

    @property
    def visible(self):
        return self.tracked[1][:, :, 0]

    @cached_property
    def right_scene(self):
        # along the camera's x axis
        aside = self.world.baseline * self.scene.R[..., 0]
        return replace(self.scene, p=self.scene.p + aside)

    @property
    def right(self):
        generators = self.world.generators(self.indices, 2)
        grain = self.world.grain(generators)
        hits = self.world.cast(self.right_scene)
        return self.world.picture(self.right_scene, hits, grain)

    @property
    def disparity(self):
        return self.focal * self.world.baseline / self.depth

    @property
    def disparity_visible(self):
        _, seen = self.world.follow(self.right_scene, self.point, self.ids)
        return seen

    @cached_property
    def impossible(self):
        scene = self.scenes[1]
        hits = self.world.cast(scene)
        return self.world.picture(scene, hits, self.grain)

    @property
    def kind(self):
        return torch.from_numpy(self.indices % len(IMPOSSIBLE))

    @property
    def change(self):
        differs = self.video != self.impossible
        differs = differs.flatten(2).any(-1)                                # (n,T)
        return differs.int().argmax(1)


if __name__ == "__main__":
    main()
