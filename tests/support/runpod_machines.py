"""The containers of a RunPod account, as real processes of this machine; a network volume is a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
MOUNT = "/runpod-volume"


class Machines:
    """Processes by the names of their pods or workers."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        """`env`: what each has beside its own, such as the address of a hub."""
        self._folder = folder
        self._env = env
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starting = threading.Lock()

    def volume(self, name: str) -> Path:
        """The folder of a volume."""
        path = self._folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_volume(self, name: str) -> None:
        shutil.rmtree(self.volume(name))

    def start(self, name: str, args: str, env: Mapping[str, str], volume: str) -> None:
        """Run a container's command, unless it runs already."""
        with self._starting:
            if self.status(name) == "RUNNING":
                return
            mounted = str(self.volume(volume))
            given = {key: value.replace(MOUNT, mounted) for key, value in {**self._env, **env}.items()}
            given.setdefault("MODELSTORE_ROOT", f"{mounted}/modelstore")
            scripts = Path(sys.executable).parent
            command = shlex.split(args) or ["python", "-m", "handler"]
            with self._log(name).open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    command,
                    cwd=HERE,
                    env={**os.environ, **given, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def status(self, name: str) -> str:
        process = self._processes.get(name)
        return "RUNNING" if process is not None and process.poll() is None else "EXITED"

    def lines(self, name: str) -> list[str]:
        """The whole lines of a log."""
        path = self._log(name)
        return path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []

    def stop(self, name: str) -> None:
        """End a container with all its processes."""
        process = self._processes.pop(name, None)
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        for name in list(self._processes):
            self.stop(name)

    def _log(self, name: str) -> Path:
        folder = self._folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"
