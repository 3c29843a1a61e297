"""Which units go, and what stands in for them?"""
