"""Frozen: searches over recipes that were made once, before the optimizers of leangpt.optim were.

Their CSVs stay as the record of what was tried: adaptive_search.csv is of commit eb9867c,
muonsn_search.csv of 6ad1d91, 6865f9d, bc699d8 and 57632a3. The scripts still run (the tests hold
recipes to the optimizers of their names), but no table is to be made from new rows of theirs: what
a search finds is judged by experiments/optimizers/optimizer_quality.py, on fresh seeds.
"""
