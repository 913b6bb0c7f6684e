"""How fast a merge goes to the Hub, against what the server takes.

    python -m benchmarks.push --params 1e9 --rate 100

A loopback Hub (LFS) in a process of its own reads uploads at no more than `--rate` MB/s and keeps none. `server` sends it
the files of the local output from this disk, one after the other, and does nothing else. All are whole processes,
interleaved, warm, medians of `--runs`; none verifies. The hashes of what was pushed are compared with the local output's.
`sending` is from the first byte that came to the last, which leaves out what does not grow with the model: the start of
Python, the first shard, card and commit. The disk is that of the largest staging directory seen at a PUT, over the two
largest shards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.merge import Measured, make_pair, measure
from tests.hub_server import Handler
from tests.hub_writing import Account, WritableHub, WritingHandler

_HUB = "import sys; from benchmarks.push import serve; serve(float(sys.argv[1]), sys.argv[2])"
_FLOOR = "import sys; from benchmarks.push import upload; upload(sys.argv[1], sys.argv[2:])"
_PUSH = "import sys; from benchmarks.push import push; push(*sys.argv[1:])"
_PIECE = 1 << 20


class _Draining(WritingHandler):
    """Uploads are read at the server's rate and dropped; that they came is kept."""

    rate = 0.0
    staging = Path()
    peak = 0
    begun = ended = 0.0
    held: dict[str, int]

    def do_PUT(self) -> None:  # noqa: N802
        left, started, done = int(self.headers["Content-Length"]), time.perf_counter(), 0
        self._look()
        _Draining.begun = _Draining.begun or started
        while left:
            count = len(self.rfile.read(min(left, _PIECE)))
            left, done = left - count, done + count
            if self.rate and (ahead := done / self.rate - (time.perf_counter() - started)) > 0:
                time.sleep(ahead)
        _Draining.ended = time.perf_counter()
        self._look()
        self.is_lost = False
        self.held[self.path.split("?")[0].rpartition("/")[2]] = done
        self._json(200, {})

    def verify(self, _: str) -> None:
        self._json(200, {})

    def _look(self) -> None:
        files = self.staging.rglob("*.safetensors*") if self.staging.is_dir() else ()
        on_disk = sum(path.stat().st_blocks * 512 for path in files if path.exists())
        _Draining.peak = max(_Draining.peak, on_disk)


class _Hub(WritableHub):
    def handler(self) -> type[Handler]:
        return _Draining

    def holds(self, sha256: str) -> bool:
        return sha256 in _Draining.held


def serve(rate: float, place: str) -> None:
    """A Hub that for every line on stdin says what it saw since the last one, and forgets all; its port comes first."""
    _Draining.rate, _Draining.held = rate * 1e6, {}
    _Draining.staging = Path(place) / ".org--out.expo-staging"
    hub = _Hub(accounts={"token": Account()})
    hub.start()
    print(hub.url.rpartition(":")[2], flush=True)
    for _ in sys.stdin:
        print(json.dumps([_Draining.ended - _Draining.begun, _Draining.peak]), flush=True)
        hub.repos.clear()
        _Draining.held.clear()
        _Draining.begun = _Draining.ended = 0.0


def upload(address: str, files: list[str]) -> None:
    """PUT files one after the other."""
    import http.client

    for name in files:
        connection = http.client.HTTPConnection(address, blocksize=_PIECE)
        with Path(name).open("rb") as file:
            size = str(Path(name).stat().st_size)
            connection.request("PUT", f"/lfs/{'0' * 64}", body=file, headers={"Content-Length": size})  # fmt: skip
            connection.getresponse().read()


def push(sft: str, aligned: str, name: str) -> None:
    from expo.planning.build import build_plan
    from expo.publishing.repository import parse_target
    from expo.spec.request import make_request
    from expo.verbs.push import Publication, push_plan

    plan = build_plan(make_request(sft, aligned, alpha=1.5, max_shard_bytes=250_000_000))
    result = push_plan(plan, Publication(parse_target(name), licence="mit"), verify=False)
    print(json.dumps(result.receipt.files))


Runs = dict[str, list[tuple[Measured, float]]]
"""By variant, every run with the seconds of its sending."""


def run(root: Path, hub: "subprocess.Popen[str]", runs: int) -> tuple[Runs, int]:
    """The runs, and the peak of the disk in bytes."""
    assert hub.stdout is not None
    assert hub.stdin is not None
    address = f"127.0.0.1:{hub.stdout.readline().strip()}"
    os.environ |= {"HF_ENDPOINT": f"http://{address}", "HF_HOME": str(root / "hf"), "HF_TOKEN": "token", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    os.environ["PYTHONPATH"] = str(Path.cwd())
    os.chdir(root)
    out = root / "out"
    flags = ["--alpha", "1.5", "--no-verify", "-q", "--overwrite", "--max-shard-size", "250MB"]
    merge = [sys.executable, "-m", "expo", "extrapolate", "sft", "aligned", "out", *flags]
    subprocess.run(merge, check=True, stdout=subprocess.DEVNULL)
    files = sorted(map(str, out.glob("*.safetensors")))
    variants = {
        "server": [sys.executable, "-c", _FLOOR, address, *files],
        "merge into a directory": merge,
        "push": [sys.executable, "-c", _PUSH, "sft", "aligned", "org/out"],
    }
    found: Runs = {name: [] for name in variants}
    peak = 0
    for _ in range(runs):
        for name, command in variants.items():
            measured = measure(name, command)
            hub.stdin.write("\n")
            hub.stdin.flush()
            sending, peak = json.loads(hub.stdout.readline())
            found[name].append((measured, sending))
    return found, peak


def report(found: Runs) -> str:
    lines = ["| variant | wall, s | over the server | sending, s | over the server | CPU s |"]
    lines.append("|---|---|---|---|---|---|")
    walls = {name: [one.wall for one, _ in runs] for name, runs in found.items()}
    sendings = {name: [sending for _, sending in runs] for name, runs in found.items()}
    for name, runs in found.items():
        cpu = statistics.median(one.cpu for one, _ in runs)
        lines.append(f"| {name} | {_spread(walls, name)} | {_spread(sendings, name)} | {cpu:.2f} |")
    return "\n".join(lines)


def _spread(found: dict[str, list[float]], name: str) -> str:
    """Median, range, and the median over the server's."""
    median, floor = statistics.median(found[name]), statistics.median(found["server"])
    return f"{median:.2f} ({min(found[name]):.2f} – {max(found[name]):.2f}) | {median / floor:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--params", type=float, default=1e9)
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s; 0 is as fast as it goes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        root = Path(folder).resolve()
        make_pair(root, arguments.params)
        command = [sys.executable, "-c", _HUB, str(arguments.rate), str(root)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:  # fmt: skip
            try:
                found, peak = run(root, hub, arguments.runs)
            finally:
                hub.kill()
        sizes = sorted(path.stat().st_size for path in (root / "out").glob("*.safetensors"))
        print(report(found))
        print(
            f"{len(sizes)} shards, peak of the disk {peak / sum(sizes[-2:]):.3f} of the two largest"
        )


if __name__ == "__main__":
    main()
