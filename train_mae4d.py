"""4DS: masked autoencoding of video that scales from 24M to 22B parameters.
Carreira et al. 2024, "Scaling 4D Representations".

    z      = first blocks of E (x[keep])                      (B,3,T,H,W) -> (B,K,D)     5 % of the tokens, chosen at random: 78 of 1568
    zhat   = last blocks of E ([z, learned grid of latents])  -> (B,K+n,D)               no separate decoder: a latent is content + position
    rgbhat = Linear(zhat of the latents)                      -> (B,n,P)                 each latent is one patch
    L      = mean (rgbhat - rgb)^2 over all patches, hidden and seen, of raw RGB in [0,1]

    Laptop, two cores, minutes, no download:           python train_mae4d.py --preset laptop
    Eight GPUs, the paper's 4DS-L:                     torchrun --nproc-per-node 8 train_mae4d.py --data videos.csv --micro_batch 64 --compile
    The 22B model, planned for 256 GPUs:               python train_mae4d.py --preset j --dry_run

Probes read the encoder without latents after 95 % of its blocks (75 % for classification); pictures show masked | reconstructed | original.
"""
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass
class Args:
    """The defaults are the paper's recipe for 20M to 4B parameters (Table 4), whatever their field says otherwise."""
    # data
    data: tuple[str, ...] = ()             # lists of `path label` lines, each `file[:weight]`; `world` is the built-in world
    probe_data: tuple[str, ...] = ()       # online probe: a train list and a val list with labels (`world world`: the world's); empty: none
    frames: int = 16                       # frames per clip
    stride: int = 2                        # video frames between two frames of a clip
    fps: float = 0.0                       # > 0: sample by time stamp at this rate instead of --stride
    size: int = 224                        # pixels, after the crop
    zoom: float = 1.15                     # the random crop is a square of the short side / zoom; 0: --crop_scale and --crop_ratio
    crop_scale: tuple[float, float] = (0.3, 1.0)     # area of a random resized crop (one box for all frames of a clip)
    crop_ratio: tuple[float, float] = (0.75, 1.35)   # its aspect ratio
    flip: bool = True                      # horizontal flip of half of the clips
    clips_per_video: int = 1               # clips taken from each opened video: > 1 when decoding is the bottleneck
    workers: int = 8                       # loader processes per rank
    timeout: int = 600                     # seconds without a batch from a loader process that end the run
    max_bad_fraction: float = 0.1          # stop when more than this share of the opened videos (of 100 at least) cannot be read
    # architecture
    model: str = "vit_l"                   # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES
    patch: int = 16                        # pixels
    tubelet: int = 2                       # frames
    dec_blocks: int = 4                    # last blocks of the encoder, which the latents join (2 for 22B)
    out_patch: tuple[int, int] = (2, 16)   # frames and pixels of a decoded patch (4 32 for 22B: a coarser grid of latents)
    init_std: float = 0.02                 # of the random weights (the paper is silent)
    pos_std: float = 0.02                  # of the initial positions and latents; small models learn sooner where positions are not drowned by the pixels
    readout: float = 0.95                  # probes read after this share of the blocks ...
    readout_classify: float = 0.75         # ... and after this one for classification (section 4.1), as the exported file says
    init: str = ""                         # start from a run's folder (all its weights), or the encoder from any file model.load_encoder reads
    mask: str = "random:0.95"              # share of the tokens that is hidden; tube:R and BLOCKSxSCALE are possible too
    # optimization
    steps: int = 488_282
    batch_size: int = 2048                 # clips per step over all ranks, whatever their number
    micro_batch: int = 0                   # clips per forward pass on a rank; 0: all at once, else gradients are accumulated
    lr: float = 1e-4
    final_lr: float = 0.0                  # cosine from --lr after the warm-up (the paper gives only --lr and --warmup)
    warmup: int = 10_000                   # steps, linear from 0
    weight_decay: float = 0.05             # not of positions, norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.0                 # global norm; 0: off
    max_skips: int = 10                    # stop after so many steps in a row with a loss or gradient that is not finite
    # the run
    preset: str = ""                       # j, laptop, laptop_video: values that become the defaults of all flags
    out_dir: str = "out/mae4d"
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    fsdp: bool = False                     # shard parameters, gradients and optimizer state over the ranks (FSDP2)
    checkpoint: bool = False               # recompute activations in the backward pass
    resume: bool = False                   # continue the run in out_dir from its newest checkpoint, or start it
    stop_at: int = 0                       # > 0: save and leave at this step; schedules still run to --steps
    save_every: int = 1000                 # steps; also at the end and on SIGTERM, SIGUSR1 and the first SIGINT
    keep: int = 2                          # newest checkpoints that stay
    log_every: int = 10
    probe_every: int = 0                   # steps; 0: only at the start and at the end
    sample_every: int = 5000               # steps between pictures of reconstructions; 0: none
    wandb: str = ""                        # project name: log there as well
    dry_run: bool = False                  # print parameters, FLOPs, memory and days, touch no data


PRESETS = {
    "j": dict(model="vit_j", size=256, dec_blocks=2, out_patch=(4, 32), steps=1_000_000, lr=2e-4, warmup=100_000, fsdp=True, checkpoint=True, out_dir="out/mae4d_j"),
    "laptop": dict(data=("world",), probe_data=("world", "world"), model="vit_n", frames=8, size=32, patch=8, out_patch=(2, 8), dec_blocks=2, zoom=0.0,
                   init_std=0.06, pos_std=0.5, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, mask="random:0.5", steps=2000, batch_size=16,
                   lr=2e-3, warmup=100, dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop_mae4d"),
}
PRESETS["laptop_video"] = PRESETS["laptop"] | dict(data=(), probe_data=(), frames=16, stride=3, size=48, zoom=1.15, mask="random:0.75", steps=3000,
                                                   out_dir="out/laptop_video_mae4d")


def parse_args(argv=None):
    """Flags over the preset over the paper. One line and status 2 for anything that cannot be run."""
    argv = sys.argv[1:] if argv is None else argv
    names = [b if a == "--preset" else a[9:] for a, b in zip(argv, argv[1:] + [""]) if a == "--preset" or a.startswith("--preset=")]
    if names and names[-1] not in PRESETS:
        sys.exit(print(f"error: --preset {names[-1]}: choose from {', '.join(PRESETS)}", file=sys.stderr) or 2)
    preset = Args(preset=names[-1], **PRESETS[names[-1]]) if names else Args()
    return tyro.cli(Args, args=argv, default=preset, description=__doc__, console_outputs=os.environ.get("RANK", "0") == "0")


ARGS = parse_args() if __name__ == "__main__" else None     # before torch is imported, so that --help is instant

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint import state_dict as dcs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
import model as M

RGB = dict(mean=[0.0] * 3, std=[1.0] * 3)                        # what the model sees and decodes: RGB in [0,1]


class MAE4D(nn.Module):
    """The whole method: encoder, latent grid, loss (section 3.1)."""

    def __init__(self, args):
        super().__init__()
        self.args, shape = args, M.SIZES[args.model] | dict(patch=args.patch, tubelet=args.tubelet, pos="learned", final_norm=False, act="gelu_tanh")
        if args.init:
            given, shape = M.load_start(args.init, shape)
        self.encoder = M.ViT(**shape, frames=args.frames, size=args.size, init_std=args.init_std, checkpoint=args.checkpoint)
        self.decoder = M.LatentGridDecoder(width=shape["width"], frames=args.frames, size=args.size, patch=args.out_patch, init_std=args.init_std)
        with torch.no_grad():
            for p in (self.encoder.pos_embed, self.decoder.pos_embed, self.decoder.latents):
                p.mul_(args.pos_std / 0.02)
        if args.init:
            M.fill(self.encoder, given.state_dict(), args.init)
        depth = len(self.encoder.blocks)
        if not 0 < args.dec_blocks <= depth:
            raise ValueError(f"--dec_blocks {args.dec_blocks}: the encoder has {depth}")
        self.alone = depth - args.dec_blocks                    # blocks that see the kept tokens only
        self.layers = {"layer": max(1, round(args.readout * depth)), "layer_classify": max(1, round(args.readout_classify * depth))}

    def forward(self, x, keep=None, reconstruct=False):
        """x (B,3,T,H,W) in [0,1]; keep (B,K) ids -> loss, metrics. reconstruct: -> the decoded clips (B,3,T,H,W).
        Without keep: the tokens (B,N,D) that a classification probe reads, no latents involved."""
        if keep is None:
            return self.encoder(x, blocks=self.layers["layer_classify"])
        z = self.encoder(x, keep, blocks=self.alone)                                                            # (B,K,D)
        rgbhat = self.decoder(z, self.encoder.blocks[self.alone:], self.args.checkpoint).float()                # (B,n,P), the loss in float32
        a, p = self.decoder.patch
        if reconstruct:
            return M.unpatch(rgbhat, self.decoder.grid, a, p)
        rgb = M.patches(x, a, p).flatten(1, 3).flatten(2)                                                       # (B,n,P)
        tokens = z.detach().flatten(0, 1)
        return (rgbhat - rgb).square().mean(), {"tokens": tokens[:: max(1, len(tokens) // 2048)]}

    def schedules(self, step):
        """Functions of the step alone."""
        a = self.args
        return {"lr": a.lr * step / a.warmup if step < a.warmup else cosine(step - a.warmup, a.steps - a.warmup, a.lr, a.final_lr), "weight_decay": a.weight_decay}

    def flops(self, K):
        """Forward and backward FLOPs of one clip of which K tokens are kept."""
        e, n = self.encoder, self.decoder.latents.shape[1]
        joint = self.args.dec_blocks * (M.block_flops(e.width, e.mlp, [K + n]) - M.block_flops(e.width, e.mlp, [K]))
        return 3 * (e.flops(K) + joint + self.decoder.flops())


# --- runtime (identical in every script; python tests/test_runtime.py --fix re-copies it) ---
def fail(message, status=2):
    """One clear line. Status 2: what the user must mend; 1: what broke on the way."""
    sys.exit(print(f"error: {message}", file=sys.stderr, flush=True) or status)


def launch(main, args):
    """Run main; what can be foreseen ends in one line, all else in a traceback."""
    try:
        main(args)
    except D.DataError as e:
        fail(e)
    except (RuntimeError, ConnectionError) as e:
        if not (why := D.dead_worker(e)):
            raise
        fail(why, 1)
    except (OSError, dcp.api.CheckpointException) as e:         # a full disk, say
        why = next(iter(e.failures.values()))[0] if hasattr(e, "failures") else e
        while why.__context__:                                  # the first cause says it best
            why = why.__context__
        fail(f"{args.out_dir}: {' '.join(str(why).split())[:300]}; what was saved before stays valid", 1)


def cosine(step, total, first, last):
    """first at step 0, last from step `total` on."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


class Run:
    """What every script needs and no paper claims: ranks, out directory, log, signals, checkpoints, online probe."""
    FREE = {"out_dir", "resume", "stop_at", "workers", "timeout", "micro_batch", "save_every", "keep", "log_every", "probe_every", "sample_every", "compile",
            "fsdp", "checkpoint", "wandb", "max_bad_fraction", "max_skips", "dry_run", "stage", "ce_rows"}     # flags that a resumed run may change
    POSITIVE = {"steps", "batch_size", "lr", "frames", "stride", "size", "patch", "tubelet", "log_every", "save_every", "keep", "timeout", "prototypes", "ce_rows", "temp"}
    SHARES = {"ema", "final_ema", "max_bad_fraction", "betas"}
    stop = False                                                # of the process: a signal between two stages counts for the next one

    def __init__(self, args):
        self.args, self.out, self.start = args, Path(args.out_dir), time.time()
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for name, value in vars(args).items():
            for v in (value if isinstance(value, tuple) else (value,)):
                if isinstance(v, (int, float)) and not (0 <= v < math.inf and (v > 0 or name not in self.POSITIVE) and (v <= 1 - 1e-9 * (name == "betas") or name not in self.SHARES)):
                    fail(f"--{name} {v}: {'a share from 0 to 1' if name in self.SHARES else 'a positive finite number'} is needed")
        if args.batch_size % (self.ranks * max(1, args.micro_batch)):
            fail(f"--batch_size {args.batch_size} is not a multiple of {self.ranks} rank(s) x --micro_batch {args.micro_batch or 1}")
        if (args.micro_batch or args.batch_size // self.ranks) % args.clips_per_video:
            fail(f"--clips_per_video {args.clips_per_video} does not divide the {args.micro_batch or args.batch_size // self.ranks} clips of a forward pass")
        if args.wandb and not importlib.util.find_spec("wandb"):
            fail("--wandb needs: pip install wandb")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            M.tune_cpu()
        if "RANK" in os.environ and not args.dry_run and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=max(1800, args.timeout)))
        warnings.filterwarnings("ignore", "torch.distributed is disabled")          # what checkpointing says to a single process
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def open(self, data_hash):
        """Take the out directory: lock it, refuse to overwrite or to mix runs, write the first log line."""
        config, error = json.loads(json.dumps(vars(self.args) | {"data_hash": data_hash})), None
        sources = b"".join(Path(f).read_bytes() for f in (__file__, D.__file__, M.__file__))
        head = {"config": config, "argv": sys.argv, "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
                "source": hashlib.sha256(sources).hexdigest()[:16], "ranks": self.ranks, "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"}
        if self.rank == 0:
            try:
                (self.out / "samples").mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / "lock", "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (self.out / "config.json").exists():
                    old = json.loads((self.out / "config.json").read_text())["config"]
                    differ = [f"{k} ({old.get(k)} -> {v})" for k, v in config.items() if k not in self.FREE and old.get(k) != v]
                    error = (f"{self.out} was started with other settings: {', '.join(differ)}" if self.args.resume and differ else
                             None if self.args.resume else f"{self.out} holds a run: --resume continues it, another --out_dir starts afresh")
                if not error:
                    M.write(self.out / "config.json", json.dumps(head, indent=1))
                    if (log := self.out / "log.jsonl").exists() and not (text := log.read_bytes()).endswith(b"\n"):
                        M.write(log, text[: text.rfind(b"\n") + 1].decode())         # half a line: the run was killed as it wrote
            except BlockingIOError:
                error = f"{self.out} is in use by another run"
            except OSError as e:
                error = f"--out_dir {self.out}: {e.strerror}"
        if error := self.broadcast(error):
            fail(error)
        if self.rank == 0 and self.args.wandb:
            import wandb
            wandb.init(project=self.args.wandb, config=config)
        self.log(head, show=False)
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self.on_signal)

    def on_signal(self, number, frame):
        if number == signal.SIGINT and self.stop:
            os._exit(130)                                       # a second Ctrl-C waits for nothing
        Run.stop = True

    def broadcast(self, value):
        """Rank 0's value on all ranks; also a barrier."""
        box = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value):
        """The values of all ranks in a list, on all ranks."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def mean(self, *values):
        """The mean over ranks of each value, the same on all of them."""
        t = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(t)
        return (t / self.ranks).tolist()

    def log(self, line, show=True):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line, allow_nan=False) + "\n")
            if show:
                tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), file=sys.stderr)
            if show and self.args.wandb:
                sys.modules["wandb"].log(line)

    def wrap(self, module):
        """Compile, then shard or replicate. The returned module is called, the given one is saved."""
        if self.args.compile:
            M.compile_blocks(module)
        if self.args.fsdp and self.ranks > 1:
            return M.shard(module, param_dtype=torch.bfloat16 if self.args.dtype == "bf16" else None)
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if self.ranks > 1 else module

    def sync(self, module, on):
        """Gradients travel between the ranks in the last of a step's micro-batches only."""
        if self.ranks > 1:
            module.set_requires_gradient_sync(on) if self.args.fsdp else setattr(module, "require_backward_grad_sync", on)

    def save(self, step, module, optimizer, extra):
        """All into a temporary directory, hashed and flushed, renamed, then the pointer: a kill at any moment leaves the last good one."""
        final, temp = self.out / f"step_{step:08d}", self.out / "saving"
        if self.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
        self.broadcast(None)
        dcp.save({"model": dcs.get_model_state_dict(module), "optimizer": dcs.get_optimizer_state_dict(module, optimizer)}, checkpoint_id=temp)
        if self.rank == 0:
            (temp / "extra.json").write_text(json.dumps({"step": step, **extra}))
            M.seal(temp, final, self.args.keep)
        self.broadcast(None)

    def shapes(self, checkpoint):
        """{name: shape} of the tensors in a checkpoint."""
        return {name: getattr(v, "size", None) for name, v in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()}

    def check_start(self, objective, folder):
        """--init RUN, before anything is written: has its checkpoint all of the objective, in these shapes? Heads that are new stay as they are."""
        error, found = None, M.newest(folder) if self.rank == 0 else None
        if isinstance(found, Path):
            there = self.shapes(found)
            differ = [f"{name} {tuple(v.shape)} (there {tuple(there[f'model.{name}']) if f'model.{name}' in there else 'none'})" for name, v in objective.state_dict().items()
                      if there.get(f"model.{name}") != v.shape and (f"model.{name}" in there or not name.startswith("heads."))]
            error = f"--init {folder}: that run had other flags: {', '.join(differ[:3])}" if differ else None
        if error := self.broadcast(error):
            fail(error)

    def load(self, module, optimizer=None, folder=None):
        """The checkpoint that `latest` names, or the newest before it whose hashes agree -> its extras; {} where there is none.
        Without an optimizer only the weights: the start from another run's folder."""
        found = self.broadcast(M.newest(folder or self.out) if self.rank == 0 else None)
        if isinstance(found, str):
            fail(found)
        if not found:
            return {}
        state = {"model": dcs.get_model_state_dict(module)} | ({"optimizer": dcs.get_optimizer_state_dict(module, optimizer)} if optimizer else {})
        if folder:
            there = self.shapes(found)
            state["model"] = {name: v for name, v in state["model"].items() if f"model.{name}" in there}
        dcp.load(state, checkpoint_id=found)
        dcs.set_model_state_dict(module, state["model"], options=dcs.StateDictOptions(strict=not folder))
        if optimizer:
            dcs.set_optimizer_state_dict(module, optimizer, state["optimizer"])
        return json.loads((found / "extra.json").read_text())

    def export(self, encoder, **config):
        """encoder.safetensors, for probes and for sharing; all ranks take part."""
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in encoder.state_dict().items()}
        if self.rank == 0:
            M.save_encoder(self.out / "encoder.safetensors", state, encoder.config | config)
        self.broadcast(None)                                    # whoever reads it next, on any rank, finds it

    @torch.no_grad()
    def probe(self, features, train, val, clip, heads=None, **pixels):
        """{name: accuracy on the source `val`} of probes of features(x) -> (B,D), fitted on the source `train`; all ranks take part. heads: {name: function
        of x, y, xv -> classes of xv}; a linear one if it is not said. pixels: mean and std of what the encoder was trained on, else ImageNet's."""
        (x, y, ok), (xv, yv, okv) = (D.labelled_features(features, source, clip, self.device, workers=self.args.workers, rank=self.rank, ranks=self.ranks,
                                                         gather=self.gather, timeout=self.args.timeout, **pixels) for source in (train, val))
        heads = heads or {"probe_acc": M.linear_probe}
        return {name: ((head(x[ok], y[ok], xv) == yv) & okv).double().mean().item() for name, head in heads.items()}     # an unreadable video counts as wrong
# --- end runtime ---


def picture(path, x, keep, shown, grid):
    """Three clips, a pair of rows each for frames 1 and T/2 + 1: masked | reconstructed | original."""
    T, H = x.shape[2], x.shape[3]
    seen = torch.zeros(len(x), math.prod(grid), device=x.device).scatter(1, keep, 1.0).view(-1, 1, *grid)
    for axis, times in ((2, T // grid[0]), (3, H // grid[1]), (4, H // grid[2])):
        seen = seen.repeat_interleave(times, axis)
    rows = [torch.cat([v[:, t] for v in clip], 2) for clip in zip(x * seen + 0.5 * (1 - seen), shown, x) for t in (0, T // 2)]     # each (3,H,3W)
    image, zoom = torch.cat(rows, 1).permute(1, 2, 0), max(1, 112 // H)
    D.save_png(path, image.float().clamp(0, 1).mul(255).byte().cpu().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())


def plan(args, objective, K, gpus, micro):
    """Bytes on each GPU with --fsdp, for K kept tokens and clips of a micro-batch. state: float32 weights, gradients and Adam's two moments, sharded.
    whole: two blocks' weights, the one at work and the next. activations: what autograd keeps of a token in a block, 10 values a channel and 2 of the
    MLP's (bf16: 4 bytes a channel more, the float32 residuals), or with --checkpoint one value a channel, and all the rest for one block."""
    e, n, size = objective.encoder, objective.decoder.latents.shape[1], 2 if args.dtype == "bf16" else 4
    tokens = [K] * objective.alone + [K + n] * args.dec_blocks
    kept = lambda count: count * ((10 * e.width + 2 * e.mlp) * size + (4 * e.width if size == 2 else 0))
    return {"state": sum(p.numel() for p in objective.parameters()) * 16 // gpus,
            "whole": 2 * size * sum(p.numel() for p in e.blocks[0].parameters()) if gpus > 1 else 0,
            "activations": micro * (4 * e.width * sum(tokens) + kept(max(tokens)) if args.checkpoint else sum(map(kept, tokens)))}


def dry_run(args, run, objective, K):
    """Sizes from the meta device -> a plan of memory and time on 8, 64 and 256 GPUs, and one JSON line for the ranks that this is run with."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    flops = objective.flops(K) * args.batch_size
    days = lambda gpus: flops * args.steps / (gpus * 0.5 * 989e12) / 86400
    p = plan(args, objective, K, run.ranks if args.fsdp else 1, args.micro_batch or args.batch_size // run.ranks)
    if run.rank == 0:
        for gpus in (8, 64, 256):
            parts = " + ".join(f"{v / 2**30:.2f} GiB {k}" for k, v in plan(args, objective, K, gpus, 1).items())
            print(f"{args.model} on {gpus:3d} GPUs at --micro_batch 1: {parts}; {days(gpus):.3g} days at 50 % of an H100's or H200's 989 bf16 TFLOP/s")
        print(json.dumps({"params": count(objective), "params_encoder": count(objective.encoder), "flops_per_step": flops, "flops_per_clip": flops / args.batch_size,
                          "bytes_per_gpu": sum(p.values()), "gpus": run.ranks, "days": days(run.ranks)}))


def main(args):
    run = Run(args)
    if args.model not in M.SIZES:                               # everything a user can get wrong is looked at before work starts
        fail(f"--model {args.model}: choose from {', '.join(M.SIZES)}")
    torch.manual_seed(args.seed)
    try:
        with torch.device("meta" if args.dry_run else "cpu"):
            objective = MAE4D(dataclasses.replace(args, init="") if args.dry_run else args)
    except ValueError as e:
        fail(e)
    grid = objective.encoder.grid
    K = D.sample_masks([args.mask], args.seed, 0, min(args.batch_size, 64), grid)[0][0].shape[1]
    if args.dry_run:
        return dry_run(args, run, objective, K)
    if not args.data:
        raise D.DataError("no data: give --data LIST (see README, Data) or --preset laptop")
    if len(args.probe_data) not in (0, 2):
        raise D.DataError(f"--probe_data {' '.join(args.probe_data)}: two lists are needed, one to fit the probe and one to test it")
    clip = D.Clip(frames=args.frames, stride=args.stride, fps=args.fps or None, size=args.size, zoom=args.zoom, scale=args.crop_scale, ratio=args.crop_ratio,
                  flip=args.flip, clips=args.clips_per_video)
    sources = [D.parse_list(spec) for spec in args.data]
    probe = [D.parse_list(spec, split, labelled=True) for spec, split in zip(args.probe_data, ("probe", "val"))]
    if args.init and Path(args.init).is_dir():
        run.check_start(objective, args.init)
    run.open(D.fingerprint(sources))

    model = run.wrap(objective.to(run.device))
    optimizer = torch.optim.AdamW(M.param_groups(objective, args.weight_decay), lr=args.lr, betas=args.betas, fused=True)
    if args.init and Path(args.init).is_dir():
        run.load(model, folder=args.init)
    extra = {"step": 0, "random_acc": None, "bad": 0, "loss": None, "window": [], "flops": 0.0} | (run.load(model, optimizer) if args.resume else {})
    first, window = extra.pop("step"), extra["window"]

    def features(x):                                            # what the online probe reads: the encoder's tokens, averaged
        with run.autocast():
            return model(x).mean(1)

    def accuracy():
        return run.probe(features, *probe, dataclasses.replace(clip, train=False, clips=1), **RGB)["probe_acc"] if probe else None

    if first == 0 and not args.init:
        extra["random_acc"] = accuracy()                        # the encoder as it was initialised: what learning has to beat
    per_rank, last = args.batch_size // run.ranks, min(args.steps, args.stop_at or args.steps)
    micro, rows = args.micro_batch or per_rank, slice(run.rank * per_rank, (run.rank + 1) * per_rank)
    loader = iter(D.make_loader(sources, clip, seed=args.seed, batch_size=args.batch_size, micro_batch=micro, rank=run.rank, ranks=run.ranks,
                                workers=args.workers, start_step=first, steps=last, timeout=args.timeout))
    peak = {"H200": 989e12, "H100": 989e12, "A100": 312e12}     # dense bf16 FLOP/s
    peak = next((v for k, v in peak.items() if run.device.type == "cuda" and k in torch.cuda.get_device_name()), None)
    done, skips, clips, wait, mark, since = first, 0, 0, 0.0, extra["flops"], time.perf_counter()

    for step in tqdm(range(first, last), initial=first, total=args.steps, disable=run.rank > 0 or not sys.stderr.isatty()):
        torch.manual_seed(args.seed * 1_000_003 + step)         # no random state outlives a step, so none needs saving
        now = objective.schedules(step)
        for g in optimizer.param_groups:
            g["lr"], g["weight_decay"] = now["lr"], now["weight_decay"] if g["decay"] else 0.0
        keep = D.sample_masks([args.mask], args.seed, step, args.batch_size, grid, rows=rows)[0][0]
        seen, bad = [], 0
        for i in range(0, per_rank, micro):
            begin = time.perf_counter()
            batch = next(loader)
            wait += time.perf_counter() - begin
            x, k = D.prepare(batch, run.device, **RGB), keep[i : i + micro].to(run.device)
            run.sync(model, i + micro >= per_rank)
            with run.autocast():
                loss, metrics = model(x, k)
            (loss * (micro / per_rank)).backward()
            tokens = metrics.pop("tokens")
            seen.append(({"loss": loss.detach(), **metrics}, batch["path"]))
            extra["flops"] += objective.flops(k.shape[1]) * micro * run.ranks
            bad += len(batch["bad"])
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), args.clip_grad or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        terms = {name: sum(float(metrics[name]) for metrics, _ in seen) / len(seen) for name in seen[0][0]}
        *means, bad, stop = run.mean(*terms.values(), bad, run.stop)                # a signal on one rank stops them all after the same step
        extra["bad"] += round(bad * run.ranks)
        if math.isfinite(norm + sum(means)):                    # all ranks have the same numbers, so all decide alike
            optimizer.step()
            window.append(dict(zip(terms, means)))
            skips = 0
        else:
            skips += 1
            paths = [p for metrics, paths in seen if not math.isfinite(metrics["loss"]) for p in paths] or [p for _, paths in seen for p in paths]
            paths = sorted({p for part in run.gather(paths) for p in part})
            run.log({"step": step, "skipped": "loss or gradient is not finite", "files": paths[:100]})
            if skips >= args.max_skips:
                fail(f"step {step}: {skips} steps in a row without a finite loss and gradient, the last one with {', '.join(paths[:3])} ...; "
                     f"the last good checkpoint is in {args.out_dir}", 1)
        optimizer.zero_grad()
        done, clips = step + 1, clips + args.batch_size
        if extra["bad"] > args.max_bad_fraction * max(100, done * args.batch_size / args.clips_per_video):
            fail(f"{extra['bad']} of the videos opened so far cannot be read, more than --max_bad_fraction {args.max_bad_fraction}; "
                 f"all of them: python data.py check {' '.join(args.data)}", 1)
        if window and (done % args.log_every == 0 or done == args.steps):
            means, span = {name: sum(w[name] for w in window) / len(window) for name in window[0]}, time.perf_counter() - since
            run.log({"step": done, **means, **now, "grad_norm": norm if math.isfinite(norm) else None, "feature_std": tokens.float().std(0).mean().item(),
                     "rankme": M.rankme(tokens), "flops": extra["flops"],
                     "clips_per_s": clips / span, "tflops": (extra["flops"] - mark) / span / 1e12,
                     "mfu": (extra["flops"] - mark) / span / (peak * run.ranks) if peak else None, "wait_pct": 100 * wait / span, "peak_gb": M.peak_gb(run.device), "bad": extra["bad"]})
            extra["loss"], clips, wait, mark, since = means["loss"], 0, 0.0, extra["flops"], time.perf_counter()
            window.clear()
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            with torch.no_grad(), run.autocast():
                shown = model(x[:3], k[:3], reconstruct=True)
            if run.rank == 0:
                picture(run.out / "samples" / f"step_{done:08d}.png", x[:3], k[:3], shown, grid)
        if args.probe_every and done % args.probe_every == 0 and done < args.steps:
            run.log({"step": done, "probe_acc": accuracy()})
        if done % args.save_every == 0 or done == last or stop:
            run.save(done, model, optimizer, extra)
            run.export(objective.encoder, model=args.model, **RGB, **objective.layers, stride=args.stride, fps=args.fps, step=done)
        if stop:
            break

    if first == last:                                           # resumed at its end: a kill may have come before the export
        run.export(objective.encoder, model=args.model, **RGB, **objective.layers, stride=args.stride, fps=args.fps, step=done)
    probe_acc = accuracy() if done == args.steps else None
    if probe_acc is not None:
        run.log({"step": done, "probe_acc": probe_acc})
    if run.rank == 0:
        print(json.dumps({"steps": done, "loss": extra["loss"], "probe_acc": probe_acc, "random_acc": extra["random_acc"], "bad": extra["bad"],
                          "seconds": round(time.time() - run.start, 1), "out_dir": args.out_dir}), flush=True)
    model = None                                                # before its process group: the other way round a rank may wait for ever as it leaves
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, ARGS)
