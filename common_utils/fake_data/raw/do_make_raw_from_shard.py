"""Tars (or a combined set) back to a raw list: python common_utils/fake_data/raw/do_make_raw_from_shard.py [list] [out folder] (--help)."""

import sys

try:
    from osum_echat.data.convert import main
except ModuleNotFoundError as error:
    sys.exit(f"the Python package {error.name!r} is missing: run this with the project's environment (make venv makes .venv)")

if __name__ == "__main__":
    sys.exit(main(to="raw", default_list="common_utils/fake_data/shard/shards_list.txt", default_out="out/raw"))
