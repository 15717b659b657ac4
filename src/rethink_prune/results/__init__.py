"""What a study leaves behind: metrics, tables, pictures, TensorBoard."""
