"""A process that imports everything once and forks a child for every command line it is asked for.

Requests and answers are lines of JSON on stdin and stdout: {"start": argv, ...} -> {"pid"},
{"wait": pid, ...} -> {"code"} or {"signal"} or {"stopped": true}, {"send": name, "pid"} -> {}.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import torch

from tests import cli_hooks

# Everything a verb imports, so that a child finds it imported.
MODULES = (
    "gguf",
    "pyarrow.parquet",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "hireconvert.cli",
    "hireconvert.pipeline",
    "hireconvert.inspection",
    "hireconvert.assessment",
    "hireconvert.bench",
    "hireconvert.report",
    "matplotlib.backends.backend_svg",
    "hireconvert.generation",
)


def run_command(request: dict[str, Any]) -> NoReturn:
    """What a fresh interpreter would do with `python -m hireconvert argv`; never returns."""
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY), number)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["hireconvert", *request["start"]]
    code = 1
    try:
        for hook, *arguments in request["hooks"]:
            getattr(cli_hooks, hook)(*arguments)
        sys.modules["hireconvert.cli"].main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001 - as the interpreter does at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for function in cli_hooks.at_end:
            function()
        os._exit(code)


def start(request: dict[str, Any]) -> dict[str, Any]:
    """The id of a child that runs the command line."""
    child = os.fork()
    if child == 0:
        run_command(request)
    return {"pid": child}


def wait(request: dict[str, Any]) -> dict[str, Any]:
    """How the child ended or that it stopped; it is killed after `kill_after` seconds."""
    child, limit = request["wait"], request.get("kill_after")
    began, killed = time.monotonic(), False
    while True:
        if limit is not None and not killed and time.monotonic() - began > limit:
            os.kill(child, signal.SIGKILL)
            killed = True
        done, status = os.waitpid(child, os.WUNTRACED | (0 if limit is None else os.WNOHANG))
        if done and os.WIFSTOPPED(status):
            return {"stopped": True}
        if done and os.WIFSIGNALED(status):
            return {"signal": os.WTERMSIG(status)}
        if done:
            return {"code": os.WEXITSTATUS(status)}
        time.sleep(0.002)


def main() -> None:
    """Serve requests until stdin ends."""
    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = start(request)
        elif "wait" in request:
            answer = wait(request)
        else:
            os.kill(request["pid"], getattr(signal, request["send"]))
            answer = {}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
