"""Dense labels on disk: the reader cuts them as the frames; every layout is converted from a tiny folder of exactly
that form; some real files."""

import csv
import json
import math
import os
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data as D
import probe as P

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="FFmpeg is not installed: apt-get install -y ffmpeg"
)
# side of the pictures here; the evaluation square is then 28 pixels from (2,2), cut without resizing
SIDE = 32
WHOLE = D.Clip(frames=2, stride=1, size=28, train=False)
RNG = np.random.default_rng(0)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data) if isinstance(data, str) else path.write_bytes(data)
    return path


def write_png(path, image, palette=False):
    """uint8 or uint16 (H,W) or (H,W,3)."""
    kind = 3 if palette else 0 if image.ndim == 2 else 2
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    rows = b"".join(b"\0" + row.tobytes() for row in image.astype(image.dtype.newbyteorder(">")))
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], image.dtype.itemsize * 8, kind, 0, 0, 0)
    return put(
        path,
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + (chunk(b"PLTE", bytes(range(256)) * 3) if palette else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b""),
    )


def picture(path, shape=(SIDE, SIDE)):
    """A random picture, png, ppm or jpg by its name; returns what is in it."""
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    if path.suffix == ".ppm":
        put(path, b"P6\n%d %d\n255\n" % shape[::-1] + image.tobytes())
    elif path.suffix == ".png":
        write_png(path, image)
    else:
        write_png(path.with_suffix(".tmp.png"), image)
        subprocess.run(
            ["ffmpeg", "-v", "error", "-y", "-i", path.with_suffix(".tmp.png"), "-q:v", "2", path], check=True
        )
        path.with_suffix(".tmp.png").unlink()
    return image


def write_pfm(path, image):
    put(
        path,
        (b"Pf" if image.ndim == 2 else b"PF")
        + b"\n%d %d\n-1.0\n" % image.shape[1::-1]
        + image[::-1].astype("<f4").tobytes(),
    )


def write_flo(path, flow):
    put(path, struct.pack("<fii", 202021.25, *flow.shape[1::-1]) + flow.astype("<f4").tobytes())


def converted(layout, root, names, annotations="", clip=WHOLE):
    """Through the command and the reader: the one batch of all clips."""
    out = root.parent / f"{layout}.txt"
    summary, status = D.index(layout, str(root), str(out), str(annotations))
    assert status == 0
    assert summary["rows"] == len(D.parse_list(out))
    assert {n for n in names if "visible" not in n} <= set(summary["labels"]) <= set(names)
    (batch,) = P.dense_batches(D.parse_list(out), clip, names, batch_size=100)
    assert batch["ok"].all() and len(batch["video"]) == summary["rows"]
    return batch


def cut(array):
    return torch.as_tensor(np.ascontiguousarray(array))[..., 2:30, 2:30]


def same(a, b, atol=1e-5):
    assert torch.allclose(
        torch.as_tensor(a).double(), torch.as_tensor(np.asarray(b)).double(), atol=atol, equal_nan=True
    )


# --- the reader -----------------------------------------------------------------------------------


def film(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            "ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
            f"{frames.shape[2]}x{frames.shape[1]}", "-framerate", "10", "-i", "-", "-c:v", "libx264rgb", "-crf", "0",
            "-y", str(path),
        ],
        input=np.ascontiguousarray(frames).tobytes(),
        check=True,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Clips of the world, as files: 64 pixels, so that the evaluation square is 56 from (4,4)."""
    folder = tmp_path_factory.mktemp("stored")
    names = (
        "depth", "pose", "K", "masks", "boxes", "tracks", "visible", "flow", "flow_visible", "right", "disparity",
        "disparity_visible",
    )
    made = D.World("val", frames=6, size=64, noise=0).render(range(8), names)
    for i in range(8):
        film(folder / f"{i}.mp4", made["video"][i].numpy())
        save_file({name: made[name][i].contiguous() for name in names}, folder / f"{i}.safetensors")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(8)))
    return D.parse_list(folder / "list.txt"), names, made


def test_files_are_read_as_the_world_is_rendered(stored):
    source, names, made = stored
    (batch,) = P.dense_batches(source, D.Clip(frames=6, stride=1, size=56, train=False), names, batch_size=8)
    square = slice(4, 60)
    assert torch.equal(batch["video"], made["video"][:, :, square, square])
    assert torch.equal(batch["right"], made["right"][:, :, square, square])
    for name in ("depth", "masks", "flow", "disparity"):
        same(batch[name], made[name][:, :, square, square])
    same(batch["tracks"], made["tracks"] - 4, atol=1e-4)
    inside = ((batch["tracks"] >= 0) & (batch["tracks"] < 56)).all(-1)
    assert torch.equal(batch["visible"], made["visible"] & inside) and (made["visible"] & ~inside).any()
    assert (batch["flow_visible"] <= made["flow_visible"][:, :, square, square]).all()
    whole = made["boxes"]
    # not cut: where they were; cut: up to the edge; outside: gone
    inside = ((whole >= 4) & (whole <= 60)).all(-1)
    assert inside.any() and torch.equal(batch["boxes"][inside], whole[inside] - 4)
    cut_ = (whole[..., 2:] > 4).all(-1) & (whole[..., :2] < 60).all(-1)
    assert (cut_ & ~inside).any()
    assert torch.equal(batch["boxes"][cut_], (whole[cut_] - 4).clamp(0, 56))
    assert batch["boxes"][~cut_].isnan().all()


@pytest.mark.parametrize(
    "clip",
    [
        D.Clip(frames=4, stride=1, size=28, train=False),
        D.Clip(frames=4, stride=1, size=40),
        D.Clip(frames=3, stride=1, size=32, train=False, segments=2, views=3),
    ],
)
def test_labels_are_cut_and_scaled_with_the_frames(stored, clip):
    """Halved, at random boxes of other shapes, and as several views: what holds of the whole pictures holds of the
    cut ones."""
    source, names, _ = stored
    (batch,) = P.dense_batches(source, clip, names, batch_size=8, seed=3)
    n, size, f = 8 * clip.segments * clip.views, clip.size, batch["K"][:, 0, 0]
    assert batch["video"].shape == (n, clip.frames, size, size, 3)
    assert batch["boxes"].shape[:3] == (n, clip.frames, 4)
    assert not batch["flip"].any()
    assert torch.allclose(
        batch["disparity"] * batch["depth"],
        (f * D.World().baseline)[:, None, None, None].expand_as(batch["depth"]),
        rtol=1e-3,
    )
    # the walls: pixel + depth + K + pose of two frames give the flow
    column, row = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="xy")
    pixel = torch.stack([column, row, torch.ones_like(row)], -1)
    point = torch.einsum("nij,hwj->nhwi", torch.linalg.inv(batch["K"]), pixel) * batch["depth"][:, 0, ..., None]
    world = (
        torch.einsum("nij,nhwj->nhwi", batch["pose"][:, 0, :3, :3], point) + batch["pose"][:, 0, None, None, :3, 3]
    )
    point = torch.einsum(
        "nji,nhwj->nhwi", batch["pose"][:, 1, :3, :3], world - batch["pose"][:, 1, None, None, :3, 3]
    )
    at = torch.einsum("nij,nhwj->nhwi", batch["K"], point)
    off = (at[..., :2] / at[..., 2:] - pixel[..., :2] - batch["flow"][:, 0]).norm(dim=-1)
    # nearest: up to half a pixel of the original beside
    assert off[batch["masks"][:, 0] < 2].median() < 0.3
    # a visible point lies on the object of its pixel in the next frame, too, as in a box
    t0, t1 = batch["tracks"][:, 0], batch["tracks"][:, 1]
    ok = batch["visible"][:, 0] & batch["visible"][:, 1]
    assert ok.any() and (t0[ok] >= 0).all() and (t0[ok] < size).all()
    which = torch.arange(n)[:, None].expand_as(ok)[ok]
    flow = batch["flow"][:, 0][which, t0[ok][:, 1].long(), t0[ok][:, 0].long()]
    assert (t0[ok] + flow - t1[ok]).norm(dim=-1).median() < 0.5
    box = batch["boxes"]
    assert box.isfinite().any() and (box[box.isfinite()] >= 0).all() and (box[box.isfinite()] <= size).all()
    assert (box[..., 2:] > box[..., :2])[box[..., :2].isfinite()].all()


@pytest.mark.parametrize("size, labels", [(20, 40), (35, 40), (70, 40), (20, 80)])
def test_a_pixel_of_labels_is_the_one_under_its_centre(tmp_path, size, labels):
    """A picture of 40 x 40, of which evaluation shows the 35 from (2, 2) in `size` pixels; its
    labels may have another size. Value: 100 row + column."""
    D.save_png(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    side = torch.arange(labels, dtype=torch.float)
    save_file({"depth": (100 * side[:, None] + side)[None]}, tmp_path / "a.safetensors")
    (tmp_path / "list.txt").write_text("a.png 0\n")
    clip = D.Clip(frames=1, stride=1, size=size, train=False)
    (batch,) = P.dense_batches(D.parse_list(tmp_path / "list.txt"), clip, ("depth",), batch_size=1)
    centre = 2 + (np.arange(size) + 0.5) * 35 / size  # in pixels of the picture
    at = np.floor(centre * labels / 40)
    assert np.array_equal(batch["depth"][0, 0].numpy(), 100 * at[:, None] + at)


def test_unknown_is_filled_up_and_missing_labels_are_told(tmp_path):
    film(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    film(tmp_path / "b.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("a.mp4\nb.mp4\nbroken.mp4\n")
    flow = torch.full((3, 32, 32, 2), 1.0)
    flow[0, 3, 3] = math.nan
    for name, box, objects, points, at in (("a", [0.0, 0, 20, 20], 3, 2, 5.0), ("b", [31.0, 31, 32, 32], 1, 5, 31.5)):
        save_file(
            {
                "boxes": torch.tensor(box).expand(4, objects, 4).contiguous(),
                "tracks": torch.full((4, points, 2), at),
                "flow": flow,
            },
            tmp_path / f"{name}.safetensors",
        )
    source, names = D.parse_list(tmp_path / "list.txt"), ("boxes", "tracks", "visible", "flow", "flow_visible")
    (batch,) = P.dense_batches(
        source, D.Clip(frames=6, stride=1, size=28, train=False), names, batch_size=3, workers=1
    )
    assert batch["ok"].tolist() == [True, True, False]
    assert batch["boxes"].shape == (3, 6, 3, 4)
    assert batch["tracks"].shape == (3, 6, 5, 2)
    # the second lies outside
    assert batch["boxes"][0].eq(torch.tensor([0.0, 0, 18, 18])).all() and batch["boxes"][1:].isnan().all()
    assert batch["visible"].sum((1, 2)).tolist() == [12, 0, 0] and batch["tracks"][0, :, 2:].isnan().all()
    assert batch["flow"][0, 0, 1, 1].isnan().all()
    assert not batch["flow_visible"][0, 0, 1, 1]
    assert batch["flow_visible"][0, 0, 2, 2]
    # leaves the picture
    assert not batch["flow_visible"][0, 0, :, -1].any()
    # four frames, of which the last is repeated
    assert batch["flow"][0, 3:].isnan().all() and batch["flow"][0, 1:3].isfinite().all()
    with pytest.raises(D.DataError, match="a.safetensors: no label 'depth'; it has boxes, flow, tracks"):
        next(P.dense_batches(source, WHOLE, ("depth",), batch_size=1))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:200])
    save_file({"boxes": torch.zeros(3, 1, 4)}, tmp_path / "a.safetensors")
    # damaged labels: as a damaged video
    (batch,) = P.dense_batches(source, WHOLE, ("boxes",), batch_size=2, rows=[0, 1])
    assert batch["ok"].tolist() == [False, False]
    assert batch["bad"][0][1] == "boxes has 3 rows, and the video 4 frames"
    assert not batch["video"].any()
    os.remove(tmp_path / "b.safetensors")
    with pytest.raises(D.DataError, match="b.mp4: no dense labels .*index LAYOUT"):
        next(P.dense_batches(source, WHOLE, ("flow",), batch_size=1, rows=[1]))
    for change in ({"fps": 5.0}, {"stride": 2}):
        with pytest.raises(D.DataError, match="stride"):
            next(
                iter(
                    P.dense_batches(source, D.Clip(**{"stride": 1, "train": False} | change), ("flow",), batch_size=1)
                )
            )


# --- the layouts ----------------------------------------------------------------------------------


def test_png_of_every_kind(tmp_path):
    for shape, kind in (
        ((3, 5, 7), np.uint8),
        ((3, 5, 7), np.uint16),
        ((3, 5, 7, 3), np.uint8),
        ((3, 5, 7, 3), np.uint16),
    ):
        image = RNG.integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)
        found = D.png([write_png(tmp_path / f"{i}.png", x) for i, x in enumerate(image)])
        assert found.dtype == image.dtype and (found == image).all()
    indices = RNG.integers(0, 256, (2, 5, 7), dtype=np.uint8)
    found = D.png([write_png(tmp_path / f"{i}.png", x, palette=True) for i, x in enumerate(indices)])
    assert (found == indices).all()


def test_scannet(tmp_path):
    # depth has fewer pixels than the pictures
    root, depth = tmp_path / "scans", RNG.integers(0, 5000, (12, 24, 24), dtype=np.uint16)
    poses = [np.eye(4) + i for i in range(12)]
    poses[6] = np.full((4, 4), -np.inf)
    for i in range(12):
        picture(root / f"scene0000_00/color/{i}.jpg", (48, 48))
        write_png(root / f"scene0000_00/depth/{i}.png", depth[i])
        put(root / f"scene0000_00/pose/{i}.txt", "\n".join(" ".join(map(str, row)) for row in poses[i]))
    put(root / "scene0000_00/intrinsic/intrinsic_color.txt", "40 0 24 0\n0 41 23 0\n0 0 1 0\n0 0 0 1\n")
    batch = converted("scannet", root, ("depth", "pose", "K"), clip=D.Clip(frames=12, stride=1, size=42, train=False))
    whole = np.where(depth == 0, np.nan, depth / 1000).repeat(2, -1).repeat(2, -2)
    same(batch["depth"][0], whole[:, 3:45, 3:45])
    poses[6] = np.full((4, 4), np.nan)
    same(batch["pose"][0], poses)
    same(batch["K"][0], [[40, 0, 21], [0, 41, 20], [0, 0, 1]])


def test_realestate10k(tmp_path):
    root, cameras = tmp_path / "re10k", RNG.standard_normal((2, 3, 4))
    text = "https://www.youtube.com/watch?v=x\n"
    for time, camera in zip((1000, 34000), cameras):
        picture(root / f"frames/train/0000cc/{time}.png")
        text += f"{time} 0.5 0.75 0.5 0.5 0 0 " + " ".join(f"{v:.9f}" for v in camera.ravel()) + "\n"
    # a frame that was not downloaded
    put(root / "train/0000cc.txt", text + "99000 0.5 0.75 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n")
    batch = converted("re10k", root, ("pose", "K"))
    same(
        batch["pose"][0] @ torch.tensor(np.concatenate([cameras, np.tile([[[0, 0, 0, 1.0]]], (2, 1, 1))], 1)).float(),
        np.tile(np.eye(4), (2, 1, 1)),
        1e-4,
    )
    same(batch["K"][0], [[16, 0, 14], [0, 24, 14], [0, 0, 1]])


def test_perception(tmp_path):
    film(tmp_path / "set/videos/video_7.mp4", RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    about = {
        "metadata": {"resolution": [32, 32], "num_frames": 3, "frame_rate": 30.0},
        "object_tracking": [
            {
                "id": 4,
                "label": "cup",
                "frame_ids": [0, 2],
                "bounding_boxes": [[0.25, 0.25, 0.5, 0.75], [0.5, 0.5, 1, 1]],
            }
        ],
        "point_tracking": [
            {"id": 0, "frame_ids": [0, 1], "points": [[0.25, 0.5], [0.25, 0.75]]},
            {"id": 1, "frame_ids": [2], "points": [[0.5, 0.5]]},
        ],
    }
    note = put(tmp_path / "all_train.json", json.dumps({"video_7": about}))
    clip = D.Clip(frames=3, stride=1, size=28, train=False)
    batch = converted("perception", tmp_path / "set", ("boxes", "tracks", "visible"), note, clip)
    same(batch["boxes"][0, :, 0], [[6, 6, 14, 22], [math.nan] * 4, [14, 14, 28, 28]])
    same(batch["tracks"][0, :, 0], [[14, 6], [22, 6], [math.nan] * 2])
    assert batch["visible"][0].tolist() == [[True, False], [True, False], [False, True]]


def test_movi(tmp_path):
    masks = RNG.integers(0, 5, (2, SIDE, SIDE), dtype=np.uint8)
    for i in range(2):
        picture(tmp_path / f"movi/7/rgba_{i:05d}.png")
        write_png(tmp_path / f"movi/7/segmentation_{i:05d}.png", masks[i], palette=True)
    put(
        tmp_path / "movi/7/metadata.json",
        json.dumps(
            {
                "metadata": {"resolution": [SIDE, SIDE]},
                "instances": [
                    {"bbox_frames": [1], "bboxes": [[0.25, 0.5, 0.75, 1.0]]},
                    {"bbox_frames": [0, 1], "bboxes": [[0.0, 0.0, 0.5, 0.5]] * 2},
                ],
            }
        ),
    )
    points = RNG.uniform(4, 28, (6, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "movi/7/tracks.npz", target_points=points, occluded=np.arange(12).reshape(6, 2) % 3 == 0)
    batch = converted("movi", tmp_path / "movi", ("masks", "boxes", "tracks", "visible"))
    same(batch["masks"][0], cut(masks))
    same(batch["boxes"][0], [[[math.nan] * 4, [0, 0, 14, 14]], [[14, 6, 28, 22], [0, 0, 14, 14]]])
    same(batch["tracks"][0], points.swapaxes(0, 1) - 2)
    assert torch.equal(batch["visible"][0], torch.from_numpy(np.arange(12).reshape(6, 2).T % 3 != 0))


def test_a_long_clip_is_written_in_pieces_with_their_own_labels(tmp_path):
    frames = 258
    write_png(tmp_path / "m/7/rgba_00000.png", np.zeros((16, 16, 3), np.uint8))
    for i in range(1, frames):
        shutil.copy(tmp_path / "m/7/rgba_00000.png", tmp_path / f"m/7/rgba_{i:05d}.png")
    boxes = [[0.0, 0.0, 0.5, (i + 1) / frames] for i in range(frames)]
    thing = {"bbox_frames": list(range(frames)), "bboxes": boxes}
    put(tmp_path / "m/7/metadata.json", json.dumps({"metadata": {"resolution": [16, 16]}, "instances": [thing]}))
    points = RNG.uniform(4, 28, (3, frames, 2)).astype(np.float32)
    np.savez(tmp_path / "m/7/tracks.npz", target_points=points, occluded=np.zeros((3, frames)))
    D.index("movi", str(tmp_path / "m"), str(tmp_path / "made.txt"))
    for name, piece in (("7_000000", slice(0, 256)), ("7_000256", slice(256, 258))):
        labels = load_file(tmp_path / f"made_clips/{name}.safetensors")
        same(labels["tracks"], points.swapaxes(0, 1)[piece])
        same(labels["boxes"][:, 0, 2], [16 * (i + 1) / frames for i in range(frames)][piece])


def test_waymo(tmp_path):
    segment = tmp_path / "waymo/segment-1"
    box = "[CameraBoxComponent].box."
    fields = [
        "key.segment_context_name", "key.frame_timestamp_micros", "key.camera_name", "key.camera_object_id",
        f"{box}center.x", f"{box}center.y", f"{box}size.x", f"{box}size.y", "[CameraBoxComponent].type",
    ]
    rows = [
        [1, 100, 1, "a", 16, 16, 8, 4, 1],
        [1, 200, 1, "b", 10, 10, 4, 4, 2],
        [1, 200, 1, "a", 18, 16, 8, 4, 1],
        # another camera's, and of a frame that is not there
        [1, 100, 2, "c", 9, 9, 2, 2, 1],
        [1, 300, 1, "a", 9, 9, 2, 2, 1],
    ]
    for time in (100, 200):
        picture(segment / f"1/{time}.jpg")
    with open(segment / "camera_box.csv", "w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])
    batch = converted("waymo", tmp_path / "waymo", ("boxes",))
    same(batch["boxes"][0], [[[10, 12, 18, 16], [math.nan] * 4], [[12, 12, 20, 16], [6, 6, 10, 10]]])


def test_davis_and_ade20k(tmp_path):
    old, new, (ade, _) = (RNG.integers(0, n, (2, SIDE, SIDE), dtype=np.uint8) for n in (2, 4, 151))
    for i in range(2):
        picture(tmp_path / f"DAVIS/JPEGImages/480p/bear/{i:05d}.jpg")
        picture(tmp_path / f"DAVIS/JPEGImages/480p/dogs/{i:05d}.jpg")
        # 2016: black and white; 2017: indices of objects
        write_png(tmp_path / f"DAVIS/Annotations/480p/bear/{i:05d}.png", old[i] * 255)
        write_png(tmp_path / f"DAVIS/Annotations/480p/dogs/{i:05d}.png", new[i], palette=True)
    batch = converted("davis", tmp_path / "DAVIS", ("masks",))
    same(batch["masks"], torch.stack([cut(old), cut(new)]))
    picture(tmp_path / "ADE/images/training/ADE_train_00000001.jpg")
    write_png(tmp_path / "ADE/annotations/training/ADE_train_00000001.png", ade)
    batch = converted("ade20k", tmp_path / "ADE", ("masks",), clip=D.Clip(frames=1, stride=1, size=28, train=False))
    same(batch["masks"][0, 0], cut(np.where(ade == 0, 255, ade.astype(int) - 1)))
    (batch,) = P.dense_batches(D.parse_list(tmp_path / "ade20k.txt"), WHOLE, ("masks",), batch_size=1)
    # an image is repeated, and so are its labels
    same(batch["masks"][0, 1], batch["masks"][0, 0])


def test_cityscapes(tmp_path):
    root, name = tmp_path / "city", "val/frankfurt/frankfurt_000000_000294"
    ids = RNG.integers(0, 34, (SIDE, SIDE), dtype=np.uint8)
    disparity = RNG.integers(0, 2000, (SIDE, SIDE), dtype=np.uint16)
    disparity[8:12] = 0
    left, right = (picture(root / f"{side}Img8bit/{name}_{side}Img8bit.png") for side in ("left", "right"))
    write_png(root / f"gtFine/{name}_gtFine_labelIds.png", ids)
    write_png(root / f"disparity/{name}_disparity.png", disparity)
    batch = converted(
        "cityscapes", root, ("masks", "disparity", "right"), clip=D.Clip(frames=1, stride=1, size=28, train=False)
    )
    classes = {
        7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
        28: 15, 31: 16, 32: 17, 33: 18,
    }
    same(batch["masks"][0, 0], cut([[classes.get(int(i), 255) for i in row] for row in ids]))
    same(batch["disparity"][0, 0], cut(np.where(disparity == 0, np.nan, (disparity - 1.0) / 256)), 1e-3)
    same(batch["video"][0, 0], left[2:30, 2:30])
    same(batch["right"][0, 0], right[2:30, 2:30])


def test_sintel_and_chairs(tmp_path):
    flow, hidden = RNG.uniform(-9, 9, (2, SIDE, SIDE, 2)).astype(np.float32), RNG.random((2, SIDE, SIDE)) < 0.2
    for i in range(3):
        picture(tmp_path / f"sintel/training/clean/alley_1/frame_{i + 1:04d}.png")
        if i < 2:
            write_flo(tmp_path / f"sintel/training/flow/alley_1/frame_{i + 1:04d}.flo", flow[i])
            write_png(
                tmp_path / f"sintel/training/occlusions/alley_1/frame_{i + 1:04d}.png",
                hidden[i].astype(np.uint8) * 255,
            )
    batch = converted(
        "sintel", tmp_path / "sintel", ("flow", "flow_visible"), clip=D.Clip(frames=3, stride=1, size=28, train=False)
    )
    same(batch["flow"][0], flow[:, 2:30, 2:30])
    assert not batch["flow_visible"][0][torch.from_numpy(hidden[:, 2:30, 2:30])].any()
    assert batch["flow_visible"].float().mean() > 0.3
    first, second = (picture(tmp_path / f"FlyingChairs/data/00001_img{i}.ppm") for i in (1, 2))
    write_flo(tmp_path / "FlyingChairs/data/00001_flow.flo", flow[0])
    batch = converted("chairs", tmp_path / "FlyingChairs", ("flow", "flow_visible"))
    same(batch["video"][0], np.stack([first, second])[:, 2:30, 2:30])
    same(batch["flow"][0], flow[:1, 2:30, 2:30])


@pytest.mark.parametrize(
    "left, right, disp", [("image_2", "image_3", "disp_occ_0"), ("colored_0", "colored_1", "disp_occ")])
def test_kitti(tmp_path, left, right, disp):
    """Of 2015 and of 2012."""
    root, raw = tmp_path / "kitti", RNG.integers(2**15 - 500, 2**15 + 500, (SIDE, SIDE, 3)).astype(np.uint16)
    raw[..., 2] = RNG.random((SIDE, SIDE)) < 0.7
    seen = raw.copy()
    seen[:16, :, 2] = 0
    disparity = RNG.integers(0, 3000, (SIDE, SIDE), dtype=np.uint16)
    for i in (10, 11):
        picture(root / f"training/{left}/000000_{i}.png"), picture(root / f"training/{right}/000000_{i}.png")
    for folder, image in (("flow_occ", raw), ("flow_noc", seen), (disp, disparity)):
        write_png(root / f"training/{folder}/000000_10.png", image)
    batch = converted("kitti", root, ("flow", "flow_visible", "disparity", "right"))
    expected = np.where(raw[..., 2:] > 0, (raw[..., :2].astype(float) - 2**15) / 64, np.nan)
    same(batch["flow"][0, 0], expected[2:30, 2:30])
    assert not batch["flow_visible"][0, 0, :14].any() and batch["flow_visible"][0, 0, 14:].any()
    same(batch["disparity"][0, 0], cut(np.where(disparity == 0, np.nan, disparity / 256)))
    # of the second frame nothing is known
    assert batch["disparity"][0, 1].isnan().all()


def test_sceneflow_and_middlebury(tmp_path):
    place = "TRAIN/A/0000"
    disparity = RNG.uniform(1, 90, (2, SIDE, SIDE)).astype(np.float32)
    flow = RNG.uniform(-9, 9, (SIDE, SIDE, 3)).astype(np.float32)
    right = []
    for i in range(2):
        picture(tmp_path / f"sf/frames_cleanpass/{place}/left/{i + 6:04d}.png")
        right.append(picture(tmp_path / f"sf/frames_cleanpass/{place}/right/{i + 6:04d}.png"))
        write_pfm(tmp_path / f"sf/disparity/{place}/left/{i + 6:04d}.pfm", disparity[i])
    write_pfm(tmp_path / f"sf/optical_flow/{place}/into_future/left/OpticalFlowIntoFuture_0006_L.pfm", flow)
    batch = converted("sceneflow", tmp_path / "sf", ("disparity", "disparity_visible", "right", "flow"))
    same(batch["disparity"][0], cut(disparity))
    same(batch["right"][0], np.stack(right)[:, 2:30, 2:30])
    same(batch["flow"][0, 0], flow[2:30, 2:30, :2])
    assert torch.equal(batch["disparity_visible"][0], torch.arange(28) + 0.5 >= batch["disparity"][0])
    disparity[0, 5:9] = np.inf
    picture(tmp_path / "mb/Adirondack-perfect/im0.png"), picture(tmp_path / "mb/Adirondack-perfect/im1.png")
    write_pfm(tmp_path / "mb/Adirondack-perfect/disp0.pfm", disparity[0])
    batch = converted(
        "middlebury", tmp_path / "mb", ("disparity", "right"), clip=D.Clip(frames=1, stride=1, size=28, train=False)
    )
    same(batch["disparity"][0, 0], cut(np.where(np.isinf(disparity[0]), np.nan, disparity[0])))


def test_intphys(tmp_path):
    """Four movies: there throughout, never there, gone from frame 2 on, there from frame 2 on."""
    empty, there = (RNG.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8) for _ in range(2))
    movies = {1: np.concatenate([there[:2], empty[2:]]), 2: there, 3: empty, 4: np.concatenate([empty[:2], there[2:]])}
    for k, frames in movies.items():
        for i, frame in enumerate(frames):
            write_png(tmp_path / f"dev/O2/01/{k}/scene/scene_{i + 1:03d}.png", frame)
        put(tmp_path / f"dev/O2/01/{k}/status.json", json.dumps({"header": {"is_possible": k in (2, 3)}}))
    batch = converted(
        "intphys",
        tmp_path / "dev",
        ("impossible", "change", "kind"),
        clip=D.Clip(frames=4, stride=1, size=28, train=False),
    )
    same(batch["video"], np.stack([there, empty])[:, :, 2:30, 2:30])
    same(batch["impossible"], np.stack([movies[1], movies[4]])[:, :, 2:30, 2:30])
    assert batch["change"].tolist() == [2, 2] and batch["kind"].tolist() == [1, 1]


def test_ava(tmp_path):
    film(tmp_path / "ava/clip_a.mkv", np.repeat(np.arange(50, dtype=np.uint8), 32 * 32 * 3).reshape(50, 32, 32, 3))
    note = put(
        tmp_path / "ava_train_v2.2.csv",
        "clip_a,0002,0.25,0.25,0.5,0.75,12,0\nclip_a,0002,0.25,0.25,0.5,0.75,80,0\nclip_a,0002,0.5,0.5,1,1,1,3\n"
        "clip_a,0003,0,0,1,1,12,0\ngone,0902,0,0,1,1,12,0\n",
    )
    batch = converted(
        "ava", tmp_path / "ava", ("boxes", "actions"), note, D.Clip(frames=4, stride=4, size=28, train=False)
    )
    assert batch["boxes"].shape == (2, 4, 2, 4)
    assert batch["actions"].shape == (2, 2, 80)
    assert batch["actions"].sum((1, 2)).tolist() == [3, 1]
    same(batch["boxes"][0], np.tile([[6, 6, 14, 22], [14, 14, 28, 28]], (4, 1, 1)))
    assert torch.nonzero(batch["actions"][0]).tolist() == [[0, 11], [0, 79], [1, 0]]
    # around second 2 at 10 frames a second
    assert abs(batch["video"][0].float().mean() - 20) < 2 and abs(batch["video"][1].float().mean() - 30) < 2


def test_what_is_not_as_the_layout_says(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(D.DataError, match="no clips in the layout of sintel"):
        D.index("sintel", str(tmp_path / "empty"))
    with pytest.raises(D.DataError, match="needs --annotations"):
        D.index("ava", str(tmp_path / "empty"))
    (
        picture(tmp_path / "c/data/1_img1.ppm"),
        picture(tmp_path / "c/data/1_img2.ppm"),
        put(tmp_path / "c/data/1_flow.flo", b"short"),
    )
    with pytest.raises(D.DataError, match="clip data/1 is not as chairs should be") as caught:
        D.index("chairs", str(tmp_path / "c"), str(tmp_path / "lists/c.txt"))
    assert "\n" not in str(caught.value) and not (tmp_path / "lists/c_clips/.half.mp4").exists()
    write_flo(tmp_path / "c/data/1_flow.flo", np.zeros((SIDE, SIDE, 2)))
    status, summary, error = run("data.py", "index", "chairs", tmp_path / "c", "--out", tmp_path / "lists/c.txt")
    assert status == 0, error
    assert summary["labels"] == {"flow": 1} and (tmp_path / "lists/c.txt").read_text() == "c_clips/data/1.mp4\n"
    # data/1 and data-1 are two clips
    for end in ("img1.ppm", "img2.ppm", "flow.flo"):
        shutil.copy(tmp_path / f"c/data/1_{end}", tmp_path / f"c/data-1_{end}")
    D.index("chairs", str(tmp_path / "c"), str(tmp_path / "lists/c.txt"))
    assert (tmp_path / "lists/c.txt").read_text().split() == ["c_clips/data-1.mp4", "c_clips/data/1.mp4"]
    assert len(list((tmp_path / "lists/c_clips").rglob("*.mp4"))) == 2


# --- real files -----------------------------------------------------------------------------------


def warp_error(batch, first, second, at, ok):
    grid = at / torch.tensor([batch["video"].shape[3], batch["video"].shape[2]]) * 2 - 1
    moved = torch.nn.functional.grid_sample(
        second.float().permute(0, 3, 1, 2), grid, align_corners=False, padding_mode="border"
    ).permute(0, 2, 3, 1)
    return [(first - x).abs().mean(-1)[ok].mean().item() for x in (moved, second.float())]


def test_real_flow_stereo_and_masks(video_data, tmp_path):
    dense = video_data / "dense"
    centres = lambda size: torch.stack(
        torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="xy"), -1
    )
    kitti = tmp_path / "kitti/training"
    for name, place in (
        ("kitti_frame1", "image_2/000000_10"),
        ("kitti_frame2", "image_2/000000_11"),
        ("kitti_flow_gt", "flow_occ/000000_10"),
    ):
        put(kitti / f"{place}.png", (dense / f"flow/{name}.png").read_bytes())
    for i in range(9):
        for j in (0, 1):
            (tmp_path / "chairs/data").mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [
                    "ffmpeg", "-v", "error", "-i", dense / f"flow/chairs_{i}_img{j}.jpg",
                    tmp_path / f"chairs/data/{i}_img{j + 1}.ppm",
                ],
                check=True,
            )
        write_flo(
            tmp_path / f"chairs/data/{i}_flow.flo",
            np.load(dense / f"flow/chairs_{i}_flow.npz")["flow"].astype(np.float32),
        )
    for layout in ("kitti", "chairs"):
        D.index(layout, str(tmp_path / layout), str(tmp_path / f"{layout}.txt"))
        clip = D.Clip(frames=2, stride=1, size=256, train=False)
        (batch,) = P.dense_batches(
            D.parse_list(tmp_path / f"{layout}.txt"), clip, ("flow", "flow_visible"), batch_size=9
        )
        flow, ok = batch["flow"][:, 0], batch["flow_visible"][:, 0]
        error, still = warp_error(
            batch, batch["video"][:, 0], batch["video"][:, 1], centres(256) + flow.nan_to_num(), ok
        )
        print(f"\n{layout}: {error:.1f} of 255 warped, {still:.1f} not warped, {ok.float().mean():.0%} of the pixels")
        assert error < 0.6 * still
    scene = tmp_path / "mb/motorcycle"
    for name, place in (("left", "im0"), ("right", "im1")):
        put(scene / f"{place}.png", (dense / f"stereo/motorcycle_{name}.png").read_bytes())
    write_pfm(scene / "disp0.pfm", np.load(dense / "stereo/motorcycle_disp.npz")["arr_0"])
    D.index("middlebury", str(tmp_path / "mb"), str(tmp_path / "mb.txt"))
    clip = D.Clip(frames=1, stride=1, size=256, train=False)
    (batch,) = P.dense_batches(
        D.parse_list(tmp_path / "mb.txt"), clip, ("disparity", "disparity_visible", "right"), batch_size=1
    )
    shift = torch.stack([-batch["disparity"][:, 0], 0 * batch["disparity"][:, 0]], -1).nan_to_num()
    error, still = warp_error(
        batch, batch["video"][:, 0], batch["right"][:, 0], centres(256) + shift, batch["disparity_visible"][:, 0]
    )
    print(f"middlebury: {error:.1f} of 255 warped, {still:.1f} not warped")
    assert error < 0.5 * still
    packed = np.load(dense / "davis16-val/cows.masks.npz")
    masks = np.unpackbits(packed["bits"], axis=-1)[..., : packed["shape"][2]][:4]
    (tmp_path / "davis/JPEGImages/480p/cows").mkdir(parents=True)
    subprocess.run(
        [
            "ffmpeg", "-v", "error", "-i", dense / "davis16-val/videos/cows.mp4", "-frames:v", "4", "-start_number",
            "0", tmp_path / "davis/JPEGImages/480p/cows/%05d.jpg",
        ],
        check=True,
    )
    for i, mask in enumerate(masks):
        write_png(tmp_path / f"davis/Annotations/480p/cows/{i:05d}.png", mask * 255)
    D.index("davis", str(tmp_path / "davis"), str(tmp_path / "davis.txt"))
    (batch,) = P.dense_batches(
        D.parse_list(tmp_path / "davis.txt"), D.Clip(frames=4, stride=1, size=210, train=False), ("masks",),
        batch_size=1,
    )
    assert batch["masks"].unique().tolist() == [0, 1]
    assert abs(batch["masks"].float().mean() / masks[:, 15:225, 108:318].mean() - 1) < 1e-3
