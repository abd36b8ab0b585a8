"""What every training needs around its steps, whatever it trains: the model's stages and the parts of token2wav share
it.

config.py     keys that all trainings have: where, how long, optimiser, limits
schedule.py   learning rate as a function of the step
progress.py   metrics.jsonl, TensorBoard, progress bar; curves.py draws them
files.py      files that appear complete or not at all
signals.py    SIGTERM and Ctrl-C as a wish to stop
bad_steps.py  steps that are left out because something is not finite
validators.py measurements of real tasks, named on the command line
"""
