"""What the commands and reports show: as text, on a terminal, as pictures, as a page, as JSON."""
