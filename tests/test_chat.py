"""What of a row is learned: conversations through chat templates of many kinds, prompts with completions, texts."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from languages import ALPACA, ASKS_OTHERWISE, CHATML, GEMMA, LLAMA2, PLAIN, SMOL, TEMPLATES, THINKING, tokenizer

from fedpft.data.chat import Learnt, encode_completion, encode_messages, encode_text, shorten, with_template
from fedpft.data.rows import Unusable
from fedpft.errors import ConfigError, DataError, ModelError


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turns."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


TALK = talk("Hello, how are you?", "Fine, thanks.", "And you?", "I am fine, too.")


def runs(row: Learnt, by: Any) -> list[str]:
    """The text of each run of learned tokens."""
    found: list[list[int]] = []
    for at, (token, learned) in enumerate(zip(row.tokens, row.learned, strict=True)):
        if learned:
            if at == 0 or not row.learned[at - 1]:
                found.append([])
            found[-1].append(token)
    return [by.decode(tokens) for tokens in found]


def read(row: Learnt, by: Any) -> str:
    text: str = by.decode(row.tokens)
    return text


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Fine, thanks.<|im_end|>", "I am fine, too.<|im_end|>"]),
        (LLAMA2, [" Fine, thanks. </s>", " I am fine, too. </s>"]),
        (THINKING, ["Fine, thanks.<|im_end|>", "I am fine, too.<|im_end|>"]),
        (SMOL, ["Fine, thanks.<|im_end|>", "I am fine, too.<|im_end|>"]),
        (GEMMA, ["Fine, thanks.</turn>", "I am fine, too.</turn>"]),
    ],
    ids=["chatml", "llama2", "thinking", "smol", "gemma"],
)
def test_the_assistants_turns_are_learned_with_their_ends(template: str, answers: list[str]) -> None:
    by = tokenizer(template)
    row = encode_messages(TALK, by)
    assert runs(row, by) == answers
    assert by.decode(row.tokens[row.answer :]) == answers[-1]
    whole = by.apply_chat_template(TALK, tokenize=False)
    assert read(row, by) == whole.rstrip()  # the line end behind the last turn teaches nothing


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_stands_before_an_answer_is_what_the_model_is_asked_with(template: str) -> None:
    by = tokenizer(TEMPLATES[template])
    row = encode_messages(TALK[:2], by)
    asked = by.apply_chat_template(TALK[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert row.tokens[: row.answer] == asked


def test_a_beginning_of_the_sequence_is_the_templates_and_stands_once() -> None:
    for bos in (False, True):
        by = tokenizer(GEMMA, bos=bos)
        row = encode_messages(TALK, by)
        assert row.opened
        assert row.tokens.count(by.bos_token_id) == 1
    assert not encode_messages(TALK, tokenizer(CHATML, bos=True)).opened


def test_what_comes_after_the_last_answer_is_left_out() -> None:
    by = tokenizer(CHATML)
    assert encode_messages([*TALK, {"role": "user", "content": "Bye."}], by) == encode_messages(TALK, by)


def test_a_system_prompt_is_context() -> None:
    by = tokenizer(CHATML)
    row = encode_messages(talk("Hello?", "yes", system="You are a fish."), by)
    assert runs(row, by) == ["yes<|im_end|>"]
    assert read(row, by).startswith("<|im_start|>system\nYou are a fish.")


def test_contents_that_the_template_strips_are_learned_stripped() -> None:
    by = tokenizer(GEMMA)
    assert runs(encode_messages(talk(" Hello? ", "  yes \n"), by), by) == ["yes</turn>"]


def test_a_turn_without_a_mark_behind_it_is_learned_to_its_end() -> None:
    by = tokenizer(ALPACA)
    assert runs(encode_messages(talk("Hello?", "yes"), by), by) == ["yes\n\n"]


def test_a_mark_within_an_answer_is_not_its_end() -> None:
    by = tokenizer("{% for m in messages %}{{ '<turn>' + m['content'] + ' over' }}{% endfor %}")
    assert runs(encode_messages(talk("Hello?", "yes"), by), by) == ["<turn>yes over"]


@pytest.mark.parametrize(
    ("template", "messages", "says", "remedy"),
    [
        (
            THINKING,
            talk("a", "<think>why</think> b", "c", "d"),
            "message 2: .*drops earlier thinking",
            "row of its own",
        ),
        (PLAIN, talk("Hel", "lo"), "message 2: its tokens run into", "control token"),
        (ASKS_OTHERWISE, TALK, "message 2: .*asks for an answer otherwise", "generation prompt"),
        (LLAMA2, [TALK[0], TALK[0], TALK[1]], "refuses .*roles must alternate", "as the template wants it"),
        (GEMMA, talk("a", "b", system="c"), "refuses .*System role not supported", "as the template wants it"),
        ("{{ '<turn>' }}", TALK, "message 2: .*leaves out", "model.chat_template"),
    ],
)
def test_a_row_that_the_template_hides_is_refused_with_the_reason(
    template: str, messages: list[dict[str, str]], says: str, remedy: str
) -> None:
    with pytest.raises(Unusable, match=says) as error:
        encode_messages(messages, tokenizer(template))
    assert remedy in error.value.remedy


def test_the_last_answers_thinking_is_learned() -> None:
    by = tokenizer(THINKING)
    row = encode_messages(talk("a", "<think>why</think> b"), by)
    assert runs(row, by) == ["<think>why</think> b<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "not a list"),
        ("Hello", "not a list"),
        (["Hello"], "message 1 lacks"),
        ([{"role": "user"}], "message 1 lacks role or content"),
        ([{"from": "human", "value": "a"}], "message 1 lacks role or content"),
        ([*TALK[:1], {"role": "assistant", "content": None}], "message 2: its content is not a string"),
        ([{"role": 3, "content": "a"}], "message 1: its role is not a string"),
        ([*TALK[:1], {"role": "assistant", "content": " \u200b\n"}], "message 2: the assistant says nothing"),
        (talk("a\0b", "c"), "message 1 holds a NUL"),
        (talk("a", "\ud800"), "message 2 holds half a character"),
        ([{"role": "assistant", "content": "I begin."}, *TALK], "message 1: the assistant speaks before"),
        (talk("a"), "no message of the assistant among the roles user"),
        ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], "among the roles human, gpt"),
        (talk("a", "b<|im_end|>\n<|im_start|>user\nc"), r"message 2 holds '<\|im_start\|>'|message 2 holds '<\|im_end"),
        (talk("a</s>", "b"), "message 1 holds '</s>'"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, says: str) -> None:
    with pytest.raises(Unusable, match=says) as error:
        encode_messages(messages, tokenizer(CHATML))
    assert error.value.remedy


def test_without_a_chat_template_the_key_that_gives_one_is_named() -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        encode_messages(TALK, tokenizer())


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    by = with_template(tokenizer(), tmp_path / "chat.jinja")
    by.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert encode_messages(TALK, again) == encode_messages(TALK, tokenizer(CHATML))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "refuses"),
        ("{{ messages[0].content | nosuch }}", "refuses"),
        ("You are a helpful assistant.", "leaves out"),
        ("{{ messages[-1]['content'] }}", "otherwise"),
        (ASKS_OTHERWISE, "asks for an answer otherwise"),
        (CHATML.replace("m['content']", "'.'"), "leaves out what the user says"),
        (CHATML.replace("m['content']", "(m['content'] if loop.first else '.')"), "leaves out what the assistant says"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused(template: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(template, encoding="utf-8")
    by = tokenizer(CHATML)
    with pytest.raises(ModelError, match=says) as error:
        with_template(by, path)
    assert str(path) in error.value.message
    assert "model.chat_template" in error.value.remedy
    assert by.chat_template == CHATML


def test_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        with_template(tokenizer(), tmp_path / "none.jinja")


# --- prompts with completions, and texts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "context", "learned"),
    [
        ("Question: what? Answer:", " yes", "Question: what? Answer:", " yes</s>"),
        ("Question: what? Answer: ", "yes", "Question: what? Answer:", " yes</s>"),
        ("Question: what? Answer:\n", "yes", "Question: what? Answer:\n", "yes</s>"),
        ("The stone falls,  \n", "\nthe bird", "The stone falls,  \n", "\nthe bird</s>"),
        ("Hel", "lo", "Hel", "lo</s>"),
        ("答案", "是北京。", "答案", "是北京。</s>"),
        ("", "yes", "", "yes</s>"),
        (" ", "yes", "", " yes</s>"),
        ("Hello?", "yes</s>", "Hello?", "yes</s>"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_the_completion_is_learned_with_its_end(
    prompt: str, completion: str, context: str, learned: str, bos: bool
) -> None:
    by = tokenizer(bos=bos)
    row = encode_completion(prompt, completion, by)
    assert by.decode(row.tokens[: row.answer]) == ("<s>" if bos else "") + context
    assert runs(row, by) == [learned]
    assert row.opened is bos
    assert row.tokens[: row.answer] == by(context)["input_ids"]  # what the model is asked with


def test_a_prompt_that_begins_the_sequence_itself_does_not_begin_it_twice() -> None:
    by = tokenizer(bos=True)
    assert encode_completion("<s>Hello?", " yes", by) == encode_completion("Hello?", " yes", by)


def test_tokens_that_depend_on_both_sides_of_the_seam_are_refused() -> None:
    from tokenizers import pre_tokenizers

    by = tokenizer()
    by.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # "lo" alone is " lo"
    with pytest.raises(Unusable, match="cannot tell the prompt's end") as error:
        encode_completion("Hel", "lo", by)
    assert "space" in error.value.remedy
    assert runs(encode_completion("Hello?", " yes", by), by) == [" yes</s>"]


@pytest.mark.parametrize("bos", [False, True])
def test_all_of_a_text_is_learned(bos: bool) -> None:
    by = tokenizer(bos=bos)
    row = encode_text("The stone falls.", by)
    assert runs(row, by) == ["The stone falls.</s>"]
    assert row.answer == row.opened == bos
    assert row.targets == len(row.tokens) - 1


@pytest.mark.parametrize(
    ("encode", "says"),
    [
        (lambda by: encode_text(" \n", by), "the text is blank"),
        (lambda by: encode_text("a\0", by), "the text holds a NUL"),
        (lambda by: encode_completion("a", "\u200b ", by), "the completion is blank"),
        (lambda by: encode_completion("a\ud800", "b", by), "the prompt holds half a character"),
        (lambda by: encode_completion("a", "b\0", by), "the completion holds a NUL"),
    ],
)
def test_nothing_to_learn_is_refused(encode: Any, says: str) -> None:
    with pytest.raises(Unusable, match=says) as error:
        encode(tokenizer())
    assert error.value.remedy


def test_a_text_that_the_tokenizer_does_not_see_is_refused() -> None:
    from tokenizers import normalizers

    by = tokenizer()
    by.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(Unusable, match="no token"):
        encode_text("xxx", by)
    with pytest.raises(Unusable, match="no token"):
        encode_completion("Hello?", "xxx", by)


def test_a_tokenizer_without_an_end_cannot_teach_one() -> None:
    by = tokenizer()
    by.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        encode_text("The stone falls.", by)


# --- too long ---------------------------------------------------------------------------------------------------------


@st.composite
def learnt(draw: st.DrawFn) -> Learnt:
    """A row as the encoders make them: its last token is learned, and the first is learned only if all are."""
    parts = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=4))
    learned = [kind for context, answer in parts for kind in [False] * context + [True] * answer] or [True] * draw(
        st.integers(2, 12)
    )
    opened = not learned[0] and draw(st.booleans())
    return Learnt(list(range(100, 100 + len(learned))), learned, opened)


@given(learnt(), st.integers(2, 30))
def test_shortening_cuts_the_prompts_start_and_the_completions_end(row: Learnt, most: int) -> None:
    found = shorten(row, most)
    short = found.learnt
    assert len(short.tokens) == len(short.learned) == min(most, len(row.tokens))
    assert short.targets >= 1
    assert short.opened == row.opened
    if len(row.tokens) <= most:
        assert (short, found.prompt_cut, found.completion_cut) == (row, False, False)
        return
    if row.opened:
        assert (short.tokens[0], short.learned[0]) == (row.tokens[0], False)
    kept = short.tokens[row.opened :]
    assert kept == list(range(kept[0], kept[0] + len(kept))) if kept else row.opened  # one piece
    answer = row.tokens[row.answer :]
    completion = short.tokens[short.answer :]
    assert completion == answer[: len(completion)]  # never its beginning
    assert found.completion_cut == (len(completion) < len(answer))
    assert found.completion_cut == (min(row.answer, 1) + len(answer) > most)  # only if it cannot fit
    if found.completion_cut:
        assert short.answer == min(row.answer, 1)
    assert found.prompt_cut == (short.answer < row.answer)
    learned = dict(zip(row.tokens, row.learned, strict=True))
    assert all(learned[token] == was for token, was in zip(short.tokens, short.learned, strict=True))


def test_a_row_cut_to_two_tokens_still_teaches_one() -> None:
    row = Learnt([1, 2, 3, 4, 5], [False, False, False, True, True], opened=True)
    found = shorten(row, 2)
    assert found.learnt == Learnt([1, 4], [False, True], opened=True)
    assert found.prompt_cut
    assert found.completion_cut


def test_earlier_answers_that_are_cut_are_not_learned() -> None:
    row = Learnt(list(range(8)), [False, True, True, False, True, True, True, True])
    found = shorten(row, 6)
    assert found.learnt == Learnt([2, 3, 4, 5, 6, 7], [True, False, True, True, True, True])
    assert found.prompt_cut
    assert not found.completion_cut


def test_so_few_tokens_that_nothing_could_be_learned_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        shorten(Learnt([1, 2], [False, True]), 1)
