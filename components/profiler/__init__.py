"""[profile]: profile a window of steps with torch.profiler, and break down their time."""

from components.profiler.breakdown import Breakdown, break_down, read_trace
from components.profiler.profiler import Profiler, ProfilerConfig

__all__ = ["Breakdown", "Profiler", "ProfilerConfig", "break_down", "read_trace"]
