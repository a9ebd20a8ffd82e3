"""The storm itself: strikes the victims of its plan at their moments, and brings up replacements, while a job runs."""

from __future__ import annotations

import logging
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import psutil
from botocore.exceptions import BotoCoreError, ClientError

from tests.chaos.onlooker import Onlooker
from tests.chaos.plan import Moment, Strike, moment_of
from tests.chaos.scene import CORPUS, Scene, is_reader, is_worker
from tests.support.faulty_proxy import When
from tests.support.job import RunningJob, start_job
from tests.support.waiting import wait_until

log = logging.getLogger(__name__)

SLACK = 8
"""Shards that may be put ahead of a strike: the proxy holds further ones back, so that none comes too late on a fast machine."""
STORM_SECONDS = 900
RESUMED_BY_RUNNING_AGAIN = {1, 3, 128 + signal.SIGKILL}
"""Exit codes after which a pipeline starts the job again: crashed, finished with failed units, killed."""


class Storm:
    """Rages over one output of a scene; `run` is all there is to do."""

    def __init__(self, scene: Scene, output: str, plan: Sequence[Strike], seed: int) -> None:
        self._scene = scene
        self._output = output
        self._plan = plan
        self._choose = random.Random(seed)
        self._driver: RunningJob | None = None
        self._changed = threading.Condition()
        self._armed: Strike | None = None
        self._limit = SLACK
        self._begun: set[str] = set()
        """Shards whose put was let through."""
        self._committed: set[str] = set()
        self._over = threading.Event()
        self.onlooker = Onlooker(scene.store.server.client(), scene.bucket, output)
        self.struck: list[Strike] = []
        self.exit_codes: list[int] = []
        self.puts = Counter[str]()
        """Times that each shard was put."""

    def run(self) -> None:
        """Start the job again and again, as a pipeline would, until it is complete and every blow has fallen.

        Raises:
            AssertionError: a run ended as none may end, or completed before the storm was over.
        """
        self._scene.proxy.watchers.append(self._watch)
        try:
            with ThreadPoolExecutor(1) as pool, self.onlooker.watching():
                raging = pool.submit(self._rage)
                raging.add_done_callback(lambda _: self._tell(limit=self._scene.units))  # also where it failed, so that the run can end
                try:
                    while self._start() != 0:
                        pass
                finally:
                    self._over.set()
                    self._tell(limit=self._scene.units)
                raging.result()
        finally:
            self._scene.proxy.watchers.remove(self._watch)
        self.onlooker.look_round()
        left = [str(strike) for strike in self._plan[len(self.struck) :]]
        assert not left, f"the run was complete before these blows fell: {left}"

    def _start(self) -> int:
        with start_job(*self._scene.command(self._output), env=self._scene.environment()) as job:
            self._driver = job
            result = job.wait(STORM_SECONDS)
            self._driver = None
        self.exit_codes.append(result.exit_code)
        log.info("a run ended with exit code %d", result.exit_code)
        story = f"{self.exit_codes} after {[str(strike) for strike in self.struck]}:\n{result.stderr[-4000:]}"
        assert result.exit_code in {0, *RESUMED_BY_RUNNING_AGAIN}, f"a run may not end so: {story}"
        assert len(self.exit_codes) < 2 * len(self._plan) + 5, f"no end in sight: {story}"
        return result.exit_code

    def _tell(self, *, limit: int) -> None:
        """Let so many shards be put, and see who waits for it."""
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over.is_set() or condition(), STORM_SECONDS)

    def _wait_for_shards(self, count: int) -> None:
        self._wait_for(lambda: len(self._committed) >= count)

    # The strikes, one after the other.

    def _rage(self) -> None:
        for strike in self._plan:
            self._tell(limit=strike.after_shards + SLACK if strike.moment == "at random" else self._scene.units)
            self._wait_for_shards(strike.after_shards)
            if not (self._strike_at_random(strike) if strike.moment == "at random" else self._strike_when_it_comes(strike)):
                return
            self.struck.append(strike)
            log.info("%d of %d: %s, %d shards are there", len(self.struck), len(self._plan), strike, len(self._committed))
            self._repair(strike)

    def _strike_at_random(self, strike: Strike) -> bool:
        """Whether it was struck before the end."""
        if self._over.wait(strike.wait):
            return False
        self._hit(strike, self._someone(strike))
        return True

    def _strike_when_it_comes(self, strike: Strike) -> bool:
        """Leave it to the request whose moment it is; whether one came before the end."""
        with self._changed:
            self._armed = strike
        self._wait_for(lambda: self._armed is None)
        with self._changed:
            missed, self._armed = self._armed is not None, None
        return not missed

    def _someone(self, strike: Strike) -> psutil.Process | None:
        """A victim for a blow at random, waited for: it may be about to be started."""
        if strike.victim == "driver":
            self._alive_driver()
        if strike.victim in ("worker", "node"):
            workers = wait_until(self._workers, seconds=STORM_SECONDS, what="a worker")
            return self._choose.choice(sorted(workers, key=lambda each: each.pid))
        return None

    def _workers(self) -> list[psutil.Process]:
        return [each for each in self._scene.nodes.processes() if is_worker(each)]

    def _alive_driver(self) -> RunningJob:
        def alive() -> list[RunningJob]:
            return [job for job in [self._driver] if job and job.process.poll() is None]

        return wait_until(alive, seconds=STORM_SECONDS, what="a driver")[0]

    def _hit(self, strike: Strike, process: psutil.Process | None) -> None:
        match strike.victim:
            case "driver":
                self._alive_driver().process.kill()
            case "worker" | "reader":
                assert process
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            case "node":
                self._scene.nodes.kill_node(self._scene.node_of(process))
            case "store":
                self._scene.store.kill()
            case "suspended store":
                self._scene.store.suspend()

    def _repair(self, strike: Strike) -> None:
        match strike.victim:
            case "node":
                self._scene.nodes.add_node()
            case "store":
                self._over.wait(strike.outage)
                self._scene.store.start_again()
                wait_until(self._scene.store.server.is_ready, seconds=STORM_SECONDS, what="the store to be back")
            case "suspended store":
                self._over.wait(strike.outage)
                self._scene.store.resume()

    # What the proxy tells, in the threads of the requests.

    def _watch(self, when: When, method: str, url: str) -> None:
        moment = moment_of(when, method, url, f"{self._scene.bucket}/{self._output}", f"{self._scene.bucket}/{CORPUS}")
        if moment is None:
            return
        name = urlsplit(url).path.partition(f"/{self._output}/")[2]
        if moment == "before the put":
            self._hold_back(name)
        if moment == "after the put" and self._scene.proxy.exchange.status == 200:
            with suppress(BotoCoreError, ClientError):
                self.onlooker.look_at(name)
            with self._changed:
                self.puts[name] += 1
                self._committed.add(name)
                self._changed.notify_all()
        self._strike(moment)

    def _hold_back(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over.is_set() or name in self._begun or len(self._begun) < self._limit, STORM_SECONDS)
            self._begun.add(name)

    def _is_victim(self, strike: Strike, asking: psutil.Process | None) -> bool:
        """Whether the process that asks is the one to strike; others than readers and workers are struck whoever asks."""
        if strike.victim == "driver":
            return self._driver is not None and self._driver.process.poll() is None
        kind = {"reader": is_reader, "worker": is_worker}.get(strike.victim)
        return kind is None or (asking is not None and kind(asking))

    def _strike(self, moment: Moment) -> None:
        """If this is the moment of the armed strike: strike, and lose the request where its sender or receiver is the victim.

        Raises:
            ConnectionError: to the proxy, so that it loses the request or its answer.
        """
        with self._changed:
            strike = self._armed
            if strike is None or strike.moment != moment:
                return
            process = self._scene.asking()
            if not self._is_victim(strike, process):
                return
            self._hit(strike, process)
            self._armed = None
            self._changed.notify_all()
        asked_by_victim = strike.victim in ("reader", "worker") or (strike.victim == "driver" and "put" not in moment)
        if asked_by_victim or strike.victim == "store":
            raise ConnectionResetError
