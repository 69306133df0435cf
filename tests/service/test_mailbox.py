"""What other threads hand over to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time

from guardserve.service.mailbox import Mailbox

THREADS, ITEMS = 4, 2000


async def until(done: threading.Event, seconds: float = 20) -> None:
    """Let the event loop run until something has happened."""
    end = time.monotonic() + seconds
    while not done.is_set():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def test_everything_is_taken_once_in_the_order_of_each_thread_on_the_loop() -> None:
    """However many threads put however much at a time."""
    taken: list[tuple[int, int]] = []
    everything, threads_of_taker = threading.Event(), set()

    def take(item: tuple[int, int]) -> None:
        taken.append(item)
        threads_of_taker.add(threading.get_ident())
        if len(taken) == THREADS * ITEMS:
            everything.set()

    async def main() -> None:
        mailbox = Mailbox(take)

        def put(thread: int) -> None:
            for item in range(ITEMS):
                mailbox.put((thread, item))
                if item % 50 == 0:
                    time.sleep(0)

        threads = [threading.Thread(target=put, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        await until(everything)
        for thread in threads:
            thread.join()
        mailbox.close()

    asyncio.run(main())
    assert threads_of_taker == {threading.get_ident()}
    assert sorted(taken) == [(i, j) for i in range(THREADS) for j in range(ITEMS)]
    for i in range(THREADS):
        assert [item for thread, item in taken if thread == i] == list(range(ITEMS))


def test_what_is_put_while_others_are_taken_is_taken_too() -> None:
    """By whoever takes them, also where that fails."""
    taken: list[int] = []
    end = threading.Event()

    async def main() -> None:
        def take(item: int) -> None:
            taken.append(item)
            if item < 3:
                mailbox.put(item + 1)
            if item == 1:
                raise ValueError("of the taker")
            if item == 5:
                end.set()

        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
        mailbox = Mailbox(take)
        mailbox.put(0)
        await asyncio.sleep(0.05)
        mailbox.put(5)
        await until(end)
        mailbox.close()

    asyncio.run(main())
    assert taken == [0, 1, 2, 3, 5]


def test_a_closed_mailbox_has_been_emptied_and_takes_nothing() -> None:
    """Whoever still puts something in it is not told."""
    taken: list[int] = []

    async def main() -> Mailbox[int]:
        mailbox = Mailbox(taken.append)
        mailbox.put(1)
        mailbox.close()
        mailbox.put(2)
        mailbox.close()
        await asyncio.sleep(0)
        return mailbox

    asyncio.run(main()).put(3)
    assert taken == [1]
