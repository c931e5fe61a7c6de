"""One end of a connection whose calls may fail, be made again, or overtake each other: letters arrive once, in order.

Each end numbers what it posts, and keeps it until the other end says that it has it. What comes a second time is
dropped, what comes too early is left to be sent again.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Sequence

Letter = tuple[int, bytes]
"""A number, counted from 1 by its sender, and the pickle of a message."""


class Mailbox:
    """What one end has posted and received. Any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._posted: deque[Letter] = deque()
        """What the other end has not confirmed, in order."""
        self._num_posted = 0
        self._num_received = 0
        self._arrived: deque[object] = deque()
        self._turn = 0

    @property
    def num_received(self) -> int:
        """Number of the last letter that has arrived."""
        return self._num_received

    def post(self, message: object) -> None:
        """Number a message and keep it until the other end has it. It is pickled at once, as it is now."""
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._changed:
            self._num_posted += 1
            self._posted.append((self._num_posted, content))
            self._changed.notify_all()

    def list_posted(self) -> list[Letter]:
        """Return the letters that the other end has not confirmed, in order."""
        with self._changed:
            return list(self._posted)

    def await_posted(self, timeout: float) -> list[Letter]:
        """Return the letters that the other end has not confirmed, after waiting for one.

        timeout: seconds after which there may be none. A later call of this method ends the wait of an earlier one,
        which returns nothing.
        """
        with self._changed:
            self._turn += 1
            turn = self._turn
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn != turn or self._posted, timeout)
            return list(self._posted) if self._turn == turn else []

    def take_in(self, confirmed: int, letters: Sequence[Letter]) -> None:
        """Take what the other end has sent: the number of the last letter that it has, and its own letters."""
        with self._changed:
            while self._posted and self._posted[0][0] <= confirmed:
                self._posted.popleft()
            for number, content in letters:
                if number == self._num_received + 1:
                    self._num_received = number
                    self._arrived.append(pickle.loads(content))  # of our own processes alone
            self._changed.notify_all()

    def receive(self) -> object:
        """Wait for a message and return it."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived)
            return self._arrived.popleft()

    def poll(self, timeout: float) -> bool:
        """Return whether a message has arrived, after waiting for one for at most `timeout` seconds."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._arrived, timeout))
