"""Label text: clean-up, tags, answers, names. Pure functions and the tables that they use.

Label texts are words with tags in angle brackets: ``你好<HAPPY>``, ``<开心>好的。``, ``transcript<开始回答>answer``.
"""

from __future__ import annotations

import re

# Blanks next to a Chinese character or an angle bracket.
_NEEDLESS_BLANKS = re.compile(r"(?<=[\u4e00-\u9fff<>])\s+|\s+(?=[\u4e00-\u9fff<>])")
_TAG = re.compile(r"<([^<>]+)>")
_FIRST_TAG = re.compile(r"<[^>]+>")
_LEADING_TAG = re.compile(r"<([^<>]+)>\s*")
_ONLY_TAGS = re.compile(r"(?:\s*<[^<>]+>)+\s*")

ANSWER_MARK = "<开始回答>"
"""Stands between transcript and answer in labels of ``<TRANSCRIBE> <S2TCHAT>``."""

NONE_TAGS = ("<None>", "<NONE>", "<none>")
MERGED_AGES = {"<YOUTH>": "<ADULT>", "<MIDDLE_AGE>": "<ADULT>", "<MIDDLE>": "<ADULT>"}
STYLES = {
    "朗读": "新闻科普",
    "科普百科": "新闻科普",
    "悬疑恐怖": "恐怖故事",
    "诗歌": "诗歌散文",
    "散文": "诗歌散文",
    "武侠评书": "有声书",
    "小说": "有声书",
    "历史": "有声书",
    "科幻": "有声书",
    "对话": "日常口语",
    "口语": "日常口语",
    "幽默": "其他",
}
"""Fine styles of the sources -> the styles that are learnt; 童话故事, 客服 and 其他 stay as they are."""

# Replies in which an assistant says who it is would teach the wrong name. These are the names that the published filter
# finds; names that it lists but never finds (its list lacks some commas) are not here, so that the same data is used.
OTHER_NAMES = (
    *("MOSS Assistant", "MOSS助手", "QWEN", "小智机器人", "小智助手", "小智AI助手", "小智Bot", "Assistant小智", "AI小智"),
    *("virtual assistant", "Helper", "helper", "ChatBot", "chat bot", "chatbot", "Chat Bot", "AI Agent", "AI agent"),
    *("ChatGPT", "chatgpt", "语言模型", "小红小助手", "小刚AI", "晓明助手", "阿强Bot", "阿丽小助手", "王磊AI助手", "李娜AI"),
    *("张伟助手", "赵敏Bot", "刘洋AI小助手", "陈晨智能助手", "ChatBot小明"),
)


def clean(text: str, lower: bool) -> str:
    """No blanks around Chinese characters and around angle brackets; lower case if asked for."""
    text = _NEEDLESS_BLANKS.sub("", text)
    return text.lower() if lower else text


def first_tag(text: str) -> str | None:
    """The first ``<...>`` with its brackets."""
    match = _FIRST_TAG.search(text)
    return match.group() if match else None


def all_tags(text: str) -> list[str]:
    """Every tag without its brackets, in order."""
    return [match.strip() for match in _TAG.findall(text)]


def without_tags(text: str) -> str:
    """The words alone."""
    return _TAG.sub(" ", text).strip()


def only_tags(text: str) -> bool:
    """Whether the text is tags and nothing else."""
    return _ONLY_TAGS.fullmatch(text) is not None


def split_leading_tag(text: str) -> tuple[str | None, str]:
    """(tag with brackets or None, the rest)."""
    match = _LEADING_TAG.match(text)
    return (f"<{match.group(1)}>", text[match.end() :]) if match else (None, text)


def answer_part(text: str) -> str | None:
    """What follows `ANSWER_MARK`; None unless the mark stands there exactly once."""
    parts = text.strip().split(ANSWER_MARK)
    return parts[1] if len(parts) == 2 else None


def merge_ages(text: str) -> str:
    """``<YOUTH>`` and the middle ages count as adult."""
    for tag, merged in MERGED_AGES.items():
        text = text.replace(tag, merged)
    return text


def map_styles(text: str) -> str:
    """Style tags of the sources as the styles that are learnt (`STYLES`)."""
    return _TAG.sub(lambda match: f"<{STYLES.get(match.group(1), match.group(1))}>", text)


def mentioned_name(text: str, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that the text holds."""
    return next((name for name in names if name in text), None)
