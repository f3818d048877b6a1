"""What every stage stands on: Ray itself, work part by part, files between workers, the live series, progress."""
