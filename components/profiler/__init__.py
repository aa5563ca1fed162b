"""[profile]: profile a window of steps with torch.profiler, and break down their time.

profiler.py      records the window, and writes the trace and the table
breakdown.py     sums the time of a trace by kind
kernel_kinds.py  the kind of a kernel, operator or range, by patterns of its name

components/profiler_range.py marks the ranges.
"""

from components.profiler.breakdown import Breakdown, break_down, read_trace
from components.profiler.profiler import Profiler, ProfilerConfig

__all__ = ["Breakdown", "Profiler", "ProfilerConfig", "break_down", "read_trace"]
