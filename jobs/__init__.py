"""Verbs for `ray job submit`: parse, one call, print the manifest's URI, exit code."""
