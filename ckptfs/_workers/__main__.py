"""Run a worker: ``python -m ckptfs._workers CONTROL-FD PARENT-PID``."""

from ckptfs._workers.worker import main

main()
