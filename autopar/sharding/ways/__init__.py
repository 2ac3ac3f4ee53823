"""How one operation can be spread over a mesh, how a value changes its layout, and what both cost."""
