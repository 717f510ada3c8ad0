"""The tasks of space and time: metrics by hand and against torchmetrics, each task for three steps, fine-tuning,
pictures, the whole suite."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data as D
import probe as P
import model as M
import probe

torch.set_num_threads(1)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_pictures")


def arguments(task, tmp_path, **flags):
    return probe.Args(
        task=task,
        **dict(
            encoder="random:vit_n", data="world", train_clips=24, val_clips=16, frames=8, size=32, steps=3,
            batch_size=8, width=32, grid_lr=(1e-3,), workers=0, out_dir=str(tmp_path),
        )
        | flags,
    )


def task_of(name, width=8, grid=(1, 4, 4), frames=2, size=32, classes=0, data="", **flags):
    return probe.TASKS[name](probe.Args(name, data=data, **flags), width, 2, grid, frames, size, classes)


def only(total):
    return next(iter(total.values()))


@pytest.fixture
def folder(tmp_path):
    """An encoder of 8 x 32 px like a laptop's."""
    torch.manual_seed(0)
    encoder = M.ViT(width=32, depth=4, heads=2, mlp=64, patch=8, frames=8, size=32)
    M.save_encoder(
        tmp_path / "encoder.safetensors",
        encoder,
        encoder.config | M.IMAGENET | {"model": None, "stride": 4, "fps": 0.0},
    )
    return str(tmp_path / "encoder.safetensors")


# --- metrics ---


def test_pose_error_by_hand_and_the_nearest_rotation():
    turn = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]]).flatten()
    still = torch.eye(3, 4).flatten()
    moved = still.clone()
    # 0.25 to the right: every corner is off by that
    moved[3] = 0.25
    y = {"y": torch.stack([still, turn, still, torch.full((12,), math.nan)])}
    # three times a rotation is that rotation; the fourth clip's pose is not known
    p = torch.stack([moved, turn, still * 3, still])
    rows = [task_of("pose").score(p[i:][:1], {"y": y["y"][i:][:1]}) for i in range(4)]
    # sums over eight corners, and how many there were
    assert torch.allclose(torch.cat(rows), torch.tensor([[2.0, 8], [0, 8], [0, 8], [0, 0]]), atol=1e-5)
    assert only(task_of("pose").total(task_of("pose").score(p, y))) == pytest.approx(0.25 / 3)
    g = torch.Generator().manual_seed(0)
    for m in torch.randn(20, 12, generator=g):
        R = probe.rigid(m[None]).view(3, 4)[:, :3].double()
        assert torch.allclose(R @ R.T, torch.eye(3).double(), atol=1e-5) and torch.linalg.det(R) > 0.99
        given = m.view(3, 4)[:, :3].double()
        for _ in range(20):  # no rotation near it is nearer to m
            turn = torch.linalg.matrix_exp(0.1 * (a := torch.randn(3, 3, generator=g).double()) - 0.1 * a.T)
            assert (R - given).norm() <= (turn @ R - given).norm() + 1e-9


def test_relative_pose_leads_from_the_last_camera_to_the_first():
    made = D.World("val").render([0, 3, 5], ("pose",))
    y = task_of("pose").labels(made)["y"].view(3, 3, 4)
    for pose, m in zip(made["pose"].double(), y.double()):
        want = torch.linalg.inv(pose[0]) @ pose[-1]
        assert torch.allclose(torch.cat([m, torch.tensor([[0.0, 0, 0, 1]]).double()]), want, atol=1e-5)


def test_jaccard_by_hand():
    """Two points, three frames of which the first does not count. Point 0: near by 3 px of 256, then hidden and
    said to be hidden. Point 1: seen twice, once called hidden, once 12 px off. Radius 4: one hit, seen 3, one
    called where it is not: 1 / (3 + 1). Radius 16: 2 / 3. Radius 1, 2: 0 / (3 + 2)."""
    y = {
        "y": torch.zeros(1, 2, 3, 2),
        "seen": torch.tensor([[[True, True, False], [True, True, True]]]),
        "asked": torch.ones(1, 2, dtype=torch.bool),
    }
    p = torch.zeros(1, 2, 3, 3)
    p[0, 0, 1] = torch.tensor([3 / 256, 0, 1])
    p[0, 1, 2] = torch.tensor([0, 12 / 256, 1])
    points = task_of("points")
    assert points.score(p, y)[0].tolist() == pytest.approx([0, 0, 1 / 4, 1 / 4, 2 / 3])
    y["asked"][0, 1] = False  # not seen in the first frame: not asked
    assert points.score(p, y)[0].tolist() == pytest.approx([0, 0, 1, 1, 1])


def test_jaccard_equals_tap_vids_counts():
    """Independent, in numpy, as TAP-Vid defines it."""
    g = np.random.default_rng(0)
    gt, seen = g.random((3, 7, 6, 2), dtype=np.float32), g.random((3, 7, 6)) < 0.7
    seen[:, :, 0] = True
    p = np.concatenate([gt + g.normal(0, 0.02, gt.shape), (g.random((3, 7, 6, 1)) < 0.7)], -1).astype(np.float32)
    ours = task_of("points").score(
        torch.from_numpy(p),
        {"y": torch.from_numpy(gt), "seen": torch.from_numpy(seen), "asked": torch.ones(3, 7, dtype=torch.bool)},
    ).numpy()
    for b in range(3):
        for k, r in enumerate((1, 2, 4, 8, 16)):
            v, c = seen[b, :, 1:], p[b, :, 1:, 2] > 0.5
            within = (((p[b, :, 1:, :2] - gt[b, :, 1:]) * 256) ** 2).sum(-1) < r**2
            hits, false = (within & v & c).sum(), ((~v & c) | (~within & c)).sum()
            assert ours[b, k] == pytest.approx(hits / (v.sum() + false))


def test_iou_by_hand():
    box = lambda *v: torch.tensor(v, dtype=torch.float)
    y = {
        "y": torch.stack(
            [torch.stack([box(0, 0, 1, 1), box(0, 0, 0.5, 0.5), box(0.5, 0.5, 1, 1), torch.full((4,), math.nan)])]
        )[None]
    }
    p = torch.stack(
        [torch.stack([box(0.9, 0.9, 1, 1), box(0.25, 0, 0.75, 0.5), box(0, 0, 0.4, 0.4), box(0, 0, 1, 1)])]
    )[None]
    # the first frame's box was given
    assert task_of("boxes").score(p, y)[0].tolist() == pytest.approx([1 / 3, 2])
    first = task_of("boxes").score(p[:, :, :2], {"y": y["y"][:, :, :2]})
    assert only(task_of("boxes").total(first)) == pytest.approx(1 / 3)
    small = task_of("boxes").labels({"boxes": torch.tensor([[[[0, 0, 2, 2.0], [0, 0, 10, 10]]] * 2])})
    # 4 of 1024 pixels are below 0.5 %
    assert small["y"][0, 0].isnan().all() and small["first"][0, 1].tolist() == [0, 0, 10 / 32, 10 / 32]


def test_depth_flow_and_stereo_by_hand():
    y = {"y": torch.tensor([[2.0, math.nan, 4.0]])}
    depth, flow, stereo = (task_of(name) for name in ("depth", "flow", "stereo"))
    assert depth.total(depth.score(torch.tensor([[1.0, 5, 5]]), y)) == {"absrel": pytest.approx((0.5 + 0.25) / 2)}
    kept = depth.labels({"depth": torch.tensor([0.0005, 5, 11, math.nan])})["y"]
    assert kept.isnan().tolist() == [True, False, True, True]
    y = {"y": torch.tensor([[[0.0, 0], [math.nan, math.nan]], [[1, 1], [2, 2]]])}
    sums = flow.score(torch.tensor([[[3.0, 4], [9, 9]], [[1, 1], [2, 3]]]), y)
    assert flow.total(sums) == {"epe": pytest.approx(6 / 3)}
    # errors 0.5, 1, 0.75, 5: bad is strictly more
    y, p = {"y": torch.tensor([1.0, 2, 3, 4, math.nan])}, torch.tensor([1.5, 3, 3.75, 9, 0])
    found = stereo.total(stereo.score(p, y))
    assert found == pytest.approx({"average": 7.25 / 4, "bad0.5": 3 / 4, "bad1": 1 / 4})


def test_segmentation_counts_by_hand_and_as_torchmetrics():
    y = torch.tensor([[0, 0, 1], [1, 2, 255]])
    called = torch.tensor([[0, 1, 1], [1, 2, 0]])
    one = lambda c, n=3: torch.nn.functional.one_hot(c, n).float()
    segment = task_of("segment", classes=3)
    found = segment.total(segment.score(one(called), {"y": y}).double())
    assert found == pytest.approx({"miou": (1 / 2 + 2 / 3 + 1) / 3, "macc": (1 / 2 + 1 + 1) / 3})
    torchmetrics = pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    g = torch.Generator().manual_seed(0)
    y, p = torch.randint(0, 5, (4, 16, 16), generator=g), torch.randn(4, 16, 16, 5, generator=g)
    y[torch.rand(y.shape, generator=g) < 0.2] = 255
    # the data set's confusion, not a mean over pictures
    segment = task_of("segment", classes=5)
    parts = [segment.score(a, {"y": b}) for a, b in zip(p, y)]
    iou = torchmetrics.JaccardIndex(task="multiclass", num_classes=5, ignore_index=255)(p.argmax(-1), y)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=5, average="macro", ignore_index=255)
    want = {"miou": float(iou), "macc": float(accuracy(p.argmax(-1), y))}
    assert segment.total(torch.cat(parts).double()) == pytest.approx(want, abs=1e-6)


def enveloped(scores, truth):
    """PASCAL VOC's and AVA's: the area under the highest precision at this recall or beyond, by brute force over
    thresholds."""
    points = [(1.0, 0.0)]
    for threshold in np.unique(scores):
        called = scores >= threshold
        points.append((truth[called].sum() / truth.sum(), truth[called].mean()))
    recalls = sorted({0.0, *(recall for recall, _ in points)})
    area = 0.0
    for low, high in zip(recalls, recalls[1:]):
        area += (high - low) * max(precision for recall, precision in points if recall >= high - 1e-12)
    return area


def test_average_precision_by_hand_and_as_torchmetrics():
    ap = lambda s, y: float(probe.average_precision(torch.tensor(s), torch.tensor(y)))
    assert ap([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    # the second hit, at precision 1/3, is followed by a third at 1/2
    assert ap([0.9, 0.8, 0.7, 0.6], [1, 0, 0, 1]) == pytest.approx((1 + 1 / 2) / 2)
    assert ap([0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 0, 1, 1]) == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    # all alike: the share of positives, in whatever order they stand
    assert ap([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0]) == pytest.approx(0.5)
    assert math.isnan(probe.average_precision(torch.zeros(3), torch.zeros(3)))
    g = torch.Generator().manual_seed(0)
    s, y = (torch.rand(200, 3, generator=g) * 20).round() / 20, torch.randint(0, 2, (200, 3), generator=g)
    found = task_of("detect").total(torch.cat([s.double(), y.double()], 1))["map"]
    assert found == pytest.approx(np.mean([enveloped(a, b) for a, b in zip(s.T.numpy(), y.T.numpy())]), abs=1e-9)
    torchmetrics = pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    want = torchmetrics.AveragePrecision(task="multilabel", num_labels=3, average="none")(s, y)
    plain = [float(probe.average_precision(a, b, envelope=False)) for a, b in zip(s.T, y.T)]
    assert plain == pytest.approx(want.tolist(), abs=1e-6) and np.mean(plain) < found


def test_actions_of_boxes_by_hand():
    """Four frames, the key frame is the third: right by its own width; nearer, and hidden at first; hidden in the
    key frame; seen but once."""
    boxes = torch.full((1, 4, 4, 4), math.nan)
    boxes[0, :, 0] = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [3, 0, 7, 4], [4, 0, 8, 4]])
    boxes[0, 1:, 1] = torch.tensor([[2.0, 2, 4, 4], [2, 2, 4, 4], [1, 1, 5, 5]])
    boxes[0, ::3, 2] = torch.tensor([[0.0, 0, 4, 4], [0, 4, 4, 8]])
    boxes[0, 2, 3] = torch.tensor([0.0, 0, 4, 4])
    made = task_of("detect", data="world").labels({"boxes": boxes})
    assert made["y"][0, :2].tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]] and made["y"][0, 2:].isnan().all()
    # where a box goes is not given away
    assert made["boxes"][0, 2, 0].tolist() == [3, 0, 7, 4] and made["boxes"][:, [0, 1, 3]].isnan().all()


def test_top1_and_top5():
    p = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]] * 3).softmax(1)
    rows = task_of("classify", classes=7).score(p, {"y": torch.tensor([0, 4, 6])})
    assert (rows[:, 0] == rows[:, 1]).tolist() == [True, False, False]
    assert rows[:, 2].tolist() == [1, 1, 0]


def test_boxes_pool_what_they_cover():
    """A box over one patch and half of the next; tokens are their own number."""
    detect = task_of("detect", width=1, grid=(1, 2, 2), size=8)
    z = torch.arange(4.0).view(1, 1, 4, 1)
    y = {"boxes": torch.tensor([[[[0, 0, 6, 4.0]], [[0, 0, 6, 4]]]])}
    out, _ = detect.ask(torch.nn.Identity(), {"video": z}, y)
    assert out.flatten().tolist() == pytest.approx([(0 * 4 + 1 * 2) / 6])


@pytest.mark.parametrize("part", ["place", "visible", "uncertain", "all"])
def test_the_points_loss_is_its_three_parts(part):
    """In float64 numpy: 100 x Huber on places with its corner at 4 pixels of 256, over points that
    are asked for and seen; 0.1 x cross-entropy on "is seen", over all frames of what is asked for;
    0.1 x cross-entropy on "is off by more than 6 pixels", over what is seen."""
    g = torch.Generator().manual_seed(0)
    out = torch.randn(2, 5, 4, 4, generator=g)  # (B,P,T,4)
    place = out[..., :2].sigmoid()
    off = 5 / 256 * torch.randn(2, 5, 4, 2, generator=g)  # about 4 and 6 pixels, the two corners
    seen = torch.rand(2, 5, 4, generator=g) < 0.6
    asked = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    y = {"y": place + off, "seen": seen, "asked": asked}
    if part not in ("place", "all"):
        y["y"] = place.clone()
        y["y"][:, ::2] += 7 / 256 if part == "uncertain" else 0.0
    if part in ("place", "uncertain"):
        out[..., 2] = torch.where(seen, 100.0, -100.0)  # surely right
    distance = (place - y["y"]).double().norm(dim=-1).numpy()
    if part in ("place", "visible"):
        out[..., 3] = torch.where(torch.from_numpy(distance) > 6 / 256, 100.0, -100.0)

    def bce(logit, truth):
        p = 1 / (1 + np.exp(-logit))
        return -np.log(np.where(truth, p, 1 - p)).mean()

    rows = (asked[..., None] & seen).numpy()
    error = (place - y["y"]).double().numpy()[rows]
    corner = 4 / 256
    huber = np.where(abs(error) < corner, error**2 / 2, corner * (abs(error) - corner / 2)).mean()
    logit = out.double().numpy()
    everywhere = np.broadcast_to(asked.numpy()[..., None], seen.shape)
    visible = bce(logit[..., 2][everywhere], seen.numpy()[everywhere])
    uncertain = bce(logit[..., 3][rows], (distance > 6 / 256)[rows])
    want = 100 * huber + 0.1 * visible + 0.1 * uncertain
    assert want > 1e-3 and task_of("points").loss(out, y).item() == pytest.approx(want, rel=1e-4)
    unknown = ~(seen & asked[..., None])  # of these the place does not matter
    y["y"] = y["y"].masked_fill(unknown[..., None], math.nan)
    assert task_of("points").loss(out, y).item() == pytest.approx(want, rel=1e-4)


# --- the recipe of readouts and of fine-tuning ---


class Tokens:
    """Stands for probe.Features: four clips of random pixels, and an encoder of theirs."""

    def __init__(self):
        torch.manual_seed(0)
        self.device, self.want, self.pooled, self.tuned = CPU, (3,), False, None
        self.encoder = M.ViT(width=16, depth=4, heads=2, mlp=32, patch=8, frames=2, size=8)
        self.x = torch.randn(4, 3, 2, 8, 8)
        self.autocast = contextlib.nullcontext

    def batches(self, rows, size=16, turn=0):
        for start in range(0, 4, size):
            part = torch.arange(start, start + size)
            tokens = self.tuned(self.x[part]) if self.tuned else self.x[part, 0, 0]
            yield {"video": tokens}, {"class": part}, part


class Linear(probe.Task):
    """The mean of what Tokens gives -> four classes."""

    def net(self):
        return torch.nn.Linear(16 if self.args.finetune else 8, 4)

    def labels(self, batch):
        return {"y": batch["class"]}

    def ask(self, net, x, y):
        return net(x["video"].mean(1)), y

    def loss(self, out, y):
        return torch.nn.functional.cross_entropy(out, y["y"])


class Enough(Exception):
    """Steps have been watched."""


def learned(monkeypatch, most=math.inf, **flags):
    """probe.fit on Tokens, for at most so many steps -> what was trained, and of each step
    {parameter: rate} and the gradient of the head."""
    args = probe.Args(task="classify", encoder="-", **{"batch_size": 4, "steps": 20} | flags)
    rates, gradients, real = [], [], torch.optim.AdamW.step

    def step(optimizer):
        rates.append({p: g["lr"] for g in optimizer.param_groups for p in g["params"]})
        gradients.append(optimizer.param_groups[0]["params"][0].grad.clone())
        if len(rates) == most:
            raise Enough
        real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tried = [None]
    with contextlib.suppress(Enough):
        tried = probe.fit(Linear(args, 16, 2, (1, 1, 1), 2, 8), Tokens(), np.arange(4), [(1e-2, 1e-4)])
    monkeypatch.undo()
    return tried[0], rates, gradients


def test_a_readout_warms_up_for_a_tenth_of_its_steps(monkeypatch):
    """Linearly to the rate, then down by a cosine; at most 1000 steps, 3000 of fine-tuning."""
    model, rates, _ = learned(monkeypatch, steps=40)
    falling = [0.5 * (1 + math.cos(math.pi * i / 36)) for i in range(36)]
    want = [1e-2 * share for share in (0.25, 0.5, 0.75, 1.0, *falling)]
    assert [rate[model.head.weight] for rate in rates] == pytest.approx(want)
    for finetune, steps, warmup in (("", 40_000, 1000), ("4ds", 20_000, 3000), ("4ds", 80_000, 3000)):
        _, (first,), _ = learned(monkeypatch, most=1, steps=steps, finetune=finetune)
        assert max(first.values()) == pytest.approx(1e-2 / warmup)


def test_layers_of_a_finetuned_encoder_have_their_factors(monkeypatch):
    """V-JEPA: 0.8 for every layer between it and the head, which reads the third block of four."""
    layers = {"norm": 1.0, "patch_embed": 0.8**4}
    layers |= {f"blocks.{i}": factor for i, factor in enumerate((0.8**3, 0.8**2, 0.8, 1.0))}
    for finetune in ("vjepa", "4ds"):
        model, rates, _ = learned(monkeypatch, finetune=finetune)
        top = rates[2]  # the last step of the warm-up
        assert top[model.head.weight] == pytest.approx(1e-2)
        for name, p in model.encoder.named_parameters():
            part = next(part for part in layers if name.startswith(part))
            factor = layers[part] if finetune == "vjepa" else 0.003
            assert top[p] == pytest.approx(1e-2 * factor), name


def test_finetuning_accumulates_the_gradients_of_a_batch(monkeypatch):
    """Four passes of one clip, or one of four: the same gradients, and the same weights."""
    ends, firsts = [], []
    for micro in (1, 4):
        model, _, gradients = learned(monkeypatch, finetune="4ds", micro_batch=micro)
        both = [*model.head.parameters(), *model.encoder.parameters()]
        ends.append(torch.nn.utils.parameters_to_vector(both))
        firsts.append(gradients[0])
    assert torch.allclose(*firsts, atol=1e-6) and firsts[0].abs().max() > 1e-3
    assert (ends[0] - ends[1]).norm() < 1e-4 * ends[0].norm()


# --- V-JEPA's augmentations, protocols, few labels ---


def test_mixed_clips_have_both_classes():
    """Mixup is the weighted mean of two clips, cutmix has a box of the other; the share is what is there of one's
    own, and the loss is weighted by it."""
    side = 16
    for flags, seed in ((dict(mixup=0.8), 0), (dict(cutmix=1.0), 1)):
        video = torch.arange(4, dtype=torch.uint8).mul(50).view(4, 1, 1, 1, 1).expand(4, 2, side, side, 3).clone()
        batch = {"video": video, "ok": torch.tensor([True, True, True, False]), "label": torch.arange(4)}
        other, share = probe.mix(probe.Args("classify", **flags), batch, np.random.default_rng(seed))
        assert (other < 3).all() and 0 < share[0] < 1 and (share == share[0]).all()
        want = share * 50 * torch.arange(4) + (1 - share) * 50 * other
        assert torch.allclose(video.float().mean((1, 2, 3, 4)), want.float(), atol=0.6)
        if "cutmix" in flags:
            assert all({*clip.unique().tolist()} <= {50 * i, 50 * int(other[i])} for i, clip in enumerate(video))
    video = torch.zeros(64, 2, side, side, 3, dtype=torch.uint8)
    batch = {"video": video, "ok": torch.ones(64, dtype=torch.bool), "label": torch.arange(64)}
    _, share = probe.mix(probe.Args("classify", erasing=0.5), batch, np.random.default_rng(0))
    erased = (video > 0).flatten(1).any(1).float().mean()
    assert (share == 1).all() and 0.3 < erased < 0.7 and (video[:, 0] > 0).float().mean() < 0.3
    task = task_of("classify", classes=3, smoothing=0.1)
    out, y = torch.randn(4, 1, 3), {"y": torch.tensor([0, 1, 2, 0]), "other": torch.tensor([1, 1, 0, 2])}
    y["share"] = torch.tensor([1.0, 0.5, 0.25, 0.0])
    p = out[:, 0].log_softmax(1)
    target = y["share"][:, None] * torch.eye(3)[y["y"]] + (1 - y["share"])[:, None] * torch.eye(3)[y["other"]]
    assert task.loss(out, y).item() == pytest.approx(-((0.9 * target + 0.1 / 3) * p).sum(1).mean().item(), rel=1e-5)


def test_stochastic_depth_leaves_out_branches_and_keeps_their_mean():
    encoder = M.ViT(width=16, depth=3, heads=2, mlp=32, patch=8, frames=2, size=8)
    probe.drop_paths(encoder, 0.5)
    x, real = torch.ones(4000, 1, 16), encoder.blocks[1].attn
    branch = torch.nn.Identity()
    branch.register_forward_hook([*real._forward_hooks.values()][0])
    out = branch.train()(x)[:, 0, 0]
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75]) and out.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(branch.eval()(x), x)


@pytest.mark.parametrize("head", ["linear", "attentive2"])
def test_all_of_table_8_trains(head, folder, tmp_path):
    args = arguments(
        "classify", tmp_path / "out", encoder=folder, head=head, finetune="vjepa", drop_path=0.2, mixup=0.8,
        cutmix=1.0, erasing=0.25, head_drop=0.5, smoothing=0.1, grid_lr=(1e-3,), train_passes=2, steps=0, epochs=1,
    )
    (tmp_path / "out").mkdir()
    result, _ = probe.probe(args, CPU)
    assert math.isfinite(result["likelihood"]) and result["steps"] == 3


@pytest.mark.parametrize("finetune", ["", "vjepa"])
def test_the_encoder_is_compiled_where_it_is_asked_for(finetune, folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(M, "compile_blocks", compiled.append)
    args = arguments("classify", tmp_path / "out", encoder=folder, head="linear", steps=1, epochs=1, compile=True)
    (tmp_path / "out").mkdir()
    probe.probe(dataclasses.replace(args, finetune=finetune), CPU)
    assert len(compiled) == (2 if finetune else 1) and all(isinstance(net, M.ViT) for net in compiled)


@pytest.mark.parametrize("name", [*probe.PROTOCOLS])
def test_a_protocol_is_a_row_and_flags_win(name, capsys):
    args = probe.parse_args(["classify", "--encoder", "e", "--protocol", name, "--workers", "3", "--epochs", "7"])
    row = probe.PROTOCOLS[name] | {"epochs": 7, "workers": 3}
    assert {key: getattr(args, key) for key in row} == row
    assert f"--protocol {name}: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        probe.parse_args(["classify", "--protocol", "taste"])
    assert stop.value.code == 2 and "choose from" in capsys.readouterr().err


def test_a_fraction_has_every_class_and_draws_differ(folder, tmp_path):
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    rows = [probe.few(labels, 0.1, seed) for seed in (0, 0, 1)]
    assert np.bincount(labels[rows[0]]).tolist() == [10, 4, 1] and rows[0] == rows[1] != rows[2]
    source = clips(tmp_path, "some", 6, lambda i: {})
    args = arguments(
        "classify", tmp_path / "out", encoder=folder, data="", train=source, val=source, head="ridge", fraction=0.5,
        draws=3, stride=1, grid_lr=(),
    )
    (tmp_path / "out").mkdir()
    result, _ = probe.draws(args, CPU)
    assert result["n_train"] == 4 and len(result["values"]) == 3
    assert result["value"] == pytest.approx(np.mean(result["values"]))


@pytest.mark.parametrize("task", ["pose", "points", "boxes", "depth"])
def test_the_released_readout_runs(task, folder, tmp_path):
    result, _ = probe.probe(arguments(task, tmp_path, encoder=folder, readout="4ds"), CPU)
    assert math.isfinite(result["value"])


def test_the_released_readout_by_hand():
    """One embedding a moment after LN, 16 of them; the projected query is added to."""
    torch.manual_seed(0)
    head = probe.Readout(8, (2, 1, 3), 5, width=8, heads=2, released=True)
    z, q = torch.randn(1, 6, 8), torch.randn(1, 4, 512)
    series = torch.nn.functional.interpolate(
        z.view(1, 1, 2, 24), (16, 24), mode="bicubic", align_corners=False).view(1, 16, 3, 8)
    tokens = torch.nn.functional.layer_norm(series, (8,), eps=1e-6) + head.positions.view(1, 16, 1, 8)
    query = q @ head.project.weight.T + head.project.bias
    k, v = (tokens.flatten(1, 2) @ head.attn.kv.weight.T + head.attn.kv.bias).chunk(2, -1)
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        share = (query[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        parts.append(share @ v[..., part])
    x = query + torch.cat(parts, -1) @ head.attn.proj.weight.T + head.attn.proj.bias
    want = head.linear(x + head.mlp(head.norm2(x)))
    assert (head(z, q) - want).abs().max() < 1e-5
    turns = np.pi * 0.5 * 2.0 ** np.arange(3)
    features = probe.fourier(torch.tensor([0.75]), 3, released=True)
    assert features.tolist() == pytest.approx([*np.sin(turns), *np.cos(turns)], abs=1e-5)


def test_cls_tokens_of_frames_side_by_side(tmp_path):
    torch.manual_seed(0)
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=8, size=32, tubelet=1, images=True, cls=True)
    M.save_encoder(tmp_path / "e.safetensors", encoder, encoder.config | M.IMAGENET | {"model": None, "fps": 0.0})
    found = {}
    for pool in ("cls", "concat"):
        flags = dict(encoder=str(tmp_path / "e.safetensors"), head="linear", pool=pool, stride=4, cache_gb=0)
        args = arguments("classify", tmp_path, **flags)
        train, _ = probe.open_features(args, ["classify"], CPU)
        x, _, _ = next(train.batches(np.arange(4), 4))
        found[pool] = x["video"]
    assert found["concat"].shape == (4, 1, 1, 8 * 32)
    assert torch.allclose(found["concat"].view(4, 8, 32).mean(1), found["cls"][:, 0, 0], atol=1e-6)


def test_a_dry_run_reads_no_video_and_counts(folder, tmp_path, monkeypatch):
    """Encoder FLOPs by the formula; what is stored, passes; then the same with nothing stored."""
    monkeypatch.setattr(D, "eval_batches", None)
    encoder = M.load_encoder(folder)[0]
    flags = dict(encoder=folder, head="attentive4", epochs=4, batch_size=8, grid_lr=(), dry_run=True, tflops=1.0)
    said, _ = probe.dry_run(arguments("classify", tmp_path, **flags), CPU)
    assert said["tflop_a_video"] * 1e12 == pytest.approx(encoder.flops(4 * 16), rel=0.01)
    assert said["passes"] == 24 and said["gb"] == pytest.approx(40 * 64 * 32 * 2 / 1e9)
    assert said["value"] == pytest.approx((said["tflop_encoder"] + said["tflop_heads"]) / 3600)
    anew, _ = probe.dry_run(arguments("classify", tmp_path, **flags, cache_gb=0.0), CPU)
    assert anew["passes"] == 4 * 24 and anew["tflop_heads"] == said["tflop_heads"] > 0
    for task in ("points", "boxes", "detect", "flow", "segment", "all"):
        said, _ = probe.dry_run(arguments(task, tmp_path, **flags), CPU)
        assert said["tflop_heads"] > 0
    with pytest.raises(D.DataError, match="trains no head"):
        probe.dry_run(arguments("physics", tmp_path, **flags), CPU)


# --- tasks ---


@pytest.mark.parametrize("task", [*probe.TASKS])
def test_a_task_runs_and_a_perfect_answer_beats_the_constant(task, folder, tmp_path, monkeypatch):
    kind, perfect = probe.TASKS[task], []
    score = kind.score

    def spy(self, p, y):
        """What the true labels themselves score."""
        truth = y["y"]
        if task in ("segment", "classify"):
            truth = torch.nn.functional.one_hot(truth.clamp(max=p.shape[-1] - 1), p.shape[-1]).float()
        if task == "points":
            truth = torch.cat([truth, y["seen"][..., None].float()], -1)
        perfect[:1] = [self]
        perfect.append(score(self, truth, y).double())
        return score(self, p, y)

    monkeypatch.setattr(kind, "score", spy)
    args = arguments(task, tmp_path, encoder=folder, head="readout")
    result, more = probe.probe(args, CPU)
    best = only(perfect[0].total(torch.cat(perfect[1:])))
    assert best == pytest.approx(1.0 if kind.up else 0.0, abs=1e-5)
    assert abs(best - result["constant"]) > 0.02 and math.isfinite(result["value"]) and result["n_val"] == 16
    json.dumps(result | more, allow_nan=False)


def test_seeds_repeat_and_rates_are_chosen_on_train(folder, tmp_path):
    flags = dict(encoder=folder, grid_lr=(1e-9, 1e-2), steps=20)
    (a, more), (b, _), (c, _) = (
        probe.probe(arguments("boxes", tmp_path, **flags, seed=seed), CPU) for seed in (0, 0, 1)
    )
    assert a == b
    assert a["value"] != c["value"]
    assert a["lr"] == 1e-2
    assert [t["lr"] for t in more["tried"]] == [1e-9, 1e-2]


@pytest.mark.parametrize("task", [name for name, kind in probe.TASKS.items() if kind.at_once])
def test_heads_of_a_grid_are_computed_at_once(task, folder, tmp_path, monkeypatch):
    """The weights that each head has alone, for every task and what it picks at random."""
    args = arguments(task, tmp_path, encoder=folder, head="attentive4", width=16, train_clips=8, batch_size=4, epochs=1)
    train, _ = probe.open_features(args, [task], CPU)
    train = train.of(probe.layers_of(task, args, train.config))
    kind = probe.task_of(args, train)
    probe.learn_labels(kind, train)
    found = []
    for bytes_ in (probe.ACTIVATIONS, 0):
        monkeypatch.setattr(probe, "ACTIVATIONS", bytes_)
        tried = probe.fit(kind, train, np.arange(8), [(1e-2, 0.1), (1e-3, 0.1)])
        found.append(torch.cat([torch.nn.utils.parameters_to_vector(one.head.parameters()) for one in tried]))
    # Adam makes a full step of the sign of gradients that are all but nothing
    assert (found[0] - found[1]).abs().mean() < 1e-6 and (found[0] - found[1]).abs().max() < 1e-3
    assert (found[0] - found[0].roll(len(found[0]) // 2)).abs().mean() > 1e-4


def test_stored_tokens_are_those_computed_anew(folder, tmp_path):
    both = []
    for gb in (50.0, 0.0):
        args = arguments("all", tmp_path, encoder=folder, cache_gb=gb)
        train, _ = probe.open_features(args, ["flow", "stereo"], CPU)
        assert train.kept == (24 if gb else 0)
        both.append(list(train.batches(np.arange(24), 8)))
    for (z, y, rows), (z2, y2, rows2) in zip(*both, strict=True):
        assert np.array_equal(rows, rows2)
        assert {*z} == {"video", "right"}
        assert all(torch.allclose(z[k], z2[k], atol=5e-3) for k in z)
        assert all(torch.equal(y[k].nan_to_num(), y2[k].nan_to_num()) for k in y)
        assert z["video"].shape == (8, 1, 4 * 16, 4 * 32)
        assert (z["video"] - z["right"]).abs().max() > 0.1
    view = train.of((4,))
    assert torch.equal(next(view.batches(np.arange(8), 8))[0]["video"], both[1][0][0]["video"][..., 96:])


@pytest.mark.parametrize("how", ["", "4ds", "vjepa"])
def test_finetuning_moves_the_encoder_and_frozen_does_not(how, folder, tmp_path, monkeypatch):
    tuned, real = [], probe.fit
    monkeypatch.setattr(probe, "fit", lambda *a: (tuned.append((a[1], real(*a))), tuned[-1][1])[1])
    args = arguments("depth", tmp_path / "out", encoder=folder, finetune=how, grid_lr=(1e-2,))
    (tmp_path / "out").mkdir()
    probe.probe(args, CPU)
    if how:  # what was trained is a file, which never takes the place of what was given
        saved, _ = M.load_encoder(tmp_path / "out")
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), tuned[0][1][0].encoder.parameters()))
        probe.probe(args, CPU)  # into the same folder
        for head, encoder in (("head_1", "encoder"), ("head", "encoder_1")):
            about = probe.open_head(str(tmp_path / f"out/{head}.safetensors"), CPU)[2]
            assert Path(about["encoder"]).stem == encoder
            kept, _ = M.load_encoder(about["encoder"])
            assert probe.weights_hash(kept) == about["encoder_hash"]
    (data, (model,)), (before, _) = tuned[0], M.load_encoder(folder)
    same = [torch.equal(a, b) for a, b in zip(data.encoder.parameters(), before.parameters())]
    assert all(same)  # the one that was given is never touched
    if how:
        moved = {
            n: (a - b).abs().max().item()
            for (n, a), (_, b) in zip(model.encoder.named_parameters(), before.named_parameters())
        }
        assert min(moved.values()) > 0
        first, last = (max(v for n, v in moved.items() if n.startswith(f"blocks.{i}.")) for i in (0, 3))
        assert max(moved.values()) < 3e-4 if how == "4ds" else first < 0.75 * last
    else:
        assert model.encoder is None


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_every_head_of_classify_can_be_finetuned(head, folder, tmp_path):
    flags = dict(encoder=folder, head=head, finetune="4ds", train_clips=12, val_clips=8)
    (tmp_path / "out").mkdir()
    result, _ = probe.probe(arguments("classify", tmp_path / "out", **flags), CPU)
    assert result["finetune"] == "4ds" and 0 <= result["value"] <= 1


def test_each_pair_is_finetuned_from_the_given_encoder(folder, tmp_path):
    """The head of the second is standardised by the given encoder's features, too."""
    args = arguments("classify", tmp_path, encoder=folder, head="linear", finetune="4ds", train_clips=8, grid_lr=(0.5,))
    train, _ = probe.open_features(args, ["classify"], CPU)
    kind = probe.task_of(args, train)
    kind.classes = 8
    tried = probe.fit(kind, train, np.arange(8), [(0.5, 0.0), (0.5, 0.0)])
    assert torch.equal(tried[0].head.mean, tried[1].head.mean) and not tried[1].head.mean.requires_grad


def test_image_encoders_have_a_moment_a_frame(tmp_path):
    torch.manual_seed(0)
    encoder = M.ViT(
        width=32, depth=2, heads=2, mlp=64, patch=8, tubelet=1, frames=8, size=32, pos="learned", images=True,
        cls=True,
    )
    M.save_encoder(tmp_path / "e.safetensors", encoder, encoder.config | M.IMAGENET | {"model": None})
    args = arguments("flow", tmp_path, encoder=str(tmp_path / "e.safetensors"))
    train, _ = probe.open_features(args, ["flow"], CPU)
    quarters = probe.layers_of("flow", args, train.config)
    z, y, _ = next(train.of(quarters).batches(np.arange(2), 2))
    assert (quarters, train.layers, train.grid) == ((1, 1, 2, 2), (1, 2), (8, 4, 4))
    assert z["video"].shape == (2, 1, 8 * 16, 4 * 32)
    result, _ = probe.probe(arguments("flow", tmp_path, encoder=str(tmp_path / "e.safetensors")), CPU)
    assert math.isfinite(result["value"])


@pytest.mark.parametrize(
    "flags",
    [
        dict(encoder="pixels:diff"), dict(layer=99), dict(frames=7), dict(size=36),
        dict(encoder="random:vit_n", task="physics"), dict(task="all", tasks=("taste",)),
        dict(task="classify", finetune="4ds", head="knn"), dict(task="depth", train="x"), dict(width=12),
        dict(task="flow", finetune="4ds", mixup=0.8), dict(task="classify", cutmix=1.0),
        dict(task="features", frames=7, out="f.npz"), dict(encoder=""),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        probe.main(dataclasses.replace(arguments("depth", tmp_path / "out", encoder=folder), **flags))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told


def clips(tmp_path, name, count, labels, junk=0):
    """A list of grey videos of 8 frames, of which the last `junk` are no videos; labels(i): the arrays beside the
    i-th."""
    if not shutil.which("ffmpeg"):
        pytest.skip("FFmpeg is not installed: apt-get install -y ffmpeg")
    folder, rows = tmp_path / name, []
    folder.mkdir()
    for i in range(count):
        if i < count - junk:
            subprocess.run(
                [
                    "ffmpeg", "-v", "error", "-f", "lavfi", "-i",
                    f"color=gray:size=32x32:rate=8:duration=1,noise=alls={20 * i}", folder / f"{i}.mp4",
                ],
                check=True,
            )
        else:
            (folder / f"{i}.mp4").write_text("no video")
        save_file({k: torch.as_tensor(v) for k, v in labels(i).items()}, folder / f"{i}.safetensors")
        rows.append(f"{i}.mp4 {i % 2}")
    (folder / "list.txt").write_text("\n".join(rows) + "\n")
    return str(folder / "list.txt")


def test_lists_that_do_not_fit_end_in_one_line(folder, tmp_path, capsys):
    """Classes that train lacks, labels that nobody has; and what cannot be read counts as wrong."""
    mask = lambda top: (
        lambda i: {
            "masks": torch.full((8, 32, 32), min(i, top), dtype=torch.uint8),
            "boxes": torch.full((8, 1, 4), math.nan),
        }
    )
    few = clips(tmp_path, "few", 4, mask(1))
    many = clips(tmp_path, "many", 4, mask(3))
    bad = clips(tmp_path, "bad", 4, mask(1), junk=2)
    args = lambda task, train, val, **more: arguments(
        task, tmp_path / "out", encoder=folder, data="", train=train, val=val, batch_size=2, stride=1, **more
    )

    def told(args):
        with pytest.raises(SystemExit) as stop:
            probe.main(args)
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
        assert stop.value.code == 2 and len(err) == 1, err
        return err[0]

    assert "--classes 4" in told(args("segment", few, many))
    assert "--classes 4" in told(args("segment", many, many, classes=2))
    assert "have no labels for boxes" in told(args("boxes", few, few))
    assert "no label 'depth'" in told(args("depth", few, few))
    result, _ = probe.probe(args("classify", few, bad, head="readout"), CPU)
    # two of four cannot be read
    assert result["value"] <= 0.5 and result["n_val"] == 4
    (tmp_path / "few/three.txt").write_text("0.mp4 0\n1.mp4 2\n")
    assert "label 2 is not in --train" in told(args("classify", few, str(tmp_path / "few/three.txt"), head="readout"))


# --- what was trained can be used ---


def predicted(args, folder, out, **flags):
    """The arrays of `predict` with the head that args saved, on the world's val clips."""
    flags = dict(encoder="", data="world", val_clips=16, workers=0, out_dir=str(folder), out=str(out)) | flags
    result, _ = probe.predict(probe.Args("predict", head=str(folder / "head.safetensors"), **flags), CPU)
    assert result["value"] == 16 and result["bad"] == 0
    return np.load(out) if out.suffix == ".npz" else list(csv.reader(out.open()))


@pytest.mark.parametrize("task", [*probe.TASKS])
def test_a_saved_head_predicts_what_was_evaluated(task, folder, tmp_path, monkeypatch):
    """Bit for bit, and so the metric is the same."""
    said, real = [], probe.evaluate_heads

    def evaluate_heads(task, features, rows, tried):
        task.answer = lambda out, real=task.answer: (said.append(real(out)), said[-1])[1]
        return real_(task, features, rows, tried)

    real_ = real
    monkeypatch.setattr(probe, "evaluate_heads", evaluate_heads)
    args = arguments(task, tmp_path, encoder=folder, head="readout", cache_gb=0)
    result, _ = probe.probe(args, CPU)
    monkeypatch.undo()
    found = predicted(args, tmp_path, tmp_path / "p.npz")
    want = torch.cat(said).numpy()
    assert np.array_equal(found["values"], want, equal_nan=True) and len(found["path"]) == 16
    if task == "classify":
        labels = D.parse_list("world", "rooms_val").labels[:16]
        assert (found["values"].argmax(1) == labels).mean() == result["value"]
        assert [D.MOTIONS.index(name) for name in found["class"]] == found["values"].argmax(1).tolist()


@pytest.mark.parametrize("head", ["attentive", "linear", "ridge", "knn"])
def test_heads_of_classify_are_saved(head, folder, tmp_path):
    flags = dict(encoder=folder, head=head, grid_wd=(0.1,), epochs=1, cache_gb=0)
    result, _ = probe.probe(arguments("classify", tmp_path, **flags), CPU)
    heading, *rows = predicted(None, tmp_path, tmp_path / "p.csv")
    assert heading == ["path", "class", *D.MOTIONS]
    labels = D.parse_list("world", "val").labels[:16]
    assert np.mean([row[1] == D.MOTIONS[label] for row, label in zip(rows, labels)]) == result["value"]
    torch.manual_seed(1)
    other = M.ViT(width=32, depth=4, heads=2, mlp=64, patch=8, frames=8, size=32)
    M.save_encoder(tmp_path / "o.safetensors", other, other.config | M.IMAGENET | {"stride": 4, "fps": 0.0})
    with pytest.raises(D.DataError, match="not the weights"):
        predicted(None, tmp_path, tmp_path / "p.csv", encoder=str(tmp_path / "o.safetensors"))
    with pytest.raises(D.DataError, match="ends in .csv, .npz"):
        predicted(None, tmp_path, tmp_path / "p.txt")
    with pytest.raises(D.DataError, match="not a head"):
        probe.open_head(tmp_path / "o.safetensors", CPU)


def test_a_head_takes_no_other_heads_place(folder, tmp_path, capsys):
    """The newest is head.safetensors; those that were there go on as head_1, head_2, and a line says so."""
    for task, wd in (("classify", 0.1), ("classify", 1.0), ("pose", 0.1)):
        probe.probe(arguments(task, tmp_path, encoder=folder, head="ridge", grid_wd=(wd,), steps=1), CPU)
    about = {path.name: probe.open_head(path, CPU)[2] for path in tmp_path.glob("head*.safetensors")}
    found = {name: (saved["task"], *saved["args"]["grid_wd"]) for name, saved in about.items()}
    assert found == {
        "head_1.safetensors": ("classify", 0.1), "head_2.safetensors": ("classify", 1.0),
        "head.safetensors": ("pose", 0.1),
    }
    assert "the head that was there is head_2.safetensors now" in capsys.readouterr().err


def test_a_saved_head_knows_the_attention_heads_of_its_encoder(folder, tmp_path, monkeypatch):
    """--heads, which the hash of the weights does not show."""
    asked, real = [], M.load_encoder
    monkeypatch.setattr(M, "load_encoder", lambda name, **how: (asked.append(how), real(folder))[1])
    probe.probe(arguments("classify", tmp_path, encoder="vit.pt", head="ridge", heads=4), CPU)
    predicted(None, tmp_path, tmp_path / "p.csv")
    assert asked == [{"heads": 4, "seed": 0}] * 2


def test_features_of_own_videos(folder, tmp_path, monkeypatch, with_pictures):
    """A damaged file is named and left out; windows; what is done is not done again; a broken-off
    run goes on."""
    source = clips(tmp_path, "own", 6, lambda i: {}, junk=1)
    args = probe.Args(
        "features", encoder=folder, data=source, workers=0, stride=1, out_dir=str(tmp_path),
        out=str(tmp_path / "f.npz"),
    )
    result, more = probe.export_features(args, CPU)
    found = np.load(tmp_path / "f.npz")
    assert (result["value"], result["bad"]) == (5, 1) and list(more["bad_videos"]) == [str(tmp_path / "own/5.mp4")]
    assert [Path(path).name for path in found["path"]] == [f"{i}.mp4" for i in range(5)]
    encoder, config = M.load_encoder(folder)
    batch = next(iter(D.eval_batches(D.parse_list(source), D.Clip(8, 1, size=32, train=False), batch_size=5)))
    want = encoder(D.prepare(batch)).mean(1).detach().numpy()
    assert np.abs(found["values"] - want).max() < 1e-5
    assert Path(result["picture"]).read_bytes()[:4] == b"\x89PNG"
    for name, change in (("f.safetensors", {}), ("f.csv", dict(frames=4, windows=0.5)), ("t.npz", dict(tokens=True))):
        out = str(tmp_path / name)
        result, _ = probe.export_features(dataclasses.replace(args, out=out, **change), CPU)
        assert result["value"] == 5
    assert load_file(tmp_path / "f.safetensors")["values"].numpy() == pytest.approx(found["values"])
    rows = list(csv.reader((tmp_path / "f.csv").open()))
    assert rows[0][:3] == ["path", "window", "0"] and len(rows) == 11
    assert [row[1] for row in rows[1:5]] == ["0", "1", "0", "1"] and rows[1][2:] != rows[3][2:]
    assert np.load(tmp_path / "t.npz")["values"].shape == (5, 64, 32)
    # all of those with three windows are damaged
    monkeypatch.setattr(probe, "parts_of", lambda *args: {1: [0, 1], 3: [5]})
    result, _ = probe.export_features(dataclasses.replace(args, windows=1.0), CPU)
    assert (result["value"], result["bad"]) == (2, 1)


# --- real video ---


def davis(video_data, tmp_path):
    """The 20 sequences with their masks -> lists of 15 and 5 of them."""
    folder, names = video_data / "dense/davis16-val", []
    for video in sorted((folder / "videos").glob("*.mp4")):
        packed = np.load(folder / f"{video.stem}.masks.npz")
        masks = np.unpackbits(packed["bits"], axis=-1)[..., : packed["shape"][2]]
        (tmp_path / video.name).symlink_to(video)
        save_file({"masks": torch.from_numpy(masks.copy())}, tmp_path / f"{video.stem}.safetensors")
        names.append(video.name)
    assert len(names) == 20
    (tmp_path / "train.txt").write_text("\n".join(n for i, n in enumerate(names) if i % 4))
    (tmp_path / "val.txt").write_text("\n".join(names[::4]))
    return dict(data="", train=str(tmp_path / "train.txt"), val=str(tmp_path / "val.txt"))


def test_real_masks_through_the_segment_readout(video_data, folder, tmp_path):
    """DAVIS, split by sequence. Nothing is learned in three steps: that all works, and what the constant scores."""
    args = arguments(
        "segment", tmp_path / "out", encoder=folder, stride=2, crop=True, **davis(video_data, tmp_path)
    )
    result, more = probe.probe(args, CPU)
    # of the foreground, in the clips of val: the constant answer is "background"
    share = []
    clip = D.Clip(8, 2, size=32, train=False)
    for batch in P.dense_batches(D.parse_list(args.val), clip, ("masks",), batch_size=5):
        share += [(batch["masks"] == 1).float().mean().item()]
    assert (result["n_train"], result["n_val"], more["bad_videos"]) == (15, 5, {})
    assert result["constant"] == pytest.approx((1 - np.mean(share)) / 2, abs=1e-4)
    assert more["constants"]["macc"] == 0.5 and 0 <= result["value"] <= 1


def test_real_flow_and_stereo_through_the_metrics(video_data, folder, tmp_path):
    """KITTI's pair and Middlebury's motorcycle: the truth scores 0, "nothing moves" its mean length; and the tasks
    run on them."""
    dense = video_data / "dense"
    put = lambda path, file: (path.parent.mkdir(parents=True, exist_ok=True), path.write_bytes(file.read_bytes()))
    for name, place in (
        ("kitti_frame1", "image_2/000000_10"),
        ("kitti_frame2", "image_2/000000_11"),
        ("kitti_flow_gt", "flow_occ/000000_10"),
    ):
        put(tmp_path / f"kitti/training/{place}.png", dense / f"flow/{name}.png")
    for name, place in (("left", "im0"), ("right", "im1")):
        put(tmp_path / f"middlebury/motorcycle/{place}.png", dense / f"stereo/motorcycle_{name}.png")
    disparity = np.load(dense / "stereo/motorcycle_disp.npz")["arr_0"]
    (tmp_path / "middlebury/motorcycle/disp0.pfm").write_bytes(
        b"Pf\n%d %d\n-1.0\n" % disparity.shape[::-1] + disparity[::-1].astype("<f4").tobytes()
    )
    for task, layout, names in (("flow", "kitti", ("flow",)), ("stereo", "middlebury", ("disparity",))):
        file = str(tmp_path / f"{layout}.txt")
        D.index(layout, str(tmp_path / layout), file)
        kind = task_of(task, width=32, size=256)
        (batch,) = P.dense_batches(D.parse_list(file), D.Clip(2, 1, size=256, train=False), names, batch_size=1)
        y = kind.labels(batch)
        score = lambda p: only(kind.total(kind.score(p, y).double()))
        length = batch[names[0]].norm(dim=-1) if task == "flow" else batch[names[0]].abs()
        assert score(y["y"].nan_to_num()) == 0
        assert score(torch.zeros_like(y["y"])) == pytest.approx(length.nanmean().item(), rel=1e-4)
        assert length.nanmean() > 1
        args = arguments(task, tmp_path / "out", encoder=folder, data="", train=file, val=file, frames=2)
        result, _ = probe.probe(args, CPU)
        assert math.isfinite(result["value"]) and result["n_val"] == 1
        # in the data set's own pixels: the constant is the mean length of its own labels' deviations
        whole = load_file(Path(D.parse_list(file).paths[0]).with_suffix(".safetensors"))[names[0]]
        constant, _ = probe.learn_labels(*opened(args))
        y = {"y": whole}
        fixed = constant(y) * min(whole.shape[1:3]) * 7 / 8 / args.size
        far = (fixed - whole).norm(dim=-1) if task == "flow" else (fixed - whole).abs()
        assert result["constant"] == pytest.approx(far.nanmean().item(), rel=0.01)


def opened(args):
    train, _ = probe.open_features(args, [args.task], CPU)
    train = train.of(probe.layers_of(args.task, args, train.config))
    return probe.task_of(args, train), train


def test_a_head_that_diverged_scores_worse_than_a_constant():
    """NaN is no class, and not the first; an answer that is not finite is not left out where the truth is known."""
    task = task_of("classify", classes=3)
    p = task.answer(torch.full((4, 1, 3), math.nan))
    total = task.total(task.score(p, {"y": torch.tensor([0, 0, 0, 1])}).double())
    assert total["top1"] == total["top5"] == 0 and total["likelihood"] == pytest.approx(math.log(1e-9))
    flow = task_of("flow")
    p = torch.zeros(1, 1, 2, 2, 2)
    p[..., 0, 0, :] = math.inf
    assert not math.isfinite(only(flow.total(flow.score(p, {"y": torch.zeros_like(p)}).double())))
    unknown = torch.zeros_like(p)
    unknown[..., 0, 0, 1] = math.nan
    assert only(flow.total(flow.score(p, {"y": unknown}).double())) == 0


def test_classify_of_the_suite_reads_the_same_clips_alone(folder):
    args = arguments("all", "", segments=2)
    alone, beside = (probe.clip_of(args, {"fps": 5.0}, tasks) for tasks in (["classify"], ["classify", "pose"]))
    assert alone == beside and not alone.fps and alone.segments == 1


def test_draws_are_averaged(folder, tmp_path):
    flags = dict(encoder=folder, head="linear", epochs=1, grid_wd=(0.0,))
    args = arguments("classify", tmp_path, **flags)
    each = [probe.draws(dataclasses.replace(args, seed=seed), CPU)[0] for seed in range(2)]
    both, _ = probe.draws(dataclasses.replace(args, draws=2), CPU)
    for name in ("value", "top5", "likelihood", "constant"):
        assert both[name] == pytest.approx(np.mean([one[name] for one in each]))
    result, _ = probe.draws(arguments("pose", tmp_path, encoder=folder, draws=2), CPU)
    assert len(result["values"]) == 2


@pytest.mark.parametrize("task", ["depth", "segment", "flow", "stereo"])
def test_tiles_of_whole_frames_are_put_together(task, folder, tmp_path, monkeypatch):
    """An answer that is the truth under each tile scores as the truth of the whole frame, in its own pixels; the
    constant is that of whole frames too."""
    args = arguments(task, tmp_path, encoder=folder, world_size=50, tile=32, val_clips=3, cache_gb=0)
    train, val = probe.open_features(args, [task], CPU)
    view = val.of(probe.layers_of(task, args, val.config))
    kind = probe.task_of(args, view)
    constant, _ = probe.learn_labels(kind, train)
    assert probe.whole_clip(kind, view, 0)[2] == (50, 50)  # the world is not cropped in training, so no tile is
    made = D.World("rooms_val", frames=8, size=50).render([0, 1, 2], kind.names)
    corners = itertools.cycle(itertools.product(probe.starts(50, 32), probe.starts(50, 32)))
    assert probe.starts(50, 32) == [0, 9, 18] and probe.starts(32, 32) == [0]
    row = iter(np.repeat(range(3), 9))

    def reader(task, features, head):
        def answer(x, y):
            top, left = next(corners)
            i = next(row)
            y = kind.labels({name: value[i : i + 1] for name, value in made.items()})["y"]
            axis = -3 if task.channels == 2 else -2
            y = y.narrow(axis, top, 32).narrow(axis + 1, left, 32)
            return torch.nn.functional.one_hot(y, 4).float() * 99 if task.args.task == "segment" else y
        return answer

    monkeypatch.setattr(probe, "reader", reader)
    scored, base = probe.evaluate_whole(kind, view, np.arange(3), None, constant)
    assert only(kind.total(scored)) == pytest.approx(1.0 if kind.up else 0.0, abs=1e-5)
    y = kind.labels(made)
    whole = kind.score(constant(y), y).double().sum(0)
    assert torch.allclose(base.sum(0), whole)


def test_whole_frames_of_pixels_that_are_not_square(folder, tmp_path, monkeypatch):
    """Tiles are squares as they are shown, so not in stored pixels, where flow is measured: 32 x 48 pixels of 3:2. The
    first video is damaged; the header of the others is found to lie."""
    if not shutil.which("ffmpeg"):
        pytest.skip("FFmpeg is not installed: apt-get install -y ffmpeg")
    source = "color=gray:size=32x48:rate=8:duration=1,setsar=3/2"
    for i in range(4):
        subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, tmp_path / f"{i}.mp4"], check=True)
        flow = torch.tensor([2.0 + i, 3.0 - i]).expand(7, 48, 32, 2)
        save_file({"flow": flow.contiguous()}, tmp_path / f"{i}.safetensors")
    (tmp_path / "0.mp4").write_text("no video")
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.mp4" for i in range(4)))
    source = str(tmp_path / "list.txt")
    args = arguments("flow", tmp_path, encoder=folder, data="", train=source, val=source, grid_lr=(1e-3,), width=8)
    tiles, cut = [], D.crop_resize
    monkeypatch.setattr(D, "crop_resize", lambda x, box, size: (tiles.append(box), cut(x, box, size))[1])
    again, read = set(), D.Video.by_number

    def by_number(video, ids):
        if video.path not in again and len(tiles) > 20:
            again.add(video.path)
            raise D.Recount
        return read(video, ids)

    monkeypatch.setattr(D.Video, "by_number", by_number)
    real = probe.evaluate_whole

    def evaluate_whole(task, features, rows, head, constant):
        del tiles[:]
        perfect = torch.tensor([3 * 32 / 28, 2 * 32 / 42])  # of the second video, in pixels of what the head sees
        answer = lambda x, y: perfect.expand(1, 4, 2, 32, 32, 2)
        monkeypatch.setattr(probe, "reader", lambda *args: answer)
        return real(task, features, np.array([0, 1]), head, constant)

    monkeypatch.setattr(probe, "evaluate_whole", evaluate_whole)
    result, _ = probe.probe(args, CPU)
    assert {box[2:] for box in tiles} == {(42, 28)} and result["bad"] == 1
    assert result["value"] == pytest.approx(0, abs=1e-4)
    # the median of the labels
    assert result["constant"] == pytest.approx(math.sqrt(2), rel=1e-3)


# --- the whole suite, and physics on a run's folder ---


def test_all_makes_one_table_and_one_picture(folder, tmp_path, capsys, monkeypatch, with_pictures):
    passes, real = [], probe.Features.store
    monkeypatch.setattr(
        probe.Features, "store", lambda self, *a: (passes.append((self.source.split, *self.keys)), real(self, *a))
    )
    probe.main(
        arguments("all", tmp_path, encoder=folder, seeds=(0, 1), steps=2, tasks=("pose", "flow", "stereo", "physics"))
    )
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    # train and val: once for all tasks and seeds
    assert passes == [("rooms", "video", "right"), ("rooms_val", "video", "right")]
    assert "physics is left out" in shown.err
    assert {*result["tasks"]} == {"pose", "flow", "stereo"}
    assert result["seeds"] == [0, 1]
    table = json.loads((tmp_path / "all.json").read_text())["table"]
    assert [len(r["values"]) for r in table] == [2, 2, 2] and all(r["std"] > 0 for r in table)
    assert table[0]["value"] == pytest.approx(np.mean(table[0]["values"]))
    assert (tmp_path / "all.md").read_text().count("\n") == 7
    assert all(len(row["skills"]) == 2 for row in table)
    for name in ("pose", "flow", "stereo", "radar"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("flags, opened", [({}, [0]), (dict(fraction=0.5), [0, 1]), (dict(train_passes=2), [0, 1])])
def test_seeds_share_tokens_unless_they_draw_other_clips(flags, opened, tmp_path, monkeypatch):
    seeds, shelf = [], {}
    monkeypatch.setattr(probe, "open_features", lambda args, *more: (seeds.append(args.seed), None))
    for seed, task in itertools.product((0, 1), ("pose", "depth")):
        args = arguments(task, tmp_path, encoder="e", seed=seed, **flags)
        probe.shared(args, ("pose", "depth"), shelf, CPU)
    assert seeds == opened


def test_every_task_has_a_picture(folder, tmp_path, with_pictures):
    """Of labels and random answers, with what is not known in them."""
    for name in probe.TASKS:
        args = arguments(name, tmp_path, encoder=folder, head="readout", steps=1, train_clips=8, val_clips=4)
        result, _ = probe.probe(args, CPU)
        assert Path(result["picture"]).stat().st_size > 5000, name


def test_a_task_that_marks_nothing_has_a_picture_too(folder, tmp_path, monkeypatch, with_pictures):
    monkeypatch.setitem(probe.TASKS, "turn", type("Turn", (probe.Pose,), {}))
    args = arguments("turn", tmp_path, encoder=folder, steps=1, train_clips=8, val_clips=4)
    result, _ = probe.probe(args, CPU)
    assert Path(result["picture"]).stat().st_size > 5000


def test_pairs_differ_only_where_they_should():
    """Not before the law breaks, half-way; and then in the thing's neighbourhood only, never in most of the picture."""
    made = D.World("val").render(range(24), ("impossible", "change"))
    differ = (made["video"] != made["impossible"]).any(-1)
    assert not differ[:, :4].any() and (made["change"] >= 4).all() and differ[:, 4:].flatten(1).any(1).all()
    assert differ[:, 4:].float().mean((1, 2, 3)).max() < 0.3


@pytest.mark.parametrize("script", ["train_vjepa", "train_salt", "train_tdv", "train_mae4d"])
def test_physics_reads_the_folder_of_every_script(script, run, tmp_path, capsys):
    status, _, err = run(
        f"{script}.py", "--preset", "laptop", "--steps", "2", "--batch_size", "4", "--probe_every", "0",
        "--save_every", "2", "--workers", "0", "--out_dir", tmp_path / "run", "--probe_data",
    )
    assert status == 0, err
    args = probe.Args(
        task="physics", encoder=str(tmp_path / "run"), data="world", val_clips=24, workers=0, out_dir=str(tmp_path)
    )
    result, more = probe.physics(args, CPU)
    pairs = np.array(more["pairs"])
    assert result["value"] == pytest.approx(((pairs[:, 1] > pairs[:, 0]) + 0.5 * (pairs[:, 1] == pairs[:, 0])).mean())
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(result["kinds"]) == len(D.IMPOSSIBLE)
    again, _ = probe.physics(dataclasses.replace(args, encoder=f"random:{tmp_path / 'run'}", seed=3), CPU)
    assert again["surprise"] != result["surprise"]
    if script == "train_vjepa":  # one pair has no standard error
        probe.main(dataclasses.replace(args, val_clips=1))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] is None


def test_physics_of_files_goes_on_past_a_damaged_first_video(tmp_path, monkeypatch):
    """Clips are as long as the first video that can be opened; where none can, one line says so."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    listed = Path(clips(tmp_path, "pairs", 3, lambda i: {"impossible": pictures, "kind": i, "change": 4}, junk=1))
    listed.write_text("2.mp4\n0.mp4\n1.mp4\n")
    about = dict(frames=4, stride=1, size=32, **M.IMAGENET)
    monkeypatch.setattr(probe, "forecaster", lambda *args: (lambda x, seen: x[:, :, seen:].std((1, 2, 3, 4)), about))
    args = arguments("physics", tmp_path / "out", frames=0, train=str(listed), val=str(listed), data="")
    for many in (8, 1):  # the damaged one among others, and alone
        result, _ = probe.physics(dataclasses.replace(args, micro_batch=many), CPU)
        assert (result["n_val"], result["bad"], result["windows"]) == (2, 1, 3)
    listed.write_text("2.mp4\n")
    with pytest.raises(D.DataError, match="no video can be read"):
        probe.physics(args, CPU)
