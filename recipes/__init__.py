"""Recipes: what a run is, from the command line to the training loop.

Command line and configuration
__main__.py             `python -m recipes`
cli.py                  options, exit codes, and what each option starts
launch.py               the number of processes, from the environment, and the start of the workers
config/                 TOML files to typed components
recipe.py               optional attributes of a recipe; refuses a recipe that trains nothing
run_config.py           [run] and [training]
interfaces.py           the protocols that components implement
errors.py               places an error at its recipe line; RunError; remedies
process_environment.py  environment variables for NCCL and the allocator

Pre-training
pretrain.py             the recipe, and Trainer.train, the training loop
build.py                builds the parts of a run, in order
run_setup.py            process group, run directory, log, choice of the checkpoint
model_setup.py          builds tokenizer and model, and checks what it supports
initial_weights.py      [run] init_from: weights of a Hugging Face directory, or of a checkpoint
parallelize.py          tensor parallelism, activation checkpointing, compile, FSDP2
batch_policy.py         builds the batch policy (the policies: components/batch/)
prepared_data.py        the data of a recipe, built for a tool; refuses untokenized text on several nodes
data_checks.py          checks the micro-batches of a step
step_results.py         a step queued on the device, and its results on the host
pending_steps.py        the steps whose results are not read yet; reads and logs them
step_timer.py           times the steps, for the metrics and batch policies
step_metrics.py         the row of a step in metrics.jsonl
bad_steps.py            skips, rolls back or stops as components/guard.py decides
hooks.py                the points of the loop, for custom hooks
builtin_hooks.py        saving, validation, profiling, garbage collection
checkpointing.py        saves and restores the run (the files: components/checkpoint/)
training_state.py       what a checkpoint saves
tasks.py                [tasks.NAME]: tasks during training and of a trained model
averages.py             [average.NAME]: averages of the weights in a run and in a checkpoint
probes.py               [probes.NAME]: the methods of a probe, and checks (the probes: components/probes/)
probe_runner.py         calls the probes of a run around a step
resume.py               the checkpoints that can be resumed; what a resumed run may change: RULES

Other uses
dry_run/                --dry-run
critical_batch/         critical batch size by branched training
evaluate.py             the recipe that evaluates a trained model: its loss on any text, or tasks
evaluator.py            evaluates it
trained_model.py        loads a trained model, for evaluation and generation
stored_config.py        the configuration in an untrusted checkpoint
"""
