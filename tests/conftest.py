"""For all tests."""

from __future__ import annotations

import signal

# Started in the background, say by nohup, a process ignores Ctrl-C and hands that on to those it starts; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
