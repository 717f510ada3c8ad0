"""train_tdv.py: losses against float64 numpy and `lightly`, gradient paths, centres, views, runs of every flag of
Table 4."""

import copy
import dataclasses
import importlib.abc
import importlib.machinery
import json
import math
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import model as M
import train_tdv as T
from test_train_vjepa import counted, losses

TINY = (
    "--preset", "laptop", "--steps", 4, "--batch_size", 4, "--log_every", 1, "--sample_every", 0, "--probe_data",
    "--warmup", 2, "--prototypes", 64, "--head_hidden", 32,
)


def setting(preset="laptop", seed=0, B=2, spread=0.05, **changes):
    small = {"prototypes": 48, "head_hidden": 32, "frames": 4}
    args = dataclasses.replace(T.Args(**T.PRESETS[preset]), **small | changes)
    torch.manual_seed(seed)
    objective = T.OBJECTIVES[args.objective](args)
    # the motion encoder starts at 0, teacher and student alike: nothing to compare
    for p in objective.parameters():
        p.data.add_(spread * torch.randn(p.shape))
    return args, objective, torch.randn(B, 3, args.frames, args.size, args.size)


def softmax(v):
    e = np.exp(v - v.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(v):
    return 0.5 * v * (1 + np.vectorize(__import__("math").erf)(v / np.sqrt(2)))


def logits(head, tokens):
    """The projection head in float64 numpy."""
    v = tokens.double().numpy()
    for i in (0, 2, 4):
        v = v @ head.mlp[i].weight.detach().double().numpy().T + head.mlp[i].bias.detach().double().numpy()
        v = gelu(v) if i < 4 else v / np.linalg.norm(v, axis=-1, keepdims=True)
    W = head.prototypes.detach().double().numpy()
    return v @ (head.scale.detach().double().numpy() * W / np.linalg.norm(W, axis=1, keepdims=True)).T


@pytest.mark.parametrize("threshold", [0.0, 1.13])
def test_the_loss_is_the_papers(threshold):
    """MSE, both cross-entropies with centring, and their weights, against float64 numpy; with a threshold on the
    change only over pairs that move."""
    args, objective, x = setting(
        motion_threshold=threshold, w_mse=1.5, w_cls=0.75, w_patch=0.5, temp=(0.1, 0.07), ce_rows=7
    )
    objective.centres.normal_(std=0.1)
    loss, metrics = objective(x)
    with torch.no_grad():
        now = x[:, :, :-1].transpose(1, 2).reshape(-1, 3, 1, 32, 32)
        then = x[:, :, 1:].transpose(1, 2).reshape(-1, 3, 1, 32, 32)
        z, h = objective.encoder(now), objective.target(then)
        zhat = z + objective.motion(then - now, z)
    use = (then - now).abs().mean((1, 2, 3, 4)).numpy() > threshold
    assert 0 < use.sum() <= len(use) and (threshold == 0) == use.all()
    want = 1.5 * ((zhat - h).double().numpy()[use] ** 2).mean() * use.mean()
    for kind, (w, tokens) in enumerate(((0.75, slice(0, 1)), (0.5, slice(1, None)))):
        p = softmax((logits(objective.target_head, h[:, tokens]) - objective.centres[kind].double().numpy()) / 0.07)
        q = softmax(logits(objective.head, zhat[:, tokens]) / 0.1)
        want += w * -(p * np.log(q)).sum(-1)[use].mean() * use.mean()
    assert abs(loss.item() - want) < 1e-5 * abs(want), (loss.item(), want)
    assert abs(metrics["still"].item() - ((z - h).double().numpy()[use] ** 2).mean() * use.mean()) < 1e-5


@pytest.mark.parametrize("preset", ["laptop_video_dino", "laptop_video_ibot"])
def test_the_losses_of_views_are_dinos_and_ibots(preset):
    """From the tokens that both encoders give, in float64 numpy. DINO: CLS of every view of the
    student against both global views of the teacher, but not the same one. iBOT: hidden patches,
    each picture's mean with equal weight, nothing where nothing is hidden."""
    args, objective, x = setting(preset, local_crops=3, temp=(0.1, 0.04), w_cls=0.75)
    objective.centres.normal_(std=0.1)
    tokens, hidden, taught = [], [], []

    def student(module, inputs, keywords, out):
        tokens.append(out.detach())
        if keywords.get("fill") is not None:
            hidden.append(keywords["fill"][0])

    objective.encoder.register_forward_hook(student, with_kwargs=True)
    objective.target.register_forward_hook(lambda module, inputs, out: taught.append(out))
    loss, metrics = objective(x, [5, 9])
    F = 8  # two clips of four frames
    h = torch.cat(taught)  # (2F,1+36,D)
    wide = torch.cat([z for z in tokens if z.shape[1] == 37])  # (2F,1+36,D)
    local = torch.cat([z for z in tokens if z.shape[1] == 5])  # (3F,1+4,D)
    views = [*wide[:, 0].split(F), *local[:, 0].split(F)]
    assert len(h) == len(wide) == 2 * F and len(views) == 5

    def ce(kind, z, h):
        q = softmax(logits(objective.head, z) / 0.1)
        p = logits(objective.target_head, h) - objective.centres[kind].double().numpy()
        return -(softmax(p / 0.04) * np.log(q)).sum(-1)

    pairs = [ce(0, z, target) for t, target in enumerate(h[:, 0].split(F)) for s, z in enumerate(views) if s != t]
    want = 0.75 * np.mean(pairs)
    assert metrics["ce_cls"].item() == pytest.approx(np.mean(pairs), rel=1e-5) and len(pairs) == 8
    if args.w_patch:
        masks = torch.cat(hidden).numpy()  # (2F,36)
        errors = ce(1, wide[:, 1:], h[:, 1:])
        shares = [e[m].mean() if m.any() else 0.0 for e, m in zip(errors, masks)]
        assert 0 < sum(m.any() for m in masks) < 2 * F
        want += args.w_patch * np.mean(shares)
    assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("flags", [{}, {"w_patch": 0.0}, {"motion": False}, {"condition": "film"}])
def test_flops_are_those_that_torch_counts(flags):
    """All but the gradients of the pixels, which nobody needs."""
    args, objective, x = setting(B=1, **flags)
    inputs = 1 + args.motion  # frames, and their changes
    pixels = 2 * (3 * 8 * 8) * 128 * 16 * (args.frames - 1) * inputs
    assert objective.flops() == counted(objective, x) + pixels


@pytest.mark.parametrize("preset", ["laptop_video_dino", "laptop_video_ibot"])
def test_flops_of_views_are_about_those_that_torch_counts(preset):
    """To 1 %: the student's head runs for every pair of views, and how much is hidden is chance."""
    args, objective, x = setting(preset, B=1)
    assert objective.flops() == pytest.approx(counted(objective, x, [5]), rel=0.01)


@pytest.mark.parametrize(
    "step, lr, ema",
    [(0, 0.0, 0.996), (5_000, 1e-4, 0.99600617), (102_500, 5.00005e-5, 0.99807853), (199_999, 1e-9, 1.0)],
)
def test_schedules_at_the_start_after_warmup_and_at_the_end(step, lr, ema):
    """Table C.2: 200,000 steps of which 5,000 warm up; DINO's EMA."""
    objective = setting(steps=200_000, warmup=5_000, lr=1e-4, ema=0.996, final_ema=1.0)[1]
    want = {"lr": lr, "weight_decay": 0.01, "ema": ema}
    assert objective.schedules(step) == pytest.approx(want, rel=1e-6, abs=1e-12)


def test_the_online_probe_reads_the_teacher_on_evaluation_clips(call, pictures, probed, tmp_path):
    """CLS of the teacher and of the student come first; the teacher is the exported encoder."""
    x = torch.randn(2, 3, 8, 32, 32)
    seen = probed(x)
    flags = [flag for flag in TINY if flag != "--probe_data"]
    last = call(
        T, *flags, "--data", pictures, "--probe_data", pictures, pictures, "--workers", 0, "--clips_per_video", 2,
        "--ema", 0.5, "--final_ema", 0.5, "--out_dir", tmp_path,
    )
    assert [(train, clips) for train, clips, _ in seen] == [(False, 1)] * 4
    teacher, _ = M.load_encoder(tmp_path)
    with torch.no_grad():
        z = teacher(x)  # (2,8*(1+16),D)
    read = seen[-1][2].split(128, 1)
    assert torch.allclose(read[0], z[:, :8].mean(1), atol=1e-5)
    assert torch.allclose(read[3], z[:, 8:].mean(1), atol=1e-5)
    assert not torch.allclose(read[1], z[:, :8].mean(1), atol=1e-3)
    assert last["knn_acc"] is not None


def test_chunks_change_nothing():
    """Loss, entropy, mean logits and both gradients of the chunked cross-entropy against autograd on all rows at
    once: 1e-5, and gradcheck in float64."""
    torch.manual_seed(0)
    s, t = (torch.nn.functional.normalize(torch.randn(50, 16), dim=1).requires_grad_(g) for g in (True, False))
    Ws = torch.randn(300, 16, requires_grad=True)
    Wt = torch.randn(300, 16)
    centre = torch.randn(300) * 0.1
    weight = torch.rand(50)
    p = ((t @ Wt.T - centre) / 0.07).softmax(1)
    whole = -(weight * (p * (s @ Ws.T / 0.1).log_softmax(1)).sum(1)).sum()
    gs, gW = torch.autograd.grad(2 * whole, (s, Ws))
    for rows in (1, 7, 50, 1000):
        loss, entropy, mean = T.ChunkedCE.apply(s, Ws, t, Wt, centre, weight, (0.1, 0.07), rows)
        got = torch.autograd.grad(2 * loss, (s, Ws))
        assert abs(loss.item() / whole.item() - 1) < 1e-5
        assert (got[0] - gs).abs().max() < 1e-5 * gs.abs().max()
        assert (got[1] - gW).abs().max() < 1e-5 * gW.abs().max()
        assert abs(entropy.item() + (p * p.log()).sum(1).mean().item()) < 1e-5
        assert (mean - (t @ Wt.T).mean(0)).abs().max() < 1e-5
    double = [v.detach().double()[:6, :4].contiguous().requires_grad_(v.requires_grad) for v in (s, Ws, t, Wt)]
    fixed = (double[2], double[3], centre[:6].double(), weight[:6].double(), (0.3, 0.2), 4)
    assert torch.autograd.gradcheck(lambda a, b: T.ChunkedCE.apply(a, b, *fixed)[0], double[:2])


class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that lightly imports and its losses do not use."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "lightly_utils", "pytorch_lightning", "hydra", "omegaconf", "aenum"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "0.0.0"
        return module

    def exec_module(self, module):
        pass


@pytest.fixture
def stubs(monkeypatch):
    """For one test alone: whoever looks for torchvision later would find it."""
    monkeypatch.setattr(sys, "meta_path", [Stub(), *sys.meta_path])
    yield
    for name, module in list(sys.modules.items()):
        if isinstance(getattr(getattr(module, "__spec__", None), "loader", None), Stub):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
def test_head_loss_and_centre_equal_lightlys(stubs):
    """DINO's head, its loss over pairs of views, its centre after two steps, and iBOT's loss of masked patches,
    against `lightly`: 1e-5."""
    pytest.importorskip("lightly", reason="pip install --no-deps lightly")
    from lightly.loss.dino_loss import DINOLoss
    from lightly.loss.ibot_loss import IBOTPatchLoss
    from lightly.models.modules.heads import DINOProjectionHead

    args, objective, _ = setting("laptop_video_ibot", temp=(0.1, 0.04))
    theirs = DINOProjectionHead(128, 32, 64, 48, norm_last_layer=False)
    keys = ["last_layer.weight_v", "last_layer.weight_g"]
    keys += [f"layers.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")]
    names = dict(zip(objective.head.state_dict(), keys))
    theirs.load_state_dict({names[k]: v for k, v in objective.head.state_dict().items()})
    views = [torch.randn(6, 128) for _ in range(4)]
    h = [torch.randn(6, 128) for _ in range(2)]
    out = lambda head, v: (lambda s, W: s @ W.T)(*head(v))
    assert max((out(objective.head, v) - theirs(v)).abs().max() for v in views) < 1e-5
    cls, patch = DINOLoss(48, 0.04, 0.04, 1, 0.1, 0.9), IBOTPatchLoss(48, 0.04, 0.1, center_momentum=0.9)
    mask = torch.rand(6, 9) < 0.4
    mask[2] = False
    tokens, targets = torch.randn(6, 9, 128), torch.randn(6, 9, 128)
    for step in range(2):
        pairs = [(s, t) for t in (0, 1) for s in range(4) if s != t]
        ours, _ = objective.ce(0, torch.cat([views[s] for s, _ in pairs]), torch.cat([h[t] for _, t in pairs]))
        want = cls([out(objective.target_head, v) for v in h], [out(objective.head, v) for v in views], epoch=5)
        assert abs(ours.item() - want.item()) < 1e-5
        weight = (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask] / len(mask)
        ours, _ = objective.ce(1, tokens[mask], targets[mask], weight)
        want = patch(out(objective.target_head, targets)[mask], out(objective.head, tokens)[mask], mask.view(6, 3, 3))
        assert abs(ours.item() - want.item()) < 1e-5, step
        sums = out(objective.target_head, torch.cat(h)).sum(0)
        objective.logit_sums[0][:] = [torch.cat([sums, torch.tensor([12.0])])]
        objective.after_step(0)
    assert (objective.centres[0] - cls.center.flatten()).abs().max() < 1e-5


def test_gradients_reach_the_encoder_by_both_paths_and_never_the_teacher():
    args, objective, x = setting()
    objective(x)[0].backward()
    assert all(p.grad is None for m in (objective.target, objective.target_head) for p in m.parameters())
    for module in (objective.encoder, objective.motion, objective.head):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    now, change = x[:, :, 0:1], x[:, :, 1:2] - x[:, :, 0:1]
    z = objective.encoder(now)
    by_condition = torch.autograd.grad(objective.motion(change, z).square().sum(), z)[0]
    assert (by_condition.abs().sum((0, 2)) > 0).all()  # of every token; the addend's is 1
    whole = torch.autograd.grad(objective(x)[0], objective.encoder.patch_embed.proj.weight)[0]
    motion = objective.motion.forward
    objective.motion.forward = lambda change, z: motion(change, z.detach())
    by_addend = torch.autograd.grad(objective(x)[0], objective.encoder.patch_embed.proj.weight)[0]
    assert (whole - by_addend).norm() > 1e-3 * whole.norm() and by_addend.norm() > 0
    blind = setting(cls_condition=False)[1]
    z = blind.encoder(now).detach().requires_grad_()
    seen = torch.autograd.grad(blind.motion(change, z).square().sum(), z)[0].abs().sum((0, 2))
    assert seen[0] == 0 and (seen[1:] > 0).all()


def test_nothing_moves_at_first_and_composition_adds_motion():
    args, objective, x = setting(spread=0)
    z = objective(x, read="compose")
    assert torch.equal(z, z[:, :1].expand_as(z)) and objective(x)[1]["moved"] == 0
    args, objective, x = setting()
    z, n = objective(x, read="compose"), 17
    assert torch.allclose(z[:, 2], z[:, 1] + objective.motion(x[:, :, 2:3] - x[:, :, 1:2], z[:, 1]))
    tokens = objective(x, read="target")
    assert tokens.shape == (2, 4 * n, 128)
    assert torch.equal(tokens[:, 4 + 16 : 4 + 32], objective.target(x[:, :, 1:2])[:, 1:])
    assert objective(x, read="motion_tokens").shape == (2, 3 * n, 128)


def test_centres_and_teacher_move_once_a_step_and_not_on_a_skipped_one():
    """Two micro-batches give the centre of the whole batch; a step that is not taken leaves teacher and centres,
    also with a NaN."""
    args, objective, x = setting(B=4)
    with torch.no_grad():
        h = objective.target(x[:, :, 1:].transpose(1, 2).reshape(-1, 3, 1, 32, 32))
        want = []
        for tokens in (h[:, :1], h[:, 1:]):
            t, W = objective.target_head(tokens)
            want.append(0.1 * (t @ W.T).flatten(0, -2).mean(0))
    before = [p.clone() for p in objective.target.parameters()]
    objective(x * float("nan"))
    objective.after_step(0, torch.tensor(1.0))
    assert objective.centres.abs().max() == 0 and all(map(torch.equal, before, objective.target.parameters()))
    objective(x[:2]), objective(x[2:])
    objective.after_step(0)
    assert all((c - w).abs().max() < 1e-6 for c, w in zip(objective.centres, want))
    moved = zip(objective.target.parameters(), before, objective.encoder.parameters())
    assert all(torch.allclose(t, 0.99 * b + 0.01 * e, atol=1e-7) for t, b, e in moved)


def test_views_are_functions_of_the_sample_number():
    """The same for a clip in any batch; without crop and colour the image itself; masks hide what they should in
    half of the frames."""
    u = T.view_numbers(3, [5, 9], 2, 4)
    assert torch.equal(u[1:], T.view_numbers(3, [9], 2, 4)) and not torch.equal(u[0], u[1])
    x = torch.rand(4, 3, 32, 32)
    assert (T.augment(x, u[:, :, 0].flatten(0, 1), 32, (0.4, 1), crop=False, colour=False) - x).abs().max() < 1e-5
    views = T.augment(x, u[:, :, 0].flatten(0, 1), 16, (0.05, 0.4), solarise=1.0)
    assert views.shape == (4, 3, 16, 16) and 0 <= views.min() and views.max() <= 1
    one = T.augment(x[2:3], u[1:, :1, 0].flatten(0, 1), 16, (0.05, 0.4), solarise=1.0)
    assert (views[2:3] - one).abs().max() < 1e-5
    mask = T.block_masks(0, range(200), 4, (14, 14), 0.3, 0.2, 0.5)
    some = mask.any(1)
    assert torch.equal(mask[4:8], T.block_masks(0, [1], 4, (14, 14), 0.3, 0.2, 0.5))
    assert 0.45 < some.float().mean() < 0.55
    assert 0.27 < mask[some].float().mean() < 0.35
    assert mask[some].float().mean(1).max() < 0.6


TABLE_4 = [
    (),
    ("--no-motion",),
    ("--w_mse", 0),
    ("--no-centre",),
    ("--temp", 1, 1),
    ("--no-cls_condition",),
    ("--w_cls", 0),
    ("--pos", "rope"),
    ("--motion_input", "frame"),
    ("--motion_threshold", 0.1),
    ("--motion_depth", 1),
    ("--condition", "film"),
    ("--condition", "adaln_zero"),
    ("--condition", "gated_adaln", "--no-cls_condition"),
    ("--motion_lr", 0.03),
]


def three_steps(flags):
    """-> objective, its state before and after three steps of the loop, the loss of each."""
    shape = ("--preset", "laptop", "--prototypes", 48, "--head_hidden", 32, "--frames", 3)
    args = T.parse_args([str(flag) for flag in (*shape, *flags)])
    torch.manual_seed(0)
    objective = T.TDV(args)
    before = copy.deepcopy(objective.state_dict())
    groups = M.param_groups(objective, 0.01, {"motion.": args.motion_lr})
    optimizer = torch.optim.AdamW(groups)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 * group["factor"]
    x = torch.randn(2, 3, 3, 32, 32)
    x[1, :, 1] = x[1, :, 0]  # one pair that does not move
    found = []
    for step in range(3):
        loss, _ = objective(x)
        loss.backward()
        found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
    return objective, before, copy.deepcopy(objective.state_dict()), found


@pytest.fixture(scope="module")
def full():
    return three_steps(())


@pytest.mark.parametrize("flags", TABLE_4[1:], ids=lambda flags: " ".join(map(str, flags)))
def test_every_flag_of_table_4_trains_and_differs_from_the_full_model(flags, full):
    """All that can learn has moved after three steps, the loss has fallen, and it took another way
    than without the flag."""
    objective, before, after, found = three_steps(flags)
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert [name for name in trained if torch.equal(before[name], after[name])] == []
    assert found[2] < found[0] and found != full[3]
    if "--motion_lr" in flags:  # of the motion encoder a small step
        moved = [(after[k] - before[k]).abs().max() for k in after if k.startswith("motion.")]
        assert max(moved) < 0.1 * (full[2]["motion.proj.weight"]).abs().max()


def test_the_full_model_trains(full):
    objective, before, after, found = full
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert [name for name in trained if torch.equal(before[name], after[name])] == []
    assert found[2] < found[0]


@pytest.mark.parametrize("flags", [(), ("--preset", "laptop_video_ibot", "--micro_batch", 1)], ids=["tdv", "ibot"])
def test_runs_resume_and_ranks(run, tmp_path, flags):
    """2 + resume + 2 steps equal 4, bit for bit; two ranks, replicated and sharded, log the same losses within
    1e-5; the encoder loads."""
    flags = (*TINY, *flags, "--data", "world", "--fps", 0, "--size", 32, "--local_crops", 2)
    status, last, err = run("train_tdv.py", *flags, "--out_dir", tmp_path / "whole")
    assert status == 0 and last["steps"] == 4, err[-2000:]
    for stop in (2, 0):
        assert run("train_tdv.py", *flags, "--out_dir", tmp_path / "parts", "--resume", "--stop_at", stop)[0] == 0
    def rows(name):
        lines = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines() if '"loss"' in x]
        kept = ("loss", "ce", "entropy", "mse", "rankme")
        return [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines]
    assert rows("whole") == rows("parts")
    a, b = (M.load_encoder(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name, extra in (("ddp", ()), ("fsdp", ("--fsdp",))):
        status, _, err = run(
            "train_tdv.py", *flags, "--sample_every", 4, "--out_dir", tmp_path / name, *extra, ranks=2
        )
        assert status == 0, err[-2000:]
        assert np.abs(np.array(losses(tmp_path / name)) - losses(tmp_path / "whole")).max() < 1e-4, name


def test_the_horizon_and_how_the_motion_encoder_starts():
    """--horizon: 100 steps of a longer schedule, as the official script's. Zero: z is predicted to stay, and only
    the last layer learns at first."""
    args = dataclasses.replace(T.Args(**T.PRESETS["laptop"]), steps=100, warmup=10, ema=0.9, final_ema=1.0)
    short = T.build(args)
    long = T.build(dataclasses.replace(args, horizon=3000))
    assert long.schedules(99)["lr"] > 0.99 * args.lr > 0.01 * args.lr > short.schedules(99)["lr"]
    assert long.schedules(99)["ema"] < 0.91 < 0.999 < short.schedules(99)["ema"]

    x = torch.randn(2, 3, 8, 32, 32)
    for start, still in (("zero", True), ("small", False), ("default", False)):
        objective = T.build(dataclasses.replace(args, motion_init=start))
        loss, metrics = objective(x)
        loss.backward()
        body = objective.motion.blocks[0].mlp.fc1.weight.grad
        assert (metrics["moved"].item() == 0) is still is not bool(body.abs().sum() > 0), start
    std = {name: T.build(dataclasses.replace(args, motion_init=name)).motion.proj.weight.std().item()
           for name in ("small", "default")}
    assert std == pytest.approx({"small": 1e-3, "default": args.init_std}, rel=0.05)


@pytest.mark.parametrize("preset", [name for name in T.PRESETS if name.startswith("laptop")])
def test_a_laptop_teacher_has_what_its_student_learned(preset):
    """What is exported is the teacher: of a run of the preset's length it holds less than 1 % of the start. (At an
    EMA of 0.996 and 120 steps DINO's was almost untrained.)"""
    args = T.Args(**T.PRESETS[preset])
    schedules = T.build(dataclasses.replace(args, model="vit_n", prototypes=4)).schedules
    assert args.steps >= 1000 and math.prod(schedules(step)["ema"] for step in range(args.steps)) < 0.01
    assert args.short == "spread" == T.Args().short  # clips shorter than the span, not padded with still frames


def test_a_frozen_start_probes_and_pictures(run, pictures, tmp_path):
    """--init with --freeze leaves the encoder as it was and trains the motion encoder; the run's end has all
    accuracies, a picture and the drift."""
    encoder = M.ViT(**M.SIZES["vit_n"], patch=8, tubelet=1, frames=8, size=48, pos="learned", images=True, cls=True)
    M.save_encoder(tmp_path / "given.safetensors", encoder, encoder.config | M.IMAGENET)
    status, last, err = run(
        "train_tdv.py", *TINY[:-6], "--warmup", 2, "--sample_every", 4, "--probe_data", pictures, pictures, "--init",
        tmp_path / "given.safetensors", "--freeze", "--w_cls", 0, "--w_patch", 0, "--out_dir", tmp_path / "run",
        "--prototypes", 32,
    )
    assert status == 0 and None not in (last["probe_acc"], last["knn_acc"]), err[-2000:]
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in log if "teacher_acc" in line][-1]
    assert {"teacher_acc", "student_acc", "probe_acc", "knn_acc", "knn_student"} <= {*found}
    # frozen: the teacher is the student
    assert found["teacher_acc"] == found["student_acc"] and found["knn_acc"] == found["knn_student"]
    after = M.load_encoder(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in encoder.state_dict().items() if k != "pos_embed")
    assert (tmp_path / "run" / "samples" / "step_00000004.png").exists()
    assert '"drift"' in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--frames", 1), "--frames 1"),
        (("--preset", "laptop_video_dino", "--local_size", 12), "--local_size 12"),
        (("--condition", "none"), "none"),
        (("--prototypes", 0), "--prototypes 0"),
        (("--freeze",), "--init"),
        (("--mask_ratio", 0.9, 0.3), "--mask_ratio 0.9 0.3"),
        (("--betas", 0.9, 1.0), "--betas 1.0"),
        (("--clips_per_video", 3), "--clips_per_video 3"),
    ],
)
def test_what_cannot_be(run, tmp_path, flags, message):
    status, _, err = run("train_tdv.py", *TINY, "--data", "world", *flags, "--out_dir", tmp_path / "no")
    assert status == 2 and message in err and "Traceback" not in err, err


def test_dry_run_of_the_papers_model(run):
    status, last, _ = run("train_tdv.py", "--dry_run")
    assert status == 0 and 8.5e7 < last["params_encoder"] < 8.8e7
