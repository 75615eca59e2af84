"""The data path, one way: task -> rows -> text to text -> tokens -> batches, and the metrics of the way back."""
