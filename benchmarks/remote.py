"""How fast weights are read by range, against what the server gives and a merge of local files.

    python -m benchmarks.remote --params 2.5e8 --latency-ms 0

A server on loopback sends files with sendfile, each answer after the latency. `server` reads every byte of the
pair with as many connections as expo does, and does nothing with them. All are whole processes, interleaved,
warm, medians of `--runs`; every output is compared with the local one.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.merge import Measured, make_pair, measure
from tests.hub_server import Hub

_SERVER = "import sys; from benchmarks.remote import serve; serve(sys.argv[1], float(sys.argv[2]))"
_FLOOR = "import sys; from benchmarks.remote import drain; drain(sys.argv[1], sys.argv[2:])"


def serve(root: str, latency: float) -> None:
    """Serve the folders below `root`, also at the paths that a Hub redirects to; the port goes to stdout."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            time.sleep(latency)
            name = re.sub(r"^/org/([^/]+)/resolve/[^/]+/", r"/\1/", self.path.split("?")[0])
            path = Path(root + name)
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            begin, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("ETag", f'"{size}"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2026 07:28:00 GMT")
            self.end_headers()
            self.wfile.flush()
            with path.open("rb") as file:
                while begin < end and self.command == "GET":
                    begin += os.sendfile(
                        self.connection.fileno(), file.fileno(), begin, end - begin
                    )

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def drain(address: str, files: list[str]) -> None:
    """Read files (`path:bytes`) by ranges, with as many connections as expo opens."""
    import http.client
    import threading

    from expo.planning.reads import REQUEST_BYTES, REQUESTS

    sizes = {path: int(size) for path, _, size in (file.rpartition(":") for file in files)}
    ranges = iter([(p, at, min(at + REQUEST_BYTES, n)) for p, n in sizes.items() for at in range(0, n, REQUEST_BYTES)])  # fmt: skip
    lock = threading.Lock()

    def loop() -> None:
        connection, room = http.client.HTTPConnection(address), bytearray(REQUEST_BYTES)
        while True:
            with lock:
                one = next(ranges, None)
            if one is None:
                return
            connection.request("GET", one[0], headers={"Range": f"bytes={one[1]}-{one[2] - 1}"})
            response, view = connection.getresponse(), memoryview(room)
            while count := response.readinto(view):
                view = view[count:]

    threads = [threading.Thread(target=loop) for _ in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(root: Path, port: int, runs: int) -> dict[str, list[Measured]]:
    files = [f"/{path.relative_to(root)}:{path.stat().st_size}"
             for name in ("sft", "aligned") for path in sorted((root / name).glob("*.safetensors"))]  # fmt: skip
    store = f"http://127.0.0.1:{port}"
    hub = Hub({"org/sft": root / "sft", "org/aligned": root / "aligned"})
    hub.redirects_to = store
    hub.start()
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def expo(sft: object, aligned: object, *more: str) -> list[str]:
        how = ["--alpha", "1.5", "--no-verify", "-q", "--overwrite", *more]
        return [sys.executable, "-m", "expo", "extrapolate", str(sft), str(aligned), str(root / "out"), *how]  # fmt: skip

    variants: dict[str, Callable[[], list[str]]] = {
        "server": lambda: [sys.executable, "-c", _FLOOR, f"127.0.0.1:{port}", *files],
        "expo: local": lambda: expo(root / "sft", root / "aligned"),
        "expo: store": lambda: expo(f"{store}/sft", f"{store}/aligned"),
        "expo: Hub": lambda: expo("org/sft", "org/aligned", "--stream-inputs"),
    }
    found: dict[str, list[Measured]] = {name: [] for name in variants}
    local: dict[str, bytes] = {}
    for _ in range(runs):
        for name, command in variants.items():
            found[name].append(measure(name, command()))
            if name.startswith("expo"):
                written = {p.name: p.read_bytes() for p in (root / "out").glob("*.safetensors")}
                local = local or written
                assert written == local, name
    return found


def report(found: dict[str, list[Measured]], read_bytes: int) -> str:
    lines = [
        "| variant | wall, s | read, GB/s | CPU s | peak anonymous MB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        walls = [one.wall for one in runs]
        wall = statistics.median(walls)
        lines.append(
            f"| {name} | {wall:.2f} ({min(walls):.2f} – {max(walls):.2f}) | {read_bytes / wall / 1e9:.2f} "
            f"| {statistics.median(one.cpu for one in runs):.2f} | {max(one.anonymous for one in runs) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--params", type=float, default=2.5e8)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        root = Path(folder)
        make_pair(root, arguments.params)
        command = [sys.executable, "-c", _SERVER, folder, str(arguments.latency_ms / 1000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                found = run(root, int(server.stdout.readline()), arguments.runs)
            finally:
                server.kill()
        pair = (*(root / "sft").glob("*.safetensors"), *(root / "aligned").glob("*.safetensors"))
        print(report(found, sum(path.stat().st_size for path in pair)))


if __name__ == "__main__":
    main()
