import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.rendering import (
    TINY_CHAT_TEMPLATE,
    TINY_ROLE_TOKENS,
    TINY_SPECIAL_TOKENS,
    DoesNotFitError,
    Rendered,
    Renderer,
    fit,
)

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_templates"
CORPUS = [
    "Your task is to boil water. First, focus on the substance. You are in the kitchen.",
    "Thought: I should look around.",
    "Action: open door to kitchen",
    "You see a metal pot, a stove and a thermometer, currently reading 10 degrees celsius.",
    "[INST] search [/INST] <<SYS>> system user assistant",
] * 3
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
TINY = [*TINY_SPECIAL_TOKENS.values(), *TINY_ROLE_TOKENS]
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special: list[str], words: str | None = LLAMA_3_WORDS) -> Tokenizer:
    """A tokenizer as Llama-3's and Qwen's (`words` given), or as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(special: list[str], legacy: bool) -> Tokenizer:
    """A tokenizer as Llama-2's, with or without its `legacy` habit of putting a space after each special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *special, *byte_tokens], show_progress=False),
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def published(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    fast = functools.partial(PreTrainedTokenizerFast, clean_up_tokenization_spaces=False)
    llama_2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    match name:
        case "tiny" | "tiny-gpt2":
            backend = byte_level(TINY, None if name == "tiny-gpt2" else LLAMA_3_WORDS)
            return fast(tokenizer_object=backend, chat_template=TINY_CHAT_TEMPLATE, **TINY_SPECIAL_TOKENS)
        case "tiny-metaspace" | "tiny-metaspace-legacy":
            backend = sentencepiece(TINY, legacy=name.endswith("legacy"))
            return fast(
                tokenizer_object=backend, chat_template=TINY_CHAT_TEMPLATE, unk_token="<unk>", **TINY_SPECIAL_TOKENS
            )
        case "llama-2-chat" | "llama-2-chat-legacy" | "mistral-7b-instruct-v0.2":
            backend = sentencepiece(["<s>", "</s>"], legacy=name != "llama-2-chat")
            return fast(tokenizer_object=backend, chat_template=published(name.removesuffix("-legacy")), **llama_2)
        case "llama-3-instruct":
            return fast(
                tokenizer_object=byte_level(LLAMA_3),
                chat_template=published(name),
                bos_token="<|begin_of_text|>",
                eos_token="<|end_of_text|>",
            )
        case _:
            return fast(tokenizer_object=byte_level(CHATML), chat_template=published(name), eos_token="<|im_end|>")


@functools.cache
def renderer_of(name: str) -> Renderer:
    return Renderer(tokenizer_of(name))


TINY_KINDS = ["tiny", "tiny-gpt2", "tiny-metaspace", "tiny-metaspace-legacy"]
PUBLISHED = [
    "llama-2-chat",
    "llama-2-chat-legacy",
    "mistral-7b-instruct-v0.2",
    "llama-3-instruct",
    "qwen2.5-instruct",
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PROMPT = [user("Your task is to boil water."), assistant("OK"), user("You are in the kitchen.")]
COMPLETION = [
    assistant("Thought: I should look.\nAction: look around"),
    user("You see a stove."),
    assistant("Action: open door"),
    user(""),
    assistant("Action: focus on the pot"),
]

# Whatever a simulator or a policy may write, with things among it that look special to one of the tokenizers.
contents = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            [*TINY, *CHATML, *LLAMA_3, "<s>", "</s>", "<unk>", "[INST]", "\ufdd0", "<|en", "d|>", " ", "\n"]
        ),
    ),
    max_size=5,
).map("".join)
plain_contents = st.text(st.sampled_from("abcdefghij  \nÄé→:."), max_size=20)


def conversations(texts=contents):
    """(prompt, completion) with 1 to 4 turns."""

    def split(drawn):
        first, turns = drawn
        completion = [message for said, seen in turns for message in (assistant(said), user(seen))]
        return [user(first[0]), assistant(first[1]), user(first[2])], completion[:-1]

    pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
    return st.tuples(st.tuples(texts, texts, texts), pairs).map(split)


def turn_ids(rendered: Rendered) -> list[list[int]]:
    pairs = list(zip(rendered.ids, rendered.turn_index, strict=True))
    return [[token for token, of in pairs if of == turn] for turn in range(rendered.turns)]


def replies(completion):
    return [message["content"] for message in completion[::2]]


def test_worked_example():
    letters = [*TINY, *"hioktgupxend"]
    vocabulary = {letter: index for index, letter in enumerate(dict.fromkeys(letters))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in TINY])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TINY_CHAT_TEMPLATE, **TINY_SPECIAL_TOKENS
    )
    completion = [assistant("go"), user("up"), assistant("x"), user("end")]
    rendered = Renderer(tokenizer).render([user("hi"), assistant("ok"), user("t")], completion)
    short = {"<|bos|>": "B", "<|user|>": "U", "<|assistant|>": "A", "<|end|>": "E"}
    tokens = [short.get(token, token) for token in tokenizer.convert_ids_to_tokens(rendered.ids)]
    assert "".join(tokens) == "BUhiEAokEUtEAgoEUupEAxE"
    assert rendered.turn_index == [-1] * 13 + [0] * 3 + [-1] * 5 + [1] * 2
    assert (rendered.turns, rendered.trained_tokens, rendered.dropped_turns) == (2, 5, 0)


EXPECTED_TURNS = {
    "llama-2-chat": [" go </s>", " x </s>"],
    "llama-2-chat-legacy": [" go </s>", " x </s>"],
    "mistral-7b-instruct-v0.2": [" go</s>", "x \n</s>"],
    "llama-3-instruct": ["go<|eot_id|>", "x<|eot_id|>"],
    "qwen2.5-instruct": [" go<|im_end|>", "x \n<|im_end|>"],
    "tiny": [" go<|end|>", "x \n<|end|>"],
}


@pytest.mark.parametrize("name", EXPECTED_TURNS)
def test_trained_tokens_are_the_turns_as_the_template_shows_them(name):
    renderer = renderer_of(name)
    rendered = renderer.render(PROMPT, [assistant(" go"), user("seen"), assistant("x \n")])
    tokenizer = tokenizer_of(name)
    assert [tokenizer.decode(ids) for ids in turn_ids(rendered)] == EXPECTED_TURNS[name]
    if name not in ("llama-2-chat-legacy", "mistral-7b-instruct-v0.2"):  # legacy: a space after each special token
        messages = [*PROMPT, assistant(" go"), user("seen"), assistant("x \n")]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(rendered.ids) == whole.rstrip()


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt2"])
@settings(max_examples=50)
@given(conversation=conversations())
def test_trained_tokens_are_exactly_the_policys_turns(name, conversation):
    prompt, completion = conversation
    rendered = renderer_of(name).render(prompt, completion)
    tokenizer = tokenizer_of(name)
    decoded = [tokenizer.decode(ids) for ids in turn_ids(rendered)]
    assert decoded == [reply + "<|end|>" for reply in replies(completion)]
    assert tokenizer.decode(rendered.ids) == tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


@pytest.mark.parametrize("name", ["tiny-metaspace", "tiny-metaspace-legacy", *PUBLISHED])
@settings(max_examples=40)
@given(conversation=conversations())
def test_trained_tokens_are_the_policys_turns_but_for_blanks_in_every_template(name, conversation):
    """Templates strip replies, and a tokenizer whose blank is U+2581 cannot tell one from the other."""
    prompt, completion = conversation
    renderer = renderer_of(name)
    decoded = [tokenizer_of(name).decode(ids) for ids in turn_ids(renderer.render(prompt, completion))]
    assert all(text.endswith(renderer.end_token) for text in decoded)
    words = [text.removesuffix(renderer.end_token).split() for text in decoded]
    assert words == [reply.replace("\u2581", " ").split() for reply in replies(completion)]


@pytest.mark.parametrize("name", TINY_KINDS)
@settings(max_examples=40)
@given(conversation=conversations())
def test_special_tokens_come_from_the_template_alone(name, conversation):
    prompt, completion = conversation
    rendered = renderer_of(name).render(prompt, completion)
    special = [token for token in tokenizer_of(name).convert_ids_to_tokens(rendered.ids) if token in TINY]
    messages = len(prompt) + len(completion)
    roles = ["<|user|>", "<|assistant|>"]
    assert special == ["<|bos|>", *(token for number in range(messages) for token in (roles[number % 2], "<|end|>"))]
    end = renderer_of(name).end_token_id
    assert all(ids.index(end) == len(ids) - 1 for ids in turn_ids(rendered))


@pytest.mark.parametrize("name", [*TINY_KINDS, *PUBLISHED])
@settings(max_examples=20)
@given(conversation=conversations())
def test_a_prefix_of_the_messages_is_a_prefix_of_the_ids(name, conversation):
    prompt, completion = conversation
    renderer = renderer_of(name)
    whole = renderer.render(prompt, completion)
    for count in range(1, len(completion) + 1, 2):
        part = renderer.render(prompt, completion[:count])
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.turn_index[: len(part.ids)] == part.turn_index
        assert renderer.render(prompt, completion[: count + 1]) == part  # the last observation is left out
        asked = renderer.prompt_ids([*prompt, *completion[: count - 1]])
        assert whole.ids[: len(asked)] == asked


@pytest.mark.parametrize("name", [*TINY_KINDS, *PUBLISHED])
@settings(max_examples=10)
@given(conversation=conversations())
def test_where_the_prompt_ends_changes_the_turn_numbers_only(name, conversation):
    prompt, completion = conversation
    whole = renderer_of(name).render(prompt[:1], [*prompt[1:], *completion])
    shifted = renderer_of(name).render(prompt, completion)
    assert shifted.ids == whole.ids
    assert shifted.turn_index == [max(turn - 1, -1) for turn in whole.turn_index]


@pytest.mark.parametrize("name", TINY_KINDS)
@settings(max_examples=50)
@given(conversation=conversations(plain_contents))
def test_piecewise_ids_are_those_of_the_whole_text(name, conversation):
    prompt, completion = conversation
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert renderer_of(name).render(prompt, completion).ids == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_piecewise_ids_are_those_of_the_whole_text_on_published_templates(name):
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template([*PROMPT, *COMPLETION], tokenize=False)
    expected = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    assert renderer_of(name).render(PROMPT, COMPLETION).ids == expected


def test_stripping_special_tokens_strip_as_in_the_whole_text():
    backend = byte_level(TINY)
    backend.add_special_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TINY_CHAT_TEMPLATE, **TINY_SPECIAL_TOKENS
    )
    completion = [assistant("\n  go  "), user(" up \n"), assistant("   "), user(""), assistant("x")]
    text = tokenizer.apply_chat_template([*PROMPT, *completion], tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Renderer(tokenizer).render(PROMPT, completion).ids == expected


@pytest.mark.parametrize("name", [*TINY_KINDS, *PUBLISHED])
@settings(max_examples=20)
@given(conversation=conversations(), data=st.data())
def test_a_rollouts_ids_are_the_rendered_trajectorys(name, conversation, data):
    """The policy draws ids that its own text would not give, and now and then is cut at length."""
    prompt, completion = conversation
    renderer = renderer_of(name)
    ordinary = st.sampled_from(sorted(set(range(40, 60))))
    messages, played = list(prompt), []
    ids = renderer.prompt_ids(messages)
    for number, reply in enumerate(completion[::2]):
        drawn = data.draw(st.lists(ordinary, min_size=1, max_size=5))
        cut = data.draw(st.booleans())
        played.append(drawn if cut else [*drawn, renderer.end_token_id])
        ids += played[-1]
        messages.append(reply)
        if observation := completion[2 * number + 1 : 2 * number + 2]:
            messages += observation
            ids += renderer.observation_ids(messages, played[-1])
    rendered = renderer.render(prompt, completion, played)
    assert rendered.ids == ids
    assert turn_ids(rendered) == played


def test_a_reply_cut_at_length_is_closed_as_context():
    renderer = renderer_of("qwen2.5-instruct")
    cut, whole = [70, 71], [72, renderer.end_token_id]
    rendered = renderer.render(PROMPT, COMPLETION[:3], [cut, whole])
    assert turn_ids(rendered) == [cut, whole]
    after_cut = rendered.turn_index.index(0) + len(cut)
    assert rendered.ids[after_cut] == renderer.end_token_id
    assert rendered.turn_index[after_cut] == -1
    # Nothing follows a last turn that was cut.
    assert renderer.render(PROMPT, COMPLETION[:3], [whole, cut]).ids[-2:] == cut


def test_turns_without_ids_are_tokenised():
    renderer = renderer_of("tiny")
    whole = renderer.render(PROMPT, COMPLETION)
    assert renderer.render(PROMPT, COMPLETION, []) == whole
    mixed = renderer.render(PROMPT, COMPLETION, [[], [70, renderer.end_token_id], []])
    assert turn_ids(mixed) == [turn_ids(whole)[0], [70, renderer.end_token_id], turn_ids(whole)[2]]


def test_tokens_are_those_of_the_published_llama_2():
    """No space is made up after [/INST], BOS opens each user message, and the tokenizer's own BOS is not added."""
    rendered = renderer_of("llama-2-chat").render([user("search")], [assistant("door"), user("pot"), assistant("a")])
    tokens = "".join(tokenizer_of("llama-2-chat").convert_ids_to_tokens(rendered.ids))
    assert tokens == "<s>[INST]▁search▁[/INST]▁door▁</s><s>[INST]▁pot▁[/INST]▁a▁</s>"
    legacy = renderer_of("llama-2-chat-legacy").render([user("search")], [assistant("door")])
    tokens = "".join(tokenizer_of("llama-2-chat-legacy").convert_ids_to_tokens(legacy.ids))
    assert tokens == "<s>▁[INST]▁search▁[/INST]▁door▁</s>"


@pytest.mark.parametrize(
    ("name", "token", "stops"),
    [
        ("tiny", "<|end|>", 1),
        ("llama-2-chat", "</s>", 1),
        ("mistral-7b-instruct-v0.2", "</s>", 1),
        ("llama-3-instruct", "<|eot_id|>", 2),  # its EOS is another token
        ("qwen2.5-instruct", "<|im_end|>", 1),
    ],
)
def test_the_end_token_is_found_in_the_template(name, token, stops):
    renderer = renderer_of(name)
    assert renderer.end_token == token
    assert renderer.end_token_ids[0] == renderer.end_token_id == tokenizer_of(name).convert_tokens_to_ids(token)
    assert len(renderer.end_token_ids) == stops


@pytest.mark.parametrize("name", ["llama-2-chat", "llama-3-instruct", "qwen2.5-instruct", "tiny"])
def test_system_messages_are_context(name):
    renderer = renderer_of(name)
    rendered = renderer.render([{"role": "system", "content": "look"}, user("pot")], COMPLETION)
    assert "look" in tokenizer_of(name).decode(rendered.ids[: rendered.turn_index.index(0)])
    assert rendered.turns == 3


def test_fit_drops_whole_turns_and_counts_them():
    rendered = renderer_of("qwen2.5-instruct").render(PROMPT, COMPLETION)
    ends = [max(place for place, of in enumerate(rendered.turn_index) if of == turn) + 1 for turn in range(3)]
    assert fit(rendered, ends[2]) == rendered
    for length in range(ends[0], ends[2]):
        kept = fit(rendered, length)
        assert len(kept.ids) == len(kept.turn_index) == (ends[1] if length >= ends[1] else ends[0])
        assert kept.turns + kept.dropped_turns == 3
        assert kept.ids == rendered.ids[: len(kept.ids)]
    assert fit(fit(rendered, ends[1]), ends[0]).dropped_turns == 2
    with pytest.raises(DoesNotFitError, match=f"take {ends[0]} tokens, more than max_length={ends[0] - 1}"):
        fit(rendered, ends[0] - 1)


def refused(template: str, message: str, prompt=PROMPT, completion=COMPLETION):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level([*CHATML]), chat_template=template, eos_token="<|im_end|>"
    )
    with pytest.raises(ValueError, match=message):
        Renderer(tokenizer).render(prompt, completion)


CHATML_TURN = "<|im_start|>{{ message['role'] }}\n{{ %s }}<|im_end|>\n"


@pytest.mark.parametrize(
    ("shown", "asks"),
    [
        ("message['content']", ""),  # no generation prompt: the header would be the policy's
        ("message['content'] if message['role'] == 'user' else 'fine'", "<|im_start|>assistant\n"),
        ("message['content'][:10]", "<|im_start|>assistant\n"),
        ("message['content'].split('look')[0]", "<|im_start|>assistant\n"),
    ],
)
def test_templates_that_show_a_reply_otherwise_are_refused(shown, asks):
    template = "{% for message in messages %}" + CHATML_TURN % shown + "{% endfor %}"
    template += "{% if add_generation_prompt %}" + asks + "{% endif %}" if asks else ""
    refused(template, r"shows the reply .* a policy would be trained on what it never said|no special token of")


def test_templates_that_rewrite_history_are_refused():
    refused(
        published("qwen3"), r"rewrites history: message 2 \(user\) changes what it shows of message 1 \(assistant\)"
    )
    counting = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    refused("{{ messages | length }}" + counting, r"changes what it shows of message 0 \(user\)")
    thinking = counting + "{% if add_generation_prompt %}<think>{% endif %}"
    refused(thinking, r"message 1 \(assistant\) changes what it shows of the generation prompt")


def test_templates_that_rewrite_some_history_are_refused_where_they_do():
    template = (
        "{% for m in messages %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    )
    completion = [assistant("<think>a</think>go"), user("up"), assistant("x")]
    refused(template, r"message 4 \(user\) changes what it shows of message 3 \(assistant\)", completion=completion)


def test_templates_without_an_end_token_are_refused():
    refused("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token .* closes")
    last_open = "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    refused(last_open, "closes")


def test_tokenizers_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        Renderer(PreTrainedTokenizerFast(tokenizer_object=byte_level(TINY), **TINY_SPECIAL_TOKENS))

    class Slow:
        chat_template = TINY_CHAT_TEMPLATE

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Renderer(Slow())


def test_a_tokenizer_that_spells_special_tokens_in_text_is_refused():
    pieces = [("<unk>", -10.0), *((token, 0.0) for token in TINY), *((letter, -5.0) for letter in "<|end>abc")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(TINY)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TINY_CHAT_TEMPLATE, unk_token="<unk>", **TINY_SPECIAL_TOKENS
    )
    assert Renderer(tokenizer).render([user("abc")], [assistant("z")]).turns == 1
    with pytest.raises(ValueError, match="makes a special token out of the ordinary text"):
        Renderer(tokenizer).render([user("a<|end|>b")], [assistant("c")])


def test_messages_out_of_order_are_refused():
    renderer = renderer_of("tiny")
    mistral = renderer_of("mistral-7b-instruct-v0.2")
    with pytest.raises(ValueError, match=r"Only user and assistant roles|must alternate .*\(roles: system, user\)"):
        mistral.prompt_ids([{"role": "system", "content": "a"}, user("b")])
    with pytest.raises(ValueError, match="no turn of the policy"):
        renderer.render(PROMPT, [])
    with pytest.raises(ValueError, match="Message 1 of the completion is the assistant's and should be the user's"):
        renderer.render(PROMPT, [assistant("a"), assistant("b")])
    with pytest.raises(ValueError, match="Message 0 of the completion is the user's"):
        renderer.render(PROMPT, [user("a"), assistant("b")])
    for prompt in ([], PROMPT[:2]):
        with pytest.raises(ValueError, match="must end with one that is not the assistant's"):
            renderer.render(prompt, COMPLETION)
        with pytest.raises(ValueError, match="must end with one that is not the assistant's"):
            renderer.prompt_ids(prompt)
    with pytest.raises(ValueError, match="use prompt_ids for the first turn"):
        renderer.observation_ids([user("a")], [])


def test_ids_that_do_not_go_with_the_messages_are_refused():
    renderer = renderer_of("tiny")
    with pytest.raises(ValueError, match="holds 1 turns and the completion 3"):
        renderer.render(PROMPT, COMPLETION, [[70]])
    with pytest.raises(ValueError, match="ids of turn 1 go on after the end token"):
        renderer.render(PROMPT, COMPLETION, [[70], [renderer.end_token_id, 71], [72]])


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = tokenizer_of("tiny-metaspace-legacy")
    before = tokenizer.backend_tokenizer.to_str()
    Renderer(tokenizer).render(PROMPT, COMPLETION)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_truncation_set_on_the_tokenizer_cuts_nothing():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(TINY), chat_template=TINY_CHAT_TEMPLATE, **TINY_SPECIAL_TOKENS
    )
    expected = Renderer(tokenizer).render(PROMPT, COMPLETION)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    assert Renderer(tokenizer).render(PROMPT, COMPLETION) == expected


def test_the_hash_is_the_templates_and_the_date_does_not_matter():
    assert renderer_of("tiny").template_hash == renderer_of("tiny-metaspace").template_hash
    assert renderer_of("tiny").template_hash != renderer_of("qwen2.5-instruct").template_hash
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(TINY),
        chat_template="{{ strftime_now('%d %b %Y') }}" + TINY_CHAT_TEMPLATE,
        **TINY_SPECIAL_TOKENS,
    )
    assert tokenizer.decode(Renderer(tokenizer).prompt_ids(PROMPT)).startswith("26 Jul 2024<|bos|>")


def test_coloured_shows_every_token_and_the_weights():
    renderer = renderer_of("tiny")
    rendered = renderer.render([user("pot ☃ 🫠")], [assistant("go 🫠"), user("é"), assistant("x")])
    text = renderer.coloured(rendered)
    assert text.plain.replace("[turn 0]", "").replace("[turn 1]", "") == tokenizer_of("tiny").decode(rendered.ids)
    assert "[turn 0 x 1]go" in renderer.coloured(rendered, [1.0, 0.25]).plain
    assert "[turn 1 x 0.25]x" in renderer.coloured(rendered, [1.0, 0.25]).plain
