"""What every test stands on."""

import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and all processes below inherit it:
# the tests that press Ctrl-C need it heard, as at a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
