"""data.py on files as they occur: every container and codec that FFmpeg writes here, times that are irregular, headers
that lie, hostile files, folders of pictures and junk, lists in odd shapes, datasets of other people."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data as D
import model as M
import train_vjepa as V

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="FFmpeg is not installed: apt-get install -y ffmpeg"
)
ROOT = Path(D.__file__).parent
# the grey level of frame i tells i modulo 16
SOURCE = "color=black:size=96x64:rate=30:duration=5,format=yuv420p,geq=lum='24+13*mod(N,16)':cb=128:cr=128"
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "10", "-g", "30", "-bf", "3")
DROP = ("-vf", "select='not(eq(mod(n\\,5)\\,3))'", "-vsync", "vfr")
FILES = {
    "h264.mp4": X264,
    "h264.mov": X264,
    "h264.mkv": X264,
    "h264.flv": X264,
    "h264.ts": X264,
    "h264.mts": X264,
    "opengop.ts": (*X264, "-x264-params", "open-gop=1:keyint=30:scenecut=0"),
    "fragments.mp4": (*X264, "-movflags", "frag_keyframe+empty_moov"),
    "one_key.mp4": (*X264[:-3], "250", "-bf", "2"),
    "late.mp4": (*X264, "-output_ts_offset", "5"),
    "variable.mp4": (*X264, *DROP),
    "variable.mkv": (*X264, *DROP),
    "hevc.mp4": ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:keyint=30"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-q:v", "2"),
    "mpeg2.ts": ("-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-q:v", "2"),
    "mpeg4.mp4": ("-c:v", "mpeg4", "-g", "30", "-bf", "2", "-q:v", "2"),
    "mpeg4.3gp": ("-c:v", "mpeg4", "-g", "30", "-q:v", "2"),
    "xvid.avi": ("-c:v", "mpeg4", "-vtag", "XVID", "-g", "250", "-bf", "2", "-q:v", "2"),
    "plain.avi": ("-c:v", "mpeg4", "-g", "30", "-bf", "0", "-q:v", "2"),
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "2"),
    "wmv2.wmv": ("-c:v", "wmv2", "-q:v", "2"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-b:v", "1M", "-cpu-used", "8", "-deadline", "realtime"),
    "av1.mp4": ("-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-g", "30"),
    "picture.gif": ("-c:v", "gif"),
}


def ffmpeg(*command):
    done = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, command)], capture_output=True)
    return done.returncode == 0


def levels(video):
    """(..., T,H,W,3) -> the numbers of these frames, modulo 16."""
    grey = video.float().mean((-1, -2, -3)).numpy() * 219 / 255 + 16
    return np.round((grey - 24) / 13).astype(int)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("containers")
    return lambda name: folder / name if ffmpeg("-f", "lavfi", "-i", SOURCE, *FILES[name], folder / name) else None


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_that_was_asked_for(made, name):
    """20 random clips by number and 20 by time, against what the frames show. The plain control, mp4, is never slow."""
    path = made(name)
    if path is None:
        pytest.skip(f"this FFmpeg cannot write {name}")
    kept = [n for n in range(150) if "variable" not in name or n % 5 != 3]
    shown = np.array(kept) / 30
    whole = dict(size=16, scale=(1.0, 1.0), flip=False)
    for seed in range(20):
        clip = D.Clip(frames=8, stride=4, **whole)
        video, (cut,) = D.read_cuts(str(path), clip, [np.random.default_rng(seed)])
        assert (np.diff(cut.ids) == 4).all() and not cut.repeats
        assert (levels(video[0]) == np.array(kept)[cut.ids] % 16).all(), (name, seed, cut.ids)

        clip = D.Clip(frames=8, fps=7.3, **whole)
        video, (cut,) = D.read_cuts(str(path), clip, [np.random.default_rng(seed)])
        late = np.searchsorted(shown, cut.ids + 0.001, side="right") - 1
        early = np.searchsorted(shown, cut.ids - (0.012 if "gif" in name else 0.002), side="right") - 1
        off = (levels(video[0]) - np.array(kept)[late]) % 16
        # gif rounds times to a hundredth of a second, to either side
        off[(off == 1) & ("gif" in name)] = 0
        assert ((off == 0) | (levels(video[0]) == np.array(kept)[early] % 16)).all(), (name, seed, cut.ids)
    facts = D.inspect_video(str(path))
    assert facts["reason"] is None and facts["frames"] == len(kept)
    assert not (name == "h264.mp4" and facts["slow"])


def test_a_clip_of_a_long_file_reads_little_of_it(made, tmp_path):
    """An hour of 100 MB costs a clip what a minute costs it: under a megabyte."""
    minute = tmp_path / "minute.mp4"
    noise = "testsrc2=size=192x128:rate=30:duration=60"
    assert ffmpeg("-f", "lavfi", "-i", noise, "-c:v", "libx264", "-preset", "ultrafast", "-g", 30, minute)
    (tmp_path / "list.txt").write_text("file minute.mp4\n" * 20)
    long = tmp_path / "long.mp4"
    assert ffmpeg("-f", "concat", "-i", tmp_path / "list.txt", "-c", "copy", long)

    def read(path, seed):
        def count():
            return int(Path("/proc/self/io").read_text().split()[1])

        before = count()
        D.read_clips(str(path), D.Clip(frames=16, size=32), [np.random.default_rng(seed)])
        return count() - before

    read(minute, 0)
    costs = [read(path, seed) for path in (minute, long) for seed in (1, 2)]
    assert os.path.getsize(long) > 15e6 and max(costs) < 3e6, costs


# --- hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n../secret.ts\n",
        "ffconcat version 1.0\nfile '../secret.ts'\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
        "<?xml version='1.0'?><MPD></MPD>\n",
    ],
)
def test_files_that_lead_to_other_files_are_no_videos(tmp_path, text):
    """Whatever they are called; a live playlist would hang the reader."""
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(ValueError, match="a text file, not a video"):
        D.read_clips(str(tmp_path / "list.mp4"), D.Clip(frames=2, size=16))
    assert D.inspect_video(str(tmp_path / "list.mp4"))["reason"] == "a text file, not a video"


def test_frames_over_the_limit_are_damage(made, tmp_path, monkeypatch):
    video = made("h264.mp4")
    assert ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64", "-frames:v", 1, tmp_path / "a.png")
    monkeypatch.setattr(D, "MAX_MEGAPIXELS", 0.006)
    for path in (video, tmp_path / "a.png"):
        with pytest.raises(ValueError, match="96x64 (are|is) over the limit of 0.006 megapixels"):
            D.read_clips(str(path), D.Clip(frames=2, size=16))


def test_a_video_without_frames_is_damage(made, monkeypatch):
    """Whichever way its frames are looked for."""
    path = made("h264.mp4")
    monkeypatch.setattr(D, "sequence", lambda decoder: iter(()))
    video = D.Video(str(path))
    for find in (lambda: video.count(np.arange(3)), lambda: video.walk(np.array([0.5]))):
        with pytest.raises(ValueError, match="it holds no frame"):
            find()
    made("xvid.avi")
    assert D.inspect_video(str(path.with_name("xvid.avi")))["reason"]


def test_a_quoted_header_is_a_header(tmp_path):
    touch(tmp_path, "a.mp4")
    for text in ('"path","label"\na.mp4,1\n', "path,label\na.mp4,1"):
        (tmp_path / "list.csv").write_text(text)
        assert D.parse_list(tmp_path / "list.csv").labels.tolist() == [1]


def test_large_frames_are_cut_in_pieces(made, monkeypatch):
    path = str(made("h264.mp4"))
    clip = D.Clip(frames=8, stride=3, size=16, segments=3, train=False, views=3)
    whole = D.read_clips(path, clip)
    monkeypatch.setattr(D, "PIECE_BYTES", 2 * 96 * 64 * 3)
    most = []
    find = D.Video.by_number
    monkeypatch.setattr(D.Video, "by_number", lambda self, ids: most.append(len(ids)) or find(self, ids))
    assert torch.equal(whole, D.read_clips(path, clip)) and max(most) == 2


def test_the_file_that_killed_a_worker_is_named_and_left_out(run, pictures, tmp_path):
    """The same command with --resume replaces it, as it does a damaged one."""
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "import os, signal, sys\nsys.path.insert(0, os.getcwd())\nimport data, train_vjepa as V\n"
        "real = data.read_cuts\n"
        "def read(path, *rest):\n"
        "    if path.endswith('/3.png'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path, *rest)\n"
        "data.read_cuts = read\n"
        "V.launch(V.main, V.parse_args(sys.argv[1:]))\n"
    )
    flags = ("--preset", "laptop", "--probe_data", "--steps", 8, "--batch_size", 4, "--warmup", 1, "--sample_every", 0,
             "--data", pictures, "--out_dir", tmp_path / "out", "--workers", 1, "--save_every", 1, "--resume")
    status, last, err = run(deadly, *flags, timeout=120)
    words = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(words) == 1 and "as it read" in words[0] and "3.png" in words[0], err
    status, last, err = run(deadly, *flags, timeout=120)
    assert status == 0 and last["steps"] == 8 and last["bad"] > 0, err
    assert "3.png: a loader process died or hung as it read this" in err


# --- folders and lists ----------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_what_is_data_in_a_folder(tmp_path):
    touch(tmp_path, "a/1.mp4", "a/._1.mp4", "a/notes.txt", "b/1.mp4", "b/.DS_Store", "__MACOSX/a/._1.mp4",
          ".ipynb_checkpoints/1.mp4", "b/deep/er/2.MP4", "empty/readme.md")
    source = D.parse_list(tmp_path)
    assert [(os.path.relpath(p, tmp_path), k) for p, k in zip(source.paths, source.labels)] == [
        ("a/1.mp4", 0), ("b/1.mp4", 1), ("b/deep/er/2.MP4", 1)]
    assert source.classes == ("a", "b")
    os.symlink(tmp_path, tmp_path / "loop")
    with pytest.raises(D.DataError, match="loop.*leads back"):
        D.parse_list(tmp_path)


def test_a_folder_of_numbered_images_is_a_video(tmp_path, run):
    for name in ("walk", "run"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        assert ffmpeg("-f", "lavfi", "-i", SOURCE, "-frames:v", 12, tmp_path / "videos" / name / "img_%05d.png")
    touch(tmp_path, "photos/n01_10026.jpg", "photos/n01_10031.jpg", "photos/n01_10039.jpg")
    source = D.parse_list(tmp_path / "videos")
    assert [os.path.basename(p) for p in source.paths] == ["run", "walk"] and source.labels.tolist() == [-1, -1]
    assert len(D.parse_list(tmp_path / "videos" / "walk")) == 1 and len(D.parse_list(tmp_path / "photos")) == 3
    clip = D.Clip(frames=4, stride=2, size=16, train=False)
    assert levels(D.read_clips(source.paths[0], clip)).tolist() == [[3, 5, 7, 9]]
    with pytest.raises(ValueError, match="numbered images have no frame rate"):
        D.read_clips(source.paths[0], D.Clip(frames=4, fps=5, size=16, train=False))
    (tmp_path / "list.txt").write_text("videos/walk 1\nvideos/run 0\n")
    assert D.parse_list(tmp_path / "list.txt").labels.tolist() == [1, 0]
    status, last, err = run("data.py", "index", "frames", tmp_path / "videos", "--out", tmp_path / "made.txt")
    assert status == 0 and last["rows"] == 2, err
    assert (tmp_path / "made.txt").read_text() == "videos/run\nvideos/walk\n"
    status, _, err = run("data.py", "pack", tmp_path / "made.txt", tmp_path / "packed", "--workers", 0)
    assert status == 2 and "no frame rate; say it: --fps" in err
    status, last, err = run("data.py", "pack", tmp_path / "made.txt", tmp_path / "packed", "--workers", 0, "--fps", 10)
    assert status == 0 and last["rows"] == 2, err
    clip = D.Clip(frames=4, fps=5, size=16, train=False)
    assert levels(D.read_clips(str(tmp_path / "packed/videos/videos/run.mp4"), clip)).tolist() == [[2, 4, 6, 8]]


def test_names_of_files_and_lists_in_odd_shapes(tmp_path):
    touch(tmp_path, "a.mp4", "b c.mp4", "v/1.mp4", "v/2.mp4")
    assert [*D.parse_list(tmp_path / "a.mp4").paths] == [str(tmp_path / "a.mp4")]
    assert len(D.parse_list(f"{tmp_path}/v/*.mp4")) == 2
    with pytest.raises(D.DataError, match="cannot read the list"):
        D.parse_list(f"{tmp_path}/w/*.mp4")
    with pytest.raises(D.DataError, match="the built-in world is called world"):
        D.parse_list("wrld")
    old_mac = tmp_path / "mac.txt"
    old_mac.write_bytes(b"a.mp4 1\rb c.mp4 2\r")
    assert D.parse_list(old_mac).labels.tolist() == [1, 2]
    (tmp_path / "long.txt").write_text("x" * 140_000 + ".mp4 0\n")
    with pytest.raises(D.DataError, match="long.txt:1: no file"):
        D.parse_list(tmp_path / "long.txt")
    with pytest.raises(D.DataError, match="bin.txt:1: no path in this row"):
        (tmp_path / "bin.txt").write_bytes(bytes(100))
        D.parse_list(tmp_path / "bin.txt")


def test_classes_go_by_their_names(tmp_path, capsys):
    """Text labels, in either form of a list; a class that one side lacks moves no other; numbers cost by how many
    there are, not by the largest."""
    touch(tmp_path, "a.mp4", "b b.mp4", "c.mp4")
    (tmp_path / "train.txt").write_text("a.mp4 wave\nb b.mp4 nod\nc.mp4 clap\n")
    (tmp_path / "val.csv").write_text("path,label\na.mp4,wave\nb b.mp4,nod\n")
    train, val = (D.parse_list(tmp_path / name, labelled=True) for name in ("train.txt", "val.csv"))
    assert train.classes == ("clap", "nod", "wave") and val.classes == ("nod", "wave")
    train, val = D.match_classes(train, val)
    assert train.labels.tolist() == [2, 1, 0] and val.labels.tolist() == [2, 1] and val.classes == train.classes
    assert "1 of 3 classes occur in train only: clap" in capsys.readouterr().err
    (tmp_path / "numbers.txt").write_text("a.mp4 1000000\nb b.mp4 7\nc.mp4\n")
    source = D.parse_list(tmp_path / "numbers.txt")
    one, two = D.match_classes(source, source)
    assert one.labels.tolist() == [1, 0, -1] and one.classes == ("7", "1000000")


def test_rows_of_a_long_list_are_what_a_plain_parser_says(tmp_path):
    """Over the seams of the pieces that it is read in, too."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30_000):
        name = "".join(rng.choice([*"ab _ü,-"], 12)).strip() or "x"
        label = ["", f" {i % 7}", f"\t{i}", f"  {i % 3} "][i % 4]
        rows.append(f"{name}/{i}.mp4{label}" + "\r" * (i % 5 == 0))
    rows.insert(7, "   ")
    text = "\n".join(rows)
    (tmp_path / "list.txt").write_text(text * 12, newline="")
    source = D.parse_list(tmp_path / "list.txt", look=False)
    want = []
    for row in (text * 12).split("\n"):
        if row.strip():
            path, *label = row.strip().rsplit(None, 1)
            whole = label and label[0].isdigit()
            want.append((path, int(label[0])) if whole else (row.strip(), -1))
    got = [(source.paths.written(i), int(source.labels[i])) for i in range(len(source))]
    assert got == want and source.paths.text.count(b"\n") > 300_000


def test_the_same_data_elsewhere_are_the_same_data(tmp_path):
    touch(tmp_path, "a/1.mp4", "a/2.mp4")
    (tmp_path / "a" / "list.txt").write_text("1.mp4 0\n2.mp4 1\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "1.mp4", (1, 1))
    a, b = (D.fingerprint([D.parse_list(tmp_path / name / "list.txt")]) for name in "ab")
    assert a["data_hash"] == b["data_hash"] and a["data_times"] != b["data_times"]
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "b" / "2.mp4").write_bytes(b"xy")
    assert D.fingerprint([D.parse_list(tmp_path / "b" / "list.txt")])["data_hash"] != a["data_hash"]
    # a pattern, one video and a flat folder are the same elsewhere, too
    for name in ("*.mp4", "1.mp4", ""):
        a, b = (D.fingerprint([D.parse_list(f"{tmp_path}/{folder}/{name}")]) for folder in "ac")
        assert a["data_hash"] == b["data_hash"], name


# --- what is lost is said -------------------------------------------------------------------------


def test_clips_whose_frames_repeat_are_counted(call, made, tmp_path, capsys):
    import train_vjepa

    made("h264.mp4")
    assert ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=30", "-t", 0.3, tmp_path / "short.mp4")
    shutil.copy(made("h264.mp4"), tmp_path / "long.mp4")
    (tmp_path / "list.txt").write_text("short.mp4\nlong.mp4\n")
    flags = ("--preset", "laptop", "--probe_data", "--steps", 4, "--batch_size", 4, "--warmup", 1, "--log_every", 4,
             "--sample_every", 0, "--workers", 0, "--data", tmp_path / "list.txt")
    for short, share in (("repeat", 50), ("spread", 0)):
        call(train_vjepa, *flags, "--stride", 1, "--frames", 10 if short == "repeat" else 8, "--short", short,
             "--out_dir", tmp_path / short)
        log = (tmp_path / short / "log.jsonl").read_text().splitlines()
        last = [json.loads(line) for line in log if "padded_pct" in line][-1]
        assert last["padded_pct"] == share
    (tmp_path / "one.txt").write_text("short.mp4\n")
    source = D.parse_list(tmp_path / "one.txt")
    for clip, repeats in ((D.Clip(8, 1, size=16), 0), (D.Clip(8, 4, size=16), 2), (D.Clip(8, fps=60, size=16), 2)):
        (batch,) = D.make_loader([source], clip, seed=0, batch_size=2, micro_batch=2, steps=1)
        assert batch["padded"] == repeats
    summary, status = D.check(str(tmp_path / "list.txt"), workers=0, frames=16, stride=4)
    assert status == 0 and summary["shorter_than_a_clip"] == 1 and summary["read_without_seeking"] == 0


def test_a_frame_that_is_shown_through_a_gap_is_counted_as_repeated(tmp_path):
    file = tmp_path / "gap.mkv"
    assert ffmpeg("-f", "lavfi", "-i", SOURCE, "-vf", "select='not(between(n,40,110))'", "-vsync", "vfr", *X264, file)
    repeats = []
    for seed in range(8):
        clip = D.Clip(frames=8, fps=10, size=16, scale=(1.0, 1.0), flip=False)
        video, (cut,) = D.read_cuts(str(file), clip, [np.random.default_rng(seed)])
        within = int(((cut.ids > 39.5 / 30) & (cut.ids < 110.5 / 30)).sum())
        assert cut.repeats == (within > 1 or within == 1 and bool((np.abs(cut.ids - 39.2 / 30) < 0.02).any()))
        repeats.append(cut.repeats)
    assert set(repeats) == {True, False}


@pytest.mark.parametrize("order", "<>")
def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path, order):
    """EXIF's eight orientations, by their definition: where the picture's first row and first column lie."""
    assert ffmpeg("-f", "lavfi", "-i", RAMP, "-frames:v", "1", "-q:v", "1", tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    plain = D.open_frames(str(tmp_path / "a.jpg")).by_number(np.array([0]))[0][0].numpy()
    upright = [plain, plain[:, ::-1], plain[::-1, ::-1], plain[::-1], plain.swapaxes(0, 1), np.rot90(plain, -1),
               np.rot90(plain, 2).swapaxes(0, 1), np.rot90(plain)]
    for orientation, want in enumerate(upright, 1):
        entries = struct.pack(order + "IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
        exif = b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + entries
        file = tmp_path / f"{orientation}.jpg"
        file.write_bytes(raw[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + raw[2:])
        assert (D.open_frames(str(file)).by_number(np.array([0]))[0][0].numpy() == want).all(), orientation


RAMP = "gradients=s=128x96:c0=black:c1=white:x0=0:y0=0:x1=127:y1=95:d=1:r=10"
# what FFmpeg is told, bits of a channel, transparent
DEPTHS = {
    "limited.mp4": (("-pix_fmt", "yuv444p", "-c:v", "libx264", "-qp", "0"), 8, False),
    "full.mp4": (("-vf", "scale=out_range=pc", "-color_range", "pc", "-pix_fmt", "yuv444p", "-c:v", "libx264", "-qp",
                  "0"), 8, False),
    "ten.mp4": (("-pix_fmt", "yuv444p10le", "-c:v", "libx264", "-qp", "0"), 10, False),
    "twelve.mp4": (("-pix_fmt", "yuv420p12le", "-c:v", "libx265", "-x265-params", "lossless=1:log-level=none"), 12,
                   False),
    "grey.mkv": (("-pix_fmt", "gray16le", "-c:v", "ffv1"), 16, False),
    "alpha.mov": (("-pix_fmt", "argb", "-c:v", "qtrle"), 8, True),
    "grey.png": (("-frames:v", "1", "-pix_fmt", "gray16be"), 16, False),
    "colour.png": (("-frames:v", "1", "-pix_fmt", "rgb48be"), 16, False),
    "alpha.png": (("-frames:v", "1", "-pix_fmt", "rgba"), 8, True),
    "bits.png": (("-frames:v", "1", "-pix_fmt", "monob"), 8, False),
    "photo.jpg": (("-frames:v", "1", "-pix_fmt", "yuvj444p", "-q:v", "1"), 8, False),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_values_of_any_depth_and_range_are_scaled_and_what_is_lost_is_said(tmp_path, capsys, monkeypatch, name):
    flags, bits, alpha = DEPTHS[name]
    file = tmp_path / name
    assert ffmpeg("-f", "lavfi", "-i", RAMP, *flags, file)
    deep = ("ffmpeg", "-v", "error", "-i", file, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gbrp16le",
            "-sws_flags", "accurate_rnd+full_chroma_int", "-")
    raw = np.frombuffer(subprocess.run(deep, capture_output=True, check=True).stdout, np.uint16)
    colours = raw.reshape(3, 96, 128)[[2, 0, 1]].transpose(1, 2, 0) / 257
    monkeypatch.setattr(D, "TOLD", set())
    frame = D.open_frames(str(file)).by_number(np.array([0]))[0][0].numpy()
    # 8 bits a channel, and where chroma is halved its rounding
    assert np.abs(frame - colours).max() < 3
    said = capsys.readouterr().err
    assert ("over 8 bits a channel" in said) == (bits > 8) and ("transparent" in said) == alpha
    facts = D.inspect_video(str(file))
    assert facts["reason"] is None and facts["size"] == "128x96"
    assert facts["loses"] == ["depth"] * (bits > 8) + ["alpha"] * alpha


def clips_are_right(path, clip=D.Clip(frames=8, stride=4, size=16), tries=12):
    for seed in range(tries):
        (video,), (cut,) = D.read_cuts(str(path), clip, [np.random.default_rng(seed)])
        assert np.array_equal(levels(video), cut.ids.astype(int) % 16), (path, seed, cut.ids)


@pytest.mark.parametrize("name", ["xvid.avi", "mpeg2.mpg"])
def test_a_wrong_suffix_changes_no_frame(made, tmp_path, name):
    if not (path := made(name)):
        pytest.skip(f"this FFmpeg cannot write {name}")
    clips_are_right(shutil.copy(path, tmp_path / "named.mp4"))
    assert D.inspect_video(str(tmp_path / "named.mp4"))["reason"] is None


@pytest.mark.parametrize("kind", ["mkv", "webm", "flv", "mp4", "ts"])
def test_sound_that_lasts_longer_is_no_damage(made, tmp_path, kind):
    sound = ("-f", "lavfi", "-i", "sine=duration=7", "-c:a", "libopus" if kind == "webm" else "aac")
    codec = ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime") if kind == "webm" else ("-c:v", "copy")
    path = tmp_path / f"long.{kind}"
    if not ffmpeg("-i", made("h264.mp4"), *sound, *codec, path):
        pytest.skip(f"this FFmpeg cannot write {kind}")
    facts = D.inspect_video(str(path))
    assert facts["reason"] is None and facts["frames"] == 150
    clips_are_right(path)
    clip = D.Clip(frames=8, stride=4, size=16, train=False, segments=4)
    assert D.read_clips(path, clip).shape[0] == 4


def test_a_recording_that_begins_between_two_key_frames(made, tmp_path):
    whole = made("h264.ts").read_bytes()
    (tmp_path / "late.ts").write_bytes(whole[188 * 40 :])
    facts = D.inspect_video(str(tmp_path / "late.ts"))
    assert facts["reason"] is None and 60 < facts["frames"] < 150
    for seed in range(6):  # where numbers start is not known, how far they lie apart is
        frames = D.read_clips(tmp_path / "late.ts", D.Clip(8, 4, size=16), [np.random.default_rng(seed)])
        assert (np.diff(levels(frames)[0]) % 16 == 4).all(), seed


def test_what_an_edit_list_cuts_off_is_not_counted(made, tmp_path):
    path = tmp_path / "cut.mp4"
    assert ffmpeg("-ss", "0.6", "-i", made("variable.mp4"), "-c", "copy", path)
    shown = levels(torch.stack([frame for frame, _, _ in D.sequence(D.open_video(str(path)))]))
    assert D.Video(str(path)).frames == len(shown)
    for seed in range(20):
        (video,), (cut,) = D.read_cuts(path, D.Clip(8, 4, size=16), [np.random.default_rng(seed)])
        assert np.array_equal(levels(video), shown[cut.ids.astype(int)]), (seed, cut.ids)


@pytest.mark.parametrize("head", ["#EXTM3U\n#\u00e9\n", "ffconcat version 1.0\n#\u00e9\n"])
def test_a_letter_beyond_ascii_makes_no_video_of_a_text(tmp_path, head):
    (tmp_path / "play.mp4").write_text(head + "file x.mp4\n" * 9)
    with pytest.raises(ValueError, match="a text file, not a video"):
        D.read_clips(str(tmp_path / "play.mp4"), D.Clip())
    assert D.pack_video((str(tmp_path / "play.mp4"), tmp_path / "out/play.mp4", (), 0)) == "a text file, not a video"


def test_packed_lists_keep_the_class_names_and_no_video_is_lost(made, tmp_path, run, capsys):
    for place in ("train/a/1", "train/b/1", "val/b/1", "same/x.avi", "same/x"):
        path = tmp_path / f"{place}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert ffmpeg("-f", "lavfi", "-i", SOURCE, "-frames:v", 8, path)
    (tmp_path / "same/x.mp4").rename(tmp_path / "same/x.avi")
    for split in ("train", "val"):
        status, _, err = run("data.py", "pack", tmp_path / split, tmp_path / f"{split}_packed", "--workers", 0)
        assert status == 0, err
    lists = [D.parse_list(tmp_path / f"{split}_packed/{split}.txt") for split in ("train", "val")]
    assert D.match_classes(*lists)[1].labels.tolist() == [1]
    status, _, err = run("data.py", "pack", tmp_path / "same", tmp_path / "p", "--workers", 0)
    assert status == 2 and "2 of its videos would all be" in err
    shutil.copy(tmp_path / "train/a/1.mp4", tmp_path / "train/loose.mp4")
    capsys.readouterr()
    assert len(D.parse_list(tmp_path / "train")) == 2
    assert "1 videos beside the class folders are left out" in capsys.readouterr().err
    for a, b in ("ab", "ba"):
        (tmp_path / f"train/{a}/link").symlink_to(tmp_path / f"train/{b}")
    with pytest.raises(D.DataError, match="leads back to"):
        D.parse_list(tmp_path / "train")
    status, last, err = run("data.py", "pack", tmp_path / "val/b/1.mp4", tmp_path / "one", "--workers", 0)
    assert status == 0 and last["list"].endswith("one/1.mp4.txt") and len(D.parse_list(last["list"])) == 1, err


def test_lists_with_what_no_parser_expects(tmp_path):
    huge = "path,label\na.mp4,99999999999999999999999\n"
    for text, words in ((huge, "out of range"), (f'path,label\n"{"x" * 200_000}",1\n', "no file")):
        (tmp_path / "l.csv").write_text(text)
        with pytest.raises(D.DataError, match=words):
            D.parse_list(tmp_path / "l.csv")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "l.txt").write_text("a.mp4 0\nb.mp4 1\n")
    source = D.parse_list(tmp_path / "l.txt", look=False)  # whoever asks for no class does not care
    with pytest.raises(D.DataError, match="l.txt:2: label 1 is out of range: classes.txt .* names 1 classes"):
        D.match_classes(source, source)


def test_notes_of_loader_processes_are_said_once(tmp_path, monkeypatch, capsys):
    assert ffmpeg("-f", "lavfi", "-i", RAMP, "-pix_fmt", "yuv444p10le", "-c:v", "libx264", "-frames:v", 9,
                  tmp_path / "ten.mp4")
    (tmp_path / "list.txt").write_text("ten.mp4\n" * 8)
    monkeypatch.setattr(D, "TOLD", set())
    clip = D.Clip(frames=2, size=16, train=False)
    assert len(list(D.eval_batches(D.parse_list(tmp_path / "list.txt"), clip, batch_size=2, workers=2))) == 4
    assert capsys.readouterr().err.count("over 8 bits") == 1


def test_only_the_file_of_the_process_that_died_is_left_out(monkeypatch):
    rows = torch.zeros(3, 4096, dtype=torch.uint8)
    for row, (pid, since, path) in zip(rows, [(11, 5.0, b"/a"), (12, 3.0, b"/b"), (13, 4.0, b"")]):
        text = bytearray(D.struct.pack("qd", pid, since) + path + b"\0")
        row[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    for error, found in ((RuntimeError("DataLoader worker (pid 11) is killed by signal: Killed."), {"/a"}),
                         (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), {"/b"}),
                         (RuntimeError("DataLoader timed out after 8 seconds"), {"/b"}),
                         (ConnectionResetError(), {"/b"}), (EOFError(), {"/b"})):  # while a batch changes hands
        monkeypatch.setattr(D, "WATCHED", [rows])
        monkeypatch.setattr(D, "POISON", set())
        assert D.dead_worker(error) and D.POISON == found


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_a_loader_that_loses_its_process_in_the_middle_of_a_batch_ends_in_one_line(
    error, tmp_path, capsys, monkeypatch
):
    def main(args):
        raise error

    monkeypatch.setattr(M, "keep_console", lambda: None)  # pytest's own
    with pytest.raises(SystemExit) as left:
        M.launch(main, V.parse_args(["--preset", "laptop", "--out_dir", str(tmp_path / "out")]))
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 1 and len(told) == 1 and told[0].startswith("error: a loader process died or hangs")


# --- other people's data --------------------------------------------------------------------------


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, row):
        return np.full((20, 30, 40, 3), row, np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None] * 12


def test_any_dataset_is_a_source(tmp_path):
    """With the plan, ranks, workers and the online probe as files have them."""
    source = D.of_dataset(Noise(), labels=range(10))
    clip = D.Clip(frames=4, stride=2, size=16)
    sizes = dict(seed=0, batch_size=4, micro_batch=2, steps=5)
    one = list(D.make_loader([source], clip, **sizes))
    drawn = sorted(itertools.chain(*(batch["label"].tolist() for batch in one)))
    assert drawn == sorted([*range(10)] * 2)
    for batch in one:
        first = batch["video"][:, 0, 0, 0, 0].int()
        assert ((first - batch["label"]) % 12 == 0).all()
        assert (batch["video"][:, 1, 0, 0, 0].int() - first == 24).all()
    parts = [D.make_loader([source], clip, rank=rank, ranks=2, workers=1, **sizes) for rank in range(2)]
    for alone, *both in zip(one[::2], *parts):
        assert torch.equal(alone["video"], both[0]["video"])
    with pytest.raises(D.DataError, match="uint8 .n,H,W,3. is needed"):
        next(iter(D.make_loader([D.of_dataset([np.zeros((4, 8, 8))])], clip, **sizes)))


def test_a_dataset_of_ones_own_is_a_diff_of_under_25_lines(tmp_path):
    """train_vjepa.py on a numpy file: tests/fork_dataset.diff."""
    diff = (ROOT / "tests" / "fork_dataset.diff").read_text()
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) < 25
    for name in ("train_vjepa.py", "model.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)
    np.save(tmp_path / "clips.npy", np.random.default_rng(0).integers(0, 256, (6, 12, 40, 40, 3), dtype=np.uint8))
    flags = "--preset laptop --probe_data --steps 3 --batch_size 4 --warmup 1 --sample_every 0 --data clips.npy"
    command = [sys.executable, "train_vjepa.py", *flags.split(), "--stride", "1", "--out_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["steps"] == 3, done.stderr[-1500:]


def test_several_clips_of_the_world(tmp_path):
    (batch,) = D.make_loader(
        [D.parse_list("world")], D.Clip(8, 1, size=16, clips=4), seed=0, batch_size=8, micro_batch=8, steps=1)
    assert len(set(batch["path"])) == 8 and len({video.numpy().tobytes() for video in batch["video"]}) == 8


def shown(path):
    """The grey level and the time of each frame, one after the other."""
    frames = [(frame.float().mean().item(), time) for frame, time, _ in D.sequence(D.open_video(path))]
    grey, times = np.array(frames).T
    return grey, times - times[0]


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_of_two_streams_one_is_read_looked_up_and_packed(tmp_path, kind):
    """The better one, which is the second and has gaps; times of the other made a clip look for its frames for ever."""
    file = tmp_path / f"two.{kind}"
    sparse = ("-f", "lavfi", "-i", "color=white:size=32x32:rate=2:duration=20")
    gaps = ("-filter:v:1", "select='not(eq(mod(n,5),3))'", "-vsync", "vfr")
    which = ("-map", 0, "-map", 1, "-disposition:v:0", 0, "-disposition:v:1", "default")
    assert ffmpeg(*sparse, "-f", "lavfi", "-i", SOURCE, *which, *gaps, *X264, file)
    grey, times = shown(file)
    assert len(grey) == 120 and np.ptp(np.diff(times)) > 0.03
    for seed in range(4):
        clip = D.Clip(frames=8, stride=4, size=16)
        video, (cut,) = D.read_cuts(str(file), clip, [np.random.default_rng(seed)])
        assert cut.shape[0] == 120
        assert np.abs(video.float().mean((0, 2, 3, 4)).numpy() - grey[cut.ids]).max() < 3
    assert D.inspect_video(str(file))["reason"] is None
    D.pack(str(file), str(tmp_path / "packed"), short_side=64, workers=0)
    (packed,) = (tmp_path / "packed/videos").iterdir()
    assert np.abs(np.stack(shown(packed)) - np.stack([grey, times])).max() < 3
    assert np.abs(shown(packed)[1] - times).max() < 2e-3


def test_packing_keeps_the_times_of_a_varying_rate(tmp_path):
    """20 frames a second, then 60: a constant rate repeats the former or leaves out the latter."""
    file = tmp_path / "both.mkv"
    slow = "setpts='if(lt(N,50),N/20,2.5+(N-50)/60)/TB'"
    assert ffmpeg("-f", "lavfi", "-i", SOURCE, "-vf", slow, "-vsync", "vfr", "-enc_time_base", "1/60", *X264, file)
    grey, times = shown(file)
    D.pack(str(file), str(tmp_path / "packed"), workers=0)
    (packed,) = (tmp_path / "packed/videos").iterdir()
    assert len(shown(packed)[1]) == len(times) == 150
    assert np.abs(shown(packed)[1] - times).max() < 2e-3 and np.abs(shown(packed)[0] - grey).max() < 3


def test_recordings_without_a_length_are_read(made, tmp_path):
    """As a browser or a program that was killed leaves them."""
    whole = made("h264.mkv")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(subprocess.run(
        ["ffmpeg", "-v", "error", "-i", whole, "-c", "copy", "-f", "matroska", "-"], capture_output=True).stdout)
    clip = D.Clip(frames=8, stride=4, size=16, train=False)
    assert torch.equal(D.read_clips(str(cut), clip), D.read_clips(str(whole), clip))


def test_a_frame_that_is_held_at_the_end_is_no_damage(tmp_path):
    """One and a half seconds, which the header's length counts as frames."""
    plain, held = tmp_path / "plain.mp4", tmp_path / "held.mp4"
    assert ffmpeg("-f", "lavfi", "-i", SOURCE, *X264[:-2], "-bf", 0, plain)
    longer = "setts=pts=PTS:dts=DTS:duration=if(eq(N\\,149)\\,DURATION*45\\,DURATION)"
    if not ffmpeg("-i", plain, "-c", "copy", "-bsf:v", longer, held):
        pytest.skip("this FFmpeg cannot write it")
    clip = D.Clip(frames=16, stride=4, size=16, train=False, segments=2)
    video, cuts = D.read_cuts(str(held), clip)
    ids = np.concatenate([cut.ids for cut in cuts])
    assert (levels(video.flatten(0, 1)) == np.minimum(ids, 149) % 16).all()


def test_a_file_that_holds_less_than_its_packets_say_is_asked_for_less(made):
    """Decoding from the start found 150 frames, its packets (some are never shown) gave 315 times at half the rate of
    its header: nothing lies beyond the end in seconds, and the same frame was asked for without end."""
    video = D.Video(str(made("h264.mp4")))
    video.times = np.linspace(0, 4.9, 315)
    video.lasts(0.0, 150 * video.tick)
    assert video.frames == len(video.times) == 150


@pytest.mark.parametrize("text", [b"#EXTM3U\n#\x01\nother.ts\n", b"ffconcat version 1.0\n#\x01\nfile other.mp4\n"])
def test_a_control_byte_makes_no_video_of_a_playlist(tmp_path, text):
    (tmp_path / "a.mp4").write_bytes(text + b"\0" * 64)
    with pytest.raises(ValueError, match="a text file"):
        D.open_video(str(tmp_path / "a.mp4"))


def test_a_pipe_in_a_list_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "l.txt").write_text("a.mp4\n")
    with pytest.raises(D.DataError, match="no file"):
        D.parse_list(tmp_path / "l.txt")


def test_two_labels_of_one_name_are_one_class(tmp_path):
    """run, jump, run, sit: jump became run. A first line may have a byte order mark, and letters of another encoding
    stay apart."""
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfrun\njump\nrun\nsit\n\xe9\n\xe8\n")
    (tmp_path / "l.txt").write_text("".join(f"{k}.mp4 {k}\n" for k in range(6)))
    source = D.parse_list(tmp_path / "l.txt", look=False)
    train, _ = D.match_classes(source, source)
    assert [train.classes[k] for k in train.labels] == ["run", "jump", "run", "sit", "\\xe9", "\\xe8"]


def test_names_that_a_list_cannot_say_are_refused(tmp_path):
    for name in ("walk 1", "a\nb.mp4", "x ", "a\udce9.mp4"):
        with pytest.raises(D.DataError, match="another path"):
            D.write_list(tmp_path / "l.txt", [(str(tmp_path / name), -1)])
    for name, label in (("walk 1", 3), ("0001", -1), ("a b.mp4", -1)):
        D.write_list(tmp_path / "l.txt", [(str(tmp_path / name), label)])
        source = D.parse_list(tmp_path / "l.txt", look=False)
        assert (source.paths.written(0), source.labels.tolist()) == (name, [label])


def test_a_name_with_brackets_and_a_pattern_with_other_files(tmp_path, capsys, monkeypatch):
    for name in ("clip[1].mp4", "clip1.mp4", "classes.txt"):
        (tmp_path / name).write_bytes(b"x")
    source = D.parse_list(tmp_path / "clip[1].mp4")
    assert [*source.paths] == [str(tmp_path / "clip[1].mp4")]
    assert len(D.parse_list(tmp_path / "c*")) == 2
    assert "classes.txt, which is no video" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert len(D.parse_list("./clip1.mp4")) == 1 and len(D.parse_list("./c*.mp4")) == 2
    assert not capsys.readouterr().err


def test_a_blank_before_a_quote_in_a_table(tmp_path):
    (tmp_path / "l.csv").write_text('label, "path"\n3, "a b.mp4"\n')
    source = D.parse_list(tmp_path / "l.csv", look=False)
    assert (source.paths.written(0), source.labels.tolist()) == ("a b.mp4", [3])


def test_a_weight_for_some_lists_only_is_refused():
    sources = [D.Source("a", [], np.zeros(4), 0.5), D.Source("b", [], np.zeros(4))]
    for use in (D.weights_of, D.kinds_of, lambda lists: D.Plan(lists, 0)):
        with pytest.raises(D.DataError, match="for every list"):
            use(sources)


def test_a_loader_that_is_not_forked_knows_the_poison(monkeypatch):
    monkeypatch.setattr(D, "POISON", set())
    monkeypatch.setattr(D, "READING", [])
    D.begin_reading(torch.zeros(2, 4096, dtype=torch.uint8), {"deadly.mp4"}, 1)
    assert D.POISON == {"deadly.mp4"}
