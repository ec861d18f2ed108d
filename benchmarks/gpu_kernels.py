"""Every kernel once, on small samples: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_kernels
"""

from __future__ import annotations

import sys

from graphopt.errors import GraphoptError
from graphopt.gpu.driver import find_driver
from graphopt.selftesting.kernels import run_all


def main() -> int:
    """Exit code 0, 1 where a result is wrong, 2 without a GPU."""
    try:
        with find_driver().open() as context:
            bad = [one for one in run_all(context, small=True, say=lambda what: None) if one.status != "ok"]
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for one in bad:
        print(f"{one.kernel} {one.dtype}, tactic {one.tactic}: {one.status}: {one.detail}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
