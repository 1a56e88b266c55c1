"""The translator T(f) = A f + a from classifier features into a vision-language model's space."""
