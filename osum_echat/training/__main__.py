"""Train one stage: ``python -m osum_echat.training --stage S --config C [key=value ...]`` (``train.sh`` wraps it, with
torchrun or without).

    python -m osum_echat.training --stage understanding --config recipes/mini/conf/understanding.yaml max_minutes=5
    torchrun --nproc-per-node 8 -m osum_echat.training --stage generation --config conf/stage2_s2s.yaml engine.name=fsdp

A run that finds checkpoints in its output folder continues the newest one; ``--fresh`` refuses to. Exit codes: 0 done
(or stopped by a signal, with a checkpoint), 2 wrong config or arguments, 3 stopped because of non-finite steps, 4 the
last checkpoint could not be written.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from osum_echat import config as config_io
from osum_echat.run import bad_steps, validators
from osum_echat.training import build, distributed
from osum_echat.training.config import ConfigError, TrainConfig
from osum_echat.training.folder import latest


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog=prog or "osum_echat.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument(
        "--stage", choices=["understanding", "generation", "empathy"], help="must be the config's stage, if it states one"
    )
    out.add_argument("--config", type=Path, required=True, help="YAML file of a TrainConfig")
    out.add_argument(
        "--validators",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help=validators.HELP,
    )
    out.add_argument("--fresh", action="store_true", help="stop if the output folder has checkpoints already")
    out.add_argument("--no-bar", action="store_true", help="no progress bar (for log files)")
    out.add_argument("--print-config", action="store_true", help="print the complete config and stop")
    out.add_argument("overrides", nargs="*", metavar="key=value")
    return out


def load_config(path: Path, stage: str | None, overrides: Sequence[str]) -> TrainConfig:
    """The config of a run. ``stage`` must agree with a stage that the file states."""
    stated = config_io.merge(config_io.read_yaml(path), config_io.parse_overrides(overrides)).get("stage")
    if stage is not None and stated not in (None, stage):
        raise ConfigError(f"--stage {stage}, but {path} is a config for stage {stated}")
    extra = [f"stage={stage}"] if stage is not None else []
    return config_io.load(TrainConfig, path, [*overrides, *extra])


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = parser(prog).parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(message)s" if distributed.launched_by_torchrun() else "%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # of its fonts nobody needs to hear
    # DCP's remark on every checkpoint of one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        config = load_config(args.config, args.stage, args.overrides)
        if args.print_config:
            print(config_io.to_yaml(config), end="")
            return 0
        trainer = build.trainer(config, validators.find_validators(args.validators), bar=not args.no_bar)
        if args.fresh and latest(trainer.checkpoints.folder) is not None:
            raise ConfigError(f"--fresh, but {config.out} has checkpoints; choose another out=, or remove it")
        trainer.resume()
        trainer.fit()
        if not trainer.is_saved:
            print("the last steps could not be saved (see the log); free some disk space and start again", file=sys.stderr)
            return 4
    except bad_steps.TooManyBadSteps as error:
        print(error, file=sys.stderr)
        return bad_steps.EXIT_CODE
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
