"""The web app: every route with its permission in one table, and the gate around them."""

import pwd

from starlette.types import Receive, Scope, Send

from mlbox.config import Config, host_port
from mlbox.identity import ROLE_SCOPES, Identity, Role
from mlbox.web.artifacts_api import ArtifactsApi
from mlbox.web.auth import Gate
from mlbox.web.box_api import BoxApi
from mlbox.web.doors import Doors
from mlbox.web.hosts import normal
from mlbox.web.identity_api import IdentityApi
from mlbox.web.jobs_api import JobsApi
from mlbox.web.live import Streams
from mlbox.web.logs_api import LogsApi
from mlbox.web.metrics import HttpMeter
from mlbox.web.models_api import ModelsApi
from mlbox.web.pages import Pages
from mlbox.web.rendering import Renderer
from mlbox.web.reports_api import ReportsApi
from mlbox.web.reservations_api import ReservationsApi
from mlbox.web.routes import ADMIN, DEPLOY, OPEN, READ, READ_JOB, SUBMIT, WRITE_JOB, Rule, open_paths, router
from mlbox.web.signin import SignIn
from mlbox.web.static_files import static_rules
from mlbox.web.throttle import Throttle

__all__ = ["Doors", "WebApp", "create_app"]


class WebApp:
    """The ASGI app. `stop` ends its streams, which would otherwise keep the server from stopping."""

    def __init__(self, gate: Gate, streams: Streams, rules: tuple[Rule, ...]) -> None:
        self._gate = gate
        self._streams = streams
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gate(scope, receive, send)

    def stop(self) -> None:
        """End every open stream and admit no more. Idempotent."""
        self._streams.close()


def create_app(doors: Doors) -> WebApp:
    """Compose the app. Raises ValueError for a route table that leaves a permission open to doubt."""
    server = doors.config.server
    streams = Streams(
        total=server.followers_max,
        per_user=server.followers_per_user,
        has_ended=doors.credentials.has_ended,
    )
    doors.credentials.on_end = streams.end
    throttle, meter, renderer = Throttle(), HttpMeter(), Renderer()
    rules = (*_rules(doors, streams, meter, renderer, throttle), *static_rules())
    gate = Gate(
        router(rules),
        credentials=doors.credentials,
        owner=_owner(doors.owner_uid),
        host_names=_host_names(doors.config),
        open_paths=open_paths(rules),
        error_page=renderer.error,
        meter=meter,
        throttle=throttle,
    )
    return WebApp(gate, streams, rules)


def _rules(
    doors: Doors, streams: Streams, meter: HttpMeter, renderer: Renderer, throttle: Throttle
) -> tuple[Rule, ...]:
    jobs, logs = JobsApi(doors, streams), LogsApi(doors, streams)
    artifacts, models = ArtifactsApi(doors, streams), ModelsApi(doors)
    box, identity = BoxApi(doors, streams, meter), IdentityApi(doors)
    reports, reservations = ReportsApi(doors), ReservationsApi(doors)
    pages, sign = Pages(doors, logs, renderer), SignIn(doors.credentials, throttle, renderer)
    return (
        Rule("POST", "/api/jobs", SUBMIT, jobs.submit),
        Rule("GET", "/api/jobs", READ, jobs.list),
        Rule("GET", "/api/jobs/{id}", READ_JOB, jobs.show),
        Rule("PATCH", "/api/jobs/{id}", SUBMIT, jobs.change),
        Rule("DELETE", "/api/jobs/{id}", SUBMIT, jobs.remove),
        Rule("GET", "/api/jobs/{id}/wait", READ_JOB, jobs.wait),
        Rule("POST", "/api/jobs/{id}/cancel", SUBMIT, jobs.cancel),
        Rule("POST", "/api/jobs/{id}/retry", SUBMIT, jobs.retry),
        Rule("POST", "/api/jobs/{id}/clone", SUBMIT, jobs.clone),
        Rule("GET", "/api/jobs/{id}/rank", READ, jobs.rank),
        Rule("POST", "/api/arrays/{id}/cancel", SUBMIT, jobs.cancel_array),
        Rule("POST", "/api/jobs/{id}/hold", SUBMIT, jobs.hold),
        Rule("POST", "/api/jobs/{id}/release", SUBMIT, jobs.release),
        Rule("GET", "/api/jobs/{id}/log", READ_JOB, logs.log),
        Rule("GET", "/api/jobs/{id}/log/lines", READ_JOB, logs.lines),
        Rule("GET", "/api/jobs/{id}/artifacts", READ_JOB, artifacts.list),
        Rule("GET", "/api/jobs/{id}/artifacts/{path:path}", READ_JOB, artifacts.download),
        Rule("PUT", "/api/jobs/{id}/artifacts/{path:path}", WRITE_JOB, artifacts.store),
        Rule("GET", "/api/gpus", READ, box.gpus),
        Rule("POST", "/api/gpus/{uuid}/drain", ADMIN, box.drain),
        Rule("POST", "/api/gpus/{uuid}/resume", ADMIN, box.resume),
        Rule("POST", "/api/gpus/{uuid}/adopt", SUBMIT, box.adopt),
        Rule("GET", "/api/queue", READ, box.queue),
        Rule("GET", "/api/plan", READ, reports.plan),
        Rule("GET", "/api/usage", READ, reports.usage),
        Rule("GET", "/api/notices", READ, reports.notices),
        Rule("GET", "/api/reservations", READ, reservations.list),
        Rule("POST", "/api/reservations", ADMIN, reservations.create),
        Rule("DELETE", "/api/reservations/{id}", ADMIN, reservations.cancel),
        Rule("GET", "/api/events", READ, box.events),
        Rule("GET", "/api/models", READ, models.list),
        Rule("GET", "/api/models/{name}", READ, models.show),
        Rule("PUT", "/api/models/{name}/versions/{version}", DEPLOY, models.deploy),
        Rule("GET", "/api/me", READ_JOB, identity.me),
        Rule("GET", "/api/tokens", READ, identity.tokens),
        Rule("POST", "/api/tokens", READ, identity.create_token),
        Rule("GET", "/api/tokens/{id}", READ, identity.token),
        Rule("DELETE", "/api/tokens/{id}", READ, identity.revoke_token),
        Rule("POST", "/api/login-codes", READ, identity.create_login_code),
        Rule("GET", "/healthz", OPEN, box.healthz),
        Rule("GET", "/readyz", READ, box.readyz),
        Rule("GET", "/metrics", READ, box.metrics),
        Rule("GET", "/openapi.json", READ, box.openapi),
        Rule("GET", "/", READ, pages.overview),
        Rule("GET", "/.json", READ, pages.overview_json),
        Rule("GET", "/parts/overview", READ, pages.overview_parts),
        Rule("GET", "/jobs", READ, pages.jobs),
        Rule("GET", "/jobs.json", READ, pages.jobs_json),
        Rule("GET", "/jobs/{id}", READ, pages.job),
        Rule("GET", "/parts/jobs/{id}", READ, pages.job_parts),
        Rule("POST", "/jobs/{id}/{act}", SUBMIT, pages.act),
        Rule("GET", "/login", OPEN, sign.form),
        Rule("POST", "/login", OPEN, sign.sign_in),
        Rule("POST", "/logout", READ, sign.sign_out),
    )


def _owner(uid: int) -> Identity:
    """Single-user mode: whoever started mlbox, and is therefore its admin."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # a container may run as a uid without a name
        name = str(uid)
    return Identity(user=name, uid=uid, role=Role.ADMIN, scopes=ROLE_SCOPES[Role.ADMIN], how="socket")


def _host_names(config: Config) -> frozenset[str]:
    """The names that a Host header may carry, beside the address that a connection came in on."""
    bound, _ = host_port(config.server.listen)
    return frozenset({"localhost", normal(bound), *(normal(name) for name in config.server.hosts)})
