"""What `benchmarks/fuzz.py` is made of: the site, one generator for every kind of input, and the judge of an ending."""
