"""A real JupyterLab in a real Chromium, without a window: what the tests of the notebooks look through."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

# the session of the notebook in front is connected and has nothing to do
IDLE = """() => {
  const kernel = window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel;
  return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
RUN_ALL = """async () => {
  const {content} = window.jupyterapp.shell.currentWidget;
  await window.jupyterapp.commands.execute('notebook:run-all-cells');
  const code = content.widgets.filter(cell => cell.model.type === 'code');
  return code.map(cell => cell.model.executionCount);
}"""


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[tuple[str, str, int]]:
    """A server for the notebooks of a folder, with settings of its own: its address, its token, its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = Path(tempfile.mkdtemp(prefix="jupyter-"))
    for plugin, settings in {
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
        "notebook-extension/tracker": '{"windowingMode": "none"}',
    }.items():
        file = own / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(settings)
    names = {"CONFIG": "", "RUNTIME": "runtime", "DATA": "data"}
    environment = os.environ | {f"JUPYTER_{name}_DIR": str(own / folder) for name, folder in names.items()}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(own / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own / "ws"),
                    "IPYTHONDIR": str(own / "ipython"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
               "--expose-app-in-browser", "--allow-root"]  # fmt: skip
    with (own / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                if server.poll() is not None:
                    raise RuntimeError((own / "log").read_text()[-2000:])
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=1).close()
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", token, server.pid
        finally:
            server.terminate()
            server.wait(20)
            shutil.rmtree(own, ignore_errors=True)


@contextmanager
def page_of_chromium():
    """An empty page of a fresh profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1280, "height": 1000}
        )
        try:
            yield context.pages[0]
        finally:
            context.close()


def open_and_run(page, address: str, token: str, name: str, seconds: float = 180) -> list[int | None]:
    """Open a notebook and run all its cells; returns their execution counts."""
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function(IDLE, timeout=60_000)
    counts = page.evaluate(RUN_ALL)
    page.wait_for_function(IDLE, timeout=seconds * 1000)
    return counts


def shut_kernel(page) -> None:
    """End the notebook's kernel, so that twelve of them do not fill the memory."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
