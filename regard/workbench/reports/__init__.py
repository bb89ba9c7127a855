"""Result pages: charts, tables and pictures as self-contained HTML."""
