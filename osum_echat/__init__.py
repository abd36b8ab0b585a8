"""OSUM-EChat: a spoken chatbot that hears how something is said, and the framework to train, run and measure it.

from osum_echat import EChat

echat = EChat.load("checkpoints/mini")
print(echat.chat("me.wav", think="tag").text)
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (said before anything fails in words of its own)
    sys.stderr.write("osum-echat needs Python 3.10 or newer, this is " + sys.version.split()[0] + "\n")
    raise SystemExit(2)

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osum_echat.pipeline import Ask, EChat, Reply

__version__ = "0.2.0"
__all__ = ["Ask", "EChat", "Reply", "__version__"]


def __getattr__(name: str) -> Any:
    """`EChat` and its company on first use, so that importing the package stays light."""
    if name in __all__:
        from osum_echat import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'osum_echat' has no attribute {name!r}")
