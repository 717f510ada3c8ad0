"""The built-in world's labels: they agree with each other and with the picture, and asking for them changes no
video."""

import hashlib

import numpy as np
import pytest
import torch

import data as D
import probe as P

ALL = (
    "depth", "pose", "K", "masks", "boxes", "tracks", "visible", "flow", "flow_visible", "right", "disparity",
    "disparity_visible",
)
PAIR = ("impossible", "kind", "change")
CLIPS = [*range(8)]  # one of each motion


@pytest.fixture(scope="module")
def made():
    """Clips without noise, large enough that a bilinear warp can follow the finest waves."""
    return D.World("val", frames=6, size=128, noise=0).render(CLIPS, ALL)


def sample(pictures, at):
    """pictures (n,H,W,C) at pixels (n,H,W,2), bilinear."""
    size = torch.tensor(pictures.shape[2:0:-1])
    grid = at / size * 2 - 1
    return torch.nn.functional.grid_sample(
        pictures.float().movedim(-1, 1), grid, align_corners=False, padding_mode="border"
    ).movedim(1, -1)


def centres(size):
    return torch.stack(torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="xy"), -1)


def photometric(name, first, second, at, seen):
    """Mean absolute difference in [0,255] of the first picture and the second warped to it, where seen; and without
    the warp."""
    first, second, at, seen = first.flatten(0, 1), second.flatten(0, 1), at.flatten(0, 1), seen.flatten(0, 1)
    error, still = ((first - x).abs().mean(-1)[seen].mean().item() for x in (sample(second, at), second.float()))
    print(f"\n{name}: {error:.2f} of 255 warped, {still:.2f} not warped, {seen.float().mean():.0%} of the pixels")
    return error, still


@pytest.mark.parametrize(
    "settings, expected, means",
    [
        ({}, "48fb15b41e70a769", [110.33, 118.8, 134.45, 112.2, 127.85]),
        ({"frames": 16, "size": 64}, "405f9181e917338b", [110.4, 118.94, 132.98, 113.52, 128.18]),
        (
            {"noise": 0, "frames": 5, "size": 48, "split": "val", "seed": 3},
            "f5b44d4f93d3dbe4",
            [96.37, 120.56, 116.67, 127.66, 112.19],
        ),
    ],
)
def test_videos_are_those_that_published_numbers_were_trained_on(settings, expected, means):
    """To the bit; a processor that rounds sines otherwise may change a few values by one, which shows in no mean."""
    world, clips = D.World(**settings), [0, 1, 2, 3, 4, 5, 6, 7, 100, 1001]
    video = world.render(clips)["video"]
    same = hashlib.sha256(video.numpy().tobytes()).hexdigest()[:16] == expected
    assert same or np.allclose(video.float().mean((1, 2, 3, 4))[:5], means, atol=0.01)
    assert torch.equal(video, world.render(clips, ALL)["video"])


def test_shapes_and_types_and_the_same_whatever_else_is_in_the_batch():
    world = D.World("val", frames=4, size=24)
    many, one = world.render([3, 9, 4], ALL), world.render([9], ALL)
    for name in (*ALL, "video"):
        assert torch.equal(many[name][1:2].nan_to_num(-1), one[name].nan_to_num(-1)), name
    shapes = {
        "depth": (4, 24, 24), "pose": (4, 4, 4), "K": (3, 3), "masks": (4, 24, 24), "boxes": (4, 4, 4),
        "tracks": (4, 64, 2), "visible": (4, 64), "flow": (3, 24, 24, 2), "flow_visible": (3, 24, 24),
        "right": (4, 24, 24, 3), "disparity": (4, 24, 24), "disparity_visible": (4, 24, 24),
    }
    kinds = {torch.bool: "visible", torch.uint8: "masks right"}
    assert {name: tuple(one[name].shape[1:]) for name in ALL} == shapes
    for name in ALL:
        assert one[name].dtype == next((k for k, v in kinds.items() if name.split("_")[-1] in v), torch.float32)
    assert list(world.render([0], ("depth",))) == ["video", "depth", "label"]
    tiny = D.World(frames=1, size=4).render([0], ALL)
    assert tiny["flow"].shape == (1, 0, 4, 4, 2) and tiny["tracks"].shape == (1, 1, 64, 2) and tiny["visible"].all()
    with pytest.raises(D.DataError, match="no label 'normals'; it has depth"):
        world.render([0], ("normals",))
    assert not torch.equal(one["right"], world.render([9], ("right", "visible"))["video"])
    grain = [D.World("val", frames=4, size=24, noise=n).render([9], ("right",)) for n in (0, 0.3)]
    # the second camera has noise of its own
    assert not torch.equal(*(grain[1][k].float() - grain[0][k] for k in ("video", "right")))


def test_flow_warps_the_next_frame_onto_this_one(made):
    error, still = photometric(
        "flow", made["video"][:, :-1], made["video"][:, 1:], centres(128) + made["flow"], made["flow_visible"]
    )
    assert error < 3 and error < 0.12 * still and made["flow_visible"].float().mean() > 0.6
    hidden = ~made["flow_visible"] & ((centres(128) + made["flow"] > 1) & (centres(128) + made["flow"] < 127)).all(-1)
    # something is covered up, and there the picture differs
    assert hidden.any()
    warped = sample(made["video"][:, 1:].flatten(0, 1), (centres(128) + made["flow"]).flatten(0, 1))
    assert (made["video"][:, :-1].flatten(0, 1) - warped).abs().mean(-1)[hidden.flatten(0, 1)].mean() > 5 * error


def test_depth_and_pose_reproject_what_rests(made):
    """Walls and floors do not move: pixel -> point at its depth -> world -> the last frame's camera -> pixel,
    written out once more."""
    K, pose, depth = (made[k].double() for k in ("K", "pose", "depth"))
    pixel = torch.cat([centres(128), torch.ones(128, 128, 1)], -1).double()
    first, last = pose[:, 2], pose[:, 4]
    point = torch.einsum("nij,hwj->nhwi", torch.linalg.inv(K), pixel) * depth[:, 2, ..., None]
    point = torch.einsum("nij,nhwj->nhwi", first[:, :3, :3], point) + first[:, None, None, :3, 3]
    point = torch.einsum("nji,nhwj->nhwi", last[:, :3, :3], point - last[:, None, None, :3, 3])
    at = torch.einsum("nij,nhwj->nhwi", K, point)
    at = at[..., :2] / at[..., 2:]
    inside = ((at > 0) & (at < 128)).all(-1) & (made["masks"][:, 2] < 2)
    there = sample(depth[:, 4, ..., None], at.float())[..., 0]
    seen = inside & ((there - point[..., 2]).abs() < 0.01 * point[..., 2])
    error, still = photometric(
        "depth and pose", made["video"][:, 2:3], made["video"][:, 4:5], at.float()[:, None], seen[:, None]
    )
    assert error < 5 and error < 0.15 * still and seen.float().mean() > 0.3


def test_disparity_warps_the_right_picture_onto_the_left(made):
    shift = torch.stack([-made["disparity"], torch.zeros_like(made["disparity"])], -1)
    error, still = photometric(
        "stereo", made["video"], made["right"], centres(128) + shift, made["disparity_visible"]
    )
    assert error < 3 and error < 0.12 * still and made["disparity_visible"].float().mean() > 0.7
    f, baseline = made["K"][0, 0, 0], D.World().baseline
    assert torch.allclose(made["disparity"] * made["depth"], f * baseline, rtol=1e-4)


def test_tracks_are_chained_flow(made):
    """Exactly at the first step, which starts on pixels; then as far as flow read between pixels goes, while the
    point is seen."""
    tracks, seen = made["tracks"], made["visible"]
    assert seen[:, 0].all() and 0.3 < seen[:, -1].float().mean() < 0.95
    assert ((tracks[:, 0] - 0.5) % 1 < 1e-3).logical_or((tracks[:, 0] - 0.5) % 1 > 1 - 1e-3).all()
    clip, at = torch.arange(len(tracks))[:, None], (tracks[:, 0] - 0.5).round().long()
    step = made["flow"][clip, 0, at[..., 1], at[..., 0]]
    assert torch.allclose(tracks[:, 0] + step, tracks[:, 1], atol=1e-3)
    assert torch.equal(seen[:, 1], made["flow_visible"][clip, 0, at[..., 1], at[..., 0]])
    for t in range(5):
        ok = seen[:, t] & seen[:, t + 1]
        moved = tracks[:, t] + sample(made["flow"][:, t], tracks[:, t, None])[:, 0]
        off = (moved - tracks[:, t + 1]).norm(dim=-1)[ok]
        # the rest: pixels on both sides of an edge
        assert off.median() < 0.02 and (off < 0.3).float().mean() > 0.97


def test_a_hidden_point_has_something_in_front(made):
    """Tracks inside the picture: visible means that the depth map there is the point's depth, hidden that it is
    less."""
    tracks, inside = made["tracks"], ((made["tracks"] > 0) & (made["tracks"] < 128)).all(-1)
    assert (made["visible"] <= inside).all()
    x, y = tracks.clamp(0, 127).long().unbind(-1)
    n, t, _ = torch.meshgrid(*map(torch.arange, x.shape), indexing="ij")
    where = made["masks"][n, t, y, x]
    start = made["masks"][n[:, :1], 0, y[:, :1], x[:, :1]].expand_as(where)
    # a visible point lies on its own object
    assert (where == start)[made["visible"]].float().mean() > 0.98
    # in front is mostly one of the spheres and boxes
    assert (where >= 2)[inside & ~made["visible"]].float().mean() > 0.8


def test_boxes_hold_what_the_masks_show(made):
    found = 0
    for n, t, o in np.ndindex(*made["boxes"].shape[:3]):
        y, x = torch.nonzero(made["masks"][n, t] == o + 2, as_tuple=True)
        if len(x):
            found += 1
            assert made["boxes"][n, t, o].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        else:
            assert made["boxes"][n, t, o].isnan().all()
    assert found > 50


def test_impossible_videos_differ_from_one_frame_on_and_only_where_the_thing_is():
    for settings in (
        {"frames": 12, "size": 48},
        {"frames": 12, "size": 48, "noise": 0},
        {"frames": 16, "size": 32, "split": "val"},
        {},
    ):
        world = D.World(**settings)
        out = world.render(range(96), (*PAIR, "masks"))
        same = (out["video"] == out["impossible"]).flatten(2).all(-1)
        assert out["kind"].tolist() == [i % 6 for i in range(96)]
        for i, change in enumerate(out["change"].tolist()):
            assert same[i, :change].all() and not same[i, change], (settings, i)
            # seen for long enough on both sides
            assert world.frames // 3 <= change < world.frames - 1, (settings, i, change)
        share = (out["video"] != out["impossible"]).any(-1).float().mean((2, 3))
        assert share.max() < 0.25 and share.amax(1).min() > 0.01
        # out of sight in every other six, save jump, stop and start
        later = (out["change"] > world.frames // 2).view(-1, 2, 6)
        assert later[:, 0, :3].float().mean() > 0.6 and not later[:, 1, :3].any()
        pair = (out["impossible"], out["video"])
        more = [(v[:, 1:].float() - v[:, :-1].float()).abs().mean((1, 2, 3, 4)) for v in pair]
        # the amount of motion does not tell which is which
        assert 0.4 < (more[0] > more[1]).float().mean() < 0.6


def test_pairs_have_labels_and_dense_batches_does_not_tell_the_world_from_files():
    clip = D.Clip(frames=6, size=32, train=False)
    source = D.parse_list("world", split="val")
    with pytest.raises(D.DataError, match="flow stride 1"):
        next(iter(P.dense_batches(source, clip, ("flow",), batch_size=2)))
    clip.stride = 1
    batches = list(P.dense_batches(source, clip, (*ALL, *PAIR), batch_size=2, rows=[4, 0, 7]))
    made = D.World("val", frames=6, size=32).render([4, 0, 7], (*ALL, *PAIR))
    assert [len(b["video"]) for b in batches] == [2, 1] and [b["index"].tolist() for b in batches] == [[4, 0], [7]]
    for name in ("video", *ALL, *PAIR):
        assert torch.equal(torch.cat([b[name] for b in batches]).nan_to_num(-1), made[name].nan_to_num(-1)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu(made):
    """Rounding may move a ray across an edge; everywhere else the labels are those of the CPU."""
    there = D.World("val", frames=6, size=128, noise=0, device="cuda").render(CLIPS, ALL)
    for name in (*ALL, "video"):
        a, b = made[name].float(), there[name].float()
        off = ~torch.isclose(a, b, rtol=1e-3, atol=1.01 if name in ("video", "right") else 0.01, equal_nan=True)
        assert off.float().mean() < 2e-3, name


def test_in_rooms_things_are_told_by_their_brightness_and_labels_stay():
    names = ("masks", "depth", "flow")
    rooms, plain = (D.World("rooms", **flags).render(range(16), names) for flags in ({}, {"contrast": 0.0}))
    for name in names:
        assert torch.equal(rooms[name].nan_to_num(), plain[name].nan_to_num())
    def tone(made, *ids):
        return made["video"][torch.isin(made["masks"], torch.tensor(ids, dtype=torch.uint8))].float().mean()
    wall, floor, spheres, boxes = (tone(rooms, *ids) for ids in ((0,), (1,), (2, 3), (4, 5)))
    assert spheres > wall + 30 and wall > floor + 20 and floor > boxes + 10
    assert all(abs(tone(plain, *ids) - 115) < 20 for ids in ((0,), (1,), (2, 3), (4, 5)))
    assert not torch.equal(D.World("rooms_val").render([0])["video"], D.World("rooms").render([0])["video"])
