"""The built-in demo's models: a small open_clip model and a small timm classifier, made by recipes/build_demo.py."""
