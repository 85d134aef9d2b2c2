"""Reports: pure functions of rows; each format has its own module."""
