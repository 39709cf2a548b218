"""`python -m rnn_gpu.check my_cell.py`: the first name of `python -m rnn_gpu.check_cell`."""

if __name__ != "__main__":
    raise ImportError("rnn_gpu.check is a function; the command for cells is `python -m rnn_gpu.check_cell FILE`")

from rnn_gpu.cell_check import main
from rnn_gpu.command import exit_with

exit_with(main)
