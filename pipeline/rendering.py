r"""Messages become token ids here and nowhere else: for SFT, pairs, reference pass, DMPO, rollouts and `inspect`.

`Renderer.render` gives the ids of a trajectory and, beside them, `turn_index`: -1 on context, else the number of the
policy's turn, 0 being the first action. Worked example, with `TINY_CHAT_TEMPLATE` and a tokenizer that has a token a
letter (`B` = `<|bos|>`, `U` = `<|user|>`, `A` = `<|assistant|>`, `E` = `<|end|>`):

    prompt      user "hi", assistant "ok", user "t"        the "ok" is nobody's action: it is context
    completion  assistant "go", user "up", assistant "x", user "end"

    messages    user        assistant   user     assistant  user       assistant
    ids         B U h i E | A | o k E | U t E A | g o E    | U u p E A | x E
    turn_index  - - - - -   -   - - -   - - - -   0 0 0      - - - - -   1 1          (- stands for -1)

A policy's turn is what follows the generation prompt, up to and with the end token; what the template writes after the
end token (`\n` in Qwen's) begins the next context. The observation after the last turn ("end") is left out: no turn of
the policy follows it.

How ids come about, and what follows from it:

- The text of each piece is the difference between the template's text of two prefixes of the messages. Every piece is
  tokenised alone, so no token spans a boundary, a prefix of the messages is a prefix of the ids, and a rollout only
  ever appends. A template that writes earlier messages differently once later ones follow is refused.
- Where an engine played, its ids are taken as they are (`turn_token_ids`): its text tokenised again need not be what
  the policy produced. A reply that was cut at length has no end token; before the next observation the end token is put
  in as *context*, so the conversation is well-formed and nobody is trained on a token that the policy never chose.
- Special tokens come from the template alone. Text in a message that looks like one (`<|end|>` in an observation) is
  tokenised as ordinary text; it ends no turn.
- What a template does to contents (Llama's strip them) happens here too: a turn's text is what the template shows.
- BOS is the template's business; none is added. A template that prints today's date prints 26 July 2024, always.
"""

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from rich.text import Text
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.records import Message

TINY_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Chat template of the tiny model: two special tokens a message, contents untouched."""

TINY_SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
"""What the tiny model's tokenizer is built with, beside `TINY_ROLE_TOKENS`."""
TINY_ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]

_ESCAPE = "\ufdd0"
"""Marks, in a message's content, the start of what looks like a special token. A Unicode noncharacter."""

_FIXED_DATE = datetime.datetime(2024, 7, 26)
"""What Llama-3.1's template falls back to; ids must not depend on the day."""

_TURN_STYLES = ("black on bright_green", "black on bright_cyan", "black on bright_yellow", "black on bright_magenta")


class DoesNotFitError(ValueError):
    """Not even the first turn of a trajectory fits into the length that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A trajectory as token ids."""

    ids: list[int]
    turn_index: list[int]
    """For each id: -1 on context, else the number of the policy's turn, from 0."""
    dropped_turns: int = 0
    """How many turns `fit` dropped from the end."""

    @property
    def turns(self) -> int:
        """Number of the policy's turns."""
        return max(self.turn_index) + 1

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that are the policy's."""
        return sum(turn >= 0 for turn in self.turn_index)


def fit(rendered: Rendered, max_length: int) -> Rendered:
    """Drop whole turns from the end until at most `max_length` tokens are left; `dropped_turns` counts them.

    The context after the last turn that is kept goes with the dropped ones.

    Raises:
        DoesNotFitError: the first turn does not fit.
    """
    if len(rendered.ids) <= max_length:
        return rendered
    kept = [position for position in _turn_ends(rendered.turn_index) if position < max_length]
    if not kept:
        first_end = _turn_ends(rendered.turn_index)[0] + 1
        raise DoesNotFitError(
            f"The prompt and the first turn take {first_end} tokens, more than max_length={max_length}: "
            "raise max_length, shorten the prompt, or leave this trajectory out."
        )
    length = kept[-1] + 1
    return Rendered(
        ids=rendered.ids[:length],
        turn_index=rendered.turn_index[:length],
        dropped_turns=rendered.dropped_turns + rendered.turns - len(kept),
    )


def _turn_ends(turn_index: Sequence[int]) -> list[int]:
    """The position of each turn's last token."""
    last = {turn: position for position, turn in enumerate(turn_index) if turn >= 0}
    return [last[turn] for turn in sorted(last)]


class Renderer:
    """Renders conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template. It is not changed.

    Raises:
        ValueError: the tokenizer is not a fast one or has no chat template; the template rewrites history, shows a
            reply otherwise than it is, or ends the policy's turn with anything but one special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pieces = _PieceTokenizer(tokenizer)
        self._template = _chat_template(tokenizer)
        self.template_hash = hashlib.sha256(self._template.encode()).hexdigest()
        """SHA-256 of the chat template, for manifests."""
        self.end_token = self._find_end_token()
        """The special token that ends a turn, found in the template."""
        self.end_token_id = self._pieces.control_ids[self.end_token]
        self._cuts(_SAMPLE)  # refuses a template that always rewrites history

    @property
    def end_token_ids(self) -> list[int]:
        """What an engine stops at: the template's end token, then the tokenizer's EOS where that is another one."""
        eos = self.tokenizer.eos_token_id
        return [self.end_token_id] if eos in (None, self.end_token_id) else [self.end_token_id, eos]

    def render(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        turn_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> Rendered:
        """Render a trajectory.

        Args:
            prompt: the messages before the policy's first turn; assistant messages among them are context.
            completion: the policy's turns and the observations between them: assistant, user, assistant, ...
            turn_token_ids: for each turn the ids the engine returned, end token included unless the reply was cut at
                length. An empty entry, or an empty list as a whole, means that no engine played: the turn's text is
                tokenised.

        Raises:
            ValueError: the messages are out of order, none of them is the policy's, the template refuses them or
                rewrites history, or `turn_token_ids` does not go with them.
        """
        _check_order(prompt, completion)
        messages = [*prompt, *completion[: len(completion) - (len(completion) + 1) % 2]]
        cuts = self._cuts(self._pieces.escape(messages))
        turns = (len(completion) + 1) // 2
        engine_ids = self._check_turn_ids(turn_token_ids, turns)
        first_turn = len(cuts) - turns
        texts: list[str] = []
        for number, (context, reply) in enumerate(cuts):
            played = number >= first_turn and engine_ids[number - first_turn]
            texts += [context, self.end_token if played else reply]
        encoded = self._pieces.encode(texts, after=None)
        ids: list[int] = []
        turn_index: list[int] = []
        for number, (context_ids, reply_ids) in enumerate(zip(encoded[::2], encoded[1::2], strict=True), -first_turn):
            if number >= 0:
                reply_ids = engine_ids[number] or reply_ids
            if number > 0 and ids[-1] != self.end_token_id:
                context_ids = [self.end_token_id, *context_ids]
            ids += [*context_ids, *reply_ids]
            turn_index += [-1] * len(context_ids) + [max(number, -1)] * len(reply_ids)
        return Rendered(ids=ids, turn_index=turn_index)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that ask for the policy's next turn: the messages, then the generation prompt.

        Raises:
            ValueError: the last message is an assistant's, or the template refuses the messages.
        """
        _check_asks(messages)
        cuts = self._cuts(self._pieces.escape(messages))
        encoded = self._pieces.encode([text for cut in cuts for text in cut], after=None)
        return [token for piece in encoded for token in piece]

    def observation_ids(self, messages: Sequence[Message], reply_ids: Sequence[int]) -> list[int]:
        """What to append after the policy's last reply to ask for its next turn.

        A rollout that starts from `prompt_ids` and appends the engine's ids and these, in turn, holds the ids that
        `render` gives for the finished trajectory with the same `turn_token_ids`.

        Args:
            messages: the whole conversation so far, the policy's last reply and the new observation included.
            reply_ids: the ids of that reply. When they lack the end token (cut at length), it comes first here.

        Raises:
            ValueError: the last message is an assistant's, none is, or the template refuses the messages.
        """
        _check_asks(messages)
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not replies:
            raise ValueError("There is no reply to observe after: use prompt_ids for the first turn.")
        cuts = self._cuts(self._pieces.escape(messages), since=replies[-1])
        ids = self._pieces.encode([cuts[-1][0]], after=self.end_token)[0]
        return ids if reply_ids and reply_ids[-1] == self.end_token_id else [self.end_token_id, *ids]

    def reply_text(self, reply_ids: Sequence[int]) -> str:
        """The text of a reply as a message holds it: without the end token, and without blanks around it."""
        ends = self.end_token_ids
        text: str = self.tokenizer.decode([token for token in reply_ids if token not in ends])
        return text.strip()

    def coloured(self, rendered: Rendered, weights: Sequence[float] | None = None) -> Text:
        """The tokens for a terminal: context plain, each turn on a colour of its own, every other token underlined.

        Args:
            rendered: what `render` gave.
            weights: a weight a turn; shown before the turn.
        """
        text = Text()
        before = -1
        for number, (token, turn) in enumerate(self._readable_tokens(rendered)):
            if turn >= 0 and turn != before:
                weight = f" x {weights[turn]:.3g}" if weights is not None else ""
                text.append(f"[turn {turn}{weight}]", style="bold reverse")
            style = _TURN_STYLES[turn % len(_TURN_STYLES)] if turn >= 0 else "dim"
            text.append(token, style=f"{style} underline" if number % 2 else style)
            before = turn
        return text

    def _readable_tokens(self, rendered: Rendered) -> Iterator[tuple[str, int]]:
        """Text and turn of each token; tokens that are parts of one character come together."""
        pending: list[int] = []
        for position, (token, turn) in enumerate(zip(rendered.ids, rendered.turn_index, strict=True)):
            pending.append(token)
            text = self.tokenizer.decode(pending)
            following = rendered.turn_index[position + 1 : position + 2]
            if not text.endswith("\ufffd") or len(pending) == 4 or following != [turn]:
                yield text, turn
                pending = []

    def _check_turn_ids(self, turn_token_ids: Sequence[Sequence[int]] | None, turns: int) -> list[list[int]]:
        if not turn_token_ids:
            return [[] for _ in range(turns)]
        if len(turn_token_ids) != turns:
            raise ValueError(
                f"turn_token_ids holds {len(turn_token_ids)} turns and the completion {turns}: give one list of ids "
                "for each assistant message, empty where no engine played."
            )
        for number, ids in enumerate(turn_token_ids):
            if self.end_token_id in ids[:-1]:
                raise ValueError(
                    f"The ids of turn {number} go on after the end token {self.end_token!r}: have the engine stop at "
                    "Renderer.end_token_ids and keep the ids up to it."
                )
        return [list(ids) for ids in turn_token_ids]

    def _text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=_FIXED_DATE.strftime,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template refuses these messages: {error} "
                f"(roles: {', '.join(message['role'] for message in messages)}). "
                "Change the messages, or set another tokenizer.chat_template."
            ) from None
        return text

    def _cuts(self, messages: Sequence[Message], since: int = 0) -> list[tuple[str, str]]:
        """Cut the template's text into (context, reply) for each assistant message from number `since` on.

        A context ends with the generation prompt, a reply with the end token. Messages that do not end with a reply
        give a last context with an empty reply.
        """
        cuts: list[tuple[str, str]] = []
        text, done = "", 0
        for number in range(since, len(messages) + 1):
            if number < len(messages) and messages[number]["role"] != "assistant":
                continue
            if number == len(messages) and messages[-1]["role"] == "assistant":
                break
            opened = self._extend(text, messages, number, generation_prompt=True)
            context = opened[done:]
            if number == len(messages):
                cuts.append((context, ""))
                break
            text = self._extend(opened, messages, number + 1, generation_prompt=False)
            done = self._reply_end(text, len(opened), number)
            cuts.append((context, text[len(opened) : done]))
        self._check_shown(messages, since, [reply for _, reply in cuts])
        return cuts

    def _check_shown(self, messages: Sequence[Message], since: int, shown: Sequence[str]) -> None:
        """Refuse a template that shows a reply otherwise than it is; blanks around it don't matter."""
        replies = [message["content"] for message in messages[since:] if message["role"] == "assistant"]
        for reply, text in zip(replies, shown, strict=False):  # the last text may be of a reply to come
            if text.removesuffix(self.end_token).strip() != reply.strip():
                raise ValueError(
                    f"The chat template shows the reply {reply[:80]!r} as {text[:80]!r}: a policy would be trained on "
                    "what it never said. Set tokenizer.chat_template to one that puts the generation prompt before a "
                    "reply and shows the reply as it is."
                )

    def _extend(self, before: str, messages: Sequence[Message], count: int, generation_prompt: bool) -> str:
        """The text of the first `count` messages, which must begin with the text `before`."""
        after = self._text(messages[:count], generation_prompt)
        if after.startswith(before):
            return after
        agree = next((at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), len(after))
        changed = "the generation prompt"
        for index in range(count - 1):
            with contextlib.suppress(ValueError):
                if len(self._text(messages[: index + 1], False)) > agree:
                    changed = f"message {index} ({messages[index]['role']})"
                    break
        raise ValueError(
            f"The chat template rewrites history: message {count - 1} ({messages[count - 1]['role']}) changes what it "
            f"shows of {changed}, from {before[agree : agree + 40]!r} to {after[agree : agree + 40]!r}. A policy's "
            "tokens can then not be kept as it produced them. Set tokenizer.chat_template to one that shows earlier "
            "messages unchanged (for a thinking model: one that neither adds nor removes the thinking)."
        )

    def _reply_end(self, text: str, start: int, number: int) -> int:
        """Where the end token stops that closes the reply which starts at `start`."""
        ends = [match.end() for match in self._pieces.control_matches(text, start) if match[1] == self.end_token]
        if not ends:
            raise ValueError(
                f"The chat template does not close message {number} (assistant) with {self.end_token!r}: set "
                "tokenizer.chat_template to one that closes every reply."
            )
        return ends[-1]

    def _find_end_token(self) -> str:
        opened = self._text(_SAMPLE[:1], True)
        closed = self._extend(opened, _SAMPLE, 2, generation_prompt=False)
        start = closed.rfind(_SAMPLE[1]["content"])
        following = next(self._pieces.control_matches(closed, max(start, len(opened))), None)
        if start < len(opened) or following is None:
            raise ValueError(
                f"The chat template shows a reply as {closed[len(opened) :]!r}, which no special token of the "
                "tokenizer closes: set a tokenizer.chat_template that ends each reply with one special token."
            )
        return str(following[1])


_SAMPLE: list[Message] = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "last"},
]


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template: take an instruction-tuned model's "
            "tokenizer, or set tokenizer.chat_template (TINY_CHAT_TEMPLATE is the tiny model's)."
        )
    template: str = tokenizer.get_chat_template()
    return template


def _check_order(prompt: Sequence[Message], completion: Sequence[Message]) -> None:
    _check_asks(prompt)
    if not completion:
        raise ValueError("The completion is empty: there is no turn of the policy to train on.")
    for number, message in enumerate(completion):
        expected = "user" if number % 2 else "assistant"
        if message["role"] != expected:
            raise ValueError(
                f"Message {number} of the completion is the {message['role']}'s and should be the {expected}'s: "
                "a completion alternates assistant, user, assistant, ..."
            )


def _check_asks(messages: Sequence[Message]) -> None:
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("The messages before a turn of the policy must end with one that is not the assistant's.")


class _PieceTokenizer:
    """Tokenises consecutive pieces of a template's text, each as it would be tokenised in its place.

    Two clones of the backend do it, neither of which knows the special tokens: one as the tokenizer is, for the start
    of a text, one without the space that SentencePiece-style tokenizers put before a text, for what goes on in the
    middle of one. Which of the two a text right after a special token takes differs between tokenizers and is tried.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (backed by the `tokenizers` library): load one "
                "with transformers.AutoTokenizer from a model that ships a tokenizer.json."
            )
        special = set(tokenizer.all_special_tokens)
        controls = {
            added.content: (index, added)
            for index, added in backend.get_added_tokens_decoder().items()
            if added.special or added.content in special
        }
        self.control_ids = {content: index for content, (index, _) in controls.items()}
        """Id of each special token."""
        self._forbidden = set(self.control_ids.values()) - {tokenizer.unk_token_id}
        self._strips_right = {content for content, (_, added) in controls.items() if added.rstrip}
        self._strips_left = {content for content, (_, added) in controls.items() if added.lstrip}
        alternatives = "|".join(re.escape(content) for content in sorted(controls, key=len, reverse=True)) or "(?!)"
        first = "".join({re.escape(content[0]) for content in controls} | {_ESCAPE})
        self._looks_special = re.compile(f"(?=[{first}])(?={_ESCAPE}|{alternatives})")
        self._scan = re.compile(f"(?=[{first}])(?:{_ESCAPE}.|({alternatives}))", re.DOTALL)
        self._first = _clone(backend, prefix=True)
        self._joined = _clone(backend, prefix=False)
        self._after_control = self._joined
        if controls:
            control = next(iter(controls))
            text = backend.encode(f"{control}a", add_special_tokens=False).ids
            if text[1:] == self._first.encode("a", add_special_tokens=False).ids:
                self._after_control = self._first

    def escape(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with everything marked that looks like a special token."""
        return [
            {"role": message["role"], "content": self._looks_special.sub(_ESCAPE, message["content"])}
            for message in messages
        ]

    def control_matches(self, text: str, start: int = 0) -> Iterator[re.Match[str]]:
        """The special tokens that the template wrote; group 1 is the token."""
        return (match for match in self._scan.finditer(text, start) if match[1] is not None)

    def encode(self, pieces: Sequence[str], after: str | None) -> list[list[int]]:
        """The ids of each piece.

        Args:
            pieces: text from the template, with marked contents; each goes on where the one before it stopped.
            after: what stands before the first piece: nothing (None), or a special token.
        """
        encoded: list[list[int]] = []
        for piece in pieces:
            ids: list[int] = []
            position = 0
            for match in self.control_matches(piece):
                text = piece[position : match.start()]
                ids += self._encode_text(text.rstrip() if match[1] in self._strips_left else text, after)
                ids.append(self.control_ids[match[1]])
                after, position = match[1], match.end()
            rest = self._encode_text(piece[position:], after)
            after = "" if rest else after
            encoded.append(ids + rest)
        return encoded

    def _encode_text(self, text: str, after: str | None) -> list[int]:
        """The ids of text without special tokens, standing after nothing, other text ("") or a special token."""
        if after in self._strips_right:
            text = text.lstrip()
        if not text:
            return []
        tokenizer = self._first if after is None else self._after_control if after else self._joined
        text = re.sub(f"{_ESCAPE}(.)", r"\1", text, flags=re.DOTALL)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            raise ValueError(
                f"The tokenizer makes a special token out of the ordinary text {text[:80]!r}: its vocabulary holds "
                "special tokens as pieces of text. Take another tokenizer, or take that text out of the messages."
            )
        return ids


def _clone(backend: Tokenizer, prefix: bool) -> Tokenizer:
    """A copy of the backend that takes special tokens for text, with or without the space put before a text."""
    state = json.loads(backend.to_str())
    if not prefix:
        state["normalizer"] = _without_prefix(state["normalizer"])
        state["pre_tokenizer"] = _without_prefix(state["pre_tokenizer"])
    clone = Tokenizer.from_str(json.dumps(state))
    clone.no_truncation()
    clone.no_padding()
    clone.encode_special_tokens = True
    return clone


def _without_prefix(part: Any) -> Any:
    """A normalizer's or pre-tokenizer's description without what puts a space before a text."""
    if not isinstance(part, dict) or part["type"] == "Prepend":
        return None
    part = dict(part)
    for parts in ("normalizers", "pretokenizers"):
        if parts in part:
            part[parts] = [kept for child in part[parts] if (kept := _without_prefix(child)) is not None]
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return part
