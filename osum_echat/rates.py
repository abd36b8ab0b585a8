"""How much of each thing a second of speech is: the rates of the published model, named once.

16,000 samples  -> log-mel, hop 160         100 frames
100 frames      -> the encoder's stride 2    50 encoder frames
50 frames       -> the down-sampler, 4       12.5 positions of the LLM
speech codes of the reply                    25 (CosyVoice-300M-25Hz)
"""

from __future__ import annotations

FRAMES_PER_SECOND = 100
ENCODER_FRAMES_PER_SECOND = FRAMES_PER_SECOND // 2
FRAMES_PER_POSITION = 8
POSITIONS_PER_SECOND = FRAMES_PER_SECOND / FRAMES_PER_POSITION
CODES_PER_SECOND = 25
