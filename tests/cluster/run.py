"""Lists and the live server on a Ray cluster of two nodes on this machine, with the mini model: equal to one process, whatever is lost on the way.

    python tests/cluster/run.py [--only overhead,forms,tasks,tokens,eval,faults,memory,driver,serve] [--records 200]

`make test-ray` runs it (some 15 minutes on two cores). Every check is a line; the last line is one JSON object with what was measured. Exit code 0
when every check held. A short part of it, without model and nodes, is in `make test` (tests/test_batch_engines.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[0] = str(ROOT)  # this checkout's package and tests, whatever is installed
# Before Ray is imported: no report of usage, no question to the cloud, one thread a worker.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from tests.cluster import faults, lists, service  # noqa: E402
from tests.cluster.case import Bench  # noqa: E402

PARTS: dict[str, Any] = {
    "overhead": lists.overhead,
    "forms": lists.forms,
    "tasks": lists.tasks,
    "tokens": lists.tokens,
    "eval": lists.evaluation,
    "faults": faults.workers_and_nodes,
    "memory": faults.memory,
    "driver": faults.driver,
    "serve": service.replicas,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--records", type=int, default=200, help="of the list that is written down in every form")
    parser.add_argument("--local", type=Path, help=argparse.SUPPRESS)  # a process of the local engine, see `lists`
    args = parser.parse_args()
    if args.local is not None:
        lists.local_process(args.local)
        return 0
    with tempfile.TemporaryDirectory(prefix="osum-ray-") as folder:
        os.environ.update({"TMPDIR": folder, "HOME": folder})  # Ray's sessions and its token go with it
        tempfile.tempdir = folder
        bench = Bench(Path(folder), args.records)
        for name in args.only.split(","):
            print(f"== {name}", flush=True)
            PARTS[name](bench)
            bench.close()
    print(json.dumps({"held": not bench.failed, "failed": bench.failed, **bench.found}))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    try:
        code = main()
    except subprocess.CalledProcessError as error:
        print(f"{error}: {(error.stderr or b'').decode()[-2000:]}", file=sys.stderr)
        code = 1
    raise SystemExit(code)
