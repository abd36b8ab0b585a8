"""The smallest copy of this tree that a bare accelerator machine needs, as one folder or archive.

    python tools/pack_tree.py out/tree.tar.gz                       # code, configs, mini: for tools/gpu_check.py
    python tools/pack_tree.py out/tree --add wheels                 # and a folder of wheels beside it
    python tools/pack_tree.py out/tree.tar.gz --add packed          # and data that recipes/mini/pack_for_accelerator.py made

Tests, recorded data, recordings and documents stay behind. It ends with an error when the copy is larger than the
limit, so that nothing is cut off on the way.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "osum_echat",
    "benchmarks",
    "tools",
    "conf",
    "recipes",
    "checkpoints/mini",
    "pyproject.toml",
    "constraints.txt",
    "train.sh",
    "LICENSE",
)
LEFT_OUT = ("benchmarks/results", "osum_echat/serving/models")
LIMIT_MIB = 55


def files(root: Path) -> list[Path]:
    """What is copied, relative to ``root``."""
    tops = [root / name for name in NEEDED]
    found = [p.relative_to(root) for top in tops for p in ([top] if top.is_file() else sorted(top.rglob("*"))) if p.is_file()]
    return [p for p in found if not p.as_posix().startswith(LEFT_OUT) and "__pycache__" not in p.parts]


def copy(target: Path, added: list[Path]) -> int:
    """Copy into the folder ``target``; bytes."""
    pairs = [(ROOT / path, target / path) for path in files(ROOT)]
    for folder in added:
        pairs += [(p, target / folder.name / p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    for source, place in pairs:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    return sum(place.stat().st_size for _, place in pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder, or an archive by its name (.tar.gz)")
    parser.add_argument("--add", type=Path, action="append", default=[], help="a folder that comes along (repeatable)")
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, help=f"MiB (default {LIMIT_MIB})")
    args = parser.parse_args(argv)
    missing = [str(folder) for folder in args.add if not folder.is_dir()]
    if missing:
        parser.error(f"not a folder: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        archive = args.out.name.endswith((".tar.gz", ".tgz"))
        folder = Path(name) / "osum-echat" if archive else args.out
        size = copy(folder, args.add)
        if archive:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(args.out, "w:gz", compresslevel=6) as tar:
                tar.add(folder, arcname=folder.name)
            size = args.out.stat().st_size
    print(f"{args.out}: {size / 2**20:.1f} MiB")
    if size > args.limit * 2**20:
        print(f"that is more than {args.limit:g} MiB: leave out what --add brought, or raise --limit", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
