"""Start a program whose clock is wrong: a library that is loaded before libc adds an offset to the time of day.

Only the time of day is wrong, not the clocks by which programs wait. libfaketime cannot do that: with it, `time.sleep`
or waiting for a thread fails in Python 3.11. Needs a C compiler.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    const char *text = getenv("CLOCK_OFFSET_SECONDS");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *found) {
    int status = syscall(SYS_clock_gettime, clock, found);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += offset();
    return status;
}

int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    int status = clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return status;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


def environment_of_clock(offset_seconds: int, folder: Path) -> dict[str, str]:
    """Return the environment of a program whose clock is that much ahead. The library is built in `folder`."""
    library = folder / "wrong_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=_SOURCE, check=True, text=True)
    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET_SECONDS": str(offset_seconds)}
