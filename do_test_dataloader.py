"""Look at data as training sees it: keys, tasks, shapes, decoded labels, what was left out and why, utterances a second.

python do_test_dataloader.py                                      # the fake data, in all three forms
python do_test_dataloader.py my/shards_list.txt --tokenizer Qwen/Qwen2.5-3B-Instruct --workers 2
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter

FAKE = (
    "common_utils/fake_data/raw/data.list",
    "common_utils/fake_data/shard/shards_list.txt",
    "common_utils/fake_data/combine/combines_list.txt",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", default=FAKE, help="lists of any form, or data yamls (default: the fake data)")
    parser.add_argument("--tokenizer", help="tokenizer folder or hub name (default: one id a character, no files needed)")
    parser.add_argument("--data-type", choices=("auto", "raw", "shard"), default="auto", help="default: by the look of the list")
    parser.add_argument("--label-rules", default="language_think", help="how labels are read: language_think or tag_think")
    parser.add_argument("--profile", default="as_trained", help="prompt profile: as_trained or as_released")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=3, help="batches to show in full of each list (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=6, help="samples to show of each of them (default: %(default)s)")
    parser.add_argument("--max-bad-fraction", type=float, help="stop when more than this share of the samples is bad")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    from osum_echat.data.config import DataConfig, ProcessingConfig, StreamConfig  # after --help: torch takes seconds to import
    from osum_echat.data.loader import build_loader
    from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
    from osum_echat.dialogue.dialect import Dialect
    from osum_echat.dialogue.vocabulary import Vocabulary

    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        text_size = max(len(tokenizer), Vocabulary().text_size)
        vocab = Vocabulary(text_size=text_size, eos_id=tokenizer.eos_token_id, unknown_id=None)
    else:
        tokenizer, vocab = PlainTokenizer(), plain_vocabulary()

    for path in args.lists:
        config = DataConfig(
            streams={"all": StreamConfig(path, type=args.data_type)},
            processing=ProcessingConfig(label_rules=args.label_rules),
            workers=args.workers,
            max_bad_fraction=args.max_bad_fraction,
        )
        try:
            loader = build_loader(config, tokenizer, vocab, Dialect(args.profile))
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        print(f"\n=== {path} ({', '.join(s.form for s in loader.streams[0].sources)}) ===")
        tasks: Counter[str] = Counter()
        positions = padding = 0.0
        began = time.perf_counter()
        try:
            for number, batch in enumerate(loader):
                tasks.update(batch.tasks)
                positions += batch.num_positions
                padding += batch.num_positions * batch.rows.padding_fraction
                if number < args.batches:
                    show(number, batch, args.samples)
        except ValueError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        seconds = time.perf_counter() - began
        for task, count in sorted(tasks.items()):
            print(f"  {count:5}  {task}")
        print(f"  {loader.report.text()}")
        rate = loader.report.used / seconds
        print(
            f"  {loader.batches_done} batches, padding {100 * padding / max(1.0, positions):.1f} %, {rate:.0f} utterances/s, {seconds:.1f} s"
        )


def show(number: int, batch, samples: int) -> None:
    """One batch: shapes, then a few of its samples."""
    rows, lengths = batch.rows, batch.feats_lengths_N.tolist()
    print(
        f"batch {number}: {len(batch)} samples in {rows.ids_BT.shape[0]} rows of {rows.ids_BT.shape[1]} positions "
        f"({100 * rows.padding_fraction:.1f} % padding, {batch.num_targets} targets); feats_NTF {tuple(batch.feats_NTF.shape)}"
    )
    frames = [0] * len(batch)
    for recording, sample in enumerate(batch.sample_N.tolist()):
        frames[sample] += lengths[recording]
    for sample in range(min(samples, len(batch))):
        mine = rows.documents_BT == sample
        targets = int((rows.targets_BT[mine] >= 0).sum())
        print(
            f"  {batch.keys[sample]}  {batch.tasks[sample]}  {int(mine.sum())} positions, {targets} targets, {frames[sample]} frames"
        )
        tags = " ".join(f"{name}={value}" for name, value in batch.tags[sample].items())
        print(f"      label: {batch.texts[sample]}" + (f"\n      tags:  {tags}" if tags else ""))


if __name__ == "__main__":
    main()
