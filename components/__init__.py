"""The mechanisms of a run, independent of each other and of the models. tests/test_architecture.py checks the imports.

Packages: batch (batch policies), checkpoint, data, distributed, gradient_noise, metrics, optimizers, probes,
profiler, safetensors, storage, tasks, tokenizers, validation. Their docstrings have a line for each file.

Training
train_step.py                one optimizer step: micro-batches, clipping, update
lr_schedules.py              [lr_schedule]: warm-up, decay shapes, scaling with the batch
average.py                   [average.NAME]: exponential and window averages of the weights
precision.py                 float32 or bf16, and bf16 copies of the weights
float8.py                    matrix products of the blocks in float8
activation_checkpointing.py  which operations are kept, and which are recomputed
guard.py                     [guard]: detects bad steps and decides what to do (recipes/bad_steps.py does it)
clock.py                     steps, samples and tokens trained so far
garbage_collection.py        Python's garbage collector, at the same steps on every rank
critical_batch.py            evaluation of branched training
generation.py                sampling of text

Run and machine
run_directory.py             the files of a run directory, its owner and lock
interrupts.py                signals, stop file and time limit; their exit statuses
environment.py               versions of code and packages, and devices, recorded with the run
hardware.py                  peak FLOP/s and memory of devices
cpu.py                       the number of CPUs of this process
profiler_range.py            named ranges that the profiler package reads
plotting.py                  style of all figures

Shared by all
interfaces.py                protocols between components
protocol_defaults.py         defaults of the optional members that a custom class lacks
errors.py                    InputError: bad input, with its key; libraries that are not installed
units.py                     "20M" tokens, and other quantities as written in recipes
retry.py                     repeats calls that fail, in a thread
evaluation_mode.py           a context in which a model is in evaluation mode
token_ids.py                 checks of token ids, tokenizers with more ids than a model, and the label that is ignored
atomic_files.py              files and directories that are complete or do not exist
unicode_text.py              text without lone surrogates
json_files.py                reads JSON that may be damaged or untrusted
paths.py                     finding, listing and hashing files
local_tensor.py              the shard of a DTensor that this process holds
python_library.py            the source files of the Python standard library, in three splits
standard_streams.py          robust standard output of commands
"""
