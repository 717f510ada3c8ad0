"""data.py: lists and their errors, exact frames and boxes, the plan, the loader, damaged files, masks, the command
line."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data as D

ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="FFmpeg is not installed: apt-get install -y ffmpeg"
)
WIDTH, HEIGHT = 60, 40


def film(path, frames, fps=30, options=()):
    """A lossless video in which red is the frame's number, green is 4 x column and blue is 6 x row."""
    pixels = np.zeros((frames, HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0] = np.arange(frames)[:, None, None]
    pixels[..., 1] = 4 * np.arange(WIDTH)
    pixels[..., 2] = 6 * np.arange(HEIGHT)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            "ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-framerate",
            str(fps), "-i", "-", *options, "-c:v", "libx264rgb", "-qp", "0", "-g", "25", "-y", str(path),
        ],
        input=pixels.tobytes(),
        check=True,
    )
    return str(path)


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """A folder: sound films a.mp4 ... h.mp4 (20 to 27 frames) and a list of them, long.mp4 (120), slow.mkv (1 s at
    30 fps, then 10), a broken one."""
    folder = tmp_path_factory.mktemp("films")
    for i, name in enumerate("abcdefgh"):
        film(folder / f"{name}.mp4", 20 + i)
    film(folder / "long.mp4", 120)
    film(folder / "slow.mkv", 60, options=["-vf", "setpts='if(lt(N,30),N/30,1+(N-30)/10)/TB'"])
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:500])
    (folder / "list.txt").write_text("".join(f"{name}.mp4 {i}\n" for i, name in enumerate("abcdefgh")))
    return folder


def numbers(clips):
    """Which frames these are: (..., T, H, W, 3) -> (..., T)."""
    assert (clips[..., 0].amax((-1, -2)) == clips[..., 0].amin((-1, -2))).all()
    return clips[..., 0, 0, 0].tolist()


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


# --- lists ----------------------------------------------------------------------------------------


def test_rows_of_every_kind(tmp_path):
    touch(tmp_path, "a b, c.mp4", "ü.mp4", "sub/c.mp4", "3")
    (tmp_path / "list.csv").write_bytes(
        "\ufeffa b, c.mp4 3\r\n\r\nü.mp4\t0\nsub/../sub/c.mp4\n3\n".encode() + f"{tmp_path}/ü.mp4 12".encode()
    )
    source = D.parse_list(tmp_path / "list.csv")
    assert [os.path.relpath(p, tmp_path) for p in source.paths] == ["a b, c.mp4", "ü.mp4", "sub/c.mp4", "3", "ü.mp4"]
    assert source.labels.tolist() == [3, 0, -1, -1, 12]
    assert source.labels.dtype == np.int64
    assert source.weight is None
    assert len(source) == 5
    assert D.parse_list(f"{tmp_path}/list.csv:0.25").weight == 0.25
    (tmp_path / "columns.csv").write_text('class,path,label\nwave,"a b, c.mp4",1\nnod,ü.mp4,\n')
    source = D.parse_list(tmp_path / "columns.csv")
    assert source.labels.tolist() == [1, -1] and source.paths[0].endswith("/a b, c.mp4")


def test_folders(tmp_path):
    touch(tmp_path, "x/b.mp4", "x/a.MP4", "y/deep/c.jpg", "y/notes.txt", "empty/readme")
    source = D.parse_list(tmp_path)
    assert [os.path.relpath(p, tmp_path) for p in source.paths] == ["x/a.MP4", "x/b.mp4", "y/deep/c.jpg"]
    assert source.labels.tolist() == [0, 0, 1]
    assert D.parse_list(tmp_path / "x").labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "list.txt: there is no video in it"),
        ("\n \n", {}, "list.txt: there is no video in it"),
        ("a.mp4 0\nb.mp4 0\n", {}, "list.txt:2: no file '.*b.mp4'"),
        ("a.mp4 zero\na.mp4 1\n", {}, "list.txt:1: label 'zero' is neither .*all labels are numbers or all are names"),
        ("a zero\n", {}, "list.txt:1: no file '.*a zero'"),
        ("a.mp4,0\n", {}, "list.txt:1: no file .*comma-separated files need a header"),
        ("a.mp4 1.5\n", {}, "list.txt:1: label '1.5' is neither an integer from 0 on nor a name"),
        ("a.mp4 -1\n", {}, "list.txt:1: label '-1' is neither an integer from 0 on nor a name"),
        ("a.mp4 99999999999\n", {}, "list.txt:1: label 99999999999 is out of range"),
        ("a.mp4 0\na.mp4\n", {"labelled": True}, "list.txt:2: no label"),
        ("https://example.org/a.mp4 0\n", {}, "list.txt:1: .* is a URL"),
        ("sub 0\n", {}, "list.txt:1: a directory without numbered images: '.*sub'"),
        ("../a.mp4 0\n", {}, "list.txt:1: .* leads out of the list's folder"),
        ("sub/../../a.mp4 0\n", {}, "list.txt:1: .* leads out"),
        ("path,label\na.mp4,0\n,1\n", {}, "list.txt:3: no path"),
        ("path,label\na.mp4,1\na.mp4,one\n", {}, "list.txt:3: label 'one' is neither"),
        ("path,label\na.mp4,1\na.mp4,-1\n", {}, "list.txt:3: label '-1' is neither an integer"),
        ("file,label\na.mp4,1\n", {}, "list.txt:1: no file .*need a header with 'path'"),
        ("label,youtube_id,time_start,time_end,split\n", {}, "list.txt: an annotation file.*index kinetics"),
        (b"a.mp4 0\n\xff\xfe", {}, "list.txt: not a text file"),
    ],
)
def test_malformed_lists_name_file_and_line(tmp_path, text, options, message):
    touch(tmp_path, "a.mp4", "sub/x.mp4")
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(D.DataError, match=message) as caught:
        D.parse_list(tmp_path / "list.txt", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_malformed_weights_and_missing_lists(tmp_path, weight):
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(D.DataError, match="weight"):
        D.parse_list(f"{tmp_path}/list.txt:{weight}")
    with pytest.raises(D.DataError, match="cannot read the list"):
        D.parse_list(tmp_path / "no.txt")


# --- frames ---------------------------------------------------------------------------------------


@ffmpeg
@pytest.mark.parametrize("frames, stride", [(4, 4), (16, 1), (2, 19), (1, 1), (5, 4)])
def test_random_clips_are_exact_frames_and_every_start_occurs(films, frames, stride):
    """long enough or just so: 20 frames; starts are uniform over all that fit."""
    clip = D.Clip(frames=frames, stride=stride, size=16)
    seen = [numbers(D.read_clips(str(films / "a.mp4"), clip, [np.random.default_rng(s)]))[0] for s in range(10 * 20)]
    last = 19 - (frames - 1) * stride
    assert all(ids == list(range(ids[0], ids[0] + frames * stride, stride)) for ids in seen)
    assert {ids[0] for ids in seen} == set(range(last + 1))


@ffmpeg
@pytest.mark.parametrize(
    "clip, expected",
    [
        (D.Clip(frames=4, stride=2, train=False), [[7, 9, 11, 13]]),
        (D.Clip(frames=4, stride=2, train=False, segments=2), [[2, 4, 6, 8], [12, 14, 16, 18]]),
        (
            D.Clip(frames=4, stride=2, train=False, segments=4),
            [[0, 2, 4, 6], [4, 6, 8, 10], [9, 11, 13, 15], [13, 15, 17, 19]],
        ),
        (D.Clip(frames=7, stride=4, train=False), [[0, 4, 8, 12, 16, 19, 19]]),
        (D.Clip(frames=7, stride=4, train=False, short="loop"), [[0, 4, 8, 12, 16, 0, 4]]),
        (D.Clip(frames=7, stride=4, train=False, short="spread"), [[0, 3, 6, 10, 13, 16, 19]]),
        (D.Clip(frames=4, fps=3, train=False, short="spread"), [[0, 6, 12, 19]]),
        (D.Clip(frames=5, stride=4, train=False, short="spread"), [[2, 6, 10, 14, 18]]),
        (D.Clip(frames=5, fps=7.5, train=False), [[1, 5, 9, 13, 17]]),
        (D.Clip(frames=20, fps=30, train=False), [[*range(20)]]),
        (D.Clip(frames=4, fps=5, train=False, short="loop"), [[0, 6, 12, 18]]),
        (D.Clip(frames=4, fps=3, train=False, short="loop"), [[0, 10, 0, 10]]),
        (D.Clip(frames=4, fps=3, train=False), [[0, 10, 19, 19]]),
    ],
)
def test_evaluation_clips_and_short_videos(films, clip, expected):
    """a.mp4 has 20 frames at 30 fps."""
    assert numbers(D.read_clips(str(films / "a.mp4"), dataclasses.replace(clip, size=16))) == expected


@ffmpeg
def test_short_policy_error(films):
    for timing in ({"stride": 4}, {"fps": 7.5}):
        assert len(D.read_clips(str(films / "a.mp4"), D.Clip(frames=5, size=16, short="error", **timing))) == 1
        with pytest.raises(ValueError, match="shorter than the clip"):
            D.read_clips(str(films / "a.mp4"), D.Clip(frames=6, size=16, short="error", **timing))


@ffmpeg
def test_sampling_by_time_shows_the_frame_that_plays(films):
    """slow.mkv: frames 0 to 29 last 1/30 s, frames 30 to 59 last 1/10 s, so four seconds in all; its header tells
    neither."""

    def shown(t):
        return math.floor(30 * t + 1e-6) if t < 1 else 30 + math.floor(10 * (t - 1) + 1e-6)

    for seed in range(30):
        clip = D.Clip(frames=8, fps=4, size=16)
        ids = numbers(D.read_clips(str(films / "slow.mkv"), clip, [np.random.default_rng(seed)]))[0]
        starts = [s for s in np.arange(0, 2.2, 0.002) if [shown(s + k / 4) for k in range(8)] == ids]
        assert starts, f"no start gives {ids} at 4 frames a second"
    at_30 = numbers(D.read_clips(str(films / "long.mp4"), D.Clip(frames=16, fps=24, size=16, train=False)))[0]
    # 15/24 s are 18.75 frames
    assert sorted(set(np.diff(at_30))) == [1, 2] and at_30[-1] - at_30[0] in (18, 19)


@ffmpeg
def test_several_clips_of_one_opened_video(films):
    """They lie in one window, so that it is decoded once: distinct starts, whole strides apart, in one more length;
    the window is anywhere; a clip's own number does not change where the others are."""
    # 21 frames long, of 120: 100 starts
    for clip in (D.Clip(frames=6, stride=4, size=16), D.Clip(frames=6, fps=7.5, size=16)):
        firsts = []
        for seed in range(200):
            rngs = [np.random.default_rng([seed, k]) for k in range(4)]
            video = D.read_clips(str(films / "long.mp4"), clip, rngs)
            starts = [ids[0] for ids in numbers(video)]
            assert all(ids == list(range(ids[0], ids[0] + 24, 4)) for ids in numbers(video))
            assert len(set(starts)) == 4 and max(starts) - min(starts) <= 20, starts
            assert len({start % 4 for start in starts}) == 1, starts
            firsts += starts
        assert min(firsts) <= 3 and max(firsts) >= 95
        quarters = np.histogram(firsts, bins=4, range=(0, 100))[0]
        assert quarters.min() > 120, quarters
    clip = D.Clip(frames=4, stride=5, size=16)
    short = D.read_clips(str(films / "a.mp4"), clip, [np.random.default_rng(k) for k in range(4)])
    assert len({ids[0] for ids in numbers(short)}) == 4  # 20 frames: 5 starts
    again = D.read_clips(str(films / "a.mp4"), clip, [np.random.default_rng(k) for k in range(4)])
    assert torch.equal(short, again)


@ffmpeg
def test_random_starts_lie_in_their_segments(films):
    clip = D.Clip(frames=3, stride=2, segments=4, size=16)
    for seed in range(40):
        video = D.read_clips(str(films / "long.mp4"), clip, [np.random.default_rng(seed)])
        first = [ids[0] for ids in numbers(video)]
        assert all(30 * s <= f <= 30 * s + 25 for s, f in enumerate(first))


# --- boxes ----------------------------------------------------------------------------------------


def test_random_boxes_match_their_definition():
    rng = np.random.default_rng(0)
    boxes = np.array([D.random_box(rng, 240, 320, (0.3, 1.0), (0.75, 1.35)) for _ in range(4000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 240).all() and (left + w <= 320).all()
    assert 0.295 < (h * w).min() / 76800 and 0.74 < (w / h).min() and (w / h).max() < 1.36
    # log-uniform about 1 where every shape fits
    assert abs(np.median(np.log(w / h)[h * w < 30000])) < 0.05
    assert (top == 0).any() and (top + h == 240).any() and (left + w == 320).any()
    # nothing fits: the largest centred box
    assert D.random_box(rng, 10, 1000, (1.0, 1.0), (0.75, 1.35)) == (0, (1000 - 14) // 2, 10, 14)


@ffmpeg
def test_crops_are_where_they_should_be_and_the_same_in_all_frames(films):
    """Green tells the column, blue the row: the mean of each is that of the box's centre."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # the clip's start is drawn first
        rng.random()
        top, left, h, w = D.random_box(rng, HEIGHT, WIDTH, (0.3, 1.0), (0.75, 1.35))
        clip = D.Clip(frames=4, size=32)
        video = D.read_clips(str(films / "long.mp4"), clip, [np.random.default_rng(seed)])[0].float()
        assert (video[..., 1:] == video[:1, ..., 1:]).all()
        assert abs(video[..., 1].mean() - 4 * (left + (w - 1) / 2)) < 1
        assert abs(video[..., 2].mean() - 6 * (top + (h - 1) / 2)) < 1
        assert video[0, 16, -1, 1] > video[0, 16, 0, 1] and video[0, -1, 16, 2] > video[0, 0, 16, 2]


@ffmpeg
def test_evaluation_views(films):
    """60 x 40: one view is the centre square of 35 (40 * 224 / 256); three are squares of 40 at columns 0, 10 and
    20."""
    one = D.read_clips(str(films / "long.mp4"), D.Clip(frames=2, size=32, train=False))[0].float()
    assert abs(one[..., 1].mean() - 4 * (12 + 17)) < 1 and abs(one[..., 2].mean() - 6 * (2 + 17)) < 1
    three = D.read_clips(str(films / "long.mp4"), D.Clip(frames=2, size=40, train=False, segments=2, views=3))
    assert three.shape == (6, 2, 40, 40, 3)
    assert three[:, 0, 0, :, 1].tolist() == [[4 * (x + left) for x in range(40)] for left in (0, 10, 20) * 2]
    assert [ids[0] for ids in numbers(three)] == [27] * 3 + [87] * 3 or numbers(three)[0] != numbers(three)[3]


@ffmpeg
def test_geometry_is_what_a_player_shows(tmp_path):
    """A left half red, a right half blue; pixels twice as wide as high, then turned by 90 degrees."""
    wide, turned = str(tmp_path / "wide.mp4"), str(tmp_path / "turned.mp4")
    source = [
        "ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i",
        "color=red:s=32x64:d=0.4[a];color=blue:s=32x64:d=0.4[b];[a][b]hstack,setsar=2",
    ]
    subprocess.run([*source, "-pix_fmt", "yuv444p", wide], check=True)
    # 128 x 64: left and right views see one colour each
    shape = D.read_clips(wide, D.Clip(frames=1, size=64, train=False, views=3))[:, 0]
    assert shape[0, :, :56, 0].min() > 200
    assert shape[2, :, 8:, 2].min() > 200
    assert shape[1, :, :24, 0].min() > 200
    assert shape[1, :, 40:, 2].min() > 200
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-i", wide, "-c", "copy", "-metadata:s:v", "rotate=90", turned], check=True
    )
    # newer FFmpeg writes it by another option
    if D.open_video(turned).metadata.rotation:
        shape = D.read_clips(turned, D.Clip(frames=1, size=64, train=False, views=3))[:, 0]
        # red above blue, or blue above red
        one, other = shape[0, :56].float().mean((0, 1)), shape[2, 8:].float().mean((0, 1))
        assert abs(one[0] - other[0]) > 240
        assert abs(one[2] - other[2]) > 240
        assert shape[0, :56].float().std((0, 1)).max() < 5


@ffmpeg
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_are_still_clips(tmp_path, ending):
    path = str(tmp_path / f"still.{ending}")
    subprocess.run(
        ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=48x32", "-frames:v", "1", path], check=True
    )
    for timing in ({"stride": 4}, {"fps": 2}):
        video = D.read_clips(path, D.Clip(frames=4, size=16, short="error", **timing), [np.random.default_rng(0)])
        assert video.shape == (1, 4, 16, 16, 3) and (video == video[:, :1]).all() and video.float().std() > 10


def test_prepare_flips_and_normalises():
    video = torch.randint(0, 256, (3, 2, 4, 5, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    x = D.prepare({"video": video, "flip": torch.tensor([False, True, False])}, "cpu", mean, std)
    for b, c, t, i, j in np.ndindex(x.shape):
        assert abs(x[b, c, t, i, j] - (video[b, t, i, 4 - j if b == 1 else j, c] / 255 - mean[c]) / std[c]) < 1e-5


@ffmpeg
def test_half_of_the_clips_are_flipped(monkeypatch):
    """Of 400 (a deviation of 0.025); none in evaluation, and none without `flip`."""

    def black(path, clip, rngs):
        video = torch.zeros(len(rngs), clip.frames, clip.size, clip.size, 3, dtype=torch.uint8)
        return video, [None] * len(rngs)

    monkeypatch.setattr(D, "read_cuts", black)
    source = D.Source("list", D.Paths.of([f"{i}.mp4" for i in range(10)]), np.zeros(10, int))
    for flip, low, high in ((True, 0.42, 0.58), (False, 0, 0)):
        clip = D.Clip(frames=1, size=8, flip=flip)
        batches = D.make_loader([source], clip, seed=0, batch_size=100, micro_batch=100, steps=4)
        share = torch.cat([batch["flip"] for batch in batches]).float().mean()
        assert low <= share <= high
    clip = D.Clip(frames=1, size=8, train=False)
    assert not any(batch["flip"].any() for batch in D.eval_batches(source, clip, batch_size=4))


# --- the plan and the loader ----------------------------------------------------------------------


def fake(n, weight=None, name="s"):
    return D.Source(name, D.Paths.of([f"{name}{i}" for i in range(n)]), np.arange(n), weight)


def test_every_row_once_an_epoch():
    plan = D.Plan([fake(7), fake(5)], seed=3)
    draws = [plan.row(v) for v in range(36)]
    assert all(sorted(draws[e : e + 12]) == list(range(12)) for e in (0, 12, 24)) and draws[:12] != draws[12:24]
    assert draws == [D.Plan([fake(7), fake(5)], seed=3).row(v) for v in range(36)]
    assert draws != [D.Plan([fake(12)], seed=4).row(v) for v in range(36)]
    # in any order of asking
    assert [plan.row(v) for v in (35, 0, 20)] == [draws[v] for v in (35, 0, 20)]


def test_mixtures_have_their_proportions_and_no_early_repeats():
    sizes, weights = (100, 3000, 50), (0.2, 0.7, 0.1)
    plan = D.Plan([fake(n, w) for n, w in zip(sizes, weights)], seed=0)
    rows = np.array([plan.row(v) for v in range(4096)])
    which = np.searchsorted(plan.offsets, rows, side="right") - 1
    for block in which.reshape(-1, 1024):
        assert np.abs(np.bincount(block) - 1024 * np.array(weights)).max() < 1
    for s, n in enumerate(sizes):
        mine = rows[which == s]
        for epoch in range(0, len(mine) - n, n):
            assert len(set(mine[epoch : epoch + n])) == n
        assert len(set(mine[:n])) == min(n, len(mine))
    # also within a block, about right everywhere
    share = np.cumsum(which == 0)[99::100] / np.arange(100, 4097, 100)
    assert np.abs(share - 0.2).max() < 0.1
    with pytest.raises(D.DataError, match="tiny.*1/1024"):
        D.Plan([fake(5, 1.0), fake(5, 1e-5, "tiny")], seed=0)


def collect(sources, clip, ranks=1, workers=0, micro=2, **options):
    out = {}
    for rank in range(ranks):
        place = dict(rank=rank, ranks=ranks, workers=workers)
        for batch in D.make_loader(sources, clip, seed=1, batch_size=8, micro_batch=micro, **place, **options):
            for i, g in enumerate(batch["index"].tolist()):
                assert g not in out
                out[g] = batch["video"][i].numpy().tobytes(), bool(batch["flip"][i]), int(batch["label"][i])
    return out


@ffmpeg
def test_the_same_samples_for_any_ranks_and_workers(films):
    sources = [D.parse_list(f"{films}/list.txt:2"), D.parse_list(f"{films}/list.txt:1"), D.parse_list("world:1")]
    clip = D.Clip(frames=4, stride=2, size=16)
    one = collect(sources, clip, start_step=0, steps=3)
    assert sorted(one) == list(range(24)) and len({video for video, _, _ in one.values()}) == 24
    assert {flip for _, flip, _ in one.values()} == {True, False}
    assert one == collect(sources, clip, ranks=2, start_step=0, steps=3, workers=2)
    assert one == collect(sources, clip, ranks=4, micro=1, start_step=0, steps=3)
    later = collect(sources, clip, start_step=2, steps=3, workers=2, micro=8)
    assert later == {g: v for g, v in one.items() if g >= 16}
    clip = dataclasses.replace(clip, clips=2)
    pairs = collect(sources[:2], clip, start_step=0, steps=2)
    assert pairs == collect(sources[:2], clip, ranks=4, start_step=0, steps=2)
    assert pairs[0] != pairs[1]
    assert pairs[0][2] == pairs[1][2]


@ffmpeg
def test_loading_leaves_the_global_random_state_alone(films):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect([D.parse_list(films / "list.txt")], D.Clip(frames=2, size=16), workers=2, steps=1)
    assert torch.equal(before, torch.get_rng_state())


@ffmpeg
def test_a_bad_video_is_replaced_by_a_function_of_seed_and_draw(films):
    (films / "mixed.txt").write_text("a.mp4 0\nb.mp4 1\nbroken.mp4 2\nc.mp4 3\n")
    source, clip = D.parse_list(films / "mixed.txt"), D.Clip(frames=2, size=16)
    one = collect([source], clip, steps=2)
    assert one == collect([source], clip, ranks=2, workers=2, steps=2)
    assert one == collect([source], clip, ranks=4, micro=1, steps=2)
    assert 2 not in {label for _, _, label in one.values()}
    loader = D.make_loader([source], clip, seed=1, batch_size=8, micro_batch=8, steps=1)
    bad = [b for batch in loader for b in batch["bad"]]
    # two epochs of four rows
    assert len(bad) >= 2
    assert all(path.endswith("broken.mp4") and reason and "\n" not in reason for path, reason in bad)


@ffmpeg
def test_all_videos_bad_ends_with_one_line(films):
    (films / "bad.txt").write_text("broken.mp4 0\n")
    for workers in (0, 2):
        source = D.parse_list(films / "bad.txt")
        sizes = dict(batch_size=2, micro_batch=2, steps=1)
        message = "20 videos in a row cannot be read, the last one .*broken.mp4"
        with pytest.raises(D.DataError, match=message) as caught:
            list(D.make_loader([source], D.Clip(size=16), seed=0, workers=workers, **sizes))
        assert "\n" not in str(caught.value)


@ffmpeg
def test_evaluation_reads_every_row_once_in_order_and_marks_the_bad(films):
    (films / "mixed.txt").write_text("a.mp4 0\nbroken.mp4 1\nb.mp4 2\nc.mp4 3\nd.mp4 4\n")
    source = D.parse_list(films / "mixed.txt", labelled=True)
    clip = D.Clip(frames=2, size=16, train=False, segments=2, views=3)
    for workers in (0, 2):
        batches = list(D.eval_batches(source, clip, batch_size=2, workers=workers))
        assert [b["index"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
        assert [b["label"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
        assert [b["ok"].tolist() for b in batches] == [[True, False], [True, True], [True]]
        assert batches[0]["video"].shape == (12, 2, 16, 16, 3)
        assert batches[0]["flip"].shape == (12,)
        assert not batches[0]["flip"].any()
        assert batches[0]["video"][:6].any()
        assert not batches[0]["video"][6:].any()
        assert batches[0]["bad"][0][0].endswith("broken.mp4")
    ranks = [
        [b["index"].tolist() for b in D.eval_batches(source, clip, batch_size=2, rank=r, ranks=2)] for r in range(2)
    ]
    assert ranks == [[[0, 2], [4]], [[1, 3]]]
    assert [b["index"].tolist() for b in D.eval_batches(source, clip, batch_size=2, rows=[3, 0, 2])] == [[3, 0], [2]]

    def draw(**options):
        batches = D.eval_batches(source, D.Clip(frames=2, size=16, segments=2), batch_size=2, **options)
        return next(iter(batches))["video"]

    assert torch.equal(draw(rows=[4, 0])[:2], draw(rows=[4], workers=2))
    assert not torch.equal(draw(rows=[4]), draw(rows=[4], seed=1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"micro_batch": 3}, "micro_batch 3"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"ranks": 3}, "ranks 3"),
        ({"clip": D.Clip(clips=3)}, "micro_batch 4, and that of the 3 clips"),
        ({"clip": D.Clip(segments=2)}, "segments=1"),
        ({"clip": D.Clip(train=False)}, "train=True"),
    ],
)
def test_settings_that_cannot_work(change, message):
    settings = {"clip": D.Clip(), "seed": 0, "batch_size": 8, "micro_batch": 4, "steps": 1} | change
    with pytest.raises(D.DataError, match=message):
        next(iter(D.make_loader([D.parse_list("world")], **settings)))


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 0},
        {"stride": 0},
        {"fps": -1.0},
        {"fps": math.nan},
        {"short": "pad"},
        {"scale": (0.0, 1.0)},
        {"scale": (0.9, 0.3)},
        {"ratio": (0.0, 1.0)},
        {"size": -1},
    ],
)
def test_clips_that_make_no_sense(change):
    with pytest.raises(D.DataError, match=next(iter(change))):
        D.Clip(**change)


def test_without_ffmpeg_the_message_names_the_cure_and_the_world_still_works(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(D.DataError, match="apt-get install -y ffmpeg"):
        next(iter(D.make_loader([D.parse_list(tmp_path)], D.Clip(), seed=0, batch_size=2, micro_batch=2, steps=1)))
    clip = D.Clip(frames=4, size=16)
    loader = D.make_loader([D.parse_list("world")], clip, seed=0, batch_size=2, micro_batch=2, steps=1)
    batch = next(iter(loader))
    assert batch["video"].shape == (2, 4, 16, 16, 3) and batch["video"].any()


def test_the_world_is_not_flipped():
    """Left and right are two of its classes."""
    batch = next(iter(D.eval_batches(D.parse_list("world"), D.Clip(frames=4, size=16, segments=2), batch_size=16)))
    assert batch["video"].shape == (32, 4, 16, 16, 3) and not batch["flip"].any() and batch["ok"].all()


def test_fingerprint_notices_a_replaced_file(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    first = D.fingerprint([D.parse_list(tmp_path)])
    assert first == D.fingerprint([D.parse_list(tmp_path)]) != D.fingerprint([D.parse_list(f"{tmp_path}:2")])
    (tmp_path / "b.mp4").write_bytes(b"other")
    assert first != D.fingerprint([D.parse_list(tmp_path)])


@ffmpeg
def test_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    D.save_png(tmp_path / "x.png", image)
    assert (D.open_video(str(tmp_path / "x.png")).get_frame_at(0).data.numpy() == image).all()


# --- every file of odd/ ---------------------------------------------------------------------------

UNREADABLE = {"01", "02", "03", "06"}  # empty, text, no index, no video stream
DAMAGED = {"04", "05"}  # can be opened; clips that touch the damage raise


@ffmpeg
def test_every_odd_file_ends_as_promised(video_data, tmp_path):
    names = sorted(os.listdir(video_data / "odd"))
    (tmp_path / "odd.txt").write_text("".join(f"{video_data}/odd/{name} {i}\n" for i, name in enumerate(names)))
    source = D.parse_list(tmp_path / "odd.txt", labelled=True)
    assert len(source) == 27
    for timing in ({"stride": 4}, {"fps": 5.0}):
        clip = D.Clip(frames=8, size=32, train=False, **timing)
        batches = list(D.eval_batches(source, clip, batch_size=4, workers=2))
        ok = torch.cat([b["ok"] for b in batches]).tolist()
        # 04 ends before the middle that its header announces
        assert {name[:2] for name, fine in zip(names, ok) if not fine} == UNREADABLE | DAMAGED
        assert sum(len(b["bad"]) for b in batches) == 6
        shown = torch.cat([b["video"] for b in batches]).float().std((1, 2, 3, 4))
        assert all((s > 5) == fine for s, fine in zip(shown, ok))
    trained, clip = set(), D.Clip(frames=4, size=16)
    for batch in D.make_loader([source], clip, seed=0, batch_size=27, micro_batch=27, workers=0, steps=4):
        assert all(video.any() for video in batch["video"])
        trained |= {names[label][:2] for label in batch["label"].tolist()}
        assert {os.path.basename(path)[:2] for path, _ in batch["bad"]} <= UNREADABLE | DAMAGED
    assert trained >= {f"{i:02}" for i in range(7, 28)} and not trained & UNREADABLE


@ffmpeg
def test_check_and_pack_on_odd_files(video_data, tmp_path, capsys):
    # the large ones
    names = sorted(name for name in os.listdir(video_data / "odd") if name[:2] not in ("17", "20", "21"))
    (tmp_path / "odd.txt").write_text("".join(f"{video_data}/odd/{name}\n" for name in names))
    summary, status = D.check(str(tmp_path / "odd.txt"), workers=0)
    said = capsys.readouterr().out
    assert status == 1
    assert summary["bad"] == 6
    assert summary["files"] == 24
    assert "announces 444 frames, it has 68" in said
    assert all(f"/odd/{name}: " in said for name in names if name[:2] in UNREADABLE | DAMAGED)
    summary, status = D.pack(str(tmp_path / "odd.txt"), str(tmp_path / "packed"), short_side=32, workers=0)
    assert status == 1 and summary["bad"] == 6 and summary["rows"] == 18
    assert D.check(summary["list"], workers=0)[1] == 0


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, scale, time, grid", [(8, 0.15, 1.0, (8, 14, 14)), (2, 0.7, 1.0, (8, 14, 14)), (4, 0.3, 0.5, (4, 8, 8))]
)
def test_multiblock_statistics_against_a_plain_count(blocks, scale, time, grid):
    """Straight from the definition in loops, with Python's own generator: mean share hidden, and its map over the
    frame."""
    t, h, w = grid
    B, other = 3000, random.Random(0)
    hidden = D.multiblock(np.random.default_rng(0), B, grid, blocks, scale, time, aspect=(1.2, 1.2)).astype(float)
    area = int(h * w * scale)
    bh, bw, bt = min(round(math.sqrt(area * 1.2)), h), min(round(math.sqrt(area / 1.2)), w), max(1, round(t * time))
    counted = np.zeros(grid)
    for _ in range(B):
        mask = np.zeros(grid, bool)
        for _ in range(blocks):
            i, j, k = other.randint(0, t - bt), other.randint(0, h - bh), other.randint(0, w - bw)
            mask[i : i + bt, j : j + bh, k : k + bw] = True
        counted += mask / B
    assert abs(hidden.mean() - counted.mean()) < 0.005 and np.abs(hidden.mean(0) - counted).max() < 0.05
    # every clip has a context
    assert hidden.reshape(B, -1).min(1).max() == 0
    if time == 1:
        assert (hidden == hidden[:, :1]).all()


def test_clips_without_context_are_drawn_again():
    hidden = D.multiblock(np.random.default_rng(0), 500, (2, 4, 4), 6, 0.6, aspect=(1, 1)).reshape(500, -1)
    assert not hidden.all(1).any()
    with pytest.raises(D.DataError, match="no context"):
        D.multiblock(np.random.default_rng(0), 4, (2, 4, 4), 1, 1.0, aspect=(1, 1))


SPECS = ["8x0.15", "2x0.7", "3x0.4x0.5", "random:0.9", "tube:0.75", "causal:0.5"]


@pytest.mark.parametrize("trim", ["random", "prefix"])
def test_ids_are_sorted_disjoint_and_of_one_length(trim):
    B, grid = 16, (4, 8, 8)
    keep, pred = D.sample_masks(SPECS, 0, 5, B, grid, trim=trim)
    for spec, k, p in zip(SPECS, keep, pred):
        assert k.dtype == p.dtype == torch.int64 and len(k) == len(p) == B and k.shape[1] and p.shape[1]
        assert (k.diff(dim=1) > 0).all()
        assert (p.diff(dim=1) > 0).all()
        assert k.min() >= 0
        assert p.max() < 256
        assert p.min() >= 0
        assert all(not set(a) & set(b) for a, b in zip(k.tolist(), p.tolist()))
        # the smallest counts of the batch: one clip is not cut
        function, arguments = D.parse_mask(spec)
        rng = np.random.default_rng([0, 5, SPECS.index(spec)])
        counts = function(rng, B, grid, **arguments).reshape(B, -1).sum(1)
        assert p.shape[1] == counts.min() and k.shape[1] == 256 - counts.max()
    again = D.sample_masks(SPECS, 0, 5, B, grid, trim=trim)
    assert all(torch.equal(a, b) for a, b in zip(keep + pred, again[0] + again[1]))
    assert not torch.equal(keep[3], D.sample_masks(SPECS, 0, 6, B, grid, trim=trim)[0][3][:, : keep[3].shape[1]])


def test_trimming_at_random_spares_no_slice_and_prefix_drops_the_last():
    grid, per = (8, 8, 8), 64
    share = {}
    for trim in ("random", "prefix"):
        _, pred = D.sample_masks(["2x0.7"], 0, 0, 24, grid, trim=trim)
        share[trim] = torch.bincount(pred[0].flatten() // per, minlength=8) / pred[0].numel()
    assert share["random"].max() - share["random"].min() < 0.02 < share["prefix"].max() - share["prefix"].min()
    assert share["prefix"].argmin() == 7


@pytest.mark.parametrize("B", [16, 96])
def test_every_rank_sees_the_same_shapes_and_its_own_rows(B):
    whole = D.sample_masks(SPECS, 0, 1, B, (4, 8, 8))
    for ranks in (2, 4):
        slices = [slice(r * B // ranks, (r + 1) * B // ranks) for r in range(ranks)]
        parts = [D.sample_masks(SPECS, 0, 1, B, (4, 8, 8), rows=rows) for rows in slices]
        for side in (0, 1):
            for i in range(len(SPECS)):
                assert torch.equal(torch.cat([part[side][i] for part in parts]), whole[side][i])


def test_simple_masks():
    rng = np.random.default_rng(0)
    assert (D.random_mask(rng, 50, (2, 5, 5), 0.9).reshape(50, -1).sum(1) == 45).all()
    tube = D.tube_mask(rng, 50, (3, 5, 4), 0.75)
    assert (tube == tube[:, :1]).all() and (tube.reshape(50, -1).sum(1) == 45).all()
    assert D.causal_mask(rng, 2, (10, 2, 2), 0.9)[:, :, 0, 0].tolist() == [[False] + [True] * 9] * 2
    assert D.causal_mask(rng, 1, (2, 1, 1), 0.99).ravel().tolist() == [False, True]
    assert abs(D.random_mask(rng, 4000, (1, 4, 4), 0.5).mean(0) - 0.5).max() < 0.04


@pytest.mark.parametrize(
    "text",
    [
        "", "8", "8x0", "8x1.5", "0x0.5", "ax0.5", "random", "random:0", "random:2", "cube:0.5", "8x0.15x0",
        "8x0.15x1x1", "8xnan",
    ],
)
def test_malformed_masks(text):
    with pytest.raises(D.DataError, match="mask"):
        D.parse_mask(text)


# --- the command line -----------------------------------------------------------------------------


@ffmpeg
def test_check(films, run):
    status, summary, _ = run("data.py", "check", films / "list.txt", "--workers", 2)
    assert status == 0
    assert summary["files"] == 8
    assert summary["bad"] == 0
    assert summary["labels"] == 8
    assert summary["codec"] == {"h264": 8}
    assert summary["size"] == {f"{WIDTH}x{HEIGHT}": 8} and summary["frames"] == {"min": 20, "median": 23.5, "max": 27}
    (films / "mixed.txt").write_text("a.mp4 0\nbroken.mp4 2\n")
    summary, status = D.check(str(films / "mixed.txt"), workers=0)
    assert status == 1 and summary["bad"] == 1
    status, summary, error = run("data.py", "check", "nowhere.txt")
    assert status == 2
    assert summary is None
    assert error.startswith("error: nowhere.txt: cannot read")
    assert error.count("\n") == 1


@ffmpeg
def test_pack(films, tmp_path):
    (films / "mixed.txt").write_text(f"a.mp4 4\nbroken.mp4 2\nslow.mkv 7\n{films}/long.mp4\n")
    before = {p.name: p.read_bytes() for p in films.iterdir()}
    summary, status = D.pack(str(films / "mixed.txt"), str(tmp_path / "out"), short_side=20, fps=15, gop=4, workers=0)
    assert status == 1
    assert summary["rows"] == 3
    assert summary["bad"] == 1
    assert before == {p.name: p.read_bytes() for p in films.iterdir()}
    packed = D.parse_list(summary["list"])
    assert packed.labels.tolist() == [4, 7, -1]
    assert all(path.startswith(f"{tmp_path}/out/videos/") for path in packed.paths)
    video = D.import_torchcodec().VideoDecoder(packed.paths[0])
    assert (len(video), video.metadata.width, video.metadata.height, video.metadata.codec) == (10, 30, 20, "h264")
    # no half-written files
    assert not [p for p in (tmp_path / "out").rglob(".*")]
    assert np.diff(video._get_key_frame_indices()).max() <= 4
    times = [os.stat(path).st_mtime_ns for path in packed.paths]
    os.remove(packed.paths[1])
    # goes on: only the missing one is made
    D.pack(str(films / "mixed.txt"), str(tmp_path / "out"), short_side=20, fps=15, gop=4, workers=0)
    assert [os.stat(path).st_mtime_ns == t for path, t in zip(packed.paths, times)] == [True, False, True]
    with pytest.raises(D.DataError, match="other settings"):
        D.pack(str(films / "mixed.txt"), str(tmp_path / "out"), short_side=24, workers=0)
    with pytest.raises(D.DataError, match="out of range"):
        D.pack(str(films / "mixed.txt"), str(tmp_path / "new"), gop=0)
    # val/a.mp4 into the folder that has train/a.mp4: it would be taken for it
    (tmp_path / "val").mkdir()
    shutil.copy(films / "long.mp4", tmp_path / "val" / "a.mp4")
    (tmp_path / "val" / "val.txt").write_text("a.mp4 0\n")
    with pytest.raises(D.DataError, match="holds videos packed from .*, not .*/val/; choose another folder"):
        D.pack(str(tmp_path / "val" / "val.txt"), str(tmp_path / "out"), short_side=20, fps=15, gop=4, workers=0)


@ffmpeg
def test_packed_videos_show_the_same_moments(films, tmp_path):
    """Sampled by time, a packed list gives the frames of the original."""
    (films / "one.txt").write_text("long.mp4 0\n")
    summary, _ = D.pack(str(films / "one.txt"), str(tmp_path / "out"), short_side=40, fps=7.5, crf=1, workers=0)
    clip = D.Clip(frames=8, fps=7.5, size=32)
    for seed in range(5):
        original, packed = (
            D.read_clips(D.parse_list(x).paths[0], clip, [np.random.default_rng(seed)])[0, :, 16, 16, 0].float()
            for x in (films / "one.txt", summary["list"])
        )
        # one of every four frames, and x264's rounding
        assert (original - packed).abs().max() <= 6 and packed.diff().min() > 0


def listed(path):
    return [tuple(line.rsplit(" ", 1)) for line in path.read_text().splitlines()]


def test_index_folders(tmp_path, run):
    touch(tmp_path, "set/wave/1.mp4", "set/wave/a b.mp4", "set/nod/2.avi", "set/nod/notes.txt")
    status, summary, _ = run("data.py", "index", "folders", tmp_path / "set", "--out", tmp_path / "set/all.txt")
    assert status == 0 and summary["rows"] == 3 and summary["classes"] == 2
    assert listed(tmp_path / "set/all.txt") == [("nod/2.avi", "0"), ("wave/1.mp4", "1"), ("wave/a b.mp4", "1")]
    assert (tmp_path / "set/classes.txt").read_text() == "nod\nwave\n"
    assert len(D.parse_list(tmp_path / "set/all.txt", labelled=True)) == 3


def test_index_kinetics(tmp_path):
    touch(tmp_path, "v/train/x y/abc-_123456_000010_000020.mp4", "v/train/zz/-bcd5678901_000000_000010.mkv")
    rows = [
        "label,youtube_id,time_start,time_end,split",
        "zz,-bcd5678901,0,10,train",
        "x y,abc-_123456,10,20,train",
        "x y,gone0000000,1,11,train",
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    summary, status = D.index(
        "kinetics", str(tmp_path / "v"), str(tmp_path / "train.txt"), str(tmp_path / "train.csv")
    )
    assert status == 0 and summary["missing"] == 1 and (tmp_path / "classes.txt").read_text() == "x y\nzz\n"
    assert listed(tmp_path / "train.txt") == [
        ("v/train/zz/-bcd5678901_000000_000010.mkv", "1"),
        ("v/train/x y/abc-_123456_000010_000020.mp4", "0"),
    ]
    # only zz: still class 1, as in training
    (tmp_path / "val.csv").write_text("\n".join([rows[0], rows[1]]))
    D.index("kinetics", str(tmp_path / "v"), str(tmp_path / "val.txt"), str(tmp_path / "val.csv"))
    assert listed(tmp_path / "val.txt") == [("v/train/zz/-bcd5678901_000000_000010.mkv", "1")]
    (tmp_path / "val.csv").write_text("\n".join([rows[0], rows[1].replace("zz", "new")]))
    with pytest.raises(D.DataError, match="class 'new' is not one of the 2 of .*classes.txt"):
        D.index("kinetics", str(tmp_path / "v"), str(tmp_path / "val.txt"), str(tmp_path / "val.csv"))
    with pytest.raises(D.DataError, match="not kinetics annotations"):
        D.index("kinetics", str(tmp_path / "v"), str(tmp_path / "val.txt"), str(tmp_path / "classes.txt"))
    with pytest.raises(D.DataError, match="needs --annotations"):
        D.index("kinetics", str(tmp_path / "v"))


def test_index_ssv2(tmp_path):
    touch(tmp_path, "v/78687.webm", "v/42326.webm")
    (tmp_path / "labels.json").write_text(
        json.dumps({"Holding something": "1", "Approaching something with your camera": "0"})
    )
    holding = {"template": "Holding [something]", "label": "holding a potato"}
    rows = [{"id": "78687", **holding}, {"id": "42326"}, {"id": "1", **holding}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    summary, _ = D.index(
        "ssv2", str(tmp_path / "v"), str(tmp_path / "train.txt"), str(tmp_path / "train.json"),
        str(tmp_path / "labels.json"),
    )
    assert (tmp_path / "train.txt").read_text() == "v/78687.webm 1\nv/42326.webm\n" and summary["missing"] == 1
    assert (tmp_path / "classes.txt").read_text() == "Approaching something with your camera\nHolding something\n"
    with pytest.raises(D.DataError, match="needs --labels"):
        D.index("ssv2", str(tmp_path / "v"), str(tmp_path / "train.txt"), str(tmp_path / "train.json"))


def test_index_ucf(tmp_path):
    touch(tmp_path, "UCF/Archery/v_Archery_g01_c01.avi", "UCF/Bowling/v_Bowling_g01_c01.avi")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/classInd.txt").write_text("1 Archery\r\n2 Bowling\r\n")
    (tmp_path / "s/trainlist01.txt").write_text(
        "Bowling/v_Bowling_g01_c01.avi 2\r\nArchery/v_Archery_g01_c01.avi 1\r\n"
    )
    (tmp_path / "s/testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    D.index("ucf", str(tmp_path / "UCF"), str(tmp_path / "train.txt"), str(tmp_path / "s/trainlist01.txt"))
    assert listed(tmp_path / "train.txt") == [
        ("UCF/Bowling/v_Bowling_g01_c01.avi", "1"),
        ("UCF/Archery/v_Archery_g01_c01.avi", "0"),
    ]
    D.index("ucf", str(tmp_path / "UCF"), str(tmp_path / "test.txt"), str(tmp_path / "s/testlist01.txt"))
    assert listed(tmp_path / "test.txt") == [("UCF/Archery/v_Archery_g01_c01.avi", "0")]


def test_images_that_are_written_over_are_another_video(tmp_path):
    """A folder's own time stays as it was."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"before")
    first = D.look([str(tmp_path)], [0])
    (tmp_path / "2.png").write_bytes(b"after")
    os.utime(tmp_path / "2.png", ns=(0, int(first[0, 1]) + 10**9))
    assert (D.look([str(tmp_path)], [0]) - first).tolist() == [[0, 10**9]]
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to("nowhere.png")  # counted as damaged where it is read
    assert D.look([str(tmp_path)], [0])[0, 0] == 3
