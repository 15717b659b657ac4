"""What the command line adds to a study: its arguments are checked, sweeps list their failures, jobs are requeued."""
