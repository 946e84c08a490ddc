"""`gpa-bench`: what an engine and the codec cost, measured side by side under the same conditions.

Who measures stands above what is measured: engines are reached through the registry and the `Engine` protocol only.
Every contender runs in a child process of its own (`child`), the parent asks them in turn, round by round (`rounds`),
and one report (`report`, `tables`) holds every sample, the medians, and the ratios taken within a round.

The tasks accuracy, speed, memory and full look at one engine (`task_commands`): its process answers as `subject`, and
each task's module describes the file that it writes.
"""
