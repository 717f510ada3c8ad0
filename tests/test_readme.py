"""Every command in the README names a script, a command and flags that exist."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = [line.split("#")[0] for block in re.findall(r"^```\n(.*?)^```", README, re.S | re.M) for line in block.splitlines()]
LINES += re.findall(r"`(python \S+\.py[^`]*)`", README)
COMMANDS = sorted({m[0].strip() for line in LINES for m in re.finditer(r"\S+\.py\b[^&|;]*", line) if re.match(r"(python|torchrun|pip)", line.strip())})


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command(command):
    script, *words = command.split()
    sub = [words[0]] if words and script in ("data.py", "probe.py") and not words[0].startswith("-") else []
    done = subprocess.run([sys.executable, script, *sub, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = done.stdout.replace("-", "_")
    assert [w for w in words if w.startswith("--") and w.replace("-", "_") not in known] == []


def test_readme_has_commands():
    assert len(COMMANDS) >= 6


def test_line_counts_in_the_table_of_files_are_true():
    """To 5 %."""
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M)
    assert len(rows) >= 6
    for name, said in rows:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(said)) < 0.05 * int(said), name
