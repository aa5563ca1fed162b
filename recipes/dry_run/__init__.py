"""`--dry-run`: report the parameters, memory, steps, time and problems of a run without starting it.

`plan` gathers what can be known, `schedule_preview` simulates batch sizes and learning rates, `memory` and `step_time`
estimate a rank's memory and a step's time, `preflight` finds problems, and `report` prints all of it. A run itself uses
`memory` to decide how often it synchronizes gradients.
"""
