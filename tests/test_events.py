"""Hints reach who waits for them, once for each topic, and are never lost between two looks."""

import asyncio

import pytest

from mlbox.events import GPUS, JOBS, Events, job_topic


async def test_a_hint_wakes_who_subscribed_to_its_topic_only() -> None:
    events = Events()
    with events.subscribe(JOBS, job_topic(12)) as mine, events.subscribe(GPUS) as others:
        taking = asyncio.create_task(mine.take())
        await asyncio.sleep(0)
        events.publish(job_topic(12))
        assert await taking == {"job:12"}
        assert await others.take(0) == frozenset()


async def test_many_hints_are_one_and_all_topics_are_named() -> None:
    events = Events()
    with events.subscribe(JOBS, GPUS) as changes:
        for _ in range(1000):
            events.publish(JOBS, GPUS, job_topic(1))
        assert await changes.take(0) == {JOBS, GPUS}
        assert await changes.take(0) == frozenset()


async def test_a_hint_that_comes_between_two_looks_is_kept() -> None:
    events = Events()
    with events.subscribe(JOBS) as changes:
        events.publish(JOBS)
        assert await changes.take() == {JOBS}
        events.publish(JOBS)
        assert await changes.take() == {JOBS}


async def test_a_cancelled_look_loses_no_hint() -> None:
    events = Events()
    with events.subscribe(JOBS) as changes:
        taking = asyncio.create_task(changes.take())
        await asyncio.sleep(0)
        events.publish(JOBS)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        assert await changes.take(0) == {JOBS}


async def test_every_subscriber_has_its_own_hints() -> None:
    events = Events()
    with events.subscribe(JOBS) as one:
        with events.subscribe(JOBS, JOBS) as two:
            events.publish(JOBS)
            assert await one.take(0) == await two.take(0) == {JOBS}
        events.publish(JOBS)
        assert await two.take(0) == frozenset()
        assert await one.take(0) == {JOBS}


async def test_nobody_listens_after_the_block_even_when_it_failed() -> None:
    events = Events()
    with pytest.raises(ValueError, match="bad"), events.subscribe(JOBS, GPUS):
        raise ValueError("bad")
    events.publish(JOBS, GPUS)
    assert not events._subscriptions, "a follower that is gone costs nothing"
