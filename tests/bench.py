"""Speed and memory, never a test: ratios measured in one run, the contestants alternating, medians with their spread.

    python tests/bench.py step   [--method mae4d --model vit_b --batch 2 --dtype bf16 --compile]    where a training step's time goes, beside HF's modules
    python tests/bench.py gpu    [--method mae4d --model vit_l --batch 24]    the same on CUDA, eager and compiled, with MFU and memory
    python tests/bench.py reader VIDEO [VIDEO ...]                   clips/s from files, beside decord and PyAV (pip install -r tests/requirements.txt)
    python tests/bench.py world  [--device cuda]                      clips/s of the built-in world, alone and with its labels
    python tests/bench.py soak   [--steps 2000]                      a laptop run killed every 200 steps against an undisturbed one: equal weights?
    python tests/bench.py terms  [--steps 2000 --seeds 0 1 2 --rows ld hw --data LIST]    every row of FWM-HW-LD at laptop size: motion task, speed, memory
The last line on stdout is one JSON object.
"""
import argparse
import copy
import json
import os
import random
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
import train_mae4d as E
import train_salt as S
import train_tdv as T
import train_vjepa as V

IMAGENET = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


def alternate(jobs, rounds, clock):
    """{name: function} -> {name: [seconds of each round]}, the jobs in turn, so that a slow moment of the machine hits all of them."""
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
    """Each job's time against `base`, round by round -> {name: {"median", "min", "max"}}; above 1 is faster than base."""
    out = {}
    for name, t in times.items():
        r = sorted(b / a for a, b in zip(t, times[base]))
        out[name] = {"median": round(statistics.median(r), 3), "min": round(r[0], 3), "max": round(r[-1], 3)}
    return out


# --- the training step ------------------------------------------------------------------------------------------------------------------

class Step:
    """One V-JEPA training step of train_vjepa.py on random clips, in parts that can be timed."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        torch.manual_seed(0)
        self.config = V.Args(model=args.model, pos=args.pos, frames=args.frames, size=args.size, dtype=args.dtype, pred_heads=12, checkpoint=args.checkpoint)
        self.objective = V.VJEPA(self.config).to(device)
        if args.compile:
            M.compile_blocks(self.objective)
        self.optimizer = torch.optim.AdamW(M.param_groups(self.objective, 0.04), lr=1e-4, fused=True)
        self.x = torch.randn(args.batch, 3, args.frames, args.size, args.size, device=device)
        keep, pred = D.sample_masks(self.config.masks, 0, 0, args.batch, self.objective.encoder.grid)
        self.keep, self.pred = [k.to(device) for k in keep], [p.to(device) for p in pred]
        self.parts = {}

    def timed(self, name, function):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        out = function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts.setdefault(name, []).append(time.perf_counter() - begin)
        return out

    def __call__(self):
        o = self.objective
        if self.device.type == "cpu":
            M.tune_cpu()                                            # as the scripts do
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            with torch.no_grad():
                h = self.timed("target", lambda: F.layer_norm(o.target(self.x), (o.target.width,)))
            z = self.timed("context", lambda: o.encoder(self.x, self.keep))
            zhat = self.timed("predictor", lambda: o.predictor(z, self.keep, self.pred))
            loss = sum((p - h.gather(1, i[..., None].expand(-1, -1, h.shape[-1]))).abs().mean() for p, i in zip(zhat, self.pred)) / len(zhat)
        self.timed("backward", loss.backward)
        self.timed("optimizer", lambda: (self.optimizer.step(), self.optimizer.zero_grad(), o.after_step(0)))

    def flops(self):
        return self.objective.flops(self.keep, self.pred)


class MAEStep(Step):
    """One training step of train_mae4d.py."""

    def __init__(self, args, device):
        self.args, self.device, self.parts = args, device, {}
        torch.manual_seed(0)
        self.config = E.Args(model=args.model, frames=args.frames, size=args.size, dtype=args.dtype, checkpoint=args.checkpoint)
        self.objective = E.MAE4D(self.config).to(device)
        if args.compile:
            M.compile_blocks(self.objective)
        self.optimizer = torch.optim.AdamW(M.param_groups(self.objective, 0.05), lr=1e-4, fused=True)
        self.x = torch.rand(args.batch, 3, args.frames, args.size, args.size, device=device)
        self.keep = D.sample_masks([self.config.mask], 0, 0, args.batch, self.objective.encoder.grid)[0][0].to(device)

    def __call__(self):
        if self.device.type == "cpu":
            M.tune_cpu()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.timed("forward", lambda: self.objective(self.x, self.keep)[0])
        self.timed("backward", loss.backward)
        self.timed("optimizer", lambda: (self.optimizer.step(), self.optimizer.zero_grad()))

    def flops(self):
        return self.objective.flops(self.keep.shape[1])


class HFMAEStep:
    """The same with transformers' VideoMAEForPreTraining: the same encoder and kept tokens, its separate decoder of 4 blocks of 384 channels."""

    def __init__(self, args, device):
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
        s = M.SIZES[args.model]
        torch.manual_seed(0)
        config = VideoMAEConfig(image_size=args.size, num_frames=args.frames, hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
                                intermediate_size=s["mlp"], norm_pix_loss=False, attn_implementation="sdpa")
        self.model, self.args, self.device = VideoMAEForPreTraining(config).to(device), args, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.rand(args.batch, args.frames, 3, args.size, args.size, device=device)
        grid = (args.frames // 2, args.size // 16, args.size // 16)
        keep = D.sample_masks(["random:0.95"], 0, 0, args.batch, grid)[0][0].to(device)
        self.hidden = torch.ones(args.batch, grid[0] * grid[1] * grid[2], dtype=torch.bool, device=device).scatter(1, keep, False)

    def __call__(self):
        if self.device.type == "cpu":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.model(self.x, bool_masked_pos=self.hidden).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class HFStep:
    """The same step with transformers' VJEPA2Model: its encoder takes no context mask, so it encodes full clips and its predictor does the rest."""

    def __init__(self, args, device):
        from transformers import VJEPA2Config, VJEPA2Model
        s = M.SIZES[args.model]
        torch.manual_seed(0)
        config = VJEPA2Config(patch_size=16, crop_size=args.size, frames_per_clip=args.frames, tubelet_size=2, hidden_size=s["width"],
                              num_hidden_layers=s["depth"], num_attention_heads=s["heads"], mlp_ratio=s["mlp"] / s["width"], attn_implementation="sdpa")
        self.model, self.args, self.device = VJEPA2Model(config).to(device), args, device
        self.target = copy.deepcopy(self.model.encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(args.batch, args.frames, 3, args.size, args.size, device=device)
        grid = (args.frames // 2, args.size // 16, args.size // 16)
        self.keep, self.pred = ([i.to(device) for i in ids] for ids in D.sample_masks(("8x0.15", "2x0.7"), 0, 0, args.batch, grid))

    def __call__(self):
        if self.device.type == "cpu":
            torch.set_float32_matmul_precision("highest")           # torch's default, which the peer runs with
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            with torch.no_grad():
                h = self.target(self.x).last_hidden_state
                h = F.layer_norm(h, h.shape[-1:])
            z, loss = self.model.encoder(self.x).last_hidden_state, 0
            for keep, pred in zip(self.keep, self.pred):
                zhat = self.model.predictor(z, [keep], [pred]).last_hidden_state
                loss = loss + (zhat - h.gather(1, pred[..., None].expand(-1, -1, h.shape[-1]))).abs().mean() / 2
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            M.ema_update(list(self.target.parameters()), list(self.model.encoder.parameters()), 0.998)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class SALTStep(Step):
    """One step of train_salt.py's second stage under a frozen teacher of --teacher_model, beside train_vjepa.py's step at the student's size."""

    def __init__(self, args, device):
        super().__init__(args, device)                              # its predictor and masks; target and EMA are replaced
        teacher = M.ViT(**M.SIZES[args.teacher_model or args.model], frames=args.frames, size=args.size, pos="rope")
        self.config = S.Args(model=args.model, frames=args.frames, size=args.size, dtype=args.dtype, pred_heads=12, checkpoint=args.checkpoint)
        self.objective = S.Student(self.config, teacher, M.IMAGENET).to(device)
        if args.compile:
            M.compile_blocks(self.objective)
        self.optimizer = torch.optim.AdamW(M.param_groups(self.objective, 0.04), lr=1e-4, fused=True)

    def __call__(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.timed("forward", lambda: self.objective(self.x, self.keep, self.pred)[0])
        self.timed("backward", loss.backward)
        self.timed("optimizer", lambda: (self.optimizer.step(), self.optimizer.zero_grad()))


class TDVStep(Step):
    """One training step of train_tdv.py."""

    def __init__(self, args, device):
        self.args, self.device, self.parts = args, device, {}
        torch.manual_seed(0)
        self.config = T.Args(model=args.model, frames=args.frames, size=args.size, dtype=args.dtype, checkpoint=args.checkpoint)
        self.objective = T.TDV(self.config).to(device)
        if args.compile:
            M.compile_blocks(self.objective)
        self.optimizer = torch.optim.AdamW(M.param_groups(self.objective, 0.01), lr=1e-4, fused=True)
        self.x = torch.randn(args.batch, 3, args.frames, args.size, args.size, device=device)

    def __call__(self):
        if self.device.type == "cpu":
            M.tune_cpu()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            loss = self.timed("forward", lambda: self.objective(self.x)[0])
        self.timed("backward", loss.backward)
        self.timed("optimizer", lambda: (self.optimizer.step(), self.optimizer.zero_grad(), self.objective.after_step(0, True)))

    def flops(self):
        return self.objective.flops()


METHODS = {"vjepa": {"ours": Step, "hf": HFStep}, "mae4d": {"ours": MAEStep, "hf": HFMAEStep}, "salt": {"ours": SALTStep, "vjepa": Step}, "tdv": {"ours": TDVStep}}


def step(args):
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    peak = lambda: round((torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30, 2)
    jobs = {name: method(args, device) for name, method in METHODS[args.method].items() if args.only in ("", name if name == "ours" else "peer")}
    times = alternate(jobs, args.rounds, time.perf_counter)
    if args.only == "peer":
        return {"model": args.model, "peer": [*jobs][0], "seconds": round(statistics.median([*times.values()][0]), 4), "peak_gb": peak()}
    ours, seconds = jobs["ours"], statistics.median(times["ours"])
    flops = ours.flops() * args.batch
    result = {"model": args.model, "batch": args.batch, "dtype": args.dtype, "compiled": args.compile, "seconds": round(seconds, 4),
              "clips_per_s": round(args.batch / seconds, 2), "tflops": round(flops / seconds / 1e12, 3), "mfu": round(flops / seconds / 989e12, 3) if cuda else None,
              "split": {k: round(statistics.median(v[1:]), 4) for k, v in ours.parts.items()},
              "peak_gb": peak()}
    for peer in set(jobs) - {"ours"}:
        result[f"faster_than_{peer}"] = ratios(times, peer)["ours"]
    return result


def gpu(args):
    """Eager and compiled, each in its own process, so that neither has the other's memory."""
    rows = []
    for compiled in ((), ("--compile",)):
        flags = ["--device", "cuda", "--method", args.method, "--model", args.model, "--batch", str(args.batch), "--dtype", args.dtype, "--pos", args.pos,
                 "--only", "ours", *compiled]
        done = subprocess.run([sys.executable, __file__, "step", *flags], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    return {"rows": rows, "device": torch.cuda.get_device_name(), "torch": torch.__version__}


# --- reading ----------------------------------------------------------------------------------------------------------------------------

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
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate, base, got = stream.average_rate, stream.time_base, {}
        container.seek(int(round(ids[0] / rate / base)), stream=stream)
        for frame in container.decode(stream):
            i = round(float(frame.pts * base * rate))
            if i in ids:
                got[i] = frame.to_ndarray(format="rgb24")
            if i >= ids[-1]:
                break
    return np.stack([got[int(i)] for i in ids])


def reader(args):
    """16 frames at stride 4, random start and crop to 224 px: one core, one process, CPU time. Packed files are read at the same times."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    torch.set_num_threads(1)
    clip, seeds, samples = D.Clip(), range(8), {}
    for path in args.videos:
        video = D.open_video(path)
        for i in seeds:
            rng = np.random.default_rng(i)
            ids = D.frame_positions(len(video), clip, rng.random()).astype(int)
            samples[path, i] = ids, D.random_box(rng, video.metadata.height, video.metadata.width, clip.scale, clip.ratio), i % 2 == 0
    ids = next(iter(samples.values()))[0]
    difference = np.abs(D.open_video(args.videos[0]).get_frames_at(ids.tolist()).data.numpy().astype(int) - decord_frames(args.videos[0], ids)).mean()

    def ours(paths, clip, per=1):
        for path in paths:
            for i in range(0, len(seeds), per):
                video = D.read_clips(path, clip, [np.random.default_rng(s) for s in seeds[i : i + per]])
                D.prepare({"video": video, "flip": torch.arange(len(video)) % 2 == 0})

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "list.txt"
        rows.write_text("".join(f"{os.path.abspath(p)}\n" for p in args.videos))
        fps = D.open_video(args.videos[0]).metadata.average_fps
        packed = {}
        for name, flags in (("packed", ()), ("packed, fast decode", ("--fast_decode",))):
            command = ["pack", str(rows), f"{folder}/{name[7:9]}", "--short_side", "256", "--fps", str(fps / clip.stride), "--gop", "8", "--workers", "1", *flags]
            done = subprocess.run([sys.executable, D.__file__, *command], check=True, capture_output=True, text=True)
            packed[name] = D.parse_list(json.loads(done.stdout.splitlines()[-1])["list"]).paths
        jobs = {"decord": lambda: [peer_transform(decord_frames(p, ids), box, flip) for (p, _), (ids, box, flip) in samples.items()],
                "pyav": lambda: [peer_transform(pyav_frames(p, ids), box, flip) for (p, _), (ids, box, flip) in samples.items()],
                "ours": lambda: ours(args.videos, clip), "ours, 4 clips a video": lambda: ours(args.videos, D.Clip(clips=4), 4),
                **{name: lambda paths=paths: ours(paths, D.Clip(stride=1)) for name, paths in packed.items()}}
        times = alternate(jobs, args.rounds, time.process_time)
    speed = {name: round(len(samples) / statistics.median(t), 2) for name, t in times.items()}
    return {"clips_per_s": speed, "against_decord": ratios(times, "decord"), "mean_pixel_difference": round(float(difference), 3)}


def world(args):
    torch.set_num_threads(1)
    out = {}
    for frames, size in ((8, 32), (16, 64)):
        w, n = D.World("train", frames=frames, size=size, device=args.device), 32 if args.device == "cpu" else 1024
        jobs = {"video": (), "with depth and pose": ("depth", "pose"), "with flow": ("flow", "flow_visible"), "with tracks": ("tracks", "visible"),
                "with all but pairs": ("depth", "pose", "masks", "boxes", "flow", "flow_visible", "tracks", "visible", "right", "disparity", "disparity_visible"),
                "pairs": ("impossible",)}
        times = alternate({name: lambda labels=labels: w.render(list(range(n)), labels) for name, labels in jobs.items()}, args.rounds, time.perf_counter)
        out[f"{frames}x{size}px"] = {name: round(n / statistics.median(t), 1) for name, t in times.items()}
    return {"clips_per_s": out, "device": args.device}


# --- auxiliary objectives -----------------------------------------------------------------------------------------------------------------

def row_job(row):
    """Two laptop steps of a row of FWM-HW-LD, without its loader."""
    torch.manual_seed(0)
    args = V.Args(**V.PRESETS["laptop"] | {"distance": True} | row)
    objective, x = V.VJEPA(args), torch.randn(16, 3, 8, 32, 32)
    optimizer = torch.optim.AdamW(M.param_groups(objective, 0.04), lr=args.lr, fused=True)

    def job():
        for step in range(2):
            masks = D.sample_masks(args.masks, 0, step, 16, objective.encoder.grid, args.aspect, temporal_keep=args.temporal_keep)
            if args.motion:
                masks = D.guide_masks(*masks, D.motion_map(x, args.tubelet, args.patch), args.masks, 0, step, 0, args.motion, args.motion_uniform, args.aspect,
                                      args.temporal_keep)
            objective(x, *masks)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(step)
    return job


def terms(args):
    """Trains `--preset laptop --distance` (files: --stride 5, crops of 0.3 to 0.5) with the flags of each row, one run after the other, and prints a Markdown
    table: a linear probe on eight motions of the world and on each of --tasks; steps/s (of processor time, the rows in turn) and peak memory against the baseline; RankMe.
    With --out the runs stay, and what is there is not done again."""
    table = {name: row for rows in V.ROWS.values() for name, row in rows.items()}
    if unknown := set(args.rows) - set(table):
        sys.exit(f"--rows {min(unknown)}: choose from {', '.join(table)}")
    rows, found, start, clips = {"baseline": {}} | {name: row for name, row in table.items() if name in (args.rows or table)}, {}, [], {}
    lists = {"motion": ("world", "world")} | {name: pair.split(",") for name, _, pair in (task.partition("=") for task in args.tasks)}
    clip = D.Clip(frames=8, size=32, stride=5, train=False)

    @torch.no_grad()
    def probes(run, **seed):
        encoder, _ = M.load_encoder(run, **seed)
        out = {}
        for name, pair in lists.items():
            if name not in clips:                                   # read once for all runs
                sources = [D.parse_list(path, split=split, labelled=True) for path, split in zip(pair, ("probe", "val"))]
                clips[name] = [list(D.eval_batches(source, clip, batch_size=64)) for source in sources]
            (x, y, ok), (xv, yv, okv) = ([torch.cat(v) for v in zip(*((encoder(D.prepare(b)).mean(1), b["label"], b["ok"]) for b in half))] for half in clips[name])
            out[name] = ((M.linear_probe(x[ok], y[ok], xv) == yv) & okv).double().mean().item()
        return out

    M.tune_cpu()
    speed = ratios(alternate({name: row_job(row) for name, row in rows.items()}, args.rounds, time.process_time), "baseline")
    with tempfile.TemporaryDirectory() as root:
        for seed in args.seeds:                                     # seeds outermost: a slow hour of the machine hits all rows
            for name, row in rows.items():
                out = Path(args.out or root, f"{name}_{seed}").resolve()
                flags = [f for key, value in row.items() for f in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
                command = [sys.executable, "train_vjepa.py", "--preset", "laptop", "--distance", "--steps", str(args.steps), "--seed", str(seed), "--resume",
                           "--sample_every", "0", "--log_every", str(max(1, args.steps // 10)), "--stride", "5", "--crop_scale", "0.3", "0.5", "--crop_ratio",
                           "0.75", "1.35", "--out_dir", str(out), "--probe_data", *(["--data", *args.data] if args.data else []), *flags]
                saved = json.loads((out / "terms.json").read_text()) if (out / "terms.json").exists() else {}
                if saved.get("steps") != args.steps:
                    done = subprocess.run(command, cwd=Path(V.__file__).parent, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{name}: {done.stderr[-2000:]}")
                    lines = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]
                    saved = {"steps": args.steps} | {key: lines[-1][key] for key in ("peak_gb", "rankme", "feature_std")}
                if set(lists) - set(saved):
                    saved |= probes(out)
                    M.write(out / "terms.json", json.dumps(saved))
                found.setdefault(name, []).append(saved)
                print(f"seed {seed} {name}: {saved}", file=sys.stderr, flush=True)
            start.append(probes(f"random:{out}", seed=seed))        # the same encoder before any step
    titles = ("row", *(part for name in lists for part in (f"{name}, %", "Δ")), "steps/s", "memory", "RankMe")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for name, runs in ({"random weights": start} | found).items():
        cells = []
        for task in lists:
            top1, base = ([100 * run[task] for run in some] for some in (runs, found["baseline"]))
            spread = f" +- {statistics.stdev(top1):.1f}" if len(runs) > 1 else ""
            cells += [f"{statistics.mean(top1):.1f}{spread}", f"{statistics.mean(top1) - statistics.mean(base):+.1f}"]
        if runs is start:
            cells += ["-"] * 3
        else:
            memory = statistics.median(run["peak_gb"] / base["peak_gb"] for run, base in zip(runs, found["baseline"]))
            cells += [f"{speed[name]['median']:.2f}", f"{memory:.2f}", f"{statistics.median(run['rankme'] for run in runs):.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return {"steps": args.steps, "seeds": args.seeds, "random": start, "rows": found, "speed": speed}


# --- endurance --------------------------------------------------------------------------------------------------------------------------

def soak(args):
    """Laptop training with a checkpoint every 50 steps, undisturbed and with a SIGKILL after every 200; memory and open files of the first."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as root:
        def begin(out):
            flags = f"--preset laptop --probe_data --sample_every 0 --log_every 10 --save_every 50 --resume --steps {args.steps} --out_dir {out}"
            return subprocess.Popen([sys.executable, "train_vjepa.py", *flags.split()], cwd=Path(V.__file__).parent, start_new_session=True,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def step(out):
            log = Path(out, "log.jsonl")
            found = [json.loads(x).get("step", 0) for x in log.read_text().splitlines()[-1:] if x.endswith("}")] if log.exists() else []
            return found[0] if found else 0

        held, kills, states = [], 0, []
        process, at = begin(f"{root}/a"), 0
        while process.poll() is None:
            if step(f"{root}/a") >= at:
                at += 200
                pid = process.pid
                rss = int(next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")).split()[1])
                held.append({"step": step(f"{root}/a"), "rss_mb": rss // 1024, "files": len(os.listdir(f"/proc/{pid}/fd"))})
            time.sleep(0.2)
        process, at = begin(f"{root}/b"), 200
        while process.poll() is None:
            if at < args.steps and step(f"{root}/b") >= at:
                time.sleep(random.random())                     # anywhere in a step or a save
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process, at, kills = begin(f"{root}/b"), at + 200, kills + 1
            time.sleep(0.05)
        for name in "ab":
            dcp_to_torch_save(f"{root}/{name}/step_{args.steps:08d}", f"{root}/{name}.pt")
            states.append(torch.load(f"{root}/{name}.pt", weights_only=True))
        leaves = [torch.utils._pytree.tree_leaves(s) for s in states]
        equal = len(leaves[0]) == len(leaves[1]) and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*leaves))
        return {"steps": args.steps, "kills": kills, "tensors": len(leaves[0]), "equal": equal, "held": held}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "gpu", "reader", "world", "terms", "soak"])
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--teacher_model", default="", help="salt: size of the frozen teacher, as large as the student if it is not said")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--pos", choices=["rope", "sincos"], default="rope")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--tasks", nargs="+", default=[], help="terms: NAME=TRAIN_LIST,VAL_LIST")
    parser.add_argument("--out", default="", help="terms: a folder in which the runs are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--method", choices=METHODS, default="vjepa")
    parser.add_argument("--only", choices=["", "ours", "peer"], default="", help="time one side alone: its own peak memory")
    arguments = parser.parse_args()
    print(json.dumps({"step": step, "gpu": gpu, "reader": reader, "world": world, "terms": terms, "soak": soak}[arguments.what](arguments)))
