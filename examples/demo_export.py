"""`make demo-export`: from a torch module to a verified ONNX file. The module is MiniLM-L6, a sentence encoder."""

from __future__ import annotations

import time
from pathlib import Path

from demo import run


def main() -> None:
    start = time.perf_counter()
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    exported, optimized = folder / "minilm.onnx", folder / "minilm.opt.onnx"
    run("export", "examples/minilm.py:encoder", "-o", str(exported))
    run("optimize", str(exported), "-o", str(optimized), "--report", str(folder / "minilm.json"))
    run("bench", str(exported), str(optimized), "--shapes", "input_ids=4x64")
    print(f"\nThe files are in {folder}/. Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
