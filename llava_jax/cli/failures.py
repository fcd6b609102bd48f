"""How a command ends when something goes wrong: one line on stderr, and an exit status."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from llava_jax.constants import ENGINE_THREAD
from llava_jax.errors import reason_of

TRACEBACK = "LLAVA_JAX_TRACEBACK"  # set to 1: the traceback as well
INTERRUPTED, READER_GONE = 130, 141  # 128 and the number of the signal, as a shell counts
WRITTEN_WITHIN = 0.2  # seconds for a compiled program that is just going into the cache
AGAIN = 0.05  # seconds until an interruption that was lost comes again, and between those that nobody notices


def exit_status(program: str, run: Callable[[], int | None], own_process: bool = False) -> int:
    """Run a command; the exit status that it returns (None is 0), or 1 for an error, 130 for Ctrl-C, 141 where nobody
    reads what is printed any more.

    Args:
        program: how its errors begin: "PROGRAM: error: …"; "" is "error: …".
        own_process: there is nothing else in this process, which then ends here after a failure or Ctrl-C, or with an
            engine at work.
    """
    status = _status(program, run, own_process)
    if own_process and (status or any(t.name == ENGINE_THREAD for t in threading.enumerate())):
        _leave(status)
    return status


def _status(program: str, run: Callable[[], int | None], own_process: bool) -> int:
    _take_any_text()
    for name in ("asyncio", "concurrent.futures"):  # what fails in Orbax's threads is raised here, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with _threads_heard(own_process):
            status = run() or 0
        sys.stdout.flush()
        return status
    except SystemExit:  # argparse's
        raise
    except KeyboardInterrupt as interruption:
        _say(str(interruption) or "interrupted")
        return INTERRUPTED
    except BaseException as error:  # some libraries' own derive from no Exception
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_GONE
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(error)
        _say(f"{program}{program and ': '}error: {describe(error)}")
        return 1


def _leave(status: int) -> NoReturn:
    """End the process at once. XLA may still be compiling in threads of its own, and Orbax writing: the interpreter's
    way out takes from them what they use, which ends in a crash, or in tracebacks behind the error's one line."""
    if "llava_jax.compiling" in sys.modules:
        with contextlib.suppress(Exception):  # it may be in the middle of its import
            sys.modules["llava_jax.compiling"].stop_keeping()
            time.sleep(WRITTEN_WITHIN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _threads_heard(own_process: bool) -> Iterator[None]:
    """Ctrl-C is an exception of whatever runs just then. Where that is a callback, say of the garbage collector, whose
    exceptions are only printed, it comes again a moment later. What Orbax's threads say once it has failed is dropped.
    """
    before = sys.unraisablehook

    def hook(dropped) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            _interrupt_again()
        elif str(dropped.exc_value) != "Event loop is closed":
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if not own_process:  # of which threads may outlive the error
            sys.unraisablehook = before


def _interrupt_again() -> None:
    """Until Python notices it: one that comes just before a system call waits for its end, and the next one ends it."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # then it was no signal that was lost
        return

    def noticed(*args) -> None:
        signal.signal(signal.SIGINT, before)
        before(*args)

    def interrupt() -> None:
        while signal.getsignal(signal.SIGINT) is noticed:
            if sys.platform == "win32":
                _thread.interrupt_main()
            else:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(AGAIN)

    signal.signal(signal.SIGINT, noticed)
    threading.Timer(AGAIN, interrupt).start()


def describe(error: BaseException) -> str:
    """An error as its line tells it: the messages of ValueError and OSError are written for users, others are not."""
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    reason = reason_of(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason or "out of memory" in reason.lower():
        return f"not enough memory ({reason}); ask for less at once, or hold the model in fewer bytes (--quantize int8)"
    return f"{reason} ({TRACEBACK}=1 shows where)"


def _take_any_text() -> None:
    """Text that is not UTF-8 costs its question where it is read, and shows as \\udc80 where it is printed."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        errors = "surrogateescape" if stream is sys.stdin else "backslashreplace"
        with contextlib.suppress(AttributeError, OSError, ValueError):  # what stands in for it may be anything
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads that either
        print(line, file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """Whether it is standard output's reader who is gone; then no more is written to it."""
    try:
        stdout, poll = sys.stdout.fileno(), select.poll()
        poll.register(stdout, select.POLLOUT)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        return True
    except (OSError, ValueError, AttributeError):  # no file, or no poll on this system
        return False
