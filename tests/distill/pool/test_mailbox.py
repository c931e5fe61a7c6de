"""Letters arrive once and in order, whatever happens to the calls that carry them."""

from __future__ import annotations

import random
import threading
import time

import pytest

from genssd.distill.pool.mailbox import Letter, Mailbox


def read_all(mailbox: Mailbox) -> list[object]:
    messages = []
    while mailbox.poll(0.0):
        messages.append(mailbox.receive())
    return messages


@pytest.mark.parametrize("seed", range(20))
def test_calls_that_are_lost_repeated_or_late_change_nothing(seed: int) -> None:
    draw = random.Random(seed)
    ends = Mailbox(), Mailbox()
    posted: tuple[list[int], list[int]] = ([], [])
    read: tuple[list[object], list[object]] = ([], [])
    under_way: list[tuple[int, int, list[Letter]]] = []
    for step in range(400):
        side = draw.randrange(2)
        if step < 200 and draw.random() < 0.5:
            posted[side].append(step)
            ends[side].post(step)
        under_way.append((1 - side, ends[side].num_received, ends[side].list_posted()))
        if draw.random() < 0.6:  # any call arrives, an old one too, and may arrive again
            place = draw.randrange(len(under_way))
            target, confirmed, letters = under_way[place] if draw.random() < 0.3 else under_way.pop(place)
            ends[target].take_in(confirmed, letters)
            read[target].extend(read_all(ends[target]))
    for side in (0, 1, 0):  # and at last calls that are not lost
        ends[1 - side].take_in(ends[side].num_received, ends[side].list_posted())
        read[1 - side].extend(read_all(ends[1 - side]))
    assert read[1] == posted[0]
    assert read[0] == posted[1]
    assert not ends[0].list_posted() or not ends[1].list_posted()


def test_a_message_is_kept_as_it_was_when_it_was_posted() -> None:
    one, other = Mailbox(), Mailbox()
    counts = [1]
    one.post(counts)
    counts.append(2)
    other.take_in(0, one.list_posted())
    assert read_all(other) == [[1]]


def test_a_later_call_ends_the_wait_of_an_earlier_one() -> None:
    mailbox = Mailbox()
    replies: list[list[Letter]] = []
    waiting = threading.Thread(target=lambda: replies.append(mailbox.await_posted(60.0)))
    waiting.start()
    while mailbox._turn == 0:
        time.sleep(0.001)
    assert mailbox.await_posted(0.0) == []
    waiting.join(30.0)
    assert replies == [[]]
    mailbox.post("late")
    assert [number for number, _ in mailbox.await_posted(60.0)] == [1]
