"""Raw list to tars: python common_utils/fake_data/shard/do_make_shard_from_raw.py [data.list] [out folder] (--help for more)."""

import sys

try:
    from osum_echat.data.convert import main
except ModuleNotFoundError as error:
    sys.exit(f"the Python package {error.name!r} is missing: run this with the project's environment (make venv makes .venv)")

if __name__ == "__main__":
    sys.exit(main(to="shard", default_list="common_utils/fake_data/raw/data.list", default_out="out/shard"))
