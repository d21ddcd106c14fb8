"""Which versions are loaded and dropped: the cases one can name, and what must hold in all of them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.serving.server.model_config import VersionPolicy
from mlbox.serving.server.versions import Decision, Standing, decide

LATEST = VersionPolicy()


def standing(what: str) -> Standing:
    """new, moving (being written), live, stale (live, other files settled), shaky (live, files moving), bad (refused,
    never live), spoilt (live, newest files refused), gone (live, folder vanished)."""
    return Standing(
        present=what != "gone",
        settled=what not in ("moving", "shaky"),
        live=what in ("live", "stale", "shaky", "spoilt", "gone"),
        current=what == "live",
        refused=what in ("bad", "spoilt"),
    )


def decided(policy: VersionPolicy = LATEST, **versions: str) -> Decision:
    return decide(policy, {int(name[1:]): standing(what) for name, what in versions.items()})


class TestCases:
    def test_nothing_there_nothing_done(self) -> None:
        assert decided() == Decision()

    def test_the_newest_is_loaded(self) -> None:
        assert decided(v1="new", v2="new") == Decision(load=(2,))

    def test_the_old_one_serves_until_the_new_one_does(self) -> None:
        assert decided(v1="live", v2="new") == Decision(load=(2,))
        assert decided(v1="live", v2="live") == Decision(drop=(1,))

    def test_a_refused_one_leaves_its_place_to_the_next(self) -> None:
        assert decided(v1="live", v2="bad") == Decision(refused=(2,))
        assert decided(v1="new", v2="bad") == Decision(load=(1,), refused=(2,))

    def test_one_that_is_being_written_waits_and_others_serve(self) -> None:
        assert decided(v1="live", v2="moving") == Decision()
        assert decided(v1="new", v2="moving") == Decision(load=(1,))

    def test_new_files_of_a_served_version_are_loaded_beside_it(self) -> None:
        assert decided(v1="stale") == Decision(load=(1,))
        assert decided(v1="shaky") == Decision()
        assert decided(v1="spoilt") == Decision(refused=(1,))

    def test_a_folder_that_is_gone_is_dropped_when_its_place_is_taken(self) -> None:
        assert decided(v2="gone") == Decision(drop=(2,))
        assert decided(v1="new", v2="gone") == Decision(load=(1,))
        assert decided(v1="live", v2="gone") == Decision(drop=(2,))
        assert decided(v1="bad", v2="gone") == Decision(drop=(2,), refused=(1,))

    def test_policies(self) -> None:
        assert decided(VersionPolicy(latest=2), v1="new", v2="new", v3="new").load == (3, 2)
        assert decided(VersionPolicy(latest=None), v1="new", v3="new").load == (3, 1)
        specific = VersionPolicy(latest=None, versions=frozenset({1}))
        assert decided(specific, v1="new", v2="new").load == (1,)
        assert decided(specific, v1="live", v2="live") == Decision(drop=(2,))

    def test_a_new_policy_whose_pick_does_not_serve_takes_nothing_away(self) -> None:
        specific = VersionPolicy(latest=None, versions=frozenset({2}))
        assert decided(specific, v1="live", v2="bad") == Decision(refused=(2,))
        assert decided(specific, v1="live", v2="moving") == Decision()


STANDINGS = st.sampled_from(["new", "moving", "live", "stale", "shaky", "bad", "spoilt", "gone"]).map(standing)
POLICIES = st.one_of(
    st.integers(1, 3).map(lambda count: VersionPolicy(latest=count)),
    st.just(VersionPolicy(latest=None)),
    st.frozensets(st.integers(1, 6), min_size=1).map(lambda some: VersionPolicy(latest=None, versions=some)),
)


class TestAlways:
    @given(POLICIES, st.dictionaries(st.integers(1, 6), STANDINGS))
    @settings(max_examples=1000)
    def test_nothing_is_dropped_before_what_replaces_it_serves(
        self, policy: VersionPolicy, versions: dict[int, Standing]
    ) -> None:
        decision = decide(policy, versions)
        wanted = {number: each for number, each in versions.items() if each.present and self._wanted(policy, number)}
        if any(versions[number].present for number in decision.drop) and wanted:
            assert any(each.live and number not in decision.drop for number, each in wanted.items())

    @given(POLICIES, st.dictionaries(st.integers(1, 6), STANDINGS))
    @settings(max_examples=1000)
    def test_only_what_is_at_rest_and_was_not_refused_is_loaded(
        self, policy: VersionPolicy, versions: dict[int, Standing]
    ) -> None:
        for number in decide(policy, versions).load:
            each = versions[number]
            assert each.present
            assert each.settled
            assert not each.current
            assert not each.refused
            assert self._wanted(policy, number)

    @given(POLICIES, st.dictionaries(st.integers(1, 6), STANDINGS))
    @settings(max_examples=500)
    def test_it_comes_to_an_end(self, policy: VersionPolicy, versions: dict[int, Standing]) -> None:
        """When every load succeeds and every drop is done, a few rounds later there is nothing left to do."""
        live = Standing(present=True, settled=True, live=True, current=True, refused=False)
        dropped = Standing(present=True, settled=True, live=False, current=False, refused=False)
        for _ in range(10):
            decision = decide(policy, versions)
            if not decision.load and not decision.drop:
                return
            for number in decision.load:
                versions[number] = live
            for number in decision.drop:
                if versions[number].present:
                    versions[number] = dropped
                else:
                    del versions[number]
        raise AssertionError("still something to do")

    @staticmethod
    def _wanted(policy: VersionPolicy, number: int) -> bool:
        return policy.versions is None or number in policy.versions
