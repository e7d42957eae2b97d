"""The tutorial's models: each one file: a config and small modules on leedl_fast.layers."""
