"""README.md and assets/*.md: short, their links lead somewhere, and every command that they print can be given.

Laptop commands of the README are run, shortened. Its large recipes are planned (--dry_run).
Commands on the pages are parsed, and their values looked at.
"""
import ast
import functools
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "assets").glob("*.md"))]
TRAINING = ("train_vjepa.py", "train_salt.py", "train_tdv.py", "train_mae4d.py")


def blocks(page, kind=""):
    """The fenced blocks of a page whose fence says `kind`."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page):
    """[(script, its words)] of all fenced blocks of a page."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(("python ", "torchrun ", "srun ", "pip ")):
                continue
            for part in re.split(r"\s&&\s", line):
                words = shlex.split(part, comments=True)
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts:
                    found.append((words[scripts[0]], words[scripts[0] + 1 :]))
    return found


README = [(script, " ".join(words)) for script, words in commands(PAGES[0])]
LARGE = [(script, flags) for script, flags in README if "videos.csv" in flags or "k710.csv" in flags]
LAPTOP = [(script, flags) for script, flags in README if "--preset laptop" in f"{flags} " and "packed" not in flags]
WORLD = [(script, flags) for script, flags in README if "--data world" in flags]
ALL = {(script, " ".join(map(shlex.quote, words))) for page in PAGES for script, words in commands(page)}


def parse(script, words, monkeypatch):
    """The script's Args for these words; SystemExit where a flag does not exist or has no such value."""
    module = importlib.import_module(script.removesuffix(".py"))
    if script in TRAINING:
        return module.parse_args(words)
    monkeypatch.setattr(sys, "argv", [script, *words])
    return module.parse_args()


def parse_tool(words, monkeypatch):
    """`python data.py ...` up to the call of the tool, which is not made."""
    for name in ("check", "index", "pack"):
        tool = functools.wraps(getattr(data, name))(lambda *args, **flags: ({}, 0))
        monkeypatch.setattr(data, name, tool)
    monkeypatch.setattr(sys, "argv", ["data.py", *words])
    with pytest.raises(SystemExit) as end:
        data.main()
    assert not end.value.code


@pytest.mark.parametrize("script, flags", sorted(ALL))
def test_command_can_be_given(script, flags, monkeypatch, capsys):
    """The script exists and takes these flags; their values are in range."""
    words = shlex.split(flags)
    assert (ROOT / script).exists()
    if script == "data.py":
        parse_tool(words, monkeypatch)
    if script not in (*TRAINING, "probe.py"):
        return
    try:
        args = parse(script, words, monkeypatch)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if script in TRAINING:
        model.check_ranges(args)


def test_there_are_commands_for_every_script():
    assert {*TRAINING, "probe.py", "data.py"} <= {script for script, _ in README}
    assert len(ALL) > 50 and len(LARGE) >= 3


def together(commands):
    """Run all these in one process, as most of the time goes into importing torch -> the last line of each."""
    code = "import importlib, sys\n"
    for script, words in commands:
        code += f"sys.argv = {[script, *map(str, words)]!r}\n"
        code += f"script = importlib.import_module({script.removesuffix('.py')!r})\n"
        code += "script.main(script.parse_args())\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def printed():
    """The JSON lines that the README shows, without what they leave out."""
    lines = "\n".join(blocks(PAGES[0])).splitlines()
    shown = [line.replace(" ...,", "").replace(", ...", "") for line in lines]
    return [json.loads(line) for line in shown if line.startswith("{")]


def test_laptop_commands_of_the_readme_run(tmp_path):
    """As printed, in their order, with a few steps and clips and other folders."""
    train = ["--steps", 3, "--probe_every", 0, "--probe_data", "--sample_every", 0, "--workers", 0]
    probe = ["--train_clips", 32, "--val_clips", 16, "--epochs", 1, "--workers", 0, "--out_dir", tmp_path / "probe"]
    assert LAPTOP[0] == ("train_vjepa.py", "--preset laptop") and len(LAPTOP) == 4 and len(WORLD) == 2
    runs = [(script, [*flags.split(), *train, "--out_dir", tmp_path / script]) for script, flags in LAPTOP]
    encoder = str(tmp_path / "train_vjepa.py")
    for script, flags in WORLD:
        few = ["--tasks", "depth", "--steps", 2] if flags.startswith("all") else []
        runs.append((script, [*flags.replace("out/laptop", encoder).split(), *probe, *few]))
    last = together(runs)
    assert last[0].keys() >= printed()[0].keys()
    classify = next(line for line in last if line.get("task") == "classify")
    assert classify.keys() >= printed()[1].keys() and classify["metric"] == printed()[1]["metric"]


def test_large_recipes_of_the_readme_can_be_planned():
    """--dry_run, which touches no data."""
    plans = together([(script, [*flags.split(), "--dry_run"]) for script, flags in LARGE])
    assert len(plans) >= len(LARGE)
    assert all(plan["params"] > 1e8 and plan["flops_per_step"] > 1e15 for plan in plans)


def test_python_of_the_readme_names_what_exists():
    """Functions of data and model, and keywords that they take."""
    modules = {"data": data, "model": model}
    tree = ast.parse("\n".join(blocks(PAGES[0], "python")))
    seen = 0
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        module = modules.get(ast.unparse(call.func.value))
        if module:
            function = getattr(module, call.func.attr)
            assert {keyword.arg for keyword in call.keywords} <= {*inspect.signature(function).parameters}
            seen += 1
    assert seen >= 4


def test_the_readme_is_short():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 250 and len(text.split()) <= 1800
    assert not re.search(r"\b\d+ lines of code|\| lines \|", text)


def sections(page):
    """What a link to a section of the page may say."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, section = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not section or section in sections(other), target


def test_pictures_are_few_and_small():
    """All of them together under 300 kB, and each is shown on a page."""
    pictures = sorted((ROOT / "assets").glob("*.png"))
    text = "".join(page.read_text() for page in PAGES)
    assert pictures and sum(picture.stat().st_size for picture in pictures) < 300_000
    assert [picture.name for picture in pictures if f"{picture.name})" not in text] == []
