"""Model files of turn taking, as they are in the packages of their makers; each is checked against its hash before it
is opened.

`silero_vad_16k_op15.onnx` from the PyPI wheel silero-vad 6.2.3 (MIT, LICENSE.silero_vad); `smart-turn-v3.2-cpu.onnx`
from the PyPI wheel pipecat-ai 1.14.0 (BSD-2-Clause, LICENSE.smart-turn). The wheels themselves are not installed: they
would bring torchaudio and more.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
SHA256 = {
    "silero_vad_16k_op15.onnx": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
    "smart-turn-v3.2-cpu.onnx": "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
}
VAD, END_OF_TURN = SHA256


def read(name: str) -> bytes | None:
    """The file, or None where it is not there. Raises ValueError when it is another file than the one that was
    tested."""
    path = FOLDER / name
    if not path.is_file():
        return None
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{path} is not the file it should be (sha256 {found}); install the package again")
    return data
