"""Measuring: what a step, a decode and each kernel take, beside what the machine can do and beside others' code.

Weights are random and of real size, so nothing here says anything of quality. `jobs.bench` starts it; rows of results
are values (`rows.py`), and the README's table is made of them (`table.py`).
"""
