"""One step of each script (SALT: of each stage) on a GPU, as a user would start it: eager, and compiled in bf16."""
import json
import math

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: torch.cuda.is_available() is False here")

A_STEP = {
    "train_vjepa": ("--steps", 1),
    "train_salt": ("--steps", 2, "--split", 0.5, 0.5),
    "train_tdv": ("--steps", 1),
    "train_mae4d": ("--steps", 1),
}


@pytest.mark.parametrize("flags", [(), ("--compile", "--dtype", "bf16")], ids=["eager", "compiled"])
@pytest.mark.parametrize("script", A_STEP)
def test_a_step(script, flags, run, tmp_path):
    flags += ("--out_dir", tmp_path / "run", "--probe_data")
    status, last, err = run(f"{script}.py", "--preset", "laptop", *A_STEP[script], *flags, timeout=600)
    assert status == 0, err[-2000:]
    assert last["steps"] == 1 and math.isfinite(last["loss"])
    log = next((tmp_path / "run").rglob("log.jsonl"))
    head, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert head["device"] != "cpu"
    step = [line for line in lines if "loss" in line][-1]
    assert step["peak_gb"] > 0 and math.isfinite(step["grad_norm"])
    assert list((tmp_path / "run").rglob("encoder.safetensors")) and list((tmp_path / "run").rglob("samples/*.png"))
