"""The operators, a folder each: specification, schema and gradients, implementations, cases."""
