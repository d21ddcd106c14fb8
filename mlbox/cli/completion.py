"""Completion for shells, made from the tree of parsers itself: what can be typed, and which jobs and GPUs there are."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlbox.cli import client

SHELLS = ("bash", "zsh", "fish")

_JOBS_NOW = "timeout 2 mlbox ls --limit 50 2>/dev/null | awk 'NR > 1 { print $1 }'"
_GPUS_NOW = "timeout 2 mlbox gpus 2>/dev/null | awk '$1 ~ /^[0-9:]+$/ && $2 != \"of\" { print $1 }'"
_WORDS: Mapping[str, Sequence[str]] = {
    "wanted": ("queued", "starting", "running", "succeeded", "failed", "cancelled"),
    "launch": ("plain", "torchrun"),
    "notify_on": ("begin", "end", "fail", "requeue", "time_limit"),
    "scope": ("read", "submit", "infer", "deploy", "admin"),
    "since": ("1d", "7d", "30d"),
}

Commands = Mapping[str, argparse.ArgumentParser]


def run(commands: Commands) -> Callable[[argparse.Namespace], int]:
    """The command `completion` for a tree of parsers."""

    def completion(options: argparse.Namespace) -> int:
        client.write({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](commands).encode())
        return 0

    return completion


def bash(commands: Commands) -> str:
    """A function for `complete -F`."""
    cases = "".join(_bash_case(name, sub) for name, sub in commands.items())
    return f"""# mlbox completion bash >~/.local/share/bash-completion/completions/mlbox
_mlbox() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} at words= values= files=
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W '{" ".join(commands)} --help --version' -- "$word"))
        return
    fi
    for (( at = 2; at < COMP_CWORD; at++ )); do
        if [[ ${{COMP_WORDS[at]}} == -- ]]; then COMPREPLY=($(compgen -f -- "$word")); return; fi
    done
    case ${{COMP_WORDS[1]}} in
{cases}    esac
    if [[ $files ]]; then COMPREPLY=($(compgen -f -- "$word"))
    elif [[ $word == -* ]]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
    else COMPREPLY=($(compgen -W "$values" -- "$word")); fi
}}
complete -F _mlbox mlbox
"""


def zsh(commands: Commands) -> str:
    """The bash function in the emulation that zsh brings along (zshcompsys(1), bashcompinit)."""
    head = "#compdef mlbox\n# mlbox completion zsh >~/.zfunc/_mlbox, with fpath+=~/.zfunc before compinit\n"
    return f"{head}autoload -U +X bashcompinit && bashcompinit\n{bash(commands)}"


def fish(commands: Commands) -> str:
    """`complete` commands, one for each option."""
    lines = ["# mlbox completion fish >~/.config/fish/completions/mlbox.fish", "complete -c mlbox -f"]
    for name, sub in commands.items():
        lines.append(f"complete -c mlbox -n __fish_use_subcommand -a {name} -d {_fish(sub.description)}")
        seen = f"complete -c mlbox -n '__fish_seen_subcommand_from {name}'"
        for action in _actions(sub):
            words, shell = _offered(action)
            offer = [*words, f"({shell})"] if shell else words
            offered = f" -a {_fish(' '.join(offer))}" if offer else ""
            if action.option_strings:
                spelled = "".join(
                    f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
                    for option in action.option_strings
                )
                needs = "" if action.nargs == 0 else " -rF" if action.type is Path else " -x"
                lines.append(f"{seen}{spelled}{needs}{offered} -d {_fish(_help(action))}")
            elif offered or action.type is Path or action.nargs == argparse.PARSER:
                lines.append(seen + (offered or " -F"))
    return "\n".join(lines) + "\n"


def _bash_case(name: str, sub: argparse.ArgumentParser) -> str:
    """What may follow the command `name`: its options, their values, and its own words."""
    actions = _actions(sub)
    options = " ".join(option for action in actions for option in action.option_strings)
    lines = [f"    {name})", f"        words='{options}'", "        case $before in"]
    for action in actions:
        if not action.option_strings or action.nargs == 0:
            continue
        lines.append(f"        {'|'.join(action.option_strings)}) {_bash_values(action)} ;;")
    own = next((action for action in actions if not action.option_strings), None)
    lines += [f"        *) {_bash_values(own) if own else ':'} ;;", "        esac ;;"]
    return "\n".join(lines) + "\n"


def _bash_values(action: argparse.Action) -> str:
    if action.type is Path or action.nargs == argparse.PARSER:
        return "[[ $word == -* ]] || files=1" if not action.option_strings else "files=1"
    words, shell = _offered(action)
    lookup = f"$({shell})" if shell else ""
    given = " ".join([*words, lookup]).strip()
    if not given:
        return ":"
    return f'[[ $word == -* ]] || values="{given}"' if not action.option_strings else f'values="{given}"'


def _offered(action: argparse.Action) -> tuple[Sequence[str], str]:
    """What can stand there: words that are known now, and the shell command that tells the others."""
    if action.choices:
        return [str(choice) for choice in action.choices], ""
    if action.dest in ("job", "jobs", "depends_on"):
        return [], _JOBS_NOW
    if action.dest in ("gpu", "gpus") and action.option_strings != ["--gpus"]:
        return ["all"], _GPUS_NOW
    return _WORDS.get(action.dest, ()), ""


def _actions(sub: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    return sub._actions  # pyright: ignore[reportPrivateUsage]  # argparse has no other way to list them


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def _fish(text: str | None) -> str:
    r"""A text in fish's single quotes, in which only \\ and ' are special."""
    return "'" + (text or "").replace("\\", "\\\\").replace("'", "\\'") + "'"
