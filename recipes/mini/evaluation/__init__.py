"""The recipe's own evaluation of mini: the suite `mini.yaml` beside this file, run by `osum_echat.evaluation`.

    python -m recipes.mini.evaluation --checkpoint checkpoints/mini --out out/evaluation

Held-out sentences, hand-written sentences, voices never trained on, new sentences to say. Prints, last, one JSON object of all numbers (percent;
``dnsmos`` from 1 to 5). The recogniser of speech is Whisper base, which is no part of mini. ``--limit`` is for trying it out; its numbers are
not to be quoted.
"""

from __future__ import annotations

from pathlib import Path

SUITE = Path(__file__).with_name("mini.yaml")
