"""Processes of a run, and parallelism over them.

launcher.py          starts and watches the processes of a node, and returns their exit status
node.py              the processes of a node, and the address of the rendezvous
worker.py            the interface between a worker process and its launcher
membership.py        the nodes that take part: those that are lost, and those that join
heartbeat.py         detects processes that make no progress
context.py           the processes of a run, and the collectives of all of them
collectives.py       exchange of small objects and errors between processes
parallel_dims.py     [parallel]: the mesh of replicas, shards, context-parallel and tensor-parallel ranks
fsdp.py              FSDP2: sharded parameters, gradients and optimizer state
tensor_parallel.py   tensor parallelism with sequence parallelism: the styles
context_parallel.py  context parallelism: the chunks of a sequence, and the sum of their gradients

FSDP groups and styles of modules come from the model's plan (models/parallel_plan.py).
"""

from components.distributed.parallel_dims import ParallelConfig

__all__ = ["ParallelConfig"]
