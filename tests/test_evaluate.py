"""`expo evaluate`: the judges' forms, a server that fails, and what a killed run keeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import expo as door
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, EndpointError, OutputError, SpecError
from expo.evaluation.answers import Answer, Question, Reply
from expo.evaluation.formats import FORMATS, count_markdown, read_outputs
from expo.evaluation.journal import journal_path, open_journal
from expo.evaluation.server import KEY, Endpoint, open_endpoint, request_seed
from expo.output.journal import Fingerprint
from expo.results import EvaluateResult
from expo.sampling.prompts import Prompt, read_prompts

from .chat_server import Chat, Fault, serving
from .conftest import Ran

ROWS: dict[str, list[dict]] = {
    "alpaca-eval": [
        {"dataset": "helpful_base", "instruction": "Name\na tree", "output": "x", "generator": "g"},
        {"dataset": "koala", "instruction": "Write “ü” 𝄞", "output": "", "generator": "g"},
    ],
    "mt-bench": [
        {"question_id": 81, "category": "writing", "turns": ["Compose", "Rewrite"]},
        {"question_id": 101, "category": "reasoning", "turns": ["Imagine", "And now"], "reference": []},
        {"question_id": 142, "category": "stem", "turns": ["Why", "Sure"]},
    ],
    "arena-hard": [{"uid": "2edbb5f3", "category": "hard_prompt", "subcategory": "coding", "prompt": "zig"}],
    "ultrafeedback": [
        {"prompt": "hi", "prompt_id": "f0", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
    ],
    "jsonl": [{"prompt": "hello"}, {"id": "talk", "turns": ["one", "two", "three"]}],
}  # fmt: skip


def prompts_file(folder: Path, form: str) -> Path:
    path = folder / ("prompts.json" if form == "alpaca-eval" else "prompts.jsonl")
    rows = ROWS[form]
    path.write_text(
        json.dumps(rows)
        if form == "alpaca-eval"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return path


@pytest.fixture
def chat() -> Iterator[Chat]:
    with serving(Chat()) as chat:
        yield chat


def run(
    chat: Chat, folder: Path, form: str, name: str = "out", **more: object
) -> tuple[EvaluateResult, list[dict]]:
    out = folder / f"{name}{FORMATS[form].suffix}"
    result = door.evaluate(
        None, prompts_file(folder, form), out=out, format=form, endpoint=chat.url, **more
    )
    text = out.read_text()
    rows = json.loads(text) if form == "alpaca-eval" else [*map(json.loads, text.splitlines())]
    return result, rows


def test_alpaca_eval_reads_a_list_of_four_keys(chat: Chat, tmp_path: Path) -> None:
    _, rows = run(chat, tmp_path, "alpaca-eval", generator="me")
    assert rows[0] == {
        "dataset": "helpful_base",
        "instruction": "Name\na tree",
        "output": "NAME\nA TREE (1)",
        "generator": "me",
    }
    assert rows[1]["output"] == "WRITE “Ü” 𝄞 (1)"
    pandas = pytest.importorskip("pandas")  # how alpaca_eval's own loader reads it
    frame = pandas.read_json(tmp_path / "out.json")
    assert [*frame["output"]] == [row["output"] for row in rows]


def test_mt_bench_has_two_turns_and_a_temperature_by_category(chat: Chat, tmp_path: Path) -> None:
    result, rows = run(chat, tmp_path, "mt-bench", concurrency=1)
    assert [*rows[0]] == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert [row["question_id"] for row in rows] == [81, 101, 142]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["COMPOSE (1)", "REWRITE (3)"]}]
    sent = {body["messages"][-1]["content"]: body for body in chat.asked}
    assert sent["Rewrite"]["messages"] == [
        {"role": "user", "content": "Compose"},
        {"role": "assistant", "content": "COMPOSE (1)"},
        {"role": "user", "content": "Rewrite"},
    ]
    assert [sent[t]["temperature"] for t in ("Compose", "Imagine", "Sure")] == [0.7, 0.0, 0.1]
    assert {body["max_tokens"] for body in chat.asked} == {1024}
    assert result.generator == rows[0]["model_id"] == "toy"
    assert len({body["seed"] for body in chat.asked}) == 6


def test_arena_hard_carries_the_marks_of_style(chat: Chat, tmp_path: Path) -> None:
    said = "# Title\n## Part\n1. one\n2. two\n- x\n**bold** word __too__\n```\n# no\n- no\n**no**\n```\n"
    chat.reply = lambda _: said
    result, rows = run(chat, tmp_path, "arena-hard")
    assert [*rows[0]] == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "zig"},
        {"role": "assistant", "content": {"answer": said}},
    ]
    assert rows[0]["metadata"] == {
        "token_len": len(said.split()),
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }
    assert "add_markdown_info.py" in result.warnings[0]
    assert count_markdown("```") == count_markdown("")


def test_ultrafeedback_rows_are_those_of_the_official_search(chat: Chat, tmp_path: Path) -> None:
    _, rows = run(chat, tmp_path, "ultrafeedback", preset="expo-paper", settings={"temperature": 1})
    assert rows == [{"prompt": "hi", "output": "HI (1)", "length": 2, "finish_reason": "stop"}]
    (body,) = chat.asked
    assert (body["temperature"], body["top_k"], body["max_tokens"]) == (1, 50, 2048)


def test_plain_lines_hold_whole_conversations(chat: Chat, tmp_path: Path) -> None:
    result, rows = run(chat, tmp_path, "jsonl")
    assert [m["content"] for m in rows[1]["messages"]] == [
        "one", "ONE (1)", "two", "TWO (3)", "three", "THREE (5)",
    ]  # fmt: skip
    assert rows[0]["id"] == "0"
    assert "temperature" not in chat.asked[0]  # the server's own hold
    assert (result.prompts, result.length, result.unfinished_share) == (2, 4.0, 0.0)
    assert result.reward is None


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_again(form: str, chat: Chat, tmp_path: Path) -> None:
    run(chat, tmp_path, form)
    outputs = read_outputs(tmp_path / f"out{FORMATS[form].suffix}")
    assert len(outputs) == len(ROWS[form])
    assert all("(1)" in output.text for output in outputs)
    assert len({output.key for output in outputs}) == len(outputs)


def test_parquet_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "test_gen.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS["ultrafeedback"]), path)
    (prompt,) = read_prompts(path)
    assert prompt == Prompt("f0", ({"role": "user", "content": "hi"},))


WRONG_PROMPTS = {
    "no json": ("{", "p.jsonl:1: is not JSON"),
    "no json in a list": ('[\n{"prompt": 1},\n]', "p.jsonl:3: is not JSON"),
    "nothing": ("\n\n", "p.jsonl holds no prompt: give"),
    "no prompt": ('{"prompt": "a"}\n\n{"text": "b"}', "p.jsonl:3: no prompt: give"),
    "no object": ("3", "p.jsonl:1: no prompt"),
    "an answer alone": ('{"messages": [{"role": "assistant", "content": "a"}]}', "p.jsonl:1: no"),
    "a huge number": ('{"id": ' + "9" * 5000 + "}", "p.jsonl:1: cannot be read: Exceeds the limit"),
    "a deep nest": ('{"prompt": ' + "[" * 99999, "p.jsonl:1: cannot be read: maximum"),
    "half a character": ('{"prompt": "a\\uD83d"}', "p.jsonl:1: holds half of a character"),
    "twice": ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "two prompts with the id 1"),
}


@pytest.mark.parametrize("case", WRONG_PROMPTS.values(), ids=WRONG_PROMPTS)
def test_what_is_no_prompt_is_named(case: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(case[0])
    with pytest.raises(SpecError, match=case[1].replace("(", "\\(")):
        read_prompts(path)
    with pytest.raises(SpecError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark of Windows"])
@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a\u2028b"}\n{"prompt": "𝄞"}',
        '{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "\\ud834\\udd1e"}\r\n',
        '[{"prompt": "a\u2028b"},\n{"prompt": "𝄞"}]',
    ],
    ids=["lines", "lines of Windows", "a list"],
)
def test_lines_are_cut_where_they_end(content: str, mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(mark + content.encode())
    assert [p.messages[0]["content"] for p in read_prompts(path)] == ["a\u2028b", "𝄞"]


@pytest.mark.parametrize(
    ("form", "rows", "message"),
    [
        ("alpaca-eval", "jsonl", "prompt 0 has no dataset, which alpaca-eval needs"),
        ("ultrafeedback", "mt-bench", "prompt 81 has 2 turns, ultrafeedback holds 1"),
    ],
)
def test_prompts_that_a_form_cannot_hold(
    form: str, rows: str, message: str, tmp_path: Path
) -> None:
    path = prompts_file(tmp_path, rows)
    with pytest.raises(SpecError, match=message):
        door.evaluate(str(MODELS / "sft"), path, out=tmp_path / "o", format=form)


# A server that fails


def ask(chat: Chat, waits: list[float] | None = None) -> str:
    waits = [] if waits is None else waits
    endpoint = replace(open_endpoint(chat.url, "toy"), wait=waits.append)
    (reply,) = endpoint.ask(
        [Prompt("a", ({"role": "user", "content": "hi"},))], settings={}, seed=0
    )
    return reply.text


def test_a_busy_server_is_asked_again(chat: Chat) -> None:
    chat.faults = [
        Fault(503),
        Fault(429, headers=(("Retry-After", "7"),)),
        Fault(0),
        Fault(500, body="<html>"),
    ]
    waits: list[float] = []
    assert ask(chat, waits) == "HI (1)"
    assert waits == [1.0, 7.0, 4.0, 8.0]


@pytest.mark.parametrize("said", ["-5", "nan", "0", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_pause_that_cannot_be_kept_is_none(said: str, chat: Chat) -> None:
    chat.faults = [Fault(429, headers=(("Retry-After", said),))]
    waits: list[float] = []
    assert ask(chat, waits) == "HI (1)"
    assert waits == [1.0]


def test_an_answer_that_drips_is_not_waited_for(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps a connection: what is limited is the whole."""
    from expo.evaluation import server

    monkeypatch.setattr(server, "SECONDS", 0.05)
    chat.drip_seconds = 0.02
    endpoint = Endpoint(chat.url, "toy", wait=lambda _: None)
    with pytest.raises(EndpointError, match=r"after 6 tries: (not done after 0 s|timed out)"):
        endpoint.ask([Prompt("a", ({"role": "user", "content": "hi"},))], settings={}, seed=0)


def test_an_answer_that_is_cut_is_asked_again(chat: Chat) -> None:
    chat.faults = [Fault(200, '{"choices"', (("Content-Length", "99"), ("Connection", "close")))]
    assert ask(chat) == "HI (1)"


@pytest.mark.parametrize(
    "text", ['{"choices": [{"message": {"content": "ab', '{"choices": [{}]', '{"a": tru']
)
def test_an_answer_of_no_known_length_that_is_cut_is_asked_again(text: str, chat: Chat) -> None:
    chat.faults = [Fault(200, text)]
    assert ask(chat) == "HI (1)"


def test_the_prompt_that_a_server_refuses_is_named(chat: Chat) -> None:
    for status, named in ((400, "prompt a: "), (413, "prompt a: "), (401, "")):
        chat.faults = [Fault(status)]
        with pytest.raises(EndpointError, match=f"^{named}http.* refuses with {status}: as told"):
            ask(chat)


def test_what_a_filter_has_cut_is_told(chat: Chat, tmp_path: Path) -> None:
    choice = {"message": {"content": "a"}, "finish_reason": "content_filter"}
    chat.faults = [Fault(200, json.dumps({"choices": [choice]}))]
    result, rows = run(chat, tmp_path, "jsonl", concurrency=1)
    assert [row["finish_reason"] for row in rows] == ["content_filter", "stop"]
    assert "1 of 2 answers are cut by the server's filter" in result.warnings


def test_a_file_of_another_encoding_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}', encoding="utf-16")
    with pytest.raises(SpecError, match=r"p\.jsonl cannot be read: .*: save it as UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


def test_an_empty_line_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [prompt.id for prompt in read_prompts(tmp_path / "p.jsonl")] == ["0", "1"]


def test_a_disk_that_fills_is_told_with_what_is_kept(tmp_path: Path) -> None:
    """Closing the file fails once more; that is not what is said."""
    asked = Prompt("a", ({"role": "user", "content": "hi"},))
    reply = Reply("x" * 99, 1, "stop")

    def fill() -> None:
        with (
            open_journal(tmp_path / "o.jsonl", (asked,), Fingerprint({}), None) as (answers, _),
            Path("/dev/full").open("wb") as full,
        ):
            answers.add(Answer(asked, 0, (reply,), 0.0))
            os.dup2(full.fileno(), answers._file.fileno())
            answers.add(Answer(asked, 1, (reply,), 0.0))

    with pytest.raises(OutputError, match=r"o\.jsonl is full: the answers so far are kept"):
        fill()


def test_a_server_that_stays_busy_is_an_error(chat: Chat) -> None:
    chat.faults = [Fault(503)] * 6
    with pytest.raises(
        EndpointError, match="after 6 tries: 503 as told; when it does, run the same"
    ):
        ask(chat)


REFUSALS = {
    "no key": (Fault(401), "refuses with 401: as told; put the key into .* OPENAI_API_KEY"),
    "no model": (Fault(404, '{"detail": "none"}'), "404: none; check --endpoint .* and --model"),
    "a field": (Fault(422, '{"detail": "Unexpected"}'), "422: Unexpected; leave out what this server"),
    "elsewhere": (Fault(307, "", (("Location", "http://127.0.0.1:1/"),)), "refuses with 307.*; give --endpoint the address that"),
    "a deep nest": (Fault(200, "[" * 99999), "does not answer with JSON"),
    "a deep error": (Fault(400, "[" * 9999), r"refuses with 400: \[\[\["),
    "colours": (Fault(400, '{"error": {"message": "a\\n\\u001b[31mb"}}'), r"400: a \[31mb; leave"),
    "a page": (Fault(200, "<html>"), "does not answer with JSON: is it the address of a server"),
    "other json": (Fault(200, '{"text": "hi"}'), 'as OpenAI\'s chat completions do: {"text": "hi"}'),
    "a list": (Fault(200, "[1]"), "as OpenAI's chat completions do"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_with_the_cure(case: tuple[Fault, str], chat: Chat) -> None:
    chat.faults = [case[0]]
    with pytest.raises(EndpointError, match=case[1]) as raised:
        ask(chat)
    assert "\n" not in str(raised.value)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(EndpointError, match=r"does not answer: .*; start the server, or correct"):
        open_endpoint("http://127.0.0.1:9", None)
    wrong = (
        "localhost:8000",
        "ftp://host",
        "/v1",
        "http://[::1/v1",
        "http://h:port/",
        "http://h:99999",
    )
    for url in (*wrong, "http://a b/v1", "http://a/v1\n", "http://a/v1?x=1", "http://a/v1#x"):
        with pytest.raises(SpecError, match="is no address of a server"):
            open_endpoint(url, None)


def test_the_only_model_of_a_server_needs_no_name(chat: Chat) -> None:
    assert open_endpoint(chat.url.removesuffix("/v1") + "/", None).url == chat.url
    assert open_endpoint(chat.url, None).name == "toy"
    chat.names = ("a", "b")
    with pytest.raises(SpecError, match="serves a, b: say which with --model NAME"):
        open_endpoint(chat.url, None)
    chat.models_status = 500  # transformers serve, without a cache
    assert open_endpoint(chat.url, "b").name == "b"
    with pytest.raises(SpecError, match="serves no model by name"):
        open_endpoint(chat.url, None)


def test_the_key_goes_to_the_server(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(chat)
    monkeypatch.setenv(KEY, "secret")
    ask(chat)
    monkeypatch.setenv(KEY, " secret\n")  # as `export OPENAI_API_KEY="$(cat file)"` may leave it
    ask(chat)
    assert chat.keys == [None, None, *["Bearer secret"] * 4]
    for key in ("se\ncret", "sécret"):
        monkeypatch.setenv(KEY, key)
        with pytest.raises(SpecError, match=f"{KEY} holds characters that no key has") as raised:
            ask(chat)
        assert key not in str(raised.value)


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_key_that_a_server_repeats_is_not_shown(
    status: int, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sk-a-secret")
    chat.faults = [Fault(status, '{"error": {"message": "no: Bearer sk-a-secret"}}')] * 6
    with pytest.raises(EndpointError, match=r"no: Bearer \(the key\)"):
        ask(chat)


def test_a_count_that_is_none_is_left_out(chat: Chat) -> None:
    for tokens, length in (('"12"', None), ("-1", None), ("1" + "0" * 30, None), ("7", 7)):
        choice = '{"choices": [{"message": {"content": null}}], "usage": {"completion_tokens": '
        chat.faults = [Fault(200, choice + tokens + "}}")]
        (reply,) = open_endpoint(chat.url, "toy").ask([Prompt("a", ())], settings={}, seed=0)
        assert (reply.text, reply.length) == ("", length)


def test_asking_a_server_imports_no_torch(chat: Chat, tmp_path: Path) -> None:
    code = (
        "import sys, expo; expo.evaluate(None, sys.argv[1], out=sys.argv[2], endpoint=sys.argv[3])\n"
        "print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    arguments = [str(prompts_file(tmp_path, "jsonl")), str(tmp_path / "o"), chat.url]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_text_that_is_half_a_character_can_be_written(chat: Chat) -> None:
    chat.reply = lambda _: "\ud83d"
    assert ask(chat) == "?"


def test_seeds_are_of_the_prompt() -> None:
    prompt = Prompt("a", ({"role": "user", "content": "hi"},), ("more",))
    names = [Question(prompt, candidate).turn([]).id for candidate in (0, 1)]
    assert names == ["a", "a#1"]
    assert request_seed(0, "a") == request_seed(0, "a") != request_seed(1, "a")
    assert 0 <= request_seed(0, "a") < 2**31


# What a run keeps


def echo_once(body: dict) -> str:
    return body["messages"][-1]["content"].upper()


def interrupted(chat: Chat, folder: Path, after: int, name: str = "out") -> None:
    """A run that the server ends after some turns."""
    done = 0

    def reply(body: dict) -> str:
        nonlocal done
        done += 1
        if done == after:
            chat.faults = [Fault(400)] * 9
        return echo_once(body)

    chat.reply = reply
    with pytest.raises(EndpointError):
        run(chat, folder, "mt-bench", name, concurrency=1)
    chat.faults, chat.reply = [], echo_once


def test_no_conversation_is_asked_twice(chat: Chat, tmp_path: Path) -> None:
    interrupted(chat, tmp_path, after=3)  # one whole conversation, and half of one
    journal = journal_path(tmp_path / "out.jsonl")
    journal.write_bytes(journal.read_bytes() + b'{"key": ["101"')  # torn
    before, said = len(chat.asked), []
    result, rows = run(chat, tmp_path, "mt-bench", say=said.append)
    assert said == ["resuming, answered so far: 1"]
    assert len(chat.asked) - before == 4
    assert result.prompts == len(rows) == 3
    fresh, _ = run(chat, tmp_path, "mt-bench", "other")
    assert (tmp_path / "other.jsonl").read_text().count("REWRITE") == 1
    assert fresh.prompts == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.jsonl", "other.jsonl", "prompts.jsonl"}


def test_answers_under_other_settings_are_not_lost_unasked(chat: Chat, tmp_path: Path) -> None:
    interrupted(chat, tmp_path, after=4)
    said: list[str] = []
    other = {"settings": {"temperature": 0.2}, "seed": 3}
    kept = journal_path(tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(
        OutputError, match=r"were to other seed, settings: name another file, or add --overwrite"
    ):
        run(chat, tmp_path, "mt-bench", **other)
    assert journal_path(tmp_path / "out.jsonl").read_bytes() == kept
    run(chat, tmp_path, "mt-bench", say=said.append, overwrite=True, **other)
    assert said == ["the answers so far were to other seed, settings"]


@pytest.mark.parametrize(
    "line",
    [
        bytes(20),  # what a power cut leaves
        b'{"key": ["none", 0], "replies": []}',
        b'{"key": ["101", 0], "replies": [], "time": 0}',
        b'{"key": ["101", 0], "replies": [[1, 1, "stop"], [2, 2, "stop"]], "time": 0}',
        b"[1]",
        b'{"answers": {}}',
        b"[" * 99999,
    ],
    ids=["zeros", "another prompt", "no reply", "no text", "a list", "a head", "a deep nest"],
)
def test_a_damaged_line_is_asked_again(line: bytes, chat: Chat, tmp_path: Path) -> None:
    interrupted(chat, tmp_path, after=3)
    journal, said = journal_path(tmp_path / "out.jsonl"), []
    head, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([head, line + b"\n", *rest]))
    run(chat, tmp_path, "mt-bench", say=said.append)
    assert said == ["resuming, answered so far: 1"]
    for content in (b"nonsense\n5\n", b'{"answers": 1}\n5\n'):
        journal.write_bytes(content)
        run(chat, tmp_path, "mt-bench", say=said.append, overwrite=True)
        assert said.pop() == "the answers so far cannot be read: starting afresh"


def test_empty_answers_are_counted(chat: Chat, tmp_path: Path) -> None:
    chat.reply = lambda _: " \n"
    result, _ = run(chat, tmp_path, "jsonl")
    assert result.warnings == ("2 of 2 answers are empty",)


def test_a_folder_is_no_file(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory: name a file, with --out"):
        door.evaluate(
            None, prompts_file(tmp_path, "jsonl"), out=tmp_path, endpoint=chat.url, overwrite=True
        )
    assert chat.asked == []


@pytest.mark.parametrize("served", ["org/toy", "/srv/models/toy", "../toy"])
def test_a_file_is_named_by_the_last_part_of_a_model(
    served: str,
    chat: Chat,
    tmp_path: Path,
    expo: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--prompts", prompts_file(tmp_path, "jsonl"), "--model", served)
    ran = expo("evaluate", "--endpoint", chat.url, *flags)
    assert ran.code == 0, ran.err
    assert Path("toy-jsonl.jsonl").exists()
    assert f"answers of {served} in" in ran.out


def test_a_file_is_written_by_one_run(chat: Chat, tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def reply(body: dict) -> str:
        started.set()
        go_on.wait(10)
        return echo_once(body)

    chat.reply = reply
    first = threading.Thread(target=run, args=(chat, tmp_path, "jsonl"))
    first.start()
    started.wait(10)
    with pytest.raises(OutputError, match="another run is writing it: wait, or name another file"):
        run(chat, tmp_path, "jsonl")
    go_on.set()
    first.join()
    with pytest.raises(OutputError, match="exists: choose another file, or add --overwrite"):
        run(chat, tmp_path, "jsonl")
    run(chat, tmp_path, "jsonl", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        door.evaluate(
            None,
            tmp_path / "prompts.jsonl",
            out=tmp_path / "out.jsonl" / "x",
            endpoint=chat.url,
        )


def test_no_pause_is_waited_for_at_the_end(chat: Chat, tmp_path: Path) -> None:
    """One request is refused, the other was sent away for a minute: the refusal is said at once."""
    chat.faults = [Fault(503, headers=(("Retry-After", "60"),)), *[Fault(400)] * 9]
    with pytest.raises(EndpointError, match="refuses with 400"):
        run(chat, tmp_path, "jsonl", concurrency=2)
    assert len(chat.keys) == 3  # the list of models, and each prompt once


@pytest.mark.slow
def test_an_interrupted_run_says_how_it_goes_on(chat: Chat, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expo", "evaluate", "--endpoint", chat.url]
    command += ["--prompts", str(prompts_file(tmp_path, "mt-bench")), "--out", str(tmp_path / "o")]
    chat.reply = lambda body: (time.sleep(0.3), echo_once(body))[1]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not chat.asked:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "expo: interrupted; what is finished is kept, run the same command again to resume"
    )


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_killed_run_asks_nothing_twice(after: int, chat: Chat, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {n}"}) + "\n" for n in range(20)))
    command = [
        sys.executable,
        "-m",
        "expo",
        "evaluate",
        "--endpoint",
        chat.url,
        "--prompts",
        prompts,
    ]
    command += ["--out", tmp_path / "out.jsonl", "--concurrency", "2"]
    chat.reply = lambda body: (time.sleep(0.05), echo_once(body))[1]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(chat.asked) < after:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.jsonl").exists()
    time.sleep(0.2)  # what was under way
    kept = journal_path(tmp_path / "out.jsonl").read_text().count("replies")
    before = len(chat.asked)
    subprocess.run(command, check=True, capture_output=True)
    assert len(chat.asked) - before == 20 - kept
    assert kept >= before - 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == [f"WORD {n}" for n in range(20)]


# A model in this process

WORDS = ("hello", "world", "plane", "birds", "gnome")
REWARD = (
    "def ok(conversations, answers):\n    return [len(set(a)) + len(a) / 100 for a in answers]\n"
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("toy_reward.py").write_text(REWARD)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": w}) + "\n" for w in WORDS))
    return tmp_path


def texts(path: str) -> list[str]:
    return [output.text for output in read_outputs(Path(path))]


def local(out: str, **more: object) -> EvaluateResult:
    settings = {"max_new_tokens": 12} | more.pop("settings", {})  # type: ignore[operator]
    return door.evaluate(
        str(MODELS / "aligned"), "prompts.jsonl", out=out, settings=settings, **more
    )


def test_a_batch_changes_no_answer(workplace: Path) -> None:
    for temperature in (0, 1):
        settings = {"temperature": temperature}
        local(f"one{temperature}", settings=settings, batch_size=1)
        local(f"all{temperature}", settings=settings, batch_size=5)
        assert texts(f"one{temperature}") == texts(f"all{temperature}")
    local("greedy")
    assert texts("greedy") == texts("one0")  # the toy's own config does not sample
    local("other", settings={"temperature": 1}, seed=1)
    assert texts("other") != texts("one1")


def test_what_cannot_be_answered_is_said_before_anything_is(workplace: Path) -> None:
    """Left out, it makes other prompts: what was answered by then would be lost."""
    with Path("prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 99}) + "\n")
    with pytest.raises(CheckpointError, match=r"prompt 5 has \d+ tokens, the model's context 64"):
        local("o.jsonl", batch_size=1)
    assert not journal_path(Path("o.jsonl")).exists()  # there is nothing to go on from


def test_a_run_beside_its_model_goes_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.sampling import generate

    shutil.copytree(MODELS / "aligned", "model")
    decode, calls = generate.sample_of, []

    def sample_of(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(generate, "sample_of", sample_of)
    said: list[str] = []
    settings = {"max_new_tokens": 12}
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            door.evaluate("model", "prompts.jsonl", out="model/o.jsonl", settings=settings, batch_size=1,
                          say=said.append)  # fmt: skip
    assert said == ["resuming, answered so far: 3"]


def test_best_of_keeps_the_best(workplace: Path) -> None:
    settings = {"temperature": 1.5}
    one = local("one.jsonl", settings=settings, reward="toy_reward:ok")
    four = local("four.jsonl", settings=settings, reward="toy_reward:ok", best_of=4)
    assert one.reward is not None
    assert four.reward is not None
    assert four.first_reward == pytest.approx(one.reward.mean)  # the same first answers
    assert four.reward.mean > one.reward.mean
    rows = [json.loads(line) for line in Path("four.jsonl").read_text().splitlines()]
    for row in rows:
        text = row["messages"][-1]["content"]
        assert row["reward"] == len(set(text)) + len(text) / 100
    kept = [json.loads(line) for line in Path("four.rewards.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in kept] == [row["reward"] for row in rows]
    equal = local(
        "same.jsonl", settings={"top_k": 1, "temperature": 1}, reward="toy_reward:ok", best_of=2
    )
    assert "all candidates of every prompt are equal" in equal.warnings[0]


def test_rewards_of_a_run_are_kept_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.evaluation import asking

    monkeypatch.setattr(asking, "_SCORED_AT_ONCE", 2)
    Path("bad_reward.py").write_text(
        "calls = []\ndef f(c, answers):\n    calls.append(len(answers))\n"
        "    return [float('nan') if len(calls) == 2 else 1.0 for _ in answers]\n"
    )
    monkeypatch.delitem(sys.modules, "bad_reward", raising=False)
    with pytest.raises(SpecError, match="bad_reward:f gave nan"):
        local("o.jsonl", reward="bad_reward:f")
    import bad_reward  # pyright: ignore[reportMissingImports]

    local("o.jsonl", reward="bad_reward:f")
    assert bad_reward.calls == [2, 2, 2, 1]  # the first two are not asked again


def test_beams_find_likelier_answers(workplace: Path) -> None:
    import torch

    from expo.demo.toy import encode, load, log_probability

    local("greedy")
    local("beams", num_beams=6)
    model, tokenizer = load(MODELS / "aligned")
    with torch.no_grad():
        likely = [
            [float(log_probability(model, [encode(tokenizer, w, text)])) for w, text in zip(WORDS, texts(name), strict=True)]
            for name in ("greedy", "beams")
        ]  # fmt: skip
    assert all(beam >= greedy - 0.05 for greedy, beam in zip(*likely, strict=True))


def test_rewards_of_another_are_not_replaced_unasked(workplace: Path) -> None:
    Path("o.rewards.jsonl").write_text("mine")
    with pytest.raises(OutputError, match=r"o\.rewards\.jsonl exists: choose another file"):
        local("o.jsonl")
    assert Path("o.rewards.jsonl").read_text() == "mine"
    local("o.jsonl", overwrite=True)
    assert not Path("o.rewards.jsonl").exists()


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Endpoint("u", "n", key="secret"))


CONTRADICTIONS = [
    ({"model": None}, "give a MODEL, or a server with --endpoint"),
    ({"endpoint": "http://localhost:1"}, "give MODEL or --endpoint, not both"),
    ({"best_of": 2}, "--best-of 2 needs a --reward to choose by"),
    ({"best_of": 2, "reward": "a:b", "settings": {"temperature": 0}}, "needs answers that differ"),
    ({"model": None, "endpoint": "http://localhost:1", "num_beams": 2}, "leave --endpoint out"),
    ({"num_beams": 2, "settings": {"temperature": 1}}, "leave --temperature out"),
    ({"num_beams": 2, "settings": {"top_p": 0.9}}, "leave --top-p out"),
    ({"settings": {"top_p": 2}}, "top_p 2 is out of range"),
    ({"settings": {"temperature": float("inf")}}, "temperature inf is out of range"),
    ({"settings": {"presence_penalty": float("nan")}}, "presence_penalty nan is out of range"),
    ({"settings": {"top_k": 5.5}}, "top_k 5.5 is out of range"),
    ({"settings": {"max_new_tokens": 2.5}}, "max_new_tokens 2.5 is out of range"),
    ({"settings": {"temprature": 1}}, "no setting temprature: one of temperature, top_k"),
    (
        {"model": None, "endpoint": "http://me:secret@localhost:1"},
        "holds a name or a password: leave it out",
    ),
    ({"reward": f"{MODELS / 'sft'}+{MODELS / 'aligned'}"}, "reward: .* is a model with an adapter"),
    ({"reward": "s3://bucket/rm"}, "reward: s3://bucket/rm lies in an object store"),
    ({"model": "s3://bucket/model"}, "MODEL: s3://bucket/model lies in an object store"),
    ({"preset": "none"}, "preset none is not one of expo-paper"),
    ({"format": "none"}, "format none is none of alpaca-eval, mt-bench"),
    ({"model": f"{MODELS / 'sft'}+{MODELS / 'aligned'}"}, "MODEL: .* is a model with an adapter"),
    ({"reward": "no_such:thing"}, "no_such"),
]


@pytest.mark.parametrize(("asked", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(asked: dict, message: str, workplace: Path) -> None:
    more = {"model": str(MODELS / "sft")} | asked
    with pytest.raises(SpecError, match=message):
        door.evaluate(more.pop("model"), "prompts.jsonl", out="o.jsonl", **more)
    assert [path.name for path in Path().glob("*o.jsonl*")] == []  # nothing was generated


def test_the_command_line(workplace: Path, chat: Chat, expo: Callable[..., Ran]) -> None:
    flags = ("--prompts", "prompts.jsonl", "--max-new-tokens", 12, "--reward", "toy_reward:ok")
    ran = expo("evaluate", MODELS / "sft", *flags, "-q")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert "sft-jsonl.jsonl: 5 answers of sft in the form of jsonl" in ran.out
    assert "95 % interval" in ran.out
    served = expo("evaluate", "--endpoint", chat.url, *flags, "--out", "served.jsonl", "--json")
    assert json.loads(served.out)["generator"] == "toy"
    assert {*json.loads(served.out)} == {*EvaluateResult.__dataclass_fields__}
    compared = expo("compare", "sft-jsonl.jsonl", "served.jsonl")
    assert compared.code == 0, compared.err
    assert expo("evaluate", MODELS / "sft").code == 2
    missing = expo("evaluate", "--lm-eval", "x", "--endpoint", chat.url)
    assert missing.code == 2
    assert "--lm-eval takes a MODEL" in missing.err
    dropped = expo("evaluate", MODELS / "sft", "--lm-eval", "x", "--best-of", 2)
    assert dropped.err.startswith(
        "expo: --best-of: not with --lm-eval, which brings its own prompts"
    )


def test_the_command_line_knows_every_format() -> None:
    from expo.cli.evaluate import FORMS

    assert sorted(FORMATS) == [*FORMS]
    assert Endpoint("u", "n").parts["endpoint"] == "u"
