"""The operators, one folder each: specification, schema and gradients, implementations, cases."""
