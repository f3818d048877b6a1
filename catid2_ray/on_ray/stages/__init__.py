"""One file or folder a stage: read parts, call the pure code, commit."""
