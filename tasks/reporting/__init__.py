"""Worker: everything that the stages of a run left behind, as one table and one page. `python -m tasks.reporting DIR`.

gather.py     reads the stages' artifacts and outputs
results.py    the result table: task x metric, base | CPT | SFT and their differences (pandas)
gate.py       the gate's verdict on the last model
facts.py      the other tables: training, mix, ledger, recipe, timings, versions, lineage
curves.py     loss and learning rate of a training stage (matplotlib, as SVG and PNG)
samples.py    answers side by side, and rows as they were trained
blocks.py     what a page is made of: tables, figures, texts, columns
page.py       the sections of the page, in order; a new one is one function more in `SECTIONS`
html.py, markdown.py   the same blocks in both forms; everything that is shown is escaped here and nowhere else
terminal.py   the result table for the terminal
"""

from tasks.reporting.terminal import result_table_text

__all__ = ["result_table_text"]
