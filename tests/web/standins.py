"""What a scheduler plans, for tests of what the web makes of it."""

from mlbox.scheduler.timeline import Bar, Kind, Lane, Timeline

HOUR = 3600.0


def lab_plan(now: float, me: str = "me") -> Timeline:
    """An afternoon of four GPUs: what ran, runs, is planned, reserved and taken from outside."""

    def bar(
        kind: Kind, start: float, end: float | None, job: int | None = None, user: str = "alice", name: str = ""
    ) -> Bar:
        return Bar(
            kind=kind,
            job_id=job,
            user=user,
            name=name or f"train-{job}",
            starts_at=now + start * HOUR,
            ends_at=None if end is None else now + end * HOUR,
        )

    many = [bar("past", -3.6 + 0.02 * at, -3.6 + 0.02 * at + 0.015, 100 + at) for at in range(40)]
    lanes = [
        [bar("past", -5, -2.6, 1, me), bar("running", -2.4, 1.2, 5, me, "resnet-sweep"), bar("planned", 1.2, 4, 9)],
        [*many, bar("running", -0.8, 0.7, 6, "bob", "bert"), bar("planned", 0.7, 2.1, 8, "carol"),
         bar("planned", 2.1, 4, 10, me, "llm-eval")],
        [bar("past", -6, -4, 2, "bob"), bar("foreign", -2, 0.1, None, "dave", "python"),
         bar("planned", 0.7, 2.1, 8, "carol"), bar("reserved", 2.5, 9, None, "", "maintenance")],
        [bar("running", -1.2, 0.6, 7, "carol", "part"), bar("running", -0.5, None, 11, me, "notebook"),
         bar("planned", 0.7, 1.9, 12, "bob")],
    ]  # fmt: skip
    return Timeline(
        now=now,
        starts_at=now - 4 * HOUR,
        ends_at=now + 8 * HOUR,
        lanes=tuple(
            Lane(gpu_uuid=f"GPU-{index}", index=index, label=str(index), bars=tuple(bars))
            for index, bars in enumerate(lanes)
        ),
    )
