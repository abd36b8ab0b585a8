"""A combined set back to complete tars: python common_utils/fake_data/shard/do_make_shard_from_combine.py [list] [out folder] (--help)."""

import sys

try:
    from osum_echat.data.convert import main
except ModuleNotFoundError as error:
    sys.exit(f"the Python package {error.name!r} is missing: run this with the project's environment (make venv makes .venv)")

if __name__ == "__main__":
    sys.exit(main(to="shard", default_list="common_utils/fake_data/combine/combines_list.txt", default_out="out/shard"))
