"""The texts of mini: its grammar, the rule of its answers, what is held out."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.mini import texts

LABELS = st.builds(
    texts.Labels,
    age=st.sampled_from(texts.AGES),
    gender=st.sampled_from(texts.GENDERS),
    emotion=st.sampled_from(texts.EMOTIONS),
    event=st.sampled_from(texts.EVENTS),
)
TOPICS = st.sampled_from(texts.topics())


def test_grammar_gives_many_different_short_sentences_evenly_over_topics():
    pairs = texts.user_sentences()
    assert len({sentence for sentence, _ in pairs}) == len(pairs) >= 30_000
    assert all(len(sentence.split()) in texts.WORDS and sentence == texts.normalise(sentence) for sentence, _ in pairs)
    counts = [sum(topic == wanted for _, topic in pairs) for wanted in texts.topics()]
    assert len(counts) >= 20 and max(counts) - min(counts) <= 1


def test_held_out_and_hand_written_sentences_never_enter_training():
    training = {sentence for sentence, _ in texts.training_user_sentences()}
    held_out = [sentence for sentence, _ in texts.held_out_user_sentences()]
    written = [sentence for sentence, _ in texts.hand_written("user")]
    assert len(held_out) >= 300 and len(written) >= 60
    assert not training & set(held_out) and not training & set(written)
    assert not {texts.normalise(sentence) for sentence, _ in texts.hand_written("speech")} & {
        texts.normalise(reply) for reply in texts.all_replies()
    }


def test_every_topic_of_the_grammar_has_answers_and_hand_written_sentences():
    assert {topic for _, topic in texts.hand_written("user")} == set(texts.topics())
    for topic in texts.topics():
        assert texts.reply_parts(topic, texts.Labels()).clauses


def test_new_sentences_to_say_stay_inside_the_words_of_the_reply_voice():
    words = set(texts.reply_words())
    assert 300 <= len(words) <= 600
    sentences = [sentence for sentence, _ in texts.hand_written("speech")]
    assert len(sentences) == 200
    assert {word for sentence in sentences for word in texts.normalise(sentence).split()} <= words


@settings(max_examples=60, deadline=None)
@given(TOPICS, LABELS, st.integers(0, 1000))
def test_every_answer_of_the_rule_fits_it(topic: str, labels: texts.Labels, seed: int):
    answer = texts.reply(topic, labels, random.Random(seed))
    assert texts.reply_fits(topic, labels, answer)
    assert texts.reply_fits(topic, labels, answer.lower().replace(",", ""))  # words count, not writing
    assert 4 <= len(answer.split()) <= 16


@settings(max_examples=60, deadline=None)
@given(TOPICS, LABELS, LABELS, TOPICS)
def test_another_topic_or_label_gets_another_answer(topic: str, labels: texts.Labels, other: texts.Labels, other_topic: str):
    answer = texts.reply(topic, labels, random.Random(0))
    same_mood = texts.reply_emotion(labels) == texts.reply_emotion(other)
    same_opening = labels.event == other.event and (labels.event != "none" or labels.emotion == other.emotion)
    same_address = (labels.age, labels.gender) == (other.age, other.gender)
    assert texts.reply_fits(topic, other, answer) == (same_mood and same_opening and same_address)
    if other_topic != topic:
        assert not texts.reply_fits(other_topic, labels, answer)


def test_an_unknown_label_or_topic_is_refused_by_name():
    with pytest.raises(ValueError, match="'grumpy' is not one of"):
        texts.Labels(emotion="grumpy")
    with pytest.raises(ValueError, match="no replies for topic 'politics'"):
        texts.reply_parts("politics", texts.Labels())


def test_missing_wordnet_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match="wordnet-base"):
        texts.wordnet_examples(tmp_path)


def test_wordnet_examples_are_short_normalised_sentences(tmp_path):
    (tmp_path / "data.noun").write_text(
        '00001740 03 n 01 entity 0 000 | that which is; "It was full of rackets, balls and things"; "no"; "3 of 5 were lost today"\n'
    )
    assert texts.wordnet_examples(tmp_path) == ["it was full of rackets balls and things"]


def test_wide_sentences_are_others_about_the_same_topics_and_never_held_out():
    wide = texts.wide_sentences(4000)
    sentences, by_topic = [sentence for sentence, _ in wide], Counter(topic for _, topic in wide)
    assert len(set(sentences)) == 4000 and set(by_topic) == set(texts.topics())
    assert max(by_topic.values()) < 1.2 * min(by_topic.values())
    held_out = {texts.normalise(sentence) for sentence, _ in texts.hand_written("user")} | {
        s for s, _ in texts.held_out_user_sentences()
    }
    assert not held_out & set(sentences)
    grammar = {word for sentence, _ in texts.training_user_sentences() for word in sentence.split()}
    assert len({word for sentence in sentences for word in sentence.split()} - grammar) > 700
    rng = random.Random(0)
    drawn = [texts.about_a_topic(rng, [("mine", "pet")])[0] == "mine" for _ in range(300)]
    assert 0.3 < sum(drawn) / len(drawn) < 0.5
