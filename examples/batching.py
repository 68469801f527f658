"""Batches out of concurrent requests: a queue of texts, and one worker thread that classifies them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Batcher", "Counts", "QueueFull"]

Classify = Callable[[Sequence[str]], list[Any]]


class QueueFull(Exception):
    """More texts wait than the queue takes."""


@dataclass
class Counts:
    """What a batcher did since it began; times in seconds."""

    texts: int = 0
    batches: int = 0
    failures: int = 0
    refused: int = 0
    waited: float = 0.0
    computed: float = 0.0


@dataclass
class _Item:
    text: str
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """One worker thread loads a classifier and computes all batches. The event loop never waits for it.

    Args:
        load: makes the classifier; called in the worker thread.
        max_batch: most texts of one batch.
        max_wait: longest time in seconds that a text waits for others, while the worker is idle.
        max_queue: most texts that may wait.
    """

    def __init__(self, load: Callable[[], Classify], max_batch: int, max_wait: float, max_queue: int) -> None:
        self._load, self._max_batch, self._max_wait, self._max_queue = load, max_batch, max_wait, max_queue
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="classifier")
        self._waiting: deque[_Item] = deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._open = False
        self.counts = Counts()
        self.classify: Any = None

    @property
    def ready(self) -> bool:
        """Whether a text that comes now would be answered."""
        return self._open and len(self._waiting) < self._max_queue

    @property
    def waiting(self) -> int:
        """The number of texts that wait."""
        return len(self._waiting)

    async def start(self) -> None:
        """Load the classifier in the worker thread, and begin to answer."""
        self.classify = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)
        self._open = True
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Answer what waits, take nothing more, and end the worker thread."""
        self._open = False
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._worker.shutdown(wait=True)

    async def submit(self, texts: Sequence[str]) -> list[Any]:
        """Return the answers to some texts.

        Raises:
            QueueFull: too many wait already, or the server is about to end.
        """
        if not self._open or len(self._waiting) + len(texts) > self._max_queue:
            self.counts.refused += 1
            raise QueueFull
        loop = asyncio.get_running_loop()
        items = [_Item(text, loop.create_future()) for text in texts]
        self._waiting.extend(items)
        self._arrived.set()
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        return await asyncio.gather(*(item.answer for item in items))

    async def _run(self) -> None:
        while self._open or self._waiting:
            await self._arrived.wait()
            # Events lose nothing when a wait is given up, as a queue's get would in older Pythons.
            if len(self._waiting) < self._max_batch and self._open:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._max_wait)
            await self._answer(self._take())

    def _take(self) -> list[_Item]:
        count = min(len(self._waiting), self._max_batch)
        taken = [self._waiting.popleft() for _ in range(count)]
        if not self._waiting:
            self._arrived.clear()
        if len(self._waiting) < self._max_batch:
            self._full.clear()
        return [item for item in taken if not item.answer.cancelled()]

    async def _answer(self, batch: list[_Item]) -> None:
        if not batch:
            return
        start = time.perf_counter()
        self.counts.waited += sum(start - item.since for item in batch)
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._worker, self.classify, [item.text for item in batch])
        except Exception as error:
            self.counts.failures += 1
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        self.counts.computed += time.perf_counter() - start
        self.counts.batches += 1
        self.counts.texts += len(batch)
        for item, answer in zip(batch, answers):
            if not item.answer.done():
                item.answer.set_result(answer)
