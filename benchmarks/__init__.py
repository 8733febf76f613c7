"""What a norm costs and how wrong it is, measured against the libraries a user would pick instead.

python -m benchmarks.speed       one layer: time, memory and compile time
python benchmarks/accuracy.py     one layer: errors against float64
"""
