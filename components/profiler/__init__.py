"""[profile]: a window of steps through torch.profiler, and where their time went."""

from components.profiler.breakdown import Breakdown, break_down, read_trace
from components.profiler.profiler import Profiler, ProfilerConfig

__all__ = ["Breakdown", "Profiler", "ProfilerConfig", "break_down", "read_trace"]
