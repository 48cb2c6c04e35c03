"""Programs that take turns of a few steps each, so that a busy machine treats them alike."""

import threading
import time
from collections.abc import Callable
from typing import Any

Tick = Callable[[], None]


class Turns:
    """Runs sides, each in a thread, one at a time; each calls ``tick`` after every step of its work."""

    def __init__(self, sides: dict[str, Callable[[Tick], Any]], steps: int = 4) -> None:
        self.sides, self.steps = sides, steps
        self.seconds = dict.fromkeys(sides, 0.0)
        self.cpu_seconds = dict.fromkeys(sides, 0.0)
        self.results: dict[str, Any] = {}
        self._running = list(sides)
        self._turn = threading.Condition()
        self._error: BaseException | None = None

    def run(self) -> "Turns":
        """Until all sides have ended."""
        threads = [threading.Thread(target=self._side, args=(name,)) for name in self.sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error:
            raise self._error
        return self

    def _side(self, name: str) -> None:
        clock = _Clock(self, name)
        try:
            clock.wait()
            self.results[name] = self.sides[name](clock.tick)
        except BaseException as error:
            self._error = error
        finally:
            clock.stop()
            with self._turn:
                self._next()
                self._running.remove(name)
                self._turn.notify_all()

    def _next(self) -> None:
        """The first in line goes to its end."""
        self._running.append(self._running.pop(0))


class _Clock:
    """One side's time, while it is its turn."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns, self.name, self.ticks = turns, name, 0

    def wait(self) -> None:
        turns = self.turns
        with turns._turn:
            turns._turn.wait_for(lambda: turns._running[0] == self.name)
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.turns.seconds[self.name] += time.perf_counter() - self.started
        self.turns.cpu_seconds[self.name] += time.process_time() - self.cpu_started

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks % self.turns.steps or len(self.turns._running) == 1:
            return
        self.stop()
        with self.turns._turn:
            self.turns._next()
            self.turns._turn.notify_all()
        self.wait()
