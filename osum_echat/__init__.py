"""OSUM-EChat: a spoken chatbot that hears how something is said, and the framework to train, run and measure it."""

__version__ = "0.1.0"
