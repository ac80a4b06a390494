//! Starts the real binaries in scratch directories, waits for states with deadlines, prints every log on failure.
