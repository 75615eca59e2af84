"""One file a method, named as in the table; `base.load` finds a method by its file name. There is no registry."""
