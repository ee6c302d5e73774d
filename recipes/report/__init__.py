"""Reports: one HTML file about a run, that can be sent to somebody."""
