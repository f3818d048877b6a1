"""Ctrl-C and SIGTERM end a job within seconds, in every stage, whoever else would like to handle them.

Ray sets a handler of its own for SIGTERM when it starts, and Ray Train one for SIGINT that stays after the training: `kept`
gives ours back. Where the main thread is deep in C code or waits for processes that do not end, a watcher ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from catid2_ray.errors import Interrupted

_STOP = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 6.0  # from a signal until the process is ended, whatever it is doing; a busy machine takes seconds more


@contextlib.contextmanager
def kept(*, defaults: bool = False) -> Iterator[None]:
    """The handlers of before stand again afterwards. Where the system's default stood, which ends the process without a word,
    a new handler may stay, unless `defaults` are to come back, too."""
    if threading.current_thread() is not threading.main_thread():  # which alone has handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and (defaults or handler != signal.SIG_DFL):
                signal.signal(number, handler)


@contextlib.contextmanager
def stoppable(account: Callable[[], str]) -> Iterator[None]:
    """A block that SIGINT or SIGTERM ends with Interrupted, whose message closes with `account()`: what is kept, how to go on.

    A second signal ends the process at once; so does the watcher where the block has not ended 6 s after the first. Outside
    the main thread the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame) -> None:
        if received:
            _end_process(number, account)
        received.append(number)
        raise KeyboardInterrupt  # Ray's waiting ends for this one alone

    with kept(defaults=True), _watcher(account):
        for number in _STOP:
            signal.signal(number, stop)
        try:
            yield
        except BaseException as error:
            # What the signal broke off may fail in its own way; a deliberate KeyboardInterrupt is a Ctrl-C, too.
            if not received and not isinstance(error, KeyboardInterrupt):
                raise
            number = received[0] if received else signal.SIGINT
            raise Interrupted(_message(number, account), signal=number) from None


def _message(number: int, account: Callable[[], str]) -> str:
    return f"ended by {signal.Signals(number).name}. {account()}"


def _end_process(number: int, account: Callable[[], str]) -> None:
    """Now, without any clean-up: what is committed is whole, and a Ray of our own ends with this process."""
    print(f"{Interrupted.__name__}: {_message(number, account)}", file=sys.stderr, flush=True)
    os._exit(128 + number)


@contextlib.contextmanager
def _watcher(account: Callable[[], str]) -> Iterator[None]:
    """A thread that hears of signals when they arrive, before Python's handlers may run in the main thread."""
    ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while not ended.is_set():
            if (number := os.read(reader, 1)[0]) in _STOP and not ended.wait(_PATIENCE_S):
                _end_process(number, account)

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
