"""What the client scripts share: cases run one after another, each on one line of output."""

import sys
import traceback
import uuid

# A guard against hangs, not a measurement.
PATIENCE = 60

CASES = []


def case(function):
    CASES.append(function)
    return function


def unique():
    return f"t-{uuid.uuid4().hex[:12]}"


def run():
    """Runs the cases named on the command line behind the address, or all; prints TAP lines."""
    wanted, failed = sys.argv[2:], 0
    for function in CASES:
        if wanted and function.__name__ not in wanted:
            continue
        try:
            function()
            print(f"ok {function.__name__}", flush=True)
        except BaseException as error:  # a failed case must not hide the others
            failed += 1
            print(f"not ok {function.__name__}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
    sys.exit(1 if failed else 0)
