"""probe.py: heads against hand counts and float64, the grid, the choice of a head, metrics, the feature store, and
the script as a process."""

import contextlib
import json
import math
import os
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
import model as M
import train_tdv as T
import probe

torch.set_num_threads(1)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("no_pictures")


def arguments(**flags):
    return probe.Args(task="classify", **flags)


class Fixed:
    """Stands for probe.Features: an array (n, views, tokens, D) of which some rows cannot be read."""

    def __init__(self, x, labels, bad=(), names=None):
        self.x = x.float()
        self.labels = torch.from_numpy(labels)
        self.ok = np.ones(len(x), bool)
        self.device = CPU
        self.pooled = x.shape[2] == 1
        self.ok[list(bad)] = False
        self.args = arguments(encoder="-")
        self.source = D.Source("-", names or [f"v{i}" for i in range(len(x))], labels)
        self.autocast = contextlib.nullcontext

    def batches(self, rows, size=16, turn=0):
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            part = part[self.ok[part]]
            yield {"video": self.x[part]}, {"class": self.labels[part]}, part


def task_of(args, width, classes, heads=2):
    return probe.Classify(args, width, heads, (1, 1, 1), 1, 1, classes)


def accuracy_of(task, head, features):
    (rows,), _ = probe.evaluate(
        task, features, np.arange(len(features.x)), [probe.reader(task, features, head)]
    )
    return task.total(rows), probe.confusion_of(rows, task.classes)


def separable(n, classes, tokens=5, width=16, seed=0, noise=0.3):
    """Features whose token 2 carries the class, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = np.arange(n) % classes
    x = noise * torch.randn(n, 1, tokens, width, generator=g)
    x[:, 0, 2] += 3 * torch.eye(classes, width)[torch.from_numpy(labels)]
    return x, labels


# --- heads ---


@pytest.mark.parametrize("width, classes, heads", [(32, 5, 4), (48, 7, 16)])
def test_head_shapes_and_parameter_counts(width, classes, heads):
    block = 12 * width**2 + 13 * width  # qkv, proj, two MLP layers, two norms
    # query, norms, q and v, k without bias, MLP
    pool = width + 2 * 2 * width + 2 * (width**2 + width) + width**2 + 8 * width**2 + 5 * width
    linear = classes * width + classes
    for depth in (0, 3):
        head = probe.Attentive(width, classes, heads, depth)
        assert head(torch.randn(3, 11, width)).shape == (3, classes)
        assert sum(p.numel() for p in head.parameters()) == depth * block + pool + linear
    x, y = torch.randn(20, width), torch.arange(20) % classes
    for kind in (probe.Standardised, probe.Ridge):
        head = kind(width, classes)
        head.start(x, y, 0.1)
        assert head(x[:, None]).shape == (20, classes) and sum(p.numel() for p in head.parameters()) == linear
    head = probe.Neighbours(width, classes)
    head.start(x, y, 0.0)
    assert head(x[:, None]).shape == (20, classes) and not list(head.parameters())


def test_ridge_is_the_normal_equations():
    """In float64 numpy, on standardised features and centred one-hot classes."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 50), torch.arange(30) % 3
    head = probe.Ridge(50, 3)
    head.start(x, y, 0.1)
    z = (x.double().numpy() - x.double().numpy().mean(0)) / (x.double().std(0).numpy() + 1e-6)
    target = np.eye(3)[y.numpy()] - 1 / 3
    weight = np.linalg.solve(z.T @ z + 0.1 * 30 * np.eye(50), z.T @ target)
    assert np.abs(head(x[:, None]).detach().numpy() - (z @ weight + 1 / 3)).max() < 1e-5


def test_attentive_pooling_equals_numpy():
    """Independent and in the usual order: keys and values of all tokens first, in float64."""
    torch.manual_seed(0)
    B, N, D_, heads = 3, 7, 24, 4
    head = probe.Attentive(D_, 5, heads, 0).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(B, N, D_, dtype=torch.float64)
    w = {k: v.detach().numpy() for k, v in head.state_dict().items()}

    def norm(v, name):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * w[name + ".weight"] + w[name + ".bias"]

    t = norm(x.numpy(), "norm1")
    q, k, v = w["q.weight"] @ w["query"] + w["q.bias"], t @ w["k"].T, t @ w["v.weight"].T + w["v.bias"]
    pooled = np.zeros((B, D_))
    for h in range(heads):
        part = slice(h * D_ // heads, (h + 1) * D_ // heads)
        a = np.exp(k[:, :, part] @ q[part] / np.sqrt(D_ / heads))
        a /= a.sum(1, keepdims=True)
        pooled[:, part] = np.einsum("bn,bnd->bd", a, v[:, :, part])
    z = w["query"] + pooled
    hidden = norm(z, "norm2") @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    z = z + gelu @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    want = z @ w["linear.weight"].T + w["linear.bias"]
    assert np.abs(head(x).detach().numpy() - want).max() < 1e-10


def test_neighbours_agree_with_the_online_probe():
    torch.manual_seed(0)
    x, xv, y = torch.randn(200, 8), torch.randn(50, 8), torch.randint(0, 6, (200,))
    head = probe.Neighbours(8, 6)
    head.start(x, y, 0.0)
    votes = head(xv[:, None]).exp()
    assert torch.equal(votes.argmax(1), T.knn_probe(x, y, xv))
    assert torch.allclose(votes.sum(1), torch.ones(50).double())


# --- the grid and the choice ---


def test_grid_at_once_equals_each_head_alone():
    x, labels = separable(60, 3)
    features, grid = Fixed(x, labels), [(1e-2, 0.01), (3e-3, 0.4), (1e-4, 0.8)]
    task = task_of(arguments(encoder="-", epochs=3, batch_size=16), 16, 3)

    def trained(pairs):
        tried = probe.fit(task, features, np.arange(60), pairs)
        for p in tried[0].head.parameters():  # no part of what holds all heads
            assert p.untyped_storage().nbytes() == p.nbytes
        return [torch.nn.utils.parameters_to_vector(one.head.parameters()) for one in tried]

    together = trained(grid)
    for pair, want in zip(grid, together):
        assert (trained([pair])[0] - want).abs().max() < 1e-6
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_learning_rate_decays_without_warm_up(monkeypatch):
    seen, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), real(self, *a))[1]
    )
    # four batches an epoch, the last one short
    x, labels = separable(31, 2)
    task = task_of(arguments(epochs=2, batch_size=8), 16, 2)
    probe.fit(task, Fixed(x, labels), np.arange(31), [(0.5, 0.0)])
    assert seen == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_batch_of_which_nothing_can_be_read_is_no_step(heads):
    x, labels = separable(5, 2)
    x = x[:, :, 2:3]
    task = task_of(arguments(batch_size=1, epochs=2, head="linear"), 16, 2)
    tried = probe.fit(task, Fixed(x, labels, bad=[4]), np.arange(5), [(1e-2, 0.1), (1e-3, 0.1)][:heads])
    assert len(tried) == heads and all(p.isfinite().all() for one in tried for p in one.head.parameters())


def test_accumulated_gradients_are_the_batchs():
    x, labels = separable(60, 3)
    trained = []
    # 5 does not divide 32: one video at a time
    for micro in (32, 8, 5):
        task = task_of(arguments(epochs=2, batch_size=32, micro_batch=micro), 16, 3)
        (one,) = probe.fit(task, Fixed(x, labels), np.arange(60), [(1e-3, 0.1)])
        trained.append(torch.nn.utils.parameters_to_vector(one.head.parameters()))
    assert max((t - trained[0]).abs().max() for t in trained) < 1e-5


@pytest.mark.parametrize("head", ["attentive", "attentive4", "linear", "ridge", "knn"])
def test_separable_features_are_learned_and_shuffled_labels_are_not(head):
    x, labels = separable(240, 4)
    xv, labels_v = separable(200, 4, seed=1)
    if head in probe.POOLED:
        x, xv = x.mean(2, keepdim=True), xv.mean(2, keepdim=True)
    args = arguments(
        head=head, epochs=12, grid_lr=(1e-2, 1e-3) if head != "attentive4" else (3e-3,), grid_wd=(0.01,), holdout=0.25
    )
    task = task_of(args, 16, 4, heads=4)
    accuracy = []
    for y in (labels, np.random.default_rng(0).permutation(labels)):
        best, _ = probe.choose(task, Fixed(x, y))
        accuracy.append(accuracy_of(task, best.head, Fixed(xv, labels_v))[0]["top1"])
    assert accuracy[0] > 0.95 and 0.1 < accuracy[1] < 0.4


def test_split_keeps_a_videos_clips_and_a_group_together():
    paths = [f"person{i % 10}/v{i // 3}.mp4" for i in range(90)]
    for group, kind in (("", lambda p: p), (r"person\d+", lambda p: p.split("/")[0])):
        ((fit, held),) = probe.hold_outs(paths, group, 0.1, seed=3)
        assert len(held) == 9 and sorted([*fit, *held]) == list(range(90))
        assert not {kind(paths[i]) for i in fit} & {kind(paths[i]) for i in held}
        assert any(not np.array_equal(held, probe.hold_outs(paths, group, 0.1, seed)[0][1]) for seed in (4, 5))
    assert len({paths[i].split("/")[0] for i in held}) == 1
    repeated = [f"v{i // 3}.mp4" for i in range(90)]
    ((fit, held),) = probe.hold_outs(repeated, "", 0.1, seed=0)
    assert len(held) == 9 and not {repeated[i] for i in fit} & {repeated[i] for i in held}


def test_few_videos_are_held_out_in_turn():
    """Fewer than 50 held out: five parts, of which each video is in one; else a single one."""
    paths = [f"v{i // 3}.mp4" for i in range(90)]
    splits = probe.hold_outs(paths, "", 0.1, 0, folds=5)
    assert len(splits) == 5 and sorted(np.concatenate([held for _, held in splits])) == list(range(90))
    for fit, held in splits:
        assert sorted([*fit, *held]) == list(range(90)) and len(held) == 18
        assert not {paths[i] for i in fit} & {paths[i] for i in held}
    assert len(probe.hold_outs([f"v{i}.mp4" for i in range(500)], "", 0.1, 0, folds=5)) == 1


class Sure(torch.nn.Module):
    """Says the same of everything; of class 0 so much, of class 1 always 0.35."""

    def __init__(self, p):
        super().__init__()
        self.p = torch.tensor(p)

    def forward(self, x):
        p = self.p[x[:, 0, 0].long()]
        return torch.stack([p, torch.full_like(p, 0.35), 1 - p - 0.35], -1).clamp(min=1e-6).log()


def test_the_head_of_a_grid_is_chosen_by_top1_and_between_equals_by_likelihood(monkeypatch):
    """Of clips of class 0 of two kinds, three rates say: all right but barely; the first kind
    surely, the second wrong; all right, and a little surer than the first rate."""
    sure = {1e-1: [0.4, 0.4], 1e-2: [0.999, 0.3], 1e-3: [0.5, 0.5]}

    def fit(task, train, rows, pairs):
        return [probe.Trained(Sure(sure[lr]), lr, wd) for lr, wd in pairs]

    monkeypatch.setattr(probe, "fit", fit)
    x = (torch.arange(20) % 2).view(20, 1, 1, 1)
    for grid, chosen in (
        ((1e-1, 1e-2), 1e-1),
        ((1e-2, 1e-1), 1e-1),
        ((1e-1, 1e-3), 1e-3),
        ((1e-3, 1e-1, 1e-2), 1e-3),
    ):
        task = task_of(arguments(head="linear", grid_lr=grid, grid_wd=(0.01,)), 1, 3)
        best, tried = probe.choose(task, Fixed(x, np.zeros(20, int)))
        assert best.lr == chosen and best.held_out == 1.0
        assert [one.lr for one in tried] == list(grid)


# --- metrics ---


def scored(p, seen, labels):
    """{metric: value} and confusion of probabilities, of which some were not seen."""
    p, labels = torch.tensor(p), torch.tensor(labels)
    task = task_of(arguments(), 1, p.shape[1])
    rows = [task.score(p[i : i + 1], {"y": labels[i : i + 1]}) if ok else task.unread(labels[i : i + 1])[0]
            for i, ok in enumerate(seen)]
    rows = torch.cat([row.double() for row in rows])
    return task.total(rows), probe.confusion_of(rows, task.classes)


def test_score_by_hand():
    p = np.array(
        [
            [0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05],  # class 0, right
            [0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0],  # class 1: called 0, second
            [0.9, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01],  # class 6: called 0, not in five
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        ]
    )  # class 6, but the video could not be read
    total, confusion = scored(p, [True, True, True, False], [0, 1, 6, 6])
    assert (total["top1"], total["top5"]) == (0.25, 0.5)
    assert total["likelihood"] == pytest.approx(np.log([0.5, 0.2, 0.01, 1e-9]).mean(), abs=1e-5)
    want = np.zeros((7, 8), int)
    want[0, 0] = want[1, 0] = want[6, 0] = want[6, 7] = 1
    assert np.array_equal(confusion, want)


def test_a_constant_prediction_scores_its_class():
    total, confusion = scored(np.full((6, 3), 1 / 3), [True] * 6, [0, 0, 0, 1, 2, 2])
    assert (total["top1"], total["top5"]) == (0.5, 1.0) and confusion[:, 0].tolist() == [3, 1, 2]


def test_softmax_is_averaged_over_views_only():
    # one video, three views, one token
    x = torch.tensor([[[[4.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]])
    task = task_of(arguments(), 2, 2)
    out, _ = task.ask(torch.nn.Identity(), {"video": x}, {})
    p = task.answer(out)
    want = (torch.tensor([4.0, 0]).softmax(0) + 2 * torch.tensor([0, 1.0]).softmax(0)) / 3
    assert np.allclose(p[0], want) and not np.allclose(p[0], x.mean((0, 1, 2)).softmax(0))


def test_an_unreadable_video_counts_as_wrong():
    x, labels = separable(40, 2)
    x = x.mean(2, keepdim=True)
    task = task_of(arguments(head="knn"), 16, 2)
    best, _ = probe.choose(task, Fixed(x, labels))
    total, confusion = accuracy_of(task, best.head, Fixed(x, labels, bad=(1, 7)))
    assert total["top1"] == total["top5"] == 38 / 40 and confusion[1, 2] == 2


# --- features: a reader in memory, whose pixels tell the video, the segment, the view and the rando


@pytest.fixture
def world(monkeypatch):
    """The rows read, in order."""
    read = []

    def eval_batches(source, clip, *, rows, batch_size, workers=0, seed=0):
        for part in np.split(np.array(rows), range(batch_size, len(rows), batch_size)):
            read.extend(part.tolist())
            video = torch.zeros(
                len(part), clip.segments, clip.views, clip.frames, clip.size, clip.size, 3, dtype=torch.uint8
            )
            for b, row in enumerate(part):
                video[b] += int(row) * 10 + (seed % 7 if clip.train else 0)
                for s in range(clip.segments):
                    video[b, s] += s * 3
                for v in range(clip.views):
                    video[b, :, v] += v
            ok = torch.tensor([row != 3 for row in part])
            yield {
                "video": video.flatten(0, 2),
                "flip": torch.zeros(video[:, :, :, 0, 0, 0, 0].numel(), dtype=torch.bool),
                "ok": ok,
                "label": torch.from_numpy(source.labels[part]),
                "bad": [] if ok.all() else [(source.paths[3], "damaged")],
            }

    monkeypatch.setattr(D, "eval_batches", eval_batches)
    monkeypatch.setattr(D, "fingerprint", lambda sources: " ".join(sources[0].paths))
    return read


def features(clip=None, args=None, encoder=None, names="abcdefgh"):
    encoder = encoder or M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    args = args or arguments(encoder="-", micro_batch=3)
    source = D.Source("list", [f"{n}.mp4" for n in names], np.arange(len(names)))
    return probe.Features(
        args, encoder.eval(), encoder.config | M.IMAGENET, source,
        clip or D.Clip(frames=4, size=16, train=False), CPU, (args.layer or 2,),
        form=probe.Classify.form(args),
    )


def tokens(batches):
    """[(tokens, rows)]"""
    return [(x["video"], rows) for x, _, rows in batches]


def test_tokens_of_temporal_clips_are_joined_and_views_kept_apart(world):
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16).eval()
    x = features(D.Clip(frames=4, size=16, train=False, segments=2, views=3), encoder=encoder)
    assert x.shape == (3, 2 * 8, 32)
    ((z, rows),) = tokens(x.batches(np.array([5, 2]), 2))
    for b, row in enumerate((5, 2)):
        for v in range(3):
            for s in range(2):
                video = torch.full((1, 3, 4, 16, 16), (row * 10 + s * 3 + v) / 255)
                mean, std = (torch.tensor(M.IMAGENET[k]).view(3, 1, 1, 1) for k in ("mean", "std"))
                video = (video - mean) / std
                assert torch.allclose(z[b, v, 8 * s : 8 * s + 8], encoder(video)[0], atol=1e-5)
    pooled = features(
        D.Clip(frames=4, size=16, train=False, segments=2, views=3), arguments(encoder="-", head="linear"), encoder
    )
    ((found, _),) = tokens(pooled.batches(np.array([5, 2]), 2))
    assert torch.allclose(found, z.mean(2, keepdim=True), atol=1e-5)


def test_features_are_stored_once_and_found_by_content(world, tmp_path):
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    fresh = [z for z, _ in tokens(features(encoder=encoder).batches(np.arange(8), 3))]

    def reads(**change):
        x = features(**{"encoder": encoder} | change)
        encode, seen = x.encode, []
        x.encode = lambda video, flip: (seen.append(len(video) // x.clip.views), encode(video, flip))[1]
        x.store(tmp_path)
        return sum(seen), x

    count, x = reads()
    assert count == 8 and list(x.bad) == ["d.mp4"]
    for want, (z, rows) in zip(fresh, tokens(x.batches(np.arange(8), 3))):
        # float16; row 3 cannot be read
        assert torch.allclose(z, want, atol=2e-3) and 3 not in rows
    count, x = reads()
    # the second run computes nothing and still knows
    assert count == 0 and list(x.bad) == ["d.mp4"]
    torch.manual_seed(5)
    other = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    assert reads(names="abcdefgi")[0] == 8 and reads(encoder=other)[0] == 8
    assert reads(args=arguments(encoder="-", layer=1))[0] == 8
    assert reads(args=arguments(encoder="-", head="linear"))[0] == 8
    assert reads(clip=D.Clip(frames=4, size=16, train=False, views=2))[0] == 8
    assert reads()[0] == 0 and not [p for p in tmp_path.glob("*/*") if p.suffix != ".safetensors"]


def test_stored_features_are_of_this_layout_these_labels_and_this_code(world, tmp_path, monkeypatch):
    """Files of other numbers of rows, label files that were written anew, another model.py: nothing is taken for what
    it is not. (Of twenty passes, then sixty, rows got the tokens of others.)"""
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    x = features(encoder=encoder)
    folders = []
    for size in (2**26, 2**27):
        x.row_bytes = lambda: size
        x.store(tmp_path)
        folders.append(x.folder)
    direct = tokens(features(encoder=encoder).batches(np.arange(8), 8))
    stored = tokens(x.batches(np.arange(8), 8))
    assert torch.allclose(direct[0][0], stored[0][0], atol=2e-3)

    x.source.paths = [str(tmp_path / path) for path in x.source.paths]
    x.names = ["depth"]
    monkeypatch.setattr(x, "fresh", lambda rows, *_: iter([None] * len(rows)))
    for value in (1.0, 5.0):
        save_file({"depth": torch.tensor(value)}, tmp_path / "a.safetensors")
        os.utime(tmp_path / "a.safetensors", ns=(0, int(value)))
        x.store(tmp_path)
        folders.append(x.folder)
    (tmp_path / "model.py").write_text("other code")
    monkeypatch.setattr(M, "__file__", str(tmp_path / "model.py"))
    x.store(tmp_path)
    folders.append(x.folder)
    assert len({*folders}) == 5


def test_of_as_many_rows_as_fit_features_are_stored(world, tmp_path):
    """In files of two rows; the others are made at every use, in whatever order they are asked for."""
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    x = features(encoder=encoder)
    x.row_bytes = lambda: 2**27
    x.store(tmp_path, 0.8)
    assert x.kept == 6 and len(list(tmp_path.glob("*/*"))) == 3
    del world[:]
    order = np.array([7, 0, 3, 6, 5, 1])
    want = tokens(features(encoder=encoder).batches(order, 4))
    del world[:]
    for (a, rows), (b, rows2) in zip(want, tokens(x.batches(order, 4)), strict=True):
        assert torch.allclose(a, b, atol=2e-3) and np.array_equal(rows, rows2)
    assert world == [7, 6]


def test_the_constant_does_not_depend_on_what_is_stored(world, tmp_path):
    """It looks at no video, so a damaged one is called like any other."""
    task = task_of(arguments(encoder="-"), 32, 8)
    x = features()
    both = []
    for _ in range(2):
        answers = [lambda x, y: probe.always(torch.eye(8)[0], y)]
        rows, _ = probe.evaluate(task, x.of(()), np.arange(8), answers)
        both.append(rows[0])
        x.store(tmp_path)
    assert torch.equal(*both) and len(both[0]) == 8


def test_a_broken_off_store_is_not_used(world, tmp_path, monkeypatch):
    x = features()
    monkeypatch.setattr(x, "encode", lambda video, flip: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        x.store(tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_random_passes_differ_and_repeat(world, tmp_path):
    clip, args = D.Clip(frames=4, size=16, train=True), arguments(encoder="-", train_passes=2)
    torch.manual_seed(0)
    encoder = M.ViT(width=32, depth=2, heads=2, mlp=64, patch=8, frames=4, size=16)
    x = features(clip, args, encoder)
    direct = [tokens(x.batches(np.arange(8), 8, turn))[0][0] for turn in range(3)]
    x.store(tmp_path)
    stored = [tokens(x.batches(np.arange(8), 8, turn))[0][0] for turn in range(3)]
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(direct, stored))
    assert torch.equal(direct[0], direct[2]) and (direct[0] - direct[1]).abs().max() > 1e-3


def test_all_videos_bad_is_said(world):
    with pytest.raises(D.DataError, match="no video can be read; the last one: damaged"):
        list(features().batches(np.array([3]), 2))
    assert [len(rows) for *_, rows in features().batches(np.array([3, 4]), 1)] == [0, 1]


# --- the task ---


def test_poisoned_val_labels_do_not_change_the_choice(world, monkeypatch, tmp_path):
    """Same train list, val labels right and wrong: same pair, same head, only the score differs."""
    lists = {
        "train": D.Source("t", [f"{i}.mp4" for i in range(24)], np.arange(24) // 12),
        "val": D.Source("v", ["a.mp4", "b.mp4"], np.array([0, 1])),
    }
    encoder = M.ViT(width=32, depth=1, heads=2, mlp=64, patch=8, frames=4, size=16)
    monkeypatch.setattr(probe, "load", lambda args: (encoder, encoder.config | M.IMAGENET))
    args = arguments(
        encoder="-", data="", train="t", val="v", head="linear", epochs=5, out_dir=str(tmp_path), frames=4, size=16,
        seed=1,
    )
    results = []
    for labels in ([0, 1], [1, 0]):
        lists["val"].labels = np.array(labels)
        monkeypatch.setattr(probe, "lists", lambda *flags, **more: (lists["train"], lists["val"]))
        results.append(probe.probe(args, CPU))
    (a, more_a), (b, more_b) = results
    assert more_a["tried"] == more_b["tried"]
    assert (a["lr"], a["wd"]) == (b["lr"], b["wd"])
    assert len(more_a["tried"]) == 8
    assert a["value"] + b["value"] == 1


@pytest.mark.parametrize(
    "flags",
    [
        dict(),
        dict(data="world", train="x"),
        dict(train="no_such_list", val="no_such_list"),
        dict(data="world", epochs=0),
        dict(data="world", grid_lr=(math.nan,)),
        dict(data="world", layer=99),
        dict(data="world", frames=3),
        dict(data="world", encoder="no_such_file.safetensors"),
        dict(data="world", encoder="pixels:diff"),
        dict(data="world", head="linear", pool="cls"),
        dict(data="world", head="no_such_head"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        probe.main(
            arguments(
                **{"encoder": "random:vit_n", "size": 32, "out_dir": str(tmp_path), "train_clips": 8, "val_clips": 8}
                | flags
            )
        )
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told


def test_what_is_not_a_number_is_null():
    said = probe.dumps({"held_out": math.nan, "tried": [math.inf, 1.5, None], "path": "NaN"})
    assert json.loads(said) == {"held_out": None, "tried": [None, 1.5, None], "path": "NaN"} and "null" in said


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, str(ROOT / "probe.py"), "--help"], capture_output=True, text=True, env=env
    )
    assert shown.returncode == 0 and "--grid" in shown.stdout


def test_a_label_that_train_does_not_have_is_an_error(tmp_path, monkeypatch):
    lists = D.Source("t", ["a", "b"], np.array([0, 2])), D.Source("v", ["c", "d"], np.array([0, 1]))
    monkeypatch.setattr(probe, "lists", lambda *flags, **more: lists)
    with pytest.raises(D.DataError, match="--val: d: label 1 is not in --train"):
        probe.probe(arguments(encoder="-"), CPU)


KEYS = {
    "task", "metric", "value", "top5", "chance", "majority", "head", "params", "layer", "seed", "n_train", "n_val",
    "encoder", "seconds", "bad",
}


def test_the_script_on_the_world(tmp_path, capsys):
    """As a process, then twice more in this one: the same seed gives the same numbers, another seed others."""
    flags = dict(
        encoder="random:vit_n", data="world", frames=8, size=32, train_clips=64, val_clips=40, epochs=2, workers=0,
        out_dir=str(tmp_path),
    )
    command = [sys.executable, "probe.py", "classify"]
    command += [str(part) for k, v in flags.items() for part in (f"--{k}", v)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    printed = [done.stdout]
    for change in (
        dict(), dict(seed=1), dict(encoder="pixels:diff", head="linear"), dict(head="knn", dtype="bf16"),
        dict(cache_gb=0),
    ):
        probe.main(arguments(**flags | change))
        printed.append(capsys.readouterr().out)
    results = [json.loads(p.splitlines()[-1]) for p in printed]
    log = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    for result, line in zip(results, log, strict=True):
        assert KEYS <= set(result)
        assert result["n_val"] == 40
        assert result["chance"] == 1 / 8
        assert 0 <= result["value"] <= result["top5"] <= 1
        assert np.array(line["confusion"]).shape == (8, 9)
        assert np.array(line["confusion"]).sum() == 40
        assert len(line["per_class"]) == 8
    assert log[0]["confusion"] == log[1]["confusion"] and log[0]["confusion"] != log[2]["confusion"]
    # not stored: float32 instead of float16
    assert np.abs(np.array(log[0]["confusion"]) - np.array(log[5]["confusion"])).sum() <= 8
    assert log[0]["picture"] is None or (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("head, grid", [("attentive", (1e-2, 1e-3, 1e-4)), ("linear", (1e-2, 1e-3))])
def test_two_ranks_equal_one(head, grid, run, tmp_path):
    """They share files of features and heads; a choice by hold-out, and one by folds."""
    flags = ["--encoder", "random:vit_n", "--data", "world", "--frames", 4, "--size", 32, "--train_clips", 40]
    flags += ["--val_clips", 16, "--epochs", 1, "--workers", 0, "--head", head, "--grid_lr", *grid]
    flags += ["--grid_wd", 0.01] if head == "attentive" else []
    found = []
    for ranks in (1, 2):
        status, last, err = run("probe.py", "classify", *flags, "--out_dir", tmp_path / str(ranks), ranks=ranks)
        assert status == 0, err
        found.append({k: v for k, v in last.items() if k not in ("seconds", "saved", "picture")})
        heads = [load_file(tmp_path / str(n) / "head.safetensors") for n in range(1, ranks + 1)]
    assert found[0] == found[1]
    assert all(torch.equal(a, b) for a, b in zip(heads[0].values(), heads[1].values()))
    assert len((tmp_path / "2/probe.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program to make videos")
def test_real_files_and_a_damaged_one(tmp_path):
    """Two classes of plain colour; a val file that is no video counts as wrong and is named."""
    for i in range(12):
        picture = f"color={('red', 'blue')[i % 2]}:size=64x48:rate=10:duration=1"
        subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, str(tmp_path / f"{i}.mp4")], check=True
        )
    (tmp_path / "12.mp4").write_text("this is not a video")
    (tmp_path / "train.csv").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(8)))
    (tmp_path / "val.csv").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(8, 13)))
    args = arguments(
        encoder="random:vit_n", train=str(tmp_path / "train.csv"), val=str(tmp_path / "val.csv"), head="knn",
        frames=4, stride=2, size=32, workers=0, out_dir=str(tmp_path / "out"),
    )
    result, more = probe.probe(args, CPU)
    assert (result["value"], result["bad"], result["n_val"]) == (0.8, 1, 5)
    assert more["confusion"] == [[2, 0, 1], [0, 2, 0]]
    assert list(more["bad_videos"]) == [str(tmp_path / "12.mp4")]


def test_plot_draws_any_runs(tmp_path, monkeypatch, with_pictures):
    """Two runs whose points lie on a line: R^2 is 1. A step that was run twice counts once. A third run has no labels
    and goes on, its last line half written; folders that are no runs are passed over."""
    for r in range(2):
        (tmp_path / f"r{r}").mkdir()
        lines = [{"step": s, "loss": 1 - 0.1 * s - 0.01 * r, "flops": 1e9 * s} for s in (1, 2, 2, 3)]
        lines = [x for line in lines for x in (line, {"step": line["step"], "probe_acc": 2 - 2 * line["loss"]})]
        (tmp_path / f"r{r}" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "rankme": 3, "lr": 1e-3}\n{"step": 2, "lo')
    (tmp_path / "empty").mkdir()
    runs = tuple(str(tmp_path / name) for name in ("r0", "r1", "own", "empty"))
    args = probe.Args("plot", runs=runs, out_dir=str(tmp_path))
    found = probe.runs_of(args)
    assert [*found] == [*runs[:3]] and probe.pairs_of(found[runs[2]], "step", "rankme") == [(1, 3)]
    assert [acc for _, acc in probe.pairs_of(found[runs[0]], "loss", "probe_acc")] == pytest.approx([0.2, 0.4, 0.6])
    for none in ((), runs[3:]):
        with pytest.raises(D.DataError, match="no folder with a log.jsonl"):
            probe.plot(probe.Args("plot", runs=none), CPU)
    with monkeypatch.context() as without:
        without.setattr(M, "pyplot", lambda: None)
        with pytest.raises(SystemExit) as stop:
            probe.main(args)
    assert stop.value.code == 2
    said, _ = probe.plot(args, CPU)
    assert said["points"] == 6 and said["value"] == pytest.approx(1) and said["each"][runs[2]] is None
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("script", ["train_vjepa", "train_mae4d"])
def test_a_checkpoint_is_probed_as_what_it_exports(run, tmp_path, script):
    flags = ("--preset", "laptop", "--steps", 2, "--batch_size", 4, "--warmup", 1, "--probe_data", "--sample_every", 0,
             "--workers", 0, "--out_dir", tmp_path / "run")
    assert run(f"{script}.py", *flags)[0] == 0
    found = []
    for encoder in (tmp_path / "run", tmp_path / "run/step_00000002"):
        status, last, err = run("probe.py", "classify", "--encoder", encoder, "--data", "world", "--head", "linear",
                                "--train_clips", 32, "--val_clips", 32, "--workers", 0, "--out_dir", tmp_path / "probe")
        assert status == 0, err
        found.append((last["value"], last["likelihood"]))
    assert found[0] == found[1]
