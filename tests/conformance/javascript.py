"""The npm client against the server: `node --test` over npm/client.test.mjs. Part of `make conformance`.

The client is installed by npm into fledge's cache, at the version that npm/package.json pins. Without node this says
so and is no failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "serve"))


def modules(*, installs: bool, package: Path = HERE / "npm" / "package.json", name: str = "npm") -> Path | None:
    """The folder with `node_modules` for this package.json; None without node, or if it is not there and must not be
    made."""
    node, npm = shutil.which("node"), shutil.which("npm")
    home = Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge")
    folder = home / "conformance" / name
    if node is None or (npm is None and installs):
        return None
    wanted = package.read_text(encoding="utf-8")
    mark = folder / "installed.json"
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        if not installs:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package, folder / "package.json")
        command = [str(npm), "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(command, cwd=folder, check=True)
        mark.write_text(wanted, encoding="utf-8")
    return folder


def main() -> int:
    from speaking import speaking

    folder = modules(installs=True)
    if folder is None:
        print("the npm client is not tested: node and npm are not here")
        return 0
    shutil.copyfile(HERE / "npm" / "client.test.mjs", folder / "client.test.mjs")
    with tempfile.TemporaryDirectory() as place, speaking(Path(place)) as (url, key):
        environment = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
        return subprocess.run(
            ["node", "--test", "client.test.mjs"], cwd=folder, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
