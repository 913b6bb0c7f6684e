"""The Hub as the sink of a merge: a staging directory whose shards go on to the Hub and then leave this disk."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from expo.checkpoint.sidecars import MANIFEST
from expo.compute.stream import Progress, Tuning, stream
from expo.output.durable import write_file
from expo.output.journal import Fingerprint, Journal
from expo.output.manifest import Manifest
from expo.output.sink import FinishedShard
from expo.output.staging import Staging
from expo.output.writer import ShardWriter
from expo.planning.plan import Plan, ShardPlan
from expo.publishing.outgoing import Outgoing, outgoing
from expo.publishing.watch import watched
from expo.threads import Crew, Flow

AT_ONCE = 2
"""Shards on this disk at a time: one is written while the one before it is sent."""

_SENT = "sent.jsonl"


class HubSink(Staging):
    """A staging directory of which a shard goes on to the Hub when it is finished. A second journal says which ones
    the Hub has: only then are they removed here."""

    def __init__(self, place: Path, send: Callable[[Outgoing], None]) -> None:
        """Lock the directory that stands for `place`, which itself is never made.

        Args:
            send: returns when the Hub has the file.

        Raises:
            OutputError: another run is at work there, or the directory cannot be made.
        """
        super().__init__(place)
        self._send = send
        self._sent = Journal(self.folder / _SENT)
        self._here: list[FinishedShard] = []
        self._turns: Flow[None]
        self._finished: Flow[FinishedShard | None]

    def __enter__(self) -> "HubSink":
        return self

    def forget(self, lost: Callable[[Sequence[tuple[str, int]]], Collection[str]]) -> None:
        """Have those shards made again of which `lost` says that the Hub no longer holds them."""
        known = self._sent.read()
        if known is None or not known[1]:
            return
        gone = lost([(shard.sha256, shard.file_bytes) for shard in known[1]])
        if gone:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self._sent.start(Fingerprint(known[0]))
            for shard in known[1]:
                if shard.sha256 not in gone:
                    self._sent.append(shard)

    def resume(self, print_: Fingerprint) -> tuple[list[FinishedShard], str | None]:
        """As `Staging.resume`: the shards that the Hub has or that are still to be sent."""
        finished, reason = super().resume(print_)
        for left in self.folder.rglob("*.partial"):  # of a shard that may not come next
            left.unlink()
        known = self._sent.read()
        if known is None or known[0] != print_.parts:
            self._sent.start(print_)
            known = print_.parts, []
        self._sent.go_on(print_)
        sent = {shard.file: shard for shard in known[1]}
        for file in sent:
            (self.folder / file).unlink(missing_ok=True)
        here = {shard.file: shard for shard in finished if shard.file not in sent}
        self._here = list(here.values())
        return [*sent.values(), *self._here], reason

    def open(self, shard: ShardPlan) -> ShardWriter:
        """As `Staging.open`, when there are few enough of them."""
        self._turns.get()
        return super().open(shard)

    def record(self, shard: FinishedShard) -> None:
        """Enter a finished shard in the journal, and let it be sent."""
        super().record(shard)
        self._finished.put(shard)

    def complete_manifest(self, print_: Fingerprint) -> Manifest | None:
        """The manifest, if an earlier run of the same plan came to the commit."""
        manifest, sent = Manifest.of_folder(self.folder), self._sent.read()
        if manifest is None or sent is None or sent[0] != print_.parts:
            return None
        return manifest if manifest.plan == print_.digest else None

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: the Hub's commit, which is made of it, is what makes the output appear."""
        write_file(self.folder / MANIFEST, manifest.to_json().encode())

    def stream(
        self,
        plans: Sequence[Plan],
        sinks: Sequence[Staging],
        *,
        finished: Sequence[Sequence[FinishedShard]],
        tuning: Tuning,
        progress: Progress | None,
    ) -> list[list[FinishedShard]]:
        """As `expo.compute.stream.stream`, for one plan and this sink, while this thread sends: an interruption ends
        it at once.

        Args:
            progress: called with (bytes sent, bytes in all).
        """
        made: list[list[FinishedShard]] = []
        with Crew() as crew:
            self._begin(crew)

            def compute() -> None:
                def tick(_done: int, _total: int) -> None:
                    crew.pause(0)  # raises when the sending has failed

                made.extend(stream(plans, sinks, finished=finished, tuning=tuning, progress=tick))
                self._finished.put(None)

            crew.start(compute)
            self._send_all(plans[0], progress or (lambda _done, _total: None))
        return made

    def _begin(self, crew: Crew) -> None:
        """Queue what an earlier run has not sent, and give the other turns away."""
        self._turns, self._finished = crew.flow(), crew.flow()
        for shard in self._here:
            self._finished.put(shard)
        for _ in range(AT_ONCE - len(self._here)):
            self._turns.put(None)

    def _send_all(self, plan: Plan, tell: Progress) -> None:
        """Send what comes, until there is no more."""
        total, known = plan.write_bytes, self._sent.read()
        done = sum(shard.file_bytes for shard in known[1]) if known else 0
        tell(done, total)
        while (shard := self._finished.get()) is not None:
            path = self.folder / shard.file
            with watched(path, partial(_tell_of_part, tell, done, total)):
                self._send(outgoing(self.folder, shard.file, shard.sha256))
            self._sent.append(shard)
            path.unlink()
            self._turns.put(None)
            done += shard.file_bytes
            tell(done, total)


def _tell_of_part(tell: Progress, done: int, total: int, part: int) -> None:
    tell(min(done + part, total), total)
