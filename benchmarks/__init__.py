"""What `bench.py` measures with, the results, and the scripts that measure other things.

A package and not a bare folder, because fairscale installs one of the same name.
"""
