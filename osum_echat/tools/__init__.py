"""Commands for checkpoints and speech tokens: convert, average, hub, tokens. Each module has a ``main`` that
`osum-echat` calls."""
