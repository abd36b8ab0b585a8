"""Tars to a combined set: python common_utils/fake_data/combine/do_make_combine_from_shard.py [shards_list.txt] [out folder] (--help)."""

import sys

try:
    from osum_echat.data.convert import main
except ModuleNotFoundError as error:
    sys.exit(f"the Python package {error.name!r} is missing: run this with the project's environment (make venv makes .venv)")

if __name__ == "__main__":
    sys.exit(main(to="combine", default_list="common_utils/fake_data/shard/shards_list.txt", default_out="out/combine"))
