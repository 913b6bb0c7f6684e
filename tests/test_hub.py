"""Hub inputs, against a server on loopback; each command in a process of its own (HF_ENDPOINT)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from expo.errors import HubError

from .conftest import Pair
from .hub_server import COMMIT, Hub
from .test_merge import assert_same, load, naive

TOKEN = "hf_" + "secret" * 6


@dataclass
class Client:
    hub: Hub
    home: Path

    def expo(self, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "expo", *map(str, arguments)]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, timeout=120
        )


FLAGS = ("--alpha", 1.5, "--no-verify")  # made-up tensors, no model has these shapes


@pytest.fixture
def client(pair: Pair, tmp_path: Path) -> Iterator[Client]:
    (pair.aligned / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (pair.aligned / "chat_template.jinja").write_text("{{ bos_token }}")
    hub = Hub({"org/sft": pair.sft, "org/aligned": pair.aligned})
    server = hub.start()
    yield Client(hub, tmp_path / "hf")
    server.shutdown()
    server.server_close()


def test_plan_reads_headers_by_range_only(client: Client) -> None:
    ran = client.expo("plan", "org/sft", "org/aligned@main", "--alpha", 1.5, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["aligned"] == {
        "model": "org/aligned@main", "kind": "Hub repository", "commit": COMMIT,
        "adapter": None, "adapter_commit": None,
    }  # fmt: skip
    assert report["tensors"]["matched"] == 9
    assert report["download_bytes"] > 0
    assert client.hub.ranges()
    assert all(r.startswith("bytes=0-") for r in client.hub.ranges())
    assert not list(client.home.rglob("*.safetensors"))


def test_a_long_header_takes_a_second_range(client: Client, pair: Pair) -> None:
    path = pair.sft / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": {"note": "x" * 150_000}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    ran = client.expo("plan", "org/sft", "org/aligned")
    assert ran.returncode == 0, ran.stderr
    assert any(r.startswith("bytes=100000-") for r in client.hub.ranges())


def test_a_server_without_ranges(client: Client) -> None:
    client.hub.honours_ranges = False
    ran = client.expo("plan", "org/sft", "org/aligned")
    assert ran.returncode == 0, ran.stderr


def test_extrapolate_downloads_through_the_cache_and_then_works_offline(
    client: Client, pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = client.expo("extrapolate", "org/sft", "org/aligned", out, *FLAGS, HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stderr
    assert_same(load(out), naive(pair.sft_tensors, pair.aligned_tensors, 1.5))
    assert (out / "chat_template.jinja").read_bytes() == (
        pair.aligned / "chat_template.jinja"
    ).read_bytes()
    manifest = json.loads((out / "expo.json").read_text())
    assert manifest["sources"]["sft"]["commit"] == COMMIT
    assert manifest["sources"]["aligned"]["model"] == "org/aligned"
    assert len(manifest["inputs"]["sft org/sft/model.safetensors"]["sha256"]) == 64
    assert "base_model:\n- org/aligned\n- org/sft" in (out / "README.md").read_text()
    everything = (
        ran.stdout
        + ran.stderr
        + "".join(p.read_text(errors="ignore") for p in out.iterdir() if p.is_file())
    )
    assert TOKEN not in everything
    assert any(authorization == f"Bearer {TOKEN}" for *_, authorization in client.hub.requests)
    again = client.expo(
        "extrapolate",
        "org/sft",
        "org/aligned",
        tmp_path / "again",
        *FLAGS,
        HF_HUB_OFFLINE="1",
    )
    assert again.returncode == 0, again.stderr
    assert_same(load(tmp_path / "again"), load(out))
    planned = client.expo("plan", "org/sft", "org/aligned", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(planned.stdout)["sft"]["commit"] == COMMIT


def test_the_token_does_not_follow_a_redirect_to_another_host(client: Client, pair: Pair) -> None:
    elsewhere = Hub(dict(client.hub.repositories))
    server = elsewhere.start()
    client.hub.redirects_to = elsewhere.url.replace("127.0.0.1", "localhost")
    ran = client.expo("plan", "org/sft", "org/aligned", HF_TOKEN=TOKEN)
    server.shutdown()
    server.server_close()
    assert ran.returncode == 0, ran.stderr
    assert elsewhere.requests
    assert not any(authorization for *_, authorization in elsewhere.requests)


def test_plan_of_a_bin_on_the_hub_reads_its_pickle_only(client: Client, pair: Pair) -> None:
    big = pair.sft_tensors | {"big.weight": torch.zeros(1000, 1000)}
    (pair.sft / "model.safetensors").unlink()
    torch.save(big, pair.sft / "pytorch_model.bin")
    ran = client.expo("plan", "org/sft", "org/aligned", "--allow-missing", "big", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["tensors"]["matched"] == 9
    assert client.hub.ranges()
    fetched = [r.removeprefix("bytes=").split("-") for r in client.hub.ranges()]
    assert sum(int(last) - int(first) for first, last in fetched) < 1_000_000
    assert not list(client.home.rglob("*.bin"))


def test_a_non_default_endpoint_is_named_in_the_plan(client: Client) -> None:
    ran = client.expo("plan", "org/sft", "org/aligned")
    assert f"Hub endpoint: {client.hub.url} (not the default)" in ran.stdout


FAULTS = {
    "no repository": ("org/none", "org/none: no such directory here, and no such repository on the Hub, or a private one: check the name, or `hf auth login`"),
    "no revision": ("org/sft@v9", "org/sft@v9: the repository has no such revision"),
    "gated": ("org/sft@gated", "org/sft@gated is gated: ask for access on its page, then `hf auth login`"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_hub_refuses_is_one_line(client: Client, name: str) -> None:
    reference, message = FAULTS[name]
    ran = client.expo("plan", reference, "org/aligned")
    assert ran.returncode == 1
    assert ran.stderr.strip() == f"expo: {message}"


def test_a_hub_out_of_reach_is_one_line(client: Client) -> None:
    ran = client.expo("plan", "org/sft", "org/aligned", HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.returncode == 1
    assert ran.stderr == (
        "expo: org/sft: no such directory here, and the Hub at http://127.0.0.1:9 does not answer "
        "(ConnectError); the local cache does not hold it either: check path and connection "
        "(with HF_HUB_OFFLINE=1 only the cache is looked at)\n"
    )


@pytest.mark.parametrize("ill", [False, True], ids=["out of reach", "answers 503"])
def test_without_the_hub_the_cache_is_used_with_a_note(client: Client, ill: bool) -> None:
    """A model that is on this disk needs no connection."""
    assert client.expo("diff", "org/sft", "org/aligned").returncode == 0
    client.hub.is_ill = ill
    away = {} if ill else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    ran = client.expo("plan", "org/sft", "org/aligned", "--alpha", 1.5, "--json", **away)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["sft"]["commit"] == COMMIT
    where, why = (client.hub.url, "503") if ill else ("http://127.0.0.1:9", "ConnectError")
    note = (
        f"org/sft: the Hub at {where} does not answer ({why}); commit {COMMIT} of the local cache is "
        "used (HF_HUB_OFFLINE=1 does so without asking)"
    )
    assert note in report["notes"]


def test_offline_without_a_cache_is_one_line(client: Client) -> None:
    ran = client.expo("plan", "org/sft", "org/aligned", HF_HUB_OFFLINE="1")
    assert ran.returncode == 1
    assert ran.stderr == (
        "expo: org/sft: no such directory here, and not in the local cache, and HF_HUB_OFFLINE=1 forbids "
        "to ask the Hub: unset it, or `hf download` it while online\n"
    )


def test_a_connection_lost_in_a_download_is_not_called_offline() -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    from expo.checkpoint.hub import explained

    with pytest.raises(HubError) as caught, explained("org/sft/config.json"):
        raise LocalEntryNotFoundError("no connection")
    assert "does not answer (LocalEntryNotFoundError): check the connection" in str(caught.value)
    assert "forbids" not in str(caught.value)


@pytest.mark.slow
def test_an_adapter_of_hub_models_names_its_base(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    ran = client.expo("extract-lora", "org/aligned", out, "--minus", "org/sft", "--rank", "2")
    assert ran.returncode == 3, ran.stderr  # the tokenizer is made up
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/sft", COMMIT)
    assert "base_model:\n- org/sft\n" in (out / "README.md").read_text()
    refused = client.expo("extract-lora", "org/none", tmp_path / "x", "--minus", "org/sft", "--rank", "2")  # fmt: skip
    assert refused.returncode == 1
    assert not list(tmp_path.glob(".x*"))
