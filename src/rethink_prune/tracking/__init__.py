"""Curves and tables for the programs that show them: TensorBoard."""
