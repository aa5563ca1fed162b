"""`--dry-run`: report the parameters, memory, steps, time and problems of a run without starting it.

plan.py               everything that is known before a run starts
schedule_preview.py   simulates batch sizes and learning rates
memory.py             memory of a rank; a run itself uses it to decide how often it synchronizes gradients
activation_memory.py  counts the activations that a forward pass keeps
step_time.py          what bounds the time of a step
preflight.py          problems
report.py             prints all of it
"""
