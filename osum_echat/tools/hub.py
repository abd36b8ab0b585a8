"""Checkpoint folders to and from the Hugging Face hub, by huggingface_hub.

    osum-echat hub upload checkpoints/mine someone/my-echat --private
    osum-echat hub download someone/my-echat checkpoints/theirs

Uploading needs a login (`hf auth login`). A folder is checked first: config.yaml and weights must be there, and
training states are refused (export them with osum-echat convert). Uploads go in one commit, so nobody downloads half of
it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


def check(folder: Path) -> None:
    """Raise ValueError unless ``folder`` is a checkpoint folder that `load_model` could read."""
    if (folder / "checkpoints").is_dir() or (folder / "state.json").is_file():
        raise ValueError(f"{folder} is a training folder; export it first: osum-echat convert {folder} <target>")
    missing = [name for name in ("config.yaml", "tokenizer") if not (folder / name).exists()]
    if not any(folder.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(f"{folder} is not a checkpoint folder, it lacks {', '.join(missing)}")


def upload(folder: Path, repo: str, private: bool, message: str, revision: str | None) -> str:
    """Upload; the address of the commit."""
    check(folder)
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message=message, revision=revision, ignore_patterns=["*.partial*", ".*"]
    )
    return str(done.commit_url)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("upload", help="a checkpoint folder to a repository of yours")
    up.add_argument("folder", type=Path)
    up.add_argument("repo", help="owner/name")
    up.add_argument("--private", action="store_true")
    up.add_argument("--message", default="Upload of an OSUM-EChat checkpoint")
    up.add_argument("--revision", help="branch")
    down = commands.add_parser("download", help="a repository to a folder")
    down.add_argument("repo", help="owner/name")
    down.add_argument("folder", type=Path)
    down.add_argument("--revision", help="branch, tag or commit")
    args = parser.parse_args(argv)
    try:
        if args.command == "upload":
            print(upload(args.folder, args.repo, args.private, args.message, args.revision))
        else:
            print(snapshot_download(args.repo, revision=args.revision, local_dir=args.folder))
    except (ValueError, HFValidationError, HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        print(f"{args.command} failed: {error}", file=sys.stderr)
        return 2
    return 0
