"""Pages of results: charts, tables and pictures as HTML that needs nothing else."""
