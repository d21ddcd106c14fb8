"""Print pip's settings (pip.conf, PIP_*) as shell commands that give uv the same: mirrors, certificates, proxy.

Run by the Python whose pip is meant. A variable that is set already is left alone, and so are all indexes where
uv has settings of its own. uv's side: https://docs.astral.sh/uv/reference/environment/
"""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

INDEXES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
}
CONNECTION = {"trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE", "proxy": "HTTPS_PROXY"}
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
OWN_INDEXES = {*INDEXES.values(), "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_CONFIG_FILE"}


def main() -> None:
    settings = pip_settings()
    wanted = CONNECTION if uv_has_indexes() else INDEXES | CONNECTION
    exports = {variable: settings[key] for key, variable in wanted.items() if key in settings}
    if "UV_INDEX" in exports:
        # pip takes the best version of all indexes; uv by default takes the first index that has the package.
        exports["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if SYSTEM_CERTIFICATES.exists():
        # Where a company's proxy signs, only the system's certificates know it; uv brings its own.
        exports["UV_SYSTEM_CERTS"] = "true"
    for variable, value in exports.items():
        if variable not in os.environ:
            separator = "," if variable == "UV_FIND_LINKS" else " "
            print(f"export {variable}={shlex.quote(separator.join(value.split()))}")


def pip_settings() -> dict[str, str]:
    """Setting -> value; `[install]` beats `[global]`, and the environment beats both."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found:
            found[section][key] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def uv_has_indexes() -> bool:
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "uv/uv.toml"
    return own.exists() or Path("/etc/uv/uv.toml").exists() or not OWN_INDEXES.isdisjoint(os.environ)


if __name__ == "__main__":
    main()
