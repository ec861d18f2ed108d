"""`make demo`: optimize a real network out of a package, and time it before and after.

The network is Silero VAD, which finds speech in audio: 25 Ifs, most of which can be decided in advance.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path


def run(*arguments: str) -> None:
    """Show a command as a user would type it, and run it."""
    print(f"\n$ graphopt {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "graphopt", *arguments], check=True)


def packaged(package: str, file: str) -> Path:
    """A file that an installed package carries, without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {package} is not installed; run `make demo`")
    return Path(found.origin).parent / file


def main() -> None:
    start = time.perf_counter()
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    original, optimized = folder / "silero_vad.onnx", folder / "silero_vad.opt.onnx"
    shutil.copyfile(packaged("silero_vad", "data/silero_vad.onnx"), original)
    run("optimize", str(original), "-o", str(optimized), "--report", str(folder / "report.json"))
    run("bench", str(original), str(optimized))
    print(f"\nThe files are in {folder}/: the original, the optimized model, and report.json (what each pass did, what")
    print("was undone and why, and how the result was verified).")
    print(f"Done in {time.perf_counter() - start:.0f} s.")
    print("Next: `.venv/bin/graphopt optimize YOUR.onnx`, or `make demo-export`.")


if __name__ == "__main__":
    main()
