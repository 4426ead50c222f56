"""One page that says what a sweep found: a single HTML file that asks no other machine for anything."""
