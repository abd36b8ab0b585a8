"""Speech tokens to samples: flow matching and a HiFT vocoder in the voice of a prompt recording, offline or as a stream."""
