"""Python imports this in every process whose PYTHONPATH names this folder: the processes that tests start."""

from hermetic_watch import install_in_child

install_in_child()
