"""4DS: masked autoencoding of video that scales from 20M to 22B parameters.
Carreira et al. 2024, "Scaling 4D Representations".

    z      = first blocks of E (x[keep])      (B,3,T,H,W) -> (B,K,D)   5 % of the tokens, at random
    zhat   = last blocks of E ([z, latents])  -> (B,K+n,D)             n learned latents join
    rgbhat = Linear(zhat of the latents)      -> (B,n,P)               each latent is one patch
    L      = mean (rgbhat - rgb)^2 over all patches, hidden and seen; rgb is raw, in [0,1],
             x standardised

    python train_mae4d.py --preset laptop                  two cores, minutes, no download: a linear
                                                           probe near 19 %, random weights 14
    torchrun --nproc-per-node 8 train_mae4d.py --data videos.csv --micro_batch 64 --compile
                                                           the paper's 4DS-L
    python train_mae4d.py --preset j --dry_run             22B: memory and days on 8 to 256 GPUs

OUT_DIR/samples shows masked | reconstructed | original. Probes read the encoder without latents,
after 95 % of its blocks and never the last one, or 75 % for classification.
assets/mae4d.md: every flag at work, what the log says, results, deviations.
"""
import signal

if __name__ == "__main__":  # Ctrl-C before the run listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import os
from functools import partial
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """Defaults: the paper's recipe for 20M to 4B parameters (Table 4)."""
    # --- data
    data: tuple[str, ...] = ()          # lists of `path label` rows, LIST[:WEIGHT]; empty: world
    probe_data: tuple[str, ...] = ()    # online probe: a train and a val list with labels, or none
    frames: int = 16                    # of a clip
    stride: int = 2                     # video frames from one frame of a clip to the next
    fps: float = 0.0                    # > 0: sample by time stamp at this rate instead
    size: int = 224                     # pixels, after the crop
    zoom: float = 1.15                  # square crops of short side / zoom; 0: by the next two
    crop_scale: tuple[float, float] = (0.3, 1.0)    # area of the crop, one box for all frames
    crop_ratio: tuple[float, float] = (0.75, 1.35)  # its aspect ratio
    flip: bool = True                   # half of the clips
    clips_per_video: int = 1            # cut from each decoded video; 4 where decoding is slow
    short: Literal["repeat", "loop", "spread", "error"] = "repeat"  # what a short video becomes
    workers: int = -1                   # loader processes of a rank; -1: what the machine has
    timeout: int = 600                  # so many seconds without a batch end the run
    max_bad_fraction: float = 0.1       # share of unreadable videos; more end the run
    # --- architecture
    model: str = "vit_l"                # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 16                     # pixels
    tubelet: int = 2                    # frames
    dec_blocks: int = 4                 # last blocks of the encoder, which latents join (22B: 2)
    out_patch: tuple[int, int] = (2, 16)            # frames and pixels of a latent (22B: 4 32)
    init_std: float = 0.02              # of the random weights (the paper is silent)
    pos_std: float = 0.02               # of positions and latents
    standardise: bool = True            # what the encoder sees, by ImageNet's mean and deviation
    highpass: float = 0.0               # > 0: hide what is static, scale the rest (not the paper's)
    readout: float = 0.95               # share of the blocks after which probes read
    readout_classify: float = 0.75      # the same, for classification (section 4.1)
    init: str = ""                      # start from a run's folder, or a weight file's encoder
    # --- masks
    mask: str = "random:0.95"           # share that is hidden; tube:R, BLOCKSxSCALE[xTIME] too
    # --- optimization
    steps: int = 488_282
    flops: float = 0.0                  # > 0: as many steps as this many FLOPs pay for
    batch_size: int = 2048              # clips of a step, over all ranks
    micro_batch: int = 0                # clips of a forward pass on a rank; 0: what fits
    lr: float = 1e-4
    final_lr: float = 0.0               # cosine (the paper gives only the peak and the warm-up)
    warmup: int = 10_000                # steps, from 0
    weight_decay: float = 0.05          # not of positions, norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.0              # global norm, 0: off
    max_skips: int = 10                 # so many non-finite steps in a row end the run
    # --- the run
    preset: str = ""                    # values that become the defaults; a wrong name lists all
    out_dir: str = "out/mae4d"
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"         # bf16 or fp32
    compile: bool = False
    fsdp: bool = False                  # shard weights, gradients and optimizer over the ranks
    shard_ranks: int = 0                # --fsdp in groups of so many, copies between; 0: all
    checkpoint: bool = False            # recompute activations in the backward pass
    resume: bool = False                # go on from the newest checkpoint in out_dir
    new_data: bool = False              # --resume though --data holds other files
    stop_at: int = 0                    # > 0: save and leave at this step
    save_every: int = 1000              # steps; also at the end and on SIGTERM, SIGUSR1, Ctrl-C
    keep: int = 2                       # newest checkpoints that stay
    log_every: int = 10
    probe_every: int = 0                # 0: only at the start and at the end
    sample_every: int = 5000            # pictures of reconstructions; 0: none
    wandb: str = ""                     # project name: log there as well
    dry_run: bool = False               # parameters, FLOPs, memory and days; no data is touched


LAPTOP = dict(
    data=("world",), probe_data=("world", "world"), frames=8, size=32, patch=8, flip=False,
    zoom=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), mask="random:0.5",
    model="vit_n", dec_blocks=2, out_patch=(2, 8), init_std=0.04,
    steps=1000, batch_size=16, lr=2e-3, warmup=100,
    dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop_mae4d",
)
# A still camera: what never moves is hidden, or it is all that is learned (assets/vjepa.md).
LAPTOP_VIDEO = LAPTOP | dict(
    data=(), probe_data=(), frames=16, stride=3, size=48, highpass=4.0, zoom=1.15,
    mask="random:0.75",
    init_std=0.06, steps=3000, out_dir="out/laptop_video_mae4d",
)
BILLIONS_22 = dict(
    model="vit_j", size=256, dec_blocks=2, out_patch=(4, 32),
    steps=1_000_000, lr=2e-4, warmup=100_000, fsdp=True, checkpoint=True, out_dir="out/mae4d_j",
)
PRESETS = {"laptop": LAPTOP, "laptop_video": LAPTOP_VIDEO, "j": BILLIONS_22}
LATER = {"standardise": False}  # what runs did before this was a flag


def parse_args(argv=None):
    """The paper's recipe, then --preset, then the flags."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--preset", default="")
    preset = peek.parse_known_args(argv)[0].preset
    if preset and preset not in PRESETS:
        peek.exit(2, f"error: --preset {preset}: choose from {', '.join(PRESETS)}\n")
    defaults = Args(preset=preset, **PRESETS.get(preset, {}))
    return tyro.cli(Args, args=argv, default=defaults, description=__doc__, use_underscores=True,
                    console_outputs=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    ARGS = parse_args()  # before torch: --help is instant

import torch
import torch.nn as nn

import data
from model import (
    IMAGENET, SIZES, LatentGridDecoder, Meter, Row, Run, adamw, block_flops, budgeted,
    clip_gradients, construct, days, dry_run, hide, launch, make_encoder, patches, readout_layer,
    set_rates, some_rows, split_time, to_rgb, unpatch, warmup_decay,
)

RGB = dict(mean=[0.0] * 3, std=[1.0] * 3)  # of raw pixels, in [0,1]


# --- 4DS ------------------------------------------------------------------------------------------

class MAE4D(nn.Module):
    """The whole method: encoder, latent grid, loss, schedules (section 3.1)."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        shape = SIZES[args.model] | dict(
            patch=args.patch, tubelet=args.tubelet, pos="learned", final_norm=False,
            act="gelu_tanh", highpass=args.highpass)
        # of what the encoder sees. Raw pixels would make most of a token one constant: random
        # weights read flow no better than a constant does, and from standardised pixels they do
        pixels = IMAGENET if args.standardise else RGB
        self.encoder, self.pixels = make_encoder(args, shape, pixels)
        self.decoder = LatentGridDecoder(
            width=shape["width"], frames=args.frames, size=args.size, patch=args.out_patch,
            init_std=args.init_std)
        tables = [self.decoder.pos_embed, self.decoder.latents]
        if not args.init:
            tables.append(self.encoder.pos_embed)
        with torch.no_grad():
            for table in tables:
                table.mul_(args.pos_std / 0.02)
        depth = shape["depth"]
        if not 0 < args.dec_blocks <= depth:
            raise ValueError(f"--dec_blocks {args.dec_blocks}: the encoder has {depth}")
        # masks(step, B, rows=) -> ids (b,K) that are kept, of these rows of the batch; a function
        # of the seed and the step
        self.masks = partial(kept, args.mask, args.seed, self.encoder.grid)
        self.alone = depth - args.dec_blocks  # blocks that see the kept tokens only
        self.layers = {  # blocks after which probes read
            "layer": readout_layer(depth, args.readout),
            "layer_classify": readout_layer(depth, args.readout_classify),
        }

    @property
    def product(self):
        """What is exported and probed."""
        return self.encoder

    def forward(self, x, keep=None, reconstruct=False):
        """x (B,3,T,H,W); keep: ids (B,K) -> loss, metrics, or with `reconstruct` the decoded clips
        (B,3,T,H,W) in [0,1].

        Without masks: the tokens (B,N,D) that a classification probe reads, no latents involved.
        (FSDP gathers the root's parameters only inside this forward, so everything enters here.)
        """
        if keep is None:
            return self.encoder(x, blocks=self.layers["layer_classify"])
        z = self.encoder(x, keep, blocks=self.alone)  # (B,K,D)
        shared = self.encoder.blocks[self.alone:]
        rgbhat = self.decoder(z, shared, self.encoder.checkpoint).float()  # (B,n,P)
        if reconstruct:
            return unpatch(rgbhat, self.decoder.grid, *self.decoder.patch)
        rgb = patches(self.raw(x), *self.decoder.patch).flatten(1, 3).flatten(2)  # (B,n,P)
        return (rgbhat - rgb).square().mean(), {"tokens": some_rows(z)}

    def raw(self, x):
        """What the encoder sees (B,3,T,H,W) -> RGB in [0,1], the target."""
        return to_rgb(x, **self.pixels)

    def schedules(self, step):
        """Functions of the step alone."""
        a = self.args
        lr = warmup_decay(step, a.warmup, a.steps, 0.0, a.lr, a.final_lr)
        return {"lr": lr, "weight_decay": a.weight_decay}

    def flops(self, keep):
        """Of one clip, forward and backward; a backward pass costs two forward passes."""
        e = self.encoder
        kept = keep.shape[1]
        joined = kept + self.decoder.latents.shape[1]
        more = block_flops(e.width, e.mlp, [joined]) - block_flops(e.width, e.mlp, [kept])
        return 3 * (e.flops(kept) + self.args.dec_blocks * more + self.decoder.flops())

    def surprise(self, x, context):
        """(B,): error in decoding what follows the first `context` frames of x."""
        keep, _ = split_time(self.encoder, x, context)
        error = self(x, keep, reconstruct=True) - self.raw(x)
        return error[:, :, context:].abs().mean((1, 2, 3, 4))


def kept(mask, seed, grid, step, batch_size, rows=None):
    """((b,K),): the ids that a mask keeps."""
    keep, _ = data.sample_masks([mask], seed, step, batch_size, grid, rows=rows)
    return tuple(keep)


def picture(run, x, keep, decoded, grid):
    """Clips x (b,3,T,H,W) in [0,1], two rows each, of the first and the middle slice:
    masked | reconstructed | original."""
    rows = []
    tubelet = x.shape[2] // grid[0]
    for clip, ids, guess in zip(x.cpu(), keep, decoded.cpu()):
        original = clip[:, ::tubelet].permute(1, 2, 3, 0)  # (t,H,W,3)
        reconstructed = guess[:, ::tubelet].permute(1, 2, 3, 0)
        shown = torch.stack([hide(original, ids, grid), reconstructed, original], 1)
        for at in (0, grid[0] // 2):
            rows.append(Row(f"slice {at}", shown[at].clamp(0, 1)))
        rows.append(None)
    run.sample(["masked", "reconstructed", "original"], rows[:-1])


# --- the run --------------------------------------------------------------------------------------

def build(args):
    """The objective that these flags ask for: what probe.py calls in every script."""
    return MAE4D(args)


def plan(run, objective):
    """--dry_run: memory and time on 8, 64 and 256 GPUs, and the JSON line for this many ranks."""
    for gpus in (8, 64, 256):
        memory = run.plan.terms(1, shards=gpus)
        parts = " + ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in memory.items())
        if run.rank == 0:
            print(f"{run.args.model} on {gpus:3d} GPUs with --fsdp at --micro_batch 1: {parts}; "
                  f"{days(run.plan.flops * run.args.steps, gpus):.3g} days at 50 % of an H100's or "
                  "H200's 989 bf16 TFLOP/s")
    dry_run(run, objective)


def main(args):
    sketch = construct(build, dataclasses.replace(args, dry_run=True))
    args = budgeted(args, (1.0, sketch))
    run = Run(args, later=LATER)
    run.fit(sketch)
    if args.dry_run:
        return plan(run, sketch)
    objective = construct(build, args)
    grid = objective.encoder.grid
    sources = run.sources()
    run.continue_from(objective)
    run.open(__file__, sources)

    net = run.wrap(objective)  # what is called, trained and saved
    optimizer = adamw(objective, args)
    meter = Meter(run, run.load(net, optimizer))
    if run.done == 0 and not args.init:  # before learning: what it has to beat
        meter.state["random_acc"] = run.accuracy(net, **objective.pixels)
    loader = run.loader(sources, objective.masks)

    for step in run.steps():
        # 1. the rates of this step
        rates = objective.schedules(step)
        set_rates(optimizer, rates)

        # 2. forward and backward, a micro-batch at a time
        for _ in run.passes(net):
            batch = meter.next(loader)
            x = data.prepare(batch, run.device, **objective.pixels)  # (b,3,T,H,W)
            keep = batch["masks"][0]  # (b,K)
            with run.autocast():
                loss, metrics = net(x, keep)
            (loss * (run.micro / run.per_rank)).backward()
            tokens = metrics.pop("tokens")
            meter.add(loss, metrics, batch, flops=objective.flops(keep))

        # 3. the step; where a loss or gradient is not finite, all ranks skip it alike
        grad_norm = clip_gradients(objective, args.clip_grad)
        skip = meter.skip(step, grad_norm)  # 1.0 or 0.0, on the device
        optimizer.found_inf = skip
        optimizer.step()
        optimizer.zero_grad()
        meter.after_step()

        # 4. log, pictures, checkpoint, probe
        if meter.logs():
            run.log(meter.line(rates, run.health(tokens)))
        if run.due(args.sample_every):
            with torch.no_grad(), run.autocast():
                decoded = net(x[:3], keep[:3], reconstruct=True)
            if run.rank == 0:
                picture(run, objective.raw(x[:3]), keep[:3], decoded, grid)
        if meter.saves(net, x, keep):
            run.export(objective, **objective.pixels, **objective.layers)
            run.save(net, optimizer, meter.state)
        if run.stop:
            break
        if run.probes():
            run.accuracy(net, **objective.pixels)

    probe_acc = run.accuracy(net, **objective.pixels) if run.done == args.steps else None
    run.finish(meter.summary(probe_acc))


if __name__ == "__main__":
    launch(main, ARGS)
