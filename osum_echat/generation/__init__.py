"""Decoding: what the model says next, for many rows at once. No audio, no files.

`generator.Generator` runs `request.Request`s and yields `events`; `config.GenerationConfig` holds the sampling settings
of every mode and the guards; `session.Session` keeps a dialogue's cache between turns.
"""
