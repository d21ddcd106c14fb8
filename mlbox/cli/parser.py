"""The command line as a tree of parsers, from which help and completion come as well."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mlbox import __version__
from mlbox.cli import box, completion, jobs, local, submits, top

Run = Callable[[argparse.Namespace], int]


def parser() -> argparse.ArgumentParser:
    """The whole tree. Each command sets `run`."""
    tree = argparse.ArgumentParser(prog="mlbox", description="Job queue and inference server for one GPU box.")
    tree.add_argument("--version", action="version", version=f"mlbox {__version__}")
    commands = tree.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Run, text: str, *, client: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, misuse=sub.error)
        if client:
            sub.add_argument("--state", help="the daemon's state folder (default: that of your own daemon)")
            sub.add_argument("--json", action="store_true", help="answer as JSON")
        return sub

    _local(command)
    _submit(command("submit", submits.submit, "Queue a job: mlbox submit [options] -- command."))
    _jobs(command)
    _box(command)
    made = command(
        "completion", completion.run(commands.choices), "Print what a shell needs to complete mlbox.", client=False
    )
    made.add_argument("shell", choices=completion.SHELLS)
    return tree


def _local(command: Callable[..., argparse.ArgumentParser]) -> None:
    serve = command("serve", local.serve, "Run the daemon.", client=False)
    check = command("check-config", local.check_config, "Check a configuration and show what it means.", client=False)
    for sub in (serve, check):
        sub.add_argument("--config", type=Path, help="TOML file")
        sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    for flag, key in local.SERVE_FLAGS.items():
        serve.add_argument(flag, dest=key, metavar=flag[2:].upper())
    text = "Replay a trace of jobs on paper: every start and end, and a summary, as JSON."
    simulate = command("simulate", local.simulate, text, client=False)
    simulate.add_argument("trace", type=Path, help="JSON, or Standard Workload Format (*.swf)")
    simulate.add_argument("--config", type=Path, help="TOML file with the policy to try")
    simulate.add_argument("--swf", action="store_true", help="the trace is Standard Workload Format")
    simulate.add_argument("--json", action="store_true", help="as it always is")


def _submit(submit: argparse.ArgumentParser) -> None:
    for flag, text in submits.FIELDS.items():
        submit.add_argument(f"--{flag}", help=text)
    for flag, (metavar, text) in submits.LISTS.items():
        submit.add_argument(f"--{flag}", action="append", metavar=metavar, help=text)
    for flag, text in submits.FLAGS.items():
        submit.add_argument(f"--{flag}", action="store_true", help=text)
    submit.add_argument("--workdir", type=Path, help="an existing folder to run in")
    submit.add_argument("--script", type=Path, metavar="FILE", help="a script instead of a command; - is stdin")
    submit.add_argument("--code", type=Path, metavar="PATH", help="a folder, or a tar.gz or zip, to run in a copy of")
    submit.add_argument("--wait", action="store_true", help="wait for the end; exit with the job's own status")
    submit.add_argument("--follow", action="store_true", help="show its log as it grows, then as --wait")
    words = submit.add_argument("command", nargs=argparse.PARSER, help="the command line; all that follows is its own")
    words.required = False  # --script stands for it


def _jobs(command: Callable[..., argparse.ArgumentParser]) -> None:
    listed = command("ls", jobs.ls, "List jobs: mlbox ls [state ...].")
    listed.add_argument("wanted", nargs="*", metavar="state", help="only jobs in these states, such as queued running")
    for flag in ("user", "project", "name"):
        listed.add_argument(f"--{flag}", help=f"only jobs of this {flag}")
    listed.add_argument("--array", type=int, help="only the elements of this array", metavar="JOB")
    listed.add_argument("--limit", type=int, help="so many at most, the newest first (100)")
    for name, run, text in (
        ("show", jobs.show, "Show a job."),
        ("rank", jobs.rank, "Show what makes a waiting job's place in the queue."),
        ("log", jobs.log, "Print a job's log."),
    ):
        one = command(name, run, text)
        one.add_argument("job", type=jobs.job_word, help="12, or 12_3 for an element of an array")
        if name == "log":
            one.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
            one.add_argument("--tail", type=int, help="only the last lines")
            one.add_argument("--attempt", type=int, help="of this try; the newest is shown otherwise")
    for name, run, text in (
        ("wait", jobs.wait, "Wait for jobs to end; exit with the status of the first that did not succeed."),
        ("cancel", jobs.act, "Cancel jobs; 12_* is all of an array."),
        ("retry", jobs.act, "Submit ended jobs again."),
        ("clone", jobs.act, "Submit the same job once more, whatever became of it."),
        ("hold", jobs.act, "Keep waiting jobs from starting."),
        ("release", jobs.act, "Let held jobs start."),
    ):
        many = command(name, run, text)
        many.add_argument("jobs", type=jobs.job_word, nargs="+", metavar="job", help="12, 12_3, 12_*")
        many.set_defaults(verb=name)


def _box(command: Callable[..., argparse.ArgumentParser]) -> None:
    command("top", top.top, "Watch the box: its GPUs, what runs, who waits and until when.")
    command("gpus", box.plain("/api/gpus"), "Show the GPUs.")
    command("queue", box.plain("/api/queue"), "Show who waits, why, and when each may start.")
    command("plan", box.plan, "Show what ran, runs and will run on each GPU.")
    command("models", box.plain("/api/models"), "Show the models.")
    command("notices", box.plain("/api/notices"), "Show what you were told.")
    used = command("usage", box.usage, "Show who used how much, and how long they waited.")
    used.add_argument("--since", default="7d", help="a time span such as 7d, or a time (7d)")
    for name, text in (("drain", "Start nothing more on GPUs."), ("resume", "Take GPUs back into service.")):
        sub = command(name, box.drain, text)
        sub.add_argument("gpu", nargs="+", help="its index, its uuid, or all")
        sub.set_defaults(verb=name)
        if name == "drain":
            sub.add_argument("--reason", help="why, for those who wonder")
    adopt = command("adopt", box.adopt, "Take a program that was started past mlbox in as a job.")
    adopt.add_argument("gpu", help="the GPU that it uses: its index or uuid")
    adopt.add_argument("--pid", type=int, help="which of the programs there, if there are several")
    for flag in ("name", "project", "time-limit"):
        adopt.add_argument(f"--{flag}", help=submits.FIELDS[flag])
    reserve = command("reserve", box.reserve, "Keep GPUs for somebody, or for nobody, for a time.")
    reserve.add_argument("name", help="what it is called, such as maintenance")
    reserve.add_argument("--gpus", action="append", default=[], metavar="GPU", help="index or uuid (all of them)")
    reserve.add_argument("--from", dest="start", metavar="TIME", help="such as 2027-01-31T18:00 (now)")
    reserve.add_argument("--until", metavar="TIME", help="when it ends")
    reserve.add_argument("--for", dest="duration", metavar="DURATION", help="how long instead, such as 4h")
    reserve.add_argument("--user", help="whose jobs may use them")
    reserve.add_argument("--project", help="the jobs of which project may use them")
    listed = command("reservations", box.reservations, "Show the reservations.")
    listed.add_argument("--cancel", type=int, metavar="ID", help="give one up instead")
    token = command("token", box.token, "Make a token; it is shown once.")
    token.add_argument("name")
    token.add_argument("--scope", action="append", help="read, submit, infer, deploy or admin; may be repeated")
    token.add_argument("--expires", help="such as 90d")
    command("login", box.login, "Print an address that logs a browser in, once.")
