"""Video in, training batches out: lists, decoding, sampling, augmentation, masks, and a built-in world.

    python data.py index kinetics|ssv2|ucf|folders ROOT --out train.txt      # make a list of 'path label' rows from a dataset as downloaded
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
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
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
    short: str = "repeat"  # a video shorter than the clip: "repeat" its last frame, "loop" it, or "error" (treated as damaged)
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
        if self.short not in ("repeat", "loop", "error"):
            raise DataError(f"short must be repeat, loop or error, not {self.short!r}")
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


def read_clips(path, clip, rngs=(None,)):
    """Decode clips of one video in one pass -> uint8 (rngs * segments * views, T, size, size, 3). Each rng of `rngs` gives a random start in each
    segment and one box; None gives the evaluation clips. Geometry is as a player shows it: turned by the container's matrix, pixels made square.
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
    shown, out = (height, max(round(width * square), 1)), []
    for rng, segments in zip(rngs, frames.unflatten(0, (len(rngs), clip.segments, clip.frames))):
        boxes = [view_box(*shown, v, clip.views) if rng is None else random_square(rng, *shown, clip.zoom) if clip.zoom
                 else random_box(rng, *shown, clip.scale, clip.ratio) for v in range(clip.views)]
        boxes = [(top, min(round(left / square), width - 1), h, max(round(w / square), 1)) for top, left, h, w in boxes]
        out += [crop_resize(segment, box, clip.size) for segment in segments for box in boxes]
    return torch.stack(out) if len(out) > 1 else out[0][None]  # a copy of a clip costs as much as its resize


# --- the plan and the loader ------------------------------------------------------------------------------------------------------------

DAMAGE = (RuntimeError, ValueError, IndexError, AssertionError, OSError)  # what torchcodec and FFmpeg raise on bad files
ORDER, MIX, REPLACE, AUGMENT = range(4)  # random streams: default_rng([seed, stream, ...]) never meets another's numbers
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

    def __init__(self, sources, clip, seed, plan=None):
        if any(s.paths for s in sources):
            import_torchcodec()  # a machine without FFmpeg is told so before any work
        self.sources, self.clip, self.seed, self.plan = sources, clip, seed, plan
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
        ok, names, bad, rendered = torch.ones(len(numbers), dtype=torch.bool), [], [], {}
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
            for (here, _), frames in zip(rows, self.worlds[s].render([row for _, row in rows])["video"]):
                video[here] = torch.as_tensor(frames)
        return {"video": video, "flip": flip, "label": label, "index": torch.tensor(numbers), "path": names, "ok": ok, "bad": bad}


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


def eval_batches(source, clip, *, batch_size, workers=0, rank=0, ranks=1, rows=None, seed=0, timeout=600):
    """Batches over the rows of one source, each row once and in order (`rows` picks and orders them; rank r takes rows[r::ranks]).

    As make_loader's, but video is (b * segments * views, T,H,W,3), videos outermost, flip likewise; index is the row; ok bool (b,) is False, and the
    video black, where it cannot be read. clip.train=True: random starts (one in each segment), box and flip, a function of (seed, row).
    """
    rows = np.arange(len(source)) if rows is None else np.asarray(rows)
    rows = rows[rank::ranks].tolist()
    return stream(Clips([source], clip, seed), (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)), workers, timeout)


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
    happens to be, so scripts ask at their outermost level."""
    text = " ".join(str(error).split())
    return f"a loader process died or hangs ({text}); nothing saved is lost: --resume goes on. Out of memory: fewer --workers" if "DataLoader" in text else None


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


# --- masks ------------------------------------------------------------------------------------------------------------------------------
# Each returns hidden, bool (B,t,h,w): what the context does not see and the predictor predicts. Every clip keeps and hides at least one token.

def block_shape(rng, grid, scale, time=1.0, aspect=(0.75, 1.5)):
    """(bt, bh, bw) of a block of `scale` of the frame through a share `time` of the slices, of a random aspect ratio."""
    t, h, w = grid
    bt = min(max(int(t * time), 1), t)
    for _ in range(100):  # a large block of an unlucky shape may cover the frame
        area, ratio = int(h * w * scale), rng.uniform(*aspect)
        bh, bw = (min(max(round(math.sqrt(area * r)), 1), n) for r, n in ((ratio, h), (1 / ratio, w)))
        if (bt, bh, bw) != (t, h, w):
            return bt, bh, bw
    raise DataError(f"blocks of {scale} of a {h}x{w} grid leave no context")


def multiblock(rng, B, grid, blocks, scale, time=1.0, aspect=(0.75, 1.5)):
    """V-JEPA's masks: the union of `blocks` rectangles of `scale` of the frame each, through a share `time` of the slices. The rectangle's shape is
    drawn once for the whole batch (so that lengths vary little), its places for every clip; clips without any context are drawn again."""
    t, h, w = grid
    bt, bh, bw = block_shape(rng, grid, scale, time, aspect)
    slices, bt = (1, 1) if bt == t else (t, bt)  # through all of time: one slice stands for all of them
    hidden, todo = np.empty((B, slices, h, w), dtype=bool), np.arange(B)
    while len(todo):
        new = np.zeros((len(todo), slices, h, w), dtype=bool)
        for _ in range(blocks):
            inside = [(np.arange(n) - rng.integers(n - b + 1, size=(len(todo), 1))).view(np.uint64) < b for n, b in ((slices, bt), (h, bh), (w, bw))]
            new |= inside[0][:, :, None, None] & (inside[1][:, :, None] & inside[2][:, None, :])[:, None]
        hidden[todo] = new
        todo = todo[new.all((1, 2, 3))]
    return np.broadcast_to(hidden, (B, t, h, w)).copy()


def random_mask(rng, B, grid, ratio):
    """A share `ratio` of the tokens, chosen at random for each clip."""
    N = math.prod(grid)
    if N < 2:
        raise DataError(f"a mask needs two places to tell apart, and the grid has {N}")
    keys = rng.random((B, N), dtype=np.float32)
    count = min(max(round(N * ratio), 1), N - 1)
    return (keys <= np.partition(keys, count - 1, axis=1)[:, count - 1 : count]).reshape(B, *grid)


def tube_mask(rng, B, grid, ratio):
    """Random places of the frame, the same in every slice."""
    return np.broadcast_to(random_mask(rng, B, (1, *grid[1:]), ratio), (B, *grid)).copy()


def causal_mask(rng, B, grid, ratio):
    """The last slices: the context is the beginning of the clip."""
    if grid[0] < 2:
        raise DataError("a causal mask needs two slices of time")
    hidden = np.zeros((B, *grid), dtype=bool)
    hidden[:, -min(max(round(grid[0] * ratio), 1), grid[0] - 1) :] = True
    return hidden


MASKS = {"random": random_mask, "tube": tube_mask, "causal": causal_mask}


def parse_mask(text):
    """'8x0.15' (8 blocks of 0.15 of the frame), '2x0.7x0.5' (through half of the time), 'random:0.9', 'tube:0.9' or 'causal:0.9'
    -> (function, arguments)."""
    try:
        if ":" in text:
            kind, ratio = text.split(":")
            function, arguments = MASKS[kind], {"ratio": float(ratio)}
        else:
            blocks, scale, time = (text if text.count("x") == 2 else text + "x1").split("x")
            function, arguments = multiblock, {"blocks": int(blocks), "scale": float(scale), "time": float(time)}
        if not all(0 < v <= 1 for k, v in arguments.items() if k != "blocks") or arguments.get("blocks", 1) < 1:
            raise ValueError
        return function, arguments
    except (ValueError, KeyError):
        raise DataError(f"mask {text!r}: write BLOCKSxSCALE, BLOCKSxSCALExTIME, random:RATIO, tube:RATIO or causal:RATIO, "
                        "with numbers in (0, 1]") from None


def sample_masks(specs, seed, step, B, grid, aspect=(0.75, 1.5), trim="random", bucket=1, rows=None, temporal_keep=1.0):
    """The masks of one step: (keep, pred), for each spec an int64 tensor (b,K) and (b,M) of sorted token ids, for the clips `rows` (a slice) of the
    global batch of B. K and M are the smallest counts in the whole batch, rounded down to a multiple of `bucket`, so every rank sees the same shapes.
    "Smallest" as in 24 clips, what V-JEPA has on a GPU: of B clips the B/24 with the fewest tokens take the masks of others, or one odd clip in
    thousands would leave all of them next to no context.
    trim: what is left out to get there is chosen at "random", or, "prefix", lies last in time (V-JEPA's code).
    temporal_keep < 1: the context lies in this first share of the slices, and all that is not context is predicted (FWM-HW-LD's Future-Predictive)."""
    first, last, _ = (rows or slice(None)).indices(B)
    keep, pred, N = [], [], math.prod(grid)
    for i, spec in enumerate(specs):
        function, arguments = parse_mask(spec)
        rng = np.random.default_rng([seed, step, i])
        hidden = function(rng, B, grid, **arguments, **({"aspect": aspect} if function is multiblock else {})).reshape(B, N)
        hidden[:, early_tokens(grid, temporal_keep) :] = True
        seen, unseen = N - np.count_nonzero(hidden, axis=1), np.count_nonzero(hidden, axis=1)
        if not seen.any():
            raise DataError(f"mask {spec!r}: no clip keeps a token in the first {temporal_keep} of its slices")
        K, M = (np.sort(counts[counts > 0])[(np.count_nonzero(counts) - 1) // 24] for counts in (seen, unseen))
        few = np.flatnonzero((seen < K) | (unseen < M))
        hidden[few] = hidden[rng.choice(np.setdiff1d(np.arange(B), few), len(few))]
        if trim == "random":  # its own stream, wound on to the first row: a rank draws only its own rows' numbers
            keys = np.random.Generator(np.random.PCG64([seed, step, i, 1]).advance(first * N)).random((last - first, N))
        else:
            keys = np.broadcast_to(np.arange(N) / N, (last - first, N))
        for ids, chosen, smallest in ((keep, ~hidden[first:last], K), (pred, hidden[first:last], M)):
            if ids is pred and temporal_keep < 1:
                chosen, smallest = np.ones_like(chosen), N - keep[-1].shape[1]
                np.put_along_axis(chosen, keep[-1].numpy(), False, axis=1)
            length = int(smallest) // bucket * bucket or int(smallest)
            ids.append(torch.from_numpy(np.sort(np.argpartition(np.where(chosen, keys, 2.0), length - 1, axis=1)[:, :length], axis=1)))
    return keep, pred


def early_tokens(grid, temporal_keep):
    """How many tokens lie in the first share `temporal_keep` of the slices, of one slice at least."""
    return max(1, int(grid[0] * temporal_keep)) * grid[1] * grid[2]


def motion_map(x, tubelet, patch):
    """x (B,3,T,H,W) -> (B,t,h,w) in [0,1]: each token's mean |frame(t+1) - frame(t)|, as a share of the clip's largest; 0 in a still clip."""
    change = x.diff(dim=2).abs().mean(1, keepdim=True)
    change = F.avg_pool3d(torch.cat([change, change[:, :, -1:]], 2), (tubelet, patch, patch))[:, 0]  # the last frame has no next one
    return change / change.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)


def motion_centres(rng, motion, count, strength, uniform):
    """`count` token ids of a clip with this motion (t,h,w): P(id) ~ exp(strength * motion), or, with probability `uniform`, the same for all."""
    p = np.exp(strength * motion.ravel())
    return rng.choice(p.size, count, p=(1 - uniform) * p / p.sum() + uniform / p.size)


def guide_masks(keep, pred, motion, specs, seed, step, first, strength, uniform=0.1, aspect=(0.75, 1.5), temporal_keep=1.0):
    """The masks (keep, pred) that sample_masks gave some rows of a step, moved to where these clips move: as many tokens of each kind and blocks of the
    same shape, but around centres from motion_centres, cut at the frame's edge by sliding inwards. motion (b,t,h,w); `first` is the global number of
    the first row: a clip's masks depend on it and on the clip, not on rank or micro-batch. Where blocks overlap more than
    the lengths allow, visible tokens are predicted too; context and predicted tokens are disjoint always."""
    moves, out = motion.double().cpu().numpy(), ([], [])
    grid = moves.shape[1:]
    for i, spec in enumerate(specs):
        function, arguments = parse_mask(spec)
        if function is not multiblock:
            raise DataError(f"mask {spec!r}: only blocks can be guided by motion")
        blocks, K, M = arguments.pop("blocks"), keep[i].shape[1], pred[i].shape[1]
        shape, orders = block_shape(np.random.default_rng([seed, step, i]), grid, **arguments, aspect=aspect), []
        for row, clip in enumerate(moves, first):
            rng, rank = np.random.default_rng([seed, step, i, 2, row]), np.zeros(grid)
            for centre in zip(*np.unravel_index(motion_centres(rng, clip, blocks, strength, uniform), grid)):
                start = [min(max(c - b // 2, 0), n - b) for c, b, n in zip(centre, shape, grid)]
                rank[tuple(slice(a, a + b) for a, b in zip(start, shape))] = 1
            rank = rank.ravel()
            rank[early_tokens(grid, temporal_keep) :] = 2  # visible, hidden, too late to be context: in this order, at random within each
            orders.append(np.argsort(rank + rng.random(rank.size)))
        order = np.stack(orders)
        for side, ids in zip(out, (order[:, :K], order[:, -M:])):
            side.append(torch.from_numpy(np.sort(ids, axis=1)).to(motion.device))
    return out


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


def index(layout: Literal["kinetics", "ssv2", "ucf", "folders"], root: str, out: str = "", annotations: str = "", labels: str = ""):
    """Make a list of 'path label' rows of a dataset as downloaded, and classes.txt beside it (line k, from 0, names label k).

    Videos that are annotated but not found under the root are counted and left out. kinetics and folders: a classes.txt that is there already is
    obeyed, so that the train and the val list number the classes alike.

    Args:
        layout: whose layout
        root: the folder that holds the videos, at any depth
        out: the list to write (default: LAYOUT.txt)
        annotations: kinetics: csv with label, youtube_id, time_start, time_end; ssv2: train.json; ucf: trainlist01.txt (classInd.txt beside it)
        labels: ssv2: labels.json
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    out, note = Path(out or f"{layout}.txt"), Path(annotations)
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
    if (folder / "pack.json").exists() and json.loads((folder / "pack.json").read_text("utf-8")) != encode:
        raise DataError(f"{out} was packed with other settings (see its pack.json); choose another folder")
    write(folder / "pack.json", json.dumps(encode))
    root, jobs = os.path.dirname(os.path.abspath(source.name)) + "/", {}
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


# --- the built-in world -----------------------------------------------------------------------------------------------------------------
# the built-in world: random numbers -> Scene (poses, sizes, textures) -> cast() (which object each pixel sees, and where) -> shade() (brightness)
#
# Axes are OpenCV's: x right, y down, z ahead. A pose is (R, p): world point = R @ local point + p. A pixel's ray is (x, y, 1) in camera
# coordinates, so the ray parameter of a hit *is* its depth. All that further labels need is in Scene and in what cast() returns: depth, poses,
# masks, boxes; flow and tracks by carrying a hit's object coordinates to another frame; stereo by a second camera beside the first.

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink")     # what the picture does; the camera does the opposite
PLANES, SPHERES, BOXES, WAVES = 2, 2, 2, 16  # per scene, in this order along the object axis O; waves per texture
SPLITS = {"train": 1 << 20, "probe": 2048, "val": 1024}             # clips; `probe` is what an online probe is fitted on, none is shared


@dataclass
class Scene:
    """n clips, T frames, O objects. Poses and textures are per object; lengths are in units of the wall's distance (about 1)."""
    R: object        # (n,T,3,3) camera to world
    p: object        # (n,T,3) camera position
    Ro: object       # (n,T,O,3,3) object to world; a plane is its z = 0
    po: object       # (n,T,O,3) object position
    size: object     # (n,O,3) half edges of a box, radius of a sphere (three times), ignored for planes
    wave: object     # (n,O,S,3) wave vectors of the texture in object coordinates, rad per unit
    phase: object    # (n,O,S)


def rotation(axis, angle):
    """axis (...,3), angle (...) in rad -> (...,3,3), right-handed (Rodrigues)."""
    x, y, z = np.moveaxis(axis / np.linalg.norm(axis, axis=-1, keepdims=True), -1, 0)
    c, s = np.cos(angle), np.sin(angle)
    rows = [[c + x * x * (1 - c), x * y * (1 - c) - z * s, x * z * (1 - c) + y * s],
            [y * x * (1 - c) + z * s, c + y * y * (1 - c), y * z * (1 - c) - x * s],
            [z * x * (1 - c) - y * s, z * y * (1 - c) + x * s, c + z * z * (1 - c)]]
    return np.stack([np.stack(np.broadcast_arrays(*r), -1) for r in rows], -2)


def product(a, b):
    """Matrix product (...,i,j) @ (...,j,k) in a fixed order of additions: unlike matmul, one clip's result cannot depend on the batch around it."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


class World:
    """Clips of a textured room with spheres and boxes, filmed by a moving camera; eight classes of motion (FWM-HW-LD, Table 6).

    Clip i is a function of (seed, split, i) and of nothing else. Its class is i mod 8, and all else is drawn without looking at the class; the camera
    is at its drawn pose half-way through the clip, so that no single frame tells the class. noise: standard deviation of pixel noise, in [0,1].
    shift, turn, zoom: range of the motion over a clip, in picture widths, degrees and as a factor; wobble: camera sway, picture widths.

    All textures have the same statistics and no colour. That is deliberate: whatever is constant in a clip and differs between clips is what masked
    prediction learns first, and with clips that differ in colour or pattern it learns colour and pattern, and in the minutes of a laptop no motion.
    """

    def __init__(self, split="train", seed=0, frames=8, size=32, noise=0.3, shift=(0.3, 0.6), turn=(50.0, 100.0), zoom=(1.6, 2.5), wobble=0.02, device="cpu"):
        self.split, self.seed, self.frames, self.size, self.noise, self.device = split, seed, frames, size, noise, device
        self.shift, self.turn, self.zoom, self.wobble = shift, turn, zoom, wobble      # over a clip: picture widths, degrees, factor; picture widths
        self.field = 0.6                                                               # half the picture's width at depth 1: 62 degrees

    def __len__(self):
        return SPLITS[self.split]

    @property
    def labels(self):
        return np.arange(len(self)) % len(MOTIONS)

    def scene(self, indices):
        """indices (n,) -> Scene of float64 arrays, and noise (n,T,H,W,3) uint8 or None. One generator per clip; the rest is elementwise."""
        n, T, O, S = len(indices), self.frames, PLANES + SPHERES + BOXES, WAVES
        rngs = [np.random.default_rng((self.seed, list(SPLITS).index(self.split), int(i))) for i in indices]
        uniform = np.stack([g.random(256) for g in rngs])
        normal = np.stack([g.standard_normal(512) for g in rngs])
        noise = np.stack([g.integers(0, 256, (T, self.size, self.size, 3), np.uint8) for g in rngs]) if self.noise else None
        used = {id(uniform): 0, id(normal): 0}

        def take(source, *shape):
            start = used[id(source)]
            used[id(source)] = start + math.prod(shape)
            assert used[id(source)] <= source.shape[1]
            return source[:, start:used[id(source)]].reshape(n, *shape)

        def between(low, high, *shape):
            return low + (high - low) * take(uniform, *shape)

        # time runs from -1/2 to 1/2 through 0 half-way; the pace may vary, but equally before and after
        s = (np.arange(T) - (T - 1) / 2) / max(1, T - 1)
        pace = s + between(-0.5, 0.5, 1) * np.sin(2 * np.pi * s) / (2 * np.pi)                                     # (n,T)
        wall = between(0.8, 1.25)                                                                                  # distance, (n,)
        width = 2 * self.field * wall                                                                              # of the picture, at the wall

        # camera: one of eight motions, and a slight sway that is the same for all
        kind = np.asarray(indices) % len(MOTIONS)
        sign = np.where(kind % 2 == 0, 1.0, -1.0)
        shift, turn, zoom = between(*self.shift), np.radians(between(*self.turn)), np.log(between(*self.zoom))
        move = np.stack([(kind // 2 == 0) * sign * shift * width, (kind // 2 == 1) * sign * shift * width], -1)    # picture to the left = camera to the right
        ahead = wall[:, None] * (1 - np.exp(-((kind // 2 == 3) * sign * zoom)[:, None] * pace))
        local = np.concatenate([move[:, None] * pace[..., None], ahead[..., None]], -1)                            # (n,T,3), in the camera's axes
        sway = between(0, 2 * np.pi, 1, 3) + 2 * np.pi * between(0.5, 1, 1, 3) * s[:, None]
        local = local + self.wobble * width[:, None, None] * (np.sin(sway) - np.sin(sway.mean(1, keepdims=True)))
        start = rotation(np.array([0.0, 0.0, 1.0]), between(0, 2 * np.pi))                                         # (n,3,3): the floor may be anywhere
        roll = rotation(np.array([0.0, 0.0, -1.0]), ((kind // 2 == 2) * sign * turn)[:, None] * pace)
        R, p = product(start[:, None], roll), product(start[:, None], local[..., None])[..., 0]

        # wall and floor (or ceiling, or side wall: `start` decides), then objects between camera and wall, some outside the picture
        tilt = rotation(take(normal, 2, 3) * [1, 1, 0.01], between(0, 0.45, 2))
        upright = rotation(np.array([1.0, 0, 0]), np.pi / 2)
        tilt[:, 1] = product(tilt[:, 1], upright[None])
        zero = np.zeros_like(wall)
        points = np.stack([np.stack([zero, zero, wall], -1), np.stack([zero, between(0.4, 1.0) * wall, zero], -1)], 1)
        M = SPHERES + BOXES
        depth = between(0.45, 0.85, M) * wall[:, None]
        place = np.concatenate([between(-1.4, 1.4, M, 2) * self.field * depth[..., None], depth[..., None]], -1)
        velocity = take(normal, M, 3) * 0.06 * wall[:, None, None]
        spin = rotation(take(normal, 1, M, 3), between(0, 2 * np.pi, M)[:, None] + between(-1, 1, M)[:, None] * s[:, None])        # (n,T,M,3,3)
        po = np.concatenate([np.broadcast_to(points[:, None], (n, T, 2, 3)), place[:, None] + velocity[:, None] * s[:, None, None]], 2)
        Ro = np.concatenate([np.broadcast_to(tilt[:, None], (n, T, 2, 3, 3)), spin], 2)
        radius = between(0.12, 0.4, M)[..., None] * depth[..., None] * self.field
        edges = radius * np.concatenate([np.ones((n, SPHERES, 3)), between(0.5, 1.0, BOXES, 3)], 1)
        size = np.concatenate([np.ones((n, 2, 3)), edges], 1)

        # textures: isotropic waves over five octaves, alike in all clips; only directions and phases are drawn (class World says why). Their lengths
        # reach beyond the picture and below a pixel, so that a texture looks alike at every scale and a frame does not tell that it was zoomed
        length = np.repeat([1.6, 1.2], [PLANES, M]) * width[:, None]                                              # the longest wave, (n,O)
        direction = take(normal, O, S, 3)
        step = 2.0 ** (5 / S * np.arange(S))
        wave = 2 * np.pi * step[:, None] / length[..., None, None] * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
        return Scene(R, p, Ro, po, size, wave, between(0, 2 * np.pi, O, S)), noise

    def cast(self, scene):
        """Scene -> depth (n,T,H,W), object id (n,T,H,W), and the tables of the rays in object coordinates: turn (n,T,O,3,3), eye (n,T,O,3).

        The hit of ray (x,y,1) on object o, in the object's own coordinates, is eye[o] + depth * turn[o] @ (x,y,1).
        """
        back = scene.Ro.swapaxes(-1, -2)
        turn = self.tensor(product(back, scene.R[:, :, None]))
        eye = self.tensor(product(back, (scene.p[:, :, None] - scene.po)[..., None])[..., 0])
        x = self.pixels()
        half = self.tensor(scene.size)
        plane, sphere, box = slice(0, PLANES), slice(PLANES, PLANES + SPHERES), slice(PLANES + SPHERES, None)
        ray = lambda m: (m[..., 0, None, None] * x + m[..., 2, None, None]) + m[..., 1, None, None] * x[:, None]    # (...,3) -> (...,H,W): m . (x,y,1)
        grow = lambda v: v[..., None, None]

        t_plane = -grow(eye[:, :, plane, 2]) / ray(turn[:, :, plane, 2])

        e, r = eye[:, :, sphere], half[:, None, sphere, 0]
        b = ray((turn[:, :, sphere] * e[..., None]).sum(-2))
        a = x * x + x[:, None] * x[:, None] + 1
        root = b * b - a * grow((e * e).sum(-1) - r * r)
        t_sphere = torch.where(root > 0, -(b + root.clamp_min(0).sqrt()) / a, math.inf)

        e, h = eye[:, :, box], half[:, None, box]
        inverse = 1 / ray(turn[:, :, box])                                                                         # (n,T,boxes,3,H,W)
        centre, reach = -grow(e) * inverse, grow(h) * inverse.abs()
        near, far = (centre - reach).amax(3), (centre + reach).amin(3)
        t_box = torch.where(near < far, near, math.inf)

        t = torch.cat([t_plane, t_sphere, t_box], 2)
        depth, id = torch.where(t > 0.02, t, math.inf).min(2)
        return depth.clamp_max(50), id, turn, eye

    def shade(self, scene, depth, id, turn, eye):
        """What cast() returned -> brightness (n,T,H,W) in [0,1] before noise. A wave fades where its period spans four to two pixels."""
        n, T, O, S = *turn.shape[:3], WAVES
        x, wave = self.pixels(), self.tensor(scene.wave)
        # phase of wave k at the hit: k.(eye + depth*turn@(x,y,1)) + phase; its four coefficients are the same for all pixels of an object
        along = (wave[:, None, :, :, :, None] * turn[:, :, :, None]).sum(-2)                                       # (n,T,O,S,3)
        at_eye = (wave[:, None] * eye[:, :, :, None]).sum(-1) + self.tensor(scene.phase)[:, None]                  # (n,T,O,S)
        still = lambda v: self.tensor(v)[:, None].expand(n, T, *v.shape[1:])
        table = [along[..., 0], along[..., 1], along[..., 2], at_eye, still(np.sqrt((scene.wave ** 2).sum(-1))), turn, eye, still(scene.size)]
        table = torch.cat([v.reshape(n * T * O, -1) for v in table], 1).T.contiguous()                             # (values, n*T*O)
        row = id + O * torch.arange(n * T, device=id.device).view(n, T, 1, 1)
        kx, ky, k1, k0, number, turn, eye, size = table.index_select(1, row.flatten()).view(-1, *id.shape).split([S] * 5 + [9, 3, 3])

        xt, yt = depth * x, depth * x[:, None]
        hit = [eye[i] + turn[3 * i] * xt + turn[3 * i + 1] * yt + turn[3 * i + 2] * depth for i in range(3)]       # in object coordinates
        side = [(h / s).abs() for h, s in zip(hit, size)]
        top = torch.maximum(torch.maximum(side[0], side[1]), side[2])
        flat, ball = id < PLANES, (id >= PLANES) & (id < PLANES + SPHERES)
        normal = [torch.where(ball, h / s, (a == top) * h.sign()) for h, s, a in zip(hit, size, side)]
        normal = [torch.where(flat, float(i == 2), v) for i, v in enumerate(normal)]
        away = [turn[3 * i] * x + turn[3 * i + 1] * x[:, None] + turn[3 * i + 2] for i in range(3)]
        dot = lambda a, b: a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
        slant = dot(normal, away).abs() / dot(away, away).sqrt()
        pixel = depth * (2 * self.field / self.size) / slant.clamp_min(0.02)                                       # what a pixel covers of the surface, units
        fade = (2 - number * pixel * (2 / math.pi)).clamp(0, 1)
        value = 0.65 * ((kx * xt + ky * yt + k1 * depth + k0).sin_() * fade).sum(0)
        return 0.5 + 0.45 * value / (1 + value.abs())                                                              # soft threshold

    def pixels(self):
        """Camera coordinates at depth 1 of the pixel centres of a row (and of a column), (size,)."""
        return self.tensor((np.arange(self.size) + 0.5) / self.size * 2 - 1) * self.field

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def render(self, indices):
        """indices (n,) -> {"video": (n,T,H,W,3) uint8, "label": (n,) int64}, the same for a clip whatever else is in the batch."""
        indices = np.asarray(indices)
        scene, noise = self.scene(indices)
        at_once = 1 if self.device == "cpu" else 64                 # one clip fits the cache of a core, which is ten times faster than a batch
        parts = []
        for i in range(0, len(indices), at_once):
            part = Scene(**{f.name: getattr(scene, f.name)[i:i + at_once] for f in fields(Scene)})
            video = self.shade(part, *self.cast(part)).mul_(255)[..., None].repeat(1, 1, 1, 1, 3)
            if self.noise:                                          # uniform, of the right deviation
                video += (self.tensor(noise[i:i + at_once]) - 127.5) * (self.noise * math.sqrt(12))
            parts.append(video.round_().clamp_(0, 255).to(torch.uint8))
        return {"video": torch.cat(parts).cpu(), "label": torch.from_numpy(indices % len(MOTIONS))}


# --- end of the world --------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
