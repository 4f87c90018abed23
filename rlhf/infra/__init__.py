"""What every run stands on: configuration, errors, devices, seeds, checkpoints, logs and run folders."""
