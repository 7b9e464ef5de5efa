"""The command line: one thin module a command; the only place with handlers, printing and exit codes."""
