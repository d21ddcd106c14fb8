"""Which versions of a model to load and which to drop. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlbox.serving.server.model_config import VersionPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one version stands."""

    present: bool
    """Its folder is there, or has been gone for a moment only."""
    settled: bool
    """Nobody is writing to it."""
    live: bool
    """Some content of it is served."""
    current: bool
    """That content is what the folder holds."""
    refused: bool
    """What the folder holds was tried and cannot be served."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Versions to load, to drop, and those that should be served but were refused; the highest first."""

    load: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()


def decide(policy: VersionPolicy, versions: Mapping[int, Standing]) -> Decision:
    """What to do about the versions of one model.

    The policy picks from those that are served or may be: a version that was refused leaves its place to the next
    lower one. What is served goes only when everything that is picked is served.
    """
    picked: list[int] = []
    passed: list[int] = []
    for number in sorted(versions, reverse=True):
        version = versions[number]
        if not version.present or (policy.versions is not None and number not in policy.versions):
            continue
        if policy.latest is not None and len(picked) == policy.latest:
            break
        if version.live or (version.settled and not version.refused):
            picked.append(number)
        else:
            passed.append(number)
    complete = all(versions[number].live for number in picked)
    replaced = complete and (bool(picked) or not passed)
    return Decision(
        load=tuple(
            number
            for number in picked
            if versions[number].settled and not versions[number].current and not versions[number].refused
        ),
        drop=tuple(
            number
            for number in sorted(versions, reverse=True)
            if versions[number].live and number not in picked and (replaced if versions[number].present else complete)
        ),
        refused=tuple(number for number in sorted([*picked, *passed], reverse=True) if versions[number].refused),
    )
