"""The runtime block stands verbatim in every training script. `python tests/test_runtime.py --fix` copies train_vjepa.py's into the others."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^# --- runtime \(identical.*?^# --- end runtime ---$", re.S | re.M)


def blocks():
    return {path: BLOCK.findall(path.read_text()) for path in sorted(ROOT.glob("train_*.py"))}


def test_every_script_has_the_same_runtime_block():
    found = blocks()
    assert all(len(b) == 1 for b in found.values()), {p.name: len(b) for p, b in found.items()}
    assert len({b[0] for b in found.values()}) == 1, "run: python tests/test_runtime.py --fix"


if __name__ == "__main__" and "--fix" in sys.argv:
    source = BLOCK.search((ROOT / "train_vjepa.py").read_text())[0]
    for path in blocks():
        path.write_text(BLOCK.sub(lambda _: source, path.read_text()))
