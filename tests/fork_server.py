"""Start Python processes by forking one that has imported what a run imports, instead of starting the interpreter.

Importing torch and its compiler takes six seconds of processor time, which is most of what a tiny run costs; a fork
takes none of them. `ForkedPython` is a `subprocess.Popen` for the commands `python SCRIPT`, `python -m MODULE` and
`python -c CODE`. The process is as new as one can be after the imports: nothing has been computed in it but the speed
of the processor, its signals, environment, working directory and standard streams are those of the call. Tests of the
start itself (the interpreter, the environment, the order of imports) start a real one: `subprocess.Popen`.

A server is a separate process, `python -m tests.fork_server`, that ends with its client. There is one for each hash
seed, so that ranks that iterate over a set in different orders are found.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGPIPE)
_HEADER = struct.Struct("i")


class ForkedPython(subprocess.Popen):
    """A process forked from a server, which ignores the signals `ignored` as one that nohup has started.

    Raises ValueError if `args` is not a command for this interpreter.
    """

    def __init__(
        self, args: Any, *, hash_seed: int = 0, ignored: tuple[signal.Signals, ...] = (), **options: Any
    ) -> None:
        self._server = _server(hash_seed)
        self._ignored = ignored
        super().__init__(args, **options)

    def _execute_child(  # type: ignore[override]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
    ) -> None:  # fmt: skip
        if preexec_fn is not None or not is_python([*args]):
            raise ValueError(f"{args} with preexec_fn {preexec_fn} cannot be forked")
        # the arguments between restore_signals and the last, process_group, which Python 3.10 does not have
        new_session = bool(more[5])
        self._status, status = os.pipe()
        streams = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        request = {
            "arguments": [os.fspath(each) for each in args[1:]],
            "environment": dict(os.environ if env is None else env),
            "directory": os.fspath(cwd or Path.cwd()),
            "new_session": new_session,
            "ignored": self._ignored,
        }
        _send(self._server, request, [*streams, status])
        os.close(status)
        answer = os.read(self._status, _HEADER.size)
        assert answer, "the fork server has ended; its error is in the captured output of the first test that used it"
        (self.pid,) = _HEADER.unpack(answer)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._read_status()
        return self.returncode

    def _read_status(self) -> None:
        written = os.read(self._status, _HEADER.size)
        os.close(self._status)
        self.returncode = os.waitstatus_to_exitcode(*_HEADER.unpack(written)) if written else -signal.SIGKILL


def is_python(command: list[Any]) -> bool:
    """Return whether a command starts this interpreter with a script, a module or code."""
    return os.fspath(command[0]) == sys.executable and len(command) > 1


_servers: dict[int, socket.socket] = {}


def _server(hash_seed: int) -> socket.socket:
    """Return the connection to the server of this seed, started at the first use."""
    if hash_seed not in _servers:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
        with theirs:
            subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        _servers[hash_seed] = ours
    return _servers[hash_seed]


def _send(server: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    data = json.dumps(request).encode()
    socket.send_fds(server, [_HEADER.pack(len(data))], files)
    server.sendall(data)


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    header, files, _, _ = socket.recv_fds(client, _HEADER.size, 4)
    if not header:
        return None
    left, data = _HEADER.unpack(header)[0], b""
    while len(data) < left:
        data += client.recv(left - len(data))
    return json.loads(data), files


def _import_what_runs_need() -> None:
    import hypothesis  # noqa: F401
    import psutil  # noqa: F401
    import pytest  # noqa: F401  # with hypothesis, imported by the components of tests/distributed
    import rich._emoji_codes  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.run
    import torch.distributed.tensor.parallel
    import torch.testing._internal.distributed.fake_pg
    import torch.utils.tensorboard

    import components.checkpoint.tensor_writer
    import components.lr_schedules
    import components.optimizers
    import components.tokenizers  # noqa: F401
    import models.decoder
    import models.llama  # noqa: F401
    import recipes.cli
    import recipes.pretrain  # noqa: F401
    from components.hardware import peak_flops

    for dtype in (torch.float32, torch.bfloat16):
        peak_flops(torch.device("cpu"), dtype)


def serve(client: socket.socket) -> None:
    """Fork a process for every request and report its end, until the client exits."""
    _import_what_runs_need()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads do not survive a fork"
    gc.collect()
    gc.freeze()  # a run collects garbage after its first step: half a second of every process for the imported objects
    running: dict[int, int] = {}
    # A handler of SIGCHLD only wakes the loop: one that waited for children would be interrupted by itself.
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _report_ended(running)
        if client not in ready:
            continue
        if (received := _receive(client)) is None:
            return
        request, (*streams, status) = received
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            client.close()
            for pipe in (ended, wakeup, status, *running.values()):
                os.close(pipe)
            _become(request, streams)
        for stream in streams:
            os.close(stream)
        running[pid] = status
        os.write(status, _HEADER.pack(pid))


def _report_ended(running: dict[int, int]) -> None:
    """Write the status of every process that has ended into its pipe, and forget it."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with suppress(BrokenPipeError):
                os.write(pipe, _HEADER.pack(status))
            os.close(pipe)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Run the requested process in the child, to its end."""
    if request["new_session"]:
        os.setsid()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does when it starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # the descriptors of the streams may overlap
    for number, stream in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(stream, number)
        os.close(stream)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _run(request["arguments"])


def _run(arguments: list[str]) -> None:
    """Run a command line as the interpreter does, and end this process."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    subprocess_handler.subprocess_handler.Popen = _ForkedWorker  # type: ignore[attr-defined]
    unbuffered = arguments[0] == "-u"
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # line buffered on a terminal, or if requested
        buffering = 1 if name == "stderr" or unbuffered else -1
        number = {"stdin": 0, "stdout": 1, "stderr": 2}[name]
        stream = open(number, mode, buffering=buffering, closefd=False, encoding="utf-8",  # noqa: SIM115
                      errors="backslashreplace" if name == "stderr" else None)  # fmt: skip
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    status = 0
    try:
        _execute(arguments[unbuffered:])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status)


def _execute(arguments: list[str]) -> None:
    what, *rest = arguments
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv = rest
        sys.path[0] = str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        sys.path[0] = str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


def _end(status: int) -> None:
    """End as the interpreter does: wait for threads, run exit handlers, flush."""
    import atexit

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 120
    sys.stderr.flush()
    os._exit(status)


class _ForkedWorker(subprocess.Popen):
    """A worker that a forked launcher starts: forked from the launcher, which is its parent as usual.

    As usual it ignores the signals that the launcher ignores, and those that the launcher handles have their default.
    """

    def _execute_child(  # type: ignore[override]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
    ) -> None:  # fmt: skip
        given = (p2cread, c2pwrite, errwrite)
        if not is_python([*args]) or any(number != -1 for number in given):
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
            )  # fmt: skip
            return
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # about the threads of the agent, which the child does not need
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            request = {
                "arguments": [str(each) for each in args[1:]],
                "environment": dict(os.environ if env is None else env),
                "directory": cwd or str(Path.cwd()),
                "new_session": bool(more[5]),
                "ignored": [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
            }
            try:
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                _become(request, [0, 1, 2])
            finally:
                os._exit(1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
