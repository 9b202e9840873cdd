"""Several requests at once: one step of the model is for all of them."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from sapo.rollout.local.engine import RowsInPlace
from sapo.workflows.serving.worker import Worker
from support.served import complete, endless, served_here


def test_requests_that_come_together_share_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = RowsInPlace.step

    def counted(rows: RowsInPlace) -> None:
        steps.append(rows.active)
        step(rows)

    worker, held, begin = Worker(8), threading.Event(), threading.Event()
    bodies = [  # each by settings and of a length of its own
        {"prompt": "1+1="[: 1 + n % 4], "seed": n, "temperature": 0.5 + n / 4, "max_tokens": 20} for n in range(6)
    ]
    with served_here(endless(), worker=worker) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        alone = [complete(client, **body).json()["choices"] for body in bodies]
        monkeypatch.setattr(RowsInPlace, "step", counted)

        def wait():
            held.set()
            yield begin.wait(60)

        worker.submit(wait, lambda value: None)  # the worker takes nothing until all have come
        assert held.wait(60)
        together = [[] for _ in bodies]
        ask = lambda number: together[number].extend(complete(client, **bodies[number]).json()["choices"])  # noqa: E731
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while worker.waiting < len(bodies):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begin.set()
        for thread in threads:
            thread.join(60)
    assert together == alone, "the same tokens, whatever else is drawn"
    assert steps == [6] * 20
