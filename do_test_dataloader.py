#!/usr/bin/env python3
"""`osum-echat data show` under its older name; without arguments it shows the fake data in all three forms."""

from osum_echat.data.show import main

FAKE = (
    "common_utils/fake_data/raw/data.list",
    "common_utils/fake_data/shard/shards_list.txt",
    "common_utils/fake_data/combine/combines_list.txt",
)


if __name__ == "__main__":
    raise SystemExit(main(prog="do_test_dataloader.py", default_lists=FAKE))
