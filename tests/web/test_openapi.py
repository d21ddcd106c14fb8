import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance

from mlbox.web.openapi import document
from tests.web.harness import Box
from tests.whole.harness import Daemon


async def test_the_document_describes_every_route_of_the_interface_and_no_other(box: Box) -> None:
    paths = (await box.http.get("/openapi.json")).json()["paths"]
    described = {(method.upper(), path) for path, item in paths.items() for method in item if method != "parameters"}
    pages = re.compile(r"/(static/.*|parts/.*|login|logout|jobs.*|\.json)?")
    routes = {
        (rule.method, rule.path.replace(":path}", "}")) for rule in box.app.rules if not pages.fullmatch(rule.path)
    }
    assert described == routes


def test_every_reference_leads_somewhere() -> None:
    text = repr(document())
    schemas = document()["components"]["schemas"]  # type: ignore[index, call-overload]
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in schemas


# Fuzzing


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, dict[str, str]]]:
    daemon = Daemon(tmp_path_factory.mktemp("fuzz") / "state", "scheduler.cpu_slots=1", "server.body_max='1M'")
    try:
        daemon.start()
        first = daemon.submit(command="seq 1 100; echo x > $MLBOX_OUT/file")
        daemon.wait(first["id"])
        daemon.submit(command="sleep 100000")  # keeps the fuzzer's jobs waiting
        token = daemon.http.post("/api/tokens", json={"name": "fuzz", "scopes": ["admin"], "expires": "1d"}).json()
        yield daemon, {"Authorization": f"Bearer {token['token']}"}
    finally:
        daemon.close()


TOGETHER = {"gpu_mem", "launch", "signal", "array", "matrix", "at_once", "depends_on"}
"""Fields that are good or bad only beside others, or with the jobs that there are."""


def not_alone(answer: schemathesis.Response) -> bool:
    """Whether nothing but such fields was refused."""
    errors = answer.json().get("errors", []) if "json" in answer.headers["content-type"][0] else []
    return bool(errors) and {error["field"] for error in errors} <= TOGETHER


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_finds_an_answer_that_the_document_does_not_promise(
    fuzzed: tuple[Daemon, dict[str, str]], subtests: pytest.Subtests
) -> None:
    daemon, headers = fuzzed
    url = f"http://{daemon.endpoints['http']}"
    api = schemathesis.openapi.from_dict(document())
    # Left out: what does not end by itself, and what would revoke the fuzzer's own token.
    endless = ["/api/events", "/api/jobs/{id}/wait"]
    some = api.exclude(path=endless).exclude(method="DELETE", path="/api/tokens/{id}")
    for operation in (found.ok() for found in some.get_all_operations()):
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            # Drawn the same way each time: what a schema cannot say must not fail now and then.
            @settings(
                max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
            )
            def fuzz(case: schemathesis.Case) -> None:
                # Any text is a script, and not any bytes are an archive: there the schema cannot say what is good.
                plain = case.media_type in (None, "application/json")
                left_out = [] if plain else [negative_data_rejection, positive_data_acceptance]
                # It takes 429, which follows many bad credentials, for a hole; test_auth looks for those.
                left_out.append(ignored_auth)
                if case.query and case.query.get("follow") == "1":
                    del case.query["follow"]
                answer = case.call(base_url=url, headers=headers, timeout=30)
                if answer.status_code == 422 or (answer.status_code == 400 and not_alone(answer)):
                    left_out.append(
                        positive_data_acceptance
                    )  # too much for this box, or fields that do not go together
                case.validate_response(answer, excluded_checks=left_out)

            with subtests.test(operation=operation.label, mode=mode.value), suppress(Unsatisfiable):
                fuzz()
    assert daemon.http.get("/readyz").status_code == 200
    daemon.check_invariants()
