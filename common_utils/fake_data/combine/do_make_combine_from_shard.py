"""Tars to a combined set: python common_utils/fake_data/combine/do_make_combine_from_shard.py [shards_list.txt] [out folder] (--help)."""

import sys

from osum_echat.data.convert import main

if __name__ == "__main__":
    sys.exit(main(to="combine", default_list="common_utils/fake_data/shard/shards_list.txt", default_out="out/combine"))
