import pytest

from agents.chat import ChatFormat, first_difference
from agents.reference.tokenizer import train_tokenizer

QWEN3 = (  # the shape of Qwen3's template: thoughts of earlier turns are dropped, an empty thought opens the answer
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXTS = [
    "You arrive at cabinet 1. On the cabinet 1, you see a apple 1, and a mug 2.",
    "<think>find apple</think><action>look</action>",
] * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, tags=["<think>", "</think><action>", "</action>"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "go to cabinet 12",
        "Größe 你好 🦊\n\n  two  blanks ",
        "<think></action></think><action>",
        "tab\tand\rreturn",
        *TEXTS[:2],
    ],
)
def test_any_text_survives_the_small_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_things_and_phrases_are_single_tokens(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(TEXTS[0], add_special_tokens=False))
    assert tokens == [
        "You arrive at",
        " cabinet 1",
        ". On the",
        " cabinet 1",
        ", you see a",
        " apple 1",
        ", and a",
        " mug 2",
        ".",
    ]


@pytest.mark.parametrize("template", [None, QWEN3])
def test_a_conversation_grows_without_changing_what_was_sampled(tokenizer, template):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = ChatFormat(tokenizer)
    ids = chat.opening("put a apple in fridge.")
    response = chat.encode_response("<think>find apple</think><action>look</action>")
    assert chat.decode(response) == "<think>find apple</think><action>look</action>"
    grown = [*ids, *response, *chat.continuation("Nothing happens.")]
    text = tokenizer.decode(grown, skip_special_tokens=False)
    opening = "<|assistant|><think>\n\n</think>\n\n" if template else "<|assistant|>"
    first = "<|end|>" if template else ""
    assert text == (
        f"<|user|>put a apple in fridge.{first}{opening}<think>find apple</think><action>look</action><|end|>"
        f"<|user|>Nothing happens.{first}{opening}"
    )
    cut = [*ids, *response[:-1], *chat.continuation("Nothing happens.", stopped=False)]
    assert cut == grown
    assert chat.rewrites_history() == bool(template)


@pytest.mark.parametrize(
    ("earlier", "opening", "becomes"),
    [
        ("m.content", "", None),
        ("m.content.split('</think>')[-1]", "", "<think>"),  # thoughts dropped, nothing put before an answer
        ("m.content.split('</think>')[-1].lstrip('\n') if not loop.last else m.content", "", "<think>"),
        ("m.content", "<think>\n", "<|assistant|>"),  # a thought is opened that no earlier turn shows
        ("m.content | trim", "", " b "),
    ],
)
def test_templates_that_rewrite_history_are_recognised(tokenizer, earlier, opening, becomes):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
        "{{ ("
        + earlier
        + ") if m.role == 'assistant' else m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>" + opening + "{% endif %}"
    )
    said = ChatFormat(tokenizer).rewritten_history()
    assert (said is None) == (becomes is None)
    assert becomes is None or becomes in said


def test_messages_that_look_like_markup_stay_text(tokenizer):
    chat = ChatFormat(tokenizer)
    ids = chat.opening("{{ 7 * 7 }} {% raw %} \x02")
    assert "{{ 7 * 7 }} {% raw %} \x02" in tokenizer.decode(ids, skip_special_tokens=False)


def test_differing_tokenizers_are_told_apart(tokenizer):
    other = train_tokenizer(["You sit on chair 4."] * 30, tags=["<think>"])
    assert first_difference(tokenizer, tokenizer) is None
    assert "token" in (first_difference(tokenizer, other) or "")


def test_a_tokenizer_without_template_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat(bare)
