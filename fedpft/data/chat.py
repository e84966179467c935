"""Rows of text as token ids, and which of these a language model is to learn.

A row is a conversation, a prompt with its completion, or a text. Learned are the turns of the assistant, the
completion, or all of the text, each with the token that ends it: a model that never learns it never stops. The rest is
context, which is read and not learned. What is learned is found by tokenising prefixes: what the model is given when it
is asked must be, token by token, how the row begins. A row where that cannot be had is refused with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft.data.rows import Unusable, is_blank, listed, one_line, read_text, shown, unusable
from fedpft.errors import ConfigError, ModelError

Message = Mapping[str, Any]

ASSISTANT = "assistant"
TURN_BY_TURN = "write each answer of the assistant as a row of its own, which ends with it"
ONE_EXCHANGE = ({"role": "user", "content": "How are you?"}, {"role": ASSISTANT, "content": "Fine, thanks."})


@dataclass(frozen=True)
class Learnt:
    """A row as tokens.

    Attributes:
        tokens: with the special ones.
        learned: as many; True for a token that the model is to learn to say. The first token of a row is predicted by
            nothing, and counts as learned only where nothing stands before the text.
        opened: the first token is the tokenizer's beginning of a sequence: a row that is cut keeps it.
    """

    tokens: list[int]
    learned: list[bool]
    opened: bool = False

    @property
    def answer(self) -> int:
        """Where the last run of learned tokens begins: the completion, the assistant's last turn, or the text."""
        last = len(self.learned) - 1 - self.learned[::-1].index(True)
        return next((at + 1 for at in range(last, -1, -1) if not self.learned[at]), 0)

    @property
    def targets(self) -> int:
        """How many tokens are learned and have one before them that predicts them."""
        return sum(self.learned[1:])


@dataclass(frozen=True)
class Shortened:
    """A row within a number of tokens, and what had to go for it."""

    learnt: Learnt
    prompt_cut: bool
    completion_cut: bool


# --- the three forms of a row -----------------------------------------------------------------------------------------


def encode_messages(messages: Sequence[Message], tokenizer: Any) -> Learnt:
    """A conversation by the tokenizer's own chat template; what follows the assistant's last turn is left out.

    Of a turn all that comes after the template's generation prompt is learned, up to the control token that ends it;
    white space behind that token is the template's, and no model has to say it. A template that ends turns without a
    control token has them learned to their end.

    Raises:
        Unusable: not a conversation, or one of which the template does not show what the assistant said.
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            "set model.chat_template in server.yaml to a file with one (Jinja), or give rows of prompt and completion",
        )
    turns = _assistant_turns(messages, tokenizer)
    texts = [_render(messages[: turn + answered], tokenizer, ask=not answered) for turn in turns for answered in (0, 1)]
    for number, text in enumerate(texts):
        if not texts[-1].startswith(text):
            raise _written_otherwise(messages, turns[number // 2], texts[-1], tokenizer)
    prefixes: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    whole, control = prefixes[-1], _control(tokenizer)
    learned = [False] * len(whole)
    for turn, asked, answered in zip(turns, prefixes[::2], prefixes[1::2], strict=True):
        said = answered[: _end_of_turn(answered, len(asked), control, tokenizer)]
        if any(whole[: len(prefix)] != prefix for prefix in (asked, said)):
            raise Unusable(
                f"message {turn + 1}: its tokens run into those beside it, so that nobody can tell which are learned",
                "use a chat template that sets a control token before and after an answer",
            )
        if len(asked) >= len(said):
            raise Unusable(
                f"message {turn + 1}: the chat template leaves out what the assistant said",
                "look at the chat template: model.chat_template in server.yaml",
            )
        learned[len(asked) : len(said)] = [True] * (len(said) - len(asked))
    end = len(whole) - learned[::-1].index(True)
    opened = whole[0] == tokenizer.bos_token_id and not learned[0]
    return Learnt(whole[:end], learned[:end], opened)


def encode_completion(prompt: str, completion: str, tokenizer: Any) -> Learnt:
    """A prompt, and what is to follow it: learned with the tokenizer's end of a sequence.

    Both are tokenised together, as a text is. Where the prompt's tokens are not how that begins, a space or line end at
    the end of the prompt is taken as the first of the completion ("Answer: " and "yes" are the tokens of "Answer:" and
    " yes"); where that does not help, as in a script without spaces, each is tokenised for itself.

    Raises:
        Unusable: nothing to learn, characters that no tokenizer takes, or tokens that depend on both sides of the seam.
        ModelError: the tokenizer has no end of a sequence.
    """
    for name, text in (("prompt", prompt), ("completion", completion)):
        _check_characters(text, f"the {name}")
    if is_blank(completion):
        raise Unusable("the completion is blank", "write what the model is to answer, or remove the row")
    whole = _ids(prompt + completion, tokenizer)
    for before in (prompt, prompt.rstrip()):
        seam = len(context := _ids(before, tokenizer))
        if seam < len(whole) and whole[:seam] == context:
            break
    else:
        context = _ids(prompt, tokenizer)
        apart = context + _ids(completion, tokenizer)
        if _text(apart, tokenizer) != _text(whole, tokenizer):
            raise Unusable(
                "the tokenizer cannot tell the prompt's end from the completion's beginning",
                "end the prompt with a space or a line end",
            )
        whole, seam = apart, len(context)
    return _row(whole, seam, tokenizer)


def encode_text(text: str, tokenizer: Any) -> Learnt:
    """A text, all of which is learned, with the tokenizer's end of a sequence.

    Raises:
        Unusable: blank, or characters that no tokenizer takes.
        ModelError: the tokenizer has no end of a sequence.
    """
    _check_characters(text, "the text")
    if is_blank(text):
        raise Unusable("the text is blank", "write a text, or remove the row")
    return _row(_ids(text, tokenizer), 0, tokenizer)


def _row(body: list[int], seam: int, tokenizer: Any) -> Learnt:
    """The row of a body whose tokens from `seam` on are learned: with its beginning and its end, if not there yet."""
    if seam == len(body):
        raise Unusable("the tokenizer finds no token in what is to be learned", "remove the row")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no token that ends a sequence", "set eos_token in the model's tokenizer_config.json"
        )
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if first is not None and body[0] != first and tokenizer("")["input_ids"][:1] == [first]:
        body, seam = [first, *body], seam + 1
    if body[-1] != last:
        body = [*body, last]
    return Learnt(body, [at >= seam for at in range(len(body))], opened=body[0] == first and seam > 0)


def shorten(learnt: Learnt, max_tokens: int) -> Shortened:
    """The row within `max_tokens` tokens: of the context the end stays, of what is learned the beginning.

    All before the last run of learned tokens is context here, earlier turns of the assistant too: what is cut of them
    is not learned. That run, the completion, loses none of its tokens as long as it fits with one token before it,
    which predicts its first; else its end is cut.

    Raises:
        ConfigError: so few that nothing could be learned.
    """
    if max_tokens < 2:
        raise ConfigError(
            f"max_tokens is {max_tokens}, and a language model learns a token from those before it",
            "set max_tokens to the length of a usual row, at least 2",
        )
    if len(learnt.tokens) <= max_tokens:
        return Shortened(learnt, prompt_cut=False, completion_cut=False)
    answer = learnt.answer
    end = min(len(learnt.tokens), answer + max_tokens - min(answer, 1))
    start = max(0, end - max_tokens)
    tokens, learned = learnt.tokens[start:end], learnt.learned[start:end]
    if learnt.opened:
        tokens[0], learned[0] = learnt.tokens[0], False
    return Shortened(
        Learnt(tokens, learned, learnt.opened), prompt_cut=start > 0, completion_cut=end < len(learnt.tokens)
    )


# --- chat templates ---------------------------------------------------------------------------------------------------


def with_template(tokenizer: Any, path: Path) -> Any:
    """Gives a tokenizer the chat template in a file, which from then on is saved with it. In place; returns it.

    Raises:
        DataError: the file cannot be read.
        ModelError: it is no template, or one that cannot say what the assistant is to learn.
    """
    before, tokenizer.chat_template = tokenizer.chat_template, read_text(path)
    try:
        row = encode_messages(ONE_EXCHANGE, tokenizer)
        sides = row.tokens[: row.answer], row.tokens[row.answer :]
        for message, side in zip(ONE_EXCHANGE, sides, strict=True):
            if message["content"] not in _text(side, tokenizer):
                raise Unusable(f"it leaves out what the {message['role']} says", "")
    except Unusable as error:
        tokenizer.chat_template = before
        raise ModelError(
            f"{path}: not a chat template that renders a question and its answer ({error.message})",
            "check model.chat_template in server.yaml: a Jinja template as tokenizers have them",
        ) from None
    return tokenizer


def check_messages(messages: Any) -> None:
    """Raises Unusable if they are not a conversation in which the assistant answers, whatever the tokenizer."""
    if not isinstance(messages, list | tuple) or not messages:
        raise Unusable("messages are not a list", 'write [{"role": "user", "content": ...}, ...]')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise Unusable(f"message {number} lacks role or content", 'write {"role": ..., "content": ...} for each')
        role, content = message["role"], message["content"]
        for name, value in (("role", role), ("content", content)):
            if not isinstance(value, str):
                raise Unusable(f"message {number}: its {name} is not a string", "write it between quotes")
        _check_characters(content, f"message {number}")
        if role == ASSISTANT and is_blank(content):
            raise Unusable(f"message {number}: the assistant says nothing", "remove the message")
    roles = list(dict.fromkeys(message["role"] for message in messages))
    if ASSISTANT not in roles:
        raise Unusable(
            f"no message of the assistant among the roles {listed(roles)}",
            'give who is to be learned the role "assistant"',
        )
    if messages[0]["role"] == ASSISTANT:
        raise Unusable(
            "message 1: the assistant speaks before it is asked", "begin with a message of the user or the system"
        )


def _assistant_turns(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Which messages are the assistant's; Unusable if something is wrong with any."""
    check_messages(messages)
    marks = [text for text in _control(tokenizer).values() if text != tokenizer.unk_token]
    for number, message in enumerate(messages, 1):
        if (mark := next((mark for mark in marks if mark in message["content"]), None)) is not None:
            raise Unusable(
                f"message {number} holds {shown(mark)}, which the tokenizer takes for a mark of its own",
                "give contents without the marks of a chat template: it sets them itself",
            )
    return [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]


def _render(messages: Sequence[Message], tokenizer: Any, *, ask: bool = False) -> str:
    """ask: with what the template puts before an answer."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # of whatever kind: the template is somebody else's program
        raise Unusable(
            f"the chat template refuses the conversation up to message {len(messages)} ({one_line(error)})",
            "write the conversation as the template wants it",
        ) from None
    return text


def _written_otherwise(messages: Sequence[Message], turn: int, whole: str, tokenizer: Any) -> Unusable:
    """Why the conversation does not begin with what the template makes of its messages up to an answer."""
    if whole.startswith(_render(messages[:turn], tokenizer)) and not whole.startswith(
        _render(messages[:turn], tokenizer, ask=True)
    ):
        return Unusable(
            f"message {turn + 1}: the chat template asks for an answer otherwise than it writes one",
            "use a template whose generation prompt is how the assistant's turns begin",
        )
    return Unusable(
        f"message {turn + 1}: the chat template writes the turns up to it otherwise where others follow, as one that "
        "drops earlier thinking does",
        TURN_BY_TURN,
    )


def _end_of_turn(tokens: list[int], begin: int, control: Mapping[int, str], tokenizer: Any) -> int:
    """Where the turn that begins at `begin`, the last of these tokens, has been said: behind its last control token.

    Without one, or with more than white space behind it, that is its end.
    """
    last = next((at for at in range(len(tokens) - 1, begin - 1, -1) if tokens[at] in control), None)
    return len(tokens) if last is None or _text(tokens[last + 1 :], tokenizer).strip() else last + 1


# --- tokens -----------------------------------------------------------------------------------------------------------


def _control(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's special tokens."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _ids(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _text(tokens: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _check_characters(text: str, where: str) -> None:
    if what := unusable(text):
        raise Unusable(f"{where} holds {what}", "remove it")
