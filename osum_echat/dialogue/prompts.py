"""Every fixed string of a dialogue as data: the class of such strings, and the two published profiles.

``as_trained`` (the default) is what the published weights were trained with; ``as_released`` is what the published
inference code feeds them, its typing errors and omissions included. They are part of a checkpoint's interface: byte for
byte, misspellings too. A checkpoint with strings of its own writes them into its config (see `dialect`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from osum_echat.dialogue.think import LANGUAGE, TAG_CHINESE, ThinkForm, ThinkTemplate


@dataclass(frozen=True)
class Profile:
    """Fixed strings of sequences.

    Attributes:
        system: opening of a sequence by output type.
        user_header: begins a user turn.
        headerless: output types whose current user turn has no header.
        turn_end: ends a user turn, before ``assistant``.
        assistant: begins the assistant's turn.
        history_headers: past turns begin with ``user_header``; if False, only the current turn of a dialogue with a
            past does.
        history_audio_marks: recordings of past turns stand between the audio-begins and audio-ends rows.
        history_after_audio: stands after a past user turn, in front of ``turn_end``.
        history_after_reply: stands after a past reply.
        tag_think, language_think: how the two forms of a think are written.
        language_system: openings of think sequences whose think is natural language, for a checkpoint that writes both
            forms; what is not named here opens as in ``system`` (the published checkpoints write one form each).
        asks: the sentence that inference asks a task in, where that is a fixed one, by task string (see
            `Dialect.instruction`).
    """

    name: str
    system: Mapping[str, str]
    user_header: str
    turn_end: str
    assistant: str
    headerless: frozenset[str] = frozenset()
    history_headers: bool = True
    history_audio_marks: bool = False
    history_after_audio: str = ""
    history_after_reply: str = ""
    tag_think: ThinkTemplate = TAG_CHINESE
    language_think: ThinkTemplate = LANGUAGE
    language_system: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, str] = field(default_factory=dict)

    def opening(self, output_type: str, think: ThinkForm | None = None) -> str:
        """The system prompt of a sequence."""
        return (think == "language" and self.language_system.get(output_type)) or self.system[output_type]

    def template(self, think: ThinkForm) -> ThinkTemplate:
        """How this form of a think is written and parsed."""
        return self.tag_think if think == "tag" else self.language_think


def _system(text: str) -> str:
    return f"<|im_start|>system\n{text}<|im_end|>\n"


_SPEECH_TO_SPEECH = (
    "You are OSUM-chat, a speech-to-speech dialogue assistant by ASLP Lab. You understand both the meaning and paralinguistic cues in "
    "speech then respond with appropriate text and emotionally matching synthetic speech."
)
_SPEECH_TO_SPEECH_THINK = (
    "You are OSUM-chat, a speech-to-speech dialogue assistant by ASLP Lab. You understand both the meaning and paralinguistic cues in "
    "speech. Before responding, first output your reasoning inside <think>...</think end>, analyzing the user\u2019s words and vocal cues. "
    "Then generate a reply with appropriate text and emotionally matched synthetic speech."
)
_TRAINED = {
    "text": "You are OSUM-chat, an audio understanding assistant by ASLP Lab. You can transcribe speech accurately and analyze "
    "paralinguistic cues to provide precise text responses.",
    "s2t_chat": "You are OSUM-chat, a speech-to-text dialogue assistant by ASLP Lab. You understand both the meaning and paralinguistic "
    "cues in speech then respond exclusively with appropriate text.",
    "s2t_chat_fake": _SPEECH_TO_SPEECH_THINK,
    "s2t_chat_think": "You are OSUM-chat, a thinking-enabled speech-to-text dialogue assistant by ASLP Lab. You not only comprehend the "
    "semantic meaning and paralinguistic cues in speech but also engage in deliberate reasoning to process such information. Based on this "
    "thinking process, you then respond exclusively with appropriate text.",
    "text2text": "You are OSUM-chat, a text-to-text dialogue assistant by ASLP Lab. You understand user input in text then respond "
    "exclusively with appropriate text.",
    "text2token": "You are OSUM-chat, a speech synthesis assistant by ASLP Lab. You generate natural and fluent speech from text input.",
    "text2token_streaming": "You are OSUM-chat, a speech synthesis assistant by ASLP Lab. You generate natural speech from text input and "
    "output both audio and the original text in interleaved format.",
    "speech2text_token": _SPEECH_TO_SPEECH,
    "speech2text_token_history": _SPEECH_TO_SPEECH,
    "speech2text_token_think": _SPEECH_TO_SPEECH_THINK,
    "speech2text_token_streaming": "You are OSUM-chat, a speech-to-speech dialogue assistant by ASLP Lab. You analyze speech (content + "
    "paralinguistic cues) and respond with interleaved text and emotionally-matched synthetic speech.",
    "speech2text_token_streaming_think": "You are OSUM-chat, a speech-to-speech dialogue assistant by ASLP Lab. You analyze speech (both "
    "content and paralinguistic cues). Before responding, output your reasoning in <think>...</think end>. Then reply with interleaved "
    "text and emotionally matched synthetic speech.",
}
_RELEASED_TEXT = (
    "You are OSUM-chat, an audio understanding. You can transcribe speech accurately and anaosum_echat2e paralinguistic cues to provide "
    "precise text responses."
)

AS_TRAINED = Profile(
    name="as_trained",
    system={name: _system(text) for name, text in _TRAINED.items()},
    user_header="<|im_start|>user\n",
    turn_end="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    asks={"<TRANSCRIBE>": "将这段音频的语音内容详细记录为文字稿。"},
    history_after_audio="<|im_end|>\n",  # so this mark stands twice after a past recording
    history_after_reply="<|im_end|>\n",
)

AS_RELEASED = replace(
    AS_TRAINED,
    name="as_released",
    system={**AS_TRAINED.system, "text": _system(_RELEASED_TEXT)},
    headerless=frozenset({"s2t_chat_think"}),
    history_headers=False,
    history_audio_marks=True,
    history_after_audio="",
    history_after_reply="",
)

PROFILES: Mapping[str, Profile] = {p.name: p for p in (AS_TRAINED, AS_RELEASED)}


def get_profile(profile: str | Profile) -> Profile:
    """A profile by name. Raises ValueError for an unknown one."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(
            f"unknown prompt profile {profile!r}: use {' or '.join(PROFILES)}, or write the strings of your own out (dialect.profile)"
        )
    return PROFILES[profile]
