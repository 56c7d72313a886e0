"""The command line: ``kdkernels distill``, ``sweep``, ``cache-teacher`` and the others.

:mod:`~kdkernels.commands.main` reads the options and calls one module a command; nothing outside
this package imports it.
"""
