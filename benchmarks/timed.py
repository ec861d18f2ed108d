"""Run a command and write its wall time, processor time and peak memory: ``timed.py OUT.json COMMAND ...``.

It runs as a process of its own, and a small one: Linux counts what a parent holds when it starts a child into the
child's peak memory, so a large parent would hide what a small child needs.
"""

import json
import os
import sys
import time

start = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - start
# ru_maxrss is in KiB, on macOS in bytes.
peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
measured = {
    "wall": wall,
    "cpu": usage.ru_utime + usage.ru_stime,
    "peak_bytes": peak,
    "exit_code": os.waitstatus_to_exitcode(status),
}
with open(sys.argv[1], "w") as file:  # noqa: PTH123 - pathlib would cost more than what is measured
    json.dump(measured, file)
