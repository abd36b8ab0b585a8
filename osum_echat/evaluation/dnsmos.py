"""DNSMOS: how a recording sounds, 1 to 5, by the network that the package ``speechmos`` carries."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from osum_echat.device.onnx import session_options
from osum_echat.evaluation import ScorerUnavailable
from osum_echat.evaluation.recogniser import RATE, Samples


class Dnsmos:
    """DNSMOS P.835 overall quality, 1 to 5, with the network that the package ``speechmos`` carries.

    The network is run directly: the package's own wrapper needs librosa for a second score that is not used here. The
    last step maps the network's output to the published scale with the polynomial of that package.
    """

    WINDOW = int(9.01 * RATE)
    OVERALL = (-0.06766283, 1.11546468, 0.04602535)

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise ScorerUnavailable("DNSMOS needs onnxruntime") from error
        package = importlib.util.find_spec("speechmos")
        if package is None or package.origin is None:
            raise ScorerUnavailable("DNSMOS needs the package speechmos: pip install 'osum-echat[evaluation]'")
        options = session_options(threads=1)
        path = Path(package.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def check(self) -> None:
        """Open the network. Raises ScorerUnavailable when it is not there."""
        _ = self._session

    def overall(self, samples_16k: Samples) -> float:
        """Mean over windows of nine seconds, one a second; shorter recordings are repeated. Raises ValueError for an
        empty one."""
        if not len(samples_16k):
            raise ValueError("DNSMOS of an empty recording")
        samples = np.asarray(samples_16k, dtype=np.float32)
        while len(samples) < self.WINDOW:
            samples = np.concatenate([samples, samples])
        scores = []
        for start in range(0, len(samples) - self.WINDOW + 1, RATE):
            window = samples[None, start : start + self.WINDOW]
            raw = float(self._session.run(None, {"input_1": window})[0][0][2])
            scores.append(float(np.polyval(self.OVERALL, raw)))
            if len(samples) < 2 * self.WINDOW:  # a repeated recording: every window holds the same
                break
        return float(np.mean(scores))
