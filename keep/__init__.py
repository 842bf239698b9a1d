"""What makes a run survive: the command, checkpoints, export, log, signals, faults."""
