"""model.py: parity with published code and formats, token dropping, positions, counting, weight files, optimizer
groups, sharding, compilation."""

import argparse
import copy
import gc
import itertools
import json
import math
import os
import stat

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
import train_tdv as T

# grid (4, 4, 4), head_dim 32: 30 channels rotate
TINY = dict(width=64, depth=2, heads=2, mlp=128, patch=8, frames=8, size=32)


def loud(module):
    """Larger weights than at initialisation, so that attention is far from uniform and a mistake is far above
    rounding."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5 if p.ndim == 3 else p * 5 if p.ndim > 1 else p)
    return module


def tiny(**kw):
    torch.manual_seed(0)
    return loud(M.ViT(**{**TINY, **kw}))


def tiny_predictor(**kw):
    torch.manual_seed(1)
    return loud(M.Predictor(**{**dict(in_width=64, out_width=48, width=32, depth=2, heads=2, grid=(4, 4, 4)), **kw}))


def clip(B=2, frames=8, size=32):
    return torch.randn(B, 3, frames, size, size, generator=torch.Generator().manual_seed(2))


def some_ids(lengths, B=2, N=64):
    g = torch.Generator().manual_seed(3)
    return [torch.stack([torch.randperm(N, generator=g)[:n] for _ in range(B)]) for n in lengths]


def gap(a, b):
    return (a - b).abs().max().item()


# --------------------------------------------------------------------------------------------------
# positions


@pytest.mark.parametrize("width, grid", [(1024, (8, 14, 14)), (40, (2, 3, 5))])
def test_sincos_is_the_published_table(width, grid):
    """Against float64 numpy that loops over tokens: ceil(D/6)*2 channels an axis, sines then cosines, order t,h,w,
    cut to D."""
    a = int(np.ceil(width / 6)) * 2
    omega = 1 / 10000 ** (np.arange(a // 2) / (a / 2))
    rows = [
        np.concatenate([f(p * omega) for p in place for f in (np.sin, np.cos)])[:width]
        for place in itertools.product(*map(range, grid))
    ]
    ours = M.sincos_table(width, grid)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert np.abs(ours.double().numpy() - np.array(rows)).max() < 1e-6


def test_rope_scores_depend_on_relative_positions_only():
    """q at id i and k at id j give the same score after both move by (1,1,1) in the grid; the quirk of V-JEPA 2
    does not have this property."""
    q, k = torch.randn(2, 1, 1, 1, 1, 28, generator=torch.Generator().manual_seed(0))
    grid, place = (4, 5, 6), lambda t, h, w: torch.tensor([[(t * 5 + h) * 6 + w]])

    def score(i, j, quirk):
        rq, rk = (M.rotate(x, *M.rope_at(place(*p), 28, grid, quirk, x)) for x, p in ((q, i), (k, j)))
        return (rq * rk).sum().item()

    for quirk, limit in ((False, 1e-5), (True, None)):
        moved = abs(score((0, 1, 2), (2, 3, 1), quirk) - score((1, 2, 3), (3, 4, 2), quirk))
        assert moved < limit if limit else moved > 1e-2
    for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):  # every axis counts
        assert abs(score((0, 0, 0), (0, 0, 0), False) - score((0, 0, 0), axis, False)) > 1e-3


def test_complex_and_real_rotation_agree():
    """The complex product used on a CPU equals q*cos + swap(q)*sin used elsewhere; id 0 (and CLS) and the channels
    beyond 3a stay put."""
    x, ids = torch.randn(2, 5, 1, 3, 28), torch.tensor([[3, 7, 63, 5, 0]])
    cos, sin = (table[ids][:, :, None, None] for table in M.rope_table(28, (4, 4, 4)))
    out = M.rotate(x, *M.rope_at(ids, 28, (4, 4, 4), False, x))
    assert gap(out, M.rotate(x, cos, sin)) < 1e-6
    assert torch.equal(out[:, -1], x[:, -1])
    assert torch.equal(out[..., 24:], x[..., 24:])
    assert gap(out[:, 2, ..., :24], x[:, 2, ..., :24]) > 0.1


def test_fixed_positions_are_no_parameters():
    """sincos and rope leave nothing in the state dict and nothing to train; learned positions do."""
    for pos, count in (("sincos", 0), ("sinusoid1d", 0), ("rope", 0), ("learned", 1)):
        model = tiny(pos=pos)
        assert sum("pos_embed" in k for k in model.state_dict()) == count and not list(model.buffers())
    assert tiny(pos="learned").pos_embed.shape == (1, 64, 64)
    assert tiny(pos="sincos")(clip(frames=4)).shape == (2, 32, 64)  # another grid: recomputed


def test_tables_of_one_grid_are_resized_for_others():
    """Learned positions and VideoMAE's: bicubic over space and linear over time of each channel, by F.interpolate one
    at a time; their own grid is untouched, and every kind takes clips that are longer, shorter and not square."""
    encoder = tiny(pos="learned")
    table = encoder.pos_embed[0].detach()
    assert encoder.positions((4, 4, 4), "cpu").data_ptr() == table.data_ptr()
    grid = table.T.view(64, 4, 4, 4)
    wide = F.interpolate(grid, (4, 6), mode="bicubic").permute(1, 2, 3, 0).reshape(-1, 64)
    assert gap(encoder.positions((4, 4, 6), "cpu"), wide) < 1e-6
    long = F.interpolate(grid.permute(0, 2, 3, 1).flatten(1, 2), 7, mode="linear")  # (64, 16, 7)
    assert gap(encoder.positions((7, 4, 4), "cpu"), long.permute(2, 1, 0).reshape(-1, 64)) < 1e-6
    for pos in ("rope", "sincos", "sinusoid1d", "learned"):
        assert tiny(pos=pos)(torch.randn(1, 3, 6, 16, 40)).shape == (1, 3 * 2 * 5, 64)


@pytest.mark.parametrize("pos", ["rope", "sincos", "sinusoid1d", "learned"])
def test_encoders_in_half_precision(pos):
    """.bfloat16() and .half() give features near those in float32, from clips of either precision; predictors too."""
    encoder, predictor, x = tiny(pos=pos, cls=True), tiny_predictor(pos="sincos" if pos == "sincos" else "rope"), clip()
    (keep,) = some_ids([20])
    want = encoder(x, keep)
    for dtype in (torch.bfloat16, torch.float16):
        low, guess = copy.deepcopy(encoder).to(dtype), copy.deepcopy(predictor).to(dtype)
        for z in (low(x, keep), low(x.to(dtype), keep)):
            assert z.dtype == dtype and F.cosine_similarity(z.float(), want, dim=-1).min() > 0.99
        assert guess(z[:, 1:], keep, keep).dtype == dtype


@pytest.mark.parametrize("pos", ["rope", "sincos", "sinusoid1d", "learned"])
def test_export_leaves_the_process_healthy(pos):
    """torch.export gives the features, and fake tensors leave none behind: later encoders of these sizes work."""
    # a size that no other test has: tables are kept
    shape, x = dict(pos=pos, size=40), clip(size=40)
    program = torch.export.export(tiny(**shape).eval(), (x,))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        tiny(**shape)(torch.empty(2, 3, 8, 40, 40))
    with torch.no_grad():
        z = tiny(**shape)(x)
    assert type(z) is torch.Tensor and gap(program.module()(x), z) < 1e-5


def test_attention_kernels_agree(monkeypatch):
    """The explicit softmax used for short sequences on a CPU equals the fused kernel."""
    q, k, v = torch.randn(3, 2, 4, 100, 16)
    assert gap(M.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-5


# --------------------------------------------------------------------------------------------------
# encoder and predictor


@pytest.mark.parametrize("pos", ["rope", "sincos", "sinusoid1d", "learned"])
@pytest.mark.parametrize("cls", [False, True])
def test_groups_equal_each_mask_alone(pos, cls):
    """A list of masks in one sequence gives what each mask gives alone; keeping all tokens equals keep=None."""
    encoder, x, keeps = tiny(pos=pos, cls=cls), clip(), some_ids([20, 7, 33])
    together = encoder(x, keeps)
    assert isinstance(together, list) and [z.shape for z in together] == [(2, n + cls, 64) for n in (20, 7, 33)]
    assert max(gap(z, encoder(x, keep)) for z, keep in zip(together, keeps)) < 1e-5
    assert gap(encoder(x), encoder(x, torch.arange(64).expand(2, 64))) < 1e-5
    assert isinstance(encoder(x, keeps[:1]), list)


@pytest.mark.parametrize("pos", ["rope", "sincos"])
def test_predictor_groups_order_and_mask_tokens(pos):
    """Groups equal each alone with their own mask token; the order of ids within a group does not matter; each
    group's length is its own."""
    predictor, keep, pred = tiny_predictor(pos=pos), some_ids([20, 7, 9]), some_ids([11, 30, 5])
    z = [torch.randn(2, k.shape[1], 64) for k in keep]
    out = predictor(z, keep, pred)
    assert [o.shape for o in out] == [(2, n, 48) for n in (11, 30, 5)]
    # group 2 takes token 0 again
    assert max(gap(out[i], predictor(z[i], keep[i], pred[i])) for i in (0, 2)) < 1e-5
    assert gap(out[1], predictor(z[1], keep[1], pred[1])) > 1e-3  # group 1 alone would take token 0
    assert gap(out[1], predictor([z[0], z[1]], keep[:2], pred[:2])[1]) < 1e-5
    turned = predictor(z[0].flip(1), keep[0].flip(1), pred[0].flip(1)).flip(1)
    assert gap(out[0], turned) < 1e-5


def test_hidden_pixels_do_not_reach_the_context():
    """Changing every pixel outside the kept patches leaves the context tokens equal bit for bit; changing one
    inside does not."""
    encoder, x, (keep,) = tiny(), clip(), some_ids([20])
    patches = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, keep, True).view(2, 1, 4, 4, 4)
    kept = patches.repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    assert torch.equal(encoder(x, keep), encoder(torch.where(kept, x, torch.randn_like(x)), keep))
    assert gap(encoder(x, keep), encoder(torch.where(kept, x + 0.1, x), keep)) > 1e-3


@pytest.mark.parametrize("tubelet, frames", [(2, 8), (1, 3)])
def test_dropping_then_embedding_is_embedding_then_dropping(tubelet, frames):
    """The embedding of kept patches equals a Conv3d of all of them, gathered; on a grid that is no cube."""
    embed = tiny(tubelet=tubelet, frames=frames).patch_embed
    x = torch.randn(2, 3, frames, 16, 24)
    full = embed.proj(x).flatten(2).transpose(1, 2)
    (keep,) = some_ids([9], N=full.shape[1])
    assert gap(embed(x), full) < 1e-5
    assert gap(embed(x, keep), full.gather(1, keep[..., None].expand(-1, -1, 64))) < 1e-5


def test_features_after_any_number_of_blocks():
    """blocks=0 is the embedding, blocks=k the stream after k blocks, blocks=depth and None the normalised output."""
    encoder, x = tiny(depth=3), clip()
    stream = [encoder.patch_embed(x)]
    rope = M.rope_at(None, 32, encoder.grid, False, x)
    for block in encoder.blocks:
        stream.append(block(stream[-1], rope))
    for i in range(3):
        assert gap(encoder(x, blocks=i), stream[i]) < 1e-6
    assert gap(encoder(x, blocks=3), encoder.norm(stream[3])) < 1e-6 and torch.equal(encoder(x, blocks=3), encoder(x))
    assert gap(tiny(depth=3, final_norm=False)(x), stream[3]) < 1e-6  # 4DS has no final norm
    with pytest.raises(ValueError, match="0 to 3"):
        encoder(x, blocks=4)


def test_shapes_that_do_not_fit_are_refused():
    """One line each for a clip that does not divide into patches and for impossible sizes."""
    with pytest.raises(ValueError, match="7 frames, 32x32 px"):
        tiny()(clip(frames=7))
    for x in (clip()[:, :2], clip()[0]):
        with pytest.raises(ValueError, match=r"^clips are \(B,3,T,H,W\), not "):
            tiny()(x)
    with pytest.raises(ValueError, match="width 64 is not divisible by heads 3"):
        tiny(heads=3)
    with pytest.raises(ValueError, match="2 blocks, and levels 3"):
        tiny(levels=3)
    with pytest.raises(ValueError, match="pos must be"):
        tiny(pos="alibi")


def test_init_is_the_papers_and_seeded():
    """Weights std 0.02, biases 0, residual projections of block i divided by sqrt(2(i+1)), mask tokens 0; the same
    seed gives the same weights."""
    torch.manual_seed(0)
    encoder, predictor = M.ViT(**{**TINY, "width": 256, "mlp": 1024}), M.Predictor(in_width=64, out_width=48)
    for i, block in enumerate(encoder.blocks):
        for layer, std in (
            (block.attn.qkv, 0.02),
            (block.mlp.fc1, 0.02),
            (block.attn.proj, 0.02 / math.sqrt(2 * (i + 1))),
            (block.mlp.fc2, 0.02 / math.sqrt(2 * (i + 1))),
        ):
            assert abs(layer.weight.std().item() / std - 1) < 0.02 and not layer.bias.any()
    assert not any(token.any() for token in predictor.mask_tokens)
    torch.manual_seed(0)
    again = M.ViT(**{**TINY, "width": 256, "mlp": 1024})
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters()))


def test_checkpointing_changes_nothing():
    """Recomputing blocks gives the same output and the same gradients, and runs every block twice."""
    grads, runs = [], []
    for on in (False, True):
        encoder, predictor, keep = tiny(checkpoint=on), tiny_predictor(checkpoint=on), some_ids([9, 14])
        runs.append(0)
        for block in (*encoder.blocks, *predictor.predictor_blocks):
            block.register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))
        loss = sum(o.square().mean() for o in predictor(encoder(clip(), keep), keep, keep[::-1]))
        loss.backward()
        grads.append([loss] + [p.grad for p in encoder.parameters()] + [p.grad for p in predictor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and runs == [4, 8]


def test_bfloat16_autocast_stays_close():
    """Under autocast the features keep their direction (cosine above 0.999 per token)."""
    encoder, x, keep = tiny(), clip(), some_ids([9, 14])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = encoder(x, keep)
    for a, b in zip(low, encoder(x, keep)):
        assert F.cosine_similarity(a.float(), b, dim=-1).min() > 0.999


def test_flops_are_counted_exactly():
    """flops() equals torch's own count of one clip, and for ViT-L the arithmetic of the paper: 604 and 154 MFLOP a
    token, 1.19 TFLOP a clip."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    encoder, predictor, keep, pred = tiny(cls=True), tiny_predictor(), some_ids([9, 14], B=1), some_ids([20, 30], B=1)
    z = [torch.randn(1, k.shape[1], 64) for k in keep]
    for call, ours in (
        (lambda: encoder(clip(1), keep), encoder.flops(9, 14)),
        (lambda: encoder(clip(1)), encoder.flops(64)),
        (lambda: predictor(z, keep, pred), predictor.flops((9, 20), (14, 30))),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        assert counter.get_total_flops() == ours
    with torch.device("meta"):
        large = M.ViT(**M.SIZES["vit_l"])
    linear = 24 * M.block_flops(1024, 4096, [1])
    assert round(linear / 1e6) == 604 and round(24 * 4 * 1568 * 1024 / 1e6) == 154
    assert large.flops(1568) == pytest.approx(1.19e12, rel=0.005)
    assert large.flops(373, 110) == pytest.approx(0.31e12, rel=0.02)
    assert M.Predictor(in_width=1024, out_width=1024, depth=12, heads=12).flops(
        (373, 755), (110, 1094)
    ) == pytest.approx(0.15e12, rel=0.05)


# --------------------------------------------------------------------------------------------------
# training helpers


def test_every_parameter_is_in_one_group():
    """Weights decay; biases, norms and learned positions do not; frozen ones are in no group; the groups say which
    is which."""
    module = torch.nn.ModuleList([tiny(pos="learned", cls=True), tiny_predictor()])
    module[0].norm.requires_grad_(False)
    decay, still = M.param_groups(module, 0.04)
    names = {id(p): n for n, p in module.named_parameters()}
    assert (decay["weight_decay"], decay["decay"], still["weight_decay"], still["decay"]) == (0.04, True, 0.0, False)
    assert len(decay["params"]) + len(still["params"]) == len(names) - 2
    assert all(names[id(p)].endswith(("bias", "pos_embed")) or "norm" in names[id(p)] for p in still["params"])
    assert all(p.ndim > 1 and not names[id(p)].endswith("bias") for p in decay["params"])
    torch.optim.AdamW([decay, still])


def test_ema_update():
    """targets <- m targets + (1-m) sources, and m = 1 leaves them alone."""
    a, b = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
    M.ema_update(a, b, 0.75)
    assert torch.allclose(a[0], torch.tensor([1.5, 3.0]))
    M.ema_update(a, b, 1.0)
    assert torch.allclose(a[0], torch.tensor([1.5, 3.0]))


def test_cpu_settings_keep_float32_precision():
    """After tune_cpu a float32 product still has float32's error, in the forward and in both gradients' layouts."""
    before = torch.get_float32_matmul_precision()
    M.tune_cpu()
    try:
        a, b = torch.randn(512, 768), torch.randn(768, 512)
        for x, y in ((a, b), (b.T, a.T), (a, a.T)):
            exact = x.double() @ y.double()
            assert ((x @ y - exact).abs().max() / exact.abs().max()).item() < 2e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_compiled_blocks_do_not_trace_again_for_each_length():
    """Six different pairs of mask lengths after the first compile nothing, and the compiled results are the plain
    ones."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    encoder, predictor = tiny(), tiny_predictor()
    plain, counter = copy.deepcopy((encoder, predictor)), CompileCounter()
    for block in (*encoder.blocks, *predictor.predictor_blocks):
        # what compile_blocks does, with a backend that counts
        block.compile(dynamic=True, backend=counter)
    counts = []
    for i in range(7):
        keep, pred = some_ids([5 + i, 20 - i]), some_ids([30 + 2 * i, 33 - i])
        out, same = (p(e(clip(), keep), keep, pred) for e, p in ((encoder, predictor), plain))
        assert max(gap(a, b) for a, b in zip(out, same)) < 1e-5
        counts.append(counter.frame_count)
    assert counts[0] >= 1 and len(set(counts)) == 1, counts
    assert list(encoder.state_dict()) == list(plain[0].state_dict())  # no _orig_mod in the names


class Pair(torch.nn.Module):
    """Encoder and predictor under one root, as in a training script."""

    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = tiny(), tiny_predictor()

    def forward(self, x, keep, pred):
        return sum(o.abs().mean() for o in self.predictor(self.encoder(x, keep), keep, pred))


def train_pair(pair, rows):
    optimizer, losses = torch.optim.AdamW(M.param_groups(pair, 0.1), lr=1e-3), []
    x = clip(4)[rows]
    keep = [k[rows] for k in some_ids([9, 14], B=4)]
    pred = [k[rows] for k in some_ids([20, 30], B=4)]
    for _ in range(3):
        loss = pair(x, keep, pred)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def shard_worker(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{port}", rank=rank, world_size=2)
    train_sharded(rank, folder)
    gc.collect()  # as M.launch: a process that leaves while it still holds a sharded module may abort
    torch.distributed.destroy_process_group()


def train_sharded(rank, folder):
    pair = M.shard(Pair(), torch.distributed.init_device_mesh("cpu", (2,)))
    kinds = {type(p).__name__ for p in pair.parameters()}
    losses = train_pair(pair, slice(2 * rank, 2 * rank + 2))
    torch.distributed.all_reduce(losses)
    weights = {k: v.full_tensor() for k, v in pair.state_dict().items()}
    if rank == 0:
        torch.save({"losses": losses / 2, "weights": weights, "kinds": sorted(kinds)}, f"{folder}/sharded.pt")


def test_two_sharded_ranks_equal_one_process(tmp_path):
    """FSDP2 on 2 gloo ranks, half the batch each: 3 AdamW steps give the losses and weights of one process on the
    whole batch."""
    torch.multiprocessing.spawn(shard_worker, (os.getpid(), str(tmp_path)), nprocs=2)
    pair = Pair()
    losses, sharded = train_pair(pair, slice(0, 4)), torch.load(tmp_path / "sharded.pt")
    assert sharded["kinds"] == ["DTensor"]
    assert gap(losses, sharded["losses"]) < 1e-5
    # Adam's first steps amplify rounding where g is near 0
    assert max(gap(v, sharded["weights"][k]) for k, v in pair.state_dict().items()) < 2e-3


# --------------------------------------------------------------------------------------------------
# probes


def test_rankme_of_known_spectra():
    """Orthogonal features have full rank, a single direction has rank 1."""
    assert M.rankme(torch.eye(32)) == pytest.approx(32, rel=1e-4)
    assert M.rankme(torch.randn(100, 1) @ torch.randn(1, 32)) == pytest.approx(1, rel=1e-3)


def test_knn_probe_by_hand():
    """Weights exp(s/T) with T = 0.07: a neighbour in the same direction (s = 1) is worth e = 2.7
    neighbours at s = 0.93 and 3.6 at s = 0.91. Lengths are ignored; only 20 neighbours vote."""

    def at(s, length):
        return [length * s, length * math.sqrt(1 - s * s)]

    v = torch.tensor([[5.0, 0.0]])
    y = torch.tensor([1, 0, 0, 0])
    for s, called in ((0.93, 0), (0.91, 1)):
        x = torch.tensor([at(1.0, 0.1), at(s, 1.0), at(s, 7.0), at(s, 1.0)])
        assert T.knn_probe(x, y, v).tolist() == [called]
    crowd = torch.tensor([at(1.0, 1.0)] + [at(0.75, 1.0)] * 36)  # e^3.57 = 35.6 weigh as much
    y = torch.tensor([1] + [0] * 36)
    assert T.knn_probe(crowd, y, v).tolist() == [1]
    assert T.knn_probe(crowd, y, v, k=37).tolist() == [0]


def test_linear_probe_is_accurate_and_deterministic():
    """On Gaussian classes it comes near the best possible rule, with noise channels more than twice the rows it
    stays sane, and it repeats."""
    g = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(8, 20, generator=g)
    y = torch.arange(1000) % 8
    x = centres[y] + torch.randn(1000, 20, generator=g)
    best = ((torch.cdist(x[600:], centres)).argmin(1) == y[600:]).double().mean()
    found = (M.linear_probe(x[:600], y[:600], x[600:]) == y[600:]).double().mean()
    assert found > best - 0.05 and best < 1
    wide = torch.cat([100 * x, torch.randn(1000, 1500, generator=g)], 1)
    assert (M.linear_probe(wide[:600], y[:600], wide[600:]) == y[600:]).double().mean() > 0.4
    assert torch.equal(
        M.linear_probe(wide[:600], y[:600], wide[600:]), M.linear_probe(wide[:600], y[:600], wide[600:])
    )
    constant = torch.zeros(600, 5)
    # nothing to learn from: no NaN, one class
    assert (M.linear_probe(constant, y[:600], constant) == 0).all()


# --------------------------------------------------------------------------------------------------
# weight files

PIXELS = dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])


def test_export_and_load_round_trip(tmp_path):
    """Weights and config come back equal, the file is readable by all, its sum is what sha256sum -c reads, and
    nothing else is left behind."""
    encoder, path = tiny(pos="learned", cls=True), tmp_path / "encoder.safetensors"
    for _ in range(2):  # over an older export as well
        M.save_encoder(path, encoder, {**encoder.config, **PIXELS, "stride": 4})
    loaded, config = M.load_encoder(path)
    assert config == {**encoder.config, **PIXELS, "stride": 4} and not loaded.training
    assert torch.equal(loaded(clip()), encoder(clip()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.safetensors", "encoder.safetensors.sha256"]
    assert (tmp_path / "encoder.safetensors.sha256").read_text() == f"{M.sha256(path)}  encoder.safetensors\n"
    with pytest.raises(ValueError, match=r"lacks \['mean', 'std'\]"):
        M.save_encoder(path, encoder, encoder.config)


def test_a_flipped_bit_is_refused(tmp_path):
    """One bit of the weights changed: refused by the sum; cut short without a sum: refused as unreadable."""
    encoder, path = tiny(), tmp_path / "encoder.safetensors"
    M.save_encoder(path, encoder, {**encoder.config, **PIXELS})
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="encoder.safetensors: differs from its sha256"):
        M.load_encoder(path)
    (tmp_path / "encoder.safetensors.sha256").unlink()
    M.load_encoder(path)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="safetensors: Error while deserializing header"):
        M.load_encoder(path)


def test_random_encoders(tmp_path):
    """random:SIZE and random:FILE give the shape with weights of a seed, without touching torch's generator."""
    state = torch.get_rng_state()
    a, config = M.load_encoder("random:vit_n", patch=8, frames=8, size=32)
    b = M.load_encoder("random:vit_n", patch=8, frames=8, size=32)[0]
    c = M.load_encoder("random:vit_n", patch=8, frames=8, size=32, seed=1)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert config["model"] == "vit_n"
    assert config["mean"] == M.IMAGENET["mean"]
    assert torch.equal(a(clip()), b(clip())) and gap(a(clip()), c(clip())) > 0.1
    encoder, path = tiny(pos="sincos", init_std=0.1), tmp_path / "encoder.safetensors"
    M.save_encoder(path, encoder, {**encoder.config, **PIXELS})
    d, config = M.load_encoder(f"random:{path}", seed=5)
    # each method's own: SALT's start wider than V-JEPA's
    assert d.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert config["pos"] == "sincos" and config["mean"] == PIXELS["mean"] and gap(d(clip()), encoder(clip())) > 0.1


def test_clear_errors(tmp_path):
    """A missing file, a file of no known kind, text named .pt, a checkpoint without the part, an unknown override:
    one line with the path."""
    (tmp_path / "a.pt").write_text("hello")
    (tmp_path / "a.bin").write_text("hello")
    torch.save({"student": {}}, tmp_path / "b.pt")
    torch.save({"model": {}}, tmp_path / "c.pt")
    (tmp_path / "a.npz").write_text("hello")
    for name, message in (
        ("none.pt", "no such weight file"),
        ("a.pt", "not a readable weight file"),
        ("a.bin", "not a weight file"),
        ("b.pt", "'student'"),
        ("c.pt", "no weights in 'model'"),
        ("a.npz", "not a readable weight file"),
        (".", "no .safetensors"),
    ):
        with pytest.raises(ValueError, match=message) as e:
            M.load_encoder(tmp_path / name)
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    with pytest.raises(ValueError, match=r"unknown config entries \['head'\]"):
        M.load_encoder("random:vit_n", head=2)


@pytest.fixture
def hf(tmp_path):
    """(VJEPA2Model with random weights of visible size, folder it was saved to)."""
    transformers = pytest.importorskip("transformers", reason="the oracle needs: pip install transformers")
    torch.manual_seed(0)
    model = transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            crop_size=64, frames_per_clip=8, hidden_size=112, num_attention_heads=4, num_hidden_layers=3,
            pred_hidden_size=80, pred_num_attention_heads=4, pred_num_hidden_layers=2, pred_num_mask_tokens=3,
        )
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_features_and_predictions_equal_transformers(hf):
    """VJEPA2Model on random weights, loaded from the directory save_pretrained wrote: encoder and predictor agree
    to 1e-5."""
    oracle, folder = hf
    encoder, config = M.load_encoder(folder)
    predictor, _ = M.load_predictor(folder)
    assert (config["frames"], config["size"], config["rope_quirk"]) == (8, 64, True)
    x, ids = clip(2, 8, 64), some_ids([64])[0]
    keep, pred = ids[:, :20], ids[:, 20:50]
    with torch.no_grad():
        # it always takes mask token 1
        theirs = oracle(x.transpose(1, 2), context_mask=[keep], target_mask=[pred])
        z = encoder(x)
        context = z.gather(1, keep[..., None].expand(-1, -1, 112))
        zhat = predictor([context, context], [keep, keep], [pred, pred])[1]
    differences = gap(z, theirs.last_hidden_state), gap(zhat, theirs.predictor_output.last_hidden_state)
    print("max difference to VJEPA2Model: features %.1e, predictions %.1e" % differences)
    assert max(differences) < 1e-5
    assert gap(M.load_encoder(folder / "model.safetensors")[0](x), z) == 0


def test_hf_files_load_strictly(hf):
    """A key missing from an HF file is named; a file with another model_type is refused."""
    from safetensors.torch import load_file, save_file

    folder = hf[1]
    state = load_file(folder / "model.safetensors")
    gone = state.pop("encoder.layer.1.attention.key.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing key.*blocks\.1\.attn\.qkv\.bias.*Unexpected key.*query\.bias"):
        M.load_encoder(folder)
    save_file(
        {**state, "encoder.layer.1.attention.key.bias": gone, "encoder.extra": gone.clone()},
        folder / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"Unexpected key.*encoder\.extra"):
        M.load_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "timesformer"}))
    with pytest.raises(ValueError, match="'timesformer', not one of vjepa2, videomae"):
        M.load_encoder(folder)


def wave(n, rate):
    return (torch.arange(n, dtype=torch.float64) * rate).sin().float()


def patterned(module):
    """Weights from a formula, so that other code can be given the same ones."""
    with torch.no_grad():
        for j, (name, p) in enumerate(sorted(module.state_dict().items())):
            p.copy_(0.2 * wave(p.numel(), 0.7 + 0.013 * j).view_as(p) + ("norm" in name and name.endswith("weight")))
    return module


# features [1, 2, ::14] and predictions [1, 3, ::14] of Meta's own V-JEPA 1 and 2 modules on `patterned` weights
OFFICIAL = {
    1: ([2.02164, 2.31596, 1.31672, 0.01787], [0.2412, -0.37353, -0.0757, 0.59879]),
    2: ([1.84414, 1.84221, 1.75974, 0.16354], [0.36538, -0.25099, -0.28554, 0.62293]),
}


def meta_pair(version):
    pos, quirk = ("sincos", False) if version == 1 else ("rope", True)
    encoder = patterned(M.ViT(width=56, depth=2, heads=2, mlp=224, frames=8, size=48, pos=pos, rope_quirk=quirk))
    return encoder, patterned(
        M.Predictor(
            in_width=56, out_width=56, width=40, depth=2, heads=2, grid=encoder.grid, pos=pos, rope_quirk=quirk
        )
    )


def meta_file(path, version, change=lambda parts: None):
    """A checkpoint in the layout of Meta's training scripts: wrapped names, both encoders, optimizer state, V-JEPA
    1's stored position tables."""
    encoder, predictor = meta_pair(version)
    parts = {"target_encoder": dict(encoder.state_dict()), "predictor": dict(predictor.state_dict())}
    # V-JEPA 2's files carry a stale table
    parts["target_encoder"]["pos_embed"] = torch.zeros(1, 2048, 56)
    if version == 1:
        parts["target_encoder"]["pos_embed"] = M.sincos_table(56, encoder.grid)[None].clone()
        parts["predictor"]["predictor_pos_embed"] = M.sincos_table(40, encoder.grid)[None].clone()
    change(parts)
    file = {part: {f"module.backbone.{k}": v for k, v in state.items()} for part, state in parts.items()}
    file["encoder"] = {k: torch.zeros_like(v) for k, v in file.get("target_encoder", {}).items()}
    torch.save(
        {
            **file, "opt": {"state": {}, "param_groups": [{"lr": 0.1}]}, "scaler": None, "epoch": 3, "loss": 0.5,
            "lr": 1e-4,
        },
        path,
    )
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_meta_checkpoints_give_the_official_numbers(version, tmp_path):
    """A file in the layout of V-JEPA 1 or 2 loads, and features and predictions are those Meta's own modules gave
    for the same weights."""
    path = meta_file(tmp_path / ("vit.pth.tar" if version == 1 else "vit.pt"), version)
    encoder, config = M.load_encoder(path, heads=2, frames=8, size=48)
    predictor, _ = M.load_predictor(path, heads=2, frames=8, size=48)
    assert config["pos"] == ("sincos" if version == 1 else "rope")
    assert config["rope_quirk"] == (version == 2)
    assert "predictor_heads" not in config
    x = wave(2 * 3 * 8 * 48 * 48, 0.37).view(2, 3, 8, 48, 48)
    keep = torch.tensor([[0, 4, 11, 17, 30], [2, 3, 9, 20, 35]])
    pred = torch.tensor([[1, 5, 12, 29], [0, 10, 21, 34]])
    with torch.no_grad():
        z = encoder(x, keep)
        zhat = predictor([z, z], [keep, keep], [pred, pred])[1]  # mask token 1
    assert gap(z[1, 2, ::14], torch.tensor(OFFICIAL[version][0])) < 2e-5
    assert gap(zhat[1, 3, ::14], torch.tensor(OFFICIAL[version][1])) < 2e-5


@pytest.mark.parametrize("version", [1, 2])
def test_meta_checkpoints_load_strictly(version, tmp_path):
    """Missing, extra and misshaped keys are refused by name, in either part; so are a foreign position table and an
    ambiguous file."""
    where = dict(heads=2, frames=8, size=48)

    def refused(message, change, load=M.load_encoder, **override):
        path = meta_file(tmp_path / "vit.pt", version, change)
        with pytest.raises(ValueError, match=message):
            load(path, **(override or where))

    refused(r"Missing key.*blocks\.1\.mlp\.fc1\.bias", lambda p: p["target_encoder"].pop("blocks.1.mlp.fc1.bias"))
    refused(r"missing patch_embed\.proj\.weight", lambda p: p["target_encoder"].pop("patch_embed.proj.weight"))
    refused(r"Unexpected key.*cls_token", lambda p: p["target_encoder"].update(cls_token=torch.zeros(1, 1, 56)))
    refused(
        r"mismatch for norm\.bias.*\[55\]",
        lambda p: p["target_encoder"].update({"norm.bias": torch.zeros(55)}),
    )
    refused(r"no weights in 'target_encoder'", lambda p: p.pop("target_encoder"))
    refused(r"pass heads=", lambda p: None, frames=8)
    refused(r"Missing key.*mask_tokens\.0", lambda p: p["predictor"].pop("mask_tokens.0"), M.load_predictor)
    if version == 1:
        refused(r"pos_embed .* is not the sincos table", lambda p: p["target_encoder"]["pos_embed"].add_(1e-3))
        refused(r"missing pos_embed", lambda p: p["target_encoder"].pop("pos_embed"))
    refused(r"no predictor to tell", lambda p: p.pop("predictor"))
    refused(
        r"holds no predictor",
        lambda p: (p.pop("predictor"), p["target_encoder"].pop("pos_embed")) if version == 2 else p.pop("predictor"),
        M.load_predictor,
        frames=8,
        pos="rope" if version == 2 else "sincos",
    )


@pytest.fixture
def videomae(tmp_path):
    """save(kind, use_mean_pooling) -> (HF model of that kind with random weights in every tensor, folder it was
    saved to)."""
    transformers = pytest.importorskip("transformers", reason="the oracle needs: pip install transformers")

    def save(kind, pooled, **kw):
        torch.manual_seed(0)
        oracle = getattr(transformers, kind)(
            transformers.VideoMAEConfig(
                **{
                    **dict(
                        image_size=64, num_frames=8, hidden_size=96, num_attention_heads=4, num_hidden_layers=3,
                        intermediate_size=200, use_mean_pooling=pooled, decoder_hidden_size=48,
                        decoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_intermediate_size=64,
                    ),
                    **kw,
                }
            )
        ).eval()
        for name, p in oracle.named_parameters():
            torch.nn.init.normal_(p, float("norm" in name and name.endswith("weight")), 0.02 if p.ndim == 5 else 0.1)
        oracle.save_pretrained(tmp_path / kind)
        return oracle, tmp_path / kind

    return save


VIDEOMAE = list(
    itertools.product(["VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"], [True, False])
)


@pytest.mark.parametrize("kind, pooled", VIDEOMAE)
def test_videomae_features_equal_transformers(videomae, kind, pooled):
    """The encoder of every kind of HF VideoMAE, with and without a final norm: 1e-5, of all tokens and of kept
    ones, with old and new bias names."""
    from safetensors.torch import load_file, save_file

    oracle, folder = videomae(kind, pooled)
    encoder, config = M.load_encoder(folder)
    wanted = dict(
        pos="sinusoid1d", heads=4, eps=1e-12, frames=8, size=64, mlp=200, act="gelu", final_norm=not pooled,
        **M.IMAGENET,
    )
    assert {k: config[k] for k in wanted} == wanted
    x, (keep,) = clip(2, 8, 64), some_ids([20])
    with torch.no_grad():
        base = getattr(oracle, "videomae", oracle)
        full = base(x.transpose(1, 2)).last_hidden_state
        hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, keep, False)
        part = base(x.transpose(1, 2), bool_masked_pos=hidden).last_hidden_state
        z = encoder(x)
        differences = gap(z, full), gap(encoder(x, keep.sort(1)[0]), part)
    print(
        f"max difference to {kind}, pooled {pooled}: "
        f"all tokens %.1e, kept ones %.1e, of features up to {z.abs().max():.1f}" % differences
    )
    assert max(differences) < 1e-5
    state = load_file(folder / "model.safetensors")
    swap = ("query.bias", "q_bias"), ("value.bias", "v_bias")
    for _ in range(2):
        for new, old in swap:
            state = {k.replace(f"attention.{new}", f"attention.{old}"): v for k, v in state.items()}
        save_file(state, folder / "model.safetensors")
        assert gap(M.load_encoder(folder / "model.safetensors")[0](x), z) == 0
        swap = [pair[::-1] for pair in swap]


def videomae_file(path, state, part, **more):
    """A file in the layout of VideoMAE's own scripts from a state of HF's VideoMAEModel: qkv in one, biases apart,
    all prefixed in pretraining."""
    ours = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm": "norm",
    }
    out = {}
    for k, v in state.items():
        for theirs, name in ours.items():
            k = k.replace(theirs, name)
        if ".query.weight" in k:
            layer = k.split(".")[1]
            v = torch.cat(
                [state[f"encoder.layer.{layer}.attention.attention.{n}.weight"] for n in ("query", "key", "value")]
            )
            out[f"blocks.{layer}.attn.qkv.weight"] = v
        elif k.endswith((".query.bias", ".value.bias")):
            out[
                k.replace("attention.attention.", "attn.")
                .replace("query.bias", "q_bias")
                .replace("value.bias", "v_bias")
            ] = v
        elif ".key." not in k and ".value." not in k:
            out[k] = v
    if part == "model":
        decoder = ("decoder.blocks.0.norm1.weight", "decoder.norm.bias", "mask_token", "encoder_to_decoder.weight")
        out = {f"encoder.{k}": v for k, v in out.items()} | {k: torch.randn(3) for k in decoder}
    else:
        out |= {k: torch.randn(3) for k in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    out = {k: v for k, v in (out | more).items() if v is not None}
    torch.save(
        {
            part: out, "optimizer": {"state": {}}, "epoch": 3, "scaler": {"scale": 1.0},
            "args": argparse.Namespace(lr=0.1, device="cuda"),
        },
        path,
    )
    return path


@pytest.mark.parametrize("part", ["model", "module"])
def test_videomae_checkpoints(videomae, part, tmp_path):
    """VideoMAE's own layout from the weights of VideoMAEModel gives its features; missing, extra and misshaped keys
    are refused by name."""
    oracle, _ = videomae("VideoMAEModel", part == "module", layer_norm_eps=1e-6)
    before, where = ("encoder." if part == "model" else ""), dict(heads=4, frames=8, size=64)
    path = videomae_file(tmp_path / "checkpoint.pth", oracle.state_dict(), part)
    encoder, config = M.load_encoder(path, **where)
    assert (config["pos"], config["eps"], config["final_norm"], config["mean"]) == (
        "sinusoid1d", 1e-6, part == "model", M.IMAGENET["mean"],
    )
    with torch.no_grad():
        z = encoder(clip(2, 8, 64))
        difference = gap(z, oracle(clip(2, 8, 64).transpose(1, 2)).last_hidden_state)
    print(f"max difference of {part} to VideoMAEModel: {difference:.1e} of features up to {z.abs().max():.1f}")
    assert difference < 1e-5

    bias = oracle.state_dict()["encoder.layer.1.attention.attention.value.bias"]
    for name, value, message in (
        ("blocks.1.attn.v_bias", None, r"Missing key.*blocks\.1\.attn\.qkv\.bias.*Unexpected key.*query\.bias"),
        ("blocks.1.attn.v_bias", bias[1:], r"mismatch for blocks\.1\.attn\.qkv\.bias.*\[287\]"),
        ("blocks.2.mlp.fc1.weight", None, r"Missing key.*blocks\.2\.mlp\.fc1\.weight"),
        ("blocks.2.mlp.fc3", bias, r"Unexpected key.*blocks\.2\.mlp\.fc3"),
        ("gamma", bias, "Unexpected key.*gamma"),
        ("patch_embed.proj.weight", None, "missing patch_embed"),
        ("pos_embed", bias, "Unexpected key.*pos_e"),
        ("norm.weight", *((None, "Missing.*norm.weight") if part == "model" else (bias, "Unexpected.*norm.weight"))),
    ):
        videomae_file(path, oracle.state_dict(), part, **{before + name: value})
        with pytest.raises(ValueError, match=message):
            M.load_encoder(path, **where)
    with pytest.raises(ValueError, match="pass heads="):
        M.load_encoder(path)
    with pytest.raises(ValueError, match="holds no predictor"):
        M.load_predictor(videomae_file(path, oracle.state_dict(), part), **where)


def test_videomae_directories_load_strictly(videomae):
    """A key missing from an HF VideoMAE, one too many, one under two names, a foreign activation, a config without
    an entry."""
    from safetensors.torch import load_file, save_file

    _, folder = videomae("VideoMAEForPreTraining", False)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    part, extra = "videomae.encoder.layer.1.attention.attention.", torch.zeros(96)
    old = f"{part}q_bias" in state  # which of the two names this version of transformers writes
    for change, message in (
        (
            {f"{part}{'v_bias' if old else 'value.bias'}": None},
            r"Missing key.*blocks\.1\.attn\.qkv\.bias.*Unexpected key.*query\.bias",
        ),
        ({f"{part}key.weight": None}, r"Missing key.*blocks\.1\.attn\.qkv\.weight.*Unexpected"),
        ({f"{part}{'query.bias' if old else 'q_bias'}": extra}, r"holds blocks\.1\.attn\.query\.bias twice"),
        ({"videomae.layernorm.weight": None}, r"Missing key.*norm\.weight"),
        ({"videomae.pooler": extra}, "Unexpected key.*pooler"),
    ):
        save_file({k: v for k, v in (state | change).items() if v is not None}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            M.load_encoder(folder)
    save_file(state, folder / "model.safetensors")
    for entry, message in ({"hidden_act": "relu"}, "'relu'"), ({"image_size": [64, 32]}, r"\[64, 32\]"):
        (folder / "config.json").write_text(json.dumps(config | entry))
        with pytest.raises(ValueError, match=message):
            M.load_encoder(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_frames"}))
    with pytest.raises(ValueError, match=r"config.json \(HF's videomae\): missing num_frames"):
        M.load_encoder(folder)


def test_sinusoid1d_is_the_published_table():
    """Against float64 numpy: angle p / 10000^(2(j//2)/D), sine at even j, cosine at odd j, over all tokens in a row."""
    p, j = np.arange(1568)[:, None], np.arange(384)
    angle = p / np.power(10000, 2 * (j // 2) / 384)
    ours = M.sinusoid_table(384, (8, 14, 14))
    assert ours.dtype == torch.float32
    assert np.abs(ours.double().numpy() - np.where(j % 2, np.cos(angle), np.sin(angle))).max() < 1e-6


def fourds_arrays(D=48, H=3, hidden=80, depth=2, prefix="params/layers_0/", encoder="encoder/"):
    """Random arrays under the keys of a 4DS file: grid (3, 4, 4), tubelets of 2, patches of 8, and a readout that
    is not the encoder's."""
    rng = np.random.default_rng(0)

    def r(*shape, scale=0.1, shift=0.0):
        return (shift + scale * rng.standard_normal(shape)).astype(np.float32)

    d = D // H
    arrays = {
        f"{encoder}patch_embedding/Conv_0/kernel": r(2, 8, 8, 3, D),
        f"{encoder}patch_embedding/Conv_0/bias": r(D),
        f"{encoder}posenc/embeddings": r(3, 4, 4, D),
    }
    for i in range(depth):
        layer = f"processor/layers_{i}/"
        for name in ("query", "key", "value"):
            arrays |= {
                f"{layer}attention/{name}/kernel": r(D, H, d, scale=0.2),
                f"{layer}attention/{name}/bias": r(H, d),
            }
        arrays |= {
            f"{layer}attention/out/kernel": r(H, d, D),
            f"{layer}attention/out/bias": r(D),
            f"{layer}mlp/dense_in/kernel": r(D, hidden),
            f"{layer}mlp/dense_in/bias": r(hidden),
            f"{layer}mlp/dense_out/kernel": r(hidden, D),
            f"{layer}mlp/dense_out/bias": r(D),
        }
        for name in ("attention_norm", "mlp_norm"):
            arrays |= {f"{layer}{name}/scale": r(D, shift=1.0), f"{layer}{name}/bias": r(D)}
    readout = {
        "params/layers_2/query": r(1, 3),
        "params/layers_2/temporal_posenc/embeddings": r(4, 1, 3),
        "params/layers_2/LayerNorm_0/scale": r(3),
    }
    return {prefix + k: v for k, v in arrays.items()} | readout


def fourds_forward(arrays, x, prefix, encoder):
    """Features (B, N, D) of clips x (B, 3, T, H, W) in [0, 1] from those arrays: numpy, float64, one einsum for
    every flax layer."""
    w = {k.removeprefix(prefix): v.astype(np.float64) for k, v in arrays.items()}
    a, p, _, _, D = w[f"{encoder}patch_embedding/Conv_0/kernel"].shape
    B, _, T, S, _ = x.shape
    patches = x.transpose(0, 2, 3, 4, 1).reshape(B, T // a, a, S // p, p, S // p, p, 3)
    z = (
        np.einsum("btahpwqc,apqcD->bthwD", patches, w[f"{encoder}patch_embedding/Conv_0/kernel"])
        + w[f"{encoder}patch_embedding/Conv_0/bias"]
    )
    z = (z + w[f"{encoder}posenc/embeddings"]).reshape(B, -1, D)

    def norm(z, name):
        unit = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
        return unit * w[f"{name}/scale"] + w[f"{name}/bias"]

    for i in range(sum(k.endswith("mlp_norm/scale") for k in w)):
        at = f"processor/layers_{i}/"
        y = norm(z, f"{at}attention_norm")
        q, k, v = (
            np.einsum("bnD,DHd->bnHd", y, w[f"{at}attention/{n}/kernel"]) + w[f"{at}attention/{n}/bias"]
            for n in ("query", "key", "value")
        )
        score = np.exp(np.einsum("bnHd,bmHd->bHnm", q, k) / np.sqrt(q.shape[-1]))
        y = np.einsum("bHnm,bmHd->bnHd", score / score.sum(-1, keepdims=True), v)
        z = z + np.einsum("bnHd,HdD->bnD", y, w[f"{at}attention/out/kernel"]) + w[f"{at}attention/out/bias"]
        y = norm(z, f"{at}mlp_norm") @ w[f"{at}mlp/dense_in/kernel"] + w[f"{at}mlp/dense_in/bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        z = z + y @ w[f"{at}mlp/dense_out/kernel"] + w[f"{at}mlp/dense_out/bias"]
    return z


@pytest.mark.parametrize(
    "prefix, encoder", [("params/layers_0/", "encoder/"), ("", ""), ("params/model/layers_1/", "tokenizer/")]
)
def test_4ds_features_equal_numpy(prefix, encoder, tmp_path):
    """A 4DS file, with whatever path before its three parts, gives the features of a float64 numpy forward of the
    same arrays."""
    arrays = fourds_arrays(prefix=prefix, encoder=encoder)
    np.savez(tmp_path / "4ds.npz", **arrays)
    model, config = M.load_encoder(tmp_path / "4ds.npz")
    wanted = dict(
        width=48, depth=2, heads=3, mlp=80, patch=8, tubelet=2, frames=6, size=32, pos="learned", act="gelu_tanh",
        final_norm=False, eps=1e-6, mean=[0.0] * 3, std=[1.0] * 3, layer=1, layer_classify=1,
    )
    assert {k: config[k] for k in wanted} == wanted
    x = torch.rand(2, 3, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = model(x)
    theirs = torch.from_numpy(fourds_forward(arrays, x.double().numpy(), prefix, encoder))
    print(f"max difference of 4DS to numpy: {gap(z, theirs):.1e} of features up to {z.abs().max():.1f}")
    assert gap(z, theirs) < 1e-5


def test_4ds_files_load_strictly(tmp_path):
    """Missing, extra and misshaped keys are refused by name, as are norms of queries, two encoders in one file and
    pickled objects."""
    at, path = "params/layers_0/processor/layers_1/", tmp_path / "4ds.npz"
    for change, message in (
        (
            {f"{at}attention/key/bias": None},
            r"Missing key.*blocks\.1\.attn\.qkv\.bias.*Unexpected key.*blocks\.1\.attn\.query\.bias",
        ),
        ({f"{at}mlp/dense_in/bias": None}, r"Missing key.*blocks\.1\.mlp\.fc1\.bias"),
        ({"params/layers_0/encoder/posenc/embeddings": None}, "missing pos_embed"),
        ({f"{at}attention/query_norm/scale": np.ones(16)}, r"Unexpected key.*blocks\.1\.attn\.query_norm\.weight"),
        ({"params/layers_0/encoder/patch_embedding/Conv_1/bias": np.ones(48)}, r"Unexpected key.*Conv_1"),
        (
            {f"{at}attention/value/kernel": np.ones((48, 6, 8))},
            r"wrong shape .*value\.weight \(48, 6, 8\) .*\(48, 3, 16\)",
        ),
        ({f"{at}attention/out/kernel": np.ones((48, 48))}, r"wrong shape blocks\.1\.attn\.proj\.weight \(48, 48\)"),
        ({f"{at}mlp_norm/bias": np.ones(47)}, r"mismatch for blocks\.1\.norm2\.bias.*\[47\]"),
        (
            {"params/layers_0/encoder/posenc/embeddings": np.ones((3, 4, 5, 48))},
            r"wrong shape pos_embed \(3, 4, 5, 48\)",
        ),
        ({"teacher/encoder/posenc/embeddings": np.ones((3, 4, 4, 48))}, "holds pos_embed twice"),
        ({"x": np.array([{}], dtype=object)}, "not a readable weight file .*Object arrays"),
    ):
        np.savez(path, **{k: v for k, v in (fourds_arrays() | change).items() if v is not None})
        with pytest.raises(ValueError, match=message):
            M.load_encoder(path)


def test_image_encoder_sees_each_frame_alone():
    """Tokens of a clip are those of its frames, CLS tokens first; learned positions are interpolated to other
    sizes; frames do not see each other."""
    encoder = patterned(
        M.ViT(
            width=48, depth=2, heads=4, mlp=96, patch=8, tubelet=1, frames=4, size=32, pos="learned", images=True,
            cls=True,
        )
    )
    x = clip(2, 4, 32)
    with torch.no_grad():
        z = encoder(x)
        alone = [encoder(x[:, :, t : t + 1]) for t in range(4)]
        assert z.shape == (2, 4 + 4 * 16, 48) and encoder(clip(1, 3, 48)).shape == (1, 3 + 3 * 36, 48)
        assert torch.equal(z[:, :4], torch.cat([a[:, :1] for a in alone], 1))
        assert torch.equal(z[:, 4:], torch.cat([a[:, 1:] for a in alone], 1))
        other = x.clone()
        other[:, :, 2] += 1
        moved = (encoder(other) - z).abs().amax((0, 2))
    assert (moved[4:].view(4, 16).amax(1) > 0).tolist() == [False, False, True, False]
    assert (moved[:4] > 0).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="tubelets of 1"):
        M.ViT(width=48, depth=1, heads=4, mlp=96, images=True)
    with pytest.raises(ValueError, match="whole frames"):
        encoder(x, torch.zeros(2, 3, dtype=torch.long))


def test_dinov2_features_equal_transformers(tmp_path):
    """HF's Dinov2Model with layer scale, at its own and another size, and the same weights in timm's and DINOv2's
    own layouts: 1e-5."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    oracle = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, image_size=56, patch_size=14,
            layerscale_value=0.3,
        )
    ).eval()
    for p in oracle.parameters():
        p.data.add_(0.02 * torch.randn(p.shape))
    oracle.save_pretrained(tmp_path / "hf")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "hf" / "model.safetensors")
    ours = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "layernorm.": "norm.",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    timm = {}
    for k, v in state.items():
        name = k
        for theirs, new in ours.items():
            name = name.replace(theirs, new)
        if "attention.attention.query" in k:
            v = torch.cat([state[k.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        if "attention.attention.key" not in k and "attention.attention.value" not in k:
            timm[name] = v
    torch.save(timm, tmp_path / "timm.pth")
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in timm.items()} | {"head.last_layer.weight": torch.zeros(2)}},
        tmp_path / "dino.pth",
    )
    torch.save(
        {k.replace("blocks.", "blocks.0.") if k.startswith("blocks.") else k: v for k, v in timm.items()},
        tmp_path / "chunked.pth",
    )
    for name in ("hf", "timm.pth", "dino.pth", "chunked.pth"):
        encoder, config = M.load_encoder(tmp_path / name)
        assert config["images"] and config["size"] == 56 and config["heads"] == 3
        differences = []
        for size in (56, 84):
            x = clip(2, 2, size)
            with torch.no_grad():
                z = encoder(x)
                want = oracle(x.transpose(1, 2).flatten(0, 1)).last_hidden_state.unflatten(0, (2, 2))
            want = torch.cat([want[:, :, 0], want[:, :, 1:].flatten(1, 2)], 1)
            differences.append(gap(z, want))
        print(
            f"{name}: max difference to Dinov2Model at 56 and 84 px %.1e %.1e, of features up to {want.abs().max():.1f}"
            % tuple(differences)
        )
        assert max(differences) < 2e-5
    torch.save(timm | {"register_tokens": torch.zeros(1, 4, 192)}, tmp_path / "reg.pth")
    with pytest.raises(ValueError, match="Unexpected key.*register_tokens"):
        M.load_encoder(tmp_path / "reg.pth")
