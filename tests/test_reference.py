"""Each script against a loop of its own in plain torch: six steps later the weights, the logged
rates and losses, and the exported encoder are those of the loop.

A loop knows the paper, the nets of model.py and the clips and masks of data.py. Of its script it
knows the command line and the files. All flags here differ from their defaults and have an effect,
and the clips of step 3 are not numbers: weights, EMA and centres must come through it untouched.
"""
import copy
import itertools
import json
import math
import shutil
import subprocess

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import train_mae4d
import train_salt
import train_tdv
import train_vjepa
from model import LatentGridDecoder, MotionEncoder, Predictor, ViT, load_encoder

STEPS = 6
POISONED = 3                            # the step whose clips are not numbers
SEED = 3
BATCH = 4
HALVES = (slice(0, 2), slice(2, 4))     # micro-batches
WARMUP = 2
CLIP_GRAD = 0.05
BETAS = (0.8, 0.9)
LAPTOP = dict(width=128, depth=4, heads=4, mlp=512, patch=8, frames=8, size=32)
MASKS = ("4x0.3x0.5", "2x0.7x0.5")
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RGB = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
FLAGS = f"""--preset laptop --seed {SEED} --batch_size {BATCH} --micro_batch 2 --warmup {WARMUP}
    --stride 1 --crop_scale 0.3 0.6 --crop_ratio 0.75 1.35 --flip --workers 0 --probe_data
    --clip_grad {CLIP_GRAD} --betas {BETAS[0]} {BETAS[1]} --log_every 1 --sample_every 0""".split()


# --- what the scripts make ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A list of eight lossless videos of the built-in world, larger and longer than the clips."""
    if not shutil.which("ffmpeg"):
        pytest.skip("FFmpeg is not installed: apt-get install -y ffmpeg")
    folder = tmp_path_factory.mktemp("films")
    videos = data.World(frames=12, size=48).render(range(8))["video"]           # (8,12,48,48,3)
    ffmpeg = "ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s 48x48 -r 8 -i - -c:v ffv1 -pix_fmt bgr0"
    for i, video in enumerate(videos):
        command = [*ffmpeg.split(), folder / f"{i}.mkv"]
        subprocess.run(command, input=video.numpy().tobytes(), check=True)
    (folder / "list.txt").write_text("".join(f"{i}.mkv\n" for i in range(8)))
    return folder / "list.txt"


@pytest.fixture
def train(films, call, tmp_path, monkeypatch):
    """train(script, flags) -> its out directory; the second half of step 3 is made of NaN."""
    prepare = data.prepare
    calls = itertools.count()

    def poisoned(*args, **kwargs):
        number = next(calls) % (2 * STEPS)                  # of a micro-batch in its stage
        x = prepare(*args, **kwargs)
        return x * math.nan if number == 2 * POISONED + 1 else x

    def run_it(script, flags):
        with monkeypatch.context() as patch:
            patch.setattr(data, "prepare", poisoned)
            where = ("--data", films, "--out_dir", tmp_path / "out")
            call(script, *FLAGS, *flags.split(), *where)
        return tmp_path / "out"

    return run_it


def check(out, nets, exported, lines, pixels, exact=True):
    """What lies in `out` against the loop's nets {name: module or tensor} and log lines."""
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "loss" in line]
    for found, want in zip(logged, lines, strict=True):
        assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-6, abs=1e-12)

    want = {}
    for name, net in nets.items():
        parts = {"": net} if torch.is_tensor(net) else net.state_dict(prefix=".")
        want |= {name + key: value for key, value in parts.items()}
    dcp_to_torch_save(out / f"step_{STEPS:08d}", out / "all.pt")
    saved = torch.load(out / "all.pt", weights_only=True)["model"]
    assert saved.keys() == want.keys()
    assert [name for name in want if not alike(saved[name], want[name], exact)] == []

    encoder, config = load_encoder(out / "encoder.safetensors")
    assert (tuple(config["mean"]), tuple(config["std"])) == (pixels["mean"], pixels["std"])
    assert config["step"] == STEPS
    state = encoder.state_dict()
    for name, value in exported.state_dict().items():
        assert alike(state[name], value, exact), name


def alike(found, want, exact):
    """To the last bit, or to a ten thousandth (one step of Adam moves weights by a hundredth)."""
    if exact:
        return torch.equal(found, want)
    return (found - want).norm() <= 1e-4 * want.norm()


# --- what the loops share -------------------------------------------------------------------------

def batches(films, pixels=IMAGENET, zoom=0.0):
    """The clips of each step (4,3,8,32,32)."""
    clip = data.Clip(frames=8, stride=1, size=32, scale=(0.3, 0.6), zoom=zoom)
    loader = data.make_loader([data.parse_list(films)], clip, seed=SEED, batch_size=BATCH,
                              micro_batch=BATCH, steps=STEPS)
    return [data.prepare(batch, **pixels) for batch in loader]


class Adam:
    """AdamW with decay of matrices, and not of biases, norms and learned positions; clipping."""

    def __init__(self, *nets, slow=()):
        """slow: a net among them that learns at a tenth of the rate."""
        self.parameters = []
        groups = {}
        for net in nets:
            for name, p in net.named_parameters():
                decays = p.ndim >= 2 and not name.endswith(("bias", "pos_embed"))
                groups.setdefault((decays, 0.1 if net is slow else 1.0), []).append(p)
                self.parameters.append(p)
        self.groups = [{"params": groups[key], "key": key} for key in groups]
        self.optimizer = torch.optim.AdamW(self.groups, betas=BETAS, fused=True)

    def step(self, lr, weight_decay):
        """-> the global norm of the gradients before they are clipped"""
        gradients = [p.grad for p in self.parameters]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for g in gradients:
            g.mul_((CLIP_GRAD / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            decays, factor = group["key"]
            group["lr"] = lr * factor
            group["weight_decay"] = weight_decay if decays else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()


def follow(target, source, ema):
    for slow, fast in zip(target.parameters(), source.parameters()):
        slow.data.lerp_(fast.data, 1 - ema)


def cosine(share, first, last):
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def gather(h, ids):
    """h (B,N,D), ids (B,M) -> (B,M,D)"""
    return torch.stack([tokens[places] for tokens, places in zip(h, ids)])


def patches(x):
    """x (B,3,T,H,W) -> (B,N,3,128): tubelets of 2 frames and 8 x 8 pixels."""
    x = x.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)                       # (B,3,t,h,w,2,8,8)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(5).flatten(1, 3)


def predictor_of(encoder, out_width, init_std):
    return Predictor(in_width=128, out_width=out_width, width=64, depth=2, heads=4, mask_tokens=2,
                     grid=encoder.grid, pos="rope", init_std=init_std)


# --- V-JEPA ---------------------------------------------------------------------------------------

def test_vjepa(films, train):
    """Section 3: mean |P(E(x[keep])) - LN(Ebar(x))[pred]|; schedules of 1.25 * 6 steps."""
    out = train(train_vjepa, f"--steps {STEPS} --ema 0.9 --final_ema 0.99 --final_weight_decay 0.4"
                             " --stretch 1.25")
    torch.manual_seed(SEED)
    encoder = ViT(**LAPTOP, pos="rope", init_std=0.04)
    predictor = predictor_of(encoder, 128, 0.04)
    target = copy.deepcopy(encoder)
    adam = Adam(encoder, predictor)
    lines = []
    for step, clips in enumerate(batches(films)):
        if step == POISONED:
            continue
        keep, pred = data.sample_masks(MASKS, SEED, step, BATCH, encoder.grid)
        losses = []
        for half in HALVES:
            context = [ids[half] for ids in keep]
            hidden = [ids[half] for ids in pred]
            with torch.no_grad():
                h = F.layer_norm(target(clips[half]), (128,))
            zhat = predictor(encoder(clips[half], context), context, hidden)
            errors = [(z - gather(h, ids)).abs().mean() for z, ids in zip(zhat, hidden)]
            loss = (errors[0] + errors[1]) / 2
            (loss / 2).backward()
            losses.append(loss.item())

        share = step / (1.25 * STEPS)
        lr = 1e-4 + (1e-3 - 1e-4) * step / WARMUP
        if step >= WARMUP:
            lr = cosine((step - WARMUP) / (1.25 * STEPS - WARMUP), 1e-3, 1e-6)
        weight_decay = 0.04 + (0.4 - 0.04) * share
        ema = 0.9 + (0.99 - 0.9) * share
        norm = adam.step(lr, weight_decay)
        follow(target, encoder, ema)
        lines.append({"step": step + 1, "loss": sum(losses) / 2, "lr": lr, "grad_norm": norm,
                      "weight_decay": weight_decay, "ema": ema})
    nets = {"encoder": encoder, "predictor": predictor, "target": target}
    check(out, nets, target, lines, IMAGENET)


# --- SALT -----------------------------------------------------------------------------------------

def test_salt(films, train):
    """V-Pixel (section 2.2), then a student of its encoder, which is frozen (section 2.3)."""
    out = train(train_salt, f"--steps {2 * STEPS} --split 0.5 0.5 --final_weight_decay 0.4")

    def normalised_pixels(x):
        """(B,N,P): every patch and channel has mean 0 and deviation 1."""
        rgb = patches(x)                                                        # (B,N,3,128)
        deviation = rgb.std(-1, keepdim=True) + 1e-6
        return ((rgb - rgb.mean(-1, keepdim=True)) / deviation).flatten(2)

    stage1 = salt_stage(films, normalised_pixels, 3 * 128, torch.square)
    check(out / "stage1", stage1[0], stage1[0]["encoder"], stage1[1], IMAGENET)
    teacher = copy.deepcopy(stage1[0]["encoder"]).requires_grad_(False)
    stage2 = salt_stage(films, lambda x: F.layer_norm(teacher(x), (128,)), 128, torch.abs)
    check(out, stage2[0] | {"teacher": teacher}, stage2[0]["encoder"], stage2[1], IMAGENET)


def salt_stage(films, targets, out_width, penalty):
    """-> nets, log lines"""
    torch.manual_seed(SEED)
    encoder = ViT(**LAPTOP, pos="rope", init_std=0.06)
    predictor = predictor_of(encoder, out_width, 0.06)
    adam = Adam(encoder, predictor)
    lines = []
    for step, clips in enumerate(batches(films)):
        if step == POISONED:
            continue
        keep, pred = data.sample_masks(MASKS, SEED, step, BATCH, encoder.grid)
        losses = []
        for half in HALVES:
            context = [ids[half] for ids in keep]
            hidden = [ids[half] for ids in pred]
            h = targets(clips[half])
            zhat = predictor(encoder(clips[half], context), context, hidden)
            errors = [penalty(z - gather(h, ids)).mean() for z, ids in zip(zhat, hidden)]
            loss = (errors[0] + errors[1]) / 2
            (loss / 2).backward()
            losses.append(loss.item())

        lr = 2e-4 + (2e-3 - 2e-4) * step / WARMUP
        if step >= WARMUP:
            lr = cosine((step - WARMUP) / (STEPS - WARMUP), 2e-3, 1e-6)
        weight_decay = cosine(step / STEPS, 0.04, 0.4)
        norm = adam.step(lr, weight_decay)
        lines.append({"step": step + 1, "loss": sum(losses) / 2, "lr": lr, "grad_norm": norm,
                      "weight_decay": weight_decay})
    return {"encoder": encoder, "predictor": predictor}, lines


# --- TDV ------------------------------------------------------------------------------------------

class Head(nn.Module):
    """Three layers, a unit vector, its cosines with 64 unit prototypes, a scale for each."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(),
                                 nn.Linear(32, 64))
        self.prototypes = nn.Parameter(torch.empty(64, 64))
        self.scale = nn.Parameter(torch.ones(64, 1))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))

    def forward(self, x):
        unit = F.normalize(self.mlp(x), dim=-1)
        return unit @ (self.scale * F.normalize(self.prototypes, dim=1)).T


def test_tdv(films, train):
    """Section 3: (z + M(change | z) - h)^2 and cross-entropies of CLS and patches, centred."""
    out = train(train_tdv, f"--steps {STEPS} --ema 0.9 --final_ema 0.99 --motion_lr 0.1"
                           " --w_cls 0.75 --temp 0.1 0.07"
                           " --prototypes 64 --head_hidden 32 --head_bottleneck 64")
    torch.manual_seed(SEED)
    encoder = ViT(**LAPTOP, tubelet=1, images=True, cls=True, pos="learned", init_std=0.04)
    head = Head()
    target = copy.deepcopy(encoder)
    target_head = copy.deepcopy(head)
    centres = torch.zeros(2, 64)                            # of CLS and of patches
    motion = MotionEncoder(**LAPTOP, pos="learned", init_std=0.04)
    adam = Adam(encoder, head, motion, slow=motion)
    lines = []
    for step, clips in enumerate(batches(films)):
        if step == POISONED:
            continue
        losses = []
        means = []
        for half in HALVES:
            frames = clips[half].transpose(1, 2)[:, :, :, None]                 # (2,8,3,1,32,32)
            now = frames[:, :-1].flatten(0, 1)                                  # (14,3,1,32,32)
            then = frames[:, 1:].flatten(0, 1)
            z = encoder(now)                                                    # (14,17,128)
            zhat = z + motion(then - now, z)
            with torch.no_grad():
                h = target(then)
                teacher = target_head(h)                                        # (14,17,64)
            student = head(zhat).div(0.1).log_softmax(-1)
            cls = ((teacher[:, :1] - centres[0]) / 0.07).softmax(-1)
            patch = ((teacher[:, 1:] - centres[1]) / 0.07).softmax(-1)
            loss = 1.5 * (zhat - h).square().mean()
            loss = loss - 0.75 * (cls * student[:, :1]).sum(-1).mean()
            loss = loss - 1.5 * (patch * student[:, 1:]).sum(-1).mean()
            (loss / 2).backward()
            losses.append(loss.item())
            centre = [teacher[:, :1].mean((0, 1)), teacher[:, 1:].mean((0, 1))]
            means.append(torch.stack(centre))                                   # (2,64)

        lr = 1e-3 * step / WARMUP
        if step >= WARMUP:
            lr = cosine((step - WARMUP) / (STEPS - WARMUP), 1e-3, 1e-9)
        ema = cosine(step / STEPS, 0.9, 0.99)
        norm = adam.step(lr, 0.01)
        follow(target, encoder, ema)
        follow(target_head, head, ema)
        centres = 0.9 * centres + 0.1 * (means[0] + means[1]) / 2
        lines.append({"step": step + 1, "loss": sum(losses) / 2, "lr": lr, "grad_norm": norm,
                      "weight_decay": 0.01, "ema": ema})
    nets = {"encoder": encoder, "head": head, "target": target, "target_head": target_head,
            "centres": centres, "motion": motion}
    check(out, nets, target, lines, IMAGENET, exact=False)


# --- 4DS ------------------------------------------------------------------------------------------

def test_mae4d(films, train):
    """Section 3.1: RGB of all patches, from a quarter of them and latents in the last blocks."""
    out = train(train_mae4d, f"--steps {STEPS} --mask random:0.75 --final_lr 1e-5 --zoom 1.25")
    torch.manual_seed(SEED)
    encoder = ViT(**LAPTOP, pos="learned", final_norm=False, act="gelu_tanh", init_std=0.04)
    decoder = LatentGridDecoder(width=128, frames=8, size=32, patch=(2, 8), init_std=0.04)
    adam = Adam(encoder, decoder)
    lines = []
    both = zip(batches(films, IMAGENET, zoom=1.25), batches(films, RGB, zoom=1.25))
    for step, (clips, raw) in enumerate(both):
        if step == POISONED:
            continue
        (keep,), _ = data.sample_masks(["random:0.75"], SEED, step, BATCH, encoder.grid)
        losses = []
        for half in HALVES:
            z = encoder(clips[half], keep[half], blocks=2)                      # (2,16,128)
            rgbhat = decoder(z, encoder.blocks[2:])                             # (2,64,384)
            rgb = patches(raw[half]).flatten(2)                                 # (2,64,384)
            loss = (rgbhat - rgb).square().mean()
            (loss / 2).backward()
            losses.append(loss.item())

        lr = 2e-3 * step / WARMUP
        if step >= WARMUP:
            lr = cosine((step - WARMUP) / (STEPS - WARMUP), 2e-3, 1e-5)
        norm = adam.step(lr, 0.05)
        lines.append({"step": step + 1, "loss": sum(losses) / 2, "lr": lr, "grad_norm": norm,
                      "weight_decay": 0.05})
    check(out, {"encoder": encoder, "decoder": decoder}, encoder, lines, IMAGENET, exact=False)
