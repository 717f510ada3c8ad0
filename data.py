"""Video in, training batches out: lists, decoding, sampling, masks, and a built-in world.

    python data.py index kinetics|ssv2|ucf|folders|frames ROOT --out train.txt    # 'path label'
    python data.py index scannet|davis|sintel|... ROOT --out train.txt     # with their dense labels
    python data.py check train.txt                       # read every file, report what is wrong
    python data.py pack train.txt packed/ --short_side 256 --fps 7.5     # re-encode for speed (10x)
    python data.py pack --help                           # the flags of a command

Sample g of a run (g counts clips from the first step on) is a pure function of (seed, g): which
video, which frames, which crop, flipped or not, and what replaces a damaged video. Ranks and
workers only divide the g among themselves, so a run reads the same clips on any machine.

A frame is the frame that was asked for, or the file counts as unreadable: see Video.

Letters: B clips, T frames, H,W pixels; t,h,w token grid, N = t*h*w; K kept, M predicted tokens;
token id = (ti*h + hi)*w + wi.
"""
import csv
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zlib
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from multiprocessing import active_children, get_context
from pathlib import Path
from time import perf_counter
from typing import Literal


if __name__ == "__main__" and sys.argv[1:] in (["-h"], ["--help"]):
    print(__doc__)  # before torch: it is instant
    sys.exit()

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

VIDEOS = set(
    ".mp4 .m4v .mov .3gp .mkv .webm .avi .wmv .flv .gif .mpg .mpeg .vob .ts .mts .m2ts".split())
# read as a video of one frame, and repeated into a still clip
IMAGES = set(".jpg .jpeg .png .webp .bmp".split())
# what systems leave in folders
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
# so many damaged videos in a row end the run: at 10 % damage that never happens by chance (1e-20)
ATTEMPTS = 20
# larger frames count as damage: one of 8192x8192 takes a decoder of six gigabytes (8K has 33)
MAX_MEGAPIXELS = 36
# decoded frames that a process holds at a time
PIECE_BYTES = 2**27
# what this process has said: each bad video and each kind of note once
TOLD = set()
# notes of a loader process that the main one is to say
UNSAID = {}
# what the loader processes of this process read: (workers, 4096) bytes, see say
WATCHED = []
# in a loader process, its row of that
READING = []
# files that killed or hung a loader process, in a run that goes on: not opened again
POISON = set()
# what tells a run to save and leave; by name, as Windows lacks two
SIGNALS = {s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")}


class DataError(ValueError):
    """What the user must mend, in one line. Scripts print it and exit with status 2."""


# --- lists ----------------------------------------------------------------------------------------

@dataclass
class Paths:
    """Absolute paths that share one buffer of bytes: Python strings would take 0.16 GB a million
    rows in *each* process, as a process that counts references to them cannot share their memory.
    """
    root: str  # what relative ones start at
    text: bytes
    spans: np.ndarray  # (n,2) where each lies in `text`

    @classmethod
    def of(cls, paths):
        """From a list of str."""
        encoded = [*map(os.fsencode, paths)]
        ends = np.cumsum([0, *map(len, encoded)])
        return cls("/", b"".join(encoded), np.stack([ends[:-1], ends[1:]], 1))

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """The absolute path, a str. (IndexError behind the last: that ends a loop over them.)"""
        return os.path.normpath(os.path.join(self.root, self.written(i)))

    def written(self, i):
        """As it stands in the list."""
        start, end = self.spans[i]
        return os.fsdecode(self.text[start:end])


@dataclass
class Source:
    """One list. `labels` is int64, -1 where a row has none. The world has labels and no paths."""
    name: str
    paths: Paths
    labels: np.ndarray
    weight: float | None = None  # share of the samples drawn from it; None: by its length
    split: str = ""  # which clips of the built-in world; "" for files
    classes: tuple = ()  # name of each label, where they have names
    facts: np.ndarray | None = None  # (n,2) bytes and time of each file, where it was looked up
    dataset: object = None  # gives the videos, instead of files (of_dataset)

    def __len__(self):
        return len(self.labels)

    def path(self, row):
        """Where it lies, or what it is called."""
        if self.split:
            return f"world/{self.split}/{row}"
        return self.paths[row] if len(self.paths) else f"{self.name}/{row}"


def parse_list(spec, split="train", labelled=False, look=True):
    """Read `spec` = PATH or PATH:WEIGHT, and check every row before any model is built.

    PATH: a text file of rows `path label` (the label, an integer or a class name, follows the last
    blank; a row may have none); a comma-separated file whose header names the columns `path` and,
    if labelled, `label`; a folder (each sub-folder is a class; if there are none, unlabelled); one
    video; a pattern, 'videos/*.mp4'; or the word "world" (its clips of this `split`). Relative
    paths start at the list's folder and stay inside it. A folder of numbered images is one video.
    labelled=True refuses unlabelled rows; look=False does not look for the files. Raises DataError,
    as `file:line: what is wrong`.
    """
    name, weight = split_weight(str(spec))
    if name == "world":
        labels = np.arange(SPLITS[split]) % len(MOTIONS)
        return Source("world", [], labels, weight, split, MOTIONS)
    found = [name]
    if not os.path.exists(name):  # it may have a bracket
        found = sorted(glob.glob(name, recursive=True)) or found
    if videos := [path for path in map(Path, found) if is_video(path)]:
        source = unlabelled(name, videos)
        if others := [path for path in found if not is_video(Path(path))]:
            warn(f"note: {name} also matches {others[0]}, which is no video and left out")
    elif os.path.isdir(name):
        source = folder_source(name)
    else:
        source = file_source(name)
    source.weight = weight
    if not len(source):
        raise DataError(f"{name}: there is no video in it")
    check_rows(source, labelled)
    if look:
        source.facts = file_facts(source)
    return source


def of_dataset(dataset, labels=None, weight=None, name="dataset"):
    """Any dataset as a source: dataset[row] is a video, uint8 (n,H,W,3), an array or a tensor, of
    which clips are cut as from a file of n frames. labels: an integer for each row."""
    labels = np.full(len(dataset), -1) if labels is None else np.asarray(labels, np.int64)
    return Source(name, [], labels, weight, dataset=dataset)


def split_weight(spec):
    """'LIST:0.5' -> ('LIST', 0.5)"""
    name, colon, tail = spec.rpartition(":")
    if not colon or os.path.exists(spec):
        return spec, None
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{spec}: no such file or folder (a weight, as in LIST:0.5, must be a "
                        "positive number)")
    return name, weight


def unlabelled(name, found):
    """These files as a source, by their paths from the folder that holds them all."""
    folders = [os.path.dirname(os.path.abspath(path)) for path in found]
    root = os.path.commonpath(folders or ["/"])
    paths = Paths.of(os.path.relpath(path, root) for path in found)
    paths.root = root
    return Source(name, paths, np.full(len(found), -1))


def folder_source(name):
    """Each sub-folder with videos is a class, in the order of their names; without any, the
    folder's own videos, unlabelled."""
    root = Path(os.path.abspath(name))
    found = [*media(root)]
    loose = [path for path in found if path.parent == root]
    if loose == found:
        return unlabelled(name, found)
    if loose:
        warn(f"note: {len(loose)} videos beside the class folders are left out, {loose[0]} first")
    found = [path for path in found if path.parent != root]
    source = unlabelled(name, found)
    groups = [path.relative_to(root).parts[0] for path in found]
    names, source.labels = np.unique(groups, return_inverse=True)
    source.classes = tuple(names.tolist())
    return source


def entries(folder):
    """What a person sees in a folder, sorted: no hidden files and nothing that systems leave."""
    found = sorted(folder.iterdir())
    return [path for path in found if path.name[0] != "." and path.name not in JUNK]


def media(folder, *above):
    """The videos below a folder, at any depth; a folder of numbered images is one. above: the
    folders that hold it, to which no link may lead back."""
    above = (*above, folder)
    for path in entries(folder):
        if is_video(path):
            yield path
        elif path.is_dir():
            if any(path.samefile(other) for other in above):
                raise DataError(f"{path} leads back to {path.resolve()}, which holds it")
            yield from media(path, *above)


def is_video(path):
    if path.is_dir():
        return bool(numbered_images(path))
    return suffix_of(path) in VIDEOS | IMAGES and path.is_file()


@lru_cache(maxsize=64)
def numbered_images(folder):
    """The images of a folder that holds one video: two or more, whose names differ by a number that
    rises in even steps, and nothing else. Else an empty tuple."""
    found = {}
    heads = set()
    for path in entries(folder):
        match = re.fullmatch(r"(.*?)(\d+)", path.stem)
        if not match or suffix_of(path) not in IMAGES:
            return ()
        heads.add((match[1], path.suffix))
        found[int(match[2])] = path
    if len(heads) != 1 or len({*np.diff(sorted(found))}) != 1:
        return ()
    return tuple(found[number] for number in sorted(found))


def file_source(name):
    """A list file."""
    try:
        text = Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf")
        if b"\n" not in text:
            # line ends of old Macs
            text = text.replace(b"\r", b"\n")
        first_line = text.decode().partition("\n")[0]
    except OSError as error:
        raise DataError(f"{name}: cannot read the list ({error.strerror}; the built-in world is "
                        "called world)") from None
    except UnicodeDecodeError:
        raise DataError(f"{name}: not a text file in UTF-8; a list has rows of 'path label'") \
            from None
    header = [column.strip().strip('"').lower() for column in first_line.split(",")]
    if "youtube_id" in header or text.lstrip()[:1] in (b"[", b"{"):
        raise DataError(f"{name}: an annotation file, not a list; make one with: python data.py "
                        f"index kinetics|ssv2 ROOT --annotations {name}")
    rows = plain_rows(text)
    if "path" in header:
        text, rows = table_rows(text)
    spans = array("q")
    labels = array("q")
    texts = {}
    for start, path, word in rows:
        label = -1
        if word.isdigit():
            label = min(int(word[:19]), 2**53)
        elif word:
            texts[len(labels)] = word.decode()
        spans.extend((start, start + len(path)))
        labels.append(label)
    root = os.path.dirname(os.path.abspath(name))
    paths = Paths(root, text, np.array(spans).reshape(-1, 2))
    source = name_classes(Source(name, paths, np.array(labels)), texts)
    check_paths(source)
    return source


def plain_rows(text):
    """(where it starts, path, label) of rows `path label`. Only after a file name can a word be a
    class name, as paths may hold blanks."""
    # rows without the blanks around them, and no empty ones
    for line in re.finditer(rb"\S(.*\S)?", text):
        row = line[0]
        path, word = (row.rsplit(None, 1) + [b""])[:2]
        if not word.isdigit() and (is_file_name(word) or not is_file_name(path)):
            path = row
            word = b""
        yield line.start(), path, word


def is_file_name(word):
    return suffix_of(word.decode()) in VIDEOS | IMAGES


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def table_rows(text):
    """The same of a comma-separated file with a header, and a text that has nothing but the paths,
    each in its own line."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text.decode().splitlines(keepends=True), skipinitialspace=True)
    reader.fieldnames = [column.strip().lower() for column in reader.fieldnames]
    paths = bytearray()
    rows = []
    line = 1
    for row in reader:
        paths += b"\n" * (reader.line_num - line)
        line = reader.line_num
        path = (row["path"] or "").strip().encode()
        rows.append((len(paths), path, (row.get("label") or "").strip().encode()))
        paths += path
    return bytes(paths), rows


def name_classes(source, texts):
    """Labels by name: those of classes.txt beside the list, else in alphabetical order."""
    source.classes = class_names(source.name)
    if texts and not source.classes:
        source.classes = tuple(sorted(set(texts.values())))
    number = {word: k for k, word in enumerate(source.classes)}
    numbered = (source.labels != -1).any()
    for row, word in texts.items():
        if numbered or word not in number or re.fullmatch(r"[+-]?[\d.,]+", word):
            raise DataError(f"{where(source, row)}: label {word!r} is neither an integer from 0 on "
                            "nor a name (all labels are numbers or all are names; if classes.txt "
                            "lies beside the list, it has them all)")
        source.labels[row] = number[word]
    return source


def class_names(name):
    """Those of classes.txt beside a list; none without."""
    beside = Path(name).with_name("classes.txt")
    if not beside.is_file():
        return ()
    return tuple(beside.read_text("utf-8-sig", "backslashreplace").splitlines())


def where(source, row):
    """`file:line` of a row, for messages."""
    if os.path.isdir(source.name):
        return os.path.dirname(source.paths[row])
    start, _ = source.paths.spans[row]
    return f"{source.name}:{source.paths.text.count(10, 0, start) + 1}"


def check_paths(source):
    """Refuse rows that name no file below the list's folder."""
    starts, ends = source.paths.spans.T
    marks = [mark.start() for mark in re.finditer(rb"://|\.\.|\0", source.paths.text)]
    suspicious = np.searchsorted(starts, marks, side="right") - 1
    root = source.paths.root.rstrip("/") + "/"
    for row in np.union1d(np.flatnonzero(ends <= starts), suspicious.clip(0)):
        path = source.paths.written(row)
        if not path or "\0" in path:
            raise DataError(f"{where(source, row)}: no path in this row")
        if "://" in path:
            raise DataError(f"{where(source, row)}: {path!r} is a URL; download it first")
        if not os.path.isabs(path) and not source.paths[row].startswith(root):
            raise DataError(f"{where(source, row)}: {path!r} leads out of the list's folder; write "
                            "it as an absolute path if that is meant")


def check_rows(source, labelled):
    """Refuse labels that are missing or out of range."""
    bad = source.labels >= 2**31
    if labelled:
        bad |= source.labels == -1
    if not bad.any():
        return
    row = bad.argmax()
    label = source.labels[row]
    wrong = f"label {label} is out of range (labels run from 0 to the last class)"
    if label == -1:
        wrong = "no label, and this task needs one (a row is 'path label')"
    raise DataError(f"{where(source, row)}: {wrong}")


def file_facts(source):
    """Bytes of each file (of a folder of numbered images, how many they are) and when it was
    changed (n,2)."""
    parts = np.array_split(range(len(source)), 1 + len(source) // 4096)
    # network file systems answer slowly, but several at a time
    with ThreadPoolExecutor(16) as pool:
        facts = np.concatenate([*pool.map(partial(look, source.paths), parts)])
    missing = facts[:, 0] < 0
    if missing.any():
        row = missing.argmax()
        path = source.paths[row]
        kind = "a directory without numbered images:" if os.path.isdir(path) else "no file"
        raise DataError(f"{where(source, row)}: {kind} {path!r} (a row is 'path label'; "
                        "comma-separated files need a header with 'path')")
    return facts


def look(paths, rows):
    """file_facts of these rows; -1 bytes where there is nothing."""
    facts = []
    for path in map(paths.__getitem__, rows):
        try:
            found = os.stat(path)
        except OSError:
            facts.append((-1, 0))
            continue
        size = found.st_size if stat.S_ISREG(found.st_mode) else -1  # a pipe would never end
        changed = found.st_mtime_ns
        if stat.S_ISDIR(found.st_mode):
            images = numbered_images(Path(path))
            size = len(images) or -1
            for image in images[-1:]:  # written over, it leaves the folder's own time as it was
                if image.exists():
                    changed = max(changed, os.stat(image).st_mtime_ns)
        facts.append((size, changed))
    return np.array(facts)


def match_classes(train, val):
    """Two sources with labels from 0 to C-1 for the C classes that occur in either: by name where
    both have names, else by number. Classes of one side only are named on stderr."""
    named = train.classes and val.classes
    keys = []
    for source in (train, val):
        most = source.labels.max(initial=-1)
        if named and most >= len(source.classes):
            raise DataError(f"{where(source, source.labels.argmax())}: label {most} is out of "
                            f"range: classes.txt beside it names {len(source.classes)} classes")
        used = np.unique(source.labels[source.labels >= 0]).tolist()
        # two labels may have one name
        keys.append({k: source.classes[k] if named else k for k in used})
    known = [*dict.fromkeys(chain(*(mine.values() for mine in keys)))]
    number = {key: k for k, key in enumerate(known)}
    names = dict(enumerate(train.classes or val.classes))
    classes = tuple(names.get(key, str(key)) for key in known)
    matched = []
    for side, source, mine, other in (("train", train, *keys), ("val", val, *keys[::-1])):
        alone = [str(key) for key in mine.values() if key not in other.values()]
        if alone:
            warn(f"note: {len(alone)} of {len(known)} classes occur in {side} only: "
                 f"{', '.join(alone[:10])}")
        old = [-1, *mine]
        new = np.array([-1] + [number[key] for key in mine.values()])
        labels = new[np.searchsorted(old, source.labels)]
        matched.append(replace(source, labels=labels, classes=classes))
    return matched


def fingerprint(sources):
    """Hashes of what the sources hold: "data_hash" of the lists' text, labels, and bytes of each
    file, so that a changed list or a replaced video is noticed, and a copy elsewhere
    is not; "data_times" of when the files were changed."""
    digest = hashlib.sha256()
    times = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.weight, source.split)).encode() + source.labels.tobytes())
        if not len(source.paths):
            continue
        sizes, changed = file_facts(source).T if source.facts is None else source.facts.T
        digest.update(sizes.tobytes())
        times.update(changed.tobytes())
        digest.update(source.paths.text)
    return {"data_hash": digest.hexdigest()[:32], "data_times": times.hexdigest()[:32]}


# --- files ----------------------------------------------------------------------------------------

@dataclass
class Clip:
    """How clips are cut from videos. Frames are `stride` apart, or 1/`fps` seconds apart when `fps`
    is given (then by time stamps, so that lists of different frame rates, and packed ones, mix)."""
    frames: int = 16
    stride: int = 4
    fps: float | None = None
    size: int = 224  # pixels of the square the model sees
    scale: tuple = (0.3, 1.0)  # area of the random crop, as a share of the frame
    ratio: tuple = (0.75, 1.35)  # its width / height, log-uniform
    zoom: float = 0.0  # > 0: instead, a square anywhere, as large as the short side / zoom (4DS)
    flip: bool = True
    # False: no randomness; clips centred in `segments` equal parts of the video, crops by `views`
    train: bool = True
    # a video shorter than the clip: "repeat" its last frame, "loop" it, "spread" the clip's frames
    # evenly over it, or "error" (treated as damaged)
    short: str = "repeat"
    clips: int = 1  # training: so many from each opened video, in one window (in_one_window)
    segments: int = 1  # evaluation: clips per video, spread over its length
    # evaluation: 1 = centre square of 224/256 of the short side; 3 = the whole short side at left,
    # centre, right
    views: int = 1

    def __post_init__(self):
        for name in "frames stride size clips segments views".split():
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise DataError(f"fps must be a positive number, not {self.fps}")
        if not (self.zoom == 0 or 1 <= self.zoom < math.inf):
            raise DataError(f"zoom must be 0 or at least 1, not {self.zoom}")
        if self.short not in ("repeat", "loop", "spread", "error"):
            raise DataError(f"short must be repeat, loop, spread or error, not {self.short!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"crop scale {self.scale} must rise inside (0, 1], ratio {self.ratio} "
                            "must rise and be positive")


CONTROL = {*range(32)} - {9, 10, 13}  # bytes that stand in no text, and at the head of all videos


def import_torchcodec():
    """Imported late: the built-in world needs neither torchcodec nor FFmpeg."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError("reading video needs torchcodec and FFmpeg 4 to 8: `pip install -r "
                        "requirements.txt` and `apt-get install -y ffmpeg` "
                        f"({reason(error)[:80]}); the built-in world needs neither") from None
    return torchcodec.decoders


def open_video(path):
    """A decoder of `path`, frames uint8 (H,W,3). It seeks by the header's frame rate: the packets
    of a long file are not read to find out where a frame lies. (Video checks where it landed.)
    Opened where it is used: a decoder must not cross a fork or be shared by threads."""
    source = path
    mode = "approximate"
    with open(path, "rb") as file:
        head = file.read(64)
        # FFmpeg cannot go back to the start of a jpg by name, of its bytes it can
        if suffix_of(path) in IMAGES:
            source = head + file.read()
            mode = "exact"
    if head and (not CONTROL & {*head} or head.startswith((b"#EXTM3U", b"ffconcat"))):
        # playlists and scripts of FFmpeg's lead to other files, and some never end
        raise ValueError("a text file, not a video")
    make = partial(
        import_torchcodec().VideoDecoder, source, dimension_order="NHWC", num_ffmpeg_threads=1)
    try:
        decoder = make(seek_mode=mode)
    except ValueError:  # its header gives no duration, as a recording that was broken off
        decoder = make(seek_mode="exact")
    meta = decoder.metadata
    if (meta.width or 0) * (meta.height or 0) > 1e6 * MAX_MEGAPIXELS:
        raise ValueError(f"frames of {meta.width}x{meta.height} are over the limit of "
                         f"{MAX_MEGAPIXELS} megapixels (data.MAX_MEGAPIXELS)")
    tell(losses(path, meta))
    return decoder


def tell(notes):
    """Notes {kind: text} on stderr, a kind once. A loader process leaves them to the main one, with
    its next batch."""
    if READING:
        UNSAID.update(notes)
        return
    for kind in notes.keys() - TOLD:
        TOLD.add(kind)
        warn(f"note: {notes[kind]}, as others may be")


def warn(text):
    print(text, file=sys.stderr)


def losses(path, meta):
    """{kind: text} of what 8 bits of three colours leave out of a file with this metadata."""
    pixels = meta.pixel_format or ""
    aspect = float(meta.pixel_aspect_ratio or 1)
    found = {}
    if re.search(r"\d[lb]e$", pixels) and not re.match(r"(rgb|bgr)(444|5)", pixels):
        found["depth"] = f"{path} has over 8 bits a channel, of which the upper 8 are read"
    if re.match(r"yuva|gbrap|ya\d|rgba|argb|bgra|abgr", pixels):
        found["alpha"] = f"{path} is transparent in places, which is read as opaque"
    if not is_sane(aspect):
        found["aspect"] = (f"{path} announces pixels {aspect:.3g} times as wide as high, which are "
                           "read as square")
    return found


def is_sane(aspect):
    """Can pixels be so many times as wide as high? A header that says more than 4 says nonsense."""
    return 0.25 <= aspect <= 4


def sequence(decoder):
    """(frame uint8 (H,W,3), when it is shown, for how long) of one frame after the other, without
    any seek but one before."""
    following = torch.ops.torchcodec_ns.get_next_frame
    while True:
        try:
            frame, time, duration = following(decoder._decoder)
        except IndexError:
            return
        yield frame, time.item(), duration.item()


class Video:
    """An open video file, whose frames are asked for by number or by time. Where the frame rate
    varies and no index says how, numbers count ticks of the mean rate as long as these fit.

    A seek may land anywhere (in transport streams half of them land late), and headers lie. So the
    time stamps that come back are compared with those that were asked for; where they differ, the
    frames are found by decoding from a place before them, in the end from the file's start.
    """

    def __init__(self, path):
        self.path = path
        self.decoder = open_video(path)
        meta = self.decoder.metadata
        # width / height of a stored pixel as it is shown
        aspect = float(meta.pixel_aspect_ratio or 1)
        self.pixel_aspect = aspect if is_sane(aspect) else 1.0
        if (meta.rotation or 0) % 180:
            self.pixel_aspect = 1 / self.pixel_aspect
        self.pixels = (meta.width or 0) * (meta.height or 0)
        begin = float(meta.begin_stream_seconds or 0)
        end = float(meta.end_stream_seconds or 0)
        if not meta.average_fps or not end > begin:
            raise ValueError("its header gives no frame rate or no duration")
        # seconds from frame to frame
        self.tick = 1 / meta.average_fps
        # when each frame is shown, where that is irregular and known: else begin + number * tick
        self.times = None
        self.lasts(begin, end)
        # else the end may be that of the sound
        self.counted = meta.num_frames_from_header is not None
        self.slow = False  # was a frame not where a seek looked for it?
        with open(path, "rb") as file:
            head = file.read(12)  # names of files lie, too
        if head[4:8].isalpha():
            self.know(mp4_times(path, self.decoder.stream_index))
        # Does every time stamp after a seek mislead? In MPEG program streams only some packets have
        # one, and from a seek to the next of these they are guessed. B-frames in AVI have none, and
        # all frames are told one late
        self.lies = head[:4] == b"\0\0\1\xba"
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            _, first, _ = next(sequence(open_video(path)), (None, 0, 0))
            self.lies = first > self.begin + self.tick / 2

    def know(self, times):
        """times (n,) in seconds, or None."""
        if times is not None and len(times) > 1:
            self.times = times - times[0] + self.begin
            self.frames = len(times)

    def by_number(self, ids):
        """Frames ids (n,) -> uint8 (n,H,W,3), stamps (n,): equal for one frame given twice."""
        if not self.lies:
            for find in (self.seek, self.walk):
                frames, times, durations = find(self.middle(ids))
                if self.are(ids, times, durations):
                    return frames, times
            if self.times is None:
                self.know(packet_times(self.path, self.decoder.stream_index))
                if self.times is not None:
                    raise Recount
        return self.count(ids)

    def by_time(self, seconds):
        """The same of what is shown at these seconds (n,) after the first frame."""
        if self.lies:
            return self.count(np.floor((seconds + 1e-3) / self.tick).astype(int))
        # 1 ms late: a time that falls on a frame's start must not slip into the frame before (mkv
        # rounds time stamps to 1 ms)
        asked = self.begin + seconds + 1e-3
        frames, times, durations = self.seek(asked)
        shown = (times <= asked + 1e-6) & (asked < times + durations + 1e-3)
        if not shown.all():
            frames, times, _ = self.walk(asked)
        return frames, times

    def middle(self, ids):
        """A moment at which each of these frames is shown."""
        if self.times is None:
            return self.begin + (ids + 0.5) * self.tick
        ends = np.append(self.times[1:], self.times[-1] + self.tick)
        return (self.times[ids] + ends[ids]) / 2

    def are(self, ids, times, durations):
        """Are what came back the frames ids? By a mean rate also how long each is shown must fit:
        in a part of a video of twice the rate every second frame comes at the time asked for."""
        if self.times is not None:
            return np.abs(times - self.times[ids]).max() < 2e-3
        late = np.abs(times - self.begin - ids * self.tick).max() > self.tick / 2
        odd = (durations > 0) & (np.abs(durations / self.tick - 1) > 0.5)
        return not late and not odd.any()

    def seek(self, asked):
        """What the decoder gives for these moments (n,), right or not -> frames, when each is
        shown, for how long. A moment that it fails at is infinitely late."""
        last = self.begin + self.seconds - 1e-4
        try:
            found = self.decoder.get_frames_played_at(np.clip(asked, self.begin, last).tolist())
        except (RuntimeError, IndexError):
            return None, np.full(len(asked), math.inf), np.zeros(len(asked))
        return found.data, found.pts_seconds.numpy(), found.duration_seconds.numpy()

    def walk(self, asked, counting=False):
        """The same by decoding all frames from a place before the first of them.

        After a seek a decoder may leave out frames that lean on others before it. So where frames
        are missing it starts earlier, until that changes nothing. counting: all from the first on,
        shown when their number says.
        """
        self.slow = True
        moments, places = np.unique(asked, return_inverse=True)
        before = None
        for margin in (3 * self.tick, 1.0, 10.0, math.inf):
            decoder = open_video(self.path)
            start = self.begin if counting else moments[0] - margin
            if start > self.begin:
                torch.ops.torchcodec_ns.seek_to_pts(decoder._decoder, start)
            frames = self.numbered(decoder) if counting else sequence(decoder)
            found, whole = self.last_before(moments, frames, start <= self.begin)
            times = [time for _, time, _ in found]
            if found and (whole or times == before or start <= self.begin):
                break
            before = times
        if not found:
            raise ValueError("it holds no frame")
        frames, times, durations = zip(*found)
        return torch.stack(frames)[places], np.array(times)[places], np.array(durations)[places]

    def last_before(self, moments, frames, from_start):
        """What is shown at each of these rising moments, nothing where the frames begin later; and
        whether none seems to be missing there."""
        found = []
        whole = True
        shown = None
        for frame in frames:
            _, time, _ = frame
            while len(found) < len(moments) and time > moments[len(found)]:
                if shown is None and time > self.begin + 1e-3:
                    if from_start:  # a recording that begins between two key frames
                        self.lasts(time, self.begin + self.seconds)
                        raise Recount
                    return [], False
                found.append(shown or frame)
                whole = whole and time - found[-1][1] < 1.5 * self.tick
            shown = frame
            if len(found) == len(moments):
                return found, whole
        if shown is None:
            return [], False
        _, time, duration = shown
        self.ends(time + max(duration, self.tick), moments[-1])
        return found + [shown] * (len(moments) - len(found)), whole

    def count(self, ids):
        """Frames by number, decoding from the first one on, whatever their time stamps say."""
        # each just before the next one begins
        frames, times, _ = self.walk(self.begin + (ids + 0.999) * self.tick, counting=True)
        return frames, times

    def numbered(self, decoder):
        """sequence() with time stamps that count."""
        for number, (frame, *_) in enumerate(sequence(decoder)):
            yield frame, self.begin + number * self.tick, self.tick

    def ends(self, end, asked):
        """It came out that it ends there. It may hold some frames less than its header announces
        (AVI one, flv two)."""
        if asked - end <= 3.5 * self.tick:
            return
        if self.counted:
            raise ValueError(f"it ends {asked - end:.2f} s before the end that its header "
                             "announces")
        self.lasts(self.begin, end)
        raise Recount

    def lasts(self, begin, end):
        """Its frames are those from `begin` to `end`."""
        self.begin = begin
        self.seconds = end - begin
        self.frames = max(1, round(self.seconds / self.tick))
        if self.times is not None:
            kept = self.times[(self.times > begin - 1e-3) & (self.times < end)]
            if len(kept) == len(self.times):  # frames were counted, in ticks of the mean rate
                kept = kept[: self.frames]
            self.times = kept
            self.frames = len(kept)


class Pictures:
    """One picture, a clip that stands still; or a folder of numbered ones, a video."""
    pixel_aspect = 1.0
    tick = 0.0
    seconds = 0
    slow = False

    def __init__(self, path):
        self.files = numbered_images(Path(path)) if os.path.isdir(path) else (path,)
        self.frames = len(self.files)
        self.decoder = open_video(self.files[0])
        meta = self.decoder.metadata
        self.pixels = meta.width * meta.height

    def by_number(self, ids):
        """As Video's."""
        frames = []
        for i in ids:
            decoder = open_video(self.files[i]) if i else self.decoder
            frames.append(upright(decoder.get_frame_at(0).data, self.files[i]))
        return torch.stack(frames), ids


# EXIF's tag 274, a number of two bytes, whose first byte is low (II) or high (MM)
ORIENTATION = re.compile(
    rb"Exif\0\0(?:II.*?\x12\x01\x03\0\x01\0\0\0(.)\0|MM.*?\x01\x12\0\x03\0\0\0\x01\0(.))",
    re.S)
# quarter turns to the left that its values 1 to 8 ask for; 2, 4, 5 and 7 are mirrored (left to
# right) before
TURNS = (0, 0, 2, 2, 1, 3, 3, 1)


def upright(frame, path):
    """A picture (H,W,3) as its camera was held: decoders leave that to others."""
    with open(path, "rb") as file:
        found = ORIENTATION.search(file.read(2**16))
    orientation = ord(found[1] or found[2]) if found else 1
    if orientation in (2, 4, 5, 7):
        frame = frame.flip(1)
    return torch.rot90(frame, TURNS[clamp(orientation, 1, 8) - 1])


class Given:
    """A video that a dataset gives, uint8 (n,H,W,3)."""
    pixel_aspect = 1.0
    pixels = 1
    tick = 0.0

    def __init__(self, array):
        self.array = torch.as_tensor(array)
        if self.array.dtype != torch.uint8 or self.array.shape[3:] != (3,):
            raise DataError(f"a dataset gives {self.array.dtype} {tuple(self.array.shape)}, and "
                            "uint8 (n,H,W,3) is needed")
        self.frames = len(array)

    def by_number(self, ids):
        """As Video's."""
        return self.array[torch.from_numpy(ids)], ids


def open_frames(path):
    """What has `frames`, and by_number(): a Video, Pictures, or what a dataset gives."""
    if not isinstance(path, (str, Path)):
        return Given(path)
    if os.path.isdir(path) or suffix_of(path) in IMAGES:
        return Pictures(path)
    return Video(path)


def box_head(data):
    """Name, bytes of the head, and bytes in all of the mp4 box that `data` begins with."""
    size, name = struct.unpack_from(">I4s", data)
    if size == 1:
        return name, 16, struct.unpack_from(">Q", data, 8)[0]
    return name, 8, size


def inside(data, *names):
    """What the mp4 boxes with this path of names hold."""
    if not names:
        yield data
        return
    while len(data) >= 8:
        name, head, size = box_head(data)
        if not head <= size <= len(data):
            return
        if name == names[0]:
            yield from inside(data[head:size], *names[1:])
        data = data[size:]


def mp4_table(track, name, kind):
    """[(count, value)] of the table `name` of a track, as one value a frame; None without one."""
    for table in inside(track, b"mdia", b"minf", b"stbl", name):
        runs = np.frombuffer(table[8:], [("count", ">u4"), ("value", kind)])
        if runs["count"].sum() > 2**22:  # more than a day has
            return None
        return np.repeat(runs["value"].astype(np.int64), runs["count"])
    return None


def mp4_times(path, stream):
    """When each frame of this track of an mp4 is shown (n,), rising, in seconds, by the file's own
    index, of which nothing but the box moov is read. None where they are evenly spaced, or it does
    not say."""
    try:
        with open(path, "rb") as file:
            name = None
            while name != b"moov":
                # fails at the file's end
                name, head, size = box_head(file.read(16))
                if size < head:
                    return None
                file.seek(size - 16, os.SEEK_CUR)
            file.seek(head - size, os.SEEK_CUR)
            index = memoryview(file.read(size - head))
        for track in [*inside(index, b"trak")][stream : stream + 1]:
            for handler in inside(track, b"mdia", b"hdlr"):
                if handler[8:12] == b"vide":
                    return track_times(track)
    except (struct.error, ValueError, MemoryError):
        # the decoder says better what is wrong with it
        return None
    return None


def track_times(track):
    """mp4_times of one track."""
    steps = mp4_table(track, b"stts", ">u4")
    # how long the last frame is shown moves no other
    if steps is None or len(np.unique(steps[:-1])) < 2:
        return None
    times = np.cumsum(steps) - steps
    late = mp4_table(track, b"ctts", ">i4")
    if late is not None:
        times = times + late
    # what was cut off before the start is in the file, and not shown
    for edits in inside(track, b"edts", b"elst"):
        _, first = struct.unpack_from(">Qq" if edits[0] else ">Ii", edits, 8)
        times = times[times >= first]
    for about in inside(track, b"mdia", b"mdhd"):
        (rate,) = struct.unpack_from(">I", about, 20 if about[0] else 12)
        return np.sort(times) / rate
    return None


@lru_cache(maxsize=256)
def packet_times(path, stream):
    """The same of any file, which ffprobe reads whole; None without that program, or where packets
    do not say when they are shown."""
    command = f"ffprobe -v error -select_streams {stream} -show_entries packet=pts_time -of csv=p=0"
    try:
        words = [*command.split(), f"file:{path}"]
        said = subprocess.run(words, capture_output=True, text=True).stdout
        return np.sort([float(line.split(",")[0]) for line in said.split()])
    except (OSError, ValueError):
        return None


# --- clips ----------------------------------------------------------------------------------------

def frame_positions(length, clip, u=0.5, segment=0, tick=1, step=None):
    """Where the T frames of one clip lie in a video of `length`, both in frames, or in seconds when
    `step` and `tick` (the time between two frames of the clip, and of the video) are given.

    `u` in [0, 1) places the clip in its segment; 0.5 centres it. Applies the short-clip policy.
    """
    whole = step is None
    step = step or clip.stride
    span = (clip.frames - 1) * step + tick
    room = length / clip.segments - span
    start = segment * length / clip.segments
    # + 1: every whole start is equally likely
    if room < 0:
        start += room / 2
    elif whole:
        start += (room + 1) * u
    else:
        # whole ticks, so that clips of one window have frames in common
        start += int((room / tick + 1) * u) * tick
    start = min(max(start, 0), max(length - span, 0))
    at = (int(start) if whole else start) + np.arange(clip.frames) * step
    if clip.short == "loop":
        return at % length
    if clip.short == "spread" and span > length:
        at = np.linspace(0, length - tick, clip.frames)
        return np.round(at).astype(int) if whole else at
    still = whole and length == 1
    if clip.short == "error" and span > length * (1 + 1e-6) and not still:
        raise ValueError(f"the video is shorter than the clip: {length:.6g} "
                         f"{'frames' if whole else 'seconds'} of {span:.6g}")
    return np.minimum(at, length - tick)


def in_one_window(first, us, starts, span, step):
    """Numbers in [0, 1), `first` for the window and `us` for its clips -> ones that place the clips
    close together, so that what they share is decoded once.

    starts: how many places a clip may begin at; span, step: its length and the way from one of its
    frames to the next. The window is anywhere, and the clips begin in one more length of a clip,
    which they divide evenly, whole steps apart: they have frames in common, and no two begin alike.
    Where that leaves too few places, they begin anywhere in the window.
    """
    spread = min(span, starts)
    unit = step if spread >= len(us) * step else 1
    places = int(spread / unit)
    begin = int(first * (starts - (places - 1) * unit))
    bounds = [k * places // len(us) for k in range(len(us) + 1)]
    chosen = []
    for u, low, high in zip(us, bounds, bounds[1:]):
        chosen.append(begin + unit * (low + int(u * (high - low))))
    return [(place + 0.5) / starts for place in chosen]


def random_box(rng, height, width, scale, ratio):
    """(top, left, height, width) of a random resized crop: ten tries at an area and a log-uniform
    aspect, else the largest centred box."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = clamp(width / height, *ratio)
    w = min(width, round(height * aspect))
    h = min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def random_square(rng, height, width, zoom):
    """The same for a square whose side is the short side / zoom."""
    side = max(round(min(height, width) / zoom), 1)
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side


def view_box(height, width, view, views):
    """The square of evaluation view `view`: what resizing the short side to 256 and cropping 224
    leaves, but in one interpolation."""
    short = min(height, width)
    side = max(round(short * 224 / 256), 1) if views == 1 else short
    share = 0.5 if views == 1 else view / (views - 1)
    along = round((max(height, width) - side) * share)
    across = (short - side) // 2
    return (across, along, side, side) if width >= height else (along, across, side, side)


def choose_box(rng, height, width, clip, view):
    """(top, left, height, width), in pixels as they are shown."""
    if rng is None:
        return view_box(height, width, view, clip.views)
    if clip.zoom:
        return random_square(rng, height, width, clip.zoom)
    return random_box(rng, height, width, clip.scale, clip.ratio)


def crop_resize(frames, box, size):
    """uint8 (n,H,W,3) -> (n,size,size,3), the same box for all. Bilinear with antialiasing, in
    uint8, which torch does fast in channels-last."""
    top, left, h, w = box
    x = frames[:, top : top + h, left : left + w].permute(0, 3, 1, 2)
    if (h, w) != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1)


@dataclass
class Cut:
    """Where a clip comes from: what labels of its frames are cut by."""
    ids: np.ndarray  # (T,) numbers of its frames; with fps, seconds
    box: tuple  # (top, left, height, width) in stored pixels
    shape: tuple  # (T,H,W) of the video
    repeats: bool  # is a frame there twice, as the video is too short or too slow?


def read_clips(path, clip, rngs=(None,)):
    """Decode clips of one video -> uint8 (rngs * segments * views, T, size, size, 3).

    Each rng of `rngs` gives a random start in each segment and one box; None gives the evaluation
    clips. Several rngs: in_one_window. Geometry is as a player shows it: turned by the container's
    matrix, pixels made square. Raises RuntimeError, ValueError, IndexError, AssertionError or
    OSError (DAMAGE) for a damaged video.
    """
    return read_cuts(path, clip, rngs)[0]


def read_cuts(path, clip, rngs=(None,)):
    """read_clips, and a Cut of each clip.

    Whole frames are decoded and then cut and resized: the decoder's own crop and resize are slower,
    131 against 120 ms for 16 frames of 640x360. What clips share is decoded once, and of large
    frames only so many are held at a time.
    """
    video = open_frames(path)
    draws = []
    for _ in range(clip.segments):
        draws.append([0.5 if rng is None else rng.random() for rng in rngs])
    window = rngs[0].random() if len(rngs) > 1 else 0.0
    boxes = []  # of each rng, for each view; drawn where the first frames say their size
    while True:
        try:
            return cut_clips(video, clip, rngs, draws, window, boxes)
        except Recount:
            continue


class Recount(Exception):
    """It came out in reading that a video has other frames than its header says: ask anew."""


def cut_clips(video, clip, rngs, draws, window, boxes):
    """What read_cuts returns. draws [segments][rngs], window: numbers in [0, 1) that place the
    clips."""
    find = video.by_number
    length = video.frames
    tick = 1
    step = None
    if clip.fps and length > 1:
        if not video.tick:
            raise ValueError("numbered images have no frame rate: give a stride instead of fps, "
                             "or data.py pack --fps RATE makes videos of them")
        find = video.by_time
        length = video.seconds
        tick = video.tick
        step = 1 / clip.fps
        if clip.fps * tick > 1.01:
            tell({"rate": f"{video.path} has {1 / tick:.3g} frames a second, {clip.fps:.3g} are "
                  "asked for: some repeat"})
    stride = (step or clip.stride) / tick
    span = (clip.frames - 1) * stride + 1
    starts = 1 + max(0, int(length / clip.segments / tick - span))
    shape = (len(rngs), clip.segments, clip.views, clip.frames, clip.size, clip.size, 3)
    videos = torch.empty(shape, dtype=torch.uint8)
    cuts = [[] for _ in rngs]
    for segment, us in enumerate(draws):
        if len(us) > 1:
            us = in_one_window(window, us, starts, span, stride)
        at = [frame_positions(length, clip, u, segment, tick, step) for u in us]
        at = np.stack(at).round(6)  # (rngs,T)
        numbers, places = np.unique(at, return_inverse=True)
        places = places.reshape(at.shape)
        stamps = []
        for start, frames, shown in pieces(video, find, numbers):
            stamps += [*shown]
            if not boxes:
                boxes += stored_boxes(video, frames.shape[1:3], clip, rngs)
            for row, place, views in zip(videos[:, segment], places, boxes):
                cut_out(row, place - start, frames, views)
        shape = (video.frames, *frames.shape[1:3])
        for mine, ids, place, views in zip(cuts, at, places, boxes):
            shown = {stamps[i] for i in place}
            repeats = video.frames > 1 and len(shown) < clip.frames
            mine += [Cut(ids, box, shape, repeats) for box in views]
    return videos.flatten(0, 2), sum(cuts, [])


def pieces(video, find, numbers):
    """(how many came before, uint8 (n,H,W,3), stamps) of the frames that are asked for, a few of
    large ones at a time. find: by_number or by_time of the video."""
    count = max(1, PIECE_BYTES // (3 * max(1, video.pixels)))
    for start in range(0, len(numbers), count):
        yield start, *find(numbers[start : start + count])


def stored_boxes(video, shape, clip, rngs):
    """For each rng a box for each view, in stored pixels."""
    height, width = shape
    square = video.pixel_aspect
    wide = max(round(width * square), 1)
    boxes = []
    for rng in rngs:
        views = []
        for view in range(clip.views):
            top, left, h, w = choose_box(rng, height, wide, clip, view)
            left = min(round(left / square), width - 1)
            views.append((top, left, h, max(round(w / square), 1)))
        boxes.append(views)
    return boxes


def cut_out(out, place, frames, boxes):
    """Fill out (views,T,size,size,3) where the frame at `place` (T,) lies among `frames`."""
    here = (place >= 0) & (place < len(frames))
    if not here.any():
        return
    ids, again = np.unique(place[here], return_inverse=True)
    # neighbours are cut without a copy
    some = slice(ids[0], ids[-1] + 1) if ids[-1] - ids[0] < len(ids) else ids
    here = torch.from_numpy(here)
    for view, box in zip(out, boxes):
        view[here] = crop_resize(frames[some], box, view.shape[1])[again]


# --- the plan and the loader ----------------------------------------------------------------------

# what torchcodec, FFmpeg and safetensors raise on bad files
DAMAGE = (RuntimeError, ValueError, IndexError, AssertionError, OSError, SafetensorError)
# random streams: default_rng([seed, stream, ...]); train_tdv.py has 4 and 5
ORDER, MIX, REPLACE, AUGMENT = range(4)
# weighted sources are mixed in exact proportion (rounded to 1/1024) in every block of so many draws
BLOCK = 1024


@lru_cache(maxsize=32)  # this and the next epoch of up to 15 sources
def shuffled(n, *key):
    return np.random.default_rng(key).permutation(n)


def weights_of(sources):
    """The share of each, or [] where they go by their lengths."""
    weights = [source.weight for source in sources if source.weight]
    if len(weights) not in (0, len(sources)):
        raise DataError("--data: a weight for every list, or for none")
    return weights


class Plan:
    """Which row is read at draw v: a pure function of (seed, v). Rows are numbered through all
    sources. Each source, or without weights the concatenation of all, is walked in epochs: every
    row once in a shuffled order, then a new order."""

    def __init__(self, sources, seed):
        self.seed = seed
        self.offsets = np.cumsum([0, *map(len, sources)])
        bounds = self.offsets.tolist()
        weights = weights_of(sources)
        if not weights:
            bounds = [0, bounds[-1]]
            weights = [1.0]
        self.groups = list(zip(bounds, bounds[1:]))
        quota = np.array(weights) * BLOCK / sum(weights)
        self.counts = np.floor(quota).astype(int)
        left = BLOCK - self.counts.sum()
        self.counts[np.argsort(self.counts - quota, kind="stable")[:left]] += 1
        if self.counts.min() == 0:
            raise DataError(f"{sources[self.counts.argmin()].name}: its weight is under 1/{BLOCK} "
                            "of all weights together")

    def row(self, v, attempt=0):
        """The row of draw v, or of its attempt-th replacement: another row of the same source."""
        block, place = divmod(v, BLOCK)
        mix = np.repeat(np.arange(len(self.groups)), self.counts)
        mix = mix[shuffled(BLOCK, self.seed, MIX, block)]
        group = mix[place]
        start, stop = self.groups[group]
        if attempt:
            rng = np.random.default_rng([self.seed, REPLACE, v, attempt])
            return start + int(rng.integers(stop - start))
        before = block * self.counts[group] + (mix[:place] == group).sum()
        epoch, i = divmod(before, stop - start)
        return start + int(shuffled(stop - start, self.seed, ORDER, group, epoch)[i])


@dataclass
class Clips:
    """Batches of clips: batch(numbers) is one. numbers: sample numbers g when there is a plan, else
    rows."""
    sources: list
    clip: Clip
    seed: int
    plan: Plan | None = None
    names: tuple = ()  # labels that the world renders
    after: object = None  # what is done to each batch

    def __post_init__(self):
        if any(len(source.paths) for source in self.sources):
            import_torchcodec()  # a machine without FFmpeg is told so before any work
        self.per = self.clip.clips if self.plan else 1  # numbers that share a video
        self.many = self.clip.segments * self.clip.views  # clips of a number

    def batch(self, numbers):
        clip = self.clip
        n = len(numbers)
        shape = (n, self.many, clip.frames, clip.size, clip.size, 3)
        out = {
            "video": torch.zeros(shape, dtype=torch.uint8),
            "flip": torch.zeros(n, dtype=torch.bool),
            "label": torch.full((n,), -1), "index": torch.tensor(numbers), "path": [],
            "ok": torch.ones(n, dtype=torch.bool), "bad": [], "cut": [],
        }
        rendered = {}  # of each split of the world: place in the batch -> row
        for first in range(0, n, self.per):
            group = slice(first, first + self.per)
            source, rows, cuts = self.read(numbers[group], group, out)
            out["cut"] += cuts or [None] * (self.per * self.many)
            out["path"] += map(source.path, rows)
            if source.split:
                rendered.setdefault(source.split, {}).update(enumerate(rows, first))
        # a batch at a time, which is faster than clip by clip
        for split, rows in rendered.items():
            world = World(split, frames=clip.frames, size=clip.size)
            made = world.render([*rows.values()], self.names)
            out["label"][[*rows]] = made["label"]
            out["video"][[*rows]] = made["video"][:, None]
            # whoever asks for labels reads nothing but this world
            for name in self.names:
                out[name] = made[name].repeat_interleave(self.many, 0)
        out["video"] = out["video"].flatten(0, 1)
        out["flip"] = out["flip"].repeat_interleave(self.many)
        out["padded"] = sum(cut.repeats for cut in out["cut"] if cut)
        out["notes"] = dict(UNSAID)
        UNSAID.clear()
        return self.after(out) if self.after else out

    def read(self, numbers, group, out):
        """The clips of one video into the places `group` (a slice) of the batch -> source, their
        rows, cuts. Where it is damaged, the plan says which other video takes its place."""
        for attempt in range(ATTEMPTS if self.plan else 1):
            source = self.sources[0]
            row = numbers[0]
            if self.plan:
                row = self.plan.row(row // self.per, attempt)
                place = np.searchsorted(self.plan.offsets, row, side="right") - 1
                source = self.sources[place]
                row -= int(self.plan.offsets[place])
            rows = [row] * self.per
            # the world: not cropped and not flipped, as left and right are classes; nothing is
            # decoded, so each of several clips is another one
            if source.split:
                apart = np.arange(self.per) * len(source) // self.per
                return source, (row + apart) % len(source), None
            path = source.path(row)
            out["label"][group] = source.labels[row]
            keys = [[self.seed, AUGMENT, number, attempt] for number in numbers]
            rngs = [np.random.default_rng(key) if self.clip.train else None for key in keys]
            flips = [self.clip.train and self.clip.flip and rng.random() < 0.5 for rng in rngs]
            try:
                if path in POISON:
                    raise ValueError("a loader process died or hung as it read this")
                say(path)
                what = path if source.dataset is None else source.dataset[row]
                video, cuts = read_cuts(what, self.clip, rngs)
            except DataError:
                raise
            except DAMAGE as error:
                out["bad"].append((path, reason(error)))
                continue
            finally:
                say("")
            out["flip"][group] = torch.tensor(flips)
            out["video"][group] = video.unflatten(0, (-1, self.many))
            return source, rows, cuts
        if self.plan:
            path, why = out["bad"][-1]
            raise DataError(f"{ATTEMPTS} videos in a row cannot be read, the last one {path}: "
                            f"{why}")
        out["ok"][group] = False
        return source, rows, None


def say(path):
    """A loader process notes what it reads now, "" for nothing, where the main process sees it if
    this one dies: the number of the process, the time, the path."""
    for row in READING:
        said = struct.pack("qd4080s", os.getpid(), perf_counter(), os.fsencode(path))
        row[:] = torch.frombuffer(bytearray(said), dtype=torch.uint8)


def begin_reading(table, poison, worker):
    READING.append(table[worker])
    POISON.update(poison)  # a process that is not forked starts without


def reason(error):
    """One line: the text of a torchcodec error without the place in its source code."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", text)
    return "no video stream" if "best video stream is unknown" in text else text[:200]


def make_loader(
    sources, clip, *, seed, batch_size, micro_batch, steps, start_step=0, rank=0, ranks=1,
    workers=0, timeout=600, masks=(), stills=False,
):
    """The micro-batches of `rank` for the steps start_step to steps - 1: batch_size / ranks /
    micro_batch of them a step, in order.

    Step s holds the samples g = s * batch_size ... (s+1) * batch_size - 1; rank r takes the r-th of
    `ranks` equal parts. A batch is a dict:

        video uint8 (b,T,H,W,3)     flip bool (b,)      done by prepare
        label int64 (b,)            of the clip as stored: flipping may turn left into right
        index int64 (b,)            the sample numbers g
        path  of each clip          bad [(path, reason)] of videos that could not be read and were
                                    replaced; named on stderr, once
        cut   of each clip          a Cut: frame numbers, box, stored size (None: the world)
        padded                      how many clips have a frame twice
        notes {kind: text}          of what clips lose; said on stderr, once a kind
        masks                       masks[kind](step, batch_size, rows=) of these rows, if given, of
                                    clips or images: drawn by the loader's processes

    stills=True: a micro-batch is of videos alone or of images alone, which are single frames
    (b,1,H,W,3). Their share of the micro-batches, evenly spread, is that of the samples, and g
    counts those of a kind.
    A worker that is silent for `timeout` seconds, or dies, raises RuntimeError (see dead_worker).
    """
    least = min(batch_size, micro_batch)
    if least < 1 or batch_size % (ranks * micro_batch) or micro_batch % clip.clips:
        raise DataError(f"batch_size {batch_size} must be a positive multiple of ranks {ranks} x "
                        f"micro_batch {micro_batch}, and that of the {clip.clips} clips read from "
                        "each video")
    if not clip.train or clip.segments * clip.views > 1:
        raise DataError("training takes random clips: train=True, segments=1, views=1")
    kinds, share = kinds_of(sources) if stills else ([sources], 0.0)
    clips = []
    for part, form in zip(kinds, (clip, replace(clip, frames=1))):
        clips.append(Clips(part, form, seed, Plan(part, seed)))

    def batches():
        mine = batch_size // ranks
        for step in range(start_step, steps):
            first = step * batch_size + rank * mine
            for number in range(first, first + mine, micro_batch):
                yield range(number, number + micro_batch)

    work = partial(micro_batch_of, clips, share, masks, batch_size)
    return stream(work, batches(), workers, timeout, seed)


def kinds_of(sources):
    """(those with videos, those of images alone), and the images' share of the samples."""
    weights = weights_of(sources) or map(len, sources)
    kinds = ([], [])
    sizes = [0.0, 0.0]
    for source, weight in zip(sources, weights):
        still = all_images(source)
        kinds[still].append(source)
        sizes[still] += weight
    return kinds, sizes[1] / sum(sizes)


def all_images(source):
    return len(source.paths) > 0 and all(suffix_of(path) in IMAGES for path in source.paths)


def micro_batch_of(kinds, share, masks, batch_size, numbers):
    """The samples `numbers` of a run. kinds: Clips of videos and of images; share: how many of the
    micro-batches are images; masks: of either kind."""
    n = len(numbers)
    turn = numbers[0] // n
    before = math.floor(turn * share)
    kind = math.floor((turn + 1) * share) - before
    first = n * (before if kind else turn - before)
    batch = kinds[kind].batch(range(first, first + n))
    if masks:
        step, first = divmod(numbers[0], batch_size)
        batch["masks"] = masks[kind](step, batch_size, rows=slice(first, first + n))
    return batch


def eval_batches(
    source, clip, *, batch_size, workers=0, rank=0, ranks=1, rows=None, seed=0, timeout=600,
    names=(), after=None,
):
    """Batches over the rows of one source, each row once and in order (`rows` picks and orders
    them; rank r takes rows[r::ranks]).

    As make_loader's, but video is (b * segments * views, T,H,W,3), videos outermost, flip and cut
    likewise; index is the row; ok bool (b,) is False, and the video black, where it cannot be read.
    clip.train=True: random starts (one in each segment), box and flip, a function of (seed, row).
    names: labels that the world renders. after: a function of a batch, done by the workers.
    """
    rows = np.arange(len(source)) if rows is None else np.asarray(rows)
    rows = rows[rank::ranks].tolist()
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    clips = Clips([source], clip, seed, names=names, after=after)
    return stream(clips.batch, batches, workers, timeout, seed)


def labelled_features(read, source, clip, device, pixels, *, ranks, gather, **how):
    """read(x) -> (b, D) over all rows of a source, shared among the ranks -> features (n, D), label
    (n,), ok (n,), in list order and on every rank. gather(value): the values of all ranks. pixels:
    prepare's mean and std. how: as eval_batches'."""
    # as many batches on every rank
    padded = np.resize(np.arange(len(source)), -(-len(source) // ranks) * ranks)
    rows = []
    for batch in eval_batches(source, clip, rows=padded, batch_size=64, ranks=ranks, **how):
        features = read(prepare(batch, device, **pixels)).float().cpu()
        rows.append((features, batch["label"], batch["ok"], batch["index"]))
    everyone = sum(gather(rows), [])
    *values, index = (torch.cat(column) for column in zip(*everyone))
    order = torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])
    return [value[order] for value in values]


def idle_cores(ranks=1):
    """Loader processes for each of the ranks of this machine: cores that are left, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return clamp(cores // ranks - 1, 1, 8)


def attempt(function, numbers):
    try:
        return function(numbers)
    except DataError as error:
        return error  # as a value: raised in a worker it would reach the user in two tracebacks


def stream(function, batches, workers, timeout, seed):
    """function(numbers) for the numbers of each of `batches`, by processes; what it says is said
    here."""
    table = torch.zeros(workers, 4096, dtype=torch.uint8).share_memory_()
    WATCHED.append(table)
    loader = torch.utils.data.DataLoader(
        # item g is the number g itself, and a batch is what the function makes of its numbers
        range(sys.maxsize), batch_sampler=batches, collate_fn=partial(attempt, function),
        num_workers=workers, timeout=timeout if workers else 0,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        worker_init_fn=partial(begin_reading, table, {*POISON}),
        # its own: the loader's base seed must not come from torch's global random state
        generator=torch.Generator().manual_seed(seed))
    for batch in begin(loader):
        if isinstance(batch, DataError):
            raise batch
        tell(batch["notes"])
        for path, why in batch["bad"]:
            if path not in TOLD:
                TOLD.add(path)
                warn(f"bad video: {path}: {why}")
        yield batch
    WATCHED.pop()


def begin(loader):
    """The loader's iterator. Its processes are born with the signals blocked: torchrun, timeout,
    schedulers and Ctrl-C send them to all processes, but the one that trains decides."""
    if os.name != "posix":
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers():
    """Kill the loader processes, as a script leaves: one that hangs would be waited for, as it
    does not hear the SIGTERM that Python sends it."""
    if os.name == "posix":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in active_children():
        process.kill()


def dead_worker(error):
    """One line on a loader process that died or hangs, or None where the error says something else.
    PyTorch raises it in the main thread wherever that happens to be, or else its queue loses the
    connection or finds its end; so scripts ask at their outermost level, and then leave."""
    lost = isinstance(error, (ConnectionError, EOFError))
    # what a worker raised has its own traceback
    if not lost and ("DataLoader" not in str(error) or "Original Traceback" in str(error)):
        return None
    end_workers()  # or PyTorch raises once more where the next one dies
    text = "its connection was lost" if lost else " ".join(str(error).split())
    pids = re.findall(r"\d+", text) if "pid" in text else []
    read = []
    for row in chain(*(table.numpy() for table in WATCHED)):
        pid, since, path = struct.unpack("qd4080s", row.tobytes())
        path = os.fsdecode(path.rstrip(b"\0"))
        if path and (str(pid) in pids or not pids):
            read.append((since, path))
    # who hangs has read for longest
    read = read if pids else sorted(read)[:1]
    POISON.update(path for _, path in read)
    named = f" as it read {', '.join(sorted(POISON)[:3])}, left out from now on" if POISON else ""
    return (f"a loader process died or hangs{named} ({text}); nothing saved is lost: --resume goes "
            "on. Out of memory: fewer --workers")


def prepare(batch, device="cpu", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """uint8 video and flip -> float32 (b,3,T,H,W) on the device, flipped and normalised there: a
    quarter of the bytes cross the bus."""
    x = batch["video"].to(device, non_blocking=True)
    flip = batch["flip"].to(device, non_blocking=True)
    x = x.permute(0, 4, 1, 2, 3).contiguous()  # while it is bytes: 3x faster than as floats
    x = torch.where(flip.view(-1, 1, 1, 1, 1), x.flip(-1), x)
    return x.float().sub_(channels(tuple(mean), device)).div_(channels(tuple(std), device))


@lru_cache  # copied to the device once
def channels(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1, 1) * 255


def ahead(batches, device):
    """Batches on a GPU, each copied on a stream of its own while the one before is at work."""
    stream = torch.cuda.Stream()

    def copied(tensor):
        return tensor.to(device, non_blocking=True)  # the loader has pinned it

    def fetch():
        batch = next(batches, None)
        with torch.cuda.stream(stream):
            for name in {"video", "flip", "masks"} & set(batch or ()):
                batch[name] = tree_map(copied, batch[name])
        return batch

    batch = fetch()
    while batch:
        torch.cuda.current_stream().wait_stream(stream)
        for tensor in tree_leaves([batch["video"], batch["flip"], batch.get("masks", [])]):
            tensor.record_stream(torch.cuda.current_stream())
        ready = batch
        batch = fetch()
        yield ready


def save_png(path, image):
    """Write uint8 (H,W,3)."""
    height, width, _ = image.shape
    rows = np.asarray(image, dtype=np.uint8).reshape(height, -1)
    rows = np.insert(rows, 0, 0, axis=1)  # each row starts with its filter: none
    head = struct.pack(">II5s", width, height, b"\x08\x02\0\0\0")  # 8 bits, RGB
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    Path(path).write_bytes(png)


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
        height = clamp(round(math.sqrt(area * ratio)), 1, h)
        width = clamp(round(math.sqrt(area * (1 / ratio))), 1, w)
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
    hidden = np.ones((B, slices, h, w), dtype=bool)
    # none has a context yet: each is drawn until it has one
    while len(todo := np.flatnonzero(hidden.all((1, 2, 3)))):
        n = len(todo)
        new = np.zeros((n, slices, h, w), dtype=bool)
        for _ in range(blocks):
            when = interval(rng, n, slices, depth)                          # (n,slices)
            down = interval(rng, n, h, height)                              # (n,h)
            across = interval(rng, n, w, width)                             # (n,w)
            rectangle = down[:, :, None] & across[:, None]                  # (n,h,w)
            new |= when[:, :, None, None] & rectangle[:, None]
        hidden[todo] = new
    return np.broadcast_to(hidden, (B, t, h, w)).copy()


def random_mask(rng, B, grid, ratio):
    """A share `ratio` of the tokens, chosen at random for each clip."""
    N = math.prod(grid)
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


def sample_masks(specs, seed, step, B, grid, aspect=(0.75, 1.5), trim="random", rows=None,
                 temporal_keep=1.0):
    """The masks of one step: (keep, pred), for each spec an int64 tensor (b,K) and (b,M).

    They hold sorted token ids, for the clips `rows` (a slice) of the global batch of B. K and M are
    the fewest tokens in the whole batch, so every rank sees the same shapes. What is left out to
    get there is chosen at "random", or, with `trim` "prefix", lies last in time (V-JEPA's code).
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
            raise DataError(f"mask {spec!r}: no clip of {grid} tokens keeps one in the first "
                            f"{temporal_keep} of its slices")
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
        kept = lowest(~hidden, keys, K)
        if temporal_keep < 1:
            hidden = np.ones_like(hidden)
            np.put_along_axis(hidden, kept, False, axis=1)
            M = N - K
        predicted = lowest(hidden, keys, M)
        keep.append(torch.from_numpy(kept))
        pred.append(torch.from_numpy(predicted))
    return keep, pred


def fewest(counts):
    """The smallest of B counts, as in 24 clips, what V-JEPA has on a GPU.

    Of B clips the B/24 with the fewest tokens do not count (they take the masks of others), or one
    odd clip in thousands would leave all of them next to no context.
    """
    counts = np.sort(counts[counts > 0])
    return counts[(len(counts) - 1) // 24]


def lowest(chosen, keys, count):
    """chosen, keys (b,N) -> sorted ids of the chosen with the lowest keys, `count` of each row."""
    keys = np.where(chosen, keys, 2.0)
    ids = np.argpartition(keys, count - 1)
    return np.sort(ids[:, :count])


def early_tokens(grid, temporal_keep):
    """How many tokens lie in the first share `temporal_keep` of the slices, of one at least."""
    t, h, w = grid
    slices = max(1, int(t * temporal_keep))
    return slices * h * w


# --- dense data sets as downloaded -> clip.mp4 + clip.safetensors ---------------------------------
# Readers of files of which there is one for each frame: paths -> an array with a row for each.

# what readers of files of another form raise
MALFORMED = (ValueError, KeyError, IndexError, AttributeError, TypeError)
# PNG's grey, colours and palettes (+ 4: with alpha), of 8 and of 16 bits, as FFmpeg calls them
PIXELS = {0: ("gray", "gray16le"), 2: ("rgb24", "rgb48le"), 3: ("pal8",)}


def png(paths):
    """(n,H,W) or (n,H,W,3), uint8, or uint16 where the files have 16 bits; of palettes the indices.

    All in one call of FFmpeg, whose decoder is exact.
    """
    header = Path(paths[0]).read_bytes()[16:26]
    width, height, bits, kind = struct.unpack(">IIBB", header)
    pixels = PIXELS[kind & 3][bits // 16]
    raw = pipe(paths, *f"-f rawvideo -pix_fmt {pixels} -".split())
    values = np.frombuffer(raw, np.uint16 if bits == 16 else np.uint8)
    shape = (height, width, 3) if pixels.startswith("rgb") else (height, width)
    # after the indices stands the palette
    values = values.reshape(len(paths), -1)[:, : math.prod(shape)]
    return values.reshape(-1, *shape).copy()


def pipe(images, *out, rate=10):
    """Image files of one kind, `rate` a second, through FFmpeg."""
    codec = re.sub("jpe?g", "mjpeg", suffix_of(images[0])[1:])
    data = b"".join(Path(image).read_bytes() for image in images)
    return ffmpeg(f"-f image2pipe -framerate {rate} -c:v {codec} -i -", *out, data=data)


def find_ffmpeg():
    if not shutil.which("ffmpeg"):
        raise DataError("this needs the ffmpeg program: apt-get install -y ffmpeg")


def ffmpeg(options, *words, data=b""):
    """What it gives for these options, in one text, these further words and these data. Raises
    ValueError with the last it said."""
    command = ["ffmpeg", "-v", "error", *options.split(), *words]
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ValueError(said.rpartition("\n")[2] or "FFmpeg failed")
    return done.stdout


def flo(paths):
    """Middlebury's optical flow: the number 202021.25, width, height, then u, v of each pixel."""
    flows = []
    for path in paths:
        _, width, height = np.fromfile(path, "<i4", 3)
        values = np.fromfile(path, "<f4", offset=12)
        flows.append(values.reshape(height, width, 2))
    return np.stack(flows)


def pfm(paths):
    """Lines 'Pf' (or 'PF': optical flow in the first two of three channels), 'width height' and a
    scale, which is negative for little-endian; then rows, bottom up."""
    images = []
    for path in paths:
        match = re.match(rb"(P[fF])\s+(\d+)\s+(\d+)\s+(\S+)\s(.*)", path.read_bytes(), re.S)
        kind, width, height, scale, body = match.groups()
        values = np.frombuffer(body, "<f4" if float(scale) < 0 else ">f4")
        image = values.reshape(int(height), int(width), -1)[::-1]
        images.append(image[..., 0] if kind == b"Pf" else image[..., :2])
    return np.stack(images).astype(np.float32)


def matrices(paths):
    return np.stack([np.loadtxt(path) for path in paths])


def nan_where(unknown, value):
    """`value` as float32 with NaN where `unknown`, which may have fewer axes."""
    value = value.astype(np.float32)
    value[unknown] = np.nan
    return value


def scaled_png(paths, scale, offset=0):
    """Depth or disparity; 0 is unknown."""
    raw = png(paths)
    return nan_where(raw == 0, (raw - offset) / scale)


def kitti_flow(paths):
    raw = png(paths).astype(np.float32)
    return nan_where(raw[..., 2] == 0, (raw[..., :2] - 2**15) / 64)


def kitti_valid(paths):
    return png(paths)[..., 2] > 0


def relabel(paths, table):
    return table[png(paths)]


IDS = np.arange(256, dtype=np.uint8)
# labelId -> one of the 19 classes that are evaluated
CITYSCAPES = np.full_like(IDS, 255)
CITYSCAPES[[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]] = IDS[:19]
# 0 is not labelled, the classes start at 1
ADE20K = np.roll(IDS, 1)
# 2016: black and white; 2017: indices of objects
DAVIS = IDS.copy()
DAVIS[255] = 1


# Readers of a file about a whole clip: path, the clip's frames, --annotations -> pairs (label,
# array).


def intrinsics(path, frames, annotations):
    yield "K", np.loadtxt(path)[:3, :3]


def re10k(path, frames, annotations):
    """ID.txt: a URL, then a row for each frame.

    Time stamp, fx, fy, cx, cy (shares of width and height), two zeros, the 3x4 of world to camera.
    """
    cameras = {}
    for line in filled_lines(path)[1:]:
        time, *numbers = line.split()
        cameras[time] = np.array(numbers, float)
    rows = np.stack([cameras[frame.stem] for frame in frames])
    camera = np.tile(np.eye(4), (len(rows), 1, 1))
    camera[:, :3] = rows[:, 6:].reshape(-1, 3, 4)
    yield "pose", np.linalg.inv(camera)

    meta = open_video(frames[0]).metadata
    fx, fy, cx, cy = rows[0, :4] * ([meta.width, meta.height] * 2)
    yield "K", np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def by_object(tracks, frames, scale):
    """For each object {number of a frame: a row of values} -> (frames,objects,values).

    Each row is multiplied by `scale`; NaN where there is none.
    """
    values = np.full((frames, len(tracks), len(scale)), np.nan, np.float32)
    for k, track in enumerate(tracks):
        for number, row in track.items():
            if 0 <= number < frames:
                values[number, k] = np.multiply(row, scale)
    return values


@lru_cache(maxsize=2)
def load_json(path):
    return json.loads(Path(path).read_text("utf-8-sig"))


def kubric(path, frames, annotations):
    """Kubric's metadata.json: for each instance bbox_frames and bboxes (y0,x0,y1,x1), shares."""
    about = load_json(path)
    width, height = about["metadata"]["resolution"]
    tracks = [dict(zip(thing["bbox_frames"], thing["bboxes"])) for thing in about["instances"]]
    boxes = by_object(tracks, len(frames), [height, width] * 2)
    yield "boxes", boxes[..., [1, 0, 3, 2]]


def tap_vid(path, frames, annotations):
    """TAP-Vid's target_points (P,T,2) and occluded (P,T)."""
    arrays = np.load(path)
    yield "tracks", arrays["target_points"].swapaxes(0, 1)
    yield "visible", ~arrays["occluded"].T.astype(bool)


def perception(path, frames, annotations):
    """--annotations all_train.json: video -> object_tracking and point_tracking, whose tracks have
    frame_ids and bounding_boxes (x0,y0,x1,y1) or points (y,x), shares."""
    about = load_json(annotations)[path.stem]
    video = open_video(path)
    size = [video.metadata.width, video.metadata.height]
    for label, kind, key, scale in (("boxes", "object_tracking", "bounding_boxes", size * 2),
                                    ("tracks", "point_tracking", "points", size[::-1])):
        tracks = [dict(zip(track["frame_ids"], track[key])) for track in about[kind]]
        values = by_object(tracks, len(video), scale)
        yield label, values[..., ::-1] if label == "tracks" else values


def waymo(path, frames, annotations):
    """The segment's table camera_box of the v2 release, from parquet to csv."""
    camera = frames[0].parent.name
    times = {frame.stem: number for number, frame in enumerate(frames)}
    keys = [f"[CameraBoxComponent].box.{k}" for k in ("center.x", "center.y", "size.x", "size.y")]
    tracks = {}
    for row in csv.DictReader(filled_lines(path)):
        time = row["key.frame_timestamp_micros"]
        if row["key.camera_name"] == camera and time in times:
            x, y, width, height = (float(row[key]) for key in keys)
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            tracks.setdefault(row["key.camera_object_id"], {})[times[time]] = box
    yield "boxes", by_object([*tracks.values()], len(frames), [1] * 4)


# layout: a pattern of the frames' paths under the root, whose first group is the clip, then rows:
# label ("" where one file is about the whole clip), the path of the file, with the groups of the
# frame's, its reader, and what the reader is told further.
# A label without any file is left out; where single files are missing, nothing is known.
LAYOUTS = {
    # as exported by SensReader
    "scannet": (
        r"([^/]+)/color/(\d+)\.jpg",
        ("depth", r"\1/depth/\2.png", scaled_png, 1000),
        ("pose", r"\1/pose/\2.txt", matrices),
        ("", r"\1/intrinsic/intrinsic_color.txt", intrinsics),
    ),
    # the lists in train/ and test/, frames named by time stamp
    "re10k": (
        r"frames/(\w+/[^/]+)/\d+\.\w+",
        ("", r"\1.txt", re10k),
    ),
    # what Kubric's worker writes
    "movi": (
        r"(?:(.*)/)?rgba_(\d+)\.png",
        ("masks", r"\1/segmentation_\2.png", png),
        ("", r"\1/metadata.json", kubric),
        ("", r"\1/tracks.npz", tap_vid),
    ),
    # the frames are a video
    "perception": (
        r"(?:.*/)?(video_\d+)\.mp4",
        ("", r"\g<0>", perception),
    ),
    # SEGMENT/CAMERA/TIMESTAMP.jpg
    "waymo": (
        r"((.*)/\d)/\d+\.jpg",
        ("", r"\2/camera_box.csv", waymo),
    ),
    "davis": (
        r"JPEGImages/(.*)/(\d+)\.jpg",
        ("masks", r"Annotations/\1/\2.png", relabel, DAVIS),
    ),
    # ADEChallengeData2016
    "ade20k": (
        r"images/(.*)\.jpg",
        ("masks", r"annotations/\1.png", relabel, ADE20K),
    ),
    "cityscapes": (
        r"leftImg8bit/(.*)_leftImg8bit\.png",
        ("masks", r"gtFine/\1_gtFine_labelIds.png", relabel, CITYSCAPES),
        ("disparity", r"disparity/\1_disparity.png", scaled_png, 256, 1),
        ("right", r"rightImg8bit/\1_rightImg8bit.png", png),
    ),
    "sintel": (
        r"training/((?:clean|final)/([^/]+))/(frame_\d+)\.png",
        ("flow", r"training/flow/\2/\3.flo", flo),
        ("flow_visible", r"training/occlusions/\2/\3.png", relabel, IDS == 0),
    ),
    "chairs": (
        r"(.*)_img[12]\.ppm",
        ("flow", r"\1_flow.flo", flo),
    ),
    "kitti": (
        r"training/((?:image_2|colored_0)/(\d+))_(1[01])\.png",
        ("flow", r"training/flow_occ/\2_\3.png", kitti_flow),
        ("flow_visible", r"training/flow_noc/\2_\3.png", kitti_valid),
        ("disparity", r"training/disp_occ_0/\2_\3.png", scaled_png, 256),
        ("right", r"training/image_3/\2_\3.png", png),
        # of 2012
        ("disparity", r"training/disp_occ/\2_\3.png", scaled_png, 256),
        ("right", r"training/colored_1/\2_\3.png", png),
    ),
    "sceneflow": (
        r"(frames_\w+/(.*))/left/(\d+)\.png",
        ("disparity", r"disparity/\2/left/\3.pfm", pfm),
        ("right", r"\1/right/\3.png", png),
        ("flow", r"optical_flow/\2/into_future/left/OpticalFlowIntoFuture_\3_L.pfm", pfm),
    ),
    "middlebury": (
        r"(.*)/im0\.png",
        ("disparity", r"\1/disp0.pfm", pfm),
        ("right", r"\1/im1.png", png),
    ),
}


def frame_clips(root, files, annotations, pattern, *rows):
    """The clips of a layout of LAYOUTS, as dense_clips() yields them."""
    clips = {}
    for path in files:
        if match := re.fullmatch(pattern, path):
            clips.setdefault(match[1] or "clip", []).append(match)
    for name, frames in clips.items():
        images = [root / match[0] for match in frames]
        # long videos in pieces, which fit the memory
        for i in range(0, len(frames), 256):
            piece = slice(i, i + 256)
            piece_name = f"{name}_{i:06d}" if len(frames) > 256 else name
            labels = frame_labels(root, frames, images, piece, rows, annotations)
            yield piece_name, images[piece], labels


def frame_labels(root, frames, images, piece, rows, annotations):
    """Yield (label, array) for `rows` of LAYOUTS. frames: matches of the layout's pattern, each an
    image of the clip, of which those of `piece` (a slice) are asked for."""
    for label, place, reader, *arguments in rows:
        labelled = frames[piece]
        if label.startswith("flow"):  # the last frame has none
            labelled = labelled[:-1]
        # not root / ..., as a place begins with a slash where its first group is empty
        paths = [Path(f"{root}/{match.expand(place)}") for match in labelled]
        found = [i for i, path in enumerate(paths) if path.is_file()]
        if not found:
            continue
        if not label:
            for name, value in reader(paths[0], images, annotations):
                yield name, value[piece] if len(value) == len(images) else value
            continue
        value = reader([paths[i] for i in found], *arguments)
        unknown = 255 if label == "masks" else 0
        if value.dtype.kind == "f":
            unknown = np.nan
        whole = np.full((len(paths), *value.shape[1:]), unknown, value.dtype)
        whole[found] = value
        yield label, whole


# Layouts in which a clip is not simply a folder of frames.


def intphys(root, files, annotations):
    """BLOCK/SCENE/{1,2,3,4}/scene/scene_001.png ... and status.json: whether it is possible.

    Two movies of a scene are, two are not. Each of these goes with the possible one that it shares
    its beginning with.
    """
    scenes = {}
    for path in files:
        if match := re.fullmatch(r"(.*)/(\d)/scene/scene_\d+\.png", path):
            movies = scenes.setdefault(match[1], {})
            movies.setdefault(match[2], []).append(root / path)
    for scene, movies in scenes.items():
        block = re.search(r"O(\d)", scene)
        kind = int(block[1]) - 1 if block else 0
        pictures = {k: png(movie) for k, movie in movies.items()}
        possible = [
            k for k in movies
            if load_json(root / scene / k / "status.json")["header"]["is_possible"]]
        for k in sorted(movies.keys() - possible):
            change = {j: first_difference(pictures[j], pictures[k]) for j in possible}
            j = max(change, key=change.get)
            labels = {"impossible": pictures[k], "change": np.array(change[j]),
                      "kind": np.array(kind)}
            yield f"{scene}_{k}", movies[j], labels.items()


def first_difference(movie, other):
    """The number of the first frame that differs; their count if none does."""
    differs = (movie != other).any((1, 2, 3))
    return differs.argmax() if differs.any() else len(other)


def ava(root, files, annotations):
    """--annotations ava_train_v2.2.csv: video, second, x0, y0, x1, y1 (shares), action, person.

    A clip of two seconds around each annotated second, whose boxes hold for all of its frames;
    action a is column a - 1 of 80.
    """
    paths = [root / path for path in files]
    videos = {path.stem: path for path in paths if suffix_of(path) in VIDEOS}
    clips = {}
    for row in csv.reader(filled_lines(Path(annotations))):
        if len(row) >= 8 and row[0] in videos:
            name, second, *box, action, person = row[:8]
            people = clips.setdefault((name, int(second)), {})
            people.setdefault((person, *map(float, box)), []).append(int(action))
    for (name, second), people in clips.items():
        video = videos[name]
        meta = open_video(video).metadata
        actions = np.zeros((len(people), 80), np.uint8)
        for i, ids in enumerate(people.values()):
            actions[i, np.array(ids) - 1] = 1
        boxes = [box for _, *box in people]
        # one row, which stands for all frames
        boxes = np.array([boxes]) * ([meta.width, meta.height] * 2)         # (1,people,4)
        labels = [("boxes", boxes), ("actions", actions)]
        yield f"{name}_{second:05d}", (video, max(second - 1, 0), 2), labels


SPECIAL = {"intphys": intphys, "ava": ava}


def natural(path):
    """A key to sort by: 10.jpg after 9.jpg."""
    parts = re.split(r"(\d+)", path)
    parts[1::2] = map(int, parts[1::2])
    return parts


def dense_clips(layout, root, annotations):
    """The clips of a data set: (name, frames, labels) of each.

    frames: images, or one video, or (video, first second, seconds). labels: pairs (label, array),
    most of them read only when they are asked for.
    """
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    files.sort(key=natural)
    if layout in SPECIAL:
        return SPECIAL[layout](root, files, annotations)
    return frame_clips(root, files, annotations, *LAYOUTS[layout])


def save_frames(frames, path, crf):
    """Frames as dense_clips() yields them -> a video."""
    encode = [*f"-an -c:v libx264rgb -crf {crf} -preset veryfast -y".split(), path]
    if isinstance(frames, tuple):
        video, start, seconds = frames
        ffmpeg(f"-ss {start} -t {seconds} -i", video, *encode)
    elif suffix_of(frames[0]) in VIDEOS:
        shutil.copyfile(frames[0], path)
    else:
        pipe(frames, *encode)


def label_tensor(value):
    """Of floats: float32, NaN where they are not finite."""
    if value.dtype.kind == "f":
        value = nan_where(~np.isfinite(value), value)
    return torch.from_numpy(value.copy("C"))


def index_dense(layout, root, out, annotations, crf):
    """index for dense labels."""
    find_ffmpeg()
    folder = out.parent / f"{out.stem}_clips"
    rows = []
    counts = Counter()
    name = "1"
    half = folder / ".half.mp4"
    try:
        for name, frames, labels in tqdm(dense_clips(layout, root, annotations), disable=None):
            video = folder / f"{name}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            save_frames(frames, half, crf)
            tensors = {label: label_tensor(value) for label, value in labels}
            save_file(tensors, video.with_suffix(".safetensors"))
            # last: a video that is there has its labels
            os.replace(half, video)
            rows.append((video, -1))
            counts.update(tensors.keys())
            # should the next one fail before it says its name
            name = str(len(rows) + 1)
    except (RuntimeError, struct.error, *MALFORMED) as error:
        raise DataError(f"{root}: clip {name} is not as {layout} should be "
                        f"({type(error).__name__}: {reason(error)})") from None
    finally:
        half.unlink(missing_ok=True)
    if not rows:
        raise DataError(f"{root}: no clips in the layout of {layout}")
    write_list(out, rows)
    return {"list": str(out), "rows": len(rows), "labels": dict(counts)}, 0


# --- command line ---------------------------------------------------------------------------------

def check(path: str, workers: int = 2, frames: int = 16, stride: int = 4, fps: float = 0):
    """Read every file of a list to its last frame, and report what they are, which are bad, and
    what clips of them would be. Exit status 0: all sound, 1: some bad, 2: no list.

    Args:
        path: a list, or a folder of videos
        workers: processes; 0 reads in this one
        frames: of a clip
        stride: video frames from one to the next
        fps: instead, frames a second
    """
    source = parse_list(path)
    import_torchcodec()
    files = in_processes(inspect_video, [*dict.fromkeys(source.paths)], workers)
    for file in files:
        if file["reason"]:
            print(f"bad: {file['path']}: {file['reason']}")
        # of durations a frame more or less is rounding
        elif abs(file["announced"] - file["frames"]) > 1:
            print(f"note: {file['path']}: its header announces {file['announced']} frames, it has "
                  f"{file['frames']}")
    good = [file for file in files if not file["reason"]]
    bad = len(files) - len(good)
    summary = {"rows": len(source), "files": len(files), "bad": bad,
               "labels": len(np.unique(source.labels[source.labels >= 0]))}
    for name in ("codec", "size", "fps", "pixels"):
        summary[name] = dict(Counter(file[name] for file in good).most_common(8))
    for name in ("frames", "seconds"):
        numbers = [file[name] for file in good] or [0]
        marks = np.quantile(numbers, (0, 0.5, 1)).round(3).tolist()
        summary[name] = dict(zip(("min", "median", "max"), marks))

    # what is lost or slow, in videos
    measure = "seconds" if fps else "frames"
    length = (frames - 1) / fps if fps else (frames - 1) * stride + 1
    films = [file for file in good if file["fps"] or file["frames"] > 1]
    summary["shorter_than_a_clip"] = sum(file[measure] < length for file in films)
    summary["slower_than_fps"] = sum(fps > 1.01 * file["fps"] for file in good)
    summary["read_without_seeking"] = sum(file["slow"] for file in good)
    summary["lose"] = dict(Counter(chain.from_iterable(file["loses"] for file in good)))
    for name, value in summary.items():
        print(f"{name:20} {value}")
    if summary["shorter_than_a_clip"]:
        print(f"a clip is {length:.6g} {measure} here (--frames, --stride, --fps), and repeats the "
              "last frame of shorter videos: --short says what else")
    if summary["read_without_seeking"]:
        print(f"faster, and without these: python data.py pack {path} packed/")
    return summary, int(bad > 0)


def checksum(frame):
    return zlib.crc32(np.ascontiguousarray(frame.numpy()))


def inspect_video(path):
    """Decode every frame, and some again as clips are read -> {"path", "reason" (None if sound),
    "codec", "size", "pixels" (their format), "loses" (kinds of losses()), "fps", "seconds",
    "frames", "announced" by the header, "slow": its frames are not where a seek looks for them}."""
    facts = {"path": path, "reason": None}
    try:
        video = open_frames(path)
        meta = video.decoder.metadata
        fps = 0
        frames = announced = video.frames
        if isinstance(video, Pictures):
            for _ in pieces(video, video.by_number, np.arange(frames)):
                pass
        else:
            announced = meta.num_frames_from_header or frames
            frames = count_frames(video)
            fps = round(1 / video.tick, 2)
        facts |= {"codec": meta.codec, "size": f"{meta.width}x{meta.height}",
                  "pixels": meta.pixel_format, "loses": [*losses(path, meta)], "fps": fps,
                  "seconds": video.seconds, "frames": frames, "announced": announced,
                  "slow": video.slow}
    except DAMAGE as error:
        facts["reason"] = reason(error)
    return facts


def count_frames(video):
    """How many frames a Video has; raises ValueError where some are not where a clip finds them."""
    sums = []
    times = []
    for frame, time, _ in sequence(open_video(video.path)):
        sums.append(checksum(frame))
        times.append(time)
    if not video.lies and len(sums) > 2 and np.ptp(np.diff(times)) > video.tick / 2:
        video.know(np.array(times))
    while True:
        last = min(len(sums), video.frames) - 1
        ids = np.unique((np.array([0, 0.2, 0.5, 0.8, 1]) * last).astype(int))
        try:
            again = [checksum(frame) for frame in video.by_number(ids)[0]]
            end = video.begin + np.array([len(sums), video.frames]) * video.tick
            video.ends(*end)
            break
        except Recount:
            continue
    if again != [sums[number] for number in ids]:
        raise ValueError("its frames are not where they were asked for")
    return len(sums)


def in_processes(function, items, workers):
    """[function(item), ...] with a progress bar, in fresh processes."""
    if workers < 1:
        return [function(item) for item in tqdm(items, disable=None)]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        results = pool.map(function, items, chunksize=4)
        return [*tqdm(results, total=len(items), disable=None)]


# each gives [(path or None, class name or None)] and the class names, where the layout says them

def read_folders(root, files, note, labels):
    source = folder_source(root)
    pairs = zip(source.paths, source.labels)
    return [(path, source.classes[k]) for path, k in pairs if source.classes], None


def read_frames(root, files, note, labels):
    return [(path, None) for path in files.values() if path.is_dir()], None


def read_kinetics(root, files, note, labels):
    """Files are named ID_START_END or ID."""
    rows = []
    for row in csv.DictReader(filled_lines(note)):
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        path = files.get(name, files.get(row["youtube_id"]))
        rows.append((path, row.get("label") or None))
    return rows, None


def read_ssv2(root, files, note, labels):
    numbers = load_json(labels)
    rows = []
    for row in load_json(note):
        name = re.sub(r"[\[\]]", "", row.get("template", ""))
        rows.append((files.get(str(row["id"])), name or None))
    return rows, sorted(numbers, key=lambda name: int(numbers[name]))


def read_ucf(root, files, note, labels):
    classes = [line.split()[1] for line in filled_lines(note.parent / "classInd.txt")]
    rows = []
    for line in filled_lines(note):
        path = Path(line.split()[0])
        rows.append((files.get(path.stem), line.split("/")[0]))
    return rows, classes


READ = {"kinetics": read_kinetics, "ssv2": read_ssv2, "ucf": read_ucf, "folders": read_folders,
        "frames": read_frames}
NEEDS = {"annotations": "kinetics ssv2 ucf perception ava".split(), "labels": ["ssv2"]}


def index(
    layout: Literal[(*READ, *LAYOUTS, *SPECIAL)], root: str, out: str = "", annotations: str = "",
    labels: str = "", crf: int = 0,
):
    """Make a list of 'path label' rows of a dataset as downloaded, and classes.txt beside it (line
    k, from 0, names label k).

    Videos that are annotated but not found under the root are counted and left out. kinetics and
    folders: a classes.txt that is there already is obeyed, so that the train and the val list
    number the classes alike. frames: each folder of numbered images is a video, unlabelled.

    Data sets with dense labels (scannet and all after it) are written anew, as clip.mp4 and
    clip.safetensors, into the folder LIST_clips beside it. Which files of each are read stands in
    the table LAYOUTS.

    Args:
        layout: whose layout
        root: the folder that holds the videos, at any depth; of dense data sets as unpacked
        out: the list to write (default: LAYOUT.txt)
        annotations: kinetics: csv with label, youtube_id, time_start, time_end; ssv2: train.json;
            ucf: trainlist01.txt (classInd.txt beside it); perception: all_train.json; ava:
            ava_train_v2.2.csv
        labels: ssv2: labels.json
        crf: dense: x264's quality of the clips; 0 is lossless, and large
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    out = Path(out or f"{layout}.txt")
    for flag, file in (("annotations", annotations), ("labels", labels)):
        if layout in NEEDS[flag] and not os.path.isfile(file):
            raise DataError(f"index {layout} needs --{flag} FILE, and {file!r} is none")
    if layout not in READ:
        return index_dense(layout, Path(root), out, annotations, crf)
    files = {path.stem: path for path in media(Path(root))}
    try:
        rows, said = READ[layout](root, files, Path(annotations), labels)
    except (OSError, *MALFORMED) as error:
        raise DataError(f"{annotations}: not {layout} annotations ({type(error).__name__}: "
                        f"{reason(error)})") from None
    classes = said or class_names(out) or sorted({name for _, name in rows} - {None})
    number = {name: k for k, name in enumerate(classes)} | {None: -1}
    for _, name in rows:
        if name not in number:
            raise DataError(f"class {name!r} is not one of the {len(classes)} of --labels, "
                            f"classInd.txt or {out.with_name('classes.txt')}")
    found = [(path, number[name]) for path, name in rows if path]
    if not found:
        raise DataError(f"{root}: {len(files)} videos, and none is what {layout} {annotations} "
                        "asks for")
    write_list(out, found, classes)
    missing = len(rows) - len(found)
    return {"list": str(out), "rows": len(found), "classes": len(classes), "missing": missing}, 0


def filled_lines(path):
    return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text, "utf-8")
    os.replace(f"{path}.tmp", path)


def write_list(out, rows, classes=()):
    """rows: (path, label); names of the classes go into classes.txt beside it. Paths under the
    list's folder are written relative to it, so that the folder can be moved; others absolute."""
    folder = os.path.abspath(out.parent) + "/"
    lines = []
    for path, label in rows:
        path = os.path.abspath(path).removeprefix(folder)
        row = f"{path} {label}" if label >= 0 else path
        if [path] != [read.decode() for _, read, _ in plain_rows(row.encode(errors="replace"))]:
            raise DataError(f"{path!r}: in a list it would read as another path: rename it")
        lines.append(f"{row}\n")
    write(out, "".join(lines))
    if classes:
        write(out.with_name("classes.txt"), "".join(f"{name}\n" for name in classes))


def pack(path: str, out: str, short_side: int = 256, fps: float = 0, gop: int = 8, crf: int = 23,
         workers: int = 2):
    """Re-encode the videos of a list for fast reading, and write a list of the same name into the
    folder OUT. The originals are not touched.

    Interrupted, it goes on where it stopped. Files that cannot be read to the end are reported and
    left out (exit status 1).

    Args:
        path: a list, or a folder of videos
        out: the folder to write
        short_side: pixels; smaller videos keep their size
        fps: frames a second, 0 as they are; of folders of numbered images, what their rate is.
            Training at stride 4 on 30 fps wants 7.5, and then --fps 7.5 or --stride 1
        gop: frames from one key frame to the next
        crf: x264's quality; lower is better and larger
        workers: processes
    """
    source = parse_list(path)
    if source.split:
        raise DataError(f"{path}: the built-in world is no file")
    folder = Path(out)
    if os.path.isdir(path) and folder.resolve().is_relative_to(Path(path).resolve()):
        raise DataError(f"{out} lies in {path}, whose next reading would find every video twice; "
                        "choose a folder outside")
    import_torchcodec()
    find_ffmpeg()
    encode = encoding(short_side, fps, gop, crf)
    root, list_name = os.path.split(os.path.abspath(source.name))
    root += "/"
    if not fps and any(map(os.path.isdir, source.paths)):
        raise DataError(f"{path}: folders of numbered images have no frame rate; say it: --fps 25")
    holds = {"encode": encode, "root": root}
    times = []
    if not fps:
        holds["times"] = "kept"
        times = as_they_are().split()
    claim(folder, holds)

    targets = {}
    for video in source.paths:
        name = video.removesuffix(".mp4") + ".mp4"
        targets[video] = folder / "videos" / name.removeprefix(root).lstrip("/")
    target, count = Counter(targets.values()).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {count} of its videos would all be {target}")
    jobs = [(video, target, encode + times, fps) for video, target in targets.items()]
    for (video, *_), why in zip(jobs, in_processes(pack_video, jobs, workers)):
        if why:
            print(f"bad: {video}: {why}")
            del targets[video]
    bad = len(jobs) - len(targets)

    pairs = zip(source.paths, source.labels)
    rows = [(targets[video], label) for video, label in pairs if video in targets]
    if suffix_of(list_name) not in (".txt", ".csv"):  # a folder, a video, a pattern
        list_name = re.sub(r"[*?\[\]]", "_", list_name) + ".txt"
    write_list(folder / list_name, rows, source.classes)
    return {"list": str(folder / list_name), "rows": len(rows), "bad": bad}, int(bad > 0)


def encoding(short_side, fps, gop, crf):
    """FFmpeg's options. fastdecode, without CABAC and deblocking: twice as fast to read, 10 %
    larger."""
    if not (short_side >= 16 and 0 <= fps < 1000 and gop >= 1 and 0 <= crf <= 51):
        raise DataError(f"short_side {short_side} (16 or more), fps {fps} (0 to 1000), "
                        f"gop {gop} (1 or more) or crf {crf} (0 to 51) is out of range")
    # never larger than it was; pixels become square; even sides
    half = f"min({short_side},min(iw*sar,ih))/min(iw*sar,ih)/2"
    filters = f"scale='2*round(iw*sar*{half})':'2*round(ih*{half})':flags=area,setsar=1"
    if fps:
        filters = f"fps={fps},{filters}"
    return (f"-an -sn -dn -vf {filters} -pix_fmt yuv420p -c:v libx264 -crf {crf} -g {gop} -bf 0 "
            "-tune fastdecode").split()


def as_they_are():
    """FFmpeg's options for frames that keep their times, neither repeated nor left out, as it would
    for an even rate. Versions call them differently."""
    for words in ("-fps_mode vfr -enc_time_base demux", "-fps_mode vfr -enc_time_base -1",
                  "-vsync vfr -enc_time_base -1"):
        try:
            ffmpeg(f"-f lavfi -i color=duration=0.1 {words} -f null -")
            return words
        except ValueError:
            continue
    return ""


def claim(folder, holds):
    """Write into pack.json what the folder holds; refuse one that holds something else."""
    note = folder / "pack.json"
    before = json.loads(note.read_text("utf-8")) if note.exists() else holds
    # a file there may have the name of another video, and would be taken for it
    if before != holds:
        raise DataError(f"{folder} holds videos packed from {before['root']} (or with other "
                        f"settings: see its pack.json), not {holds['root']}; choose another folder")
    write(note, json.dumps(holds))


def pack_video(job):
    """Re-encode one file -> None, or the reason why not.

    The target is renamed into place when complete; one that is there is not made again.
    """
    path, target, encode, fps = job
    if target.exists():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{os.getpid()}.mp4")
    encode = [*encode, *"-threads 1 -movflags +faststart -y".split(), f"file:{temp}"]
    try:
        video = open_frames(path)  # not what is no video, nor too large
        if os.path.isdir(path):
            pipe(numbered_images(Path(path)), *encode, rate=fps)
        else:
            # explode: no half-decoded videos; file: or names with a colon are read as protocols
            stream = f"-map 0:{video.decoder.stream_index}"  # the one that is read
            ffmpeg("-xerror -err_detect explode -threads 1 -i", f"file:{path}",
                   *stream.split(), *encode)
        open_video(temp).get_frame_at(0)
        os.replace(temp, target)
    except DAMAGE as error:
        return reason(error)
    finally:
        temp.unlink(missing_ok=True)


def main():
    import tyro  # late: whoever imports data.py needs no flags
    commands = {"check": check, "index": index, "pack": pack}
    try:
        summary, status = tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    except (DataError, OSError) as error:
        warn(f"error: {error}")
        sys.exit(2)
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
MOTIONS = tuple("left right up down clockwise counterclockwise grow shrink".split())
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
# possible one, and then; and what its substitute does then. In opposite pairs, so that more or less
# motion tells nothing.
MOVE, JUMP, REST, AWAY = range(4)
LAWS = {
    "vanish": (MOVE, AWAY, AWAY),
    "appear": (AWAY, MOVE, AWAY),
    "change": (MOVE, AWAY, MOVE),
    "teleport": (MOVE, JUMP, AWAY),
    "stop": (MOVE, REST, AWAY),
    "start": (REST, MOVE, AWAY),
}
IMPOSSIBLE = tuple(LAWS)
# objects of a pair, after the planes
BALL, STONE, BOX, PILLAR = range(PLANES, OBJECTS)


@dataclass
class Scene:
    """Poses of camera and objects, sizes and textures; an axis of length 1 is for the times, or, of
    the camera, for the objects."""
    R: np.ndarray       # (1,n,T,3,3) camera to world
    p: np.ndarray       # (1,n,T,3)
    Ro: np.ndarray      # (O,n,T,3,3) object to world; a plane is its z = 0
    po: np.ndarray      # (O,n,T,3)
    size: np.ndarray    # (O,n,1,3) a box's half edges; a sphere's radius, three times
    wave: np.ndarray    # (O,n,1,S,3) wave vectors in object coordinates, rad per unit
    phase: np.ndarray   # (O,n,1,S)

    def cut(self, clips):
        return Scene(*(array[:, clips] for array in vars(self).values()))


def rotation(axis, angle):
    """axis (...,3), angle (...) in rad -> (...,3,3), right-handed (Rodrigues)."""
    axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    identity = np.eye(3)
    outer = axis[..., None] * axis[..., None, :]
    cross = np.cross(identity, axis[..., None, :])
    cos = np.cos(angle)[..., None, None]
    sin = np.sin(angle)[..., None, None]
    return cos * identity + outer * (1 - cos) + cross * sin


def vectors(x, y, z):
    """Coordinates, each (n,T), or (n,1) for all times -> (n,T,3)."""
    return np.stack(np.broadcast_arrays(x, y, z), -1)


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
    clip_and_time = torch.arange(n * T, device=ids.device).view(n, T, 1, 1)
    row = ids * (n * T) + clip_and_time
    seen = []
    for table in tables:
        values = table.expand(-1, n, T, *table.shape[3:]).flatten(0, 2)     # (O*n*T,...)
        values = values.flatten(1).T.contiguous().index_select(1, row.flatten())
        seen.append(values.view(*table.shape[3:], *row.shape))
    return seen


class Draws:
    """The random numbers of n clips, from one generator each, handed out in order."""

    def __init__(self, generators):
        self.uniforms = iter(np.stack([g.random(256) for g in generators], 1))
        self.normals = iter(np.stack([g.standard_normal(512) for g in generators], 1))

    def uniform(self, low, high, *shape):
        """shape (count,...) -> (count,n,1,...): the 1 is for the times."""
        return low + (high - low) * hand_out(self.uniforms, *shape)

    def normal(self, *shape):
        return hand_out(self.normals, *shape)

    def between(self, low, high):
        """Uniform, a number for each clip, (n,1)."""
        return self.uniform(low, high, 1)[0]


def hand_out(numbers, count, *shape):
    """The next of `numbers`, each (n,) -> (count,n,1,*shape)."""
    drawn = np.stack([*islice(numbers, math.prod(shape) * count)], 1)
    return drawn.reshape(len(drawn), count, 1, *shape).swapaxes(0, 1)


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
        self.times = (np.arange(self.frames) - last / 2) / max(1, last)
        # of the rays (x,y,1) through the centres of the pixels: (W,), (H,1)
        centre = (np.arange(self.size) + 0.5) / self.size
        self.x = self.tensor(centre * 2 - 1) * FIELD
        self.y = self.x[:, None]

    # --- 1 draw

    def generators(self, indices, *use):
        """One for each clip.

        `use` is 1 for tracks, 2 for the right camera's noise, 3 for pairs, and left out for plain
        videos: so asking for labels changes no video.
        """
        split = list(SPLITS).index(self.split)
        return [np.random.default_rng((self.seed, split, i, *use)) for i in indices]

    def grain(self, generators):
        """Pixel noise (n,T,H,W,3) uint8."""
        shape = (self.frames, self.size, self.size, 3)
        return np.stack([g.integers(0, 256, shape, np.uint8) for g in generators])

    # --- 2 scene: float64 and elementwise, so that no clip depends on the others of a batch

    def scene(self, draw, indices):
        """-> Scene of the clips `indices` (n,)."""
        # the pace may vary, but equally before and after the middle
        bend = np.sin(TAU * self.times)
        pace = self.times + draw.between(-0.5, 0.5) * bend / TAU            # (n,T)
        wall = draw.between(0.8, 1.25)                                      # (n,1)
        motion = indices % len(MOTIONS)
        # which draw in this order
        return Scene(
            *self.camera(draw, motion, pace, wall), *self.objects(draw, wall),
            *self.textures(draw, wall))

    def camera(self, draw, motion, pace, wall):
        """-> R (1,n,T,3,3), p (1,n,T,3): one of eight motions, and a sway that is the same for all.
        """
        width = 2 * FIELD * wall
        shift = draw.between(*self.shift) * width
        turn = np.radians(draw.between(*self.turn))
        zoom = np.log(draw.between(*self.zoom))
        # 1 or -1 in one of four; for the picture to go left the camera goes right
        motions = np.kron(np.eye(4), [1.0, -1.0])                           # (4,8)
        right, down, roll, ahead = motions[:, motion, None]                 # each (n,1)
        # to the wall, as a share of what it is half-way
        distance = np.exp(-ahead * zoom * pace)
        place = vectors(right * shift * pace, down * shift * pace, wall * (1 - distance))

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
        return R[None], p[None]

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
        shape = (OBJECTS, len(wall), self.frames)
        Ro = np.tile(np.eye(3), (*shape, 1, 1))
        # upright
        Ro[1] = rotation([1, 0, 0], np.pi / 2)
        po = np.zeros((*shape, 3))
        po[0, ..., 2] = wall
        size = np.ones_like(po[:, :, :1])
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
        number = indices % len(LAWS)
        law = np.array(IMPOSSIBLE)[number, None]                            # (n,1)
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
        arc = 1 - 4 * self.times * self.times
        path = vectors(side * reach * 2 * self.times, floor - radius - height * arc, 0.6 * wall)
        half = self.frames // 2
        jump = path + vectors(side * 0.5 * reach, 0, 0)
        last = path[:, [max(half - 1, 0)]]
        rest = last.repeat(self.frames, 1)
        behind_camera = np.full_like(path, -9.0)
        courses = np.stack([path, jump, rest, behind_camera])               # (4,n,T,3)
        chosen = np.array([*LAWS.values()])[number].T                       # (3,n)
        possible, impossible, substitute = courses[chosen, np.arange(len(number))]
        impossible[:, :half] = possible[:, :half]
        substitute[:, :half] = behind_camera[:, :half]

        scenes = []
        for thing, other in ((possible, behind_camera), (impossible, substitute)):
            po = scene.po.copy()
            po[BALL] = np.where(box_moves, other, thing)
            po[BOX] = np.where(box_moves, thing, other)
            Ro = scene.Ro.copy()
            # they roll
            Ro[[BALL, BOX]] = rotation([0, 0, 1], po[[BALL, BOX], ..., 0] / radius)
            scenes.append(replace(scene, Ro=Ro, po=po))
        return scenes

    def stage(self, draw, wall, floor, radius, reach, in_view):
        """-> Scene of a pair before ball and box are put: a stone at rest, and the pillar."""
        Ro, po, size = self.empty_room(wall)
        po[1, ..., 1] = floor
        aside = draw.between(-0.6, 0.6) * wall
        po[STONE] = vectors(aside, floor - 0.1 * wall, 0.85 * wall)
        po[PILLAR] = vectors(np.where(in_view, 9 * wall, 0), 0, 0.45 * wall)
        size[BALL] = radius[..., None]
        size[STONE] = 0.1 * wall[..., None]
        size[BOX] = 0.6 * radius[..., None]
        # the pillar is as high as floor to ceiling, and hides the thing in two frames
        depth = 0.6 * wall
        step = reach / depth / max(1, self.frames - 1)
        half = radius / depth + step + 0.03
        size[PILLAR] = vectors(half * 0.45 * wall, floor, 0.02 * wall)
        # the camera rests where all begins
        return Scene(Ro[:1], np.zeros_like(po[:1]), Ro, po, size, *self.textures(draw, wall))

    # --- 3 cast

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

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
            x = self.x
            y = self.y

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
        right, down, ahead = axes.unbind(1)
        return eye + right * (depth * self.x) + down * (depth * self.y) + ahead * depth

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
        phase = slope[0] * (depth * self.x)                                 # (S,n,T,H,W)
        phase += slope[1] * (depth * self.y)
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
        ray = right * self.x + down * self.y + ahead
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

    def picture(self, scene, grain, hits=None):
        """-> (n,T,H,W,3) uint8. hits: what cast() returns, if it is known.

        The noise is uniform: a width of 1 has the deviation 1/sqrt(12).
        """
        grey = self.shade(scene, *hits or self.cast(scene)).mul_(255)
        video = grey[..., None].repeat(1, 1, 1, 1, 3)
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
            cut = [scene.cut(part) for scene in scenes]
            shot = Shot(self, cut, self.grain(generators[part]), indices[part])
            for name, parts in made.items():
                parts.append(getattr(shot, name).cpu())
        batch = {name: torch.cat(parts) for name, parts in made.items()}
        batch["label"] = torch.from_numpy(indices % len(MOTIONS))
        return batch


LABELS = (
    "depth masks boxes pose K flow flow_visible tracks visible right disparity disparity_visible "
    "impossible kind change").split()


@dataclass
class Shot:
    """Filmed scenes. An attribute for each label; what takes long is made when it is asked for."""
    world: World
    scenes: list
    grain: np.ndarray
    indices: np.ndarray

    def __post_init__(self):
        self.scene = self.scenes[0]
        hits = self.world.cast(self.scene)
        self.depth, self.ids, self.axes, self.eye = hits
        self.video = self.world.picture(self.scene, self.grain, hits)
        self.masks = self.ids.to(torch.uint8)
        self.kind = torch.from_numpy(self.indices % len(IMPOSSIBLE))
        # pixels
        self.focal = self.world.size / (2 * FIELD)
        self.disparity = self.focal * self.world.baseline / self.depth

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
        R_p = np.concatenate([self.scene.R, self.scene.p[..., None]], -1)   # (1,n,T,3,4)
        pose = F.pad(self.world.tensor(R_p[0]), (0, 0, 0, 1))
        pose[..., 3, 3] = 1
        return pose

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
        """How far pixels go, (n,T-1,H,W,2), and whether they are seen there."""
        # each frame's points are asked for in the next one
        pixel, seen = self.world.follow(self.scene, self.point.roll(1, 2), self.ids.roll(1, 1))
        centre = torch.arange(self.world.size, device=self.ids.device) + 0.5
        start = torch.meshgrid(centre, centre, indexing="xy")
        return pixel[:, 1:] - torch.stack(start, -1), seen[:, 1:]

    @property
    def flow(self):
        return self.in_next_frame[0]

    @property
    def flow_visible(self):
        return self.in_next_frame[1]

    @cached_property
    def tracked(self):
        """Pixels of the first frame in all frames, (n,T,P,2), and whether they are seen."""
        pixels = self.world.size ** 2
        count = self.world.points
        generators = self.world.generators(self.indices, 1)
        start = [g.choice(pixels, count, replace=count > pixels) for g in generators]
        start = torch.as_tensor(np.stack(start), device=self.ids.device)    # (n,P)
        ids = self.ids[:, 0].flatten(1).gather(1, start)
        point = self.point[:, :, 0].flatten(2).gather(2, start.expand(3, -1, -1))
        pixel, seen = self.world.follow(self.scene, point[:, :, None, None], ids[:, None, None])
        return pixel[:, :, 0], seen[:, :, 0]

    @property
    def tracks(self):
        return self.tracked[0]

    @property
    def visible(self):
        return self.tracked[1]

    @cached_property
    def right_scene(self):
        # along the camera's x axis
        aside = self.world.baseline * self.scene.R[..., 0]
        return replace(self.scene, p=self.scene.p + aside)

    @property
    def right(self):
        generators = self.world.generators(self.indices, 2)
        return self.world.picture(self.right_scene, self.world.grain(generators))

    @property
    def disparity_visible(self):
        _, seen = self.world.follow(self.right_scene, self.point, self.ids)
        return seen

    @cached_property
    def impossible(self):
        return self.world.picture(self.scenes[1], self.grain)

    @property
    def change(self):
        differs = (self.video != self.impossible).flatten(2).any(-1)        # (n,T)
        return differs.int().argmax(1)


if __name__ == "__main__":
    main()
