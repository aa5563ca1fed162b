"""Processes and how they divide the work.

launcher.py         starts the processes of a node, watches them, and gives their exit status
context.py          what a process knows of the run's processes
collectives.py      texts and errors that processes exchange
parallel_dims.py    [parallel]: the mesh of replicas, shards and tensor-parallel ranks
fsdp.py             FSDP2: parameters, gradients and optimizer state in shards
tensor_parallel.py  tensor parallelism with sequence parallelism
"""

from components.distributed.parallel_dims import ParallelConfig

__all__ = ["ParallelConfig"]
