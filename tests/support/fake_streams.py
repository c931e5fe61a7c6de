"""A model of CUDA streams for the fake device: who has waited for whom, and which uses of memory race.

Every stream has a clock: for each stream, how many of its operations are done before the stream's next one begins.
Events and waits copy clocks as a device does, and what the host waited for is done before all that it queues later. Two
uses of one storage race where they are on different streams and neither is known to be done before the other. So does
the end of a storage's life with a use on another stream than that which allocated it, unless `record_stream` told the
allocator: it hands the memory on at once, to the next operation of the stream that allocated it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


class StreamRace(RuntimeError):
    """Error raised where two streams use the same memory and neither has waited for the other."""


Clock = dict[int, int]
"""Number of operations that are done, by the number of their stream."""


class Stream:
    """A stand-in for torch.cuda.Stream."""

    def __init__(self, streams: Streams, number: int) -> None:
        self._streams = streams
        self.number = number
        self.clock: Clock = {}
        self.cuda_stream = number

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._streams)
        event.clock = dict(self.clock)
        return event

    def wait_event(self, event: Event) -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        merge(self.clock, other.clock)

    def synchronize(self) -> None:
        merge(self._streams.host, self.clock)


class Event:
    """A stand-in for torch.cuda.Event. arrives: whether a query says that the event has come."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or self._streams.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._streams.current).wait_event(self)

    def query(self) -> bool:
        if self._streams.arrives():
            merge(self._streams.host, self.clock)
            return True
        return False

    def synchronize(self) -> None:
        self._streams.waits += 1
        merge(self._streams.host, self.clock)

    def elapsed_time(self, _: Event) -> float:
        return 1e3


def merge(clock: Clock, other: Clock) -> None:
    for number, count in other.items():
        clock[number] = max(clock.get(number, 0), count)


@dataclass
class _Memory:
    """The uses of a storage: the last operation on each stream, and the streams that the allocator knows of."""

    owner: int
    uses: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Streams:
    """The streams of a device, and the uses of its storages by number."""

    def __init__(self) -> None:
        self.host: Clock = {}
        self.current = Stream(self, 0)
        self._streams = [self.current]
        self._memories: dict[int, _Memory] = {}
        self.used: set[int] = set()
        """Numbers of the streams on which something ran."""
        self.queries = 0
        self.waits = 0
        """Number of times that the host has waited for an event."""

    def arrives(self) -> bool:
        """Whether an event has come when it is asked for: every third time."""
        self.queries += 1
        return self.queries % 3 == 0

    def make(self) -> Stream:
        self._streams.append(Stream(self, len(self._streams)))
        return self._streams[-1]

    @contextlib.contextmanager
    def enter(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self) -> None:
        """Let the host wait for all streams."""
        for stream in self._streams:
            stream.synchronize()

    def read(self, storage: int) -> None:
        """Let the host wait for the current stream and read a storage. Raises StreamRace as `use` does."""
        self.use([storage], "a read by the host")
        self.current.synchronize()

    def use(self, storages: list[int], what: str) -> None:
        """Run an operation on the current stream that reads or writes some storages. Raises StreamRace."""
        stream = self.current
        merge(stream.clock, self.host)
        count = stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        self.used.add(stream.number)
        for storage in storages:
            memory = self._memories.setdefault(storage, _Memory(stream.number))
            for other, done in memory.uses.items():
                if stream.clock.get(other, 0) < done:
                    raise StreamRace(f"{what} on stream {stream.number} uses memory that stream {other} still uses")
            memory.uses[stream.number] = count

    def record(self, storage: int, stream: Stream) -> None:
        """Note what `Tensor.record_stream` tells the allocator."""
        if storage in self._memories:
            self._memories[storage].recorded.add(stream.number)

    def free(self, storage: int) -> None:
        """End the life of a storage. Raises StreamRace where another stream than the allocator's may still use it."""
        memory = self._memories.pop(storage, None)
        if memory is None:
            return
        clock = dict(self.host)
        merge(clock, self._streams[memory.owner].clock)
        for stream, done in memory.uses.items():
            if stream != memory.owner and stream not in memory.recorded and clock.get(stream, 0) < done:
                raise StreamRace(f"memory of stream {memory.owner} is freed while stream {stream} uses it")
