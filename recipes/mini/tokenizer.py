"""Mini's own text tokenizer: a small byte-level BPE, saved as transformers files.

    python -m recipes.mini.tokenizer --out recipes/mini/conf/tokenizer

All bytes are in it, so any text can be written; the merges come from mini's own texts. The pieces of the think template and the tags are tokens of
their own, so a think costs few steps. A blank is put before every text: a word then has the same ids at the beginning and in the middle, which is what CTC
labels, transcripts and thinks must share for copying to be simple. Every character of plain English with its blank is one token, because
single characters spell words for the speech part.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from osum_echat.dialogue.think import CLOSE, OPEN
from recipes.mini import texts
from recipes.mini.dialect import DIALECT

SIZE = 800
END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHARACTERS = string.ascii_letters + string.digits + " .,?!'-"
SPECIAL = (END_OF_TEXT, TURN_BEGIN, TURN_END)


def pieces() -> list[str]:
    """Strings that are one token each: think marks, the fixed parts of the think, tags."""
    template = [part.rstrip() for part, _ in DIALECT.strings.tag_think.parts]
    tags = [f"<{value}>" for values in (texts.AGES, texts.GENDERS, texts.EMOTIONS, texts.EVENTS) for value in values]
    return [OPEN, CLOSE, *template, *tags]


def corpus(seed: int = 0) -> Iterator[str]:
    """Texts that the merges are learnt from: user sentences, open vocabulary, replies and tag values."""
    rng = random.Random(seed)
    users = [f" {sentence}" for sentence, _ in texts.training_user_sentences()]
    yield from rng.sample(users, 20_000)
    yield from (f" {sentence}" for sentence in texts.wordnet_examples()[:20_000])
    yield from (f" {reply}" for reply in rng.sample(list(texts.all_replies()), 4_000))
    yield from (f" {texts.free_sentence(rng)}" for _ in range(2_000))
    values = [
        value for group in (texts.AGES, texts.GENDERS, texts.EMOTIONS, texts.EVENTS, texts.REPLY_EMOTIONS) for value in group
    ]
    yield from (f" {value}" for value in values for _ in range(2_000))
    yield from (f" {character}" for character in CHARACTERS for _ in range(2_000))


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")  # a word at the beginning is the word of the middle
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(pieces()),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    # What stands behind a piece begins anew, so the blank that the template writes there is not counted twice.
    tokenizer.add_tokens([AddedToken(piece, rstrip=True, normalized=False) for piece in pieces()])
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write transformers' files, so that `AutoTokenizer` reads the folder."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    wrapped.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = build()
    save(tokenizer, arguments.out)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens, {TURN_END} is {tokenizer.token_to_id(TURN_END)}")


if __name__ == "__main__":
    main()
