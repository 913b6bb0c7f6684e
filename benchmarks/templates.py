"""What a template may cost that renders without end: wall time, and the memory of `expo verify` and all its children.

python benchmarks/templates.py [CASE ...]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.openchat import TEMPLATE, write_model

CASES = {
    "honest": TEMPLATE,
    "100 MB": "{{ 'x' * 100000000 }}",
    "100 MB in pieces": "{% for i in range(10000) %}{{ 'x' * 10000 }}{% endfor %}",
    "4 GB": "{{ 'x' * 4000000000 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


def tree(root: int) -> dict[int, int]:
    """Resident bytes of a process and all that it has started."""
    parents, resident = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        pid = int(status.parent.name)
        parents[pid], resident[pid] = (
            int(fields["PPid"]),
            int(fields.get("VmRSS", "0 kB").split()[0]) << 10,
        )
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: resident.get(pid, 0) for pid in found}


def measure(folder: Path, aligned: Path) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "expo", "verify", str(folder), "--against", str(aligned)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    own = children = 0
    while process.poll() is None:
        now = tree(process.pid)
        own = max(own, now.pop(process.pid, 0))
        children = max(children, sum(now.values()))
        time.sleep(0.05)
    said = process.stdout.read() if process.stdout else ""
    print(
        f"  {time.monotonic() - start:6.1f} s, parent {own / 1e9:.2f} GB, children {children / 1e9:.2f} GB, exit {process.returncode}"
    )
    for line in said.splitlines()[1:8]:
        if line.startswith(("error", "warning", " ")):
            print(f"    {line[:200]}")


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        aligned = write_model(Path(place) / "aligned")
        for name in sys.argv[1:] or CASES:
            print(name, flush=True)
            out = write_model(Path(place) / name.replace(" ", "-"))
            for folder in (out, aligned):
                (folder / "chat_template.jinja").write_text(CASES[name])
            measure(out, aligned)


if __name__ == "__main__":
    main()
