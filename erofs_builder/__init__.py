"""EROFS bytes, tar layers, frames and frame tables: pure format code, no network and no kernel calls."""
