"""V-JEPA 2.1 in train_vjepa.py: levels, the loss on the context, images as images; each against float64 numpy that
shares no line with the code.
"""
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data as D
import model as M
import probe as P
import train_vjepa as V


def tiny(**changes):
    return dataclasses.replace(V.Args(**V.PRESETS["laptop"]), **changes)


# --- the formulas


def norm(z, scale, shift, eps):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + eps) * scale + shift


def places_of(ids, grid, side):
    """(n,3): t, and h and w on the axis of `side` places, where it is not 0."""
    _, H, W = grid
    t, h, w = ids // (H * W), ids // W % H, ids % W
    if side:
        h, w = h * (side - 1) / (H - 1), w * (side - 1) / (W - 1)
    return np.stack([t, h, w], 1).astype(np.float64)


def turned(q, places):
    """One head's q (n,d): each axis turns a third of the channels, pair by pair."""
    a = 2 * (q.shape[1] // 6)
    q = q.copy()
    for axis in range(3):
        for pair in range(a // 2):
            angle = places[:, axis] * 10000 ** (-2 * pair / a)
            c = axis * a + 2 * pair
            even, odd = q[:, c].copy(), q[:, c + 1].copy()
            q[:, c] = even * np.cos(angle) - odd * np.sin(angle)
            q[:, c + 1] = odd * np.cos(angle) + even * np.sin(angle)
    return q


def block(w, at, z, places, heads):
    d = z.shape[1] // heads

    def linear(y, name):
        return y @ w[f"{at}.{name}.weight"].T + w[f"{at}.{name}.bias"]

    qkv = linear(norm(z, w[f"{at}.norm1.weight"], w[f"{at}.norm1.bias"], 1e-6), "attn.qkv")
    out = []
    for head in range(heads):
        q, k, v = (qkv[:, (part * heads + head) * d :][:, :d] for part in range(3))
        score = turned(q, places) @ turned(k, places).T / np.sqrt(d)
        score = np.exp(score - score.max(1, keepdims=True))
        out.append(score / score.sum(1, keepdims=True) @ v)
    z = z + linear(np.concatenate(out, 1), "attn.proj")
    y = linear(norm(z, w[f"{at}.norm2.weight"], w[f"{at}.norm2.bias"], 1e-6), "mlp.fc1")
    return z + linear(F.gelu(torch.from_numpy(y)).numpy(), "mlp.fc2")


def encode(state, x, heads, side, ends, ids=None):
    """The normed levels [(n,D)] of one clip x (3,T,H,W), or of its tokens ids, in patches of 8; `ends`: blocks run
    before each."""
    w = {name: value.detach().double().numpy() for name, value in state.items()}
    still = x.shape[1] == 1
    embed, kind, a = ("patch_embed_img", "img_mod_embed", 1) if still else ("patch_embed", "video_mod_embed", 2)
    _, T, H, W = x.shape
    grid = (T // a, H // 8, W // 8)
    ids = np.arange(math.prod(grid)) if ids is None else ids
    tokens = []
    for place in ids:
        t, i, j = np.unravel_index(place, grid)
        cube = x[:, t * a : t * a + a, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8]
        token = (w[f"{embed}.proj.weight"] * cube).sum((1, 2, 3, 4)) + w[f"{embed}.proj.bias"]
        tokens.append(token + w.get(kind, np.zeros((1, 1, 1)))[0, 0])
    z, places, levels = np.array(tokens), places_of(ids, grid, side), []
    for i in range(max(ends)):
        z = block(w, f"blocks.{i}", z, places, heads)
        if i + 1 in ends:
            name = "norm" if i + 1 == ends[-1] else f"level_norms.{ends.index(i + 1)}"
            levels.append(norm(z, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6))
    return levels


def predict(state, z, keep, pred, grid, heads, side, token):
    """Guesses (M,LD) at pred and (K,LD) at keep of one clip, from z (K,LD)."""
    w = {name: value.detach().double().numpy() for name, value in state.items()}

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    if "predictor_embed.0.weight" in w:
        z = F.gelu(torch.from_numpy(linear(z, "predictor_embed.0"))).numpy()
        z = linear(z, "predictor_embed.2")
    else:
        z = linear(z, "predictor_embed")
    x = np.concatenate([z, np.tile(w[f"mask_tokens.{token}"][0], (len(pred), 1))])
    x = x + w.get("img_mod_embed" if grid[0] == 1 else "video_mod_embed", np.zeros((1, 1, 1)))[0, 0]
    places = places_of(np.concatenate([keep, pred]), grid, side)
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("predictor_blocks"))
    for i in range(depth):
        x = block(w, f"predictor_blocks.{i}", x, places, heads)
    x = norm(x, w["predictor_norm.weight"], w["predictor_norm.bias"], 1e-6)
    return linear(x[len(keep) :], "predictor_proj"), linear(x[: len(keep)], "predictor_proj_context")


def loss_of(objective, x, keep, pred, weight):
    """SPEC's L of clips x (B,3,T,H,W): mean over masks of the L1 at the hidden tokens, and weight times that of
    |zhat - h| / sqrt(d) at the context's."""
    args = objective.args
    ends = [i + 1 for i in range(4)] if args.levels == 4 else [4]
    still = x.shape[2] == 1
    grid = (1 if still else 4, args.size // 8, args.size // 8)
    hidden, context = [], []
    for b, clip in enumerate(x.double().numpy()):
        h = encode(objective.target.state_dict(), clip, 4, args.rope_scaled, ends)
        h = np.concatenate([norm(level, 1.0, 0.0, 1e-5) for level in h], 1)
        for i, (seen, wanted) in enumerate(zip(keep, pred)):
            seen, wanted = seen[b].numpy(), wanted[b].numpy()
            z = encode(objective.encoder.state_dict(), clip, 4, args.rope_scaled, ends, seen)
            guess, also = predict(objective.predictor.state_dict(), np.concatenate(z, 1), seen, wanted, grid,
                                  args.pred_heads, args.rope_scaled, i)
            hidden.append(np.abs(guess - h[wanted]).mean())
            apart = places_of(seen, grid, 0)[:, None] - places_of(wanted, grid, 0)[None]
            near = np.sqrt((apart**2).sum(2)).min(1)
            context.append((np.abs(also - h[seen]) / np.sqrt(near)[:, None]).mean())
    return np.mean(hidden) + weight * np.mean(context), np.mean(context)


def setting(frames=8, B=2, **changes):
    """An objective whose target and modality vectors differ from its encoder's, clips and masks."""
    args = tiny(**changes)
    torch.manual_seed(0)
    objective = V.build(args)
    with torch.no_grad():
        for name, p in objective.named_parameters():
            # the predictor's mask tokens and all vectors start at 0 or next to it
            p.add_(0.1 * torch.randn_like(p) if "token" in name or "mod_embed" in name else 0.03 * torch.randn_like(p))
    x = torch.randn(B, 3, frames, args.size, args.size)
    draw = objective.image_masks if frames == 1 else objective.masks
    keep, pred = draw(0, args.batch_size, rows=slice(0, B))
    return objective, x, *objective.place(keep, pred, x, 0, 0)


CASES = [
    dict(levels=4, context_loss=0.5, rope_scaled=16),
    dict(levels=1, context_loss=0.7),
    dict(levels=4, context_loss=0.5, rope_scaled=16, stills=True),
    dict(levels=4, context_loss=0.5, rope_scaled=16, stills=True, frames=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_is_the_formula(case):
    """L of two clips, or of two images, on random weights: against the whole of it in float64, encoder, predictor and
    target included."""
    case = dict(case)
    frames = case.pop("frames", 8)
    objective, x, keep, pred = setting(frames, **case)
    loss, metrics = objective(x, keep, pred)
    want, context = loss_of(objective, x, keep, pred, case["context_loss"])
    print(f"loss {loss.item():.6f}, by float64 {want:.6f}")
    assert abs(loss.item() - want) < 2e-6 and abs(metrics["loss_context"].item() - context) < 2e-6
    if frames == 1:
        assert keep[0].max() < 16 and pred[0].max() < 16


def test_gradient_paths():
    """Every trained parameter has a gradient, of either kind of clip: DDP waits for all. The unused kind's is 0; that
    of the context's output layer is 0 while the ramp is; the target has none."""
    for frames, unused in ((8, "patch_embed_img"), (1, "patch_embed.")):
        objective, x, keep, pred = setting(frames, levels=4, context_loss=0.5, stills=True, context_ramp=(10, 20))
        # 15: half of the way
        for step, weight in ((0, 0.0), (15, 0.25), (40, 0.5)):
            objective.zero_grad()
            objective.step = step
            assert objective.schedules(step)["context_weight"] == weight
            objective(x, keep, pred)[0].backward()
            for name, p in objective.named_parameters():
                if name.startswith("target."):
                    assert p.grad is None
                    continue
                assert p.grad is not None, name
                silent = name.startswith(f"encoder.{unused}") or (weight == 0 and "proj_context" in name)
                silent |= ("img_mod" if frames == 8 else "video_mod") in name
                assert bool(p.grad.any()) != silent, (name, step)
        last = [p for name, p in objective.encoder.named_parameters() if name.startswith("level_norms.0")]
        assert all(p.grad.any() for p in last)  # deep supervision reaches the first level


def test_off_is_what_it_was():
    """Without its flags there is no parameter, no rate and no metric of V-JEPA 2.1; levels=True of one level is the
    plain output."""
    objective, x, keep, pred = setting()
    assert not [name for name in objective.state_dict() if "level" in name or "mod_embed" in name or "context" in name]
    assert set(objective.schedules(0)) == {"lr", "weight_decay", "ema"}
    assert "loss_context" not in objective(x, keep, pred)[1]
    assert torch.equal(objective.encoder(x, levels=True), objective.encoder(x))
    assert M.level_ends(12, 4) == [3, 6, 9, 12] and M.level_ends(24, 4) == [6, 12, 18, 24]
    assert M.level_ends(40, 4) == [10, 20, 30, 40] and M.level_ends(48, 4) == [12, 24, 38, 48]


def test_flops_with_levels_and_context():
    """The predictor's second output layer and its wider input are counted, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    objective, x, keep, pred = setting(B=1, levels=4, context_loss=0.5)
    with FlopCounterMode(display=False) as counter:
        objective(x, keep, pred)[0].backward()
    # the first layer's input has no gradient
    first = 2 * sum(ids.shape[1] for ids in keep) * objective.encoder.patch_embed.proj.weight.numel()
    assert objective.flops(keep, pred) - first == counter.get_total_flops()


# --- images


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Six videos and ten images in two lists."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png {i % 2}")
    (folder / "stills.txt").write_text("\n".join(rows))
    return folder


def test_micro_batches_are_of_one_kind(mixture):
    """A mixture 0.75 to 0.25: a quarter of the micro-batches are images, one frame each, in the same order on any
    number of ranks and after a resume."""
    sources = [D.parse_list("world:0.75"), D.parse_list(f"{mixture}/stills.txt:0.25")]
    clip = D.Clip(frames=4, size=16, train=True)

    def taken(rank=0, ranks=1, first=0):
        loader = D.make_loader(sources, clip, seed=0, batch_size=8, micro_batch=2, steps=4, start_step=first,
                               rank=rank, ranks=ranks, stills=True)
        return [(batch["video"].shape[1], batch["path"], batch["video"]) for batch in loader]

    whole = taken()
    assert [frames for frames, _, _ in whole] == [4, 4, 4, 1] * 4
    assert all(path.endswith(".png") == (frames == 1) for frames, paths, _ in whole for path in paths)
    images = [path for frames, paths, _ in whole if frames == 1 for path in paths]
    assert len(set(images)) == 8  # another image each time, of ten
    parts = [taken(rank, 2) for rank in (0, 1)]
    mixed = [row for step in range(4) for part in parts for row in part[2 * step : 2 * step + 2]]
    for a, b in zip(whole, mixed):
        assert a[:2] == b[:2] and torch.equal(a[2], b[2])
    for a, b in zip(whole[8:], taken(first=2)):
        assert a[:2] == b[:2] and torch.equal(a[2], b[2])
    assert {b["video"].shape[1] for b in D.make_loader(
        sources[1:], clip, seed=0, batch_size=8, micro_batch=2, steps=1, stills=True)} == {1}
    assert {b["video"].shape[1] for b in D.make_loader(
        sources[:1], clip, seed=0, batch_size=8, micro_batch=2, steps=1, stills=True)} == {4}


def test_the_loader_draws_the_masks_of_either_kind(mixture):
    """Of images on their own grid, of the rows that these clips are in the step's batch."""
    objective = V.build(tiny(stills=True))
    sources = [D.parse_list("world:0.5"), D.parse_list(f"{mixture}/stills.txt:0.5")]
    loader = D.make_loader(
        sources, D.Clip(frames=8, size=32, train=True), seed=0, batch_size=8, micro_batch=2, steps=2, stills=True,
        masks=(objective.masks, objective.image_masks))
    for number, batch in enumerate(loader):
        step, first = divmod(2 * number, 8)
        still = batch["video"].shape[1] == 1
        draw = objective.image_masks if still else objective.masks
        whole = draw(step, 8)
        assert number % 2 == still and max(ids.max() for ids in batch["masks"][1]) < (16 if still else 64)
        for got, want in zip(batch["masks"], whole):
            assert all(torch.equal(a, b[first : first + 2]) for a, b in zip(got, want))


def test_ranks_with_another_kind_each(run, mixture, tmp_path):
    """FSDP2 on two ranks, of which one has videos and the other images at a time, with terms that only videos have:
    no rank waits for the other, and the losses are those of one process."""
    flags = ["--preset", "laptop", "--data", "world:0.5", f"{mixture}/stills.txt:0.5", "--stills", "--levels", 4,
             "--context_loss", 0.5, "--terms", "ld:1.0", "--steps", 2, "--batch_size", 4, "--micro_batch", 2,
             "--probe_data", "--log_every", 1, "--sample_every", 0, "--workers", 0]
    got = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        status, last, err = run("train_vjepa.py", *flags, "--fsdp", "--out_dir", out, ranks=ranks)
        assert status == 0 and last["steps"] == 2, err[-2000:]
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines()[1:])
        got.append([(line["loss"], line["flops"] / 1e9) for line in lines])
    # the FLOPs are those of both kinds, not rank 0's twice
    assert np.abs(np.array(got[0]) - got[1]).max() < 1e-5, got


@pytest.mark.parametrize("flags, says", [
    (["--stills", "--highpass", "4"], "highpass takes all of a single frame"),
    (["--pos", "sincos", "--rope_scaled", "16"], "are for --pos rope"),
    (["--pos", "sincos", "--rope_quirk"], "are for --pos rope"),
    (["--context_loss", "0.5", "--context_ramp", "9", "3"], "--context_ramp"),
])
def test_flags_that_would_do_nothing_are_refused(flags, says):
    args = V.parse_args(["--preset", "laptop", *flags])
    with pytest.raises(M.UserError, match=says):
        M.construct(V.build, args)


def test_stills_need_images(tmp_path):
    args = V.parse_args(["--preset", "laptop", "--stills", "--out_dir", str(tmp_path / "out")])
    with pytest.raises(M.UserError, match="--stills: no list of --data is of images alone"):
        V.main(args)
    assert not (tmp_path / "out").exists()


def test_images_are_probed_as_they_were_trained(mixture, monkeypatch, tmp_path):
    """By the online probe and by probe.py: as clips of one frame, through the embedding of images. An encoder without
    one gets still clips."""
    labelled = D.parse_list(f"{mixture}/stills.txt", labelled=True)
    videos = D.parse_list("world")
    for stills, frames in ((True, 1), (False, 8)):
        encoder = V.VJEPA(tiny(stills=stills)).target
        config = encoder.config | M.IMAGENET
        pair = []
        for source in (labelled, videos):
            args = P.Args("classify", out_dir=str(tmp_path), workers=0)
            features = P.Features(
                args, encoder, config, source, D.Clip(8, size=32, train=False), torch.device("cpu"), (4,), form="mean")
            pair.append(features)
        assert [features.clip.frames for features in pair] == [frames, 8]
        x, _, _ = next(pair[0].batches(np.arange(2)))
        video = next(iter(D.eval_batches(labelled, pair[0].clip, rows=[0, 1], batch_size=2)))
        assert torch.equal(x["video"][:, 0, 0], encoder(D.prepare(video), blocks=(4,)).mean(1))
    seen = []
    args = tiny(stills=True, out_dir=str(tmp_path / "out"), steps=1, dtype="fp32")
    run = M.Run(args)
    run.probe(lambda x: seen.append(x.shape[2]) or x.mean((2, 3, 4)), [labelled, labelled], run.clip,
              {"probe_acc": M.linear_probe})
    assert set(seen) == {1}


def test_the_plan_of_a_mixture_counts_images_as_images(mixture, tmp_path, capsys):
    flags = ["--preset", "laptop", "--data", "world:0.25", f"{mixture}/stills.txt:0.75", "--stills", "--steps", "1",
             "--batch_size", "8", "--micro_batch", "2", "--probe_data", "--log_every", "1", "--sample_every", "0",
             "--workers", "0", "--out_dir", str(tmp_path)]
    V.main(V.parse_args(flags))
    told = float(re.search(r"([\d.e+]+) FLOPs a step", capsys.readouterr().err)[1])
    sketch = M.construct(V.build, V.parse_args([*flags, "--dry_run"]))
    clips, images = (M.mean_cost([(1.0, part)], 8) for part in (sketch, sketch.of_images()))
    assert images < clips / 5 and told == pytest.approx(0.25 * clips + 0.75 * images, rel=0.01)


def test_masks_that_no_image_can_have_are_refused_before_the_first_comes():
    args = V.parse_args(["--preset", "laptop", "--stills", "--masks", "causal:0.5"])
    with pytest.raises(M.UserError, match="causal"):
        M.construct(V.build, args)


def test_a_mixture_trains(mixture, tmp_path):
    """Videos and images, levels, context loss and a term of FWM, in one process: finite losses, a picture, and an
    encoder that gives an image 16 tokens."""
    args = V.parse_args([
        "--preset", "laptop", "--data", "world:0.5", f"{mixture}/stills.txt:0.5", "--stills", "--levels", "4",
        "--context_loss", "0.5", "--terms", "delta:0.5", "hw:0.3", "--steps", "4", "--batch_size", "4",
        "--micro_batch", "2", "--probe_data", "--log_every", "1", "--sample_every", "4", "--workers", "0", "--out_dir",
        str(tmp_path / "out")])
    V.main(args)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 4 and all(line["loss_context"] > 0 for line in lines)
    # at the first step encoder and target are one
    assert lines[0]["delta"] == 0 and all(line["delta"] > 0 for line in lines[1:])
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    encoder, config = M.load_encoder(tmp_path / "out")
    assert config["stills"] and config["levels"] == 4
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 1, 32, 32)).shape == (1, 16, 128)
        assert encoder(torch.randn(1, 3, 8, 32, 32)).shape == (1, 64, 128)


def test_a_budget_counts_images_as_images(mixture, tmp_path):
    """--flops where three quarters are single frames, which cost a ninth of a clip."""
    asked = 4e10
    args = V.parse_args([
        "--preset", "laptop", "--data", "world:0.25", f"{mixture}/stills.txt:0.75", "--stills", "--flops", str(asked),
        "--batch_size", "8", "--micro_batch", "2", "--probe_data", "--log_every", "1", "--sample_every", "0",
        "--workers", "0", "--out_dir", str(tmp_path)])
    V.main(args)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] > 10 and abs(last["flops"] / asked - 1) < 0.01 + 1 / last["step"], last
