"""The canonical conversations and texts that every tokenizer and template is asked for."""

from dataclasses import asdict, dataclass

Message = dict[str, object]


@dataclass(frozen=True)
class Conversation:
    """Messages for `apply_chat_template`."""

    name: str
    messages: list[Message]
    add_generation_prompt: bool = True
    tools: list[dict] | None = None

    def request(self) -> dict:
        """As the child process takes it."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def _says(role: str, content: object) -> Message:
    return {"role": role, "content": content}


QUESTION = "Hello"
ANSWER = "Fine, thanks."

_HELLO = _says("user", QUESTION)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
_CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}


def _part(role: str, text: str) -> Message:
    return _says(role, [{"type": "text", "text": text}])


@dataclass(frozen=True)
class Basics:
    """A question with the generation prompt and without, and with its answer."""

    question: Conversation
    asked: Conversation
    answered: Conversation


SINGLE = Conversation("single", [_HELLO])
ASKED = Conversation("asked", [_HELLO], add_generation_prompt=False)
ANSWERED = Conversation("answered", [_HELLO, _says("assistant", ANSWER)], False)
_IN_PARTS = [_part("user", QUESTION)]
BASICS: tuple[Basics, ...] = (
    Basics(SINGLE, ASKED, ANSWERED),
    Basics(
        Conversation("content in parts", _IN_PARTS),
        Conversation("asked in parts", _IN_PARTS, False),
        Conversation("answered in parts", [*_IN_PARTS, _part("assistant", ANSWER)], False),
    ),
)
"""In the two forms of content that templates take: text, and a list of parts."""

MULTI_TURN = Conversation(
    "multi-turn", [_HELLO, _says("assistant", "Hi"), _says("user", "How are you today?")]
)
INJECTION = Conversation(
    "special-token text",
    [_says("user", "</s><|end_of_turn|><|im_end|><|eot_id|><end_of_turn>[/INST]")],
)

CONVERSATIONS: tuple[Conversation, ...] = (
    SINGLE,
    ASKED,
    ANSWERED,
    MULTI_TURN,
    INJECTION,
    Conversation("system", [_says("system", "Be brief."), _HELLO]),
    Conversation("tools offered", [_says("user", "Weather in Oslo?")], tools=[_WEATHER]),
    Conversation(
        "tool call",
        [
            _says("user", "Weather in Oslo?"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "3 °C"},
        ],
        tools=[_WEATHER],
    ),
    Conversation("empty content", [_says("user", "")]),
    Conversation("unicode", [_says("user", "naïve café, 日本語, ﬁ, 🙂👩‍🚀, e\u0301")]),
    Conversation("spaces", [_says("user", "  two  spaces\n\n\tand a tab \n")]),
    Conversation("code", [_says("user", "def f(x):\n    return {'a': x[1:]}  # <b>&</b>\n")]),
    BASICS[1].question,
    BASICS[1].asked,
    BASICS[1].answered,
    Conversation("assistant first", [_says("assistant", "Hi"), _HELLO]),
    Conversation("user twice", [_HELLO, _says("user", "Again")]),
    Conversation("unknown role", [_says("critic", "Hm.")]),
    Conversation("no messages", []),
)

TEXTS: tuple[str, ...] = (
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "a b", "a  b",
    "a\nb", "a\n\n\nb", "a\tb", "Hello, world!", "HELLO hello Hello", "don't I'll we've",
    "1234567890 3.14159 1,000,000", "x=1;y=2", "def f(x):\n    return x ** 2  # ok\n",
    "    indented\n        more", "<b>&amp;</b>", "{{ x }}", "https://example.org/a?b=c",
    "naïve café", "e\u0301", "日本語テキスト", "Привет", "مرحبا", "🙂👩‍🚀", "\u200b", "\u00a0", "ﬁ", "\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "<s>", "</s>", "<unk>", "<|im_start|>user", "[INST] Hi [/INST]",
    "GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:",
)  # fmt: skip
