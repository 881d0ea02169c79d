"""Result files as tables: what is compared with what, in which columns, in which format.

Numbers come from `metrics`, names from `results.labels`; no file is read here.
"""
