"""Training of everything a token2wav directory holds, from lists of records with audio.

    python -m osum_echat.training.token2wav.tokenizer --config C   # speech_tokenizer_v1.onnx
    python -m osum_echat.training.token2wav.speaker   --config C   # campplus.onnx, spk2info.pt
    python -m osum_echat.training.token2wav.flow      --config C   # flow.pt
    python -m osum_echat.training.token2wav.vocoder   --config C   # hift.pt
    python -m osum_echat.training.token2wav.distill   --config C   # a directory whose flow needs few steps and no guidance

Each command trains, draws its curves and writes its files into the token2wav directory; the same command again resumes.
All share one loop (`loop.py`) and one reader (`records.py`): what happens in step k is a function of the seed, k and
the weights before it, so a run that was interrupted ends in the same weights as one that was not.
`docs/token2wav_training.md` has the order and the costs.
"""
