"""SALT: a pixel teacher, frozen, then a student that predicts the teacher's features of what it does not see.
Li et al. 2025, "Rethinking JEPA: Compute-Efficient Video SSL with Frozen Teachers".

    stage 1   rgbhat = P(E(x[keep]), mask tokens at pred)   (B,3,T,H,W) -> (B,M,P)     V-Pixel: L = mean (rgbhat - rgb)^2, rgb normalised per patch and channel
    stage 2   zhat   = P(E(x[keep]), mask tokens at pred)   (B,M,D of the teacher)     L = mean |zhat - LN(teacher(x))[pred]|; the teacher never changes
    stage 3   optional: the student is the next student's teacher

    Both stages, laptop, no download:                  python train_salt.py --preset laptop
    Eight GPUs, a ViT-L teacher for a ViT-G student:   torchrun --nproc-per-node 8 train_salt.py --model vit_G --teacher_model vit_l --data ...
    Only the student, of any encoder at hand:          python train_salt.py --teacher vitl.pt --data ...

There is no EMA, no stop-gradient trick and no collapse: the student's loss is a proper one, and tells how good its features will be (section 5.5).
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
    """The defaults are the paper's recipe (Table 5) at 40,000 + 200,000 steps, whatever their field says otherwise."""
    # data
    data: tuple[str, ...] = ()             # lists of `path label` lines, each `file[:weight]`; `world` is the built-in world
    teacher_data: tuple[str, ...] = ()     # lists for the stages before the last one; empty: --data
    probe_data: tuple[str, ...] = ()       # online probe: a train list and a val list with labels (`world world`: the world's); empty: none
    frames: int = 16                       # frames per clip
    stride: int = 4                        # video frames between two frames of a clip
    fps: float = 0.0                       # > 0: sample by time stamp at this rate instead of --stride
    size: int = 224                        # pixels, after the crop
    crop_scale: tuple[float, float] = (0.3, 1.0)     # area of the random resized crop (one box for all frames of a clip)
    crop_ratio: tuple[float, float] = (0.75, 1.35)   # its aspect ratio (the paper's table rounds to 1.33)
    flip: bool = True                      # horizontal flip of half of the clips
    clips_per_video: int = 1               # clips taken from each opened video: > 1 when decoding is the bottleneck
    workers: int = 8                       # loader processes per rank
    timeout: int = 600                     # seconds without a batch from a loader process that end the run
    max_bad_fraction: float = 0.1          # stop when more than this share of the opened videos (of 100 at least) cannot be read
    # architecture
    model: str = "vit_l"                   # vit_n, t, s, b, l, h, g, G, e, j: a row of model.SIZES, of the last student
    teacher_model: str = ""                # of the stages before it; empty: --model
    teacher: str = ""                      # an encoder file that teaches instead of what the stages before the last would make
    patch: int = 16                        # pixels
    tubelet: int = 2                       # frames
    pos: Literal["sincos", "rope"] = "rope"
    pred_depth: int = 12                   # blocks of the predictor
    pred_width: int = 384
    pred_heads: int = 16                   # 0: as many as the encoder
    mask_tokens: int = 0                   # learned mask tokens; 0: one for each entry of --masks
    init_std: float = 0.02                 # of the random weights; 0.02 suits widths near 1000, narrow models want more
    highpass: float = 0.0                  # > 0: each patch loses its mean over the tubelet and is multiplied by this: nothing static is seen (not in the paper)
    masks: tuple[str, ...] = ("8x0.15", "2x0.7")     # BLOCKSxSCALE[xTIME]: a union of blocks over TIME of the clip (1: all of it); random:R tube:R causal:R hide the share R
    teacher_masks: tuple[str, ...] = ()    # of stage 1; empty: --masks. The paper's others: random:0.9, tube:0.9 (once or twice), causal:0.9
    aspect: tuple[float, float] = (0.75, 1.5)        # of a block
    trim: Literal["random", "prefix"] = "random"     # how ids are cut to the batch minimum; prefix is the official code's way
    bucket: int = 1                        # > 1: token counts are multiples of it, so that fewer shapes reach the kernels
    # optimization
    steps: int = 240_000                   # of all stages together
    split: tuple[float, ...] = (1 / 6, 5 / 6)        # share of each stage; a third share adds a second student: 0.167 0.333 0.5 (section 5.4)
    stage: int = 0                         # run this stage only, counted from 1; 0: all of them
    batch_size: int = 3072                 # clips per step over all ranks, whatever their number
    micro_batch: int = 0                   # clips per forward pass on a rank; 0: all at once, else gradients are accumulated
    lr: float = 6.25e-4
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup: int = 10_000                   # steps, in each stage
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4        # cosine
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.02                # global norm; 0: off
    max_skips: int = 10                    # stop after so many steps in a row with a loss or gradient that is not finite
    # the run
    preset: str = ""                       # laptop, laptop_video: values that become the defaults of all flags
    out_dir: str = "out/salt"               # the last stage's; those before it are in its folders stage1, stage2
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
    sample_every: int = 5000               # steps between pictures of the masks and of the features; 0: none
    wandb: str = ""                        # project name: log there as well
    dry_run: bool = False                  # print parameters, FLOPs, memory and days, touch no data


PRESETS = {
    "laptop": dict(data=("world",), probe_data=("world", "world"), model="vit_n", frames=8, size=32, patch=8, init_std=0.06, pred_depth=2,
                   pred_width=64, pred_heads=4, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, masks=("4x0.3x0.5", "2x0.7x0.5"),
                   steps=3000, split=(2 / 3, 1 / 3), batch_size=16, lr=2e-3, start_lr=2e-4, warmup=60, final_weight_decay=0.04, clip_grad=10.0,
                   dtype="fp32", workers=1, log_every=100, sample_every=1000, out_dir="out/laptop_salt"),
}
PRESETS["laptop_video"] = PRESETS["laptop"] | dict(     # see train_vjepa.py
    data=(), probe_data=(), frames=16, stride=3, size=48, highpass=4.0, crop_scale=(0.3, 0.5), crop_ratio=(0.75, 1.35), out_dir="out/laptop_video_salt")


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
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as dcs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as D
import model as M


def build(args, out_width):
    """Encoder and predictor, alike in all stages (V-JEPA 2's)."""
    size = M.SIZES[args.model]
    encoder = M.ViT(**size, patch=args.patch, tubelet=args.tubelet, frames=args.frames, size=args.size, pos=args.pos, highpass=args.highpass,
                    init_std=args.init_std, checkpoint=args.checkpoint)
    predictor = M.Predictor(in_width=size["width"], out_width=out_width, width=args.pred_width, depth=args.pred_depth,
                            heads=args.pred_heads or size["heads"], grid=encoder.grid, pos=args.pos, mask_tokens=args.mask_tokens or len(args.masks),
                            init_std=args.init_std, checkpoint=args.checkpoint)
    return encoder, predictor


class VPixel(nn.Module):
    """Stage 1: pixels of hidden patches from visible ones, under V-JEPA's masks (section 2.2)."""

    def __init__(self, args):
        super().__init__()
        self.args, self.teacher = args, None
        self.encoder, self.predictor = build(args, 3 * args.tubelet * args.patch**2)

    def targets(self, x):
        """(B,N,P): each patch with mean 0 and unbiased deviation 1 in each channel, VideoMAE's target."""
        rgb = M.patches(x, self.args.tubelet, self.args.patch).flatten(5).flatten(1, 3)                         # (B,N,3,a*p*p)
        return ((rgb - rgb.mean(-1, keepdim=True)) / (rgb.std(-1, keepdim=True) + 1e-6)).flatten(2)

    error = staticmethod(torch.square)

    def forward(self, x, keep=None, pred=None):
        """x (B,3,T,H,W); keep, pred: lists, one entry a mask, of ids (B,K) and (B,M) -> loss, metrics. Without masks: the encoder's tokens (B,N,D)."""
        if keep is None:
            return self.encoder(x)
        h = self.targets(x).detach()
        z = self.encoder(x, keep)
        zhat = self.predictor(z, keep, pred)                                                                    # [(B,M,P or D)]
        terms = [self.error(p.float() - h.gather(1, ids[..., None].expand(-1, -1, h.shape[-1]))).mean() for p, ids in zip(zhat, pred)]
        tokens = torch.cat(z, 1).detach().flatten(0, 1)
        metrics = {f"loss_{spec}": term.detach() for spec, term in zip(self.args.masks, terms)}
        some = lambda rows: rows[:: max(1, len(rows) // 2048)]
        return sum(terms) / len(terms), metrics | {"tokens": some(tokens), "targets": some(h.flatten(0, 1))}

    def schedules(self, step):
        """Functions of the step alone; nothing is stretched."""
        a = self.args
        lr = a.start_lr + (a.lr - a.start_lr) * step / a.warmup if step < a.warmup else cosine(step - a.warmup, a.steps - a.warmup, a.lr, a.final_lr)
        return {"lr": lr, "weight_decay": cosine(step, a.steps, a.weight_decay, a.final_weight_decay)}

    def flops(self, keep, pred):
        """Forward and backward FLOPs of one clip, counted; the teacher runs forward only."""
        k, m = [i.shape[1] for i in keep], [i.shape[1] for i in pred]
        t, h, w = self.encoder.grid
        teacher = 0 if self.teacher is None else self.teacher.flops(*([h * w] * t if self.teacher.images else [t * h * w]))
        return teacher + 3 * (self.encoder.flops(*k) + self.predictor.flops(*zip(k, m)))

    def ledger(self, keep, pred):
        """The same by Appendix F: 6 x parameters x tokens, 2 for the teacher; the predictor sees context and targets."""
        k, m = sum(i.shape[1] for i in keep), sum(i.shape[1] for i in pred)
        teacher = 2 * count(self.teacher) * math.prod(self.encoder.grid) if self.teacher is not None else 0
        return 6 * count(self.encoder) * k + 6 * count(self.predictor) * (k + m) + teacher


class Student(VPixel):
    """Stages 2 and on: the features of a frozen teacher, of any width, on the student's grid."""

    def __init__(self, args, teacher, config):
        nn.Module.__init__(self)
        self.args, self.teacher = args, teacher.eval().requires_grad_(False)
        self.encoder, self.predictor = build(args, teacher.width)
        grid = (args.frames // teacher.tubelet, args.size // teacher.patch, args.size // teacher.patch)
        grid = teacher.grid if teacher.pos in ("learned", "sinusoid1d") and not teacher.images else grid
        if grid != self.encoder.grid:
            raise ValueError(f"the teacher's tokens lie on a grid of {grid}, the student's on {self.encoder.grid}")
        scale = [torch.tensor(v).view(3, 1, 1, 1) for v in (M.IMAGENET["mean"], M.IMAGENET["std"], config["mean"], config["std"])]
        self.pixels = None if config["mean"] == M.IMAGENET["mean"] and config["std"] == M.IMAGENET["std"] else scale

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, x):
        """(B,N,D of the teacher), layer-normed as V-JEPA's."""
        if self.pixels:
            mean, std, mean_t, std_t = (v.to(x) for v in self.pixels)
            x = (x * std + mean - mean_t) / std_t
        h = self.teacher(x)[:, -math.prod(self.encoder.grid):]                          # without CLS
        return F.layer_norm(h.float(), h.shape[-1:])

    error = staticmethod(torch.abs)


def count(module):
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def published(encoder, predictor, teacher, tokens, clips, kept=0.1, masks=2):
    """Training FLOPs as Tables 10 and 11 count them: parameters, tokens of a full clip, clips seen; a mask keeps a tenth of the tokens."""
    return clips * tokens * (6 * encoder * kept * masks + 6 * predictor * masks + 2 * teacher)


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


def picture(path, x, keep, tokens, grid, mean, std):
    """One clip, a frame per token slice: the clip, what each mask leaves of it, and the first three principal components of the target's features."""
    frames = x.permute(1, 2, 3, 0).float().cpu() * torch.tensor(std) + torch.tensor(mean)                       # (T,H,W,3)
    frames = frames[:: len(frames) // grid[0]]                                                                  # (t,H,W,3)
    grow = lambda v: v.view(*grid, -1).repeat_interleave(frames.shape[1] // grid[1], 1).repeat_interleave(frames.shape[2] // grid[2], 2)
    shown = [grow(torch.zeros(math.prod(grid)).index_fill(0, ids.cpu(), 1.0)) for ids in keep]
    tokens = tokens.float().cpu() - tokens.float().cpu().mean(0)
    pca = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    pca = (pca - pca.amin(0)) / (pca.amax(0) - pca.amin(0)).clamp_min(1e-6)
    rows = [frames, *(frames * s + 0.5 * (1 - s) for s in shown), grow(pca)]
    image, zoom = torch.cat([torch.cat(list(r), 1) for r in rows]), max(1, 112 // frames.shape[1])
    D.save_png(path, image.clamp(0, 1).mul(255).byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())


def dry_run(args, run):
    """Sizes from the meta device -> a line of Appendix F's ledger for each stage, and one JSON line for the whole."""
    total, counted = 0.0, 0.0
    for number, a, objective, samples in sketch(args):
        N, clips = math.prod(objective.encoder.grid), a.steps * a.batch_size
        flops = sum(objective.flops(*s) for s in samples) / len(samples)
        parameters = [count(part) for part in (objective.encoder, objective.predictor, objective.teacher)]
        said = published(*parameters, N, clips)
        total, counted = total + said, counted + flops * clips
        if run.rank == 0:
            print(f"stage {number}: {a.model}, {a.steps} steps, {clips / 1e6:.4g}M clips of {N} tokens; encoder, predictor, teacher of "
                  f"{', '.join(f'{p / 1e6:.4g}M' for p in parameters)} parameters: {said:.3g} FLOPs by Appendix F, {flops * clips:.3g} counted")
    trained = count(objective.encoder) + count(objective.predictor)
    shards, per_rank, size = run.ranks if args.fsdp else 1, args.micro_batch or args.batch_size // run.ranks, M.SIZES[a.model]
    k, m = ([sum(i.shape[1] for i in s[j]) for s in samples] for j in (0, 1))
    token_values = (max(k) * size["width"] * size["depth"] + (max(k) + max(m)) * a.pred_width * a.pred_depth) * (1 if a.checkpoint else 18)
    memory = (trained * 16 + count(objective.teacher) * 4) // shards + per_rank * token_values * (2 if a.dtype == "bf16" else 4)
    if run.rank == 0:
        print(json.dumps({"params": trained, "params_encoder": count(objective.encoder), "flops_per_step": flops * a.batch_size, "flops_per_clip": flops,
                          "flops_total": counted, "ledger_total": total, "bytes_per_gpu": memory, "gpus": run.ranks, "days": counted / (run.ranks * 0.5 * 989e12) / 86400}))


def stages(args):
    """[(number, its arguments)]: every stage before the last in its own folder, with the teacher's size, data and masks."""
    if abs(sum(args.split) - 1) > 0.01 or len(args.split) < 2 or min(args.split) <= 0:
        raise D.DataError(f"--split {' '.join(map(str, args.split))}: two or more shares of the steps, which sum to 1")
    last, rows = len(args.split), []
    for number, share in enumerate(args.split, 1):
        a = dataclasses.replace(args, steps=round(args.steps * share))
        if number < last:
            a = dataclasses.replace(a, out_dir=f"{args.out_dir}/stage{number}", model=args.teacher_model or args.model, data=args.teacher_data or args.data,
                                    masks=args.teacher_masks or args.masks if number == 1 else args.masks)
        if args.stage in (0, number) and not (args.teacher and number < last):
            rows.append((number, a))
    if not rows:
        raise D.DataError(f"--stage {args.stage}: there are stages 1 to {last}" + (", and --teacher leaves the last" if args.teacher else ""))
    return rows


def sketch(args):
    """Every stage on the meta device -> [(number, arguments, objective, masks of eight steps)]; what a user can get wrong in any of them ends here."""
    rows, teacher = [], None
    for number, a in stages(args):
        if a.model not in M.SIZES:
            raise D.DataError(f"--model or --teacher_model {a.model}: choose from {', '.join(M.SIZES)}")
        if a.mask_tokens > len(a.masks):
            raise D.DataError(f"--mask_tokens {a.mask_tokens}: at most one for each of the {len(a.masks)} --masks")
        try:
            file = args.teacher or f"{args.out_dir}/stage{number - 1}/encoder.safetensors"
            given, config = (teacher, M.IMAGENET) if teacher is not None else M.load_encoder(file, seed=args.seed) if number > 1 else (None, None)
            with torch.device("meta"):
                objective = Student(a, given, config) if number > 1 else VPixel(a)
        except ValueError as e:
            raise D.DataError(str(e)) from e
        samples = [D.sample_masks(a.masks, a.seed, s, min(a.batch_size, 64), objective.encoder.grid, a.aspect, a.trim, a.bucket) for s in range(8)]
        rows.append((number, a, objective, samples))
        teacher = objective.encoder
    return rows


def main(args):
    run = Run(args)
    if args.dry_run:
        return dry_run(args, run)
    if not args.data:
        raise D.DataError("no data: give --data LIST (see README, Data) or --preset laptop")
    if len(args.probe_data) not in (0, 2):
        raise D.DataError(f"--probe_data {' '.join(args.probe_data)}: two lists are needed, one to fit the probe and one to test it")
    line, rows = {}, [(number, a) for number, a, _, _ in sketch(args)]     # everything a user can get wrong, in any stage, is looked at before work starts
    for spec in {spec for _, a in rows for spec in a.data}:
        D.parse_list(spec)
    for number, a in rows:
        taught = f"{args.out_dir}/stage{number - 1}/encoder.safetensors"
        line = train(number, a, args.teacher or taught if number > 1 else "", line)
        if not line["done"]:                                    # stopped by a signal or --stop_at: --resume goes on here
            break
    if run.rank == 0:
        line.pop("done")
        print(json.dumps(line | {"seconds": round(time.time() - run.start, 1), "out_dir": args.out_dir}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(number, args, teacher, before):
    """One stage -> its last line. teacher: the encoder file that teaches it; before: the last line of the stage before."""
    run = Run(args)
    torch.manual_seed(args.seed)
    try:
        objective = Student(args, *M.load_encoder(teacher, seed=args.seed)) if teacher else VPixel(args)
    except ValueError as e:
        fail(e)
    grid = objective.encoder.grid
    clip = D.Clip(frames=args.frames, stride=args.stride, fps=args.fps or None, size=args.size, scale=args.crop_scale, ratio=args.crop_ratio,
                  flip=args.flip, clips=args.clips_per_video)
    sources = [D.parse_list(spec) for spec in args.data]
    probe = [D.parse_list(spec, split, labelled=True) for spec, split in zip(args.probe_data, ("probe", "val"))]
    run.open(D.fingerprint(sources))

    model = run.wrap(objective.to(run.device))
    optimizer = torch.optim.AdamW(M.param_groups(objective, args.weight_decay), lr=args.lr, betas=args.betas, fused=True)
    extra = {"step": 0, "random_acc": None, "bad": 0, "loss": None, "window": [], "flops": before.get("flops", 0.0), "ledger": before.get("ledger", 0.0)}
    extra |= run.load(model, optimizer) if args.resume else {}
    first, window = extra.pop("step"), extra["window"]

    def features(x):                                            # what the online probe reads: the encoder's tokens, averaged
        with run.autocast():
            return model(x).mean(1)

    def accuracy():
        return run.probe(features, *probe, dataclasses.replace(clip, train=False, clips=1))["probe_acc"] if probe else None

    if first == 0:
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
        keep, pred = D.sample_masks(args.masks, args.seed, step, args.batch_size, grid, args.aspect, args.trim, args.bucket, rows)
        seen, bad = [], 0
        for i in range(0, per_rank, micro):
            begin = time.perf_counter()
            batch = next(loader)
            wait += time.perf_counter() - begin
            x, k, m = D.prepare(batch, run.device), [ids[i : i + micro].to(run.device) for ids in keep], [ids[i : i + micro].to(run.device) for ids in pred]
            run.sync(model, i + micro >= per_rank)
            with run.autocast():
                loss, metrics = model(x, k, m)
            (loss * (micro / per_rank)).backward()
            tokens, targets = metrics.pop("tokens"), metrics.pop("targets")
            seen.append(({"loss": loss.detach(), **metrics}, batch["path"]))
            extra["ledger"] += objective.ledger(k, m) * micro * run.ranks
            extra["flops"] += objective.flops(k, m) * micro * run.ranks
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
                     "rankme": M.rankme(tokens), "rankme_targets": M.rankme(targets), "flops": extra["flops"], "ledger": extra["ledger"],
                     "clips_per_s": clips / span, "tflops": (extra["flops"] - mark) / span / 1e12,
                     "mfu": (extra["flops"] - mark) / span / (peak * run.ranks) if peak else None, "wait_pct": 100 * wait / span, "peak_gb": M.peak_gb(run.device), "bad": extra["bad"]})
            extra["loss"], clips, wait, mark, since = means["loss"], 0, 0.0, extra["flops"], time.perf_counter()
            window.clear()
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            with torch.no_grad(), run.autocast():
                tokens = model(x[:1])[0]
            if run.rank == 0:
                picture(run.out / "samples" / f"step_{done:08d}.png", x[0], [ids[0] for ids in k], tokens, grid, M.IMAGENET['mean'], M.IMAGENET['std'])
        if args.probe_every and done % args.probe_every == 0 and done < args.steps:
            run.log({"step": done, "probe_acc": accuracy()})
        if done % args.save_every == 0 or done == last or stop:
            run.save(done, model, optimizer, extra)
            run.export(objective.encoder, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
        if stop:
            break

    if first == last:                                           # resumed at its end: a kill may have come before the export
        run.export(objective.encoder, model=args.model, **M.IMAGENET, stride=args.stride, fps=args.fps, step=done)
    probe_acc = accuracy() if done == args.steps else None
    if probe_acc is not None:
        run.log({"step": done, "probe_acc": probe_acc})
    return {"stage": number, "steps": done, "loss": extra["loss"], "probe_acc": probe_acc, "random_acc": extra["random_acc"], "teacher_acc": before.get("probe_acc"),
            "bad": extra["bad"], "flops": extra["flops"], "ledger": extra["ledger"], "done": done == args.steps}


if __name__ == "__main__":
    launch(main, ARGS)
