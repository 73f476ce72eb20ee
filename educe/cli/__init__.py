"""The command line: parse, call one recipe, show, exit code."""
