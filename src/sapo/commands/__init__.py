"""The bodies of the command line's longer commands: each prints what a function of the library returns."""
