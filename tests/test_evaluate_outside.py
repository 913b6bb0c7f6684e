"""Evaluating through what others wrote: transformers' server and lm-evaluation-harness, offline."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from expo.demo.toy import MODELS
from expo.evaluation.formats import read_outputs

pytestmark = pytest.mark.slow

ALIGNED = MODELS / "aligned"
TASK = """\
task: toy_judgement
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def environment(folder: Path) -> dict[str, str]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return os.environ | offline | {"HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}


def expo(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expo", *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """`transformers serve` with the aligned model of the toy."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(ALIGNED), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{url}/health", process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_transformers_serve_says_what_the_model_says(server: str, tmp_path: Path) -> None:
    rows = [{"id": w, "prompt": w} for w in ("hello", "world", "plane")]
    rows.append({"id": "talk", "turns": ["birds", "gnome"]})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--prompts", "prompts.jsonl", "--temperature", 0, "--max-new-tokens", 12)
    served = expo(
        tmp_path, "evaluate", "--endpoint", server, "--model", ALIGNED, *flags, "--out", "s.jsonl"
    )
    assert served.returncode == 0, served.stderr
    local = expo(tmp_path, "evaluate", ALIGNED, *flags, "--out", "l.jsonl")
    assert local.returncode == 0, local.stderr
    assert read_outputs(tmp_path / "s.jsonl") == read_outputs(tmp_path / "l.jsonl")
    # a field that this server does not know is refused by its name
    refused = expo(
        tmp_path, "evaluate", "--endpoint", server, "--model", ALIGNED, *flags, "--top-k", 5, "--out", "k.jsonl"
    )  # fmt: skip
    assert refused.returncode == 1
    assert "refuses with 422" in refused.stderr
    assert "top_k" in refused.stderr


def test_the_harness_runs_a_local_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    words = ("hello", "world", "plane", "birds", "gnome", "table")
    docs = [
        {"word": w, "good": f"ok {w}", "bad": f"zz {w[::-1]}" if n else f"ok {w}x"}
        for n, w in enumerate(words)
    ]
    docs[5] |= {"good": "zz table", "bad": "ok table"}  # one that it gets wrong
    (tmp_path / "toy.json").write_text(json.dumps(docs))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "toy.yaml").write_text(TASK.format(data=tmp_path / "toy.json"))
    flags = ("--lm-eval", "toy_judgement", "--tasks-path", tasks, "--apply-chat-template")
    ran = expo(tmp_path, "evaluate", ALIGNED, *flags)
    assert ran.returncode == 0, ran.stderr
    content = json.loads((tmp_path / "aligned-results.json").read_text())
    assert content["schema"] == "expo.results/1"
    (score,) = content["results"]
    assert (score["dataset"], score["metric"]) == ("toy_judgement", "acc, 0-shot, chat template")
    assert score["value"] == pytest.approx(5 / 6)
    low, high = score["interval"]
    assert low < 5 / 6 < high
    assert score["source"].startswith(
        "https://github.com/EleutherAI/lm-evaluation-harness/tree/v0."
    )
    unknown = expo(
        tmp_path, "evaluate", ALIGNED, "--lm-eval", "toy_judgment", *flags[2:], "--overwrite"
    )
    assert unknown.returncode == 2
    assert "lm-evaluation-harness has no task toy_judgment" in unknown.stderr
