"""`make gpu`: run what needs a GPU, and say so where there is none.

Exit code: that of the tests; 2 where there is no GPU, since nothing was run and nothing was shown.
"""

from __future__ import annotations

import subprocess
import sys

from graphopt.engines.worker import find_gpu


def main() -> int:
    """Run the tests marked ``gpu``."""
    name = find_gpu()
    if name is None:
        print("no GPU here: nothing was run. The tests marked `gpu` need an NVIDIA driver.")
        return 2
    print(f"GPU: {name}")
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-v"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
