"""The formats that source files come in, one module each, behind one seam: what a file holds, and the rows of a range of it."""
