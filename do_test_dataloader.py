#!/usr/bin/env python3
"""`osum-echat data show` under its older name; without arguments it shows the fake data in all three forms."""

import os
from pathlib import Path

from osum_echat.data.show import main

# Named from where one stands: the script is started in other folders, too.
FAKE = [
    os.path.relpath(Path(__file__).resolve().parent / "common_utils/fake_data" / name)
    for name in ("raw/data.list", "shard/shards_list.txt", "combine/combines_list.txt")
]


if __name__ == "__main__":
    raise SystemExit(main(prog="do_test_dataloader.py", default_lists=FAKE))
