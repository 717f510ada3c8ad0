"""Speed and memory, never a test: ratios measured in one run, the contestants alternating, medians with their spread.

    python tests/bench.py step     where a training step's time goes, beside Hugging Face's modules
                                   [--method mae4d --model vit_b --batch 2 --dtype bf16 --compile]
    python tests/bench.py gpu      that step and the whole script on CUDA, eager and compiled: MFU, waiting, memory
                                   [--method mae4d --model vit_l --batch 24 --steps 100 --data LIST --device cpu]
    python tests/bench.py reader   clips/s from files, beside decord and PyAV (pip install -r tests/requirements.txt)
                                   VIDEO [VIDEO ...]
    python tests/bench.py world    clips/s of the built-in world, alone and with its labels
                                   [--device cuda]
    python tests/bench.py soak     a laptop run killed every 200 steps against an undisturbed one: equal weights?
                                   [--steps 2000]
    python tests/bench.py terms    every row of FWM-HW-LD at laptop size: motion task, speed, memory
                                   [--steps 2000 --seeds 0 1 2 --rows ld hw --data LIST]
    python tests/bench.py compare  every method under one budget of FLOPs, beside its own random weights
                                   [--flops 8.5e12 --seeds 0 1 2 --rows V-JEPA SALT --data LIST --out DIR --plan]
    python tests/bench.py depth    depth.png: where to read, a linear probe after each block, beside random weights
                                   RUN [RUN ...] [--tasks NAME=TRAIN_LIST,VAL_LIST --out DIR]
    python tests/bench.py time     without labels: do a run's features say how fast a video plays, and which way?
                                   RUN [RUN ...] --data LIST
    python tests/bench.py halves   halves.png: how alike a place's tokens stay in either half of the channels
                                   RUN [RUN ...] [--data LIST]

The last line on stdout is one JSON object.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import data as D
import model as M
import probe as P
import train_mae4d as E
import train_salt as S
import train_tdv as T
import train_vjepa as V

ROOT = Path(V.__file__).parent
IMAGENET = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


def alternate(jobs, rounds, clock):
    """{name: function} -> {name: [seconds of each round]}, the jobs in turn, so that a slow moment of the machine
    hits all of them."""
    for job in jobs.values():
        job()
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            begin = clock()
            job()
            times[name].append(clock() - begin)
    return times


def ratios(times, base):
    """Each job's time against `base`, round by round -> {name: {"median", "min", "max"}}; above 1 is faster than
    base."""
    out = {}
    for name, t in times.items():
        r = sorted(b / a for a, b in zip(t, times[base]))
        out[name] = {"median": round(statistics.median(r), 3), "min": round(r[0], 3), "max": round(r[-1], 3)}
    return out


def now(device):
    """Seconds, when all that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the training step ----------------------------------------------------------------------------


def vjepa(args, shared):
    return V.build(V.Args(**shared, pos=args.pos, pred_heads=12))


def salt(args, shared):
    """The second stage, under a frozen teacher of --teacher_model."""
    size = M.SIZES[args.teacher_model or args.model]
    teacher = M.ViT(**size, frames=args.frames, size=args.size, pos="rope")
    return S.Student(S.Args(**shared, pred_heads=12), teacher, M.IMAGENET)


def tdv(args, shared):
    return T.build(T.Args(**shared))


def mae4d(args, shared):
    return E.build(E.Args(**shared))


class Step:
    """One training step of our scripts on random clips; `parts` has the seconds of each of its modules."""

    def __init__(self, build, args, device):
        self.args = args
        self.device = device
        shared = dict(
            model=args.model, frames=args.frames, size=args.size, dtype=args.dtype, checkpoint=args.checkpoint
        )
        torch.manual_seed(0)
        self.objective = build(args, shared).to(device)
        if args.compile:
            M.compile_blocks(self.objective)
        groups = M.param_groups(self.objective, 0.04)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        self.x = torch.rand(args.batch, 3, args.frames, args.size, args.size, device=device)
        self.masks = self.draw_masks()
        self.parts = {}
        for name, module in self.objective.named_children():
            module.register_forward_pre_hook(lambda module, x, name=name: self.begin(name))
            module.register_forward_hook(lambda module, x, y, name=name: self.end(name))

    def draw_masks(self):
        """Of the first step, as arguments of the objective: keep and pred, keep alone, or none."""
        if isinstance(self.objective, T.TDV):
            return ()
        masks = self.objective.masks(0, self.args.batch)
        return torch.utils._pytree.tree_map(lambda ids: ids.to(self.device), tuple(masks))

    def begin(self, name):
        """What a module takes is summed over its calls of a step."""
        self.parts.setdefault(name, [0.0])[-1] -= now(self.device)

    def end(self, name):
        self.parts[name][-1] += now(self.device)

    def __call__(self):
        if self.device.type == "cpu":
            M.tune_cpu()  # as the scripts do
        for seconds in self.parts.values():
            seconds.append(0.0)
        self.begin("forward")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.objective(self.x, *self.masks)[0]
        self.end("forward")
        self.begin("backward")
        loss.backward()
        self.end("backward")
        self.begin("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.objective, "after_step"):  # a teacher follows
            self.objective.after_step(0)
        self.end("optimizer")

    def split(self):
        """{part: median seconds of a step}, without the first, which warms up."""
        return {name: round(statistics.median(seconds[1:]), 4) for name, seconds in self.parts.items()}

    def flops(self):
        """Of one clip."""
        return self.objective.flops(*self.masks)


class Peer:
    """One training step of a module of transformers: the subclass has `model` and `loss`."""

    def __init__(self, args, device):
        self.args = args
        self.device = device
        size = M.SIZES[args.model]
        torch.manual_seed(0)
        self.model = self.build(
            args, num_hidden_layers=size["depth"], num_attention_heads=size["heads"], hidden_size=size["width"],
            mlp=size["mlp"], attn_implementation="sdpa",
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.rand(args.batch, args.frames, 3, args.size, args.size, device=device)
        self.grid = (args.frames // 2, args.size // 16, args.size // 16)
        self.prepare()

    def __call__(self):
        if self.device.type == "cpu":
            torch.set_float32_matmul_precision("highest")  # torch's default, which the peer runs with
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()
        now(self.device)

    def after_step(self):
        pass


class HFVideoMAE(Peer):
    """VideoMAEForPreTraining: the same encoder and kept tokens, its separate decoder of 4 blocks of 384 channels."""

    def build(self, args, mlp, **size):
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        return VideoMAEForPreTraining(
            VideoMAEConfig(
                image_size=args.size, num_frames=args.frames, intermediate_size=mlp, norm_pix_loss=False, **size
            )
        )

    def prepare(self):
        keep = D.sample_masks(["random:0.95"], 0, 0, self.args.batch, self.grid)[0][0]
        hidden = torch.ones(self.args.batch, int(np.prod(self.grid)), dtype=torch.bool)
        self.hidden = hidden.scatter(1, keep, False).to(self.device)

    def loss(self):
        return self.model(self.x, bool_masked_pos=self.hidden).loss


class HFVJEPA(Peer):
    """VJEPA2Model: its encoder takes no context mask, so it encodes full clips and its predictor does the rest."""

    def build(self, args, mlp, **size):
        from transformers import VJEPA2Config, VJEPA2Model

        return VJEPA2Model(
            VJEPA2Config(
                patch_size=16, crop_size=args.size, frames_per_clip=args.frames, tubelet_size=2,
                mlp_ratio=mlp / size["hidden_size"], **size,
            )
        )

    def prepare(self):
        self.target = copy.deepcopy(self.model.encoder).requires_grad_(False)
        masks = D.sample_masks(("8x0.15", "2x0.7"), 0, 0, self.args.batch, self.grid)
        self.masks = [(keep.to(self.device), pred.to(self.device)) for keep, pred in zip(*masks)]

    def loss(self):
        with torch.no_grad():
            h = self.target(self.x).last_hidden_state
            h = F.layer_norm(h, h.shape[-1:])
        z = self.model.encoder(self.x).last_hidden_state
        losses = []
        for keep, pred in self.masks:
            zhat = self.model.predictor(z, [keep], [pred]).last_hidden_state
            losses.append((zhat - M.gather(h, pred)).abs().mean())
        return sum(losses) / len(losses)

    def after_step(self):
        M.ema_update(self.target.parameters(), self.model.encoder.parameters(), 0.998)


METHODS = {  # --method: our objective, and the peer's name and step
    "vjepa": (vjepa, "hf", HFVJEPA),
    "mae4d": (mae4d, "hf", HFVideoMAE),
    # beside the step that it replaces, at the student's size
    "salt": (salt, "vjepa", lambda args, device: Step(vjepa, args, device)),
    "tdv": (tdv, "", None),
}


def peak_gb(device):
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def step(args):
    device = torch.device(args.device)
    build, peer, peer_step = METHODS[args.method]
    jobs = {}
    if args.only != "peer":
        jobs["ours"] = Step(build, args, device)
    if peer and args.only != "ours":
        jobs[peer] = peer_step(args, device)
    times = alternate(jobs, args.rounds, time.perf_counter)
    if args.only == "peer":
        seconds = round(statistics.median(times[peer]), 4)
        return {"model": args.model, "peer": peer, "seconds": seconds, "peak_gb": peak_gb(device)}
    seconds = statistics.median(times["ours"])
    flops = jobs["ours"].flops() * args.batch / seconds
    result = {
        "model": args.model,
        "batch": args.batch,
        "dtype": args.dtype,
        "compiled": args.compile,
        "seconds": round(seconds, 4),
        "clips_per_s": round(args.batch / seconds, 2),
        "tflops": round(flops / 1e12, 3),
        **M.mfu(flops, device),  # by the peak of this card, where that is known
        "split": jobs["ours"].split(),
        "peak_gb": peak_gb(device),
    }
    if peer in jobs:
        result[f"faster_than_{peer}"] = ratios(times, peer)["ours"]
    return result


# By a shell: a process's peak memory starts at that of the one that starts it
ALONE = ("sh", "-c", '"$@"; exit $?', "sh")


def child(command):
    """The last line of a process's output, as JSON."""
    done = subprocess.run([*ALONE, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def films(folder, count=48):
    """As many files as packed ones are: FFmpeg's moving test pattern, 340x256, 75 frames."""
    for i in range(count):
        source = f"testsrc2=size=340x256:rate=7.5:duration=10,hue=h={7 * i}"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-g", "8", "-pix_fmt", "yuv420p"]
        subprocess.run([*command, f"{folder}/{i}.mp4"], check=True)
    return [str(folder)]


def whole_run(args, data, *compiled):
    """--steps of a script as a user starts it: its recipe, masks that vary, loader, copies, clipping, two
    micro-batches a step -> medians of its log lines, but for the first fifth."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, f"train_{args.method}.py", "--data", *data, "--stride", "1", "--out_dir", out]
        for flag in ("model", "frames", "size", "dtype", "steps"):
            command += [f"--{flag}", str(getattr(args, flag))]
        command += ["--batch_size", str(2 * args.batch), "--micro_batch", str(args.batch), "--log_every", "10"]
        child([*command, "--sample_every", "0", "--save_every", "1000000", *compiled])
        lines = logged(Path(out))
    lines = lines[len(lines) // 5 :]
    keys = [key for key in ("clips_per_s", "tflops", "mfu", "wait_pct", "peak_gb") if key in lines[0]]
    return {key: round(statistics.median(line[key] for line in lines), 3) for key in keys}


def attention(args, widths=(24, 32, 64)):
    """{kernel: {channels of a head: milliseconds forward and backward}} over --batch clips of all their tokens; of
    what a kernel cannot do, nothing. V-JEPA's predictor has 12 heads of 32 or 16 of 24."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = torch.device(args.device)
    n = args.frames // 2 * (args.size // 16) ** 2
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    found = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for width in widths:
            q, k, v = torch.randn(3, args.batch, 12, n, width, device=device, dtype=dtype, requires_grad=True)

            def job():
                with sdpa_kernel(kernel):
                    F.scaled_dot_product_attention(q, k, v).sum().backward()

            try:
                times = alternate({"it": job}, args.rounds, lambda: now(device))
            except RuntimeError:
                continue
            found.setdefault(kernel.name, {})[width] = round(1000 * statistics.median(times["it"]), 3)
    return found


def gpu(args):
    """Eager and compiled, each in its own process, so that neither has the other's memory: the step alone on random
    clips, beside the peer's, and the whole script on --data, else on files made for it. And what attention takes."""
    flags = ["--device", args.device]
    for name in ("method", "model", "batch", "frames", "size", "dtype", "pos", "rounds"):
        flags += [f"--{name}", str(getattr(args, name))]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or films(folder)
        for name, compiled in (("eager", []), ("compiled", ["--compile"])):
            step_alone = [sys.executable, __file__, "step", *flags, "--only", "ours", *compiled]
            rows[f"step, {name}"] = child(step_alone)
            rows[f"script, {name}"] = whole_run(args, data, *compiled)
            print(rows, file=sys.stderr, flush=True)
    if METHODS[args.method][1] == "hf":
        rows["peer"] = child([sys.executable, __file__, "step", *flags, "--only", "peer"])
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    return {"rows": rows, "attention": attention(args), "device": device, "torch": torch.__version__}


# --- reading --------------------------------------------------------------------------------------


def peer_transform(frames, box, flip, size=224):
    """Float, crop, resize, flip, normalise, as the peers' training code does it on whole frames."""
    top, left, h, w = box
    x = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[:, :, top : top + h, left : left + w]
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    x = x.flip(-1) if flip else x
    return x.permute(1, 2, 3, 0).sub_(IMAGENET[0]).div_(IMAGENET[1]).permute(3, 0, 1, 2)


def decord_frames(path, ids):
    """As V-JEPA 2's data set opens and asks: num_threads=-1, seek(0), get_batch."""
    import decord

    reader = decord.VideoReader(path, num_threads=-1, ctx=decord.cpu(0))
    reader.seek(0)
    return reader.get_batch(ids).asnumpy()


def pyav_frames(path, ids):
    """Seek to the key frame before the first frame, then decode on one thread until the last."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        rate = stream.average_rate
        base = stream.time_base
        got = {}
        container.seek(int(round(ids[0] / rate / base)), stream=stream)
        for frame in container.decode(stream):
            i = round(float(frame.pts * base * rate))
            if i in ids:
                got[i] = frame.to_ndarray(format="rgb24")
            if i >= ids[-1]:
                break
    return np.stack([got[int(i)] for i in ids])


def reader(args):
    """16 frames at stride 4, random start and crop to 224 px: one core, one process, CPU time. Packed files are
    read at the same times."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    torch.set_num_threads(1)
    clip = D.Clip()
    seeds = range(8)
    samples = []  # path, frame numbers, crop, flip
    for path in args.videos:
        video = D.open_video(path)
        for seed in seeds:
            rng = np.random.default_rng(seed)
            ids = D.frame_positions(len(video), clip, rng.random()).astype(int)
            box = D.random_box(rng, video.metadata.height, video.metadata.width, clip.scale, clip.ratio)
            samples.append((path, ids, box, seed % 2 == 0))
    path, ids, _, _ = samples[0]
    frames = D.open_video(path).get_frames_at(ids.tolist()).data.numpy().astype(int)
    difference = np.abs(frames - decord_frames(path, ids)).mean()

    def theirs(read):
        for path, ids, box, flip in samples:
            peer_transform(read(path, ids), box, flip)

    def ours(paths, clip, per=1):
        for path in paths:
            for i in range(0, len(seeds), per):
                video = D.read_clips(path, clip, [np.random.default_rng(s) for s in seeds[i : i + per]])
                D.prepare({"video": video, "flip": torch.arange(len(video)) % 2 == 0})

    with tempfile.TemporaryDirectory() as folder:
        packed = pack(args.videos, folder, "packed", clip.stride)
        jobs = {
            "decord": lambda: theirs(decord_frames),
            "pyav": lambda: theirs(pyav_frames),
            "ours": lambda: ours(args.videos, clip),
            "ours, 4 clips a video": lambda: ours(args.videos, D.Clip(clips=4), 4),
            "packed": lambda: ours(packed, D.Clip(stride=1)),
        }
        times = alternate(jobs, args.rounds, time.process_time)
    speed = {name: round(len(samples) / statistics.median(t), 2) for name, t in times.items()}
    return {
        "clips_per_s": speed,
        "against_decord": ratios(times, "decord"),
        "mean_pixel_difference": round(float(difference), 3),
    }


def pack(videos, folder, name, stride):
    """The paths of these videos, packed so that a frame in `stride` is left."""
    rows = Path(folder, f"{name}.txt")
    rows.write_text("".join(f"{os.path.abspath(path)}\n" for path in videos))
    fps = D.open_video(videos[0]).metadata.average_fps / stride
    command = [sys.executable, D.__file__, "pack", str(rows), f"{folder}/{name}", "--short_side", "256"]
    command += ["--fps", str(fps), "--gop", "8", "--workers", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return D.parse_list(json.loads(done.stdout.splitlines()[-1])["list"]).paths


def world(args):
    torch.set_num_threads(1)
    clips = list(range(32 if args.device == "cpu" else 1024))
    flow = ("flow", "flow_visible")
    tracks = ("tracks", "visible")
    stereo = ("right", "disparity", "disparity_visible")
    labels = {
        "video": (),
        "with depth and pose": ("depth", "pose"),
        "with flow": flow,
        "with tracks": tracks,
        "with all but pairs": ("depth", "pose", "masks", "boxes", *flow, *tracks, *stereo),
        "pairs": ("impossible",),
    }
    out = {}
    for frames, size in ((8, 32), (16, 64)):
        source = D.World("train", frames=frames, size=size, device=args.device)
        jobs = {name: lambda names=names: source.render(clips, names) for name, names in labels.items()}
        times = alternate(jobs, args.rounds, time.perf_counter)
        speed = {name: round(len(clips) / statistics.median(t), 1) for name, t in times.items()}
        out[f"{frames}x{size}px"] = speed
    return {"clips_per_s": out, "device": args.device}


# --- auxiliary objectives -------------------------------------------------------------------------


def all_rows():
    """{row of FWM-HW-LD: what it changes in the baseline}."""
    rows = {}
    for name in V.ROWS_UCF | V.ROWS_PAPER:
        row = {k: v for k, v in V.PRESETS[name].items() if V.FWM_PAPER.get(k) != v and k not in ("data", "out_dir")}
        if not row["terms"]:
            del row["terms"]
        rows[name] = row
    rows["laptop_fwm"] = {"terms": V.PRESETS["laptop_fwm"]["terms"]}
    return rows


def row_job(row):
    """Two laptop steps of a row of FWM-HW-LD, without its loader."""
    torch.manual_seed(0)
    args = V.Args(**V.PRESETS["laptop"] | {"distance": True} | row)
    objective = V.build(args)
    x = torch.randn(16, 3, 8, 32, 32)
    optimizer = torch.optim.AdamW(M.param_groups(objective, 0.04), lr=args.lr, fused=True)

    def job():
        for number in range(2):
            keep, pred = objective.masks(number, len(x))
            keep, pred = objective.place(keep, pred, x, number, 0)
            objective(x, keep, pred)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(number)

    return job


def train_row(args, row, seed, out):
    """`--preset laptop --distance` with the flags of a row -> the last logged figures; nothing where out has them
    already."""
    saved = json.loads((out / "terms.json").read_text()) if (out / "terms.json").exists() else {}
    if saved.get("steps") == args.steps:
        return saved
    command = [sys.executable, "train_vjepa.py", "--preset", "laptop", "--distance", "--resume", "--probe_data"]
    command += ["--steps", str(args.steps), "--seed", str(seed), "--out_dir", str(out), "--micro_batch", "16"]
    command += ["--sample_every", "0", "--log_every", str(max(1, args.steps // 10))]
    command += ["--stride", "5", "--crop_scale", "0.3", "0.5", "--crop_ratio", "0.75", "1.35"]
    if args.data:
        command += ["--data", *args.data]
    for name, value in row.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name}", *(str(v) for v in values if v is not True)]
    done = subprocess.run([*ALONE, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out.name}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    return {"steps": args.steps} | {key: last[key] for key in ("peak_gb", "rankme", "feature_std")}


class MotionProbes:
    """Linear probes on eight motions of the world and on each of --tasks; clips, of long lists 2,048 and 1,024 that
    are drawn by lot, are read once for all runs. An encoder gets the pixels, and is read at the block, that its file
    names. group: as probe.py's, of what two halves of a train list have nothing in common (people, rooms)."""

    def __init__(self, tasks, stride=5, frames=8, size=32, group=""):
        self.lists = {"motion": ("world", "world")}
        for task in tasks:
            name, _, pair = task.partition("=")
            self.lists[name] = pair.split(",")
        clip = D.Clip(frames=frames, size=size, stride=stride, train=False)
        self.clips = {}
        self.halves = {}  # of a train list: True in one of them
        for name, pair in self.lists.items():
            sources = [D.parse_list(path, split=s, labelled=True) for path, s in zip(pair, ("probe", "val"))]
            picked = []
            for source, most in zip(sources, (2048, 1024)):
                picked.append(np.sort(np.random.default_rng(0).permutation(len(source))[:most]))
            lists = zip(sources, picked)
            self.clips[name] = [list(D.eval_batches(source, clip, batch_size=64, rows=rows)) for source, rows in lists]
            self.halves[name] = half_of(sources[0], picked[0], group)

    def __call__(self, run, **seed):
        return {name: self.accuracy(*self.read(run, name, **seed)) for name in self.clips}

    def both(self, run):
        """On val, and within each train list: the probe learns from one half and answers for the other."""
        found = {"val": {}, "on_train": {}}
        for name in self.clips:
            train, val = self.read(run, name)
            half = self.halves[name]
            found["val"][name] = self.accuracy(train, val)
            found["on_train"][name] = self.accuracy([z[half] for z in train], [z[~half] for z in train])
        return found

    def accuracy(self, train, val):
        x, y, ok = train
        x_val, y_val, ok_val = val
        right = M.linear_probe(x[ok], y[ok], x_val) == y_val
        return (right & ok_val).double().mean().item()

    def depths(self, run, task, **seed):
        """Accuracy after 1, 2 ... of the encoder's blocks."""
        many = len(M.load_encoder(run, **seed)[0].blocks)
        halves = self.read(run, task, tuple(range(1, many + 1)), **seed)
        layers = [[(x, y, ok) for x in z.chunk(many, 1)] for z, y, ok in halves]
        return [self.accuracy(*pair) for pair in zip(*layers)]

    @torch.no_grad()
    def read(self, run, task, layer=None, **seed):
        """For train and val: (n,D), labels (n,) and which could be read (n,). layer: blocks to run, or several, side
        by side."""
        encoder, config = M.load_encoder(run, **seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder.to(device)
        pixels = {name: config[name] for name in ("mean", "std")}
        layer = layer or config.get("layer_classify")
        halves = []
        for batches in self.clips[task]:
            rows = []
            for batch in batches:
                z = encoder(D.prepare(batch, device, **pixels), blocks=layer).mean(1)
                rows.append((z.cpu(), batch["label"], batch["ok"]))
            halves.append([torch.cat(column) for column in zip(*rows)])
        return halves


def half_of(source, rows, group):
    """Which of these rows of a list are in the first of two halves (n,): by lot, or by groups, as probe.py's."""
    if group and not source.split:
        _, held = P.hold_outs([source.path(row) for row in rows], group, 0.5, 0)[0]
        return ~torch.from_numpy(np.isin(np.arange(len(rows)), held))
    # by lot: where labels take turns, every other row has only every other label
    return torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.5


def terms(args):
    """Trains `--preset laptop --distance` (files: --stride 5, crops of 0.3 to 0.5) with the flags of each row, one
    run after the other, and prints a Markdown table: a linear probe on eight motions of the world and on each of
    --tasks; steps/s (of processor time, the rows in turn) and peak memory against the baseline; RankMe. With --out
    the runs stay, and what is there is not done again."""
    table = all_rows()
    if unknown := set(args.rows) - set(table):
        sys.exit(f"--rows {min(unknown)}: choose from {', '.join(table)}")
    rows = {"baseline": {}} | {name: table[name] for name in table if name in (args.rows or table)}
    M.tune_cpu()
    jobs = {name: row_job(row) for name, row in rows.items()}
    speed = ratios(alternate(jobs, args.rounds, time.process_time), "baseline")
    probes = MotionProbes(args.tasks)
    found = {name: [] for name in rows}
    start = []
    with tempfile.TemporaryDirectory() as root:
        for seed in args.seeds:  # seeds outermost: a slow hour of the machine hits all rows
            for name, row in rows.items():
                out = Path(args.out or root, f"{name}_{seed}").resolve()
                saved = train_row(args, row, seed, out)
                if set(probes.lists) - set(saved):
                    saved |= probes(out)
                    M.write(out / "terms.json", json.dumps(saved))
                found[name].append(saved)
                print(f"seed {seed} {name}: {saved}", file=sys.stderr, flush=True)
            start.append(probes(f"random:{out}", seed=seed))  # the same encoder before any step
    print_rows({"random weights": start} | found, speed, probes.lists)
    return {"steps": args.steps, "seeds": args.seeds, "random": start, "rows": found, "speed": speed}


def print_rows(found, speed, tasks):
    """{row: a dict for each seed} as a Markdown table."""
    titles = ["row"]
    for task in tasks:
        titles += [f"{task}, %", "Δ"]
    titles += ["steps/s", "memory", "RankMe"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    baseline = found["baseline"]
    for name, runs in found.items():
        cells = [name]
        for task in tasks:
            top1 = [100 * run[task] for run in runs]
            mean = statistics.mean(top1)
            spread = f" +- {statistics.stdev(top1):.1f}" if len(runs) > 1 else ""
            delta = mean - statistics.mean(100 * run[task] for run in baseline)
            cells += [f"{mean:.1f}{spread}", f"{delta:+.1f}"]
        if name in speed:
            memory = statistics.median(run["peak_gb"] / base["peak_gb"] for run, base in zip(runs, baseline))
            rank = statistics.median(run["rankme"] for run in runs)
            cells += [f"{speed[name]['median']:.2f}", f"{memory:.2f}", f"{rank:.0f}"]
        else:
            cells += ["-"] * 3
        print("| " + " | ".join(cells) + " |")


# --- every method under one budget ----------------------------------------------------------------

COMPARED = {  # script, preset, flags
    "V-JEPA": ("train_vjepa", "laptop", ()),
    "V-JEPA 2.1": ("train_vjepa", "laptop", ("--levels", "4", "--context_loss", "0.5")),
    "LD": ("train_vjepa", "laptop", ("--distance", "--terms", "ld:1.0")),
    "FWM-HW-LD": ("train_vjepa", "laptop_fwm", ()),
    "SALT": ("train_salt", "laptop", ()),
    "4DS": ("train_mae4d", "laptop", ()),
    "TDV": ("train_tdv", "laptop", ()),
    "DINO": ("train_tdv", "laptop_video_dino", ("--fps", "0")),
    "iBOT": ("train_tdv", "laptop_video_ibot", ("--fps", "0")),
}
# V-JEPA's Table 13, in all frames; on a grid of 4 x 4 they hide 85, 70 and 50 %
ALL_TIME = ("2x0.617", "1x0.735", "1x0.51")
VARIANTS = {  # --rows: what else the claims of the papers need, see assets/claims.md
    "V-JEPA, context loss": ("train_vjepa", "laptop", ("--context_loss", "0.5")),
    "V-JEPA, four levels": ("train_vjepa", "laptop", ("--levels", "4")),
    "V-JEPA, one mask": ("train_vjepa", "laptop", ("--masks", "4x0.3x0.5")),
    "V-JEPA, 85 %": ("train_vjepa", "laptop", ("--masks", ALL_TIME[0], ALL_TIME[0])),
    "V-JEPA, 70 %": ("train_vjepa", "laptop", ("--masks", ALL_TIME[1], ALL_TIME[1])),
    "V-JEPA, 50 %": ("train_vjepa", "laptop", ("--masks", ALL_TIME[2], ALL_TIME[2])),
    "V-JEPA, random masks": ("train_vjepa", "laptop", ("--masks", "random:0.9")),
    "V-JEPA, no EMA": ("train_vjepa", "laptop", ("--ema", "0", "--final_ema", "0")),
    "V-JEPA, kin_l1": ("train_vjepa", "laptop", ("--terms", "kin_l1:1.0")),
    "V-JEPA, kin_l1, no EMA": ("train_vjepa", "laptop", ("--terms", "kin_l1:1.0", "--ema", "0", "--final_ema", "0")),
    "SALT, random teacher masks": ("train_salt", "laptop", ("--teacher_masks", "random:0.9")),
    "SALT, tube teacher masks": ("train_salt", "laptop", ("--teacher_masks", "tube:0.9")),
    "SALT, causal teacher masks": ("train_salt", "laptop", ("--teacher_masks", "causal:0.5")),
    "SALT, teacher of half the steps": ("train_salt", "laptop", ("--split", "0.5", "0.5")),
    "TDV, no motion": ("train_tdv", "laptop", ("--no-motion",)),
}


PAPER = {  # --recipe paper: the papers' own recipes, of one --model
    "V-JEPA": ("train_vjepa", "", ()),
    "V-JEPA 2.1": ("train_vjepa", "vjepa21", ("--context_ramp", "0", "0", "--no-stills")),  # stills need images
    "LD": ("train_vjepa", "", ("--distance", "--terms", "ld:1.0")),
    "FWM-HW-LD": ("train_vjepa", "", ("--distance", "--terms", "static:0.05", "orth:0.01", "hw:1.0", "ld:1.0",
                                      "--micro_batch", "8")),
    "SALT": ("train_salt", "", ()),
    "4DS": ("train_mae4d", "", ()),
    "TDV": ("train_tdv", "", ()),
    "DINO": ("train_tdv", "dino", ()),
    "iBOT": ("train_tdv", "ibot", ()),
}
VIDEO = {  # --recipe video: real video of a camera that stands still
    "V-JEPA": ("train_vjepa", "laptop_video", ()),
    "V-JEPA 2.1": ("train_vjepa", "laptop_video", ("--levels", "4", "--context_loss", "0.5")),
    "LD": ("train_vjepa", "laptop_video", ("--distance", "--terms", "ld:1.0")),
    "FWM-HW-LD": ("train_vjepa", "laptop_video", ("--distance", "--terms", "static:0.01", "orth:0.01", "hw:1.0",
                                                  "ld:1.0", "--micro_batch", "16")),
    "SALT": ("train_salt", "laptop_video", ()),
    "4DS": ("train_mae4d", "laptop_video", ()),
    "TDV": ("train_tdv", "laptop_video", ()),
    "DINO": ("train_tdv", "laptop_video_dino", ()),
    "iBOT": ("train_tdv", "laptop_video_ibot", ()),
}
RECIPES = {"laptop": COMPARED | VARIANTS, "video": VIDEO, "paper": PAPER}


def compared_run(args, name, lr, flops, seed, *more):
    """Train one method -> its folder; what is there is not done again, what was begun goes on."""
    script, preset, flags = RECIPES[args.recipe][name]
    out = Path(args.out, f"{name}_{flops:g}_{lr:g}_{seed}").resolve()
    if (out / "compare.json").exists() and not more:
        return out
    command = [*(args.launch.split() or [sys.executable]), f"{script}.py", "--preset", preset, *flags]
    if args.recipe != "paper":
        command += ["--size", "32", "--frames", "8", "--stride", str(args.stride)]
    else:
        command += ["--model", args.model, "--size", str(args.size)]
    command += ["--data", *(args.data or ["world"]), "--probe_data", "--sample_every", "0", "--resume"]
    command += ["--lr", str(lr), "--flops", str(flops), "--seed", str(seed), "--out_dir", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out.name}: {done.stderr[-2000:]}")
    return out


def logged(out):
    """The lines of a run's log that have a loss."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def judged(args, probes, out, seed):
    """The figures of a run, from its folder or measured. steps and minutes are of all its stages."""
    file = out / "compare.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    if "minutes" in saved and set(probes.lists) <= set(saved["val"]):
        return saved
    last = logged(out)[-1]
    found = {key: last.get(key) for key in ("flops", "rankme", "feature_std")}
    stages = [logged(stage) for stage in (out / "stage1", out) if stage.exists()]
    config = json.loads((out / "config.json").read_text())["config"]
    found["steps"] = sum(lines[-1]["step"] for lines in stages)
    found["minutes"] = 0
    for lines in stages:
        seconds = lines[-1]["step"] * config["batch_size"] / statistics.median(line["clips_per_s"] for line in lines)
        found["minutes"] += seconds / 60
    found |= probes.both(out)
    found["random"] = random_probes(args, probes, out, seed)
    if (out / "stage1" / "encoder.safetensors").exists():
        found["teacher"] = probes(out / "stage1")
    M.write(file, json.dumps(found))
    return found


def random_probes(args, probes, out, seed):
    """What linear probes read from a run's random weights: of equal ones measured once."""
    twin = random_twin(args, out, seed)
    file = twin / "probes.json"
    if not file.exists() or set(probes.lists) - set(json.loads(file.read_text())):
        twin.mkdir(exist_ok=True)
        M.write(file, json.dumps(probes(f"random:{out}", seed=seed)))
    return json.loads(file.read_text())


def random_twin(args, out, seed):
    """The folder of what a run's random weights gave. Methods whose encoders make the same tokens of the same clips
    share it, but for physics, which asks predictors."""
    encoder, config = M.load_encoder(f"random:{out}", seed=seed)
    frames, size = config["frames"], config["size"]
    x = torch.linspace(-2, 2, 3 * frames * size**2).view(1, 3, frames, size, size)
    with torch.no_grad():
        z = encoder(x, blocks=tuple(range(1, 1 + len(encoder.blocks))))
    about = [config.get(name) for name in ("layer", "layer_classify", "mean", "std", "stride", "fps")]
    if "physics" in args.suite:
        about.append(out.name)
    digest = hashlib.sha256(z.numpy().tobytes() + json.dumps(about).encode())
    return Path(args.out, f"random_{digest.hexdigest()[:12]}_{seed}").resolve()


def suite(args, out, seed):
    """{task: what a head of probe.py reads from a run's features, from its random weights, and the constant}."""
    found = {task: {} for task in args.suite}
    for key, encoder in (("value", str(out)), ("random", f"random:{out}")):
        folder = out / "suite" if key == "value" else random_twin(args, out, seed)
        file = folder / "all.json"
        if not file.exists():
            command = [sys.executable, "probe.py", "all", "--encoder", encoder, "--data", "world", "--seeds", str(seed)]
            command += ["--tasks", *args.suite, "--out_dir", str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{folder}: {done.stderr[-2000:]}")
        for row in json.loads(file.read_text())["table"]:
            found[row["task"]] |= {key: row["value"], "metric": row["metric"], "constant": row["constant"]}
    return found


def rates(recipe, name):
    """The two peak learning rates that every method may choose from: its recipe's, and twice as much."""
    script, preset, _ = RECIPES[recipe][name]
    module = {"train_vjepa": V, "train_salt": S, "train_mae4d": E, "train_tdv": T}[script]
    lr = module.PRESETS.get(preset, {}).get("lr", module.Args.lr)
    return lr, 2 * lr


def best_rate(args, probes, name, flops):
    """Of a method's two, the better on the first seed, by halves of the train lists, at each budget: at a small one
    nothing is learned yet, and chance chose a rate at which LD learns nothing later. A variant ("V-JEPA, one mask")
    learns at its method's."""
    method = name.split(",")[0]
    seed = args.seeds[0]
    scores = {}
    for lr in rates(args.recipe, method):
        found = judged(args, probes, compared_run(args, method, lr, flops, seed), seed)
        # of files: by their own tasks, the world being none of theirs
        asked = [task.partition("=")[0] for task in args.tasks if args.data] or found["on_train"]
        scores[lr] = statistics.mean(found["on_train"][task] for task in asked)
    return max(scores, key=scores.get)


def compare(args):
    """Trains each of --rows for each of --flops and --seeds, and prints a Markdown table and writes a picture.
    --plan: only how long that will take, by a few steps of each."""
    methods = args.rows or list(COMPARED)
    if unknown := set(methods) - {*RECIPES[args.recipe]}:
        sys.exit(f"--rows {min(unknown)}: choose from {', '.join(RECIPES[args.recipe])}")
    if unknown := set(args.suite) - {*P.TASKS, "physics"}:
        sys.exit(f"--suite {min(unknown)}: choose from {', '.join(P.TASKS)}, physics")
    if args.plan:
        return plan(args, methods)
    if not args.out:
        sys.exit("compare needs --out DIR, in which the runs are kept")
    clip = dict(frames=args.frames, size=args.size) if args.recipe == "paper" else dict(frames=8, size=32)
    probes = MotionProbes(args.tasks, args.stride, **clip, group=args.group)
    found = {}
    for flops in args.flops:
        for name in methods:
            best = best_rate(args, probes, name, flops)
            runs = []
            for seed in args.seeds:
                runs.append(judged(args, probes, compared_run(args, name, best, flops, seed), seed))
            row = {"method": name, "budget": flops, "lr": best, "runs": runs}
            found[f"{name} {flops:g}"] = row
            if args.suite and flops == max(args.flops):
                where = [compared_run(args, name, best, flops, seed) for seed in args.seeds]
                row["suite"] = [suite(args, out, seed) for out, seed in zip(where, args.seeds)]
            print(f"{name} {flops:g} {best:g}: {[run['val'] for run in runs]}", file=sys.stderr, flush=True)
    print_comparison(found, probes.lists)
    if args.suite:
        print_suite(found, args.suite)
    draw_comparison(found, probes.lists, Path(args.out, "compare.png"))
    return {"seeds": args.seeds, "rows": found}


def spread(values):
    """Mean and standard deviation of accuracies, in per cent."""
    values = [100 * value for value in values]
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def print_comparison(found, tasks):
    titles = ["method", "FLOPs", "steps", "minutes", "lr"]
    for task in tasks:
        titles += [f"{task}, %", "random"]
    print("| " + " | ".join([*titles, "RankMe"]) + " |\n|" + "---|" * (len(titles) + 1))
    for row in found.values():
        runs = row["runs"]
        steps, minutes = (statistics.median(run[key] for run in runs) for key in ("steps", "minutes"))
        cells = [row["method"], f"{row['budget']:.3g}", f"{steps:.0f}", f"{minutes:.1f}", f"{row['lr']:g}"]
        for task in tasks:
            cells += [spread(run[key][task] for run in runs) for key in ("val", "random")]
        cells.append(f"{statistics.median(run['rankme'] for run in runs):.0f}")
        print("| " + " | ".join(cells) + " |")
        if "teacher" in runs[0]:
            teachers = [spread(run["teacher"][task] for run in runs) for task in tasks]
            print("| its teacher | | | | | " + " | | ".join(teachers) + " | | |")


def print_suite(found, tasks):
    """The tasks of space and time, of the larger budget. A task that a method cannot do (physics without a predictor)
    has no figures."""
    rows = {row["method"]: row["suite"] for row in found.values() if "suite" in row}
    about = {}
    for runs in rows.values():
        about |= {task: figures for task, figures in runs[0].items() if figures}
    tasks = [task for task in tasks if task in about]
    print("\n| method | " + " | ".join(f"{task}, {about[task]['metric']} | random" for task in tasks) + " |")
    print("|" + "---|" * (1 + 2 * len(tasks)))
    for name, runs in rows.items():
        cells = [name]
        for task in tasks:
            for key in ("value", "random"):
                values = [run[task][key] for run in runs if key in run[task]]
                deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{deviation}" if values else "-")
        print("| " + " | ".join(cells) + " |")
    print("| constant | " + " | | ".join(f"{about[task]['constant']:.3f}" for task in tasks) + " | |")


def draw_comparison(found, tasks, file):
    """Accuracy over FLOPs, a panel a task: means, a small dot a seed, side by side; dotted: each method's random
    weights."""
    size = (5 * len(tasks) + 1.5, 4)
    figure, axes = M.pyplot().subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in found.values())):
            rows = [row for row in found.values() if row["method"] == name]
            beside = 1.015**i  # seeds of one budget do not hide each other
            budgets = [row["budget"] * beside for row in rows]
            for key, style in (("val", "o-"), ("random", ":")):
                values = [[100 * run[key][task] for run in row["runs"]] for row in rows]
                means = [statistics.mean(v) for v in values]
                axis.plot(budgets, means, style, color=f"C{i}", label=name if key == "val" else None)
                if key == "val":
                    for budget, seeds in zip(budgets, values):
                        axis.plot([budget] * len(seeds), seeds, ".", color=f"C{i}", alpha=0.6)
        axis.set(title=task, xlabel="training FLOPs", ylabel="top-1, %", xscale="log")
        ticks = sorted({row["budget"] for row in found.values()})
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.minorticks_off()
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    M.finish(file, figure)


def plan(args, methods):
    """Minutes on this machine, by the speed of twelve steps of each."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        args.out = root
        for name in methods:
            flops = max(args.flops)
            out = compared_run(args, name, rates(args.recipe, name)[0], flops, 0, "--stop_at", "12", "--log_every", "4")
            # SALT's twelve steps are of its teacher, the first share of --split
            stage = out / "stage1" if (out / "stage1").exists() else out
            config = json.loads((stage / "config.json").read_text())["config"]
            steps = round(config["steps"] / config.get("split", [1])[0])
            seconds = steps * config["batch_size"] / logged(stage)[-1]["clips_per_s"]
            runs = len(args.seeds) + ("," not in name)  # a method's second rate
            minutes = seconds / 60 * runs * sum(args.flops) / flops
            rows.append({"method": name, "steps": steps, "run": round(seconds / 60, 1), "minutes": round(minutes, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    total = sum(row["minutes"] for row in rows)
    return {"flops": args.flops, "rows": rows, "minutes": round(total)}


def depth(args):
    """Where to read: a linear probe on the mean token after each block, of finished runs and of their random weights.
    Runs whose folders differ in a last _NUMBER only are one line. Writes depth.png to --out."""
    out = Path(args.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    table = {}
    kept = {}
    for run in map(Path, args.videos):
        said = json.loads((run / "config.json").read_text())["config"]
        shape = (said["frames"], said["size"])
        seed = said["seed"]
        if shape not in kept:
            kept[shape] = MotionProbes(args.tasks, args.stride, *shape)
        probes = kept[shape]
        for task in probes.lists:
            name = re.sub(r"_\d+$", "", run.name)
            found = table.setdefault(f"{task}, {name}", {"trained": [], "random": []})
            found["trained"].append(probes.depths(run, task))
            found["random"].append(probes.depths(f"random:{run}", task, seed=seed))
    for name, found in table.items():
        for key, rows in found.items():
            print(f"| {name}, {key} | " + " | ".join(spread(column) for column in zip(*rows)) + " |")
    return table | {"picture": draw_depths(table, out / "depth.png")}


def draw_depths(table, file):
    """{line: {"trained", "random": accuracies after each block, a row a run}} over the share of the blocks."""
    figure, axis = M.pyplot().subplots(figsize=(6, 4), layout="constrained")
    for i, (name, found) in enumerate(table.items()):
        for key, style in (("trained", "o-"), ("random", ":")):
            columns = [*zip(*found[key])]
            share = [100 * (block + 1) / len(columns) for block in range(len(columns))]
            mean = [100 * statistics.mean(column) for column in columns]
            error = [100 * statistics.stdev(c) if len(c) > 1 else 0 for c in columns]
            label = name if key == "trained" else None
            axis.errorbar(share, mean, error, fmt=style, color=f"C{i}", capsize=2, label=label)
    axis.set(xlabel="blocks that are run, % (dotted: random weights)", ylabel="linear probe, top-1, %", ylim=(0, 100))
    axis.legend(fontsize=8, loc="upper left")
    return M.finish(file, figure)


def time_clips(spec, frames, stride, size, most=600):
    """Of moments of the videos of a list the same at two speeds, forward and backward: clips (n,4,T,H,W,3) uint8, a
    video's side by side. The slower one has every frame of the middle half of what the faster has every second of."""
    source = D.parse_list(spec)
    rows = np.random.default_rng(0).permutation(len(source))[:most]
    moments = max(1, most // 2 // len(rows))
    clip = D.Clip(2 * frames - 1, stride, size=size, train=False, short="error", segments=moments)
    found = []
    for batch in D.eval_batches(source, clip, rows=rows, batch_size=16):
        video = batch["video"].unflatten(0, (-1, moments))[batch["ok"]].flatten(0, 1)
        fast = video[:, ::2]
        slow = video[:, frames // 2 : frames // 2 + frames]
        found.append(torch.stack([slow, fast, slow.flip(1), fast.flip(1)], 1))
    return torch.cat(found)


@torch.no_grad()
def reads_time(encoder, config, clips):
    """Accuracy of a linear probe on the mean token, of the block that the file names, that tells which of the four a
    clip is: the first half of the clips to learn from, the second to answer for."""
    layer = config.get("layer_classify")
    z = []
    for video in clips.flatten(0, 1).split(64):
        batch = {"video": video, "flip": torch.zeros(len(video), dtype=torch.bool)}
        z.append(encoder(D.prepare(batch, mean=config["mean"], std=config["std"]), blocks=layer).mean(1))
    z = torch.cat(z).unflatten(0, (-1, 4))
    y = torch.arange(4).expand(len(z), 4)
    half = len(z) // 2
    called = M.linear_probe(z[:half].flatten(0, 1), y[:half].flatten(), z[half:].flatten(0, 1))
    return (called == y[half:].flatten()).double().mean().item()


def time_check(args):
    """What a user without labels can ask of a run: do its features say how fast a video of --data plays, and which way?
    Chance is 0.25. Beside it: random weights, and differences of grey pixels."""
    if not args.data:
        sys.exit("time needs --data LIST")
    rows = {}
    kept = {}
    for run in map(Path, args.videos):
        said = json.loads((run / "config.json").read_text())["config"]
        shape = (said["frames"], max(1, said["stride"] // 2), said["size"])
        if shape not in kept:
            kept[shape] = time_clips(args.data[0], *shape)
        row = {}
        for name, where in (("value", str(run)), ("random", f"random:{run}"), ("pixels", "pixels:diff")):
            encoder, config = P.load(P.Args("classify", encoder=where, seed=said["seed"]))
            row[name] = reads_time(encoder, config, kept[shape])
        row["clips"] = 4 * len(kept[shape])
        rows[run.name] = row
        print(f"{run.name}: {row}", file=sys.stderr, flush=True)
    return rows


# --- endurance ------------------------------------------------------------------------------------


def start_run(steps, out):
    """A laptop run with a checkpoint every 50 steps."""
    flags = "--preset laptop --probe_data --sample_every 0 --log_every 10 --save_every 50 --resume"
    command = [sys.executable, "train_vjepa.py", *flags.split(), "--steps", str(steps), "--out_dir", str(out)]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **silent)


def step_of(out):
    """The last logged step."""
    log = out / "log.jsonl"
    last = log.read_text().splitlines()[-1:] if log.exists() else []
    if not last or not last[0].endswith("}"):
        return 0
    return json.loads(last[0]).get("step", 0)


def watch(steps, out):
    """An undisturbed run: its memory and open files every 200 steps."""
    held = []
    process = start_run(steps, out)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if step_of(out) >= 200 * len(held):
            rss = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            held.append({"step": step_of(out), "rss_mb": int(rss.split()[1]) // 1024, "files": files})
        time.sleep(0.2)
    return held


def disturb(steps, out):
    """A run with a SIGKILL after every 200 steps -> how many."""
    kills = 0
    process = start_run(steps, out)
    while process.poll() is None:
        at = 200 * (kills + 1)
        if at < steps and step_of(out) >= at:
            time.sleep(random.random())  # anywhere in a step or a save
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process = start_run(steps, out)
            kills += 1
        time.sleep(0.05)
    return kills


def leaves(steps, out):
    """All that the last checkpoint of a run holds."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(out / f"step_{steps:08d}"), f"{out}.pt")
    return torch.utils._pytree.tree_leaves(torch.load(f"{out}.pt", weights_only=True))


def same(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def soak(args):
    """Laptop training undisturbed, and killed again and again."""
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        killed = Path(root, "killed")
        held = watch(args.steps, whole)
        kills = disturb(args.steps, killed)
        want = leaves(args.steps, whole)
        got = leaves(args.steps, killed)
    equal = len(want) == len(got) and all(map(same, want, got))
    return {"steps": args.steps, "kills": kills, "tensors": len(want), "equal": equal, "held": held}


@torch.no_grad()
def similar_halves(args, runs, device):
    """halves.png, a panel a run: the cosine similarity of a place's tokens d slices apart, in the
    first half of the channels (appearance, where FWM is on) and in the second (dynamics). Tokens
    are layer-normed, as in training, less their mean over the first 256 val clips, without which
    all of them look alike."""
    plt = M.pyplot()
    val = D.parse_list("world", "val") if args.data else D.parse_list(args.val)
    rows = np.arange(min(256, len(val), args.val_clips if args.data else 256))
    found = {}
    for run in runs:
        encoder, config = P.load(dataclasses.replace(args, encoder=run))
        clip = dataclasses.replace(P.clip_of(args, config), train=False)
        layers = (args.layer or config.get("depth", 0),)
        if clip.frames < 2 * (1 if config["images"] else config["tubelet"]):
            raise D.DataError(f"--frames {clip.frames}: {run} makes no two slices of them")
        try:
            features = P.Features(
                args,
                encoder.to(device),
                config,
                val,
                clip,
                device,
                layers,
            )
        except ValueError as error:
            raise D.DataError(f"{run} cannot take these clips: {error}") from error
        slices, high, wide = features.grid
        batches = features.batches(rows, args.micro_batch)
        tokens = [x["video"][:, 0].cpu() for x, _, some in batches if len(some)]
        if not tokens:
            raise D.DataError(f"{val.name}: none of its first videos can be read")
        z = F.layer_norm(torch.cat(tokens), (features.width,))
        z = (z - z.mean((0, 1))).unflatten(1, (slices, high * wide))    # (B, t, n, D)
        found[run] = {}
        for name, half in zip(("appearance", "dynamics"), z.chunk(2, -1)):
            found[run][name] = similarities(half)
    return {"halves": found, "picture": draw_halves(plt, found, Path(args.out_dir) / "halves.png")}


def similarities(z):
    """(B,t,n,C) -> mean cosine of tokens of one place d slices apart, d from 1 to t - 1."""
    found = []
    for d in range(1, z.shape[1]):
        found.append(F.cosine_similarity(z[:, :-d], z[:, d:], dim=-1).mean().item())
    return found


def draw_halves(plt, found, file):
    size = (2.6 * len(found), 2.8)
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=size,
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    low = 0
    for axis, (run, curves) in zip(axes[0], found.items()):
        for name, values in curves.items():
            apart = range(1, len(values) + 1)
            axis.plot([*apart], values, "o-", label=name)
            low = min(low, *values)
        axis.set(title=Path(run).name, xlabel="slices apart", xticks=apart)
    axes[0, 0].set(ylabel="cosine similarity", ylim=(low - 0.05, 1.05))
    axes[0, 0].legend(fontsize=8)
    return M.finish(file, figure)


def halves(args):
    """Of the encoders of runs (the positional arguments), on the built-in world or a list."""
    where = {"val": args.data[0]} if args.data else {"data": "world"}
    return similar_halves(P.Args("compare", out_dir=".", workers=0, **where), args.videos, torch.device("cpu"))


COMMANDS = {"step": step, "gpu": gpu, "reader": reader, "world": world, "terms": terms, "compare": compare,
            "depth": depth, "time": time_check, "soak": soak, "halves": halves}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--teacher_model", default="", help="salt: size of the frozen teacher; the student's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--pos", choices=["rope", "sincos"], default="rope")
    parser.add_argument("--device", default="", help="gpu: cuda, else cpu")
    parser.add_argument("--steps", type=int, default=0, help="gpu: 100, else 2000")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--tasks", nargs="+", default=[], help="terms: NAME=TRAIN_LIST,VAL_LIST")
    parser.add_argument("--out", default="", help="terms, compare: a folder in which the runs are kept")
    parser.add_argument("--flops", type=float, nargs="+", default=[8.5e12], help="compare: of each run")
    parser.add_argument("--suite", nargs="+", default=[], help="compare: tasks of probe.py, of the largest --flops")
    parser.add_argument("--stride", type=int, default=4, help="compare: of the clips")
    parser.add_argument("--group", default="", help="compare: as probe.py's; the halves that choose a rate share none")
    parser.add_argument("--recipe", choices=RECIPES, default="laptop", help="compare; paper: of one --model")
    parser.add_argument("--launch", default="", help='compare: instead of python, "torchrun --nproc-per-node 8"')
    parser.add_argument("--plan", action="store_true", help="compare: only say how long it will take")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--method", choices=METHODS, default="vjepa")
    parser.add_argument("--only", choices=["", "ours", "peer"], default="", help="one side alone: its own peak memory")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.what == "gpu" else "cpu")
    args.steps = args.steps or (100 if args.what == "gpu" else 2000)
    return args


if __name__ == "__main__":
    arguments = parse_args()
    print(json.dumps(COMMANDS[arguments.what](arguments)))
