"""`python -m rnn_gpu.check_cell my_cell.py[:NAME]`: whether cells of your own are right (cell_check.py)."""

if __name__ != "__main__":
    raise ImportError("rnn_gpu.check_cell is a function; this file is the command `python -m rnn_gpu.check_cell FILE`")

from rnn_gpu.cell_check import main
from rnn_gpu.command import exit_with

exit_with(main)
