"""The page inside a notebook, if this is one. IPython is asked only where it has been imported already."""

from __future__ import annotations

import sys
from typing import Any

from jdelta.display.interactive.server import Server

HEIGHT = 680

# Who may show the page in a frame: Jupyter at home and VS Code; and Colab, which has proxies before the kernel.
FRAMES = "http://localhost:* http://127.0.0.1:* https://localhost:* https://127.0.0.1:* vscode-webview:"
COLAB = (".googleusercontent.com", "colab.research.google.com")
COLAB_FRAMES = "https://*.googleusercontent.com https://colab.research.google.com"


def kind() -> str:
    """`"colab"`, `"jupyter"`, or `""` for a terminal or a script."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or getattr(shell, "kernel", None) is None:
        return ""
    return "colab" if "google.colab" in sys.modules else "jupyter"


def trust() -> tuple[tuple[str, ...], str]:
    """The server's `trusted` and `framed`."""
    return {"colab": (COLAB, f"{FRAMES} {COLAB_FRAMES}"), "jupyter": ((), FRAMES), "": ((), "'none'")}[kind()]


def show(server: Server) -> None:
    """Shows the page below the cell; elsewhere nothing."""
    where = kind()
    if where == "colab":
        output: Any = sys.modules["google.colab"].output
        path = f"/?token={server.token}"
        output.serve_kernel_port_as_iframe(server.server_port, path=path, height=str(HEIGHT))
    elif where == "jupyter":
        display: Any = sys.modules["IPython"].display
        display.display(display.IFrame(server.url, width="100%", height=HEIGHT))
