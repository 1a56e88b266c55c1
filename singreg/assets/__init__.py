"""The built-in demo's models: a small open_clip model and a small timm classifier, made by .github/build_demo.py."""
