"""What is run: one thin module for each command, and the recipes."""
