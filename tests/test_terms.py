"""The auxiliary objectives of train_vjepa.py: each term against numpy in float64, who gets gradients, what weight 0
leaves alone, every row, the masks."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data as D
import model as M
import probe as P
import train_vjepa as V

ROWS = {}  # what a row changes of its baseline
for base, names in (("fwm_ucf", V.ROWS_UCF), ("fwm_paper", V.ROWS_PAPER)):
    for name in names:
        ROWS[name] = {
            k: v
            for k, v in V.PRESETS[name].items()
            if V.PRESETS[base].get(k, getattr(V.Args, k)) != v and k != "out_dir"
        }
ALL = {name: 0.5 for name in V.TERMS}
B, t, h, w, WIDTH = 3, 4, 4, 4, 128


def tiny(**changes):
    """The laptop's flags with these changes; a term's name stands for its weight."""
    terms = [f"{name}:{changes.pop(name)}" for name in [*changes] if name in V.TERMS]
    return dataclasses.replace(V.Args(**V.PRESETS["laptop"]), **{"terms": tuple(terms)} | changes)


def objective(seed=0, **changes):
    torch.manual_seed(seed)
    return V.FWM(tiny(**changes))


def inputs(seed=0):
    """z, h, x and errors of the right shapes, all random."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return (
        draw(B, t, h * w, WIDTH),
        draw(B, t, h * w, WIDTH),
        draw(B, 3, 2 * t, 8 * h, 8 * w),
        [draw(B, 30).abs(), draw(B, 20).abs()],
    )


def batch(args, seed=0):
    """x, keep, pred for a forward pass."""
    x = torch.from_numpy(
        np.random.default_rng(seed).standard_normal((B, 3, args.frames, args.size, args.size), dtype=np.float32)
    )
    return x, *D.sample_masks(args.masks, seed, 0, B, (t, h, w), args.aspect)


# --- each term, from its formula ------------------------------------------------------------------


def weigh(e, tau):
    """Equations 9 to 11, a clip at a time."""
    w = [np.exp(row / tau) / np.exp(row / tau).sum() * len(row) for row in e]
    return np.mean([(wi * row).mean() for wi, row in zip(w, e)])


def mlp(head, s):
    """What a head makes of s (..., in), and its hidden values; GELU from the error function."""
    p = {k: v.detach().double().numpy() for k, v in head.state_dict().items()}
    a = s @ p["0.weight"].T + p["0.bias"]
    return 0.5 * a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))) @ p["2.weight"].T + p.get("2.bias", 0)


def difference(v):
    return v[:, 1:] - v[:, :-1]


def numpy_orth(z, h, x, errors, o):
    flat = z.reshape(-1, WIDTH) - z.reshape(-1, WIDTH).mean(0)
    products = np.array(
        [[(flat[:, i] * flat[:, WIDTH // 2 + j]).sum() for j in range(WIDTH // 2)] for i in range(WIDTH // 2)]
    )
    return ((products / len(flat)) ** 2).mean()


def numpy_ld(z, h, x, errors, o):
    e = (
        np.abs(mlp(o.heads["ld"], z[:, :-1, :, WIDTH // 2 :] if o.factorised else z[:, :-1]) - difference(h))
        .mean(-1)
        .reshape(B, -1)
    )
    return weigh(e, o.args.tau) if "hw" in o.weights else e.mean()


def numpy_huber(z, h, x, errors, o):
    d = np.abs(difference(z))
    return np.where(d < 1, d * d / 2, d - 0.5).mean()


def numpy_velgate(z, h, x, errors, o):
    speed = np.abs(difference(h)).mean(-1).reshape(B, -1)
    change = np.abs(difference(z)).mean(-1).reshape(B, -1)
    kept = []
    for b in range(B):
        kept += [change[b][i] for i in np.argsort(speed[b])[: speed.shape[1] // 2]]  # the slower half
    return np.mean(kept)


def numpy_sigreg(z, h, x, errors, o):
    axes = (
        torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(o.args.seed * 1_000_003 + o.step))
        .double()
        .numpy()
    )
    y, s = z.reshape(-1, WIDTH) @ (axes / np.sqrt((axes**2).sum(0))), np.linspace(-3, 3, 17)
    # (17, directions)
    gap = np.array([np.abs(np.exp(1j * k * y).mean(0) - np.exp(-k * k / 2)) ** 2 * np.exp(-k * k / 2) for k in s])
    return ((gap[1:] + gap[:-1]) / 2 * (s[1] - s[0])).sum(0).mean()


def numpy_hamiltonian(z, h, x, errors, o):
    """The energy's gradient by central differences."""
    now, half, eps, gradient = z[:, :-1], WIDTH // 2, 1e-5, np.zeros_like(z[:, :-1])
    for c in range(WIDTH):
        step = np.eye(WIDTH)[c] * eps
        gradient[..., c] = (mlp(o.heads["hamiltonian"], now + step) - mlp(o.heads["hamiltonian"], now - step))[
            ..., 0
        ] / (2 * eps)
    d = difference(z)
    return np.mean(
        [np.abs(d[..., :half] - gradient[..., half:]).mean(), np.abs(d[..., half:] + gradient[..., :half]).mean()]
    )


def numpy_spectral(z, h, x, errors, o):
    total, n = 0, t // 2 + 1
    weight = np.arange(1, n + 1) / np.arange(1, n + 1).mean()
    for k in range(n):
        wave = np.exp(-2j * np.pi * k * np.arange(t) / t) / math.sqrt(t)
        f = ((z - h) * wave[None, :, None, None]).sum(1)
        total += weight[k] * (np.abs(f.real) + np.abs(f.imag)).mean() / 2
    return total / n


def numpy_ltc(z, h, x, errors, o):
    cos = lambda a, b: (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.maximum(0, 0.5 - cos(z[:, :-1], h[:, :-1]) + cos(z[:, :-1], h[:, 1:])).mean()


def numpy_ac(z, h, x, errors, o):
    colour = x.reshape(B, 3, t, 2, h_, 8, w_, 8).mean((3, 5, 7)).transpose(0, 2, 3, 4, 1).reshape(B, t, h_ * w_, 3)
    return np.abs(
        mlp(o.heads["ac"], z[:, :-1, :, WIDTH // 2 :] if o.factorised else z[:, :-1]) - difference(colour)
    ).mean()


h_, w_ = h, w
NUMPY = {
    "hw": lambda z, h, x, errors, o: np.mean([weigh(e, o.args.tau) for e in errors]),
    "static": lambda z, h, x, errors, o: np.abs(difference(z[..., : WIDTH // 2])).mean(),
    "orth": numpy_orth,
    "ld": numpy_ld,
    "kin_huber": numpy_huber,
    "velgate": numpy_velgate,
    "sigreg": numpy_sigreg,
    "kin_l1": lambda z, h, x, errors, o: np.abs(difference(z)).mean(),
    "kin_accel": lambda z, h, x, errors, o: np.abs(z[:, 2:] - 2 * z[:, 1:-1] + z[:, :-2]).mean(),
    "kin_split": lambda z, h, x, errors, o: np.abs(z[:, 2:] - 2 * z[:, 1:-1] + z[:, :-2])[..., : WIDTH // 2].mean(),
    "delta": lambda z, h, x, errors, o: np.abs(difference(z) - difference(h)).mean(),
    "hamiltonian": numpy_hamiltonian,
    "spectral": numpy_spectral,
    "ltc": numpy_ltc,
    "ac": numpy_ac,
}


@pytest.mark.parametrize("more", [{}, {"hw": 1.0, "static": 1.0, "tau": 0.3}], ids=["alone", "with hw and static"])
@pytest.mark.parametrize("name", V.TERMS)
def test_term_against_numpy(name, more):
    o = objective(**{name: 1.0} | more)
    z, h, x, errors = inputs()
    got = V.TERMS[name](V.Step(z.requires_grad_(), h, x, errors, o)).item()
    want = NUMPY[name](*(v.detach().double().numpy() for v in (z, h, x)), [e.double().numpy() for e in errors], o)
    assert got == pytest.approx(want, rel=2e-5), name


def test_the_loss_is_the_base_plus_each_term_times_its_weight():
    o = objective(ld=0.7, hw=0.3, kin_l1=2.0, anneal=True, steps=100)
    x, keep, pred = batch(o.args)
    o.step = 50
    loss, metrics = o(x, keep, pred)
    base = sum(metrics[f"loss_{spec}"] for spec in o.args.masks) / 2
    # half-way down the cosine
    weights = {"ld": 0.7, "hw": 0.3, "kin_l1": 1.0}
    weighted = {name: weight * metrics[name].item() for name, weight in weights.items()}
    assert loss.item() == pytest.approx(base.item() + sum(weighted.values()), rel=1e-6)
    for name, value in weighted.items():
        assert metrics[f"{name}_weighted"].item() == pytest.approx(value, rel=1e-6)
    for o.step, want in ((0, {"kin_l1": 2.0, "ld": 0.7}), (100, {"kin_l1": 0.0, "ld": 0.7})):
        _, now = o(x, keep, pred)
        assert all(
            now[f"{name}_weighted"].item() == pytest.approx(weight * now[name].item(), rel=1e-6)
            for name, weight in want.items()
        )
    z = F.layer_norm(o.encoder(x), (WIDTH,)).view(B, t, h * w, WIDTH)
    assert metrics["kin_l1"].item() == pytest.approx(z.diff(dim=1).abs().mean().item(), rel=1e-6)


def test_distance_weights_against_a_plain_search():
    o = objective(distance=True)
    x, keep, pred = batch(o.args)
    _, metrics = o(x, keep, pred)
    target = F.layer_norm(o.target(x), (WIDTH,))
    zhat = o.predictor(o.encoder(x, keep), keep, pred)
    place = lambda i: np.array([i // (h * w), i // w % h, i % w])
    for spec, k, p, guess in zip(o.args.masks, keep, pred, zhat):
        error = (
            (guess - target.gather(1, p[..., None].expand(-1, -1, WIDTH))).abs().mean(-1).detach().double().numpy()
        )
        weight = [
            [1 / math.sqrt(min(np.linalg.norm(place(i) - place(j)) for j in k[b].tolist())) for i in p[b].tolist()]
            for b in range(B)
        ]
        assert metrics[f"loss_{spec}"].item() == pytest.approx((np.array(weight) * error).mean(), rel=1e-5)
        assert 0 < np.min(weight) < 1 == np.max(weight)


def test_orth_does_not_grow_with_the_number_of_tokens():
    """Of independent halves it falls with it; what they share it finds at any number. At weight 0.01 it stays under
    a tenth of the base loss (Eq. 8 as printed outweighs it by far)."""
    o = objective(orth=1.0)
    rng = np.random.default_rng(0)
    shared = torch.from_numpy(rng.standard_normal((64, t, h * w, WIDTH // 2), dtype=np.float32))
    z = torch.cat([shared, shared], -1)
    few, many = (V.orth(V.Step(z[:b], None, None, [], o)).item() for b in (16, 64))
    assert few == pytest.approx(many, rel=0.1) and many == pytest.approx(1 / (WIDTH // 2), rel=0.1)
    loss, metrics = objective(orth=0.01)(*batch(o.args))
    assert metrics["orth_weighted"].item() < 0.1 * loss.item()


def test_the_share_of_tokens_that_hw_weights():
    """1 where errors are alike, 1/n where one token has all the weight. Standardised errors choose at any scale of
    the loss; others hardly choose where errors are small."""

    def share(errors, args):
        return 1 / V.hardness(errors, args).square().mean().item()

    args, sharp = V.Args(hw_standardise=False), V.Args(hw_standardise=False, tau=0.1)
    errors = torch.full((2, 20), 0.5)
    assert share(errors, args) == pytest.approx(1)
    errors[:, 3] = 1.5
    assert share(errors, sharp) == pytest.approx(1 / 20, rel=0.01)
    errors = torch.rand(4, 200)
    plain = [share(scale * errors, args) for scale in (0.1, 1.0)]
    scaled = [share(scale * errors, V.Args(hw_standardise=True)) for scale in (0.1, 1.0)]
    assert plain[0] > 0.99 > 0.95 > plain[1] and scaled[0] == pytest.approx(scaled[1], rel=0.02) and scaled[0] < 0.6
    o = objective(hw=1.0)
    metrics = o(*batch(o.args))[1]
    assert 0 < metrics["hw_share"] <= 1


# --- who gets gradients ---------------------------------------------------------------------------


def test_no_gradient_passes_through_the_weights_of_hard_tokens():
    e = torch.rand(B, 20, dtype=torch.float64, requires_grad=True)
    V.hard(e, V.Args(tau=0.5)).backward()
    share = np.exp(e.detach().numpy() / 0.5)
    # w_i / (n B) and nothing else
    np.testing.assert_allclose(e.grad.numpy(), share / share.sum(1, keepdims=True) / B, rtol=1e-12)


def test_the_target_gets_no_gradient_and_all_that_is_trained_gets_one():
    """Also of the heads: DDP waits for every parameter."""
    o = objective(**ALL)
    o(*batch(o.args))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in o.target.parameters())
    assert sorted(o.heads) == ["ac", "hamiltonian", "ld"]
    assert not [
        name
        for name, p in o.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0) and "qkv.bias" not in name
    ]


@pytest.mark.parametrize(
    "name, more, halves",
    [
        ("static", {}, (1, 0)),
        ("kin_split", {}, (1, 0)),
        ("orth", {}, (1, 1)),
        ("kin_l1", {}, (1, 1)),
        ("ld", {}, (1, 1)),
        ("ld", {"orth": 1.0}, (0, 1)),
        ("ac", {"static": 1.0}, (0, 1)),
        ("hw", {}, (0, 0)),
    ],
)
def test_which_half_of_the_channels_a_term_trains(name, more, halves):
    o = objective(**{name: 1.0} | more)
    z, h, x, errors = inputs()
    term = V.TERMS[name](V.Step(z.requires_grad_(), h.requires_grad_(), x, [e.requires_grad_() for e in errors], o))
    gradient = torch.autograd.grad(term, [z, *errors], allow_unused=True)
    assert [
        gradient[0] is not None and bool(part.abs().sum() > 0)
        for part in (gradient[0] if gradient[0] is not None else z).chunk(2, -1)
    ] == list(map(bool, halves))
    assert (name == "hw") == (gradient[1] is not None)


# --- what weight 0 leaves alone -------------------------------------------------------------------


def test_without_terms_three_steps_are_those_of_plain_vjepa_to_the_bit():
    """Beside the loss as it was written before there were terms; and terms that are on draw no other initial
    weights."""
    ours = objective()
    torch.manual_seed(0)
    plain = V.VJEPA(tiny())
    assert type(V.build(tiny())) is V.VJEPA
    assert type(V.build(tiny(ld=1.0))) is type(V.build(tiny(motion=1.0))) is V.FWM
    assert not ours.weights
    assert not ours.heads
    assert not ours.full_pass
    assert ours.flops(*batch(ours.args)[1:]) < objective(ld=1.0).flops(*batch(ours.args)[1:])
    started = objective(**ALL).state_dict()
    assert all(torch.equal(v, started[k]) for k, v in ours.state_dict().items())
    optimizers = [torch.optim.AdamW(o.parameters(), lr=1e-3) for o in (ours, plain)]
    for step in range(3):
        x, keep, pred = batch(ours.args, step)
        with torch.no_grad():
            target = F.layer_norm(plain.target(x).float(), (WIDTH,))
        zhat = plain.predictor(plain.encoder(x, keep), keep, pred)
        terms = [
            (p - target.gather(1, ids[..., None].expand(-1, -1, WIDTH))).abs().mean() for p, ids in zip(zhat, pred)
        ]
        losses = [ours(x, keep, pred)[0], sum(terms) / len(terms)]
        assert torch.equal(*losses)
        for loss, optimizer, o in zip(losses, optimizers, (ours, plain)):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            o.after_step(step)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("flags, passes", [({}, 1), ({"hw": 1.0}, 1), ({"ld": 1.0}, 2), (ALL, 2)])
def test_all_terms_share_one_more_pass_of_the_encoder(flags, passes):
    o, calls = objective(**flags), []
    o.encoder.register_forward_pre_hook(lambda *_: calls.append(0))
    o(*batch(o.args))
    assert len(calls) == passes


def test_without_ema_the_target_is_the_encoder():
    o = objective(ema=0.0, final_ema=0.0)
    with torch.no_grad():
        for p in o.encoder.parameters():
            p.mul_(1.1)
    o.after_step(0)
    assert all(torch.equal(a, b) for a, b in zip(o.target.parameters(), o.encoder.parameters()))


# --- rows -----------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(flag=value, ...) -> the lines of a run of two small steps, in this process."""
    monkeypatch.setattr(M.signal, "signal", lambda *_: None)

    def call(**flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        M.launch(
            V.main,
            tiny(
                **dict(
                    steps=2, batch_size=4, micro_batch=4, log_every=1, sample_every=0, probe_data=(), workers=0,
                    warmup=1, pred_depth=1, out_dir=str(out),
                )
                | flags
            ),
        )
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]

    return call


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_and_logs_its_terms_raw_and_weighted(train, name):
    row = ROWS[name]
    lines = train(distance=True, **row)
    on = V.parse_terms(row.get("terms", ()))
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert all(
        line[f"{term}_weighted"] == pytest.approx(on[term] * line[term], rel=1e-6)
        for line in lines[:1]
        for term in on
    )
    assert not [key for key in lines[0] if key.removesuffix("_weighted") in set(V.TERMS) - set(on)]


def test_rows_are_those_of_tables_3_and_4():
    paper = V.Args(**V.PRESETS["fwm_paper"])
    # 14 rows each with the baseline; Kin-L1 stands there twice
    assert (len(V.ROWS_UCF), len(V.ROWS_PAPER)) == (13, 14)
    assert (paper.model, paper.pos) == ("vit_b", "rope")
    assert (paper.pred_depth, paper.pred_width, paper.pred_heads) == (8, 256, 8)
    assert (paper.frames, paper.stride, paper.size) == (16, 2, 224)
    assert (paper.steps, paper.batch_size, paper.distance) == (100 * 300, 32, True)
    assert (paper.lr, paper.start_lr, paper.warmup) == (6e-4, 1e-4, 300)
    for step in (0, 30_000):
        rates = V.VJEPA.schedules(SimpleNamespace(args=paper), step)
        assert (rates["weight_decay"], rates["ema"]) == (0.04, 0.99925)
    row = V.Args(**V.PRESETS["fwm_hw_ld"])
    assert V.parse_terms(row.terms) == dict(hw=1.0, static=0.05, orth=0.01, ld=1.0)
    assert row.tau == 1
    assert row.out_dir == "out/fwm_hw_ld"
    assert V.Args(**V.PRESETS["amg"]).motion == 5 and V.Args(**V.PRESETS["kin_anneal"]).data == ("ucf101.csv",)


def test_the_mixture_is_20_60_20_and_takes_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind in (("ucf101", "avi"), ("ssv2", "webm"), ("imagenet100", "jpg")):
        (tmp_path / f"{name}.{kind}").touch()
        (tmp_path / f"{name}.csv").write_text(f"{name}.{kind} 0\n")
    sources = [D.parse_list(spec) for spec in V.PRESETS["fwm_paper"]["data"]]
    plan = D.Plan(sources, 0)
    shares = np.bincount([plan.row(v) for v in range(2048)]) / 2048
    np.testing.assert_allclose(shares, [0.2, 0.6, 0.2], atol=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(motion=2.0, masks=("tube:0.9",)), "--motion places blocks"),
        (dict(temporal_keep=0.0), "--temporal_keep 0.0: a share"),
        (dict(tau=0.0), "--tau 0.0: a positive"),
        (dict(motion_uniform=1.5), "--motion_uniform 1.5: a share"),
        (dict(kin_l1=1.0, frames=4), "three slices"),
        (dict(ld=-1.0), "--terms ld:-1.0: write NAME:WEIGHT"),
        (dict(terms=("lb:1",)), "a name of hw, static, orth, ld, "),
        (dict(terms=("ld",)), "--terms ld: write"),
        (dict(terms=("ld:nan",)), "--terms ld:nan: write"),
        (dict(anneal=True), "--anneal is for"),
        (dict(motion=1.0, trim="prefix"), "not by --trim prefix"),
    ],
)
def test_flags_that_cannot_work_are_one_line(train, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(**flags)
    said = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_two_ranks_and_accumulation_log_the_losses_of_one_process(train, run, tmp_path):
    """All terms that are means over clips (orth and sigreg are statistics of a micro-batch), with guided masks,
    under DDP and FSDP2."""
    names = [name for name in V.TERMS if name not in ("orth", "sigreg")]
    one = train(steps=3, distance=True, motion=2.0, temporal_keep=0.5, warmup=2, **{name: 0.3 for name in names})
    flags = ["--terms", *(f"{name}:0.3" for name in names)]
    flags += ["--motion", 2, "--temporal_keep", 0.5, "--distance", "--pred_depth", 1]
    small = (
        "--preset", "laptop", "--steps", 3, "--batch_size", 4, "--log_every", 1, "--sample_every", 0, "--probe_data",
        "--warmup", 2, "--workers", 0,
    )
    for name, extra in (("ddp", ("--micro_batch", 1)), ("fsdp", ("--fsdp",))):
        status, last, err = run("train_vjepa.py", *small, *flags, "--out_dir", tmp_path / name, *extra, ranks=2)
        assert status == 0, err[-2000:]
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for a, b in zip(one, log[1:], strict=True):
            assert all(a[k] == pytest.approx(b[k], abs=5e-5) for k in ("loss", *names)), (name, a, b)


# --- masks ----------------------------------------------------------------------------------------


def test_motion_is_the_mean_change_of_each_token():
    x = torch.randn(2, 3, 8, 32, 32)
    x[1] = x[1, :, :1]  # a still clip
    got, d = V.motion_map(x, 2, 8).double().numpy(), np.abs(np.diff(x[0].double().numpy(), axis=1))
    d = np.concatenate([d, d[:, -1:]], 1).reshape(3, 4, 2, 4, 8, 4, 8).mean((0, 2, 4, 6))
    np.testing.assert_allclose(got[0], d / d.max(), rtol=1e-5)
    assert (got[1] == 0).all()


@pytest.mark.parametrize("strength, uniform", [(2.0, 0.1), (5.0, 0.0), (0.0, 0.0)])
def test_centres_follow_the_formula(strength, uniform):
    motion, n = np.random.default_rng(0).random((4, 4, 4)), 200_000
    got = np.bincount(V.motion_centres(np.random.default_rng(1), motion, n, strength, uniform), minlength=64) / n
    want = np.exp(strength * motion.ravel())
    want = (1 - uniform) * want / want.sum() + uniform / 64
    assert np.abs(got - want).max() < 5 * np.sqrt(want.max() / n)
    assert ((got - want) ** 2 / want).sum() * n < 63 + 5 * math.sqrt(2 * 63)


def guided(motion, rows=slice(0, 32), specs=("4x0.1", "2x0.4x0.5"), grid=(4, 8, 8), temporal_keep=1.0):
    masks = D.sample_masks(specs, 0, 3, 32, grid, rows=rows, temporal_keep=temporal_keep)
    return masks, V.guide_masks(
        *masks, motion[rows], tiny(masks=specs, motion=2.0, temporal_keep=temporal_keep), 3, rows.start
    )


@pytest.mark.parametrize("temporal_keep", [1.0, 0.5])
def test_guided_masks_are_as_long_as_the_uniform_ones_and_disjoint(temporal_keep):
    """And a clip's masks do not depend on which other clips are there."""
    motion = torch.rand(32, 4, 8, 8)
    before, after = guided(motion, temporal_keep=temporal_keep)
    for a, b in zip(before[0] + before[1], after[0] + after[1]):
        assert a.shape == b.shape and b.dtype == torch.int64 and (b.diff(dim=1) > 0).all() and not torch.equal(a, b)
    assert all(not set(k) & set(p) for keep, pred in zip(*after) for k, p in zip(keep.tolist(), pred.tolist()))
    parts = [guided(motion, slice(i, i + 8), temporal_keep=temporal_keep)[1] for i in range(0, 32, 8)]
    for side in (0, 1):
        for i in (0, 1):
            assert torch.equal(torch.cat([part[side][i] for part in parts]), after[side][i])


def test_guided_masks_hide_what_moves():
    """A corner of every clip moves: it is predicted more often than without guidance, and hidden to the context."""
    motion = torch.zeros(32, 4, 8, 8)
    motion[:, :, :3, :3] = 1
    corner = motion[0].flatten() > 0
    before, after = guided(motion, specs=("2x0.1",))
    share = lambda ids: corner[ids[0]].float().mean().item()
    assert share(after[1]) > 1.5 * share(before[1]) and share(after[0]) < 0.8 * share(before[0])


@pytest.mark.parametrize("step", range(4))
def test_the_context_holds_no_token_of_a_guided_block(step, monkeypatch):
    """Two blocks of 70 % that slide to opposite corners cover the frame: such a clip is drawn again, and its
    context is not scattered over what they hide."""
    grid, drawn, real = (8, 14, 14), {}, V.motion_centres
    monkeypatch.setattr(
        V, "motion_centres", lambda rng, *rest: drawn.setdefault(rng, []).append(real(rng, *rest)) or drawn[rng][-1]
    )
    masks = D.sample_masks(("2x0.7",), 0, step, 16, grid)
    motion = torch.rand(16, *grid, generator=torch.Generator().manual_seed(step))
    (keep,), _ = V.guide_masks(*masks, motion, tiny(masks=("2x0.7",), motion=2.0), step, 0)
    _, high, wide = D.block_shape(np.random.default_rng([0, step, 0]), grid, 0.7)
    for ids, (*_, centres) in zip(keep.tolist(), drawn.values()):
        for centre in centres:
            top, left = (
                min(max(c - side // 2, 0), 14 - side)
                for c, side in zip((centre // 14 % 14, centre % 14), (high, wide))
            )
            assert not any(top <= i // 14 % 14 < top + high and left <= i % 14 < left + wide for i in ids)
    assert len(drawn) == 16


@pytest.mark.parametrize("specs", [["8x0.15", "2x0.7"], ["4x0.3x0.5"], ["random:0.5"]])
@pytest.mark.parametrize("share, slices", [(0.5, 4), (0.3, 2), (0.05, 1)])
def test_future_prediction_keeps_the_first_slices_and_predicts_all_the_rest(specs, share, slices):
    keep, pred = D.sample_masks(specs, 0, 0, 16, (8, 14, 14), temporal_keep=share)
    for k, p in zip(keep, pred):
        assert k.max() // 196 < slices and k.shape[1] + p.shape[1] == 8 * 196
        assert all(sorted(a + b) == list(range(8 * 196)) for a, b in zip(k.tolist(), p.tolist()))


# --- the table ------------------------------------------------------------------------------------


def test_compare_prints_deltas_to_the_baseline(tmp_path, capsys, monkeypatch):
    for name, online, probed in (("base", 0.5, 0.25), ("ld", 0.625, None), ("hw", None, 0.5)):
        (tmp_path / name).mkdir()
        log = [{"config": {}}]
        if online:
            log += [{"step": 1, "probe_acc": 0.1}, {"step": 2, "probe_acc": online}]
        if name == "base":  # 2 steps of 900 clips at 0.5 a second: an hour
            log[0] = {"config": {"batch_size": 900}}
            ended = {"step": 2, "loss": 0.5, "flops": 1e9, "rankme": 9.0, "random_acc": 0.15, "clips_per_s": 0.5}
            log.insert(2, ended)
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if probed:
            line = {"task": "classify", "metric": "top1", "value": probed, "head": "linear", "encoder": name}
            line["args"] = {"data": "", "val": "x/ssv2.csv"}
            random = line | {"value": 0.1, "encoder": f"random:{name}"}  # of the same folder: not the run's
            lines = "".join(json.dumps(x) + "\n" for x in (line, random))
            (tmp_path / name / "probe.jsonl").write_text(lines)
    (tmp_path / "notes").mkdir()
    runs = tuple(str(tmp_path / name) for name in ("base", "hw", "ld", "notes"))
    P.main(P.Args("compare", runs=runs, out_dir=str(tmp_path / "out")))
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table if "---" not in row] == [
        ["run", "step", "flops", "loss", "rankme", "random_acc", "hours", "online probe", "Δ", "x/ssv2.csv, linear",
         "Δ"],
        ["base", "2", "1.00e+09", "0.5000", "9.0", "15.00%", "1.00", "50.00", "", "25.00", ""],
        ["hw", *"------", "-", "-", "50.00", "+25.00"],
        ["ld", "2", *"-----", "62.50", "+12.50", "-", "-"],
    ]
    assert json.loads(last)["value"][runs[2]] == {"online probe": 0.125} and json.loads(last)["baseline"] == runs[0]
    P.main(P.Args("compare", runs=runs[:3], baseline=runs[2], out_dir=str(tmp_path / "out")))
    assert "| 1.00 | 50.00 | -12.50 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        P.main(P.Args("compare", runs=runs[3:], out_dir=str(tmp_path / "out")))
    (tmp_path / "hw" / "probe.jsonl").open("a").write(
        json.dumps({"task": "classify", "value": 0.75, "head": "linear", "encoder": "hw",
                    "args": {"data": "", "val": "y/ssv2.csv"}})
        + "\n"
    )
    capsys.readouterr()
    # another list, another column
    P.main(P.Args("compare", runs=runs[:2], out_dir=str(tmp_path / "out")))
    assert "x/ssv2.csv, linear | Δ | y/ssv2.csv, linear" in capsys.readouterr().out
    monkeypatch.setattr(P.sys, "argv", ["probe.py", "compare", "a", "b", "--baseline", "a"])
    assert P.parse_args().runs == ("a", "b")


def test_a_task_that_a_method_cannot_do_has_no_figures_in_the_suites_table(capsys, monkeypatch):
    import bench

    depth = {"value": 0.2, "random": 0.4, "metric": "absrel", "constant": 0.5}
    physics = {"value": 0.6, "random": 0.5, "metric": "relative_accuracy", "constant": 0.5}
    found = {"DINO 1": {"method": "DINO", "suite": [{"physics": {}, "depth": depth}] * 2}, "V-JEPA 0": {},
             "V-JEPA 1": {"method": "V-JEPA", "suite": [{"physics": physics, "depth": depth}]}}
    bench.print_suite(found, ["physics", "depth"])
    title, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "| method | physics, relative_accuracy | random | depth, absrel | random |"
    assert rows == ["| DINO | - | - | 0.200 +- 0.000 | 0.400 +- 0.000 |", "| V-JEPA | 0.600 | 0.500 | 0.200 | 0.400 |",
                    "| constant | 0.500 | | 0.500 | |"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "compare", "--out", "x", "--suite", "depht"])
    with pytest.raises(SystemExit, match="--suite depht: choose from classify"):
        bench.compare(bench.parse_args())


def test_rates_are_chosen_by_halves_that_have_every_label():
    """The built-in world's labels take turns: of every other row a probe learns only half of them. By groups: no person
    is in both."""
    import bench

    world = D.parse_list("world", "probe")
    probes = object.__new__(bench.MotionProbes)
    probes.clips = {"motion": None}
    probes.halves = {"motion": bench.half_of(world, range(64), "user")}
    y = torch.arange(64) % 8
    features = F.one_hot(y).float() + 0.01 * torch.randn(64, 8)
    half = (features, y, torch.ones(64, dtype=torch.bool))
    probes.read = lambda run, name: (half, half)
    assert probes.both("run") == {"val": {"motion": 1.0}, "on_train": {"motion": 1.0}}
    paths = D.Paths.of([f"/v/user{i % 5}_{i}.mp4" for i in range(40)])
    half = bench.half_of(D.Source("l", paths, np.zeros(40)), np.arange(2, 40), r"user\d+")
    people = (np.arange(2, 40) % 5)
    assert len(half) == 38 and not {*people[half]} & {*people[~half]} and 10 < half.sum() < 30


def test_a_variant_learns_at_the_rate_of_its_method(monkeypatch):
    import bench

    low, high = bench.rates("laptop", "SALT")
    asked = []
    monkeypatch.setattr(bench, "compared_run", lambda args, name, lr, flops, seed: asked.append((name, flops)) or lr)
    monkeypatch.setattr(bench, "judged", lambda args, probes, lr, seed: {"on_train": {"motion": lr, "signs": 0.5}})
    args = bench.argparse.Namespace(seeds=[3, 4], recipe="laptop", tasks=[], data=[])
    assert bench.best_rate(args, None, "SALT, tube teacher masks", 1e12) == high == 2 * low
    assert asked == [("SALT", 1e12)] * 2
    # trained on files, the files' own task says which
    monkeypatch.setattr(bench, "judged", lambda args, probes, lr, seed: {"on_train": {"motion": lr, "signs": -lr}})
    args = bench.argparse.Namespace(seeds=[3], recipe="laptop", tasks=["signs=a,b"], data=["a"])
    assert bench.best_rate(args, None, "SALT", 1e12) == low


@pytest.mark.parametrize("recipe", ["laptop", "video", "paper"])
def test_every_row_of_the_comparison_is_a_command_that_its_script_takes(recipe, tmp_path, monkeypatch):
    import bench

    words = ["bench.py", "compare", "--recipe", recipe, "--launch", "torchrun --nproc-per-node 8", "--data", "k400.csv",
             "--model", "vit_b", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    args = bench.parse_args()
    commands = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **how: commands.append(command) or done)
    for name in bench.RECIPES[recipe]:
        lr, twice = bench.rates(recipe, name)
        out = bench.compared_run(args, name, twice, 1e21, 3)
        launch, script, flags = commands[-1][:3], commands[-1][3], commands[-1][4:]
        assert launch == ["torchrun", "--nproc-per-node", "8"]
        said = sys.modules[script.removesuffix(".py")].parse_args(flags)
        assert (said.lr, said.flops, said.seed, said.out_dir) == (2 * lr, 1e21, 3, str(out))
        assert said.model == ("vit_b" if recipe == "paper" else "vit_n") and said.data == ("k400.csv",)
        if script != "train_salt.py":  # whose stages build themselves
            build = sys.modules[script.removesuffix(".py")].build
            objective = M.construct(build, dataclasses.replace(said, dry_run=True))
            assert said.micro_batch or not getattr(objective, "by_pass", ()), name


def test_methods_share_the_figures_of_equal_random_weights_only(tmp_path):
    import bench

    shape = dict(width=16, depth=2, heads=2, mlp=16, patch=8, frames=8, size=32)
    args = bench.argparse.Namespace(out=str(tmp_path), suite=["depth"])

    def twin(seed=0, layer=2, stride=2, **more):
        encoder = M.ViT(**(shape | more))
        config = encoder.config | M.IMAGENET | {"layer": layer, "stride": stride}
        M.save_encoder(tmp_path / "encoder.safetensors", encoder, config)
        return bench.random_twin(args, tmp_path / "encoder.safetensors", seed)

    assert twin() == twin() == twin(levels=2)  # the norms of levels are not read
    others = [twin(seed=1), twin(highpass=1.0), twin(layer=1), twin(stride=3), twin(patch=7, size=28)]
    assert len({twin(), *others}) == 6
    args.suite = ["physics"]  # asks predictors, which differ where encoders do not
    (tmp_path / "a").mkdir()
    twin()
    pair = [tmp_path / "encoder.safetensors", tmp_path / "a" / "other.safetensors"]
    pair[1].write_bytes(pair[0].read_bytes())
    assert len({bench.random_twin(args, path, 0) for path in pair}) == 2


def test_clips_at_two_speeds_both_ways(tmp_path):
    """The slower clip has every frame of the middle half of the faster one; four clips of a moment, two moments of a
    video when there are few."""
    import bench

    frames = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    for i in range(3):
        folder = tmp_path / f"v{i}"
        folder.mkdir()
        for j, frame in enumerate(frames):
            D.save_png(folder / f"{j:03d}.png", frame)
    (tmp_path / "list.txt").write_text("v0\nv1\nv2\n")
    clips = bench.time_clips(f"{tmp_path}/list.txt", 8, 1, 32, most=12)
    assert clips.shape == (6, 4, 8, 32, 32, 3)
    slow, fast, back, fast_back = clips[..., 16, 16, 0].long().unbind(1)
    assert torch.equal(slow.diff(), torch.ones(6, 7).long()) and torch.equal(fast.diff(), 2 * torch.ones(6, 7).long())
    assert torch.equal(back, slow.flip(1)) and torch.equal(fast_back, fast.flip(1))
    assert torch.equal(slow[:, 0] - fast[:, 0], torch.full((6,), 4))
    still = M.ViT(width=16, depth=1, heads=2, mlp=16, patch=8, frames=8, size=32, tubelet=1, images=True, pos="learned")
    assert bench.reads_time(still, M.IMAGENET, torch.zeros_like(clips)) == 0.25  # nothing moves: one answer for all


def test_halves_tell_a_still_half_of_the_channels_from_one_that_changes(tmp_path):
    """An encoder whose first channels are a function of the place and whose second ones of the pixels: the
    picture's two curves."""
    pytest.importorskip("matplotlib")
    import bench

    torch.manual_seed(0)
    encoder = M.ViT(width=32, depth=1, heads=2, mlp=64, patch=8, frames=8, size=32, init_std=0.2)
    encoder.norm = torch.nn.Identity()
    real = encoder.forward

    def forward(x, **_):
        z = real(x)
        # appearance: of the first slice, in all of them
        return torch.cat([z[:, :16].repeat(1, 4, 1)[..., :16], z[..., 16:]], -1)

    encoder.forward = forward
    config = dict(
        frames=8, stride=1, size=32, images=False, tubelet=2, patch=8, width=32, depth=1, mean=[0.5] * 3, std=[0.5] * 3
    )
    P_load, P.load = P.load, lambda args: (encoder, config)
    try:
        args = P.Args("compare", data="world", val_clips=32, workers=0, out_dir=str(tmp_path))
        made = bench.similar_halves(args, ["a"], torch.device("cpu"))
        with pytest.raises(D.DataError, match="no two slices"):
            bench.similar_halves(dataclasses.replace(args, frames=2), ["a"], torch.device("cpu"))
    finally:
        P.load = P_load
    curves = made["halves"]["a"]
    assert len(curves["dynamics"]) == 3
    assert curves["appearance"] == pytest.approx([1, 1, 1], abs=0.05)
    assert max(curves["dynamics"]) < 0.9
    assert (tmp_path / "halves.png").exists()


def test_another_runs_weights_may_lack_heads_and_nothing_else(run, tmp_path):
    tiny = ("--preset", "laptop", "--batch_size", "4", "--workers", "0", "--probe_data", "--sample_every", "0")
    status, _, err = run("train_vjepa.py", *tiny, "--steps", "1", "--out_dir", tmp_path / "plain")
    assert status == 0, err
    status, last, err = run(
        "train_vjepa.py", *tiny, "--steps", "1", "--terms", "ld:1", "--init", tmp_path / "plain", "--out_dir",
        tmp_path / "ld",
    )
    assert status == 0 and math.isfinite(last["loss"]), err
    status, _, err = run(
        "train_vjepa.py", *tiny, "--steps", "1", "--pred_width", "32", "--init", tmp_path / "plain", "--out_dir",
        tmp_path / "narrow",
    )
    assert status == 2 and err.count("error:") == 1 and "predictor" in err and not (tmp_path / "narrow").exists(), err
