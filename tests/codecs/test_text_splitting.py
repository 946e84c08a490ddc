"""Long text is cut where a reader would pause, and nothing of it is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpa_codecs.text_splitting import estimate_speech_seconds, is_speakable, split_text

WORDS = ["Hello", "world", "Dr.", "3.14", "1,000", "e.g.", "你好", "世界", "2026", "年", "😀", "n\u0303", "—", "50%"]
MARKS = [". ", ", ", "! ", "? ", "… ", " ", "\n", "\n\n", "。", "，", "！", "？", "；", "：", '" ', "...", ""]
TEXT = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(MARKS)), max_size=60).map(
    lambda pairs: "".join(word + mark for word, mark in pairs)
)


def without_space(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=300, deadline=None)
@given(text=TEXT | st.text(max_size=200), budget=st.floats(0.1, 12))
def test_no_character_is_lost_and_no_piece_is_over_the_budget(text: str, budget: float) -> None:
    pieces = split_text(text, budget)
    assert without_space("".join(pieces)) == without_space(text)
    position = 0
    for piece in pieces:
        position = text.index(piece, position) + len(piece)
        assert piece == piece.strip() != ""
        assert is_speakable(piece) or len(pieces) == 1
        assert estimate_speech_seconds(piece) <= budget + 1e-9 or sum(map(str.isalnum, piece)) == 1


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_text_within_the_budget_stays_whole(text: str) -> None:
    assert split_text(text, estimate_speech_seconds(text) + 1e-6) == ([text.strip()] if text.strip() else [])


def sentences(text: str) -> list[str]:
    """The pieces when every sentence fits and no two do."""
    return split_text(text, 0.75 * estimate_speech_seconds(text))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("It costs 3.14 dollars at example.org today.", "That is cheap enough for me."),
        ("Dr. Smith and Mrs. Jones met Prof. Miller.", "They talked about the weather."),
        ("Many things, e.g. apples, i.e. fruit, are good.", "Eat them every single day."),
        ("J. K. Rowling joined the U.S. Army at night.", "Nobody had expected this move."),
        ("See fig. 3 and no. 7 in the appendix.", "The numbers there are wrong."),
        ("We met at 5 p.m. in the old garden.", "The others came an hour later."),
        ("They left at about five p.m.", "We stayed until six."),
        ("He asked me a question: no.", "I never answered him."),
        ('"Stop!" he said to all of them.', "They did not stop at all."),
        ("Is this the end of it all?", "It is, and it is not."),
        ("What a day it was!!!", "Never again, he said."),
        ("hello there, how are you.", "i am fine, thank you."),
        ("A headline without any mark\n\n", "And the text that follows it."),
        ("今天天气很好，我们去公园吧。", "你觉得这个主意怎么样？"),
        ("他说：“你好，世界。”", "然后他就离开了这里。"),
        ("圆周率是3.14，对吧？", "我记得是这样的！"),
        ("He said hello.", "你好，世界，我来了。"),
    ],
)
def test_text_is_cut_at_sentence_ends_only(first: str, second: str) -> None:
    joint = "" if first[-1] in "。？”" or second[0] == "你" else " "
    assert sentences(first + joint + second) == [first.strip(), second]


def test_chinese_semicolons_end_sentences() -> None:
    assert sentences("我喜欢苹果和梨；他喜欢香蕉和桃。") == ["我喜欢苹果和梨；", "他喜欢香蕉和桃。"]


def test_a_long_sentence_is_cut_at_clause_marks() -> None:
    text = (
        "When the rain had stopped at last, they all went home in silence; the road was very long, 1,000 miles or more."
    )
    assert split_text(text, 3.0) == [
        "When the rain had stopped at last,",
        "they all went home in silence;",
        "the road was very long,",
        "1,000 miles or more.",
    ]
    assert split_text("因为下雨了，所以我们没有去公园，而是在家里看书。", 2.0) == [
        "因为下雨了，",
        "所以我们没有去公园，",
        "而是在家里看书。",
    ]


def test_a_long_clause_is_cut_at_spaces_into_even_pieces() -> None:
    pieces = split_text("one two three four five six seven eight nine ten eleven twelve", 2.5)
    assert len(pieces) == 2
    assert pieces[0].startswith("one two")
    lengths = [estimate_speech_seconds(piece) for piece in pieces]
    assert min(lengths) > 0.8 * max(lengths)


def test_text_without_spaces_is_cut_beside_ideographs_before_a_word_or_number_is() -> None:
    text = "我们在" * 4 + "iPhone" + "上听到了" * 4
    assert any("iPhone" in piece for piece in split_text(text, 1.0))


def test_a_word_that_is_too_long_is_cut_anywhere() -> None:
    assert split_text("a" * 50, 1.0) == ["a" * 10] * 5


def test_combining_marks_stay_with_their_letter() -> None:
    assert split_text("n\u0303" * 4, 0.1) == ["n\u0303"] * 4


def test_short_sentences_are_joined_up_to_the_budget() -> None:
    text = " ".join(["Yes, it is."] * 20)
    budget = 5.0
    pieces = split_text(text, budget)
    assert len(pieces) <= estimate_speech_seconds(text) / budget * 1.5
    assert all(piece.endswith(".") for piece in pieces)


def test_a_short_sentence_is_not_joined_to_a_fragment_of_its_neighbour() -> None:
    text = "Good morning. " + "They walked and walked along the endless river bank until the night came down."
    assert split_text(text, 4.0)[0] == "Good morning."


def test_marks_without_words_stay_with_the_words_before() -> None:
    assert split_text("Hi there. 😀 ... !! Bye now.", 0.7) == ["Hi there. 😀 ... !!", "Bye now."]
    assert split_text("... Hi there. Bye now.", 0.7) == ["... Hi there.", "Bye now."]


def test_text_with_nothing_to_say_is_one_piece_and_space_is_none() -> None:
    assert split_text(" ?!... ", 1.0) == ["?!..."]
    assert split_text(" \n\t", 1.0) == []
    assert split_text("", 1.0) == []


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_budget_is_positive(budget: float) -> None:
    with pytest.raises(ValueError, match="budget_seconds"):
        split_text("text", budget)


def test_a_book_is_split_quickly() -> None:
    book = "The quick brown fox, it is said, jumps over the lazy dog. 今天天气很好，我们去公园吧。 " * 2000
    pieces = split_text(book, 8.0)
    assert len(pieces) > 1000
    assert without_space("".join(pieces)) == without_space(book)


def test_estimates_are_those_of_unhurried_reading() -> None:
    assert estimate_speech_seconds("") == 0
    assert estimate_speech_seconds("...!") == 0
    assert 2 < estimate_speech_seconds("Hello world, this is Major Tom speaking.") < 4
    assert 4 < estimate_speech_seconds("你好，世界。今天是 2026 年 5 月 16 日。") < 7


def test_longer_texts_take_longer() -> None:
    assert (
        estimate_speech_seconds("one two") < estimate_speech_seconds("one, two") < estimate_speech_seconds("one. two")
    )
    assert estimate_speech_seconds("5 apples") < estimate_speech_seconds("50 apples")
    assert estimate_speech_seconds("1 2") < estimate_speech_seconds("1.2")
    assert estimate_speech_seconds("50 of") < estimate_speech_seconds("50% of")
