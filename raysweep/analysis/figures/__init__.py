"""Figures of a report by matplotlib: what is drawn, how it looks, and as what it is written."""
