"""What goes through several parts of the library, from inputs to files: what the commands call."""
