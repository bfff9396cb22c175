"""What everything stands on: errors, files, signals, progress, the log, what metrics are called."""
