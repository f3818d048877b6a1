"""A block that signals end: in Python, in C code that never comes back, beside others who set handlers."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from catid2_ray.errors import Interrupted
from catid2_ray.on_ray.machine import signals

STUCK = """
import ctypes, os, signal, sys, threading
from catid2_ray.on_ray.machine import signals
signals._PATIENCE_S = 0.5
with signals.stoppable(lambda: "Committed: catalog"):
    threading.Timer(0.2, os.kill, (os.getpid(), int(sys.argv[1]))).start()
    {block}
print("went on")
"""


def test_a_signal_ends_the_block_with_its_account_and_gives_the_handlers_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):
        words = f"ended by {name}. Committed: catalog 12"
        with pytest.raises(Interrupted, match=words) as stopped, signals.stoppable(lambda: "Committed: catalog 12"):
            os.kill(os.getpid(), number)
            time.sleep(10)
        assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_signal_broke_off_may_fail_in_its_own_way():
    with pytest.raises(Interrupted), signals.stoppable(lambda: ""):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("a library's own word for it") from None


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="a fault"), signals.stoppable(lambda: ""):
        raise RuntimeError("a fault")


def test_handlers_that_a_library_sets_are_gone_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with signals.kept():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before


def test_where_nobody_had_a_handler_a_librarys_may_stay():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with signals.kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_a_block_runs_as_it_is():
    done = []

    def work():
        with signals.stoppable(lambda: ""), signals.kept():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", [
    "lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock; take(lock); take(lock)",
    "exec('while True:\\n try:\\n  [0 for _ in iter(int, 1)]\\n except KeyboardInterrupt: pass')",
])  # fmt: skip
def test_a_block_that_does_not_come_back_is_ended_all_the_same(number, block):
    """C code in which no handler gets its turn, here a lock taken twice; a library that swallows what the handler raises."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK.format(block=block), str(int(number))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + number and "went on" not in done.stdout
    assert done.stderr == f"Interrupted: ended by {number.name}. Committed: catalog\n"
