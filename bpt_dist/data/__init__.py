"""The data path: task -> rows -> text to text -> tokens -> batches."""
