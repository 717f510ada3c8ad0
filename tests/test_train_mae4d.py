"""train_mae4d.py: the loss against float64 numpy, what the first blocks see, the paper's parameter counts, ranks,
resume, the memory plan."""
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as D
import model as M
import probe as P
import train_mae4d as T
from test_train_vjepa import counted, losses

TINY = ("--preset", "laptop", "--steps", 6, "--batch_size", 8, "--log_every", 1, "--sample_every", 0, "--probe_data",
        "--warmup", 2)


def setting(seed=0, B=3, **changes):
    args = dataclasses.replace(T.Args(**T.PRESETS["laptop"]), **changes)
    torch.manual_seed(seed)
    objective, rng = T.MAE4D(args), np.random.default_rng(seed)
    x = torch.from_numpy(rng.random((B, 3, args.frames, args.size, args.size), dtype=np.float32))
    return args, objective, x, D.sample_masks([args.mask], seed, 0, B, objective.encoder.grid)[0][0]


def test_patches_and_back():
    x = torch.randn(2, 3, 4, 8, 8)
    tokens = M.patches(x, 2, 4)
    assert torch.equal(tokens[1, 1, 0, 1, 2], x[1, 2, 2:4, :4, 4:])
    assert torch.equal(M.unpatch(tokens.flatten(1, 3).flatten(2), (2, 2, 2), 2, 4), x)


@pytest.mark.parametrize("out_patch", [(2, 8), (4, 16)])
def test_loss_is_the_mean_squared_error_of_rgb_over_all_patches(out_patch):
    """Against float64 numpy on the decoded clip, seen and hidden patches alike; also for a grid coarser than the
    input's."""
    args, objective, x, keep = setting(out_patch=out_patch)
    loss, _ = objective(x, keep)
    shown = objective(x, keep, reconstruct=True)
    assert shown.shape == x.shape
    assert abs(loss.item() - np.mean((shown.detach().double().numpy() - objective.raw(x).double().numpy()) ** 2)) < 1e-6


def test_the_first_blocks_see_the_kept_tokens_only():
    """Hidden pixels change: neither the context nor the decoded clip moves by a bit. 78 of 1568 tokens are kept at the
    paper's setting."""
    args, objective, x, keep = setting()
    t, h, w = objective.encoder.grid
    seen = torch.zeros(len(x), t * h * w).scatter(1, keep, 1.0).view(-1, 1, t, h, w)
    seen = seen.repeat_interleave(args.tubelet, 2).repeat_interleave(args.patch, 3).repeat_interleave(args.patch, 4)
    noisy = torch.where(seen > 0, x, torch.rand_like(x))
    assert torch.equal(objective(x, keep, reconstruct=True), objective(noisy, keep, reconstruct=True))
    assert objective.encoder(x, keep, blocks=objective.alone).shape[1] == keep.shape[1] == 32
    assert D.sample_masks(["random:0.95"], 0, 0, 5, (8, 14, 14))[0][0].shape == (5, 78)


def test_probes_read_no_latents():
    args, objective, x, _ = setting()
    before = objective(x)
    with torch.no_grad():
        for p in objective.decoder.parameters():
            p.add_(1)
    assert torch.equal(before, objective(x)) and before.shape[1] == math.prod(objective.encoder.grid)
    assert torch.equal(before, objective.encoder(x, blocks=3)) and objective.layers == {"layer": 3, "layer_classify": 3}


def test_the_layer_that_is_read():
    """Section 4.1: 95 %, which the paper gives as 60 of 64 blocks; never the last one, where the context never has a
    gradient."""
    wanted = dict(vit_n=3, vit_s=11, vit_b=11, vit_l=22, vit_g=38, vit_G=45, vit_e=53, vit_j=60)
    assert {name: M.readout_layer(M.SIZES[name]["depth"]) for name in wanted} == wanted
    assert [M.readout_layer(depth, 0.75) for depth in (4, 12, 24, 64)] == [3, 9, 18, 48]
    assert [M.readout_layer(depth) for depth in (1, 2)] == [1, 1]
    # of 12 blocks: frozen classification 9, fine-tuned and all other tasks 11
    config = dict(layer=11, layer_classify=9, depth=12)
    read = [P.layers_of(task, SimpleNamespace(layer=0, layers=None, finetune=tuned), config)
            for task, tuned in (("classify", ""), ("classify", "4ds"), ("pose", ""), ("pose", "4ds"))]
    assert read == [(9,), (11,), (11,), (11,)]

    args, objective, x, keep = setting()
    seen = []
    objective.encoder.blocks[-1].register_forward_hook(lambda block, inputs, z: seen.append(z))
    loss, _ = objective(x, keep)
    seen[0].retain_grad()
    loss.backward()
    context, latents = seen[0].grad.split([keep.shape[1], objective.decoder.latents.shape[1]], 1)
    assert not context.any() and latents.abs().sum() > 0


def test_the_encoder_sees_standardised_pixels_and_the_target_is_raw():
    """The same clip, prepared both ways: encoders that differ, one target. Random weights tell clips apart by more
    than a constant."""
    args, objective, _, keep = setting()
    _, plain, *_ = setting(standardise=False)
    assert objective.pixels == M.IMAGENET and plain.pixels == T.RGB
    video = torch.randint(0, 256, (3, args.frames, args.size, args.size, 3), dtype=torch.uint8)
    batch = {"video": video, "flip": torch.zeros(3, dtype=torch.bool)}
    x, raw = (D.prepare(batch, **o.pixels) for o in (objective, plain))
    assert torch.allclose(objective.raw(x), raw, atol=1e-6) and torch.equal(plain.raw(raw), raw)
    decoded = objective(x, keep, reconstruct=True).detach()
    assert objective(x, keep)[0].item() == pytest.approx((decoded - raw).square().mean().item(), rel=1e-5)

    def constant_share(z):
        return (z.mean((0, 1)).square().sum() / z.square().sum(-1).mean()).item()

    with torch.no_grad():
        shares = [constant_share(o.encoder(pixels, blocks=3)) for o, pixels in ((objective, x), (plain, raw))]
    assert shares[0] < 0.5 * shares[1], shares


def test_gradients_reach_encoder_and_decoder_and_decay_spares_positions():
    args, objective, x, keep = setting()
    objective(x, keep)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    decay, still = ({id(p) for p in g["params"]} for g in M.param_groups(objective, 0.05))
    assert {id(objective.encoder.pos_embed), id(objective.decoder.pos_embed)} <= still
    assert id(objective.decoder.latents) in decay


def test_flops_are_those_that_torch_counts():
    """All but the gradient of the pixels, which nobody needs."""
    args, objective, x, keep = setting(B=1)
    pixels = 2 * (3 * 2 * 8 * 8) * 128 * keep.shape[1]
    assert objective.flops(keep) == counted(objective, x, keep) + pixels


@pytest.mark.parametrize("step, lr", [
    (0, 0.0), (5_000, 5e-5), (10_000, 1e-4), (249_141, 5e-5), (488_281, 0.0)])
def test_schedules_at_the_start_after_warmup_and_at_the_end(step, lr):
    """Table 4: 488,282 steps of which 10,000 warm up; the decay stays."""
    objective = setting(steps=488_282, warmup=10_000, lr=1e-4)[1]
    want = {"lr": lr, "weight_decay": 0.05}
    assert objective.schedules(step) == pytest.approx(want, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("model, encoder, total", [
    ("vit_s", 23, 24), ("vit_b", 88, 91), ("vit_l", 306, 310), ("vit_h", 634, 639), ("vit_G", 1848, 1854),
    ("vit_e", 3811, 3817), ("vit_j", 21495, 21509)])
def test_parameter_counts_of_table_1(model, encoder, total):
    """In millions, to 1 % or to the table's rounding."""
    with torch.device("meta"):
        objective = T.MAE4D(T.Args(**({"model": model} if model != "vit_j" else T.PRESETS["j"])))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    assert abs(count(objective.encoder) - encoder) < max(0.01 * encoder, 0.6)
    assert abs(count(objective) - total) < max(0.01 * total, 0.6)


def test_two_ranks_log_the_losses_of_one_process(run, tmp_path):
    want = None
    runs = (("one", 1, ()), ("accumulated", 1, ("--micro_batch", 2)), ("ddp", 2, ()),
            ("fsdp", 2, ("--fsdp", "--checkpoint")))
    for name, ranks, extra in runs:
        status, last, err = run("train_mae4d.py", *TINY, "--out_dir", tmp_path / name, *extra, ranks=ranks)
        assert status == 0 and last["steps"] == 6, err[-2000:]
        got = losses(tmp_path / name)
        want = want or got
        assert np.abs(np.array(got) - want).max() < 1e-6, (name, got, want)


def test_stopped_and_resumed_equals_undisturbed_and_the_export_says_where_to_read(run, tmp_path):
    for name, stops in (("whole", (0,)), ("parts", (4, 0))):
        for stop in stops:
            flags = ("--out_dir", tmp_path / name, "--resume", "--stop_at", stop, "--sample_every", 3)
            assert run("train_mae4d.py", *TINY, *flags)[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    a, b = (M.load_encoder(tmp_path / name / "encoder.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(v, b[0].state_dict()[k]) for k, v in a[0].state_dict().items())
    assert a[1]["layer"] == 3 and a[1]["layer_classify"] == 3
    assert a[1]["mean"] == M.IMAGENET["mean"] and a[1]["act"] == "gelu_tanh"
    assert (tmp_path / "whole" / "samples" / "step_00000006.png").stat().st_size > 1000


def test_highpass_hides_what_is_static_from_the_encoder_and_not_from_the_target():
    args, objective, x, keep = setting(highpass=4.0)
    still = x[:, :, :1].expand_as(x)
    first, second = (objective.encoder(clip, keep) for clip in (still, 0.5 * still))
    assert (first - second).abs().max() < 1e-5
    assert (first - objective.encoder(x, keep)).abs().max() > 1e-2
    loss, _ = objective(x, keep)
    decoded = objective(x, keep, reconstruct=True)
    assert loss.item() == pytest.approx((decoded - objective.raw(x)).square().mean().item(), rel=1e-5)
    assert torch.equal(objective.raw(x), setting()[1].raw(x))


def test_a_run_from_before_the_pixels_were_standardised_goes_on_as_it_was(call, pictures, tmp_path):
    """Its config.json has no such flag: --resume refuses to change what the encoder sees."""
    flags = [flag for flag in TINY if flag != "--probe_data"] + ["--probe_data", "--data", pictures, "--workers", 0]
    call(T, *flags, "--no-standardise", "--stop_at", 2, "--out_dir", tmp_path)
    file = tmp_path / "config.json"
    head = json.loads(file.read_text())
    del head["config"]["standardise"]
    file.write_text(json.dumps(head))
    with pytest.raises(M.UserError, match=r"standardise \(False -> True\)"):
        call(T, *flags, "--resume", "--out_dir", tmp_path)
    assert call(T, *flags, "--no-standardise", "--resume", "--out_dir", tmp_path)["steps"] == 6
    asked = SimpleNamespace(encoder=str(tmp_path), task="physics", seed=0)
    assert P.restore(asked, "cpu").pixels == T.RGB
