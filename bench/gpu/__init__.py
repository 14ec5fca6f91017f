"""``make gpu`` and ``make tune``: everything that needs a GPU, checked and timed by one command.

``python -m bench.gpu`` plans and collects; it imports nothing outside the standard library. Every
step runs in a process of its own, which may crash or hang without taking the others along, and
reports rows (``rows.py``). ``cases/`` describes the ops: inputs, truth, other forms, work.
"""
