"""A combined set back to complete tars: python common_utils/fake_data/shard/do_make_shard_from_combine.py [list] [out folder] (--help)."""

import sys

from osum_echat.data.convert import main

if __name__ == "__main__":
    sys.exit(main(to="shard", default_list="common_utils/fake_data/combine/combines_list.txt", default_out="out/shard"))
