"""Which grid, which codes?"""
