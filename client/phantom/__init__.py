"""Made-up hospitals: synthetic chest CTs and radiographs for simulations and tests.

Not used where real scans are.
"""
