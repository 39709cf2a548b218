"""What the kernels cost: machine code counted offline (resources.py)."""
