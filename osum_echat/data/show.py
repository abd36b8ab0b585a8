"""Look at data as training sees it: keys, tasks, shapes, decoded labels, what was left out and why, utterances a
second.

osum-echat data show my/data.list
osum-echat data show my/shards_list.txt --tokenizer Qwen/Qwen2.5-3B-Instruct --workers 2
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osum_echat.data.batch import Batch
    from osum_echat.data.loader import Loader
    from osum_echat.dialogue.vocabulary import Vocabulary


def main(argv: Sequence[str] | None = None, prog: str | None = None, default_lists: Sequence[str] = ()) -> int:
    """Command line. Exit code 2 when a list cannot be read, 1 when too much of it is bad. Without lists:
    ``default_lists``."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "lists", nargs="*" if default_lists else "+", default=default_lists, help="lists of any form, or data yamls"
    )
    parser.add_argument("--tokenizer", help="tokenizer folder or hub name (default: one id a character, no files needed)")
    parser.add_argument("--data-type", choices=("auto", "raw", "shard"), default="auto", help="default: by the look of the list")
    parser.add_argument("--label-rules", default="language_think", help="how labels are read: language_think or tag_think")
    parser.add_argument("--profile", default="as_trained", help="prompt profile: as_trained or as_released")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=3, help="batches to show in full of each list (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=6, help="samples to show of each of them (default: %(default)s)")
    parser.add_argument("--max-bad-fraction", type=float, help="stop when more than this share of the samples is bad")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    # After --help: torch takes seconds to import.
    from osum_echat.data.config import DataConfig, ProcessingConfig, StreamConfig
    from osum_echat.data.loader import build_loader
    from osum_echat.dialogue.dialect import Dialect

    tokenizer, vocab = _text_side(args.tokenizer)
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
        try:
            read(loader, args.batches, args.samples)
        except ValueError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


def _text_side(name: str | None) -> tuple[Any, Vocabulary]:
    from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
    from osum_echat.dialogue.vocabulary import Vocabulary

    if name is None:
        return PlainTokenizer(), plain_vocabulary()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    text_size = max(len(tokenizer), Vocabulary().text_size)
    return tokenizer, Vocabulary(text_size=text_size, eos_id=tokenizer.eos_token_id, unknown_id=None)


def read(loader: Loader, batches: int, samples: int) -> None:
    """Read a list to its end; print the first ``batches``, then counts by task, what was left out, padding and
    speed."""
    tasks: Counter[str] = Counter()
    positions = padding = 0.0
    began = time.perf_counter()
    for number, batch in enumerate(loader):
        tasks.update(sample.task for sample in batch.samples)
        positions += batch.num_positions
        padding += batch.num_positions * batch.rows.padding_fraction
        if number < batches:
            show(number, batch, samples)
    seconds = time.perf_counter() - began
    for task, count in sorted(tasks.items()):
        print(f"  {count:5}  {task}")
    print(f"  {loader.report.text()}")
    rate = loader.report.used / seconds
    share = 100 * padding / max(1.0, positions)
    print(f"  {loader.batches_done} batches, padding {share:.1f} %, {rate:.0f} utterances/s, {seconds:.1f} s")


def show(number: int, batch: Batch, samples: int) -> None:
    """One batch: shapes, then a few of its samples."""
    rows, lengths = batch.rows, batch.feats_lengths_N.tolist()
    print(
        f"batch {number}: {len(batch)} samples in {rows.ids_BT.shape[0]} rows of {rows.ids_BT.shape[1]} positions "
        f"({100 * rows.padding_fraction:.1f} % padding, {batch.num_targets} targets); feats_NTF {tuple(batch.feats_NTF.shape)}"
    )
    frames = [0] * len(batch)
    for recording, sample in enumerate(batch.sample_N.tolist()):
        frames[sample] += lengths[recording]
    for number, info in enumerate(batch.samples[:samples]):
        mine = rows.documents_BT == number
        targets = int((rows.targets_BT[mine] >= 0).sum())
        print(f"  {info.key}  {info.task}  {int(mine.sum())} positions, {targets} targets, {frames[number]} frames")
        tags = " ".join(f"{name}={value}" for name, value in info.tags.items())
        print(f"      label: {info.text}" + (f"\n      tags:  {tags}" if tags else ""))
