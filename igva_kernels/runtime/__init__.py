"""What kernels need whatever their operator is: backends, launches, products, and what torch does around a call."""
