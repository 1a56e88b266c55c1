"""Class, concept and image level of an analysis (METHOD section 3)."""
